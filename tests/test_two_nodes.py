"""Two nodes of one user on one machine: who speaks as whom, and which one a command means."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, Daemon, Hive, calls_of, eventually
from test_broker_host import Machine

import hive as module

ENVIRONMENT = "#!/bin/sh\nenv | grep -E '^HIVE_(NODE|CONFIG)=' | sort\n"
SPEAKS = '#!/bin/sh\nhive send --to attic --ch status --text "by a child of $HIVE_NODE"\n'


@pytest.fixture
def pair(hive: Hive) -> tuple[Daemon, Daemon]:
    """alpha and beta: neither has its configuration where one is looked for."""
    tools = hive.home / "bin"
    tools.mkdir()
    (tools / "hive").symlink_to(hive.program[1])
    hive.environment["PATH"] = f"{tools}:{hive.environment['PATH']}"
    alpha, beta = hive.node("alpha"), hive.node("beta")
    for one in (alpha, beta):
        one.handler("environment", ENVIRONMENT)
        one.handler("speaks", SPEAKS)
    return alpha, beta


def typed(
    hive: Hive, *arguments: str, code: int = 0, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command as a user types it who names no configuration."""
    done = hive.run(
        [*hive.program, *arguments],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        env=hive.environment | dict(environment or {}),
        cwd=hive.home,
    )
    assert done.returncode == code, (done.stdout, done.stderr)
    return done


def node_of(hive: Hive, *arguments: str, **environment: str) -> str:
    """Whom a command speaks for."""
    said = typed(
        hive, *arguments, "send", "--to=attic", "--text=x", "--json", environment=environment
    )
    return str(json.loads(said.stdout)["from"])


def run(hive: Hive, node: Daemon, action: str) -> str:
    return hive.cli(
        node.name, "send", f"--to={node.name}", f"--action={action}", "--text=x", "--wait=20"
    ).stdout


def test_a_handler_knows_its_node_and_where_that_is_configured(
    hive: Hive, pair: tuple[Daemon, Daemon]
) -> None:
    for node in pair:
        node.start()
        said = run(hive, node, "environment")
        assert said == f"HIVE_CONFIG={node.config}\nHIVE_NODE={node.name}\n"
        tested = hive.cli(node.name, "handler", "test", "environment").stdout
        assert tested == said


def test_a_relative_configuration_is_an_absolute_one_for_children(
    hive: Hive, pair: tuple[Daemon, Daemon]
) -> None:
    _, beta = pair
    done = subprocess.run(
        [*hive.program, "handler", "test", "environment"],
        capture_output=True,
        text=True,
        env=hive.environment | {"HIVE_CONFIG": "hive.toml"},
        cwd=beta.home,
    )
    assert f"HIVE_CONFIG={beta.config}\n" in done.stdout, done.stderr


def test_the_child_of_each_speaks_as_its_own_node(hive: Hive, pair: tuple[Daemon, Daemon]) -> None:
    for node in pair:
        node.start()
    for node in pair:
        run(hive, node, "speaks")
        rows = hive.cli(node.name, "log", "--json", "--to=attic").stdout.splitlines()
        (said,) = filter(None, (json.loads(row)["envelope"] for row in rows))
        assert (said["from"], said["text"]) == (node.name, f"by a child of {node.name}")


def test_an_agent_of_the_second_answers_as_the_second(
    hive: Hive, pair: tuple[Daemon, Daemon], tmp_path: Path
) -> None:
    alpha, _ = pair
    agent = tmp_path / "agent"
    agent.write_text('#!/bin/sh\nhive reply --to-msg "$1" --text "I am of $HIVE_NODE"\n')
    agent.chmod(0o755)
    gamma = hive.node(
        "gamma", f'[[oc_instances]]\nname = "main"\ncommand = ["{agent}", "{{id}}"]\n'
    )
    for node in (alpha, gamma):
        node.start()
    said = hive.cli("alpha", "send", "--to=gamma", "--text=who?", "--wait=20", "--json")
    answer = json.loads(said.stdout)
    assert (answer["from"], answer["text"]) == ("gamma", "I am of gamma")


