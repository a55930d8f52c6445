"""Packets: bytes to packets and back, and whatever else may come."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode as TheirReason
from raw_mqtt import connect_packet, publish_packet, subscribe_packet, unsubscribe_packet

import hive
from hive import (
    PROPERTIES,
    Connect,
    MalformedPacket,
    PacketType,
    Publish,
    Reader,
    ReasonCode,
    Subscription,
    encode_packet,
    encode_properties,
    encode_string,
    encode_two_bytes,
    encode_variable_byte_integer,
    matches,
    packet_bounds,
    with_length,
)

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
topics = texts.filter(lambda said: said and not set("+#") & set(said))
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "byte": st.integers(0, 255),
    "flag": st.integers(0, 1),
    "two": st.integers(0, 0xFFFF),
    "four": st.integers(0, 0xFFFF_FFFF),
    "variable": st.integers(0, 0x0FFF_FFFF),
    "string": texts,
    "binary": st.binary(max_size=30),
    "pair": st.tuples(texts, texts),
}


def properties_of(kind: str, *without: str) -> st.SearchStrategy[dict[str, Any]]:
    """Any properties that a kind of packet may have."""
    allowed = {}
    for one in PROPERTIES.values():
        if kind in one.packets and one.name not in without:
            value = VALUES[one.wire].filter(bool) if one.positive else VALUES[one.wire]
            allowed[one.name] = st.lists(value, min_size=1, max_size=3) if one.repeated else value
    return st.fixed_dictionaries({}, optional=allowed)


def body_of(whole: bytes) -> bytes:
    found = packet_bounds(bytearray(whole), 0, 1 << 28)
    assert found and found[1] == len(whole)
    return whole[found[0] :]


def reason_of(call: Any, *given: Any) -> ReasonCode:
    with pytest.raises(MalformedPacket) as raised:
        call(*given)
    assert str(raised.value)
    return raised.value.reason


@given(st.integers(0, 0x0FFF_FFFF))
def test_a_number_survives_the_wire_in_as_few_bytes_as_it_needs(value: int) -> None:
    said = encode_variable_byte_integer(value)
    assert Reader(said).variable_byte_integer() == value
    assert len(said) == 1 + sum(value >= 1 << bits for bits in (7, 14, 21))


@pytest.mark.parametrize("kind", sorted({kind for p in PROPERTIES.values() for kind in p.packets}))
def test_properties_survive_the_wire(kind: str) -> None:
    @given(properties_of(kind))
    def check(said: dict[str, Any]) -> None:
        assert Reader(with_length(encode_properties(said))).properties(kind) == said

    check()


@given(
    topics,
    st.binary(max_size=300),
    st.integers(0, 2),
    st.booleans(),
    st.sampled_from([4, 5]),
    properties_of("PUBLISH", "subscription_id", "response_topic"),
)
def test_a_message_survives_the_wire(
    topic: str, payload: bytes, qos: int, retain: bool, version: int, said: dict[str, Any]
) -> None:
    said = said if version == 5 else {}
    id = 7 if qos else 0
    whole = publish_packet(topic, payload, qos, id, retain, version=version, **said)
    parsed = Publish.parse(whole[0] & 15, body_of(whole), version)
    assert parsed == Publish(topic, payload, qos, retain, id, said)


@given(
    st.sampled_from([4, 5]),
    texts,
    st.booleans(),
    st.integers(0, 0xFFFF),
    st.none() | st.builds(Publish, topics, st.binary(), st.integers(0, 2), st.booleans()),
    st.none() | texts,
    st.binary(),
    properties_of("CONNECT", "authentication_data"),
)
def test_a_connect_survives_the_wire(
    version: int,
    client_id: str,
    clean: bool,
    keepalive: int,
    will: Publish | None,
    user: str | None,
    password: bytes,
    said: dict[str, Any],
) -> None:
    said = said if version == 5 else {}
    secret = None if user is None else password
    whole = connect_packet(version, client_id, clean, keepalive, will, user, secret, **said)
    parsed = Connect.parse(body_of(whole))
    assert parsed == Connect(version, clean, keepalive, client_id, will, user, secret, said)


@given(st.sampled_from([4, 5]), st.lists(st.tuples(topics, st.integers(0, 2)), min_size=1))
def test_subscribe_and_unsubscribe_survive_the_wire(
    version: int, wanted: list[tuple[str, int]]
) -> None:
    said = hive.parse_subscribe(body_of(subscribe_packet(*wanted, version=version)), version)
    assert said == (1, [Subscription(name, options, 0) for name, options in wanted])
    names = [name for name, _ in wanted]
    whole = unsubscribe_packet(*names, id=9, version=version)
    assert hive.parse_unsubscribe(body_of(whole), version) == (9, names)


@given(
    st.sampled_from([PacketType.PUBACK, PacketType.PUBREC, PacketType.PUBREL, PacketType.PUBCOMP]),
    st.sampled_from([4, 5]),
)
def test_an_acknowledgement_survives_the_wire(kind: PacketType, version: int) -> None:
    whole = hive.encode_ack(kind, 7, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND, version)
    expected = ReasonCode.PACKET_IDENTIFIER_NOT_FOUND if version == 5 else 0
    assert hive.parse_ack(kind, body_of(whole), version) == (7, expected)
    assert whole[0] & 15 == (2 if kind is PacketType.PUBREL else 0)


@given(st.binary(max_size=60), st.sampled_from([4, 5]), st.integers(0, 15))
def test_whatever_bytes_arrive_they_end_in_a_packet_or_in_malformed(
    noise: bytes, version: int, flags: int
) -> None:
    for parse in (
        lambda: Publish.parse(flags, noise, version),
        lambda: Connect.parse(encode_string("MQTT") + bytes([version]) + noise),
        lambda: Connect.version_of(noise),
        lambda: hive.parse_subscribe(noise, version),
        lambda: hive.parse_unsubscribe(noise, version),
        lambda: hive.parse_ack(PacketType.PUBREL, noise, version),
        lambda: hive.parse_disconnect(noise, version),
        lambda: packet_bounds(bytearray(noise), 0, 1000),
    ):
        try:
            parse()
        except MalformedPacket as error:
            assert error.reason >= ReasonCode.UNSPECIFIED_ERROR


def test_a_packet_is_there_once_all_of_it_is() -> None:
    whole = encode_packet(PacketType.PUBLISH, b"x" * 200)
    assert all(packet_bounds(bytearray(whole[:n]), 0, 1000) is None for n in range(len(whole)))
    assert packet_bounds(bytearray(whole + b"more"), 0, 1000) == (3, len(whole))
    assert packet_bounds(bytearray(b"??" + whole), 2, 1000) == (5, 2 + len(whole))


def test_a_packet_that_is_too_large_is_refused_by_its_first_bytes() -> None:
    assert (
        reason_of(packet_bounds, bytearray(b"\x30\xff\xff\x7f"), 0, 1000)
        is ReasonCode.PACKET_TOO_LARGE
    )
    assert (
        reason_of(packet_bounds, bytearray(b"\x30\xff\xff\xff\xff"), 0, 1000)
        is ReasonCode.MALFORMED_PACKET
    )


def test_reason_codes_from_0x80_on_are_failures_and_have_words() -> None:
    codes = (0, 0x10, 0x11, 0x7F, 0x80, 0x81, 0x97, 0xFF, -1)  # below 0 are our own
    assert [hive.is_failure(code) for code in codes] == [False] * 4 + [True] * 5
    assert ReasonCode.QUOTA_EXCEEDED.words == "quota exceeded"
    assert hive.NO_SUBSCRIBERS == ReasonCode.NO_MATCHING_SUBSCRIBERS


MALFORMED, PROTOCOL = ReasonCode.MALFORMED_PACKET, ReasonCode.PROTOCOL_ERROR
HEAD = encode_string("MQTT") + b"\x05"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x80\x00", MALFORMED),  # [MQTT-1.5.5-1] more bytes than it needs
        (b"\xff\xff\xff\xff\x7f", MALFORMED),
        (b"\x05\x01", MALFORMED),  # ends before it should
        (b"\x02\x7f\x00", PROTOCOL),  # no such property
        (b"\x02\x24\x01", PROTOCOL),  # of CONNACK only
        (b"\x04\x01\x01\x01\x01", PROTOCOL),  # twice
        (b"\x02\x01\x02", PROTOCOL),  # neither 0 nor 1
        (b"\x02\x0b\x00", PROTOCOL),  # [MQTT-3.8.2.1.2] subscription identifier 0
        (b"\x03\x03\x00\x05", MALFORMED),  # a string longer than the properties
        (b"\x05\x03\x00\x02\xff\xff", MALFORMED),  # [MQTT-1.5.4-1]
        (b"\x06\x03\x00\x03\xed\xa0\x80", MALFORMED),  # [MQTT-1.5.4-1] a surrogate
        (b"\x04\x03\x00\x01\x00", MALFORMED),  # [MQTT-1.5.4-2]
        (encode_variable_byte_integer(hive.MAX_PROPERTIES + 1), ReasonCode.PACKET_TOO_LARGE),
    ],
)
def test_properties_that_are_not_allowed(data: bytes, reason: ReasonCode) -> None:
    assert reason_of(Reader(data).properties, "PUBLISH") is reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (HEAD + b"\x03\x00\x00\x00\x00\x00", MALFORMED),  # [MQTT-3.1.2-3] the reserved flag
        (HEAD + b"\x1e\x00\x00\x00\x00\x00", MALFORMED),  # [MQTT-3.1.2-12] a will of QoS 3
        (HEAD + b"\x0a\x00\x00\x00\x00\x00", MALFORMED),  # [MQTT-3.1.2-11] QoS without a will
        (HEAD + b"\x22\x00\x00\x00\x00\x00", MALFORMED),  # [MQTT-3.1.2-13] retain without one
        (encode_string("MQTT") + b"\x04\x42\x00\x00\x00\x00", MALFORMED),  # 3.1.1 [MQTT-3.1.2-22]
        (HEAD + b"\x02\x00\x00\x00", MALFORMED),  # [MQTT-3.1.3-3] no client identifier
        (HEAD + b"\x82\x00\x00\x00\x00\x00", MALFORMED),  # [MQTT-3.1.2-17] no user name
        (HEAD + b"\x02\x00\x00\x00\x00\x00more", MALFORMED),
        (HEAD + b"\x02\x00\x00\x03\x21\x00\x00\x00\x00", PROTOCOL),  # receive maximum 0
        (HEAD + b"\x02\x00\x00\x05\x27\x00\x00\x00\x00\x00\x00", PROTOCOL),  # packet size 0
        (HEAD + b"\x02\x00\x00\x04\x16\x00\x01x\x00\x00", PROTOCOL),  # data without method
        (HEAD + b"\x06\x00\x00\x00\x00\x00\x00\x00\x01#\x00\x00", ReasonCode.TOPIC_NAME_INVALID),
    ],
)
def test_a_connect_that_is_not_allowed(body: bytes, reason: ReasonCode) -> None:
    assert reason_of(Connect.parse, body) is reason


@pytest.mark.parametrize(
    ("flags", "body", "reason"),
    [
        (6, encode_string("t") + encode_two_bytes(1) + b"\0", MALFORMED),  # [MQTT-3.3.1-4] QoS 3
        (8, encode_string("t") + b"\0", MALFORMED),  # [MQTT-3.3.1-2] DUP at QoS 0
        (2, encode_string("t") + encode_two_bytes(0) + b"\0", MALFORMED),  # [MQTT-2.2.1-3]
        (0, b"\x00\x05t", MALFORMED),
        (0, encode_string("") + b"\0", ReasonCode.TOPIC_NAME_INVALID),  # [MQTT-4.7.3-1]
        (0, encode_string("a/+") + b"\0", ReasonCode.TOPIC_NAME_INVALID),  # [MQTT-3.3.2-2]
        (0, encode_string("a#") + b"\0", ReasonCode.TOPIC_NAME_INVALID),
        (0, encode_string("a/" * hive.MAX_LEVELS) + b"\0", ReasonCode.TOPIC_NAME_INVALID),
        (0, encode_string("a\0b") + b"\0", MALFORMED),  # [MQTT-4.7.3-2]
        (0, encode_string("t") + b"\x02\x0b\x01", PROTOCOL),  # [MQTT-3.3.4-6]
        (0, encode_string("t") + b"\x04\x08\x00\x01#", PROTOCOL),  # [MQTT-3.3.2-14]
    ],
)
def test_a_message_that_is_not_allowed(flags: int, body: bytes, reason: ReasonCode) -> None:
    assert reason_of(Publish.parse, flags, body, 5) is reason


@pytest.mark.parametrize(
    ("version", "body", "reason"),
    [
        (5, encode_two_bytes(0) + b"\0" + encode_string("a") + b"\0", MALFORMED),  # [MQTT-2.2.1-3]
        (5, encode_two_bytes(1) + b"\0", PROTOCOL),  # [MQTT-3.8.3-2] no filter
        (4, encode_two_bytes(1), PROTOCOL),
        (5, encode_two_bytes(1) + b"\0" + encode_string("a"), MALFORMED),  # no options
        (
            5,
            encode_two_bytes(1) + b"\0" + encode_string("a") + b"\x03",
            MALFORMED,
        ),  # [MQTT-3.8.3-5] QoS 3
        (
            5,
            encode_two_bytes(1) + b"\0" + encode_string("a") + b"\x40",
            MALFORMED,
        ),  # [MQTT-3.8.3-5] reserved bits
        (4, encode_two_bytes(1) + encode_string("a") + b"\x04", MALFORMED),  # 3.1.1 [MQTT-3-8.3-4]
        (
            5,
            encode_two_bytes(1) + b"\0" + encode_string("a") + b"\x30",
            PROTOCOL,
        ),  # retain handling 3
        (5, encode_two_bytes(1) + b"\x04\x0b\x01\x0b\x02" + encode_string("a") + b"\0", PROTOCOL),
        (
            5,
            encode_two_bytes(1) + b"\0" + encode_string("") + b"\0",
            ReasonCode.TOPIC_FILTER_INVALID,
        ),  # [MQTT-4.7.3-1]
        (
            5,
            encode_two_bytes(1) + b"\0" + encode_string("a/#/b") + b"\0",
            ReasonCode.TOPIC_FILTER_INVALID,
        ),  # [MQTT-4.7.1-1]
        (
            5,
            encode_two_bytes(1) + b"\0" + encode_string("a#") + b"\0",
            ReasonCode.TOPIC_FILTER_INVALID,
        ),
        (
            5,
            encode_two_bytes(1) + b"\0" + encode_string("a+") + b"\0",
            ReasonCode.TOPIC_FILTER_INVALID,
        ),  # [MQTT-4.7.1-2]
        (
            5,
            encode_two_bytes(1) + b"\0" + encode_string("/" * 200) + b"\0",
            ReasonCode.TOPIC_FILTER_INVALID,
        ),
        (
            5,
            encode_two_bytes(1) + b"\0" + (encode_string("a") + b"\0") * 10_001,
            ReasonCode.QUOTA_EXCEEDED,
        ),
    ],
)
def test_a_subscribe_that_is_not_allowed(version: int, body: bytes, reason: ReasonCode) -> None:
    assert reason_of(hive.parse_subscribe, body, version) is reason


def test_an_unsubscribe_that_is_not_allowed() -> None:
    assert (
        reason_of(hive.parse_unsubscribe, encode_two_bytes(1) + b"\0", 5) is PROTOCOL
    )  # [MQTT-3.10.3-2]
    assert (
        reason_of(hive.parse_unsubscribe, encode_two_bytes(0) + encode_string("a"), 4) is MALFORMED
    )
    many = encode_two_bytes(1) + encode_string("a") * 10_001
    assert reason_of(hive.parse_unsubscribe, many, 4) is ReasonCode.QUOTA_EXCEEDED


def test_an_acknowledgement_or_goodbye_that_is_not_allowed() -> None:
    assert reason_of(hive.parse_ack, PacketType.PUBACK, b"\x00", 5) is MALFORMED
    assert reason_of(hive.parse_ack, PacketType.PUBACK, encode_two_bytes(0), 5) is MALFORMED
    assert reason_of(hive.parse_ack, PacketType.PUBACK, encode_two_bytes(1) + b"\0", 4) is MALFORMED
    assert (
        reason_of(hive.parse_ack, PacketType.PUBACK, encode_two_bytes(1) + b"\0\0more", 5)
        is MALFORMED
    )
    assert reason_of(hive.parse_disconnect, b"\0\0more", 5) is MALFORMED
    assert reason_of(hive.parse_disconnect, b"\0", 4) is MALFORMED


@pytest.mark.parametrize(
    ("filter", "yes", "no"),
    [
        ("a/b", ["a/b"], ["a", "a/b/c", "A/b", "/a/b", "a/b/"]),  # [MQTT-4.7.3-4]
        ("a/+", ["a/b", "a/"], ["a", "a/b/c"]),
        ("+/b", ["a/b", "/b"], ["$a/b", "b"]),  # [MQTT-4.7.2-1]
        ("a/#", ["a", "a/b", "a/b/c", "a/"], ["b", "ab"]),
        ("#", ["a", "a/b", "/"], ["$SYS", "$SYS/x"]),  # [MQTT-4.7.2-1]
        ("+", ["a"], ["/a", "a/", "$a"]),
        ("/+", ["/a", "/"], ["a"]),
        ("$SYS/#", ["$SYS", "$SYS/x"], ["SYS"]),
        ("a/+/c/#", ["a/b/c", "a//c/d"], ["a/c", "a/b/d"]),
    ],
)
def test_what_a_filter_means(filter: str, yes: list[str], no: list[str]) -> None:
    assert hive.check_filter(filter) == filter
    tree: hive.SubscriptionTree = hive.SubscriptionTree()
    session = hive.Session("x", 0, (1, 1))
    tree.add(session, Subscription(filter, 0))
    for topic in yes + no:
        assert matches(filter, topic) is (topic in yes), topic
        assert bool([*tree.matching(topic)]) is (topic in yes), topic


levels = st.sampled_from(["a", "b", "", "+", "#", "$x"])
filters = st.lists(levels, min_size=1, max_size=4).map("/".join)


def is_filter(said: str) -> bool:
    try:
        return bool(hive.check_filter(said))
    except MalformedPacket:
        return False


@given(
    st.lists(filters.filter(is_filter), unique=True, max_size=12),
    st.lists(filters.filter(is_filter), max_size=4),
    st.lists(st.sampled_from(["a", "b", "", "$x"]), min_size=1, max_size=4)
    .map("/".join)
    .filter(bool),
)
def test_the_tree_of_filters_means_what_each_filter_means(
    added: list[str], removed: list[str], topic: str
) -> None:
    tree, session = hive.SubscriptionTree(), hive.Session("x", 0, (1, 1))
    for filter in added:
        tree.add(session, Subscription(filter, 0))
    kept = [filter for filter in added if filter not in removed]
    for filter in set(added) - set(kept):
        tree.remove(session, filter)
    found = sorted(one.filter for _, one in tree.matching(topic))
    assert found == sorted(filter for filter in kept if matches(filter, topic))
    for filter in kept:
        tree.remove(session, filter)
    assert tree.size == 0


# Against another's reading of the standard, and against bytes written out by hand: what encodes
# and parses with the same table would not notice a wrong one.

FORMS = {  # the wire types of MQTT 5, 1.5, as paho lists them, and what they are called here
    "Byte": {"byte", "flag"},
    "Two Byte Integer": {"two"},
    "Four Byte Integer": {"four"},
    "Variable Byte Integer": {"variable"},
    "Binary Data": {"binary"},
    "UTF-8 Encoded String": {"string"},
    "UTF-8 String Pair": {"pair"},
}


def test_the_properties_are_those_of_the_standard() -> None:
    theirs = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    assert PROPERTIES.keys() == theirs.properties.keys()
    for id, (form, packets) in theirs.properties.items():
        names = {
            "WILL" if kind == PacketTypes.WILLMESSAGE else PacketTypes.Names[kind].upper()
            for kind in packets
        }
        one = PROPERTIES[id]
        assert (one.id, {*one.packets}) == (id, names), one.name
        assert one.wire in FORMS[theirs.types[form]], one.name


def test_the_kinds_of_packet_and_the_reasons_are_those_of_the_standard() -> None:
    kinds = {name.upper(): number for number, name in enumerate(PacketTypes.Names[:16]) if number}
    assert {kind.name: kind.value for kind in PacketType} == kinds
    theirs = TheirReason(PacketTypes.DISCONNECT).names
    for reason_name, reason in ReasonCode.__members__.items():  # an alias would be a wrong one
        names = {name.upper().replace(" ", "_") for name in theirs[reason]}
        name = reason_name.replace("EXISTED", "FOUND").replace("SUBSCRIPTIONS", "SUBSCRIPTION")
        assert name in names, (reason, names)  # paho's words differ from MQTT 5's in these two


@pytest.mark.parametrize(
    ("value", "bytes_"),
    [
        (0, "00"),
        (127, "7f"),
        (128, "80 01"),
        (16_383, "ff 7f"),
        (16_384, "80 80 01"),
        (2_097_151, "ff ff 7f"),
        (2_097_152, "80 80 80 01"),
        (268_435_455, "ff ff ff 7f"),
    ],
)
def test_a_variable_number_is_that_of_the_standard(value: int, bytes_: str) -> None:
    assert encode_variable_byte_integer(value) == bytes.fromhex(bytes_)  # MQTT 5, table 1-1
    assert packet_bounds(bytearray(b"\x30" + bytes.fromhex(bytes_)), 0, 300 << 20) in (
        None,  # the body is not there yet
        (2, 2),
    )


@pytest.mark.parametrize(
    ("said", "bytes_"),
    [
        (hive.publish_head(b"a/b", 0, 7, None, 2), "30 07 0003 612f62"),
        (hive.publish_head(b"a/b", 3, 10, None, 2), "33 09 0003 612f62 000a"),
        (hive.publish_head(b"a/b", 12, 258, b"", 0), "3c 08 0003 612f62 0102 00"),
        (hive.publish_head(b"t", 1, 0, b"\x01\x01", 1), "31 07 0001 74 02 0101"),
        (encode_packet(PacketType.PINGRESP), "d0 00"),
        (hive.encode_ack(PacketType.PUBACK, 258, 0, 5), "40 02 0102"),
        (hive.encode_ack(PacketType.PUBREC, 1, 0x97, 5), "50 03 0001 97"),
        (hive.encode_ack(PacketType.PUBREC, 1, 0x97, 4), "50 02 0001"),
        (hive.encode_ack(PacketType.PUBREL, 1, 0, 5), "62 02 0001"),
        (hive.encode_ack(PacketType.PUBCOMP, 1, 0x92, 5), "70 03 0001 92"),
        (hive.encode_suback(PacketType.SUBACK, 2, b"\0\2\x8f\x97", 5), "90 07 0002 00 00028f97"),
        (hive.encode_suback(PacketType.SUBACK, 2, b"\0\2\x8f\x97", 4), "90 06 0002 00028080"),
        (hive.encode_suback(PacketType.UNSUBACK, 2, b"\0\x11", 5), "b0 05 0002 00 0011"),
        (hive.encode_suback(PacketType.UNSUBACK, 2, b"\0\x11", 4), "b0 02 0002"),
        (hive.encode_connack(True, 0, {}, 4), "20 02 01 00"),
        (hive.encode_connack(False, 0x84, {}, 4), "20 02 00 01"),  # 3.1.1, table 3.1
        (hive.encode_connack(False, 0x85, {}, 4), "20 02 00 02"),
        (hive.encode_connack(False, 0x97, {}, 4), "20 02 00 03"),
        (hive.encode_connack(False, 0x86, {}, 4), "20 02 00 04"),
        (hive.encode_connack(False, 0x8C, {}, 4), "20 02 00 05"),
        (hive.encode_connack(True, 0, {"receive_maximum": 20}, 5), "20 06 01 00 03 210014"),
        (hive.encode_connack(False, 0x86, {}, 5), "20 03 00 86 00"),
        (encode_properties({"subscription_id": [1, 200]}), "0b 01 0b c8 01"),
        (encode_properties({"user": [("a", "b")]}), "26 0001 61 0001 62"),
        (encode_properties({"will_delay": 258}), "18 00000102"),
    ],
)  # fmt: skip
def test_a_packet_is_that_of_the_standard_byte_for_byte(said: bytes, bytes_: str) -> None:
    assert said == bytes.fromhex(bytes_)


def test_what_is_just_within_the_bounds_is_allowed() -> None:
    deepest = "/".join("a" * 128)
    assert hive.check_topic(deepest) == hive.check_filter(deepest) == deepest
    assert reason_of(hive.check_topic, deepest + "/") is ReasonCode.TOPIC_NAME_INVALID
    assert reason_of(hive.check_filter, deepest + "/") is ReasonCode.TOPIC_FILTER_INVALID
    many = [("a", 0)] * 10_000
    assert len(hive.parse_subscribe(body_of(subscribe_packet(*many)), 5)[1]) == 10_000
    whole = unsubscribe_packet(*(name for name, _ in many))
    assert len(hive.parse_unsubscribe(body_of(whole), 5)[1]) == 10_000
    largest = encode_properties({"user": [("", "x" * 60_000), ("", "y" * 5526)]})
    assert len(largest) == 64 << 10
    assert Reader(with_length(largest)).properties("PUBLISH")["user"][1] == ("", "y" * 5526)
    assert packet_bounds(bytearray(b"\x30\x03abc"), 0, 5) == (2, 5)
    assert reason_of(packet_bounds, bytearray(b"\x30\x03abc"), 0, 4) is ReasonCode.PACKET_TOO_LARGE
    assert packet_bounds(bytearray(b"\x30\x81\x80\x80"), 0, 1000) is None


def test_what_a_subscription_asks_for() -> None:
    """MQTT 5, 3.8.3.1."""
    bits = [Subscription("a", bits) for bits in (0b00_0001, 0b00_0110, 0b00_1000, 0b10_0000)]
    assert [one.qos for one in bits] == [1, 2, 0, 0]
    assert [one.no_local for one in bits] == [False, True, False, False]
    assert [one.as_published for one in bits] == [False, False, True, False]
    assert [one.retain_handling for one in bits] == [0, 0, 0, 2]
    assert [Subscription(name, 0).shared for name in ("$share/g/a", "share/g")] == [True, False]
    _, [one] = hive.parse_subscribe(body_of(subscribe_packet("a", identifier=9)), 5)
    assert one.identifier == 9


def test_how_long_a_session_outlives_its_connection() -> None:
    def session_expiry(version: int, clean: bool, **properties: Any) -> int:
        whole = connect_packet(version, clean=clean, **properties)
        return Connect.parse(body_of(whole)).session_expiry

    assert session_expiry(5, False) == 0
    assert session_expiry(5, True, session_expiry=0xFFFF_FFFF) == 0xFFFF_FFFF
    assert session_expiry(5, False, session_expiry=7) == 7
    assert session_expiry(4, False) == 0xFFFF_FFFF
    assert session_expiry(4, True) == 0


def test_a_goodbye_says_why() -> None:
    assert hive.parse_disconnect(b"", 5) == (0, {})
    assert hive.parse_disconnect(b"", 4) == (0, {})
    assert hive.parse_disconnect(b"\x04", 5) == (4, {})
    assert hive.parse_disconnect(b"\x8e\x05\x11\0\0\0\x09", 5) == (0x8E, {"session_expiry": 9})


def test_an_acknowledgement_may_leave_out_what_is_0() -> None:
    assert hive.parse_ack(PacketType.PUBACK, b"\x01\x02", 4) == (258, 0)
    assert hive.parse_ack(PacketType.PUBACK, b"\x01\x02", 5) == (258, 0)
    assert hive.parse_ack(PacketType.PUBREC, b"\0\x01\x97", 5) == (1, 0x97)
    assert hive.parse_ack(PacketType.PUBREL, b"\0\x01\x92\x04\x1f\0\x01x", 5) == (1, 0x92)
    wrong = b"\0\x01\0\x02\x24\x01"  # a maximum QoS, which is CONNACK's
    assert reason_of(hive.parse_ack, PacketType.PUBACK, wrong, 5) is PROTOCOL


def test_in_mqtt_5_a_password_needs_no_user_and_a_method_brings_its_data() -> None:
    said: dict[str, Any] = {"authentication_method": "x", "authentication_data": b"y"}
    parsed = Connect.parse(body_of(connect_packet(5, "a", password=b"secret", **said)))
    assert (parsed.username, parsed.password) == (None, b"secret")
    assert parsed.properties == said


def test_a_payload_that_says_it_is_text_is_text() -> None:
    said = {"payload_format": 1}
    assert hive.properly_formatted(Publish("t", b"\xff"))
    assert hive.properly_formatted(Publish("t", b"\xff", properties={"payload_format": 0}))
    assert hive.properly_formatted(Publish("t", "ä".encode(), properties=said))
    assert not hive.properly_formatted(Publish("t", b"\xff", properties=said))


def test_an_alias_may_stand_for_a_topic() -> None:
    body = encode_string("") + b"\x03\x23\x00\x05" + b"text"
    assert Publish.parse(0, body, 5) == Publish("", b"text", properties={"topic_alias": 5})
    body = encode_string("a+") + b"\x03\x23\x00\x05"  # [MQTT-3.3.2-2], with an alias or without
    assert reason_of(Publish.parse, 0, body, 5) is ReasonCode.TOPIC_NAME_INVALID
