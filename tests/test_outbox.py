"""Outbox: what the broker has yet to take, over a real journal and a link in memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hive


class Wire:
    """A link that keeps what it was given until the test lets the broker take it."""

    def __init__(self) -> None:
        self.given: list[hive.OutgoingMessage] = []

    def aim(self, settings: hive.MqttConfig) -> None: ...

    def open(self, user: hive.ClientListener) -> None: ...

    def publish(self, publication: hive.OutgoingMessage) -> None:
        self.given.append(publication)

    def close(self, done: object, within: float) -> None: ...

    def probe(self, done: object) -> None: ...

    def take(self, code: int = 0, words: str = "Success") -> str:
        """The broker takes the first one, or refuses it."""
        publication = self.given.pop(0)
        publication.done(code, words)
        return publication.payload.decode()


class Rig:
    def __init__(self, folder: Path) -> None:
        log = hive.Log("error", "text", sys.stderr)
        self.journal = hive.Journal(folder, log, keep=7 * 86400, max_size=10**7)
        self.gone: list[tuple[hive.JournalEntry | None, int, str]] = []
        self.start()

    def start(self) -> None:
        """As a daemon that begins with what an earlier one left."""
        self.wire = Wire()
        self.outbox = hive.Outbox(
            self.journal, self.wire, lambda: 1000.0, lambda *said: self.gone.append(said)
        )

    def post(self, *texts: str, **how: float) -> None:
        for text in texts:
            self.outbox.post("hive/beta/command", text.encode(), until=how.get("until"))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.journal.close()


def test_it_goes_out_in_order_and_is_forgotten_when_the_broker_has_it(rig: Rig) -> None:
    rig.post("a", "b", "c")
    assert rig.wire.given == []  # not committed yet
    rig.outbox.pump()
    assert [rig.wire.take(), rig.wire.take()] == ["a", "b"]
    assert len(rig.outbox) == 1
    assert [one.payload for one in rig.journal.outgoing(0, 10)] == [b"c"]


def test_what_was_not_acknowledged_goes_out_again_after_a_restart(rig: Rig) -> None:
    rig.post("a", "b", "c")
    rig.outbox.pump()
    rig.wire.take()
    rig.start()
    rig.outbox.pump()
    rig.post("d")
    rig.outbox.pump()
    assert [rig.wire.take() for _ in range(3)] == ["b", "c", "d"]


def test_a_long_outage_is_handed_over_bit_by_bit(rig: Rig) -> None:
    texts = [f"{n}" for n in range(5 * hive.HANDED_OVER)]
    rig.post(*texts)
    rig.outbox.pump()
    taken = []
    while rig.wire.given:
        assert len(rig.wire.given) <= hive.HANDED_OVER
        taken.append(rig.wire.take())
        rig.outbox.pump()
    assert taken == texts
    assert len(rig.outbox) == 0


def test_the_time_to_live_goes_on_while_it_waits(rig: Rig) -> None:
    rig.post("short", until=time.time() + 50)
    rig.post("stale", until=time.time() - 50)
    rig.post("for ever")
    rig.outbox.pump()
    short, stale, ever = rig.wire.given
    assert short.expires == pytest.approx(1050, abs=5)
    assert stale.expires == pytest.approx(950, abs=5)
    assert ever.expires is None


def test_whoever_sent_it_hears_what_became_of_it(rig: Rig) -> None:
    envelope = hive.Envelope.new("alpha", "beta", "command", "x")
    row = rig.journal.record(hive.Event.SENT, envelope, time.time())
    rig.outbox.post("hive/beta/command", envelope.encode(), message=row)
    rig.post("a result of a handler")
    rig.outbox.pump()
    rig.wire.take(0x87, "Not authorized")
    rig.wire.take()
    (refused, code, words), (result, *_) = rig.gone
    assert (refused and refused.id, code, words) == (envelope.id, 0x87, "Not authorized")
    assert result is None


def test_it_says_when_it_is_full(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hive, "MAX_OUTBOX", 3)
    rig.post("a", "b")
    assert not rig.outbox.full
    rig.post("c")
    assert rig.outbox.full
    rig.outbox.pump()
    rig.wire.take()
    assert not rig.outbox.full


def test_it_is_full_of_bytes_too_and_knows_so_after_a_restart(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_OUTBOX_SIZE", 1000)
    rig.post("x" * 600, "y" * 600)
    assert rig.outbox.full
    rig.start()
    assert rig.outbox.full
    rig.outbox.pump()
    rig.wire.take()
    assert not rig.outbox.full


def test_what_peers_gave_us_to_do_does_not_close_it(rig: Rig) -> None:
    rig.journal.full = True
    assert not rig.outbox.full
