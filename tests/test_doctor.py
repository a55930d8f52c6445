"""doctor: each fault that a user can have is named on its line, and no line is missing."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paho.mqtt.publish as publish
import pytest
from conftest import (
    PATIENCE,
    ROOT,
    Broker,
    Daemon,
    Hive,
    calls_of,
    eventually,
    find_program,
    free_port,
    need_mosquitto,
)
from test_mqtt_client import server

import hive as module

HOSTING = "hosting"  # which is said only where a hive is carried: test_hosting.py
NAMES = [check.name for check in module.CHECKS if check.name != HOSTING]
ASK_BROKER = ["subscribe", "publish", "receive", "clock"]
Rows = dict[str, dict[str, str]]


def doctor(node: Daemon, *arguments: str) -> Rows:
    """Run it: what it says of each thing."""
    done = node.hive.cli(node.name, "doctor", "--json", *arguments, code=None)
    assert done.stderr == ""
    rows = json.loads(done.stdout)
    assert done.returncode == any(row["level"] == "fail" for row in rows)
    assert [
        name for name in dict.fromkeys(row["check"] for row in rows) if name != HOSTING
    ] == NAMES
    return {row["check"]: row for row in rows}


def levels(rows: Rows, *checks: str) -> list[str]:
    return [rows[check]["level"] for check in checks]


def say(node: Daemon, topic: str, said: object, retain: bool) -> None:
    """Publish as another node does, with a clock of its own."""
    mqtt = module.load_config(str(node.config)).mqtt
    payload, (host, port) = module.encode_json(said), mqtt.endpoint
    publish.single(topic, payload, 1, retain, hostname=host, port=port)


def state(node: Daemon, peer: str, ahead: float, **more: object) -> None:
    """Leave a retained state as a peer does whose clock is ahead."""
    said = {"status": "online", "last_seen": int(time.time() + ahead), "interval": 0.5} | more
    say(node, module.Topics(node.hive.prefix).meta(peer, "state"), said, retain=True)


@pytest.fixture
def beating(hive: Hive) -> Iterator[Callable[[str, float], None]]:
    """Peers that show that they are alive, until the test ends."""
    stop, threads = threading.Event(), list[threading.Thread]()

    def beat(node: Daemon, peer: str, ahead: float) -> None:
        topic = module.Topics(hive.prefix).to("all", "heartbeat")
        while not stop.wait(0.1):
            now = time.time() + ahead
            said = module.Envelope.new(peer, "all", "heartbeat", "{}", now=now)
            say(node, topic, said.document(), retain=False)

    def start(peer: str, ahead: float) -> None:
        node = next(iter(hive.nodes.values()))
        state(node, peer, 0)
        threads.append(threading.Thread(target=beat, args=(node, peer, ahead)))
        threads[-1].start()

    yield start
    stop.set()
    for thread in threads:
        thread.join()


@pytest.fixture
def guarded(
    tmp_path: Path, hive_of: Callable[..., Hive]
) -> Iterator[Callable[[str], tuple[Hive, Daemon]]]:
    """A node alpha at a broker that wants a password; its rights are given, {} is the prefix."""
    need_mosquitto()
    brokers: list[Broker] = []

    def make(acl: str) -> tuple[Hive, Daemon]:
        passwd, home = find_program("mosquitto_passwd"), tmp_path / "guarded"
        assert passwd
        home.mkdir(0o755)
        subprocess.run([passwd, "-c", "-b", home / "users", "alpha", "hunter2"], check=True)
        (home / "acl").write_text("")
        settings = ("allow_anonymous false", f"password_file {home}/users", f"acl_file {home}/acl")
        brokers.append(Broker(home, *settings))
        hive = hive_of(brokers[0])
        lines = "".join(f"topic {line.format(hive.prefix)}\n" for line in acl.split(", "))
        (home / "acl").write_text(f"user alpha\n{lines}")
        brokers[0].stop()
        brokers[0].start()
        alpha = hive.node("alpha")
        (alpha.home / "secret").write_text("hunter2\n")
        (alpha.home / "secret").chmod(0o600)
        login = '[mqtt]\nusername = "alpha"\npassword_file = "secret"'
        alpha.config.write_text(alpha.config.read_text().replace("[mqtt]", login))
        return hive, alpha

    yield make
    for broker in brokers:
        broker.stop()


FULL = "read {0}/alpha/#, read {0}/all/#, read {0}/meta/#, write {0}/#"


def test_a_healthy_node_is_ok_line_by_line(hive: Hive) -> None:
    alpha = hive.node("alpha").start()
    alpha.handler("ping", "#!/bin/sh\necho pong\n")
    done = hive.cli("alpha", "doctor")
    assert done.stderr == ""
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    alone = {"clock": "--", "nodes": "--"}
    assert [line[:2] for line in lines] == [[alone.get(name, "ok"), name] for name in NAMES]
    said = {check: what for _, check, what in lines}
    assert said["config"] == f"node alpha: {alpha.config}"
    assert said["handlers"] == f"ping, in {alpha.handlers}"
    assert said["daemon"] == f"alpha's runs, and answers at {alpha.home}/state/door"
    assert said["broker"].startswith(f"localhost:{hive.broker.port} lets us in without a name, in ")
    assert said["clock"] == "not compared: no other node was heard"


def test_it_harms_nobody(hive: Hive, fast_agent: Path) -> None:
    agent = f'[[oc_instances]]\nname = "main"\nopenclaw_cmd = "{fast_agent}"\n'
    alpha, beta = hive.node("alpha", agent), hive.node("beta")
    for node in (alpha, beta):
        node.handler("ping", "#!/bin/sh\n")
        node.start()
    alpha.logged("peer is up", peer="beta")
    rows = doctor(alpha)
    assert levels(rows, *ASK_BROKER) == ["ok"] * 4
    assert rows["clock"]["what"] == "that of 1 other node(s) says the same"
    hive.cli("beta", "send", "--to", "alpha", "--ch", "status", "--text", "the next message")
    alpha.logged("received", ch="status")
    for node in (alpha, beta):
        assert not [row for row in node.events() if row["level"] in ("warning", "error")]
    assert [row["ch"] for row in alpha.events("received", level="info")] == ["status"]
    assert len(calls_of(fast_agent)) <= 1  # the status
    assert sorted(
        row["name"] for row in json.loads(hive.cli("beta", "status", "--json").stdout)
    ) == [*("alpha", "beta", "main")]


def test_nodes_that_are_gone_are_a_warning(hive: Hive) -> None:
    alpha = hive.node("alpha").start()
    now = int(time.time())
    for name, status, age in (
        ("den", "online", 0),
        ("attic", "offline", 90),
        ("crypt", "online", 900),
    ):
        said = {"status": status, "last_seen": now - age, "reason": "lost", "oc": {"x": "ok"}}
        said["interval"] = 60
        say(alpha, f"{hive.prefix}/meta/{name}/state", said, retain=True)
    agent = {"status": "offline", "last_seen": now, "daemon_node": "attic"}
    say(alpha, f"{hive.prefix}/meta/main/state", agent, retain=True)
    found = doctor(alpha)["nodes"]
    assert found["level"] == "warn"
    assert found["what"] == "attic is offline, crypt is stale, of 3 besides this one"
    assert "forget" in found["todo"]
    for name in ("attic", "crypt", "main"):
        topic = f"{hive.prefix}/meta/{name}/state"
        publish.single(topic, None, 1, retain=True, port=hive.broker.port)
    found = doctor(alpha)["nodes"]
    assert (found["level"], found["what"]) == ("ok", "1 node besides this one: 1 online")


def test_a_dead_node_is_not_shown_as_alive_by_it(hive: Hive) -> None:
    alpha, beta = hive.node("alpha"), hive.node("beta").start()
    assert doctor(alpha)["daemon"]["level"] == "warn"
    hive.cli("beta", "send", "--to", "beta", "--ch", "status", "--text", "the next message")
    beta.logged("received", ch="status")
    assert not [row for row in beta.events() if row.get("peer") == "alpha"]


def test_a_login_that_is_right_and_rights_that_suffice_are_ok(
    guarded: Callable[[str], tuple[Hive, Daemon]],
) -> None:
    _, alpha = guarded(FULL)
    rows = doctor(alpha)
    assert levels(rows, "files", "broker", *ASK_BROKER) == ["ok"] * 5 + ["skipped"]
    assert " lets us in as alpha, in " in rows["broker"]["what"]
    assert "hunter2" not in json.dumps(rows)


def test_a_wrong_password_is_the_brokers_line_and_the_rest_is_said_to_be_skipped(
    guarded: Callable[[str], tuple[Hive, Daemon]],
) -> None:
    hive, alpha = guarded(FULL)
    (alpha.home / "secret").write_text("wrong\n")
    rows = doctor(alpha)
    assert rows["broker"] == {
        "check": "broker",
        "level": "fail",
        "what": f"localhost:{hive.broker.port}: refused: not authorized",
        "todo": "check [mqtt] username and password, and the broker's ACL",
    }
    assert levels(rows, *ASK_BROKER) == ["skipped"] * 4
    assert {rows[one]["what"] for one in ASK_BROKER} == {"skipped, because broker failed"}


@pytest.mark.parametrize(
    ("acl", "failing", "words"),
    [
        ("read {0}/#, write {0}/meta/#", "publish", "/alpha/response/"),
        ("read {0}/#, write {0}/alpha/#", "publish", "/meta/alpha/doctor-"),
        ("read {0}/all/#, read {0}/meta/#, write {0}/#", "receive", "/alpha/response/"),
        ("read {0}/alpha/response/#, read {0}/meta/#, write {0}/#", "receive", "/alpha/heartbeat "),
    ],
)
def test_a_right_that_is_missing_is_named(
    guarded: Callable[[str], tuple[Hive, Daemon]], acl: str, failing: str, words: str
) -> None:
    """Mosquitto's ACL refuses no subscription, it only delivers nothing."""
    hive, alpha = guarded(acl)
    rows = doctor(alpha)
    assert levels(rows, "broker", "subscribe", failing) == ["ok", "ok", "fail"]
    assert words in rows[failing]["what"]
    assert f"let alpha read {hive.prefix}/alpha/#, " in rows[failing]["todo"]
    assert rows["clock"]["what"] == f"skipped, because {failing} failed"


