"""Node, at its edges: what is counted, told and bounded, without a process."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig import Rig
from test_shared_journals import ask, shared

import hive

Make = Callable[..., Rig]


def timers(rig: Rig) -> list[float]:
    """In how many seconds something is due."""
    due = [timer.due for timer in rig.loop._timers if timer.call]
    return sorted(round(at - rig.clock.now, 3) for at in due)


def alerts(rig: Rig) -> list[tuple[str, str]]:
    rig.turn()
    return [(one.to, one.text) for one in rig.sent("alert")]


def as_checked(rig: Rig) -> Rig:
    """The same node in a hive whose topics name the sender."""
    rig.node.node.topics = rig.config.topics.replace(sender="beta")
    return rig


def note_calls(monkeypatch: pytest.MonkeyPatch, of: Any, name: str, gives: Any = None) -> list[Any]:
    """What a method is called with from now on, in place of doing what it does."""
    calls: list[Any] = []

    def called(*given: Any, **named: Any) -> Any:
        calls.append((given, named) if named else given)
        return gives

    monkeypatch.setattr(of, name, called)
    return calls


# Numbers


def test_the_bounds_are_those_of_the_documentation() -> None:
    assert hive.REFUSALS == (1, 100) and hive.REFUSALS_TOLD == 5
    assert hive.BEATS == (10, 50), "ten a second come from all together"
    assert (hive.MAX_SENDERS, hive.MAX_REFUSED, hive.REFUSED_MEMORY) == (5000, 20, 600)
    assert hive.MAX_EARLY == 1000 and hive.MAINTENANCE_INTERVAL == 30
    assert hive.MAX_SHARED_TEXT == 1000 and hive.MAX_HOLD == 60
    assert (hive.MAX_QUESTIONS, hive.MAX_ALL_QUESTIONS, hive.MAX_PAGE) == (8, 64, 65536)


@pytest.mark.parametrize(
    ("mqtt", "hive_"),
    [
        (hive.MqttConfig(host="broker.lan", port=1884), "broker.lan:1884 hive"),
        (hive.MqttConfig(), "ours hive"),
    ],
)
def test_a_hive_is_known_by_its_broker_and_its_prefix(mqtt: hive.MqttConfig, hive_: str) -> None:
    config = hive.Config(hive.NodeConfig("beta"), mqtt=mqtt)
    assert hive.hive_of(config) == hive_


@pytest.mark.parametrize("said", [b"", b"1\n", b"1 x 3\n", None])
def test_memory_that_cannot_be_known_is_not_invented(
    monkeypatch: pytest.MonkeyPatch, said: bytes | None
) -> None:
    def opened(*given: Any) -> io.BytesIO:
        if said is None:
            raise FileNotFoundError
        return io.BytesIO(said)

    assert 10e6 < (hive.resident_memory() or 0) == resident(hive.resident_memory())
    monkeypatch.setattr(hive, "open", opened, raising=False)
    assert hive.resident_memory() is None


def resident(taken: int | None) -> int | None:
    """What a look at the process's own status says, if that is about the same."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            known = int(line.split()[1]) * 1024
            return taken if taken and abs(known - taken) < 0.2 * known else known
    return None


def test_who_has_neither_handlers_nor_agents_has_no_trouble_and_no_numbers() -> None:
    worker = hive.Worker()
    assert [worker.why_not("x"), worker.trouble(), worker.no_room("x")] == ["", "", ""]
    assert (worker.numbers(), worker.agents, worker.handlers) == ({}, (), {})


# What each sender may say


def test_a_sender_that_is_known_takes_no_place_from_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hive, "MAX_SENDERS", 2)
    limits = hive.SenderLimits(rate=1, burst=2)
    said = [limits.allow(name, 1000.0) for name in ("a", "b", "a", "b", "a", "b")]
    assert said == [True, True, True, True, False, False]
    assert limits.allow("c", 1000.0) and limits.allow("a", 1000.0), "the oldest was forgotten"
    assert not limits.allow("a", 1000.0) or len(limits._due) == 2


