"""Where messages go."""

from __future__ import annotations

import pytest
from paho.mqtt.client import topic_matches_sub

from hive import Envelope, Topics, topic_prefix


@pytest.mark.parametrize("prefix", ["hive", "home/attic/hive"])
@pytest.mark.parametrize("to", ["beta", "all"])
def test_an_envelope_goes_where_its_recipient_listens(prefix: str, to: str) -> None:
    topics = Topics(prefix)
    topic = topics.of(Envelope.new("alpha", to, "sync", "hello"))
    assert topic == f"{prefix}/{to}/sync" == topics.to(to, "sync")
    assert topic_matches_sub(topics.to(to), topic)
    assert not topic_matches_sub(topics.to("gamma"), topic)
    assert topics.meta_of(topic) is None


@pytest.mark.parametrize("prefix", ["hive", "home/attic/hive"])
@pytest.mark.parametrize("document", ["state", "roster", "git-sync"])
def test_a_meta_topic_can_be_taken_apart_again(prefix: str, document: str) -> None:
    topics = Topics(prefix)
    topic = topics.meta("beta", document)
    assert topic == f"{prefix}/meta/beta/{document}"
    assert topics.meta_of(topic) == ("beta", document)
    assert topic_matches_sub(topics.meta("+", document), topic)


@pytest.mark.parametrize(
    "topic",
    [
        "hive/beta/command",
        "hive/meta/beta",
        "hive/meta/beta/state/more",
        "other/meta/beta/state",
        "meta/beta/state",
        "hivemeta/beta/state",
        "hive/hive/meta/beta/state",
        "",
    ],
)
def test_no_other_topic_is_taken_for_a_meta_topic(topic: str) -> None:
    assert Topics("hive").meta_of(topic) is None


def test_no_daemon_hears_what_a_command_line_asks_for_itself() -> None:
    topics = Topics("hive")
    topic = topics.private("beta", "token")
    assert topic.startswith("hive/beta/")
    assert not any(topic_matches_sub(topics.to(name), topic) for name in ("beta", "all", "+"))
    assert not topic_matches_sub(topics.meta("+", "+"), topic)


@pytest.mark.parametrize("prefix", ["hive", "a/b/c", "Attic-2", "x" * 200])
def test_a_prefix_has_levels(prefix: str) -> None:
    assert topic_prefix(prefix) == prefix


@pytest.mark.parametrize(
    "prefix",
    ["", "/hive", "hive/", "a//b", "+", "a/#", "$SYS", "a b", "a\0", "hive\n", "é", "x" * 201, 1],
)
def test_a_prefix_that_would_not_do_is_refused(prefix: object) -> None:
    with pytest.raises(ValueError):
        topic_prefix(prefix)
