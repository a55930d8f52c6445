"""Node: what a daemon does, seen from the broker's side of a link in memory."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import calls_of
from rig import HANGS, Rig

import hive

NOBODY = "no handler for action other, and no agent to ask about it"
SAID_TO_NOBODY = "beta: message refused: there is no agent to tell"


# The table of the protocol, "What a node does with an envelope"


@pytest.mark.parametrize(
    ("ch", "action", "urgency", "expected"),
    [
        ("command", "ping", "now", "run"),
        ("command", "ping", "later", "run"),
        ("command", "other", "now", "now"),
        ("command", "other", "later", "next-heartbeat"),
        ("command", None, "now", "now"),
        ("command", None, "later", "next-heartbeat"),
        ("sync", "ping", "now", "run"),
        ("sync", "ping", "later", "run"),
        ("sync", "other", "now", "now"),
        ("sync", "other", "later", "next-heartbeat"),
        ("sync", None, "now", "now"),
        ("sync", None, "later", None),
        ("alert", None, "now", "now"),
        ("alert", None, "later", "now"),
        ("alert", "ping", "later", "now"),
        ("response", None, "now", "now"),
        ("response", None, "later", "next-heartbeat"),
        ("response", "ping", "now", "now"),
        ("status", None, "now", "now"),
        ("status", None, "later", None),
        ("status", "ping", "now", "now"),
        ("status", "ping", "later", None),
        ("heartbeat", None, "now", None),
        ("heartbeat", "ping", "now", None),
    ],
)
@pytest.mark.parametrize("to", ["beta", "all", "main"])
def test_a_node_with_an_agent_and_each_kind_of_message(
    rig_of: Callable[..., Rig],
    main_agent: hive.InstanceConfig,
    fast_agent: Path,
    to: str,
    ch: str,
    action: str | None,
    urgency: str,
    expected: str | None,
) -> None:
    rig = rig_of([main_agent])
    asked = rig.say(ch, action, urgency=urgency, to=to)
    if expected == "run":
        assert rig.answer_to(asked).ch == "response"
        assert rig.started() == ["ping"]
        return
    if expected:
        (call,) = rig.until("the agent is called", lambda: calls_of(fast_agent))
        *_, text, _, mode = call["argv"]
        assert mode == expected
        assert text.startswith(f"[hive] {ch} from alpha to {to} id={asked.id} ")
        assert '\n"hello"' in text
    rig.turn()
    assert rig.started() == (["main"] if expected else [])
    assert rig.sent() == []
    assert rig.acked >= 1


@pytest.mark.parametrize(
    ("ch", "action", "urgency", "alert"),
    [
        ("command", "other", "now", f"beta: other refused: {NOBODY}"),
        ("sync", "other", "later", f"beta: other refused: {NOBODY}"),
        ("command", None, "now", SAID_TO_NOBODY),
        ("sync", None, "now", SAID_TO_NOBODY),
        ("sync", None, "later", None),
        ("alert", "other", "now", None),
        ("response", "other", "now", None),
        ("status", "other", "now", None),
        ("heartbeat", "other", "now", None),
    ],
)
@pytest.mark.parametrize("to", ["beta", "all"])
def test_a_node_without_agent_and_each_kind_of_message(
    rig: Rig, to: str, ch: str, action: str | None, urgency: str, alert: str | None
) -> None:
    asked = rig.say(ch, action, urgency=urgency, to=to)
    rig.turn()
    if alert == SAID_TO_NOBODY and to == "all":
        alert = None  # who speaks to all means those who have one
    assert [e.text for e in rig.sent()] == ([alert] if alert else [])
    if alert:
        (answer,) = rig.sent("alert")
        assert (answer.sender, answer.to, answer.reply_to) == ("beta", "alpha", asked.id)
        assert rig.wire.published[-1].topic == "hive/alpha/alert"
    elif ch != "heartbeat":
        assert rig.events("text", id=asked.id, text="hello"), "what it would have said to one"
    assert rig.started() == []


def test_an_answer_goes_to_the_sender_and_stays_nowhere(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(greet='cat >&2; echo "hello $HIVE_FROM"')
    asked = rig.say("command", "greet", corr="the-first")
    answer = rig.answer_to(asked)
    assert (answer.ch, answer.sender, answer.to) == ("response", "beta", "alpha")
    assert (answer.text, answer.corr, answer.reply_to) == ("hello alpha", "the-first", asked.id)
    (published,) = [p for p in rig.wire.published if p.payload == answer.encode()]
    assert (published.topic, published.qos, published.retain) == ("hive/alpha/response", 1, False)
    assert published.n  # it waits in the outbox until the broker has it


def test_a_result_is_kept_for_whoever_comes_later(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(count="""echo '{"n": 3}'""")
    asked = rig.say("sync", "count")
    rig.answer_to(asked)
    (published,) = [p for p in rig.wire.published if p.topic == "hive/meta/beta/count"]
    assert (published.qos, published.retain, published.n > 0) == (1, True, True)
    result = json.loads(published.payload)
    assert abs(result.pop("ts") - time.time()) < 60 and result.pop("duration_ms") >= 0
    assert result == {
        "node": "beta",
        "action": "count",
        "id": asked.id,
        "corr": asked.id,
        "from": "alpha",
        "status": "ok",
        "exit": 0,
        "result": {"n": 3},
        "error": "",
        "truncated": False,
    }


def test_a_handler_reads_the_envelope_as_one_line(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(echo="cat")
    asked = hive.Envelope.check(
        hive.Envelope.new("alpha", "beta", "command", "a\nb\u2028ä", action="echo").document()
        | {"future": {"field": [1, 2]}}
    )
    rig.tell(asked)
    answer = rig.answer_to(asked)
    assert answer.text.count("\n") == 0
    assert hive.Envelope.parse(answer.text.encode()) == asked


def test_a_handler_finds_its_agent_in_the_environment_and_no_secret(
    rig_of: Callable[..., Rig], main_agent: hive.InstanceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "AWS_SECRET_ACCESS_KEY")
    for key in (*hive.CONTRACT, *own):
        monkeypatch.setenv(key, "of the daemon")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/xdg")
    other = hive.InstanceConfig("other", profile="work", token="x-y-z", hook_token="x-y-z")
    rig = rig_of([main_agent, other], show="env")
    lines = rig.answer_to(rig.say("command", "show", to="other")).text.splitlines()
    assert {"HIVE_AGENT=other", "HIVE_PROFILE=work", "HIVE_TO=other"} <= set(lines)
    assert "XDG_CONFIG_HOME=/xdg" in lines
    assert not [line for line in lines if "x-y-z" in line or "of the daemon" in line]
    assert "HIVE_AGENT=main" in rig.answer_to(rig.say("command", "show")).text


@pytest.mark.parametrize(
    ("to", "hear"), [("beta", ["one"]), ("one", ["one"]), ("two", ["two"]), ("all", ["one", "two"])]
)
def test_each_agent_hears_what_is_for_it(
    rig_of: Callable[..., Rig], fast_agent: Path, to: str, hear: list[str]
) -> None:
    rig = rig_of(
        [hive.InstanceConfig(n, n, openclaw_cmd=(str(fast_agent),)) for n in ("one", "two")]
    )
    rig.say("command", to=to)
    rig.until("they are called", lambda: len(calls_of(fast_agent)) >= len(hear))
    rig.advance(1)
    assert sorted(call["argv"][1] for call in calls_of(fast_agent)) == hear
    assert sorted(rig.started()) == hear


@pytest.mark.parametrize(
    ("lines", "exit", "why"),
    [
        ("echo half; echo no remote >&2; exit 3", 3, "exit 3: no remote"),
        ("kill -KILL $$", -9, "was ended by signal 9"),
        ("head -c 100000 /dev/zero | tr '\\0' x >&2; echo the end >&2; exit 1", 1, "the end"),
    ],
)
def test_a_failure_is_an_alert_with_its_reason(
    rig_of: Callable[..., Rig], lines: str, exit: int, why: str
) -> None:
    rig = rig_of(deploy=lines)
    asked = rig.say("command", "deploy", corr="c-1")
    answer = rig.answer_to(asked)
    assert (answer.ch, answer.to, answer.corr) == ("alert", "alpha", "c-1")
    assert answer.text.startswith("beta: deploy failed: ")
    assert answer.text.endswith(why)
    (result,) = rig.kept("beta", "deploy")
    assert (result["status"], result["exit"]) == ("error", exit)
    assert result["error"].endswith(why)
    assert rig.works()


@pytest.mark.parametrize("how", ["vanished", "open to all", "a folder", "no program"])
def test_a_handler_that_changed_since_it_was_found_is_told(rig: Rig, how: str) -> None:
    rig.handler("deploy", "echo deployed")
    rig.advance(5)
    file = rig.handler_dir / "deploy"
    match how:
        case "vanished":
            file.unlink()
        case "open to all":
            file.chmod(0o777)
        case "a folder":
            file.unlink()
            file.mkdir()
        case _:
            file.write_bytes(b"\x7fnonsense\xff")
    answer = rig.answer_to(rig.say("command", "deploy"))
    assert answer.ch == "alert"
    assert answer.text.startswith("beta: deploy failed: could not be started: ")
    assert rig.works()


@pytest.mark.parametrize(
    ("mode", "content", "why"),
    [
        (0o644, "#!/bin/sh\n", "not executable; try: chmod +x {file}"),
        (0o777, "#!/bin/sh\n", "is writable by everyone; try: chmod o-w"),
        (0o755, "#!/no/such\n", "its first line names '/no/such', which is not there"),
    ],
)
def test_whoever_asks_for_a_file_that_is_no_handler_is_told_why(
    rig: Rig, mode: int, content: str, why: str
) -> None:
    rig.turn()
    file = rig.handler_dir / "deploy"
    file.write_text(content)
    file.chmod(mode)
    rig.advance(5)
    answer = rig.answer_to(rig.say("command", "deploy"))
    what = f"no handler for action deploy ({why.format(file=file)}), and no agent to ask about it"
    assert (answer.ch, answer.text) == ("alert", f"beta: deploy refused: {what}")
    rig.handler_dir.chmod(0o777)
    rig.advance(5)
    answer = rig.answer_to(rig.say("command", "other"))
    assert "no handler for action other (the directory is writable by everyone; " in answer.text


def test_a_handler_that_takes_too_long_is_ended_and_the_next_one_runs(
    rig_of: Callable[..., Rig],
) -> None:
    rig = rig_of(hang=HANGS)
    first, second = rig.say("command", "hang"), rig.say("command", "hang")
    rig.until("it runs", lambda: rig.started() == ["hang"])
    rig.advance(31)
    answer = rig.answer_to(first)
    assert answer.ch == "alert"
    assert "took longer than 30 s" in answer.text
    assert rig.kept("beta", "hang")[0]["status"] == "timeout"
    (rig.handler_dir.parent / "gate").touch()
    assert rig.answer_to(second).text == "through"


def test_a_handler_may_have_a_deadline_and_workers_of_its_own(rig_of: Callable[..., Rig]) -> None:
    settings = {"hang": hive.HandlerConfig(timeout=100.0, workers=2)}
    rig = rig_of(settings=settings, hang=HANGS)
    asked = [rig.say("command", "hang") for _ in range(3)]
    rig.turn()
    assert rig.started() == ["hang", "hang"]
    rig.advance(90)
    assert rig.sent() == []
    rig.advance(11)
    assert "took longer than 100 s" in rig.answer_to(asked[0]).text


def test_a_handler_that_sleeps_delays_nobody(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(hang=HANGS)
    waiting = [rig.say("command", "hang"), rig.say("command", "hang")]
    assert rig.works()
    before = len(rig.heartbeats())
    rig.advance(10)
    assert len(rig.heartbeats()) == before + 2
    assert rig.started() == ["hang", "ping"]
    (rig.handler_dir.parent / "gate").touch()
    assert [rig.answer_to(one).text for one in waiting] == ["through"] * 2


def test_no_more_handlers_run_than_there_are_workers(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(node={"handler_workers": 2}, a=HANGS, b=HANGS, c=HANGS)
    asked = [rig.say("command", action) for action in "abc"]
    rig.turn()
    assert rig.started() == ["a", "b"]
    (rig.handler_dir.parent / "gate").touch()
    assert {rig.answer_to(one).text for one in asked} == {"through"}


def test_the_message_after_a_thousand_that_wait_is_refused_as_busy(
    rig_of: Callable[..., Rig],
) -> None:
    rig = rig_of(level="warning", hang=HANGS)
    for _ in range(1001):
        rig.say("command", "hang")
    rig.turn()
    assert rig.sent() == []
    asked = rig.say("command", "hang")
    answer = rig.answer_to(asked)
    assert answer.ch == "alert" and "busy" in answer.text
    assert rig.sent() == [answer]


def test_the_answer_that_somebody_waits_for_does_not_wake_the_agent(
    rig_of: Callable[..., Rig], main_agent: hive.InstanceConfig
) -> None:
    rig = rig_of([main_agent])
    client = hive.ControlClient(rig.state_dir / "door", "beta")
    asked = hive.Envelope.new("beta", "alpha", "command", "well?", id="c-1").document()
    assert rig.ask(client, do="sent", envelope=asked, wait=True) == {"ok": True}
    rig.say("response", corr="c-1")
    rig.say("response", corr="c-1")  # of a question to everyone
    rig.advance(120)
    assert rig.started() == []
    rig.say("response", corr="c-2")
    rig.until("the agent hears of another", lambda: rig.started() == ["main"])
    client.close()
    rig.advance(5)
    rig.say("response", corr="c-1")
    rig.until("the agent hears it after all", lambda: rig.started() == ["main"] * 2)


def test_the_answer_that_somebody_has_just_read_does_not_wake_the_agent(
    rig_of: Callable[..., Rig], main_agent: hive.InstanceConfig
) -> None:
    rig = rig_of([main_agent])
    client = hive.ControlClient(rig.state_dir / "door", "beta")
    asked = hive.Envelope.new("beta", "alpha", "command", "well?", id="c-1").document()
    rig.ask(client, do="sent", envelope=asked, wait=True)
    answer = hive.Envelope.new("alpha", "beta", "response", "yes", id="a-1", corr="c-1")
    assert rig.ask(client, do="read", envelope=answer.document()) == {"ok": True}
    client.close()
    rig.turn()
    rig.say("response", id="a-1", corr="c-1", text="yes")
    rig.turn()
    assert rig.started() == []
    rig.say("response", id="a-2", corr="c-1")
    rig.until("the agent hears another one", lambda: rig.started() == ["main"])


def test_the_answer_to_a_question_that_nobody_waits_for_wakes_the_agent_with_the_question(
    rig_of: Callable[..., Rig], main_agent: hive.InstanceConfig, fast_agent: Path
) -> None:
    rig = rig_of([main_agent])
    client = hive.ControlClient(rig.state_dir / "door", "beta")
    text = "is the backup\ndone?" + " " * 1000
    asked = hive.Envelope.new("beta", "alpha", "command", text, id="c-1").document()
    assert rig.ask(client, do="send", envelope=asked)["queued"]
    client.close()
    rig.say("response", corr="c-1", text="yes")
    (call,) = rig.until("the agent is called", lambda: calls_of(fast_agent))
    header, said, _ = call["argv"][3].split("\n")
    assert header.partition(" re: ")[2].startswith(r'"is the backup\ndone?')
    assert said == '"yes"'


@pytest.mark.parametrize(
    ("ch", "text", "answers"),
    [
        ("command", "42", ["42"]),
        ("command", "half a pair: \ud83d", ["half a pair: \ufffd"]),
        ("alert", "42", []),
        ("response", "42", []),
    ],
)
def test_the_reply_of_an_agents_turn_is_the_answer(
    rig_of: Callable[..., Rig], tmp_path: Path, ch: str, text: str, answers: list[str]
) -> None:
    turn = {"status": "ok", "result": {"payloads": [{"text": text}]}}
    (tmp_path / "out").write_text(json.dumps(turn))
    command = ("sh", "-c", 'cat "$0"', str(tmp_path / "out"))
    rig = rig_of([hive.InstanceConfig("main", via="agent", openclaw_cmd=command)])
    asked = rig.say(ch, corr="c-1")
    rig.until("the turn has ended", lambda: rig.events("agent woken") and rig.works())
    heard = [(e.ch, e.text, e.corr, e.to) for e in rig.answers_to(asked)]
    assert [text for _, text, *_ in heard] == answers
    assert {(ch, corr, to) for ch, _, corr, to in heard} <= {("response", "c-1", "alpha")}


@pytest.mark.parametrize("sender", ["alpha", "beta"])
def test_nothing_on_the_bus_can_silence_the_agent(
    rig_of: Callable[..., Rig], main_agent: hive.InstanceConfig, sender: str
) -> None:
    rig = rig_of([main_agent])
    rig.say("status", sender=sender, text="waiting", corr="c-1", ttl=60, urgency="later")
    rig.say("response", corr="c-1")
    rig.until("the agent hears it", lambda: rig.started() == ["main"])


@pytest.mark.parametrize(
    ("ch", "told"), [("command", True), ("sync", True), ("response", False), ("alert", False)]
)
def test_an_agent_that_is_never_reached_is_told_to_whoever_asked(
    rig_of: Callable[..., Rig], ch: str, told: bool
) -> None:
    rig = rig_of([hive.InstanceConfig("main", openclaw_cmd=("/no/such/openclaw",))])
    asked = rig.say(ch, ttl=20)
    rig.advance(19)
    assert rig.sent() == []
    rig.advance(30)
    assert [(e.ch, e.to, e.reply_to) for e in rig.sent()] == [("alert", "alpha", asked.id)] * told
    if told:
        assert "main" in rig.sent()[0].text and "No such file" in rig.sent()[0].text
    assert rig.events("agent not told", id=asked.id)
    assert rig.works()


# What must not be acted upon


def test_a_message_is_acted_upon_once(rig: Rig) -> None:
    asked = rig.say("command", "ping")
    rig.tell(asked)
    rig.answer_to(asked)
    rig.tell(asked)
    rig.turn()
    assert rig.started() == ["ping"]
    assert rig.acked == 3


def test_a_message_is_acted_upon_once_even_after_ten_thousand_others(
    rig_of: Callable[..., Rig],
) -> None:
    rig = rig_of(level="info")
    asked = rig.say("command", "ping")
    rig.answer_to(asked)
    for i in range(10_000):
        rig.say("status", urgency="later", id=f"other-{i}")
        if i % 100 == 0:
            rig.turn()
    rig.tell(asked)
    rig.turn()
    assert rig.started() == ["ping"]
    assert rig.acked == 10_002


def test_a_message_is_acted_upon_once_even_after_a_restart(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of()
    asked = rig.say("command", "ping")
    rig.answer_to(asked)
    rig.end()
    again = rig_of()
    again.tell(asked)
    again.turn()
    assert again.started() == []
    assert again.works()


HOUR = 3600


@pytest.mark.parametrize("ch", ["command", "sync", "alert", "response", "status"])
@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"retained": True}, "it was retained, and would be acted upon again at each start"),
        ({"topic": "hive/beta/heartbeat"}, "its topic disagrees with to and ch"),
        ({"topic": "hive/all/command"}, "its topic disagrees with to and ch"),
        ({"topic": "hive/beta/heartbeat/x"}, "its topic disagrees with to and ch"),
        ({"topic": "hive/beta/CH/x"}, "its topic names another sender"),
        ({"topic": "hive/beta/CH/alpha/x"}, "its topic disagrees with to and ch"),
        ({"topic": "other/beta/command"}, "its topic disagrees with to and ch"),
        ({"to": "gamma", "topic": "hive/beta/command"}, "its topic disagrees with to and ch"),
        ({"to": "gamma"}, "it is for another node"),
        ({"to": "Beta"}, "it is for another node"),
        ({"ttl": 10, "now": time.time() - HOUR}, "its time to live is over"),
    ],
)
def test_a_message_in_the_wrong_place_or_time_is_dropped(
    rig_of: Callable[..., Rig],
    main_agent: hive.InstanceConfig,
    ch: str,
    how: dict[str, Any],
    why: str,
) -> None:
    rig = rig_of([main_agent])
    given = {"text": "hello", "action": "ping", **how}
    topic, retained = given.pop("topic", None), given.pop("retained", False)
    envelope = hive.Envelope.new("alpha", given.pop("to", "beta"), ch, **given)
    topic = (topic or f"hive/{envelope.to}/{ch}").replace("CH", ch)
    rig.node.node.all_heard()
    rig.hand_in(topic, envelope.encode(), retained)
    rig.turn()
    assert rig.started() == []
    assert rig.sent() == []
    assert rig.acked == 1
    (line,) = rig.events("dropped")
    assert (line["level"], line["id"], line["why"]) == ("warning", envelope.id, why)


def test_what_was_dropped_may_still_come_as_it_should(rig: Rig) -> None:
    asked = hive.Envelope.new("alpha", "beta", "command", "hello", action="ping")
    rig.tell(asked, retained=True)
    rig.hand_in("hive/beta/sync", asked.encode())
    rig.tell(asked)
    assert rig.answer_to(asked).text == "pong"


@pytest.mark.parametrize("wrong", [-HOUR, HOUR])
def test_a_clock_that_is_wrong_by_an_hour_loses_nothing_where_the_broker_counts(
    rig: Rig, wrong: int
) -> None:
    asked = hive.Envelope.new(
        "alpha", "beta", "command", "hello", action="ping", ttl=30, now=time.time() + wrong
    )
    rig.tell(asked, expires_in=25)
    assert rig.answer_to(asked).text == "pong"


@pytest.mark.parametrize("how", [{"ttl": 0}, {"ttl": None}, {"ttl": 2 * HOUR}])
def test_an_old_message_without_ttl_or_within_it_is_not_stale(
    rig: Rig, how: dict[str, Any]
) -> None:
    assert rig.answer_to(rig.say("command", "ping", now=time.time() - HOUR, **how))


# What an attacker or an accident sends


GOOD = hive.Envelope.new(
    "alpha",
    "beta",
    "command",
    "hello",
    id="good",
    corr="c",
    reply_to="r",
    ttl=60,
    action="ping",
    now=2_000_000_000,
).document()
RUBBISH = {
    "empty": b"",
    "NUL": b"\0" * 100,
    "no UTF-8": b"\xff\xfe",
    "UTF-16": json.dumps(GOOD).encode("utf-16"),
    "a mark of byte order": b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
    "null": b"null",
    "a number": b"17",
    "not a number": b"NaN",
    "a list": b"[1]",
    "a string": b'"hello"',
    "an empty object": b"{}",
    "half": json.dumps(GOOD).encode()[:-5],
    "two": json.dumps(GOOD).encode() * 2,
    "lists, 100,000 deep": b"[" * 100_000,
    "objects, 100,000 deep": b'{"a":' * 100_000,
    "deep in a field of ours": json.dumps(GOOD | {"x": 0}).encode()[:-2] + b"[" * 50_000,
    "deep and whole": json.dumps(GOOD).encode()[:-1]
    + b',"x":'
    + b"[" * 50_000
    + b"]" * 50_000
    + b"}",
    "a number of 5000 digits": b"9" * 5000,
    "3 MB": b"x" * 3_000_000,
    "3 MB of JSON": json.dumps(GOOD | {"text": "x" * 3_000_000}).encode(),
}
WRONG: dict[str, object] = {
    "a list": [],
    "a list of lists": [["beta"]],
    "an object": {"a": 1},
    "null": None,
    "true": True,
    "a float": 1.5,
    "a negative number": -1,
    "a large number": 10**300,
    "an empty string": "",
    "wildcards": "+/#",
    "a slash": "meta/beta/state",
    "NUL": "a\0b",
    "a lone surrogate": "\ud800",
    "70,000 characters": "x" * 70_000,
    "a line end": "beta\n",
    "all": "all",
    "meta": "meta",
    "dots": "../..",
}


def hostile() -> dict[str, bytes]:
    wrong = {
        f"{field}: {what}": json.dumps(GOOD | {field: value}).encode()
        for field in GOOD
        for what, value in WRONG.items()
    }
    numbers = {
        f"{field}: 5000 digits": json.dumps(GOOD | {field: 7777777})
        .encode()
        .replace(b"7777777", b"9" * 5000)
        for field in GOOD
    }
    return RUBBISH | wrong | numbers


@pytest.mark.parametrize(
    ("topic", "retained"),
    [
        ("hive/beta/command", False),
        ("hive/beta/command", True),
        ("hive/beta/response", False),
        ("hive/all/heartbeat", False),
        ("hive/all/alert", False),
        ("hive/meta/gamma/state", False),
        ("hive/meta/gamma/state", True),
        ("hive/meta/\ufffd/state", True),
        ("hive/beta/+", False),
        ("", False),
    ],
)
def test_no_payload_stops_a_node(rig_of: Callable[..., Rig], topic: str, retained: bool) -> None:
    rig = rig_of(level="info")
    payloads = hostile()
    for payload in payloads.values():
        rig.hand_in(topic, payload, retained)
        rig.turn()
    assert rig.acked == (0 if "meta" in topic else len(payloads))
    heartbeats, states = len(rig.heartbeats()), len(rig.kept("beta", "state"))
    rig.advance(5)
    assert len(rig.heartbeats()) > heartbeats, "it no longer shows that it is alive"
    rig.advance(5)
    assert len(rig.kept("beta", "state")) > states
    assert rig.works()


def test_a_lost_peer_that_is_forgotten_is_not_announced(rig: Rig) -> None:
    rig.beat("gamma")
    rig.hear_state("gamma", retained=True, status="online")
    rig.turn()
    rig.hear_state("gamma", status="offline", reason="connection lost")
    rig.turn()
    assert rig.events("peer is lost")
    rig.hand_in("hive/meta/gamma/state", b"", False)
    rig.advance(120)
    assert rig.sent("alert") == [] and rig.kept("gamma", "state") == []
    assert rig.events("peer is forgotten", peer="gamma")
    rig.beat("gamma")
    rig.turn()
    assert len(rig.events("peer is up", peer="gamma")) == 2


SENSELESS: list[object] = ["5", [5], {"a": 1}, None, True, 0, -1, 10**400, 1e300]


@pytest.mark.parametrize("field", ["interval", "boot", "node_id", "uptime_s", "seq", "load_1m"])
def test_a_heartbeat_of_wrong_types_is_still_a_sign_of_life(rig: Rig, field: str) -> None:
    for value in [*SENSELESS, "x" * 10_000]:
        inner: dict[str, Any] = {field: value}
        rig.beat("gamma", **inner)
        rig.turn()
    assert rig.kept("beta", "state")
    rig.advance(0.1)
    rig.beat("gamma")
    rig.advance(5)
    assert rig.kept("beta", "state")[-1]["known_peers"] == ["gamma"]
    assert rig.works()


@pytest.mark.parametrize(
    "text", ["alive", "null", "[]", "17", "{", '{"interval": NaN}', "[" * 100_000, "9" * 5000]
)
def test_a_heartbeat_without_sense_is_still_a_sign_of_life(rig: Rig, text: str) -> None:
    rig.say("heartbeat", sender="gamma", to="all", text=text)
    rig.advance(5)
    assert rig.kept("beta", "state")[-1]["known_peers"] == ["gamma"]
    rig.advance(20)
    assert rig.kept("beta", "state")[-1]["known_peers"] == []
    assert len(rig.sent("alert")) == 1


def test_many_unknown_actions_are_one_look_for_handlers(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []
    scan = hive.scan_handlers

    def counted(folder: Path) -> hive.HandlerSet:
        looks.append(folder)
        return scan(folder)

    rig.advance(hive.LOOK_GAP)
    monkeypatch.setattr(hive, "scan_handlers", counted)
    for number in range(20):
        rig.say("command", f"nosuch-{number}")
    assert len(looks) == 1
    rig.advance(hive.LOOK_GAP)
    rig.say("command", "nosuch")
    assert len(looks) == 2


def test_runs_and_failures_are_counted(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(fail="exit 1")
    for action in ("ping", "ping", "fail", "ping"):
        rig.answer_to(rig.say("command", action))
    rig.advance(10)
    counters = rig.kept("beta", "state")[-1]["counters"]
    assert (counters["runs"], counters["failures"]) == (4, 1)


def test_ten_thousand_bad_messages_are_a_few_lines_in_the_log(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(level="info")
    asked = rig.say("command", "ping")
    rig.answer_to(asked)
    before = len(rig.events())
    for i in range(2500):
        rig.hand_in("hive/beta/command", b"rubbish %d" % i)
        rig.hand_in(f"hive/beta/{i}", asked.encode())
        rig.tell(asked, retained=True)
        rig.tell(asked)
        if i % 100 == 0:
            rig.turn()
    rig.turn()
    assert rig.acked == 10_001
    assert 4 <= len(rig.events()) - before <= 100
    rig.advance(10)
    counters = rig.kept("beta", "state")[-1]["counters"]
    assert counters["invalid"] == 2500 and counters["dropped"] == 7500
    assert rig.works()


def test_complaints_are_heard_again_after_a_while(rig: Rig) -> None:
    for _ in range(100):
        rig.hand_in("hive/beta/command", b"rubbish")
    first = len(rig.events("not an envelope", level="warning"))
    rig.advance(120)
    rig.hand_in("hive/beta/command", b"rubbish")
    assert len(rig.events("not an envelope", level="warning")) == first + 1


# What the broker is told


def test_a_message_is_acknowledged_once_it_is_on_disk(rig: Rig) -> None:
    found: list[int] = []

    def look() -> None:
        with closing(sqlite3.connect(rig.state_dir / "journal.sqlite3")) as database:
            query = "SELECT count(*) FROM log WHERE id = ?"
            found.append(database.execute(query, ("the-id",)).fetchone()[0])

    rig.tell(hive.Envelope.new("alpha", "beta", "command", "x", id="the-id"), ack=look)
    assert found == []
    rig.turn()
    assert found == [1]


def test_a_message_is_acknowledged_before_its_handler_has_ended(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(hang=HANGS)
    rig.say("command", "hang")
    rig.turn()
    assert rig.acked == 1
    assert rig.sent() == []


def test_every_message_is_acknowledged_once(rig: Rig) -> None:
    asked = hive.Envelope.new("alpha", "beta", "command", "x")
    rig.hand_in("hive/beta/command", b"rubbish")
    rig.hand_in("hive/beta/alert", asked.encode())
    rig.tell(asked, retained=True)
    rig.tell(asked)
    rig.tell(asked)
    rig.beat("gamma")
    rig.turn()
    assert rig.acked == 6
    rig.advance(1)
    assert rig.acked == 6


def test_only_documents_are_retained(rig: Rig) -> None:
    rig.answer_to(rig.say("command", "ping"))
    rig.advance(10)
    messages = [one for one in rig.wire.published if "/meta/" not in one.topic]
    documents = [one for one in rig.wire.published if "/meta/" in one.topic]
    assert {one.topic for one in messages} == {"hive/all/heartbeat", "hive/alpha/response"}
    assert not any(one.retain for one in messages) and all(one.retain for one in documents)
    assert {one.topic.rpartition("/")[2] for one in documents} == {"state", "roster", "ping"}


@pytest.mark.parametrize(
    ("there", "elsewhere", "why"),
    [
        (True, False, "it is empty"),
        (False, False, "no such directory"),
        (False, True, "no such directory; for those in {} set [node] handler_dir"),
    ],
)
def test_a_start_without_handlers_says_where_they_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, elsewhere: bool, why: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    beside = tmp_path / "program" / "hive-daemon.d"
    if elsewhere:
        beside.mkdir(parents=True)
        (beside / "ping").write_text("#!/bin/sh\n")
        (beside / "ping").chmod(0o755)
    monkeypatch.setattr(hive, "own_file", lambda: tmp_path / "program" / "hive.py")
    if not there:
        monkeypatch.setattr(hive.Config, "handler_dir", tmp_path / "missing")
    rig = Rig(tmp_path, {}, [], {}, "debug")
    (line,) = rig.events("no handlers")
    folder = rig.handler_dir if there else tmp_path / "missing"
    assert (line["level"], line["dir"]) == ("warning", str(folder))
    assert line["why"] == why.format(beside)
    rig.end()


def test_a_start_says_which_handlers_it_serves_and_from_where(rig: Rig) -> None:
    (line,) = rig.events("handlers")
    assert (line["level"], line["dir"]) == ("info", str(rig.handler_dir))
    assert line["actions"] == "ping" and not rig.events("no handlers")
    rig.node.work.look_for_handlers()
    assert rig.events("handlers") == [line]  # nothing has changed
    rig.handler("more", "echo more")
    rig.node.work.look_for_handlers()
    assert [one["actions"] for one in rig.events("handlers")] == ["ping", "more,ping"]


def test_what_a_node_has_to_say_goes_out_at_the_end_of_the_turn(rig: Rig) -> None:
    rig.turn()
    said = hive.Envelope.new("beta", "alpha", "status", "by itself")
    rig.node.node.send(said)
    assert said not in rig.sent()  # not before it is on disk
    rig.turn()
    assert said in rig.sent()


def test_the_log_says_how_it_ended_and_why_nothing_was_done(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(fail="exit 3")
    rig.answer_to(rig.say("command", "ping"))
    rig.answer_to(rig.say("command", "fail"))
    rig.answer_to(rig.say("command", "other"))
    ended = {row["action"]: row["level"] for row in rig.events("handler ended")}
    assert ended == {"ping": "info", "fail": "warning"}
    notes = {row["action"]: row.get("note") for row in rig.events("received", level="info")}
    assert notes == {"ping": None, "fail": None, "other": NOBODY}


@pytest.mark.parametrize("ch", sorted(hive.CHANNELS))
def test_what_is_of_another_time_is_dropped_and_counted(rig: Rig, ch: str) -> None:
    now, day = time.time(), 86400
    for days, why in ((-9, "more than 8 days old"), (2, "more than a day ahead")):
        before = rig.node.node.counts["dropped"]
        rig.say(ch, "ping", now=now + days * day)
        assert rig.node.node.counts["dropped"] == before + 1
        assert why in rig.events("dropped", ch=ch)[-1]["why"]
    rig.turn()
    assert rig.sent() == [] and rig.acked == 2 and not rig.started()
    for seconds in (-7 * day, 0.9 * day):
        assert rig.answer_to(rig.say("command", "ping", now=now + seconds)).text == "pong"


def test_an_id_that_somebody_else_used_first_is_no_reason_to_drop_a_message(rig: Rig) -> None:
    rig.say("command", "ping", sender="mallory", id="guessed")
    rig.until("it is answered", lambda: rig.sent("response"))
    rig.say("command", "ping", id="guessed")
    rig.until("the other too", lambda: len(rig.sent("response")) == 2)
    assert [one.to for one in rig.sent("response")] == ["mallory", "alpha"]
    rig.say("command", "ping", id="guessed")
    rig.turn()
    assert len(rig.sent("response")) == 2
    why = hive.message_row(rig.journal, {"id": "guessed"})["error"]
    assert why.startswith("guessed: alpha and mallory each sent a message of this id; show it")


# What the broker does not take


def refused(rig: Rig, message: hive.OutgoingMessage) -> None:
    rig.wire.acknowledge(message, hive.PACKET_TOO_LARGE, "larger than the broker takes")
    rig.wire.silent = False
    rig.turn()


def test_an_alert_that_is_too_large_is_cut_until_it_cannot_be_any_more(rig: Rig) -> None:
    rig.wire.silent = True
    rig.node.node.send(hive.Envelope.new("beta", "all", "alert", "x" * 5000, corr="a"))
    rig.turn()
    rig.wire.limit = 1000
    refused(rig, rig.wire.unacknowledged[-1])
    cut = rig.sent("alert")[-1]
    assert cut.text.startswith("xxx") and cut.text.endswith(hive.CUT_SHORT)
    assert (cut.to, cut.corr) == ("all", "a") and len(cut.encode()) <= 1000
    rig.wire.silent, rig.wire.limit = True, 50
    rig.node.node.send(hive.Envelope.new("beta", "all", "alert", "x" * 5000))
    rig.turn()
    before = len(rig.sent("alert"))
    refused(rig, rig.wire.unacknowledged[-1])
    assert len(rig.sent("alert")) == before
    assert len(rig.events("not published")) == 2


def test_an_answer_that_the_broker_refuses_is_no_silence(rig: Rig) -> None:
    rig.wire.silent = True
    asked = rig.say("command", "ping")
    answer = rig.answer_to(asked)
    (message,) = [one for one in rig.wire.unacknowledged if one.id == answer.id]
    rig.wire.acknowledge(message, -1, "The broker closed the connection at it 5 times")
    rig.turn()
    (alert,) = rig.sent("alert")
    why = "beta: the answer was not published: the broker closed the connection at it 5 times"
    assert (alert.text, alert.reply_to, alert.to) == (why, asked.id, "alpha")
    rig.wire.acknowledge(rig.wire.unacknowledged[-1], 0x87, "Not authorized")
    rig.turn()
    assert len(rig.sent("alert")) == 1, "an alert about an alert would go on for ever"


def test_a_document_that_is_refused_is_a_few_lines_in_the_log(rig: Rig) -> None:
    topic = "hive/meta/beta/state"
    for _ in range(1000):
        rig.node.node.published(hive.OutgoingMessage(topic, b"{}", retain=True), 0x87, "Not")
    assert 0 < len(rig.events("document not published", level="warning")) < 50


# Too much


def test_a_flood_leaves_room_for_what_the_node_itself_has_to_say(
    rig_of: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_OUTBOX", 100)
    rig = rig_of(level="warning")
    rig.wire.silent = True
    for number in range(200):
        rig.say("command", "nosuch", sender="flood")
        rig.say("command", "nosuch", sender=f"peer{number % 2}")
    rig.turn()
    to = [alert.to for alert in rig.sent("alert")]
    assert [to.count(name) for name in ("flood", "peer0", "peer1")] == [20, 20, 20]
    for number in range(40):
        own = hive.Envelope.new("beta", "alpha", "command", "own", id=f"own-{number}")
        assert rig.node.node._send_for_command(own) == ""
    late = hive.Envelope.new("beta", "alpha", "command", "one too many")
    assert rig.node.node._send_for_command(late) == "100 messages wait for the broker already"
    rig.wire.silent = False
    rig.turn()
    assert rig.works()


def test_of_many_results_the_latest_is_published(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(count="cat > /dev/null; echo x >> ../runs; wc -l < ../runs")
    rig.disconnect()
    asked = [rig.say("command", "count") for _ in range(10)]
    rig.until("all have run", lambda: len(rig.events("handler ended")) == 10)
    rig.connect()
    assert [result["result"] for result in rig.kept("beta", "count")] == [10]
    assert all(rig.answers_to(one) for one in asked)


def limited(rate: int = 10, burst: int = 50) -> dict[str, int]:
    return {"sender_rate": rate, "sender_burst": burst}


def test_a_sender_that_sends_too_much_is_refused_counted_and_told_once(
    rig_of: Callable[..., Rig],
) -> None:
    rig = rig_of(level="warning", node=limited())
    for _ in range(500):
        rig.say("status", urgency="later", sender="flood")
        rig.say("status", urgency="later", sender="gamma") if _ < 50 else None
    rig.turn()
    kept = rig.journal.rows({"from": "flood"})
    assert len(kept) == 50 and len(rig.journal.rows({"from": "gamma"})) == 50
    (alert,) = rig.sent("alert")
    why = "more than 10 messages a second came from flood: what is too much is refused"
    assert (alert.to, alert.text) == ("flood", f"beta: {why}")
    rig.advance(10)
    (_, rest) = rig.sent("alert")
    assert rest.text == "beta: 450 more messages from flood were refused, as it sent too many"
    state = rig.kept("beta", "state")[-1]
    assert state["counters"]["refused"] == 450
    trouble = "flood sends more than 10 messages a second: 450 refused"
    assert (state["status"], state["reason"]) == ("degraded", trouble)
    assert len(rig.events("dropped")) <= hive.RATE_LIMIT_BURST
    assert rig.answer_to(rig.say("command", "ping", sender="flood")).text == "pong", "it may again"
    rig.advance(hive.REFUSED_MEMORY)
    assert rig.kept("beta", "state")[-1]["status"] == "online"


def test_what_was_refused_may_be_sent_again(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(node=limited(burst=1))
    rig.say("status", urgency="later")
    asked = rig.say("command", "ping")
    rig.turn()
    assert not rig.answers_to(asked)
    rig.advance(5)
    rig.tell(asked)
    assert rig.answer_to(asked).text == "pong"


def test_a_sender_that_sends_too_much_stays_alive(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(level="warning", node=limited())
    for _ in range(60):
        for _ in range(20):
            rig.say("status", urgency="later", sender="flood")
        rig.live(1, "flood")
    assert not rig.events("peer is lost")


def test_ordinary_senders_meet_no_limit(rig: Rig) -> None:
    for name in ("gamma", "delta"):
        for _ in range(3000):
            rig.say("status", urgency="later", sender=name)
    rig.turn()
    assert rig.sent() == [] and rig.node.node.counts["refused"] == 0


def test_the_senders_that_are_counted_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hive, "MAX_SENDERS", 100)
    limits = hive.SenderLimits(rate=1, burst=10)
    for number in range(1000):
        for _ in range(20):
            if not limits.allow(f"n-{number}", 1000.0):
                limits.refuse(f"n-{number}", 1000.0)
    assert len(limits._due) == 100
    assert len(limits.trouble(1000.0)) == hive.MAX_REFUSED
    assert limits.trouble(1000.0 + 2 * hive.REFUSED_MEMORY) == []


def test_a_rate_and_a_burst_are_what_they_say() -> None:
    limits = hive.SenderLimits(rate=10, burst=50)

    def allowed(now: float) -> int:
        return sum(limits.allow("a", now) for _ in range(1000))

    assert [allowed(now) for now in (5.0, 5.0, 6.05, 100.0)] == [50, 0, 10, 50]


def test_one_members_flood_delays_only_itself(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(level="warning", hang=HANGS)
    for _ in range(1500):
        rig.say("command", "hang", sender="flood")
    asked = rig.say("command", "hang", sender="gamma")
    other = rig.say("command", "ping", sender="gamma")
    assert rig.answer_to(other).text == "pong"
    (rig.handler_dir.parent / "gate").touch()
    rig.answer_to(asked)
    answered = [one.to for one in rig.sent("response") if one.corr != other.id]
    assert answered.index("gamma") <= 3, "all others of it come later"
    rig.advance(2 * hive.REFUSALS_TOLD)
    (*busy, rest) = rig.sent("alert")
    assert {one.to for one in (*busy, rest)} == {"flood"} and all(
        "busy" in one.text for one in busy
    )
    assert len(busy) == hive.REFUSALS[1], "by themselves; for the rest:"
    (many,) = re.findall(r"^beta: (\d+) more messages from flood were refused", rest.text)
    assert len(busy) + int(many) >= 500
    assert rig.answer_to(rig.say("command", "nothing", sender="flood")).ch == "alert", "again"


def test_what_is_said_to_one_does_not_wait_behind_what_another_has_asked_for(rig: Rig) -> None:
    rig.disconnect()
    for number in range(100):
        rig.say("command", f"nothing{number}", sender="curious")
    word = hive.Envelope.new("beta", "gamma", "status", "my own")
    rig.node.node.send(word)
    rig.connect()
    sent = [one.id for one in rig.sent()]
    assert len(sent) == 101 and sent.index(word.id) == 1


def test_in_a_checked_hive_a_flood_is_known_by_its_topic_and_is_not_even_read(
    rig_of: Callable[..., Rig],
) -> None:
    rig = rig_of(level="warning", node=limited())
    rig.node.node.topics = rig.config.topics.replace(sender="beta")
    rig.node.node.all_heard()
    rig.turn()
    acks = list[str]()

    def hand_in(ch: str, payload: bytes, sender: str = "mallory") -> None:
        rig.hand_in(f"hive/beta/{ch}/{sender}", payload, ack=lambda: acks.append(sender))

    status = hive.Envelope.new("gamma", "beta", "status", "x", urgency="later")
    for _ in range(50):
        hand_in("status", b"rubbish")
    hand_in("status", status.encode(), "gamma")
    for number in range(1000):
        said = hive.Envelope.new(f"agent{number}", "beta", "command", "x", action="ping")
        hand_in("command", said.encode())
    assert acks == 50 * ["mallory"], "the others behind what waits for the commit"
    rig.turn()
    assert acks[50] == "gamma" and len(acks) == 1051
    counts = rig.node.node.counts
    assert (counts["invalid"], counts["refused"], counts["dropped"]) == (50, 1000, 1000)
    assert rig.journal.message(status.id) and not rig.journal.rows({"ch": "command"})
    hand_in("command", said.encode())
    assert len(acks) == 1052, "at once, as nothing is to be committed"
    rig.advance(2 * hive.REFUSALS_TOLD)
    first, rest = rig.sent("alert")
    assert {first.to, rest.to} == {"mallory"} and "more than 10 messages a second" in first.text
    assert rest.text.startswith("beta: 1001 more messages from mallory were refused")


@pytest.mark.parametrize(
    ("sender", "topic", "payload", "again"),
    [
        ("beta", "hive/all/@office", b"0", 1),
        ("beta", "hive/all/@office", b"1", 0),
        ("beta", "hive/all/@office", b"", 0),
        ("beta", "hive/all/@office/mallory", b"0", 0),
        ("", "hive/all/@office", b"0", 0),  # in an open hive anybody may say so
    ],
)
def test_only_a_broker_tells_that_a_bridge_is_cut(
    rig_of: Callable[..., Rig], sender: str, topic: str, payload: bytes, again: int
) -> None:
    rig = rig_of(level="warning")
    rig.node.node.topics = rig.config.topics.replace(sender=sender)
    acks = list[str]()
    rig.hand_in(topic, payload, ack=lambda: acks.append(topic))
    rig.turn()
    assert rig.wire.sent_again == again and acks == [topic]
    assert rig.node.node._connection()["cut"] == ["@office"] * again


def test_a_bridge_is_cut_until_its_broker_says_otherwise(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(level="warning")
    node = rig.node.node
    node.topics = rig.config.topics.replace(sender="beta")
    for site, payload in (("@lab", b"0"), ("@office", b"0"), ("@lab", b"1"), ("@office", b"0")):
        node.deliver(hive.IncomingMessage(f"hive/all/{site}", payload, True, None, lambda: None))
    assert node._connection()["cut"] == ["@office"]
    assert rig.wire.sent_again == 0, "what is old has been answered"
    for number in range(2 * hive.MAX_CUT):
        node._hear_bridge(f"@{number}", True, True)
    assert len(node._connection()["cut"]) == hive.MAX_CUT
    node.on_disconnected(rig.config.mqtt, "gone")
    assert node._connection()["cut"] == []


def test_a_flood_of_heartbeats_is_dropped_and_its_sender_lives(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(level="warning", node=limited())
    for _ in range(hive.BEATS[1] + 500):
        rig.beat("flood")
    assert rig.node.node.counts["dropped"] == 500
    rig.live(60, "flood")
    assert not rig.events("peer is lost") and rig.node.node.counts["refused"] == 0
