"""Requests: everything that a command may ask of its node, through a real socket."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE
from rig import Rig

import hive


@pytest.fixture
def rig(rig_of: Callable[..., Rig]) -> Rig:
    """The node beta with an agent that is told everything and says nothing."""
    return rig_of([hive.InstanceConfig("main", openclaw_cmd=("true",))])


class Caller:
    """A command at the node's door, that the test turns."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.client = rig, hive.ControlClient(rig.state_dir / "door", "beta")

    def ask(self, **request: object) -> dict[str, Any]:
        return self.rig.ask(self.client, **request)

    def hear(self, key: str) -> Any:
        """What the next line says that says this."""

        def heard() -> dict[str, Any]:
            line = self.client.receive(0.001) or {}
            return line if key in line else {}

        return self.rig.until(f"a line with {key}", heard)[key]

    def hears_nothing(self) -> bool:
        self.rig.turn()
        return self.client.receive(0.01) is None


@pytest.fixture
def caller_of(rig: Rig) -> Iterator[Callable[[], Caller]]:
    made: list[Caller] = []

    def make() -> Caller:
        made.append(Caller(rig))
        return made[-1]

    yield make
    for caller in made:
        caller.client.close()
    rig.turn()


@pytest.fixture
def caller(caller_of: Callable[[], Caller]) -> Caller:
    return caller_of()


def own(id: str, text: str = "hello", **more: Any) -> hive.Envelope:
    """A message of this node."""
    more = {"sender": "beta", "to": "alpha", "ch": "command", **more}
    return hive.Envelope.new(text=text, id=id, **more)


def acknowledge(rig: Rig, envelope: hive.Envelope, code: int, words: str) -> None:
    """Let the broker, which says nothing by itself (`wire.silent`), say this about it."""
    (one,) = [p for p in rig.wire.unacknowledged if p.payload == envelope.encode()]
    rig.wire.acknowledge(one, code, words)
    rig.turn()


def test_a_message_that_the_agent_was_told_is_shown_whole(rig: Rig, caller: Caller) -> None:
    message = rig.say("command", text="ä \u2028\n" * 10_000, corr="c-1", ttl=60)
    shown = caller.ask(do="message", id=message.id)
    assert hive.Envelope.check(shown["envelope"]) == message
    assert (shown["event"], shown["from"], shown["to"]) == ("in", "alpha", "beta")


def test_a_whole_exchange_is_shown_whoever_took_it(rig: Rig, caller: Caller) -> None:
    message = rig.say("command", "ping")
    answer = rig.answer_to(message)
    rig.turn()
    for id in (message.id, answer.id):
        rows = caller.ask(do="exchange", id=id)["rows"]
        assert [(row["event"], row["id"]) for row in rows] == [
            ("in", message.id),
            ("did", None),
            ("out", answer.id),
        ]
        assert rows[1]["note"].startswith("ok, ") and rows[1]["envelope"] is None


IDS = ("5f3a-one", "5f3a-two", "5f3a", "9c1d-question", "lost:gamma")


def messages_in(page: dict[str, Any]) -> list[str]:
    """The ids of its messages; what is done about them may come between two looks."""
    return [row["id"] for row in page.get("rows", []) if row["event"] != "did"]


def meant_by(caller: Caller, said: str) -> str:
    """What the node takes this for: the same for all that ask with an id."""
    exchange, shown = caller.ask(do="exchange", id=said), caller.ask(do="message", id=said)
    assert "error" in exchange or exchange["rows"][0]["id"] == shown["id"]
    for do in ("log", "follow"):
        filtered = caller.ask(do=do, filters={"corr": said})
        assert filtered.get("error") == exchange.get("error")
        assert messages_in(filtered) == messages_in(exchange)
    return str(shown.get("id") or shown["error"])


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("9c1d", "9c1d-question"),
        ("9c1d-question", "9c1d-question"),
        ("5f3a", "5f3a"),
        ("5f3a-o", "5f3a-one"),
        ("5f3a-", "5f3a-: which one? 5f3a-one, 5f3a-two"),
    ],
)
def test_the_beginning_of_an_id_is_the_id_where_one_is_meant(
    rig: Rig, caller: Caller, said: str, meant: str
) -> None:
    for id in IDS:
        rig.say("status", id=id)
    assert meant_by(caller, said) == meant


