"""Members, from the broker's side: who is lost and who says so, what a node shows of itself."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import calls_of
from rig import Rig

import hive

# Who is there


def lost(rig: Rig) -> list[str]:
    return [row["peer"] for row in rig.events("peer is lost")]


def test_a_silent_node_is_lost_once(rig: Rig) -> None:
    rig.beat("gamma")
    rig.advance(14)
    assert lost(rig) == []
    rig.advance(11)
    assert lost(rig) == ["gamma"]
    (alert,) = rig.sent("alert")
    assert (alert.sender, alert.to, alert.urgency) == ("beta", "all", "now")
    assert "gamma is lost" in alert.text
    (published,) = [p for p in rig.wire.published if p.topic == "hive/all/alert"]
    assert (published.qos, published.retain) == (1, False)
    rig.advance(300)
    assert lost(rig) == ["gamma"]
    assert rig.sent("alert") == [alert]


def test_a_loss_wakes_the_agent(
    rig_of: Callable[..., Rig], main_agent: hive.InstanceConfig, fast_agent: Path
) -> None:
    rig = rig_of([main_agent])
    rig.beat("gamma")
    rig.advance(25)
    (call,) = rig.until("the agent is called", lambda: calls_of(fast_agent))
    assert "gamma is lost" in call["argv"][3]


def test_a_peer_that_shows_itself_is_not_lost(rig: Rig) -> None:
    rig.live(100, "alpha", "gamma")
    assert lost(rig) == []
    assert rig.sent() == []


@pytest.mark.parametrize("interval", [1.0, 60.0])
def test_a_peer_is_judged_by_its_own_interval(rig: Rig, interval: float) -> None:
    rig.beat("gamma", interval=interval)
    rig.advance(2.5 * interval)
    assert lost(rig) == []
    rig.advance(interval + 10)
    assert lost(rig) == ["gamma"]
    assert len(rig.sent("alert")) == 1


def test_the_next_in_line_speaks_when_the_first_keeps_silent(rig: Rig) -> None:
    rig.beat("gamma")
    rig.live(22, "alpha")
    assert lost(rig) == ["gamma"]
    assert rig.sent("alert") == []
    rig.live(10, "alpha")
    assert len(rig.sent("alert")) == 1
    rig.live(100, "alpha")
    assert len(rig.sent("alert")) == 1


def test_the_next_in_line_speaks_at_once_when_the_first_is_lost_too(rig: Rig) -> None:
    rig.beat("alpha")
    rig.beat("gamma")
    rig.advance(25)
    assert sorted(alert.text[:5] for alert in rig.sent("alert")) == ["alpha", "gamma"]


@pytest.mark.parametrize("seconds", [18, 21], ids=["before we noticed", "after we noticed"])
def test_nothing_is_said_when_somebody_spoke_already(rig: Rig, seconds: int) -> None:
    rig.beat("gamma")
    rig.live(seconds, "alpha")
    assert rig.sent("alert") == []
    rig.say("alert", to="all", text="gamma is lost", corr=hive.loss_of("gamma"))
    rig.live(60, "alpha")
    assert lost(rig) == ["gamma"]
    assert rig.sent("alert") == []


def test_a_second_loss_is_told_again(rig: Rig) -> None:
    for count in (1, 2, 3):
        rig.beat("gamma")
        rig.advance(25)
        assert lost(rig) == ["gamma"] * count
        assert len(rig.sent("alert")) == count
        rig.advance(100)


def test_a_connection_that_dies_is_told_at_once(rig: Rig) -> None:
    rig.beat("gamma")
    rig.turn()
    rig.hear_state("gamma", status="offline", reason="connection lost")
    rig.turn()
    assert lost(rig) == ["gamma"]
    rig.advance(2)
    assert len(rig.sent("alert")) == 1
    rig.hear_state("gamma", status="offline", reason="connection lost")
    rig.advance(100)
    assert lost(rig) == ["gamma"]
    assert len(rig.sent("alert")) == 1


def test_one_that_fell_silent_has_a_moment_more_to_come_back(rig: Rig) -> None:
    """The broker gave it up: a network that stalls, or a machine that is frozen."""
    for name in ("gamma", "delta"):
        rig.beat(name, interval=60.0)
        rig.advance(10)
        rig.hear_state(name, status="offline", reason="connection lost")
        rig.advance(4.5)
        assert lost(rig)[-1] == name, "all may know that at once"
        assert rig.sent("alert") == []
        if name == "gamma":
            rig.beat(name, interval=60.0)
        rig.advance(2)
    (alert,) = rig.sent("alert")
    assert alert.text.startswith("delta is lost: its connection died")


def test_a_clean_goodbye_is_no_loss(rig: Rig) -> None:
    rig.beat("gamma")
    rig.turn()
    rig.hear_state("gamma", status="offline", reason="stopped")
    rig.advance(100)
    assert lost(rig) == []
    assert rig.sent() == []
    assert rig.events("peer has stopped", peer="gamma")
    assert rig.kept("beta", "state")[-1]["known_peers"] == []


@pytest.mark.parametrize("how", ["silence", "will"])
def test_a_peer_that_comes_back_is_told_once(rig: Rig, how: str) -> None:
    rig.beat("gamma")
    rig.turn()
    match how:
        case "silence":
            rig.advance(25)
        case "will":
            rig.hear_state("gamma", status="offline", reason="connection lost")
    rig.advance(3)
    assert lost(rig) == ["gamma"]
    rig.beat("gamma", boot="second")
    rig.turn()
    (status,) = rig.sent("status")
    assert (status.sender, status.to, status.text) == ("beta", "all", "gamma is back")
    assert rig.events("peer is back", peer="gamma")
    rig.live(30, "gamma")
    assert rig.sent("status") == [status]


def test_only_the_first_in_line_says_who_is_back(rig: Rig) -> None:
    rig.beat("gamma")
    rig.live(25, "alpha")
    rig.live(20, "alpha", "gamma")
    assert rig.sent("status") == []
    assert rig.events("peer is back", peer="gamma")


def test_a_peer_that_is_new_or_restarts_is_no_news_for_the_hive(rig: Rig) -> None:
    rig.beat("gamma", boot="first")
    rig.beat("gamma", boot="second")
    rig.turn()
    assert rig.events("peer is up", peer="gamma")
    assert rig.events("peer has restarted", peer="gamma")
    assert rig.sent() == []


def test_nobody_is_blamed_for_an_outage_of_our_link(rig: Rig) -> None:
    rig.beat("gamma")
    rig.turn()
    rig.disconnect()
    rig.advance(100)
    rig.connect()
    rig.advance(14)
    assert lost(rig) == []
    rig.advance(11)
    assert lost(rig) == ["gamma"]
    assert len(rig.sent("alert")) == 1


def test_an_outage_is_one_line_and_nothing_is_heard_of_heartbeats_in_it(rig: Rig) -> None:
    rig.disconnect()
    before = len(rig.wire.published)
    for _ in range(5):
        rig.disconnect()
        rig.advance(20)
    assert len(rig.wire.published) == before
    assert len(rig.events("no broker, trying again", level="error")) == 1
    rig.connect()
    rig.advance(1)
    assert rig.kept("beta", "state")[-1]["status"] == "online"


def test_a_broker_that_stops_does_not_make_everyone_lost(rig: Rig) -> None:
    """It publishes the others' wills first, and ends our connection a moment later."""
    rig.live(10, "alpha", "gamma")
    for name in ("alpha", "gamma"):
        rig.hear_state(name, status="offline", reason="connection lost")
    rig.advance(0.5)
    rig.disconnect()
    rig.advance(60)
    rig.connect()
    rig.live(60, "alpha", "gamma")
    assert rig.sent() == []


