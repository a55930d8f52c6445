"""How a process starts: what it reads, and once more through the compiled file."""

from __future__ import annotations

import contextlib
import hashlib
import marshal
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import cache_from_source
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, eventually

import hive

needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")


class Alone:
    """A copy of hive.py in a folder of its own, which writes its compiled file there."""

    def __init__(self, home: Path, name: str = "hive.py") -> None:
        self.folder, self.elsewhere = home / "program", home / "elsewhere"
        for folder in (self.folder, self.elsewhere):
            folder.mkdir()
        self.file = self.folder / name
        shutil.copy2(ROOT / "hive.py", self.file)
        self.environment = {k: v for k, v in os.environ.items() if k[:6] not in ("PYTHON", "HIVE_")}
        self.environment |= {"HOME": str(home), "XDG_RUNTIME_DIR": str(home)}
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *line: str | Path, **more: str) -> subprocess.Popen[str]:
        """Start the embedded broker, or what else the line says, and wait until it speaks."""
        process = subprocess.Popen(
            line,
            cwd=self.elsewhere,
            env=self.environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def broker(self, *interpreter: str | Path, **more: str) -> subprocess.Popen[str]:
        words = interpreter or (sys.executable, self.file)
        process = self.start(*words, "broker", "--socket", "s", **more)
        assert process.stdout and process.stdout.readline() == "broker listens on s\n"
        return process


@pytest.fixture
def alone_as(tmp_path: Path) -> Iterator[Callable[[str], Alone]]:
    made: list[Alone] = []

    def make(name: str) -> Alone:
        made.append(Alone(tmp_path, name))
        return made[-1]

    yield make
    for process in [process for alone in made for process in alone.started]:
        process.terminate()
        process.communicate(timeout=PATIENCE)


@pytest.fixture
def alone(alone_as: Callable[[str], Alone]) -> Alone:
    return alone_as("hive.py")


@pytest.fixture
def compiled(alone: Alone) -> None:
    """It has run before: beside it is the compiled file that these tests have read."""
    if (ours := Path(cache_from_source(hive.__file__))).exists():
        kept = Path(cache_from_source(alone.file))
        kept.parent.mkdir()
        shutil.copy(ours, kept)


def words_of(process: subprocess.Popen[str]) -> list[str]:
    """What ps shows."""
    return Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")[:-1]


def memory_of(process: subprocess.Popen[str]) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def end(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> tuple[int, str]:
    process.send_signal(number)
    said, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, said


@needs_proc
def test_a_script_that_stays_reads_the_compiled_file_and_keeps_no_more_than_hive_cli(
    alone: Alone,
) -> None:
    script = alone.broker()
    assert [*(alone.folder / "__pycache__").iterdir()]
    assert words_of(script)[-4:] == [str(alone.file), "broker", "--socket", "s"]
    kept = memory_of(script)
    assert end(script) == (0, "")
    shutil.copy(ROOT / "hive-cli", alone.folder)
    imported = alone.broker(sys.executable, alone.folder / "hive-cli")
    assert words_of(imported)[1] == str(alone.folder / "hive-cli")  # that one is as it was started
    assert kept < 1.2 * memory_of(imported)  # 2.3 times as much before


@needs_proc
@pytest.mark.usefixtures("compiled")
def test_a_daemon_tells_systemd_of_the_process_that_it_knows(alone: Alone) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(alone.folder / "notify"))
        manager.settimeout(PATIENCE)
        line = f"WATCHDOG_PID=$$ exec '{sys.executable}' '{alone.file}' daemon --node a"
        told = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "100000"}
        daemon = alone.start("/bin/sh", "-c", line, **told)
        assert manager.recv(4096).startswith(b"READY=1")
        while manager.recv(4096) != b"WATCHDOG=1":
            pass
    assert words_of(daemon)[-4:] == [str(alone.file), "daemon", "--node", "a"]
    code, said = end(daemon)
    assert code == 0 and said.count("event=starting") == said.count("event=stopped") == 1
    digits = hashlib.sha256(alone.file.read_bytes()).hexdigest()[:8]
    assert f" build={digits} " in said  # it knows its own file


