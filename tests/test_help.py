"""hive help: what it lists, where it finds it, how it shows it, and that man shows the same."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, missing
from test_dist import build

import hive

FILES = sorted((ROOT / "contrib/help").glob("*.md"))
ALONE = [sys.executable, "-I", "-S"]


def run(*command: str | Path, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=home,
        env={"HOME": str(home), "PATH": os.environ["PATH"], **more},
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
    )


def on_a_terminal(*command: str | Path, lines: int, **more: str) -> str:
    """What somebody sees whose terminal has so many lines."""
    ours, its = pty.openpty()
    size = f'stty rows {lines} columns 80; exec "$@"'
    child = subprocess.Popen(
        ["sh", "-c", size, "sh", *command],
        stdin=its,
        stdout=its,
        stderr=its,
        env={"HOME": "/", "PATH": os.environ["PATH"], "TERM": "xterm", **more},
    )
    os.close(its)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux says so at the end
            part = b""
        if not part:
            break
        seen += part
    os.close(ours)
    child.wait(PATIENCE)
    return seen.decode().replace("\r\n", "\n")


def test_each_topic_has_its_file_and_each_file_is_a_topic() -> None:
    assert sorted(hive.TOPICS) == [file.stem for file in FILES]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_reads_well_in_a_terminal_of_80_columns(file: Path) -> None:
    text = file.read_text("utf-8")
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert not re.search(r"[ \t]$|\n\n\n|\t", text, re.M)
    assert re.match(r"# \w+: [^\n]{20,67}\n\n", text)
    assert not re.search(r"\]\(", text)  # a link is nothing in a terminal


def test_it_lists_the_topics(tmp_path: Path) -> None:
    listed = run(*ALONE, ROOT / "hive-cli", "help", home=tmp_path).stdout
    assert re.findall(r"^  (\w+) +\S", listed, re.M) == [*hive.TOPICS]
    assert max(map(len, listed.splitlines())) <= 80


def test_a_topic_is_its_file(tmp_path: Path) -> None:
    done = run(*ALONE, ROOT / "hive.py", "help", "trust", home=tmp_path)
    assert (done.stdout, done.stderr) == ((ROOT / "contrib/help/trust.md").read_text("utf-8"), "")


def test_a_command_is_its_help(tmp_path: Path) -> None:
    said = [
        run(*ALONE, ROOT / "hive-cli", *line, home=tmp_path).stdout
        for line in (("help", "send"), ("send", "--help"))
    ]
    assert said[0] == said[1] != ""


def test_what_is_neither_is_told_what_is_near(tmp_path: Path) -> None:
    for word, near in (("hanlders", "did you mean handlers?"), ("qqq", "see: hive help")):
        done = run(*ALONE, ROOT / "hive-cli", "help", word, home=tmp_path)
        assert done.stderr == f"hive: help: there is no topic or command '{word}'; {near}\n"
        assert done.returncode == hive.Exit.USAGE


def test_it_is_inside_the_one_file(tmp_path: Path) -> None:
    dist = build(tmp_path / "checkout")
    link = tmp_path / "link"
    link.symlink_to(dist)
    for program in (dist, link):
        done = run(*ALONE, program, "help", "brokers", home=tmp_path)
        assert (done.stdout, done.stderr) == (hive.help_topic("brokers"), "")


def test_through_a_link_it_is_found_beside_the_real_file(tmp_path: Path) -> None:
    (tmp_path / "link.py").symlink_to(ROOT / "hive.py")
    assert run(*ALONE, tmp_path / "link.py", "help", "agents", home=tmp_path).returncode == 0


def test_where_hive_py_came_alone_one_line_says_where_it_is(tmp_path: Path) -> None:
    shutil.copy(ROOT / "hive.py", tmp_path)
    for words in (["help", "agents"], ["help"]):
        done = run(*ALONE, tmp_path / "hive.py", *words, home=tmp_path)
        assert (done.stdout, done.returncode) == ("", hive.Exit.REFUSED)
        assert re.fullmatch(r"hive: \w+: hive.py came without its help; it is in .*\n", done.stderr)


def test_what_is_longer_than_the_terminal_goes_to_the_pager(tmp_path: Path) -> None:
    pager = tmp_path / "my pager"
    pager.write_text('#!/bin/sh\necho "$LESS, $1"; wc -l\n')
    pager.chmod(0o755)
    text = hive.help_topic("config")
    command: list[str | Path] = [*ALONE, ROOT / "hive-cli", "help", "config"]
    seen = on_a_terminal(*command, lines=24, PAGER=f"'{pager}' -x")
    assert seen.split() == ["FRX,", "-x", str(text.count("\n"))]
    assert on_a_terminal(*command, lines=200, PAGER=f"'{pager}' -x") == text
    assert on_a_terminal(*command, lines=24, PAGER="is-not-here") == text


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, ROOT / "contrib/man.py", folder], check=True)
    return folder


def test_each_topic_is_a_man_page(pages: Path) -> None:
    assert {f"hive-{topic}.7" for topic in hive.TOPICS} <= {page.name for page in pages.iterdir()}


def words(text: str) -> list[str]:
    """Without what is drawn around them, or hyphenated."""
    return re.findall(r"\w+", re.sub(r"[\u2010-]\n\s*|…|\.\.\.", "", text).lower())


@pytest.mark.parametrize("topic", hive.TOPICS)
def test_man_shows_every_word_and_has_nothing_to_say(topic: str, pages: Path) -> None:
    if not shutil.which("groff"):
        missing("groff is missing: make checkers installs it on Debian, as root")
    line = ["groff", "-man", "-Tutf8", "-ww", "-rHY=0", "-rLL=200n", "-P-c", "-P-b", "-P-u", "-P-o"]
    done = subprocess.run([*line, pages / f"hive-{topic}.7"], capture_output=True, encoding="utf-8")
    assert done.stderr == ""
    shown = re.sub("\x1b\\[[0-9;]*m|.\b", "", done.stdout)
    source = re.sub(r"(?m)^```\w*$", "", hive.help_topic(topic)).partition("\n")[2]
    it = iter(words(shown))
    assert [word for word in words(source) if word not in it] == []


def said_of_bounds() -> list[tuple[str, str]]:
    """Each topic, and what it says of a bound, as hive keeps it."""
    node, at_once = hive.HeartbeatConfig(), f"{hive.MAX_WEB_CONNECTIONS} connections"
    limits = hive.NodeConfig("x")
    return [
        ("agents", f"message that was cut ({hive.MAX_BODY // 1024} KiB)"),
        ("agents", f"waits {hive.DEFAULT_WAIT} s, or up to {hive.MAX_WAIT} on request"),
        ("handlers", f"It has {limits.handler_timeout:.0f} seconds unless configured"),
        ("handlers", f"kept up to {hive.MAX_TEXT // 1024} KiB"),
        ("handlers", f"end of stderr up to {hive.MAX_ERROR // 1024} KiB"),
        ("operation", f"More than {hive.FEW_NODES} nodes"),
        ("operation", f"the first {hive.MAX_SHARED_TEXT} characters are shown"),
        ("operation", f"{hive.MAX_PAGES} pages at once; {at_once}"),
        ("operation", f"after {hive.UNREAD_TIME:.0f} seconds no more"),
        ("operation", f"a heartbeat every {node.interval:.0f} seconds"),
        ("operation", f"({hive.MAX_OUTBOX:,} messages, on disk)"),
        ("operation", f"{limits.sender_rate:.0f} messages a second and {limits.sender_burst:,} at"),
        ("operation", f"{hive.MAX_MEMBERS:,} nodes and agents are known"),
        ("operation", f"{hive.MAX_DOCUMENTS // 1024**2} MiB of what they say"),
        ("operation", f"to one peer go at most {hive.MAX_OUTBOX * hive.ONE_SHARE:,.0f}"),
        ("operation", f"the log has {hive.MAX_REPEATS} lines a minute"),
        ("operation", f"more than {hive.MAX_LOSSES} nodes that are lost"),
    ]


@pytest.mark.parametrize(("topic", "said"), said_of_bounds())
def test_a_bound_is_what_the_help_says(topic: str, said: str) -> None:
    assert said in " ".join((ROOT / f"contrib/help/{topic}.md").read_text().split())
