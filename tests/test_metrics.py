"""Metrics: what the daemon counts, read by Prometheus' own parser; the dashboard asks for no other.

Whose counts are whose is in the sections; here is what comes of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from conftest import ROOT, Hive
from prometheus_client.parser import text_string_to_metric_families
from rig import Rig
from test_requests import Caller

import hive


def parsed(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Each name with its numbers by the values of its labels, as Prometheus has them."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            metric = hive.METRICS[sample.name]
            assert (family.type, family.documentation) == (metric.kind, metric.help)
            assert tuple(sample.labels) == metric.labels
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def metrics_of(rig: Rig) -> dict[str, dict[tuple[str, ...], float]]:
    caller = Caller(rig)
    answer = caller.ask(do="metrics")
    caller.client.close()
    assert answer["metrics"].keys() <= hive.METRICS.keys()
    return parsed(hive.metrics_text(answer))


def test_messages_are_counted_by_channel_and_by_what_became_of_them(
    rig_of: Callable[..., Rig], main_agent: hive.InstanceConfig
) -> None:
    rig = rig_of([main_agent], fail="exit 1")

    def counted(name: str) -> dict[tuple[str, ...], float]:
        return metrics_of(rig).get(name, {})

    for action in ("ping", "ping", "fail"):
        rig.answer_to(rig.say("command", action))
    rig.say("command", text="what now?")
    rig.until("its turn has ended", lambda: ("main", "ok") in counted("hive_agent_turns_total"))
    rig.say("command", "nosuch")
    rig.beat("alpha")
    rig.tell(rig.say("status"))
    rig.hand_in("hive/beta/command", b"rubbish")

    messages = counted("hive_messages_total")
    expected = {
        ("command", "run"): 3,
        ("command", "wake"): 2,  # nobody here has the other action
        ("heartbeat", "hear"): 2,  # this node's own is one
        ("status", "wake"): 1,
        ("status", "seen"): 1,
        ("none", "invalid"): 1,
        ("response", "sent"): 2,
        ("alert", "sent"): 1,
    }
    assert expected.items() <= messages.items(), messages
    assert counted("hive_handler_runs_total") == {
        ("ping", "ok"): 2,
        ("fail", "failed"): 1,
    }
    assert counted("hive_handler_seconds_total").keys() == {("ping",), ("fail",)}
    assert counted("hive_agent_turns_total") == {("main", "ok"): 1}
    assert counted("hive_agent_up") == {("main",): 1}


def test_queues_members_and_the_broker_are_told_as_they_are_now(rig: Rig) -> None:
    states: dict[str, dict[str, Any]] = {
        "alpha": {"status": "online"},
        "gamma": {"status": "degraded"},
        "delta": {"status": "offline", "reason": "connection lost"},
        "omega": {"status": "offline", "reason": "stopped"},
        "odd": {"status": "\x1b[2J", "reason": ["x"]},
    }
    for name, state in states.items():
        rig.hear_state(name, retained=True, last_seen=1, **state)
    asked = hive.Envelope.new("beta", "alpha", "command", "are you there?").document()
    rig.disconnect()
    caller = Caller(rig)
    caller.ask(do="send", envelope=asked)
    now = metrics_of(rig)
    conditions = {"online": 1, "degraded": 1, "lost": 1, "stopped": 1, "unknown": 1}
    assert now["hive_members"] == {(name,): n for name, n in conditions.items()}
    assert now["hive_queue_length"] == {
        ("outbox",): 1,
        ("questions",): 1,
        ("handlers",): 0,
        ("agents",): 0,
        ("inboxes",): 0,
    }
    assert now["hive_connected"] == {(): 0} and now["hive_reconnects_total"] == {(): 0}
    rig.connect()
    now = metrics_of(rig)
    assert now["hive_connected"] == {(): 1} and now["hive_reconnects_total"] == {(): 1}
    assert now["hive_queue_length"]["outbox",] == 0
    caller.client.close()


def test_sessions_and_what_they_have_not_read_are_counted(rig: Rig) -> None:
    session = Caller(rig)
    facts = {"client": "test 1", "directory": "/", "branch": "", "pid": 1}
    assert session.ask(do="attach", name="reviewer", exact=True, **facts)["unread"] == 0
    rig.say("command", to="reviewer", text="look at this")
    now = metrics_of(rig)
    assert now["hive_sessions"] == {(): 1}
    assert now["hive_queue_length"]["inboxes",] == 1
    session.client.close()
    rig.turn()
    now = metrics_of(rig)
    assert now["hive_sessions"] == {(): 0}
    assert now["hive_queue_length"]["inboxes",] == 1


def test_every_number_that_is_declared_is_exported(
    rig_of: Callable[..., Rig], main_agent: hive.InstanceConfig
) -> None:
    rig = rig_of([main_agent])
    rig.answer_to(rig.say("command", "ping"))
    rig.say("command", text="hello")
    rig.until("a turn is counted", lambda: "hive_agent_turns_total" in metrics_of(rig))
    now = metrics_of(rig)
    assert now.keys() == hive.METRICS.keys()
    assert 10e6 < now["process_resident_memory_bytes"][()] < 1e9
    assert now["process_cpu_seconds_total"][()] > 0 and now["hive_journal_bytes"][()] > 0
    assert list(now["hive_build_info"]) == [("beta", hive.__version__, hive.build())]


def test_names_follow_prometheus_rules() -> None:
    for name, metric in hive.METRICS.items():
        assert re.fullmatch(r"(hive|process)_[a-z_]+", name)
        assert name.endswith("_total") == (metric.kind == "counter")
        assert metric.help.endswith(".") and not {"le", "quantile"} & {*metric.labels}


@pytest.mark.parametrize("said", ['a"b', "a\\b", "a\nb", "\\n", "ä}"])
def test_no_value_of_a_label_can_pass_for_another_line(said: str) -> None:
    text = hive.metrics_text({"metrics": {"hive_agent_up": [[said, True]]}})
    assert parsed(text) == {"hive_agent_up": {(said,): 1}}


def test_many_actions_are_not_many_numbers(
    rig_of: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "MAX_COUNTED_ACTIONS", 2)
    rig = rig_of(one="true", two="true", three="true")
    for action in ("one", "ping", "two", "three", "one"):
        rig.answer_to(rig.say("command", action))
    rig.turn()
    runs = metrics_of(rig)["hive_handler_runs_total"]
    assert runs == {("one", "ok"): 2, ("ping", "ok"): 1, ("other", "ok"): 2}


def test_the_command_prints_them_and_says_where_there_are_none(hive: Hive) -> None:
    alpha = hive.node("alpha")
    why = "hive: no daemon of alpha runs on this machine: nothing is counted\n"
    assert hive.cli("alpha", "metrics", code=1).stderr == why
    alpha.start()
    done = hive.cli("alpha", "metrics")
    assert parsed(done.stdout)["hive_connected"] == {(): 1}
    assert done.stderr == "" and done.stdout.endswith("\n")


def expressions(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


def test_the_dashboard_asks_for_what_is_exported() -> None:
    dashboard = json.loads((ROOT / "contrib/grafana.json").read_text())
    panels = dashboard["panels"]
    asked = " ".join(said for panel in panels for said in expressions(panel))
    names = {*re.findall(r"\b(?:hive|process)_\w+", asked)}
    assert names <= hive.METRICS.keys(), "not exported"
    assert hive.METRICS.keys() - names <= {
        "hive_degraded",  # hive_members has it
        "hive_handlers_running",
        "hive_sessions",
        "process_start_time_seconds",
    }
    known = {"instance", *(label for metric in hive.METRICS.values() for label in metric.labels)}
    labels = {*re.findall(r"(\w+)(?:=~|!=|=)\"", asked), *re.findall(r"\{\{(\w+)", str(panels))}
    for group in re.findall(r"(?:by|on) \(([\w, ]+)\)", asked):
        labels |= {*group.split(", ")}
    assert labels <= known
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["title"] and panel["description"] for panel in panels)


def test_grafanas_own_schema_knows_every_word_of_the_dashboard() -> None:
    """As its SDK has it; a Grafana itself is in no package registry."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    def unknown(ours: Any, theirs: Any, where: str) -> list[str]:
        """What has not come back; what was added are defaults."""
        pairs = [(where, ours, theirs)]
        if isinstance(ours, dict):
            pairs = [(f"{where}.{key}", one, theirs.get(key)) for key, one in ours.items()]
        elif isinstance(ours, list) and len(ours) == len(theirs):
            pairs = [(f"{where}.{i}", *two) for i, two in enumerate(zip(ours, theirs, strict=True))]
        elif ours != theirs:
            return [where]
        else:
            return []
        return [name for at, one, two in pairs for name in unknown(one, two, at)]

    register_default_plugins()
    dashboard = json.loads((ROOT / "contrib/grafana.json").read_text())
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))
    assert unknown(dashboard, read, "") == []
    dashboard["panels"][0]["options"]["colour"] = "x"
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))
    assert unknown(dashboard, read, "") == [".panels.0.options.colour"]