@needs_proc
@pytest.mark.parametrize(
    "flags",
    [("-O",), ("-OO",), ("-I", "-S"), ("-P", "-s"), ("-X", "utf8", "-u"), ("-W", "error", "-bb")],
    ids=" ".join,
)
@pytest.mark.usefixtures("compiled")
def test_flags_of_the_interpreter_are_kept(alone: Alone, flags: tuple[str, ...]) -> None:
    broker = alone.broker(sys.executable, *flags, alone.file)
    assert words_of(broker)[: len(flags) + 2] == [sys.executable, *flags, "-c"]
    assert end(broker) == (0, "")


@needs_proc
@pytest.mark.parametrize("name", ["node.py", "hive", "hive-2", "my hive.py", "it's.py"])
def test_the_file_may_be_called_as_one_likes(alone_as: Callable[[str], Alone], name: str) -> None:
    alone = alone_as(name)
    broker = alone.broker()
    assert "-c" in words_of(broker) and str(alone.file) in words_of(broker)
    assert end(broker) == (0, "")


@needs_proc
def test_through_a_link_the_compiled_file_is_that_of_the_real_one(alone: Alone) -> None:
    (alone.elsewhere / "link.py").symlink_to(alone.file)
    broker = alone.broker(sys.executable, "link.py")
    assert str(alone.file) in words_of(broker)
    assert end(broker) == (0, "") and not (alone.elsewhere / "__pycache__").exists()


@needs_proc
@pytest.mark.parametrize("how", ["nowhere to write", "told not to"])
def test_where_nothing_is_compiled_to_a_file_it_goes_on_as_it_is(alone: Alone, how: str) -> None:
    line: list[str | Path] = [sys.executable, alone.file]
    if how == "told not to":
        line.insert(1, "-B")
    else:
        (alone.folder / "__pycache__").write_text("a read-only directory, to root as well")
    broker = alone.broker(*line)
    assert "-c" not in words_of(broker)
    assert end(broker) == (0, "")


@needs_proc
def test_what_is_read_compiled_already_is_not_started_again(alone: Alone) -> None:
    module = alone.broker(sys.executable, "-m", "hive", PYTHONPATH=str(alone.folder))
    assert words_of(module)[1:4] == ["-m", "hive", "broker"]
    assert end(module) == (0, "")
    with zipfile.ZipFile(alone.folder / "packed", "w") as packed:
        packed.write(alone.file, "hive.py")
        packed.writestr("__main__.py", "import sys\nfrom hive import main\nsys.exit(main())\n")
    zipped = alone.broker(sys.executable, alone.folder / "packed")
    assert words_of(zipped)[1] == str(alone.folder / "packed")
    assert end(zipped) == (0, "")


@pytest.mark.usefixtures("compiled")
def test_another_program_that_runs_the_script_is_not_left(alone: Alone) -> None:
    profiled = alone.start(sys.executable, "-m", "cProfile", alone.file, "broker", "--socket", "s")
    assert profiled.stdout and profiled.stdout.readline() == "broker listens on s\n"
    code, said = end(profiled)
    assert code == 0 and "function calls" in said


