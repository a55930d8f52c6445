#!/usr/bin/env python3
"""A hive with a past, to look at: one real node on a link in memory, whose peers are made up.

    python tests/stage.py 20        # 20 nodes; prints the link of a page that shows them

An hour of heartbeats, load and messages cannot be waited for, so the node is told of it; all that
a page shows of it comes from the node's own Members, Journal and Requests.
"""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rig

import hive

NAMES = (
    *("studio", "attic", "mini", "garage", "nas", "porch", "lab", "tower", "cabin", "barn"),
    *("shed", "loft", "cellar", "dock", "pier", "hill", "harbor", "forge", "mill", "ridge"),
)
CLIENTS = ("claude-code 2.1.332", "codex 0.98.0", "gemini-cli 0.29.1", "opencode 1.4.7")
PLACES = (
    ("~/src/hive", "web"),
    ("~/src/shop", "main"),
    ("~/notes", "main"),
    ("~/src/api", "fix-42"),
)
TALK = (
    ("is the backup done?", "Yes: 12 files, 3.1 MB, at 03:00. The oldest snapshot is from Monday."),
    ("which tests are red on main?", "Two: test_upload and test_retry. Both fail since 9c1f2aa."),
    ("how full is the disk?", "82 % of 2 TB; the cache could go, that is 310 GB."),
    ("please take over the invoice import", "Taken. I begin with the CSV of last month."),
    ("what blocks the release?", "The changelog, and one review that nobody has taken."),
)
BAD = {1: ("offline", "connection lost"), 3: ("degraded", "agent main: gateway refuses: 401")}


