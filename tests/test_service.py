"""What systemd hears, on a socket of the test's own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE, Broker, Hive, eventually, run_until
from rig import HANGS

from hive import Log, Loop, ServiceManager, do_nothing


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(PATIENCE)
        yield listening


def environment(manager: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": manager.getsockname(), **more}


def heard(manager: socket.socket) -> str:
    return manager.recv(4096).decode()


def waiting(manager: socket.socket) -> list[str]:
    """All that was said and not yet heard."""
    said = list[str]()
    manager.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            said.append(heard(manager))
    manager.settimeout(PATIENCE)
    return said


def hear_until(manager: socket.socket, start: str) -> list[str]:
    """Hear what is said until something begins like this."""
    said = list[str]()

    def is_said() -> bool:
        said.append(heard(manager))
        return said[-1].startswith(start)

    eventually(f"{start} is said", is_said)
    return said


def test_what_is_said_at_once_is_one_datagram(loop: Loop, manager: socket.socket) -> None:
    service = ServiceManager(loop, environment(manager))
    service.notify("READY=1", "STATUS=starting")
    service.notify("STATUS=connected")
    assert heard(manager) == "READY=1\nSTATUS=starting"
    assert heard(manager) == "STATUS=connected"


def test_the_watchdog_is_fed_while_the_loop_runs_and_not_when_it_stalls(
    loop: Loop, manager: socket.socket
) -> None:
    ServiceManager(loop, environment(manager, WATCHDOG_USEC="100000"))
    fed = list[str]()

    def is_fed() -> bool:
        fed.extend(waiting(manager))
        return fed.count("WATCHDOG=1") >= 3

    run_until(loop, "it is fed", is_fed)
    assert {*fed} == {"WATCHDOG=1"}
    time.sleep(0.3)  # a stalled loop: three periods of nothing
    assert waiting(manager) == []
    loop.step()
    assert waiting(manager) == ["WATCHDOG=1"]


@pytest.mark.parametrize(
    ("given", "fed"),
    [
        ({"WATCHDOG_USEC": "30000000"}, [1, 0, 1, 0, 1]),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, [1, 0, 1, 0, 1]),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, [0] * 5),
        ({"WATCHDOG_USEC": "0"}, [0] * 5),
        ({"WATCHDOG_USEC": "-1"}, [0] * 5),
        ({}, [0] * 5),
    ],
)
def test_the_watchdog_is_fed_twice_in_its_time(
    manager: socket.socket, given: dict[str, str], fed: list[int]
) -> None:
    now, times = [0.0], list[int]()
    loop = Loop(Log(), lambda: now[0])
    ServiceManager(loop, environment(manager, **given))
    for now[0] in (0.0, 14.9, 15.0, 29.9, 30.0):
        loop.post(do_nothing)
        loop.step()
        times.append(waiting(manager).count("WATCHDOG=1"))
    loop.close()
    assert times == fed


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has abstract sockets")
def test_a_manager_with_an_abstract_socket_hears_us(loop: Loop) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0hive-test-{os.getpid()}")
        listening.settimeout(PATIENCE)
        ServiceManager(loop, {"NOTIFY_SOCKET": f"@hive-test-{os.getpid()}"}).notify("READY=1")
        assert heard(listening) == "READY=1"


def test_a_manager_that_hangs_does_not_hang_us(loop: Loop, manager: socket.socket) -> None:
    service = ServiceManager(loop, environment(manager))
    for number in range(2000):  # more than its socket holds
        service.notify(f"STATUS={number}", "x" * 1000)
    assert waiting(manager)[0].startswith("STATUS=0\n")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"NOTIFY_SOCKET": "/no/such/socket", "WATCHDOG_USEC": "1000"},
        {"NOTIFY_SOCKET": "@nobody-listens", "WATCHDOG_USEC": "rubbish"},
        {"NOTIFY_SOCKET": "x" * 1000},
    ],
)
def test_without_a_service_manager_nothing_happens(loop: Loop, given: dict[str, str]) -> None:
    service = ServiceManager(loop, given)
    service.notify("READY=1", "STATUS=up")
    loop.after(0, lambda: None)
    loop.step()
    service.notify("STOPPING=1")


def test_another_process_watchdog_is_not_ours_to_feed(loop: Loop, manager: socket.socket) -> None:
    more = {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": str(os.getpid() + 1)}
    service = ServiceManager(loop, environment(manager, **more))
    service.notify("READY=1", "STATUS=up")
    loop.after(0.01, lambda: None)
    loop.step()
    assert waiting(manager) == ["READY=1\nSTATUS=up"]


def test_a_daemon_under_systemd_tells_its_story_and_its_handlers_do_not(
    hive_of: Callable[..., Hive], shared_broker: Broker, manager: socket.socket
) -> None:
    hive = hive_of(shared_broker)
    hive.environment |= environment(manager, WATCHDOG_USEC="200000")
    alpha = hive.node("alpha")
    alpha.handler("env", "#!/bin/sh\nenv\n")
    alpha.start()
    connected = f"STATUS=alpha is connected to localhost:{shared_broker.port}"
    said = hear_until(manager, connected)
    assert "READY=1\nSTATUS=looking for the broker" in said
    hear_until(manager, "WATCHDOG=1")
    answer = hive.cli(
        "alpha", "send", "--to", "alpha", "--action", "env", "--text", "x", "--wait", "20"
    )
    assert "NOTIFY_SOCKET" not in answer.stdout and "WATCHDOG" not in answer.stdout

    assert alpha.process
    os.kill(alpha.pid, signal.SIGSTOP)  # a daemon that hangs
    os.waitid(os.P_PID, alpha.pid, os.WSTOPPED)
    waiting(manager)
    time.sleep(0.5)
    assert waiting(manager) == []
    os.kill(alpha.pid, signal.SIGCONT)
    os.kill(alpha.pid, signal.SIGHUP)
    *_, reloading = hear_until(manager, "RELOADING=1\nMONOTONIC_USEC=")
    microseconds = int(reloading.rpartition("=")[2])
    assert abs(time.monotonic() - microseconds / 1e6) < PATIENCE
    assert hear_until(manager, "READY=1")[-1] == "READY=1"
    os.kill(alpha.pid, signal.SIGUSR1)  # to begin again is no end
    assert not any("STOPPING" in one for one in hear_until(manager, "READY=1\nSTATUS=looking"))
    hear_until(manager, connected)
    eventually("it begins again", lambda: len(alpha.events("starting")) == 2)
    assert alpha.process.poll() is None

    alpha.handler("slow", f"#!/bin/sh\n{HANGS}\n")
    hive.cli("alpha", "send", "--to", "alpha", "--action", "slow", "--text", "x")
    alpha.logged("handler started", action="slow")
    os.kill(alpha.pid, signal.SIGUSR1)
    alpha.logged("stopping", handlers=1)
    assert alpha.stop() == 0  # whoever says stop meanwhile means it
    hear_until(manager, "RELOADING=1")
    alpha.start()
    assert alpha.stop() == 0
    assert hear_until(manager, "STOPPING=1")[-1] == "STOPPING=1\nSTATUS=stopping"
