"""Each way in which a connection can fail, and the line that a user reads of it.

On real servers as far as they can be made to fail so; what no server here does is said by one
that sends the bytes.
"""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, Broker, find_program, free_port, need_mosquitto
from test_mqtt_client import closed, opened, server, turn

import hive
from hive import Loop, MqttConfig, OutgoingMessage

WILL = OutgoingMessage("t/meta/alpha/state", b"{}", retain=True)  # as a daemon has one


def line_of(loop: Loop, mqtt: MqttConfig, patience: float = PATIENCE) -> str:
    """What is said of an attempt to connect as a daemon does; nothing if it succeeds."""
    subscriptions = [("t/alpha/+", 1), ("t/meta/+/state", 0)]
    client, listener = opened(loop, mqtt, "t:alpha", subscriptions, WILL)
    turn(loop, lambda: listener.downs or listener.ups)
    closed(loop, client)
    said = str(hive.broker_fault(mqtt, listener.downs[0])) if listener.downs else ""
    return said.removeprefix(f"broker {mqtt.address}: ")


# -- certificates --


def openssl(home: Path, *arguments: str) -> None:
    program = shutil.which("openssl")
    assert program, "openssl is needed"
    subprocess.run([program, *arguments], check=True, capture_output=True, cwd=home)


def make_authority(home: Path, name: str) -> None:
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    names = ("-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    openssl(home, "req", "-x509", *key, *names)


def make_certificate(home: Path, name: str, authority: str, days: int = 2) -> None:
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    names = ("-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", "/CN=localhost")
    openssl(home, "req", "-new", *key, *names, "-addext", "subjectAltName=DNS:localhost")
    by = ("-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-CAcreateserial")
    what = ("-in", f"{name}.csr", "-out", f"{name}.pem", "-copy_extensions", "copy")
    openssl(home, "x509", "-req", "-days", f"{days}", *by, *what)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `ours`, an authority: good and expired; and one of `another`."""
    home = tmp_path_factory.mktemp("certificates")
    home.parent.chmod(0o755)
    home.chmod(0o755)
    for authority in ("ours", "another"):
        make_authority(home, authority)
    make_certificate(home, "good", "ours")
    make_certificate(home, "expired", "ours", days=-1)
    make_certificate(home, "foreign", "another")
    for file in home.iterdir():
        file.chmod(0o644)
    return home


# -- servers --


@pytest.fixture(scope="module")
def mosquitto(
    tmp_path_factory: pytest.TempPathFactory, certificates: Path
) -> Iterator[Callable[..., Broker]]:
    """One with these settings, in which {} is where the certificates are; started once."""
    need_mosquitto()
    made: dict[tuple[str, ...], Broker] = {}

    def make(*settings: str) -> Broker:
        if settings not in made:
            home = tmp_path_factory.mktemp("mosquitto")
            passwords = home / "passwords"
            program = find_program("mosquitto_passwd")
            assert program
            command = [program, "-c", "-b", str(passwords), "alpha", "s3cret"]
            subprocess.run(command, check=True, capture_output=True)
            lines = [line.format(certificates, passwords=passwords) for line in settings]
            made[settings] = Broker(home, *lines)
        return made[settings]

    yield make
    for broker in made.values():
        broker.stop()


OPEN = "allow_anonymous true"
LOCKED = ("allow_anonymous false", "password_file {passwords}")
TLS = ("cafile {}/ours.pem", "certfile {}/good.pem", "keyfile {}/good.key")
EXPIRED = ("cafile {}/ours.pem", "certfile {}/expired.pem", "keyfile {}/expired.key")
MUTUAL = (OPEN, *TLS, "require_certificate true")
BY_US = {"tls": True, "ca_file": "ours.pem"}
CLIENT = "does the broker want a client certificate? set [mqtt] cert_file and key_file"
OLD_HANG_UP = (
    "the broker closed the connection at once; does the port want TLS ([mqtt] tls = true)? or does"
    ' the broker forbid QoS 1 or retained messages? over protocol = "5" it would say so'
)

ON_MOSQUITTO: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "well": ((OPEN,), {}, ""),
    "well over TLS": ((OPEN, *TLS), BY_US, ""),
    "no password": (
        LOCKED,
        {},
        "refused: not authorized; does the broker want [mqtt] username and password? else see its"
        " ACL",
    ),
    "wrong password": (
        LOCKED,
        {"username": "alpha", "password": "wrong"},
        "refused: not authorized; check [mqtt] username and password, and the broker's ACL",
    ),
    "wrong password over 3.1.1": (
        LOCKED,
        {"username": "alpha", "password": "wrong", "protocol": "3.1.1"},
        "refused: not authorized; check [mqtt] username and password, and the broker's ACL",
    ),
    "no retained messages": (
        (OPEN, "retain_available false"),
        {},
        "refused: retain not supported; hive needs retained messages: allow them"
        " (Mosquitto: retain_available true)",
    ),
    "no retained messages over 3.1.1": (
        (OPEN, "retain_available false"),
        {"protocol": "3.1.1"},
        OLD_HANG_UP,
    ),
    "no QoS 1": (
        (OPEN, "max_qos 0"),
        {},
        "refused: qos not supported; hive needs QoS 1: allow it (Mosquitto: max_qos 1)",
    ),
    "no QoS 1 over 3.1.1": ((OPEN, "max_qos 0"), {"protocol": "3.1.1"}, OLD_HANG_UP),
    "TLS at a plain port": (
        (OPEN,),
        BY_US,
        "TLS: Connection reset by peer; does that port speak plain MQTT? then [mqtt] tls = false;"
        " over TLS it is mostly 8883",
    ),
    "plain at a TLS port": (
        (OPEN, *TLS),
        {},
        "the broker closed the connection at once; does the port want TLS ([mqtt] tls = true), is"
        " the broker full (see its log), or is it no MQTT broker?",
    ),
    "no client certificate": (
        MUTUAL,
        BY_US,
        f"TLS: tlsv13 alert certificate required; {CLIENT}",
    ),
    "a client certificate": (
        MUTUAL,
        BY_US | {"cert_file": "good.pem", "key_file": "good.key"},
        "",
    ),
    "a client certificate of another authority": (
        MUTUAL,
        BY_US | {"cert_file": "foreign.pem", "key_file": "foreign.key"},
        "TLS: tlsv1 alert unknown ca; does the broker know the authority of [mqtt] cert_file, and"
        " has that not expired?",
    ),
    "an expired client certificate": (
        MUTUAL,
        BY_US | {"cert_file": "expired.pem", "key_file": "expired.key"},
        "TLS: sslv3 alert certificate expired; does the broker know the authority of [mqtt]"
        " cert_file, and has that not expired?",
    ),
    "the system's authorities": (
        (OPEN, *TLS),
        {"tls": True},
        "TLS: certificate verify failed: self-signed certificate in certificate chain; [mqtt]"
        " ca_file must hold the authority of the broker's certificate",
    ),
    "another authority": (
        (OPEN, *TLS),
        {"tls": True, "ca_file": "another.pem"},
        "TLS: certificate verify failed: self-signed certificate in certificate chain; [mqtt]"
        " ca_file must hold the authority of the broker's certificate",
    ),
    "another name": (
        (OPEN, *TLS),
        BY_US | {"host": "127.0.0.1"},
        "TLS: certificate verify failed: IP address mismatch, certificate is not valid for"
        " '127.0.0.1'.; [mqtt] host must be a name that is in the broker's certificate",
    ),
    "an expired certificate": (
        (OPEN, *EXPIRED),
        BY_US,
        "TLS: certificate verify failed: certificate has expired; renew the broker's certificate,"
        " if this machine's clock is right",
    ),
}


@pytest.mark.parametrize("case", ON_MOSQUITTO)
def test_what_mosquitto_does_not_like_is_named_and_what_to_try(
    loop: Loop, mosquitto: Callable[..., Broker], certificates: Path, case: str
) -> None:
    settings, given, line = ON_MOSQUITTO[case]
    files = {key: certificates / value for key, value in given.items() if key.endswith("_file")}
    mqtt = MqttConfig(**{"host": "localhost", "port": mosquitto(*settings).port, **given, **files})
    said = line_of(loop, mqtt)
    if "alert" in line and said.startswith(hive.NO_WELCOME):  # it came while we were sending
        line = f"{hive.NO_WELCOME}; {line.partition('; ')[2]}"
    assert said == line


# -- what is no broker --


class Web(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def web_server(context: ssl.SSLContext | None = None) -> Iterator[int]:
    web = HTTPServer(("127.0.0.1", 0), Web)
    if context:
        web.socket = context.wrap_socket(web.socket, server_side=True)
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield web.server_port
    web.shutdown()
    thread.join()
    web.server_close()


def says(*first: bytes) -> Callable[[socket.socket], None]:
    """A server that begins with this and then waits, or answers the first bytes with it."""

    def behave(client: socket.socket) -> None:
        if len(first) > 1:
            client.recv(4096)
        client.sendall(first[-1])
        client.recv(4096)
        client.recv(4096)

    return behave


PORT = "is [mqtt] port right? MQTT is mostly at 1883, over TLS at 8883"
NO_BROKERS: dict[str, tuple[bytes, ...]] = {
    "SSH": (b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",),
    "HTTP": (b"", b"HTTP/1.1 400 Bad Request\r\nServer: nginx\r\n"),
    "AMQP": (b"", b"AMQP\0\0\x09\x01"),
    "'220 mail.lan ESMTP'": (b"220 mail.lan ESMTP\r\n",),
    "'-ERR unknown command'": (b"", b"-ERR unknown command\r\n"),
    "'\\x00\\x01'": (b"", b"\0\1"),
}


@pytest.mark.parametrize("kind", NO_BROKERS)
def test_what_is_no_broker_is_named_by_its_first_bytes(loop: Loop, kind: str) -> None:
    with server(says(*NO_BROKERS[kind])) as port:
        begun = time.monotonic()
        line = line_of(loop, MqttConfig(host="127.0.0.1", port=port))
        assert time.monotonic() - begun < 2
    assert line == f"no MQTT broker: it answers as {kind}; {PORT}"


def test_a_web_server_that_waits_for_the_end_of_a_line_is_given_one(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "SILENCE", (0.3, PATIENCE))
    with web_server() as port:
        line = line_of(loop, MqttConfig(host="127.0.0.1", port=port))
    assert line == f"no MQTT broker: it answers as HTTP; {PORT}"


def test_tls_at_a_web_server_says_that_it_speaks_none(loop: Loop, certificates: Path) -> None:
    given: Any = {"tls": True, "ca_file": certificates / "ours.pem"}
    with web_server() as port:
        line = line_of(loop, MqttConfig(host="localhost", port=port, **given))
    assert line.startswith("TLS: ") and line.endswith(
        "; nothing there speaks TLS: is [mqtt] port right? for plain MQTT tls = false"
    )


def test_a_web_server_with_tls_is_known_too(
    loop: Loop, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "SILENCE", (0.3, PATIENCE))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "good.pem", certificates / "good.key")
    given: Any = {"tls": True, "ca_file": certificates / "ours.pem"}
    with web_server(context) as port:
        line = line_of(loop, MqttConfig(host="localhost", port=port, **given))
    assert line == f"no MQTT broker: it answers as HTTP; {PORT}"


def test_a_tls_server_that_answers_plain_bytes_with_an_alert_is_known(loop: Loop) -> None:
    with server(says(b"", b"\x15\x03\x03\x00\x02\x02\x46")) as port:
        line = line_of(loop, MqttConfig(host="127.0.0.1", port=port))
    assert line == "no MQTT broker: it answers as TLS; the port wants TLS: set [mqtt] tls = true"


# -- what does not answer --


def test_silence_is_said(loop: Loop, monkeypatch: pytest.MonkeyPatch, certificates: Path) -> None:
    monkeypatch.setattr(hive, "DIAL_DEADLINE", 1.0)
    monkeypatch.setattr(hive, "SILENCE", (0.2, 0.2))
    monkeypatch.setattr(hive, "DIAL_TIMEOUT", 0.5)
    given: Any = {"tls": True, "ca_file": certificates / "ours.pem"}
    with server(lambda client: time.sleep(PATIENCE)) as port:
        line = line_of(loop, MqttConfig(host="127.0.0.1", port=port))
        assert line == (
            "no answer (CONNACK) in time; are host and port right, and no firewall in between?"
        )
        line = line_of(loop, MqttConfig(host="localhost", port=port, **given))
        assert line == (
            "TLS: The handshake operation timed out; nothing there speaks TLS: is [mqtt] port"
            " right? for plain MQTT tls = false"
        )


def test_nobody_there_is_said(loop: Loop, tmp_path: Path) -> None:
    running = "is a broker running there? mosquitto is one"
    line = line_of(loop, MqttConfig(host="127.0.0.1", port=free_port()))
    assert line == f"Connection refused; {running}"
    line = line_of(loop, MqttConfig(host=str(tmp_path / "none")))
    assert line == f"No such file or directory; {running}"
    name = line_of(loop, MqttConfig(host="no.such.invalid"))
    assert name.endswith(
        ("is [mqtt] host spelled right?", "no name server answers: is this machine's network up?")
    )
    label = line_of(loop, MqttConfig(host=f"{'x' * 64}.lan"))
    assert label.endswith("; is [mqtt] host spelled right?")


def test_a_broker_that_is_stopped_says_so_for_itself(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Mosquitto that hangs once we are in: paho takes the keepalive's end for the broker's."""
    need_mosquitto()
    broker = Broker(tmp_path / "broker")
    mqtt = MqttConfig(port=broker.port, keepalive=1)
    client, listener = opened(loop, mqtt)
    turn(loop, lambda: listener.ups)
    assert broker._process
    broker._process.send_signal(signal.SIGSTOP)
    turn(loop, lambda: listener.downs)
    broker._process.send_signal(signal.SIGCONT)
    closed(loop, client)
    broker.stop()
    assert listener.downs[0] == "no answer (PINGRESP) in time"


# -- what a broker says --

# MQTT 5, 3.2.2.2: each reason code of a CONNACK, its words, and what the hint must name.
REFUSALS = {
    0x80: ("unspecified error", "see the broker's log"),
    0x81: ("malformed packet", "see the broker's log"),
    0x82: ("protocol error", "see the broker's log"),
    0x83: ("implementation specific error", "see the broker's log"),
    0x84: ("unsupported protocol version", 'protocol to what the broker speaks, "3.1.1" or "5"'),
    0x85: ("client identifier not valid", "made of topic_prefix and node id"),
    0x86: (
        "bad user name or password",
        "does the broker want [mqtt] username and password? else see its ACL",
    ),
    0x87: ("not authorized", "does the broker want [mqtt] username and password? else see its ACL"),
    0x88: ("server unavailable", "hive tries again by itself"),
    0x89: ("server busy", "hive tries again by itself"),
    0x8A: ("banned", "ask whoever runs it"),
    0x8C: ("bad authentication method", "the broker wants a login of another kind"),
    0x90: ("topic name invalid", "choose another [node] topic_prefix"),
    0x95: ("packet too large", "raise the broker's limit"),
    0x97: ("quota exceeded", "wait, or raise it there"),
    0x99: ("payload format invalid", "see the broker's log"),
    0x9A: ("retain not supported", "hive needs retained messages"),
    0x9B: ("qos not supported", "hive needs QoS 1"),
    0x9C: ("use another server", "set [mqtt] host to the server that is meant"),
    0x9D: ("server moved", "set [mqtt] host to the server that is meant"),
    0x9F: ("connection rate exceeded", "wait, or raise it there"),
}
RETURN_CODES = {1: 0x84, 2: 0x85, 3: 0x88, 4: 0x86, 5: 0x87}  # MQTT 3.1.1, 3.2.2.3


@pytest.mark.parametrize("code", REFUSALS)
def test_each_reason_code_of_mqtt_5_has_its_line(loop: Loop, code: int) -> None:
    def refuse(client: socket.socket) -> None:
        v5 = client.recv(4096)[8] == 5  # the protocol level, after "MQTT"
        client.sendall(bytes((0x20, 3, 0, code, 0) if v5 else (0x20, 2, 0, 1)))
        client.recv(4096)

    with server(refuse) as port:
        line = line_of(loop, MqttConfig(host="127.0.0.1", port=port))
    words, hint = REFUSALS[code]
    assert line.startswith(f"refused: {words}; ") and hint in line


@pytest.mark.parametrize("code", RETURN_CODES)
def test_each_return_code_of_mqtt_3_1_1_has_its_line(loop: Loop, code: int) -> None:
    with server(says(b"", bytes((0x20, 2, 0, code)))) as port:
        line = line_of(loop, MqttConfig(host="127.0.0.1", port=port, protocol="3.1.1"))
    words, hint = REFUSALS[RETURN_CODES[code]]
    assert line.startswith(f"refused: {words}; ") and hint in line


def test_what_the_broker_adds_in_words_is_shown(loop: Loop) -> None:
    text, place = b"come \x1b[31mback later", b"two.lan:1883"
    said = b"\x1f" + len(text).to_bytes(2) + text + b"\x1c" + len(place).to_bytes(2) + place
    packet = b"\x20" + bytes((3 + len(said), 0, 0x9C, len(said))) + said
    with server(says(b"", packet)) as port:
        line = line_of(loop, MqttConfig(host="127.0.0.1", port=port))
    assert line.startswith(
        "refused: use another server (come \\x1b[31mback later) (two.lan:1883); set [mqtt] host"
    )


# MQTT 5, 3.14.2.1: those of a DISCONNECT that are no reason to refuse a connection
ENDS = {
    0x8B: ("server shutting down", "hive tries again by itself"),
    0x8D: ("keep alive timeout", "hive tries again by itself"),
    0x8E: ("session taken over", "does a second daemon run under its name?"),
    0x93: ("receive maximum exceeded", "raise it there"),
    0x96: ("message rate too high", "raise it there"),
    0x98: ("administrative action", "whoever runs the broker ended it"),
    0x8F: ("topic filter invalid", "choose another [node] topic_prefix"),
    0xA0: ("maximum connect time", "whoever runs the broker ended it"),
    0xA2: ("wildcard subscription not supported", "hive needs wildcard subscriptions"),
}


@pytest.mark.parametrize("code", ENDS)
def test_each_end_that_a_broker_gives_a_reason_for_has_its_line(loop: Loop, code: int) -> None:
    with server(says(b"", b"\x20\x03\0\0\0" + bytes((0xE0, 2, code, 0)))) as port:
        line = line_of(loop, MqttConfig(host="127.0.0.1", port=port))
    words, hint = ENDS[code]
    assert line.startswith(f"the broker ended the connection: {words}; ") and hint in line


# What no server here does, or not on every system.
REASONS = {
    "No route to host": "is [mqtt] host right, and this machine's network up?",
    "Network is unreachable": "is [mqtt] host right, and this machine's network up?",
    "timed out": "are host and port right, and no firewall in between?",
    "Temporary failure in name resolution": (
        "no name server answers: is this machine's network up?"
    ),
    "nodename nor servname provided, or not known": "is [mqtt] host spelled right?",
    "No address associated with hostname": "is [mqtt] host spelled right?",
    "TLS: certificate verify failed: certificate is not yet valid": (
        "set this machine's clock, or let the broker's certificate begin earlier"
    ),
    "TLS: certificate verify failed: EE certificate key too weak": (
        "the broker needs a better certificate"
    ),
    "TLS: tlsv1 alert protocol version": "let the broker take TLS 1.2 or newer",
    "TLS: EOF occurred in violation of protocol": (
        "does that port speak plain MQTT? then [mqtt] tls = false; over TLS it is mostly 8883"
    ),
    "subscribing to hive/a/+ refused: not authorized": (
        "the broker's ACL does not allow it; hive doctor says what this node needs"
    ),
    "refused to publish to hive/a/alert: not authorized": (
        "the broker's ACL does not allow it; hive doctor says what this node needs"
    ),
    hive.HANG_UP: "did it stop, or not like what was sent? see its log; hive tries again by itself",
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_else_may_be_wrong_has_its_hint(reason: str) -> None:
    assert (
        hive.hint_for(MqttConfig(host="broker.lan", tls="TLS" in reason), reason)
        == (REASONS[reason])
    )
