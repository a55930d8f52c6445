"""make demo: it shows what it says, each line can be typed, and nothing of it stays behind."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, eventually, missing

COLUMNS = 80
ENDINGS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
COMMAND = re.compile(r"^\$ (.*)$", re.M)


@dataclass(frozen=True)
class Checkout:
    """A copy of the project with a .venv that is the test's own Python, and an empty home."""

    path: Path
    home: Path
    temporary: Path

    @property
    def environment(self) -> dict[str, str]:
        """What would lead hive elsewhere, if anything asked it."""
        home = str(self.home)
        state = dict.fromkeys(("XDG_STATE_HOME", "XDG_RUNTIME_DIR", "STATE_DIRECTORY"), home)
        lost = {"HIVE_CONFIG": "/nowhere/hive.toml", "TMPDIR": str(self.temporary)}
        return {"HOME": home, **state, **lost, "PATH": os.environ["PATH"]}

    def start(self, *argv: str, **how: object) -> subprocess.Popen[str]:
        """As from a terminal: make and its children are one process group."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        options = {"start_new_session": True, **streams, **how}
        return subprocess.Popen(argv, cwd=self.path, env=self.environment, **options)  # type: ignore[call-overload,no-any-return]

    def make(self, *more: str) -> subprocess.Popen[str]:
        return self.start("make", "--no-print-directory", "demo", *more)

    def script(self, *more: str, **how: object) -> subprocess.Popen[str]:
        return self.start(sys.executable, "contrib/demo.py", *more, **how)

    @property
    def processes(self) -> str:
        """What runs of this checkout's programs."""
        found = subprocess.run(["ps", "-A", "-ww", "-o", "args="], capture_output=True, text=True)
        return "\n".join(line for line in found.stdout.splitlines() if str(self.path) in line)

    def check_empty(self) -> None:
        """Nothing is left: no process, no file, no socket."""
        eventually("its processes are gone", lambda: not self.processes)  # make does not wait
        assert not list(self.temporary.iterdir())
        assert not list(self.home.iterdir())
        compiled = self.path / "__pycache__"  # of hive.py, as in any checkout
        assert {file.parent for file in self.path.rglob("*.pyc")} <= {compiled}


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    path, home = tmp_path / "check out", tmp_path / "home"
    (path / "contrib").mkdir(parents=True)
    home.mkdir()
    for name in ("Makefile", "hive.py", "hive-cli", "contrib/demo.py"):
        shutil.copy(ROOT / name, path / name)
    python = path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (path / ".venv" / "ready").touch()
    temporary = Path(tempfile.mkdtemp(prefix="d ", dir="/tmp"))  # short, for the sockets
    made = Checkout(path, home, temporary)
    yield made
    for script in temporary.glob("*/end"):
        subprocess.run(["sh", script], check=False)
    shutil.rmtree(temporary)


@pytest.fixture(autouse=True)
def what_it_takes() -> None:
    for program in ("make", "ps"):
        if not shutil.which(program):
            missing(f"{program} is missing")


def finished(process: subprocess.Popen[str], code: int | None = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=2 * PATIENCE)
    assert code is None or process.returncode == code, (process.returncode, out, err)
    assert "Traceback" not in err, err
    return out, err


def check_story(out: str) -> None:
    """What a person was promised to see, in this order."""
    story = (
        r"alpha +online",
        r"beta +online +main",
        r"NODE +AGENTS +HANDLERS",
        r"beta +main +info",
        r"\$ .* --action info .*\nbeta runs ",
        r"\nI looked: all green\n",
        r"\[hive\] command from alpha to beta id=",
        r"\$ kill -9 ",
        r"all +alert +\w+ beta is lost",
        r"beta +offline",
        r"NOT ANSWERED +BY",
        r"\| beta runs ",
    )
    at = 0
    for words in story:
        found = re.search(words, out[at:])
        assert found, (words, out)
        at += found.end()
    assert max(map(len, out.splitlines())) <= COLUMNS
    assert "\033" not in out


def test_two_at_once_show_the_main_job_and_one_can_be_played_with(checkout: Checkout) -> None:
    began = time.monotonic()
    plain, kept = checkout.make(), checkout.make("KEEP=1")
    out, err = finished(plain)
    check_story(out)
    assert re.search(r"Done in \d+ s; all is ended and removed\.\n.* make demo KEEP=1\n$", out)
    assert not err
    out, err = finished(kept)
    check_story(out)
    assert not err
    assert time.monotonic() - began < 60
    (folder,) = checkout.temporary.iterdir()  # the other one is gone
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    check_each_line(checkout, COMMAND.findall(out))
    checkout.check_empty()


