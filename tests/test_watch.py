"""Watch: the state of all nodes on a real terminal and in a pipe, and a line of progress."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyte
import pytest
from conftest import PATIENCE, Broker, Hive, eventually
from rig import Rig
from test_requests import Caller

import hive as module

ENTERED, LEFT = b"\033[?1049h", b"\033[?1049l"
COLOURS = re.compile(rb"\033\[\d*m")


class Terminal:
    """A command on a terminal of its own; what it shows is read when somebody looks."""

    def __init__(self, line: list[str], environment: dict[str, str], lines: int = 16) -> None:
        self._ours, self._theirs = pty.openpty()
        self.screen = pyte.Screen(80, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.resize(80, lines)
        self.modes, self.seen = termios.tcgetattr(self._theirs), b""
        self.process = subprocess.Popen(
            line,
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            env={"TERM": "xterm", **environment},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(lines, columns)
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self) -> str:
        """What is on the screen now."""
        while select.select([self._ours], [], [], 0)[0]:
            data = os.read(self._ours, 65536)
            self.seen += data
            self._stream.feed(data)
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def shows(self, *words: str) -> str:
        """Wait until it does."""
        try:
            eventually(f"it shows {words}", lambda: all(word in self.read() for word in words))
        except AssertionError as error:
            raise AssertionError(f"{error}; it shows:\n{self.read()}") from None
        return self.read()

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def ends(self) -> int:
        """Its exit code, once it is done and has given the terminal back."""
        code = self.process.wait(PATIENCE)
        self.read()
        assert termios.tcgetattr(self._theirs) == self.modes
        if ENTERED in self.seen:
            last = self.seen[self.seen.rindex(ENTERED) :]
            assert last.count(LEFT) == 1 and b"\033[?25h" in last and b"\033[?7h" in last
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)


@pytest.fixture
def terminal(hive: Hive) -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def run(node: str, *arguments: str, lines: int = 16, **environment: str) -> Terminal:
        line = hive.command_line(node, *arguments)
        made.append(Terminal(line, hive.environment | environment, lines))
        return made[-1]

    yield run
    for one in made:
        one.close()


# What the daemon says


def test_who_watches_is_told_once_of_what_is_news_until_it_asks_again(rig: Rig) -> None:
    caller = Caller(rig)
    rig.hear_state("alpha", retained=True, status="online", last_seen=1)
    assert caller.ask(do="watch")["states"]["alpha"]["status"] == "online"
    rig.hear_state("alpha", retained=True, status="online", last_seen=2, uptime_s=5, load_1m=1.0)
    assert caller.hears_nothing()
    rig.hear_state("alpha", status="degraded", reason="no journal on disk")
    assert caller.hear("changed")
    rig.hear_state("alpha", status="offline", reason="connection lost")
    assert caller.hears_nothing()
    assert caller.ask(do="watch")["states"]["alpha"]["reason"] == "connection lost"
    rig.beat("gamma")
    assert caller.hear("changed")
    assert not caller.ask(do="watch")["fault"]
    rig.disconnect()
    assert caller.hear("changed")
    assert caller.ask(do="watch")["fault"]
    caller.client.close()
    rig.turn()
    rig.connect()
    assert rig.works()


# What is shown


NOW = 1_800_000_000.0


def row(name: str, status: str, reason: str = "", **state: Any) -> dict[str, dict[str, Any]]:
    state = {"status": status, "last_seen": int(NOW) - 1, "load_1m": 0.5, "uptime_s": 90, **state}
    return {name: state | ({"reason": reason} if reason else {})}


def rows_of(*states: dict[str, dict[str, Any]]) -> list[module.StatusRow]:
    known = {name: state for one in states for name, state in one.items()}
    return module.status_rows(known, module.HeartbeatConfig(), NOW)


SEEN = int(NOW) - 240
LOST: dict[str, Any] = {"reason": "connection lost", "last_seen": SEEN}
AT = time.strftime("%H:%M", time.localtime(SEEN))


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ([], "no node yet"),
        ([row("a", "online"), row("b", "online")], "2 online"),
        (
            [row("a", "online"), row("b", "degraded", "x"), row("c", "offline", **LOST)],
            f"1 online, 1 degraded, 1 lost since {AT}: its connection died",
        ),
        (
            [row("a", "online"), row("b", "offline", **LOST), row("c", "offline", **LOST)],
            f"1 online, 2 lost, the last since {AT}",
        ),
        ([row("a", "offline", "stopped", last_seen=SEEN)], f"1 stopped since {AT}"),
        ([row("a", "online", last_seen=SEEN)], f"1 stale since {AT}"),
        ([row("a", "\x1b[2J")], "1 unknown"),
    ],
)
def test_the_summary_is_in_words(states: list[dict[str, Any]], said: str) -> None:
    assert module.status_words(rows_of(*states), NOW) == said


def test_a_screen_has_trouble_first_its_reason_below_and_no_line_too_many() -> None:
    rows = rows_of(
        row("alpha", "online", oc={"main": {"status": "ok"}}),
        row("beta", "degraded", "agent main: it sleeps", oc={"main": {"status": "down"}}),
        row("gamma", "offline", **LOST),
    )
    assert module.status_screen(rows, ["how it is"], "q leaves", 12, False) == [
        "how it is",
        "",
        "NAME   STATUS    SEEN    UPTIME  LOAD  AGENTS",
        "gamma  lost      4m ago  -       0.50",
        "  its connection died",
        "beta   degraded  1s ago  1m 30s  0.50  main down",
        "  agent main: it sleeps",
        "alpha  online    1s ago  1m 30s  0.50  main ok",
        "",
        "",
        "",
        "q leaves",
    ]
    small = module.status_screen(rows, ["how it is"], "q leaves", 7, True)
    assert len(small) == 7 and "and 4 lines more" in small[4]
    assert "\033[31mlost" in small[3]


def test_a_screen_follows_what_happens_and_is_left_as_it_was(
    hive: Hive, terminal: Callable[..., Terminal]
) -> None:
    alpha, beta = hive.node("alpha").start(), hive.node("beta").start()
    seen = terminal("alpha", "status", "--watch")
    shown = seen.shows("2 online", "NAME", "alpha ", "beta ", "q leaves")
    assert max(map(len, shown.splitlines())) <= 80
    began = time.monotonic()
    beta.stop(signal.SIGKILL)
    shown = seen.shows("1 online, 1 lost since ", "\n  its connection died\n")
    assert time.monotonic() - began < 2
    assert shown.index("beta ") < shown.index("alpha ")
    seen.resize(100, 9)
    os.kill(seen.process.pid, signal.SIGWINCH)
    assert len(seen.shows("q leaves").splitlines()) == 9
    alpha.stop(signal.SIGKILL)
    seen.shows("as of ", "the daemon of alpha: it has ended; waiting for it", "beta ")
    alpha.start()
    eventually("all is well", lambda: "the daemon of" not in seen.read())
    beta.start()
    seen.shows("2 online")
    seen.type(b"xq")
    assert seen.ends() == 0
    assert COLOURS.search(seen.seen)


def test_a_screen_says_that_the_broker_is_away_and_keeps_what_was_known(
    hive_of: Callable[..., Hive], own_broker: Broker
) -> None:
    hive = hive_of(own_broker)
    hive.node("alpha").start()
    environment = hive.environment | {"NO_COLOR": "1"}
    seen = Terminal(hive.command_line("alpha", "status", "-w"), environment)
    try:
        seen.shows("1 online", "alpha ")
        own_broker.stop()
        seen.shows("as of ", "1 online", f"broker localhost:{own_broker.port}: ", "alpha ")
        own_broker.start()
        eventually("it is back", lambda: "as of" not in seen.read())
        seen.process.send_signal(signal.SIGTERM)
        assert seen.ends() == 128 + signal.SIGTERM
        assert not COLOURS.search(seen.seen)
    finally:
        seen.close()


@pytest.mark.parametrize(("keys", "code"), [(b"\x03", 130), (b"\x1a", None), (b"q", 0)])
def test_where_no_daemon_runs_it_waits_for_one(
    hive: Hive, terminal: Callable[..., Terminal], keys: bytes, code: int | None
) -> None:
    hive.node("alpha")
    seen = terminal("alpha", "status", "--watch")
    seen.shows("no daemon of alpha runs on this machine (hive daemon); waiting for it")
    seen.type(keys)
    if code is None:  # Ctrl-Z, and fg
        _, status = os.waitpid(seen.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        seen.read()
        assert seen.seen.endswith(LEFT)
        seen.process.send_signal(signal.SIGCONT)
        eventually("it is there again", lambda: seen.read() and seen.seen.count(ENTERED) == 2)
        seen.type(b"q")
        code = 0
    assert seen.ends() == code


@contextlib.contextmanager
def at_the_door(hive: Hive, name: str, answer: dict[str, Any]) -> Iterator[None]:
    """Answer whoever comes to a node's door, as no daemon of this version would."""
    folder = hive.node(name).home / "state"
    folder.mkdir(mode=0o700)

    def serve() -> None:
        with contextlib.suppress(OSError):
            visitor, _ = listener.accept()
            with visitor:
                visitor.recv(1000)
                visitor.sendall(json.dumps(answer).encode() + b"\n")
                visitor.recv(1000)

    with socket.socket(socket.AF_UNIX) as listener:
        with contextlib.chdir(folder):
            listener.bind("door")
        listener.listen()
        serving = threading.Thread(target=serve)
        serving.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        serving.join(PATIENCE)


