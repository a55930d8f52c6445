"""Two sites, each with a Mosquitto of its own that `hive host` made, bridged to be one hive.

The bridge runs through a wire that can be cut.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from carrier import HERE, Carrier, Machine
from conftest import ROOT, eventually, need_mosquitto
from relay import Relay
from test_attacks import Member
from test_join import changed

import hive

SITE, PREFIX = "@office", "hive"
QUICK = f'[node]\nhandler_dir = "{ROOT}/hive-daemon.d"\n[heartbeat]\ninterval = 1.0\n'
NOT_AUTHORIZED = 0x87
LOAD, KILLS = 60, 1  # messages each way, and how often each broker is killed meanwhile


def conditions(one: Machine) -> dict[str, str]:
    rows = json.loads(one.run("status", "--json", code=None).stdout or "[]")
    return {row["name"]: hive.condition_of(row["status"], row["reason"]) for row in rows}


class Sites:
    """Alpha carries the hive; beta another part of it, which mini and mallory have joined."""

    def __init__(self, place: Path) -> None:
        self.alpha, self.beta = Carrier(place / "alpha"), Carrier(place / "beta", "beta")
        self.mini, self.mallory = (Machine(place / name, name) for name in ("mini", "mallory"))
        self.nodes = (self.alpha, self.beta, self.mini)
        for one in self.nodes:
            one.config.parent.mkdir(parents=True, mode=0o700)
            one.config.write_text(QUICK)
        self.alpha.carry()
        self.wire = Relay(HERE, self.alpha.port)
        line = changed(self.alpha.invite(SITE), port=self.wire.port)
        self.said = self.beta.run(*self.beta.where, "--bridge", "-", stdin=line).stdout
        for one in (self.mini, self.mallory):
            one.run("join", "-", stdin=self.beta.invite(one.name))
        for one in self.nodes:
            one.daemon()

    def seen(self, *, of: tuple[Machine, ...] = (), **expected: str) -> None:
        """Wait until these, or all, see each node so."""
        for one in of or self.nodes:
            self._sees(one, expected)

    def _sees(self, one: Machine, expected: dict[str, str]) -> None:
        seen: dict[str, str] = {}

        def as_expected() -> bool:
            seen.update(conditions(one))
            return expected.items() <= seen.items()

        try:
            eventually("", as_expected)
        except AssertionError:
            raise AssertionError(f"{one.name} sees {seen}, not {expected}") from None

    def all_well(self) -> None:
        self.seen(alpha="online", beta="online", mini="online")

    def close(self) -> None:
        self.wire.close()
        for one in (self.mini, self.mallory, self.beta, self.alpha):
            one.close()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    need_mosquitto()
    made = Sites(tmp_path_factory.mktemp("sites"))
    yield made
    made.close()


def bridge_line(one: Machine) -> str:
    said = one.run("doctor", code=None).stdout
    (line,) = [line for line in said.splitlines() if f"the bridge of {SITE}" in line]
    return re.sub(r":\d+", "", " ".join(line.split()))


def hand_in(one: Machine, to: str, number: int) -> str:
    """What `hive send` hands to the daemon; the message's id."""
    config = hive.load_config(str(one.config))
    config = config.replace(node=config.node.replace(state_dir=one.state))
    id = f"{one.name}-{to}-{number}"
    said = hive.Envelope.new(one.name, to, "status", "x", urgency="later", id=id).document()
    control = hive.connect_to_daemon(config, 5.0)
    assert control
    control.ask({"do": "send", "envelope": said, "wait": False})
    control.close()
    return id


def arrived(one: Machine, sender: str) -> Counter[str]:
    """How often each message of another node's is in its journal."""
    uri = f"file:{one.state}/journal.sqlite3?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as journal:
        rows = journal.execute("SELECT id FROM log WHERE event = 'in' AND sender = ?", (sender,))
        return Counter(id for (id,) in rows if id.startswith(f"{sender}-"))


# ---- One hive ------------------------------------------------------------------------------


def test_two_sites_are_one_hive(sites: Sites) -> None:
    assert f"bridge to {HERE}:{sites.wire.port}: there, as {SITE}\n" in sites.said
    sites.all_well()
    assert bridge_line(sites.alpha) == f"ok hosting the bridge of {SITE} is there"
    assert bridge_line(sites.beta) == f"ok hosting the bridge of {SITE} to {HERE} is there"
    for one, other in (("alpha", "mini"), ("mini", "alpha")):
        machine = getattr(sites, one)
        ask = ("send", "--to", other, "--action", "ping", "--text", "x", "--wait", "20")
        assert machine.run(*ask).stdout == "pong\n"
    rosters = json.loads(sites.alpha.run("roster", "--json").stdout)
    assert {one["node"] for one in rosters} == {"alpha", "beta", "mini"}
    (daemon,) = sites.mini.daemons
    daemon.kill()  # its will goes over the bridge
    daemon.wait()
    sites.mini.daemons.clear()
    sites.seen(of=(sites.alpha, sites.beta), mini="lost")
    sites.mini.daemon()
    sites.all_well()