def dies(rig: Rig, *names: str) -> None:
    """The broker publishes their wills."""
    for name in names:
        rig.hear_state(name, status="offline", reason="connection lost")


def alerts(rig: Rig) -> list[str]:
    return [alert.text.partition(" is lost")[0] for alert in rig.sent("alert")]


MANY = [f"n{i:02}" for i in range(30)]


@pytest.mark.parametrize("seconds", [1, 4, 20])
@pytest.mark.parametrize("count", [2, 3, 30])
def test_a_broker_that_stops_slowly_is_no_loss(rig: Rig, count: int, seconds: float) -> None:
    """It closes one connection after the other, ours last, and takes none any more."""
    for name in MANY[:count]:
        rig.beat(name)
    rig.wire.takes_connections = False
    for i, name in enumerate(MANY[:count]):
        dies(rig, name)
        for other in MANY[i + 1 : count]:  # the rest is served
            rig.beat(other)
        rig.advance(seconds / count)
    rig.disconnect()
    rig.wire.takes_connections = True
    rig.advance(30)
    rig.connect()
    rig.live(60, *MANY[:count])
    assert rig.sent() == []


def test_a_broker_that_hangs_while_it_stops_is_no_loss(rig: Rig) -> None:
    rig.live(10, "alpha", "gamma")
    rig.wire.takes_connections = None
    dies(rig, "alpha", "gamma")
    rig.advance(20)
    rig.disconnect()
    rig.advance(100)
    assert rig.sent() == []


