"""Process: real children, from their first byte to the last of their group."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, Clock, run_until

import hive

Script = Callable[[str], list[str]]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Make an executable of a few lines of sh; the command that runs it."""

    def make(lines: str) -> list[str]:
        file = tmp_path / f"script{len(list(tmp_path.iterdir()))}"
        file.write_text(f"#!/bin/sh\n{lines}\n")
        file.chmod(0o755)
        return [str(file)]

    return make


@pytest.fixture
def lifeline(tmp_path: Path) -> Iterator[Lifeline]:
    line = Lifeline(tmp_path / "lifeline")
    yield line
    os.close(line.end)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds in earnest takes a moment here."""
    monkeypatch.setattr(hive, "SIGKILL_AFTER", 0.3)
    monkeypatch.setattr(hive, "OUTPUT_TIMEOUT", 0.3)


class Lifeline:
    """A pipe that a script and all its children hold: at its end all of them have ended."""

    def __init__(self, file: Path) -> None:
        os.mkfifo(file)
        self.end = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        self.hold = f"exec 9>'{file}'"
        self.ready = "echo ready >&9"
        self.count_ready = 0

    def is_ready(self, how_many: int = 1) -> bool:
        with contextlib.suppress(BlockingIOError):
            self.count_ready += os.read(self.end, 100).count(b"ready")
        return self.count_ready >= how_many

    def is_free(self) -> bool:
        try:
            return os.read(self.end, 100) == b""
        except BlockingIOError:
            return False


def run(
    loop: hive.Loop,
    children: hive.ChildProcesses,
    argv: list[str],
    stdin: bytes = b"",
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
) -> hive.ProcessResult:
    """Run a child to its end."""
    results: list[hive.ProcessResult] = []
    surroundings = os.environ if environment is None else environment
    children.start(hive.ProcessSpec(argv, surroundings, PATIENCE, stdin, cwd), results.append)
    assert results == [], "the result comes later, never from within start()"
    run_until(loop, "the result", lambda: results)
    loop.after(0, loop.stop)
    loop.run()
    assert len(results) == 1
    return results[0]


def test_the_time_of_a_child_begins_before_it_is_started(
    loop: hive.Loop, children: hive.ChildProcesses, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = subprocess.Popen.__init__

    def slowly(*how: Any, **more: Any) -> None:
        begin(*how, **more)
        time.sleep(0.3)  # so long that the child has ended

    monkeypatch.setattr(subprocess.Popen, "__init__", slowly)
    assert run(loop, children, script("exit 0")).seconds >= 0.3


def test_what_a_child_prints_is_in_its_result(
    loop: hive.Loop, children: hive.ChildProcesses, script: Script
) -> None:
    result = run(loop, children, script("echo answer; echo remark >&2"))
    assert (result.exit, result.stdout, result.stderr) == (0, b"answer\n", b"remark\n")
    assert result.ok and not result.truncated and not result.timed_out and not result.cancelled
    assert 0 < result.seconds < PATIENCE
    assert result.fault == ""


@pytest.mark.parametrize(
    ("lines", "exit"),
    [
        ("exit 0", 0),
        ("exit 3", 3),
        ("exit 255", 255),
        ("kill -USR1 $$", -signal.SIGUSR1),
        ("kill -KILL $$", -signal.SIGKILL),
    ],
)
def test_how_a_child_ended_is_told(
    loop: hive.Loop, children: hive.ChildProcesses, script: Script, lines: str, exit: int
) -> None:
    result = run(loop, children, script(lines))
    assert result.exit == exit
    assert result.ok == (exit == 0)
    assert result.stdout == b""


def test_a_child_runs_where_and_with_what_it_was_given(
    loop: hive.Loop, children: hive.ChildProcesses, tmp_path: Path
) -> None:
    (tmp_path / "here").write_text("found")
    result = run(
        loop,
        children,
        ["/bin/sh", "-c", 'cat here; echo "$GIVEN,$HOME"'],
        cwd=tmp_path,
        environment={"GIVEN": "yes", "PATH": os.environ["PATH"]},
    )
    assert result.stdout == b"foundyes,\n"


def test_a_child_gets_its_stdin_whole(
    loop: hive.Loop, children: hive.ChildProcesses, script: Script
) -> None:
    sent = os.urandom(256 * 1024)
    result = run(loop, children, script("exec cat"), stdin=sent)
    assert result.ok and result.stdout == sent and not result.truncated


def test_a_child_without_stdin_sees_its_end(
    loop: hive.Loop, children: hive.ChildProcesses, script: Script
) -> None:
    assert run(loop, children, script("wc -c")).stdout.strip() == b"0"


@pytest.mark.parametrize(
    "lines",
    [
        "echo done",
        "sleep 0.1; echo done",
        "exec <&-; sleep 0.1; echo done",
        "head -c 1 >/dev/null; echo done",
    ],
    ids=["ends at once", "never reads", "closes it", "reads a byte"],
)
def test_a_child_need_not_read_its_stdin(
    loop: hive.Loop, children: hive.ChildProcesses, script: Script, lines: str
) -> None:
    result = run(loop, children, script(lines), stdin=b"x" * 1024 * 1024)
    assert (result.exit, result.stdout) == (0, b"done\n")


def test_stdout_over_the_bound_is_cut_marked_and_read_to_its_end(
    loop: hive.Loop, children: hive.ChildProcesses, script: Script
) -> None:
    flood = script("head -c 20000000 /dev/zero | tr '\\0' 'x'; echo drained >&2; exit 3")
    result = run(loop, children, flood)
    assert result.stdout == b"x" * 256 * 1024
    assert result.truncated
    assert (result.exit, result.stderr) == (3, b"drained\n")


@pytest.mark.parametrize(("size", "truncated"), [(256 * 1024, False), (256 * 1024 + 1, True)])
def test_only_stdout_over_the_bound_is_marked(
    loop: hive.Loop, children: hive.ChildProcesses, script: Script, size: int, truncated: bool
) -> None:
    result = run(loop, children, script(f"head -c {size} /dev/zero"))
    assert result.truncated == truncated
    assert len(result.stdout) == 256 * 1024


def test_the_end_of_stderr_is_kept(
    loop: hive.Loop, children: hive.ChildProcesses, script: Script
) -> None:
    flood = script("head -c 1000000 /dev/zero | tr '\\0' 'x' >&2; echo the end >&2")
    result = run(loop, children, flood)
    assert result.stderr.endswith(b"xxx" + b"the end\n")
    assert len(result.stderr) == 8 * 1024


ONCE_STOPPED = "until ps -o stat= -p $$ | grep -q T; do :; done"


@pytest.mark.parametrize(
    ("lines", "exit"),
    [
        ("READY; sleep 60", -signal.SIGTERM),
        ("sleep 60 & READY; wait", -signal.SIGTERM),
        ("sleep 60 >/dev/null 2>&1 & READY; exec sleep 60", -signal.SIGTERM),
        ("trap '' TERM; READY; sleep 60; sleep 60", -signal.SIGKILL),
        ("trap '' TERM; sleep 60 & sleep 60 & READY; wait", -signal.SIGKILL),
        ("(trap '' TERM; READY; sleep 60) & exec sleep 60", -signal.SIGTERM),
        ("(trap '' TERM; READY; sleep 60) >/dev/null 2>&1 & exec sleep 60", -signal.SIGTERM),
        ("exec >&- 2>&-; READY; sleep 60", -signal.SIGTERM),
        (f"(kill -STOP $$; {ONCE_STOPPED}; READY) & wait", -signal.SIGKILL),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_a_deadline_ends_the_whole_process_group(
    loop: hive.Loop,
    children: hive.ChildProcesses,
    clock: Clock,
    script: Script,
    lifeline: Lifeline,
    lines: str,
    exit: int,
) -> None:
    results: list[hive.ProcessResult] = []
    argv = script(f"{lifeline.hold}; echo begun; {lines.replace('READY', lifeline.ready)}")
    children.start(hive.ProcessSpec(argv, os.environ, PATIENCE), results.append)
    run_until(loop, "it is ready", lifeline.is_ready)
    assert not results
    clock.skipped += PATIENCE
    run_until(loop, "the result", lambda: results)
    run_until(loop, "everyone has ended", lifeline.is_free)
    assert [(o.exit, o.timed_out, o.ok, o.stdout) for o in results] == [
        (exit, True, False, b"begun\n")
    ]


def test_a_child_may_tidy_up_before_sigkill(
    loop: hive.Loop,
    children: hive.ChildProcesses,
    clock: Clock,
    script: Script,
    lifeline: Lifeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hive, "SIGKILL_AFTER", PATIENCE)
    results: list[hive.ProcessResult] = []
    tidy = "trap 'sleep 0.2; echo tidy; exit 7' TERM"
    argv = script(f"{lifeline.hold}; {tidy}; {lifeline.ready}; sleep 60 & wait")
    children.start(hive.ProcessSpec(argv, os.environ, PATIENCE), results.append)
    run_until(loop, "it is ready", lifeline.is_ready)
    clock.skipped += PATIENCE
    run_until(loop, "the result", lambda: results)
    assert [(o.exit, o.timed_out, o.stdout) for o in results] == [(7, True, b"tidy\n")]


@pytest.mark.usefixtures("impatient")
def test_a_grandchild_that_holds_stdout_does_not_hold_up_the_result(
    loop: hive.Loop, children: hive.ChildProcesses, script: Script, lifeline: Lifeline
) -> None:
    began = time.monotonic()
    result = run(loop, children, script(f"{lifeline.hold}; echo held; sleep 60 & echo answer"))
    assert (result.exit, result.stdout, result.ok) == (0, b"held\nanswer\n", True)
    assert time.monotonic() - began < PATIENCE
    run_until(loop, "it has ended", lifeline.is_free)


def test_a_grandchild_that_lets_go_of_stdout_in_time_is_heard(
    loop: hive.Loop,
    children: hive.ChildProcesses,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hive, "OUTPUT_TIMEOUT", PATIENCE)
    result = run(loop, children, script("(sleep 0.2; echo late) & echo early"))
    assert (result.exit, result.stdout) == (0, b"early\nlate\n")
    assert result.seconds < PATIENCE


FUGITIVE = """
import os, sys, time
told, tell = os.pipe()
child = os.fork()
if child == 0:
    os.setsid()
    os.write(tell, b"gone")
    time.sleep(60)
    os._exit(0)
