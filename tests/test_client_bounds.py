"""Client: which daemon is meant, how long it is waited for, and the node of a command's own."""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import Commands, Scripted

import hive
from hive import (
    Config,
    Envelope,
    HiveError,
    InProcessNode,
    NodeRemoval,
    ReplyCollector,
    RunningDaemon,
    resolve_config,
    running_daemons,
)

NOW = 1771143500 + 1000


@pytest.fixture
def config(commands: Commands) -> Config:
    return hive.load_config(None, {"node.id": "alpha", "node.state_dir": commands.home / "state"})


# -- which daemon is meant --


@pytest.fixture
def folder(commands: Commands) -> Path:
    """Where daemons say that they run."""
    made = hive.state_home() / hive.RUNNING
    made.mkdir(mode=0o700, parents=True)
    return made


def running(folder: Path, name: str, text: str, patch: pytest.MonkeyPatch) -> None:
    (folder / name).write_text(text)
    patch.setattr(hive, "is_locked", lambda *files: True)


def test_a_daemon_says_that_it_runs_until_it_ends(commands: Commands) -> None:
    file = commands.home / "hive.toml"
    file.write_text('[mqtt]\nport = 7\n[node]\nid = "other"\n')
    said = {"node.id": "alpha", "mqtt.host": "h", "node.state_dir": commands.home / "s"}
    config = hive.load_config(str(file), said)
    with contextlib.ExitStack() as ending:
        hive.announce_daemon(config, ending)
        (found,) = running_daemons()
        assert (found.node, found.file) == ("alpha", str(file))
        assert found.said == said  # what the file says it need not
        (entry,) = (hive.state_home() / hive.RUNNING).iterdir()
        assert entry.parent.stat().st_mode & 0o777 == 0o700
    assert not entry.exists() and running_daemons() == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '["a", null]',
        '["a b", null, {}]',
        '["a", 5, {}]',
        '["a", null, []]',
        '["a", null, {"node.colour": 1}]',
        '["a", null, {"mqtt.port": "x"}]',
        '["a", null, {"node.state_dir": 5}]',
        "[" * 2000 + "]" * 2000,
        json.dumps(["a", None, {}]) + " " * 4096 + "x",
    ],
    ids=range(11),
)
def test_what_makes_no_sense_is_no_daemon(
    folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    running(folder, "x", text, monkeypatch)
    running(folder, "y", '["b", null, {"mqtt.port": 7}]', monkeypatch)
    found = [one.node for one in running_daemons()]
    assert found == (["a", "b"] if text.endswith("x") else ["b"])


def test_only_a_file_that_is_locked_in_a_folder_of_ours_is_a_daemon(folder: Path) -> None:
    file = folder / "a"
    file.write_text('["a", "/f", {}]')
    assert running_daemons() == []
    lock = hive.FileLock(file)
    assert running_daemons() == [RunningDaemon("a", "/f", {})]
    folder.chmod(0o777)
    assert running_daemons() == []
    lock.close()


def test_of_a_hundred_daemons_that_run_each_is_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(102):
        running(folder, f"n{n:03}", f'["n{n}", null, {{}}]', monkeypatch)
    assert [one.node for one in running_daemons()] == [f"n{n}" for n in range(100)]


@pytest.fixture
def runs(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let daemons run: their names, and which file of those in the home."""

    def run(*daemons: tuple[str, str]) -> None:
        found = []
        for name, file in daemons:
            (commands.home / file).write_text(f'[mqtt]\nhost = "{file}"\n')
            said = {"node.id": name, "mqtt.port": 7}
            found.append(RunningDaemon(name, str(commands.home / file), said))
        monkeypatch.setattr(hive, "running_daemons", lambda: found)

    return run


def test_the_only_daemon_is_meant(runs: Callable[..., None], commands: Commands) -> None:
    runs(("a", "a.toml"))
    config = resolve_config(None, {"mqtt.tls": True})
    assert (config.node.id, config.mqtt.host, config.mqtt.port) == ("a", "a.toml", 7)
    assert config.mqtt.tls and config.origin["mqtt.port"] == "the daemon that runs"
    assert config.origin["mqtt.tls"] != "the daemon that runs"
    config = resolve_config(None, {"mqtt.port": 9})
    assert config.mqtt.port == 9 and config.origin["mqtt.port"] != "the daemon that runs"
    (commands.home / "b.toml").write_text('[node]\nid = "b"\n')
    assert resolve_config("b.toml", {}).node.id == "b"  # a file that is named goes before


def test_a_daemon_is_named_where_several_run(
    runs: Callable[..., None], commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(("b", "b.toml"), ("a", "a.toml"))
    why = r"^2 daemons of yours run here; which one\? --node a or --node b$"
    with pytest.raises(hive.UsageError, match=why):
        resolve_config(None, {})
    assert resolve_config(None, {"node.id": "b"}).mqtt.host == "b.toml"
    monkeypatch.setenv("HIVE_NODE", "a")
    assert resolve_config(None, {}).mqtt.host == "a.toml"
    assert resolve_config(None, {"node.id": "b"}).mqtt.host == "b.toml"
    monkeypatch.setenv("HIVE_CONFIG", "b.toml")
    assert resolve_config(None, {}).mqtt.host == "a.toml"  # a name goes before
    monkeypatch.delenv("HIVE_NODE")
    assert resolve_config(None, {}).mqtt.host == "b.toml"
    assert resolve_config(None, {"node.id": "c"}).node.id == "c"
    (commands.home / "c.toml").write_text('[mqtt]\nhost = "c"\n')
    monkeypatch.setenv("HIVE_CONFIG", "c.toml")
    assert resolve_config(None, {}).mqtt.host == "c"  # of which none runs
    monkeypatch.setenv("HIVE_NODE", "d")
    assert resolve_config(None, {}).node.id == "d"
    monkeypatch.setenv("HIVE_NODE", "a b")
    with pytest.raises(hive.UsageError, match=r"^HIVE_NODE: 'a b' is not a name"):
        resolve_config(None, {})


def test_two_daemons_of_one_name_are_told_apart_by_their_files(
    runs: Callable[..., None], commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(("a", "y"), ("a", "x"))
    files = f"{commands.home}/x, {commands.home}/y"
    why = f"^2 daemons called a run here; which one[?] name its --config: {files}$"
    with pytest.raises(hive.UsageError, match=why):
        resolve_config(None, {"node.id": "a"})
    monkeypatch.setenv("HIVE_CONFIG", "x")
    assert resolve_config(None, {"node.id": "a"}).mqtt.host == "x"


def test_where_no_daemon_runs_a_node_is_called_as_its_machine(
    runs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs()
    assert resolve_config(None, {}).node.id == hive.load_config(None).node.id
    monkeypatch.setenv("HIVE_NODE", "d")
    assert resolve_config(None, {}).node.id == "d"


# -- how long it is waited for --


@pytest.mark.parametrize(
    ("locked", "broker", "patience", "waits"),
    [
        (True, True, 10.0, 3.0),  # it has just been started
        (True, True, 2.0, 2.0),
        (False, True, 10.0, 0.0),
        (False, False, 10.0, 1.0),  # another may be about to host one
        (False, False, 0.5, 0.5),
    ],
)
def test_a_daemon_is_waited_for_where_it_may_be_about_to_come(
    commands: Commands,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    locked: bool,
    broker: bool,
    patience: float,
    waits: float,
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(hive, "connect_to_daemon", lambda config, wait: asked.append(wait))
    monkeypatch.setattr(hive, "is_locked", lambda *files: locked and len(files) == 2)
    monkeypatch.setattr(hive, "find_broker", lambda config: broker)
    assert hive.await_daemon(config, patience) is None
    assert waits <= commands.now[0] - 1000 < waits + 0.06
    assert {*asked} == {patience} and abs(len(asked) - waits / 0.05 - 1) <= 1


def test_half_of_the_patience_is_the_daemons(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def begin(*said: Any) -> Any:
        given.append(said[1:])
        return said

    monkeypatch.setattr(hive, "InProcessNode", begin)
    monkeypatch.setattr(hive, "await_daemon", lambda config, patience: given.append(patience))
    monkeypatch.setattr(hive, "connect_to_daemon", lambda config, patience: patience)
    assert hive.open_control(config)
    assert given == [5.0, (10.0,)]
    given.clear()
    assert hive.open_control(config, 4.0, direct=True)
    assert given == [(4.0, 2.0)]  # which is the daemon that is told
    monkeypatch.setattr(hive, "await_daemon", lambda config, patience: "daemon")
    found: Any = hive.open_control(config, 4.0)
    assert found == "daemon"


@pytest.mark.parametrize(("patience", "waits"), [(2.0, 2.0), (5.0, 5.0), (9.0, 5.0)])
def test_a_daemon_has_five_seconds_to_answer_or_less(
    config: Config, monkeypatch: pytest.MonkeyPatch, patience: float, waits: float
) -> None:
    given: list[Any] = []

    def connect(*said: Any) -> str:
        given.append(said)
        if said[0].name == "first":
            raise OSError
        return "client"

    files = [config.state_dir / name for name in ("of another", "first", "second", "third")]
    monkeypatch.setattr(hive, "control_socket_paths", lambda config: iter(files))
    monkeypatch.setattr(
        hive, "directory_objection", lambda file: "why" if file == files[0] else None
    )
    monkeypatch.setattr(hive, "ControlClient", connect)
    found: Any = hive.connect_to_daemon(config, patience)
    assert found == "client"
    assert given == [(file, "alpha", waits) for file in files[1:3]]
    files[:] = files[:2]
    assert hive.connect_to_daemon(config) is None


# -- a node of the command's own --


class Own:
    """One that is connected, and what it was asked; its answers come later."""

    def __init__(self, config: Config, now: list[float], daemon: Any = None) -> None:
        self.contested = ""
        self.handled: list[Any] = []
        self.answer: dict[str, Any] | None = {"queued": True}
        self.later = deque[dict[str, Any]]()
        self.now, self.timers, self.closed = now, [0, 0], list[str]()
        self.node: Any = InProcessNode(config, 5.0, daemon)
        members = SimpleNamespace(contested=lambda to: self.contested)
        journal = SimpleNamespace(close=lambda: self.closed.append("journal"))
        self.node._node = SimpleNamespace(  # type: ignore[assignment]
            members=members,
            requests=SimpleNamespace(handle=self.handle),
            loop=self,
            journal=journal,
            connected=True,
        )

    def handle(self, request: Any, requester: Any) -> dict[str, Any] | None:
        self.handled.append({**request})
        return self.answer

    # its loop

    def after(self, seconds: float, call: Callable[[], object]) -> Any:
        assert seconds >= 0
        self.timers[0] += 1
        return self

    def cancel(self) -> None:
        self.timers[1] += 1

    def step(self) -> None:
        self.now[0] += 0.5
        if self.later:
            self.node.send(self.later.popleft())

    def close(self) -> None:
        self.closed.append("loop")


def request(ch: str = "command", wait: bool = False, **more: Any) -> dict[str, Any]:
    envelope = Envelope.new("alpha", "beta", ch, "x", id="m-1")
    return {"do": "send", "envelope": envelope.document(), "wait": wait} | more


@pytest.mark.parametrize(
    ("ch", "wait", "tells"),
    [
        ("command", False, True),
        ("sync", False, True),
        ("status", True, True),
        ("status", False, False),
    ],
)
def test_beside_a_daemon_it_tells_that_what_an_answer_will_be_about(
    commands: Commands, config: Config, ch: str, wait: bool, tells: bool
) -> None:
    daemon = Scripted(commands.now, sent={})
    own = Own(config, commands.now, daemon)
    said = request(ch, wait)
    assert own.node.ask(said) == {"queued": True}
    assert daemon.asked == ([said | {"do": "sent"}] if tells else [])
    assert own.handled == [said]
    answer = Envelope.new("beta", "alpha", "response", "y").document()
    own.node.send({"answer": answer})
    assert daemon.asked[-1] == {"do": "read", "envelope": answer}
    assert own.node.receive(1.0) == {"answer": answer}


def test_a_daemon_that_does_not_take_it_is_told_no_more(commands: Commands, config: Config) -> None:
    def ended(said: Any) -> Any:
        raise hive.DaemonError("it has ended")

    daemon = Scripted(commands.now, sent=ended)
    own = Own(config, commands.now, daemon)
    for _ in range(2):
        own.node.ask(request())
    assert (len(daemon.asked), daemon.closed) == (1, 1)
    own.node.close()
    assert daemon.closed == 1


def test_a_name_that_two_nodes_list_is_refused(commands: Commands, config: Config) -> None:
    own = Own(config, commands.now)
    own.contested = "b1 and b2"
    with pytest.raises(HiveError) as raised:
        own.node.ask(request())
    assert str(raised.value) == "beta is listed by b1 and b2: say which, or start a daemon"
    assert not own.handled


def test_what_is_sent_later_is_waited_for(commands: Commands, config: Config) -> None:
    own = Own(config, commands.now)
    own.answer = None
    queued, published = {"queued": True, "id": "x"}, {"published": 0, "id": "m-1"}
    own.later.extend([queued, {"published": 0, "id": "other"}, published])
    assert own.node.ask(request()) == queued
    assert own.node.receive(0.0) == {"published": 0, "id": "other"}
    assert own.node.receive(0.0) == published and own.node.receive(None) is None
    assert own.timers[0] == own.timers[1] > 0
    commands.now[0] += 100.0  # each question has its own time
    own.later.extend([queued, published])
    assert own.node.ask(request()) == queued and own.node.receive(0.0) == published
    own.later.extend([queued])
    with pytest.raises(hive.BrokerError, match=r"no answer \(PUBACK\) in 5 s"):
        own.node.ask(request())
    assert commands.now[0] - 1100 < 8


def test_what_the_broker_refuses_is_a_fault(commands: Commands, config: Config) -> None:
    own = Own(config, commands.now)
    own.node.send({"published": 0x7F, "topic": "t", "words": "x"})
    for code in (0x80, -1):
        with pytest.raises(hive.BrokerError) as raised:
            own.node.send({"published": code, "topic": "t", "words": "Not Authorized"})
        assert "refused to publish to t: not authorized" in str(raised.value)


@pytest.mark.parametrize(
    ("reason", "size", "connected", "told"),
    [
        (hive.HANG_UP, 1025, True, True),
        (hive.HANG_UP, 1024, True, False),
        (hive.HANG_UP, 1025, False, False),
        ("Connection reset", 1025, True, False),
    ],
)
def test_a_broker_that_hangs_up_at_a_large_message_may_not_take_it(
    commands: Commands, config: Config, reason: str, size: int, connected: bool, told: bool
) -> None:
    own = Own(config, commands.now)
    own.node._node.connected = connected
    own.node._bytes = size
    with pytest.raises(hive.BrokerError) as raised:
        own.node.on_disconnected(reason)
    said = f"{reason} at a message of {size} bytes: it may be too large for it"
    assert (said in str(raised.value)) == told and reason in str(raised.value)


def test_a_broker_that_hangs_up_before_anything_was_sent_is_a_fault(config: Config) -> None:
    with pytest.raises(hive.BrokerError, match=hive.HANG_UP):
        InProcessNode(config, 1.0).on_disconnected(hive.HANG_UP)


def test_the_size_of_what_is_sent_is_known(commands: Commands, config: Config) -> None:
    own = Own(config, commands.now)
    own.node.ask(request())
    assert own.node._bytes == len(Envelope.check(request()["envelope"]).encode())


def test_it_says_goodbye_and_leaves_nothing_open(commands: Commands, config: Config) -> None:
    daemon = Scripted(commands.now)
    own = Own(config, commands.now, daemon)
    given: list[Any] = []

    def close(done: Callable[[], object], within: float) -> None:
        given.append(within)
        done()

    own.node._client = SimpleNamespace(close=close)
    own.node.on_close.append(lambda: given.append("told"))
    own.node.close()
    assert (given, own.closed, daemon.closed) == (["told", 1.0], ["journal", "loop"], 1)
    own.node._client = SimpleNamespace(close=lambda done, within: None)
    before = commands.now[0]
    own.node.close()  # it is not waited for for ever
    assert 10.0 <= commands.now[0] - before < 11


class Wire:
    """A broker that keeps the state of beta."""

    def __init__(self, loop: hive.Loop, mqtt: Any, *given: Any) -> None:
        Wire.made.append((mqtt, *given[:2]))
        self.client = self
        loop.after(0.0, lambda: self.come(*given[2:]))

    made: list[Any]
    silent = False

    def come(self, found: Any, complete: Any, lost: Any) -> None:
        state = json.dumps({"status": "online", "last_seen": NOW}).encode()
        topic = "hive/meta/beta/state"
        found(hive.IncomingMessage(topic, state, True, None, lambda: None))
        if not self.silent:
            complete()

    def close(self, done: Callable[[], object], within: float) -> None:
        done()

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **more: None


@pytest.fixture
def wire(commands: Commands, config: Config, monkeypatch: pytest.MonkeyPatch) -> type[Wire]:
    monkeypatch.setattr(hive, "time", time)
    monkeypatch.setattr(hive, "load_paho", lambda: None)
    mqtt = config.mqtt.replace(host="found")
    monkeypatch.setattr(hive, "with_broker", lambda config: config.replace(mqtt=mqtt))
    monkeypatch.setattr(hive, "RetainedQuery", Wire)
    monkeypatch.setattr(Wire, "made", [], raising=False)
    return Wire


def test_a_node_of_its_own_connects_once_and_answers(config: Config, wire: type[Wire]) -> None:
    with contextlib.closing(InProcessNode(config, 5.0)) as node:
        said = node.ask({"do": "states"})
        assert said["connected"] and said["complete"] and [*said["states"]] == ["beta"]
        assert node.ask({"do": "roster"})["rosters"] == {}
    ((mqtt, filters, marker),) = wire.made
    assert mqtt.host == "found" and filters == ["hive/meta/+/roster", "hive/meta/+/state"]
    assert "alpha" in marker


def test_a_broker_that_does_not_say_all_is_given_up(
    config: Config, wire: type[Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "silent", True)
    with (
        contextlib.closing(InProcessNode(config, 0.05)) as node,
        pytest.raises(hive.BrokerError, match=r"^broker found:1883: no answer in 0.05 s"),
    ):
        node.ask({"do": "states"})


def test_where_paho_is_missing_that_is_said_before_a_broker_is_looked_for(
    commands: Commands, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise HiveError("paho-mqtt is missing")

    monkeypatch.setattr(hive, "load_paho", missing)
    monkeypatch.setattr(hive, "with_broker", lambda config: pytest.fail("it was"))
    for ask in (
        lambda: InProcessNode(config, 1.0).ask({"do": "states"}),
        NodeRemoval(config, "beta").remove,
    ):
        with pytest.raises(HiveError, match="paho-mqtt is missing"):
            ask()
    said = commands.run("join hive1.x")
    assert said == (1, "", "hive: paho-mqtt is missing\n")


def test_what_it_must_hear_to_answer(commands: Commands, config: Config) -> None:
    def filters(do: str, to: str = "beta", wait: bool = False, checked: bool = False) -> Any:
        mqtt = config.mqtt.replace(senders="checked") if checked else config.mqtt
        node = InProcessNode(config.replace(mqtt=mqtt), 1.0)
        envelope = Envelope.new("alpha", to, "command", "x")
        return node._filters(do, {"envelope": envelope, "wait": wait})

    rosters, states = "hive/meta/+/roster", "hive/meta/+/state"
    own = [f"hive/alpha/{ch}{more}" for ch in ("response", "alert") for more in ("", "/+")]
    assert filters("send") == [rosters]
    assert filters("send", "all") == []
    assert filters("send", wait=True) == [*own, rosters, "hive/meta/beta/state"]
    assert filters("send", "all", wait=True) == [*own, rosters, states]
    assert filters("send", wait=True, checked=True)[-1] == states  # it may be any node's agent
    assert filters("states") == filters("targets") == [rosters, states]
    assert filters("roster") == [rosters]
    with pytest.raises(HiveError, match=r"^no daemon of alpha runs on this machine: nothing to x$"):
        filters("x")


def test_the_journal_is_kept_as_the_configuration_says(
    commands: Commands, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(hive, "Journal", lambda *said: given.append(said))
    log = hive.Log("error")
    kept = config.replace(journal=hive.JournalConfig(keep_days=2, max_mb=3))
    hive.open_journal(kept, log)
    hive.open_journal(kept, log, on_disk=False)
    assert given == [(where, log, 172800.0, 3_000_000) for where in (kept.state_dir, None)]


def test_a_journal_that_cannot_be_locked_is_one_line(
    commands: Commands, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    hive.open_journal(config, hive.Log("error")).close()

    def refuse(file: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(hive, "lock_or_spare", refuse)
    with pytest.raises(HiveError) as raised:
        hive.look_up(config, {"do": "pending"})
    assert str(raised.value) == f"{config.state_dir}: Permission denied"


# -- whose answers are missing --


def collected(to: str = "all", action: str | None = None, **states: Any) -> ReplyCollector:
    envelope = Envelope.new("alpha", to, "command", "x", id="m-1", action=action)
    collector = ReplyCollector(envelope, hive.HeartbeatConfig())
    how = {"status": "online", "last_seen": NOW}
    collector.expect({name: how | one for name, one in states.items()})
    return collector


def test_who_is_waited_for_is_said_and_how_many_have_answered(commands: Commands) -> None:
    nodes: dict[str, Any] = {f"n{n}": {} for n in range(6)}
    few = dict([*nodes.items()][:5])
    assert collected(**few).waiting() == "waiting for n0, n1, n2, n3, n4 (0 answered)"
    many = collected(**nodes)
    assert many.waiting() == "waiting for n0, n1, n2, n3, n4, ... (0 answered)"
    answer = Envelope.new("n0", "alpha", "response", "y", corr="m-1")
    assert many.take(answer)
    assert many.waiting() == "waiting for n1, n2, n3, n4, n5 (1 answered)"
    assert collected("beta").waiting() == "waiting for beta"


def test_who_has_no_agent_is_not_waited_for_where_an_agent_must_answer(commands: Commands) -> None:
    nodes: dict[str, Any] = {"a": {"oc": {}}, "b": {"oc": {"main": "ok"}}, "older": {}}
    assert collected(**nodes).outstanding == {"b", "older"}
    assert collected(action="ping", **nodes).outstanding == {"a", "b", "older"}
    with pytest.raises(hive.NoReplyError, match=r"^no node that is online has an agent; see"):
        collected(a={"oc": {}})
    agents = collected(b={}, main={"daemon_node": "b"})
    assert agents.take(Envelope.new("main", "alpha", "response", "y", corr="m-1"))
    assert agents.outstanding == set()  # what an agent says is its node's answer


def test_of_many_who_are_away_five_are_named() -> None:
    away = {f"n{n}": {"status": "offline", "age": 60.0} for n in range(6)}
    with pytest.raises(HiveError) as raised:
        hive.named_targets("web-*", None, {"names": [], "away": away})
    named = ", ".join(f"n{n} (offline, seen 1m ago)" for n in range(5))
    why = f"no node that is online is called like web-*; away: {named} (and 1 more)"
    assert str(raised.value) == why
    assert hive.named_targets("any", None, {"names": ["b"], "away": away}) == ["b"]


def test_of_a_group_nobody_is_late_before_the_time(commands: Commands) -> None:
    replies = hive.GroupReplies(3.0)
    assert (replies.ends, len(replies), replies.faulty) == (0.0, 0, False)
    replies.sent(Envelope.new("alpha", "b", "command", "x", id="m-1"), 10.0)
    replies.expire(12.9)
    assert (replies.ends, len(replies), replies.faulty) == (13.0, 1, False)
    assert replies.take(Envelope.new("b", "alpha", "response", "y", corr="m-1"))
    replies.unheard(["m-1"])
    assert (replies.ok, replies.faulty) == (["b"], False)
    replies.failed.append("c")
    assert replies.faulty


# -- a node that is forgotten --


class Query:
    """What a broker keeps, and what becomes of it."""

    kept: Mapping[str, bytes] = {}
    code = 0
    silent = False

    def __init__(self, loop: Any, mqtt: Any, filters: Any, marker: str, *calls: Any) -> None:
        Query.made = self
        self.filters, self.marker, self.client = filters, marker, self
        self.removed: list[Any] = []
        self.within = 0.0
        hear, complete, self.failed = calls
        for topic, payload in self.kept.items():
            hear(hive.IncomingMessage(topic, payload, True, None, lambda: None))
        if not self.silent:
            complete()

    made: Query

    def publish(self, message: hive.OutgoingMessage) -> None:
        self.removed.append((message.topic, message.payload, message.retain))
        message.done(self.code, "Not Authorized")

    def close(self, done: Callable[[], object], within: float) -> None:
        self.within = within
        done()


def document(status: str = "offline", **more: Any) -> bytes:
    return json.dumps({"status": status, "last_seen": NOW - 9} | more).encode()


@pytest.fixture
def broker(
    commands: Commands, config: Config, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Callable[..., int]]:
    """A broker that keeps these documents; how to remove beta from it."""
    monkeypatch.setattr(hive, "load_paho", lambda: None)
    monkeypatch.setattr(hive, "with_broker", lambda config: config)
    monkeypatch.setattr(hive, "RetainedQuery", Query)

    def keeps(documents: Mapping[str, bytes], **how: Any) -> Callable[..., int]:
        attributes = {"code": 0, "silent": False} | how
        for name, value in attributes.items():
            monkeypatch.setattr(Query, name, value)
        monkeypatch.setattr(Query, "kept", {f"hive/meta/{t}": d for t, d in documents.items()})
        return lambda **said: NodeRemoval(config, "beta", **said).remove()

    return keeps


KEPT = ("beta/ping", "beta/roster", "beta/state", "main/state")


def left_by_beta(**more: Any) -> dict[str, bytes]:
    return {
        "beta/state": document(**more),
        "beta/roster": b"{}",
        "beta/ping": b"x",
        "main/state": document(daemon_node="beta"),
        "gamma/state": document("online"),
        "other/state": document(daemon_node="gamma"),
        "empty/state": b"",
    }


def test_all_that_a_node_left_behind_is_removed(broker: Callable[..., Any]) -> None:
    assert broker(left_by_beta())() == 4
    query = Query.made
    assert query.removed == [(f"hive/meta/{one}", b"", True) for one in KEPT]
    assert query.within == 1.0
    assert query.filters == [
        *("hive/meta/+/state", "hive/meta/beta/+"),
        *("hive/meta/beta/state", "hive/meta/beta/roster"),
    ]


def test_a_node_that_is_there_is_not_removed_unless_it_was_expelled(
    broker: Callable[..., Any],
) -> None:
    remove = broker(left_by_beta(status="online"))
    with pytest.raises(HiveError) as raised:
        remove()
    why = "beta is online, seen 9s ago: only what is gone can be forgotten"
    assert str(raised.value) == why and not Query.made.removed
    assert remove(expelled=True) == 4


def test_where_nothing_is_kept_of_a_node_that_is_said(broker: Callable[..., Any]) -> None:
    remove = broker({"gamma/state": document()})
    with pytest.raises(HiveError) as raised:
        remove()
    assert str(raised.value) == (
        "nothing of beta is kept at localhost:1883 under hive/; who is there: hive status"
    )
    assert remove(expelled=True) == 0
    agents = broker({"main/state": document(daemon_node="beta")})
    assert agents() == 1


def test_what_the_broker_does_not_let_go_is_a_fault(
    broker: Callable[..., Any], commands: Commands
) -> None:
    with pytest.raises(hive.BrokerError) as raised:
        broker(left_by_beta(), code=0x87)()
    assert "refused to publish to hive/meta/beta/ping: not authorized" in str(raised.value)
    with pytest.raises(hive.BrokerError, match="why"):
        Query.made.failed("why")


def test_a_document_that_is_too_large_is_no_state_but_goes_with_the_rest(
    broker: Callable[..., Any],
) -> None:
    def state(size: int) -> bytes:
        said = document("online", x="")
        return said.replace(b'"x": ""', b'"x": "' + b"y" * (size - len(said)) + b'"')

    assert broker({"beta/state": state(65537)})() == 1  # it cannot be said that it is there
    with pytest.raises(HiveError, match="beta is online"):
        broker({"beta/state": state(65536)})()


def test_no_more_nodes_are_heard_than_there_can_be(
    broker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_MEMBERS", 2)
    others = {f"n{n}/state": document() for n in range(1)}
    assert broker(others | {"beta/state": document(), "beta/late": b"x"})() == 1
    assert broker(others | {"a b/state": b"x", "beta/state": document()})() == 1


def test_who_may_remove_what_another_wrote(
    broker: Callable[..., Any], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker(left_by_beta())
    checked: Any = SimpleNamespace(
        mqtt=config.mqtt,
        node=config.node,
        heartbeat=config.heartbeat,
        topics=hive.Topics("hive", sender="alpha"),
    )
    with pytest.raises(HiveError) as raised:
        NodeRemoval(checked, "beta").remove()
    assert str(raised.value) == (
        "nobody but beta writes its documents, as senders are checked;"
        " say this on the machine that carries the hive"
    )
    assert NodeRemoval(checked, "beta", as_host=True).remove() == 4
    checked.node = config.node.replace(id="beta")
    assert NodeRemoval(checked, "beta").remove() == 4


def test_a_broker_that_says_nothing_is_given_up_after_ten_seconds(
    broker: Callable[..., Any], commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "Loop", lambda log: Loop(commands.now))
    with pytest.raises(hive.BrokerError, match="no answer in 10 s"):
        broker({}, silent=True)()
    assert commands.now[0] == 1010.0


class Loop:
    """Each step takes a second."""

    def __init__(self, now: list[float]) -> None:
        self.now = now

    def clock(self) -> float:
        return self.now[0]

    def after(self, seconds: float, call: Any) -> Any:
        return SimpleNamespace(due=self.now[0] + seconds, cancel=lambda: None)

    def step(self) -> None:
        self.now[0] += 1.0

    def close(self) -> None: ...
