"""The command line as a person, a script or a confused language model uses it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
from conftest import (
    PATIENCE,
    ROOT,
    Broker,
    Daemon,
    Hive,
    calls_of,
    eventually,
    free_port,
    need_mosquitto,
)
from paho.mqtt import publish

import hive as module
from hive import Envelope, write_answer


def run(
    *arguments: str, cwd: Path, stdin: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it in an empty home."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HIVE_")}
    return subprocess.run(
        [sys.executable, str(ROOT / "hive-cli"), *arguments],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=clean | {"HOME": str(cwd)} | (env or {}),
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["send", "--to", "a/b", "--text", "x"],
            "argument --to: 'a/b' is not a name, all, any, any:TAG, tag:TAG, or a pattern as in"
            " 'web-*'; see: hive-cli send --help",
        ),
        (
            ["send", "--to", "beta", "--text", ""],
            "text: '' is not a text: Unicode, not empty, at most 256 KiB of UTF-8",
        ),
        (
            ["send", "--to", "beta", "--text", "x", "--wait", "soon"],
            "argument --wait: 'soon' is not seconds, above 0 and at most a year;"
            " see: hive-cli send --help",
        ),
        (
            ["send", "--to", "beta", "--text", "x", "--ttl", "-1"],
            "argument --ttl: '-1' is not seconds, a whole number from 0; see: hive-cli send --help",
        ),
        (
            ["reply", "--to-msg", "-", "--text", "-"],
            "--to-msg and --text cannot both be read from stdin",
        ),
        (
            ["reply", "--to-msg", "no/such.json", "--text", "x"],
            "--to-msg 'no/such.json': neither JSON nor a file: No such file or directory",
        ),
        (["reply", "--to-msg", '{"v": 1}', "--text", "x"], "id: missing"),
        (["reply", "--to-msg", "{", "--text", "x"], "payload: not JSON: '{'"),
        (["--config", "nope.toml", "status"], "'nope.toml': no such file (named by --config)"),
        (["status", "--log-level", "loud"], None),
        (["sned"], None),
        (["send", "--to", "beta"], None),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(
    tmp_path: Path, arguments: list[str], error: str | None
) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("hive: ") and done.stderr.count("\n") == 1
    assert error is None or done.stderr == f"hive: {error}\n"


def test_without_arguments_it_explains_itself_and_exits_2(tmp_path: Path) -> None:
    done = run(cwd=tmp_path)
    assert done.returncode == 2 and all(name in done.stderr for name in module.COMMANDS)


@pytest.mark.parametrize("name", module.COMMANDS)
def test_every_command_has_help_that_shows_its_options_and_an_example_that_parses(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        module.main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    options = module.COMMANDS[name].options
    assert all(
        (flags[-1] if flags[-1][0] == "-" else how["help"][:20]) in shown for flags, how in options
    )


def test_the_version_has_the_files_own_hash(tmp_path: Path) -> None:
    import hashlib

    digits = hashlib.sha256((ROOT / "hive.py").read_bytes()).hexdigest()[:8]
    assert run("--version", cwd=tmp_path).stdout == f"hive {module.__version__} ({digits})\n"


@pytest.mark.parametrize("before", [True, False])
def test_config_may_stand_before_or_after_the_command(tmp_path: Path, before: bool) -> None:
    (tmp_path / "my.toml").write_text('[node]\nid = "fromfile"\n')
    where = ["--config", "my.toml"]
    done = run(*(where if before else []), "config", *([] if before else where), cwd=tmp_path)
    assert 'id = "fromfile"' in done.stdout and done.returncode == 0


def test_an_unreachable_broker_is_one_line_and_exit_3(tmp_path: Path) -> None:
    port = str(free_port())
    for command in (["status"], ["roster"], ["send", "--to", "a", "--text", "x"]):
        done = run("--port", port, *command, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr == (
            f"hive: broker localhost:{port}: Connection refused;"
            " is a broker running there? mosquitto is one\n"
        )


def test_ctrl_c_while_the_broker_says_nothing_exits_130_without_a_word(tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    child = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "hive-cli"),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "status",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"HOME": str(tmp_path)},
        cwd=tmp_path,
    )
    connection, _ = listener.accept()
    assert connection.recv(1024)
    child.send_signal(signal.SIGINT)
    assert (child.communicate(timeout=PATIENCE), child.returncode) == ((b"", b""), 130)
    connection.close()
    listener.close()


def test_a_daemon_without_a_broker_ends_at_once_when_told(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        child = subprocess.Popen(
            [sys.executable, str(ROOT / "hive-cli"), "daemon", "--port", str(free_port())],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"HOME": str(tmp_path)},
            cwd=tmp_path,
        )
        assert child.stderr
        for line in child.stderr:
            if "no broker, trying again" in line:
                break
        child.send_signal(number)
        assert child.wait(PATIENCE) == 0
        assert "Traceback" not in child.stderr.read()
        child.stderr.close()


def test_a_closed_pipe_is_no_complaint(hive: Hive) -> None:
    hive.node("alpha").start()
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        hive.command_line("alpha", "status"),
        stdout=writing,
        stderr=subprocess.PIPE,
        env=hive.environment,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_send_says_so_once_the_broker_has_acknowledged_it(hive: Hive) -> None:
    hive.node("alpha").start()
    sent = hive.cli("alpha", "send", "--to", "alpha", "--ch", "status", "--text", "x")
    word, id, arrow, topic = sent.stdout.split()
    assert (word, arrow, topic, sent.stderr) == ("sent", "->", f"{hive.prefix}/alpha/status", "")
    hive.nodes["alpha"].logged("received", id=id)
    shown = json.loads(hive.cli("alpha", "send", "--to", "alpha", "--text", "y", "--json").stdout)
    assert shown["text"] == "y" and shown["from"] == "alpha"


def test_a_name_that_nobody_has_is_said_at_once_even_when_waiting(hive: Hive) -> None:
    hive.node("alpha").start()
    sent = hive.cli("alpha", "send", "--to", "betta", "--text", "x")
    assert sent.stderr == (
        f"hive: nobody listens on {hive.prefix}/betta/command; who is there: hive status\n"
    )
    waited = hive.cli("alpha", "send", "--to", "betta", "--text", "x", "--wait", "1000", code=4)
    assert waited.stderr == (
        f"hive: nobody listens on {hive.prefix}/betta/command;"
        " no node or agent betta has been seen, is it spelled right?\n"
    )


def test_to_all_says_who_kept_silent_and_prints_the_others(hive: Hive) -> None:
    for name in ("alpha", "beta"):
        node = hive.node(name)
        script = "echo here" if name == "alpha" else "exec sleep 60"
        node.handler("count", f"#!/bin/sh\n{script}\n")
        node.start()
    done = hive.cli(
        "alpha", "send", "--to", "all", "--action", "count", "--text", "x", "--wait", "2", code=4
    )
    assert done.stdout == "alpha: here\n"
    assert done.stderr == "hive: no answer from beta in 2 s\n"


def test_texts_come_from_stdin_and_answers_go_out_as_json(hive: Hive) -> None:
    alpha = hive.node("alpha")
    alpha.handler("size", "#!/bin/sh\nwc -c\n")
    alpha.start()
    large = "ü" * (128 * 1024)
    arguments = [
        "send",
        "--to",
        "alpha",
        "--action",
        "size",
        "--wait",
        "20",
        "--json",
        "--text",
        "-",
    ]
    answer = json.loads(hive.cli("alpha", *arguments, stdin=large + "\n").stdout)
    assert int(answer["text"]) > 256 * 1024 and answer["ch"] == "response"
    refused = hive.cli("alpha", *arguments, stdin=large + "üü", code=2)
    assert refused.stderr.startswith("hive: ") and refused.stderr.count("\n") == 1


def test_reply_takes_an_envelope_as_it_is_from_a_file_or_from_stdin(
    hive: Hive, tmp_path: Path
) -> None:
    alpha, beta = hive.node("alpha").start(), hive.node("beta")
    beta.handler("keep", f"#!/bin/sh\ncat > {tmp_path}/message\nexit 1\n")
    beta.start()
    hive.cli("alpha", "send", "--to", "beta", "--action", "keep", "--text", "question")
    beta.logged("handler ended")
    question = json.loads((tmp_path / "message").read_text())

    hive.cli("beta", "reply", "--to-msg", json.dumps(question), "--text", "one")
    hive.cli("beta", "reply", "--to-msg", f"{tmp_path}/message", "--text", "two")
    hive.cli("beta", "reply", "--to-msg", "-", "--text", "three", stdin=json.dumps(question))

    eventually("three answers", lambda: len(alpha.events("received", ch="response")) == 3)
    texts = [row["text"] for row in alpha.events("text")]
    assert texts[-3:] == ["one", "two", "three"]


def test_an_argument_that_is_not_utf_8_is_sent_with_a_mark(hive: Hive) -> None:
    alpha = hive.node("alpha")
    alpha.handler("say", "#!/bin/sh\nexec cat\n")
    alpha.start()
    shown = hive.cli("alpha", "send", "--to", "alpha", "--ch", "status", "--text", "a\udcff")
    assert alpha.logged("text", id=shown.stdout.split()[1])["text"] == "a\ufffd"
    tested = hive.cli("alpha", "handler", "test", "say", "--text", "a\udcff")
    assert json.loads(tested.stdout)["text"] == "a\ufffd"
    message = '{"v": 1, "id": "m-1", "ts": 1, "from": "alpha", "to": "beta", "ch": "command",'
    message += ' "urgency": "now", "text": "a\udcff"}'
    reply = ["reply", "--to-msg", message, "--text", "b\udcff", "--json"]
    assert json.loads(hive.cli("alpha", *reply).stdout)["text"] == "b\ufffd"


def seen_on_a_terminal(hive: Hive, line: list[str]) -> bytes:
    """What a command writes where stdout is a terminal."""
    parent, child = pty.openpty()
    seen = bytearray()

    def read() -> None:
        try:
            while data := os.read(parent, 1024):
                seen.extend(data)
        except OSError:
            pass

    reader = threading.Thread(target=read)
    reader.start()
    subprocess.run(line, stdout=child, env=hive.environment, check=True)
    os.close(child)
    reader.join(PATIENCE)
    os.close(parent)
    return bytes(seen)


def test_a_peers_answer_cannot_drive_the_terminal(hive: Hive) -> None:
    alpha = hive.node("alpha")
    alpha.handler("evil", "#!/bin/sh\nprintf '\\033[2Jgone\\nnext'\n")
    alpha.start()
    line = hive.command_line("alpha", "send", "--to", "alpha", "--action", "evil", "--text", "x")
    seen = seen_on_a_terminal(hive, [*line, "--wait", "20"])
    assert b"\\x1b[2Jgone\r\nnext" in seen and b"\x1b" not in seen


def test_json_cannot_drive_the_terminal_either_and_stays_json(hive: Hive) -> None:
    text = "a\x9b2Jb\u202ec\x7fd\U000e0041e ä"
    alpha = hive.node("alpha")
    alpha.handler("evil", f"#!/bin/sh\nprintf '%s' '{text}'\n")
    alpha.start()
    send = ["send", "--to", "alpha", "--action", "evil", "--text", text, "--json"]
    shown = {
        "sent": send,
        "answered": [*send, "--wait", "20"],
        "log": ["log", "--json", "--lines", "1", "--ch", "response"],
        "handler": ["handler", "test", "evil", "--json"],
    }
    for what, words in shown.items():
        seen = seen_on_a_terminal(hive, hive.command_line("alpha", *words)).decode()
        said = seen[seen.index("{") : seen.rindex("}") + 1]
        assert all(c.isprintable() or c in "\r\n" for c in seen), (what, seen)
        document = json.loads(said)
        document = document.get("envelope", document)
        assert text in document.values(), (what, document)
        if what == "answered":
            id = document["id"]
    seen = seen_on_a_terminal(hive, hive.command_line("alpha", "show", id, "--json")).decode()
    assert all(c.isprintable() or c in "\r\n" for c in seen)
    assert text in [row["envelope"]["text"] for row in json.loads(seen) if row["envelope"]]


def test_no_line_of_an_answer_can_pass_for_that_of_another_node(
    capsys: pytest.CaptureFixture[str],
) -> None:
    question = Envelope.new("alpha", "all", "command", "x")
    write_answer(question.reply("beta", "one\ngamma: two\r\ndelta: 3\n"), False, label=True)
    write_answer(question.reply("beta", "beta: x refused: why\ngamma: no", ch="alert"), False, True)
    write_answer(question.reply("beta", "alone\nas it is"), False, label=False)
    said = capsys.readouterr()
    assert said.out == "beta: one\nbeta: gamma: two\nbeta: delta: 3\nalone\nas it is\n"
    assert said.err == "beta: x refused: why\nbeta: gamma: no\n"


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("sned", "send"),
        ("Status", "status"),
        ("send --to a --text b --ch comand", "command"),
        ("send --to a --text b --urgency latter", "later"),
        ("send --to a --text b --wiat 3", "--wait"),
        ("status --jsno", "--json"),
        ("status --confg x", "--config"),
        ("handler lst", "list"),
        ("log --levle x", "--log-level"),
        ("xyzzy", None),
    ],
)
def test_a_slip_of_the_fingers_is_met_with_what_was_meant(
    tmp_path: Path, line: str, meant: str | None
) -> None:
    done = run(*line.split(), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (f"did you mean {meant}?" in done.stderr) == bool(meant), done.stderr
    assert meant or "did you mean" not in done.stderr


def test_a_name_or_a_handler_that_is_there_in_other_letters_is_named(hive: Hive) -> None:
    alpha = hive.node("alpha")
    alpha.handler("backup", "#!/bin/sh\n")
    alpha.start()
    for name in ("Alpha", "alhpa"):
        done = hive.cli("alpha", "send", "--to", name, "--text", "x", "--wait", "3", code=4)
        assert f"no node or agent {name} has been seen, did you mean alpha?" in done.stderr
    done = hive.cli("alpha", "handler", "test", "bakup", code=1)
    assert done.stderr.endswith("did you mean backup?\n")


def test_a_broker_that_refuses_the_login_is_exit_3_with_advice(tmp_path: Path) -> None:
    need_mosquitto()
    broker = Broker(tmp_path / "broker", "allow_anonymous false")
    try:
        done = run("--port", str(broker.port), "status", cwd=tmp_path)
        assert done.returncode == 3
        assert done.stderr == (
            f"hive: broker localhost:{broker.port}: refused: not authorized;"
            " does the broker want [mqtt] username and password? else see its ACL\n"
        )
    finally:
        broker.stop()


def test_a_password_that_others_may_read_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "hive.toml").write_text('[mqtt]\nusername = "a"\npassword = "hunter2"\n')
    (tmp_path / "hive.toml").chmod(0o644)
    done = run("config", "--config", "hive.toml", cwd=tmp_path)
    assert done.stderr == (
        "hive: warning: hive.toml: holds a secret and others may read it;"
        " try: chmod 600 hive.toml\n"
    )
    assert "hunter2" not in done.stdout and 'password = "***"' in done.stdout


def test_a_hive_without_nodes_says_how_to_start_one(hive: Hive) -> None:
    hive.node("alpha")
    done = hive.cli("alpha", "status")
    assert done.stdout == "" and "start one with: hive daemon" in done.stderr
    assert json.loads(hive.cli("alpha", "roster", "--json").stdout) == []


def test_handler_list_shows_what_was_found_and_what_was_refused(hive: Hive) -> None:
    alpha = hive.node("alpha", "[handlers.ping]\ntimeout = 5\nworkers = 2\n")
    alpha.handler("ping", "#!/bin/sh\necho pong\n")
    alpha.handler("open", "#!/bin/sh\n").chmod(0o777)
    lines = hive.cli("alpha", "handler", "list").stdout.splitlines()
    assert lines[1].split() == ["ping", "5s", "2", "all", str(alpha.handlers.resolve() / "ping")]
    assert lines[2] == "refused: open: is writable by everyone; try: chmod o-w"
    shown = json.loads(hive.cli("alpha", "handler", "list", "--json").stdout)
    assert list(shown["handlers"]) == ["ping"] and list(shown["refused"]) == ["open"]


def test_handler_test_runs_one_as_the_daemon_would(hive: Hive) -> None:
    alpha = hive.node("alpha", "[handlers.slow]\ntimeout = 0.3\n")
    alpha.handler("who", '#!/bin/sh\necho "$HIVE_FROM $HIVE_ACTION $PWD"; grep -o hello\n')
    alpha.handler("fail", "#!/bin/sh\necho why >&2\nexit 3\n")
    alpha.handler("slow", "#!/bin/sh\nsleep 60 & sleep 60\n")
    arguments = ["handler", "test", "who", "--text", "hello", "--from", "mini"]
    done = hive.cli("alpha", *arguments)
    assert done.stdout == f"mini who {alpha.handlers.resolve()}\nhello\n"
    assert done.stderr.startswith("ok, exit 0, ") and done.stderr.endswith(" ms\n")
    failed = hive.cli("alpha", "handler", "test", "fail", code=1)
    assert failed.stderr.startswith("error, exit 3, ") and failed.stderr.endswith("exit 3: why\n")
    late = hive.cli("alpha", "handler", "test", "slow", code=1)
    assert late.stderr.endswith("took longer than 0.3 s and was ended\n")
    result = json.loads(hive.cli("alpha", *arguments, "--json").stdout)
    assert (result["status"], result["action"], result["from"]) == ("ok", "who", "mini")
    missing = hive.cli("alpha", "handler", "test", "nope", code=1)
    assert missing.stderr == f"hive: {alpha.handlers.resolve()}/nope: No such file or directory\n"
    unnamed = hive.cli("alpha", "handler", "test", code=2)
    assert unnamed.stderr == "hive: handler test: which one? there are: fail, slow, who\n"


def test_a_message_is_shown_and_answered_by_its_id(hive: Hive, fast_agent: Path) -> None:
    alpha = hive.node("alpha").start()
    beta = hive.node("beta", f'[[oc_instances]]\nname = "main"\nopenclaw_cmd = "{fast_agent}"\n')
    beta.start()
    text = "lang " * 10_000 + "Ende"
    id = hive.cli("alpha", "send", "--to", "beta", "--text", "-", stdin=text).stdout.split()[1]
    beta.logged("agent woken", id=id)
    (call,) = calls_of(fast_agent)
    assert f"[cut; all 50004 characters: hive show {id}]" in call["argv"][3]

    rows = json.loads(hive.cli("beta", "show", id, "--json").stdout)
    (received, told) = (row for row in rows if not row["note"].startswith(module.RECEIPT_NOTE))
    assert (received["envelope"]["text"], received["from"]) == (text, "alpha")
    assert (told["event"], told["note"]) == ("did", "told main")
    story = hive.cli("beta", "show", id).stdout.splitlines()
    assert story[0].endswith(" in: command from alpha to beta")
    assert story[1:3] == [f"  id {id}", f"  | {text}"]
    assert story[3].endswith(" did: told main")
    hive.cli("beta", "reply", "--to-msg", id, "--text", "verstanden")
    answer = alpha.logged("received", ch="response")
    assert alpha.logged("text", id=answer["id"])["text"] == "verstanden"
    shown = hive.cli("beta", "log").stdout.splitlines()[0].split()[5]
    assert shown == id[:8], "what log prints, show and reply take"
    assert hive.cli("beta", "show", shown).stdout.splitlines()[1] == f"  id {id}"
    assert len(hive.cli("beta", "log", "--corr", shown).stdout.splitlines()) == 3
    whole = hive.cli("beta", "reply", "--to-msg", shown, "--text", "kurz", "--json")
    assert json.loads(whole.stdout)["replyTo"] == id
    for command in (["show", "no-such-id"], ["reply", "--text", "x", "--to-msg", "no-such-id"]):
        unknown = hive.cli("beta", *command, code=1).stderr
        assert unknown == "hive: no-such-id: not known here; the last days are: hive log\n"
    beta.stop()
    late = hive.cli("beta", "reply", "--to-msg", id, "--text", "x")
    assert late.stdout.startswith("sent ")
    alpha.logged("text", text="x")


def test_a_few_characters_of_an_id_are_the_exchange_of_the_next_message(hive: Hive) -> None:
    alpha = hive.node("alpha").start()

    def send(*more: str, code: int = 0) -> dict[str, Any]:
        line = ("send", "--to=attic", "--ch=status", "--text=x", "--json", *more)
        done = hive.cli("alpha", *line, code=code)
        return json.loads(done.stdout) if done.stdout else {"error": done.stderr}

    first = send()
    assert send("--corr", first["id"][:6])["corr"] == first["id"]
    second = send("--corr", first["id"])
    assert send("--corr", second["id"][:8])["corr"] == first["id"]  # any id of it
    assert send("--corr", second["id"][:8], "--direct")["corr"] == first["id"]
    for id in ("night-1", "night-2", "new"):
        assert send("--corr", id)["corr"] == id  # nobody knows it yet
    error = "hive: --corr night: which one? night-1, night-2\n"
    assert send("--corr", "night", code=2) == {"error": error}
    alpha.stop()
    assert send("--corr", first["id"][:6])["corr"] == first["id"]
    assert send("--corr", "night", code=2) == {"error": error}
    shutil.rmtree(alpha.home / "state")
    assert send("--corr", first["id"][:6])["corr"] == first["id"][:6]


# The journal, and the door to it


def test_a_message_is_taken_with_the_broker_away_and_goes_out_when_it_is_back(
    hive_of: Callable[..., Hive], own_broker: Broker
) -> None:
    hive = hive_of(own_broker)
    hive.node("alpha").start()
    beta = hive.node("beta").start()
    own_broker.stop()
    hive.nodes["alpha"].logged("no broker, trying again")
    done = hive.cli("alpha", "send", "--to", "beta", "--text", "late")
    assert re.fullmatch(r"queued [0-9a-f-]{36}, no broker at the moment\n", done.stdout)
    waiting = hive.cli("alpha", "pending").stdout
    assert done.stdout.split()[1][:8] in waiting and "late" in waiting
    assert "NOT DELIVERED" in waiting and f"{hive.prefix}/beta/command" in waiting
    own_broker.start()
    assert beta.logged("text")["text"] == "late"
    eventually(
        "it is no longer pending",
        lambda: "NOT DELIVERED" not in hive.cli("alpha", "pending").stdout,
    )


def test_sending_through_the_daemon_needs_neither_paho_nor_a_broker_of_its_own(
    hive: Hive, tmp_path: Path
) -> None:
    alpha = hive.node("alpha").start()
    hive.node("beta").start()
    other = tmp_path / "other.toml"
    other.write_text(
        alpha.config.read_text()
        .replace(f"port = {hive.broker.port}", f"port = {free_port()}\nhost = 'no.such.host'")
        .replace('"state"', f'"{alpha.home}/state"')
    )
    done = subprocess.run(  # -I -S: no paho-mqtt can be imported
        [
            *(sys.executable, "-I", "-S", str(ROOT / "hive-cli"), "--config", str(other)),
            *("send", "--to", "beta", "--ch", "status", "--text", "from inside"),
        ],
        capture_output=True,
        text=True,
        env=hive.environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("sent ")
    assert hive.nodes["beta"].logged("text")["text"] == "from inside"


def test_direct_means_without_the_daemon(hive: Hive, fast_agent: Path) -> None:
    alpha = hive.node("alpha").start()
    hive.node("beta", f'[[oc_instances]]\nname = "main"\nopenclaw_cmd = "{fast_agent}"\n').start()
    hive.cli("alpha", "send", "--direct", "--to", "beta", "--text", "x")
    assert alpha.events("sent") == []
    row, *receipts = json_lines(hive.cli("alpha", "log", "--json").stdout)
    assert (row["event"], row["to"], row["envelope"]["text"]) == ("out", "beta", "x")
    assert {one["note"] for one in receipts} <= {"receipt: received", "receipt: told main"}


def test_another_nodes_daemon_sends_nothing_in_our_name(hive: Hive) -> None:
    alpha = hive.node("alpha").start()
    done = hive.cli("alpha", "--node", "mallory", "send", "--to", "alpha", "--text", "x", code=1)
    assert (
        done.stderr == "hive: the daemon of mallory: this is the daemon of alpha, not of mallory\n"
    )
    assert alpha.events("received", ch="command") == []


def test_a_daemon_that_does_not_answer_is_gone_round(hive: Hive) -> None:
    alpha, beta = hive.node("alpha").start(), hive.node("beta").start()
    os.kill(alpha.pid, signal.SIGSTOP)
    try:
        done = hive.cli("alpha", "send", "--to", "beta", "--text", "x")
    finally:
        os.kill(alpha.pid, signal.SIGCONT)
    assert done.stdout.startswith("sent ")
    assert "the daemon of alpha" in done.stderr and "sending directly" in done.stderr
    hive.cli("alpha", "send", "--to", "beta", "--text", "afterwards")
    beta.logged("text", text="afterwards")
    assert [row["text"] for row in beta.events("text")].count("x") == 1


def test_what_the_broker_refuses_is_said_and_exit_3(
    hive_of: Callable[..., Hive], tmp_path: Path
) -> None:
    need_mosquitto()
    acl = tmp_path / "acl"
    acl.write_text("topic read #\ntopic write +/meta/#\ntopic write +/all/#\n")
    broker = Broker(tmp_path / "broker", "allow_anonymous true", f"acl_file {acl}")
    try:
        hive = hive_of(broker)
        hive.node("alpha").start()
        done = hive.cli("alpha", "send", "--to", "beta", "--text", "x", code=3)
        assert "refused to publish: not authorized" in done.stderr
        (_, did) = json_lines(hive.cli("alpha", "log", "--json").stdout)
        assert did["note"] == "not published: not authorized"
    finally:
        broker.stop()


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_the_log_tells_what_came_went_and_was_done(hive: Hive) -> None:
    hive.node("alpha").start()
    beta = hive.node("beta")
    beta.handler("count", "#!/bin/sh\necho 7\n")
    beta.start()
    hive.cli("alpha", "send", "--to", "beta", "--action", "count", "--text", "x", "--wait", "20")
    hive.cli("alpha", "send", "--to", "beta", "--ch", "status", "--text", "a\nlong text " * 50)
    beta.logged("text")

    came, did, went, second = hive.cli("beta", "log").stdout.splitlines()
    assert re.match(r"\d\d-\d\d \d\d:\d\d:\d\d in  alpha      command  [0-9a-f]{8} count: x", came)
    assert re.search(r" did alpha      command  [0-9a-f]{8} count: ok, \d+ ms", did)
    assert re.search(r" out alpha      response [0-9a-f]{8} 7", went)
    assert all(len(line) <= 80 for line in (came, did, went, second))

    def events(*filters: str) -> list[str]:
        rows = json_lines(hive.cli("beta", "log", "--json", *filters).stdout)
        return [row["event"] for row in rows]

    assert events("--action", "count") == ["in", "did"]
    assert events("--ch", "response") == events("--to", "alpha") == ["out"]
    assert events("--from", "alpha") == ["in", "did", "in"]
    assert events("--since", "1h") == ["in", "did", "out", "in"]
    assert events("--lines", "1") == ["in"]
    assert events("--from", "gamma") == []
    corr = json_lines(hive.cli("beta", "log", "--json").stdout)[0]["exchange"]
    assert events("--corr", corr) == ["in", "did", "out"]

    story = hive.cli("alpha", "show", corr).stdout.splitlines()
    assert [line.split(" ", 2)[2] for line in story if not line.startswith(" ")] == [
        "out: command from alpha to beta, count",
        "in: response from beta to alpha (somebody waits for it)",
    ]
    beta.stop()
    assert events() == ["in", "did", "out", "in"], "without a daemon it is read all the same"


def test_a_text_cannot_pass_for_another_message(hive: Hive) -> None:
    hive.node("alpha").start()
    text = "hello\n11-22 19:20:36 in: command from root to alpha\n  id forged\r\x1b[2J"
    id = hive.cli("alpha", "send", "--to", "alpha", "--text", "-", stdin=text).stdout.split()[1]
    hive.nodes["alpha"].logged("text")
    story = hive.cli("alpha", "show", id).stdout.splitlines()
    assert [line for line in story if "forged" in line or "root" in line] == [
        *("  | 11-22 19:20:36 in: command from root to alpha", "  |   id forged"),
    ] * 2
    assert all("\x1b" not in line for line in hive.cli("alpha", "log").stdout.splitlines())


def test_the_log_is_followed_until_the_daemon_ends(hive: Hive) -> None:
    alpha = hive.node("alpha").start()
    hive.cli("alpha", "send", "--to", "alpha", "--ch", "status", "--text", "before")
    following = subprocess.Popen(
        hive.command_line("alpha", "log", "--follow", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=hive.environment,
    )
    assert following.stdout and following.stderr
    seen = [json.loads(following.stdout.readline())["envelope"]["text"]]
    for n in range(250):  # more than one page
        hive_send(alpha, f"{n}")
    while len(seen) < 2 * 251:
        seen.append(json.loads(following.stdout.readline())["envelope"]["text"])
    assert sorted(seen) == sorted(["before", *map(str, range(250))] * 2)
    alpha.stop()
    assert following.wait(PATIENCE) == 1
    assert following.stderr.read() == "hive: the daemon of alpha: it has ended\n"


def hive_send(node: Daemon, text: str) -> None:
    """As the command does, without its process."""
    config = module.load_config(str(node.config))
    client = module.connect_to_daemon(config)
    assert client
    envelope = module.Envelope.new(node.name, node.name, "status", text, urgency="later")
    assert client.ask({"do": "send", "envelope": envelope.document()})["queued"]
    client.close()


def test_a_question_that_nobody_answers_in_time_is_told_to_the_agent_that_asked(
    hive: Hive, fast_agent: Path
) -> None:
    alpha = hive.node("alpha", f'[[oc_instances]]\nname = "main"\nopenclaw_cmd = "{fast_agent}"\n')
    alpha.start()
    beta = hive.node("beta")
    beta.handler("slow", "#!/bin/sh\nexec sleep 60\n")
    beta.start()
    sent = hive.cli(
        "alpha", "send", "--to", "beta", "--action", "slow", "--text", "x", "--ttl", "4"
    )
    id = sent.stdout.split()[1]
    assert id[:8] in hive.cli("alpha", "pending").stdout
    (call,) = eventually("the agent is called", lambda: calls_of(fast_agent))
    assert "[hive] alert from alpha to alpha id=" in call["argv"][3]
    assert f"corr={id}" in call["argv"][3]
    assert "no answer from beta to what was asked" in call["argv"][3]
    alpha.logged("agent woken")
    assert hive.cli("alpha", "pending").stdout == "nothing is pending\n"


def test_nothing_to_look_back_on_is_said(tmp_path: Path) -> None:
    for command in (["log"], ["pending"], ["show", "x"]):
        done = run("--node", "alpha", *command, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("hive: no daemon of alpha has run here yet (nothing in ")
    done = run("--node", "alpha", "log", "--follow", cwd=tmp_path)
    assert done.returncode == 1 and "nothing to follow" in done.stderr


# Every wait is bounded by what the user said

SLACK = 8.0  # seconds that Python, a loaded machine and a goodbye may take besides
ASKING = (  # everything that may have to wait, and for how long at most
    (("send", "--to", "beta", "--text", "x"), 10),
    (("send", "--to", "beta", "--text", "x", "--direct"), 10),
    (("send", "--to", "beta", "--text", "x", "--wait", "3"), 3),
    (("send", "--to", "all", "--text", "x", "--wait", "3"), 3),
    (("send", "--to", "beta", "--text", "x", "--wait", "3", "--direct"), 3),
    (("reply", "--to-msg", "{}", "--text", "y"), 10),
    (("status",), 10),
    (("roster",), 10),
    (("log",), 10),
    (("show", "m-1"), 10),
    (("pending",), 10),
)
ANSWERED = module.Envelope.new("beta", "alpha", "command", "?").encode().decode()


def ask_everything(hive: Hive, node: str) -> dict[str, tuple[int, str, str]]:
    """Run all of these, a few at once: code, stdout, stderr of each; none takes too long."""
    found: dict[str, tuple[int, str, str]] = {}

    def ask(arguments: tuple[str, ...], most: float) -> None:
        said = [ANSWERED if one == "{}" else one for one in arguments]
        begun = time.monotonic()
        done = hive.cli(node, *said, code=None)
        assert time.monotonic() - begun < most + SLACK, (arguments, done.stderr)
        found[" ".join(arguments)] = (done.returncode, done.stdout, done.stderr)

    with ThreadPoolExecutor(4) as pool:
        for asked in [pool.submit(ask, *one) for one in ASKING]:
            asked.result()
    return found


@pytest.fixture(params=["accepts and says nothing", "drops every packet"])
def silent_port(request: pytest.FixtureRequest) -> Iterator[int]:
    """A port on this machine where one waits for ever, unless one does not."""
    with socket.socket() as listener, contextlib.ExitStack() as ending:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100 if request.param.startswith("accepts") else 0)
        for _ in range(0 if request.param.startswith("accepts") else 4):  # its queue is full then
            one = ending.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_no_command_waits_for_a_silent_broker_longer_than_it_was_told(
    hive: Hive, silent_port: int
) -> None:
    hive.mqtt = f'host = "127.0.0.1"\nport = {silent_port}'
    hive.node("alpha")
    for asked, (code, out, err) in ask_everything(hive, "alpha").items():
        looks_back = asked.split()[0] in ("log", "show", "pending")
        assert (code, out) == (1 if looks_back else 3, ""), (asked, err)
        why = "has run here yet" if looks_back else rf"hive: broker 127.0.0.1:{silent_port}: .*"
        assert re.search(why, err) and err.count("\n") == 1, err


def test_no_command_waits_for_a_silent_daemon_longer_than_it_was_told(hive: Hive) -> None:
    alpha = hive.node("alpha").start()
    hive.node("beta").start()
    os.kill(alpha.pid, signal.SIGSTOP)
    try:
        found = ask_everything(hive, "alpha")
    finally:
        os.kill(alpha.pid, signal.SIGCONT)
    for asked, (code, out, err) in found.items():
        if asked.split()[0] in ("log", "show", "pending"):
            assert (code, err) == (1, "hive: the daemon of alpha: it does not answer\n"), asked
        elif "--to all" in asked:
            assert code == 4 and "no node that is online has an agent" in err, (asked, err)
        elif "--wait" in asked:
            assert code == 1 and "refused: there is no agent to tell" in err, (asked, err)
        else:
            assert code == 0 and out, (asked, err)
            assert "--direct" in asked or "it does not answer; " in err, (asked, err)


def test_a_daemon_and_a_broker_that_are_both_silent_are_given_up_in_time(
    hive_of: Callable[..., Hive], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hive = hive_of(Broker(tmp_path / "broker", start=False))
        hive.mqtt = f'host = "127.0.0.1"\nport = {listener.getsockname()[1]}'
        alpha = hive.node("alpha").start(wait=False)
        eventually("its door is open", lambda: (alpha.home / "state" / "door").exists())
        os.kill(alpha.pid, signal.SIGSTOP)
        try:
            found = ask_everything(hive, "alpha")
        finally:
            os.kill(alpha.pid, signal.SIGCONT)
    assert {code for code, _, _ in found.values()} == {1, 3}


def names_in(table: str) -> list[str]:
    """The first words of a table's rows, which stand below its header."""
    words = [(line.split() or [""])[0] for line in table.splitlines()]
    return words[[word in ("NAME", "NODE") for word in words].index(True) + 1 :]


