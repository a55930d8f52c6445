"""contrib/handlers/check-disk and check-url: the two small sentinels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Hive, calls_of, eventually, free_port
from feed import Feed, self_signed
from sentinels import HANDLERS, Scheduled

HEAD = "Filesystem 1024-blocks Used Available Capacity Mounted on\n"


@pytest.fixture
def df(tmp_path: Path) -> Path:
    """What df says of disks, for no test may fill one."""
    said = tmp_path / "disks"
    said.write_text(HEAD)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "df").write_text(f"#!/bin/sh\nexec cat '{said}'\n")
    (tmp_path / "bin" / "df").chmod(0o755)
    return said


def check_disk(path: str) -> tuple[int, str]:
    done = subprocess.run(
        [HANDLERS / "check-disk"], env={"PATH": path}, capture_output=True, text=True
    )
    return done.returncode, done.stdout


def test_a_disk_that_is_nearly_full_is_named(df: Path) -> None:
    df.write_text(
        f"{HEAD}/dev/vda 100 89 11 89% /\ntmpfs 9 9 0 100% /run\n"
        "/dev/mapper/my-data 100 90 10 90% /mnt/My Disk 90%\n/dev/sr0 1 1 0 100% /media\n"
    )
    said = "/mnt/My Disk 90% is at least 90 % full\n/media is at least 90 % full\n"
    assert check_disk(f"{df.parent}/bin:{os.environ['PATH']}") == (0, said)
    df.unlink()
    assert check_disk(f"{df.parent}/bin:{os.environ['PATH']}") == (1, "")


def test_this_machine_can_be_asked() -> None:
    assert check_disk(os.environ["PATH"])[0] == 0


def test_an_agent_is_woken_when_a_disk_fills_and_when_it_is_well_again(
    hive: Hive, fast_agent: Path, df: Path
) -> None:
    home = hive.node(
        "home",
        f'[[oc_instances]]\nname = "main"\nopenclaw_cmd = ["{fast_agent}"]\n'
        '[[schedule]]\naction = "check-disk"\nevery = "1s"\nnotify = "output"\n',
    )
    home.environment["PATH"] = f"{df.parent}/bin:{os.environ['PATH']}"
    home.handler("check-disk", (HANDLERS / "check-disk").read_text())
    home.start()
    eventually("two silent runs", lambda: len(home.events("handler ended")) >= 2)
    assert not calls_of(fast_agent)
    df.write_text(f"{HEAD}/dev/vda 100 95 5 95% /\n")
    eventually("the agent is told", lambda: len(calls_of(fast_agent)) == 1)
    runs = len(home.events("handler ended"))
    eventually("two more runs", lambda: len(home.events("handler ended")) >= runs + 2)
    df.write_text(HEAD)
    eventually("the agent is told once more", lambda: len(calls_of(fast_agent)) == 2)
    assert "/ is at least 90 % full" in str(calls_of(fast_agent)[0])


class Pages(Scheduled):
    """A machine with check-url, and hive's part of the contract."""

    def __init__(self, home: Path) -> None:
        super().__init__(home, "check-url", home / "check-url")
        line = f'{sys.executable} -S {HANDLERS / "check-url"} "$@"'
        self.program.write_text(f"#!/bin/sh\nPYTHONDONTWRITEBYTECODE=1 exec {line}\n")
        self.program.chmod(0o755)

    def watch(self, url: str, more: str = "", top: str = "") -> None:
        self.write(f'{top}\n[[page]]\nname = "web"\nurl = "{url}"\n{more}\n')


@pytest.fixture
def pages(tmp_path: Path) -> Pages:
    return Pages(tmp_path)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return self_signed(tmp_path)


@pytest.fixture
def site(certificate: Path) -> Iterator[Feed]:
    site = Feed(certificate)
    site.serve(b"hello")
    yield site
    site.close()


def test_a_page_that_answers_is_no_news(pages: Pages, site: Feed, certificate: Path) -> None:
    pages.watch(f"{site.url}?a=b", f'ca_file = "{certificate}"')
    said = pages.scheduled()
    assert (said["news"], said["problems"]) == (False, {})
    assert [asked[:2] for asked in site.asked] == [("GET", "/c.ics?a=b")]
    site.serve(b"", 302, Location="https://nowhere.invalid/")
    assert pages.scheduled()["problems"] == {}


def test_a_page_that_fails_is_news_at_the_third_time_and_when_it_is_back(
    pages: Pages, site: Feed, certificate: Path
) -> None:
    pages.watch(site.url, f'ca_file = "{certificate}"')
    site.serve(b"", 502)
    said = [pages.scheduled() for _ in range(4)]
    assert [one["news"] for one in said] == [False, False, True, False]
    assert "web fails: HTTP 502" in said[2]["text"]
    site.serve(b"hello")
    assert "web works again" in pages.scheduled()["text"]


def test_a_certificate_that_ends_soon_is_told_once(
    pages: Pages, site: Feed, certificate: Path
) -> None:
    trust = f'ca_file = "{certificate}"'
    pages.watch(site.url, trust)
    assert pages.scheduled()["news"] is False  # 20 days are more than 14
    pages.watch(site.url, trust, 'expires = "30d"')
    assert "! web: its certificate ends in 20 days, on " in pages.scheduled()["text"]
    assert pages.scheduled()["news"] is False


def test_what_is_no_page_is_one_line(pages: Pages, site: Feed) -> None:
    pages.watch(site.url)
    assert pages.scheduled()["problems"]["web"].startswith("certificate: self-signed")
    pages.watch(f"http://127.0.0.1:{free_port()}/")
    assert pages.scheduled()["problems"] == {"web": "Connection refused"}
    pages.watch("gopher://example.org/")
    done = pages.run()
    assert done.returncode == 2 and "not an address that begins with https://" in done.stderr


def test_the_shell_finds_nothing_to_say_of_check_disk() -> None:
    if shell := shutil.which("dash") or shutil.which("sh"):
        subprocess.run([shell, "-n", HANDLERS / "check-disk"], check=True)
