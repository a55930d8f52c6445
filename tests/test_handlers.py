"""Handlers: which executables there are, what they are given, what is made of their result."""

from __future__ import annotations

import grp
import json
import os
import pwd
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hive

DEADLINE = 30.0
ASKED = hive.Envelope.new(
    "alpha", "beta", "command", "please", id="id-1", corr="corr-1", action="git-sync"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A handler directory that belongs to its user alone."""
    folder = tmp_path / "hive-daemon.d"
    folder.mkdir()
    folder.chmod(0o755)
    return folder


@pytest.fixture(params=[False, True], ids=["shared group", "private group"])
def private(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Is the group of every file its owner's alone?"""
    monkeypatch.setattr(hive, "is_private_group", lambda gid: request.param)
    return bool(request.param)


def put(file: Path, mode: int = 0o755, content: str = "#!/bin/sh\n") -> Path:
    file.write_text(content)
    file.chmod(mode)
    return file


def result_of(stdout: bytes = b"", exit: int | None = 0, **more: Any) -> hive.ProcessResult:
    return hive.ProcessResult(exit, DEADLINE, stdout, **more)


# What may be run


def test_an_executable_is_a_handler_named_after_its_file(folder: Path) -> None:
    put(folder / "ping")
    put(folder / "git-sync", 0o700)
    put(folder / "v1.2_x")
    found = hive.scan_handlers(folder)
    assert found.handlers == {name: folder / name for name in ("git-sync", "ping", "v1.2_x")}
    assert found.refused == {}


def test_a_hidden_file_is_passed_over_in_silence(folder: Path) -> None:
    put(folder / ".ping.swp")
    assert hive.scan_handlers(folder) == hive.HandlerSet()


@pytest.mark.parametrize("name", ["two words", "ping~", "-rf", "_x", "ä", "a" * 64, "a\nb", "a;b"])
def test_a_file_that_no_action_can_name_is_refused(folder: Path, name: str) -> None:
    put(folder / name)
    put(folder / "ping")
    found = hive.scan_handlers(folder)
    assert found.handlers == {"ping": folder / "ping"}
    assert [*found.refused] == [name]
    assert "1 to 63 of A-Za-z0-9._-" in found.refused[name]


@pytest.mark.parametrize("name", ["state", "roster"])
def test_a_handler_must_not_take_the_place_of_a_document(folder: Path, name: str) -> None:
    put(folder / name)
    assert hive.scan_handlers(folder).refused == {
        name: "this name is taken by a topic of hive's own"
    }
    assert hive.scan_handlers(folder).handlers == {}


@pytest.mark.parametrize("name", ["State", "state2", "all", "meta", "a" * 63])
def test_other_names_are_free(folder: Path, name: str) -> None:
    put(folder / name)
    assert [*hive.scan_handlers(folder).handlers] == [name]


def test_a_folder_is_no_handler(folder: Path) -> None:
    (folder / "ping").mkdir(mode=0o755)
    assert hive.scan_handlers(folder).refused == {"ping": "not a regular file"}


def test_a_pipe_is_no_handler(folder: Path) -> None:
    os.mkfifo(folder / "ping", 0o700)
    assert hive.scan_handlers(folder).refused == {"ping": "not a regular file"}


def test_a_file_that_is_not_executable_is_refused_with_advice(folder: Path) -> None:
    file = put(folder / "ping", 0o644)
    assert hive.scan_handlers(folder).refused == {"ping": f"not executable; try: chmod +x {file}"}


def test_a_module_that_handlers_import_is_no_handler_and_no_mistake(folder: Path) -> None:
    put(folder / "sentinel.py", 0o644)
    (folder / "__pycache__").mkdir()  # Python's, beside a module that was imported
    assert hive.scan_handlers(folder) == hive.HandlerSet()
    put(folder / "sentinel.py", 0o755)
    assert [*hive.scan_handlers(folder).handlers] == ["sentinel.py"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("#!/bin/sh\r\necho\r\n", r"its first line names '/bin/sh\r': its lines must end in LF"),
        ("#!/usr/bin/nosuch\n", "its first line names '/usr/bin/nosuch', which is not there"),
        ("#!/usr/bin/env nosuch\n", "its first line names 'nosuch', which is not on the PATH"),
        ("echo hello\n", hive.NO_PROGRAM),
        ("", hive.NO_PROGRAM),
    ],
)
def test_a_file_that_cannot_be_started_is_no_handler(folder: Path, content: str, why: str) -> None:
    (folder / "ping").write_bytes(content.encode())
    (folder / "ping").chmod(0o755)
    found = hive.scan_handlers(folder)
    assert found.handlers == {}
    assert found.refused["ping"].startswith(why)


@pytest.mark.parametrize("mode", [0o757, 0o777, 0o703])
@pytest.mark.usefixtures("private")
def test_a_handler_that_everyone_may_change_is_refused(folder: Path, mode: int) -> None:
    put(folder / "ping", mode)
    found = hive.scan_handlers(folder)
    assert found.refused == {"ping": "is writable by everyone; try: chmod o-w"}
    assert found.handlers == {}


