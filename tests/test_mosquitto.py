"""The printed set-up for Mosquitto: run as a person runs it, then lived with and attacked."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import forked
import paho.mqtt.client as mqtt
import pytest
from conftest import (
    PATIENCE,
    Broker,
    Daemon,
    Hive,
    calls_of,
    eventually,
    find_program,
    free_port,
    need_mosquitto,
)
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

import hive as module

PREFIX = "lab/hive"
NOT_AUTHORIZED = 0x87  # MQTT 5, 2.4
LOOPBACK = ("--host", "127.0.0.1")
NODES = ("alpha", "beta")


def script(*arguments: str, code: int = 0, config: str = "") -> str:
    """What the command prints, or its error, in an empty home."""
    with tempfile.TemporaryDirectory() as home:
        file = Path(home, "hive.toml")
        file.write_text(config or '[node]\nid = "alpha"\n')
        command = ["broker", "--mosquitto-conf", "--config", str(file), *arguments]
        done = forked.run(
            [sys.executable, forked.PROGRAM, *command],
            cwd=home,
            env={"HOME": home, "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    assert done.returncode == code, done.stderr
    return str(done.stdout if code == 0 else done.stderr)


def path_with_mosquitto() -> str:
    program = find_program("mosquitto_passwd")
    assert program
    return f"{os.environ['PATH']}:{Path(program).parent}"


class SetUp(Broker):
    """A Mosquitto with exactly what the script wrote."""

    def __init__(self, place: Path, *arguments: str) -> None:
        self.place, self.home, self.port = place, place / "etc", free_port()
        where = (*LOOPBACK, "--port", str(self.port), "--prefix", PREFIX)
        self.text = script(*where, *arguments)
        self.said = self.run()
        self._program = find_program("mosquitto")
        self._process = None
        self.start()

    def run(self, *arguments: str) -> str:
        """Run the script as the person does; what it says."""
        done = subprocess.run(
            ["sh", "-s", *arguments],
            input=self.text,
            env={
                "PATH": path_with_mosquitto(),
                "ETC": str(self.home),
                "DATA": str(self.place / "data"),
            },
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def password(self, node: str) -> str:
        return (self.home / "hive" / f"{node}.password").read_text().strip()

    def let_in(self, node: Daemon) -> None:
        """Type what the script said for this node."""
        mine = self.said.partition(f"Then for {node.name} ")[2].partition("\nThen for ")[0]
        commands = [line for line in mine.splitlines() if line.startswith("  cat ")]
        for command in commands:
            here = command.replace(f"ssh {node.name} ", "sh -c ")
            subprocess.run(here, shell=True, check=True, env={**os.environ, "HOME": str(node.home)})
        block = re.search(r"^\[mqtt\]\n(\w+ = .*\n)+", mine, re.M)
        assert block and commands
        before = re.sub(r"\[mqtt\]\nport = \d+\n", block[0], node.config.read_text())
        node.config = node.home / ".config" / "hive" / "hive.toml"
        node.config.write_text(before)
        node.handlers = node.config.with_name("hive-daemon.d")
        node.handlers.mkdir(mode=0o700)

    def denied(self) -> list[str]:
        log = (self.home / "mosquitto.log").read_text()
        return [line for line in log.splitlines() if "Denied" in line]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that the user mosquitto can reach too, where root runs the tests."""
    need_mosquitto()
    made = Path(tempfile.mkdtemp(prefix="hive-mosquitto-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def broker(place: Path) -> Iterator[SetUp]:
    made = SetUp(place, *NODES)
    yield made
    made.stop()


@pytest.fixture
def tls_broker(place: Path) -> Iterator[SetUp]:
    made = SetUp(place, "--tls", *NODES)
    yield made
    made.stop()


def hive_at(hive_of: Callable[..., Hive], broker: SetUp) -> Hive:
    hive = hive_of(broker)
    hive.prefix = PREFIX
    return hive


class Peer:
    """A client that does what it likes, and remembers what it heard and what it was told."""

    def __init__(
        self, broker: SetUp, user: str, password: str, client_id: str = "", expiry: int = 0
    ) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.name, self._codes = user, dict[int, int]()
        self.refused = ""
        self._changed = threading.Condition()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id, protocol=mqtt.MQTTv5)
        if user:
            self._client.username_pw_set(user, password)
        self._client.on_connect = self._connected
        self._client.on_message = self._message
        self._client.on_publish = self._published
        self._client.on_subscribe = self._subscribed
        self._up = False
        properties: Any = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = expiry
        self._client.connect(
            "127.0.0.1", broker.port, clean_start=not expiry, properties=properties
        )
        self._client.loop_start()
        self._until(lambda: self._up or self.refused)

    def _until(self, check: Callable[[], object]) -> None:
        with self._changed:
            assert self._changed.wait_for(check, PATIENCE)

    def _connected(
        self, client: object, userdata: object, flags: object, code: Any, _: Any
    ) -> None:
        with self._changed:
            self._up, self.refused = not code.is_failure, str(code) if code.is_failure else ""
            self._changed.notify_all()
        if code.is_failure:
            self._client.disconnect()

    def _message(self, client: object, userdata: object, message: mqtt.MQTTMessage) -> None:
        with self._changed:
            self.heard.append((message.topic, bytes(message.payload)))
            self._changed.notify_all()

    def _published(self, client: object, userdata: object, mid: int, code: Any, _: Any) -> None:
        with self._changed:
            self._codes[mid] = code.value
            self._changed.notify_all()

    def _subscribed(self, client: object, userdata: object, mid: int, codes: Any, _: Any) -> None:
        with self._changed:
            self._codes[mid] = codes[0].value
            self._changed.notify_all()

    def publish(self, topic: str, payload: bytes | str = "x", retain: bool = False) -> int:
        """Publish at QoS 1; the broker's reason code."""
        with self._changed:
            mid = self._client.publish(topic, payload, 1, retain).mid
        self._until(lambda: mid in self._codes)
        return self._codes.pop(mid)

    def subscribe(self, *topics: str) -> None:
        for topic in topics:
            with self._changed:
                mid = self._client.subscribe(topic, 1)[1]
            assert mid is not None
            self._until(partial(self._codes.__contains__, mid))

    def everything(self) -> list[tuple[str, bytes]]:
        """What it has heard until a message to itself comes round."""
        fence = f"{PREFIX}/{self.name}/response/{self.name}/{len(self.heard)}"
        self.subscribe(fence)
        assert self.publish(fence) == 0
        self._until(lambda: any(topic == fence for topic, _ in self.heard))
        return [one for one in self.heard if "/response/" not in one[0]]

    def end(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def peer(broker: SetUp) -> Iterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def make(user: str, **how: Any) -> Peer:
        made.append(Peer(broker, user, broker.password(user) if user else "", **how))
        return made[-1]

    yield make
    for one in made:
        one.end()


# ---- What is printed ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "config", "listener"),
    [
        ((), "", "listener 1883 127.0.0.1"),
        (("--host", "100.64.0.7"), "", "listener 1883 100.64.0.7"),
        (("--host", "fd7a::7", "--port", "1999"), "", "listener 1999 fd7a::7"),
        (("--tls", "--host", "broker.lan"), "", "listener 8883"),
        (("--tls",), '[mqtt]\nhost = "broker.lan"\nport = 8884\n', "listener 8884"),
        (("--tls", "--host", "192.168.1.4"), "", "listener 8883 192.168.1.4"),
    ],
)
def test_it_listens_where_the_nodes_will_look(
    arguments: tuple[str, ...], config: str, listener: str
) -> None:
    lines = script(*arguments, config=config).splitlines()
    assert [line for line in lines if line.startswith("listener")] == [listener]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ("--host", "broker.lan"),
            "broker.lan may be anywhere, and without TLS everyone on the way reads along; say"
            " --tls, or the address of this machine in your VPN: --host 100.64.0.7",
        ),
        (
            ("--host", "0.0.0.0"),
            "--host 0.0.0.0: say the one address or name that the nodes will use",
        ),
        (("--host", "0::0"), "--host 0::0: say the one address or name that the nodes will use"),
        (
            ("--tls", "--host", "$(id)"),
            "--host '$(id)': neither a host's name nor an address",
        ),
        (
            ("alpha:main",),
            "argument NODE: 'alpha:main' is not a name: 1 to 63 of A-Za-z0-9._- , not all, any,"
            " meta, state, roster or a channel's; see: hive-cli broker --help",
        ),
    ],
)
def test_what_would_not_be_safe_is_refused(arguments: tuple[str, ...], error: str) -> None:
    assert script(*arguments, code=2) == f"hive: {error}\n"


