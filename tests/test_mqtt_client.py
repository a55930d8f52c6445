"""The way to the broker: a real Mosquitto, and sockets that misbehave where Mosquitto would not."""

from __future__ import annotations

import errno
import select
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import ne
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
from conftest import (
    EMBEDDED,
    MOSQUITTO,
    PATIENCE,
    Broker,
    Clock,
    find_program,
    free_port,
    need_mosquitto,
)
from raw_mqtt import publish_packet

import hive
from hive import (
    ConfigError,
    IncomingMessage,
    Journal,
    Log,
    Loop,
    MqttClient,
    MqttConfig,
    MqttConnection,
    OutgoingMessage,
    RetainedQuery,
)


class Listener:
    """Takes note of what a client says, and sends what is in its outbox."""

    def __init__(self, client: MqttClient) -> None:
        self.ups, self.downs = 0, list[str]()
        self.messages, self.acking = list[IncomingMessage](), True
        self.client, self.journal = client, Journal(None, Log("error"), 1e6, 10**9)
        self.published: list[tuple[str | None, int, str]] = []

    def open(self) -> None:
        self.client.use_outbox(self.journal, self.hear_of)
        self.client.open(self)

    def hear_of(self, message: OutgoingMessage, code: int, words: str) -> None:
        self.published.append((message.id or message.payload.decode(), code, words))
        self.client.loop.after(0, self.commit)

    def commit(self) -> None:
        self.journal.commit()
        self.client.send_queued()

    def send(self, topic: str, *payloads: bytes, **how: Any) -> None:
        """Put these into the outbox, and send what may be sent."""
        for payload in payloads:
            self.journal.enqueue(topic, payload, **how)
        self.commit()

    def before_connecting(self, go_on: Callable[[], None]) -> None:
        go_on()

    def on_connected(self) -> None:
        self.ups += 1
        self.commit()

    def on_disconnected(self, reason: str) -> None:
        self.downs.append(reason)

    def deliver(self, message: IncomingMessage) -> None:
        self.messages.append(message)
        if self.acking:
            message.ack()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hive, "RETRY", (0.05, 0.2, 0.2))


def turn(loop: Loop, until: Callable[[], Any]) -> None:
    """Let the loop turn until something is true; it never waits longer than a moment."""
    deadline = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < deadline, "it never happened"
        loop.after(0.05, lambda: None)
        loop.step()


def opened(loop: Loop, mqtt: MqttConfig, *args: Any, **kwargs: Any) -> tuple[MqttClient, Listener]:
    client = MqttClient(loop, mqtt, *args, **kwargs)
    listener = Listener(client)
    listener.open()
    return client, listener


def closed(loop: Loop, client: MqttClient) -> None:
    done = list[bool]()
    client.close(lambda: done.append(True), within=1.0)
    turn(loop, lambda: done)


