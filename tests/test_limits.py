"""What is too large for the broker, and what is too much: nodes as processes, real brokers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Broker, Hive, calls_of, eventually, need_mosquitto

import hive as hive_module

SMALL = 3000  # bytes of a packet that the broker takes
LARGE = '#!/bin/sh\nhead -c 10000 /dev/zero | tr "\\0" x\n'


@pytest.fixture
def small_broker(tmp_path: Path) -> Iterator[Broker]:
    need_mosquitto()
    limit = f"max_packet_size {SMALL}"
    broker = Broker(tmp_path / "small", "allow_anonymous true", limit)
    yield broker
    broker.stop()


@pytest.fixture(params=["5", "3.1.1"])
def small(
    request: pytest.FixtureRequest, small_broker: Broker, hive_of: Callable[..., Hive]
) -> Hive:
    """A hive whose broker takes small packets only; in MQTT 3.1.1 it does not say so."""
    hive = hive_of(small_broker)
    hive.mqtt += f'\nprotocol = "{request.param}"'
    return hive


def kept(hive: Hive, node: str, document: str) -> dict[str, Any]:
    """What is retained about a node."""
    found: list[bytes] = []
    config = hive_module.load_config(str(hive.nodes[node].config))
    loop = hive_module.Loop(hive_module.Log("error"))
    complete: list[bool] = []
    query = hive_module.RetainedQuery(
        loop,
        config.mqtt,
        [config.topics.meta(node, document)],
        f"{hive.prefix}/test/end",
        lambda message: found.append(message.payload),
        lambda: complete.append(True),
        lambda reason: None,
    )
    while not complete:
        loop.step()
    query.client.close(lambda: complete.append(True), within=0.0)
    loop.close()
    return json.loads(found[0]) if found else {}


def test_whoever_asks_for_an_answer_that_is_too_large_gets_an_alert_with_its_beginning(
    small: Hive,
) -> None:
    alpha, beta = small.node("alpha"), small.node("beta")
    beta.handler("large", LARGE)
    beta.handler("ping", "#!/bin/sh\necho pong\n")
    alpha.start(), beta.start()
    asked = ["send", "--to", "beta", "--text", "x", "--wait", "25"]
    small.cli("alpha", *asked, "--action", "ping")

    done = small.cli("alpha", *asked, "--action", "large", code=1)

    said = done.stderr
    assert "beta: the answer was not published: larger than the broker" in said
    assert f"of {SMALL} bytes)" in said or "10" in said.split("bytes; the largest")[0]
    assert "it begins: xxxxxxxx" in said and "[cut by hive: more than the broker takes]" in said
    assert small.cli("alpha", *asked, "--action", "ping").stdout == "pong\n", "others go on"
    assert len(beta.events("no broker, trying again")) <= 3  # at the result and the answer
    result = eventually("a result", lambda: kept(small, "beta", "large"))
    assert result["truncated"] and result["result"].endswith("more than the broker takes]")
    downs = len(beta.events("no broker, trying again"))
    small.cli("alpha", *asked, "--action", "large", code=1)
    assert len(beta.events("no broker, trying again")) == downs, "it has learned its limit"


def test_a_failure_that_is_too_large_to_tell_is_cut(small: Hive) -> None:
    alpha, beta = small.node("alpha"), small.node("beta")
    beta.handler("fail", '#!/bin/sh\nhead -c 9000 /dev/zero | tr "\\0" y >&2\nexit 3\n')
    alpha.start(), beta.start()
    asked = ["send", "--to", "beta", "--text", "x", "--wait", "25", "--action", "fail"]
    said = small.cli("alpha", *asked, code=1).stderr
    assert "beta: fail failed: exit 3: yyy" in said
    assert "[cut by hive: more than the broker takes]" in said
    assert kept(small, "beta", "fail")["truncated"]


def test_a_text_that_is_too_large_is_refused_to_who_sends_it(small: Hive) -> None:
    small.node("alpha").start()
    beta = small.node("beta").start()
    said = small.cli("alpha", "send", "--to", "beta", "--text", "z" * 9000, "--wait", "25", code=3)
    assert "larger than the broker" in said.stderr
    nobody = small.node("gamma")  # no daemon: the command publishes by itself
    said = small.cli(nobody.name, "send", "--to", "beta", "--text", "z" * 9000, code=3)
    assert "9" in said.stderr and ("larger than" in said.stderr or "too large" in said.stderr)
    assert not beta.events("received", ch="command")


def test_a_text_that_waited_for_the_broker_and_is_too_large_is_told_to_the_agent(
    small: Hive, fast_agent: Path
) -> None:
    small.broker.stop()
    agent = f'[[oc_instances]]\nname = "main"\nopenclaw_cmd = "{fast_agent}"\n'
    small.node("alpha", agent).start(wait=False)
    text = ["send", "--to", "beta", "--text", "z" * 9000]
    eventually("it is queued", lambda: small.cli("alpha", *text, code=None).returncode == 0)
    small.broker.start()
    (call,) = eventually("the agent is told", lambda: calls_of(fast_agent))
    assert "not published to beta: larger than the broker" in call["argv"][-3]


def test_documents_that_are_too_large_are_published_without_what_can_be_spared(
    small: Hive,
) -> None:
    beta = small.node("beta")
    for number in range(100):
        beta.handler(f"a-handler-with-quite-a-long-name-{number}", LARGE)
    beta.start()
    roster = eventually("a roster", lambda: kept(small, "beta", "roster"))
    assert roster["truncated"] and "handlers" not in roster and roster["node"] == "beta"
    small.cli("beta", "status")
    assert len(beta.events("no broker, trying again")) <= 3


def test_nothing_but_what_is_too_large_is_lost_with_it(small: Hive) -> None:
    alpha, beta = small.node("alpha"), small.node("beta")
    beta.handler("large", LARGE)
    beta.handler("ping", "#!/bin/sh\necho pong\n")
    alpha.start(), beta.start()
    small.cli("alpha", "send", "--to", "beta", "--action", "ping", "--text", "x", "--wait", "25")
    for number in range(20):
        action = "large" if number == 10 else "ping"
        small.cli("alpha", "send", "--to", "beta", "--action", action, "--text", "x")

    def answers() -> list[str]:
        rows = small.cli("alpha", "log", "--from", "beta", "--json", "-n", "999").stdout
        found = [json.loads(line) for line in rows.splitlines()]
        return [row["ch"] for row in found if row["ch"] in ("response", "alert")]

    eventually("all are answered", lambda: len(answers()) == 21)
    assert sorted(answers()) == ["alert"] + ["response"] * 20