def test_a_handler_that_its_group_may_change_is_refused(folder: Path, private: bool) -> None:
    put(folder / "ping", 0o775)
    refused = hive.scan_handlers(folder).refused
    assert refused == ({} if private else {"ping": "is writable by its group; try: chmod g-w"})


@pytest.mark.usefixtures("private")
def test_nothing_is_run_from_a_folder_that_everyone_may_change(folder: Path) -> None:
    put(folder / "ping")
    folder.chmod(0o777)
    reason = "the directory is writable by everyone; try: chmod o-w"
    assert hive.scan_handlers(folder) == hive.HandlerSet(refused={str(folder): reason})


def test_nothing_is_run_from_a_folder_that_its_group_may_change(
    folder: Path, private: bool
) -> None:
    put(folder / "ping")
    folder.chmod(0o775)
    reason = "the directory is writable by its group; try: chmod g-w"
    found = hive.scan_handlers(folder)
    if private:
        assert found == hive.HandlerSet(handlers={"ping": folder / "ping"})
    else:
        assert found == hive.HandlerSet(refused={str(folder): reason})


def test_a_missing_folder_has_no_handlers(tmp_path: Path) -> None:
    assert hive.scan_handlers(tmp_path / "missing") == hive.HandlerSet()


def test_a_file_in_place_of_the_folder_is_told(tmp_path: Path) -> None:
    file = put(tmp_path / "hive-daemon.d")
    assert hive.scan_handlers(file) == hive.HandlerSet(refused={str(file): "Not a directory"})


def test_a_link_to_a_program_is_a_handler(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir(mode=0o755)
    put(tmp_path / "bin" / "program")
    (folder / "ping").symlink_to(tmp_path / "bin" / "program")
    (folder / "pong").symlink_to("ping")
    assert hive.scan_handlers(folder) == hive.HandlerSet(
        handlers={"ping": folder / "ping", "pong": folder / "pong"}
    )


def test_a_link_to_nothing_is_refused(folder: Path) -> None:
    (folder / "ping").symlink_to(folder / "missing")
    assert hive.scan_handlers(folder).refused == {"ping": "No such file or directory"}


def test_links_in_a_circle_are_refused(folder: Path) -> None:
    (folder / "ping").symlink_to(folder / "pong")
    (folder / "pong").symlink_to(folder / "ping")
    found = hive.scan_handlers(folder)
    assert found.handlers == {}
    assert [*found.refused] == ["ping", "pong"]


@pytest.mark.parametrize("way", ["file", "folder", "link to link"])
def test_a_link_through_a_folder_that_everyone_may_change_is_refused(
    folder: Path, tmp_path: Path, way: str
) -> None:
    """Whoever may change that folder can put another program into the handler's place."""
    open_folder, safe = tmp_path / "open", tmp_path / "safe"
    safe.mkdir(mode=0o755)
    program = put(safe / "program")
    open_folder.mkdir()
    open_folder.chmod(0o777)
    match way:
        case "file":
            target = put(open_folder / "program")
        case "folder":
            (open_folder / "bin").symlink_to(safe)
            target = open_folder / "bin" / "program"
        case _:
            target = open_folder / "link"
            target.symlink_to(program)
    (folder / "ping").symlink_to(target)
    found = hive.scan_handlers(folder)
    assert found.handlers == {}
    assert "is writable by everyone" in found.refused["ping"]


def test_nothing_is_run_from_below_a_folder_that_others_may_change(tmp_path: Path) -> None:
    """Whoever may rename the handler directory can put another one into its place."""
    open_folder = tmp_path / "open"
    folder = open_folder / "mine" / "hive-daemon.d"
    folder.mkdir(parents=True)
    for one in (folder, folder.parent):
        one.chmod(0o755)
    put(folder / "ping")
    open_folder.chmod(0o777)
    why = f"is below {open_folder}, which is writable by everyone; try: chmod o-w {open_folder}"
    assert hive.scan_handlers(folder) == hive.HandlerSet(
        refused={str(folder): f"the directory {why}"}
    )
    assert hive.objection_to(folder / "ping") == why  # right before it is run, too
    (tmp_path / "link").symlink_to(folder)
    assert hive.scan_handlers(tmp_path / "link").handlers == {}
    open_folder.chmod(0o1777)  # as /tmp is: nobody but its owner may rename what is in it
    assert hive.scan_handlers(folder).handlers == {"ping": folder / "ping"}


# What a handler is given


def test_a_handler_is_told_whom_it_works_for() -> None:
    environment = hive.handler_environment(ASKED, "beta", "home/hive", None, {"PATH": "/bin"})
    assert environment == {
        "PATH": "/bin",
        "HIVE_NODE": "beta",
        "HIVE_FROM": "alpha",
        "HIVE_TO": "beta",
        "HIVE_ID": "id-1",
        "HIVE_CORR": "corr-1",
        "HIVE_ACTION": "git-sync",
        "HIVE_CH": "command",
        "HIVE_PREFIX": "home/hive",
    }


def test_a_handler_is_told_which_agent_was_addressed() -> None:
    agent = hive.InstanceConfig(
        name="main", profile="work", openclaw_cmd=("/opt/my tools/openclaw", "--x"), token="secret"
    )
    environment = hive.handler_environment(ASKED, "beta", "hive", agent, {})
    assert environment["HIVE_AGENT"] == "main"
    assert environment["HIVE_PROFILE"] == "work"
    assert environment["HIVE_OPENCLAW_CMD"] == "'/opt/my tools/openclaw' --x"
    assert "secret" not in "".join(environment.values())


def test_an_agent_without_profile_has_an_empty_one() -> None:
    agent = hive.InstanceConfig(name="main")
    environment = hive.handler_environment(ASKED, "beta", "hive", agent, {})
    assert (environment["HIVE_PROFILE"], environment["HIVE_OPENCLAW_CMD"]) == ("", "openclaw")


def test_an_exchange_is_named_after_its_first_message() -> None:
    first = hive.Envelope.new("alpha", "beta", "command", "please", id="id-1", action="ping")
    assert hive.handler_environment(first, "beta", "hive", None, {})["HIVE_CORR"] == "id-1"


def inherited(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], **config: Any) -> Any:
    """What a handler finds of what the daemon has in its environment."""
    for name in [*os.environ]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = hive.Config(hive.NodeConfig(id="beta"), **config)
    return hive.handler_spec(settings, Path("/x/git-sync"), ASKED, None).environment


