"""The page's server: who may ask, what is answered, and that nobody can make it grow or hang.

What takes a browser is in web_page.py (make test-web).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Clock, free_port, run_until
from stage import Stage

import hive

KEY = "0123456789abcdef0123456789abcdef"


class Browser:
    """One connection to the page's server, which runs in this very loop."""

    def __init__(self, site: Site) -> None:
        self.site, self.heard, self.closed = site, b"", False
        self.sock = socket.create_connection(("127.0.0.1", site.port))
        self.sock.setblocking(False)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def read(self) -> bytes:
        """What has come by now."""
        try:
            while data := self.sock.recv(1 << 16):
                self.heard += data
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        return self.heard

    def until(self, what: str, found: Callable[[bytes], object]) -> None:
        run_until(self.site.loop, what, lambda: found(self.read()))

    def answer(self) -> tuple[int, str, bytes]:
        """The next whole response: status, head, body."""

        def whole(heard: bytes) -> bool:
            head, end, rest = heard.partition(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", head)
            return bool(end) and length is not None and len(rest) >= int(length[1])

        self.until("a response", whole)
        head, _, rest = self.heard.partition(b"\r\n\r\n")
        length = int((re.search(rb"Content-Length: (\d+)", head) or [b"", b"0"])[1])
        self.heard = rest[length:]
        return int(head.split()[1]), head.decode(), rest[:length]

    def events(self) -> list[tuple[str, Any]]:
        """The server-sent events that have come."""
        found = re.findall(rb"event: (\w+)\ndata: (.*)\n\n", self.read())
        return [(kind.decode(), json.loads(data)) for kind, data in found]


class Site:
    """A page's server for a node with a past."""

    def __init__(self, loop: hive.Loop, folder: Path, **how: Any) -> None:
        self.loop, self.folder = loop, folder
        self.stage = Stage(folder, 4, loop)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        command = [sys.executable, "-c", "import sys; sys.exit('hive: no ' + sys.argv[1])"]
        how = {"command": command, **how}
        self.server = hive.WebServer(loop, self.stage.config, KEY, listener=listener, **how)
        self.cookie = self.ask(f"/?key={KEY}", cookie="")[1].split("Set-Cookie: ")[1].split(";")[0]

    def head(self, path: str, method: str = "GET", **headers: str) -> bytes:
        """A request as this page itself would make it, but for what `headers` say."""
        own = {"host": f"127.0.0.1:{self.port}", "cookie": getattr(self, "cookie", "")}
        if method == "POST":
            own |= {"origin": f"http://{own['host']}", "content-type": "application/json"}
        said = own | {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{name}: {value}\r\n" for name, value in said.items() if value]
        return f"{method} {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode()

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str, bytes]:
        browser = Browser(self)
        browser.send(self.head(path, method, **headers))
        return browser.answer()

    def get(self, path: str) -> Any:
        return json.loads(self.ask(path)[2])

    def post(self, path: str, document: Any, **headers: str) -> tuple[int, Any]:
        body = json.dumps(document).encode()
        browser = Browser(self)
        browser.send(self.head(path, "POST", content_length=str(len(body)), **headers) + body)
        status, _, said = browser.answer()
        return status, json.loads(said)

    def open(self) -> Browser:
        """A page that is shown, with all that there is."""
        browser = Browser(self)
        browser.send(self.head("/events"))
        browser.until("the nodes", lambda heard: heard.count(b"event: node\n") >= 4)
        browser.until("the history", lambda heard: b"event: history\n" in heard)
        return browser


@pytest.fixture
def site(loop: hive.Loop, tmp_path: Path) -> Iterator[Site]:
    site = Site(loop, tmp_path)
    yield site
    site.server.close()
    site.stage.control.close()


# ---- who may ask


def test_the_link_gives_a_cookie_that_no_script_and_no_other_site_can_use(site: Site) -> None:
    status, head, body = site.ask(f"/?key={KEY}", cookie="")
    assert status == 200 and body.startswith(b"<!DOCTYPE html>")
    cookie = re.search(r"Set-Cookie: (.*)", head)
    assert cookie and cookie[1].strip().endswith("; HttpOnly; SameSite=Strict; Path=/")
    assert KEY not in cookie[1]
    assert site.ask("/")[0] == 200


FORBIDDEN: dict[str, dict[str, str]] = {
    "no key": {"cookie": ""},
    "a wrong cookie": {"cookie": "hive-1=x"},
    "another's bearer": {"cookie": "", "authorization": "Bearer x"},
    "a name that another may have made for us": {"host": "hive.example:8484"},
    "no name": {"host": ""},
    "another site": {"origin": "http://evil.example"},
    "another program on this machine": {"origin": "http://127.0.0.1:1"},
    "no origin known": {"origin": "null"},
    "an image on another page": {"sec_fetch_site": "cross-site"},
    "an image on another port": {"sec_fetch_site": "same-site"},
}


def test_nothing_is_told_to_others(site: Site) -> None:
    for path in ("/", "/events", "/log", "/exchange?id=x"):
        answers = {name: site.ask(path, **headers) for name, headers in FORBIDDEN.items()}
        assert {name: status for name, (status, _, _) in answers.items()} == dict.fromkeys(
            FORBIDDEN, 403
        )
        assert all({*json.loads(body)} == {"error"} for _, _, body in answers.values())


def test_nothing_is_done_for_others(site: Site) -> None:
    others = {name: how for name, how in FORBIDDEN.items() if "sec_fetch_site" not in how}
    others |= {"a program that tells no origin": {"origin": ""}}  # a page of ours always does
    for path in ("/send", "/reply", "/forget", "/doctor"):
        said = {"to": "attic", "text": "x"}
        statuses = {name: site.post(path, said, **headers)[0] for name, headers in others.items()}
        assert statuses == dict.fromkeys(others, 403)
    assert not site.stage.node.journal.outbox_size


def test_it_is_reached_through_a_tunnel_from_any_port(site: Site) -> None:
    for host in ("localhost:9999", "127.0.0.1:22", "[::1]:8484", "localhost"):
        assert site.ask("/log", host=host)[0] == 200


def test_a_script_may_show_the_key_instead(site: Site) -> None:
    assert site.ask("/log", cookie="", authorization=f"Bearer {KEY}")[0] == 200


def test_a_link_may_stand_on_another_site(site: Site) -> None:
    assert site.ask(f"/?key={KEY}", cookie="", sec_fetch_site="cross-site")[0] == 200


def test_a_key_in_the_address_opens_the_page_alone(site: Site) -> None:
    assert site.ask(f"/log?key={KEY}", cookie="")[0] == 403


def test_a_form_of_another_kind_is_refused(site: Site) -> None:
    assert site.post("/send", {"to": "attic", "text": "x"}, content_type="text/plain")[0] == 415


def test_nothing_is_done_where_it_is_for_looking_only(loop: hive.Loop, tmp_path: Path) -> None:
    site = Site(loop, tmp_path, read_only=True)
    for path in ("/send", "/reply", "/forget"):
        status, said = site.post(path, {"to": "studio", "text": "x"})
        assert (status, "--read-only" in said["error"]) == (403, True)
    assert site.get("/log")["rows"]
    site.server.close()


def test_the_page_asks_nobody_else_and_runs_nothing_else(site: Site) -> None:
    _, head, body = site.ask("/")
    policy = re.search(r"Content-Security-Policy: (.*)", head)
    assert policy and "default-src 'none'" in policy[1] and "unsafe" not in policy[1]
    assert policy[1].count("'sha256-") == 2
    page = body.decode()
    for tag in ("script", "style"):
        (text,) = re.findall(rf"(?s)<{tag}>(.*?)</{tag}>", page)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]
    assert {*re.findall(r"https?://[^\s\"'`]+", page)} == {"http://www.w3.org/2000/svg"}
    assert not re.search(
        r" on\w+=| style=|innerHTML|outerHTML|insertAdjacent|document\.write", page
    )
    assert page.count("<script") == page.count("<style") == 1


