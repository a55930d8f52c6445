"""Daemons of one user on one machine: which broker they use, and whose turn it is to host it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    PATIENCE,
    ROOT,
    Broker,
    Daemon,
    Hive,
    eventually,
    free_port,
    missing,
    need_mosquitto,
)
from faults import COUNT, SmallDisk

import hive
from hive import BrokerConfig, Config, NodeConfig

SECONDS = 8.0  # until another daemon has taken over, on two slow cores
HOSTING = "hosting the broker of this machine"
MOVING = "the broker's socket is gone"
CANNOT = "cannot host the broker, looking again"
COUNTER = '#!/bin/sh\necho "$HIVE_ID" >>{file}\n'

# hive.py with another port in the place of 1883, where the tests' own machine may have a broker.
ELSEWHERE = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); import hive; hive.MQTT_PORT = {{port}};"
    " hive.LOOK_AGAIN = {look}; hive.DIAL_DEADLINE = {dial}; sys.exit(hive.main())"
)


class Machine(Hive):
    """One user on one machine: no broker anywhere, unless a test starts one."""

    def __init__(self, home: Path) -> None:
        home.mkdir()
        super().__init__(home, Broker(home / "mosquitto", start=False), "hive", 0.5)
        self.mqtt, self.forks = "", True
        self.hurry(hive.LOOK_AGAIN, hive.DIAL_DEADLINE)
        for name in ("XDG_STATE_HOME", "XDG_RUNTIME_DIR", "STATE_DIRECTORY"):
            self.environment.pop(name, None)
        self.runtime = Path(tempfile.mkdtemp(prefix="hive-"))  # a short path: it is a socket's
        self.environment["XDG_RUNTIME_DIR"] = str(self.runtime)
        self.state = home / ".local" / "state" / "hive" / ".broker"
        self.file = self.state / "broker.sqlite3"
        self.socket = self.runtime / "hive" / "broker"

    def hurry(self, look: float = 0.2, dial: float = 0.5) -> None:
        """From now on, have less patience than hive has."""
        code = ELSEWHERE.format(port=self.broker.port, look=look, dial=dial)
        self.program = [sys.executable, "-c", code]

    def close_nodes(self) -> None:
        super().close()

    def close(self) -> None:
        try:
            self.close_nodes()
        finally:
            self.broker.stop()
            shutil.rmtree(self.runtime)

    def start(self, *names: str, extra: str = "") -> list[Daemon]:
        """Daemons, all at once; wait until they are connected."""
        nodes = [self.nodes.get(name) or self.node(name, extra) for name in names]
        seen = [len(node.events("connected")) for node in nodes]
        for node in nodes:
            node.start(wait=False)
        for node, before in zip(nodes, seen, strict=True):
            connected(node, before + 1)
        return nodes

    def hosts(self) -> list[str]:
        """Who hosts the broker now."""
        return [
            name
            for name, node in self.nodes.items()
            if alive(node) and len(of_run(node, HOSTING)) > len(of_run(node, MOVING))
        ]

    def host(self) -> Daemon:
        """The one that does."""
        (name,) = eventually("somebody hosts the broker", self.hosts, SECONDS)
        return self.nodes[name]

    def meet(self, *names: str, asked: str = "") -> None:
        """Wait until these see each other."""

        node = self.nodes[asked or names[0]]

        def shown() -> bool:
            said = self.cli(node.name, "status", "--json", code=None).stdout
            rows = json.loads(said or "[]")
            return {row["name"] for row in rows if row["status"] == "online"} == {*names}

        def online() -> bool:
            return {name for name, how in node.statuses().items() if how == "online"} == {*names}

        eventually(f"{names} see each other", lambda: online() and shown())


def alive(node: Daemon) -> bool:
    return node.process is not None and node.process.poll() is None


def connected(node: Daemon, times: int) -> None:
    """Wait until it has been, so many times in all."""
    eventually(f"{node.name} is connected", lambda: len(node.events("connected")) >= times)


def of_run(node: Daemon, event: str) -> list[dict[str, Any]]:
    """Such events since it was last started."""
    events = node.events()
    first = max((i for i, row in enumerate(events) if row["event"] == "starting"), default=0)
    return [row for row in events[first:] if row["event"] == event]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path / "home")
    try:
        yield machine
    finally:
        machine.close()


# ---- a bare machine ----


def run_bare(machine: Machine, *arguments: str) -> subprocess.CompletedProcess[str]:
    """hive.py as a newcomer types it: no configuration, no option."""
    return machine.run(
        [*machine.program, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=machine.environment,
        cwd=machine.home,
    )


@pytest.fixture
def newcomer(machine: Machine) -> Iterator[tuple[Machine, subprocess.Popen[str], list[str]]]:
    """A daemon without any configuration, and what it says."""
    process = subprocess.Popen(
        [*machine.program, "daemon"],
        stderr=subprocess.PIPE,
        text=True,
        env=machine.environment,
        cwd=machine.home,
    )
    said: list[str] = []
    stderr = process.stderr
    assert stderr
    thread = threading.Thread(target=lambda: said.extend(stderr), daemon=True)
    thread.start()
    try:
        eventually("it is connected", lambda: any(" event=connected " in line for line in said))
        yield machine, process, said
    finally:
        process.terminate()
        process.wait(PATIENCE)
        thread.join()
        stderr.close()


def test_a_newcomer_needs_two_commands(
    newcomer: tuple[Machine, subprocess.Popen[str], list[str]],
) -> None:
    machine, process, said = newcomer

    (hosting,) = [line for line in said if HOSTING in line]
    assert "for other machines: hive host" in hosting
    assert str(machine.socket) in hosting
    sent = run_bare(machine, "send", "--to", "all", "--ch", "command", "--text", "hello")
    assert (sent.returncode, sent.stderr) == (0, "")
    assert sent.stdout.startswith("sent ")
    name = hive.short_host_name()
    asked = ("send", "--to", name, "--action", "ping", "--text", "x", "--wait", "20")
    for way in ([], ["--direct"]):
        assert run_bare(machine, *asked, *way).stdout.startswith("pong")
    assert [row["status"] for row in json.loads(run_bare(machine, "status", "--json").stdout)] == [
        "online"
    ]
    doctor = run_bare(machine, "doctor")
    assert doctor.returncode == 0, doctor.stdout
    assert f"{machine.socket} lets us in without a name" in doctor.stdout
    for file, mode in (
        (machine.socket, 0o600),
        (machine.socket.parent, 0o700),
        (machine.file, 0o600),
        (machine.state, 0o700),
    ):
        assert stat.S_IMODE(file.stat().st_mode) == mode, file
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 0
    assert not machine.socket.exists()


def test_the_command_line_hosts_nothing_and_says_what_to_do(machine: Machine) -> None:
    for arguments in (
        ("status",),
        ("roster",),
        ("send", "--to", "all", "--text", "x"),
        ("send", "--to", "beta", "--text", "x", "--wait", "5"),
    ):
        done = run_bare(machine, *arguments)
        assert (done.returncode, done.stdout) == (3, ""), arguments
        assert done.stderr == f"hive: {hive.NO_BROKER}\n"
    doctor = run_bare(machine, "doctor")
    assert doctor.returncode == 0
    assert "the daemon will host one" in doctor.stdout
    assert not machine.socket.exists() and not machine.file.exists()


# ---- the order of choice ----


def test_a_configured_broker_is_the_one_even_while_it_is_down(machine: Machine) -> None:
    machine.start("alpha")
    for mqtt in (f"port = {free_port()}", f'host = "{machine.home}/nowhere"'):
        machine.mqtt = mqtt
        name = "n" + mqtt[:4].strip()
        node = machine.node(name).start(wait=False)
        node.logged("no broker, trying again")
        assert machine.cli(name, "status", code=3).stderr.startswith("hive: broker ")
        assert machine.hosts() == ["alpha"]


def test_what_answers_at_localhost_is_used_and_nothing_is_hosted(machine: Machine) -> None:
    need_mosquitto()
    machine.broker.start()
    alpha, beta = machine.start("alpha", "beta")
    assert alpha.events("connected")[0]["broker"] == f"localhost:{machine.broker.port}"
    machine.meet("alpha", "beta")
    assert "lets us in" in machine.cli("beta", "doctor").stdout
    machine.broker.stop()
    for node in (alpha, beta):
        node.logged("no broker, trying again")
    machine.broker.start()
    for node in (alpha, beta):
        connected(node, 2)
    assert not machine.hosts() and not machine.file.exists()


def test_daemons_that_lost_the_broker_at_localhost_follow_one_that_hosts(machine: Machine) -> None:
    need_mosquitto()
    machine.broker.start()
    alpha, _ = machine.start("alpha", "beta")
    machine.broker.stop()
    alpha.logged("no broker, trying again")
    machine.start("gamma")
    machine.meet("alpha", "beta", "gamma")
    assert machine.hosts() == ["gamma"]


def test_ours_comes_before_what_answers_at_localhost(machine: Machine) -> None:
    need_mosquitto()
    machine.start("alpha")
    machine.broker.start()
    machine.start("beta")
    machine.meet("alpha", "beta")
    assert machine.hosts() == ["alpha"]


@pytest.mark.parametrize("says", [b"", b"SSH-2.0-OpenSSH_9.2\r\n"])
def test_what_listens_at_localhost_and_is_no_broker_is_none(machine: Machine, says: bytes) -> None:
    with socket.create_server(("127.0.0.1", machine.broker.port)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    visitor, _ = listener.accept()
                    visitor.sendall(says)

        threading.Thread(target=serve, daemon=True).start()
        machine.start("alpha")
        assert machine.hosts() == ["alpha"]
        listener.shutdown(socket.SHUT_RDWR)


def test_at_the_real_port_too(machine: Machine) -> None:
    """The same with 1883, in a network of its own."""
    need_mosquitto()
    unshare, enter, ip = (shutil.which(name) for name in ("unshare", "nsenter", "ip"))
    if os.geteuid():
        pytest.skip("only root can have a network of its own")
    if not (unshare and enter and ip):
        missing("unshare, nsenter and ip of Linux are missing")
    network = subprocess.Popen([unshare, "--net", "sleep", "600"])
    inside = [enter, "--net", f"--target={network.pid}"]
    try:
        own = os.readlink("/proc/self/ns/net")
        there = f"/proc/{network.pid}/ns/net"
        try:
            eventually("it has a network", lambda: os.readlink(there) != own, 5.0)
        except (AssertionError, OSError):
            missing("no network of one's own can be had here")
        subprocess.run([*inside, ip, "link", "set", "lo", "up"], check=True)
        machine.program = [*inside, sys.executable, f"{ROOT}/hive-cli"]
        alpha, beta = machine.start("alpha", "beta")
        host = machine.host()
        program = shutil.which("mosquitto", path=os.environ["PATH"] + ":/usr/sbin")
        mosquitto = subprocess.Popen([*inside, str(program)], stderr=subprocess.DEVNULL)
        try:
            other = beta if host is alpha else alpha
            where = eventually("Mosquitto listens", lambda: tcp_inside(inside), PATIENCE)
            assert where
            host.stop(signal.SIGKILL)
            eventually("the other uses it", lambda: len(of_run(other, "connected")) == 2)
            assert of_run(other, "connected")[-1]["broker"] == "localhost:1883"
        finally:
            mosquitto.terminate()
            mosquitto.wait()
    finally:
        network.kill()
        network.wait()


def tcp_inside(inside: list[str]) -> bool:
    """Does anything listen at 1883 there?"""
    probe = "import socket; socket.create_connection(('localhost', 1883))"
    done = subprocess.run([*inside, sys.executable, "-c", probe], capture_output=True)
    return done.returncode == 0


def test_our_own_broker_over_tcp_is_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(tempfile.mkdtemp(prefix="hive-")) / "broker"
    listener = hive.unix_listener(place)

    def meanwhile(host: str, port: int) -> bool:
        """A daemon becomes the host, and it is what answers."""
        listener.listen()
        return True

    monkeypatch.setattr(hive, "speaks_mqtt", meanwhile)
    (tmp_path / "broker.sqlite3.lock").write_text(str(place))
    config = Config(NodeConfig(id="alpha"), broker=BrokerConfig(state_dir=tmp_path))
    with listener:
        found = hive.find_broker(config)
        assert found and found.host == str(place)
    shutil.rmtree(place.parent)


# ---- another takes over ----


def test_another_daemon_takes_over_within_seconds_ten_times(machine: Machine) -> None:
    names = ("alpha", "beta", "gamma")
    machine.start(*names)
    for number in 5 * (signal.SIGTERM, signal.SIGKILL):
        old = machine.host()
        others = [node for node in machine.nodes.values() if node is not old]
        before = [len(node.events("connected")) for node in others]
        began = time.monotonic()
        old.stop(number)
        new = machine.host()
        assert new is not old
        for node, seen in zip(others, before, strict=True):
            connected(node, seen + 1)
        assert time.monotonic() - began < SECONDS
        machine.start(old.name)
        assert machine.hosts() == [new.name]
    machine.meet(*names)


@pytest.mark.parametrize("count", [2, 5, 10])
def test_of_daemons_that_start_at_once_one_hosts_and_all_meet(machine: Machine, count: int) -> None:
    names = [f"node{i}" for i in range(count)]
    machine.start(*names)
    machine.meet(*names)
    machine.host()
    assert not [
        row for node in machine.nodes.values() for row in node.events(CANNOT, level="warning")
    ]


def test_a_hung_host_is_waited_for_and_followed_when_it_is_killed(machine: Machine) -> None:
    machine.start("alpha")
    machine.start("beta")
    alpha, beta = machine.nodes["alpha"], machine.nodes["beta"]
    os.kill(alpha.pid, signal.SIGSTOP)
    gamma = machine.node("gamma").start(wait=False)
    gamma.logged("starting")
    time.sleep(2 * hive.LOOK_AGAIN)
    assert not of_run(beta, HOSTING) and not of_run(gamma, HOSTING)
    os.kill(alpha.pid, signal.SIGCONT)
    machine.meet("alpha", "beta", "gamma")
    assert machine.hosts() == ["alpha"]

    os.kill(alpha.pid, signal.SIGSTOP)
    machine.hurry()
    told = (
        f"hive: broker {re.escape(str(machine.socket))}: no answer {{}}; {re.escape(hive.HUNG)}\n"
    )
    direct = machine.cli("beta", "status", "--direct", code=3).stderr
    assert re.fullmatch(told.format(r"\(CONNACK\) in time"), direct)

    def said() -> str:
        return machine.cli("beta", "status", code=None).stderr

    eventually("beta notices", lambda: re.fullmatch(told.format(r"for \d+ s"), said()))
    alpha.stop(signal.SIGKILL)
    assert machine.host() in (beta, gamma)
    machine.meet("beta", "gamma", asked="beta")


def test_a_daemon_whose_broker_ends_before_it_is_let_in_looks_again(machine: Machine) -> None:
    """It would knock for ever where nobody is any more, and so would all others like it."""
    place = machine.socket
    place.parent.mkdir(mode=0o700)
    with hive.unix_listener(place) as ending:
        ending.listen()
        alpha = machine.node("alpha").start(wait=False)
        said = b""
        while not said:  # first it only looks
            visitor, _ = ending.accept()
            with visitor:
                said = visitor.recv(4096)
        place.unlink()
    alpha.logged(HOSTING)
    alpha.logged("connected")


def test_a_host_whose_socket_is_taken_away_moves(machine: Machine) -> None:
    """As at a logout, or when a service stops whose directory it was."""
    machine.start("alpha", "beta")
    old = machine.host()
    shutil.rmtree(machine.runtime)
    old.logged(MOVING)
    machine.meet("alpha", "beta")
    machine.runtime.mkdir()
    machine.meet("alpha", "beta")
    machine.host()


def test_the_embedded_broker_alone_is_used_and_followed(machine: Machine) -> None:
    machine.node("alone")
    broker = subprocess.Popen(
        machine.command_line("alone", "broker"),
        env=machine.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert broker.stdout
    with broker.stdout as stdout:
        assert stdout.readline() == f"broker listens on {machine.socket}\n"
        machine.start("alpha", "beta")
        assert not machine.hosts()
        second = machine.cli("alpha", "broker", code=3)
        assert "another broker has" in second.stderr and second.stderr.count("\n") == 1
        broker.terminate()
        assert broker.wait(PATIENCE) == 0
    machine.host()
    machine.meet("alpha", "beta")
    assert "another broker has" in machine.cli("alpha", "broker", code=3).stderr


# ---- what lies in the way ----


def test_a_socket_and_a_lock_that_were_left_behind_are_no_hindrance(machine: Machine) -> None:
    for garbage in (
        b"\0" * 100,
        b"/a\0b",
        b"\0abstract",
        b"relative",
        b"",
        b"/nowhere/" + b"x" * 5000,
    ):
        machine.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        machine.file.with_name("broker.sqlite3.lock").write_bytes(garbage)
        machine.socket.parent.mkdir(mode=0o700, exist_ok=True)
        hive.unix_listener(machine.socket).close()  # nobody listens there any more
        assert run_bare(machine, "status").stderr == f"hive: {hive.NO_BROKER}\n"
        (alpha,) = machine.start("alpha")
        assert machine.hosts() == ["alpha"]
        alpha.stop(signal.SIGKILL)


@pytest.mark.parametrize("first", ["with", "without"])
def test_it_is_found_whatever_the_environment_says_of_its_place(
    machine: Machine, first: str
) -> None:
    """As where one of them was started by cron, or by a service manager."""
    elsewhere = machine.runtime / "other"
    elsewhere.mkdir(mode=0o700)
    places = ["", str(elsewhere), str(machine.runtime)]
    for place in places if first == "without" else reversed(places):
        node = machine.node("n" + str(len(machine.nodes)))
        node.environment["XDG_RUNTIME_DIR"] = place
    names = [*machine.nodes]
    for name in names:
        machine.start(name)
    assert machine.hosts() == names[:1]
    for place in places:
        machine.environment["XDG_RUNTIME_DIR"] = place
        machine.meet(*names)
    machine.nodes[names[0]].stop(signal.SIGKILL)
    machine.host()
    for place in places:
        machine.environment["XDG_RUNTIME_DIR"] = place
        machine.meet(*names[1:], asked=names[1])


def test_a_configured_socket_and_one_that_is_not_are_no_two_brokers(machine: Machine) -> None:
    own = machine.runtime / "own"
    machine.start("alpha", extra=f'[broker]\nsocket = "{own}"\n')
    machine.start("beta")
    machine.meet("alpha", "beta")
    machine.nodes["alpha"].stop()
    assert machine.host().name == "beta"
    machine.start("alpha")
    machine.meet("alpha", "beta")


def objected(machine: Machine, node: Daemon) -> str:
    """Why it cannot host: said once, however often it looks."""
    why = str(node.logged(CANNOT, level="warning")["why"])
    eventually("it looks again", lambda: len(node.events(CANNOT, level="debug")) >= 4)
    assert len(node.events(CANNOT, level="warning")) == 1
    assert machine.cli(node.name, "status", code=3).stderr == f"hive: {hive.NO_BROKER}\n"
    return why


@pytest.mark.parametrize("fault", ["writable by all", "another user's", "a file"])
def test_a_directory_that_is_not_ours_alone_is_not_used(machine: Machine, fault: str) -> None:
    machine.hurry()
    folder = machine.socket.parent
    if fault == "a file":
        folder.touch()
    else:
        folder.mkdir()
    if fault == "writable by all":
        folder.chmod(0o777)
    elif fault == "another user's":
        if os.geteuid():
            pytest.skip("only root can give a directory away")
        os.chown(folder, 12345, 12345)
    alpha = machine.node("alpha").start(wait=False)

    why = objected(machine, alpha)

    assert str(folder) in why
    if fault != "a file":  # nor is one that somebody else could have put there
        with hive.unix_listener(machine.socket) as listener:
            listener.listen()
            assert machine.cli("alpha", "status", code=3).stderr == f"hive: {hive.NO_BROKER}\n"
        machine.socket.unlink()
        folder.rmdir()
    else:
        folder.unlink()
    alpha.logged("connected")
    assert machine.hosts() == ["alpha"]


def test_a_path_too_long_for_a_socket_is_made_short(machine: Machine) -> None:
    deep = machine.runtime / ("x" * 100)
    deep.mkdir(mode=0o700)
    machine.environment["XDG_RUNTIME_DIR"] = str(deep)
    machine.start("alpha", "beta")
    machine.meet("alpha", "beta")
    short = hive.shortened_socket_path(deep / "hive" / "broker")
    assert short.exists()
    for name in ("alpha", "beta"):
        machine.nodes[name].stop()
    assert not short.exists()
    short.with_name(f"{short.name}.lock").unlink()


def test_a_configured_socket_that_cannot_be_is_said_once(machine: Machine) -> None:
    machine.hurry()
    place = machine.runtime / ("x" * 100)
    alpha = machine.node("alpha", f'[broker]\nsocket = "{place}"\n').start(wait=False)
    assert objected(machine, alpha) == f"{place}: a socket's path has 100 bytes"
    kept = machine.runtime / "kept"
    kept.write_text("precious")
    beta = machine.node("beta", f'[broker]\nsocket = "{kept}"\n').start(wait=False)
    beta.logged(CANNOT, level="warning")
    assert kept.read_text() == "precious"


def test_without_a_file_it_is_kept_in_memory(machine: Machine) -> None:
    machine.file.mkdir(parents=True)
    machine.file.parent.chmod(0o700)
    (alpha,) = machine.start("alpha")
    alpha.logged("cannot write, going on in memory", file=str(machine.file))
    machine.start("beta")
    machine.meet("alpha", "beta")


def test_a_full_disk_is_no_end_of_it(machine: Machine) -> None:
    disk = SmallDisk(machine.home / "disk")
    machine.environment["XDG_STATE_HOME"] = str(machine.home / "disk")
    try:
        disk.fill()
        (alpha,) = machine.start("alpha")
        alpha.logged("cannot write, going on in memory")
        machine.start("beta")
        machine.meet("alpha", "beta")
        alpha.stop(signal.SIGKILL)
        disk.free()
        machine.meet("beta")
    finally:
        machine.close_nodes()
        disk.close()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "garbage": lambda file: file.write_bytes(os.urandom(20_000)),
    "cut": lambda file: os.truncate(file, 5000),
    "empty": lambda file: file.write_bytes(b""),
    "in a name": lambda file: file.write_bytes(file.read_bytes().replace(b"meta", b"m\xffta")),
    "in a column": lambda file: file.write_bytes(file.read_bytes().replace(b"expiry", b"expirx")),
    "in a table": lambda file: file.write_bytes(
        file.read_bytes().replace(b"CREATE TABLE messages", b"CREATE\xffTABLE messages")
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_set_aside(machine: Machine, damage: str) -> None:
    (alpha,) = machine.start("alpha")
    alpha.stop()
    for suffix in ("-wal", "-shm"):
        machine.file.with_name(machine.file.name + suffix).unlink(missing_ok=True)
    DAMAGES[damage](machine.file)
    machine.start("alpha", "beta")
    machine.meet("alpha", "beta")
    aside = [*machine.state.glob("broker.sqlite3.damaged-*")]
    assert len(aside) == (damage != "empty")
    assert not alpha.events("bug")


# ---- [broker] ----


def test_a_hosting_daemon_listens_on_tcp_where_it_shall(machine: Machine) -> None:
    port = free_port()
    secret = machine.home / "secret"
    secret.write_text("open sesame\n")
    secret.chmod(0o600)
    listen = f'[broker]\nlisten = "127.0.0.1:{port}"\n'
    known = f'username = "ali"\npassword_file = "{secret}"\n'
    (alpha,) = machine.start("alpha", extra=listen + known)
    assert alpha.events(HOSTING)[0]["at"] == f"{machine.socket} and 127.0.0.1:{port}"
    for mqtt, code in (
        (known, 0),
        ("", 3),
        ('username = "ali"\npassword = "sesame"\n', 3),
    ):
        machine.mqtt = f"port = {port}\n{mqtt}"
        name = f"n{len(machine.nodes)}"
        machine.node(name)
        machine.cli(name, "status", code=code)
    alpha.stop()
    machine.mqtt = ""
    machine.start("open", extra=f"{listen}anonymous = true\n")
    machine.mqtt = f"port = {port}"
    machine.node("last")
    machine.cli("last", "status")


@pytest.mark.parametrize(
    ("broker", "named"),
    [
        (
            'listen = "0.0.0.0:1883"',
            "0.0.0.0:1883 is not loopback; for other machines use Mosquitto",
        ),
        ('listen = "127.0.0.1:1883"', "needs username and password_file in [broker], or anonymous"),
        ('listen = "nonsense"', "broker.listen"),
        ('username = "ali"', "broker.username"),
        ("queue_messages = -1", "broker.queue_messages"),
        ('lisen = "127.0.0.1:1883"', "broker.lisen = '127.0.0.1:1883': no such key"),
    ],
)
def test_a_wrong_broker_table_is_said_in_one_line_and_ends_the_daemon(
    machine: Machine, broker: str, named: str
) -> None:
    machine.start("alpha")  # it hosts: so the next one would find out when that ends, at night
    machine.node("beta", f"[broker]\n{broker}\n")

    done = machine.cli("beta", "daemon", code=2)

    last = done.stderr.splitlines()[-1]
    assert last.startswith("hive: ") and named in last


def test_a_port_that_is_taken_is_said_once(machine: Machine) -> None:
    machine.hurry()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        extra = f'[broker]\nlisten = "127.0.0.1:{port}"\nanonymous = true\n'
        alpha = machine.node("alpha", extra).start(wait=False)
        assert objected(machine, alpha).startswith(f"broker.listen: 127.0.0.1:{port}: Address")
    alpha.logged("connected")


# ---- what flows meanwhile ----


KILLS = 5


def test_what_was_acknowledged_outlives_the_hosts(machine: Machine) -> None:
    """Numbered commands from two nodes to a third; whoever hosts is killed, again and again."""
    done_file = machine.home / "done"
    workers = "[handlers.note]\nworkers = 4\n"
    alpha, beta, gamma = machine.start("alpha", "beta", "gamma", extra=workers)
    alpha.handler("note", COUNTER.format(file=done_file))
    sent = Sender((beta, gamma), COUNT)

    def done() -> list[str]:
        return done_file.read_text().split() if done_file.exists() else []

    def reached(number: int) -> None:
        eventually(f"{number} are done", lambda: len(done()) >= number, 2 * PATIENCE)

    for kill in range(1, KILLS + 1):
        reached(kill * COUNT // (KILLS + 3))
        host = machine.host()
        runs = len(host.events("starting"))
        host.stop(signal.SIGKILL)
        host.start(wait=False)
        eventually("it runs again", lambda: len(host.events("starting")) > runs)  # noqa: B023
    sent.finish()
    answers = "SELECT exchange FROM log WHERE event = 'in' AND sender = 'alpha' AND ch = '{}'"

    def answered(ch: str) -> list[str]:
        both = (journal(node, answers.format(ch)) for node in (beta, gamma))
        return [exchange for found in both for exchange in found if exchange in sent.ids]

    def settled() -> bool:
        return len(answered("response")) + len(answered("alert")) >= len(sent.ids)

    with contextlib.suppress(AssertionError):  # what is missing is said below
        eventually("all are answered", settled, 2 * PATIENCE)
    arrived = {*journal(alpha, "SELECT id FROM log WHERE event = 'in'")} & {*sent.ids}
    interrupted, acted = {*answered("alert")}, Counter(done())
    twice = [id for id, times in acted.items() if times > 1]
    figures = f"sent {len(sent.ids)}, arrived {len(arrived)}, acted upon {len(acted)}"
    figures += f", interrupted {len(interrupted)}, twice {len(twice)}"
    figures += f", answered {len(answered('response'))}, kills {KILLS}"
    print(figures)
    assert arrived == {*sent.ids}, figures
    assert {*acted} | interrupted == {*sent.ids} and not twice, figures
    assert sorted(answered("response") + answered("alert")) == sorted(sent.ids), figures
    machine.meet("alpha", "beta", "gamma")


def journal(node: Daemon, question: str) -> list[str]:
    """One column of what a node has written down."""
    file = node.home / "state" / "journal.sqlite3"
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
        return [value for (value,) in database.execute(question)]


class Sender:
    """Hands numbered commands in at the doors of some daemons, again until each is taken."""

    def __init__(self, nodes: tuple[Daemon, ...], count: int) -> None:
        self.ids = [f"n-{number}" for number in range(count)]
        self._faults: list[BaseException] = []
        self._configs = itertools.cycle([hive.load_config(str(node.config)) for node in nodes])
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for id, config in zip(self.ids, self._configs, strict=False):
                envelope = hive.Envelope.new(
                    config.node.id, "alpha", "command", id, id=id, action="note"
                )
                eventually("it is handed in", partial(self._hand_in, config, envelope))
        except BaseException as error:
            self._faults.append(error)

    @staticmethod
    def _hand_in(config: Config, envelope: hive.Envelope) -> bool:
        client = hive.connect_to_daemon(config)
        if client is None:
            return False
        with contextlib.closing(client):
            try:
                said = client.ask({"do": "send", "envelope": envelope.document()})
            except hive.DaemonError:  # it was killed: nobody was told that it is sent
                return False
        # ... or killed when it had it, and before it said so
        assert said.get("queued") or "was handed in before" in said["error"]
        return True

    def finish(self) -> None:
        self._thread.join(2 * PATIENCE)
        assert not self._thread.is_alive() and not self._faults, self._faults


def test_a_node_may_be_called_broker(machine: Machine) -> None:
    """Without XDG_RUNTIME_DIR the broker's socket lies where nodes have their state."""
    del machine.environment["XDG_RUNTIME_DIR"]
    node = machine.node("broker")
    node.config.write_text(node.config.read_text().replace('state_dir = "state"\n', ""))
    machine.start("broker")
    assert machine.hosts() == ["broker"]
    assert (machine.state.parent / "broker" / "journal.sqlite3").exists()
    node.state_dir = machine.state.parent / "broker"
    machine.meet("broker")
