"""Journal: what must survive the daemon, on a real disk."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, eventually, missing

import hive
from hive import Event

NOW = time.time()
DAY = 86400.0
LARGE = 64_000_000  # bytes: no test comes near
Open = Callable[..., hive.Journal]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def open_journal(folder: Path, log: io.StringIO) -> Iterator[Open]:
    """Open the journal of a folder; it is closed when the test ends, or before that."""
    opened: list[hive.Journal] = []

    def open_one(
        directory: Path = folder, keep: float = 7 * DAY, max_size: int = LARGE
    ) -> hive.Journal:
        opened.append(hive.Journal(directory, hive.Log("debug", "json", log), keep, max_size))
        return opened[-1]

    yield open_one
    for journal in opened:
        with contextlib.suppress(sqlite3.ProgrammingError):  # closed already
            journal.close()


@pytest.fixture
def journal(open_journal: Open) -> hive.Journal:
    return open_journal()


def errors(log: io.StringIO) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in log.getvalue().splitlines()]
    return [row for row in rows if row["level"] in ("warning", "error")]


def count(folder: Path, table: str = "log") -> int:
    """What somebody else would read: what a crash leaves."""
    with closing(sqlite3.connect(folder / "journal.sqlite3")) as database:
        return int(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def message(id: str, ch: str = "command", text: str = "hello", **more: Any) -> hive.Envelope:
    more = {"sender": "alpha", "to": "beta", **more}
    return hive.Envelope.new(ch=ch, text=text, id=id, **more)


def receive(journal: hive.Journal, id: str, at: float = NOW, **fields: Any) -> int:
    """Write down that a new message came; its row."""
    row = journal.record(Event.RECEIVED, message(id, **fields), at)
    assert row
    return row


def is_new(journal: hive.Journal, id: str) -> bool:
    return journal.record(Event.RECEIVED, message(id), NOW) is not None


def ids(journal: hive.Journal, **filters: object) -> list[str | None]:
    return [row["id"] for row in journal.rows(filters)]


# A message that comes again


def test_a_message_is_new_once(journal: hive.Journal) -> None:
    answers = [is_new(journal, id) for id in ("a", "b", "a", "b", "c")]
    assert answers == [True, True, False, False, True]
    assert journal.on_disk


def test_a_message_that_is_known_does_not_change_which_row_is_the_last(
    journal: hive.Journal,
) -> None:
    rows = [receive(journal, id) for id in ("a", "b")]
    assert not is_new(journal, "a")
    assert journal.newest == rows[-1]
    receive(journal, "c")
    assert journal.newest > rows[-1]


def test_ids_differ_in_every_character(journal: hive.Journal) -> None:
    assert all(is_new(journal, id) for id in ("a", "A", "1", "01", "1.0", "a.", "a:", "a" * 64))


def test_the_same_id_in_another_message_is_no_new_message(journal: hive.Journal) -> None:
    receive(journal, "a", text="first")
    assert journal.record(Event.RECEIVED, message("a", "alert", "forged"), NOW) is None
    row = journal.message("a")
    assert row and row["envelope"]["text"] == "first"


def test_a_message_to_oneself_goes_out_and_comes_in_once_each(journal: hive.Journal) -> None:
    own = message("a", sender="beta")
    events = [Event.SENT, Event.RECEIVED, Event.SENT, Event.RECEIVED]
    assert [bool(journal.record(one, own, NOW)) for one in events] == [True, True, False, False]
    assert [row["event"] for row in journal.exchange("a")] == ["out", "in"]
    row = journal.message("a")
    assert row and row["event"] == "in"


def test_what_is_done_about_one_message_may_be_several_things(journal: hive.Journal) -> None:
    receive(journal, "a")
    for note in ("told main", "told ops", "told ops"):
        journal.record_result(message("a"), NOW, note)
    assert [row["note"] for row in journal.exchange("a")] == [
        "",
        "told main",
        "told ops",
        "told ops",
    ]


def test_messages_survive_a_restart(open_journal: Open, log: io.StringIO) -> None:
    journal = open_journal()
    for id in ("a", "b"):
        receive(journal, id)
    journal.commit()
    journal.close()
    journal = open_journal()
    assert [is_new(journal, id) for id in ("a", "b", "c")] == [False, False, True]
    assert errors(log) == []


def test_what_was_not_committed_is_committed_at_the_end(open_journal: Open) -> None:
    journal = open_journal()
    receive(journal, "a")
    journal.close()
    assert not is_new(open_journal(), "a")


def test_a_turn_is_committed_whole(journal: hive.Journal, folder: Path) -> None:
    row = receive(journal, "a")
    journal.add_task(row)
    journal.enqueue("t", b"x", message=row)
    journal.add_pending_request(message("a"), row)
    journal.put("key", 1)
    tables = ("log", "tasks", "outbox", "pending_requests", "settings")
    assert [count(folder, table) for table in tables] == [0] * 5
    journal.commit()
    assert [count(folder, table) for table in tables] == [1] * 5


# Notes


def test_a_note_survives_a_restart(open_journal: Open) -> None:
    journal = open_journal()
    assert journal.get("a key") == {}
    journal.put("a key", {"first": 1})
    journal.put("a key", {"last": 1.5, "ok": None})
    journal.put("another", {})
    journal.close()
    assert open_journal().get("a key") == {"last": 1.5, "ok": None}


def test_a_note_is_kept_without_a_disk_too(open_journal: Open, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    journal = open_journal(tmp_path / "file" / "x")
    journal.put("a key", {"ok": True})
    assert journal.get("a key") == {"ok": True}


# What happened


TEXTS = ["ä \u2028\\n😀", "\0\x01\x7f", "x" * hive.MAX_TEXT, "\x01" * hive.MAX_TEXT]


@pytest.mark.parametrize("text", TEXTS, ids=range(4))
def test_a_message_is_found_whole(open_journal: Open, text: str) -> None:
    said = message("a", text=text, corr="c", ttl=60, action="deploy", urgency="later")
    journal = open_journal()
    journal.record(Event.RECEIVED, said, NOW, "no handler for action deploy")
    journal.close()
    row = open_journal().message("a")
    assert row and row["envelope"] == said.document()
    facts = tuple(row[key] for key in ("time", "event", "id", "ch", "from", "to", "action"))
    assert facts == (NOW, "in", "a", "command", "alpha", "beta", "deploy")
    assert (row["exchange"], row["note"]) == ("c", "no handler for action deploy")


def test_what_was_received_is_kept_as_it_came(journal: hive.Journal) -> None:
    said = message("a")
    came = said.encode().decode().replace('":', '" : ')
    journal.record(Event.RECEIVED, said, NOW, content=came)
    row = journal.message("a")
    assert row and row["envelope"] == said.document()
    assert journal._database.read("SELECT content FROM log") == [(came,)]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"v": 1}', "\udcff".encode("utf-8", "replace").decode()]
)
def test_a_row_whose_text_is_no_message_any_more_is_shown_without_it(
    journal: hive.Journal, content: str
) -> None:
    task = journal.add_task(receive(journal, "a"))
    journal._database.write("UPDATE log SET content = ?", (content,))
    row = journal.message("a")
    assert row and row["envelope"] is None and row["from"] == "alpha"
    assert ids(journal) == ["a"] and journal.tasks() == []
    journal.remove_task(task)


def test_nothing_is_known_of_a_message_that_never_came(journal: hive.Journal) -> None:
    assert journal.message("a") is None and journal.exchange("a") == []


@pytest.mark.parametrize("of", ["q", "a-1", "a-2", "r"])
def test_an_exchange_is_told_from_any_of_its_messages(journal: hive.Journal, of: str) -> None:
    journal.record(Event.SENT, message("q", sender="beta", to="alpha"), NOW)
    receive(journal, "other")
    for answer in ("a-1", "a-2"):
        receive(journal, answer, ch="response", corr="q")
    journal.record_result(message("a-2", "response", corr="q"), NOW, "told main")
    journal.record(Event.SENT, message("r", corr="q", sender="beta", to="alpha"), NOW)
    assert [row["id"] for row in journal.exchange(of)] == ["q", "a-1", "a-2", None, "r"]


def test_an_exchange_is_found_though_its_first_message_is_not_known_here(
    journal: hive.Journal,
) -> None:
    receive(journal, "answer", ch="response", corr="elsewhere")
    assert [row["id"] for row in journal.exchange("elsewhere")] == ["answer"]


@pytest.fixture
def busy(journal: hive.Journal) -> hive.Journal:
    """Ten messages, one a second."""
    for i in range(10):
        ch, action = ("alert", None) if i % 5 == 0 else ("command", f"do-{i % 2}")
        fields = {"ch": ch, "action": action, "sender": f"node{i % 3}", "corr": f"c-{i // 4}"}
        receive(journal, f"m-{i}", NOW + i, **fields)
    return journal


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, range(10)),
        ({"ch": "alert"}, [0, 5]),
        ({"from": "node1"}, [1, 4, 7]),
        ({"to": "beta"}, range(10)),
        ({"to": "all"}, []),
        ({"action": "do-1"}, [1, 3, 7, 9]),
        ({"corr": "c-1"}, [4, 5, 6, 7]),
        ({"since": NOW + 7}, [7, 8, 9]),
        ({"since": 0}, range(10)),
        ({"ch": "command", "from": "node0", "since": NOW + 4}, [6, 9]),
        ({"from": "node1' OR '1'='1"}, []),
        ({"from": None}, []),
        ({"node": "node1"}, [1, 4, 7]),
        ({"node": "beta"}, range(10)),
        ({"node": "all"}, []),
    ],
)
def test_rows_are_chosen_by_what_is_asked(
    busy: hive.Journal, filters: dict[str, Any], expected: Any
) -> None:
    assert ids(busy, **filters) == [f"m-{i}" for i in expected]


@pytest.mark.parametrize(
    ("last", "after", "expected"),
    [
        (3, 0, [7, 8, 9]),
        (10, 0, range(10)),
        (11, 0, range(10)),
        (10**9, 0, range(10)),
        (3, 9, [9]),
        (3, 10, []),
        (0, 7, [7, 8, 9]),
    ],
)
def test_the_last_rows_can_be_asked_for(
    busy: hive.Journal, last: int, after: int, expected: Any
) -> None:
    seen = busy.rows({})[after - 1]["n"] if after else 0
    assert [row["id"] for row in busy.rows({}, seen, last)] == [f"m-{i}" for i in expected]


def test_rows_are_read_backwards(busy: hive.Journal) -> None:
    rows = busy.rows({}, last=3)
    assert [row["id"] for row in busy.rows({"before": rows[0]["n"]}, last=3)] == [
        "m-4",
        "m-5",
        "m-6",
    ]
    assert busy.rows({"before": busy.rows({})[0]["n"]}, last=3) == []


def test_it_is_counted_who_wrote_to_whom(
    busy: hive.Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy.record_result(message("m-1"), NOW + 50, "done")  # no message
    busy.record(Event.SENT, message("m-1", sender="node1"), NOW + 1)  # the same one
    counted = {(sender, to): (n, round(at - NOW)) for sender, to, n, at in busy.traffic(NOW + 1)}
    assert counted == {
        ("node0", "beta"): (3, 9),
        ("node1", "beta"): (3, 7),
        ("node2", "beta"): (3, 8),
    }
    monkeypatch.setattr(hive, "MAX_PAIRS", 1)
    assert len(busy.traffic(0)) == 1
    monkeypatch.setattr(hive, "MAX_TRAFFIC", 2)
    assert sum(number for *_, number, _ in busy.traffic(0)) == 1


def test_the_last_rows_are_the_last_of_those_that_are_chosen(busy: hive.Journal) -> None:
    chosen = [row["id"] for row in busy.rows({"from": "node1"}, last=2)]
    assert chosen == ["m-4", "m-7"]


@pytest.mark.parametrize("last", [0, 250, 101, 100, 99])
def test_pages_follow_each_other_without_gap(
    journal: hive.Journal, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    monkeypatch.setattr(hive, "MAX_ROWS", 10)
    for i in range(250):
        receive(journal, f"m-{i}")
    found, after, skip = [], 0, last
    while page := journal.rows({}, after, skip):
        assert len(page) <= hive.MAX_ROWS
        found += [row["id"] for row in page]
        after, skip = page[-1]["n"], 0
    assert found == [f"m-{i}" for i in range(250 - (last or 250), 250)]


def test_a_row_whose_number_was_seen_is_never_given_again(open_journal: Open) -> None:
    journal = open_journal(keep=10)
    seen = [receive(journal, id, NOW) for id in ("a", "b")]
    journal.prune(NOW + 60)
    assert ids(journal) == []
    new = receive(journal, "c", NOW + 60)
    assert new > seen[1] > seen[0], "who follows the log asks for what is after the last one"


# What is owed


def test_what_is_owed_is_given_in_order_after_a_restart(open_journal: Open) -> None:
    journal = open_journal()
    rows = {id: receive(journal, id) for id in ("a", "b", "c")}
    owed = [
        journal.add_task(rows["b"]),
        journal.add_task(rows["a"], "main", NOW + 60, True, "scheduled"),
        journal.add_task(rows["a"], "ops"),
        journal.add_task(rows["c"]),
    ]
    journal.remove_task(owed[2])
    journal.close()
    first, second, third = open_journal().tasks()
    assert [task.n for task in (first, second, third)] == [owed[0], owed[1], owed[3]]
    assert [task.envelope.id for task in (first, second, third)] == ["b", "a", "c"]
    assert (first.agent, first.until, first.urgent, first.note) == ("", None, False, "")
    assert (second.agent, second.until, second.urgent) == ("main", NOW + 60, True)
    assert second.note == "scheduled"


def test_what_had_begun_is_known_after_a_crash_and_at_once(
    journal: hive.Journal, folder: Path
) -> None:
    tasks = [journal.add_task(receive(journal, id)) for id in ("a", "b", "c", "d")]
    journal.start_tasks(tasks[1:3])
    with closing(sqlite3.connect(folder / "journal.sqlite3")) as database:
        began = database.execute("SELECT began FROM tasks ORDER BY n").fetchall()
    assert began == [(0,), (1,), (1,), (0,)], "without a commit() of the whole turn"
    journal.reset_tasks(tasks[1:2])
    assert [task.began for task in journal.tasks()] == [False, False, True, False]


def test_to_finish_twice_or_what_never_was_harms_nobody(journal: hive.Journal) -> None:
    task = journal.add_task(receive(journal, "a"))
    for n in (task, task, 0, 4711):
        journal.remove_task(n)
        journal.start_tasks([n])
        journal.reset_tasks([n])
    assert journal.tasks() == []
    journal.start_tasks([])


def test_what_a_gateway_has_in_memory_is_still_owed_but_not_pending(open_journal: Open) -> None:
    journal = open_journal()
    task = journal.add_task(receive(journal, "a"), "main")
    journal.start_tasks([task])
    journal.mark_accepted(task, NOW + 1.5)
    journal.commit()
    journal.close()
    journal = open_journal()
    assert [(one.n, one.began, one.accepted) for one in journal.tasks()] == [
        (task, False, int(NOW + 1.5))
    ]
    assert hive.pending_document(journal, {})["tasks"] == []
    journal.start_tasks([task])  # it is told again
    assert [(one.began, one.accepted) for one in journal.tasks()] == [(True, 0)]


def test_the_number_of_a_task_is_never_given_again(journal: hive.Journal) -> None:
    row = receive(journal, "a")
    first = journal.add_task(row)
    journal.remove_task(first)
    assert journal.add_task(row) > first


# What the broker has yet to take


def sending(journal: hive.Journal, *ids: str, **fields: Any) -> None:
    """Put messages into the outbox."""
    for id in ids:
        envelope = message(id, **fields)
        row = journal.record(Event.SENT, envelope, NOW)
        journal.enqueue(f"t/{id}", envelope.encode(), message=row)


def take(journal: hive.Journal, limit: int) -> list[hive.OutgoingMessage]:
    return journal.next_outgoing(limit, lambda topic: True)


def waiting(journal: hive.Journal) -> list[str | None]:
    return [one.id for one in journal.unacknowledged(1000)]


def test_the_outbox_keeps_its_order_over_a_restart(open_journal: Open) -> None:
    journal = open_journal()
    said = [message(f"m-{i}", to=f"node{i}", text="ä\0\u2028") for i in range(5)]
    for i, envelope in enumerate(said):
        row = journal.record(Event.SENT, envelope, NOW)
        until = NOW + i if i else None
        journal.enqueue(f"t/{i}", envelope.encode(), bool(i % 2), row, until)
    journal.enqueue("meta", b"\0\xff", retain=True)
    journal.close()
    journal = open_journal()
    found = journal.unacknowledged(100)
    assert [one.topic for one in found] == ["t/0", "t/1", "t/2", "t/3", "t/4", "meta"]
    assert [one.payload for one in found] == [*(one.encode() for one in said), b"\0\xff"]
    assert [one.retain for one in found] == [False, True, False, True, False, True]
    assert [one.until for one in found[:2]] == [None, NOW + 1]
    assert [one.id for one in found] == [*(one.id for one in said), None]
    assert journal.outbox_size == 6
    assert [one.topic for one in take(journal, 2)] == ["t/0", "t/1"]
    assert [one.topic for one in take(journal, 2)] == ["t/2", "t/3"]


def test_a_message_is_on_the_disk_once(journal: hive.Journal) -> None:
    sending(journal, "a")
    assert journal._database.read("SELECT payload FROM outbox") == [(None,)]
    assert journal.unacknowledged(1)[0].payload == message("a").encode()


def test_what_is_sent_while_no_text_is_kept_goes_out_whole(journal: hive.Journal) -> None:
    journal.full = True
    sending(journal, "a")
    row = journal.message("a")
    assert row and row["envelope"] is None
    assert hive.Envelope.parse(journal.unacknowledged(1)[0].payload).text == "hello"


@pytest.mark.parametrize("acknowledged", [True, False])
def test_what_the_broker_has_or_never_will_have_waits_no_more(
    journal: hive.Journal, acknowledged: bool
) -> None:
    sending(journal, "a", "b", "c")
    journal.enqueue("meta", b"x")
    first, second, third, meta = journal.unacknowledged(100)
    for one in (second, meta):
        journal.dequeue(one, acknowledged)
    assert [one.n for one in journal.unacknowledged(100)] == [first.n, third.n]
    assert journal.outbox_size == 2
    journal.enqueue("t", b"y")
    assert journal.unacknowledged(100)[-1].n > meta.n, "a number is never given again"


def test_what_was_acknowledged_a_moment_ago_is_sent_again_in_order(open_journal: Open) -> None:
    journal = open_journal()
    sending(journal, "a", "b", "c", "d", "e")
    first, second, third, fourth, _ = journal.unacknowledged(100)
    journal.dequeue(first, acknowledged=True)
    journal.dequeue(second, acknowledged=False)
    journal.dequeue(third, acknowledged=True)
    moment = time.time()
    eventually("the next moment", lambda: time.time() > moment)
    journal.dequeue(fourth, acknowledged=True)
    assert waiting(journal) == ["e"] and journal.outbox_size == 1
    assert journal.requeue(since=moment) == {fourth.n}
    assert waiting(journal) == ["d", "e"] and journal.outbox_size == 2
    assert count_of(journal, "outbox") == 2, "and what was acknowledged before that is forgotten"
    assert journal.requeue(since=0) == set(), "nothing was since then"


def test_what_is_for_others_does_not_wait_behind_a_pile(open_journal: Open) -> None:
    journal = open_journal()
    for topic, number in (("pile", 100), ("a", 2), ("b", 1)):
        for text in range(number):
            journal.enqueue(topic, f"{text}".encode())
    said = [(one.topic, one.payload) for one in take(journal, 8)]
    assert said[:5] == [("pile", b"0"), ("a", b"0"), ("b", b"0"), ("pile", b"1"), ("a", b"1")]
    assert said[5:] == [("pile", b"2"), ("pile", b"3"), ("pile", b"4")], "in order on each topic"
    journal.enqueue("c", b"own")
    assert [one.topic for one in take(journal, 2)] == ["pile", "c"]
    assert len(journal.unacknowledged(1000)) == journal.outbox_size == 104
    journal.close()
    journal = open_journal()
    assert [one.topic for one in take(journal, 4)] == ["pile", "a", "b", "c"]
    assert journal.requeue(since=0) == set()
    assert [one.topic for one in take(journal, 4)] == ["pile", "a", "b", "c"], "that was under way"


def test_a_topic_that_cannot_be_addressed_yet_holds_up_no_other(journal: hive.Journal) -> None:
    for topic in ("away", "here", "away", "gone"):
        journal.enqueue(topic, b"x")
    found = journal.next_outgoing(10, lambda topic: topic == "here")
    assert [one.topic for one in found] == ["here"] and journal.has_outgoing
    assert journal.next_outgoing(10, lambda topic: False) == []
    assert sorted(one.topic for one in take(journal, 10)) == ["away", "away", "gone"]
    assert not journal.has_outgoing


def test_what_was_acknowledged_is_known_after_a_crash(
    open_journal: Open, child_of: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    child = child_of(
        "take('a'); take('b'); took = journal.unacknowledged(9)\n"
        "journal.dequeue(took[0], True); journal.commit()\n"
        "journal.dequeue(took[1], True)  # too late\n" + WAIT
    )
    assert heard(child) == "ready"
    killed(child)
    journal = open_journal()
    assert waiting(journal) == ["b"] and journal.outbox_size == 1
    journal.requeue(since=0)
    assert waiting(journal) == ["a", "b"] and journal.outbox_size == 2


def test_what_the_broker_has_saved_is_forgotten_with_a_commit(journal: hive.Journal) -> None:
    sending(journal, "a", "b", "c")
    first, second, _ = journal.unacknowledged(100)
    for one in (first, second):
        journal.dequeue(one, acknowledged=True)
    assert count_of(journal, "outbox") == 3
    journal.saved_before = time.time() + 1
    assert count_of(journal, "outbox") == 1
    assert waiting(journal) == ["c"]


def test_it_says_when_it_is_full(journal: hive.Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hive, "MAX_OUTBOX", 3)
    sending(journal, "a", "b")
    assert not journal.outbox_full
    sending(journal, "c")
    assert journal.outbox_full
    journal.dequeue(journal.unacknowledged(1)[0], acknowledged=True)
    assert not journal.outbox_full


def test_it_is_full_of_bytes_too_and_knows_so_after_a_restart(
    open_journal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_OUTBOX_SIZE", 1500)
    journal = open_journal()
    journal.enqueue("result", b"x" * 600)
    sending(journal, "a", text="ä" * 400)
    assert journal.outbox_full
    journal.close()
    journal = open_journal()
    assert journal.outbox_full
    result, _ = journal.unacknowledged(100)
    journal.dequeue(result, acknowledged=True)
    assert not journal.outbox_full
    journal.requeue(since=0)
    assert journal.outbox_full


def test_what_peers_gave_us_to_do_does_not_close_the_outbox(journal: hive.Journal) -> None:
    journal.full = True
    assert not journal.outbox_full


# What was asked


def questions(journal: hive.Journal, due: float | None = None) -> list[str]:
    return [question["id"] for question in journal.pending_requests(due)]


def ask(journal: hive.Journal, id: str, **fields: Any) -> None:
    asked = message(id, sender="beta", to="alpha", **fields)
    row = journal.record(Event.SENT, asked, NOW)
    assert row
    journal.add_pending_request(asked, row)


def test_a_question_is_open_until_it_is_answered(open_journal: Open) -> None:
    journal = open_journal()
    for id in ("a", "b", "c"):
        ask(journal, id, action="ping")
    journal.resolve_request("b")
    journal.resolve_request("never asked")
    journal.resolve_request(None)
    journal.close()
    journal = open_journal()
    assert questions(journal) == ["a", "c"]
    (first, _) = journal.pending_requests()
    assert first.pop("text") == "hello"
    asked = {"id": "a", "from": "beta", "to": "alpha", "action": "ping", "asked": NOW, "due": None}
    assert first == asked


def test_questions_are_due_when_their_time_to_live_is_over(journal: hive.Journal) -> None:
    assert journal.next_due() is None
    ask(journal, "never")
    assert journal.next_due() is None
    for id, ttl in (("late", 900), ("soon", 60)):
        ask(journal, id, ttl=ttl, now=NOW)
    soon, late = int(NOW) + 60, int(NOW) + 900
    assert journal.next_due() == soon
    moments = (soon - 1, soon, late - 1, late)
    assert [questions(journal, due) for due in moments] == [
        [],
        ["soon"],
        ["soon"],
        ["late", "soon"],
    ]
    journal.resolve_request("soon")
    assert journal.next_due() == late
    journal.resolve_request("late")
    assert journal.next_due() is None and questions(journal) == ["never"]


def test_to_ask_again_in_the_same_exchange_is_one_question(journal: hive.Journal) -> None:
    ask(journal, "a", ttl=60, now=NOW)
    ask(journal, "again", corr="a")
    assert questions(journal) == ["a"] and journal.next_due() is None


def test_the_oldest_questions_go_when_there_are_too_many(
    journal: hive.Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_PENDING_REQUESTS", 10)
    for i in range(25):
        ask(journal, f"q-{i}")
    assert questions(journal) == [f"q-{i}" for i in range(15, 25)]


def test_what_went_out_without_our_doing_may_be_answered(journal: hive.Journal) -> None:
    journal.sent(message("a", sender="beta", to="alpha"), NOW)
    journal.sent(message("a", sender="beta", to="alpha"), NOW)
    journal.sent(message("b", "response", sender="beta", to="alpha", corr="x"), NOW)
    assert ids(journal) == ["a", "b"] and questions(journal) == ["a"]


@pytest.mark.parametrize("why", ["age", "size"])
def test_a_question_does_not_outlive_its_message_and_is_not_due_for_ever(
    open_journal: Open, why: str
) -> None:
    journal = open_journal(keep=100) if why == "age" else open_journal(max_size=1)
    ask(journal, "a", ttl=4000, now=NOW)
    ask(journal, "b")
    while journal.prune(NOW + 200):
        pass
    due = journal.next_due()
    assert due is None or questions(journal, due) == ["a"], "a daemon would look for it for ever"
    assert count_of(journal, "pending_requests") == len(questions(journal))


def count_of(journal: hive.Journal, table: str) -> int:
    journal.commit()
    return int(journal._database.read(f"SELECT count(*) FROM {table}")[0][0])


# Bounds


def test_what_is_older_than_its_time_is_forgotten_in_small_steps(
    open_journal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "PRUNE_STEP", 10)
    journal = open_journal(keep=100)
    for i in range(50):
        receive(journal, f"m-{i}", NOW + i)
    now, left = NOW + 100 + 25, []
    assert journal.prune(NOW + 100) is False, "to the second"
    while journal.prune(now):
        left.append(len(ids(journal)))
    assert left == [40, 30, 25]
    assert ids(journal)[0] == "m-25" and not journal.full
    assert not is_new(journal, "m-0"), "whoever kept it could say it once more"


def test_the_oldest_texts_go_before_the_oldest_rows(
    open_journal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "PRUNE_STEP", 5)
    journal = open_journal(max_size=450_000)  # of which a third is for its -wal file
    for i in range(60):
        receive(journal, f"m-{i}", text="x" * 10_000)
        journal.prune(NOW)
    while journal.prune(NOW):
        pass
    assert journal.size <= 300_000 and not journal.full
    kept = [row["envelope"] is not None for row in journal.rows({})]
    assert kept == sorted(kept), "the texts of the last ones are still there"
    assert 10 <= sum(kept) < 30 and len(kept) >= 1.5 * sum(kept)
    assert not is_new(journal, "m-59")


def test_a_message_whose_text_is_gone_is_still_no_new_one(open_journal: Open) -> None:
    journal = open_journal(max_size=100_000)
    receive(journal, "a", text="x" * 200_000)
    assert journal.prune(NOW)
    row = journal.message("a")
    assert row is not None and row["envelope"] is None and row["from"] == "alpha"
    assert not is_new(journal, "a")


@pytest.mark.parametrize("bound", ["age", "size"])
def test_nothing_that_is_not_finished_is_forgotten(open_journal: Open, bound: str) -> None:
    journal = open_journal(keep=1) if bound == "age" else open_journal(max_size=1)
    run = journal.add_task(receive(journal, "to-run", text="x" * 5000))
    word = journal.add_task(receive(journal, "to-tell", text="x" * 5000), "main")
    row = journal.record(Event.SENT, message("to-send"), NOW)
    journal.enqueue("t", b"x", message=row)
    receive(journal, "done")
    while journal.prune(NOW + 100):
        pass
    assert ids(journal) == ["to-run", "to-tell", "to-send"]
    assert [task.envelope.text[:3] for task in journal.tasks()] == ["xxx", "xxx"]
    assert journal.full == (bound == "size")
    for task in (run, word):
        journal.remove_task(task)
    (waiting,) = journal.unacknowledged(10)
    journal.dequeue(waiting, acknowledged=True)
    journal.forget_acknowledged(before=time.time() + 1)
    while journal.prune(NOW + 100):
        pass
    assert ids(journal) == []


def test_a_journal_that_is_full_of_work_keeps_no_more_texts_until_some_is_done(
    open_journal: Open,
) -> None:
    journal = open_journal(max_size=200_000)
    tasks = [journal.add_task(receive(journal, f"m-{i}", text="x" * 50_000)) for i in range(8)]
    while journal.prune(NOW):
        pass
    assert journal.full and len(journal.tasks()) == 8
    size = journal.size
    for i in range(20):
        receive(journal, f"more-{i}", text="x" * 50_000)
    assert journal.size < size + 50_000, "but it knows them when they come again"
    assert not is_new(journal, "more-19")
    for task in tasks:
        journal.remove_task(task)
    while journal.prune(NOW):
        pass
    assert not journal.full
    receive(journal, "after")
    row = journal.message("after")
    assert row and row["envelope"]


@pytest.mark.parametrize(("text", "messages"), [("x" * 50, 6000), ("x" * 20_000, 300)])
def test_a_flood_does_not_grow_it_far_beyond_its_size(
    open_journal: Open, folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, messages: int
) -> None:
    monkeypatch.setattr(hive, "PRUNE_AFTER", 100)
    monkeypatch.setattr(hive, "PRUNE_STEP", 100)
    monkeypatch.setattr(hive, "PRUNE_SIZE", 100_000)
    journal = open_journal(max_size=1_000_000)
    largest = 0
    for i in range(messages):
        receive(journal, f"m-{i}", text=text)
        if i % 20 == 0:
            journal.commit()
            largest = max(largest, journal.size)
    assert largest < 1_500_000
    assert not is_new(journal, f"m-{messages - 1}")


def test_however_fast_they_come_its_files_keep_the_bound(open_journal: Open, folder: Path) -> None:
    bound = 10_000_000
    journal = open_journal(max_size=bound)
    largest = 0
    for i in range(8000):
        receive(journal, f"m-{i}", text="x" * (5000 if i < 2500 else 300))
        if i % 20 == 0:
            journal.commit()
            largest = max(largest, sum(file.stat().st_size for file in folder.iterdir()))
    assert bound / 2 < largest <= bound
    assert not is_new(journal, "m-7999") and not journal.full


def test_what_waits_for_the_broker_takes_half_of_it_at_most(open_journal: Open) -> None:
    journal = open_journal(max_size=1_000_000)
    for i in range(20):
        sending(journal, f"m-{i}", text="x" * 100_000)
        if journal.outbox_full:
            break
    assert journal.outbox_size == 5


def test_answers_leave_room_for_what_the_node_itself_has_to_say(
    open_journal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_OUTBOX", 100)
    journal = open_journal()

    def answers(topic: str) -> int:
        """As many as may still be sent there."""
        number = 0
        while journal.takes_answer(topic):
            number += 1
            journal.enqueue(topic, b"x")
        return number

    assert answers("hive/flood/response") == 20
    assert [answers(f"hive/{i}/response") for i in range(6)] == [20, 20, 20, 0, 0, 0]
    assert not journal.outbox_full
    journal.close()
    journal = open_journal()
    assert not journal.takes_answer("hive/5/response"), "it knows them after a restart"
    for message in journal.unacknowledged(10):
        journal.dequeue(message, acknowledged=False)
    assert answers("hive/5/response") == 10
    for _ in range(20):
        assert not journal.outbox_full
        journal.enqueue("hive/all/alert", b"x")
    assert journal.outbox_full


def test_answers_to_one_have_their_share_of_bytes_too(
    journal: hive.Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_OUTBOX_SIZE", 10_000)
    journal.enqueue("hive/flood/response", b"x" * 2000)
    assert not journal.takes_answer("hive/flood/response")
    assert journal.takes_answer("hive/gamma/response")


def test_of_a_result_only_the_latest_waits(journal: hive.Journal) -> None:
    for payload in (b"1", b"22", b"333"):
        journal.keep_latest("hive/meta/beta/ping", payload)
        journal.keep_latest("hive/meta/beta/other", payload)
    first, _ = take(journal, 10)
    assert (first.payload, first.retain, journal.outbox_size) == (b"333", True, 2)
    journal.keep_latest("hive/meta/beta/ping", b"4444")
    assert [one.payload for one in journal.unacknowledged(10)] == [b"333", b"333", b"4444"]
    for one in journal.unacknowledged(10):
        journal.dequeue(one, acknowledged=True)
    assert (journal.outbox_size, journal._outbox_bytes, journal._outbox) == (0, 0, {})


def test_a_daemon_that_is_often_restarted_forgets_too(open_journal: Open) -> None:
    for run in range(20):
        journal = open_journal(keep=100)
        receive(journal, f"m-{run}", NOW + run * 60)
        journal.prune(NOW + run * 60)
        journal.close()
    assert ids(open_journal()) == ["m-18", "m-19"]


def test_a_large_journal_delays_nobody_for_long(journal: hive.Journal) -> None:
    for i in range(20_000):
        receive(journal, f"m-{i}", NOW + i / 1000, sender=f"node{i % 9}")
    journal.commit()
    looks: dict[str, Callable[[], object]] = {
        "prune": lambda: journal.prune(NOW),
        "filter": lambda: journal.rows({"from": "nobody"}),
        "last": lambda: journal.rows({}, last=19_000),
        "message": lambda: journal.message("m-100"),
        "exchange": lambda: journal.exchange("m-100"),
        "tasks": journal.tasks,
    }
    for what, look in looks.items():
        started = time.monotonic()
        look()
        assert time.monotonic() - started < 1, what


# Damage


@pytest.mark.parametrize(
    "damage", [b"this is no database" * 1000, b"\0" * 8192, b"SQLite format 3\0" + b"\xff" * 4080]
)
def test_a_damaged_file_is_set_aside(
    open_journal: Open, folder: Path, log: io.StringIO, damage: bytes
) -> None:
    journal = open_journal()
    receive(journal, "a")
    journal.close()
    (folder / "journal.sqlite3").write_bytes(damage)
    journal = open_journal()
    assert journal.on_disk
    assert [error["event"] for error in errors(log)] == ["file is damaged, set aside"]
    aside = Path(errors(log)[0]["file"])
    assert aside.parent == folder and aside.read_bytes() == damage
    receive(journal, "a")
    journal.close()
    assert not is_new(open_journal(), "a")
    assert len(errors(log)) == 1


RUN = """
import sys, time
sys.path.insert(0, sys.argv[1])
import hive, pathlib
journal = hive.Journal(pathlib.Path(sys.argv[2]), hive.Log(), 1e6, 10**8)
assert journal.get("never written") == {}
said = hive.Envelope.new("alpha", "beta", "command", "x", id="again")
print(journal.record(hive.Event.RECEIVED, said, time.time()) is not None)
journal.close()
"""


def test_damage_that_shows_only_later_does_not_last_for_ever(
    open_journal: Open, folder: Path
) -> None:
    journal = open_journal()
    for i in range(2000):
        receive(journal, f"m-{i}")
    journal.close()
    file = folder / "journal.sqlite3"
    whole = file.read_bytes()
    file.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    command = [sys.executable, "-c", RUN, str(ROOT), str(folder)]
    runs = [subprocess.run(command, capture_output=True, text=True) for _ in range(3)]
    assert [run.returncode for run in runs] == [0, 0, 0], runs[0].stderr
    assert runs[0].stdout == "True\n", "whatever happens, a message is acted upon"
    assert runs[0].stderr.count("level=error") == 1
    assert [run.stdout for run in runs[1:]] == ["False\n", "False\n"]


def test_after_damage_while_it_runs_no_number_is_given_twice(
    open_journal: Open, folder: Path
) -> None:
    journal = open_journal()
    for i in range(2000):
        row = receive(journal, f"m-{i}", text="x" * 100)
        journal.add_task(row)
        journal.enqueue("t", b"x")
    journal.close()
    journal = open_journal()
    last, tasks = journal.unacknowledged(10_000)[-1].n, [task.n for task in journal.tasks()]
    file = folder / "journal.sqlite3"
    file.write_bytes(file.read_bytes()[:4096] + b"\xff" * (file.stat().st_size - 4096))
    opened = int(time.time())
    eventually("the next second", lambda: time.time() > opened + 1)
    row = receive(journal, "new")
    owed = journal.add_task(row)
    journal.enqueue("t", b"new")
    journal.commit()
    assert journal.on_disk
    sent = [one for _ in range(3) for one in take(journal, 10)]
    assert [one.payload for one in sent] == [b"new"] and sent[0].n > last, "or it waits for ever"
    assert journal.outbox_size == 1
    for task in tasks:  # of the old file, which the daemon still works on
        journal.remove_task(task)
    assert [task.n for task in journal.tasks()] == [owed]


def test_an_empty_file_is_a_new_journal(open_journal: Open, folder: Path, log: io.StringIO) -> None:
    folder.mkdir()
    (folder / "journal.sqlite3").touch()
    journal = open_journal()
    assert journal.on_disk and ids(journal) == []
    assert errors(log) == []


# A file of before


OLD_TABLES = (  # of commit 8360744
    "CREATE TABLE IF NOT EXISTS notes (key TEXT PRIMARY KEY, value TEXT)",
    "CREATE TABLE IF NOT EXISTS log (n INTEGER PRIMARY KEY AUTOINCREMENT, time REAL, event TEXT,"
    " id TEXT, ch TEXT, sender TEXT, recipient TEXT, action TEXT, exchange TEXT, note TEXT,"
    " content TEXT, UNIQUE (id, event))",
    "CREATE INDEX IF NOT EXISTS exchanges ON log (exchange)",
    "CREATE TABLE IF NOT EXISTS tasks (n INTEGER PRIMARY KEY AUTOINCREMENT, message INTEGER,"
    " agent TEXT, until REAL, urgent INTEGER, note TEXT, began INTEGER DEFAULT 0)",
    "CREATE TABLE IF NOT EXISTS outbox (n INTEGER PRIMARY KEY AUTOINCREMENT, message INTEGER,"
    " topic TEXT, payload BLOB, retain INTEGER, until REAL)",
    "CREATE TABLE IF NOT EXISTS questions (exchange TEXT PRIMARY KEY, message INTEGER, due REAL)",
    *(
        "INSERT INTO sqlite_sequence (name, seq)"
        f" SELECT '{table}', CAST(strftime('%s', 'now') AS INTEGER) * 1000000"
        f" WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = '{table}')"
        for table in ("log", "tasks", "outbox")
    ),
)


def old_file(folder: Path, *statements: str) -> sqlite3.Connection:
    folder.mkdir(mode=0o700, exist_ok=True)
    database = sqlite3.connect(folder / "journal.sqlite3", isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    for statement in statements:
        database.execute(statement)
    return database


def test_a_file_of_the_old_layout_is_taken_over(
    open_journal: Open, folder: Path, log: io.StringIO
) -> None:
    asked = message("asked", sender="beta", to="alpha", ttl=60, now=NOW, action="ping")
    owed = message("owed", text="ä\0")
    with closing(old_file(folder, *OLD_TABLES)) as database:
        insert = "INSERT INTO log VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, '', ?)"
        rows = [
            database.execute(
                insert,
                (
                    *(NOW, event, one.id, one.ch, one.sender, one.to, one.action, one.exchange),
                    one.encode().decode(),
                ),
            ).lastrowid
            for event, one in (("out", asked), ("in", owed))
        ]
        database.execute("INSERT INTO notes VALUES ('schedule:check', '{\"ok\": true}')")
        database.execute(
            "INSERT INTO tasks (message, agent, until, urgent, note, began)"
            " VALUES (?, 'main', ?, 1, 'a note', 1)",
            (rows[1], NOW + 60),
        )
        outbox = "INSERT INTO outbox (message, topic, payload, retain, until) VALUES (?,?,?,?,?)"
        database.execute(outbox, (rows[0], "t", asked.encode(), 0, NOW + 60))
        database.execute(outbox, (None, "result", b"{}", 1, None))
        database.execute("INSERT INTO questions VALUES ('asked', ?, ?)", (rows[0], NOW + 60))
    for _ in range(2):  # and once it was, it is as it is
        journal = open_journal()
        assert journal.on_disk and errors(log) == []
        assert journal.get("schedule:check") == {"ok": True}
        assert [row["envelope"] for row in journal.rows({})] == [asked.document(), owed.document()]
        (task,) = journal.tasks()
        assert (task.envelope, task.agent, task.until, task.began) == (owed, "main", NOW + 60, True)
        first, second = journal.unacknowledged(10)
        assert (first.topic, first.payload, first.id) == ("t", asked.encode(), "asked")
        assert (second.topic, second.payload, second.retain) == ("result", b"{}", True)
        assert journal.outbox_size == 2
        assert questions(journal) == ["asked"] and journal.next_due() == NOW + 60
        assert not is_new(journal, "owed")
        journal.close()
    journal = open_journal()
    for one in journal.unacknowledged(10):
        journal.dequeue(one, acknowledged=True)
    assert waiting(journal) == [] and journal.requeue(since=0) == {first.n, second.n}
    assert waiting(journal) == ["asked", None]


def test_a_number_of_the_old_layout_never_comes_again(open_journal: Open, folder: Path) -> None:
    """Tasks and the outbox mean rows by them."""
    with closing(old_file(folder, *OLD_TABLES)) as database:
        database.execute("UPDATE sqlite_sequence SET seq = 9000 WHERE name = 'log'")
    journal = open_journal()
    assert receive(journal, "next") == 9001
    journal.close()
    journal = open_journal()
    assert receive(journal, "more") == 9002
    tables = "SELECT name FROM sqlite_master WHERE name LIKE '%before%'"
    assert journal._database.read(tables) == []


@pytest.mark.parametrize("made", range(len(OLD_TABLES)))
def test_a_file_that_was_half_made_is_taken_over_too(
    open_journal: Open, folder: Path, log: io.StringIO, made: int
) -> None:
    old_file(folder, *OLD_TABLES[:made]).close()
    journal = open_journal()
    owing(journal, "a")
    journal.put("key", {})
    assert journal.on_disk and errors(log) == []
    journal.close()
    assert_owing(open_journal(), "a")


def test_what_an_older_hive_wrote_beside_it_is_left_alone(open_journal: Open, folder: Path) -> None:
    journal = open_journal()
    journal.put("key", {"ok": True})
    journal.close()
    old_file(folder, *OLD_TABLES).close()
    journal = open_journal()
    assert journal.on_disk and journal.get("key") == {"ok": True}


# No disk, and back again


def test_without_a_directory_it_is_in_memory_and_that_is_no_fault(
    log: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with closing(hive.Journal(None, hive.Log("debug", "json", log), 7 * DAY, LARGE)) as journal:
        owing(journal, "a", "b")
        journal.return_to_disk()
        assert_owing(journal, "a", "b")
        assert not journal.on_disk
    assert log.getvalue() == "" and [*tmp_path.iterdir()] == []


def owing(journal: hive.Journal, *names: str) -> None:
    """Take in messages that each leave a task and something to be sent."""
    for name in names:
        row = receive(journal, name, text="x" * 2000)
        journal.add_task(row)
        journal.enqueue("t", name.encode())
    journal.commit()


def assert_owing(journal: hive.Journal, *names: str) -> None:
    assert [task.envelope.id for task in journal.tasks()] == [*names]
    assert [one.payload.decode() for one in journal.unacknowledged(1000)] == [*names]
    assert all(journal.message(name) for name in names)
    assert not any(is_new(journal, name) for name in names)


def test_without_a_disk_it_goes_on_in_memory_and_tells_the_risk_once(
    open_journal: Open, tmp_path: Path, log: io.StringIO
) -> None:
    (tmp_path / "file").touch()
    journal = open_journal(tmp_path / "file" / "x")
    assert not journal.on_disk
    owing(journal, "a", "b")
    journal.return_to_disk()
    assert_owing(journal, "a", "b")
    (error,) = errors(log)
    assert error["level"] == "error" and "lost, or done twice" in error["so"]
    assert str(tmp_path / "file" / "x") in error["file"] and error["why"] == "Not a directory"


def test_when_the_disk_is_full_nothing_is_lost_and_all_of_it_goes_back(
    open_journal: Open, folder: Path, log: io.StringIO
) -> None:
    journal = open_journal()
    owing(journal, "a", "b")
    (pages,) = journal._database.read("PRAGMA page_count")[0]
    journal._database.read(f"PRAGMA max_page_count={pages}")
    more = [f"m-{i}" for i in range(100)]
    owing(journal, *more)
    assert not journal.on_disk
    tasks, waiting = journal.tasks(), journal.unacknowledged(1000)
    assert_owing(journal, "a", "b", *more)
    journal.return_to_disk()
    assert journal.on_disk and (journal.tasks(), journal.unacknowledged(1000)) == (tasks, waiting)
    owing(journal, "after")
    journal.close()
    assert_owing(open_journal(), "a", "b", *more, "after")
    assert [error["event"] for error in errors(log)] == ["cannot write, going on in memory"]


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """A file system of one megabyte, where this user may mount one."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        missing("root may mount nothing here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system")
def test_a_disk_that_is_really_full_and_has_room_again(
    folder: Path, open_journal: Open, log: io.StringIO
) -> None:
    with small_disk(folder):
        journal = open_journal()
        owing(journal, "a")
        with (folder / "other").open("wb", 0) as other, contextlib.suppress(OSError):
            while other.write(b"x" * 4096):
                pass
        names = [f"m-{i}" for i in range(200)]
        owing(journal, *names)
        assert not journal.on_disk
        assert_owing(journal, "a", *names)
        journal.return_to_disk()
        assert not journal.on_disk, "it is full still"
        (folder / "other").unlink()
        journal.return_to_disk()
        journal.commit()
        if not journal.on_disk:
            pytest.fail(log.getvalue())
        journal.close()
        journal = open_journal()
        assert journal.on_disk
        assert_owing(journal, "a", *names)
        journal.close()


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Callable[[], object]]:
    """A folder where nothing can be written, until what this yields is called."""

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)

    if os.geteuid():
        folder.mkdir(mode=0o500)
        yield lambda: folder.chmod(0o700)
    elif sys.platform == "linux":  # root may write wherever something can be written
        with small_disk(folder):
            remount("ro")
            yield lambda: remount("rw")
    else:
        pytest.skip("root may write everywhere, and only Linux mounts a folder for a test")


