"""Mcp: what a model reads of each tool, and every bound, with the node in this very process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import noting
from rig import Rig
from test_mcp import HELLO, call, request

import hive


class Door:
    """What its ControlClient is to a session, without the socket: the node is asked at once."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.busy, self.ended = rig, False, False
        self.fault: dict[str, Any] = {}  # is answered instead
        self.on_close: list[Callable[[], object]] = []
        self.asked: list[Mapping[str, Any]] = []
        self.lines = deque[dict[str, Any]]()
        self.reader, self.writer = os.pipe()

    def ask(self, request: Mapping[str, object]) -> dict[str, Any]:
        self.asked.append(request)
        if self.ended:
            raise hive.DaemonError("the daemon of beta: it has ended")
        answer = self.fault or self.rig.node.node.requests.handle(request, self)
        if answer is None:
            self.rig.turn()
            answer = next(one for one in self.lines if not hive.CONTROL_EVENTS & one.keys())
            self.lines.remove(answer)
            self.drain()  # what came meanwhile it has taken from the socket
        return dict(json.loads(hive.encode_json(answer)))

    def send(self, document: Mapping[str, Any]) -> None:
        self.lines.append(json.loads(hive.encode_json(document)))
        os.write(self.writer, b".")

    def receive(self, within: float | None) -> dict[str, Any] | None:
        assert within == 0.0  # a session never waits for its daemon
        if self.ended:
            raise hive.DaemonError("the daemon of beta: it has ended")
        if not self.lines:
            self.drain()
        return self.lines.popleft() if self.lines else None

    def drain(self) -> None:
        os.set_blocking(self.reader, False)
        with contextlib.suppress(BlockingIOError):
            os.read(self.reader, 4096)

    def end(self) -> None:
        """The daemon goes."""
        self.ended = True
        os.write(self.writer, b".")

    def fileno(self) -> int:
        return self.reader

    def close(self) -> None:
        for one in [*self.on_close]:
            one()
        self.on_close.clear()
        if self.writer >= 0:
            os.close(self.reader)
            os.close(self.writer)
            self.writer = -1


class Session:
    """A client and its server, whose daemon is a node on a link in memory; no time passes."""

    def __init__(self, rig: Rig, name: str = "ada") -> None:
        self.rig, self.doors, self.tries = rig, list[Door](), list[float]()
        self.runs = True  # does a daemon?
        self.loop = hive.Loop(hive.Log("error", stream=rig.log), rig.clock)
        stdin, self.to_server = os.pipe()
        self.from_server, stdout = os.pipe()
        os.set_blocking(self.from_server, False)
        self.files = [stdin, self.to_server, self.from_server, stdout]
        self.server = hive.McpServer(self.loop, stdin, stdout, lambda: rig.config, name)
        self.server.listen()
        self.read, self.number = b"", 0

    def connect(self, *given: object) -> Door | None:
        self.tries.append(self.rig.clock())
        if not self.runs:
            return None
        self.doors.append(Door(self.rig))
        return self.doors[-1]

    def say(self, *documents: object) -> None:
        for one in documents:
            os.write(self.to_server, json.dumps(one).encode() + b"\n")
        self.turn()

    def turn(self) -> None:
        for _ in range(4):
            self.loop.post(lambda: None)
            self.loop.step()

    def advance(self, seconds: float, step: float = 0.05) -> None:
        for _ in range(round(seconds / step)):
            self.rig.clock.now += step
            self.rig.turn()
            self.turn()

    def doze(self, seconds: float) -> None:
        """Let time pass from one thing that is due to the next."""
        until = self.rig.clock.now + seconds
        self.turn()
        while due := [one.due for one in self.loop._timers if one.call and one.due <= until]:
            self.rig.clock.now = max(self.rig.clock.now, min(due))
            self.turn()
        self.rig.clock.now = until

    def lines(self) -> list[dict[str, Any]]:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.from_server, 65536):
                self.read += data
        *lines, self.read = self.read.split(b"\n")
        return [json.loads(line) for line in lines]

    def begin(self, tool: str, /, **arguments: object) -> None:
        self.number += 1
        self.say(call(self.number, tool, **arguments))

    def result(self) -> tuple[bool, str]:
        """Of the one call that has been answered since: has it failed, and what does it say?"""
        (one,) = self.lines()
        (content,) = one["result"]["content"]
        return one["result"]["isError"], content["text"]

    def tool(self, tool: str, /, **arguments: object) -> str:
        self.begin(tool, **arguments)
        failed, text = self.result()
        assert not failed, text
        return text

    def refused(self, tool: str, /, **arguments: object) -> str:
        self.begin(tool, **arguments)
        failed, text = self.result()
        assert failed, text
        return text

    def asked(self) -> list[Any]:
        """What the last daemon was asked."""
        return [one["do"] for one in self.doors[-1].asked]

    def close(self) -> None:
        for file in self.files:
            with contextlib.suppress(OSError):
                os.close(file)
        for door in self.doors:
            door.close()
        self.loop.close()


@pytest.fixture
def session_of(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Session]]:
    made: list[Session] = []
    rig.node.node.all_heard()

    def make(*given: Any) -> Session:
        made.append(Session(rig, *given))
        monkeypatch.setattr(hive, "connect_to_daemon", made[-1].connect)
        monkeypatch.setattr(hive, "await_daemon", made[-1].connect)
        return made[-1]

    yield make
    for one in made:
        one.close()
    rig.turn()


@pytest.fixture
def ada(session_of: Callable[..., Session]) -> Session:
    return session_of()


def peer(rig: Rig, name: str, /, **roster: Any) -> None:
    """A node is seen, with this in its roster."""
    document = {"node": name, "agents": [], "handlers": [], **roster}
    rig.hand_in(f"hive/meta/{name}/roster", json.dumps(document).encode(), True)
    state = {"status": "online", "last_seen": int(time.time()), "interval": 3600}
    agents = document["agents"] if isinstance(document["agents"], list) else []
    oc = {one: {"status": "ok"} for one in agents}
    rig.hear_state(name, True, **state, oc=oc)
    rig.turn()


def says(rig: Rig, text: str, **more: Any) -> hive.Envelope:
    """A peer's message for ada."""
    given = {"sender": "alpha", "to": "ada", "ch": "command", "text": text, **more}
    envelope = hive.Envelope.new(**given)
    rig.hand_in(f"hive/beta/{envelope.ch}", envelope.encode())
    rig.turn()
    return envelope


def sent(rig: Rig, text: str) -> hive.Envelope:
    """The one message that went out with this text."""
    rig.turn()
    (one,) = [one for one in rig.sent() if one.text == text]
    return one


# -- attached, and again --


def test_a_session_is_attached_a_moment_after_its_client_has_said_who_it_is(
    session_of: Callable[..., Session],
) -> None:
    session = session_of("")
    session.say(request(1, "initialize", **HELLO))
    session.advance(0.15)
    assert session.tries == []
    session.advance(0.1)
    (attach,) = session.doors[0].asked
    name = hive.session_name("claude-code", os.getcwd())
    assert attach["do"] == "attach" and attach["name"] == name and attach["exact"] is False
    assert attach["client"] == "claude-code 2.1.332" and attach["pid"] == os.getpid()
    assert attach["branch"] == hive.git_branch(os.getcwd())
    session.advance(60)
    assert len(session.tries) == 1 and session.server.link.attached


