"""Control: a real socket between a node's command line and its daemon."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE
from test_node import Rig

import hive


class RawCommand:
    """A command that speaks raw bytes."""

    def __init__(self, host: Host) -> None:
        self.host, self.shut = host, False
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.sock.connect(str(host.file))
        self._in = b""

    def say(self, said: bytes) -> None:
        """Say it, however much it is; the other side may hang up meanwhile."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while said:
                with contextlib.suppress(BlockingIOError):
                    said = said[self.sock.send(said) :]
                self.host.turn()

    def heard(self) -> list[Any]:
        """All answers that have come so far."""
        self.host.turn()
        with contextlib.suppress(BlockingIOError):
            try:
                data = self.sock.recv(1 << 20)
            except ConnectionResetError:
                data = b""
            self._in += data
            self.shut |= not data
        return [json.loads(line) for line in self._in.split(b"\n")[:-1]]


class Host:
    """A control socket that answers with what it was asked, and the loop that turns it."""

    def __init__(self, file: Path) -> None:
        self.log, self.file = io.StringIO(), file
        self.left: list[str] = []
        self.waiting: list[hive.ControlConnection] = []  # who asked for an answer later
        self.commands: list[RawCommand] = []
        self.loop = hive.Loop(hive.Log("debug", "json", self.log))
        self.server: hive.ControlServer | None = None

    def open(self) -> Host:
        self.server = hive.ControlServer(self.loop, self.file, self.answer)
        return self

    def answer(
        self, request: dict[str, Any], connection: hive.ControlConnection
    ) -> dict[str, Any] | None:
        if request.get("later"):
            self.waiting.append(connection)
            return None
        if "name" in request:
            connection.on_close.append(lambda: self.left.append(request["name"]))
        return {"asked": request}

    def command(self) -> RawCommand:
        self.commands.append(RawCommand(self))
        self.turn()
        return self.commands[-1]

    @property
    def inside(self) -> set[hive.ControlConnection]:
        assert self.server
        return self.server.connections

    def turn(self) -> None:
        for _ in range(3):
            self.loop.post(lambda: None)
            self.loop.step()

    def until(self, what: str, check: Callable[[], object]) -> None:
        until = time.monotonic() + PATIENCE
        while not check():
            assert time.monotonic() < until, f"never happened: {what}"
            self.turn()

    def end(self) -> None:
        if self.server:
            self.server.close()
        for command in self.commands:
            command.sock.close()
        self.loop.close()
        assert '"bug"' not in self.log.getvalue(), self.log.getvalue()


@pytest.fixture
def host_of() -> Iterator[Callable[[Path], Host]]:
    made: list[Host] = []

    def make(file: Path) -> Host:
        made.append(Host(file))
        return made[-1].open()

    yield make
    for host in made:
        host.end()


@pytest.fixture
def host(tmp_path: Path, host_of: Callable[[Path], Host]) -> Host:
    return host_of(tmp_path / "state" / "door")


LONG = b'{"a": "' + b"x" * 1_000_000 + b'"}\n'


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ([b'{"a": 1}\n'], [{"a": 1}]),
        ([b'{"a": 1}\n{"b": 2}\n{"c": 3}\n'], [{"a": 1}, {"b": 2}, {"c": 3}]),
        ([b'{"a', b'": ', b"1}", b"\n"], [{"a": 1}]),
        ([b'{"a": 1}\n{"b"', b": 2}\n"], [{"a": 1}, {"b": 2}]),
        ([b'{"a": "\xc3', b'\xa4"}\n'], [{"a": "ä"}]),
        ([b"\n\n"], [{}, {}]),
        ([b'7\n"x"\nnull\n[1]\n{"a"\n\xff\xfe\0\n'], [{}] * 6),
        ([b"[" * 100_000 + b"\n"], [{}]),
        ([LONG], [json.loads(LONG)]),
    ],
    ids=range(9),
)
def test_every_line_is_answered_once_it_is_whole(
    host: Host, said: list[bytes], asked: list[dict[str, Any]]
) -> None:
    command = host.command()
    for part in said:
        assert len(command.heard()) < len(asked)
        command.say(part)
    host.until("all is answered", lambda: len(command.heard()) >= len(asked))
    assert command.heard() == [{"asked": request} for request in asked]
    assert not command.shut