def test_a_folder_that_is_read_only_and_is_writable_again(
    open_journal: Open, folder: Path, log: io.StringIO
) -> None:
    with read_only(folder) as let_write:
        journal = open_journal()
        assert not journal.on_disk
        owing(journal, "a", "b")
        journal.return_to_disk()
        assert not journal.on_disk
        let_write()
        journal.return_to_disk()
        assert journal.on_disk
        journal.close()
        journal = open_journal()
        assert_owing(journal, "a", "b")
        journal.close()
    assert len(errors(log)) == 1


def test_a_folder_in_place_of_the_file_does_not_keep_a_daemon_from_starting(
    open_journal: Open, folder: Path, log: io.StringIO
) -> None:
    (folder / "journal.sqlite3").mkdir(parents=True)
    journal = open_journal()
    assert not journal.on_disk
    assert [is_new(journal, id) for id in ("a", "a")] == [True, False]
    (folder / "journal.sqlite3").rmdir()
    journal.return_to_disk()
    assert journal.on_disk
    assert len(errors(log)) == 1


def test_in_memory_it_is_bounded_too(
    open_journal: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "PRUNE_STEP", 5)
    (tmp_path / "file").touch()
    journal = open_journal(tmp_path / "file" / "x", max_size=200_000)
    for i in range(100):
        receive(journal, f"m-{i}", text="x" * 10_000)
    while journal.prune(NOW):
        pass
    assert journal.size <= 200_000 and not is_new(journal, "m-99")


