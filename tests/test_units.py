"""What `make install` puts where, whether systemd and launchd take it, and the example handlers.

No manager of this machine is ever spoken to: systemctl and launchctl are stand-ins, and where they
are not, systemd is in namespaces of its own.
"""

from __future__ import annotations

import json
import os
import plistlib
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, free_port, missing, need_mosquitto

import hive

SPEAKING = {"PREFIX", "DESTDIR", "START", "RUN_AS", "SUDO_USER", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"}


def need(*programs: str) -> str:
    """The first of these that is here."""
    for program in programs:
        if shutil.which(program):
            return program
    missing(f"{' or '.join(programs)} is missing: make checkers installs it on Debian, as root")


class Machine:
    """A home, a folder that stands for /, and managers that only write down what they are told."""

    def __init__(self, folder: Path, system: str = "Linux") -> None:
        self.home = folder / "Jo & 50% Jim"
        self.root = folder / "root"
        self.told = folder / "told"
        self.told.touch()
        tools = folder / "tools"
        for made in (self.home, self.root, tools):
            made.mkdir()
        note = f'echo "${{0##*/}} $*" >>"{self.told}"; '
        for name, script in (
            ("uname", f"echo {system}"),
            ("systemctl", f"{note}exit ${{NO_MANAGER:-0}}"),
            ("launchctl", f'{note}[ "$1" != print ]'),  # print: is the job loaded?  It is not.
        ):
            (tools / name).write_text(f"#!/bin/sh\n{script}\n")
            (tools / name).chmod(0o755)
        self.environment = {k: v for k, v in os.environ.items() if k not in SPEAKING}
        self.environment |= {"HOME": str(self.home), "PATH": f"{tools}:{os.environ['PATH']}"}

    def make(self, target: str, *settings: str, code: int = 0) -> str:
        """Run make; what it printed."""
        done = self.run("make", "-C", str(ROOT), target, f"PYTHON={sys.executable}", *settings)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def package(self, target: str, *settings: str) -> str:
        return self.make(target, f"DESTDIR={self.root}", *settings)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment, cwd=self.home
        )

    def put(self, path: str, text: str, mode: int = 0o644) -> Path:
        file = self.home / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)
        return file

    def with_paho(self) -> Machine:
        """Put something in the virtual environment's place, so that none need be made."""
        self.put(
            ".local/lib/hive/venv/bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n', 0o755
        )
        return self

    def inside(self, path: Path | str) -> Path:
        """Where a path is that was installed with DESTDIR."""
        return self.root / str(path).lstrip("/")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """One that `make install` was really run on, with a virtual environment and all."""
    made = Machine(tmp_path_factory.mktemp("installed"))
    made.make("install")
    return made