def test_a_command_that_speaks_slowly_delays_nobody(host: Host) -> None:
    slow, quick = host.command(), host.command()
    slow.say(b'{"a": ')
    quick.say(b'{"b": 2}\n')
    host.until("an answer", quick.heard)
    assert slow.heard() == []
    slow.say(b"1}\n")
    host.until("the other answer", slow.heard)


def test_a_line_without_end_ends_the_connection(host: Host) -> None:
    command = host.command()
    command.say(b"x" * (hive.MAX_LINE + hive.PIPE_CHUNK))
    host.until("it is cut off", lambda: command.heard() or command.shut)
    assert command.heard() == [] and command.shut
    again = host.command()
    again.say(b"{}\n")
    host.until("the next one is served", again.heard)


@pytest.mark.parametrize("last", [b"", b'{"half', b'{"name": "b"}\n'])
def test_what_is_to_be_done_when_a_command_goes_is_done_once(host: Host, last: bytes) -> None:
    command, other = host.command(), host.command()
    command.say(b'{"name": "a"}\n')
    other.say(b'{"name": "other"}\n')
    host.until("an answer", command.heard)
    assert host.left == []
    command.say(last)
    command.sock.close()
    host.until("it has gone", lambda: host.left)
    host.turn()
    assert host.left == (["a", "b"] if b"name" in last else ["a"])


def test_commands_that_are_there_when_the_server_closes_go(host: Host) -> None:
    command = host.command()
    command.say(b'{"name": "a"}\n')
    host.until("an answer", command.heard)
    assert host.server
    host.server.close()
    assert host.left == ["a"] and not host.file.exists()
    with pytest.raises(FileNotFoundError):
        hive.ControlClient(host.file)


