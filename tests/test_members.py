"""Who is alive, who has left or failed, whose turn it is to say so."""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hive
from hive import (
    MAX_MEMBERS,
    Config,
    Envelope,
    IncomingMessage,
    Journal,
    Log,
    Loop,
    MemberEvent,
    Members,
    MqttConfig,
    NodeConfig,
    identifier,
    loss_of,
)


def nothing(said: Envelope | Callable[[bool], None]) -> None:
    pass


def members(*peers: str, me: str = "beta", at: float = 100) -> Members:
    """Those who have heard of these peers; a heartbeat is due every 5 s, 3 may be missed."""
    log = Log(stream=io.StringIO())
    loop = Loop(log)
    journal = Journal(None, log, 1.0, 1)
    made = Members(Config(NodeConfig(me)), loop, log, journal, nothing, nothing, print)
    journal.close()
    loop.close()
    for peer in peers:
        made.heartbeat_from(peer, at, seen=1)
    return made


def test_a_silent_node_is_lost_once() -> None:
    peers = members("attic")
    lost = [peers.failed_since(now) for now in (100, 115, 115.1, 116, 1000)]
    assert lost == [[], [], ["attic"], [], []]
    assert peers.alive() == set()


def test_a_node_that_is_heard_is_not_lost() -> None:
    peers = members("attic")
    for now in range(105, 1000, 14):
        peers.heartbeat_from("attic", now, seen=1)
        assert peers.failed_since(now + 13) == []
    assert peers.alive() == {"attic"}


def test_a_node_is_judged_by_its_own_interval() -> None:
    peers = members()
    peers.heartbeat_from("fast", 100, seen=1, interval=0.5)
    peers.heartbeat_from("slow", 100, seen=1, interval=60)
    assert [peers.failed_since(now) for now in (101.5, 102, 280, 281)] == [
        [],
        ["fast"],
        [],
        ["slow"],
    ]


@pytest.mark.parametrize("interval", [math.inf, -math.inf, math.nan, -1, 0, 1e308])
def test_no_node_can_say_of_itself_that_it_is_never_lost(interval: float) -> None:
    peers = members()
    peers.heartbeat_from("sly", 100, seen=1, interval=interval)
    assert peers.failed_since(100.2) == []
    assert peers.failed_since(100 + 3 * 3600 + 1) == ["sly"]


@pytest.mark.parametrize(
    ("announced", "news"), [(True, MemberEvent.BACK), (False, MemberEvent.NEW)]
)
def test_a_lost_node_that_comes_back_is_news_once(announced: bool, news: MemberEvent) -> None:
    peers = members("attic")
    assert peers.failed_since(200) == ["attic"]
    if announced:
        peers.mark_announced(loss_of("attic"), "beta")
    assert [peers.heartbeat_from("attic", now, seen=1) for now in (201, 206)] == [news, None]
    assert peers.failed_since(300) == ["attic"]
    assert (
        peers.heartbeat_from("attic", 301, seen=1) is MemberEvent.NEW
    )  # this loss was not announced


def test_a_loss_is_doubted_unless_somebody_announced_it() -> None:
    peers = members("attic", "cellar", "garden")
    peers.mark_left("garden")
    peers.mark_failed("attic", 100)
    peers.mark_failed("cellar", 100)
    peers.mark_announced(loss_of("cellar"), "beta")
    peers.doubt_losses()
    assert peers.alive() == {"attic"}
    assert peers.failed_since(116) == ["attic"]


@pytest.mark.parametrize(
    ("by", "counts"),
    [("alpha", True), ("beta", True), ("gamma", False), ("attic", False), ("aaa", False)],
)
def test_only_who_lives_and_stands_before_us_keeps_us_silent(by: str, counts: bool) -> None:
    peers = members("alpha", "gamma", "attic")
    peers.mark_failed("attic", 100)
    peers.mark_announced(loss_of("attic"), by)
    attic = peers.member("attic")
    assert attic and attic.announced is counts


def test_an_announcement_is_about_one_node() -> None:
    names = [f"{'x' * 62}{i}" for i in range(3)]
    peers = members(*names)
    assert peers.failed_since(200) == names
    peers.mark_announced(loss_of(names[1]), "beta")
    assert [peers.heartbeat_from(name, 201, seen=1) for name in names] == [
        MemberEvent.NEW,
        MemberEvent.BACK,
        MemberEvent.NEW,
    ]


@pytest.mark.parametrize("length", range(1, 64))
def test_the_corr_of_every_loss_is_an_id_and_tells_names_apart(length: int) -> None:
    names = [f"{first}{'x' * (length - 1)}" for first in "ab"]
    assert len({identifier(loss_of(name)) for name in names}) == 2


def test_a_node_is_new_once_and_again_after_it_said_goodbye() -> None:
    peers = members()
    assert [peers.heartbeat_from("attic", now, seen=1) for now in (1, 2)] == [MemberEvent.NEW, None]
    assert [peers.mark_left("attic"), peers.mark_left("attic")] == [True, False]
    assert peers.alive() == set() and peers.failed_since(1000) == []
    assert peers.heartbeat_from("attic", 1001, seen=1) is MemberEvent.NEW


def test_a_restart_is_told_by_another_boot_id() -> None:
    peers = members()
    boots = ["", "one", "one", "", "two", "two"]
    news = [peers.heartbeat_from("attic", now, seen=1, boot=boot) for now, boot in enumerate(boots)]
    assert news == [MemberEvent.NEW, None, None, None, MemberEvent.RESTARTED, None]


def test_a_node_whose_connection_died_is_lost_once_and_comes_back() -> None:
    peers = members("attic")
    assert [
        peers.mark_failed("attic", 100),
        peers.mark_failed("attic", 100),
        peers.mark_failed("stranger", 100),
    ] == [
        True,
        False,
        False,
    ]
    peers.mark_announced(loss_of("attic"), "beta")
    assert peers.failed_since(1000) == []
    assert peers.heartbeat_from("attic", 1001, seen=1) is MemberEvent.BACK


def test_a_node_that_died_while_we_were_away_is_lost_after_its_time() -> None:
    peers = members()
    peers.expect("attic", 100, seen=1)
    assert peers.alive() == {"attic"}
    assert [peers.failed_since(now) for now in (115, 116)] == [[], ["attic"]]


def test_a_retained_state_is_no_sign_of_life_of_a_node_we_know() -> None:
    peers = members("attic")
    peers.expect("attic", 114, seen=1)
    assert peers.failed_since(116) == ["attic"]
    peers.expect("attic", 117, seen=1)
    assert peers.alive() == set()


def test_nobody_is_blamed_for_what_we_could_not_hear() -> None:
    peers = members("attic", "cellar")
    peers.grant_grace(1000)
    peers.heartbeat_from("attic", 1010, seen=1)
    assert [peers.failed_since(now) for now in (1015, 1016)] == [[], ["cellar"]]


