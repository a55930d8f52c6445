"""The log of other nodes: who may read it, what of it, and what that costs whom."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Hive, calls_of, eventually
from rig import Rig
from test_doctor import say

import hive as module
from hive import READ_JOURNAL, ControlClient, Envelope, HandlerConfig, JournalSource, ScheduleConfig

SHARED = '[journal]\nshare = ["alpha"]\n'
TEXTS = f"{SHARED}share_texts = true\n"


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# A node that is asked


def shared(rig_of: Callable[..., Rig], *names: str, texts: bool = False, **how: Any) -> Rig:
    """The node beta, whose journal is for these."""
    return rig_of(shared=module.JournalConfig(share=names, share_texts=texts), **how)


def ask(rig: Rig, sender: str = "alpha", **said: Any) -> Envelope:
    question = rig.say("command", READ_JOURNAL, sender=sender, text=json.dumps(said))
    rig.turn()
    return question


def page(rig: Rig, question: Envelope) -> dict[str, Any]:
    answer = rig.answer_to(question)
    assert (answer.ch, answer.action, answer.to) == ("response", READ_JOURNAL, question.sender)
    said: dict[str, Any] = json.loads(answer.text)
    return said


def journal_rows(rig: Rig) -> list[dict[str, Any]]:
    return rig.journal.rows({})


def test_a_page_is_shown_to_whom_it_names_and_leaves_no_row(rig_of: Callable[..., Rig]) -> None:
    rig = shared(rig_of, "alpha")
    assert rig.works()
    rows = journal_rows(rig)
    said = page(rig, ask(rig))
    assert [row["n"] for row in said["rows"]] == [row["n"] for row in rows]
    assert said["after"] == rows[-1]["n"] and not said["more"]
    assert [(row["event"], row["note"], row["envelope"]) for row in said["rows"]] == [
        ("in", "", None),
        ("did", rows[1]["note"], None),
        ("out", "", None),
    ]
    assert page(rig, ask(rig, after=rows[0]["n"], filters={"ch": "response"}))["rows"] == [
        {**rows[2], "envelope": None}
    ]
    assert page(rig, ask(rig, last=1))["rows"][0]["n"] == rows[2]["n"]
    rig.turn()
    assert journal_rows(rig) == rows and rig.journal.outbox_size == 0
    assert len(rig.events("journal is read", by="alpha")) == 2


@pytest.mark.parametrize(("names", "denied"), [((), "alpha"), (("alpha",), "gamma")])
def test_nobody_else_reads_it(
    rig_of: Callable[..., Rig], names: tuple[str, ...], denied: str
) -> None:
    rig = shared(rig_of, *names)
    refusal = rig.answer_to(ask(rig, denied))
    assert refusal.ch == "alert"
    assert refusal.text == f"beta: {READ_JOURNAL} refused: [journal] share does not name {denied}"
    assert [row["action"] for row in journal_rows(rig)] == [READ_JOURNAL, None]  # as any refusal


def test_nobody_passes_for_a_command_of_the_node_itself(rig_of: Callable[..., Rig]) -> None:
    """In an open hive anybody may say that he is beta."""
    rig = shared(rig_of)
    client = ControlClient(rig.state_dir / "door", "beta")
    rig.say("status", urgency="later", text="secret")
    rig.ask(client, do="read_journal", node="beta", exchange="e-1")
    for texts in (True, False):  # what a command asks is shown whole
        said = rig.until("an answer", lambda: client.receive(0.01) or {})
        assert ("secret" in said["answer"]["text"]) is texts
        rig.say("command", READ_JOURNAL, sender="beta", text="{}", corr="e-1")
    assert not rig.sent()
    client.close()


def test_a_question_is_held_until_there_is_news_or_a_minute_is_over(
    rig_of: Callable[..., Rig],
) -> None:
    rig = shared(rig_of, "alpha", texts=True)
    assert rig.works()
    after = rig.journal.newest
    question = ask(rig, after=after, hold=60)
    other = ask(rig, after=after, hold=60, filters={"from": "delta"})
    rig.live(50, "alpha")
    assert not rig.answers_to(question)
    message = rig.say("status", urgency="later", text="news")
    (row,) = page(rig, question)["rows"]
    assert (row["id"], row["envelope"]) == (message.id, {"text": "news"})
    rig.live(15, "alpha")
    assert page(rig, other) == {"rows": [], "after": rig.journal.newest, "more": False}
    assert [row["ch"] for row in journal_rows(rig)[3:]] == ["status"]


def test_a_flood_of_questions_costs_what_is_bounded(
    rig_of: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that takes 50 ms lets the next one wait for a second; of one asker eight wait."""
    rig = shared(rig_of, "alpha", "gamma")
    assert rig.works()
    before, looks, rows = len(rig.sent()), 0, rig.journal.rows

    def slow(*said: Any) -> list[dict[str, Any]]:
        nonlocal looks
        looks += 1
        rig.clock.now += 0.05
        return rows(*said)

    monkeypatch.setattr(rig.journal, "rows", slow)
    began = rig.clock.now
    for _ in range(1000):
        rig.say("command", READ_JOURNAL, text='{"filters": {"from": "nobody"}, "hold": 60}')
    question = ask(rig, "gamma")
    rig.until("gamma has its turn", lambda: rig.answers_to(question), tick=0.5)
    rig.live(70, "alpha", "gamma")
    assert looks <= 1 + (rig.clock.now - began) / (20 * 0.05)
    assert len(rig.sent()) - before <= 1 + 8
    assert len(journal_rows(rig)) == 3 and rig.works()
    for n in range(100):
        ask(rig, f"node{n}")  # they are refused, and told so a few at once


