"""The embedded broker where it matters: kill -9, full queues, and clients that mean it harm."""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import signal
import socket
import sqlite3
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, ROOT, eventually, fill_disk, free_port
from fuzz_broker import conversations, mutated
from raw_mqtt import (
    KEPT,
    Got,
    Hosted,
    OwnBroker,
    Raw,
    both,
    connect_packet,
    disconnect_packet,
    kept,
    publish_packet,
    subscribe_packet,
)

import hive
from hive import PacketType, Publish, ReasonCode, encode_packet, encode_string

Make = Callable[..., Hosted]
Own = Callable[..., OwnBroker]
MOMENT = 2.0  # seconds; a slow machine with other work is still quicker


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Own]:
    """Make a broker that is a process; it ends with the test."""
    made: list[OwnBroker] = []

    def make(*arguments: str, **said: Any) -> OwnBroker:
        made.append(OwnBroker(tmp_path / "own", *arguments, **said))
        return made[-1]

    yield make
    for one in made:
        one.close()


def restarted(hosted: Hosted) -> Hosted:
    hosted.stop()
    hosted.start()
    return hosted


# What outlives the process.


@both
@pytest.mark.parametrize("qos", [1, 2])
def test_what_was_acknowledged_is_there_after_kill_9(own: Own, version: int, qos: int) -> None:
    broker = own().start()
    reader = broker.client(version)
    reader.connect("reader", **kept(version))
    reader.subscribe("t/#")
    reader.close()
    sender = broker.client(version)
    sender.connect("sender", **kept(version))
    acknowledged = 0
    kind = PacketType.PUBACK if qos == 1 else PacketType.PUBREC
    for n in range(60):
        pieces = range(n * 10 + 1, n * 10 + 11)
        sender.send(*(publish_packet(f"t/{i}", b"%d" % i, qos, i, version=version) for i in pieces))
        for _ in pieces:
            acknowledged = sender.expect(kind).id
        if qos == 2:
            sender.send(*(hive.encode_ack(PacketType.PUBREL, id, 0, version) for id in pieces))
            for _ in pieces:
                sender.expect(PacketType.PUBCOMP)
    sender.send(publish_packet("t/601", b"601", qos, 601, version=version))
    broker.stop(signal.SIGKILL)
    broker.start()
    reader = broker.client(version)
    assert reader.connect("reader", **kept(version)).present
    found = [int(reader.receive().payload) for _ in range(acknowledged)]
    assert found == [*range(1, acknowledged + 1)]


def test_qos_2_is_exactly_once_over_kill_9(own: Own) -> None:
    broker = own().start()
    reader, sender = broker.client(), broker.client()
    reader.connect("reader", **KEPT)
    reader.subscribe("t")
    sender.connect("sender", **KEPT)
    sender.send(publish_packet("t", b"once", 2, 7))
    assert sender.expect(PacketType.PUBREC).id == 7
    first = reader.expect(PacketType.PUBLISH)
    reader.send(hive.encode_ack(PacketType.PUBREC, first.id, 0, 5))
    assert reader.expect(PacketType.PUBREL).id == first.id
    broker.stop(signal.SIGKILL)
    broker.start()
    reader, sender = broker.client(), broker.client()
    assert sender.connect("sender", **KEPT).present
    sender.send(publish_packet("t", b"once", 2, 7, dup=True))
    assert sender.expect(PacketType.PUBREC).id == 7
    reader.connect("reader", **KEPT)
    assert reader.expect(PacketType.PUBREL).id == first.id
    reader.quiet()


@both
def test_sessions_subscriptions_and_retained_messages_outlive_a_restart(
    hosted: Hosted, version: int
) -> None:
    said: dict[str, Any] = {"user": [("a", "1")], "correlation_data": b"\0\xff"}
    said = said if version == 5 else {}
    client = hosted.connected("a", version, **kept(version))
    client.subscribe(("t/+", 1), identifier=7 if version == 5 else 0)
    client.publish("r/1", b"\0\xff", retain=True, **said)
    client.publish("r/2", b"gone", retain=True)
    client.publish("r/2", b"", retain=True)
    restarted(hosted)
    client.ended(ReasonCode.SERVER_SHUTTING_DOWN)
    again = hosted.client(version)
    assert again.connect("a", **kept(version)).present
    again.publish("t/x", qos=0)
    numbered = {"subscription_id": [7]} if version == 5 else {}
    assert again.receive().properties == numbered
    again.subscribe("r/#")
    message = again.receive()
    assert (message.topic, message.payload, message.properties) == ("r/1", b"\0\xff", said)
    again.quiet()


