"""Daemon, at its edges: what it says to systemd, in which order it ends, what it leaves."""

from __future__ import annotations

import configparser
import errno
import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import ROOT
from rig import HANGS, Rig
from test_node_bounds import note_calls, timers

import hive

Make = Callable[..., Rig]


@pytest.fixture
def said(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What the service manager is told from now on."""
    monkeypatch.setattr(time, "monotonic_ns", lambda: 1_234_567_890)
    return note_calls(monkeypatch, rig.node._service, "notify")


def test_stopping_takes_less_time_than_systemd_gives_it() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.read(ROOT / "units/systemd/hive-daemon.service")
    grace = unit.getint("Service", "TimeoutStopSec")
    assert hive.STOP_GRACE == 3, "as the documentation says"
    assert hive.DISCONNECT_TIMEOUT == 2 and grace > hive.STOP_GRACE + 2 * 2


@pytest.mark.parametrize(
    ("code", "opened", "why"),
    [
        (0, ["here"], ""),
        (errno.EROFS, ["here", "there"], ""),
        (errno.EISDIR, ["here"], "Is a directory"),
    ],
)
def test_a_door_is_opened_elsewhere_only_where_nothing_can_be_made(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, code: int, opened: list[str], why: str
) -> None:
    tried = list[str]()

    def open_door(loop: hive.Loop, file: str, answer: object) -> str:
        tried.append(file)
        if code and file == "here":
            raise OSError(code, os.strerror(code))
        return f"the door {file}"

    before = rig.node._control
    monkeypatch.setattr(hive, "ControlServer", open_door)
    monkeypatch.setattr(hive, "control_socket_paths", lambda config: iter(("here", "there")))
    rig.node._open_control_socket()
    assert tried == opened
    assert why or str(rig.node._control) == f"the door {opened[-1]}"
    lines = rig.events("no door for the command line")
    assert [(row["level"], row["file"], row["why"]) for row in lines] == (
        [("error", "here", why)] if why else []
    )
    rig.node._control = before


# What systemd hears


def test_a_node_that_looks_again_at_its_handlers_says_so(
    rig: Rig, said: list[tuple[str, ...]]
) -> None:
    before = len(rig.kept("beta", "roster"))
    rig.handler("more", "true")
    rig.node._reread()
    assert said == [("RELOADING=1", "MONOTONIC_USEC=1234567"), ("READY=1",)]
    assert len(rig.kept("beta", "roster")) == before + 1
    assert rig.kept("beta", "roster")[-1]["handlers"] == ["more", "ping"]


def test_systemd_hears_of_the_broker(rig: Rig, said: list[tuple[str, ...]]) -> None:
    rig.disconnect()
    rig.connect()
    assert said == [
        ("STATUS=no broker at localhost:1883, trying again",),
        ("STATUS=beta is connected to localhost:1883",),
    ]


@pytest.mark.parametrize("again", [False, True])
def test_a_node_that_stops_says_whether_it_comes_again(
    rig: Rig, said: list[tuple[str, ...]], again: bool
) -> None:
    rig.node.stop(again=again)
    reloading = ("RELOADING=1", "MONOTONIC_USEC=1234567")
    assert said == [reloading if again else ("STOPPING=1", "STATUS=stopping")]
    assert rig.node.again is again
    rig.node.stop(again=True)
    assert rig.node.again is False, "whoever has said stop means it"
    assert len(said) == 1


def test_a_signal_makes_it_begin_again_in_the_same_process(rig: Rig) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    rig.until("it has stopped", lambda: rig.wire.closed)
    assert rig.node.again


# The end


def test_a_node_ends_in_order(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    node, order = rig.node, list[Any]()
    for of, name in (
        *((node.node.members, "stop"), (node.node.sessions, "end"), (node.node, "commit")),
        *((node._presence, "end"), (rig.wire, "close")),
    ):
        monkeypatch.setattr(
            of, name, lambda *_, name=name, **how: order.append((name, *how.values()))
        )
    node.stop()
    assert order == [("stop",), ("end",), ("commit",), ("end",), ("close", 2.0)]
    assert 3.0 in timers(rig), "then no handler has any more time"
    (line,) = rig.events("stopping")
    assert (line["level"], line["handlers"]) == ("info", 0)
    rig.wire.closed = True


def test_handlers_have_three_seconds_or_until_it_is_said_again(rig_of: Make) -> None:
    rig = rig_of(hang=HANGS)
    rig.say("command", "hang")
    rig.node.stop()
    assert rig.events("stopping")[0]["handlers"] == 1
    ends: list[float] = []
    children = rig.node.work._children
    stop = children.stop
    began = rig.clock.now
    children.stop = lambda: (ends.append(rig.clock.now - began), stop())[1]  # type: ignore
    rig.advance(2.5)
    assert ends == [] and not rig.wire.closed
    assert 0.05 in timers(rig), "it looks twenty times a second whether they have ended"
    rig.advance(0.5)
    assert ends == [3.0]
    rig.node.stop()
    assert len(ends) == 2


def test_a_node_that_stops_shows_nothing_any_more(rig_of: Make) -> None:
    rig = rig_of(hang=HANGS)
    rig.say("command", "hang")
    rig.turn()
    rig.node.stop()
    before = len(rig.heartbeats())
    rig.handler("more", "true")
    rig.advance(2)
    rig.node._heartbeat()
    assert len(rig.heartbeats()) == before
    assert "more" not in rig.kept("beta", "roster")[-1]["handlers"]


def test_what_is_abandoned_leaves_no_door_and_no_child(
    rig_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of(hang=HANGS)
    rig.say("command", "hang")
    door = rig.state_dir / "door"
    killed = note_calls(monkeypatch, rig.node.work._children, "kill")
    closed = note_calls(monkeypatch, rig.node._broker_host, "close")
    assert door.exists()
    rig.node.abandon()
    assert not door.exists() and len(killed) == len(closed) == 1
    monkeypatch.undo()
    rig.node.abandon()
    rig.until("nothing runs", lambda: not rig.node.work.busy)


# The broker


def test_at_each_interval_it_looks_at_its_handlers_and_beats_where_there_is_a_broker(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = rig.node
    looks = note_calls(monkeypatch, node.work, "look_for_handlers", False)
    beats = note_calls(monkeypatch, node._presence, "beat_when_due")
    checks = note_calls(monkeypatch, node.node.members, "check")
    rosters = note_calls(monkeypatch, node._presence, "publish_roster")
    for connected, seen in ((True, 1), (False, 1)):
        node.node.connected = connected
        before = timers(rig).count(5.0)
        node._heartbeat()
        assert timers(rig).count(5.0) == before + 1
        assert (len(beats), len(checks)) == (seen, seen)
    assert len(looks) == 2 and checks == [(rig.clock.now,)] and rosters == []


def test_a_session_of_before_is_emptied_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    node, journal = rig.node, rig.journal
    ours = hive.session_id(rig.config)
    assert not hasattr(rig.wire, "taken_over"), "it has always been this one"
    journal.put("session", {"id": "another"})
    given: list[Any] = []
    monkeypatch.setattr(rig.wire, "take_over", lambda *args: given.append(args))
    node.on_connected()
    ((client_id, marker, commit, done),) = given
    assert client_id == "another" and "/~" in marker
    then: list[str] = []
    node.node.stopping = True
    commit(lambda: then.append("late"))
    rig.loop.step() if node.node._committing else None
    assert then == []
    node.node.stopping = False
    commit(lambda: then.append("told"))
    rig.turn()
    assert then == ["told"]
    done()
    assert journal.get("session") == {"id": ours} and node.node._committing
    node.on_connected()
    assert len(given) == 1


@pytest.mark.parametrize("cluster", [(), ("b.lan",)])
def test_the_log_says_which_host_of_a_cluster_it_is(rig: Rig, cluster: tuple[str, ...]) -> None:
    rig.node._mqtt = hive.MqttConfig(host="a.lan", cluster=cluster)
    rig.node.on_connected()
    line = rig.events("connected")[-1]
    assert (line["broker"], line["node"]) == ("a.lan:1883", "beta")
    assert line.get("host") == ("broker.lan" if cluster else None)


def test_an_outage_says_where_and_why_and_what_to_try(rig: Rig) -> None:
    rig.disconnect()
    (line,) = rig.events("no broker, trying again")
    assert (line["level"], line["broker"]) == ("error", "localhost:1883")
    assert line["why"] == "connection refused" and line["hint"]
    rig.disconnect()
    assert [row["level"] for row in rig.events("no broker, trying again")] == ["error", "debug"]


def test_a_node_that_has_its_broker_looks_for_it_before_each_connection(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = hive.MqttConfig(host="other.lan")
    monkeypatch.setattr(rig.node._broker_host, "find", lambda then: then(found))
    wire = note_calls(monkeypatch, rig.wire, "set_broker")
    client: Any = type("Client", (), {"set_broker": lambda self, mqtt: order.append(mqtt)})()
    order: list[Any] = []
    rig.node._set_broker(client, lambda: order.append("go on"))
    assert order == [found, "go on"] and wire == [(found,)]
    assert rig.node._mqtt is found
    assert json.dumps(rig.node.node._connection()["broker"]) == '"localhost:1883"', "not yet"
    rig.node.on_connected()
    assert rig.node.node._connection()["broker"] == "other.lan:1883"


def test_a_node_makes_sure_of_its_name_before_it_connects(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = note_calls(monkeypatch, hive, "NameConflictCheck")
    node = rig.node
    node.before_connecting(node.loop.stop)
    ((loop, config, instances, heartbeat, go_on, failed, set_broker),) = checks
    assert (loop, config, instances) == (rig.loop, rig.config, ("this-run", ""))
    said = hive.Envelope.parse(heartbeat)
    assert (said.sender, said.to, said.ch) == ("beta", "beta", "heartbeat")
    assert (go_on, failed) == (node.loop.stop, node.on_disconnected)
    assert set_broker == node._set_broker
