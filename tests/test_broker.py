"""The embedded broker: what the specifications ask of a server, statement by statement.

Numbers in brackets are those of MQTT 5; where they differ, those of 3.1.1 follow after "3.1.1".
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from conftest import PATIENCE, eventually, free_port
from raw_mqtt import (
    Hosted,
    both,
    connect_packet,
    disconnect_packet,
    kept,
    publish_packet,
    subscribe_packet,
    unsubscribe_packet,
)

import hive
from hive import PacketType, Publish, ReasonCode, encode_packet, encode_string, encode_two_bytes

Make = Callable[..., Hosted]
NO_LOCAL, AS_PUBLISHED = 4, 8
AMEND = {"session_expiry": 3600}


@pytest.fixture
def port() -> int:
    return free_port()


# Connecting.


@both
def test_it_answers_connect_with_connack(hosted: Hosted, version: int) -> None:
    """[MQTT-3.2.0-1] [MQTT-3.1.4-5], 3.1.1 [MQTT-3.1.4-4]"""
    client = hosted.client(version)
    answer = client.connect("a")
    assert (answer.present, answer.reason) == (False, 0)
    client.quiet()


@both
def test_the_first_packet_must_be_connect(hosted: Hosted, version: int) -> None:
    """[MQTT-3.1.0-1]"""
    client = hosted.client(version)
    client.send(publish_packet("t", version=version))
    client.ended()


@both
def test_a_second_connect_ends_the_connection(hosted: Hosted, version: int) -> None:
    """[MQTT-3.1.0-2]"""
    client = hosted.connected("a", version)
    client.send(connect_packet(version, "a"))
    client.ended(ReasonCode.PROTOCOL_ERROR)


def test_a_protocol_that_is_not_mqtt_gets_no_answer(hosted: Hosted) -> None:
    """[MQTT-3.1.2-1]"""
    for name in ("MQIsdp", "mqtt", ""):
        client = hosted.client()
        client.send(
            encode_packet(
                PacketType.CONNECT, encode_string(name) + b"\x03\x02\0\0" + encode_string("a")
            )
        )
        client.ended()


@pytest.mark.parametrize(("level", "version", "reason"), [(3, 4, 1), (6, 5, 0x84), (132, 5, 0x84)])
def test_a_version_that_it_does_not_speak(
    hosted: Hosted, level: int, version: int, reason: int
) -> None:
    """[MQTT-3.1.2-2]"""
    client = hosted.client(version)
    client.send(
        encode_packet(
            PacketType.CONNECT,
            encode_string("MQTT") + bytes([level]) + b"\x02\0\0\0" + encode_string("a"),
        )
    )
    answer = client.expect(PacketType.CONNACK)
    assert (answer.present, answer.reason) == (False, reason)
    client.ended()


def test_a_malformed_connect_is_explained_in_mqtt_5_alone(hosted: Hosted) -> None:
    """[MQTT-3.1.2-3] [MQTT-3.1.4-1] [MQTT-4.13.2-1], 3.1.1 [MQTT-3.1.4-1]"""
    for version in (4, 5):
        client = hosted.client(version)
        client.send(
            encode_packet(
                PacketType.CONNECT, encode_string("MQTT") + bytes([version, 3]) + b"\0\0\0\0\0"
            )
        )
        if version == 5:
            answer = client.expect(PacketType.CONNACK)
            assert (answer.present, answer.reason) == (
                False,
                ReasonCode.MALFORMED_PACKET,
            )  # [MQTT-3.2.2-6]
        client.ended()


def test_nothing_that_follows_a_refused_connect_is_heard(hosted: Hosted) -> None:
    """[MQTT-3.1.4-6] [MQTT-3.2.2-7], 3.1.1 [MQTT-3.2.2-5]"""
    witness = hosted.connected("w")
    witness.subscribe("t")
    client = hosted.client(4)
    client.send(connect_packet(4, "", clean=False), publish_packet("t", version=4))
    assert client.expect(PacketType.CONNACK).reason == 2  # 3.1.1 [MQTT-3.1.3-8]
    client.ended()
    witness.quiet()


@both
def test_a_client_without_a_name_is_given_one(hosted: Hosted, version: int) -> None:
    """[MQTT-3.1.3-6] [MQTT-3.1.3-7] [MQTT-3.2.2-16], 3.1.1 [MQTT-3.1.3-6]"""
    names = set()
    for _ in range(2):
        answer = hosted.client(version).connect("")
        assert answer.reason == 0
        names.add(answer.properties["assigned_client_id"] if version == 5 else object())
    assert len(names) == 2


@both
def test_names_of_1_to_23_characters_are_taken_and_more(hosted: Hosted, version: int) -> None:
    """[MQTT-3.1.3-5]"""
    letters = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for name in ("a", letters[:23], letters[-23:], letters, "ä/+#"):
        assert hosted.client(version).connect(name).reason == 0
    refused = hosted.client(version).connect("x" * 2000)
    assert refused.reason == (0x85 if version == 5 else 2)  # [MQTT-3.1.3-8]


def test_mqtt_5_is_told_the_bounds(hosted: Hosted) -> None:
    """[MQTT-3.2.2-21] and 3.2.2.3"""
    said = hosted.client().connect("a", keepalive=10_000).properties
    assert said["server_keep_alive"] == 60
    assert said["receive_maximum"] == 100
    assert said["topic_alias_maximum"] == 16
    assert said["maximum_packet_size"] == 6 * 262_144 + 65_536 + 69_632  # as MAX_TEXT grows in JSON
    assert said["shared_available"] == 0
    assert "server_keep_alive" not in hosted.client().connect("b", keepalive=30).properties


def test_other_ways_to_authenticate_are_not_known(hosted: Hosted) -> None:
    """[MQTT-4.12.0-1]"""
    client = hosted.client()
    assert (
        client.connect("a", authentication_method="GS2").reason
        == ReasonCode.BAD_AUTHENTICATION_METHOD
    )
    client.ended()


def test_auth_is_a_protocol_error(hosted: Hosted) -> None:
    """[MQTT-4.12.0-6]"""
    client = hosted.connected("a")
    client.send(encode_packet(PacketType.AUTH))
    client.ended(ReasonCode.PROTOCOL_ERROR)


@both
def test_the_older_connection_of_a_name_is_told_and_ended(hosted: Hosted, version: int) -> None:
    """[MQTT-3.1.4-3] [MQTT-4.8.0-1], 3.1.1 [MQTT-3.1.4-2]"""
    older = hosted.connected("a", version)
    newer = hosted.connected("a", version)
    older.ended(ReasonCode.SESSION_TAKEN_OVER)
    newer.quiet()


@both
def test_reserved_flags_end_the_connection(hosted: Hosted, version: int) -> None:
    """[MQTT-2.1.3-1] [MQTT-3.8.1-1] [MQTT-3.10.1-1] [MQTT-3.6.1-1] [MQTT-3.14.1-1],
    3.1.1 [MQTT-2.2.2-2]
    """
    for first in (0x80, 0xA0, 0x60, 0xC1, 0xE1, 0x41, 0x00):
        client = hosted.connected("", version)
        client.send(bytes([first, 3]) + b"\0\1\0")
        client.ended(ReasonCode.MALFORMED_PACKET)


@both
def test_what_only_a_server_says_ends_the_connection(hosted: Hosted, version: int) -> None:
    """[MQTT-4.13.1-1], 3.1.1 [MQTT-4.8.0-1]"""
    for kind in (PacketType.CONNACK, PacketType.SUBACK, PacketType.UNSUBACK, PacketType.PINGRESP):
        client = hosted.connected("", version)
        client.send(encode_packet(kind, b"\0\1\0"))
        client.ended(ReasonCode.PROTOCOL_ERROR)


@both
def test_a_ping_is_answered(hosted: Hosted, version: int) -> None:
    """[MQTT-3.12.4-1]"""
    client = hosted.connected("a", version)
    for _ in range(3):
        client.quiet()


@both
def test_a_client_that_keeps_silent_is_ended(hosted: Hosted, version: int) -> None:
    """[MQTT-3.1.2-22], 3.1.1 [MQTT-3.1.2-24]"""
    client = hosted.connected("a", version, keepalive=10)
    hosted.skip(14)
    client.quiet()
    hosted.skip(14)
    client.quiet()
    hosted.skip(16)
    client.ended(ReasonCode.KEEP_ALIVE_TIMEOUT)


def test_without_keep_alive_mqtt_3_may_be_silent_for_ever(hosted: Hosted) -> None:
    """3.1.1, 3.1.2.10"""
    client = hosted.connected("a", 4, keepalive=0)
    hosted.skip(100_000)
    client.quiet()


def test_who_never_says_connect_is_ended(hosted: Hosted) -> None:
    """[MQTT-3.1.4-1], 3.1.1, 3.1.4: within a reasonable time"""
    silent, slow = hosted.client(), hosted.client()
    slow.send(connect_packet()[:7])
    eventually("both are in", lambda: len(hosted.broker.connections) == 2)
    hosted.skip(11)
    silent.ended()
    slow.ended()


def test_the_end_comes_at_once_to_whoever_is_ended(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait until the client has closed, nor until its time to do so is over."""
    monkeypatch.setattr(hive, "DISCONNECT_LINGER", 10 * PATIENCE)
    refused = hosted.client()
    assert refused.connect("x" * 2000).reason == ReasonCode.CLIENT_IDENTIFIER_NOT_VALID
    older = hosted.connected("a")
    hosted.connected("a")
    for client, reason in ((refused, None), (older, ReasonCode.SESSION_TAKEN_OVER)):
        client.ended(reason)
    assert len(hosted.broker.connections) == 3, "they may still be sending"


