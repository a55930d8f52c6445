"""What the tests share: a real broker on a free port, nodes as processes, waiting for events."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import forked

from hive import (
    ChildProcesses,
    ControlClient,
    DaemonError,
    Database,
    HandlerConfig,
    HeartbeatConfig,
    InstanceConfig,
    JournalConfig,
    Log,
    Loop,
    ScheduleConfig,
    shortened_socket_path,
    status_rows,
)

if TYPE_CHECKING:
    from raw_mqtt import Hosted
    from rig import Rig
    from scripted import Commands

ROOT = Path(__file__).resolve().parent.parent

# Each worker compiles 45,000 lines of tests, and hundreds of children hive.py: once is enough.
os.environ["PYTHONDONTWRITEBYTECODE"] = ""
sys.dont_write_bytecode = False

# A shell that starts the tests in the background has SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup has SIGHUP ignored

PATIENCE = 30.0  # seconds; nothing here takes that long unless it is broken
T = TypeVar("T")


def eventually(what: str, check: Callable[[], T], patience: float = PATIENCE) -> T:
    """Wait until `check` gives something true; what it gave."""
    until = time.monotonic() + patience
    while True:
        began = time.monotonic()
        if found := check():
            return found
        now = time.monotonic()
        assert now < until, f"never happened: {what}"
        time.sleep(min(max(now - began, 0.01), 0.25))  # to look is not to take the CPU from work


def find_program(name: str) -> str | None:
    return shutil.which(
        name, path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def told_at(door: Path, do: str, **more: Any) -> dict[str, Any]:
    """What the daemon behind this door answers; {} if it is down.

    For who waits: that is not worth ten processes.
    """
    with contextlib.suppress(OSError, DaemonError), contextlib.ExitStack() as ending:
        control = ControlClient(shortened_socket_path(door), "it")
        ending.callback(control.close)
        return control.ask({"do": do, **more})
    return {}


def statuses_of(told: Mapping[str, Any]) -> dict[str, str]:
    """As `hive status` shows them."""
    rows = status_rows(told.get("states", {}), HeartbeatConfig(), time.time())
    return {row.name: row.status for row in rows}


class Broker:
    """A Mosquitto of the test's own, with what it keeps below `home`."""

    def __init__(self, home: Path, *settings: str, start: bool = True) -> None:
        self.home, self.port = home, free_port()
        home.mkdir(parents=True, exist_ok=True)
        self._program = find_program("mosquitto")
        self._process: subprocess.Popen[bytes] | None = None
        lines = [
            f"listener {self.port} 127.0.0.1",
            *(settings or ["allow_anonymous true"]),
            "persistence true",
            f"persistence_location {home}/",
            "autosave_interval 1",
            "autosave_on_changes true",
            "max_queued_messages 0",
            *(["user root"] if os.geteuid() == 0 else []),
        ]
        (home / "mosquitto.conf").write_text("\n".join(lines) + "\n")
        if start:
            self.start()

    def start(self) -> None:
        assert self._program
        with (self.home / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "-c", self.home / "mosquitto.conf"], stdout=log, stderr=log
            )
        eventually("the broker listens", lambda: answers(self.port))

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it; Mosquitto forgets a SIGTERM that comes just after it began to listen."""
        if self._process:
            for _ in range(20):
                self._process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(5)
                    break
            else:
                self._process.kill()
                raise AssertionError("the broker does not end")
            self._process = None


class EmbeddedBroker(Broker):
    """Hive's own broker, in the place of Mosquitto."""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home, self.port = home, free_port()
        self._process = None
        self.start()

    def start(self) -> None:
        listen = (f"--socket={self.home}/socket", f"--listen=127.0.0.1:{self.port}", "--anonymous")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HIVE_")}
        with (self.home / "broker.log").open("ab") as log:
            self._process = forked.spawn(
                [sys.executable, forked.PROGRAM, "broker", *listen],
                stdout=log,
                stderr=log,
                env=environment | {"HOME": str(self.home), "XDG_STATE_HOME": str(self.home)},
                cwd=self.home,
            )
        eventually("the broker listens", lambda: answers(self.port))


