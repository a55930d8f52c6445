"""How commands tell what they found, and with which code they end; in this process, without one."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from scripted import Answer, Commands, Scripted

import hive


@pytest.fixture
def alpha(commands: Commands) -> Commands:
    return commands


NOW = 1771143500 + 1000


def state(status: str = "online", age: int = 5, **more: Any) -> Answer:
    return {"status": status, "last_seen": NOW - age} | more


def knows(alpha: Commands, states: Mapping[str, Any], rosters: Any = None, **how: Any) -> Scripted:
    """A daemon that knows of these nodes."""
    config = hive.load_config(None, {"node.id": "alpha"})
    said = {"hive": hive.hive_of(config), "complete": True, "connected": True, "fault": ""} | how
    said |= {"broker": "localhost:1883"}
    return alpha.daemon(states=said | {"states": states}, roster=said | {"rosters": rosters or {}})


def test_the_status_is_told_in_a_table_with_its_sessions_and_reasons(alpha: Commands) -> None:
    states = {
        "beta": state(),
        "attic": state("offline", 90, reason="connection lost"),
        "claude": state(daemon_node="beta", session={"client": "c 1", "since": NOW - 60}),
    }
    daemon = knows(alpha, states)
    code, out, err = alpha.run("status")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[:2] == ["2 nodes: 1 online, 1 offline, 1 session; senders: not checked", ""]
    assert [line.split()[:2] for line in lines[2:5]] == [
        ["NAME", "STATUS"],
        ["attic", "offline"],
        ["beta", "online"],
    ]
    assert lines[5:8:2] == ["", "claude   beta  c 1     -          -       1m"]
    assert lines[8:] == ["", "attic: connection lost"]
    assert [one["do"] for one in daemon.asked] == ["states"] and daemon.closed == 1
    states["codex"] = states["claude"]
    knows(alpha, states)
    assert ", 2 sessions; senders" in alpha.run("status")[1]


def test_the_status_as_json_is_whole(alpha: Commands) -> None:
    knows(alpha, {"beta": state(uptime_s=60)})
    code, out, _ = alpha.run("status --json")
    (row,) = json.loads(out)
    assert (code, row["name"], row["age_s"], row["senders"]) == (0, "beta", 5.0, "not checked")
    assert '\n    "name": "beta",\n' in out
    knows(alpha, {})
    assert alpha.run("status --json") == (0, "[]\n", "")
    knows(alpha, {}, connected=False, fault="broker x: away", age=1)
    assert alpha.run("status --json") == (3, "", "hive: broker x: away\n")
    knows(alpha, {"beta": state()}, connected=False, fault="broker x: away", age=1)
    code, out, err = alpha.run("status --json")
    assert (code, json.loads(out)[0]["name"], err) == (3, "beta", "hive: broker x: away\n")


def test_what_is_old_says_so(alpha: Commands) -> None:
    knows(alpha, {"beta": state()}, connected=False, fault="broker x: away", age=61)
    code, out, err = alpha.run("status")
    assert (code, err) == (3, "hive: broker x: away\n")
    assert out.endswith("\n\nas of 1m 1s ago, when the broker was lost\n")
    knows(alpha, {}, connected=False, age=61)
    code, out, err = alpha.run("status")
    assert (code, out) == (3, "") and err.startswith("hive: no broker: none is named")
    (alpha.home / "hive.toml").write_text('[mqtt]\nhost = "localhost"\n')
    named = hive.load_config("hive.toml", {"node.id": "alpha"})
    knows(alpha, {}, connected=False, age=61, hive=hive.hive_of(named))
    said = alpha.run("status --config hive.toml")
    assert said == (3, "", "hive: broker localhost:1883: no connection yet\n")


def test_a_bridge_that_is_cut_is_told_below(alpha: Commands) -> None:
    knows(alpha, {"beta": state()}, cut=["office", "a\x1bb"])
    code, out, err = alpha.run("status")
    said = "the bridge of office is cut, the bridge of a?b is cut"
    assert (code, err) == (0, "")
    assert out.endswith(f"\n\n{said}; where the hive is carried hive doctor says more\n")
    assert "bridge" not in alpha.run("status --json")[1]


def test_where_nobody_is_seen_it_says_how_to_begin(alpha: Commands) -> None:
    knows(alpha, {})
    where = "at localhost:1883 under hive/"
    start = "start one with: hive daemon; or does the broker hide them? hive doctor"
    for command in ("status", "roster"):
        said = alpha.run(command)
        assert said == (0, "", f"hive: no node has been seen {where} yet; {start}\n")
    assert alpha.run("roster --json") == (0, "[]\n", "")


@pytest.mark.parametrize(
    ("states", "code", "line"),
    [
        ({"a": state(), "b": state()}, 0, "2 nodes: 2 online"),
        ({"a": state(age=500)}, 1, "1 node: 1 stale; a: no word for 8m 20s"),
        ({"a": state("offline")}, 1, "1 node: 1 offline; a: offline"),
        (
            {f"n{n}": state("offline", reason="lost") for n in range(5)},
            1,
            "5 nodes: 5 offline; " + "; ".join(f"n{n}: lost" for n in range(5)),
        ),
        (
            {f"n{n}": state("offline", reason="lost") for n in range(6)},
            1,
            "6 nodes: 6 offline; " + "; ".join(f"n{n}: lost" for n in range(5)) + "; ...",
        ),
        ({"a": state(), "m": state("degraded", daemon_node="a")}, 0, "1 node: 1 online"),
    ],
)
def test_monitoring_gets_a_line_and_a_code(
    alpha: Commands, states: Mapping[str, Any], code: int, line: str
) -> None:
    knows(alpha, states)
    assert alpha.run("status --check") == (code, line + "\n", "")


def test_monitoring_is_told_where_nothing_is_known(alpha: Commands) -> None:
    knows(alpha, {})
    code, out, err = alpha.run("status --check")
    assert (code, out) == (1, "") and "no node has been seen" in err
    knows(alpha, {"beta": state()}, connected=False, fault="broker x: away", age=1)
    assert alpha.run("status --check") == (3, "", "hive: broker x: away\n")


@pytest.mark.parametrize("count", [25, 26])
def test_of_more_than_25_nodes_each_is_shown_where_that_is_asked_for(
    alpha: Commands, count: int
) -> None:
    """hive help operation promises that number."""
    rosters = {f"n{n:02}": {"node": f"n{n:02}", "tags": ["t"]} for n in range(count)}
    states = {name: state() for name in rosters} | {"main": state(daemon_node="n00")}
    for line, each in (("", count == 25), ("--all", True), ("n0[12]", True)):
        daemon = knows(alpha, states, rosters)
        out = alpha.run(f"status {line}")[1]
        assert ("n01 " in out) == each and ("hive status --all" in out) != each
        asks = ["states"] if line == "--all" or (each and not line) else ["states", "roster"]
        assert [one["do"] for one in daemon.asked] == asks
        code, out, _ = alpha.run(f"roster {line}")
        assert ("n01 " in out) == each and ("hive roster --all" in out) != each
        assert code == 0 and (each or out.startswith(f"{count} nodes\n\n"))
    daemon = knows(alpha, states, rosters)
    assert "tag t" in alpha.run("status")[1] or count == 25


def test_a_view_of_some_is_of_those_and_their_agents(alpha: Commands) -> None:
    rosters = {"b1": {"node": "b1", "tags": ["gpu"], "agents": ["main"]}, "b2": {"node": "b2"}}
    states = {"b1": state(), "b2": state(), "main": state(daemon_node="b1")}
    knows(alpha, states, rosters)
    for line in ("b1", "--tag gpu", "tag:gpu", "main"):
        rows = json.loads(alpha.run(f"status --json {line}")[1])
        assert sorted(row["name"] for row in rows) == ["b1", "main"], line
        documents = json.loads(alpha.run(f"roster --json {line}")[1])
        assert documents == [rosters["b1"]], line
    code, out, err = alpha.run("roster b9")
    assert (code, out) == (1, "") and err.startswith("hive: no node is called like b9; ")


def test_a_roster_has_its_sessions_and_schedules_below(alpha: Commands) -> None:
    entry = {"action": "sync", "when": "07:30", "last": NOW - 60, "ok": True}
    sessions = {"claude": {"client": "c 1", "since": NOW - 60}}
    rosters = {"b2": {"node": "b2"}, "b1": {"schedule": [entry], "sessions": sessions}}
    daemon = knows(alpha, {}, rosters)
    code, out, err = alpha.run("roster")
    table, sessions_table, schedules = out.split("\n\n")
    assert (code, err, daemon.asked) == (0, "", [{"do": "roster"}])
    assert [line.split()[0] for line in table.splitlines()] == ["NODE", "b1", "b2"]
    assert sessions_table.splitlines()[1].split()[:2] == ["claude", "b1"]
    assert schedules == "b1: sync 07:30, ran 1m ago: ok\n"
    out = alpha.run("roster --json")[1]
    assert json.loads(out) == [rosters["b2"], rosters["b1"]] and '\n  {\n    "node"' in out
    knows(alpha, {}, rosters, connected=False, fault="broker x: away", age=1)
    code, out, err = alpha.run("roster")
    assert (code, err) == (3, "hive: broker x: away\n") and "as of 1s ago" in out
    knows(alpha, {}, {}, connected=False, fault="broker x: away", age=1)
    assert alpha.run("roster --json") == (3, "", "hive: broker x: away\n")


def test_the_daemon_of_another_hive_is_not_asked_about_this_one(alpha: Commands) -> None:
    knows(alpha, {"mine": state()}, hive="another")
    node = alpha.bypass(states={"connected": True, "fault": "", "states": {"theirs": state()}})
    out = alpha.run("status")[1]
    assert "theirs" in out and "mine" not in out
    assert (alpha.direct, node.closed) == ([10.0], 1)
    assert alpha.opened == [(10.0, False)]
    alpha.run("status --direct")
    assert alpha.opened[1:] == [(10.0, True)]


def test_watching_goes_with_nothing_that_ends(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(hive, "watch_status", lambda *said: given.append(said[1:]))
    why = "hive: status: --watch goes with neither --check, --direct nor --json\n"
    for other in ("--check", "--direct", "--json"):
        assert alpha.run(f"status -w {other}") == (2, "", why)
    assert not given and alpha.run("status -w b1 --tag gpu") == (0, "", "")
    assert given == [(False, ["b1"], "gpu")]


def test_what_is_counted_is_told_by_the_daemon_alone(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = alpha.daemon(metrics={"metrics": {"hive_connected": [[1]]}})
    code, out, err = alpha.run("metrics")
    assert (code, err, daemon.closed) == (0, "", 1) and "\nhive_connected 1\n" in out
    alpha.daemon()
    assert alpha.run("metrics") == (1, "", "hive: the daemon of alpha: no such request: it\n")
    monkeypatch.setattr(hive, "connect_to_daemon", lambda *given: None)
    why = "hive: no daemon of alpha runs on this machine: nothing is counted\n"
    assert alpha.run("metrics") == (1, "", why)


def test_names_are_offered_to_a_shell_at_once_or_not_at_all(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = alpha.daemon(states={"states": {"b": {}, "a": {}, "$(x)": {}}})
    patiences: list[float] = []

    def connect(config: Any, patience: float) -> Scripted:
        patiences.append(patience)
        return daemon

    monkeypatch.setattr(hive, "connect_to_daemon", connect)
    assert alpha.run("completion names") == (0, "all\na\nb\n", "")
    assert (patiences, daemon.closed) == ([1.0], 1)
    alpha.daemon()
    assert alpha.run("completion names") == (0, "all\n", "")
    monkeypatch.setattr(hive, "connect_to_daemon", lambda *given: None)
    assert alpha.run("completion names") == (0, "", "")


# -- handlers --


def handler(alpha: Commands, action: str, script: str, mode: int = 0o755) -> Path:
    file = alpha.home / "handlers" / action
    file.parent.mkdir(exist_ok=True)
    file.write_text(script)
    file.chmod(mode)
    return file


def configured(alpha: Commands, text: str = "") -> str:
    (alpha.home / "hive.toml").write_text(f'[node]\nid = "alpha"\nhandler_dir = "handlers"\n{text}')
    return "--config hive.toml"


def test_the_handlers_are_listed_with_their_bounds(alpha: Commands) -> None:
    said = configured(
        alpha, '[handlers.b]\nallow = ["beta"]\nworkers = 3\ntimeout = 1.5\n[handlers.c]\n'
    )
    a, b = (str(handler(alpha, name, "#!/bin/sh\n")) for name in "ab")
    handler(alpha, "open", "#!/bin/sh\n", 0o777)
    code, out, err = alpha.run(f"handler list {said}")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["ACTION", "TIMEOUT", "WORKERS", "ALLOW", "FILE"],
        ["a", "30s", "1", "all", a],
        ["b", "1.5s", "3", "beta,alpha", b],
        ["refused:", "open:", "is", "writable", "by", "everyone;", "try:", "chmod", "o-w"],
    ]
    code, out, _ = alpha.run(f"handler list --json {said}")
    assert out.startswith('{\n  "handlers": {') and code == 0
    assert json.loads(out) == {
        "handlers": {"a": a, "b": b},
        "refused": {"open": "is writable by everyone; try: chmod o-w"},
        "allow": {"b": ["beta"]},
    }
    for file in (Path(a), Path(b)):
        file.unlink()
    assert alpha.run(f"handler list {said}")[1].startswith("refused: open: ")
    (alpha.home / "handlers" / "open").unlink()
    assert alpha.run(f"handler list {said}")[1] == f"no handlers in {alpha.home}/handlers\n"


def test_a_handler_that_is_not_there_is_no_test(alpha: Commands) -> None:
    said = configured(alpha)
    for name in ("ping", "pong"):
        handler(alpha, name, "#!/bin/sh\n")
    why = "hive: handler test: which one? there are: ping, pong\n"
    assert alpha.run(f"handler test {said}") == (2, "", why)
    why = f"hive: {alpha.home}/handlers/pingg: No such file or directory; did you mean ping?\n"
    assert alpha.run(f"handler test pingg {said}") == (1, "", why)
    why = f"hive: {alpha.home}/handlers/xyzzy: No such file or directory\n"
    assert alpha.run(f"handler test xyzzy {said}") == (1, "", why)


def test_a_handler_is_tested_and_its_outcome_told(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = configured(alpha)
    handler(alpha, "ping", "#!/bin/sh\n")
    made: list[Any] = []
    outcome = hive.ProcessResult(
        3, stdout="üx said\x1b\n".encode(), stderr=b"why\x1b\n", seconds=0.25
    )

    def run(job: Any) -> Any:
        made.append(job)
        return outcome

    monkeypatch.setattr(hive, "time", time)
    monkeypatch.setattr(hive, "run_once", run)
    code, out, err = alpha.run(f"handler test ping --from mini --text hello {said}")
    assert (code, out) == (1, "üx said\x1b\n"), err
    first, second = err.splitlines()
    assert first.startswith("error, exit 3, 250 ms") and second.endswith("exit 3: why\\x1b")
    code, out, err = alpha.run(f"handler test ping --json {said}")
    assert (code, err) == (1, "") and out.startswith('{\n  "')
    assert '"üx' in out
    result = json.loads(out)
    assert (result["from"], result["status"], result["action"]) == ("alpha", "error", "ping")


# -- a configuration --


def test_the_configuration_is_shown_or_an_example(alpha: Commands) -> None:
    code, out, _ = alpha.run("config")
    assert code == 0 and 'id = "alpha"' in out
    code, out, _ = alpha.run("config --example")
    assert (code, out) == (0, hive.example_config())


def test_one_child_is_run_to_its_end_and_none_is_left(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    class Children:
        def __init__(self, loop: Any) -> None:
            self.loop = loop

        def start(self, job: Any, ended: Any) -> None:
            done.append(job)
            self.loop.ended = ended

        def kill(self) -> None:
            done.append("killed")

    class Loop:
        def __init__(self, log: Any) -> None:
            self.ended: Any = None

        def step(self) -> None:
            if done[0] == "interrupted":
                raise KeyboardInterrupt
            self.ended("outcome")

        def close(self) -> None:
            done.append("closed")

    monkeypatch.setattr(hive, "ChildProcesses", Children)
    monkeypatch.setattr(hive, "Loop", Loop)
    jobs: Any = ("job", "interrupted")
    found: Any = hive.run_once(jobs[0])
    assert (found, done) == ("outcome", ["job", "killed", "closed"])
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        hive.run_once(jobs[1])
    assert done[1:] == ["killed", "closed"]


def test_what_is_unsafe_in_it_is_a_warning_of_every_command(alpha: Commands) -> None:
    (alpha.home / "hive.toml").write_text('[mqtt]\nusername = "u"\npassword = "p"\n')
    (alpha.home / "hive.toml").chmod(0o644)
    err = alpha.run("config --config hive.toml")[2]
    assert err.startswith("hive: warning: hive.toml: holds a secret") and err.count("\n") == 1


def test_a_stdin_that_is_closed_is_one_line(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Closed())))
    said = alpha.run("send --to beta --text -")
    assert said == (2, "", "hive: stdin: Bad file descriptor\n")


def initialised(alpha: Commands, line: str) -> tuple[int, str, str]:
    """Of a machine where no agent is found."""
    return alpha.run(f"init --yes --no-agents {line}")


def test_init_writes_where_it_was_told_to_and_says_what_is_next(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/odd place/hive", "init"])
    code, out, err = initialised(alpha, "--config sub/my.toml --host broker.lan")
    file = alpha.home / "sub" / "my.toml"
    assert (code, err) == (0, "")
    first, following = out.splitlines()[0], out.splitlines()[1:]
    assert first == f"wrote {file}: node alpha, broker: broker.lan, agents: none"
    me = "python3 '/odd place/hive'"
    assert following == [
        f"next: {me} doctor --config {file}",
        f"      {me} daemon --config {file}",
    ]
    config = hive.load_config(str(file))
    assert (config.mqtt.host, config.node.id) == ("broker.lan", "alpha")
    code, _, err = initialised(alpha, "--config sub/my.toml")
    assert code == 1 and "--force" in err
    assert initialised(alpha, "--config sub/my.toml --force")[0] == 0
    monkeypatch.setenv("HIVE_CONFIG", "other.toml")
    _, out, _ = initialised(alpha, "")
    assert out.startswith(f"wrote {alpha.home}/other.toml: node alpha, broker: this machine alone")
    assert "--config" not in out  # it would be found


def test_the_next_commands_are_short_where_hive_is_a_command(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = alpha.home / "bin" / "hive"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setattr(sys, "argv", [str(program), "init"])
    _, out, _ = initialised(alpha, "")
    file = alpha.home / ".config" / "hive" / "hive.toml"
    assert out.splitlines()[0].startswith(f"wrote {file}: ")
    assert out.splitlines()[1:] == ["next: hive doctor", "      hive daemon"]
    monkeypatch.setenv("HIVE_CONFIG", "is/not/there")  # as it would be for these commands
    assert hive.next_commands(file, "x") == f"next: hive x --config {file}\n"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt, 130, "interrupted; nothing was written"),
        (EOFError, 2, "end of input; nothing was written; --yes asks nothing"),
    ],
)
def test_init_that_is_not_answered_writes_nothing(
    alpha: Commands,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    code: int,
    words: str,
) -> None:
    def asked(*given: object) -> None:
        raise error

    monkeypatch.setattr(hive, "ask_missing", asked)
    assert initialised(alpha, "") == (code, "", f"\nhive: {words}\n")
    assert not [*alpha.home.iterdir()]


def test_a_password_that_is_none_is_refused(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(text: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return initialised(alpha, "--host b --username u --password-file -")

    code, out, err = given("two\nlines\n")
    assert (code, out) == (2, "") and err.startswith("hive: --password-file -: not ")
    assert given("hunter2\n")[0] == 0
    config = hive.load_config(None)
    assert (config.mqtt.password, config.mqtt.username) == ("hunter2", "u")


def test_paths_are_meant_from_where_one_is_and_a_signer_means_tls(alpha: Commands) -> None:
    def said(**more: Any) -> dict[str, Any]:
        ask = hive.Prompt(False)
        return hive.said_by_options(argparse.Namespace(**more), ask)

    paths = {"mqtt.ca_file": Path("ca.pem"), "node.handler_dir": Path("mine")}
    whole = {"mqtt.ca_file": alpha.home / "ca.pem", "node.handler_dir": alpha.home / "mine"}
    assert said(**paths) == whole | {"mqtt.tls": True}
    assert said(**paths | {"mqtt.tls": False}) == whole | {"mqtt.tls": False}
    assert said(**{"mqtt.host": "b"}) == {"mqtt.host": "b"}


# -- doctor --


def finding(level: str, what: str) -> Any:
    return hive.Finding(hive.Level[level], what, "do it")


@pytest.mark.parametrize(("levels", "code"), [(["OK", "WARN"], 0), (["FAIL", "OK"], 1)])
def test_doctor_fails_where_one_thing_does(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch, levels: list[str], code: int
) -> None:
    found = [(f"check{n}", finding(level, f"what{n}")) for n, level in enumerate(levels)]
    monkeypatch.setattr(hive, "examine", lambda load, began, say: iter(found))
    done, out, err = alpha.run("doctor")
    assert (done, err, out.count("\n")) == (code, "", 2)
    assert [line.split()[0] for line in out.splitlines()] == [one.lower() for one in levels]
    done, out, _ = alpha.run("doctor --json")
    assert done == code and out.startswith('[\n  {\n    "check"')
    rows = [
        {"check": name, "level": level.lower(), "what": one.what, "todo": "do it"}
        for (name, one), level in zip(found, levels, strict=True)
    ]
    assert json.loads(out) == rows
    given: list[Any] = []

    def examine(load: Any, began: float, say: Any) -> Any:
        given.append(load)
        return iter([*found, ("aside", finding("FAIL", "x"))])

    monkeypatch.setattr(hive, "examine", examine)
    renamed = {"check0": "broker", "check1": "clock"}
    found[:] = [(renamed[name], one) for name, one in found]
    assert hive.show_tests(alpha.home / "my.toml") == code  # what it does not show is not its own
    with pytest.raises(hive.ConfigError, match="no such file"):
        given[0]()


# -- brokers --


def test_a_broker_of_several_machines_is_printed_and_names_belong_to_it(alpha: Commands) -> None:
    code, out, _ = alpha.run("--host 10.0.0.7 broker --mosquitto-conf b1 b2")
    assert code == 0 and "b1" in out and "b2" in out and out.startswith("#!")
    why = "hive: broker: --tls and names of nodes belong to --mosquitto-conf\n"
    for line in ("b1", "--tls"):
        assert alpha.run(f"broker {line}") == (2, "", why)


def test_the_broker_is_this_files_and_mosquittos_that_of_the_daemon(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(*given: object) -> None:
        raise hive.UsageError("resolved")

    monkeypatch.setattr(hive, "resolve_config", resolve)
    assert alpha.run("broker --mosquitto-conf")[2] == "hive: resolved\n"
    assert alpha.run("broker b1")[2] != "hive: resolved\n"


def test_the_embedded_broker_serves_until_it_is_told_to_end(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "time", time)
    seen: list[Any] = []

    def run(loop: Any) -> None:
        seen.append(loop)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        loop.step()

    made = hive.Broker.__init__

    def make(broker: Any, loop: Any, log: Any, *given: Any) -> None:
        assert log._limit  # of lines a minute
        made(broker, loop, log, *given)

    monkeypatch.setattr(hive.Broker, "__init__", make)
    monkeypatch.setattr(hive.Loop, "run", run)
    code, out, _ = alpha.run(f"broker --socket {alpha.home}/s")
    assert (code, out) == (0, f"broker listens on {alpha.home}/s\n")
    assert len(seen) == 1 and not (alpha.home / "s").exists()


# -- the daemon's name --


def test_a_state_directory_has_one_daemon_and_tells_who_was_before(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "LOOKING_BACK", 0.0)
    folder = alpha.home / "state"
    config = hive.load_config(None, {"node.id": "alpha", "node.state_dir": folder})
    stream = io.StringIO()
    log = hive.Log("error", stream=stream)
    with contextlib.ExitStack() as ending:
        assert hive.take_the_name(config, "first", log, ending) == ""
        assert folder.stat().st_mode & 0o777 == 0o700
        why = f"another daemon runs with {folder}; stop it, or give this one another --node"
        with contextlib.ExitStack() as second, pytest.raises(hive.BrokerError) as raised:
            hive.take_the_name(config, "second", log, second)
        assert str(raised.value) == why and hive.is_locked(folder / "lock")
    assert not hive.is_locked(folder / "lock")
    with contextlib.ExitStack() as ending:
        assert hive.take_the_name(config, "third", log, ending) == "first"

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hive, "lock_or_spare", full)
    with contextlib.ExitStack() as ending:
        assert hive.take_the_name(config, "fourth", log, ending) == ""
    assert "no lock" in stream.getvalue() and "No space left" in stream.getvalue()


def test_a_daemon_takes_its_name_says_how_it_starts_and_leaves_nothing_open(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    folder, stream = alpha.home / "state", io.StringIO()

    class Daemon:
        again = True

        def __init__(self, config: Any, loop: Any, log: Any, journal: Any, *more: Any) -> None:
            self.loop = loop
            done.append((more[0], more[1], type(journal), hive.running_daemons()[0].node))
            will = hive.OutgoingMessage("t", b"")
            done.append(more[2](config, will))

        def start(self) -> None:
            done.append("start")

        def abandon(self) -> None:
            done.append("abandon")

    def closing(name: str, close: Any) -> Any:
        def closes(self: Any) -> None:
            done.append(name)
            close(self)

        return closes

    monkeypatch.setattr(hive.Loop, "close", closing("Loop", hive.Loop.close))
    monkeypatch.setattr(hive.Journal, "close", closing("Journal", hive.Journal.close))
    monkeypatch.setattr(hive.Loop, "run", lambda loop: done.append("run"))
    monkeypatch.setattr(hive, "MqttClient", lambda *given: given[1:])
    monkeypatch.setattr(hive, "Daemon", Daemon)
    config = hive.load_config(None, {"node.id": "alpha", "node.state_dir": folder})
    log = hive.Log("info", stream=stream)
    assert hive.run_daemon(config, log) is True
    (instance, before, _, running), client, *rest = done
    assert (before, running) == ("", "alpha") and hive.ID.fullmatch(instance)
    assert client[0] == config.mqtt and client[1:3] == (
        hive.session_id(config),
        config.subscriptions,
    )
    assert rest == ["start", "run", "abandon", "Loop", "Journal"]
    assert not hive.is_locked(folder / "lock") and hive.running_daemons() == []
    said = stream.getvalue()
    version = f"version={hive.__version__} build={hive.build()} config=defaults"
    assert f"event=starting node=alpha {version}" in said
    done.clear()
    (alpha.home / "my.toml").write_text('[node]\nid = "alpha"\nstate_dir = "state"\n')

    def refuse(*given: object) -> None:
        raise hive.ConfigError("no HOME")

    monkeypatch.setattr(hive, "announce_daemon", refuse)
    monkeypatch.setattr(hive, "running_daemons", lambda: [hive.RunningDaemon("x", None, {})])
    hive.run_daemon(hive.load_config("my.toml"), log)
    assert done[0][1] == instance and "config=my.toml" in stream.getvalue()


def test_who_stays_is_started_from_the_compiled_file(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again() -> None:
        raise hive.UsageError("again")

    monkeypatch.setattr(hive, "start_again", again)
    for line in ("daemon", "broker", "web", "host --foreground", "mcp"):
        assert alpha.run(line) == (2, "", "hive: again\n")
    for line in ("broker --mosquitto-conf", "host", "config"):
        assert "again" not in alpha.run(line)[2]


@pytest.mark.parametrize("again", [False, True])
def test_a_daemon_begins_again_as_it_was_called_where_it_is_told_to(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    begun: list[Any] = []
    seen: list[Any] = []

    def run(*given: Any) -> bool:
        seen.append(given)
        return again

    monkeypatch.setattr("os.execv", lambda *given: begun.append(given))
    monkeypatch.setattr(hive, "run_daemon", run)
    code, out, err = alpha.run("daemon --log-level info")
    assert (code, out) == (0, "") and "event=stopped" in err
    config, log = seen[0]
    assert config.node.id == "alpha" and log._limit
    assert begun == ([(sys.executable, sys.orig_argv)] if again else [])