def test_a_crowd_is_served_up_to_a_bound_and_again_when_some_have_gone(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_CONTROL_CONNECTIONS", 20)
    crowd = [host.command() for _ in range(30)]
    for command in crowd:
        command.say(b"{}\n")
    host.until("the first are served", lambda: all(command.heard() for command in crowd[:20]))
    host.until("the others are turned away", lambda: all(v.heard() or v.shut for v in crowd[20:]))
    assert [command.heard() for command in crowd[20:]] == [[]] * 10
    for command in crowd[:10]:
        command.sock.close()
    host.turn()
    late = host.command()
    late.say(b"{}\n")
    host.until("there is room again", late.heard)


# Something said later


def test_an_answer_may_come_later_and_more_than_one(host: Host) -> None:
    command, other = host.command(), host.command()
    command.say(b'{"later": 1}\n{"b": 2}\n')
    other.say(b'{"later": 1}\n')
    host.until("the second request is answered", command.heard)
    assert command.heard() == [{"asked": {"b": 2}}]
    first, second = host.waiting
    for said in ({"n": 1}, {"n": 2, "text": "ä \u2028\n"}):
        first.send(said)
    host.until("both are heard", lambda: len(command.heard()) == 3)
    assert command.heard()[1:] == [{"n": 1}, {"n": 2, "text": "ä \u2028\n"}]
    assert other.heard() == []
    second.send({"n": 3})
    host.until("the other hears", other.heard)


def test_to_say_something_to_one_who_has_gone_harms_nobody(host: Host) -> None:
    command = host.command()
    command.say(b'{"later": 1}\n{"name": "a"}\n')
    host.until("it has come in", lambda: host.waiting)
    (connection,) = host.waiting
    command.sock.close()
    connection.send({"n": 1})  # before the server knows
    host.until("it has gone", lambda: host.left)
    connection.send({"n": 2})
    connection.close()
    host.turn()
    assert host.left == ["a"] and not host.inside


def test_a_command_that_does_not_read_is_busy_and_dropped_in_the_end(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_UNREAD", 1_000_000)
    deaf, other = host.command(), host.command()
    deaf.say(b'{"later": 1}\n{"name": "deaf"}\n')
    host.until("it has come in", lambda: host.waiting)
    (connection,) = host.waiting
    assert not connection.busy
    for n in range(100):
        connection.send({"n": n, "text": "x" * 100_000})
        if n == 3:
            assert connection.busy and connection in host.inside
    host.turn()
    assert host.left == ["deaf"] and connection not in host.inside
    other.say(b"{}\n")
    host.until("the other is served", other.heard)


def test_a_command_that_reads_slowly_gets_everything(host: Host) -> None:
    command = host.command()
    command.say(b'{"later": 1}\n')
    host.until("it has come in", lambda: host.waiting)
    (connection,) = host.waiting
    for n in range(30):
        connection.send({"n": n, "text": "x" * 100_000})
    assert connection.busy
    host.until("all is read", lambda: len(command.heard()) == 30)
    assert [said["n"] for said in command.heard()] == [*range(30)]
    host.until("nothing is left", lambda: not connection.busy)


def test_a_command_that_asks_and_asks_and_never_reads_is_dropped(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_LINE", 1_000_000)  # of what it asked and did not hear yet
    command = host.command()
    host.until("it is in", lambda: host.inside)
    for _ in range(40):
        command.say(LONG[:100_000] + b'"}\n')
        if not host.inside:
            break
    assert not host.inside
    again = host.command()
    again.say(b"{}\n")
    host.until("the next one is served", again.heard)


def test_a_hundred_commands_at_once_each_hear_their_own(host: Host) -> None:
    crowd = [host.command() for _ in range(hive.MAX_CONTROL_CONNECTIONS)]
    for i, command in enumerate(crowd):
        command.say(b'{"later": 1}\n{"i": %d' % i)
    host.until("all are in", lambda: len(host.waiting) == len(crowd))
    for connection in host.waiting:
        connection.send({"for": "you"})
    for command in crowd:
        command.say(b"}\n")
    host.until("all have heard", lambda: all(len(command.heard()) == 2 for command in crowd))
    assert [command.heard()[1] for command in crowd] == [
        {"asked": {"i": i}} for i in range(len(crowd))
    ]
    assert [command.heard()[0] for command in crowd] == [{"for": "you"}] * len(crowd)


def test_two_hundred_commands_in_a_row_leave_nothing_behind(host: Host) -> None:
    def command() -> None:
        one = host.command()
        one.say(b"{}\n")
        host.until("an answer", one.heard)
        host.commands.remove(one)
        one.sock.close()
        host.turn()

    command()
    before = len(os.listdir("/dev/fd"))
    for _ in range(200):
        command()
    assert len(os.listdir("/dev/fd")) == before
    assert host.server and not host.server.connections


def test_only_this_user_can_open_it(tmp_path: Path, host_of: Callable[[Path], Host]) -> None:
    before = os.umask(0)
    try:
        host = host_of(tmp_path / "a" / "state" / "door")
        assert os.umask(0) == 0, "the umask is as it was"
    finally:
        os.umask(before)
    assert stat.S_IMODE(host.file.stat().st_mode) == 0o600
    assert stat.S_IMODE(host.file.parent.stat().st_mode) == 0o700


def test_what_a_killed_daemon_left_is_replaced(
    tmp_path: Path, host_of: Callable[[Path], Host]
) -> None:
    file = tmp_path / "door"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(file))
    with pytest.raises(ConnectionRefusedError):
        hive.ControlClient(file)
    command = host_of(file).command()
    command.say(b"{}\n")
    command.host.until("an answer", command.heard)


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    host, file = Host(tmp_path / "other"), tmp_path / "door"
    file.write_text("x")
    with pytest.raises(FileExistsError, match="is no socket, and is left alone"):
        hive.ControlServer(host.loop, file, host.answer)
    assert file.read_text() == "x"
    host.end()


def config_for(state_dir: Path) -> hive.Config:
    return hive.Config(hive.NodeConfig("beta", state_dir=state_dir))


def test_the_socket_is_in_the_state_directory_unless_that_path_is_too_long(tmp_path: Path) -> None:
    assert hive.control_socket_path(config_for(Path("/state"))) == Path("/state/door")
    fits = "/" + "x" * (hive.MAX_SOCKET_PATH - len("//door"))
    assert hive.control_socket_path(config_for(Path(fits))) == Path(f"{fits}/door")
    far = [hive.control_socket_path(config_for(Path(fits + more))) for more in ("x", "y", "ä", "x")]
    assert far[0] == far[3] and len(set(far)) == 3
    for path in far:
        assert len(os.fsencode(path)) <= hive.MAX_SOCKET_PATH
        assert str(os.geteuid()) in str(path)


def test_a_socket_with_a_long_path_opens_all_the_same(
    tmp_path: Path, host_of: Callable[[Path], Host]
) -> None:
    config = config_for(tmp_path / ("x" * 200))
    file = hive.control_socket_path(config)
    made = not file.parent.exists()
    try:
        command = host_of(file).command()
        assert not file.parent.stat().st_mode & 0o077
        command.say(b"{}\n")
        command.host.until("an answer", command.heard)
        knock = hive.connect_to_daemon(config)
        assert knock
        knock.close()
        command.host.end()
    finally:
        file.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):
                file.parent.rmdir()


@pytest.mark.parametrize("mode", [0o777, 0o722, 0o1777])
def test_a_directory_that_others_may_write_is_refused_on_both_sides(
    tmp_path: Path, host_of: Callable[[Path], Host], mode: int
) -> None:
    folder = tmp_path / "state"
    host = host_of(folder / "door")
    knock = hive.connect_to_daemon(config_for(folder))
    assert knock
    knock.close()
    folder.chmod(mode)
    assert hive.connect_to_daemon(config_for(folder)) is None
    with pytest.raises(PermissionError, match="writable by"):
        hive.ControlServer(host.loop, folder / "other", host.answer)
    assert not (folder / "other").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused_on_both_sides(
    tmp_path: Path, host_of: Callable[[Path], Host]
) -> None:
    folder = tmp_path / "state"
    host = host_of(folder / "door")
    os.chown(folder, 12345, 12345)
    assert hive.connect_to_daemon(config_for(folder)) is None
    with pytest.raises(PermissionError, match="another user"):
        hive.ControlServer(host.loop, folder / "other", host.answer)


@pytest.mark.parametrize("there", ["nothing", "a file", "a stale socket", "no such folder"])
def test_without_a_daemon_nobody_opens(tmp_path: Path, there: str) -> None:
    file = tmp_path / "door"
    if there == "a file":
        file.touch()
    elif there == "a stale socket":
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(file))
    elif there == "no such folder":
        file = tmp_path / "missing" / "door"
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(OSError):
        hive.ControlClient(file)
    assert hive.connect_to_daemon(config_for(file.parent)) is None
    with pytest.raises(hive.HiveError, match="no daemon of beta runs on this machine"):
        hive.ask_daemon(config_for(file.parent), {"do": "message", "id": "m-1"})
    assert len(os.listdir("/dev/fd")) == before


