"""Who may run a handler or wake an agent, and whose results everybody may read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Hive, calls_of
from rig import Rig

import hive as module
from hive import HandlerConfig, InstanceConfig

RULES = """
[handlers.deploy]
allow = ["alpha"]
[handlers.count]
publish = false
[[oc_instances]]
name = "main"
openclaw_cmd = "{agent}"
allow = "alpha"
"""


def refused(hive: Hive, sender: str, *how: str) -> str:
    """What a sender reads who is not named."""
    done = hive.cli(sender, "send", "--to", "beta", "--text", "x", "--wait", "20", *how, code=1)
    assert not done.stdout
    return done.stderr


def test_whoever_is_not_named_reads_which_rule_it_is(hive: Hive, fast_agent: Path) -> None:
    beta = hive.node("beta", RULES.format(agent=fast_agent))
    beta.handler("deploy", "#!/bin/sh\necho deployed\n")
    for node in (beta, hive.node("alpha"), hive.node("gamma")):
        node.start()

    rule = "[handlers.deploy] allow does not name gamma"
    assert refused(hive, "gamma", "--action=deploy") == f"beta: deploy refused: {rule}\n"
    rule = "allow of [[oc_instances]] main does not name gamma"
    assert refused(hive, "gamma") == f"beta: message refused: {rule}\n"
    assert refused(hive, "gamma", "--action=other") == f"beta: other refused: {rule}\n"
    hive.cli("gamma", "send", "--to=beta", "--ch=alert", "--text=fire")
    beta.logged("received", ch="alert", note=rule)
    assert not calls_of(fast_agent)

    asked = ("send", "--to=beta", "--action=deploy", "--text=x", "--wait=20")
    assert hive.cli("alpha", *asked).stdout == "deployed\n"
    assert hive.cli("beta", *asked).stdout == "deployed\n"
    hive.cli("alpha", "send", "--to=beta", "--text=look")
    beta.logged("agent woken")
    for view in (["status"], ["roster"]):
        assert "beta" in hive.cli("gamma", *view).stdout

    listed = hive.cli("beta", "handler", "list").stdout.splitlines()
    assert [line.split()[3] for line in listed] == ["ALLOW", "alpha,beta"]
    assert json.loads(hive.cli("beta", "handler", "list", "--json").stdout)["allow"] == {
        "deploy": ["alpha"]
    }
    said = hive.cli("beta", "doctor").stdout
    assert f"deploy (from alpha, beta alone), in {beta.handlers}" in said
    (line,) = [one for one in said.splitlines() if one.split()[1] == "agents"]
    assert "(from alpha, beta alone)" in line
    assert "[handlers.count] is about none that is there" in said
    assert "allow is about names that anybody may use: this broker does not check senders" in said


def test_doctor_says_what_a_misspelt_rule_means(hive: Hive) -> None:
    """The handler would be open to everybody."""
    beta = hive.node("beta", '[handlers.depoly]\nallow = "alpha"\n')
    beta.handler("deploy", "#!/bin/sh\n")
    said = hive.cli("beta", "doctor", code=None).stdout
    assert (
        "warn  handlers   [handlers.depoly] is about none that is there; did you mean deploy?"
        in said
    )


@pytest.mark.parametrize(
    ("allow", "error"),
    [
        ('"a b"', "'a b' is not a name, or a list of names"),
        ('["alpha", "all"]', "['alpha', 'all'] is not a name, or a list of names"),
        ("true", "True is not a name, or a list of names"),
    ],
)
def test_a_rule_names_nodes(tmp_path: Path, allow: str, error: str) -> None:
    file = tmp_path / "hive.toml"
    for header in ("[handlers.deploy]", '[[oc_instances]]\nname = "main"'):
        file.write_text(f"{header}\nallow = {allow}\n")
        with pytest.raises(module.ConfigError) as raised:
            module.load_config(str(file))
        assert str(raised.value).endswith(f".allow: {error}")


def test_an_answer_to_a_question_of_its_own_reaches_the_agent(
    rig_of: Callable[..., Rig], main_agent: InstanceConfig, fast_agent: Path
) -> None:
    rig = rig_of([main_agent.replace(allow=())])
    question = module.Envelope.new("beta", "alpha", "command", "how are you?")
    rig.node.node._send_for_command(question)
    for _ in range(2):  # the first one settles the question, and may not be the last
        rig.tell(question.reply("alpha", "well"))
    rig.until("the agent hears it", lambda: len(rig.events("agent woken")) == 2, tick=1.0)
    refused = rig.say("command", sender="alpha")
    assert "does not name alpha" in rig.answer_to(refused).text
    # our refusal is no question, so that nothing can be had by answering it
    rig.say("alert", corr=refused.id)
    assert "does not name alpha" in rig.events("received", ch="alert")[-1]["note"]
    assert len(calls_of(fast_agent)) == 2


def results(rig: Rig, action: str) -> list[bytes]:
    topic = f"hive/meta/beta/{action}"
    return [one.payload for one in rig.wire.published if one.topic == topic and one.retain]


def test_a_result_that_is_nobody_elses_business_is_not_kept(rig_of: Callable[..., Rig]) -> None:
    settings: dict[str, Any] = {"secret": HandlerConfig(publish=False)}
    rig = rig_of(settings=settings, secret="echo the answer")
    assert rig.answer_to(rig.say("command", "secret")).text == "the answer"
    assert results(rig, "secret") == [b""]  # what was there before is removed
    assert rig.answer_to(rig.say("command", "ping")).text == "pong"
    assert len(results(rig, "ping")) == 1