def test_exactly_one_of_the_living_is_first_to_speak_of_a_loss() -> None:
    names = ["alpha", "beta", "delta", "gamma"]
    ranks = []
    for me in names:
        peers = members(*(name for name in names if name != me), me=me)
        ranks.append(peers.rank(about="beta"))
        peers.mark_failed("beta", 100)
        ranks.append(peers.rank(about="beta"))
    del ranks[2:4]  # the one that was lost does not speak
    assert ranks == [0, 0, 1, 1, 2, 2]


def test_the_next_in_line_moves_up_when_the_first_is_lost_too() -> None:
    peers = members("alpha", "attic", me="beta")
    assert peers.rank(about="attic") == 1
    peers.mark_failed("alpha", 100)
    assert peers.rank(about="attic") == 0


def test_strangers_without_end_do_not_grow_the_members() -> None:
    peers = members("attic", "cellar")
    for i in range(MAX_MEMBERS + 50):
        peers.heartbeat_from(f"n{i}", 101, seen=1)
        peers.heartbeat_from("cellar", 101, seen=1)
    assert len(peers.alive()) == MAX_MEMBERS
    assert peers.member("attic") and peers.member("cellar")  # no stranger throws them out
    peers.failed_since(116.5)
    peers.heartbeat_from("garden", 117, seen=1)  # in the place of one that is gone
    assert peers.alive() == {"garden"}
    assert peers.member("attic") is None


def test_members_remember_when_a_peer_was_seen() -> None:
    peers = members()
    peers.heartbeat_from("attic", 100, seen=1771143500)
    attic = peers.member("attic")
    assert attic and attic.seen == 1771143500
    assert peers.member("stranger") is None


# What is kept of them


class Hall:
    """Members, and all that they say, on a clock that the test puts forward."""

    def __init__(self, me: str = "beta", senders: str = "open") -> None:
        self.log, self.now = io.StringIO(), 100.0
        self.sent: list[Envelope] = []
        self._log = Log("debug", "json", self.log)
        self.loop = Loop(self._log, lambda: self.now)
        self.journal = Journal(None, self._log, 1.0, 1)
        self._config = Config(NodeConfig(me), MqttConfig(senders=senders))
        self.restart()

    def restart(self) -> None:
        proof: Callable[[Callable[[bool], None]], None] = lambda done: done(True)  # noqa: E731
        self.fetched: list[str] = []
        given = (self._config, self.loop, self._log, self.journal, self.sent.append, proof)
        self.members = Members(*given, self.fetched.extend)

    def hear(self, name: str, kind: str, said: object, retained: bool = False) -> None:
        payload = said if isinstance(said, bytes) else hive.encode_json(said)
        topic = f"hive/meta/{name}/{kind}"
        message = IncomingMessage(topic, payload, retained, None, lambda: None)
        self.members.hear_document(name, kind, message)

    def beat(self, name: str, **said: object) -> None:
        text = hive.encode_json({"interval": 5.0, **said}).decode()
        self.members.hear(Envelope.new(name, "all", "heartbeat", text, urgency="later"))

    def advance(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 0.5)
            self.loop.post(lambda: None)
            self.loop.step()

    def events(self, level: str) -> list[dict[str, Any]]:
        rows = map(json.loads, self.log.getvalue().splitlines())
        return [
            {key: value for key, value in row.items() if key not in ("time", "ts", "level")}
            for row in rows
            if row["level"] == level
        ]


@pytest.fixture
def hall() -> Iterator[Hall]:
    made = Hall()
    yield made
    made.journal.close()
    made.loop.close()
    assert '"bug"' not in made.log.getvalue()


def test_the_last_document_of_each_kind_is_kept(hall: Hall) -> None:
    for word in ("old", "new"):
        hall.hear("attic", "state", {"status": "online", "word": word}, retained=True)
        hall.hear("attic", "roster", {"node": "attic", "word": word}, retained=True)
    hall.hear("beta", "state", {"status": "online"})  # our own is one of them
    hall.hear("main", "state", {"status": "online", "daemon_node": "attic"})
    states, rosters = hall.members.documents("state"), hall.members.documents("roster")
    assert {name: state.get("word") for name, state in states.items()} == {
        "attic": "new",
        "beta": None,
        "main": None,
    }
    assert rosters == {"attic": {"node": "attic", "word": "new"}}
    assert hall.members.alive() == {"attic"}  # an agent's node speaks for it
    hall.hear("attic", "state", b"")
    hall.hear("stranger", "state", b"")
    assert [*hall.members.documents("state")] == ["beta", "main"]
    assert hall.members.member("stranger") is None
    assert [*hall.members.documents("roster")] == ["attic"]


@pytest.mark.parametrize("noise", [b"no JSON", b"[1]", b"5", b"\xff"])
def test_what_is_no_document_takes_the_place_of_none(hall: Hall, noise: bytes) -> None:
    hall.hear("attic", "state", noise)
    hall.hear("a b", "state", {"status": "online"})
    assert hall.members.documents("state") == {}
    assert hall.members.member("attic") is hall.members.member("a b") is None


def test_a_heartbeat_counts_to_a_state_that_is_older(hall: Hall) -> None:
    before = int(time.time())
    hall.hear("attic", "state", {"status": "online", "last_seen": 5}, retained=True)
    hall.hear("cellar", "state", {"status": "online", "last_seen": before + 500}, retained=True)
    hall.hear("attic", "roster", {"node": "attic", "last_seen": 5})
    assert hall.members.documents("state")["attic"]["last_seen"] == 5
    hall.beat("attic")
    hall.beat("cellar")
    states = hall.members.documents("state")
    assert before <= states["attic"]["last_seen"] <= time.time()
    assert states["cellar"]["last_seen"] == before + 500
    assert hall.members.documents("roster")["attic"]["last_seen"] == 5


def test_a_long_state_is_kept_without_whom_it_knows(hall: Hall) -> None:
    short = {"status": "online", "known_peers": ["x" * 60]}
    hall.hear("short", "state", short)
    hall.hear("long", "state", {"status": "online", "known_peers": ["x" * 60] * 80})
    hall.hear("roster", "roster", {"known_peers": ["x" * 60] * 80})
    states = hall.members.documents("state")
    assert states == {"short": short, "long": {"status": "online"}}
    assert "known_peers" in hall.members.documents("roster")["roster"]


def test_a_document_has_a_bound(hall: Hall) -> None:
    for more, kept in ((0, ["attic"]), (1, [])):
        said = hive.encode_json({"node": "attic"}).ljust(64 * 1024 + more)
        hall.hear("attic", "roster", said)
        assert [*hall.members.documents("roster")] == kept