def program_at(commit: str, folder: Path) -> bool:
    """Put the program there as it was at a commit; is that in this repository?"""
    for name in ("hive.py", "hive-cli"):
        show = ["git", "-C", str(ROOT), "show", f"{commit}:{name}"]
        try:
            said = subprocess.run(show, check=True, capture_output=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return False
        (folder / name).write_bytes(said)
    return True


def missing(what: str) -> NoReturn:
    """Skip, and say so, where this machine lacks something; fail where CI promised it."""
    if os.environ.get("CI") and sys.platform == "linux":
        pytest.fail(what)
    pytest.skip(what)


def need_mosquitto() -> None:
    if not find_program("mosquitto"):
        missing("Mosquitto is missing: this needs a real broker (apt-get install mosquitto)")


MOSQUITTO, EMBEDDED = "mosquitto", "embedded"


@pytest.fixture
def broker_kind() -> str:
    """Which broker a test runs on; modules that run on both have a fixture of this name."""
    return MOSQUITTO


@pytest.fixture(scope="session")
def shared_brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Broker]]:
    """One broker of each kind, as soon as a test asks for it."""
    brokers: dict[str, Broker] = {}
    yield brokers
    for broker in brokers.values():
        broker.stop()


@pytest.fixture
def shared_broker(
    broker_kind: str,
    shared_brokers: dict[str, Broker],
    tmp_path_factory: pytest.TempPathFactory,
) -> Broker:
    """One broker for all tests that do not restart it; each uses a topic prefix of its own."""
    if broker_kind not in shared_brokers:
        shared_brokers[broker_kind] = broker_of(broker_kind, tmp_path_factory.mktemp("broker"))
    return shared_brokers[broker_kind]


@pytest.fixture
def own_broker(broker_kind: str, tmp_path: Path) -> Iterator[Broker]:
    """A broker that the test may stop and start."""
    broker = broker_of(broker_kind, tmp_path / "broker")
    yield broker
    broker.stop()


def broker_of(kind: str, home: Path) -> Broker:
    """Start one; skip the test where there is none of this kind."""
    if kind == EMBEDDED:
        return EmbeddedBroker(home)
    if kind != MOSQUITTO:
        from other_brokers import OTHER_BROKERS

        return OTHER_BROKERS[kind](home)
    need_mosquitto()
    return Broker(home)


class Daemon:
    """One node as a process, with its own folder, handlers, state and log."""

    def __init__(self, hive: Hive, name: str, extra: str) -> None:
        self.hive, self.name, self.home = hive, name, hive.home / name
        self.handlers = self.home / "hive-daemon.d"
        self.handlers.mkdir(parents=True)
        self.config = self.home / "hive.toml"
        self.config.write_text(
            f'[node]\nid = "{name}"\ntopic_prefix = "{hive.prefix}"\nstate_dir = "state"\n'
            f"[mqtt]\n{hive.mqtt}\n"
            f"[heartbeat]\ninterval = {hive.interval}\n"
            f'[logging]\nlevel = "debug"\nformat = "json"\n{extra}'
        )
        self.environment: dict[str, str] = {}  # what is different for this one
        self.state_dir: Path | None = None  # where its configuration does not say "state"
        self.log_file = self.home / "log"
        self._rows, self._read = list[dict[str, Any]](), 0  # of it, and up to which byte
        self.process: subprocess.Popen[bytes] | None = None

    def handler(self, action: str, script: str) -> Path:
        """Put a handler into the node's directory, whole and executable at once."""
        made = self.home / f"{action}.new"
        made.write_text(script)
        made.chmod(0o755)
        return made.rename(self.handlers / action)

    def start(self, wait: bool = True) -> Daemon:
        seen = len(self.events("connected")) if wait else 0
        with self.log_file.open("ab") as log:
            self.process = self.hive.spawn(
                [*self.hive.program, "daemon", "--config", self.config],
                stderr=log,
                stdout=log,
                stdin=subprocess.DEVNULL,
                env=self.hive.environment | self.environment,
                cwd=self.home,
            )
        if wait:
            eventually(f"{self.name} is up", lambda: len(self.events("connected")) > seen)
        return self

    def events(self, event: str = "", **facts: object) -> list[dict[str, Any]]:
        """The lines of the log with this event and these facts."""
        self._read_on()
        return [
            row
            for row in self._rows
            if (not event or row["event"] == event) and facts.items() <= row.items()
        ]

    def _read_on(self) -> None:
        """Take in what is new in the log: it may be long, and is asked for a hundred times."""
        size = self.log_file.stat().st_size if self.log_file.exists() else 0
        if size < self._read:
            self._rows, self._read = [], 0
        if size == self._read:
            return
        with self.log_file.open("rb") as log:
            log.seek(self._read)
            whole = log.read().rpartition(b"\n")[0]
        self._read += len(whole) + 1 if whole else 0
        for line in whole.decode().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                row = {"event": "not JSON", "line": line}
            self._rows.append(row)

    def logged(self, event: str, **facts: object) -> dict[str, Any]:
        """Wait for a line of the log."""
        return eventually(f"{self.name} logs {event} {facts}", lambda: self.events(event, **facts))[
            -1
        ]

    def told(self, do: str, **more: Any) -> dict[str, Any]:
        return told_at((self.state_dir or self.config.with_name("state")) / "door", do, **more)

    def statuses(self) -> dict[str, str]:
        """How all are to it."""
        return statuses_of(self.told("states"))

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid


