"""A state directory that cannot be written, on a real disk: the node serves all the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Daemon, eventually, missing
from faults import SmallDisk
from test_broker_host import HOSTING, Machine

import hive

PING = "#!/bin/sh\necho pong\n"
IN_MEMORY = "cannot write, going on in memory"


class Disk:
    """A folder that can be made read-only, for root as well."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mounted = folder, False
        folder.mkdir(parents=True, mode=0o700)
        if os.geteuid() == 0:
            self.mounted = self._mount("-t", "tmpfs", "-o", "size=8m,mode=0700", "none")
            if not self.mounted:
                missing("root may mount nothing here, and write everywhere")

    def _mount(self, *how: str) -> bool:
        mount = shutil.which("mount")
        line = [mount or "mount", *how, str(self.folder)]
        return bool(mount) and subprocess.run(line, capture_output=True).returncode == 0

    def read_only(self) -> None:
        if self.mounted:
            assert self._mount("-o", "remount,ro")
        else:
            self._chmod(0o500, 0o400)

    def writable(self) -> None:
        if self.mounted:
            assert self._mount("-o", "remount,rw")
        else:
            self._chmod(0o700, 0o600)

    def _chmod(self, folders: int, files: int) -> None:
        self.folder.chmod(0o700)
        for one in [*self.folder.rglob("*"), self.folder]:
            if not one.is_socket():
                one.chmod(folders if one.is_dir() else files)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", self.folder], check=True)
        else:
            self.writable()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A user whose session has no place of its own for sockets."""
    machine = Machine(tmp_path / "home")
    machine.environment.pop("XDG_RUNTIME_DIR")
    change = (
        "import hive, pathlib; hive.MAINTENANCE_INTERVAL = 0.5;"
        f" hive.SHORT_PLACE = pathlib.Path({str(machine.runtime)!r});"  # what is in it goes with it
    )
    machine.program[-1] = machine.program[-1].replace("import hive;", change)
    try:
        yield machine
    finally:
        machine.close()


@pytest.fixture
def disk(machine: Machine) -> Iterator[Disk]:
    """Where all its state is."""
    disk = Disk(machine.home / ".local" / "state")
    try:
        yield disk
    finally:
        machine.close_nodes()
        disk.close()


def at_home(machine: Machine, name: str) -> Daemon:
    """A node whose state is where it is by default."""
    node = machine.node(name)
    node.config.write_text(node.config.read_text().replace('state_dir = "state"\n', ""))
    node.handler("ping", PING)
    return node


def asks_itself(machine: Machine, node: Daemon, *how: str) -> None:
    said = machine.cli(node.name, "send", "--to", node.name, "--action", "ping", "--text=x", *how)
    assert said.stdout == "pong\n"


def status_of(machine: Machine, name: str) -> str:
    rows = json.loads(machine.cli(name, "status", "--json").stdout)
    return str(next(row["status"] for row in rows if row["name"] == name))


def told(machine: Machine, name: str, code: int) -> dict[str, str]:
    """What doctor says last of each thing."""
    rows = json.loads(machine.cli(name, "doctor", "--json", code=code).stdout)
    return {row["check"]: f"{row['level']}: {row['what']}" for row in rows}


def texts_of(machine: Machine, name: str) -> list[str]:
    lines = machine.cli(name, "log", "--json", "--ch", "status").stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["envelope"]["text"] for row in rows if row["event"] == "out"]


def note(machine: Machine, name: str, text: str) -> None:
    machine.cli(name, "send", "--to", "attic", "--ch", "status", "--text", text)


def test_where_nothing_can_be_written_a_node_serves_all_the_same(
    machine: Machine, disk: Disk
) -> None:
    disk.read_only()
    alpha = at_home(machine, "alpha").start()
    alpha.logged(HOSTING)
    asks_itself(machine, alpha, "--wait", "20")
    asks_itself(machine, alpha, "--wait", "20", "--direct")
    assert status_of(machine, "alpha") == "degraded"
    asks_itself(machine, at_home(machine, "beta").start(), "--wait", "20")
    said = told(machine, "alpha", code=1)
    assert said["files"].startswith("fail: state directory") and "may not write" in said["files"]
    assert said["daemon"] == "warn: alpha's runs, and is degraded: no journal on disk"

    disk.writable()
    alpha.logged("can write again")
    eventually("it is well", lambda: status_of(machine, "alpha") == "online")
    assert (disk.folder / "hive" / "alpha" / "journal.sqlite3").stat().st_size
    assert not alpha.events("no lock") and not alpha.events("no door for the command line")


def test_two_daemons_of_one_name_are_one_too_many_there_too(machine: Machine, disk: Disk) -> None:
    disk.read_only()
    alpha = at_home(machine, "alpha").start()
    done = subprocess.run(
        machine.command_line("alpha", "daemon"),
        capture_output=True,
        text=True,
        timeout=60,
        env=machine.environment,
    )
    assert done.returncode == 3 and "another daemon runs with" in done.stderr
    alpha.stop(signal.SIGKILL)
    alpha.start()
    asks_itself(machine, alpha, "--wait", "20")


def test_what_was_there_before_is_read_and_is_there_afterwards(
    machine: Machine, disk: Disk
) -> None:
    alpha = at_home(machine, "alpha").start()
    note(machine, "alpha", "one")
    alpha.stop()
    disk.read_only()
    assert texts_of(machine, "alpha") == ["one"]
    alpha.start()
    alpha.logged(IN_MEMORY)
    note(machine, "alpha", "two")
    assert texts_of(machine, "alpha") == ["one", "two"]
    disk.writable()
    alpha.logged("can write again", file=str(disk.folder / "hive/alpha/journal.sqlite3"))
    note(machine, "alpha", "three")
    alpha.stop()
    assert texts_of(machine, "alpha") == ["one", "two", "three"]


def test_after_a_crash_too(machine: Machine, disk: Disk) -> None:
    alpha = at_home(machine, "alpha").start()
    note(machine, "alpha", "one")
    alpha.stop(signal.SIGKILL)
    disk.read_only()
    alpha.start()
    assert texts_of(machine, "alpha") == ["one"]


def test_doctor_sees_that_the_disk_is_full(machine: Machine) -> None:
    disk = SmallDisk(machine.home / ".local")
    place = machine.home / ".local/state/hive/alpha"
    try:
        alpha = at_home(machine, "alpha").start()
        assert told(machine, "alpha", code=0)["files"].startswith("ok")
        note(machine, "alpha", "one")
        disk.fill()
        while not alpha.events(IN_MEMORY):
            note(machine, "alpha", "x" * 100_000)
        said = told(machine, "alpha", code=1)
        assert said["files"] == f"fail: state directory {place}: No space left on device"
        assert said["daemon"] == "warn: alpha's runs, and is degraded: no journal on disk"
        alpha.stop()
        (found,) = hive.check_folder(place)
        assert found.level is hive.Level.FAIL and "No space left" in found.what
        alpha.start()
        assert texts_of(machine, "alpha")[0] == "one"
        disk.free()
        eventually("it is well", lambda: status_of(machine, "alpha") == "online")
        assert [*hive.check_folder(place)] == []
        alpha.stop()
        assert texts_of(machine, "alpha")[0] == "one"
    finally:
        machine.close_nodes()
        disk.close()


def test_a_spare_place_of_somebody_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was first in the shared folder could be asked, or read along."""
    monkeypatch.setattr(hive, "SHORT_PLACE", tmp_path)
    folder = tmp_path / f"hive-{os.geteuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    state = tmp_path / "missing" / "alpha"
    with pytest.raises(PermissionError, match="writable by everyone"):
        hive.lock_or_spare(state / "lock")
    config = hive.Config(hive.NodeConfig("alpha", state_dir=state))
    with hive.unix_listener(hive.spare_path(state / "door")) as listener:
        listener.listen()
        assert hive.connect_to_daemon(config) is None
    lock = hive.spare_path(state / "broker.sqlite3.lock")
    lock.write_text("/somewhere/else")
    settings = hive.BrokerConfig(state_dir=state)
    assert Path("/somewhere/else") not in [*hive.embedded_places(settings)]
    folder.chmod(0o700)
    assert Path("/somewhere/else") in [*hive.embedded_places(settings)]