os.read(told, 4)
with open("numbers.new", "w") as file:
    print(os.getpid(), child, file=file)
os.rename("numbers.new", "numbers")
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("how", ["ends", "timed out", "stopped", "stopped after its end"])
@pytest.mark.usefixtures("impatient")
def test_a_grandchild_that_left_the_group_does_not_hold_up_the_result(
    loop: hive.Loop, children: hive.ChildProcesses, clock: Clock, tmp_path: Path, how: str
) -> None:
    before = sorted(os.listdir("/dev/fd"))
    results: list[hive.ProcessResult] = []
    argv = [sys.executable, "-c", FUGITIVE, "0" if "end" in how else "60"]
    child = children.start(
        hive.ProcessSpec(argv, os.environ, PATIENCE, cwd=tmp_path), results.append
    )
    assert child
    run_until(loop, "the grandchild has left", (tmp_path / "numbers").exists)
    parent, fugitive = map(int, (tmp_path / "numbers").read_text().split())
    try:
        if how == "stopped after its end":
            run_until(loop, "the parent has ended", lambda: not exists(parent))
        if "stopped" in how:
            assert not results
            child.stop()
        clock.skipped += PATIENCE if how == "timed out" else 0
        run_until(loop, "the result", lambda: results, patience=5.0)
        assert sorted(os.listdir("/dev/fd")) == before
    finally:
        os.kill(fugitive, signal.SIGKILL)
    assert [result.exit for result in results] == [0 if "end" in how else -signal.SIGTERM]


