"""hive completion in real shells, and hive(1): both made from the parser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, Hive, eventually, missing
from test_watch import Terminal, at_the_door

import hive as module


def need(program: str) -> str:
    found = shutil.which(program)
    return found or missing(f"{program} is missing: make checkers installs it on Debian, as root")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty one, in which hive is a command that works."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "hive"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/hive-cli" "$@"\n')
    command.chmod(0o755)
    (tmp_path / "some file.toml").touch()
    return tmp_path


def environment(home: Path) -> dict[str, str]:
    return {"HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}


def run(home: Path, *line: str) -> str:
    done = subprocess.run(
        line, cwd=home, env=environment(home), capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def bash(home: Path, typed: str) -> set[str]:
    """What it offers for the last word."""
    script = """source <(hive completion bash)
        read -ra COMP_WORDS <<<"$1"; [ "${1: -1}" != " " ] || COMP_WORDS+=("")
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _hive; printf '%s\\n' "${COMPREPLY[@]}" """
    return {*run(home, need("bash"), "-c", script, "bash", typed).split()}


def fish(home: Path, typed: str) -> set[str]:
    script = "hive completion fish | source; complete -C $argv[1]"
    lines = run(home, need("fish"), "--no-config", "-c", script, typed).splitlines()
    return {line.partition("\t")[0] for line in lines}


SHELLS = {"bash": bash, "fish": fish}
WHAT = (
    ("hive ", {*module.COMMANDS}),
    ("hive sta", {"status"}),
    ("hive --log-level info send --ch ", {*module.CHANNELS}),
    ("hive send --u", {"--urgency"}),
    ("hive handler ", {"list", "test"}),
    ("hive help tr", {"trust"}),
    ("hive init --no-", {"--no-tls", "--no-agents"}),
)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_commands_options_and_choices(shell: str, home: Path) -> None:
    for typed, expected in WHAT:
        offered = SHELLS[shell](home, typed)
        assert expected <= offered, typed
        more = {one for one in offered - expected if not one.startswith("-")}
        assert more <= {*module.COMMANDS}, typed


def test_zsh_completes_them_too_as_somebody_types(home: Path) -> None:
    seen = Terminal([need("zsh"), "-f", "-i"], environment(home) | {"PS1": "> "}, lines=50)
    try:
        seen.type(b"autoload -U compinit; compinit -u -D; source <(hive completion zsh)\n")
        seen.type(b"clear; echo ready\n")
        eventually("it is ready", lambda: seen.read().startswith("ready"))
        for typed, expected in WHAT:
            seen.type(b"\x15\x0c" + typed.encode() + b"\t")  # after an empty line, an empty screen
            seen.shows(*expected)
    finally:
        seen.close()


@pytest.mark.parametrize("shell", SHELLS)
def test_it_knows_names_where_the_daemon_does(shell: str, hive: Hive, home: Path) -> None:
    hive.node("alpha").start()
    hive.node("beta").start()
    config = hive.nodes["alpha"].config
    command = home / "bin" / "hive"
    command.write_text(command.read_text().replace('"$@"', f'--config "{config}" "$@"'))
    for typed in ("hive send --to ", "hive forget "):
        assert {"alpha", "beta", "all"} <= SHELLS[shell](home, typed)


def test_no_name_is_offered_and_nothing_said_where_no_daemon_runs(home: Path) -> None:
    assert bash(home, "hive send --to ") == set()
    assert run(home, "hive", "completion", "names") == ""


def test_what_is_no_name_never_gets_to_a_shell(hive: Hive) -> None:
    """A shell would run what bash's compgen finds in it."""
    states: dict[str, dict[str, str]] = {"$(touch x)": {}, "`id`": {}, "beta": {}, "a b": {}}
    with at_the_door(hive, "alpha", {"states": states}):
        assert hive.cli("alpha", "completion", "names").stdout == "all\nbeta\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_option_is_in_it(shell: str, home: Path) -> None:
    said = run(home, "hive", "completion", shell)
    for name, command in module.COMMANDS.items():
        assert re.search(rf"\b{name}\b", said)
        for flags, _ in command.options:
            for flag in flags if flags[0].startswith("-") else ():
                assert flag.lstrip("-") in said
    assert said.endswith("\n") and "hive.py" not in said.replace("beside this file or hive.py", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_has_no_fault(shell: str, home: Path) -> None:
    script = home / "script"
    script.write_text(run(home, "hive", "completion", shell))
    assert run(home, need(shell), "-n", str(script)) == ""


# hive(1)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, ROOT / "contrib/man.py", folder], check=True)
    return folder / "hive.1"


def test_the_man_page_has_every_command_option_and_example(page: Path) -> None:
    line = [need("groff"), "-man", "-Tutf8", "-ww", "-rHY=0", "-rLL=200n", "-P-c", "-P-b", "-P-u"]
    done = subprocess.run([*line, page], capture_output=True, encoding="utf-8")
    assert done.stderr == ""
    shown = " ".join(re.sub("\x1b\\[[0-9;]*m|.\b", "", done.stdout).replace("\u2010", "-").split())
    for name, command in module.COMMANDS.items():
        said = shown[shown.index(f" hive {name} ") :]
        for flags, how in command.options:
            assert all(flag in said for flag in flags if flag.startswith("-")), flags
            assert " ".join(str(how["help"]).split()) in said
        for example in command.examples.splitlines():
            assert " ".join(example.replace("hive.py ", "hive ").split()) in said
    for code in module.Exit:
        assert f" {code.value} " in shown[shown.index("EXIT STATUS") :]


def test_another_reader_of_man_pages_has_nothing_to_say_of_it(page: Path) -> None:
    done = subprocess.run(
        [need("mandoc"), "-T", "lint", "-W", "warning", page], capture_output=True, encoding="utf-8"
    )
    said = [one for one in done.stdout.splitlines() if "missing date" not in one]
    assert (said, done.stderr) == ([], "")  # the same whoever makes it, so without a date