def test_without_names_it_serves_this_node() -> None:
    config = '[node]\nid = "alpha"\ntopic_prefix = "a/b"\n'
    text = script(config=config)
    assert '\nset -- alpha "$@"\n' in text
    assert text == script("alpha", "alpha", config=config)


def test_a_largest_message_goes_through() -> None:
    longest = 200 + 63 + 9 + 64 * module.KIB  # prefix, name, channel; then what else there may be
    assert module.MAX_PAYLOAD + longest <= module.MAX_PACKET


def test_a_machine_whose_name_is_no_hosts_needs_another() -> None:
    config = module.make_config({"node": {"id": "alpha"}}, None, {})
    assert module.mosquitto_setup(config, [], True, "mini.lan").host == "mini.lan"
    with pytest.raises(module.UsageError, match="neither a host's name"):
        module.mosquitto_setup(config, [], True, "it's my mac")


# ---- What is written ---------------------------------------------------------------------


def test_only_who_must_can_read_what_is_written(tls_broker: SetUp) -> None:
    folder = tls_broker.home / "hive"
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    public = {"ca.pem", "server.pem"}
    assert public | {"passwords", "acl", "ca.key", "server.key"} <= modes.keys()
    for name, mode in modes.items():
        assert mode == (0o644 if name in public else 0o600), name
    assert not folder.stat().st_mode & 0o022
    for node in ("alpha", "beta"):
        secret = tls_broker.password(node)
        assert len(secret) == 48 and secret not in tls_broker.said
        assert secret not in (folder / "passwords").read_text()
    assert tls_broker.password("alpha") != tls_broker.password("beta")