NO_PROGRAM = hive.NO_PROGRAM
NOT_LF = "its lines must end in LF, not CRLF"
BOM = "a byte order mark comes before its first line; save it as UTF-8 without one"


@pytest.mark.parametrize(
    ("content", "mode", "fault"),
    [
        ("echo no shebang\n", 0o755, NO_PROGRAM),
        ("", 0o755, NO_PROGRAM),
        ("#!/no/such\n", 0o755, "its first line names '/no/such', which is not there"),
        ("#!/bin/sh\n", 0o644, "not executable"),
        ("#!/bin/sh\r\n", 0o755, rf"its first line names '/bin/sh\r': {NOT_LF}"),
        ("#! /bin/sh -e\r\necho\r\n", 0o755, None),
        ("#!/etc/passwd\n", 0o755, "its first line names '/etc/passwd', which cannot be executed"),
        ("#!/\n", 0o755, "its first line names '/', which cannot be executed"),
        ("\ufeff#!/bin/sh\n", 0o755, BOM),
        ("#!\n", 0o755, NO_PROGRAM),
    ],
)
def test_a_file_that_cannot_be_run_is_told(
    loop: hive.Loop,
    children: hive.ChildProcesses,
    tmp_path: Path,
    content: str,
    mode: int,
    fault: str | None,
) -> None:
    file = tmp_path / "file"
    file.write_bytes(content.encode())
    file.chmod(mode)
    result = run(loop, children, [str(file)], stdin=b"x" * 1000)
    if fault is None:  # the program is there, and does not like what it is given
        assert NOT_LF in hive.first_line_fault(file) and result.exit
        return
    assert (result.exit, result.fault, result.ok) == (None, fault, False)
    assert not result.truncated and not result.timed_out and not result.cancelled
    assert (result.seconds, result.stdout, result.stderr) == (0.0, b"", b"")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("#!/bin/sh\n", ""),
        ("#!/usr/bin/env sh\n", ""),
        ("#!\t/usr/bin/env\tsh", ""),
        ("#!/usr/bin/env -S sh -e\n", ""),
        ("#!/usr/bin/env A=1\n", ""),
        ("#!/bin/sh nosuch\n", ""),
        ("#!/usr/bin/env nosuch\n", "its first line names 'nosuch', which is not on the PATH"),
        ("#!/usr/bin/env sh\r\n", rf"its first line names 'sh\r': {NOT_LF}"),
        ("\x7fELF\0", ""),
    ],
)
def test_what_a_first_line_tells(tmp_path: Path, content: str, fault: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(content.encode())
    assert hive.first_line_fault(file) == fault


def test_a_program_whose_loader_is_missing_is_not_said_to_be_missing(
    loop: hive.Loop, children: hive.ChildProcesses, tmp_path: Path
) -> None:
    program = Path("/bin/true").read_bytes()
    if b"/lib64/ld-linux" not in program:
        pytest.skip("needs a program of Linux with a loader")
    file = tmp_path / "file"
    file.write_bytes(program.replace(b"/lib64/ld-linux", b"/lib64/no-linux"))
    file.chmod(0o755)
    result = run(loop, children, [str(file)])
    assert result.fault == "made for another system: the loader that it names is not there"


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        (["/no/such/program"], "No such file or directory"),
        (["no-such-program-anywhere"], "No such file or directory"),
        (["/"], "Permission denied"),
        (["/bin/sh", "-c", "echo \0"], "embedded null byte"),
        (["/bin/echo", "\ud800"], "surrogates not allowed"),
        (["/bin/echo", "x" * 10_000_000], "Argument list too long"),
    ],
    ids=["missing", "not in PATH", "a directory", "NUL", "lone surrogate", "too long"],
)
def test_a_command_that_cannot_be_run_is_told(
    loop: hive.Loop, children: hive.ChildProcesses, argv: list[str], fault: str
) -> None:
    result = run(loop, children, argv, environment={"PATH": "/usr/bin:/bin"})
    assert result.exit is None and fault in result.fault
    assert len(children) == 0


