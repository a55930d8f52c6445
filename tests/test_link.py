"""The way to the broker: a real Mosquitto, and sockets that misbehave where Mosquitto would not."""

from __future__ import annotations

import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import EMBEDDED, MOSQUITTO, PATIENCE, Broker, find_program, need_mosquitto

import hive
from hive import (
    ConfigError,
    IncomingMessage,
    Log,
    Loop,
    MqttClient,
    MqttConfig,
    OutgoingMessage,
    RetainedQuery,
)


class User:
    """Takes note of what a link says."""

    def __init__(self) -> None:
        self.ups, self.downs = 0, list[str]()
        self.deliveries, self.acking = list[IncomingMessage](), True

    def before_connecting(self, go_on: Callable[[], None]) -> None:
        go_on()

    def link_up(self) -> None:
        self.ups += 1

    def link_down(self, reason: str) -> None:
        self.downs.append(reason)

    def deliver(self, delivery: IncomingMessage) -> None:
        self.deliveries.append(delivery)
        if self.acking:
            delivery.ack()


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop(Log("error"))
    yield made
    made.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hive, "RETRY", (0.05, 0.2))


def turn(loop: Loop, until: Callable[[], Any]) -> None:
    """Let the loop turn until something is true; it never waits longer than a moment."""
    deadline = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < deadline, "it never happened"
        loop.after(0.05, lambda: None)
        loop.step()


def opened(loop: Loop, mqtt: MqttConfig, *args: Any, **kwargs: Any) -> tuple[MqttClient, User]:
    user = User()
    link = MqttClient(loop, mqtt, *args, **kwargs)
    link.open(user)
    return link, user


def closed(loop: Loop, link: MqttClient) -> None:
    done = list[bool]()
    link.close(lambda: done.append(True), within=1.0)
    turn(loop, lambda: done)


def published(
    link: MqttClient, topic: str, payload: bytes = b"x", **how: Any
) -> list[tuple[int, str]]:
    """Publish; what the broker said of it comes into the list."""
    said = list[tuple[int, str]]()
    link.publish(
        OutgoingMessage(topic, payload, done=lambda code, words: said.append((code, words)), **how)
    )
    return said


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
    link, user = opened(loop, mqtt, "", [("link/a/+", 1)])
    said = published(link, "link/a/b", b"hello")  # before there is a connection

    turn(loop, lambda: user.deliveries and said)

    assert (user.deliveries[0].topic, user.deliveries[0].payload) == ("link/a/b", b"hello")
    assert said[0][0] == 0
    closed(loop, link)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_what_was_not_acknowledged_comes_again_and_what_was_does_not(
    loop: Loop, shared_broker: Broker, quick: None, protocol: str
) -> None:
    mqtt = MqttConfig(port=shared_broker.port, protocol=protocol)
    topic = f"link/again/{protocol}"
    for acking, expected in ((False, [b"1", b"2"]), (True, [b"1", b"2"]), (True, [b"3"])):
        link, user = opened(loop, mqtt, f"again-{protocol}", [(topic, 1)])
        user.acking = acking
        turn(loop, lambda: user.ups)  # noqa: B023
        if not acking:
            for payload in (b"1", b"2"):
                published(link, topic, payload)
        elif expected == [b"3"]:
            published(link, topic, b"3")
        turn(loop, lambda: len(user.deliveries) == len(expected))  # noqa: B023
        assert [delivery.payload for delivery in user.deliveries] == expected
        closed(loop, link)


def test_after_kill_9_of_the_broker_the_link_returns_and_publishes_what_waited(
    loop: Loop, own_broker: Broker, quick: None
) -> None:
    link, user = opened(loop, MqttConfig(port=own_broker.port), "returner", [("link/r", 1)])
    turn(loop, lambda: user.ups == 1)
    own_broker.stop(signal.SIGKILL)
    turn(loop, lambda: user.downs)
    kept = [published(link, "link/r", b"%d" % i) for i in range(100)]
    dropped = published(link, "link/r", b"no", keep=False)
    own_broker.start()

    turn(loop, lambda: len(user.deliveries) == 100)

    assert [delivery.payload for delivery in user.deliveries] == [b"%d" % i for i in range(100)]
    turn(loop, lambda: all(kept))
    assert not dropped
    closed(loop, link)


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
        link, user = opened(loop, MqttConfig(port=port, protocol="5"))
        texts = [b"a", b"b", b"poison", b"c", b"d"]
        said = [published(link, "link/touchy", text) for text in texts]
        turn(loop, lambda: all(said))
        assert [code for ((code, _),) in said] == [0x10, 0x10, -1, 0x10, 0x10]
        assert said[2] == [(-1, "the broker closed the connection at it 5 times")]
        closed(loop, link)
    assert len(user.downs) < 10


def test_a_message_whose_time_is_over_while_the_broker_is_away_is_not_published(
    loop: Loop, shared_broker: Broker
) -> None:
    link, _ = opened(loop, MqttConfig(port=shared_broker.port))
    said = published(link, "link/late", expires=loop.clock() - 1)
    turn(loop, lambda: said)
    assert said == [(-1, "its time to live was over")]
    closed(loop, link)


def test_the_time_to_live_is_the_brokers_message_expiry(loop: Loop, shared_broker: Broker) -> None:
    link, user = opened(loop, MqttConfig(port=shared_broker.port), "", [("link/ttl", 1)])
    published(link, "link/ttl", expires=loop.clock() + 60)
    turn(loop, lambda: user.deliveries)
    assert user.deliveries[0].expires_in in (59, 60)
    closed(loop, link)