HANDS_OFF = f"{module.HANG_UP} at once: it lets us in, but takes no last word (will) to "


@pytest.mark.parametrize(
    ("setting", "protocol", "words", "todo"),
    [
        ("retain_available false", "5", "refused: retain not supported", "retain_available true"),
        ("retain_available false", "3.1.1", HANDS_OFF, "retain_available"),
        ("max_qos 0", "5", "refused: qos not supported", "max_qos 1"),
        ("max_qos 0", "3.1.1", HANDS_OFF, "max_qos"),
    ],
)
def test_a_broker_at_which_no_daemon_could_live_is_no_ok(
    tmp_path: Path,
    hive_of: Callable[..., Hive],
    setting: str,
    protocol: str,
    words: str,
    todo: str,
) -> None:
    need_mosquitto()
    broker = Broker(tmp_path / "broker", "allow_anonymous true", setting)
    try:
        hive = hive_of(broker)
        hive.mqtt += f'\nprotocol = "{protocol}"'
        rows = doctor(hive.node("alpha"))
    finally:
        broker.stop()
    assert levels(rows, "broker", *ASK_BROKER) == ["fail"] + ["skipped"] * 4
    assert words in rows["broker"]["what"] and todo in rows["broker"]["todo"]


def test_a_will_that_is_refused_is_told_from_a_wrong_password(hive: Hive) -> None:
    """EMQX looks into its ACL for a will; Mosquitto does not."""

    def no_will(client: socket.socket) -> None:
        connect = client.recv(4096)
        flags = connect[connect.index(b"MQTT") + 5]
        client.sendall(b"\x20\x03\0" + (b"\x87\0" if flags & 4 else b"\0\0"))
        client.recv(4096)

    alpha = hive.node("alpha")
    with server(no_will) as port:
        found = doctor(alpha, "--host", "127.0.0.1", "--port", str(port))["broker"]
    assert found["level"] == "fail"
    assert found["what"].startswith(
        f"127.0.0.1:{port}: refused: not authorized: it lets us in, but takes no last word (will)"
        f" to {hive.prefix}/meta/alpha/doctor-"
    )
    assert found["todo"].startswith("in the broker's ACL let anonymous clients read ")


