"""Journal: what must survive the daemon, on a real disk."""

from __future__ import annotations

import io
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import hive

Open = Callable[..., hive.Journal]


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def open_journal(folder: Path, log: io.StringIO) -> Iterator[Open]:
    """Open the journal of a folder; it is closed when the test ends, or before that."""
    opened: list[hive.Journal] = []

    def open_one(directory: Path = folder, instance: str = "this-run") -> hive.Journal:
        opened.append(hive.Journal(directory, instance, hive.Log("debug", "json", log)))
        return opened[-1]

    yield open_one
    for journal in opened:
        journal.close()


def errors(log: io.StringIO) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in log.getvalue().splitlines()]
    return [row for row in rows if row["level"] in ("warning", "error")]


def rows(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "journal.sqlite3")) as database:
        return int(database.execute("SELECT count(*) FROM seen").fetchone()[0])


def fill(journal: hive.Journal, ids: range) -> None:
    for i in ids:
        assert journal.remember(f"id-{i}")
        journal.commit()


def test_an_id_is_new_once(open_journal: Open) -> None:
    journal = open_journal()
    answers = [journal.remember(id) for id in ("a", "b", "a", "b", "c")]
    assert answers == [True, True, False, False, True]
    assert journal.on_disk


def test_ids_differ_in_every_character(open_journal: Open) -> None:
    journal = open_journal()
    assert all(journal.remember(id) for id in ("a", "A", "1", "01", "1.0", "a.", "a:", "a" * 64))


def test_ids_survive_a_restart(open_journal: Open, log: io.StringIO) -> None:
    journal = open_journal()
    fill(journal, range(3))
    journal.close()
    journal = open_journal()
    assert [journal.remember(id) for id in ("id-0", "id-2", "id-3")] == [False, False, True]
    assert errors(log) == []


def test_what_was_not_committed_is_committed_at_the_end(open_journal: Open) -> None:
    journal = open_journal()
    journal.remember("a")
    journal.close()
    assert not open_journal().remember("a")


def test_a_committed_id_can_be_read_by_others_at_once(open_journal: Open, folder: Path) -> None:
    journal = open_journal()
    journal.remember("a")
    assert rows(folder) == 0
    journal.commit()
    assert rows(folder) == 1


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import hive, pathlib
journal = hive.Journal(pathlib.Path(sys.argv[2]), "that-run", hive.Log())
journal.remember("kept")
journal.commit()
journal.remember("half")
print("ready", flush=True)
time.sleep(60)
"""


def test_ids_survive_kill_9_and_the_lock_does_not(
    open_journal: Open, folder: Path, log: io.StringIO
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(ROOT), str(folder)], stdout=subprocess.PIPE
    )
    assert child.stdout
    with child.stdout:
        assert child.stdout.readline() == b"ready\n"
        with pytest.raises(hive.BrokerError, match="another daemon runs with"):
            open_journal()
        child.send_signal(signal.SIGKILL)
        child.wait()
    journal = open_journal()
    assert journal.predecessor == "that-run"
    assert not journal.remember("kept")
    assert journal.remember("half")
    assert errors(log) == []


def test_a_second_daemon_is_turned_away_and_the_first_is_undisturbed(
    open_journal: Open, folder: Path
) -> None:
    first = open_journal(instance="first")
    with pytest.raises(hive.BrokerError) as refused:
        open_journal(instance="second")
    assert str(folder) in str(refused.value)
    assert refused.value.exit == hive.Exit.BROKER
    assert first.remember("a")
    first.close()
    assert open_journal(instance="third").predecessor == "first"


def test_each_run_learns_the_name_of_the_one_before(open_journal: Open) -> None:
    seen = []
    for instance in ("a-long-name-of-the-first-run", "second", "third"):
        journal = open_journal(instance=instance)
        seen.append(journal.predecessor)
        journal.close()
    assert seen == ["", "a-long-name-of-the-first-run", "second"]


def test_the_latest_ids_are_kept_and_the_oldest_forgotten(
    open_journal: Open, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_IDS", 50)
    monkeypatch.setattr(hive, "PRUNE_EVERY", 10)
    journal = open_journal()
    fill(journal, range(1000))
    assert 50 <= rows(folder) <= 61
    assert not any(journal.remember(f"id-{i}") for i in range(950, 1000))
    assert journal.remember("id-0")


def test_a_daemon_that_is_often_restarted_forgets_too(
    open_journal: Open, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_IDS", 50)
    monkeypatch.setattr(hive, "PRUNE_EVERY", 10)
    for run in range(20):
        journal = open_journal()
        fill(journal, range(run * 8, run * 8 + 8))
        journal.close()
    assert rows(folder) <= 70


@pytest.mark.parametrize(
    "damage", [b"this is no database" * 1000, b"\0" * 8192, b"SQLite format 3\0" + b"\xff" * 4080]
)
def test_a_damaged_file_is_set_aside(
    open_journal: Open, folder: Path, log: io.StringIO, damage: bytes
) -> None:
    journal = open_journal()
    fill(journal, range(3))
    journal.close()
    (folder / "journal.sqlite3").write_bytes(damage)
    journal = open_journal()
    assert journal.on_disk
    assert [error["event"] for error in errors(log)] == ["journal is damaged, set aside"]
    aside = Path(errors(log)[0]["file"])
    assert aside.parent == folder and aside.read_bytes() == damage
    fill(journal, range(3))
    journal.close()
    assert not open_journal().remember("id-0")
    assert len(errors(log)) == 1


RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import hive, pathlib
journal = hive.Journal(pathlib.Path(sys.argv[2]), "a-run", hive.Log())
assert journal.recall("never written") == {}
print(journal.remember("again"))
journal.close()
"""