def test_a_goodbye_forgets_the_will_and_a_death_does_not(loop: Loop, shared_broker: Broker) -> None:
    mqtt = MqttConfig(port=shared_broker.port)
    witness, user = opened(loop, mqtt, "", [("link/will/+", 1)])
    turn(loop, lambda: user.ups)
    polite, _ = opened(loop, mqtt, will=OutgoingMessage("link/will/polite", b"dead"))
    turn(loop, lambda: polite.up)
    closed(loop, polite)
    rude, _ = opened(loop, mqtt, will=OutgoingMessage("link/will/rude", b"dead"))
    turn(loop, lambda: rude.up)
    assert rude._connection
    rude._connection.end("killed")

    turn(loop, lambda: user.deliveries)

    assert [delivery.topic for delivery in user.deliveries] == ["link/will/rude"]
    closed(loop, rude)
    closed(loop, witness)


def test_a_broker_that_refuses_mqtt_5_is_spoken_to_in_3_1_1(
    loop: Loop, shared_broker: Broker
) -> None:
    for refusal in (b"\x20\x02\x00\x01", b""):  # CONNACK with return code 1; a bare end of file

        def old_broker(client: socket.socket, refusal: bytes = refusal) -> None:
            first = client.recv(4096)
            if first[8] == 5:  # the protocol level, after "MQTT"
                client.sendall(refusal)
                return client.close()
            real = socket.create_connection(("127.0.0.1", shared_broker.port))
            real.sendall(first)
            threading.Thread(target=pump, args=(real, client), daemon=True).start()
            return pump(client, real)

        with server(old_broker) as port:
            link, user = opened(loop, MqttConfig(port=port), "", [("link/old", 1)])
            said = published(link, "link/old", b"hello")
            turn(loop, lambda: user.deliveries and said)  # noqa: B023
            assert user.downs == []
            closed(loop, link)


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
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "the broker closed the connection"),
        (b"\x20\x02\x00\x05", "refused: not authorized"),
        (b"\x20\x03\x00\x86\x00", "refused: bad user name or password"),
        (b"", "the broker closed the connection"),
        (b"\x30\x03\x00\x05\xff", "the broker closed the connection"),
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
        link, user = opened(loop, MqttConfig(port=port))
        turn(loop, lambda: len(user.downs) >= 2)  # it tries again
        assert set(user.downs) <= {reason, "the broker closed the connection"}
        assert reason in user.downs
        closed(loop, link)


def test_a_broker_that_says_nothing_is_given_up_and_meanwhile_the_loop_turns(
    loop: Loop, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "DIAL_DEADLINE", 0.3)
    with server(lambda client: time.sleep(PATIENCE)) as port:
        link, user = opened(loop, MqttConfig(port=port))
        turns = list[int]()
        loop.after(0.01, lambda: turns.append(1))
        turn(loop, lambda: user.downs)
        assert user.downs == ["no answer (CONNACK) in time"] and turns
        closed(loop, link)


def test_a_name_that_does_not_resolve_and_a_closed_port_say_so(loop: Loop, quick: None) -> None:
    for mqtt, word in (
        (MqttConfig(port=1), "refused"),
        (MqttConfig(host="no.such.invalid"), "ame"),
    ):
        link, user = opened(loop, mqtt)
        turn(loop, lambda: user.downs)  # noqa: B023
        assert word in user.downs[0]
        closed(loop, link)


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
    link, user = opened(loop, strict(strict_broker), "", [("allowed/a", 1)])
    said = [published(link, "allowed/a", b"x" * 1500) for _ in range(200)]
    turn(loop, lambda: len(user.deliveries) == 200 and all(said))
    closed(loop, link)


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
    link, user = opened(loop, strict(strict_broker, **given))
    turn(loop, lambda: user.downs)
    assert reason in user.downs[0]
    closed(loop, link)


def test_what_the_broker_forbids_or_cannot_take_is_an_error_for_the_publisher(
    loop: Loop, strict_broker: Broker
) -> None:
    link, _ = opened(loop, strict(strict_broker))
    forbidden = published(link, "forbidden/a")
    unheard = published(link, "allowed/nobody")
    large = published(link, "allowed/a", b"x" * 3000)
    turn(loop, lambda: forbidden and unheard and large)
    assert forbidden[0][0] == 0x87 and unheard[0][0] == hive.NO_SUBSCRIBERS
    assert large == [(-1, "larger than the broker takes (2000 bytes)")]
    closed(loop, link)


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
    link, user = opened(loop, strict(strict_broker, ca_file=ca))
    turn(loop, lambda: user.ups)
    away = ca.rename(tmp_path / "away")
    assert link._connection
    link._connection.end("cut")
    turn(loop, lambda: any(str(ca) in reason for reason in user.downs))
    away.rename(ca)
    turn(loop, lambda: user.ups == 2)
    closed(loop, link)


def test_a_survey_has_every_retained_message_before_it_is_complete(
    loop: Loop, shared_broker: Broker
) -> None:
    mqtt = MqttConfig(port=shared_broker.port)
    link, _ = opened(loop, mqtt)
    said = [published(link, f"link/many/{i}", retain=True) for i in range(500)]
    turn(loop, lambda: all(said))
    closed(loop, link)
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
    closed(loop, survey.link)


def test_the_outbox_is_bounded_and_the_oldest_goes(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr(hive, "MAX_OUTBOX", 3)
    link, _ = opened(loop, MqttConfig(port=1))
    said = [published(link, "t") for _ in range(5)]
    assert [bool(one) for one in said] == [True, True, False, False, False]
    closed(loop, link)