def test_an_error_is_said_on_the_screen_that_was_there_before(
    hive: Hive, terminal: Callable[..., Terminal]
) -> None:
    """As a daemon of before would: it has no such request."""
    with at_the_door(hive, "alpha", {"error": "no such request: 'watch'"}):
        seen = terminal("alpha", "status", "--watch")
        assert seen.ends() == 1
    said = "hive: the daemon of alpha: no such request: 'watch'; is it of another version?"
    after = seen.seen[seen.seen.index(LEFT) :].decode()
    assert said in " ".join(after.split())


def lines_of(process: subprocess.Popen[str], file: Path, *words: str) -> list[str]:
    """Wait for lines with these words; what each line says, without its time."""

    def found() -> bool:
        assert process.poll() is None
        return all(word in file.read_text() for word in words)

    eventually(f"{words} in {file}", found)
    return [line[15:] for line in file.read_text().splitlines()]


def test_in_a_pipe_each_change_is_a_line(hive: Hive, tmp_path: Path) -> None:
    alpha, beta = hive.node("alpha").start(), hive.node("beta").start()
    file = tmp_path / "lines"
    with file.open("w") as out:
        line = hive.command_line("alpha", "status", "--watch")
        watching = subprocess.Popen(line, stdout=out, env=hive.environment, text=True)
    lines_of(watching, file, "beta: online")
    beta.stop()
    lines_of(watching, file, "beta: stopped")
    alpha.stop()
    lines_of(watching, file, "it has ended; waiting for it")
    alpha.start()
    there = "the daemon of alpha is there, and the broker"
    eventually("again", lambda: file.read_text().count(there) == 2)
    watching.send_signal(signal.SIGTERM)
    assert watching.wait(PATIENCE) == 128 + signal.SIGTERM
    said = [line[15:] for line in file.read_text().splitlines()]
    assert {*said[:3]} == {there, "alpha: online", "beta: online"}
    ended = "the daemon of alpha: it has ended; waiting for it"
    assert said[3:] == ["beta: stopped", ended, there]
    assert "\033" not in file.read_text()