@pytest.mark.parametrize("said", ["9c1", "9", "9c1d-x", "nosuch", "5F3A", "5f3_"])
def test_what_is_not_known_is_named(rig: Rig, caller: Caller, said: str) -> None:
    for id in IDS:
        rig.say("status", id=id)
    error = f"{said}: not known here; the last days are: hive log"
    assert caller.ask(do="message", id=said) == {"error": error}
    assert caller.ask(do="exchange", id=said) == {"rows": []}
    assert caller.ask(do="log", filters={"corr": said}) == {"rows": []}


def test_a_beginning_that_means_many_lists_a_few(rig: Rig, caller: Caller) -> None:
    for i in range(10, 20):
        rig.say("status", id=f"same-{i}")
    error = "same: which one? same-10, same-11, same-12, same-13, same-14, ..."
    assert caller.ask(do="message", id="same") == {"error": error}


def test_an_exchange_is_found_by_the_id_of_any_message_and_followed_as_it_was(
    rig: Rig, caller: Caller
) -> None:
    rig.say("status", id="answer-1", corr="question-1")
    rows = [
        caller.ask(do="log", filters={"corr": "answ"})["rows"],
        caller.ask(do="exchange", id="question")["rows"],
        caller.ask(do="follow", filters={"corr": "answ"})["rows"],
    ]
    assert [(page[0]["id"], page[0]["exchange"]) for page in rows] == [
        ("answer-1", "question-1")
    ] * 3
    for id in ("answer-2", "other-1"):
        rig.say("status", id=id, corr="question-1" if id == "answer-2" else None)
    news: list[Any] = []
    while "answer-2" not in news:
        news += [row["id"] for row in caller.hear("rows")]
    assert "other-1" not in news


@pytest.mark.parametrize(
    ("code", "words", "open_questions"),
    [
        (0, "Success", ["m-1"]),
        (hive.NO_SUBSCRIBERS, "No matching subscribers", []),
        (0x7F, "no failure yet", ["m-1"]),
        (0x80, "Unspecified error", []),
        (0x87, "Not authorized", []),
        (-1, "its time to live was over", []),
    ],
)
def test_a_message_is_sent_by_the_daemon_and_who_asked_hears_each_step(
    rig: Rig, caller: Caller, code: int, words: str, open_questions: list[str]
) -> None:
    rig.wire.silent = True
    message = own("m-1")
    said = caller.ask(do="send", envelope=message.document())
    assert (said["queued"], said["connected"]) == (True, True)
    (row,) = caller.ask(do="exchange", id="m-1")["rows"]
    assert row["event"] == "out", "it is in the journal by then"
    acknowledge(rig, message, code, words)
    topic = "hive/alpha/command"
    said = {"published": code, "words": words, "topic": topic, "id": message.id}
    assert caller.client.receive(5) == said
    pending = caller.ask(do="pending")
    assert pending["outbox"] == []
    assert [one["id"] for one in pending["questions"]] == open_questions, "or nobody will answer"


def test_without_a_broker_a_message_waits_and_that_is_said(rig: Rig, caller: Caller) -> None:
    rig.disconnect()
    said = caller.ask(do="send", envelope=own("m-1").document())
    assert (said["queued"], said["connected"]) == (True, False)
    pending = caller.ask(do="pending")
    assert [one["topic"] for one in pending["outbox"]] == ["hive/alpha/command"]
    assert [one["id"] for one in pending["questions"]] == ["m-1"]
    assert pending["outbox_size"] == 1


def test_who_waits_hears_the_answer_and_the_agent_does_not(rig: Rig, caller: Caller) -> None:
    caller.ask(do="send", envelope=own("m-1").document(), wait=True)
    answer = rig.say("response", corr="m-1", text="ä \u2028\n" * 10_000)
    assert hive.Envelope.check(caller.hear("answer")) == answer
    rig.turn()
    assert rig.started() == []
    caller.client.close()
    rig.turn()
    rig.say("response", corr="m-1")
    rig.until("nobody waits any more", lambda: rig.started() == ["main"])