def test_a_daemon_that_hangs_is_an_error_and_not_a_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "CONTROL_TIMEOUT", 0.05)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "door"))
        deaf.listen()
        with pytest.raises(hive.HiveError, match="the daemon of beta: it does not answer"):
            hive.ask_daemon(config_for(tmp_path), {"do": "message", "id": "m-1"})


# The command's side


class Daemon:
    """A listener that says what the test says."""

    def __init__(self, file: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(file))
        self._listener.listen()
        self.knock = hive.ControlClient(file)
        self.sock, _ = self._listener.accept()

    def close(self) -> None:
        self.knock.close()
        self.sock.close()
        self._listener.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    one = Daemon(tmp_path / "door")
    yield one
    one.close()


def test_a_command_hears_line_by_line_however_they_come(daemon: Daemon) -> None:
    daemon.sock.sendall(b'{"n": 1}\n{"n": 2}\n{"n"')
    assert [daemon.knock.hear(5), daemon.knock.hear(5)] == [{"n": 1}, {"n": 2}]
    assert daemon.knock.hear(0.01) is None
    daemon.sock.sendall(b": 3}\n")
    assert daemon.knock.hear(5) == {"n": 3}, "the half that it had is not lost"


@pytest.mark.parametrize("within", [0.001, 0.05])
def test_a_command_waits_as_long_as_it_says(daemon: Daemon, within: float) -> None:
    started = time.monotonic()
    assert daemon.knock.hear(within) is None
    assert within - 0.01 <= time.monotonic() - started < 2


