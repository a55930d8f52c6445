"""What should happen with an envelope, against the protocol's own table."""

from __future__ import annotations

from typing import Any

import pytest

from hive import (
    CHANNELS,
    READ_JOURNAL,
    SHARE_RULE,
    Candidate,
    Decision,
    Do,
    Envelope,
    RoutingContext,
    Target,
    Topics,
    agent_rule,
    decide,
    destination,
    handler_rule,
    misplaced,
    selection,
    untimely,
)

# Protocol, "What a node does with an envelope":
# channel: (its action has a handler, its action has none, it has no action)
TABLE = {
    "command": ("run", "wake", "wake"),
    "sync": ("run", "wake", "wake if urgent"),
    "alert": ("wake at once", "wake at once", "wake at once"),
    "response": ("wake", "wake", "wake"),
    "status": ("wake if urgent", "wake if urgent", "wake if urgent"),
    "heartbeat": ("hear", "hear", "hear"),
}
CASES = [(ch, column) for ch in TABLE for column in range(3)]
AGENTS: tuple[tuple[str, ...], ...] = ((), ("main",), ("main", "second"))


def envelope(ch: str, to: str = "beta", **more: Any) -> Envelope:
    return Envelope.new("alpha", to, ch, "hello", id="m-1", now=1, **more)


def context(agents: tuple[str, ...] = ("main",), awaited: str = "") -> RoutingContext:
    return RoutingContext("beta", agents, {"git-sync"}, lambda corr: corr == awaited)


def test_the_table_has_every_channel() -> None:
    assert set(TABLE) == set(CHANNELS)


@pytest.mark.parametrize(("ch", "column"), CASES)
@pytest.mark.parametrize("agents", AGENTS, ids=["no agent", "one agent", "two agents"])
@pytest.mark.parametrize("urgency", ["now", "later"])
@pytest.mark.parametrize("to", ["beta", "all", "main", "second"])
def test_a_node_does_what_the_protocol_says(
    ch: str, column: int, agents: tuple[str, ...], urgency: str, to: str
) -> None:
    action = ("git-sync", "no-such", None)[column]
    decision = decide(envelope(ch, to, action=action, urgency=urgency), context(agents))
    does = TABLE[ch][column]
    if to not in ("beta", "all", *agents):
        assert decision.do is Do.DROP
    elif does == "run":
        assert decision == Decision(Do.RUN)
    elif does == "hear":
        assert decision == Decision(Do.HEAR)
    elif does == "wake if urgent" and urgency == "later":
        assert decision.do is Do.NOTE
    elif agents:
        told = {"beta": agents[:1], "all": agents}.get(to, (to,))
        now = urgency == "now" or does == "wake at once"
        assert decision.do is Do.WAKE
        assert (decision.agents, decision.now) == (told, now)
    elif ch in ("command", "sync") and action:
        assert decision.do is Do.REFUSE and "no-such" in decision.reason
    elif ch in ("command", "sync") and to != "all":
        assert decision == Decision(Do.REFUSE, "there is no agent to tell")
    else:
        assert decision.do is Do.NOTE


@pytest.mark.parametrize("ch", ["command", "sync"])
def test_an_agent_is_told_that_there_is_no_handler(ch: str) -> None:
    asked = decide(envelope(ch, action="no-such"), context())
    plain = decide(envelope(ch), context())
    assert asked.do is Do.WAKE and "no-such" in asked.reason
    assert plain == Decision(Do.WAKE, agents=("main",), now=True)


@pytest.mark.parametrize("agents", AGENTS)
def test_whoever_asks_for_a_file_that_is_no_handler_is_told_why(agents: tuple[str, ...]) -> None:
    here = context(agents).replace(why_not=lambda action: f"{action} is\r\u2028 not executable")
    reason = decide(envelope("command", action="deploy"), here).reason
    said = r"no handler for action deploy (deploy is\r\u2028 not executable)"
    assert reason == said + ("" if agents else ", and no agent to ask about it")
    assert decide(envelope("command"), here) == decide(envelope("command"), context(agents))