@contextmanager
def server(behave: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server on a free port; each connection is left to `behave` in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=behave, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@pytest.fixture(params=(MOSQUITTO, EMBEDDED))
def broker_kind(request: pytest.FixtureRequest) -> str:
    """What needs a broker of no special configuration runs on both."""
    return str(request.param)


def test_what_is_published_arrives_and_is_acknowledged(loop: Loop, shared_broker: Broker) -> None:
    mqtt = MqttConfig(port=shared_broker.port)
    client, listener = opened(loop, mqtt, "", [("link/a/+", 1)])
    listener.send("link/a/b", b"hello")  # before there is a connection

    turn(loop, lambda: listener.messages and listener.published)

    assert (listener.messages[0].topic, listener.messages[0].payload) == ("link/a/b", b"hello")
    assert listener.published[0][1] == 0
    closed(loop, client)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_what_was_not_acknowledged_comes_again_and_what_was_does_not(
    loop: Loop, shared_broker: Broker, quick: None, protocol: str
) -> None:
    mqtt = MqttConfig(port=shared_broker.port, protocol=protocol)
    topic = f"link/again/{protocol}"
    for acking, expected in ((False, [b"1", b"2"]), (True, [b"1", b"2"]), (True, [b"3"])):
        client, listener = opened(loop, mqtt, f"again-{protocol}", [(topic, 1)])
        listener.acking = acking
        turn(loop, lambda: listener.ups)  # noqa: B023
        if not acking:
            listener.send(topic, b"1", b"2")
        elif expected == [b"3"]:
            listener.send(topic, b"3")
        turn(loop, lambda: len(listener.messages) == len(expected))  # noqa: B023
        assert [message.payload for message in listener.messages] == expected
        closed(loop, client)


def test_after_kill_9_of_the_broker_the_link_returns_and_publishes_what_waited(
    loop: Loop, own_broker: Broker, quick: None
) -> None:
    client, listener = opened(loop, MqttConfig(port=own_broker.port), "returner", [("link/r", 1)])
    turn(loop, lambda: listener.ups == 1)
    own_broker.stop(signal.SIGKILL)
    turn(loop, lambda: listener.downs)
    listener.send("link/r", *(b"%d" % i for i in range(100)))
    client.publish(OutgoingMessage("link/r", b"past the outbox"))
    own_broker.start()

    turn(loop, lambda: len(listener.messages) == 100)

    assert [message.payload for message in listener.messages] == [b"%d" % i for i in range(100)]
    turn(loop, lambda: len(listener.published) == 100)
    assert listener.journal.outbox_size == 0
    closed(loop, client)


def test_a_message_at_which_the_broker_hangs_up_does_not_keep_the_others(
    loop: Loop, shared_broker: Broker, quick: None
) -> None:
    def touchy(client: socket.socket) -> None:
        """Mosquitto behind a proxy that hangs up at the word poison."""
        with socket.create_connection(("127.0.0.1", shared_broker.port)) as broker, client:
            while True:
                for ready in select.select([client, broker], [], [])[0]:
                    data = ready.recv(65536)
                    if not data or b"poison" in data:
                        return
                    (broker if ready is client else client).sendall(data)

    with server(touchy) as port:
        client, listener = opened(loop, MqttConfig(port=port, protocol="5"))
        texts = [b"a", b"b", b"poison", b"c", b"d"]
        listener.send("link/touchy", *texts)
        turn(loop, lambda: len(listener.published) == 5)
        said = {text: (code, words) for text, code, words in listener.published}
        assert [said[text.decode()][0] for text in texts] == [0x10, 0x10, -1, 0x10, 0x10]
        assert said["poison"] == (-1, "the broker closed the connection at it 5 times")
        closed(loop, client)
    assert len(listener.downs) < 8


def test_a_message_whose_time_is_over_while_the_broker_is_away_is_not_published(
    loop: Loop, shared_broker: Broker
) -> None:
    client, listener = opened(loop, MqttConfig(port=shared_broker.port))
    listener.send("link/late", b"x", until=time.time() - 1)
    turn(loop, lambda: listener.published)
    assert listener.published == [("x", -1, "its time to live was over")]
    closed(loop, client)


def test_the_time_to_live_is_the_brokers_message_expiry(loop: Loop, shared_broker: Broker) -> None:
    client, listener = opened(loop, MqttConfig(port=shared_broker.port), "", [("link/ttl", 1)])
    listener.send("link/ttl", b"x", until=time.time() + 60)
    turn(loop, lambda: listener.messages)
    assert listener.messages[0].expires_in in (59, 60)
    closed(loop, client)


def test_a_goodbye_forgets_the_will_and_a_death_does_not(loop: Loop, shared_broker: Broker) -> None:
    mqtt = MqttConfig(port=shared_broker.port)
    witness, listener = opened(loop, mqtt, "", [("link/will/+", 1)])
    turn(loop, lambda: listener.ups)
    polite, _ = opened(loop, mqtt, will=OutgoingMessage("link/will/polite", b"dead"))
    turn(loop, lambda: polite.up)
    closed(loop, polite)
    rude, _ = opened(loop, mqtt, will=OutgoingMessage("link/will/rude", b"dead"))
    turn(loop, lambda: rude.up)
    assert rude._connection
    rude._connection.end("killed")

    turn(loop, lambda: listener.messages)

    assert [message.topic for message in listener.messages] == ["link/will/rude"]
    closed(loop, rude)
    closed(loop, witness)


def test_an_end_without_a_broker_waits_for_nothing(loop: Loop) -> None:
    client, _ = opened(loop, MqttConfig(port=free_port()))
    ended = list[bool]()
    client.close(lambda: ended.append(True), within=60.0)
    assert ended


def test_a_broker_that_refuses_mqtt_5_is_spoken_to_in_3_1_1(
    loop: Loop, shared_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CONNACK with return code 1; a bare end of file; nothing at all, as amqtt does."""
    monkeypatch.setattr(hive, "SILENCE", (0.2, 0.1))
    for refusal in (b"\x20\x02\x00\x01", b"", None):

        def old_broker(client: socket.socket, refusal: bytes | None = refusal) -> None:
            first = client.recv(4096)
            if first[8] == 5:  # the protocol level, after "MQTT"
                if refusal is None:
                    while client.recv(4096):
                        pass
                else:
                    client.sendall(refusal)
                return client.close()
            real = socket.create_connection(("127.0.0.1", shared_broker.port))
            real.sendall(first)
            threading.Thread(target=pump, args=(real, client), daemon=True).start()
            return pump(client, real)

        with server(old_broker) as port:
            client, listener = opened(loop, MqttConfig(port=port), "", [("link/old", 1)])
            listener.send("link/old", b"hello")
            turn(loop, lambda: listener.messages and listener.published)  # noqa: B023
            assert listener.downs == []
            closed(loop, client)


def pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(4096):
            sink.sendall(data)
    except OSError:
        pass
    finally:
        sink.close()


@pytest.mark.parametrize(
    ("sends", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no MQTT broker: it answers as HTTP"),
        (b"\x20\x02\x00\x05", "refused: not authorized"),
        (b"\x20\x03\x00\x86\x00", "refused: bad user name or password"),
        (b"", "the broker closed the connection at once"),
        (b"\x30\x03\x00\x05\xff", "no MQTT broker: it answers as '0\\x03\\x00\\x05\\ufffd'"),
    ],
)
def test_what_is_no_broker_or_refuses_is_told_apart(
    loop: Loop, quick: None, sends: bytes, reason: str
) -> None:
    def behave(client: socket.socket) -> None:
        client.recv(4096)
        client.sendall(sends)
        client.close()

    with server(behave) as port:
        client, listener = opened(loop, MqttConfig(port=port))
        turn(loop, lambda: len(listener.downs) >= 2)  # it tries again
        assert set(listener.downs) <= {reason, "the broker closed the connection at once"}
        assert reason in listener.downs
        closed(loop, client)


def test_a_broker_that_says_nothing_is_given_up_and_meanwhile_the_loop_turns(
    loop: Loop, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "DIAL_DEADLINE", 0.3)
    with server(lambda client: time.sleep(PATIENCE)) as port:
        client, listener = opened(loop, MqttConfig(port=port))
        turns = list[int]()
        loop.after(0.01, lambda: turns.append(1))
        turn(loop, lambda: listener.downs)
        assert listener.downs == ["no answer (CONNACK) in time"] and turns
        closed(loop, client)


def test_of_a_cluster_the_first_host_that_answers_is_taken(
    loop: Loop, shared_broker: Broker
) -> None:
    port, others = shared_broker.port, ("127.0.0.8", "127.0.0.1")
    client, _ = opened(loop, MqttConfig(host="127.0.0.9", port=port, cluster=others))
    turn(loop, lambda: client.up)
    assert client.host == "127.0.0.1"
    closed(loop, client)
    assert [*MqttConfig(host="a", cluster=("b", "c")).hosts(4)] == ["b", "c", "a"]


def test_a_name_that_does_not_resolve_and_a_closed_port_say_so(loop: Loop, quick: None) -> None:
    for mqtt, word in (
        (MqttConfig(port=1), "refused"),
        (MqttConfig(host="no.such.invalid"), "ame"),
    ):
        client, listener = opened(loop, mqtt)
        turn(loop, lambda: listener.downs)  # noqa: B023
        assert word in listener.downs[0]
        closed(loop, client)


@pytest.fixture(scope="module")
def strict_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """TLS, passwords, an ACL and a small maximum packet size."""
    need_mosquitto()
    home = tmp_path_factory.mktemp("strict")
    openssl, passwd = shutil.which("openssl"), find_program("mosquitto_passwd")
    assert openssl and passwd, "openssl and mosquitto_passwd are needed"
    request = f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    request += f" -keyout {home}/key.pem -out {home}/cert.pem"
    request += " -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run(request.split(), check=True, capture_output=True)
    subprocess.run(
        [passwd, "-c", "-b", home / "passwords", "alpha", "s3cret"], check=True, capture_output=True
    )
    (home / "acl").write_text("user alpha\ntopic readwrite allowed/#\n")
    for file in home.iterdir():
        file.chmod(0o600)
    broker = Broker(
        home,
        "allow_anonymous false",
        f"cafile {home}/cert.pem",
        f"certfile {home}/cert.pem",
        f"keyfile {home}/key.pem",
        f"password_file {home}/passwords",
        f"acl_file {home}/acl",
        "max_packet_size 2000",
    )
    yield broker
    broker.stop()


def strict(broker: Broker, **given: Any) -> MqttConfig:
    settings = {"port": broker.port, "tls": True, "ca_file": broker.home / "cert.pem"}
    return MqttConfig(**{**settings, "username": "alpha", "password": "s3cret", **given})


def test_tls_with_a_password_carries_messages_of_any_number(
    loop: Loop, strict_broker: Broker
) -> None:
    client, listener = opened(loop, strict(strict_broker), "", [("allowed/a", 1)])
    listener.send("allowed/a", *[b"x" * 1500] * 200)
    turn(loop, lambda: len(listener.messages) == len(listener.published) == 200)
    closed(loop, client)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"password": "wrong"}, "refused: not authorized"),
        ({"username": None, "password": None}, "refused: not authorized"),
        ({"password": "wrong", "protocol": "3.1.1"}, "refused: not authorized"),
        ({"ca_file": None}, "certificate verify failed"),
        ({"host": "127.0.0.1"}, "certificate verify failed"),
        ({"tls": False}, "closed"),
    ],
)
def test_each_refusal_of_a_strict_broker_says_what_it_is(
    loop: Loop, strict_broker: Broker, quick: None, given: dict[str, Any], reason: str
) -> None:
    client, listener = opened(loop, strict(strict_broker, **given))
    turn(loop, lambda: listener.downs)
    assert reason in listener.downs[0]
    closed(loop, client)


def test_what_the_broker_forbids_or_cannot_take_is_an_error_for_the_publisher(
    loop: Loop, strict_broker: Broker
) -> None:
    client, listener = opened(loop, strict(strict_broker))
    listener.send("forbidden/a", b"forbidden")
    listener.send("allowed/nobody", b"unheard")
    listener.send("allowed/a", b"x" * 3000)
    turn(loop, lambda: len(listener.published) == 3)
    said = {text: (code, words) for text, code, words in listener.published}
    assert said["forbidden"][0] == 0x87 and said["unheard"][0] == hive.NO_SUBSCRIBERS
    words = "larger than the broker takes (3029 of 2000 bytes)"
    assert said["x" * 3000] == (hive.PACKET_TOO_LARGE, words)
    closed(loop, client)


def test_files_that_tls_cannot_use_are_a_configuration_error(loop: Loop, tmp_path: Path) -> None:
    rubbish = tmp_path / "ca.pem"
    rubbish.write_text("rubbish")
    for file in (rubbish, tmp_path / "missing.pem"):
        with pytest.raises(ConfigError, match=str(file)):
            MqttClient(loop, MqttConfig(tls=True, ca_file=file))


def test_a_certificate_that_vanishes_while_the_broker_is_away_is_no_end(
    loop: Loop, strict_broker: Broker, quick: None, tmp_path: Path
) -> None:
    ca = tmp_path / "ca.pem"
    shutil.copy(strict_broker.home / "cert.pem", ca)
    client, listener = opened(loop, strict(strict_broker, ca_file=ca))
    turn(loop, lambda: listener.ups)
    away = ca.rename(tmp_path / "away")
    assert client._connection
    client._connection.end("cut")
    turn(loop, lambda: any(str(ca) in reason for reason in listener.downs))
    away.rename(ca)
    turn(loop, lambda: listener.ups == 2)
    closed(loop, client)


def test_a_survey_has_every_retained_message_before_it_is_complete(
    loop: Loop, shared_broker: Broker
) -> None:
    mqtt = MqttConfig(port=shared_broker.port)
    client, listener = opened(loop, mqtt)
    for i in range(500):
        listener.send(f"link/many/{i}", b"x", retain=True)
    turn(loop, lambda: len(listener.published) == 500)
    closed(loop, client)
    found, complete, down = list[IncomingMessage](), list[int](), list[str]()

    survey = RetainedQuery(
        loop,
        mqtt,
        ["link/many/+"],
        "link/marker",
        found.append,
        lambda: complete.append(len(found)),
        down.append,
    )
    turn(loop, lambda: complete)

    assert complete == [500] and not down
    closed(loop, survey.client)


# What is sent, and when


class Wire:
    """A connection in memory, whose broker says what the test says."""

    made: ClassVar[list[Wire]] = []
    v5 = True

    def __init__(self, owner: MqttClient, protocol: str) -> None:
        self.owner, self.up, self.hung_up, self.welcome = owner, False, False, True
        self.protocol, self.subscribed = protocol, list[str]()
        self.window, self.max_packet, self.heard = hive.SEND_WINDOW, 10**6, time.time()
        self.sent: list[tuple[OutgoingMessage, int | None]] = []
        self.ids: deque[int] = deque()
        self.made.append(self)

    def publish(self, message: OutgoingMessage, expires_in: int | None) -> int:
        self.sent.append((message, expires_in))
        if message.qos:
            self.ids.append(len(self.sent))
        return len(self.sent)

    def take(self, number: int = 1, code: int = 0, words: str = "Success") -> None:
        """The broker acknowledges the first of them, or refuses."""
        self.heard = time.time()
        for _ in range(number):
            self.owner.acknowledged(cast(MqttConnection, self), self.ids.popleft(), code, words)

    def end(self, reason: str = hive.HANG_UP, code: int = 0) -> None:
        self.up = False
        self.owner.disconnected(cast(MqttConnection, self), reason, code)

    def disconnect(self) -> None:
        self.end("closed")

    def subscribe(self, subscriptions: Sequence[tuple[str, int]]) -> None:
        self.subscribed += [topic for topic, _ in subscriptions]

    def let_in(self) -> None:
        self.up = True
        self.owner.connected()

    def say(self, topic: str, payload: bytes = b"x") -> None:
        self.owner.received(IncomingMessage(topic, payload, False, None, lambda: None))

    @property
    def texts(self) -> list[str]:
        return [message.payload.decode() for message, _ in self.sent]


class Rig:
    """A client whose outbox is a journal on disk, and whose time is the test's."""

    def __init__(self, folder: Path) -> None:
        self.now, self.log = 1000.0, Log("error")
        self.loop = Loop(self.log, lambda: self.now)
        self.folder, self.published = folder, list[tuple[str | None, int, str]]()
        self.start()

    def start(self) -> None:
        """As a daemon that begins with what an earlier one left."""
        self.journal = Journal(self.folder, self.log, 7 * 86400, 10**8)
        self.client = MqttClient(self.loop, MqttConfig())
        self.client.use_outbox(self.journal, self.hear_of)
        self.client.open(Listener(self.client))
        self.connect()

    def hear_of(self, message: OutgoingMessage, code: int, words: str) -> None:
        self.published.append((message.id, code, words))

    def connect(self) -> None:
        self.wire.up = True
        self.client.connected()
        self.client.send_queued()

    @property
    def wire(self) -> Wire:
        return Wire.made[-1]

    def enqueue(self, *texts: str, until: float | None = None) -> None:
        for text in texts:
            self.journal.enqueue("hive/beta/command", text.encode(), until=until)

    def commit(self) -> None:
        self.journal.commit()
        self.client.send_queued()

    def send(self, *texts: str) -> None:
        self.enqueue(*texts)
        self.commit()

    def lose(self, reason: str = hive.HANG_UP, code: int = 0) -> None:
        """The connection ends, and there is another."""
        self.wire.end(reason, code)
        self.now += 60
        self.loop.step()
        self.connect()


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(hive, "MqttConnection", Wire)
    rig = Rig(tmp_path)
    yield rig
    Wire.made.clear()
    rig.journal.close()
    rig.loop.close()


def test_it_goes_out_in_order_once_it_is_committed(rig: Rig) -> None:
    rig.enqueue("a", "b", "c")
    assert rig.wire.texts == []
    rig.commit()
    assert rig.wire.texts == ["a", "b", "c"]
    rig.wire.take(2)
    rig.commit()
    assert rig.wire.texts == ["a", "b", "c"], "each goes once"
    assert rig.journal.outbox_size == 1


def test_what_was_not_acknowledged_goes_out_again_before_what_is_new(rig: Rig) -> None:
    rig.send("a", "b", "c")
    rig.wire.take(1, 0x10, "No matching subscribers")
    rig.lose("the network is down")
    rig.send("d")
    assert rig.wire.texts == ["b", "c", "d"]


@pytest.mark.parametrize("window", [1, 7, hive.SEND_WINDOW])
def test_a_long_outage_is_sent_bit_by_bit(rig: Rig, window: int) -> None:
    texts = [f"{n}" for n in range(5 * hive.SEND_WINDOW)]
    rig.wire.window = window
    rig.send(*texts)
    while rig.wire.ids:
        assert len(rig.wire.ids) <= window
        rig.wire.take(1 + len(rig.wire.ids) // 2)
        rig.commit()
    assert rig.wire.texts == texts
    assert rig.journal.outbox_size == 0


def test_the_time_to_live_goes_on_while_it_waits(rig: Rig) -> None:
    for text, until in (("short", time.time() + 50), ("stale", time.time() - 50), ("ever", None)):
        rig.enqueue(text, until=until)
    rig.commit()
    assert rig.wire.texts == ["short", "ever"]
    assert [left for _, left in rig.wire.sent] == [50, None]
    assert rig.published == [(None, -1, "its time to live was over")]


def test_whoever_sent_it_hears_what_became_of_it_once(rig: Rig) -> None:
    for id in ("a", "b"):
        envelope = hive.Envelope.new("alpha", "beta", "command", "x", id=id)
        row = rig.journal.record(hive.Event.SENT, envelope, time.time())
        rig.journal.enqueue("hive/beta/command", envelope.encode(), message=row)
    rig.send("a result of a handler")
    rig.wire.take(1)
    rig.wire.take(1, 0x87, "Not authorized")
    rig.wire.take()
    assert rig.published == [
        ("a", 0, "Success"),
        ("b", 0x87, "Not authorized"),
        (None, 0, "Success"),
    ]
    rig.published.clear()
    rig.lose()
    rig.wire.take()
    rig.commit()
    rig.wire.take(1, 0x10, "No matching subscribers")
    assert rig.published == [(None, 0, "Success"), (None, 0x10, "No matching subscribers")]


def test_what_was_acknowledged_a_moment_ago_goes_out_again_with_the_next_connection(
    rig: Rig,
) -> None:
    rig.send("a", "b", "c")
    rig.wire.take(2)
    rig.commit()
    rig.lose("the network is down")
    assert rig.wire.texts == ["a", "b", "c"]
    rig.wire.take(3)
    rig.wire.heard = time.time() + hive.UNSAVED_SECONDS + 1
    rig.lose("the network is down")
    assert rig.wire.texts == [], "it was heard of afterwards, so it lived and has saved them"


def test_a_broker_that_died_in_silence_may_have_lost_what_it_said_last(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.send("a")
    rig.wire.take()
    later = time.time() + 90
    monkeypatch.setattr(time, "time", lambda: later)
    rig.send("b")  # commits, and sends into the void
    rig.commit()
    rig.lose("keepalive timeout")
    assert rig.wire.texts == ["a", "b"]


def test_what_the_broker_has_saved_is_forgotten(rig: Rig) -> None:
    rig.send("a", "b")
    rig.wire.take(2)
    rig.wire.heard += hive.UNSAVED_SECONDS + 1
    for _ in range(2):
        rig.commit()
    assert rig.journal._database.read("SELECT count(*) FROM outbox") == [(0,)]


@pytest.mark.parametrize(("hours", "again"), [(0, ["a", "b"]), (23, ["a", "b"]), (25, ["b"])])
def test_after_a_death_of_ours_what_was_acknowledged_goes_out_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, hours: int, again: list[str]
) -> None:
    rig.send("a", "b")
    rig.wire.take()
    rig.commit()
    rig.journal.close()
    later = time.time() + hours * 3600
    monkeypatch.setattr(time, "time", lambda: later)
    rig.start()
    assert rig.wire.texts == again


def test_after_an_end_in_order_it_does_not(rig: Rig) -> None:
    rig.send("a", "b")
    rig.wire.take()
    ended = list[bool]()
    rig.client.close(lambda: ended.append(True), within=5.0)
    assert not ended
    rig.wire.take()
    assert ended
    rig.journal.close()
    rig.start()
    assert rig.wire.texts == []


def test_an_end_waits_for_the_rest_of_the_outbox_but_not_for_ever(rig: Rig) -> None:
    rig.wire.window = 1
    rig.send("a", "b", "c")
    ended = list[bool]()
    rig.client.close(lambda: ended.append(True), within=5.0)
    rig.wire.take()
    rig.commit()
    assert rig.wire.texts == ["a", "b"] and not ended
    rig.now += 5.1
    rig.loop.step()
    assert ended
    rig.journal.close()
    rig.start()
    assert rig.wire.texts == ["b", "c"]


def test_what_goes_past_the_outbox_goes_now_or_not_at_all(rig: Rig) -> None:
    said = list[int]()

    def publish(text: str, topic: str = "meta", qos: int = 1) -> None:
        done = lambda code, words: said.append(code)  # noqa: E731
        rig.client.publish(OutgoingMessage(topic, text.encode(), qos, done=done))

    rig.wire.window = 2
    rig.send("a", "b")
    publish("first")
    publish("beat", "heartbeat", 0)
    publish("second")
    publish("other", "other")
    assert rig.wire.texts == ["a", "b", "beat"]
    rig.wire.take(2)
    assert rig.wire.texts == ["a", "b", "beat", "second", "other"], "the last of each topic"
    rig.wire.take(2, 0x10)
    assert said == [0x10, 0x10]
    publish("under way")
    rig.wire.window = 0
    publish("held")
    rig.wire.end("cut")
    publish("down")
    rig.now += 60
    rig.loop.step()
    rig.connect()
    assert rig.wire.texts == ["a", "b"]


def test_a_state_that_the_broker_has_not_taken_yet_is_not_mixed_with_what_it_hung_up_at(
    rig: Rig,
) -> None:
    rig.send("a", "b")
    rig.wire.end()
    rig.now += 60
    rig.loop.step()
    rig.wire.up = True
    rig.client.publish(OutgoingMessage("meta", b"state"))
    rig.client.send_queued()
    assert rig.wire.texts == ["state"]
    rig.wire.take()
    assert rig.published[-1] == (None, 0, "Success")  # so its user commits, and
    rig.commit()
    assert rig.wire.texts == ["state", "a"]


def test_a_message_at_which_the_broker_hangs_up_is_found_though_all_are_under_way(
    rig: Rig,
) -> None:
    texts = [f"{n}" for n in range(hive.SEND_WINDOW)]
    rig.send(*texts)
    hang_ups = 0
    while rig.journal.outbox_size and hang_ups < 50:
        if rig.wire.texts[-1] == "13" or len(rig.wire.ids) > 1:
            hang_ups += 1
            rig.lose()
        else:
            rig.wire.take(1, 0x10)
            rig.commit()
    assert hang_ups == hive.MAX_HANG_UPS
    refused = [words for _, code, words in rig.published if code < 0]
    assert refused == ["the broker closed the connection at it 5 times"]
    assert rig.journal.outbox_size == 0


# How large a packet the broker takes


def hang_up_at(rig: Rig, size: int, code: int = 0) -> int:
    """A broker that says nothing, and hangs up at more than `size` bytes; how often it did."""
    hang_ups = 0
    while rig.journal.outbox_size:
        assert hang_ups < 50
        while rig.wire.ids and len(rig.wire.texts[-len(rig.wire.ids)]) <= size:
            rig.wire.take()
        if rig.wire.ids:
            hang_ups += 1
            rig.lose(code=code)
        rig.commit()
    return hang_ups


@pytest.mark.parametrize(("v5", "expected"), [(False, 2), (True, hive.MAX_HANG_UPS)])
def test_what_is_too_large_for_a_broker_that_does_not_say_so_is_found(
    rig: Rig, v5: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Wire, "v5", v5)
    sizes = [2000, 10, 5000, 1500, 10]
    rig.send(*("x" * size for size in sizes))
    assert hang_up_at(rig, 3000) == expected
    assert [code for _, code, _ in rig.published if code] == [hive.PACKET_TOO_LARGE]
    words = "larger than the broker seems to take (5037 bytes; the largest that it took: 2037)"
    assert words in [words for _, _, words in rig.published]
    assert rig.client.room("t" * 17) == 2000

    rig.send("y" * 6000)
    assert rig.published[-1][1] == hive.PACKET_TOO_LARGE, "it is not tried again"
    rig.send("y" * 2500, "y" * 3500)
    assert hang_up_at(rig, 3000) == expected
    assert rig.client.room("t" * 17) == 2500


def test_a_broker_that_says_what_was_too_large_is_believed_at_once(rig: Rig) -> None:
    rig.send("x" * 10, "x" * 5000, "x" * 2000)
    assert hang_up_at(rig, 3000, code=hive.PACKET_TOO_LARGE) == 1
    assert [code for _, code, _ in rig.published if code] == [hive.PACKET_TOO_LARGE]


@pytest.mark.parametrize("how", ["a while", "another broker"])
def test_a_learned_limit_is_forgotten_after_a_while_and_at_another_broker(
    rig: Rig, how: str
) -> None:
    rig.send("x" * 10, "x" * 5000)
    hang_up_at(rig, 3000)
    assert rig.client.room("t") < 5000
    if how == "a while":
        rig.now += hive.LIMIT_MEMORY
    else:
        rig.client.set_broker(MqttConfig(port=1))
    rig.lose()
    rig.send("x" * 5000)
    assert hang_up_at(rig, 9000) == 0
    assert "x" * 5000 in rig.wire.texts


def test_a_small_message_is_not_given_up_because_the_broker_dies_often(rig: Rig) -> None:
    rig.send("x" * 900)
    for _ in range(hive.MAX_HANG_UPS - 1):
        rig.lose()
    rig.wire.take()
    assert [code for _, code, _ in rig.published] == [0]


# Coming back


def attempts(outage: float, chance: Callable[[], float]) -> Iterator[float]:
    """When a broker is looked for that is away."""
    now, failures = 0.0, 0
    while now < outage:
        now += hive.retry_delay(failures, now, chance())
        failures += 1
        yield now


@pytest.mark.parametrize("chance", [lambda: 0.0, lambda: 1.0, Random(1).random], ids=range(3))
def test_a_broker_that_is_back_within_a_minute_is_found_in_two_seconds(
    chance: Callable[[], float],
) -> None:
    for tenths in range(1, 600):
        found = [*attempts(tenths / 10, chance)][-1]
        assert found - tenths / 10 <= 2.0


def test_a_broker_that_stays_away_is_asked_less_and_less() -> None:
    latest, earliest = [*attempts(3600, lambda: 1.0)], [*attempts(3600, lambda: 0.0)]
    assert latest[0] == 0.5 and earliest[0] == 0.25
    assert latest[-1] - latest[-2] == 30.0 and earliest[-1] - earliest[-2] == 15.0
    assert len([when for when in earliest if when < 60]) < 65
    assert len(earliest) < 500
    assert hive.retry_delay(10**6, 10.0**9, 1.0) == 30.0


def test_nodes_that_lost_their_broker_together_do_not_come_back_together() -> None:
    chance = Random(1)
    first = {round(hive.retry_delay(0, 0.0, chance.random()), 3) for _ in range(100)}
    assert len(first) > 60


def test_an_outage_begins_with_the_first_failure_and_ends_with_a_connection(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[tuple[int, float]]()

    def delay(failures: int, outage: float, chance: float) -> float:
        assert 0 <= chance <= 1
        asked.append((failures, outage))
        return 7.0

    monkeypatch.setattr(hive, "retry_delay", delay)
    for _ in range(3):
        rig.wire.end("refused")
        rig.now += 7.0
        rig.loop.step()
    rig.connect()
    rig.wire.end("refused")
    assert asked == [(0, 0.0), (1, 7.0), (2, 14.0), (0, 0.0)]


# The numbers that a broker is told, and tells


@pytest.mark.parametrize(
    ("code", "failed"), [(-1, True), (0, False), (0x10, False), (0x7F, False), (0x80, True)]
)
def test_a_reason_is_a_failure_from_0x80_on(code: int, failed: bool) -> None:
    assert hive.is_failure(code) is failed


def test_the_broker_keeps_a_session_for_a_week_and_none_without_a_client_id(loop: Loop) -> None:
    heard = list[bytes]()
    with server(lambda client: heard.append(client.recv(4096))) as port:
        for client_id in ("a-node", ""):
            client, _ = opened(loop, MqttConfig(port=port, protocol="5"), client_id)
            turn(loop, lambda: heard)
            week = b"\x11" + (7 * 86400).to_bytes(4, "big")  # MQTT 5, 3.1.2.11.2
            assert (week in heard.pop()) == bool(client_id)
            closed(loop, client)


def test_messages_are_taken_apart_here_and_all_else_by_paho() -> None:
    """Whatever comes in one read, and however a packet is cut."""
    hello, pong, big = publish_packet("t", b"hello"), b"\xd0\0", publish_packet("t", b"x" * 70_000)
    stream = b"\x20\x03\0\0\0" + hello + pong + big + hello + pong
    for size in (1, 3, 7, 100, hive.READ_SIZE):
        chunks = [stream[at : at + size] for at in range(0, len(stream), size)]
        ahead = hive.ReadAhead(lambda most, left=chunks: left.pop(0) if left else b"")  # type: ignore[misc]
        messages, others = list[bytes](), bytearray()
        assert not ahead.for_paho
        while True:
            if published := ahead.publish():
                messages.append(published[1][-5:])
            elif not ahead.for_paho:
                whole = bool(chunks) and len(chunks[0]) == hive.READ_SIZE
                assert ahead.fill() == whole, "there may be more"
            elif part := ahead.recv(1):
                others += part
            else:
                break
        assert messages == [b"hello", b"xxxxx", b"hello"]
        assert others == b"\x20\x03\0\0\0" + pong + pong
        assert ahead.first == stream[: min(size, hive.FIRST_SIZE)]
        assert ahead.recv(1) == b"", "the end"


def test_what_ends_a_connection_is_left_to_paho() -> None:
    errors: list[OSError] = [BlockingIOError(), ConnectionResetError("reset")]

    def recv(size: int) -> bytes:
        raise errors.pop(0)

    ahead = hive.ReadAhead(recv)
    assert not ahead.fill() and not ahead.for_paho
    with pytest.raises(BlockingIOError):
        ahead.recv(1)
    assert not ahead.fill() and ahead.for_paho
    with pytest.raises(ConnectionResetError):
        ahead.recv(1)


@pytest.mark.parametrize("topic", [b"link/\xff", b"", b"link/+"])
def test_a_topic_that_a_lax_broker_lets_through_is_no_end(loop: Loop, topic: bytes) -> None:
    """Or whoever sends one would keep all others from their broker."""
    message = b"\x30" + bytes([len(topic) + 4, 0, len(topic)]) + topic + b"\0x"

    def behave(client: socket.socket) -> None:
        client.recv(4096)
        client.sendall(b"\x20\x03\0\0\0" + message + publish_packet("link/good", b"x"))
        client.recv(4096)

    with server(behave) as port:
        client, listener = opened(loop, MqttConfig(port=port))
        turn(loop, lambda: len(listener.messages) == 2)
        assert listener.messages[1].topic == "link/good" and not listener.downs
        closed(loop, client)


def test_a_message_before_the_welcome_is_no_message(loop: Loop) -> None:
    with server(lambda client: client.sendall(publish_packet("t", b"x"))) as port:
        client, listener = opened(loop, MqttConfig(port=port))
        turn(loop, lambda: listener.downs)
        assert listener.downs[0].startswith("no MQTT broker") and not listener.messages
        closed(loop, client)


def test_many_messages_are_read_at_once(loop: Loop, shared_broker: Broker) -> None:
    client, listener = opened(loop, MqttConfig(port=shared_broker.port), "", [("link/ahead", 1)])
    turn(loop, lambda: listener.ups)
    assert client._connection
    taken = list[int]()
    ahead = client._connection._ahead
    whole = ahead._recv

    def recv(size: int) -> bytes:
        taken.append(size)
        return whole(size)

    ahead._recv = recv
    listener.send("link/ahead", *[b"x"] * 200)
    turn(loop, lambda: len(listener.messages) == 200)
    assert {*taken} == {hive.READ_SIZE} and len(taken) < 300
    closed(loop, client)


def test_it_pings_at_half_the_keepalive_and_gives_up_after_two_and_a_half(
    loop: Loop, clock: Clock
) -> None:
    pings, answers = list[float](), True  # when each came

    def behave(client: socket.socket) -> None:
        client.recv(4096)
        client.sendall(b"\x20\x03\0\0\0")  # CONNACK
        while said := client.recv(4096):
            if said == b"\xc0\0":
                client.sendall(b"\xd0\0" * answers)
                pings.append(clock())

    def later(seconds: float) -> None:
        clock.skipped += seconds
        for _ in range(3):
            loop.after(0.02, lambda: None)
            loop.step()

    with server(behave) as port:
        client, listener = opened(loop, MqttConfig(port=port, keepalive=600))
        turn(loop, lambda: listener.ups)
        while len(pings) < 3:
            before = [*pings]
            later(290)
            assert pings == before
            later(11)
            turn(loop, partial(ne, pings, before))
        later(290)
        client.publish(OutgoingMessage("t/x", b"x", qos=0))
        later(290)
        assert len(pings) == 3, "what is said says enough"
        answers = False
        later(20)
        turn(loop, lambda: len(pings) == 4)
        later(800)
        assert not listener.downs
        later(301)
        turn(loop, lambda: listener.downs)
        assert listener.downs == ["no answer (PINGRESP) in time"]
        closed(loop, client)


@pytest.mark.parametrize("how", ["takes it", "closed", "says nothing", "hangs up"])
def test_a_probe_says_once_whether_the_broker_takes_a_connection(
    loop: Loop, shared_broker: Broker, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(hive, "PROBE_TIMEOUT", PATIENCE if how != "says nothing" else 0.2)
    said = list[bool]()
    with server(lambda sock: sock.close() if how == "hangs up" else time.sleep(1)) as there:
        port = {"takes it": shared_broker.port, "closed": 1}.get(how, there)
        hive.ConnectionProbe(loop, MqttConfig(host="127.0.0.1", port=port), said.append)
        began = time.monotonic()
        turn(loop, lambda: said)
        assert time.monotonic() - began < PATIENCE / 2
    assert said == [how == "takes it"]


def test_what_tls_holds_back_is_read_at_once() -> None:
    class Held:
        def __init__(self, size: int) -> None:
            self.pending = lambda: size

    ours, theirs = socket.socketpair()
    with ours, theirs:
        held = [hive.is_pending(one) for one in (Held(5), Held(0), ours)]
    assert held == [True, False, False]


@pytest.mark.parametrize("method", hive.PAHO_METHODS)
def test_a_paho_that_has_changed_inside_is_told_in_a_line(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(hive.load_paho().Client, method)
    with pytest.raises(hive.UsageError, match=f"has no {method}, as 2.1 had: python3 -m pip"):
        hive.load_paho()


# What is said of a connection, to the byte


@pytest.mark.parametrize(
    ("first", "words", "code"),
    [
        (b"", "", 0),
        (b"\x20\x02\x00\x05", "", 0),  # which paho understands
        (b"\x20\x02\x00\x01", "refused: unsupported protocol version", 0x84),
        (b"\x20\x03\x00\x99\x00", "refused: payload format invalid", 0x99),
        (b"\x20\x80\x01\x00\x01\x00", "refused: unsupported protocol version", 0x84),
        (b"\x20\x7f\x00\x01\x05", "refused: unsupported protocol version", 0x84),
        (b"<html>", "no MQTT broker: it answers as HTTP", 0),
        (b"220 mail\r\n250 ok\r\n", "no MQTT broker: it answers as '220 mail'", 0),
    ],
)
def test_the_first_bytes_of_a_server_tell_what_it_is(first: bytes, words: str, code: int) -> None:
    assert hive.first_fault(first) == (words, code)


@pytest.mark.parametrize(
    ("error", "tls", "words"),
    [
        (
            ssl.SSLError(1, "[SSL: X] verify failed: why (_ssl.c:10)"),
            True,
            "TLS: verify failed: why",
        ),
        (ConnectionResetError(104, "reset"), True, "TLS: reset"),
        (ConnectionResetError(104, "reset"), False, "reset"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), True, "refused"),
        (OSError(113, "no route"), True, "no route"),
    ],
)
def test_what_went_wrong_in_tls_says_so(error: OSError, tls: bool, words: str) -> None:
    assert hive.dial_fault(error, tls) == words


def test_why_tls_ended_is_kept_and_other_ends_are_paho_s() -> None:
    faults = []
    for error in (ssl.SSLError(1, "[SSL: X] alert (_ssl.c:10)"), ConnectionResetError(104, "r")):

        def recv(size: int, error: OSError = error) -> bytes:
            raise error

        ahead = hive.ReadAhead(recv)
        assert ahead.fill() is False and ahead.for_paho
        faults.append(ahead.fault)
    assert faults == ["TLS: alert", ""]


def test_the_flags_of_a_message_are_its_first_four_bits() -> None:
    chunks = [b"\x3b\x06\x00\x01t\x00\x07x"]
    ahead = hive.ReadAhead(lambda size: chunks.pop(0) if chunks else b"")
    ahead.fill()
    assert ahead.publish() == (0b1011, b"\x00\x01t\x00\x07x") and ahead.publish() is None


def test_the_pause_before_a_try_is_what_is_promised() -> None:
    said = [hive.retry_delay(failures, 0.0, 1.0) for failures in range(4)]
    assert said == [0.5, 1.0, 2.0, 2.0]
    assert hive.retry_delay(20, 300.0, 1.0) == pytest.approx(10.0)
    assert hive.retry_delay(20, 300.0, 0.0) == pytest.approx(5.0)


def test_a_broker_s_words_beside_its_refusal_are_shown() -> None:
    said = SimpleNamespace(ReasonString="later\n", ServerReference="two.lan")
    assert hive.said_besides(said) == r" (later\n) (two.lan)" and hive.said_besides(None) == ""


def test_acknowledgements_of_tcp_are_hurried_where_that_can_be() -> None:
    said = list[tuple[int, ...]]()
    hive.acknowledge_at_once(SimpleNamespace(setsockopt=lambda *how: said.append(how)))
    quick = getattr(socket, "TCP_QUICKACK", None)
    assert said == ([(socket.IPPROTO_TCP, quick, 1)] if quick else [])
    hive.acknowledge_at_once(None)
    one, other = socket.socketpair()
    with one, other:
        hive.acknowledge_at_once(one)  # which knows no such thing


def test_what_is_known_of_a_broker_s_limit() -> None:
    limit = hive.PacketLimit()
    assert hive.PacketLimit.size("abc", b"xy") == 25  # 20 bytes of the packet's own at most
    assert limit.objection(10**9) == "" and limit.room("t") > 10**9
    limit.connected(5000, 100.0)
    assert limit.room("t") == 5000 - 21
    assert limit.objection(5000) == ""
    assert limit.objection(5001) == "larger than the broker takes (5001 of 5000 bytes)"
    assert [limit.suspicious(size) for size in (1024, 1025)] == [False, True]
    words = "larger than the broker seems to take (4000 bytes; none was taken)"
    assert limit.refused(4000, 100.0) == words and limit.objection(3999) == ""
    assert limit.room("t") == 1024 - 21
    limit.taken = 2000
    assert limit.refused(4500, 100.0).endswith("(4500 bytes; the largest that it took: 2000)")
    assert limit.objection(4000) and limit.room("t") == 2000 - 21
    assert [limit.suspicious(size) for size in (2000, 2001)] == [False, True]
    for now, believed in ((3700.0, True), (3700.5, False)):
        limit.connected(5000, now)
        assert bool(limit.objection(4999)) is believed


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_how_a_client_introduces_itself(loop: Loop, persistent: bool, protocol: str) -> None:
    """MQTT 5, 3.1: level, flags, keepalive, properties, client id, will, user, password."""
    heard = list[bytes]()
    will = OutgoingMessage("t/w", b"gone", 1, True)
    with server(lambda client: heard.append(client.recv(4096))) as port:
        mqtt = MqttConfig(port=port, protocol=protocol, password="s3cret", keepalive=77)
        client, _ = opened(loop, mqtt, "a-node" if persistent else "", will=will)
        turn(loop, lambda: heard)
        closed(loop, client)
    body = heard[0][heard[0].index(b"\0\4MQTT") + 6 :]
    level, flags, keepalive = body[0], body[1], int.from_bytes(body[2:4], "big")
    assert (level, keepalive) == (5 if protocol == "5" else 4, 77)
    assert flags == 0x80 | 0x40 | 0x20 | 0x08 | 0x04 | (0 if persistent else 0x02)
    assert (b"\x21\x01\x00" in body[4:16]) == (protocol == "5"), "256 on their way to us"
    assert (b"a-node" in body) == persistent
    assert persistent or len(body.partition(b"hive-")[2].partition(b"\0")[0]) == 16
    assert b"t/w" in body and b"gone" in body and body.endswith(b"\0\6s3cret")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, (20, 2**63 - 1, 60)),
        ({"ReceiveMaximum": 7, "MaximumPacketSize": 3000, "ServerKeepAlive": 9}, (7, 3000, 9)),
        ({"ReceiveMaximum": 65535, "ServerKeepAlive": 0}, (20, 2**63 - 1, 60)),
    ],
)
def test_what_the_broker_tells_at_the_begin_is_kept_to(
    said: dict[str, int], expected: tuple[int, ...]
) -> None:
    posted = list[object]()
    connection: Any = SimpleNamespace(
        _keepalive=60, _loop=SimpleNamespace(post=posted.append), _subscribe=print, welcome=False
    )
    code = SimpleNamespace(is_failure=False)
    MqttConnection._on_connect(connection, None, None, None, code, SimpleNamespace(**said))
    assert (connection.window, connection.max_packet, connection._keepalive) == expected
    assert connection.welcome and posted == [print]


def test_the_last_part_of_a_second_is_time_to_live_too(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    for text, left in (("over", 0.0), ("moment", 0.01), ("second", 1.0), ("more", 1.5)):
        rig.enqueue(text, until=now + left)
    rig.commit()
    assert [(one.payload, left) for one, left in rig.wire.sent] == [
        *((b"moment", 1), (b"second", 1), (b"more", 2))
    ]
    assert rig.published == [(None, -1, "its time to live was over")]


def test_it_goes_where_its_topic_s_address_is(rig: Rig) -> None:
    where: dict[str, str | None] = {"away": None}
    rig.client.use_outbox(rig.journal, rig.hear_of, lambda topic: where.get(topic, f"to/{topic}"))
    for topic in ("a", "away"):
        rig.journal.enqueue(topic, b"x")
    rig.commit()
    assert [message.topic for message, _ in rig.wire.sent] == ["to/a"]
    rig.client.use_outbox(rig.journal, rig.hear_of)
    rig.commit()
    assert [message.topic for message, _ in rig.wire.sent] == ["to/a", "a", "away"]


def test_what_was_handed_to_another_broker_goes_again_after_what_is_under_way(rig: Rig) -> None:
    rig.send("a", "b")
    rig.wire.take()
    rig.client.send_again()
    rig.send("c")
    assert rig.wire.texts == ["a", "b"]
    rig.wire.take()
    rig.commit()
    assert rig.wire.texts == ["a", "b", "a", "b", "c"]
    rig.wire.take(3)
    rig.commit()
    assert len(rig.wire.texts) == 5


def test_whom_a_client_left_is_not_heard_any_more(rig: Rig) -> None:
    rig.send("a")
    before = rig.wire
    rig.lose("cut")
    before.take()
    before.end("late")
    assert rig.published == [] and rig.client.up and rig.journal.outbox_size == 1


def test_an_end_while_it_is_away_is_an_end(rig: Rig) -> None:
    rig.wire.end("cut")
    rig.client.close(lambda: None, within=5.0)
    rig.now += 60
    rig.loop.step()
    assert len(Wire.made) == 1


def test_a_host_that_lets_nobody_in_is_asked_last(rig: Rig) -> None:
    rig.lose()
    assert rig.client.turn == 0 and rig.client.welcome
    rig.wire.welcome = False
    assert not rig.client.welcome
    rig.wire.end("refused")
    assert rig.client.turn == 1 and not rig.client.welcome


@pytest.mark.parametrize("how", ["refused", "hung up", "refused for something else"])
def test_3_1_1_is_tried_at_once_and_mqtt_5_after_that(rig: Rig, how: str) -> None:
    rig.client.settings = MqttConfig(protocol="5")
    rig.wire.hung_up = how == "hung up"
    rig.wire.end("refused", 0x84 if how == "refused" else 0x87)
    other = how == "refused for something else"
    assert len(Wire.made) == (1 if other else 2)
    if not other:
        assert rig.wire.protocol == "3.1.1" and rig.client._failures == 0
        rig.wire.v5 = False
        rig.wire.end("refused", 0x84)
    rig.now += 60
    rig.loop.step()
    assert rig.wire.protocol == "5" and rig.client._failures == 1


def test_more_is_subscribed_to_while_there_is_a_connection(rig: Rig) -> None:
    rig.client.subscribe([("a", 1)])
    rig.wire.up = False
    rig.client.subscribe([("b", 1)])
    assert rig.wire.subscribed == ["a"]
    rig.client.set_broker(MqttConfig(keepalive=9))
    assert rig.client.settings.keepalive == 9


def test_a_limit_is_kept_where_the_broker_is_the_same(rig: Rig) -> None:
    rig.client._limit.refused(5000, rig.now)
    rig.client.set_broker(MqttConfig(username="another"))
    assert rig.client.room("t") < 5000
    rig.client.set_broker(MqttConfig(port=1))
    assert rig.client.room("t") > 5000


# Connections for one purpose


def test_a_former_session_is_emptied_then_ended(rig: Rig) -> None:
    steps, listener, commits = list[str](), rig.client._listener, list[Callable[[], None]]()
    assert isinstance(listener, Listener)
    rig.client.take_over("the-old-id", "marker", commits.append, lambda: steps.append("done"))
    first = rig.wire
    assert first.owner.client_id == "the-old-id" and first.owner.persistent
    assert first.owner.subscriptions == [("marker", 1)]
    rig.client.take_over("the-old-id", "marker", commits.append, lambda: steps.append("twice"))
    assert rig.wire is first, "one is enough"
    first.let_in()
    assert [(one.topic, one.qos) for one, _ in first.sent] == [("marker", 1)]
    first.take()
    first.say("hive/beta/command", b"waited")
    first.say("marker")
    assert [(one.payload, one.earlier) for one in listener.messages] == [(b"waited", True)]
    assert rig.wire is first, "nothing is ended before it is safe"
    commits.pop()()
    assert not first.up and rig.wire is not first
    assert rig.wire.owner.client_id == "the-old-id" and not rig.wire.owner.persistent
    rig.wire.let_in()
    assert steps == ["done"] and not rig.wire.up and rig.client.former is None


def test_a_former_session_that_costs_us_our_connection_is_left_alone(rig: Rig) -> None:
    done = list[bool]()

    def take_over() -> None:
        rig.client.take_over("old", "marker", lambda go_on: go_on(), lambda: done.append(True))

    for _ in range(2):
        ours = rig.wire
        take_over()
        assert rig.client.former and not done
        ours.end("session taken over")
        assert rig.client.former is None
        rig.now += 60
        rig.loop.step()
        rig.connect()
    before = len(Wire.made)
    take_over()
    assert done == [True] and len(Wire.made) == before


def test_a_former_session_that_ends_is_tried_again_with_the_next_connection(rig: Rig) -> None:
    rig.client.take_over("old", "marker", lambda go_on: go_on(), lambda: None)
    rig.wire.end("cut")
    assert rig.client.former is None
    before = len(Wire.made)
    rig.now += 60
    rig.loop.post(lambda: None)
    rig.loop.step()
    assert len(Wire.made) == before, "not by itself"


def test_a_probe_waits_five_seconds(rig: Rig) -> None:
    said = list[bool]()
    rig.client.probe(said.append)
    for seconds, expected in ((4.9, []), (0.2, [False])):
        rig.now += seconds
        rig.loop.post(lambda: None)
        rig.loop.step()
        assert said == expected
    rig.client.probe(said.append)
    rig.wire.let_in()
    assert said == [False, True] and not rig.wire.up


@pytest.mark.parametrize(
    ("v5", "retained", "quiet"), [(True, True, 0.0), (True, False, 0.1), (False, True, 0.1)]
)
def test_what_is_retained_is_complete_at_the_marker_or_a_moment_later(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, v5: bool, retained: bool, quiet: float
) -> None:
    monkeypatch.setattr(Wire, "v5", v5)
    found, complete = list[IncomingMessage](), list[bool]()
    RetainedQuery(
        *(rig.loop, MqttConfig(), ["a", "b"], "end", found.append),
        *(lambda: complete.append(True), print),
    )
    assert rig.wire.owner.subscriptions == [("a", 0), ("b", 0), ("end", 0)]
    rig.wire.let_in()
    assert [(one.topic, one.qos) for one, _ in rig.wire.sent] == [("end", 0)]
    for _ in range(retained):
        rig.wire.say("a")
    rig.wire.say("end")
    assert bool(complete) == (not quiet) and len(found) == retained
    for seconds in (0.09, 0.02, 10.0):
        rig.now += seconds
        rig.loop.post(lambda: None)
        rig.loop.step()
        assert complete == [True] * (not quiet or seconds != 0.09), "once"


def test_whoever_never_sends_the_marker_is_waited_for_five_seconds(rig: Rig) -> None:
    complete, found = list[bool](), list[str]()
    rig.client.fetch(["a"], "end", lambda message: found.append(message.topic))
    RetainedQuery(
        *(rig.loop, MqttConfig(), ["a"], "end", lambda message: None),
        *(lambda: complete.append(True), print),
    )
    fetching = Wire.made[-2]
    for wire in (fetching, rig.wire):
        wire.let_in()
    fetching.say("a")
    for seconds, ended in ((4.9, False), (0.2, True)):
        rig.now += seconds
        for _ in range(3):
            rig.loop.post(lambda: None)
            rig.loop.step()
        assert (bool(complete), not fetching.up) == (ended, ended)
    assert found == ["a"]


def test_no_two_hives_of_a_broker_have_one_client_id() -> None:
    node = hive.NodeConfig("beta", topic_prefix="team/one")
    assert hive.plain_session_id(hive.Config(node)) == "team:one:beta"


@pytest.mark.parametrize("how", ["a lost connection", "another broker", "a death of ours"])
def test_what_goes_out_again_is_not_told_of_twice(rig: Rig, how: str) -> None:
    envelope = hive.Envelope.new("alpha", "beta", "command", "x", id="a")
    row = rig.journal.record(hive.Event.SENT, envelope, time.time())
    rig.journal.enqueue("hive/beta/command", envelope.encode(), message=row)
    rig.commit()
    rig.wire.take()
    rig.commit()
    match how:
        case "a lost connection":
            rig.lose("cut")
        case "another broker":
            rig.client.send_again()
        case _:
            rig.journal.close()
            rig.start()
    rig.wire.take()
    assert [id for id, *_ in rig.published] == ["a", None]


def test_an_end_sends_what_is_committed_and_what_the_window_held(rig: Rig) -> None:
    ended = list[bool]()
    rig.wire.window = 1
    rig.send("a")
    rig.client.publish(OutgoingMessage("meta", b"state"))
    rig.enqueue("late")
    rig.journal.commit()
    rig.client.close(lambda: ended.append(True), within=5.0)
    for texts in (["a", "state"], ["a", "state", "late"]):
        rig.wire.take()
        rig.client.send_queued()
        assert rig.wire.texts == texts and not ended
    rig.wire.take()
    assert ended


def test_an_end_begins_with_what_waits(rig: Rig) -> None:
    rig.enqueue("late")
    rig.journal.commit()
    rig.client.close(lambda: None, within=5.0)
    assert rig.wire.texts == ["late"]


def test_a_broker_that_was_gone_at_our_end_may_have_saved_nothing(rig: Rig) -> None:
    rig.send("a")
    rig.wire.take()
    rig.journal.commit()
    rig.wire.end("cut")
    rig.client.close(lambda: None, within=5.0)
    rig.journal.close()
    rig.start()
    assert rig.wire.texts == ["a"]


def test_other_connections_speak_as_ours_does(rig: Rig) -> None:
    rig.client._protocol = "3.1.1"
    rig.client.probe(lambda well: None)
    assert rig.wire.protocol == "3.1.1"
    rig.client.fetch(["a"], "end", lambda message: None)
    assert rig.wire.protocol == "3.1.1"


@pytest.mark.parametrize(
    ("flags", "qos", "retained"), [(0, 0, False), (0b0011, 1, True), (0b1010, 1, False)]
)
def test_a_message_is_taken_apart(flags: int, qos: int, retained: bool) -> None:
    acked, received = list[tuple[int, int]](), list[IncomingMessage]()
    paho = SimpleNamespace(ack=lambda *what: acked.append(what))
    connection: Any = SimpleNamespace(welcome=True, v5=True, ended=False, _client=paho)
    connection._loop = SimpleNamespace(clock=lambda: 5.0)
    connection._owner = SimpleNamespace(received=received.append)
    body = b"\0\1t" + b"\0\7" * bool(qos) + b"\5\2\0\0\0\x3c" + b"payload"
    MqttConnection._deliver(connection, flags, body)
    [message] = received
    assert (message.topic, message.payload, message.retained) == ("t", b"payload", retained)
    assert message.expires_in == 60 and not message.earlier
    message.ack()
    connection.ended = True
    message.ack()
    assert acked == [(7, 1)] * bool(qos)
    assert not qos or connection._said_at == 5.0, "that is a sign of life of ours"


def test_small_packets_go_at_once_and_to_the_first_that_answers(loop: Loop) -> None:
    def behave(client: socket.socket) -> None:
        client.recv(4096)
        client.sendall(b"\x20\x03\0\0\0")
        client.recv(4096)

    with server(behave) as port:
        mqtt = MqttConfig(host="127.0.0.1", port=port, cluster=("127.0.0.9",))
        client, _ = opened(loop, mqtt)
        turn(loop, lambda: client.up)
        assert client.host == "127.0.0.1" and client._connection
        sock: Any = client._connection._client.socket()
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        closed(loop, client)