def test_a_name_that_was_said_is_wanted_exactly(ada: Session) -> None:
    ada.tool("list_agents")
    (attach,) = [one for one in ada.doors[0].asked if one["do"] == "attach"]
    assert (attach["name"], attach["exact"]) == ("ada", True)


@pytest.mark.parametrize(
    ("place", "shown"), [("", "~"), ("src/hive", "~/src/hive"), ("../other", "/other")]
)
def test_others_see_where_it_works_as_people_say_it(
    ada: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, shown: str
) -> None:
    folder = tmp_path / "home" / place
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folder)
    told = ada.server.link._introduction()["directory"]
    assert told == (shown if shown[0] == "~" else str(folder.resolve()))


def test_no_place_is_shown_where_the_directory_is_gone(
    ada: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "gone").mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert ada.server.link._introduction()["directory"] == ""


def test_it_looks_for_a_daemon_quickly_at_first_and_then_each_half_minute(ada: Session) -> None:
    ada.runs = False
    for _ in range(3):
        ada.server.link.soon()
    ada.doze(120)
    gaps = [b - a for a, b in zip(ada.tries, ada.tries[1:], strict=False)]
    assert gaps == pytest.approx([0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0])
    ada.runs = True
    ada.doze(31)
    assert ada.server.link.attached
    ada.doors[-1].end()
    ada.runs, tries = False, len(ada.tries)
    ada.doze(1)
    assert len(ada.tries) - tries == 2  # quickly again: after 0.2 and 0.4 seconds


def test_it_goes_on_looking_where_the_configuration_is_wrong_for_now(ada: Session) -> None:
    good = ada.rig.config
    ada.server.link._configure = lambda: (_ for _ in ()).throw(hive.ConfigError("hive.toml"))
    ada.server.link.soon()
    ada.advance(1)
    assert not ada.tries and not ada.server.link.attached
    ada.server.link._configure = lambda: good
    ada.advance(1)
    assert ada.server.link.attached


def test_the_configuration_is_read_anew_with_each_daemon_only(ada: Session) -> None:
    reads = list[tuple[()]]()
    ada.server.link._configure = noting(reads, ada.server.link._configure)
    ada.tool("list_agents")
    ada.tool("list_agents")
    assert len(reads) == 1
    ada.doors[-1].end()
    ada.turn()
    ada.tool("list_agents")
    assert len(reads) == 2
    ada.runs = False
    ada.doors[-1].end()
    ada.turn()
    assert "no daemon of beta runs" in ada.refused("read_inbox")
    assert len(reads) == 4  # and one that finds none is no daemon's


def test_a_daemon_that_ends_is_asked_once_more_and_what_it_opened_is_closed(ada: Session) -> None:
    ada.tool("list_agents")
    ada.doors[-1].ended = True  # and nothing is heard of that before it is asked
    assert ada.tool("read_inbox") == "Nothing new in your inbox."
    assert len(ada.doors) == 2 and ada.doors[0].writer == -1
    ada.doors[-1].fault = {"error": hive.STOPPING}
    ada.connect = lambda *_: None  # type: ignore[method-assign]
    ada.runs = False
    assert "no daemon of beta runs" in ada.refused("read_inbox")
    assert ada.doors[1].writer == -1 and not ada.server.link.attached


def test_a_refusal_to_attach_is_told_and_closes_what_was_opened(ada: Session) -> None:
    connect = ada.connect

    def refusing(*given: object) -> Door | None:
        door = connect(*given)
        assert door
        door.fault = {"error": "ada is a node: attach under another name"}
        return door

    for fault in ("await_daemon", "connect_to_daemon"):
        setattr(hive, fault, refusing)
    reads = list[tuple[()]]()
    ada.server.link._configure = noting(reads, ada.server.link._configure)
    assert ada.refused("read_inbox") == "ada is a node: attach under another name"
    assert ada.refused("read_inbox") == "ada is a node: attach under another name"
    assert len(reads) == 2  # it may be another configuration by then
    assert ada.doors[-1].writer == -1 and not ada.server.link.attached
    ada.doors[-1].fault = {}


def test_an_error_of_the_daemon_is_what_the_model_reads(ada: Session) -> None:
    assert ada.refused("show_exchange", id="no-such-id").startswith("no-such-id: no such message")
    assert "not known here" in ada.refused("wait_answer", id="no-such-id")


@pytest.mark.parametrize(
    ("path", "folder", "below"),
    [("/a", "/a", True), ("/a/b", "/a", True), ("/ab", "/a", False), ("/x", "/", True)],
)
def test_what_is_below_a_folder(path: str, folder: str, below: bool) -> None:
    assert hive.is_below(path, folder) is below


