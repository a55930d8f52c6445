"""Agent, at its edges: a clock that stands still, and calls that end when the test says so."""

from __future__ import annotations

import errno
import io
import json
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, free_port
from rig import Clock
from test_agent import (
    CHAT,
    HOOK_TOKEN,
    LONGEST_ARGUMENT,
    TOKEN,
    WHOSE,
    Gateway,
    gateway_of,
    ids_of,
    pending,
    status,
)

import hive

__all__ = ["gateway_of"]  # a fixture
REQUEST = hive.GatewayRequest  # the real one


class Call:
    """A call that is under way: to a gateway, or of a program."""

    def __init__(self, via: str, done: Callable[..., None], call: hive.GatewayCall | None) -> None:
        self.via, self.end, self.call, self.stopped = via, done, call, False

    def stop(self) -> None:
        self.stopped = True


class Quiet:
    """An agent, whoever hears of it, and the calls that are made; nothing takes any time."""

    def __init__(self, **keys: Any) -> None:
        self.clock, self.log = Clock(), io.StringIO()
        self.loop = hive.Loop(hive.Log("debug", "json", self.log), self.clock)
        self.calls: list[Call] = []
        self.heard: list[str] = []
        self.reasons: list[str] = []
        self.replies: list[str | None] = []
        self.notes: list[str] = []  # of what is told, when its call begins
        instance = hive.InstanceConfig("main", **keys)
        children: Any = self
        self.agent = hive.Agent(self.loop, children, instance, self, WHOSE)

    def start(self, spec: hive.ProcessSpec, done: Callable[[hive.ProcessResult], None]) -> None:
        self.calls.append(Call("program", done, None))

    def request(
        self, loop: hive.Loop, call: hive.GatewayCall, done: Callable[[hive.WakeResult], None]
    ) -> Call:
        self.calls.append(Call("chat" if call.turn else "hook", done, call))
        return self.calls[-1]

    def agent_begins(self, group: Sequence[hive.PendingEvent]) -> None:
        self.heard.append(f"begins {ids_of(group)}")
        self.notes = [one.note for one in group]

    def agent_failed(self, group: Sequence[hive.PendingEvent]) -> None:
        self.heard.append(f"failed {ids_of(group)}")

    def agent_woken(
        self, agent: str, event: hive.PendingEvent, reply: str | None, forgettable: bool
    ) -> None:
        self.heard.append(f"told {event.envelope.id}")
        self.replies.append(reply)

    def agent_has_read(self, event: hive.PendingEvent) -> None:
        self.heard.append(f"read {event.envelope.id}")

    def agent_gave_up(self, agent: str, event: hive.PendingEvent, reason: str) -> None:
        self.heard.append(f"gave up {event.envelope.id}")
        self.reasons.append(reason)

    def wake(self, *ids: str, **how: Any) -> None:
        for id in ids:
            self.agent.wake(pending(id=id, **how))

    def end(self, why: str = "", **how: Any) -> None:
        """The last call ends so."""
        self.calls[-1].end(hive.WakeResult(why, **how))

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        for _ in range(3):
            self.loop.post(lambda: None)
            self.loop.step()

    def timers(self) -> list[float]:
        """In how many seconds something is due."""
        due = [timer.due for timer in self.loop._timers if timer.call]
        return sorted(round(at - self.clock.now, 6) for at in due)

    def logged(self, event: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.log.getvalue().splitlines()]
        return [row for row in rows if row["event"] == event]


Make = Callable[..., Quiet]


@pytest.fixture
def quiet_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Make an agent with these keys; it has a token for its gateway's hook."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    made: list[Quiet] = []

    def make(**keys: Any) -> Quiet:
        made.append(Quiet(**{"via": "hook", "hook_token": HOOK_TOKEN, **keys}))
        monkeypatch.setattr(hive, "GatewayRequest", made[-1].request)
        return made[-1]

    yield make
    for one in made:
        one.loop.close()
        assert not one.logged("bug")


@pytest.fixture
def quiet(quiet_of: Make) -> Quiet:
    return quiet_of()


@pytest.fixture
def auto(tmp_path: Path, quiet_of: Make) -> Quiet:
    """One whose gateway takes chats and hooks, on a port that is known."""
    (tmp_path / ".openclaw").mkdir()
    (tmp_path / ".openclaw" / "openclaw.json").write_text(CHAT % '{"enabled": true}')
    return quiet_of(via="auto", port=4711)


# What is promised in numbers


