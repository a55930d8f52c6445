"""Which broker, and whose turn it is to be one: each decision, in this process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually

import hive
from hive import BrokerConfig, Config, MqttConfig, NodeConfig


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory with a short path, as a socket needs it."""
    with tempfile.TemporaryDirectory(prefix="hive-") as name:
        yield Path(name)


def configuration(home: Path, **broker: Any) -> Config:
    """A node that names no broker, on a machine where ours would be in `home`."""
    settings = BrokerConfig(**{"socket": home / "s", "state_dir": home / "state", **broker})
    return Config(NodeConfig(id="alpha"), broker=settings)


@pytest.fixture
def listening(home: Path) -> Iterator[Path]:
    """Where a broker of ours listens."""
    with hive.unix_listener(home / "s") as listener:
        listener.listen()
        yield home / "s"


@contextlib.contextmanager
def says(answer: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """Whoever listens at a port and answers this: the port, and what it heard."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            visitor, _ = listener.accept()
            with visitor:
                heard.append(visitor.recv(4096))
                visitor.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], heard
        thread.join()


# Where one may be.


@pytest.mark.parametrize("left", ["", "relative", "\0", "/a\0b", "/" + "x" * 5000])
def test_what_a_crash_left_in_the_lock_names_no_place(home: Path, left: str) -> None:
    (home / "broker.sqlite3.lock").write_text(left)
    found = [*hive.embedded_places(BrokerConfig(state_dir=home, socket=home / "s"))]
    expected = [Path("/" + "x" * (hive.MAX_LOCK - 1))] if "xx" in left else []
    assert found == [*expected, home / "s"]


def test_it_is_looked_for_where_it_said_itself_and_then_where_it_should_be(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "SHORT_PLACE", home)
    settings = BrokerConfig(state_dir=home, socket=home / "s")
    lock = home / "broker.sqlite3.lock"
    spare = hive.spare_path(lock)
    spare.parent.mkdir(mode=0o700)
    spare.write_text("/spare")
    lock.write_text("/moved")
    assert [*hive.embedded_places(settings)] == [Path("/moved"), Path("/spare"), home / "s"]
    home.chmod(0o777)  # anybody could have written it
    assert Path("/moved") not in [*hive.embedded_places(settings)]


def test_one_listens_where_only_we_could_have_made_it(listening: Path) -> None:
    assert hive.embedded_listens(listening)
    listening.parent.chmod(0o777)
    assert not hive.embedded_listens(listening)
    assert not hive.embedded_listens(listening.parent / "nothing")


def test_one_that_hangs_is_not_waited_for_for_ever(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hive.LOCATE_TIMEOUT == 1.0
    monkeypatch.setattr(hive, "LOCATE_TIMEOUT", 0.05)
    with hive.unix_listener(home / "s") as listener:
        listener.listen(0)
        crowd = [socket.socket(socket.AF_UNIX) for _ in range(5)]
        with contextlib.suppress(BlockingIOError):
            for one in crowd:  # until no more can wait to be let in
                one.setblocking(False)
                one.connect(str(home / "s"))
        assert not hive.embedded_listens(home / "s")
        for one in crowd:
            one.close()


@pytest.mark.parametrize(
    ("answer", "is_one"),
    [(b"\x20\x02\0\0", True), (b"\x20\x02\0\5", True), (b"\x30\0", False), (b"", False)],
)
def test_what_answers_connect_is_a_broker(answer: bytes, is_one: bool) -> None:
    with says(answer) as (port, heard):
        assert hive.speaks_mqtt("127.0.0.1", port) is is_one
    (said,) = heard
    begin, end = hive.packet_bounds(bytearray(said), 0, 100) or (0, 0)
    assert (said[0], end) == (0x10, len(said))
    connect = hive.Connect.parse(said[begin:])
    assert (connect.version, connect.clean, connect.client_id) == (4, True, "")
    assert 0 < connect.keepalive < 60, "it is forgotten soon if we vanish"


def test_nobody_at_the_port_is_no_broker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert not hive.speaks_mqtt("127.0.0.1", port)


@pytest.mark.parametrize(
    ("named", "ours", "other", "found"),
    [
        (True, True, True, "named"),
        (False, True, True, "ours"),
        (False, False, True, "localhost"),
        (False, False, False, None),
    ],
)
def test_in_which_order_brokers_are_chosen(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    named: bool,
    ours: bool,
    other: bool,
    found: str | None,
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home))
    asked: list[tuple[str, int]] = []

    def speaks_mqtt(*at: Any) -> bool:
        asked.append(at)
        return other

    monkeypatch.setattr(hive, "speaks_mqtt", speaks_mqtt)
    monkeypatch.setattr(hive, "embedded_listens", lambda place: ours)
    config = configuration(home, socket=None)
    mqtt = MqttConfig(host="named" if named else None, keepalive=17, protocol="3.1.1")
    chosen = hive.find_broker(config.replace(mqtt=mqtt))
    place = home / "hive" / "broker"
    assert (chosen and chosen.host) == (str(place) if found == "ours" else found)
    if chosen:
        assert (chosen.keepalive, chosen.protocol) == (17, "3.1.1")
    assert asked == ([] if ours or named else [("localhost", 1883)])


def test_whoever_names_the_socket_of_ours_means_no_other(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "speaks_mqtt", lambda *at: pytest.fail("it was looked for"))
    assert hive.find_broker(configuration(home)) is None


# A command waits a moment.


def test_a_command_waits_a_second_for_a_daemon_that_is_about_to_host(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, pauses = [100.0], list[float]()

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(hive.BrokerError) as raised:
        hive.with_broker(configuration(home))
    assert str(raised.value) == hive.NO_BROKER
    assert 1.0 <= now[0] - 100 < 1.2 and 10 <= len(pauses) <= 30
    found = MqttConfig(host="late")
    looks = iter([None, None, found])
    monkeypatch.setattr(hive, "find_broker", lambda config: next(looks))
    assert hive.with_broker(configuration(home)).mqtt is found


# What is said of a fault.


def test_a_fault_says_which_broker_why_and_what_to_try() -> None:
    mqtt = MqttConfig(host="broker.lan")
    fault = str(hive.broker_fault(mqtt, "No route to host"))
    assert fault.startswith("broker broker.lan:1883: No route to host; is [mqtt] host right")
    assert str(hive.broker_fault(mqtt, "who knows")) == "broker broker.lan:1883: who knows"


@pytest.mark.parametrize(
    ("mqtt", "reason", "hint"),
    [
        ({"host": "/s"}, "no answer for 3 s", hive.HUNG),
        ({"host": "b"}, "no answer for 3 s", "are host and port right"),
        ({"host": "b"}, "refused: not authorized", "does the broker want [mqtt] username"),
        ({"host": "b", "username": "u"}, "refused: not authorized", "check [mqtt] username"),
        (
            {"host": "b", "tls": True, "cert_file": Path("c")},
            "closed at once",
            "does the broker know the authority of [mqtt] cert_file",
        ),
        ({"host": "b", "tls": True}, "closed at once", "does the broker want a client certificate"),
        (
            {"host": "b", "protocol": "3.1.1"},
            "closed at once",
            "does the port want TLS ([mqtt] tls",
        ),
        ({"host": "b"}, "nobody knows", ""),
    ],
)
def test_a_hint_knows_how_the_connection_was_to_be(
    mqtt: dict[str, Any], reason: str, hint: str
) -> None:
    found = hive.hint_for(MqttConfig(**mqtt), reason)
    assert found.startswith(hint) and bool(found) is bool(hint)


# A daemon's broker.


class Host:
    """A daemon's broker on a loop whose clock is the test's."""

    def __init__(self, config: Config) -> None:
        self.now, self.log = 1000.0, io.StringIO()
        log = hive.Log("debug", "json", self.log)
        self.loop = hive.Loop(log, lambda: self.now)
        self.host = hive.BrokerHost(config, self.loop, log)
        self.found: list[MqttConfig] = []

    def find(self) -> None:
        self.host.find(self.found.append)

    def turn(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.loop.post(hive.do_nothing)
        self.loop.step()

    def until(self, count: int) -> None:
        def found() -> bool:
            self.turn()
            return len(self.found) >= count

        eventually("a broker is found", found)

    def said(self, event: str) -> list[str]:
        """With which level."""
        lines = map(json.loads, self.log.getvalue().splitlines())
        return [line["level"] for line in lines if line["event"] == event]

    def close(self) -> None:
        self.host.close()
        for thread in threading.enumerate():
            if thread.name == "locate":
                thread.join(10)
        self.loop.close()
        assert not self.said("bug")


@pytest.fixture
def host_of(home: Path) -> Iterator[Callable[..., Host]]:
    made: list[Host] = []

    def make(config: Config) -> Host:
        made.append(Host(config))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_named_broker_is_found_at_once(home: Path, host_of: Callable[..., Host]) -> None:
    named = configuration(home, listen="0.0.0.0:1883").replace(mqtt=MqttConfig(host="b"))
    host = host_of(named)  # it will never host: so what it says of that is no error
    host.find()
    assert host.found == [named.mqtt]


@pytest.mark.parametrize("listen", ["0.0.0.0:1883", "127.0.0.1:1883"])
def test_what_may_not_be_hosted_is_said_before_it_must_be(
    home: Path, host_of: Callable[..., Host], listen: str
) -> None:
    with pytest.raises(hive.ConfigError, match=r"broker\.listen"):
        host_of(configuration(home, listen=listen))


def test_it_hosts_where_there_is_none_and_finds_itself(
    home: Path, host_of: Callable[..., Host]
) -> None:
    host = host_of(configuration(home))
    for count in (1, 2):
        host.find()
        host.until(count)
    assert [one.host for one in host.found] == [str(home / "s")] * 2
    assert host.said("hosting the broker of this machine") == ["info"]
    host.turn(60)
    assert len(host.found) == 2, "it does not look again for what it has"


def test_who_takes_the_socket_away_ends_the_broker_and_it_is_hosted_anew(
    home: Path, host_of: Callable[..., Host]
) -> None:
    host = host_of(configuration(home))
    host.find()
    host.until(1)
    for _ in range(3):
        host.turn(1)
    assert not host.said("the broker's socket is gone")
    (home / "s").unlink()
    host.turn(0.9)
    assert not host.said("the broker's socket is gone")
    host.turn(0.1)
    assert host.said("the broker's socket is gone") == ["warning"]
    host.turn(10)  # and that is all that it says
    host.find()
    host.until(2)
    assert (home / "s").is_socket()
    assert host.said("the broker's socket is gone") == ["warning"]


def test_what_answered_at_localhost_is_waited_for_until_ours_is_there(
    home: Path, host_of: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second broker would part the hive."""
    localhost, ours = MqttConfig(host="localhost"), MqttConfig(host=str(home / "s"))
    answers: list[MqttConfig | None] = [localhost, None, None, ours, None]
    host = host_of(configuration(home))
    for count, answer in enumerate(answers, 1):
        monkeypatch.setattr(hive, "find_broker", lambda config, answer=answer: answer)
        host.find()
        host.until(count)
    assert host.found[:4] == [localhost] * 3 + [ours]
    assert host.said("hosting the broker of this machine") == ["info"], "after ours has gone"
    host.turn(60)
    assert len(host.found) == 5


def test_why_it_cannot_host_is_said_the_third_time_and_once(
    home: Path, host_of: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, why = threading.Event(), ["the disk is on fire"]

    def broker(*given: object) -> None:
        raise hive.BrokerError(why[0])

    def find(config: Config) -> None:
        looked.set()

    monkeypatch.setattr(hive, "Broker", broker)
    monkeypatch.setattr(hive, "find_broker", find)
    host = host_of(configuration(home))

    def looks(times: int) -> list[str]:
        before = len(said())
        host.find() if not before else host.turn(1.0)
        for number in range(times):
            if number:
                host.turn(0.9)
                assert not looked.is_set(), "it waits a second"
                host.turn(0.1)
            assert looked.wait(10)
            looked.clear()

            def is_said(count: int = before + number + 1) -> bool:
                host.turn()
                return len(said()) >= count

            eventually("it is said", is_said)
        return said()[before:]

    def said() -> list[str]:
        return host.said("cannot host the broker, looking again")

    assert looks(5) == ["debug", "debug", "warning", "debug", "debug"]
    why[0] = "the disk is wet"
    assert looks(4) == ["debug", "debug", "warning", "debug"]
    assert not host.found


def test_a_broker_that_cannot_start_gives_back_what_it_has(
    home: Path, host_of: Callable[..., Host]
) -> None:
    (home / "s").write_text("no socket")
    host = host_of(configuration(home))
    before = {*os.listdir("/dev/fd")}  # some of other tests may be closed meanwhile
    host.host._located(None, host.found.append)
    assert {*os.listdir("/dev/fd")} <= before and not host.found
    (home / "s").unlink()
    host.host._located(None, host.found.append)
    assert [one.host for one in host.found] == [str(home / "s")]
