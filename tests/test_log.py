"""A line for each event, which no peer can forge."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import socket
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE, eventually
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hive import MAX_LINES_WAITING, RATE_LIMIT_BURST, SAME_AGAIN, Log, LogWriter, RateLimit

any_text = st.text(st.characters(exclude_categories=()), max_size=100)
LEVELS = ["debug", "info", "warning", "error"]
PAIR = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|[^ "=]+)(?: |\n$)')


def lines(format: str, text: object, level: str = "info") -> str:
    stream = io.StringIO()
    Log(level, format, stream).info("received", from_="alpha", text=text, id=None)
    return stream.getvalue()


@settings(deadline=None)
@given(any_text)
@example("x\n2026-01-01T00:00:00.000Z level=error event=forged")
@example('" level=error event="forged')
@example("level=error")
@example("\x1b[2J\r\u2028\u202e\x00\x85")
@example("\ud800")
def test_no_text_can_forge_a_line_or_move_the_cursor(text: str) -> None:
    line = lines("text", text)
    assert line.isascii() and line[:-1].isprintable() and line.endswith("\n")
    pairs = PAIR.findall(line)
    assert "".join(found[0] for found in PAIR.finditer(line)) == line
    assert [key for key, _ in pairs] == ["ts", "level", "event", "from", "text"]
    said = pairs[-1][1]
    assert (json.loads(said) if said.startswith('"') else said) == text


@settings(deadline=None)
@given(any_text)
@example('x"}\n{"level": "error"')
@example("\x1b[2J\u2028\ud800")
def test_no_text_can_forge_a_line_of_json(text: str) -> None:
    line = lines("json", text)
    assert line.isascii() and line[:-1].isprintable() and line.endswith("\n")
    row = json.loads(line)
    assert row.pop("ts")
    assert row == {"level": "info", "event": "received", "from": "alpha", "text": text}


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_long_text_does_not_fill_the_disk(format: str) -> None:
    assert len(lines(format, "x" * 256 * 1024)) < 1000


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_line_says_when_it_was_written(format: str) -> None:
    assert re.search(r"\b20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\b", lines(format, "hello"))


@pytest.mark.parametrize("format", ["text", "json"])
@pytest.mark.parametrize(
    "value", [Path("/a b"), ValueError("no"), ["a", 1], {"a": {1}}, b"\xff", 1.5, True]
)
def test_whatever_is_logged_makes_one_line(format: str, value: object) -> None:
    assert lines(format, value).count("\n") == 1


@pytest.mark.parametrize("least", LEVELS)
def test_less_than_the_level_is_not_logged(least: str) -> None:
    stream = io.StringIO()
    log = Log(least, "json", stream)
    for level in LEVELS:
        getattr(log, level)("event")
    logged = [json.loads(line)["level"] for line in stream.getvalue().splitlines()]
    assert logged == LEVELS[LEVELS.index(least) :]


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_stream_that_nobody_reads_any_more_is_survived(format: str) -> None:
    closed = io.StringIO()
    closed.close()
    Log("info", format, closed).info("hello")
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "w") as broken:
        log = Log("info", format, broken)
        for _ in range(3):
            log.error("hello", text="x" * 500)


@pytest.fixture(params=["pipe", "terminal", "socket"])
def unread(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """Where a log goes, and where nobody reads it."""
    if request.param == "pipe":
        reader, writer = os.pipe()
    elif request.param == "terminal":
        reader, writer = pty.openpty()
        termios.tcflow(writer, termios.TCOOFF)  # as Ctrl-S does
    else:
        reader, writer = (end.detach() for end in socket.socketpair())
    yield reader, writer
    os.close(writer)
    with contextlib.suppress(OSError):
        os.close(reader)


def read_some(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except BlockingIOError:
        return b""


def test_a_reader_that_has_stopped_reading_holds_up_nobody(unread: tuple[int, int]) -> None:
    reader, writer = unread
    many = 3 * MAX_LINES_WAITING
    with os.fdopen(os.dup(writer), "w") as stream:
        log = Log("info", "json", stream)
        with log.never_wait():
            begun = time.monotonic()
            for i in range(many):
                log.info("line", n=i, text="x" * 200)
            assert time.monotonic() - begun < PATIENCE / 2
            if os.isatty(writer):
                termios.tcflow(writer, termios.TCOON)
            os.set_blocking(reader, False)
            heard = bytearray()

            def everything() -> bool:
                heard.extend(read_some(reader))
                return b"lines dropped" in heard

            eventually("what was kept is read, and what was not is counted", everything)
            log.info("the end")
            eventually("what is logged later is read", lambda: b"the end" in read_some(reader))
    assert os.get_blocking(writer)  # it is not ours alone
    rows = [json.loads(line) for line in heard.decode().splitlines() if line.endswith("}")]
    kept = [row["n"] for row in rows if row["event"] == "line"]
    [lost] = [row["lines"] for row in rows if row["event"] == "lines dropped"]
    assert kept == [*range(len(kept))]
    assert len(kept) + lost == many


def test_a_log_that_nobody_reads_ends_all_the_same(unread: tuple[int, int]) -> None:
    _, writer = unread
    with os.fdopen(os.dup(writer), "w") as stream:
        log = Log("info", "text", stream)
        begun = time.monotonic()
        with log.never_wait():
            for _ in range(2000):
                log.info("line", text="x" * 200)
        assert time.monotonic() - begun < PATIENCE / 2
    os.close(unread[0])  # or its thread would wait for ever


def test_what_was_logged_at_the_end_is_written(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        log = Log("info", "json", stream)
        with log.never_wait():
            for i in range(1000):
                log.info("line", n=i)
        log.info("after it")
    rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [row.get("n", row["event"]) for row in rows] == [*range(1000), "after it"]


def test_a_fault_of_a_peer_is_logged_a_few_times_a_minute() -> None:
    limit = RateLimit()
    first = [limit.allow("noise", now) for now in range(50)]
    assert first == [True] * RATE_LIMIT_BURST + [False] * (50 - RATE_LIMIT_BURST)
    assert not limit.allow("noise", 59)
    assert limit.allow("noise", 100)


def test_one_kind_of_fault_does_not_hide_another() -> None:
    limit = RateLimit()
    for _ in range(1000):
        limit.allow("noise", 1)
    assert limit.allow("dropped", 1)


def test_what_was_not_allowed_is_counted_once_its_minute_is_over() -> None:
    limit, stream = RateLimit(burst=3), io.StringIO()
    log = Log("info", "json", stream)
    for now in range(50):
        limit.allow("noise", now)
        limit.allow("other", now)
    limit.report(log, 59)
    assert stream.getvalue() == ""
    limit.allow("noise", 70)
    for now in (70, 140, 210):
        limit.report(log, now)
    rows = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert {row["event"] for row in rows} == {SAME_AGAIN}
    assert sorted((row["what"], row["times"]) for row in rows) == [("noise", 47), ("other", 47)]


def test_a_flood_of_one_event_is_counted_and_others_are_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    log = Log("debug", "json", stream, repeats=10)
    for i in range(10_000):
        log.info("received", n=i)
        log.debug("text")
    log.warning("peer is lost")
    monkeypatch.setattr("hive.RATE_LIMIT_INTERVAL", 0.0)
    log.info("the end")
    rows = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [row["n"] for row in rows if row["event"] == "received"] == [*range(10)]
    assert sum(row["event"] == "text" for row in rows) == 10_000, "whoever wants all has it"
    *_, counted, last = rows
    assert (counted["what"], counted["times"]) == ("received", 9990)
    assert last["event"] == "the end"
    assert rows[-3]["event"] == "peer is lost"


@pytest.mark.parametrize("format", ["text", "json"])
def test_of_a_value_500_characters_are_kept(format: str) -> None:
    for size in (500, 501):
        assert lines(format, "q" * size).count("q") == 500


def test_what_json_has_is_logged_as_that() -> None:
    told = [json.loads(lines("json", value))["text"] for value in (1, 1.5, True, Path("/x"))]
    assert told == [1, 1.5, True, "/x"] and told[2] is True
    assert "text" not in json.loads(lines("json", None))


def test_unless_told_otherwise_a_log_is_text_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log()
    log.debug("nobody asked")
    for _ in range(2000):
        log.info("hello", text="a b")
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 2000
    assert err.splitlines()[-1].endswith(' level=info event=hello text="a b"')


def test_each_line_is_written_out_at_once() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw)
    Log(stream=stream).info("hello")
    assert raw.getvalue().endswith(b"event=hello\n")


class NoFile:
    """What can be written to, and is no file at all."""

    def __init__(self) -> None:
        self.said = ""

    def write(self, line: str) -> None:
        self.said += line

    def flush(self) -> None:
        pass


def test_what_is_no_file_is_written_to_as_ever() -> None:
    text, other, closed = io.StringIO(), NoFile(), io.TextIOWrapper(io.BytesIO())
    closed.close()
    for stream in (text, other, closed):
        log = Log(stream=stream)  # type: ignore[arg-type]
        with log.never_wait():
            log.info("hello")
    assert "event=hello" in text.getvalue() and "event=hello" in other.said


@pytest.fixture
def writing() -> Iterator[tuple[LogWriter, int]]:
    """A writer to a pipe, and the end where it is read."""
    reader, writer = os.pipe()
    made = LogWriter(writer, lambda lost: f"{lost} lost\n")
    yield made, reader
    made.close()
    assert not made._thread.is_alive()
    for end in (reader, writer):
        os.close(end)


def test_so_many_lines_wait_and_the_next_is_counted(writing: tuple[LogWriter, int]) -> None:
    writer, reader = writing
    with writer._changed:  # its thread takes none meanwhile
        for i in range(MAX_LINES_WAITING + 3):
            writer.write(f"{i}\n")
    heard = b""
    while b"lost" not in heard:
        heard += os.read(reader, 65536)
    assert heard.decode().split("\n") == [*map(str, range(MAX_LINES_WAITING)), "3 lost", ""]
    writer.write("later\n")
    assert os.read(reader, 100) == b"later\n"


def test_what_is_written_in_pieces_is_written_whole(
    writing: tuple[LogWriter, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = writing
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    writer.write("abcdefgh\n")
    heard = b""
    while b"\n" not in heard:
        heard += os.read(reader, 100)
    assert heard == b"abcdefgh\n"


def test_a_writer_has_half_a_second_for_its_last_lines(
    writing: tuple[LogWriter, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = writing
    waited: list[float] = []
    join = writer._thread.join

    def wait(seconds: float) -> None:
        waited.append(seconds)
        join()

    monkeypatch.setattr(writer._thread, "join", wait)
    writer.write("last\n")
    writer.close()
    writer.write("too late\n")
    assert (waited, os.read(reader, 100)) == ([0.5], b"last\n")  # and not the other


def test_ten_of_a_kind_are_told_in_a_minute_and_the_rest_is_counted() -> None:
    limit, stream = RateLimit(), io.StringIO()
    assert [limit.allow("a", 1000.0) for _ in range(12)] == [True] * 10 + [False] * 2
    assert not limit.allow("a", 1060.0)
    assert limit.allow("a", 1060.1)
    for now in (1060.2, 1120.2):  # another minute, of which nobody asked meanwhile
        assert [limit.allow("a", now) for _ in range(11)][-1] is False
    limit.report(Log("info", "json", stream), 1200.0)
    [row] = map(json.loads, stream.getvalue().splitlines())
    assert (row["what"], row["times"]) == ("a", 3 + 2 + 1)
