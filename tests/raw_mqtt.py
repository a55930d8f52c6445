"""An MQTT client that says exactly what the test says, and a broker of ours in this process."""

from __future__ import annotations

import io
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, ROOT, Clock, eventually

import hive
from hive import (
    PacketType,
    Publish,
    Reader,
    ReasonCode,
    encode_packet,
    encode_properties,
    encode_string,
    encode_two_bytes,
    with_length,
)

NOTHING: Mapping[str, Any] = {}
both = pytest.mark.parametrize("version", [4, 5])
KEPT: dict[str, Any] = {"clean": False, "session_expiry": 3600}


def kept(version: int) -> dict[str, Any]:
    """What a CONNECT says to have a session that stays."""
    return KEPT if version == 5 else {"clean": False}


@dataclass(frozen=True)
class Got:
    """A packet from the broker."""

    kind: PacketType
    flags: int
    body: bytes
    version: int

    @property
    def publish(self) -> Publish:
        """As what it is, with the identifiers that only a broker may say."""
        reader, qos = Reader(self.body), self.flags >> 1 & 3
        topic, id = reader.utf8_string(), reader.two_byte_integer() if qos else 0
        properties = reader.properties("PUBLISH") if self.version == 5 else {}
        rest = reader.take(reader.left)
        return Publish(topic, rest, qos, bool(self.flags & 1), id, properties)

    @property
    def dup(self) -> bool:
        return bool(self.flags & 8)

    @property
    def id(self) -> int:
        return (
            self.publish.packet_id
            if self.kind is PacketType.PUBLISH
            else Reader(self.body).two_byte_integer()
        )

    @property
    def present(self) -> bool:
        return bool(self.body[0])

    @property
    def reason(self) -> int:
        """The reason code of a CONNACK, an acknowledgement or a DISCONNECT."""
        at = {PacketType.CONNACK: 1, PacketType.DISCONNECT: 0}.get(self.kind, 2)
        return self.body[at] if len(self.body) > at else 0

    @property
    def reasons(self) -> list[int]:
        """Those of a SUBACK or UNSUBACK."""
        reader = Reader(self.body)
        reader.two_byte_integer()
        if self.version == 5:
            reader.properties(self.kind.name)
        return [*reader.take(reader.left)]

    @property
    def properties(self) -> dict[str, Any]:
        reader = Reader(self.body)
        reader.take({PacketType.DISCONNECT: 1}.get(self.kind, 2))
        return reader.properties(self.kind.name) if reader.left else {}


def connect_packet(
    version: int = 5,
    client_id: str = "",
    clean: bool = True,
    keepalive: int = 0,
    will: Publish | None = None,
    username: str | None = None,
    password: bytes | None = None,
    **properties: Any,
) -> bytes:
    flags = clean << 1 | (username is not None) << 7 | (password is not None) << 6
    payload = encode_string(client_id)
    if will:
        flags |= 4 | will.qos << 3 | will.retain << 5
        if version == 5:
            payload += with_length(encode_properties(will.properties))
        payload += encode_string(will.topic) + hive.encode_binary(will.payload)
    if username is not None:
        payload += encode_string(username)
    if password is not None:
        payload += hive.encode_binary(password)
    head = encode_string("MQTT") + bytes([version, flags]) + encode_two_bytes(keepalive)
    if version == 5:
        head += with_length(encode_properties(properties))
    return encode_packet(PacketType.CONNECT, head + payload)


def publish_packet(
    topic: str,
    payload: bytes = b"",
    qos: int = 0,
    id: int = 0,
    retain: bool = False,
    dup: bool = False,
    version: int = 5,
    **properties: Any,
) -> bytes:
    flags = qos << 1 | retain | dup << 3
    said = encode_properties(properties) if version == 5 else None
    return hive.publish_head(topic.encode(), flags, id, said, len(payload)) + payload


