"""Work: what a daemon owes to handlers, agents and its schedule, over crashes and restarts."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import calls_of, free_port
from rig import HANGS, Rig

import hive

Make = Callable[..., Rig]


def told(agent: Path) -> list[str]:
    """What the agent was told so far."""
    return [call["argv"][3] for call in calls_of(agent)]


def every_second(**more: Any) -> tuple[hive.ScheduleConfig]:
    return (hive.ScheduleConfig("check", every=1.0, **more),)


# What was not finished


def test_what_an_agent_was_perhaps_told_is_told_again_with_that_word(
    rig_of: Make, main_agent: hive.InstanceConfig, fast_agent: Path
) -> None:
    rig = rig_of([main_agent])
    for text, began in (("first", True), ("second", False)):
        asked = hive.Envelope.new("alpha", "beta", "status", text)
        row = rig.journal.record(hive.Event.RECEIVED, asked, 1.0) or 0
        task = rig.journal.add_task(row, "main", None, True, "a note")
        if began:
            rig.journal.start_tasks([task])
    rig.node.work.take_up()
    rig.until("both are told", lambda: not rig.journal.tasks())
    said = "\n".join(told(fast_agent))
    assert said.count(hive.UNCERTAIN_NOTE) == said.count("a note") == 1
    assert said.index(hive.UNCERTAIN_NOTE) < said.index("a note")
    assert [row["tasks"] for row in rig.events("taking up what was not finished")] == [2]


def test_what_a_gateway_took_before_a_restart_of_the_daemon_is_told_again_only_if_forgotten(
    rig_of: Make,
    main_agent: hive.InstanceConfig,
    fast_agent: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uptime = {"seconds": 1000.0}
    monkeypatch.setattr(hive, "read_uptime", lambda port: uptime["seconds"])
    with socket.create_server(("127.0.0.1", 0)) as gateway:
        rig = rig_of([main_agent.replace(port=gateway.getsockname()[1])])
        asked = hive.Envelope.new("alpha", "beta", "command", "hello")
        row = rig.journal.record(hive.Event.RECEIVED, asked, 1.0) or 0
        task = rig.journal.add_task(row, "main", None, True)
        rig.journal.mark_accepted(task, time.time() - 100)
        rig.node.work.take_up()
        rig.advance(hive.PROBE_EVERY + 1)
        rig.advance(1)
        assert told(fast_agent) == [] and [one.n for one in rig.journal.tasks()] == [task]
        assert hive.pending_document(rig.journal, {})["tasks"] == []
        uptime["seconds"] = 10.0
        rig.advance(hive.PROBE_EVERY + 1)
        rig.until("it is told again", lambda: told(fast_agent))
        assert hive.UNCERTAIN_NOTE in told(fast_agent)[0]
        rig.until("its gateway has it", lambda: rig.journal.tasks()[0].accepted)
        uptime["seconds"] = 1e6
        rig.advance(hive.FORGETTABLE + hive.PROBE_EVERY + 1)
        rig.until("it counts as read", lambda: not rig.journal.tasks())
    assert len(told(fast_agent)) == 1


def test_whoever_wrote_to_an_agent_that_is_gone_is_told(
    rig_of: Make, main_agent: hive.InstanceConfig, fast_agent: Path
) -> None:
    rig = rig_of([main_agent])
    asked = hive.Envelope.new("alpha", "gone", "command", "x")
    row = rig.journal.record(hive.Event.RECEIVED, asked, 1.0) or 0
    rig.journal.add_task(row, "gone")
    rig.node.work.take_up()
    answer = rig.answer_to(asked)
    assert (answer.ch, answer.text) == (
        "alert",
        "beta: message refused: beta has no agent gone any more",
    )
    assert rig.journal.tasks() == [] and told(fast_agent) == []


def test_a_handler_that_runs_has_begun_for_the_journal(rig_of: Make) -> None:
    rig = rig_of(hang="sleep 60")
    asked = rig.say("command", "hang")
    rig.until("it runs", rig.started)
    rig.turn()
    assert [(task.envelope.id, task.began) for task in rig.journal.tasks()] == [(asked.id, True)]


# The schedule


def test_how_it_ended_is_known_after_a_restart(
    rig_of: Make, main_agent: hive.InstanceConfig, fast_agent: Path
) -> None:
    rig = rig_of([main_agent], schedule=every_second(), check="echo why >&2; exit 3")
    rig.until("it fails twice", lambda: len(rig.events("handler ended")) >= 2)
    rig.until("the agent is told", lambda: told(fast_agent))
    rig.advance(5)
    state = rig.kept("beta", "state")[-1]
    assert (state["status"], state["reason"]) == (
        "degraded",
        "schedule check every 1s is failing",
    )
    rig.end()
    rig = rig_of([main_agent], schedule=every_second(), check="exit 4")
    rig.until("it fails again", lambda: rig.events("handler ended"))
    rig.handler("check", "echo fine")
    rig.until("it is well again", lambda: rig.events("handler ended", status="ok"))
    rig.until("the agent is told", lambda: len(told(fast_agent)) == 2)
    rig.advance(5)
    assert rig.kept("beta", "state")[-1]["status"] == "online"
    first, second = told(fast_agent)
    assert "check is failing: exit 3: why" in first and "[hive] alert from beta to beta" in first
    assert "check is well again: fine" in second and "[hive] status from beta to beta" in second


def test_what_runs_by_itself_answers_nobody(rig_of: Make) -> None:
    rig = rig_of(schedule=every_second(text="look around"), check="cat")
    (line, *_) = rig.until("it has run", lambda: rig.events("handler ended"))
    assert line["status"] == "ok" and "why" not in line
    rig.turn()
    assert rig.sent() == []
    [result] = rig.kept("beta", "check")[:1]
    assert (result["from"], result["status"]) == ("beta", "ok")
    assert result["result"]["text"] == "look around"
    [entry] = rig.kept("beta", "roster")[-1]["schedule"]
    assert (entry["action"], entry["when"], entry["ok"]) == ("check", "every 1s", True)
    assert entry["next"] >= entry["last"] > 0


def test_a_schedule_does_not_run_twice_at_once(rig_of: Make) -> None:
    rig = rig_of(schedule=every_second(), check="echo x >>../runs; sleep 60")
    rig.until("it runs", rig.started)
    began = rig.clock.now
    rig.until("it is due again", lambda: rig.clock.now > began + 3, tick=0.05)
    assert rig.started() == ["check"]


SENTINEL = """
echo "$HIVE_LAST_RUN" >>../last; echo "$HIVE_ID" >>../ids
cat ../say; exit $(cat ../exit)
"""


def sentinel(rig_of: Make, home: Path, agent: hive.InstanceConfig, say: object) -> Rig:
    speaks(home, say)
    return rig_of([agent], schedule=every_second(failures=2), check=SENTINEL)


def speaks(home: Path, say: object, exit: int = 0) -> None:
    (home / "exit").write_text(str(exit))
    (home / "say.new").write_text(json.dumps(say))
    (home / "say.new").rename(home / "say")


def test_a_sentinel_wakes_the_agent_when_it_says_that_there_is_news(
    rig_of: Make, tmp_path: Path, main_agent: hive.InstanceConfig, fast_agent: Path
) -> None:
    rig = sentinel(rig_of, tmp_path, main_agent, {"news": False, "text": "nothing"})
    rig.until("it has run twice", lambda: len(rig.events("handler ended")) >= 2)
    speaks(tmp_path, {"news": True, "text": "two letters", "private": True}, exit=1)
    rig.until("the agent is told", lambda: told(fast_agent))
    speaks(tmp_path, {"news": False, "text": "nothing"})
    rig.until("it is well", lambda: rig.events("handler ended")[-1]["status"] == "ok")
    said = told(fast_agent)
    assert all("[hive] status from beta to beta" in one for one in said)
    assert all('"check has news: two letters"' in one for one in said)
    shown = [one["result"] for one in rig.kept("beta", "check")]
    assert {"private": True} in shown and "two letters" not in json.dumps(shown)


def test_what_can_wait_is_told_with_the_agents_next_heartbeat(
    rig_of: Make, tmp_path: Path, main_agent: hive.InstanceConfig, fast_agent: Path
) -> None:
    rig = sentinel(
        rig_of, tmp_path, main_agent, {"news": True, "text": "a letter", "urgency": "later"}
    )
    rig.until("the agent is told", lambda: told(fast_agent))
    assert "next-heartbeat" in calls_of(fast_agent)[0]["argv"]


def test_a_scheduled_run_knows_which_one_was_the_last_to_be_taken_over(
    rig_of: Make, tmp_path: Path, main_agent: hive.InstanceConfig
) -> None:
    rig = sentinel(rig_of, tmp_path, main_agent, {"news": False})
    rig.until("it has run twice", lambda: len(rig.events("handler ended")) >= 2)
    rig.end()
    runs = len(rig.events("handler ended"))
    rig = sentinel(rig_of, tmp_path, main_agent, {"news": False})
    rig.until("it has run again", lambda: rig.events("handler ended"))
    lasts, ids = ((tmp_path / name).read_text().splitlines() for name in ("last", "ids"))
    assert lasts[0] == "" and len(ids) >= runs + 1
    assert lasts[1 : runs + 1] == ids[:runs]


@pytest.mark.parametrize(("say", "heard"), [({"news": False}, True), ({"text": "x"}, False)])
def test_only_a_run_that_said_what_is_news_was_heard(
    rig_of: Make, tmp_path: Path, main_agent: hive.InstanceConfig, say: object, heard: bool
) -> None:
    rig = sentinel(rig_of, tmp_path, main_agent, {"news": False})
    rig.until("it has run", lambda: rig.events("handler ended"))
    speaks(tmp_path, say, exit=1)
    rig.until("it fails", lambda: rig.events("handler ended", status="error"))
    failed = rig.events("handler ended", status="error")[0]["id"]
    runs = len(rig.events("handler ended"))
    rig.until("it runs again", lambda: len(rig.events("handler ended")) > runs)
    assert (failed in (tmp_path / "last").read_text()) == heard


def test_an_outcome_that_comes_while_the_node_stops_is_left_to_the_next_run(
    rig_of: Make, tmp_path: Path, main_agent: hive.InstanceConfig, fast_agent: Path
) -> None:
    lines = f"{HANGS} >/dev/null; {SENTINEL}"
    speaks(tmp_path, {"news": True, "text": "at the last moment"})
    rig = rig_of([main_agent], schedule=every_second(), check=lines)
    rig.until("it runs", rig.started)
    rig.node.stop()
    (tmp_path / "gate").touch()
    rig.until("it has ended", lambda: rig.events("handler ended", status="ok"))
    rig.end()
    assert told(fast_agent) == []
    rig = rig_of([main_agent], schedule=every_second(), check=lines)
    rig.until("the agent is told", lambda: told(fast_agent))
    assert (tmp_path / "last").read_text().splitlines()[:2] == ["", ""]


# Agents


def test_a_gateway_is_looked_at_before_anybody_writes(rig_of: Make, tmp_path: Path) -> None:
    port = free_port()
    agent = hive.InstanceConfig("main", openclaw_cmd=("true",), port=port)
    rig = rig_of([agent])
    rig.until("it is known", lambda: rig.events("agent is down, trying again"))
    why = f"nothing listens on 127.0.0.1:{port}: Connection refused"
    assert rig.node.work.status().trouble == f"agent main: {why}"
    rig.advance(5)
    state = rig.kept("beta", "state")[-1]
    assert (state["status"], state["reason"]) == ("degraded", f"agent main: {why}")
    with socket.create_server(("127.0.0.1", port)):
        rig.end()
        rig = rig_of([agent])
        rig.until("it is well", lambda: rig.node.work.status().agents["main"]["status"] == "ok")
    assert rig.node.work.status().trouble == ""


def test_a_node_that_stops_waits_for_no_chat_and_tells_it_again_as_one_that_had_begun(
    rig_of: Make,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        agent = hive.InstanceConfig("main", via="chat", port=silent.getsockname()[1], token="t0")
        rig = rig_of([agent])
        rig.say("command")
        rig.until("it is told", lambda: rig.events("waking agent"))
        began = rig.clock.now
        rig.end()
        assert rig.clock.now - began < 2 * hive.STOP_GRACE
        rig = rig_of([agent])
        [task] = rig.journal.tasks()
        assert task.began


def test_an_agent_hears_of_the_question_that_is_answered(
    rig_of: Make, main_agent: hive.InstanceConfig, fast_agent: Path
) -> None:
    rig = rig_of([main_agent])
    question = hive.Envelope.new("beta", "alpha", "command", "is the backup done?")
    rig.node.node.send(question)
    rig.turn()
    rig.tell(question.reply("alpha", "yes"))
    rig.until("it is told", lambda: told(fast_agent))
    [said] = told(fast_agent)
    assert json.dumps("yes") in said and "is the backup done?" in said


def test_a_gateway_that_goes_away_is_noticed_within_half_a_minute(rig_of: Make) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        rig = rig_of([hive.InstanceConfig("main", openclaw_cmd=("true",), port=port)])
        rig.until("it is well", lambda: rig.node.work.status().agents["main"]["status"] == "ok")
    rig.advance(31)
    rig.until("it is noticed", lambda: rig.node.work.status().trouble, tick=0)


def test_what_runs_seldom_does_not_hold_up_what_runs_often(rig_of: Make) -> None:
    seldom = hive.ScheduleConfig("check", every=3600.0, text="seldom")
    rig = rig_of(schedule=(*every_second(text="often"), seldom), check="true")
    rig.until("it has run three times", lambda: len(rig.events("handler ended")) >= 3)


def test_a_run_that_was_ended_and_may_run_again_has_not_begun(rig_of: Callable[..., Rig]) -> None:
    settings = {name: hive.HandlerConfig(retry=name == "again") for name in ("again", "once")}
    rig = rig_of(settings=settings, again=HANGS, once=HANGS)
    for name in settings:
        rig.say("command", name)
    rig.until("both run", lambda: len(rig.events("handler started")) == 2)
    rig.node.stop()
    rig.until("it has stopped", lambda: rig.wire.closed, tick=0.5)
    (left,) = rig.journal.tasks()
    assert (left.envelope.action, left.began) == ("again", False)
