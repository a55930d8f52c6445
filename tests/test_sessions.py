"""Sessions: agent programs that are attached to their node, and what they have to read."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import PATIENCE, Broker, Daemon, Hive, eventually
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


def test_a_session_that_is_away_gets_its_mail_when_it_is_back(pair: Hive) -> None:
    beta = pair.nodes["beta"]
    gone = Attached(beta, "rev", directory="~/site", branch="fix", client="codex 0.169")
    knows(pair, "alpha", "rev")
    gone.client.close()
    eventually("it is not there", lambda: "codex" not in pair.cli("alpha", "status").stdout)
    said = pair.cli("alpha", "send", "--to", "rev", "--text", "come back").stderr
    assert said == "hive: rev is away: its node keeps the message for it\n"
    eventually("beta has it", lambda: "come back" in pair.cli("beta", "pending").stdout)
    assert beta.stop(signal.SIGKILL)
    beta.start()
    back = Attached(beta, "rev")
    assert back.attached["unread"] == 1
    (message,) = back.ask("inbox")["messages"]
    back.ask("mark", tasks=[message["task"]], **{"as": "told"})
    assert back.ask("inbox")["messages"] == []
    assert beta.stop(signal.SIGKILL)
    beta.start()
    again = Attached(beta, "rev")
    (message,) = again.ask("inbox")["messages"]
    assert message["note"] == "perhaps told before"
    assert again.read() and again.read() == []
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
