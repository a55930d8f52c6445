"""The one table of what a node does with each kind of message."""

from __future__ import annotations

import pytest

from hive import CHANNELS, Wake, main


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
