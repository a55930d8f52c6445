"""Sessions: agent programs that are attached to their node, and what they have to read."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, ROOT, Broker, Daemon, Hive, calls_of, eventually
from rig import Rig

import hive

Make = Callable[..., Rig]


class Program:
    """An agent program, which speaks to its node as its MCP server does."""

    def __init__(self, rig: Rig, name: str = "", **facts: Any) -> None:
        self.rig, self.client = rig, hive.ControlClient(rig.state_dir / "door", "beta")
        self.attached = self.ask(do="attach", name=name, **facts) if name else {}
        self.name = self.attached.get("agent", name)

    def ask(self, **request: object) -> dict[str, Any]:
        return self.rig.ask(self.client, **request)

    def mail(self) -> int:
        """How much there is to read, once it hears that there is something."""
        self.rig.turn()
        return int(self.hear("mail"))

    def hear(self, key: str) -> Any:
        """What the next line says that says this."""

        def heard() -> dict[str, Any]:
            line = self.client.receive(0.001) or {}
            return line if key in line else {}

        return self.rig.until(f"a line with {key}", heard)[key]

    def inbox(self, limit: int = 50) -> list[dict[str, Any]]:
        return list(self.ask(do="inbox", agent=self.name, limit=limit)["messages"])

    def texts(self) -> list[str]:
        return [one["envelope"]["text"] for one in self.inbox()]

    def mark(self, how: str, *tasks: int) -> None:
        assert self.ask(do="mark", agent=self.name, tasks=[*tasks], **{"as": how}) == {"ok": True}

    def say(self, text: str, **more: Any) -> hive.Envelope:
        """Send a message in its own name."""
        envelope = hive.Envelope.new(self.name, more.pop("to", "alpha"), "command", text, **more)
        assert "queued" in self.ask(do="send", envelope=envelope.document())
        return envelope

    def answer(self, message: hive.Envelope, text: str) -> None:
        document = message.reply(self.name, text).document()
        assert "queued" in self.ask(do="send", envelope=document)

    def end(self) -> None:
        self.client.close()
        self.rig.until("it is gone", lambda: self.name not in self.rig.node.node.sessions.live)
        self.rig.turn()


@pytest.fixture
def program_of(rig: Rig) -> Iterator[Callable[..., Program]]:
    made: list[Program] = []

    def make(*given: Any, **how: Any) -> Program:
        made.append(Program(how.pop("rig", rig), *given, **how))
        return made[-1]

    yield make
    for program in made:
        program.client.close()


@pytest.fixture
def program(program_of: Callable[..., Program]) -> Program:
    """One called reviewer."""
    return program_of("reviewer", client="claude-code 2.1", directory="~/site", branch="main")


def notes_of(rig: Rig, envelope: hive.Envelope) -> list[str]:
    """What was done about a message, in the words of `hive show`."""
    rows = rig.journal.exchange(envelope.exchange)
    return [row["note"] for row in rows if row["event"] == "did"]


def receipts_for(rig: Rig, envelope: hive.Envelope) -> list[str]:
    rig.turn()
    return [one.text for one in rig.answers_to(envelope) if one.ch == "status"]


WANTED = {hive.RECEIPTS: True}


def asked(**more: Any) -> hive.Envelope:
    """A message of alpha's for the session, which wants to know what becomes of it."""
    given = {"sender": "alpha", "to": "reviewer", "ch": "command", "text": "look", **more}
    return hive.Envelope.new(**given).replace(extra=WANTED)


def tell(rig: Rig, envelope: hive.Envelope) -> hive.Envelope:
    """A message comes on the node's topic, as one for a session does."""
    rig.hand_in(f"hive/beta/{envelope.ch}", envelope.encode())
    rig.turn()
    return envelope


# Who is there


