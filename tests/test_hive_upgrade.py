"""The hive-upgrade handler: what it refuses, a power cut at each step, daemons that begin again."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Broker, Daemon, Hive, eventually, missing
from feed import Feed, Reply, self_signed

HANDLER = ROOT / "contrib" / "handlers" / "hive-upgrade"
CONTRACT = "[handlers.hive-upgrade]\nretry = true\ntimeout = 300\n"

# A hive.py that is small, and says what the handler asks for.
STUB = """\
#!/usr/bin/env python3
__version__ = "1.0.0"
import json
import os
import sys

DAEMON = lambda: 0
DOCTOR = []
def main():
    if "--version" in sys.argv:
        print(f"hive {__version__} (12345678)")
    elif "metrics" in sys.argv:
        print(f'hive_build_info{{node="a",version="{__version__}",build="12345678"}} 1')
        print("hive_connected 1")
    elif "config" in sys.argv:
        print("[handlers.hive-upgrade]\\nretry = true")
    elif "doctor" in sys.argv:
        print(json.dumps(DOCTOR))
    elif "daemon" in sys.argv:
        print("runs", __version__, flush=True)
        return DAEMON()
    return 0
if __name__ == "__main__":
    sys.exit(main())
"""
KILLED = "lambda: os.kill(os.getpid(), 9)"
# The handler, killed at its Nth step that changes a file; it ends where it signals its daemon.
STEPS = """\
import os, runpy, sys
from importlib.machinery import SourceFileLoader
file, left = sys.argv[1], int(sys.argv[2])
def step(what):
    def call(*given, **more):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), 9)
        return what(*given, **more)
    return call
for name in ("replace", "rename", "unlink"):
    setattr(os, name, step(getattr(os, name)))
if file.endswith("hive-upgrade"):
    handler = SourceFileLoader("handler", file).load_module()
    handler.LOCK_LOOKS = 1
    handler.daemon = os.getppid
    handler.begin_again = step(lambda installed: sys.exit("the daemon is told"))
    handler.main()
else:
    sys.argv = [file, "daemon"]
    runpy.run_path(file, run_name="__main__")
"""


class Place:
    """A node's program and configuration, and where new ones come from."""

    def __init__(self, home: Path) -> None:
        self.home, self.lib, self.config = home, home / "lib", home / "hive-upgrade.toml"
        self.new = home / "releases" / "hive.py"
        self.lib.mkdir(parents=True)
        self.new.parent.mkdir()
        shutil.copy(ROOT / "hive-cli", self.lib)
        (self.lib / "hive.py").write_text(STUB)
        self.program = [sys.executable, str(self.lib / "hive-cli")]
        self.configure()
        self.release("2.0.0")

    def configure(self, **more: object) -> None:
        said = {"from": str(self.new), "patience": 5, **more}
        self.config.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in said.items()))
        self.config.chmod(0o600)

    def release(self, version: str, text: str = STUB, **changes: str) -> None:
        """Put a new one there, with its checksum."""
        text = re.sub(r"(?m)^__version__ = .*$", f'__version__ = "{version}"', text)
        for name, value in changes.items():
            said = f"{name} = {value}".replace("\\", r"\\")
            text = re.sub(rf"(?m)^{name} = .*$", said, text)
        self.new.write_text(text)
        sum_ = hashlib.sha256(self.new.read_bytes()).hexdigest()
        self.new.with_name("hive.py.sha256").write_text(f"{sum_}  hive.py\n")

    def run(
        self, text: object = "latest", kill_at: int = 0, **how: Any
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "HIVE_ID": "id-1",
            "HIVE_CMD": " ".join(self.program),
            "HIVE_CONFIG": str(self.home / "hive.toml"),
            "HIVE_STATE_DIR": str(self.home),
            "HIVE_TIMEOUT": "300",
            **how.pop("environment", {}),
        }
        return subprocess.run(
            [sys.executable, "-c", STEPS, HANDLER, str(kill_at)],
            input=json.dumps({"text": text}),
            capture_output=True,
            text=True,
            env=environment,
            timeout=60,
            **how,
        )

    def refused(self, text: object = "latest", **how: Any) -> str:
        """Why it does nothing."""
        before = self.files()
        done = self.run(text, **how)
        assert (done.returncode, done.stdout) == (1, ""), done
        assert self.files() == before
        line = done.stderr.removeprefix("hive-upgrade: ").removesuffix("\n")
        assert "\n" not in line, line
        return line.replace(str(self.home), "~")

    def files(self) -> dict[str, bytes]:
        return {
            one.name: one.read_bytes()
            for one in self.lib.iterdir()
            if one.is_file() and one.name != "hive-trial.lock"
        }

    def begin(self, kill_at: int = 0) -> tuple[int, str]:
        """Start the daemon, as its service manager does; how it ended, and what it said."""
        program = [sys.executable, "-c", STEPS, self.program[1], str(kill_at)]
        words = program if kill_at else [*self.program, "daemon"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout

    @property
    def version(self) -> str:
        return subprocess.run([*self.program, "--version"], capture_output=True, text=True).stdout


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "node")


