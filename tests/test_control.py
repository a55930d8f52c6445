"""Control: a real socket between a node's command line and its daemon."""

from __future__ import annotations

import contextlib
import io
import json
import os
import selectors
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE

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
        hive.ControlClient(host.file, "beta")


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
    before = {*os.listdir("/dev/fd")}  # some of other tests may be closed meanwhile
    for _ in range(200):
        command()
    assert {*os.listdir("/dev/fd")} <= before
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
        hive.ControlClient(file, "beta")
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
    fits = "/" + "x" * (100 - len("//door"))  # the system's own limit is 104 or 108
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
        client = hive.connect_to_daemon(config)
        assert client
        client.close()
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
    client = hive.connect_to_daemon(config_for(folder))
    assert client
    client.close()
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
    before = {*os.listdir("/dev/fd")}  # some of other tests may be closed meanwhile
    with pytest.raises(OSError) as raised:  # it keeps alive what was not closed
        hive.ControlClient(file, "beta")
    assert {*os.listdir("/dev/fd")} <= before, raised
    assert hive.connect_to_daemon(config_for(file.parent)) is None
    with pytest.raises(hive.HiveError, match="no daemon of beta has run here yet"):
        hive.look_up(config_for(file.parent), {"do": "message", "id": "m-1"})
    assert {*os.listdir("/dev/fd")} <= before


def test_a_daemon_that_hangs_is_an_error_and_not_a_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "CONTROL_TIMEOUT", 0.05)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "door"))
        deaf.listen()
        with pytest.raises(hive.HiveError, match="the daemon of beta: it does not answer"):
            hive.look_up(config_for(tmp_path), {"do": "message", "id": "m-1"})


def test_a_daemon_that_lets_nobody_in_is_an_error_and_not_a_wait_for_ever(tmp_path: Path) -> None:
    assert hive.CONTROL_TIMEOUT == 5.0, "of the ten seconds in which a dead end is told"
    with hive.unix_listener(tmp_path / "door") as full:
        full.listen(0)
        crowd = [socket.socket(socket.AF_UNIX) for _ in range(5)]
        with contextlib.suppress(BlockingIOError):
            for one in crowd:
                one.setblocking(False)
                one.connect(str(tmp_path / "door"))
        with pytest.raises(OSError):
            hive.ControlClient(tmp_path / "door", "beta", patience=0.05)
        for one in crowd:
            one.close()


def test_a_spare_place_is_looked_at_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "SHORT_PLACE", tmp_path)
    config = config_for(Path("/state"))
    assert [*hive.control_socket_paths(config)] == [Path("/state/door")]
    folder = tmp_path / f"hive-{os.geteuid()}"
    folder.mkdir(mode=0o700)
    direct, spare = hive.control_socket_paths(config)
    assert direct == Path("/state/door") and spare.parent == folder
    assert hive.directory_objection(spare) is None
    elsewhere = tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)  # whoever was first there could have made it
    assert hive.directory_objection(spare) == f"{folder} is a link, which is not hive's"
    (elsewhere / "link").symlink_to(elsewhere)
    assert hive.directory_objection(elsewhere / "link" / "door") is None, "the user's own"


def test_a_server_that_was_closed_has_given_everything_back(host: Host) -> None:
    assert host.server
    host.server._accept(0)  # who waited has gone: that is no wait either
    command = host.command()
    before = {*os.listdir("/dev/fd")}  # some of other tests may be closed meanwhile
    number = host.server._listener.fileno()
    host.server.close()
    assert len(os.listdir("/dev/fd")) <= len(before) - 2 and not host.inside
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert number in (ours.fileno(), theirs.fileno())
        for one in (ours, theirs):
            host.loop.watch(one, selectors.EVENT_READ, lambda events: None)
            host.loop.forget(one)
    assert command.heard() == [] and command.shut


# The command's side