def test_a_session_is_an_agent_of_its_node_for_as_long_as_it_is_connected(
    rig: Rig, program: Program
) -> None:
    answer = {"agent": "reviewer", "node": "beta", "senders": "open", "unread": 0}
    assert program.attached == answer
    (one,) = program.ask(do="sessions")["sessions"]
    facts = {"client": "claude-code 2.1", "directory": "~/site", "branch": "main"}
    assert one.items() >= {"agent": "reviewer", **facts, "pid": 0, "unread": 0}.items()
    shown = rig.kept("beta", "roster")[-1]
    assert shown["sessions"] == {"reviewer": facts | {"since": one["since"]}}
    assert (shown["agents"], shown["away"]) == ([], [])
    rig.advance(6)
    assert rig.kept("beta", "state")[-1]["oc"] == {"reviewer": {"status": "ok", "reason": ""}}
    program.end()
    shown = rig.kept("beta", "roster")[-1]
    assert (shown["sessions"], shown["away"]) == ({}, ["reviewer"])
    rig.advance(6)
    assert rig.kept("beta", "state")[-1]["oc"] == {}


def test_what_is_sent_to_a_session_waits_in_its_inbox_until_it_was_read(
    rig: Rig, program: Program
) -> None:
    messages = [tell(rig, asked(text=text)) for text in ("one", "two")]
    assert program.mail() == 1
    first, second = program.inbox()
    assert [first["envelope"], second["envelope"]] == [one.document() for one in messages]
    assert program.texts() == ["one", "two"], "nothing is read by being looked at"
    program.mark("read", first["task"])
    assert program.texts() == ["two"]
    program.mark("told", second["task"])
    assert program.inbox() == [] and len(rig.journal.tasks()) == 1
    program.mark("read", second["task"])
    assert rig.journal.tasks() == []
    assert notes_of(rig, messages[0]) == ["read by reviewer"]
    assert notes_of(rig, messages[1]) == ["told reviewer", "read by reviewer"]


def test_an_alert_is_read_first_and_no_more_than_were_asked_for(rig: Rig, program: Program) -> None:
    for ch, text in (("command", "one"), ("command", "two"), ("alert", "fire")):
        tell(rig, asked(ch=ch, text=text))
    said = program.ask(do="inbox", agent="reviewer", limit=2)
    assert [one["envelope"]["text"] for one in said["messages"]] == ["fire", "one"]
    assert said["more"] == 1


def test_an_answer_comes_with_the_question_of_the_session_that_it_answers(
    rig: Rig, program: Program
) -> None:
    question = program.say("is the build green?")
    assert [one.sender for one in rig.sent()] == ["reviewer"]
    rig.beat("alpha")
    tell(rig, question.reply("alpha", "yes"))
    (message,) = program.inbox()
    assert (message["envelope"]["text"], message["question"]) == ("yes", "is the build green?")


def test_an_answer_of_a_session_settles_what_it_answers(rig: Rig, program: Program) -> None:
    message, other = tell(rig, asked()), tell(rig, asked(text="other"))
    program.answer(message, "done")
    assert program.texts() == ["other"]
    (answer,) = [one for one in rig.answers_to(message) if one.ch == "response"]
    assert (answer.sender, answer.to, answer.text) == ("reviewer", "alpha", "done")
    assert receipts_for(rig, message) == ["received", "read by reviewer"]
    assert receipts_for(rig, other) == ["received"]


def test_nobody_sends_in_the_name_of_a_session_that_is_not_attached(
    rig: Rig, program: Program
) -> None:
    program.end()
    other = Program(rig)
    said = hive.Envelope.new("reviewer", "alpha", "command", "x").document()
    answer = other.ask(do="send", envelope=said)
    assert answer == {"error": "this is the daemon of beta, not of reviewer"}
    other.client.close()


