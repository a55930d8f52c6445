"""Who is alive, who has just been lost, whose turn it is to say so."""

from __future__ import annotations

import math

import pytest

from hive import MAX_PEERS, MemberEvent, Roster, loss_of


def roster(*peers: str, me: str = "beta", at: float = 100) -> Roster:
    """A roster that has heard of these peers; a heartbeat is due every 5 s, 3 may be missed."""
    made = Roster(me, 5, 3)
    for peer in peers:
        made.hear(peer, at, seen=1)
    return made


def test_a_silent_node_is_lost_once() -> None:
    peers = roster("attic")
    lost = [peers.drop_silent(now) for now in (100, 115, 115.1, 116, 1000)]
    assert lost == [[], [], ["attic"], [], []]
    assert peers.alive() == []


def test_a_node_that_is_heard_is_not_lost() -> None:
    peers = roster("attic")
    for now in range(105, 1000, 14):
        peers.hear("attic", now, seen=1)
        assert peers.drop_silent(now + 13) == []
    assert peers.alive() == ["attic"]


def test_a_node_is_judged_by_its_own_interval() -> None:
    peers = roster()
    peers.hear("fast", 100, seen=1, interval=0.5)
    peers.hear("slow", 100, seen=1, interval=60)
    assert [peers.drop_silent(now) for now in (101.5, 102, 280, 281)] == [
        [],
        ["fast"],
        [],
        ["slow"],
    ]


@pytest.mark.parametrize("interval", [math.inf, -math.inf, math.nan, -1, 0, 1e308])
def test_no_node_can_say_of_itself_that_it_is_never_lost(interval: float) -> None:
    peers = roster()
    peers.hear("sly", 100, seen=1, interval=interval)
    assert peers.drop_silent(100.2) == []
    assert peers.drop_silent(100 + 3 * 3600 + 1) == ["sly"]


@pytest.mark.parametrize(
    ("announced", "news"), [(True, MemberEvent.BACK), (False, MemberEvent.NEW)]
)
def test_a_lost_node_that_comes_back_is_news_once(announced: bool, news: MemberEvent) -> None:
    peers = roster("attic")
    assert peers.drop_silent(200) == ["attic"]
    if announced:
        peers.announced(loss_of("attic"))
    assert [peers.hear("attic", now, seen=1) for now in (201, 206)] == [news, None]
    assert peers.drop_silent(300) == ["attic"]
    assert peers.hear("attic", 301, seen=1) is MemberEvent.NEW  # this loss was not announced


def test_a_loss_is_doubted_unless_somebody_announced_it() -> None:
    peers = roster("attic", "cellar", "garden")
    peers.leave("garden")
    peers.lose("attic")
    peers.lose("cellar")
    peers.announced(loss_of("cellar"))
    peers.doubt_losses()
    assert peers.alive() == ["attic"]
    assert peers.drop_silent(116) == ["attic"]


def test_an_announcement_is_about_one_node() -> None:
    names = [f"{'x' * 62}{i}" for i in range(3)]
    peers = roster(*names)
    assert peers.drop_silent(200) == names
    peers.announced(loss_of(names[1]))
    assert [peers.hear(name, 201, seen=1) for name in names] == [
        MemberEvent.NEW,
        MemberEvent.BACK,
        MemberEvent.NEW,
    ]


def test_a_node_is_new_once_and_again_after_it_said_goodbye() -> None:
    peers = roster()
    assert [peers.hear("attic", now, seen=1) for now in (1, 2)] == [MemberEvent.NEW, None]
    assert [peers.leave("attic"), peers.leave("attic")] == [True, False]
    assert peers.alive() == [] and peers.drop_silent(1000) == []
    assert peers.hear("attic", 1001, seen=1) is MemberEvent.NEW


def test_a_restart_is_told_by_another_boot_id() -> None:
    peers = roster()
    boots = ["", "one", "one", "", "two", "two"]
    news = [peers.hear("attic", now, seen=1, boot=boot) for now, boot in enumerate(boots)]
    assert news == [MemberEvent.NEW, None, None, None, MemberEvent.RESTARTED, None]


def test_a_node_whose_connection_died_is_lost_once_and_comes_back() -> None:
    peers = roster("attic")
    assert [peers.lose("attic"), peers.lose("attic"), peers.lose("stranger")] == [
        True,
        False,
        False,
    ]
    peers.announced(loss_of("attic"))
    assert peers.drop_silent(1000) == []
    assert peers.hear("attic", 1001, seen=1) is MemberEvent.BACK


def test_a_node_that_died_while_we_were_away_is_lost_after_its_time() -> None:
    peers = roster()
    peers.learn("attic", 100, seen=1)
    assert peers.alive() == ["attic"]
    assert [peers.drop_silent(now) for now in (115, 116)] == [[], ["attic"]]


def test_a_retained_state_is_no_sign_of_life_of_a_node_we_know() -> None:
    peers = roster("attic")
    peers.learn("attic", 114, seen=1)
    assert peers.drop_silent(116) == ["attic"]
    peers.learn("attic", 117, seen=1)
    assert peers.alive() == []


def test_nobody_is_blamed_for_what_we_could_not_hear() -> None:
    peers = roster("attic", "cellar")
    peers.grant_grace(1000)
    peers.hear("attic", 1010, seen=1)
    assert [peers.drop_silent(now) for now in (1015, 1016)] == [[], ["cellar"]]


def test_exactly_one_of_the_living_is_first_to_speak_of_a_loss() -> None:
    names = ["alpha", "beta", "delta", "gamma"]
    ranks = []
    for me in names:
        peers = roster(*(name for name in names if name != me), me=me)
        ranks.append(peers.rank(about="beta"))
        peers.lose("beta")
        ranks.append(peers.rank(about="beta"))
    del ranks[2:4]  # the one that was lost does not speak
    assert ranks == [0, 0, 1, 1, 2, 2]


def test_the_next_in_line_moves_up_when_the_first_is_lost_too() -> None:
    peers = roster("alpha", "attic", me="beta")
    assert peers.rank(about="attic") == 1
    peers.lose("alpha")
    assert peers.rank(about="attic") == 0


def test_strangers_without_end_do_not_grow_the_roster() -> None:
    peers = roster("attic", "cellar")
    for i in range(MAX_PEERS + 50):
        peers.hear(f"n{i}", 101, seen=1)
        peers.hear("cellar", 101, seen=1)
    assert len(peers.alive()) == MAX_PEERS
    assert peers.peer("attic") is None and peers.peer("cellar")


def test_a_roster_remembers_when_a_peer_was_seen() -> None:
    peers = roster()
    peers.hear("attic", 100, seen=1771143500)
    attic = peers.peer("attic")
    assert attic and attic.seen == 1771143500
    assert peers.peer("stranger") is None