def test_it_leaves_nothing_at_the_broker(own_broker: Broker, hive_of: Callable[..., Hive]) -> None:
    alpha = hive_of(own_broker).node("alpha", '[[oc_instances]]\nname = "main"\ncommand = "true"\n')
    rows = doctor(alpha)
    assert (rows["retained"]["level"], rows["senders"]["level"]) == ("ok", "ok")
    found, config = list[str](), module.load_config(str(alpha.config))
    loop = module.Loop(module.Log("error"))
    complete = list[bool]()
    query = module.RetainedQuery(
        *(loop, config.mqtt, ["#"], "marker"),
        *(lambda message: found.append(message.topic), lambda: complete.append(True)),
        lambda reason: pytest.fail(reason),
    )
    while not complete:
        loop.step()
    query.client.close(lambda: complete.append(True), within=0.0)
    while len(complete) < 2:
        loop.step()
    loop.close()
    assert found == []


CHECKED = (
    "read {0}/alpha/#, read {0}/all/#, read {0}/meta/#, write {0}/+/+/alpha,"
    " write {0}/meta/alpha/+, readwrite {0}/alpha/response/alpha/+"
)


@pytest.mark.parametrize(
    ("acl", "senders", "level", "words", "todo"),
    [
        (FULL, "open", "ok", "not checked: whoever may publish", ""),
        (FULL, "checked", "fail", "not checked: whoever may publish", "--mosquitto-conf"),
        (CHECKED, "checked", "ok", "checked: the broker lets no node speak in another's name", ""),
    ],
)
def test_whether_the_broker_checks_senders_is_tried(
    guarded: Callable[[str], tuple[Hive, Daemon]],
    acl: str,
    senders: str,
    level: str,
    words: str,
    todo: str,
) -> None:
    _, alpha = guarded(acl)
    alpha.config.write_text(
        alpha.config.read_text().replace("[mqtt]", f'[mqtt]\nsenders = "{senders}"')
    )
    rows = doctor(alpha)
    assert levels(rows, "broker", *ASK_BROKER[:-1], "retained") == ["ok"] * 5
    found = rows["senders"]
    assert (found["level"], found["what"].startswith(words)) == (level, True)
    assert todo in found["todo"] and bool(todo) is bool(found["todo"])


def test_over_mqtt_3_1_1_nobody_can_tell_who_checks_senders(hive: Hive) -> None:
    hive.mqtt += '\nprotocol = "3.1.1"'
    found = doctor(hive.node("alpha"))["senders"]
    assert (found["level"], found["what"]) == (
        "skipped",
        "not tried: over MQTT 3.1.1 no broker says what it refuses",
    )


@pytest.mark.parametrize(
    ("finds", "level", "words"),
    [
        ([True], "OK", "through a wildcard"),
        ([False, True], "WARN", "by its exact topic, by no wildcard"),
        ([False, False], "FAIL", "is not given back: no right to read?"),
    ],
)
def test_how_the_broker_gives_back_what_it_keeps_is_said(
    finds: list[bool], level: str, words: str
) -> None:
    asked = list[list[str]]()

    def find(filters: list[str]) -> bool:
        asked.append(filters)
        return finds.pop(0)

    documents = ["hive/meta/alpha/doctor-1", "hive/meta/alpha/doctor-2"]
    context = context_of(config_of(), finds=find, documents=documents)
    [finding] = module.check_retained(context)
    assert finding.level.name == level and words in finding.what
    assert asked == [["hive/meta/alpha/+"], documents][: len(asked)] and not finds
    assert bool(finding.todo) is (level != "OK")


def test_a_refused_subscription_is_its_line(
    own_broker: Broker, hive_of: Callable[..., Hive]
) -> None:
    alpha = hive_of(own_broker).node("alpha")
    own_broker.stop()
    broker = RefusingBroker(own_broker.port)
    try:
        rows = doctor(alpha)
    finally:
        broker.close()
    assert levels(rows, "broker", "subscribe", "publish") == ["ok", "fail", "skipped"]
    assert rows["subscribe"]["what"].endswith("/alpha/+ refused: not authorized")


