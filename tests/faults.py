"""What test_faults.py does to two nodes, and how it counts what became of their messages.

HIVE_FAULTS_COUNT   how many commands each fault is tried with (100; make faults: 1000)
HIVE_FAULTS_SEED    what the random moments are made of (printed with the table)
HIVE_FAULTS_TABLE   a file for the table of results; - prints it
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import paho.mqtt.client as mqtt
import pytest
from conftest import PATIENCE, ROOT, Broker, Daemon, Hive, answers, eventually, free_port, missing
from paho.mqtt.enums import CallbackAPIVersion

import hive

COUNT = int(os.environ.get("HIVE_FAULTS_COUNT", "100"))  # commands
SEED = int(os.environ.get("HIVE_FAULTS_SEED", "5"))
TABLE = os.environ.get("HIVE_FAULTS_TABLE", "")

EVERY_TENTH = 10  # message is for the agent, and another one's handler may run again
WINDOW = 900  # commands that are not done yet: a node refuses what is beyond its 1000
LONG = 25.0  # seconds until a fault must be over; broker and nodes are quicker, unless they hang

# One write each to a file that is open for appending: whole lines, whoever else writes.
HANDLER = '#!/bin/sh\necho "$HIVE_ID" >>{file}\n'
AGENT = '#!/bin/sh\nprintf "%s\\n" "${{1%%\n*}}" >>{file}\n'

# In alpha's journal; beta has more to say, to all: that alpha was lost, for one.
ANSWERS = "log WHERE event = 'in' AND sender = 'beta' AND recipient = 'alpha'"
WAITING = "outbox WHERE acknowledged_at IS NULL"  # for the broker

# hive.py with something about it changed, as its daemon's own process sees it.
CHANGED = "import sys, time; sys.path.insert(0, sys.argv.pop(1)); import hive; {change}\n"
CHANGED += "sys.exit(hive.main())"


class OwnBroker(Broker):
    """Hive's own broker, in place of Mosquitto."""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True)
        self.home, self.port = home, free_port()
        self.start()

    def start(self) -> None:
        environment = {"HOME": str(self.home), "XDG_STATE_HOME": str(self.home)}
        listen = (f"--socket={self.home}/socket", f"--listen=127.0.0.1:{self.port}", "--anonymous")
        with (self.home / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, ROOT / "hive-cli", "broker", *listen],
                stdout=log,
                stderr=log,
                env=os.environ | environment,
            )
        eventually("the broker listens", lambda: answers(self.port))


class Victim(Daemon):
    """A daemon that is killed, starved and misled, and started again as a supervisor would."""

    change = ""  # Python that is run in its process before it starts
    far_log = False  # another process writes the log, so that it is no file of the daemon's own

    def start(self, wait: bool = True) -> Victim:
        code = CHANGED.format(change=self.change)
        way = ["-c", code, str(ROOT)] if self.change else [str(ROOT / "hive-cli")]
        with contextlib.ExitStack() as ending:
            log: IO[bytes] = ending.enter_context(self.log_file.open("ab"))
            if self.far_log:
                self.writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
                assert self.writer.stdin
                log = self.writer.stdin
                ending.callback(log.close)
            self.process = subprocess.Popen(
                [sys.executable, *way, "daemon", "--config", self.config],
                stderr=log,
                stdout=log,
                stdin=subprocess.DEVNULL,
                env=self.hive.environment,
                cwd=self.home,
            )
        if wait:
            self.logged("connected")
        return self

    def start_again(self) -> None:
        """Wait until it is connected, as it was before."""
        seen = len(self.events("connected"))
        self.start(wait=False)
        eventually(f"{self.name} is back", lambda: len(self.events("connected")) > seen)

    def kill(self) -> None:
        assert self.process and self.process.poll() is None, f"{self.name} has ended by itself"
        self.stop(signal.SIGKILL)

    def restart(self) -> None:
        self.kill()
        self.start(wait=False)

    @property
    def journal(self) -> Path:
        return self.home / "state" / "journal.sqlite3"

    def ask(self, question: str, *values: object) -> list[tuple[Any, ...]]:
        """Read its journal, from outside and without a trace; nothing while it is not there."""
        with contextlib.suppress(sqlite3.OperationalError):
            uri = f"file:{self.journal}?mode=ro"
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
                return database.execute(question, values).fetchall()
        return []

    def count(self, question: str) -> int:
        rows = self.ask(f"SELECT count(*) FROM {question}")
        return int(rows[0][0]) if rows else -1


