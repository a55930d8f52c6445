"""Stream: bytes over a real socket pair, on a loop that the test turns."""

from __future__ import annotations

import io
import os
import selectors
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE

import hive

CHUNK = hive.READ_CHUNK
LARGE = 1_000_000  # bytes: more than any socket takes at once


class Peer:
    """The other end of a stream, and whoever uses the stream: each with what it has heard."""

    def __init__(self, max_input: int = LARGE, max_output: int = 4 * LARGE, corked: bool = False):
        self.log, self.now = io.StringIO(), 1000.0  # a clock that stands still
        self.loop = hive.Loop(hive.Log("debug", "json", self.log), lambda: self.now)
        ours, self.sock = socket.socketpair()
        self.sock.setblocking(False)
        self.total = hive.ByteCount()
        self.ready = self.closed = self.flushes_asked = 0
        self.inside = False  # of a call to the stream
        self.heard = b""
        self.shut = False
        self.stream = hive.Stream(
            self.loop,
            ours,
            self._on_ready,
            self._on_close,
            max_input,
            max_output,
            self._flush_soon if corked else None,
            self.total,
        )

    def _on_ready(self) -> None:
        assert not self.inside, "called back in the middle of a call"
        self.ready += 1

    def _on_close(self) -> None:
        assert not self.inside, "called back in the middle of a call"
        self.closed += 1

    def _flush_soon(self) -> None:
        self.flushes_asked += 1

    @property
    def input(self) -> bytes:
        return bytes(self.stream.input)

    def write(self, head: bytes, body: bytes = b"") -> None:
        self.inside = True
        self.stream.write(head, body)
        self.inside = False

    def turn(self) -> None:
        for _ in range(3):
            self.loop.post(lambda: None)
            self.loop.step()
        assert self.total.size == len(self.stream.input) + self.stream.output_size

    def read(self) -> bytes:
        """All that the other end has heard so far."""
        self.turn()
        try:
            while data := self.sock.recv(1 << 20):
                self.heard += data
            self.shut = True
        except BlockingIOError:
            pass
        return self.heard

    def until(self, what: str, check: Callable[[], object]) -> None:
        until = time.monotonic() + PATIENCE
        while not check():
            assert time.monotonic() < until, f"never happened: {what}"
            self.turn()

    def end(self) -> None:
        self.stream.close()
        self.stream.close()
        assert self.closed == 1 and self.total.size == 0
        self.sock.close()
        self.loop.close()
        assert '"bug"' not in self.log.getvalue(), self.log.getvalue()


@pytest.fixture
def peer_of() -> Iterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def make(max_input: int = LARGE, max_output: int = 4 * LARGE, corked: bool = False) -> Peer:
        made.append(Peer(max_input, max_output, corked))
        return made[-1]

    yield make
    for peer in made:
        peer.end()


@pytest.fixture
def peer(peer_of: Callable[..., Peer]) -> Peer:
    return peer_of()


def test_what_comes_in_stays_until_it_is_consumed(peer: Peer) -> None:
    peer.sock.send(b"one two")
    peer.turn()
    assert (peer.input, peer.ready) == (b"one two", 1)
    peer.stream.consume(4)
    peer.sock.send(b" three")
    peer.turn()
    assert (peer.input, peer.ready) == (b"two three", 2)


def test_who_is_paused_hears_nothing_and_misses_nothing(peer: Peer) -> None:
    peer.stream.pause()
    peer.stream.pause()
    peer.sock.send(b"x")
    peer.turn()
    assert (peer.input, peer.ready) == (b"", 0)
    peer.write(b"still said")
    assert peer.read() == b"still said"
    peer.stream.resume()
    peer.turn()
    assert (peer.input, peer.ready) == (b"x", 1)


@pytest.mark.parametrize("more", [0, 1])
def test_input_beyond_the_bound_ends_it(peer_of: Callable[..., Peer], more: int) -> None:
    peer = peer_of(max_input=1000)
    peer.sock.send(b"x" * (1000 + more))
    peer.turn()
    assert (peer.closed, peer.ready) == (more, 1 - more)


@pytest.mark.parametrize("more", [0, 1])
def test_output_beyond_the_bound_ends_it_and_not_within_write(
    peer_of: Callable[..., Peer], more: int
) -> None:
    peer = peer_of(max_output=1000, corked=True)
    peer.write(b"x" * 1000)
    peer.write(b"x" * more)
    if more:
        peer.stream.flush()
    assert peer.closed == 0 and peer.stream.is_open is not bool(more)
    assert peer.stream.output_size == (0 if more else 1000)
    if more:
        peer.write(b"nobody gets this")
    peer.turn()
    assert peer.closed == more and peer.read() == b""
    assert peer.stream.output_size == (0 if more else 1000)