def test_an_agent_that_is_no_child_is_told_how_to_answer_as_its_node(
    hive: Hive, fast_agent: Path
) -> None:
    table = f'[[oc_instances]]\nname = "main"\nopenclaw_cmd = "{fast_agent}"\n'
    beta = hive.node("beta", table).start()
    hive.cli("beta", "send", "--to=beta", "--text=who?")
    (call,) = eventually("the agent is called", lambda: calls_of(fast_agent))
    assert " To answer: hive reply --node beta --to-msg ID" in " ".join(call["argv"])
    beta.stop()


def test_a_command_means_the_daemon_that_runs(hive: Hive, pair: tuple[Daemon, Daemon]) -> None:
    _, beta = pair
    assert node_of_nobody(hive) == module.short_host_name()
    beta.start()
    assert node_of(hive) == "beta"
    assert typed(hive, "handler", "list").stdout.count(f"{beta.handlers}/") == 2
    assert json.loads(typed(hive, "status", "--json").stdout)[0]["name"] == "beta"
    shown = typed(hive, "config").stdout
    assert f"# from {beta.config}\n" in shown
    beta.stop()
    assert node_of_nobody(hive) == module.short_host_name()


def node_of_nobody(hive: Hive) -> str:
    shown = typed(hive, "config").stdout
    return next(line.split('"')[1] for line in shown.splitlines() if line.startswith("id ="))


def test_where_several_run_it_asks_which(hive: Hive, pair: tuple[Daemon, Daemon]) -> None:
    for node in pair:
        node.start()
    for command in (
        ["status"],
        ["send", "--to=attic", "--text=x"],
        ["reply", "--to-msg=abcd", "--text=x"],
        ["log"],
        ["handler", "list"],
        ["config"],
    ):
        said = typed(hive, *command, code=2)
        why = "2 daemons of yours run here; which one? --node alpha or --node beta"
        assert (said.stdout, said.stderr) == ("", f"hive: {why}\n")
    assert "which one? --node alpha or" in typed(hive, "doctor", code=1).stdout
    for name in ("alpha", "beta"):
        assert node_of(hive, "--node", name) == name
        assert node_of(hive, HIVE_NODE=name) == name
        assert node_of(hive, HIVE_CONFIG=str(hive.nodes[name].config)) == name
        assert node_of(hive, "--config", str(hive.nodes[name].config)) == name
    pair[0].stop(signal.SIGKILL)
    assert node_of(hive) == "beta"  # the dead are not asked about


def test_what_was_named_counts_before_what_runs(hive: Hive, pair: tuple[Daemon, Daemon]) -> None:
    alpha, beta = pair
    beta.start()
    assert node_of(hive, "--config", str(alpha.config), HIVE_NODE="beta") == "alpha"
    assert node_of(hive, HIVE_CONFIG=str(alpha.config)) == "alpha"
    assert node_of(hive, "--node=beta", HIVE_CONFIG=str(alpha.config)) == "beta"
    assert node_of(hive, HIVE_NODE="gamma", HIVE_CONFIG=str(alpha.config)) == "gamma"
    assert (
        "HIVE_NODE: 'a b' is not a name"
        in typed(hive, "status", code=2, environment={"HIVE_NODE": "a b"}).stderr
    )


def test_what_its_command_line_said_counts_for_commands_too(
    hive: Hive, pair: tuple[Daemon, Daemon]
) -> None:
    """hive.py daemon --node mini --host broker.lan, without a file, as the README shows it."""
    with daemon_of(hive, "--node=mini", f"--port={hive.broker.port}", f"--prefix={hive.prefix}"):
        eventually("it is announced", lambda: node_of_nobody(hive) == "mini")
        shown = typed(hive, "config").stdout
        assert f"port = {hive.broker.port}" in shown and "# the daemon that runs" in shown
        eventually("it is connected", lambda: not plain(hive, "status").returncode)
        sent = typed(hive, "send", "--to=mini", "--ch=status", "--text=x").stdout
        assert f" -> {hive.prefix}/mini/status" in sent
        assert json.loads(typed(hive, "status", "--json").stdout)[0]["name"] == "mini"


@contextlib.contextmanager
def daemon_of(hive: Hive, *arguments: str) -> Iterator[None]:
    with hive.spawn(
        [*hive.program, "daemon", *arguments],
        stderr=subprocess.DEVNULL,
        env=hive.environment,
        cwd=hive.home,
    ) as process:
        try:
            yield
        finally:
            process.terminate()


