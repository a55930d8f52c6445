"""How soon a real agent reads a message, for each way in, and what it costs the machine.

OPENCLAW_BIN=... python tests/bench_openclaw.py [RUNS]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import Broker, Hive, answers, eventually
from real_openclaw import SLOW, Gateway

TURNS_A_MINUTE = 5  # OpenClaw defers the sixth


def cpu_seconds(pid: int) -> float:
    """Of a process and of its children that have ended (Linux only)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def times_read(gateway: Gateway, text: str) -> int:
    return gateway.model.lines_read().count(json.dumps(text))


def one_by_one(hive: Hive, gateway: Gateway, via: str, runs: int) -> None:
    reads, returns, cpus = [], [], []
    for run in range(runs):
        beta = hive.node(f"{via}{run}", gateway.instance(via=via, hook_token="hook-red")).start()
        text = f"{via} {run}"
        before, began = cpu_seconds(beta.pid), time.monotonic()
        sent = hive.cli("alpha", "send", "--to", beta.name, "--text", text, "--json")
        eventually("it is read", lambda t=text: times_read(gateway, t), SLOW)  # type: ignore[misc]
        reads.append(time.monotonic() - began)
        eventually("woken", lambda b=beta: b.events("agent woken"), SLOW)  # type: ignore[misc]
        returns.append(time.monotonic() - began)
        cpus.append(cpu_seconds(beta.pid) - before)
        assert json.loads(sent.stdout)["text"] == text
        beta.stop()
        time.sleep(max(0.0, 60.0 / TURNS_A_MINUTE + 1 - (time.monotonic() - began)))
    read, back, cpu = map(statistics.median, (reads, returns, cpus))
    print(
        f"{via:6} in the prompt after {read:6.2f} s, call returned after {back:6.2f} s,"
        f" {cpu:5.2f} CPU seconds for each message  (medians of {runs})",
        flush=True,
    )


def burst(hive: Hive, gateway: Gateway, via: str, size: int) -> None:
    beta = hive.node(f"{via}-burst", gateway.instance(via=via, hook_token="hook-red")).start()
    before, began = cpu_seconds(beta.pid), time.monotonic()
    line = hive.command_line("alpha", "send", "--to", beta.name, "--text")
    sending = [
        subprocess.Popen(
            [*line, f"{via} burst {i}"], env=hive.environment, stdout=subprocess.DEVNULL
        )
        for i in range(size)
    ]
    assert not any([one.wait() for one in sending])
    sent = time.monotonic() - began
    for i in range(size):
        eventually("it is read", lambda i=i: times_read(gateway, f"{via} burst {i}"), 600)  # type: ignore[misc]
    last = time.monotonic() - began
    cpu = (cpu_seconds(beta.pid) - before) / size
    counts = [times_read(gateway, f"{via} burst {i}") for i in range(size)]
    beta.stop()
    print(
        f"{via:6} burst of {size}: sent in {sent:.2f} s, all in prompts after {last:6.2f} s,"
        f" {cpu:5.2f} CPU seconds for each message, read {min(counts)} to {max(counts)} times",
        flush=True,
    )
    time.sleep(60)


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    with tempfile.TemporaryDirectory() as folder:
        broker = Broker(Path(folder) / "broker")
        gateway = Gateway(Path(folder) / "openclaw", "red")
        hive = Hive(Path(folder), broker, "bench", interval=5.0)
        hive.environment |= gateway.environment
        try:
            gateway.start()
            eventually("the gateway listens", lambda: answers(gateway.port), SLOW)
            hive.node("alpha").start()
            for via in ("chat", "hook", "call", "cli", "agent"):
                one_by_one(hive, gateway, via, runs)
            for via in ("chat", "hook", "call", "cli"):
                burst(hive, gateway, via, 30)
        finally:
            hive.close()
            gateway.stop()
            broker.stop()


if __name__ == "__main__":
    main()
