"""What carrying a hive, joining it and serving an agent's program do and say, decision by decision.

The machine beside them is a script here; with a real Mosquitto it is in test_hosting, test_join
and test_bridge, with real programs in test_vendors.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import Commands, Pipe, Scripted

import hive
from hive import BrokerError, HiveError, HostSettings, UsageError

Patch = pytest.MonkeyPatch
NOW = 1771143500 + 1000


@pytest.fixture
def alpha(commands: Commands) -> Commands:
    return commands


def closed_loops(monkeypatch: Patch) -> list[str]:
    """A word for each loop that is closed."""
    closed: list[str] = []
    close = hive.Loop.close

    def closes(loop: hive.Loop) -> None:
        closed.append("closed")
        close(loop)

    monkeypatch.setattr(hive.Loop, "close", closes)
    return closed


@pytest.fixture
def config(commands: Commands) -> hive.Config:
    return hive.load_config(None, {"node.id": "alpha", "node.state_dir": commands.home / "state"})


class Carried:
    """A hive that this machine carries, and what was done to it."""

    def __init__(self, folder: Path, before: HostSettings | None = None) -> None:
        self.folder, self.log = folder, folder / "log"
        self.authority = folder / "ca.pem"
        self.before, self.pid, self.serves = before, 5 if before else None, 6 if before else None
        self.known: dict[str, str] = {"beta": "hash", hive.HOST_USER: "h"}
        self.hub: tuple[str, Any] = ("", None)
        self.sites_here: list[str] = []
        self.done: list[Any] = []
        self.changes = [False, False]
        self.reloads = True

    def settings(self) -> HostSettings | None:
        return self.before

    def needed_settings(self) -> HostSettings:
        return self.before or HostSettings("127.0.0.1", 8883, (), "hive")

    def broker_pid(self) -> int | None:
        return self.pid

    def service_pid(self) -> int | None:
        return self.serves

    def prepare(self, settings: HostSettings, node: str, now: float) -> bool:
        self.done.append(("prepare", settings, node))
        return self.changes.pop(0)

    def login(self, user: str) -> hive.MqttConfig:
        return hive.MqttConfig(host="127.0.0.1", port=8883, username=user)

    def members(self) -> dict[str, str]:
        return self.known

    def sites(self) -> list[str]:
        return self.sites_here

    def bridge(self) -> tuple[str, Any]:
        return self.hub

    def set_bridge(self, said: Mapping[str, object], authority: str) -> None:
        self.done.append(("bridge", dict(said), authority))

    def password_file(self, user: str) -> Path:
        return self.folder / f"{user}.password"

    def shut_out(self, name: str) -> bool:
        self.done.append(("shut out", name))
        return name in self.known

    def reload(self) -> bool:
        return self.reloads

    def expel(self, name: str) -> None:
        self.done.append(("expel", name))


@pytest.fixture
def carried(alpha: Commands, monkeypatch: Patch) -> Carried:
    folder = alpha.home / "state" / "host"
    folder.mkdir(parents=True)
    host = Carried(folder)
    monkeypatch.setattr(hive, "Host", lambda state_dir: host)
    return host


# -- where it is reached --


def asked(**said: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"listen": None, "name": None} | said)


BEFORE = HostSettings("10.0.0.1", 7000, ("old.lan",), "hive")


@pytest.mark.parametrize(
    ("before", "said", "port", "found"),
    [
        (None, {"listen": "10.0.0.2"}, None, HostSettings("10.0.0.2", 8883, (), "hive")),
        (None, {"listen": "10.0.0.2"}, 7001, HostSettings("10.0.0.2", 7001, (), "hive")),
        (None, {"listen": "a.lan"}, None, HostSettings("a.lan", 8883, ("a.lan",), "hive")),
        (BEFORE, {}, None, BEFORE),
        (BEFORE, {}, 7001, BEFORE.replace(port=7001)),
        (BEFORE, {"name": ["a"]}, None, BEFORE.replace(names=("a",))),
        (BEFORE, {"listen": "10.0.0.2"}, None, HostSettings("10.0.0.2", 7000, (), "hive")),
        (
            None,
            {"listen": "0.0.0.0", "name": ["a", "b"]},
            None,
            HostSettings("0.0.0.0", 8883, ("a", "b"), "hive"),
        ),
    ],
)
def test_what_is_said_now_goes_before_what_was_said_then(
    config: hive.Config,
    before: HostSettings | None,
    said: Any,
    port: int | None,
    found: HostSettings,
) -> None:
    assert hive.host_settings(before, config, asked(**said), port) == found


@pytest.mark.parametrize(
    ("before", "said", "why"),
    [
        (None, {}, "host: say the address where the other machines reach this one: --listen "),
        (
            BEFORE.replace(prefix="other"),
            {},
            "host: this node carries a hive whose prefix is other already",
        ),
        (None, {"listen": "0.0.0.0"}, "--listen 0.0.0.0: how do peers reach it?  say --name too"),
    ],
)
def test_where_it_is_not_known_how_peers_reach_it_that_is_asked(
    config: hive.Config, before: HostSettings | None, said: Any, why: str
) -> None:
    with pytest.raises(UsageError) as raised:
        hive.host_settings(before, config, asked(**said), None)
    assert str(raised.value).startswith(why)


@pytest.mark.parametrize(
    ("listen", "number", "said"),
    [
        (
            "10.0.0.1",
            errno.EADDRINUSE,
            "10.0.0.1:7: x; another program listens there; take another",
        ),
        ("10.0.0.1", errno.EADDRNOTAVAIL, "10.0.0.1:7: x; this machine has no such address; see"),
        ("0.0.0.0", errno.EACCES, "*:7: x; ports below 1024 are root's; take another --port"),
        ("10.0.0.1", errno.ENOMEM, "10.0.0.1:7: x"),
    ],
)
def test_why_nothing_can_listen_there_is_one_line(
    monkeypatch: Patch, listen: str, number: int, said: str
) -> None:
    def bind(self: HostSettings, port: int) -> None:
        assert port == 7
        raise OSError(number, "x")

    monkeypatch.setattr(HostSettings, "bind", bind)
    with pytest.raises(HiveError) as raised:
        hive.check_address(HostSettings(listen, 7, ("n",), "hive"))
    assert str(raised.value).startswith(said)
    assert (str(raised.value) == said) == (number in (errno.ENOMEM, errno.EACCES))


# -- host --


@pytest.fixture
def steps(carried: Any, monkeypatch: Patch) -> list[Any]:
    """What `hive host` does, in this order."""
    done: list[Any] = carried.done

    def note(name: str, result: Any = None) -> Callable[..., Any]:
        def do(*given: Any) -> Any:
            done.append((name, *(one for one in given if isinstance(one, (bool, str, Path)))))
            return result

        return do

    for name, result in {
        **dict.fromkeys(("need_program", "check_address", "start_service", "move_over")),
        **dict.fromkeys(("bridge_over", "await_bridge")),
        **{"serve_hive": 0, "show_tests": 0},
    }.items():
        monkeypatch.setattr(hive, name, note(name, result))
    monkeypatch.setattr(sys, "argv", ["hive"])
    return done


def names_of(steps: list[Any]) -> list[str]:
    return [step[0] for step in steps]


def test_a_hive_is_carried_step_by_step(alpha: Commands, carried: Any, steps: list[Any]) -> None:
    carried.changes = [True]
    code, out, _ = alpha.run("host --listen 10.0.0.1 --port 7001")
    file = alpha.home / ".config" / "hive" / "hive.toml"
    assert code == 0 and " hive daemon" in out.splitlines()[0] and "invite NAME" in out
    assert names_of(steps) == [
        *("need_program", "check_address", "prepare"),
        *("start_service", "move_over", "show_tests"),
    ]
    assert steps[2][1:] == (HostSettings("10.0.0.1", 7001, (), "hive"), "alpha")
    assert steps[3] == ("start_service", file, True) and steps[5] == ("show_tests", file)


def test_a_hive_that_runs_where_it_is_to_needs_no_free_address(
    alpha: Commands, carried: Any, steps: list[Any], monkeypatch: Patch
) -> None:
    carried.before, carried.pid = BEFORE, 5
    for line, pid, checked in (("", 5, False), ("--port 1", 5, True), ("", None, True)):
        carried.pid, carried.changes = pid, [False, False]
        steps.clear()
        alpha.run(f"host {line}")
        assert ("check_address" in names_of(steps)) == checked
        assert steps[-3][-1] is False
    monkeypatch.setattr(hive, "show_tests", lambda file: 1)
    carried.changes = [False, False]
    assert alpha.run("host")[0] == 1


def test_a_bridge_is_made_between_and_waited_for(
    alpha: Commands, carried: Any, steps: list[Any]
) -> None:
    carried.changes = [False, True]
    alpha.run("host --listen 10.0.0.1 --bridge hive1.x")
    assert names_of(steps)[2:] == [
        *("prepare", "bridge_over", "prepare", "start_service"),
        *("move_over", "await_bridge", "show_tests"),
    ]
    assert steps[3][1] == "hive1.x" and steps[5][-1] is True


def test_in_the_foreground_it_only_serves(alpha: Commands, carried: Any, steps: list[Any]) -> None:
    code, out, _ = alpha.run("host --listen 10.0.0.1 --foreground")
    assert (code, out) == (0, "")
    assert names_of(steps)[2:] == ["prepare", "serve_hive"]


def test_who_has_a_broker_already_hosts_none(
    alpha: Commands, carried: Any, steps: list[Any]
) -> None:
    why = "hive: host: it is itself the broker; say --listen, and --name\n"
    assert alpha.run("--host x host --listen 10.0.0.1") == (2, "", why)
    file = alpha.home / "hive.toml"
    file.write_text('[mqtt]\nhost = "broker.lan"\n')
    code, _, err = alpha.run("host --listen 10.0.0.1 --config hive.toml")
    assert code == 2 and not steps
    assert err == (
        f"hive: {file}: this node's broker is broker.lan:1883; take [mqtt] out,"
        " or name another --config, to host one\n"
    )
    code, _, err = alpha.run("host --listen 10.0.0.1 --config new.toml --log-level debug")
    assert (code, err) == (0, "") and steps[-1] == ("show_tests", alpha.home / "new.toml")


def test_the_service_ends_with_what_it_opened(
    alpha: Commands, config: hive.Config, carried: Any, monkeypatch: Patch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(hive, "time", time)
    loops = closed_loops(monkeypatch)

    class Service:
        def __init__(self, *given: Any) -> None:
            done.append("made")

        def start(self) -> None:
            done.append("start")

        def close(self) -> None:
            done.append("close")

    monkeypatch.setattr(hive, "HostService", Service)
    monkeypatch.setattr(hive.Loop, "run", lambda self: done.append("run"))
    assert hive.serve_hive(carried, config) == 0
    assert done == ["made", "start", "run", "close"] and loops == ["closed"]


@pytest.mark.parametrize(
    ("serves", "changed", "how", "told"),
    [
        (None, True, "in the background", False),
        (6, False, "runs already", False),
        (6, True, "runs already, and reads its configuration anew", True),
    ],
)
def test_what_runs_is_told_of_what_changed(
    alpha: Commands,
    config: hive.Config,
    carried: Any,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
    serves: int | None,
    changed: bool,
    how: str,
    told: bool,
) -> None:
    carried.serves = serves
    kills: list[Any] = []
    started: list[Any] = []
    fails = [BrokerError("broker x: no"), BrokerError("broker x: no")]

    class Join:
        def __init__(self, mqtt: hive.MqttConfig, prefix: str) -> None:
            assert (mqtt.username, prefix) == ("alpha", "hive")

        def ask(self, payload: bytes) -> None:
            assert payload == b""
            if fails:
                raise fails.pop()

    def start(host: Any, command: list[str]) -> str:
        started.append(command)
        return "in the background"

    monkeypatch.setattr("os.kill", lambda *given: kills.append(given))
    monkeypatch.setattr(hive, "start_supervised", start)
    monkeypatch.setattr(hive, "JoinRequest", Join)
    file = alpha.home / "my.toml"
    hive.start_service(carried, file, config, changed)
    assert capsys.readouterr().out == f"Mosquitto listens at 127.0.0.1:8883: {how}\n"
    assert kills == ([(6, signal.SIGHUP)] if told else [])
    whose = ["--config", str(file), "--node", "alpha", "--prefix", "hive"]
    line = [*hive.own_program(), "host", "--foreground", *whose]
    assert started == ([] if serves else [line])
    assert alpha.now[0] == pytest.approx(1000.1)  # it looks often
    fails.extend([BrokerError("broker x: no")] * 1000)
    with pytest.raises(BrokerError) as raised:
        hive.start_service(carried, file, config, False)
    assert str(raised.value) == f"broker x: no; see also {carried.log}"
    assert 15 <= alpha.now[0] - 1000 < 17


@pytest.mark.parametrize(("answer", "taken"), [([True], True), ([False], False), ([], False)])
def test_whether_a_broker_lets_us_in_is_tried(
    monkeypatch: Patch, answer: list[bool], taken: bool
) -> None:
    given: list[Any] = []

    def probe(loop: Any, mqtt: Any, done: Callable[[bool], None]) -> None:
        for one in answer:
            done(one)

    monkeypatch.setattr(hive, "ConnectionProbe", probe)
    monkeypatch.setattr(
        hive, "step_until", lambda loop, within, done: given.append((within, done()))
    )
    loops = closed_loops(monkeypatch)
    assert hive.lets_in(hive.MqttConfig()) is taken
    assert loops == ["closed"]
    assert given == [(6.0, answer)]


@pytest.mark.parametrize(
    ("good", "lets", "waits"), [(True, 3, 0.15), (True, 1000, None), (False, 1000, 0.0)]
)
def test_an_invitation_is_told_once_the_broker_knows_it_or_it_was_used(
    alpha: Commands,
    carried: Any,
    monkeypatch: Patch,
    good: bool,
    lets: int,
    waits: float | None,
) -> None:
    left = [False] * lets
    monkeypatch.setattr(
        hive, "is_password_of", lambda kept, said: (kept, said) == ("hash", "pw") and good
    )
    monkeypatch.setattr(hive, "lets_in", lambda mqtt: not left or left.pop())
    mqtt = hive.MqttConfig(host="127.0.0.1", port=8883)
    said: Any = SimpleNamespace(name="beta", password="pw", settings=lambda *given: mqtt)
    if waits is None:
        with pytest.raises(BrokerError) as raised:
            hive.await_invitation(carried, said)
        assert str(raised.value) == "127.0.0.1:8883 does not know it yet; say this again"
        assert 15 <= alpha.now[0] - 1000 < 15.2
    else:
        hive.await_invitation(carried, said)
        assert alpha.now[0] - 1000 == pytest.approx(waits)


@pytest.mark.parametrize("locked", [False, True])
def test_this_machines_node_moves_over_once(
    alpha: Commands,
    config: hive.Config,
    carried: Any,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
    locked: bool,
) -> None:
    done: list[str] = []
    monkeypatch.setattr(hive, "empty_embedded", lambda *given: done.append("emptied"))
    monkeypatch.setattr(hive, "restart_daemon", lambda *given: done.append("restarted"))
    monkeypatch.setattr(hive, "is_locked", lambda file: locked and file.name == "lock")
    file = alpha.home / "hive.toml"
    hive.move_over(carried, file, config, BEFORE)
    said = capsys.readouterr().out
    assert said == f"wrote {file}: node alpha, broker {BEFORE.own}:7000\n"
    assert done == ["emptied", *["restarted"] * locked]
    text = file.read_text()
    for one in (
        *('id = "alpha"', 'topic_prefix = "hive"', 'username = "alpha"', "tls = true"),
        *(f'ca_file = "{carried.authority}"', f'password_file = "{carried.folder}/alpha.password"'),
    ):
        assert one in text, one
    assert file.stat().st_mode & 0o777 == 0o600
    hive.move_over(carried, file, config, BEFORE)
    assert capsys.readouterr().out == "" and len(done) == 1 + locked
    hive.move_over(carried, file, config, BEFORE.replace(port=7001))
    assert "port = 7001" in file.read_text()


@pytest.mark.parametrize(
    ("platform", "works", "note", "calls"),
    [
        ("linux", ("is-active", "try-restart"), "restarted", 2),
        ("linux", ("is-active",), "restart it: it is still where the others were before", 2),
        ("linux", ("launchctl",), "restart it: it is still where the others were before", 1),
        ("darwin", ("launchctl",), "restarted", 2),
        ("darwin", (), "restart it: it is still where the others were before", 2),
    ],
)
def test_a_daemon_that_runs_is_restarted_by_who_started_it(
    config: hive.Config,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
    platform: str,
    works: tuple[str, ...],
    note: str,
    calls: int,
) -> None:
    called: list[tuple[str, ...]] = []

    def succeeds(*line: str) -> bool:
        called.append(line)
        return bool({*line} & {*works})

    monkeypatch.setattr(hive, "succeeds", succeeds)
    monkeypatch.setattr(sys, "platform", platform)
    hive.restart_daemon(config)
    assert capsys.readouterr().out == f"the daemon of alpha runs; {note}\n"
    assert len(called) == calls
    assert called[0] == ("systemctl", "--user", "is-active", "--quiet", "hive-daemon")
    if "try-restart" in works:
        assert called[1] == ("systemctl", "--user", "try-restart", "hive-daemon")
    if platform == "darwin":
        job = f"gui/{os.getuid()}/ai.hive.daemon"
        assert called[1] == ("launchctl", "kickstart", "-k", job)


def test_what_waits_at_the_embedded_broker_is_counted(alpha: Commands, config: hive.Config) -> None:
    assert hive.waiting_at_embedded(config) == 0
    file = hive.broker_home(config.broker) / "broker.sqlite3"
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE session_states (n INTEGER, client TEXT)")
        database.execute("CREATE TABLE queued_messages (session INTEGER)")
        database.execute(
            "INSERT INTO session_states VALUES (1, 'other'), (2, ?)", (hive.session_id(config),)
        )
        database.execute("INSERT INTO queued_messages VALUES (1), (2), (2)")
        database.commit()
    assert hive.waiting_at_embedded(config) == 2
    file.write_bytes(b"no database" * 1000)
    assert hive.waiting_at_embedded(config) == 0


class Fetching:
    """The daemon that fetches what waits there."""

    lines: list[Any]
    hangs = False

    def __init__(self, line: list[str], **how: Any) -> None:
        Fetching.lines.append((line, how))

    def terminate(self) -> None:
        Fetching.lines.append("terminate")

    def wait(self, seconds: float) -> None:
        Fetching.lines.append(seconds)
        if self.hangs:
            raise subprocess.TimeoutExpired("x", seconds)

    def kill(self) -> None:
        Fetching.lines.append("kill")


@pytest.mark.parametrize("hangs", [False, True])
def test_what_waits_at_the_embedded_broker_is_fetched_before(
    alpha: Commands,
    config: hive.Config,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
    hangs: bool,
) -> None:
    left = [3, 3, 1, 0]
    monkeypatch.setattr(hive, "waiting_at_embedded", lambda config: left.pop(0) if left else 0)
    monkeypatch.setattr(subprocess, "Popen", Fetching)
    monkeypatch.setattr(Fetching, "lines", [], raising=False)
    monkeypatch.setattr(Fetching, "hangs", hangs)
    monkeypatch.setattr(hive, "is_locked", lambda file: False)
    file = alpha.home / "my.toml"
    file.touch()
    hive.empty_embedded(config, file)
    line = [*hive.own_program(), "daemon"]
    whose = ["--node", "alpha", "--prefix", "hive"]
    nothing = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    assert Fetching.lines == [
        ([*line, "--config", str(file), *whose], nothing),
        *("terminate", 10.0),
        *["kill"] * hangs,
    ]
    assert alpha.now[0] == pytest.approx(1000.1)
    said = capsys.readouterr().out
    assert said == "fetched 3 messages that waited at the embedded broker\n"
    file.unlink()
    left[:] = [2] * 5000
    Fetching.lines.clear()
    before = alpha.now[0]
    with pytest.raises(HiveError, match=r"^2 messages still wait at the embedded broker; start"):
        hive.empty_embedded(config, file)
    assert 30 <= alpha.now[0] - before < 30.2 and Fetching.lines[0][0] == [*line, *whose]
    Fetching.lines.clear()
    monkeypatch.setattr(hive, "is_locked", lambda file: True)
    hive.empty_embedded(config, file)  # a daemon that runs has it already
    left[:] = [0]
    monkeypatch.setattr(hive, "is_locked", lambda file: False)
    hive.empty_embedded(config, file)
    assert Fetching.lines == []


# -- bridges --


def invited(name: str = "@office", **more: Any) -> Any:
    said = {"name": name, "prefix": "hive", "hosts": ("h1", "h2"), "port": 7000} | more
    return SimpleNamespace(authority=lambda: "PEM", **said)


@pytest.fixture
def parsed(monkeypatch: Patch) -> dict[str, Any]:
    """Invitations by their lines."""
    lines: dict[str, Any] = {}
    monkeypatch.setattr(hive.Invitation, "parse", lambda line: lines[line])
    return lines


def test_a_bridge_is_an_account_at_the_other_site(
    config: hive.Config, carried: Any, parsed: dict[str, Any], monkeypatch: Patch
) -> None:
    done: list[Any] = []
    there = hive.MqttConfig(host="h2", username="@office")
    monkeypatch.setattr(hive, "first_reachable", lambda hosts, port: hosts[1])

    @contextlib.contextmanager
    def settings(invitation: Any, host: str) -> Iterator[hive.MqttConfig]:
        done.append(host)
        yield there

    def secret(mqtt: Any, prefix: str, pending: Path) -> str:
        done.append((mqtt, prefix))
        pending.write_text("x")
        return "pw"

    monkeypatch.setattr(hive, "invited_settings", settings)
    monkeypatch.setattr(hive, "refuse_namesakes", lambda *given: done.append(given[2]))
    monkeypatch.setattr(hive, "new_secret_at", secret)
    parsed["line"] = invited()
    hive.bridge_over(carried, config, "line")
    account = {"name": "@office", "host": "h2", "port": 7000, "password": "pw"}
    assert done == ["h2", there, (there, "hive")]
    assert carried.done == [("bridge", account, "PEM")] and not [*carried.folder.iterdir()]
    hive.bridge_over(carried, config, "none")
    assert carried.done[1:] == [("bridge", {}, "")]
    monkeypatch.setattr(hive, "new_secret_at", lambda *given: "pw")  # another was quicker
    hive.bridge_over(carried, config, "line")
    assert carried.done[2] == carried.done[0]


@pytest.mark.parametrize(
    ("invitation", "sites", "why"),
    [
        (invited("beta"), [], "this line makes beta a node, and bridges no site: hive join -"),
        (invited(), ["@lab"], "host: @lab is bridged to here, so invite the other one too: a star"),
        (invited(prefix="x"), [], "host: the prefix of the hive there is x, and not ours"),
    ],
)
def test_what_makes_no_bridge_is_refused(
    config: hive.Config,
    carried: Any,
    parsed: dict[str, Any],
    invitation: Any,
    sites: list[str],
    why: str,
) -> None:
    parsed["line"], carried.sites_here = invitation, sites
    with pytest.raises(UsageError) as raised:
        hive.bridge_over(carried, config, "line")
    assert str(raised.value) == why and not carried.done


def test_two_sites_have_no_node_in_common(
    alpha: Commands, config: hive.Config, carried: Any
) -> None:
    visitor = alpha.bypass(states={"states": {"x": {}}})
    there = hive.MqttConfig(host="h2", username="@office")
    hive.refuse_namesakes(carried, config, there)
    assert visitor.closed == 1 and alpha.direct == [10.0]
    assert (alpha.visitors[0].mqtt, alpha.visitors[0].node.id) == (there, "@office")
    visitor = alpha.bypass(states={"states": {"x": {}, "beta": {}}})
    with pytest.raises(HiveError) as raised:
        hive.refuse_namesakes(carried, config, there)
    why = "names are unique in a hive: let it join again under another one"
    assert str(raised.value) == f"beta: a node of here, and one of there; {why}"


def test_a_bridge_is_waited_for_a_quarter_of_a_minute(
    alpha: Commands, carried: Any, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["", "0", "1"]
    monkeypatch.setattr(hive, "bridge_word", lambda host, name: words.pop(0) if words else "0")
    hive.await_bridge(carried)
    assert capsys.readouterr().out == "no bridge to another site\n" and len(words) == 3
    carried.hub = ("@office", hive.MqttConfig(host="hub", port=7))
    hive.await_bridge(carried)
    assert capsys.readouterr().out == "bridge to hub:7: there, as @office\n"
    assert alpha.now[0] == pytest.approx(1000.4)
    with pytest.raises(BrokerError) as raised:
        hive.await_bridge(carried)
    assert str(raised.value) == f"no bridge to hub:7 yet; see also {carried.log}"
    assert 15 <= alpha.now[0] - 1000.4 < 15.5


# -- invite, join, expel --


@pytest.fixture
def inviting(carried: Any, monkeypatch: Patch) -> list[Any]:
    """Who is invited."""
    names: list[Any] = []

    def make(host: Any, name: str, now: float) -> Any:
        names.append((name, now))
        return SimpleNamespace(line=lambda: f"line of {name}", until=NOW)

    monkeypatch.setattr(hive, "make_invitation", make)
    monkeypatch.setattr(hive, "await_invitation", lambda *given: names.append("waited"))
    return names


def test_an_invitation_says_what_to_do_with_it(alpha: Commands, inviting: list[Any]) -> None:
    code, out, err = alpha.run("invite mini")
    until = time.strftime("%H:%M", time.localtime(NOW))
    assert (code, out) == (0, "line of mini\n")
    assert err.splitlines() == [
        "This line is a secret: whoever has it first joins as mini. It is good once, until",
        f"{until}. On that machine: python3 hive join - (and paste it), then: python3 hive daemon",
    ]
    assert inviting == [("mini", float(NOW)), "waited"]
    err = alpha.run("invite @office")[2]
    assert err.endswith(f"{until}. On that machine: hive host --bridge - (and paste it)\n")


def test_sites_are_invited_by_their_hub_alone(
    alpha: Commands, carried: Any, inviting: list[Any], monkeypatch: Patch
) -> None:
    carried.hub = ("@here", hive.MqttConfig(host="hub", port=7))
    monkeypatch.setattr(hive, "names_that_are_known", lambda config: ["mini", "beta"])
    why = "hive: invite: this site is bridged to hub:7: sites are invited there, as a star\n"
    assert alpha.run("invite @office") == (2, "", why)
    why = "hive: mini is in this hive already, at another site; another name\n"
    assert alpha.run("invite mini") == (1, "", why)
    assert not inviting
    assert alpha.run("invite beta")[0] == 0  # who was here is asked elsewhere
    assert alpha.run("invite new")[0] == 0
    carried.hub, carried.sites_here = ("", None), ["@office"]
    assert alpha.run("invite mini") == (1, "", why)
    carried.sites_here = []
    assert alpha.run("invite mini")[0] == 0  # nobody else knows that name


@pytest.fixture
def joining(alpha: Commands, parsed: dict[str, Any], monkeypatch: Patch) -> list[Any]:
    """What is done to join."""
    done: list[Any] = []

    @contextlib.contextmanager
    def settings(invitation: Any, host: str) -> Iterator[str]:
        yield f"as {invitation.name} at {host}"

    def secret(mqtt: Any, prefix: str, pending: Path) -> str:
        done.append((mqtt, prefix, pending.name))
        pending.write_text("pw")
        return "pw"

    monkeypatch.setattr(hive, "load_paho", lambda: None)
    monkeypatch.setattr(hive, "first_reachable", lambda hosts, port: hosts[-1])
    monkeypatch.setattr(hive, "invited_settings", settings)
    monkeypatch.setattr(hive, "new_secret_at", secret)
    monkeypatch.setattr(hive, "joined_files", lambda said, host, file, pw: {file: f"{host} {pw}\n"})
    monkeypatch.setattr(hive, "show_tests", lambda file: done.append(file) or 1)  # type: ignore[func-returns-value]
    monkeypatch.setattr(sys, "argv", ["hive"])
    parsed["line"] = invited("mini")
    return done


def test_one_line_makes_a_machine_a_node(alpha: Commands, joining: list[Any]) -> None:
    code, out, _ = alpha.run("join --config my.toml line")
    file = alpha.home / "my.toml"
    assert code == 1  # as the tests say
    assert out.splitlines()[0] == f"wrote {file}: node mini, broker h2:7000"
    assert out.splitlines()[1].endswith(f"daemon --config {file}")
    assert joining == [("as mini at h2", "hive", "my.toml.joining"), file]
    assert file.read_text() == "h2 pw\n" and [*alpha.home.glob("*.toml*")] == [file]


def test_what_stood_in_the_file_is_kept(alpha: Commands, joining: list[Any]) -> None:
    file = alpha.home / "my.toml"
    file.write_text('[node]\nid = "mini"\n')
    _, out, _ = alpha.run("join --config my.toml line")
    assert out.splitlines()[0].endswith("; what was there is in my.toml.before-join")
    assert (alpha.home / "my.toml.before-join").read_text() == '[node]\nid = "mini"\n'


def test_who_has_a_broker_joins_no_other_hive_unless_forced(
    alpha: Commands, joining: list[Any]
) -> None:
    file = alpha.home / "my.toml"
    file.write_text('[mqtt]\nhost = "broker.lan"\n')
    why = f"{file}: this node's broker is broker.lan:1883 already, and stays as it is"
    more = "--force replaces it, hive doctor tells how it is"
    assert alpha.run("join --config my.toml line") == (1, "", f"hive: {why}; {more}\n")
    file.write_text("[mqtt\n")
    assert alpha.run("join --config my.toml line")[0] == 2
    assert not joining
    assert alpha.run("join --config my.toml --force line")[0] == 1 and joining
    file.write_text('[mqtt]\nhost = "broker.lan"\n')
    assert "wrote" in alpha.run("join --config my.toml --force line")[1]


def test_a_file_that_cannot_be_made_is_refused_before_anything_is_asked(
    alpha: Commands, monkeypatch: Patch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(hive, "refuse_to_write", lambda file, force: given.append((file, force)))
    file = alpha.home / "my.toml"
    for force in (False, True):
        hive.refuse_to_join(file, force)
    file.write_text("")
    hive.refuse_to_join(file, False)
    assert given == [(file, False), (file, True), (file, True)]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("status --tag a/b", "argument --tag: 'a/b' is not "),
        ("status any:x", "argument NAME: 'any:x' is not "),
        ("invite a/b", "argument NAME: 'a/b' is not "),
        ("mcp --install vi", "argument --install: invalid choice: 'vi'"),
        ("--port x status", "argument --port: 'x' is not "),
        ("--log-level loud status", "argument --log-level: 'loud' is not "),
        ("--prefix # status", "argument --prefix: '#' is not "),
    ],
)
def test_what_an_option_does_not_take_is_refused(alpha: Commands, line: str, wrong: str) -> None:
    code, out, err = alpha.run(line)
    assert (code, out) == (2, "") and err.startswith(f"hive: {wrong}")


def test_a_line_for_a_site_makes_no_node(
    alpha: Commands, joining: list[Any], parsed: dict[str, Any]
) -> None:
    parsed["line"] = invited()
    why = "hive: this line bridges a site, and makes no node: hive host --bridge -\n"
    assert alpha.run("join line") == (2, "", why) and not joining


@pytest.mark.parametrize("lets", [True, False])
def test_a_password_is_in_a_file_before_the_host_has_it(
    alpha: Commands, monkeypatch: Patch, lets: bool
) -> None:
    pending, asked = alpha.home / "x.joining", list[Any]()
    mqtt = hive.MqttConfig(host="h", username="mini", password="invited")

    class Join:
        def __init__(self, *given: Any) -> None:
            assert given == (mqtt, "hive")

        def ask(self, payload: bytes) -> None:
            asked.append((payload, pending.exists() and pending.read_text().strip()))

    monkeypatch.setattr(hive, "JoinRequest", Join)
    monkeypatch.setattr(hive, "lets_in", lambda mqtt: lets and mqtt.password != "invited")
    if lets:
        password = hive.new_secret_at(mqtt, "hive", pending)
        (first, before), (second, then) = asked
        assert (first, before, then) == (b"", False, password)
        assert hive.is_password_of(second.decode(), password)
        assert pending.stat().st_mode & 0o777 == 0o600
        asked.clear()
        assert hive.new_secret_at(mqtt, "hive", pending) == password and not asked
    else:
        pending.write_text("of before\n")
        with pytest.raises(BrokerError, match=r"^h:1883 does not take the invitation: it was used"):
            hive.new_secret_at(mqtt, "hive", pending)
        assert [one for _, one in asked] == ["of before", pending.read_text().strip()]
        assert pending.read_text() != "of before\n"


def test_a_line_is_taken_from_stdin_and_from_a_terminal_unseen(monkeypatch: Patch) -> None:
    import getpass

    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    asked: list[str] = []

    def ask(question: str) -> str:
        asked.append(question)
        if len(asked) == 2:
            raise EOFError
        return "typed"

    monkeypatch.setattr(getpass, "getpass", ask)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped\xff\n")))
    assert hive.invitation_line("said") == "said"
    assert hive.invitation_line("-") == "piped\ufffd\n" and not asked
    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO()))
    assert [hive.invitation_line("-"), hive.invitation_line("-")] == ["typed", ""]
    assert asked[0] == "The line that hive invite printed (not shown): "


def test_the_authoritys_certificate_is_in_a_file_for_a_moment() -> None:
    files: list[Path] = []

    def settings(host: str, file: Path) -> str:
        files.append(file)
        return host

    with hive.invited_settings(invited(settings=settings), "h2") as mqtt:
        assert str(mqtt) == "h2" and files[0].read_text() == "PEM"
        assert files[0].parent.name.startswith("hive-join-")
    assert not files[0].parent.exists()


@pytest.fixture
def expelling(alpha: Commands, carried: Any, monkeypatch: Patch) -> Scripted:
    class Removal:
        def __init__(self, config: hive.Config, name: str, *how: Any, **more: Any) -> None:
            carried.done.append(("remove", config.node.id, config.mqtt.username, name, how, more))

        def remove(self) -> int:
            return int(carried.left)

    carried.left = 2
    monkeypatch.setattr(hive, "NodeRemoval", Removal)
    return alpha.daemon(send={"queued": True})


def test_who_is_expelled_is_out_first_and_forgotten_last(
    alpha: Commands, carried: Any, expelling: Scripted
) -> None:
    assert alpha.run("expel beta") == (0, "expelled: beta (2 documents)\n", "")
    assert carried.done == [
        ("shut out", "beta"),
        ("remove", "@host", "@host", "beta", (True,), {"expelled": True}),
        ("expel", "beta"),
    ]
    ((asked),) = expelling.asked
    told = asked["envelope"]
    assert (told["text"], told["to"], told["ch"], told["urgency"], asked["wait"]) == (
        "beta was expelled from this hive by alpha",
        *("all", "status", "later", False),
    )
    assert expelling.closed == 1
    carried.left = 1
    assert alpha.run("expel old")[1] == "expelled: old (1 document)\n"


def test_who_cannot_be_expelled_stays(alpha: Commands, carried: Any, expelling: Scripted) -> None:
    why = "hive: alpha is this machine's own node, which carries the hive\n"
    assert alpha.run("expel alpha") == (2, "", why) and not carried.done
    carried.left = 0
    why = "hive: gone is not in this hive; there are: beta\n"
    assert alpha.run("expel gone") == (1, "", why)
    carried.sites_here = ["@office"]
    why = "hive: gone has not joined here; say this where it has, or forget it\n"
    assert alpha.run("expel gone") == (1, "", why)
    carried.sites_here, carried.hub = [], ("@x", hive.MqttConfig(host="hub"))
    assert alpha.run("expel gone") == (1, "", why)
    carried.hub, carried.reloads = ("", None), False
    again = "the broker does not run, so say this again after: hive host\n"
    why = f"hive: beta has no password any more; {again}"
    assert alpha.run("expel beta") == (3, "", why)
    assert alpha.run("expel gone") == (3, "", f"hive: nothing is changed; {again}")
    assert "expel" not in names_of(carried.done) and not expelling.asked


def test_where_the_hive_is_carried_a_node_is_forgotten_as_its_host(
    alpha: Commands, carried: Any, expelling: Scripted
) -> None:
    assert alpha.run("forget old") == (0, "forgotten: old (2 documents)\n", "")
    assert carried.done[-1] == ("remove", "alpha", None, "old", (), {"as_host": False})
    (alpha.home / "hive.toml").write_text('[mqtt]\nsenders = "checked"\nhost = "x"\n')
    alpha.run("forget old --config hive.toml")
    assert carried.done[-1][-1] == {"as_host": False}
    carried.before, carried.left = BEFORE, 1
    assert alpha.run("forget old --config hive.toml")[1] == "forgotten: old (1 document)\n"
    assert carried.done[-1] == ("remove", "@host", "@host", "old", (), {"as_host": True})


# -- programs of coding agents --


class Vendors:
    """What would be changed in a program's configuration."""

    def __init__(self, monkeypatch: Patch) -> None:
        self.asked: list[Any] = []
        self.done: list[str] = []
        self.changes = [hive.Change("do this", lambda: self.done.append("this"))]
        self.changes.append(hive.Change("do that", lambda: self.done.append("that")))
        monkeypatch.setattr(hive, "own_command", lambda: ["me"])
        monkeypatch.setattr(hive, "vendor_changes", self.would)
        monkeypatch.setattr(hive, "vendor_removals", self.would)

    def would(self, *given: Any) -> list[Any]:
        self.asked.append(given)
        return self.changes


