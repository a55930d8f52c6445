"""One broker that is three: nodes at different members of a NATS cluster, of which one is killed.

`make brokers` runs it too; each number that it counts is that of tests/faults.py.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Hive, eventually, find_program, missing
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
    with contextlib.ExitStack() as ending:
        ending.enter_context(trial.sending())
        for number, host in enumerate(cluster.hosts, 1):
            trial.wait(
                "some are done",
                lambda number=number: len(trial.done()) >= COUNT * number // 5,  # type: ignore[misc]
                PATIENCE,
            )
            cluster.kill_member(host)
            eventually(
                "the others go on",
                lambda host=host: any(map(cluster.lets_in, {*cluster.hosts} - {host})),  # type: ignore[misc]
                PATIENCE,
            )
            cluster.start_member(host)
            eventually("it is back", lambda host=host: cluster.lets_in(host), PATIENCE)  # type: ignore[misc]
    trial.settle(PATIENCE)
    brokers = {row["broker"] for row in trial.alpha.events("connected")}
    print(brokers, trial.tally)


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