def test_two_that_want_one_name_get_two_and_two_inboxes(
    rig: Rig, program: Program, program_of: Callable[..., Program]
) -> None:
    other = program_of("reviewer")
    assert other.name == "reviewer-2"
    tell(rig, asked(text="for one"))
    tell(rig, asked(to="reviewer-2", text="for two"))
    assert (program.texts(), other.texts()) == (["for one"], ["for two"])
    third = program_of("")
    answer = third.ask(do="attach", name="reviewer", exact=True, pid=7)
    assert answer["error"].startswith("reviewer is attached already (process 0)")
    again = program.ask(do="attach", name="other")
    assert again == {"error": "this connection is attached already, as reviewer"}
    program.end()
    assert third.ask(do="attach", name="reviewer", exact=True)["unread"] == 1


def test_a_name_of_a_node_or_of_another_agent_is_not_given_away(
    rig_of: Make, main_agent: hive.InstanceConfig
) -> None:
    rig = rig_of([main_agent])
    rig.beat("alpha")
    roster = {"node": "alpha", "agents": ["second"], "sessions": {"third": {}}, "away": ["fourth"]}
    rig.hand_in("hive/meta/alpha/roster", json.dumps(roster).encode(), retained=True)
    for name, owner in (
        *(("alpha", "a node"), ("beta", "a node"), ("main", "an agent of beta")),
        *((one, "an agent of alpha") for one in ("second", "third", "fourth")),
    ):
        program = Program(rig)
        error = f"{name} is {owner}: attach under another name"
        assert program.ask(do="attach", name=name, exact=True) == {"error": error}
        assert program.ask(do="attach", name=name)["agent"] == f"{name}-2"
        program.client.close()
    long = Program(rig, "x" * 63), Program(rig, "x" * 63)
    assert [one.name for one in long] == ["x" * 63, "x" * 61 + "-2"]
    for program in long:
        program.client.close()


@pytest.mark.parametrize("name", ["all", "roster", "a b", "", "x" * 64, "../x", None, 5, "é"])
def test_what_is_no_name_is_none(rig: Rig, name: object) -> None:
    program = Program(rig)
    assert program.ask(do="attach", name=name)["error"].startswith("name: ")
    program.client.close()


def test_whatever_a_program_says_of_itself_is_one_short_line(
    rig: Rig, program_of: Callable[..., Program]
) -> None:
    hostile = "\x1b[2J\n\u202e\u2028\0" + "x" * 1_000_000
    program = program_of("odd", client=hostile, directory=hostile, branch=hostile, pid=2**40)
    facts = rig.kept("beta", "roster")[-1]["sessions"]["odd"]
    for key, most in hive.SHOWN_FACTS.items():
        assert facts[key].isprintable() and len(facts[key]) == most
    for wrong in ({"branch": 5}, {"client": ["x"]}, {"pid": -1}, {"pid": "1"}, {"exact": 1}):
        other = Program(rig)
        (key,) = wrong
        assert other.ask(do="attach", name="x", **wrong)["error"].startswith(f"{key}: ")
        other.client.close()
    assert program.ask(do="inbox", agent="odd", limit=51)["error"].startswith("limit: ")
    many = program.ask(do="mark", agent="odd", tasks=[*range(51)], **{"as": "read"})
    assert many["error"].startswith("tasks: ")
    assert program.ask(do="inbox", agent="nobody")["error"] == (
        "no session nobody here; attached: odd"
    )


def test_a_hundred_sessions_are_at_work_and_no_more(
    rig: Rig, program_of: Callable[..., Program]
) -> None:
    facts = {"client": "c" * 99, "directory": "d" * 999, "branch": "b" * 99}
    crowd = [program_of("worker", **facts) for _ in range(hive.MAX_ATTACHED)]
    assert len({one.name for one in crowd}) == hive.MAX_ATTACHED
    assert "error" in program_of("").ask(do="attach", name="one-more")
    shown = rig.kept("beta", "roster")[-1]
    assert len(shown["sessions"]) == hive.MAX_ATTACHED and "truncated" not in shown
    rig.tell(asked(to="all", ch="alert", text="fire"))
    assert [one.texts() for one in crowd[::10]] == [["fire"]] * 10
    tell(rig, asked(to="worker-77"))
    assert crowd[76].texts() == ["fire", "look"] and crowd[0].texts() == ["fire"]
    for one in crowd:
        one.client.close()
    rig.until("they are gone", lambda: not rig.node.node.sessions.live)
    assert rig.works()


