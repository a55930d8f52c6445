"""Who is meant by `any`, a tag or a pattern: the rule, what a node knows for it, real nodes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, Hive, eventually
from raw_mqtt import connect_packet, publish_packet
from rig import HANGS, Rig

import hive as module
from hive import Candidate, Envelope, GroupReplies, HiveError, Target, named_targets


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("beta", None),
        ("all", None),
        ("anybody", None),
        ("any", Target(one=True)),
        ("any:gpu", Target(one=True, tag="gpu")),
        ("tag:gpu-2.a", Target(tag="gpu-2.a")),
        ("web-*", Target(pattern="web-*")),
        ("*", Target(pattern="*")),
        ("web-[!1-3]?", Target(pattern="web-[!1-3]?")),
    ],
)
def test_what_to_means(said: str, meant: Target | None) -> None:
    assert Target.find(said) == meant
    assert module.destination(said) == said


@pytest.mark.parametrize(
    "said", ["any:", "any:a/b", "tag:", "tag:#", "a b*", "a/*", "", "+", "*" * 64, 5, None, ["*"]]
)
def test_what_names_nobody_is_refused(said: object) -> None:
    with pytest.raises(ValueError):
        module.destination(said)


def test_no_node_may_be_called_any() -> None:
    with pytest.raises(ValueError):
        module.node_name("any")


NODES = [
    Candidate("alpha", actions={"sync", "deploy"}, busy=0.0),
    Candidate("beta", actions={"sync"}, tags={"gpu"}, agent=True, busy=2.0),
    Candidate("gamma", actions={"sync"}, busy=1.0),
    Candidate("attic", "offline", 7200.0, alive=False, actions={"sync", "old"}, tags={"gpu"}),
]


@pytest.mark.parametrize(
    ("to", "action", "names", "away"),
    [
        ("any", "sync", ["gamma"], ["attic"]),  # not alpha, who asks
        ("any", "deploy", [], []),
        ("any", "old", [], ["attic"]),
        ("any", "", ["beta"], []),  # who has an agent
        ("any:gpu", "sync", ["beta"], ["attic"]),
        ("tag:gpu", "nothing", ["beta"], ["attic"]),  # it may tell itself that it cannot
        ("*a", "", ["alpha", "beta", "gamma"], []),
        ("[bc]*", "", ["beta"], []),
    ],
)
def test_who_is_chosen(to: str, action: str, names: list[str], away: list[str]) -> None:
    target = Target.find(to)
    assert target
    there, absent = target.choose(NODES, action, "alpha")
    assert (there, [one.name for one in absent]) == (names, away)


@pytest.mark.parametrize(
    ("to", "action", "away", "words"),
    [
        ("any", "x", {}, "no other node offers x; what each one is: hive roster"),
        (
            "any:gpu",
            None,
            {},
            "no other node of tag gpu has an agent; what each one is: hive roster",
        ),
        (
            "any",
            "x",
            {"attic": {"status": "offline", "age": 7200.0}},
            "no other node that is online offers x; away: attic (offline, seen 2h ago)",
        ),
        ("tag:gpu", None, {}, "no node has the tag gpu; what each one is: hive roster"),
        ("web-*", "x", {}, "no node is called like web-*; what each one is: hive roster"),
    ],
)
def test_where_nobody_can_it_is_said_who_could(
    to: str, action: str | None, away: dict[str, Any], words: str
) -> None:
    with pytest.raises(HiveError) as raised:
        named_targets(to, action, {"names": [], "away": away})
    assert str(raised.value) == words


def test_each_of_a_group_has_its_time_and_is_counted_once() -> None:
    replies = GroupReplies(10.0)
    asked = [
        Envelope.new("alpha", to, "command", "x", id=f"id-{to}") for to in ("a", "b", "c", "d")
    ]
    for second, one in enumerate(asked):
        replies.sent(one, float(second))
    assert replies.ends == 10.0
    assert replies.take(asked[0].reply("a", "done")) and not replies.take(asked[0].reply("a", "x"))
    assert not replies.take(asked[1].reply("b", "on my way", ch="status"))
    assert replies.take(asked[1].reply("b", "cannot", ch="alert"))
    assert not replies.take(Envelope.new("d", "alpha", "response", "of another", corr="other"))
    replies.unheard("id-nobody")
    replies.expire(12.0)
    assert (len(replies), replies.ends) == (1, 13.0)
    replies.unheard("id-d")
    assert (replies.ok, replies.failed, replies.silent) == (["a"], ["b"], ["c", "d"])


@pytest.fixture
def rig(rig_of: Callable[..., Rig]) -> Rig:
    return rig_of()


def test_a_node_chooses_by_what_others_show_and_what_it_has_asked_them(rig: Rig) -> None:
    client = module.ControlClient(rig.state_dir / "door", "beta")

    def chosen(to: str = "any", action: str | None = "sync") -> dict[str, Any]:
        answer = rig.ask(client, do="targets", to=to, action=action)
        return {key: answer[key] for key in ("names", "away", "error") if key in answer}

    def show(name: str, roster: dict[str, Any], **state: Any) -> None:
        rig.hear_state(name, status="online", last_seen=int(time.time()), **state)
        rig.hand_in(f"hive/meta/{name}/roster", json.dumps(roster).encode())

    assert chosen() == {"names": [], "away": {}}
    show("idle", {"handlers": ["sync"], "tags": "gpu"}, load_1m=0.5)
    show("busy", {"handlers": ["sync"], "tags": ["gpu", 5]}, load_1m=0.4, running=1, waiting=2)
    show("wrong", {"handlers": "sync", "agents": {}}, load_1m="none", running=[])
    show("agent", {}, daemon_node="idle")
    assert chosen()["names"] == ["idle"]
    assert chosen("any:gpu")["names"] == ["busy"]
    assert chosen("*")["names"] == ["busy", "idle", "wrong"]
    for i in range(4):
        asked = Envelope.new("beta", "idle", "command", "x", action="sync", id=f"id-{i}")
        assert rig.ask(client, do="send", envelope=asked.document())["queued"]
    assert chosen()["names"] == ["busy"]
    for name in ("idle", "busy"):
        rig.hear_state(name, status="offline", last_seen=int(time.time()) - 60)
    assert chosen()["names"] == [] and chosen()["away"]["idle"]["status"] == "offline"
    assert "to: 'idle' is not any" in chosen("idle")["error"]
    client.close()


# Real nodes


@pytest.fixture
def fleet(hive: Hive) -> Hive:
    """Alpha asks; web-1 to web-3 deploy, of which one fails and one has left."""
    tags = {"web-1": '["gpu", "lab"]', "web-2": '["gpu"]'}
    for name, lines in {
        "alpha": "echo never",
        "web-1": f"{HANGS}",
        "web-2": f"{HANGS}; exit 3",
        "web-3": "echo gone",
    }.items():
        node = hive.node(name)
        text = node.config.read_text()
        extra = f"tags = {tags[name]}\n" if name in tags else ""
        node.config.write_text(text.replace("[mqtt]", f"{extra}[mqtt]"))
        node.handler("deploy", f"#!/bin/sh\n{lines}\n")
    for node in hive.nodes.values():
        node.start(wait=False)
    for node in hive.nodes.values():
        node.logged("connected")

    alpha = hive.nodes["alpha"]
    eventually("all are known", lambda: len(alpha.told("roster").get("rosters", ())) == 4)
    hive.nodes["web-3"].stop()
    for name in ("web-1", "web-2"):
        (hive.nodes[name].home / "gate").touch()
    return hive


def test_any_is_one_that_can_and_is_there(fleet: Hive) -> None:
    for name in ("web-1", "web-2"):
        (fleet.nodes[name].home / "gate").unlink()
    sent = [
        fleet.cli("alpha", "send", "--to", "any", "--action", "deploy", "--text", "x", "--json")
        for _ in range(4)
    ]
    chosen = {json.loads(one.stdout)["to"] for one in sent}
    assert chosen == {"web-1", "web-2"}  # what it has asked one makes it prefer the other
    for name in ("web-1", "web-2"):
        (fleet.nodes[name].home / "gate").touch()
    done = fleet.cli(
        *("alpha", "send", "--to", "any:lab", "--action", "deploy", "--text", "x", "--wait", "20")
    )
    assert done.stdout == "through\n"
    none = ("alpha", "send", "--to", "any:attic", "--action", "deploy", "--text", "x")
    for how in ((), ("--direct",)):
        why = fleet.cli(*none, *how, code=1).stderr
        assert why.startswith("hive: no other node of tag attic offers deploy; ")


def test_a_message_to_a_pattern_tells_what_became_of_each(fleet: Hive) -> None:
    for how in ("by the daemon", "beside it", "without one"):
        if how == "without one":
            fleet.nodes["alpha"].stop()
        tells_what_became_of_each(fleet, ("--direct",) if how == "beside it" else ())


def tells_what_became_of_each(fleet: Hive, direct: tuple[str, ...]) -> None:
    send = ("alpha", "send", "--action", "deploy", "--text", "x", "--wait", "20", *direct)
    done = fleet.cli(*send, "--to", "web-*", "--parallel", "1", code=1)
    assert done.stdout == "web-1: through\n"
    failed, summary = done.stderr.splitlines()
    assert failed.startswith("web-2: deploy failed: exit 3")
    assert summary == "hive: 1 of 3 ok, 1 failed (web-2), 1 away (web-3)"

    done = fleet.cli(*send, "--to", "tag:gpu", "--json", code=1)
    *answers, summary = map(json.loads, done.stdout.splitlines())
    assert summary == {"ok": ["web-1"], "failed": ["web-2"], "silent": [], "away": [], "unsent": []}
    assert sorted((one["from"], one["ch"]) for one in answers) == [
        ("web-1", "response"),
        ("web-2", "alert"),
    ]


def test_who_keeps_silent_is_counted_and_who_is_away_gets_nothing(fleet: Hive) -> None:
    (fleet.nodes["web-1"].home / "gate").unlink()
    send = ("alpha", "send", "--to", "web-[13]", "--action", "deploy", "--text", "x")
    done = fleet.cli(*send, "--wait", "1", code=4)
    assert done.stderr == "hive: 0 of 2 ok, 1 silent (web-1), 1 away (web-3)\n"
    line, web_1 = fleet.command_line(*send, "--wait", "20"), fleet.nodes["web-1"]
    waiting = subprocess.Popen(line, env=fleet.environment, stderr=subprocess.PIPE, text=True)
    eventually("it is asked", lambda: len(web_1.events("received", ch="command")) == 2)
    fleet.nodes["alpha"].stop(signal.SIGKILL)
    _, said = waiting.communicate(timeout=PATIENCE)
    assert said == "hive: the daemon of alpha: it has ended; all were sent; see: hive pending\n"
    assert waiting.returncode == 1
    fleet.nodes["alpha"].start()
    eventually("all are known", lambda: len(fleet.nodes["alpha"].statuses()) == 4)
    done = fleet.cli(*send)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["sent"]
    assert "/web-1/command" in done.stdout
    assert done.stderr.startswith("hive: not sent to web-3: offline, seen ")
    (fleet.nodes["web-1"].home / "gate").touch()
    fleet.nodes["web-3"].start()
    done = fleet.cli(
        "alpha", "send", "--to", "web-3", "--action", "deploy", "--text", "x", "--wait", "9"
    )
    assert done.stdout == "gone\n"
    assert len(fleet.nodes["web-3"].events("handler started")) == 1


def test_a_view_of_some_nodes(fleet: Hive, tmp_path: Path) -> None:
    def shown(*words: str, code: int = 0) -> str:
        return fleet.cli("alpha", *words, code=code).stdout

    def names(*words: str) -> list[str]:
        return sorted(row["name"] for row in json.loads(shown("status", "--json", *words)))

    assert names("web-*") == ["web-1", "web-2", "web-3"]
    assert names("--tag", "gpu") == names("tag:gpu") == ["web-1", "web-2"]
    assert names("web-[13]", "--tag", "gpu", "--direct") == ["web-1"]
    assert names() == names("all") == ["alpha", "web-1", "web-2", "web-3"]
    assert shown("status", "alpha", "web-1").startswith("2 nodes: 2 online;")
    assert shown("status", "--tag", "gpu", "--check") == "2 nodes: 2 online\n"
    assert shown("status", "web-*", "--check", code=1).startswith("3 nodes: 2 online, 1 offline;")
    why = fleet.cli("alpha", "status", "wep-1", "--check", code=1).stderr
    assert why == "hive: no node is called like wep-1; did you mean web-1?\n"
    assert [line.split()[0] for line in shown("roster", "web-[12]").splitlines()] == [
        "NODE",
        "web-1",
        "web-2",
    ]
    file = tmp_path / "watched"
    with file.open("w") as out:
        line = fleet.command_line("alpha", "status", "--watch", "--tag", "gpu")
        watching = subprocess.Popen(line, stdout=out, env=fleet.environment)
    eventually("the first look", lambda: "web-2: online" in file.read_text())
    fleet.nodes["web-3"].start()
    fleet.nodes["web-2"].stop()
    eventually("the second", lambda: "web-2: stopped" in file.read_text())
    watching.terminate()
    watching.wait()
    assert "web-1" in file.read_text()
    assert "alpha: " not in file.read_text() and "web-3" not in file.read_text()


def test_a_large_hive_is_summed_up_unless_each_is_asked_for(hive: Hive) -> None:
    now, port = int(time.time()), hive.broker.port
    hive.node("alpha")
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(connect_packet(5, f"crowd-{port}"))
        for i in range(26):
            said = {"status": "degraded" if i == 7 else "online", "last_seen": now, "interval": 60}
            for kind, document in {"state": said, "roster": {"tags": ["web"]}}.items():
                topic = f"{hive.prefix}/meta/web-{i}/{kind}"
                sock.sendall(publish_packet(topic, json.dumps(document).encode(), retain=True))
        sock.sendall(b"\xe0\0")
        while sock.recv(100):
            pass
    lines = hive.cli("alpha", "status").stdout.splitlines()
    assert lines[0].startswith("26 nodes: 25 online, 1 degraded;")
    assert lines[3].split()[:2] == ["web-7", "degraded"] and "web-8" not in str(lines)
    assert "tag web    26     25      1" in lines
    assert "tag web        26" in hive.cli("alpha", "roster").stdout
    each = hive.cli("alpha", "status", "--all").stdout
    assert len(hive.cli("alpha", "roster", "--all").stdout.splitlines()) == 27
    assert sum(line.startswith("web-") for line in each.splitlines()) == 26
    assert len(json.loads(hive.cli("alpha", "status", "--json").stdout)) == 26
    assert hive.cli("alpha", "status", "--check", code=1).stdout.endswith("web-7: degraded\n")
    assert "web-8" in hive.cli("alpha", "status", "web-8", "web-9").stdout


# One that waits for the second, the third for the fourth.
IN_PAIRS = """#!/bin/sh
begun() {{ grep -c + {diary}; }}
echo + >>{diary}
n=$(begun)
until [ $(begun) -ge $((n + n % 2)) ]; do sleep 0.05; done
echo - >>{diary}
"""


def test_so_many_at_once_and_no_more(hive: Hive) -> None:
    hive.node("alpha").start()
    diary = hive.home / "diary"
    for i in range(4):
        node = hive.node(f"web-{i}")
        node.handler("deploy", IN_PAIRS.format(diary=diary))
        node.start()
    eventually("all are seen", lambda: len(hive.nodes["alpha"].events("peer is up")) == 4)
    send = ("alpha", "send", "--to", "web-*", "--action", "deploy", "--text", "x", "--wait", "20")
    done = hive.cli(*send, "--parallel", "2")
    assert sorted(done.stdout.splitlines()) == [f"web-{i}: ok" for i in range(4)]
    running = most = 0
    for line in diary.read_text().split():
        running += 1 if line == "+" else -1
        most = max(most, running)
    assert most == 2
    for flag in (("--parallel", "2"), ("--fail-fast",)):
        why = hive.cli(*send[:-2], *flag, code=2).stderr
        assert why == f"hive: {flag[0]}: of use only with --wait, and to a tag or a pattern\n"


def test_a_rolling_action_stops_at_the_first_failure_and_at_ctrl_c(hive: Hive) -> None:
    hive.node("alpha").start()
    for i, lines in enumerate(("echo ok", "exit 1", "echo ok", HANGS)):
        node = hive.node(f"web-{i}")
        node.handler("deploy", f"#!/bin/sh\n{lines}\n")
        node.start()
    eventually("all are seen", lambda: len(hive.nodes["alpha"].events("peer is up")) == 4)
    send = ("alpha", "send", "--to", "web-*", "--action", "deploy", "--text", "x", "--wait", "20")
    done = hive.cli(*send, "--fail-fast", "--json", code=1)
    said = {"ok": ["web-0"], "failed": ["web-1"], "silent": [], "away": []}
    assert json.loads(done.stdout.splitlines()[-1]) == {**said, "unsent": ["web-2", "web-3"]}
    assert not hive.nodes["web-2"].events("handler started")

    line = hive.command_line(*send, "--parallel", "3")
    sending = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=hive.environment, text=True
    )
    hive.nodes["web-3"].logged("handler started")
    assert sending.stdout and sending.stderr
    answers = [sending.stdout.readline() for _ in range(2)]
    assert "web-1" in sending.stderr.readline()  # so its failure has come too
    sending.send_signal(signal.SIGINT)
    assert sending.wait(20) == 130
    assert sorted(answers) == ["web-0: ok\n", "web-2: ok\n"]
    *_, summary = sending.stderr.read().splitlines()
    assert summary == "hive: 2 of 4 ok, 1 failed (web-1), 1 silent (web-3)"