@pytest.mark.parametrize("agents", AGENTS)
@pytest.mark.parametrize("ch", ["response", "alert"])
def test_an_answer_goes_to_whoever_waits_for_it(ch: str, agents: tuple[str, ...]) -> None:
    answer = envelope(ch, corr="m-0")
    assert decide(answer, context(agents, awaited="m-0")).do is Do.NOTE
    assert decide(answer, context(("main",), awaited="m-9")).do is Do.WAKE


@pytest.mark.parametrize("ch", [ch for ch in TABLE if ch not in ("response", "alert")])
def test_nothing_but_an_answer_is_kept_from_the_agent_by_one_who_waits(ch: str) -> None:
    message = envelope(ch, corr="m-0")
    assert decide(message, context(awaited="m-0")) == decide(message, context())


@pytest.mark.parametrize("ch", TABLE)
def test_a_message_for_another_node_is_dropped(ch: str) -> None:
    assert decide(envelope(ch, "gamma", action="git-sync"), context()).do is Do.DROP


@pytest.mark.parametrize("text", ["waiting", "not waiting"])
@pytest.mark.parametrize("sender", ["alpha", "beta"])
@pytest.mark.parametrize("ch", TABLE)
def test_no_word_on_the_bus_means_anything_to_a_node(ch: str, sender: str, text: str) -> None:
    said, plain = (
        Envelope.new(sender, "beta", ch, words, corr="m-1", urgency="later")
        for words in (text, "hello")
    )
    assert decide(said, context()) == decide(plain, context())


@pytest.mark.parametrize(
    ("topic", "retained", "fit"),
    [
        ("hive/beta/command", False, True),
        ("hive/beta/command", True, False),
        ("hive/beta/sync", False, False),
        ("hive/all/command", False, False),
        ("other/beta/command", False, False),
        ("hive/beta/command/alpha", False, True),
        ("hive/beta/command/more", False, False),
        ("hive/beta/command/alpha/more", False, False),
        ("", False, False),
    ],
)
def test_an_envelope_is_acted_upon_in_its_place_only(topic: str, retained: bool, fit: bool) -> None:
    place = Topics("hive").place(topic)
    objection = misplaced(envelope("command"), place, context(), retained=retained)
    assert (objection is None) is fit


OWNERS = {"attic": "alpha", "cellar": "gamma"}


@pytest.mark.parametrize(
    ("topic", "sender", "to", "fit"),
    [
        ("hive/beta/command/alpha", "alpha", "beta", True),
        ("hive/beta/command/alpha", "attic", "beta", True),  # alpha's agent
        ("hive/beta/command/alpha", "cellar", "beta", False),
        ("hive/beta/command/alpha", "gamma", "beta", False),
        ("hive/beta/command/alpha", "alpha", "main", True),  # beta's agent, by beta's topic
        ("hive/beta/command/alpha", "alpha", "attic", False),
        ("hive/all/command/alpha", "alpha", "all", True),
        ("hive/all/command/alpha", "alpha", "beta", False),
        ("hive/all/command/alpha", "alpha", "main", False),
        ("hive/main/command/alpha", "alpha", "main", True),
        ("hive/beta/command", "alpha", "beta", False),  # it names no sender
        ("hive/beta/command/", "alpha", "beta", False),
    ],
)
def test_where_senders_are_checked_the_topic_says_who_it_is(
    topic: str, sender: str, to: str, fit: bool
) -> None:
    here = context().replace(speaks_for=lambda node, name: OWNERS.get(name) == node)
    said = Envelope.new(sender, to, "command", "hello")
    place = Topics("hive", "beta").place(topic)
    assert (misplaced(said, place, here, checked=True) is None) is fit
    if topic.count("/") == 3 and not topic.endswith("/"):
        assert (misplaced(said, place, here) is None) is fit  # and where they are not, too


def test_nobody_is_alive_by_the_heartbeat_of_an_agent() -> None:
    here = context().replace(speaks_for=lambda node, name: True)
    place = Topics("hive", "beta").place("hive/all/heartbeat/alpha")
    for sender, fit in (("alpha", True), ("attic", False)):
        beat = Envelope.new(sender, "all", "heartbeat", "{}")
        assert (misplaced(beat, place, here, checked=True) is None) is fit


# Who may


ALLOW = {handler_rule("deploy"): ("gamma",), agent_rule("main"): ("gamma", "delta")}