def test_sessions_of_a_node_that_is_lost_are_away(rig: Rig) -> None:
    rig.beat("alpha")
    roster = {"node": "alpha", "agents": [], "sessions": {"worker": {}}, "away": ["old"]}
    rig.hand_in("hive/meta/alpha/roster", json.dumps(roster).encode(), retained=True)
    shown = Program(rig)
    assert shown.ask(do="roster")["rosters"]["alpha"]["sessions"] == {"worker": {}}
    rig.hear_state("alpha", status="online")
    assert shown.ask(do="states")["states"]["worker"]["status"] == "online"
    rig.advance(20)
    known = shown.ask(do="roster")["rosters"]["alpha"]
    assert "sessions" not in known and known["away"] == ["old", "worker"]
    assert "worker" not in shown.ask(do="states")["states"]
    shown.client.close()


# Who is addressed


def test_the_session_that_is_attached_longest_speaks_for_a_node_without_an_agent(
    rig: Rig, program: Program, program_of: Callable[..., Program]
) -> None:
    other = program_of("other")
    tell(rig, asked(to="beta", text="for the node"))
    rig.tell(asked(to="all", text="for all"))
    assert (program.texts(), other.texts()) == (["for the node", "for all"], ["for all"])
    program.end()
    tell(rig, asked(to="beta", text="for the next"))
    assert other.texts() == ["for all", "for the next"]
    other.end()
    refused = tell(rig, asked(to="beta"))
    assert "there is no agent to tell" in rig.answer_to(refused).text


def test_a_configured_agent_speaks_for_its_node_whoever_is_attached(
    rig_of: Make, main_agent: hive.InstanceConfig, fast_agent: Path
) -> None:
    rig = rig_of([main_agent])
    program = Program(rig, "reviewer")
    message = tell(rig, asked(to="beta"))
    rig.until("main is told", lambda: rig.journal.tasks() == [] or calls_of(fast_agent))
    assert program.inbox() == []
    rig.until("its receipts", lambda: len(receipts_for(rig, message)) == 2)
    assert receipts_for(rig, message) == ["received", "told main"]
    program.client.close()


def test_nobody_answers_a_question_of_a_session_which_hears_so_itself(
    rig: Rig, program: Program, program_of: Callable[..., Program]
) -> None:
    other = program_of("other")
    other.say("anybody?", ttl=1)
    rig.until("it is overdue", lambda: other.texts(), tick=0.5)
    (said,) = other.texts()
    assert re.fullmatch(r"no answer from alpha to what was asked \d s ago", said)
    assert program.texts() == []


def test_an_answer_of_a_session_to_a_message_to_all_is_its_nodes() -> None:
    asked_all = hive.Envelope.new("alpha", "all", "command", "who is there?")
    replies = hive.ReplyCollector(asked_all, hive.HeartbeatConfig())
    now = {"status": "online", "last_seen": int(time.time()), "oc": {"rev": hive.WELL}}
    session = {**now, "daemon_node": "beta"}
    replies.expect({"beta": {**now, "daemon_node": "beta"}, "rev": session})
    assert replies.outstanding == {"beta"}
    assert replies.take(asked_all.reply("rev", "I am")) and not replies.outstanding


# Receipts


def test_receipts_tell_what_became_of_a_message_once_and_only_if_asked_for(
    rig: Rig, program: Program
) -> None:
    message = tell(rig, asked())
    plain = rig.say("command", to="beta")
    for how in ("told", "told", "read", "read"):
        program.mark(how, *(one["task"] for one in program.inbox()), *rig_tasks(rig))
    assert receipts_for(rig, message) == ["received", "told reviewer", "read by reviewer"]
    (receipt, *_) = rig.answers_to(message)
    assert (receipt.sender, receipt.to, receipt.urgency) == ("beta", "alpha", "later")
    assert (receipt.corr, receipt.reply_to) == (message.id, message.id)
    assert receipts_for(rig, plain) == []


