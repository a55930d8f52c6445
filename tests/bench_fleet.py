"""What a hive of N nodes costs, and how soon it notices a death: real daemons beside a crowd.

python tests/bench_fleet.py [--nodes 10,100,1000] [--seconds 60]

Three daemons are real: one is measured, one is killed, one is frozen.  All others are connections
of one process, the crowd, which says and takes what daemons do: heartbeats at their pace, states,
rosters, acknowledgements, an answer to each command.  Its own CPU is in the table: as long as that
is far below a core, it is not what is measured.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from conftest import Broker, Daemon, Hive
from raw_mqtt import connect_packet, publish_packet, subscribe_packet

import hive
from hive import Envelope, PacketType, Publish

TICKS = os.sysconf("SC_CLK_TCK")
BEATS = 10  # a second, of all
OWN_INTERVAL = 5.0
RENEWED = 10  # heartbeats to a state


# ---- The crowd ---------------------------------------------------------------------------


class Node:
    """One of the crowd: a connection that does what a daemon does."""

    def __init__(self, name: str, port: int, prefix: str, interval: float) -> None:
        self.name, self.prefix, self.interval = name, prefix, interval
        self.began, self.seq, self.input = time.time(), 0, bytearray()
        self.sock = socket.create_connection(("127.0.0.1", port))
        will = Publish(f"{prefix}/meta/{name}/state", self.state("offline"), 1, True)
        filters = [(f"{name}/+", 1), ("all/+", 1), ("meta/+/state", 0), ("meta/+/roster", 0)]
        roster = {"node": name, "agents": [], "handlers": ["ping"], "version": hive.__version__}
        self.sock.sendall(
            connect_packet(5, f"hive-{name}", keepalive=120, will=will, session_expiry=60)
            + subscribe_packet(*[(f"{prefix}/{one}", qos) for one, qos in filters])
            + self.document("roster", json.dumps(roster).encode())
        )
        self.sock.sendall(self.document("state", self.state("online")))
        self.sock.setblocking(False)

    def document(self, kind: str, payload: bytes) -> bytes:
        self.seq += 1
        topic = f"{self.prefix}/meta/{self.name}/{kind}"
        return publish_packet(topic, payload, 1, self.seq % 65535 + 1, retain=True)

    def state(self, status: str) -> bytes:
        said = {
            "node_id": self.name,
            "daemon_node": self.name,
            "status": status,
            "last_seen": int(time.time()),
            "interval": self.interval,
            "miss_threshold": 3,
            "version": hive.__version__,
            "oc": {},
            "counters": {},
            "instance": self.name,
        }
        return json.dumps(
            hive.with_reason(said, "connection lost" * (status == "offline"))
        ).encode()

    def beat(self) -> None:
        """A heartbeat; and now and then, the state."""
        self.seq += 1
        said = {"node_id": self.name, "interval": self.interval, "boot": self.name, "seq": self.seq}
        text = json.dumps({**said, "uptime_s": time.time() - self.began, "load_1m": 0.1})
        envelope = Envelope.new(self.name, "all", "heartbeat", text, urgency="later").encode()
        packet = publish_packet(f"{self.prefix}/all/heartbeat", envelope)
        if self.seq % RENEWED == 1:
            packet += self.document("state", self.state("online"))
        self.sock.sendall(packet)

    def ready(self) -> None:
        """Take what has come: acknowledge it, and answer commands."""
        self.input += self.sock.recv(1 << 18)
        at, answers = 0, bytearray()
        while bounds := hive.packet_bounds(self.input, at, 1 << 20):
            body, end = bounds
            first = self.input[at]
            if first >> 4 == PacketType.PUBLISH:
                size = int.from_bytes(self.input[body : body + 2])
                topic = bytes(self.input[body + 2 : body + 2 + size])
                if first & 6:
                    answers += b"\x40\x02" + self.input[body + 2 + size : body + 4 + size]
                if topic.endswith(b"/command"):
                    answers += self.answer(bytes(self.input[body:end]), first)
            at = end
        del self.input[:at]
        if answers:
            self.sock.sendall(answers)

    def answer(self, body: bytes, first: int) -> bytes:
        envelope = Envelope.parse(body[body.index(b"{") :])
        reply = envelope.reply(self.name, "pong").encode()
        self.seq += 1
        topic = f"{self.prefix}/{envelope.sender}/response"
        return publish_packet(topic, reply, 1, self.seq % 65535 + 1)


def crowd(port: int, prefix: str, number: int, interval: float) -> None:
    """Be so many nodes, until SIGTERM; says when all are there."""
    selector = selectors.DefaultSelector()
    due: list[tuple[float, int, Node]] = []
    for n in range(number):
        node = Node(f"web-{n:04}", port, prefix, interval)
        selector.register(node.sock, selectors.EVENT_READ, node)
        heapq.heappush(due, (time.monotonic() + interval * (n / number), n, node))
        if n % 20 == 0:
            for key, _ in selector.select(0):
                key.data.ready()
    print("there", flush=True)
    while True:
        for key, _ in selector.select(max(0.0, due[0][0] - time.monotonic()) if due else None):
            key.data.ready()
        while due and due[0][0] <= time.monotonic():
            at, n, node = heapq.heappop(due)
            node.beat()
            heapq.heappush(due, (at + interval, n, node))


# ---- The measurement ---------------------------------------------------------------------


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident(pid: int) -> float:
    """Megabytes that it keeps."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1000 if found else 0.0