def test_a_command_is_not_kept_by_a_daemon_that_drips(daemon: Daemon) -> None:
    over = threading.Event()

    def drip() -> None:
        while not over.wait(0.02):
            daemon.sock.sendall(b"x")

    dripping = threading.Thread(target=drip)
    dripping.start()
    started = time.monotonic()
    timer = threading.Timer(2, over.set)
    timer.start()
    try:
        heard = daemon.knock.hear(0.2)
    finally:
        over.set()
        timer.cancel()
        dripping.join()
    assert heard is None and time.monotonic() - started < 1


def test_the_end_of_the_daemon_is_an_error_and_what_it_said_before_is_heard(
    daemon: Daemon,
) -> None:
    daemon.sock.sendall(b'{"n": 1}\n{"half')
    daemon.sock.close()
    assert daemon.knock.hear(5) == {"n": 1}
    for _ in range(2):
        with pytest.raises(OSError, match="it has ended"):
            daemon.knock.hear(5)


def test_a_long_line_is_heard_and_soon(daemon: Daemon) -> None:
    line = json.dumps({"text": "x" * hive.MAX_LINE}).encode() + b"\n"
    saying = threading.Thread(target=daemon.sock.sendall, args=(line,))
    saying.start()
    started = time.monotonic()
    heard = daemon.knock.hear(20)
    saying.join()
    assert heard == {"text": "x" * hive.MAX_LINE} and time.monotonic() - started < 5


@pytest.mark.parametrize("said", [b"\n", b"7\n", b"\xff\n", b"[" * 100_000 + b"\n"])
def test_a_daemon_that_talks_nonsense_is_heard_as_nothing(daemon: Daemon, said: bytes) -> None:
    daemon.sock.sendall(said)
    assert daemon.knock.hear(5) == {}


# A node's own door


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """The node beta with an agent that is told everything and says nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    agent = hive.InstanceConfig("main", openclaw_cmd=("true",))
    rig = Rig(tmp_path, {"ping": "echo pong"}, [agent], {}, "debug")
    yield rig
    rig.end()


class Caller:
    """A command at the node's door, that the test turns."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.knock = rig, hive.ControlClient(rig.state_dir / "door")

    def ask(self, **request: object) -> dict[str, Any]:
        return self.rig.ask(self.knock, **request)

    def hear(self, key: str) -> Any:
        """What the next line says that says this."""

        def heard() -> dict[str, Any]:
            line = self.knock.hear(0.001) or {}
            return line if key in line else {}

        return self.rig.until(f"a line with {key}", heard)[key]

    def hears_nothing(self) -> bool:
        self.rig.turn()
        return self.knock.hear(0.01) is None


