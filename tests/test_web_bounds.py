"""Web: every bound, and what is shown of what nodes say, with no daemon and no time passing."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import noting
from rig import Clock

import hive

KEY = "0123456789abcdef0123456789abcdef"
HEARTBEAT = hive.HeartbeatConfig()


class Asker:
    """A daemon that answers when the test says so."""

    def __init__(self, loop: hive.Loop) -> None:
        self.loop, self.asked = loop, list[tuple[Mapping[str, Any], Callable[..., None]]]()
        self.opened = list[SimpleNamespace]()
        self.gone = False

    def ask(self, request: Mapping[str, Any], then: Callable[..., None]) -> None:
        self.asked.append((request, then))

    def open(
        self, request: Mapping[str, Any], on_line: Callable[..., Any], on_end: Callable[..., Any]
    ) -> Callable[[], None]:
        if self.gone:
            raise hive.DaemonError("the daemon of alpha does not run; start it: hive daemon")
        link = SimpleNamespace(request=request, line=on_line, end=on_end, closed=0)
        self.opened.append(link)

        def close() -> None:
            link.closed += 1

        return close

    def answer(self, do: str, document: Mapping[str, Any]) -> None:
        """To the oldest question of this kind."""
        one = next(one for one in self.asked if one[0]["do"] == do)
        self.asked.remove(one)
        one[1](document)

    def kinds(self) -> list[str]:
        return [request["do"] for request, _ in self.asked]

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


def turn(loop: hive.Loop) -> None:
    for _ in range(3):
        loop.post(lambda: None)
        loop.step()


def advance(loop: hive.Loop, seconds: float) -> None:
    """Let time pass from one thing that is due to the next."""
    clock = loop.clock
    assert isinstance(clock, Clock)
    until = clock.now + seconds
    while due := [one.due for one in loop._timers if one.call and one.due <= until]:
        clock.now = max(clock.now, min(due))
        turn(loop)
    clock.now = until
    turn(loop)


@pytest.fixture
def asker(loop: hive.Loop) -> Asker:
    return Asker(loop)


# -- a request --


def ask_for(path: str, *lines: str, method: str = "GET", version: str = "1.1") -> bytearray:
    head = [f"{method} {path} HTTP/{version}", *lines]
    return bytearray("\r\n".join([*head, "", ""]).encode())


def refusal(data: bytes | bytearray) -> int:
    with pytest.raises(hive.HttpFault) as fault:
        hive.HttpRequest.read(bytearray(data))
    return fault.value.status


def test_a_request_is_what_it_says() -> None:
    lines = ("Host:  a b \t", "X-Odd!:", "CONTENT-LENGTH: 3")
    data = ask_for("/log?a=1&b=x%20y&c", *lines, method="POST")
    said = hive.HttpRequest.read(data + b"abc")
    assert said == hive.HttpRequest(
        *("POST", "/log", {"a": "1", "b": "x y"}),
        {"host": "a b", "x-odd!": "", "content-length": "3"},
        *(len(data), 3),
    )
    assert hive.HttpRequest.read(data[:-1]) is None is hive.HttpRequest.read(bytearray())
    old = hive.HttpRequest.read(ask_for("/", "connection: keep-alive", version="1.0"))
    assert old and old.headers["connection"] == "close" and old.length == 0
    new = hive.HttpRequest.read(ask_for("/"))
    assert new and new.headers == {}


def test_a_head_is_so_long_at_most_and_so_is_a_body() -> None:
    most, empty = 16 * 1024, len(ask_for("/", "x: "))
    whole = ask_for("/", "x: " + "y" * (most - empty))
    assert len(whole) == most and hive.HttpRequest.read(whole)
    assert refusal(ask_for("/", "x: " + "y" * (most - empty + 1))) == 431
    assert refusal(b"x" * most) == 431 and hive.HttpRequest.read(bytearray(most - 1)) is None
    body = hive.MAX_PAYLOAD
    assert hive.HttpRequest.read(ask_for("/", f"content-length: {body}"))
    assert refusal(ask_for("/", f"content-length: {body + 1}")) == 413
    assert refusal(ask_for("/", "content-length: 999999999")) == 413
    assert refusal(ask_for("/", "content-length: 0000000001")) == 400
    assert refusal(ask_for("/", "content-length: ")) == 400
    assert refusal(ask_for("/", "transfer-encoding: identity")) == 400


def test_what_is_no_request_is_refused() -> None:
    assert hive.HttpRequest.read(ask_for("/", method="M" * 20))
    assert refusal(ask_for("/", method="M" * 21)) == 400
    assert refusal(ask_for("/\u00fc")) == 400 == refusal(b"\r\n\r\n")
    assert refusal(ask_for("/", "a: 1", "A: 2")) == 400
    assert refusal(ask_for("/", "a b: 1")) == 400
    assert refusal(ask_for("/", "a: \0")) == 400
    fault = hive.HttpFault(418, "words")
    assert (fault.status, str(fault)) == (418, "words")


def test_a_response_says_whether_it_ends_and_whether_the_connection_does() -> None:
    head = hive.http_response(200, b"abc", "text/plain", "X: 1\r\n").decode()
    assert head.startswith("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n")
    assert "Connection" not in head and head.endswith("\r\nX: 1\r\n\r\n")
    assert hive.WEB_HEADERS in head
    last = hive.http_response(409, b"", "x", last=True).decode()
    assert last.startswith("HTTP/1.1 409 Refused\r\n") and "Content-Length: 0\r\n" in last
    assert "Connection: close\r\n" in last
    endless = hive.http_response(200, None, "text/event-stream").decode()
    assert "Content-Length" not in endless and "Connection: close\r\n" in endless


# -- what is shown --


def row(text: str, n: int = 1, **more: Any) -> dict[str, Any]:
    facts = dict.fromkeys(hive.ENTRY, "x") | {"n": n, "event": "in", "time": 5.0, "note": ""}
    return facts | {"envelope": {"text": text}, "inside": "secret"} | more


def test_a_text_is_cut_where_there_is_no_more_room_and_it_says_by_how_much() -> None:
    assert hive.row_view(row("12345"), 5)["longer"] == 0
    view = hive.row_view(row("1234567"), 5)
    assert (view["text"], view["longer"]) == ("12345", 2)
    assert {*view} == {*hive.ENTRY, "text", "longer"}


def test_an_agent_is_what_its_node_says_of_it_and_its_session() -> None:
    facts = {"client": "codex 1", "directory": "~/x", "branch": "main", "since": 100, "pid": 7}
    down = {"status": "down", "reason": "r" * 400, "next_try": 200, "other": 1}
    state = {"oc": {"main": down, "old": "ok", "away": {"status": "ok"}, "odd": 5}}
    roster = {"sessions": {"s": facts, "t": 7}, "away": ["away"]}
    views = hive.agent_views(state, roster)
    assert [one["name"] for one in views] == ["main", "odd", "old", "s", "t"]
    main, odd, old, live, other = views
    assert main["status"] == "down" and main["reason"] == "r" * 299 + "…"
    assert (main["next_try"], main["since"]) == (200, None) and "other" not in main
    assert odd == {"name": "odd", "since": None, "next_try": None}
    assert old["status"] == "ok" == live["status"] == other["status"]
    assert (live["client"], live["directory"], live["branch"]) == ("codex 1", "~/x", "main")
    assert (live["since"], "pid" in live, "reason" in live) == (100, False, False)
    clocks = {"oc": {"a": {"since": 0, "next_try": 1}, "b": {"since": hive.MAX_TS + 1}}}
    a, b = hive.agent_views(clocks, {})
    assert (a["since"], a["next_try"], b["since"]) == (None, 1, None)
    many = {"oc": {f"a{n}": "ok" for n in range(300)}}
    assert len(hive.agent_views(many, {})) == 200


def view_of(state: Mapping[str, Any], roster: Mapping[str, Any], changed: float = 3.0) -> Any:
    given = {"last_seen": int(time.time()), "interval": 3600, **state}
    (line,) = hive.status_rows({"n": given}, HEARTBEAT, time.time())
    return hive.node_view(line, given, roster, changed)


def test_a_node_is_shown_with_what_makes_sense_of_what_it_says() -> None:
    state = {"status": "online", "uptime_s": 119, "load_1m": 0.5, "version": "1", "host": "h\n"}
    numbers = {"running": 1, "waiting": 0, "outbox": 1_000_000, "rtt_ms": 1_000_001}
    entry = {"action": "a\n", "when": "daily", "last": 1, "next": hive.MAX_TS, "ok": True}
    odd = {"last": 0, "next": hive.MAX_TS + 1, "ok": 1}
    handlers = [f"h{n}" for n in range(101)]
    roster = {"system": "Linux\n", "schedule": [7, entry, odd, *[{}] * 30], "handlers": handlers}
    view = view_of(state | numbers, roster)
    assert (view["how"], view["up"], view["since"], view["load"]) == ("online", 60, 3.0, 0.5)
    assert (view["host"], view["system"], view["version"]) == ("h?", "Linux?", "1")
    assert (view["running"], view["waiting"], view["outbox"]) == (1, 0, 1_000_000)
    assert view["rtt_ms"] is None
    assert view["handlers"] == handlers[:100]
    assert len(view["schedule"]) == 19  # of twenty, one is none
    good = {"action": "a?", "when": "daily", "last": 1, "next": hive.MAX_TS, "ok": True}
    none = {"action": "-", "when": "-", "last": None, "next": None, "ok": None}
    assert view["schedule"][:2] == [good, none]


def test_a_node_that_is_gone_is_shown_since_when() -> None:
    seen = int(time.time()) - 100
    view = view_of({"status": "offline", "last_seen": seen, "reason": "connection lost"}, {})
    assert (view["how"], view["up"], view["since"]) == ("lost", None, seen)
    assert view["why"] == "its connection died"
    assert view["host"] is None is view["system"]
    young = view_of({"status": "online"}, {}, 0.0)
    assert (young["up"], young["since"]) == (0, 0.0)


# -- what all pages are told --


class Hall:
    """A view of the hive, as its pages see it."""

    def __init__(self, asker: Any) -> None:
        self.asker, self.news = asker, 0
        config = hive.Config(hive.NodeConfig("alpha", state_dir=Path("/nowhere")))
        self.view = hive.HiveView(asker, config, {"me": "alpha"}, self.hear)

    def hear(self) -> None:
        self.news += 1

    def events(self, version: int = 0) -> list[tuple[str, Any]]:
        lines = [one.decode() for one in self.view.since(version)]
        assert all(one.endswith("\n\n") for one in lines)
        parts = [one.split("\n")[:2] for one in lines]
        return [(a.removeprefix("event: "), json.loads(b.removeprefix("data: "))) for a, b in parts]

    def states(self, *names: str, **more: Any) -> dict[str, Any]:
        state = {"status": "online", "last_seen": int(time.time()), "interval": 3600}
        how = {"connected": True, "complete": True, "broker": "hive.lan", "fault": ""}
        return {"states": {name: state for name in names}, **how, **more}


@pytest.fixture
def hall(asker: Asker) -> Hall:
    return Hall(asker)


def test_everything_is_asked_at_once_and_then_at_its_own_pace(hall: Hall, asker: Asker) -> None:
    hall.view.begin()
    assert asker.kinds() == ["states", "pending", "roster", "history"]
    (link,) = asker.opened
    assert link.request == {"do": "follow", "after": 0, "last": 1}
    gaps = {"states": 0.5, "pending": 1.0, "roster": 5.0, "history": 20.0}
    for do, gap in gaps.items():
        asker.asked.clear()
        hall.view._look(do, hive.LOOKS[do], hall.view._ended)
        advance(asker.loop, gap / 40)  # which is as long as it may take
        asker.answer(do, {"error": "x"})
        advance(asker.loop, gap - 0.01)
        assert do not in asker.kinds()
        advance(asker.loop, 0.02)
        assert do in asker.kinds()


def test_a_daemon_that_answers_slowly_is_asked_less_often(hall: Hall, asker: Asker) -> None:
    hall.view.begin()
    advance(asker.loop, 2.0)
    asker.answer("states", {"error": "x"})
    asker.asked.clear()
    advance(asker.loop, 39.9)
    assert asker.kinds() == []
    advance(asker.loop, 0.2)
    assert asker.kinds() == ["states"]


def test_what_was_asked_for_pages_that_are_closed_is_not_shown_to_later_ones(
    hall: Hall, asker: Asker
) -> None:
    hall.view.begin()
    (link,) = asker.opened
    link.line({"rows": [row("x", 5)]})
    link.line({"rows": [row("y", 6)]})
    asker.answer("states", hall.states("alpha"))
    assert len(hall.events()) == 2
    old = asker.asked[:]
    hall.view.end()
    assert link.closed == 1 and hall.events() == [] == hall.events(1)
    version = hall.view.version
    asker.answer("roster", {"rosters": {}})
    advance(asker.loop, 60)
    assert "roster" not in asker.kinds()
    hall.view.begin()
    asker.asked[:] = [one for one in old if one[0]["do"] != "roster"]
    asker.answer("pending", {"tasks": []})
    advance(asker.loop, 60)
    assert hall.view.version == version and asker.kinds() == ["history"]
    assert asker.opened[-1].request == {"do": "follow", "after": 0, "last": 1}
    began = len(asker.opened)
    link.end("it has ended")  # that one is nobody's any more
    advance(asker.loop, 60)
    assert len(asker.opened) == began


def test_of_the_hive_it_is_told_how_it_is_connected(hall: Hall, asker: Asker) -> None:
    hall.view.begin()
    asker.answer("states", hall.states("alpha", broker="/run/hive", fault="f", secret=1))
    hive_said = dict(hall.events())["hive"]
    facts = {"connected": True, "complete": True, "fault": "f", "daemon": True, "me": "alpha"}
    words = {"broker": "this machine's own broker", "summary": "1 online"}
    assert hive_said == facts | words
    hall.view._take("states", hall.states("alpha"))
    assert dict(hall.events())["hive"]["broker"] == "hive.lan"
    hall.view._take("roster", {"error": "gone"})
    assert dict(hall.events())["hive"]["daemon"] is True
    hall.view._take("states", {"error": "gone"})
    assert dict(hall.events())["hive"] == {"daemon": False, "why": "gone", "me": "alpha"}


def test_what_has_not_changed_is_not_told_again(hall: Hall) -> None:
    states = hall.states("alpha", "beta")
    hall.view._take("states", states)
    assert [kind for kind, _ in hall.events()] == ["hive", "node", "node"]
    version, news = hall.view.version, hall.news
    assert (version, news) == (3, 3)
    hall.view._take("states", states)
    assert (hall.view.version, hall.news, hall.events(version)) == (3, 3, [])
    hall.view._take("pending", {"tasks": [1]})
    assert hall.events(version) == [("pending", {"tasks": [1]})]


def test_nodes_are_shown_with_their_rosters_and_since_when_they_are_so(hall: Hall) -> None:
    hour = {"changed": 7.0, "beats": [1], "load": [2], "other": 3}
    hall.view._take("roster", {"rosters": {"alpha": {"handlers": ["fix"]}}})
    hall.view._take("history", {"nodes": {"alpha": hour}, "traffic": [["a", "b", 1, 2]]})
    hall.view._take("states", hall.states("alpha", "beta"))
    said = hall.events()
    nodes = {one["name"]: one for kind, one in said if kind == "node"}
    assert (nodes["alpha"]["handlers"], nodes["alpha"]["since"]) == (["fix"], 7.0)
    assert (nodes["beta"]["handlers"], nodes["beta"]["since"]) == ([], 0.0)
    shown = {"nodes": {"alpha": [[1], [2]]}, "traffic": [["a", "b", 1, 2]]}
    assert dict(said)["history"] == shown


def test_a_node_that_is_forgotten_is_told_to_be_gone(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    hall.view._take("states", hall.states("alpha", "beta"))
    version = hall.view.version
    hall.view._take("states", hall.states("alpha"))
    assert hall.events(version) == [
        ("hive", hall.events(version)[0][1]),
        ("gone", {"name": "beta"}),
    ]
    monkeypatch.setattr(hive, "MAX_MEMBERS", 1)
    for n in range(9):
        hall.view._take("states", hall.states("alpha", f"n{n}"))
    assert len(hall.view._events) <= 2 * 1 + 1
    assert {*hall.view._events} >= {"hive", "node alpha", "node n8"}


def test_rows_are_told_as_they_come_from_where_the_page_began(hall: Hall, asker: Asker) -> None:
    hall.view.begin()
    (link,) = asker.opened
    link.line({"rows": [row("before", 5)]})
    assert hall.events(1) == [] and hall.view.version == 0
    news = hall.news
    link.line({"rows": [row("x" * 201, 6), row("b", 7)]})
    assert hall.news == news + 1
    assert [(kind, one["text"], one["longer"]) for kind, one in hall.events(1)] == [("row", "b", 0)]
    assert hall.events() == []  # a page reads them itself when it is opened
    link.end("it has ended")
    advance(asker.loop, 0.49)
    assert len(asker.opened) == 1
    advance(asker.loop, 0.02)
    assert asker.opened[1].request == {"do": "follow", "after": 7, "last": 0}
    asker.gone = True
    asker.opened[1].end("it has ended")
    advance(asker.loop, 1.2)
    asker.gone = False
    advance(asker.loop, 0.5)
    assert len(asker.opened) == 3


def test_a_journal_that_is_empty_is_followed_from_its_first_row(hall: Hall, asker: Asker) -> None:
    hall.view.begin()
    (link,) = asker.opened
    link.line({})
    link.line({"rows": [row("first", 1)]})
    assert hall.view.version == 1 and hall.view._last == 1


def test_of_rows_five_hundred_are_kept_and_who_missed_some_is_told(hall: Hall) -> None:
    hall.view._last = 1
    for n in range(2, 502):
        hall.view._take_rows({"rows": [row(str(n), n)]})
    assert "missed" not in dict(hall.events(1)) and len(hall.events(1)) == 499
    hall.view._take_rows({"rows": [row("502", 502)]})
    hall.view._take_rows({"rows": [row("503", 503)]})
    assert hall.view._dropped == 2
    assert hall.events(1)[0] == ("missed", {}) and len(hall.events(1)) == 501
    assert len(hall.events(2)) == 500 and hall.events(2)[0][0] == "row"
    assert hall.events(0) == []


# -- a connection --


class Far:
    """A connection of a browser to a server that only keeps what it is asked."""

    def __init__(self, loop: hive.Loop) -> None:
        near, self.sock = socket.socketpair()
        self.sock.setblocking(False)
        self.asked = list[tuple[hive.HttpRequest, bytes]]()
        self.fault: hive.HttpFault | None = None
        self.gone = 0
        self.loop, self.view = loop, SimpleNamespace(version=0, since=lambda version: [b"news"])
        self.one = hive.WebConnection(self, near)  # type: ignore[arg-type]

    def check(self, request: hive.HttpRequest) -> None:
        if self.fault:
            raise self.fault

    def handle(
        self, connection: hive.WebConnection, request: hive.HttpRequest, body: bytes
    ) -> None:
        self.asked.append((request, body))

    def closed(self, connection: hive.WebConnection) -> None:
        self.gone += 1

    def say(self, data: bytes) -> None:
        self.sock.sendall(data)
        turn(self.loop)

    def heard(self) -> bytes:
        try:
            return self.sock.recv(1 << 20)
        except BlockingIOError:
            return b"(nothing)"


@pytest.fixture
def far(loop: hive.Loop) -> Iterator[Far]:
    made = Far(loop)
    yield made
    made.sock.close()
    made.one.stream.close()


def test_a_body_is_awaited_once_its_head_is_welcome(far: Far) -> None:
    assert not far.one.known
    far.say(bytes(ask_for("/send", "content-length: 5", method="POST")) + b"1234")
    assert far.one.known and far.asked == []
    far.say(b"5" + bytes(ask_for("/log")))
    ((request, body),) = far.asked
    assert (request.path, body) == ("/send", b"12345")
    far.one.write(200, b"x", "text/plain")
    turn(far.loop)
    assert [one.path for one, _ in far.asked] == ["/send", "/log"]
    far.say(bytes(ask_for("/log")))
    assert len(far.asked) == 2  # one after the other
    assert far.heard().endswith(b"\r\n\r\nx")


def test_who_is_refused_is_told_why_and_heard_no_more(far: Far) -> None:
    far.fault = hive.HttpFault(403, "no")
    far.say(bytes(ask_for("/a")) + bytes(ask_for("/b")))
    said = far.heard()
    assert said.startswith(b"HTTP/1.1 403 Refused\r\nContent-Type: application/json\r\n")
    assert said.endswith(b'\r\n\r\n{"error":"no"}') and b"Connection: close\r\n" in said
    assert not far.one.known and far.asked == []
    advance(far.loop, 0.9)
    assert far.gone == 0
    advance(far.loop, 0.2)
    assert far.gone == 1  # it did not go by itself


def test_a_connection_ends_where_its_browser_says_so(far: Far) -> None:
    far.say(bytes(ask_for("/a", "connection: CLOSE")))
    far.one.answer({"a": 1})
    assert b"Connection: close\r\n" in far.heard() and not far.one.stream.is_open
    other = Far(far.loop)
    other.say(bytes(ask_for("/a")))
    other.one.answer({"a": 1})
    said = other.heard()
    assert said.startswith(b"HTTP/1.1 200 OK") and b"Connection" not in said
    assert said.endswith(b'\r\n\r\n{"a":1}') and other.one.stream.is_open
    other.one.stream.close()
    other.sock.close()


def test_an_error_is_one_of_the_daemon_or_there_is_none(far: Far) -> None:
    far.one.answer({"error": "no"})
    assert far.heard().startswith(b"HTTP/1.1 409 ")
    far.one.answer({"error": "no", "gone": True})
    assert far.heard().startswith(b"HTTP/1.1 503 ")


def test_a_request_has_twenty_seconds_and_so_has_the_next(far: Far) -> None:
    clock = far.loop.clock
    start = clock()
    far.say(bytes(ask_for("/a"))[:9])
    far.one.check(start + 20)
    assert far.gone == 0
    far.say(bytes(ask_for("/a"))[9:])
    far.one.check(start + 60)  # what takes long now is the answer
    assert far.gone == 0
    advance(far.loop, 30)
    far.one.write(200, b"x", "text/plain")
    turn(far.loop)
    far.one.check(start + 50)
    assert far.gone == 0
    far.one.check(start + 50.1)
    assert far.gone == 1


def test_a_page_is_told_what_is_new_and_each_quarter_of_a_minute_that_it_lives(far: Far) -> None:
    far.say(bytes(ask_for("/events")))
    far.one.open_page()
    head = far.heard()
    assert b"text/event-stream" in head and b"Content-Length" not in head
    far.one.catch_up()
    assert far.heard() == b"(nothing)"
    far.view.version = 3
    far.one.catch_up()
    assert far.heard() == b"news" and far.one.shown == 3
    far.one.catch_up()
    assert far.heard() == b"(nothing)"
    advance(far.loop, 14.9)
    far.one.check(far.loop.clock())
    assert far.heard() == b"(nothing)"
    advance(far.loop, 0.1)
    far.one.check(far.loop.clock())
    assert far.heard() == b":\n\n"
    far.one.check(far.loop.clock())
    assert far.heard() == b"(nothing)"
    far.say(b"whatever")
    assert not far.one.stream.input and far.one.stream.is_open and far.asked[1:] == []
    advance(far.loop, 1000)
    far.one.check(far.loop.clock())
    assert far.gone == 0  # a page may stay for days


def test_a_page_that_reads_nothing_is_told_no_more_and_ended_after_half_a_minute(far: Far) -> None:
    far.one.open_page()
    far.one.stream.write(b"x" * 5_000_000)
    assert far.one.stream.output_size
    far.view.version = 3
    size = far.one.stream.output_size
    far.one.catch_up()
    assert (far.one.stream.output_size, far.one.shown) == (size, 0)
    now = far.one.stream.written_at
    far.one.check(now + 30)
    assert far.gone == 0
    far.one.check(now + 30.1)
    assert far.gone == 1
    far.one.catch_up()  # nothing happens


# -- the server --


class Page:
    """A connection that keeps what it is answered."""

    def __init__(self) -> None:
        self.said = list[Any]()
        self.known = True
        self.shown: int | None = None
        self.stream = SimpleNamespace(close=lambda: None)

    def answer(self, document: Mapping[str, Any]) -> None:
        self.said.append(document)

    def write(self, status: int, body: bytes, kind: str, more: str = "") -> None:
        self.said.append((status, body, kind))

    def open_page(self) -> None:
        self.shown = 0

    def catch_up(self) -> None:
        self.said.append("caught up")


@pytest.fixture
def server(
    loop: hive.Loop, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> Iterator[hive.WebServer]:
    monkeypatch.setattr(hive, "DaemonAsker", lambda loop, config: asker)
    config = hive.Config(hive.NodeConfig("alpha", state_dir=Path("/nowhere")))
    listener = socket.create_server(("127.0.0.1", 0))
    made = hive.WebServer(loop, config, KEY, ["/bin/hive", "-x"], listener)
    yield made
    made.close()


def ask(server: Any, path: str, document: Any = None, **headers: str) -> Page:
    page, said = Page(), {"content-type": "application/json", **headers}
    method = "GET" if document is None else "POST"
    found, _, query = path.partition("?")
    given = dict(one.split("=") for one in query.split("&") if one)
    request = hive.HttpRequest(method, found, given, said, 0, 0)
    server.handle(page, request, json.dumps(document).encode())
    return page


def refused(server: Any, path: str, document: Any = None) -> tuple[int, str]:
    with pytest.raises(hive.HttpFault) as fault:
        ask(server, path, document)
    return fault.value.status, str(fault.value)


def test_the_cookie_is_of_this_port_and_made_of_the_key(server: Any) -> None:
    port = server._listener.getsockname()[1]
    assert server._cookie == f"hive-{port}"
    assert server._secret == hmac.new(KEY.encode(), b"cookie", hashlib.sha256).hexdigest()
    for cookie in (f"a=1; hive-{port}={server._secret};b=2", f"hive-{port}={server._secret}"):
        headers = {"host": "localhost", "cookie": cookie}
        server.check(hive.HttpRequest("GET", "/log", {}, headers, 0, 0))


def test_what_there_is_not_is_said_so(server: Any) -> None:
    assert refused(server, "/none") == (404, "there is no GET /none")
    assert refused(server, "/log", {}) == (404, "there is no POST /log")
    assert ask(server, "/").said[0][0] == 200


def test_what_is_done_and_what_is_only_looked_at(server: Any) -> None:
    server._read_only = True
    doing = set[str]()
    for method, path in hive.WEB_ROUTES:
        try:
            ask(server, path, {} if method == "POST" else None)
        except hive.HttpFault as fault:
            doing |= {path} if "--read-only" in str(fault) else set()
    assert doing == {"/send", "/reply", "/forget"}
    posts = {path for method, path in hive.WEB_ROUTES if method == "POST"}
    assert posts == doing | {"/doctor"}


def test_the_log_is_asked_for_with_what_makes_sense_of_the_question(
    server: Any, asker: Asker
) -> None:
    ask(server, "/log?node=attic&ch=&before=7&text=x&other=1")
    ask(server, "/log?before=x")
    filters = [request["filters"] for request, _ in asker.asked]
    assert filters == [{"node": "attic", "before": 7}, {}]


def test_an_exchange_is_read_on_from_a_row_and_its_texts_are_cut(server: Any, asker: Asker) -> None:
    page = ask(server, "/exchange?id=abc&after=7")
    assert asker.asked[0][0] == {"do": "exchange", "id": "abc", "after": 7}
    asker.answer("exchange", {"rows": [row("x" * 20_001)]})
    (said,) = page.said
    assert (len(said["rows"][0]["text"]), said["rows"][0]["longer"]) == (20_000, 1)
    page = ask(server, "/exchange?after=x")
    assert asker.asked[0][0] == {"do": "exchange", "id": "", "after": 0}
    asker.answer("exchange", {"error": "no"})
    assert page.said == [{"error": "no"}]


def test_without_numbers_prometheus_is_told_why(server: Any, asker: Asker) -> None:
    page = ask(server, "/metrics")
    asker.answer("metrics", {"error": "gone", "gone": True})
    assert page.said == [{"error": "gone", "gone": True}]


def test_pages_are_twenty_at_most_and_the_first_one_begins_to_ask(
    server: Any, asker: Asker
) -> None:
    first = Page()
    server._connections = {first}
    server.events(first, {})
    assert first.said == ["caught up"] and len(asker.kinds()) == 4
    for _ in range(19):
        server._connections.add(page := Page())
        server.events(page, {})
    assert len(asker.kinds()) == 4
    with pytest.raises(hive.HttpFault, match=r"^20 pages are open already; close one$"):
        server.events(Page(), {})
    began = server.view._ended
    for one in [*server._connections][1:]:
        server.closed(one)
    assert server.view._ended == began
    (last,) = server._connections
    server.closed(last)
    assert server.view._ended == began + 1 and server._connections == set()


def test_pages_hear_the_news_of_a_turn_once(server: Any) -> None:
    page, other = Page(), Page()
    page.shown = 1
    server._connections = {page, other}
    server._tell_soon()
    server._tell_soon()
    assert page.said == []
    turn(server.loop)
    assert (page.said, other.said) == (["caught up"], [])
    server._tell_soon()
    turn(server.loop)
    assert len(page.said) == 2
    server._connections = set()


def test_connections_are_looked_at_each_five_seconds(server: Any) -> None:
    seen = list[float]()
    page = Page()
    page.check = seen.append  # type: ignore[attr-defined]
    server._connections = {page}
    start = server.loop.clock()
    advance(server.loop, 15.1)
    assert [one - start for one in seen] == pytest.approx([5, 10, 15])
    server._connections = set()


def test_a_hundred_connections_that_have_shown_the_key_keep_others_out(
    server: Any,
) -> None:
    ended = list[Page]()
    known = [Page() for _ in range(99)]
    for page in known:
        page.stream.close = lambda page=page: ended.append(page)
    server._connections = {*known}
    server._accept(0)  # one that has gone before it was taken is not waited for
    address = server._listener.getsockname()
    with socket.create_connection(address) as one, socket.create_connection(address) as other:
        turn(server.loop)
        one.settimeout(5)
        assert one.recv(1) == b""  # it made room for the other, who came behind it
        assert len(server._connections) == 100 and ended == []
        (stranger,) = server._connections - {*known}
        assert stranger.stream.is_open and other
        stranger.stream.close()
    server._connections.add(Page())
    with socket.create_connection(address) as late:
        late.settimeout(5)
        turn(server.loop)
        assert late.recv(1) == b"" and len(server._connections) == 100
    server._connections = set()


def test_a_message_is_handed_to_the_daemon_until_the_broker_has_it(
    server: Any, asker: Asker
) -> None:
    page = ask(server, "/send", {"to": "attic", "text": "x", "wait": 1})
    (link,) = asker.opened
    envelope = link.request["envelope"]
    assert (envelope["from"], envelope["to"], envelope["ch"]) == ("alpha", "attic", "command")
    assert link.request["wait"] is False and "action" not in envelope
    link.line({"queued": True, "connected": False})
    known = {"id": envelope["id"], "exchange": envelope["id"], "connected": False}
    assert page.said == [known] and not link.closed
    link.line({"published": 0})
    assert page.said == [known] and link.closed == 1
    page = ask(server, "/send", {"to": "attic", "text": "x", "ch": "alert", "action": ""})
    assert asker.opened[-1].request["envelope"]["ch"] == "alert"
    asker.opened[-1].line({"error": "no"})
    assert page.said == [{"error": "no"}] and asker.opened[-1].closed == 1
    page = ask(server, "/send", {"to": "attic", "text": "x", "action": "fix"})
    assert asker.opened[-1].request["envelope"]["action"] == "fix"
    asker.opened[-1].end("it has ended")
    assert page.said == [{"error": "it has ended", "gone": True}]
    advance(server.loop, 1.9)
    assert not asker.opened[-1].closed
    advance(server.loop, 0.2)
    assert asker.opened[-1].closed == 1
    asker.gone = True
    (said,) = ask(server, "/send", {"to": "attic", "text": "x"}).said
    assert said["gone"] is True and "does not run" in said["error"]


def test_answers_are_awaited_ten_minutes_for_twenty_questions(server: Any, asker: Asker) -> None:
    question = {"to": "attic", "text": "x", "wait": True}
    ask(server, "/send", question)
    (one,) = asker.opened
    assert one.request["wait"] is True
    one.line({"queued": True, "connected": True})
    one.line({"published": 0})
    assert not one.closed
    one.line({"answer": {}})
    assert one.closed == 1
    ask(server, "/send", {**question, "to": "all"})
    asker.opened[-1].line({"answer": {}})
    assert not asker.opened[-1].closed  # others may answer too
    for _ in range(18):
        ask(server, "/send", question)
    assert not any(link.closed for link in asker.opened[1:])
    ask(server, "/send", question)
    assert one.closed == 2
    ask(server, "/send", question)
    assert asker.opened[1].closed == 1 and len(server._awaited) == 20
    advance(server.loop, 599)
    assert not any(link.closed for link in asker.opened[2:])
    advance(server.loop, 1.1)
    assert all(link.closed for link in asker.opened)
    assert refused(server, "/send", {"to": "a b", "text": "x"})[0] == 400


def test_a_reply_needs_the_message_that_it_answers(server: Any, asker: Asker) -> None:
    page = ask(server, "/reply", {"id": "abc", "text": "x"})
    assert asker.asked[0][0] == {"do": "message", "id": "abc"}
    asker.answer("message", {"error": "not known", "gone": True})
    assert page.said == [{"error": "not known", "gone": True}]
    page = ask(server, "/reply", {"id": "abc", "text": "x"})
    asker.answer("message", {"envelope": None})
    (said,) = page.said
    assert said["error"] == "the message is kept no longer"
    asked = hive.Envelope.new("attic", "alpha", "command", "?")
    ask(server, "/reply", {"id": asked.id, "text": "x", "wait": True})
    asker.answer("message", {"envelope": asked.document()})
    request = asker.opened[-1].request
    assert request["wait"] is False and request["envelope"]["replyTo"] == asked.id
    assert refused(server, "/reply", {"id": "abc"}) == (
        400,
        f"text: None is not {hive.docstring(hive.message_text)}",
    )


class Children:
    """Commands that end when the test says so."""

    def __init__(self) -> None:
        self.started = list[tuple[hive.ProcessSpec, Callable[..., None]]]()

    def __len__(self) -> int:
        return len(self.started)

    def start(self, spec: hive.ProcessSpec, done: Callable[..., None]) -> None:
        self.started.append((spec, done))

    def kill(self) -> None:
        self.started.clear()


def ended(code: int | None = 0, out: bytes = b"", err: bytes = b"", fault: str = "") -> Any:
    return SimpleNamespace(stdout=out, stderr=err, fault=fault, ok=code == 0 and not fault)


def test_four_commands_run_at_once_and_each_by_a_deadline(server: Any) -> None:
    children = server._children = Children()
    ask(server, "/forget", {"name": "studio"})
    for _ in range(3):
        ask(server, "/doctor", {})
    assert refused(server, "/doctor", {}) == (503, "too much is asked at once; try again")
    forget, doctor = children.started[0][0], children.started[1][0]
    assert forget.argv == ["/bin/hive", "-x", "forget", "studio"]
    assert doctor.argv == ["/bin/hive", "-x", "doctor", "--json"]
    assert (forget.deadline, forget.environment) == (28.0, os.environ)
    server.close()
    assert len(children) == 0


OUTCOMES: list[tuple[Any, dict[str, Any]]] = [
    (ended(), {"ok": True}),
    (ended(1, err=b"warning\nhive: no \xff\n"), {"error": "no \ufffd"}),
    (ended(1), {"error": "it took too long"}),
    (ended(1, err=b"hive: x", fault="it was killed"), {"error": "it was killed"}),
]


@pytest.mark.parametrize(("result", "answer"), OUTCOMES)
def test_what_became_of_a_command_is_the_answer(
    server: Any, result: Any, answer: dict[str, Any]
) -> None:
    children = server._children = Children()
    page = ask(server, "/forget", {"name": "studio"})
    children.started[0][1](result)
    assert page.said == [answer]
    page = ask(server, "/doctor", {})
    children.started[1][1](ended(1, b'[{"check": "a"}]', b"hive: x"))  # it exits 1 on a fail
    assert page.said == [{"findings": [{"check": "a"}]}]
    for bad in (b"", b"[]", b"nonsense"):
        page = ask(server, "/doctor", {})
        children.started[-1][1](ended(1, bad, b"hive: x"))
        assert page.said == [{"error": "x"}]
        del children.started[-1]


def test_what_a_server_has_opened_is_closed_with_it(
    server: Any, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = list[str]()
    monkeypatch.setattr(asker, "close", lambda: closed.append("asker"))
    page = Page()
    page.stream.close = lambda: closed.append("connection")
    server._connections = {page}
    server.close()
    assert closed == ["connection", "asker"] and server._listener.fileno() == -1
    assert len(server.loop._selector.get_map()) == 2  # its own pipes
    turn(server.loop)
    server._connections = set()


# -- a search --


class Search:
    """One, in a journal of so many rows, whose answers hold so many at most."""

    def __init__(self, asker: Asker, size: int, room: int = 100, **how: Any) -> None:
        self.asker, self.size, self.room = asker, size, room
        self.pages = self.requests = 0
        self.ends = list[Any]()
        self.search = hive.JournalSearch(
            asker,  # type: ignore[arg-type]
            how.pop("filters", {}),
            how.pop("text", ""),
            self.ends.append,
        )
        self.search.go_on()
        while asker.asked:
            request, then = asker.asked.pop()
            then(self.page(request))

    def page(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert request["do"] == "log" and ("after" in request) != ("last" in request)
        before = request["filters"].get("before", self.size + 1)
        self.requests += 1
        self.pages += "last" in request
        first = max(1, before - 100) if "last" in request else request["after"] + 1
        assert request.get("last", 100) == 100
        numbers = range(first, before)[: self.room]
        return {"rows": [row(f"text {n}", n, time=float(n)) for n in numbers]}


def test_a_search_reads_a_hundred_rows_at_a_time_until_it_has_a_hundred(asker: Asker) -> None:
    (said,) = Search(asker, 250, text="Text 2").ends  # 2, 20 to 29 and 200 to 250
    found = [one["n"] for one in said["rows"]]
    assert found == sorted(found, reverse=True) and len(found) == 62 and {*said} == {"rows"}
    search = Search(asker, 250)
    (said,) = search.ends
    assert search.requests == 1 and [one["n"] for one in said["rows"]] == [*range(250, 150, -1)]
    assert (said["before"], said["time"]) == (151, 151.0)
    (said,) = Search(asker, 100).ends
    assert len(said["rows"]) == 100 and said["before"] == 1
    (said,) = Search(asker, 99).ends
    assert len(said["rows"]) == 99 and "before" not in said
    (said,) = Search(asker, 0).ends
    assert said == {"rows": []}


def test_a_page_whose_texts_do_not_fit_is_read_to_its_end(asker: Asker) -> None:
    (said,) = Search(asker, 250, room=30).ends
    assert [one["n"] for one in said["rows"]] == [*range(250, 150, -1)]


def test_a_search_ends_after_fifty_pages(asker: Asker) -> None:
    search = Search(asker, 9000, text="nobody said this")
    (said,) = search.ends
    assert search.pages == 50 and said == {"rows": [], "before": 4001, "time": 4001.0}


def test_what_a_search_looks_at(asker: Asker) -> None:
    search = hive.JournalSearch(asker, {}, "NEEDLE", print)  # type: ignore[arg-type]
    plain = {key: None for key in hive.ENTRY} | row("x") | {"from": "a", "to": "b"}
    assert not search._matches({**plain, "action": None, "id": None})
    for key in ("from", "to", "action", "id"):
        assert search._matches({**plain, key: "a Needle."})
    assert search._matches({**plain, "envelope": {"text": "needle"}})


def test_an_error_ends_a_search(asker: Asker) -> None:
    ends = list[Any]()
    search = hive.JournalSearch(asker, {}, "", ends.append)  # type: ignore[arg-type]
    search.go_on()
    asker.answer("log", {"error": "no"})
    assert ends == [{"error": "no"}]


# -- one request to the daemon --


class Door:
    """The daemon's side of each link."""

    def __init__(self, loop: hive.Loop, monkeypatch: pytest.MonkeyPatch) -> None:
        self.socks = list[socket.socket]()
        config = hive.Config(hive.NodeConfig("alpha", state_dir=Path("/nowhere")))
        self.asker = hive.DaemonAsker(loop, config)
        monkeypatch.setattr(hive.DaemonLink, "_connect", self.connect)

    def connect(self, *link: object) -> socket.socket:
        near, far = socket.socketpair()
        self.socks.append(far)
        return near

    def say(self, data: bytes) -> None:
        self.socks[-1].sendall(data)
        turn(self.asker.loop)


