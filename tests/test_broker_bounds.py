"""The embedded broker on either side of each bound: in this process, mostly without a client."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import socket
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, free_port
from raw_mqtt import (
    KEPT,
    Hosted,
    Raw,
    connect_packet,
    disconnect_packet,
    kept,
    publish_packet,
    subscribe_packet,
    unsubscribe_packet,
)

import hive
from hive import (
    ApplicationMessage,
    BrokerConfig,
    PacketType,
    Publish,
    ReasonCode,
    Session,
    encode_ack,
    encode_packet,
)

Make = Callable[..., Hosted]


def message(topic: str = "t", payload: bytes = b"x", **properties: Any) -> ApplicationMessage:
    return ApplicationMessage.of(Publish(topic, payload, 1, properties=properties), "me", 1000.0)


def rows(hosted: Hosted, table: str) -> int:
    with closing(sqlite3.connect(hosted.broker.file)) as file:
        (count,) = file.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(count)


def test_what_the_help_says_that_it_takes_is_what_it_takes() -> None:
    text = " ".join((ROOT / "contrib/help/brokers.md").read_text("utf-8").split())
    bounds = (
        "1000 connections, 5000 sessions with 10,000 subscriptions and 10,000 waiting messages (64"
        " MiB) each, and 10,000 retained messages (64 MiB); 256 MiB of messages in all, and"
        " 128 MiB on their way"
    )
    assert bounds in text
    assert hive.MAX_CLIENT_CONNECTIONS == 1000 and hive.MAX_SESSIONS == 5000
    assert hive.MAX_SUBSCRIPTIONS == hive.MAX_RETAINED == 10_000
    assert hive.MAX_BUFFERED == 128 << 20
    said = BrokerConfig()
    assert (said.queue_messages, said.queue_mib) == (10_000, 64)
    assert (said.retained_mib, said.total_mib) == (64, 256)


# Messages and sessions, as values.


def test_a_message_counts_with_all_that_it_consists_of() -> None:
    small = message("t", b"").size
    assert message("t" * 11, b"").size == small + 10
    assert message("t", b"x" * 10).size == small + 10
    user = {"user": [("", "y" * 10)]}
    assert message("t", b"", **user).size == small + 5 + 10  # an identifier, and two lengths


def test_a_message_has_expired_when_its_time_is_over_and_not_before() -> None:
    brief = message(message_expiry=10)
    assert [brief.expired(now) for now in (1009.9, 1010.0)] == [False, True]
    assert not message().expired(1e12)
    assert message(message_expiry=0).expired(1000.0)


def test_a_session_has_room_up_to_its_bounds_and_for_one_message_of_any_size() -> None:
    size = message().size
    session = Session("a", 0, (2, 2 * size))
    assert session.has_room_for(message(payload=b"x" * 10_000)), "alone it may be any"
    session.queue.append(hive.QueuedMessage(message(), 1, False, ()))
    session.size = size
    assert session.has_room_for(message())
    assert not session.has_room_for(message(payload=b"xx"))
    session.inflight[1] = session.queue.pop()
    assert session.has_room_for(message()) and not session.has_room_for(message(payload=b"xx"))
    session.queue.append(session.inflight[1])
    session.size = 0
    assert not session.has_room_for(message()), "two are two, however small"


def test_packet_identifiers_go_round_and_pass_over_those_that_are_in_use() -> None:
    session = Session("a", 0, (1, 1))
    assert [session.next_packet_id() for _ in range(3)] == [1, 2, 3]
    session._last_packet_id = 0xFFFE
    session.inflight = dict.fromkeys((1, 2), hive.QueuedMessage(message(), 1, False, ()))
    assert [session.next_packet_id() for _ in range(2)] == [0xFFFF, 3]


@pytest.mark.parametrize("load", ["messages", "bytes", "output"])
def test_senders_wait_a_second_for_one_that_has_too_much_to_read(load: str) -> None:
    """From the bound on, until half of it is read; longer than that second for nobody."""
    session = Session("a", 0, (1, 1))
    stream = SimpleNamespace(output_size=0)
    session.connection = SimpleNamespace(stream=stream)  # type: ignore[assignment]

    def loaded(share: float) -> None:
        match load:
            case "messages":
                count = round(1000 * share)
                session.queue.clear()
                session.queue.extend([hive.QueuedMessage(message(), 1, False, ())] * count)
            case "bytes":
                session.size = round(share * (4 << 20))
            case _:
                stream.output_size = round(share * (1 << 19))

    loaded(1.0)
    assert not session.congested(10.0), "just what is good"
    loaded(1.001)
    assert [session.congested(now) for now in (20.0, 20.99, 21.0, 30.0)] == [
        True,
        True,
        False,
        False,
    ]
    loaded(0.5)
    assert not session.congested(30.0)
    loaded(1.001)
    assert not session.congested(30.5), "it has not caught up since"
    loaded(0.499)
    assert not session.congested(31.0)
    loaded(1.001)
    assert session.congested(32.0), "it had"
    session.connection = None
    assert not session.congested(32.0), "nobody waits for one who is away"


# Time.


class Ticking:
    """A broker on a loop of which the test is the clock, and clients in the same thread."""

    def __init__(self, home: Path) -> None:
        self.now, self.log, self.clients = 5000.0, io.StringIO(), list[Raw]()
        self._settings = BrokerConfig(socket=home / "socket", state_dir=home / "state")
        self.start()

    def start(self) -> None:
        log = hive.Log("debug", "text", self.log)
        self.loop = hive.Loop(log, lambda: self.now)
        self.broker = hive.Broker(self.loop, log, self._settings, lambda: self.now)
        self.broker.start()

    def stop(self) -> None:
        self.broker.close()
        self.loop.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        self.stop()
        for client in self.clients:
            client.close()
        assert "event=bug" not in self.log.getvalue(), self.log.getvalue()

    def turn(self) -> None:
        for _ in range(8):
            self.loop.post(hive.do_nothing)
            self.loop.step()

    def pass_by(self, seconds: float) -> None:
        for _ in range(round(seconds * 4)):
            self.now += 0.25
            self.loop.post(hive.do_nothing)
            self.loop.step()
        self.turn()

    def client(self, version: int = 4) -> Raw:
        self.clients.append(Raw(self.broker.socket_path, version))
        return self.clients[-1]

    def connected(self, client_id: str, version: int = 4, **said: Any) -> Raw:
        client = self.client(version)
        self.say(client, connect_packet(version, client_id, **said))
        assert client.expect(PacketType.CONNACK).reason == 0
        return client

    def say(self, client: Raw, *packets: bytes) -> None:
        rest = b"".join(packets)
        self.turn()
        while rest:
            rest = rest[client.sock.send(rest[:50_000]) :]
            self.turn()

    def receive(self, client: Raw, count: int, acknowledge: bool = True) -> list[bytes]:
        """The next so many messages, of which the socket may take but a part at once."""
        found = list[bytes]()
        while len(found) < count:
            self.turn()
            client._buffer += client.sock.recv(1 << 20)
            while len(found) < count and hive.packet_bounds(client._buffer, 0, 1 << 28):
                found.append(client.receive(acknowledge).payload)
        self.turn()
        return found

    def subscribed(self, client_id: str, *filters: str | tuple[str, int], **said: Any) -> Raw:
        client = self.connected(client_id, **said)
        self.say(client, subscribe_packet(*filters, version=4))
        client.expect(PacketType.SUBACK)
        return client

    def quiet(self, client: Raw) -> None:
        self.say(client, encode_packet(PacketType.PINGREQ))
        client.expect(PacketType.PINGRESP)
        assert not client.early

    def drop(self, client: Raw) -> None:
        client.close()
        self.turn()

    @property
    def inside(self) -> int:
        return len(self.broker.connections)


@pytest.fixture
def ticking(tmp_path: Path) -> Iterator[Ticking]:
    one = Ticking(tmp_path)
    yield one
    one.close()


def test_it_looks_at_deadlines_twice_a_second_and_at_the_disk_twice_a_minute(
    ticking: Ticking, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits, returns = list[float](), list[float]()
    store, began = ticking.broker.store, ticking.now
    monkeypatch.setattr(store, "commit", lambda: commits.append(ticking.now - began))
    monkeypatch.setattr(
        store.database, "return_to_disk", lambda: returns.append(ticking.now - began)
    )
    ticking.pass_by(70)
    assert commits == [n / 2 for n in range(1, 141)]
    assert returns == [29.5, 59.5]


def test_what_is_refused_all_the_time_is_said_a_few_times_and_then_counted(
    ticking: Ticking,
) -> None:
    for _ in range(30):
        ticking.say(ticking.client(), connect_packet(4, "x" * 2000))
    said = ticking.log.getvalue().count('event="client refused"')
    assert 3 <= said <= 10
    ticking.pass_by(100)
    assert f"times={30 - said}" in ticking.log.getvalue()


def test_who_is_ended_and_does_not_hang_up_has_a_second(ticking: Ticking) -> None:
    ticking.say(ticking.client(), connect_packet(4, "x" * 2000))
    ticking.pass_by(0.75)
    assert ticking.inside == 1
    ticking.pass_by(0.25)
    assert ticking.inside == 0


@pytest.mark.parametrize("said", [0, 7])
def test_connect_must_come_within_ten_seconds(ticking: Ticking, said: int) -> None:
    ticking.say(ticking.client(), connect_packet(4, "a")[:said])
    ticking.pass_by(9.5)
    assert ticking.inside == 1
    ticking.pass_by(0.5)
    ticking.clients[0].ended()


@pytest.mark.parametrize(
    ("keepalive", "half", "seconds"),
    [(0, True, 60), (100, True, 60), (10, True, 15), (10, False, 15), (100, False, 150)],
)
def test_the_rest_of_a_packet_may_take_a_minute_and_no_longer_than_a_keep_alive(
    ticking: Ticking, keepalive: int, half: bool, seconds: float
) -> None:
    client = ticking.connected("a", keepalive=keepalive)
    whole = publish_packet("t", b"x" * 100, version=4)
    if half:
        ticking.say(client, whole[:-1])
    ticking.pass_by(seconds - 0.5)
    ticking.say(client, whole[-1:] if half else whole)
    assert not ticking.broker.buffered.size and ticking.inside == 1
    if half:
        ticking.say(client, whole[:-1])
    ticking.pass_by(seconds)
    client.ended()


def fill(ticking: Ticking, client: Raw) -> None:
    """Three messages of which a socket does not take the half."""
    sender = ticking.connected("s")
    for _ in range(3):
        ticking.say(sender, publish_packet("t", b"x" * 300_000, version=4))
    assert ticking.broker.buffered.size > hive.MAX_OUT / 2
    ticking.drop(sender)


def test_who_does_not_read_is_given_a_minute(ticking: Ticking) -> None:
    deaf = ticking.subscribed("deaf", ("t", 0))
    fill(ticking, deaf)
    ticking.pass_by(60)
    assert ticking.inside == 1
    assert len(ticking.receive(deaf, 3)) == 3
    ticking.pass_by(1000)
    fill(ticking, deaf)
    ticking.pass_by(60.5)
    assert ticking.inside == 0 and "it does not read" in ticking.log.getvalue()


def test_who_was_not_listened_to_was_not_silent(ticking: Ticking) -> None:
    """It has sent, and we did not read: it must itself read first."""
    slow = ticking.subscribed("slow", ("t", 0), keepalive=20)
    fill(ticking, slow)
    ticking.pass_by(25)
    ticking.say(slow, encode_packet(PacketType.PINGREQ))
    ticking.pass_by(25)
    assert len(ticking.receive(slow, 3)) == 3
    slow.expect(PacketType.PINGRESP)
    fill(ticking, slow)
    ticking.pass_by(50)
    assert len(ticking.receive(slow, 3)) == 3
    ticking.pass_by(29.5)
    ticking.quiet(slow)
    ticking.pass_by(30)
    slow.ended()


# Wills.


@pytest.mark.parametrize(
    ("delay", "said", "seconds"), [(0, {}, 60), (0, KEPT, 60), (30, KEPT, 60), (100, KEPT, 100)]
)
def test_whoever_was_connected_has_a_minute_to_come_back_after_a_restart_or_its_delay(
    ticking: Ticking, delay: int, said: dict[str, Any], seconds: int
) -> None:
    will = Publish("will", b"gone", 1, properties={"will_delay": delay})
    ticking.connected("a", 5, will=will, **said)
    ticking.restart()
    ticking.pass_by(5)
    witness = ticking.subscribed("w", "will")
    ticking.pass_by(seconds - 5.5)
    ticking.quiet(witness)
    ticking.restart()  # once more: its time goes on
    witness = ticking.subscribed("w", "will")
    ticking.pass_by(0.5)
    assert witness.receive().payload == b"gone"


@pytest.mark.parametrize("restart", [False, True])
def test_the_delay_of_a_will_goes_on_over_a_restart(ticking: Ticking, restart: bool) -> None:
    will = Publish("will", b"gone", 1, properties={"will_delay": 30})
    ticking.drop(ticking.connected("a", 5, will=will, **KEPT))
    ticking.pass_by(20)
    if restart:
        ticking.restart()
    witness = ticking.subscribed("w", "will")
    ticking.pass_by(9.5)
    ticking.quiet(witness)
    ticking.pass_by(0.5)
    assert witness.receive().payload == b"gone"


def test_a_session_ends_with_its_last_second(ticking: Ticking) -> None:
    ticking.drop(ticking.connected("a", 5, clean=False, session_expiry=30))
    ticking.pass_by(29.5)
    assert "a" in ticking.broker.sessions
    ticking.pass_by(0.5)
    assert not ticking.broker.sessions


# What goes on at once, and not only when deadlines are looked at: the clock stands still.


def test_retained_messages_come_as_the_client_takes_them(ticking: Ticking) -> None:
    sender = ticking.connected("s")
    for n in range(20):
        payload, qos = b"x" * 100_000, n % 2
        ticking.say(sender, publish_packet(f"r/{n}", payload, qos, n + 1, True, version=4))
    client = ticking.connected("a", 5, receive_maximum=2)
    ticking.say(client, subscribe_packet(("r/#", 1)))
    client.expect(PacketType.SUBACK)
    assert len(ticking.receive(client, 20)) == 20
    ticking.quiet(client)


def test_what_is_queued_comes_as_the_client_reads_though_it_acknowledges_nothing(
    ticking: Ticking,
) -> None:
    client, sender = ticking.subscribed("a", ("t", 1)), ticking.connected("s")
    for n in range(8):
        ticking.say(sender, publish_packet("t", b"x" * 100_000, 1, n + 1, version=4))
    assert ticking.broker.sessions["a"].queue, "its socket does not take them all"
    assert [len(one) for one in ticking.receive(client, 8, acknowledge=False)] == [100_000] * 8


def test_who_must_read_first_is_heard_as_soon_as_it_has(ticking: Ticking) -> None:
    slow = ticking.subscribed("slow", ("t", 0), ("own", 0))
    fill(ticking, slow)
    ticking.say(slow, publish_packet("own", b"first", version=4))
    connection = ticking.broker.sessions["slow"].connection
    assert connection and connection._is_held() and not connection.stream.input
    assert ticking.receive(slow, 4)[-1] == b"first"
    ticking.quiet(slow)


def test_a_sender_that_waited_for_another_is_heard_as_soon_as_that_has_read(
    ticking: Ticking,
) -> None:
    reader = ticking.connected("r", 5, receive_maximum=1)
    ticking.say(reader, subscribe_packet(("t", 1)))
    reader.expect(PacketType.SUBACK)
    sender, gone = ticking.connected("s"), ticking.connected("g")
    session = ticking.broker.sessions["r"]
    packets = [publish_packet("t", b"", 1, n + 1, version=4) for n in range(1100)]
    ticking.say(sender, *packets)
    ticking.say(gone, packets[0])
    waiting = {one.session.client_id for one in session.blocked if one.session}
    assert waiting == {"s", "g"}
    gone.close()
    ticking.say(sender, encode_packet(PacketType.PINGREQ))
    assert len(ticking.receive(reader, 700)) == 700
    assert not session.blocked and ticking.inside == 2, "who has gone is not remembered"
    for _ in range(1100):
        sender.expect(PacketType.PUBACK)
    sender.expect(PacketType.PINGRESP)


def test_what_waited_for_memory_that_others_had_comes_when_that_is_free(
    ticking: Ticking, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = ticking.connected("s")
    ticking.say(sender, publish_packet("r", b"retained", 0, 0, True, version=4))
    deaf = ticking.subscribed("deaf", ("t", 0))
    fill(ticking, deaf)
    monkeypatch.setattr(hive, "MAX_BUFFERED", hive.MAX_OUT // 2)
    client = ticking.subscribed("a", ("r", 0), ("u", 1))
    other = ticking.connected("o")
    ticking.say(other, publish_packet("u", b"queued", 1, 1, version=4))
    ticking.say(other, publish_packet("u", b"dropped", 0, version=4))
    assert "message at QoS 0 dropped" in ticking.log.getvalue()
    ticking.pass_by(0.5)
    ticking.quiet(client)  # that it waits is no reason not to hear it
    ticking.drop(deaf)
    ticking.pass_by(0.5)
    assert sorted(client.receive().payload for _ in range(2)) == [b"queued", b"retained"]


def test_nobody_has_more_than_a_slice_of_a_turn(
    ticking: Ticking, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = ticking.connected("a")
    client.send(encode_packet(PacketType.PINGREQ) * 100)

    def clock() -> float:
        ticking.now += 0.0005  # each look at the clock takes half a millisecond
        return ticking.now

    monkeypatch.setattr(ticking.loop, "clock", clock)
    (connection,) = ticking.broker.connections
    ticking.loop.step()
    assert len(connection.stream.input) // 2 == 98, "it looks twice for each packet"
    for _ in range(100):
        ticking.turn()
    for _ in range(100):
        client.expect(PacketType.PINGRESP)


# The file.


@pytest.mark.skipif(sys.platform != "linux", reason="nothing can be made in Linux's /proc")
@pytest.mark.parametrize("named", [False, True])
def test_where_nothing_can_be_made_it_goes_on_in_memory_and_in_its_spare_place(
    short: Path, loop: hive.Loop, log: io.StringIO, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    monkeypatch.setattr(hive, "SHORT_PLACE", short)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    nowhere = Path("/proc/nothing/state")
    if named:
        with pytest.raises(hive.BrokerError, match=r"^/proc/nothing/s: No such file"):
            hive.Broker(loop, loop.log, BrokerConfig(socket=nowhere.with_name("s")))
        return
    broker = hive.Broker(loop, loop.log, BrokerConfig(state_dir=nowhere))
    broker.start()
    place = hive.spare_path(nowhere / "broker")
    assert broker.socket_path == place and place.is_socket()
    lock = hive.spare_path(nowhere / "broker.sqlite3.lock")
    assert lock.read_text() == str(place), "so others find it"
    assert "going on in memory" in log.getvalue()
    with pytest.raises(hive.BrokerError, match="another broker has"):
        hive.Broker(loop, loop.log, BrokerConfig(state_dir=nowhere))
    broker.close()


def test_what_was_sent_and_not_acknowledged_comes_again_after_a_restart(hosted: Hosted) -> None:
    client = hosted.connected("a", **KEPT)
    client.subscribe("t")
    hosted.drop(client)
    sender = hosted.connected("s", **KEPT)
    for payload in (b"1", b"2", b"3"):
        sender.publish("t", payload)
    sender.send(publish_packet("u", b"once", 2, 77))
    assert sender.expect(PacketType.PUBREC).id == 77
    client = hosted.connected("a", receive_maximum=2, **KEPT)
    sent = [client.receive(acknowledge=False).packet_id for _ in range(2)]
    hosted.stop()
    hosted.start()
    client = hosted.connected("a", receive_maximum=2, **KEPT)
    again = [client.expect(PacketType.PUBLISH) for _ in range(2)]
    assert [(one.id, one.dup) for one in again] == [(id, True) for id in sent]
    client.quiet()
    sender = hosted.connected("s", **KEPT)
    sender.subscribe("u")
    sender.send(publish_packet("u", b"once", 2, 77, dup=True))
    assert sender.expect(PacketType.PUBREC).id == 77
    sender.quiet()


def test_what_was_given_up_before_a_restart_does_not_come_back_with_it(ticking: Ticking) -> None:
    client = ticking.connected("a", 5, **KEPT)
    ticking.say(client, subscribe_packet("t", "u"), publish_packet("v", b"x", 2, 7))
    ticking.say(client, unsubscribe_packet("t"), encode_ack(PacketType.PUBREL, 7, 0, 5))
    ticking.restart()
    client = ticking.connected("a", 5, **KEPT)
    ticking.say(client, publish_packet("t", b"nobody"), publish_packet("u", b"new", 2, 7))
    assert client.receive(acknowledge=False).payload == b"new", "its identifier was free again"
    assert client.expect(PacketType.PUBREC).id == 7
    ticking.quiet(client)


def test_an_expiry_goes_on_over_a_restart(ticking: Ticking) -> None:
    ticking.drop(ticking.connected("a", 5, clean=False, session_expiry=30))
    ticking.pass_by(20)
    ticking.restart()
    ticking.pass_by(9.5)
    assert "a" in ticking.broker.sessions
    ticking.pass_by(0.5)
    assert not ticking.broker.sessions


def test_after_a_restart_the_books_are_as_they_were(ticking: Ticking) -> None:
    def books() -> tuple[int, ...]:
        broker = ticking.broker
        return broker._size, broker._retained_size, broker.sessions["a"].size

    client = ticking.connected("a", 5, will=Publish("will", b"w" * 50, 1), **KEPT)
    ticking.say(client, subscribe_packet("t"))
    ticking.say(client, *(publish_packet("t", b"x" * n, 1, n) for n in (1, 2)))
    ticking.say(client, encode_ack(PacketType.PUBACK, 1, 0, 5))
    ticking.say(client, publish_packet("r", b"y" * 100, 1, 3, True, content_type="z"))
    before = books()
    assert before[0] > before[1] + before[2] > before[2] > 200
    ticking.restart()
    assert books() == before


def test_what_was_acknowledged_late_does_not_come_again(hosted: Hosted) -> None:
    client = hosted.connected("a", **KEPT)
    client.subscribe("t")
    sender = hosted.connected("s")
    for payload in (b"1", b"2", b"3", b"4"):
        sender.publish("t", payload)
    sent = [client.receive(acknowledge=False) for _ in range(4)]
    hosted.drop(client)
    client = hosted.connected("a", receive_maximum=1, **KEPT)
    assert client.receive(acknowledge=False).payload == b"1"
    for one in (sent[2], sent[0]):
        client.send(encode_ack(PacketType.PUBACK, one.packet_id, 0, 5))
    assert [client.receive().payload for _ in range(2)] == [b"2", b"4"]
    client.quiet()


def test_what_was_sent_in_time_comes_again_though_it_has_expired_since(hosted: Hosted) -> None:
    client = hosted.connected("a", **KEPT)
    client.subscribe("t")
    hosted.connected("s").publish("t", b"x", message_expiry=10)
    client.receive(acknowledge=False)
    hosted.drop(client)
    hosted.skip(20)
    again = hosted.connected("a", **KEPT).expect(PacketType.PUBLISH)
    assert again.dup and again.publish.properties == {"message_expiry": 1}


def test_a_will_that_was_published_is_not_in_the_file(ticking: Ticking) -> None:
    will = Publish("will", b"gone", 1, properties={"will_delay": 5, "message_expiry": 100})
    ticking.drop(ticking.connected("a", 5, will=will, **KEPT))
    ticking.restart()
    kept_will = ticking.broker.sessions["a"].will
    assert kept_will and (kept_will.delay, kept_will.expiry) == (5, 100)
    for seconds, saved in ((1, True), (5, False)):
        ticking.pass_by(seconds)
        with closing(sqlite3.connect(ticking.broker.file)) as file:
            (state,) = file.execute("SELECT state FROM session_states").fetchone()
        assert bool(json.loads(state)["will"]) is saved


def test_subscriptions_that_were_not_to_stay_end_with_the_broker(hosted: Hosted) -> None:
    brief = hosted.connected("brief", will=Publish("will", b"gone", 1))
    brief.subscribe("t", "t/+")
    hosted.stop()
    hosted.start()
    sender = hosted.connected("s")
    for topic in ("t", "t/1"):
        assert sender.publish(topic) == ReasonCode.NO_MATCHING_SUBSCRIBERS


def test_a_will_that_nobody_has_room_for_is_in_the_log(hosted_of: Make) -> None:
    hosted = hosted_of(queue_messages=1)
    client = hosted.connected("away", **KEPT)
    client.subscribe("will")
    hosted.drop(client)
    for logged in (False, True):
        hosted.drop(hosted.connected("a", will=Publish("will", b"gone", 1)))
        hosted.connected("b").quiet()
        assert ('event="will dropped" why="a: quota exceeded"' in hosted.log.getvalue()) is logged


def test_after_a_restart_nothing_takes_the_place_of_what_is_there(hosted: Hosted) -> None:
    """The numbers of rows go on behind the last one, whatever that is of."""
    for last in ("session", "message", "queued"):
        name = f"{last}-1"
        if last == "message":
            hosted.connected("s").publish("kept", name.encode(), retain=True)
        else:
            client = hosted.connected(name, **KEPT)
            client.subscribe("t")
            hosted.drop(client)
        if last == "queued":
            hosted.connected("s").publish("t", b"one")
        hosted.stop()
        hosted.start()
        hosted.connected(f"{last}-2", **KEPT).subscribe("u")
        hosted.connected("s").publish("t", last.encode())
        hosted.stop()
        hosted.start()
    expected = {
        "session-1": [b"session", b"message", b"one", b"queued"],
        "session-2": [],
        "message-2": [],
        "queued-1": [b"one", b"queued"],
        "queued-2": [],
    }
    for name, waiting in expected.items():
        client = hosted.client()
        assert client.connect(name, **KEPT).present, name
        assert [client.receive().payload for _ in waiting] == waiting
        client.quiet()
        hosted.drop(client)


def test_rows_that_lead_nowhere_cost_nobody_else_anything(hosted: Hosted) -> None:
    client = hosted.connected("a", will=Publish("will", b"gone", 1), **KEPT)
    client.subscribe("t")
    hosted.connected("b", **KEPT).subscribe("t")
    sender = hosted.connected("s")
    sender.publish("kept", b"retained", retain=True)
    for name in ("a", "b"):
        hosted.drop(next(one for one in hosted.clients if one is client or name == "b"))
        break
    for payload in (b"lost", b"found"):
        sender.publish("t", payload)
    hosted.stop()
    with closing(sqlite3.connect(hosted.broker.file)) as file, file:
        file.execute("DELETE FROM messages WHERE payload IN (?, ?)", (b"lost", b"gone"))
        file.execute("INSERT INTO queued_messages VALUES (999, 1, 1, 1, 0, '', 0, 0)")
        file.execute("INSERT INTO messages VALUES (998, 'x', x'78', 1, 0, x'', 'me', NULL)")
        (found,) = file.execute("SELECT n FROM messages WHERE payload = ?", (b"found",)).fetchone()
        file.execute(f"INSERT INTO queued_messages VALUES (999, 2, {found}, 1, 0, '', 7, 0)")
        file.execute(f"INSERT INTO queued_messages VALUES (997, 3, {found}, 1, 0, '', 0, 0)")
    hosted.start()
    assert "damaged" not in hosted.log.getvalue()
    for name in ("a", "b"):
        client = hosted.connected(name, **KEPT)
        assert client.receive().payload == b"found"
        client.quiet()
    client.subscribe("kept")
    assert client.receive().payload == b"retained"
    assert rows(hosted, "messages WHERE n = 998") == 0, "what nobody needs is removed"


def test_what_no_session_keeps_costs_no_write(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = hosted.connected("a")
    written: list[str] = []
    monkeypatch.setattr(
        hosted.broker.store.database,
        "write",
        lambda statement, values=(): written.append(statement),
    )
    client.subscribe("t")
    for qos in range(3):
        client.publish("t", qos=qos)
        client.receive()
    client.unsubscribe("t")
    client.send(disconnect_packet())
    client.ended()
    assert written == []


def test_a_message_that_a_kept_session_cannot_take_leaves_no_row(hosted: Hosted) -> None:
    client = hosted.connected("a", maximum_packet_size=100, **KEPT)
    client.subscribe("t")
    sender = hosted.connected("s")
    sender.publish("t", b"x" * 200)
    client.quiet()
    assert (rows(hosted, "queued_messages"), rows(hosted, "messages")) == (0, 0)
    sender.publish("t", b"small")
    client.expect(PacketType.PUBLISH)
    assert (rows(hosted, "queued_messages"), rows(hosted, "messages")) == (1, 1)


# What a client may say and have.


def test_filters_that_were_given_up_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, session = hive.SubscriptionTree(), Session("a", 0, (1, 1))
    for _ in range(2):
        for filter, size in (("a/+/b", 3), ("a/+", 3), ("a/#", 4), ("plain/x", 4)):
            tree.add(session, hive.Subscription(filter, 0))
            assert tree.size == size
        for filter, size in (("a/+/b", 3), ("a/#", 2), ("a/+", 0), ("plain/x", 0)):
            tree.remove(session, filter)
            assert tree.size == size
        assert not tree._root and not tree._plain


def test_how_many_levels_all_filters_may_have(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hive.MAX_SUBSCRIPTION_NODES == 200_000  # some 60 MB
    monkeypatch.setattr(hive, "MAX_SUBSCRIPTION_NODES", 4)
    client = hosted.connected("a")
    full = ReasonCode.QUOTA_EXCEEDED
    assert client.subscribe("+/a/b/c/d", "+/a/b", "+/a/c", "+/a/b") == [full, 2, full, 2]


def test_a_retained_message_comes_at_the_lower_of_two_qos(hosted: Hosted) -> None:
    client = hosted.connected("a")
    client.publish("one", b"1", qos=1, retain=True)
    client.publish("none", b"0", qos=0, retain=True)
    for topic, granted, qos in (("one", 0, 0), ("one", 2, 1), ("none", 2, 0)):
        client.subscribe((topic, granted))
        assert client.receive().qos == qos


def test_of_overlapping_filters_one_is_enough_to_hear_that_it_is_retained(hosted: Hosted) -> None:
    """[MQTT-3.3.1-13]"""
    client, sender = hosted.connected("a"), hosted.connected("s")
    client.subscribe(("t/#", 2 << 4 | 8), ("t/+", 2 << 4), ("t/1", 2 << 4))
    sender.publish("t/1", b"x", qos=0, retain=True)
    assert client.receive().retain
    client.quiet()


def test_a_ping_has_nothing_in_it(hosted: Hosted) -> None:
    client = hosted.connected("a")
    client.send(encode_packet(PacketType.PINGREQ, b"x"))
    client.ended(ReasonCode.MALFORMED_PACKET)


def test_what_is_kept_in_all_is_bounded_to_the_byte(ticking: Ticking) -> None:
    """And a tenth of it is for who comes over the socket."""
    bound, session = 256 << 20, Session("a", 0, (10, 1 << 30))
    one = message()
    for share, most in ((1.0, bound), (0.9, int(0.9 * bound))):
        ticking.broker._size = most - one.size
        assert ticking.broker._has_room(session, one, share)
        ticking.broker._size += 1
        assert not ticking.broker._has_room(session, one, share)
    ticking.broker._size = 0
    assert not ticking.broker._has_room(Session("a", 0, (0, 0)), one, 1.0)


@pytest.mark.parametrize("more", [0, 1])
def test_a_packet_may_be_as_large_as_the_client_says(hosted: Hosted, more: int) -> None:
    size = len(publish_packet("t", b"x" * 50, 0))
    client = hosted.connected("a", maximum_packet_size=size)
    client.subscribe(("t", 0))
    client.publish("t", b"x" * (50 + more), qos=0)
    if not more:
        assert client.receive().payload == b"x" * 50
    client.quiet()


@pytest.mark.parametrize("said", [{}, {"receive_maximum": 0xFFFF}, {"receive_maximum": 3}])
def test_no_more_is_under_way_to_a_client_than_is_good(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch, said: dict[str, int]
) -> None:
    monkeypatch.setattr(hive, "SEND_QUOTA", 3)
    client = hosted.connected("a", **said)
    client.subscribe(("t", 1))
    sender = hosted.connected("s")
    for n in range(5):
        sender.publish("t", b"%d" % n)
    sent = [client.receive(acknowledge=False) for _ in range(3)]
    client.quiet()
    client.send(encode_ack(PacketType.PUBACK, sent[0].packet_id, 0, 5))
    assert client.receive(acknowledge=False).payload == b"3"
    client.quiet()


def test_mqtt_3_has_no_receive_maximum(hosted: Hosted) -> None:
    client = hosted.connected("a", 4)
    many = range(1, hive.BROKER_RECEIVE_MAXIMUM + 10)
    client.send(*(publish_packet("t", b"", 2, n, version=4) for n in many))
    assert [client.expect(PacketType.PUBREC).id for _ in many] == [*many]
    client.quiet()


def test_mqtt_3_at_qos_0_is_not_ended_by_what_is_refused(hosted_of: Make) -> None:
    hosted = hosted_of(retained_mib=1)
    client = hosted.connected("a", 4)
    client.publish("t", b"x" * 1_100_000, qos=0, retain=True)
    client.quiet()
    assert not hosted.broker.retained
    assert "message refused" in hosted.log.getvalue()


@pytest.mark.parametrize(
    ("version", "clean", "reason"), [(4, True, 0), (4, False, 2), (5, True, 0), (5, False, 0)]
)
def test_who_may_come_in_without_a_name(
    hosted: Hosted, version: int, clean: bool, reason: int
) -> None:
    """[MQTT-3.1.3-6], 3.1.1 [MQTT-3.1.3-7]"""
    assert hosted.client(version).connect("", clean=clean).reason == reason


def test_an_acknowledgement_of_the_wrong_kind_acknowledges_nothing(hosted: Hosted) -> None:
    client = hosted.connected("a", **kept(5))
    client.subscribe(("one", 1), ("two", 2))
    sender = hosted.connected("s")
    sender.publish("one", qos=1)
    sender.publish("two", qos=2)
    one, two = (client.receive(acknowledge=False) for _ in range(2))
    client.send(encode_ack(PacketType.PUBACK, two.packet_id, 0, 5))
    client.send(encode_ack(PacketType.PUBCOMP, one.packet_id, 0, 5))
    client.quiet()
    client.send(encode_ack(PacketType.PUBREC, one.packet_id, 0, 5))
    answer = client.expect(PacketType.PUBREL)
    assert answer.reason == ReasonCode.PACKET_IDENTIFIER_NOT_FOUND
    hosted.drop(client)
    again = hosted.connected("a", **kept(5))
    assert [again.receive().topic for _ in range(2)] == ["one", "two"]


def test_two_of_the_largest_packets_may_follow_each_other(hosted: Hosted) -> None:
    client = hosted.connected("a")
    largest = b"x" * (hive.MAX_PACKET - len(publish_packet("t", b"x" * 1_700_000)) + 1_700_000)
    assert len(publish_packet("t", largest)) == hive.MAX_PACKET
    client.subscribe(("t", 0))
    client.send(publish_packet("other", largest[:-4]), publish_packet("t", largest))
    assert client.receive().payload == largest
    client.send(publish_packet("t", largest + b"x"))
    client.ended(ReasonCode.PACKET_TOO_LARGE)


def test_who_reads_slowly_loses_what_is_at_qos_0_and_nothing_else(hosted: Hosted) -> None:
    slow, sender = hosted.connected("slow"), hosted.connected("s")
    slow.subscribe(("t", 1))
    sent = 0
    while hosted.broker.buffered.size < (1 << 20) - 300_000:
        sender.publish("t", b"x" * 200_000, qos=0)
        sender.quiet()
        sent += 1
    sender.publish("t", b"y" * (hive.MAX_PACKET - 1000), qos=0)  # the largest that there is
    sender.publish("t", b"dropped", qos=0)
    sender.publish("t", b"kept", qos=1)
    sender.quiet()
    assert "message at QoS 0 dropped" in hosted.log.getvalue()
    assert [slow.receive().payload[:1] for _ in range(sent + 1)] == [b"x"] * sent + [b"y"]
    assert slow.receive().payload == b"kept"
    slow.quiet()


def test_nobody_waits_for_itself(hosted: Hosted) -> None:
    client = hosted.connected("a", receive_maximum=1)
    client.subscribe(("t", 1))
    client.send(*(publish_packet("t", b"", 1, n) for n in range(1, 1500)))
    for n in range(1, 1500):
        assert client.expect(PacketType.PUBACK).id == n
        assert not any(one.blocked_on for one in [*hosted.broker.connections])


# Who may come in.


@pytest.mark.parametrize(
    ("user", "password", "known"),
    [
        ("hive", b"sesame", True),
        ("hive", b"", False),
        ("hive", None, False),
        ("", b"sesame", False),
        (None, b"sesame", False),
        ("root", b"sesame", False),
        (None, None, False),
    ],
)
def test_who_is_known(
    ticking: Ticking, user: str | None, password: bytes | None, known: bool
) -> None:
    settings = ticking.broker._settings
    ticking.broker._settings = settings.replace(username="hive", password="sesame")
    assert ticking.broker.knows(user, password) is known
    ticking.broker._settings = settings
    assert not ticking.broker.knows(user, password), "without a password nobody is"
    assert not ticking.broker.knows(None, None)


@pytest.mark.parametrize(
    ("listen", "found"),
    [
        ("127.0.0.1:1883", ("127.0.0.1", 1883)),
        ("127.1.2.3:1", ("127.1.2.3", 1)),
        ("localhost:1883", ("127.0.0.1", 1883)),
        ("[::1]:1883", ("::1", 1883)),
        ("128.0.0.1:1883", None),
        ("127.0.0.1.example.org:1883", None),
    ],
)
def test_where_it_listens(listen: str, found: tuple[str, int] | None) -> None:
    settings = BrokerConfig(listen=listen, anonymous=True)
    if found:
        assert hive.check_listen(settings) == found
        known = BrokerConfig(listen=listen, username="hive", password="x")
        assert hive.check_listen(known) == found
        with pytest.raises(hive.ConfigError, match="needs username and password_file"):
            hive.check_listen(BrokerConfig(listen=listen))
    else:
        with pytest.raises(hive.ConfigError, match="is not loopback"):
            hive.check_listen(settings)


def test_it_listens_on_ipv6_too_and_again_at_once_after_a_restart(hosted_of: Make) -> None:
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    port = free_port()
    hosted = hosted_of(listen=f"[::1]:{port}", anonymous=True)
    assert hosted.broker.places == f"{hosted.home / 'socket'} and [::1]:{port}"
    for _ in range(2):
        with socket.create_connection(("::1", port), 5) as client:
            client.sendall(connect_packet(5, "a"))
            assert client.recv(1) == b"\x20"
            hosted.stop()  # it hangs up first: the address is in TIME_WAIT
        hosted.start()


def test_over_tcp_nothing_waits_for_more_to_be_sent(hosted_of: Make) -> None:
    port = free_port()
    hosted = hosted_of(listen=f"127.0.0.1:{port}", anonymous=True)
    assert hosted.client(5, port).connect("a").reason == 0
    (connection,) = hosted.broker.connections
    sock = connection.stream._sock
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_without_a_file_left_it_tries_again_in_a_second(ticking: Ticking) -> None:
    class Full:
        """A listener with somebody before it who cannot be let in."""

        def __init__(self) -> None:
            self.pair, self.tries = socket.socketpair(), 0
            self.pair[1].send(b"x")

        def fileno(self) -> int:
            return self.pair[0].fileno()

        def accept(self) -> None:
            self.tries += 1
            raise OSError(errno.EMFILE, "Too many open files")

    full = Full()
    ticking.broker._accept(full, True, 0)  # type: ignore[arg-type]
    tries = []
    for _ in range(3):
        ticking.pass_by(0.75)
        tries.append(full.tries)
        ticking.pass_by(0.25)
    assert tries == [1, 2, 3]
    assert "Too many open files" in ticking.log.getvalue()
    ticking.broker.close()
    ticking.pass_by(5)
    assert full.tries == 4, "nor after its end"
    for end in full.pair:
        end.close()
    ticking.loop.close()
    ticking.start()


def test_a_port_that_is_taken_is_a_line_and_leaves_nothing_open(tmp_path: Path, loop: Any) -> None:
    before = {*os.listdir("/dev/fd")}  # some of other tests may be closed meanwhile
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = BrokerConfig(listen=listen, anonymous=True)
        with pytest.raises(hive.BrokerError, match=f"broker.listen: {listen}: Address already"):
            hive.tcp_listener(settings)
    assert {*os.listdir("/dev/fd")} <= before


@pytest.mark.parametrize(
    ("soft", "most"), [(40, 20), (400, 200), (402, 202), (1024, 824), (4096, 1000), (-1, 1000)]
)
def test_connections_leave_files_for_other_work(
    monkeypatch: pytest.MonkeyPatch, soft: int, most: int
) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, -1))
    assert hive.max_client_connections() == most


# Where it is.


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short path, as a socket needs it."""
    with tempfile.TemporaryDirectory(prefix="hive-") as name:
        yield Path(name)