def test_questions_of_too_many_make_room(rig_of: Callable[..., Rig]) -> None:
    names = [f"node{n}" for n in range(20)]
    rig = shared(rig_of, *names)
    asked = [ask(rig, name, after=rig.journal.newest, hold=60) for name in names for _ in range(5)]
    rig.say("status", urgency="later")
    rig.until("the last is answered", lambda: rig.answers_to(asked[-1]))
    rig.advance(1)
    assert sum(bool(rig.answers_to(one)) for one in asked) == module.MAX_ALL_QUESTIONS


@pytest.mark.parametrize("limit", [1_000_000, 4000])
def test_an_answer_is_well_below_what_the_broker_takes(
    rig_of: Callable[..., Rig], limit: int
) -> None:
    rig = shared(rig_of, "alpha", texts=True)
    for n in range(20):
        rig.say("status", urgency="later", text=f'{n} "\\' + "\n\u2028" * 1000)
    rig.turn()
    rig.wire.limit = limit
    seen, after, more = list[dict[str, Any]](), 0, True
    while more:
        question = ask(rig, after=after)
        said = page(rig, question)
        (answer,) = rig.answers_to(question)
        assert len(answer.encode()) < min(limit, module.MAX_PAGE)
        seen, after, more = [*seen, *said["rows"]], said["after"], said["more"]
    assert [row["n"] for row in seen] == [row["n"] for row in journal_rows(rig)]
    assert {len(row["envelope"]["text"]) for row in seen} == {module.MAX_SHARED_TEXT}


PRIVATE = """echo '{"private": true, "news": true, "text": "the code is 1234"}'"""


def test_what_a_handler_calls_private_stays_here(rig_of: Callable[..., Rig]) -> None:
    settings = {"unpublished": HandlerConfig(publish=False), "fails": HandlerConfig(publish=False)}
    rig = shared(
        rig_of,
        *("alpha", "gamma"),
        texts=True,
        settings=settings,
        schedule=[ScheduleConfig("sentinel", every=1.0)],
        sentinel=PRIVATE,
        secret=PRIVATE,
        unpublished="echo 1234",
        fails="echo 1234 >&2; exit 1",
    )
    for action in ("secret", "unpublished", "fails"):
        rig.answer_to(rig.say("command", action, sender="gamma"))
    rig.until("it has run", lambda: rig.kept("beta", "sentinel"), tick=0.5)
    older = '{"private": true, "text": "1234"}'  # which did not mark it
    rig.say("response", sender="gamma", text=older, corr="other")
    rig.turn()
    kept = {text_of(row) for row in journal_rows(rig) if "1234" in text_of(row)}
    assert len(kept) == 5  # of each of the four handlers, and that
    said = page(rig, ask(rig, last=100))
    assert len(said["rows"]) == len(journal_rows(rig))
    assert "1234" not in json.dumps(said)
    notes = {row["note"] for row in said["rows"] if row["action"] == "fails"}
    assert notes == {"", "error"}
    client = ControlClient(rig.state_dir / "door", "beta")
    assert rig.ask(client, do="read_journal", node="beta", exchange="e-1", last=100)["id"]
    said = rig.until("our own", lambda: client.receive(0.01) or {})
    rows = json.loads(said["answer"]["text"])["rows"]
    assert {text_of(row) for row in rows} >= kept
    client.close()