def until(what: str, check: Callable[[], object], patience: float = 180.0) -> float:
    """Seconds until it is so."""
    began = time.monotonic()
    while not check():
        assert time.monotonic() - began < patience, what
        time.sleep(0.02)
    return time.monotonic() - began


def noticed(watcher: Daemon, gone: Daemon, number: int) -> float:
    """Seconds from a signal to the line in another node's log that says that it is lost."""
    assert gone.process
    gone.process.send_signal(number)
    return until(f"{gone.name} is missed", lambda: watcher.events("peer is lost", peer=gone.name))


def answered(fleet: Hive, all_: int) -> tuple[float, int]:
    """Seconds until a message to all is answered by all, and how many did."""
    began = time.monotonic()
    line = ("send", "--to", "all", "--action", "ping", "--text", "x", "--wait", "30", "--json")
    done = fleet.cli("alpha", *line, code=None)
    return time.monotonic() - began, len(done.stdout.splitlines())


def settle(pid: int) -> None:
    """Wait until the broker has handed out what is retained: to each node what all have left."""
    until("the broker is quiet", lambda: used(pid, 5.0) < 0.3, 300.0)
    time.sleep(30)  # until those that are real have found their pace


def used(pid: int, seconds: float) -> float:
    """Share of a core that a process takes meanwhile."""
    before = cpu(pid)
    time.sleep(seconds)
    return (cpu(pid) - before) / seconds


def measure(number: int, seconds: float) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="hive-fleet-") as folder:
        home = Path(folder)
        broker = Broker(home / "broker", start=False)
        rules = broker.home / "mosquitto.conf"  # saves as `hive host` has it
        lazily = rules.read_text().replace("on_changes true", "on_changes false")
        rules.write_text(lazily.replace("autosave_interval 1", "autosave_interval 2"))
        broker.start()
        fleet = Hive(home / "hive", broker, "hive", interval=OWN_INTERVAL)
        interval = max(OWN_INTERVAL, number / BEATS)
        line = [sys.executable, __file__, "--crowd", str(broker.port), str(number - 3)]
        others = subprocess.Popen([*line, str(interval)], stdout=subprocess.PIPE, text=True)
        try:
            assert others.stdout and others.stdout.readline() == "there\n"
            real = [fleet.node(name) for name in ("alpha", "beta", "gamma")]
            for one in real:
                one.config.write_text(one.config.read_text().replace('"debug"', '"info"'))
                one.handler("ping", "#!/bin/sh\necho pong\n")
                one.start()
            settle(broker.pid)
            pids = [real[0].pid, broker.pid, others.pid]
            before = [cpu(pid) for pid in pids]
            time.sleep(seconds)
            spent = [(cpu(pid) - one) / seconds for pid, one in zip(pids, before, strict=True)]
            memory = [resident(pid) for pid in pids]
            took, answers = answered(fleet, number)
            killed = noticed(real[0], real[1], signal.SIGKILL)
            frozen = noticed(real[0], real[2], signal.SIGSTOP)
            time.sleep(5)
            alerts = len(real[0].events("sent", ch="alert"))
            assert others.poll() is None, "the crowd is gone"
            real[2].process.kill()  # type: ignore[union-attr]
            return [
                str(number),
                f"{spent[0] * 60_000:.0f} ms",
                f"{memory[0]:.1f}",
                f"{spent[1] * 100:.1f} %",
                f"{memory[1]:.1f}",
                f"{spent[2] * 100:.1f} %",
                f"{killed:.1f}",
                f"{frozen:.1f}",
                f"{took:.1f} ({answers})",
                str(alerts),
            ]
        finally:
            others.kill()
            others.wait()
            fleet.close()
            broker.stop(signal.SIGKILL)


HEADS = [
    *("nodes", "daemon CPU/min", "MB", "Mosquitto", "MB", "crowd"),
    *("killed: s", "frozen: s", "all answer: s (answers)", "alerts"),
]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", default="10,100,1000")
    parser.add_argument("--seconds", type=float, default=60.0)
    said = parser.parse_args(arguments)
    rows = [measure(int(one), said.seconds) for one in said.nodes.split(",")]
    print("| " + " | ".join(HEADS) + " |\n|" + "---|" * len(HEADS))
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--crowd"]:
        crowd(int(sys.argv[2]), "hive", int(sys.argv[3]), float(sys.argv[4]))
    main(sys.argv[1:])