def test_watch_goes_with_nothing_that_ends(hive: Hive) -> None:
    hive.node("alpha")
    said = "hive: status: --watch goes with neither --check, --direct nor --json\n"
    for other in ("--check", "--direct", "--json"):
        assert hive.cli("alpha", "status", "--watch", other, code=2).stderr == said


# Progress


def test_a_long_wait_has_a_line_that_goes_with_it(
    hive: Hive, terminal: Callable[..., Terminal]
) -> None:
    alpha = hive.node("alpha")
    alpha.handler("slow", "#!/bin/sh\nwhile [ ! -e gate ]; do sleep 0.05; done; echo done\n")
    alpha.start()
    send = ["send", "--to", "alpha", "--action", "slow", "--text", "x", "--wait", "30"]
    seen = terminal("alpha", *send)
    assert seen.shows("alpha, 1s") == "waiting for alpha, 1s"
    (alpha.handlers / "gate").touch()
    assert seen.ends() == 0
    assert seen.read() == "done"
    (alpha.handlers / "gate").unlink()
    silent = hive.cli("alpha", *send[:-1], "1.5", code=4)
    assert silent.stdout == "" and silent.stderr.startswith("hive: no answer from alpha in 1.5 s")


def test_what_is_quick_or_told_to_be_simple_shows_none(
    hive: Hive, terminal: Callable[..., Terminal]
) -> None:
    alpha = hive.node("alpha").start()
    alpha.handler("ping", "#!/bin/sh\nsleep 1.2\necho pong\n")
    send = ["send", "--to", "alpha", "--action", "ping", "--text", "x", "--wait", "30"]
    seen = terminal("alpha", *send, TERM="dumb")
    assert seen.ends() == 0
    assert seen.seen == b"pong\r\n"