# Users.


def test_over_tcp_a_password_is_asked_for_and_over_the_socket_not(
    hosted_of: Make, port: int
) -> None:
    """[MQTT-3.1.2-16..19], 3.1.1 [MQTT-3.1.2-18..21]"""
    hosted = hosted_of(listen=f"127.0.0.1:{port}", username="hive", password="sésame")
    for version in (4, 5):
        for user, password in (
            (None, None),
            ("hive", None),
            ("hive", b"wrong"),
            ("hive", b""),
            ("root", "sésame".encode()),
            ("", b""),
        ):
            client = hosted.client(version, port)
            said = {"username": user, "password": password}
            assert client.connect("a", **said).reason == (0x86 if version == 5 else 4)
            client.ended()
        client = hosted.client(version, port)
        assert client.connect("a", username="hive", password="sésame".encode()).reason == 0
        assert hosted.client(version).connect("b").reason == 0
    hosted.client(5, port).connect("c", password=b"only a password")


def test_anonymous_lets_anybody_on_this_machine_in(hosted_of: Make, port: int) -> None:
    hosted = hosted_of(listen=f"localhost:{port}", anonymous=True)
    assert hosted.client(5, port).connect("a").reason == 0
    assert hosted.client(4, port).connect("b", username="x", password=b"y").reason == 0


# Sessions.


@both
def test_a_session_is_resumed_or_begun_anew(hosted: Hosted, version: int) -> None:
    """[MQTT-3.1.2-4..6] [MQTT-3.2.2-2] [MQTT-3.2.2-3], 3.1.1 [MQTT-3.1.2-4..6] [MQTT-3.2.2-1..3]"""
    first = hosted.connected("a", version, **kept(version))
    first.subscribe("t")
    first.send(disconnect_packet())
    first.ended()
    again = hosted.client(version)
    assert again.connect("a", **kept(version)).present
    assert again.publish("t") == 0
    again.receive()
    again.close()
    anew = hosted.client(version)
    assert not anew.connect("a", clean=True).present
    anew.publish("t")
    anew.quiet()
    anew.send(disconnect_packet())
    anew.ended()
    assert not hosted.client(version).connect("a", **kept(version)).present


