"""Work, at its edges: what it counts, keeps and tells, without waiting for a child."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig import HANGS, Rig
from test_handlers import run_of
from test_node_bounds import note_calls, timers
from test_schedule import NOON, every

import hive

Make = Callable[..., Rig]


def work_of(rig: Rig) -> hive.Work:
    return rig.node.work


def ended(exit: int | None = 0, out: str = "", err: str = "", **how: Any) -> hive.ProcessResult:
    return hive.ProcessResult(exit, stdout=out.encode(), stderr=err.encode(), **how)


def test_the_bounds_are_those_of_the_documentation() -> None:
    assert hive.FIRST_RUN == 10 and hive.LOOK_GAP == 1, "a new handler is known at once"
    assert (hive.MAX_RUNS_WAITING, hive.MAX_COUNTED_ACTIONS) == (1000, 100)


# The schedule


def test_what_has_never_run_says_so() -> None:
    scheduled = every(300)
    scheduled.plan(NOON, chance=0)
    assert (scheduled.next, scheduled.last, scheduled.ok) == (NOON + 10, 0.0, None)
    row = {"action": "check", "when": "every 300s", "notify": "change"}
    assert scheduled.document() == {**row, "last": None, "next": int(NOON + 10), "ok": None}
    scheduled.begin(NOON + 10.9)
    assert scheduled.running and scheduled.last == NOON + 10.9
    scheduled.end(True)
    assert scheduled.document() == {
        **{**row, "last": int(NOON + 10), "next": int(NOON + 10), "ok": True}
    }
    assert not scheduled.running


def test_a_run_may_be_as_late_as_it_may_be() -> None:
    scheduled = every(3600, catch_up="2h")
    scheduled.last, scheduled.next = NOON, NOON
    assert not scheduled.missed(NOON + 7200) and scheduled.missed(NOON + 7201)
    for late, due in ((7200, NOON + 3600 + 7200), (7201, NOON + 4 * 3600)):
        scheduled.plan(NOON + 3600 + late, chance=0)
        assert scheduled.next == due


def test_what_was_kept_is_what_goes_on_after_a_restart() -> None:
    before, after = every(60, failures=2, notify="output"), every(60, failures=2, notify="output")
    before.begin(NOON - 5)
    before.end(True, output="a")
    before.end(False, output="b")
    after.restore(json.loads(json.dumps(before.kept())), NOON)
    assert (
        before.kept()
        == after.kept()
        == {**{"last": NOON - 5, "ok": False, "failures": 1, "alarmed": True, "output": "b"}}
    )
    assert after.end(True, output="b") == "is well again"
    after.restore({**before.kept(), "last": NOON}, NOON)
    assert after.last == 0.0, "a clock was put back"
    after.restore({"ok": False}, NOON)
    assert (after.failures, after.alarmed, after.output) == (1, True, "")
    after.restore({"ok": True, "alarmed": False}, NOON)
    assert (after.failures, after.alarmed) == (0, False)


def test_a_handler_that_says_that_it_is_no_news_still_fails() -> None:
    scheduled = every(60)
    scheduled.end(False, news=False)
    assert scheduled.failing and not scheduled.alarmed and scheduled.ok is False
    scheduled.end(False, news=True)
    assert not scheduled.alarmed, "it was told what is news, which is not that it fails"
    scheduled.end(False)
    assert scheduled.alarmed
    scheduled.end(True, news=True)
    assert not scheduled.alarmed and scheduled.failures == 0


def scheduled_rig(rig_of: Make, *agents: hive.InstanceConfig, **more: Any) -> Rig:
    """One whose handler never runs by itself."""
    given: dict[str, Any] = {"every": 86400.0, **more}
    return rig_of(agents, schedule=[hive.ScheduleConfig("check", **given)], check="true")


@pytest.mark.parametrize(
    ("due_in", "wait"), [(5, 5.0), (0.05, 0.1), (-3, 0.1), (59.9, 59.9), (86400, 60.0)]
)
def test_the_schedule_is_looked_at_when_it_is_due_or_in_a_minute(
    rig_of: Make, monkeypatch: pytest.MonkeyPatch, due_in: float, wait: float
) -> None:
    rig = scheduled_rig(rig_of)
    (one,) = work_of(rig)._schedule
    before = timers(rig)
    monkeypatch.setattr(time, "time", lambda: NOON)
    one.next, one.running = NOON + due_in, True
    work_of(rig)._run_due()
    assert timers(rig).count(wait) == before.count(wait) + 1 and len(timers(rig)) == len(before) + 1


def test_a_node_that_stops_begins_no_run(rig_of: Make) -> None:
    rig = scheduled_rig(rig_of)
    (one,) = work_of(rig)._schedule
    one.next = 0.0
    rig.node.node.stopping = True
    work_of(rig)._run_due()
    assert not one.running and not rig.started()
    rig.node.node.stopping = False
    work_of(rig)._run_due()
    assert one.running and rig.started() == ["check"] and one.next > time.time() + 86000
    assert abs(one.last - time.time()) < 30


def test_a_run_for_which_there_is_no_room_is_no_run(
    rig_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = scheduled_rig(rig_of)
    work = work_of(rig)
    (one,) = work._schedule
    monkeypatch.setattr(work._queue, "put", lambda run: run)
    work._run_scheduled(one, NOON)
    assert (one.running, one.last, rig.started()) == (False, 0.0, [])
    (line,) = rig.events("not run")
    assert (line["level"], line["action"]) == ("warning", "check")
    assert line["why"] == "too many handlers wait"
    other = rig.say("command", "ping")
    assert "busy: 1000 messages wait for handlers" in rig.answer_to(other).text


def test_whoever_makes_room_hears_so(rig_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rig_of(hang=HANGS)
    monkeypatch.setattr(hive, "MAX_RUNS_WAITING", 2)
    flood = [rig.say("command", "hang", sender="flood") for _ in range(3)]
    rig.say("command", "hang", sender="gamma")
    rig.turn()
    assert rig.answer_to(flood[-1]).text.startswith("beta: hang refused: busy: ")
    assert len(rig.journal.tasks()) == 3
    (late,) = [rig.say("command", "hang", sender="flood")]
    assert "busy" in rig.answer_to(late).text and len(rig.journal.tasks()) == 3


RESULTS: list[tuple[hive.ProcessResult, str, str, str]] = [
    (ended(out='{"news": true, "text": "a letter"}'), "status", "has news", "a letter"),
    (ended(out='{"news": true}'), "status", "has news", '{"news": true}'),
    (ended(out='{"news": true, "text": ""}'), "status", "has news", "it prints nothing"),
    (ended(out='{"news": true, "text": 5}'), "status", "has news", '{"news": true, "text": 5}'),
    (ended(1, '{"news": true, "text": "x"}', "y"), "status", "has news", "x"),
    (ended(1, '{"news": true, "text": ""}', "y"), "status", "has news", "exit 1: y"),
    (ended(2, '{"text": "x"}', "the disk is gone"), "alert", "is failing", "exit 2: the disk is"),
    (ended(2), "alert", "is failing", "exit 2"),
]


@pytest.mark.parametrize(("result", "ch", "words", "text"), RESULTS)
def test_what_an_agent_reads_of_a_run(
    rig_of: Make,
    main_agent: hive.InstanceConfig,
    monkeypatch: pytest.MonkeyPatch,
    result: hive.ProcessResult,
    ch: str,
    words: str,
    text: str,
) -> None:
    rig = scheduled_rig(rig_of, main_agent)
    told = note_calls(monkeypatch, rig.node.node, "tell_own_agents")
    finish(rig, result)
    ((said, note, now),) = told
    assert (said.ch, said.sender, said.to, note, now) == (ch, "beta", "beta", "scheduled", True)
    assert said.text.startswith(f"check {words}: {text}")
    (one,) = work_of(rig)._schedule
    assert rig.journal.get(one.key) == one.kept() and one.ok is result.ok


def finish(rig: Rig, result: hive.ProcessResult) -> hive.Envelope:
    """A scheduled run has ended so."""
    (one,) = work_of(rig)._schedule
    one.begin(NOON)
    run = hive.Envelope.new("beta", "beta", "command", "scheduled", action="check")
    work_of(rig)._finish(hive.HandlerRun(run, scheduled=one), result)
    return run


@pytest.mark.parametrize("news", [True, False, None])
def test_a_run_that_said_what_is_news_is_the_last_that_was_heard(
    rig_of: Make, news: bool | None
) -> None:
    rig = scheduled_rig(rig_of)
    run = finish(rig, ended(out=json.dumps({"news": news})))
    assert work_of(rig)._last_run("check") == ("" if news is None else run.id)


def test_news_that_can_wait_and_what_is_long_and_what_is_private(
    rig_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = scheduled_rig(rig_of, notify="always")
    told = note_calls(monkeypatch, rig.node.node, "tell_own_agents")
    for said in (
        {"news": True, "urgency": "later"},
        {"news": True, "urgency": "now"},
        {"news": False, "urgency": "later"},
        {"text": "x" * 10_000, "private": True},
    ):
        finish(rig, ended(out=json.dumps(said)))
    assert [now for _, _, now in told] == [False, True, True, True]
    long = told[-1][0]
    assert len(long.text) == hive.MAX_ERROR == 8192 and long.extra == {"private": True}
    assert told[0][0].extra == {} and told[2][0].text.startswith("check ")


@pytest.mark.parametrize("why", ["cancelled", "stopping", "full"])
def test_an_outcome_that_cannot_be_taken_over_is_left_to_the_next_run(
    rig_of: Make, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    rig = scheduled_rig(rig_of, notify="always")
    told = note_calls(monkeypatch, rig.node.node, "tell_own_agents")
    rig.node.node.stopping, rig.journal.full = why == "stopping", why == "full"
    finish(rig, ended(out='{"news": true}', cancelled=why == "cancelled"))
    (one,) = work_of(rig)._schedule
    assert (one.running, one.ok, told, rig.journal.get(one.key)) == (False, None, [], {})
    assert work_of(rig)._last_run("check") == ""
    rig.node.node.stopping = rig.journal.full = False


def test_a_roster_is_shown_when_a_run_has_ended_and_that_is_kept(rig_of: Make) -> None:
    rig = scheduled_rig(rig_of)
    before = len(rig.kept("beta", "roster"))
    assert not rig.node.node._committing
    finish(rig, ended())
    assert rig.node.node._committing
    rig.turn()
    (shown,) = rig.kept("beta", "roster")[before:]
    assert shown["schedule"][0]["ok"] is True


# The line of handlers


def test_a_queue_leaves_nothing_behind() -> None:
    queue = hive.HandlerQueue(workers=4, workers_of=lambda action: 1)
    for action in "ab":
        queue.put(run_of(action, 0, action))
    assert queue._lengths == {"a": 1, "b": 1} and queue.running == 0
    queue.take(), queue.take()
    assert (queue.running, queue._lengths) == (2, {})
    queue.done("a")
    assert (queue.running, queue._running) == (1, {"b": 1})
    queue.put(run_of("b", 1, "b"))
    assert not queue.is_full_for("b") and len(queue.clear()) == 1
    assert (len(queue), queue._lengths, queue.clear()) == (0, {}, [])


def test_what_has_run_is_counted_and_timed(rig: Rig) -> None:
    work, node = work_of(rig), rig.node.node
    for exit, seconds in ((0, 2.0), (1, 0.5), (0, 0.25)):
        work._queue._running["ping"] = 1
        envelope = hive.Envelope.new("alpha", "beta", "command", "x", action="ping")
        work._ran(hive.HandlerRun(envelope), ended(exit, seconds=seconds))
    assert (node.counts["runs"], node.counts["failures"]) == (3, 1)
    numbers = work.numbers()
    assert numbers["hive_handler_runs_total"] == [["ping", "ok", 2], ["ping", "failed", 1]]
    assert numbers["hive_handler_seconds_total"] == [["ping", 2.75]]


def test_what_runs_and_waits_is_told_as_it_is(
    rig_of: Make, main_agent: hive.InstanceConfig
) -> None:
    rig = rig_of([main_agent.replace(command=("true",))], hang=HANGS)
    for _ in range(3):
        rig.say("command", "hang")
    agent = work_of(rig)._agents["main"]
    agent._not_before = rig.clock.now + 1000
    rig.say("command", text="hello")
    numbers = work_of(rig).numbers()
    assert numbers["hive_queue_length"] == [["handlers", 2], ["agents", 1]]
    assert numbers["hive_handlers_running"] == [[1]] and work_of(rig).busy
    assert numbers["hive_agent_up"] == [["main", True]]
    assert numbers["hive_agent_turns_total"] == []
    status = work_of(rig).status()
    assert (status.running, status.waiting) == (1, 2) and "hang" in status.handlers
    assert status.agents == {"main": {"status": "unknown", "reason": ""}}
    agent.health, agent.reason, agent._again_at = hive.Health.DOWN, "gone", 12345
    down = {"status": "down", "reason": "gone", "next_try": 12345}
    assert work_of(rig).status().agents == {"main": down}
    assert work_of(rig).numbers()["hive_agent_up"] == [["main", False]]
    agent.stop()


def test_all_that_is_wrong_is_one_line(rig_of: Make, main_agent: hive.InstanceConfig) -> None:
    rig = scheduled_rig(rig_of, main_agent)
    work = work_of(rig)
    assert work.trouble() == ""
    work._agents["main"].health, work._agents["main"].reason = hive.Health.DOWN, "gone"
    work._schedule[0].failures = 1
    rig.node.node.limits.refuse("flood", rig.clock.now)
    assert work.trouble() == (
        "agent main: gone; schedule check every 86400s is failing;"
        " flood sends more than 100 messages a second: 1 refused"
    )


@pytest.mark.parametrize("late", [False, True])
def test_what_waited_too_long_does_not_run(rig_of: Make, late: bool) -> None:
    rig = rig_of()
    envelope = hive.Envelope.new("alpha", "beta", "command", "x", action="ping")
    until = rig.clock.now - (0.001 if late else 0.0)
    work_of(rig)._enqueue(hive.HandlerRun(envelope, until))
    if late:
        rig.turn()
        assert rig.answers_to(envelope), "at the end of the turn"
    answer = rig.answer_to(envelope)
    expected = "its time to live was over before its turn came" if late else "pong"
    assert (expected in answer.text) and bool(rig.started()) is not late


def test_a_deadline_is_kept_by_the_loops_clock(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOON)
    assert work_of(rig)._deadline(None) == float("inf")
    assert work_of(rig)._deadline(NOON + 50) == rig.clock.now + 50


def test_unknown_actions_make_it_look_for_handlers_once_a_second(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_of(rig)
    looks = note_calls(monkeypatch, work, "look_for_handlers", True)
    changes = note_calls(monkeypatch, work, "_changed")
    began = rig.clock.now + 100
    for after in (0, 0.99, 1.0, 1.99, 2.0):
        rig.clock.now = began + after
        work.look_again()
    assert len(looks) == len(changes) == 3


def test_an_old_result_is_cleared_of_a_handler_that_publishes_none(rig_of: Make) -> None:
    settings = {"secret": hive.HandlerConfig(publish=False), "open": hive.HandlerConfig()}
    rig = rig_of(settings=settings)
    cleared = [one for one in rig.wire.published if not one.payload]
    assert [(one.topic, one.retain) for one in cleared] == [("hive/meta/beta/secret", True)]


@pytest.mark.parametrize("publish", [True, False])
def test_what_is_unpublished_or_private_is_marked_so(
    rig_of: Make, monkeypatch: pytest.MonkeyPatch, publish: bool
) -> None:
    rig = rig_of(settings={"ping": hive.HandlerConfig(publish=publish)})
    kept = note_calls(monkeypatch, rig.node.node, "keep_result")
    asked = [
        hive.Envelope.new("alpha", "beta", "command", "x", action="ping", id=f"m-{n}")
        for n in range(3)
    ]
    for one, out in zip(
        asked, ("pong", '{"private": true, "a": 1}', '{"private": 1}'), strict=True
    ):
        work_of(rig)._finish(hive.HandlerRun(one), ended(out=out))
    rig.turn()
    hidden = [rig.answers_to(one)[0].extra.get("private", False) for one in asked]
    assert hidden == ([False, True, False] if publish else [True] * 3)
    results = [document["result"] for _, document in kept]
    assert results == (["pong", {"private": True}, {"private": 1}] if publish else [])


def test_the_journal_says_how_a_handler_ended(rig: Rig) -> None:
    asked = [rig.say("status", urgency="later", id=f"m-{n}", action="ping") for n in range(2)]
    rig.turn()
    for one, result in zip(
        asked, (ended(seconds=0.012), ended(3, err="no", seconds=1.0)), strict=True
    ):
        work_of(rig)._finish(hive.HandlerRun(one), result)
    rig.turn()
    notes = [row["note"] for one in asked for row in rig.journal.exchange(one.id)]
    assert [note for note in notes if note.partition(",")[0] in ("ok", "error: exit 3: no")] == [
        "ok, 12 ms",
        "error: exit 3: no",
    ]
    rows = rig.events("handler ended")
    shown = [
        {k: row.get(k) for k in ("level", "action", "status", "exit", "ms", "why")} for row in rows
    ]
    assert shown == [
        {"level": "info", "action": "ping", "status": "ok", "exit": 0, "ms": 12, "why": None},
        {
            **{"level": "warning", "action": "ping", "status": "error"},
            **{"exit": 3, "ms": 1000, "why": "exit 3: no"},
        },
    ]


def test_a_handler_that_starts_is_in_the_log_with_its_message(rig: Rig) -> None:
    asked = rig.say("command", "ping")
    (line,) = rig.events("handler started")
    assert (line["level"], line["action"], line["id"]) == ("info", "ping", asked.id)
    (task,) = rig.journal.tasks()
    assert task.began, "after a crash nobody could say whether it has run"


# Agents


def an_event(**more: Any) -> hive.PendingEvent:
    envelope = hive.Envelope.new("alpha", "beta", "command", "x", id="m-1")
    return hive.PendingEvent(envelope.replace(extra={hive.RECEIPTS: True}), True, 1e9, **more)


def told_events(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[hive.PendingEvent], list[tuple[hive.PendingEvent, float]]]:
    """What its agent is told, and what its gateway took before."""
    agent = work_of(rig)._agents["main"]
    told, taken = list[hive.PendingEvent](), list[tuple[hive.PendingEvent, float]]()
    monkeypatch.setattr(agent, "wake", told.append)
    monkeypatch.setattr(agent, "expect_read", lambda event, at: taken.append((event, at)))
    return told, taken


@pytest.mark.parametrize(("ttl", "left"), [(None, 600.0), (50, 50.0), (5000, 600.0)])
def test_a_message_waits_for_its_agent_until_its_time_or_patience_is_over(
    rig_of: Make,
    main_agent: hive.InstanceConfig,
    monkeypatch: pytest.MonkeyPatch,
    ttl: int | None,
    left: float,
) -> None:
    rig = rig_of([main_agent], node={"agent_patience": 600.0})
    told, _ = told_events(rig, monkeypatch)
    rig.say("status", ttl=ttl)
    (event,) = told
    assert abs(event.until - rig.clock.now - left) < 30
    assert event.now and event.task and event.note == "" and not event.uncertain


def task_of(rig: Rig, agent: str = "main", note: str = "") -> hive.Task:
    envelope = hive.Envelope.new("alpha", agent, "command", "x")
    row = rig.journal.record(hive.Event.RECEIVED, envelope, 1.0) or 0
    n = rig.journal.add_task(row, agent, None, True, note)
    return next(task for task in rig.journal.tasks() if task.n == n)


def test_what_was_left_is_taken_up_as_it_was(
    rig_of: Make, main_agent: hive.InstanceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of([main_agent])
    told, taken = told_events(rig, monkeypatch)
    work = work_of(rig)
    work.take_up()
    assert not rig.events("taking up what was not finished")
    now = time.time()
    begun, fresh = task_of(rig, note="a"), task_of(rig, note="b")
    accepted, gone = task_of(rig), task_of(rig, "gone")
    gone_accepted, kept = task_of(rig, "gone"), task_of(rig, "session")
    rig.journal.start_tasks([begun.n])
    rig.journal.mark_accepted(accepted.n, now - 100)
    rig.journal.mark_accepted(gone_accepted.n, now - 100)
    rig.node.node.sessions._sessions["session"] = hive.AgentSession("session", {}, 0.0)
    work.take_up()
    assert [(one.task, one.note) for one in told] == [
        (begun.n, hive.UNCERTAIN_NOTE),
        (fresh.n, "b"),
    ]
    ((event, at),) = taken
    assert event.task == accepted.n and abs(at - (rig.clock.now - 100)) < 30
    left = [task.n for task in rig.journal.tasks()]
    assert left == [begun.n, fresh.n, accepted.n, kept.n]
    rig.turn()
    (refusal,) = rig.sent("alert")
    assert refusal.reply_to == gone.envelope.id, "the other one had been told, as far as is known"
    (line,) = rig.events("taking up what was not finished")
    assert line["tasks"] == 4


def test_whatever_becomes_of_a_message_is_on_disk_at_the_end_of_the_turn(
    rig_of: Make, main_agent: hive.InstanceConfig
) -> None:
    rig = rig_of([main_agent])
    work, node = work_of(rig), rig.node.node
    run = hive.HandlerRun(an_event().envelope.replace(action="ping"))
    calls: tuple[Callable[[int], None], ...] = (
        lambda task: work.agent_failed([an_event(task=task)]),
        lambda task: work.agent_woken("main", an_event(note=hive.UNCERTAIN_NOTE), None, False),
        lambda task: work.agent_has_read(an_event(task=task)),
        lambda task: work.agent_gave_up("main", an_event(task=task), "why"),
        lambda task: work._finish(run, ended()),
    )
    for call in calls:
        task = task_of(rig)
        rig.turn()
        assert not node._committing
        call(task.n)
        assert node._committing
        rig.journal.remove_task(task.n)


def test_each_outcome_of_a_call_leaves_its_trace(
    rig_of: Make, main_agent: hive.InstanceConfig
) -> None:
    rig = rig_of([main_agent])
    work = work_of(rig)

    def begun() -> list[tuple[bool, bool]]:
        return [(task.began, bool(task.accepted)) for task in rig.journal.tasks()]

    def notes() -> list[str]:
        return [row["note"] for row in rig.journal.exchange("m-1")]

    def texts(ch: str) -> list[str]:
        rig.turn()
        return [one.text for one in rig.sent(ch)]

    task = task_of(rig).n
    work.agent_begins([an_event(task=task), an_event()])
    assert begun() == [(True, False)]
    work.agent_failed([an_event(task=task, note=hive.UNCERTAIN_NOTE)])
    assert begun() == [(True, False)], "perhaps it was told"
    work.agent_failed([an_event(task=task), an_event()])
    assert begun() == [(False, False)] and texts("alert") == []
    work.agent_woken("main", an_event(task=task), None, True)
    assert begun() == [(False, True)]
    assert notes() == ["told main", "receipt: told main"]
    assert (texts("status"), texts("response")) == (["told main"], [])
    work.agent_woken("main", an_event(task=task, note=hive.UNCERTAIN_NOTE), "6 files", False)
    assert begun() == [] and texts("status") == ["told main"] and texts("response") == ["6 files"]
    alert = hive.Envelope.new("alpha", "beta", "alert", "x")
    work.agent_woken("main", hive.PendingEvent(alert, True, 1e9), "no answer", False)
    assert texts("response") == ["6 files"]
    task = task_of(rig).n
    work.agent_has_read(an_event())
    assert begun() == [(False, False)]
    work.agent_has_read(an_event(task=task))
    assert begun() == []
    task = task_of(rig).n
    work.agent_gave_up("main", an_event(task=task), "it is gone")
    assert begun() == [] and "main not told: it is gone" in notes()
    assert texts("alert") == ["beta: message refused: agent main was not told: it is gone"]


def test_without_a_disk_who_was_not_told_hears_that_the_node_stops(
    rig_of: Make, main_agent: hive.InstanceConfig, tmp_path: Path
) -> None:
    (tmp_path / "state").write_text("no directory")
    rig = rig_of([main_agent])
    for stopping, heard in ((False, 0), (True, 1)):
        rig.node.node.stopping = stopping
        work_of(rig).agent_failed([an_event()])
        rig.turn()
        assert len([one for one in rig.sent("alert") if "is stopping" in one.text]) == heard
    rig.node.node.stopping = False


def test_a_message_that_its_node_stops_before_is_left(rig_of: Make) -> None:
    rig = rig_of(hang=HANGS)
    for _ in range(2):
        rig.say("command", "hang")
    (waiting,) = work_of(rig).stop()
    assert waiting.id == rig.journal.tasks()[1].envelope.id
    assert work_of(rig).stop() == [], "once"


def test_a_scheduled_run_that_was_ended_is_over_though_it_may_be_tried_again(rig_of: Make) -> None:
    again = {"check": hive.HandlerConfig(retry=True)}
    schedule = [hive.ScheduleConfig("check", every=86400.0)]
    rig = rig_of(schedule=schedule, settings=again, check="true")
    (one,) = work_of(rig)._schedule
    one.begin(NOON)
    work_of(rig)._queue._running["check"] = 1
    said = hive.Envelope.new("beta", "beta", "command", "x", action="check")
    work_of(rig)._ran(hive.HandlerRun(said, scheduled=one), ended(-15, cancelled=True))
    assert not one.running


def test_what_has_no_more_time_is_ended(
    rig_of: Make, main_agent: hive.InstanceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of([main_agent])
    work = work_of(rig)
    children = note_calls(monkeypatch, work._children, "stop")
    calls = note_calls(monkeypatch, work._agents["main"], "end_call")
    work.end_handlers()
    assert len(children) == len(calls) == 1


def test_each_gateway_is_looked_at_from_the_start(
    rig_of: Make, main_agent: hive.InstanceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = note_calls(monkeypatch, hive, "probe_port")
    rig = rig_of([main_agent.replace(name=name, port=port) for name, port in (("a", 1), ("b", 2))])
    assert [port for _, port, _ in looks] == [1, 2] and rig.works()


def test_only_a_scheduled_run_knows_of_the_one_before(
    rig_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = scheduled_rig(rig_of)
    spec = hive.handler_spec
    last_runs = list[str | None]()

    def noted(*given: Any) -> hive.ProcessSpec:
        last_runs.append(given[4])
        return spec(*given)

    monkeypatch.setattr(hive, "handler_spec", noted)
    rig.say("command", "ping")
    work_of(rig)._run_scheduled(work_of(rig)._schedule[0], time.time())
    assert last_runs == [None, ""]


def test_a_schedule_goes_on_where_an_earlier_process_was(rig_of: Make) -> None:
    rig = scheduled_rig(rig_of)
    work, last = work_of(rig), time.time() - 100
    (one,) = work._schedule
    rig.journal.put(one.key, {**one.kept(), "last": last, "ok": True})
    work._start_schedule()
    assert (one.last, one.ok, one.next) == (last, True, last + 86400)