def test_a_folder_that_is_missing_is_told(
    loop: hive.Loop, children: hive.ChildProcesses, tmp_path: Path
) -> None:
    result = run(loop, children, ["/bin/echo"], cwd=tmp_path / "missing")
    assert (result.exit, result.fault) == (None, f"no folder {tmp_path}/missing")


@pytest.mark.usefixtures("impatient")
def test_stopping_ends_every_child(
    loop: hive.Loop, children: hive.ChildProcesses, script: Script, lifeline: Lifeline
) -> None:
    results: list[hive.ProcessResult] = []
    for lines in ("READY; sleep 60", "trap '' TERM; READY; sleep 60"):
        argv = script(f"{lifeline.hold}; {lines.replace('READY', lifeline.ready)}")
        children.start(hive.ProcessSpec(argv, os.environ, PATIENCE), results.append)
    run_until(loop, "both are ready", lambda: lifeline.is_ready(2))
    children.stop()
    run_until(loop, "both results", lambda: len(results) == 2)
    run_until(loop, "everyone has ended", lifeline.is_free)
    assert [result.exit for result in results] == [-signal.SIGTERM, -signal.SIGKILL]
    assert all(o.cancelled and not o.timed_out and not o.ok for o in results)


STATES = {  # of a child at the moment when all are stopped
    "running": "READY; sleep 60",
    "deaf": "trap '' TERM; READY; sleep 60; sleep 60",
    "held": "sleep 60 & echo $$ >ended; READY",  # it has ended, and its child holds stdout
    "stopped": "trap '' TERM; READY; sleep 60; sleep 60",  # once already
    "overdue": "trap '' TERM; READY; sleep 60; sleep 60",
}
NAMES = [*STATES]


