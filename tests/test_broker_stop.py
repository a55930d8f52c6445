"""A broker that stops, however slowly, is no death of anybody; one that died is told at once."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime

import pytest
from conftest import EMBEDDED, MOSQUITTO, Broker, Daemon, Hive, eventually, free_port
from raw_mqtt import Raw

from hive import Envelope, Publish

MANY = 28


@pytest.fixture(params=[MOSQUITTO, EMBEDDED])
def broker_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Front:
    """Stands before a broker, and ends as a slow one does.

    It takes no connection any more, and closes those it has one after the other: whose turn comes
    has its will published, the rest is served meanwhile.
    """

    def __init__(self, broker: Broker) -> None:
        self.broker, self.port = broker, free_port()
        self.start()

    def start(self) -> None:
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self.broker.port))
                self._pairs.append((near, far))
                for one, other in ((near, far), (far, near)):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def stop(self, seconds: float) -> None:
        """Those that came last end first."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for near, far in reversed(self._pairs):
            with contextlib.suppress(OSError):
                far.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)
            time.sleep(seconds / len(self._pairs))


def join(hive: Hive, port: int, name: str) -> Raw:
    """A node that is only its connection: it has a will, and shows itself once."""
    state = {"node_id": name, "daemon_node": name, "status": "online", "interval": 60.0}
    lost = {**state, "status": "offline", "reason": "connection lost"}
    topic = f"{hive.prefix}/meta/{name}/state"
    raw = Raw(port)
    raw.connect(f"{hive.prefix}-{name}", will=Publish(topic, json.dumps(lost).encode(), 1, True))
    raw.publish(topic, json.dumps({**state, "last_seen": int(time.time())}).encode(), retain=True)
    text = json.dumps({"interval": 60.0})
    heartbeat = Envelope.new(name, "all", "heartbeat", text)
    raw.publish(f"{hive.prefix}/all/heartbeat", heartbeat.encode(), qos=0)
    return raw


def alerts(*daemons: Daemon) -> list[str]:
    """What they told the hive of losses."""
    return [row["corr"] for one in daemons for row in one.events("sent", ch="alert")]


@pytest.fixture
def crowd(
    hive_of: Callable[..., Hive], own_broker: Broker
) -> Iterator[Callable[[int, int], tuple[Hive, list[Daemon], list[Raw]]]]:
    """Two daemons, first and last in line to speak, and so many other nodes at one port."""
    raws: list[Raw] = []

    def make(port: int, count: int) -> tuple[Hive, list[Daemon], list[Raw]]:
        hive = hive_of(own_broker, interval=5.0)
        hive.mqtt = f"port = {port}"
        daemons = [hive.node(name).start() for name in ("a-first", "z-last")]
        raws.extend(join(hive, port, f"n{i:02}") for i in range(count))
        for daemon in daemons:
            for i in range(count):
                daemon.logged("peer is up", peer=f"n{i:02}")
        return hive, daemons, raws

    yield make
    for raw in raws:
        raw.close()


@pytest.mark.parametrize("count", [2, MANY])
def test_a_broker_that_takes_four_seconds_to_stop_is_no_loss(
    crowd: Callable[[int, int], tuple[Hive, list[Daemon], list[Raw]]],
    own_broker: Broker,
    count: int,
) -> None:
    front = Front(own_broker)
    hive, daemons, _ = crowd(front.port, count)
    front.stop(4.0)
    for daemon in daemons:
        daemon.logged("no broker, trying again")
        assert len(daemon.events("peer is lost")) >= count
    front.start()
    raws = [join(hive, front.port, f"n{i:02}") for i in range(count)]
    eventually("they are back", lambda: all(len(one.events("connected")) == 2 for one in daemons))
    time.sleep(4)
    assert alerts(*daemons) == []
    for raw in raws:
        raw.close()


def test_a_broker_that_is_told_to_stop_with_a_hundred_connections_is_no_loss(
    crowd: Callable[[int, int], tuple[Hive, list[Daemon], list[Raw]]], own_broker: Broker
) -> None:
    hive, daemons, _ = crowd(own_broker.port, 98)
    own_broker.stop(signal.SIGTERM)
    for daemon in daemons:
        daemon.logged("no broker, trying again")
    own_broker.start()
    raws = [join(hive, own_broker.port, f"n{i:02}") for i in range(98)]
    eventually("they are back", lambda: all(len(one.events("connected")) == 2 for one in daemons))
    time.sleep(4)
    assert alerts(*daemons) == []
    for raw in raws:
        raw.close()


def test_one_that_is_killed_is_told_within_four_seconds_and_once(
    crowd: Callable[[int, int], tuple[Hive, list[Daemon], list[Raw]]], own_broker: Broker
) -> None:
    hive, daemons, _ = crowd(own_broker.port, MANY)
    victim = hive.node("victim").start()
    for daemon in daemons:
        daemon.logged("peer is up", peer="victim")
    killed = time.time()
    victim.stop(signal.SIGKILL)
    heard = daemons[1].logged("received", ch="alert", **{"from": "a-first"})
    told = datetime.fromisoformat(heard["ts"]).timestamp()
    assert told - killed < 4
    time.sleep(4)
    assert alerts(*daemons) == ["lost:victim"]
