"""Faults: what was reported as sent is acted upon once, whoever dies meanwhile.

Each test counts its messages; make faults prints the table of them.  See faults.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Broker, Hive, eventually, need_mosquitto
from faults import (
    COUNT,
    TABLE,
    WAITING,
    OwnBroker,
    Quota,
    SmallDisk,
    Tally,
    Trial,
    Wire,
    Witness,
    table_of,
)

KILLS = 10
HOUR = 3600.0
BROKERS: dict[str, Callable[[Path], Broker]] = {"mosquitto": Broker, "hive": OwnBroker}
BOTH = pytest.mark.parametrize("broker", BROKERS, indirect=True)  # else Mosquitto alone
TALLIES: list[Tally] = []

Begin = Callable[..., Trial]


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Say what was counted, where somebody wants to know."""
    yield
    if TABLE and TABLE != "-":
        Path(TABLE).write_text(table_of(TALLIES) + "\n")
    elif TABLE:
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"\n\n{table_of(TALLIES)}\n")


@pytest.fixture
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    """A durable broker of the test's own."""
    kind = getattr(request, "param", "mosquitto")
    if kind == "mosquitto":
        need_mosquitto()
    broker = BROKERS[kind](tmp_path / "broker")
    yield broker
    broker.stop()


@pytest.fixture
def begin(broker: Broker, hive_of: Callable[..., Hive]) -> Begin:
    """Two nodes; what became of their messages is in the table, whatever became of the test."""

    def make(fault: str, **how: int) -> Trial:
        trial = Trial(hive_of(broker), fault, **how)
        TALLIES.append(trial.tally)
        return trial

    return make