@pytest.fixture
def vendors(alpha: Commands, monkeypatch: Patch) -> Vendors:
    return Vendors(monkeypatch)


def test_a_program_is_entered_with_the_node_and_the_file_that_were_said(
    alpha: Commands, vendors: Vendors
) -> None:
    code, out, err = alpha.run("mcp --install claude --hooks --yes --config x.toml --as reviewer")
    me = ["me", "--config", str(alpha.home / "x.toml"), "--node", "alpha"]
    assert vendors.asked == [("claude", [*me, "mcp", "--as", "reviewer"], [*me, "hook"])]
    assert (code, err, vendors.done) == (0, "", ["this", "that"])
    title, told = hive.VENDORS["claude"].title, hive.VENDORS["claude"].told(True)
    assert out.splitlines()[:3] == [f"{title}: this is to be done:", "  do this", "  do that"]
    assert out.splitlines()[3] == (f"done; {told}" if told else "done")
    alpha.run("mcp --install claude --yes")
    assert vendors.asked[1] == ("claude", ["me", "--node", "alpha", "mcp"], [])
    out = alpha.run("mcp --uninstall claude --yes")[1]
    assert vendors.asked[2] == ("claude",) and out.endswith("\ndone\n")
    assert hive.main(["mcp", "--install", "codex", "--yes"]) == 0
    assert vendors.asked[3] == ("codex", ["me", "mcp"], [])