def everything(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """What is below a folder: mode, time and content of each file."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in folder.rglob("*")
    }


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


USER_UNIT = ".config/systemd/user/hive-daemon.service"
SYSTEM_UNIT = "/etc/systemd/system/hive-daemon.service"
PLIST = "Library/LaunchAgents/ai.hive.daemon.plist"


def system_unit(machine: Machine) -> Path:
    """The system's unit; the program that it names is there, because systemd looks for it."""
    prefix = machine.root.parent / "usr"
    machine.package("install", f"PREFIX={prefix}")
    prefix.symlink_to(machine.inside(prefix))
    return machine.inside(SYSTEM_UNIT)


# ---- systemd -----------------------------------------------------------------------------


def complaints(machine: Machine, *arguments: str) -> list[str]:
    """What systemd says about a unit of ours; others on this machine are not our affair."""
    need("systemd-analyze")
    machine.environment["XDG_RUNTIME_DIR"] = str(machine.root)
    done = machine.run("systemd-analyze", "verify", *arguments)
    return [line for line in (done.stdout + done.stderr).splitlines() if "hive" in line]


def test_systemd_has_nothing_to_say_about_a_users_unit(installed: Machine) -> None:
    assert complaints(installed, "--user", str(installed.home / USER_UNIT)) == []


def test_systemd_has_nothing_to_say_about_the_systems_unit(machine: Machine) -> None:
    assert complaints(machine, str(system_unit(machine))) == []


def test_systemd_has_nothing_to_say_about_the_pages_unit(installed: Machine) -> None:
    unit = installed.home / USER_UNIT.replace("daemon", "web")
    assert complaints(installed, "--user", str(unit)) == []
    assert "StandardOutput=null" in unit.read_text()  # it prints a link that is a secret


def test_systemd_has_nothing_to_say_about_the_brokers_unit(installed: Machine) -> None:
    unit = (ROOT / "units/systemd/hive-broker.service").read_text()
    put = installed.put(
        ".config/systemd/user/hive-broker.service",
        unit.replace("@BINDIR@", str(installed.home / ".local/bin").replace("%", "%%")),
    )
    assert complaints(installed, "--user", str(put)) == []


def test_systemd_would_have_said_something(machine: Machine) -> None:
    unit = system_unit(machine)
    unit.write_text(unit.read_text().replace("[Service]", "[Service]\nRestartTheSteps=5"))
    assert "RestartTheSteps" in complaints(machine, str(unit))[0]


def test_the_systems_unit_is_exposed_to_little(machine: Machine) -> None:
    need("systemd-analyze")
    unit = str(system_unit(machine))
    said = machine.run("systemd-analyze", "security", "--offline=true", "--no-pager", unit).stdout
    found = re.search(r"Overall exposure level for hive-daemon.service: ([0-9.]+)", said)
    assert found and float(found[1]) < 3, said


def settings(unit: Path) -> set[str]:
    return set(re.findall(r"^(\w+)=", unit.read_text(), re.MULTILINE))


def test_a_users_unit_has_nothing_that_only_root_can_apply(installed: Machine) -> None:
    # Each of these makes a user's systemd fail to start the unit (218/CAPABILITIES), or makes
    # it imply PrivateUsers=, or, for StateDirectory=, means ~/.config/hive.
    pattern = r"Protect|Private|.*Paths|Capab|Ambient|State|Config|User$|RemoveIPC|Keyring"
    of_root = {name for name in settings(ROOT / "units/systemd/hive-daemon.service")}
    of_root = {name for name in of_root if re.match(pattern, name)}
    assert len(of_root) > 15
    assert not of_root & settings(installed.home / USER_UNIT)


def test_the_units_are_filled_in(installed: Machine, machine: Machine) -> None:
    of_user = installed.home / USER_UNIT
    for unit in (of_user, of_user.with_name("hive-web.service"), system_unit(machine)):
        lines = [line for line in unit.read_text().splitlines() if not line.startswith("#")]
        assert not [line for line in lines if "@" in line.replace("@system-service", "")]


def test_a_fault_in_the_configuration_is_not_tried_again(installed: Machine) -> None:
    unit = (installed.home / USER_UNIT).read_text()
    assert f"\nRestartPreventExitStatus={int(hive.Exit.USAGE)}\n" in unit


IN_A_PLACE_OF_ITS_OWN = """
mount --make-rprivate / && mount -t tmpfs none /run && mount -t cgroup2 none /sys/fs/cgroup ||
  exit 77
mkdir -p /run/systemd/system "$XDG_RUNTIME_DIR"
systemd --user >/dev/null 2>&1 &
until systemctl --user show-environment >/dev/null 2>&1; do sleep 0.05; done
exec </dev/null
set -ex
make -C "$ROOT" install
hive host --listen 127.0.0.1 --port "$PORT" --node alpha
make -C "$ROOT" install START=1
until systemctl --user show hive-daemon -p StatusText | grep "connected to"; do sleep 0.05; done
systemctl --user reload hive-host hive-daemon
hive doctor
systemctl --user show hive-host hive-daemon -p ActiveState -p NRestarts
make -C "$ROOT" uninstall
systemctl --user is-active hive-host hive-daemon || ! pgrep -x mosquitto
"""


def test_a_real_systemd_runs_the_daemon_and_the_carried_hive(machine: Machine) -> None:
    """A user's manager, in namespaces where the system seems to have been booted with it."""
    need_mosquitto()
    need("systemctl")
    if os.geteuid():
        pytest.skip("only root can have a place of its own for systemd")
    path = f"{machine.home}/.local/bin:{os.environ['PATH']}:/usr/sbin:/usr/lib/systemd"
    given = {"PATH": path, "ROOT": str(ROOT), "PYTHON": sys.executable, "PORT": str(free_port())}
    machine.with_paho().environment = {
        **{"HOME": str(machine.home), "XDG_RUNTIME_DIR": "/run/user/0"},
        **given,
    }
    place = (
        "timeout",
        "90",
        "unshare",
        "--mount",
        "--pid",
        "--cgroup",
        "--fork",
        "--kill-child",
        "--mount-proc",
    )
    done = machine.run(*place, "sh", "-c", IN_A_PLACE_OF_ITS_OWN)
    if done.returncode == 77 or "unshare:" in done.stderr:
        missing("no place of its own for systemd can be had here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "systemd keeps it running" in done.stdout and "started   systemctl" in done.stdout
    assert re.search("ok +hosting +Mosquitto is kept running by systemd", done.stdout)
    assert done.stdout.count("NRestarts=0\nActiveState=active\n") == 2, done.stdout
    assert "stopped   hive-host\n" in done.stdout and "inactive\ninactive\n" in done.stdout


# ---- launchd -----------------------------------------------------------------------------


def test_on_a_mac_launchd_gets_its_plist(tmp_path: Path) -> None:
    mac = Machine(tmp_path, "Darwin")
    mac.package("install")
    file = mac.inside(mac.home / PLIST)
    job = plistlib.loads(file.read_bytes())
    assert job["Label"] == file.stem
    assert job["ProgramArguments"] == [f"{mac.home}/.local/bin/hive", "daemon"]
    assert job["KeepAlive"] == {"SuccessfulExit": False}
    assert job["Umask"] == 0o077
    assert Path(job["StandardErrorPath"]).parent == mac.home / "Library/Logs"
    page = plistlib.loads(mac.inside(mac.home / PLIST.replace("daemon", "web")).read_bytes())
    assert page["ProgramArguments"] == [f"{mac.home}/.local/bin/hive", "web"]
    assert (page["Label"], page["StandardOutPath"]) == ("ai.hive.web", "/dev/null")
    assert not mac.inside(mac.home / USER_UNIT).exists()


@pytest.mark.parametrize("name", ["ai.hive.daemon", "ai.hive.web"])
def test_the_plist_passes_a_plist_checker(name: str) -> None:
    file = str(ROOT / f"units/launchd/{name}.plist")
    if need("plutil", "plistutil") == "plutil":
        subprocess.run(["plutil", "-lint", file], check=True)
    else:  # 2.2.0 ends with 0 whatever it found
        done = subprocess.run(["plistutil", "-i", file], capture_output=True, check=True)
        assert b"ERROR" not in done.stderr
        assert name.encode() in done.stdout


# ---- make install, make uninstall --------------------------------------------------------


def test_what_was_installed_runs_without_activating_anything(installed: Machine) -> None:
    for name in ("hive", "hive-cli"):
        program = str(installed.home / ".local/bin" / name)
        assert re.fullmatch(
            rf"hive {hive.__version__} \(\w{{8}}\)\n", installed.run(program, "--version").stdout
        )
        assert installed.run(program, "--help").stdout.startswith(f"usage: {name} ")
    done = installed.run(str(installed.home / ".local/bin/hive-cli"), "config")
    assert done.stderr == ""
    assert f'handler_dir = "{installed.home}/.config/hive/hive-daemon.d"' in done.stdout


def test_what_was_installed_has_paho(installed: Machine) -> None:
    port = "--port=1"  # nobody listens there; without paho-mqtt it would not get that far
    done = installed.run(str(installed.home / ".local/bin/hive-cli"), "status", port)
    assert done.returncode == hive.Exit.BROKER, done.stderr


def test_what_was_installed_has_its_help_also_for_man(installed: Machine) -> None:
    shown = installed.run(str(installed.home / ".local/bin/hive"), "help", "trust").stdout
    assert shown == (ROOT / "contrib/help/trust.md").read_text()
    pages = installed.home / ".local/share/man/man7"
    assert {page.name for page in pages.iterdir()} == {f"hive-{one}.7" for one in hive.TOPICS}


def test_uninstall_leaves_other_peoples_man_pages(machine: Machine) -> None:
    machine.package("install")
    theirs = machine.inside(machine.home / ".local/share/man/man7/hive-bees.7")
    theirs.write_text(".TH BEES 7\n")
    machine.package("uninstall")
    assert [*theirs.parent.iterdir()] == [theirs]


def test_installing_twice_changes_nothing(installed: Machine) -> None:
    before = everything(installed.home)
    said = installed.make("install")
    assert everything(installed.home) == before
    assert not re.search("^(made|installed|removed)", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (".config/hive", 0o700),
        (".config/hive/hive.toml", 0o600),
        (".config/hive/hive-daemon.d", 0o700),
        (".config/hive/hive-daemon.d/ping", 0o755),
        (".local/bin/hive", 0o755),
        (".local/bin/hive-cli", 0o755),
        (USER_UNIT, 0o644),
    ],
)
def test_only_you_may_read_your_configuration(installed: Machine, path: str, expected: int) -> None:
    assert mode(installed.home / path) == expected


def test_a_lax_or_strict_umask_changes_no_mode(machine: Machine) -> None:
    for umask in (0o000, 0o077):
        old = os.umask(umask)
        try:
            machine.package("install")
        finally:
            os.umask(old)
        config = machine.inside(machine.home / ".config/hive")
        assert [mode(config), mode(config / "hive.toml")] == [0o700, 0o600]
        assert mode(machine.inside(machine.home / ".local/bin/hive")) == 0o755
        shutil.rmtree(machine.root)


@pytest.mark.parametrize(
    ("system", "settings", "kept"),
    [
        ("Linux", [], "HOME/.config/hive"),
        ("Linux", ["PREFIX=/usr/local"], "etc/hive"),
        ("Linux", ["PREFIX=/opt/a b"], "etc/hive"),
        ("Darwin", [], "HOME/.config/hive"),
        ("Darwin", ["PREFIX=/usr/local"], None),
    ],
)
def test_uninstall_leaves_the_configuration_alone_and_nothing_else(
    tmp_path: Path, system: str, settings: list[str], kept: str | None
) -> None:
    machine = Machine(tmp_path, system)
    (machine.root / "usr/local/bin").mkdir(parents=True)
    before = set(everything(machine.root))
    machine.package("install", *settings)
    said = machine.package("uninstall", *settings)
    left = set(everything(machine.root)) - before
    if kept:
        folder = kept.replace("HOME", str(machine.home).lstrip("/"))
        there = ["", "/hive.toml", "/hive-daemon.d", "/hive-daemon.d/ping"]
        parents = {str(p) for p in Path(folder).parents} - {"."}
        assert left | before == {folder + rest for rest in there} | parents | before
        assert f"kept      {machine.root}/{folder}/hive.toml" in said
    else:
        assert left == set()
    assert everything(machine.home) == {}
    assert machine.told.read_text() == ""


def test_your_configuration_and_handlers_are_kept(machine: Machine) -> None:
    machine.put(".config/hive/hive.toml", "[node]\nid = 'mine'\n", 0o640)
    machine.put(".config/hive/hive-daemon.d/ping", "#!/bin/sh\necho mine\n", 0o700)
    machine.put(".config/hive/hive-daemon.d/other", "#!/bin/sh\n", 0o700)
    folder = machine.inside(machine.home / ".config/hive")
    shutil.copytree(machine.home / ".config/hive", folder)
    before = everything(folder)
    said = machine.package("install")
    assert said.count("kept ") == 2
    machine.package("uninstall")
    assert everything(folder) == before


def test_an_update_replaces_what_is_old(machine: Machine) -> None:
    machine.package("install")
    old = machine.inside(machine.home / ".local/lib/hive/hive.py")
    old.write_text("old\n")
    said = machine.package("install")
    assert old.read_bytes() == (ROOT / "hive.py").read_bytes()
    assert f"installed {old}\n" in said
    assert said.count("installed ") == 1


def test_another_program_called_hive_is_not_touched(machine: Machine) -> None:
    theirs = machine.put(".local/bin/hive", "#!/bin/sh\necho a warehouse\n", 0o755)
    said = machine.make("install", code=2)
    assert f"hive: {theirs} is not from here; move it away, or say another PREFIX\n" in said
    machine.make("uninstall")
    assert set(everything(machine.home)) == {".local", ".local/bin", ".local/bin/hive"}


@pytest.mark.parametrize(
    ("system", "unit", "told"),
    [
        (
            "Linux",
            USER_UNIT,
            [
                "systemctl --user daemon-reload",
                "systemctl --user stop hive-daemon",
                "systemctl --user try-restart hive-web",
                "systemctl --user enable --now hive-daemon",
            ],
        ),
        (
            "Darwin",
            PLIST,
            [
                "launchctl bootout gui/ME/ai.hive.daemon",
                "launchctl kickstart -k gui/ME/ai.hive.web",
                "launchctl print gui/ME/ai.hive.daemon",
                "launchctl bootstrap gui/ME HOME/Library/LaunchAgents/ai.hive.daemon.plist",
            ],
        ),
    ],
)
def test_start_1_starts_it_and_uninstall_stops_it(
    tmp_path: Path, system: str, unit: str, told: list[str]
) -> None:
    machine = Machine(tmp_path, system).with_paho()
    there = everything(machine.home).keys() - {".local/lib/hive"}
    assert "started " in machine.make("install", "START=1")
    text = machine.told.read_text().replace(f"gui/{os.getuid()}", "gui/ME")
    assert text.replace(str(machine.home), "HOME").splitlines() == told
    assert (machine.home / unit).exists()

    assert "stopped   hive-daemon\n" in machine.make("uninstall")
    assert machine.told.read_text() != text
    left = {path for path in everything(machine.home) if not path.startswith(".config")}
    assert left <= there | {".local/lib/hive"}


@pytest.mark.parametrize(
    ("system", "file", "told"),
    [
        ("Linux", ".config/systemd/user/hive-host.service", "systemctl --user disable --now HOST"),
        ("Darwin", "Library/LaunchAgents/ai.hive.host.plist", "launchctl bootout gui/ME/ai.HOST"),
    ],
)
@pytest.mark.parametrize("here", [True, False], ids=["of this hive", "of another one"])
def test_uninstall_takes_the_unit_of_a_carried_hive_and_leaves_its_data(
    tmp_path: Path, system: str, file: str, told: str, here: bool
) -> None:
    machine = Machine(tmp_path, system)
    program = machine.home / ".local/lib/hive/hive.py" if here else Path("/src/hive/hive.py")
    command = ["/usr/bin/python3", str(program), "host", "--foreground"]
    text = hive.systemd_unit(command)
    unit = machine.put(file, text if system == "Linux" else hive.launchd_agent(command, tmp_path))
    data = machine.put(".local/state/hive/alpha/mosquitto/passwords", "")
    said = machine.make("uninstall")
    told = told.replace("ai.HOST", "ai.hive.host").replace("HOST", "hive-host")
    did = told.replace("ME", str(os.getuid())) in machine.told.read_text()
    assert (did, unit.exists(), "stopped   hive-host\n" in said) == (here, not here, here)
    assert data.exists() and f"kept      {machine.home}/.local/state/hive\n" in said


def test_an_update_with_start_1_restarts_what_has_changed(machine: Machine) -> None:
    machine.with_paho().make("install", "START=1")
    for old, restarted in ((False, False), (True, True)):
        if old:
            machine.put(".local/lib/hive/hive.py", "old\n")
        machine.told.write_text("")
        machine.make("install", "START=1")
        assert ("systemctl --user stop hive-daemon" in machine.told.read_text()) == restarted
        assert "systemctl --user enable --now hive-daemon" in machine.told.read_text()


def test_start_1_says_so_where_nothing_can_start_it(machine: Machine) -> None:
    machine.environment["NO_MANAGER"] = "1"
    said = machine.with_paho().make("install", "START=1")
    assert said.count("skipped   START=1: neither systemd nor launchd is at work here; run: ") == 1


def test_without_start_1_it_says_how_to_start(machine: Machine) -> None:
    said = machine.with_paho().make("install")
    assert "next      systemctl --user enable --now hive-daemon\n" in said
    assert machine.told.read_text() == ""


def test_a_prefix_that_systemd_cannot_run_is_refused(machine: Machine) -> None:
    said = machine.make("install", f"PREFIX={machine.home}/it's", code=2)
    assert "it's/bin: systemd runs nothing whose path has a quote" in said
    assert everything(machine.home) == {}


def test_a_relative_prefix_is_refused(machine: Machine) -> None:
    said = machine.make("install", "PREFIX=usr", code=2)
    assert "hive: PREFIX=usr: expected a path that begins with /\n" in said


# ---- The example handlers ----------------------------------------------------------------

EXAMPLES = ROOT / "contrib/handlers"


def test_the_examples_are_handlers() -> None:
    found = hive.scan_handlers(EXAMPLES)
    assert {*found.handlers} >= {"echo", "ping", "whoami"}
    assert found.refused == {}


def answer(action: str, **message: str) -> subprocess.CompletedProcess[str]:
    """Run an example as hive does."""
    document = {"from": "alpha", "to": "beta", "ch": "command", "text": "hello", **message}
    document |= {"action": action, "urgency": "now"}
    envelope = hive.Envelope.parse(json.dumps({"v": 1, "id": "1", "ts": 1, **document}).encode())
    return subprocess.run(
        [EXAMPLES / action],
        input=envelope.encode().decode() + "\n",
        capture_output=True,
        text=True,
        cwd=EXAMPLES,
        env=hive.handler_environment(envelope, "beta", "hive", None, os.environ),
    )


def test_ping_answers_pong() -> None:
    assert answer("ping").stdout == "pong from beta\n"


def test_echo_answers_what_it_was_sent() -> None:
    text = "two\nlines, `$(id)` and ü\U0001f41d"
    done = answer("echo", text=text)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{text}\n", "")


def test_whoami_tells_what_a_handler_is_given() -> None:
    done = answer("whoami")
    told = json.loads(done.stdout)
    assert told["envelope"]["text"] == "hello"
    assert told["environment"]["HIVE_FROM"] == "alpha"
    assert told["directory"] == str(EXAMPLES)


def test_whoami_shows_how_to_refuse() -> None:
    done = answer("whoami", ch="sync")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "whoami only answers commands\n"


def test_the_systems_daemon_and_its_command_line_meet_in_one_state_directory(
    machine: Machine,
) -> None:
    system_unit(machine)
    config = machine.inside("/etc/hive/hive.toml")
    shown = machine.run(sys.executable, str(ROOT / "hive.py"), "--config", str(config), "config")
    assert 'state_dir = "/var/lib/hive"' in shown.stdout, shown.stderr
