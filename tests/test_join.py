"""One line makes a machine a node of a hive; wrong, used, expired and cut ones do not."""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import select
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from carrier import HERE, Carrier, Machine
from conftest import PATIENCE, ROOT, eventually, find_program, free_port, need_mosquitto

import hive


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Carrier]:
    """One hive for all tests here, each with a node of a name of its own."""
    need_mosquitto()
    made = Carrier(tmp_path_factory.mktemp("hive") / "alpha")
    made.carry()
    yield made
    made.close()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path / "mini", f"mini{time.monotonic_ns()}")
    yield made
    made.close()


def changed(line: str, **new: Any) -> str:
    """An invitation that says something else."""
    code = line.strip().removeprefix(hive.INVITATION_MARK)
    document = json.loads(base64.urlsafe_b64decode(code + "=" * (-len(code) % 4)))
    del document["sum"]
    document |= new
    document["sum"] = zlib.crc32(hive.encode_json(document))
    coded = base64.urlsafe_b64encode(hive.encode_json(document)).decode().rstrip("=")
    return hive.INVITATION_MARK + coded


def refused(alpha: Carrier, machine: Machine, line: str) -> str:
    return (
        f"hive: {HERE}:{alpha.port} refuses the invitation: it was used, has ended, or was taken"
        " back; ask for another: hive invite"
    )


# ---- The line ----------------------------------------------------------------------------


def test_it_is_one_line_that_fits_a_terminals_and_nobody_else_has_its_password(
    alpha: Carrier,
) -> None:
    done = alpha.run("invite", "one")
    (line,) = done.stdout.splitlines()
    assert re.fullmatch(r"hive1\.[A-Za-z0-9_-]+", line) and len(line) < 1000  # macOS takes 1024
    one = hive.Invitation.parse(line)
    assert (one.name, one.hosts, one.port, one.prefix) == ("one", (HERE,), alpha.port, "hive")
    assert 3500 < one.until - time.time() <= 3600
    assert "This line is a secret" in done.stderr and "hive join" in done.stderr
    kept = b"".join(file.read_bytes() for file in alpha.host.folder.iterdir() if file.is_file())
    assert one.password.encode() not in kept and one.password not in repr(one)


@pytest.mark.parametrize("wrap", ["\n", " ", "\r\n", "\n   "])
def test_a_line_that_was_wrapped_is_whole(alpha: Carrier, wrap: str) -> None:
    line = alpha.invite("wrapped").strip()
    parts = (line[i : i + 76] for i in range(0, len(line), 76))
    assert hive.Invitation.parse(wrap.join(parts)) == hive.Invitation.parse(line)


CUT = "the invitation is cut or mistyped; copy the whole line again"


def test_a_line_that_is_cut_or_mistyped_anywhere_says_so(alpha: Carrier) -> None:
    line = alpha.invite("cut").strip()
    for length in range(len(hive.INVITATION_MARK), len(line), 7):
        with pytest.raises(hive.UsageError, match=CUT):
            hive.Invitation.parse(line[:length])
    for at in range(len(hive.INVITATION_MARK), len(line) - 1, 11):
        other = "B" if line[at] != "B" else "C"
        with pytest.raises(hive.UsageError, match=CUT):
            hive.Invitation.parse(line[:at] + other + line[at + 1 :])
    with pytest.raises(hive.UsageError, match=CUT):
        hive.Invitation.parse(f"{line}AAAA")


@pytest.mark.parametrize("said", ["", "hello", "hive2.eyJ", "x" * 5000, "hive1." + "A" * 5000])
def test_what_is_no_invitation_is_told_what_one_is(machine: Machine, said: str) -> None:
    line = machine.error("join", "--", said, code=2)
    assert line == "hive: this is no invitation; it is one line: hive1.…"


