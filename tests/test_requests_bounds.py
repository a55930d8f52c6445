"""Requests, at their edges: asked in this process, by callers in memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from rig import Rig
from test_node_bounds import note_calls
from test_requests import own

import hive

Make = Callable[..., Rig]


class Caller:
    """A command that asks, in memory."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.on_close: list[Callable[[], object]] = []
        self.busy = False
        self.heard: list[Mapping[str, Any]] = []

    def send(self, document: Mapping[str, Any]) -> None:
        self.heard.append(document)

    def close(self) -> None:
        for call in [*self.on_close]:
            call()

    def ask(self, do: str, **more: Any) -> dict[str, Any] | None:
        return self.rig.node.node.requests.handle({"do": do, **more}, self)

    def told(self, do: str, **more: Any) -> dict[str, Any]:
        """An answer that comes at once."""
        answer = self.ask(do, **more)
        assert answer is not None
        return answer

    def later(self, do: str, **more: Any) -> Mapping[str, Any]:
        """An answer that comes at the end of the turn, and not before."""
        before = len(self.heard)
        assert self.ask(do, **more) is None and len(self.heard) == before
        self.rig.turn()
        return self.heard[before]


@pytest.fixture
def caller(rig: Rig) -> Caller:
    return Caller(rig)


# What may stand in a request


@pytest.mark.parametrize(
    ("filters", "taken"),
    [
        (dict.fromkeys(("from", "to", "node", "corr", "ch", "action"), "x"), True),
        (dict.fromkeys(hive.LOG_FILTERS, 5), True),
        ({}, True),
        ({"since": 0}, True),
        ({"since": hive.MAX_TS}, True),
        ({"since": hive.MAX_TS + 1}, False),
        ({"since": -1}, False),
        ({"before": 2**53}, True),
        ({"before": 2**53 + 2}, False),
        ({"before": hive.MAX_TS + 1}, True),
        ({"corr": "a:b"}, True),  # an id, though no name
        ({"from": "a/b"}, False),
        ({"from": "x", "to": None}, False),
        ({"from": None, "to": "x"}, False),
        ({"colour": "x"}, False),
        ("ch", False),
    ],
)
def test_what_a_filter_may_be(filters: object, taken: bool) -> None:
    field = hive.LOG_FIELDS["filters"]
    if taken:
        assert field.read("filters", filters) == filters
    else:
        with pytest.raises(hive.UsageError, match=r"^filters: .* is not an object of ch, from"):
            field.read("filters", filters)


@pytest.mark.parametrize(
    ("check", "given", "taken"),
    [
        (hive.row_number, 0, 0),
        (hive.row_number, 2**53, 2**53),
        (hive.row_number, 2**53 + 2, None),
        (hive.row_number, -1, None),
        (hive.task_numbers, [0] * 50, [0] * 50),
        (hive.task_numbers, [0] * 51, None),
        (hive.task_numbers, [1, "2"], None),
        (hive.task_numbers, "12", None),
        (hive.fact(3).check, "abcd", "abc"),
        (hive.fact(3).check, "a\n", "a?"),
        (hive.fact(3).check, 5, None),
        (hive.target_of, "beta", None),
        (hive.target_of, "any", hive.Target(one=True)),
        (hive.envelope_object, "{}", None),
    ],
)
def test_what_a_field_takes(check: Callable[[Any], Any], given: object, taken: object) -> None:
    if taken is None:
        with pytest.raises(ValueError):
            check(given)
    else:
        assert check(given) == taken


DEFAULTS: dict[str, dict[str, Any]] = {
    "send": {"wait": False},
    "attach": {"exact": False, "client": "", "directory": "", "branch": "", "pid": 0},
    "inbox": {"limit": 10, "exchange": ""},
    "targets": {"action": ""},
    "read_journal": {"filters": {}, "after": 0, "last": 0, "hold": 0},
    "follow": {"filters": {}, "after": 0, "last": 0},
    "exchange": {"after": 0},
}
REQUIRED = {
    "send": {"envelope"},
    "read": {"envelope"},
    "attach": {"name"},
    "inbox": {"agent"},
    "mark": {"agent", "tasks", "as"},
    "targets": {"to"},
    "read_journal": {"node", "exchange"},
    "message": {"id"},
}


@pytest.mark.parametrize("name", hive.REQUESTS)
def test_what_need_not_be_said_has_a_meaning(name: str) -> None:
    request = hive.REQUESTS[name]
    must = {field for field, one in request.fields.items() if one.required}
    if name in REQUIRED:
        assert must == REQUIRED[name]
    if name in DEFAULTS:
        found = {field: one.default for field, one in request.fields.items() if field not in must}
        assert found == DEFAULTS[name]
    for one in must:
        with pytest.raises(hive.UsageError, match=f"^{one}: missing$"):
            request.fields[one].read(one, None)
    looks_back = {"log", "message", "exchange", "pending"}
    assert request.looks_back is (name in looks_back), "answered though no node runs"