@pytest.fixture
def door(loop: hive.Loop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    made = Door(loop, monkeypatch)
    yield made
    made.asker.close()
    for sock in made.socks:
        sock.close()


def test_a_question_is_a_line_and_so_is_its_answer(door: Door) -> None:
    answers = list[Any]()
    door.asker.ask({"do": "states"}, answers.append)
    assert door.socks[0].recv(100) == b'{"do":"states"}\n' and len(door.asker.links) == 1
    door.say(b'{"a":')
    assert answers == []
    door.say(b'1}\n{"b":2}\n')
    assert answers == [{"a": 1}] and door.asker.links == set()  # once
    assert door.socks[0].recv(1) == b""


def test_what_is_followed_is_heard_line_by_line_until_it_ends(door: Door) -> None:
    lines, ends = list[Any](), list[str]()
    door.asker.open({}, lines.append, ends.append)
    door.say(b'{"a":1}\n\n[]\nx\n{"b":2}\n{')
    assert lines == [{"a": 1}, {}, {}, {}, {"b": 2}]
    advance(door.asker.loop, 60)  # it may say nothing for long now
    door.socks[0].close()
    turn(door.asker.loop)
    assert ends == ["the daemon of alpha: it has ended"] and door.asker.links == set()


def test_a_daemon_that_says_nothing_is_given_up_after_five_seconds(door: Door) -> None:
    answers = list[Any]()
    door.asker.ask({}, answers.append)
    advance(door.asker.loop, 4.9)
    assert answers == []
    advance(door.asker.loop, 0.2)
    assert answers == [{"error": "the daemon of alpha: it does not answer", "gone": True}]
    assert door.asker.links == set() and door.socks[0].recv(9) == b"{}\n"


def test_who_has_closed_a_link_hears_no_more_of_it(door: Door) -> None:
    heard = list[Any]()
    close = door.asker.open({}, heard.append, heard.append)
    close()
    advance(door.asker.loop, 60)
    assert heard == [] and door.asker.links == set()
    door.asker.open({}, heard.append, heard.append)
    door.asker.close()
    advance(door.asker.loop, 60)
    assert heard == [] and door.asker.links == set()


def test_forty_links_are_open_at_most(door: Door) -> None:
    for _ in range(40):
        door.asker.open({}, print, print)
    with pytest.raises(hive.DaemonError, match=r"^too much is asked at once; try again$"):
        door.asker.open({}, print, print)
    answers = list[Any]()
    door.asker.ask({}, answers.append)
    assert answers == []  # never within that call
    turn(door.asker.loop)
    assert answers == [{"error": "too much is asked at once; try again", "gone": True}]


def test_a_socket_that_others_could_have_put_there_is_not_spoken_to(
    loop: hive.Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hive.Config(hive.NodeConfig("alpha", state_dir=tmp_path))
    asker = hive.DaemonAsker(loop, config)
    files = [tmp_path / "a" / "door", tmp_path / "b" / "door", tmp_path / "c" / "door"]
    for file in files:
        file.parent.mkdir(mode=0o700)
    monkeypatch.setattr(hive, "control_socket_paths", lambda config: files)
    files[0].parent.chmod(0o777)
    listeners = [hive.unix_listener(file) for file in (files[0], files[2])]
    for listener in listeners:
        listener.listen()
        listener.setblocking(False)
    close = asker.open({}, print, print)
    with pytest.raises(BlockingIOError):
        listeners[0].accept()
    listeners[1].accept()[0].close()
    close()
    for listener in listeners:
        listener.close()
    with pytest.raises(hive.DaemonError, match="does not run"):
        asker.open({}, print, print)


# -- where it is served --


def config_in(folder: Path) -> hive.Config:
    return hive.Config(hive.NodeConfig("alpha", state_dir=folder))


def test_a_page_keeps_its_key_and_says_where_it_is(tmp_path: Path) -> None:
    config = config_in(tmp_path / "state")
    with pytest.raises(hive.HiveError, match="is being started; say this again"):
        hive.served_link(config)
    one = hive.WebService(config, 0)
    assert len(one.key) == 32 and one.listener.getsockname() == ("127.0.0.1", one.port)
    assert hive.served_link(config) == f"http://127.0.0.1:{one.port}/?key={one.key}"
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    with pytest.raises(BlockingIOError):
        hive.WebService(config, 0)
    one.close()
    other = hive.WebService(config, 0)
    assert other.key == one.key
    other.close()
    lock = tmp_path / "state" / "web.lock"
    for said in (b"{}", b'{"key": 7}', b'{"key": "a b"}', b"[]", b""):
        lock.write_bytes(said)
        with pytest.raises(hive.HiveError, match="say this again"):
            hive.served_link(config)
        third = hive.WebService(config, 0)
        assert len(third.key) == 32 and third.key != one.key
        third.close()


def test_a_place_that_cannot_be_had_is_said_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(hive.HiveError, match=f":{port}: .*take another --port$"):
            hive.WebService(config, port)
    monkeypatch.setattr(hive, "WEB_ADDRESS", "192.0.2.1")
    with pytest.raises(hive.HiveError, match=r"^192\.0\.2\.1:1: [^;]*$"):
        hive.WebService(config, 1)
    monkeypatch.undo()
    hive.WebService(config, port).close()  # the lock is free, and so is the port at once


def test_the_page_is_on_this_machine_alone_at_the_port_that_its_help_says() -> None:
    assert hive.web_link(hive.WEB_PORT, "k") == "http://127.0.0.1:8484/?key=k"


def test_a_browser_is_sent_to_a_file_that_leads_to_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import webbrowser

    opened = list[tuple[str]]()
    monkeypatch.setattr(webbrowser, "open", noting(opened, lambda url: len(opened) < 2))
    for _ in range(2):
        hive.open_browser("http://127.0.0.1:1/?key=k", tmp_path)
    file = tmp_path / "web.html"
    assert opened == [(file.as_uri(),)] * 2 and 'url=http://127.0.0.1:1/?key=k"' in file.read_text()
    said = "hive: no browser was found here; open the link in one\n"
    assert capsys.readouterr() == ("", said)