def subscribe_packet(
    *filters: str | tuple[str, int], id: int = 1, version: int = 5, identifier: int = 0
) -> bytes:
    said = {"subscription_id": [identifier]} if identifier else NOTHING
    body = encode_two_bytes(id) + (with_length(encode_properties(said)) if version == 5 else b"")
    for one in filters:
        name, options = (one, 2) if isinstance(one, str) else one
        body += encode_string(name) + bytes([options])
    return encode_packet(PacketType.SUBSCRIBE, body, 2)


def unsubscribe_packet(*filters: str, id: int = 1, version: int = 5) -> bytes:
    body = encode_two_bytes(id) + (b"\0" if version == 5 else b"")
    return encode_packet(PacketType.UNSUBSCRIBE, body + b"".join(map(encode_string, filters)), 2)


def disconnect_packet(reason: int | None = None, **properties: Any) -> bytes:
    if reason is None:
        return encode_packet(PacketType.DISCONNECT)
    said = with_length(encode_properties(properties))
    return encode_packet(PacketType.DISCONNECT, bytes([reason]) + said)


class Raw:
    """One connection."""

    def __init__(self, where: Path | int, version: int = 5) -> None:
        self.version = version
        if isinstance(where, int):
            self.sock = socket.create_connection(("127.0.0.1", where))
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(str(where))
        self.sock.settimeout(PATIENCE)
        self._buffer = bytearray()
        self._last_id = 0
        self.early: list[Got] = []  # messages that came before an answer

    def send(self, *packets: bytes) -> None:
        self.sock.sendall(b"".join(packets))

    def read(self) -> Got | None:
        """The next packet; None where the broker has hung up."""
        while not (found := hive.packet_bounds(self._buffer, 0, 1 << 28)):
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._buffer += data
        first, body = self._buffer[0], bytes(self._buffer[found[0] : found[1]])
        del self._buffer[: found[1]]
        return Got(PacketType(first >> 4), first & 15, body, self.version)

    def expect(self, kind: PacketType) -> Got:
        """The next packet, of this kind; messages that come before an answer are kept."""
        if kind is PacketType.PUBLISH and self.early:
            return self.early.pop(0)
        while (got := self.read()) and got.kind is PacketType.PUBLISH is not kind:
            self.early.append(got)
        assert got and got.kind is kind, got
        return got

    def connect(self, client_id: str = "", **said: Any) -> Got:
        self.send(connect_packet(self.version, client_id, **said))
        return self.expect(PacketType.CONNACK)

    def subscribe(self, *filters: str | tuple[str, int], identifier: int = 0) -> list[int]:
        id = self.next_id()
        self.send(subscribe_packet(*filters, id=id, version=self.version, identifier=identifier))
        got = self.expect(PacketType.SUBACK)
        assert got.id == id
        return got.reasons

    def unsubscribe(self, *filters: str) -> list[int]:
        id = self.next_id()
        self.send(unsubscribe_packet(*filters, id=id, version=self.version))
        got = self.expect(PacketType.UNSUBACK)
        assert got.id == id
        return got.reasons

    def publish(self, topic: str, payload: bytes = b"x", qos: int = 1, **said: Any) -> int:
        """Publish to the end of the exchange; the reason code."""
        id = self.next_id() if qos else 0
        self.send(publish_packet(topic, payload, qos, id, version=self.version, **said))
        if qos == 0:
            return 0
        got = self.expect(PacketType.PUBACK if qos == 1 else PacketType.PUBREC)
        assert got.id == id
        if qos == 2 and got.reason < ReasonCode.UNSPECIFIED_ERROR:
            self.send(hive.encode_ack(PacketType.PUBREL, id, 0, self.version))
            assert self.expect(PacketType.PUBCOMP).id == id
        return got.reason

    def receive(self, acknowledge: bool = True) -> Publish:
        """The next message, acknowledged."""
        message = self.expect(PacketType.PUBLISH).publish
        if acknowledge and message.qos == 1:
            self.send(hive.encode_ack(PacketType.PUBACK, message.packet_id, 0, self.version))
        elif acknowledge and message.qos == 2:
            self.send(hive.encode_ack(PacketType.PUBREC, message.packet_id, 0, self.version))
            assert self.expect(PacketType.PUBREL).id == message.packet_id
            self.send(hive.encode_ack(PacketType.PUBCOMP, message.packet_id, 0, self.version))
        return message

    def quiet(self) -> None:
        """Nothing more has come."""
        self.send(encode_packet(PacketType.PINGREQ))
        self.expect(PacketType.PINGRESP)
        assert not self.early

    def ended(self, reason: int | None = None) -> None:
        """The broker hangs up; in MQTT 5 it says why."""
        if reason is not None and self.version == 5:
            assert self.expect(PacketType.DISCONNECT).reason == reason
        assert self.read() is None

    def next_id(self) -> int:
        self._last_id = self._last_id % 0xFFFF + 1
        return self._last_id

    def close(self) -> None:
        self.sock.close()