@pytest.mark.parametrize(("hold", "fits"), [(60, True), (61, False)])
def test_a_question_for_a_journal_is_held_for_a_minute_at_most(hold: int, fits: bool) -> None:
    with pytest.raises(hive.UsageError) if not fits else pytest.MonkeyPatch.context():
        assert hive.PAGE_FIELDS["hold"].read("hold", hold) == hold


@pytest.mark.parametrize(("limit", "fits"), [(0, False), (1, True), (50, True), (51, False)])
def test_so_many_messages_are_read_at_once(limit: int, fits: bool) -> None:
    with pytest.raises(hive.UsageError) if not fits else pytest.MonkeyPatch.context():
        hive.REQUESTS["inbox"].fields["limit"].read("limit", limit)


# What is not finished


def test_all_that_is_not_finished_is_shown_by_its_first_words(
    rig_of: Make, main_agent: hive.InstanceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of([main_agent.replace(command=("true",))])
    rig.disconnect()
    monkeypatch.setattr(hive, "MAX_ROWS", 2)
    long = "x" * 300
    for n in range(3):
        row = rig.journal.record(
            hive.Event.RECEIVED,
            hive.Envelope.new(
                "alpha", "beta", "command", long, id=f"in-{n}", action="ping" if n else None, now=5
            ),
            1.0,
        )
        task = rig.journal.add_task(row or 0, "" if n else "main")
        if n:
            rig.journal.start_tasks([task])
        rig.node.node._send_for_command(own(f"out-{n}", long))
    found = Caller(rig).told("pending")
    task_ = {"from": "alpha", "ch": "command", "since": 5, "text": "x" * 200}
    assert found["tasks"] == [
        {"id": "in-0", "action": None, "agent": "main", "began": False, **task_},
        {"id": "in-1", "action": "ping", "agent": None, "began": True, **task_},
    ]
    size = len(own("out-0", long).encode())
    first = {"topic": "hive/alpha/command", "id": "out-0", "text": "x" * 200}
    assert found["outbox"][0].items() >= first.items()
    assert abs(found["outbox"][0]["bytes"] - size) < 20 and len(found["outbox"]) == 2
    assert found["outbox_size"] == 3
    assert [one["id"] for one in found["questions"]] == ["out-0", "out-1"]


# Sending


def test_who_sends_hears_who_could_not_be_woken_and_who_is_away(rig: Rig, caller: Caller) -> None:
    rig.beat("alpha")
    roster = {"agents": [], "away": ["reviewer"]}
    rig.hand_in("hive/meta/alpha/roster", json.dumps(roster).encode(), retained=True)
    said = caller.later("send", envelope=own("m-1").document())
    assert said == {"queued": True, "connected": True, "agentless": True, "away": False}
    for more in ({"action": "ping"}, {"ch": "status"}):
        assert "agentless" not in caller.later(
            "send", envelope=own(f"{more}"[2:4], **more).document()
        )
    said = caller.later("send", envelope=own("m-4", to="reviewer").document())
    assert (said["agentless"], said["away"]) == (False, True)
    rig.disconnect()
    assert caller.later("send", envelope=own("m-5").document())["connected"] is False


def test_who_has_gone_hears_of_nothing_and_leaves_nothing(rig: Rig, caller: Caller) -> None:
    requests = rig.node.node.requests
    rig.wire.silent = True
    caller.later("send", envelope=own("m-1").document(), wait=True)
    assert requests.waits("m-1") and not requests.waits("m-2") and not requests.waits(None)
    caller.ask("watch")
    caller.ask("watch")
    caller.ask("follow")
    assert len(caller.on_close) == 4, "each once"
    caller.close()
    kept = (requests._senders, requests._listeners, requests._watchers, requests._followers)
    assert kept == ({}, {}, {}, {})
    rig.wire.silent = False
    before = len(caller.heard)
    rig.say("response", corr="m-1")
    rig.turn()
    assert len(caller.heard) == before


def test_whoever_sent_it_hears_what_the_broker_said_once(rig: Rig, caller: Caller) -> None:
    requests = rig.node.node.requests
    caller.later("send", envelope=own("m-1").document())
    message = hive.OutgoingMessage("hive/alpha/command", b"x", id="m-1")
    assert caller.heard[-1] == {
        **{"published": 0, "words": "Success", "topic": "hive/alpha/command", "id": "m-1"}
    }
    assert caller.on_close == [] and requests._senders == {}
    assert not requests.published(message, 0, "Success"), "nobody is there any more"


def test_a_command_reads_by_itself_only_what_it_waits_for(rig: Rig, caller: Caller) -> None:
    assert caller.later("sent", envelope=own("m-1").document(), wait=True) == {"ok": True}
    answer = own("a-1", sender="alpha", to="beta", ch="response", corr="m-1").document()
    for who, said in ((Caller(rig), answer), (caller, {**answer, "corr": "m-2"})):
        assert who.told("read", envelope=said) == {
            "error": "a-1: this command does not wait for it"
        }
    assert rig.journal.questions == 1
    assert caller.later("read", envelope=answer) == {"ok": True}
    assert rig.journal.questions == 0
    (row,) = rig.journal.rows({"from": "alpha"})
    assert (row["event"], row["note"]) == ("in", "somebody waits for it")


# Watching


def test_who_watches_is_told_once_of_any_number_of_changes_until_it_asks_again(
    rig: Rig, caller: Caller
) -> None:
    requests = rig.node.node.requests
    other = Caller(rig)
    states = caller.told("watch")
    assert states == other.told("states") | {"age": states["age"]} and "complete" in states
    for _ in range(3):
        requests.note_change()
    assert caller.heard == [{"changed": True}] and other.heard == []
    caller.ask("watch")
    requests.note_change()
    assert caller.heard == [{"changed": True}] * 2


def test_who_follows_is_behind_whom_it_has_seen(rig: Rig, caller: Caller) -> None:
    for n in range(3):
        rig.say("status", id=f"m-{n}", urgency="later")
    rig.turn()
    rows = caller.told("follow", last=2)["rows"]
    assert [row["id"] for row in rows] == ["m-1", "m-2"]
    nobody = Caller(rig)
    assert nobody.told("follow", filters={"from": "nobody"}, after=rows[0]["n"]) == {"rows": []}
    rig.turn()
    assert caller.heard == nobody.heard == []
    caller.busy = True
    rig.say("status", id="m-3", urgency="later")
    rig.turn()
    assert caller.heard == []
    caller.busy = False
    rig.say("status", id="m-4", urgency="later")
    rig.turn()
    assert [row["id"] for one in caller.heard for row in one["rows"]] == ["m-3", "m-4"]


# What is known


def test_what_was_asked_in_the_last_ten_minutes_keeps_a_node_busy(
    rig: Rig, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    since = note_calls(monkeypatch, rig.journal, "owed", {})
    rig.hear_state("gamma", status="offline", last_seen=int(time.time()) - 100)
    rig.hear_state("alpha", status="online", last_seen=int(time.time()))
    said = caller.told("targets", to="*a")
    assert abs(time.time() - 600 - since[0][0]) < 30
    assert "alpha" in said["names"] and "beta" not in said["away"] and "connected" in said
    assert said["away"]["gamma"]["status"] == "offline"
    assert abs(said["away"]["gamma"]["age"] - 100) < 30


def test_traffic_is_that_of_the_last_hour(
    rig: Rig, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    since = note_calls(monkeypatch, rig.journal, "traffic", [])
    assert caller.told("history")["traffic"] == []
    assert abs(time.time() - 3600 - since[0][0]) < 30


def test_a_daemon_says_who_it_is(rig: Rig, caller: Caller) -> None:
    said = caller.told("doctor")
    assert (said["node"], said["version"], said["connected"]) == ("beta", hive.__version__, True)


def test_a_command_that_reads_on_waits_once(rig: Rig, caller: Caller) -> None:
    given = {"node": "alpha", "exchange": "e-1", "after": 5, "filters": {"ch": "status"}}
    ids = [caller.told("read_journal", **given)["id"] for _ in range(2)]
    assert len({*ids}) == 2 and len(caller.on_close) == 1
    rig.turn()
    first, _ = rig.sent("command")
    assert (first.id, first.to, first.action, first.corr) == (
        *(ids[0], "alpha", hive.READ_JOURNAL, "e-1"),
    )
    asked = {"filters": {"ch": "status"}, "after": 5, "last": 0, "hold": 0}
    assert json.loads(first.text) == asked
    answer = rig.say("response", hive.READ_JOURNAL, corr="e-1", text="{}")
    rig.turn()
    assert caller.heard == [{"answer": answer.document()}]


def test_what_a_session_has_read_is_said_when_it_is_on_disk(rig: Rig, caller: Caller) -> None:
    assert caller.told("attach", name="reviewer")["agent"] == "reviewer"
    rig.say("command", to="reviewer", text="look")
    rig.turn()
    (message,) = caller.told("inbox", agent="reviewer")["messages"]
    marked = {"agent": "reviewer", "tasks": [message["task"]], "as": "read"}
    assert caller.later("mark", **marked) == {"ok": True}
    assert caller.told("sessions")["sessions"][0]["unread"] == 0
    assert caller.told("metrics")["metrics"]["hive_sessions"] == [[1]]


def test_what_is_asked_wrongly_is_told_why(caller: Caller) -> None:
    assert caller.told("inbox", agent="nobody", limit=1) == {
        "error": "no session nobody here; none is attached"
    }
    assert caller.told("dance") == {"error": "no such request: 'dance'"}
    assert caller.told("message", id="m-1") == {
        "error": "m-1: not known here; the last days are: hive log"
    }


def test_a_filter_for_an_exchange_takes_any_id_of_it(rig: Rig) -> None:
    rig.say("status", id="answer-1", corr="question-1", urgency="later")
    for said, meant in (
        ({"corr": "answer-1"}, {"corr": "question-1"}),
        ({"corr": "answ", "ch": "status"}, {"corr": "question-1", "ch": "status"}),
        ({"corr": "nothing"}, {"corr": "nothing"}),
        ({"ch": "status"}, {"ch": "status"}),
    ):
        assert hive.whole_filters(rig.journal, said) == meant