def check_each_line(checkout: Checkout, lines: list[str]) -> None:
    """Type again what was printed, from the first to the one that ends it."""
    enter, *played, entered, helped, ended = lines
    assert entered == enter

    def typed(line: str) -> str:
        said, complaint = finished(checkout.start("sh", "-c", f"{enter} && {{ {line}\n}}"))
        assert not complaint, (line, complaint)
        return said

    kill, status, show = (
        next(line for line in played if word in line) for word in ("kill ", " status ", " show ")
    )
    assert "online" in typed(status)
    typed(kill)  # so that the line that starts it again has something to do
    for line in [*played, helped]:
        if line == kill:
            eventually("beta is up", lambda: re.search(r"beta +online", typed(status)))
        typed(line)
    eventually("beta has answered again", lambda: typed(show).count("| beta runs ") > 1)
    typed(kill)
    typed("hive --config beta.toml daemon >>beta.log 2>&1 &")  # as people type it
    typed(ended)


def test_a_live_one_shows_three_nodes_one_in_trouble_until_ctrl_c(checkout: Checkout) -> None:
    process = checkout.script("--live")
    assert process.stdout
    said = [process.stdout.readline() for _ in range(7)]
    assert said[-1] == "Ctrl-C ends and removes all of it.\n"
    with urllib.request.urlopen(said[1].strip(), timeout=PATIENCE) as page:
        assert b"<title>hive</title>" in page.read()
    enter, status, log = COMMAND.findall("".join(said))

    def typed(line: str) -> str:
        return finished(checkout.start("sh", "-c", f"{enter} && {line}"))[0]

    trouble = (
        r"3 nodes: 2 online, 1 degraded(?s:.*)gamma: agent watch: .*backup every 20s is failing"
    )
    eventually(
        "gamma is in trouble", lambda: re.search(trouble, typed(status.removesuffix(" --watch")))
    )
    traffic = r"I looked: all green(?s:.*)gamma runs(?s:.*)gamma: backup failed"
    eventually("they speak", lambda: re.search(traffic, typed(log.removesuffix(" --follow"))))
    os.killpg(process.pid, signal.SIGINT)
    out, err = finished(process)
    assert (out, err) == ("\nAll is ended and removed.\n", "")
    checkout.check_empty()


def test_a_signal_at_any_moment_leaves_nothing(checkout: Checkout) -> None:
    chance = random.Random(4)
    began = time.monotonic()
    due = [(began + chance.uniform(0, 3), number) for number in 2 * ENDINGS]
    running = []
    for at, number in sorted(due):
        process = checkout.make() if number == signal.SIGINT else checkout.script()
        running.append((at, number, process))
    for at, number, process in running:
        assert process.stdout and process.stdout.readline()
        time.sleep(max(0, at - time.monotonic()))
        for _ in range(3):  # somebody is impatient
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
    for _, number, process in running:
        _, err = finished(process, None)
        assert "demo: interrupted; all is ended and removed\n" in err
        assert process.returncode in (128 + number, -number, 2)  # make has codes of its own
    checkout.check_empty()


def test_a_terminal_that_is_closed_leaves_nothing(checkout: Checkout) -> None:
    ours, theirs = os.openpty()
    process = checkout.script(
        stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=lambda: os.login_tty(theirs)
    )
    os.close(theirs)
    said = b""
    while b"2. Another" not in said:
        said += os.read(ours, 4096)
    assert b"\033[1m" in said
    os.close(ours)
    process.wait(PATIENCE)
    checkout.check_empty()


def test_a_reader_that_has_seen_enough_leaves_nothing(checkout: Checkout) -> None:
    process = checkout.make("KEEP=1")
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(PATIENCE) != 0
    assert "Traceback" not in process.stderr.read()
    checkout.check_empty()


def test_a_step_that_fails_is_one_line_and_leaves_nothing(checkout: Checkout) -> None:
    cli = checkout.path / "hive-cli"
    broken = 'import sys\nif "roster" in sys.argv: sys.exit("hive: broken on purpose")\n'
    cli.write_text(broken + cli.read_text())
    _, err = finished(checkout.script(), 1)
    command = "hive roster --config alpha.toml"
    assert err == f"demo: exit 1: {command}: hive: broken on purpose\n"
    checkout.check_empty()


def test_no_other_folder_is_ended(checkout: Checkout) -> None:
    _, err = finished(checkout.script("--end", str(checkout.home)), 1)
    assert err == f"demo: {checkout.home}: nothing was left running there\n"
    checkout.check_empty()