def test_nothing_is_done_unasked_or_where_nothing_is_to_be_done(
    alpha: Commands, vendors: Vendors, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"n\n")))
    code, _, err = alpha.run("mcp --install claude")
    assert (code, vendors.done) == (2, [])
    assert err == "hive: nobody is there to be asked, and nothing was done; --yes does it\n"
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert alpha.run("mcp --install claude")[0] == 1 and not vendors.done
    vendors.changes = []
    title = hive.VENDORS["claude"].title
    said = alpha.run("mcp --install claude")
    assert said == (0, f"{title}: nothing to do, hive is in\n", "")
    said = alpha.run("mcp --uninstall claude")
    assert said == (0, f"{title}: nothing to do, hive is not in it\n", "")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_person_who_starts_the_server_is_told_what_it_is_for(
    alpha: Commands, monkeypatch: Patch, terminal: bool
) -> None:
    served: list[Any] = []

    def serve(*given: Any) -> int:
        served.append(given)
        return 0

    monkeypatch.setattr(hive, "serve_session", serve)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal)
    code, out, err = alpha.run("mcp --as reviewer --config x")
    assert (code, out) == (0, "") and served == [("reviewer", "x", {"node.id": "alpha"})]
    hint = "hive: here an agent's program speaks, not a person; to end: Ctrl-D\n"
    assert err == (hint if terminal else "")
    alpha.run("mcp")
    assert served[1] == ("", None, {"node.id": "alpha"})