def test_nobody_else_may_read_it(folder: Path, open_journal: Open) -> None:
    before = os.umask(0)
    try:
        journal = open_journal()
        receive(journal, "a")
        journal.commit()
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert modes["journal.sqlite3"] == 0o600
    assert {mode & 0o077 for mode in modes.values()} == {0}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_missing_folders_are_made(open_journal: Open, tmp_path: Path) -> None:
    assert open_journal(tmp_path / "a" / "b" / "c").on_disk


# What a kill -9 leaves


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import hive, pathlib
journal = hive.Journal(pathlib.Path(sys.argv[2]), hive.Log(), 1e6, 10**8)

def take(id):
    said = hive.Envelope.new("alpha", "beta", "command", "x" * 500, id=id)
    row = journal.record(hive.Event.RECEIVED, said, time.time())
    task = journal.add_task(row)
    journal.enqueue("t", said.encode(), message=row)
    journal.add_pending_request(said, row)
    return task

def ready(word="ready"):
    print(word, flush=True)
"""
WAIT = "ready(); time.sleep(60)\n"


@pytest.fixture
def child_of(folder: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Run a process that has the journal open, and these lines to do."""
    made: list[subprocess.Popen[bytes]] = []

    def make(lines: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", CHILD + lines, str(ROOT), str(folder)]
        made.append(subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE))
        return made[-1]

    yield make
    for child in made:
        child.kill()
        child.communicate()


