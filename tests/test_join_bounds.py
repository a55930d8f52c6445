"""An invitation's limits, and what is said of each way in which joining may fail."""

from __future__ import annotations

import base64
import re
import socket
import ssl
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port

import hive

NOW = 1_700_000_000.0
DER = base64.b64encode(b"a certificate").decode()


def invitation(**more: Any) -> hive.Invitation:
    said = hive.Invitation(("alpha.lan", "10.0.0.7"), 8883, "mini", "0" * 32, DER, "lab", int(NOW))
    return said.replace(**more)


# ---- The line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (
            hive.invitation_hosts,
            [["a"], ["a"] * 8],
            [[], ["a"] * 9, "a", None, ["a", 7], ["a", "b c"], [""]],
        ),
        (
            hive.hexadecimal,
            ["0123456789abcdef" * 2],
            ["0" * 31, "0" * 33, "g" * 32, "A" * 32, "0" * 32 + "\n", 7, None],
        ),
        (
            hive.der_certificate,
            [base64.b64encode(b"x").decode(), base64.b64encode(b"x" * 2047).decode()],
            ["", base64.b64encode(b"x" * 2048).decode(), "eA", "eA==!", 7, None],
        ),
    ],
)
def test_each_field_has_its_limits(
    check: Callable[[Any], Any], good: list[Any], bad: list[Any]
) -> None:
    for said in good:
        assert check(said) == (tuple(said) if isinstance(said, list) else said)
    for said in bad:
        with pytest.raises(ValueError):
            check(said)


def test_a_line_says_all_of_it_and_shows_no_password() -> None:
    one = invitation(hosts=("a",), password="0123456789abcdef" * 2)
    assert hive.Invitation.parse(one.line()) == one
    assert one.password not in repr(one) and one.line().startswith("hive1.")


def test_what_is_longer_than_a_line_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    line = invitation().line()
    assert len(line) < 1024  # what macOS' terminal takes
    for length, words in ((4096, "is cut or mistyped"), (4097, "this is no invitation")):
        with pytest.raises(hive.UsageError, match=words):
            hive.Invitation.parse("hive1.".ljust(length, "A"))
    monkeypatch.setattr(hive, "MAX_INVITATION", len(line))
    assert hive.Invitation.parse(f" {line[:9]}\n{line[9:]}\t") == invitation()
    monkeypatch.setattr(hive, "MAX_INVITATION", len(line) - 1)
    with pytest.raises(hive.UsageError, match="this is no invitation"):
        hive.Invitation.parse(line)


def coded(said: bytes) -> str:
    return "hive1." + base64.urlsafe_b64encode(said).decode().rstrip("=")


def with_sum(**said: Any) -> str:
    document = hive.encode_json(said)
    return coded(hive.encode_json(said | {"sum": zlib.crc32(document)}))


def test_whatever_else_it_holds_it_was_cut_or_mistyped() -> None:
    said = dict(vars(invitation()))
    line = with_sum(**said)
    assert hive.Invitation.parse(line) == invitation()
    wrong = [line[:-1], line[:9], f"{line}A", f"{line[:20]}%{line[20:]}", coded(b"\xff")]
    wrong += [coded(b"[]"), coded(b"{}"), coded(hive.encode_json(said)), with_sum()]
    wrong += [with_sum(**{name: said[name] for name in said if name != one}) for one in said]
    wrong += [with_sum(**said | {one: None}) for one in said]
    for one in wrong:
        with pytest.raises(hive.UsageError, match="the invitation is cut or mistyped; copy the"):
            hive.Invitation.parse(one)


def test_how_one_connects_with_it(tmp_path: Path) -> None:
    mqtt = hive.MqttConfig(host="h", port=8883, username="mini", password="0" * 32, tls=True)
    expected = mqtt.replace(ca_file=tmp_path, senders="checked")
    assert invitation().settings("h", tmp_path) == expected
    pem = invitation().authority()
    assert ssl.PEM_cert_to_DER_cert(pem) == b"a certificate"


# ---- Who invites ---------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> hive.Host:
    made = hive.Host(tmp_path / "alpha")
    hive.make_private(made.folder)
    made.authority.write_text(ssl.DER_cert_to_PEM_cert(b"a certificate"))
    monkeypatch.setattr(made, "broker_pid", lambda: 77)
    monkeypatch.setattr(made, "reload", lambda: (tmp_path / "reloaded").touch())
    return made