class Hook:
    """A hook of an agent's program, and the daemon with its mail."""

    def __init__(self, alpha: Commands, monkeypatch: Patch) -> None:
        self.alpha, self.patch = alpha, monkeypatch
        self.patience: list[Any] = []
        self.locked = 0
        self.agent = "claude"
        self.mail = [self.message("m-1", "now"), self.message("m-2", "later")]
        self.daemon = alpha.daemon(
            sessions={"sessions": [{"agent": "claude"}]},
            inbox=lambda request: {"messages": self.mail, "more": 0},
            mark={},
        )
        monkeypatch.setattr(hive, "mail_may_wait", lambda args: True)
        monkeypatch.setattr(hive, "session_of_hook", self.session)
        monkeypatch.setattr(hive, "telling_lock", self.lock)
        monkeypatch.setattr(hive, "wakes", lambda one: one["envelope"]["urgency"] == "now")
        monkeypatch.setattr(hive, "connect_to_daemon", self.connect)

    def message(self, id: str, urgency: str) -> dict[str, Any]:
        envelope = hive.Envelope.new(
            "beta", "claude", "command", f"text {id}", id=id, urgency=urgency
        )
        return {"envelope": envelope.document(), "note": "", "question": None, "task": 7}

    def connect(self, config: Any, patience: float) -> Any:
        self.patience.append(patience)
        return self.daemon

    def session(self, sessions: Any, directory: str, above: list[int]) -> str:
        assert (sessions, directory) == ([{"agent": "claude"}], "/my project") and above
        return self.agent

    def lock(self, config: Any, agent: str, patience: float) -> Any:
        assert (agent, patience) == (self.agent, 2.0)
        self.locked += 1
        return io.BytesIO() if self.agent == "claude" else None

    def call(self, event: object, **more: Any) -> tuple[int, str, str]:
        said = {"hook_event_name": event, "cwd": "/my project", **more}
        data = json.dumps(said).encode()
        self.patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return self.alpha.run("hook")