def test_the_numbers_are_those_of_the_documentation_and_of_other_programs() -> None:
    assert hive.OPENCLAW_PORT == 18789
    assert hive.FORGETTABLE == 15 * 60 and hive.FORGETTABLE_LATER == 2 * 30 * 60
    assert hive.MAX_BODY == 12 * 1024, "more of a text is read with hive show"
    assert hive.MAX_EVENT == LONGEST_ARGUMENT * 3 // 4, "a quarter is for all other arguments"
    assert hive.MAX_TURN == 4 * hive.MAX_PAYLOAD, "what a turn's tools print is in it"
    assert (hive.AGENT_DEADLINE, hive.HOOK_DEADLINE) == (60, 10)
    assert hive.AGENT_RETRY == (5, 300), "growing pauses"
    assert hive.MAX_AGENT_QUEUE == 200
    assert hive.MAX_BEGUN == 5


@pytest.mark.parametrize(("size", "whole"), [(12 * 1024, True), (12 * 1024 + 1, False)])
def test_a_text_is_told_whole_up_to_12_kib(size: int, whole: bool) -> None:
    body = hive.event_text(pending("x" * size)).split("\n")[1]
    assert (body == f'"{"x" * size}"') is whole
    assert ("hive show" in body) is not whole


def test_a_text_stays_readable() -> None:
    assert hive.one_line('ä "é"\n') == r'"ä \"é\"\n"'


@pytest.mark.parametrize(
    ("line", "sender", "place"),
    [
        ("", "a", 0),
        ("a", "b", 1),
        ("aab", "b", 3),
        ("aaab", "b", 4),  # never ahead of its own, though two of a's are
        ("aaaba", "b", 4),
        ("aaabba", "b", 5),
        ("aabbaa", "c", 1),
    ],
)
def test_who_has_left_in_the_middle_changes_no_ones_order(
    line: str, sender: str, place: int
) -> None:
    assert hive.fair_place(line, sender) == place


def test_the_tenth_alert_of_a_minute_need_not_wait_for_its_end() -> None:
    events = [(float(at), True) for at in range(100, 109)]
    assert hive.next_slot(events, 110, alert=True) == 108.5
    assert hive.next_slot([*events, (109.0, True)], 110, alert=True) == 165


def test_an_alert_that_is_the_second_turn_waits_no_longer_than_any() -> None:
    assert hive.next_slot([(100.0, True)], 100, alert=True) == 100.5
    assert hive.next_slot([(100.0, True)] * 4, 100, alert=True) == 100.5
    assert hive.next_slot([(100.0, True)] * 4, 100, alert=False) == 112


def test_what_came_with_a_turn_waits_for_no_other() -> None:
    later = [(5.0, False)] * (hive.MAX_LATER - 1)
    assert hive.next_later_slot([(5.0, True), *later], 10) == 10
    at_once = [(5.0, True), (5.0, False), *((6.0, False) for _ in later)]
    assert hive.next_later_slot(at_once, 10) == 10


# What a call means


@pytest.mark.parametrize(
    ("via", "said", "reply", "fault"),
    [
        ("gemini", '{"error": {"message": "no key"}, "response": "half"}', "", "no key"),
        ("gemini", '{"error": "x", "response": "done"}', "done", ""),
        ("claude", '{"is_error":false,"subtype":"error_x","result":"half"}', "", "half"),
        ("claude", '{"is_error":null,"subtype":"success","result":"half"}', "", "half"),
        ("claude", '{"is_error":false,"subtype":"success","result":7}', "", ""),
        (
            "codex",
            '{"item":{"type":"agent_message","text":"6 files"}}\n'
            '{"item":{"type":"reasoning","text":"why"}}\n'
            '{"type":"error","error":{"message":"on the way"}}\n'
            '{"type":"turn.completed"}',
            "6 files",
            "",
        ),
        ("codex", '{"type":"turn.failed","error":"x"}', "", hive.NO_JSON),
        ("codex", '{"item":{"type":"agent_message"}}\n{"type":"turn.completed"}', "", ""),
        ("opencode", '{"type":"error","error":"plain"}', "", "plain"),
        ("opencode", '{"type":"error","error":{"data":"x"}}', "", "{'data': 'x'}"),
        ("opencode", '{"type":"text","part":{"text":"half"}}', "half", hive.NO_JSON),
        ("agent", '{"status":"ok","result":{"payloads":[{"text":"a"},{"text":""}]}}', "a", ""),
        ("agent", '{"status":"ok","result":[]}', "", ""),
        ("agent", '{"result":{}}', "", hive.NO_JSON),
        ("chat", '{"choices":[{"message":[]}]}', "", hive.NO_JSON),
        ("chat", '{"choices":{"0":1}}', "", hive.NO_JSON),
    ],
)
def test_the_reply_is_what_the_turn_said_last(via: str, said: str, reply: str, fault: str) -> None:
    read = hive.WAKE_METHODS[via].read
    assert read and read(said) == (reply, fault)


