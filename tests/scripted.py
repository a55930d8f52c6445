"""Commands in this process, whose daemon is a script and whose time is a number.

For what they ask and how they tell the answer; what real daemons say is tested with real ones.
"""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hive

Answer = dict[str, Any]


class Scripted:
    """A daemon that answers as it is told to, and what it was asked."""

    def __init__(self, now: list[float], **answers: Answer | Callable[[Answer], Answer]) -> None:
        self.asked: list[Answer] = []
        self.lines = deque[Answer | Exception | None]()  # what comes besides
        self.waits: list[float | None] = []  # how long that was waited for
        self.closed = 0
        self._now, self._answers = now, answers

    def ask(self, request: Mapping[str, Any]) -> Answer:
        self.asked.append({**request})
        answer = self._answers.get(str(request["do"]), {"error": "no such request: it"})
        if callable(answer):
            return answer({**request})
        return {**answer}

    def receive(self, within: float | None) -> Answer | None:
        self.waits.append(within)
        said = self.lines.popleft() if self.lines else None
        if isinstance(said, Exception):
            raise said
        if said is None:
            self._now[0] += within or 0.0
        return said

    def close(self) -> None:
        self.closed += 1


class Pipe(io.RawIOBase):
    """Of which one can see what was written to it so far."""

    def __init__(self) -> None:
        self.seen = b""

    def stream(self) -> io.TextIOWrapper:
        return io.TextIOWrapper(io.BufferedWriter(self))

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.seen += bytes(data)
        return len(data)


class Commands:
    """Commands of the node alpha, and what they print."""

    def __init__(
        self, home: Path, patch: pytest.MonkeyPatch, said: pytest.CaptureFixture[str]
    ) -> None:
        """In an empty home."""
        self.home, self._patch, self._said = home, patch, said
        self.now = [1000.0]  # goes on when somebody waits
        self.opened: list[tuple[float, bool]] = []  # with which patience, and whether directly
        self.direct: list[float] = []  # with which patience a node of its own began
        self.visitors: list[Any] = []  # with which configuration
        for name in ("HIVE_CONFIG", "HIVE_NODE", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(home))
        patch.chdir(home)
        kept = {name: getattr(time, name) for name in dir(time) if not name.startswith("_")}
        told = {"monotonic": lambda: self.now[0], "time": lambda: 1771143500.0 + self.now[0]}
        patch.setattr(hive, "time", SimpleNamespace(**kept | told | {"sleep": self._sleep}))

    def _sleep(self, seconds: float) -> None:
        self.now[0] += seconds

    def daemon(self, **answers: Any) -> Scripted:
        """From now on this one is asked."""
        daemon = Scripted(self.now, **answers)

        def open_control(config: Any, patience: float, direct: bool = False) -> Scripted:
            self.opened.append((patience, direct))
            return daemon

        self._patch.setattr(hive, "open_control", open_control)
        self._patch.setattr(hive, "connect_to_daemon", lambda config, patience=5.0: daemon)
        return daemon

    def bypass(self, **answers: Any) -> Scripted:
        """Who is asked where the daemon makes no sense."""
        node = Scripted(self.now, **answers)

        def begin(config: Any, patience: float) -> Scripted:
            self.direct.append(patience)
            self.visitors.append(config)
            return node

        self._patch.setattr(hive, "InProcessNode", begin)
        return node

    def run(self, line: str, *more: str) -> tuple[int, str, str]:
        """Its exit code, stdout and stderr."""
        try:
            code = hive.main(["--node", "alpha", *line.split(), *more])
        except SystemExit as ended:
            code = int(str(ended.code))
        said = self._said.readouterr()
        return int(code), said.out, said.err