def test_a_progress_that_is_hidden_leaves_the_line_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(module.Progress, "_write", staticmethod(said.append))
    progress = module.Progress("waiting")
    with progress.hidden():
        progress._draw()
        assert said == []
    progress._draw()
    with progress.hidden():
        assert said == ["waiting, 0s", ""]


# What is looked at, and when


class FakeTime:
    """The module `time`, whose clocks stand still until they are told to go on."""

    def __init__(self) -> None:
        self.passed = 0.0

    def monotonic(self) -> float:
        return 1000.0 + self.passed

    def time(self) -> float:
        return NOW + self.passed

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(module, "time", fake)
    return fake


class Told:
    """A daemon's side of the control socket, which answers what the test says."""

    def __init__(self) -> None:
        self.answers: dict[str, dict[str, Any]] = {"roster": {"rosters": {}}}
        self.events: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.ended = self.closed = False

    def states(self, *states: dict[str, dict[str, Any]], fault: str = "", **more: Any) -> None:
        known = {name: state for one in states for name, state in one.items()}
        said = {"states": known, "fault": fault, "broker": "broker.lan", "complete": True}
        self.answers["watch"] = {**said, **more}

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.ended:
            raise module.DaemonError("the daemon of alpha: it has ended")
        self.asked.append(request["do"])
        return self.answers[request["do"]]

    def receive(self, within: float) -> dict[str, Any] | None:
        assert within == 0.0
        if self.ended:
            raise module.DaemonError("the daemon of alpha: it has ended")
        return self.events.pop(0) if self.events else None

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    daemon = Told()
    monkeypatch.setattr(module, "connect_to_daemon", lambda config: daemon)
    return daemon


def feed_of(interval: float = 5.0, *which: str, tag: str | None = None) -> module.StatusFeed:
    config = module.Config(
        module.NodeConfig(id="alpha"), heartbeat=module.HeartbeatConfig(interval=interval)
    )
    return module.StatusFeed(config, which, tag)


def test_without_a_daemon_it_looks_each_second(
    now: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "connect_to_daemon", lambda config: None)
    feed = feed_of()
    assert feed.due == 0.0  # at once
    feed.look()
    none = "no daemon of alpha runs on this machine (hive daemon); waiting for it"
    assert (feed.due, feed.fault, feed.rows) == (1001.0, none, [])
    feed.fault = "it has ended"  # why is known already
    feed.look()
    feed.hear()
    feed.close()
    assert feed.fault == "it has ended"


