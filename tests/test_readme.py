"""The README and what hive help shows promise nothing that is not so."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, Hive

import hive as module

README = (ROOT / "README.md").read_text()
TOPICS = {file.stem: file.read_text() for file in sorted((ROOT / "contrib/help").glob("*.md"))}
ALL = re.sub(r" +(?=\|)", " ", "\n".join([README, *TOPICS.values()]))  # its tables are aligned
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", ALL, re.S)
CONSOLE = re.sub(r" +# .*", "", "".join(body for kind, body in BLOCKS if kind == "console"))
TYPED = re.findall(r"^\$ (?:.*[ |])?((?:python3? hive(?:\.py)?|hive) .*)$", CONSOLE, re.M)
NAMED = re.findall(r"`(hive [a-z][^`]*)`", ALL.replace("\n  ", " ").replace("\n", " "))
COMMANDS = sorted({re.split(r" [&#>|]", line)[0] for line in TYPED})


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_that_it_shows_can_be_typed(line: str) -> None:
    words = shlex.split(line)
    arguments = words[2:] if words[0].startswith("python") else words[1:]
    assert module.make_parser().parse_args(arguments).run


@pytest.mark.parametrize("line", sorted({*NAMED}))
def test_every_command_that_it_names_is_one(line: str) -> None:
    name, *rest = line.removeprefix("hive ").split()
    known = {flag for flags, _ in module.COMMANDS[name].options for flag in flags}
    assert {word for word in rest if word.startswith("--")} <= known | {"--help"}


def test_it_shows_commands() -> None:
    assert len(TYPED) >= 8 and len(NAMED) >= 8


def test_it_is_short_and_fits_a_narrow_window() -> None:
    lines = README.splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 100] == []


def test_its_table_of_contents_leads_somewhere() -> None:
    headings = re.findall(r"^## (.*)$", README, re.M)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) == anchors
    files = re.findall(r"\]\(([^#)]+)\)", README) + re.findall(r'src(?:set)?="([^"]+)"', README)
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_its_first_screen_is_what_comes_back(hive: Hive) -> None:
    alpha = hive.node("alpha")
    alpha.handler("ping", (ROOT / "hive-daemon.d" / "ping").read_text())
    alpha.start()
    first = next(body for kind, body in BLOCKS if kind).splitlines()
    asked = first.index("$ hive send --to all --action ping --text hello --wait 5")
    answered = hive.cli("alpha", *shlex.split(first[asked])[2:])
    assert answered.stdout == first[asked + 1] + "\n"
    listed = first.index("$ hive roster")
    shown = hive.cli("alpha", "roster").stdout.splitlines()
    assert shown[0].split() == first[listed + 1].split()
    assert shown[1].split()[:3] == first[listed + 2].split()[:3]


def test_its_configuration_is_accepted(tmp_path: Path) -> None:
    for file in ("mqtt-password", "hook-token"):
        (tmp_path / file).write_text("x\n")
    for kind, body in BLOCKS:
        if kind == "toml":
            module.make_config(tomllib.loads(body), tmp_path / "hive.toml", {})


def test_its_error_line_is_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hive.toml").write_text('[mqtt]\nhots = "broker.lan"\n')
    with pytest.raises(module.ConfigError) as raised:
        module.load_config("hive.toml")
    assert f"hive: {raised.value}" in CONSOLE


def test_its_envelope_is_one() -> None:
    (body,) = (body for kind, body in BLOCKS if kind == "json")
    assert module.Envelope.check(json.loads(body)).to == "beta"


def test_it_names_every_channel_exit_code_command_and_variable() -> None:
    for channel in module.CHANNELS.values():
        assert f"| `{channel.name}` | {channel.meaning} |" in ALL
    for code in module.Exit:
        assert f"| {code.value} |" in ALL
    for name in module.COMMANDS:
        assert re.search(rf"\bhive(-cli|\.py)? {name}\b", ALL), name
    envelope = module.Envelope.new("a", "b", "command", "x")
    instance = module.InstanceConfig(name="main")
    environment = module.handler_environment(envelope, "b", "hive", instance, {})
    for variable in environment:
        assert variable in ALL


def test_it_says_how_long_the_file_is_and_its_spine() -> None:
    (said,) = re.findall(r"about (\d+) lines", README)
    (spine,) = re.findall(r"The first\s(\d+) are its spine", README)
    lines = (ROOT / "hive.py").read_text().splitlines()
    ends = next(n for n, line in enumerate(lines) if line.startswith("# ---- Config: "))
    assert abs(len(lines) - int(said)) < 300
    assert abs(ends - int(spine)) < 300


def test_it_names_every_way_to_an_agent() -> None:
    assert all(f"| `{via}`" in ALL for via in module.VIA)


def test_the_table_of_brokers_is_that_which_make_brokers_prints() -> None:
    from brokers import ABILITIES, ALL_TESTS, KINDS, line

    shown = TOPICS["brokers"]
    assert line("", KINDS, KINDS) in shown
    rows = re.findall(r"^\| (.*?) +\|(?: yes +\|| no +\|| \d+/\d+ +\|)+$", shown, re.M)
    assert [*ABILITIES, ALL_TESTS] == rows