@pytest.mark.parametrize(("noise", "found"), [(19, True), (20, False)])
def test_noise_of_twenty_lines_that_look_like_json_is_no_answer(noise: int, found: bool) -> None:
    said = "{ not JSON\n" * noise + '{"response": "x"}'
    assert bool(hive.last_object(said)) is found


def result(exit: int | None = 0, out: str = "", err: str = "", **how: Any) -> hive.ProcessResult:
    return hive.ProcessResult(exit, stdout=out.encode(), stderr=err.encode(), **how)


CODEX_SAID = '{"item":{"type":"agent_message","text":"6 files"}}\n{"type":"turn.%s"}'
ENDED_BADLY = '{"type":"turn.failed","error":{"message":"over quota\\nsince noon"}}'


@pytest.mark.parametrize(
    ("via", "ended", "expected"),
    [
        ("cli", result(out="whatever"), hive.WakeResult()),
        ("codex", result(out=CODEX_SAID % "completed"), hive.WakeResult(reply="6 files")),
        ("cli", result(3, err="x\ny"), hive.WakeResult("exit 3: x y")),
        ("codex", result(3, err="no login"), hive.WakeResult("exit 3: no login")),
        (  # it has begun, and may have done a part
            "codex",
            result(1, ENDED_BADLY, "x"),
            hive.WakeResult("over quota since noon", uncertain=True),
        ),
        (
            "cli",
            result(-15, deadline=60.0, timed_out=True),
            hive.WakeResult("took longer than 60 s and was ended", uncertain=True),
        ),
        (
            "codex",
            result(-15, deadline=9.0, timed_out=True),
            hive.WakeResult("took longer than 9 s and was ended", permanent=True, uncertain=True),
        ),
        (
            "codex",
            result(-15, cancelled=True),
            hive.WakeResult(
                "interrupted: the node was stopped; it may have done a part", uncertain=True
            ),
        ),
        (
            "cli",
            result(-15, cancelled=True),
            hive.WakeResult("interrupted: the node was stopped; it may have done a part"),
        ),
        ("codex", result(None, fault="no such file"), hive.WakeResult("codex: no such file")),
        ("cli", result(None, fault="no such file"), hive.WakeResult("openclaw: no such file")),
        (
            "codex",
            result(out=ENDED_BADLY.replace("\\n", " ")),
            hive.WakeResult("the turn ended with over quota since noon", permanent=True),
        ),
        (
            "codex",
            result(out=CODEX_SAID % "completed", truncated=True),
            hive.WakeResult("the turn ended with more than can be read", permanent=True),
        ),
        ("cli", result(out="x", truncated=True), hive.WakeResult()),
    ],
)
def test_what_the_end_of_a_program_means(
    via: str, ended: hive.ProcessResult, expected: hive.WakeResult
) -> None:
    assert hive.wake_result(via, hive.InstanceConfig("main", via=via), ended) == expected


def test_what_a_program_says_is_cut_where_it_fails_and_where_it_ends_badly() -> None:
    instance = hive.InstanceConfig("main", via="codex")
    failed = hive.wake_result("codex", instance, result(1, err="x" * 5000))
    assert failed.why == "exit 1: " + "x" * (300 - 8)
    badly = result(out=ENDED_BADLY.replace("over quota", "x" * 5000))
    assert hive.wake_result("codex", instance, badly).why == "the turn ended with " + "x" * 200
    long = (CODEX_SAID % "completed").replace("6 files", "x" * (hive.MAX_TEXT + 1))
    reply = hive.wake_result("codex", instance, result(out=long)).reply
    assert len(reply) == hive.MAX_TEXT and reply.endswith(hive.CUT)
    odd = (CODEX_SAID % "completed").encode().replace(b"6", b"\xff\\ud83d")
    found = hive.wake_result("codex", instance, hive.ProcessResult(0, stdout=odd))
    assert found.reply == "\ufffd\ufffd files"