@pytest.mark.usefixtures("compiled")
def test_no_module_is_taken_from_where_one_happens_to_be(alone: Alone) -> None:
    for name in ("json", "importlib", "socket", "sqlite3", "hive", "warnings"):
        (alone.elsewhere / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    assert end(alone.broker()) == (0, "")


@pytest.mark.usefixtures("compiled")
def test_no_module_is_taken_from_beside_the_script(alone: Alone) -> None:
    (alone.folder / "sqlite3.py").write_text("raise SystemExit('the one beside it')\n")
    assert end(alone.broker()) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("compiled")
def test_a_signal_ends_it_at_any_moment(alone: Alone, number: int) -> None:
    end(alone.broker())  # it is compiled now
    for delay in (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4):
        process = alone.start(sys.executable, alone.file, "broker", "--socket", "s")
        time.sleep(delay)
        process.send_signal(number)
        assert process.wait(PATIENCE) in (0, -number, 130, 1)


@pytest.mark.usefixtures("compiled")
def test_what_is_ignored_stays_ignored(alone: Alone) -> None:
    line = f"trap '' HUP; exec '{sys.executable}' '{alone.file}' broker --socket s"
    broker = alone.start("/bin/sh", "-c", line)
    assert broker.stdout and broker.stdout.readline() == "broker listens on s\n"
    broker.send_signal(signal.SIGHUP)
    with contextlib.suppress(subprocess.TimeoutExpired):
        broker.wait(0.3)
    assert broker.poll() is None and end(broker) == (0, "")


def test_a_mistake_is_told_before_anything_is_started_again(alone: Alone) -> None:
    process = alone.start(sys.executable, alone.file, "broker", "--sockets", "s")
    said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 2 and said.count("\n") == 1
    assert "see: hive.py broker --help" in said or "see: hive.py --help" in said
    assert not (alone.folder / "__pycache__").exists()


@pytest.mark.usefixtures("compiled")
def test_a_warning_of_the_configuration_is_told_once(alone: Alone) -> None:
    config = alone.elsewhere / "hive.toml"
    config.write_text('[broker]\nusername = "u"\npassword = "p"\n')
    config.chmod(0o644)
    words = ("broker", "--socket", "s", "--config", "hive.toml")
    broker = alone.start(sys.executable, alone.file, *words)
    eventually("it listens", (alone.elsewhere / "s").exists)
    code, said = end(broker)
    assert code == 0 and said.count("others may read it") == 1


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("send --to x", "send"),
        ("--config x status", "status"),
        ("--config=x --host y status --all", "status"),
        ("--node pending log", "log"),  # a node may have that name
        ("--config send", ""),
        ("--config", ""),
        ("", ""),
        ("--help send", ""),  # all of them are shown
        ("--version", ""),
        ("sned --to x", ""),
        ("--confg x send", ""),
    ],
)
def test_the_command_is_found_behind_the_options_that_all_have(said: str, named: str) -> None:
    assert hive.command_among(said.split()) == named


def test_a_command_finds_all_that_it_is_given_in_a_parser_for_it_alone() -> None:
    words = ["--node", "log", "--port=7", "send", "--to", "x", "--text", "y", "--host", "z"]
    alone = hive.make_parser(hive.command_among(words)).parse_args(words)
    assert vars(alone) == vars(hive.make_parser().parse_args(words))
    assert (alone.run, vars(alone)["node.id"]) == (hive.command_send, "log")


VALUES = ("x", "7", "now", "command", "alpha", "/x", "web-*", "a b", "", "-1", "bash", "claude")


@pytest.mark.parametrize("name", hive.COMMANDS)
def test_what_is_read_without_argparse_is_what_argparse_reads(name: str) -> None:
    """Each option of each command, with values that it takes and others, before it and after."""
    options = (*hive.COMMON_OPTIONS, *hive.COMMANDS[name].options)
    needed = [w for flags, how in options if how.get("required") for w in (flags[0], "alpha")]
    lines = [[name], [name, *needed], ["--host", "h", name, *needed], [name, *needed, "more"]]
    for flag in (flag for flags, _ in options for flag in flags):
        lines += [[name, *needed, flag], [flag, "x", name, *needed], [name, *needed, flag + "="]]
        for value in VALUES:
            lines += [[name, *needed, flag, value], [name, flag + "=" + value, *needed]]
    parser, plain = hive.make_parser(name), 0
    for words in lines:
        with contextlib.suppress(ValueError):
            read = hive.plain_arguments(iter(words))
            assert read == vars(parser.parse_args(words)), words
            plain += 1
    assert plain > 9 or name not in ("daemon", "hook", "log", "mcp", "send", "status")