def rig_tasks(rig: Rig) -> list[int]:
    return [task.n for task in rig.journal.tasks()]


@pytest.mark.parametrize("ch", ["response", "alert", "status"])
def test_what_never_causes_an_answer_causes_no_receipt(rig: Rig, program: Program, ch: str) -> None:
    message = tell(rig, asked(ch=ch, urgency="now"))
    for one in program.inbox():
        program.mark("read", one["task"])
    to_all = rig.tell(asked(to="all"))
    assert receipts_for(rig, message) == receipts_for(rig, to_all) == []


FORGERIES = {
    "another node": {"sender": "mallory"},
    "an agent of another node": {"sender": "spy"},
    "other words": {"text": "read by reviewer; now do this"},
    "to be read at once": {"urgency": "now"},
    "about nothing": {"reply_to": "no-such"},
}


@pytest.mark.parametrize("how", FORGERIES.values(), ids=FORGERIES)
def test_a_receipt_counts_only_from_who_was_asked(rig: Rig, how: dict[str, Any]) -> None:
    rig.beat("alpha")
    rig.beat("mallory")
    roster = {"node": "mallory", "agents": ["spy"], "sessions": {"alpha": {}}}
    rig.hand_in("hive/meta/mallory/roster", json.dumps(roster).encode(), retained=True)
    program = Program(rig, "asker")
    question = program.say("x")
    given = {"corr": question.id, "reply_to": question.id, "urgency": "later", **how}
    given = {"sender": "alpha", "text": "read by reviewer", **given}
    genuine = {"corr": question.id, "reply_to": question.id, "urgency": "later"}
    rig.say("status", to="asker", sender=given.pop("sender"), **given)
    rig.say("status", to="asker", text="told reviewer", **genuine)
    rows = [row for row in rig.journal.exchange(question.id) if row["event"] == "in"]
    assert [row["note"].startswith(hive.RECEIPT_NOTE) for row in rows] == [False, True]
    story = hive.exchange_story(rows, terminal=False).splitlines()
    assert story[0].endswith(f"in: status from {rows[0]['from']} to asker ({rows[0]['note']})") or (
        how.get("urgency") == "now"
    )
    assert story[-1].endswith(" alpha: told reviewer")
    program.client.close()


# What nobody reads


def test_what_was_told_and_not_read_for_certain_is_read_by_the_next_one(
    rig: Rig, program: Program, program_of: Callable[..., Program]
) -> None:
    message = tell(rig, asked())
    program.mark("told", program.inbox()[0]["task"])
    program.end()
    (again,) = program_of("reviewer").inbox()
    assert (again["envelope"]["id"], again["note"]) == (message.id, "perhaps told before")
    assert hive.pending_document(rig.journal, {})["tasks"][0]["agent"] == "reviewer"