@pytest.mark.parametrize(
    ("value", "hidden"), [("short", False), ("longer", True), ("", False), ("much longer", True)]
)
def test_what_is_long_enough_to_be_a_secret_is_hidden(
    monkeypatch: pytest.MonkeyPatch, value: str, hidden: bool
) -> None:
    monkeypatch.setenv("MY_KEY", value)
    instance = hive.InstanceConfig("main", token=TOKEN, hook_token=HOOK_TOKEN, env=("MY_KEY", "X"))
    said = hive.without_secrets(instance, f"<{value}> <{TOKEN}> <{HOOK_TOKEN}>")
    assert said == f"<{'***' if hidden else value}> <***> <***>"


def gateway_call(**how: Any) -> hive.GatewayCall:
    given: dict[str, Any] = {"missing": "not there", "deadline": 1.0, **how}
    return hive.GatewayCall("the call", "http://x/", "t", "key", {}, **given)


@pytest.mark.parametrize(
    ("turn", "status", "why", "uncertain"),
    [
        (True, 399, "the call answered 399", True),
        (True, 400, "the call answered 400", False),
        (True, 404, "the call answered 404 (not there)", False),
        (True, 499, "the call answered 499", False),
        (True, 500, "the call answered 500", True),
        (False, 500, "the call answered 500", False),
        (False, 201, "the call answered 201", False),
    ],
)
def test_what_a_gateway_answers_for_certain(
    turn: bool, status: int, why: str, uncertain: bool
) -> None:
    answer = json.dumps({"ok": True, "choices": [{"message": {"content": "6"}}]})
    found = gateway_call(turn=turn).result(status, answer)
    assert found == hive.WakeResult(why, uncertain=uncertain)


def test_the_reply_of_a_chat_fits_into_an_answer() -> None:
    long = json.dumps({"choices": [{"message": {"content": "\ud83d" + "x" * 300_000}}]})
    reply = gateway_call(turn=True).result(200, long).reply
    assert reply.startswith("\ufffdxxx") and reply.endswith(hive.CUT)
    assert len(reply.encode()) <= hive.MAX_TEXT


def test_a_gateway_is_asked_at_its_port_for_so_long_in_the_session_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    event = hive.SystemEvent("x", True, pending().envelope)
    keys: dict[str, Any] = {"hook_token": HOOK_TOKEN, "token": TOKEN, "agent_timeout": 7.0}
    instance = hive.InstanceConfig("main", session_key="agent:ops:x", agent="ops", **keys)
    hook, chat = (make(instance, 4711, event) for make in (hive.hook_call, hive.chat_call))
    assert (hook.url, hook.token, hook.deadline, hook.turn) == (
        *("http://127.0.0.1:4711/hooks/wake", HOOK_TOKEN, 10.0, False),
    )
    assert (chat.url, chat.token, chat.deadline, chat.turn) == (
        *("http://127.0.0.1:4711/v1/chat/completions", TOKEN, 7.0, True),
    )
    assert chat.headers == {"x-openclaw-session-key": "agent:ops:x"}
    assert chat.body["model"] == "openclaw/ops"
    nothing = hive.InstanceConfig("main")
    assert hive.hook_call(nothing, 1, event).token == hive.chat_call(nothing, 1, event).token == ""


@pytest.mark.parametrize(
    ("gateway", "port"),
    [
        ({"port": 1}, 1),
        ({"port": 65535}, 65535),
        ({"port": 65536}, None),
        ({"port": 0}, None),
        ({"port": 5, "mode": "local", "bind": "auto"}, 5),
    ],
)
def test_a_port_is_from_1_to_65535(tmp_path: Path, gateway: object, port: int | None) -> None:
    (tmp_path / ".openclaw").mkdir()
    (tmp_path / ".openclaw" / "openclaw.json").write_text(json.dumps({"gateway": gateway}))
    assert hive.gateway_port(hive.InstanceConfig("main"), tmp_path) == port


@pytest.mark.parametrize(
    ("said", "token"),
    [
        ({"auth": {"token": "t0"}}, "t0"),
        ({"auth": ["token"]}, None),
        ({"auth": {"token": 7}}, None),
        ({}, None),
    ],
)
def test_the_token_of_a_gateway(tmp_path: Path, said: object, token: str | None) -> None:
    (tmp_path / ".openclaw").mkdir()
    (tmp_path / ".openclaw" / "openclaw.json").write_text(json.dumps({"gateway": said}))
    assert hive.gateway_token(hive.InstanceConfig("main"), tmp_path) == token
    assert hive.gateway_token(hive.InstanceConfig("main", token=TOKEN), tmp_path) == TOKEN


