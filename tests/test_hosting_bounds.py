"""The files of a hive that is carried here, its service, and who starts it: each by itself."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import eventually, find_program, missing, run_until

import hive

HOUR, DAY = 3600.0, 86400.0
CHOSEN = hive.password_hash("chosen", b"s" * 12)
NOW = 1_700_000_000.0


def settings(listen: str = "127.0.0.1", port: int = 8883, *names: str) -> hive.HostSettings:
    return hive.HostSettings(listen, port, names, "hive")


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> hive.Host:
    """The folder of one with a node alpha, as if Mosquitto ran; it has no certificates."""
    host = hive.Host(tmp_path / "alpha")
    hive.make_private(host.folder)
    host._write(host._settings, hive.encode_json(vars(settings())).decode())
    for user in (hive.HOST_USER, "alpha"):
        host._let_in(user)
    return host


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What is sent to the processes of the hive, of which Mosquitto is number 77."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(hive.Host, "broker_pid", lambda host: 77)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    return sent


# ---- Words and numbers ---------------------------------------------------------------------


def test_the_times_that_are_promised() -> None:
    """In contrib/help/brokers.md, the README, and to whoever is invited."""
    assert (hive.INVITATION, hive.RENEWAL) == (HOUR, 30 * DAY)
    assert (hive.AUTHORITY_DAYS, hive.SERVER_DAYS, hive.SURE_DAYS) == (3650, 365, 3650)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("beta", "beta"),
        ("@lab", "@lab"),
        ("@host", None),
        ("@", None),
        ("@@lab", None),
        ("@all", None),
        ("all", None),
        (None, None),
        (["@lab"], None),
    ],
)
def test_a_member_is_a_node_or_another_site(said: object, name: str | None) -> None:
    if name:
        assert hive.member_name(said) == name
    else:
        with pytest.raises(ValueError):
            hive.member_name(said)


def test_each_password_is_another_one_of_128_bits() -> None:
    one, other = hive.new_password(), hive.new_password()
    assert one != other and re.fullmatch("[0-9a-f]{32}", one)
    assert hive.password_hash("x", b"s" * 12) != hive.password_hash("x", b"t" * 12)
    assert not hive.is_password_of("", "") and not hive.is_password_of("x", "x")
    assert hive.is_password_of(CHOSEN, "chosen") and not hive.is_password_of(CHOSEN, "Chosen")


@pytest.mark.parametrize(
    ("listen", "names", "everywhere", "reached_at", "own"),
    [
        ("127.0.0.2", ("a",), False, ["a", "127.0.0.2"], "127.0.0.2"),
        ("fd7a::7", (), False, ["fd7a::7"], "fd7a::7"),
        ("0.0.0.0", ("a", "b"), True, ["a", "b"], "localhost"),
        ("::", ("a",), True, ["a"], "localhost"),
        ("alpha.lan", ("a",), True, ["a"], "localhost"),
    ],
)
def test_where_it_listens_says_how_it_is_reached(
    listen: str, names: tuple[str, ...], everywhere: bool, reached_at: list[str], own: str
) -> None:
    where = settings(listen, 8883, *names)
    assert (where.everywhere, where.reached_at, where.own) == (everywhere, reached_at, own)


def test_a_port_is_tried_at_that_address_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for listen in ("127.0.0.1", "0.0.0.0", "alpha.lan"):
            with pytest.raises(OSError, match="in use"):
                settings(listen).bind(port)
        if sys.platform == "linux":
            settings("127.0.0.2").bind(port)
        if socket.has_ipv6:
            settings("::1").bind(0)
    with socket.create_server(("127.0.0.1", 0)) as left:
        port = left.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            left.accept()[0].close()  # by us: the port is in TIME_WAIT, which must not matter
    settings().bind(port)


# ---- Programs ------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Programs that end so."""

    def end(result: Any) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def run(command: list[str], **how: Any) -> Any:
            calls.append(how | {"command": [*command]})
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(subprocess, "run", run)
        return calls

    monkeypatch.setattr(hive, "need_program", lambda name: f"/bin/{name}")
    return end


def test_openssl_gets_its_input_a_bound_and_nothing_of_our_environment(runs: Any) -> None:
    calls = runs(SimpleNamespace(returncode=0, stdout="made", stderr=""))
    assert hive.openssl("req", "-new", stdin="asked") == "made"
    assert calls == [
        {
            **{"command": ["/bin/openssl", "req", "-new"], "input": "asked", "text": True},
            **{"capture_output": True, "timeout": 20.0},
            "env": {"PATH": os.defpath},
        }
    ]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (SimpleNamespace(returncode=1, stdout="", stderr="a\nlast 'one'\n"), "last 'one'"),
        (SimpleNamespace(returncode=-9, stdout="", stderr=""), "no reason given"),
        (SimpleNamespace(returncode=1, stdout="", stderr="x" * 500), "x" * 100),
        (FileNotFoundError(2, "No such file or directory"), "No such file or directory"),
        (subprocess.TimeoutExpired("openssl", 20), "timed out"),
    ],
)
def test_what_openssl_cannot_do_is_one_line(runs: Any, result: Any, words: str) -> None:
    runs(result)
    with pytest.raises(hive.HiveError) as caught:
        hive.openssl("req")
    line = str(caught.value)
    assert line.startswith("/bin/openssl req: ") and words in line and len(line) < 250


