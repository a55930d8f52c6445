"""A machine that carries a hive: what is set up, what keeps it running, and what may go wrong."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import plistlib
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from carrier import HERE, Carrier
from conftest import PATIENCE, ROOT, eventually, find_program, free_port, missing, need_mosquitto
from paho.mqtt.publish import single

import hive

DAY = 86400.0


@pytest.fixture(autouse=True)
def real_broker() -> None:
    need_mosquitto()


@pytest.fixture
def alpha(tmp_path: Path) -> Iterator[Carrier]:
    made = Carrier(tmp_path / "Jo & Jim")
    yield made
    made.close()


def settings(port: int = 8883, *names: str, listen: str = HERE) -> hive.HostSettings:
    return hive.HostSettings(listen, port, names, "hive")


@pytest.fixture
def prepared(tmp_path: Path) -> hive.Host:
    """The files of one that has never run."""
    host = hive.Host(tmp_path / "alpha")
    host.prepare(settings(), "alpha", time.time())
    return host


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ---- Set up ------------------------------------------------------------------------------


def test_from_nothing_in_one_command_and_again_nothing_changes(alpha: Carrier) -> None:
    said = alpha.carry()
    at = f"{HERE}:{alpha.port}"
    assert f"Mosquitto listens at {at}: in the background" in said
    assert f"ok    broker     {at} lets us in as alpha" in said
    assert "ok    receive    they come back" in said
    assert "hive-cli daemon" in said and "invite NAME" in said
    for file in [alpha.config, *alpha.host.folder.rglob("*")]:
        forbidden = 0o022 if file == alpha.host.folder / "mosquitto.pid" else 0o077
        assert not stat.S_IMODE(file.stat().st_mode) & forbidden, file
    eventually("it listens for who joins", lambda: "hosting the hive" in alpha.events())
    assert not stat.S_IMODE(alpha.host.folder.stat().st_mode) & 0o077
    before, config = content(alpha.host.folder), alpha.config.read_bytes()
    pids = alpha.host.service_pid(), alpha.host.broker_pid()
    if sys.platform == "linux":
        limits = Path(f"/proc/{pids[1]}/limits").read_text()
        assert re.search(r"Max open files +(\d+) +\1 ", limits)  # one for each node
    again = alpha.run("host")
    assert f"Mosquitto listens at {at}: runs already\n" in again.stdout
    assert content(alpha.host.folder) == before and alpha.config.read_bytes() == config
    assert pids == (alpha.host.service_pid(), alpha.host.broker_pid())
    alpha.daemon()
    assert alpha.status() == {"alpha": "online"}


def test_another_address_is_taken_over_while_it_runs(alpha: Carrier) -> None:
    alpha.carry()
    authority = alpha.host.authority.read_bytes()
    other = free_port()
    said = alpha.run("host", "--port", str(other), "--name", "localhost").stdout
    assert f"Mosquitto listens at {HERE}:{other}: runs already, and reads" in said
    assert f"ok    broker     {HERE}:{other} lets us in as alpha" in said
    assert f"port = {other} " in alpha.config.read_text()
    assert alpha.host.authority.read_bytes() == authority
    assert alpha.host.needed_settings().names == ("localhost",)
    eventually("the old port is free", lambda: not takes(HERE, alpha.port))


def takes(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def test_a_port_that_is_taken_is_no_move(alpha: Carrier) -> None:
    alpha.carry()
    with socket.create_server((HERE, 0)) as other:
        taken = other.getsockname()[1]
        line = alpha.error("host", "--port", str(taken), code=1)
        assert "another program listens there" in line
    assert f"Mosquitto listens at {HERE}:{alpha.port}: runs already" in alpha.run("host").stdout


def test_what_hive_toml_says_otherwise_stays(alpha: Carrier) -> None:
    alpha.config.parent.mkdir(parents=True, mode=0o700)
    before = '# mine\n[node]\nid = "alpha"  # me\n\n[heartbeat]\ninterval = 0.5\n'
    alpha.config.write_text(before)
    alpha.carry()
    after = alpha.config.read_text()
    assert after.startswith(before)
    assert hive.load_config(str(alpha.config)).mqtt.port == alpha.port


def test_a_node_of_another_broker_stays_there(alpha: Carrier) -> None:
    alpha.config.parent.mkdir(parents=True, mode=0o700)
    alpha.config.write_text('[node]\nid = "alpha"\n[mqtt]\nhost = "broker.lan"\n')
    line = alpha.error(*alpha.where, code=2)
    assert "this node's broker is broker.lan:1883; take [mqtt] out" in line
    assert not alpha.state.exists()


# ---- Its own messages --------------------------------------------------------------------


@pytest.mark.parametrize("running", [False, True], ids=["stopped", "running"])
def test_messages_that_waited_at_the_embedded_broker_come_along(
    alpha: Carrier, running: bool
) -> None:
    """Of another node on this machine, which hosts it."""
    alpha.daemon("--node", "alpha")
    alpha.stop_daemons()
    alpha.daemon("--node", "beta")
    sent = alpha.run("send", "--node", "beta", "--to", "alpha", "--ch", "status", "--text", "kept")
    assert " -> hive/alpha/status" in sent.stdout
    if running:
        alpha.daemon("--node", "alpha")
    said = alpha.carry()
    assert ("fetched 1 messages" in said) is not running
    assert ("restart it" in said) is running
    assert alpha.run("log", "--node", "alpha").stdout.count("kept") == 1


# ---- Certificates ------------------------------------------------------------------------


def test_a_certificate_is_renewed_in_its_last_thirty_days_and_not_before(
    prepared: hive.Host,
) -> None:
    before, now = content(prepared.folder), time.time()
    end = now + hive.SERVER_DAYS * DAY
    assert not prepared.prepare(settings(), "alpha", end - 31 * DAY)
    assert content(prepared.folder) == before
    assert prepared.prepare(settings(), "alpha", end - 29 * DAY)
    after = content(prepared.folder)
    assert {name for name in after if after[name] != before[name]} == {"server.pem"}
    check = ["verify", "-CAfile", str(prepared.authority), "-x509_strict"]
    for how in (("-verify_ip", HERE), ("-verify_hostname", "localhost")):
        hive.openssl(*check, *how, str(prepared.folder / "server.pem"))


def test_other_names_get_another_certificate(prepared: hive.Host) -> None:
    assert prepared.prepare(settings(8883, "alpha.lan"), "alpha", time.time())
    check = ("verify", "-CAfile", str(prepared.authority), "-verify_hostname", "alpha.lan")
    assert "OK" in hive.openssl(*check, str(prepared.folder / "server.pem"))


def test_a_wrong_clock_replaces_no_authority(prepared: hive.Host) -> None:
    before = content(prepared.folder)
    for now in (0.0, time.time() + 11 * 365 * DAY):
        with pytest.raises(hive.HiveError, match="is this machine's clock right"):
            prepared.prepare(settings(), "alpha", now)
    assert content(prepared.folder) == before


# ---- Passwords and invitations -------------------------------------------------------------


def test_passwords_are_hashed_as_mosquitto_passwd_does(tmp_path: Path) -> None:
    program, file = find_program("mosquitto_passwd"), tmp_path / "passwords"
    assert program
    file.write_text("alpha:correct horse\n")
    subprocess.run([program, "-U", file], check=True, capture_output=True)
    hashed = file.read_text().strip().partition(":")[2]
    assert hive.is_password_of(hashed, "correct horse")
    assert not hive.is_password_of(hashed, "correct horse ")
    salt = __import__("base64").b64decode(hashed.split("$")[3])
    assert hive.password_hash("correct horse", salt) == hashed


@pytest.mark.parametrize(
    "wrong", ["", "x", "$7$1$AA==$AA==", "$7$999999$" + "A" * 16 + "$" + "A" * 86 + "==", "a\nb:c"]
)
def test_no_node_chooses_what_would_burden_or_break_the_password_file(
    prepared: hive.Host, wrong: str
) -> None:
    now = time.time()
    prepared.invite("mini", now)
    before = content(prepared.folder)
    assert not prepared.accept("mini", wrong, now)
    good = hive.password_hash("x", b"s" * 12)
    assert not prepared.accept("mini", good + "\nroot:" + good, now)
    assert content(prepared.folder) == before


def test_an_invitation_is_good_once_and_for_an_hour(prepared: hive.Host) -> None:
    now, chosen = time.time(), hive.password_hash("x", b"s" * 12)
    prepared.invite("mini", now)
    assert [*prepared.invited(now + 3599)] == ["mini"] and not prepared.invited(now + 3601)
    assert not prepared.accept("mini", chosen, now + 3601)
    prepared.accept("mini", chosen, now)
    assert prepared.members()["mini"] == chosen
    assert not prepared.accept("mini", hive.password_hash("y", b"s" * 12), now)
    prepared.end_invitations(now + 3601)
    assert prepared.members()["mini"] == chosen  # who has joined stays
    prepared.invite("late", now)
    prepared.end_invitations(now + 3599)
    assert "late" in prepared.members()
    prepared.end_invitations(now + 3601)
    assert "late" not in prepared.members() and not prepared.invited(now)
    prepared.invite("again", now)
    prepared.invite("again", now + 3601)  # though nobody has ended the first


def test_a_member_is_not_invited_again_and_who_was_invited_is(prepared: hive.Host) -> None:
    now = time.time()
    with pytest.raises(hive.HiveError, match="alpha is in this hive already"):
        prepared.invite("alpha", now)
    first = prepared.invite("mini", now)
    second = prepared.invite("mini", now)
    assert first != second
    assert not hive.is_password_of(prepared.members()["mini"], first)
    assert hive.is_password_of(prepared.members()["mini"], second)


def test_what_a_crash_leaves_between_two_files_lets_nobody_in_for_ever(
    prepared: hive.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, writes, survived = time.time(), 0, 0

    def crash(self: hive.Host, file: Path, text: str) -> bool:
        nonlocal writes
        writes += 1
        if writes > survived:
            raise KeyboardInterrupt
        return real(self, file, text)

    real = hive.Host._write
    for number in (0, 1):
        writes, survived = 0, number
        monkeypatch.setattr(hive.Host, "_write", crash)
        with pytest.raises(KeyboardInterrupt):
            prepared.invite("mini", now)
        monkeypatch.setattr(hive.Host, "_write", real)
        assert "mini" not in prepared.members()
        prepared.end_invitations(now + 3601)
        assert [*prepared.members()] == ["@host", "alpha"]


# ---- Running -----------------------------------------------------------------------------


def test_mosquitto_is_started_again_when_it_dies(alpha: Carrier) -> None:
    alpha.carry()
    first = alpha.host.broker_pid()
    assert first
    os.kill(first, signal.SIGKILL)
    eventually("another one runs", lambda: alpha.host.broker_pid() not in (None, first))
    alpha.run("host")
    assert "Mosquitto has ended, starting it again" in alpha.events()


def test_without_its_service_mosquitto_goes_on_until_host_is_said_again(alpha: Carrier) -> None:
    alpha.carry()
    service, broker = alpha.host.service_pid(), alpha.host.broker_pid()
    assert service and broker
    os.kill(service, signal.SIGKILL)
    eventually("the service is gone", lambda: not alpha.host.service_pid())
    assert alpha.host.broker_pid() == broker and takes(HERE, alpha.port)
    said = alpha.run("host").stdout
    assert "in the background" in said and "ok    broker" in said
    assert alpha.host.broker_pid() not in (None, broker)
    eventually("the old one has ended", lambda: not alive(broker))


def test_sigterm_ends_both(alpha: Carrier) -> None:
    alpha.carry()
    service, broker = alpha.host.service_pid(), alpha.host.broker_pid()
    assert service and broker
    os.kill(service, signal.SIGTERM)
    eventually("both have ended", lambda: not alpha.host.service_pid() and not alive(broker))
    assert not takes(HERE, alpha.port)


def test_in_the_foreground_it_is_one_of_a_kind(alpha: Carrier) -> None:
    with alpha.start(*alpha.where, "--foreground", stderr=subprocess.DEVNULL) as first:
        eventually("it listens", lambda: alpha.host.broker_pid() and takes(HERE, alpha.port))
        second = alpha.error(*alpha.where, "--foreground", code=3)
        assert second.endswith(f"the hive in {alpha.host.folder} is hosted already")
        assert "runs already" in alpha.carry()  # and it only moves its own node
        first.terminate()
        assert first.wait(PATIENCE) == 0
    assert not takes(HERE, alpha.port)


def test_two_at_once_set_up_one(alpha: Carrier) -> None:
    both = [alpha.start(*alpha.where, stdout=-1, stderr=-1) for _ in range(2)]
    said = [one.communicate(timeout=2 * PATIENCE) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert alpha.host.service_pid()
    eventually("it lets nodes in", lambda: "hosting the hive" in alpha.events())
    assert "ok    broker" in alpha.run("host").stdout


@pytest.mark.parametrize("command", ["host", "invite"])
def test_kill_9_at_any_moment_leaves_nothing_that_cannot_go_on(
    alpha: Carrier, command: str
) -> None:
    if command == "invite":
        alpha.carry()
    line = alpha.where if command == "host" else ("invite", "mini")
    for step in range(8):
        started = alpha.start(*line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.1 + 0.06 * step)  # a fault is made, and nothing is waited for
        started.kill()
        started.wait()
    alpha.carry()
    lines = (alpha.host.folder / "passwords").read_text().splitlines()
    names = [re.fullmatch(r"([@\w]+):\$7\$.+", one) for one in lines]
    assert all(names) and len(lines) in (2, 3)
    assert alpha.invite().startswith("hive1.")
    assert alpha.run("doctor", code=None).stdout.count("fail") == 0


@pytest.mark.parametrize("step", range(1, 6))
def test_an_invitation_killed_after_any_write_can_be_said_again(
    prepared: hive.Host, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    prepared.prepare(settings(free_port()), "alpha", time.time())
    prepared.invite("mini", time.time())
    written: list[Path] = []
    write = hive.Host._write

    def killed(host: hive.Host, file: Path, text: str) -> None:
        written.append(file)
        if len(written) == step:
            raise KeyboardInterrupt
        write(host, file, text)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(hive.Host, "_write", killed)
        prepared.invite("mini", time.time())
    prepared.invite("mini", time.time())
    assert "mini" in prepared.invited(time.time())


def test_a_mosquitto_that_hangs_is_killed_and_started_again(
    prepared: hive.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive, "SILENT_BROKER", 0.0)
    prepared.prepare(settings(free_port()), "alpha", time.time())
    log = io.StringIO()
    loop = hive.Loop(hive.Log("info", stream=log))
    service = hive.HostService(prepared, loop, loop.log)
    try:
        service.start()
        hive.step_until(loop, PATIENCE, lambda: "hosting the hive" in log.getvalue())
        stopped = prepared.broker_pid()
        assert stopped
        os.kill(stopped, signal.SIGSTOP)
        for _ in range(2):  # what its client says, after ten seconds, and then each few
            service.on_disconnected("no answer (PINGRESP) in time")
        hive.step_until(loop, PATIENCE, lambda: prepared.broker_pid() not in (None, stopped))
        assert prepared.broker_pid() not in (None, stopped)
        assert "answers nobody, and is killed" in log.getvalue()
    finally:
        service.close()
        loop.close()


# ---- Two at once, and half of it ---------------------------------------------------------


def test_of_two_invitations_at_once_the_last_one_of_a_name_is_good(alpha: Carrier) -> None:
    alpha.carry()
    names = ("mini", "mini", "mega")
    asking = [alpha.start("invite", name, stdout=-1, stderr=-1) for name in names]
    said = [one.communicate(timeout=2 * PATIENCE) for one in asking]
    assert [one.returncode for one in asking] == [0, 0, 0], said
    assert alpha.host.members().keys() == {"@host", "alpha", "mini", "mega"}
    lines = [hive.Invitation.parse(out.decode().strip()) for out, _ in said]
    good = [
        hive.is_password_of(alpha.host.members()[name], line.password)
        for name, line in zip(names, lines, strict=True)
    ]
    assert sorted(good[:2]) == [False, True] and good[2]
    for line, is_good in zip(lines, good, strict=True):
        with hive.invited_settings(line, HERE) as account:
            assert hive.lets_in(account) == is_good


def test_expel_killed_at_any_point_is_finished_when_it_is_said_again(alpha: Carrier) -> None:
    """It dies with SIGKILL where it would call a function, one after the other."""
    alpha.carry()
    alpha.daemon()
    points = ("Host.reload", "NodeRemoval.remove", "ask_or_bypass", "Host.expel")
    names = [f"mini{number}" for number in range(len(points))]
    for name, point in zip(names, points, strict=True):
        alpha.host.invite(name, time.time())
        password = hive.new_password()
        chosen = hive.password_hash(password, os.urandom(12))
        assert alpha.host.accept(name, chosen, time.time())
        account = alpha.host.login(name).replace(password=password)
        left = f"hive/meta/{name}/roster", '{"agents": []}', 1, True
        who, tls = {"username": name, "password": password}, {"ca_certs": account.ca_file}
        eventually("it is in", lambda account=account: hive.lets_in(account))  # type: ignore[misc]
        single(*left, hostname=HERE, port=alpha.port, auth=who, tls=tls)  # type: ignore[arg-type]
        killed = (
            f"import hive, os\nowner, _, name = 'hive.{point}'.rpartition('.')\n"
            "setattr(eval(owner), name, lambda *_, **__: os.kill(os.getpid(), 9))\n"
            f"hive.main(['expel', '{name}'])\n"
        )
        environment = alpha.environment | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", killed], env=environment, cwd=alpha.home)
        assert done.returncode == -signal.SIGKILL and name in alpha.host.members()
        assert alpha.run("expel", name).stdout.startswith(f"expelled: {name} (")
        assert not hive.lets_in(account)
    assert [*alpha.host.members()] == ["@host", "alpha"]
    said = alpha.run("log", "--json", "--ch", "status").stdout
    assert all(f"{name} was expelled from this hive by alpha" in said for name in names)
    assert "nothing of mini3 is kept" in alpha.error("forget", "mini3", code=1)


# ---- What doctor says of it --------------------------------------------------------------


def hosting_line(alpha: Carrier) -> str:
    said = alpha.run("doctor", code=None).stdout
    return "\n".join(line for line in said.splitlines() if " hosting " in line)


def test_doctor_tells_how_the_hive_is_carried(alpha: Carrier) -> None:
    alpha.carry()
    assert re.fullmatch(
        r"ok    hosting    Mosquitto runs in the background; after a reboot say hive host;"
        r" its certificate holds 36[45] days",
        hosting_line(alpha),
    )
    settings = alpha.host.needed_settings()
    alpha.host._write(
        alpha.host._settings,
        hive.encode_json(vars(settings.replace(names=("hive.lan", "10.9.8.7")))).decode(),
    )
    line = "fail  hosting    its certificate does not name hive.lan, 10.9.8.7; hive host"
    assert hosting_line(alpha) == line
    moved = hive.encode_json(vars(settings.replace(listen="192.0.2.1"))).decode()
    alpha.host._write(alpha.host._settings, moved)
    assert hosting_line(alpha).splitlines()[0] == (
        "fail  hosting    192.0.2.1: Cannot assign requested address; hive host"
    )
    alpha.host._write(alpha.host._settings, hive.encode_json(vars(settings)).decode())
    pid = alpha.host.service_pid()
    assert pid
    os.kill(pid, signal.SIGTERM)
    eventually("it has ended", lambda: not alpha.host.broker_pid())
    log = alpha.host.log
    assert hosting_line(alpha) == (
        f"fail  hosting    Mosquitto for this hive does not run; see {log}; hive host"
    )


def findings(host: hive.Host) -> list[hive.Finding]:
    """What the check finds, of a hive whose Mosquitto runs."""
    node = hive.NodeConfig("alpha", state_dir=host.folder.parent)
    with contextlib.ExitStack() as ending:
        context = hive.DoctorContext(lambda: hive.Config(node), 0.0, ending)
        context.config = hive.Config(node)
        return [*hive.check_hosting(context)]


def test_doctor_warns_of_a_certificate_that_ends_and_of_what_a_reboot_ends(
    prepared: hive.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive.Host, "_holder", lambda self, lock, written: 1)
    monkeypatch.setattr(hive, "supervisor", lambda: "is kept running by systemd")
    now = time.time()
    for days, level, words in (
        (300, "ok", "is kept running by systemd; its certificate holds 64 days"),
        (350, "WARN", "its certificate holds 14 days, and was not renewed"),
        (366, "FAIL", "its certificate holds 0 days, and was not renewed"),
    ):
        monkeypatch.setattr(time, "time", lambda days=days: now + days * DAY)
        (found,) = findings(prepared)
        assert found.level.name == level.upper() and words in found.what
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(hive, "supervisor", lambda: hive.NOT_KEPT)
    (found,) = findings(prepared)
    assert found.level is hive.Level.WARN and "after a reboot" in found.what


# ---- What is not there -------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["mosquitto", "openssl"])
def test_a_program_that_is_missing_is_named_with_how_to_get_it(
    alpha: Carrier,
    missing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in {"mosquitto", "openssl"} - {missing}:
        program = find_program(name)
        assert program
        (tools / name).symlink_to(program)
    monkeypatch.setattr(hive, "PROGRAM_PLACES", str(tools))
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("HOME", str(alpha.home))
    assert hive.main([*alpha.where]) == 1
    line = capsys.readouterr().err
    assert line == (
        f"hive: the program {missing} is missing; install it, and say this again: Debian, Ubuntu:"
        f" sudo apt-get install {missing}; macOS: brew install {missing}\n"
    )


def test_a_port_that_is_taken_is_said_before_anything_is_written(alpha: Carrier) -> None:
    with socket.create_server((HERE, alpha.port)):
        line = alpha.error(*alpha.where, code=1)
    assert line == (
        f"hive: {HERE}:{alpha.port}: {os.strerror(errno.EADDRINUSE)}; another program listens"
        " there; take another --port"
    )
    assert not alpha.host.folder.exists() and not alpha.config.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "say the address where the other machines reach this one: --listen"),
        (("--listen", "0.0.0.0"), "how do peers reach it?  say --name too"),
        (("--listen", "192.0.2.1"), "this machine has no such address"),
        (("--listen", "a b"), "is not a host's name or address"),
        (("--host", "192.168.1.5"), "it is itself the broker; say --listen"),
    ],
)
def test_an_address_that_will_not_do_is_one_line(
    alpha: Carrier, arguments: tuple[str, ...], words: str
) -> None:
    assert words in alpha.error("host", *arguments, code=1 if "192.0.2.1" in arguments else 2)
    assert not alpha.host.folder.exists()


def test_a_full_disk_is_one_line_and_leaves_no_half(alpha: Carrier) -> None:
    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # what is written fails, as there

    line = alpha.error(*alpha.where, code=1, preexec_fn=no_room)
    assert "nothing was written" in line and str(alpha.host.folder) in line
    assert not [file for file in alpha.host.folder.iterdir() if file.stat().st_size]
    assert "ok    broker" in alpha.carry()


@pytest.mark.parametrize("command", ["invite", "expel"])
def test_only_who_carries_a_hive_lets_in_and_puts_out(alpha: Carrier, command: str) -> None:
    line = alpha.error(command, "mini", code=1)
    assert "this node carries no hive" in line and "hive host --listen" in line


def test_with_mosquitto_away_invite_and_expel_say_how_it_comes_back(alpha: Carrier) -> None:
    alpha.carry()
    service = alpha.host.service_pid()
    assert service
    os.kill(service, signal.SIGTERM)
    eventually("it has ended", lambda: not alpha.host.broker_pid())
    for command in ("invite", "expel"):
        line = alpha.error(command, "mini", code=3)
        assert "does not run" in line and "hive host" in line


# ---- Who starts it -----------------------------------------------------------------------


def test_a_systemd_unit_runs_it_where_there_is_one(alpha: Carrier, tmp_path: Path) -> None:
    """systemctl is a stand-in: it starts in the background what the unit says."""
    tools, told = tmp_path / "tools", tmp_path / "told"
    tools.mkdir()
    unit = alpha.home / ".config/systemd/user/hive-host.service"
    (tools / "systemctl").write_text(
        f'#!/bin/sh\necho "$*" >>{told}\n[ "$2" != is-active ] || exit 3\n'
        f'[ "$2" != restart ] || eval "$(sed -n s/^ExecStart=//p "{unit}") >/dev/null 2>&1 &"\n'
    )
    (tools / "systemctl").chmod(0o755)
    alpha.environment["PATH"] = f"{tools}:{alpha.environment['PATH']}"
    said = alpha.carry()
    assert "systemd keeps it running" in said and "ok    broker" in said
    assert told.read_text().splitlines()[:4] == [
        "--user show-environment",
        "--user daemon-reload",
        "--user enable hive-host",
        "--user restart hive-host",
    ]
    assert stat.S_IMODE(unit.stat().st_mode) == 0o600


def test_on_a_mac_launchd_starts_it_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, ...]] = []

    def run(*command: str) -> bool:
        steps.append(command)
        return command[0] == "launchctl"

    monkeypatch.setattr(hive, "succeeds", run)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("HOME", str(tmp_path))
    said = hive.start_supervised(hive.Host(tmp_path / "state"), ["hive", "host", "--foreground"])
    monkeypatch.undo()
    agent = tmp_path / "Library" / "LaunchAgents" / "ai.hive.host.plist"
    assert said == "launchd keeps it running" and agent.exists()
    domain = f"gui/{os.getuid()}"
    assert steps[-2:] == [
        ("launchctl", "bootout", f"{domain}/ai.hive.host"),
        ("launchctl", "bootstrap", domain, str(agent)),
    ]


def test_systemd_and_launchd_take_what_is_written(tmp_path: Path) -> None:
    command = [sys.executable, "/home/a b/100%/$x/hive.py", "host", "--foreground"]
    agent = plistlib.loads(hive.launchd_agent(["/a & b", "<c>"], tmp_path / "log").encode())
    assert agent["ProgramArguments"] == ["/a & b", "<c>"] and agent["KeepAlive"] is True
    unit = tmp_path / "hive-host.service"
    unit.write_text(hive.systemd_unit(command))
    assert '"/home/a b/100%%/$$x/hive.py" "host" "--foreground"\n' in unit.read_text()
    if not shutil.which("systemd-analyze"):
        missing("systemd-analyze is missing: make checkers installs it")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", unit],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)},
    )
    assert "hive-host" not in done.stderr, done.stderr


def test_who_cannot_be_let_in_now_is_no_end_of_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that was stopped with Ctrl-Z keeps the lock; a member asks meanwhile."""
    monkeypatch.setattr(hive, "LOCK_PATIENCE", 0.0)
    host, said = hive.Host(tmp_path), io.StringIO()
    host.prepare(hive.HostSettings("127.0.0.1", 1, ("127.0.0.1",), "hive"), "alpha", time.time())
    host.invite("mini", time.time())
    log = hive.Log("info", stream=said)
    loop = hive.Loop(log)
    service = hive.HostService(host, loop, log)
    chosen = hive.password_hash(hive.new_password(), bytes(12))
    topic = f"hive/{hive.HOST_USER}/command/mini"
    asked = hive.IncomingMessage(topic, chosen.encode(), False, None, lambda: None)
    with host.lock():
        service.deliver(asked)
    assert 'event="cannot let in" node=mini' in said.getvalue()
    assert host.members()["mini"] != chosen
    service.deliver(asked)
    assert host.members()["mini"] == chosen
    service.close()
    loop.close()