@pytest.mark.parametrize(("size", "known"), [(hive.MAX_TEXT, True), (hive.MAX_TEXT + 1, False)])
def test_a_configuration_of_openclaw_is_read_up_to_256_kib(
    tmp_path: Path, size: int, known: bool
) -> None:
    (tmp_path / ".openclaw").mkdir()
    said = '{"gateway": {"port": 7}%s}'
    said %= " " * (size - len(said) + 2)
    (tmp_path / ".openclaw" / "openclaw.json").write_text(said)
    assert hive.gateway_port(hive.InstanceConfig("main"), tmp_path) == (7 if known else None)


# Calls


def test_an_agent_that_fails_and_is_back_begins_again_with_short_pauses(quiet: Quiet) -> None:
    quiet.wake("a")
    pauses = []
    for _ in range(9):
        quiet.end("down")
        pauses += quiet.timers()
        assert quiet.agent.next_try
        quiet.wait(pauses[-1] - 0.001)
        assert not quiet.agent.calling
        quiet.wait(0.001)
        assert quiet.agent.calling
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    quiet.end()
    assert quiet.agent.next_try is None and quiet.agent.turns == {"failed": 9, "ok": 1}
    quiet.wait(60)
    quiet.wake("b")
    quiet.end("down")
    assert quiet.timers() == [5]


def test_a_pause_is_shorter_by_chance(quiet: Quiet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: low)
    quiet.wake("a")
    quiet.end("down")
    assert quiet.timers() == [3.75]


def test_how_long_a_message_may_wait_is_the_moment_itself(quiet: Quiet) -> None:
    quiet.wake("first")
    quiet.wake("a", until=quiet.clock.now + 20)
    quiet.wake("b", until=quiet.clock.now + 20.01)
    quiet.clock.now += 20
    quiet.end()
    assert quiet.heard[2:] == ["gave up a"]
    quiet.wake("c")
    quiet.wait(0.5)
    assert quiet.heard == ["begins first", "told first", "gave up a", "gave up b", "begins c"]
    assert quiet.reasons == ["its time to live was over"] * 2


def test_an_event_that_may_have_been_told_is_told_again_however_often(quiet: Quiet) -> None:
    quiet.wake("a")
    for _ in range(2 * hive.MAX_BEGUN):
        quiet.end("no answer", uncertain=True)
        quiet.wait(300)
    assert quiet.agent.calling and "gave up a" not in quiet.heard
    assert quiet.notes == [hive.UNCERTAIN_NOTE]


def test_a_gateway_whose_port_is_not_known_is_looked_for_where_it_usually_is(quiet: Quiet) -> None:
    quiet.wake("a")
    call = quiet.calls[-1].call
    assert call and call.url == "http://127.0.0.1:18789/hooks/wake"


def test_of_what_can_wait_for_a_heartbeat_fifteen_are_told_in_half_an_hour(quiet: Quiet) -> None:
    for n in range(15):
        quiet.wake(f"m-{n}", now=False)
        quiet.end()
        quiet.wait(1)
    quiet.wake("one-more", now=False)
    assert not quiet.agent.calling and quiet.timers() == [1800 - 15]


def test_a_turn_that_may_have_begun_is_begun_five_times(quiet_of: Make) -> None:
    quiet = quiet_of(via="chat")
    quiet.wake("a")
    for _ in range(5):
        assert quiet.agent.calling and "gave up a" not in quiet.heard
        quiet.end("no answer", uncertain=True)
        quiet.wait(300)
    assert quiet.heard[-1] == "gave up a" and not quiet.agent.calling


def test_a_turn_that_would_do_harm_twice_is_had_by_no_other_method(auto: Quiet) -> None:
    auto.wake("a")
    auto.end("no answer in 300 s", permanent=True, uncertain=True)
    assert [call.via for call in auto.calls] == ["chat"] and auto.heard[-1] == "gave up a"


def test_a_node_that_stops_tries_no_other_method(auto: Quiet) -> None:
    auto.wake("a")
    auto.agent.stop()
    auto.end("the node was stopped", uncertain=True)
    assert [call.via for call in auto.calls] == ["chat"] and auto.heard[-1] == "failed a"


