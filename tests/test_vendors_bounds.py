"""Vendors: what is said to each program, found in its files, and refused, in this process."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import noting
from test_vendors import HIVE, home, put_entry

import hive
from hive import VENDORS

__all__ = ["home"]  # a fixture
THREAD = "01a2156e-8b13-7320-916c-180e02adbc6c"


def server(client: str, **more: Any) -> Any:
    """As much of a session's server as the ways to tell it look at."""
    return SimpleNamespace(client={"name": client}, began=2.0, meta=more)


class Runs:
    """What was run, and what comes of it instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = list[tuple[list[str], dict[str, Any]]]()
        self.code, self.out, self.err, self.hangs = 0, "", "", False
        monkeypatch.setattr(subprocess, "run", self.run)

    def run(self, argv: list[str], **how: Any) -> Any:
        self.calls.append((argv, how))
        if self.hangs:
            raise subprocess.TimeoutExpired(argv, how["timeout"])
        return subprocess.CompletedProcess(argv, self.code, self.out, self.err)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


# -- its own command --


def test_a_setting_lies_where_the_program_looks_for_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = hive.SettingsFile("~/x", "sub/y.json", "X_HOME")
    monkeypatch.delenv("X_HOME", raising=False)
    assert file.path == Path(os.path.realpath(home)) / "x/sub/y.json"
    monkeypatch.setenv("X_HOME", "")
    assert file.path == Path(os.path.realpath(home)) / "x/sub/y.json"
    (home / "real").mkdir()
    (home / "link").symlink_to(home / "real")
    monkeypatch.setenv("X_HOME", "~/link")
    assert file.path == Path(os.path.realpath(home)) / "real/sub/y.json"


def test_what_a_user_is_told_when_it_is_done() -> None:
    told = {name: (one.told(False), one.told(True)) for name, one in VENDORS.items()}
    codex, opencode = VENDORS["codex"].note, VENDORS["opencode"].note
    assert "/hooks" in codex and "--port" in opencode
    assert told == dict.fromkeys(VENDORS, ("", "")) | {
        "codex": ("", codex),
        "opencode": (opencode, opencode),
    }


def test_each_word_of_hives_own_command_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "/k")
    template = "add {kept} {program} -- {arguments} {hive} {flagged} {other}"
    words = hive.vendor_argv("/bin/x", template, ["h", "a b", "c"], "KEPT")
    assert words == [
        *("/bin/x", "add", "--env", "KEPT=/k", "h", "--", "a b", "c"),
        *("h", "a b", "c", "--arg=a b", "--arg=c", "{other}"),
    ]
    monkeypatch.setenv("KEPT", "")
    assert hive.vendor_argv("x", "{kept}", [], "KEPT") == ["x"]


def test_it_is_started_as_it_was_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bin/hive", "mcp"])
    assert hive.own_command() == [sys.executable, str(Path.cwd() / "bin/hive")]


def test_a_program_has_three_minutes_and_no_terminal(home: Path, runs: Runs) -> None:
    change = hive.vendor_call("gemini", ["/bin/gemini", "mcp", "a b"])
    assert change.shown == "gemini mcp 'a b'"
    change.make()
    ((argv, how),) = runs.calls
    assert argv == ["/bin/gemini", "mcp", "a b"]
    assert (how["timeout"], how["stdin"]) == (180.0, subprocess.DEVNULL)
    assert (how["encoding"], how["errors"], how["capture_output"]) == ("utf-8", "replace", True)


@pytest.mark.parametrize(
    ("out", "err", "why"),
    [
        ("said\nmore", " \nwhy\nmore", "why"),
        ("\n said\nmore", "\n", "said"),
        ("", "", "no word of why"),
        ("x" * 300, "", "x" * 199 + "…"),
        ("a\x07b", "", "a?b"),
    ],
)
def test_the_first_line_of_what_a_program_says_is_why(
    runs: Runs, out: str, err: str, why: str
) -> None:
    runs.code, runs.out, runs.err = 3, out, err
    with pytest.raises(hive.HiveError) as error:
        hive.vendor_call("codex", ["codex"]).make()
    assert str(error.value) == f"codex did not do it: {why}"
    runs.hangs = True
    with pytest.raises(hive.HiveError, match=r"^codex did not do it: no answer in time$"):
        hive.vendor_call("codex", ["codex"]).make()


def test_the_program_is_the_one_on_the_path(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hive.vendor_program("codex") == str(home / "bin" / "codex")
    monkeypatch.setenv("PATH", str(home))
    for change in (hive.vendor_program, lambda name: hive.vendor_changes(name, ["x"], [])):
        with pytest.raises(
            hive.HiveError, match=r"^Codex is not installed: no program called codex"
        ):
            change("codex")


# -- its files --


def test_what_stands_in_a_file_is_the_command_that_it_has(home: Path) -> None:
    vendor = VENDORS["opencode"]
    assert hive.entry_in(vendor) is None
    file = put_entry(vendor, ["/x/hive", "mcp"])
    assert hive.entry_in(vendor) == ["/x/hive", "mcp"]
    file.write_text('{"mcp": {"hive": {"command": "/x/hive", "args": ["mcp"]}}}')
    assert hive.entry_in(vendor) == ["/x/hive", "mcp"]
    file.write_text('{"mcp": {"hive": {"url": "x"}}}')
    assert hive.entry_in(vendor) is None
    other = file.with_suffix(".jsonc")
    other.write_text('{"mcp": {"hive": {"command": ["/y"]}}}')
    assert hive.entry_in(vendor) == ["/y"]  # OpenCode reads either
    file.write_text("{/* mine */}")
    assert hive.entry_in(vendor) == ["/y"]
    other.write_text("{}")
    assert hive.entry_in(vendor) == []


def test_an_entry_is_taken_out_of_either_file_and_its_neighbours_stay(home: Path) -> None:
    vendor = VENDORS["opencode"]
    file = vendor.settings.path
    other = file.with_suffix(".jsonc")
    file.parent.mkdir(parents=True)
    for one in (file, other):
        one.write_text('{"mcp": {"hive": {"command": ["/x"]}, "theirs": {}}}')
    changes = hive.vendor_removals("opencode")
    assert [one.shown for one in changes] == [f"{one}: without mcp.hive" for one in (file, other)]
    for change in changes:
        change.make()
    assert file.read_text() == '{\n  "mcp": {\n    "theirs": {}\n  }\n}\n' == other.read_text()


@pytest.mark.parametrize("name", VENDORS)
def test_what_cannot_be_read_is_not_taken_out_before_hive_is_entered(home: Path, name: str) -> None:
    file = VENDORS[name].settings.path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{/* mine */}")
    (change,) = hive.vendor_changes(name, [*HIVE, "mcp"], [])
    assert " add " in change.shown


def test_a_place_in_a_document_is_an_object_or_an_empty_one() -> None:
    document = {"a": {"b": {"c": 1}}, "d": [1]}
    assert hive.nested(document, ["a", "b"]) == {"c": 1} == hive.nested({"c": 1}, [])
    for place in (["a", "x"], ["d"], ["d", "e"], ["a", "b", "c"], ["a", "b", "c", "d"]):
        assert hive.nested(document, place) == {}


def read(file: Path) -> Any:
    return hive.read_settings(file, "do it yourself")


def test_what_a_file_of_settings_holds(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    assert read(file) == {}
    for text in ("", " \n"):
        file.write_text(text)
        assert read(file) == {}
    file.write_text('{"a": {"b": 1}}')
    assert read(file) == {"a": {"b": 1}}
    (tmp_path / "x.toml").write_text("a = 1")
    assert read(tmp_path / "x.toml") == {"a": 1}
    (tmp_path / "x.toml").write_text("a = ")
    with pytest.raises(hive.HiveError, match=r"stays as it is; do it yourself$"):
        read(tmp_path / "x.toml")
    with pytest.raises(hive.HiveError, match=f"^{tmp_path}: Is a directory$"):
        read(tmp_path)
    for text in ('{"a": {"b": 1, "b": 2}}', "7"):
        file.write_text(text)
        with pytest.raises(hive.HiveError, match=r"stays as it is; do it yourself$"):
            read(file)
    most = 8 * 1024 * 1024
    file.write_text("{}" + " " * (most - 2))
    assert read(file) == {}
    file.write_text(" " * (most - 1) + "{}")
    with pytest.raises(hive.HiveError, match="stays as it is"):
        read(file)


# -- hooks --


def handlers(*commands: str) -> dict[str, Any]:
    return {"hooks": [{"type": "command", "command": command} for command in commands]}


OURS, OLD = handlers("/x/hive hook"), handlers("/old/hive hook")
MIXED = {"matcher": "*", **handlers("say done", "/old/hive hook")}
REST = {"matcher": "*", **handlers("say done")}
HOOKS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    # there; with hive's at Stop and Start; without it
    ({}, {"Stop": [OURS], "Start": [OURS]}, {}),
    ({"End": []}, {"End": [], "Stop": [OURS], "Start": [OURS]}, {"End": []}),
    ({"Stop": [OLD, REST]}, {"Stop": [REST, OURS], "Start": [OURS]}, {"Stop": [REST]}),
    ({"Stop": [OURS, REST]}, {"Stop": [OURS, REST], "Start": [OURS]}, {"Stop": [REST]}),
    ({"Stop": [OURS, OLD]}, {"Stop": [OURS], "Start": [OURS]}, {}),
    ({"Stop": [OURS, OURS]}, {"Stop": [OURS], "Start": [OURS]}, {}),
    ({"Stop": [MIXED]}, {"Stop": [REST, OURS], "Start": [OURS]}, {"Stop": [REST]}),
    ({"Other": [OLD]}, {"Stop": [OURS], "Start": [OURS]}, {}),
    ({"Other": [7, {}]}, {"Other": [7, {}], "Stop": [OURS], "Start": [OURS]}, {"Other": [7, {}]}),
]


@pytest.mark.parametrize(("there", "entered", "without"), HOOKS)
def test_hives_hooks_stand_once_behind_those_of_others(
    there: dict[str, Any], entered: dict[str, Any], without: dict[str, Any]
) -> None:
    events = ("Stop", "Start")
    assert hive.with_hooks(there, events, [OURS]) == entered
    assert hive.with_hooks(there, events, []) == without
    assert hive.with_hooks(entered, events, [OURS]) == entered


def test_of_a_group_only_hives_commands_go() -> None:
    assert hive.without_hive(MIXED) == REST and hive.without_hive(OURS) is None
    groups: list[Any] = [REST, 7, {}, {"hooks": 7}, {"hooks": []}]
    for group in groups:
        assert hive.without_hive(group) is group


@pytest.mark.parametrize("hooks", [[], 7, {"Stop": {}}, None])
def test_hooks_in_another_form_are_left_alone(home: Path, hooks: Any) -> None:
    file = home / ".claude" / "settings.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"hooks": hooks}))
    for hook in (["/x/hive", "hook"], []):
        with pytest.raises(hive.HiveError, match="its hooks have a form that hive does not know"):
            hive.hooks_change(VENDORS["claude"], " ".join(hook))


def test_a_command_with_blanks_is_one_of_words_for_a_shell(home: Path) -> None:
    (change,) = hive.vendor_changes("claude", [], ["/my place/hive", "hook"])[-1:]
    assert change.shown.endswith(": '/my place/hive' hook, at UserPromptSubmit and Stop")
    change.make()
    file = home / ".claude" / "settings.json"
    (group,) = json.loads(file.read_text())["hooks"]["Stop"]
    wanted = {"type": "command", "command": "'/my place/hive' hook", "timeout": 10}
    assert group == {"hooks": [wanted]}
    assert file.stat().st_mode & 0o777 == 0o600
    (change,) = hive.hooks_change(VENDORS["claude"], "")
    assert change.shown == f"{file}: without hive's hooks"
    change.make()
    change.make()  # another has done it meanwhile
    assert not file.exists() and hive.hooks_change(VENDORS["claude"], "") == []
    assert hive.hooks_change(VENDORS["openclaw"], "x") == []


@pytest.mark.parametrize(
    ("command", "ours"),
    [
        ("hive hook", True),
        ("hive-cli hook", True),
        ("python3 /x/hive.py hook", True),
        ("env python3 hive.py hook", False),
        ("hook", False),
        ("hive hook -v", False),
    ],
)
def test_a_hook_is_hives_by_one_of_its_first_two_words(command: str, ours: bool) -> None:
    assert hive.is_hook_of_hive({"command": command}) is ours
    for odd in (command, {}, {"command": None}, None, [command], {"command": "'"}):
        assert not hive.is_hook_of_hive(odd)  # some ask a model, not a command


def test_of_the_processes_above_fifty_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hive, "parent_process", lambda pid: pid + 1)
    assert hive.processes_above() == [os.getppid() + n for n in range(50)]
    for last in (1, 0):
        monkeypatch.setattr(hive, "parent_process", lambda pid, last=last: last)
        assert hive.processes_above() == [os.getppid(), last]


def test_what_ps_says_is_asked_where_there_is_no_proc(
    monkeypatch: pytest.MonkeyPatch, runs: Runs
) -> None:
    gone = 2**22 + 1
    runs.out = " 77\n"
    assert hive.parent_process(gone) == 0 and runs.calls == []
    monkeypatch.setattr(sys, "platform", "darwin")
    assert hive.parent_process(gone) == 77
    ((argv, how),) = runs.calls
    assert argv == ["ps", "-o", "ppid=", "-p", str(gone)]
    assert (how["timeout"], how["text"], how["capture_output"]) == (2, True, True)
    runs.out = ""
    assert hive.parent_process(gone) == 0
    runs.hangs = True
    assert hive.parent_process(gone) == 0 and hive.process_facts(1, "args=") == ""
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "/nowhere")
    assert hive.process_facts(1, "args=") == ""


def test_a_hook_waits_two_seconds_for_the_daemon_and_reads_a_mebibyte(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, limits = list[tuple[Any, float]](), list[tuple[int]]()
    event = b'{"hook_event_name": "Stop"}'
    monkeypatch.setattr(hive, "read_stdin", noting(limits, lambda limit: event))
    monkeypatch.setattr(hive, "connect_to_daemon", noting(waits, lambda *given: None))
    monkeypatch.setattr(hive, "mail_may_wait", lambda args: True)
    (home / "hive.toml").write_text('[node]\nid = "alpha"\nstate_dir = "state"\n')
    args = hive.make_parser("hook").parse_args(["hook", "--config", str(home / "hive.toml")])
    assert hive.command_hook(args) == 0
    assert ([wait for _, wait in waits], limits) == ([2.0], [(1024 * 1024,)])
    for said in (b"{}", b'{"hook_event_name": "Stop", "stop_hook_active": true}'):
        event = said
        assert hive.command_hook(args) == 0
    assert len(waits) == 1


# -- into a live session --


def test_claude_code_is_told_by_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines = list[tuple[Any, float]]()
    monkeypatch.setattr(socket.socket, "settimeout", noting(deadlines, socket.socket.settimeout))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "inbox"))
        listener.listen()
        monkeypatch.setenv("CLAUDE_CODE_MESSAGING_SOCKET", str(tmp_path / "inbox"))
        assert hive.claude_inbox(server("claude-code")) is None
        monkeypatch.setenv("CLAUDE_CODE_MESSAGING_TOKEN", "t")
        assert hive.claude_inbox(server("codex")) is None
        push = hive.claude_inbox(server("Claude-Code"))
        assert push and push("hello") is True
        sock, _ = listener.accept()
        with sock, sock.makefile() as lines:
            auth, said = map(json.loads, lines.read().splitlines())
    assert [one for _, one in deadlines] == [2.0] and auth == {"type": "auth", "token": "t"}
    assert said == {"type": "user", "message": {"role": "user", "content": "hello"}}
    with pytest.raises(OSError, match="refused"):
        push("hello")
    monkeypatch.delenv("CLAUDE_CODE_MESSAGING_SOCKET")
    assert hive.claude_inbox(server("claude-code")) is None


def test_codex_is_told_by_its_own_command(runs: Runs) -> None:
    push = hive.codex_queue(server("codex-mcp-client", threadId=THREAD))
    assert push and push("hello") is True
    ((argv, how),) = runs.calls
    assert argv == ["codex", "queue", "--thread", THREAD, "--message", "hello"]
    assert how["timeout"] == 20.0 and how["stdin"] == subprocess.DEVNULL
    assert how["capture_output"] is True  # what it prints is no part of the protocol
    runs.code = 1
    assert push("hello") is False
    runs.code, runs.hangs = 0, True
    assert push("hello") is False
    turn: Callable[[object], Any] = lambda said: hive.codex_queue(  # noqa: E731
        server("codex", threadId=THREAD, **{"x-codex-turn-metadata": said})
    )
    assert turn({"turn_trigger": "user"}) and turn("exec") and turn({})
    assert turn({"turn_trigger": "exec"}) is None
    for thread in (None, 7, "", THREAD[1:], f"{THREAD}0", "--" + THREAD[2:].upper()):
        assert hive.codex_queue(server("codex", threadId=thread)) is None
    assert hive.codex_queue(server("claude-code", threadId=THREAD)) is None


class OpenCode:
    """Its server's answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = list[tuple[Any, ...]]()
        self.sessions, self.status = list[Any](), 204
        monkeypatch.setattr(hive, "opencode_port", lambda: 4096)
        monkeypatch.setattr(hive, "ask_opencode", self.ask)

    def ask(self, *given: Any) -> tuple[int, bytes]:
        self.asked.append(given)
        return self.status, json.dumps(self.sessions).encode()