def test_damage_that_shows_only_later_does_not_last_for_ever(
    open_journal: Open, folder: Path
) -> None:
    journal = open_journal()
    fill(journal, range(2000))
    journal.close()
    file = folder / "journal.sqlite3"
    whole = file.read_bytes()
    file.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    command = [sys.executable, "-c", RUN, str(ROOT), str(folder)]
    runs = [subprocess.run(command, capture_output=True, text=True) for _ in range(3)]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert runs[0].stdout == "True\n", "whatever happens, a message is acted upon"
    assert runs[0].stderr.count("level=error") == 1
    assert [run.stdout for run in runs[1:]] == ["False\n", "False\n"]


def test_a_note_survives_a_restart(open_journal: Open) -> None:
    journal = open_journal()
    assert journal.recall("a key") == {}
    journal.note("a key", {"first": 1})
    journal.note("a key", {"last": 1.5, "ok": None})
    journal.note("another", {})
    journal.close()
    assert open_journal().recall("a key") == {"last": 1.5, "ok": None}


def test_a_note_is_kept_without_a_disk_too(open_journal: Open, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    journal = open_journal(tmp_path / "file" / "x")
    journal.note("a key", {"ok": True})
    assert journal.recall("a key") == {"ok": True}


def test_what_is_kept_is_found_by_its_kind_and_id(open_journal: Open) -> None:
    journal = open_journal()
    journal.keep("told", "a", '{"text": "ä \u2028\\n😀"}')
    journal.keep("asked", "a", "")
    journal.keep("told", "A", "x" * 1_600_000)
    found = [journal.kept("told", "a"), journal.kept("asked", "a"), journal.kept("asked", "b")]
    assert found == ['{"text": "ä \u2028\\n😀"}', "", None]
    assert journal.kept("told", "A") == "x" * 1_600_000


def test_what_is_kept_again_is_replaced(open_journal: Open) -> None:
    journal = open_journal()
    for content in ("first", "second"):
        journal.keep("told", "a", content)
    assert journal.kept("told", "a") == "second"


@pytest.mark.parametrize("committed", [True, False])
def test_what_is_kept_survives_a_restart(open_journal: Open, committed: bool) -> None:
    journal = open_journal()
    journal.remember("a")  # so that a transaction is under way
    journal.keep("told", "a", "hello")
    if committed:
        journal.commit()
    journal.close()
    assert open_journal().kept("told", "a") == "hello"


def test_of_each_kind_the_latest_are_kept(
    open_journal: Open, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_KEPT", 10)
    journal = open_journal()
    journal.keep("asked", "a", "a question")
    journal.keep("told", "old", "old")
    for i in range(100):
        journal.keep("told", f"m-{i}", str(i))
        journal.keep("told", "again", str(i))
    with closing(sqlite3.connect(folder / "journal.sqlite3")) as database:
        counts = dict(database.execute("SELECT kind, count(*) FROM kept GROUP BY kind"))
    assert counts["told"] <= 10
    assert journal.kept("told", "old") is None
    assert [journal.kept("told", id) for id in ("m-99", "again")] == ["99", "99"]
    assert journal.kept("asked", "a") == "a question", "one kind does not push out another"


def test_many_messages_of_one_kind_leave_as_many_of_another(
    open_journal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_KEPT", 10)
    journal = open_journal()
    for i in range(10):
        journal.keep("asked", f"q-{i}", "a question")
        for j in range(20):
            journal.keep("told", f"m-{i}-{j}", "hello")
    assert all(journal.kept("asked", f"q-{i}") for i in range(10))


def test_messages_are_kept_without_a_disk_too(open_journal: Open, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    journal = open_journal(tmp_path / "file" / "x")
    journal.keep("told", "a", "hello")
    assert journal.kept("told", "a") == "hello"


def test_an_empty_file_is_a_new_journal(open_journal: Open, folder: Path, log: io.StringIO) -> None:
    folder.mkdir()
    (folder / "journal.sqlite3").touch()
    (folder / "lock").touch()
    journal = open_journal()
    assert journal.on_disk and journal.predecessor == ""
    assert errors(log) == []


def test_a_lock_file_full_of_rubbish_does_no_harm(open_journal: Open, folder: Path) -> None:
    folder.mkdir()
    (folder / "lock").write_bytes(b"\xff\xfe\0" * 100_000)
    assert open_journal(instance="this-run").remember("a")


def test_without_a_disk_it_goes_on_in_memory(
    open_journal: Open, tmp_path: Path, log: io.StringIO
) -> None:
    (tmp_path / "file").touch()
    journal = open_journal(tmp_path / "file" / "x")
    assert not journal.on_disk
    assert [journal.remember(id) for id in ("a", "b", "a")] == [True, True, False]
    journal.commit()
    assert not journal.remember("b")
    (error,) = errors(log)
    assert error["level"] == "error"
    assert str(tmp_path / "file" / "x") in error["why"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_in_a_folder_that_is_read_only_it_goes_on_in_memory(
    open_journal: Open, folder: Path, log: io.StringIO
) -> None:
    folder.mkdir(mode=0o500)
    journal = open_journal()
    assert not journal.on_disk
    assert [journal.remember(id) for id in ("a", "a")] == [True, False]
    assert len(errors(log)) == 1


def test_a_folder_in_place_of_the_file_does_not_keep_a_daemon_from_starting(
    open_journal: Open, folder: Path, log: io.StringIO
) -> None:
    (folder / "journal.sqlite3").mkdir(parents=True)
    journal = open_journal()
    assert not journal.on_disk
    assert [journal.remember(id) for id in ("a", "a")] == [True, False]
    assert len(errors(log)) == 1


def test_nobody_else_may_read_it(folder: Path, open_journal: Open) -> None:
    before = os.umask(0)
    try:
        journal = open_journal()
        journal.remember("a")
        journal.commit()
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert modes["journal.sqlite3"] == modes["lock"] == 0o600
    assert {mode & 0o077 for mode in modes.values()} == {0}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_missing_folders_are_made(open_journal: Open, tmp_path: Path) -> None:
    assert open_journal(tmp_path / "a" / "b" / "c").on_disk


def test_a_peers_long_messages_do_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_KEPT_SIZE", 10_000)
    journal = hive.Journal(tmp_path / "state", "this-run", hive.Log("error"))
    for i in range(20):
        journal.keep("told", f"m-{i}", "x" * 3000)
    journal.keep("asked", "m-1", "short")
    assert [i for i in range(20) if journal.kept("told", f"m-{i}")] == [17, 18, 19]
    assert journal.kept("asked", "m-1") == "short"
    journal.close()
