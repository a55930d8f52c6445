"""A machine that carries a hive: `hive-cli host` in a home of its own, on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
from conftest import PATIENCE, eventually, free_port, statuses_of, told_at

import hive

# Linux has all of 127.0.0.0/8; elsewhere it is one address.
HERE = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"


class Machine:
    """One user on one machine: a home, and what is typed there."""

    def __init__(self, home: Path, name: str) -> None:
        self.home, self.name = home, name
        self.home.mkdir(mode=0o700)
        self.config = home / ".config" / "hive" / "hive.toml"
        self.state = home / ".local" / "state" / "hive" / name
        self.environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str | Path, **how: Any) -> subprocess.Popen[bytes]:
        line = [sys.executable, forked.PROGRAM, *arguments]
        return forked.spawn(line, env=self.environment, cwd=self.home, **how)

    def run(
        self, *arguments: str, code: int | None = 0, stdin: str = "", **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """What it says, once it has ended as it should."""
        done = forked.run(
            [sys.executable, forked.PROGRAM, *arguments],
            env=self.environment,
            cwd=self.home,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            **how,
        )
        assert code is None or done.returncode == code, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def error(self, *arguments: str, code: int, stdin: str = "", **how: Any) -> str:
        """The one line with which it fails."""
        done = self.run(*arguments, code=code, stdin=stdin, **how)
        (line,) = [one for one in done.stderr.splitlines() if not one.startswith("hive: warning")]
        return line

    def daemon(self, *arguments: str) -> None:
        """Run the node until the test's end."""
        log = self.home / "daemon.log"
        with log.open("ab") as out:
            seen = out.tell()
            self.daemons.append(self.start("daemon", *arguments, stdout=out, stderr=out))
        eventually(f"{self.name} is up", lambda: "event=connected" in log.read_text()[seen:])

    def log(self) -> str:
        return (self.home / "daemon.log").read_text()

    def statuses(self) -> dict[str, str]:
        """How all are to its daemon."""
        return statuses_of(told_at(self.state / "door", "states"))

    def status(self) -> dict[str, str]:
        """The same, as the command shows it."""
        rows = json.loads(self.run("status", "--json").stdout)
        return {row["name"]: row["status"] for row in rows}

    def stop_daemons(self) -> None:
        for one in self.daemons:
            one.terminate()
        for one in self.daemons:
            one.wait(PATIENCE)
        self.daemons.clear()

    def close(self) -> None:
        self.stop_daemons()


class Carrier(Machine):
    """The one that carries the hive."""

    def __init__(self, home: Path, name: str = "alpha") -> None:
        super().__init__(home, name)
        self.port = free_port()
        self.host = hive.Host(self.state)
        self.where: tuple[str, ...] = (
            "host",
            "--listen",
            HERE,
            "--port",
            str(self.port),
            "--node",
            name,
        )

    def carry(self) -> str:
        return self.run(*self.where).stdout

    def invite(self, name: str = "mini") -> str:
        return self.run("invite", name).stdout

    def events(self) -> str:
        """What the service says."""
        return (self.host.folder / "host.log").read_text()

    def close(self) -> None:
        super().close()
        for number in (15, 9):
            if pid := self.host.service_pid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                with contextlib.suppress(AssertionError):
                    eventually("the service has ended", lambda: not self.host.service_pid(), 15)
        if pid := self.host.broker_pid():
            hive.end_process(pid, self.host.broker_lock)