class Hosted:
    """A broker of ours on a loop in a thread, whose clock the test may put forward."""

    def __init__(self, home: Path, clock: Clock, **settings: Any) -> None:
        self.home, self.clock, self.log = home, clock, io.StringIO()
        self.settings = hive.BrokerConfig(
            **{"socket": home / "socket", "state_dir": home / "state", **settings}
        )
        self.clients: list[Raw] = []
        self.start()

    def start(self) -> None:
        ready = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(ready,))
        self.thread.start()
        assert ready.wait(PATIENCE)

    def _run(self, ready: threading.Event) -> None:
        log = hive.Log("debug", "text", self.log)
        self.loop = hive.Loop(log, self.clock)
        wall = lambda: time.time() + self.clock.skipped  # noqa: E731
        self.broker = hive.Broker(self.loop, log, self.settings, wall)
        self.broker.start()
        ready.set()
        self.loop.run()
        self.broker.close()
        self.loop.close()

    def stop(self) -> None:
        if self.thread.is_alive():
            self.loop.post(self.loop.stop)
            self.thread.join()

    def client(self, version: int = 5, where: Path | int | None = None) -> Raw:
        """A connection that has said nothing yet."""
        self.clients.append(Raw(where or self.broker.socket_path, version))
        return self.clients[-1]

    def connected(self, client_id: str = "", version: int = 5, **said: Any) -> Raw:
        client = self.client(version)
        assert client.connect(client_id, **said).reason == 0
        return client

    def skip(self, seconds: float) -> None:
        """Let time pass, and the broker look at its deadlines."""
        self.clock.skipped += seconds
        self.loop.post(lambda: None)

    def drop(self, client: Raw) -> None:
        """Close a connection, and wait until the broker knows."""
        before = len(self.broker.connections)
        client.close()
        eventually("it is gone", lambda: len(self.broker.connections) < before)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.stop()
        assert "event=bug" not in self.log.getvalue(), self.log.getvalue()
        assert self.broker.buffered.size == 0  # every byte was counted once


class OwnBroker:
    """`hive.py broker` as a process of its own."""

    def __init__(
        self, home: Path, *arguments: str, extra: str = "", before: Sequence[str] = ()
    ) -> None:
        self.home, self.socket = home, home / "s" / "socket"
        self._arguments, self._before = arguments, before
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o700)
        self.config = home / "hive.toml"
        self.config.write_text(
            f"[broker]\nsocket = {str(self.socket)!r}\nstate_dir = 'state'\n{extra}"
        )
        self.process: subprocess.Popen[str] | None = None

    def command(self) -> list[str]:
        line = [sys.executable, f"{ROOT}/hive-cli", "broker", "--config", str(self.config)]
        return [*self._before, *line, *self._arguments]

    def start(self) -> OwnBroker:
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line.startswith("broker listens on "), (line, self.log)
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process and self.process.stdout
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        self.process.stdout.close()
        self.process = None
        return code

    def client(self, version: int = 5) -> Raw:
        return Raw(self.socket, version)

    @property
    def log(self) -> str:
        file = self.home / "log"
        return file.read_text() if file.exists() else ""

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    @property
    def memory(self) -> int:
        """Bytes that are resident (Linux only)."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    def close(self) -> None:
        if self.process:
            self.stop(signal.SIGKILL)
        assert "event=bug" not in self.log and "Traceback" not in self.log, self.log
