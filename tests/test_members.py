"""Who is alive, who has left or failed, whose turn it is to say so."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import pytest

from hive import (
    MAX_MEMBERS,
    Config,
    Envelope,
    Log,
    Loop,
    MemberEvent,
    Members,
    NodeConfig,
    OutgoingMessage,
    loss_of,
)


def nothing(said: Envelope | OutgoingMessage | Callable[[bool], None]) -> None:
    pass


def members(*peers: str, me: str = "beta", at: float = 100) -> Members:
    """Those who have heard of these peers; a heartbeat is due every 5 s, 3 may be missed."""
    log = Log(stream=io.StringIO())
    loop = Loop(log)
    made = Members(Config(NodeConfig(me)), loop, log, nothing, nothing, nothing)
    loop.close()
    for peer in peers:
        made.heartbeat_from(peer, at, seen=1)
    return made


def test_a_silent_node_is_lost_once() -> None:
    peers = members("attic")
    lost = [peers.failed_since(now) for now in (100, 115, 115.1, 116, 1000)]
    assert lost == [[], [], ["attic"], [], []]
    assert peers.alive() == []


def test_a_node_that_is_heard_is_not_lost() -> None:
    peers = members("attic")
    for now in range(105, 1000, 14):
        peers.heartbeat_from("attic", now, seen=1)
        assert peers.failed_since(now + 13) == []
    assert peers.alive() == ["attic"]


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
        peers.mark_announced(loss_of("attic"))
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
    peers.mark_announced(loss_of("cellar"))
    peers.doubt_losses()
    assert peers.alive() == ["attic"]
    assert peers.failed_since(116) == ["attic"]


def test_an_announcement_is_about_one_node() -> None:
    names = [f"{'x' * 62}{i}" for i in range(3)]
    peers = members(*names)
    assert peers.failed_since(200) == names
    peers.mark_announced(loss_of(names[1]))
    assert [peers.heartbeat_from(name, 201, seen=1) for name in names] == [
        MemberEvent.NEW,
        MemberEvent.BACK,
        MemberEvent.NEW,
    ]


def test_a_node_is_new_once_and_again_after_it_said_goodbye() -> None:
    peers = members()
    assert [peers.heartbeat_from("attic", now, seen=1) for now in (1, 2)] == [MemberEvent.NEW, None]
    assert [peers.mark_left("attic"), peers.mark_left("attic")] == [True, False]
    assert peers.alive() == [] and peers.failed_since(1000) == []
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
    peers.mark_announced(loss_of("attic"))
    assert peers.failed_since(1000) == []
    assert peers.heartbeat_from("attic", 1001, seen=1) is MemberEvent.BACK


def test_a_node_that_died_while_we_were_away_is_lost_after_its_time() -> None:
    peers = members()
    peers.expect("attic", 100, seen=1)
    assert peers.alive() == ["attic"]
    assert [peers.failed_since(now) for now in (115, 116)] == [[], ["attic"]]


def test_a_retained_state_is_no_sign_of_life_of_a_node_we_know() -> None:
    peers = members("attic")
    peers.expect("attic", 114, seen=1)
    assert peers.failed_since(116) == ["attic"]
    peers.expect("attic", 117, seen=1)
    assert peers.alive() == []


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
    assert peers.member("attic") is None and peers.member("cellar")


def test_members_remember_when_a_peer_was_seen() -> None:
    peers = members()
    peers.heartbeat_from("attic", 100, seen=1771143500)
    attic = peers.member("attic")
    assert attic and attic.seen == 1771143500
    assert peers.member("stranger") is None
