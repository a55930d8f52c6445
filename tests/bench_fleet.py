"""What a hive of N nodes costs, and how soon it notices a death: real daemons beside a crowd.

python tests/bench_fleet.py [--nodes 10,100,1000] [--seconds 60] [--plot contrib/pictures/fleet.svg]
python tests/bench_fleet.py --scenario 6 [--nodes 500]      # minutes; the whole of it is 60

Three daemons are real: one is measured, one is killed, one is frozen.  All others are connections
of one process, the crowd, which says and takes what daemons do: heartbeats and pings at their
pace, states, rosters, acknowledgements, an answer to each command; and comes back when the broker
has gone.  Its own CPU is in the table: as long as that is far below a core, it is not what is
measured.  So is that of a bare paho client which reads the same messages, and does nothing.

Beside it Serf at the same N, where it is installed (apt-get install serf): each agent a process.

The scenario: a broker that is started anew, a partition that heals (a network namespace whose
link is taken down: it needs root), a machine asleep and a clock that is set back, in turn, with a
quarter of the time for each; and whatever is said of anybody who was there all the time is a false
alert.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import os
import random
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from conftest import Broker, Daemon, Hive
from faults import CHANGED
from raw_mqtt import connect_packet, publish_packet, subscribe_packet

import hive
from hive import Envelope, PacketType, Publish

Address = tuple[str, int]

LOOPBACK = "127.0.0.1"
TICKS = os.sysconf("SC_CLK_TCK")
OWN_INTERVAL = 5.0
MISSED = 3  # heartbeats
KEEPALIVE = hive.MqttConfig().keepalive
NOT_KEPT = 0x20  # of a subscription: what is retained does not come (MQTT 5, 3.8.3.1)
SERF_MEMORY = 25  # MB that an agent may need
SERF_A_CORE = 50  # agents: 300 on two cores were not done with joining in ten minutes


# ---- The crowd ---------------------------------------------------------------------------


class Node:
    """One of the crowd: a connection that does what a daemon does."""

    def __init__(self, name: str, broker: Address, prefix: str, number: int) -> None:
        self.name, self.broker, self.prefix = name, broker, prefix
        self.interval = max(OWN_INTERVAL, number / hive.MAX_BEATS)
        self.renewal = max(self.interval, number / hive.MAX_RENEWALS)
        self.began, self.seq, self.input = time.time(), 0, bytearray()
        self.next_beat = time.monotonic() + self.interval * random.random()
        self.connect()

    def connect(self) -> None:
        """Come, or come back; raises OSError."""
        self.sock = socket.create_connection(self.broker, 10)
        self.input.clear()
        topic = f"{self.prefix}/meta/{self.name}/state"
        will = Publish(topic, self.state("offline"), 1, True)
        roster = {"node": self.name, "agents": [], "handlers": ["ping"]}
        roster["version"] = hive.__version__
        self.sock.sendall(
            connect_packet(5, f"hive-{self.name}", False, KEEPALIVE, will, session_expiry=60)
            + self.document("roster", json.dumps(roster).encode())
            + self.document("state", self.state("online"))
        )

    def subscribe(self) -> None:
        """What is retained does not come to the crowd: a million documents tell nothing here."""
        filters = [(f"{self.name}/+", 1), ("all/+", 1), ("meta/+/state", 0), ("meta/+/roster", 0)]
        self.sock.sendall(
            subscribe_packet(*[(f"{self.prefix}/{one}", qos | NOT_KEPT) for one, qos in filters])
        )
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
            "interval": self.renewal,
            "miss_threshold": MISSED,
            "version": hive.__version__,
            "oc": {},
            "counters": {},
            "instance": self.name,
        }
        return json.dumps(
            hive.with_reason(said, "connection lost" * (status == "offline"))
        ).encode()

    def turn(self) -> float:
        """A heartbeat where it is time, else a ping; when the next of them is due."""
        now = time.monotonic()
        if now >= self.next_beat:
            self.next_beat += self.interval
            self.beat()
        else:
            self.sock.sendall(b"\xc0\0")
        return min(self.next_beat, now + KEEPALIVE / 2)

    def beat(self) -> None:
        """A heartbeat; and now and then, the state."""
        self.seq += 1
        said = {"node_id": self.name, "interval": self.interval, "boot": self.name, "seq": self.seq}
        text = json.dumps({**said, "uptime_s": time.time() - self.began, "load_1m": 0.1})
        envelope = Envelope.new(self.name, "all", "heartbeat", text, urgency="later").encode()
        packet = publish_packet(f"{self.prefix}/all/heartbeat", envelope)
        if self.seq % int((MISSED - 1) * self.renewal / self.interval) == 1:
            packet += self.document("state", self.state("online"))
        self.sock.sendall(packet)

    def ready(self) -> None:
        """Take what has come: acknowledge it, and answer commands.  OSError: it is over."""
        said = self.sock.recv(1 << 18)
        if not said:
            raise ConnectionError
        self.input += said
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
                    answers += self.answer(bytes(self.input[body:end]))
            at = end
        del self.input[:at]
        if answers:
            self.sock.sendall(answers)

    def answer(self, body: bytes) -> bytes:
        envelope = Envelope.parse(body[body.index(b"{") :])
        reply = envelope.reply(self.name, "pong").encode()
        self.seq += 1
        topic = f"{self.prefix}/{envelope.sender}/response"
        return publish_packet(topic, reply, 1, self.seq % 65535 + 1)


def crowd(broker: Address, prefix: str, names: Sequence[str], number: int) -> None:
    """Be these nodes of a hive of so many, until SIGTERM; says when all are there."""
    selector = selectors.DefaultSelector()
    nodes = [Node(name, broker, prefix, number) for name in names]
    due: list[tuple[float, int]] = []
    for n, node in enumerate(nodes):
        node.subscribe()
        selector.register(node.sock, selectors.EVENT_READ, n)
        heapq.heappush(due, (min(node.next_beat, time.monotonic() + 1.0), n))
    print("there", flush=True)
    gone = set[int]()
    while True:
        for key, _ in selector.select(max(0.0, due[0][0] - time.monotonic())):
            try:
                nodes[key.data].ready()
            except BlockingIOError:
                pass
            except OSError:
                selector.unregister(key.fileobj)
                nodes[key.data].sock.close()
                gone.add(key.data)
        while due[0][0] <= time.monotonic():
            _, n = heapq.heappop(due)
            again = time.monotonic() + 1.0 + random.random()
            with contextlib.suppress(OSError):
                if n in gone:
                    nodes[n].connect()
                    nodes[n].subscribe()
                    selector.register(nodes[n].sock, selectors.EVENT_READ, n)
                    gone.remove(n)
                again = nodes[n].turn()
            heapq.heappush(due, (again, n))


@contextlib.contextmanager
def crowd_of(
    broker: Address, names: Sequence[str], number: int, inside: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    line = [*inside, sys.executable, __file__, "--crowd", broker[0], *map(str, (broker[1], number))]
    others = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert others.stdin and others.stdout
    others.stdin.write(json.dumps([*names]))
    others.stdin.close()
    try:
        assert others.stdout.readline() == "there\n"
        yield others
        assert others.poll() is None, "the crowd is gone"
    finally:
        others.kill()
        others.wait()


# ---- The measurement ---------------------------------------------------------------------


def cpu(*pids: int) -> float:
    """Seconds of CPU that these processes have used."""
    used = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used += int(fields[11]) + int(fields[12])
    return used / TICKS


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


def used(pid: int, seconds: float) -> float:
    """Share of a core that a process takes meanwhile."""
    before = cpu(pid)
    time.sleep(seconds)
    return (cpu(pid) - before) / seconds


BARE = """
import json, sys
import paho.mqtt.client as mqtt
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
client.on_message = lambda client, userdata, message: json.loads(message.payload)
client.connect("127.0.0.1", int(sys.argv[1]))
client.subscribe([("hive/all/+", 1), ("hive/meta/+/state", 0), ("hive/meta/+/roster", 0)])
client.loop_forever()
"""


@contextlib.contextmanager
def fleet_of(home: Path) -> Iterator[Hive]:
    """A hive at a Mosquitto that saves as `hive host` has it; nothing of it is left behind."""
    broker = Broker(home / "broker", start=False)
    rules = broker.home / "mosquitto.conf"
    lazily = rules.read_text().replace("on_changes true", "on_changes false")
    rules.write_text(lazily.replace("autosave_interval 1", "autosave_interval 2"))
    broker.start()
    fleet = Hive(home / "hive", broker, "hive", interval=OWN_INTERVAL)
    try:
        yield fleet
    finally:
        for one in fleet.nodes.values():
            if one.process:
                one.process.kill()  # one that is frozen hears nothing else
        fleet.close()
        broker.stop(signal.SIGKILL)


def real(fleet: Hive, *names: str) -> list[Daemon]:
    nodes = [fleet.node(name) for name in names]
    for one in nodes:
        one.config.write_text(one.config.read_text().replace('"debug"', '"info"'))
        one.handler("ping", "#!/bin/sh\necho pong\n")
    return nodes


def measure(number: int, seconds: float) -> dict[str, Any]:
    names = [f"web-{n:04}" for n in range(number - 3)]
    with contextlib.ExitStack() as ending:
        home = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="hive-fleet-")))
        fleet = ending.enter_context(fleet_of(home))
        broker = fleet.broker
        others = ending.enter_context(crowd_of((LOOPBACK, broker.port), names, number))
        nodes = real(fleet, "alpha", "beta", "gamma")
        for one in nodes:
            one.start()
        bare = subprocess.Popen([sys.executable, "-c", BARE, str(broker.port)])
        ending.callback(bare.kill)
        time.sleep(30)  # until those that are real have found their pace
        pids = [nodes[0].pid, broker.pid, others.pid, bare.pid]
        before = [cpu(pid) for pid in pids]
        time.sleep(seconds)
        spent = [(cpu(pid) - one) / seconds for pid, one in zip(pids, before, strict=True)]
        memory = [resident(pid) for pid in pids]
        bare.kill()
        bare.wait()
        took, answers = answered(fleet, number)
        killed = noticed(nodes[0], nodes[1], signal.SIGKILL)
        frozen = noticed(nodes[0], nodes[2], signal.SIGSTOP)
        time.sleep(12)
        return {
            "what": "hive",
            "nodes": number,
            "cpu": spent[0] * 60_000,
            "memory": memory[0],
            "broker": spent[1] * 100,
            "broker_memory": memory[1],
            "crowd": spent[2] * 100,
            "bare": spent[3] * 60_000,
            "killed": killed,
            "frozen": frozen,
            "answered": took,
            "answers": answers,
            "alerts": len(nodes[0].events("sent", ch="alert")),
        }


# ---- Serf --------------------------------------------------------------------------------


class Agent:
    """One of Serf's, at an address of its own."""

    def __init__(self, number: int, home: Path) -> None:
        self.name, self.address = (
            f"web-{number:04}",
            f"127.0.{1 + number // 250}.{number % 250 + 1}",
        )
        self.log = home / self.name
        line = ["serf", "agent", f"-node={self.name}", f"-bind={self.address}:7946"]
        line += [f"-rpc-addr={self.address}:7373", "-log-level=info"]
        if number:
            line.append("-retry-join=127.0.1.1")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(line, stdout=log, stderr=log)

    def says(self, *words: str) -> bool:
        return all(word in self.log.read_text() for word in words)

    def members(self) -> int:
        """How many it knows, and takes for alive."""
        line = ["serf", "members", f"-rpc-addr={self.address}:7373", "-status=alive"]
        return subprocess.run(line, capture_output=True, text=True).stdout.count("alive")

    def noticed(self, gone: Agent, number: int) -> float:
        gone.process.send_signal(number)
        return until("Serf misses it", lambda: self.says(f"EventMemberFailed: {gone.name} "))

    def query(self, number: int) -> tuple[float, int]:
        """Seconds until all, or as many as will, have acknowledged a question; how many did."""
        line = ["serf", "query", f"-rpc-addr={self.address}:7373", "-timeout=30s", "ping"]
        began, heard, took = time.monotonic(), 0, 0.0
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as asking:
            for said in asking.stdout or ():
                if said.startswith("Ack from"):
                    heard, took = heard + 1, time.monotonic() - began
                if heard == number:
                    asking.kill()
        return took, heard