def test_the_page_is_as_short_as_its_lines_are() -> None:
    lines = hive.WEB_PAGE.splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 685


# ---- what is asked


def test_a_page_is_told_of_everything_and_then_of_what_is_new(site: Site) -> None:
    began = time.monotonic()
    page = site.open()
    assert time.monotonic() - began < hive.KEEP_ALIVE / 2  # at once, not when it looks again
    events = page.events()
    about = {kind for kind, _ in events}
    assert about == {"hive", "node", "history", "pending"}
    (own,) = [said for kind, said in events if kind == "hive"][-1:]
    assert (own["me"], own["daemon"], own["connected"]) == ("alpha", True, True)
    nodes = {said["name"]: said for kind, said in events if kind == "node"}
    assert nodes["studio"]["how"] == "lost" and nodes["studio"]["since"] > 0
    works = {agent["name"]: agent.get("directory") for agent in nodes["alpha"]["agents"]}
    assert works == {"claude-0": "~/src/hive", "main": None}
    assert (nodes["attic"]["rtt_ms"], nodes["attic"]["how"]) == (3, "online")
    (down,) = [agent for agent in nodes["mini"]["agents"] if agent["name"] == "main"]
    assert (down["status"], down["next_try"] > site.stage.now) == ("down", True)
    hour = next(said for kind, said in events if kind == "history")
    assert len(hour["nodes"]["alpha"][0]) == len(hour["nodes"]["alpha"][1]) == 60
    assert ["alpha", "attic"] in [pair[:2] for pair in hour["traffic"]]
    status, said = site.post("/send", {"to": "attic", "text": "<b>now</b>"})
    assert status == 200
    page.until("the new row", lambda heard: said["id"].encode() in heard)
    (row,) = [row for kind, row in page.events() if kind == "row"]
    assert (row["to"], row["text"], row["event"]) == ("attic", "<b>now</b>", "out")


