"""Processes that begin in hive.main(), in a fork of this one, which has read hive.py already.

To start Python and to read hive.py are four fifths of the CPU of a short command, and a half of
that of a daemon's whole life in a test: they need not be paid thousands of times.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import IO, Any, NoReturn, TextIO

import hive

PROGRAM = str(Path(hive.__file__).with_name("hive-cli"))
FORKS = sys.platform == "linux"  # elsewhere the system's libraries do not outlive it
_execute = getattr(subprocess.Popen, "_execute_child")  # noqa: B009  no part of its stub
_NAMES = tuple(signature(_execute).parameters)[1:]


def spawn(
    line: Sequence[str | Path], main: Callable[[], int | None] | None = None, **how: Any
) -> subprocess.Popen[Any]:
    """As subprocess.Popen: what can be is not executed, but is a fork, which calls `main`.

    For [python, hive-cli, ...] and [python, "-c", code that imports hive, ...] that is known.
    """
    words = [os.fspath(word) for word in line]
    argv = words
    if main is None and words[:2] == [sys.executable, PROGRAM]:
        main, argv = hive.main, words[1:]
    elif main is None and words[:2] == [sys.executable, "-c"]:
        main, argv = partial(exec, words[2], {}), ["-c", *words[3:]]
    if main is None or not FORKS:
        return subprocess.Popen(words, **how)
    return _Forked(words, main, argv, **how)


def run(
    line: Sequence[str | Path],
    main: Callable[[], int | None] | None = None,
    *,
    input: Any = None,
    capture_output: bool = False,
    timeout: float | None = None,
    **how: Any,
) -> subprocess.CompletedProcess[Any]:
    """As subprocess.run, of what is spawned."""
    if capture_output:
        how |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        how["stdin"] = subprocess.PIPE
    with spawn(line, main, **how) as process:
        try:
            out, err = process.communicate(input, timeout)
        finally:
            process.kill()  # it has ended, unless that took too long
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class _Forked(subprocess.Popen[Any]):
    """Its arguments, environment, folder, descriptors, signals and exit code are its own.

    What ps shows of it is not.
    """

    def __init__(
        self, line: list[str], main: Callable[[], int | None], argv: list[str], **how: Any
    ) -> None:
        self._main, self._argv = main, argv
        super().__init__(line, **how)

    def _execute_child(self, *given: Any) -> None:
        how = dict(zip(_NAMES, given, strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # what other threads hold
            self.pid = os.fork()
        if not self.pid:
            sys.orig_argv, sys.argv = how["args"], self._argv
            _live(self._main, how)
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(how[end] for end in ends))  # type: ignore[attr-defined]


def _live(main: Callable[[], int | None], how: dict[str, Any]) -> NoReturn:
    """All of the child's life."""
    code = 1  # as after a traceback
    try:
        _begin(how)
        code = main() or 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else ended.code is not None
        if not isinstance(ended.code, int | None):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(_end() or code & 0xFF)


def _end() -> int:
    """What Python does when it ends; 120 where it could not."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except BaseException as error:
        print(f"Exception ignored: {error!r}", file=sys.stderr)
        return 120
    return 0


def _begin(how: dict[str, Any]) -> None:
    """Become what a program is when it begins."""
    gc.freeze()
    atexit._clear()
    threading._threading_atexits.clear()  # type: ignore[attr-defined]
    signal.set_wakeup_fd(-1)
    for one in signal.valid_signals() - {signal.SIGINT}:
        if callable(signal.getsignal(one)):
            signal.signal(one, signal.SIG_DFL)
    for number, end in enumerate(("p2cread", "c2pwrite", "errwrite")):
        if how[end] != -1:
            os.dup2(how[end], number)
    os.closerange(3, 1 << 20)
    if how["preexec_fn"]:
        how["preexec_fn"]()
    if how["cwd"]:
        os.chdir(how["cwd"])
    if how["start_new_session"]:
        os.setsid()
    if how["env"] is not None:
        os.environ.clear()
        os.environ.update(how["env"])
        time.tzset()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = _stream(number, getattr(sys, f"__{name}__"))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _stream(number: int, like: TextIO) -> IO[str] | None:
    """A standard stream as Python opens it; None if it is closed."""
    try:
        os.fstat(number)
    except OSError:
        return None
    mode, buffering = ("w" if number else "r"), (1 if number == 2 else -1)
    return open(number, mode, buffering, like.encoding, like.errors, "\n", closefd=False)