@pytest.mark.parametrize("size", [1, hive.MAX_COPIED - 1, hive.MAX_COPIED, LARGE])
def test_all_that_was_written_arrives_in_order(peer: Peer, size: int) -> None:
    parts = [bytes([n]) * size for n in range(4)]
    peer.write(parts[0], b"")
    peer.write(b"")
    peer.write(b"", parts[1])
    peer.write(parts[2])
    peer.write(parts[3])
    assert (peer.stream.output_size > 0) is (size == LARGE)
    peer.until("all is there", lambda: len(peer.read()) >= 4 * size)
    same = peer.heard == b"".join(parts)
    assert same and peer.stream.output_size == 0
    peer.ready = 0
    peer.turn()
    assert peer.ready == 0, "it is not told again and again that there is room"


def test_a_large_part_is_shared_and_not_copied(peer_of: Callable[..., Peer]) -> None:
    peer, large = peer_of(corked=True), bytes(hive.MAX_COPIED)
    peer.write(b"head", large)
    assert any(part is large for part in peer.stream._output)
    peer.write(b"a")
    peer.write(b"b")
    assert [*peer.stream._output][2:] == [b"ab"]


def test_who_was_full_is_told_when_there_is_room(peer: Peer) -> None:
    peer.write(b"x" * LARGE)
    peer.turn()
    assert peer.ready == 0
    peer.read()
    peer.turn()
    assert peer.ready > 0


def test_nothing_leaves_before_the_flush_that_was_promised(peer_of: Callable[..., Peer]) -> None:
    peer = peer_of(corked=True)
    peer.write(b"saved first")
    assert peer.read() == b"" and peer.flushes_asked == 1
    peer.stream.flush()
    assert peer.read() == b"saved first"
    peer.write(b"x" * LARGE)
    peer.stream.flush()
    left = peer.stream.output_size
    assert 0 < left < LARGE
    peer.write(b"not saved yet")
    peer.flushes_asked = 0
    peer.read()
    peer.turn()
    assert peer.flushes_asked > 0, "the socket takes more"
    assert peer.stream.output_size == left + len(b"not saved yet")


def test_when_a_socket_last_took_something_is_known(peer: Peer) -> None:
    peer.now = 1010
    peer.write(b"x" * LARGE)
    assert peer.stream.written_at == 1010
    peer.now = 1020
    peer.write(b"x" * LARGE)
    assert peer.stream.written_at == 1010, "it has taken nothing since"
    peer.read()
    peer.turn()
    assert peer.stream.written_at == 1020


def test_since_when_something_waits_to_be_written_is_known(peer_of: Callable[..., Peer]) -> None:
    peer = peer_of(corked=True)
    for peer.now, said in ((1010, 1010), (1020, 1010)):
        peer.write(b"x")
        assert peer.stream.written_at == said


def test_since_when_something_waits_to_be_consumed_is_known(peer: Peer) -> None:
    seen = []
    for peer.now in (1010, 1020):
        peer.sock.send(b"xx")
        peer.turn()
        seen.append(peer.stream.read_at)
    peer.now = 1030
    peer.stream.consume(1)
    seen.append(peer.stream.read_at)
    peer.stream.consume(3)
    peer.now = 1040
    peer.sock.send(b"x")
    peer.turn()
    assert [*seen, peer.stream.read_at] == [1010, 1010, 1030, 1040]


def test_what_is_ready_and_has_nothing_is_no_end(peer: Peer) -> None:
    """select(2), Bugs: a socket may be ready, and a read from it would block."""
    peer.stream._on_event(selectors.EVENT_READ)
    assert peer.stream.is_open


def test_to_hear_something_is_no_reason_to_write(peer_of: Callable[..., Peer]) -> None:
    peer = peer_of(corked=True)
    peer.sock.send(b"x")
    peer.turn()
    assert (peer.ready, peer.flushes_asked) == (1, 0)


def test_who_is_gone_may_be_paused_and_resumed(peer: Peer) -> None:
    peer.stream.close()
    peer.stream.pause()
    peer.stream.resume()
    peer.turn()


def test_the_other_side_going_ends_it_once(peer: Peer) -> None:
    peer.sock.send(b"last words")
    peer.turn()
    peer.sock.close()
    peer.turn()
    assert (peer.closed, peer.ready, peer.input) == (1, 1, b"")
    peer.write(b"too late")
    peer.stream.flush()
    peer.stream.end(1)
    peer.turn()
    assert peer.closed == 1


def test_a_write_to_one_who_has_gone_ends_it_but_not_at_once(peer: Peer) -> None:
    peer.sock.close()
    peer.write(b"x")
    peer.write(b"y")
    assert peer.closed == 0 and not peer.stream.is_open
    peer.turn()
    assert peer.closed == 1


