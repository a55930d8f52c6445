"""Node: what a daemon does, seen from the broker's side of a link in memory."""

from __future__ import annotations

import io
import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pytest
from conftest import calls_of, eventually

import hive

T = TypeVar("T")
EVERY_FIVE_SECONDS = hive.HeartbeatConfig()
NOBODY = "no handler for action other, and no agent to ask about it"


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Wire:
    """A link in memory: keeps what a node publishes, and gives back what is for everyone."""

    def __init__(self, will: hive.OutgoingMessage) -> None:
        self.will = will
        self.published: list[hive.OutgoingMessage] = []
        self.echoes: list[hive.OutgoingMessage] = []
        self.unacknowledged: list[hive.OutgoingMessage] = []
        self.probes: list[Callable[[bool], None]] = []
        self.takes_connections: bool | None = True  # None: it does not answer
        self.up = self.closed = self.silent = False

    def set_broker(self, settings: hive.MqttConfig) -> None:
        pass

    def use_outbox(
        self, outbox: hive.Journal, published: Callable[[hive.OutgoingMessage, int, str], None]
    ) -> None:
        self.outbox, self.told, self.last = outbox, published, 0

    def open(self, listener: hive.ClientListener) -> None:
        pass

    def publish(self, message: hive.OutgoingMessage) -> None:
        if self.up:
            self.send(message)

    def send_queued(self) -> None:
        for message in (
            self.outbox.next_outgoing(self.last, 1000) if self.outbox and self.up else ()
        ):
            self.last = message.n
            self.send(message)

    def send(self, message: hive.OutgoingMessage) -> None:
        self.published.append(message)
        self.unacknowledged.append(message)
        if "/all/" in message.topic:
            self.echoes.append(message)

    def acknowledge(self, message: hive.OutgoingMessage, code: int, words: str) -> None:
        """The broker has it, or refuses it."""
        self.unacknowledged.remove(message)
        if self.outbox and message.n:
            self.outbox.dequeue(message, acknowledged=code == 0)
        self.told(message, code, words)

    def close(self, done: Callable[[], None], within: float) -> None:
        self.closed = True
        done()

    def probe(self, done: Callable[[bool], None]) -> None:
        self.probes.append(done)
        if self.takes_connections is not None:
            done(self.takes_connections)


class Rig:
    """The node beta on such a link, in the middle of its life."""

    def __init__(
        self,
        home: Path,
        handlers: Mapping[str, str],
        agents: Sequence[hive.InstanceConfig],
        settings: Mapping[str, hive.HandlerConfig],
        level: str,
        heartbeat: hive.HeartbeatConfig | None = None,
        schedule: Sequence[hive.ScheduleConfig] = (),
        **node: Any,
    ) -> None:
        self.handler_dir, self.state_dir = home / "hive-daemon.d", home / "state"
        self.handler_dir.mkdir(exist_ok=True)
        self.handler_dir.chmod(0o755)
        for action, lines in handlers.items():
            self.handler(action, lines)
        self.config = hive.Config(
            hive.NodeConfig("beta", handler_dir=self.handler_dir, state_dir=self.state_dir, **node),
            oc_instances=tuple(agents),
            handlers=settings,
            heartbeat=heartbeat or hive.HeartbeatConfig(),
            schedule=tuple(schedule),
        )
        self.clock, self.log, self.acked = Clock(), io.StringIO(), 0
        log = hive.Log(level, "json", self.log)
        self.loop = hive.Loop(log, self.clock)
        self.journal = hive.Journal(self.state_dir, log, 7 * 86400, 64_000_000)
        self.node = hive.Daemon(
            self.config, self.loop, log, self.journal, "this-run", "", self._make_wire
        )
        self.node.start()
        self.connect()

    def _make_wire(self, config: hive.Config, will: hive.OutgoingMessage) -> hive.Transport:
        self.wire = Wire(will)
        return self.wire

    def connect(self) -> None:
        self.wire.up = True
        self.node.link_up()
        self.turn()

    def disconnect(self) -> None:
        self.wire.up = False
        self.node.link_down("connection refused")
        self.turn()

    def end(self) -> None:
        """Stop the node; whatever runs has its moment and is ended."""
        if not self.wire.closed:
            self.node.stop()
            self.until("it has stopped", lambda: self.wire.closed, tick=0.5)
        self.journal.close()
        self.loop.close()
        assert self.events("bug") == []

    def turn(self) -> None:
        """Do whatever is due by now."""
        for _ in range(3):
            while self.wire.up and self.wire.unacknowledged and not self.wire.silent:
                self.wire.acknowledge(self.wire.unacknowledged[0], 0, "Success")
            for echo in self.wire.echoes[:]:
                self.wire.echoes.remove(echo)
                self.node.deliver(
                    hive.IncomingMessage(echo.topic, echo.payload, False, None, lambda: None)
                )
            self.loop.post(lambda: None)
            self.loop.step()

    def advance(self, seconds: float) -> None:
        """Let time pass, as fast as it goes."""
        until = self.clock.now + seconds
        while self.clock.now < until:
            self.clock.now = min(until, self.clock.now + 0.5)
            self.turn()

    def live(self, seconds: int, *alive: str) -> None:
        """Let time pass, while these peers show that they are alive."""
        for second in range(seconds):
            if second % 5 == 0:
                for name in alive:
                    self.beat(name)
            self.advance(1)

    def until(self, what: str, check: Callable[[], T], tick: float = 0.01) -> T:
        """Wait for real processes; the clock goes on about as fast as everyone's."""

        def tried() -> T:
            self.turn()
            self.clock.now += tick
            return check()

        return eventually(what, tried)

    # What comes in

    def ask(self, client: hive.ControlClient, **request: object) -> dict[str, Any]:
        """What a command on this machine is told at the door."""
        answers: list[dict[str, Any]] = []
        asking = threading.Thread(target=lambda: answers.append(client.ask(request)))
        asking.start()
        self.until("an answer at the door", lambda: not asking.is_alive())
        return answers[0]

    def handler(self, action: str, lines: str) -> None:
        made = self.handler_dir.parent / f"{action}.new"
        made.write_text(f"#!/bin/sh\n{lines}\n")
        made.chmod(0o755)
        made.rename(self.handler_dir / action)

    def hand_in(
        self,
        topic: str,
        payload: bytes,
        retained: bool = False,
        expires_in: int | None = None,
        ack: Callable[[], None] = lambda: None,
    ) -> None:
        def acked() -> None:
            self.acked += 1
            ack()

        self.node.deliver(hive.IncomingMessage(topic, payload, retained, expires_in, acked))

    def tell(self, envelope: hive.Envelope, **how: Any) -> hive.Envelope:
        self.hand_in(f"hive/{envelope.to}/{envelope.ch}", envelope.encode(), **how)
        return envelope

    def say(self, ch: str, action: str | None = None, **fields: Any) -> hive.Envelope:
        """Alpha says something to beta, or as `fields` have it."""
        given = {"sender": "alpha", "to": "beta", "text": "hello", **fields}
        return self.tell(hive.Envelope.new(ch=ch, action=action, **given))

    def beat(self, name: str, boot: str = "first", **inner: Any) -> None:
        text = json.dumps({"node_id": name, "interval": 5.0, "boot": boot, **inner})
        self.say("heartbeat", sender=name, to="all", text=text)

    def hear_state(self, name: str, retained: bool = False, **state: Any) -> None:
        document = {"node_id": name, "daemon_node": name, **state}
        self.hand_in(f"hive/meta/{name}/state", json.dumps(document).encode(), retained)

    # What goes out

    def sent(self, ch: str = "") -> list[hive.Envelope]:
        """The envelopes published so far, without heartbeats."""
        payloads = [
            p.payload
            for p in self.wire.published
            if "/meta/" not in p.topic and not p.topic.endswith("/heartbeat")
        ]
        return [e for e in map(hive.Envelope.parse, payloads) if ch in ("", e.ch)]

    def answer_to(self, envelope: hive.Envelope) -> hive.Envelope:
        """Wait for it; it is the only one."""
        self.until(f"an answer to {envelope}", lambda: self.answers_to(envelope))
        (answer,) = self.answers_to(envelope)
        return answer

    def answers_to(self, envelope: hive.Envelope) -> list[hive.Envelope]:
        return [e for e in self.sent() if e.reply_to == envelope.id]

    def heartbeats(self) -> list[hive.OutgoingMessage]:
        return [p for p in self.wire.published if p.topic == "hive/all/heartbeat"]

    def kept(self, name: str, document: str) -> list[dict[str, Any]]:
        """The documents published on a meta topic."""
        topic = f"hive/meta/{name}/{document}"
        return [json.loads(p.payload) for p in self.wire.published if p.topic == topic]

    def events(self, event: str = "", **facts: object) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.log.getvalue().splitlines()]
        return [row for row in rows if event in ("", row["event"]) and facts.items() <= row.items()]

    def started(self) -> list[str]:
        """What was started: handlers and calls of agents."""
        return [
            row.get("action") or row["agent"]
            for row in self.events()
            if row["event"] in ("handler started", "waking agent")
        ]

    def works(self) -> bool:
        """Does it still answer?"""
        return self.answer_to(self.say("command", "ping")).text == "pong"