class OldDaemon:
    """Something else at the control socket: answers each line with what `answer` makes of it."""

    def __init__(self, node: Daemon, answer: Callable[[dict[str, Any]], bytes]) -> None:
        folder = node.home / "state"
        folder.mkdir(mode=0o700)
        self.asked: list[Any] = []
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "door"))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                with sock, sock.makefile("rb") as lines:
                    for line in lines:
                        self.asked.append(json.loads(line)["do"])
                        sock.sendall(self._answer(json.loads(line)))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def of_another_version(request: dict[str, Any]) -> bytes:
    """What a daemon says that is older than status and roster as requests."""
    if request["do"] == "states":
        return b'{"connected": true, "states": {"alpha": {"status": "online"}}}\n'
    return json.dumps({"error": f"no such request: {request['do']!r}"}).encode() + b"\n"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (of_another_version, "it does not understand; is it of another version?"),
        (lambda request: b"{}\n", "it does not understand; is it of another version?"),
        (lambda request: b"", "it does not answer"),
    ],
    ids=["older", "nonsense", "half open"],
)
def test_what_is_no_daemon_of_this_version_is_passed_by_and_that_is_said(
    hive: Hive, answer: Callable[[dict[str, Any]], bytes], why: str
) -> None:
    hive.node("beta").start()
    daemon = OldDaemon(hive.node("alpha"), answer)
    try:
        sent = hive.cli("alpha", "send", "--to", "beta", "--text", "x")
        asked = [hive.cli("alpha", command) for command in ("status", "roster")]
    finally:
        daemon.close()
    agentless = "hive: beta has no agent: it will refuse a message without --action\n"
    assert sent.stderr == f"hive: the daemon of alpha: {why}; sending directly\n{agentless}"
    assert sent.stdout.startswith("sent ")
    hive.nodes["beta"].logged("text", text="x")
    for done in asked:
        assert done.stderr == f"hive: the daemon of alpha: {why}; asking the broker instead\n"
        assert names_in(done.stdout) == ["beta"]


