#!/usr/bin/env python3
"""make demo: what hive does, shown on this machine alone in a few seconds.

Two nodes, of which one hosts the broker, and a stand-in for an agent, in a new folder below
$TMPDIR or /tmp; with --live three at work, of which one is in trouble, until Ctrl-C.  Nothing else
is touched or asked: each path is in the folder's own configurations, so a hive, a Mosquitto or a
HIVE_CONFIG of yours is not met.  What is printed behind a $ is what is run.

Two processes.  One shows, in a session of its own; whatever happens to it, the other ends all that
was started and removes the folder.  With --keep it is left as it is, with a script that ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = os.path.abspath(sys.executable)
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LONGEST_FOLDER = 80  # bytes; the sockets in it have a path of 100 at most
PATIENCE = 30.0  # seconds for each command, and for what it shall show in the end
LOOK_AGAIN = 0.1  # seconds
LONGEST_LINE = 400  # characters that say why it failed
TIME_TO_STOP = 5.0  # seconds; then SIGKILL
PACE = 1.0  # seconds between two messages of a live one
PAST = 150.0  # seconds that pictures show


class Failed(Exception):
    """One line for the person who watches."""


# ---- The folder: what is in it, and how it ends ------------------------------------------

NODES = ("alpha", "beta", "gamma")  # the last one only in a live one
CONFIG = """\
[node]
id = "{node}"
state_dir = "{node}"
handler_dir = "{node}.d"
[broker]
socket = "broker"
state_dir = "."
[heartbeat]
interval = 1
"""
AGENT_CONFIG = """\
[[oc_instances]]
name = "main"
command = [{agent}, "{{ch}}", "{{id}}", "{{text}}"]
"""
AGENT = """\
#!/bin/sh
# Stands in for an AI agent: writes down what it is told, and answers commands.
cd "$(dirname "$0")" && echo "$3" >>agent.said
if [ "$1" = command ]; then
  hive reply --config beta.toml --to-msg "$2" --text "I looked: all green"
fi
"""
HANDLER = """\
#!/bin/sh
# The file's name is the action, and what it prints is the answer.
echo "$HIVE_NODE runs $(uname -sm), dear $HIVE_FROM"
"""
TROUBLED_CONFIG = """\
[[oc_instances]]
name = "watch"
via = "hook"
hook_url = "http://127.0.0.1:9/hooks/wake"
hook_token = "nobody listens there"
[[schedule]]
action = "backup"
every = "20s"
"""
FAILING_HANDLER = """\
#!/bin/sh
echo "backup: /srv is full: 41 GB needed, 3 GB free" >&2
exit 1
"""
# Whatever daemon is started here, by whomever: its process id is known at the end.
HIVE_CLI = """\
#!/bin/sh
case " $* " in *" daemon "* | *" web "*) echo $$ >>{pids} ;; esac
XDG_STATE_HOME={folder}
export XDG_STATE_HOME
exec {python} {hive_cli} "$@"
"""
END = """\
#!/bin/sh
exec {python} {demo} --end {folder}
"""


def new_folder() -> Path:
    """An empty one that is ours alone, with a path short enough for sockets."""
    places = [place for place in (tempfile.gettempdir(), "/tmp") if os.path.isdir(place)]
    for place in places:
        if len(os.fsencode(place)) + len("/hive-demo-12345678") <= LONGEST_FOLDER:
            return Path(tempfile.mkdtemp(prefix="hive-demo-", dir=place)).resolve()
    raise Failed(f"{places[0]}: too long a path for sockets; set TMPDIR to a shorter one")


def furnish(folder: Path) -> None:
    """Put everything into it that the commands use."""
    quoted = {
        "python": shlex.quote(PYTHON),
        "hive_cli": shlex.quote(str(ROOT / "hive-cli")),
        "demo": shlex.quote(str(Path(__file__).resolve())),
        "folder": shlex.quote(str(folder)),
        "pids": shlex.quote(str(folder / "pids")),
    }
    alpha, beta, gamma = (CONFIG.format(node=node) for node in NODES)
    agent = json.dumps(str(folder / "agent"))
    files = {
        "alpha.toml": alpha,
        "beta.toml": beta + AGENT_CONFIG.format(agent=agent),
        "gamma.toml": gamma + TROUBLED_CONFIG,
        "beta.d/info": HANDLER,
        "gamma.d/info": HANDLER,
        "gamma.d/backup": FAILING_HANDLER,
        "alpha.log": "",
        "agent": AGENT,
        "bin/hive": HIVE_CLI.format(**quoted),
        "end": END.format(**quoted),
    }
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
        file.chmod(0o600 if name.endswith(".toml") else 0o700)
    if not os.access(folder / "end", os.X_OK):
        raise Failed(f"{folder}: no program may run there; set TMPDIR to another place")


def command_line(pid: int) -> str:
    """What a process was started with; empty if it has ended, even if nobody has noticed yet."""
    if os.path.isdir("/proc/self"):
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("latin-1")
        return ""
    ps = ["ps", "-o", "args=", "-p", str(pid)]
    return subprocess.run(ps, capture_output=True, text=True, errors="replace").stdout


def runs(pid: int) -> bool:
    """Is this still a daemon or page of the folder, and not another process with its number?"""
    return bool(re.search(r"hive-cli (.* )?(daemon|web)\b", command_line(pid)))


def stop(pid: int) -> None:
    """Ask it to end, wait until it has, and insist."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + TIME_TO_STOP
        with contextlib.suppress(ProcessLookupError):
            if runs(pid):
                os.kill(pid, number)
        while runs(pid) and time.monotonic() < until:
            time.sleep(0.01)