@pytest.fixture
def caller_of(rig: Rig) -> Iterator[Callable[[], Caller]]:
    made: list[Caller] = []

    def make() -> Caller:
        made.append(Caller(rig))
        return made[-1]

    yield make
    for caller in made:
        caller.knock.close()
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
    assert caller.knock.hear(5) == {"published": code, "words": words}
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
    caller.knock.close()
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
    one.knock.close()
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
    assert caller.ask(do="settle", id="m-1") == {"ok": True}
    rig.say("response", corr="m-1")
    assert caller.hears_nothing(), "it listens for itself"
    assert rig.started() == []
    assert caller.ask(do="pending")["questions"] == []


def test_an_answer_that_was_just_read_is_no_news_when_the_command_has_gone(
    rig: Rig, caller: Caller
) -> None:
    caller.ask(do="sent", envelope=own("m-1").document(), wait=True)
    caller.ask(do="settle", id="m-1")
    caller.knock.close()
    rig.turn()
    rig.say("response", corr="m-1", id="a-1")
    rig.turn()
    assert rig.started() == []
    rig.clock.now += 2 * hive.SETTLING
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
    two.knock.close()
    rig.turn()
    acknowledge(rig, message, 0, "Success")  # which finds one
    assert one.knock.hear(5) == {"published": 0, "words": "Success"}


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
    everything.knock.close()
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
    rig: Rig, caller: Caller
) -> None:
    caller.ask(do="follow")
    for i in range(60):
        rig.say("status", id=f"m-{i}", urgency="later", text="x" * 200_000)
        rig.turn()
    found: list[str] = []

    def read() -> bool:
        line = caller.knock.hear(0.001)
        found.extend(row["id"] for row in (line or {}).get("rows", ()))
        rig.say("status", urgency="later", sender="other")  # the end of a turn
        return "m-59" in found

    rig.until("all is read", read)
    assert [id for id in found if id.startswith("m-")] == [f"m-{i}" for i in range(60)]


WRONG: list[object] = [
    *(None, True, False, 0, 7, -1, 1.5, 2**70, -(2**63), 1e308, float("nan"), float("inf")),
    *("", "a b", "x" * 65, "x" * 100_000, "\0", "half a pair: \ud83d", "m-1", "nobody", "all"),
    *([], [1], [[1, 2]], ["ab"], [["id"], 1], [[[1], 2]], {}, {"a": 1}, {"ch": None}),
    *({"ch": [1]}, {"ch": {"a": 1}}, {"ch": 2**70}, {"from": "\ud83d"}, {"since": "x"}),
    *({"since": float("nan")}, {"since": [1]}, {"to": True}, {"nothing": 1}, {"corr": "\0"}),
]
FIELDS = ("id", "envelope", "wait", "filters", "after", "last")
REQUESTS = ("send", "sent", "settle", "message", "exchange", "log", "follow", "pending", "states")


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


@pytest.mark.parametrize("do", [*REQUESTS, "dance", None, 7, ["send"], {"a": 1}, "x" * 100_000])
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


@pytest.mark.parametrize("do", ["send", "sent"])
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
        ({"do": "message", "id": 7}, "id: missing"),
        ({"do": "exchange", "id": "a b"}, "id: missing"),
        ({"do": "exchange", "id": "x" * 65}, "id: missing"),
        ({"do": "message", "id": "m-1"}, "not known here"),
        ({"do": "send"}, "v: missing"),
        ({"do": "log", "filters": {"colour": 1}}, "no such request: 'log'"),
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "state" / "door").mkdir(parents=True)
    rig = Rig(tmp_path, {"ping": "echo pong"}, [], {}, "debug")
    (line,) = rig.events("no door for the command line")
    assert line["level"] == "error" and line["file"] == str(tmp_path / "state" / "door")
    assert rig.works()
    rig.end()