class RefusingBroker:
    """Takes every connection and refuses every subscription, in MQTT 5."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(PATIENCE)
            sock.recv(4096)
            sock.sendall(b"\x20\x03\0\0\0")  # CONNACK
            packet = sock.recv(4096)
            if packet[:1] == b"\x82":  # SUBSCRIBE of less than 16 KiB: the id is at 2 or 3
                id = packet[3:5] if packet[1] & 0x80 else packet[2:4]
                sock.sendall(b"\x90\x04" + id + b"\0\x87")
                sock.recv(4096)
            sock.close()

    def close(self) -> None:
        self._listener.close()


def test_a_broker_that_is_not_there_is_a_fail_and_so_is_one_that_never_speaks(hive: Hive) -> None:
    alpha = hive.node("alpha")
    rows = doctor(alpha, "--port", str(free_port()))
    assert rows["broker"]["what"].endswith(": Connection refused")
    with socket.create_server(("127.0.0.1", 0)) as hole:
        begun = time.monotonic()
        rows = doctor(alpha, "--host", "127.0.0.1", "--port", str(hole.getsockname()[1]))
    assert time.monotonic() - begun < 15
    assert rows["broker"]["what"].endswith(": no answer in 4 s")
    assert rows["broker"]["todo"].startswith("are host and port right")
    assert levels(rows, *ASK_BROKER) == ["skipped"] * 4


def test_each_line_comes_when_it_is_known(hive: Hive) -> None:
    hive.node("alpha")
    with socket.create_server(("127.0.0.1", 0)) as hole:
        where = ("--host", "127.0.0.1", "--port", str(hole.getsockname()[1]))
        line = hive.command_line("alpha", "doctor", *where)
        with subprocess.Popen(
            line, stdout=subprocess.PIPE, text=True, env=hive.environment
        ) as child:
            assert child.stdout
            for name in NAMES[: NAMES.index("broker")]:
                assert child.stdout.readline().split()[1] == name
            assert child.poll() is None
            child.send_signal(signal.SIGINT)
            assert child.wait(PATIENCE) == 130


def test_a_broken_configuration_is_a_fail_and_what_does_not_need_it_is_checked(hive: Hive) -> None:
    alpha = hive.node("alpha")
    alpha.config.write_text('[mqtt]\nhots = "broker.lan"\npassword = "hunter2"\n')
    rows = doctor(alpha)
    assert levels(rows, "python", "paho", "config") == ["ok", "ok", "fail"]
    assert rows["config"]["what"] == f"{alpha.config}: mqtt.hots = 'broker.lan': no such key"
    assert rows["config"]["todo"] == "did you mean host?"
    assert levels(rows, *NAMES[3:]) == ["skipped"] * len(NAMES[3:])
    assert rows["files"]["what"] == "skipped, because config failed"
    assert "hunter2" not in json.dumps(rows)


def test_without_paho_it_still_looks_at_the_rest(tmp_path: Path) -> None:
    clean = {"HOME": str(tmp_path), "PATH": os.defpath}
    command = [sys.executable, "-S", str(ROOT / "hive-cli"), "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    said = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert said["paho"].startswith("fail  paho       paho-mqtt is missing; either python3 -m pip")
    assert said["config"].startswith("ok ") and said["handlers"].startswith("ok ")
    assert said["broker"].endswith("skipped, because paho failed")


def test_files_that_others_may_read_or_change_are_named(hive: Hive) -> None:
    alpha = hive.node("alpha")
    secret, folder = alpha.home / "secret", alpha.home / "state"
    secret.write_text("hunter2\n")
    secret.chmod(0o644)
    alpha.config.write_text(
        alpha.config.read_text().replace("[mqtt]", "[mqtt]\npassword_file = 'secret'")
    )
    rows = doctor(alpha)
    assert (rows["files"]["level"], rows["files"]["todo"]) == ("warn", f"chmod 600 {secret}")
    secret.chmod(0o600)
    folder.mkdir(0o755)
    assert doctor(alpha)["files"]["todo"] == f"chmod 700 {folder}"
    folder.chmod(0o777)
    rows = doctor(alpha)
    assert rows["files"] == {
        "check": "files",
        "level": "fail",
        "what": f"state directory {folder}: is writable by everyone",
        "todo": f"chmod o-w {folder}",
    }
    folder.rmdir()
    folder.write_text("a file")
    assert doctor(alpha)["files"]["what"] == f"state directory {folder}: you may not write to it"


def test_a_handler_directory_that_is_not_there_is_a_warning(hive: Hive) -> None:
    alpha = hive.node("alpha")
    alpha.handlers.rmdir()
    found = doctor(alpha)["handlers"]
    assert (found["level"], found["what"]) == ("warn", f"none: no directory {alpha.handlers}")
    assert found["todo"] == f"for those in {ROOT}/hive-daemon.d set [node] handler_dir"


def test_a_handler_directory_without_a_handler_is_a_warning_too(hive: Hive) -> None:
    alpha = hive.node("alpha")
    found = doctor(alpha)["handlers"]
    assert (found["level"], found["what"]) == ("warn", f"none: nothing to run in {alpha.handlers}")
    assert found["todo"] == f"for those in {ROOT}/hive-daemon.d set [node] handler_dir"
    (alpha.handlers / "ping").write_text("#!/bin/sh\n")
    assert doctor(alpha)["handlers"]["what"] == f"none: nothing to run in {alpha.handlers}"
    alpha.handler("ping", "#!/bin/sh\n")
    assert doctor(alpha)["handlers"]["level"] == "ok"


def test_handlers_that_are_refused_are_named_and_why(hive: Hive) -> None:
    alpha = hive.node("alpha")
    alpha.handler("ping", "#!/bin/sh\n")
    alpha.handler("odd", "#!/bin/sh\n").chmod(0o644)
    done = hive.cli("alpha", "doctor", code=None)
    lines = [line for line in done.stdout.splitlines() if line.split()[1] == "handlers"]
    odd = alpha.handlers / "odd"
    assert lines == [
        f"warn  handlers   refused: {odd}: not executable; chmod +x {odd}",
        f"ok    handlers   ping, in {alpha.handlers}",
    ]
    alpha.handlers.chmod(0o777)
    rows = doctor(alpha)
    assert rows["handlers"]["level"] == "fail"
    assert rows["handlers"]["todo"] == f"chmod o-w {alpha.handlers}"


def test_a_daemon_that_hangs_is_a_fail(hive: Hive) -> None:
    alpha = hive.node("alpha").start()
    os.kill(alpha.pid, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        rows = doctor(alpha)
        assert time.monotonic() - begun < 15
    finally:
        os.kill(alpha.pid, signal.SIGCONT)
    assert (rows["daemon"]["level"], rows["daemon"]["todo"]) == ("fail", "restart it")
    assert rows["daemon"]["what"].startswith(
        f"alpha's does not answer at {alpha.home}/state/door: "
    )


def test_each_agent_is_looked_at_and_none_is_woken(hive: Hive, fast_agent: Path) -> None:
    def openclaw(profile: str, **gateway: Any) -> None:
        folder = hive.home / f".openclaw-{profile}"
        folder.mkdir()
        (folder / "openclaw.json").write_text(json.dumps({"gateway": gateway}))

    closed = free_port()
    with socket.create_server(("127.0.0.1", 0)) as gateway:
        openclaw("up", port=gateway.getsockname()[1])
        openclaw("down", port=closed)
        openclaw("far", mode="remote")
        agents = {
            "up": f'openclaw_cmd = "{fast_agent}"',
            "down": f'openclaw_cmd = "{fast_agent}"',
            "far": f'openclaw_cmd = "{fast_agent}"',
            "gone": f'openclaw_cmd = "{fast_agent}"',
            "bare": 'openclaw_cmd = "no-such-openclaw"',
        }
        lines = [
            f'[[oc_instances]]\nname = "{a}"\nprofile = "{a}"\n{x}\n' for a, x in agents.items()
        ]
        lines.append(f'[[oc_instances]]\nname = "own"\ncommand = "{fast_agent}"\n')
        hive.node("alpha", "".join(lines))
        done = hive.cli("alpha", "doctor", code=1)
    said = [line for line in done.stdout.splitlines() if line.split()[1] == "agents"]
    assert [line.split()[0] for line in said] == ["ok", "warn", "ok", "warn", "fail", "ok"]
    assert f"down: nothing listens on 127.0.0.1:{closed}: Connection refused; start" in said[1]
    assert f"gone: no {hive.home}/.openclaw-gone/openclaw.json; " in said[3]
    assert "bare: no program no-such-openclaw; " in said[4]
    assert calls_of(fast_agent) == [] and not (hive.home / ".openclaw-gone").exists()


def test_a_peer_whose_clock_is_wrong_is_named(
    hive: Hive, beating: Callable[[str, float], None]
) -> None:
    alpha = hive.node("alpha")
    beating("beta", -3600)
    rows = doctor(alpha)
    assert rows["clock"]["level"] == "warn"
    said = rows["clock"]["what"]
    assert said.startswith("beta's is 1h") or said.startswith("beta's is 59m")
    assert said.endswith("behind: one of the two is wrong") and "NTP" in rows["clock"]["todo"]


def test_where_most_disagree_the_fault_is_here(
    hive: Hive, beating: Callable[[str, float], None]
) -> None:
    alpha = hive.node("alpha")
    for peer in ("beta", "gamma"):
        beating(peer, 120)
    what = doctor(alpha)["clock"]["what"]
    assert what.startswith("beta's is 2m ahead, gamma's is 2m ahead") or "1m 59s ahead" in what
    assert what.endswith(": this machine's clock is the odd one")


def test_an_old_state_is_no_wrong_clock_but_one_from_the_future_is(hive: Hive) -> None:
    alpha = hive.node("alpha")
    state(alpha, "beta", -7200)
    state(alpha, "gone", -7200, status="offline")
    assert doctor(alpha)["clock"]["what"] == "not compared: no other node was heard"
    state(alpha, "gamma", 7200)
    rows = doctor(alpha)
    assert rows["clock"]["level"] == "warn"
    assert rows["clock"]["what"].startswith(("gamma's is 2h ahead", "gamma's is 1h 59m ahead"))


def test_rubbish_at_the_broker_is_no_trouble(hive: Hive) -> None:
    alpha = hive.node("alpha")
    large = {"status": "online", "last_seen": int(time.time() + 7200), "padding": "x" * 70000}
    for peer, said in (("a", [1]), ("b", {"status": [], "last_seen": "x"}), ("c", large)):
        say(alpha, module.Topics(hive.prefix).meta(peer, "state"), said, retain=True)
    odd: list[object] = [True, [], -1, 1e30]
    for seen in odd:
        state(alpha, "d", 0, last_seen=seen)
        assert doctor(alpha)["clock"]["level"] == "skipped"


@pytest.mark.parametrize("peer", ["a/b", "x" * 64, "", None, 7, ["beta"]])
def test_a_heartbeat_of_no_name_tells_no_time(peer: object) -> None:
    config = module.make_config({"node": {"id": "alpha"}}, None, {})
    clocks = module.PeerClocks(config)
    beat = module.Envelope.new("beta", "all", "heartbeat", "{}", now=time.time() + 7200).document()

    def hear(said: object) -> None:
        topic, payload = config.topics.to("all", "heartbeat"), module.encode_json(said)
        clocks.hear(module.IncomingMessage(topic, payload, False, None, lambda: None))

    hear(beat | {"from": peer})
    assert clocks.ahead == {}
    hear(beat)
    assert [*clocks.ahead] == ["beta"] and clocks.ahead["beta"] > 7000


def test_one_connection_is_enough(own_broker: Broker, hive_of: Callable[..., Hive]) -> None:
    alpha = hive_of(own_broker).node("alpha")
    assert levels(doctor(alpha), *ASK_BROKER[:-1]) == ["ok"] * 3
    log = own_broker.home / "mosquitto.log"
    eventually("it says goodbye", lambda: log.read_text().count(" disconnected.") == 1)
    assert log.read_text().count("New client connected") == 1


def test_it_is_coloured_on_a_terminal_alone(hive: Hive) -> None:
    hive.node("alpha")
    parent, child = pty.openpty()
    environment = hive.environment | {"TERM": "xterm"}
    line = hive.command_line("alpha", "doctor", "--port", str(free_port()))
    done = subprocess.Popen(line, stdout=child, env=environment)
    os.close(child)
    seen = b""
    while True:
        try:
            data = os.read(parent, 4096)
        except OSError:
            break
        if not data:
            break
        seen += data
    os.close(parent)
    assert done.wait(PATIENCE) == 1
    assert b"\x1b[32mok  \x1b[0m  python" in seen and b"\x1b[31mfail\x1b[0m  broker" in seen
    assert "\x1b" not in hive.cli("alpha", "doctor", code=0).stdout


# -- each check by itself --


def config_of(**tables: Any) -> module.Config:
    return module.make_config({"node": {"id": "alpha"}} | tables, None, {})


def context_of(config: module.Config, **broker: Any) -> Any:
    return SimpleNamespace(config=config, broker=SimpleNamespace(**broker))


@pytest.fixture
def clocks() -> Iterator[module.PeerClocks]:
    """Those of the peers of alpha, in whose hive a heartbeat comes every 2 s."""
    yield module.PeerClocks(config_of(heartbeat={"interval": 2}))


def heard(clocks: module.PeerClocks, topic: str, said: object, retained: bool = True) -> None:
    payload = said if isinstance(said, bytes) else module.encode_json(said)
    clocks.hear(module.IncomingMessage(f"hive/{topic}", payload, retained, None, lambda: None))


def alive(ahead: float = 0, **more: object) -> dict[str, object]:
    return {"status": "online", "last_seen": int(time.time() + ahead)} | more


def test_who_is_said_to_be_alive_is_awaited_as_long_as_its_heartbeat_takes(
    clocks: module.PeerClocks,
) -> None:
    assert clocks.complete and clocks.patience == 0
    heard(clocks, "meta/beta/state", alive())
    assert (clocks.awaited, clocks.patience) == ({"beta"}, 3.0)  # it says no interval: ours
    heard(clocks, "meta/gamma/state", alive(interval=4, status="degraded"))
    assert (clocks.awaited, clocks.patience) == ({"beta", "gamma"}, 5.0)
    heard(clocks, "meta/delta/state", alive(interval=1))
    assert clocks.patience == 5.0
    heard(clocks, "meta/epsilon/state", alive(interval=60))
    assert clocks.patience == 6.0  # longer than that nobody wants to wait
    assert not clocks.complete and not clocks.ahead
    for peer in sorted(clocks.awaited):
        heard(clocks, f"meta/{peer}/state", alive(), retained=False)
    assert clocks.complete and {*clocks.ahead} == clocks.awaited
    assert all(abs(ahead) < 2 for ahead in clocks.ahead.values())


@pytest.mark.parametrize(
    ("topic", "said"),
    [
        ("meta/beta/state", {"status": "offline", "last_seen": 1771143500}),
        ("meta/main/state", {"status": "online", "last_seen": 1771143500, "daemon_node": "beta"}),
        ("meta/alpha/state", {"status": "online", "last_seen": 1771143500}),
        ("meta/beta/state", {"status": "online", "last_seen": 0}),
        ("meta/beta/state", {"status": "online"}),
        ("meta/beta/state", {"status": "online", "ts": 1771143500}),
        ("beta/heartbeat", {"from": "beta", "ts": 1771143500}),
        ("all/status", {"from": "beta", "ts": 1771143500}),
        ("meta/beta/state", b"no JSON"),
    ],
)
def test_whatever_else_tells_no_time(clocks: module.PeerClocks, topic: str, said: object) -> None:
    for retained in (True, False):
        heard(clocks, topic, said, retained)
    assert not clocks.awaited and not clocks.ahead


def test_a_state_has_a_bound(clocks: module.PeerClocks) -> None:
    fits = json.dumps(alive()).ljust(module.MAX_STATE).encode()
    heard(clocks, "meta/large/state", fits + b" ")
    heard(clocks, "meta/fits/state", fits)
    assert clocks.awaited == {"fits"}


def test_only_a_time_that_is_still_to_come_is_wrong_for_certain(clocks: module.PeerClocks) -> None:
    heard(clocks, "meta/past/state", alive(-100))
    heard(clocks, "meta/near/state", alive(4))
    heard(clocks, "meta/far/state", alive(7))
    assert [*clocks.ahead] == ["far"] and 6 < clocks.ahead["far"] < 8
    assert clocks.awaited == {"past", "near"}
    beat = {"from": "past", "ts": int(time.time() - 100)}
    heard(clocks, "all/heartbeat", beat, retained=False)
    assert -101 < clocks.ahead["past"] < -98


def test_no_more_peers_are_heard_than_there_can_be(
    clocks: module.PeerClocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_MEMBERS", 2)
    for retained in (True, False):
        for peer in ("a", "b", "c"):
            heard(clocks, f"meta/{peer}/state", alive(), retained)
    assert clocks.awaited == {*clocks.ahead} == {"a", "b"}


@pytest.mark.parametrize(
    ("ahead", "level", "what"),
    [
        ({}, "SKIPPED", "not compared: no other node was heard"),
        ({"a": 0.5}, "OK", "that of 1 other node(s) says the same"),
        ({"a": 5.0, "b": -5.0}, "OK", "that of 2 other node(s) says the same"),
        ({"a": 61.0}, "WARN", "a's is 1m 1s ahead: one of the two is wrong"),
        ({"a": 0.0, "b": -61.0}, "WARN", "b's is 1m 1s behind: one of the two is wrong"),
        (
            {"c": 0.0, "b": -61.0, "a": 9.0},
            "WARN",
            "a's is 9s ahead, b's is 1m 1s behind: this machine's clock is the odd one",
        ),
        (
            dict.fromkeys("abcde", 9.0),
            "WARN",
            "a's is 9s ahead, b's is 9s ahead, c's is 9s ahead (and 2 more):"
            " this machine's clock is the odd one",
        ),
    ],
)
def test_the_clocks_are_compared(ahead: dict[str, float], level: str, what: str) -> None:
    heard_of = SimpleNamespace(ahead=ahead)
    context = context_of(config_of(), clocks=heard_of, compare_clocks=lambda: None)
    [finding] = module.check_clock(context)
    assert (finding.level.name, finding.what) == (level, what)
    assert ("NTP" in finding.todo) is (level == "WARN")


@pytest.mark.parametrize(
    ("names", "limit", "said"),
    [
        (["a"], 1, "a"),
        (["a", "b"], 1, "a (and 1 more)"),
        (["a", "b"], 2, "a, b"),
        (["a", "b", "c", "d"], 2, "a, b (and 2 more)"),
    ],
)
def test_of_many_names_the_first_few_are_said(names: list[str], limit: int, said: str) -> None:
    assert module.and_more(names, limit) == said


def test_what_the_broker_must_allow_is_said() -> None:
    agents = [{"name": "main"}]
    logins: list[tuple[dict[str, str], str]] = [
        ({"username": "me"}, "me"),
        ({}, "anonymous clients"),
    ]
    for mqtt, user in logins:
        assert module.acl_for(config_of(mqtt=mqtt, oc_instances=agents)) == (
            f"in the broker's ACL let {user} read hive/alpha/#, hive/main/#, hive/all/# and"
            " hive/meta/#, and write hive/#"
        )
    checked = config_of(mqtt={"username": "alpha", "senders": "checked"})
    assert "broker --mosquitto-conf" in module.acl_for(checked)


def test_what_comes_of_publishing_is_said() -> None:
    for v5, more in ((True, ""), (False, ", as MQTT 3.1.1 always says")):
        client = SimpleNamespace(v5=v5)
        context = context_of(config_of(), refused={}, publish=lambda: None, client=client)
        [finding] = module.check_publishing(context)
        assert finding == module.Finding(module.Level.OK, f"messages to ourselves are taken{more}")
    refused = {"one": "not authorized", "two": "quota exceeded"}
    [finding] = module.check_publishing(
        context_of(config_of(), refused=refused, publish=lambda: None)
    )
    assert finding.level is module.Level.FAIL
    assert finding.what == "to one (and 1 more): not authorized"
    [finding] = module.check_receiving(context_of(config_of(), missing={"one": b"", "two": b""}))
    assert finding.what == "what goes to one (and 1 more) never arrives: no right to read?"
    assert "ACL" in finding.todo


@pytest.mark.parametrize(
    ("keys", "openclaw", "silent", "level", "words"),
    [
        ({}, True, "", "OK", "x: its gateway listens on 127.0.0.1:7"),
        ({}, True, "refused", "WARN", "x: nothing listens on 127.0.0.1:7: refused"),
        ({}, False, "", "FAIL", "x: no HOME/.openclaw/openclaw.json"),
        ({"port": 7}, False, "", "WARN", "x: no HOME/.openclaw/openclaw.json"),
        ({"openclaw_cmd": ["true", "-v"]}, False, "", "WARN", "x: no HOME/.openclaw/openclaw.json"),
        ({"openclaw_cmd": "no-such"}, True, "", "FAIL", "x: no program no-such"),
        ({"command": "no-such"}, True, "", "FAIL", "x: no program no-such"),
        ({"command": "true"}, False, "", "OK", "x: true is there; more would wake it"),
        (
            {"via": "claude", "dir": "/", "command": "true"},
            *(False, "", "OK", "x: true is there; more would wake it"),
        ),
        ({"via": "claude", "dir": "/nowhere"}, False, "", "FAIL", "x: no folder /nowhere"),
        (
            {"via": "chat"},
            *(True, "", "WARN"),
            "x: HOME/.openclaw/openclaw.json enables no chatCompletions, or has no token"
            " that can be read",
        ),
        (
            {"openclaw_cmd": "no-such", "via": "hook", "hook_token": "t"},
            True,
            "",
            "OK",
            "x: its gateway listens on 127.0.0.1:7",
        ),
        (
            {"openclaw_cmd": "no-such", "via": "auto", "hook_token": "t"},
            True,
            "",
            "FAIL",
            "x: no program no-such",
        ),
        (
            {"via": "hook", "hook_token": "t", "hook_url": "http://h/w"},
            False,
            "",
            "OK",
            "x: its gateway listens on 127.0.0.1:7",
        ),
    ],
)
def test_an_agent_is_looked_at(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    openclaw: bool,
    silent: str,
    level: str,
    words: str,
) -> None:
    (tmp_path / "openclaw").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if openclaw:
        (tmp_path / ".openclaw").mkdir()
        (tmp_path / ".openclaw" / "openclaw.json").write_text("{}")
    agent = config_of(oc_instances=[{"name": "x"} | keys]).oc_instances[0]
    finding = module.agent_finding(agent, tmp_path, 7, {7: silent})
    assert (finding.level.name, finding.what) == (level, words.replace("HOME", str(tmp_path)))
    assert bool(finding.todo) is (level != "OK")


def test_an_agent_whose_port_is_not_known_is_not_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = config_of(oc_instances=[{"name": "x", "openclaw_cmd": "true"}]).oc_instances[0]
    (tmp_path / ".openclaw").mkdir()
    (tmp_path / ".openclaw" / "openclaw.json").write_text("{}")
    finding = module.agent_finding(agent, tmp_path, None, {})
    assert finding == module.Finding(
        module.Level.OK, "x: its gateway's port cannot be known without waking it"
    )


@pytest.mark.parametrize(("mode", "level"), [(0o700, []), (0o750, ["WARN"]), (0o701, ["WARN"])])
def test_nobody_may_look_into_the_state_directory(
    tmp_path: Path, mode: int, level: list[str]
) -> None:
    folder = tmp_path / "state"
    assert [*module.check_folder(folder / "below")] == []  # it can be made
    folder.mkdir()
    folder.chmod(mode)
    assert [found.level.name for found in module.check_folder(folder)] == level


def test_a_handler_directory_that_was_named_must_be_there(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    [finding] = module.check_handlers(context_of(config_of(node={"handler_dir": str(missing)})))
    assert finding == module.Finding(
        module.Level.WARN, f"none: no directory {missing}", f"mkdir {missing}"
    )
    missing.mkdir(0o755)
    [finding] = module.check_handlers(context_of(config_of(node={"handler_dir": str(missing)})))
    assert finding == module.Finding(
        module.Level.WARN,
        f"none: nothing to run in {missing}",
        f"put an executable there: {missing}/NAME",
    )


def test_a_check_that_breaks_is_a_finding() -> None:
    def refused(context: object) -> Iterator[module.Finding]:
        yield module.Finding(module.Level.OK, "first")
        raise module.BrokerError("broker x: refused; try another")

    def vanished(context: object) -> Iterator[module.Finding]:
        yield module.Finding(module.Level.OK, "first")
        raise FileNotFoundError(2, "No such file or directory", "/x")

    found = [*module.run_check(module.Check("broker", refused), context_of(config_of()))]
    assert found[1] == module.Finding(module.Level.FAIL, "x: refused", "try another")
    found = [*module.run_check(module.Check("files", vanished), context_of(config_of()))]
    assert found[1] == module.Finding(module.Level.FAIL, "/x: No such file or directory")


def test_a_finding_is_one_line() -> None:
    warn = module.Finding(module.Level.WARN, "it\nis so", "do that")
    assert module.finding_line("clock", warn, False) == "warn  clock      it?is so; do that"
    assert module.finding_line("subscribe", module.Finding(module.Level.OK, "well"), False) == (
        "ok    subscribe  well"
    )
    assert module.finding_line("clock", warn, True).startswith("\033[33mwarn\033[0m  clock ")


def test_no_check_takes_longer_than_all_may() -> None:
    with contextlib.ExitStack() as ending:
        context = module.DoctorContext(config_of, time.monotonic(), ending)
        assert context.left(4.0) == 4.0
        assert 13 < context.left(100.0) <= 14
        late = module.DoctorContext(config_of, time.monotonic() - 13.2, ending)
        assert 0.5 <= late.left(4.0) <= 0.8
        over = module.DoctorContext(config_of, time.monotonic() - 20, ending)
        assert over.left(4.0) == 0.5


def test_a_configuration_that_others_may_change_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_private_group", lambda gid: False)
    file = tmp_path / "hive.toml"
    file.write_text(f"node = {{id = 'alpha', state_dir = '{tmp_path}/state'}}\n")
    file.chmod(0o660)
    context = context_of(module.load_config(str(file)))
    [finding] = module.check_files(context)
    assert finding == module.Finding(
        module.Level.WARN, f"{file}: is writable by its group", f"chmod g-w {file}"
    )
    file.chmod(0o600)
    [finding] = module.check_files(context)
    assert finding.level is module.Level.OK