def test_all_documents_together_have_a_bound(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    def roster(size: int) -> bytes:
        return b'{"node": 1}'.ljust(size)

    monkeypatch.setattr(hive, "MAX_DOCUMENTS", 1000)
    hall.hear("a", "roster", roster(300))
    hall.hear("b", "roster", roster(400))
    hall.hear("c", "roster", roster(300))
    assert [*hall.members.documents("roster")] == ["a", "b", "c"]
    hall.hear("a", "roster", roster(301))  # in the place of its last one
    assert [*hall.members.documents("roster")] == ["c", "a"]  # the longest went
    hall.hear("d", "roster", roster(390))
    assert [*hall.members.documents("roster")] == ["c", "a", "d"]
    hall.hear("a", "roster", b"")
    hall.hear("e", "roster", roster(310))
    assert [*hall.members.documents("roster")] == ["c", "d", "e"]


def test_whoever_is_forgotten_takes_its_documents_along(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_MEMBERS", 2)
    monkeypatch.setattr(hive, "MAX_DOCUMENTS", 100)
    for name in ("a", "b", "c", "d", "e"):
        hall.hear(name, "roster", b'{"node": 1}'.ljust(50))
    assert [*hall.members.documents("roster")] == ["d", "e"]


def test_documents_that_are_too_many_are_dropped_with_a_word(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_DOCUMENTS", 100)
    for name in ("a", "b", "c"):
        hall.hear(name, "roster", b'{"node": 1}'.ljust(50))
    said = {"event": "too many documents: not known here", "peer": "c", "most": 100}
    assert hall.events("error") == [said]


# Whose agents there are


def test_a_roster_costs_no_more_in_a_large_hive(hall: Hall) -> None:
    def kept() -> dict[str, str]:
        rows = hall.journal._database.read("SELECT key, value FROM settings", ())
        return {key: value for key, value in rows if str(key).startswith("agents")}

    for n in range(50):
        hall.beat(f"n{n}")
        hall.hear(f"n{n}", "roster", {"agents": [f"main-{n}"]})
    before = kept()
    hall.hear("n7", "roster", {"agents": ["main-7"], "sessions": {"fix": {}}})
    differ = {key for key, value in kept().items() if before[key] != value}
    assert (len(before), differ) == (50, {"agents of n7"})
    hall.hear("n7", "state", b"")
    assert kept().keys() == before.keys() - {"agents of n7"}  # what is gone leaves nothing


def test_sessions_are_there_as_long_as_their_node_is(hall: Hall) -> None:
    hall.beat("attic")
    hall.hear("attic", "state", {"status": "online"})
    works = {"fix": {"directory": "~/src"}}
    hall.hear("attic", "roster", {"agents": ["fix"], "sessions": works})
    assert hall.members.documents("state")["fix"]["session"] == works["fix"]
    hall.hear("attic", "state", {"status": "offline"})
    assert "fix" not in hall.members.documents("state")


def test_agents_are_remembered_as_they_were_kept_before(hall: Hall) -> None:
    for _ in range(2):
        hall.journal.put("agents", {"main": "attic", "fix": "attic", "other": "cellar"})
        hall.journal.put("sessions of all", {"fix": True})
        hall.restart()
        hall.restart()
        found = {one: hall.members.node_of(one) for one in ("main", "fix", "other")}
        assert found == {"main": "attic", "fix": "attic", "other": "cellar"}
        assert [one for one in found if hall.members.is_session(one)] == ["fix"]
        assert hall.journal.get("agents") == {}


def test_an_agent_that_moved_from_a_node_that_is_gone_is_not_kept_for_it(hall: Hall) -> None:
    hall.beat("attic")
    hall.hear("attic", "roster", {"agents": ["main", "other"]})
    hall.members.mark_failed("attic", hall.now)
    hall.beat("cellar")
    hall.hear("cellar", "roster", {"agents": ["main"]})
    hall.restart()
    assert [hall.members.node_of(one) for one in ("main", "other")] == ["cellar", "attic"]


def test_a_roster_speaks_for_its_own_agents_only(hall: Hall) -> None:
    hall.beat("attic")
    hall.beat("mallory")
    hall.hear("attic", "roster", {"agents": ["main", "attic", ["x"], "a b", "x" * 64]})
    greedy = {"agents": ["main", "attic", "beta", "mine"]}
    for _ in range(2):
        hall.hear("mallory", "roster", greedy)
    assert hall.members.node_of("main") == "attic"
    assert hall.members.node_of("mine") == "mallory"
    assert [hall.members.node_of(name) for name in ("attic", "beta", "nobody")] == [
        "attic",
        "beta",
        None,
    ]
    refused = [(line["agent"], line["of"]) for line in hall.events("warning")]
    assert refused == [("attic", "attic"), ("beta", "beta"), ("main", "attic")]  # each once
    hall.hear("attic", "roster", {"agents": []})  # it has moved
    hall.hear("mallory", "roster", greedy)
    assert hall.members.node_of("main") == "mallory"


def test_our_own_agents_are_ours_whoever_was_first(hall: Hall) -> None:
    hall.beat("mallory")
    hall.hear("mallory", "roster", {"agents": ["main"]})
    hall.hear("beta", "roster", {"agents": ["main"]})
    hall.hear("mallory", "roster", {"agents": ["main"]})
    assert hall.members.node_of("main") == "beta"


def test_an_agent_that_moved_while_we_were_away_is_where_it_says(hall: Hall) -> None:
    hall.hear("attic", "roster", {"agents": ["main"]})
    hall.restart()
    hall.hear("attic", "state", {"status": "offline"}, retained=True)
    hall.hear("cellar", "roster", {"agents": ["main"]}, retained=True)
    assert hall.members.node_of("main") == "cellar"


@pytest.mark.parametrize("how", ["stopped", "connection lost", "forgotten"])
def test_the_agents_of_a_node_that_is_gone_may_be_anothers(hall: Hall, how: str) -> None:
    hall.beat("attic")
    hall.hear("attic", "roster", {"agents": ["main"]})
    gone = b"" if how == "forgotten" else {"status": "offline", "reason": how}
    hall.hear("attic", "state", gone)
    hall.hear("cellar", "roster", {"agents": ["main"]})
    assert hall.members.node_of("main") == "cellar"


def test_whose_an_agent_is_outlives_a_restart(hall: Hall) -> None:
    hall.hear("zattic", "roster", {"agents": ["main"]})
    hall.restart()
    hall.hear("mallory", "roster", {"agents": ["main"]}, retained=True)  # which comes first
    hall.hear("zattic", "roster", {"agents": ["main"]}, retained=True)
    assert hall.members.node_of("main") == "zattic"
    hall.restart()
    hall.advance(61)  # zattic had its time
    hall.hear("mallory", "roster", {"agents": ["main"]})
    assert hall.members.node_of("main") == "mallory"


def test_one_node_has_only_so_many_agents(hall: Hall) -> None:
    hall.hear("attic", "roster", {"agents": [f"a{number}" for number in range(101)]})
    assert hall.members.node_of("a99") == "attic" and hall.members.node_of("a100") is None


def test_in_a_checked_hive_a_nodes_state_tells_of_its_agents() -> None:
    hall = Hall(senders="checked")
    health = {"main": {"status": "down", "reason": "no gateway"}, "second": {"status": "ok"}}
    oc = {**health, "mine": {"status": "ok"}, "attic": {"status": "ok"}, "other": 5}
    hall.hear("attic", "roster", {"agents": ["main", "second", "attic", "other"]})
    hall.hear("attic", "state", {"status": "degraded", "reason": "main", "oc": oc, "uptime_s": 5})
    hall.hear("main", "state", {"status": "online", "daemon_node": "attic"})  # from before
    states = hall.members.documents("state")
    assert {*states} == {"attic", "main", "second"}
    assert states["main"] == {
        **{"status": "degraded", "reason": "no gateway", "uptime_s": 5},
        **{"node_id": "main", "oc": {"main": health["main"]}},
    }
    assert states["second"]["status"] == "online" and "reason" not in states["second"]
    hall.hear("attic", "state", {"status": "offline", "reason": "stopped", "oc": oc})
    gone = hall.members.documents("state")["second"]
    assert (gone["status"], gone["reason"]) == ("offline", "stopped")
    hall.journal.close()
    hall.loop.close()


# What is said of them


@pytest.mark.parametrize(
    ("status", "more", "alive", "level", "words"),
    [
        ("online", {}, {"attic"}, "info", None),
        ("degraded", {}, {"attic"}, "info", None),
        ("offline", {"reason": "stopped"}, set(), "info", {"event": "peer has stopped"}),
        ("offline", {}, set(), "info", {"event": "peer has stopped"}),
        ("offline", {"reason": "lost"}, {"attic"}, "info", None),  # another's word on it
        (
            "offline",
            {"reason": "connection lost"},
            set(),
            "warning",
            {"event": "peer is lost", "why": "its connection died"},
        ),
    ],
)
def test_what_a_new_state_of_a_living_peer_means(
    hall: Hall,
    status: str,
    more: dict[str, str],
    alive: set[str],
    level: str,
    words: dict[str, str] | None,
) -> None:
    hall.beat("attic")
    before = len(hall.events(level))
    for _ in range(2):  # said twice it is no more news
        hall.hear("attic", "state", {"status": status, **more})
    assert hall.members.alive() == alive
    assert hall.events(level)[before:] == ([{**words, "peer": "attic"}] if words else [])


def test_a_retained_state_is_no_goodbye_and_no_loss(hall: Hall) -> None:
    hall.beat("attic")
    for reason in ("stopped", "lost", "connection lost"):
        hall.hear("attic", "state", {"status": "offline", "reason": reason}, retained=True)
    assert hall.members.alive() == {"attic"}
    hall.hear("cellar", "state", {"status": "asleep"}, retained=True)
    assert hall.members.alive() == {"attic"}


def test_who_comes_goes_and_restarts_is_in_the_log(hall: Hall) -> None:
    hall.beat("attic", boot="one")
    hall.beat("attic", boot="one")
    hall.beat("attic", boot="two")
    hall.beat("attic", boot=["no id"])
    assert [row["event"] for row in hall.events("info")] == ["peer is up", "peer has restarted"]


def test_a_loss_is_told_once_with_when_it_was_seen(hall: Hall) -> None:
    seen = int(time.time()) - 1000
    state = {"status": "online", "last_seen": seen, "interval": 5}
    hall.hear("attic", "state", state, retained=True)
    for _ in range(4):
        hall.advance(5)
        hall.members.check(hall.now)
    hall.advance(1)
    assert hall.sent == []  # a moment of doubt
    for _ in range(2):
        hall.advance(5)
        hall.members.check(hall.now)
    [alert] = hall.sent
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seen))
    assert alert.text == f"attic is lost: no heartbeat for 20 s; last seen {when}"
    assert (alert.ch, alert.to, alert.corr) == ("alert", "all", loss_of("attic"))
    judged = hall.members.documents("state")["attic"]  # what we tell of it; nobody writes it down
    assert judged == {**state, "status": "offline", "reason": "lost"}
    hall.members.mark_announced(loss_of("attic"), "beta")
    hall.beat("attic")
    assert [one.text for one in hall.sent[1:]] == ["attic is back"]
    assert (hall.sent[1].ch, hall.sent[1].urgency, hall.sent[1].to) == ("status", "later", "all")


def test_who_stops_says_nothing_of_others_any_more(hall: Hall) -> None:
    hall.beat("attic")
    hall.members.stop()
    for _ in range(5):
        hall.advance(5)
        hall.members.check(hall.now)
    assert hall.sent == [] and hall.members.alive() == set()


def test_a_sleep_of_ours_is_nobodys_silence(hall: Hall) -> None:
    hall.beat("attic")
    hall.members.check(hall.now)
    hall.now += 1000
    hall.members.check(hall.now)
    assert hall.members.alive() == {"attic"}
    hall.advance(10)
    hall.members.check(hall.now)  # just as late as that: no sleep
    hall.advance(6)
    hall.members.check(hall.now)
    assert hall.members.alive() == set()


def test_whose_documents_do_not_come_is_asked_for_once(hall: Hall) -> None:
    """RabbitMQ gives nothing that is retained to a wildcard."""
    hall.beat("alpha")
    hall.beat("gamma")
    for document in ("state", "roster"):
        hall.hear("gamma", document, {"status": "online"})
    hall.members.check(hall.now)
    assert hall.fetched == [], "they may be on their way"
    for _ in range(3):
        hall.members.check(hall.now)
    assert hall.fetched == ["alpha"]


def test_not_more_are_asked_for_at_once_than_fit(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_FETCH", 3)
    for number in range(5):
        hall.beat(f"node{number}")
    for _ in range(3):
        hall.members.check(hall.now)
    assert len(hall.fetched) == 3


# ---- the last hour -----------------------------------------------------------------------


def test_the_last_hour_is_told_minute_by_minute() -> None:
    hour = hive.LastHour()
    for second in range(0, 180, 20):
        hour.beat(36_000 + second, 0.5 + second / 100)
    told = hour.document(36_179)
    assert told["beats"] == [0] * 57 + [3, 3, 3]
    assert told["load"] == [None] * 57 + [0.9, 1.5, 2.1]


def test_silence_is_told_and_what_is_older_than_an_hour_is_not() -> None:
    hour = hive.LastHour()
    hour.beat(36_000, 1.0)
    assert hour.document(36_000 + 59 * 60)["beats"] == [1] + [0] * 59
    assert hour.document(36_000 + 60 * 60)["beats"] == [0] * 60
    hour.beat(36_000 + 90 * 86_400, None)  # however long nobody looked
    assert hour.document(36_000 + 90 * 86_400) == {
        "beats": [0] * 59 + [1],
        "load": [None] * 59 + [0.0],
    }


def test_an_hour_does_not_grow_however_much_is_said_in_it() -> None:
    hour = hive.LastHour()
    for _ in range(1000):
        hour.beat(36_000, 1e9)
    told = hour.document(36_000)
    assert (told["beats"][-1], told["load"][-1]) == (255, 655.35)


# ---- what a peer says, and what is made of it ---------------------------------------------

OWN = hive.HeartbeatConfig(interval=5.0, miss_threshold=3)


@pytest.mark.parametrize(
    ("said", "age", "status"),
    [
        ({}, 16.0, "online"),  # three of five seconds, and one by which last_seen may be off
        ({}, 16.5, "stale"),
        ({"interval": 60, "miss_threshold": 2}, 121.0, "online"),
        ({"interval": 60, "miss_threshold": 2}, 121.5, "stale"),
        ({"interval": 0.1, "miss_threshold": 1}, 1.25, "stale"),
        ({"interval": 0.05, "miss_threshold": 0}, 16.0, "online"),  # senseless: as ours
        ({"interval": 3600, "miss_threshold": 10_000}, 9e6, "online"),
        ({"interval": 3601, "miss_threshold": 10_001}, 16.5, "stale"),
        ({"status": "degraded"}, 16.5, "stale"),
        ({"status": "offline"}, 9e6, "offline"),
        ({}, -5.0, "online"),
    ],
)
def test_a_state_is_judged_by_what_it_says_itself(
    said: dict[str, Any], age: float, status: str
) -> None:
    state = {"status": "online", "last_seen": 10**7, **said}
    assert hive.judged(state, OWN, 10**7 + age) == (status, 10**7, max(0.0, age))


@pytest.mark.parametrize(
    ("seen", "found"), [(None, None), (0.5, None), (1, 1), (7.9, 7), (True, None), (10**18, None)]
)
def test_when_a_peer_was_seen_is_a_time_or_nothing(seen: object, found: int | None) -> None:
    status, at, age = hive.judged({"status": "online", "last_seen": seen}, OWN, 8.0)
    assert (at, age is None) == (found, found is None)
    assert status == ("stale" if found is None else "online")


def test_words_of_a_peer_are_words_or_left_out() -> None:
    said: list[object] = [None, 5, "", "a b", "x" * 64, ["online"], "asleep"]
    found = [hive.status_of({"status": one}) for one in said]
    assert found == ["unknown"] * 6 + ["asleep"] and hive.status_of({}) == "unknown"
    assert hive.words_in(["a", 5, "b", None, "a"]) == {"a", "b"} and hive.words_in("ab") == set()
    roster = {"one": ["a", 5, "b c"], "two": {"d": {}}, "three": "e", "four": ["f"]}
    assert hive.names_in(roster, "one", "two", "three", "none") == {"a", "d"}


@pytest.mark.parametrize(
    ("status", "reason", "condition"),
    [
        ("offline", "connection lost", "lost"),
        ("offline", "lost", "lost"),
        ("offline", "stopped", "stopped"),
        ("offline", None, "stopped"),
        ("online", "lost", "online"),
    ],
)
def test_one_that_has_stopped_is_told_apart_from_one_that_is_lost(
    status: str, reason: object, condition: str
) -> None:
    assert hive.condition_of(status, reason) == condition


def test_a_node_without_a_load_says_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1.23456, 7.0, 8.0))
    assert hive.load_1m() == 1.23

    def fail() -> None:
        raise OSError

    monkeypatch.setattr(os, "getloadavg", fail)
    assert hive.load_1m() is None


