"""What systemd hears, on a socket of the test's own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE, Broker, Hive

from hive import Log, Loop, ServiceManager


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


def test_it_says_ready_status_reloading_and_stopping(manager: socket.socket) -> None:
    loop = Loop(Log("error"))
    service = ServiceManager(loop, environment(manager))
    service.ready("starting")
    service.status("connected")
    service.reloading()
    service.reloaded()
    service.stopping()
    assert heard(manager) == "READY=1\nSTATUS=starting"
    assert heard(manager) == "STATUS=connected"
    assert heard(manager).startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert heard(manager) == "READY=1"
    assert heard(manager) == "STOPPING=1\nSTATUS=stopping"
    loop.close()


def test_the_watchdog_is_fed_while_the_loop_turns_and_not_when_it_stalls(
    manager: socket.socket,
) -> None:
    loop = Loop(Log("error"))
    ServiceManager(loop, environment(manager, WATCHDOG_USEC="100000")).ready("up")
    fed = list[str]()
    while fed.count("WATCHDOG=1") < 3:
        loop.step()
        fed += waiting(manager)
    time.sleep(0.3)  # a stalled loop: three periods of nothing
    assert waiting(manager) == []
    loop.step()
    assert waiting(manager) == ["WATCHDOG=1"]
    loop.close()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"NOTIFY_SOCKET": "/no/such/socket", "WATCHDOG_USEC": "1000"},
        {"NOTIFY_SOCKET": "@nobody-listens", "WATCHDOG_USEC": "rubbish"},
        {"NOTIFY_SOCKET": "x" * 1000},
    ],
)
def test_without_a_service_manager_nothing_happens(given: dict[str, str]) -> None:
    loop = Loop(Log("error"))
    service = ServiceManager(loop, given)
    service.ready("up")
    service.stopping()
    loop.close()


def test_another_process_watchdog_is_not_ours_to_feed(manager: socket.socket) -> None:
    loop = Loop(Log("error"))
    more = {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": str(os.getpid() + 1)}
    ServiceManager(loop, environment(manager, **more)).ready("up")
    assert waiting(manager) == ["READY=1\nSTATUS=up"]
    loop.close()


def test_a_daemon_under_systemd_tells_its_story_and_its_handlers_do_not(
    hive_of: Callable[..., Hive], shared_broker: Broker, manager: socket.socket
) -> None:
    hive = hive_of(shared_broker)
    hive.environment |= environment(manager, WATCHDOG_USEC="200000")
    alpha = hive.node("alpha")
    alpha.handler("env", "#!/bin/sh\nenv\n")
    alpha.start()
    said = set[str]()
    while (
        not {"WATCHDOG=1", f"STATUS=alpha is connected to localhost:{shared_broker.port}"} <= said
    ):
        said.add(heard(manager))
    assert "READY=1\nSTATUS=looking for the broker" in said
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
    while not heard(manager).startswith("RELOADING=1"):
        pass
    assert alpha.stop() == 0
    while heard(manager) != "STOPPING=1\nSTATUS=stopping":
        pass
