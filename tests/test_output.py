"""Rows to a table or to JSON, harmless whatever a peer wrote."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hive
from hive import (
    HeartbeatConfig,
    StatusRow,
    for_people,
    for_terminal,
    printable,
    read_json_object,
    roster_table,
    status_rows,
    status_table,
)

NOW = 1771143500.0
any_text = st.text(st.characters(exclude_categories=()), max_size=100)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.just(10**4000),
    lambda inner: st.lists(inner) | st.dictionaries(any_text, inner),
    max_leaves=10,
)
STATE_KEYS = [
    *("node_id", "status", "last_seen", "uptime_s", "known_peers", "daemon_node", "version"),
    *("load_1m", "oc", "instance", "interval", "miss_threshold", "host", "reason"),
]
ROSTER_KEYS = ["node", "ts", "version", "build", "system", "agents", "handlers"]
names = st.sampled_from(["alpha", "beta", "main", "x" * 63])


def documents(known: list[str]) -> st.SearchStrategy[dict[str, dict[str, Any]]]:
    plausible = st.sampled_from(["online", "degraded", "offline", "alpha", "beta", NOW, [], {}])
    values = json_values | plausible
    return st.dictionaries(names, st.dictionaries(st.sampled_from(known) | any_text, values))


def rows_of(**states: dict[str, Any]) -> dict[str, StatusRow]:
    return {row.name: row for row in status_rows(states, HeartbeatConfig(), NOW)}


def state(status: str = "online", age: float = 0, **more: Any) -> dict[str, Any]:
    return {"status": status, "last_seen": int(NOW - age)} | more


# -- hostile documents --


@settings(deadline=None)
@given(documents(STATE_KEYS))
def test_any_state_makes_a_row(states: dict[str, dict[str, Any]]) -> None:
    rows = status_rows(states, HeartbeatConfig(), NOW)
    digest = hive.status_digest(rows, states, False)
    assert all(line.isprintable() for line in digest.splitlines())
    lines = status_table(rows, False).splitlines()
    assert len(lines) == len(rows) + 1 == len(states) + 1
    assert all(line.isprintable() and len(line) < 2000 for line in lines)
    assert json.dumps([vars(row) for row in rows], allow_nan=False).isprintable()


@settings(deadline=None)
@given(documents(ROSTER_KEYS))
def test_any_roster_makes_a_row(rosters: dict[str, dict[str, Any]]) -> None:
    lines = roster_table(rosters, False).splitlines()
    assert len(lines) == len(rosters) + 1
    lines += hive.roster_digest(rosters).splitlines()
    assert all(line.isprintable() for line in lines)


def deepest() -> dict[str, Any]:
    """The most deeply nested document that can be read at all."""
    for levels in range(2000, 0, -1):
        found = read_json_object('{"version": ' + "[" * levels + "]" * levels + "}")
        if found:
            return found
    raise AssertionError("nothing can be read")


def test_a_document_nested_as_deep_as_can_be_makes_a_row() -> None:
    document = deepest()
    for hostile in (
        document,
        {"oc": {"a": document["version"]}},
        {"agents": [document["version"]]},
    ):
        assert status_table(status_rows({"a": hostile}, HeartbeatConfig(), NOW), False)
        assert roster_table({"a": hostile}, False)


@given(any_text, st.integers(1, 80))
@settings(deadline=None)
def test_what_is_printed_stays_on_its_line(text: str, limit: int) -> None:
    said = printable(text, limit)
    assert said.isprintable() and len(said) <= limit


@given(any_text)
@settings(deadline=None)
def test_a_text_on_a_terminal_keeps_its_lines_and_nothing_else(text: str) -> None:
    said = for_terminal(text)
    assert said.replace("\n", "").replace("\t", "").isprintable()
    assert said.count("\n") == text.count("\n")


def test_a_text_without_control_characters_is_printed_as_it_is() -> None:
    assert for_terminal("café: 6 files\n\tdone ✓") == "café: 6 files\n\tdone ✓"
    assert for_terminal("\x1b[2Jgone") == "\\x1b[2Jgone"


# -- how a node is --


@pytest.mark.parametrize(
    ("said", "age", "more", "status"),
    [
        ("online", 0, {}, "online"),
        ("online", 15, {}, "online"),
        ("online", 17, {}, "stale"),
        ("degraded", 17, {}, "stale"),
        ("offline", 17, {}, "offline"),
        ("online", 170, {"interval": 60}, "online"),
        ("online", 10, {"interval": 1}, "stale"),
        ("online", 10, {"interval": 1, "miss_threshold": 20}, "online"),
        ("online", 17, {"interval": "x", "miss_threshold": None}, "stale"),
        ("online", -1000, {}, "online"),
        ("asleep", 0, {}, "asleep"),
        ("\x1b[2J", 0, {}, "unknown"),
    ],
)
def test_a_status_counts_as_long_as_its_node_is_heard_of(
    said: str, age: float, more: dict[str, Any], status: str
) -> None:
    assert rows_of(beta=state(said, age, **more))["beta"].status == status


@pytest.mark.parametrize("seen", [None, "now", True, -1, 0, math.nan, math.inf, 1771143500000])
def test_a_node_that_does_not_say_when_it_was_seen_is_stale(seen: object) -> None:
    row = rows_of(beta=state(last_seen=seen))["beta"]
    assert (row.status, row.last_seen, row.age_s) == ("stale", None, None)


def test_an_agent_is_no_better_than_its_node() -> None:
    rows = rows_of(
        beta=state("offline", 5),
        main=state("online", 0, daemon_node="beta"),
        orphan=state("online", 0, daemon_node="gone"),
    )
    assert {name: row.status for name, row in rows.items()} == {
        "beta": "offline",
        "main": "offline",
        "orphan": "online",
    }


def test_agents_stand_below_their_node() -> None:
    states = {
        "zeta": state(daemon_node="beta"),
        "gamma": state(),
        "beta": state(),
        "alpha": state(daemon_node="gamma"),
    }
    assert list(rows_of(**states)) == ["beta", "zeta", "gamma", "alpha"]


@pytest.mark.parametrize(
    "wrong", [None, "1", True, -1, math.nan, math.inf, [], pytest.param(10**400, id="huge")]
)
def test_a_number_that_makes_no_sense_is_unknown(wrong: object) -> None:
    row = rows_of(beta=state(load_1m=wrong, uptime_s=wrong))["beta"]
    assert (row.load_1m, row.uptime_s) == (None, None)


# -- tables --


def test_a_status_table_reads_like_this() -> None:
    rows = status_rows(
        {
            "beta": state(
                age=3,
                uptime_s=7500,
                load_1m=0.5,
                version="0.1.0",
                oc={"main": {"status": "ok"}},
            ),
            "main": state(age=3, daemon_node="beta", oc={"main": {"status": "ok"}}),
            "attic": state("offline", age=90000),
        },
        HeartbeatConfig(),
        NOW,
    )
    assert status_table(rows, False).splitlines() == [
        "NAME    STATUS   AGENTS   LOAD  UPTIME  SEEN       VERSION",
        "attic   offline  -        -     -       1d 1h ago  -",
        "beta    online   main ok  0.50  2h 5m   3s ago     0.1.0",
        "  main  online   ok       -     -       3s ago     -",
    ]


def hive_in_trouble() -> list[StatusRow]:
    return status_rows(
        {
            "alpha": state(),
            "beta": state(),
            "crypt": state(age=200, oc={"main": {"status": "ok"}}),
            "main": state(age=200, daemon_node="crypt"),
            "den": state("degraded", reason="schedule sync every 5s is failing"),
            "attic": state("offline", age=90, reason="lost"),
            "odd": {"status": "asleep"},
            "new": {"status": "online"},
        },
        HeartbeatConfig(),
        NOW,
    )


def test_trouble_comes_first_and_every_node_in_trouble_has_a_reason() -> None:
    rows = hive_in_trouble()
    names = [row.name for row in rows]
    assert names == ["attic", "odd", "crypt", "main", "new", "den", "alpha", "beta"]
    assert hive.status_notes(rows).splitlines()[1:] == [
        "attic: lost",
        "crypt: no word for 3m 20s",
        "new: no word yet",
        "den: schedule sync every 5s is failing",
    ]
    assert {row.name: row.reason for row in rows}["main"] == "no word for 3m 20s"


def test_when_an_agent_is_called_again_stands_behind_the_reason() -> None:
    agents = {"main": {"status": "down", "next_try": NOW + 90}, "odd": {"next_try": [1]}}
    why = {"status": "degraded", "reason": "agent main: refused", "oc": agents}
    rows = status_rows({"a": {**state(), **why}}, HeartbeatConfig(), NOW)
    again = f"its agent is called again at {time.strftime('%T', time.localtime(NOW + 90))}"
    assert hive.status_notes(rows) == f"\na: agent main: refused\na: {again}\n"
    screen = hive.status_screen(rows, [], "", 24, False)
    assert screen[3:5] == ["  agent main: refused", f"  {again}"]
    assert rows[0].next_try == NOW + 90


def test_a_summary_counts_nodes_and_not_agents() -> None:
    said = "7 nodes: 2 online, 1 degraded, 2 stale, 1 offline, 1 asleep"
    assert hive.status_summary(hive_in_trouble()) == said
    one = status_rows({"a": state()}, HeartbeatConfig(), NOW)
    assert hive.status_summary(one) == "1 node: 1 online"


def large_hive() -> tuple[list[StatusRow], dict[str, Any]]:
    """Of 40 nodes 20 have stopped, and a few are worse."""
    states, rosters = dict[str, Any](), dict[str, Any]()
    for i in range(40):
        said = state("offline" if i % 2 else "online", reason="stopped" if i % 2 else "")
        states[f"web-{i:02}"] = said | {"version": "0.3.0 (aa)" if i < 30 else "0.2.0 (bb)"}
        rosters[f"web-{i:02}"] = {"tags": ["gpu"] if i < 3 else [], "handlers": ["ping"]}
    states["web-04"] |= {"status": "degraded", "reason": "no journal on disk"}
    states["web-06"] |= {"status": "offline", "reason": "connection lost", "oc": {"main": "ok"}}
    states["web-08"] |= {"status": "asleep"}
    states["main"] = state(daemon_node="web-06")
    rosters["web-06"] |= {"version": "0.3.0", "build": "aa", "system": "Linux", "agents": ["main"]}
    return status_rows(states, HeartbeatConfig(), NOW), rosters


def test_of_a_large_hive_those_in_trouble_are_shown_and_all_are_counted() -> None:
    lines = hive.status_digest(*large_hive(), False).splitlines()
    assert [line.split()[:2] for line in lines[:5]] == [
        ["NAME", "STATUS"],
        ["web-06", "offline"],
        ["web-08", "asleep"],
        ["web-04", "degraded"],
        ["web-01", "offline"],
    ]
    assert lines[11:] == [
        "",
        "web-06: connection lost",
        "web-04: no journal on disk",
        *(f"web-{i:02}: stopped" for i in range(1, 15, 2)),
        "",
        "and 13 more that are not online",
        "",
        "                    NODES  ONLINE  DEGRADED  STOPPED  LOST  ASLEEP",
        "version 0.3.0 (aa)  30     12      1         15       1     1",
        "version 0.2.0 (bb)  10     5       -         5        -     -",
        "tag gpu             3      2       -         1        -     -",
        "",
        "each node: hive status --all",
    ]


def test_a_large_hive_that_is_well_is_a_few_numbers() -> None:
    rows = status_rows({f"web-{i}": state() for i in range(30)}, HeartbeatConfig(), NOW)
    assert hive.status_digest(rows, {}, False).splitlines() == [
        "           NODES  ONLINE",
        "version -  30     30",
        "",
        "each node: hive status --all",
    ]


def test_what_the_nodes_of_a_large_hive_have_is_counted() -> None:
    assert hive.roster_digest(large_hive()[1]).splitlines() == [
        "                    NODES",
        "version - (-)       39",
        "version 0.3.0 (aa)  1",
        "system Linux        1",
        "tag gpu             3",
        "handler ping        40",
        "",
        "each node: hive roster --all",
    ]


def test_a_summary_names_only_what_most_have() -> None:
    facts = [("tag", f"t{i:02}", "") for i in range(20) for _ in range(i + 1)]
    lines = hive.group_table(facts).splitlines()
    assert (lines[1], lines[8:]) == ("tag t19       20", ["tag t12       13", "tag: 12 more"])


@pytest.mark.parametrize(
    ("which", "tag", "chosen"),
    [
        (["web-0?"], None, [f"web-{i:02}" for i in range(10)]),
        (["web-39", "web-00"], None, ["web-00", "web-39"]),
        (["main"], None, ["web-06"]),  # an agent is shown with its node
        (["tag:gpu", "web-03"], None, ["web-00", "web-01", "web-02", "web-03"]),
        (["web-*2"], "gpu", ["web-02"]),
        (["all"], "gpu", ["web-00", "web-01", "web-02"]),
        ([], "gpu", ["web-00", "web-01", "web-02"]),
        (["db-*"], None, "no node is called like db-*; what each one is: hive roster"),
        (["web-00", "wep-01"], None, "no node is called like wep-01; did you mean web-01?"),
        (["web-03"], "gpu", "no node with the tag gpu is called like web-03; did you mean web-02?"),
        (["tag:lab"], None, "no node has the tag lab; what each one is: hive roster"),
    ],
)
def test_who_is_looked_at(which: list[str], tag: str | None, chosen: list[str] | str) -> None:
    rosters = large_hive()[1]
    if isinstance(chosen, str):
        with pytest.raises(hive.HiveError) as raised:
            hive.chosen_nodes(rosters, rosters, which, tag)
        assert str(raised.value) == chosen
    else:
        assert sorted(hive.chosen_nodes(rosters, rosters, which, tag)) == chosen


def test_a_node_that_was_named_wrongly_is_no_view() -> None:
    for said in ("any", "any:gpu", "tag:", "a b", 5):
        with pytest.raises(ValueError):
            hive.selection(said)


def test_a_roster_table_reads_like_this() -> None:
    rosters: dict[str, dict[str, Any]] = {
        "beta": {
            "agents": ["main", "second"],
            "handlers": ["git-sync"],
            "version": "0.1.0",
            "build": "1234abcd",
            "system": "Linux x86_64",
        },
        "attic": {},
    }
    assert roster_table(rosters, False).splitlines() == [
        "NODE   AGENTS        HANDLERS  VERSION           SYSTEM",
        "attic  -             -         - (-)             -",
        "beta   main, second  git-sync  0.1.0 (1234abcd)  Linux x86_64",
    ]
    rosters["beta"]["tags"] = ["gpu", "lab"]
    assert [line[:21].rstrip() for line in roster_table(rosters, False).splitlines()] == [
        "NODE   TAGS      AGEN",
        "attic  -         -",
        "beta   gpu, lab  main",
    ]


@pytest.mark.parametrize("heading", ["STATUS", "HANDLERS"])
def test_a_table_of_nobody_is_its_heading(heading: str) -> None:
    tables = status_table([], False), roster_table({}, False)
    assert [t.count("\n") for t in tables] == [1, 1] and heading in "".join(tables)


def test_colours_come_only_when_asked_for_and_change_no_word() -> None:
    rows = status_rows({"a": state(), "b": state("offline")}, HeartbeatConfig(), NOW)
    plain, coloured = status_table(rows, False), status_table(rows, True)
    assert "\033" not in plain
    assert "\033[32monline" in coloured and "\033[31moffline" in coloured
    assert re.sub(r"\033\[\d*m", "", coloured) == plain


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0s"),
        (0.9, "0s"),
        (59, "59s"),
        (60, "1m"),
        (3661, "1h 1m"),
        (90061, "1d 1h"),
        (86400 * 400, "400d"),
        (None, "-"),
        (-1, "-"),
        (True, "-"),
        ("5", "-"),
        (math.nan, "-"),
        (math.inf, "-"),
        pytest.param(10**400, "-", id="huge"),
    ],
)
def test_seconds_are_shown_for_people(seconds: object, words: str) -> None:
    assert for_people(seconds) == words


# -- the journal, and what is pending --


def entry(**said: Any) -> dict[str, Any]:
    """A row of the journal as the daemon hands it out."""
    row = {
        "event": "in",
        "time": NOW,
        "id": "0123456789abcdef",
        "exchange": "fedcba9876543210",
        "from": "beta",
        "to": "alpha",
        "ch": "command",
        "action": "ping",
        "note": "",
        "envelope": {"text": "please"},
    }
    return row | said


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose clock shows UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("utc")
@pytest.mark.parametrize(
    ("row", "line"),
    [
        (entry(), "02-15 08:18:20 in  beta       command  01234567 ping: please"),
        (entry(event="out"), "02-15 08:18:20 out alpha      command  01234567 ping: please"),
        (
            entry(event="did", note="exit 0", id=""),
            "02-15 08:18:20 did beta       command  fedcba98 ping: exit 0",
        ),
        (
            entry(action=None, ch="chat", envelope=None, note="a chat that is not urgent"),
            "02-15 08:18:20 in  beta       chat     01234567 a chat that is not urgent",
        ),
        (
            entry(action="", envelope={"text": "two\nlines"}),
            "02-15 08:18:20 in  beta       command  01234567 two?lines",
        ),
        (
            entry(action="", envelope={"text": "x" * 100}),
            "02-15 08:18:20 in  beta       command  01234567 " + "x" * 31 + "…",
        ),
    ],
)
def test_a_line_of_the_log_reads_like_this(row: dict[str, Any], line: str) -> None:
    assert hive.log_lines(row, 80) == line


@pytest.mark.usefixtures("utc")
def test_an_alert_is_shown_to_its_end_where_its_cause_is_and_once() -> None:
    text = "beta: git-sync failed: exit 1: fatal: unable to access the remote: no\nroute to host"
    alert = entry(ch="alert", action=None, envelope={"text": text})
    assert hive.log_lines(alert, 80).splitlines() == [
        "02-15 08:18:20 in  beta       alert    01234567 beta: git-sync failed: exit 1: f",
        "    atal: unable to access the remote: no?route to host",
    ]
    long = hive.log_lines(alert | {"envelope": {"text": "x" * 10_000}}, 80).splitlines()
    assert {len(line) for line in long} == {80} and long[-1].endswith("…")
    assert len(long) == hive.MAX_ALERT_LINES
    told = entry(ch="alert", event="did", note="told main", envelope=None)
    assert hive.log_lines(told, 80) == ""
    assert hive.log_lines(told | {"note": "main not told: it is down"}, 80)
    assert hive.log_lines(told | {"ch": "command"}, 80).endswith("told main")


@pytest.mark.usefixtures("utc")
def test_the_story_of_an_exchange_reads_like_this() -> None:
    rows = [
        entry(event="out", note="refused once", envelope={"text": "do\x1b[2J\nit"}),
        entry(event="did", note="exit 3: no\nremote"),
        entry(ch="response", action=None, envelope=None, **{"from": "alpha", "to": "beta"}),
        entry(action="", envelope={"text": ""}),
    ]
    assert hive.exchange_story(rows, terminal=True).splitlines() == [
        "02-15 08:18:20 out: command from beta to alpha, ping (refused once)",
        "  id 0123456789abcdef",
        "  | do\\x1b[2J",
        "  | it",
        "02-15 08:18:20 did: exit 3: no?remote",
        "02-15 08:18:20 in: response from alpha to beta",
        "  id 0123456789abcdef",
        "  | (its text is kept no longer)",
        "02-15 08:18:20 in: command from beta to alpha",
        "  id 0123456789abcdef",
        "  | ",
    ]
    assert "do\x1b[2J" in hive.exchange_story(rows, terminal=False)


@pytest.mark.usefixtures("utc")
@pytest.mark.parametrize(
    ("at", "said"),
    [(0, "01-01 00:00:00"), (NOW, "02-15 08:18:20"), (None, "-"), (-1, "-"), ("x", "-")],
)
def test_a_moment_is_shown_by_this_machines_clock(at: object, said: str) -> None:
    assert hive.clock_time(at) == said


def pending(**said: Any) -> str:
    document = {"questions": [], "tasks": [], "outbox": [], "outbox_size": 0}
    return hive.pending_table(document | said, NOW, 60)


def test_what_is_pending_reads_like_this() -> None:
    question = {"id": "q1", "to": "beta", "action": "ping", "asked": NOW - 60, "due": NOW + 30}
    question |= {"text": "is the backup\ndone, all of it?"}
    for_ever = question | {"id": "q2-0123456789", "action": None, "due": None, "text": ""}
    over = question | {"id": "q3", "due": NOW}
    task = {"id": "t1", "from": "beta", "agent": "", "action": "sync", "since": NOW + 5, "began": 0}
    begun = task | {"id": "t2", "agent": "main", "since": NOW - 3700, "began": NOW}
    mail = {"topic": "hive/beta/command", "bytes": 70}
    said = pending(
        questions=[question, for_ever, over],
        tasks=[task, begun],
        outbox=[mail],
        outbox_size=3,
    )
    assert said.splitlines() == [
        "NOT ANSWERED  BY    ACTION  ASKED   DUE     TEXT",
        "q1            beta  ping    1m ago  in 30s  is the backup?d…",
        "q2-01234      beta  -       1m ago  -       -",
        "q3            beta  ping    1m ago  over    is the backup?d…",
        "",
        "TO DO  FROM  FOR   SENT       BEGUN  TEXT",
        "t1     beta  sync  0s ago     no     -",
        "t2     beta  main  1h 1m ago  yes    -",
        "",
        "NOT DELIVERED  TO                 BYTES  TEXT",
        "-              hive/beta/command  70     -",
        "",
        "and 2 more to be delivered",
    ]


def test_only_what_is_pending_has_a_part() -> None:
    mail = {"topic": "hive/beta/command", "bytes": 70}
    assert pending() == "nothing is pending\n"
    assert pending(outbox=[mail], outbox_size=1).count("\n") == 2
    assert pending(outbox_size=5) == "and 5 more to be delivered\n"


# -- below the tables --


def test_why_a_node_is_not_simply_online_stands_below_the_table() -> None:
    rows = status_rows(
        {
            "beta": state("degraded", reason="the agent main is down"),
            "main": state("degraded", daemon_node="beta", reason="the agent main is down"),
            "attic": state(),
        },
        HeartbeatConfig(),
        NOW,
    )
    assert hive.status_notes(rows) == "\nbeta: the agent main is down\n"
    assert hive.status_notes(status_rows({"a": state()}, HeartbeatConfig(), NOW)) == ""


def test_schedules_stand_below_the_roster() -> None:
    entries = [
        {"action": "sync", "when": "every 300s", "last": NOW - 60, "next": NOW + 240, "ok": True},
        {"action": "check", "when": "07:30", "last": NOW - 60, "next": NOW - 5, "ok": False},
        {"action": "new", "when": "07:30", "last": None, "next": NOW + 60, "ok": None},
        {"action": "odd", "when": "07:30", "last": NOW, "next": None, "ok": None},
        "rubbish",
    ]
    documents = {"beta": {"schedule": entries}, "attic": {"schedule": entries[:1]}, "c": {}}
    assert hive.schedule_lines(documents, NOW).splitlines() == [
        "",
        "attic: sync every 300s, ran 1m ago: ok, runs in 4m",
        "beta: sync every 300s, ran 1m ago: ok, runs in 4m",
        "beta: check 07:30, ran 1m ago: failing, runs in 0s",
        "beta: new 07:30, has not run yet, runs in 1m",
        "beta: odd 07:30, ran 0s ago: not known",
    ]
    assert hive.schedule_lines({"beta": {"schedule": []}, "c": {"schedule": 5}}, NOW) == ""
    many = {"beta": {"schedule": entries[:1] * 101}}
    assert hive.schedule_lines(many, NOW).count("\n") == 1 + 100


def test_a_list_of_a_hundred_words_is_enough() -> None:
    rows = roster_table({"beta": {"handlers": ["x"] * 101, "agents": "main"}}, False)
    assert rows.count("x,") == 99 and "beta  -  " in rows


@pytest.mark.parametrize(
    ("value", "limit", "said"),
    [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("a\tb", 60, "a?b"), (None, 60, "-"), (5, 60, "5")],
)
def test_what_is_printed_is_cut(value: object, limit: int, said: str) -> None:
    assert printable(value, limit) == said


@pytest.mark.parametrize(("age", "status"), [(16, "online"), (16.5, "stale")])
def test_a_node_is_given_a_second_more_than_it_promised(age: float, status: str) -> None:
    """Three heartbeats of 5 s; times of documents are whole seconds."""
    row = status_rows(
        {"beta": {"status": "online", "last_seen": NOW - age}}, HeartbeatConfig(), NOW
    )
    assert (row[0].status, row[0].age_s) == (status, age)


# -- sessions --


def test_a_table_of_sessions_reads_like_this_in_80_columns() -> None:
    rosters: dict[str, dict[str, Any]] = {
        "alpha": {
            "sessions": {
                "claude-site": {
                    "client": "claude-code 2.1.332",
                    "directory": "~/src/site",
                    "branch": "fix-header",
                    "since": NOW - 720,
                },
                "reviewer": {
                    "client": "codex 0.169.0",
                    "directory": "/srv/checkouts/of/all/that/there/is/api",
                    "branch": "feature/all-of-it-once-more",
                    "since": NOW - 7500,
                },
            }
        },
        "attic": {"sessions": {}},
    }
    table = hive.sessions_table(hive.sessions_in(rosters), NOW, 80)
    assert table.splitlines() == [
        "",
        "SESSION      NODE   CLIENT               DIRECTORY        BRANCH           FOR",
        "claude-site  alpha  claude-code 2.1.332  ~/src/site       fix-header       12m",
        "reviewer     alpha  codex 0.169.0        …t/there/is/api  feature/all-of…  2h 5m",
    ]
    assert hive.sessions_table([], NOW, 80) == ""


@settings(deadline=None)
@given(st.dictionaries(names, st.dictionaries(st.just("sessions"), json_values)))
def test_any_sessions_make_harmless_rows(rosters: dict[str, dict[str, Any]]) -> None:
    sessions = hive.sessions_in(rosters)
    lines = hive.sessions_table(sessions, NOW, 80).splitlines()
    assert len(lines) == (len(sessions) + 2 if sessions else 0)
    assert all(line.isprintable() for line in lines)