def test_expiry_goes_on_while_nobody_runs(hosted: Hosted) -> None:
    hosted.connected("short", clean=False, session_expiry=60)
    client = hosted.connected("long", **KEPT)
    client.subscribe("t")
    client.send(disconnect_packet())
    client.ended()
    hosted.connected("s").publish("t", b"short", message_expiry=60)
    hosted.connected("s").publish("t", b"long", message_expiry=600)
    hosted.stop()
    hosted.clock.skipped += 100
    hosted.start()
    hosted.connected("short", clean=False).quiet()  # it was connected: its time begins now
    message = hosted.connected("long", **KEPT).receive()
    assert (message.payload, message.properties) == (b"long", {"message_expiry": 500})


def test_a_will_waits_for_who_was_connected_when_the_broker_ended(hosted: Hosted) -> None:
    witness = hosted.connected("w", **KEPT)
    witness.subscribe("will")
    for name in ("back", "lost"):
        hosted.connected(name, will=Publish("will", name.encode(), 1, retain=True))
    restarted(hosted)
    witness = hosted.connected("w", **KEPT)
    hosted.connected("back", will=Publish("will", b"back", 1))
    hosted.skip(hive.WILL_GRACE + 1)
    assert witness.receive().payload == b"lost"
    witness.quiet()


def test_a_message_to_many_is_stored_once_and_leaves_nothing(hosted: Hosted) -> None:
    readers = [hosted.connected(f"r{n}", **KEPT) for n in range(20)]
    for reader in readers:
        reader.subscribe("t")
        hosted.drop(reader)
    hosted.connected("s").publish("t", b"x" * 100_000)
    tables = ("messages", "queued_messages", "session_states")

    def counts() -> list[int]:
        with closing(sqlite3.connect(hosted.broker.file)) as file:
            return [file.execute(f"SELECT count(*) FROM {one}").fetchone()[0] for one in tables]

    assert counts() == [1, 20, 20]
    for n in range(20):
        reader = hosted.connected(f"r{n}", **KEPT)
        reader.receive()
        reader.send(disconnect_packet(0, session_expiry=0))
        reader.ended()
    eventually("nothing is left", lambda: counts() == [0, 0, 0])
    assert hosted.broker._size == 0
    hosted.connected("a", **KEPT).subscribe("t")  # for restarting with something
    restarted(hosted)
    assert set(hosted.broker.sessions) == {"a"}


def test_what_needs_no_disk_is_not_written(hosted: Hosted) -> None:
    client = hosted.connected("a")
    client.subscribe("t")
    for n in range(20):
        client.publish("t", b"%d" % n, qos=n % 3)
    assert not hosted.broker.store.database._uncommitted
    with closing(sqlite3.connect(hosted.broker.file)) as file:
        assert file.execute("SELECT count(*) FROM session_states").fetchone() == (0,)


def test_a_session_is_kept_from_the_connection_on_that_asks_for_it(hosted: Hosted) -> None:
    hosted.connected("a").subscribe("t")
    taking = hosted.client()
    assert not taking.connect("a", **KEPT).present  # the older one's session ended with it
    taking.subscribe("t")
    restarted(hosted)
    client = hosted.client()
    assert client.connect("a", **KEPT).present
    client.publish("t", qos=0)
    client.receive()


def test_a_file_of_seven_tables_is_taken_over(hosted: Hosted) -> None:
    hosted.stop()
    hosted.broker.file.unlink()
    with closing(sqlite3.connect(hosted.broker.file)) as file:
        file.executescript((ROOT / "tests" / "old_broker.sql").read_text())
    hosted.start()
    for _ in range(2):  # what was taken over outlives a restart, too
        restarted(hosted)
    assert "damaged" not in hosted.log.getvalue()
    reader = hosted.connected("reader")
    reader.subscribe(("kept/#", 1), ("will/#", 1))
    kept = {one.topic: one for one in (reader.receive(), reader.receive())}
    assert {topic: one.payload for topic, one in kept.items()} == {
        "kept": b"retained",
        "kept/two": b"retained too",
    }
    assert kept["kept"].properties == {"response_topic": "r"}
    away = hosted.client()
    assert away.connect("away", **KEPT).present
    assert away.expect(PacketType.PUBREL).id == 2
    said = {"content_type": "text/plain", "user": [("k", "v")], "subscription_id": [7]}
    again = away.expect(PacketType.PUBLISH)
    assert again.dup and again.publish == Publish(
        "t/1", b"sent, not acknowledged", 1, packet_id=1, properties=said
    )
    assert [away.receive().payload for _ in range(2)] == [
        b"waits \xff\0",
        b"at QoS 2, not released",
    ]
    away.quiet()  # the third has expired
    assert away.publish("plain", qos=1) == ReasonCode.NO_MATCHING_SUBSCRIBERS  # it is no_local
    old = hosted.client(4)
    assert old.connect("mqtt 3", clean=False).present
    hosted.skip(hive.WILL_GRACE + 1)
    wills = {(one.topic, one.payload) for one in (reader.receive(), reader.receive())}
    assert wills == {("will/brief", b"brief is gone"), ("will/sender", b"sender is gone")}
    sender = hosted.client()
    assert sender.connect("sender", **KEPT).present
    sender.send(publish_packet("t/1", b"the same again", 2, 77))
    assert sender.expect(PacketType.PUBREC).id == 77
    old.quiet()  # it was taken before the old broker was killed
    assert sender.publish("t/1", qos=0) == 0 and old.receive().topic == "t/1"
    with closing(sqlite3.connect(hosted.broker.file)) as file:
        tables = file.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    assert {name for (name,) in tables} == {"messages", "queued_messages", "session_states"}