def test_who_does_not_wait_hears_no_answer_and_the_agent_does(rig: Rig, caller: Caller) -> None:
    caller.ask(do="send", envelope=own("m-1").document())
    caller.hear("published")
    rig.say("response", corr="m-1")
    rig.until("the agent is told", lambda: rig.started() == ["main"])
    assert caller.hears_nothing()


def test_two_who_wait_for_the_same_both_hear_it(rig: Rig, caller_of: Callable[[], Caller]) -> None:
    one, two = caller_of(), caller_of()
    one.ask(do="send", envelope=own("m-1").document(), wait=True)
    two.ask(do="send", envelope=own("m-2", corr="m-1").document(), wait=True)
    for id in ("a-1", "a-2"):
        rig.say("response", corr="m-1", id=id)
    assert [one.hear("answer")["id"] for _ in range(2)] == ["a-1", "a-2"]
    one.client.close()
    assert [two.hear("answer")["id"] for _ in range(2)] == ["a-1", "a-2"]
    rig.turn()
    rig.say("response", corr="m-1", id="a-3")
    assert two.hear("answer")["id"] == "a-3"


def test_a_command_that_publishes_by_itself_is_written_down_and_its_answer_stays_with_it(
    rig: Rig, caller: Caller
) -> None:
    assert caller.ask(do="sent", envelope=own("m-1").document(), wait=True) == {"ok": True}
    assert rig.sent() == []
    assert [row["id"] for row in caller.ask(do="log")["rows"]] == ["m-1"]
    answer = own("a-1", sender="alpha", to="beta", ch="response", corr="m-1")
    assert caller.ask(do="read", envelope=answer.document()) == {"ok": True}
    assert caller.ask(do="pending")["questions"] == []
    rig.say("response", id="a-1", corr="m-1")
    assert caller.hears_nothing(), "it has heard it"
    assert rig.started() == []


def test_an_answer_that_was_just_read_is_no_news_when_the_command_has_gone(
    rig: Rig, caller: Caller
) -> None:
    caller.ask(do="sent", envelope=own("m-1").document(), wait=True)
    answer = own("a-1", sender="alpha", to="beta", ch="response", corr="m-1")
    assert caller.ask(do="read", envelope=answer.document()) == {"ok": True}
    caller.client.close()
    rig.turn()
    rig.say("response", corr="m-1", id="a-1")
    rig.turn()
    assert rig.started() == []
    rig.say("response", corr="m-1", id="a-2")
    rig.until("the agent is told", lambda: rig.started() == ["main"])


def test_a_command_cannot_speak_for_another_node(rig: Rig, caller: Caller) -> None:
    for do in ("send", "sent"):
        said = caller.ask(do=do, envelope=own("m-1", sender="alpha").document(), wait=True)
        assert said == {"error": "this is the daemon of beta, not of alpha"}
    assert rig.sent() == [] and caller.ask(do="log")["rows"] == []


def test_a_message_that_is_handed_in_again_is_not_sent_again_and_the_first_hears_of_it(
    rig: Rig, caller_of: Callable[[], Caller]
) -> None:
    rig.wire.silent = True
    one, two = caller_of(), caller_of()
    message = own("m-1")
    assert one.ask(do="send", envelope=message.document())["queued"]
    again = two.ask(do="send", envelope=message.document())
    assert again == {"error": "m-1 was handed in before"}
    two.client.close()
    rig.turn()
    acknowledge(rig, message, 0, "Success")  # which finds one
    assert (one.client.receive(5) or {}).get("published") == 0