def test_a_session_ends_when_it_expires(hosted: Hosted) -> None:
    """[MQTT-3.1.2-23]"""
    for expiry, skipped, present in ((0, 1, False), (60, 50, True), (60, 70, False)):
        hosted.drop(hosted.connected(str(skipped), clean=False, session_expiry=expiry))
        hosted.skip(skipped)
        time.sleep(0.01)
        answer = hosted.client()
        assert answer.connect(str(skipped), clean=False).present is present
        answer.close()
    hosted.drop(
        hosted.connected("for ever", clean=False, session_expiry=hive.SESSION_NEVER_EXPIRES)
    )
    hosted.skip(1e9)
    assert hosted.client().connect("for ever", clean=False).present


def test_disconnect_may_change_the_expiry_but_not_from_nothing(hosted: Hosted) -> None:
    """[MQTT-3.14.2-1] and 3.14.2.2.2"""
    client = hosted.connected("a", **AMEND)
    client.send(disconnect_packet(0, session_expiry=0))
    client.ended()
    assert not hosted.client().connect("a", clean=False).present
    client = hosted.connected("b")
    client.send(disconnect_packet(0, session_expiry=10))
    client.ended(ReasonCode.PROTOCOL_ERROR)


@both
def test_what_was_not_acknowledged_comes_again_with_its_id(hosted: Hosted, version: int) -> None:
    """[MQTT-4.4.0-1] [MQTT-4.6.0-1] [MQTT-3.3.1-1], 3.1.1 [MQTT-4.4.0-1] [MQTT-3.3.1-1]"""
    client = hosted.connected("a", version, **kept(version))
    client.subscribe(("t", 2))
    sender = hosted.connected("s", version)
    for n in range(6):
        sender.publish("t", b"%d" % n, qos=1 + n % 2)
    sent = [client.expect(PacketType.PUBLISH) for _ in range(6)]
    assert not any(one.dup for one in sent)
    client.send(hive.encode_ack(PacketType.PUBACK, sent[0].id, 0, version))
    client.send(hive.encode_ack(PacketType.PUBREC, sent[1].id, 0, version))
    assert client.expect(PacketType.PUBREL).id == sent[1].id
    client.quiet()
    client.close()
    again = hosted.connected("a", version, **kept(version))
    assert again.expect(PacketType.PUBREL).id == sent[1].id  # [MQTT-4.3.3-10]
    for before in sent[2:]:
        got = again.expect(PacketType.PUBLISH)
        assert (got.dup, got.publish) == (True, before.publish)
    again.quiet()


@both
def test_what_came_while_it_was_away_is_kept_in_order(hosted: Hosted, version: int) -> None:
    """[MQTT-4.5.0-1] [MQTT-4.6.0-6], 3.1.1 [MQTT-3.1.2-5] [MQTT-4.6.0-6]"""
    hosted.connected("a", version, **kept(version)).subscribe("t/+")
    hosted.drop(hosted.clients[0])
    sender = hosted.connected("s", version)
    for n in range(200):
        sender.publish(f"t/{n % 3}", b"%d" % n, qos=1 + n % 2)
    sender.publish("t/x", b"at QoS 0", qos=0)
    client = hosted.connected("a", version, **kept(version))
    assert [int(client.receive().payload) for _ in range(200)] == [*range(200)]
    client.quiet()


# Publishing.


@both
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_a_message_arrives_at_the_lower_of_two_qos(hosted: Hosted, version: int, qos: int) -> None:
    """[MQTT-3.3.4-1] [MQTT-3.8.4-8] [MQTT-4.3.1-1] [MQTT-4.3.2-2] [MQTT-4.3.3-2],
    3.1.1 [MQTT-3.8.4-6] [MQTT-3.3.5-1]
    """
    client, sender = hosted.connected("a", version), hosted.connected("s", version)
    assert client.subscribe(("t/0", 0), ("t/1", 1), ("t/2", 2)) == [0, 1, 2]  # [MQTT-3.9.3-1]
    for granted in (0, 1, 2):
        sender.publish(f"t/{granted}", b"hello", qos=qos)
        message = client.receive()
        assert (message.topic, message.payload) == (f"t/{granted}", b"hello")
        assert message.qos == min(qos, granted)
        assert not message.retain  # [MQTT-3.3.1-8]


@both
def test_qos_2_is_delivered_once(hosted: Hosted, version: int) -> None:
    """[MQTT-4.3.3-8..12], 3.1.1 [MQTT-4.3.3-2]"""
    client, sender = hosted.connected("a", version), hosted.connected("s", version)
    client.subscribe("t")
    for dup in (False, True, True):
        sender.send(publish_packet("t", b"once", 2, 7, dup=dup, version=version))
        answer = sender.expect(PacketType.PUBREC)
        assert (answer.id, answer.reason) == (7, 0)
    assert client.receive().payload == b"once"
    client.quiet()
    for reason in (0, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND):
        sender.send(hive.encode_ack(PacketType.PUBREL, 7, 0, version))
        done = sender.expect(PacketType.PUBCOMP)
        assert (done.id, done.reason) == (7, reason if version == 5 else 0)
    sender.send(publish_packet("t", b"anew", 2, 7, version=version))  # the id is free again
    assert client.receive().payload == b"anew"


def test_qos_2_of_a_session_is_known_over_connections(hosted: Hosted) -> None:
    """[MQTT-4.4.0-1], 4.1"""
    client = hosted.connected("a")
    client.subscribe("t")
    hosted.connected("s", **kept(5)).send(publish_packet("t", b"once", 2, 7))
    assert client.receive().payload == b"once"
    again = hosted.connected("s", **kept(5))
    again.send(publish_packet("t", b"once", 2, 7, dup=True))
    assert again.expect(PacketType.PUBREC).id == 7
    again.send(hive.encode_ack(PacketType.PUBREL, 7, 0, 5))
    assert again.expect(PacketType.PUBCOMP).reason == 0
    client.quiet()


