"""What the embedded broker does, beside Mosquitto in the same run.

python tests/bench_broker.py [SECONDS of each measurement]
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import ROOT, find_program, free_port
from raw_mqtt import Raw, publish_packet

import hive
from hive import PacketType

KEPT = {"clean": False, "session_expiry": 3600}
WINDOW = 100  # messages under way when throughput is measured
PAYLOAD = b"x" * 300  # bytes, as of an envelope


class Subject:
    """A broker as a process, with a unix socket and a TCP port, in a folder of its own."""

    def __init__(self, home: Path, *command: str) -> None:
        self.home, self.command = home, command
        self.port, self.socket = free_port(), home / "socket"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Milliseconds from starting the process to the CONNACK of the first client."""
        began = time.perf_counter()
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=self.home)
        while True:
            try:
                client = Raw(self.port)
                break
            except ConnectionRefusedError:
                assert time.perf_counter() - began < 30
                time.sleep(0.001)
        client.connect("first")
        took = (time.perf_counter() - began) * 1000
        client.close()
        return took

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process:
            self.process.send_signal(number)
            self.process.wait()
            self.process = None

    @property
    def memory(self) -> float:
        """MB that are resident (Linux only)."""
        assert self.process
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024


def ours(home: Path) -> Subject:
    subject = Subject(home)
    (home / "hive.toml").write_text(
        f'[broker]\nsocket = "socket"\nstate_dir = "state"\n'
        f'listen = "127.0.0.1:{subject.port}"\nanonymous = true\n'
    )
    subject.command = (
        sys.executable,
        f"{ROOT}/hive-cli",
        "broker",
        "--config",
        str(home / "hive.toml"),
    )
    return subject


def mosquitto(home: Path, *settings: str) -> Subject:
    program = find_program("mosquitto")
    assert program, "Mosquitto is missing (apt-get install mosquitto)"
    subject = Subject(home, program, "-c", str(home / "mosquitto.conf"))
    lines = [
        f"listener {subject.port} 127.0.0.1",
        f"listener 0 {subject.socket}",
        "allow_anonymous true",
        "persistence true",
        f"persistence_location {home}/",
        "set_tcp_nodelay true",
        *(["user root"] if os.geteuid() == 0 else []),
        *settings,
    ]
    (home / "mosquitto.conf").write_text("\n".join(lines) + "\n")
    return subject


DURABLE = ("autosave_interval 1", "autosave_on_changes true", "max_queued_messages 0")


@contextmanager
def running(make: Callable[[Path], Subject]) -> Iterator[Subject]:
    with tempfile.TemporaryDirectory() as folder:
        subject = make(Path(folder))
        subject.start()
        try:
            yield subject
        finally:
            subject.stop(signal.SIGKILL)


def round_trips(where: Path | int, seconds: float, durable: bool = False) -> float:
    """Messages a second, at QoS 1 both ways, each sent when the one before has come back."""
    client = Raw(where)
    client.connect("echo", **(KEPT if durable else {}))
    client.subscribe(("echo", 1))
    until, trips = time.perf_counter() + seconds, 0
    while time.perf_counter() < until:
        client.publish("echo", PAYLOAD, qos=1)
        client.receive()
        trips += 1
    client.close()
    return trips / seconds


def throughput(where: Path | int, seconds: float, durable: bool) -> float:
    """Messages a second from one client to another at QoS 1, with many under way."""
    reader, sender = Raw(where), Raw(where)
    reader.connect("reader", receive_maximum=WINDOW, **(KEPT if durable else {}))
    sender.connect("sender")
    reader.subscribe(("flow", 1))
    packets = [publish_packet("flow", PAYLOAD, 1, n + 1) for n in range(WINDOW)]
    half = WINDOW // 2
    sender.send(*packets)
    until, arrived = time.perf_counter() + seconds, 0
    while time.perf_counter() < until:
        for part in (packets[:half], packets[half:]):
            acks = []
            for _ in part:
                message = reader.expect(PacketType.PUBLISH)
                acks.append(hive.encode_ack(PacketType.PUBACK, message.id, 0, 5))
            reader.send(*acks)
            for _ in part:
                sender.expect(PacketType.PUBACK)
            sender.send(*part)
            arrived += len(part)
    reader.close()
    sender.close()
    return arrived / seconds


def kept_after_kill(subject: Subject, total: int = 2000) -> tuple[int, int, int]:
    """Sent, acknowledged, and found again after SIGKILL."""
    reader, sender = Raw(subject.port), Raw(subject.port)
    reader.connect("away", **KEPT)
    reader.subscribe(("kept/#", 1))
    reader.close()
    time.sleep(1.5)  # every broker may put the subscription on disk
    sender.connect("sender")
    acknowledged = 0
    for n in range(1, total + 1):
        acknowledged += (
            sender.publish(f"kept/{n}", PAYLOAD, qos=1) < hive.ReasonCode.UNSPECIFIED_ERROR
        )
    subject.stop(signal.SIGKILL)
    subject.start()
    reader = Raw(subject.port)
    found = 0
    if reader.connect("away", **KEPT).present:
        reader.sock.settimeout(1.0)
        try:
            while True:
                reader.receive()
                found += 1
        except TimeoutError:
            pass
    reader.close()
    return total, acknowledged, found


def subjects() -> dict[str, Callable[[Path], Subject]]:
    return {
        "hive.py broker": ours,
        "mosquitto": mosquitto,
        "mosquitto, durable": lambda home: mosquitto(home, *DURABLE),
    }


def measure(name: str, make: Callable[[Path], Subject], seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subject = make(Path(folder))
        starts = []
        for _ in range(5):
            starts.append(subject.start())
            subject.stop()
    with running(make) as subject:
        memory = subject.memory if Path("/proc").exists() else 0.0
        figures = [
            round_trips(subject.socket, seconds),
            round_trips(subject.port, seconds),
            round_trips(subject.socket, seconds, durable=True),
            throughput(subject.socket, seconds, durable=False),
            throughput(subject.socket, seconds, durable=True),
        ]
    with running(make) as subject:
        kept = kept_after_kill(subject)
    start = statistics.median(starts)
    said = "".join(f"{figure:9.0f}" for figure in figures)
    print(f"{name:20}{start:6.0f}{memory:7.1f}{said}   {kept[0]} {kept[1]} {kept[2]}", flush=True)


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 3.0
    print(f"python {sys.version.split()[0]}, {os.cpu_count()} cores, QoS 1, {len(PAYLOAD)} bytes")
    print(
        "start: ms to the first CONNACK; idle: MB; round trips a second over unix, TCP, unix with\n"
        "a kept session; messages a second, without and with one; kill -9: sent, acked, found"
    )
    print(f"{'':20} start   idle     unix      TCP  +kept    flow    +kept   kill -9")
    for name, make in subjects().items():
        measure(name, make, seconds)


if __name__ == "__main__":
    main()