def test_a_repository_that_cannot_be_read_has_no_branch(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    assert hive.git_branch(str(tmp_path)) == ""  # no HEAD
    (tmp_path / ".git" / "HEAD").write_bytes(b"\xff")
    assert hive.git_branch(str(tmp_path)) == ""
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/" + "b" * 9000)
    assert len(hive.git_branch(str(tmp_path))) == 4096 - len("ref: refs/heads/")
    (tmp_path / ".git" / "HEAD").unlink()
    (tmp_path / ".git").rmdir()
    (tmp_path / ".git").write_text("gitdir: " + "d" * 9000)
    assert hive.git_branch(str(tmp_path)) == ""


# -- the inbox --


def test_mail_is_read_oldest_first_up_to_the_limit_and_once(ada: Session) -> None:
    ada.tool("list_agents")
    for n in range(12):
        says(ada.rig, f"m{n:02}")
    first = ada.tool("read_inbox")
    assert [n for n in range(12) if f'"m{n:02}"' in first] == [*range(10)]
    assert "[hive] 2 more unread: call read_inbox again." in first
    assert "To answer one: the tool reply, with its id." in first
    rest = ada.tool("read_inbox", limit=1)
    assert '"m10"' in rest and '"m11"' not in rest and "1 more unread" in rest
    assert '"m11"' in ada.tool("read_inbox")
    assert ada.tool("read_inbox") == "Nothing new in your inbox."
    assert ada.rig.journal.unread("ada") == 0


def test_waiting_for_mail_ends_with_the_first_or_with_the_patience(ada: Session) -> None:
    ada.begin("read_inbox", wait_seconds=7)
    ada.advance(6.9)
    assert ada.lines() == []
    ada.advance(0.2)
    assert ada.result() == (False, "Nothing new in your inbox.")
    ada.begin("read_inbox", wait_seconds=7)
    says(ada.rig, "there")
    ada.turn()
    failed, text = ada.result()
    assert not failed and '"there"' in text


def test_the_answer_that_one_call_awaits_is_kept_from_another_call(ada: Session) -> None:
    peer(ada.rig, "alpha", agents=["bob"])
    ada.begin("ask", to="bob", text="how many?", wait_seconds=60)
    question = sent(ada.rig, "how many?")
    assert question.extra[hive.RECEIPTS] is True
    ada.begin("read_inbox", wait_seconds=60)
    says(ada.rig, "something else")
    ada.turn()
    failed, text = ada.result()
    assert '"something else"' in text
    answer = question.reply("bob", "seven")
    ada.rig.hand_in("hive/beta/response", answer.encode())
    ada.rig.turn()
    ada.turn()
    failed, text = ada.result()
    assert not failed and '"seven"' in text and "To answer one" not in text
    assert ada.tool("read_inbox") == "Nothing new in your inbox."
    assert ada.rig.journal.unread("ada") == 0  # the answer too


def test_a_message_that_was_handed_out_is_not_handed_out_again_before_it_is_marked(
    ada: Session,
) -> None:
    ada.tool("list_agents")
    one, other = says(ada.rig, "one"), says(ada.rig, "other")
    tasks = ada.doors[-1].ask({"do": "inbox", "agent": "ada"})["messages"]
    ada.server.tools.handed_out = {tasks[0]["task"]}
    found, more = ada.server.tools.messages(1)
    assert [row["envelope"]["id"] for row in found] == [other.id] and more == 0
    ada.server.tools.mark([tasks[0]["task"]], "read")
    assert ada.server.tools.handed_out == set()
    assert [row.envelope.id for row in ada.rig.journal.inbox("ada", 9, "")] == [other.id]
    assert one.id != other.id


def test_what_was_read_is_marked_fifty_at_a_time(ada: Session) -> None:
    ada.tool("list_agents")
    asked = ada.doors[-1].asked
    del asked[:]
    ada.server.tools.mark(range(1, 121), "read")
    assert [len(one["tasks"]) for one in asked] == [50, 50, 20]
    assert {one["as"] for one in asked} == {"read"}


@pytest.mark.parametrize("senders", ["open", "checked"])
def test_below_messages_stands_whether_their_senders_are_vouched_for(senders: str) -> None:
    note = {"note": "", "question": "", "task": 1}
    news = hive.Envelope.new("alpha", "ada", "status", "hello")
    shown = hive.shown_mail([{**note, "envelope": news.document()}], 0, senders).text
    assert ("The broker vouches for the senders." in shown) == (senders == "checked")
    assert (hive.UNVOUCHED in shown) == (senders == "open")
    assert "reply" not in shown.splitlines()[-1]  # news want no answer


def test_as_many_messages_are_shown_as_have_room_and_at_least_one() -> None:
    def mail(size: int, n: int) -> dict[str, Any]:
        document = hive.Envelope.new("a", "b", "command", "x", id=f"i{n}").document()
        event = hive.PendingEvent(hive.Envelope.check(document), True, 0.0)
        document["text"] = "x" * (size - len(hive.event_text(event)) + 1)
        return {"envelope": document, "note": "", "question": "", "task": n}

    half = 20 * 1024  # of the 40 KiB that there are
    limit, hive_body = half, hive.MAX_BODY
    assert hive_body < limit  # one text is cut before it fills that
    four = [mail(10 * 1024, n) for n in range(1, 6)]
    assert hive.shown_mail(four[:4], 0, "open").tasks == (1, 2, 3, 4)
    shown = hive.shown_mail(four, 2, "open")
    assert shown.tasks == (1, 2, 3, 4) and "[hive] 3 more unread" in shown.text
    four[0] = mail(10 * 1024 + 1, 1)
    four[4] = mail(300, 5)
    assert hive.shown_mail(four, 0, "open").tasks == (1, 2, 3)  # no later one before it
    large = {**four[0], "envelope": four[0]["envelope"] | {"text": "\x01" * 12_000}}
    assert hive.shown_mail([large, four[4]], 0, "open").tasks == (1,)


def test_an_answer_is_shown_once_however_often_the_journal_has_it(ada: Session) -> None:
    peer(ada.rig, "alpha", agents=["bob"])
    ada.tool("send_message", to="bob", text="how many?")
    question = sent(ada.rig, "how many?")
    ada.rig.hand_in("hive/beta/response", question.reply("bob", "seven").encode())
    ada.rig.turn()
    ada.turn()
    assert ada.tool("read_inbox").count('"seven"') == 1
    assert ada.tool("wait_answer", id=question.id).count('"seven"') == 1
    rows = ada.server.tools.exchange_of(question.id)
    gone = {**rows[0], "event": "in", "envelope": None}  # a text that is kept no longer
    ada.server.tools.exchange_of = lambda id: [gone, *rows]  # type: ignore[method-assign]
    assert ada.tool("wait_answer", id=question.id).count('"seven"') == 1


# -- answers, and whose they are --


def test_a_message_is_answered_once_and_only_who_asked_is_answered(ada: Session) -> None:
    ada.tool("list_agents")
    asked = says(ada.rig, "may I?")
    text = ada.tool("reply", id=asked.id, text="you may")
    assert text.startswith("Sent to alpha, id ")
    answer = sent(ada.rig, "you may")
    assert (answer.ch, answer.reply_to, answer.sender) == ("response", asked.id, "ada")
    again = ada.refused("reply", id=asked.id, text="or not")
    assert again.startswith(f"{asked.id}: answered already (")
    own = ada.refused("reply", id=answer.id, text="x")
    assert own == f"{answer.id}: that is your own message; go on with send_message or ask"
    news = says(ada.rig, "by the way", ch="status")
    assert "that is an answer, or news" in ada.refused("reply", id=news.id, text="x")
    other = says(ada.rig, "and this?")
    ada.tool("reply", id=other.id, text="that failed", failed=True)
    assert sent(ada.rig, "that failed").ch == "alert"


def test_a_message_may_be_answered_that_another_agent_has_answered(ada: Session) -> None:
    ada.tool("list_agents")
    asked = says(ada.rig, "who?")
    mine = hive.Envelope.new("beta", "alpha", "response", "me", corr=asked.id, reply_to=asked.id)
    ada.doors[-1].ask({"do": "send", "envelope": mine.document()})
    assert "Sent to alpha" in ada.tool("reply", id=asked.id, text="I")


def test_a_message_whose_text_is_kept_no_longer_is_said_so(
    ada: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada.tool("list_agents")
    ada.doors[-1].fault = {"envelope": None}
    assert ada.refused("wait_answer", id="abc") == "abc: its text is kept no longer"


def test_only_for_answers_to_ones_own_messages_one_may_wait(ada: Session) -> None:
    ada.tool("list_agents")
    theirs = says(ada.rig, "hello")
    refusal = ada.refused("wait_answer", id=theirs.id)
    assert refusal == f"{theirs.id}: not a message of yours; to answer it: reply"
    peer(ada.rig, "alpha", agents=["bob"])
    ada.tool("send_message", to="bob", text="mine")
    ada.begin("wait_answer", id=sent(ada.rig, "mine").id, wait_seconds=9)
    assert ada.lines() == []
    ada.advance(9.1)
    failed, text = ada.result()
    assert not failed and text.startswith("No answer from bob yet")
    nodes = hive.Envelope.new("beta", "alpha", "command", "the node's")
    ada.doors[-1].ask({"do": "send", "envelope": nodes.document()})
    assert "No answer" in ada.tool("wait_answer", id=nodes.id, wait_seconds=0)


def test_an_alert_is_an_answer_that_failed(ada: Session) -> None:
    peer(ada.rig, "alpha", handlers=["fix"])
    ada.begin("ask", to="alpha", text="x", action="fix")
    question = sent(ada.rig, "x")
    assert (question.action, question.urgency) == ("fix", "now")
    alert = question.reply("alpha", "exit 1", ch="alert")
    ada.rig.hand_in("hive/beta/alert", alert.encode())
    ada.rig.turn()
    ada.turn()
    failed, text = ada.result()
    assert failed and '"exit 1"' in text


def test_all_who_could_answer_are_awaited_and_who_does_not_is_named(ada: Session) -> None:
    peer(ada.rig, "alpha", agents=["bob"])
    peer(ada.rig, "gamma", agents=["cleo"])
    peer(ada.rig, "empty")
    peer(ada.rig, "away", agents=["dan"])
    ada.rig.hear_state("away", True, status="offline", last_seen=int(time.time()))
    ada.begin("ask", to="all", text="who?", wait_seconds=30)
    question = sent(ada.rig, "who?")
    ada.rig.hand_in("hive/beta/response", question.reply("bob", "I").encode())
    ada.rig.turn()
    ada.turn()
    assert ada.lines() == []
    ada.doze(31)
    failed, text = ada.result()
    later = f"The answer comes to your inbox; or wait on: wait_answer with id {question.id}."
    assert not failed and '"I"' in text
    assert text.endswith(f"\nNo answer from gamma yet. {later}")


def test_it_is_told_who_has_received_a_question_that_is_not_answered(ada: Session) -> None:
    peer(ada.rig, "alpha", agents=["bob"])
    ada.begin("ask", to="bob", text="well?")  # 45 seconds, if nothing is said
    receipt = sent(ada.rig, "well?").reply("alpha", "told bob", ch="status", urgency="later")
    ada.rig.hand_in("hive/beta/status", receipt.encode())
    ada.rig.turn()
    ada.doze(44)
    assert ada.lines() == []
    ada.doze(1)
    failed, text = ada.result()
    assert not failed and text.startswith("No answer from bob yet (alpha: told bob). The answer")


def test_nobody_to_answer_is_said_at_once(ada: Session) -> None:
    peer(ada.rig, "empty")
    nobody = "nobody else is online who could answer; see list_agents"
    assert ada.refused("ask", to="all", text="x") == nobody
    ada.begin("ask", to="all", text="x", action="ping")  # who has no agent may have the action
    assert ada.lines() == []


def test_an_answer_comes_from_an_agent_of_the_same_node_too(ada: Session) -> None:
    peer(ada.rig, "alpha", agents=["bob", "ben"])
    peer(ada.rig, "gamma", agents=["cleo"])
    ada.begin("ask", to="bob", text="who?")
    question = sent(ada.rig, "who?")
    for name in ("cleo", "ben"):
        ada.rig.hand_in("hive/beta/response", question.reply(name, f"I, {name}").encode())
        ada.rig.turn()
        ada.turn()
    _, text = ada.result()
    assert '"I, ben"' in text and "cleo" not in text


# -- what is sent --


def test_a_message_says_how_urgent_it_is(ada: Session) -> None:
    peer(ada.rig, "alpha", agents=["bob"])
    ada.tool("send_message", to="bob", text="soon")
    ada.tool("send_message", to="bob", text="whenever", urgent=False)
    assert [sent(ada.rig, one).urgency for one in ("soon", "whenever")] == ["now", "later"]
    one = sent(ada.rig, "soon")
    assert (one.sender, one.to, one.ch, one.extra) == ("ada", "bob", "command", {"receipts": True})


def test_what_the_broker_does_not_take_soon_is_queued(ada: Session) -> None:
    peer(ada.rig, "alpha", agents=["bob"])
    ada.rig.wire.silent = True
    ada.begin("send_message", to="bob", text="x")
    ada.advance(0.9)
    assert ada.lines() == []
    ada.advance(0.2)
    failed, text = ada.result()
    assert not failed and text.startswith("Queued for bob, id ")
    assert text.endswith(": the broker has not taken it yet. It goes out by itself.")
    assert ada.server.link.published == {}
    ada.rig.disconnect()
    ada.begin("send_message", to="bob", text="y")
    ada.turn()
    assert ada.result()[1].startswith("Queued for bob")  # at once
    ada.rig.connect()
    ada.rig.wire.silent = False


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, ""),
        (16, "nobody has ever listened for bob; list_agents shows who there is"),
        (0x80, "the broker refused it: no"),
        (0x97, "the broker refused it: no"),
    ],
)
def test_what_the_broker_says_is_what_the_model_reads(ada: Session, code: int, words: str) -> None:
    peer(ada.rig, "alpha", agents=["bob"])
    ada.rig.wire.silent = True
    ada.begin("send_message", to="bob", text="x")
    (message,) = [one for one in ada.rig.wire.unacknowledged if one.n]
    ada.rig.wire.acknowledge(message, code, "no")
    ada.rig.turn()
    ada.turn()
    failed, text = ada.result()
    assert failed is bool(words)
    if words:
        assert text == f"Not sent to bob: {words}"
    else:
        assert text.startswith("Sent to bob, id ")
        assert text.endswith(". show_exchange tells whether it was read.")
    assert hive.said_of(hive.Envelope.new("a", "bob", "command", "x"), {}) is None
    ada.rig.wire.silent = False


