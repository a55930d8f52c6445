"""Sessions: agent programs that are attached to their node, and what they have to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
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