def test_where_its_socket_is(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    settings = BrokerConfig(state_dir=short / "state")
    assert hive.broker_socket(settings) == short / "hive" / "broker"
    assert hive.broker_socket(settings.replace(socket=short / "own")) == short / "own"
    for elsewhere in ("", str(short / "missing")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", elsewhere)
        assert hive.broker_socket(settings) == short / "state" / "broker"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(short).st_uid + 1)
    assert hive.broker_socket(settings) == short / "state" / "broker", "it is another user's"


@pytest.mark.parametrize("more", [0, 1])
def test_a_path_of_100_bytes_is_a_socket_s_and_a_longer_one_is_not(
    short: Path, loop: hive.Loop, more: int
) -> None:
    socket_path = short / ("x" * (100 + more - len(os.fsencode(short)) - 1))
    settings = BrokerConfig(socket=socket_path, state_dir=short / "state")
    if more:
        with pytest.raises(hive.BrokerError, match="a socket's path has 100 bytes"):
            hive.Broker(loop, loop.log, settings)
        assert not (short / "state").exists()
    else:
        broker = hive.Broker(loop, loop.log, settings)
        broker.start()
        assert socket_path.is_socket()
        broker.close()
        assert not socket_path.exists()


def test_a_second_one_is_told_what_is_taken_and_holds_nothing_itself(
    short: Path, loop: hive.Loop
) -> None:
    first = hive.Broker(loop, loop.log, BrokerConfig(socket=short / "s", state_dir=short / "a"))
    for name, taken, other in (
        ("b", short / "s", "--socket"),
        ("a", short / "a" / "broker.sqlite3", "state_dir in [broker]"),
    ):
        settings = BrokerConfig(
            socket=short / ("s" if name == "b" else "t"), state_dir=short / name
        )
        said = f"another broker has {taken}; stop it, or give this one another {other}"
        with pytest.raises(hive.BrokerError, match=re.escape(said)):
            hive.Broker(loop, loop.log, settings)
    assert (short / "a" / "broker.sqlite3.lock").read_text() == str(short / "s")
    other_broker = hive.Broker(
        loop, loop.log, BrokerConfig(socket=short / "t", state_dir=short / "b")
    )
    other_broker.close()
    first.close()
    again = hive.Broker(loop, loop.log, BrokerConfig(socket=short / "s", state_dir=short / "a"))
    again.close()


def test_what_lies_where_its_socket_should_be_is_said_and_kept(
    short: Path, loop: hive.Loop
) -> None:
    (short / "s").write_text("mine")
    settings = BrokerConfig(socket=short / "s", state_dir=short / "state")
    broker = hive.Broker(loop, loop.log, settings)
    said = f"{short}/s: is no socket, and is left alone; name another --socket"
    with pytest.raises(hive.BrokerError, match=re.escape(said)):
        broker.start()
    broker.close()
    assert (short / "s").read_text() == "mine"


def test_a_directory_for_its_file_that_others_may_write_to_is_said(
    short: Path, loop: hive.Loop
) -> None:
    (short / "state").mkdir()
    (short / "state").chmod(0o777)
    settings = BrokerConfig(socket=short / "s", state_dir=short / "state")
    with pytest.raises(hive.BrokerError, match=r"writable by everyone.* use a directory of your"):
        hive.Broker(loop, loop.log, settings)