# -- what is refused --


def test_a_message_names_a_version_at_most(place: Place) -> None:
    for text in ("https://evil.example/hive.py", "~/hive.py", "", "2.0.0; x", None, ["2.0.0"]):
        assert place.refused(text).endswith("is no version of numbers, as in 0.3.0")
    assert place.refused("3.0.0") == "~/releases/hive.py has 2.0.0, not 3.0.0"
    assert "the daemon is told" in place.run("2.0.0").stderr


@pytest.mark.parametrize(
    ("version", "changes", "why"),
    [
        ("0.9.0", {}, "~/releases/hive.py has 0.9.0, which is older than 1.0.0 (12345678)"),
        (
            "1.0.0",
            {"DAEMON": "1"},
            "~/releases/hive.py has another 1.0.0 than 1.0.0 (12345678): its __version__ must tell"
            " which is newer",
        ),
        ("2.0.0rc1", {}, "'2.0.0rc1' is no version of numbers, as in 0.3.0"),
        ("2.0.0", {"def main": "(:"}, "~/releases/hive.py: not what hive.py.sha256 says"),
        (
            "2.0.0",
            {"DAEMON": "("},
            "--version of it fails: SyntaxError: '(' was never closed",
        ),
        (
            "2.0.0",
            {"DOCTOR": '[{"check": "config", "level": "fail", "what": "no"}]'},
            "doctor of 2.0.0 (12345678) finds what 1.0.0 (12345678) does not: config: no",
        ),
    ],
)
def test_what_is_not_well_changes_nothing(
    place: Place, version: str, changes: dict[str, str], why: str
) -> None:
    if why.endswith("sha256 says"):
        place.new.write_text(place.new.read_text()[:-20])
        why += ": cut short, or changed"
    else:
        place.release(version, **changes)
    assert place.refused() == why


def test_what_was_wrong_before_does_not_count(place: Place) -> None:
    found = '[{"check": "agent main", "level": "fail", "what": "down"}]'
    file = place.lib / "hive.py"
    file.write_text(file.read_text().replace("DOCTOR = []", f"DOCTOR = {found}"))
    place.release("2.0.0", DOCTOR=found)
    assert "the daemon is told" in place.run().stderr


def test_only_what_can_go_back_is_replaced(place: Place, tmp_path: Path) -> None:
    def other(file: Path) -> str:
        command = {"HIVE_CMD": f"{sys.executable} {file}"}
        return place.refused(environment=command).replace(str(tmp_path), "~~")

    alone = tmp_path / "hive.py"
    alone.write_text(STUB)
    assert (
        other(alone) == "~~/hive.py runs without hive-cli, which would go back: copy that beside it"
    )
    one = tmp_path / "dist"
    one.write_bytes(b"#!/usr/bin/env python3\nPK\x03\x04")
    assert other(one) == "~~/dist is one file of `make dist`: copy a new one over it"
    pip = tmp_path / "bin" / "hive"
    pip.parent.mkdir()
    pip.write_text("#!python\nfrom hive import main")
    assert other(pip) == "no hive.py beside ~~/bin/hive: what pip or pipx installed they upgrade"
    shutil.copy(alone, pip.parent)
    old = "~~/bin/hive is of before 0.2.0, and could not go back: copy a new one once"
    assert other(pip) == old
    (pip.parent / ".git").mkdir()
    checkout = "~~/bin is a git checkout: git pull, or git-sync, upgrades it"
    assert other(pip) == checkout
    before = place.refused(environment={"HIVE_CMD": ""})
    assert before == "HIVE_CMD is missing: only a daemon of hive 0.2.0 or newer can run this"