def guarded(**more: Any) -> RoutingContext:
    agents, handlers = ("main", "second"), ("deploy", "ping")
    return RoutingContext("beta", agents, handlers, allow=ALLOW, **more)


def said_by(sender: str, ch: str = "command", to: str = "beta", **more: Any) -> Envelope:
    return Envelope.new(sender, to, ch, "hello", id="m-1", now=1, **more)


@pytest.mark.parametrize("ch", ["command", "sync"])
@pytest.mark.parametrize("handlers", [(), ("deploy",)], ids=["removed", "there"])
def test_a_handler_runs_for_those_alone_whom_its_rule_names(
    ch: str, handlers: tuple[str, ...]
) -> None:
    here = guarded().replace(handlers=handlers)
    refused = decide(said_by("alpha", ch, action="deploy"), here)
    assert refused == Decision(Do.REFUSE, "[handlers.deploy] allow does not name alpha")
    for sender in ("gamma", "beta"):  # whoever may use this node may say what it does
        decision = decide(said_by(sender, ch, action="deploy"), here)
        assert decision.do is (Do.RUN if handlers else Do.WAKE)
    assert decide(said_by("alpha", ch, action="ping"), guarded()).do is Do.RUN


@pytest.mark.parametrize("ch", sorted(set(CHANNELS) - {"heartbeat"}))
def test_an_agent_is_woken_by_those_alone_whom_its_rule_names(ch: str) -> None:
    refused = decide(said_by("alpha", ch), guarded())
    assert refused == Decision(Do.REFUSE, "allow of [[oc_instances]] main does not name alpha")
    for sender in ("gamma", "delta", "beta"):
        assert decide(said_by(sender, ch), guarded()).agents == ("main",)
    assert decide(said_by("alpha", ch, to="second"), guarded()).agents == ("second",)
    assert decide(said_by("alpha", ch, to="all"), guarded()).agents == ("second",)
    assert decide(said_by("gamma", ch, to="all"), guarded()).agents == ("main", "second")
    unknown = decide(said_by("alpha", ch, action="unknown"), guarded())
    assert unknown.do is Do.REFUSE and unknown.reason.endswith("does not name alpha")


def test_an_empty_rule_names_nobody_but_this_node() -> None:
    here = guarded().replace(allow={handler_rule("ping"): ()})
    assert decide(said_by("alpha", action="ping"), here).do is Do.REFUSE
    assert decide(said_by("beta", action="ping"), here).do is Do.RUN


@pytest.mark.parametrize(
    ("whom", "reaches"), [("alpha", True), ("all", True), ("scout", True), ("omega", False)]
)
def test_an_answer_to_its_own_question_reaches_an_agent_from_whom_it_asked(
    whom: str, reaches: bool
) -> None:
    here = guarded(
        asked=lambda corr: whom if corr == "mine" else "",
        speaks_for=lambda node, agent: (node, agent) == ("alpha", "scout"),
    )
    for ch in ("response", "alert"):
        did = Do.WAKE if reaches else Do.REFUSE
        assert decide(said_by("alpha", ch, corr="mine"), here).do is did
        assert decide(said_by("alpha", ch, corr="other"), here).do is Do.REFUSE
    assert (decide(said_by("scout", "response", corr="mine"), here).do is Do.WAKE) is reaches
    for ch in ("command", "sync"):  # it asks, and answers nothing
        assert decide(said_by("alpha", ch, corr="mine"), here).do is Do.REFUSE


# When


DAY = 86400


@pytest.mark.parametrize(
    ("age", "why"),
    [
        (8 * DAY + 1, "it is more than 8 days old: a replay, or a clock that is wrong"),
        (8 * DAY, None),
        (0, None),
        (-DAY, None),
        (-DAY - 1, "it is more than a day ahead: a clock is wrong"),
    ],
)
def test_an_envelope_of_another_time_is_not_acted_upon(age: int, why: str | None) -> None:
    now = 100 * DAY
    assert untimely(envelope("command").replace(ts=now - age), now) == why


# What a node does of itself


