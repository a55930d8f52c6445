"""Sessions, at their edges: programs without a process, messages that are handed in at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from rig import Rig
from test_sessions import asked, notes_of, tell

import hive

Make = Callable[..., Rig]
WELL = {"client": "codex 0.169", "directory": "~/site", "branch": "main", "pid": 7}


class Program:
    """An agent program's connection, in memory."""

    def __init__(self, rig: Rig, name: str = "reviewer", **facts: Any) -> None:
        self.rig, self.sessions = rig, rig.node.node.sessions
        self.on_close: list[Callable[[], object]] = []
        self.busy = self.closed = False
        self.heard: list[Mapping[str, Any]] = []
        given = {"name": name, "exact": False, **WELL, **facts}
        self.attached = self.sessions.attach(given, self)
        self.name = str(self.attached["agent"])

    def send(self, document: Mapping[str, Any]) -> None:
        self.heard.append(document)

    def close(self) -> None:
        self.closed = True
        for call in self.on_close:
            call()

    def texts(self, limit: int = 50) -> list[str]:
        messages = self.sessions.inbox(self.name, limit)["messages"]
        return [one["envelope"]["text"] for one in messages]


def given_up(rig: Rig, why: str) -> list[str]:
    """Of whose messages their senders heard that they were not told, and why not."""
    rig.turn()
    begin = "beta: message refused: agent "
    said = [one.text.removeprefix(begin) for one in rig.sent("alert")]
    return [one.partition(" ")[0] for one in said if one.endswith(f"was not told: {why}")]


def test_the_bounds_are_those_of_the_documentation() -> None:
    assert hive.MAX_ATTACHED == 100
    assert hive.MAX_MAIL == 50
    assert hive.SESSION_FACTS == {"client": 60, "directory": 1000, "branch": 100}
    assert hive.SHOWN_FACTS == {"client": 40, "directory": 80, "branch": 60}
    assert hive.SWEEP_INTERVAL == 5 and hive.DEAF_TIME == 30, "a program that hangs is gone soon"


def test_others_are_shown_the_end_of_a_long_directory_and_the_begin_of_all_else(rig: Rig) -> None:
    facts = {key: "begin" + "x" * 2000 + "end" for key in hive.SESSION_FACTS}
    checked = {key: hive.fact(most).check(facts[key]) for key, most in hive.SESSION_FACTS.items()}
    Program(rig, **checked)
    shown = rig.node.node.sessions.shown()["reviewer"]
    assert shown["directory"] == "…" + "x" * 79
    assert shown["client"] == "begin" + "x" * 34 + "…"
    assert shown["branch"] == "begin" + "x" * 54 + "…"
    (row,) = rig.node.node.sessions.document()["sessions"]
    assert {key: len(row[key]) for key in hive.SESSION_FACTS} == hive.SESSION_FACTS
    assert (row["pid"], row["unread"]) == (7, 0) and shown["since"] == row["since"]


def test_they_come_and_go_and_are_shown_once_at_the_end_of_the_turn(rig: Rig) -> None:
    rig.turn()
    before = len(rig.kept("beta", "roster"))
    one, two = Program(rig), Program(rig, "other")
    one.close()
    rig.turn()
    (shown,) = rig.kept("beta", "roster")[before:]
    assert ([*shown["sessions"]], shown["away"]) == (["other"], ["reviewer"])
    lines = [row for row in rig.events() if row["event"].startswith("session ")]
    assert [(row["event"], row["agent"], row.get("client"), row.get("pid")) for row in lines] == [
        ("session attached", "reviewer", "codex 0.169", 7),
        ("session attached", "other", "codex 0.169", 7),
        ("session ended", "reviewer", None, None),
    ]
    two.close()
    rig.turn()
    assert len(rig.kept("beta", "roster")) == before + 2


def test_the_one_that_is_attached_longest_comes_first_also_when_an_older_one_is_back(
    rig: Rig,
) -> None:
    first, _ = Program(rig, "one"), Program(rig, "two")
    first.close()
    Program(rig, "one")
    assert rig.node.node.sessions.live == ("two", "one")