@pytest.fixture
def hook(alpha: Commands, monkeypatch: Patch) -> Hook:
    return Hook(alpha, monkeypatch)


def test_a_hook_tells_of_mail_and_marks_it(hook: Hook) -> None:
    code, out, err = hook.call("Stop")
    said = json.loads(out)
    assert (code, err, said["decision"]) == (0, "", "block")
    assert "text m-1" in said["reason"] and "text m-2" in said["reason"]
    sessions, inbox, mark = hook.daemon.asked
    assert sessions == {"do": "sessions"}
    assert inbox == {"do": "inbox", "agent": "claude", "limit": 50}
    assert mark == {"do": "mark", "agent": "claude", "tasks": [7, 7], "as": "told"}
    assert (hook.patience, hook.daemon.closed, hook.locked) == ([2.0], 1, 1)


def test_what_can_wait_begins_no_turn_and_goes_with_the_next(hook: Hook) -> None:
    hook.mail = hook.mail[1:]
    assert hook.call("Stop") == (0, "", "")
    assert [one["do"] for one in hook.daemon.asked] == ["sessions", "inbox"]
    assert "text m-2" in hook.call("UserPromptSubmit")[1]
    hook.mail = []
    assert hook.call("UserPromptSubmit") == (0, "", "")


def test_a_hook_that_has_nothing_to_tell_says_nothing(hook: Hook) -> None:
    for event, more in (("SessionStart", {}), (None, {}), ("Stop", {"stop_hook_active": True})):
        assert hook.call(event, **more) == (0, "", "")
    hook.patch.setattr(hive, "mail_may_wait", lambda args: False)
    assert hook.call("Stop") == (0, "", "") and not hook.patience
    hook.patch.setattr(hive, "mail_may_wait", lambda args: True)
    hook.agent = ""
    assert hook.call("Stop") == (0, "", "")
    locked = [hook.locked]
    hook.agent = "codex"  # of which another tells just now
    assert hook.call("Stop") == (0, "", "")
    assert [*locked, hook.locked] == [0, 1]
    assert [one["do"] for one in hook.daemon.asked] == ["sessions"] * 2
    assert hook.daemon.closed == 2
    hook.daemon = None  # type: ignore[assignment]
    assert hook.call("Stop") == (0, "", "")


