"""Each check of doctor by itself, and what its connection says to the broker and believes."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_doctor import config_of, context_of

import hive

Found = tuple[str, str, str]


def found(findings: Iterator[hive.Finding]) -> list[Found]:
    return [(one.level.name, one.what, one.todo) for one in findings]


# ---- The connection ----------------------------------------------------------------------


class Wire:
    """A client that writes down what it is asked; the test is its broker."""

    welcome, up, v5 = True, True, True

    def __init__(
        self,
        loop: hive.Loop,
        settings: object,
        client_id: str,
        subscriptions: Any,
        will: hive.OutgoingMessage,
    ) -> None:
        self.client_id, self.subscriptions, self.will = client_id, subscriptions, will
        self.sent, self.closed = list[hive.OutgoingMessage](), list[float]()
        self.gives_back: Callable[[str], object] = lambda topic: None

    def open(self, listener: Any) -> None:
        self.listener = listener

    def publish(self, message: hive.OutgoingMessage) -> None:
        self.sent.append(message)

    def subscribe(self, filters: list[tuple[str, int]]) -> None:
        for one, qos in filters:
            assert qos == 0
            self.gives_back(one)

    def close(self, then: Callable[[], None], within: float) -> None:
        self.closed.append(within)
        then()


AGENTS = {"oc_instances": [{"name": "main", "command": "true"}]}
Check = Callable[..., tuple[hive.BrokerCheck, Wire]]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Iterator[Check]:
    monkeypatch.setattr(hive, "MqttClient", Wire)
    for name in ("PROBE_PATIENCE", "BROKER_DEADLINE"):
        monkeypatch.setattr(hive, name, 0.02)
    made: list[hive.BrokerCheck] = []

    def make(**tables: Any) -> tuple[hive.BrokerCheck, Wire]:
        made.append(hive.BrokerCheck(config_of(**tables), lambda most: most))
        wire: Any = made[-1].client
        return made[-1], wire

    yield make
    for one in made:
        one._loop.close()


def arrive(
    wire: Wire, topic: str, payload: bytes = b"doctor", retained: bool = False
) -> list[bool]:
    acks = list[bool]()
    message = hive.IncomingMessage(topic, payload, retained, None, lambda: acks.append(True))
    wire.listener.deliver(message)
    return acks


def test_it_publishes_one_probe_after_the_other_and_keeps_what_is_kept_short(check: Check) -> None:
    began = time.time()
    broker, wire = check(**AGENTS)
    (first, main, second), config = broker.documents, config_of(**AGENTS)
    token = first.partition("/doctor-")[2]
    assert [main, second] == [f"hive/meta/main/doctor-{token}", f"{first}-2"]
    private = [config.topics.private(name, token) for name in ("alpha", "main")]
    assert wire.subscriptions == [*config.subscriptions, *((one, 0) for one in private)]
    assert (wire.client_id, wire.will) == ("", hive.OutgoingMessage(first, b"", retain=True))
    went_on = list[bool]()
    wire.listener.before_connecting(lambda: went_on.append(True))
    assert went_on
    assert not broker.subscribed
    wire.listener.on_connected()
    assert broker.subscribed
    beat, *_ = wire.sent
    assert (beat.topic, beat.qos, beat.retain) == ("hive/alpha/heartbeat", 0, False)
    said = hive.Envelope.parse(beat.payload)
    assert (said.id, said.sender, said.to, said.text) == (token, "alpha", "alpha", "{}")
    assert said.urgency == "later"
    for number, topic in enumerate([*private, *broker.documents], 2):
        probe = wire.sent[-1]
        assert len(wire.sent) == number, "the next one when this one is answered"
        kept = topic in broker.documents
        assert (probe.topic, probe.payload) == (topic, b"{}" if kept else b"doctor")
        assert (probe.qos, probe.retain) == (1, kept)
        if kept:
            assert probe.until and began <= probe.until - 60 <= time.time()
        else:
            assert probe.until is None
        with pytest.raises(hive.BrokerError):
            broker.publish()
        probe.done(0, "Success")
    assert len(wire.sent) == 6
    assert {*broker.missing} == {*private, beat.topic}
    broker.publish()
    assert broker.missing and not broker.refused
    assert arrive(wire, private[0], b"another's") == [True] and private[0] in broker.missing
    for topic in private:
        assert arrive(wire, topic) == [True]
    assert arrive(wire, beat.topic, beat.payload) == [True] and not broker.missing


def test_what_is_refused_has_its_reason(check: Check) -> None:
    broker, wire = check()
    wire.listener.on_connected()
    topic = wire.sent[-1].topic
    wire.sent[-1].done(0x87, "Not Authorized")
    assert broker.refused == {topic: "not authorized"}
    document = wire.sent[-1].topic
    wire.listener.on_disconnected("hung up")  # as Mosquitto 2.0.11 may
    assert broker.refused == {topic: "not authorized", document: "hung up"}
    broker.publish()  # and no more is waited for
    broker, wire = check()
    wire.listener.on_connected()
    for _ in range(3):
        wire.sent[-1].done(0, "")
    wire.listener.on_disconnected("hung up")
    assert broker.refused == {"hive/alpha/heartbeat": "hung up"}


def test_a_connection_that_ends_is_told_by_when_it_did(check: Check) -> None:
    broker, wire = check()
    wire.listener.on_disconnected("subscribing to x refused")
    assert broker.not_subscribed == "subscribing to x refused"
    broker.expect(lambda: broker.not_subscribed)
    for reason, words in (("refused: banned", "refused: banned"), ("", "no answer in 0 s")):
        broker, wire = check()
        if reason:
            wire.listener.on_disconnected(reason)
        with pytest.raises(hive.BrokerError, match=f"broker localhost:1883: {words}"):
            broker.expect(lambda: False)
    broker, wire = check()
    wire.listener.on_disconnected("refused: banned")
    with pytest.raises(hive.BrokerError):
        broker.expect(lambda: True)
    assert not broker.refused


@pytest.mark.parametrize(
    ("reason", "taken", "blames"),
    [
        ("refused: not authorized", True, True),
        ("refused: not authorized", False, False),
        (f"{hive.HANG_UP} at once", True, True),
        ("Connection refused", True, False),
        ("no answer", True, False),
    ],
)
def test_the_will_is_blamed_where_one_without_it_is_let_in(
    check: Check, monkeypatch: pytest.MonkeyPatch, reason: str, taken: bool, blames: bool
) -> None:
    def probe(loop: hive.Loop, settings: object, done: Callable[[bool], None]) -> None:
        loop.after(0, lambda: done(taken))

    monkeypatch.setattr(hive, "ConnectionProbe", probe)
    broker, wire = check()
    wire.listener.on_disconnected(reason)
    assert broker.takes_no_will() is blames


def test_what_is_kept_is_found_when_the_first_and_the_last_come_back(check: Check) -> None:
    broker, wire = check(**AGENTS)
    first, _, last = broker.documents
    for back, retained, finds in (
        ((first, last), True, True),
        ((first, last), False, False),  # by the subscription of before
        ((first,), True, False),
        ((last,), True, False),
    ):

        def give(filter: str, back: Any = back, retained: bool = retained) -> None:
            for topic in back:
                arrive(wire, topic, b"{}", retained)

        wire.gives_back = give
        assert broker.finds(["hive/meta/alpha/+"]) is finds


def test_a_topic_is_taken_where_the_broker_says_so(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, wire = check()
    for code, taken in ((0, True), (0x10, True), (0x87, False), (None, False)):

        def publish(message: hive.OutgoingMessage, code: int | None = code) -> None:
            assert (message.topic, message.payload, message.qos) == ("x", b"doctor", 1)
            if code is not None:
                message.done(code, "")

        monkeypatch.setattr(wire, "publish", publish)
        assert broker.takes("x") is taken


@pytest.mark.parametrize(("up", "within"), [(True, hive.GOODBYE), (False, 0.0)])
def test_what_was_left_is_taken_away_in_the_end(
    check: Check, monkeypatch: pytest.MonkeyPatch, up: bool, within: float
) -> None:
    broker, wire = check(**AGENTS)
    wire.up, closed = up, list[bool]()
    with monkeypatch.context() as patched:
        patched.setattr(broker._loop, "close", lambda: closed.append(True))
        broker.close()
    assert closed
    assert wire.sent == [hive.OutgoingMessage(one, b"", retain=True) for one in broker.documents]
    assert wire.closed == [within]


def test_other_nodes_are_taken_from_their_states(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_MEMBERS", 2)
    broker, wire = check()
    state = hive.encode_json({"status": "online", "last_seen": int(time.time()), "oc": {"x": {}}})
    large = state.ljust(hive.MAX_STATE)
    for topic, payload in (
        ("meta/alpha/state", state),
        ("meta/a b/state", state),
        ("meta/beta/roster", state),
        ("all/heartbeat", state),
        ("meta/beta/state", large + b" "),
        ("meta/beta/state", b"{"),
        ("meta/beta/state", large),
        ("meta/gamma/state", state),
        ("meta/delta/state", state),
    ):
        assert arrive(wire, f"hive/{topic}", payload, True) == [True]
    assert {*broker.others} == {"beta", "gamma"}
    assert (broker.others["beta"].status, broker.others["beta"].agents) == ("online", {})
    arrive(wire, "hive/meta/beta/state", b"", True)
    arrive(wire, "hive/meta/nobody/state", b"", True)
    assert {*broker.others} == {"gamma"}


def test_clocks_are_waited_for_as_long_as_they_may_take(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive.RetainedQuery, "QUIET", 0.01)
    broker, wire = check()
    broker.clocks.patience = 5.0
    broker.compare_clocks()  # nobody is awaited, so nobody has to speak
    state = hive.encode_json({"status": "online", "last_seen": int(time.time())})
    topic = "hive/meta/beta/state"
    arrive(wire, topic, state, True)
    spoken = hive.IncomingMessage(topic, state, False, None, lambda: None)
    broker._loop.after(0.02, partial(wire.listener.deliver, spoken))
    broker.compare_clocks()
    assert broker.clocks.complete
    wire.listener.on_connected()
    broker._unanswered.clear()
    broker.missing.clear()
    wire.listener.on_disconnected("hung up")
    with pytest.raises(hive.BrokerError, match="hung up"):
        broker.compare_clocks()


def test_its_waits_fit_into_what_a_person_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, waits, known = list[float](), list[float](), list[bool]()

    def wait(loop: hive.Loop, within: float, done: Callable[[], object]) -> None:
        waits.append(within)
        known.append(bool(done()))

    def left(most: float) -> float:
        asked.append(most)
        return most

    monkeypatch.setattr(hive, "MqttClient", Wire)
    monkeypatch.setattr(hive, "step_until", wait)
    broker = hive.BrokerCheck(config_of(), left)
    with pytest.raises(hive.BrokerError, match="no answer in 4 s"):
        broker.expect(lambda: False)
    broker._unanswered.clear()
    broker.publish()
    assert not broker.finds([]) and not broker.takes("x")
    broker.clocks.patience = 3.0
    broker.compare_clocks()
    assert asked == [4.0, 4.0, 3.0, 4.0] and waits == [4.0, 4.0, 1.5, 1.5, 1.5, 0.1, 3.0, 4.0]
    del known[:]
    broker.publish()
    broker.refused["x"] = "no"
    broker.publish()
    broker.refused.clear()
    broker.missing.clear()
    broker.publish()
    assert known == [True, False, True, True, True, True], "what is known is not waited for"
    broker._loop.close()


def test_a_time_to_come_is_one_beyond_what_is_tolerated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.5)
    clocks = hive.PeerClocks(config_of())

    def hear(peer: str, **said: object) -> None:
        payload = hive.encode_json({"status": "online"} | said)
        clocks.hear(
            hive.IncomingMessage(f"hive/meta/{peer}/state", payload, True, None, lambda: None)
        )

    hear("near", last_seen=1005)
    hear("far", last_seen=1006)
    hear("first", last_seen=1, interval=0)
    hear("early", last_seen=0.5)
    hear("late", last_seen=hive.MAX_TS + 1)
    assert clocks.ahead == {"far": 6.0} and clocks.awaited == {"near", "first"}
    assert clocks.patience == config_of().heartbeat.interval + 1


# ---- What is checked on it -----------------------------------------------------------------


def context(**broker: Any) -> Any:
    made = context_of(broker.pop("config", config_of()))
    made.broker, made.left, made.ending = SimpleNamespace(**broker), float, contextlib.ExitStack()
    return made


@pytest.mark.parametrize(
    ("error", "level", "words", "todo"),
    [
        (None, "OK", "h:1883 lets us in as me, in ", ""),
        ("refused: not authorized; ask", "FAIL", "h:1883: refused: not authorized: it lets", "ACL"),
        ("refused: qos not supported; set max_qos", "FAIL", "qos not supported: it", "set max_qos"),
        (f"{hive.HANG_UP} at once; look", "FAIL", "at once: it lets us in, but", "QoS 1"),
    ],
)
def test_what_comes_of_connecting(
    monkeypatch: pytest.MonkeyPatch, error: str | None, level: str, words: str, todo: str
) -> None:
    closed = list[bool]()
    made = context(config=config_of(mqtt={"host": "h", "username": "me"}))

    def expect(known: Callable[[], object]) -> None:
        assert known()
        if error:
            raise hive.BrokerError(f"broker h:1883: {error}")

    check = SimpleNamespace(
        **{"client": SimpleNamespace(welcome=True), "not_subscribed": "", "expect": expect},
        **{"close": lambda: closed.append(True), "takes_no_will": lambda: True},
        last_word=hive.OutgoingMessage("last/word", b""),
    )
    monkeypatch.setattr(hive, "BrokerCheck", lambda config, left: check)
    [(said, what, advice)] = found(hive.check_broker(made))
    assert said == level and words in what and todo in advice
    assert ("last/word" in what) is bool(error) and bool(advice) is bool(error)
    made.ending.close()
    assert closed and made.broker is check
    if error:
        check.takes_no_will = lambda: False
        with pytest.raises(hive.BrokerError, match="h:1883"):
            found(hive.check_broker(made))


def test_it_asks_the_broker_that_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = context(), list[hive.Config]()
    monkeypatch.setattr(hive, "find_broker", lambda config: None)
    what = "none is named, hosted, or at localhost:1883: the daemon will host one"
    assert found(hive.check_broker(made)) == [("SKIPPED", what, "")]

    def begin(config: hive.Config, left: object) -> Any:
        asked.append(config)
        raise hive.BrokerError("broker: no")

    there = hive.MqttConfig(host="there")
    monkeypatch.setattr(hive, "find_broker", lambda config: there)
    monkeypatch.setattr(hive, "BrokerCheck", begin)
    with pytest.raises(hive.BrokerError):
        found(hive.check_broker(made))
    assert asked[0].mqtt is made.config.mqtt is there


def test_without_a_name_it_says_so_and_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 100.25])
    check = SimpleNamespace(expect=lambda known: None, close=lambda: None)
    monkeypatch.setattr(hive, "BrokerCheck", lambda config, left: check)
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    made = context(config=config_of(mqtt={"host": "h"}))
    what = "h:1883 lets us in without a name, in 250 ms"
    assert found(hive.check_broker(made)) == [("OK", what, "")]


def test_a_subscription_that_is_refused_is_said_with_what_to_allow() -> None:
    for subscribed, refused in ((True, ""), (False, "subscribing to x refused")):
        asked = list[object]()
        made = context(
            **{"subscribed": subscribed, "not_subscribed": refused},
            expect=lambda known, asked=asked: asked.append(known()),
        )
        [(level, what, todo)] = found(hive.check_subscribing(made))
        assert asked == [True if subscribed else refused]
        assert level == ("FAIL" if refused else "OK") and ("ACL" in todo) is bool(refused)
        assert what == (refused or "the broker takes every subscription of this node")


@pytest.mark.parametrize(
    ("why", "advice"),
    [
        ("not authorized", "ACL let"),
        (hive.HANG_UP, ""),
        ("qos not supported", "max_qos"),
        ("odd", "ACL let"),
    ],
)
def test_what_is_advised_where_publishing_is_refused(why: str, advice: str) -> None:
    made = context(refused={"x": why}, publish=lambda: None)
    [(level, _, todo)] = found(hive.check_publishing(made))
    assert level == "FAIL" and advice in todo
    assert ("in the broker's ACL let" in todo) is (advice != "max_qos")


def topics_taken(*taken: bool) -> tuple[list[str], Callable[[str], bool]]:
    asked, left = list[str](), [*taken]

    def takes(topic: str) -> bool:
        asked.append(topic)
        return left.pop(0)

    return asked, takes


@pytest.mark.parametrize(
    ("taken", "senders", "level", "words"),
    [
        ((False,), "open", "SKIPPED", "not tried: the broker does not take hive/nobody-"),
        ((True, True), "open", "OK", "not checked: "),
        ((True, True), "checked", "FAIL", "not checked: "),
        ((True, False), "checked", "OK", "checked: the broker lets no node"),
        ((True, False), "open", "OK", "the broker lets no node speak"),
    ],
)
def test_who_may_speak_for_whom_is_tried_with_two_names(
    taken: tuple[bool, ...], senders: str, level: str, words: str
) -> None:
    asked, takes = topics_taken(*taken)
    config = config_of(mqtt={"host": "h", "username": "alpha", "senders": senders})
    made = context(config=config, client=SimpleNamespace(v5=True), takes=takes)
    [(said, what, todo)] = found(hive.check_senders(made))
    assert said == level and what.startswith(words)
    nobody = asked[0].split("/")[1]
    expected = [f"hive/{nobody}/status/{who}" for who in ("alpha", nobody)]
    assert asked == expected[: len(taken)] and nobody.startswith("nobody-") and len(nobody) == 15
    assert bool(todo) is (level == "FAIL" or (taken == (True, False) and senders == "open"))


def row(name: str, status: str, node: str = "") -> hive.StatusRow:
    said = {"status": status, "last_seen": int(time.time()), "daemon_node": node or name}
    return hive.status_row(name, said, config_of().heartbeat, time.time())


def test_of_nodes_in_trouble_a_few_are_named() -> None:
    def nodes(*rows: hive.StatusRow) -> list[Found]:
        return found(hive.check_nodes(context(others={one.name: one for one in rows})))

    agent = row("main", "offline", "beta")
    assert nodes(agent) == [("SKIPPED", "no other node has been seen", "")]
    assert nodes(agent, row("beta", "online")) == [("OK", "1 node besides this one: 1 online", "")]
    gone = [row(f"n{number}", "offline") for number in range(6)]
    [(level, what, todo)] = nodes(*gone, row("beta", "online"))
    named = ", ".join(f"n{number} is offline" for number in range(5))
    assert (level, what) == ("WARN", f"{named} (and 1 more), of 7 besides this one")
    assert "forget NAME" in todo


# ---- What is checked without it ------------------------------------------------------------


def test_the_first_lines_say_which_python_paho_and_node() -> None:
    [(level, what, todo)] = found(hive.check_python(context()))
    version = ".".join(map(str, sys.version_info[:3]))
    assert (level, todo) == ("OK", "") and what.startswith(f"{version}")
    assert what.endswith(f"; hive {hive.__version__} ({hive.build()})")
    [(level, what, _)] = found(hive.check_paho(context()))
    assert level == "OK" and what[0].isdigit()
    made = context()
    made.load, made.config = lambda: config_of(), None
    said = "node alpha: no file, the defaults hold (hive init writes one)"
    assert found(hive.check_config(made)) == [("OK", said, "")]
    assert made.config == config_of()


def test_the_files_are_well_and_whom_the_journal_is_shown_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = list[str]()

    def look(folder: Path, kind: str = "state") -> Iterator[hive.Finding]:
        looked_at.append(kind)
        yield from ()

    monkeypatch.setattr(hive, "check_folder", look)
    node = {"id": "alpha", "state_dir": str(tmp_path)}
    well = f"only you can change them; state is in {tmp_path}"
    assert found(hive.check_files(context(config=config_of(node=node)))) == [("OK", well, "")]
    assert looked_at == ["state", "the broker's directory"]
    for texts, word in ((True, "with"), (False, "without")):
        journal = {"share": ["beta", "gamma"], "share_texts": texts}
        config = config_of(node=node, mqtt={"host": "h"}, journal=journal)
        shown = f"{well}; the journal there is shown to beta, gamma, {word} texts"
        assert found(hive.check_files(context(config=config))) == [("OK", shown, "")]
    assert looked_at[2:] == ["state", "state"]  # that broker is not ours


def test_a_folder_that_is_there_has_room_for_a_busy_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[object]()

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            seen.append(len(data))
            raise OSError(28, "No space left on device")

    def made(dir: Path) -> Full:
        seen.append(dir)
        return Full()

    tmp_path.chmod(0o700)
    assert found(hive.check_folder(tmp_path)) == []
    monkeypatch.setattr(tempfile, "TemporaryFile", made)
    [(level, what, todo)] = found(hive.check_folder(tmp_path, "a folder"))
    assert (level, what) == ("FAIL", f"a folder {tmp_path}: No space left on device")
    assert "delete something" in todo and seen == [tmp_path, 64 * 1024]
    below = tmp_path / "a" / "b"
    [(level, what, _)] = found(hive.check_folder(below))
    assert what == f"state directory {tmp_path}: No space left on device"
    tmp_path.chmod(0o755)  # below it a private one is made
    assert [one[0] for one in found(hive.check_folder(below))] == ["FAIL"]
    monkeypatch.undo()
    assert found(hive.check_folder(below)) == []
    [(level, _, todo)] = found(hive.check_folder(tmp_path))
    assert (level, todo) == ("WARN", f"chmod 700 {tmp_path}")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        found(hive.check_folder(link))  # which is the finding that run_check makes of it


def test_a_folder_where_one_may_not_write_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[object]()

    def access(folder: Path, mode: int) -> bool:
        asked.append((folder, mode))
        return False

    monkeypatch.setattr(os, "access", access)  # as to root all is open
    [(level, what, todo)] = found(hive.check_folder(tmp_path / "below"))
    assert (level, what) == ("FAIL", f"state directory {tmp_path}: you may not write to it")
    assert "state_dir" in todo and asked == [(tmp_path, os.W_OK | os.X_OK)]


def test_rules_about_names_that_nobody_checks_are_a_warning(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "ping").write_text("#!/bin/sh\n")
    (tmp_path / "ping").chmod(0o755)
    node = {"id": "alpha", "handler_dir": str(tmp_path)}
    rules: dict[str, Any] = {
        "handlers": {"ping": {"allow": ["beta", "gamma"]}},
        "journal": {"share": ["beta"]},
    }

    def said(**tables: Any) -> list[Found]:
        return found(hive.check_handlers(context(config=config_of(node=node, **tables))))

    where = f"in {tmp_path}"
    assert said() == [("OK", f"ping, {where}", "")]
    alone = ("OK", f"ping (from beta, gamma, alpha alone), {where}", "")
    assert said(**rules) == [alone]  # the hive is this user's own broker
    why = "is about names that anybody may use: this broker does not check senders"
    todo = "see [mqtt] senders"
    named = {"mqtt": {"host": "h", "username": "alpha"}}
    assert said(**named, **rules) == [
        ("WARN", f"[journal] share and allow {why}", todo),
        alone,
    ]
    assert said(**named, journal=rules["journal"])[0][1] == f"[journal] share {why}"
    assert said(**named, handlers=rules["handlers"])[0][1] == f"allow {why}"
    named["mqtt"]["senders"] = "checked"
    assert said(**named, **rules) == [alone]
    assert said(handlers={"pnig": {"allow": ["beta"]}})[0] == (
        *("WARN", "[handlers.pnig] is about none that is there"),
        hive.did_you_mean("pnig", ["ping"]),
    )


def test_how_the_daemon_is_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, closed = list[object](), list[bool]()
    answers: list[Any] = [
        None,
        {},
        hive.DaemonError("alpha's daemon: it hangs"),
        {"trouble": "no journal"},
        {"trouble": ""},
    ]

    def connect(config: hive.Config) -> Any:
        answer = answers.pop(0)

        def ask(request: object) -> Any:
            asked.append(request)
            if isinstance(answer, Exception):
                raise answer
            return answer

        done = SimpleNamespace(ask=ask, close=lambda: closed.append(True))
        return None if answer is None else done

    monkeypatch.setattr(hive, "connect_to_daemon", connect)
    config = config_of(node={"id": "alpha", "state_dir": "/nowhere"})
    file = hive.control_socket_path(config)
    said = [found(hive.check_daemon(context(config=config)))[0] for _ in range(5)]
    degraded = "alpha's runs, and is degraded: no journal"
    assert said == [
        ("WARN", "alpha's does not run on this machine", "start it: hive daemon"),
        ("FAIL", f"alpha's does not answer at {file}: no answer", "restart it"),
        ("FAIL", f"alpha's does not answer at {file}: it hangs", "restart it"),
        ("WARN", degraded, "see the other lines here, and its log"),
        ("OK", f"alpha's runs, and answers at {file}", ""),
    ]
    assert asked == [{"do": "doctor"}] * 4 and len(closed) == 4


def test_agents_are_named_with_whom_they_listen_to_and_found_where_none_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: "/x" if name == "codex" else None)
    none = "none configured, so messages wake nobody"
    there = [("OK", f"{none}; found here: main, codex", "")]
    monkeypatch.setattr(hive, "find_agents", lambda home: {"main": None})
    assert found(hive.check_agents(context())) == there
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(hive, "find_agents", lambda home: {})
    assert found(hive.check_agents(context())) == [("OK", none, "")]
    probed = list[object]()

    def probe(ports: set[int]) -> dict[int, str]:
        probed.append(ports)
        return {7: ""}

    monkeypatch.setattr(hive, "probe_ports", probe)
    well = hive.Finding(hive.Level.OK, "it is well")
    monkeypatch.setattr(hive, "agent_finding", lambda one, home, port, silent: well)
    agents = [{"name": "a", "port": 7, "allow": ["beta"]}, {"name": "b", "command": "true"}]
    assert found(hive.check_agents(context(config=config_of(oc_instances=agents)))) == [
        ("OK", "it is well (from beta, alpha alone)", ""),
        ("OK", "it is well", ""),
    ]
    assert probed == [{7}]


def test_a_script_that_cannot_begin_is_named(tmp_path: Path) -> None:
    script = tmp_path / "wake"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    agent = config_of(oc_instances=[{"name": "x", "command": str(script)}]).oc_instances[0]
    [(level, what, todo)] = found(iter([hive.agent_finding(agent, tmp_path, None, {})]))
    assert (level, todo) == ("FAIL", "mend it") and what.startswith(f"x: {script}: ")


def test_ports_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = list[tuple[int, Callable[[str], None]]]()

    def probe(loop: hive.Loop, number: int, done: Callable[[str], None]) -> None:
        waiting.append((number, done))
        if len(waiting) == 2:
            for port, each in waiting:
                loop.after(0, partial(each, "" if port == 1 else "refused"))

    monkeypatch.setattr(hive, "probe_port", probe)
    closed, close = list[hive.Loop](), hive.Loop.close

    def closing(loop: hive.Loop) -> None:
        closed.append(loop)
        close(loop)

    monkeypatch.setattr(hive.Loop, "close", closing)
    assert hive.probe_ports([1, 2]) == {1: "", 2: "refused"}
    assert hive.probe_ports([]) == {} and len(closed) == 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, [("OK", "Mosquitto is kept by systemd; its certificate holds 29 days")]),
        ({"days": 28}, [("WARN", "its certificate holds 28 days, and was not renewed")]),
        ({"days": 1}, [("WARN", "its certificate holds 1 days, and was not renewed")]),
        ({"days": 0}, [("FAIL", "its certificate holds 0 days, and was not renewed")]),
        ({"service": None}, [("FAIL", "Mosquitto for this hive does not run; see LOG")]),
        ({"broker": None}, [("FAIL", "Mosquitto for this hive does not run; see LOG")]),
        ({"unnamed": ["a", "b"]}, [("FAIL", "its certificate does not name a, b")]),
        ({"error": True}, [("FAIL", "HERE: No such device")]),
        (
            {"keeper": hive.NOT_KEPT},
            [("WARN", "Mosquitto for this hive would not be started again after a reboot")],
        ),
    ],
    ids=repr,
)
def test_how_a_hive_is_carried(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], says: list[tuple[str, str]]
) -> None:
    how = {
        "days": 29,
        "service": 1,
        "broker": 2,
        "unnamed": [],
        "error": False,
        "keeper": "",
    } | more
    ports = list[int]()

    def bind(port: int) -> None:
        ports.append(port)
        if how["error"]:
            raise OSError(19, "No such device")

    settings = SimpleNamespace(bind=bind, listen="HERE")
    host = SimpleNamespace(
        **{"settings": lambda: settings, "days_left": lambda now: how["days"], "log": "LOG"},
        **{"service_pid": lambda: how["service"], "broker_pid": lambda: how["broker"]},
        **{"unnamed": lambda settings: how["unnamed"], "bridge": lambda: ("", None)},
        sites=lambda: [],
    )
    monkeypatch.setattr(hive, "Host", lambda folder: host)
    monkeypatch.setattr(hive, "supervisor", lambda: how["keeper"] or "is kept by systemd")
    said = found(hive.check_hosting(context()))
    assert [one[:2] for one in said] == says and ports == [0], "any free port will do"
    assert {one[2] for one in said} == ({""} if says[0][0] == "OK" else {"hive host"})


def test_bridges_are_there_or_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"@lab": "1", "@office": "0", "@attic": ""}
    mine = ("@attic", hive.MqttConfig(host="far", port=8883))
    host = SimpleNamespace(
        **{
            "settings": lambda: SimpleNamespace(bind=lambda port: None),
            "days_left": lambda now: 99,
        },
        **{"service_pid": lambda: 1, "broker_pid": lambda: 1, "unnamed": lambda settings: []},
        **{"sites": lambda: ["@lab", "@office"], "bridge": lambda: ("", None)},
    )
    monkeypatch.setattr(hive, "Host", lambda folder: host)
    monkeypatch.setattr(hive, "supervisor", lambda: "is kept by systemd")
    monkeypatch.setattr(hive, "bridge_word", lambda host, site: words[site])
    todo = "is a broker running there (hive host), and no firewall in between?"
    assert found(hive.check_hosting(context()))[1:] == [
        ("OK", "the bridge of @lab is there", ""),
        ("WARN", "the bridge of @office is cut", todo),
    ]
    host.sites, host.bridge = list, lambda: mine
    assert found(hive.check_hosting(context()))[1:] == [
        ("WARN", "the bridge of @attic to far:8883 is cut", todo)
    ]
    host.settings = lambda: None
    assert found(hive.check_hosting(context())) == []


# ---- All of them ---------------------------------------------------------------------------


def test_what_needs_what_failed_is_skipped_and_says_whose_fault_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended, begun = list[str](), list[str]()

    def finds(*levels: hive.Level) -> Callable[[Any], Iterator[hive.Finding]]:
        def run(made: Any) -> Iterator[hive.Finding]:
            assert made.load is config_of
            made.ending.callback(ended.append, "closed")
            yield from (hive.Finding(level, "it is so") for level in levels)

        return run

    fail, skipped, warn, ok = (
        getattr(hive.Level, one) for one in ("FAIL", "SKIPPED", "WARN", "OK")
    )
    checks = (
        hive.Check("a", finds(fail, ok)),
        hive.Check("b", finds(ok), ("a",)),
        hive.Check("c", finds(ok), ("d", "b")),
        hive.Check("d", finds(skipped), ()),
        hive.Check("e", finds(ok), ("d",)),
        hive.Check("f", finds(warn), ()),
        hive.Check("g", finds(ok), ("f",)),
    )
    monkeypatch.setattr(hive, "CHECKS", checks)
    said = [(name, one.level, one.what) for name, one in hive.examine(config_of, 0, begun.append)]
    assert said == [
        *(("a", fail, "it is so"), ("a", ok, "it is so")),
        ("b", skipped, "skipped, because a failed"),
        ("c", skipped, "skipped, because a failed"),
        ("d", skipped, "it is so"),
        ("e", skipped, "skipped, because d was skipped"),
        *(("f", warn, "it is so"), ("g", ok, "it is so")),
    ]
    assert begun == ["a", "b", "c", "d", "e", "f", "g"] and ended == ["closed"] * 4


def test_each_check_needs_what_comes_before_it() -> None:
    names = [check.name for check in hive.CHECKS]
    for number, check in enumerate(hive.CHECKS):
        assert {*check.needs} <= {*names[:number]}
    broker = {check.name for check in hive.CHECKS[names.index("broker") + 1 :]}
    assert all(check.needs for check in hive.CHECKS if check.name in broker)


def test_an_error_of_the_system_without_a_file_is_a_finding_too() -> None:
    def fail(made: object) -> Iterator[hive.Finding]:
        raise OSError(5, "Input/output error")
        yield

    said = found(hive.run_check(hive.Check("files", fail), context()))
    assert said == [("FAIL", "input/output: Input/output error", "")]


def test_what_was_not_looked_at_has_no_colour_and_no_line_is_endless() -> None:
    skipped = hive.Finding(hive.Level.SKIPPED, "x" * 2000)
    line = hive.finding_line("clock", skipped, True)
    assert line.startswith("--    clock      xxx") and len(line) == len("--    clock      ") + 1000