def serf_room() -> int:
    """How many of its agents the machine carries."""
    free = int(re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[0]) // 1024
    return min(free // SERF_MEMORY, SERF_A_CORE * (os.cpu_count() or 1))


def serf(number: int, seconds: float) -> dict[str, Any]:
    with contextlib.ExitStack() as ending:
        home = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="hive-serf-")))
        agents = list[Agent]()
        for n in range(number):
            agents.append(Agent(n, home))
            ending.callback(agents[-1].process.wait)
            ending.callback(agents[-1].process.kill)
            if n == 0:
                until("Serf listens", lambda: agents[0].members() == 1)
            time.sleep(0.02)
        until("all are there", lambda: agents[0].members() == number, 300.0)
        time.sleep(20)
        pids = [one.process.pid for one in agents]
        before, began = cpu(*pids), time.monotonic()
        time.sleep(seconds)
        spent = (cpu(*pids) - before) / (time.monotonic() - began) / number
        memory = sum(map(resident, pids)) / number
        took, answers = agents[0].query(number)
        return {
            "what": "Serf",
            "nodes": number,
            "cpu": spent * 60_000,
            "memory": memory,
            "answered": took,
            "answers": answers,
            "killed": agents[0].noticed(agents[1], signal.SIGKILL),
            "frozen": agents[0].noticed(agents[2], signal.SIGSTOP),
        }


