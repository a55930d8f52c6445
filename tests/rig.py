"""A node on a link in memory, whose clock stands still until the test puts it forward."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from conftest import eventually

import hive

T = TypeVar("T")
HANGS = "while [ ! -e ../gate ]; do sleep 0.02; done; echo through"  # until the gate is there


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
        self.hangs = False
        self.unacknowledged: list[hive.OutgoingMessage] = []
        self.probes: list[Callable[[bool], None]] = []
        self.fetched: list[list[str]] = []
        self.takes_connections: bool | None = True  # None: it does not answer
        self.up = self.closed = self.silent = False
        self.host = "broker.lan"
        self.limit = 1_000_000  # bytes of a topic and its payload
        self.sent_again = 0

    def set_broker(self, settings: hive.MqttConfig) -> None:
        pass

    def use_outbox(
        self,
        outbox: hive.Journal,
        published: Callable[[hive.OutgoingMessage, int, str], None],
        address: Callable[[str], str | None],
    ) -> None:
        self.outbox, self.told, self.address = outbox, published, address

    def open(self, listener: hive.ClientListener) -> None:
        pass

    def publish(self, message: hive.OutgoingMessage) -> None:
        if self.up:
            self.send(message)

    def send_queued(self) -> None:
        for message in self.outbox.next_outgoing(1000, self.address) if self.up else ():
            self.send(message.replace(topic=self.address(message.topic)))

    def send_again(self) -> None:
        self.sent_again += 1

    def room(self, topic: str) -> int:
        return self.limit - len(topic)

    def send(self, message: hive.OutgoingMessage) -> None:
        self.published.append(message)
        self.unacknowledged.append(message)
        if "/all/" in message.topic and not self.hangs:
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

    def take_over(
        self,
        client_id: str,
        end_marker: str,
        commit: Callable[[Callable[[], None]], None],
        done: Callable[[], None],
    ) -> None:
        self.taken_over = client_id
        done()

    def fetch(
        self,
        topics: Sequence[str],
        end_marker: str,
        found: Callable[[hive.IncomingMessage], None],
    ) -> None:
        self.fetched.append([*topics])

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
        shared: hive.JournalConfig | None = None,
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
            journal=shared or hive.JournalConfig(),
        )
        self.clock, self.log, self.acked = Clock(), io.StringIO(), 0
        self._rows, self._read = list[dict[str, Any]](), 0  # of the log, and up to where
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
        self.node.on_connected()
        self.turn()

    def disconnect(self) -> None:
        self.wire.up = False
        self.node.on_disconnected("connection refused")
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

    def ask(self, client: hive.ControlClient, /, **request: object) -> dict[str, Any]:
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
        said = self.log.getvalue()
        self._rows += [json.loads(line) for line in said[self._read :].splitlines()]
        self._read = len(said)
        return [
            row
            for row in self._rows
            if event in ("", row["event"]) and facts.items() <= row.items()
        ]

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
