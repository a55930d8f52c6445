"""What is too large for the broker, and what is too much: nodes as processes, real brokers."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from bench_journal import QuickBroker, field, packet
from conftest import Broker, Hive, calls_of, eventually, need_mosquitto

import hive as hive_module
from hive import MAX_REPEATS, Envelope

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


@pytest.fixture
def quick(tmp_path: Path, hive_of: Callable[..., Hive]) -> Iterator[Hive]:
    """A hive whose broker does not save: what is tried is the nodes."""
    need_mosquitto()
    broker = QuickBroker(tmp_path / "quick")
    yield hive_of(broker, interval=5.0)
    broker.stop()


def flood(port: int, topic: str, payloads: Sequence[bytes]) -> None:
    """Publish them as fast as the broker takes them, at QoS 1."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(packet(0x10, field(b"MQTT") + b"\x04\x02\x00\x00" + field(b"flood")))
        sock.recv(4)  # CONNACK
        left = 4 * len(payloads)  # bytes of PUBACKs
        for number, payload in enumerate(payloads):
            mid = (number % 65535 + 1).to_bytes(2, "big")
            sock.sendall(packet(0x32, field(topic.encode()) + mid + payload))
            left -= len(sock.recv(65536)) if number % 100 == 99 else 0
        while left > 0 and (data := sock.recv(65536)):
            left -= len(data)


def test_a_flood_is_a_few_lines_in_the_log_and_leaves_the_node_its_own_word(
    quick: Hive,
) -> None:
    hive = quick
    beta = hive.node("beta", "[journal]\nmax_mb = 12\n")
    beta.config.write_text(beta.config.read_text().replace('"debug"', '"info"'))
    beta.start()
    hive.node("alpha").start()
    messages = 12_000
    kinds = (("command", "no", 3000), ("status", None, messages))  # refused, and kept
    for ch, action, number in kinds:
        payloads = [
            Envelope.new("flood", "beta", ch, "x" * 500, id=f"{ch}-{i}", action=action).encode()
            for i in range(number)
        ]
        flood(hive.broker.port, f"{hive.prefix}/beta/{ch}", payloads)
    largest, last = 0, f"status-{messages - 1}"

    def last_one() -> bool:
        nonlocal largest
        files = beta.home.glob("state/journal*")
        largest = max(largest, sum(file.stat().st_size for file in files))
        return beta.told("message", id=last).get("id") == last

    eventually("it has heard all", last_one)
    hive.cli("beta", "show", last)
    hive.cli("beta", "send", "--to", "alpha", "--ch", "status", "--text", "my own word")
    hive.nodes["alpha"].logged("received", ch="status")
    assert largest < 12_000_000
    assert len(beta.log_file.read_text().splitlines()) < 3 * MAX_REPEATS + 100


def test_who_sends_too_much_is_told_and_shown_and_delays_nobody_else(quick: Hive) -> None:
    alpha, beta = quick.node("alpha").start(), quick.node("beta")
    limits = "[node]\nsender_rate = 5\nsender_burst = 200\n"
    beta.config.write_text(beta.config.read_text().replace("[node]\n", limits))
    beta.handler("ping", "#!/bin/sh\necho pong\n")
    beta.start()
    payloads = [
        Envelope.new("flood", "beta", "command", "x", action="ping").encode() for _ in range(3000)
    ]
    flood(quick.broker.port, f"{quick.prefix}/beta/command", payloads)

    ping = ["send", "--to", "beta", "--action", "ping", "--text", "x", "--wait", "25"]
    assert quick.cli("alpha", *ping).stdout == "pong\n"
    beta.logged("sent", ch="alert", to="flood")
    told = beta.events("sent", ch="alert", to="flood")
    assert len(told) == 1

    eventually("all hear of it", lambda: "flood sends more" in json.dumps(alpha.told("states")))
    said = quick.cli("alpha", "status", code=None).stdout
    assert "flood sends more than 5 messages a second" in said and "refused" in said
    assert len(beta.events("handler ended", status="ok")) <= 300
    assert alpha.process and alpha.process.poll() is None


PROMISES = {  # what contrib/help/operation.md says, and what it must be
    "keeps what it has to say (10,000 messages, on disk)": hive_module.MAX_OUTBOX == 10_000,
    "growing pauses up to 30 seconds": max(hive_module.RETRY) == 30.0,
    "a message is given up after two tries": hive_module.LARGE_HANG_UPS == 2,
    "20,000 nodes and agents are known": hive_module.MAX_MEMBERS == 20_000,
    "and 24 MiB of what they say": hive_module.MAX_DOCUMENTS == 24 << 20,
    "leave a fifth of what may wait": hive_module.ANSWER_SHARE == 1 - 1 / 5,
    "to one peer go at most 2,000": hive_module.ONE_SHARE * hive_module.MAX_OUTBOX == 2_000,
    "of more than 30 nodes that are lost within a minute": hive_module.MAX_LOSSES == 30,
    "two seconds later, or five": (hive_module.DOUBT, hive_module.STALL) == (1.5, 5.0),
}


@pytest.mark.parametrize("words", PROMISES)
def test_the_bounds_are_those_of_the_help(words: str) -> None:
    said = Path(hive_module.__file__).with_name("contrib") / "help" / "operation.md"
    assert words in " ".join(said.read_text().split()) and PROMISES[words]