def test_a_name_server_that_says_nothing_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    over = threading.Event()

    def silence(*given: object, **more: object) -> NoReturn:
        over.wait(PATIENCE)
        raise OSError("the test is over")

    monkeypatch.setattr(socket, "getaddrinfo", silence)
    begun = time.monotonic()
    arguments = ["--host", "no.such.host", "send", "--to", "beta", "--text", "x", "--wait", "2"]
    code = module.main(arguments)
    over.set()
    assert time.monotonic() - begun < 2 + SLACK
    assert code == 3 and "broker no.such.host:1883: no answer in 2 s" in capsys.readouterr().err


# The daemon's word on all nodes


def test_status_and_roster_come_from_the_daemon_without_paho(hive: Hive, tmp_path: Path) -> None:
    alpha = hive.node("alpha").start()
    beta = hive.node("beta")
    beta.handler("ping", "#!/bin/sh\necho pong\n")
    beta.start()
    shown = {}
    for command in ("status", "roster"):
        done = subprocess.run(  # -I -S: no paho-mqtt can be imported
            [
                *(sys.executable, "-I", "-S", str(ROOT / "hive-cli")),
                *("--config", str(alpha.config), command, "--json"),
            ],
            capture_output=True,
            text=True,
            env=hive.environment,
        )
        assert (done.returncode, done.stderr) == (0, "")
        shown[command] = json.loads(done.stdout)
        direct = json.loads(hive.cli("alpha", command, "--json", "--direct").stdout)
        assert [row.keys() for row in direct] == [row.keys() for row in shown[command]]
    rows = {row["name"]: row for row in shown["status"]}
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(
        ("alpha", "beta"), "online"
    )
    assert rows["beta"]["version"] and rows["beta"]["uptime_s"] >= 0
    assert {one["node"]: one["handlers"] for one in shown["roster"]} == {
        "alpha": [],
        "beta": ["ping"],
    }


