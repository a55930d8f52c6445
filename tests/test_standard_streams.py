"""Every command with a standard stream that is closed, full, or read by nobody any more."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import PATIENCE, Daemon, Hive, eventually

DONE = {  # the command, and what it ends with where nothing is the matter
    "send --to alpha --action echo --text hi --wait 20": 0,
    "send --to alpha --action nosuch --text hi --wait 20": 1,
    "send --to alpha --ch status --text hi --direct": 0,
    "send --to alpha --ch status --text -": 0,
    "status": 0,
    "status --json": 0,
    "status --direct": 0,
    "roster": 0,
    "log": 0,
    "pending": 0,
    "show nosuch": 1,
    "config": 0,
    "config --example": 0,
    "handler list": 0,
    "handler test echo": 0,
    "init --force --yes --no-agents": 0,
    "doctor": 0,
    "broker --mosquitto-conf": 0,
    "send --help": 0,
    "--help": 0,
    "--version": 0,
    "nosuch": 2,
    "send": 2,
}
SILENT = [line for line, code in DONE.items() if code]  # what prints nothing to stdout
ECHO = "#!/bin/sh\ncat\n"


@pytest.fixture
def node(hive: Hive) -> Daemon:
    node = hive.node("alpha")
    node.handler("echo", ECHO)
    return node.start()


EXECUTED = ("status", "send --help", "nosuch")  # the program itself; all else in a fork


def redirect(shell: str) -> None:
    """As the shell does."""
    for number, arrow, to in re.findall(r"(\d?)([<>])(\S+)", shell):
        fd = int(number or arrow == ">")
        if to == "&-":
            os.close(fd)
        else:
            os.dup2(os.open(to, os.O_WRONLY), fd)


def run(node: Daemon, line: str, shell: str, **streams: int) -> tuple[int, str, str]:
    """A command whose streams the shell has changed, as in `>&-`: its code, stdout, stderr."""
    words = [*node.hive.program, *line.split()]
    if not line.startswith("-"):
        words += ["--config", str(node.home / "new.toml" if "init" in line else node.config)]
    (node.home / "stdin").write_text("what is on stdin\n")
    with (node.home / "stdin").open() as stdin:
        how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        how |= {"stdin": stdin, "env": node.hive.environment, "timeout": 2 * PATIENCE}
        if forked.FORKS and line not in EXECUTED:
            done = forked.run(words, preexec_fn=partial(redirect, shell), **how)
        else:
            done = subprocess.run(["/bin/sh", "-c", f'exec "$@" {shell}', "sh", *words], **how)
    return done.returncode, (done.stdout or b"").decode(), (done.stderr or b"").decode()


def codes_of(node: Daemon, shell: str, lines: dict[str, int], **streams: int) -> dict[str, int]:
    """What each line ends with; no traceback, no complaint of Python's own."""
    codes = {}
    for line in lines:
        codes[line], _, said = run(node, line, shell, **streams)
        assert "Traceback" not in said and "Exception ignored" not in said, (line, said)
    return codes


@pytest.mark.parametrize("shell", ["", "<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_changes_no_exit_code(node: Daemon, shell: str) -> None:
    expected = DONE | ({"send --to alpha --ch status --text -": 2} if "<" in shell else {})
    assert codes_of(node, shell, DONE) == expected


def test_closed_stdin_is_said_where_it_was_to_be_read(node: Daemon) -> None:
    for line in (
        "send --to beta --text -",
        "reply --to-msg - --text x",
        "handler test echo --text -",
        "init --yes --password-file -",
    ):
        code, _, said = run(node, line, "<&-")
        assert code == 2 and said.startswith("hive: stdin: "), (line, code, said)
        assert len(said.splitlines()) == 1


def test_full_stdout_is_one_line_and_exit_1(node: Daemon) -> None:
    for line, code in DONE.items():
        got, _, said = run(node, line, ">/dev/full")
        if line in SILENT:
            assert got == code, (line, got, said)
        else:
            assert got == 1, (line, got, said)
            full = [row for row in said.splitlines() if "No space left on device" in row]
            assert len(full) == 1 and full[0].startswith("hive: "), (line, said)
        assert "Traceback" not in said and "Exception ignored" not in said, (line, said)


@pytest.mark.parametrize("shell", ["2>/dev/full"])
def test_full_stderr_changes_no_exit_code(node: Daemon, shell: str) -> None:
    assert codes_of(node, shell, DONE) == DONE


def test_a_reader_that_has_gone_ends_a_command_in_silence(node: Daemon) -> None:
    for line, code in DONE.items():
        reader, writer = os.pipe()
        os.close(reader)
        got, _, said = run(node, line, "", stdout=writer)
        os.close(writer)
        if line in SILENT:
            assert got == code, (line, got, said)
        else:
            assert got == 128 + signal.SIGPIPE, (line, got, said)
            assert "hive: " not in said or "warning" in said, (line, said)
        assert "Traceback" not in said and "Exception ignored" not in said, (line, said)


def test_a_reader_of_stderr_that_has_gone_changes_no_exit_code(node: Daemon) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert codes_of(node, "", DONE, stderr=writer) == DONE
    os.close(writer)


@pytest.mark.parametrize("shell", ["2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["daemon", "broker --socket={0}/s"])
def test_what_stays_runs_without_streams(
    hive: Hive, tmp_path: Path, command: str, shell: str
) -> None:
    """And nothing that it opens takes their place: a handler would write into the journal."""
    node = hive.node("alpha")
    node.handler("echo", ECHO)
    words = command.format(tmp_path).split()
    process = subprocess.Popen(
        [
            "/bin/sh",
            "-c",
            f'exec "$@" {shell}',
            "sh",
            *hive.program,
            *words,
            f"--config={node.config}",
        ],
        env=hive.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        if command == "daemon":
            eventually("it is up", lambda: node.statuses() == {"alpha": "online"})
            hive.cli("alpha", "status")
            said = hive.cli(
                "alpha", "send", "--to=alpha", "--action=echo", "--text=hi", "--wait=20"
            )
            assert '"text":"hi"' in said.stdout
        else:
            eventually("it listens", (tmp_path / "s").exists)
        if Path("/proc/self/fd").exists():
            held = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
            assert held == [os.devnull] * 3
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0