def test_a_word_to_the_system_is_done_or_not(runs: Any) -> None:
    for result, done in (
        (SimpleNamespace(returncode=0), True),
        (SimpleNamespace(returncode=1), False),
        (FileNotFoundError(2, "x"), False),
        (subprocess.TimeoutExpired("x", 30), False),
    ):
        calls = runs(result)
        assert hive.succeeds("systemctl", "x") is done
        nothing, bound = dict.fromkeys(("stdin", "stdout", "stderr"), -3), 30.0
        assert calls == [{"command": ["systemctl", "x"], "timeout": bound, **nothing}]


def test_programs_are_found_in_the_path_and_where_systems_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tool").write_text("#!/bin/sh\n")
    (tmp_path / "tool").chmod(0o755)
    monkeypatch.setattr(hive, "PROGRAM_PLACES", str(tmp_path))
    assert hive.need_program("tool") == str(tmp_path / "tool")
    monkeypatch.setattr(hive, "PROGRAM_PLACES", "/nowhere")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hive.need_program("tool") == str(tmp_path / "tool")
    monkeypatch.delenv("PATH")
    assert hive.need_program("sh").endswith("/sh")
    with pytest.raises(hive.HiveError, match="the program tool is missing; install it"):
        hive.need_program("tool")


# ---- The files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said", ["", "[]", "{", "{}", '{"listen": "x", "port": 1, "names": [], "prefi": ""}']
)
def test_a_hive_that_was_not_made_to_the_end_is_none(tmp_path: Path, said: str) -> None:
    host = hive.Host(tmp_path)
    host.folder.mkdir()
    if said:
        host._settings.write_text(said)
    assert host.settings() is None
    with pytest.raises(hive.HiveError, match=f"nothing in {host.folder}.; first: hive host"):
        host.needed_settings()
    host._settings.write_text(hive.encode_json(vars(settings("::", 1, "a", "b"))).decode())
    assert host.needed_settings() == host.settings() == settings("::", 1, "a", "b")