@dataclass
class Tally:
    """What became of the messages: a row of the table."""

    fault: str
    sent: int = 0
    arrived: int = 0
    acted: int = 0
    twice: int = 0
    interrupted: int = 0
    rerun: int = 0  # acted upon twice, where retry = true says that this is harmless
    stale: int = 0
    told_sent: int = field(default=0, metadata={"title": "to agent"})
    told: int = 0
    told_again: int = field(default=0, metadata={"title": "marked"})
    told_twice: int = field(default=0, metadata={"title": "unmarked"})
    seconds: float = 0.0

    @classmethod
    def titles(cls) -> list[str]:
        return [f.metadata.get("title", f.name) for f in fields(cls)]

    def cells(self) -> list[str]:
        values = [getattr(self, f.name) for f in fields(self)]
        return [f"{value:.1f}" if isinstance(value, float) else str(value) for value in values]


def table_of(tallies: list[Tally]) -> str:
    rows = [Tally.titles(), *(tally.cells() for tally in tallies)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([f"{COUNT} commands for each fault, seed {SEED}", *lines])


class Trial:
    """Two nodes, numbered messages from alpha to beta, and the count of what became of them."""

    def __init__(self, hive_: Hive, fault: str, port: int = 0, keepalive: int = 30) -> None:
        self.tally, self.chance = Tally(fault), random.Random(f"{SEED} {fault}")
        self.began = time.monotonic()
        self.hive = hive_
        self.commands: list[str] = []  # ids
        self.again: set[str] = set()  # those whose handler may run again
        self.stale: set[str] = set()  # those that must not be done
        self.words: list[str] = []  # ids of what is for the agent
        self.done_file, self.told_file = hive_.home / "done", hive_.home / "told"
        self.alpha, self.beta = self._node("alpha"), self._node("beta")
        agent = hive_.home / "agent"
        agent.write_text(AGENT.format(file=self.told_file))
        agent.chmod(0o755)
        with self.beta.config.open("a") as config:
            config.write(
                "[handlers.note]\nworkers = 4\n[handlers.again]\nworkers = 4\nretry = true\n"
                f'[[oc_instances]]\nname = "main"\ncommand = ["{agent}", "{{text}}"]\n'
            )
        for node in (self.alpha, self.beta):
            said = node.config.read_text().replace('"debug"', '"info"')
            said = said.replace("[mqtt]\n", f"[mqtt]\nkeepalive = {keepalive}\n")
            node.config.write_text(
                said.replace(f"port = {hive_.broker.port}", f"port = {port or hive_.broker.port}")
            )
        for action in ("note", "again"):
            self.beta.handler(action, HANDLER.format(file=self.done_file))

    def _node(self, name: str) -> Victim:
        node = Victim(self.hive, name, "")
        self.hive.nodes[name] = node
        return node

    def start(self) -> Trial:
        for node in (self.beta, self.alpha):
            node.start(wait=False)
        for node in (self.beta, self.alpha):
            node.logged("connected")
        return self

    # -- sending --

    def send(self, ttl: int = 0, stale: bool = False, clock: float = 0.0) -> None:
        """Hand in the next one at alpha's door, as hive.py send does; again until it is taken."""
        number = len(self.commands) + len(self.words)
        action = "again" if number % EVERY_TENTH == 1 and not stale else "note"
        word = number % EVERY_TENTH == 0 and not stale
        envelope = hive.Envelope.new(
            "alpha",
            "beta",
            "command",
            f"number {number}",
            id=f"n-{number}",
            now=time.time() + clock,
            action=None if word else action,
            ttl=ttl or None,
        )
        self.wait(f"{envelope.id} is handed in", lambda: self._hand_in(envelope))
        (self.words if word else self.commands).append(envelope.id)
        if action == "again" and not word:
            self.again.add(envelope.id)
        if stale:
            self.stale.add(envelope.id)
        while len(self.commands) > WINDOW and len(self.commands) - len(self.done()) > WINDOW:
            time.sleep(0.02)

    def _hand_in(self, envelope: hive.Envelope) -> bool:
        config = hive.load_config(str(self.alpha.config))
        client = hive.connect_to_daemon(config)
        if client is None:
            return False
        with contextlib.closing(client):
            try:
                said = client.ask({"do": "send", "envelope": envelope.document()})
            except hive.DaemonError:  # it was killed: nobody was told that it is sent
                return False
        return bool(said.get("queued")) or "was handed in before" in said["error"]

    def send_by_command(self) -> None:
        """One by a real hive.py send, which gives it an id of its own."""
        arguments = ("--to", "beta", "--action", "note", "--text", "a number", "--json")
        done = self.hive.cli("alpha", "send", *arguments)
        self.commands.append(hive.Envelope.parse(done.stdout.encode()).id)

    def send_rest(self, number: int = COUNT) -> None:
        """All that are missing to so many."""
        while len(self.commands) < number:
            self.send()

    @contextlib.contextmanager
    def sending(self, rest: Callable[[], None] | None = None) -> Iterator[None]:
        """Send the rest meanwhile."""
        faults: list[BaseException] = []

        def run() -> None:
            try:
                (rest or self.send_rest)()
            except BaseException as error:
                faults.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            thread.join(LONG)
        assert not faults, faults[0]
        assert not thread.is_alive()

    # -- what became of them --

    def done(self) -> list[str]:
        """The ids that the handlers wrote down."""
        return self.done_file.read_text().split() if self.done_file.exists() else []

    def told(self) -> list[tuple[str, bool]]:
        """The ids of ours that the agent wrote down, and whether each was marked.

        It is told of more: that a node was lost while it was killed, for one.
        """
        lines = self.told_file.read_text().splitlines() if self.told_file.exists() else []
        ids = [next(w for w in line.split() if w.startswith("id="))[3:] for line in lines]
        both = zip(ids, lines, strict=True)
        return [(id, hive.UNCERTAIN_NOTE in line) for id, line in both if id in self.words]

    def answers(self) -> dict[str, list[str]]:
        """What alpha has been answered to each id: the kind of message, and why if that says so."""
        found: dict[str, list[str]] = {}
        for id, ch, content in self.alpha.ask(f"SELECT exchange, ch, content FROM {ANSWERS}"):
            interrupted = ch == "alert" and " failed: interrupted: " in (content or "")
            found.setdefault(id, []).append("interrupted" if interrupted else ch)
        return found

    def wait(self, what: str, check: Callable[[], Any], patience: float = LONG) -> None:
        """Wait for something that takes a while, and does not get in the way of it."""
        until = time.monotonic() + patience
        while not check():
            assert time.monotonic() < until, f"never happened: {what}; {self.situation()}"
            time.sleep(0.02)

    def reached(self, number: int) -> None:
        """Wait until so many lines were written."""
        self.wait(f"{number} are done", lambda: len(self.done()) >= number)

    def situation(self) -> dict[str, object]:
        return {
            "sent": len(self.commands),
            "done": len(set(self.done())),
            "answered": len(self.answers()),
            "told": len(set(self.told())),
            "owed by beta": self.beta.count("tasks"),
            "in beta's outbox": self.beta.count(WAITING),
            "in alpha's outbox": self.alpha.count(WAITING),
        }

    def _settled(self) -> bool:
        """Is nothing under way any more?"""
        expected = len(self.commands) - len(self.stale)
        return (
            self.alpha.count(ANSWERS) >= expected
            and self.alpha.count(WAITING) == 0
            and self.beta.count(WAITING) == 0
            and self.beta.count("tasks") == 0
        )

    def settle(self, patience: float = LONG) -> None:
        """Wait until nothing is under way, and count; what is counted must be right."""
        try:
            self.wait("all are answered", self._settled, patience)
        finally:
            self._count()
        self._check()

    def _count(self) -> None:
        done, told = Counter(self.done()), Counter(id for id, _ in self.told())
        marked = Counter(id for id, mark in self.told() if mark)
        rows = self.beta.ask("SELECT id FROM log WHERE event = 'in' AND sender = 'alpha'")
        arrived = {id for (id,) in rows}
        more = {id for id, times in done.items() if times > 1}
        tally = self.tally
        tally.sent, tally.arrived = len(self.commands), len(arrived & set(self.commands))
        tally.acted, tally.stale = len(done), len(self.stale)
        tally.rerun = len(more & self.again)
        tally.twice = len(more) - tally.rerun
        tally.interrupted = sum("interrupted" in kinds for kinds in self.answers().values())
        tally.told_sent, tally.told = len(self.words), len(told)
        tally.told_again = sum(marked.values())
        tally.told_twice = sum(times - marked[id] > 1 for id, times in told.items())
        tally.seconds = time.monotonic() - self.began

    def _check(self) -> None:
        """The bar: all acted upon, none twice, but for an interrupted one, and that is said."""
        done, answers = Counter(self.done()), self.answers()
        told = {id for id, _ in self.told()}
        more = {id for id, times in done.items() if times > 1}
        interrupted = {id for id, kinds in answers.items() if kinds == ["interrupted"]}
        fresh = set(self.commands) - self.stale
        missed = fresh - done.keys() - interrupted
        assert not missed, f"sent and never acted upon: {sorted(missed)}"
        assert more <= self.again, f"acted upon twice: {more - self.again}"
        assert not self.stale & done.keys(), "stale, and yet acted upon"
        wrong = {id: k for id, k in answers.items() if k not in (["response"], ["interrupted"])}
        assert not wrong, f"answered otherwise than once: {wrong}"
        assert answers.keys() == fresh, f"not answered: {sorted(fresh - answers.keys())}"
        assert not interrupted & self.again, "interrupted, where it may run again"
        assert told == {*self.words}, f"not told: {set(self.words) - told}"
        assert not self.tally.told_twice, f"told twice, and the mark is missing: {self.told()}"

    def unchanged(self) -> None:
        """Nothing is done again when both have been started once more."""
        before = len(self.done()), len(self.told())
        for node in (self.alpha, self.beta):
            node.kill()
            node.start_again()
        self.wait("nothing is owed", self._settled)
        assert before == (len(self.done()), len(self.told()))


class Witness:
    """Somebody else on the bus, who writes down every result of a handler."""

    def __init__(self, trial: Trial) -> None:
        topic, subscribed = f"{trial.hive.prefix}/meta/beta/note", threading.Event()
        self._results: list[dict[str, Any]] = []
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2)
        self._client.on_message = lambda client, userdata, message: self._results.append(
            json.loads(message.payload)
        )
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.connect("127.0.0.1", trial.hive.broker.port)
        self._client.subscribe(topic, 1)
        self._client.loop_start()
        assert subscribed.wait(PATIENCE)

    def interrupted(self) -> set[str]:
        """The ids of the results that say so; one may be sent again after its node has died."""
        return {one["id"] for one in self._results if one["status"] == "interrupted"}

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Wire:
    """A network between the nodes and their broker, which can be cut.

    While it is cut nothing goes through, and nobody is told: no reset, no end of file.  After
    that the connections of before go on, as after a short outage, or stay silent for ever, as
    behind a router that has forgotten them.
    """

    def __init__(self, port: int) -> None:
        self._broker = port
        self._open = threading.Event()
        self._open.set()
        self._pairs: list[Pair] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._open.wait()
                far = socket.create_connection(("127.0.0.1", self._broker))
                self._pairs.append(Pair(near, far, self._open))

    def cut(self) -> None:
        self._open.clear()

    def mend(self, forget: bool) -> None:
        """New connections work again; `forget`: those of before are silent for ever."""
        for pair in self._pairs:
            pair.silent = pair.silent or forget
        self._open.set()

    def close(self) -> None:
        self._listener.close()
        self._open.set()
        for pair in self._pairs:
            pair.close()


