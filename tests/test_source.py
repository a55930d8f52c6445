"""Promises about the file itself."""

from __future__ import annotations

import ast
import functools
import graphlib
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
BANNERS = [
    (number, found[1])
    for number, line in enumerate(SOURCE.splitlines(), 1)
    if (found := re.match(r"# ---- (\w+):", line))
]


@functools.cache
def tree() -> ast.Module:
    """The whole file, read by who needs it: each worker collects these tests."""
    return ast.parse(SOURCE)


def scopes(scope: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    for child in scope.get_children():
        yield child
        yield from scopes(child)


def section(line: int) -> str:
    """The section that a line is in; "" above the first banner."""
    return max(((at, name) for at, name in BANNERS if at <= line), default=(0, ""))[1]


def top_level() -> Iterator[tuple[str, ast.stmt]]:
    """Each name that the file defines at its top level, and where."""
    for node in tree().body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (n for target in targets for n in ast.walk(target)):
                if isinstance(name, ast.Name):
                    yield name.id, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for one in node.names:
                yield one.asname or one.name.partition(".")[0], node


@functools.cache
def uses() -> dict[str, set[str]]:
    """The other sections that each section uses, by the names that stand in it."""
    home = {name: section(node.lineno) for name, node in top_level()}
    found: dict[str, set[str]] = {name: set() for _, name in BANNERS}
    for node in tree().body:
        here = section(node.lineno)
        for name in ast.walk(node):
            if here and isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load):
                found[here] |= {home.get(name.id, here)} - {"", here}
    return found


GROUND = {"Basics", "Envelope", "Config", "Log", "Loop"}  # any section may use these
ANY = {name for _, name in BANNERS}


def the_map() -> dict[str, set[str]]:
    """What each section may use besides, as the map at the file's head says."""
    head = SOURCE[SOURCE.index("# The map") : SOURCE.index("# hive-cli loads it")]
    lines = re.sub(r"\n# {12,}", " ", head).splitlines()
    rows = [
        found for line in lines if (found := re.match(r"#   .{7} (\w+) +[^<]*(?:<- (.*))?", line))
    ]
    return {row[1]: ANY if row[2] == "*" else {*re.findall(r"\w+", row[2] or "")} for row in rows}