def test_a_file_of_seven_tables_that_makes_no_sense_is_set_aside(hosted: Hosted) -> None:
    hosted.stop()
    with closing(sqlite3.connect(hosted.broker.file)) as file:
        file.execute("CREATE TABLE parcels (n INTEGER)")
    hosted.start()
    assert "damaged, set aside" in hosted.log.getvalue()
    assert hosted.connected("a", **KEPT).subscribe("t") == [2]


def test_a_damaged_file_is_set_aside(hosted: Hosted) -> None:
    hosted.stop()
    hosted.broker.file.write_bytes(b"no database at all" * 100)
    hosted.start()
    assert "damaged, set aside" in hosted.log.getvalue()
    assert hosted.connected("a", **KEPT).subscribe("t") == [2]


def test_a_full_disk_is_said_and_nothing_is_lost_meanwhile(hosted: Hosted) -> None:
    client = hosted.connected("a", **KEPT)
    client.subscribe("t")
    hosted.broker.loop.post(lambda: fill_disk(hosted.broker.store.database))
    client.close()
    sender = hosted.connected("s")
    for n in range(50):
        assert sender.publish("t", b"%d" % n + b"x" * 3000) == 0
    assert "going on in memory" in hosted.log.getvalue()
    client = hosted.connected("a", **KEPT)
    assert [client.receive().payload.rstrip(b"x") for _ in range(50)] == [
        b"%d" % n for n in range(50)
    ]
    for _ in range(100):
        hosted.skip(1)
        client.quiet()
    eventually("it is back", lambda: "can write again" in hosted.log.getvalue())


@both
def test_who_comes_back_after_a_restart_has_no_session_and_no_will_where_none_was_to_stay(
    hosted: Hosted, version: int
) -> None:
    brief = hosted.connected("brief", version, will=Publish("will", b"brief is gone", 1))
    brief.subscribe("t")
    restarted(hosted)
    witness = hosted.connected("w")
    witness.subscribe("will")
    client = hosted.client(version)
    assert not client.connect("brief", **kept(version)).present
    assert client.publish("t") == (ReasonCode.NO_MATCHING_SUBSCRIBERS if version == 5 else 0)
    hosted.skip(hive.WILL_GRACE + 1)
    witness.quiet()
    restarted(hosted)
    assert hosted.client(version).connect("brief", **kept(version)).present


# Bounds.


def full_queue(hosted: Hosted, payload: bytes = b"x", fits: int = 5) -> Raw:
    """A sender whose messages the session "away" has no room for; "here" would have."""
    client = hosted.connected("away", **KEPT)
    client.subscribe("t")
    hosted.drop(client)
    sender = hosted.connected("s")
    assert [sender.publish("t", payload, qos=1 + n % 2) for n in range(fits)] == [0] * fits
    return sender


@pytest.mark.parametrize("qos", [1, 2])
def test_what_overflows_a_queue_is_refused_to_the_sender(hosted_of: Make, qos: int) -> None:
    hosted = hosted_of(queue_messages=5)
    sender = full_queue(hosted)
    other = hosted.connected("here")
    other.subscribe("t")
    assert sender.publish("t", b"too many", qos=qos) == ReasonCode.QUOTA_EXCEEDED
    assert other.receive().payload == b"too many"  # it has room
    client = hosted.connected("away", **KEPT)
    assert [client.receive().payload for _ in range(5)] == [b"x"] * 5
    client.quiet()
    assert sender.publish("t") == 0
    assert "message refused" in hosted.log.getvalue()


@pytest.mark.parametrize("qos", [1, 2])
def test_mqtt_3_cannot_be_told_so_it_is_not_acknowledged(hosted_of: Make, qos: int) -> None:
    hosted = hosted_of(queue_messages=5)
    full_queue(hosted)
    other = hosted.connected("here")
    other.subscribe("t")
    sender = hosted.connected("old", 4)
    sender.send(publish_packet("t", b"too many", qos, 1, version=4))
    sender.ended()
    other.quiet()  # it will come again, so to nobody yet


@pytest.mark.parametrize(
    "bounds", [{"queue_mib": 1}, {"total_mib": 1}, {"queue_mib": 1, "queue_messages": 100}]
)
def test_queues_are_bounded_in_bytes_too(hosted_of: Make, bounds: dict[str, int]) -> None:
    hosted = hosted_of(**bounds)
    sender = full_queue(hosted, b"x" * 200_000)
    assert sender.publish("t", b"x" * 200_000) == ReasonCode.QUOTA_EXCEEDED
    assert sender.publish("t", b"small") == 0
    assert hosted.broker._size < 1 << 20


