"""Mutated traffic against a real broker process, which must go on serving others at once.

python tests/fuzz_broker.py [--seconds 20] [--seed 1] [--batch N]

Each batch follows from the seed and its number alone, so `--batch N` plays one again.
"""

from __future__ import annotations

import argparse
import random
import select
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raw_mqtt import (
    OwnBroker,
    Raw,
    connect_packet,
    disconnect_packet,
    publish_packet,
    subscribe_packet,
    unsubscribe_packet,
)

import hive
from hive import PacketType, Publish, encode_packet

CONNECTIONS = 60  # in a batch
LINGERING = 100  # connections that stay open, from batch to batch
MOMENT = 3.0  # seconds in which a well-behaved client has its answer
MEMORY = 160 << 20  # bytes
BOUNDS = "queue_messages = 200\nqueue_mib = 2\ntotal_mib = 8\nretained_mib = 2\n"
WEIRD = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff\xff\xff\x7f",
    b"\0\0",
    b"\xed\xa0\x80",
    b"#",
    b"+",
)


def conversations() -> list[list[bytes]]:
    """What well-behaved clients say, packet by packet."""
    said = []
    will = Publish("a/will", b"gone", 1, True)
    rich: dict[str, Any] = {
        "payload_format": 1,
        "message_expiry": 30,
        "content_type": "text/plain",
        "response_topic": "a/answers",
        "correlation_data": b"\0\1\2",
        "user": [("k", "v"), ("k", "w")],
    }
    for version in (4, 5):
        extra = rich if version == 5 else {}
        delayed = Publish("a/will", b"x", 2, properties={"will_delay": 1, **extra})
        acks = [
            hive.encode_ack(kind, id, 0, version)
            for kind in (
                PacketType.PUBACK,
                PacketType.PUBREC,
                PacketType.PUBREL,
                PacketType.PUBCOMP,
            )
            for id in (1, 2, 3)
        ]
        publishing = [
            publish_packet("a/b", b"hello", qos, qos, retain, version=version, **extra)
            for qos in (0, 1, 2)
            for retain in (False, True)
        ]
        subscribing = [
            subscribe_packet(("a/#", 1), ("a/+", 2), version=version),
            subscribe_packet("#", "$SYS/#", "+/b/#", id=2, version=version, identifier=version - 4),
            unsubscribe_packet("a/#", "#", version=version),
        ]
        connects = [
            connect_packet(version, "one", clean=False, will=will),
            connect_packet(version, "", username="u", password=b"p", keepalive=9),
            connect_packet(version, "two", will=delayed if version == 5 else will),
        ]
        if version == 5:
            connects.append(
                connect_packet(
                    5, "three", clean=False, session_expiry=60, receive_maximum=2, user=[("a", "b")]
                )
            )
            publishing.append(publish_packet("a/alias", b"x", topic_alias=3))
            publishing.append(publish_packet("", b"x", topic_alias=3))
        end = [
            encode_packet(PacketType.PINGREQ),
            disconnect_packet() if version == 4 else disconnect_packet(4),
        ]
        for connect in connects:
            said.append([connect, *subscribing[:2], *publishing, *acks, *subscribing[2:], *end])
            said.append([connect, *publishing, *acks])
    return said


def mutated(chance: random.Random, packets: Sequence[bytes]) -> bytes:
    """Some of these packets in some order, with some of their bytes not as they were."""
    chosen = [*packets]
    for _ in range(chance.randrange(4)):
        a, b = chance.randrange(len(chosen)), chance.randrange(len(chosen))
        chosen[a], chosen[b] = chosen[b], chosen[a]
    if chance.random() < 0.7:
        chosen.insert(0, packets[0])  # else CONNECT may come later, and nothing else be heard
    data = bytearray(b"".join(chosen))
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(data))
        end = min(len(data), at + chance.choice((1, 2, 4, 40)))
        match chance.randrange(6):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at] = chance.randrange(256)
            case 2 if end - at < len(data):
                del data[at:end]
            case 3:
                data[at:at] = data[at:end] * chance.choice((1, 3, 500))
            case 4:
                data[at:end] = chance.choice(WEIRD)
            case _:
                data[at:at] = chance.randbytes(chance.choice((1, 5, 50)))
    return bytes(data)


def say(chance: random.Random, client: Raw, data: bytes) -> None:
    """All at once or in pieces, reading now and then or never."""
    client.sock.settimeout(0.02)
    pieces, reads = chance.choice((1, 1, 2, 9)), chance.random() < 0.7
    size = len(data) // pieces + 1
    try:
        for at in range(0, len(data), size):
            client.sock.sendall(data[at : at + size])
            if reads and select.select([client.sock], [], [], 0)[0]:
                client.sock.recv(1 << 16)
    except OSError:  # it is ended, or not listened to any more
        pass


def served(broker: OwnBroker) -> float:
    """Seconds that a well-behaved client waits for all it asks."""
    began = time.monotonic()
    client = broker.client(5)
    client.sock.settimeout(MOMENT)
    assert client.connect("witness").reason == 0
    assert client.subscribe(("$witness/+", 1)) == [1]
    assert client.publish("$witness/x", b"still there?", qos=1) == 0
    assert client.receive().payload == b"still there?"
    client.send(disconnect_packet())
    client.close()
    return time.monotonic() - began


def run_batch(broker: OwnBroker, seed: int, number: int, open_ones: list[Raw]) -> list[bytes]:
    """One batch; what was sent."""
    chance, known, sent = random.Random(f"{seed}/{number}"), conversations(), []
    for _ in range(CONNECTIONS):
        data = mutated(chance, chance.choice(known))
        sent.append(data)
        client = broker.client()
        say(chance, client, data)
        if chance.random() < 0.2:
            open_ones.append(client)
        else:
            client.close()
    while len(open_ones) > LINGERING:
        open_ones.pop(chance.randrange(len(open_ones))).close()
    return sent


def check(broker: OwnBroker) -> float:
    """Is it alive and well?  Raises AssertionError or OSError."""
    assert broker.process and broker.process.poll() is None, "it has ended"
    took = served(broker)
    assert took < MOMENT, f"a well-behaved client waited {took:.1f} s"
    assert "event=bug" not in broker.log, broker.log[-3000:]
    if Path("/proc").exists():
        assert broker.memory < MEMORY, f"{broker.memory >> 20} MB"
    return took


def report(seed: int, number: int, sent: Sequence[bytes], error: Exception) -> None:
    print(f"seed {seed}, batch {number}: {error!r}", file=sys.stderr)
    print("the bytes of each of its connections:", file=sys.stderr)
    for data in sent:
        print(data.hex(), file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        broker = OwnBroker(Path(folder), extra=BOUNDS + "[logging]\nlevel = 'warning'\n").start()
        open_ones: list[Raw] = []
        began, number, slowest = time.monotonic(), args.batch or 0, 0.0
        while time.monotonic() - began < args.seconds:
            sent: list[bytes] = []
            try:
                sent = run_batch(broker, args.seed, number, open_ones)
                slowest = max(slowest, check(broker))
            except (AssertionError, OSError) as error:
                report(args.seed, number, sent, error)
                return 1
            number += 1
            if args.batch is not None:
                break
        memory = broker.memory >> 20 if Path("/proc").exists() else 0
        for client in open_ones:
            client.close()
        broker.close()
    done = (number - (args.batch or 0)) * CONNECTIONS
    print(
        f"fuzz: seed {args.seed}, {done} mutated connections, {memory} MB, slowest {slowest:.2f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