@pytest.mark.parametrize(
    "mix",
    [
        (),
        *((name,) for name in NAMES),
        *(tuple((NAMES * 2)[i : i + 3]) for i in range(len(NAMES))),
        *(("held", name, "running") for name in NAMES),
        *(tuple(random.Random(seed).choices(NAMES, k=20)) for seed in range(4)),
    ],
    ids=lambda mix: f"{len(mix)}-{'-'.join(mix[:3])}",
)
def test_stopping_ends_every_child_whatever_the_others_are_at(
    loop: hive.Loop,
    children: hive.ChildProcesses,
    clock: Clock,
    tmp_path: Path,
    lifeline: Lifeline,
    monkeypatch: pytest.MonkeyPatch,
    mix: tuple[str, ...],
) -> None:
    monkeypatch.setattr(hive, "SIGKILL_AFTER", 0.3)
    monkeypatch.setattr(hive, "OUTPUT_TIMEOUT", PATIENCE)
    ended: list[int] = []
    for i, state in enumerate(mix):
        (tmp_path / str(i)).mkdir()
        lines = STATES[state].replace("READY", lifeline.ready)
        argv = ["/bin/sh", "-c", f"{lifeline.hold}; {lines}"]
        deadline = 1.0 if state == "overdue" else 10 * PATIENCE
        spec = hive.ProcessSpec(argv, os.environ, deadline, cwd=tmp_path / str(i))
        child = children.start(spec, lambda result, i=i: ended.append(i))  # type: ignore[misc]
        run_until(loop, "it is ready", lambda i=i: lifeline.is_ready(i + 1))  # type: ignore[misc]
        if state == "stopped" and child:
            child.stop()
        if state == "held":
            number = int((tmp_path / str(i) / "ended").read_text())
            run_until(loop, "it has ended", lambda n=number: not exists(n))  # type: ignore[misc]
    clock.skipped += 1.0
    loop.after(0, children.stop)
    run_until(loop, "all have ended", lambda: len(ended) == len(mix), patience=5.0)
    assert sorted(ended) == [*range(len(mix))]
    assert not len(children)
    if mix:
        run_until(loop, "their children too", lifeline.is_free, patience=5.0)