@pytest.fixture
def rig_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rig]]:
    """Make a node with these handlers (name: lines of sh); it is ended with the test."""
    monkeypatch.setenv("HOME", str(tmp_path))  # no OpenClaw of this user is looked for
    made: list[Rig] = []

    def make(
        agents: Sequence[hive.InstanceConfig] = (),
        settings: Mapping[str, hive.HandlerConfig] | None = None,
        level: str = "debug",
        node: Mapping[str, Any] | None = None,
        heartbeat: hive.HeartbeatConfig = EVERY_FIVE_SECONDS,
        **handlers: str,
    ) -> Rig:
        handlers = {"ping": "echo pong", **handlers}
        rig = Rig(tmp_path, handlers, agents, settings or {}, level, heartbeat, **(node or {}))
        made.append(rig)
        return made[-1]

    yield make
    for rig in made[-1:]:
        rig.end()


@pytest.fixture
def rig(rig_of: Callable[..., Rig]) -> Rig:
    """A node with a handler `ping` and no agent."""
    return rig_of()


@pytest.fixture
def main(fast_agent: Path) -> hive.InstanceConfig:
    """An agent that is really called."""
    return hive.InstanceConfig("main", openclaw_cmd=(str(fast_agent),))


HANGS = "while [ ! -e ../gate ]; do sleep 0.02; done; echo through"


# The table of the protocol, "What a node does with an envelope"


@pytest.mark.parametrize(
    ("ch", "action", "urgency", "expected"),
    [
        ("command", "ping", "now", "run"),
        ("command", "ping", "later", "run"),
        ("command", "other", "now", "now"),
        ("command", "other", "later", "next-heartbeat"),
        ("command", None, "now", "now"),
        ("command", None, "later", "next-heartbeat"),
        ("sync", "ping", "now", "run"),
        ("sync", "ping", "later", "run"),
        ("sync", "other", "now", "now"),
        ("sync", "other", "later", "next-heartbeat"),
        ("sync", None, "now", "now"),
        ("sync", None, "later", None),
        ("alert", None, "now", "now"),
        ("alert", None, "later", "now"),
        ("alert", "ping", "later", "now"),
        ("response", None, "now", "now"),
        ("response", None, "later", "next-heartbeat"),
        ("response", "ping", "now", "now"),
        ("status", None, "now", "now"),
        ("status", None, "later", None),
        ("status", "ping", "now", "now"),
        ("status", "ping", "later", None),
        ("heartbeat", None, "now", None),
        ("heartbeat", "ping", "now", None),
    ],
)
@pytest.mark.parametrize("to", ["beta", "all", "main"])
def test_a_node_with_an_agent_and_each_kind_of_message(
    rig_of: Callable[..., Rig],
    main: hive.InstanceConfig,
    fast_agent: Path,
    to: str,
    ch: str,
    action: str | None,
    urgency: str,
    expected: str | None,
) -> None:
    rig = rig_of([main])
    asked = rig.say(ch, action, urgency=urgency, to=to)
    if expected == "run":
        assert rig.answer_to(asked).ch == "response"
        assert rig.started() == ["ping"]
        return
    if expected:
        (call,) = rig.until("the agent is called", lambda: calls_of(fast_agent))
        *_, text, _, mode = call["argv"]
        assert mode == expected
        assert text.startswith(f"[hive] {ch} from alpha to {to} id={asked.id} ")
        assert '\n"hello"' in text
    rig.turn()
    assert rig.started() == (["main"] if expected else [])
    assert rig.sent() == []
    assert rig.acked >= 1


@pytest.mark.parametrize(
    ("ch", "action", "urgency", "alert"),
    [
        ("command", "other", "now", f"beta: other refused: {NOBODY}"),
        ("sync", "other", "later", f"beta: other refused: {NOBODY}"),
        ("command", None, "now", None),
        ("sync", None, "now", None),
        ("sync", None, "later", None),
        ("alert", "other", "now", None),
        ("response", "other", "now", None),
        ("status", "other", "now", None),
        ("heartbeat", "other", "now", None),
    ],
)
@pytest.mark.parametrize("to", ["beta", "all"])
def test_a_node_without_agent_and_each_kind_of_message(
    rig: Rig, to: str, ch: str, action: str | None, urgency: str, alert: str | None
) -> None:
    asked = rig.say(ch, action, urgency=urgency, to=to)
    rig.turn()
    assert [e.text for e in rig.sent()] == ([alert] if alert else [])
    if alert:
        (answer,) = rig.sent("alert")
        assert (answer.sender, answer.to, answer.reply_to) == ("beta", "alpha", asked.id)
        assert rig.wire.published[-1].topic == "hive/alpha/alert"
    elif ch != "heartbeat":
        assert rig.events("text", id=asked.id, text="hello"), "what it would have said to one"
    assert rig.started() == []