def test_a_crowd_whose_connections_die_but_who_come_back_is_no_loss(rig: Rig) -> None:
    """As behind a router that restarts: the broker itself is well."""
    for name in MANY:
        rig.beat(name)
    for i, name in enumerate(MANY):
        dies(rig, name)
        rig.advance(0.1)
        for back in MANY[max(0, i - 12) : i - 9]:
            rig.beat(back)
    for name in MANY:
        rig.beat(name)
    rig.advance(10)
    assert rig.sent() == []


@pytest.mark.parametrize("count", [1, 5, 30])
def test_those_who_really_died_are_told_within_four_seconds(rig: Rig, count: int) -> None:
    for name in ("zeta", *MANY):
        rig.beat(name)
    rig.turn()
    dies(rig, *MANY[:count])
    rig.advance(3.5)
    assert sorted(alerts(rig)) == MANY[:count]
    assert len(rig.wire.probes) == 1


def test_a_loss_is_told_once_the_broker_takes_connections_again(rig: Rig) -> None:
    rig.wire.takes_connections = False
    rig.beat("gamma")
    rig.turn()
    dies(rig, "gamma")
    rig.advance(10)
    assert alerts(rig) == []
    rig.wire.takes_connections = True
    rig.advance(3)
    assert alerts(rig) == ["gamma"]


def test_a_broker_that_takes_no_more_connections_does_not_hide_a_loss_for_ever(rig: Rig) -> None:
    rig.wire.takes_connections = False
    rig.live(5, "alpha", "gamma")
    dies(rig, "gamma")
    rig.live(50, "alpha")
    assert alerts(rig) == []
    rig.live(20, "alpha")
    assert alerts(rig) == ["gamma"]


def test_what_was_shown_before_a_loss_shows_nothing_about_it(rig: Rig) -> None:
    """A connection that was asked for before the last one died proves nothing."""
    rig.wire.takes_connections = None
    rig.beat("gamma")
    rig.beat("delta")
    rig.turn()
    dies(rig, "gamma")
    rig.advance(2)
    dies(rig, "delta")
    rig.wire.probes[0](True)
    rig.advance(1)
    assert alerts(rig) == []
    rig.advance(1)
    rig.wire.probes[1](True)
    rig.advance(1)
    assert sorted(alerts(rig)) == ["delta", "gamma"]


def test_who_comes_and_goes_all_the_time_does_not_hide_the_loss_of_another(rig: Rig) -> None:
    rig.beat("gamma")
    rig.turn()
    dies(rig, "gamma")
    for _ in range(70):
        rig.beat("delta")
        rig.turn()
        dies(rig, "delta")
        rig.advance(1)
    assert "gamma" in alerts(rig)