def test_who_is_written_to_must_be_there(ada: Session) -> None:
    peer(ada.rig, "alpha", agents=["bob"], handlers=["fix", "test"], sessions={"s1": {}})
    peer(ada.rig, "gamma", handlers=["fix"])
    peer(ada.rig, "delta")
    peer(ada.rig, "odd", handlers=7, agents=5)
    refusals = {
        ("ada", None): "to: ada is you; list_agents shows the others",
        ("bbo", None): "to: no agent or node is called bbo; did you mean bob?",
        ("zzzz", None): "to: no agent or node is called zzzz; list_agents shows who there is",
        ("bob", "fxi"): "action: alpha has no action fxi; did you mean fix?",
        ("gamma", "zzz"): "action: gamma has no action zzz; it offers fix",
        ("alpha", "zzz"): "action: alpha has no action zzz; it offers fix, test",
        ("delta", "zzz"): "action: delta has no action zzz; it offers none",
        ("odd", "zzz"): "action: odd has no action zzz; it offers none",
        ("delta", None): "to: delta has no agent that could read this; nor an action",
        ("gamma", None): "to: gamma has no agent that could read this;"
        " ask with an action of its (fix)",
        ("web-*", None): "to: web-* is several; say one name, all, any or any:TAG",
    }
    for (to, action), words in refusals.items():
        more = {"action": action} if action else {}
        assert ada.refused("ask", to=to, text="x", **more) == words
    for to, action in (("alpha", None), ("s1", None), ("gamma", "fix"), ("odd", None)):
        more = {"action": action} if action else {}
        assert "No answer" in ada.tool("ask", to=to, text="x", wait_seconds=0, **more)
    assert "Sent to all" in ada.tool("send_message", to="all", text="x")


def test_any_is_whoever_can_do_it(ada: Session) -> None:
    peer(ada.rig, "alpha", handlers=["fix"])
    peer(ada.rig, "gamma", agents=["cleo"])
    ada.tool("ask", to="any", text="with an action", action="fix", wait_seconds=0)
    assert sent(ada.rig, "with an action").to == "alpha"
    ada.tool("ask", to="any", text="with an agent", wait_seconds=0)
    assert sent(ada.rig, "with an agent").to == "gamma"


# -- what there is --