def test_a_hook_never_fails_whoever_calls_it(hook: Hook) -> None:
    def fails(args: object) -> bool:
        raise RuntimeError("x" * 300)

    hook.patch.setattr(hive, "mail_may_wait", fails)
    code, out, err = hook.call("Stop")
    assert (code, out) == (0, "") and err == f"hive: hook: {'x' * 199}…\n"


def test_mail_may_wait_where_a_daemon_says_so_or_none_can_be_asked(
    alpha: Commands, monkeypatch: Patch
) -> None:
    file = str(alpha.home / "b.toml")
    unread = {"a": [0, 0], "b": [0, 1]}
    runs = [
        hive.RunningDaemon(name, where, {"node.state_dir": alpha.home / name})
        for name, where in (("a", None), ("b", file))
    ]
    asked: list[Any] = []

    def client(door: Path, node: str, patience: float) -> Any:
        asked.append((door, node, patience))
        rows = [{"unread": n} for n in unread[node]]
        return Scripted(alpha.now, sessions={"sessions": rows})

    monkeypatch.setattr(hive, "running_daemons", lambda: runs)
    monkeypatch.setattr(hive, "ControlClient", client)

    def waits(node: str | None = None, config: str | None = None) -> bool:
        return hive.mail_may_wait(argparse.Namespace(**{"node.id": node, "config": config}))

    assert waits() and waits("b") and not waits("a")
    assert asked[0] == (alpha.home / "a" / "door", "a", 2.0) and len(asked) == 4
    assert waits("c")  # no such daemon is known: it takes more than that to tell
    asked.clear()
    assert waits(config="b.toml") and [one[1] for one in asked] == ["b"]
    monkeypatch.setenv("HIVE_NODE", "a")
    assert not waits() and waits("b")
    monkeypatch.setenv("HIVE_CONFIG", "b.toml")
    assert waits()  # there is no a of that file
    monkeypatch.delenv("HIVE_NODE")
    unread["b"] = [0]
    assert not waits()

    def broken(*given: Any) -> Any:
        raise OSError

    monkeypatch.setattr(hive, "ControlClient", broken)
    assert waits()