def test_a_node_that_slept_does_not_blame_the_others(rig: Rig) -> None:
    rig.beat("gamma")
    rig.turn()
    rig.clock.now += 1000
    rig.turn()
    assert lost(rig) == []
    rig.advance(14)
    assert lost(rig) == []
    rig.advance(11)
    assert lost(rig) == ["gamma"]


def test_a_node_that_died_while_nobody_looked_is_lost(rig: Rig) -> None:
    rig.hear_state("gamma", retained=True, status="online", last_seen=1771143500)
    rig.advance(14)
    assert lost(rig) == []
    rig.advance(11)
    assert lost(rig) == ["gamma"]
    (alert,) = rig.sent("alert")
    assert "last seen 2026-02-15 08:18:20 UTC" in alert.text


def test_a_node_known_from_its_state_is_judged_by_its_own_interval(rig: Rig) -> None:
    rig.hear_state(
        "gamma",
        retained=True,
        **{"status": "online", "last_seen": int(time.time()), "interval": 60.0},
    )
    rig.advance(150)
    assert lost(rig) == []
    rig.advance(50)
    assert lost(rig) == ["gamma"]


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("gamma", {"status": "offline", "last_seen": 1771143500}),
        ("gamma", {"status": "offline", "reason": "connection lost"}),
        ("gamma", {}),
        ("beta", {"status": "online", "last_seen": 1771143500}),
        ("helper", {"status": "online", "daemon_node": "gamma", "last_seen": 1771143500}),
    ],
    ids=["stopped", "crashed before", "says nothing", "ourselves", "an agent"],
)
def test_a_kept_state_that_promises_nothing_is_no_loss(
    rig: Rig, name: str, state: dict[str, Any]
) -> None:
    rig.hear_state(name, retained=True, **state)
    rig.advance(100)
    assert lost(rig) == []
    assert rig.sent() == []


@pytest.mark.parametrize("last_seen", [None, "yesterday", [], True, -1, 10**18, 1.5, float("nan")])
def test_a_kept_state_with_a_senseless_time_is_judged_like_any_other(
    rig: Rig, last_seen: object
) -> None:
    rig.hear_state("gamma", retained=True, status="online", last_seen=last_seen)
    rig.advance(25)
    assert lost(rig) == ["gamma"]
    assert len(rig.sent("alert")) == 1


def test_a_node_does_not_listen_to_its_own_heartbeats(rig: Rig) -> None:
    rig.beat("beta", boot="this-run")
    rig.advance(100)
    assert lost(rig) == []
    assert rig.kept("beta", "state")[-1]["known_peers"] == []


# What it tells of itself


def test_a_heartbeat_comes_every_interval(rig: Rig) -> None:
    rig.advance(50)
    heartbeats = rig.heartbeats()
    assert 10 <= len(heartbeats) <= 12
    assert {(p.qos, p.retain, p.n) for p in heartbeats} == {(0, False, 0)}
    inner = [json.loads(hive.Envelope.parse(p.payload).text) for p in heartbeats]
    last = inner[-1]
    assert (last["node_id"], last["interval"], last["boot"]) == ("beta", 5.0, "this-run")
    assert last["uptime_s"] == 50.0
    assert last["oc_instances"] == []
    assert "load_1m" in last
    assert [row["seq"] for row in inner] == sorted({row["seq"] for row in inner})


def test_a_state_tells_how_long_a_heartbeat_took_to_the_broker_and_back(rig: Rig) -> None:
    rig.advance(6)
    assert rig.kept("beta", "state")[-1]["rtt_ms"] is None, "none has come back"
    first, last = rig.heartbeats()[0], rig.heartbeats()[-1]
    rig.clock.now += 0.25
    for beat in (last, first):  # the first one tells nothing any more
        rig.hand_in("hive/all/heartbeat", beat.payload, False)
        rig.turn()
        rig.clock.now += 0.25
    states = len(rig.kept("beta", "state"))
    rig.advance(1)
    assert len(rig.kept("beta", "state")) == states, "it is no news"
    rig.advance(10)
    waited = rig.kept("beta", "state")[-1]["rtt_ms"]
    assert waited % 500 == 250 and waited <= 1250


