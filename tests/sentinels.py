"""How hive runs a sentinel on a schedule, without hive: the contract's other side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import forked
from conftest import ROOT

HANDLERS = ROOT / "contrib" / "handlers"
KIT = HANDLERS / "sentinel.py"


def imported(name: str, file: Path) -> ModuleType:
    """A handler as a module, without a __pycache__ beside it."""
    spec = spec_from_loader(name, SourceFileLoader(name, str(file)))
    assert spec and spec.loader
    module = sys.modules[name] = module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


class Scheduled:
    """One sentinel below a folder, with its configuration and what it keeps."""

    def __init__(
        self, home: Path, name: str, program: Path, main: Callable[[], int | None] | None = None
    ) -> None:
        self.home, self.name, self.program = home, name, program
        self.main = main  # of the program, where it is imported here: what a fork calls
        self.config = home / f"{name}.toml"
        self.state = home / "state" / "sentinels" / f"{name}.json"
        self.runs, self.last = 0, ""

    def write(self, content: str) -> None:
        """Its configuration."""
        self.config.write_text(content)
        self.config.chmod(0o600)

    def environment(self, **more: str) -> dict[str, str]:
        variable = f"HIVE_{self.name.upper().replace('-', '_')}_CONFIG"
        named = {variable: str(self.config), "HOME": str(self.home)}
        return {"PATH": os.environ["PATH"], **named, **more}

    def hive(self) -> dict[str, str]:
        """What the daemon says to this run."""
        return {
            "HIVE_ID": f"run-{self.runs}",
            "HIVE_LAST_RUN": self.last,
            "HIVE_STATE_DIR": str(self.home / "state"),
            "HIVE_NODE": "alpha",
            "HIVE_FROM": "alpha",
        }

    def run(
        self, *arguments: str, stdin: str = "", **more: str
    ) -> subprocess.CompletedProcess[str]:
        return forked.run(
            [str(self.program), *arguments],
            self.main,
            env=self.environment(**more),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def start(self, text: str = "scheduled", **more: str) -> subprocess.Popen[str]:
        """A run that goes on beside us; end_of() takes it over."""
        self.runs += 1
        child = forked.spawn(
            [str(self.program)],
            self.main,
            env=self.environment(**self.hive(), **more),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stdin
        child.stdin.write(json.dumps({"text": text}) + "\n")
        child.stdin.close()
        child.stdin = None
        return child

    def end_of(self, child: subprocess.Popen[str], taken: bool = True) -> dict[str, Any]:
        """What a run came to; `taken`: the daemon has it on disk."""
        out, err = child.communicate(timeout=60)
        assert out, err
        said: dict[str, Any] = json.loads(out)
        if taken:
            self.last = f"run-{self.runs}"
        return said | {"exit": child.returncode, "stderr": err}

    def scheduled(self, taken: bool = True, **more: str) -> dict[str, Any]:
        """Run it as the daemon does on its schedule."""
        return self.end_of(self.start(**more), taken)

    def asked(self, text: str = "now", sender: str = "alpha") -> dict[str, Any]:
        """Somebody sends a message with its action."""
        asking = {**self.hive(), "HIVE_FROM": sender}
        del asking["HIVE_LAST_RUN"]
        done = self.run(stdin=json.dumps({"text": text}) + "\n", **asking)
        said: dict[str, Any] = json.loads(done.stdout or "{}")
        return said | {"exit": done.returncode, "stderr": done.stderr}
