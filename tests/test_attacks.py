"""What a member that has turned can do to the others with its own valid password: nothing.

Mallory was invited and has joined, has what every node has, and speaks raw MQTT.  Each attack must
be refused, and leave the victims unharmed, whose daemons run all the while.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from carrier import HERE, Carrier, Machine
from conftest import PATIENCE, Broker, Daemon, Hive, calls_of, eventually, need_mosquitto
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from raw_mqtt import publish_packet
from test_mosquitto import NOT_AUTHORIZED, PREFIX, SetUp

import hive as module

NODES = ("alpha", "beta", "gamma", "mallory")
COUNT = "#!/bin/sh\necho x >>../runs\necho counted\n"
FLOOD = 2_000  # messages of one member
RATE, BURST = 20, 200  # a second that it may send, and at once: less than a busy machine passes on
BATCH = 1000  # of them between looks at what the broker says


class WithPasswords(Broker):
    """A hive that `host` made and each node has joined: it is known by its password."""

    address = HERE

    def __init__(self, place: Path) -> None:
        self.home, self._process = place, None
        self._carrier = Carrier(place / "alpha")
        self._carrier.where += ("--prefix", PREFIX)
        self._machines: dict[str, Machine] = {"alpha": self._carrier}
        self.port = self._carrier.port
        self._carrier.carry()

    def stop(self, number: int = signal.SIGTERM) -> None:
        self._carrier.close()

    def _account(self, name: str) -> module.MqttConfig:
        """What is in the hive.toml of a node, which joins if it has not yet."""
        if name not in self._machines:
            self._machines[name] = machine = Machine(self.home / name, name)
            machine.run("join", "-", stdin=self._carrier.invite(name))
        return module.load_config(str(self._machines[name].config)).mqtt

    def admit(self, client: mqtt.Client, user: str) -> None:
        account = self._account(user)
        client.tls_set(str(account.ca_file))
        client.username_pw_set(user, account.password)

    def settings(self, node: Daemon) -> str:
        account = self._account(node.name)
        return (
            f'host = "{account.host}"\ntls = true\nca_file = "{account.ca_file}"\n'
            f'username = "{account.username}"\npassword_file = "{account.password_file}"\n'
        )


class WithCertificates(SetUp):
    """A broker that knows a node by its certificate, as the README has it."""

    address = "127.0.0.1"

    def __init__(self, place: Path) -> None:
        super().__init__(place, "--tls", *NODES)
        self.stop()
        self._folder = folder = self.home / "hive"
        openssl = shutil.which("openssl")
        assert openssl
        for node in NODES:
            new = "req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout"
            request = [*new.split(), f"{node}.key", "-out", "new", "-subj", f"/CN={node}"]
            sign = f"x509 -req -in new -CA ca.pem -CAkey ca.key -days 9 -out {node}.pem".split()
            for arguments in (request, [*sign, "-set_serial", str(NODES.index(node) + 2)]):
                subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True)
        conf = self.home / "mosquitto.conf"
        conf.write_text(
            conf.read_text().replace(
                "allow_anonymous false\n",
                f"cafile {folder}/ca.pem\nrequire_certificate true\n"
                "use_identity_as_username true\nallow_anonymous false\n",
            )
        )
        self.start()

    def admit(self, client: mqtt.Client, user: str) -> None:
        own = self._folder / user
        client.tls_set(f"{self._folder}/ca.pem", f"{own}.pem", f"{own}.key")

    def settings(self, node: Daemon) -> str:
        for name in ("ca.pem", f"{node.name}.pem", f"{node.name}.key"):
            shutil.copy(self._folder / name, node.home / name)
        return (
            f'tls = true\nca_file = "ca.pem"\ncert_file = "{node.name}.pem"\n'
            f'key_file = "{node.name}.key"\n'
        )


class Member:
    """A connection of a member, which does what it likes."""

    def __init__(
        self,
        broker: WithPasswords | WithCertificates,
        user: str = "mallory",
        client_id: str = "",
        clean: bool = True,
        will: tuple[str, bytes] | None = None,
        prefix: str = PREFIX,
    ) -> None:
        self._prefix = prefix
        self.user, self.heard = user, list[mqtt.MQTTMessage]()
        self._codes, self._changed = dict[int | str, int](), threading.Condition()
        self.client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id,
            protocol=mqtt.MQTTv5,
            reconnect_on_failure=False,
        )
        broker.admit(self.client, user)
        if will:
            self.client.will_set(*will, 1, True)
        self.client.on_connect = partial(self._note, "up")
        self.client.on_disconnect = partial(self._note, "down")
        self.client.on_publish = lambda c, u, mid, code, p: self._note(mid, code)
        self.client.on_subscribe = lambda c, u, mid, codes, p: self._note(mid, codes[0])
        self.client.on_message = lambda c, u, message: self._note(message, None)
        properties: Any = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 0 if clean else 600
        self.client.connect(broker.address, broker.port, clean_start=clean, properties=properties)
        self.client.loop_start()
        self._until(lambda: "up" in self._codes)

    def _note(self, what: Any, *said: Any) -> None:
        with self._changed:
            if isinstance(what, mqtt.MQTTMessage):
                self.heard.append(what)
            else:
                self._codes[what] = getattr(said[0], "value", 0)
            self._changed.notify_all()

    def _until(self, check: Callable[[], object]) -> None:
        with self._changed:
            assert self._changed.wait_for(check, PATIENCE)

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> int:
        """The broker's reason code, or -1 where it hung up."""
        mid = self.client.publish(f"{self._prefix}/{topic}", payload, 1, retain).mid
        self._until(lambda: mid in self._codes or "down" in self._codes)
        return self._codes.pop(mid, -1)

    def subscribe(self, *filters: str) -> None:
        for filter in filters:
            mid = self.client.subscribe(filter, 1)[1]
            self._until(lambda mid=mid: mid in self._codes)  # type: ignore[misc]

    def everything(self) -> list[mqtt.MQTTMessage]:
        """What it has heard until a message to itself comes round."""
        fence = f"{self.user}/response/{self.user}/fence{len(self.heard)}"
        self.subscribe(f"{self._prefix}/{fence}")
        assert self.publish(fence, b"x") == 0
        self._until(lambda: any(one.topic.endswith(fence) for one in self.heard))
        return [one for one in self.heard if "/fence" not in one.topic]

    def die(self) -> None:
        """Without a goodbye: the broker publishes the will."""
        sock: Any = self.client.socket()
        if sock:
            sock.shutdown(socket.SHUT_RDWR)
        self.client.loop_stop()

    def end(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class Scene:
    """Alpha and beta at work, and mallory among them."""

    def __init__(self, home: Path, broker: WithPasswords | WithCertificates) -> None:
        self.broker, self.hive = broker, Hive(home, broker, PREFIX, interval=2.0)
        self.hive.forks = True
        self.agent = home / "openclaw"
        self.agent.write_text(
            "#!/usr/bin/env python3\nimport json, os, sys\n"
            f"with open({str(home / 'calls.jsonl')!r}, 'a') as file:\n"
            "    print(json.dumps({'argv': sys.argv[1:]}), file=file)\n"
        )
        self.agent.chmod(0o755)
        main, other = (
            f'[[oc_instances]]\nname = "{name}"\ncommand = ["{self.agent}", "{{text}}"]\n'
            for name in ("main", "private")
        )
        rules = f'{other}allow = ["beta"]\n[handlers.deploy]\nallow = ["beta"]\n'
        rules += '[journal]\nshare = ["beta"]\nshare_texts = true\n'
        self.alpha, self.beta = self.node("alpha", main + rules), self.node("beta")
        for node in (self.alpha, self.beta):
            node.handler("count", COUNT)
            node.handler("deploy", COUNT)
        self.members: list[Member] = []

    def start(self) -> None:
        self.alpha.start()
        self.beta.start()
        self.alpha.logged("peer is up", peer="beta")

    def node(self, name: str, extra: str = "") -> Daemon:
        node = self.hive.node(name, extra)
        said = node.config.read_text()
        more = f'senders = "checked"\n{self.broker.settings(node)}'
        said = said.replace(self.hive.mqtt + "\n", f"{self.hive.mqtt}\n{more}")
        limits = f"sender_rate = {RATE}\nsender_burst = {BURST}"
        node.config.write_text(said.replace("[node]\n", f"[node]\n{limits}\n"))
        return node

    def member(self, user: str = "mallory", **how: Any) -> Member:
        self.members.append(Member(self.broker, user, **how))
        return self.members[-1]

    def forge(self, topic: str, payload: bytes, retain: bool = False) -> int:
        """On a connection of its own: the broker may end it."""
        return self.member().publish(topic, payload, retain)

    def runs(self) -> int:
        file = self.alpha.home / "runs"
        return len(file.read_text().split()) if file.exists() else 0

    def ask(self, node: Daemon, do: str, /, **more: object) -> dict[str, Any]:
        """What a command would ask of a node's daemon, and get; with `wait`, the answer."""
        client = module.connect_to_daemon(module.load_config(str(node.config)), PATIENCE)
        assert client
        with contextlib.closing(client):
            said = client.ask({"do": do, **more})
            while more.get("wait") and "answer" not in said:
                said = client.receive(PATIENCE) or {"answer": None}
            return said

    def send(self, to: str, ch: str, wait: bool = False, **more: Any) -> dict[str, Any]:
        """Beta says something."""
        said = module.Envelope.new("beta", to, ch, "x", **more).document()
        return self.ask(self.beta, "send", envelope=said, wait=wait)

    def status(self) -> dict[str, tuple[str, str]]:
        """How all are to beta, and whose they are."""
        states = self.ask(self.beta, "states")["states"]
        rows = module.status_rows(states, module.HeartbeatConfig(), time.time())
        return {row.name: (row.status, row.node) for row in rows if row.name != "mallory"}

    def harm(self) -> dict[str, Any]:
        """All that an attack might change."""
        rosters = self.ask(self.beta, "roster")["rosters"]
        can = {name: (one["agents"], one["handlers"]) for name, one in rosters.items()}
        can.pop("mallory", None)
        return {
            "status": self.status(),
            "rosters": can,
            "runs": self.runs(),
            "told": len(calls_of(self.agent)),
            "pending": self.ask(self.alpha, "pending"),
            "outages": len(self.alpha.events("no broker, trying again")),
        }

    def fence(self) -> None:
        """All that was published before has been dealt with: alpha answers."""
        answer = self.send("alpha", "command", wait=True, action="count")["answer"]
        assert answer["text"] == "counted"
        eventually("it knows", lambda: not self.ask(self.alpha, "pending")["outbox_size"])
        (self.alpha.home / "runs").unlink()

    def close(self) -> None:
        for member in self.members:
            member.end()
        self.hive.close()


@pytest.fixture(scope="module", params=[WithPasswords, WithCertificates])
def stage(request: pytest.FixtureRequest) -> Iterator[Scene]:
    need_mosquitto()
    place = Path(tempfile.mkdtemp(prefix="hive-attacks-"))
    place.chmod(0o755)
    (place / "home").mkdir()
    broker = request.param(place)
    made = Scene(place / "home", broker)
    try:
        made.start()
        yield made
    finally:
        made.close()
        broker.stop()
        shutil.rmtree(place)


@pytest.fixture
def scene(stage: Scene) -> Iterator[Scene]:
    """Unharmed before, and after."""
    stage.fence()
    before = stage.harm()
    yield stage
    for member in stage.members:
        member.end()
    stage.members.clear()
    stage.fence()
    after = stage.harm()
    assert after == before


def envelope(sender: str, to: str, ch: str, text: str = "forged", **more: Any) -> bytes:
    return module.Envelope.new(sender, to, ch, text, **more).encode()


def heartbeat(name: str, **more: Any) -> bytes:
    text = json.dumps({"node_id": name, "interval": 0.5, "boot": "mallory", **more})
    return envelope(name, "all", "heartbeat", text, urgency="later")


def state(name: str, **more: Any) -> bytes:
    said = {"node_id": name, "daemon_node": name, "status": "online", "last_seen": int(time.time())}
    return json.dumps({**said, "interval": 0.5, **more}).encode()


def dropped(node: Daemon, payload: bytes) -> str:
    """Why a node did not act upon an envelope."""
    return str(node.logged("dropped", id=json.loads(payload)["id"])["why"])


# ---- To speak in another's name ----------------------------------------------------------


@pytest.mark.parametrize("ch", [*module.CHANNELS])
def test_no_envelope_can_be_forged(scene: Scene, ch: str) -> None:
    action = "count" if ch in ("command", "sync") else None
    for to in ("alpha", "all", "main"):
        forged = [envelope("beta", to, ch, "{}", action=action) for _ in range(4)]
        for place, payload in zip((f"{ch}/beta", ch, f"{ch}/mallory/beta"), forged, strict=False):
            assert scene.forge(f"{to}/{place}", payload) in (NOT_AUTHORIZED, -1)
        node = "alpha" if to == "main" else to
        assert scene.forge(f"{node}/{ch}/mallory", forged[3]) == 0  # which is its own topic
        assert dropped(scene.alpha, forged[3]) == "its topic names another sender"
        for payload in forged[:3]:
            assert not scene.alpha.events("received", id=json.loads(payload)["id"])


def test_no_agent_can_be_spoken_for_by_who_lists_its_name(scene: Scene) -> None:
    roster = {"node": "mallory", "agents": ["main", "alpha", "beta", "mine"]}
    assert scene.forge("meta/mallory/roster", json.dumps(roster).encode(), retain=True) == 0
    scene.alpha.logged("agent is another's", agent="main", claimed_by="mallory")
    for name in ("main", "beta"):
        forged = envelope(name, "alpha", "command", action="count")
        assert scene.forge("alpha/command/mallory", forged) == 0
        assert dropped(scene.alpha, forged) == "its topic names another sender"
    greedy = scene.member()
    greedy.subscribe(f"{PREFIX}/mallory/#")
    scene.send("main", "status", urgency="later")
    scene.fence()
    assert not greedy.everything()
    gamma = scene.hive.nodes.get("gamma") or scene.node("gamma")
    refused = scene.hive.cli(gamma.name, "send", "--to", "main", "--text", "x", code=1).stderr
    assert "listed by" in refused and "alpha" in refused and "mallory" in refused
    genuine = envelope("mine", "alpha", "status", urgency="later")
    assert scene.forge("alpha/status/mallory", genuine) == 0
    scene.alpha.logged("received", id=json.loads(genuine)["id"])
    assert scene.forge("meta/mallory/roster", b"", retain=True) == 0


@pytest.mark.parametrize(
    "topic",
    ["alpha/state", "main/state", "alpha/roster", "alpha/count", "ghost/state", "beta/mallory"],
)
def test_nobody_writes_anothers_documents(scene: Scene, topic: str) -> None:
    for payload in (state("alpha", status="offline", reason="stopped"), b"", b"x" * 70_000):
        assert scene.forge(f"meta/{topic}", payload, retain=True) in (NOT_AUTHORIZED, -1)


def test_a_will_is_no_way_to_anothers_topic(scene: Scene) -> None:
    gone = state("alpha", status="offline", reason="connection lost")
    with contextlib.suppress(OSError, AssertionError):  # refused at once, or when it dies
        scene.member(will=(f"{PREFIX}/meta/alpha/state", gone)).die()
    command = envelope("beta", "alpha", "command", action="count")
    with contextlib.suppress(OSError, AssertionError):
        scene.member(will=(f"{PREFIX}/alpha/command/beta", command)).die()
    watching = scene.member()
    watching.subscribe(f"{PREFIX}/meta/alpha/state")
    scene.fence()
    said = [json.loads(one.payload)["status"] for one in watching.everything()]
    assert set(said) == {"online"}


def test_what_was_overheard_cannot_be_said_again(scene: Scene) -> None:
    listening = scene.member()
    listening.subscribe(f"{PREFIX}/all/+/+")
    scene.send("all", "sync", urgency="later")
    eventually("it is heard", lambda: [one for one in listening.heard if "/sync/" in one.topic])
    [heard] = [one for one in listening.heard if "/sync/" in one.topic]
    fresh = json.dumps({**json.loads(heard.payload), "id": module.new_id()}).encode()
    for payload in (bytes(heard.payload), fresh):
        assert scene.forge("all/sync/beta", payload) in (NOT_AUTHORIZED, -1)
        assert scene.forge("all/sync/mallory", payload) == 0
    assert dropped(scene.alpha, fresh) == "its topic names another sender"


def test_nobody_uses_up_the_id_of_anothers_message(scene: Scene) -> None:
    for to in ("alpha", "all"):
        chosen = module.new_id()
        taken = envelope("mallory", to, "status", urgency="later", id=chosen)
        assert scene.forge(f"{to}/status/mallory", taken) == 0
        scene.alpha.logged("received", id=chosen)
        assert scene.send("alpha", "command", wait=True, action="count", id=chosen)["answer"]
    (scene.alpha.home / "runs").unlink()


def test_what_only_another_may_do_is_refused(scene: Scene) -> None:
    asking = scene.member()
    asking.subscribe(f"{PREFIX}/mallory/+/+")
    for ch in ("command", "sync", "alert"):  # where its topic is its own, and the word is not
        forged = envelope("beta", "alpha", ch, action=None if ch == "alert" else "deploy")
        assert asking.publish(f"alpha/{ch}/mallory", forged) == 0
        assert dropped(scene.alpha, forged) == "its topic names another sender"
    rules = {
        "[handlers.deploy] allow does not name mallory": ("alpha", {"action": "deploy"}),
        "allow of [[oc_instances]] private does not name mallory": ("private", {}),
    }
    for rule, (to, more) in rules.items():
        asked = envelope("mallory", to, "command", **more)
        assert asking.publish("alpha/command/mallory", asked) == 0
        assert scene.alpha.logged("received", id=json.loads(asked)["id"])["note"] == rule
    eventually("both are told", lambda: len(asking.heard) == len(rules))
    answers = [json.loads(one.payload) for one in asking.everything()]
    assert [one["ch"] for one in answers] == ["alert"] * len(rules)
    assert all(rule in one["text"] for rule, one in zip(rules, answers, strict=True))


# ---- To take what is another's -----------------------------------------------------------


def test_nobody_reads_a_journal_that_is_not_for_it(scene: Scene) -> None:
    asked = {"action": module.READ_JOURNAL, "text": '{"last": 100}'}
    shown = scene.ask(scene.beta, "read_journal", wait=True, node="alpha", exchange="e-1")
    assert json.loads(shown["answer"]["text"])["rows"]
    mallory = scene.member()
    mallory.subscribe(f"{PREFIX}/mallory/+/+", f"{PREFIX}/beta/response/+")
    for sender, topic in (("beta", "beta"), ("beta", "mallory"), ("mallory", "mallory")):
        scene.forge(f"alpha/command/{topic}", envelope(sender, "alpha", "command", **asked))
    scene.fence()
    (refusal,) = mallory.everything()
    rule = "[journal] share does not name mallory"
    assert json.loads(refusal.payload)["text"] == f"alpha: {module.READ_JOURNAL} refused: {rule}"


def test_nobody_reads_anothers_mail(scene: Scene) -> None:
    greedy = scene.member()
    own = f"{PREFIX}/alpha"
    shared = f"$share/x/{own}/+/+"
    greedy.subscribe("#", "+/+/+/+/+", f"{own}/#", f"{own}/+/+", f"{own}/response/alpha/+", shared)
    scene.fence()
    assert not [one.topic for one in greedy.everything() if one.topic.startswith(f"{own}/")]


@pytest.mark.parametrize("clean", [True, False])
def test_nobody_takes_anothers_session(scene: Scene, clean: bool) -> None:
    plain = f"{PREFIX}/alpha".replace("/", ":")
    connects = len(scene.alpha.events("connected"))
    thieves = [scene.member(client_id=one, clean=clean) for one in (plain, f"{plain}:", "alpha")]
    assert scene.alpha.stop() == 0
    scene.send("alpha", "command", action="count")
    for thief in thieves:
        thief.end()
    thieves = [scene.member(client_id=one, clean=clean) for one in (plain, f"{plain}:")]
    scene.alpha.start()
    eventually("what waited has come", scene.runs)
    assert not [one for thief in thieves for one in thief.heard]
    (scene.alpha.home / "runs").unlink()
    assert len(scene.alpha.events("connected")) == connects + 1
    scene.beta.logged("peer has stopped", peer="alpha")
    eventually("beta sees alpha", lambda: scene.status()["alpha"][0] == "online")


def test_nobody_keeps_a_node_from_starting(scene: Scene) -> None:
    stop = threading.Event()

    def claim() -> None:
        while not stop.is_set():
            scene.forge("meta/gamma/state", state("gamma", host="x", instance="y"), retain=True)
            scene.forge("all/heartbeat/gamma", heartbeat("gamma"))
            scene.forge("all/heartbeat/mallory", heartbeat("gamma"))
            scene.forge("gamma/heartbeat/mallory", heartbeat("gamma"))

    claiming = threading.Thread(target=claim)
    claiming.start()
    try:
        gamma = scene.hive.nodes.get("gamma") or scene.node("gamma")
        gamma.start()
        time.sleep(0.1)
        assert gamma.process and gamma.process.poll() is None
        assert gamma.stop() == 0
    finally:
        stop.set()
        claiming.join()
    forgetting = scene.member("gamma")
    for document in ("state", "roster"):
        assert forgetting.publish(f"meta/gamma/{document}", b"", retain=True) in (0, 0x10)


# ---- To make others believe what is not so -----------------------------------------------


def test_there_are_no_ghosts(scene: Scene) -> None:
    haunted = scene.member()
    for number in range(100):
        assert haunted.publish("all/heartbeat/mallory", heartbeat(f"ghost{number}")) == 0
    for topic in ("all/heartbeat/ghost", "meta/ghost/state", "meta/ghost/roster"):
        assert scene.forge(topic, heartbeat("ghost"), retain=True) in (NOT_AUTHORIZED, -1)
    oc = {"ghost": {"status": "ok"}, "main": {"status": "down"}, "alpha": {"status": "down"}}
    assert haunted.publish("meta/mallory/state", state("mallory", oc=oc), retain=True) == 0
    scene.fence()
    assert {*scene.status()} == {"alpha", "main", "private", "beta"}
    assert haunted.publish("meta/mallory/state", b"", retain=True) == 0


def test_ten_thousand_heartbeats_throw_nobody_out(scene: Scene) -> None:
    beating = scene.member()
    payload = heartbeat("mallory", interval=1e9)
    for _ in range(10_000):
        beating.client.publish(f"{PREFIX}/all/heartbeat/mallory", payload, 0)
    assert beating.publish("all/heartbeat/mallory", payload) == 0
    scene.fence()


def test_rubbish_that_is_kept_harms_nobody(scene: Scene) -> None:
    full = b'{"status": "online", "x": "' + b"x" * 70_000 + b'"}'
    for payload in (b"\xff" * 70_000, full, b"[" * 70_000, b'{"agents":' + b"[" * 70_000):
        for document in ("state", "roster", "count"):
            assert scene.forge(f"meta/mallory/{document}", payload, retain=True) in (0, 0x10)
    assert scene.alpha.stop() == 0
    scene.alpha.start()
    eventually("beta sees alpha", lambda: scene.status()["alpha"][0] == "online")
    for document in ("state", "roster", "count"):
        assert scene.forge(f"meta/mallory/{document}", b"", retain=True) in (0, 0x10)


def test_a_false_loss_is_not_believed_and_a_real_one_not_hushed_up(stage: Scene) -> None:
    scene = stage
    lying = scene.member()
    lie = partial(envelope, "mallory", "all", "alert", "gamma is lost", urgency="later")
    gamma = scene.hive.nodes.get("gamma") or scene.node("gamma")
    gamma.start()
    online = ("online", "gamma")
    eventually("beta sees gamma", lambda: scene.status().get("gamma") == online)
    told = len(calls_of(scene.agent))
    assert lying.publish("all/alert/mallory", lie(corr=module.loss_of("gamma"))) == 0
    eventually("the agent hears that mallory said so", lambda: len(calls_of(scene.agent)) > told)
    assert scene.status()["gamma"] == online
    gamma.stop(signal.SIGKILL)
    assert lying.publish("all/alert/mallory", lie(corr=module.loss_of("gamma"))) == 0
    scene.alpha.logged("peer is lost", peer="gamma")
    assert lying.publish("all/alert/mallory", lie(corr=module.loss_of("gamma"))) == 0
    scene.alpha.logged("sent", ch="alert", to="all", corr=module.loss_of("gamma"))
    assert scene.status()["gamma"] == ("offline", "gamma")


# ---- To keep others from their work ------------------------------------------------------


def flood(member: Member, topic: str, payload: bytes, count: int) -> None:
    """Publish it under so many ids, at QoS 1, as fast as the broker takes that."""
    member.client.loop_stop()
    sock: Any = member.client.socket()
    sock.settimeout(PATIENCE)
    id, run = json.loads(payload)["id"].encode(), module.new_id()[:25]
    for begin in range(0, count, BATCH):
        numbers = range(begin, min(begin + BATCH, count))
        payloads = [payload.replace(id, f"{run}-{number}".encode()) for number in numbers]
        packets = [publish_packet(topic, one, 1, mid) for mid, one in enumerate(payloads, 1)]
        sock.sendall(b"".join(packets))
        left = 4 * len(packets)  # bytes of PUBACKs
        while left > 0:
            left -= len(sock.recv(left))


def size_of_journal(node: Daemon) -> int:
    return sum(file.stat().st_size for file in node.home.glob("state/journal*"))


def test_a_flood_of_commands_delays_only_its_sender(stage: Scene) -> None:
    """2,000 with a burst of 200, as 100,000 with that of 20,000 would take a minute.

    The node's own word goes out at once.  A question of another waits at the broker behind the
    flood, which the node throws away unread.
    """
    scene, alpha = stage, stage.alpha
    assert alpha.stop() == 0
    alpha.config.write_text(alpha.config.read_text().replace('"debug"', '"info"'))
    alpha.start()
    reading, flooding = scene.member(), scene.member()
    reading.subscribe(f"{PREFIX}/mallory/alert/+")
    size, lines, began = size_of_journal(alpha), len(alpha.events()), time.monotonic()
    command = envelope("mallory", "alpha", "command", action="count")
    arguments = (flooding, f"{PREFIX}/alpha/command/mallory", command, FLOOD)
    running = threading.Thread(target=flood, args=arguments)
    running.start()
    alpha.logged("dropped", why=module.TOO_MANY)
    word = module.Envelope.new("alpha", "beta", "status", "my own", urgency="later")
    assert "error" not in scene.ask(alpha, "send", envelope=word.document())
    scene.beta.logged("received", id=word.id)
    answer = scene.send("alpha", "command", wait=True, action="count")["answer"]
    assert answer["text"] == "counted"
    running.join()

    pattern = rf"mallory sends more than {RATE} messages a second: (\d+) refused"

    def all_are_counted() -> bool:
        """As everybody sees it."""
        found = re.search(pattern, json.dumps(scene.beta.told("states")))
        at_most = BURST + RATE * (time.monotonic() - began)
        return found is not None and int(found[1]) >= FLOOD - at_most

    eventually("all are counted", all_are_counted, 3 * PATIENCE)
    assert re.search(pattern, scene.hive.cli("beta", "status", code=None).stdout)
    assert not scene.beta.events("peer is lost", peer="alpha")

    def told() -> list[str]:
        return [json.loads(one.payload)["text"] for one in reading.heard]

    eventually(
        "it hears how many", lambda: " more messages from mallory were " in "".join(told()[-1:])
    )
    busy = [text for text in told() if "messages wait for handlers" in text]  # of those taken
    first, *sums = [text for text in told() if text not in busy]
    assert first.startswith(f"alpha: more than {RATE} messages a second came from mallory")
    assert all(" more messages from mallory were refused" in text for text in sums)
    assert len(busy) + len(sums) < module.REFUSALS[1]
    assert size_of_journal(alpha) - size < 8_000_000
    assert len(alpha.events()) - lines < 15 * module.MAX_REPEATS  # those of each minute