def test_run_again_it_keeps_everything_and_adds_a_node(tls_broker: SetUp) -> None:
    folder = tls_broker.home / "hive"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "alpha.password").unlink()  # alpha has it
    said = tls_broker.run("gamma")
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    old = before.pop("passwords")
    assert after["passwords"].startswith(old) and b"\ngamma:$" in after["passwords"]
    del before["alpha.password"]
    assert before.items() <= after.items() and "alpha.password" not in after
    assert "Then for alpha" not in said and "Then for gamma" in said
    assert not (tls_broker.home / "mosquitto.conf.before-hive").exists()


def test_what_was_configured_before_is_kept_beside_it(place: Path) -> None:
    (place / "etc").mkdir()
    (place / "etc" / "mosquitto.conf").write_text("listener 1\n")
    broker = SetUp(place, "alpha")
    try:
        broker.run()
        assert (broker.home / "mosquitto.conf.before-hive").read_text() == "listener 1\n"
    finally:
        broker.stop()


def test_another_host_gets_another_certificate_from_the_same_authority(tls_broker: SetUp) -> None:
    folder = tls_broker.home / "hive"
    authority = (folder / "ca.pem").read_bytes()
    tls_broker.text = script("--tls", "--host", "broker.lan", *NODES)
    tls_broker.run()
    openssl = shutil.which("openssl")
    assert openssl
    check = [openssl, "verify", "-CAfile", f"{folder}/ca.pem", "-x509_strict"]
    for name in ("broker.lan", "localhost"):
        named = [*check, "-verify_hostname", name, f"{folder}/server.pem"]
        assert subprocess.run(named, capture_output=True).returncode == 0, name
    assert (folder / "ca.pem").read_bytes() == authority


