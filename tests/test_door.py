"""Door: a real socket between a node's command line and its daemon."""

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


class Visit:
    """A command that speaks raw bytes."""

    def __init__(self, house: House) -> None:
        self.house, self.shut = house, False
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.sock.connect(str(house.file))
        self._in = b""

    def say(self, said: bytes) -> None:
        """Say it, however much it is; the other side may shut the door meanwhile."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while said:
                with contextlib.suppress(BlockingIOError):
                    said = said[self.sock.send(said) :]
                self.house.turn()

    def heard(self) -> list[Any]:
        """All answers that have come so far."""
        self.house.turn()
        with contextlib.suppress(BlockingIOError):
            try:
                data = self.sock.recv(1 << 20)
            except ConnectionResetError:
                data = b""
            self._in += data
            self.shut |= not data
        return [json.loads(line) for line in self._in.split(b"\n")[:-1]]


class House:
    """A door that answers with what it was asked, and the loop that turns it."""

    def __init__(self, file: Path) -> None:
        self.log, self.file = io.StringIO(), file
        self.left: list[str] = []
        self.visits: list[Visit] = []
        self.loop = hive.Loop(hive.Log("debug", "json", self.log))
        self.door: hive.Door | None = None

    def open(self) -> House:
        self.door = hive.Door(self.loop, self.file, self.answer)
        return self

    def answer(self, request: dict[str, Any], visitor: hive.Visitor) -> dict[str, Any]:
        if "name" in request:
            visitor.leaving.append(lambda: self.left.append(request["name"]))
        return {"asked": request}

    def visit(self) -> Visit:
        self.visits.append(Visit(self))
        self.turn()
        return self.visits[-1]

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
        if self.door:
            self.door.close()
        for visit in self.visits:
            visit.sock.close()
        self.loop.close()
        assert '"bug"' not in self.log.getvalue(), self.log.getvalue()


@pytest.fixture
def house_of() -> Iterator[Callable[[Path], House]]:
    made: list[House] = []

    def make(file: Path) -> House:
        made.append(House(file))
        return made[-1].open()

    yield make
    for house in made:
        house.end()


@pytest.fixture
def house(tmp_path: Path, house_of: Callable[[Path], House]) -> House:
    return house_of(tmp_path / "state" / "door")


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
    house: House, said: list[bytes], asked: list[dict[str, Any]]
) -> None:
    visit = house.visit()
    for part in said:
        assert len(visit.heard()) < len(asked)
        visit.say(part)
    house.until("all is answered", lambda: len(visit.heard()) >= len(asked))
    assert visit.heard() == [{"asked": request} for request in asked]
    assert not visit.shut


def test_a_visitor_that_speaks_slowly_delays_nobody(house: House) -> None:
    slow, quick = house.visit(), house.visit()
    slow.say(b'{"a": ')
    quick.say(b'{"b": 2}\n')
    house.until("an answer", quick.heard)
    assert slow.heard() == []
    slow.say(b"1}\n")
    house.until("the other answer", slow.heard)


def test_a_line_without_end_ends_the_visit(house: House) -> None:
    visit = house.visit()
    visit.say(b"x" * (hive.MAX_LINE + hive.PIPE_CHUNK))
    house.until("the door is shut", lambda: visit.heard() or visit.shut)
    assert visit.heard() == [] and visit.shut
    again = house.visit()
    again.say(b"{}\n")
    house.until("the next one is served", again.heard)


@pytest.mark.parametrize("last", [b"", b'{"half', b'{"name": "b"}\n'])
def test_what_is_to_be_done_when_a_visitor_goes_is_done_once(house: House, last: bytes) -> None:
    visit, other = house.visit(), house.visit()
    visit.say(b'{"name": "a"}\n')
    other.say(b'{"name": "other"}\n')
    house.until("an answer", visit.heard)
    assert house.left == []
    visit.say(last)
    visit.sock.close()
    house.until("it has gone", lambda: house.left)
    house.turn()
    assert house.left == (["a", "b"] if b"name" in last else ["a"])


def test_visitors_that_are_there_when_the_door_closes_go(house: House) -> None:
    visit = house.visit()
    visit.say(b'{"name": "a"}\n')
    house.until("an answer", visit.heard)
    assert house.door
    house.door.close()
    assert house.left == ["a"] and not house.file.exists()
    with pytest.raises(FileNotFoundError):
        hive.Knock(house.file)


def test_a_crowd_is_served_up_to_a_bound_and_again_when_some_have_gone(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_VISITORS", 20)
    crowd = [house.visit() for _ in range(30)]
    for visit in crowd:
        visit.say(b"{}\n")
    house.until("the first are served", lambda: all(visit.heard() for visit in crowd[:20]))
    house.until("the others are turned away", lambda: all(v.heard() or v.shut for v in crowd[20:]))
    assert [visit.heard() for visit in crowd[20:]] == [[]] * 10
    for visit in crowd[:10]:
        visit.sock.close()
    house.turn()
    late = house.visit()
    late.say(b"{}\n")
    house.until("there is room again", late.heard)


def test_two_hundred_visits_in_a_row_leave_nothing_behind(house: House) -> None:
    def visit() -> None:
        one = house.visit()
        one.say(b"{}\n")
        house.until("an answer", one.heard)
        house.visits.remove(one)
        one.sock.close()
        house.turn()

    visit()
    before = len(os.listdir("/dev/fd"))
    for _ in range(200):
        visit()
    assert len(os.listdir("/dev/fd")) == before
    assert house.door and not house.door.visitors


def test_only_this_user_can_open_it(tmp_path: Path, house_of: Callable[[Path], House]) -> None:
    before = os.umask(0)
    try:
        house = house_of(tmp_path / "a" / "state" / "door")
        assert os.umask(0) == 0, "the umask is as it was"
    finally:
        os.umask(before)
    assert stat.S_IMODE(house.file.stat().st_mode) == 0o600
    assert stat.S_IMODE(house.file.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("left", ["socket", "file"])
def test_what_a_killed_daemon_left_is_replaced(
    tmp_path: Path, house_of: Callable[[Path], House], left: str
) -> None:
    file = tmp_path / "door"
    if left == "socket":
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(file))
        with pytest.raises(ConnectionRefusedError):
            hive.Knock(file)
    else:
        file.write_text("x")
    visit = house_of(file).visit()
    visit.say(b"{}\n")
    visit.house.until("an answer", visit.heard)


def config_for(state_dir: Path) -> hive.Config:
    return hive.Config(hive.NodeConfig("beta", state_dir=state_dir))


def test_a_door_is_in_the_state_directory_unless_that_path_is_too_long(tmp_path: Path) -> None:
    assert hive.door_path(config_for(Path("/state"))) == Path("/state/door")
    fits = "/" + "x" * (hive.MAX_SOCKET_PATH - len("//door"))
    assert hive.door_path(config_for(Path(fits))) == Path(f"{fits}/door")
    far = [hive.door_path(config_for(Path(fits + more))) for more in ("x", "y", "ä", "x")]
    assert far[0] == far[3] and len(set(far)) == 3
    for path in far:
        assert len(os.fsencode(path)) <= hive.MAX_SOCKET_PATH
        assert str(os.geteuid()) in str(path)


def test_a_door_with_a_long_path_opens_all_the_same(
    tmp_path: Path, house_of: Callable[[Path], House]
) -> None:
    config = config_for(tmp_path / ("x" * 200))
    file = hive.door_path(config)
    made = not file.parent.exists()
    try:
        visit = house_of(file).visit()
        assert not file.parent.stat().st_mode & 0o077
        visit.say(b"{}\n")
        visit.house.until("an answer", visit.heard)
        knock = hive.knock(config)
        assert knock
        knock.close()
        visit.house.end()
    finally:
        file.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):
                file.parent.rmdir()


@pytest.mark.parametrize("mode", [0o777, 0o722, 0o1777])
def test_a_directory_that_others_may_write_is_refused_on_both_sides(
    tmp_path: Path, house_of: Callable[[Path], House], mode: int
) -> None:
    folder = tmp_path / "state"
    house = house_of(folder / "door")
    knock = hive.knock(config_for(folder))
    assert knock
    knock.close()
    folder.chmod(mode)
    assert hive.knock(config_for(folder)) is None
    with pytest.raises(PermissionError, match="writable by"):
        hive.Door(house.loop, folder / "other", house.answer)
    assert not (folder / "other").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused_on_both_sides(
    tmp_path: Path, house_of: Callable[[Path], House]
) -> None:
    folder = tmp_path / "state"
    house = house_of(folder / "door")
    os.chown(folder, 12345, 12345)
    assert hive.knock(config_for(folder)) is None
    with pytest.raises(PermissionError, match="another user"):
        hive.Door(house.loop, folder / "other", house.answer)


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
        hive.Knock(file)
    assert hive.knock(config_for(file.parent)) is None
    with pytest.raises(hive.HiveError, match="no daemon of beta runs on this machine"):
        hive.ask_daemon(config_for(file.parent), {"do": "show", "id": "m-1"})
    assert len(os.listdir("/dev/fd")) == before


def test_a_daemon_that_hangs_is_an_error_and_not_a_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "DOOR_TIMEOUT", 0.05)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "door"))
        deaf.listen()
        with pytest.raises(hive.HiveError, match="the daemon of beta: timed out"):
            hive.ask_daemon(config_for(tmp_path), {"do": "show", "id": "m-1"})


# A node's own door


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """The node beta with an agent that is told everything and says nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    agent = hive.InstanceConfig("main", openclaw_cmd=("true",))
    rig = Rig(tmp_path, {"ping": "echo pong"}, [agent], {}, "debug")
    yield rig
    rig.end()