@pytest.mark.parametrize(
    "name",
    [
        *("HIVE_AGENT", "HIVE_PROFILE", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"),
        *("AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "ANTHROPIC_API_KEY", "OPENCLAW_STATE_DIR"),
        *("INVOCATION_ID", "LD_PRELOAD", "NODE_AUTH_TOKEN", "MY_PATH", "PATHX"),
    ],
)
def test_the_daemons_own_affairs_are_not_handed_on(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    environment = inherited(monkeypatch, {name: "the daemon's", "HOME": "/home/me"})
    assert name not in environment
    assert environment["HOME"] == "/home/me"


def test_a_handler_gets_what_it_needs_to_find_its_way_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = dict.fromkeys(
        ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "XDG_RUNTIME_DIR", "https_proxy", "NO_PROXY"), "x"
    )
    assert given.items() <= inherited(monkeypatch, given).items()


def test_a_handlers_own_settings_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"HIVE_GIT_SYNC_CONFIG": "/etc/sync.toml", "HIVE_CONFIG": "/etc/hive.toml"}
    assert given.items() <= inherited(monkeypatch, given).items()


def test_a_handler_gets_what_the_configuration_names(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"AWS_PROFILE": "a", "GIT_KEY": "b", "OTHER_KEY": "c"}
    own = {
        "git-sync": hive.HandlerConfig(env=("GIT_KEY",)),
        "other": hive.HandlerConfig(env=("OTHER_KEY",)),
    }
    environment = inherited(monkeypatch, given, handler_env=("AWS_PROFILE", "NONE"), handlers=own)
    assert (environment.get("AWS_PROFILE"), environment.get("GIT_KEY")) == ("a", "b")
    assert not {"OTHER_KEY", "NONE"} & environment.keys()


def test_a_handler_is_told_where_to_keep_things_and_how_long_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"HOME": "/home/me", "HIVE_LAST_RUN": "forged", "HIVE_TIMEOUT": "1"}
    environment = inherited(monkeypatch, given)
    assert environment["HIVE_STATE_DIR"] == "/home/me/.local/state/hive/beta"
    assert environment["HIVE_TIMEOUT"] == "30"
    assert "HIVE_LAST_RUN" not in environment
    config = hive.Config(hive.NodeConfig(id="beta"))
    scheduled = hive.handler_spec(config, Path("/x/git-sync"), ASKED, None, "id-0")
    assert scheduled.environment["HIVE_LAST_RUN"] == "id-0"


# What is made of an result


def document_of(result: hive.ProcessResult) -> Mapping[str, Any]:
    document = hive.result_document(ASKED, "beta", result, now=1771143500.9)
    json.dumps(document, allow_nan=False).encode()  # whoever reads it may be strict
    return document


def test_the_result_of_a_success() -> None:
    assert document_of(result_of(b'{"commit": "abc"}\n', seconds=12.3456)) == {
        "node": "beta",
        "action": "git-sync",
        "id": "id-1",
        "corr": "corr-1",
        "from": "alpha",
        "status": "ok",
        "exit": 0,
        "ts": 1771143500,
        "duration_ms": 12346,
        "result": {"commit": "abc"},
        "error": "",
        "truncated": False,
    }