def text_of(row: dict[str, Any]) -> str:
    return str((row["envelope"] or {}).get("text", ""))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"after": -1}, "after: -1 is not a whole number from 0"),
        ({"hold": 61}, "hold: 61 is not a whole number from 0 to 60"),
        ({"filters": {"colour": 1}}, "filters: {'colour': 1} is not an object of ch, from"),
        ({"filters": {"corr": "same"}}, "same: which one? same-1, same-2"),
    ],
)
def test_what_makes_no_sense_is_refused(
    rig_of: Callable[..., Rig], said: dict[str, Any], why: str
) -> None:
    rig = shared(rig_of, "alpha")
    for n in (1, 2):
        rig.say("status", urgency="later", id=f"same-{n}")
    refusal = rig.answer_to(ask(rig, **said))
    assert refusal.text.startswith(f"beta: {READ_JOURNAL} refused: {why}")
    assert page(rig, rig.say("command", READ_JOURNAL, text="what is new?"))["rows"]


def test_a_page_that_nobody_waits_for_any_more_is_no_message(
    rig_of: Callable[..., Rig], main_agent: module.InstanceConfig, fast_agent: Path
) -> None:
    rig = shared(rig_of, agents=[main_agent])
    rig.say("response", READ_JOURNAL, text='{"rows": [], "after": 5, "more": false}', corr="e-1")
    rig.advance(5)
    assert not journal_rows(rig) and not calls_of(fast_agent) and not rig.events("dropped")


def test_it_is_an_action_of_each_node_itself(rig_of: Callable[..., Rig]) -> None:
    mine: dict[str, Any] = {READ_JOURNAL: "echo mine"}
    rig = shared(rig_of, **mine)
    assert rig.events("not a handler")[0]["why"] == "this is done by hive itself"
    assert "refused" in rig.answer_to(ask(rig)).text


# Who asks


def row(n: int = 5, **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = dict.fromkeys(module.ENTRY, "x") | {"n": n, "time": 1.5 * n}
    return given | {"action": None, "id": None, "envelope": None} | more


QUESTION = Envelope.new("alpha", "beta", "command", "x")


@pytest.mark.parametrize(
    "said",
    [
        [],
        {"rows": 5, "after": 5},
        {"rows": [], "after": -1},
        {"rows": [], "after": "5"},
        {"rows": [row()]},
        {"rows": [row()], "after": 0},  # it would be asked for the same for ever
        {"rows": [row(ch=5)], "after": 5},
        {"rows": [row(id=["x"])], "after": 5},
        {"rows": [row(envelope="x")], "after": 5},
        {"rows": [row(time=float("nan"))], "after": 5},
        {"rows": ["x"], "after": 5},
        {"rows": [{}], "after": 5},
    ],
)
def test_a_node_that_lies_is_not_asked_again(
    said: object, capsys: pytest.CaptureFixture[str]
) -> None:
    source = JournalSource("beta", {"last": 5})
    source.take(QUESTION.reply("beta", json.dumps({"rows": [row(3)], "after": 3, "more": True})))
    assert (source.why, source.behind, source.request["after"]) == ("", True, 3)
    source.take(QUESTION.reply("beta", json.dumps(said)))
    assert source.why and len(source.rows) == 1
    assert capsys.readouterr().err == "hive: beta: its answer makes no sense\n"


def test_what_a_node_shows_cannot_pass_for_another_or_write_to_the_terminal() -> None:
    source = JournalSource("beta", {"last": 5})
    lie = row(note="\x1b[2J\n11-22 forged", node="gamma", more="x")
    source.take(QUESTION.reply("beta", json.dumps({"rows": [lie], "after": 5})))
    (shown,) = source.rows
    assert shown["node"] == "beta" and "more" not in shown
    line = module.log_lines({**shown, "event": "did"}, 80)
    assert "\x1b" not in line and "\n" not in line


# Real nodes


class Follower:
    """`hive log --of` on alpha, and what it has printed so far."""

    def __init__(self, hive: Hive, *arguments: str) -> None:
        self._out, self._errors = hive.home / "out", hive.home / "errors"
        with self._out.open("wb") as out, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                hive.command_line("alpha", "log", "--follow", "--json", *arguments),
                stdout=out,
                stderr=errors,
                env=hive.environment,
            )

    def rows(self) -> list[dict[str, Any]]:
        return lines(self._out.read_text().rpartition("\n")[0])

    def tells(self, *words: str) -> None:
        """Wait for a line on stderr."""
        told = self._errors.read_text
        eventually(f"it tells {words}", lambda: all(word in told() for word in words))

    def shows(self, id: str, *nodes: str) -> None:
        """Wait until it has shown the message on each of these nodes."""

        def seen() -> bool:
            rows = [row["node"] for row in self.rows() if row["id"] == id]
            return sorted(rows) == sorted(nodes)

        try:
            eventually(f"{id} is shown by {nodes}", seen)
        except AssertionError as error:
            raise AssertionError(f"{error}; {self._errors.read_text()} {self.rows()}") from None


