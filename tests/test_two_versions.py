"""The release before and this one on one broker: each hears, answers and sees the other."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import Daemon, Hive, eventually, missing, program_at

BEFORE = "8360744"  # 0.1.0, as it was released


@pytest.fixture(scope="module")
def program_before(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of the release before, from the history of this checkout."""
    folder = tmp_path_factory.mktemp("before")
    if not program_at(BEFORE, folder):
        missing(f"no git history with {BEFORE}: the release before is not tried beside this one")
    return [sys.executable, str(folder / "hive-cli")]


class Two:
    """Old, of the release before, and new."""

    def __init__(self, hive: Hive, program_before: list[str]) -> None:
        self.hive = hive
        self.programs = {"old": program_before, "new": hive.program}
        for name in self.programs:
            node = hive.node(name)
            node.handler("ping", f"#!/bin/sh\necho pong of {name}\n")
            node.handler("fails", "#!/bin/sh\necho because >&2\nexit 3\n")
            self.start(name)

    def start(self, name: str) -> Daemon:
        self.hive.program = self.programs[name]
        return self.hive.nodes[name].start()

    def cli(self, name: str, *words: str, code: int = 0) -> str:
        self.hive.program = self.programs[name]
        done = self.hive.cli(name, *words, code=code)
        return done.stdout + done.stderr

    def states(self, name: str) -> dict[str, tuple[str, str]]:
        rows = json.loads(self.cli(name, "status", "--json"))
        return {row["name"]: (row["status"], str(row["version"]).partition(" ")[0]) for row in rows}


@pytest.mark.parametrize(("one", "other"), [("old", "new"), ("new", "old")])
def test_each_hears_answers_and_sees_the_other(
    hive: Hive, program_before: list[str], one: str, other: str
) -> None:
    two = Two(hive, program_before)
    eventually(f"{one} sees {other}", lambda: len(two.states(one)) == 2)
    send = ("send", "--to", other, "--text", "x", "--wait", "20", "--action")
    assert two.cli(one, *send, "ping") == f"pong of {other}\n"
    assert "fails failed: exit 3: because" in two.cli(one, *send, "fails", code=1)
    to_all = two.cli(one, "send", "--to", "all", "--action", "ping", "--text", "x", "--wait", "20")
    assert f"{other}: pong of {other}\n" in to_all
    states = two.states(one)
    assert {name: how for name, (how, _) in states.items()} == {"old": "online", "new": "online"}
    assert states["old"][1] == "0.1.0" != states["new"][1]
    roster = two.cli(one, "roster")
    assert "fails, ping" in roster.replace("ping, fails", "fails, ping")

    process = two.hive.nodes[other].process
    assert process
    process.kill()
    process.wait()
    two.hive.nodes[one].logged("peer is lost", peer=other)
    eventually(f"{one} says so", lambda: two.states(one)[other][0] == "offline")
    two.hive.nodes[one].logged("sent", ch="alert")  # the only one that is left tells all
    two.start(other)
    eventually(f"{one} sees it again", lambda: two.states(one)[other][0] == "online")
    assert two.cli(one, *send, "ping") == f"pong of {other}\n"