@both
def test_a_topic_that_none_may_publish_to(hosted: Hosted, version: int) -> None:
    """[MQTT-3.3.2-2] [MQTT-4.7.3-1], 3.1.1 [MQTT-3.3.2-2] [MQTT-4.7.3-1]"""
    for topic in ("", "a/#", "+", "/" * 200):
        client = hosted.connected("", version)
        client.send(publish_packet(topic, b"x", 1, 1, version=version))
        client.ended(ReasonCode.TOPIC_NAME_INVALID)


@both
def test_qos_3_and_text_that_is_not_utf_8_are_malformed(hosted: Hosted, version: int) -> None:
    """[MQTT-3.3.1-4] [MQTT-1.5.4-1] [MQTT-1.5.4-2], 3.1.1 [MQTT-3.3.1-4] [MQTT-1.5.3-1..2]"""
    for flags, topic in ((6, b"t"), (0, b"\xff"), (0, b"\xed\xa0\x80"), (0, b"a\0b")):
        client = hosted.connected("", version)
        client.send(
            encode_packet(
                PacketType.PUBLISH, encode_two_bytes(len(topic)) + topic + b"\0\1\0", flags
            )
        )
        client.ended(ReasonCode.MALFORMED_PACKET)


@both
def test_a_byte_order_mark_is_a_character_like_others(hosted: Hosted, version: int) -> None:
    """[MQTT-1.5.4-3], 3.1.1 [MQTT-1.5.3-3]"""
    client = hosted.connected("a", version)
    client.subscribe("\ufeffa")
    client.publish("\ufeffa", qos=0)
    assert client.receive().topic == "\ufeffa"
    client.publish("a")
    client.quiet()


def test_mqtt_5_is_told_when_nobody_listens(hosted: Hosted) -> None:
    """3.4.2.1, 3.5.2.1"""
    client = hosted.connected("a")
    assert client.publish("t", qos=1) == ReasonCode.NO_MATCHING_SUBSCRIBERS
    assert client.publish("t", qos=2) == ReasonCode.NO_MATCHING_SUBSCRIBERS
    client.subscribe("t")
    client.send(publish_packet("t", b"", 1, 9))
    assert {client.expect(PacketType.PUBLISH).id, client.expect(PacketType.PUBACK).reason} == {1, 0}


def test_properties_pass_through_in_order(hosted: Hosted) -> None:
    """[MQTT-3.3.2-4] [MQTT-3.3.2-15] [MQTT-3.3.2-16] [MQTT-3.3.2-17] [MQTT-3.3.2-18]
    [MQTT-3.3.2-20]
    """
    said = {
        "payload_format": 1,
        "content_type": "text/plain",
        "response_topic": "answers/here",
        "correlation_data": b"\0\xff",
        "user": [("b", "2"), ("a", "1"), ("b", "3"), ("", "")],
    }
    client = hosted.connected("a")
    client.subscribe("t")
    client.publish("t", b"x", qos=0, **said)
    assert client.receive().properties == said
    old = hosted.connected("old", 4)
    old.subscribe("t")
    client.publish("t", b"x", qos=0, **said)
    assert old.receive().payload == b"x"


def test_a_payload_that_is_not_what_it_says_is_refused(hosted: Hosted) -> None:
    """3.3.2.3.2"""
    client = hosted.connected("a")
    client.subscribe("t")
    assert client.publish("t", b"\xff", payload_format=1) == ReasonCode.PAYLOAD_FORMAT_INVALID
    assert (
        client.publish("t", b"\xff", qos=2, payload_format=1) == ReasonCode.PAYLOAD_FORMAT_INVALID
    )
    client.publish("t", b"\xff", qos=0, payload_format=1)
    client.quiet()
    will = Publish("t", b"\xff", properties={"payload_format": 1})
    assert hosted.client().connect("b", will=will).reason == ReasonCode.PAYLOAD_FORMAT_INVALID


def test_a_message_expires(hosted: Hosted) -> None:
    """[MQTT-3.3.2-5] [MQTT-3.3.2-6]"""
    client = hosted.connected("a", **kept(5))
    client.subscribe("t", "u")
    client.close()
    sender = hosted.connected("s")
    sender.publish("t", b"short", message_expiry=10)
    sender.publish("t", b"long", message_expiry=100)
    sender.publish("t", b"for ever")
    sender.publish("u", b"gone", retain=True, message_expiry=10)
    sender.publish("u/2", b"there", retain=True, message_expiry=100)
    hosted.skip(20)
    client = hosted.connected("a", **kept(5))
    long = client.receive()
    assert (long.payload, long.properties) == (b"long", {"message_expiry": 80})
    assert client.receive().payload == b"for ever"
    client.subscribe("u/#")
    kept_one = client.receive()
    assert (kept_one.payload, kept_one.properties) == (b"there", {"message_expiry": 80})
    client.quiet()


def test_a_topic_alias_stands_for_its_topic(hosted: Hosted) -> None:
    """[MQTT-3.3.2-7] [MQTT-3.3.2-9] [MQTT-3.3.2-12]"""
    client = hosted.connected("a")
    client.subscribe("#")
    client.publish("one", b"1", topic_alias=1)
    client.publish("two", b"2", topic_alias=hive.MAX_ALIASES)
    client.receive(), client.receive()
    for alias, topic in ((1, "one"), (hive.MAX_ALIASES, "two")):
        client.publish("", b"again", qos=0, topic_alias=alias)
        message = client.receive()
        assert (message.topic, message.properties) == (topic, {})
    client.publish("three", topic_alias=1, qos=0)
    assert client.receive().topic == "three"
    client.publish("", topic_alias=1, qos=0)
    assert client.receive().topic == "three"


@pytest.mark.parametrize(("alias", "reason"), [(0, 0x94), (hive.MAX_ALIASES + 1, 0x94), (3, 0x82)])
def test_a_topic_alias_that_is_none(hosted: Hosted, alias: int, reason: int) -> None:
    """[MQTT-3.3.2-8] [MQTT-3.3.2-9], 3.3.2.3.4"""
    client = hosted.connected("a")
    client.send(publish_packet("", b"", topic_alias=alias))
    client.ended(reason)


