"""One message: its fields, channel and topic.  Whatever comes in, one kind of error comes out."""

from __future__ import annotations

import json
import sys
import time
import uuid
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

import hive
from hive import CHANNELS, Envelope, EnvelopeError, Topics, Wake, main, topic_prefix

MAX_TEXT = 256 * 1024
GOOD: dict[str, Any] = {
    "v": 1,
    "id": "m-1",
    "ts": 1771143500,
    "from": "alpha",
    "to": "beta",
    "ch": "command",
    "urgency": "now",
    "text": "hello",
}
OPTIONAL: dict[str, Any] = {"corr": "m-0", "replyTo": "m-0", "ttl": 60, "action": "git-sync"}
FIELDS = [*GOOD, *OPTIONAL]
NUMBERS = ("v", "ts", "ttl")

moderate = settings(deadline=None, max_examples=150)
ids = st.builds(str.__add__, st.sampled_from("AZaz09"), st.text("AZaz09._:-", max_size=63))
names = st.builds(str.__add__, st.sampled_from("AZaz09"), st.text("AZaz09._-", max_size=62)).filter(
    lambda one: one not in ("all", "meta")
)
finite = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
json_values = st.recursive(
    finite | st.floats(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
envelopes = st.builds(
    Envelope,
    v=st.just(1),
    id=ids,
    ts=st.integers(1, 253_402_300_799),
    sender=names,
    to=names | st.just("all"),
    ch=st.sampled_from(sorted(CHANNELS)),
    urgency=st.sampled_from(["now", "later"]),
    text=st.text(min_size=1),
    corr=st.none() | ids,
    reply_to=st.none() | ids,
    ttl=st.none() | st.integers(0, 2**32 - 1),
    action=st.none() | names,
    extra=st.dictionaries(
        st.text().filter(lambda key: key not in FIELDS),
        st.none() | st.integers() | st.text() | st.lists(st.booleans() | st.text()),
    ),
)


def payload(**changed: Any) -> bytes:
    """An envelope in which some fields are different."""
    return json.dumps(GOOD | changed).encode()


def raw(field: str, value: str) -> bytes:
    """An envelope in which one field holds this piece of JSON."""
    return payload(**{field: "HERE"}).replace(b'"HERE"', value.encode())


def refusal(data: bytes) -> str:
    with pytest.raises(EnvelopeError) as caught:
        Envelope.parse(data)
    return str(caught.value)


def parse_or_one_line(data: bytes) -> Envelope | None:
    try:
        return Envelope.parse(data)
    except EnvelopeError as error:
        assert len(str(error)) < 250 and str(error).isprintable()
        return None


def strictly(data: bytes) -> Any:
    """Parse JSON as the standard has it, without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(data, parse_constant=refuse)


@moderate
@given(envelopes)
def test_an_envelope_survives_the_wire(envelope: Envelope) -> None:
    assert Envelope.parse(envelope.encode()) == envelope
    assert b"\n" not in envelope.encode()


@moderate
@given(st.binary())
def test_noise_is_no_envelope(data: bytes) -> None:
    assert parse_or_one_line(data) is None


@moderate
@given(envelopes, st.integers(0), st.binary(max_size=4), st.integers(0, 4))
def test_a_damaged_envelope_is_an_envelope_or_an_error(
    envelope: Envelope, at: int, put: bytes, drop: int
) -> None:
    data = envelope.encode()
    at %= len(data)
    parse_or_one_line(data[:at] + put + data[at + drop :])


@moderate
@given(json_values)
def test_any_json_is_an_envelope_or_an_error(value: object) -> None:
    assert parse_or_one_line(json.dumps(value).encode()) is None


@moderate
@given(st.dictionaries(st.sampled_from([*OPTIONAL, "v", "from", "text", "x"]), json_values))
def test_any_json_in_any_field_is_an_envelope_or_an_error(changed: dict[str, Any]) -> None:
    envelope = parse_or_one_line(payload(**changed))
    assert envelope is None or strictly(envelope.encode())


@pytest.mark.parametrize("value", [[], ["x"], {}, {"x": 1}, True, False, -1, ""])
@pytest.mark.parametrize("field", FIELDS)
def test_a_value_that_fits_nowhere_is_refused_in_each_field(field: str, value: object) -> None:
    assert refusal(payload(**{field: value})).startswith(f"{field}: {value!r} ")


@pytest.mark.parametrize("field", FIELDS)
def test_a_number_is_no_string_and_a_string_no_number(field: str) -> None:
    for value in ("1", "1.5", "one") if field in NUMBERS else (0, 1, 1.5):
        assert refusal(payload(**{field: value})).startswith(f"{field}: {value!r} ")


@pytest.mark.parametrize("text", ["a b", "a\nb", "../b", "\0", "é", "x" * 65])
@pytest.mark.parametrize("field", ["id", "corr", "replyTo", "action", "ch", "urgency"])
def test_a_string_with_other_characters_is_refused(field: str, text: str) -> None:
    assert refusal(payload(**{field: text})).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("field", "value"), [("ts", 0), ("ts", 0.5), ("v", 0), ("v", 1.5), ("ttl", 2**32)]
)
def test_a_number_out_of_its_range_is_refused(field: str, value: float) -> None:
    assert refusal(payload(**{field: value})).startswith(f"{field}: {value!r} ")


@pytest.mark.parametrize("field", GOOD)
def test_a_required_field_must_be_there(field: str) -> None:
    without = {key: value for key, value in GOOD.items() if key != field}
    assert refusal(json.dumps(without).encode()) == f"{field}: missing"
    assert refusal(payload(**{field: None})) == f"{field}: null"


@pytest.mark.parametrize("field", OPTIONAL)
def test_null_in_an_optional_field_means_absent(field: str) -> None:
    assert Envelope.parse(payload(**{field: None})) == Envelope.parse(payload())


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000])
@pytest.mark.parametrize("field", FIELDS)
def test_a_number_that_is_none_is_refused_in_each_field(field: str, value: str) -> None:
    refusal(raw(field, value))


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", '{"deep": [NaN]}', "[-1e999]"])
def test_what_is_passed_on_is_json(value: str) -> None:
    envelope = parse_or_one_line(raw("unknown", value))
    assert envelope is None or strictly(envelope.encode())


BAD_NAMES = {
    "empty": "",
    "a slash": "a/b",
    "one level": "+",
    "all levels": "#",
    "wildcard within": "a+",
    "$SYS": "$SYS",
    "NUL": "a\0",
    "a newline": "alpha\n",
    "a lone surrogate": "a\ud800",
    "64 characters": "x" * 64,
    "70,000 characters": "x" * 70_000,
    "a dot first": ".a",
    "a dash first": "-a",
    "a space": "a b",
    "another alphabet": "al\u0440ha",
    "reserved": "meta",
}


@pytest.mark.parametrize("field", ["from", "to"])
@pytest.mark.parametrize("value", BAD_NAMES.values(), ids=BAD_NAMES)
def test_what_would_spoil_a_topic_is_no_name(field: str, value: str) -> None:
    assert refusal(payload(**{field: value})).startswith(f"{field}: '")


def test_a_name_may_have_63_characters_and_dots() -> None:
    assert Envelope.parse(payload(to="x" * 63)).to == "x" * 63
    assert Envelope.parse(payload(**{"from": "0.a_b-C"})).sender == "0.a_b-C"


def test_all_is_a_recipient_and_no_sender() -> None:
    assert Envelope.parse(payload(to="all")).to == "all"
    refusal(payload(**{"from": "all"}))


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"\xff\xfe{}", "payload: not UTF-8: b'\\xff\\xfe{}'"),
        (b"hello", "payload: not JSON: 'hello'"),
        (b"", "payload: not JSON: ''"),
        (b"42", "payload: not a JSON object: 42"),
        (b"null", "payload: not a JSON object: None"),
        (b"[1]", "payload: not a JSON object: [1]"),
        (b"{}", "v: missing"),
        (payload(v=2), "v: 2 is not 1, the version that this hive speaks"),
        (payload(ts=True), "ts: True is not Unix seconds (not milliseconds) above 0"),
        (
            payload(ts=1771143500000),
            "ts: 1771143500000 is not Unix seconds (not milliseconds) above 0",
        ),
        (
            payload(**{"from": "a/b"}),
            "from: 'a/b' is not a name: 1 to 63 of A-Za-z0-9._- , not all, any, meta,"
            " state, roster or a channel's",
        ),
        (
            payload(ch="gossip"),
            "ch: 'gossip' is not"
            ' "command" or "response" or "sync" or "heartbeat" or "status" or "alert"',
        ),
        (payload(urgency="soon"), 'urgency: \'soon\' is not "now" or "later"'),
        (
            payload(text=""),
            "text: '' is not a text: Unicode, not empty, at most 256 KiB of UTF-8",
        ),
        (
            payload(replyTo=[]),
            "replyTo: [] is not an id: 1 to 64 of A-Za-z0-9._:- , the first a letter or digit",
        ),
        (payload(action="../x"), "action: '../x' is not an action: 1 to 63 of A-Za-z0-9._-"),
    ],
)
def test_an_error_names_the_field_and_what_it_held(data: bytes, line: str) -> None:
    assert refusal(data) == line


@pytest.mark.parametrize("brackets", ["[", "]", '{"a":', "[{"])
def test_nesting_without_end_is_refused(brackets: str) -> None:
    refusal(brackets.encode() * 100_000)
    refusal(raw("unknown", brackets * 100_000))
    refusal(raw("from", "[" * 100_000 + "]" * 100_000))


@pytest.mark.parametrize("levels", [100, 500, 900])
def test_an_unknown_field_nested_too_deep_is_refused(levels: int) -> None:
    line = refusal(raw("weird", "[" * levels + "]" * levels))
    assert line == "'weird': no portable JSON (NaN, or too deep)"


@pytest.mark.parametrize("half", ["\ud83d", "\udfff", "\ud800"])
def test_a_broken_surrogate_is_kept_as_a_mark_wherever_it_is(half: str) -> None:
    said = payload(text=f"cut {half}", unknown={"deep": [{half: half}]}, **{half: 1})
    envelope = Envelope.parse(said)
    assert envelope.text == "cut \ufffd"
    assert envelope.extra == {"unknown": {"deep": [{"\ufffd": "\ufffd"}]}, "\ufffd": 1}
    assert Envelope.parse(envelope.encode()) == envelope
    assert Envelope.new("alpha", "beta", "command", half).text == "\ufffd"


def test_a_whole_pair_stays_as_it_is() -> None:
    assert Envelope.parse(payload(text="\U0001f41d", more="\U0001f41d")).text == "\U0001f41d"
    assert Envelope.parse(raw("more", '"\\ud83d\\udc1d"')).extra == {"more": "\U0001f41d"}


@pytest.mark.parametrize("field", ["id", "from", "to", "ch", "corr", "replyTo", "action"])
def test_a_name_with_a_broken_surrogate_is_refused(field: str) -> None:
    refusal(payload(**{field: "half\ud83d"}))


def test_a_text_may_have_256_kib_of_utf_8() -> None:
    longest = "é" * (MAX_TEXT // 2)
    assert Envelope.parse(payload(text=longest)).text == longest
    assert refusal(payload(text=longest + "x")).startswith("text: ")


def test_the_longest_text_survives_whatever_its_characters_cost_in_json() -> None:
    envelope = Envelope.new("alpha", "beta", "command", "\1" * MAX_TEXT)
    assert Envelope.parse(envelope.encode()) == envelope


def test_a_payload_without_end_is_refused_before_it_is_read() -> None:
    line = refusal(b" " * 10_000_000)
    assert line.startswith("payload: 10000000 bytes, the limit is ")


@pytest.mark.parametrize("field", ["id", "corr", "replyTo"])
@pytest.mark.parametrize("first", "-._:")
def test_an_id_begins_with_a_letter_or_digit(field: str, first: str) -> None:
    line = refusal(payload(**{field: f"{first}-help"}))
    assert line.endswith("the first a letter or digit")
    assert Envelope.parse(payload(**{field: f"0{first}a"})).document()[field] == f"0{first}a"


def test_a_float_as_time_is_truncated() -> None:
    assert Envelope.parse(payload(ts=1771143500.9, ttl=2.5)).ts == 1771143500
    assert Envelope.parse(payload(ttl=2.5)).ttl == 2


def test_unknown_fields_are_kept_when_an_envelope_is_passed_on() -> None:
    document = GOOD | OPTIONAL | {"x-trace": {"hops": [1, None]}, "sender": "mallory"}
    envelope = Envelope.parse(json.dumps(document).encode())
    assert envelope.sender == "alpha"
    assert json.loads(envelope.encode()) == document


def test_absent_fields_stay_absent() -> None:
    assert json.loads(Envelope.parse(payload()).encode()) == GOOD


@pytest.mark.parametrize(("corr", "expected"), [(None, "m-1"), ("m-0", "m-0")])
def test_a_reply_belongs_to_its_question(corr: str | None, expected: str) -> None:
    question = Envelope.parse(payload(corr=corr, to="all", urgency="later", ttl=5, action="x"))
    answer = json.loads(question.reply("beta", "done").encode())
    assert answer.pop("id") != question.id and abs(answer.pop("ts") - time.time()) < 60
    assert answer == {
        "v": 1,
        "from": "beta",
        "to": "alpha",
        "ch": "response",
        "urgency": "now",
        "text": "done",
        "corr": expected,
        "replyTo": "m-1",
    }


def test_new_ids_are_uuids_and_no_two_alike() -> None:
    made = {Envelope.new("alpha", "beta", "command", "hello").id for _ in range(1000)}
    assert len(made) == 1000
    assert {uuid.UUID(one).version for one in made} == {4}


def test_a_new_envelope_takes_what_it_is_given() -> None:
    made = Envelope.new("alpha", "beta", "sync", "hello", id="m-1", now=5.5, urgency="later", ttl=9)
    assert (made.id, made.ts, made.urgency, made.ttl) == ("m-1", 5, "later", 9)


def test_a_new_envelope_is_checked_too() -> None:
    with pytest.raises(EnvelopeError, match=r"^to: 'a/b' "):
        Envelope.new("alpha", "a/b", "command", "hello")


@pytest.mark.parametrize(
    ("ttl", "age", "stale"),
    [(None, 10**9, False), (0, 10**9, False), (60, 60, False), (60, 61, True), (1, 2, True)],
)
def test_a_message_is_stale_when_its_time_is_over(ttl: int | None, age: int, stale: bool) -> None:
    envelope = Envelope.parse(payload(ttl=ttl))
    assert envelope.stale(envelope.ts + age) is stale


# -- what a node does with each kind --


def test_there_are_the_six_channels_of_the_protocol() -> None:
    assert set(CHANNELS) == {"command", "response", "sync", "heartbeat", "status", "alert"}
    assert all(channel.name == key for key, channel in CHANNELS.items())


def test_only_command_and_sync_are_answered_so_there_are_no_loops() -> None:
    assert {name for name, channel in CHANNELS.items() if channel.handler} == {"command", "sync"}


def test_a_heartbeat_alone_never_wakes_the_agent() -> None:
    assert [name for name in CHANNELS if CHANNELS[name].wake is Wake.NEVER] == ["heartbeat"]


def test_an_alert_alone_never_waits_for_the_agents_next_heartbeat() -> None:
    assert [name for name, channel in CHANNELS.items() if channel.mode_now] == ["alert"]


def test_nobody_can_change_a_channel() -> None:
    with pytest.raises(AttributeError):
        CHANNELS["heartbeat"].handler = True  # type: ignore[misc]


def test_send_offers_every_channel(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["send", "--to", "beta", "--text", "hello", "--ch", "gossip"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and all(name in said for name in CHANNELS)


# -- where messages go --


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
    for topics in (Topics("hive"), Topics("hive", "beta")):
        topic = topics.private("beta", "token")
        assert topic.startswith("hive/beta/response/")
        assert not topic_matches_sub("hive/+/+", topic)
        assert not topic_matches_sub(topics.meta("+", "+"), topic)
        heard = [one for one in topics.for_node(["beta"]) if topic_matches_sub(one, topic)]
        assert not heard or (topics.place(topic) or "")[2].startswith("~")  # then it is passed over


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


@given(
    text=st.text(max_size=300),
    other=st.one_of(st.text(max_size=100), st.lists(st.integers())),
    room=st.integers(0, 1000),
)
def test_what_is_shortened_has_its_room_and_as_much_of_it_as_there_is(
    text: str, other: object, room: int
) -> None:
    document = {"id": "a", "text": text, "other": other}
    cut = hive.shortened(document, room, "text", "other")
    size = len(hive.encode_json(document))
    if size <= room:
        assert cut == document
    elif cut:
        assert len(hive.encode_json(cut)) <= room
        kept = cut["text"].removesuffix(hive.CUT_SHORT)
        assert cut["text"] != kept and text.startswith(kept) and cut["id"] == "a"
        if cut["other"] == other and kept != text:
            more = {**cut, "text": text[: len(kept) + 1] + hive.CUT_SHORT}
            assert len(hive.encode_json(more)) > room, "one character more would not fit"
    else:
        least = {"id": "a", "text": hive.CUT_SHORT, "other": hive.CUT_SHORT}
        assert len(hive.encode_json(least)) > room


def test_only_now_is_urgent() -> None:
    urgencies = {one: Envelope.parse(payload(urgency=one)).urgent for one in hive.URGENCIES}
    assert urgencies == {one: one == "now" for one in urgencies} and len(urgencies) > 1


# -- the edges of what is taken --


def test_a_payload_may_have_so_many_bytes() -> None:
    limit = 6 * MAX_TEXT + 64 * 1024  # whatever a text costs in JSON, and the rest
    just = payload().ljust(limit)
    assert Envelope.parse(just).text == "hello"
    assert refusal(just + b" ") == f"payload: {limit + 1} bytes, the limit is {limit}"


@pytest.mark.parametrize(
    ("field", "least", "most"), [("ts", 1, 253_402_300_799), ("ttl", 0, 0xFFFF_FFFF), ("v", 1, 1)]
)
def test_a_number_has_its_range(field: str, least: int, most: int) -> None:
    for value in (least, most):
        assert Envelope.parse(payload(**{field: value})).document()[field] == value
    for value in (least - 1, most + 1):
        assert refusal(payload(**{field: value})).startswith(f"{field}: {value} is not ")


@pytest.mark.parametrize(("opens", "closes"), ["[]", ('{"a":', "}")])
def test_an_unknown_field_may_have_31_levels(opens: str, closes: str) -> None:
    def nested(levels: int) -> bytes:
        inner = '"\\ud800"'
        return raw("deep", opens * levels + inner + closes * levels)

    said = Envelope.parse(nested(31)).extra["deep"]
    while not isinstance(said, str):
        [said] = said if isinstance(said, list) else said.values()
    assert said == "\ufffd"  # as deep as it is
    assert refusal(nested(32)) == "'deep': no portable JSON (NaN, or too deep)"


@pytest.mark.parametrize("value", [sys.float_info.max, -sys.float_info.max, 0.0, 2**70, None, True])
def test_any_finite_number_can_be_handed_on(value: object) -> None:
    assert Envelope.parse(payload(more=[value])).extra == ({"more": [value]})


@pytest.mark.parametrize("name", ["all", "any", "meta", "state", "roster", *CHANNELS])
def test_what_topics_have_another_use_for_is_no_nodes_name(name: str) -> None:
    with pytest.raises(ValueError):
        hive.node_name(name)
    assert hive.node_name(f"{name}1") == f"{name}1"


def test_json_is_one_compact_line() -> None:
    assert hive.encode_json({"a": ["é", 1, "\n"]}) == '{"a":["é",1,"\\n"]}'.encode()


@pytest.mark.parametrize("said", [b"\xff", b"{", b"[]", b"1", b"null", "", "[" * 100_000])
def test_what_is_no_json_object_is_none(said: bytes | str) -> None:
    assert hive.read_json_object(said) is None
    assert hive.read_json_object(b'{"a": 1}') == {"a": 1}


@pytest.mark.parametrize("text", ["x" * 100, ["x" * 96]], ids=["a text", "a list"])
def test_what_is_shortened_fills_its_room(text: object) -> None:
    document = {"text": text, "more": "y" * 100}
    size = len(hive.encode_json(document))
    assert hive.shortened(document, size, "text", "more") == document
    for room in (size - 1, size - 50):
        cut = hive.shortened(document, room, "text", "more")
        assert cut and len(hive.encode_json(cut)) == room and cut["more"] == "y" * 100
    cut = hive.shortened(document, size - 100, "text", "more")  # the one, and then the other
    assert cut and len(hive.encode_json(cut)) == size - 100
    assert cut["text"] == hive.CUT_SHORT and cut["more"].endswith(f"y{hive.CUT_SHORT}")
    least = len(hive.encode_json(dict.fromkeys(document, hive.CUT_SHORT)))
    assert hive.shortened(document, least, "text", "more") == dict.fromkeys(
        document, hive.CUT_SHORT
    )
    assert hive.shortened(document, least - 1, "text", "more") is None


@pytest.mark.parametrize(
    ("topic", "place"),
    [
        ("hive/beta/command", ("beta", "command", "")),
        ("hive/beta/command/alpha", ("beta", "command", "alpha")),
        ("hive/all/heartbeat", ("all", "heartbeat", "")),
        ("hive/meta/beta/state", None),
        ("hive/meta/beta", None),
        ("hive/beta", None),
        ("hive/beta/command/alpha/more", None),
        ("beta/command", None),
        ("other/beta/command", None),
        ("hivebeta/command", None),
    ],
)
def test_a_topic_says_for_whom_what_is_and_by_whom(
    topic: str, place: tuple[str, str, str] | None
) -> None:
    assert Topics("hive").place(topic) == place


def test_each_topic_of_a_hive_is_as_the_protocol_has_it() -> None:
    topics, checked = Topics("a/b"), Topics("a/b", "beta")
    assert (topics.to("gamma"), topics.to("gamma", "sync")) == ("a/b/gamma/+", "a/b/gamma/sync")
    assert checked.to("gamma", "sync") == "a/b/gamma/sync/beta"
    assert topics.from_anybody("x", "sync") == ["a/b/x/sync", "a/b/x/sync/+"]
    everyone = ["a/b/all/+", "a/b/all/+/+"]
    assert topics.for_node(["x", "x"]) == ["a/b/x/+", "a/b/x/+/+", *everyone]
    assert (topics.bridge(), topics.bridge("west")) == ("a/b/all/+", "a/b/all/west")
    assert topics.private("beta", "t") == "a/b/beta/response/~t"
    assert checked.private("beta", "t") == "a/b/beta/response/beta/t"