def end(folder: Path) -> None:
    """End what was started in it, the first one last, and remove it."""
    with contextlib.suppress(OSError):
        for pid in reversed((folder / "pids").read_text().split()):
            stop(int(pid))
    until = time.monotonic() + TIME_TO_STOP
    while folder.exists():  # a command that is just ending may write a last line
        shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() > until:
            raise Failed(f"{folder}: could not be removed")


# ---- The show: what is typed, and what it has to show ------------------------------------


def start(node: str) -> str:
    return f"hive daemon --config {node}.toml >>{node}.log 2>&1 & echo $! >{node}.pid"


# A line that says what happens; then commands, each with what its output must show in the end.
STEPS: list[tuple[str, list[tuple[str, str]]]] = [
    (
        "A node. It hosts the broker itself, on a socket that only you can open.",
        [(start("alpha"), ""), ("fold -s -w 78 alpha.log", "hosting the broker")],
    ),
    (
        "Another one meets it there. Each would have a machine of its own.",
        [
            (start("beta"), ""),
            ("hive status --config alpha.toml", r"(?s)alpha +online.*beta +online"),
            ("hive roster --config alpha.toml", r"(?s)alpha .*beta +main +info"),
        ],
    ),
    (
        "A handler is an executable. It does what needs no agent, and costs no token.",
        [
            ("cat beta.d/info", "HIVE_NODE"),
            (
                "hive send --config alpha.toml --to beta --action info --text hi --wait 20",
                "beta runs",
            ),
        ],
    ),
    (
        "What no handler does wakes beta's agent: here a script that stands in for it.",
        [
            (
                'hive send --config alpha.toml --to beta --text "is it green?" --wait 20',
                "all green",
            ),
            ("fold -s -w 78 agent.said", "is it green"),
        ],
    ),
    (
        "Every node knows what it sent and received.",
        [("hive log --config alpha.toml", "all green")],
    ),
    (
        "Somebody kills beta. alpha notices, and alerts everybody.",
        [
            ("kill -9 $(cat beta.pid)", ""),
            ("hive log --config alpha.toml --ch alert", "beta is lost"),
            ("hive status --config alpha.toml", r"beta +offline"),
        ],
    ),
    (
        "What beta is asked meanwhile waits for it.",
        [
            (
                "hive send --config alpha.toml --to beta --action info --text hi --corr x1",
                "sent",
            ),
            ("hive pending --config alpha.toml", r"beta +info"),
        ],
    ),
    (
        "beta comes back, and does it. This is the exchange, whole.",
        [
            (start("beta"), ""),
            ("hive show --config alpha.toml x1", "beta runs"),
        ],
    ),
]

# What they say to each other in a live one, over and over; what gamma's agent is asked, waits.
TRAFFIC = (
    'alpha.toml --to beta --text "is the build green?" --ttl 600',
    "beta.toml --to gamma --action info --text hi",
    "alpha.toml --to all --ch status --urgency later --text 'main is at 4f2a9c1'",
    "gamma.toml --to beta --action info --text hi",
    'beta.toml --to gamma --text "who keeps watch tonight?" --ttl 90',
    "alpha.toml --to gamma --action info --text hi",
    "alpha.toml --to gamma --action backup --text now",
)


def say(line: str = "", bold: bool = False) -> None:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if bold and sys.stdout.isatty() and not plain:
        line = f"\033[1m{line}\033[0m"
    print(line, flush=True)