@pytest.mark.parametrize(("interval", "due"), [(5.0, 1006.0), (29.0, 1030.0), (31.0, 1031.0)])
def test_with_one_it_looks_when_there_is_news_and_now_and_then(
    now: FakeTime, told: Told, interval: float, due: float
) -> None:
    told.states(row("alpha", "online"), row("main", "online", daemon_node="alpha"))
    feed = feed_of(interval)
    feed.look()
    assert ([row.name for row in feed.rows], told.asked) == (["alpha"], ["watch"])
    assert (feed.broker, feed.fault, feed.at, feed.due) == ("broker.lan", "", NOW, due)
    told.events = [{"changed": True}] * 2
    now.passed = 2.0
    feed.hear()
    assert feed.due == 1002.2 and not told.events
    told.events, now.passed = [{"changed": True}], 2.1
    feed.hear()
    assert feed.due == 1002.2  # what was due before stays due
    told.events = [{"changed": True}]
    feed.look()  # news that came while it asked
    assert feed.due == pytest.approx(1002.3)
    feed.close()
    assert told.closed


def test_a_broker_that_stops_changes_nothing_of_what_was_known(now: FakeTime, told: Told) -> None:
    told.states(row("alpha", "online"))
    feed = feed_of()
    feed.look()
    now.passed = 60.0
    told.states(row("alpha", "offline"), row("beta", "offline"), fault="gone", complete=False)
    feed.look()
    assert [(one.name, one.status) for one in feed.rows] == [("alpha", "online")]
    assert (feed.fault, feed.at) == ("gone", NOW)
    told.states(row("beta", "online"))
    feed.look()
    assert ([one.name for one in feed.rows], feed.fault, feed.at) == (["beta"], "", NOW + 60)


@pytest.mark.parametrize(
    ("which", "tag", "shown"),
    [(("b*",), None, ["beta", "bravo"]), ((), "gpu", ["beta"]), (("a*",), "gpu", None)],
)
def test_those_alone_are_looked_at_that_were_named(
    now: FakeTime, told: Told, which: tuple[str, ...], tag: str | None, shown: list[str] | None
) -> None:
    told.answers["roster"] = {"rosters": {"beta": {"tags": ["gpu"]}}}
    told.states()
    feed = feed_of(5.0, *which, tag=tag)
    feed.look()  # nobody is known yet: no fault
    told.states(row("alpha", "online"), row("beta", "online"), row("bravo", "online"))
    if shown is None:
        with pytest.raises(module.HiveError, match="no node with the tag gpu is called like a"):
            feed.look()
    else:
        feed.look()
        assert [one.name for one in feed.rows] == shown
    assert told.asked == ["watch", "roster"] * 2


def test_a_daemon_may_end_and_come_back(now: FakeTime, told: Told) -> None:
    told.states(row("alpha", "online"))
    feed = feed_of()
    for lose in (feed.hear, feed.look):
        feed.look()
        assert feed.fault == "" and feed.control
        told.ended, told.closed, now.passed = True, False, now.passed + 10
        lose()
        assert feed.fault == "the daemon of alpha: it has ended; waiting for it"
        assert feed.control is None and told.closed and len(feed.rows) == 1
        told.ended = False
    assert feed.due == now.monotonic() + 1.0


def test_a_daemon_that_knows_no_such_request_is_named(told: Told) -> None:
    told.answers["watch"] = {"error": "no such request: 'watch'"}
    with pytest.raises(module.HiveError) as raised:
        feed_of().look()
    why = "the daemon of alpha: no such request: 'watch'; is it of another version?"
    assert str(raised.value) == why


