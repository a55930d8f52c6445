"""make dist: one file that runs where nothing is installed, and is the same whoever builds it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from importlib.util import MAGIC_NUMBER
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, Broker, eventually

BARE = [sys.executable, "-I", "-S"]  # a Python that has its standard library and nothing else
WAYS = (
    "either python3 -m pip install 'paho-mqtt>=2' in a virtual environment (in a checkout: make"
    " venv), or the system's python3-paho-mqtt where that is 2, or dist/hive, one file with paho"
    " inside (in a checkout: make dist)"
)


def build(folder: Path, umask: int = 0o022) -> Path:
    """Build it in a copy of the checkout."""
    (folder / "contrib").mkdir(parents=True)
    shutil.copy(ROOT / "hive.py", folder)
    shutil.copy(ROOT / "contrib" / "dist.py", folder / "contrib")
    shutil.copytree(ROOT / "contrib" / "help", folder / "contrib" / "help")
    subprocess.run(
        [sys.executable, "contrib/dist.py"],
        cwd=folder,
        check=True,
        capture_output=True,
        umask=umask,
        timeout=PATIENCE,
    )
    return folder / "dist" / "hive"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("dist") / "checkout")


def run(
    *command: str | Path, home: Path, python: list[str] = BARE, **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*python, *command],
        cwd=home,
        env={"HOME": str(home), "PATH": os.environ["PATH"], **more},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_two_builds_are_the_same_bytes(dist: Path, tmp_path: Path) -> None:
    again = build(tmp_path / "elsewhere" / "with a space", umask=0o077)
    assert again.read_bytes() == dist.read_bytes()
    assert stat.S_IMODE(again.stat().st_mode) == 0o755
    with zipfile.ZipFile(again) as archive:
        assert {entry.date_time[0] for entry in archive.infolist()} == {1980}


def test_it_holds_what_is_needed_and_the_licences_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(dist) as archive:
        names = set(archive.namelist())
        assert archive.read("hive.py") == (ROOT / "hive.py").read_bytes()
        licence = next(name for name in names if name.endswith("epl-v20"))
        assert b"Eclipse Public License" in archive.read(licence)
    assert len([name for name in names if "dist-info/" in name]) == 3
    code = {name for name in names if "dist-info/" not in name}
    assert {name.partition("/")[0] for name in code} == {
        "__main__.py",
        "hive.py",
        "hive.pyc",
        "help",
        "paho",
    }
    assert {"paho/mqtt/client.py", "paho/mqtt/properties.py"} <= code
    assert not {"paho/mqtt/publish.py", "paho/mqtt/subscribe.py"} & code


def test_its_version_is_that_of_the_plain_file(dist: Path, tmp_path: Path) -> None:
    plain = run(ROOT / "hive.py", "--version", home=tmp_path)
    whole = run(dist, "--version", home=tmp_path)
    assert re.fullmatch(r"hive \S+ \([0-9a-f]{8}\)\n", whole.stdout)
    assert (whole.stdout, whole.stderr) == (plain.stdout, "")
    assert run(dist, "--version", home=tmp_path, python=[]).stdout == plain.stdout


def test_handlers_are_looked_for_beside_it(dist: Path, tmp_path: Path) -> None:
    copy = tmp_path / "here" / "hive"
    copy.parent.mkdir()
    shutil.copy(dist, copy)
    found = run(copy, "config", home=tmp_path).stdout
    assert f'handler_dir = "{copy.parent.resolve()}/hive-daemon.d"' in found


def test_a_daemon_and_its_commands_run_where_nothing_is_installed(
    dist: Path, tmp_path: Path, shared_broker: Broker
) -> None:
    node = tmp_path / "hive"
    shutil.copy(dist, node)
    handler = tmp_path / "hive-daemon.d" / "ping"
    handler.parent.mkdir(mode=0o700)
    handler.write_text("#!/bin/sh\necho pong\n")
    handler.chmod(0o755)
    where = ("--node", "mini", "--port", str(shared_broker.port), "--prefix", f"dist{time.time()}")
    with (tmp_path / "log").open("wb") as log:
        daemon = subprocess.Popen(
            [*BARE, node, "daemon", *where],
            cwd=tmp_path,
            stderr=log,
            env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        )
    try:
        eventually("it is up", lambda: b"connected" in (tmp_path / "log").read_bytes())
        asked = ("send", "--to", "mini", "--action", "ping", "--text", "x", "--wait", "20")
        answer = run(node, *where, *asked, home=tmp_path)
        assert (answer.stdout, answer.stderr) == ("pong\n", "")
        assert "mini" in run(node, *where, "status", home=tmp_path).stdout
    finally:
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE) == 0


def test_another_version_of_python_takes_the_sources(dist: Path, tmp_path: Path) -> None:
    """It finds compiled files there that are not for it."""
    other = tmp_path / "hive"
    with zipfile.ZipFile(dist) as archive, zipfile.ZipFile(other, "w") as made:
        for entry in archive.infolist():
            content = archive.read(entry)
            if entry.filename.endswith(".pyc"):
                assert content.startswith(MAGIC_NUMBER)
                content = b"\0\0\r\n" + content[4:]
            made.writestr(entry, content)
    expected = run(dist, "--version", home=tmp_path).stdout
    done = run(other, "--version", home=tmp_path)
    assert (done.stdout, done.stderr) == (expected, "")
    unreachable = run(other, "status", "--port", "1", home=tmp_path)
    assert unreachable.returncode == 3 and "Connection refused" in unreachable.stderr


def test_its_own_paho_comes_before_an_old_one(dist: Path, tmp_path: Path) -> None:
    done = run(
        dist,
        *("status", "--port", "1"),
        home=tmp_path,
        python=[sys.executable],
        PYTHONPATH=str(old_paho(tmp_path)),
    )
    assert done.returncode == 3 and "Connection refused" in done.stderr


def old_paho(home: Path) -> Path:
    """A folder with what can be told of paho-mqtt 1.6."""
    package = home / "old" / "paho" / "mqtt"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text('__version__ = "1.6.1"\n')
    (package / "client.py").write_text("class Client:\n    pass\n")
    return home / "old"


@pytest.mark.parametrize("command", [["daemon"], ["status"], ["send", "--to", "x", "--text", "x"]])
@pytest.mark.parametrize("old", [False, True])
def test_without_paho_or_with_an_old_one_a_line_names_the_ways_out(
    command: list[str], old: bool, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "hive.py", tmp_path)
    python = [sys.executable, "-S"]
    path = {"PYTHONPATH": str(old_paho(tmp_path))} if old else {}
    done = run("hive.py", *command, home=tmp_path, python=python, **path)
    what = "older than 2" if old else "missing"
    line = next(line for line in done.stderr.splitlines() if line.startswith("hive: "))
    assert line == f"hive: paho-mqtt is {what}; {WAYS}"
    assert done.returncode == 2 and "Traceback" not in done.stderr