def test_the_methods_come_in_turn_until_one_has_told_it(auto: Quiet) -> None:
    auto.wake("a")
    auto.end("the first reason")
    auto.end("another")
    assert [call.via for call in auto.calls] == ["chat", "hook", "program"]
    auto.calls[-1].end(result(1, err="x"))
    auto.calls[-1].end(result(1, err="y"))
    assert len(auto.calls) == 4 and auto.heard == ["begins a", "failed a"]
    assert auto.agent.reason == "the first reason"
    assert [one["why"] for one in auto.logged("agent is down, trying again")] == [
        "the first reason"
    ]


@pytest.mark.parametrize("method", ["hook", "chat", ""])
def test_a_gateway_that_took_events_last_is_not_asked_for_more_turns_than_it_runs(
    auto: Quiet, method: str
) -> None:
    """Though a chat is tried first, which needs no pause where it works."""
    auto.agent._method = method
    for at in range(5):
        auto.agent._events.append((auto.clock.now - at, True))
    auto.wake("a")
    assert auto.agent.calling is (method != "hook")


def test_a_call_takes_what_fits_into_it_to_the_byte(
    quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = hive.argument_size(pending(id="a"))
    for bound, groups in ((2 * one, "b c"), (2 * one - 1, "b")):
        monkeypatch.setattr(hive, "MAX_EVENT", bound)
        quiet.wake("a", "b", "c")
        quiet.end()
        quiet.wait(60)
        assert quiet.heard[-1] == f"begins {groups}"
        while quiet.agent.calling:
            quiet.end()
            quiet.wait(60)


def test_the_words_of_a_turn_are_the_answer_and_an_event_has_none(quiet_of: Make) -> None:
    for via, reply in (("hook", None), ("chat", "6 files")):
        quiet = quiet_of(via=via)
        quiet.wake("a")
        quiet.end(reply="6 files")
        assert quiet.replies == [reply]


# What a gateway may forget


def test_what_a_gateway_took_is_kept_in_mind_up_to_a_bound(
    quiet_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_AGENT_QUEUE", 2)
    quiet = quiet_of(port=4711)
    for id in "abc":
        quiet.agent.expect_read(pending(id=id), quiet.clock.now)
    assert quiet.heard == ["read a"]


def uptimes(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[float | None], None]]:
    """Its port is open, and how long it runs is said by the test."""
    asked: list[Callable[[float | None], None]] = []
    monkeypatch.setattr(hive, "probe_port", lambda loop, port, done: done(""))
    monkeypatch.setattr(hive, "ask_uptime", lambda loop, port, done: asked.append(done))
    return asked


@pytest.mark.parametrize(
    ("uptime", "waited", "now", "until", "heard"),
    [
        (20.0, 30.0, True, 1e9, []),  # it began when the call did
        (19.99, 30.0, True, 1e9, ["begins a b"]),
        (19.99, 30.0, True, 1030.0, ["gave up a", "gave up b"]),
        (19.99, 30.0, True, 1030.01, ["begins a b"]),
        (None, 30.0, True, 1e9, []),
        (None, 910.0, True, 1e9, []),
        (None, 910.01, True, 1e9, ["read a", "read b"]),
        (None, 910.01, False, 1e9, []),
        (None, 3610.0, False, 1e9, []),
        (None, 3610.01, False, 1e9, ["read a", "read b"]),
    ],
)
def test_what_was_taken_before_a_gateway_began_is_forgotten_and_after_a_while_read(
    quiet_of: Make,
    monkeypatch: pytest.MonkeyPatch,
    uptime: float | None,
    waited: float,
    now: bool,
    until: float,
    heard: list[str],
) -> None:
    """Two are told in a call that begins at 1010 and takes ten seconds."""
    asked = uptimes(monkeypatch)
    quiet = quiet_of(port=4711)
    quiet.clock.now = 1010.0
    first, second = (pending(id=id, now=now, until=until) for id in "ab")
    quiet.agent.wake(first)
    quiet.agent._waiting.append(second)
    quiet.agent._calling.append(quiet.agent._waiting.pop())
    quiet.clock.now = 1020.0
    quiet.end()
    before, quiet.clock.now = len(quiet.heard), 1000.0 + waited
    quiet.agent.probe()
    asked[0](uptime)
    assert quiet.heard[before:] == heard
    if heard == ["begins a b"]:
        assert quiet.notes == [hive.UNCERTAIN_NOTE] * 2
        (line,) = quiet.logged("agent's gateway has restarted, telling again")
        assert (line["agent"], line["n"]) == ("main", 2)


def test_a_node_that_stops_tells_nothing_again(
    quiet_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = uptimes(monkeypatch)
    quiet = quiet_of(port=4711)
    quiet.agent.expect_read(pending(id="a", until=0.0), quiet.clock.now)
    quiet.agent.probe()
    quiet.agent.probe()
    assert len(asked) == 1, "one question at a time"
    quiet.agent.stop()
    asked[0](0.0)
    assert quiet.heard == []


# Looks at its port


def test_a_port_is_looked_at_each_half_minute_and_each_two_seconds_while_messages_wait(
    quiet_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []
    why = ""

    def probe(loop: hive.Loop, port: int, done: Callable[[str], None]) -> None:
        looks.append(loop.clock())
        done(why)

    monkeypatch.setattr(hive, "probe_port", probe)
    quiet = quiet_of(port=4711)

    def seen(seconds: int) -> list[float]:
        """In which of the next seconds it looks."""
        looks.clear()
        began = quiet.clock.now
        for _ in range(2 * seconds):
            quiet.wait(0.5)
        return [at - began for at in looks]

    quiet.agent.probe()
    assert seen(65) == [30, 60]
    why = "refused"
    assert seen(30) == [25]
    quiet.wake("a")
    assert quiet.agent.next_try is None, "it waits for the port"
    assert seen(7) == [2, 4, 6]
    assert not quiet.calls
    why = ""
    seen(1)
    assert quiet.agent.calling, "at once, when it is open"
    monkeypatch.setattr(hive, "ask_uptime", lambda *_: None)
    quiet.end()
    assert seen(60) == [2, 32], "its gateway has it"
    why = "refused"
    assert seen(6) == [2, 4, 6], "the gateway may be on its way back, and have forgotten it"


def test_a_machine_without_files_to_open_looks_again(
    quiet_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(loop: hive.Loop, port: int, done: Callable[[str], None]) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(hive, "probe_port", probe)
    quiet = quiet_of(port=4711)
    quiet.agent.probe()
    assert quiet.agent.reason == "nothing listens on 127.0.0.1:4711: Too many open files"
    assert quiet.timers() == [30]


def test_a_look_that_is_answered_is_over(quiet: Quiet) -> None:
    answers: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        hive.probe_port(quiet.loop, server.getsockname()[1], answers.append)
        assert quiet.timers() == [3]
        while not answers:
            quiet.loop.step()
    assert quiet.timers() == [] and answers == [""]


def test_a_gateway_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hive, "PROBE_DEADLINE", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TimeoutError):
        hive.read_uptime(silent.getsockname()[1])


@pytest.mark.parametrize(
    ("body", "uptime"),
    [
        (b'{"uptimeMs": 1500}', 1.5),
        (b'{"uptimeMs": 0}', 0.0),
        (b'{"uptimeMs": -1}', None),
        (b'{"uptimeMs": "1"}', None),
        (b"<html>", None),
    ],
)
def test_how_long_a_gateway_runs(
    gateway_of: Callable[..., Gateway], body: bytes, uptime: float | None
) -> None:
    assert hive.read_uptime(gateway_of(status("200 OK", body)).port) == uptime


# What is sent over HTTP


def test_an_address_is_taken_as_it_is_written(
    quiet: Quiet, gateway_of: Callable[..., Gateway]
) -> None:
    gateway = gateway_of()
    ends: list[hive.WakeResult] = []
    call = gateway_call().replace(url=f"{gateway.url}/x?a=b&c#part")
    request = REQUEST(quiet.loop, call, ends.append)
    while not ends:
        quiet.loop.step()
    assert gateway.requests[0][0] == "POST /hooks/wake/x?a=b&c HTTP/1.1"
    assert ends == [hive.WakeResult()] and quiet.timers() == []
    request.stop()
    assert len(ends) == 1, "it is over"


def test_a_chat_that_nobody_has_heard_is_had_again_without_that_word(quiet_of: Make) -> None:
    quiet = quiet_of()
    ends: list[hive.WakeResult] = []
    call = gateway_call(turn=True).replace(url=f"http://127.0.0.1:{free_port()}/")
    REQUEST(quiet.loop, call, ends.append)
    while not ends:
        quiet.loop.step()
    assert ends == [hive.WakeResult("the call: Connection refused")]


def test_a_call_that_is_stopped_hangs_up(quiet: Quiet) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE)
        ends: list[hive.WakeResult] = []
        call = gateway_call().replace(url=f"http://127.0.0.1:{silent.getsockname()[1]}/")
        request = REQUEST(quiet.loop, call, ends.append)
        visitor, _ = silent.accept()
        with visitor:
            visitor.settimeout(PATIENCE)
            while not visitor.recv(65536).endswith(b"{}"):
                pass
            assert request._sock and request._sock.gettimeout() == 2.0, "in case nobody stops it"
            (thread,) = [one for one in threading.enumerate() if one.name == "the call"]
            assert thread.daemon, "no process waits for it"
            request.stop()
            assert visitor.recv(1) == b""
        thread.join(PATIENCE)
    assert ends == [hive.WakeResult("the call: the node was stopped", uncertain=True)]


def test_a_node_that_has_no_more_time_ends_the_call(quiet: Quiet) -> None:
    quiet.agent.end_call()
    quiet.wake("a")
    quiet.agent.end_call()
    assert quiet.calls[-1].stopped


def test_the_log_tells_of_an_agent_by_its_name(quiet: Quiet) -> None:
    quiet.wake("a")
    quiet.end("no answer")
    quiet.wait(5)
    quiet.end()
    quiet.wake("b", until=0.0)
    lines = [json.loads(line) for line in quiet.log.getvalue().splitlines()]
    told = [{k: v for k, v in row.items() if k != "ts"} for row in lines if row["level"] != "debug"]
    assert told == [
        {"level": level, "event": event, "agent": "main", **more}
        for level, event, more in (
            ("error", "agent is down, trying again", {"why": "no answer"}),
            ("info", "agent is reached", {"via": "hook"}),
            ("info", "agent is back", {}),
            ("info", "agent woken", {"id": "a"}),
            ("error", "agent not told", {"id": "b", "why": "its time to live was over"}),
        )
    ]


@pytest.mark.parametrize(
    ("answer", "turn", "expected"),
    [
        (b"", False, hive.WakeResult("the call answered no HTTP (RemoteDisconnected)")),
        (
            *(b"", True),
            hive.WakeResult("the call answered no HTTP (RemoteDisconnected)", uncertain=True),
        ),
        (status("200 OK", b"\xff"), False, hive.WakeResult("the call answered 200")),
    ],
)
def test_what_a_gateway_says_that_says_nothing(
    quiet: Quiet,
    gateway_of: Callable[..., Gateway],
    answer: bytes,
    turn: bool,
    expected: hive.WakeResult,
) -> None:
    ends: list[hive.WakeResult] = []
    call = gateway_call(turn=turn).replace(url=gateway_of(answer).url)
    REQUEST(quiet.loop, call, ends.append)
    while not ends:
        quiet.loop.step()
    assert ends == [expected]


@pytest.mark.parametrize(
    ("url", "reached"),
    [
        ("http://gateway.lan:81/x", ("HTTPConnection", "gateway.lan", 81, 2.0)),
        ("https://gateway.lan/x", ("HTTPSConnection", "gateway.lan", None, 2.0)),
    ],
)
def test_a_gateway_may_be_on_another_machine(
    quiet: Quiet, monkeypatch: pytest.MonkeyPatch, url: str, reached: tuple[object, ...]
) -> None:
    found: list[tuple[object, ...]] = []

    def unreachable(name: str) -> Callable[..., None]:
        def connect(host: str, port: int | None, timeout: float) -> None:
            found.append((name, host, port, timeout))
            raise OSError(errno.EHOSTUNREACH, "No route to host")

        return connect

    for name in ("HTTPConnection", "HTTPSConnection"):
        monkeypatch.setattr(f"http.client.{name}", unreachable(name))
    ends: list[hive.WakeResult] = []
    REQUEST(quiet.loop, gateway_call().replace(url=url), ends.append)
    while not ends:
        quiet.loop.step()
    assert found == [reached] and ends == [hive.WakeResult("the call: No route to host")]


@pytest.mark.parametrize(
    ("via", "session", "words"),
    [
        ("claude", "s1", "-p --output-format json --resume s1"),
        ("claude", "last", "-p --output-format json --continue"),
        ("codex", "s1", "exec --json resume s1 -"),
        ("codex", "last", "exec --json resume --last -"),
        ("gemini", "s1", "--output-format json --resume s1"),
        ("gemini", "last", "--output-format json --resume latest"),
        ("opencode", "s1", "run --format json --session s1"),
        ("opencode", "last", "run --format json --continue"),
    ],
)
def test_each_program_goes_on_with_its_session(via: str, session: str, words: str) -> None:
    instance = hive.InstanceConfig("main", via=via, session=session)
    event = hive.SystemEvent("x", True, pending().envelope)
    assert hive.wake_argv(instance, hive.WAKE_METHODS[via], event) == [via, *words.split()]