def test_what_is_older_than_an_hour_is_gone_however_far_the_clock_went() -> None:
    hour = hive.LastHour()
    for minute in range(60):
        hour.beat(36_000 + 60 * minute, 1.004)
    assert hour.document(36_000 + 59 * 60) == {"beats": [1] * 60, "load": [1.0] * 60}
    hour.beat(36_000, 2.0)  # and one that came late counts to the newest
    assert hour.document(36_000)["beats"] == [1] * 59 + [2]
    assert hour.document(36_000 + 60 * 60)["beats"] == [1] * 58 + [2, 0]
    assert hour.document(999_999)["beats"] == [0] * 60


def test_anybody_can_invent_one_heartbeat() -> None:
    found = []
    for beats, documents in ((1, {}), (2, {}), (1, {"roster": b"{}"})):
        member = hive.Member()
        member.beats, member.documents = beats, documents
        found.append(member.proven)
    assert found == [False, True, True]


# ---- what is heard ------------------------------------------------------------------------


class Shown:
    """Takes note of what this node's presence is told."""

    instance = "this-run"

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *given: self.told.append((name, *given))


def test_what_comes_in_our_own_name_is_ours_or_anothers(hall: Hall) -> None:
    shown = Shown()
    hall.members.presence = shown  # type: ignore[assignment]
    hall.beat("beta", boot="this-run", seq=7)
    hall.beat("beta", boot="another")
    text = hive.encode_json({"boot": "another"}).decode()
    hall.members.hear(Envelope.new("beta", "beta", "heartbeat", text, urgency="later"))
    hall.hear("beta", "state", {"status": "online", "last_seen": 5}, retained=True)
    hall.hear("beta", "state", {"status": "online", "last_seen": 6})
    hall.hear("attic", "roster", {"ts": 1})
    assert shown.told == [
        ("hear_own", 7),
        ("answer",),
        ("check_own", "state", {"status": "online", "last_seen": 6}),
    ]
    assert [row["name"] for row in hall.events("error")] == ["beta"]
    assert hall.members.alive() == set()


