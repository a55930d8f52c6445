"""Promises about the file itself."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import symtable
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Hive

import hive

FILE = Path(hive.__file__)
SOURCE = FILE.read_text("utf-8")
TREE = ast.parse(SOURCE)
BANNERS = [
    (number, found[1])
    for number, line in enumerate(SOURCE.splitlines(), 1)
    if (found := re.match(r"# ---- (\w+):", line))
]


def section(line: int) -> int:
    """How many banners stand above a line."""
    return sum(banner < line for banner, _ in BANNERS)


def scopes(scope: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    for child in scope.get_children():
        yield child
        yield from scopes(child)


def homes() -> dict[str, int]:
    """The section of each name that this file defines at its top level."""
    found: dict[str, int] = {}
    for node in TREE.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        else:
            continue
        for name in names:
            found.setdefault(name, section(node.lineno))
    return found


def python(*arguments: str, cwd: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with its standard library and nothing else."""
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=cwd,
        env={"HOME": str(home), "PATH": os.defpath, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


def test_the_map_names_the_sections_in_their_order() -> None:
    head = SOURCE[: SOURCE.index("from __future__")]
    assert re.findall(r"^# {3}[a-z ]{7} ([A-Z]\w+) ", head, re.M) == [name for _, name in BANNERS]


def test_no_section_uses_a_later_one() -> None:
    home = homes()
    late = {
        f"{scope.get_name()}, line {scope.get_lineno()}, uses {symbol.get_name()}"
        for scope in scopes(symtable.symtable(SOURCE, "hive.py", "exec"))
        for symbol in scope.get_symbols()
        if symbol.is_global() and home.get(symbol.get_name(), 0) > section(scope.get_lineno())
    }
    assert not late


def test_no_function_is_too_long_to_read() -> None:
    lengths = {
        f"{node.name}, line {node.lineno}": (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(TREE)
        if isinstance(node, ast.FunctionDef)
    }
    longest = max(lengths, key=lengths.__getitem__)
    assert lengths[longest] <= 60, longest


def test_only_the_mqtt_client_imports_paho() -> None:
    importing = {
        section(node.lineno)
        for node in ast.walk(TREE)
        if isinstance(node, ast.Import | ast.ImportFrom) and "paho" in ast.unparse(node)
    }
    client = [name for _, name in BANNERS].index("MqttClient") + 1
    assert importing == {0, client}  # 0: above the first banner, for type checkers only


@pytest.mark.parametrize("module", ["paho", "logging", "subprocess", "ssl", "sqlite3", "tomllib"])
def test_importing_hive_leaves_what_is_slow_alone(module: str, tmp_path: Path) -> None:
    code = f"import hive, sys; print({module!r} in sys.modules)"
    done = python("-c", code, cwd=FILE.parent, home=tmp_path)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["config", "--example"], ["config"]])
def test_hive_runs_alone_in_an_empty_directory(arguments: list[str], tmp_path: Path) -> None:
    alone, home = tmp_path / "alone", tmp_path / "home"
    alone.mkdir()
    home.mkdir()
    shutil.copy(FILE, alone)
    done = python("hive.py", *arguments, cwd=alone, home=home)
    assert (done.returncode, done.stderr) == (0, "")
    if "config" in arguments:
        tables = {"node", "mqtt", "heartbeat", "logging"}
        assert tables <= tomllib.loads(done.stdout).keys()
    else:
        assert "messages between AI agents" in done.stdout
    assert [*home.iterdir(), *alone.iterdir()] == [alone / "hive.py"]


@pytest.mark.parametrize("argument", ["--version", "config"])
def test_hive_cli_works_through_a_link(argument: str, tmp_path: Path) -> None:
    cli = FILE.with_name("hive-cli")
    assert os.access(cli, os.X_OK)
    (tmp_path / "hive-cli").symlink_to(cli)
    (tmp_path / "hive.py").write_text("raise SystemExit('the wrong one')")
    linked = python("hive-cli", argument, cwd=tmp_path, home=tmp_path)
    direct = python(str(FILE), argument, cwd=tmp_path, home=tmp_path)
    assert linked.returncode == 0
    assert (linked.stdout, linked.stderr) == (direct.stdout, direct.stderr)


HOSTILE = "raise SystemExit('this is another program')"


@pytest.mark.parametrize("program", ["hive.py", "hive-cli"])
@pytest.mark.parametrize("command", ["config", "doctor"])
def test_nothing_is_imported_from_beside_it_or_from_here(
    program: str, command: str, tmp_path: Path
) -> None:
    beside, here = tmp_path / "bin", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
        for module in [*sorted(sys.stdlib_module_names - {"__future__"}), "paho"]:
            (folder / f"{module}.py").write_text(HOSTILE)
    for file in ("hive.py", "hive-cli"):
        shutil.copy(FILE.with_name(file), beside)
    done = python(f"{beside}/{program}", command, cwd=here, home=tmp_path)
    assert "another program" not in done.stdout + done.stderr
    assert done.returncode == {"config": 0, "doctor": 1}[command], done.stderr


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["init", "--help"],
        ["config", "--example"],
        ["config", "--port", "x"],
        ["send", "--to", "a b", "--text", "x"],
        ["config", "--config", "wrong.toml"],
    ],
    ids=" ".join,
)
def test_without_docstrings_it_says_the_same(
    arguments: list[str], compiled: bool, tmp_path: Path
) -> None:
    (tmp_path / "wrong.toml").write_text("[node]\nid = 'a b'")
    program = str(FILE.with_name("hive-cli") if compiled else FILE)
    said = [
        python(*flags, program, *arguments, cwd=tmp_path, home=tmp_path) for flags in ([], ["-OO"])
    ]
    assert [one.returncode for one in said] == [said[0].returncode] * 2
    assert said[0].stdout + said[0].stderr == said[1].stdout + said[1].stderr != ""


BANNED = {
    *("ast", "bz2", "dataclasses", "difflib", "hashlib", "heapq", "inspect", "logging", "lzma"),
    *("paho", "platform", "random", "shutil", "sqlite3", "ssl", "subprocess", "threading"),
    *("traceback", "uuid"),
}


def imported(*line: str, home: Path) -> set[str]:
    """What a whole process imports, by -X importtime."""
    done = subprocess.run(
        [sys.executable, "-I", "-X", "importtime", FILE.with_name("hive-cli"), *line],
        env={"HOME": str(home), "PATH": os.defpath},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    modules = re.findall(r"^import time: .*\| +([\w.]+)$", done.stderr, re.M)
    hive_began = modules.index("__future__")  # what site imports before it, is not ours
    return {name.partition(".")[0] for name in modules[hive_began:]}


def test_a_send_through_the_socket_imports_nothing_that_it_does_not_need(hive: Hive) -> None:
    node = hive.node("alpha").start()
    send = ("send", "--to", "alpha", "--ch", "status", "--urgency", "later", "--text", "x")
    assert not BANNED & imported(*send, "--config", str(node.config), home=hive.home)
    daemon = Path(f"/proc/{node.pid}/maps")
    if daemon.exists():  # no TLS is wanted, so that it is not loaded
        assert "_ssl." not in daemon.read_text()


def test_each_section_has_its_tests() -> None:
    """MqttClient: test_mqtt_client.py, and perhaps test_mqtt_client_*.py."""
    files = {file.stem.removeprefix("test_") for file in FILE.parent.glob("tests/test_*.py")}
    names = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() for _, name in BANNERS]
    assert [name for name in names if name not in files] == []