def complain(why: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that was closed
        print(f"demo: {why[:LONGEST_LINE]}", file=sys.stderr, flush=True)


def free_port() -> int:
    """The page's own, where nobody listens there."""
    for port in (8484, 0):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            return int(sock.getsockname()[1])
    raise Failed("no port is free for the page")


def as_typed_after(folder: Path) -> str:
    return f"cd {shlex.quote(str(folder))} && PATH=$PWD/bin:$PATH"


def run(command: str, folder: Path) -> str:
    """What it prints; raises Failed if it does not end well, or not at all."""
    environment = {**os.environ, "PATH": f"{folder}/bin:{os.environ.get('PATH', os.defpath)}"}
    environment.pop("NOTIFY_SOCKET", None)  # a systemd that watches over us, not over the daemons
    child = subprocess.Popen(
        ["sh", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    try:
        output, _ = child.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise Failed(f"no end in {PATIENCE:g} s: {command}") from None
    if child.returncode:
        raise Failed(f"exit {child.returncode}: {command}: {last_line(output)}")
    return output


def last_line(output: str) -> str:
    return (output.strip().splitlines() or ["it printed nothing"])[-1]


def last_words(folder: Path) -> str:
    """Why a daemon has given up, if one has."""
    lines = [line for log in folder.glob("*.log") for line in log.read_text().splitlines()]
    return next((line for line in lines if re.match("hive: (?!warning)|.*level=error", line)), "")


def run_until(command: str, pattern: str, folder: Path) -> str:
    """Run it, again if need be, until its output is as it must be."""
    until = time.monotonic() + PATIENCE
    while not re.search(pattern, output := run(command, folder)):
        why = last_words(folder)
        if why or time.monotonic() > until:
            raise Failed(f"not what was expected: {command}: {why or last_line(output)}")
        time.sleep(LOOK_AGAIN)
    return output


def show(folder: Path, keep: bool) -> None:
    """All steps, one after the other."""
    os.umask(0o077)
    furnish(folder)
    say("hive on this machine alone; all that it needs is in a folder of its own:")
    say(f"$ {as_typed_after(folder)}")
    for number, (what, commands) in enumerate(STEPS, 1):
        say(f"\n{number}. {what}", bold=True)
        for command, pattern in commands:
            say(f"$ {command}")
            sys.stdout.write(run_until(command, pattern, folder))
    if keep:
        say("\nIt is left running. To type any of this again, and then to end it:", bold=True)
        say(f"$ {as_typed_after(folder)}")
        say("$ hive --help")
        say(f"$ sh {shlex.quote(str(folder / 'end'))}")


def live(folder: Path, pictures: Path | None) -> None:
    """Three nodes at work, until a signal comes; or until pictures of the page are made."""
    os.umask(0o077)
    furnish(folder)
    for node in NODES:
        run(start(node), folder)
    run_until("hive roster --config alpha.toml", r"(?s)alpha.*beta +main.*gamma +watch", folder)
    page = f"hive web --config alpha.toml --port {free_port()}"
    run(f"{page} >>web.log 2>&1 &", folder)
    link = run_until("cat web.log", "http://[^ ]+\n", folder).split()[-1]
    say("Three nodes are at work, and gamma is in trouble. To look at them:", bold=True)
    say(link)
    say(f"$ {as_typed_after(folder)}")
    say("$ hive status --config alpha.toml --watch")
    say("$ hive log --config alpha.toml --follow")
    say("\nCtrl-C ends and removes all of it.")
    began = time.monotonic()
    for words in itertools.cycle(TRAFFIC):
        run(f"hive send --config {words}", folder)
        time.sleep(PACE)
        if pictures and time.monotonic() > began + PAST:
            picture = [PYTHON, str(ROOT / "tests" / "pictures.py"), str(pictures), "--link", link]
            subprocess.run(picture, check=True, umask=0o022)
            return


# ---- The keeper: starts the show, and ends it --------------------------------------------


def perform(folder: Path, how: Sequence[str]) -> int:
    """Show it, in a session of its own; a signal ends that early.  Called with ENDINGS blocked."""
    received: list[int] = []
    argv = [PYTHON, __file__, "--show", str(folder), *how]
    player = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)

    def on_signal(number: int, frame: object) -> None:
        received.append(number)
        player.kill()

    for number in ENDINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
    code = player.wait()
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
    if "--keep" in how and not code and not received:
        return 0
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(player.pid, signal.SIGTERM)  # the command of the moment, and all daemons
    end(folder)
    if "--live" in how and signal.SIGINT in received:  # that is how one ends it
        say("\nAll is ended and removed.")
        return 0
    if code < 0:  # else it has said why itself
        complain("interrupted; all is ended and removed")
    return 128 + received[0] if received else code and 1


def demonstrate(how: Sequence[str]) -> int:
    """Once round; the exit code."""
    began = time.monotonic()
    code = perform(new_folder(), how)
    if not code and not how:
        say(f"\nDone in {time.monotonic() - began:.0f} s; all is ended and removed.", bold=True)
        say("Three nodes at work: make demo LIVE=1. To type these yourself: make demo KEEP=1")
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description="Show what hive does; see make demo.")
    parser.add_argument("--keep", action="store_true", help="leave it running")
    parser.add_argument("--live", action="store_true", help="three nodes at work, until Ctrl-C")
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="with --live: make some of its page, and end",
    )
    parser.add_argument("--end", type=Path, metavar="FOLDER", help="end what was left running")
    parser.add_argument("--show", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_UNBLOCK if args.show else signal.SIG_BLOCK, ENDINGS)
    try:
        if args.show and args.live:
            live(args.show, args.pictures)
        elif args.show:
            show(args.show, args.keep)
        elif args.end:
            if not (args.end / "end").is_file():
                raise Failed(f"{args.end}: nothing was left running there")
            end(args.end)
        else:
            return demonstrate(sys.argv[1:])
    except BrokenPipeError:  # whoever watched has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (Failed, OSError) as failed:
        complain(getattr(failed, "strerror", None) or str(failed))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