@pytest.mark.parametrize(
    ("listen", "names", "hosts"),
    [
        ("10.0.0.7", ("alpha.lan", "10.0.0.7"), ("alpha.lan", "10.0.0.7")),
        ("10.0.0.7", ("b", "a", "b"), ("b", "a", "10.0.0.7")),
        ("0.0.0.0", ("alpha.lan",), ("alpha.lan",)),
    ],
)
def test_an_invitation_names_each_way_once_the_best_first(
    host: hive.Host, tmp_path: Path, listen: str, names: tuple[str, ...], hosts: tuple[str, ...]
) -> None:
    settings = hive.HostSettings(listen, 8884, names, "lab")
    host._write(host._settings, hive.encode_json(vars(settings)).decode())
    one = hive.make_invitation(host, "mini", NOW + 0.9)
    assert one == hive.Invitation(hosts, 8884, "mini", one.password, DER, "lab", int(NOW) + 3600)
    assert hive.is_password_of(host.members()["mini"], one.password)
    assert (tmp_path / "reloaded").exists()


def test_nobody_is_invited_where_nobody_could_come_in(
    host: hive.Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = hive.HostSettings("::1", 8883, (), "lab")
    host._write(host._settings, hive.encode_json(vars(settings)).decode())
    monkeypatch.setattr(host, "broker_pid", lambda: None)
    with pytest.raises(hive.BrokerError, match="does not run; start it: hive host"):
        hive.make_invitation(host, "mini", NOW)
    assert host.members() == {} and not (tmp_path / "reloaded").exists()


# ---- Who joins -----------------------------------------------------------------------------


def test_the_first_that_listens_is_taken_and_what_does_not_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = there.getsockname()[1]
        assert hive.first_reachable(["::1", "127.0.0.1", "localhost"], port) == "127.0.0.1"
        there.settimeout(5)
        accepted = there.accept()[0]
        assert accepted.recv(1) == b"", "it hangs up"
        accepted.close()
    with pytest.raises(hive.BrokerError) as caught:
        hive.first_reachable(["127.0.0.1", "localhost"], port := free_port())
    refused = re.escape(f"127.0.0.1:{port}: Connection refused, localhost:{port}: ")
    assert re.match(f"the hive is not reached: {refused}.*; does it run there", str(caught.value))


def test_each_address_is_tried_for_three_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = list[object]()

    def connect(*where: object) -> None:
        tried.append(where)
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(hive.BrokerError, match="a:1: timed out, b:1: timed out; "):
        hive.first_reachable(["a", "b"], 1)
    assert tried == [(("a", 1), 3.0), (("b", 1), 3.0)]


class Wire:
    """A client whose broker does what the test says."""

    plays: Callable[[hive.Loop, Any, Wire], object]
    sent: list[hive.OutgoingMessage]
    closed: list[float]

    def __init__(self, loop: hive.Loop, settings: hive.MqttConfig) -> None:
        self.loop, self.settings = loop, settings

    def open(self, listener: Any) -> None:
        listener.before_connecting(lambda: type(self).plays(self.loop, listener, self))

    def publish(self, message: hive.OutgoingMessage) -> None:
        type(self).sent.append(message)

    def close(self, then: Callable[[], None], within: float) -> None:
        type(self).closed.append(within)


Ask = Callable[..., hive.JoinRequest]


def split_at(events: Sequence[Any], mark: str) -> list[list[Any]]:
    parts: list[list[Any]] = [[]]
    for event in events:
        if event == mark:
            parts.append([])
        else:
            parts[-1].append(event)
    return parts


@pytest.fixture
def request_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    def make(*events: Any, patience: float = 60.0) -> hive.JoinRequest:
        """One at a broker that does this: connect, answer with a code, hang up with a reason.

        Or "again": that in the next session; the last one is the same for ever.
        """

        def happen(event: Any, listener: Any, wire: Wire) -> None:
            if event == "connect":
                listener.on_connected()
            elif isinstance(event, int):
                wire.sent[-1].done(event, "Some Words")
            else:
                listener.on_disconnected(event)

        def play(loop: hive.Loop, listener: Any, wire: Wire) -> None:
            for event in sessions[0]:
                loop.after(0, partial(happen, event, listener, wire))
            del sessions[: len(sessions) > 1]

        sessions = [[*one] for one in split_at(events, "again")]

        monkeypatch.setattr(hive, "PATIENCE", patience)
        Wire.plays, Wire.sent, Wire.closed = play, [], []
        settings = hive.MqttConfig(host="h", port=8883, username="mini", password="x")
        return hive.JoinRequest(settings, "lab")

    monkeypatch.setattr(hive, "MqttClient", Wire)
    yield make


def test_a_password_is_said_and_waits_for_the_end_of_the_session(request_of: Ask) -> None:
    one = request_of("connect", 0, "hung up")
    one.ask(b"hashed")
    [said] = Wire.sent
    assert (said.topic, said.payload, said.qos) == ("lab/@host/command/mini", b"hashed", 1)
    assert Wire.closed == [0.0] and one._lost == "hung up"
    went_on = list[bool]()
    one.before_connecting(lambda: went_on.append(True))
    assert not went_on, "it asks once"
    one.ask(b"hashed")
    assert len(Wire.sent) == 2, "it may be asked again"


def test_an_invitation_that_is_used_between_two_words_was_used(
    request_of: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = request_of("connect", 0, "again", "refused: not authorized")
    one.ask(b"")
    with pytest.raises(hive.BrokerError, match="refuses the invitation: it was used"):
        one.ask(b"hashed")
    one = request_of("connect", 0, "again")  # and an answer of before is none now
    one.ask(b"")
    monkeypatch.setattr(hive, "PATIENCE", 0.02)
    with pytest.raises(hive.BrokerError, match="no answer"):
        one.ask(b"hashed")


def test_whether_it_would_be_heard_is_known_at_once(
    request_of: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = list[float]()

    def step(loop: hive.Loop, within: float, done: Callable[[], object]) -> None:
        waits.append(within)
        real(loop, min(within, 0.02) if waits[2:] else within, done)

    real = hive.step_until
    monkeypatch.setattr(hive, "step_until", step)
    request_of("connect", 0).ask(b"")
    assert waits == [60.0]
    request_of("connect", 0).ask(b"hashed")  # nobody ends the session: it was not accepted
    assert waits == [60.0, 60.0, 10.0] and Wire.closed == [0.0]


NOT_BELIEVED = "certificate verify failed: "


@pytest.mark.parametrize(
    ("events", "words"),
    [
        (("refused: not authorized",), "h:8883 refuses the invitation: it was used, has ended"),
        (("connect", "refused: not authorized"), "broker h:8883: refused: not authorized; "),
        (("connect", 0x10), "broker h:8883 is there, and nobody who lets nodes in; on that"),
        (("connect", 0x87), "broker h:8883: refuses a word to its host: some words"),
        ((), "broker h:8883: no answer in 0 s"),
        (("connect",), "broker h:8883: no answer in 0 s"),
        (("Connection refused",), "broker h:8883: Connection refused"),
        (
            (f"{NOT_BELIEVED}certificate has expired (_ssl.c:1)",),
            "h:8883 is not believed: certificate has expired; is a clock wrong, here or there?",
        ),
        (
            (f"{NOT_BELIEVED}certificate is not yet valid (x)",),
            "h:8883 is not believed: certificate is not yet valid; is a clock wrong, here or",
        ),
        (
            (f"{NOT_BELIEVED}unable to get issuer (x)",),
            "h:8883 is not believed: unable to get issuer; is it another machine?",
        ),
        (("odd certificate",), "h:8883 is not believed: ; is it another machine?"),
    ],
)
def test_why_one_cannot_join(request_of: Ask, events: tuple[Any, ...], words: str) -> None:
    patience = 0.02 if "no answer" in words else 60.0
    with pytest.raises(hive.BrokerError) as caught:
        request_of(*events, patience=patience).ask(b"hashed")
    assert str(caught.value).startswith(words)


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, stem in (("hive.toml", ""), ("beta.toml", "beta-")):
        files = hive.joined_files(invitation(), "h", tmp_path / name, "secret")
        password, authority, config = files
        assert [one.name for one in files] == [f"{stem}mqtt-password", f"{stem}mqtt-ca.pem", name]
        assert {one.parent for one in files} == {tmp_path}
        assert files[password] == "secret\n" and files[authority] == invitation().authority()
        hive.write_privately(files, force=False)
        loaded = hive.load_config(str(config))
        node, mqtt = loaded.node, loaded.mqtt
        assert (node.id, node.topic_prefix, loaded.checked) == ("mini", "lab", True)
        assert (mqtt.endpoint, mqtt.username, mqtt.password) == (("h", 8883), "mini", "secret")
        assert (mqtt.tls, mqtt.ca_file, mqtt.password_file) == (True, authority, password)


def test_what_belonged_to_another_broker_is_taken_out() -> None:
    said = hive.broker_keys("h", 1, "u")
    gone = [key for key, value in said.items() if value is None]
    assert gone == ["mqtt.password", "mqtt.cert_file", "mqtt.key_file"]
    assert {key: value for key, value in said.items() if value is not None} == {
        **{"mqtt.host": "h", "mqtt.port": 1, "mqtt.username": "u", "mqtt.tls": True},
        "mqtt.senders": "checked",
    }