class Hive:
    """Nodes that share a broker and a prefix, and a command line to speak to them."""

    def __init__(self, home: Path, broker: Broker, prefix: str, interval: float = 0.5) -> None:
        self.home, self.broker, self.prefix, self.interval = home, broker, prefix, interval
        self.mqtt = f"port = {broker.port}"  # what a node's hive.toml says of it
        self.program = [sys.executable, forked.PROGRAM]
        self.forks = False  # a fork of this process stands in for the start of the program
        self.nodes: dict[str, Daemon] = {}
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("HIVE_")}
        self.environment |= {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": ""}

    def node(self, name: str, extra: str = "") -> Daemon:
        """A node with its folder; start() runs it.  `extra` is added to its hive.toml."""
        self.nodes[name] = Daemon(self, name, extra)
        return self.nodes[name]

    def command_line(self, node: str, *arguments: str) -> list[str]:
        return [*self.program, f"--config={self.nodes[node].config}", *arguments]

    def spawn(self, line: Sequence[str | Path], **how: Any) -> subprocess.Popen[Any]:
        """Start a daemon or a command, as subprocess.Popen does."""
        return (forked.spawn if self.forks else subprocess.Popen)(line, **how)

    def run(self, line: Sequence[str | Path], **how: Any) -> subprocess.CompletedProcess[Any]:
        return (forked.run if self.forks else subprocess.run)(line, **how)

    def cli(
        self, node: str, *arguments: str, code: int | None = 0, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run hive-cli as `node`; fail unless it ends with `code`."""
        done: subprocess.CompletedProcess[str] = self.run(
            self.command_line(node, *arguments),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            env=self.environment,
        )
        assert code is None or done.returncode == code, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def close(self) -> None:
        for node in self.nodes.values():
            if node.process and node.process.poll() is None:
                for _ in range(2):  # once to ask, once more to hurry: no handler outlives it
                    node.process.terminate()
                    time.sleep(0.01)
        for node in self.nodes.values():
            if node.process:
                node.process.wait(PATIENCE)
        bugs = [row for node in self.nodes.values() for row in node.events("bug")]
        assert not bugs, bugs


@pytest.fixture
def hive_of(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Hive]]:
    """Make a hive on a given broker; everything in it ends with the test."""
    made: list[Hive] = []

    def make(broker: Broker, **how: Any) -> Hive:
        hive = Hive(
            tmp_path / f"hive{len(made)}", broker, f"t{os.getpid()}-{time.monotonic_ns()}", **how
        )
        hive.home.mkdir()
        hive.forks = request.module.__name__.startswith("test_")
        made.append(hive)
        return hive

    yield make
    for hive in made:
        hive.close()


@pytest.fixture
def hive(hive_of: Callable[..., Hive], shared_broker: Broker) -> Hive:
    """A hive on the shared broker."""
    return hive_of(shared_broker)


def noting(notes: list[Any], then: Callable[..., T]) -> Callable[..., T]:
    """The same function, but what it is given is noted first."""

    def call(*given: Any) -> T:
        notes.append(given)
        return then(*given)

    return call


class Clock:
    """Real time, or the moment at which it was stopped; and what was skipped of it."""

    def __init__(self) -> None:
        self.skipped = 0.0
        self.stopped: float | None = None

    def __call__(self) -> float:
        now = time.monotonic() if self.stopped is None else self.stopped
        return now + self.skipped


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hosted_of(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., Hosted]]:
    """Make an embedded broker in this process, by its settings; it ends with the test."""
    from raw_mqtt import Hosted

    made: list[Hosted] = []

    def make(**settings: Any) -> Hosted:
        made.append(Hosted(tmp_path / f"broker{len(made)}", clock, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def hosted(hosted_of: Callable[..., Hosted]) -> Hosted:
    return hosted_of()


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def loop(log: io.StringIO, clock: Clock) -> Iterator[Loop]:
    """A loop whose clock may be put forward, in which nothing may break."""
    loop = Loop(Log("debug", "json", log), clock)
    yield loop
    loop.close()
    assert '"bug"' not in log.getvalue(), log.getvalue()


@pytest.fixture
def children(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Iterator[ChildProcesses]:
    """Children that end with the test, then without much time to tidy up."""
    children = ChildProcesses(loop)
    yield children
    monkeypatch.setattr("hive.SIGKILL_AFTER", 0.3)
    children.stop()
    run_until(loop, "all children have ended", lambda: not len(children))


def run_until(
    loop: Loop, what: str, check: Callable[[], object], patience: float = PATIENCE
) -> None:
    """Let a loop run until `check` gives something true, in real seconds."""
    until = time.monotonic() + patience
    while not check():
        assert time.monotonic() < until, f"never happened: {what}"
        tick = loop.after(0.01, lambda: None)
        loop.step()
        tick.cancel()


def fill_disk(database: Database) -> None:
    """Let the file take no page more, as on a full disk."""
    (pages,) = database.read("PRAGMA page_count")[0]
    database.read(f"PRAGMA max_page_count={pages}")


@pytest.fixture
def fast_agent(tmp_path: Path) -> Path:
    """A stand-in for the openclaw command that writes down how it was called."""
    script = tmp_path / "openclaw"
    script.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys, fcntl\n"
        f"with open({str(tmp_path / 'calls.jsonl')!r}, 'a') as file:\n"
        "    fcntl.flock(file, fcntl.LOCK_EX)\n"
        "    env = {k: v for k, v in os.environ.items() if k.startswith('OPENCLAW_')}\n"
        "    print(json.dumps({'argv': sys.argv[1:], 'env': env}), file=file)\n"
    )
    script.chmod(0o755)
    return script


def calls_of(agent: Path) -> list[dict[str, Any]]:
    """How the stand-in was called so far."""
    file = agent.parent / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def rig_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rig]]:
    """Make a node with these handlers (name: lines of sh); the last one is ended with the test."""
    from rig import Rig

    monkeypatch.setenv("HOME", str(tmp_path))  # no OpenClaw of this user is looked for
    made: list[Rig] = []

    def make(
        agents: Sequence[InstanceConfig] = (),
        settings: Mapping[str, HandlerConfig] | None = None,
        level: str = "debug",
        node: Mapping[str, Any] | None = None,
        heartbeat: HeartbeatConfig | None = None,
        schedule: Sequence[ScheduleConfig] = (),
        shared: JournalConfig | None = None,
        **handlers: str,
    ) -> Rig:
        handlers = {"ping": "echo pong", **handlers}
        given = (handlers, agents, settings or {}, level, heartbeat, schedule, shared)
        made.append(Rig(tmp_path, *given, **(node or {})))
        return made[-1]

    yield make
    for rig in made[-1:]:
        rig.end()


@pytest.fixture
def rig(rig_of: Callable[..., Rig]) -> Rig:
    """A node with a handler `ping` and no agent."""
    return rig_of()


@pytest.fixture
def commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Commands:
    """Commands of the node alpha, in this process; the daemon is a script."""
    from scripted import Commands

    return Commands(tmp_path, monkeypatch, capsys)


@pytest.fixture
def main_agent(fast_agent: Path) -> InstanceConfig:
    """An agent that is really called."""
    return InstanceConfig("main", openclaw_cmd=(str(fast_agent),))