@pytest.mark.parametrize(
    "wrong",
    [
        {"hosts": []},
        {"hosts": ["-oProxyCommand=x"]},
        {"hosts": "alpha"},
        {"hosts": ["a"] * 9},
        {"port": 0},
        {"port": "x"},
        {"name": "all"},
        {"name": "../x"},
        {"name": ["x"]},
        {"password": "x\ny"},
        {"ca": "%"},
        {"ca": ""},
        {"prefix": "#"},
        {"until": "soon"},
    ],
    ids=repr,
)
def test_an_invitation_of_an_attacker_names_nothing_odd(
    alpha: Carrier, wrong: dict[str, Any]
) -> None:
    line = alpha.invite("odd")
    with pytest.raises(hive.UsageError, match=CUT):
        hive.Invitation.parse(changed(line, **wrong))
    for document in (b"[]", b"1", b'"x"', b"{}", b"\xff", b"[" * 2000):
        code = base64.urlsafe_b64encode(document).decode().rstrip("=")
        with pytest.raises(hive.UsageError, match=CUT):
            hive.Invitation.parse(hive.INVITATION_MARK + code)


# ---- Joining -----------------------------------------------------------------------------


def test_a_line_is_printed_when_the_broker_knows_it(alpha: Carrier) -> None:
    """A script may hand it on at once, and Mosquitto be busy."""
    pid = alpha.host.broker_pid()
    assert pid
    line = [sys.executable, str(ROOT / "hive-cli"), "invite", "hasty"]
    os.kill(pid, signal.SIGSTOP)
    try:
        inviting = subprocess.Popen(line, env=alpha.environment, stdout=subprocess.PIPE)
        eventually("it is written down", lambda: "hasty" in alpha.host.members())
        with pytest.raises(subprocess.TimeoutExpired):
            inviting.wait(1.0)
    finally:
        os.kill(pid, signal.SIGCONT)
    said, _ = inviting.communicate(timeout=PATIENCE)
    invitation = hive.Invitation.parse(said.decode())
    assert hive.lets_in(invitation.settings(HERE, alpha.host.authority))


def test_one_line_and_the_machine_is_a_node(alpha: Carrier, machine: Machine) -> None:
    line = alpha.invite(machine.name)
    said = machine.run("join", line.strip()).stdout
    at = f"{HERE}:{alpha.port}"
    assert said.startswith(f"wrote {machine.config}: node {machine.name}, broker {at}\n")
    assert f"ok    broker     {at} lets us in as {machine.name}" in said
    assert "ok    receive    they come back" in said
    assert re.search(r"^next: .*hive-cli daemon\n$", said, re.M)
    files = {file.name: file for file in machine.config.parent.iterdir()}
    assert files.keys() == {"hive.toml", "mqtt-password", "mqtt-ca.pem"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files.values()} == {0o600}
    config = hive.load_config(str(machine.config))
    assert config.checked and config.mqtt.tls and not config.warnings
    assert config.mqtt.password != hive.Invitation.parse(line).password
    alpha.daemon()
    machine.daemon()
    both = {"alpha": "online", machine.name: "online"}
    eventually("both see both", lambda: both.items() <= machine.statuses().items())
    assert machine.run("doctor", code=None).stdout.count("fail") == 0
    alpha.stop_daemons()


def test_used_lines_are_worth_nothing(alpha: Carrier, machine: Machine, tmp_path: Path) -> None:
    line = alpha.invite(machine.name)
    machine.run("join", "-", stdin=line)
    thief = Machine(tmp_path / "thief", "thief")
    assert thief.error("join", "-", stdin=line, code=3) == refused(alpha, thief, line)
    assert not thief.config.parent.exists()
    assert machine.run("doctor", code=None).stdout.count("fail") == 0


def test_an_invitation_that_has_ended_is_worth_nothing(alpha: Carrier, machine: Machine) -> None:
    line = alpha.invite(machine.name)
    file = alpha.host.folder / "invited.json"
    with alpha.host.lock():
        invited = json.loads(file.read_text())
        invited[machine.name]["until"] = int(time.time()) - 1
        file.write_text(json.dumps(invited))
    assert machine.error("join", "-", stdin=line, code=3).startswith(
        f"hive: {HERE}:{alpha.port} does not take the invitation: it was used, has ended"
    )
    assert machine.name not in alpha.host.members()
    assert not machine.config.exists()
    assert machine.error("join", "-", stdin=line, code=3) == refused(alpha, machine, line)


def test_an_invitation_ends_by_itself(alpha: Carrier, machine: Machine) -> None:
    alpha.invite(machine.name)
    file, service = alpha.host.folder / "invited.json", alpha.host.service_pid()
    with alpha.host.lock():
        invited = json.loads(file.read_text())
        invited[machine.name]["until"] = int(time.time()) - 1
        file.write_text(json.dumps(invited))
    assert service
    os.kill(service, signal.SIGHUP)  # or it looks in half a minute
    eventually("it is out", lambda: machine.name not in alpha.host.members())