def test_what_was_told_long_ago_counts_as_read(
    rig: Rig, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(rig, asked())
    program.mark("told", program.inbox()[0]["task"])
    monkeypatch.setattr(hive, "FORGETTABLE", -1.0)
    rig.advance(2 * hive.SWEEP_INTERVAL)
    assert rig.journal.tasks() == []


def test_what_a_session_does_not_read_in_time_its_sender_hears_of(
    rig: Rig, program: Program
) -> None:
    message = tell(rig, asked(ttl=1))
    rig.until("it is over", lambda: rig.answers_to(message)[1:], tick=0.3)
    assert rig.answers_to(message)[-1].text == (
        "beta: message refused: agent reviewer was not told: its time to live was over"
    )
    assert program.inbox() == []


def test_mail_of_a_session_that_does_not_come_back_goes_back(rig_of: Make) -> None:
    rig = rig_of(node={"agent_patience": 60.0})
    program = Program(rig, "reviewer")
    message = tell(rig, asked())
    program.end()
    rig.advance(50)
    assert rig.kept("beta", "roster")[-1]["away"] == ["reviewer"]
    assert [one.ch for one in rig.answers_to(message)] == ["status"]
    rig.advance(20)
    assert rig.answers_to(message)[-1].text == (
        "beta: message refused: agent reviewer was not told: its session is gone"
    )
    assert rig.kept("beta", "roster")[-1]["away"] == []
    late = tell(rig, asked(text="late"))
    assert "its session is gone" in rig.answers_to(late)[-1].text
    assert rig.journal.tasks() == []


def test_mail_of_a_session_that_does_not_come_back_goes_to_the_agent_of_the_node(
    rig_of: Make, main_agent: hive.InstanceConfig, fast_agent: Path
) -> None:
    guarded = main_agent.replace(allow=("alpha",))
    rig = rig_of([guarded], node={"agent_patience": 60.0})
    program = Program(rig, "reviewer")
    tell(rig, asked())
    sly = tell(rig, asked(sender="mallory"))
    program.end()
    rig.advance(70)
    rig.until("main is told", lambda: calls_of(fast_agent))
    (call,) = calls_of(fast_agent)
    assert "from alpha to reviewer" in call["argv"][3]
    assert "(for reviewer, whose session is gone)" in call["argv"][3]
    assert "does not name mallory" in rig.answers_to(sly)[-1].text


def test_an_answer_that_comes_when_nobody_waits_any_more_is_for_the_agent_of_the_node(
    rig_of: Make, main_agent: hive.InstanceConfig, fast_agent: Path
) -> None:
    rig = rig_of([main_agent], node={"agent_patience": 60.0})
    program = Program(rig, "asker")
    question = program.say("is the build green?")
    program.end()
    rig.advance(70)
    assert rig.kept("beta", "roster")[-1]["away"] == ["asker"], "others can find its node still"
    tell(rig, question.reply("alpha", "it is"))
    rig.until("main is told", lambda: calls_of(fast_agent))
    (call,) = calls_of(fast_agent)
    assert '(for asker, whose session is gone) re: "is the build green?"' in call["argv"][3]
    Program(rig, "another").end()
    assert rig.kept("beta", "roster")[-1]["away"] == ["another"]


def test_an_inbox_takes_so_many_and_the_oldest_of_whoever_has_most_goes(
    rig: Rig, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_AGENT_QUEUE", 5)
    few = tell(rig, asked(sender="gamma", text="the only one"))
    many = [tell(rig, asked(text=f"{i}")) for i in range(7)]
    assert program.texts() == ["the only one", "3", "4", "5", "6"]
    gone = [one for one in many if any(a.ch == "alert" for a in rig.answers_to(one))]
    assert gone == many[:3] and [a.ch for a in rig.answers_to(few)] == ["status"]


def test_a_session_that_reads_nothing_is_cut_off(rig: Rig, program: Program) -> None:
    sessions = rig.node.node.sessions
    requester = sessions._sessions["reviewer"].requester
    assert requester
    while not requester.busy:  # what the socket holds besides
        requester.send({"x": "y" * 100_000})
    for i in range(3):
        tell(rig, asked(text=f"{i}"))
    assert "reviewer" in sessions.live
    rig.advance(hive.DEAF_TIME + 3 * hive.SWEEP_INTERVAL)
    assert "reviewer" in sessions.away
    assert len(rig.journal.tasks()) == 3
    assert rig.events("session cut off", agent="reviewer")


def test_a_session_that_sends_for_weeks_leaves_nothing_behind(rig: Rig, program: Program) -> None:
    requester = rig.node.node.sessions._sessions["reviewer"].requester
    assert requester
    before = len(requester.on_close)
    for i in range(5):
        program.say(f"{i}")
    rig.turn()
    assert len(requester.on_close) == before


# Who may


def test_a_rule_that_names_a_node_means_its_agents_and_sessions(
    rig_of: Make, main_agent: hive.InstanceConfig, fast_agent: Path
) -> None:
    rig = rig_of([main_agent.replace(allow=("alpha",))])
    for node, session in (("alpha", "worker"), ("mallory", "spy")):
        rig.beat(node)
        roster = {"node": node, "agents": [], "sessions": {session: {}}, "away": []}
        rig.hand_in(f"hive/meta/{node}/roster", json.dumps(roster).encode(), retained=True)
    refused = rig.say("command", sender="spy", text="let me in")
    assert "does not name spy" in rig.answer_to(refused).text
    rig.say("command", sender="worker", text="it is me")
    rig.until("main is told", lambda: calls_of(fast_agent))
    own = Program(rig, "own")
    own.say("and me", to="main")
    sent = rig.sent()[-1]
    tell(rig, sent)
    rig.until("main is told", lambda: len(calls_of(fast_agent)) == 2)
    own.client.close()


def test_a_peer_can_neither_attach_nor_read_nor_mark(rig: Rig, program: Program) -> None:
    tell(rig, asked())
    for do in ("attach", "inbox", "mark", "sessions", "send"):
        text = json.dumps({"do": do, "agent": "reviewer", "name": "mallory"})
        rig.say("command", to="beta", sender="mallory", text=text, action=do)
        rig.hand_in(f"hive/beta/{do}", text.encode())
    rig.turn()
    assert rig.node.node.sessions.live == ("reviewer",) and "look" in program.texts()


# On real brokers, between real daemons


class Attached:
    """An agent program at the door of a daemon that is a process."""

    def __init__(self, node: Daemon, name: str, **facts: Any) -> None:
        config = hive.load_config(str(node.config), {})
        self.client = hive.ControlClient(hive.control_socket_path(config), node.name)
        self.attached = self.client.ask({"do": "attach", "name": name, **facts})
        self.name = self.attached["agent"]

    def ask(self, do: str, **request: object) -> dict[str, Any]:
        return self.client.ask({"do": do, "agent": self.name, **request})

    def mail(self) -> int:
        said = self.client.receive(PATIENCE) or {}
        return int(said["mail"]) if "mail" in said else self.mail()

    def read(self) -> list[hive.Envelope]:
        """What is new, which counts as read."""
        found = self.ask("inbox")["messages"]
        self.ask("mark", tasks=[one["task"] for one in found], **{"as": "read"})
        return [hive.Envelope.check(one["envelope"]) for one in found]

    def next(self) -> hive.Envelope:
        return eventually("a message", self.read)[0]

    def send(self, envelope: hive.Envelope) -> dict[str, Any]:
        return self.client.ask({"do": "send", "envelope": envelope.document()})

    def say(self, to: str, text: str) -> hive.Envelope:
        envelope = hive.Envelope.new(self.name, to, "command", text).replace(extra=WANTED)
        assert "queued" in self.send(envelope)
        return envelope


@pytest.fixture(params=["open", "checked"])
def pair(hive_of: Callable[..., Hive], shared_broker: Broker, request: Any) -> Hive:
    """Two nodes that run, in an open hive and in one where topics name the sender."""
    made = hive_of(shared_broker)
    made.mqtt += f'\nsenders = "{request.param}"'
    for name in ("alpha", "beta"):
        made.node(name).start()
    return made


def knows(pair: Hive, node: str, *names: str) -> None:
    """Wait until a node has heard of these."""

    def known() -> bool:
        rows = json.loads(pair.cli(node, "status", "--json").stdout)
        return {*names} <= {row["name"] for row in rows}

    eventually(f"{node} knows {names}", known)


def test_sessions_of_two_nodes_write_to_each_other_and_answer(pair: Hive) -> None:
    asker, reviewer = Attached(pair.nodes["alpha"], "asker"), Attached(pair.nodes["beta"], "rev")
    knows(pair, "alpha", "rev")
    question = asker.say("rev", "is it good?")
    assert reviewer.mail() == 1
    message = reviewer.next()
    assert (message.sender, message.text) == ("asker", "is it good?")
    assert "queued" in reviewer.send(message.reply("rev", "it is"))
    answer = asker.next()
    assert (answer.sender, answer.to, answer.text) == ("rev", "asker", "it is")
    sent = pair.cli("alpha", "send", "--to", "rev", "--text", "from a command")
    assert sent.stderr == ""
    assert reviewer.next().sender == "alpha"
    pair.cli("beta", "send", "--to", "rev", "--text", "from the same node")
    assert reviewer.next().sender == "beta"
    pair.node("gamma")  # where no daemon runs
    pair.cli("gamma", "send", "--to", "rev", "--text", "from elsewhere")
    assert reviewer.next().text == "from elsewhere"
    told = pair.cli("alpha", "show", question.id).stdout
    times = r"\d\d-\d\d \d\d:\d\d:\d\d"
    story = [rf"{times} out: command from asker to rev", rf"{times} beta: received"]
    story += [rf"{times} beta: read by rev", rf"{times} in: response from rev to asker"]
    assert re.search(r"\n(.*\n)*".join(story), told), told
    for one in (asker, reviewer):
        one.client.close()


PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
import hive
client = hive.ControlClient(hive.Path(sys.argv[2]), "beta")
client.ask({"do": "attach", "name": "rev", "directory": "~/site", "client": "codex 0.169"})
time.sleep(600)
"""


def test_a_session_that_is_away_gets_its_mail_when_it_is_back(pair: Hive) -> None:
    beta = pair.nodes["beta"]
    door = hive.control_socket_path(hive.load_config(str(beta.config), {}))
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, str(ROOT), str(door)])
    knows(pair, "alpha", "rev")
    assert re.search(r"\nrev +beta +codex 0.169 +~/site ", pair.cli("alpha", "status").stdout)
    program.kill()
    program.wait()
    eventually("it is not there", lambda: "codex" not in pair.cli("alpha", "status").stdout)
    said = pair.cli("alpha", "send", "--to", "rev", "--text", "come back").stderr
    assert said == "hive: rev is away: its node keeps the message for it\n"
    eventually("beta has it", lambda: "come back" in pair.cli("beta", "pending").stdout)
    assert beta.stop(signal.SIGKILL)
    beta.start()
    back = Attached(beta, "rev")

    def own(session: Attached) -> list[dict[str, Any]]:
        """Not that beta was lost meanwhile, which is told to all."""
        return [m for m in session.ask("inbox")["messages"] if m["envelope"]["to"] == "rev"]

    assert back.attached["unread"] == 1
    (message,) = own(back)
    back.ask("mark", tasks=[message["task"]], **{"as": "told"})
    assert own(back) == []
    assert beta.stop(signal.SIGKILL)
    beta.start()
    again = Attached(beta, "rev")
    (message,) = own(again)
    assert message["note"] == "perhaps told before"
    assert again.read() and own(again) == []
    again.client.close()


def test_mail_of_a_session_that_began_while_its_node_was_away_is_not_lost(pair: Hive) -> None:
    alpha, beta = pair.nodes["alpha"], pair.nodes["beta"]
    Attached(alpha, "asker").client.close()
    knows(pair, "beta", "alpha")
    eventually("beta knows it", lambda: "asker" in pair.cli("beta", "roster", "--json").stdout)
    assert alpha.stop() == 0
    Attached(beta, "new").say("asker", "nobody there knows me yet")

    def pending() -> dict[str, Any]:
        return dict(json.loads(pair.cli("beta", "pending", "--json").stdout))

    eventually("the broker has it", lambda: not pending()["outbox"])
    asker = Attached(alpha.start(), "asker")
    message = asker.next()
    assert (message.sender, message.text) == ("new", "nobody there knows me yet")