# ---- The scenario ------------------------------------------------------------------------


class Site:
    """Machines at the other end of a cable: a network namespace, and a link that can be cut."""

    def __init__(self) -> None:
        self._space, self._end = f"hive-far-{os.getpid()}", f"hive{os.getpid()}"
        self.here, there = "10.79.0.1", "10.79.0.2"
        self.inside = ["ip", "netns", "exec", self._space]
        ip("netns", "add", self._space)
        ip("link", "add", self._end, "type", "veth", "peer", "far", "netns", self._space)
        ip("address", "add", f"{self.here}/30", "dev", self._end)
        ip("-n", self._space, "address", "add", f"{there}/30", "dev", "far")
        for link in ("lo", "far"):
            ip("-n", self._space, "link", "set", link, "up")
        self.mend()

    def cut(self) -> None:
        ip("link", "set", self._end, "down")

    def mend(self) -> None:
        ip("link", "set", self._end, "up")

    def close(self) -> None:
        ip("netns", "del", self._space)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def scenario(number: int, minutes: float) -> list[str]:
    """What was said of whom, in a hive of real daemons and a crowd."""
    far = [f"far-{n:02}" for n in range(10)]
    near = [f"web-{n:04}" for n in range(number - len(far) - 5)]
    part = minutes * 60 / 4
    with contextlib.ExitStack() as ending:
        home = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="hive-fleet-")))
        fleet = ending.enter_context(fleet_of(home))
        broker = fleet.broker
        site = ending.enter_context(contextlib.closing(Site()))
        broker.stop()
        rules = broker.home / "mosquitto.conf"
        rules.write_text(f"listener {broker.port} {site.here}\n{rules.read_text()}")
        broker.start()
        ending.enter_context(crowd_of((LOOPBACK, broker.port), near, number))
        ending.enter_context(crowd_of((site.here, broker.port), far, number, site.inside))
        nodes = real(fleet, "alpha", "beta", "delta", "gamma", "omega")
        _, beta, _, gamma, omega = nodes
        text = beta.config.read_text()
        beta.config.write_text(text.replace("[mqtt]", f'[mqtt]\nhost = "{site.here}"'))
        clock = home / "clock"
        clock.write_text("0")
        change = (
            f"right = time.time; time.time = lambda: right() + float(open({str(clock)!r}).read())"
        )
        for one in nodes:
            program = fleet.program
            if one is beta:
                fleet.program = [*site.inside, *program]
            elif one is omega:
                code = CHANGED.format(change=change)
                fleet.program = [sys.executable, "-c", code, str(Path(hive.__file__).parent)]
            one.start()
            fleet.program = program
        time.sleep(30)
        broker.stop()
        time.sleep(part / 4)
        broker.start()
        time.sleep(part * 3 / 4)
        site.cut()
        time.sleep(part / 2)
        site.mend()
        time.sleep(part / 2)
        gamma.process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]
        time.sleep(part * 2 / 3)  # ten minutes of sixty
        gamma.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
        time.sleep(part / 3)
        clock.write_text("-3600")
        time.sleep(part)
        away = {*far, "beta", "gamma"}  # of whom a loss may be told
        said = list[str]()
        for one in nodes:
            ids = [row["corr"] for row in one.events("sent", ch="alert")]
            lost = [row["peer"] for row in one.events("peer is lost")]
            for name in sorted({id.removeprefix("lost:") for id in ids}):
                said.append(f"{'' if name in away else 'FALSE: '}{one.name} alerts: {name} is lost")
            doubted = {*lost} - away - {id.removeprefix("lost:") for id in ids}
            said.append(f"{one.name} took {len(doubted)} others for lost, and told nobody")
            assert not one.events("bug"), one.events("bug")
        return said


