"""How many messages a second a daemon takes in, and how long a command needs to send one.

python tests/bench_journal.py [RUNS]

20,000 envelopes of 300 bytes at QoS 1, published faster than anybody reads them: into a daemon
with its journal on disk, into one that has no disk, and into a bare paho subscriber, in turn and
on one broker; from the first that arrives to the last.  Then `send` as whole processes.

Where valgrind is installed: how many instructions a message costs the daemon, beside the commit
before senders were checked.  Nothing else that runs on the machine changes that number.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import checkout, show, timed
from conftest import ROOT, Broker, Daemon, Hive, eventually

import hive

MESSAGES = 20_000
SIZE = 300  # bytes of an envelope
BASE = "e452453"  # before senders were checked
COUNTED = 1500  # messages whose instructions are counted
SLOWLY = 300.0  # seconds for whatever valgrind runs

SUBSCRIBER = """
import json, sys, time
import paho.mqtt.client as mqtt
port, topic, last = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
times = []
def heard(client, userdata, message):
    json.loads(message.payload)
    times.append(time.time())
    if len(times) == last:
        client.disconnect()
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
client.on_message = heard
client.on_subscribe = lambda *_: print("ready", flush=True)
client.connect("127.0.0.1", port)
client.subscribe(topic, 1)
client.loop_forever()
print(times[-1] - times[0])
"""


class QuickBroker(Broker):
    """One that does not save: what is measured is who reads, not how Mosquitto writes."""

    def start(self) -> None:
        file = self.home / "mosquitto.conf"
        lines = file.read_text().splitlines()
        file.write_text(
            "\n".join(line for line in lines if not line.startswith(("persistence", "autosave")))
        )
        super().start()


def packet(kind: int, body: bytes) -> bytes:
    """An MQTT packet: kind, length, body."""
    left, length = len(body), bytearray()
    while not length or left:
        left, digit = divmod(left, 128)
        length.append(digit | (0x80 if left else 0))
    return bytes([kind]) + bytes(length) + body


def field(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


def flood_of(topic: str, run: str, messages: int = MESSAGES) -> bytes:
    """All packets at once, encoded before the clock runs."""
    packets, to = [], topic.split("/")[-2]
    for number in range(messages):
        envelope = hive.Envelope.new(
            "flood", to, "sync", "x", id=f"{run}-{number}", urgency="later"
        )
        missing = SIZE - len(envelope.encode())
        payload = envelope.replace(text="x" * (missing + 1)).encode()
        mid = (number % 65535 + 1).to_bytes(2, "big")
        packets.append(packet(0x32, field(topic.encode()) + mid + payload))
    return b"".join(packets)


def flood(port: int, packets: bytes, messages: int = MESSAGES) -> None:
    """Publish them as fast as the broker takes them; MQTT 3.1.1 knows no window for that."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(packet(0x10, field(b"MQTT") + b"\x04\x02\x00\x00" + field(b"flood")))
        sock.recv(4)  # CONNACK

        def read() -> None:
            left = messages * 4  # bytes of PUBACKs
            while left > 0 and (data := sock.recv(65536)):
                left -= len(data)

        reader = threading.Thread(target=read)
        reader.start()
        sock.sendall(packets)
        reader.join()


def rows(daemon: Daemon, **request: int) -> list[dict[str, Any]]:
    """Rows of its journal, wherever that is."""
    config = hive.load_config(str(daemon.config))
    answer = hive.look_up(config, {"do": "log", "filters": {"from": "flood"}, **request})
    return list(answer["rows"])


def into_daemon(daemon: Daemon, run: str) -> float:
    """Messages a second: between the times that its journal has for the first and the last."""
    before = rows(daemon, last=1)
    seen = int(before[0]["n"]) if before else 0
    packets = flood_of(f"{daemon.hive.prefix}/beta/sync", run)
    flood(daemon.hive.broker.port, packets)

    def complete() -> float:
        time.sleep(0.2)  # asking costs it time
        last = rows(daemon, last=1)
        whole = bool(last) and last[0]["id"] == f"{run}-{MESSAGES - 1}"
        return float(last[0]["time"]) if whole else 0.0

    ended = eventually("all have arrived", complete)
    first = rows(daemon, after=seen)[0]
    assert first["id"] == f"{run}-0", first
    return (MESSAGES - 1) / (ended - float(first["time"]))


def into_paho(hive_: Hive, run: str) -> float:
    """The same with paho as it comes, its own loop, and JSON read."""
    topic = f"{hive_.prefix}/paho/sync"
    packets = flood_of(topic, run)
    child = subprocess.Popen(
        [sys.executable, "-c", SUBSCRIBER, str(hive_.broker.port), topic, str(MESSAGES)],
        stdout=subprocess.PIPE,
    )
    assert child.stdout
    with child.stdout as said:
        assert said.readline() == b"ready\n"
        flood(hive_.broker.port, packets)
        took = float(said.readline())
    child.wait()
    return (MESSAGES - 1) / took


