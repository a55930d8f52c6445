"""Open and checked hives: from one to the other, side by side, and whose session is whose."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Broker, Daemon, Hive, eventually, need_mosquitto
from test_mosquitto import PREFIX, Peer, SetUp, hive_at

import hive as module

COUNT = "#!/bin/sh\ncat >>../came\n"
OPEN_ACL = f"""\
pattern read {PREFIX}/%u/+
pattern read {PREFIX}/main/+
pattern readwrite {PREFIX}/%u/response/+
pattern read {PREFIX}/all/+
pattern write {PREFIX}/+/+
pattern read {PREFIX}/meta/+/+
pattern write {PREFIX}/meta/%u/+
pattern write {PREFIX}/meta/+/state
"""


@pytest.fixture
def broker() -> Iterator[SetUp]:
    need_mosquitto()
    place = Path(tempfile.mkdtemp(prefix="hive-senders-"))
    place.chmod(0o755)
    made = SetUp(place, "alpha", "beta")
    yield made
    made.stop()
    shutil.rmtree(place)


def say(node: Daemon, senders: str) -> None:
    """Set [mqtt] senders."""
    text = re.sub(r"(?m)^senders = .*\n", "", node.config.read_text())
    node.config.write_text(text.replace("[mqtt]\n", f'[mqtt]\nsenders = "{senders}"\n'))


def came(node: Daemon) -> list[str]:
    """The texts that its handler was given, in order."""
    file = node.home / ".config" / "hive" / "came"
    return (
        [json.loads(line)["text"] for line in file.read_text().splitlines()]
        if file.exists()
        else []
    )


def two(hive_of: Callable[..., Hive], broker: SetUp) -> tuple[Hive, Daemon, Daemon]:
    hive = hive_at(hive_of, broker)
    main = '[[oc_instances]]\nname = "main"\ncommand = ["cat"]\n'
    alpha, beta = hive.node("alpha", main), hive.node("beta")
    for node in (alpha, beta):
        broker.let_in(node)
        node.handler("count", COUNT)
    return hive, alpha, beta


def send(hive: Hive, *texts: str, to: str = "alpha") -> None:
    for text in texts:
        hive.cli("beta", "send", "--to", to, "--action", "count", "--text", text)


def test_an_open_hive_becomes_a_checked_one_and_loses_nothing(
    hive_of: Callable[..., Hive], broker: SetUp
) -> None:
    hive, alpha, beta = two(hive_of, broker)
    rules = broker.home / "hive" / "acl"
    checked = rules.read_text()
    rules.write_text(OPEN_ACL)
    broker.stop()
    broker.start()
    for node in (alpha, beta):
        say(node, "open")
        node.start()
    send(hive, "before")
    eventually("it came", lambda: came(alpha) == ["before"])
    assert "alpha" in hive.cli("beta", "status", "--direct").stdout  # what it says to itself ...
    assert not alpha.events("not an envelope") and not beta.events("not an envelope")
    assert not broker.denied()  # ... under the rules of an older script
    alpha.stop()
    send(hive, "waits at the broker", "and this")
    send(hive, "for its agent", to="main")
    eventually(
        "the broker has it",
        lambda: not json.loads(hive.cli("beta", "pending", "--json").stdout)["outbox"],
    )
    broker.stop()
    beta.logged("no broker, trying again")
    send(hive, "waits at beta")
    send(hive, "there, for its agent", to="main")
    beta.stop()
    rules.write_text(checked.replace("# pattern", "pattern"))
    broker.start()
    for node in (alpha, beta):
        say(node, "checked")
        node.start()
    waited = {"waits at the broker", "and this", "for its agent"}
    waited |= {"before", "waits at beta", "there, for its agent"}
    eventually("all have come", lambda: len(came(alpha)) >= len(waited))
    assert {*came(alpha)} == waited and len(came(alpha)) == len(waited)
    assert not broker.denied()
    alpha.stop()  # once more: nothing waits in the old session
    alpha.start()
    send(hive, "after")
    eventually("it came", lambda: came(alpha)[-1] == "after")
    assert "; senders: checked\n" in hive.cli("beta", "status").stdout
    rows = json.loads(hive.cli("beta", "status", "--json").stdout)
    assert {row["senders"] for row in rows} == {"checked"}


def test_what_waits_in_the_session_of_an_older_version_is_taken_and_that_ends(
    hive_of: Callable[..., Hive], broker: SetUp
) -> None:
    hive, alpha, beta = two(hive_of, broker)
    beta.start()
    plain = f"{PREFIX}/alpha".replace("/", ":")

    def older() -> Peer:
        return Peer(broker, "alpha", broker.password("alpha"), client_id=plain, expiry=600)

    before = older()
    before.subscribe(f"{PREFIX}/alpha/+/+")
    before.end()
    peer = Peer(broker, "beta", broker.password("beta"))
    for number in range(30):
        waits = module.Envelope.new("beta", "alpha", "command", str(number), action="count")
        assert peer.publish(f"{PREFIX}/alpha/command/beta", waits.encode()) == 0
    alpha.start()
    eventually("all have come", lambda: len(came(alpha)) == 30)
    eventually("it is over", lambda: module_session(alpha).startswith(f"{plain}:"))
    assert came(alpha) == [str(number) for number in range(30)]
    send(hive, "later")
    after = older()
    assert not after.everything()
    after.end()


def test_a_broker_that_dies_meanwhile_loses_nothing_of_it(
    hive_of: Callable[..., Hive], broker: SetUp
) -> None:
    _, alpha, _ = two(hive_of, broker)
    plain = f"{PREFIX}/alpha".replace("/", ":")
    before = Peer(broker, "alpha", broker.password("alpha"), client_id=plain, expiry=600)
    before.subscribe(f"{PREFIX}/alpha/+/+")
    before.end()
    peer = Peer(broker, "beta", broker.password("beta"))
    for number in range(300):  # more than are sent without an acknowledgement
        waits = module.Envelope.new("beta", "alpha", "status", str(number), urgency="later")
        assert peer.publish(f"{PREFIX}/alpha/status/beta", waits.encode()) == 0
    saved, last = broker.place / "data" / "mosquitto.db", waits.id.encode()
    eventually("it is saved", lambda: saved.exists() and last in saved.read_bytes())
    alpha.start(wait=False)
    eventually("some have come", lambda: alpha.events("received", ch="status"))
    broker.stop(signal.SIGKILL)
    broker.start()

    def texts() -> set[str]:
        return {str(row["id"]) for row in alpha.events("received", ch="status")}

    eventually("all have come", lambda: len(texts()) == 300)
    eventually("it is over", lambda: module_session(alpha).startswith(f"{plain}:"))


def module_session(node: Daemon) -> str:
    """Which session a node's journal says that it had last."""
    import sqlite3

    journal = node.home / ".config" / "hive" / "state" / "journal.sqlite3"
    with contextlib.closing(sqlite3.connect(journal)) as file:
        rows = file.execute("SELECT value FROM settings WHERE key = 'session'").fetchall()
    return str(json.loads(rows[0][0])["id"]) if rows else ""