def test_what_makes_no_sense_in_a_state_or_a_roster_is_not_shown() -> None:
    state = {"status": "a b", "oc": [1], "host": 7, "running": "x", "rtt_ms": -1, "load_1m": []}
    (row,) = hive.status_rows({"odd": state}, hive.HeartbeatConfig(), 1e9)
    for roster in (
        {"schedule": 5, "handlers": 7},
        {"schedule": [5], "handlers": {}, "sessions": 1},
    ):
        view = hive.node_view(row, state, roster, 0.0)
        assert view["how"] == "unknown"
        assert not [*view["agents"], *view["schedule"], *view["handlers"]]
        assert {view[key] for key in ("running", "rtt_ms", "load", "up")} == {None}


def test_a_question_is_answered_to_the_page_and_not_to_an_agent(site: Site) -> None:
    page = site.open()
    _, said = site.post("/send", {"to": "attic", "text": "well?", "wait": True})
    node, journal = site.stage.node, site.stage.node.journal
    asked = hive.Envelope.check(journal.message(said["id"])["envelope"])  # type: ignore[index]
    answer = asked.reply("attic", "yes")
    topic = node.topics.to("alpha", "response")
    heard = hive.IncomingMessage(topic, answer.encode(), False, None, lambda: None)
    run_until(site.loop, "it is waited for", lambda: node.requests.waits(said["exchange"]))
    node.deliver(heard)
    page.until("the answer", lambda heard: b'"yes"' in heard)
    (row,) = [row for kind, row in page.events() if kind == "row" and row["event"] == "in"]
    assert row["note"] == hive.AWAITED
    run_until(site.loop, "nobody waits", lambda: not node.requests.waits(said["exchange"]))


def test_a_reply_goes_to_whoever_asked(site: Site) -> None:
    rows = site.get("/log?text=")["rows"]
    asked = next(row for row in rows if row["event"] == "in" and row["ch"] == "command")
    status, said = site.post("/reply", {"id": asked["id"], "text": "so it is"})
    assert (status, said["exchange"]) == (200, asked["id"])
    story = site.get(f"/exchange?id={asked['id']}")["rows"]
    assert (story[-1]["to"], story[-1]["text"]) == (asked["from"], "so it is")
    assert site.post("/reply", {"id": "no-such-id", "text": "x"})[0] == 409