class Daemon:
    """A listener that says what the test says."""

    def __init__(self, file: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(file))
        self._listener.listen()
        self.client = hive.ControlClient(file, "beta")
        self.sock, _ = self._listener.accept()

    def close(self) -> None:
        self.client.close()
        self.sock.close()
        self._listener.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    one = Daemon(tmp_path / "door")
    yield one
    one.close()


def test_a_command_hears_line_by_line_however_they_come(daemon: Daemon) -> None:
    daemon.sock.sendall(b'{"n": 1}\n{"n": 2}\n{"n"')
    assert [daemon.client.receive(5), daemon.client.receive(5)] == [{"n": 1}, {"n": 2}]
    assert daemon.client.receive(0.01) is None
    daemon.sock.sendall(b": 3}\n")
    assert daemon.client.receive(5) == {"n": 3}, "the half that it had is not lost"


@pytest.mark.parametrize("within", [0.001, 0.05])
def test_a_command_waits_as_long_as_it_says(daemon: Daemon, within: float) -> None:
    started = time.monotonic()
    assert daemon.client.receive(within) is None
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
        heard = daemon.client.receive(0.2)
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
    assert daemon.client.receive(5) == {"n": 1}
    for _ in range(2):
        with pytest.raises(hive.DaemonError, match="it has ended"):
            daemon.client.receive(5)


def test_a_long_line_is_heard_and_soon(daemon: Daemon) -> None:
    line = json.dumps({"text": "x" * hive.MAX_LINE}).encode() + b"\n"
    saying = threading.Thread(target=daemon.sock.sendall, args=(line,))
    saying.start()
    started = time.monotonic()
    heard = daemon.client.receive(20)
    saying.join()
    assert heard == {"text": "x" * hive.MAX_LINE} and time.monotonic() - started < 5


def test_an_answer_may_take_its_time_and_what_comes_meanwhile_is_not_lost(daemon: Daemon) -> None:
    def answer() -> None:
        asked = daemon.sock.recv(4096)
        daemon.sock.sendall(b'{"mail": 1}\n{"changed": 2, "more": 3}\n')
        time.sleep(0.05)
        daemon.sock.sendall(b'{"told": ' + asked.strip() + b"}\n")

    answering = threading.Thread(target=answer)
    answering.start()
    assert daemon.client.ask({"do": "x"}) == {"told": {"do": "x"}}
    answering.join()
    assert daemon.client.receive(0) == {"mail": 1}
    assert daemon.client.receive(None) == {"changed": 2, "more": 3}
    assert daemon.client.receive(0) is None


def test_one_who_asks_a_daemon_that_does_not_read_is_told_so(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.sock.sendall(b'{"n": 1}\n')
    assert daemon.client.receive(None) == {"n": 1}  # which waits for ever, if it must
    monkeypatch.setattr(daemon.client, "_patience", 0.05)
    with pytest.raises(hive.DaemonError, match="the daemon of beta: timed out"):
        daemon.client.ask({"text": "x" * hive.MAX_LINE})


def test_a_daemon_that_dies_before_it_has_read_is_an_error(daemon: Daemon) -> None:
    daemon.client._sock.sendall(b"x")
    daemon.sock.close()
    with pytest.raises(hive.DaemonError, match="the daemon of beta: Connection reset"):
        daemon.client.receive(5)
    with pytest.raises(hive.DaemonError, match="the daemon of beta: "):
        daemon.client.ask({"do": "x"})


def test_it_can_be_waited_for_in_a_selector(daemon: Daemon) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(daemon.client, selectors.EVENT_READ)
        assert not selector.select(0)
        daemon.sock.sendall(b"{}\n")
        assert selector.select(5)


@pytest.mark.parametrize("said", [b"\n", b"7\n", b"\xff\n", b"[" * 100_000 + b"\n"])
def test_a_daemon_that_talks_nonsense_is_heard_as_nothing(daemon: Daemon, said: bytes) -> None:
    daemon.sock.sendall(said)
    assert daemon.client.receive(5) == {}