def test_what_is_refused_is_told_at_once_once_in_ten_minutes_and_of_twenty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = hive.SenderLimits(rate=1, burst=1)
    times = (0.0, 600.0, 1200.1, 1200.2)
    assert [limits.refuse("a", at) for at in times] == [True, False, True, False]
    assert limits.trouble(1200.2) == ["a sends more than 1 messages a second: 2 refused"]
    assert [limits.refuse(f"n{n}", 1200.0) for n in range(20)] == [True] * 19 + [False]
    assert len(limits.trouble(1200.0)) == 20
    assert not limits.refuse("a", 1200.3), "one that is known is counted on"
    assert limits.trouble(1200.0)[0].endswith("3 refused")
    assert len(limits.trouble(1800.0)) == 20 and len(limits.trouble(1800.1)) == 1


def test_who_has_been_quiet_for_five_seconds_is_forgotten() -> None:
    limits = hive.SenderLimits(rate=1, burst=1)
    limits.refuse("a", 100.0)
    limits.refuse("a", 101.0)
    limits.refuse("b", 101.1)
    assert limits.quiet(105.9) == [] and limits.refusing
    assert limits.quiet(106.0) == [("a", 2)]
    assert limits.quiet(106.1) == [("b", 1)] and not limits.refusing


def test_agents_of_one_node_share_what_it_is_told_of_refusals(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.node.node._refusals = hive.SenderLimits(1, 2)
    rig.beat("alpha")
    rig.hand_in("hive/meta/alpha/roster", b'{"agents": ["one", "two"]}', retained=True)
    senders = ("one", "two", "alpha", *("gamma", "delta") * 2)
    for sender in senders:
        rig.say("command", "nothing", sender=sender)
    told = sorted(to for to, _ in alerts(rig))
    assert told == ["delta", "delta", "gamma", "gamma", "one", "two"]
    (line,) = rig.events("dropped")
    assert line["from"] == "alpha" and line["why"].startswith("no handler for action nothing")
    rig.advance(5)
    assert alerts(rig)[-1] == (
        *("alpha", "beta: 1 more messages from alpha were refused, as it sent too many"),
    )
    rig.advance(60)
    assert sum("were refused" in text for _, text in alerts(rig)) == 1


def test_whoever_goes_on_is_told_when_it_ends(rig_of: Make) -> None:
    rig = rig_of(level="warning", node={"sender_rate": 1, "sender_burst": 1})
    for _ in range(12):
        rig.say("status", urgency="later", sender="flood")
        rig.say("status", urgency="later", sender="flood")
        rig.advance(1)
    assert len(alerts(rig)) == 1
    rig.advance(10)
    (_, (to, text)) = alerts(rig)
    assert to == "flood" and text.startswith("beta: 12 more messages from flood were refused")


# Its way to the broker


def connection(rig: Rig) -> dict[str, Any]:
    return rig.node.node._connection()


def test_what_is_known_is_as_old_as_the_last_word_of_the_broker(rig: Rig) -> None:
    rig.node.node.all_heard()
    rig.turn()
    assert (connection(rig)["fault"], connection(rig)["age"]) == ("", 0.0)
    rig.clock.now += 7
    rig.hand_in("hive/beta/status", b"rubbish")
    rig.clock.now += 20.001
    assert connection(rig)["fault"].startswith("broker localhost:1883: no answer for 20 s")
    assert round(connection(rig)["age"]) == 20 and not connection(rig)["connected"]
    rig.clock.now -= 0.002
    assert connection(rig)["connected"] and connection(rig)["age"] == 0.0
    rig.disconnect()
    rig.disconnect()
    rig.clock.now += 5
    assert connection(rig)["age"] == 5.0, "since the first of several failures"


def test_what_came_early_is_decided_when_it_is_heard_whose_agent_sent_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_EARLY", 2)
    as_checked(rig).beat("alpha")
    rig.acked = 0
    said = [hive.Envelope.new("one", "beta", "command", f"{n}", action="ping") for n in range(3)]
    for envelope in said:
        rig.hand_in("hive/beta/command/alpha", envelope.encode())
    assert len(rig.events("dropped", why="its topic names another sender")) == 1
    assert rig.acked == 1
    rig.hand_in("hive/meta/alpha/roster", b'{"agents": ["one"]}', retained=True)
    rig.node.node.all_heard()
    for envelope in said[:2]:
        assert rig.answer_to(envelope).text == "pong"
    assert rig.acked == 3 and not rig.answers_to(said[2])


def test_what_came_early_comes_again_after_an_outage(rig: Rig) -> None:
    as_checked(rig).beat("alpha")
    rig.acked = 0
    said = hive.Envelope.new("one", "beta", "command", "x", action="ping")
    rig.hand_in("hive/beta/command/alpha", said.encode())
    rig.disconnect()
    rig.connect()
    rig.hand_in("hive/meta/alpha/roster", b'{"agents": ["one"]}', retained=True)
    rig.node.node.all_heard()
    rig.turn()
    assert rig.acked == 0 and not rig.started()


def test_documents_are_fetched_by_their_exact_topics(rig: Rig) -> None:
    rig.node.node._fetch_documents(["alpha", "gamma"])
    assert rig.wire.fetched == [
        [f"hive/meta/{name}/{kind}" for name in ("alpha", "gamma") for kind in ("state", "roster")]
    ]


def test_those_who_watch_hear_of_the_broker_when_it_comes_and_goes(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = note_calls(monkeypatch, rig.node.node.requests, "note_change")
    rig.node.node.all_heard()
    assert len(changes) == 1
    rig.node.node.all_heard()
    assert len(changes) == 1, "it is as it was"
    rig.disconnect()
    assert len(changes) == 2


# Where to publish what waits


@pytest.mark.parametrize(
    ("topic", "heard", "address"),
    [
        ("hive/meta/beta/ping", True, "hive/meta/beta/ping"),
        ("hive/alpha/command", False, "hive/alpha/command"),
        ("hive/all/alert", False, "hive/all/alert"),
        ("hive/main/command", False, "hive/main/command"),
        ("hive/worker/command", True, "hive/alpha/command"),  # a session of alpha's
        ("hive/worker/command", False, "hive/alpha/command"),
        ("hive/own/command", False, "hive/beta/command"),  # one of ours
        ("hive/helper/command", True, "hive/helper/command"),  # an agent that listens itself
        ("hive/nobody/command", False, "hive/nobody/command"),
    ],
)
def test_in_an_open_hive_only_sessions_are_reached_through_their_nodes(
    rig_of: Make, main_agent: hive.InstanceConfig, topic: str, heard: bool, address: str
) -> None:
    assert addressed(rig_of([main_agent]), topic, heard) == address


@pytest.mark.parametrize(
    ("topic", "heard", "address"),
    [
        ("hive/meta/beta/ping", True, "hive/meta/beta/ping"),
        ("hive/alpha/command", False, "hive/alpha/command/beta"),
        ("hive/all/alert", False, "hive/all/alert/beta"),
        ("hive/main/command", False, "hive/beta/command/beta"),
        ("hive/own/command", False, "hive/beta/command/beta"),
        ("hive/helper/command", False, "hive/alpha/command/beta"),
        ("hive/nobody/command", True, "hive/nobody/command/beta"),
        ("hive/nobody/command", False, None),  # it waits until all have been heard
    ],
)
def test_in_a_checked_hive_all_agents_are(
    rig_of: Make, main_agent: hive.InstanceConfig, topic: str, heard: bool, address: str | None
) -> None:
    assert addressed(as_checked(rig_of([main_agent])), topic, heard) == address


def addressed(rig: Rig, topic: str, heard: bool) -> str | None:
    node = rig.node.node
    rig.beat("alpha")
    roster = {"agents": ["helper"], "sessions": {"worker": {}}}
    rig.hand_in("hive/meta/alpha/roster", json.dumps(roster).encode(), retained=True)
    node.sessions._sessions["own"] = hive.AgentSession("own", {}, 0.0)
    node.heard_all = heard
    try:
        return node._address(topic)
    finally:
        del node.sessions._sessions["own"]


# What comes in


@pytest.mark.parametrize(
    ("ttl", "age", "expires_in", "left"),
    [
        (None, 0, None, None),
        (0, 0, 50, None),
        (60, 0, 50, 50.0),
        (60, 0, 0, 1.0),
        (60, 20, None, 40.0),
        (60, 3000, None, 1.0),
    ],
)
def test_a_message_has_the_time_that_the_broker_says_or_else_its_own(
    rig: Rig, ttl: int | None, age: int, expires_in: int | None, left: float | None
) -> None:
    envelope = hive.Envelope.new("a", "beta", "command", "x", ttl=ttl, now=time.time() - age)
    message = hive.IncomingMessage("t", b"", False, expires_in, lambda: None)
    found = rig.node.node._time_left(envelope, message)
    assert found == left if left in (None, 1.0, 50.0) else abs((found or 0) - (left or 0)) <= 1


@pytest.mark.parametrize(
    ("payload", "retained", "again"), [(b"0", False, 1), (b"0", True, 0), (b"", False, 0)]
)
def test_what_a_broker_keeps_of_a_bridge_is_not_that_it_is_cut_now(
    rig: Rig, payload: bytes, retained: bool, again: int
) -> None:
    as_checked(rig).hand_in("hive/all/@office", payload, retained=retained)
    assert (rig.wire.sent_again, rig.acked) == (again, 1)


def test_what_is_said_on_a_private_topic_is_not_even_counted(rig: Rig) -> None:
    before = rig.node.node.counts["received"]
    rig.hand_in("hive/beta/command/~x", b"rubbish")
    assert rig.acked == 1 and rig.node.node.counts["received"] == before
    rig.hand_in("hive/beta/command", b"rubbish")
    assert rig.node.node.counts["received"] == before + 1


def test_a_document_of_another_kind_is_nothing_to_us(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = note_calls(monkeypatch, rig.node.node.members, "hear_document")
    before = rig.node.node.counts["received"]
    for document in ("state", "ping", "roster"):
        rig.hand_in(f"hive/meta/alpha/{document}", b"{}")
    assert [given[1] for given in heard] == ["state", "roster"]
    assert not rig.node.node.heard_all and rig.node.node.counts["received"] == before


@pytest.mark.parametrize("earlier", [True, False])
def test_of_an_older_session_a_topic_without_sender_is_taken(rig: Rig, earlier: bool) -> None:
    as_checked(rig).node.node.all_heard()
    said = hive.Envelope.new("alpha", "beta", "command", "x", action="ping")
    message = hive.IncomingMessage("hive/beta/command", said.encode(), False, None, lambda: None)
    rig.node.deliver(message.replace(earlier=earlier))
    if earlier:
        assert rig.answer_to(said).text == "pong"
    rig.turn()
    assert bool(rig.started()) is earlier


def test_that_a_node_is_of_the_other_kind_is_said_once(rig: Rig) -> None:
    as_checked(rig)
    for sender in ("alpha", "alpha", "gamma"):
        rig.say("command", "ping", sender=sender)
    (line,) = rig.events("a node of the other kind")
    assert (line["level"], line["from"]) == ("warning", "alpha")
    assert line["note"].startswith('[mqtt] senders is "checked" there, and "open" here')
    assert not rig.events("dropped", level="warning") and not rig.started()
    assert len(rig.events("dropped", level="debug")) == 3


def test_a_topic_that_names_a_sender_is_of_the_other_kind_in_an_open_hive(rig: Rig) -> None:
    said = hive.Envelope.new("alpha", "beta", "command", "x", action="ping")
    rig.hand_in("hive/beta/command/alpha", said.encode())
    assert rig.answer_to(said).text == "pong"
    assert len(rig.events("a node of the other kind")) == 1
    assert rig.works() and len(rig.events("a node of the other kind")) == 1


def test_each_message_has_the_line_that_it_deserves(
    rig_of: Make, main_agent: hive.InstanceConfig
) -> None:
    rig = rig_of([main_agent])
    before = len(rig.events())
    for _ in range(2):
        rig.say("command", "ping", id="run")
    rig.say("status", id="note", urgency="later")
    rig.say("status", id="wake")
    rig.say("command", "ping", id="refuse", to="gamma")
    rig.beat("alpha")
    rows = [row for row in rig.events()[before:] if row["event"] in ("received", "dropped")]
    shown = [(row["event"], row["level"], row["id"], row.get("note")) for row in rows[:5]]
    assert shown == [
        ("received", "info", "run", None),
        ("dropped", "debug", "run", None),
        ("received", "debug", "note", "a status that is not urgent"),
        ("received", "info", "wake", None),
        ("dropped", "warning", "refuse", None),
    ]
    assert rows[5]["level"] == "debug" and rows[5]["ch"] == "heartbeat"
    assert rows[0].items() >= {"ch": "command", "from": "alpha", "to": "beta"}.items()
    assert rows[0]["action"] == "ping"
    assert [row["id"] for row in rig.events("text")] == ["run", "note", "wake"]


def test_an_urgent_word_that_nobody_is_told_is_in_the_log(rig: Rig) -> None:
    rig.say("alert")
    (line,) = rig.events("received", level="info")
    assert line["note"] == "there is no agent to tell"


def test_a_journal_that_is_full_takes_nothing_to_do(
    rig_of: Make, main_agent: hive.InstanceConfig
) -> None:
    rig = rig_of([main_agent])
    rig.journal.full = True
    asked = [rig.say("command", "ping"), rig.say("command"), rig.say("status")]
    for one in asked[:2]:
        assert rig.answer_to(one).text.endswith("busy: the journal is full of what is not done yet")
    rig.turn()
    assert not rig.answers_to(asked[2]) and not rig.started() and not rig.journal.tasks()
    rig.journal.full = False
    assert rig.works()


def test_an_alert_to_one_announces_no_loss(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    told = note_calls(monkeypatch, rig.node.node.members, "mark_announced")
    rig.say("alert", corr="c-1")
    rig.say("status", to="all", corr="c-1")
    assert not told
    rig.say("alert", to="all", corr="c-1")
    assert told == [("c-1", "alpha")]


def test_the_same_agents_and_handlers_need_no_new_context(rig: Rig) -> None:
    node = rig.node.node
    before = node.context()
    assert node.context() is before
    rig.handler("more", "true")
    rig.node.work.look_for_handlers()
    assert node.context() is not before and "more" in node.context().handlers


# What goes out


def test_what_cannot_wait_any_more_is_an_error_in_the_log(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, word = rig.node.node, hive.Envelope.new("beta", "alpha", "status", "x")
    answer = hive.Envelope.new("alpha", "beta", "command", "x").reply("beta", "y")
    monkeypatch.setattr(hive, "MAX_OUTBOX", 0)
    node.send(word)
    node.send(answer)
    lines = rig.events("not sent", level="error")
    assert [(row["ch"], row["to"], row["why"]) for row in lines] == [
        ("status", "alpha", "too much waits for the broker"),
        ("response", "alpha", "too much waits for alpha already"),
    ]
    assert [row["id"] for row in lines] == [word.id, answer.id]
    assert node._send_for_command(word) == "0 messages wait for the broker already"
    node.keep_result(word, {"action": "ping", "status": "ok"})
    (line,) = rig.events("result not published", level="error")
    assert (line["id"], line["why"]) == (word.id, "too much waits already")
    assert rig.journal.outbox_size == 0


def test_what_has_a_time_to_live_is_published_until_then(rig: Rig) -> None:
    rig.disconnect()
    for ttl in (100, None):
        rig.node.node.send(hive.Envelope.new("beta", "alpha", "status", "x", ttl=ttl))
    first, second = rig.journal.unacknowledged(2)
    assert abs((first.until or 0) - time.time() - 100) < 30 and second.until is None
    assert [row["level"] for row in rig.events("sent")] == ["info", "info"]
    rig.node.node.send(hive.Envelope.new("beta", "alpha", "status", "x"), "a note")
    assert rig.events("sent")[-1]["level"] == "debug"


def test_only_what_is_asked_and_wants_an_answer_is_waited_for(rig: Rig) -> None:
    for ch in ("command", "sync", "status", "alert", "response"):
        said = hive.Envelope.new("beta", "alpha", ch, "x", id=ch, corr=f"c-{ch}")
        assert rig.node.node._send_for_command(said) == ""
    rig.node.node.send(hive.Envelope.new("beta", "alpha", "command", "x", corr="c-own"))
    assert [one["id"] for one in rig.journal.pending_requests()] == ["c-command", "c-sync"]


@pytest.mark.parametrize(
    ("in_seconds", "wait"), [(5, 5.1), (-20, 0.1), (59.8, 59.9), (500, 60.0), (None, None)]
)
def test_questions_are_looked_at_when_the_next_is_overdue_or_in_a_minute(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, in_seconds: float | None, wait: float | None
) -> None:
    node, before = rig.node.node, timers(rig)
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)
    due = None if in_seconds is None else 1_000_000.0 + in_seconds
    monkeypatch.setattr(rig.journal, "next_due", lambda: due)
    for _ in range(2):  # the second time in place of the first
        node._watch_pending_requests()
        assert sorted([*before, *([] if wait is None else [wait])]) == timers(rig)
    node.stopping = True
    node._watch_pending_requests()
    assert timers(rig) == before
    node.stopping = False


def test_who_asked_and_is_gone_is_told_that_nobody_answered(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, now = rig.node.node, float(int(time.time()))
    told = note_calls(monkeypatch, node, "tell_own_agents")
    waiting = {"c-1"}
    monkeypatch.setattr(node.requests, "waits", waiting.__contains__)
    for n in (1, 2):
        said = hive.Envelope.new("beta", "alpha", "command", "x", corr=f"c-{n}", ttl=5, now=now - 9)
        row = rig.journal.record(hive.Event.SENT, said, now - 9) or 0
        rig.journal.add_pending_request(said, row)
    rig.turn()
    monkeypatch.setattr(time, "time", lambda: now)
    node._check_pending_requests()
    assert rig.journal.questions == 0 and node._committing
    ((alert, note),) = told
    assert (alert.sender, alert.to, alert.ch, alert.corr) == ("beta", "beta", "alert", "c-2")
    assert alert.text == "no answer from alpha to what was asked 9 s ago"
    assert note == "its time to live was over"
    (line,) = rig.events("no answer")
    assert (line["level"], line["id"], line["to"]) == ("warning", "c-2", "alpha")
    said = hive.Envelope.new("beta", "alpha", "command", "x", corr="c-3", ttl=20, now=now)
    rig.journal.add_pending_request(said, rig.journal.record(hive.Event.SENT, said, now) or 0)
    before = timers(rig).count(20.1)
    node._check_pending_requests()
    assert timers(rig).count(20.1) == before + 1, "the next one in its time"


def test_a_result_that_is_too_large_is_kept_cut_and_other_faults_are_only_told(rig: Rig) -> None:
    node, topic = rig.node.node, "hive/meta/beta/count"
    rig.wire.limit = 300
    document = {"action": "count", "result": "x" * 5000, "error": ""}
    message = hive.OutgoingMessage(topic, hive.encode_json(document), retain=True, n=1)
    node._document_refused(message, 0x87, "Not authorized")
    node._document_refused(message.replace(n=0), hive.PACKET_TOO_LARGE, "too large")
    no_result = hive.encode_json({"state": 1})
    node._document_refused(message.replace(payload=no_result), hive.PACKET_TOO_LARGE, "too large")
    node.commit()
    assert rig.kept("beta", "count") == []
    told = [(row["topic"], row["why"]) for row in rig.events("document not published")]
    assert told == [(topic, "Not authorized"), (topic, "too large"), (topic, "too large")]
    node._document_refused(message, hive.PACKET_TOO_LARGE, "too large")
    node.commit()
    (kept,) = rig.kept("beta", "count")
    assert kept["truncated"] is True and kept["result"].startswith("xxx")
    assert len(hive.encode_json(kept)) + len(topic) <= 300


def test_what_was_not_published_is_counted_and_answered_by_nobody(rig: Rig) -> None:
    node = rig.node.node
    rig.wire.silent = True
    said = hive.Envelope.new("beta", "alpha", "command", "x")
    assert node._send_for_command(said) == ""
    rig.turn()
    (message,) = [one for one in rig.wire.unacknowledged if one.id == said.id]
    rig.wire.acknowledge(message, 0x87, "Not authorized")
    assert node._outcomes["command", "unpublished"] == 1 and node._outcomes["command", "sent"] == 1
    assert rig.journal.questions == 0
    (line,) = rig.events("not published")
    assert (line["level"], line["id"], line["to"]) == ("error", said.id, "alpha")
    notes = [row["note"] for row in rig.journal.exchange(said.id)]
    assert notes == ["", "not published: not authorized", "it waited for the broker"]


def test_a_command_that_is_gone_leaves_the_news_to_the_agents(
    rig_of: Make, main_agent: hive.InstanceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of([main_agent])
    told = note_calls(monkeypatch, rig.node.node, "tell_own_agents")
    said = hive.Envelope.new("beta", "alpha", "command", "x", corr="c-1")
    for there in (True, False):
        rig.node.node._envelope_refused(said, 0x87, "not authorized", there)
    ((alert, note),) = told
    assert (alert.sender, alert.to, alert.ch, alert.corr) == ("beta", "beta", "alert", "c-1")
    assert alert.text == "not published to alpha: not authorized"
    assert note == "it waited for the broker"


# The end of a turn, and now and then


def test_the_journal_is_looked_after_twice_a_minute_or_at_once_while_there_is_much_to_forget(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = rig.node.node
    assert 30.0 in timers(rig), "from the start"
    back = note_calls(monkeypatch, rig.journal, "return_to_disk")
    repeats = note_calls(monkeypatch, rig.node.log, "count_repeats")
    limited = note_calls(monkeypatch, node._rate_limit, "report")
    for more, wait in ((True, 0.1), (False, 30.0)):
        before = timers(rig)
        monkeypatch.setattr(rig.journal, "prune", lambda now, more=more: more)
        node._maintain_journal()
        assert timers(rig).count(wait) == before.count(wait) + 1
        assert node._committing
        node.commit()
    assert (len(back), len(repeats), limited) == (2, 2, [(rig.node.log, rig.clock.now)] * 2)


def test_a_turn_is_committed_once_before_anybody_hears_of_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, order = rig.node.node, list[str]()
    for of, name in (
        *((rig.journal, "commit"), (rig.wire, "send_queued")),
        *((node.requests, "show_news"), (node.shared, "look_soon")),
    ):
        monkeypatch.setattr(of, name, lambda name=name: order.append(name))
    node.commit_soon(lambda: order.append("told"))
    node.commit_soon()
    assert order == []
    rig.loop.step()
    assert order == ["commit", "told", "send_queued", "show_news", "look_soon"]


# The journal that others read


@pytest.mark.parametrize(
    ("note", "shown"),
    [
        ("ok, 12 ms", "ok, 12 ms"),
        ("error: exit 1: the key is 1234", "error"),
        ("main not told (1234)", "main not told"),
        ("a; b", "a"),
        ("receipt: told main", "receipt: told main"),
        ("", ""),
    ],
)
def test_of_a_note_its_begin_is_shown(note: str, shown: str) -> None:
    row = {"n": 5, "note": note, "envelope": None}
    assert hive.shared_row(row, texts=True, private=True) == {**row, "note": shown}


SECRET = '{"private": true, "text": "1234"}'


@pytest.mark.parametrize(
    ("document", "texts", "private", "text"),
    [
        ({"text": "hello"}, True, False, "hello"),
        ({"text": "hello"}, False, False, None),
        ({"text": "hello"}, False, True, None),
        ({"text": "x" * 1000}, True, False, "x" * 1000),
        ({"text": "x" * 1001}, True, False, "x" * 999 + "…"),
        ({"text": "hello", "private": True}, True, False, None),
        ({"text": "hello", "private": True}, True, True, "hello"),
        ({"text": "hello", "private": "yes"}, True, False, "hello"),
        ({"text": SECRET}, True, False, None),
        ({"text": SECRET}, True, True, SECRET),
        ({"text": SECRET.replace("true", "1")}, True, False, SECRET.replace("true", "1")),
    ],
)
def test_which_texts_are_shown(
    document: dict[str, Any], texts: bool, private: bool, text: str | None
) -> None:
    shown = hive.shared_row({"note": "", "envelope": document}, texts, private)["envelope"]
    assert shown == (None if text is None else {"text": text})


def test_eight_questions_of_a_node_wait_and_sixty_four_of_all(rig_of: Make) -> None:
    names = [f"node{n}" for n in range(9)]
    rig = shared(rig_of, *names)
    assert rig.works()
    waiting, newest = rig.node.node.shared._waiting, rig.journal.newest
    for name in names[:8]:
        for n in range(9):
            ask(rig, name, after=newest, hold=60, last=n)
        assert sum(one.asker == name for one in waiting) == 8
    assert len(waiting) == 64
    ask(rig, names[8], after=newest, hold=60)
    assert len(waiting) == 64 and sum(one.asker == "node0" for one in waiting) == 7
    assert not rig.events("journal is read"), "who reads on has been told of"
    ask(rig, "node0")
    assert [row["by"] for row in rig.events("journal is read")] == ["node0"]


def test_looking_takes_a_twentieth_of_the_time(
    rig_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = shared(rig_of, "alpha")
    rows = rig.journal.rows

    def slow(*said: Any) -> list[dict[str, Any]]:
        rig.clock.now += 0.5
        return rows(*said)

    monkeypatch.setattr(rig.journal, "rows", slow)
    first = ask(rig)
    assert rig.answers_to(first)
    began = rig.clock.now - 0.5
    second = ask(rig)
    rig.clock.now = began + 9.9
    rig.turn()
    assert not rig.answers_to(second)
    rig.clock.now = began + 10
    rig.turn()
    assert rig.answers_to(second)


def test_a_page_that_cannot_be_sent_is_asked_for_again(
    rig_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = shared(rig_of, "alpha")
    monkeypatch.setattr(rig.journal, "takes_answer", lambda topic: False)
    assert not rig.answers_to(ask(rig))
    monkeypatch.undo()
    assert rig.answers_to(ask(rig))


def test_a_page_is_of_no_use_after_a_minute(rig_of: Make) -> None:
    rig = shared(rig_of, "alpha")
    rig.disconnect()
    ask(rig)
    (page,) = rig.journal.unacknowledged(5)
    assert abs((page.until or 0) - time.time() - 60) < 30


def test_a_question_that_is_held_is_answered_when_its_time_is_over(rig_of: Make) -> None:
    rig = shared(rig_of, "alpha")
    assert rig.works()
    newest = rig.journal.newest
    question = ask(rig, after=newest, hold=5)
    rig.advance(4.5)
    assert not rig.answers_to(question)
    rig.advance(0.5)
    (answer,) = rig.answers_to(question)
    assert json.loads(answer.text) == {"rows": [], "after": newest, "more": False}


def test_in_a_checked_hive_what_came_on_a_topic_of_something_else_is_dropped(rig: Rig) -> None:
    said = hive.Envelope.new("alpha", "beta", "command", "x", action="ping")
    as_checked(rig).hand_in("other/beta/command", said.encode())
    (line,) = rig.events("dropped")
    assert line["why"] == "its topic disagrees with to and ch" and rig.acked == 1


@pytest.mark.parametrize("how", [{}, {"now": False}])
def test_what_a_node_itself_has_to_say_is_said_at_once(
    rig_of: Make, main_agent: hive.InstanceConfig, how: dict[str, Any]
) -> None:
    rig = rig_of([main_agent])
    note_calls(monkeypatch := pytest.MonkeyPatch(), rig.node.work._agents["main"], "wake")
    alert = hive.Envelope.new("beta", "beta", "alert", "x")
    rig.node.node.tell_own_agents(alert, "scheduled", **how)
    monkeypatch.undo()
    (task,) = rig.journal.tasks()
    assert (task.agent, task.urgent, task.note) == ("main", not how, "scheduled")
    assert [row["note"] for row in rig.journal.rows({})] == ["scheduled"]
    assert rig.node.node._committing


def test_a_flood_in_a_checked_hive_is_counted(rig_of: Make) -> None:
    rig = as_checked(rig_of(node={"sender_rate": 1, "sender_burst": 1}))
    counts, before = rig.node.node.counts, dict(rig.node.node.counts)
    for _ in range(3):
        rig.hand_in("hive/beta/nonsense/mallory", b"rubbish")
        rig.hand_in("hive/beta/status/mallory", b"rubbish")
    new = {name: n - before[name] for name, n in counts.items()}
    assert new == {
        **dict.fromkeys(counts, 0),
        "received": 6,
        "dropped": 5,
        "refused": 5,
        "invalid": 1,
    }
    outcomes = rig.node.node._outcomes
    assert (outcomes["none", hive.Do.DROP], outcomes["status", hive.Do.DROP]) == (2, 3)
    assert outcomes["none", "invalid"] == 1
    (line, *_) = rig.events("dropped")
    assert (line["level"], line["ch"], line["from"]) == ("warning", "status", "mallory")
    assert line["why"] == "its sender sends too many"


def test_a_question_is_answered_by_the_first_answer(rig: Rig) -> None:
    said = hive.Envelope.new("beta", "alpha", "command", "x")
    assert rig.node.node._send_for_command(said) == "" and rig.journal.questions == 1
    rig.say("status", corr=said.id)
    rig.say("response")
    assert rig.journal.questions == 1
    rig.say("response", corr=said.id)
    assert rig.journal.questions == 0 and rig.node.node._committing


def test_only_an_action_that_is_not_known_makes_it_look_for_handlers(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = note_calls(monkeypatch, rig.node.work, "look_again")
    rig.say("status", urgency="later")
    rig.say("command", "ping")
    rig.tell(hive.Envelope.new("alpha", "beta", "command", "x", action="other"), retained=True)
    assert not looks
    rig.say("command", "other")
    assert len(looks) == 1


def test_what_the_broker_has_taken_is_forgotten_at_the_end_of_the_turn(rig: Rig) -> None:
    node = rig.node.node
    for message in (
        hive.OutgoingMessage("hive/meta/beta/ping", b"{}"),
        hive.OutgoingMessage("hive/alpha/status", b"x", id="m-1"),
    ):
        rig.turn()
        assert not node._committing
        node.published(message, 0, "Success")
        assert node._committing
