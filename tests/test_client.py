"""Client: whose answers are missing, and what a command can know where no daemon runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import hive
from hive import Envelope, HeartbeatConfig, ReplyCollector

ASKED = Envelope.new("alpha", "beta", "command", "x", id="asked")
TO_ALL = Envelope.new("alpha", "all", "command", "x", id="asked", corr="earlier")
NOW = int(time.time())


def collector(envelope: Envelope = ASKED) -> ReplyCollector:
    return ReplyCollector(envelope, HeartbeatConfig())


def state(status: str = "online", **more: Any) -> dict[str, Any]:
    return {"status": status, "last_seen": int(time.time()), **more}


def test_one_who_was_asked_answers_once() -> None:
    answers = collector()
    assert answers.outstanding == {"beta"}
    assert answers.take(ASKED.reply("beta", "done"))
    assert (answers.outstanding, answers.refused) == (set(), False)
    assert answers.take(ASKED.reply("beta", "no", ch="alert"))
    assert answers.refused


def test_an_agent_is_answered_for_by_its_node() -> None:
    answers = collector()
    assert answers.take(ASKED.reply("the-node", "done"))
    assert answers.outstanding == set()


@pytest.mark.parametrize(
    "changed",
    [
        {"corr": "another"},
        {"corr": None},
        {"ch": "status"},
        {"ch": "command"},
        {"reply_to": "another"},
    ],
)
def test_what_belongs_to_something_else_is_no_answer(changed: dict[str, Any]) -> None:
    answers = collector()
    assert not answers.take(ASKED.reply("beta", "done", ch="alert").replace(**changed))
    assert (answers.outstanding, answers.refused) == ({"beta"}, False)


def test_an_answer_need_not_say_which_message_it_is_to() -> None:
    answers = collector(TO_ALL)
    answers.expect({"beta": state()})
    assert answers.take(TO_ALL.reply("beta", "done").replace(reply_to=None))
    assert answers.outstanding == set()


def test_all_are_the_nodes_that_are_alive() -> None:
    answers = collector(TO_ALL)
    answers.expect(
        {
            "beta": state(),
            "gamma": state("degraded"),
            "main": state(daemon_node="beta"),
            "attic": state("offline"),
            "cellar": state(last_seen=NOW - 1000),
        }
    )
    assert answers.outstanding == {"beta", "gamma"}
    assert answers.take(TO_ALL.reply("beta", "done"))
    assert answers.take(TO_ALL.reply("stranger", "me too"))
    assert answers.outstanding == {"gamma"}


def test_where_nobody_is_alive_nobody_is_waited_for() -> None:
    for states in ({}, {"attic": state("offline")}, {"main": state(daemon_node="gone")}):
        with pytest.raises(hive.NoReplyError, match=r"^no node is online; see: hive status$"):
            collector(TO_ALL).expect(states)
    answers = collector()  # one who was named may come yet
    answers.expect({})
    assert answers.outstanding == {"beta"}


# What a daemon has left behind


@pytest.fixture
def config(tmp_path: Path) -> hive.Config:
    return hive.Config(hive.NodeConfig("alpha", state_dir=tmp_path / "state"))


def refusal(config: hive.Config, **request: object) -> str:
    with pytest.raises(hive.HiveError) as raised:
        hive.look_up(config, request)
    return str(raised.value)


def test_where_no_daemon_has_run_there_is_nothing_to_look_up(
    config: hive.Config, tmp_path: Path
) -> None:
    why = f"no daemon of alpha has run here yet (nothing in {tmp_path}/state)"
    assert refusal(config, do="pending") == why
    assert not (tmp_path / "state").exists()


def test_what_a_daemon_has_left_is_looked_up_without_it(config: hive.Config) -> None:
    journal = hive.open_journal(config, hive.Log("error"))
    journal.record(hive.Event.SENT, ASKED, NOW, content=ASKED.encode().decode())
    journal.commit()
    journal.close()
    found = hive.look_up(config, {"do": "message", "id": "asked"})
    assert (found["event"], found["envelope"]["text"]) == ("out", "x")
    assert [row["id"] for row in hive.look_up(config, {"do": "log"})["rows"]] == ["asked"]
    assert refusal(config, do="message", id="unknown") == f"unknown: {hive.NOT_KNOWN}"
    said = hive.ask_journal(config, {"do": "message", "id": "unknown"})
    assert said == {"error": f"unknown: {hive.NOT_KNOWN}"}
    assert refusal(config, do="message").startswith("id: missing")
    assert refusal(config, do="nothing") == "no such request: 'nothing'"


def test_a_daemon_that_cannot_be_spoken_to_is_named(config: hive.Config, tmp_path: Path) -> None:
    hive.open_journal(config, hive.Log("error")).close()
    lock = hive.FileLock(tmp_path / "state" / "lock")
    try:
        why = f"the daemon of alpha runs, but not at {tmp_path}/state/door; see its log"
        assert refusal(config, do="pending") == why
    finally:
        lock.close()
    assert hive.look_up(config, {"do": "pending"})["outbox_size"] == 0