def python(*arguments: str, cwd: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with its standard library and nothing else; what it compiles it keeps aside."""
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=cwd,
        env={"HOME": str(home), "PATH": os.defpath, "PYTHONPYCACHEPREFIX": f"{home.parent}/pyc"},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


def test_the_map_names_the_sections_in_their_order() -> None:
    assert [*the_map()] == [name for _, name in BANNERS]


def test_every_section_keeps_to_what_the_map_lets_it_use() -> None:
    allowed, found = the_map(), uses()
    more = {name: used - GROUND - allowed[name] for name, used in found.items()}
    assert not {name: used for name, used in more.items() if used}, "used, and not in the map"
    less = {name: may - found[name] for name, may in allowed.items() if may != ANY}
    assert not {name: may for name, may in less.items() if may}, "in the map, and not used"


def test_sections_use_each_other_in_no_circle() -> None:
    graphlib.TopologicalSorter(uses()).prepare()  # raises CycleError, which names it


def parts() -> dict[str, int]:
    """The part in which hive-cli loads each section; the file's head comes with the first."""
    rows = re.findall(r"^#   part  (.*(?:\n# {9}.*)*)", SOURCE, re.M)
    return {"": 0} | {name: n for n, row in enumerate(rows) for name in re.findall(r"\w+", row)}


def test_each_section_is_in_a_part() -> None:
    named = re.findall(r"^#   part  (.*(?:\n# {9}.*)*)", SOURCE, re.M)
    assert sorted(re.findall(r"\w+", " ".join(named))) == sorted(name for _, name in BANNERS)


def must_be_real(one: ast.AST) -> list[ast.expr]:
    """Where a stand-in for a class will not do."""
    match one:
        case ast.ExceptHandler(type=ast.expr() as kind):
            return [kind]
        case ast.ClassDef(bases=bases):
            return bases
        case ast.MatchClass(cls=cls):
            return [cls]
        case ast.Call(func=ast.Name("isinstance" | "issubclass"), args=[_, kinds]):
            return [kinds]
    return []


def test_no_part_needs_of_a_later_one_more_than_a_stand_in_can_give() -> None:
    """Functions and classes are called, or passed on; of constants hive-cli sees that they do."""
    part_of = parts()
    made = {
        node.name: part_of[section(node.lineno)]
        for node in tree().body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    wrong = [
        f"{name.id}, line {name.lineno}"
        for one in ast.walk(tree())
        for kind in must_be_real(one)
        for name in ast.walk(kind)
        if isinstance(name, ast.Name)
        and made.get(name.id, 0) > part_of[section(getattr(one, "lineno", name.lineno))]
    ]
    assert not wrong


def test_every_section_has_tests_of_its_own() -> None:
    files = Path(__file__).parent.glob("test_*.py")
    names = {file.stem.removeprefix("test_").replace("_", "") for file in files}
    assert {name.lower() for _, name in BANNERS} <= names


def test_no_name_is_defined_twice() -> None:
    names = [name for name, _ in top_level()]
    assert {name for name in names if names.count(name) > 1} == set()


def test_no_local_name_hides_one_of_the_file() -> None:
    known = {name for name, _ in top_level()}
    hidden = {
        f"{symbol.get_name()} in {scope.get_name()}, line {scope.get_lineno()}"
        for scope in scopes(symtable.symtable(SOURCE, "hive.py", "exec"))
        for symbol in scope.get_symbols()
        if scope.get_type() == "function" and symbol.is_local() and symbol.get_name() in known
    }
    assert not hidden


def test_no_function_is_too_long_to_read() -> None:
    lengths = {
        f"{node.name}, line {node.lineno}": (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(tree())
        if isinstance(node, ast.FunctionDef)
    }
    longest = max(lengths, key=lengths.__getitem__)
    assert lengths[longest] <= 45, longest


def test_only_the_mqtt_client_imports_paho() -> None:
    importing = {
        section(node.lineno)
        for node in ast.walk(tree())
        if isinstance(node, ast.Import | ast.ImportFrom) and "paho" in ast.unparse(node)
    }
    assert importing == {"", "MqttClient"}  # "": above the first banner, for type checkers only


def test_what_only_type_checkers_import_stands_in_annotations_alone() -> None:
    """Anywhere else it would be a NameError, and none that mypy finds."""
    only = next(
        one
        for one in tree().body
        if isinstance(one, ast.If) and ast.unparse(one.test) == "TYPE_CHECKING"
    )
    known = {
        alias.asname or alias.name.partition(".")[0]
        for one in only.body
        if isinstance(one, ast.Import | ast.ImportFrom)
        for alias in one.names
    } - {one.name for one in only.orelse if isinstance(one, ast.FunctionDef)}
    known -= {
        ast.unparse(name)
        for one in only.orelse
        if isinstance(one, ast.Assign)
        for name in one.targets
    }
    annotations = {
        id(inner)
        for one in ast.walk(tree())
        for outer in (getattr(one, "annotation", None), getattr(one, "returns", None))
        if outer
        for inner in ast.walk(outer)
    }

    def used(one: ast.AST, known: set[str]) -> Iterator[str]:
        if isinstance(one, ast.FunctionDef):
            known = known - {
                alias.asname or alias.name.partition(".")[0]
                for inner in ast.walk(one)
                if isinstance(inner, ast.Import | ast.ImportFrom)
                for alias in inner.names
            }
        if isinstance(one, ast.If) and ast.unparse(one.test) == "TYPE_CHECKING":
            return
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load) and one.id in known:
            if id(one) not in annotations:
                yield f"{one.id}, line {one.lineno}"
            return
        for child in ast.iter_child_nodes(one):
            yield from used(child, known)

    assert known and not [*used(tree(), known)]


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


SAME_WORDS = [
    ["--help"],
    ["init", "--help"],
    ["config", "--example"],
    ["config", "--port", "x"],
    ["send", "--to", "a b", "--text", "x"],
    ["config", "--config", "wrong.toml"],
]
# The file as a program, once for each line of words; to read it takes half a second each time.
EACH_OF_THEM = """
import os, sys
file, lines = sys.argv[1], eval(sys.argv[2])
program = compile(open(file).read(), file, "exec")
for sys.argv in ([file, *words] for words in lines):
    sys.stdout.flush()
    if not os.fork():
        sys.path[0] = os.path.dirname(file)
        os.dup2(1, 2)
        exec(program, vars(sys.modules["__main__"]) | {"__file__": file})
    print("code", os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize("arguments", SAME_WORDS, ids=" ".join)
def test_without_docstrings_it_says_the_same(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text("[node]\nid = 'a b'")
    program = str(FILE.with_name("hive-cli"))
    said = [
        python(*flags, program, *arguments, cwd=tmp_path, home=tmp_path) for flags in ([], ["-OO"])
    ]
    assert [one.returncode for one in said] == [said[0].returncode] * 2
    assert said[0].stdout + said[0].stderr == said[1].stdout + said[1].stderr != ""


def test_without_docstrings_the_file_itself_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text("[node]\nid = 'a b'")
    each = ("-c", EACH_OF_THEM, str(FILE), repr(SAME_WORDS))
    said = [python(*flags, *each, cwd=tmp_path, home=tmp_path) for flags in ([], ["-OO"])]
    codes = [int(code) for code in re.findall(r"^code (\d+)$", said[0].stdout, re.M)]
    assert codes == [0, 0, 0, 2, 2, 2]
    assert said[0].stdout == said[1].stdout and said[0].stderr == said[1].stderr == ""


BANNED = {
    *("ast", "bz2", "dataclasses", "difflib", "hashlib", "heapq", "inspect", "locale", "logging"),
    *("lzma", "paho", "platform", "random", "shutil", "sqlite3", "ssl", "subprocess", "threading"),
    *("tomllib", "traceback", "typing", "uuid"),
}


def imported(*line: str, home: Path) -> set[str]:
    """What a whole process imports, by -X importtime."""
    done = subprocess.run(
        [sys.executable, "-I", "-X", "importtime", FILE.with_name("hive-cli"), *line],
        env={"HOME": str(home), "PATH": os.defpath, "LANG": "de_DE.UTF-8"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    modules = re.findall(r"^import time: .*\| +([\w.]+)$", done.stderr, re.M)
    hive_began = modules.index("__future__")  # what site imports before it, is not ours
    return {name.partition(".")[0] for name in modules[hive_began:]}


def test_a_send_through_the_socket_imports_nothing_that_it_does_not_need(hive: Hive) -> None:
    hive.forks = False
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
