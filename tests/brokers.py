"""Run the end-to-end tests on other people's brokers, and print what works on which.

    make brokers                      on all of them
    make brokers BROKERS="nats amqtt" on these

Each is installed from Debian, npm or PyPI, and started by the tests themselves on a free port.
What fails is tried once more by itself, so that no busy machine is taken for a broker's fault.
Exits 0 whatever works: the table is the answer, which hive help brokers shows; each test that
failed is named after it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from conftest import ROOT
from other_brokers import OTHER_BROKERS, install

CLUSTER = "nats-x3"  # is no column: its members are killed one by one
KINDS = ("mosquitto", "embedded", *(kind for kind in OTHER_BROKERS if kind != CLUSTER))
ABILITIES = {  # what a user asks: the tests that answer it, by parts of their names
    "send, ask, answer": ("command_runs_a_handler", "failure_is_an_alert"),
    "kept while away": ("sent_while_a_node_is_away",),
    "a death is told": ("killed_node_is_noticed",),
    "status and roster": ("status_and_roster",),
    "broker restarts": ("broker_restart", "dies_while_the_broker_is_down"),
    "a name is taken": ("of_one_name",),
}
ALL_TESTS = "end-to-end tests"


def run_tests(kind: str, report: Path, names: Sequence[str] = ()) -> dict[str, bool]:
    """Each test's name on this broker, and whether it passed; of all, or of these by themselves."""
    words = ["-q", "--tb=no", "-n", "0" if names else "2", "--timeout", "180"]
    file = f"{ROOT}/tests/test_end_to_end.py"
    which = [f"{file}::{name}" for name in names] or [file]
    subprocess.run(
        [sys.executable, "-m", "pytest", *words, f"--junitxml={report}", *which],
        env={**os.environ, "HIVE_TEST_BROKERS": kind},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return {case.get("name", ""): case.find("failure") is None for case in cases}


def survives() -> bool:
    """Do nodes go on, and lose nothing, when members of a cluster are killed?"""
    install(CLUSTER)
    file = f"{ROOT}/tests/real_cluster.py"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "--timeout", "300", file]
    return 0 in (subprocess.run(command, stdout=subprocess.DEVNULL).returncode for _ in range(2))


def row(ability: str, parts: tuple[str, ...], results: dict[str, dict[str, bool]]) -> str:
    cells = []
    for passed in results.values():
        said = [ok for test, ok in passed.items() if any(part in test for part in parts)]
        cells.append("yes" if said and all(said) else "no" if said else "?")
    return line(ability, cells, [*results])


def line(ability: str, cells: Sequence[str], kinds: Sequence[str]) -> str:
    """Of a table that is also read as it stands."""
    first = max(len(each) for each in (*ABILITIES, ALL_TESTS))
    padded = (cell.ljust(max(len(kind), 5)) for cell, kind in zip(cells, kinds, strict=True))
    return f"| {ability.ljust(first)} | " + " | ".join(padded) + " |"


def main() -> None:
    kinds = sys.argv[1:] or KINDS
    results: dict[str, dict[str, bool]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            print(f"{kind} ...", file=sys.stderr, flush=True)
            if kind in OTHER_BROKERS:
                install(kind)
            report = Path(folder) / f"{kind}.xml"
            results[kind] = run_tests(kind, report)
            failed = [test for test, ok in results[kind].items() if not ok]
            if failed:
                results[kind] |= run_tests(kind, report, failed)
    print(line("", [*results], [*results]))
    print(re.sub(r"[^|]", "-", line("", [*results], [*results])))
    for ability, parts in ABILITIES.items():
        print(row(ability, parts, results))
    counts = [f"{sum(passed.values())}/{len(passed)}" for passed in results.values()]
    print(line(ALL_TESTS, counts, [*results]))
    if kinds is KINDS:
        lost = "nothing" if survives() else "something"
        print(f"\nmembers of a cluster of three ({CLUSTER}) are killed: {lost} is lost")
    for kind, passed in results.items():
        for test, ok in passed.items():
            if not ok:
                print(f"{kind}: {test} failed", file=sys.stderr)


if __name__ == "__main__":
    main()