def test_a_daemon_that_is_cut_off_says_so_and_what_it_knew(
    hive_of: Callable[..., Hive], own_broker: Broker
) -> None:
    hive = hive_of(own_broker)
    alpha = hive.node("alpha").start()
    hive.node("beta").start()
    eventually("both are seen", lambda: "beta" in alpha.statuses())
    own_broker.stop()
    alpha.logged("no broker, trying again")
    fault = (
        f"hive: broker localhost:{own_broker.port}: Connection refused;"
        " is a broker running there? mosquitto is one\n"
    )
    eventually("it says why", lambda: hive.cli("alpha", "status", code=3).stderr == fault)
    for command in ("status", "roster"):
        done = hive.cli("alpha", command, code=3)
        assert done.stderr == fault
        assert names_in(done.stdout)[:2] == ["alpha", "beta"]
        assert re.search(r"\nas of (\d+[smh] ?)+ ago, when the broker was lost\n$", done.stdout)
        assert len(json.loads(hive.cli("alpha", command, "--json", code=3).stdout)) == 2
        assert hive.cli("alpha", command, "--direct", code=3).stdout == ""


def test_the_hive_that_the_command_line_names_is_asked_not_that_of_the_daemon(hive: Hive) -> None:
    hive.node("alpha").start()
    assert "alpha" in hive.cli("alpha", "status").stdout
    other = hive.cli("alpha", "--prefix", "other/hive", "status")
    assert other.stdout == "" and "no node has been seen" in other.stderr
    port = free_port()
    other = hive.cli("alpha", "--port", str(port), "roster", code=3)
    assert other.stderr.startswith(f"hive: broker localhost:{port}: Connection refused")