# Retained messages.


@both
def test_a_retained_message_greets_a_new_subscriber(hosted: Hosted, version: int) -> None:
    """[MQTT-3.3.1-5..8] [MQTT-3.3.1-9] [MQTT-3.8.4-4], 3.1.1 [MQTT-3.3.1-5..12] [MQTT-3.8.4-3]"""
    sender = hosted.connected("s", version)
    sender.publish("t/1", b"first", retain=True)
    sender.publish("t/1", b"second", retain=True)
    sender.publish("t/1", b"not retained")
    sender.publish("t/2", b"at QoS 0", qos=0, retain=True)
    client = hosted.connected("a", version)
    for _ in range(2):  # once more with each SUBSCRIBE
        client.subscribe("t/1")
        message = client.receive()
        assert (message.payload, message.qos, message.retain) == (b"second", 1, True)
    client.subscribe("t/2")
    assert client.receive().payload == b"at QoS 0"
    sender.publish("t/1", b"", retain=True)
    message = client.receive()
    assert (message.payload, message.retain) == (b"", False)
    client.subscribe("t/#")
    assert client.receive().topic == "t/2"
    client.quiet()


def test_retain_handling_and_retain_as_published(hosted: Hosted) -> None:
    """[MQTT-3.3.1-9..13]"""
    client = hosted.connected("a")
    client.publish("t", b"kept", retain=True)
    client.subscribe(("t", 1 | 2 << 4))
    client.quiet()  # 2: never
    client.subscribe(("t", 1 | 1 << 4))
    client.quiet()  # 1: not for a subscription that was there
    client.unsubscribe("t")
    client.subscribe(("t", 1 | 1 << 4))
    assert client.receive().payload == b"kept"
    client.subscribe(("t", 1))
    assert client.receive().payload == b"kept"
    for options, retain in ((0, False), (AS_PUBLISHED, True)):
        client.subscribe(("t", 0 | 2 << 4 | options))
        client.publish("t", b"now", qos=0, retain=True)
        assert client.receive().retain is retain
        client.publish("t", b"now", qos=0)
        assert client.receive().retain is False


@both
def test_retained_messages_come_before_what_the_client_publishes_next(
    hosted: Hosted, version: int
) -> None:
    sender = hosted.connected("s", version)
    for n in range(1000):
        sender.send(publish_packet(f"r/{n}", b"x" * 100, retain=True, version=version))
    sender.quiet()
    client = hosted.connected("a", version)
    client.send(subscribe_packet(("r/#", 0), ("mark", 0), version=version))
    client.send(publish_packet("mark", version=version))
    assert client.expect(PacketType.SUBACK).reasons == [0, 0]
    topics = [client.receive().topic for _ in range(1001)]
    assert topics[-1] == "mark"
    assert len(set(topics)) == 1001


def test_more_retained_messages_than_a_window_holds_all_come(hosted: Hosted) -> None:
    """[MQTT-3.3.1-9] under [MQTT-3.3.4-9]"""
    sender = hosted.connected("s")
    for n in range(300):
        sender.publish(f"r/{n}", retain=True)
    client = hosted.connected("a", receive_maximum=3)
    client.subscribe(("r/#", 1), ("r/+", 1))
    topics = {client.receive().topic for _ in range(600)}
    assert len(topics) == 300
    client.quiet()


# Subscribing.


@both
def test_each_filter_has_its_answer(hosted: Hosted, version: int) -> None:
    """[MQTT-3.8.4-1..6] [MQTT-3.9.3-1], 3.1.1 [MQTT-3.8.4-1..5] [MQTT-3.9.3-2]"""
    client = hosted.connected("a", version)
    failed = ReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED if version == 5 else 0x80
    assert client.subscribe(("a", 0), ("$share/g/b", 1), ("c", 2), ("a", 1)) == [0, failed, 2, 1]
    client.publish("a")
    assert client.receive().qos == 1  # the last one counts: [MQTT-3.8.4-3]
    client.quiet()


@both
@pytest.mark.parametrize("filter", ["", "a/#/b", "a#", "+a", "a/+b", "/" * 200])
def test_a_filter_that_is_none(hosted: Hosted, version: int, filter: str) -> None:
    """[MQTT-4.7.1-1] [MQTT-4.7.1-2] [MQTT-4.7.3-1], 3.1.1 [MQTT-4.7.1-2] [MQTT-4.7.1-3]"""
    client = hosted.connected("a", version)
    client.send(subscribe_packet(filter, version=version))
    client.ended(ReasonCode.TOPIC_FILTER_INVALID)


@both
def test_wildcards_do_not_mean_topics_with_a_dollar(hosted: Hosted, version: int) -> None:
    """[MQTT-4.7.2-1]"""
    client = hosted.connected("a", version)
    client.subscribe("#", "+/x")
    client.publish("$hidden/x")
    client.quiet()
    client.subscribe("$hidden/#")
    client.publish("$hidden/x", qos=0)
    assert client.receive().topic == "$hidden/x"


@both
def test_overlapping_filters_bring_one_copy_at_the_best_qos(hosted: Hosted, version: int) -> None:
    """[MQTT-3.3.4-2], 3.1.1 [MQTT-3.3.5-1]"""
    client, sender = hosted.connected("a", version), hosted.connected("s", version)
    client.subscribe(("t/#", 0), ("t/+", 2), ("t/1", 1))
    sender.publish("t/1", qos=2)
    assert client.receive().qos == 2
    client.quiet()


def test_subscription_identifiers(hosted: Hosted) -> None:
    """[MQTT-3.3.4-3..5] [MQTT-3.8.4-3]"""
    client = hosted.connected("a")
    client.subscribe(("t/#", 1), identifier=1)
    client.subscribe(("t/+", 1), identifier=0xFFF_FFFF)
    client.subscribe(("t/1", 1))
    client.publish("t/1", qos=0)
    assert sorted(client.receive().properties["subscription_id"]) == [1, 0xFFF_FFFF]
    client.subscribe(("t/#", 1), identifier=7)
    client.publish("t", qos=0)
    assert client.receive().properties["subscription_id"] == [7]
    client.publish("t/1", retain=True)
    client.receive()
    client.subscribe(("t/1", 1), identifier=9)
    assert client.receive().properties["subscription_id"] == [9]