def test_stopping_again_and_again_does_not_put_off_the_end(
    loop: hive.Loop,
    children: hive.ChildProcesses,
    clock: Clock,
    script: Script,
    lifeline: Lifeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hive, "SIGKILL_AFTER", PATIENCE)
    results: list[hive.ProcessResult] = []
    argv = script(f"{lifeline.hold}; trap '' TERM; {lifeline.ready}; sleep 60; sleep 60")
    children.start(hive.ProcessSpec(argv, os.environ, 10 * PATIENCE), results.append)
    run_until(loop, "it is ready", lifeline.is_ready)
    for _ in range(6):
        children.stop()
        clock.skipped += PATIENCE / 4
        loop.after(0, loop.stop)
        loop.run()
    run_until(loop, "the result", lambda: results, patience=5.0)
    assert [result.exit for result in results] == [-signal.SIGKILL]


def test_children_run_side_by_side(
    loop: hive.Loop, children: hive.ChildProcesses, tmp_path: Path, script: Script
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    results: list[bytes] = []

    def ended(result: hive.ProcessResult) -> None:
        results.append(result.stdout)

    reader = hive.ProcessSpec(script(f"cat '{gate}'"), os.environ, PATIENCE)
    writer = hive.ProcessSpec(script(f"echo met > '{gate}'; echo wrote"), os.environ, PATIENCE)
    children.start(reader, ended)
    children.start(writer, ended)
    assert len(children) == 2
    run_until(loop, "both have met", lambda: len(results) == 2)
    assert sorted(results) == [b"met\n", b"wrote\n"]


def test_a_hundred_children_leave_nothing_behind(
    loop: hive.Loop, children: hive.ChildProcesses, script: Script
) -> None:
    argv = script("echo $$; cat >/dev/null")
    run(loop, children, argv)
    before = sorted(os.listdir("/dev/fd"))
    numbers = [int(run(loop, children, argv, stdin=b"x").stdout) for _ in range(100)]
    assert len(set(numbers)) == 100
    assert sorted(os.listdir("/dev/fd")) == before
    assert len(children) == 0
    assert [number for number in numbers if exists(number)] == []


def test_a_hundred_children_at_once_are_all_noticed(
    loop: hive.Loop, children: hive.ChildProcesses, script: Script
) -> None:
    results: list[hive.ProcessResult] = []
    spec = hive.ProcessSpec(script("echo $$"), os.environ, PATIENCE)
    for _ in range(100):
        children.start(spec, results.append)
    run_until(loop, "all results", lambda: len(results) == 100)
    assert all(result.ok for result in results)
    assert [o for o in results if exists(int(o.stdout))] == []


def exists(number: int) -> bool:
    """Is there a process of this number, be it a zombie?"""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.usefixtures("impatient")
def test_what_is_late_already_is_not_called_stopped(
    loop: hive.Loop,
    children: hive.ChildProcesses,
    clock: Clock,
    script: Script,
    lifeline: Lifeline,
) -> None:
    results: list[hive.ProcessResult] = []
    argv = script(f"{lifeline.hold}; trap '' TERM; {lifeline.ready}; sleep 60; sleep 60")
    child = children.start(hive.ProcessSpec(argv, os.environ, PATIENCE), results.append)
    assert child
    run_until(loop, "it is ready", lifeline.is_ready)
    clock.skipped += PATIENCE
    loop.step()
    child.stop()
    run_until(loop, "the result", lambda: results)
    assert [(o.timed_out, o.cancelled, o.ok) for o in results] == [(True, False, False)]
    assert PATIENCE <= results[0].seconds < 2 * PATIENCE


def test_a_child_is_ended_at_once_where_there_is_no_time(
    loop: hive.Loop,
    children: hive.ChildProcesses,
    script: Script,
    lifeline: Lifeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hive, "SIGKILL_AFTER", PATIENCE)
    results: list[hive.ProcessResult] = []
    for _ in range(2):
        argv = script(f"{lifeline.hold}; trap '' TERM; {lifeline.ready}; sleep 60; sleep 60")
        children.start(hive.ProcessSpec(argv, os.environ, PATIENCE), results.append)
    run_until(loop, "both are ready", lambda: lifeline.is_ready(2))
    children.kill()
    run_until(loop, "both results", lambda: len(results) == 2, patience=5.0)
    run_until(loop, "everyone has ended", lifeline.is_free)
    assert [result.exit for result in results] == [-signal.SIGKILL] * 2


def go_on(loop: hive.Loop) -> None:
    """Let a loop do what is due and ready now, and no more."""
    loop.after(0, lambda: None)
    loop.step()


def test_a_child_has_two_seconds_between_sigterm_and_sigkill(
    loop: hive.Loop, children: hive.ChildProcesses, clock: Clock, script: Script, lifeline: Lifeline
) -> None:
    results: list[hive.ProcessResult] = []
    signals: list[int] = []
    clock.stopped = 1000.0
    argv = script(f"{lifeline.hold}; trap '' TERM; {lifeline.ready}; sleep 60; sleep 60")
    child = children.start(hive.ProcessSpec(argv, os.environ, PATIENCE), results.append)
    assert child
    run_until(loop, "it is ready", lifeline.is_ready)
    send = child._signal
    child._signal = lambda number: signals.append(number) or send(number)  # type: ignore[method-assign,func-returns-value]
    child.stop()
    for seconds, sent in ((1.99, [signal.SIGTERM]), (0.01, [signal.SIGTERM, signal.SIGKILL])):
        clock.skipped += seconds
        go_on(loop)
        assert signals == sent
    run_until(loop, "the result", lambda: results)
    assert not live_timers(loop)


Outlived = tuple[hive.ChildProcess, list[hive.ProcessResult]]


@pytest.fixture
def outlived(
    loop: hive.Loop, children: hive.ChildProcesses, clock: Clock, script: Script, lifeline: Lifeline
) -> Outlived:
    """A child that has just ended, while another holds its output; and what became of it."""
    results: list[hive.ProcessResult] = []
    clock.stopped = 1000.0
    argv = script(f"{lifeline.hold}; sleep 60 & {lifeline.ready}")
    child = children.start(hive.ProcessSpec(argv, os.environ, PATIENCE), results.append)
    assert child
    run_until(loop, "it has ended", lambda: child._ended)
    return child, results


def test_a_childs_output_may_be_held_for_a_second_after_its_end(
    loop: hive.Loop, clock: Clock, lifeline: Lifeline, outlived: Outlived
) -> None:
    _, results = outlived
    for seconds, done in ((0.99, 0), (0.01, 1)):
        clock.skipped += seconds
        go_on(loop)
        assert len(results) == done
    assert results[0].seconds == 1.0
    run_until(loop, "the other has ended", lifeline.is_free)
    assert not live_timers(loop)


def test_stopping_one_that_has_ended_waits_for_nobody(
    loop: hive.Loop, lifeline: Lifeline, outlived: Outlived
) -> None:
    child, results = outlived
    child.stop()
    assert not results, "never from within the call"
    go_on(loop)
    assert [(result.exit, result.cancelled) for result in results] == [(0, True)]
    run_until(loop, "the other has ended", lifeline.is_free)


def live_timers(loop: hive.Loop) -> list[hive.Timer]:
    return [timer for timer in loop._timers if timer.call]


@pytest.mark.parametrize("after", ["exec <&-;", "head -c 1 >/dev/null; exec <&-;"])
def test_what_a_child_does_not_read_is_not_offered_again(
    loop: hive.Loop, children: hive.ChildProcesses, script: Script, lifeline: Lifeline, after: str
) -> None:
    """A pipe that nobody reads is always ready, and would keep the daemon busy."""
    argv = script(f"{lifeline.hold}; {after} {lifeline.ready}; exec sleep 60")
    spec = hive.ProcessSpec(argv, os.environ, PATIENCE, b"x" * 1024 * 1024)
    child = children.start(spec, lambda result: None)
    assert child
    run_until(loop, "it is ready", lifeline.is_ready)
    run_until(loop, "its stdin is closed", lambda: child._popen.stdin and child._popen.stdin.closed)


# Why it does not start


def test_an_interpreter_may_lie_beside_the_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("#!here -x\n")
    assert hive.first_line_fault(file) == "its first line names 'here', which is not there"
    (tmp_path / "here").touch(0o755)
    assert hive.first_line_fault(file) == ""


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"\x7fELF\x02", ""),
        (b"MZ\x08\n", ""),
        (b"\x0e", ""),
        (b"text\twith\rmuch\x0c\n", hive.NO_PROGRAM),
        (b"#! \t \n", hive.NO_PROGRAM),
        (b"x" * 5000 + b"\0", hive.NO_PROGRAM),  # where it could be seen, nobody looks
    ],
)
def test_a_binary_is_known_by_its_first_line(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / "file").write_bytes(content)
    assert hive.first_line_fault(tmp_path / "file") == fault