def test_the_log_is_read_page_by_page(
    rig: Rig, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_ROWS", 10)
    for i in range(25):
        rig.say("status", id=f"m-{i}", urgency="later", sender=f"node{i % 2}")
    found: list[str] = []
    after = 0
    while rows := caller.ask(do="log", after=after)["rows"]:
        found += [row["id"] for row in rows]
        after = rows[-1]["n"]
    assert found == [f"m-{i}" for i in range(25)]
    chosen = caller.ask(do="log", filters={"from": "node1"}, last=2)["rows"]
    assert [row["id"] for row in chosen] == ["m-21", "m-23"]


def test_a_page_of_long_messages_fits_into_a_line_and_none_is_skipped(
    rig: Rig, caller: Caller
) -> None:
    for i in range(12):
        rig.say("status", id=f"m-{i}", urgency="later", text="\x01" * hive.MAX_TEXT)
    found: list[str] = []
    after, pages = 0, 0
    while rows := caller.ask(do="log", after=after)["rows"]:
        assert len(json.dumps(rows)) < hive.MAX_LINE
        found += [row["id"] for row in rows]
        after, pages = rows[-1]["n"], pages + 1
    assert found == [f"m-{i}" for i in range(12)] and pages > 1


def test_who_follows_the_log_sees_what_there_is_and_what_is_new(
    rig: Rig, caller_of: Callable[[], Caller]
) -> None:
    everything, alerts = caller_of(), caller_of()
    rig.say("status", id="m-0", urgency="later")
    rig.turn()
    assert [row["id"] for row in everything.ask(do="follow")["rows"]] == ["m-0"]
    assert alerts.ask(do="follow", filters={"from": "gamma"})["rows"] == []
    rig.say("status", id="m-1", urgency="later")
    assert [row["id"] for row in everything.hear("rows")] == ["m-1"]
    assert alerts.hears_nothing()
    rig.say("status", id="m-2", urgency="later", sender="gamma")
    for follower in (everything, alerts):
        assert [row["id"] for row in follower.hear("rows")] == ["m-2"]
    everything.client.close()
    rig.turn()
    rig.say("status", id="m-3", urgency="later", sender="gamma")
    assert [row["id"] for row in alerts.hear("rows")] == ["m-3"]


def test_a_follower_that_has_many_pages_to_read_gets_each_once(
    rig: Rig, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_ROWS", 10)
    for i in range(95):
        rig.say("status", id=f"m-{i}", urgency="later")
    rows = caller.ask(do="follow")["rows"]
    while len(rows) < 95:
        rows += caller.hear("rows")
    assert [row["id"] for row in rows] == [f"m-{i}" for i in range(95)]
    assert caller.hears_nothing()


def test_a_follower_that_does_not_read_costs_no_memory_and_misses_nothing(
    rig: Rig, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 0
    send = hive.ControlConnection.send

    def counted(connection: hive.ControlConnection, document: Mapping[str, Any]) -> None:
        nonlocal size
        size += len(json.dumps(document))
        send(connection, document)

    monkeypatch.setattr(hive.ControlConnection, "send", counted)
    caller.ask(do="follow")
    for i in range(60):
        rig.say("status", id=f"m-{i}", urgency="later", text="x" * 200_000)
        rig.turn()
    assert size < 2 * hive.MAX_PAYLOAD, "what it has not read is not kept for it"
    found: list[str] = []

    def read() -> bool:
        line = caller.client.receive(0.001)
        found.extend(row["id"] for row in (line or {}).get("rows", ()))
        rig.say("status", urgency="later", sender="other")  # the end of a turn
        return "m-59" in found

    rig.until("all is read", read)
    assert [id for id in found if id.startswith("m-")] == [f"m-{i}" for i in range(60)]


# What is known of all nodes


def retain(rig: Rig, topic: str, payload: bytes, retained: bool = True) -> None:
    message = hive.IncomingMessage(f"hive/meta/{topic}", payload, retained, None, lambda: None)
    rig.node.deliver(message)


def test_states_and_rosters_are_handed_on_as_they_came(rig: Rig, caller: Caller) -> None:
    state = {"status": "online", "oc": {"main": {"status": "ok"}}, "more": [1, {"a": None}]}
    retain(rig, "gamma/state", hive.encode_json(state))
    retain(rig, "gamma/roster", b'{"handlers": ["ping"]}')
    retain(rig, "delta/roster", b'{"handlers": ["pong"]}')
    said = caller.ask(do="states")
    assert (said["connected"], said["states"]["gamma"]) == (True, state)
    rosters = caller.ask(do="roster")["rosters"]
    assert rosters == {"gamma": {"handlers": ["ping"]}, "delta": {"handlers": ["pong"]}}
    retain(rig, "gamma/state", b"")
    retain(rig, "gamma/roster", b"")
    assert "gamma" not in caller.ask(do="states")["states"]
    assert [*caller.ask(do="roster")["rosters"]] == ["delta"], "what is cleared is gone"


def test_it_is_said_whether_all_states_have_come(rig: Rig, caller: Caller) -> None:
    assert not caller.ask(do="states")["complete"]
    retain(rig, "beta/state", b'{"status": "offline"}')  # from before
    assert not caller.ask(do="states")["complete"]
    retain(rig, "beta/state", b'{"status": "online"}', retained=False)  # its own, and so the last
    assert caller.ask(do="states")["complete"]
    rig.disconnect()
    said = caller.ask(do="roster")
    assert (said["connected"], said["complete"]) == (False, False)
    assert said["fault"].startswith("broker localhost:1883: connection refused")
    rig.clock.now += 70
    assert 70 <= caller.ask(do="roster")["age"] < 71
    rig.connect()
    said = caller.ask(do="roster")
    assert (said["connected"], said["complete"], said["fault"]) == (True, False, "")


def test_a_broker_that_hangs_is_known_by_what_does_not_come_back(rig: Rig, caller: Caller) -> None:
    retain(rig, "beta/state", b'{"status": "online"}', retained=False)
    rig.turn()
    rig.wire.hangs = True
    own = rig.config.heartbeat
    rig.clock.now += own.interval * (own.miss_threshold + 1) - 0.5
    assert caller.ask(do="states")["connected"]
    rig.clock.now += 1
    said = caller.ask(do="states")
    assert not said["connected"] and 20 < said["age"] < 21.5
    assert said["fault"].startswith("broker localhost:1883: no answer for 2")
    retain(rig, "beta/state", b'{"status": "online"}', retained=False)
    assert caller.ask(do="states")["connected"]


@pytest.mark.parametrize(
    "payload",
    [
        *(b"\xff", b"7", b"[]", b"{", b"[" * 5000, b'{"a": ' * 5000, b"\0", b'{"n": 1e999}'),
        *(b'{"status": "\\ud83d"}', b'{"status": NaN}', b'{"status": ' + b"9" * 5000 + b"}"),
        b'{"status": "' + b"x" * 100_000 + b'"}',
    ],
    ids=range(12),
)
@pytest.mark.parametrize("document", ["state", "roster"])
def test_no_document_of_a_peer_can_stand_in_the_way_of_others(
    rig: Rig, caller: Caller, payload: bytes, document: str
) -> None:
    for name in ("gamma", "\ud83d", "a/b", "", "x" * 70):
        retain(rig, f"{name}/{document}", payload)
    retain(rig, f"delta/{document}", b'{"status": "online"}')
    do = {"state": "states", "roster": "roster"}[document]
    said = caller.ask(do=do)
    documents = said[f"{document}s"]
    assert documents["delta"] == {"status": "online"} and {*documents} <= {"delta", "gamma"}


@pytest.mark.parametrize("document", ["state", "roster"])
def test_a_broken_surrogate_in_a_document_of_a_peer_costs_no_field(
    rig: Rig, caller: Caller, document: str
) -> None:
    retain(rig, f"gamma/{document}", b'{"version": "cut \\ud83d", "\\udfff": ["\\ud800"]}')
    do = {"state": "states", "roster": "roster"}[document]
    kept = caller.ask(do=do)[f"{document}s"]["gamma"]
    assert kept == {"version": "cut \ufffd", "\ufffd": ["\ufffd"]}


def test_all_documents_together_have_a_bound_and_the_longest_go_first(
    rig: Rig, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_DOCUMENTS", 40_000)
    for i in range(100):
        size = 20_000 if i % 10 == 0 else 300
        retain(rig, f"n{i}/roster", hive.encode_json({"i": i, "text": "x" * size}))
    kept = caller.ask(do="roster")["rosters"]
    assert {f"n{i}" for i in range(100) if i % 10} <= kept.keys()
    assert len(hive.encode_json(kept)) < 40_000
    known = {"status": "online", "known_peers": ["x" * 50] * 100, "version": "1"}
    retain(rig, "n1/state", hive.encode_json(known))
    assert caller.ask(do="states")["states"]["n1"] == {"status": "online", "version": "1"}


# The table


@pytest.mark.parametrize("name", hive.REQUESTS)
def test_every_request_says_what_it_is_for_and_what_it_takes(name: str) -> None:
    request = hive.REQUESTS[name]
    assert request.help
    for one in request.fields.values():
        assert one.help and one.check.__doc__
        assert one.required == (one.default is None)


NO_ID = "is not an id: 1 to 64 of A-Za-z0-9._:- , the first a letter or digit"
WRONG: list[object] = [
    *(None, True, False, 0, 7, -1, 1.5, 2**70, -(2**63), 1e308, float("nan"), float("inf")),
    *("", "a b", "x" * 65, "x" * 100_000, "\0", "half a pair: \ud83d", "m-1", "nobody", "all"),
    *([], [1], [[1, 2]], ["ab"], [["id"], 1], [[[1], 2]], {}, {"a": 1}, {"ch": None}),
    *({"ch": [1]}, {"ch": {"a": 1}}, {"ch": 2**70}, {"from": "\ud83d"}, {"since": "x"}),
    *({"since": float("nan")}, {"since": [1]}, {"to": True}, {"nothing": 1}, {"corr": "\0"}),
]
FIELDS = ("id", "envelope", "wait", "filters", "after", "last", "to", "action")


def survives(rig: Rig, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each request is answered with one object, on the same visit, and no bug is logged."""
    visit = socket.socket(socket.AF_UNIX)
    with visit:
        visit.settimeout(PATIENCE)
        visit.connect(str(rig.state_dir / "door"))
        heard, answers = b"", []
        for request in requests:
            visit.sendall(json.dumps(request).encode() + b"\n")
            visit.setblocking(False)
            heard = rig.until(f"an answer to {request}", lambda: some(rig, visit))
            while not heard.endswith(b"\n"):
                heard += rig.until(f"the rest of an answer to {request}", lambda: some(rig, visit))
            visit.settimeout(PATIENCE)
            answers += [json.loads(line) for line in heard.splitlines()[:1]]
    rig.turn()
    assert rig.events("bug") == []
    assert len(answers) == len(requests) and all(isinstance(one, dict) for one in answers)
    return answers


def some(rig: Rig, visit: socket.socket) -> bytes:
    assert rig.events("bug") == []
    with contextlib.suppress(BlockingIOError):
        data = visit.recv(1 << 20)
        assert data, "the visitor was thrown out"
        return data
    return b""


@pytest.mark.parametrize(
    "do", [*hive.REQUESTS, "dance", None, 7, ["send"], {"a": 1}, "x" * 100_000]
)
def test_a_request_of_any_kind_with_nonsense_in_any_field_is_answered(rig: Rig, do: object) -> None:
    whole = {"do": do, "id": "m-1", "filters": {}, "envelope": own("m-1").document()}
    requests = [{**whole, field: wrong} for field in FIELDS for wrong in WRONG if do != "follow"]
    requests += [{"do": do, field: wrong} for field in FIELDS for wrong in WRONG if do != "follow"]
    survives(rig, requests or [{"do": do}])
    if do == "follow":  # each on a visit of its own: who follows hears more than answers
        for field in FIELDS:
            for wrong in WRONG:
                survives(rig, [{"do": do, field: wrong}])
    assert rig.works()


@pytest.mark.parametrize("do", ["send", "sent", "read"])
def test_an_envelope_with_nonsense_in_any_field_is_answered(rig: Rig, do: str) -> None:
    good = own("m-1", corr="c-1", ttl=60, action="x", reply_to="r").document()
    requests = [
        {"do": do, "envelope": {**good, field: wrong}, "wait": wait}
        for field in [*good, "more", "\ud83d"]
        for wrong in WRONG
        for wait in (False, True)
    ]
    survives(rig, requests)
    assert rig.works()


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"do": "message"}, "id: missing"),
        ({"do": "message", "id": 7}, f"id: 7 {NO_ID}"),
        ({"do": "exchange", "id": "a b"}, f"id: 'a b' {NO_ID}"),
        ({"do": "log", "after": -1}, "after: -1 is not a whole number from 0"),
        ({"do": "message", "id": "m-1"}, "m-1: not known here; the last days are: hive log"),
        ({"do": "send"}, "envelope: missing"),
        ({"do": "send", "envelope": {}}, "v: missing"),
        (
            {"do": "send", "envelope": []},
            "envelope: [] is not an envelope: an object as in the protocol",
        ),
        (
            {"do": "log", "filters": {"colour": 1}},
            "filters: {'colour': 1} is not an object of ch, from, to, node, action, corr, since,"
            " before",
        ),
        ({"id": "m-1"}, "no such request: None"),
        ({"do": "dance", "id": "m-1"}, "no such request: 'dance'"),
        ({"do": ["ask"], "id": "m-1"}, "no such request: ['ask']"),
    ],
)
def test_a_request_that_makes_no_sense_is_told_why(
    rig: Rig, caller: Caller, request_: dict[str, object], error: str
) -> None:
    assert caller.ask(**request_) == {"error": error}


def test_the_exchange_of_what_nobody_knows_is_empty(caller: Caller) -> None:
    assert caller.ask(do="exchange", id="m-1") == {"rows": []}


def test_a_node_without_a_place_for_its_door_says_so_and_goes_on(
    tmp_path: Path, rig_of: Callable[..., Rig]
) -> None:
    (tmp_path / "state" / "door").mkdir(parents=True)
    rig = rig_of()
    (line,) = rig.events("no door for the command line")
    assert line["level"] == "error" and line["file"] == str(tmp_path / "state" / "door")
    assert rig.works()


def test_only_what_is_overdue_is_given_up(rig: Rig, caller: Caller) -> None:
    for id, ttl in (("m-1", 1), ("m-2", 1000), ("m-3", None)):
        caller.ask(do="send", envelope=own(id, ttl=ttl).document())
    rig.until("the first is given up", lambda: rig.events("no answer"), tick=0.1)
    rig.turn()
    assert [row["id"] for row in rig.events("no answer")] == ["m-1"]
    assert [one["id"] for one in caller.ask(do="pending")["questions"]] == ["m-2", "m-3"]


def test_the_last_hour_of_every_node_is_told(rig: Rig, caller: Caller) -> None:
    rig.hear_state("alpha", status="online", last_seen=1)
    for _ in range(3):
        rig.beat("alpha", load_1m=0.25)
    rig.beat("stranger", load_1m=[])
    told = caller.ask(do="history")
    assert told["nodes"].keys() == {"alpha", "stranger"}
    alpha = told["nodes"]["alpha"]
    assert (alpha["beats"][-1], alpha["load"][-1], alpha["changed"]) == (3, 0.25, 0.0)
    assert told["nodes"]["stranger"]["load"][-1] == 0.0
    rig.hear_state("alpha", status="degraded", reason="agent main: gone", last_seen=2)
    assert caller.ask(do="history")["nodes"]["alpha"]["changed"] > 1e9


def test_who_wrote_to_whom_is_counted(rig: Rig, caller: Caller) -> None:
    for _ in range(3):
        rig.say("status", urgency="later")
    rig.say("status", urgency="later", to="all")
    traffic = {(a, b): (n, last) for a, b, n, last in caller.ask(do="history")["traffic"]}
    assert {pair: n for pair, (n, _) in traffic.items()} == {
        ("alpha", "beta"): 3,
        ("alpha", "all"): 1,
    }
    assert all(last > 1e9 for _, last in traffic.values())
