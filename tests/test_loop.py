"""Loop: files, timers, signals and other threads, on a real selector."""

from __future__ import annotations

import io
import json
import os
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from conftest import PATIENCE

import hive


@pytest.fixture
def loop(log: io.StringIO) -> Iterator[hive.Loop]:
    loop = hive.Loop(hive.Log("debug", "json", log))
    loop.after(PATIENCE, lambda: pytest.fail("the loop waits for something that never comes"))
    yield loop
    loop.close()


@pytest.fixture
def pair() -> Iterator[Callable[[], tuple[socket.socket, socket.socket]]]:
    """Make socket pairs; they are closed when the test ends."""
    made: list[socket.socket] = []

    def make() -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        made.extend((ours, theirs))
        return ours, theirs

    yield make
    for one in made:
        one.close()


@pytest.fixture
def wakeups(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """How often a selector was asked, and for how long it was allowed to sleep."""
    asked: list[float | None] = []

    class Counting(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> Any:
            asked.append(timeout)
            return super().select(timeout)

    monkeypatch.setattr(selectors, "DefaultSelector", Counting)
    return asked


def events(log: io.StringIO, event: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in log.getvalue().splitlines()]
    return [row for row in rows if row["event"] == event]


def nothing() -> None:
    pass


def broken() -> None:
    raise ZeroDivisionError("a broken callback")


def test_timers_come_in_the_order_in_which_they_are_due() -> None:
    now, came = [100.0], list[str]()
    loop = hive.Loop(hive.Log(), clock=lambda: now[0])
    for delay, name in ((3, "third"), (1, "first"), (2, "second"), (1, "first too"), (9, "later")):
        loop.after(delay, partial(came.append, name))
    now[0] += 3
    loop.step()
    loop.close()
    assert came == ["first", "first too", "second", "third"]


def test_a_timer_does_not_come_before_it_is_due() -> None:
    now, came = [100.0], list[str]()
    loop = hive.Loop(hive.Log(), clock=lambda: now[0])
    loop.after(5, lambda: came.append("due"))
    now[0] += 4.9
    loop.post(nothing)
    loop.step()
    assert came == []
    now[0] += 0.1
    loop.step()
    loop.close()
    assert came == ["due"]


def test_a_cancelled_timer_does_not_come(loop: hive.Loop) -> None:
    came: list[str] = []
    loop.after(0, lambda: came.append("cancelled")).cancel()
    second = loop.after(0.01, lambda: came.append("cancelled by the first"))
    loop.after(0, second.cancel)
    loop.after(0.02, loop.stop)
    loop.run()
    assert came == []


def test_after_0_runs_at_the_end_of_the_same_step(loop: hive.Loop) -> None:
    came: list[str] = []

    def first() -> None:
        loop.after(0, lambda: came.append("end of the step"))
        came.append("first")

    loop.post(first)
    loop.post(lambda: came.append("second"))
    loop.step()
    assert came == ["first", "second", "end of the step"]


def test_a_call_from_another_thread_wakes_a_sleeping_loop(loop: hive.Loop) -> None:
    came: list[int] = []

    def call() -> None:
        came.append(threading.get_ident())
        loop.stop()

    thread = threading.Thread(target=lambda: loop.post(call))
    loop.after(0, thread.start)
    loop.run()
    thread.join()
    assert came == [threading.get_ident()]


def test_a_call_that_comes_too_late_is_no_fault_of_its_thread(log: io.StringIO) -> None:
    loop = hive.Loop(hive.Log(stream=log))
    writer = os.dup(loop._wake_writer.fileno())
    os.close(loop._wake_writer.fileno())  # as close() does, while another thread is about to write
    loop.post(nothing)
    os.dup2(writer, loop._wake_writer.fileno())
    os.close(writer)
    loop.close()
    loop.post(nothing)


def test_no_call_of_many_threads_is_lost(loop: hive.Loop) -> None:
    came: list[int] = []

    def post_many() -> None:
        for _ in range(1000):
            loop.post(lambda: came.append(1))

    threads = [threading.Thread(target=post_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(came) < 4000:
        loop.step()
    for thread in threads:
        thread.join()
    assert len(came) == 4000


def test_a_signal_arrives_as_a_call_in_the_next_step(loop: hive.Loop) -> None:
    came: list[str] = []
    loop.on_signal(signal.SIGUSR1, lambda: came.append("one"))
    loop.on_signal(signal.SIGUSR2, lambda: came.append("two"))
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert came == []
    while len(came) < 2:
        loop.step()
    assert sorted(came) == ["one", "two"]


def test_a_signal_wakes_a_sleeping_loop(loop: hive.Loop) -> None:
    loop.on_signal(signal.SIGALRM, loop.stop)
    before = signal.setitimer(signal.ITIMER_REAL, 0.02)
    loop.run()
    signal.setitimer(signal.ITIMER_REAL, *before)


def test_a_signal_is_not_lost_when_many_calls_wait(loop: hive.Loop) -> None:
    came: list[str] = []
    loop.on_signal(signal.SIGUSR1, lambda: came.append("signal"))
    for _ in range(5000):
        loop.post(nothing)
    os.kill(os.getpid(), signal.SIGUSR1)
    for _ in range(20):
        loop.post(nothing)
        loop.step()
    assert came == ["signal"]


def test_closing_gives_signals_back(log: io.StringIO) -> None:
    def ours(number: int, frame: object) -> None:
        pass

    before = signal.signal(signal.SIGUSR1, ours)
    loop = hive.Loop(hive.Log(stream=log))
    loop.on_signal(signal.SIGUSR1, nothing)
    loop.on_signal(signal.SIGUSR1, nothing)  # replaced: still ours comes back
    assert signal.getsignal(signal.SIGUSR1) is not ours
    loop.close()
    assert signal.getsignal(signal.SIGUSR1) is ours
    assert signal.set_wakeup_fd(-1) == -1
    signal.signal(signal.SIGUSR1, before)


def test_closing_gives_files_back(log: io.StringIO) -> None:
    before = sorted(os.listdir("/dev/fd"))
    loops = [hive.Loop(hive.Log(stream=log)) for _ in range(10)]
    for loop in loops:  # closed, not only forgotten
        loop.close()
    assert sorted(os.listdir("/dev/fd")) == before


def test_a_broken_call_is_logged_and_does_not_stop_the_others(
    loop: hive.Loop, log: io.StringIO
) -> None:
    came: list[str] = []
    loop.post(broken)
    loop.post(lambda: came.append("posted"))
    loop.after(0, broken)
    loop.after(0, lambda: came.append("timer"))
    loop.step()
    assert came == ["posted", "timer"]
    bugs = events(log, "bug")
    assert [bug["what"] for bug in bugs] == ["ZeroDivisionError('a broken callback')"] * 2
    assert all(bug["level"] == "error" and bug["at"].startswith("test_loop.py:") for bug in bugs)


def test_a_broken_file_call_is_logged_and_does_not_stop_the_others(
    loop: hive.Loop,
    log: io.StringIO,
    pair: Callable[[], tuple[socket.socket, socket.socket]],
) -> None:
    came: list[int] = []
    for i in range(2):
        ours, theirs = pair()
        loop.watch(ours, selectors.EVENT_READ, lambda events: broken())
        theirs.send(b"x")
        ours, theirs = pair()
        loop.watch(ours, selectors.EVENT_READ, lambda events, i=i: came.append(i))  # type: ignore[misc]
        theirs.send(b"x")
    loop.step()
    assert sorted(came) == [0, 1]
    assert len(events(log, "bug")) == 2


@pytest.mark.parametrize("how", ["posted", "timer", "signal"])
def test_a_fault_for_the_user_leaves_the_loop(loop: hive.Loop, how: str) -> None:
    def fail() -> None:
        raise hive.BrokerError("the name is taken")

    match how:
        case "posted":
            loop.post(fail)
        case "timer":
            loop.after(0, fail)
        case _:
            loop.on_signal(signal.SIGUSR1, fail)
            os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(hive.BrokerError, match="the name is taken"):
        loop.run()


def test_a_file_is_called_when_it_is_ready_and_told_for_what(
    loop: hive.Loop, pair: Callable[[], tuple[socket.socket, socket.socket]]
) -> None:
    came: list[int] = []
    ours, theirs = pair()
    loop.watch(ours, selectors.EVENT_READ, came.append)
    loop.post(nothing)
    loop.step()
    assert came == []
    theirs.send(b"x")
    loop.step()
    assert came == [selectors.EVENT_READ]
    loop.watch(ours, selectors.EVENT_WRITE, came.append)  # replaces
    loop.step()
    assert came == [selectors.EVENT_READ, selectors.EVENT_WRITE]
    loop.forget(ours)
    loop.forget(ours)
    loop.post(nothing)
    loop.step()
    assert len(came) == 2


def test_a_file_forgotten_in_the_same_step_is_not_called(
    loop: hive.Loop, pair: Callable[[], tuple[socket.socket, socket.socket]]
) -> None:
    came: list[str] = []
    (one, to_one), (two, to_two) = pair(), pair()

    def call(name: str, other: socket.socket) -> Callable[[int], None]:
        def called(events: int) -> None:
            came.append(name)
            loop.forget(other)
            other.close()

        return called

    loop.watch(one, selectors.EVENT_READ, call("one", two))
    loop.watch(two, selectors.EVENT_READ, call("two", one))
    to_one.send(b"x")
    to_two.send(b"x")
    loop.step()
    assert len(came) == 1


def test_a_file_that_takes_over_a_number_in_the_same_step_is_not_called(
    loop: hive.Loop, pair: Callable[[], tuple[socket.socket, socket.socket]]
) -> None:
    called: list[str] = []
    (one, to_one), (two, to_two) = pair(), pair()
    numbers: list[tuple[int, int]] = []

    def replace(other: socket.socket) -> None:
        called.append("old")
        before = other.fileno()
        loop.forget(other)
        other.close()
        fresh, _ = pair()
        numbers.append((before, fresh.fileno()))
        loop.watch(fresh, selectors.EVENT_READ, lambda events: called.append("fresh"))

    loop.watch(one, selectors.EVENT_READ, lambda events: replace(two))
    loop.watch(two, selectors.EVENT_READ, lambda events: replace(one))
    to_one.send(b"x")
    to_two.send(b"x")
    loop.step()
    assert called == ["old"]
    assert numbers[0][0] == numbers[0][1], "the number was not taken over: nothing was tested"


def test_an_idle_loop_sleeps(
    wakeups: list[float | None],
    log: io.StringIO,
    pair: Callable[[], tuple[socket.socket, socket.socket]],
) -> None:
    loop = hive.Loop(hive.Log(stream=log))
    ours, _ = pair()
    loop.watch(ours, selectors.EVENT_READ, lambda events: None)
    loop.on_signal(signal.SIGUSR1, nothing)
    for _ in range(100):
        loop.after(0.01, nothing).cancel()
    loop.after(0.2, loop.stop)
    loop.run()
    loop.close()
    assert len(wakeups) <= 2


def test_a_loop_that_was_woken_sleeps_again(wakeups: list[float | None], log: io.StringIO) -> None:
    loop = hive.Loop(hive.Log(stream=log))
    loop.post(nothing)
    loop.on_signal(signal.SIGUSR1, nothing)
    os.kill(os.getpid(), signal.SIGUSR1)
    loop.after(0.05, loop.stop)
    loop.run()
    loop.close()
    assert len(wakeups) <= 3


def test_a_loop_that_has_no_signals_leaves_those_of_another_alone(log: io.StringIO) -> None:
    theirs, ours = (hive.Loop(hive.Log(stream=log)) for _ in range(2))
    theirs.on_signal(signal.SIGUSR1, theirs.stop)
    ours.close()
    os.kill(os.getpid(), signal.SIGUSR1)
    theirs.after(PATIENCE, lambda: pytest.fail("the signal does not wake it"))
    theirs.run()
    theirs.close()


def test_of_a_long_traceback_the_end_is_logged(loop: hive.Loop, log: io.StringIO) -> None:
    def fail() -> None:
        raise ZeroDivisionError("x" * 1000 + " the end")

    loop.post(fail)
    loop.step()
    (bug,) = events(log, "bug")
    assert bug["traceback"].endswith("x the end\n")
    assert len(bug["traceback"]) <= hive.MAX_LOGGED


def test_a_loop_without_timers_sleeps_until_something_comes(
    wakeups: list[float | None], log: io.StringIO
) -> None:
    loop = hive.Loop(hive.Log(stream=log))
    thread = threading.Timer(0.1, lambda: loop.post(loop.stop))
    thread.start()
    loop.run()
    thread.join()
    loop.close()
    assert wakeups == [None]


def test_more_signals_than_there_is_room_for_are_no_noise(
    loop: hive.Loop, capfd: pytest.CaptureFixture[str]
) -> None:
    came: list[int] = []
    loop.on_signal(signal.SIGUSR1, lambda: came.append(1))
    for _ in range(5000):
        signal.raise_signal(signal.SIGUSR1)
    while not came:
        loop.step()
    assert capfd.readouterr().err == ""