def test_a_name_is_taken_at_the_other_site_too(sites: Sites, tmp_path: Path) -> None:
    line = sites.alpha.error("invite", "mini", code=1)
    assert line == "hive: mini is in this hive already, at another site; another name"
    line = sites.beta.error("invite", "alpha", code=1)
    assert line == "hive: alpha is in this hive already, at another site; another name"
    late = Machine(tmp_path / "late", "mini")
    sites.alpha.stop_daemons()  # which knows the names: so it is invited, and may not begin
    late.run("join", "-", stdin=sites.alpha.invite("mini"))
    sites.alpha.daemon()
    assert "hive: another daemon is called mini" in late.run("daemon", code=3).stderr
    sites.alpha.run("expel", "mini")
    sites.all_well()  # the other one says its state again


def test_who_has_joined_at_the_other_site_is_expelled_there(sites: Sites) -> None:
    line = sites.alpha.error("expel", "mini", code=1)
    assert line == "hive: mini has not joined here; say this where it has, or forget it"
    sites.all_well()


# ---- A member that has turned --------------------------------------------------------------


class At:
    """One site's broker, for a raw member of it."""

    def __init__(self, carrier: Carrier, machine: Machine) -> None:
        self.address, self.port, self._machine = HERE, carrier.port, machine

    def admit(self, client: mqtt.Client, user: str) -> None:
        account = hive.load_config(str(self._machine.config)).mqtt
        client.tls_set(str(account.ca_file))
        client.username_pw_set(account.username, account.password)


def member(carrier: Carrier, machine: Machine) -> Member:
    return Member(At(carrier, machine), machine.name, prefix=PREFIX)  # type: ignore[arg-type]


def test_a_member_of_one_site_speaks_in_no_name_at_the_other(sites: Sites) -> None:
    victim, mallory = member(sites.alpha, sites.alpha), member(sites.beta, sites.mallory)
    victim.subscribe("hive/alpha/+/+", "hive/all/+/+", "hive/all/+", "hive/meta/+/+", "#")
    named = [f"{to}/{ch}/alpha" for to in ("alpha", "all", "mini") for ch in hive.CHANNELS]
    named += ["alpha/command/mini", "all/alert/beta", f"all/{SITE}", f"alpha/command/{SITE}"]
    named += [f"meta/{name}/{one}" for name in ("alpha", SITE) for one in ("state", "roster")]
    for topic in named:
        assert mallory.publish(topic, b"forged") == NOT_AUTHORIZED, topic
    assert mallory.publish("alpha/status/mallory", b"in her own name") == 0
    eventually("that arrives", lambda: [m for m in victim.heard if m.payload.startswith(b"in")])
    heard = victim.everything()
    assert [m for m in heard if m.payload == b"forged"] == []
    assert {m.topic for m in heard if "mallory" in m.topic} == {"hive/alpha/status/mallory"}
    for one in (victim, mallory):
        one.end()


def test_a_member_of_one_site_chooses_no_password_at_the_other(sites: Sites) -> None:
    sites.alpha.host.invite("mallory", time.time())
    before = sites.alpha.host.members()
    mallory = member(sites.beta, sites.mallory)
    hashed = hive.password_hash("x", b"s" * 12).encode()
    assert mallory.publish("@host/command/mallory", hashed) == 0  # that is for beta
    assert mallory.publish("alpha/status/mallory", b"after it") == 0
    eventually("her word came", lambda: "not an envelope" in sites.alpha.log())
    mallory.end()
    assert sites.alpha.host.members() == before
    sites.alpha.host.expel("mallory")
    sites.alpha.host.reload()


# ---- Cut, and killed -----------------------------------------------------------------------


def test_what_a_cut_bridge_kept_arrives_and_nobody_believes_what_is_old(sites: Sites) -> None:
    sites.all_well()
    sites.wire.cut()
    sites.seen(of=(sites.alpha,), alpha="online", beta="lost", mini="lost")
    sites.seen(of=(sites.mini, sites.beta), alpha="lost", beta="online")
    assert "is cut; is a broker running there" in bridge_line(sites.beta)
    assert "is cut; is a broker running there" in bridge_line(sites.alpha)
    assert f"the bridge of {SITE} is cut; " in sites.mini.run("status").stdout
    sent = [hand_in(sites.alpha, "mini", n) for n in range(5)]
    back = [hand_in(sites.beta, "alpha", n) for n in range(5)]
    sites.mini.stop_daemons()  # at alpha's broker it is online still
    sites.alpha.stop_daemons()  # and at beta's there is another alpha
    tagged = sites.alpha.config.read_text().replace("[node]\n", '[node]\ntags = ["new"]\n')
    sites.alpha.config.write_text(tagged)
    sites.alpha.daemon()
    sites.seen(of=(sites.beta,), mini="stopped")
    sites.wire.heal()
    two = (sites.alpha, sites.beta)
    sites.seen(of=two, alpha="online", beta="online", mini="stopped")
    assert "bridge" not in sites.alpha.run("status").stdout
    assert [arrived(sites.alpha, "beta")[id] for id in back] == [1] * 5
    sites.mini.daemon()
    sites.all_well()
    eventually("all is there", lambda: [*map(arrived(sites.mini, "alpha").get, sent)] == [1] * 5)
    for carrier in two:  # and not only those believe it who have seen it
        eventually("the last word counts", lambda at=carrier: tags_at(at) == ["new"])  # type: ignore[misc]