@pytest.mark.parametrize("bad", ["all", "a b", "x:y", "-x", ""])
def test_a_name_that_no_node_has_is_refused_by_the_script(place: Path, bad: str) -> None:
    done = subprocess.run(
        ["sh", "-s", "--", bad],
        input=script(*NODES),
        env={"PATH": path_with_mosquitto(), "ETC": f"{place}/etc", "DATA": f"{place}/data"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, f"sh: {bad}: not a node's name\n")
    assert not [*place.iterdir()]


def test_two_at_once_do_not_write_into_each_others_files(place: Path) -> None:
    where = {"PATH": path_with_mosquitto(), "ETC": f"{place}/etc", "DATA": f"{place}/data"}
    text = script(*NODES)
    several = [
        subprocess.Popen(
            ["sh", "-s"], stdin=-1, stdout=-1, stderr=subprocess.PIPE, text=True, env=where
        )
        for _ in range(4)
    ]
    for each in several:
        with contextlib.suppress(BrokenPipeError):
            assert each.stdin
            each.stdin.write(text)
            each.stdin.close()
            each.stdin = None
    for each in several:
        errors = each.communicate(timeout=PATIENCE)[1]
        refused = f"sh: another one is at work here; if that is not so: rmdir {place}/etc/hive/lock"
        assert (each.returncode, errors) in ((0, ""), (1, refused + "\n"))
    passwords = (place / "etc" / "hive" / "passwords").read_text()
    assert [line.partition(":")[0] for line in passwords.splitlines()] == ["alpha", "beta"]
    assert not (place / "etc" / "hive" / "lock").exists()


# ---- Life under it -----------------------------------------------------------------------

PING = "#!/bin/sh\necho pong\n"


def test_a_hive_lives_under_it(
    hive_of: Callable[..., Hive], broker: SetUp, fast_agent: Path
) -> None:
    hive = hive_at(hive_of, broker)
    main = f'[[oc_instances]]\nname = "main"\ncommand = ["{fast_agent}", "{{text}}"]\n'
    alpha, beta = hive.node("alpha", main), hive.node("beta")
    for node in (alpha, beta):
        broker.let_in(node)
        node.handler("ping", PING)
        node.start()
    asked = ("send", "--action", "ping", "--text", "x", "--wait", "20", "--to")
    assert hive.cli("alpha", *asked, "beta").stdout == "pong\n"
    assert hive.cli("beta", *asked, "main").stdout == "pong\n"  # an agent's name is its node's
    both = hive.cli("beta", *asked, "all").stdout
    assert sorted(both.splitlines()) == ["alpha: pong", "beta: pong"]

    sent = hive.cli("beta", "send", "--to", "main", "--text", "who is there?", "--json")
    eventually("the agent is woken", lambda: calls_of(fast_agent))
    hive.cli("alpha", "reply", "--to-msg", json.loads(sent.stdout)["id"], "--text", "I am")
    beta.logged("received", ch="response", **{"from": "alpha"})

    def statuses() -> dict[str, str]:
        rows = json.loads(hive.cli("beta", "status", "--json").stdout)
        return {row["name"]: row["status"] for row in rows}

    online = dict.fromkeys(("alpha", "beta", "main"), "online")
    eventually("all are online", lambda: beta.statuses() == online)
    assert statuses().keys() == {"alpha", "beta", "main"}
    assert [row["node"] for row in json.loads(hive.cli("beta", "roster", "--json").stdout)] == [
        "alpha",
        "beta",
    ]
    beta.stop(signal.SIGKILL)
    alpha.logged("peer is lost", peer="beta")
    alpha.logged("sent", ch="alert", to="all")
    beta.start()
    alpha.logged("peer is back", peer="beta")
    alpha.stop()
    beta.logged("peer has stopped", peer="alpha")
    assert statuses() == {"alpha": "offline", "beta": "online", "main": "offline"}
    assert not [row for node in (alpha, beta) for row in node.events("not published")]
    assert not broker.denied()


def test_who_died_while_the_broker_was_away_is_lost_to_its_peer_and_written_down_by_nobody(
    hive_of: Callable[..., Hive], broker: SetUp
) -> None:
    hive = hive_at(hive_of, broker)
    alpha, beta = hive.node("alpha"), hive.node("beta")
    for node in (alpha, beta):
        broker.let_in(node)
        node.start()

    def statuses(*how: str) -> list[str]:
        rows = json.loads(hive.cli("alpha", "status", "--json", *how).stdout)
        return [row["status"] for row in rows if row["name"] == "beta"]

    eventually("alpha sees beta", lambda: statuses() == statuses("--direct") == ["online"])
    saved = broker.place / "data" / "mosquitto.db"
    eventually("it is", saved.exists)
    eventually("it is saved", lambda: b"meta/beta/state" in saved.read_bytes())
    broker.stop(signal.SIGKILL)
    beta.stop(signal.SIGKILL)
    broker.start()
    alpha.logged("peer is lost", peer="beta")
    assert statuses() == ["offline"]  # to alpha
    eventually("it is by its own last word", lambda: statuses("--direct") == ["stale"])
    assert not broker.denied()


# ---- Attacks -----------------------------------------------------------------------------


def test_nobody_gets_in_without_the_right_password(broker: SetUp) -> None:
    right = broker.password("alpha")
    for user, password in (("", ""), ("alpha", ""), ("alpha", "x"), ("beta", right), ("x", right)):
        intruder = Peer(broker, user, password)
        assert intruder.refused == "Not authorized", (user, password)
        intruder.end()


def test_a_node_is_no_admin_and_writes_no_others_documents(
    broker: SetUp, peer: Callable[..., Peer]
) -> None:
    alpha, beside, beta = peer("alpha"), peer("alpha"), peer("beta")
    alpha.subscribe("$SYS/#", "$CONTROL/#")
    forbidden = [
        "$CONTROL/dynamic-security/v1",
        "$SYS/broker/uptime",
        f"{PREFIX}/meta/beta/roster",
        f"{PREFIX}/meta/beta/ping",
        f"{PREFIX}/meta/beta/state/more",
        f"{PREFIX}/meta/beta/state",
        f"{PREFIX}/meta/main/state",
        f"{PREFIX}/meta/beta/alpha",
        f"{PREFIX}/beta/response/alpha/private",
        f"{PREFIX}/beta/command/beta",
        f"{PREFIX}/beta/command",
        f"{PREFIX}/all/heartbeat",
        f"{PREFIX}/beta/gossip/alpha",
        PREFIX,
        f"{PREFIX}/beta",
        "other/beta/command/alpha",
        "lab/beta/command/alpha",
    ]
    # One connection for each: Mosquitto ends it after a refusal.
    said = {topic: peer("alpha").publish(topic) for topic in forbidden}
    assert said == dict.fromkeys(forbidden, NOT_AUTHORIZED)
    needed = [
        f"{PREFIX}/beta/command/alpha",
        f"{PREFIX}/all/alert/alpha",
        f"{PREFIX}/meta/alpha/state",
        f"{PREFIX}/meta/alpha/roster",
        f"{PREFIX}/meta/alpha/ping",
    ]
    assert not [topic for topic in needed if beside.publish(topic) >= 0x80]
    assert not alpha.everything() and not beta.everything()


def test_a_node_cannot_read_what_is_addressed_to_another(
    broker: SetUp, peer: Callable[..., Peer]
) -> None:
    greedy = (
        "#",
        "+/+/+/+",
        f"{PREFIX}/#",
        f"{PREFIX}/+/command",
        f"{PREFIX}/alpha/+",
        f"{PREFIX}/alpha/command",
        f"{PREFIX}/alpha/response/+",
        f"{PREFIX}/alpha/+/+",
        f"{PREFIX}/alpha/response/alpha/+",
        f"$share/group/{PREFIX}/alpha/+/+",
    )
    alpha, beta = peer("alpha"), peer("beta")
    beta.subscribe(*greedy)
    alpha.subscribe(f"{PREFIX}/alpha/+/+")
    mine = [f"{PREFIX}/alpha/command/alpha", f"{PREFIX}/alpha/alert/alpha"]
    hidden = [*mine, f"{PREFIX}/alpha/response/alpha/private"]
    for topic in hidden:
        assert alpha.publish(topic, "for alpha only", retain=True) < 0x80
    assert alpha.publish(f"{PREFIX}/all/command/alpha", "for all") == 0
    assert {payload for _, payload in beta.everything()} == {b"for all"}
    beta.subscribe(*greedy)  # the retained ones come now, if they do
    assert {payload for _, payload in beta.everything()} == {b"for all"}
    assert [topic for topic, _ in alpha.everything()] == mine


def test_who_takes_over_anothers_session_does_not_get_what_waits_in_it(
    broker: SetUp, peer: Callable[..., Peer]
) -> None:
    alpha = peer("alpha", client_id="session", expiry=600)
    alpha.subscribe(f"{PREFIX}/alpha/+/+")
    alpha.end()
    beta = peer("beta")
    assert beta.publish(f"{PREFIX}/alpha/command/beta", "for alpha only") == 0
    thief = peer("beta", client_id="session", expiry=600)
    assert not thief.everything()


# ---- What it keeps -----------------------------------------------------------------------


def test_what_was_acknowledged_survives_kill_9_of_mosquitto(
    broker: SetUp, peer: Callable[..., Peer]
) -> None:
    beta = peer("beta", client_id="away", expiry=600)
    beta.subscribe(f"{PREFIX}/beta/+/+")
    beta.end()
    alpha = peer("alpha")
    sent = [f"message {number}" for number in range(1200)]  # Mosquitto's default keeps 1000
    codes = {alpha.publish(f"{PREFIX}/beta/command/alpha", text) for text in sent}
    assert codes == {0}
    saved = broker.place / "data" / "mosquitto.db"
    last = sent[-1].encode()
    within = module.UNSAVED_SECONDS  # for what is younger a daemon sends again
    eventually("it is saved", lambda: saved.exists() and last in saved.read_bytes(), within)
    broker.stop(signal.SIGKILL)
    broker.start()
    back = peer("beta", client_id="away", expiry=600)
    found = [payload.decode() for _, payload in back.everything()]
    assert found == sent


# ---- TLS ---------------------------------------------------------------------------------


def test_over_tls_a_node_with_the_authority_connects_and_one_without_says_why(
    hive_of: Callable[..., Hive], tls_broker: SetUp
) -> None:
    hive = hive_at(hive_of, tls_broker)
    alpha, beta = hive.node("alpha"), hive.node("beta")
    for node in (alpha, beta):
        tls_broker.let_in(node)
    beta.handler("ping", PING)
    beta.start()
    asked = ("send", "--to", "beta", "--action", "ping", "--text", "x", "--wait", "20")
    assert hive.cli("alpha", *asked).stdout == "pong\n"
    with_authority = alpha.config.read_text()
    assert 'ca_file = "mqtt-ca.pem"\n' in with_authority
    alpha.config.write_text(with_authority.replace('ca_file = "mqtt-ca.pem"\n', ""))
    refused = hive.cli("alpha", *asked, code=3)
    assert refused.stdout == "" and refused.stderr.count("\n") == 1
    assert "certificate verify failed" in refused.stderr
    assert "ca_file" in refused.stderr
    alpha.start(wait=False)
    alpha.logged("no broker, trying again")


# ---- Word for word -----------------------------------------------------------------------

LISTENER = {
    "plain": ["listener 1883 fd7a::7"],
    "tls": [
        "listener 8883",
        "certfile $etc/hive/server.pem",
        "keyfile $etc/hive/server.key",
        "tls_version tlsv1.2",
    ],
}
CONF = """\
allow_anonymous false
password_file $etc/hive/passwords
acl_file $etc/hive/acl
persistence true
persistence_location $data/
autosave_interval 1
autosave_on_changes false
max_queued_messages 1000000000
persistent_client_expiration 7d
max_packet_size 1708032"""
ACL = """\
pattern read lab/%u/+/+
pattern read lab/all/+/+
pattern read lab/meta/+/+
pattern write lab/+/command/%u
pattern write lab/+/response/%u
pattern write lab/+/sync/%u
pattern write lab/+/heartbeat/%u
pattern write lab/+/status/%u
pattern write lab/+/alert/%u
pattern write lab/meta/%u/+
pattern readwrite lab/%u/response/%u/+"""
TOML = {
    "plain": """\
[mqtt]
host = "fd7a::7"
port = 1883
username = "$node"
password_file = "mqtt-password"
senders = "checked\"""",
    "tls": """\
[mqtt]
host = "broker.lan"
port = 8883
username = "$node"
password_file = "mqtt-password"
senders = "checked"
tls = true
ca_file = "mqtt-ca.pem\"""",
}


def part(text: str, begin: str) -> list[str]:
    """A file within the script, without what is only for its reader."""
    inside = text.partition(begin)[2].partition("\n")[2].partition("\nEND\n")[0]
    return [line for line in inside.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("plain", ("--host", "fd7a::7")), ("tls", ("--tls", "--host", "broker.lan"))],
)
def test_what_the_script_writes_is_this(kind: str, arguments: tuple[str, ...]) -> None:
    text = script(*arguments, "--prefix", "lab", *NODES)
    conf = part(text, 'put "$etc/mosquitto.conf" 644 <<END')
    assert conf == [*LISTENER[kind], *CONF.splitlines()]
    assert part(text, """put "$etc/hive/acl" 600 <<'END'""") == ACL.splitlines()
    assert TOML[kind] in text
    assert ("No TLS" in text) is (kind == "plain")
    assert "@" not in re.sub(r'"\$@"|\$@', "", text)  # everything is filled in
    assert subprocess.run(["sh", "-n"], input=text, text=True).returncode == 0


def test_a_certificate_is_for_the_name_that_the_nodes_use_and_for_this_machine() -> None:
    for host, names in (
        ("broker.lan", "DNS:broker.lan,DNS:localhost,IP:127.0.0.1"),
        ("192.168.1.4", "IP:192.168.1.4,DNS:localhost,IP:127.0.0.1"),
        ("fd7a::7", "IP:fd7a::7,DNS:localhost,IP:127.0.0.1"),
        ("127.0.0.1", "IP:127.0.0.1,DNS:localhost"),
        ("localhost", "DNS:localhost,IP:127.0.0.1"),
    ):
        assert f"\nnames='{names}'\n" in script("--tls", "--host", host)
    long = ".".join(["x" * 30] * 3)
    assert f"\nCN = {long[:64]}\n" in script("--tls", "--host", long)