@pytest.mark.parametrize("ch", sorted(CHANNELS))
@pytest.mark.parametrize("sender", ["beta", "gamma", "alpha"])
def test_a_journal_is_shown_to_those_alone_whom_the_rule_names(ch: str, sender: str) -> None:
    """And without a rule to nobody; what comes as an answer is a page of another's."""
    for allow in ({SHARE_RULE: ("gamma",)}, {}):
        here = guarded().replace(allow=allow)
        decision = decide(said_by(sender, ch, action=READ_JOURNAL), here)
        named = sender == "beta" or sender in allow.get(SHARE_RULE, ())
        if ch == "response" or (ch in ("command", "sync") and named):
            assert decision == Decision(Do.JOURNAL)
        elif ch in ("command", "sync"):
            why = f"[journal] share does not name {sender}"
            assert decision == Decision(Do.REFUSE, why)
        else:
            assert decision == decide(said_by(sender, ch), here)


@pytest.mark.parametrize(
    ("sender", "text", "note"),
    [
        ("alpha", "received", "receipt: received"),
        ("scout", "told main", "receipt: told main"),  # alpha's agent
        ("alpha", "read by main", "receipt: read by main"),
        ("gamma", "received", "a status that is not urgent"),
        ("alpha", "received!", "a status that is not urgent"),
        ("alpha", "told", "a status that is not urgent"),
    ],
)
def test_a_receipt_is_one_only_from_who_was_asked(sender: str, text: str, note: str) -> None:
    here = context().replace(
        asked=lambda id: "alpha" if id == "mine" else "",
        speaks_for=lambda node, agent: (node, agent) == ("alpha", "scout"),
    )
    said = Envelope.new(sender, "beta", "status", text, reply_to="mine", urgency="later")
    assert decide(said, here) == Decision(Do.NOTE, note)
    other = decide(said.replace(reply_to="other", corr="mine"), here)
    assert other == Decision(Do.NOTE, "a status that is not urgent")
    assert decide(said.replace(urgency="now"), here).do is Do.WAKE


def test_who_was_not_asked_has_answered_nothing_whoever_speaks_for_whom() -> None:
    here = guarded(speaks_for=lambda node, name: "" in (node, name))
    assert decide(said_by("alpha", "response", corr="m-0"), here).do is Do.REFUSE


def test_mail_of_an_agent_that_is_away_is_taken() -> None:
    here = context().replace(absent={"away"})
    assert decide(envelope("command", "away"), here).agents == ("away",)
    assert decide(envelope("command", "nobody"), here).do is Do.DROP
    assert decide(envelope("command", "all"), here).agents == ("main",)


@pytest.mark.parametrize("ch", ["command", "alert"])
def test_an_agent_is_not_told_what_it_said_itself(ch: str) -> None:
    both = context(("main", "second"))
    said = Envelope.new("main", "all", ch, "hello")
    assert decide(said, both).agents == ("second",)
    assert decide(said, context(("main",))) == Decision(Do.NOTE, "there is no agent to tell")


def test_why_a_file_is_no_handler_is_told_in_bounds() -> None:
    here = context().replace(why_not=lambda action: "x" * 1000)
    told = decide(envelope("command", action="deploy"), here).reason
    assert told == f"no handler for action deploy ({'x' * 298})"


# Whom a command means


@pytest.mark.parametrize("said", ["beta", "all", "tag:gpu", "web-*"])
def test_nodes_can_be_selected_by_name_tag_and_pattern(said: str) -> None:
    assert selection(said) == destination(said) == said


@pytest.mark.parametrize("said", ["any", "any:gpu"])
def test_whoever_can_do_it_is_no_selection(said: str) -> None:
    assert destination(said) == said
    with pytest.raises(ValueError):
        selection(said)


def test_the_one_that_has_least_to_do_is_chosen_and_by_name_among_equals() -> None:
    crowd = [
        Candidate(name, busy=busy, agent=True, alive=name != "e", tags=("t",) if name > "a" else ())
        for name, busy in (("a", 0.0), ("d", 1.0), ("b", 2.0), ("c", 1.0), ("e", 0.0))
    ]
    for said, there in (("any:t", ["c"]), ("tag:t", ["b", "c", "d"]), ("any", ["a"])):
        target = Target.find(said)
        assert target
        chosen, away = target.choose(crowd, "", "nobody")
        assert (chosen, [one.name for one in away]) == (there, ["e"])
    assert [one.words for one in (Target(tag="t"), Target(pattern="w*"))] == [
        "has the tag t",
        "is called like w*",
    ]