def test_the_configuration_is_this_users(place: Place) -> None:
    place.config.chmod(0o622)
    why = place.refused()
    assert why == "~/hive-upgrade.toml: others may write it; try: chmod go-w ~/hive-upgrade.toml"
    for said, why in {
        'from = "http://x"': "from: expected https://..., or a path that begins with / or ~/",
        'from = "/x"\nurl = 1': "url: no such key (there are from, signed_by, patience)",
        'from = "/x"\npatience = 1': "patience: expected seconds, 5 to 600",
        'from = "/x"\nsigned_by = 1': "signed_by: expected the name of a file",
    }.items():
        place.config.write_text(said)
        place.config.chmod(0o600)
        assert place.refused() == f"~/hive-upgrade.toml: {why}"
    place.config.write_text('from = "/nowhere/hive.py"')
    assert place.refused() == "/nowhere/hive.py: No such file or directory"
    place.config.unlink()
    assert place.refused().startswith("~/hive-upgrade.toml is missing; ")
    short = place.refused(environment={"HIVE_TIMEOUT": "30"})
    assert short == "hive.toml needs [handlers.hive-upgrade] with retry = true and timeout = 300"


def keygen(*words: str | Path, stdin: str = "") -> None:
    if not shutil.which("ssh-keygen"):
        missing("ssh-keygen is missing: no signature is verified (apt-get install openssh-client)")
    subprocess.run(["ssh-keygen", *words], check=True, capture_output=True, text=True, input=stdin)


def test_only_who_is_named_may_sign(place: Place) -> None:
    for who in ("ada", "mallory"):
        keygen("-q", "-t", "ed25519", "-N", "", "-f", place.home / who)
    signers = place.home / "allowed"
    signers.write_text("ada@example.org " + (place.home / "ada.pub").read_text())
    signers.chmod(0o644)
    place.configure(signed_by="allowed")

    def sign(who: str, namespace: str = "hive") -> None:
        place.new.with_name("hive.py.sig").unlink(missing_ok=True)
        keygen("-Y", "sign", "-n", namespace, "-f", place.home / who, place.new)

    assert place.refused() == "~/releases/hive.py.sig: No such file or directory"
    sign("mallory")
    assert "nobody of ~/allowed has signed it" in place.refused()
    sign("ada", "file")  # for another purpose
    assert "its signature is not valid" in place.refused()
    sign("ada")
    place.release("2.0.0", DAEMON="1")
    assert "its signature is not valid" in place.refused()
    sign("ada")
    assert "the daemon is told" in place.run().stderr


def test_a_web_site_is_a_place_too(place: Place) -> None:
    if not shutil.which("openssl"):
        missing("openssl is missing: no web site to fetch from (apt-get install openssl)")
    site = Feed(certificate := self_signed(place.home))
    files = {f"/hive.py{end}": place.new.with_name(f"hive.py{end}") for end in ("", ".sha256")}

    def reply(asked: BaseHTTPRequestHandler) -> Reply:
        file = files.get(asked.path)
        return (200, {}, file.read_bytes()) if file else (404, {}, b"")

    with contextlib.closing(site):
        site.reply = reply
        place.configure(**{"from": site.url.replace("c.ics", "hive.py")})
        assert "certificate verify failed" in place.refused()
        trusted = {"SSL_CERT_FILE": str(certificate)}
        del files["/hive.py.sha256"]
        assert place.refused(environment=trusted).endswith("hive.py.sha256: Not Found")
        files["/hive.py.sha256"] = place.new.with_name("hive.py.sha256")
        site.reply = lambda asked: (200, {}, bytes(5 << 20))
        assert place.refused(environment=trusted).endswith("/hive.py: more than 4096 KiB")
        site.reply = reply
        assert "the daemon is told" in place.run(environment=trusted).stderr


def test_two_at_once_and_a_full_disk(place: Place) -> None:
    with (place.lib / "hive-trial.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert place.refused() == "another hive-upgrade is at work in ~/lib"

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))

    uncompiled = {"PYTHONDONTWRITEBYTECODE": "1"}
    assert "File too large" in place.refused(preexec_fn=small, environment=uncompiled)


# -- the power goes --


def steps(place: Place, tmp_path: Path, kill: Callable[[Place, int], bool]) -> Iterator[Place]:
    """The same place, killed at each step that leaves something else behind."""
    seen = list[dict[str, bytes]]()
    for n in range(1, 60):
        copy = Place(tmp_path / f"cut{n}")
        copy.release("2.0.0", place.new.read_text())
        if not kill(copy, n):
            assert len(seen) > 2
            return
        assert copy.version in ("hive 1.0.0 (12345678)\n", "hive 2.0.0 (12345678)\n")
        if (left := copy.files()) not in seen:
            seen.append(left)
            yield copy
    raise AssertionError("more steps than can be")


