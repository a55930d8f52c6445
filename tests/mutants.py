"""How tight is the net: small mistakes made in hive.py by chance, each tried against the tests.

python tests/mutants.py [--count 150] [--seed 1] [--sections Packets,Broker] [--jobs 2]

Each mistake is made in a copy of the tree.  The tests of its section go first, then the wider
ones, until one of them fails, twice.  What was found is remembered in .cache/, so a run goes on
where it was stopped; after tests were written, `--again` tries the survivors once more.  A
survivor is a test that is missing, or a mistake that changes nothing; a person says which.

mutmut 3 and cosmic-ray were looked at first, in their documentation: one writes all mutants of
all functions into one file, which every node of a test would compile; the other knows neither
samples nor an order of tests; and neither mutates what stands outside functions.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
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
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "mutants"
RESULTS = CACHE / "results.jsonl"

# The tests of a section are test_SECTION.py and test_SECTION_*.py; these have others besides.
MORE_TESTS = {
    "Basics": "config envelope",
    "Broker": "packets limits",
    "BrokerHost": "connecting state_dir",
    "Client": "commands two_nodes end_to_end",
    "Commands": "end_to_end main web join",
    "Config": "home permissions schedule",
    "Control": "requests state_dir commands",
    "Daemon": "service node commands",
    "Database": "journal state_dir",
    "Doctor": "connecting state_dir senders",
    "Hosting": "join second_machine",
    "Join": "hosting second_machine",
    "Journal": "requests mqtt_client limits",
    "Loop": "service",
    "Main": "commands completion standard_streams",
    "Mosquitto": "senders hosting",
    "MqttClient": "node connecting limits senders",
    "Node": "requests mqtt_client limits metrics permissions senders",
    "Output": "metrics watch",
    "Packets": "broker",
    "Requests": "control commands metrics watch targets",
    "Routing": "permissions node",
    "Setup": "commands join",
    "Stream": "control broker",
    "Work": "schedule handlers node agent metrics",
}
WIDER = ("node", "requests", "control", "commands", "end_to_end")
SLOWEST_TEST = 60  # seconds: a single test that takes longer has failed
BOUND = 5  # times what the unmutated file takes, and a minute: more than that hangs
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

    def section(self, line: int) -> str:
        above = [name for number, name in self._banners if number < line]
        return above[-1] if above else ""

    def sample(self, count: int, seed: int, sections: list[str]) -> list[Mutant]:
        """Mutants of `count` lines, drawn by chance: each line is as likely as any other."""
        by_line: dict[int, list[tuple[ast.AST, Edit]]] = {}
        for statement in ast.parse(self.text).body:
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

    def put(self, source: bytes) -> None:
        """Replace hive.py."""
        shutil.rmtree(self.path / "__pycache__", ignore_errors=True)
        (self.path / "hive.py").write_bytes(source)

    def pytest(self, tests: list[str], bound: float) -> tuple[str, float]:
        """The first test that fails, "" if none does, "hang" after `bound` seconds; the seconds."""
        quiet = ("-q", "-x", "--tb=no", "-rfE", "-p", "no:cacheprovider")
        began = time.monotonic()
        run = subprocess.Popen(
            [sys.executable, "-m", "pytest", *quiet, f"--timeout={SLOWEST_TEST}", *tests],
            cwd=self.path,
            env=os.environ | {"MUTANT": str(self.path)},
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


class Net:
    """The tests, as they are tried one file after the other."""

    def __init__(self, source: Source, options: argparse.Namespace) -> None:
        self.source, self.options = source, options
        self._results = CACHE / "unmutated.json"
        self._times: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError):
            self._times = json.loads(self._results.read_text())
        names = sorted(file.stem for file in (ROOT / "tests").glob("test_*.py"))
        wider = [f"test_{name}" for name in WIDER]
        self._files = [n for n in wider if n in names] + [n for n in names if n not in wider]

    def files(self, section: str) -> tuple[list[str], list[str]]:
        """The test files of a section, and the wider ones, in their order."""
        mine, others = own_tests(section), {*map(own_tests, self.source.sections)}
        more = {f"test_{name}" for name in MORE_TESTS.get(section, "").split()}
        own = [
            n for n in self._files if n == mine or (n.startswith(f"{mine}_") and n not in others)
        ]
        own += [n for n in self._files if n in more and n not in own]
        return own, [n for n in self._files if n not in own][: self.options.wider]

    def unmutated(self, slot: Slot, name: str) -> float:
        """How long a file of tests takes; it passes as long as nothing is mutated."""
        key = f"{name} {hashlib.sha256((ROOT / f'tests/{name}.py').read_bytes()).hexdigest()[:8]}"
        if key not in self._times:
            before = (slot.path / "hive.py").read_bytes()
            slot.put(self.source.text)
            for _ in range(3):  # a busy machine may need more than one try
                failed, seconds = slot.pytest([f"tests/{name}.py"], 600)
                if not failed:
                    break
                print(f"unmutated: {failed} fails; again, or {name} is left out", flush=True)
            slot.put(before)
            self._times[key] = 0.0 if failed else seconds
            if not failed:
                passing = {name: taken for name, taken in self._times.items() if taken}
                self._results.write_text(json.dumps(passing, indent=1))
        return self._times[key]

    def trial(self, slot: Slot, mutant: Mutant) -> dict[str, Any]:
        """Which test finds a mutant out."""
        own, wider = self.files(mutant.section)
        slow = ""
        for names in (own, wider):
            times = {name: self.unmutated(slot, name) for name in names}
            slot.put(mutant.source)
            tests = [f"tests/{name}.py" for name, seconds in times.items() if seconds]
            expected = sum(times.values())
            bound = BOUND * expected + 60
            failed, seconds = slot.pytest(tests, bound) if tests else ("", 0.0)
            if failed and failed != "hang" and "::" in failed:
                again, _ = slot.pytest([failed], bound)
                if not again:  # it was not the mutant's doing: go on without this test
                    failed, seconds = slot.pytest([*tests, f"--deselect={failed}"], bound)
            if failed:
                return {"found": failed, "seconds": round(seconds)}
            if seconds > 3 * expected + 10:
                slow += f" {seconds:.0f} s instead of {expected:.0f} s"
        return {"found": "", "slow": slow.strip(), "wider": self.options.wider}


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
    parser.add_argument("--wider", type=int, default=99, help="how many files beyond a section's")
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
    known, net = remembered(), Net(source, options)
    slots: SimpleQueue[Slot] = SimpleQueue()
    for number in range(options.jobs):
        slots.put(Slot(number))

    def attempt(mutant: Mutant) -> None:
        before = known.get(mutant.key, {"found": "", "wider": -1})
        if not before["found"] and (options.again or before["wider"] < options.wider):
            slot = slots.get()
            row = {"key": mutant.key, **net.trial(slot, mutant)}
            slots.put(slot)
            known[mutant.key] = row
            with RESULTS.open("a") as file:
                print(json.dumps(row), file=file)
        outcome = known[mutant.key]["found"] or "SURVIVED"
        print(f"{mutant.section} {mutant.line}, {mutant.kind}: {outcome}", flush=True)

    pool = ThreadPoolExecutor(options.jobs)
    try:
        for _ in pool.map(attempt, mutants):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C: what is under way is finished first
    report(source, mutants, known)


if __name__ == "__main__":
    main()