@pytest.mark.parametrize(
    ("stdout", "value"),
    [
        (b"", ""),
        (b"\n", ""),
        (b"plain text\n", "plain text"),
        (b"two\nlines\n\n", "two\nlines\n"),
        (b"[1, 2.5, null]", [1, 2.5, None]),
        (b"17", 17),
        (b"true\n", True),
        ("ä €".encode(), "ä €"),
        (b"caf\xe9", "caf\ufffd"),
        (b"\xed\xa0\x80", "\ufffd" * 3),
        (b'"\\ud800"', "\ufffd"),
        (b"\x00\x01", "\x00\x01"),
        (b"NaN", "NaN"),
        (b'{"x": NaN}', '{"x": NaN}'),
        (b"[Infinity, -Infinity]", "[Infinity, -Infinity]"),
        (b"1e999", "1e999"),
        (b'{"x": [-1e999]}', '{"x": [-1e999]}'),
        (b"9" * 5000, "9" * 5000),
        (b"[" * 100_000, "[" * 100_000),
        (b"[" * 100 + b"]" * 100, "[" * 100 + "]" * 100),
        (b'{"half": ', '{"half": '),
        (b'{"half": ["\\ud83d"]}', {"half": ["\ufffd"]}),
        (b'"\\ud83d\\udc1d"', "\U0001f41d"),
    ],
)
def test_stdout_is_json_where_it_is_that_and_else_text(stdout: bytes, value: object) -> None:
    assert document_of(result_of(stdout))["result"] == value


@pytest.mark.parametrize(
    ("result", "status", "error"),
    [
        (result_of(exit=3, stderr=b"no remote\n"), "error", "exit 3: no remote"),
        (result_of(exit=3), "error", "exit 3"),
        (result_of(exit=-11), "error", "was ended by signal 11"),
        (result_of(exit=1, stderr=b"\xff\xfe"), "error", "exit 1: \ufffd\ufffd"),
        (result_of(exit=-15, timed_out=True), "timeout", "took longer than 30 s and was ended"),
        (
            result_of(exit=0, timed_out=True, stderr=b"bye"),
            "timeout",
            "took longer than 30 s and was ended: bye",
        ),
        (
            result_of(exit=-15, cancelled=True),
            "interrupted",
            "interrupted: the node was stopped; it may have done a part",
        ),
        (
            result_of(exit=None, cancelled=True, fault="the daemon ended meanwhile"),
            "interrupted",
            "interrupted: the daemon ended meanwhile; it may have done a part",
        ),
        (
            result_of(exit=-15, cancelled=True, timed_out=True, stderr=b"half done\n"),
            "interrupted",
            "interrupted: the node was stopped; it may have done a part: half done",
        ),
        (
            result_of(exit=None, fault="No such file"),
            "error",
            "could not be started: No such file",
        ),
    ],
)
def test_a_failure_says_why(result: hive.ProcessResult, status: str, error: str) -> None:
    document = document_of(result)
    assert (document["status"], document["exit"]) == (status, result.exit)
    assert document["error"] == error
    answer = hive.answer_to(ASKED, "beta", result)
    assert answer.ch == "alert"
    assert answer.text == f"beta: git-sync failed: {error}"


@pytest.mark.parametrize("noise", [b"x", b"\xff", "ä".encode()], ids=["ASCII", "no UTF-8", "UTF-8"])
def test_a_failure_ends_with_the_end_of_stderr(noise: bytes) -> None:
    stderr = (noise * 20_000 + b"fatal: the remote hung up\n")[-8 * 1024 :]
    result = result_of(exit=1, stderr=stderr)
    for told in (
        document_of(result)["error"],
        hive.answer_to(ASKED, "beta", result).text,
    ):
        assert told.endswith("fatal: the remote hung up")
        assert len(told.encode()) < 16 * 1024


@pytest.mark.parametrize(
    ("stdout", "text"),
    [(b"", "ok"), (b"\n", "ok"), (b"pong\n", "pong"), (b"  \n", "  "), (b'{"a": 1}\n', '{"a": 1}')],
)
def test_a_success_is_answered_with_what_was_printed(stdout: bytes, text: str) -> None:
    answer = hive.answer_to(ASKED, "beta", result_of(stdout))
    assert answer == hive.Envelope.check(
        {
            "v": 1,
            "id": answer.id,
            "ts": answer.ts,
            "from": "beta",
            "to": "alpha",
            "ch": "response",
            "urgency": answer.urgency,
            "text": text,
            "corr": "corr-1",
            "replyTo": "id-1",
        }
    )


@pytest.mark.parametrize("byte", [b"x", b"\xff", b"\0", b'"'])
def test_output_that_was_cut_says_so(byte: bytes) -> None:
    result = result_of(byte * 256 * 1024, truncated=True)
    answer = hive.answer_to(ASKED, "beta", result)
    assert answer.text.endswith("[cut by hive: longer than 256 KiB]")
    assert document_of(result)["truncated"] is True
    assert document_of(result)["result"] == answer.text


