"""What a configuration of Mosquitto says, word for word where others rely on it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from test_doctor import config_of
from test_mosquitto import ACL

import hive


def test_a_host_is_at_most_as_long_as_dns_has_it() -> None:
    for good in ("a" * 253, "alpha.lan", "10.0.0.1", "fd7a::7", "0"):
        assert hive.host_address(good) == good
    wrong: list[Any] = ["a" * 254, "", "-a", "a b", "a/b", ":lan", 7, None, ["a"]]
    for bad in wrong:
        with pytest.raises(ValueError):
            hive.host_address(bad)
    said = ["10.0.0.1", "::1", "alpha", "10.0.0", "fd7a::g"]
    assert [hive.is_address(one) for one in said] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("mqtt", "tls", "host", "port"),
    [
        ({}, False, "127.0.0.1", 1883),
        ({}, True, "here.lan", 8883),
        ({"host": "10.0.0.7"}, False, "10.0.0.7", 1883),
        ({"host": "h", "port": 77}, True, "h", 77),
    ],
)
def test_where_it_is_and_for_whom(mqtt: dict[str, Any], tls: bool, host: str, port: int) -> None:
    config = config_of(mqtt=mqtt, node={"id": "alpha", "topic_prefix": "lab"})
    setup = hive.mosquitto_setup(config, ["b", "a", "b"], tls, "here.lan")
    assert setup == hive.MosquittoSetup("lab", host, port, tls, ["b", "a"])
    assert hive.mosquitto_setup(config, [], tls, "here.lan").nodes == ["alpha"]


def test_what_was_an_open_hive_may_be_read_for_a_while() -> None:
    acl = hive.mosquitto_acl("lab").splitlines()
    assert [line for line in acl if not line.startswith("#")] == ACL.splitlines()
    at = acl.index(
        "# what waits since the hive was an open one: without # until each node was there"
    )
    assert acl[at + 1 :] == ["# pattern read lab/%u/+", "# pattern read lab/all/+"]


def test_certificates_of_the_script_hold_for_ten_years() -> None:
    setup = hive.MosquittoSetup("lab", "broker.lan", 8883, True, ["alpha"])
    script = hive.mosquitto_script(setup)
    assert re.findall(r"-days (\d+)", script) == ["3650", "3650"]
    assert "mosquitto openssl &&" in script and "which will reach it at broker.lan:8883." in script
    plain = hive.mosquitto_script(setup.replace(tls=False, host="fd7a::7"))
    assert "openssl" not in plain and "which will reach it at [fd7a::7]:8883." in plain


BRIDGE = """\
connection @lab
address far.lan:8883
remote_username @lab
remote_password secret
bridge_cafile /x/ca.pem
bridge_tls_version tlsv1.2
remote_clientid ID
local_clientid local.ID
cleansession false
bridge_protocol_version mqttv311
try_private true
keepalive_interval 10
restart_timeout 1 3
notification_topic hive/all/@lab
topic +/command/+ both 1 hive/ hive/
topic +/response/+ both 1 hive/ hive/
topic +/sync/+ both 1 hive/ hive/
topic +/heartbeat/+ both 1 hive/ hive/
topic +/status/+ both 1 hive/ hive/
topic +/alert/+ both 1 hive/ hive/
topic meta/+/+ both 0 hive/ hive/"""


def test_a_bridge_takes_all_that_is_said_and_nobody_can_guess_its_session() -> None:
    ca_file = hive.path_of("/x/ca.pem")
    account = hive.MqttConfig(host="far.lan", port=8883, password="secret", ca_file=ca_file)
    said = hive.mosquitto_bridge("hive", "@lab", account)
    ids = {*re.findall(r"(?m)^(?:remote_clientid |local_clientid local\.)(\w+)$", said)}
    lines = [one for one in said.splitlines() if one and not one.startswith("#")]
    (id,) = ids
    assert [one.replace(id, "ID") for one in lines] == BRIDGE.splitlines()
    assert re.fullmatch("[0-9a-f]{32}", id)
    for other in (
        hive.mosquitto_bridge("hive", "@office", account),
        hive.mosquitto_bridge("hive", "@lab", account.replace(password="another")),
    ):
        assert id not in other