@pytest.fixture
def watching(told: Told, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Watch in this process, whose signals are as they were afterwards."""
    ours, theirs = socket.socketpair()
    told.fileno, told.say = ours.fileno, theirs.sendall  # type: ignore[attr-defined]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    config = module.Config(module.NodeConfig(id="alpha"))
    with ours, theirs:
        yield lambda: module.watch_status(config, False, (), None)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it(told: Told, watching: Callable[[], None], number: int) -> None:
    def ask(request: dict[str, Any]) -> dict[str, Any]:
        signal.raise_signal(number)
        return {}

    told.ask = ask  # type: ignore[method-assign]
    with pytest.raises(SystemExit) as ended:
        watching()
    assert ended.value.code == 128 + number
    assert told.closed


def test_it_looks_again_as_soon_as_there_is_news(
    told: Told, watching: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    answer, looks = told.ask, list[float]()

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        looks.append(time.monotonic())
        told.states(row("alpha", ["online", "degraded"][len(looks) - 1]))
        told.say(b"x")  # type: ignore[attr-defined]
        if len(looks) == 2:
            told.answers["watch"] = {"error": "enough"}
        return answer(request)

    told.ask = ask  # type: ignore[method-assign]
    news = iter([None, {"changed": True}])  # after the look
    told.receive = lambda within: next(news, None)  # type: ignore[method-assign]
    with pytest.raises(module.HiveError, match="enough"):
        watching()
    assert 0.2 <= looks[1] - looks[0] < 5.0
    assert [line[15:22] for line in capsys.readouterr().out.splitlines()] == ["the dae", "alpha: "]


# How it is shown


def test_a_line_is_written_for_each_change_and_no_other(
    now: FakeTime, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    feed, lines = feed_of(), module.StatusLines()

    def shown(*states: dict[str, Any], **more: Any) -> list[str]:
        told.states(*states, **more)
        feed.look()
        lines.show(feed)
        said = capsys.readouterr().out.splitlines()
        assert all(one.startswith(f"{module.clock_time(now.time())} ") for one in said)
        return [one[15:] for one in said]

    beta = row("beta", "degraded", "agent main: it sleeps")
    there = "the daemon of alpha is there, and the broker"
    first = [there, "beta: degraded: agent main: it sleeps", "alpha: online"]
    assert shown(row("alpha", "online"), beta) == first
    assert shown(row("alpha", "online"), beta) == []
    old = row("beta", "degraded", "agent main: it sleeps", last_seen=SEEN)
    assert shown(row("alpha", "online"), old) == ["beta: stale"]
    assert shown(row("alpha", "online"), fault="gone") == ["gone", "beta: forgotten"]
    assert shown(row("alpha", "online")) == [there]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What a feed looks like on a terminal of this size, line by line."""
    written: list[str] = []
    monkeypatch.setattr(module.StatusScreen, "_write", staticmethod(written.append))

    def show(
        feed: module.StatusFeed, size: tuple[int, int] | None, colour: bool = False
    ) -> list[str]:
        def size_of(descriptor: int) -> tuple[int, int]:
            if size is None:
                raise OSError
            return size

        monkeypatch.setattr(os, "get_terminal_size", size_of)
        monkeypatch.setattr("sys.stdout", SimpleNamespace(fileno=lambda: 1))
        module.StatusScreen(colour).show(feed)
        said = written.pop()
        monkeypatch.undo()
        monkeypatch.setattr(module.StatusScreen, "_write", staticmethod(written.append))
        assert said.startswith("\033[H\033[K") and said.endswith("\033[J")
        return said[6:-3].split("\r\n\033[K")

    return show


def test_a_screen_is_as_large_as_the_terminal_and_80_by_24_if_that_is_not_known(
    told: Told, screen: Callable[..., list[str]]
) -> None:
    told.states(row("a" * 63, "online", oc={"m" * 40: {"status": "ok"}}))
    feed = feed_of()
    feed.look()
    for size, columns, lines in (((100, 9), 100, 9), (None, 80, 24), ((0, 0), 80, 24)):
        shown = screen(feed, size)
        assert (max(map(len, shown)), len(shown)) == (columns, lines)
    assert max(map(len, screen(feed, (60, 9), colour=True))) > 60  # the terminal cuts colours


def test_a_screen_says_as_of_when_it_is_and_goes_on_counting(
    told: Told, screen: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeTime()
    feed = feed_of()

    def shown(passed: float) -> list[str]:
        clock.passed = passed
        monkeypatch.setattr(module, "time", clock)
        return screen(feed, (80, 24))

    monkeypatch.setattr(module, "time", clock)
    told.states(row("alpha", "online", last_seen=int(NOW) - 10), row("beta", "odd", last_seen=0))
    feed.look()
    head, _, _, *lines = shown(0.0)
    assert head == "1 unknown, 1 online" and " 10s ago " in lines[1] and "- " in lines[0]
    assert lines[-1].endswith("  alpha at broker.lan  q leaves")
    feed.fault = "the broker " + "is away " * 20
    head, *lines = shown(50.0)
    assert head == f"as of {module.short_time(NOW, NOW)}: 1 unknown, 1 online"
    assert [len(line) <= 80 for line in lines] == [True] * 23
    assert " ".join(lines[:3]).startswith(feed.fault.strip())
    assert " 1m ago " in "".join(lines)
    feed.rows = []
    assert shown(50.0)[0] == "no node yet"


@pytest.mark.parametrize(
    ("typed", "leaves"), [(b"q", True), (b"xQy", True), (b"x", False), (b"", False)]
)
def test_q_leaves_and_whoever_has_gone_types_no_more(typed: bytes, leaves: bool) -> None:
    reader, writer = os.pipe()
    screen = module.StatusScreen(False)
    screen.keys = [reader]
    os.write(writer, typed)
    os.close(writer)
    assert screen.leaves() is leaves
    assert screen.keys == ([reader] if typed else [])
    os.close(reader)


def test_a_terminal_is_given_back_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    with os.fdopen(theirs) as keyboard:
        monkeypatch.setattr("sys.stdin", keyboard)
        screen = module.StatusScreen(False)
        assert screen.keys == [theirs]
        screen.open()
        during = termios.tcgetattr(theirs)
        assert during[3] == before[3] & ~(termios.ICANON | termios.ECHO)
        assert during[:3] == before[:3] and during[4:6] == before[4:6]
        assert capsys.readouterr().out == "\033[?1049h\033[?25l\033[?7l"
        screen.close()
        assert termios.tcgetattr(theirs) == before
        assert capsys.readouterr().out == "\033[?7h\033[?25h\033[?1049l"
        os.close(ours)
        screen.close()  # it has gone: nothing to mend


def test_a_screen_without_a_keyboard_is_left_by_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    screen = module.StatusScreen(False)
    assert screen.keys == []
    screen.open()
    screen.close()


@pytest.mark.parametrize(
    ("terminal", "term", "shown"),
    [(True, "xterm", True), (True, "", True), (True, "dumb", False), (False, "xterm", False)],
)
def test_lines_are_taken_back_only_where_they_can(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, term: str, shown: bool
) -> None:
    monkeypatch.setenv("TERM", term)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    assert module.is_terminal(stream) is shown


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, ...]]:
    """How the timer of a line of progress was set, on a terminal of 30 columns."""
    found: list[tuple[float, ...]] = []
    monkeypatch.setattr(module, "is_terminal", lambda stream: True)
    monkeypatch.setattr(signal, "setitimer", lambda which, *seconds: found.append(seconds))
    monkeypatch.setenv("COLUMNS", "30")
    return found