def test_one_program_more_than_a_hundred_is_told_what_to_do(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_ATTACHED", 2)
    one, _ = Program(rig), Program(rig, "other")
    with pytest.raises(hive.UsageError, match=r"^2 sessions are attached already; end one of them"):
        Program(rig, "third")
    one.close()
    assert Program(rig, "third").attached["unread"] == 0


def test_of_those_that_went_the_latest_are_remembered_and_closed_ones_go_first(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_ATTACHED", 2)
    sessions = rig.node.node.sessions
    for name in ("one", "two", "three"):
        program = Program(rig, name)
        rig.clock.now += 1
        tell(rig, asked(to=name))
        if name != "three":
            program.close()
    assert [*sessions._sessions] == ["one", "two", "three"] and given_up(rig, "x") == []
    program.close()
    assert [*sessions._sessions] == ["two", "three"] and sessions.away == ("two", "three")
    assert given_up(rig, "its session is gone") == ["one"]
    sessions._close(sessions._sessions["three"])
    Program(rig, "four").close()
    assert [*sessions._sessions] == ["two", "four"], "three's inbox does not wait for it"
    assert [*rig.journal.get("sessions")] == ["two", "four"]


def test_a_node_that_stops_ends_them_and_takes_no_more(rig: Rig) -> None:
    program = Program(rig)
    rig.node.node.sessions.end()
    assert program.closed and rig.node.node.sessions.live == ()
    with pytest.raises(hive.UsageError, match=r"^the daemon is stopping$"):
        Program(rig, "late")


def test_a_name_that_was_a_sessions_or_an_agents_of_before_is_free(rig: Rig) -> None:
    Program(rig).close()
    rig.beat("alpha")
    rig.hand_in("hive/meta/beta/roster", b'{"agents": ["old"], "away": ["reviewer"]}', True)
    assert Program(rig, exact=True).name == "reviewer"
    assert Program(rig, "old", exact=True).name == "old"
    with pytest.raises(
        hive.UsageError, match=r"reviewer is attached already \(process 7\): attach"
    ):
        Program(rig, exact=True)


def test_whoever_asks_for_one_that_is_not_there_hears_who_is(rig: Rig) -> None:
    sessions = rig.node.node.sessions
    with pytest.raises(hive.UsageError, match=r"^no session reviewer here; none is attached$"):
        sessions.inbox("reviewer", 10)
    program = Program(rig, "other")
    Program(rig, "more")
    with pytest.raises(hive.UsageError, match=r"^no session reviewer here; attached: other, more$"):
        sessions.mark("reviewer", [1], "read")
    program.close()
    assert sessions.inbox("other", 10) == {"messages": [], "more": 0}, (
        "it is away: its inbox is not"
    )
    sessions._close(sessions._sessions["other"])
    with pytest.raises(hive.UsageError, match=r"^no session other here; attached: more$"):
        sessions.inbox("other", 10)


# What they hear


def test_mail_is_told_once_a_turn_and_to_nobody_who_has_yet_to_read(rig: Rig) -> None:
    program = Program(rig)
    for text in ("one", "two"):
        rig.hand_in("hive/beta/command", asked(text=text).encode())
    assert program.heard == [], "not before it is on disk"
    rig.turn()
    assert program.heard == [{"mail": 2}]
    program.busy = True
    tell(rig, asked(text="three"))
    program.busy = False
    assert program.heard == [{"mail": 2}]
    tell(rig, asked(text="four"))
    assert program.heard == [{"mail": 2}, {"mail": 4}]
    rig.hand_in("hive/beta/command", asked(text="five").encode())
    program.close()
    rig.turn()
    assert len(program.heard) == 2


def test_as_much_is_shown_at_once_as_fits_into_a_line_and_one_at_least(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Program(rig)
    sizes = [len(tell(rig, asked(text=text * 100)).encode()) for text in "abc"]
    tasks = rig.journal.tasks()
    monkeypatch.setattr(rig.journal, "inbox", lambda *_: tasks)
    for bound, shown in (
        (sum(sizes), ["a", "b", "c"]),
        (sum(sizes) - 1, ["a", "b"]),
        (sizes[0] - 1, ["a"]),
    ):
        monkeypatch.setattr(hive, "MAX_PAYLOAD", bound)
        found = program.sessions.inbox("reviewer", 50)
        assert [one["envelope"]["text"][0] for one in found["messages"]] == shown
        assert found["more"] == 3 - len(shown)


def test_a_question_is_told_again_by_its_first_words(rig: Rig) -> None:
    program = Program(rig)
    question = hive.Envelope.new("reviewer", "alpha", "command", "x" * 100)
    rig.journal.record(hive.Event.SENT, question, 1.0)
    tell(rig, question.reply("alpha", "yes"))
    (message,) = program.sessions.inbox("reviewer", 10)["messages"]
    assert message["question"] == "x" * 80


def test_what_was_told_already_is_not_confirmed_again(rig: Rig) -> None:
    program = Program(rig)
    message = tell(rig, asked())
    (task,) = program.sessions.inbox("reviewer", 1)["messages"]
    assert (task["note"], task["told"]) == ("", 0)
    for _ in range(2):
        program.sessions.mark("reviewer", [task["task"]], "told")
    program.close()
    assert program.texts() == ["look"]
    program.sessions.mark("reviewer", [task["task"]], "told")  # by another of its connections
    again = Program(rig)
    (task,) = again.sessions.inbox("reviewer", 1)["messages"]
    assert (task["note"], task["told"]) == ("perhaps told before", 0)
    again.sessions.mark("reviewer", [task["task"]], "told")
    rig.turn()
    receipts = [one.text for one in rig.answers_to(message)]
    assert receipts == ["received", "told reviewer"], "a sender hears that once"
    assert notes_of(rig, message) == ["told reviewer"] * 3


def test_only_an_answer_of_a_session_that_is_there_has_read_what_it_answers(rig: Rig) -> None:
    program = Program(rig)
    message = tell(rig, asked())
    for answer in (
        message.reply("other", "x"),
        message.reply("reviewer", "x").replace(reply_to=None),
        message.reply("reviewer", "x").replace(to="gamma"),
    ):
        program.sessions.answered(answer)
    assert program.texts() == ["look"]
    program.sessions.answered(message.reply("reviewer", "x"))
    assert program.texts() == [] and rig.journal.tasks() == []


# What is over


def test_an_inbox_that_is_full_is_so_with_two_hundred(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_AGENT_QUEUE", 2)
    program = Program(rig)
    for text in "ab":
        tell(rig, asked(text=text))
    assert given_up(rig, "more than 2 messages wait for it") == []
    tell(rig, asked(text="c"))
    assert program.texts() == ["b", "c"]
    assert given_up(rig, "more than 2 messages wait for it") == ["reviewer"]


def test_an_inbox_waits_for_its_session_as_long_as_patience_says(rig_of: Make) -> None:
    rig = rig_of(node={"agent_patience": 60.0})
    program = Program(rig)
    message = tell(rig, asked())
    rig.advance(3)
    program.close()
    went = rig.clock.now
    sessions = rig.node.node.sessions
    for seconds, waits in ((59.9, True), (60.0, False)):
        rig.clock.now = went + seconds
        sessions._sweep()
        assert ("reviewer" in sessions.away) is waits
    assert given_up(rig, "its session is gone") == ["reviewer"]
    (line,) = rig.events("session not told", id=message.id)
    assert (line["agent"], line["why"]) == ("reviewer", "its session is gone")
    assert notes_of(rig, message) == ["reviewer not told: its session is gone"]


def test_what_is_over_is_looked_for_every_five_seconds_while_there_are_sessions(rig: Rig) -> None:
    sessions = rig.node.node.sessions
    looks: list[float] = []
    find = rig.journal.ended_tasks

    def counted(agents: Any, now: float, told: float) -> list[hive.Task]:
        looks.append(rig.clock.now)
        assert agents == ["reviewer"] and now - told == 900
        return find(agents, now, told)

    rig.journal.ended_tasks = counted  # type: ignore[method-assign]
    rig.advance(6)
    assert looks == []
    program, began = Program(rig), rig.clock.now
    rig.advance(11)
    assert [at - began for at in looks] == [0, 5, 10]
    program.close()
    del sessions._sessions["reviewer"]
    rig.advance(20)
    assert len(looks) == 3
    Program(rig)
    assert len(looks) == 4, "and again, when one is there again"


def test_a_session_is_cut_off_when_it_has_taken_nothing_for_half_a_minute(rig: Rig) -> None:
    program = Program(rig)
    sessions, now = rig.node.node.sessions, rig.clock.now
    look = sessions._cut_off_deaf
    session = sessions._sessions["reviewer"]
    for at, busy in ((0, True), (29.9, True), (30, False), (31, True), (60.9, True)):
        program.busy = busy
        look(session, program, now + at)
        assert not program.closed, at
    look(session, program, now + 61)
    assert program.closed


def test_what_was_told_is_read_after_a_quarter_of_an_hour_without_a_word(rig: Rig) -> None:
    program = Program(rig)
    message = tell(rig, asked())
    (task,) = program.sessions.inbox("reviewer", 1)["messages"]
    rig.journal.mark_accepted(task["task"], task["envelope"]["ts"] - 1000)
    rig.node.node.sessions._sweep()
    rig.turn()
    assert rig.journal.tasks() == [] and notes_of(rig, message) == []
    assert [one.text for one in rig.answers_to(message)] == ["received"]


# After a restart


def test_inboxes_of_before_wait_for_their_sessions_from_now_on(
    rig_of: Make, main_agent: hive.InstanceConfig
) -> None:
    rig = rig_of(node={"agent_patience": 60.0})
    rig.journal.put("sessions", {"main": True, "old": True})
    row = rig.journal.record(hive.Event.RECEIVED, asked(to="old"), 1.0) or 0
    rig.journal.mark_accepted(rig.journal.add_task(row, "old"), time.time())
    rig.journal.commit()
    rig.end()
    rig = rig_of([main_agent], node={"agent_patience": 60.0})
    sessions = rig.node.node.sessions
    assert [*sessions.away] == ["old"], "main is an agent now"
    assert rig.journal.unread("old") == 1, "perhaps it was told before"
    assert "old" in sessions and "main" not in sessions and "x" not in sessions
    rig.advance(55)
    assert [*sessions.away] == ["old"]
    rig.advance(10)
    assert not sessions.away