def test_who_is_there_and_what_each_can_do(ada: Session) -> None:
    facts = {"client": "codex 1", "directory": "~/site", "branch": "main", "since": 1}
    sessions = {"s1": facts, "s2": {"client": "", "directory": "/x"}, "s3": 7}
    peer(ada.rig, "alpha", agents=["bob"], handlers=["fix", "test"], sessions=sessions)
    peer(ada.rig, "gamma")
    gone = {"status": "offline", "reason": "", "last_seen": int(time.time()) - 7200}
    peer(ada.rig, "aaa")
    ada.rig.hear_state("aaa", True, **gone)
    lines = ada.tool("list_agents").splitlines()
    assert lines[0] == "You are ada, an agent of beta."
    assert "alpha: online; agents bob; actions fix, test" in lines
    assert "  s1: session on alpha; codex 1, ~/site, main" in lines
    assert "  s2: session on alpha; /x" in lines and "  s3: session on alpha; " in lines
    assert "gamma: online; no agent of its own" in lines
    assert lines[-1].startswith("aaa: ") and lines[-1].count(", seen ") == 1  # who is away
    assert not any("seen" in line for line in lines[:-1])
    assert not any("broker" in line or "Just" in line or "and " in line for line in lines)


def test_of_many_nodes_and_sessions_so_many_are_listed(ada: Session) -> None:
    for n in range(61):
        peer(ada.rig, f"n{n}")
    lines = ada.tool("list_agents").splitlines()
    assert lines[-1] == "and 1 more nodes"
    assert len([line for line in lines if ": online" in line]) == 60
    many: dict[str, Any] = {f"s{n}": {} for n in range(41)}
    (row,) = hive.status_rows({"x": {"status": "online"}}, hive.HeartbeatConfig(), 1.0)
    assert len(hive.member_lines(row, {"sessions": many}, "")) == 1 + 40
    assert len(hive.member_lines(row, {"sessions": ["s"]}, "")) == 1
    (_, own, other) = hive.member_lines(row, {"sessions": {"me": {}, "s": {}}}, "me")
    assert own.startswith("  me (you): session on x") and other.startswith("  s: session on x")


def test_a_list_says_what_may_be_missing_in_it(ada: Session) -> None:
    ada.tool("list_agents")
    ask = ada.doors[-1].ask
    more = {"fault": "broker.lan\x07: refused", "complete": False}
    ada.doors[-1].ask = lambda request: {**ask(request), **more}  # type: ignore[method-assign]
    lines = ada.tool("list_agents").splitlines()
    assert lines[1:3] == ["The broker: broker.lan?: refused", "Just connected: there may be more."]


def test_an_exchange_is_shown_with_its_texts_cut(ada: Session) -> None:
    ada.tool("list_agents")
    asked = says(ada.rig, "x" * 20_000)
    story = ada.tool("show_exchange", id=asked.id)
    assert story.count("x") == pytest.approx(5 * 1024, abs=30) and hive.MCP_CUT in story
    assert "in: command from alpha to ada" in story and not story.endswith("\n")
    for n in range(12):
        says(ada.rig, f"{n}" + "y" * 6000, corr=asked.id)
    story = ada.tool("show_exchange", id=asked.id)
    assert 39 * 1024 < len(story.encode()) <= 40 * 1024 and story.endswith(hive.MCP_CUT)


def test_names_are_those_of_nodes_their_agents_and_their_sessions() -> None:
    roster = {"agents": ["a"], "sessions": {"s": {}}, "away": ["w"]}
    names = hive.members_by_name({"n": roster, "a": {}})
    assert names == {"n": "n", "a": "a", "s": "n", "w": "n"}  # a node's own name is its own
    assert hive.one_node(names, "n", "s", "w") and not hive.one_node(names, "n", "a")
    assert hive.one_node(names, "x", "x") and not hive.one_node(names, "x", "n")


def test_who_is_silent_is_named_with_the_last_ten_receipts() -> None:
    asked = hive.Envelope.new("ada", "all", "command", "x", id="q1")
    rows: list[dict[str, Any]] = [
        {
            "event": "in",
            "from": f"n{n}",
            "note": f"{hive.RECEIPT_NOTE}received",
            "envelope": {"replyTo": "q1"},
        }
        for n in range(12)
    ]
    rows.append({**rows[0], "from": "other", "envelope": {"replyTo": "q2"}})
    rows.append({**rows[0], "from": "out", "event": "out"})
    rows.append({**rows[0], "from": "plain", "note": ""})
    rows.append({**rows[0], "from": "lost", "envelope": None})
    text = hive.still_missing(asked, ["n3", "n4"], rows)
    told = "; ".join(f"n{n}: received" for n in range(2, 12))
    assert text.startswith(f"No answer from n3, n4 yet ({told}). The answer comes to your inbox")
    assert hive.still_missing(asked, [], rows) == ""
    assert "yet. The" in hive.still_missing(asked, ["n3"], [])


# -- without a daemon --