def test_no_local_keeps_a_client_s_own_messages_from_it(hosted: Hosted) -> None:
    """[MQTT-3.8.3-3]"""
    client, other = hosted.connected("a"), hosted.connected("b")
    client.subscribe(("t", 1 | NO_LOCAL))
    other.subscribe("t")
    client.publish("t", b"own")
    other.publish("t", b"other")
    assert client.receive().payload == b"other"
    assert [other.receive().payload for _ in range(2)] == [b"own", b"other"]


@both
def test_unsubscribing(hosted: Hosted, version: int) -> None:
    """[MQTT-3.10.4-1..6] [MQTT-3.11.3-1], 3.1.1 [MQTT-3.10.4-1..6]"""
    client = hosted.connected("a", version)
    client.subscribe("a/+", "b")
    found = client.unsubscribe("a/1", "a/+", "A/+")
    assert found == ([0x11, 0, 0x11] if version == 5 else [])
    client.publish("a/1", qos=0)
    client.publish("b", qos=0)
    assert client.receive().topic == "b"
    client.send(unsubscribe_packet(version=version))
    client.ended(ReasonCode.PROTOCOL_ERROR)


def test_what_is_under_way_is_completed_after_unsubscribing(hosted: Hosted) -> None:
    """[MQTT-3.10.4-3]"""
    client = hosted.connected("a", receive_maximum=1)
    client.subscribe("t")
    sender = hosted.connected("s")
    for n in range(3):
        sender.publish("t", b"%d" % n, qos=2)
    first = client.expect(PacketType.PUBLISH)
    client.unsubscribe("t")
    client.send(hive.encode_ack(PacketType.PUBREC, first.id, 0, 5))
    assert client.expect(PacketType.PUBREL).id == first.id
    client.send(hive.encode_ack(PacketType.PUBCOMP, first.id, 0, 5))
    assert client.receive().payload == b"1"


# Wills.


@both
def test_a_will_is_published_when_the_connection_dies(hosted: Hosted, version: int) -> None:
    """[MQTT-3.1.2-7] [MQTT-3.1.2-8] [MQTT-3.1.2-14] [MQTT-3.1.2-15] [MQTT-3.1.3-10],
    3.1.1 [MQTT-3.1.2-8] [MQTT-3.1.2-16] [MQTT-3.1.2-17]
    """
    witness = hosted.connected("w", version)
    witness.subscribe(("will", 2 | (AS_PUBLISHED if version == 5 else 0)))
    properties = {"user": [("b", "1"), ("a", "2")], "content_type": "x"} if version == 5 else {}
    for retain in (False, True):
        will = Publish("will", b"gone", 2, retain, properties=properties)
        client = hosted.connected("a", version, will=will)
        client.close()
        message = witness.receive()
        assert (message.payload, message.qos, message.properties) == (b"gone", 2, properties)
        assert message.retain is (retain and version == 5)
    witness.unsubscribe("will")
    witness.subscribe("will")
    assert witness.receive().retain


@both
def test_no_will_after_a_goodbye(hosted: Hosted, version: int) -> None:
    """[MQTT-3.1.2-10] [MQTT-3.14.4-3], 3.1.1 [MQTT-3.1.2-10] [MQTT-3.14.4-3]"""
    witness = hosted.connected("w", version)
    witness.subscribe("will")
    client = hosted.connected("a", version, will=Publish("will", b"gone", 1))
    client.send(disconnect_packet())
    client.ended()
    witness.quiet()


def test_a_goodbye_may_ask_for_the_will(hosted: Hosted) -> None:
    """3.14.2.1, [MQTT-3.14.4-3]"""
    witness = hosted.connected("w")
    witness.subscribe("will")
    for reason in (4, 0x81):
        client = hosted.connected("a", will=Publish("will", b"gone", 1))
        client.send(disconnect_packet(reason))
        client.ended()
        assert witness.receive().payload == b"gone"


@both
def test_a_will_is_published_when_the_broker_ends_the_connection(
    hosted: Hosted, version: int
) -> None:
    """[MQTT-3.1.2-8]"""
    witness = hosted.connected("w", version)
    witness.subscribe("will")
    client = hosted.connected("a", version, will=Publish("will", b"gone", 1))
    client.send(encode_packet(PacketType.CONNACK, b"\0\0"))
    assert witness.receive().payload == b"gone"
    client = hosted.connected("a", version, will=Publish("will", b"silent", 1), keepalive=5)
    hosted.skip(8)
    assert witness.receive().payload == b"silent"


def test_a_will_waits_for_its_delay_or_the_session_s_end(hosted: Hosted) -> None:
    """[MQTT-3.1.2-8] [MQTT-3.1.3-9]"""
    witness = hosted.connected("w")
    witness.subscribe("will")
    will = Publish("will", b"gone", 1, properties={"will_delay": 30, "message_expiry": 100})
    hosted.drop(hosted.connected("a", will=will, **AMEND))
    hosted.skip(20)
    witness.quiet()
    hosted.drop(hosted.connected("a", will=will, clean=False, **AMEND))  # it is back in time
    hosted.skip(20)
    witness.quiet()
    hosted.skip(20)
    assert witness.receive().properties == {"message_expiry": 100}
    hosted.drop(hosted.connected("b", will=will, session_expiry=5))
    hosted.skip(6)
    assert witness.receive().payload == b"gone"  # the session has ended before the delay
    hosted.drop(hosted.connected("c", will=will))
    assert witness.receive().payload == b"gone"  # at once: it has no session
    hosted.drop(hosted.connected("d", will=will, **AMEND))
    hosted.connected("d", clean=True)
    assert witness.receive().payload == b"gone"  # a clean start ends the session