class Stage:
    """The node `alpha`, and what it has heard of the others."""

    def __init__(self, folder: Path, number: int, loop: hive.Loop | None = None) -> None:
        self.random = random.Random(7)
        self.loop = loop or hive.Loop(hive.Log("error", stream=io.StringIO()))
        self.file = folder / "hive.toml"
        self.file.write_text(
            '[node]\nid = "alpha"\nstate_dir = "state"\n[mqtt]\nhost = "hive.lan"\n'
        )
        self.config = hive.load_config(str(self.file))
        log = hive.Log("error", stream=io.StringIO())
        journal = hive.Journal(None, log, 7 * 86400.0, 100_000_000)
        self.node = hive.Node(self.config, self.loop, log, journal)
        self.wire = rig.Wire(hive.OutgoingMessage("will", b""))
        self.wire.up = True
        self.node.attach(self.wire)
        self.node.on_connected(self.config.mqtt)
        self.node.all_heard()
        self.now = time.time()
        self.names = ["alpha", *(self.name(i) for i in range(number - 1))]
        for i, name in enumerate(self.names):
            self.tell_of(name, i)
        self.converse(min(10 * number, 300))
        self.keep_alive()
        self.place = hive.control_socket_path(self.config)
        self.control = hive.ControlServer(self.loop, self.place, self.answer)

    def answer(self, said: dict[str, Any], asker: hive.ControlConnection) -> dict[str, Any] | None:
        answer = self.node.requests.handle(said, asker)
        if said.get("do") == "send":
            self.loop.after(0.3, self.acknowledge)
        return answer

    def acknowledge(self) -> None:
        while self.wire.unacknowledged:
            message = self.wire.unacknowledged.pop()
            if message.n:
                self.node.journal.dequeue(message, True)
                self.node.published(message, 0, "ok")

    @staticmethod
    def name(i: int) -> str:
        return NAMES[i] if i < len(NAMES) else f"node-{i:03d}"

    def tell_of(self, name: str, i: int) -> None:
        """Its state, its roster and its last hour."""
        chance, (status, why) = self.random, BAD.get(i, ("online", ""))
        agents: dict[str, dict[str, Any]] = {}
        if i % 3 == 0 or name == "alpha":
            down: dict[str, Any] = {"status": "down", "reason": "gateway refuses: 401"}
            down["next_try"] = int(self.now + 280)
            agents["main"] = down if status == "degraded" else {"status": "ok"}
        if i % 4 == 0:
            directory, branch = PLACES[i // 4 % len(PLACES)]
            since = int(self.now - chance.randrange(60, 9000))
            session = {"client": CLIENTS[i // 4 % len(CLIENTS)], "directory": directory}
            agents[f"claude-{i}"] = {"status": "ok", **session, "branch": branch, "since": since}
        seen = int(self.now - (2240 if status == "offline" else 2))
        state = {
            **{"node_id": name, "daemon_node": name, "status": status, "reason": why},
            **{"last_seen": seen, "uptime_s": chance.randrange(4000, 900_000), "interval": 3600},
            **{
                "version": f"{hive.__version__} (a1b2c3d4)",
                "load_1m": chance.choice((0.1, 0.4, 1.7)),
            },
            **{"oc": agents, "host": f"{name}.lan", "instance": "x"},
            "running": int(i % 7 == 2),
            "rtt_ms": 1 + i % 30,
        }
        roster: dict[str, Any] = {
            **{"node": name, "agents": ["main"] if "main" in agents else [], "version": "0.2.0"},
            **{
                "handlers": ["git-sync", "health-check", "ping"][: 1 + i % 3]
                + ["ping"] * (i % 3 < 2)
            },
            **{"build": "a1b2c3d4", "system": "Linux x86_64"},
        }
        if i % 5 == 0:
            last = int(self.now - chance.randrange(300, 30_000))
            entry = {"action": "health-check", "when": "every 900s", "last": last, "ok": i != 5}
            roster["schedule"] = [{**entry, "next": int(self.now + 600)}]
        members = self.node.members
        for kind, document in (("roster", roster), ("state", state)):
            topic = self.config.topics.meta(name, kind)
            message = hive.IncomingMessage(
                topic, hive.encode_json(document), True, None, lambda: None
            )
            members.hear_document(name, kind, message)
        member = members.member(name)
        assert member
        self.fill_hour(member, status == "offline")
        member.changed = self.now - 1900 if status == "degraded" else 0.0

    def fill_hour(self, member: hive.Member, gone: bool) -> None:
        """Heartbeats each fifteen seconds, and a load that wanders."""
        chance, load, base = self.random, 0.4, self.random.choice((0.2, 0.5, 1.2))
        clock, dozes = self.loop.clock(), self.random.randrange(0, 240)
        for minute in range(59, -1, -1):
            load = max(0.02, load + chance.uniform(-0.25, 0.25) + (base - load) / 8)
            if not (gone and minute < 38) and minute != dozes:
                for _ in range(4):
                    member.hour.beat(clock - 60 * minute, load)

    def converse(self, number: int) -> None:
        """Questions and answers of the last hour, most of them with a few others."""
        chance, journal = self.random, self.node.journal
        peers = [
            name for i, name in enumerate(self.names) if i and BAD.get(i, "")[:1] != ("offline",)
        ]
        times = [self.now - 150 - chance.expovariate(1 / 900) for _ in range(number)]
        said: list[tuple[float, hive.Envelope]] = []
        for at in times if peers else ():
            peer = peers[min(int(chance.expovariate(0.35)), len(peers) - 1)]
            question, answer = chance.choice(TALK)
            sender, to = chance.choice((("alpha", peer), (peer, "alpha")))
            if chance.random() < 0.06:
                text = "I am done with the build"
                said.append((at, hive.Envelope.new(sender, "all", "status", text, now=at)))
                continue
            asked = hive.Envelope.new(sender, to, "command", question, now=at)
            said.append((at, asked))
            for word, gap in (("received", 0.2), ("told main", 0.6), ("read by main", 4.0)):
                told = asked.reply(to, word, ch="status", urgency="later", now=at + gap)
                said.append((at + gap, told))
            said.append((at + 11, asked.reply(to, answer, now=at + 11)))
        for i, name in enumerate(self.names[1:4]):
            at = self.now - 130 + 40 * i
            said.append((at, hive.Envelope.new("alpha", name, "command", TALK[i][0], now=at)))
        for at, envelope in sorted(said, key=lambda one: one[0]):
            row = self.keep(envelope, at)
            if at > self.now - 131:
                journal.add_pending_request(envelope, row or 0)
        journal.commit()

    def keep(self, envelope: hive.Envelope, at: float) -> int | None:
        event = hive.Event.SENT if envelope.sender == "alpha" else hive.Event.RECEIVED
        return self.node.journal.record(event, envelope, at)

    def keep_alive(self) -> None:
        """Nobody is lost while somebody looks, and now and then somebody speaks."""
        self.node.all_heard()
        self.loop.after(1.0, self.keep_alive)


def serve(number: int, port: int = 0, options: Sequence[str] = ()) -> None:
    """Show it until SIGTERM or Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="hive-stage-") as folder:
        stage = Stage(Path(folder), number)
        program = [sys.executable, str(Path(hive.__file__)), "web", "--config", str(stage.file)]
        more = [f"--port={port or hive.WEB_PORT}", *options]
        web = subprocess.Popen([*program, *more], env=os.environ | {"HOME": folder})
        for ending in (signal.SIGTERM, signal.SIGINT):
            stage.loop.on_signal(ending, stage.loop.stop)
        stage.loop.run()
        web.terminate()
        web.wait()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int((sys.argv[2:] or ["0"])[0]))