def test_two_of_one_name_are_told_apart_by_their_files(hive: Hive, tmp_path: Path) -> None:
    alpha = hive.node("alpha").start()
    other = tmp_path / "other.toml"
    text = alpha.config.read_text().replace(hive.prefix, f"{hive.prefix}-other")
    other.write_text(text.replace('"state"', f'"{tmp_path}/elsewhere"'))
    with daemon_of(hive, f"--config={other}"):
        said = eventually(
            "both are announced",
            lambda: plain(hive, "--node=alpha", "config").stderr,
        )
        assert "2 daemons called alpha run here; which one? name its --config: " in said
        assert str(other) in said and str(alpha.config) in said
        both = {"HIVE_NODE": "alpha", "HIVE_CONFIG": str(other)}
        named = typed(hive, "config", environment=both).stdout
        assert f"# from {other}\n" in named


def plain(hive: Hive, *arguments: str) -> subprocess.CompletedProcess[str]:
    line: Sequence[str] = [*hive.program, *arguments]
    return hive.run(line, capture_output=True, text=True, env=hive.environment)


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where daemons say that they run."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = tmp_path / "hive" / module.RUNNING
    folder.mkdir(parents=True, mode=0o700)
    return folder


def test_what_others_could_have_written_is_not_believed(running: Path) -> None:
    said = json.dumps(["alpha", None, {}])
    lock = module.FileLock(running / "alpha-1")
    with contextlib.closing(lock):
        lock.write(said)
        assert [one.node for one in module.running_daemons()] == ["alpha"]
        running.chmod(0o777)
        assert module.running_daemons() == []
        if os.geteuid() == 0:
            running.chmod(0o700)
            os.chown(running, 12345, 12345)
            assert module.running_daemons() == []
            os.chown(running, 0, 0)
        running.chmod(0o700)
    assert module.running_daemons() == []  # it has ended


@pytest.mark.parametrize(
    "said",
    [
        "",
        "{",
        "[]",
        "null",
        '["alpha", null]',
        '["a b", null, {}]',
        '["alpha", 7, {}]',
        '["alpha", null, {"mqtt.nosuch": 1}]',
        '["alpha", null, {"mqtt.port": "x"}]',
        '["alpha", null, []]',
        "[" * 5000,
        "x" * 10_000,
    ],
)
def test_what_makes_no_sense_is_passed_over(running: Path, said: str) -> None:
    with (
        contextlib.closing(module.FileLock(running / "1")) as wrong,
        contextlib.closing(module.FileLock(running / "2")) as right,
    ):
        wrong.write(said)
        right.write('["beta", "/b.toml", {"mqtt.port": 7}]')
        (one,) = module.running_daemons()
    assert (one.node, one.file, one.said) == ("beta", "/b.toml", {"mqtt.port": 7})


def test_the_readme_shows_it(tmp_path: Path) -> None:
    """Each line is typed as it stands there, and says what stands there."""
    machine = Machine(tmp_path / "home")
    machine.environment["PS1"] = ""
    said = (ROOT / "README.md").read_text().partition("## Two nodes on one machine")[2]
    shown = said.partition("```console\n")[2].partition("```")[0]
    tools = machine.home / "bin"
    tools.mkdir()
    (tools / "hive").write_text(f'#!/bin/sh\nexec {shlex.join(machine.program)} "$@"\n')
    (tools / "hive").chmod(0o755)
    machine.environment["PATH"] = f"{tools}:{machine.environment['PATH']}"
    alpha = machine.node("alpha")
    alpha.handler("ping", (ROOT / "hive-daemon.d" / "ping").read_text())
    daemons: list[subprocess.Popen[bytes]] = []
    log = machine.home / "second.log"
    try:
        alpha.start()
        for line, expected in re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", shown, re.M):
            if line.endswith("&"):
                shell = ["sh", "-c", f"exec {line[:-1]} 2>{log}"]
                daemons.append(subprocess.Popen(shell, env=machine.environment))
                eventually("it is up", lambda: log.exists() and "=connected" in log.read_text())
                continue
            done = subprocess.run(
                ["sh", "-c", line], capture_output=True, text=True, env=machine.environment
            )
            assert not expected or done.stdout + done.stderr == expected
        assert len(daemons) == 1
    finally:
        for one in daemons:
            one.terminate()
            one.wait(PATIENCE)
        machine.close()
