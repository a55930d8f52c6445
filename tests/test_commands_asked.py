"""What commands ask of their daemon, for how long, and how each answer of it is told.

The daemon is a script here, and time a number: what real ones say is in test_commands.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from scripted import Answer, Commands, Pipe, Scripted

import hive
from hive import DaemonError, Envelope


@pytest.fixture
def alpha(commands: Commands) -> Commands:
    return commands


QUEUED = {"queued": True, "connected": True}
SENT = {"published": 0, "topic": "t/beta/command", "words": "Success"}


def told(envelope: Answer) -> Envelope:
    return Envelope.check(envelope["envelope"])


# -- send --


@pytest.mark.parametrize(
    ("line", "patience"),
    [("", 10.0), ("--wait 0.5", 2.0), ("--wait 2", 2.0), ("--wait 7", 7.0)],
)
def test_to_hand_a_message_over_may_take_what_was_said_and_ten_seconds_else(
    alpha: Commands, line: str, patience: float
) -> None:
    for how in ("", "--direct"):
        alpha.daemon(send=QUEUED)
        alpha.run(f"send --to beta --text x {line} {how}")
        assert alpha.opened.pop() == (patience, bool(how))


def test_what_is_known_of_a_message_is_told(alpha: Commands) -> None:
    daemon = alpha.daemon(send=QUEUED)
    daemon.lines.append(SENT)
    code, out, err = alpha.run("send --to beta --text x")
    envelope = told(daemon.asked[0])
    assert (code, out, err) == (0, f"sent {envelope.id} -> t/beta/command\n", "")
    assert (daemon.asked[0]["wait"], daemon.waits, daemon.closed) == (False, [2.0], 1)
    assert (envelope.sender, envelope.to, envelope.ch) == ("alpha", "beta", "command")

    code, out, err = alpha.run("send --to beta --text x")  # it says nothing more
    assert (code, err) == (0, "")
    assert out == f"queued {told(daemon.asked[1]).id}, the broker has not taken it yet\n"

    daemon = alpha.daemon(send={**QUEUED, "connected": False})
    code, out, err = alpha.run("send --to beta --text x")
    assert out == f"queued {told(daemon.asked[0]).id}, no broker at the moment\n"
    assert (code, err, daemon.waits) == (0, "", [])


def test_a_message_that_nobody_hears_is_told_of_and_its_topic_is_the_nodes(alpha: Commands) -> None:
    daemon = alpha.daemon(send={**QUEUED, "away": True, "agentless": True})
    daemon.lines.append({"published": 16})
    code, out, err = alpha.run("send --to beta --text x --ch status")
    assert (code, out) == (0, f"sent {told(daemon.asked[0]).id} -> hive/beta/status\n")
    assert err.splitlines() == [
        "hive: beta is away: its node keeps the message for it",
        "hive: nobody listens on hive/beta/status; who is there: hive status",
        "hive: beta has no agent: it will refuse a message without --action",
    ]


@pytest.mark.parametrize("line", ["", "--wait 3"])
def test_a_broker_that_refuses_a_message_is_exit_3(alpha: Commands, line: str) -> None:
    daemon = alpha.daemon(send=QUEUED)
    daemon.lines.append({"published": 0x87, "words": "Not Authorized"})
    code, out, err = alpha.run(f"send --to beta --text x {line}")
    assert (code, out, daemon.closed) == (3, "", 1)
    assert err.startswith("hive: broker localhost:1883: refused to publish: not authorized")


def test_a_message_asks_what_becomes_of_it_where_an_agent_shall_read_it(alpha: Commands) -> None:
    daemon = alpha.daemon(send=QUEUED, targets={"names": ["beta"], "away": {}, "complete": True})
    for line, asks in (
        ("--to beta", True),
        ("--to any", True),
        ("--to beta --ch sync", True),
        ("--to beta --action ping", False),
        ("--to all", False),
        ("--to beta --ch status", False),
    ):
        daemon.asked.clear()
        alpha.run(f"send {line} --text x")
        document = daemon.asked[-1]["envelope"]
        assert document.get(hive.RECEIPTS, False) == asks, line


def test_every_option_ends_up_in_the_envelope(alpha: Commands) -> None:
    daemon = alpha.daemon(send=QUEUED, log={"rows": []})
    line = "--ch sync --text y --action a-1 --urgency later --ttl 60 --corr c-1 --json"
    code, out, err = alpha.run(f"send --to all {line}")
    envelope = told(daemon.asked[-1])
    assert (code, err, json.loads(out)) == (0, "", envelope.document())
    assert (envelope.ch, envelope.text, envelope.to, envelope.sender) == (
        *("sync", "y"),
        *("all", "alpha"),
    )
    assert (envelope.action, envelope.urgency, envelope.ttl, envelope.corr) == (
        *("a-1", "later"),
        *(60, "c-1"),
    )


def test_a_text_that_ends_beyond_its_bound_is_not_cut(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def text(data: bytes) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return hive.read_text("-")

    most = 256 * 1024
    assert text(b"x" * most + b"\n") == "x" * most and text(b"a\n\n") == "a\n"
    assert len(text(b"x" * most + b"\nx")) > most  # the envelope refuses it
    with pytest.raises(hive.UsageError, match=f"not UTF-8 at byte {most - 1}"):
        text(b"x" * (most - 1) + b"\xff")
    with pytest.raises(hive.UsageError, match="more than 256 KiB"):
        text(b"x" * most + b"\xff")


@pytest.mark.parametrize(
    ("ch", "as_json", "stream"),
    [("response", True, "stdout"), ("response", False, "stdout"), ("alert", False, "stderr")],
)
def test_an_answer_is_there_for_a_reader_as_soon_as_it_has_come(
    ch: str, as_json: bool, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = Pipe()
    monkeypatch.setattr(sys, stream, pipe.stream())
    hive.write_answer(Envelope.new("beta", "alpha", ch, "here"), as_json, label=False)
    assert b"here" in pipe.seen


def test_an_answer_that_is_only_its_name_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    hive.write_answer(Envelope.new("beta", "alpha", "response", "beta: "), False, label=True)
    assert capsys.readouterr().out == "beta: \n"


# -- and waiting for answers --


def test_an_answer_is_printed_and_ends_the_wait(alpha: Commands) -> None:
    def answer(request: Answer) -> Answer:
        question = Envelope.check(request["envelope"])
        daemon.lines.append(SENT)
        daemon.lines.append({"answer": Envelope.new("x", "alpha", "response", "no").document()})
        daemon.lines.append({"answer": question.reply("beta", "done").document()})
        return QUEUED

    daemon = alpha.daemon(send=answer)
    assert alpha.run("send --to beta --text x --wait 7") == (0, "done\n", "")
    assert daemon.waits == [7.0, 7.0, 7.0]
    assert daemon.asked[0]["wait"] is True and daemon.closed == 1


def states(**how: str) -> dict[str, Any]:
    """What a daemon knows of nodes; they were all seen a minute ago."""
    seen = 1771143500 + 1000 - 60
    return {
        "complete": True,
        "connected": True,
        "states": {name: {"status": one, "last_seen": seen} for name, one in how.items()},
    }


def test_no_answer_in_time_is_exit_4_and_says_what_is_known(alpha: Commands) -> None:
    daemon = alpha.daemon(send=QUEUED, states=states(beta="offline", betty="online"))
    code, out, err = alpha.run("send --to beta --text x --wait 7")
    assert (code, out, alpha.now[0]) == (4, "", 1007.0)
    assert err == "hive: no answer from beta in 7 s; beta is offline, seen 1m 7s ago\n"
    for name, near in (("bety", "did you mean betty?"), ("xyz", "is it spelled right?")):
        err = alpha.run(f"send --to {name} --text x --wait 1")[2]
        assert err.endswith(f"; no node or agent {name} has been seen, {near}\n")
    daemon.lines.append({"published": 16})
    code, _, err = alpha.run("send --to betty --text x --wait 9")
    why = "nobody listens on hive/betty/command; betty is stale, seen 1m 9s ago"
    assert (code, err) == (4, f"hive: {why}\n")


def test_who_waited_for_the_daemon_still_gets_a_second_for_the_answer(alpha: Commands) -> None:
    def late(request: Answer) -> Answer:
        alpha.now[0] += 7.0
        return QUEUED

    for line, within in (("7", 1.0), ("0.5", 0.5), ("7.25", 1.0), ("8.5", 1.5)):
        daemon = alpha.daemon(send=late)
        assert alpha.run(f"send --to beta --text x --wait {line}")[0] == 4
        assert daemon.waits == [within]


def test_all_who_are_online_are_waited_for(alpha: Commands) -> None:
    everyone = states(beta="online", gamma="online", delta="online", attic="offline")
    for one in everyone["states"].values():
        one |= {"last_seen": one["last_seen"] + 60, "interval": 600}

    def answer(request: Answer) -> Answer:
        question = Envelope.check(request["envelope"])
        daemon.lines.append({"published": 16})  # to all it says nothing
        for name, text, ch in (("beta", "one\ntwo", "response"), ("gamma", "no", "alert")):
            daemon.lines.append({"answer": question.reply(name, text, ch=ch).document()})
        return {**QUEUED, "connected": False}

    daemon = alpha.daemon(send=answer, states=everyone)
    code, out, err = alpha.run("send --to all --action x --text x --wait 3")
    assert (code, out) == (4, "beta: one\nbeta: two\n")
    queued, refused, silent = err.splitlines()
    assert queued == f"hive: queued {told(daemon.asked[0]).id}, no broker at the moment"
    assert (refused, silent) == ("gamma: no", "hive: no answer from delta in 3 s")
    assert [one["do"] for one in daemon.asked] == ["send", "states", "states"]

    everyone["states"] = {name: everyone["states"][name] for name in ("beta", "gamma")}
    daemon = alpha.daemon(send=answer, states=everyone)
    assert alpha.run("send --to all --action x --text x --wait 3")[0] == 1  # one refused


class Waiting:
    """What a terminal shows meanwhile."""

    said: list[str]

    def __init__(self, what: str) -> None:
        self.what = what

    def __setattr__(self, name: str, what: str) -> None:
        Waiting.said.append(what)

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *error: object) -> None:
        self.what = "over"

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        self.what = "hidden"
        yield
        self.what = "shown"


def test_a_terminal_shows_who_is_still_waited_for(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Waiting, "said", [], raising=False)
    monkeypatch.setattr(hive, "Progress", Waiting)
    everyone = states(b1="online", b2="online")
    for one in everyone["states"].values():
        one |= {"interval": 600}

    def answer(request: Answer) -> Answer:
        question = Envelope.check(request["envelope"])
        daemon.lines.append({"answer": question.reply("b1", "x").document()})
        return QUEUED

    daemon = alpha.daemon(send=answer, states=everyone)
    alpha.run("send --to all --action x --text x --wait 3")
    assert Waiting.said == [
        *("handing it over", "over", "waiting for b1, b2 (0 answered)", "hidden", "shown"),
        *("waiting for b2 (1 answered)", "over"),
    ]
    Waiting.said.clear()
    replying(alpha, {"b1": "ok", "b2": "ok"}, "b1", "b2", "b3")
    alpha.run("send --to b* --text x --wait 3 --parallel 1")
    shown = [one for one in Waiting.said if one.startswith("waiting")]
    assert shown == [f"waiting for {n} of 3" for n in (3, 2, 1)]
    assert Waiting.said.count("hidden") == 2


def test_a_daemon_that_ends_meanwhile_has_the_message(alpha: Commands) -> None:
    daemon = alpha.daemon(send=QUEUED)
    daemon.lines.append(DaemonError("the daemon of alpha: it has ended"))
    code, _, err = alpha.run("send --to beta --text x --wait 7")
    id = told(daemon.asked[0]).id
    assert (code, daemon.closed) == (1, 1)
    assert err == (
        f"hive: the daemon of alpha: it has ended; it has {id}, and tells the agent of the answer\n"
    )


# -- who is asked --


@pytest.mark.parametrize(
    ("line", "answer", "instead"),
    [
        ("send --to beta --text x", {"error": "no such request: 'send'"}, "sending directly"),
        ("send --to beta --text x", {}, "sending directly"),
        ("send --to any --text x", {}, "asking the broker instead"),
        ("status", {"error": "no such request: 'states'"}, "asking the broker instead"),
    ],
)
def test_a_daemon_of_another_version_is_passed_by(
    alpha: Commands, line: str, answer: Answer, instead: str
) -> None:
    config = hive.load_config(None, {"node.id": "alpha"})
    for took, left in ((2.0, 8.0), (9.5, 1.0)):

        def late(request: Answer, took: float = took) -> Answer:
            alpha.now[0] += took
            return answer

        daemon = alpha.daemon(send=late, targets=late, states=late)
        known = states(beta="online") | {"hive": hive.hive_of(config), "fault": None}
        node = alpha.bypass(
            send=QUEUED, targets={"names": ["beta"], "away": {}, "complete": True}, states=known
        )
        code, _, err = alpha.run(line)
        why = "it does not understand; is it of another version?"
        assert (code, daemon.closed) == (0, 1 + ("any" in line))  # that asks it twice
        assert err.startswith(f"hive: the daemon of alpha: {why}; {instead}\n")
        assert alpha.direct[0] == pytest.approx(left) and node.closed
        alpha.direct.clear()


def test_what_the_daemon_refuses_is_its_word_and_the_end(alpha: Commands) -> None:
    daemon = alpha.daemon(send={"error": "to: it is too much"})
    said = alpha.run("send --to beta --text x")
    assert said == (1, "", "hive: the daemon of alpha: to: it is too much\n")
    assert daemon.closed == 1


def test_what_makes_no_daemon_and_no_node_is_closed(alpha: Commands) -> None:
    def fails(request: Answer) -> Answer:
        raise hive.BrokerError("broker x: no")

    alpha.daemon(send={})
    node = alpha.bypass(send=fails)
    code, _, err = alpha.run("send --to beta --text x")
    assert (code, err.splitlines()[-1], node.closed) == (3, "hive: broker x: no", 1)


@pytest.mark.parametrize(("fault", "looks"), [("", 61), ("broker x: it is away", 1)])
def test_a_daemon_that_has_just_connected_has_three_seconds_to_hear_of_all(
    alpha: Commands, fault: str, looks: int
) -> None:
    daemon = Scripted(alpha.now, states={"complete": False, "fault": fault})
    said = hive.ask_members(daemon, {"do": "states"}, alpha.now[0] + 10)
    assert said["fault"] == fault
    assert abs(len(daemon.asked) - looks) <= 1 and alpha.now[0] <= 1003.1
    before = len(daemon.asked)
    hive.ask_members(daemon, {"do": "states"}, alpha.now[0] + 0.04)  # or less, where that was said
    assert len(daemon.asked) - before <= 2
    whole = {"complete": True}
    assert hive.ask_members(daemon, {"do": "x"}, alpha.now[0] + 10, whole) == whole


# -- to several --


def group(
    alpha: Commands, *names: str, away: Mapping[str, Any] | None = None, **how: Any
) -> Scripted:
    said = {"names": [*names], "away": dict(away or {}), "complete": True}
    return alpha.daemon(targets=said, **({"send": QUEUED} | how))


def test_each_of_a_group_gets_its_own_message(alpha: Commands) -> None:
    daemon = group(alpha, "b1", "b2", away={"b3": {"status": "offline", "age": 60.0}})
    daemon.lines.extend([{"published": 0, "topic": "t/b1"}, {"published": 0, "topic": "t/b2"}])
    code, out, err = alpha.run("send --to b* --text x")
    sent = [told(one) for one in daemon.asked[1:]]
    assert [one.to for one in sent] == ["b1", "b2"]
    assert out == f"sent {sent[0].id} -> t/b1\nsent {sent[1].id} -> t/b2\n"
    assert (code, err) == (0, "hive: not sent to b3: offline, seen 1m ago\n")
    assert sent[0].id != sent[1].id and daemon.closed == 2
    assert {one["wait"] for one in daemon.asked[1:]} == {False}
    assert alpha.opened == [(10.0, False)] * 2


def test_a_message_of_a_group_that_is_refused_ends_it(alpha: Commands) -> None:
    def refuse(request: Answer) -> Answer:
        return QUEUED if request["envelope"]["to"] == "b1" else {"error": "too many"}

    daemon = group(alpha, "b1", "b2", send=refuse)
    code, _, err = alpha.run("send --to b* --text x")
    assert (code, err, daemon.closed) == (1, "hive: not sent to b2: too many\n", 2)


def replying(
    alpha: Commands, words: Mapping[str, str], *names: str, connected: bool = True
) -> Scripted:
    """A group in which some answer: "!" is an alert, "-" nobody listens."""

    def answer(request: Answer) -> Answer:
        question = Envelope.check(request["envelope"])
        text = words.get(question.to, "")
        ch = "alert" if text.startswith("!") else "response"
        if text == "-":
            daemon.lines.append({"published": 16, "id": question.id})
        elif text:
            daemon.lines.append({"answer": question.reply(question.to, text, ch=ch).document()})
        return {**QUEUED, "connected": connected}

    daemon = group(alpha, *names, away={"gone": {"status": "offline"}}, send=answer)
    return daemon


def test_what_became_of_a_groups_messages_is_summed_up(alpha: Commands) -> None:
    daemon = replying(alpha, {"b1": "one\ntwo", "b2": "!no", "b3": "-"}, "b1", "b2", "b3", "b4")
    code, out, err = alpha.run("send --to b* --text x --wait 3")
    assert (code, out) == (1, "b1: one\nb1: two\n")
    assert err.splitlines() == [
        "b2: !no",
        "hive: 1 of 5 ok, 1 failed (b2), 2 silent (b3, b4), 1 away (gone)",
    ]
    assert daemon.waits[-1] == 3.0 and alpha.now[0] == 1003.0
    assert alpha.opened[-1] == (3.0, False)
    code, out, err = alpha.run("send --to b* --text x --wait 1 --json")
    assert (code, err, alpha.opened[-1]) == (1, "", (2.0, False))
    assert json.loads(out.splitlines()[-1]) == {
        "ok": ["b1"],
        "failed": ["b2"],
        "silent": ["b3", "b4"],
        "away": ["gone"],
        "unsent": [],
    }


@pytest.mark.parametrize(
    ("words", "away", "code"),
    [({"b1": "x"}, {}, 0), ({"b1": "!"}, {"c": {}}, 1), ({"b1": "x"}, {"c": {}}, 4), ({}, {}, 4)],
)
def test_a_group_is_well_where_all_have_answered(
    alpha: Commands, words: dict[str, str], away: dict[str, Any], code: int
) -> None:
    replies = hive.GroupReplies(1.0)
    for name, text in words.items():
        (replies.failed if text == "!" else replies.ok).append(name)
    if not words:
        replies.silent.append("b1")
    assert hive.say_replies(replies, away, False) == code


def test_so_many_are_asked_at_once_and_no_more_after_a_failure(alpha: Commands) -> None:
    names = [f"b{n}" for n in range(1, 8)]
    for line, sent in (
        ("--parallel 2 --fail-fast", 3),
        ("--fail-fast", 2),
        ("--parallel 3", 7),
        ("", 7),
    ):
        daemon = replying(alpha, dict.fromkeys(names, "ok") | {"b2": "!no"}, *names)
        code, _, err = alpha.run(f"send --to b* --text x --wait 3 {line}")
        assert (code, len(daemon.asked) - 1) == (1, sent), line
        summary = err.splitlines()[-1]
        left = names[sent:]
        unsent = f", {len(left)} unsent ({hive.and_more(left, 5)})" if left else ""
        assert summary == f"hive: {sent - 1} of 8 ok, 1 failed (b2), 1 away (gone){unsent}"
    daemon = replying(alpha, {"b1": "-"}, *names)  # and a silent one is a failure
    alpha.run("send --to b* --text x --wait 3 --fail-fast")
    assert len(daemon.asked) == 2


def test_where_the_broker_is_away_each_of_a_group_is_said_to_be_queued(alpha: Commands) -> None:
    daemon = replying(alpha, {"b1": "ok"}, "b1", connected=False)
    _, out, err = alpha.run("send --to b* --text x --wait 3")
    id = told(daemon.asked[1]).id
    assert err.splitlines()[0] == f"hive: queued {id} for b1, no broker at the moment"
    assert out == "b1: ok\n"


@pytest.mark.parametrize(
    ("line", "rest"), [("", "all were sent"), ("--parallel 1", "2 were not sent")]
)
def test_where_the_daemon_ends_it_is_said_what_was_not_sent(
    alpha: Commands, line: str, rest: str
) -> None:
    daemon = group(alpha, "b1", "b2", "b3")
    daemon.lines.append(DaemonError("the daemon of alpha: it has ended"))
    code, _, err = alpha.run(f"send --to b* --text x --wait 3 {line}")
    assert code == 1
    assert err == f"hive: the daemon of alpha: it has ended; {rest}; see: hive pending\n"


def test_who_interrupts_a_group_is_told_what_became_of_it(alpha: Commands) -> None:
    daemon = replying(alpha, {"b1": "ok"}, "b1", "b2", "b3")
    receive = daemon.receive

    def receives(within: float | None) -> Answer | None:
        if daemon.waits:
            raise KeyboardInterrupt
        return receive(within)

    daemon.receive = receives  # type: ignore[method-assign]
    code, _, err = alpha.run("send --to b* --text x --wait 3 --parallel 2")
    assert code == 130
    assert err == "hive: 1 of 4 ok, 2 silent (b2, b3), 1 away (gone)\n"


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("--to b* --parallel 2", "--parallel"),
        ("--to b* --fail-fast", "--fail-fast"),
        ("--to any --fail-fast --wait 1", "--fail-fast"),
        ("--to beta --parallel 2 --fail-fast --wait 1", "--parallel"),
    ],
)
def test_an_option_for_groups_needs_one_and_an_answer(
    alpha: Commands, line: str, flag: str
) -> None:
    said = alpha.run(f"send --text x {line}")
    assert said == (
        2,
        "",
        f"hive: {flag}: of use only with --wait, and to a tag or a pattern\n",
    )


# -- looking back --


def test_an_exchange_is_known_by_any_id_of_it(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log(request: Answer) -> Answer:
        return {"rows": [{"exchange": "e-1"}] if request["filters"]["corr"] == "m-1" else []}

    daemon = alpha.daemon(log=log, send=QUEUED)
    for said, meant in (("m-1", "e-1"), ("m-2", "m-2")):
        alpha.run(f"send --to beta --text x --corr {said}")
        assert told(daemon.asked[-1]).corr == meant
    assert daemon.asked[0] == {"do": "log", "filters": {"corr": "m-1"}, "last": 1}
    alpha.daemon(log={"error": "which one?"}, send=QUEUED)
    assert alpha.run("send --to beta --text x --corr m") == (2, "", "hive: --corr which one?\n")
    daemon = alpha.daemon(send=QUEUED)
    alpha.run("send --to beta --text x")
    assert told(daemon.asked[0]).corr is None

    def no_journal(*given: object) -> Answer:
        raise hive.HiveError("no daemon has run here yet")

    monkeypatch.setattr(hive, "ask_journal", no_journal)
    alpha.run("send --to beta --text x --corr m-1")
    assert told(daemon.asked[1]).corr == "m-1"


def test_a_message_is_answered_by_its_id_or_by_what_it_is(alpha: Commands) -> None:
    asked = Envelope.new("beta", "alpha", "command", "?", id="m-1")
    daemon = alpha.daemon(message={"envelope": asked.document()}, send=QUEUED)
    (alpha.home / "m-2").write_bytes(asked.replace(id="m-2").encode())
    for said, meant in (("m-1", "m-1"), ("m-2", "m-2"), (asked.encode().decode(), "m-1")):
        code, _, err = alpha.run("reply --text done --to-msg", said)
        answer = told(daemon.asked[-1])
        assert (code, err) == (0, "")
        assert (answer.to, answer.reply_to, answer.text) == ("beta", meant, "done")
    assert [one["do"] for one in daemon.asked] == ["message", "send", "send", "send"]
    alpha.daemon(message={"envelope": None})
    why = "hive: m-1: its text is kept no longer; see [journal] in hive.toml\n"
    assert alpha.run("reply --text done --to-msg m-1") == (1, "", why)


def row(n: int, **more: Any) -> Answer:
    return {
        "n": n,
        "time": 1771143500.0,
        "event": "did",
        "id": None,
        "ch": "command",
        "from": "beta",
        "to": "alpha",
        "action": None,
        "exchange": "e-1",
        "note": f"note {n}",
        "envelope": None,
    } | more


def pages(*sizes: int) -> Callable[[Answer], Answer]:
    """A journal that is handed out in pages."""
    left = [*sizes]

    def answer(request: Answer) -> Answer:
        first = request.get("after", 0)
        return {"rows": [row(first + 1 + i) for i in range(left.pop(0) if left else 0)]}

    return answer


def test_the_log_is_read_page_by_page(alpha: Commands) -> None:
    daemon = alpha.daemon(log=pages(2, 1))
    code, out, _ = alpha.run("log")
    assert code == 0
    assert [line[-6:] for line in out.splitlines()] == ["note 1", "note 2", "note 3"]
    first, *more = daemon.asked
    assert first == {"do": "log", "filters": {}, "last": 100}
    assert [(one["last"], one["after"]) for one in more] == [(0, 2), (0, 3)]
    assert daemon.closed == 3

    daemon = alpha.daemon(log=pages(1))
    line = "log --json --ch status --from b --to c --action d --corr e -n 7"
    assert json.loads(alpha.run(line)[1]) == row(1)
    filters = {"ch": "status", "from": "b", "to": "c", "action": "d", "corr": "e"}
    assert daemon.asked[0] == {"do": "log", "filters": filters, "last": 7}
    alpha.run("log --since 2m")
    since = 1771143500.0 + 1000 - 120
    assert daemon.asked[-1] == {"do": "log", "filters": {"since": since}, "last": 0}


def test_what_is_not_news_is_no_empty_line_of_the_log(alpha: Commands) -> None:
    receipt = row(1, event="in", note=f"{hive.RECEIPT_NOTE}told main")
    alpha.daemon(log=lambda request: {"rows": [] if "after" in request else [receipt, row(2)]})
    assert len(alpha.run("log")[1].splitlines()) == 1


def test_the_log_is_followed_with_what_comes(alpha: Commands) -> None:
    daemon = alpha.daemon(follow={"rows": [row(1)]})
    daemon.lines.extend([{"rows": [row(2)]}, None, {"error": "it is over"}])
    code, out, err = alpha.run("log -f --ch command")
    assert (code, err, daemon.closed) == (1, "hive: it is over\n", 1)
    assert [line[-6:] for line in out.splitlines()] == ["note 1", "note 2"]
    assert daemon.waits == [None, None, None]
    assert daemon.asked == [{"do": "follow", "filters": {"ch": "command"}, "last": 100}]
    alpha.daemon(follow={"error": "no"})
    assert alpha.run("log -f") == (1, "", "hive: no\n")


def test_a_row_that_is_followed_is_there_at_once(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, seen = Pipe(), list[bytes]()
    daemon = alpha.daemon(follow={"rows": [row(1)]})

    def receive(within: float | None) -> None:
        seen.append(pipe.seen)
        raise DaemonError("it has ended")

    daemon.receive = receive  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", pipe.stream())
    assert hive.main(["--node", "alpha", "log", "--follow"]) == 1
    assert b"note 1" in seen[0]


def test_an_exchange_is_shown_whole_or_not_known(alpha: Commands) -> None:
    daemon = alpha.daemon(exchange=pages(1, 1))
    code, out, _ = alpha.run("show e-1 --json")
    assert (code, json.loads(out)) == (0, [row(1), row(2)])
    assert out.startswith('[\n  {\n    "n": 1,')
    daemon = alpha.daemon(
        exchange=lambda said: {"rows": [] if "after" in said else [row(1, note="ü")]}
    )
    assert '"note": "ü"' in alpha.run("show e-1 --json")[1]
    alpha.daemon(log=lambda said: {"rows": [] if "after" in said else [row(1, note="ü")]})
    assert '"note": "ü"' in alpha.run("log --json")[1]
    daemon = alpha.daemon(exchange=pages(1, 1))
    alpha.run("show e-1 --json")
    assert daemon.asked[0] == {"do": "exchange", "id": "e-1"}
    alpha.daemon(exchange=pages(1))
    assert alpha.run("show e-1")[1].endswith(" did: note 1\n")
    alpha.daemon(exchange=pages(0))
    said = alpha.run("show e-1")
    assert said == (1, "", "hive: e-1: not known here; the last days are: hive log\n")
    alpha.daemon(exchange={"error": "e-1: which one?"})
    assert alpha.run("show e-1") == (1, "", "hive: e-1: which one?\n")


def test_what_is_pending_is_shown_as_a_table_or_whole(alpha: Commands) -> None:
    document = {"questions": [], "tasks": [], "outbox": [], "outbox_size": 3}
    daemon = alpha.daemon(pending=document)
    code, out, err = alpha.run("pending")
    assert (code, out, err) == (0, "and 3 more to be delivered\n", "")
    code, out, _ = alpha.run("pending --json")
    assert (code, json.loads(out)) == (0, document) and out.startswith('{\n  "questions')
    assert daemon.asked == [{"do": "pending"}] * 2 and daemon.closed == 2


# -- journals of several nodes --


class Journals:
    """Nodes whose journals are read: the daemon of alpha, which hands the questions on."""

    def __init__(self, commands: Commands, /, **nodes: Any) -> None:
        """Of each node its pages; or None, where it says nothing; or what it says."""
        self.pages = {name: deque(said or ()) for name, said in nodes.items()}
        self.seen = int(1771143500 + commands.now[0])
        self.states: dict[str, Answer] = {name: {"shares_journal": True} for name in nodes}
        self.connected = True
        self.daemon = commands.daemon(states=self._states, read_journal=self._read)

    def _states(self, request: Answer) -> Answer:
        how = {"status": "online", "last_seen": self.seen, "interval": 600, "instance": "1"}
        said = {name: how | state for name, state in self.states.items()}
        return {"complete": True, "connected": self.connected, "states": said}

    def _read(self, request: Answer) -> Answer:
        id = f"q-{len(self.daemon.asked)}"
        name = request["node"]
        if self.pages[name]:
            page = self.pages[name].popleft()
            ch, text = ("alert", page) if isinstance(page, str) else ("response", json.dumps(page))
            answer = Envelope.new(name, "alpha", ch, text).replace(reply_to=id)
            self.daemon.lines.append({"answer": answer.document()})
        return {"id": id}

    def asked(self, name: str) -> list[Answer]:
        return [one for one in self.daemon.asked if one.get("node") == name]


def page(*at: float, more: bool = False, first: int = 1) -> Answer:
    rows = [row(n, time=when) for n, when in enumerate(at, first)]
    return {"rows": rows, "after": rows[-1]["n"] if rows else 0, "more": more}


def shown(out: str) -> list[tuple[str, float]]:
    return [(one["node"], one["time"]) for one in map(json.loads, out.splitlines())]


def test_journals_are_one_log_in_the_order_of_their_clocks(alpha: Commands) -> None:
    one = [page(1.0, 4.0, more=True), page(6.0, first=3)]
    journals = Journals(alpha, beta=one, gamma=[page(2.0, 3.0, 5.0)])
    journals.states["main"] = {"daemon_node": "beta", "shares_journal": True}  # has none
    code, out, err = alpha.run("log --of all --json --ch command -n 9")
    assert (code, err) == (0, "")
    assert shown(out) == [
        ("beta", 1.0),
        *(("gamma", 2.0), ("gamma", 3.0), ("beta", 4.0), ("gamma", 5.0), ("beta", 6.0)),
    ]
    first, second = journals.asked("beta")
    assert (first["last"], first["hold"], first["filters"]) == (9, 0, {"ch": "command"})
    assert (second["last"], second["after"], second["hold"]) == (0, 2, 0)
    assert first["exchange"] == second["exchange"] and journals.daemon.closed == 1


def test_a_node_that_keeps_silent_is_given_up_after_ten_seconds(alpha: Commands) -> None:
    Journals(alpha, beta=None, gamma=[page(2.0)])
    code, out, err = alpha.run("log --of all --json")
    assert (code, err) == (0, "hive: beta: no answer in time\n")
    assert shown(out) == [("gamma", 2.0)] and 1010 <= alpha.now[0] <= 1012
    Journals(alpha, beta=None)
    assert alpha.run("log --of beta --json") == (4, "", "hive: beta: no answer in time\n")


def test_a_node_that_refuses_is_exit_1_unless_another_shows_its_journal(alpha: Commands) -> None:
    Journals(alpha, beta=["beta: read_journal refused: no"])
    said = alpha.run("log --of beta")
    assert said == (1, "", "hive: beta: read_journal refused: no\n")
    Journals(alpha, beta=["beta: no"], gamma=[page()])
    assert alpha.run("log --of all")[0] == 0


@pytest.mark.parametrize(
    ("state", "connected", "why"),
    [
        ({"status": "offline", "reason": "connection lost"}, True, "lost"),
        ({"status": "offline"}, False, "not reached without the broker"),
        ({"shares_journal": None}, True, "an older hive, which shows no journal"),
        ({"shares_journal": False}, True, "[journal] share names nobody"),
    ],
)
def test_why_a_node_need_not_be_asked_is_told(
    alpha: Commands, state: Answer, connected: bool, why: str
) -> None:
    journals = Journals(alpha, beta=None)
    journals.states["beta"] |= state
    journals.connected = connected
    assert alpha.run("log --of beta") == (4, "", f"hive: beta: {why}\n")
    assert not journals.asked("beta")
    mine = Journals(alpha, alpha=[page(1.0)])  # its own it can read all the same
    mine.states["alpha"] |= state
    mine.connected = connected
    assert alpha.run("log --of alpha")[0] == 0


def test_whose_journal_is_not_there_is_said(alpha: Commands) -> None:
    Journals(alpha, beta=[page(1.0)])
    said = alpha.run("log --of delta")
    assert said == (
        1,
        "",
        "hive: no node is called delta, or has it; who is there: hive roster\n",
    )


def test_a_tag_is_asked_of_the_daemon_and_those_who_are_away_are_named(alpha: Commands) -> None:
    journals = Journals(alpha, beta=[page(1.0)], gamma=None, delta=[page(1.0)])
    journals.states["gamma"] |= {"status": "offline"}
    targets = {"names": ["beta"], "away": {"gamma": {}}}
    journals.daemon._answers["targets"] = targets
    code, out, err = alpha.run("log --of tag:gpu --json")
    assert (code, err, shown(out)) == (0, "hive: gamma: stopped\n", [("beta", 1.0)])
    journals.daemon._answers["targets"] = {"error": "to: no"}
    said = alpha.run("log --of tag:gpu")
    assert said[::2] == (1, "hive: the daemon of alpha: to: no; is it of another version?\n")


def test_journals_are_followed_and_whoever_comes_later_shows_what_is_new(alpha: Commands) -> None:
    journals = Journals(alpha, beta=[page(1.0, more=True), page(2.0, first=2)])
    journals.pages["new"] = deque([page()])
    count = 0
    receive = journals.daemon.receive

    def receives(within: float | None) -> Answer | None:
        nonlocal count
        count += 1
        if count == 15:
            journals.states["new"] = {"shares_journal": True}
        if count == 35:
            raise DaemonError("it has ended")
        return receive(within)

    journals.daemon.receive = receives  # type: ignore[method-assign]
    code, out, err = alpha.run("log --of all -f --json -n 5")
    assert (code, shown(out)) == (1, [("beta", 1.0), ("beta", 2.0)])
    first, second, third, *_ = journals.asked("beta")
    assert (first["last"], first["hold"]) == (5, 0)
    assert (second["last"], second["hold"]) == (0, 0)
    assert third["hold"] == 60  # there is no more now
    new = journals.asked("new")[0]
    assert (new["last"], new["hold"]) == (0, 0) and new["filters"]["since"] >= 1771144500
    assert err == "hive: it has ended\n"  # a question that is held is not overdue
    looks = [one for one in journals.daemon.asked if one["do"] == "states"]
    assert abs(len(looks) - (alpha.now[0] - 1000) / 2) < 3  # every two seconds


@pytest.mark.parametrize("follow", ["", "--follow"])
def test_a_terminal_shows_that_journals_are_waited_for_but_not_that_they_are_followed(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch, follow: str
) -> None:
    monkeypatch.setattr(Waiting, "said", [], raising=False)
    monkeypatch.setattr(hive, "Progress", Waiting)
    journals = Journals(alpha, beta=[page(1.0)])
    journals.daemon.lines.extend([DaemonError("it has ended")] * bool(follow))
    alpha.run(f"log --of beta {follow}")
    assert Waiting.said[0] == "waiting for the journals"
    assert ("over" in Waiting.said) != bool(follow)


def test_a_row_of_a_journal_is_seen_to_be_one() -> None:
    whole = row(1, id="x", action="a", envelope={})
    assert hive.is_row(whole) and hive.is_row(whole | {"id": None, "action": None})
    assert hive.is_row(whole | {"time": 0}) and hive.is_row(whole | {"time": 253402300799})
    for key, wrong in {
        **dict.fromkeys(whole, 5.5),
        **{"time": -1, "n": "1"},
    }.items():
        assert not hive.is_row(whole | {key: wrong}), key
    assert not hive.is_row(whole | {"time": 253402300800}) and not hive.is_row("x")


@pytest.mark.parametrize(("after", "takes"), [(2**53, True), (2**53 + 2, False), (0, False)])
def test_how_far_a_journal_has_been_read_is_a_number_that_can_be(after: int, takes: bool) -> None:
    source = hive.JournalSource("beta", {"last": 5})
    said = json.dumps({"rows": [row(1)], "after": after})
    source.take(Envelope.new("beta", "alpha", "response", said))
    assert bool(source.rows) == takes != bool(source.why)


def test_what_a_journals_node_is_told_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    source = hive.JournalSource("beta", {"last": 5})
    source.see("1", "")
    source.see("1", "")
    source.asked = "q"
    source.see("1", "")  # as it was: the question stands
    assert source.asked == "q" and capsys.readouterr().err == ""
    for run, why, said in (
        ("1", "lost", "hive: beta: lost\n"),
        ("1", "lost", ""),
        ("2", "", "hive: beta: is back\n"),
        ("3", "", ""),  # it was asked before it had gone: again
        ("3", "\x1b" + "x" * 400, f"hive: beta: ?{'x' * 298}…\n"),
    ):
        source.asked = "q"
        source.see(run, why)
        assert capsys.readouterr().err == said
        assert source.asked == ("q" if said == "" and why else "")