def test_what_is_under_way_counts_too(hosted_of: Make) -> None:
    hosted = hosted_of(queue_messages=5)
    client, sender = hosted.connected("here", receive_maximum=2), hosted.connected("s")
    client.subscribe(("t", 1))
    assert [sender.publish("t") for _ in range(6)] == [0] * 5 + [ReasonCode.QUOTA_EXCEEDED]
    client.receive()
    client.send(encode_packet(PacketType.PINGREQ))
    client.expect(PacketType.PINGRESP)  # so it has the acknowledgement too
    assert sender.publish("t") == 0


def test_retained_messages_are_bounded(hosted_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hive, "MAX_RETAINED", 3)
    hosted = hosted_of(retained_mib=1)
    client = hosted.connected("a")
    for n in range(3):
        assert client.publish(f"r/{n}", retain=True) == ReasonCode.NO_MATCHING_SUBSCRIBERS
    assert client.publish("r/3", retain=True) == ReasonCode.QUOTA_EXCEEDED
    assert client.publish("r/2", b"", retain=True) == ReasonCode.NO_MATCHING_SUBSCRIBERS
    assert client.publish("r/3", b"x" * 600_000, retain=True) == ReasonCode.NO_MATCHING_SUBSCRIBERS
    assert client.publish("r/0", b"x" * 600_000, retain=True) == ReasonCode.QUOTA_EXCEEDED
    assert client.publish("r/3", b"y" * 600_000, retain=True) == ReasonCode.NO_MATCHING_SUBSCRIBERS
    client.subscribe(("r/#", 1))
    assert {client.receive().topic for _ in range(3)} == {"r/0", "r/1", "r/3"}