def test_text_that_grew_too_long_in_utf_8_says_that_it_was_cut() -> None:
    answer = hive.answer_to(ASKED, "beta", result_of(b"\xff" * 256 * 1024))
    assert answer.text.endswith("[cut by hive: longer than 256 KiB]")


results = st.builds(
    hive.ProcessResult,
    exit=st.none() | st.integers(-64, 255),
    stdout=st.binary(max_size=300) | st.binary(min_size=1, max_size=8).map(lambda b: b * 40_000),
    stderr=st.binary(max_size=300) | st.binary(min_size=1, max_size=8).map(lambda b: b * 1024),
    truncated=st.booleans(),
    timed_out=st.booleans(),
    cancelled=st.booleans(),
    fault=st.just("No such file or directory"),
)


@settings(deadline=None)
@given(results)
@example(result_of(b"\x00" * 256 * 1024, truncated=True))
def test_any_result_fits_into_an_envelope_and_a_document(result: hive.ProcessResult) -> None:
    answer = hive.answer_to(ASKED, "beta", result)
    assert hive.Envelope.parse(answer.encode()) == answer
    document = hive.result_document(ASKED, "beta", result, now=1.0)
    assert hive.read_json_object(hive.encode_json(document)) == document


# Which runs next


def run_of(action: str, number: int = 0, sender: str = "alpha") -> hive.HandlerRun:
    id = f"{action}-{number}"
    envelope = hive.Envelope.new(sender, "beta", "command", "go", id=id, action=action)
    return hive.HandlerRun(envelope)


def taken(queue: hive.HandlerQueue) -> list[str]:
    """Take whatever may run now."""
    return [one.envelope.id for one in iter(queue.take, None)]


def test_handlers_run_in_order() -> None:
    queue = hive.HandlerQueue(workers=10, workers_of=lambda action: 10)
    for i in range(5):
        assert queue.put(run_of("a", i)) is None
    assert taken(queue) == ["a-0", "a-1", "a-2", "a-3", "a-4"]
    assert queue.take() is None and len(queue) == 0


def test_the_same_action_does_not_run_twice_at_once() -> None:
    queue = hive.HandlerQueue(workers=4, workers_of=lambda action: 1)
    for action, number in (("a", 0), ("a", 1), ("b", 0), ("a", 2), ("b", 1)):
        queue.put(run_of(action, number))
    assert taken(queue) == ["a-0", "b-0"]
    queue.done("a")
    assert taken(queue) == ["a-1"]
    queue.done("b")
    assert taken(queue) == ["b-1"]
    queue.done("a")
    assert taken(queue) == ["a-2"]
    assert len(queue) == 0