def test_an_answer_goes_to_the_sender_and_stays_nowhere(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(greet='cat >&2; echo "hello $HIVE_FROM"')
    asked = rig.say("command", "greet", corr="the-first")
    answer = rig.answer_to(asked)
    assert (answer.ch, answer.sender, answer.to) == ("response", "beta", "alpha")
    assert (answer.text, answer.corr, answer.reply_to) == ("hello alpha", "the-first", asked.id)
    (published,) = [p for p in rig.wire.published if p.payload == answer.encode()]
    assert (published.topic, published.qos, published.retain) == ("hive/alpha/response", 1, False)
    assert published.n  # it waits in the outbox until the broker has it


def test_a_result_is_kept_for_whoever_comes_later(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(count="""echo '{"n": 3}'""")
    asked = rig.say("sync", "count")
    rig.answer_to(asked)
    (published,) = [p for p in rig.wire.published if p.topic == "hive/meta/beta/count"]
    assert (published.qos, published.retain, published.n > 0) == (1, True, True)
    result = json.loads(published.payload)
    assert abs(result.pop("ts") - time.time()) < 60 and result.pop("duration_ms") >= 0
    assert result == {
        "node": "beta",
        "action": "count",
        "id": asked.id,
        "corr": asked.id,
        "from": "alpha",
        "status": "ok",
        "exit": 0,
        "result": {"n": 3},
        "error": "",
        "truncated": False,
    }


def test_a_handler_reads_the_envelope_as_one_line(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(echo="cat")
    asked = hive.Envelope.check(
        hive.Envelope.new("alpha", "beta", "command", "a\nb\u2028ä", action="echo").document()
        | {"future": {"field": [1, 2]}}
    )
    rig.tell(asked)
    answer = rig.answer_to(asked)
    assert answer.text.count("\n") == 0
    assert hive.Envelope.parse(answer.text.encode()) == asked


def test_a_handler_finds_its_agent_in_the_environment_and_no_secret(
    rig_of: Callable[..., Rig], main: hive.InstanceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in hive.NOT_INHERITED:
        monkeypatch.setenv(key, "of the daemon")
    monkeypatch.setenv("EDITOR", "ed")
    other = hive.InstanceConfig("other", profile="work", token="x-y-z", hook_token="x-y-z")
    rig = rig_of([main, other], show="env")
    lines = rig.answer_to(rig.say("command", "show", to="other")).text.splitlines()
    assert {"HIVE_AGENT=other", "HIVE_PROFILE=work", "HIVE_TO=other", "EDITOR=ed"} <= set(lines)
    assert not [line for line in lines if "x-y-z" in line or "of the daemon" in line]
    assert "HIVE_AGENT=main" in rig.answer_to(rig.say("command", "show")).text


@pytest.mark.parametrize(
    ("to", "hear"), [("beta", ["one"]), ("one", ["one"]), ("two", ["two"]), ("all", ["one", "two"])]
)
def test_each_agent_hears_what_is_for_it(
    rig_of: Callable[..., Rig], fast_agent: Path, to: str, hear: list[str]
) -> None:
    rig = rig_of(
        [hive.InstanceConfig(n, n, openclaw_cmd=(str(fast_agent),)) for n in ("one", "two")]
    )
    rig.say("command", to=to)
    rig.until("they are called", lambda: len(calls_of(fast_agent)) >= len(hear))
    rig.advance(1)
    assert sorted(call["argv"][1] for call in calls_of(fast_agent)) == hear
    assert sorted(rig.started()) == hear


@pytest.mark.parametrize(
    ("lines", "exit", "why"),
    [
        ("echo half; echo no remote >&2; exit 3", 3, "exit 3: no remote"),
        ("kill -KILL $$", -9, "was ended by signal 9"),
        ("head -c 100000 /dev/zero | tr '\\0' x >&2; echo the end >&2; exit 1", 1, "the end"),
    ],
)
def test_a_failure_is_an_alert_with_its_reason(
    rig_of: Callable[..., Rig], lines: str, exit: int, why: str
) -> None:
    rig = rig_of(deploy=lines)
    asked = rig.say("command", "deploy", corr="c-1")
    answer = rig.answer_to(asked)
    assert (answer.ch, answer.to, answer.corr) == ("alert", "alpha", "c-1")
    assert answer.text.startswith("beta: deploy failed: ")
    assert answer.text.endswith(why)
    (result,) = rig.kept("beta", "deploy")
    assert (result["status"], result["exit"]) == ("error", exit)
    assert result["error"].endswith(why)
    assert rig.works()


@pytest.mark.parametrize("how", ["vanished", "open to all", "a folder", "no program"])
def test_a_handler_that_changed_since_it_was_found_is_told(rig: Rig, how: str) -> None:
    rig.handler("deploy", "echo deployed")
    rig.advance(5)
    file = rig.handler_dir / "deploy"
    match how:
        case "vanished":
            file.unlink()
        case "open to all":
            file.chmod(0o777)
        case "a folder":
            file.unlink()
            file.mkdir()
        case _:
            file.write_bytes(b"\x7fnonsense\xff")
    answer = rig.answer_to(rig.say("command", "deploy"))
    assert answer.ch == "alert"
    assert answer.text.startswith("beta: deploy failed: could not be started: ")
    assert rig.works()


def test_a_handler_that_takes_too_long_is_ended_and_the_next_one_runs(
    rig_of: Callable[..., Rig],
) -> None:
    rig = rig_of(hang=HANGS)
    first, second = rig.say("command", "hang"), rig.say("command", "hang")
    rig.until("it runs", lambda: rig.started() == ["hang"])
    rig.advance(31)
    answer = rig.answer_to(first)
    assert answer.ch == "alert"
    assert "took longer than 30 s" in answer.text
    assert rig.kept("beta", "hang")[0]["status"] == "timeout"
    (rig.handler_dir.parent / "gate").touch()
    assert rig.answer_to(second).text == "through"


def test_a_handler_may_have_a_deadline_and_workers_of_its_own(rig_of: Callable[..., Rig]) -> None:
    settings = {"hang": hive.HandlerConfig(timeout=100.0, workers=2)}
    rig = rig_of(settings=settings, hang=HANGS)
    asked = [rig.say("command", "hang") for _ in range(3)]
    rig.turn()
    assert rig.started() == ["hang", "hang"]
    rig.advance(90)
    assert rig.sent() == []
    rig.advance(11)
    assert "took longer than 100 s" in rig.answer_to(asked[0]).text


def test_a_handler_that_sleeps_delays_nobody(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(hang=HANGS)
    waiting = [rig.say("command", "hang"), rig.say("command", "hang")]
    assert rig.works()
    before = len(rig.heartbeats())
    rig.advance(10)
    assert len(rig.heartbeats()) == before + 2
    assert rig.started() == ["hang", "ping"]
    (rig.handler_dir.parent / "gate").touch()
    assert [rig.answer_to(one).text for one in waiting] == ["through"] * 2


def test_no_more_handlers_run_than_there_are_workers(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(node={"handler_workers": 2}, a=HANGS, b=HANGS, c=HANGS)
    asked = [rig.say("command", action) for action in "abc"]
    rig.turn()
    assert rig.started() == ["a", "b"]
    (rig.handler_dir.parent / "gate").touch()
    assert {rig.answer_to(one).text for one in asked} == {"through"}


def test_the_message_after_a_thousand_that_wait_is_refused_as_busy(
    rig_of: Callable[..., Rig],
) -> None:
    rig = rig_of(level="warning", hang=HANGS)
    for _ in range(1001):
        rig.say("command", "hang")
    rig.turn()
    assert rig.sent() == []
    asked = rig.say("command", "hang")
    answer = rig.answer_to(asked)
    assert answer.ch == "alert" and "busy" in answer.text
    assert rig.sent() == [answer]


def test_the_answer_that_somebody_waits_for_does_not_wake_the_agent(
    rig_of: Callable[..., Rig], main: hive.InstanceConfig
) -> None:
    rig = rig_of([main])
    client = hive.ControlClient(rig.state_dir / "door", "beta")
    asked = hive.Envelope.new("beta", "alpha", "command", "well?", id="c-1").document()
    assert rig.ask(client, do="sent", envelope=asked, wait=True) == {"ok": True}
    rig.say("response", corr="c-1")
    rig.say("response", corr="c-1")  # of a question to everyone
    rig.advance(120)
    assert rig.started() == []
    rig.say("response", corr="c-2")
    rig.until("the agent hears of another", lambda: rig.started() == ["main"])
    client.close()
    rig.advance(5)
    rig.say("response", corr="c-1")
    rig.until("the agent hears it after all", lambda: rig.started() == ["main"] * 2)


def test_the_answer_that_somebody_has_just_read_does_not_wake_the_agent(
    rig_of: Callable[..., Rig], main: hive.InstanceConfig
) -> None:
    rig = rig_of([main])
    client = hive.ControlClient(rig.state_dir / "door", "beta")
    asked = hive.Envelope.new("beta", "alpha", "command", "well?", id="c-1").document()
    rig.ask(client, do="sent", envelope=asked, wait=True)
    answer = hive.Envelope.new("alpha", "beta", "response", "yes", id="a-1", corr="c-1")
    assert rig.ask(client, do="read", envelope=answer.document()) == {"ok": True}
    client.close()
    rig.turn()
    rig.say("response", id="a-1", corr="c-1", text="yes")
    rig.turn()
    assert rig.started() == []
    rig.say("response", id="a-2", corr="c-1")
    rig.until("the agent hears another one", lambda: rig.started() == ["main"])


def test_the_answer_to_a_question_that_nobody_waits_for_wakes_the_agent_with_the_question(
    rig_of: Callable[..., Rig], main: hive.InstanceConfig, fast_agent: Path
) -> None:
    rig = rig_of([main])
    client = hive.ControlClient(rig.state_dir / "door", "beta")
    text = "is the backup\ndone?" + " " * 1000
    asked = hive.Envelope.new("beta", "alpha", "command", text, id="c-1").document()
    assert rig.ask(client, do="send", envelope=asked)["queued"]
    client.close()
    rig.say("response", corr="c-1", text="yes")
    (call,) = rig.until("the agent is called", lambda: calls_of(fast_agent))
    header, said, _ = call["argv"][3].split("\n")
    assert header.partition(" re: ")[2].startswith(r'"is the backup\ndone?')
    assert said == '"yes"'


@pytest.mark.parametrize(
    ("ch", "text", "answers"),
    [
        ("command", "42", ["42"]),
        ("command", "half a pair: \ud83d", ["half a pair: \ufffd"]),
        ("alert", "42", []),
        ("response", "42", []),
    ],
)
def test_the_reply_of_an_agents_turn_is_the_answer(
    rig_of: Callable[..., Rig], tmp_path: Path, ch: str, text: str, answers: list[str]
) -> None:
    turn = {"status": "ok", "result": {"payloads": [{"text": text}]}}
    (tmp_path / "out").write_text(json.dumps(turn))
    command = ("sh", "-c", 'cat "$0"', str(tmp_path / "out"))
    rig = rig_of([hive.InstanceConfig("main", via="agent", openclaw_cmd=command)])
    asked = rig.say(ch, corr="c-1")
    rig.until("the turn has ended", lambda: rig.events("agent woken") and rig.works())
    heard = [(e.ch, e.text, e.corr, e.to) for e in rig.answers_to(asked)]
    assert [text.replace("?", "\ufffd") for _, text, *_ in heard] == answers
    assert {(ch, corr, to) for ch, _, corr, to in heard} <= {("response", "c-1", "alpha")}


@pytest.mark.parametrize("sender", ["alpha", "beta"])
def test_nothing_on_the_bus_can_silence_the_agent(
    rig_of: Callable[..., Rig], main: hive.InstanceConfig, sender: str
) -> None:
    rig = rig_of([main])
    rig.say("status", sender=sender, text="waiting", corr="c-1", ttl=60, urgency="later")
    rig.say("response", corr="c-1")
    rig.until("the agent hears it", lambda: rig.started() == ["main"])


@pytest.mark.parametrize(
    ("ch", "told"), [("command", True), ("sync", True), ("response", False), ("alert", False)]
)
def test_an_agent_that_is_never_reached_is_told_to_whoever_asked(
    rig_of: Callable[..., Rig], ch: str, told: bool
) -> None:
    rig = rig_of([hive.InstanceConfig("main", openclaw_cmd=("/no/such/openclaw",))])
    asked = rig.say(ch, ttl=20)
    rig.advance(19)
    assert rig.sent() == []
    rig.advance(30)
    assert [(e.ch, e.to, e.reply_to) for e in rig.sent()] == [("alert", "alpha", asked.id)] * told
    if told:
        assert "main" in rig.sent()[0].text and "No such file" in rig.sent()[0].text
    assert rig.events("agent not told", id=asked.id)
    assert rig.works()


# What must not be acted upon


def test_a_message_is_acted_upon_once(rig: Rig) -> None:
    asked = rig.say("command", "ping")
    rig.tell(asked)
    rig.answer_to(asked)
    rig.tell(asked)
    rig.turn()
    assert rig.started() == ["ping"]
    assert rig.acked == 3


def test_a_message_is_acted_upon_once_even_after_ten_thousand_others(
    rig_of: Callable[..., Rig],
) -> None:
    rig = rig_of(level="info")
    asked = rig.say("command", "ping")
    rig.answer_to(asked)
    for i in range(10_000):
        rig.say("status", urgency="later", id=f"other-{i}")
        if i % 100 == 0:
            rig.turn()
    rig.tell(asked)
    rig.turn()
    assert rig.started() == ["ping"]
    assert rig.acked == 10_002


def test_a_message_is_acted_upon_once_even_after_a_restart(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of()
    asked = rig.say("command", "ping")
    rig.answer_to(asked)
    rig.end()
    again = rig_of()
    again.tell(asked)
    again.turn()
    assert again.started() == []
    assert again.works()


HOUR = 3600


@pytest.mark.parametrize("ch", ["command", "sync", "alert", "response", "status"])
@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"retained": True}, "it was retained, and would be acted upon again at each start"),
        ({"topic": "hive/beta/heartbeat"}, "its topic disagrees with to and ch"),
        ({"topic": "hive/all/command"}, "its topic disagrees with to and ch"),
        ({"topic": "hive/beta/command/x"}, "its topic disagrees with to and ch"),
        ({"topic": "other/beta/command"}, "its topic disagrees with to and ch"),
        ({"to": "gamma", "topic": "hive/beta/command"}, "its topic disagrees with to and ch"),
        ({"to": "gamma"}, "it is for another node"),
        ({"to": "Beta"}, "it is for another node"),
        ({"ttl": 10, "now": time.time() - HOUR}, "its time to live is over"),
    ],
)
def test_a_message_in_the_wrong_place_or_time_is_dropped(
    rig_of: Callable[..., Rig],
    main: hive.InstanceConfig,
    ch: str,
    how: dict[str, Any],
    why: str,
) -> None:
    rig = rig_of([main])
    given = {"text": "hello", "action": "ping", **how}
    topic, retained = given.pop("topic", None), given.pop("retained", False)
    envelope = hive.Envelope.new("alpha", given.pop("to", "beta"), ch, **given)
    topic = topic or f"hive/{envelope.to}/{ch}"
    rig.hand_in(topic, envelope.encode(), retained)
    rig.turn()
    assert rig.started() == []
    assert rig.sent() == []
    assert rig.acked == 1
    (line,) = rig.events("dropped")
    assert (line["level"], line["id"], line["why"]) == ("warning", envelope.id, why)


def test_what_was_dropped_may_still_come_as_it_should(rig: Rig) -> None:
    asked = hive.Envelope.new("alpha", "beta", "command", "hello", action="ping")
    rig.tell(asked, retained=True)
    rig.hand_in("hive/beta/sync", asked.encode())
    rig.tell(asked)
    assert rig.answer_to(asked).text == "pong"


@pytest.mark.parametrize("wrong", [-HOUR, HOUR])
def test_a_clock_that_is_wrong_by_an_hour_loses_nothing_where_the_broker_counts(
    rig: Rig, wrong: int
) -> None:
    asked = hive.Envelope.new(
        "alpha", "beta", "command", "hello", action="ping", ttl=30, now=time.time() + wrong
    )
    rig.tell(asked, expires_in=25)
    assert rig.answer_to(asked).text == "pong"


@pytest.mark.parametrize("how", [{"ttl": 0}, {"ttl": None}, {"ttl": 2 * HOUR}])
def test_an_old_message_without_ttl_or_within_it_is_not_stale(
    rig: Rig, how: dict[str, Any]
) -> None:
    assert rig.answer_to(rig.say("command", "ping", now=time.time() - HOUR, **how))


# What an attacker or an accident sends


GOOD = hive.Envelope.new(
    "alpha",
    "beta",
    "command",
    "hello",
    id="good",
    corr="c",
    reply_to="r",
    ttl=60,
    action="ping",
    now=2_000_000_000,
).document()
RUBBISH = {
    "empty": b"",
    "NUL": b"\0" * 100,
    "no UTF-8": b"\xff\xfe",
    "UTF-16": json.dumps(GOOD).encode("utf-16"),
    "a mark of byte order": b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
    "null": b"null",
    "a number": b"17",
    "not a number": b"NaN",
    "a list": b"[1]",
    "a string": b'"hello"',
    "an empty object": b"{}",
    "half": json.dumps(GOOD).encode()[:-5],
    "two": json.dumps(GOOD).encode() * 2,
    "lists, 100,000 deep": b"[" * 100_000,
    "objects, 100,000 deep": b'{"a":' * 100_000,
    "deep in a field of ours": json.dumps(GOOD | {"x": 0}).encode()[:-2] + b"[" * 50_000,
    "deep and whole": json.dumps(GOOD).encode()[:-1]
    + b',"x":'
    + b"[" * 50_000
    + b"]" * 50_000
    + b"}",
    "a number of 5000 digits": b"9" * 5000,
    "3 MB": b"x" * 3_000_000,
    "3 MB of JSON": json.dumps(GOOD | {"text": "x" * 3_000_000}).encode(),
}
WRONG: dict[str, object] = {
    "a list": [],
    "a list of lists": [["beta"]],
    "an object": {"a": 1},
    "null": None,
    "true": True,
    "a float": 1.5,
    "a negative number": -1,
    "a large number": 10**300,
    "an empty string": "",
    "wildcards": "+/#",
    "a slash": "meta/beta/state",
    "NUL": "a\0b",
    "a lone surrogate": "\ud800",
    "70,000 characters": "x" * 70_000,
    "a line end": "beta\n",
    "all": "all",
    "meta": "meta",
    "dots": "../..",
}


def hostile() -> dict[str, bytes]:
    wrong = {
        f"{field}: {what}": json.dumps(GOOD | {field: value}).encode()
        for field in GOOD
        for what, value in WRONG.items()
    }
    numbers = {
        f"{field}: 5000 digits": json.dumps(GOOD | {field: 7777777})
        .encode()
        .replace(b"7777777", b"9" * 5000)
        for field in GOOD
    }
    return RUBBISH | wrong | numbers


@pytest.mark.parametrize(
    ("topic", "retained"),
    [
        ("hive/beta/command", False),
        ("hive/beta/command", True),
        ("hive/beta/response", False),
        ("hive/all/heartbeat", False),
        ("hive/all/alert", False),
        ("hive/meta/gamma/state", False),
        ("hive/meta/gamma/state", True),
        ("hive/meta/\ufffd/state", True),
        ("hive/beta/+", False),
        ("", False),
    ],
)
def test_no_payload_stops_a_node(rig_of: Callable[..., Rig], topic: str, retained: bool) -> None:
    rig = rig_of(level="info")
    payloads = hostile()
    for payload in payloads.values():
        rig.hand_in(topic, payload, retained)
        rig.turn()
    assert rig.acked == (0 if "meta" in topic else len(payloads))
    heartbeats, states = len(rig.heartbeats()), len(rig.kept("beta", "state"))
    rig.advance(5)
    assert len(rig.heartbeats()) > heartbeats, "it no longer shows that it is alive"
    rig.advance(5)
    assert len(rig.kept("beta", "state")) > states
    assert rig.works()


SENSELESS: list[object] = ["5", [5], {"a": 1}, None, True, 0, -1, 10**400, 1e300]


@pytest.mark.parametrize("field", ["interval", "boot", "node_id", "uptime_s", "seq", "load_1m"])
def test_a_heartbeat_of_wrong_types_is_still_a_sign_of_life(rig: Rig, field: str) -> None:
    for value in [*SENSELESS, "x" * 10_000]:
        inner: dict[str, Any] = {field: value}
        rig.beat("gamma", **inner)
        rig.turn()
    assert rig.kept("beta", "state")
    rig.advance(0.1)
    rig.beat("gamma")
    rig.advance(5)
    assert rig.kept("beta", "state")[-1]["known_peers"] == ["gamma"]
    assert rig.works()


@pytest.mark.parametrize(
    "text", ["alive", "null", "[]", "17", "{", '{"interval": NaN}', "[" * 100_000, "9" * 5000]
)
def test_a_heartbeat_without_sense_is_still_a_sign_of_life(rig: Rig, text: str) -> None:
    rig.say("heartbeat", sender="gamma", to="all", text=text)
    rig.advance(5)
    assert rig.kept("beta", "state")[-1]["known_peers"] == ["gamma"]
    rig.advance(20)
    assert rig.kept("beta", "state")[-1]["known_peers"] == []
    assert len(rig.sent("alert")) == 1


def test_runs_and_failures_are_counted(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(fail="exit 1")
    for action in ("ping", "ping", "fail", "ping"):
        rig.answer_to(rig.say("command", action))
    rig.advance(10)
    counters = rig.kept("beta", "state")[-1]["counters"]
    assert (counters["runs"], counters["failures"]) == (4, 1)


def test_ten_thousand_bad_messages_are_a_few_lines_in_the_log(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(level="info")
    asked = rig.say("command", "ping")
    rig.answer_to(asked)
    before = len(rig.events())
    for i in range(2500):
        rig.hand_in("hive/beta/command", b"rubbish %d" % i)
        rig.hand_in(f"hive/beta/{i}", asked.encode())
        rig.tell(asked, retained=True)
        rig.tell(asked)
        if i % 100 == 0:
            rig.turn()
    rig.turn()
    assert rig.acked == 10_001
    assert 4 <= len(rig.events()) - before <= 100
    rig.advance(10)
    counters = rig.kept("beta", "state")[-1]["counters"]
    assert counters["invalid"] == 2500 and counters["dropped"] == 7500
    assert rig.works()


def test_complaints_are_heard_again_after_a_while(rig: Rig) -> None:
    for _ in range(100):
        rig.hand_in("hive/beta/command", b"rubbish")
    first = len(rig.events("not an envelope", level="warning"))
    rig.advance(120)
    rig.hand_in("hive/beta/command", b"rubbish")
    assert len(rig.events("not an envelope", level="warning")) == first + 1


# What the broker is told


def test_a_message_is_acknowledged_once_it_is_on_disk(rig: Rig) -> None:
    found: list[int] = []

    def look() -> None:
        with closing(sqlite3.connect(rig.state_dir / "journal.sqlite3")) as database:
            query = "SELECT count(*) FROM log WHERE id = ?"
            found.append(database.execute(query, ("the-id",)).fetchone()[0])

    rig.tell(hive.Envelope.new("alpha", "beta", "command", "x", id="the-id"), ack=look)
    assert found == []
    rig.turn()
    assert found == [1]


def test_a_message_is_acknowledged_before_its_handler_has_ended(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(hang=HANGS)
    rig.say("command", "hang")
    rig.turn()
    assert rig.acked == 1
    assert rig.sent() == []


def test_every_message_is_acknowledged_once(rig: Rig) -> None:
    asked = hive.Envelope.new("alpha", "beta", "command", "x")
    rig.hand_in("hive/beta/command", b"rubbish")
    rig.hand_in("hive/beta/alert", asked.encode())
    rig.tell(asked, retained=True)
    rig.tell(asked)
    rig.tell(asked)
    rig.beat("gamma")
    rig.turn()
    assert rig.acked == 6
    rig.advance(1)
    assert rig.acked == 6


# Who is there


def lost(rig: Rig) -> list[str]:
    return [row["peer"] for row in rig.events("peer is lost")]


def test_a_silent_node_is_lost_once(rig: Rig) -> None:
    rig.beat("gamma")
    rig.advance(14)
    assert lost(rig) == []
    rig.advance(11)
    assert lost(rig) == ["gamma"]
    (alert,) = rig.sent("alert")
    assert (alert.sender, alert.to, alert.urgency) == ("beta", "all", "now")
    assert "gamma is lost" in alert.text
    (published,) = [p for p in rig.wire.published if p.topic == "hive/all/alert"]
    assert (published.qos, published.retain) == (1, False)
    rig.advance(300)
    assert lost(rig) == ["gamma"]
    assert rig.sent("alert") == [alert]


def test_a_loss_wakes_the_agent(
    rig_of: Callable[..., Rig], main: hive.InstanceConfig, fast_agent: Path
) -> None:
    rig = rig_of([main])
    rig.beat("gamma")
    rig.advance(25)
    (call,) = rig.until("the agent is called", lambda: calls_of(fast_agent))
    assert "gamma is lost" in call["argv"][3]


def test_a_peer_that_shows_itself_is_not_lost(rig: Rig) -> None:
    rig.live(100, "alpha", "gamma")
    assert lost(rig) == []
    assert rig.sent() == []


@pytest.mark.parametrize("interval", [1.0, 60.0])
def test_a_peer_is_judged_by_its_own_interval(rig: Rig, interval: float) -> None:
    rig.beat("gamma", interval=interval)
    rig.advance(2.5 * interval)
    assert lost(rig) == []
    rig.advance(interval + 10)
    assert lost(rig) == ["gamma"]
    assert len(rig.sent("alert")) == 1


def test_the_next_in_line_speaks_when_the_first_keeps_silent(rig: Rig) -> None:
    rig.beat("gamma")
    rig.live(22, "alpha")
    assert lost(rig) == ["gamma"]
    assert rig.sent("alert") == []
    rig.live(10, "alpha")
    assert len(rig.sent("alert")) == 1
    rig.live(100, "alpha")
    assert len(rig.sent("alert")) == 1


def test_the_next_in_line_speaks_at_once_when_the_first_is_lost_too(rig: Rig) -> None:
    rig.beat("alpha")
    rig.beat("gamma")
    rig.advance(25)
    assert sorted(alert.text[:5] for alert in rig.sent("alert")) == ["alpha", "gamma"]


@pytest.mark.parametrize("seconds", [18, 21], ids=["before we noticed", "after we noticed"])
def test_nothing_is_said_when_somebody_spoke_already(rig: Rig, seconds: int) -> None:
    rig.beat("gamma")
    rig.live(seconds, "alpha")
    assert rig.sent("alert") == []
    rig.say("alert", to="all", text="gamma is lost", corr=hive.loss_of("gamma"))
    rig.live(60, "alpha")
    assert lost(rig) == ["gamma"]
    assert rig.sent("alert") == []


def test_a_second_loss_is_told_again(rig: Rig) -> None:
    for count in (1, 2, 3):
        rig.beat("gamma")
        rig.advance(25)
        assert lost(rig) == ["gamma"] * count
        assert len(rig.sent("alert")) == count
        rig.advance(100)


def test_a_connection_that_dies_is_told_at_once(rig: Rig) -> None:
    rig.beat("gamma")
    rig.turn()
    rig.hear_state("gamma", status="offline", reason="connection lost")
    rig.turn()
    assert lost(rig) == ["gamma"]
    rig.advance(2)
    assert len(rig.sent("alert")) == 1
    rig.hear_state("gamma", status="offline", reason="connection lost")
    rig.advance(100)
    assert lost(rig) == ["gamma"]
    assert len(rig.sent("alert")) == 1


def test_a_clean_goodbye_is_no_loss(rig: Rig) -> None:
    rig.beat("gamma")
    rig.turn()
    rig.hear_state("gamma", status="offline", reason="stopped")
    rig.advance(100)
    assert lost(rig) == []
    assert rig.sent() == []
    assert rig.events("peer has stopped", peer="gamma")
    assert rig.kept("beta", "state")[-1]["known_peers"] == []


@pytest.mark.parametrize("how", ["silence", "will", "word of another"])
def test_a_peer_that_comes_back_is_told_once(rig: Rig, how: str) -> None:
    rig.beat("gamma")
    rig.turn()
    match how:
        case "silence":
            rig.advance(25)
        case "will":
            rig.hear_state("gamma", status="offline", reason="connection lost")
        case _:
            rig.say("alert", to="all", text="gamma is lost", corr=hive.loss_of("gamma"))
            rig.hear_state("gamma", status="offline", reason="lost")
    rig.advance(3)
    assert lost(rig) == ["gamma"]
    rig.beat("gamma", boot="second")
    rig.turn()
    (status,) = rig.sent("status")
    assert (status.sender, status.to, status.text) == ("beta", "all", "gamma is back")
    assert rig.events("peer is back", peer="gamma")
    rig.live(30, "gamma")
    assert rig.sent("status") == [status]


def test_only_the_first_in_line_says_who_is_back(rig: Rig) -> None:
    rig.beat("gamma")
    rig.live(25, "alpha")
    rig.live(20, "alpha", "gamma")
    assert rig.sent("status") == []
    assert rig.events("peer is back", peer="gamma")


def test_a_peer_that_is_new_or_restarts_is_no_news_for_the_hive(rig: Rig) -> None:
    rig.beat("gamma", boot="first")
    rig.beat("gamma", boot="second")
    rig.turn()
    assert rig.events("peer is up", peer="gamma")
    assert rig.events("peer has restarted", peer="gamma")
    assert rig.sent() == []


def test_nobody_is_blamed_for_an_outage_of_our_link(rig: Rig) -> None:
    rig.beat("gamma")
    rig.turn()
    rig.disconnect()
    rig.advance(100)
    rig.connect()
    rig.advance(14)
    assert lost(rig) == []
    rig.advance(11)
    assert lost(rig) == ["gamma"]
    assert len(rig.sent("alert")) == 1


def test_an_outage_is_one_line_and_nothing_is_heard_of_heartbeats_in_it(rig: Rig) -> None:
    rig.disconnect()
    before = len(rig.wire.published)
    for _ in range(5):
        rig.disconnect()
        rig.advance(20)
    assert len(rig.wire.published) == before
    assert len(rig.events("no broker, trying again", level="error")) == 1
    rig.connect()
    rig.advance(1)
    assert rig.kept("beta", "state")[-1]["status"] == "online"


def test_a_broker_that_stops_does_not_make_everyone_lost(rig: Rig) -> None:
    """It publishes the others' wills first, and ends our connection a moment later."""
    rig.live(10, "alpha", "gamma")
    for name in ("alpha", "gamma"):
        rig.hear_state(name, status="offline", reason="connection lost")
    rig.advance(0.5)
    rig.disconnect()
    rig.advance(60)
    rig.connect()
    rig.live(60, "alpha", "gamma")
    assert rig.sent() == []


def dies(rig: Rig, *names: str) -> None:
    """The broker publishes their wills."""
    for name in names:
        rig.hear_state(name, status="offline", reason="connection lost")


def alerts(rig: Rig) -> list[str]:
    return [alert.text.partition(" is lost")[0] for alert in rig.sent("alert")]


MANY = [f"n{i:02}" for i in range(30)]


@pytest.mark.parametrize("seconds", [1, 4, 20])
@pytest.mark.parametrize("count", [2, 3, 30])
def test_a_broker_that_stops_slowly_is_no_loss(rig: Rig, count: int, seconds: float) -> None:
    """It closes one connection after the other, ours last, and takes none any more."""
    for name in MANY[:count]:
        rig.beat(name)
    rig.wire.takes_connections = False
    for i, name in enumerate(MANY[:count]):
        dies(rig, name)
        for other in MANY[i + 1 : count]:  # the rest is served
            rig.beat(other)
        rig.advance(seconds / count)
    rig.disconnect()
    rig.wire.takes_connections = True
    rig.advance(30)
    rig.connect()
    rig.live(60, *MANY[:count])
    assert rig.sent() == []


def test_a_broker_that_hangs_while_it_stops_is_no_loss(rig: Rig) -> None:
    rig.live(10, "alpha", "gamma")
    rig.wire.takes_connections = None
    dies(rig, "alpha", "gamma")
    rig.advance(20)
    rig.disconnect()
    rig.advance(100)
    assert rig.sent() == []


def test_a_crowd_whose_connections_die_but_who_come_back_is_no_loss(rig: Rig) -> None:
    """As behind a router that restarts: the broker itself is well."""
    for name in MANY:
        rig.beat(name)
    for i, name in enumerate(MANY):
        dies(rig, name)
        rig.advance(0.1)
        for back in MANY[max(0, i - 12) : i - 9]:
            rig.beat(back)
    for name in MANY:
        rig.beat(name)
    rig.advance(10)
    assert rig.sent() == []


@pytest.mark.parametrize("count", [1, 5, 30])
def test_those_who_really_died_are_told_within_four_seconds(rig: Rig, count: int) -> None:
    for name in ("zeta", *MANY):
        rig.beat(name)
    rig.turn()
    dies(rig, *MANY[:count])
    rig.advance(3.5)
    assert sorted(alerts(rig)) == MANY[:count]
    assert len(rig.wire.probes) == 1


def test_a_loss_is_told_once_the_broker_takes_connections_again(rig: Rig) -> None:
    rig.wire.takes_connections = False
    rig.beat("gamma")
    rig.turn()
    dies(rig, "gamma")
    rig.advance(10)
    assert alerts(rig) == []
    rig.wire.takes_connections = True
    rig.advance(3)
    assert alerts(rig) == ["gamma"]


def test_a_broker_that_takes_no_more_connections_does_not_hide_a_loss_for_ever(rig: Rig) -> None:
    rig.wire.takes_connections = False
    rig.live(5, "alpha", "gamma")
    dies(rig, "gamma")
    rig.live(50, "alpha")
    assert alerts(rig) == []
    rig.live(20, "alpha")
    assert alerts(rig) == ["gamma"]


def test_what_was_shown_before_a_loss_shows_nothing_about_it(rig: Rig) -> None:
    """A connection that was asked for before the last one died proves nothing."""
    rig.wire.takes_connections = None
    rig.beat("gamma")
    rig.beat("delta")
    rig.turn()
    dies(rig, "gamma")
    rig.advance(2)
    dies(rig, "delta")
    rig.wire.probes[0](True)
    rig.advance(1)
    assert alerts(rig) == []
    rig.advance(1)
    rig.wire.probes[1](True)
    rig.advance(1)
    assert sorted(alerts(rig)) == ["delta", "gamma"]


def test_who_comes_and_goes_all_the_time_does_not_hide_the_loss_of_another(rig: Rig) -> None:
    rig.beat("gamma")
    rig.turn()
    dies(rig, "gamma")
    for _ in range(70):
        rig.beat("delta")
        rig.turn()
        dies(rig, "delta")
        rig.advance(1)
    assert "gamma" in alerts(rig)


def test_a_node_that_slept_does_not_blame_the_others(rig: Rig) -> None:
    rig.beat("gamma")
    rig.turn()
    rig.clock.now += 1000
    rig.turn()
    assert lost(rig) == []
    rig.advance(14)
    assert lost(rig) == []
    rig.advance(11)
    assert lost(rig) == ["gamma"]


def test_a_node_that_died_while_nobody_looked_is_lost(rig: Rig) -> None:
    rig.hear_state("gamma", retained=True, status="online", last_seen=1771143500)
    rig.advance(14)
    assert lost(rig) == []
    rig.advance(11)
    assert lost(rig) == ["gamma"]
    (alert,) = rig.sent("alert")
    assert "last seen 2026-02-15 08:18:20 UTC" in alert.text


def test_a_node_known_from_its_state_is_judged_by_its_own_interval(rig: Rig) -> None:
    rig.hear_state(
        "gamma",
        retained=True,
        **{"status": "online", "last_seen": int(time.time()), "interval": 60.0},
    )
    rig.advance(150)
    assert lost(rig) == []
    rig.advance(50)
    assert lost(rig) == ["gamma"]


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("gamma", {"status": "offline", "last_seen": 1771143500}),
        ("gamma", {"status": "offline", "reason": "connection lost"}),
        ("gamma", {}),
        ("beta", {"status": "online", "last_seen": 1771143500}),
        ("helper", {"status": "online", "daemon_node": "gamma", "last_seen": 1771143500}),
    ],
    ids=["stopped", "crashed before", "says nothing", "ourselves", "an agent"],
)
def test_a_kept_state_that_promises_nothing_is_no_loss(
    rig: Rig, name: str, state: dict[str, Any]
) -> None:
    rig.hear_state(name, retained=True, **state)
    rig.advance(100)
    assert lost(rig) == []
    assert rig.sent() == []


@pytest.mark.parametrize("last_seen", [None, "yesterday", [], True, -1, 10**18, 1.5, float("nan")])
def test_a_kept_state_with_a_senseless_time_is_judged_like_any_other(
    rig: Rig, last_seen: object
) -> None:
    rig.hear_state("gamma", retained=True, status="online", last_seen=last_seen)
    rig.advance(25)
    assert lost(rig) == ["gamma"]
    assert len(rig.sent("alert")) == 1


def test_a_node_does_not_listen_to_its_own_heartbeats(rig: Rig) -> None:
    rig.beat("beta", boot="this-run")
    rig.advance(100)
    assert lost(rig) == []
    assert rig.kept("beta", "state")[-1]["known_peers"] == []


# What it tells of itself


def test_a_heartbeat_comes_every_interval(rig: Rig) -> None:
    rig.advance(50)
    heartbeats = rig.heartbeats()
    assert 10 <= len(heartbeats) <= 12
    assert {(p.qos, p.retain, p.n) for p in heartbeats} == {(0, False, 0)}
    inner = [json.loads(hive.Envelope.parse(p.payload).text) for p in heartbeats]
    last = inner[-1]
    assert (last["node_id"], last["interval"], last["boot"]) == ("beta", 5.0, "this-run")
    assert last["uptime_s"] == 50.0
    assert last["oc_instances"] == []
    assert "load_1m" in last
    assert [row["seq"] for row in inner] == sorted({row["seq"] for row in inner})


def test_a_state_that_says_nothing_new_is_published_before_it_seems_stale(rig: Rig) -> None:
    """By whatever version it is read: last_seen, interval and miss_threshold are what it has."""
    rig.live(61, "gamma")
    seen = [state["uptime_s"] for state in rig.kept("beta", "state")]
    gaps = [later - earlier for earlier, later in pairwise(seen)]
    assert gaps[1:] == [10.0] * len(gaps[1:]), "no more than it must be"
    for _ in range(10):
        rig.advance(2.5)
        rig.disconnect()
        rig.connect()
        rig.live(21, "gamma")
    seen = [state["uptime_s"] for state in rig.kept("beta", "state")]
    assert max(later - earlier for earlier, later in pairwise(seen)) <= 5.0 * 2 + 0.5


@pytest.mark.parametrize("what", ["known_peers", "status", "after an outage"])
def test_a_state_that_says_something_new_is_published_with_the_next_heartbeat(
    rig_of: Callable[..., Rig], what: str
) -> None:
    agents = [hive.InstanceConfig("main", openclaw_cmd=("/no/such/openclaw",))]
    rig = rig_of(agents)
    rig.advance(11)
    before = len(rig.kept("beta", "state"))
    match what:
        case "known_peers":
            rig.beat("gamma")
        case "status":
            rig.say("command")
        case _:
            rig.disconnect()
            rig.connect()
            assert len(rig.kept("beta", "state")) == before + 1
            return
    rig.advance(4.5)
    assert len(rig.kept("beta", "state")) == before + 1
    assert len(rig.kept("main", "state")) == len(rig.kept("beta", "state"))


@pytest.mark.parametrize("missed", [1, 2, 10])
def test_a_state_is_renewed_as_often_as_its_miss_threshold_asks(
    rig_of: Callable[..., Rig], missed: int
) -> None:
    rig = rig_of(heartbeat=hive.HeartbeatConfig(miss_threshold=missed))
    rig.advance(101)
    seen = [state["uptime_s"] for state in rig.kept("beta", "state")]
    gaps = {later - earlier for earlier, later in pairwise(seen)}
    assert gaps == {5.0 * max(1, missed - 1)}


def test_somebody_with_our_name_is_answered_with_a_heartbeat(rig: Rig) -> None:
    rig.advance(2)
    before = len(rig.heartbeats())
    for _ in range(20):
        rig.say("heartbeat", sender="beta", text=json.dumps({"boot": "another"}))
    rig.turn()
    assert len(rig.heartbeats()) == before + 1


def test_the_state_tells_how_a_node_is(rig_of: Callable[..., Rig]) -> None:
    agent = hive.InstanceConfig("main", openclaw_cmd=("/no/such/openclaw",), token="secret")
    rig = rig_of([agent])
    rig.live(15, "gamma", "alpha")
    for name in ("beta", "main"):
        (*_, published) = [p for p in rig.wire.published if p.topic == f"hive/meta/{name}/state"]
        assert (published.qos, published.retain) == (1, True)
        state = json.loads(published.payload)
        assert state["node_id"] == name
        assert state["daemon_node"] == "beta"
        assert state["status"] == "online"
        assert abs(state["last_seen"] - time.time()) < 60
        assert state["uptime_s"] == 15.0
        assert state["known_peers"] == ["alpha", "gamma"]
        assert state["version"].startswith(hive.__version__)
        assert state["instance"] == "this-run"
        assert state["oc"]["main"]["status"] == "unknown"
        assert {"load_1m", "counters"} <= state.keys()
    rig.say("command")
    rig.advance(10)
    state = rig.kept("beta", "state")[-1]
    assert state["status"] == "degraded"
    assert state["oc"]["main"]["status"] == "down"
    assert "No such file" in state["reason"]
    assert b"secret" not in b"".join(p.payload for p in rig.wire.published)


def test_a_node_without_a_disk_is_degraded(rig_of: Callable[..., Rig], tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    rig = rig_of()
    rig.advance(5)
    assert rig.kept("beta", "state")[-1]["status"] == "degraded"
    assert rig.works()


def test_the_will_says_that_the_connection_was_lost(rig: Rig) -> None:
    will = rig.wire.will
    assert (will.topic, will.qos, will.retain) == ("hive/meta/beta/state", 1, True)
    state = json.loads(will.payload)
    assert (state["node_id"], state["status"]) == ("beta", "offline")
    assert state["reason"] == "connection lost"


def test_the_roster_tells_what_a_node_can_do(
    rig_of: Callable[..., Rig], main: hive.InstanceConfig
) -> None:
    rig = rig_of([main], deploy="exit 1")
    (published,) = [p for p in rig.wire.published if p.topic == "hive/meta/beta/roster"]
    assert (published.qos, published.retain) == (1, True)
    roster = json.loads(published.payload)
    assert roster["node"] == "beta"
    assert (roster["agents"], roster["handlers"]) == (["main"], ["deploy", "ping"])
    assert roster["version"] == hive.__version__


def test_the_roster_is_told_again_when_the_handlers_change(rig: Rig) -> None:
    def handlers() -> list[list[str]]:
        return [roster["handlers"] for roster in rig.kept("beta", "roster")]

    rig.advance(20)
    assert handlers() == [["ping"]]
    rig.handler("deploy", "echo deployed")
    rig.advance(5)
    assert handlers() == [["ping"], ["deploy", "ping"]]
    assert rig.answer_to(rig.say("command", "deploy")).text == "deployed"
    (rig.handler_dir / "deploy").unlink()
    rig.advance(20)
    assert handlers() == [["ping"], ["deploy", "ping"], ["ping"]]


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
    rig_of: Callable[..., Rig], main: hive.InstanceConfig
) -> None:
    rig = rig_of([main])
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
