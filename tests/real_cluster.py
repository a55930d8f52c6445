"""One broker that is three: nodes at different members of a NATS cluster, of which one is killed.

`make brokers` runs it too; each number that it counts is that of tests/faults.py.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import Daemon, Hive, eventually, find_program, missing
from faults import COUNT, Trial
from other_brokers import NatsCluster

PATIENCE = 90.0  # seconds: without the leader of a session it takes the others five to agree


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[NatsCluster]:
    if not find_program("nats-server"):
        missing("nats-server is missing (apt-get install nats-server)")
    made = NatsCluster(tmp_path / "cluster")
    yield made
    made.stop(signal.SIGKILL)


def place(hive: Hive, name: str, *hosts: str) -> None:
    """A node asks these members, the first one first."""
    config = hive.nodes[name].config
    first, *others = hosts
    where = f'host = "{first}"\ncluster = {json.dumps(others)}\nprotocol = "3.1.1"\nport ='
    config.write_text(config.read_text().replace("port =", where))


def test_each_member_is_killed_in_turn_under_load(
    cluster: NatsCluster, hive_of: Callable[..., Hive]
) -> None:
    trial = Trial(hive_of(cluster, interval=2.0), "member of a cluster killed")
    first, second, third = cluster.hosts
    place(trial.hive, "alpha", first, second, third)
    place(trial.hive, "beta", second, third, first)
    trial.start()
    with trial.sending():
        for number, host in enumerate(cluster.hosts, 1):
            some = COUNT * number // 5
            trial.wait("some are done", partial(has_done, trial, some), PATIENCE)
            cluster.kill_member(host)
            for node in (trial.alpha, trial.beta):
                eventually("it goes on elsewhere", partial(is_elsewhere, node, host), PATIENCE)
            cluster.start_member(host)
            eventually("it is back", partial(cluster.lets_in, host), PATIENCE)
    trial.settle(PATIENCE)


def has_done(trial: Trial, some: int) -> bool:
    return len(trial.done()) >= some


def is_elsewhere(node: Daemon, host: str) -> bool:
    """Is it connected, and not to this member?"""
    return bool(node.events("connected")[-1]["host"] != host)


def test_a_death_is_told_while_a_member_is_away(
    cluster: NatsCluster, hive_of: Callable[..., Hive]
) -> None:
    hive = hive_of(cluster)
    first, second, third = cluster.hosts
    for name, hosts in (("alpha", (first, second, third)), ("beta", (second, third, first))):
        hive.node(name)
        place(hive, name, *hosts)
        hive.nodes[name].start()
    hive.nodes["alpha"].logged("peer is up", peer="beta")
    cluster.kill_member(third)
    hive.nodes["beta"].stop(signal.SIGKILL)
    hive.nodes["alpha"].logged("peer is lost", peer="beta")
    hive.nodes["beta"].start()

    def both_online() -> bool:
        said = json.loads(hive.cli("alpha", "status", "--json", code=None).stdout or "[]")
        return {row["name"]: row["status"] for row in said} == dict.fromkeys(
            ("alpha", "beta"), "online"
        )

    eventually("both are online", both_online, PATIENCE)