def test_an_action_may_be_allowed_to_run_twice_at_once() -> None:
    queue = hive.HandlerQueue(workers=4, workers_of=lambda action: 2 if action == "a" else 1)
    for action, number in (("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2)):
        queue.put(run_of(action, number))
    assert taken(queue) == ["a-0", "b-0", "a-1"]


def test_no_more_run_at_once_than_there_are_workers() -> None:
    queue = hive.HandlerQueue(workers=2, workers_of=lambda action: 9)
    for action in "abc":
        queue.put(run_of(action))
    assert taken(queue) == ["a-0", "b-0"]
    queue.done("b")
    assert taken(queue) == ["c-0"]


def test_a_line_that_is_too_long_takes_nobody_in() -> None:
    queue = hive.HandlerQueue(workers=1, workers_of=lambda action: 1)
    assert not any(queue.put(run_of("a", i)) for i in range(1000))
    late = run_of("a", 1000)
    assert queue.put(late) is late
    assert len(queue) == 1000
    assert queue.take()
    assert queue.put(run_of("a", 1001)) is None


def test_each_sender_has_its_turn() -> None:
    queue = hive.HandlerQueue(workers=99, workers_of=lambda action: 99)
    for i in range(5):
        queue.put(run_of("flood", i, "flood"))
    queue.put(run_of("b", 0, "beta"))
    queue.put(run_of("c", 0, "gamma"))
    queue.put(run_of("b", 1, "beta"))
    order = ["flood-0", "b-0", "c-0", "flood-1", "b-1", "flood-2", "flood-3", "flood-4"]
    assert taken(queue) == order


def test_a_long_line_costs_little_to_look_through() -> None:
    asked: list[str] = []
    queue = hive.HandlerQueue(4, lambda action: asked.append(action) or 1)  # type: ignore[func-returns-value]
    for i in range(900):
        queue.put(run_of("a", i))
    queue.put(run_of("b"))
    assert taken(queue) == ["a-0", "b-0"]
    assert len(asked) <= 5, "each action once at each look"


def test_in_a_line_that_is_too_long_whoever_has_most_makes_room() -> None:
    queue = hive.HandlerQueue(workers=9999, workers_of=lambda action: 9999)
    for i in range(1000):
        queue.put(run_of("flood", i, "flood"))
    gone = [queue.put(run_of("b", i, "beta")) for i in range(500)]
    assert [one.envelope.id for one in gone if one] == [f"flood-{i}" for i in range(999, 499, -1)]
    for name in ("beta", "flood"):
        late = run_of("late", 0, name)
        assert queue.put(late) is late, "each of them has half"
    first = queue.put(run_of("c", 0, "gamma"))
    assert first and first.envelope.id in ("flood-499", "b-499") and len(queue) == 1000
    order = taken(queue)
    assert order[:4] == ["flood-0", "b-0", "c-0", "flood-1"]
    assert len(order) == 1000 and not queue.clear()


names = st.sampled_from("abc")


@given(st.lists(st.one_of(names, st.none()), max_size=60))
def test_whoever_comes_and_goes_nobody_waits_for_two_of_another(steps: list[str | None]) -> None:
    queue = hive.HandlerQueue(workers=9999, workers_of=lambda action: 9999)
    put: list[str] = []
    for number, sender in enumerate(steps):
        if sender:
            queue.put(run_of(sender, number, sender))
            put.append(f"{sender}-{number}")
        else:
            run = queue.take()
            assert run or not put
            if run:
                put.remove(run.envelope.id)
    order = taken(queue)
    assert sorted(order) == sorted(put)
    for sender in "abc":
        own = [id for id in put if id.startswith(sender)]
        assert [id for id in order if id.startswith(sender)] == own, "its own stay in order"


def test_those_who_wait_can_be_called_off() -> None:
    queue = hive.HandlerQueue(workers=1, workers_of=lambda action: 1)
    for i in range(3):
        queue.put(run_of("a", i))
    queue.take()
    assert [one.envelope.id for one in queue.clear()] == ["a-1", "a-2"]
    assert len(queue) == 0
    queue.done("a")
    assert queue.take() is None


# The edges of all that


def test_a_readme_is_passed_over_in_silence(folder: Path) -> None:
    put(folder / "README")
    put(folder / "README.md", 0o644)
    put(folder / "readme")
    assert hive.scan_handlers(folder) == hive.HandlerSet({"readme": folder / "readme"})


def standing(mode: int, uid: int, gid: int = 7) -> os.stat_result:
    return os.stat_result((mode, 0, 0, 1, uid, gid, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("mode", "uid", "objection"),
    [
        (0o755, 1000, None),
        (0o755, 0, None),
        (0o755, 1001, "belongs to another user"),
        (0o757, 1001, "belongs to another user"),
        (0o757, 1000, "is writable by everyone; try: chmod o-w"),
        (0o757, 0, "is writable by everyone; try: chmod o-w"),
        (0o775, 1000, "is writable by its group; try: chmod g-w"),
        (0o1777, 1000, "is writable by everyone; try: chmod o-w"),
    ],
)
def test_whoever_may_change_a_file_is_named(
    monkeypatch: pytest.MonkeyPatch, mode: int, uid: int, objection: str | None
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(hive, "is_private_group", lambda gid: False)
    assert hive.writable_by_others(standing(mode, uid)) == objection


@pytest.mark.parametrize(
    ("name", "members", "private"),
    [
        ("me", [], True),
        ("me", ["me"], True),
        ("me", ["me", "you"], False),
        ("me", ["you"], False),
        ("staff", [], False),
        ("staff", ["me"], False),
    ],
)
def test_a_group_is_private_if_it_is_named_after_its_one_user(
    monkeypatch: pytest.MonkeyPatch, name: str, members: list[str], private: bool
) -> None:
    group = grp.struct_group((name, "x", 7, members))
    me = pwd.struct_passwd(("me", "x", os.geteuid(), 7, "", "/", "/bin/sh"))
    monkeypatch.setattr(grp, "getgrgid", {7: group}.__getitem__)
    monkeypatch.setattr(pwd, "getpwuid", {os.geteuid(): me}.__getitem__)
    assert hive.is_private_group(7) is private
    assert hive.is_private_group(8) is False  # a group that nobody knows


def test_a_link_may_lead_through_a_folder_where_nobody_can_replace_it(
    folder: Path, tmp_path: Path
) -> None:
    """As /tmp is: everybody may write, but only an owner may rename or remove."""
    shared = tmp_path / "shared"
    shared.mkdir()
    put(shared / "program")
    (folder / "ping").symlink_to(shared / "program")
    shared.chmod(0o1777)
    assert hive.scan_handlers(folder).handlers == {"ping": folder / "ping"}
    shared.chmod(0o777)
    why = f"is a link through {shared}, which is writable by everyone; try: chmod o-w {shared}"
    assert hive.scan_handlers(folder).refused == {"ping": why}


def test_every_folder_on_the_way_is_looked_into(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir(mode=0o755)
    (tmp_path / "open").mkdir()
    put(tmp_path / "bin" / "program")
    (folder / "direct").symlink_to("../bin/program")
    (folder / "detour").symlink_to("../open/../bin/program")
    (tmp_path / "open").chmod(0o777)
    found = hive.scan_handlers(folder)
    assert [*found.handlers] == ["direct"]
    assert [*found.refused] == ["detour"]
    way = [*hive.directories_in_path(folder / "direct")]
    assert way[0] == Path("/")
    assert way[-3:] == [folder, tmp_path, tmp_path / "bin"]


def test_a_link_to_a_file_that_is_not_executable_or_not_safe_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "plain").symlink_to(put(tmp_path / "plain", 0o644))
    (folder / "open").symlink_to(put(tmp_path / "program", 0o757))
    assert hive.scan_handlers(folder).refused == {
        "open": "is writable by everyone; try: chmod o-w",
        "plain": f"not executable; try: chmod +x {folder / 'plain'}",
    }


def test_a_handler_is_run_in_its_folder_with_the_message_as_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIVEN", "yes")
    config = hive.make_config(
        {
            "node": {"id": "beta", "topic_prefix": "home", "handler_timeout": 7},
            "handlers": {"slow": {"timeout": 99}, "other": {"workers": 2}, "env": ["GIVEN"]},
        },
        None,
        {},
    )
    spec = hive.handler_spec(config, folder / "git-sync", ASKED, None)
    assert ([*spec.argv], spec.cwd, spec.deadline) == ([str(folder / "git-sync")], folder, 7.0)
    assert spec.stdin.endswith(b"}\n") and spec.stdin.count(b"\n") == 1
    assert hive.Envelope.parse(spec.stdin) == ASKED
    assert (spec.environment["GIVEN"], spec.environment["HIVE_PREFIX"]) == ("yes", "home")
    deadlines = [hive.handler_deadline(config, action) for action in ("slow", "other", "unknown")]
    assert deadlines == [99.0, 7.0, 7.0]


@pytest.mark.parametrize(
    ("text", "limit", "mark", "expected"),
    [
        ("abc", 3, "", "abc"),
        ("abcd", 3, "", "abc"),
        ("abc", 3, "…", "abc"),
        ("abcdef", 5, "…", "ab…"),
        ("aää", 4, "", "aä"),
        ("aää", 5, "", "aää"),
        ("", 0, "", ""),
    ],
)
def test_a_text_is_cut_between_letters(text: str, limit: int, mark: str, expected: str) -> None:
    assert hive.cut(text, limit, mark) == expected


def test_what_just_fits_is_not_cut() -> None:
    whole = b"x" * 256 * 1024
    assert hive.printed(result_of(whole)) == whole.decode()
    assert hive.printed(result_of(whole + b"\n")) == whole.decode()
    said = hive.printed(result_of(whole + b"x"))
    assert len(said) == 256 * 1024 and said.endswith("x\n[cut by hive: longer than 256 KiB]")


@pytest.mark.parametrize("stderr", [b"x" * 8192, b"\xff" * 8192, b" " * 8192, b"x" * 7992 + b"!"])
def test_an_error_has_a_bound(stderr: bytes) -> None:
    error = hive.failure(result_of(exit=1, stderr=stderr))
    assert len(error.encode()) <= 8 * 1024
    kept = stderr.decode(errors="replace").strip()
    if kept:
        assert len(error.encode()) in (8000, 7999, 7998)  # the last letter may have three bytes
        assert kept.endswith(error.removeprefix("exit 1: "))
    else:
        assert error == "exit 1"


@pytest.mark.parametrize(("deadline", "words"), [(2.5, "2.5 s"), (120.0, "120 s")])
def test_a_deadline_is_told_as_it_was_set(deadline: float, words: str) -> None:
    result = hive.ProcessResult(exit=-15, deadline=deadline, timed_out=True)
    assert hive.failure(result) == f"took longer than {words} and was ended"


def test_how_many_run_is_known() -> None:
    queue = hive.HandlerQueue(workers=3, workers_of=lambda action: 2)
    for action, number in (("a", 0), ("a", 1), ("b", 0), ("b", 1)):
        queue.put(run_of(action, number))
    assert (taken(queue), queue.running, len(queue)) == (["a-0", "a-1", "b-0"], 3, 1)
    queue.done("a")
    assert (taken(queue), queue.running) == (["b-1"], 3)
    for action in ("a", "b", "b"):
        queue.done(action)
    assert queue.running == 0


def test_where_none_are_it_is_said_where_some_would_be(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder moves with a configuration that was made by hand."""
    beside = tmp_path / "checkout" / hive.HANDLER_FOLDER
    beside.mkdir(parents=True, mode=0o755)
    monkeypatch.setattr(hive, "own_file", lambda: beside.parent / "hive.py")
    assert hive.why_no_handlers(folder) == "it is empty"
    assert hive.why_no_handlers(folder / "none") == "no such directory"
    put(beside / "ping")
    hint = f"for those in {beside} set [node] handler_dir"
    assert hive.why_no_handlers(folder) == f"it is empty; {hint}"
    assert hive.why_no_handlers(beside) == "it is empty"


def test_what_hive_does_itself_is_no_handler(folder: Path) -> None:
    put(folder / hive.READ_JOURNAL)
    why = {hive.READ_JOURNAL: "this is done by hive itself"}
    assert hive.scan_handlers(folder) == hive.HandlerSet(refused=why)


def test_a_module_that_everyone_may_change_is_told_of(folder: Path) -> None:
    put(folder / "sentinel.py", 0o757)
    why = {"sentinel.py": "is writable by everyone; try: chmod o-w"}
    assert hive.scan_handlers(folder) == hive.HandlerSet(refused=why)


@pytest.mark.parametrize("mode", [0o744, 0o654, 0o645])
def test_whoever_may_execute_it_a_file_is_executable(folder: Path, mode: int) -> None:
    """It may be that this node may not; then it is another fault."""
    file = put(folder / "ping", mode)
    why_not = hive.objection_to(file)
    assert why_not is None if os.access(file, os.X_OK) else "you may not" in str(why_not)


@pytest.mark.parametrize(("may", "why"), [(True, None), (False, "you may not execute it: ")])
def test_a_program_need_not_be_readable_but_must_be_ours_to_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, may: bool, why: str | None
) -> None:
    def unreadable(file: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(hive, "first_line_fault", unreadable)
    monkeypatch.setattr(os, "access", lambda file, how: may and how == os.X_OK)
    told = hive.objection_to(put(folder / "ping"))
    assert told == why or (told and why and told.startswith(why))


@pytest.mark.parametrize(
    ("mode", "uid", "why"),
    [
        (0o1777, 1000, None),
        (0o1777, 0, None),
        (0o1777, 1001, "is below {}, which belongs to another user"),
        (0o755, 1001, "is below {}, which belongs to another user"),
        (0o777, 0, "is below {}, which is writable by everyone; try: chmod o-w {}"),
    ],
)
def test_a_folder_on_the_way_is_safe_if_nobody_can_rename_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: int, uid: int, why: str | None
) -> None:
    class Folder:
        def stat(self) -> os.stat_result:
            return standing(mode, uid)

        def __str__(self) -> str:
            return "/there"

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(hive, "directories_in_path", lambda file: [Folder()])
    assert hive.unsafe_way(tmp_path / "x") == (why and why.format("/there", "/there"))


def test_links_are_followed_as_the_system_follows_them(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    put(tmp_path / "c" / "program")
    (tmp_path / "a" / "absolute").symlink_to(tmp_path / "b" / "relative")
    (tmp_path / "b" / "relative").symlink_to("../c/program")
    (folder / "ping").symlink_to("../a/absolute")
    way = [*hive.directories_in_path(folder / "ping")]
    home = [*reversed(tmp_path.parents), tmp_path]
    assert way == [
        *(*home, folder, folder, tmp_path, tmp_path / "a"),
        *(*home, tmp_path / "b", tmp_path / "b", tmp_path, tmp_path / "c"),
    ]


# The rest of what it is given


def spec_of(config: hive.Config, envelope: hive.Envelope = ASKED, **more: Any) -> hive.ProcessSpec:
    return hive.handler_spec(config, Path("/x/git-sync"), envelope, None, **more)


def test_a_handler_can_run_hive_as_its_own_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["my hive.py"])
    monkeypatch.setattr("sys.executable", "/bin/python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HIVE_CONFIG", raising=False)
    node = hive.NodeConfig(id="beta", state_dir=Path("state"))
    found = spec_of(hive.Config(node, source=Path("hive.toml"))).environment
    assert found["HIVE_CMD"] == f"/bin/python '{tmp_path}/my hive.py'"
    assert found["HIVE_CONFIG"] == f"{tmp_path}/hive.toml"
    assert found["HIVE_STATE_DIR"] == f"{tmp_path}/state"
    assert "HIVE_CONFIG" not in spec_of(hive.Config(node)).environment


def test_without_a_home_a_handler_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(name: str) -> Path:
        raise hive.ConfigError("your home is not known")

    monkeypatch.setattr(hive, "default_state_dir", homeless)
    monkeypatch.delenv("HIVE_STATE_DIR", raising=False)
    assert "HIVE_STATE_DIR" not in spec_of(hive.Config(hive.NodeConfig(id="beta"))).environment


def test_what_a_message_does_not_say_is_empty() -> None:
    plain = hive.Envelope.new("alpha", "beta", "command", "please")
    config = hive.Config(hive.NodeConfig(id="beta", handler_timeout=0.5))
    found = spec_of(config, plain, last_run="").environment
    assert (found["HIVE_ACTION"], found["HIVE_LAST_RUN"]) == ("", "")
    assert found["HIVE_TIMEOUT"] == "0.5"


def test_what_cannot_be_sent_is_cut_as_what_can() -> None:
    assert (hive.cut("\ud800" * 4, 4), hive.cut("\ud800" * 5, 4)) == ("\ud800" * 4, "????")


def test_nothing_has_no_hash() -> None:
    assert [hive.content_hash(one) for one in (b"", b" \n")] == ["", ""]
    assert hive.content_hash(b"a") == hive.sha256(b"a") != hive.content_hash(b"a\n")