def test_a_new_password_loses_nothing(hive_of: Callable[..., Hive], broker: SetUp) -> None:
    hive, alpha, beta = two(hive_of, broker)
    beta.start()
    alpha.start()
    eventually("its session is known", lambda: module_session(alpha))
    alpha.stop()
    send(hive, "waits")
    secret = alpha.config.with_name("mqtt-password")
    secret.write_text("new\n")
    passwords = broker.home / "hive" / "passwords"
    lines = passwords.read_text().splitlines()
    other = next(line for line in lines if line.startswith("beta:"))
    hashed = hash_of("new")
    passwords.write_text(f"alpha:{hashed}\n{other}\n")
    broker.stop()
    broker.start()
    alpha.start()
    eventually("what waited has come", lambda: came(alpha) == ["waits"])


def hash_of(password: str) -> str:
    """As mosquitto_passwd writes it (PBKDF2, SHA-512)."""
    import base64
    import hashlib

    made = hashlib.pbkdf2_hmac("sha512", password.encode(), b"salt" * 3, 101)
    return f"$7$101${base64.b64encode(b'salt' * 3).decode()}${base64.b64encode(made).decode()}"


def test_a_broker_that_makes_one_client_of_all_of_a_users_serves_a_node(
    hive_of: Callable[..., Hive], broker: SetUp
) -> None:
    broker.stop()
    conf = broker.home / "mosquitto.conf"
    conf.write_text("use_username_as_clientid true\n" + conf.read_text())
    broker.start()
    hive, alpha, beta = two(hive_of, broker)
    for node in (alpha, beta):
        node.start()
    eventually("it gives up", lambda: module_session(alpha) and module_session(beta), 60)
    ups = len(alpha.events("connected"))
    assert ups <= 4
    send(hive, "hello")
    eventually("it came", lambda: came(alpha) == ["hello"])
    alpha.stop()
    alpha.start()
    send(hive, "again")
    eventually("it came", lambda: came(alpha) == ["hello", "again"])
    assert len(alpha.events("connected")) == ups + 1


def test_a_node_of_the_other_kind_is_told_of_in_one_line(
    hive_of: Callable[..., Hive], shared_broker: Broker
) -> None:
    hive = hive_of(shared_broker, interval=0.2)
    alpha, beta = hive.node("alpha"), hive.node("beta")
    say(beta, "checked")
    for node in (alpha, beta):
        node.handler("count", COUNT)
        node.start()
    to_checked = hive.cli("alpha", "send", "--to", "beta", "--text", "x", "--json").stdout
    beta.logged("dropped", id=json.loads(to_checked)["id"], level="debug")
    to_open = hive.cli("beta", "send", "--to", "alpha", "--text", "x", "--json").stdout
    alpha.logged("received", id=json.loads(to_open)["id"])
    for node, own, other in ((alpha, "open", "checked"), (beta, "checked", "open")):
        [line] = node.events("a node of the other kind")
        assert line["level"] == "warning"
        assert line["note"] == (
            f'[mqtt] senders is "{other}" there, and "{own}" here: make it the same'
        )
    assert beta.events("peer is up", peer="alpha") == []
    assert "senders: not checked" in hive.cli("alpha", "status").stdout


@pytest.mark.parametrize("senders", ["open", "checked"])
def test_a_session_is_named_by_what_only_its_node_knows(senders: str, tmp_path: Path) -> None:
    def name(**mqtt: object) -> str:
        said = {"node": {"id": "alpha"}, "mqtt": {"senders": senders, **mqtt}}
        return module.session_id(module.make_config(said, tmp_path / "hive.toml", {}))

    key = tmp_path / "node.key"
    key.write_text("secret")
    key.chmod(0o600)
    names = [
        name(username="alpha", password="one"),
        name(username="alpha", password="two"),
        name(key_file=str(key), cert_file=str(key)),
    ]
    assert len({*names}) == 3
    assert all(re.fullmatch("hive:alpha:[0-9a-f]{32}", one) for one in names)
    assert name(username="alpha", password="one") == names[0]
    assert name() == ("hive:alpha:checked" if senders == "checked" else "hive:alpha")