# The last words


def test_last_words_are_followed_by_the_end_of_the_stream_at_once(peer: Peer) -> None:
    """The clock stands still: who waits for more would wait for ever."""
    peer.write(b"x" * LARGE)
    peer.write(b"goodbye")
    peer.stream.end(linger=1)
    assert not peer.stream.is_open
    peer.write(b"not that")
    peer.until("the end", lambda: peer.read() and peer.shut)
    same = peer.heard == b"x" * LARGE + b"goodbye"
    assert same and peer.closed == 0, "the other side may still be sending"
    peer.sock.send(b"x" * 1000)
    peer.turn()
    assert (peer.closed, peer.input) == (0, b"")
    peer.sock.close()
    peer.turn()
    assert peer.closed == 1
    assert not [timer for timer in peer.loop._timers if timer.call]


@pytest.mark.parametrize("corked", [False, True])
def test_who_has_said_nothing_is_ended_as_well(peer_of: Callable[..., Peer], corked: bool) -> None:
    peer = peer_of(corked=corked)
    peer.stream.pause()
    peer.stream.end(linger=1)
    assert peer.flushes_asked == corked
    if corked:
        peer.stream.flush()
    assert peer.read() == b"" and peer.shut
    peer.sock.close()
    peer.turn()
    assert peer.closed == 1


@pytest.mark.parametrize("paused", [False, True])
def test_what_comes_after_the_end_is_dropped(peer: Peer, paused: bool) -> None:
    peer.sock.send(b"early")
    peer.turn()
    if paused:
        peer.stream.pause()
    peer.stream.end(linger=1)
    assert peer.input == b""
    peer.sock.send(b"late")
    peer.turn()
    assert (peer.input, peer.ready, peer.closed) == (b"", 1, 0)
    peer.sock.close()
    peer.turn()
    assert peer.closed == 1


@pytest.mark.parametrize("corked", [False, True])
def test_who_does_not_close_is_closed_when_its_time_is_over(
    peer_of: Callable[..., Peer], corked: bool
) -> None:
    peer = peer_of(corked=corked)
    peer.write(b"bye")
    peer.stream.end(linger=2)
    peer.stream.end(linger=200)
    peer.stream.flush()
    assert peer.read() == b"bye" and peer.shut
    peer.now += 1.9
    peer.turn()
    assert peer.closed == 0
    peer.now += 0.2
    peer.turn()
    assert peer.closed == 1


def test_who_does_not_read_loses_its_last_words_when_its_time_is_over(peer: Peer) -> None:
    peer.write(b"x" * LARGE)
    peer.stream.end(linger=2)
    peer.now += 2.1
    peer.turn()
    assert peer.closed == 1 and peer.stream.output_size == 0


def test_who_breaks_off_meanwhile_leaves_no_timer_behind(peer: Peer) -> None:
    peer.write(b"x" * LARGE)
    peer.stream.end(linger=200)
    peer.turn()
    peer.sock.close()
    peer.turn()
    assert peer.closed == 1
    assert not [timer for timer in peer.loop._timers if timer.call]


def test_close_may_be_called_from_a_callback(peer: Peer) -> None:
    def close() -> None:
        peer.stream.close()
        peer.stream.consume(0)

    peer.stream._on_ready = close
    peer.sock.send(b"x")
    peer.turn()
    assert peer.closed == 1


# The listener


def test_only_this_user_can_open_the_socket(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with hive.unix_listener(tmp_path / "s"):
            assert os.umask(0) == 0, "the umask is as it was"
            assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_an_old_socket_is_replaced(tmp_path: Path) -> None:
    hive.unix_listener(tmp_path / "s").close()
    with hive.unix_listener(tmp_path / "s") as listener, socket.socket(socket.AF_UNIX) as client:
        listener.listen()
        client.connect(str(tmp_path / "s"))


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    place, other = tmp_path / "s", tmp_path / "other"
    other.write_text("mine")
    if kind == "file":
        place.write_text("mine")
    elif kind == "link":
        place.symlink_to(other)
    else:
        place.mkdir()
    with pytest.raises(FileExistsError, match="is no socket, and is left alone"):
        hive.unix_listener(place)
    assert place.exists() and other.read_text() == "mine"


def test_a_socket_that_cannot_be_made_leaves_nothing_open(tmp_path: Path) -> None:
    before, errors = len(os.listdir("/dev/fd")), []  # which keep alive what was not closed
    for place in (tmp_path / "missing" / "s", tmp_path / ("x" * 200)):
        with pytest.raises(OSError) as raised:
            hive.unix_listener(place)
        errors.append(raised)
    assert len(os.listdir("/dev/fd")) == before