def test_opencode_is_told_in_the_session_that_was_used_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = OpenCode(monkeypatch)
    push = hive.opencode_prompt(server("OpenCode"))
    assert push
    program.sessions = [{"id": "old", "time": {"updated": 1999}}]
    assert push("hello") is False and len(program.asked) == 1
    program.sessions += [{"id": "below", "parentID": "a", "time": {"updated": 9000}}]
    program.sessions += [
        {"id": one, "time": {"updated": at}} for one, at in (("a", 2000), ("b", 2001))
    ]
    assert push("hello") is True
    *_, (port, place, method, path, body) = program.asked
    assert (port, place, method, path) == (
        *(4096, os.getcwd(), "POST"),
        "/session/b/prompt_async",
    )
    assert json.loads(body) == {"parts": [{"type": "text", "text": "hello"}]}
    assert program.asked[-2][2:] == ("GET", "/session")
    del program.sessions[-1]
    assert push("hello") is True  # one that was used as this began
    program.status = 200
    assert push("hello") is False
    assert hive.opencode_prompt(server("codex")) is None
    monkeypatch.setattr(hive, "opencode_port", lambda: 0)
    assert hive.opencode_prompt(server("opencode")) is None


@pytest.mark.parametrize(
    ("line", "port"),
    [
        ("opencode --port 4096", 4096),
        ("opencode --port=1 x", 1),
        ("opencode --port 123456", 0),
        ("opencode --port x", 0),
        ("opencode x--port 1", 0),
        ("", 0),
    ],
)
def test_the_port_of_opencode_stands_in_its_command(
    monkeypatch: pytest.MonkeyPatch, line: str, port: int
) -> None:
    asked = list[tuple[int, str]]()
    monkeypatch.setattr(hive, "process_facts", noting(asked, lambda *given: line))
    monkeypatch.setenv("OPENCODE_PID", "77")
    assert hive.opencode_port.__wrapped__() == port
    monkeypatch.delenv("OPENCODE_PID")
    assert hive.opencode_port.__wrapped__() == port
    assert asked == [(77, "args="), (os.getppid(), "args=")]