def test_whatever_is_missing_or_different_is_a_change_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dates, made = "notBefore=Nov 14 22:13:20 2023 GMT\nnotAfter=Nov 14 22:13:20 2024 GMT\n", [0]

    def openssl(*arguments: str, stdin: str = "") -> str:
        made[0] += 1
        return dates if "-enddate" in arguments else f"made {made}"

    monkeypatch.setattr(hive, "openssl", openssl)
    host = hive.Host(tmp_path / "alpha")
    assert host.prepare(settings(), "alpha", NOW) and not host.prepare(settings(), "alpha", NOW)
    names = ("mosquitto.conf", "acl", "host.json", "@host.password", "alpha.password")
    for name in (*names, "passwords", "server.names", "server.pem", "ca.pem"):
        file = host.folder / name
        before = file.read_text()
        file.unlink()
        assert host.prepare(settings(), "alpha", NOW), name
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        if name in ("mosquitto.conf", "acl", "host.json", "server.names"):
            assert file.read_text() == before
        assert not host.prepare(settings(), "alpha", NOW), name
    assert host.prepare(settings("127.0.0.1", 8884), "alpha", NOW)
    assert host.prepare(settings(), "beta", NOW) and "beta" in host.members()
    for user in (hive.HOST_USER, "alpha", "beta"):
        password = host.password_file(user).read_text()
        assert password.endswith("\n") and host.login(user).password == password.strip()
        assert hive.is_password_of(host.members()[user], password.strip())
    assert not host.prepare(settings(), "alpha", NOW + (366 - 30) * DAY - 1)
    assert host.prepare(settings(), "alpha", NOW + (366 - 30) * DAY)
    for folder in (host.folder, host.folder / "data"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.fixture
def whole(tmp_path: Path) -> hive.Host:
    """One with certificates."""
    if not find_program("openssl"):
        missing("openssl is missing")
    host = hive.Host(tmp_path / "alpha")
    assert host.prepare(settings(), "alpha", time.time())
    return host


def test_the_certificate_has_a_new_key_and_its_own_number_each_time(whole: hive.Host) -> None:
    def facts() -> list[str]:
        said = hive.openssl("x509", "-noout", "-serial", "-in", str(whole._server))
        return [said, whole._server.read_text().partition("BEGIN EC PRIVATE")[2]]

    first, authority = facts(), whole.authority.read_text()
    now = time.time()
    assert whole._ends(whole._server, now) == pytest.approx(now + 365 * DAY, abs=100)
    assert whole._ends(whole.authority, now) == pytest.approx(now + 3650 * DAY, abs=100)
    assert whole.days_left(now) == 364
    (whole.folder / "server.names").write_text("")
    assert whole.prepare(settings(), "alpha", now)
    assert not {*first} & {*facts()} and first[1] and whole.authority.read_text() == authority
    assert not (whole.folder / "server.key").exists()
    ssl.create_default_context().load_cert_chain(whole._server)  # the key fits
    whole.authority.unlink()
    assert whole.prepare(settings(), "alpha", now)
    assert whole.authority.read_text() != authority
    check = ("verify", "-CAfile", str(whole.authority), "-verify_ip", "127.0.0.1")
    assert "OK" in hive.openssl(*check, str(whole._server))


def test_names_that_are_too_long_for_a_subject_are_cut(
    bare: hive.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[str, str] = {}
    monkeypatch.setattr(hive, "openssl", lambda *how, stdin="": "x")
    monkeypatch.setattr(bare, "_write", lambda file, text: written.setdefault(text, file.name))
    monkeypatch.setattr(bare, "_certify_server", lambda request: None)
    long = hive.HostSettings("::", 1, ("a" * 100,), "p" * 90)
    assert bare._certify(long, NOW)
    requests = "".join(text for text, name in written.items() if name == "openssl.cnf")
    assert f"CN = hive {'p' * 50}\n" in requests and "CN = localhost\n" in requests
    names = f"DNS:{'a' * 100},DNS:localhost,IP:127.0.0.1"
    assert f"subjectAltName = {names}\n" in requests and written[names] == "server.names"
    assert "@" not in requests


@pytest.mark.parametrize(
    ("begins", "now", "holds"),
    [
        ("Nov 14 22:13:20 2023", NOW, True),
        ("Nov 14 22:13:20 2023", NOW - hive.LOCK_PATIENCE, True),
        ("Nov 14 22:13:20 2023", NOW - hive.LOCK_PATIENCE - 1, False),
    ],
)
def test_a_certificate_holds_from_its_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begins: str, now: float, holds: bool
) -> None:
    said = f"notBefore={begins} GMT\nnotAfter=Nov 14 22:13:20 2024 GMT\n"
    monkeypatch.setattr(hive, "openssl", lambda *how: said)
    file = tmp_path / "x.pem"
    assert hive.Host._ends(file, now) == 0.0
    file.write_text("x")
    assert hive.Host._ends(file, now) == (NOW + 366 * DAY if holds else 0.0)


@pytest.mark.parametrize(
    ("server", "authority", "days"),
    [(10.5, 20, 10), (20, 10.5, 10), (0.99999, 9, 0), (-5, 9, 0), (1, 9, 1)],
)
def test_the_first_that_ends_counts(
    bare: hive.Host, monkeypatch: pytest.MonkeyPatch, server: float, authority: float, days: int
) -> None:
    ends = {bare._server: NOW + server * DAY, bare.authority: NOW + authority * DAY}
    monkeypatch.setattr(bare, "_ends", lambda file, now: ends[file])
    assert bare.days_left(NOW) == days


def test_names_are_compared_as_tls_does(bare: hive.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "X509v3\n  DNS:Alpha.lan, DNS:localhost, IP Address:FD7A:0:0:0:0:0:0:7, DNS:a\n"
    monkeypatch.setattr(hive, "openssl", lambda *how: said)
    assert bare.unnamed(settings("fd7a::7", 1, "alpha.LAN", "LOCALHOST")) == []
    assert bare.unnamed(settings("fd7a::8", 1, "beta.lan", "a")) == ["beta.lan", "fd7a::8"]


def test_what_mosquitto_reads(bare: hive.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(where: hive.HostSettings) -> list[str]:
        return bare._conf(where).splitlines()

    for listen, listener in (("127.0.0.1", "listener 7 127.0.0.1"), ("0.0.0.0", "listener 7")):
        assert listener in lines(settings(listen, 7))
    said, folder = lines(settings()), bare.folder
    assert said[0] == "# Written by hive host; to change it, say that again."
    assert {
        *(f"pid_file {folder}/mosquitto.pid", "log_type error", "log_type warning"),
        *(f"certfile {folder}/server.pem", f"keyfile {folder}/server.pem"),
        *(f"persistence_location {folder}/data/", f"password_file {folder}/passwords"),
    } <= {*said}
    assert not any(line.startswith("connection ") for line in said)
    for user, rooted in ((0, True), (1000, False)):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        assert ("user root" in lines(settings())) is rooted


def test_a_bridge_is_in_the_configuration_as_long_as_there_is_one(bare: hive.Host) -> None:
    assert bare.bridge() == ("", None)
    account = {"name": "@lab", "host": "far.lan", "port": 8883, "password": "secret"}
    bare.set_bridge(account, "the authority")
    name, mqtt = bare.bridge()
    expected = hive.MqttConfig(host="far.lan", port=8883, password="secret", tls=True)
    assert mqtt == expected.replace(ca_file=bare.folder / "bridge-ca.pem")
    assert name == "@lab" and (bare.folder / "bridge-ca.pem").read_text() == "the authority"
    said = bare._conf(settings())
    assert "\nconnection @lab\naddress far.lan:8883\n" in said
    assert "pattern read hive/all/+" in bare._acl("hive").splitlines()
    bare.set_bridge({}, "")
    assert bare.bridge() == ("", None) and "bridge" not in bare._acl("hive")


def test_another_site_has_its_rights_from_when_it_has_joined(
    bare: hive.Host, signals: object
) -> None:
    rules = "user @lab\ntopic deny hive/@host/+/+\ntopic readwrite hive/+/+/+\n"
    rules += "topic write hive/all/@lab\n"
    bare.invite("@lab", NOW)
    assert bare.sites() == [] and rules not in bare._acl_file.read_text()
    assert bare.accept("@lab", CHOSEN, NOW)
    assert bare.sites() == ["@lab"] and bare._acl_file.read_text().endswith(rules)
    assert "pattern read hive/all/+" in bare._acl_file.read_text().splitlines()
    bare.expel("@lab")
    assert bare.sites() == [] and "@lab" not in bare._acl_file.read_text()


# ---- Who may come in -----------------------------------------------------------------------


def test_how_one_connects_on_this_machine(bare: hive.Host) -> None:
    file = bare.folder / "alpha.password"
    mqtt = hive.MqttConfig(host="127.0.0.1", port=8883, username="alpha", tls=True)
    secret = mqtt.replace(password=file.read_text().strip(), password_file=file)
    assert bare.login("alpha") == secret.replace(ca_file=bare.authority, senders="checked")


def test_a_user_of_here_keeps_a_password_that_is_right(bare: hive.Host) -> None:
    before = bare.members(), bare.password_file("alpha").read_text()
    assert bare._let_in("alpha") is False
    assert (bare.members(), bare.password_file("alpha").read_text()) == before
    bare.shut_out("alpha")
    assert bare._let_in("alpha") is True
    assert hive.is_password_of(bare.members()["alpha"], before[1].strip())


def test_an_invitation_ends_to_the_second_and_with_another_password(bare: hive.Host) -> None:
    bare.invite("mini", NOW + 0.9)
    bare.invite("mini", NOW + 0.9)  # and the one before ends
    said = bare.invited(NOW + HOUR - 1)
    assert said["mini"] == {"until": NOW + HOUR, "hash": bare.members()["mini"]}
    assert bare.invited(NOW + HOUR) == {}
    bare._write_members(bare.members() | {"mini": CHOSEN})
    assert bare.invited(NOW) == {}


def test_every_hash_that_is_written_can_be_read(bare: hive.Host, signals: object) -> None:
    bare.invite("mini", NOW)
    assert bare.shut_out("alpha") is True and bare.shut_out("nobody") is False
    assert all(hive.PASSWORD_HASH.fullmatch(one) for one in bare.members().values())
    old = bare.password_file("alpha").read_text().strip()
    assert not hive.is_password_of(bare.members()["alpha"], old)
    bare.expel("alpha")
    bare.expel("nobody")
    assert [*bare.members()] == [hive.HOST_USER, "mini"]


def test_mosquitto_hears_of_who_comes_and_who_came_too_late(
    bare: hive.Host, signals: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = (77, signal.SIGHUP)
    bare.invite("mini", NOW)
    assert signals == []  # that is for who prints the line
    assert not bare.accept("other", CHOSEN, NOW) and signals == []
    assert bare.accept("mini", CHOSEN, NOW) and signals == [again]
    bare.invite("late", NOW)
    assert bare.end_invitations(NOW + HOUR - 1) == []  # mini is forgotten, as it has joined
    assert [*json.loads(bare._invited.read_text())] == ["late"] and signals == [again] * 2
    assert bare.end_invitations(NOW + HOUR - 1) == [] and signals == [again] * 2
    assert bare.end_invitations(NOW + HOUR) == ["late"] and signals == [again] * 3
    assert json.loads(bare._invited.read_text()) == {}
    assert [*bare.members()] == [hive.HOST_USER, "alpha", "mini"]
    monkeypatch.setattr(bare, "broker_pid", lambda: None)
    bare.invite("quiet", NOW)
    assert not bare.accept("quiet", CHOSEN, NOW) and signals == [again] * 3


def test_who_was_invited_in_vain_is_out_before_the_next_one_is_invited(bare: hive.Host) -> None:
    bare.invite("late", NOW)
    bare.invite("mini", NOW + HOUR)
    assert [*bare.members()] == [hive.HOST_USER, "alpha", "mini"]


def test_a_mosquitto_that_has_just_gone_is_no_error(
    bare: hive.Host, signals: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(pid: int, number: int) -> None:
        raise ProcessLookupError

    monkeypatch.setattr(os, "kill", gone)
    assert bare.reload()


def test_a_command_that_waits_for_another_says_so(
    bare: hive.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "LOCK_PATIENCE", 0.0)
    with bare.lock():
        for act in (
            partial(bare.shut_out, "alpha"),
            partial(bare.invite, "x", NOW),
            partial(bare.expel, "alpha"),
            partial(bare.set_bridge, {"a": 1}, ""),
            partial(bare.renew, NOW),
        ):
            with pytest.raises(
                hive.HiveError, match=r"another command is at work in .*; try again"
            ):
                act()
    assert "alpha" in bare.members() and bare.shut_out("alpha")


def test_locks_are_waited_for_as_long_as_their_owner_may_take(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands make keys meanwhile; a lock of a process is held, or only looked at."""
    asked = list[float]()

    def lock(file: Path, patience: float = 0.0) -> None:
        asked.append(patience)
        raise BlockingIOError

    monkeypatch.setattr(hive, "FileLock", lock)
    with pytest.raises(hive.HiveError), served.host.lock():
        pass
    with pytest.raises(hive.BrokerError):
        hive.HostService(served.host, served.loop, served.loop.log)
    with pytest.raises(BlockingIOError):
        served.service._start_broker()
    assert asked == [15.0, 1.0, 1.0]


def test_a_renewed_certificate_is_read_anew(
    bare: hive.Host, signals: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for changed in (False, True):
        monkeypatch.setattr(bare, "_certify", lambda where, now, changed=changed: changed)
        bare.renew(NOW)
        assert signals == [(77, signal.SIGHUP)] * changed


def test_a_process_is_there_as_long_as_its_lock_is_held(bare: hive.Host) -> None:
    bare._pid.write_text("123\n")
    bare.service_lock.write_text("456")
    assert bare.broker_pid() is None and bare.service_pid() is None
    held = [hive.FileLock(bare.broker_lock), hive.FileLock(bare.service_lock)]
    assert (bare.broker_pid(), bare.service_pid()) == (123, 456)
    for _ in range(2):
        bare.forget_pid()
    assert bare.broker_pid() is None
    for one in held:
        one.close()


# ---- The service ---------------------------------------------------------------------------


class Wire:
    """Its client; the test is the broker."""

    def __init__(
        self, loop: hive.Loop, settings: hive.MqttConfig, subscriptions: list[tuple[str, int]]
    ) -> None:
        self.settings, self.subscriptions = settings, subscriptions
        self.sent = list[hive.OutgoingMessage]()
        self.within, self.opened = list[float](), 0

    def open(self, listener: object) -> None:
        self.opened += 1

    def set_broker(self, settings: hive.MqttConfig) -> None:
        self.settings = settings

    def subscribe(self, filters: list[tuple[str, int]]) -> None:
        self.subscriptions += filters

    def publish(self, message: hive.OutgoingMessage) -> None:
        self.sent.append(message)

    def close(self, then: Callable[[], None], within: float) -> None:
        self.within.append(within)
        then()


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: object) -> None:
        raise error

    return fail


class Clock:
    """One that stands still but for what the test skips."""

    skipped = 1000.0

    def __call__(self) -> float:
        return self.skipped


class Served:
    """A service on a clock of the test's."""

    def __init__(self, host: hive.Host) -> None:
        self.host, self.clock, self.said = host, Clock(), io.StringIO()
        log = hive.Log("info", stream=self.said)
        self.loop = hive.Loop(log, self.clock)
        self.service = hive.HostService(host, self.loop, log)
        self.wire: Any = self.service._client

    def hear(self, topic: str, payload: bytes, retained: bool = False) -> str:
        """What is logged of a message."""
        before = len(self.said.getvalue())
        self.service.deliver(
            hive.IncomingMessage(f"hive/{topic}", payload, retained, None, lambda: None)
        )
        return self.said.getvalue()[before:]

    def pass_time(self, seconds: float) -> None:
        self.clock.skipped += seconds
        self.loop.after(0, lambda: None)
        self.loop.step()


@pytest.fixture
def served(bare: hive.Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(hive, "MqttClient", Wire)
    bare.service_lock.write_text(str(os.getppid()))  # of one before, which was killed
    made = Served(bare)
    yield made
    made.service._broker = None
    made.service.close()
    made.loop.close()
    assert "bug" not in made.said.getvalue()


def test_one_service_keeps_a_hive(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served.wire.settings == served.host.login(hive.HOST_USER).replace(keepalive=10)
    assert served.wire.subscriptions == [("hive/@host/command/+", 0), ("hive/all/+", 0)]
    assert served.host.service_pid() is None, "it does not listen to signals yet"
    monkeypatch.setattr(hive, "GLANCE", 0.0)
    with pytest.raises(hive.BrokerError, match="is hosted already"):
        hive.HostService(served.host, served.loop, served.loop.log)


def test_it_begins_in_this_order(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    service, done = served.service, list[object]()
    monkeypatch.setattr(served.loop, "on_signal", lambda number, call: done.append((number, call)))
    monkeypatch.setattr(served.host, "broker_pid", lambda: 5)
    monkeypatch.setattr(hive, "end_process", lambda pid, lock: done.append((pid, lock)))
    monkeypatch.setattr(service, "_start_broker", lambda: done.append("broker"))
    monkeypatch.setattr(service, "_look_after", lambda now: done.append("look"))
    service.start()
    assert done == [
        *((signal.SIGTERM, service._stop), (signal.SIGINT, service._stop)),
        *((signal.SIGHUP, service._reread), (5, served.host.broker_lock), "broker", "look"),
    ]
    assert served.wire.opened == 1 and served.host.service_pid() == os.getpid()
    for _ in range(2):
        del done[:]
        served.pass_time(29)  # so that who was invited in vain is out within a minute
        assert done == []
        served.pass_time(1.1)
        assert done == ["look"]
    went_on = list[bool]()
    service.before_connecting(lambda: went_on.append(True))
    assert went_on


def test_it_ends_at_once_and_mosquitto_with_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, stopped = list[object](), list[bool]()
    monkeypatch.setattr(hive, "end_process", lambda pid, lock: ended.append((pid, lock)))
    monkeypatch.setattr(served.loop, "stop", lambda: stopped.append(True))
    monkeypatch.setattr(served.service, "_start_broker", lambda: ended.append("started"))
    served.service._stop()
    assert served.wire.within == [0.0] and stopped == [True]
    served.service._start_again()
    assert ended == []
    broker: Any = SimpleNamespace(pid=5)
    served.service._broker = broker
    served.service.close()
    assert ended == [(5, served.host.broker_lock)]
    assert not hive.is_locked(served.host.service_lock)


def test_it_runs_mosquitto_and_starts_it_again_when_it_ends(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "mosquitto"
    program.write_text(
        f"#!/bin/sh\necho 123: $* >&2\necho '9: running as root' >&2\n"
        f"env >{tmp_path}/env; while [ ! -e {tmp_path}/go ]; do sleep 0.01; done; exit 3\n"
    )
    program.chmod(0o755)
    limits = list[object]()
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: limits.append(limit))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 4096))
    monkeypatch.setattr(hive, "need_program", lambda name: str(tmp_path / name))
    monkeypatch.setenv("SECRET", "x")
    served.host.conf.write_text("written")
    served.host._pid.write_text("1")
    service = served.service
    service._start_broker()
    assert limits == [(resource.RLIMIT_NOFILE, (4096, 4096))]
    assert hive.is_locked(served.host.broker_lock), "by the child, which has it from us"
    assert not served.host._pid.exists() and service._conf == "written"
    assert service._broker
    pid = service._broker.pid
    assert os.getsid(pid) == pid, "it is in no terminal's session"
    (tmp_path / "go").touch()
    run_until(served.loop, "it has ended", lambda: service._broker is None)
    said = served.said.getvalue()
    assert f'event="Mosquitto started" pid={pid}' in said
    assert f"'-c {served.host.conf}'" in said, "what it says, without its clock"
    assert "Mosquitto says" in said and "running as root'\"" not in said.partition("ended")[0]
    assert 'event="Mosquitto has ended, starting it again" exit=3' in said
    assert "running as root" in said.partition("has ended")[2], "its last words"
    assert "SECRET" not in (tmp_path / "env").read_text()
    started = list[bool]()
    monkeypatch.setattr(service, "_start_broker", lambda: started.append(True))
    served.pass_time(1.9)
    assert not started
    served.pass_time(0.2)
    assert started


def test_where_it_is_stopped_mosquittos_end_is_no_error(served: Served) -> None:
    child = subprocess.Popen(["sh", "-c", ":"], stderr=subprocess.PIPE)
    service = served.service
    service._broker, service._stopping = child, True
    child.wait()
    assert child.stderr
    served.loop.watch(child.stderr, 1, service._hear_broker)
    run_until(served.loop, "its end is seen", lambda: service._broker is None)
    assert served.said.getvalue() == "" and child.stderr.closed


def test_of_what_mosquitto_says_a_few_lines_a_minute_are_kept(served: Served) -> None:
    lines = "".join(f"{number}: line {number}\n" for number in range(50)) + "\\377" + "x" * 300
    service = served.service
    child = subprocess.Popen(["sh", "-c", f"printf '{lines}' >&2"], stderr=subprocess.PIPE)
    service._broker, service._stopping = child, True
    assert child.stderr
    served.loop.watch(child.stderr, 1, service._hear_broker)
    run_until(served.loop, "its end is seen", lambda: service._broker is None)
    assert served.said.getvalue().count("Mosquitto says") == hive.RATE_LIMIT_BURST
    assert service._said.startswith("'\\ufffdxxx") and len(service._said) == 200


def test_what_was_changed_is_read_and_what_only_a_start_reads_starts_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = list[str]()
    broker: Any = SimpleNamespace(terminate=lambda: done.append("terminate"))
    monkeypatch.setattr(served.host, "reload", lambda: done.append("reload"))
    monkeypatch.setattr(served.service, "_look_after", lambda now: done.append("look"))
    served.host.conf.write_text("before")
    served.service._conf, served.service._broker = "before", broker
    served.host.password_file(hive.HOST_USER).write_text("another\n")
    served.service._reread()
    assert done == ["reload", "look"] and served.wire.settings.password == "another"
    assert served.wire.settings.keepalive == 10
    served.host.conf.write_text("after")
    served.service._reread()
    assert done[2:] == ["terminate", "look"]
    served.service._broker = None  # it has just ended, and will be started
    served.service._reread()
    assert done[4:] == ["reload", "look"]


def test_the_certificate_is_looked_at_once_an_hour_and_in_a_new_time(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed, late = list[float](), list[str]()
    monkeypatch.setattr(served.host, "renew", renewed.append)
    monkeypatch.setattr(served.host, "end_invitations", lambda now: late)
    clock = 1000.0
    monkeypatch.setattr(served.loop, "clock", lambda: clock)
    for ahead, passed, looks in (
        (0, 0, True),
        (0, HOUR, False),
        (0, 1, True),
        (60, 1, False),  # that much NTP may do
        (61, 1, True),
        (61, 1, False),
        (0, 1, True),  # set back
    ):
        clock += passed
        del renewed[:]
        served.service._look_after(NOW + ahead + clock)
        assert bool(renewed) is looks, (ahead, passed)
    assert served.said.getvalue() == ""
    late += ["mini", "mega"]
    served.service._look_after(NOW + clock)
    assert 'event="not joined in time" nodes="mini, mega"' in served.said.getvalue()


@pytest.mark.parametrize("error", [hive.HiveError("no way"), OSError(28, "no way")])
def test_what_cannot_be_looked_after_is_an_error_and_no_end(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(served.host, "end_invitations", raising(error))
    served.service._look_after(NOW)
    assert 'event="cannot look after the hive" why="no way"' in served.said.getvalue()


def test_only_a_broker_that_is_silent_for_long_is_killed(served: Served) -> None:
    killed, service = list[bool](), served.service
    broker: Any = SimpleNamespace(kill=lambda: killed.append(True), pid=1)
    service._broker = broker

    def down(reason: str, after: float) -> int:
        served.clock.skipped += after
        service.on_disconnected(reason)
        return len(killed)

    silent, gone = "no answer (CONNACK) in time", "Connection refused"
    assert down(silent, 0) == 0
    assert down("timed out", 29) == 0
    assert down(gone, 5) == 0 and down(silent, 0) == 0  # it begins anew
    assert down(silent, 29) == 0
    assert down(silent, 1) == 0
    assert down(silent, 1) == 1
    told = 'event="Mosquitto answers nobody, and is killed" why="no answer (CONNACK) in time"'
    assert told in served.said.getvalue()
    assert down(silent, 1) == 1  # another one has its time
    assert down(silent, 29) == 1
    service.on_connected()
    assert 'hosting the hive" at=127.0.0.1:8883' in served.said.getvalue()
    assert down(silent, 2) == 1
    service._broker = None
    assert down(silent, 10 * hive.SILENT_BROKER) == 1


def test_who_was_invited_is_let_in_and_others_are_a_few_lines(
    served: Served, signals: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = list[float]()
    monkeypatch.setattr(served.service, "_look_after", looked.append)
    served.host.invite("mini", time.time())
    assert served.hear("@host/command/mini", b"") == "" and not looked
    assert "event=joined node=mini" in served.hear("@host/command/mini", CHOSEN.encode())
    assert served.host.members()["mini"] == CHOSEN and not looked
    for number in range(hive.RATE_LIMIT_BURST + 3):
        said = served.hear("@host/command/mini", CHOSEN.encode())
        told = number < hive.RATE_LIMIT_BURST
        assert ('event="not invited" node=mini' in said) is told
    assert len(looked) == hive.RATE_LIMIT_BURST
    tried = list[str]()
    for error in (hive.HiveError("no way"), OSError(28, "no way")):
        monkeypatch.setattr(served.host, "accept", raising(error))
        said = served.hear("@host/command/mini", CHOSEN.encode())
        assert 'event="cannot let in" node=mini why="no way"' in said
    monkeypatch.setattr(served.host, "accept", lambda name, hashed, now: tried.append(hashed))
    served.hear("@host/command/mini", b"\xff" * 5000)
    assert tried == ["\ufffd" * 1024]


# ---- Bridges -------------------------------------------------------------------------------

ONLINE, GONE = b'{"status": "online"}', b'{"status": "offline"}'


def test_what_a_bridge_says_is_logged_and_asks_for_all_states(served: Served) -> None:
    assert 'event="bridge is there" site=@lab' in served.hear("all/@lab", b"1")
    assert served.wire.subscriptions[2:] == [("hive/meta/+/state", 0)]
    assert 'event="bridge is cut" site=@lab' in served.hear("all/@lab", b"0")


@pytest.mark.parametrize(
    ("events", "put_right"),
    [
        (["gone", "there", "echo"], ["state"]),  # it had left here, and there nobody knew
        (["gone", "there", *9 * ["wait"], "echo"], ["state"]),
        (["gone", "there", *10 * ["wait"], "echo"], []),  # no echo any more: it has begun there
        (["gone", "there", "cut", "echo"], []),
        (["gone", "earlier", "echo"], []),  # the bridge was there before us
        (["gone", "echo"], []),
        (["there", "echo"], []),
        (["there", "gone", "echo", "echo"], ["state"]),
    ],
    ids=" ".join,
)
def test_last_words_are_said_again_where_a_bridge_brings_back_earlier_ones(
    served: Served, events: list[str], put_right: list[str]
) -> None:
    for event in events:
        match event:
            case "gone":
                served.hear("meta/alpha/state", GONE, retained=True)
            case "echo":
                served.hear("meta/alpha/state", ONLINE)
            case "there":
                served.hear("all/@lab", b"1")
            case "earlier":
                served.hear("all/@lab", b"1", retained=True)
            case "cut":
                served.hear("all/@lab", b"0")
            case "wait":
                served.clock.skipped += 1.0
    sent = [hive.OutgoingMessage(f"hive/meta/alpha/{one}", GONE, retain=True) for one in put_right]
    assert served.wire.sent == sent


def test_of_a_node_that_was_forgotten_its_roster_goes_too_and_strangers_are_theirs(
    served: Served,
) -> None:
    served.hear("all/@lab", b"1")
    served.hear("meta/alpha/state", b"", retained=True)
    served.hear("meta/alpha/state", ONLINE)
    topics = [f"hive/meta/alpha/{one}" for one in ("state", "roster")]
    assert served.wire.sent == [hive.OutgoingMessage(one, b"", retain=True) for one in topics]
    served.hear("meta/beta/state", GONE)  # of the other site
    served.hear("meta/beta/state", ONLINE)
    assert len(served.wire.sent) == 2
    served.hear("meta/alpha/state", GONE)
    served.host.expel("alpha")
    served.hear("meta/alpha/state", b"")  # what is known already is kept up to date
    served.hear("meta/alpha/state", b"{")
    served.hear("meta/alpha/state", ONLINE)
    assert served.wire.sent[2:] == [hive.OutgoingMessage(topics[0], b"{", retain=True)]


@pytest.mark.parametrize(
    ("said", "word"), [([b"1"], "1"), ([b"1", b"0!"], "0"), ([], ""), ([b"\xff"], "\ufffd")]
)
@pytest.mark.parametrize("ends", ["complete", "lost", "never"])
def test_a_bridges_last_word_is_asked_of_the_broker(
    bare: hive.Host, monkeypatch: pytest.MonkeyPatch, said: list[bytes], word: str, ends: str
) -> None:
    closed, asked = list[float](), list[object]()

    def query(
        loop: hive.Loop,
        mqtt: object,
        filters: object,
        mark: str,
        found: Any,
        complete: Any,
        lost: Any,
    ) -> Any:
        asked.extend((mqtt, filters))
        assert mark.startswith("hive/@host/response/@host/")

        for one in said:
            found(hive.IncomingMessage("x", one, True, None, lambda: None))
        {"complete": complete, "lost": lambda: lost("gone"), "never": lambda: None}[ends]()
        close = lambda then, within: closed.append(within)  # noqa: E731
        return SimpleNamespace(client=SimpleNamespace(close=close))

    monkeypatch.setattr(hive, "PROBE_TIMEOUT", 0.02)
    monkeypatch.setattr(hive, "RetainedQuery", query)
    assert hive.bridge_word(bare, "@lab") == word
    assert asked == [bare.login(hive.HOST_USER), ["hive/all/@lab"]] and closed == [0.0]


def test_a_loop_goes_on_until_it_is_done_or_time_is_over() -> None:
    loop = hive.Loop(hive.Log("error"))
    turns = list[int]()
    loop.after(0, lambda: turns.append(1))
    hive.step_until(loop, 5.0, lambda: turns)
    assert turns == [1] and not [one for one in loop._timers if one.call]
    began = time.monotonic()
    hive.step_until(loop, 0.02, lambda: False)
    assert 0.02 <= time.monotonic() - began < 5
    loop.close()


# ---- Ending a process ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("looks", "sent", "slept"),
    [
        (0, [], 0),
        (1, ["TERM"], 0),
        (3, ["TERM"], 0.04),
        (27, ["TERM", "TERM"], 0.5),
        (10_000, ["TERM"] * 21 + ["KILL"], 11.0),  # which nothing outlives
    ],
)
def test_a_process_is_asked_twice_a_second_and_killed_in_the_end(
    monkeypatch: pytest.MonkeyPatch, looks: int, sent: list[str], slept: float
) -> None:
    clock, told, left = 0.0, list[str](), looks

    def is_locked(file: Path) -> bool:
        nonlocal left
        left -= 1
        return left >= 0

    def sleep(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    def kill(pid: int, number: int) -> None:
        told.append(signal.Signals(number).name.removeprefix("SIG"))
        if len(told) % 2:
            raise ProcessLookupError

    monkeypatch.setattr(hive, "is_locked", is_locked)
    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    monkeypatch.setattr(time, "sleep", sleep)
    hive.end_process(5, Path("lock"))
    assert (told, round(clock, 2)) == (sent, slept)


# ---- Who starts it -------------------------------------------------------------------------

HIVE = ["/usr/bin/python3", "/x/hive.py", "host", "--foreground"]
Words = Callable[..., list[tuple[str, ...]]]


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Words:
    """What is said to systemd and launchd, of which these are not done."""
    monkeypatch.setenv("HOME", str(tmp_path))

    def say(platform: str, *refused: str) -> list[tuple[str, ...]]:
        said: list[tuple[str, ...]] = []

        def succeeds(*command: str) -> bool:
            said.append(command)
            return not any(word in command for word in refused)

        monkeypatch.setattr(hive, "succeeds", succeeds)
        monkeypatch.setattr(sys, "platform", platform)
        return said

    return say


def test_systemd_takes_it_over(words: Words, tmp_path: Path) -> None:
    said, host = words("linux"), hive.Host(tmp_path)
    how = "systemd keeps it running; loginctl enable-linger lets it outlive a logout"
    assert hive.start_supervised(host, HIVE) == how
    manager = ("systemctl", "--user")
    assert said == [
        (*manager, "show-environment"),
        *((*manager, *step) for step in (("daemon-reload",), ("enable", "hive-host"))),
        (*manager, "restart", "hive-host"),
    ]
    unit = tmp_path / ".config" / "systemd" / "user" / "hive-host.service"
    assert unit.read_text() == hive.systemd_unit(HIVE)
    words("linux", "restart")
    with pytest.raises(hive.HiveError, match=f"systemd does not start {unit}; see: systemctl"):
        hive.start_supervised(host, HIVE)


def test_launchd_takes_it_over_or_says_where_to_look(words: Words, tmp_path: Path) -> None:
    host = hive.Host(tmp_path)
    words("darwin", "systemctl", "bootstrap")
    with pytest.raises(hive.HiveError, match=f"launchd does not start .*; see {host.log}"):
        hive.start_supervised(host, HIVE)
    words("darwin", "systemctl", "bootout")  # as where it did not run
    assert hive.start_supervised(host, HIVE) == "launchd keeps it running"
    agent = tmp_path / "Library" / "LaunchAgents" / "ai.hive.host.plist"
    assert agent.read_text() == hive.launchd_agent(HIVE, host.log)
    assert f"<string>{host.log}</string>" in agent.read_text()


def test_without_either_it_runs_in_the_background(
    words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = list[object]()
    words("linux", "systemctl")
    monkeypatch.setattr(hive, "start_detached", lambda *how: started.append(how))
    how = "in the background, as no systemd or launchd is here; after a reboot say this again"
    host = hive.Host(tmp_path)
    assert hive.start_supervised(host, HIVE) == how and started == [(HIVE, host.log)]


@pytest.mark.parametrize(
    ("platform", "refused", "keeper"),
    [
        ("linux", (), "is kept running by systemd"),
        ("linux", ("is-enabled",), hive.NOT_KEPT),
        ("linux", ("systemctl",), "runs in the background; after a reboot say hive host"),
        ("darwin", ("systemctl",), "is kept running by launchd"),
        ("darwin", ("systemctl", "print"), hive.NOT_KEPT),
    ],
)
def test_who_keeps_it_running_is_said(
    words: Words, platform: str, refused: tuple[str, ...], keeper: str
) -> None:
    said = words(platform, *refused)
    assert hive.supervisor() == keeper
    systemd = [("systemctl", "--user", "is-enabled", "--quiet", "hive-host")]
    launchd = [("launchctl", "print", f"gui/{os.getuid()}/ai.hive.host")]
    asked = launchd if platform == "darwin" else [] if "systemctl" in refused else systemd
    assert said == [("systemctl", "--user", "show-environment"), *asked]


def test_a_state_directory_of_ones_own_is_in_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert "Environment" not in hive.systemd_unit(HIVE)
    monkeypatch.setenv("XDG_STATE_HOME", "/a b/100%")
    lines = hive.systemd_unit(['/q"b\\s', "$x"]).splitlines()
    assert 'Environment="XDG_STATE_HOME=/a b/100%%"' in lines
    assert 'ExecStart="/q\\"b\\\\s" "$$x"' in lines


def test_in_the_background_it_has_nothing_of_this_terminal(tmp_path: Path) -> None:
    log = tmp_path / "host.log"
    wait = f"while [ ! -e {tmp_path}/go ]; do sleep 0.01; done"
    command = ["sh", "-c", f"pwd; cat; echo to stderr >&2; echo $$; {wait}"]

    def said(before: str) -> list[str]:
        log.write_text(before)
        hive.start_detached(command, log)
        ends = re.compile(r"to stderr\n\d+\n$")
        eventually("it is all there", lambda: ends.search(log.read_text()))
        return log.read_text().splitlines()

    before, where, error, pid = said("before\n")
    assert (before, where, error) == ("before", "/", "to stderr")
    assert os.getsid(int(pid)) == int(pid)
    (tmp_path / "go").touch()
    full = "x" * (1024 * 1024 - 1) + "\n"
    assert said(full)[0] == full.strip()
    assert said(f"x{full}")[0] == "/"
    log.unlink()
    hive.start_detached(["true"], log)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