def throughput(hive_: Hive, runs: int) -> None:
    beta = hive_.nodes["beta"]
    state = beta.home / "state"

    def without_disk() -> None:
        (state / "journal.sqlite3").mkdir(parents=True)  # no file can be where a directory is
        beta.start()
        beta.logged("cannot write, going on in memory")

    ways: dict[str, Callable[[int], float]] = {}
    ways["bare paho subscriber, JSON read"] = lambda run: into_paho(hive_, f"paho-{run}")
    ways["daemon, journal on disk"] = lambda run: into_daemon(beta, f"disk-{run}")
    ways["daemon, journal in memory"] = lambda run: into_daemon(beta, f"memory-{run}")
    found: dict[str, list[float]] = {way: [] for way in ways}
    for run in range(runs):
        for way, measure in ways.items():
            if way == "daemon, journal on disk":
                beta.start()
            elif way == "daemon, journal in memory":
                without_disk()
            found[way].append(measure(run))
            if "daemon" in way:
                beta.stop()
                state.rename(beta.home / f"state-{way[-4:]}-{run}")
    for way, rates in found.items():
        spread = f"({min(rates):7.0f} to {max(rates):7.0f})"
        print(f"{way:46} {statistics.median(rates):8.0f} /s   {spread}")


def sends(hive_: Hive, runs: int) -> None:
    """Whole processes in turn."""
    to_beta = ("send", "--to", "beta", "--ch", "status", "--text", "x")
    commands = {
        "python3 -c pass": [sys.executable, "-c", "pass"],
        "hive-cli send, through the door": hive_.command_line("alpha", *to_beta),
        "hive-cli send --direct": hive_.command_line("alpha", *to_beta, "--direct"),
    }
    times: dict[str, list[float]] = {what: [] for what in commands}
    for run in range(runs + 1):
        for what, line in commands.items():
            took = timed(
                partial(
                    subprocess.run, line, check=True, capture_output=True, env=hive_.environment
                )
            )
            if run:  # the first one warms up
                times[what].append(took)
    base = statistics.median(times["python3 -c pass"])
    for what, each in times.items():
        show(what, each, base)


def instructions(node: Daemon, messages: int) -> int:
    """How many a daemon's life takes in which so many messages come."""
    state, said = node.home / "state", node.home / "valgrind"
    node.start(wait=False)
    eventually("it is up", lambda: node.events("connected"), SLOWLY)
    topic = f"{node.hive.prefix}/{node.name}/sync"
    flood(node.hive.broker.port, flood_of(topic, "counted", messages), messages)

    def complete() -> bool:
        with contextlib.closing(sqlite3.connect(state / "journal.sqlite3")) as database:
            return bool(database.execute("SELECT count(*) = ? FROM log", (messages,)).fetchone()[0])

    eventually("all have arrived", complete, SLOWLY)
    assert node.process
    node.process.terminate()
    node.process.wait(SLOWLY)
    shutil.rmtree(state)
    node.log_file.unlink()
    (counted,) = re.findall(r"I\s+refs:\s+([\d,]+)", said.read_text())
    return int(counted.replace(",", ""))


def count_instructions(folder: Path, broker: Broker) -> None:
    valgrind = shutil.which("valgrind")
    if not valgrind:
        return print("instructions are not counted: apt-get install valgrind")
    (folder / "base").mkdir(parents=True)
    trees = {"now": ROOT, BASE: checkout(BASE, folder / "base")}
    hive_ = Hive(folder, broker, "counted", interval=3600.0)
    hive_.environment = {k: v for k, v in hive_.environment.items() if not k.startswith("PYTHON")}
    try:
        for name, tree in trees.items():
            if tree:
                node = hive_.node(name)
                node.config.write_text(node.config.read_text().replace('"debug"', '"info"'))
                own = [sys.executable, str(tree / "hive-cli")]
                subprocess.run([*own, "--version"], env=hive_.environment, capture_output=True)
                tool = [valgrind, "--tool=cachegrind", "--cache-sim=no"]
                files = ("--cachegrind-out-file=/dev/null", f"--log-file={node.home}/valgrind")
                hive_.program = [*tool, *files, *own]
                each = (instructions(node, COUNTED) - instructions(node, 0)) / COUNTED
                print(f"instructions for each message, {name:25} {each:8.0f}")
    finally:
        hive_.close()


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as folder:
        broker = QuickBroker(Path(folder) / "broker")
        hive_ = Hive(Path(folder), broker, "bench", interval=5.0)
        hive_.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        try:
            alpha, beta = hive_.node("alpha"), hive_.node("beta")
            hive_.cli("alpha", "--version")  # whoever comes first compiles hive.py for all
            for node in (alpha, beta):
                said = node.config.read_text().replace('"debug"', '"info"')
                said = said.replace("[node]\n", "[node]\nsender_burst = 1000000\n")
                node.config.write_text(said)
            print(
                f"python {sys.version.split()[0]}, {os.cpu_count()} cores,"
                f" {MESSAGES} messages of {SIZE} bytes, {runs} runs, medians"
            )
            throughput(hive_, runs)
            alpha.start()
            beta.start()
            sends(hive_, max(runs, 11))
            assert json.loads(hive_.cli("alpha", "status", "--json").stdout)
            hive_.close()
            count_instructions(Path(folder) / "counted", broker)
        finally:
            hive_.close()
            broker.stop()


if __name__ == "__main__":
    main()