def test_a_state_that_says_nothing_new_is_published_before_it_seems_stale(rig: Rig) -> None:
    """By whatever version it is read: last_seen, interval and miss_threshold are what it has."""
    rig.live(61, "gamma")
    seen = [state["uptime_s"] for state in rig.kept("beta", "state")]
    gaps = [later - earlier for earlier, later in pairwise(seen)]
    assert gaps[1:] == [10.0] * len(gaps[1:]), "no more than it must be"
    for _ in range(10):
        rig.advance(2.5)
        rig.disconnect()
        rig.connect()
        rig.live(21, "gamma")
    seen = [state["uptime_s"] for state in rig.kept("beta", "state")]
    assert max(later - earlier for earlier, later in pairwise(seen)) <= 5.0 * 2 + 0.5


@pytest.mark.parametrize("what", ["known_peers", "status", "after an outage"])
def test_a_state_that_says_something_new_is_published_with_the_next_heartbeat(
    rig_of: Callable[..., Rig], what: str
) -> None:
    agents = [hive.InstanceConfig("main", openclaw_cmd=("/no/such/openclaw",))]
    rig = rig_of(agents)
    rig.advance(11)
    before = len(rig.kept("beta", "state"))
    match what:
        case "known_peers":
            rig.beat("gamma")
        case "status":
            rig.say("command")
        case _:
            rig.disconnect()
            rig.connect()
            assert len(rig.kept("beta", "state")) == before + 1
            return
    rig.advance(4.5)
    assert len(rig.kept("beta", "state")) == before + 1
    assert len(rig.kept("main", "state")) == len(rig.kept("beta", "state"))


@pytest.mark.parametrize("missed", [1, 2, 10])
def test_a_state_is_renewed_as_often_as_its_miss_threshold_asks(
    rig_of: Callable[..., Rig], missed: int
) -> None:
    rig = rig_of(heartbeat=hive.HeartbeatConfig(miss_threshold=missed))
    rig.advance(101)
    seen = [state["uptime_s"] for state in rig.kept("beta", "state")]
    gaps = {later - earlier for earlier, later in pairwise(seen)}
    assert gaps == {5.0 * max(1, missed - 1)}


def test_somebody_with_our_name_is_answered_with_a_heartbeat(rig: Rig) -> None:
    rig.advance(2)
    before = len(rig.heartbeats())
    for _ in range(20):
        rig.say("heartbeat", sender="beta", text=json.dumps({"boot": "another"}))
    rig.turn()
    assert len(rig.heartbeats()) == before + 1


def test_the_state_tells_how_a_node_is(rig_of: Callable[..., Rig]) -> None:
    agent = hive.InstanceConfig("main", openclaw_cmd=("/no/such/openclaw",), token="secret")
    rig = rig_of([agent])
    rig.live(15, "gamma", "alpha")
    for name in ("beta", "main"):
        (*_, published) = [p for p in rig.wire.published if p.topic == f"hive/meta/{name}/state"]
        assert (published.qos, published.retain) == (1, True)
        state = json.loads(published.payload)
        assert state["node_id"] == name
        assert state["daemon_node"] == "beta"
        assert state["status"] == "online"
        assert abs(state["last_seen"] - time.time()) < 60
        assert state["uptime_s"] == 15.0
        assert state["known_peers"] == ["alpha", "gamma"]
        assert state["version"].startswith(hive.__version__)
        assert state["instance"] == "this-run"
        assert state["oc"]["main"]["status"] == "unknown"
        assert {"load_1m", "counters"} <= state.keys()
    rig.say("command")
    rig.advance(10)
    state = rig.kept("beta", "state")[-1]
    assert state["status"] == "degraded"
    assert state["oc"]["main"]["status"] == "down"
    assert "No such file" in state["reason"]
    assert b"secret" not in b"".join(p.payload for p in rig.wire.published)