class Pair:
    """One connection through the wire."""

    def __init__(self, near: socket.socket, far: socket.socket, open_: threading.Event) -> None:
        self.silent = False
        self._open, self._ends = open_, (near, far)
        for source, sink in ((near, far), (far, near)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._open.wait()
                if not self.silent:
                    sink.sendall(data)
        self._open.wait()
        if not self.silent:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class SmallDisk:
    """A file system of a few megabytes; only root can have one."""

    SIZE = 32  # megabytes

    def __init__(self, folder: Path) -> None:
        if os.geteuid():
            pytest.skip("only root can mount a small file system")
        folder.mkdir(parents=True)
        mount = shutil.which("mount")
        line = [mount or "mount", "-t", "tmpfs", "-o", f"size={self.SIZE}m,mode=0700"]
        if not mount or subprocess.run([*line, "none", folder], capture_output=True).returncode:
            missing("no file system can be mounted here")
        self._folder, self._filler = folder, folder / "filler"

    def fill(self) -> None:
        with self._filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            for size in (65536, 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self) -> None:
        self._filler.unlink()

    def close(self) -> None:
        subprocess.run(["umount", "-l", self._folder], check=True)


class Quota:
    """Daemons whose files may not grow: what an ordinary user has for a full disk (Linux)."""

    def __init__(self, *nodes: Victim) -> None:
        self._nodes = nodes

    def _limit(self, size: int) -> None:
        import resource

        for node in self._nodes:
            unlimited = resource.RLIM_INFINITY
            resource.prlimit(node.pid, resource.RLIMIT_FSIZE, (size, unlimited))

    def fill(self) -> None:
        self._limit(64 * 1024)  # larger than all but the journal: log, numbers, words

    def free(self) -> None:
        import resource

        self._limit(resource.RLIM_INFINITY)