def test_who_waits_with_the_broker_away_is_told_that_it_is_queued(
    hive_of: Callable[..., Hive], own_broker: Broker
) -> None:
    hive = hive_of(own_broker)
    alpha = hive.node("alpha").start()
    hive.node("beta").start()
    eventually("both are seen", lambda: "beta" in alpha.statuses())
    own_broker.stop()
    alpha.logged("no broker, trying again")
    done = hive.cli("alpha", "send", "--to", "beta", "--text", "x", "--wait", "0.5", code=4)
    queued, silent = done.stderr.splitlines()
    assert re.fullmatch(r"hive: queued [0-9a-f-]{36}, no broker at the moment", queued)
    assert silent.startswith("hive: no answer from beta in 0.5 s")


def test_an_answer_that_was_read_directly_does_not_wake_the_agent_and_a_later_one_does(
    hive: Hive, fast_agent: Path
) -> None:
    alpha = hive.node("alpha", f'[[oc_instances]]\nname = "main"\nopenclaw_cmd = "{fast_agent}"\n')
    alpha.start()
    beta = hive.node("beta")
    beta.handler("ping", "#!/bin/sh\necho pong\n")
    beta.start()
    arguments = ("send", "--direct", "--to", "beta", "--action", "ping", "--text", "x", "--wait")
    for _ in range(5):
        assert hive.cli("alpha", *arguments, "20").stdout == "pong\n"
    (*_, answer) = json_lines(hive.cli("alpha", "log", "--json", "--ch", "response").stdout)
    assert answer["note"] == "somebody waits for it"
    late = module.Envelope.check(answer["envelope"]).replace(id="late-1", text="later")
    publish.single(f"{hive.prefix}/alpha/response", late.encode(), qos=1, port=hive.broker.port)
    (call,) = eventually("the agent is told of the late one", lambda: calls_of(fast_agent))
    assert "later" in call["argv"][3]