NONSENSE: list[tuple[str, Any, str]] = [
    ("/send", {"to": "a b", "text": "x"}, "to: "),
    ("/send", {"to": "attic", "text": ""}, "text: "),
    ("/send", {"to": "attic", "text": "x", "ch": "loud"}, "ch: "),
    ("/send", {"to": ["attic"], "text": "x"}, "to: "),
    ("/send", [], "to: "),
    ("/reply", {"id": "x", "text": 7}, "text: "),
    ("/reply", {"id": {}, "text": "x"}, "id: "),
    ("/forget", {"name": "--help"}, "name: "),
    ("/forget", {"name": "all"}, "name: "),
]


def test_what_makes_no_sense_is_refused_in_one_line(site: Site) -> None:
    for path, document, words in NONSENSE:
        status, said = site.post(path, document)
        assert status == 400 and said["error"].startswith(words) and "\n" not in said["error"]


def test_what_a_command_says_is_the_answer(site: Site) -> None:
    assert site.post("/forget", {"name": "studio"}) == (409, {"error": "no forget"})
    code = 'print(\'[{"check": "clock", "level": "ok", "what": "it is", "todo": ""}]\')'
    site.server._command = [sys.executable, "-c", code]
    status, said = site.post("/doctor", {})
    assert (status, said["findings"][0]["check"]) == (200, "clock")


def test_the_log_is_read_backwards_page_by_page(site: Site) -> None:
    seen: list[int] = []
    query = "/log?x=1"
    while query:
        said = site.get(query)
        seen += [row["n"] for row in said["rows"]]
        query = f"/log?before={said['before']}" if said.get("before") else ""
    assert seen == sorted(seen, reverse=True) and len(seen) > 150
    assert seen[0] == site.stage.node.journal.newest


def test_texts_that_do_not_fit_into_one_answer_of_the_daemon_are_all_there(site: Site) -> None:
    for i in range(20):
        site.stage.keep(hive.Envelope.new("attic", "alpha", "status", f"{i} " + "x" * 200_000), 1.0)
    site.stage.node.journal.commit()
    first = [row["text"].split()[0] for row in site.get("/log")["rows"][:20]]
    assert first == [str(i) for i in reversed(range(20))]


def test_the_log_is_searched(site: Site) -> None:
    searches: dict[str, Callable[[Any], bool]] = {
        "node=attic": lambda row: "attic" in (row["from"], row["to"]),
        "ch=response": lambda row: row["ch"] == "response",
        "text=INVOICE": lambda row: "invoice" in row["text"],
    }
    for query, fits in searches.items():
        rows = site.get(f"/log?{query}")["rows"]
        assert rows and all(map(fits, rows)), query


def test_prometheus_shows_the_key_and_gets_its_numbers(site: Site) -> None:
    status, head, body = site.ask("/metrics", cookie="", authorization=f"Bearer {KEY}")
    assert status == 200 and "text/plain; version=0.0.4" in head
    assert b"# TYPE hive_" in body
    assert site.ask("/metrics", cookie="")[0] == 403