def test_sessions_subscriptions_and_connections_are_bounded(
    hosted_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_SESSIONS", 2)
    monkeypatch.setattr(hive, "MAX_SUBSCRIPTIONS", 3)
    monkeypatch.setattr(hive, "MAX_CLIENT_CONNECTIONS", 8)
    hosted = hosted_of()
    client = hosted.connected("a", **KEPT)
    assert client.subscribe("1", "2", "3", "4", "1") == [2, 2, 2, ReasonCode.QUOTA_EXCEEDED, 2]
    hosted.connected("b", **KEPT)
    assert hosted.client().connect("c", **KEPT).reason == ReasonCode.QUOTA_EXCEEDED
    assert hosted.client(4).connect("c", clean=False).reason == 3
    assert hosted.client().connect("c").reason == 0
    assert hosted.client().connect("b", **KEPT).present
    monkeypatch.setattr(hive, "MAX_SUBSCRIPTION_NODES", 10)
    assert client.unsubscribe("1") == [0]
    assert client.subscribe("+" + "/x" * 20) == [ReasonCode.QUOTA_EXCEEDED]
    crowd = [hosted.client() for _ in range(10)]
    crowd[-1].ended()
    client.quiet()


def test_strangers_on_the_tcp_port_take_no_place_from_the_owner(
    hosted_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_CLIENT_CONNECTIONS", 20)
    monkeypatch.setattr(hive, "MAX_SESSIONS", 10)
    monkeypatch.setattr(hive, "MAX_RETAINED", 10)
    port = free_port()
    hosted = hosted_of(listen=f"127.0.0.1:{port}", anonymous=True)
    crowd = [hosted.client(where=port) for _ in range(30)]
    crowd[-1].ended()
    hosted.connected("owner").publish("a")
    for stranger in crowd:
        stranger.close()
    eventually("they are gone", lambda: len(hosted.broker.connections) == 1)
    refused = 0
    for number in range(12):
        stranger = hosted.client(where=port)
        refused += stranger.connect(f"s-{number}", **KEPT).reason == ReasonCode.QUOTA_EXCEEDED
        hosted.drop(stranger)
    assert refused == 4, "of ten nine are for strangers, but the owner has one of them already"
    owner = hosted.connected("the-owner", **KEPT)
    stranger = hosted.client(where=port)
    stranger.connect("s-0", **KEPT)
    said = [stranger.publish(f"r/{number}", retain=True) for number in range(10)]
    assert said.count(ReasonCode.QUOTA_EXCEEDED) == 1
    assert owner.publish("r/owner", retain=True) == ReasonCode.NO_MATCHING_SUBSCRIBERS


def test_half_packets_of_strangers_take_no_memory_from_the_owner(
    hosted_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_BUFFERED", 1_000_000)
    port = free_port()
    hosted = hosted_of(listen=f"127.0.0.1:{port}", anonymous=True)
    head = bytes([0x10, 0x80, 0x80, 0x40])  # CONNECT, a megabyte of it
    strangers = [hosted.client(where=port) for _ in range(5)]
    for stranger in strangers:
        stranger.send(head + b"x" * 300_000)
    strangers[-1].ended()
    eventually("room is left", lambda: hosted.broker.buffered.size <= 900_000)
    owner = hosted.connected("owner")
    owner.subscribe("a")
    assert owner.publish("a", b"x" * 50_000) == 0
    assert owner.receive().payload == b"x" * 50_000


# Clients that mean it harm.


class Witness:
    """A well-behaved client that measures how long its round trips take."""

    def __init__(self, client: Raw) -> None:
        self.client, self.slowest, self.trips = client, 0.0, 0
        client.subscribe(("witness", 1))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            self.client.publish("witness", qos=1)
            self.client.receive()
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.trips += 1

    def __enter__(self) -> Witness:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if not any(error):
            assert self.trips
            assert self.slowest < MOMENT


def push(client: Raw, data: bytes, seconds: float) -> int:
    """Send the same again and again without reading, as far as the broker takes it."""
    client.sock.settimeout(0.1)
    until, sent = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        try:
            rest = memoryview(data)
            while rest and time.monotonic() < until:
                taken = client.sock.send(rest)
                rest, sent = rest[taken:], sent + taken
        except TimeoutError:
            continue
        except OSError:
            break
    client.sock.settimeout(PATIENCE)
    return sent


def witness(broker: OwnBroker) -> Witness:
    client = broker.client()
    client.connect("witness")
    return Witness(client)


FLOODS = {
    "pings": encode_packet(PacketType.PINGREQ) * 1000,
    "1 MB at QoS 0": publish_packet("flood", b"x" * 1_000_000),
    "1 MB at QoS 1": publish_packet("flood", b"x" * 1_000_000, 1, 1),
    "1 MB retained": publish_packet("flood", b"x" * 1_000_000, 1, 1, retain=True),
    "small at QoS 1": publish_packet("flood", b"x", 1, 1) * 1000,
    "one at QoS 2": publish_packet("flood", b"x", 2, 1) * 1000,
    "subscriptions": subscribe_packet(*(f"+/{n}/#" for n in range(2000))),
    "60 levels": publish_packet("a/" * 59 + "a", b"x") * 100,
}


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_delays_nobody_and_fills_no_memory(own: Own, flood: str) -> None:
    broker = own().start()
    deaf = [broker.client() for _ in range(3)]  # they subscribe, and never read
    for n, one in enumerate(deaf):
        one.send(connect_packet(5, f"deaf{n}", **KEPT), subscribe_packet(("flood", n), "a/#"))
    hostile = broker.client()
    hostile.connect("hostile")
    with witness(broker):
        push(hostile, FLOODS[flood], 0.7)
    assert broker.memory < 300 << 20
    hostile.close()


@pytest.mark.parametrize("flood", ["pings", "small at QoS 1", "one at QoS 2", "60 levels"])
def test_no_more_is_read_than_has_its_turn(hosted: Hosted, flood: str) -> None:
    hostile = [hosted.connected(f"hostile{n}") for n in range(4)]
    most, done = [0], threading.Event()

    def look() -> None:
        while not done.is_set():
            most.extend(len(connection.stream.input) for connection in [*hosted.broker.connections])
            time.sleep(0.001)

    looking = threading.Thread(target=look)
    looking.start()
    floods = [threading.Thread(target=push, args=(one, FLOODS[flood], 0.5)) for one in hostile]
    for each in floods:
        each.start()
    for each in floods:
        each.join()
    done.set()
    looking.join()
    assert max(most) < 2 * hive.READ_CHUNK


def test_ten_thousand_subscriptions_of_sixty_levels(own: Own) -> None:
    broker = own().start()
    client, sender = broker.client(), broker.client()
    client.connect("a")
    sender.connect("s")
    with witness(broker):
        deep = [f"{n}/+" + "/x" * 58 for n in range(3000)]
        for at in range(0, 3000, 1000):
            assert set(client.subscribe(*((one, 0) for one in deep[at : at + 1000]))) == {0}
        exact = [f"exact/{n}" + "/x" * 58 for n in range(7000)]
        assert set(client.subscribe(*((one, 0) for one in exact))) == {0}
        for n in range(0, 3000, 10):
            sender.publish(f"{n}/y" + "/x" * 58, qos=0)
            sender.publish(exact[n], qos=0)
        assert len({client.receive().topic for _ in range(600)}) == 600
    if Path("/proc").exists():
        assert broker.memory < 150 << 20
    client.close()


def test_five_hundred_idle_connections(own: Own) -> None:
    broker = own().start()
    before = broker.memory if Path("/proc").exists() else 0
    idle = [broker.client() for _ in range(500)]
    for n, one in enumerate(idle):
        one.connect(f"idle{n}")
    with witness(broker):
        time.sleep(0.2)
    if before:
        assert broker.memory - before < 20 << 20
    for one in idle:
        one.quiet()
        one.close()


def test_half_packets_are_not_waited_for_for_ever(hosted: Hosted) -> None:
    slow = [hosted.connected(f"slow{n}", 4) for n in range(5)]
    for one in slow:
        one.send(publish_packet("t", b"x" * 100_000, version=4)[:50_000])
    client = hosted.connected("a")
    for _ in range(3):
        hosted.skip(25)
        client.quiet()
        for one in slow:
            one.sock.setblocking(True)
            try:
                one.send(b"x")
            except OSError:
                break
    for one in slow:
        one.ended()


def test_half_packets_of_many_are_bounded(hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hive, "MAX_BUFFERED", 3_000_000)
    half = publish_packet("t", b"x" * 1_000_000)[:-1]
    many = [hosted.connected(f"half{n}") for n in range(4)]
    for one in many:
        push(one, half, 0.2) if one is many[-1] else one.send(half)
    eventually("one is ended", lambda: len(hosted.broker.connections) < 4 or any_ended(hosted))
    assert hosted.broker.buffered.size < 4_000_000
    hosted.connected("a").quiet()


def any_ended(hosted: Hosted) -> bool:
    return any(connection.session is None for connection in [*hosted.broker.connections])


def test_who_never_reads_is_ended_in_the_end(hosted: Hosted) -> None:
    deaf = hosted.connected("deaf", 4, keepalive=0)
    deaf.subscribe(("t", 0))
    sender = hosted.connected("s")
    for _ in range(8):
        sender.publish("t", b"x" * 500_000, qos=0)
    sender.quiet()
    hosted.skip(hive.STALLED + 1)
    eventually("it is gone", lambda: len(hosted.broker.connections) == 1)
    assert "does not read" in hosted.log.getvalue()
    assert hosted.broker.buffered.size < 1000


def test_a_fast_sender_waits_for_a_reader_that_reads(hosted_of: Make) -> None:
    hosted = hosted_of(queue_messages=2000)
    reader, sender = hosted.connected("r"), hosted.connected("s")
    reader.subscribe(("t", 1))
    total = 6000
    acks: list[Got] = []

    def collect() -> None:
        while len(acks) < total:
            acks.append(sender.expect(PacketType.PUBACK))

    thread = threading.Thread(target=collect)
    thread.start()

    def feed() -> None:
        for n in range(total):
            sender.send(publish_packet("t", b"%d" % n, 1, n + 1))

    feeder = threading.Thread(target=feed)
    feeder.start()
    got = [int(reader.receive().payload) for _ in range(total)]
    feeder.join()
    thread.join()
    assert got == [*range(total)]
    assert {one.reason for one in acks} == {0}


def test_a_sender_goes_on_when_the_reader_that_it_waits_for_has_gone(hosted: Hosted) -> None:
    reader, sender = hosted.connected("r", receive_maximum=1), hosted.connected("s")
    reader.subscribe(("t", 1))
    sender.send(*(publish_packet("t", b"x", 1, n + 1) for n in range(1500)))
    eventually(
        "it waits",
        lambda: any(connection.blocked_on for connection in [*hosted.broker.connections]),
    )
    reader.close()
    codes = {sender.expect(PacketType.PUBACK).reason for _ in range(1500)}
    assert codes == {0, ReasonCode.NO_MATCHING_SUBSCRIBERS}


def test_a_loop_that_hosted_one_may_do_other_things_afterwards(tmp_path: Path) -> None:
    log = io.StringIO()
    loop = hive.Loop(hive.Log("debug", "text", log))
    settings = hive.BrokerConfig(socket=tmp_path / "socket", state_dir=tmp_path / "state")
    for _ in range(3):
        broker = hive.Broker(loop, hive.Log("debug", "text", log), settings)
        broker.start()
        client = Raw(tmp_path / "socket")
        client.send(connect_packet(5, "a", **KEPT), publish_packet("t", b"x", 1, 1))
        while not any(connection.session for connection in broker.connections):
            loop.step()
        broker.close()
        client.close()
    loop.after(0.01, loop.stop)
    loop.run()
    loop.close()
    assert "bug" not in log.getvalue()


def test_more_connections_than_there_are_files(tmp_path: Path) -> None:
    few = ("sh", "-c", 'ulimit -n 40; exec "$@"', "sh")
    broker = OwnBroker(tmp_path / "own", before=few).start()
    crowd = [broker.client() for _ in range(80)]
    crowd[-1].ended()
    for one in crowd:
        one.close()

    def comes_in() -> bool:
        client = broker.client()
        client.send(connect_packet(5, "a"))
        got = client.read()
        client.close()
        return got is not None and got.reason == 0

    eventually("those that went are forgotten", comes_in)
    broker.close()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="this needs Linux")
def test_without_a_file_left_it_takes_nobody_and_does_not_run_hot(own: Own) -> None:
    broker = own().start()

    def cpu_seconds() -> float:
        fields = Path(f"/proc/{broker.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    files = len(os.listdir(f"/proc/{broker.pid}/fd"))
    before = resource.prlimit(broker.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(broker.pid, resource.RLIMIT_NOFILE, (files + 5, before[1]))
    crowd = [broker.client() for _ in range(20)]
    eventually("it says so", lambda: "Too many open files" in broker.log)
    began = cpu_seconds()
    time.sleep(1.5)
    assert cpu_seconds() - began < 0.1
    resource.prlimit(broker.pid, resource.RLIMIT_NOFILE, before)
    assert crowd[-1].connect("a").reason == 0  # it waited all the time


def test_after_any_traffic_the_books_balance(hosted_of: Make) -> None:
    hosted, chance = hosted_of(queue_messages=50, queue_mib=1), random.Random(4)
    known = conversations()
    for _ in range(600):
        client = hosted.client()
        client.sock.setblocking(False)
        with contextlib.suppress(OSError):
            client.sock.send(mutated(chance, chance.choice(known)))
        if chance.random() < 0.8:
            client.close()
    hosted.connected("witness").quiet()
    for client in hosted.clients:
        client.close()
    eventually("all are gone", lambda: not hosted.broker.connections)
    hosted.stop()
    broker = hosted.broker
    waiting = [
        queued
        for session in broker.sessions.values()
        for queued in (*session.queue, *session.inflight.values())
    ]
    holding = [queued.message for queued in waiting]
    holding += [
        *broker.retained.values(),
        *(one.will.message for one in broker.sessions.values() if one.will),
    ]
    assert holding
    assert broker._size == sum(message.size for message in {*holding})
    assert broker._retained_size == sum(message.size for message in broker.retained.values())
    for message in {*holding}:
        assert message.references == holding.count(message)
    for session in broker.sessions.values():
        mine = (*session.queue, *session.inflight.values())
        assert session.size == sum(queued.message.size for queued in mine)
    with closing(sqlite3.connect(broker.file)) as file:
        rows = {n for (n,) in file.execute("SELECT n FROM messages")}
        assert rows == {message.n for message in holding}
        rows_of = "SELECT count(*) FROM queued_messages WHERE session"
        assert file.execute(f"{rows_of} != 0").fetchone() == (len(waiting),)
        assert file.execute(f"{rows_of} = 0").fetchone() == (len(broker.retained),)


# The command.


def run(broker: OwnBroker, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*broker.command(), *more], capture_output=True, text=True, timeout=PATIENCE
    )


def refusal(broker: OwnBroker, *more: str) -> str:
    """The one line that a second or misconfigured broker ends with."""
    done = run(broker, *more)
    assert done.returncode in (2, 3), done
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    return line.removeprefix("hive: ")


def test_only_this_user_may_come_in(own: Own) -> None:
    broker = own().start()
    assert stat.S_IMODE(broker.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(broker.socket.parent.stat().st_mode) == 0o700
    for file in (broker.home / "state").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((broker.home / "state").stat().st_mode) == 0o700


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_at_a_signal_and_takes_its_socket_away(own: Own, number: int) -> None:
    broker = own().start()
    client = broker.client()
    client.connect("a")
    assert broker.stop(number) == 0
    client.ended(ReasonCode.SERVER_SHUTTING_DOWN)
    assert not broker.socket.exists()
    broker.start()


def test_there_is_one_at_a_time_and_kill_9_frees_its_place(own: Own, tmp_path: Path) -> None:
    broker = own().start()
    file = broker.home / "state" / "broker.sqlite3"
    assert refusal(broker) == (
        f"another broker has {file}; stop it, or give this one another state_dir in [broker]"
    )
    other = OwnBroker(tmp_path / "other", f"--socket={broker.socket}")
    assert refusal(other) == (
        f"another broker has {broker.socket}; stop it, or give this one another --socket"
    )
    client = broker.client()
    assert client.connect("a").reason == 0
    broker.stop(signal.SIGKILL)
    assert broker.socket.exists()
    broker.start()
    assert broker.client().connect("a").reason == 0


def test_by_default_it_listens_where_the_session_s_files_are(tmp_path: Path) -> None:
    runtime, state = tmp_path / "run", tmp_path / "state"
    runtime.mkdir(mode=0o700)
    for environment, expected in (
        ({"XDG_RUNTIME_DIR": str(runtime)}, runtime / "hive" / "broker"),
        ({}, state / "hive" / ".broker" / "broker"),
        ({"XDG_RUNTIME_DIR": str(tmp_path / "none")}, state / "hive" / ".broker" / "broker"),
    ):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "HIVE_"))}
        clean |= {"XDG_STATE_HOME": str(state), "HOME": str(tmp_path), **environment}
        process = subprocess.Popen(
            [f"{ROOT}/hive-cli", "broker"], stdout=subprocess.PIPE, text=True, env=clean
        )
        assert process.stdout
        with process.stdout:
            assert process.stdout.readline() == f"broker listens on {expected}\n"
            client = Raw(expected)
            assert client.connect("a").reason == 0
            client.close()
            process.terminate()
            assert process.wait(PATIENCE) == 0
        assert (state / "hive" / ".broker" / "broker.sqlite3").exists()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (
            "0.0.0.0:1883",
            "is not loopback; for other machines use Mosquitto: hive broker",
        ),
        ("[::]:1883", "is not loopback"),
        ("example.org:1883", "is not loopback"),
        ("127.0.0.1:1883", "needs username and password_file in [broker], or anonymous = true"),
        ("127.0.0.1:99999", "is not HOST:PORT"),
        ("127.0.0.1", "is not HOST:PORT"),
        (":1883", "is not HOST:PORT"),
    ],
)
def test_where_it_does_not_listen(own: Own, address: str, said: str) -> None:
    broker = own()
    assert said in refusal(broker, "--listen", address)
    assert not broker.socket.exists()