def test_the_history_is_of_nodes_and_of_when_they_changed(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    hall.beat("attic", load_1m=1.5)
    hall.beat("attic", load_1m="x")
    hall.hear("beta", "state", {"status": "online"})
    hall.beat("beta")
    hall.hear("main", "state", {"status": "online", "daemon_node": "attic"})
    changed = list[float]()
    for status, reason in (("online", ""), ("online", ""), ("online", "x"), ("degraded", "x")):
        now[0] += 1
        hall.hear("attic", "state", {"status": status, "reason": reason})
        hall.hear("attic", "roster", {"status": status, "reason": reason})
        changed.append(hall.members.history()["attic"]["changed"])
    assert changed == [0.0, 0.0, 1003.0, 1004.0]
    history = hall.members.history()
    assert {*history} == {"attic", "beta"}
    assert (history["attic"]["beats"][-1], history["attic"]["load"][-1]) == (2, 0.0)
    assert history["beta"]["beats"][-1] == 1


def test_it_is_told_when_somebody_is_not_as_before(hall: Hall) -> None:
    changes = list[int]()
    hall.members.on_change = lambda: changes.append(1)

    def told(say: Callable[[], object]) -> bool:
        say()
        return bool([changes.pop() for _ in [*changes]])

    state = {"status": "online", "last_seen": 5}
    assert told(lambda: hall.beat("attic")) and not told(lambda: hall.beat("attic"))
    assert told(lambda: hall.hear("attic", "state", state))
    assert not told(lambda: hall.hear("attic", "state", state | {"last_seen": 6, "running": 3}))
    assert told(lambda: hall.hear("attic", "state", state | {"host": "x"}))
    assert told(lambda: hall.hear("attic", "state", state)), "it says that no more"
    assert told(lambda: hall.members.mark_left("attic"))
    assert told(lambda: hall.hear("attic", "state", b""))
    assert not told(lambda: hall.hear("attic", "state", b""))


def test_what_cannot_be_handed_on_is_left_out_of_a_document(hall: Hall) -> None:
    hall.hear("attic", "roster", b'{"node": "attic", "load": NaN, "word": "\\ud800"}')
    assert hall.members.documents("roster") == {"attic": {"node": "attic", "word": "\ufffd"}}


@pytest.mark.parametrize(("size", "kept"), [(4096, True), (4097, False)])
def test_from_4_kib_on_a_state_is_kept_without_whom_it_knows(
    hall: Hall, size: int, kept: bool
) -> None:
    hall.hear("attic", "state", hive.encode_json({"known_peers": ["x"], "n": 1}).ljust(size))
    assert ("known_peers" in hall.members.documents("state")["attic"]) is kept


def test_whoever_is_forgotten_is_gone_but_for_its_roster(hall: Hall) -> None:
    hall.beat("attic")
    hall.hear("attic", "roster", {"agents": ["main"]})
    hall.hear("attic", "state", {"status": "online"})
    hall.hear("attic", "state", b"")
    assert hall.members.alive() == set() and hall.members.node_of("attic") is None
    assert hall.members.documents("roster") == {"attic": {"agents": ["main"]}}
    assert hall.members._size == len(hive.encode_json({"agents": ["main"]}))
    assert [row["peer"] for row in hall.events("info")] == ["attic", "attic"]


def test_too_many_members_is_a_word_and_nobody_alive_goes(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_MEMBERS", 2)
    for name in ("a", "b", "c"):
        hall.beat(name)
    said = {"event": "too many members: not known here", "peer": "c", "most": 2}
    assert hall.events("error") == [said] and hall.members.alive() == {"a", "b"}
    hall.hear("c", "roster", {"node": "c"})
    assert hall.members._size == 0 and hall.members.member("c") is None


@pytest.mark.parametrize(
    ("interval", "silence"), [(-1.0, 0.3), (math.nan, 0.3), (math.inf, 3 * 3600.0), (0.0, 15.0)]
)
def test_an_interval_is_held_to_what_makes_sense(interval: float, silence: float) -> None:
    peers = members()
    peers.heartbeat_from("sly", 100, seen=1, interval=interval)
    assert peers.failed_since(100 + silence - 0.01) == []
    assert peers.failed_since(100 + silence + 0.01) == ["sly"]


# ---- whose agents, and who may do what ----------------------------------------------------


def test_the_names_of_agents_have_one_bound_for_all(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_MEMBERS", 3)
    hall.hear("attic", "roster", {"agents": ["a", "b"]})
    hall.hear("cellar", "roster", {"agents": ["c", "d"]})
    hall.hear("attic", "roster", {"agents": ["a", "b", "e"]})
    found = {name: hall.members.node_of(name) for name in "abcde"}
    assert found == {"a": "attic", "b": "attic", "c": "cellar", "d": None, "e": None}
    hall.hear("cellar", "roster", {"agents": ["a", "b", "attic", "beta", "c"]})
    assert len(hall.events("warning")) == 3, "so many are told"


def test_a_name_that_two_nodes_list_is_between_them(hall: Hall) -> None:
    for node in ("attic", "zelda", "mallory"):
        hall.beat(node)
        hall.hear(node, "roster", {"agents": ["main", "beta"]})
    assert hall.members.contested("main") == "attic and mallory and zelda"
    for one in ("beta", "attic", "nobody"):
        assert hall.members.contested(one) == ""


def test_a_node_has_a_minute_to_speak_up_for_its_agents(hall: Hall) -> None:
    for seconds, owner in ((59.5, "attic"), (60.0, "mallory")):
        hall.hear("attic", "roster", {"agents": ["main"]})
        hall.restart()
        hall.now += seconds
        hall.hear("mallory", "roster", {"agents": ["main"]})
        assert hall.members.node_of("main") == owner


def test_which_names_are_sessions_away_or_nobodys(hall: Hall) -> None:
    hall.beat("attic")
    said = {"agents": ["main"], "sessions": {"fix": {}}, "away": ["old", "main"]}
    hall.hear("attic", "roster", said)
    names = ("main", "fix", "old", "attic", "nobody")
    assert [hall.members.is_session(one) for one in names] == [False, True, True, False, False]
    assert [hall.members.is_away(one) for one in names] == [True, False, True, False, False]
    hall.beat("fix")  # which is a node now
    assert not hall.members.is_session("fix")
    assert not hall.members.has_no_agent("attic")
    for roster, none in (({"agents": []}, True), ({"agents": [], "sessions": {"a": {}}}, False)):
        hall.hear("cellar", "roster", roster)
        assert hall.members.has_no_agent("cellar") is none
    assert not hall.members.has_no_agent("nobody")


def test_the_sessions_of_a_node_that_is_gone_are_away(hall: Hall) -> None:
    hall.beat("attic")
    roster = {"sessions": {"fix": {}}, "away": ["old"]}
    hall.hear("attic", "roster", roster)
    assert hall.members.documents("roster")["attic"] == roster
    hall.members.mark_left("attic")
    assert hall.members.documents("roster")["attic"] == {"away": ["fix", "old"]}
    hall.hear("attic", "roster", {"agents": ["main"], "sessions": {}})
    assert hall.members.documents("roster")["attic"] == {"agents": ["main"]}


def test_nodes_are_counted_by_how_they_are(hall: Hall) -> None:
    states = {
        "a": {"status": "online"},
        "b": {"status": "degraded", "daemon_node": "b"},
        "c": {"status": "offline", "reason": "stopped"},
        "d": {"status": "offline", "reason": "connection lost"},
        "e": {"status": "asleep"},
        "main": {"status": "online", "daemon_node": "a"},
    }
    for name, state in states.items():
        hall.hear(name, "state", state)
    assert hall.members.count() == dict.fromkeys(
        ("online", "degraded", "stopped", "lost", "unknown"), 1
    )


def test_a_node_shows_itself_as_one_that_a_message_may_be_for(hall: Hall) -> None:
    state = {"status": "online", "last_seen": 995, "running": 2, "waiting": 3, "load_1m": 0.5}
    hall.hear("main", "state", {"status": "online", "daemon_node": "a"})
    hall.hear("a", "state", state)
    hall.hear("a", "roster", {"tags": ["gpu", 5], "handlers": ["ping"], "agents": ["main"]})
    hall.hear("b", "state", {"status": "offline", "last_seen": 900, "running": "x"})
    hall.hear("b", "roster", {"sessions": {"fix": {}}})
    hall.hear("c", "state", {"status": "online"})
    a, b, c = hall.members.candidates(1000.0, {"a": 4, "b": 7})
    assert a == hive.Candidate("a", "online", 5.0, True, {"gpu"}, {"ping"}, True, 5.5)
    assert b == hive.Candidate("b", "offline", 100.0, False, frozenset(), frozenset(), True, 7.0)
    assert c == hive.Candidate("c", "stale", None, False, frozenset(), frozenset(), False, 0.0)


# ---- when a loss is told ------------------------------------------------------------------


def told_after(hall: Hall, start: Callable[[], object]) -> float:
    """Seconds until the first alert."""
    start()
    began = hall.now
    while not hall.sent and hall.now < began + 100:
        hall.advance(0.5)
    return hall.now - began


def dies(hall: Hall, name: str) -> None:
    hall.hear(name, "state", {"status": "offline", "reason": "connection lost"})


@pytest.mark.parametrize(
    ("silence", "interval", "before_us", "seconds"),
    [
        (14.5, 5.0, 0, 1.5),  # a moment, long enough to connect again
        (15.0, 5.0, 0, 5.0),  # it was silent before for 1.5 times the keepalive
        (0.0, 5.0, 1, 4.0),  # half an interval for each that stands before us
        (0.0, 5.0, 2, 6.5),
        (0.0, 1.0, 1, 2.5),  # or a second
    ],
)
def test_a_loss_is_told_in_its_moment(
    silence: float, interval: float, before_us: int, seconds: float
) -> None:
    hall = Hall()
    config = hive.HeartbeatConfig(interval=interval)
    hall._config = Config(NodeConfig("beta"), MqttConfig(keepalive=10), heartbeat=config)
    hall.restart()
    hall.beat("attic", interval=60.0)
    hall.advance(silence)
    for name in ("aa", "ab")[:before_us]:
        hall.beat(name, interval=60.0)
    assert told_after(hall, lambda: dies(hall, "attic")) == seconds
    hall.journal.close()
    hall.loop.close()


@pytest.mark.parametrize(("count", "lost"), [(3, 3), (4, 0)])
def test_a_crowd_that_was_heard_once_is_no_news(
    hall: Hall, monkeypatch: pytest.MonkeyPatch, count: int, lost: int
) -> None:
    monkeypatch.setattr(hive, "MAX_LOSSES", 3)
    hall.restart()
    for number in range(count):
        hall.beat(f"ghost-{number}")
    for _ in range(4):
        hall.advance(5)
        hall.members.check(hall.now)
    assert len(hall.events("warning")) == lost


@pytest.mark.parametrize(("count", "end"), [(10, ""), (11, ", ...")])
def test_of_those_that_are_too_many_ten_are_named_once_a_minute(
    hall: Hall, monkeypatch: pytest.MonkeyPatch, count: int, end: str
) -> None:
    def advance(seconds: float) -> list[str]:
        before = told = len(hall.sent)
        for _ in range(round(2 * seconds)):
            hall.advance(0.5)
            for alert in hall.sent[told:]:  # as the broker brings them
                hall.members.mark_announced(alert.corr or "", "beta")
            told = len(hall.sent)
        return [alert.text.partition(";")[0] for alert in hall.sent[before:]]

    def lose(*names: str) -> None:
        for name in names * 2:
            hall.beat(name, interval=3600.0)
        for name in names:
            dies(hall, name)

    monkeypatch.setattr(hive, "MAX_LOSSES", 1)
    hall.restart()
    names = [f"n-{number}" for number in range(count + 1)]
    lose(*names)
    [first] = advance(1.5)
    left = [name for name in names if first != f"{name} is lost: its connection died"]
    assert advance(1.5) == [f"{count} more are lost: {', '.join(left[:10])}{end}"]
    assert (hall.sent[-1].ch, hall.sent[-1].to, hall.sent[-1].corr) == (
        *("alert", "all"),
        hive.MANY_LOST,
    )
    lose("again", "and-again")
    assert advance(58) == [], "the next one is a minute after the last"
    assert len(advance(5)) >= 1


# ---- what this node shows of itself -------------------------------------------------------


class Stage:
    """A presence, and all that it publishes."""

    def __init__(self, **settings: Any) -> None:
        self.now, self.room, self.published = 100.0, 10**6, list[hive.OutgoingMessage]()
        self.known, self.status = list[str](), hive.OwnStatus({}, ["ping"], [], "")
        self.loop = Loop(Log(stream=io.StringIO()), lambda: self.now)
        self.presence = hive.Presence(
            Config(NodeConfig("beta", tags=("gpu",)), **settings),
            self.loop,
            "this-run",
            self.published.append,
            lambda topic: self.room,
            lambda: self.status,
            lambda: self.known,
            {"received": 3},
        )

    def last(self, kind: str) -> dict[str, Any]:
        [*_, message] = [one for one in self.published if one.topic.endswith(f"/{kind}")]
        found: dict[str, Any] = json.loads(message.payload)
        return found

    def count(self, kind: str) -> int:
        return len([one for one in self.published if one.topic.endswith(f"/{kind}")])


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    made.loop.close()


def test_at_its_begin_a_node_shows_all_of_itself(stage: Stage) -> None:
    stage.presence.begin()
    stage.now += 0.26
    stage.presence.begin()  # as after each outage
    assert {kind: stage.count(kind) for kind in ("heartbeat", "state", "roster")} == {
        **{"heartbeat": 2, "state": 2, "roster": 2}
    }
    said = json.loads(json.loads(stage.published[-2].payload)["text"])
    assert (said["uptime_s"], said["seq"], said["boot"]) == (0.3, 2, "this-run")
    envelope = Envelope.parse(stage.published[-2].payload)
    assert (envelope.sender, envelope.to, envelope.urgency) == ("beta", "all", "later")
    state = stage.last("state")
    assert abs(state["last_seen"] - time.time()) < 5 and state["uptime_s"] == 0.3
    expected = {
        **{"node_id": "beta", "daemon_node": "beta", "status": "online", "known_peers": []},
        **{"running": 0, "waiting": 0, "outbox": 0, "rtt_ms": None, "oc": {}},
        **{"instance": "this-run", "miss_threshold": 3, "shares_journal": False},
        **{"counters": {"received": 3}, "host": os.uname().nodename},
    }
    assert expected.items() <= state.items() and "reason" not in state
    roster = stage.last("roster")
    assert abs(roster["ts"] - time.time()) < 5
    expected = {
        **{"node": "beta", "tags": ["gpu"], "handlers": ["ping"], "schedule": []},
        **{"agents": [], "sessions": {}, "away": [], "protocol": hive.PROTOCOL_VERSION},
        **{"version": hive.__version__, "build": hive.build()},
    }
    assert expected.items() <= roster.items()
    assert state["version"] == f"{hive.__version__} ({hive.build()})"


def test_what_is_wrong_with_a_node_stands_in_its_state(stage: Stage) -> None:
    stage.status = stage.status.replace(trouble="no disk", sessions={"fix": {}}, running=2)
    stage.presence.beat()
    state = stage.last("state")
    assert (state["status"], state["reason"], state["running"]) == ("degraded", "no disk", 2)
    assert state["oc"] == {"fix": hive.WELL}
    stage.presence.end()
    assert (stage.last("state")["status"], stage.last("state")["reason"]) == ("offline", "stopped")
    will = stage.presence.will()
    assert json.loads(will.payload)["reason"] == "connection lost" and will.retain


@pytest.mark.parametrize(("count", "named"), [(50, 50), (51, 0)])
def test_a_state_names_fifty_peers_or_none(stage: Stage, count: int, named: int) -> None:
    stage.known = [f"n-{number:02}" for number in reversed(range(count))]
    stage.presence.beat()
    assert stage.last("state")["known_peers"] == sorted(stage.known)[:named]


def test_whoever_asks_for_our_name_is_answered_once_a_second(stage: Stage) -> None:
    stage.presence.beat()
    for seconds, beats in ((0.9, 1), (0.1, 2), (0.5, 2)):
        stage.now = round(stage.now + seconds, 3)
        stage.presence.answer()
        assert stage.count("heartbeat") == beats


def test_the_way_of_a_heartbeat_is_told_in_milliseconds(stage: Stage) -> None:
    stage.presence.beat()
    for seconds, said in ((0.0001, 1), (0.0349, 35)):
        stage.now += seconds
        stage.presence.hear_own(1)
        stage.presence.hear_own(0)
        stage.presence._shown = []
        stage.presence._show_states()
        assert stage.last("state")["rtt_ms"] == said


def test_what_others_heard_of_us_that_is_older_is_said_again_once(stage: Stage) -> None:
    stage.presence.begin()
    now, old = int(stage.last("state")["last_seen"]), {"last_seen": 5, "ts": 5}
    for kind in ("state", "roster"):
        stage.presence.check_own(kind, {"last_seen": now, "ts": stage.last("roster")["ts"]})
    stage.now += 5
    stage.presence.beat()
    assert (stage.count("state"), stage.count("roster")) == (1, 1)
    for kind, counts in (("state", (2, 1)), ("roster", (2, 2))):
        stage.presence.check_own(kind, old)
        for _ in range(2):
            stage.presence.beat()
        assert (stage.count("state"), stage.count("roster")) == counts


def test_what_is_too_large_is_shown_without_what_can_be_spared_in_order(stage: Stage) -> None:
    stage.status = stage.status.replace(schedule=[{"name": "x" * 100}])
    stage.presence.publish_roster()
    whole = stage.published[-1].payload
    for room, spared in ((len(whole), []), (len(whole) - 1, ["schedule"]), (1, [*hive.SPARED])):
        stage.room = room
        stage.presence.publish_roster()
        roster = stage.last("roster")
        gone = [key for key in ("schedule", "handlers") if key not in roster]
        assert gone == [key for key in spared if key in ("schedule", "handlers")]
        assert roster.get("truncated", False) is bool(spared)
    stage.room = 10**6
    stage.status = stage.status.replace(handlers=["x" * hive.MAX_STATE])
    stage.presence.publish_roster()
    assert "handlers" not in stage.last("roster"), "nobody would keep it"


# ---- is our name taken? -------------------------------------------------------------------


class Query:
    """What is retained, as the test says."""

    def __init__(self, loop: Loop, mqtt: MqttConfig, filters: list[str], *given: Any) -> None:
        self.filters, self.marker = filters, given[0]
        self.found, self.complete = given[1:3]
        self.client = self
        self.published: list[hive.OutgoingMessage] = []

    def publish(self, message: hive.OutgoingMessage) -> None:
        self.published.append(message)

    def close(self, done: Callable[[], None], within: float) -> None:
        assert within == 0.0
        done()

    def hear(self, topic: str, said: object, retained: bool = True) -> None:
        payload = said if isinstance(said, bytes) else hive.encode_json(said)
        self.found(IncomingMessage(topic, payload, retained, None, lambda: None))


class Asking:
    """A daemon that begins, and asks first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hive, "RetainedQuery", Query)
        self.now, self.free = 100.0, list[float]()
        self.loop = Loop(Log(stream=io.StringIO()), lambda: self.now)
        self.check = hive.NameConflictCheck(
            self.loop,
            Config(NodeConfig("beta")),
            ["this-run", "the-last-run"],
            b"are you there?",
            lambda: self.free.append(self.now),
            print,
            print,
        )
        self.query: Any = self.check._query

    def state(self, **said: object) -> None:
        self.query.hear("hive/meta/beta/state", {"status": "online", **said})

    def beat(self, sender: str, retained: bool = False) -> None:
        self.query.hear("hive/all/heartbeat", {"from": sender}, retained)


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asking]:
    made = Asking(monkeypatch)
    yield made
    made.loop.close()


def test_a_name_without_a_living_state_is_free_at_once(asking: Asking) -> None:
    assert asking.query.filters == ["hive/meta/beta/state", "hive/all/heartbeat"]
    for said in ({"status": "offline"}, {"instance": "the-last-run"}, {"status": "asleep"}):
        asking.state(instance="another")
        asking.state(**{"instance": "another", **said})
        asking.query.complete()
        assert asking.free.pop() == asking.now and not asking.query.published
    asking.beat("beta")  # no state said so: that is another hive's idea of us


def test_a_living_state_is_asked_and_silence_frees_the_name(asking: Asking) -> None:
    asking.state(instance="another")
    asking.query.hear("hive/meta/beta/state", b"{}".ljust(hive.MAX_STATE + 1))
    asking.query.complete()
    [heartbeat] = asking.query.published
    assert (heartbeat.topic, heartbeat.qos) == ("hive/beta/heartbeat", 0)
    assert heartbeat.payload == b"are you there?"
    asking.beat("gamma")
    asking.beat("beta", retained=True)
    for seconds, free in ((7.4, []), (0.1, [107.5])):  # one and a half intervals
        asking.now += seconds
        asking.loop.post(lambda: None)
        asking.loop.step()
        assert asking.free == free


@pytest.mark.parametrize(("host", "where"), [("attic\n", r" on attic\\n"), (None, ""), ("", "")])
def test_a_heartbeat_under_our_name_says_that_it_is_taken(
    asking: Asking, host: object, where: str
) -> None:
    asking.state(instance="another", host=host)
    asking.query.hear("hive/meta/beta/state", b"{}".ljust(hive.MAX_STATE + 1))
    with pytest.raises(hive.BrokerError, match=f"another daemon is called beta{where}; stop it"):
        asking.beat("beta")


def test_a_document_of_just_so_many_bytes_is_read(asking: Asking) -> None:
    asking.state(instance="another")
    asking.query.hear("hive/meta/beta/state", b"{}".ljust(hive.MAX_STATE))
    asking.query.complete()
    assert asking.free