def test_a_search_ends_and_says_where(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hive.SEARCHED_PAGES", 1)
    said = site.get("/log?text=nobody+said+this")
    assert said["rows"] == [] and said["before"] and said["time"]


def test_a_filter_that_makes_no_sense_is_refused(site: Site) -> None:
    for query in ("ch=%00", "node=a%20b", "node=" + "x" * 500):
        status, _, body = site.ask(f"/log?{query}")
        assert status == 409 and json.loads(body)["error"]


def test_without_a_daemon_it_says_so_and_comes_back(site: Site) -> None:
    page = site.open()
    site.stage.control.close()
    page.until("it is gone", lambda heard: b'"daemon":false' in heard.replace(b" ", b""))
    status, said = site.post("/send", {"to": "attic", "text": "x"})
    assert (status, said["error"]) == (
        503,
        "the daemon of alpha does not run; start it: hive daemon",
    )
    page.heard = b""
    site.stage.control = hive.ControlServer(site.loop, site.stage.place, site.stage.answer)
    page.until("it is back", lambda heard: b'"daemon":true' in heard.replace(b" ", b""))
    _, said = site.post("/send", {"to": "attic", "text": "again"})
    page.until("and followed", lambda heard: said["id"].encode() in heard)


# ---- who does wrong


HOSTILE = [
    (b"GET\r\n\r\n", 400),
    (b"GET http://x/ HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/2.0\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nhost: evil\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nhost : 127.0.0.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nhost: 127.0.0.1\n folded\r\n\r\n", 400),
    (b"POST /send HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", 400),
    (b"POST /send HTTP/1.1\r\ncontent-length: -1\r\n\r\n", 400),
    (b"POST /send HTTP/1.1\r\ncontent-length: 99999999\r\n\r\n", 413),
    (b"GET /" + b"x" * 20_000, 431),
    (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 4000, 431),
    (b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", 403),
]


def test_a_hostile_request_ends_its_own_connection(site: Site) -> None:
    for request, status in HOSTILE:
        browser = Browser(site)
        browser.send(request)
        assert browser.answer()[0] == status, request[:80]
        browser.until("its end", lambda heard, one=browser: one.closed)  # type: ignore[misc]
    for path, method in (("/none", "GET"), ("/", "PUT"), ("/send", "GET")):
        assert site.ask(path, method)[0] == 404
    assert site.get("/log")["rows"]


def test_requests_come_one_after_the_other_however_they_are_cut(site: Site) -> None:
    body = json.dumps({"to": "attic", "text": "piece by piece"}).encode()
    first = site.head("/send", "POST", content_length=str(len(body))) + body
    browser = Browser(site)
    for i in range(0, len(first), 41):
        browser.send(first[i : i + 41])
        browser.until("some time", lambda heard: True)
    browser.send(site.head("/log") + site.head("/", connection="close"))
    assert [browser.answer()[0] for _ in range(3)] == [200, 200, 200]
    browser.until("its end", lambda heard: browser.closed)


def test_who_sends_nothing_and_who_dawdles_is_sent_away(site: Site, clock: Clock) -> None:
    silent, slow = Browser(site), Browser(site)
    slow.send(b"GET / HT")
    page = site.open()
    run_until(site.loop, "both are in", lambda: len(site.server._connections) >= 3)
    clock.skipped += hive.REQUEST_TIME + hive.KEEP_ALIVE
    for browser in (silent, slow):
        browser.until("its end", lambda heard, one=browser: one.closed)  # type: ignore[misc]
    assert not page.closed


def test_a_hundred_connections_of_strangers_keep_nobody_out(site: Site) -> None:
    page = site.open()
    strangers = [Browser(site) for _ in range(hive.MAX_WEB_CONNECTIONS + 20)]
    run_until(site.loop, "all are in", lambda: not pending_connections(site))
    assert len(site.server._connections) <= hive.MAX_WEB_CONNECTIONS
    assert site.get("/log")["rows"]
    _, said = site.post("/send", {"to": "attic", "text": "still here"})
    page.until("the page goes on", lambda heard: said["id"].encode() in heard)
    assert sum(one.closed for one in strangers if one.read() is not None) >= 20


def pending_connections(site: Site) -> bool:
    """Is there one that has not been taken?"""
    import select

    return bool(select.select([site.server._listener], [], [], 0)[0])


def test_too_much_at_once_is_told_so(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hive.MAX_LINKS", 0)
    status, said = site.post("/send", {"to": "attic", "text": "x"})
    assert (status, said) == (503, {"error": "too much is asked at once; try again"})


def test_a_page_too_many_is_told_so(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hive.MAX_PAGES", 2)
    pages = [site.open(), site.open()]
    status, _, body = site.ask("/events")
    assert status == 503 and "2 pages are open already" in body.decode()
    pages[0].sock.close()
    run_until(site.loop, "it has gone", lambda: len(site.server._pages) == 1)
    site.open()


def test_a_page_that_does_not_read_costs_no_more_than_what_there_is(
    site: Site, clock: Clock
) -> None:
    slow, quick = site.open(), site.open()
    (theirs,) = [
        one
        for one in site.server._connections
        if one.stream._sock.getpeername() == slow.sock.getsockname()
    ]
    theirs.stream._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    text, most = "x" * 190, 0
    for i in range(30):
        for j in range(100):
            site.stage.keep(hive.Envelope.new("attic", "alpha", "status", f"{i} {j} {text}"), 1.0)
        site.stage.node.commit()
        last = f"{i} 99".encode()
        quick.until("the other reads on", lambda heard, last=last: last in heard)  # type: ignore[misc]
        quick.heard = b""
        most = max(most, theirs.stream.output_size)
    assert 0 < most < hive.LIVE_ROWS * 1000
    slow.until("it hears what it missed", lambda heard: b"event: missed" in heard)
    slow.until("and the last of it", lambda heard: b"29 99" in heard)


def test_a_page_that_reads_nothing_for_long_is_ended(site: Site, clock: Clock) -> None:
    site.open()
    (theirs,) = site.server._pages
    theirs.stream._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    theirs.stream.write(b": " + b"x" * 8_000_000 + b"\n\n")
    clock.skipped += hive.UNREAD_TIME + hive.KEEP_ALIVE
    run_until(site.loop, "it is ended", lambda: not site.server._pages)


def test_nothing_is_asked_while_no_page_is_open(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hive.LOOKS, "states", 0.1)
    page = site.open()
    page.sock.close()
    run_until(site.loop, "it has gone", lambda: not site.server._pages)
    version = site.server.view.version
    until = site.loop.clock() + 3 * hive.LOOKS["states"]
    run_until(site.loop, "some time", lambda: site.loop.clock() > until)
    assert (site.server.view.version, len(site.stage.control.connections)) == (version, 0)


# ---- the command


def start(home: Path, *arguments: str) -> subprocess.Popen[str]:
    (home / "hive.toml").write_text('[node]\nid = "alpha"\nstate_dir = "state"\n')
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HIVE_")}
    return subprocess.Popen(
        [sys.executable, f"{ROOT}/hive-cli", "web", f"--config={home}/hive.toml", *arguments],
        env=environment | {"HOME": str(home), "BROWSER": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_serves_until_it_is_ended_and_says_where(tmp_path: Path) -> None:
    port = free_port()
    first = start(tmp_path, f"--port={port}")
    assert first.stdout
    line = first.stdout.readline()
    said = re.fullmatch(rf"the page of alpha: (http://127\.0\.0\.1:{port}/\?key=\w+)\n", line)
    assert said
    lock = tmp_path / "state" / "web.lock"
    assert lock.stat().st_mode & 0o777 == 0o600
    again, _ = start(tmp_path, "--port=1", "--open").communicate(timeout=30)
    assert again == f"the page of alpha is served already: {said[1]}\n"
    assert (tmp_path / "state" / "web.html").stat().st_mode & 0o777 == 0o600
    (tmp_path / "state" / "web.html").unlink()
    first.send_signal(signal.SIGTERM)
    rest, errors = first.communicate(timeout=30)
    assert (first.returncode, rest, errors) == (0, "", "")
    third = start(tmp_path, f"--port={port}")
    assert third.stdout and third.stdout.readline() == line  # pages that are open go on
    third.terminate()
    third.communicate(timeout=30)
    assert not (tmp_path / "state" / "web.html").exists()  # nobody said --open


def test_the_port_is_the_pages_and_the_brokers_goes_before() -> None:
    said = hive.make_parser("web").parse_args(["--port", "1884", "web", "--port", "8485"])
    assert (vars(said)["mqtt.port"], said.page_port) == (1884, 8485)
    assert [*hive.common_arguments(said)] == ["--port=1884"]  # for what the page runs
    alone = hive.make_parser("web").parse_args(["web"])
    assert ("mqtt.port" in vars(alone), alone.page_port) == (False, hive.WEB_PORT)
    done = subprocess.run(
        [sys.executable, f"{ROOT}/hive-cli", "web", "--help"], capture_output=True, text=True
    )
    assert done.stdout.count("  --port PORT  ") == 1 and "the page's own" in done.stdout


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = start(tmp_path, f"--port={port}")
        _, errors = done.communicate(timeout=30)
    hint = "Address already in use; another program listens there, take another --port"
    assert (done.returncode, errors) == (1, f"hive: 127.0.0.1:{port}: {hint}\n")