def test_a_request_to_opencode_names_its_directory_and_shows_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard = list[tuple[str, str, Mapping[str, str], bytes]]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            heard.append((self.command, self.path, dict(self.headers), body))
            if self.path.startswith("/odd"):
                self.wfile.write(b"nonsense\r\n\r\n")
                return
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    served = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
    try:
        said = ("POST", "/x", b"{}")
        monkeypatch.delenv("OPENCODE_SERVER_PASSWORD", raising=False)
        monkeypatch.delenv("OPENCODE_SERVER_USERNAME", raising=False)
        assert hive.ask_opencode(served.server_port, "/a b", *said) == (204, b"")
        method, path, headers, body = heard[0]
        assert (method, path, body) == ("POST", "/x?directory=%2Fa+b", b"{}")
        assert headers["Content-Type"] == "application/json" and "Authorization" not in headers
        monkeypatch.setenv("OPENCODE_SERVER_PASSWORD", "p")
        for user in ("", "ada"):
            monkeypatch.setenv("OPENCODE_SERVER_USERNAME", user)
            hive.ask_opencode(served.server_port, "/", *said)
            key = base64.b64encode(f"{user or 'opencode'}:p".encode()).decode()
            assert heard[-1][2]["Authorization"] == f"Basic {key}"
        with pytest.raises(OSError, match="BadStatusLine"):
            hive.ask_opencode(served.server_port, "/", "POST", "/odd")
    finally:
        served.shutdown()
        served.server_close()
    with pytest.raises(OSError, match="refused"):
        hive.ask_opencode(served.server_port, "/", *said)


def test_opencode_has_five_seconds_for_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    import http.client

    made = list[tuple[Any, ...]]()

    def connection(host: str, port: int, timeout: float) -> Any:
        made.append((host, port, timeout))
        raise OSError("enough")

    monkeypatch.setattr(http.client, "HTTPConnection", connection)
    with pytest.raises(OSError, match="enough"):
        hive.ask_opencode(4096, "/", "GET", "/")
    assert made == [("127.0.0.1", 4096, 5.0)]


def test_who_a_client_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hive.is_client(server("Codex-MCP-client"), "codex")
    assert not hive.is_client(server("x-codex"), "codex")
    assert not hive.is_client(SimpleNamespace(client={}), "codex")  # type: ignore[arg-type]
    assert [*hive.PUSHES] == ["inbox", "queue", "prompt"]