def test_taking_over_publishes_a_will_that_has_no_delay(hosted: Hosted) -> None:
    """3.1.4, non-normative"""
    witness = hosted.connected("w")
    witness.subscribe("will")
    for delay, clean, published in ((0, False, True), (30, False, False), (30, True, True)):
        will = Publish("will", b"%d" % delay, 1, properties={"will_delay": delay})
        hosted.connected("a", will=will, **AMEND)
        taking = hosted.connected("a", clean=clean, **AMEND)
        if published:
            assert witness.receive().payload == b"%d" % delay
        witness.quiet()
        taking.send(disconnect_packet())
        taking.ended()


# Flow.


def test_it_keeps_to_the_client_s_receive_maximum(hosted: Hosted) -> None:
    """[MQTT-3.3.4-9] [MQTT-4.9.0-1..3]"""
    client = hosted.connected("a", receive_maximum=2)
    client.subscribe(("t", 2))
    sender = hosted.connected("s")
    for n in range(5):
        sender.publish("t", b"%d" % n, qos=1 + n % 2)
    sender.publish("t", b"zero", qos=0)
    first, second = client.expect(PacketType.PUBLISH), client.expect(PacketType.PUBLISH)
    assert client.receive().payload == b"zero"  # QoS 0 is not held up
    client.send(hive.encode_ack(PacketType.PUBREC, second.id, 0, 5))
    client.expect(PacketType.PUBREL)
    client.quiet()  # PUBREC frees nothing
    client.send(hive.encode_ack(PacketType.PUBACK, first.id, 0, 5))
    assert client.receive().payload == b"2"
    client.send(hive.encode_ack(PacketType.PUBCOMP, second.id, 0, 5))
    assert client.expect(PacketType.PUBLISH).publish.payload == b"3"


def test_a_failing_pubrec_ends_the_exchange(hosted: Hosted) -> None:
    """[MQTT-4.9.0-2], 3.5.4"""
    client = hosted.connected("a", receive_maximum=1)
    client.subscribe("t")
    for n in range(2):
        client.send(publish_packet("t", b"%d" % n, 2, n + 1))
    first = next(got for got in iter(client.read, None) if got.kind is PacketType.PUBLISH)
    client.send(hive.encode_ack(PacketType.PUBREC, first.id, 0x80, 5))
    second = next(got for got in iter(client.read, None) if got.kind is PacketType.PUBLISH)
    assert second.publish.payload == b"1"


def test_an_acknowledgement_of_nothing_is_answered_or_passed_over(hosted: Hosted) -> None:
    """3.5.2.1, 3.6.2.1, 3.7.2.1"""
    client = hosted.connected("a")
    client.send(hive.encode_ack(PacketType.PUBREC, 77, 0, 5))
    answer = client.expect(PacketType.PUBREL)
    assert (answer.id, answer.reason) == (77, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND)
    client.send(
        hive.encode_ack(PacketType.PUBACK, 77, 0, 5), hive.encode_ack(PacketType.PUBCOMP, 77, 0, 5)
    )
    client.quiet()


def test_more_at_qos_2_than_it_takes_at_once(hosted: Hosted) -> None:
    """[MQTT-3.3.4-7], 3.3.4"""
    client = hosted.connected("a")
    client.send(
        *(publish_packet("t", b"", 2, n) for n in range(1, hive.BROKER_RECEIVE_MAXIMUM + 1))
    )
    for n in range(1, hive.BROKER_RECEIVE_MAXIMUM + 1):
        assert client.expect(PacketType.PUBREC).id == n
    client.send(publish_packet("t", b"", 2, 2, dup=True))
    assert client.expect(PacketType.PUBREC).id == 2
    client.send(publish_packet("t", b"", 2, 1000))
    client.ended(ReasonCode.RECEIVE_MAXIMUM_EXCEEDED)


@both
def test_a_packet_larger_than_it_takes(hosted: Hosted, version: int) -> None:
    """[MQTT-3.2.2-15]"""
    client = hosted.connected("a", version)
    client.subscribe("t")
    whole = b"x" * (hive.MAX_PACKET - 300)
    client.publish("t", whole, qos=0)
    assert client.receive().payload == whole
    client.send(b"\x30\xff\xff\x7f")
    client.ended(ReasonCode.PACKET_TOO_LARGE)


def test_a_message_larger_than_the_client_takes_is_passed_over(hosted: Hosted) -> None:
    """[MQTT-3.1.2-24] [MQTT-3.1.2-25]"""
    client = hosted.connected("a", maximum_packet_size=100)
    client.subscribe("t")
    sender = hosted.connected("s")
    for qos in (0, 1, 2):
        sender.publish("t", b"x" * 200, qos=qos)
        sender.publish("t", b"small", qos=qos)
        assert client.receive().payload == b"small"
    client.quiet()


def test_a_message_in_a_thousand_pieces(hosted: Hosted) -> None:
    """4.2: the transport is a stream"""
    client = hosted.connected("a")
    client.subscribe("t")
    for byte in publish_packet("t", b"whole") * 3:
        client.send(bytes([byte]))
    assert [client.receive().payload for _ in range(3)] == [b"whole"] * 3


# On either side of each bound.


@pytest.mark.parametrize(("asked", "told"), [(0, 60), (1, None), (60, None), (61, 60)])
def test_mqtt_5_is_told_a_keep_alive_where_its_own_will_not_do(
    hosted: Hosted, asked: int, told: int | None
) -> None:
    """3.2.2.3.14"""
    said = hosted.client().connect("a", keepalive=asked).properties
    assert said.get("server_keep_alive") == told


@pytest.mark.parametrize("asked", [0, 1000])
def test_the_keep_alive_that_was_told_is_kept_to(hosted: Hosted, asked: int) -> None:
    client = hosted.connected("a", keepalive=asked)
    hosted.skip(80)  # of 90, which is one and a half of 60
    client.quiet()
    hosted.skip(91)
    client.ended(ReasonCode.KEEP_ALIVE_TIMEOUT)


