"""Where what is shown ends: how long a word may be, how many lines, one more and one less."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from test_output import NOW, entry, rows_of, state, utc

import hive
from hive import HeartbeatConfig, StatusRow, status_rows

__all__ = ["utc"]
LATEST = 253_402_300_799  # of the year 9999


@pytest.mark.parametrize(
    ("status", "colour"),
    [
        *[(one, 32) for one in ("online", "ok")],
        *[(one, 33) for one in ("stale", "degraded", "warn")],
        *[(one, 31) for one in ("fail", "offline", "down", "lost")],
        *[(one, None) for one in ("stopped", "asleep", "NAME")],
    ],
)
def test_what_is_well_is_green_what_is_not_is_yellow_or_red(status: str, colour: int) -> None:
    shown = hive.format_table(["NAME"], [[status], ["longer than it"]], True).splitlines()[1]
    end = " " * (len("longer than it") - len(status))
    assert shown == (f"\033[{colour}m{status}{end}\033[0m" if colour else status)


def test_json_for_a_terminal_says_the_same_without_control_characters() -> None:
    document = json.dumps({"a": "\x9b2J\u202e\x7f", "é": "ü"}, indent=2, ensure_ascii=False)
    shown = hive.escape_unprintable(document)
    assert shown.splitlines()[1:] == ['  "a": "\\u009b2J\\u202e\\u007f",', '  "é": "ü"', "}"]
    assert json.loads(shown) == json.loads(document)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0s"),
        (1e10, "-"),
        (1e10 - 1, "115740d 17h"),
        (3600, "1h"),
        (86400, "1d"),
        (86399, "23h 59m"),
    ],
)
def test_a_time_that_nobody_lives_to_see_is_none(seconds: float, words: str) -> None:
    assert hive.for_people(seconds) == words


def test_of_many_names_a_few_are_named_and_the_others_counted() -> None:
    names = ["a", "b", "c"]
    found = [hive.and_more(names, limit) for limit in (1, 2, 3, 4)]
    assert found == ["a (and 2 more)", "a, b (and 1 more)", "a, b, c", "a, b, c"]
    assert hive.and_more([]) == "" and hive.and_more(names) == found[0]


@pytest.mark.parametrize(
    ("status", "reason", "condition", "why"),
    [
        ("offline", "stopped", "stopped", ""),
        ("offline", None, "stopped", ""),
        ("offline", "connection lost", "lost", "its connection died"),
        ("offline", "lost", "lost", "it has fallen silent"),
        ("degraded", "no journal on disk", "degraded", "no journal on disk"),
        ("online", None, "online", ""),
    ],
)
def test_why_a_node_is_not_well_is_said_in_words(
    status: str, reason: str | None, condition: str, why: str
) -> None:
    row = rows_of(beta=state(status, reason=reason))["beta"]
    assert (row.condition, row.why, row.again) == (condition, why, [])


def beta(**said: Any) -> StatusRow:
    return rows_of(beta=state(**said))["beta"]


def test_what_a_peer_says_of_itself_is_shown_up_to_a_length() -> None:
    def most(shown: str | None) -> int:
        assert shown and shown.endswith("…")
        return len(shown)

    long = "x" * 1000
    row = beta(version=long, reason=long, oc={"main": {"status": long}, "other": long})
    assert (most(row.version), most(row.reason)) == (30, 200)
    assert {most(health) for health in row.agents.values()} == {20}
    assert most(next(iter(beta(oc={long: "ok"}).agents))) == 60
    document: dict[str, Any] = {"version": long, "build": long, "system": long, "tags": [long]}
    table = hive.roster_table({"beta": document | {"agents": [long]}}, False).splitlines()[1]
    tag, agent, version, build, system = [
        one for one in table.replace("(", "").split() if one != "-"
    ][1:]
    assert [most(one) for one in (tag, agent, version, system)] == [63, 63, 20, 30]
    assert most(build.removesuffix(")")) == 12
    rows = status_rows({"beta": state()}, HeartbeatConfig(), NOW)
    for digest in (
        hive.roster_digest({"beta": document}),
        hive.status_digest(rows, {"beta": document}, False),
    ):
        assert f"tag {'x' * 39}… " in digest


@pytest.mark.parametrize("most", [1e6, 1e10])
def test_a_number_is_believed_up_to_a_bound(most: float) -> None:
    key = "load_1m" if most == 1e6 else "uptime_s"
    found = [getattr(beta(**{key: value}), key) for value in (0, most, most * 1.001)]
    assert found == [0, most, None]


def test_a_node_is_what_its_agent_says_if_that_is_a_name() -> None:
    for said, node in (("gamma", "gamma"), ("a b", "beta"), (5, "beta"), (None, "beta")):
        assert beta(daemon_node=said).node == node


def test_an_agent_is_called_again_at_the_first_of_the_times_that_are_told() -> None:
    def tried(*times: object) -> float | None:
        agents = {f"a{n}": {"next_try": at} for n, at in enumerate(times)}
        return beta(oc={**agents, "odd": "down"}).next_try

    assert tried(NOW + 60, NOW + 5) == NOW + 5
    assert [tried(at) for at in (0.5, 1, LATEST, LATEST + 1)] == [None, 1, LATEST, None]
    assert tried() is None


def test_a_session_has_what_it_works_on_and_since_when() -> None:
    assert beta().session is None
    nothing = {"client": "-", "directory": "-", "branch": "-", "since": None}
    assert beta(session=5).session == nothing
    since = [hive.session_facts({"since": at})["since"] for at in (0, 1, LATEST, LATEST + 1)]
    assert since == [None, 1, LATEST, None]


def test_an_agent_whose_node_is_well_is_how_it_says() -> None:
    rows = rows_of(beta=state(), main=state("degraded", daemon_node="beta"))
    assert (rows["beta"].status, rows["main"].status) == ("online", "degraded")


@pytest.mark.usefixtures("utc")
def test_why_a_node_is_lost_is_said_where_it_is_the_only_one() -> None:
    def words(*lost: str) -> str:
        states = {name: state("offline", 60, reason="lost") for name in lost}
        return hive.status_words(status_rows(states, HeartbeatConfig(), NOW), NOW)

    assert words("a") == "1 lost since 08:17: it has fallen silent"
    assert words("a", "b") == "2 lost, the last since 08:17"
    assert words() == "no node yet"


@pytest.mark.usefixtures("utc")
def test_a_moment_has_its_day_once_it_is_half_a_day_ago() -> None:
    assert hive.short_time(NOW - 43199, NOW) == "20:18"
    assert hive.short_time(NOW - 43200, NOW) == "02-14 20:18"


def test_a_screen_is_full_before_it_is_cut() -> None:
    rows = status_rows({"a": {"status": "online"}, "b": state()}, HeartbeatConfig(), NOW)
    whole = [
        "head",
        "",
        "NAME  STATUS  SEEN    UPTIME  LOAD  AGENTS",
        "a     stale   -       -       -",
        "  no word yet",
        "b     online  0s ago  -       -",
    ]
    for height, blank in ((9, 1), (8, 0)):
        shown = hive.status_screen(rows, ["head"], "foot", height, False)
        assert shown == [*whole, *[""] * blank, "", "foot"]
    cut = "and {} lines more: make it higher, or: hive status".format
    assert hive.status_screen(rows, ["head"], "foot", 7, False) == [*whole[:4], cut(2), "", "foot"]
    for height in (1, 4):
        assert hive.status_screen(rows, ["head"], "foot", height, False) == [
            "head",
            cut(5),
            "",
            "foot",
        ]
    assert hive.status_screen([], ["head"], "foot", 5, False) == ["head", "", "", "", "foot"]


def test_sessions_have_a_table_of_their_own_and_no_line_in_that_of_the_nodes() -> None:
    states = {
        "beta": state(oc={"main": "ok", "claude": "ok"}, uptime_s=60, load_1m=1, version="1"),
        "claude": state(daemon_node="beta", session={"client": "c"}),
        "main": state("offline", daemon_node="beta", load_1m=1, uptime_s=60, version="1"),
        "gone": state("offline", uptime_s=60),
    }
    rows = status_rows(states, HeartbeatConfig(), NOW)
    assert [line.split() for line in hive.status_table(rows, False).splitlines()[1:]] == [
        ["gone", "offline", "-", "-", "-", "0s", "ago", "-"],
        ["beta", "online", "main", "ok", "1.00", "1m", "0s", "ago", "1"],
        ["main", "offline", "-", "-", "-", "0s", "ago", "-"],
    ]


def sessions(width: int, *facts: dict[str, Any]) -> list[str]:
    found = [(f"s{n}", "beta", hive.session_facts(one)) for n, one in enumerate(facts)]
    return hive.sessions_table(found, NOW, width).splitlines()[1:]


def test_a_table_of_sessions_is_cut_just_as_far_as_it_must_be() -> None:
    long = {"client": "c" * 20, "directory": "d" * 20, "branch": "b" * 20, "since": NOW + 5}
    whole = f"s0       beta  {'c' * 20}  {'d' * 20}  {'b' * 20}  0s"
    wide = len(whole) + 1  # of the header, which is a letter longer
    assert [sessions(width, long)[1] == whole for width in (wide + 1, wide)] == [True, True]
    assert sessions(wide, long | {"since": 0})[1].endswith("  -")
    one = sessions(wide - 1, long)[1]
    assert one == f"s0       beta  {'c' * 20}  …{'d' * 18}  {'b' * 20}  0s"
    two = sessions(wide - 2, long)[1]
    assert two == f"s0       beta  {'c' * 20}  …{'d' * 18}  {'b' * 18}…  0s"
    least = sessions(1, long)
    assert least[1].split() == ["s0", "beta", f"{'c' * 11}…", f"…{'d' * 11}", f"{'b' * 11}…", "0s"]
    client = sessions(len(least[0]) + 3, long)[1].split()[2]
    assert client == f"{'c' * 14}…"  # the last that is cut


def test_who_is_looked_at_may_be_an_agent_a_session_or_one_that_is_away() -> None:
    rosters = {"beta": {"agents": ["main"], "sessions": {"claude": {}}, "away": {"codex": {}}}}
    for name in ("main", "claude", "codex", "beta"):
        assert hive.chosen_nodes(["beta", "new"], rosters, [name], None) == {"beta"}
    assert hive.chosen_nodes(["beta", "new"], rosters, ["new"], None) == {"new"}
    assert hive.chosen_nodes(["beta", "new"], rosters, [], None) == {"beta", "new"}


def test_a_digest_shows_ten_in_trouble_and_then_counts() -> None:
    def digest(wrong: int) -> str:
        states = {f"n{n:02}": state("degraded") for n in range(wrong)} | {"well": state()}
        return hive.status_digest(status_rows(states, HeartbeatConfig(), NOW), {}, False)

    assert "more that are not online" not in digest(10) and "n09 " in digest(10)
    assert "and 1 more that are not online\n\n" in digest(11) and "n10" not in digest(11)


def test_the_most_of_a_kind_come_first_and_one_that_nobody_has_is_a_dash() -> None:
    facts = [("tag", f"t{n}", "online" if n % 2 else "asleep") for n in range(8)]
    lines = hive.group_table([*facts, ("tag", "t7", "zzz")]).splitlines()
    assert lines[:3] == [
        "        NODES  ONLINE  ASLEEP  ZZZ",
        "tag t7  2      1       -       1",
        "tag t0  1      -       1       -",
    ]
    assert len(lines) == 9  # of eight there are not more
    assert hive.group_table([*facts, ("tag", "t8", "")]).splitlines()[-1] == "tag: 1 more"


def test_a_schedule_says_what_is_known_and_no_more() -> None:
    def line(**said: Any) -> str:
        return hive.schedule_line("beta", {"action": "sync", "when": "07:30"} | said, NOW)

    assert line() == "beta: sync 07:30, has not run yet\n"
    assert [line(last=at).split(", ")[1] for at in (0, LATEST + 1, NOW + 9)] == [
        *("has not run yet\n", "has not run yet\n"),
        "ran 0s ago: not known\n",
    ]
    assert line(last=1).startswith("beta: sync 07:30, ran 20499d 8h ago: not known")
    assert [line(next=at) == line() for at in (0, 1, LATEST + 1)] == [True, False, True]
    long = hive.schedule_line("beta", {"action": "x" * 100, "when": "y" * 100}, NOW)
    assert long.startswith(f"beta: {'x' * 59}… {'y' * 59}…, ")


def test_a_moment_of_the_log_is_none_where_it_is_in_milliseconds() -> None:
    assert [hive.clock_time(at) == "-" for at in (LATEST, LATEST + 1)] == [False, True]


@pytest.mark.usefixtures("utc")
def test_an_alert_in_the_log_has_six_lines_at_most() -> None:
    def lines(length: int, width: int = 80) -> list[str]:
        text = "x" * length
        alert = entry(ch="alert", action=None, envelope={"text": text})
        return hive.log_lines(alert, width).splitlines()

    head, indented = 80 - len("02-15 08:18:20 in  beta       alert    01234567 "), 76
    whole = lines(head + 5 * indented)
    assert len(whole) == 6 and whole[-1] == "    " + "x" * indented
    over = lines(head + 5 * indented + 1)
    assert [len(one) for one in over] == [80] * 6 and over[-1].endswith("x…")
    assert lines(head) == [whole[0]] and lines(head + 1)[1:] == ["    x"]
    assert {len(one) for one in lines(500, 10)[1:]} == {24}  # a narrow window: 20 letters


def test_what_is_not_an_alert_is_one_line() -> None:
    row = entry(envelope={"text": "x" * 1000})
    assert [len(hive.log_lines(row, width)) for width in (80, 200)] == [80, 200]
    shared = hive.log_lines(entry(node="gamma"), 80)
    assert shared[15:40] == "gamma      in  beta      "[:25]


def test_a_receipt_is_told_by_show_alone_and_only_of_those_that_came() -> None:
    receipt = entry(ch="response", note=f"{hive.RECEIPT_NOTE}told main", envelope=None)
    assert hive.log_lines(receipt, 80) == ""
    when = hive.clock_time(NOW)
    assert hive.exchange_story([receipt], False) == f"{when} beta: told main\n"
    assert hive.exchange_story([receipt | {"event": "out"}], False) == "\n"
    long = hive.exchange_story([receipt | {"note": f"{hive.RECEIPT_NOTE}{'x' * 100}"}], False)
    assert long == f"{when} beta: {'x' * 79}…\n"


def test_a_story_shows_notes_up_to_a_length() -> None:
    row = entry(event="did", note="x" * 10_000)
    assert len(hive.exchange_story([row], False)) == len(f"{hive.clock_time(NOW)} did: \n") + 8192
    noted = hive.exchange_story([entry(note="x" * 1000)], False).splitlines()[0]
    assert noted.endswith(f" ({'x' * 199}…)")


def test_a_text_beside_what_is_pending_has_what_is_left_of_the_line_and_ten_at_least() -> None:
    table, items = "ID\nabc\n", [{"text": "x" * 300}]
    for width, room in ((105, 100), (15, 10), (14, 10), (1, 10), (1000, 200)):
        line = hive.with_texts(table, items, width).splitlines()[1]
        assert line == f"abc  {'x' * (room - 1)}…"
    assert hive.with_texts(table, [{}], 80) == "ID   TEXT\nabc  -\n"


def test_what_is_due_is_over_in_the_moment_that_it_is() -> None:
    assert [hive.for_due(at, NOW) for at in (NOW + 1, NOW, None)] == ["in 1s", "over", "-"]


def test_a_label_of_a_metric_may_hold_anything() -> None:
    assert hive.label_value('a\\b"c\nd') == 'a\\\\b\\"c\\nd'


def test_when_it_is_called_again_is_this_machines_time() -> None:
    row = beta(oc={"main": {"next_try": 1}})
    at = time.strftime("%H:%M:%S", time.localtime(1))
    assert row.again == [f"its agent is called again at {at}"]