def ask(rig: Rig, **request: object) -> dict[str, Any]:
    """What a command of one request is told."""
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(hive.ask_daemon(rig.config, request)))
    asking.start()
    rig.until("an answer at the door", lambda: not asking.is_alive())
    return answers[0]


def test_a_message_that_the_agent_was_told_is_shown_whole(rig: Rig) -> None:
    message = rig.say("command", text="ä \u2028\n" * 10_000, corr="c-1", ttl=60)
    assert hive.Envelope.check(ask(rig, do="show", id=message.id)["envelope"]) == message


def test_a_message_that_a_handler_took_was_not_for_the_agent(rig: Rig) -> None:
    message = rig.say("command", "ping")
    assert ask(rig, do="show", id=message.id) == {"error": "not known here"}


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({}, "id: missing"),
        ({"do": "show"}, "id: missing"),
        ({"do": "show", "id": 7}, "id: missing"),
        ({"do": "show", "id": "a b"}, "id: missing"),
        ({"do": "show", "id": "x" * 65}, "id: missing"),
        ({"do": "show", "id": "m-1"}, "not known here"),
        ({"id": "m-1"}, "no such request: None"),
        ({"do": "dance", "id": "m-1"}, "no such request: 'dance'"),
        ({"do": ["ask"], "id": "m-1"}, "no such request: ['ask']"),
    ],
)
def test_a_request_that_makes_no_sense_is_told_why(
    rig: Rig, request_: dict[str, object], error: str
) -> None:
    assert ask(rig, **request_) == {"error": error}


@pytest.mark.parametrize("text", [None, 7, ["x"], "x" * 100_000, "\0", "half a pair: \ud83d"])
def test_a_question_of_any_kind_is_taken(rig: Rig, text: object) -> None:
    file = rig.state_dir / "door"
    visit = socket.socket(socket.AF_UNIX)
    with visit, visit.makefile("rb") as lines:
        visit.connect(str(file))
        request = json.dumps({"do": "ask", "id": "c-1", "text": text})
        visit.sendall(request.encode() + b"\n")
        visit.setblocking(False)
        answer = rig.until("an answer", lambda: lines.read(100))
    assert json.loads(answer) == {"ok": True}


def test_an_answer_that_a_command_waits_for_stays_with_it(rig: Rig) -> None:
    knock = hive.Knock(rig.state_dir / "door")
    rig.ask(knock, do="ask", id="c-1", text="well?", wait=True)
    rig.say("response", corr="c-1")
    rig.turn()
    assert rig.started() == []
    knock.close()
    rig.turn()
    rig.say("response", corr="c-1")
    rig.until("nobody waits any more", lambda: rig.started() == ["main"])


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