# What each option does


def test_every_option_of_send_ends_up_in_the_envelope(hive: Hive) -> None:
    hive.node("alpha").start()
    said = ["--to", "all", "--ch", "sync", "--text", "-", "--action", "a-1", "--urgency", "later"]
    more = ["--ttl", "60", "--corr", "c-1", "--json"]
    envelope = json.loads(hive.cli("alpha", "send", *said, *more, stdin="two\nlines\n\n").stdout)
    assert envelope.pop("id") and abs(envelope.pop("ts") - time.time()) < PATIENCE
    assert envelope == {
        "v": 1,
        "from": "alpha",
        "to": "all",
        "ch": "sync",
        "urgency": "later",
        "text": "two\nlines\n",
        "action": "a-1",
        "corr": "c-1",
        "ttl": 60,
    }
    plain = json.loads(hive.cli("alpha", "send", "--to", "x", "--text", "y", "--json").stdout)
    assert (plain["ch"], plain["urgency"]) == ("command", "now")
    assert not {"action", "corr", "ttl"} & plain.keys()


def test_a_text_from_stdin_has_a_bound(tmp_path: Path) -> None:
    arguments = ("--port", str(free_port()), "send", "--to", "beta", "--text", "-")
    for text, code in (("x" * 256 * 1024 + "\n", 3), ("x" * (256 * 1024 + 1), 2)):
        assert run(*arguments, cwd=tmp_path, stdin=text).returncode == code
    command = [sys.executable, str(ROOT / "hive-cli"), *arguments]
    for data, why in (
        (b"ab\xffc", "stdin: not UTF-8 at byte 2"),
        (b"x" + "ä".encode() * 200_000, "stdin: more than 256 KiB"),  # cut within a letter
        ("ä".encode() * 200_000, "text: "),
    ):
        home = os.environ | {"HOME": str(tmp_path)}
        done = subprocess.run(command, input=data, capture_output=True, cwd=tmp_path, env=home)
        assert done.returncode == 2
        assert done.stderr.decode().startswith(f"hive: {why}"), done.stderr