def cut(place: Place, n: int) -> bool:
    return place.run(kill_at=n).returncode == -9


def test_after_a_power_cut_at_any_step_it_is_finished_or_goes_back(
    place: Place, tmp_path: Path
) -> None:
    place.release("2.0.0", DAEMON=f"{KILLED} if os.path.exists(__file__ + '.bad') else 0")
    seen = set()
    for one in steps(place, tmp_path, cut):
        was = one.version
        shutil.copytree(one.lib, one.home / "saved")
        (one.lib / "hive.py.bad").touch()
        assert [one.begin() for _ in range(4)][-1] == (0, "runs 1.0.0\n")
        gone = not (one.lib / "hive-trial.py").exists()
        assert gone or was.startswith("hive 1")  # nothing was done yet

        shutil.rmtree(one.lib)
        (one.home / "saved").rename(one.lib)
        code, said = one.begin()  # the machine is there again
        assert (code, said) == (0, was.replace("hive ", "runs ").replace(" (12345678)", ""))
        done = one.run()  # and the daemon goes on with what it owes
        if "the daemon is told" in done.stderr:
            one.begin()
            done = one.run()
        assert done.stdout == "2.0.0 (12345678), was 1.0.0 (12345678)\n", done
        assert not (one.lib / "hive-trial.py").exists()
        seen.add(was)
    assert len(seen) == 2


def test_a_power_cut_while_it_goes_back(place: Place, tmp_path: Path) -> None:
    place.release("2.0.0", DAEMON="lambda: 3")

    def cut_back(one: Place, n: int) -> bool:
        one.run()
        return one.begin(kill_at=n)[0] == -9

    for one in steps(place, tmp_path, cut_back):
        assert one.begin()[1].endswith("runs 1.0.0\n")
        done = one.run()
        assert done.stderr.startswith("hive-upgrade: 2.0.0 (12345678) was not well: "), done
        assert not (one.lib / "hive-trial.py").exists()


@pytest.mark.parametrize(
    ("daemon", "why"),
    [
        ("3", "it ended with exit code 3"),
        ("sys.exit(4)", "it ended with exit code 4"),
        ("1 / 0", "it ended with ZeroDivisionError: division by zero"),
        ("__import__('time').sleep(60)", "it was not connected within 5 s"),
    ],
)
def test_one_that_fails_goes_back_in_the_same_process(place: Place, daemon: str, why: str) -> None:
    place.release("2.0.0", DAEMON=f"lambda: {daemon}")
    place.run()
    assert place.begin() == (0, "runs 2.0.0\nruns 1.0.0\n")
    done = place.run()
    said = f"hive-upgrade: 2.0.0 (12345678) was not well: {why}; 1.0.0 (12345678) runs again\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert place.begin() == (0, "runs 1.0.0\n")


def test_a_trial_concerns_daemons_alone(place: Place) -> None:
    place.release("2.0.0", DAEMON="lambda: 3")
    place.run()
    for words in (["--version"], ["send", "--text=daemon"], ["--config", "daemon", "metrics"]):
        subprocess.run([*place.program, *words], check=True, capture_output=True)
    assert json.loads((place.lib / "hive-trial.json").read_text()).get("tries", 0) == 0
    words = ["--config", "x", "--node=y", "daemon"]
    done = subprocess.run([*place.program, *words], capture_output=True, text=True)
    assert done.stdout == "runs 2.0.0\nruns 1.0.0\n"