@pytest.fixture
def three(hive: Hive) -> Iterator[Hive]:
    """Alpha may read beta's journal with its texts, and gamma's without them."""
    for name, extra in {"alpha": "", "beta": TEXTS, "gamma": SHARED}.items():
        hive.node(name, extra).handler("ping", "#!/bin/sh\necho pong\n")
    for node in hive.nodes.values():
        node.start(wait=False)
    for node in hive.nodes.values():
        node.logged("connected")
    known(hive, "alpha", *hive.nodes)
    yield hive


def asked(hive: Hive, node: str, **request: object) -> dict[str, Any]:
    """What a node tells a command, without its process."""
    client = module.connect_to_daemon(module.load_config(str(hive.nodes[node].config)))
    assert client
    with contextlib.closing(client):
        return client.ask(request)


def known(hive: Hive, asker: str, *names: str) -> None:
    """Wait until a node has heard how these are."""

    def online() -> bool:
        states = asked(hive, asker, do="states")["states"].items()
        return {*names} <= {name for name, state in states if state["status"] == "online"}

    eventually(f"{asker} knows {names}", online)


def sent(hive: Hive, sender: str, to: str, ch: str = "status", action: str | None = None) -> str:
    """Send something that nobody has to do anything about; its id."""
    said = Envelope.new(sender, to, ch, "hello", action=action, urgency="later")
    assert asked(hive, sender, do="send", envelope=said.document())["queued"]
    return said.id


def journals(hive: Hive) -> dict[str, list[dict[str, Any]]]:
    return {name: asked(hive, name, do="log")["rows"] for name in hive.nodes}


def test_the_journals_of_several_nodes_are_one_log(three: Hive) -> None:
    id = sent(three, "gamma", "beta", "command", "ping")
    eventually("it is answered", lambda: len(journals(three)["gamma"]) == 2)
    before = journals(three)
    done = three.cli("alpha", "log", "--of", "all", "--json")
    rows = lines(done.stdout)
    assert not done.stderr
    assert [(row["node"], row["event"], row["ch"]) for row in rows] == [
        ("gamma", "out", "command"),
        ("beta", "in", "command"),
        ("beta", "did", "command"),
        ("beta", "out", "response"),
        ("gamma", "in", "response"),
    ]
    assert [row["envelope"] and row["envelope"]["text"] for row in rows] == [
        *(None, "hello", None, "pong", None)
    ]
    for row in rows:
        (same,) = [one for one in before[row["node"]] if one["n"] == row["n"]]
        assert {**same, "node": row["node"], "envelope": row["envelope"]} == row
    shown = three.cli("alpha", "log", "--of", "all").stdout.splitlines()
    assert [line.split()[2:5] for line in shown[:2]] == [
        ["gamma", "out", "beta"],
        ["beta", "in", "gamma"],
    ]
    assert all(len(line) <= 80 for line in shown)
    assert journals(three) == before  # no row was written about it

    def of(*how: str) -> list[tuple[str, str]]:
        rows = lines(three.cli("alpha", "log", "--json", *how).stdout)
        return [(row["node"], row["ch"]) for row in rows]

    assert of("--of", "beta", "-n", "1") == [("beta", "response")]
    assert of("--of", "[bg]*", "-n", "1") == [("beta", "response"), ("gamma", "response")]
    assert of("--of", "all", "--corr", id[:6], "--ch", "command", "--since", "1h")[0][0] == "gamma"
    assert of("--of", "gamma", "--action", "none") == []