def test_an_alert_is_an_answer_on_stderr_and_exit_1(hive: Hive) -> None:
    alpha = hive.node("alpha")
    alpha.handler("fail", "#!/bin/sh\necho why >&2\nexit 3\n")
    alpha.start()
    asked = ["send", "--to", "alpha", "--action", "fail", "--text", "x", "--wait", "20"]
    done = hive.cli("alpha", *asked, code=1)
    assert (done.stdout, done.stderr) == ("", "alpha: fail failed: exit 3: why\n")
    as_json = hive.cli("alpha", *asked, "--json", code=1)
    assert (json.loads(as_json.stdout)["ch"], as_json.stderr) == ("alert", "")


def test_an_answer_that_does_not_come_in_time_is_exit_4(hive: Hive) -> None:
    alpha = hive.node("alpha")
    alpha.handler("slow", "#!/bin/sh\nexec sleep 60\n")
    alpha.start()
    began = time.monotonic()
    asked = ["send", "--to", "alpha", "--action", "slow", "--text", "x", "--wait", "1.5"]
    done = hive.cli("alpha", *asked, code=4)
    assert (done.stdout, done.stderr) == ("", "hive: no answer from alpha in 1.5 s\n")
    assert time.monotonic() - began >= 1.5


def test_the_log_shows_the_last_hundred(hive: Hive) -> None:
    alpha = hive.node("alpha").start()
    for n in range(51):
        hive_send(alpha, f"{n}")
    eventually("all have come", lambda: len(alpha.events("received", ch="status")) == 51)

    def texts(*arguments: str) -> list[str]:
        rows = json_lines(hive.cli("alpha", "log", "--json", *arguments).stdout)
        return [row["envelope"]["text"] for row in rows]

    assert len(texts()) == 100
    assert texts("--lines", "1") == ["50"], "newest last"
    assert len(texts("--since", "1h")) == len(texts("-n", "1000")) == 102
    assert len(texts("--to", "alpha", "--ch", "status", "-n", "2")) == 2
    assert texts("--ch", "alert") == []


