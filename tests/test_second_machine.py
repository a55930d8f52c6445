"""The README's chapter "A second machine", typed line by line: three machines, from nothing.

Where root runs this on Linux, each machine is a network namespace with an ordinary user of its
own; else it is an address of loopback.  Each has an empty home and python3, and nothing else.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, eventually, find_program, need_mosquitto
from test_dist import build

import hive

README = (ROOT / "README.md").read_text()
CHAPTER = README.partition("## A second machine")[2].partition("\n## ")[0]
HOSTING, JOINING = (
    [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
    for block in re.findall(r"```console\n(.*?)```", CHAPTER, re.S)
)
ADDRESS, LINE = "192.168.1.5", "hive1.eyJ…"  # what stands there for what each reader has


class Box:
    """One machine: where its commands run, as whom, with which address."""

    def __init__(self, place: Path, name: str, address: str, inside: list[str]) -> None:
        self.name, self.address, self._inside = name, address, inside
        self.home = place / name
        self.home.mkdir(mode=0o700)
        self.started: list[subprocess.Popen[bytes]] = []
        path = f"{place}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        program = find_program("mosquitto")
        if program:
            path += f":{Path(program).parent}"
        self._environment = ["env", "-i", f"HOME={self.home}", f"PATH={path}"]

    def command(self, line: str) -> list[str]:
        return [*self._inside, *self._environment, "sh", "-c", line]

    def type(self, line: str, code: int = 0) -> str:
        """What the line prints."""
        done = subprocess.run(
            self.command(line), cwd=self.home, capture_output=True, text=True, timeout=2 * PATIENCE
        )
        assert done.returncode == code, (line, done.returncode, done.stdout, done.stderr)
        return done.stdout

    def start(self, line: str) -> None:
        """Type it, and let it run."""
        with (self.home / "log").open("wb") as log:
            here = self.command(f"exec {line}")
            self.started.append(subprocess.Popen(here, cwd=self.home, stdout=log, stderr=log))

    def end(self) -> None:
        for one in self.started:
            one.terminate()
        for one in self.started:
            one.wait(PATIENCE)


def fit_python(place: Path, inside: list[str]) -> Path:
    """A Python that an ordinary user may run."""
    for python in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin")):
        check = "import sys, ssl, sqlite3, tomllib"
        if (
            python
            and not subprocess.run(
                [*inside, python, "-I", "-c", check], capture_output=True, cwd="/"
            ).returncode
        ):
            return Path(python)
    raise AssertionError("no Python 3.11 is here that other users may run")


def in_namespaces() -> bool:
    """May we make some here?"""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("setpriv")):
        return False
    name = f"hive-try-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    subprocess.run(["ip", "netns", "del", name], check=True)
    return True


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Box]]:
    need_mosquitto()
    place = Path(tempfile.mkdtemp(prefix="hive-boxes-"))  # where other users may go, too
    place.chmod(0o755)
    names = ("alpha", "mini", "nas")
    spaces = [f"hive{os.getpid()}-{name}" for name in names] if in_namespaces() else []
    made: list[Box] = []
    try:
        for number, name in enumerate(names):
            if spaces:
                ip("netns", "add", spaces[number])
                ip("-n", spaces[number], "link", "set", "lo", "up")
                if number:
                    join_with_cable(spaces[0], spaces[number], number)
            user = str(61000 + number)
            who = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--"]
            inside = ["ip", "netns", "exec", spaces[number], *who] if spaces else []
            at = f"10.77.0.{number + 1}" if spaces else f"127.0.0.{number + 2}"
            made.append(Box(place, name, at, inside))
            if spaces:
                os.chown(made[-1].home, int(user), int(user))
        (place / "bin").mkdir()
        (place / "bin" / "python3").symlink_to(fit_python(place, made[0]._inside))
        shutil.copy(build(tmp_path_factory.mktemp("dist") / "checkout"), place / "bin" / "hive")
        for one in ("bin", "bin/hive"):
            (place / one).chmod(0o755)
        yield made
    finally:
        for box in made:
            box.end()
        end_service(place / "alpha")
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space])
        shutil.rmtree(place)


def join_with_cable(first: str, other: str, number: int) -> None:
    """A link between two machines, each with its address."""
    ends = (f"h{os.getpid()}a{number}", f"h{os.getpid()}b{number}")
    ip("link", "add", ends[0], "netns", first, "type", "veth", "peer", ends[1], "netns", other)
    addresses = ("10.77.0.1", f"10.77.0.{number + 1}")
    for space, end, own, far in zip((first, other), ends, addresses, addresses[::-1], strict=True):
        ip("-n", space, "address", "add", f"{own}/32", "dev", end)
        ip("-n", space, "link", "set", end, "up")
        ip("-n", space, "route", "add", f"{far}/32", "dev", end)


def end_service(home: Path) -> None:
    for lock in home.glob(".local/state/hive/*/mosquitto/service.lock"):
        if hive.is_locked(lock):
            hive.end_process(int(lock.read_text()), lock)


def test_three_machines_are_a_hive(boxes: list[Box]) -> None:
    """At most two commands on the first, one on each next, besides copying and the daemon."""
    alpha, *others = boxes
    assert len(HOSTING) == 2 and len(JOINING) == 3
    host, invite = HOSTING
    said = alpha.type(host.replace(ADDRESS, alpha.address))
    assert f"Mosquitto listens at {alpha.address}:8883" in said and "fail" not in said
    alpha.start("hive daemon")
    for box in others:
        copy, join, daemon = (line.replace("mini", box.name) for line in JOINING)
        line = alpha.type(invite.replace("mini", box.name)).strip()
        source, target = shlex.split(copy)[1:]
        assert (source, target) == ("dist/hive", f"{box.name}:")
        shutil.copy(Path(alpha.home.parent, "bin", "hive"), box.home / "hive")
        joined = box.type(join.replace(LINE, line))
        assert f"broker {alpha.address}:8883" in joined and "fail" not in joined
        assert f"lets us in as {box.name}" in joined
        box.start(daemon)
    names = [hive.short_host_name(), "mini", "nas"]
    expected = sorted(f"{name} online" for name in names)

    def seen(box: Box) -> list[str]:
        program = "hive" if box is alpha else "python3 hive"
        lines = box.type(f"{program} status").splitlines()
        words = [line.split()[:2] for line in lines]
        return sorted(" ".join(one) for one in words if one and one[0] in names)

    def sees_all(box: Box) -> bool:
        return seen(box) == expected

    for box in boxes:
        eventually(f"{box.name} sees all", partial(sees_all, box))
    sent = others[0].type("python3 hive send --to nas --ch status --text hello")
    assert " -> hive/nas/status/mini" in sent
    eventually("it arrives", lambda: "hello" in others[1].type("python3 hive log --from mini"))
    alpha.type("hive expel nas")
    eventually("it is out", lambda: "nas online" not in seen(alpha))
    others[1].type("python3 hive status --direct", code=3)
    doctor = others[0].type("python3 hive doctor")
    assert "fail" not in doctor