def test_a_version_is_told_without_argparse_where_argparse_would_tell_it() -> None:
    assert hive.plain_arguments(iter(["--version"])) == {"run": hive.show_version}
    assert hive.plain_arguments(iter(["--node=x", "--version", "?"])) == {"run": hive.show_version}
    for words in (["send", "--version"], ["?", "--version"], ["--node", "--version"]):
        with pytest.raises(ValueError):
            hive.plain_arguments(iter(words))


class Parts:
    """hive-cli with a copy of hive.py, whose parts it writes down compiled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("hive.py", "hive-cli"):
            shutil.copy(ROOT / name, folder)

    def run(self, *words: str, python: Sequence[str] = ()) -> str:
        done = subprocess.run(
            [sys.executable, *python, self.folder / "hive-cli", *words],
            env={"HOME": str(self.folder), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    def kept(self) -> dict[str, int]:
        """Each compiled file, and when it was written."""
        files = (self.folder / "__pycache__").glob("*")
        return {file.name.removeprefix(TAG): file.stat().st_mtime_ns for file in files}

    def spoil(self, number: int) -> None:
        """Whoever loads this part hears of it."""
        file = self.folder / "__pycache__" / f"{TAG}{number}.pyc"
        code = compile(f"raise SystemExit('part {number} is loaded')", "spoilt", "exec")
        file.write_bytes(file.read_bytes()[:16] + marshal.dumps(code))


TAG = f"hive.{sys.implementation.cache_tag}."


def test_hive_cli_compiles_the_parts_once_and_again_where_the_file_has_changed(
    tmp_path: Path,
) -> None:
    parts = Parts(tmp_path)
    said = parts.run("--version")
    first = parts.kept()
    assert [*sorted(first)] == [f"{n}.pyc" for n in range(5)]
    assert parts.run("--version") == said and parts.kept() == first
    file = tmp_path / "hive.py"
    file.write_text(file.read_text().replace('__version__ = "', '__version__ = "9.'))
    assert "hive 9." in parts.run("--version")
    assert all(then > first[name] for name, then in parts.kept().items())


@pytest.mark.parametrize("how", ["nowhere to write", "told not to"])
def test_hive_cli_goes_on_where_nothing_can_be_written_down(tmp_path: Path, how: str) -> None:
    parts = Parts(tmp_path)
    if how == "nowhere to write":
        (tmp_path / "__pycache__").write_text("a read-only directory, to root as well")
    said = parts.run("host", "--listen", "a b", python=["-B"] * (how == "told not to"))
    assert "is not" in said and hive.docstring(hive.host_address) in said  # of the last part


def test_a_command_loads_what_it_calls_and_no_more(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.run("--version")
    for number in range(1, 5):
        parts.spoil(number)
    assert "part" not in parts.run("--version") + parts.run("help", "send")
    assert parts.run("host", "--listen", "a b") == "part 1 is loaded\n"  # before the last


def test_no_part_of_another_file_is_loaded_by_who_began_with_this_one(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.run("--version")
    file = tmp_path / "hive.py"
    code = f"open({str(file)!r}, 'a').write('# as an upgrade does\\n')\n"
    program = (tmp_path / "hive-cli").read_text()
    (tmp_path / "hive-cli").write_text(program.replace("sys.exit(run())", f"load(0)\n{code}") + RUN)
    said = parts.run("host", "--listen", "a b")
    assert said == "hive: hive.py was replaced since this began; start it again\n"


RUN = "sys.exit(hive.main())\n"


def test_garbage_is_collected_once_the_file_is_read() -> None:
    code = "import gc, hive; print(gc.isenabled(), gc.get_freeze_count() > 10_000)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("True True\n", "")