def tags_at(carrier: Carrier) -> object:
    """What alpha's roster says at this broker."""
    rosters = json.loads(carrier.run("roster", "--direct", "--json").stdout)
    return next(one["tags"] for one in rosters if one["node"] == "alpha")


def kill_broker(host: hive.Host) -> None:
    killed = host.broker_pid()
    assert killed
    os.kill(killed, signal.SIGKILL)
    eventually("another one runs", lambda: host.broker_pid() not in (None, killed))


def test_kill_9_of_either_broker_under_load_loses_nothing(sites: Sites) -> None:
    sites.all_well()
    alpha, beta, mini = sites.alpha, sites.beta, sites.mini
    (daemon,), witness = alpha.daemons, member(alpha, alpha)
    witness.subscribe("hive/alpha/status/mini")
    daemon.send_signal(signal.SIGSTOP)
    sent = [hand_in(mini, "alpha", 50 + number) for number in range(20)]
    eventually("they are there", lambda: len(witness.heard) == len(sent))
    kill_broker(alpha.host)  # before it has saved them, of which beta's broker knows nothing
    daemon.send_signal(signal.SIGCONT)
    witness.end()
    kills = {LOAD * (n + 1) // (2 * KILLS + 1): (alpha, beta)[n % 2] for n in range(2 * KILLS)}
    for number in range(LOAD):
        sent += [hand_in(alpha, "mini", 100 + number), hand_in(mini, "alpha", 100 + number)]
        if carrier := kills.get(number):
            kill_broker(carrier.host)

    def missing() -> list[str]:
        came = arrived(alpha, "mini") | arrived(mini, "alpha")
        assert not [id for id, times in came.items() if times > 1]
        return [id for id in sent if id not in came]

    eventually("all is there", lambda: not missing())
    sites.all_well()
    assert beta.host.broker_pid()


# ---- What is said of it --------------------------------------------------------------------


def test_a_line_for_another_purpose_says_which(sites: Sites, tmp_path: Path) -> None:
    other = Carrier(tmp_path / "other", "other")
    line = sites.alpha.invite("@lab").strip()
    assert "@lab" not in hive.Invitation.parse(line).authority()
    said = other.error("join", line, code=2)
    assert said == "hive: this line bridges a site, and makes no node: hive host --bridge -"
    assert "hive host --bridge -" in sites.alpha.run("invite", "@lab").stderr
    node = sites.alpha.invite("nas").strip()
    said = sites.beta.error("host", "--bridge", node, code=2)
    assert said == "hive: this line makes nas a node, and bridges no site: hive join -"
    said = sites.beta.error("invite", "@lab", code=2)
    assert "this site is bridged to" in said and said.endswith("sites are invited there, as a star")
    said = sites.alpha.error("host", "--bridge", line, code=2)
    assert said == f"hive: host: {SITE} is bridged to here, so invite the other one too: a star"
    for name in ("@host", "@", "@all", "@a/b"):
        assert "is not a node's name, or @" in sites.alpha.error("invite", name, code=2)
    for name in ("@lab", "nas"):
        sites.alpha.run("expel", name)


def test_two_nodes_of_one_name_are_no_hive(sites: Sites, tmp_path: Path) -> None:
    other = Carrier(tmp_path / "other", "alpha")
    try:
        line = sites.alpha.invite("@lab").strip()
        said = other.error(*other.where, "--bridge", line, code=1)
        assert said == (
            "hive: alpha: a node of here, and one of there; names are unique in a hive: let it"
            " join again under another one"
        )
        assert "@lab" in sites.alpha.host.invited(time.time())  # the line is good still
    finally:
        other.close()
        sites.alpha.run("expel", "@lab")


def test_a_bridge_ends_on_either_side(sites: Sites) -> None:
    """Last: it is not made anew."""
    said = sites.beta.run("host", "--bridge", "none").stdout
    assert "no bridge to another site\n" in said
    assert "bridge" not in sites.beta.host.conf.read_text()
    assert "is cut" in bridge_line(sites.alpha)
    assert sites.alpha.run("expel", SITE).stdout == f"expelled: {SITE} (1 document)\n"
    assert SITE not in (sites.alpha.host.folder / "acl").read_text()
    assert sites.alpha.run("forget", "mini").stdout.startswith("forgotten: mini (")
