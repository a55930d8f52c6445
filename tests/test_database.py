"""Database: an SQLite file that may fail, on a real disk."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import fill_disk

import hive

TABLES = ("CREATE TABLE IF NOT EXISTS words (n INTEGER PRIMARY KEY, word TEXT UNIQUE)",)
INSERT = "INSERT OR IGNORE INTO words (word) VALUES (?)"

Open = Callable[[], hive.Database]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "words.sqlite3"


@pytest.fixture
def open_store(file: Path, log: io.StringIO) -> Iterator[Open]:
    """Open it; one that is open already is closed before."""
    opened: list[hive.Database] = []

    def open_one() -> hive.Database:
        while opened:
            opened.pop().close()
        opened.append(hive.Database(file, TABLES, hive.Log("debug", "text", log), "words are lost"))
        return opened[-1]

    yield open_one
    for store in opened:
        with contextlib.suppress(sqlite3.ProgrammingError):  # closed already
            store.close()


def words(store: hive.Database) -> list[str]:
    return [word for (word,) in store.read("SELECT word FROM words ORDER BY n")]


def on_disk(file: Path) -> list[str]:
    """What somebody else would read: what a crash leaves."""
    with closing(sqlite3.connect(file)) as database:
        return [word for (word,) in database.execute("SELECT word FROM words ORDER BY n")]


def test_only_its_user_may_read_it(open_store: Open, file: Path) -> None:
    open_store()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_what_was_committed_is_on_the_disk_and_nothing_before(open_store: Open, file: Path) -> None:
    store = open_store()
    store.write(INSERT, ("one",))
    assert on_disk(file) == []
    store.commit()
    assert on_disk(file) == ["one"]
    assert store.on_disk


def test_writing_tells_how_many_rows_it_touched(open_store: Open) -> None:
    store = open_store()
    assert store.write(INSERT, ("one",)) == 1
    assert store.write(INSERT, ("one",)) == 0


def test_a_bug_of_ours_is_no_fault_of_the_disk(open_store: Open) -> None:
    store = open_store()
    store.write(INSERT, ("one",))
    with pytest.raises(sqlite3.IntegrityError):
        store.write("INSERT INTO words (word) VALUES (?)", ("one",))
    assert store.on_disk


def test_a_full_disk_loses_nothing_while_it_lives(open_store: Open, log: io.StringIO) -> None:
    store = open_store()
    store.write(INSERT, ("before",))
    store.commit()
    store.write(INSERT, ("same turn",))
    fill_disk(store)
    for n in range(200):
        store.write(INSERT, (f"{n} {'x' * 200}",))
    store.commit()
    assert not store.on_disk
    assert words(store)[:2] == ["before", "same turn"]
    assert len(words(store)) == 202
    assert log.getvalue().count("going on in memory") == 1
    assert "words are lost" in log.getvalue()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), sqlite3.DatabaseError("no")])
def test_a_damaged_file_that_cannot_be_replaced_is_gone_on_without(
    open_store: Open, monkeypatch: pytest.MonkeyPatch, log: io.StringIO, error: Exception
) -> None:
    store = open_store()
    store.write(INSERT, ("one",))

    def fail(why: Exception) -> None:
        raise error

    monkeypatch.setattr(store, "_quarantine", fail)
    damage = sqlite3.DatabaseError("malformed")
    damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    store._recover(damage)
    assert not store.on_disk and words(store) == ["one"]
    assert "going on in memory" in log.getvalue()


def test_it_goes_back_when_the_disk_does(open_store: Open, file: Path, log: io.StringIO) -> None:
    store = open_store()
    store.write(INSERT, ("before",))
    fill_disk(store)
    for n in range(100):
        store.write(INSERT, (f"{n} {'x' * 200}",))
    store.commit()
    store.return_to_disk()
    assert store.on_disk
    store.write(INSERT, ("after",))
    store.commit()
    assert on_disk(file) == words(store)
    assert len(on_disk(file)) == 102
    assert log.getvalue().count("can write again") == 1
    assert open_store().on_disk


def test_it_stays_in_memory_as_long_as_the_disk_is_away(
    tmp_path: Path, file: Path, open_store: Open, log: io.StringIO
) -> None:
    file.parent.write_text("a file where the directory should be")
    store = open_store()
    store.write(INSERT, ("one",))
    for _ in range(3):
        store.return_to_disk()
    assert not store.on_disk
    file.parent.unlink()
    file.parent.mkdir(mode=0o700)
    store.return_to_disk()
    assert store.on_disk
    assert on_disk(file) == ["one"]
    assert log.getvalue().count("going on in memory") == 1


@pytest.mark.parametrize(
    "content", [b"no database at all, for sure" * 50, b"SQLite format 3\0" * 99]
)
def test_a_damaged_file_is_set_aside(
    open_store: Open, file: Path, log: io.StringIO, content: bytes
) -> None:
    file.parent.mkdir()
    file.write_bytes(content)
    store = open_store()
    assert store.on_disk
    store.write(INSERT, ("one",))
    store.commit()
    assert on_disk(file) == ["one"]
    (aside,) = file.parent.glob("*.damaged-*")
    assert aside.read_bytes() == content
    assert log.getvalue().count("damaged, set aside") == 1


def test_damage_while_it_runs_loses_nothing_of_this_turn(
    open_store: Open, file: Path, log: io.StringIO
) -> None:
    store = open_store()
    for n in range(5000):
        store.write(INSERT, (f"{n} {'x' * 100}",))
    store.commit()
    store = open_store()
    content = bytearray(file.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    file.write_bytes(content)
    store.write(INSERT, ("this turn",))
    store.commit()
    assert words(store) == ["this turn"]
    assert store.on_disk
    assert on_disk(file) == ["this turn"]
    assert "damaged, set aside" in log.getvalue()


@pytest.mark.parametrize("when", ["read", "write", "insert"])
def test_damage_is_found_by_whatever_looks_first(open_store: Open, file: Path, when: str) -> None:
    store = open_store()
    for n in range(5000):
        store.write(INSERT, (f"{n} {'x' * 100}",))
    store.commit()
    store = open_store()
    content = bytearray(file.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    file.write_bytes(content)
    looks: dict[str, Callable[[], object]] = {
        "read": lambda: store.read("SELECT word FROM words ORDER BY n"),
        "write": lambda: store.write(INSERT, ("new",)),
        "insert": lambda: store.insert(INSERT, ("new",)),
    }
    assert looks[when]() == {"read": [], "write": 1, "insert": 1}[when]
    store.commit()
    assert words(store) == on_disk(file) == ([] if when == "read" else ["new"])


def test_in_memory_it_needs_no_file_and_says_nothing(log: io.StringIO) -> None:
    with closing(hive.Database(None, TABLES, hive.Log("debug", "text", log), "lost")) as store:
        store.write(INSERT, ("one",))
        store.commit()
        store.return_to_disk()
        assert words(store) == ["one"] and not store.on_disk
    assert log.getvalue() == ""


def test_an_upgrade_is_whole_or_not_at_all(open_store: Open, file: Path, log: io.StringIO) -> None:
    def upgrade(database: sqlite3.Connection) -> None:
        if database.execute("PRAGMA database_list").fetchall()[0][2]:  # it is no file in memory
            database.execute("ALTER TABLE words RENAME TO terms")
            raise sqlite3.OperationalError("the disk is full")

    store = open_store()
    store.write(INSERT, ("one",))
    store.commit()
    with closing(
        hive.Database(file, TABLES, hive.Log("debug", "text", log), "lost", upgrade)
    ) as other:
        assert not other.on_disk
    assert on_disk(file) == ["one"] and "the disk is full" in log.getvalue()


def test_whether_another_has_a_lock_can_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    assert not hive.is_locked(file) and not file.exists()  # to look makes nothing
    lock = hive.FileLock(file)
    assert hive.is_locked(file)
    lock.close()
    assert not hive.is_locked(file)
    assert not hive.is_locked(tmp_path)  # what is no file is nobody's lock


@pytest.fixture
def kept(file: Path) -> Iterator[sqlite3.Connection]:
    """Another process that is writing into the file, in which an earlier run left a word."""
    file.parent.mkdir(mode=0o700)
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        for statement in ("PRAGMA journal_mode=WAL", *TABLES):
            other.execute(statement)
        other.execute(INSERT, ("earlier",))
        other.execute("BEGIN IMMEDIATE")
        yield other


def test_what_an_earlier_run_left_is_known_though_it_cannot_be_written(
    open_store: Open, kept: sqlite3.Connection, file: Path, log: io.StringIO
) -> None:
    began = time.monotonic()
    store = open_store()
    assert time.monotonic() - began < 5, "nobody waits long for whoever writes"
    assert not store.on_disk and words(store) == ["earlier"]
    assert f"file={file}" in log.getvalue() and "locked" in log.getvalue()
    store.write(INSERT, ("new",))
    store.return_to_disk()
    assert not store.on_disk
    kept.execute("ROLLBACK")
    store.return_to_disk()
    assert store.on_disk and on_disk(file) == ["earlier", "new"]
    assert f'"can write again" file={file}' in log.getvalue()


def test_a_file_that_lacks_a_table_and_cannot_be_written_has_it_in_memory(
    open_store: Open, kept: sqlite3.Connection
) -> None:
    kept.execute("DROP TABLE words")
    kept.execute("COMMIT")
    kept.execute("BEGIN IMMEDIATE")
    store = open_store()
    assert not store.on_disk and words(store) == []


def test_what_was_written_is_done_once_whatever_it_goes_on_with(
    open_store: Open, file: Path
) -> None:
    def number() -> int:
        return int(store.read("SELECT n FROM words WHERE word = 'one'")[0][0])

    def fail(letter: str) -> None:
        fill_disk(store)
        store.write(INSERT, (letter * 100_000,))
        assert not store.on_disk

    add = "UPDATE words SET n = n + 100 WHERE word = 'one'"
    store = open_store()
    store.write(INSERT, ("one",))
    store.write(add)
    store.commit()
    store.write(add)
    fail("x")
    assert number() == 201, "what was committed, and what was not"
    store.write(add)
    store.return_to_disk()
    assert store.on_disk and number() == 301
    fail("y")
    assert number() == 301


def test_after_damage_nothing_of_the_turn_lasts_before_its_end(
    open_store: Open, file: Path
) -> None:
    store = open_store()
    store.write(INSERT, ("this turn",))
    damage = sqlite3.DatabaseError("malformed")
    damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT | 3 << 8  # the rest is detail
    store._recover(damage)
    assert store.on_disk and on_disk(file) == []
    store.commit()
    assert on_disk(file) == ["this turn"]


def test_in_memory_no_file_is_set_aside(open_store: Open, file: Path) -> None:
    store = open_store()
    fill_disk(store)
    store.write(INSERT, ("x" * 100_000,))
    damage = sqlite3.DatabaseError("malformed")
    damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    store._recover(damage)
    assert not store.on_disk and len(words(store)) == 1
    assert [*file.parent.glob("*.damaged-*")] == []


def test_what_makes_no_sense_is_begun_anew_beside_the_file(
    open_store: Open, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.write(INSERT, ("one",))
    store.commit()
    store.write(INSERT, ("half",))
    store.recreate(sqlite3.DatabaseError("no sense"))
    store.commit()
    (aside,) = file.parent.glob("*.damaged-*")
    assert on_disk(aside) == ["one"] and words(store) == [] and store.on_disk
    for error in (OSError(28, "No space left"), sqlite3.OperationalError("no")):
        store.write(INSERT, ("two",))
        monkeypatch.setattr(os, "replace", partial(fail_with, error))
        store.recreate(sqlite3.DatabaseError("no sense"))
        assert not store.on_disk and words(store) == []


def fail_with(error: Exception, *given: object) -> None:
    raise error


class Recording(sqlite3.Connection):
    """Takes note of its end."""

    open: ClassVar[list[Recording]] = []

    def __init__(self, *given: object, **how: object) -> None:
        super().__init__(*given, **how)  # type: ignore[arg-type]
        self.open.append(self)

    def close(self) -> None:
        super().close()
        self.open.remove(self)


def test_no_connection_is_left_open_beside_the_one_in_use(
    file: Path, monkeypatch: pytest.MonkeyPatch, log: io.StringIO
) -> None:
    """One to a damaged file would delete the write-ahead log of the new one at its end."""
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Recording))
    replace = os.replace

    def replaced(old: Path, new: Path) -> None:
        assert Recording.open == []
        replace(old, new)

    monkeypatch.setattr(os, "replace", replaced)
    file.parent.mkdir()
    file.write_bytes(b"no database at all, for sure" * 50)
    store = hive.Database(file, TABLES, hive.Log("debug", "text", log), "words are lost")
    assert len(Recording.open) == 1
    assert "why=" in log.getvalue()
    damage = sqlite3.DatabaseError("malformed")
    damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    store._recover(damage)
    store._recover(sqlite3.OperationalError("full"))
    assert not store.on_disk and len(Recording.open) == 1
    store.return_to_disk()
    assert store.on_disk and len(Recording.open) == 1
    store.recreate(damage)
    store.close()
    assert Recording.open == []
    with pytest.raises(sqlite3.ProgrammingError):
        store.read("SELECT 1")


def test_it_outlives_a_crash_of_ours_and_stays_small(open_store: Open) -> None:
    store = open_store()
    names = ("journal_mode", "synchronous", "cache_size", "journal_size_limit")
    found = [store.read(f"PRAGMA {name}")[0][0] for name in (*names, "wal_autocheckpoint")]
    assert found == ["wal", 1, -1024, 8 << 20, 512]  # a MiB of memory; 2 MiB until a checkpoint


def test_who_only_reads_holds_nothing_up(open_store: Open) -> None:
    store = open_store()
    words(store)
    assert not store._database.in_transaction


def test_a_lock_is_waited_for_as_long_as_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = list[float]()
    now = [100.0]

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    held = hive.FileLock(tmp_path / "lock")
    for take in (hive.FileLock, hive.lock_or_spare):
        with pytest.raises(BlockingIOError):
            take(tmp_path / "lock")
        assert waited == []
    with pytest.raises(BlockingIOError):
        hive.FileLock(tmp_path / "lock", 1.0)
    assert 1.0 <= sum(waited) < 1.1 and max(waited) < 0.05
    held.write("x" * 5000)
    monkeypatch.setattr(time, "sleep", lambda seconds: held.close())
    lock = hive.lock_or_spare(tmp_path / "lock", 1.0)
    assert lock.before == "x" * 4096 and lock.file == tmp_path / "lock"
    lock.close()


def test_where_no_lock_can_be_written_another_place_stands_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "SHORT_PLACE", tmp_path)
    lock = hive.lock_or_spare(tmp_path / "missing" / "lock")
    assert lock.file == hive.spare_path(tmp_path / "missing" / "lock")
    assert hive.is_locked(tmp_path / "missing" / "lock", lock.file)
    lock.close()
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        hive.lock_or_spare(tmp_path / "folder")


@pytest.mark.parametrize("place", ["writable", "read-only"])
def test_damage_in_the_names_of_its_tables_is_damage(
    open_store: Open,
    file: Path,
    log: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    """Then SQLite's own words cannot be decoded."""
    store = open_store()
    store.write(INSERT, ("one",))
    store.close()
    damaged = file.read_bytes().replace(b"TABLE words (", b"TABLE w\xff\xfeds (((", 1)
    file.write_bytes(damaged[: len(file.read_bytes())])
    if place == "read-only":
        error = OSError(errno.EROFS, "Read-only file system")
        monkeypatch.setattr(os, "replace", partial(fail_with, error))
    with closing(hive.Database(file, TABLES, hive.Log("debug", "text", log), "lost")) as store:
        assert words(store) == [] and store.on_disk == (place == "writable")
    assert ("damaged, set aside" in log.getvalue()) == (place == "writable")


def test_a_log_of_before_does_not_come_back_into_a_new_file(open_store: Open, file: Path) -> None:
    """We rely on SQLite for that where a damaged file is set aside."""
    store = open_store()
    store.write(INSERT, ("before",))
    store.commit()
    before = [file.with_name(f"{file.name}-{end}") for end in ("wal", "shm")]
    contents = [one.read_bytes() for one in before]
    store.close()
    file.write_bytes(b"")
    for one, content in zip(before, contents, strict=True):
        one.write_bytes(content)
    with closing(hive.Database(file, TABLES, hive.Log(stream=io.StringIO()), "lost")) as store:
        assert words(store) == [] and store.on_disk