@pytest.mark.parametrize("words", ["hook", "doctor", "tests", "invite", "web", "broker"])
def test_who_waits_for_a_line_has_it_at_once(
    alpha: Commands, hook: Hook, inviting: list[Any], monkeypatch: Patch, words: str
) -> None:
    pipe, seen = Pipe(), list[bytes]()

    def look(*given: Any) -> Any:
        seen.append(pipe.seen)
        return {}

    def examine(*given: Any) -> Iterator[Any]:
        yield "broker", hive.Finding(hive.Level.OK, "it is there", "")
        look()

    hook.daemon._answers["mark"] = look
    if words == "web":
        Page(monkeypatch)
    monkeypatch.setattr(hive, "examine", examine)
    monkeypatch.setattr(hive.Loop, "run", look)
    monkeypatch.setattr(hive.Broker, "start", lambda broker: None)
    monkeypatch.setattr(hive.time, "strftime", look)  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stdout", pipe.stream())
    data = json.dumps({"hook_event_name": "Stop", "cwd": "/my project"}).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    if words == "tests":
        hive.show_tests(alpha.home / "my.toml")
    else:
        line = [words, *["mini"] * (words == "invite")]
        line += [f"--socket={alpha.home}/s"] * (words == "broker")
        assert hive.main(["--node", "alpha", *line]) == 0
    assert seen and seen[0].endswith(b"\n")


