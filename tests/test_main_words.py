"""From arguments to an exit code, and the words of the parser; in this process."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import Commands

import hive
from hive import Completion, nearest_meant


@pytest.fixture
def alpha(commands: Commands) -> Commands:
    return commands


# -- how it ends --


def fails(error: BaseException) -> Callable[[object], int]:
    def run(args: object) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (hive.HiveError("why"), 1, "hive: why\n"),
        (hive.UsageError("why"), 2, "hive: why\n"),
        (hive.ConfigError("why"), 2, "hive: why\n"),
        (hive.BrokerError("why"), 3, "hive: why\n"),
        (hive.NoReplyError("why"), 4, "hive: why\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 128 + signal.SIGPIPE, ""),
        (OSError(28, "full", "/a/file"), 1, "hive: /a/file: full\n"),
        (OSError(5, "broken"), 1, "hive: input/output: broken\n"),
    ],
)
def test_each_fault_has_its_code_and_one_line(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    monkeypatch.setitem(hive.COMMANDS, "daemon", hive.Command(fails(error), ()))
    assert alpha.run("daemon") == (code, "", words)


def test_what_a_full_disk_does_not_take_is_a_fault_once(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.RawIOBase):
        def __init__(self) -> None:
            self.end, self.other = os.pipe()

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

        def fileno(self) -> int:
            return self.other

    full = Full()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(full)))
    assert hive.main(["--version"]) == 1
    os.close(full.end)
    os.write(full.other, b"lost, and no SIGPIPE")  # it is /dev/null now
    os.close(full.other)
    monkeypatch.undo()


def test_without_arguments_it_is_told_how_to_use_it_on_stderr(alpha: Commands) -> None:
    assert hive.main([]) == 2
    said = alpha._said.readouterr()
    assert said.out == "" and said.err.startswith("usage: ") and "COMMAND" in said.err


def test_without_a_command_there_is_nothing_to_do(alpha: Commands) -> None:
    code, out, err = alpha.run("")
    assert (code, out) == (2, "")
    assert err.startswith("hive: the following arguments are required: COMMAND; see: ")


def test_what_is_said_beside_the_result_is_there_at_once_and_never_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    hive.hold_standard_streams()
    stream = sys.stderr
    assert stream is not sys.__stderr__ and stream.line_buffering and stream.fileno() == 2
    assert stream.errors == sys.stdout.errors == "backslashreplace"


def test_every_command_holds_its_streams(alpha: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    def held() -> None:
        raise RuntimeError("held")

    monkeypatch.setattr(hive, "hold_standard_streams", held)
    with pytest.raises(RuntimeError, match="held"):
        hive.main(["--version"])


@pytest.mark.parametrize(("number", "name"), [(0, "stdin"), (1, "stdout"), (2, "stderr")])
def test_the_place_of_a_stream_that_is_closed_is_taken(number: int, name: str) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        said = "it failed"
        with contextlib.suppress(BaseException):
            os.close(number)
            setattr(sys, name, None)
            hive.hold_standard_streams()
            stream = getattr(sys, name)
            lost = stream is not None and (number == 0 or bool(stream.write("lost\n")))
            if number:
                stream.flush()
            said = f"{os.get_inheritable(number)} {os.fstat(number).st_rdev} {lost}"
        os.write(writing, said.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with open(reading) as stream:
        assert stream.read() == f"True {os.stat(os.devnull).st_rdev} True"


def test_the_version_is_told_wherever_it_is_asked_for(alpha: Commands) -> None:
    said = (0, f"hive {hive.__version__} ({hive.build()})\n", "")
    assert alpha.run("--version") == alpha.run("--version status") == said
    for words in (["--version"], ["--log-level", "info", "--version"]):
        with pytest.raises(SystemExit) as ended:
            hive.make_parser().parse_args(words)
        assert not ended.value.code and alpha._said.readouterr().out == said[1]


def test_a_stream_that_nobody_reads_takes_everything(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    stream = hive.UnfailingFile(writing, "w")
    assert stream.write(b"abc") == 3 and os.read(reading, 10) == b"abc"
    while stream.write(b"x" * 65536) == 65536 and os.get_blocking(reading):
        if os.fstat(writing) and not _can_write(writing):
            break
    assert stream.write(b"lost") == 4  # it is full
    os.close(reading)
    assert stream.write(b"lost") == 4  # nobody is there
    stream.close()


def _can_write(descriptor: int) -> bool:
    import select

    return bool(select.select([], [descriptor], [], 0)[1])


# -- plain lines, and others --


def read(*words: str) -> dict[str, Any] | None:
    try:
        return hive.plain_arguments(iter(words))
    except ValueError:
        return None


def test_a_plain_line_is_read_without_argparse() -> None:
    said = read("--node", "n", "send", "--to", "b", "--text=x=y", "--json", "--wait", "3")
    assert said and (said["run"], said["node.id"]) == (hive.command_send, "n")
    assert (said["to"], said["text"], said["as_json"], said["wait"]) == ("b", "x=y", True, 3.0)
    assert (said["direct"], said["ch"], said["corr"], said["fail_fast"]) == (
        *(False, "command"),
        *(None, False),
    )
    tls = read("init", "--tls")
    assert tls is None  # --agent of init is a list
    assert (read("broker", "--anonymous") or {})["broker.anonymous"] is True
    assert (read("status") or {})["which"] == []
    after = read("log", "--of", "all", "-n", "3", "-f", "--host", "h")
    assert after and (after["of"], after["lines"], after["follow"]) == ("all", 3, True)
    assert after["mqtt.host"] == "h"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--node n",
        "status x",
        "sned",
        "send --to b",  # the text is missing
        "send --to b --text",
        "send --to b --text -x",
        "send --to b --text=",
        "send --to b --text x --ch comand",
        "send --to b --text x --wait soon",
        "send --to b --text x --json=yes",
        "send --to b --text x status",
        "status --node",
        "status --help",
        "handler list",
        "forget b",
    ],
)
def test_where_there_is_more_to_a_line_argparse_reads_it(line: str) -> None:
    assert read(*line.split()) is None


def test_options_of_one_value_or_none_are_plain() -> None:
    option = hive.option
    plain = (option("--one"), option("-t", "--two-words", action="store_true"))
    assert {flag: to for flag, (to, _) in hive.plain_options(plain).items()} == {
        "--one": "one",
        "-t": "t",
        "--two-words": "t",
    }
    dest = hive.plain_options((option("--x", dest="y", default=5, type=hive.count),))
    assert dest["--x"][0] == "y"
    assert [*hive.plain_options((option("words", nargs="*"), option("word", nargs="?")))] == [
        *("words", "word"),
    ]
    for odd in (
        option("word"),
        option("--many", nargs="*"),
        option("--again", action="append"),
        option("--typed", default="5", type=hive.count),
    ):
        with pytest.raises(ValueError):
            hive.plain_options((odd,))
    assert hive.plain_options((option("--words", default="x"),))  # nothing to be read


def test_what_is_not_given_is_none_false_or_the_default() -> None:
    assert hive.unsaid({}) is None
    assert hive.unsaid({"action": "store_true", "default": 5}) is False
    assert hive.unsaid({"default": 5}) == hive.unsaid({"default": 5, "nargs": "*"}) == 5
    assert (hive.unsaid({"nargs": "*"}), hive.unsaid({"nargs": "?"})) == ([], None)


def test_an_option_of_a_command_is_not_taken_for_its_namesake_of_all(alpha: Commands) -> None:
    parser = hive.make_parser("web")
    for words in (["web", "--port", "8485"], ["--port", "1", "web", "--port", "8485"]):
        args = vars(parser.parse_args(words))
        assert args["page_port"] == 8485 and args.get("mqtt.port") == (
            1 if words[0] != "web" else None
        )


# -- words of the parser --


@pytest.mark.parametrize(
    ("message", "near"),
    [
        ("argument COMMAND: invalid choice: 'sned' (choose from 'send', 'status')", "send"),
        ("argument --ch: invalid choice: 'alrt' (choose from command, alert)", "alert"),
        ("invalid choice: 'x.y-x' (choose from 'x.y-z')", "x.y-z"),
        ("unrecognized arguments: --wiat 3", "--wait"),
        ("unrecognized arguments: --wiat", "--wait"),
        ("unrecognized arguments: wait", ""),
        ("invalid choice: 'zzzzz' (choose from 'send')", ""),
        ("the following arguments are required: --text", ""),
    ],
)
def test_what_may_have_been_meant_is_read_from_argparses_words(message: str, near: str) -> None:
    said = nearest_meant(message, ["--text", "--wait"])
    assert said == (f"did you mean {near}?" if near else "")


def test_an_error_of_the_parser_is_one_line_with_where_to_look(alpha: Commands) -> None:
    code, out, err = alpha.run("send --to b --text x --wiat 3")
    me = os.path.basename(sys.argv[0])
    assert (code, out) == (2, "")
    said = "hive: unrecognized arguments: --wiat 3; did you mean --wait?; see: "
    assert err.startswith(said) and err.endswith(" --help\n") and err.count("\n") == 1
    code, _, err = alpha.run("send --to b --text x --wai 3")  # no abbreviation is taken
    assert code == 2 and "did you mean --wait?" in err and me
    code, _, err = alpha.run("status --pin x")
    assert code == 2 and err.startswith("hive: unrecognized arguments: --pin")


@pytest.mark.parametrize("width", [80, 120])
def test_help_is_as_wide_as_the_terminal(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, err = alpha.run("--help")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert width - 20 < max(map(len, lines)) <= max(80, width - 2)
    whole = out.split("\n\n")
    assert " ".join(whole[1].split()) == (hive.__doc__ or "").split("\n\n")[0]
    assert " ".join(whole[2].split()) == " ".join((hive.__doc__ or "").split("\n\n")[1].split())
    assert "\ncommands:\n  COMMAND\n" in out and "\nconfiguration:\n" in out
    last = "Each command has --help of its own, with examples; hive help lists more to read.\n"
    assert out.endswith(last)
    for name in hive.COMMANDS:
        assert f"\n    {name} " in out
    assert bool(re.search(r"\n    send +Send a message .* do something", out)) == (width > 80)


def test_help_of_a_command_has_its_words_options_and_examples(alpha: Commands) -> None:
    code, out, _ = alpha.run("send --help")
    assert code == 0
    assert (
        "\n\nSend a message to a node, to an agent, to all, or to whoever can do something." in out
    )
    assert "\nexamples:\n  hive send --to beta --ch command " in out
    assert "\n  --config FILE" in out and "configuration:" in out
    code, out, _ = alpha.run("pending --help")
    assert "examples:" not in out and out.endswith("\n")
    assert alpha.run("help pending")[1] == out and alpha.run("help pending")[0] == 0


def test_help_lists_topics_and_shows_one(alpha: Commands) -> None:
    code, out, _ = alpha.run("help")
    lines = out.splitlines()
    assert (code, lines[:2], lines[-2:]) == (
        0,
        ["hive help TOPIC, one of", ""],
        ["", "hive help COMMAND is hive COMMAND --help."],
    )
    assert [line.split()[0] for line in lines[2:-2]] == [*hive.TOPICS]
    assert all(line[:13] == f"  {line.split()[0]:11}" for line in lines[2:-2])
    assert alpha.run("help trust") == (0, hive.help_topic("trust"), "")
    for word, near in (("hanlders", "did you mean handlers?"), ("qqq", "see: hive help")):
        why = f"hive: help: there is no topic or command '{word}'; {near}\n"
        assert alpha.run(f"help {word}") == (2, "", why)
    assert "did you mean send?" in alpha.run("help sned")[2]


@pytest.mark.parametrize(("lines", "paged"), [(9, True), (10, True), (11, False)])
def test_a_text_that_does_not_fit_goes_to_the_pager(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch, lines: int, paged: bool
) -> None:
    import subprocess

    calls: list[Any] = []
    monkeypatch.setenv("LINES", str(lines))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("PAGER", "'my pager' -x")
    monkeypatch.setenv("LESS", "mine")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(subprocess, "run", lambda line, **how: calls.append((line, how)))
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        hive.show_text("x\n" * 10)
    finally:
        handled = signal.signal(signal.SIGINT, interrupt)
    assert alpha._said.readouterr().out == ("" if paged else "x\n" * 10)
    assert (handled is not interrupt) == paged
    if paged:
        ((line, how),) = calls
        assert (line, how["input"], how["env"]["LESS"]) == (["my pager", "-x"], b"x\n" * 10, "mine")
        assert how["env"]["PAGER"]
        calls.clear()
        monkeypatch.delenv("PAGER")
        monkeypatch.delenv("LESS")
        hive.show_text("x\n" * 10)
        signal.signal(signal.SIGINT, interrupt)
        assert (calls[0][0], calls[0][1]["env"]["LESS"]) == (["less"], "FRX")


def test_without_a_terminal_a_text_is_printed_however_long(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINES", "5")
    hive.show_text("x\n" * 100)
    assert alpha._said.readouterr().out == "x\n" * 100


# -- completion --


def completion(*flags: str, **how: Any) -> Completion:
    return Completion.of(*hive.option(*flags, **{"help": "about [it]: it's \\ so"} | how))


def test_what_an_option_takes_is_what_a_shell_offers() -> None:
    values = {
        "none": completion("--x", action="store_true"),
        "const": completion("--x", action="store_const", const=5),
        "choices": completion("--x", choices=("a", "b")),
        "topic": completion("topic", metavar="TOPIC", nargs="?"),
        "node": completion("--x", type=hive.node_name),
        "recipient": completion("--x", type=hive.recipient_name),
        "destination": completion("--x", type=hive.destination),
        "path": completion("--x", type=hive.file_path),
        "file": completion("--x", metavar="FILE"),
        "anything": completion("--x", type=hive.count),
        "text": completion("--x"),
    }
    assert {name: one.value for name, one in values.items()} == {
        "none": "",
        "const": "",
        "choices": "a b",
        "topic": " ".join((*hive.TOPICS, *hive.COMMANDS)),
        **dict.fromkeys(("node", "recipient", "destination"), "NAMES"),
        **dict.fromkeys(("path", "file"), "FILES"),
        **dict.fromkeys(("anything", "text"), " "),
    }
    one = completion("--long-one", "-l", metavar="NODE[=X]")
    assert (one.flags, one.label) == (["--long-one", "-l"], "node x ")
    assert one.about == "about [it]: it\u2019s  so"
    assert completion("--long-one").label == "long_one"
    assert completion("word").flags == []


COMMON = [completion("--config", metavar="FILE"), completion("--node", type=hive.node_name)]
OWN = [
    completion("--ch", "-c", choices=("a", "b")),
    completion("--json", action="store_true"),
    completion("--text"),
    completion("which", type=hive.node_name),
    completion("what", choices=("x", "y")),
]


def test_a_script_for_bash_has_a_line_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hive, "COMMANDS", {"send": hive.COMMANDS["send"]})
    said = hive.bash_completion({"": COMMON, "send": OWN}).splitlines()
    assert "      --config|--node) ((i++)) ;;" in said
    assert [line for line in said if line.startswith("    ") and 'words="' in line] == [
        '    *,--config) words="" ;;',
        '    *,--node) words="NAMES" ;;',
        '    send,--ch|send,-c) words="a b" ;;',
        '    send,--text) words="" ;;',
        '      "") words="--config --node send" ;;',
        '      "send") words="--ch -c --json --text NAMES x y --config --node" ;;',
    ]


def test_a_script_for_zsh_has_a_line_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hive, "COMMANDS", {"pending": hive.COMMANDS["pending"]})
    said = hive.zsh_completion({"": COMMON, "pending": OWN}).splitlines()
    about = r"about \[it\]\: it’s  so"  # noqa: RUF001
    assert (
        f"  local -a common=('--config[{about}]:file:_files' '--node[{about}]:node:_hive_names')"
        f" commands=('pending:{hive.about_command('pending')}')"
    ) in said
    assert (
        f"    argument,pending) _arguments $common '--ch[{about}]:ch:(a b)'"
        f" '-c[{about}]:ch:(a b)' '--json[{about}]' '--text[{about}]:text: '"
        " '1:which:_hive_names' '2:what:(x y)' ;;"
    ) in said


def test_a_script_for_fish_has_a_line_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hive, "COMMANDS", {"pending": hive.COMMANDS["pending"]})
    said = hive.fish_completion({"": COMMON, "pending": OWN}).splitlines()
    about, names = "-d 'about [it]: it’s  so'", "(hive completion names 2>/dev/null)"  # noqa: RUF001
    where = "complete -c hive -n '__fish_seen_subcommand_from pending' "
    said_of_it = hive.about_command("pending")
    assert said[3:] == [
        f"complete -c hive -n __fish_use_subcommand -a pending -d '{said_of_it}'",
        f"complete -c hive -l config -r -F {about}",
        f"complete -c hive -l node -x -a '{names}' {about}",
        f"{where}-l ch -s c -x -a 'a b' {about}",
        f"{where}-l json  {about}",
        f"{where}-l text -x -a '' {about}",
        f"{where} -a '{names}' {about}",
        f"{where} -a 'x y' {about}",
    ]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_own(alpha: Commands, shell: str) -> None:
    code, out, _ = alpha.run(f"completion {shell}")
    assert code == 0 and f"hive completion {shell}" in out.splitlines()[0 if shell != "zsh" else 1]
    assert out.endswith("\n") and not out.endswith("\n\n")


# -- start --


def test_a_process_that_starts_anew_is_not_interrupted_between(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.machinery import SourceFileLoader

    seen: list[Any] = []

    def execv(program: str, line: list[str]) -> None:
        seen.append((program, line, signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])))
        raise OSError

    def compiled(self: Any, name: str) -> None:
        seen.append(name)

    monkeypatch.setattr(hive, "__spec__", None)
    monkeypatch.setattr(hive, "__loader__", SourceFileLoader("hive", hive.__file__))
    monkeypatch.setattr(SourceFileLoader, "get_code", compiled)
    monkeypatch.setattr("os.execv", execv)
    monkeypatch.setattr(sys, "argv", ["hive.py", "daemon"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "utf8", "hive.py", "daemon"])
    monkeypatch.setattr("os.path.exists", lambda file: False)
    hive.start_again()
    assert seen == ["hive"]  # nothing could be written
    monkeypatch.setattr("os.path.exists", lambda file: True)
    hive.start_again()
    _, _, (program, line, blocked) = seen
    assert (program, line[:4]) == (sys.executable, ["python", "-X", "utf8", "-c"])
    assert line[5:] == [str(hive.own_file()), "daemon"] and blocked
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    deletes = " del sys.path[0];" in line[4]
    assert deletes != bool(sys.flags.safe_path)


@pytest.mark.parametrize("what", ["hive-cli", "__pycache__"])
def test_what_another_user_put_beside_it_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Who copies hive.py to /tmp runs nothing else that lies there."""
    from importlib.machinery import SourceFileLoader

    seen: list[object] = []
    monkeypatch.setattr(hive, "own_file", lambda: tmp_path / "hive.py")
    monkeypatch.setattr(hive, "__spec__", None)
    monkeypatch.setattr(hive, "__loader__", SourceFileLoader("hive", hive.__file__))
    monkeypatch.setattr(SourceFileLoader, "get_code", lambda self, name: seen.append(name))
    beside = tmp_path / what

    def believed() -> bool:
        """Is it used?"""
        if what == "hive-cli":
            return hive.own_program() == [sys.executable, str(beside)]
        seen.clear()
        hive.start_again()
        return bool(seen)

    assert believed() == (what != "hive-cli")  # it is not there
    beside.mkdir(0o755)
    assert believed()
    beside.chmod(0o757)
    assert not believed()
    beside.chmod(0o755)
    monkeypatch.setattr("os.geteuid", lambda: 65534)  # it is somebody's who is not root
    os.chown(beside, *([12345] * 2 if os.getuid() == 0 else [-1] * 2))
    assert not believed()


def test_a_file_that_is_imported_is_not_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.execv", lambda *given: pytest.fail("it was"))
    hive.start_again()
    monkeypatch.setattr(hive, "__spec__", None)
    monkeypatch.setattr(hive, "__loader__", SimpleNamespace())
    hive.start_again()


def test_a_command_gets_what_its_options_said(
    alpha: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[argparse.Namespace] = []

    def run(args: argparse.Namespace) -> int:
        seen.append(args)
        return 0

    command = hive.Command(run, hive.COMMANDS["init"].options)
    monkeypatch.setitem(hive.COMMANDS, "init", command)
    line = "init --agent a --agent b --tls --ca-file x --username u --yes"
    assert alpha.run(line) == (0, "", "")
    said = vars(seen[0])
    assert (said["agent"], said["mqtt.tls"], said["yes"], said["force"]) == (
        *(["a", "b"], True),
        *(True, False),
    )
    assert (said["mqtt.username"], said["mqtt.ca_file"]) == ("u", Path("x"))
    alpha.run("init --no-agents --no-tls")
    assert (vars(seen[1])["agent"], vars(seen[1])["mqtt.tls"]) == ([], False)