class Alone:
    """The node in the process of who asks: what it is asked, and says."""

    made: list[Alone]
    says: deque[dict[str, Any]]

    def __init__(self, config: hive.Config, patience: float) -> None:
        assert patience == hive.PATIENCE
        self.asked: list[Mapping[str, Any]] = []
        self.closed = 0
        self.made.append(self)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append(request)
        if request["do"] in ("states", "roster"):
            states = {"alpha": {"status": "online", "last_seen": int(time.time()), "oc": {"b": {}}}}
            rosters = {"alpha": {"agents": ["b"]}}
            how = {"connected": True, "fault": "", "complete": True}
            return {"states": states, "rosters": rosters, **how}
        if request["do"] == "targets":
            return {"names": ["alpha"], "away": {}}
        return {"queued": True}

    def receive(self, within: float | None) -> dict[str, Any] | None:
        assert within is not None and within <= 0.01
        return self.says.popleft() if self.says else None

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def alone(ada: Session, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A session where no daemon runs."""
    ada.runs = False
    monkeypatch.setattr(Alone, "made", [], raising=False)
    monkeypatch.setattr(Alone, "says", deque(), raising=False)
    monkeypatch.setattr(hive, "InProcessNode", Alone)
    return ada


def test_without_a_daemon_a_message_goes_out_in_the_nodes_name(alone: Session) -> None:
    assert alone.tool("send_message", to="anybody", text="x").startswith("Sent to anybody, id ")
    (node,) = Alone.made
    assert node.asked[0]["envelope"]["from"] == "beta" and node.closed == 1
    Alone.says.append({"published": 16, "words": "no"})
    assert "nobody has ever listened for nobody" in alone.refused(
        "send_message", to="nobody", text="x"
    )
    assert "Sent to alpha" in alone.tool("send_message", to="any", text="x")
    assert [one.closed for one in Alone.made] == [1, 1, 1, 1]


def test_without_a_daemon_an_answer_is_looked_for_each_quarter_of_a_second(
    alone: Session,
) -> None:
    alone.begin("ask", to="alpha", text="x", wait_seconds=20)
    assert alone.lines() == []
    (node,) = Alone.made
    question = hive.Envelope.check(node.asked[0]["envelope"])
    assert node.asked[0]["wait"] is True
    Alone.says.append({"published": 0, "words": "ok"})
    Alone.says.append({"answer": hive.Envelope.new("x", "y", "response", "no").document()})
    Alone.says.append({"answer": question.reply("alpha", "pong").document()})
    alone.advance(0.2)
    assert alone.lines() == [] and node.closed == 0
    alone.advance(0.1)
    failed, text = alone.result()
    assert not failed and '"pong"' in text and '"no"' not in text and node.closed == 1
    assert "more unread" not in text


def test_without_a_daemon_who_does_not_answer_is_named(alone: Session) -> None:
    alone.begin("ask", to="all", text="x", wait_seconds=3)
    question = hive.Envelope.check(Alone.made[-1].asked[0]["envelope"])
    assert [one["do"] for one in Alone.made[-1].asked] == ["send", "states"]
    alone.advance(3.1)
    none = "No answer from alpha. No daemon runs here to wait for it: hive daemon."
    assert alone.result() == (True, none)
    assert question.to == "all" and Alone.made[-1].closed == 1
    alone.begin("ask", to="alpha", text="x", wait_seconds=3)
    Alone.says.append({"published": 0x87, "words": "not authorized"})
    alone.advance(0.3)
    assert alone.result() == (True, "Not sent to alpha: the broker refused it: not authorized")
    alone.begin("ask", to="alpha", text="x", wait_seconds=3)
    question = hive.Envelope.check(Alone.made[-1].asked[0]["envelope"])
    Alone.says.append({"answer": question.reply("alpha", "exit 1", ch="alert").document()})
    alone.advance(0.3)
    failed, text = alone.result()
    assert failed and '"exit 1"' in text


def test_without_a_daemon_a_fault_closes_what_was_opened(
    alone: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Alone, request: object) -> dict[str, Any]:
        raise hive.BrokerError("no broker")

    monkeypatch.setattr(Alone, "ask", refuse)
    assert alone.refused("ask", to="alpha", text="x") == "no broker"
    assert [one.closed for one in Alone.made] == [1]


def test_without_a_daemon_all_are_listed(alone: Session) -> None:
    lines = alone.tool("list_agents").splitlines()
    assert lines[0] == "No daemon runs here: others cannot write to you."
    assert lines[1:] == ["alpha: online; agents b"]
    assert [one.closed for one in Alone.made] == [1, 1]


def test_without_a_daemon_its_journal_is_read(
    alone: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Mapping[str, Any]] = []

    def look_up(config: hive.Config, request: Mapping[str, Any]) -> dict[str, Any]:
        asked.append(request)
        return {"rows": []}

    monkeypatch.setattr(hive, "look_up", look_up)
    assert "abc: no such message here" in alone.refused("show_exchange", id="abc")
    assert asked == [{"do": "exchange", "id": "abc"}]


# -- the tools, as models are told of them --

WAIT = (0, 280, 45)
ARGUMENTS: dict[str, dict[str, Any]] = {  # !: required; a number: from, to, default
    "list_agents": {},
    "send_message": {"to!": "string", "text!": "string", "urgent": "boolean"},
    "ask": {"to!": "string", "text!": "string", "action": "string", "wait_seconds": WAIT},
    "wait_answer": {"id!": "string", "wait_seconds": WAIT},
    "read_inbox": {"wait_seconds": (0, 280, 0), "limit": (1, 50, 10)},
    "reply": {"id!": "string", "text!": "string", "failed": "boolean"},
    "show_exchange": {"id!": "string"},
}


def listed(session: Session) -> dict[str, Any]:
    session.say(request("list", "tools/list"))
    (answer,) = session.lines()
    return {one["name"]: one for one in answer["result"]["tools"]}


def test_each_tool_takes_what_models_are_told(ada: Session) -> None:
    documents = listed(ada)
    for name, expected in ARGUMENTS.items():
        document = documents[name]
        schema = document["inputSchema"]
        assert schema["type"] == "object" and schema["additionalProperties"] is False
        needed = schema.get("required", [])
        assert ("required" in schema) == any("!" in one for one in expected)
        said: dict[str, Any] = {}
        for key, one in schema["properties"].items():
            if one["type"] == "integer":
                default = int(one["description"].removeprefix("default "))
                value: Any = (one["minimum"], one["maximum"], default)
                assert hive.TOOLS[name].arguments[key].default == default
            else:
                value = one["type"]
            said[f"{key}!" if key in needed else key] = value
        assert said == expected, name
        assert (document["name"], document["title"]) == (name, hive.TOOLS[name].title)
    defaults = {"urgent": True, "failed": False}
    for name, key in (("send_message", "urgent"), ("reply", "failed")):
        assert hive.TOOLS[name].arguments[key].default is defaults[key]


def test_which_tools_only_look(ada: Session) -> None:
    hints = {name: one["annotations"] for name, one in listed(ada).items()}
    quiet = {"readOnlyHint": True, "openWorldHint": False}
    looking = {name for name, one in hints.items() if one == quiet}
    assert looking == {"list_agents", "wait_answer", "show_exchange"}


# -- the server --


def put_tool(monkeypatch: pytest.MonkeyPatch, wait: hive.Wait | hive.Outcome) -> None:
    monkeypatch.setitem(hive.TOOLS, "try", hive.Tool(lambda *_: wait, "Try", "for this test"))


NEVER = hive.Wait(45.0, lambda: None, lambda: hive.Outcome("in vain"), "nothing yet")


def test_thirty_two_calls_wait_at_most(ada: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    put_tool(monkeypatch, NEVER)
    for _ in range(31):
        ada.begin("try")
    ada.begin("try")
    assert ada.lines() == []
    assert ada.refused("try") == "32 calls wait already; let some of them end first"


def test_a_client_is_heard_as_long_as_it_leaves_no_more_than_a_mebibyte(
    ada: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = b"x" * 1_000_000
    while (left := 1024 * 1024 - len(ada.server.output)) > 0:
        ada.server.output += full[:left]
    with monkeypatch.context() as patch:
        patch.setattr(ada.server, "_flush", lambda events=0: None)
        ada.say({"jsonrpc": "2.0", "method": "x"})
        assert not ada.server._deaf
        ada.server.output += b"x"
        ada.say({"jsonrpc": "2.0", "method": "x"})
        assert ada.server._deaf
    ada.server.output.clear()
    ada.server._flush()
    assert not ada.server._deaf
    ada.say(request(1, "ping"))
    assert ada.lines() == [{"jsonrpc": "2.0", "id": 1, "result": {}}]


def test_what_the_daemon_says_while_it_is_asked_about_news_is_heard(ada: Session) -> None:
    peer(ada.rig, "alpha", agents=["bob"])
    ada.rig.wire.silent = True
    ada.begin("send_message", to="bob", text="x")
    ada.begin("read_inbox", wait_seconds=60)
    assert ada.lines() == []
    door = ada.doors[-1]
    ask = door.ask

    def meanwhile(request: Mapping[str, object]) -> dict[str, Any]:
        ada.rig.wire.silent = False
        answer = ask(request)
        ada.rig.turn()
        door.drain()
        return answer

    door.ask = meanwhile  # type: ignore[method-assign]
    ada.server._on_news()
    ada.turn()
    assert ada.result()[1].startswith("Sent to bob")


def test_only_the_protocol_is_written_to_its_output(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rig: Rig
) -> None:
    given = list[tuple[Any, ...]]()

    def run() -> None:
        os.write(given[0][2], b"protocol")
        os.write(1, b"stray")

    server = noting(given, lambda *_: SimpleNamespace(run=run))
    monkeypatch.setattr(hive, "McpServer", server)
    monkeypatch.setattr(hive, "resolve_config", lambda *said: said)
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    kept = os.dup(1)
    try:
        assert hive.serve_session("ada", "my.toml", {"node.id": "x"}) == 0
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        now = [signal.signal(*one) for one in zip(numbers, before, strict=True)]
    assert capfd.readouterr() == ("protocol", "stray") and {*now} == {signal.SIG_DFL}
    _, stdin, stdout, configure, name = given[0]
    assert (stdin, name, configure()) == (0, "ada", ("my.toml", {"node.id": "x"}))
    os.close(stdout)


class Stops:
    """When the loop was told to end."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = list[float]()
        stop = lambda: self.times.append(session.rig.clock())  # noqa: E731
        monkeypatch.setattr(session.loop, "stop", stop)


def fill(session: Session) -> None:
    """Let the client's pipe take nothing more."""
    os.set_blocking(session.files[3], False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(session.files[3], b"x" * 65536)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(session.files[3], b"x")


def test_the_end_of_its_input_is_the_end_at_once_where_nothing_is_left_to_say(
    ada: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = list[int]()
    put_tool(monkeypatch, NEVER.replace(close=lambda: closed.append(1)))
    ada.begin("try")
    stops, now = Stops(ada, monkeypatch), ada.rig.clock()
    os.close(ada.to_server)
    ada.turn()
    assert stops.times and stops.times[0] == now and closed == [1]


def test_its_last_answers_have_a_second_to_be_read(
    ada: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops, now = Stops(ada, monkeypatch), ada.rig.clock()
    fill(ada)
    ada.say(request(1, "ping"))
    os.close(ada.to_server)
    ada.turn()
    ada.doze(0.9)
    assert stops.times == []
    ada.doze(0.2)
    assert stops.times == [now + 1.0]
    with contextlib.suppress(BlockingIOError):
        while os.read(ada.from_server, 65536):
            pass
    ada.turn()
    assert len(stops.times) == 2  # they were read: that is the end too
    assert not ada.server.output


def test_a_client_that_has_gone_is_the_end(ada: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = Stops(ada, monkeypatch)
    os.close(ada.from_server)
    ada.say(request(1, "ping"))
    assert stops.times and not ada.server.output


def test_an_input_that_breaks_is_its_end(ada: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: int, size: int) -> bytes:
        raise OSError("broken")

    stops = Stops(ada, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", broken)
        ada.server._read()
    ada.turn()
    assert stops.times


def test_messages_are_read_once_the_client_has_taken_their_last_byte(ada: Session) -> None:
    ada.tool("list_agents")
    says(ada.rig, "one")
    fill(ada)
    ada.begin("read_inbox")
    assert ada.rig.journal.unread("ada") == 1
    ada.begin("read_inbox")  # and it is not handed out twice
    os.read(ada.from_server, 65536)
    while ada.server.output:
        assert ada.rig.journal.unread("ada") == 1
        ada.turn()
        with contextlib.suppress(BlockingIOError):
            os.read(ada.from_server, 65536)
    assert ada.rig.journal.unread("ada") == 0


def test_what_was_read_while_no_daemon_ran_is_marked_by_the_next(ada: Session) -> None:
    ada.tool("list_agents")
    says(ada.rig, "one")
    fill(ada)
    ada.begin("read_inbox")
    ada.doors[-1].end()
    ada.turn()
    ada.doors[-1].close()
    ada.rig.turn()
    with contextlib.suppress(BlockingIOError):
        while os.read(ada.from_server, 65536):
            pass
    ada.turn()
    assert not ada.server.output and ada.rig.journal.unread("ada") == 1
    assert '"one"' in str(ada.lines())
    assert ada.tool("read_inbox") == "Nothing new in your inbox."
    assert ada.rig.journal.unread("ada") == 0 and not any(ada.server._unmarked.values())


def test_who_the_client_is_stands_in_its_first_word(session_of: Callable[..., Session]) -> None:
    meta = {
        f"{hive.MCP_META}protocolVersion": "2026-07-28",
        f"{hive.MCP_META}clientCapabilities": {},
        f"{hive.MCP_META}clientInfo": {"name": "x" * 50, "version": "1\n2"},
    }
    session = session_of("")
    session.say(request(1, "tools/list", _meta=meta))
    (one,) = session.lines()
    assert one["result"]["_meta"] == {f"{hive.MCP_META}serverInfo": hive.SERVER_INFO}
    assert (one["result"]["ttlMs"], one["result"]["cacheScope"]) == (0, "private")
    assert session.server.link.client == "x" * 39 + "… 1?2"
    session.say(request(2, "initialize", **{**HELLO, "clientInfo": {"name": "other"}}))
    assert session.server.link.client.startswith("xxx")  # it is who it was
    nameless = session_of("")
    nameless.say(request(1, "initialize", **{**HELLO, "clientInfo": {"name": "", "version": "2"}}))
    assert nameless.server.link.client == "2"
    after = request(2, "tools/list", _meta={**meta, f"{hive.MCP_META}protocolVersion": "odd"})
    nameless.say(after)  # who has shaken hands may say what it likes
    assert "resultType" not in nameless.lines()[-1]["result"]


def test_an_unsupported_version_is_shown_cut(ada: Session) -> None:
    meta = {f"{hive.MCP_META}protocolVersion": "v" * 99, f"{hive.MCP_META}clientCapabilities": {}}
    ada.say(request(1, "tools/list", _meta=meta))
    (one,) = ada.lines()
    assert one["error"]["data"]["requested"] == "v" * 60


def test_a_tool_that_is_misspelt_is_named_with_the_nearest(ada: Session) -> None:
    ada.say(request(1, "tools/call", name="read_inbx"), request(2, "tools/call", name="zzzzzzzz"))
    first, second = (one["error"]["message"] for one in ada.lines())
    assert first == "no such tool: 'read_inbx'; did you mean read_inbox?"
    assert second == f"no such tool: 'zzzzzzzz'; there are {', '.join(hive.TOOLS)}"
    ada.say(request(3, "tools/call", name="list_agents", arguments=None))
    assert "result" in ada.lines()[0]  # no arguments are none


def test_a_call_looks_at_each_news_and_at_no_other_time(
    ada: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = list[tuple[()]]()
    ada.tool("list_agents")
    put_tool(monkeypatch, NEVER.replace(look=noting(looks, lambda: None)))
    ada.say(call("try", "try", {"threadId": "t"}))
    assert ada.server.meta == {"threadId": "t"}
    ada.doze(30)
    assert len(looks) == 1
    says(ada.rig, "news")
    ada.turn()
    assert len(looks) == 2


def test_a_handshake_is_one_whatever_its_meta_says(ada: Session) -> None:
    meta = {f"{hive.MCP_META}protocolVersion": "odd"}
    ada.say(request(1, "initialize", **HELLO, _meta=meta))
    (one,) = ada.lines()
    assert one["result"]["protocolVersion"] == "2025-11-25" and "ttlMs" not in one["result"]


def test_a_daemon_that_was_not_there_is_looked_for_again_after_two_seconds(ada: Session) -> None:
    ada.runs = False
    for pause in (1.9, 0.1, 1.9):
        assert ada.server.link.attach() is False
        ada.rig.clock.now += pause
    assert len(ada.tries) == 2


def test_a_call_is_over_when_its_look_finds_something_at_its_deadline(
    ada: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list[hive.Outcome]()
    put_tool(monkeypatch, NEVER.replace(look=lambda: found[0] if found else None))
    ada.begin("try")
    found.append(hive.Outcome("there", failed=True))
    ada.doze(45)
    assert ada.result() == (True, "there")


def test_a_call_that_finds_no_daemon_goes_on_waiting(
    ada: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look() -> hive.Outcome | None:
        raise hive.DaemonError("gone")

    ada.tool("list_agents")
    put_tool(monkeypatch, NEVER.replace(look=look))
    ada.begin("try")
    assert ada.lines() == []
    ada.doze(45)
    assert ada.result() == (True, "gone")  # at the deadline it is told


def test_progress_is_told_only_to_who_reads(ada: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    put_tool(monkeypatch, NEVER)
    ada.say(call(1, "try", {"progressToken": 7}), call(2, "try", {"progressToken": [1]}))
    assert ada.lines() == []
    ada.doze(5)
    (one,) = ada.lines()
    params = {"progressToken": 7, "progress": 5, "total": 45, "message": "nothing yet"}
    assert one["method"] == "notifications/progress" and one["params"] == params
    ada.server.output += b"\n"
    ada.doze(5)
    assert ada.server.output == b"\n"
    ada.server.output.clear()
    ada.doze(40)
    assert [line["id"] for line in ada.lines() if "id" in line] == [1, 2]
    ada.doze(60)
    assert ada.lines() == []


# -- pushed into the program --


class Ways:
    """Ways to push, which take what they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pushed = list[tuple[str, str]]()
        self.takes: dict[str, Any] = {"first": True, "second": True}
        monkeypatch.setattr(hive, "PUSHES", {"none": lambda server: None})
        for name in self.takes:
            hive.PUSHES[name] = partial(self.offer, name)

    def offer(self, name: str, server: object) -> Callable[[str], bool]:
        return partial(self.push, name)

    def push(self, name: str, text: str) -> bool:
        self.pushed.append((name, text))
        if isinstance(self.takes[name], Exception):
            raise self.takes[name]
        return bool(self.takes[name])


@pytest.fixture
def ways(ada: Session, monkeypatch: pytest.MonkeyPatch) -> Ways:
    def at_once(call: Callable[[], bool], done: Callable[[bool], None]) -> None:
        ada.loop.after(0, lambda: done(call()))

    monkeypatch.setattr(ada.server, "_in_thread", at_once)
    return Ways(monkeypatch)


def told(ada: Session) -> list[str]:
    """The messages that the daemon knows to be told."""
    ada.rig.turn()
    marks = [one for one in ada.doors[-1].asked if one["do"] == "mark"]
    return [one["as"] for one in marks]


def test_new_mail_is_pushed_once_and_what_comes_meanwhile_goes_together(
    ada: Session, ways: Ways
) -> None:
    ada.tool("list_agents")
    says(ada.rig, "one")
    ada.turn()
    ((way, text),) = ways.pushed
    assert (
        way == "first" and text.startswith("[hive] command from alpha to ada") and '"one"' in text
    )
    assert told(ada) == ["told"]
    says(ada.rig, "two")
    says(ada.rig, "three")
    ada.doze(0.9)
    assert len(ways.pushed) == 1
    ada.doze(0.2)
    assert len(ways.pushed) == 2
    assert '"two"' in ways.pushed[1][1] and '"three"' in ways.pushed[1][1]
    assert '"one"' not in ways.pushed[1][1]
    assert ada.tool("read_inbox") == "Nothing new in your inbox."


def test_what_can_wait_is_pushed_only_beside_what_cannot(ada: Session, ways: Ways) -> None:
    ada.tool("list_agents")
    says(ada.rig, "whenever", urgency="later")
    ada.doze(60)
    assert ways.pushed == []
    says(ada.rig, "now")
    ada.turn()
    assert '"whenever"' in ways.pushed[0][1] and '"now"' in ways.pushed[0][1]


@pytest.mark.parametrize("fault", [False, OSError("x"), KeyError("x"), TypeError(), ValueError()])
def test_the_next_way_is_tried_and_all_again_after_half_a_minute(
    ada: Session, ways: Ways, fault: Any
) -> None:
    ada.tool("list_agents")
    ways.takes |= {"first": fault}
    says(ada.rig, "one")
    ada.turn()
    assert [way for way, _ in ways.pushed] == ["first", "second"]
    assert told(ada) == ["told"]
    ways.takes |= {"second": fault}
    ada.doze(1.5)
    del ways.pushed[:]
    says(ada.rig, "two")
    ada.turn()
    assert [way for way, _ in ways.pushed] == ["first", "second"]
    assert told(ada) == ["told"]
    ada.doze(29)
    assert len(ways.pushed) == 2
    ada.doze(1.5)
    assert len(ways.pushed) == 4
    assert '"two"' in ada.tool("read_inbox")  # meanwhile the model may read it


def test_who_tells_a_session_just_now_is_waited_for(ada: Session, ways: Ways) -> None:
    ada.tool("list_agents")
    lock = hive.telling_lock(ada.rig.config, "ada")
    assert lock and hive.telling_lock(ada.rig.config, "ada") is None
    assert hive.telling_lock(ada.rig.config, "other")  # each has its own
    says(ada.rig, "one")
    ada.doze(3)
    assert ways.pushed == []
    lock.close()
    ada.doze(1.1)
    assert len(ways.pushed) == 1 and told(ada) == ["told"]
    again = hive.telling_lock(ada.rig.config, "ada")
    assert again
    again.close()


def test_nothing_is_pushed_where_there_is_no_way_or_no_daemon(
    ada: Session, ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada.server._on_news()
    assert ways.pushed == [] and not ada.tries
    ada.tool("list_agents")
    monkeypatch.setattr(hive, "PUSHES", {"none": lambda server: None})
    says(ada.rig, "one")
    asked = len(ada.doors[-1].asked)
    ada.doze(3)
    assert len(ada.doors[-1].asked) == asked and '"one"' in ada.tool("read_inbox")


def test_a_way_that_waits_does_so_in_a_thread(ada: Session) -> None:
    taken = list[bool]()
    ada.server._in_thread(lambda: True, taken.append)
    until = time.monotonic() + 30
    while not taken and time.monotonic() < until:
        ada.turn()
    assert taken == [True]
    for thread in threading.enumerate():
        if thread.name == "push":
            thread.join(30)


def test_a_lock_that_cannot_be_had_tells_nothing(rig: Rig, tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("")
    config = rig.config.replace(node=rig.config.node.replace(state_dir=file))
    assert hive.telling_lock(config, "ada") is None


def test_an_answer_that_a_call_waits_for_hides_no_other_message() -> None:
    """It stands before it in the inbox, where one is asked for."""
    inbox = [{"task": n, "envelope": {"corr": corr}} for n, corr in ((1, "mine"), (2, None))]

    class Link:
        agent = "ada"

        def attach(self) -> bool:
            return True

        def ask(self, *, limit: int, **how: object) -> dict[str, Any]:
            return {"messages": inbox[:limit], "more": len(inbox[limit:])}

    link: Any = Link()
    assert hive.McpTools(link, lambda: {"mine"}).unclaimed(1) == (inbox[1:], 0)
    assert hive.McpTools(link, set[str]).unclaimed(1) == (inbox[:1], 1)
