"""A hive through bad times: who was there all the while is never said to be lost.

Real daemons at a broker in memory, whose keepalive, wills and retained documents are as MQTT has
them; the clock goes on as the test says.  The same with a real Mosquitto, 500 nodes and an hour:
tests/bench_fleet.py --scenario 60.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rig

import hive
from hive import IncomingMessage, OutgoingMessage

SIZE = 20
STARTED = 1_800_000_000  # Unix seconds
KEEPALIVE = hive.MqttConfig().keepalive
TICK = 1.0  # seconds


class Port(rig.Wire):
    """One node's connection: what it says goes to all, where there is a way."""

    def __init__(self, machine: Machine, will: OutgoingMessage) -> None:
        super().__init__(will)
        self.machine, self.inbox = machine, list[IncomingMessage]()

    def probe(self, done: Callable[[bool], None]) -> None:
        done(self.machine.reachable and self.machine.fleet.open)

    def send(self, message: OutgoingMessage) -> None:
        self.unacknowledged.append(message)
        if self.machine.linked:
            self.machine.fleet.publish(message)


class Machine:
    """A node, and what may happen to it."""

    def __init__(self, fleet: Fleet, name: str, home: Path) -> None:
        self.name, self.fleet, self.log = name, fleet, io.StringIO()
        self.asleep, self.cut = True, False
        self.off = 0.0  # seconds of its wall clock
        self.heard = 0.0  # of it, by the broker
        self.known = False  # does the broker take it for connected?
        (home / "hive-daemon.d").mkdir(parents=True)
        node = hive.NodeConfig(name, handler_dir=home / "hive-daemon.d", state_dir=home / "state")
        log = hive.Log("info", "json", self.log)
        self.loop = hive.Loop(log, fleet.clock)
        self.journal = hive.Journal(home / "state", log, 7 * 86400, 64_000_000)
        self.daemon = hive.Daemon(
            *(hive.Config(node), self.loop, log, self.journal, f"{name}-run", ""), self._port
        )

    def _port(self, config: hive.Config, will: OutgoingMessage) -> hive.Transport:
        self.port = Port(self, will)
        return self.port

    @property
    def reachable(self) -> bool:
        return self.fleet.up and not self.cut

    @property
    def linked(self) -> bool:
        return self.known and self.reachable

    def connect(self) -> None:
        self.known, self.port.up, self.heard = True, True, self.fleet.clock.now
        self.port.inbox = [
            IncomingMessage(topic, payload, True, None, hive.do_nothing)
            for topic, payload in self.fleet.retained.items()
        ]
        self.daemon.on_connected()

    def turn(self) -> None:
        """What its own process does in this moment."""
        if self.asleep:
            return
        self.fleet.off = self.off
        if self.port.up and not self.linked:
            silence = self.fleet.clock.now - self.heard  # it cannot know more than that
            if self.reachable or silence > hive.GIVE_UP * KEEPALIVE:
                self.port.up = False
                self.port.inbox.clear()
                self.port.unacknowledged.clear()
                self.journal.requeue(0.0)
                self.daemon.on_disconnected("gone")
        elif not self.port.up and self.reachable and self.fleet.open:
            self.connect()
        for _ in range(3):
            for message in self.port.unacknowledged[:] if self.linked else ():
                self.port.acknowledge(message, 0, "Success")
            for come in self.port.inbox if self.linked else ():
                self.daemon.deliver(come)
            self.port.inbox.clear()
            self.loop.post(hive.do_nothing)
            self.loop.step()

    def events(self, event: str) -> list[dict[str, Any]]:
        rows = map(json.loads, self.log.getvalue().splitlines())
        return [row for row in rows if row["event"] == event]