def test_where_there_are_no_handlers_that_is_said(hive: Hive) -> None:
    alpha = hive.node("alpha")
    assert hive.cli("alpha", "handler", "list").stdout == (
        f"no handlers in {alpha.handlers.resolve()}\n"
    )
    alpha.handler("ping", "#!/bin/sh\necho pong\n")
    lines = hive.cli("alpha", "handler", "list").stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["ACTION", "TIMEOUT", "WORKERS", "ALLOW", "FILE"],
        ["ping", "30s", "1", "all", str(alpha.handlers.resolve() / "ping")],
    ]


def test_a_handler_is_tested_with_what_it_would_find(hive: Hive) -> None:
    alpha = hive.node("alpha", '[[oc_instances]]\nname = "main"\nprofile = "work"\n')
    alpha.handler(
        "who", '#!/bin/sh\necho "$HIVE_FROM $HIVE_TO $HIVE_CH $HIVE_AGENT $HIVE_PROFILE"; cat\n'
    )
    done = hive.cli("alpha", "handler", "test", "who")
    first, message = done.stdout.splitlines()
    assert first == "alpha alpha command main work"
    assert module.Envelope.parse(message.encode()).text == "test"
    given = hive.cli("alpha", "handler", "test", "who", "--text", "-", stdin="from stdin\n").stdout
    assert module.Envelope.parse(given.splitlines()[1].encode()).text == "from stdin"
    assert "{" not in hive.cli("alpha", "handler", "list").stdout


def test_status_checks_for_monitoring_in_one_line(hive: Hive) -> None:
    alpha = hive.node("alpha", '[[schedule]]\naction = "check"\nevery = "1s"\n')
    bad = alpha.handler("check", "#!/bin/sh\n[ ! -e bad ]\n").parent / "bad"
    none = hive.cli("alpha", "status", "--check", code=1)
    assert none.stdout == "" and "no node has been seen" in none.stderr
    alpha.start()
    beta = hive.node("beta").start()
    alpha.logged("peer is up", peer="beta")
    assert hive.cli("alpha", "status", "--check").stdout == "2 nodes: 2 online\n"
    beta.stop()
    alpha.logged("peer has stopped", peer="beta")
    said = hive.cli("alpha", "status", "--check", code=1)
    assert (said.stdout, said.stderr) == ("2 nodes: 1 online, 1 offline; beta: stopped\n", "")
    bad.touch()
    line = "2 nodes: 1 degraded, 1 offline; beta: stopped;"
    line += " alpha: schedule check every 1s is failing\n"
    check = ("status", "--check")
    eventually("it fails", lambda: hive.cli("alpha", *check, code=1).stdout == line)


def test_a_node_that_will_not_come_back_is_forgotten_everywhere(hive: Hive) -> None:
    alpha = hive.node("alpha").start()
    beta = hive.node("beta", '[[oc_instances]]\nname = "main"\nopenclaw_cmd = "true"\n')
    beta.handler("ping", "#!/bin/sh\necho pong\n")
    beta.start()
    alpha.logged("peer is up", peer="beta")
    ping = ["send", "--to", "beta", "--action", "ping", "--text", "x", "--wait", "20"]
    hive.cli("alpha", *ping)
    for name in ("beta", "main"):
        alive = hive.cli("alpha", "forget", name, code=1).stderr
        said = rf"hive: {name} is online, seen \d+s ago: only what is gone can be forgotten\n"
        assert re.fullmatch(said, alive)
    beta.stop()
    alpha.logged("peer has stopped", peer="beta")
    # its state and roster, the result of ping, the state of main
    assert hive.cli("alpha", "forget", "beta").stdout == "forgotten: beta (4 documents)\n"
    alpha.logged("peer is forgotten", peer="main")
    for direct in ([], ["--direct"]):
        rows = json.loads(hive.cli("alpha", "status", "--json", *direct).stdout)
        assert [row["name"] for row in rows] == ["alpha"]
        roster = json.loads(hive.cli("alpha", "roster", "--json", *direct).stdout)
        assert [one["node"] for one in roster] == ["alpha"]
    again = hive.cli("alpha", "forget", "beta", code=1).stderr
    assert again.startswith("hive: nothing of beta is kept at ") and again.count("\n") == 1
    beta.start()
    eventually("it is new", lambda: len(alpha.events("peer is up", peer="beta")) == 2)
    hive.cli("alpha", *ping)


def test_status_and_roster_as_json(hive: Hive) -> None:
    alpha = hive.node("alpha", '[[oc_instances]]\nname = "main"\nopenclaw_cmd = "true"\n')
    alpha.handler("ping", "#!/bin/sh\necho pong\n")
    alpha.start()
    hive.node("beta").start()
    rows = json.loads(hive.cli("alpha", "status", "--json").stdout)
    assert [(row["name"], row["node"], row["status"]) for row in rows] == [
        ("alpha", "alpha", "online"),
        ("main", "alpha", "online"),
        ("beta", "beta", "online"),
    ]
    assert {*rows[0]} >= {
        *("name", "node", "status", "agents", "load_1m", "uptime_s", "last_seen", "age_s"),
        *("version", "reason", "senders"),
    }
    assert rows[0]["agents"] == {"main": "unknown"}
    assert {row["senders"] for row in rows} == {"not checked"}
    assert 0 <= rows[0]["age_s"] < PATIENCE
    assert rows[0]["version"].startswith(f"{module.__version__} (")
    documents = json.loads(hive.cli("alpha", "roster", "--json").stdout)
    mine = next(one for one in documents if one["node"] == "alpha")
    assert (mine["agents"], mine["handlers"]) == (["main"], ["ping"])
    assert [one["node"] for one in documents] == ["alpha", "beta"]


@pytest.mark.parametrize("what", [["--tls"], ["alpha"]])
def test_options_for_mosquitto_alone_are_refused_to_the_embedded_broker(
    tmp_path: Path, what: list[str]
) -> None:
    done = run("broker", *what, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "hive: broker: --tls and names of nodes belong to --mosquitto-conf\n",
    )
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["", *module.COMMANDS])
def test_help_fits_a_terminal(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        module.main([*filter(None, [name]), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80 or line.strip() == "None"] == []


@pytest.mark.parametrize("name", module.COMMANDS)
def test_every_example_is_shown_and_can_be_typed(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = module.COMMANDS[name].examples.splitlines()
    with pytest.raises(SystemExit):
        module.main([name, "--help"])
    shown = capsys.readouterr().out
    assert shown.endswith("".join(f"\n  {line}" for line in examples) + "\n" if examples else "\n")
    parser = module.make_parser()
    for line in examples:
        words = shlex.split(line, comments=True)  # as a shell does
        for at in [at for at, word in enumerate(words) if word == "hive"]:
            said = words[at + 1 :]
            end = next((n for n, word in enumerate(said) if word[0] in "|>&<"), len(said))
            assert parser.parse_args(said[:end]).run is module.COMMANDS[said[0]].run
