"""How tight is the net: small mistakes made in hive.py by chance, each tried against the tests.

python tests/mutants.py [--count 150] [--seed 1] [--sections Packets,Broker] [--jobs 2]

Each mistake is made in a copy of the tree.  The tests that run the changed function (learned
once, by running them all with a hive.py that says which of its functions run) are tried, those
of its section first, the quick before the slow, until one of them fails, twice.  What was found
is remembered in .cache/, so a run goes on where it was stopped; after tests were written,
`--again` tries the survivors once more.  A survivor is a test that is missing, or a mistake
that changes nothing; a person says which.

mutmut 3 and cosmic-ray were looked at first, in their documentation: one writes all mutants of
all functions into one file, which every node of a test would compile; the other knows neither
samples nor an order of tests; and neither mutates what stands outside functions.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import fcntl
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "mutants"
RESULTS = CACHE / "results.jsonl"

SLOWEST_TEST = 60  # seconds: a single test that takes longer has failed
BOUND = 5  # times what the tests take unmutated, and a minute: more than that hangs
OTHER_COMPARISON: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<= >="),
    ast.LtE: ("<=", "< >"),
    ast.Gt: (">", ">= <="),
    ast.GtE: (">=", "> <"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
OTHER_OPERATOR: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "//"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
Edit = tuple[str, int, int, str]  # its kind; from and to which byte; what stands there instead


@dataclass(frozen=True)
class Mutant:
    section: str
    line: int
    kind: str
    source: bytes

    @property
    def key(self) -> str:
        return hashlib.sha256(self.source).hexdigest()[:16]

    def diff(self, original: bytes) -> str:
        before, after = (text.decode().splitlines() for text in (original, self.source))
        lines = difflib.unified_diff(before, after, lineterm="", n=0)
        return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


class Source:
    """hive.py, and every small mistake that can be made in it."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        lines = text.splitlines(keepends=True)
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line))
        self._banners = [
            (number, found[1].decode())
            for number, line in enumerate(lines, 1)
            if (found := re.match(rb"# ---- (\w+):", line))
        ]
        self.sections = [name for _, name in self._banners]
        self._tree = ast.parse(text)
        self._functions = [
            (min(one.lineno for one in (n, *n.decorator_list)), n.end_lineno, name)
            for n, name in self._named(self._tree, "")
        ]

    def section(self, line: int) -> str:
        above = [name for number, name in self._banners if number < line]
        return above[-1] if above else ""

    def functions(self, line: int) -> set[str]:
        """Those that run what stands in a line: its own, its class's, or those that name it."""
        around = [f for f in self._functions if f[0] <= line <= f[1]]
        if around:
            return {max(around)[2]}  # the innermost
        for statement in self._tree.body:
            if statement.lineno <= line <= (statement.end_lineno or 0):
                names = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}
                if isinstance(statement, ast.ClassDef):
                    names = {statement.name}
                elif isinstance(statement, ast.Assign | ast.AnnAssign):
                    names = self._assigned(statement)
                    for other in self._tree.body:  # a table has the constant in it
                        if isinstance(other, ast.Assign | ast.AnnAssign) and names & {
                            n.id for n in ast.walk(other) if isinstance(n, ast.Name)
                        }:
                            names |= self._assigned(other)
                return {
                    name
                    for first, last, name in self._functions
                    if name.partition(".")[0] in names
                    or names & {*re.findall(r"\w+", self._between_lines(first, last))}
                }
        return set()

    @staticmethod
    def _assigned(statement: ast.Assign | ast.AnnAssign) -> set[str]:
        """The names that it gives values to."""
        targets: list[ast.expr] = getattr(statement, "targets", [])
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        return {n.id for one in targets for n in ast.walk(one) if isinstance(n, ast.Name)}

    def _between_lines(self, first: int, last: int) -> str:
        return self.text[self._starts[first - 1] : self._starts[last]].decode()

    def instrumented(self, slot: Path) -> bytes:
        """The same, but each function says that it runs."""
        recorder, lines = slot / ".ran" / "recorder", self.text.decode().splitlines()
        marks: dict[int, str] = {}
        for node, name in self._named(self._tree, ""):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                first = min([body[0], *getattr(body[0], "decorator_list", [])], key=self._line)
                if not lines[first.lineno - 1][: first.col_offset].strip("@ "):
                    marks[first.lineno] = f"{' ' * body[0].col_offset}_ran({name!r})"
        head = next(n for n, line in enumerate(lines) if line.startswith("from __future__"))
        for number in sorted(marks, reverse=True):
            lines.insert(number - 1, marks[number])
        lines.insert(head + 1, f"exec(open({str(recorder)!r}).read())")
        return "\n".join(lines).encode() + b"\n"

    @staticmethod
    def _line(node: Any) -> int:
        return int(node.lineno)

    def _named(self, node: ast.AST, name: str) -> Iterator[tuple[Any, str]]:
        for child in ast.iter_child_nodes(node):
            inner = f"{name}.{getattr(child, 'name', '')}".lstrip(".")
            if isinstance(child, ast.FunctionDef):
                yield child, inner
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield from self._named(child, inner)
            elif isinstance(child, ast.stmt):
                yield from self._named(child, name)

    def sample(self, count: int, seed: int, sections: list[str]) -> list[Mutant]:
        """Mutants of `count` lines, drawn by chance: each line is as likely as any other."""
        by_line: dict[int, list[tuple[ast.AST, Edit]]] = {}
        for statement in self._tree.body:
            for node in self._nodes(statement):
                line = getattr(node, "lineno", 0)
                if self.section(line) in sections:
                    edits = [(statement, edit) for edit in self._edits(node)]
                    by_line.setdefault(line, []).extend(edits)
        chance = random.Random(seed)
        lines = sorted(by_line)
        chance.shuffle(lines)
        found: list[Mutant] = []
        for line in lines:
            chance.shuffle(by_line[line])
            for around, (kind, start, end, new) in by_line[line]:
                first, last = self._span(around)
                before, after = self.text[first:start], self.text[end:last]
                if len(found) < count and self._is_valid(before + new.encode() + after):
                    text = self.text[:start] + new.encode() + self.text[end:]
                    found.append(Mutant(self.section(line), line, kind, text))
                    break
        return found

    def _is_valid(self, text: bytes) -> bool:
        """Does it parse, and is it not what stood there before?"""
        with contextlib.suppress(SyntaxError):
            return text not in self.text and bool(ast.parse(text))
        return False

    def _nodes(self, node: ast.AST) -> Iterator[ast.AST]:
        """What a test could assert: no types, no help, nothing that is only logged."""
        if self._is_beside_the_point(node):
            return
        yield node
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from self._nodes(child)

    def _is_beside_the_point(self, node: ast.AST) -> bool:
        match node:
            case ast.JoinedStr():  # a text; and Python 3.11 misplaces what is in it
                return True
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                return True
            case ast.ClassDef(bases=[*_, ast.Name(id="Protocol")]):
                return True
            case ast.Expr(value=ast.Constant()):
                return True
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr=level))):
                return level == "debug"
            case ast.keyword(arg="help" | "metavar" | "strict"):
                return True
        return False

    def _span(self, node: Any) -> tuple[int, int]:
        start = self._starts[node.lineno - 1] + node.col_offset
        return start, self._starts[node.end_lineno - 1] + node.end_col_offset

    def _of(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self.text[start:end].decode()

    def _between(self, left: ast.AST, right: ast.AST, old: str, new: str) -> tuple[int, int, str]:
        """An operator between two operands, and what stands there instead."""
        start, end = self._span(left)[1], self._span(right)[0]
        gap = self.text[start:end].decode()
        return start, end, re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", new, gap, count=1)

    def _edits(self, node: ast.AST) -> Iterator[Edit]:
        yield from self._edits_of_values(node)
        yield from self._edits_of_statements(node)

    def _edits_of_values(self, node: ast.AST) -> Iterator[Edit]:
        match node:
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                operands = [left, *comparators]
                for op, one, other in zip(ops, operands, comparators, strict=False):
                    old, others = OTHER_COMPARISON[type(op)]
                    for new in [others] if "i" in others else others.split():
                        yield ("comparison", *self._between(one, other, old, new))
            case ast.BoolOp(op=op, values=values):
                old, new = ("and", "or") if isinstance(op, ast.And) else ("or", "and")
                start, end = self._span(node)
                for one, other in itertools.pairwise(values):
                    yield ("boolean", *self._between(one, other, old, new))
                for value in values:
                    rest = f" {old} ".join(f"({self._of(v)})" for v in values if v is not value)
                    yield "dropped condition", start, end, f"({rest})"
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OTHER_OPERATOR:
                if not re.match(r"[A-Z]\w*[a-z]|None|f?b?[\"']", self._of(right)):  # a type, a text
                    old, new = OTHER_OPERATOR[type(op)]
                    yield ("arithmetic", *self._between(left, right, old, new))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield "dropped not", *self._span(node), f"bool({self._of(operand)})"
            case ast.Constant(value=bool(value)):
                yield "constant", *self._span(node), str(not value)
            case ast.Constant(value=int(value)):
                for number in (value + 1, value - 1):
                    yield (
                        "constant",
                        *self._span(node),
                        f"({number})" if number < 0 else str(number),
                    )
            case ast.Constant(value=float(value)):
                for factor in (2, 0.5):
                    yield "constant", *self._span(node), str(value * factor or 1.0)
            case ast.Slice(lower=lower, upper=upper):
                for bound in (lower, upper):
                    if bound:
                        yield "slice", *self._span(bound), f"({self._of(bound)}) + 1"
                        yield "slice", *self._span(bound), ""
            case ast.Call(func=ast.Name(id="min" | "max" as name)):
                yield "other end", *self._span(node.func), "max" if name == "min" else "min"
            case ast.Call(args=args, keywords=keywords):
                yield from self._dropped_keywords(args, keywords)
            case ast.IfExp(test=test):
                yield "negated condition", *self._span(test), f"not ({self._of(test)})"
            case ast.comprehension(ifs=ifs):
                for test in ifs:
                    yield "filter", *self._span(test), f"not ({self._of(test)})"
                    yield "filter", *self._span(test), "True"

    def _dropped_keywords(
        self, args: list[ast.expr], keywords: list[ast.keyword]
    ) -> Iterator[Edit]:
        everything = sorted([*args, *keywords], key=self._span)
        for number, one in enumerate(everything):
            if isinstance(one, ast.keyword) and not self._is_beside_the_point(one):
                start, end = self._span(one)
                if number:
                    start = self._span(everything[number - 1])[1]
                elif len(everything) > 1:
                    end = self._span(everything[1])[0]
                yield "dropped argument", start, end, ""

    def _edits_of_statements(self, node: ast.AST) -> Iterator[Edit]:
        match node:
            case ast.If(test=test) | ast.While(test=test):
                if not isinstance(test, ast.Constant):
                    yield "negated condition", *self._span(test), f"not ({self._of(test)})"
            case ast.Expr(value=ast.Call()) | ast.Delete() | ast.Raise():
                yield "removed statement", *self._span(node), "pass"
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                yield "removed statement", *self._span(node), "pass"
            case ast.AugAssign(target=target, op=op, value=value):
                yield "removed statement", *self._span(node), "pass"
                if type(op) in OTHER_OPERATOR:
                    old, new = OTHER_OPERATOR[type(op)]
                    yield ("arithmetic", *self._between(target, value, old, new))
            case ast.Return(value=ast.expr() as value):
                if not (isinstance(value, ast.Constant) and value.value is None):
                    yield "return value", *self._span(value), "None"
            case ast.Continue():
                yield "continue", *self._span(node), "break"
            case ast.Break():
                yield "break", *self._span(node), "continue"
            case ast.ExceptHandler(type=ast.Tuple(elts=errors)):
                for error in errors:
                    rest = ", ".join(self._of(e) for e in errors if e is not error)
                    yield "exception", *self._span(node.type), f"({rest},)"
            case ast.ExceptHandler(type=ast.expr() as error):
                yield "exception", *self._span(error), "NotImplementedError"


# ---- the tests -----------------------------------------------------------------------------


class Slot:
    """A copy of the tree, in which one mutant after the other is tried."""

    def __init__(self, number: int) -> None:
        self.path = CACHE / f"slot{number}"
        shutil.rmtree(self.path, ignore_errors=True)
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
            if name and (ROOT / name).is_file():
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.path / name)
        (self.path / ".venv").symlink_to(ROOT / ".venv")
        ran = self.path / ".ran"
        ran.mkdir()
        ran.chmod(0o777)  # some tests run nodes as other users
        paths = {name: str(ran / name) for name in ("current", "reports", "recorder")}
        (ran / "recorder").write_text(
            RECORDER.format(current=paths["current"], lines=str(ran / "ran"))
        )
        (ran / "ran_plugin.py").write_text(PLUGIN.format(**paths))

    def put(self, source: bytes) -> None:
        """Replace hive.py."""
        shutil.rmtree(self.path / "__pycache__", ignore_errors=True)
        (self.path / "hive.py").write_bytes(source)

    def lines(self, name: str, parse: Callable[[str], Any]) -> Iterator[Any]:
        """What an instrumented run has left, which is then forgotten."""
        with contextlib.suppress(OSError):
            text = (self.path / ".ran" / name).read_text()
            (self.path / ".ran" / name).unlink()
            yield from map(parse, text.splitlines())

    def pytest(self, tests: list[str], bound: float, *options: str) -> tuple[str, float]:
        """The first test that fails, "" if none does, "hang" after `bound` seconds; the seconds."""
        quiet = ("-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *(options or ["-x"]))
        arguments = self.path / "arguments"  # there may be more than a command line takes
        arguments.write_text("\n".join(tests))
        began = time.monotonic()
        run = subprocess.Popen(
            [sys.executable, "-m", "pytest", *quiet, f"--timeout={SLOWEST_TEST}", f"@{arguments}"],
            cwd=self.path,
            env=os.environ | {"MUTANT": str(self.path), "PYTHONPATH": str(self.path / ".ran")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = run.communicate(timeout=bound)
            found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", said, re.M)
            failed = found[1] if found else f"exit {run.returncode}" if run.returncode else ""
        except subprocess.TimeoutExpired:
            failed = "hang"
        finally:
            self._end_what_is_left(run.pid)
        return failed, time.monotonic() - began

    def _end_what_is_left(self, group: int) -> None:
        """End what a broken node has left running."""
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
        mark = f"MUTANT={self.path}".encode()
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in environment.read_bytes().split(b"\0"):
                    os.kill(int(environment.parent.name), signal.SIGKILL)


def own_tests(section: str) -> str:
    """MqttClient: test_mqtt_client."""
    return "test_" + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", section).lower()


# Put before the instrumented hive.py: in each process that reads it, the first time that a
# function runs in a test, a line says so.  `ran_test` is pytest's own; a child looks once.
RECORDER = """
import builtins as _b, os as _o
if not hasattr(_b, "_ran"):
    _b.ran_test = None
    def _ran(name, _seen=set()):
        if _b.ran_test is None:
            try:
                with open({current!r}) as _f:
                    _b.ran_test = _f.read()
            except OSError:
                _b.ran_test = ""
        if (_b.ran_test, name) not in _seen:
            _seen.add((_b.ran_test, name))
            try:
                _f = _o.open({lines!r}, _o.O_WRONLY | _o.O_APPEND | _o.O_CREAT, 0o666)
                _o.write(_f, f"{{_b.ran_test}}\\t{{name}}\\n".encode())
                _o.close(_f)
            except OSError:
                pass
    _b._ran = _ran
"""
PLUGIN = """
import builtins, json
builtins.ran_test = ""
exec(open({recorder!r}).read())
def pytest_runtest_logstart(nodeid, location):
    builtins.ran_test = nodeid
    with open({current!r}, "w") as file:
        file.write(nodeid)
def pytest_runtest_logreport(report):
    with open({reports!r}, "a") as file:
        print(json.dumps([report.nodeid, report.outcome, report.duration]), file=file)
"""


class Covers:
    """Which test runs which function, in its own process or in a child, and how long it takes."""

    def __init__(self, source: Source, options: argparse.Namespace) -> None:
        self.source, self.options = source, options
        self._path = CACHE / "covers.json"
        self._lock = threading.Lock()
        known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(self._path.read_text())
        self._files: dict[str, Any] = {}  # by file: of which text; by test: seconds, functions
        self.stale = []
        for file in sorted((ROOT / "tests").glob("test_*.py")):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
            if known.get(file.name, [""])[0] == digest:
                self._files[file.name] = known[file.name]
            else:
                self.stale.append((file.name, digest))

    def learn(self, slot: Slot, name: str, digest: str) -> None:
        """Run a file of tests with a hive.py that says which of its functions run."""
        tests: dict[str, Any] = {}
        slot.put(self.source.instrumented(slot.path))
        slot.pytest([f"tests/{name}"], 900, "-p", "ran_plugin")
        for test, outcome, seconds in slot.lines("reports", json.loads):
            known = tests.setdefault(test, [0.0, [], True])
            known[0] = round(known[0] + seconds, 3)
            known[2] = known[2] and outcome == "passed"
        for test, function in slot.lines("ran", lambda line: line.split("\t")):
            if test in tests:
                tests[test][1].append(function)
        passed = {test: [s, sorted({*names})] for test, (s, names, good) in tests.items() if good}
        with self._lock:
            if passed:
                self._files[name] = [digest, passed]
                self._path.write_text(json.dumps(self._files))
        print(f"{name}: {len(passed)} of {len(tests)} tests looked at", flush=True)

    def of(self, mutant: Mutant) -> tuple[list[str], float]:
        """The tests that run what is changed, its section's first, the quick before the slow."""
        own, functions = own_tests(mutant.section), self.source.functions(mutant.line)
        found = []
        for name, (_, tests) in self._files.items():
            others = not name.startswith(own)
            for test, (seconds, ran) in tests.items():
                if not functions.isdisjoint(ran) or not (functions or others):
                    found.append((others, seconds, test))
        chosen, total = [], 0.0
        for _, seconds, test in sorted(found):
            if total + seconds <= self.options.seconds:
                chosen.append(test)
                total += seconds
        return chosen, total

    def trial(self, slot: Slot, mutant: Mutant) -> dict[str, Any]:
        """Which test finds a mutant out."""
        tests, expected = self.of(mutant)
        slot.put(mutant.source)
        bound = BOUND * expected + 60
        failed, seconds = slot.pytest(tests, bound) if tests else ("", 0.0)
        if failed and failed != "hang" and "::" in failed:
            again, _ = slot.pytest([failed], bound)
            if not again:  # it was not the mutant's doing: go on without this test
                failed, seconds = slot.pytest([t for t in tests if t != failed], bound)
        if failed:
            return {"found": failed, "seconds": round(seconds)}
        slow = f"{seconds:.0f} s instead of {expected:.0f} s" if seconds > 3 * expected + 20 else ""
        return {"found": "", "slow": slow, "tests": len(tests), "budget": self.options.seconds}


def remembered() -> dict[str, dict[str, Any]]:
    if not RESULTS.exists():
        return {}
    return {row["key"]: row for row in map(json.loads, RESULTS.read_text().splitlines())}


def report(source: Source, mutants: list[Mutant], known: dict[str, dict[str, Any]]) -> None:
    """A table of the sections; then each survivor with what was changed."""
    drawn, found, hung = Counter[str](), Counter[str](), Counter[str]()
    survivors = []
    for mutant in mutants:
        row = known[mutant.key]
        drawn.update([mutant.section, "all"])
        if row["found"]:
            (hung if row["found"] == "hang" else found).update([mutant.section, "all"])
        else:
            survivors.append((mutant, row))
    for mutant, row in sorted(survivors, key=lambda pair: pair[0].line):
        print(f"\nsurvived: {mutant.section}, line {mutant.line}, {mutant.kind} {row['slow']}")
        print(mutant.diff(source.text))
    print(f"\n{'section':<14}{'drawn':>7}{'found':>7}{'hung':>7}{'survived':>10}")
    for name in [*(s for s in source.sections if drawn[s]), "all"]:
        left = drawn[name] - found[name] - hung[name]
        print(f"{name:<14}{drawn[name]:>7}{found[name]:>7}{hung[name]:>7}{left:>10}")
    if mutants:
        share = 100 * (found["all"] + hung["all"]) / len(mutants)
        print(f"{share:.0f} % found out, before a person has looked at the survivors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=150, help="how many to draw")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sections", default="", help="to draw from, with commas between them")
    parser.add_argument("--jobs", type=int, default=1, help="at the same time")
    parser.add_argument("--again", action="store_true", help="try survivors of earlier runs again")
    parser.add_argument("--seconds", type=float, default=90, help="of tests for each, at most")
    parser.add_argument("--list", action="store_true", help="show the sample, try nothing")
    options = parser.parse_args()
    source = Source((ROOT / "hive.py").read_bytes())
    sections = options.sections.replace(",", " ").split() or source.sections
    if unknown := {*sections} - {*source.sections}:
        parser.error(f"no such section: {', '.join(unknown)} (there are {source.sections})")
    mutants = source.sample(options.count, options.seed, sections)
    if options.list:
        for mutant in mutants:
            print(f"{mutant.section}, line {mutant.line}, {mutant.kind}")
            print(mutant.diff(source.text))
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    lock = (CACHE / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        parser.error(f"another run is under way in {CACHE}")
    known, covers = remembered(), Covers(source, options)
    slots: SimpleQueue[Slot] = SimpleQueue()
    for number in range(options.jobs):
        slots.put(Slot(number))

    def learn(stale: tuple[str, str]) -> None:
        slot = slots.get()
        covers.learn(slot, *stale)
        slots.put(slot)

    def attempt(mutant: Mutant) -> None:
        before = known.get(mutant.key, {"found": "", "budget": -1})
        if not before["found"] and (options.again or before["budget"] < options.seconds):
            slot = slots.get()
            row = {"key": mutant.key, **covers.trial(slot, mutant)}
            slots.put(slot)
            known[mutant.key] = row
            with RESULTS.open("a") as file:
                print(json.dumps(row), file=file)
        outcome = known[mutant.key]["found"] or "SURVIVED"
        print(f"{mutant.section} {mutant.line}, {mutant.kind}: {outcome}", flush=True)

    pool = ThreadPoolExecutor(options.jobs)
    try:
        for _ in pool.map(learn, covers.stale):
            pass
        for _ in pool.map(attempt, mutants):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C: what is under way is finished first
    report(source, mutants, known)


if __name__ == "__main__":
    main()