def test_whoever_says_connect_in_time_is_heard(hosted: Hosted) -> None:
    slow, whole = hosted.client(), connect_packet(client_id="slow")
    slow.send(whole[:7])
    eventually("it is in", lambda: len(hosted.broker.connections) == 1)
    hosted.skip(8)
    slow.send(whole[7:])
    assert slow.expect(PacketType.CONNACK).reason == 0


@both
def test_how_long_a_name_may_be(hosted: Hosted, version: int) -> None:
    assert hosted.client(version).connect("x" * 1024).reason == 0
    assert hosted.client(version).connect("x" * 1025).reason == (0x85 if version == 5 else 2)


def test_a_connected_client_has_all_of_its_expiry_after_a_restart(hosted: Hosted) -> None:
    for seconds, present in ((90, True), (110, False)):
        hosted.connected("a", clean=False, session_expiry=100)
        hosted.stop()
        hosted.clock.skipped += 1000  # nobody runs meanwhile: its time begins at the start
        hosted.start()
        hosted.skip(seconds)
        hosted.connected("other").quiet()
        assert hosted.client().connect("a", clean=False, session_expiry=100).present is present


def test_small_and_large_messages_keep_their_order(hosted: Hosted) -> None:
    client, sender = hosted.connected("a"), hosted.connected("s")
    client.subscribe(("t", 0))
    sizes = [1, 4000, 4096, 5000, 2, 3, 100_000, 4, 4095, 4097]
    bodies = [bytes([n]) * size for n, size in enumerate(sizes)]
    sender.send(*(publish_packet("t", body) for body in bodies))
    assert [client.receive().payload for _ in bodies] == bodies


def test_a_will_lives_from_its_publication(hosted: Hosted) -> None:
    """3.1.3.2.4"""
    client = hosted.connected("w", **kept(5))
    client.subscribe("will")
    hosted.drop(client)
    will = Publish("will", b"gone", 1, properties={"message_expiry": 50})
    for name, wait, expected in (("a", 20, [b"gone"]), ("b", 60, [])):
        hosted.connected(name, will=will)
        hosted.skip(100)  # longer than its life: it has not begun
        hosted.drop(hosted.clients[-1])
        hosted.skip(wait)
        reader = hosted.connected("w", **kept(5))
        for payload in expected:
            message = reader.receive()
            assert message.payload == payload
            assert 28 <= message.properties["message_expiry"] <= 30
        reader.quiet()
        hosted.drop(reader)


def test_what_has_expired_is_not_kept_for_ever(hosted: Hosted) -> None:
    client = hosted.connected("a")
    client.publish("gone", retain=True, message_expiry=10)
    client.publish("there", retain=True, message_expiry=10_000)

    def only_one_is_kept() -> bool:
        hosted.skip(1)
        client.quiet()
        return [*hosted.broker.retained] == ["there"]

    eventually("what has expired is removed", only_one_is_kept)
    client.subscribe("#")
    assert client.receive().topic == "there"
    client.quiet()


def test_an_empty_retained_message_is_handed_on_and_not_kept(hosted: Hosted) -> None:
    """[MQTT-3.3.1-6] [MQTT-3.3.1-7]"""
    client = hosted.connected("a")
    client.subscribe("t")
    client.publish("t", b"", retain=True)
    assert client.receive().payload == b""
    client.subscribe("t")
    client.quiet()
    assert not hosted.broker.retained


def test_a_second_subscription_takes_the_place_of_the_first(hosted: Hosted) -> None:
    """[MQTT-3.8.4-3]"""
    client = hosted.connected("a")
    assert client.subscribe(("t/+", 0), identifier=1) == [0]
    assert client.subscribe(("t/+", 2), identifier=2) == [2]
    client.publish("t/1", qos=1)
    message = client.receive()
    assert (message.qos, message.properties) == (1, {"subscription_id": [2]})
    client.quiet()
    assert client.unsubscribe("t/+", "t/+") == [0, ReasonCode.NO_SUBSCRIPTION_EXISTED]
    client.publish("t/1", qos=0)
    client.quiet()


def test_what_was_refused_is_in_the_log(hosted: Hosted) -> None:
    hosted.client().connect("x" * 2000)
    client = hosted.connected("clumsy")
    client.send(encode_packet(PacketType.SUBSCRIBE, encode_two_bytes(1) + b"\0", 2))
    client.ended(ReasonCode.PROTOCOL_ERROR)
    log = hosted.log.getvalue()
    assert 'event="client refused" why="client identifier not valid"' in log
    assert 'event="packet refused" client="\'clumsy\'" why="SUBSCRIBE to nothing"' in log


def test_who_finds_no_place_is_in_the_log(hosted: Hosted) -> None:
    hosted.connected("first")
    hosted.broker._max_connections = 1
    hosted.client().ended()
    assert 'event="client refused" why="1 are connected"' in hosted.log.getvalue()


def test_an_exchange_that_goes_on_takes_one_place_in_the_window(hosted: Hosted) -> None:
    """[MQTT-4.9.0-1] [MQTT-4.9.0-2]: PUBREL is sent again and does count until PUBCOMP."""
    said = {**kept(5), "receive_maximum": 2}
    client = hosted.connected("a", **said)
    client.subscribe(("t", 2))
    sender = hosted.connected("s")
    sender.publish("t", b"begun", qos=2)
    begun = client.receive(acknowledge=False)
    client.send(hive.encode_ack(PacketType.PUBREC, begun.packet_id, 0, 5))
    assert client.expect(PacketType.PUBREL).id == begun.packet_id
    hosted.drop(client)
    for payload in (b"1", b"2"):
        sender.publish("t", payload, qos=1)
    client = hosted.connected("a", **said)
    assert client.expect(PacketType.PUBREL).id == begun.packet_id
    assert client.receive(acknowledge=False).payload == b"1"
    client.quiet()  # two are under way
    client.send(hive.encode_ack(PacketType.PUBCOMP, begun.packet_id, 0, 5))
    assert client.receive(acknowledge=False).payload == b"2"