class Fleet:
    """All of them, and the broker."""

    def __init__(self, home: Path) -> None:
        self.clock, self.off = rig.Clock(), 0.0
        self.up = self.open = True  # is the broker there, and does it take new connections?
        self.retained: dict[str, bytes] = {}
        self.machines = [Machine(self, f"node-{n:02}", home / str(n)) for n in range(SIZE)]

    def time(self) -> float:
        """The wall clock of whoever is at work."""
        return STARTED + self.clock.now + self.off

    def publish(self, message: OutgoingMessage) -> None:
        if message.retain:
            self.retained[message.topic] = message.payload
        for one in self.machines:
            if one.known and self.up:
                one.port.inbox.append(
                    IncomingMessage(message.topic, message.payload, False, None, hive.do_nothing)
                )

    def bury(self, one: Machine) -> None:
        one.known = False
        self.publish(one.port.will)

    def stop(self) -> None:
        """As Mosquitto does it: one will after the other, while the others are there to hear.

        Who stands first in line to tell of them is the last one to lose it.
        """
        self.open = False
        for one in reversed(self.machines):
            self.bury(one)
            self.clock.now += 0.1
            for other in self.machines:
                other.turn()
        self.up = False

    def start(self) -> None:
        self.up = self.open = True

    def pass_(self, seconds: float) -> None:
        until = self.clock.now + seconds
        while self.clock.now < until:
            self.clock.now += TICK
            for one in self.machines:
                if not one.asleep and one.linked:
                    one.heard = self.clock.now  # it pings
                one.turn()
            for one in self.machines:
                if self.up and one.known and self.clock.now - one.heard > 1.5 * KEEPALIVE:
                    self.bury(one)

    def alerts(self) -> list[str]:
        sent = [row.get("corr") for one in self.machines for row in one.events("sent")]
        return sorted(id.removeprefix("lost:") for id in sent if id and id.startswith("lost:"))


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setattr(hive.Loop, "on_signal", lambda *_: None)
    fleet = Fleet(tmp_path)
    monkeypatch.setattr(time, "time", fleet.time)
    for one in fleet.machines:  # one after the other, as their heartbeats are to come
        one.asleep = False
        one.daemon.start()
        fleet.pass_(TICK)
    yield fleet
    for one in fleet.machines:
        assert one.events("bug") == []
        one.daemon.abandon()
        one.journal.close()
        one.loop.close()


def restart(fleet: Fleet) -> None:
    fleet.stop()
    fleet.pass_(20)
    fleet.start()


def part(fleet: Fleet) -> None:
    for one in fleet.machines[-5:]:
        one.cut = True
    fleet.pass_(40)
    for one in fleet.machines[-5:]:
        one.cut = False


def sleep(fleet: Fleet) -> None:
    fleet.machines[3].asleep = True
    fleet.pass_(40)
    fleet.clock.now += 560  # nothing new comes of the rest of the ten minutes
    fleet.machines[3].asleep = False


def stall(fleet: Fleet) -> None:
    fleet.machines[2].cut = True
    fleet.pass_(8)
    fleet.machines[2].cut = False


def set_back(fleet: Fleet) -> None:
    fleet.machines[0].off = -3600.0
    fleet.machines[7].off = -86000.0


TROUBLES: dict[str, tuple[Callable[[Fleet], None], list[int]]] = {
    "the broker is started anew": (restart, []),
    "a network stalls for 8 s": (stall, []),
    "a partition heals": (part, [15, 16, 17, 18, 19]),
    "a machine sleeps": (sleep, [3]),
    "clocks are set back": (set_back, []),
}


def test_nobody_who_was_there_is_said_to_be_lost(fleet: Fleet) -> None:
    for name, (trouble, away) in TROUBLES.items():
        before = fleet.alerts()
        trouble(fleet)
        fleet.pass_(25)
        told = fleet.alerts()
        for one in before:
            told.remove(one)
        assert told == [fleet.machines[n].name for n in away], name
        known = [len(one.daemon.node.members.alive()) for one in fleet.machines]
        assert known == [SIZE - 1] * SIZE, name