def test_they_are_followed_while_nodes_and_followers_come_and_go(three: Hive) -> None:
    beta = three.nodes["beta"]
    before = sent(three, "gamma", "beta")
    follower = Follower(three, "--of", "all")
    follower.shows(before, "beta", "gamma")
    for sender, to in (("gamma", "beta"), ("alpha", "gamma"), ("beta", "alpha")):
        follower.shows(sent(three, sender, to), sender, to)

    beta.stop(signal.SIGKILL)
    follower.tells("hive: beta: ")
    waits = sent(three, "gamma", "beta")
    follower.shows(sent(three, "gamma", "alpha"), "gamma", "alpha")
    beta.start()
    follower.tells("hive: beta: is back")
    follower.shows(waits, "gamma", "beta")
    ping = sent(three, "beta", "gamma", "command", "ping")
    follower.shows(ping, "beta", "gamma")

    three.node("delta", TEXTS).start()  # later than the follower
    known(three, "alpha", "delta")
    follower.shows(sent(three, "delta", "beta"), "delta", "beta")

    follower.process.kill()
    follower.process.wait()
    rows = [(row["node"], row["n"]) for row in follower.rows()]
    assert len({*rows}) == len(rows)
    news = sent(three, "gamma", "beta")  # nobody waits for what those who hold a question say
    eventually("it has come", lambda: any(row["id"] == news for row in journals(three)["beta"]))
    kept = {
        row["action"] for rows in journals(three).values() for row in rows if row["ch"] != "alert"
    }
    assert kept == {None, "ping"}
    for name in three.nodes:
        pending = asked(three, name, do="pending")
        assert not (pending["questions"] or pending["tasks"])
        assert not three.nodes[name].events("dropped", action=READ_JOURNAL)


def test_who_does_not_show_it_is_told_of_and_the_rest_goes_on(three: Hive) -> None:
    three.node("delta").start()
    three.node("epsilon", '[journal]\nshare = "gamma"\n').start()
    three.nodes["gamma"].stop()
    topics = module.Topics(three.prefix)
    older = {"node_id": "older", "status": "online", "last_seen": int(time.time()), "interval": 99}
    say(three.nodes["beta"], topics.meta("older", "state"), older, retain=True)
    say(three.nodes["beta"], topics.meta("older", "roster"), {"node": "older"}, retain=True)
    known(three, "alpha", "delta", "epsilon", "older")
    id = sent(three, "beta", "alpha")
    done = three.cli("alpha", "log", "--of", "all", "--json")
    assert [(row["node"], row["id"]) for row in lines(done.stdout)] == [("beta", id), ("alpha", id)]
    assert sorted(done.stderr.splitlines()) == [
        "hive: delta: [journal] share names nobody",
        f"hive: epsilon: {READ_JOURNAL} refused: [journal] share does not name alpha",
        "hive: gamma: stopped",
        "hive: older: an older hive, which shows no journal",
    ]
    # least of all an older one was asked, whose agent would be woken
    assert [row["to"] for row in asked(three, "alpha", do="log")["rows"]] == ["alpha"] * 2
    for name, code in {"delta": 4, "epsilon": 1, "gamma": 4}.items():
        assert not three.cli("alpha", "log", "--of", name, code=code).stdout
    for name, why in {
        "nobody": "hive: no node is called nobody, or has it; who is there: hive roster\n",
        "tag:gpu": "hive: no node is called tag:gpu, or has it; who is there: hive roster\n",
    }.items():
        assert three.cli("alpha", "log", "--of", name, code=1).stderr == why
    three.nodes["alpha"].stop()
    done = three.cli("alpha", "log", "--of", "all", code=1)
    assert done.stderr == (
        "hive: no daemon of alpha runs on this machine, which would ask the others;"
        " start one with: hive daemon\n"
    )


def test_doctor_tells_who_reads_it_and_that_an_open_broker_checks_nobody(hive: Hive) -> None:
    beta = hive.node("beta", TEXTS).start()
    said = hive.cli("beta", "doctor", code=None).stdout
    assert "the journal there is shown to alpha, with texts" in " ".join(said.split())
    assert "[journal] share is about names that anybody may use" in said
    assert beta.config.exists()
