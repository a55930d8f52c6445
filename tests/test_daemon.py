"""Daemon: how it looks again when it is asked to, ends in order, and goes on."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from rig import HANGS, Rig

import hive


def test_sighup_makes_a_node_look_at_its_handlers(rig: Rig) -> None:
    rig.handler("deploy", "echo deployed")
    os.kill(os.getpid(), signal.SIGHUP)
    rig.turn()
    assert rig.kept("beta", "roster")[-1]["handlers"] == ["deploy", "ping"]


def test_a_file_that_is_no_handler_is_told_once(rig: Rig) -> None:
    (rig.handler_dir / "notes.txt").write_text("how to deploy")
    rig.advance(60)
    (line,) = rig.events("not a handler")
    assert (line["level"], line["file"]) == ("warning", "notes.txt")


def test_each_outage_is_one_error(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(level="debug")
    for outage in (1, 2):
        for _ in range(3):
            rig.disconnect()
        assert len(rig.events("no broker, trying again", level="error")) == outage
        rig.connect()


# The end


def last_words(rig: Rig, count: int = 1) -> list[tuple[str, str, str]]:
    """The topics of the last publications, with status and reason."""
    words = []
    for publication in rig.wire.published[-count:]:
        state = json.loads(publication.payload)
        assert publication.retain and publication.qos == 1
        words.append((publication.topic, state.get("status"), state.get("reason")))
    return words


OFFLINE = ("hive/meta/beta/state", "offline", "stopped")


def test_a_node_says_goodbye(rig: Rig) -> None:
    rig.node.stop()
    rig.until("it has stopped", lambda: rig.wire.closed)
    assert last_words(rig) == [OFFLINE]


def test_a_node_says_goodbye_for_its_agents_too(
    rig_of: Callable[..., Rig], main_agent: hive.InstanceConfig
) -> None:
    rig = rig_of([main_agent])
    rig.node.stop()
    rig.until("it has stopped", lambda: rig.wire.closed)
    assert sorted(last_words(rig, 2)) == [OFFLINE, ("hive/meta/main/state", "offline", "stopped")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_node(rig: Rig, number: int) -> None:
    os.kill(os.getpid(), number)
    rig.until("it has stopped", lambda: rig.wire.closed)
    assert last_words(rig) == [OFFLINE]


def test_a_running_handler_may_end_before_the_node_does(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(hang=HANGS)
    asked = rig.say("command", "hang")
    rig.until("it runs", rig.started)
    rig.node.stop()
    rig.advance(1)
    assert not rig.wire.closed
    (rig.handler_dir.parent / "gate").touch()
    assert rig.answer_to(asked).text == "through"
    rig.until("it has stopped", lambda: rig.wire.closed)
    assert last_words(rig) == [OFFLINE]


def test_nothing_is_sent_for_a_command_while_a_node_stops(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(hang=HANGS)
    rig.say("command", "hang")
    rig.until("it runs", rig.started)
    rig.node.stop()
    client = hive.ControlClient(rig.state_dir / "door", "beta")
    late = hive.Envelope.new("beta", "alpha", "command", "too late", id="late").document()
    assert rig.ask(client, do="send", envelope=late) == {"error": "the daemon is stopping"}
    client.close()
    rig.advance(1)
    assert rig.sent("command") == [] and rig.journal.message("late") is None


def test_what_waits_when_a_node_stops_is_done_at_its_next_start(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(hang=HANGS)
    running, queued = rig.say("command", "hang"), rig.say("command", "hang")
    rig.until("it runs", rig.started)
    rig.node.stop()
    rig.until("it has stopped", lambda: rig.wire.closed, tick=0.5)
    answer = rig.answer_to(running)
    assert answer.ch == "alert" and "interrupted: the node was stopped" in answer.text
    assert rig.kept("beta", "hang")[-1]["status"] == "interrupted"
    assert rig.started() == ["hang"] and rig.answers_to(queued) == []
    assert last_words(rig) == [OFFLINE]
    (task,) = rig.journal.tasks()
    assert (task.envelope.id, task.began) == (queued.id, False)


def test_without_a_disk_whoever_waits_when_a_node_stops_is_told(
    rig_of: Callable[..., Rig], tmp_path: Path
) -> None:
    (tmp_path / "state").write_text("no directory")
    rig = rig_of(hang=HANGS)
    running, queued = rig.say("command", "hang"), rig.say("command", "hang")
    rig.until("it runs", rig.started)
    rig.node.stop()
    assert "the node is stopping" in rig.answer_to(queued).text
    rig.until("it has stopped", lambda: rig.wire.closed, tick=0.5)
    assert rig.answer_to(running).ch == "alert"


def test_what_a_crash_left_is_taken_up(rig_of: Callable[..., Rig]) -> None:
    settings = {"again": hive.HandlerConfig(retry=True)}
    rig = rig_of(settings=settings, count="echo done", lost="echo done", again="echo done")
    asked = {}
    for action in ("count", "lost", "again"):
        asked[action] = hive.Envelope.new("alpha", "beta", "command", "x", action=action)
        row = rig.journal.record(hive.Event.RECEIVED, asked[action], 1.0)
        task = rig.journal.add_task(row or 0)
        if action != "count":
            rig.journal.start_tasks([task])
    rig.node.work.take_up()
    assert rig.answer_to(asked["count"]).text == "done"
    assert rig.answer_to(asked["again"]).text == "done"
    alert = rig.answer_to(asked["lost"])
    assert (alert.ch, "lost failed: interrupted: the daemon ended" in alert.text) == ("alert", True)
    assert sorted(rig.started()) == ["again", "count"]
    assert rig.journal.tasks() == []


def test_a_message_that_comes_too_late_is_left_for_the_next_run(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(hang=HANGS)
    rig.say("command", "hang")
    rig.turn()
    rig.node.stop()
    rig.say("command", "ping")
    rig.advance(1)
    assert rig.acked == 1
    assert rig.started() == ["hang"]


def test_a_handler_that_could_not_be_started_is_told_before_the_goodbye(rig: Rig) -> None:
    (rig.handler_dir / "ping").unlink()
    asked = rig.say("command", "ping")
    rig.node.stop()
    rig.until("it has stopped", lambda: rig.wire.closed)
    rig.turn()
    assert ["could not be started" in e.text for e in rig.answers_to(asked)] == [True]
    assert last_words(rig) == [OFFLINE]


@pytest.mark.parametrize("how", ["waits", "fails meanwhile", "hangs"])
def test_a_message_that_the_agent_never_heard_waits_for_the_next_start(
    rig_of: Callable[..., Rig], tmp_path: Path, how: str
) -> None:
    script = tmp_path / "openclaw"
    gate = tmp_path / "gate"
    lines = f"while [ ! -e '{gate}' ]; do sleep 0.02; done; exit 1"
    script.write_text(f"#!/bin/sh\n{lines}\n")
    script.chmod(0o755)
    rig = rig_of([hive.InstanceConfig("main", openclaw_cmd=(str(script),))])
    asked = rig.say("command")
    if how == "waits":
        asked = rig.say("command")
    rig.until("the agent is called", rig.started)
    rig.node.stop()
    if how == "fails meanwhile":
        gate.touch()
    tick = 0.01 if how == "fails meanwhile" else 0.5
    rig.until("it has stopped", lambda: rig.wire.closed, tick)
    assert rig.answers_to(asked) == []
    assert rig.journal.tasks()[-1].envelope.id == asked.id