def test_a_program_is_looked_for_as_the_system_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, mode in (("first", 0o644), ("second", 0o755), ("third", 0o755)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tool").touch(mode)
    (tmp_path / "first" / "third").mkdir()  # a folder of that name is none
    path = {"PATH": os.pathsep.join(str(tmp_path / one) for one in ("first", "second", "third"))}
    assert hive.program_file("tool", path) == tmp_path / "second" / "tool"
    assert hive.program_file("third", path) is hive.program_file("none", path) is None
    monkeypatch.chdir(tmp_path / "second")
    assert hive.program_file("tool", {"PATH": f"/nonexistent{os.pathsep}"}) == Path("tool")
    assert hive.program_file("./tool", {}) == Path("tool")
    assert hive.program_file("../second", {}) is hive.program_file("./none", {}) is None
    assert hive.program_file("sh", {}) == next(
        sh for place in os.defpath.split(os.pathsep) if (sh := Path(place, "sh")).exists()
    )


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOENT, "made for another system: the loader that it names is not there"),
        (errno.ENOEXEC, hive.NO_PROGRAM),
        (errno.EACCES, "Permission denied"),
        (errno.ENOMEM, "Cannot allocate memory"),
    ],
)
@pytest.mark.parametrize("readable", [True, False])
def test_what_a_file_does_not_tell_its_error_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str, readable: bool
) -> None:
    def look(file: Path) -> str:
        if not readable:
            raise PermissionError(errno.EACCES, "Permission denied")
        return ""

    monkeypatch.setattr(hive, "first_line_fault", look)
    file = tmp_path / "file"
    file.touch(0o755)
    error = OSError(number, os.strerror(number))
    spec = hive.ProcessSpec([str(file)], {}, 1.0, cwd=tmp_path)
    assert hive.start_fault(spec, error) == says
    missing = spec.replace(argv=[f"{file}.none"])
    at_all = hive.NO_PROGRAM if number == errno.ENOEXEC else os.strerror(number)
    assert hive.start_fault(missing, error) == at_all
    nowhere = spec.replace(cwd=tmp_path / "none")
    where = f"no folder {tmp_path}/none" if number == errno.ENOENT else says
    assert hive.start_fault(nowhere, error) == where
    assert hive.start_fault(spec, ValueError("embedded null byte")) == "embedded null byte"


def test_bounds_of_ones_own_are_kept(
    loop: hive.Loop, children: hive.ChildProcesses, script: Script
) -> None:
    results: list[hive.ProcessResult] = []
    argv = script("printf abcdef; printf uvwxyz >&2")
    spec = hive.ProcessSpec(argv, os.environ, PATIENCE, max_stdout=4, max_stderr=3)
    children.start(spec, results.append)
    run_until(loop, "the result", lambda: results)
    [result] = results
    assert (result.stdout, result.stderr, result.truncated) == (b"abcd", b"xyz", True)