def heard(child: subprocess.Popen[bytes]) -> str:
    assert child.stdout
    return child.stdout.readline().decode().strip()


def killed(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_a_kill_leaves_what_was_committed_and_nothing_of_the_rest(
    open_journal: Open,
    log: io.StringIO,
    child_of: Callable[[str], subprocess.Popen[bytes]],
) -> None:
    child = child_of("take('kept'); journal.commit(); take('half')\n" + WAIT)
    assert heard(child) == "ready"
    killed(child)
    journal = open_journal()
    assert [task.envelope.id for task in journal.tasks()] == ["kept"]
    assert waiting(journal) == ["kept"]
    assert questions(journal) == ids(journal) == ["kept"]
    assert is_new(journal, "half")
    assert errors(log) == []


def test_a_kill_leaves_open_what_had_begun_and_only_that(
    open_journal: Open, child_of: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    child = child_of(
        "a, b, c, d = map(take, 'abcd'); journal.start_tasks([b, c, d])\n"
        "journal.reset_tasks([c]); journal.remove_task(d); journal.commit()\n"
        "journal.reset_tasks([b]); journal.remove_task(a)  # too late\n" + WAIT
    )
    assert heard(child) == "ready"
    killed(child)
    tasks = open_journal().tasks()
    assert [(task.envelope.id, task.began) for task in tasks] == [
        ("a", False),
        ("b", True),
        ("c", False),
    ]


def test_a_kill_at_any_moment_leaves_whole_turns(
    open_journal: Open, folder: Path, child_of: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    for life in range(5):
        child = child_of(
            f"for i in range(10**6):\n"
            f"    take(f'{life}-{{i}}-a'); take(f'{life}-{{i}}-b')\n"
            f"    journal.commit(); ready(i)\n"
        )
        for _ in range(7 * life + 1):
            last = int(heard(child))
        killed(child)
        journal = open_journal()
        tables = [
            count_of(journal, table) for table in ("log", "tasks", "outbox", "pending_requests")
        ]
        assert len({*tables}) == 1 and tables[0] % 2 == 0
        assert not is_new(journal, f"{life}-{last}-b"), "whoever was told so may rely on it"
        journal.close()


# One daemon at a time

HOLD = """
lock = hive.FileLock(pathlib.Path(sys.argv[2]) / "lock")
lock.write("that-run")
import subprocess
other = subprocess.Popen(["sleep", "60"], close_fds=False)
ready(other.pid); time.sleep(60)
"""


def test_a_lock_is_one_process_and_kill_9_frees_it(
    folder: Path, child_of: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    child = child_of(HOLD)
    grandchild = int(heard(child))
    try:
        before = len(os.listdir("/dev/fd"))
        for _ in range(3):
            with pytest.raises(BlockingIOError):
                hive.FileLock(folder / "lock")
        assert len(os.listdir("/dev/fd")) == before
        killed(child)
        lock = eventually("it is free", lambda: try_lock(folder / "lock"))
        assert lock and lock.before == "that-run", "who was killed left word"
        os.kill(grandchild, 0)  # a handler that outlives its daemon does not keep the lock
        lock.close()
    finally:
        os.kill(grandchild, signal.SIGKILL)


def try_lock(file: Path) -> hive.FileLock | None:
    with contextlib.suppress(BlockingIOError):
        return hive.FileLock(file)
    return None


def test_each_run_learns_what_the_one_before_left(tmp_path: Path) -> None:
    seen = []
    for words in ("a-long-name-of-the-first-run", "second", "third"):
        lock = hive.FileLock(tmp_path / "lock")
        seen.append(lock.before)
        lock.write(words)
        with pytest.raises(BlockingIOError):
            hive.FileLock(tmp_path / "lock")
        lock.close()
    assert seen == ["", "a-long-name-of-the-first-run", "second"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0" * 100_000, "ä\n\n😀".encode()])
def test_a_lock_file_full_of_rubbish_does_no_harm(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock").write_bytes(content)
    lock = hive.FileLock(tmp_path / "lock")
    assert len(lock.before) <= hive.MAX_LOCK
    lock.write("this-run")
    lock.close()
    assert (tmp_path / "lock").read_text() == "this-run"


def test_a_lock_is_private_and_needs_its_folder(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        hive.FileLock(tmp_path / "lock").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o600
    for place in (tmp_path / "missing" / "lock", tmp_path):
        with pytest.raises(OSError):
            hive.FileLock(place)


# Ids that were seen


def from_(sender: str, id: str, **more: Any) -> hive.Envelope:
    return message(id, sender=sender, **more)


def test_nobody_uses_up_the_id_of_another(open_journal: Open) -> None:
    journal = open_journal()
    assert journal.record(Event.RECEIVED, from_("mallory", "known"), NOW)
    assert journal.record(Event.RECEIVED, from_("alpha", "known", text="the real one"), NOW)
    for sender in ("mallory", "alpha"):
        assert journal.record(Event.RECEIVED, from_(sender, "known"), NOW) is None
    assert journal.senders("known") == ["alpha", "mallory"]
    shown = [row["from"] for row in journal.exchange("known")]
    assert shown == ["mallory", "alpha"], "both are shown, whoever was first"


def test_an_exchange_is_whole_whoever_else_took_its_id(open_journal: Open) -> None:
    journal = open_journal()
    journal.record(Event.RECEIVED, from_("mallory", "known", corr="elsewhere"), NOW)
    journal.record(Event.RECEIVED, from_("alpha", "known"), NOW)
    assert [row["from"] for row in journal.exchange("known")] == ["mallory", "alpha"]
    ours = message("ours", sender="beta", to="alpha")
    journal.record(Event.SENT, ours, NOW)
    journal.record(Event.RECEIVED, from_("mallory", "ours"), NOW)
    found = journal.message("ours", Event.SENT)
    assert found and found["from"] == "beta"
    assert (journal.asked("ours"), journal.asked("known"), journal.asked(None)) == ("alpha", "", "")


def test_an_id_is_known_as_long_as_its_message_could_come_again(
    open_journal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(keep=86400)
    journal.record(Event.RECEIVED, from_("alpha", "old"), NOW)
    journal.record(Event.SENT, message("ours", sender="beta", to="alpha"), NOW)
    day = 86400
    while journal.prune(NOW + 2 * day):
        pass
    assert ids(journal) == [] and count_of(journal, "seen") == 1
    journal.commit()
    journal.close()
    journal = open_journal(keep=86400)
    last = NOW + hive.MAX_AGE + hive.MAX_AHEAD
    journal.prune(last - 1)
    assert journal.record(Event.RECEIVED, from_("alpha", "old"), last) is None
    assert journal.record(Event.RECEIVED, from_("beta", "old"), last)
    while journal.prune(last + 2 * day):
        pass
    assert journal._database.read("SELECT sender FROM seen") == [("beta",)]


def test_the_ids_that_are_remembered_are_bounded(
    open_journal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "SIZE_OF_ID", 10_000)  # so that 100 of them fit
    journal = open_journal(keep=1, max_size=1_000_000)
    for i in range(150):
        receive(journal, f"m-{i}", NOW + i / 1000)
    while journal.prune(NOW + 1000):
        pass
    journal.prune(NOW + 1000)
    assert 50 <= count_of(journal, "seen") <= 100
    assert not is_new(journal, "m-149") and is_new(journal, "m-0"), "the oldest went"


# Bounds, to the row and to the byte


def test_it_looks_for_what_to_forget_after_so_many_rows_or_bytes(
    journal: hive.Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = list[int]()
    monkeypatch.setattr(hive, "PRUNE_AFTER", 3)
    monkeypatch.setattr(hive, "PRUNE_SIZE", 1000)

    def prune(now: float) -> None:
        looks.append(journal._rows)
        journal._rows = journal._size = 0

    def looked() -> bool:
        journal.commit()
        return bool([looks.pop() for _ in [*looks]])

    monkeypatch.setattr(journal, "prune", prune)

    def record(id: str, size: int) -> None:
        journal.record(Event.RECEIVED, message(id), NOW, content="x" * size)

    for number in range(3):
        record(f"m-{number}", 1)
    assert not looked()
    record("m-3", 1)
    assert looked()
    record("large", 1000)
    assert not looked()
    record("one-more", 1)
    assert looked()
    journal.enqueue("t", b"x" * 600)
    journal.keep_latest("meta", b"y" * 200)
    assert not looked()
    journal.keep_latest("meta", b"y" * 201)
    assert looked()


@pytest.mark.parametrize(
    ("step", "written", "looks"), [(4, 0, 1), (4, 3, 1), (5, 3, 1), (5, 4, 2), (5, 8, 3)]
)
def test_it_forgets_a_quarter_more_than_was_written_since(
    open_journal: Open, monkeypatch: pytest.MonkeyPatch, step: int, written: int, looks: int
) -> None:
    journal, forgotten = open_journal(max_size=900_000), list[int]()
    monkeypatch.setattr(hive, "PRUNE_STEP", step)
    monkeypatch.setattr(hive.Journal, "size", 600_007)

    def forget(much: int) -> int:
        forgotten.append(much)
        return 1

    monkeypatch.setattr(journal, "_forget_texts", forget)
    journal._rows = written
    assert journal.prune(NOW)
    assert forgotten == [7] * looks  # two thirds are for the file, one for its write-ahead log


@pytest.mark.parametrize(
    ("size", "something", "full"),
    [(600_000, 0, False), (600_001, 0, True), (750_000, 1, False), (750_001, 1, True)],
)
def test_it_is_full_when_nothing_more_can_go_or_it_is_far_too_large(
    open_journal: Open, monkeypatch: pytest.MonkeyPatch, size: int, something: int, full: bool
) -> None:
    journal = open_journal(max_size=900_000)
    monkeypatch.setattr(hive.Journal, "size", size)
    monkeypatch.setattr(journal, "_forget_texts", lambda much: something)
    assert journal.prune(NOW) is bool(something)
    assert journal.full is full


@pytest.mark.parametrize(("much", "gone"), [(0, 3), (300, 3), (301, 4), (10**9, 8)])
def test_so_many_texts_go_as_make_room_but_not_all_at_once(
    journal: hive.Journal, monkeypatch: pytest.MonkeyPatch, much: int, gone: int
) -> None:
    monkeypatch.setattr(hive, "PRUNE_TEXTS", 3)
    monkeypatch.setattr(hive, "PRUNE_STEP", 8)
    for number in range(10):
        journal.record(Event.RECEIVED, message(f"m-{number}"), NOW, content="x" * 100)
    assert journal._forget_texts(much) == gone
    kept = journal._database.read("SELECT content IS NOT NULL FROM log ORDER BY n")
    assert [one for (one,) in kept] == [0] * gone + [1] * (10 - gone)


def test_of_too_many_ids_the_oldest_quarter_and_what_is_too_many_goes(
    open_journal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "SIZE_OF_ID", 10_000)  # so that 100 of them fit
    journal = open_journal(keep=1, max_size=1_000_000)
    for number, left in ((100, 100), (1, 75)):
        for i in range(number):
            receive(journal, f"{number}-{i}", NOW + i / 1000 + (number == 1))
        while journal.prune(NOW + 1000):
            pass
        assert count_of(journal, "seen") == left


def test_ids_that_nobody_can_use_any_more_are_looked_for_once_an_hour(
    open_journal: Open,
) -> None:
    journal = open_journal(keep=1)
    last = NOW + hive.MAX_AGE + hive.MAX_AHEAD
    journal._forget_ids(last - 1)
    receive(journal, "old", NOW)
    assert journal.prune(last - 0.5) and count_of(journal, "seen") == 1
    journal._forget_ids(last + 3598)
    assert count_of(journal, "seen") == 1
    journal._forget_ids(last + 3599)
    assert count_of(journal, "seen") == 0


def test_a_page_fits_into_one_line_to_a_command(
    journal: hive.Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_PAYLOAD", 10_000)
    for number in range(9):
        content = "x" * (2000 - hive.KIB)
        journal.record(Event.RECEIVED, message(f"m-{number}"), NOW, content=content)
    assert len(journal.rows({})) == 6, "the last one is that which is too much"


def test_a_third_of_it_is_for_what_is_not_in_the_file_yet(open_journal: Open) -> None:
    for size, room in ((900_000, 300_000), (10**9, 8 << 20)):
        database = open_journal(max_size=size)._database
        assert database.read("PRAGMA journal_size_limit") == [(room,)]
        assert database.read("PRAGMA wal_autocheckpoint") == [(room // 4 // 4096,)]


def test_the_outbox_takes_half_of_it_at_most(open_journal: Open) -> None:
    journal = open_journal(max_size=1000)
    journal.enqueue("t", b"x" * 499)
    assert not journal.outbox_full
    journal.enqueue("t", b"x")
    assert journal.outbox_full


def test_what_the_broker_has_saved_is_forgotten_at_most_every_second(
    journal: hive.Journal, folder: Path
) -> None:
    for number, (moment, left) in enumerate([(1.0, 1), (1.1, 0), (2.1, 1), (2.2, 0)]):
        if left:
            sending(journal, f"m-{number}")
            journal.dequeue(journal.unacknowledged(1)[0], acknowledged=True)
            journal._database.write("UPDATE outbox SET acknowledged_at = 0.5")
        journal.saved_before = moment
        journal.commit()
        assert count(folder, "outbox") == left, moment


def test_the_beginning_of_an_id_is_enough_where_it_means_one(
    journal: hive.Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    for id in ("abcd", "abcdef", *(f"many-{number}" for number in range(6))):
        receive(journal, id, corr="exchange" if id == "abcdef" else None)
    said = ("abcde", "exch", "abcd", "abc", "none", "nobody")
    assert [journal.find_id(one) for one in said] == [
        *("abcdef", "exchange", "abcd", "abc", "none", "nobody")
    ]
    with pytest.raises(hive.UsageError, match=r"^many: which one\? many-0, .*many-4, \.\.\.$"):
        journal.find_id("many")
    monkeypatch.setattr(hive, "MAX_MEANINGS", 6)
    with pytest.raises(hive.UsageError, match=r"many-4, many-5$"):
        journal.find_id("many")


def test_what_was_asked_is_told_in_a_few_words(journal: hive.Journal) -> None:
    ask(journal, "long", text="x" * 300)
    ask(journal, "gone", text="y" * 300)
    journal._database.write("UPDATE log SET content = NULL WHERE id = 'gone'")
    texts = [one["text"] for one in journal.pending_requests()]
    assert texts == ["x" * hive.SHOWN_TEXT, ""]


def test_what_an_answer_is_about_is_the_text_of_our_question(journal: hive.Journal) -> None:
    for id in ("q", "gone"):
        journal.record(Event.SENT, message(id, sender="beta", to="alpha", text="how?"), NOW)
    journal._database.write("UPDATE log SET content = NULL WHERE id = 'gone'")
    said = [message("a", "response", corr=corr) for corr in ("q", "gone", "unknown", None)]
    assert [journal.question(one) for one in said] == ["how?", "", "", ""]


def test_a_task_of_a_message_whose_text_is_not_kept_is_none(journal: hive.Journal) -> None:
    journal.full = True
    journal.add_task(receive(journal, "a"))
    assert journal.tasks() == []


def test_what_is_kept_under_a_key_is_an_object_or_nothing(journal: hive.Journal) -> None:
    journal.put("a 1", {"ok": 1})
    journal.put("a 2", 5)
    journal.put("b 1", {"ok": 2})
    assert journal.all("a ") == {"a 1": {"ok": 1}, "a 2": {}} and journal.get("a 2") == {}
    journal.put("a 1", {})
    assert [*journal.all("a ")] == ["a 2"]


def test_whatever_cannot_be_addressed_yet_the_others_are_all_looked_at(
    journal: hive.Journal,
) -> None:
    for topic in ("here", "away", "there"):
        journal.enqueue(topic, b"x")
    found = journal.next_outgoing(10, lambda topic: topic != "away")
    assert [one.topic for one in found] == ["here", "there"]