# -- the page --


class Page:
    """The page of a node, which ends as soon as it is served."""

    def __init__(self, monkeypatch: Patch) -> None:
        self.made: list[Any] = []
        self.closed: list[str] = []
        self.opened: list[Any] = []
        self.taken = False
        self.loops = closed_loops(monkeypatch)
        monkeypatch.setattr(hive, "time", time)
        monkeypatch.setattr(hive, "WebService", self.service)
        monkeypatch.setattr(hive, "WebServer", self.server)
        monkeypatch.setattr(hive, "served_link", lambda config: "the link")
        monkeypatch.setattr(hive, "open_browser", lambda *given: self.opened.append(given))
        monkeypatch.setattr(hive.Loop, "run", self.run)

    def service(self, config: Any, port: int) -> Any:
        self.made.append(port)
        if self.taken:
            raise BlockingIOError
        close = lambda: self.closed.append("service")  # noqa: E731
        return SimpleNamespace(port=7, key="k", listener="listener", close=close)

    def server(self, loop: Any, *given: Any) -> Any:
        self.made.append(given[1:])
        return SimpleNamespace(close=lambda: self.closed.append("server"))

    def run(self, *given: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)  # which end it, and nothing else
        self.closed.append("run")


@pytest.fixture
def page(monkeypatch: Patch) -> Page:
    return Page(monkeypatch)


def test_a_page_is_served_until_it_is_told_to_end(alpha: Commands, page: Page) -> None:
    code, out, err = alpha.run("web --log-level error --host h")
    link = hive.web_link(7, "k")
    assert (code, out, err) == (0, f"the page of alpha: {link}\n", "")
    me = [*hive.own_program(), "--node=alpha", "--host=h", "--log-level=error"]
    assert page.made == [8484, ("k", me, "listener", False)]
    assert page.closed == ["run", "server", "service"] and not page.opened
    assert page.loops == ["closed"]
    alpha.run("web --port 99 --read-only --open")
    assert page.made[2] == 99 and page.made[3][-1] is True
    assert [one[0] for one in page.opened] == [link]


def test_a_page_that_is_served_already_is_told(alpha: Commands, page: Page) -> None:
    page.taken = True
    said = "the page of alpha is served already: the link\n"
    assert alpha.run("web") == (0, said, "") and not page.opened
    assert alpha.run("web --open") == (0, said, "")
    assert [one[0] for one in page.opened] == ["the link"] and not page.closed