def test_a_port_that_is_taken(own: Own) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = refusal(own(), "--anonymous", "--listen", address)
    assert line == f"broker.listen: {address}: Address already in use"


def test_a_file_that_is_no_socket_is_left_alone(own: Own) -> None:
    broker = own()
    broker.socket.parent.mkdir(mode=0o700)
    broker.socket.write_text("important")
    assert "is no socket, and is left alone" in refusal(broker)
    assert broker.socket.read_text() == "important"


def test_a_directory_that_others_may_write_to(own: Own) -> None:
    broker = own()
    broker.socket.parent.mkdir()
    broker.socket.parent.chmod(0o777)
    assert "is writable by everyone" in refusal(broker)


def test_a_path_that_is_too_long_for_a_socket(own: Own, tmp_path: Path) -> None:
    assert "100 bytes" in refusal(own(), "--socket", str(tmp_path / ("x" * 120)))
    settings = hive.BrokerConfig(state_dir=tmp_path / ("x" * 120))
    found = hive.broker_socket(settings)
    assert len(os.fsencode(found)) <= 100
    assert found == hive.broker_socket(settings)


def test_a_password_from_a_file_lets_a_client_in(own: Own) -> None:
    port = free_port()
    broker = own(
        extra=f"listen = '127.0.0.1:{port}'\nusername = 'hive'\npassword_file = 'password'\n"
    )
    (broker.home / "password").write_text("secret\n")
    (broker.home / "password").chmod(0o600)
    broker.start()
    client = Raw(port)
    assert client.connect("a", username="hive", password=b"secret").reason == 0
    assert (
        Raw(port).connect("a", username="hive", password=b"wrong").reason
        == ReasonCode.BAD_USER_NAME_OR_PASSWORD
    )
    assert "secret" not in broker.log