def test_progress_is_drawn_each_second_from_the_second_one_on_and_taken_back(
    now: FakeTime, timers: list[tuple[float, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(module.Progress, "_write", staticmethod(said.append))
    before = signal.getsignal(signal.SIGALRM)
    try:
        with module.Progress("waiting") as progress:
            assert timers == [(1.0, 1.0)]
            now.passed = 61.0
            signal.raise_signal(signal.SIGALRM)
            progress.check("the broker of this hive")
            progress._draw()
            monkeypatch.setenv("COLUMNS", "10")
            progress._draw()
            for _ in range(2):
                with progress.hidden():
                    progress._draw()
            progress._draw()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert timers == [(1.0, 1.0), (0.0,)]
    long, narrow = "checking the broker of this …", "checking the broker…"
    assert said == ["waiting, 1m 1s", long, narrow, "", narrow, ""]


def test_progress_that_was_never_drawn_takes_nothing_back(
    timers: list[tuple[float, ...]], capfd: pytest.CaptureFixture[str]
) -> None:
    with module.Progress("waiting"):
        pass
    assert capfd.readouterr().err == ""
    module.Progress._write("x")
    assert capfd.readouterr().err == "\rx\033[K"


def test_where_there_is_no_terminal_there_is_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_terminal", lambda stream: False)
    monkeypatch.setattr(signal, "setitimer", lambda *how: pytest.fail("a timer was set"))
    with module.Progress("waiting"):
        pass
