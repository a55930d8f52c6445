"""What it costs a daemon to know others: real resident memory, with 0, 1,000 and 10,000 of them.

python tests/bench_members.py [--members 0,1000,10000]

One connection says what so many nodes would: a state as hive itself writes it, with an agent, a
roster with ten handlers and two tags, and two heartbeats each.  Linux only.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench_fleet import resident, until
from conftest import ROOT, Broker, Hive
from raw_mqtt import connect_packet, publish_packet

import hive
from hive import Envelope

INTERVAL = 3600.0  # nobody is missed while this runs
HANDLERS = [*("ping", "git-sync", "health-check", "check-disk", "check-url", "check-email")]
HANDLERS += [*("check-calendar", "hive-upgrade", "deploy", "restart-web")]


def documents(name: str) -> dict[str, dict[str, object]]:
    """What a node leaves at the broker."""
    now, build = int(time.time()), "c29f4d67"
    state = {
        "node_id": name,
        "status": "online",
        "last_seen": now,
        "uptime_s": 86400,
        "known_peers": [],  # as each has it in a hive of more than MAX_KNOWN
        "daemon_node": name,
        "version": f"{hive.__version__} ({build})",
        "load_1m": 0.31,
        "oc": {f"main-{name}": {"status": "ok", "reason": ""}},
        "running": 0,
        "waiting": 0,
        "outbox": 0,
        "counters": {"received": 10000, "sent": 10000, "runs": 100, "failures": 3, "refused": 7},
        "instance": f"{name}-1f9a6f0e-9d4b",
        "interval": INTERVAL,
        "miss_threshold": 3,
        "host": name,
    }
    roster = {
        "node": name,
        "ts": now,
        "version": hive.__version__,
        "build": build,
        "system": "Linux x86_64",
        "agents": [f"main-{name}"],
        "handlers": HANDLERS,
        "tags": ["web", "rack-7"],
        "schedule": [],
    }
    return {"state": state, "roster": roster}


def beats(name: str) -> Iterator[bytes]:
    for seq in (1, 2):
        said = {"node_id": name, "interval": INTERVAL, "boot": name, "seq": seq, "load_1m": 0.3}
        yield Envelope.new(name, "all", "heartbeat", json.dumps(said), urgency="later").encode()


def measure(members: int) -> float:
    """Megabytes of a daemon that knows so many others."""
    with tempfile.TemporaryDirectory(prefix="hive-members-") as folder:
        broker = Broker(Path(folder, "broker"), start=False)
        rules = broker.home / "mosquitto.conf"
        rules.write_text(rules.read_text().replace("persistence true", "persistence false"))
        broker.start()
        known = Hive(Path(folder, "hive"), broker, "hive", interval=5.0)
        alpha = known.node("alpha")
        alpha.config.write_text(alpha.config.read_text().replace('"debug"', '"info"'))
        try:
            alpha.start()
            with socket.create_connection(("127.0.0.1", broker.port)) as sock:
                sock.sendall(connect_packet(5, "crowd"))
                for n in range(members):
                    name = f"web-{n:05}"
                    for beat in beats(name):
                        sock.sendall(publish_packet("hive/all/heartbeat", beat))
                    for kind, said in documents(name).items():
                        said_in_json = hive.encode_json(said)
                        sock.sendall(publish_packet(f"hive/meta/{name}/{kind}", said_in_json))
                    if n % 100 == 99:
                        time.sleep(0.1)  # what a broker throws away is not measured

                def all_known() -> bool:
                    line = f'hive_members{{state="online"}} {members + 1}\n'
                    return line in known.cli("alpha", "metrics", code=None).stdout

                until(f"{members} are known", all_known, 300.0)
            return resident(alpha.pid)
        finally:
            known.close()
            broker.stop()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--members", default="0,1000,10000")
    counts = [int(one) for one in parser.parse_args().members.split(",")]
    sizes = [len(hive.encode_json(one)) for one in documents("web-00000").values()]
    print(f"state {sizes[0]} bytes, roster {sizes[1]} bytes")
    print("| members | daemon MB | KB for each |\n|---|---|---|")
    subprocess.run([sys.executable, ROOT / "hive-cli", "--version"], stdout=subprocess.DEVNULL)
    least = 0.0  # that was to compile it, which would count
    for count in counts:
        found = measure(count)
        least = least or found
        each = f"{(found - least) * 1000 / count:.1f}" if count and found != least else "-"
        print(f"| {count:,} | {found:.1f} | {each} |", flush=True)


if __name__ == "__main__":
    main()