# ---- What is shown -----------------------------------------------------------------------

COLUMNS: Sequence[tuple[str, str, str]] = (
    ("what", "", "{}"),
    ("nodes", "nodes", "{}"),
    ("cpu", "CPU of a node, ms a minute", "{:.0f}"),
    ("memory", "memory of a node, MB", "{:.1f}"),
    ("killed", "killed: missed after, s", "{:.1f}"),
    ("frozen", "frozen: missed after, s", "{:.1f}"),
    ("answered", "all have answered after, s", "{:.1f}"),
    ("answers", "of them", "{}"),
    ("alerts", "alerts sent", "{}"),
    ("broker", "Mosquitto, % of a core", "{:.1f}"),
    ("broker_memory", "MB", "{:.1f}"),
    ("crowd", "crowd, % of a core", "{:.1f}"),
    ("bare", "bare paho, ms a minute", "{:.0f}"),
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    heads = [head for _, head, _ in COLUMNS]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [how.format(row[key]) if key in row else "-" for key, _, how in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


PANELS = ("cpu", "memory", "broker", "killed", "frozen", "answered")
STYLE = """
text { font: 11px system-ui, sans-serif; fill: #57606a } .title { font-weight: 600; fill: #1f2328 }
.grid { stroke: #d0d7de } .hive { stroke: #0969da; fill: #0969da } .Serf { stroke: #bc4c00;
fill: #bc4c00 } polyline { fill: none !important; stroke-width: 2 } .Serf polyline {
stroke-dasharray: 5 3 } g text { stroke: none; fill: inherit }
@media (prefers-color-scheme: dark) { text { fill: #9198a1 } .title { fill: #f0f6fc }
.grid { stroke: #3d444d } .hive { stroke: #4493f8; fill: #4493f8 } .Serf { stroke: #f0883e;
fill: #f0883e } }
"""


def plot(rows: Sequence[dict[str, Any]]) -> str:
    """One small picture for each figure, over the number of nodes; for light and dark pages."""
    import math

    width, height, left, top = 250, 150, 14, 34
    sizes = sorted({row["nodes"] for row in rows})
    low, high = math.log(sizes[0]), math.log(max(sizes[-1], sizes[0] + 1))
    titles = {key: head for key, head, _ in COLUMNS}
    hows = {key: how for key, _, how in COLUMNS}
    drawn = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * width} {2 * height}">']
    drawn.append(f"<style>{STYLE}</style>")
    for number, key in enumerate(PANELS):
        x0, y0 = number % 3 * width + left, number // 3 * height + top
        wide, tall = width - 70, height - top - 30
        most = max([row[key] for row in rows if key in row] or [1.0]) or 1.0
        title = f"{key}: {titles[key]}" if key == "broker" else titles[key]
        title = title.removeprefix("broker: ")
        drawn.append(f'<text class="title" x="{x0}" y="{y0 - 18}">{title}</text>')
        drawn.append(f'<path class="grid" d="M{x0} {y0 + tall}h{wide}"/>')
        for size in (sizes[0], sizes[-1]):
            x = x0 + wide * (math.log(size) - low) / (high - low)
            drawn.append(f'<text x="{x:.0f}" y="{y0 + tall + 14}">{size}</text>')
        for what in ("hive", "Serf"):
            points = [
                (x0 + wide * (math.log(row["nodes"]) - low) / (high - low), row[key])
                for row in rows
                if row["what"] == what and key in row
            ]
            if points:
                placed = [(x, y0 + tall * (1 - value / most)) for x, value in points]
                line = " ".join(f"{x:.0f},{y:.0f}" for x, y in placed)
                dots = "".join(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3"/>' for x, y in placed)
                x, y = placed[-1]
                y -= 4 if points[-1][0] < x0 + wide else -4  # above the other's line
                said = hows[key].format(points[-1][1])
                label = f'<text x="{x + 6:.0f}" y="{y:.0f}">{what} {said}</text>'
                drawn.append(f'<g class="{what}"><polyline points="{line}"/>{dots}{label}</g>')
    return "\n".join([*drawn, "</svg>", ""])


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", default="")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--scenario", type=float, metavar="MINUTES")
    parser.add_argument("--plot", type=Path)
    said = parser.parse_args(arguments)
    if said.scenario:
        lines = scenario(int(said.nodes or 500), said.scenario)
        print("\n".join(lines))
        return print(f"false alerts: {sum('FALSE' in line for line in lines)}")
    numbers = [int(one) for one in (said.nodes or "10,100,1000").split(",")]
    work = [(measure, number) for number in numbers]
    if shutil.which("serf"):
        room = serf_room()
        work += [(serf, number) for number in sorted({min(one, room) for one in numbers})]
    rows = list[dict[str, Any]]()
    print(table([]), flush=True)
    for way, number in work:
        rows.append(way(number, said.seconds))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    if not shutil.which("serf"):
        print("Serf is not here to be measured beside it: apt-get install serf")
    if said.plot:
        said.plot.write_text(plot(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--crowd"]:
        address = (sys.argv[2], int(sys.argv[3]))
        crowd(address, "hive", json.load(sys.stdin), int(sys.argv[4]))
    main(sys.argv[1:])
