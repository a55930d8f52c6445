"""How long things take: whole processes, medians, beside their peers in the same run.

python tests/bench.py [RUNS]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from conftest import Broker, Daemon, Hive, eventually, find_program

SLEEPY = "#!/bin/sh\nexec sleep 10\n"
PING = "#!/bin/sh\necho pong\n"


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def show(what: str, milliseconds: list[float], base: float | None = None) -> float:
    median = statistics.median(milliseconds)
    ratio = f"{median / base:6.1f} x" if base else ""
    spread = f"{min(milliseconds):8.1f} to {max(milliseconds):8.1f}"
    print(f"{what:46} {median:8.1f} ms   ({spread}) {ratio}")
    return median


def processes(hive: Hive, runs: int) -> None:
    """Whole processes in turn, so that a change of the machine's speed meets all of them."""
    pub = find_program("mosquitto_pub")
    assert pub
    plain = [pub, "-p", str(hive.broker.port), "-t", "bench/x", "-m", "x", "-q", "1"]
    to_beta = ("send", "--to", "beta", "--text", "x")
    commands = {
        "python3 -c pass": [sys.executable, "-c", "pass"],
        "mosquitto_pub -q 1": plain,
        "hive-cli send": hive.command_line("alpha", *to_beta),
        "hive-cli send --wait (sh handler)": hive.command_line(
            "alpha", *to_beta, "--action", "ping", "--wait", "10"
        ),
        "hive-cli status (two nodes)": hive.command_line("alpha", "status"),
        "hive-cli --version": hive.command_line("alpha", "--version"),
    }
    times: dict[str, list[float]] = {what: [] for what in commands}
    for run in range(runs + 1):
        for what, line in commands.items():
            took = timed(
                partial(subprocess.run, line, check=True, capture_output=True, env=hive.environment)
            )
            if run:  # the first one warms up
                times[what].append(took)
    base = statistics.median(times["python3 -c pass"])
    for what, each in times.items():
        show(what, each, base)


def starts(hive: Hive, runs: int) -> None:
    """From starting the daemon until the answer to a command that waited for it is seen."""
    gamma = hive.node("gamma")
    gamma.handler("ping", PING)
    gamma.start().stop()  # from now on the broker keeps what is sent to it
    sub = find_program("mosquitto_sub")
    assert sub
    where = ["-p", str(hive.broker.port), "-t", f"{hive.prefix}/nobody/response", "-C", "1"]
    took = []
    for _ in range(runs):
        message = ("--to", "gamma", "--action", "ping", "--text", "x", "--direct")
        hive.cli("alpha", "--node", "nobody", "send", *message)
        witness = subprocess.Popen([sub, *where, "-W", "30"], stdout=subprocess.DEVNULL)
        time.sleep(0.3)  # it must have subscribed; not part of what is measured
        began = time.perf_counter()
        gamma.start(wait=False)
        assert witness.wait() == 0
        took.append((time.perf_counter() - began) * 1000)
        gamma.stop()
    show("daemon: from start to its first answer", took)


def ping_beside_a_sleeper(hive: Hive, beta: Daemon, runs: int) -> None:
    line = hive.command_line(
        "alpha", "send", "--to", "beta", "--action", "ping", "--text", "x", "--wait", "9"
    )

    def ping() -> None:
        subprocess.run(line, check=True, capture_output=True, env=hive.environment)

    alone = [timed(ping) for _ in range(runs)]
    hive.cli("alpha", "send", "--to", "beta", "--action", "sleepy", "--text", "x")
    eventually("it sleeps", lambda: beta.events("handler started", action="sleepy"))
    beside = [timed(ping) for _ in range(runs)]
    assert not beta.events("handler ended", action="sleepy")
    base = show("ping, nothing else running", alone)
    show("ping, while a handler sleeps 10 s", beside, base)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle(daemon: Daemon, seconds: float) -> None:
    """Resident memory and CPU of an idle daemon (Linux only)."""
    before, began = cpu_seconds(daemon.pid), time.monotonic()
    time.sleep(seconds)
    used = (cpu_seconds(daemon.pid) - before) / (time.monotonic() - began) * 60
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    resident = int(
        next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]
    )
    print(f"{'idle daemon: memory':46} {resident / 1024:8.1f} MB")
    print(
        f"{'idle daemon: CPU a minute (10 ms steps)':46} {used * 1000:8.0f} ms   over {seconds:g} s"
    )


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    with tempfile.TemporaryDirectory() as folder:
        broker = Broker(Path(folder) / "broker")
        hive = Hive(Path(folder), broker, "bench", interval=5.0)
        try:
            alpha, beta = hive.node("alpha"), hive.node("beta")
            hive.cli("alpha", "--version")  # whoever comes first compiles hive.py for all
            for node in (alpha, beta):
                node.config.write_text(node.config.read_text().replace("'debug'", "'info'"))
                node.handler("ping", PING)
                node.handler("sleepy", SLEEPY)
                node.start()
            print(f"python {sys.version.split()[0]}, {os.cpu_count()} cores, {runs} runs, medians")
            processes(hive, runs)
            starts(hive, runs)
            ping_beside_a_sleeper(hive, beta, runs)
            if Path("/proc").exists():
                idle(alpha, 60.0)
            peers = json.loads(hive.cli("alpha", "status", "--json").stdout)
            assert [row["status"] for row in peers][:2] == ["online", "online"]
        finally:
            hive.close()
            broker.stop()


if __name__ == "__main__":
    main()
