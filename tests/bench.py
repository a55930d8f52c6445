"""How long things take: whole processes, medians, beside their peers in the same run.

What a start costs is CPU of the whole process, in turn with the same of an older commit.

python tests/bench.py [RUNS [BASE]]
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from conftest import ROOT, Broker, Daemon, Hive, eventually, find_program, program_at

BASE = "8360744"  # before a start was made cheaper

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


def checkout(commit: str, folder: Path) -> Path | None:
    """The program as it was at a commit; None, and a line, where the repository has it not."""
    if program_at(commit, folder):
        return folder
    print(f"there is no commit {commit} here: nothing is compared with it")
    return None


def cpu_of(line: list[str], environment: dict[str, str]) -> float:
    """Milliseconds of CPU that a whole process takes, its start and its end included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(line, check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000


def start_costs(hive: Hive, trees: dict[str, Path], runs: int) -> None:
    """CPU of whole processes and memory of idle daemons, of each tree in turn."""
    daemons: dict[tuple[str, str], Daemon] = {}
    for tree, folder in trees.items():
        for program in ("hive-cli", "hive.py"):
            hive.program = [sys.executable, str(folder / program)]
            daemons[tree, program] = node = hive.node(f"{tree}-{program.replace('.', '-')}")
            node.start().stop()  # compiles what is not
            node.start()

    def line(tree: str, program: str, *words: str) -> list[str]:
        named = ["--config", str(daemons[tree, "hive-cli"].config)]
        return [sys.executable, str(trees[tree] / program), *words, *named]

    send = ("send", "--to", "t1", "--ch", "status", "--urgency", "later", "--text", "x")
    commands = {
        "hive-cli --version": ("hive-cli", "--version"),
        "hive-cli send, a daemon runs": ("hive-cli", *send),
        "hive-cli status, a daemon runs": ("hive-cli", "status"),
        "python hive.py send": ("hive.py", *send),
    }
    lines = {("python3 -c pass", "now"): [sys.executable, "-c", "pass"]}
    lines |= {(what, t): line(t, *words) for what, words in commands.items() for t in trees}
    took: dict[tuple[str, str], list[float]] = {key: [] for key in lines}
    for _ in range(max(runs, 15)):
        for key, words in lines.items():
            took[key].append(cpu_of(words, hive.environment))
    print("CPU of whole processes, ms" + (", and of the base" if "base" in trees else ""))
    for what, tree in lines:
        if tree == "now":
            base = took.get((what, "base"))
            median = statistics.median(took[what, tree])
            compare(what, median, statistics.median(base) if base else None)
    if Path("/proc").exists():
        print(
            "resident memory of an idle daemon, MB"
            + (", and of the base" if "base" in trees else "")
        )
        kept = {key: resident(node) for key, node in daemons.items()}
        compare("hive-cli daemon", kept["now", "hive-cli"], kept.get(("base", "hive-cli")))
        compare("python hive.py daemon", kept["now", "hive.py"], kept.get(("base", "hive.py")))


def compare(what: str, value: float, base: float | None = None) -> None:
    beside = f"{base:8.1f}  {value / base:6.2f} x" if base else ""
    print(f"{what:38} {value:8.1f}  {beside}")


def measure_starts(folder: Path, broker: Broker, commit: str, runs: int) -> None:
    """Beside a base commit, where the repository has it."""
    (folder / "base").mkdir(parents=True)
    trees = {"now": ROOT}
    if base := checkout(commit, folder / "base"):
        trees["base"] = base
        print(f"the base is commit {commit}")
    hive = Hive(folder, broker, "starts", interval=5.0)
    hive.environment = {k: v for k, v in hive.environment.items() if not k.startswith("PYTHON")}
    try:
        start_costs(hive, trees, runs)
    finally:
        hive.close()


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


def resident(daemon: Daemon) -> float:
    """Megabytes of memory that it keeps (Linux only)."""
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def idle(daemon: Daemon, seconds: float) -> None:
    """Resident memory and CPU of an idle daemon (Linux only)."""
    before, began = cpu_seconds(daemon.pid), time.monotonic()
    time.sleep(seconds)
    used = (cpu_seconds(daemon.pid) - before) / (time.monotonic() - began) * 60
    print(f"{'idle daemon: memory':46} {resident(daemon):8.1f} MB")
    print(
        f"{'idle daemon: CPU a minute (10 ms steps)':46} {used * 1000:8.0f} ms   over {seconds:g} s"
    )


# What a server of the standard library alone must do before it can list a tool.
BARE_SERVER = """
import json, os, signal, socket, sys, threading, time
for line in sys.stdin.buffer:
    said = json.loads(line)
    result = {"tools": []} if said["method"] == "tools/list" else {"protocolVersion": "2025-11-25"}
    print(json.dumps({"jsonrpc": "2.0", "id": said["id"], "result": result}), flush=True)
"""
PACKAGE_SERVER = "from mcp.server import MCPServer; MCPServer('bare').run()"


class McpServer:
    """One that runs, and is spoken to line by line."""

    def __init__(self, line: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def ask(self, method: str, **params: object) -> str:
        assert self.process.stdin and self.process.stdout
        said = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        self.process.stdin.write(json.dumps(said).encode() + b"\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().decode()
        assert '"result"' in answer and '"isError":true' not in answer, answer
        return answer

    def tool(self, name: str, **arguments: object) -> str:
        return self.ask("tools/call", name=name, arguments=arguments)

    def list_tools(self) -> None:
        info = {"name": "bench", "version": "1"}
        hello = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": info}
        self.ask("initialize", **hello)
        self.ask("tools/list")

    @property
    def cpu(self) -> float:
        """Milliseconds that it has taken until now (Linux only)."""
        return int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[0]) / 1e6

    @property
    def resident(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def __enter__(self) -> McpServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # closes its stdin, which is its end


def mcp(hive: Hive, runs: int) -> None:
    """A session's server: its start beside a bare one's, its calls, its memory (Linux only)."""
    python = [sys.executable, "-c"]
    lines = {
        "bare Python": [*python, BARE_SERVER],
        "hive mcp": hive.command_line("alpha", "mcp"),
        "the mcp package": [*python, PACKAGE_SERVER],
    }
    took: dict[str, list[float]] = {who: [] for who in lines}
    for _ in range(max(runs, 15)):
        for who, line in lines.items():
            with McpServer(line, hive.environment) as server:
                server.list_tools()
                took[who].append(server.cpu)
    base = statistics.median(took["bare Python"])
    for who, each in took.items():
        show(f"MCP: CPU until tools/list, {who}", each, base)
    with McpServer(hive.command_line("alpha", "mcp"), hive.environment) as server:
        server.list_tools()
        server.tool("list_agents")
        calls: dict[str, dict[str, object]] = {
            "read_inbox": {},
            "list_agents": {},
            "send_message": {"to": "beta-session", "text": "x"},
            "ask": {"to": "beta", "action": "ping", "text": "x"},
        }
        with McpServer(
            hive.command_line("beta", "mcp", "--as=beta-session"), hive.environment
        ) as b:
            b.tool("list_agents")
            eventually("it is known", lambda: "beta-session" in server.tool("list_agents"))
            for name, arguments in calls.items():
                call = partial(server.tool, name, **arguments)
                show(f"MCP tool call: {name}", [timed(call) for _ in range(50)])
        print(f"{'MCP server: memory':46} {server.resident:8.1f} MB")


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    commit = sys.argv[2] if len(sys.argv) > 2 else BASE
    with tempfile.TemporaryDirectory() as folder:
        broker = Broker(Path(folder) / "broker")
        hive = Hive(Path(folder), broker, "bench", interval=5.0)
        try:
            alpha, beta = hive.node("alpha"), hive.node("beta")
            hive.cli("alpha", "--version")  # whoever comes first compiles hive.py for all
            for node in (alpha, beta):
                node.config.write_text(node.config.read_text().replace('"debug"', '"info"'))
                node.handler("ping", PING)
                node.handler("sleepy", SLEEPY)
                node.start()
            print(f"python {sys.version.split()[0]}, {os.cpu_count()} cores, {runs} runs, medians")
            measure_starts(Path(folder) / "starts", broker, commit, runs)
            processes(hive, runs)
            starts(hive, runs)
            ping_beside_a_sleeper(hive, beta, runs)
            if Path("/proc").exists():
                mcp(hive, runs)
            if Path("/proc").exists():
                idle(alpha, 60.0)
            peers = json.loads(hive.cli("alpha", "status", "--json").stdout)
            online = {row["name"] for row in peers if row["status"] == "online"}
            assert {alpha.name, beta.name} <= online
        finally:
            hive.close()
            broker.stop()


if __name__ == "__main__":
    main()