# -- real daemons --


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs as installed, so that each test need not compile them."""
    lib = tmp_path_factory.mktemp("installed") / "lib"
    lib.mkdir()
    for name in ("hive.py", "hive-cli"):
        shutil.copy2(ROOT / name, lib)
    subprocess.run([sys.executable, lib / "hive-cli", "--version"], check=True)
    return lib


class Fleet:
    """Alpha, which asks, and beta with a program of its own."""

    def __init__(self, hive: Hive, compiled: Path) -> None:
        self.hive = hive
        hive.node("alpha").start()
        self.place = Place(hive.home / "upgrade")
        shutil.rmtree(self.place.lib)
        shutil.copytree(compiled, self.place.lib)
        self.beta = hive.node("beta", CONTRACT)
        shutil.copy(HANDLER, self.beta.handlers)
        shutil.copy(self.place.config, self.beta.home)
        (self.beta.home / "hive-upgrade.toml").chmod(0o600)
        self.beta.handler("ping", "#!/bin/sh\necho pong\n")
        self.start()

    def start(self, wait: bool = True) -> Daemon:
        ours, self.hive.program = self.hive.program, self.place.program
        self.beta.start(wait)
        self.hive.program = ours
        if wait:
            self.hive.nodes["alpha"].logged("peer is up", peer="beta")
        return self.beta

    def release(self, change: str = "") -> None:
        text = (ROOT / "hive.py").read_text()
        place = "    start_again()\n    config = config_of(args, load_config)\n"
        assert text.count(place) == 1
        self.place.release("99.0.0", text.replace(place, f"    {change or 'pass'}\n{place}"))

    def upgrade(self, code: int = 0, text: str = "latest") -> str:
        words = ("--action", "hive-upgrade", "--text", text, "--wait", "50")
        done = self.hive.cli("alpha", "send", "--to", "beta", *words, code=code)
        return done.stdout + done.stderr

    def version(self) -> str:
        rows = json.loads(self.hive.cli("alpha", "status", "beta", "--json").stdout)
        return str(rows[0]["version"])


@pytest.fixture
def fleet(hive_of: Callable[..., Hive], shared_broker: Broker, compiled: Path) -> Fleet:
    return Fleet(hive_of(shared_broker, interval=5.0), compiled)  # to compile takes the CPU


def test_a_node_is_upgraded_by_a_message_and_answers_as_the_new_one(fleet: Fleet) -> None:
    fleet.release()
    old, pid = fleet.version(), fleet.beta.pid
    said = fleet.upgrade()
    new = said.partition(",")[0]
    assert said == f"{new}, was {old}\n" and new.startswith("99.0.0 (")
    assert fleet.beta.process and fleet.beta.process.poll() is None
    assert Path(f"/proc/{pid}").exists() or sys.platform != "linux"
    eventually("the others see it", lambda: fleet.version() == new)
    assert len(fleet.beta.events("starting")) == 2
    assert fleet.upgrade() == f"{new} runs already\n"
    fleet.hive.program = fleet.place.program
    by_hand = ("handler", "test", "hive-upgrade", "--text", "latest")
    why = "hive-upgrade: no daemon runs this: hive send --to NODE --action hive-upgrade\n"
    assert why in fleet.hive.cli("beta", *by_hand, code=1).stderr
    assert fleet.upgrade(1, "0.1.0").endswith("hive.py has 99.0.0, not 0.1.0\n")
    lost = [row["why"] for row in fleet.hive.nodes["alpha"].events("peer is lost")]
    assert lost == []
    done = fleet.hive.cli(
        *("alpha", "send", "--to", "beta", "--action", "ping", "--text", "x", "--wait", "20")
    )
    assert done.stdout == "pong\n"


def test_a_node_whose_new_program_fails_answers_as_the_old_one(fleet: Fleet) -> None:
    fleet.release('raise ConfigError("of no use")')
    old = fleet.version()
    said = fleet.upgrade(1)
    assert said.endswith(f" was not well: it ended with exit code 2; {old} runs again\n")
    assert fleet.beta.process and fleet.beta.process.poll() is None
    assert fleet.version() == old


def test_a_daemon_that_is_killed_on_trial_goes_back_at_its_fourth_start(fleet: Fleet) -> None:
    fleet.release("os.kill(os.getpid(), 9)")
    old = fleet.version()
    words = ("--action", "hive-upgrade", "--text", "latest", "--wait", "200")
    asking = subprocess.Popen(
        fleet.hive.command_line("alpha", "send", "--to", "beta", *words),
        stderr=subprocess.PIPE,
        env=fleet.hive.environment,
        text=True,
    )
    assert fleet.beta.process and fleet.beta.process.wait(100) == -signal.SIGKILL
    for _ in range(2):
        assert fleet.start(wait=False).process.wait(60) == -signal.SIGKILL  # type: ignore[union-attr]
    fleet.start()
    _, said = asking.communicate(timeout=60)
    why = "it was begun 3 times, and never well"
    assert said.endswith(f" was not well: {why}; {old} runs again\n")
    assert asking.returncode == 1