def test_the_line_before_ends_with_the_next_one(alpha: Carrier, machine: Machine) -> None:
    first, second = alpha.invite(machine.name), alpha.invite(machine.name)
    assert machine.error("join", "-", stdin=first, code=3) == refused(alpha, machine, first)
    machine.run("join", "-", stdin=second)


def test_another_machine_at_that_address_is_not_believed(
    alpha: Carrier, machine: Machine, tmp_path: Path
) -> None:
    other = hive.Host(tmp_path / "other")
    other.prepare(hive.HostSettings(HERE, 8883, (), "hive"), "alpha", time.time())
    der = ssl.PEM_cert_to_DER_cert(other.authority.read_text())
    line = changed(alpha.invite(machine.name), ca=base64.b64encode(der).decode())
    said = machine.error("join", "-", stdin=line, code=3)
    at = f"{HERE}:{alpha.port}"
    assert said.startswith(f"hive: {at} is not believed: ") and said.endswith("another machine?")
    assert not machine.config.parent.exists()
    nameless = changed(alpha.invite(machine.name), hosts=["127.0.0.3"])
    if sys.platform == "linux":  # the same broker, which has no certificate for that address
        said = machine.error("join", "-", stdin=nameless, code=3)
        assert "127.0.0.3" in said


def test_a_clock_that_is_wrong_is_thought_of(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that has ended is what a clock that is ahead sees."""
    own = Carrier(tmp_path / "alpha")
    monkeypatch.setattr(hive, "SERVER_DAYS", 0)
    own.state.mkdir(parents=True, mode=0o700)
    settings = hive.HostSettings(HERE, own.port, (), "hive")
    own.host.prepare(settings, "alpha", time.time())
    der = ssl.PEM_cert_to_DER_cert(own.host.authority.read_text())
    line = hive.Invitation(
        (HERE,), own.port, machine.name, "0" * 32, base64.b64encode(der).decode(), "hive", 1
    ).line()
    mosquitto = find_program("mosquitto")
    assert mosquitto
    with subprocess.Popen([mosquitto, "-c", own.host.conf], stderr=subprocess.DEVNULL) as broker:
        try:
            eventually("it listens", lambda: answers_at(own.port))
            said = machine.error("join", "-", stdin=line, code=3)
        finally:
            broker.terminate()
    assert said == (
        f"hive: {HERE}:{own.port} is not believed: certificate has expired; is a clock wrong,"
        " here or there?"
    )


def answers_at(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HERE, port)) == 0


def test_the_first_address_that_answers_is_taken(alpha: Carrier, machine: Machine) -> None:
    line = changed(alpha.invite(machine.name), hosts=["no.such.host.invalid", HERE])
    assert f"broker {HERE}:{alpha.port}\n" in machine.run("join", "-", stdin=line).stdout


def test_a_hive_that_is_not_reached_is_one_line(alpha: Carrier, machine: Machine) -> None:
    line = changed(alpha.invite(machine.name), hosts=[HERE, "127.0.0.1"], port=free_port())
    said = machine.error("join", "-", stdin=line, code=3)
    assert said.count("Connection refused") == 2 and "no firewall in between" in said
    assert not machine.config.parent.exists()


def test_without_its_service_the_hive_takes_nobody_and_the_line_stays_good(
    tmp_path: Path, machine: Machine
) -> None:
    own = Carrier(tmp_path / "alpha")
    try:
        own.carry()
        line, service = own.invite(machine.name), own.host.service_pid()
        assert service
        os.kill(service, signal.SIGKILL)
        eventually("it is gone", lambda: not own.host.service_pid())

        def said() -> str:  # Mosquitto hears of that end a moment later
            return machine.error("join", "-", stdin=line, code=3)

        eventually("it is said", lambda: "nobody who lets nodes in" in said())
        assert not machine.config.parent.exists()
        own.run("host")
        machine.run("join", "-", stdin=line)
    finally:
        own.close()


# ---- What is there already ---------------------------------------------------------------


def test_a_hive_toml_without_a_broker_is_changed_and_kept_beside(
    alpha: Carrier, machine: Machine
) -> None:
    """As make install leaves it."""
    machine.config.parent.mkdir(parents=True, mode=0o700)
    before = hive.example_config() + '\n[[oc_instances]]\nname = "main"\n'
    machine.config.write_text(before)
    machine.config.chmod(0o600)
    said = machine.run("join", "-", stdin=alpha.invite(machine.name)).stdout
    assert "; what was there is in hive.toml.before-join\n" in said
    assert machine.config.with_name("hive.toml.before-join").read_text() == before
    lines = [one for one in machine.config.read_text().splitlines() if one not in before]
    assert {line.partition(" = ")[0] for line in lines} == {
        *("id", "host", "port", "username", "password_file", "tls", "ca_file", "senders")
    }
    config = hive.load_config(str(machine.config))
    assert config.node.id == machine.name and [*config.agents] == ["main"]


def test_a_node_of_another_hive_stays_there_unless_it_is_forced(
    alpha: Carrier, machine: Machine
) -> None:
    machine.config.parent.mkdir(parents=True, mode=0o700)
    before = '[mqtt]\nhost = "old.lan"\nusername = "x"\npassword = "secret"\n'
    machine.config.write_text(before)
    machine.config.chmod(0o600)
    line = alpha.invite(machine.name)
    said = machine.error("join", "-", stdin=line, code=1)
    assert said == (
        f"hive: {machine.config}: this node's broker is old.lan:1883 already, and stays as it is;"
        " --force replaces it, hive doctor tells how it is"
    )
    assert machine.config.read_text() == before
    machine.run("join", "-", "--force", stdin=line)
    config = hive.load_config(str(machine.config))
    assert config.mqtt.host == HERE and config.mqtt.username == machine.name
    aside = machine.config.with_name("hive.toml.before-join")
    assert aside.read_text() == before and not stat.S_IMODE(aside.stat().st_mode) & 0o077


def test_what_cannot_be_changed_stays_and_the_line_stays_good(
    alpha: Carrier, machine: Machine
) -> None:
    machine.config.parent.mkdir(parents=True, mode=0o700)
    machine.config.write_text('node = { id = "x" }\nmqtt = { keepalive = 60 }\n')
    line = alpha.invite(machine.name)
    said = machine.error("join", "-", stdin=line, code=2)
    assert "written in a way that cannot be changed here; set there: node.id = " in said
    machine.config.unlink()
    machine.run("join", "-", stdin=line)


def test_kill_9_at_any_moment_and_the_same_line_goes_on(alpha: Carrier, tmp_path: Path) -> None:
    for step in range(6):
        one = Machine(tmp_path / f"m{step}", f"killed{step}")
        line = alpha.invite(one.name).strip()
        null = subprocess.DEVNULL
        joining = one.start("join", line, stdout=null, stderr=null)
        time.sleep(0.15 + 0.08 * step)  # a fault is made, and nothing is waited for
        joining.kill()
        joining.wait()
        if one.config.exists():
            assert "already" in one.error("join", line, code=1)
        else:
            one.run("join", line)
        assert one.run("doctor", code=None).stdout.count("fail") == 0
        assert not [*one.config.parent.glob("*.joining")]


# ---- Secrets -----------------------------------------------------------------------------


def test_a_terminal_does_not_show_the_line(alpha: Carrier, machine: Machine) -> None:
    line, shown = alpha.invite(machine.name).strip(), b""
    pid, terminal = pty.fork()
    if pid == 0:
        arguments = [sys.executable, str(ROOT / "hive-cli"), "join", "-"]
        os.execve(sys.executable, arguments, machine.environment)
    asked, until = False, time.monotonic() + 2 * PATIENCE
    while time.monotonic() < until:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                data = os.read(terminal, 4096)
            except OSError:  # its end, on Linux
                break
            if not data:
                break
            shown += data
        if b"not shown" in shown and not asked:
            asked = True
            os.write(terminal, line.encode() + b"\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown
    assert line.encode()[:40] not in shown and b"wrote " in shown


def test_no_password_is_in_a_log_an_argument_or_what_is_printed(
    alpha: Carrier, machine: Machine
) -> None:
    line = alpha.invite(machine.name)
    done = machine.run("join", "-", stdin=line)
    own = machine.config.with_name("mqtt-password").read_text().strip()
    host = alpha.host.password_file("@host").read_text().strip()
    secrets = [own, host, hive.Invitation.parse(line).password, line.strip()]
    said = done.stdout + done.stderr + alpha.events() + alpha.run("log", code=None).stdout
    for pid in (alpha.host.service_pid(), alpha.host.broker_pid()):
        if os.path.exists(f"/proc/{pid}"):
            said += (
                Path(f"/proc/{pid}/cmdline").read_text() + Path(f"/proc/{pid}/environ").read_text()
            )
    assert not [secret for secret in secrets if secret in said]


# ---- Expelled ----------------------------------------------------------------------------


def test_who_is_expelled_is_out_at_once_and_leaves_nothing(
    alpha: Carrier, machine: Machine
) -> None:
    alpha.daemon()
    machine.run("join", "-", stdin=alpha.invite(machine.name))
    machine.daemon()
    eventually("it is seen", lambda: alpha.statuses().get(machine.name) == "online")
    said = alpha.run("expel", machine.name).stdout
    assert re.fullmatch(rf"expelled: {machine.name} \(\d+ documents?\)\n", said)
    eventually("it is cut off", lambda: "no broker, trying again" in machine.log())
    assert "not authorized" in machine.error("status", "--direct", code=3)
    assert machine.name not in alpha.status()
    assert machine.name not in json.loads(alpha.run("status", "--direct", "--json").stdout)
    rows = [json.loads(one) for one in alpha.run("log", "--json").stdout.splitlines()]
    text = f"{machine.name} was expelled from this hive by alpha"
    assert [row for row in rows if (row.get("envelope") or row).get("text") == text]
    assert "is not in this hive; there are: alpha" in alpha.error("expel", machine.name, code=1)
    machine.stop_daemons()
    machine.run("join", "-", "--force", stdin=alpha.invite(machine.name))  # and may come back
    alpha.stop_daemons()


def test_a_node_that_will_not_come_back_is_forgotten_where_the_hive_is_carried(
    alpha: Carrier, machine: Machine
) -> None:
    machine.run("join", "-", stdin=alpha.invite(machine.name))
    machine.daemon()
    assert "is online" in alpha.error("forget", machine.name, code=1)
    machine.stop_daemons()
    line = machine.error("forget", "alpha", code=1)
    assert line.endswith("say this on the machine that carries the hive")
    assert alpha.run("forget", machine.name).stdout.startswith(f"forgotten: {machine.name} (")
    assert machine.name in alpha.host.members()  # and it may come in again


def test_an_invitation_is_taken_back_by_expel(alpha: Carrier, machine: Machine) -> None:
    line = alpha.invite(machine.name)
    assert alpha.run("expel", machine.name).stdout == f"expelled: {machine.name} (0 documents)\n"
    assert machine.error("join", "-", stdin=line, code=3) == refused(alpha, machine, line)


def test_the_machine_that_carries_the_hive_stays_in(alpha: Carrier) -> None:
    assert "is this machine's own node" in alpha.error("expel", "alpha", code=2)


def test_a_member_is_not_invited_over_its_head(alpha: Carrier, machine: Machine) -> None:
    machine.run("join", "-", stdin=alpha.invite(machine.name))
    said = alpha.error("invite", machine.name, code=1)
    assert said == (
        f"hive: {machine.name} is in this hive already; another name, or first: hive expel"
        f" {machine.name}"
    )
    assert machine.run("doctor", code=None).stdout.count("fail") == 0


def test_a_member_may_not_change_another_ones_password(alpha: Carrier, machine: Machine) -> None:
    """It has a topic of its own to say so, and is not invited any more."""
    machine.run("join", "-", stdin=alpha.invite(machine.name))
    mine = hive.load_config(str(machine.config)).mqtt
    victim = f"victim{time.monotonic_ns()}"
    alpha.invite(victim)
    before = alpha.host.members()
    forged = hive.JoinRequest(mine.replace(username=victim), "hive")
    forged._settings = mine
    with pytest.raises(hive.BrokerError, match="not authorized"):
        forged.ask(hive.password_hash("x", b"s" * 12).encode())
    assert alpha.host.members() == before