def test_the_receiver_is_killed_ten_times(begin: Begin) -> None:
    trial = begin("receiver killed").start()
    beta, chance = trial.beta, trial.chance
    with contextlib.closing(Witness(trial)) as witness:
        with trial.sending():
            for kill in range(KILLS):
                if kill % 3:  # while it works ...
                    ahead = chance.randrange(COUNT // KILLS)
                    trial.reached(min(len(trial.done()) + ahead, COUNT * 9 // 10))
                else:  # ... and while it starts
                    time.sleep(chance.random() * 0.4)
                beta.restart()
        trial.settle()
        answers = trial.answers()
        reported = [id for id, kinds in answers.items() if kinds == ["interrupted"]]
        eventually(
            "each interruption is a result",
            lambda: witness.interrupted() == set(reported),
        )
    trial.unchanged()


def test_the_senders_daemon_is_killed_right_after_send_returned(begin: Begin) -> None:
    trial = begin("sender killed").start()
    kills = sorted(trial.chance.sample(range(COUNT // 20, COUNT), KILLS))
    for i, number in enumerate(kills):
        while len(trial.commands) < number:
            trial.send()
        if i % 2:
            trial.send_by_command()
        else:
            trial.send()
        trial.alpha.restart()
    trial.send_rest()
    trial.settle()
    trial.unchanged()


@BOTH
def test_the_broker_is_killed_and_comes_back(begin: Begin, broker: Broker) -> None:
    own = " (hive's own)" if isinstance(broker, OwnBroker) else ""
    trial = begin(f"broker killed{own}").start()
    with trial.sending():
        for _ in range(5):
            ahead = trial.chance.randrange(COUNT // 10)
            trial.reached(min(len(trial.done()) + ahead, COUNT * 9 // 10))
            broker.stop(signal.SIGKILL)
            time.sleep(trial.chance.random() * 0.3)
            broker.start()
    trial.settle()
    trial.unchanged()


OUTAGE = 30.0  # seconds


def test_the_broker_is_away_for_half_a_minute(begin: Begin, broker: Broker) -> None:
    trial = begin("broker away for 30 s")
    trial.start()
    with trial.sending():
        trial.reached(COUNT // 4)
        broker.stop()
        time.sleep(OUTAGE / 2)
        trial.beta.restart()
        trial.alpha.restart()
        time.sleep(OUTAGE / 2)
        broker.start()
    trial.settle()


@pytest.mark.parametrize("kind", ["and goes on", "and is forgotten"])
def test_the_network_is_cut_without_a_reset(begin: Begin, broker: Broker, kind: str) -> None:
    with contextlib.closing(Wire(broker.port)) as wire:
        trial = begin(f"network is cut {kind}", port=wire.port, keepalive=5).start()
        with trial.sending():
            trial.reached(COUNT // 4)
            wire.cut()
            time.sleep(2.0)
            wire.mend(forget=kind == "and is forgotten")
        trial.settle()
        noticed = [
            bool(node.events("no broker, trying again")) for node in (trial.alpha, trial.beta)
        ]
        assert noticed == [kind == "and is forgotten"] * 2


@pytest.mark.parametrize("hours", [1, -1])
@pytest.mark.parametrize("node", ["alpha", "beta"])
def test_the_clock_of_one_node_is_an_hour_off(
    begin: Begin, broker: Broker, node: str, hours: int
) -> None:
    off = hours * HOUR
    trial = begin(f"clock of {node} {off:+.0f} s")
    trial.hive.nodes[node].change = (  # type: ignore[attr-defined]
        f"right = time.time; time.time = lambda: right() + {off}"
    )
    trial.start()
    clock = off if node == "alpha" else 0.0  # of the command that sends
    for _ in range(COUNT // 4):
        trial.send(ttl=60, clock=clock)
    trial.beta.kill()
    for number in range(COUNT // 4):
        trial.send(ttl=1 if number % 3 == 0 else 60, stale=number % 3 == 0, clock=clock)
    trial.wait("the broker has it all", lambda: trial.alpha.count(WAITING) == 0)
    time.sleep(2.1)  # a second of MQTT may take two
    trial.beta.start_again()
    while len(trial.commands) < COUNT:
        trial.send(ttl=60, clock=clock)
    trial.settle()


@pytest.fixture(params=["tmpfs", "RLIMIT_FSIZE"])
def disk(request: pytest.FixtureRequest) -> str:
    if request.param == "RLIMIT_FSIZE" and sys.platform != "linux":
        pytest.skip("only Linux can change the limits of a process that runs")
    if request.param == "tmpfs" and os.geteuid() != 0:
        pytest.skip("only root can mount a small file system; RLIMIT_FSIZE stands in for it")
    return str(request.param)


def test_the_disk_is_full_for_a_while(begin: Begin, disk: str) -> None:
    trial = begin(f"disk full ({disk})")
    nodes = (trial.alpha, trial.beta)
    with contextlib.ExitStack() as ending:
        room: SmallDisk | Quota = Quota(*nodes)
        if disk == "tmpfs":
            folder = trial.hive.home / "small"
            room = SmallDisk(folder)
            ending.callback(room.close)
            for node in nodes:
                (folder / node.name).mkdir(mode=0o700)
                (node.home / "state").symlink_to(folder / node.name)
            ending.callback(trial.hive.close)
        for node in nodes:  # it looks at the disk every 30 s
            node.change, node.far_log = "hive.MAINTENANCE_INTERVAL = 0.5", disk == "RLIMIT_FSIZE"
        trial.start()
        trial.send_rest(COUNT // 2)
        room.fill()
        with trial.sending():
            for node in nodes:
                node.logged("cannot write, going on in memory")
            eventually("both say so", lambda: statuses(trial) == {"degraded"})
        trial.reached(COUNT)
        room.free()
        for node in nodes:
            node.logged("can write again")
        trial.settle()
        eventually("both are well", lambda: statuses(trial) == {"online"})
        trial.unchanged()


def statuses(trial: Trial) -> set[str]:
    shown = trial.alpha.statuses()
    return {shown[name] for name in trial.hive.nodes}