def test_a_node_without_a_disk_is_degraded(rig_of: Callable[..., Rig], tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    rig = rig_of()
    rig.advance(5)
    assert rig.kept("beta", "state")[-1]["status"] == "degraded"
    assert rig.works()


def test_the_will_says_that_the_connection_was_lost(rig: Rig) -> None:
    will = rig.wire.will
    assert (will.topic, will.qos, will.retain) == ("hive/meta/beta/state", 1, True)
    state = json.loads(will.payload)
    assert (state["node_id"], state["status"]) == ("beta", "offline")
    assert state["reason"] == "connection lost"


def test_the_roster_tells_what_a_node_can_do(
    rig_of: Callable[..., Rig], main_agent: hive.InstanceConfig
) -> None:
    rig = rig_of([main_agent], deploy="exit 1")
    (published,) = [p for p in rig.wire.published if p.topic == "hive/meta/beta/roster"]
    assert (published.qos, published.retain) == (1, True)
    roster = json.loads(published.payload)
    assert roster["node"] == "beta"
    assert (roster["agents"], roster["handlers"]) == (["main"], ["deploy", "ping"])
    assert roster["version"] == hive.__version__


def test_the_roster_is_told_again_when_the_handlers_change(rig: Rig) -> None:
    def handlers() -> list[list[str]]:
        return [roster["handlers"] for roster in rig.kept("beta", "roster")]

    rig.advance(20)
    assert handlers() == [["ping"]]
    rig.handler("deploy", "echo deployed")
    rig.advance(5)
    assert handlers() == [["ping"], ["deploy", "ping"]]
    assert rig.answer_to(rig.say("command", "deploy")).text == "deployed"
    (rig.handler_dir / "deploy").unlink()
    rig.advance(20)
    assert handlers() == [["ping"], ["deploy", "ping"], ["ping"]]


def test_the_state_of_a_node_that_knows_thousands_names_nobody(
    rig_of: Callable[..., Rig],
) -> None:
    rig = rig_of([hive.InstanceConfig("main", openclaw_cmd=("/no/such/openclaw",))])
    names = [f"a-peer-with-quite-a-long-name-{number}" for number in range(2000)]
    for name in names:
        rig.beat(name, interval=3600)
    rig.advance(10)
    payload = [p.payload for p in rig.wire.published if p.topic == "hive/meta/beta/state"][-1]
    assert len(payload) <= hive.LONG_STATE
    state = rig.kept("beta", "state")[-1]
    assert state["status"] == "online" and state["known_peers"] == []
    before = len(rig.kept("beta", "state"))
    rig.beat("one-more", interval=3600)
    rig.advance(20)
    assert len(rig.kept("beta", "state")) == before  # or each that comes would move all others
    rig.say("command")
    rig.advance(6)
    assert len(rig.kept("beta", "state")) == before + 1  # between two heartbeats


def test_what_is_too_large_for_the_broker_is_shown_without_what_can_be_spared(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.beat("a-peer")
    monkeypatch.setattr(rig.wire, "room", lambda topic: 300)
    rig.advance(10)
    state = rig.kept("beta", "state")[-1]
    assert state["status"] == "online" and state["truncated"] and "known_peers" not in state


def test_a_large_hive_beats_more_slowly_and_is_in_time_by_its_last_word(rig: Rig) -> None:
    def declared() -> list[tuple[float, float]]:
        said = [json.loads(json.loads(one.payload)["text"]) for one in rig.heartbeats()]
        return [(one["uptime_s"], one["interval"]) for one in said]

    rig.advance(6)
    assert {interval for _, interval in declared()} == {5.0}
    for number in range(199):
        rig.beat(f"peer-{number}", interval=3600)
    rig.advance(600)
    beats = declared()
    assert beats[-1][1] == 50.0  # 200 nodes, four heartbeats a second
    for (before, interval), (after, _) in pairwise(beats):
        assert after - before <= interval
        assert after - before > interval - 5.1
    assert len(beats) < 600 / 50 + 10
    assert all(after / before <= 1.5 for (_, before), (_, after) in pairwise(beats))
    for number in range(190):
        rig.hear_state(f"peer-{number}", status="offline", reason="stopped")
    rig.advance(60)
    assert declared()[-1][1] == 5.0
    assert lost(rig) == []


def test_however_large_a_hive_others_believe_how_often_it_beats(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a peer declares is held to a bound: who beat more rarely would be taken for lost."""
    monkeypatch.setattr(hive, "PEER_INTERVAL", (0.1, 60.0))
    monkeypatch.setattr(hive, "MAX_BEATS", 1e-6)
    monkeypatch.setattr(hive, "MAX_RENEWALS", 1e-6)
    rig.advance(300)
    said = json.loads(json.loads(rig.heartbeats()[-1].payload)["text"])
    assert said["interval"] == rig.kept("beta", "state")[-1]["interval"] == 60


# Many at once


def test_invented_heartbeats_are_no_losses(rig: Rig) -> None:
    rig.beat("gamma")
    rig.beat("gamma")
    for number in range(1500):
        rig.beat(f"ghost-{number}")
    rig.live(4, "gamma")
    rig.advance(100)
    assert [alert.text[:13] for alert in rig.sent("alert")] == ["gamma is lost"]
    assert len(rig.events("peer is lost")) == 1


def crowd(rig: Rig, count: int, beats: int = 2) -> None:
    for _ in range(beats):
        for number in range(count):
            rig.beat(f"peer-{number}")


def test_a_crowd_that_is_lost_at_once_is_thirty_alerts_and_one_for_the_others(rig: Rig) -> None:
    crowd(rig, 300)
    rig.advance(60)
    *each, last = rig.sent("alert")
    assert len(each) == hive.MAX_LOSSES
    assert last.text.startswith("270 more are lost: peer-") and last.text.endswith(
        ", ...; all of them: hive status"
    )
    rig.advance(200)
    assert len(rig.sent("alert")) == hive.MAX_LOSSES + 1
    assert len(last.encode()) < 1000


def test_of_a_crowd_that_is_lost_ten_times_thirty_are_in_the_log(rig: Rig) -> None:
    crowd(rig, 12 * hive.MAX_LOSSES)
    rig.advance(60)
    assert len(rig.events("peer is lost")) == 10 * hive.MAX_LOSSES


def test_a_crowd_that_goes_on_being_lost_is_one_alert_a_minute(rig: Rig) -> None:
    for number in range(130):
        for name in (f"a-{number}", f"b-{number}", f"c-{number}"):
            rig.beat(name)
            rig.beat(name)
        rig.advance(1)
    assert len(rig.sent("alert")) <= 3 * (hive.MAX_LOSSES + 1)


def test_who_has_said_that_many_are_lost_has_said_it_for_all(rig: Rig) -> None:
    rig.beat("alpha")
    crowd(rig, 50)
    rig.live(22, "alpha")
    rig.say("alert", to="all", sender="alpha", text="50 more are lost", corr=hive.MANY_LOST)
    rig.live(60, "alpha")
    assert rig.sent("alert") == []


def test_a_crowd_that_comes_back_is_a_few_words(rig: Rig) -> None:
    crowd(rig, 100)
    rig.advance(60)
    crowd(rig, 100, beats=1)
    rig.advance(2)
    assert 0 < len(rig.sent("status")) <= hive.MAX_LOSSES


def test_two_that_have_one_name_say_so_once_a_minute(rig: Rig) -> None:
    for _ in range(3):
        rig.beat("beta", boot="another-one")
        rig.advance(1)
    (said,) = rig.events("another node has our name too")
    assert said["name"] == "beta" and "unique in a hive" in said["hint"]
    text = json.dumps({"boot": "a-third"})  # one that asks, before it begins
    rig.say("heartbeat", sender="beta", text=text)
    rig.advance(61)
    assert len(rig.events("another node has our name too")) == 1