def test_it_starts_without_paho(tmp_path: Path) -> None:
    import sys

    process = subprocess.Popen(
        [sys.executable, "-S", f"{ROOT}/hive-cli", "broker", f"--socket={tmp_path / 's'}"],
        stdout=subprocess.PIPE,
        text=True,
        env={"HOME": str(tmp_path), "PATH": os.defpath},
        cwd=tmp_path,
    )
    assert process.stdout
    with process.stdout:
        assert process.stdout.readline() == f"broker listens on {tmp_path / 's'}\n"
        process.terminate()
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@both
def test_paho_is_served(own: Own, transport: str, version: int) -> None:
    import paho.mqtt.client as mqtt
    from paho.mqtt.enums import CallbackAPIVersion

    port = free_port()
    broker = own("--anonymous", f"--listen=127.0.0.1:{port}").start()
    got: list[tuple[str, int, bytes]] = []
    ready = threading.Event()
    client = mqtt.Client(
        CallbackAPIVersion.VERSION2,
        "paho",
        protocol=mqtt.MQTTv5 if version == 5 else mqtt.MQTTv311,
        transport="unix" if transport == "unix" else "tcp",
    )
    client.on_subscribe = lambda *_: ready.set()
    client.on_message = lambda c, u, m: got.append((m.topic, m.qos, bytes(m.payload)))
    client.connect(str(broker.socket) if transport == "unix" else "127.0.0.1", port)
    client.loop_start()
    client.subscribe([("t/+", 2)])
    assert ready.wait(PATIENCE)
    for n in range(30):
        client.publish(f"t/{n}", b"%d" % n, n % 3).wait_for_publish(PATIENCE)
    eventually("all are there", lambda: len(got) == 30)
    assert sorted(got) == sorted((f"t/{n}", n % 3, b"%d" % n) for n in range(30))
    client.disconnect()
    client.loop_stop()


def test_noise_before_connect_is_not_answered(hosted: Hosted) -> None:
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"\0" * 100, b"\xff" * 9):
        client = hosted.client()
        client.send(noise)
        client.ended()
    client = hosted.client()
    client.send(encode_packet(PacketType.CONNECT, encode_string("MQTT") + b"\x05"))
    assert client.expect(PacketType.CONNACK).reason == ReasonCode.MALFORMED_PACKET
    client.ended()
