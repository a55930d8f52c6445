"""init: questions on a real terminal, options without one; a file that is whole, or none."""

from __future__ import annotations

import os
import pty
import re
import resource
import select
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, ROOT
from hypothesis import given
from hypothesis import strategies as st

import hive

PASSWORD = "correct horse"


def environment(home: Path) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HIVE_", "XDG_"))}
    return clean | {"HOME": str(home)}


def start(home: Path, *arguments: str, **how: Any) -> subprocess.Popen[str]:
    """Begin `hive.py init` in an empty home."""
    how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    command = [sys.executable, str(ROOT / "hive-cli"), "init", *arguments]
    return subprocess.Popen(command, cwd=home, env=environment(home), text=True, **how)


def init(home: Path, *arguments: str, said: str = "", **how: Any) -> tuple[int, str, str]:
    """Run it without a terminal: exit code, stdout, stderr."""
    child = start(home, *arguments, stdin=subprocess.PIPE, **how)
    out, err = child.communicate(said, timeout=PATIENCE)
    assert "Traceback" not in err
    return child.returncode, out, err


def config_file(home: Path) -> Path:
    return home / ".config" / "hive" / "hive.toml"


def openclaw(home: Path, *folders: str) -> None:
    for folder in folders:
        (home / folder).mkdir()
        (home / folder / "openclaw.json").write_text("{}")


class Terminal:
    """init on a terminal of its own, and a person in front of it."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self._parent, child = pty.openpty()
        files: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), child)
        self.child = start(home, *arguments, preexec_fn=partial(os.login_tty, child), **files)
        os.close(child)
        self.seen = ""

    def _read(self) -> bool:
        ready, _, _ = select.select([self._parent], [], [], PATIENCE)
        assert ready, f"nothing more after: {self.seen}"
        try:
            data = os.read(self._parent, 4096)
        except OSError:  # Linux says so when the other side has gone
            return False
        self.seen += data.decode()
        return bool(data)

    def answer(self, question: str, answer: str, end: str = "\n") -> None:
        """Wait for the question, then type."""
        asked = len(self.seen)
        while not re.search(question, self.seen[asked:]) or not self.seen.endswith("]: "):
            assert self._read(), f"it never asked for {question}: {self.seen}"
        os.write(self._parent, (answer + end).encode())
        self.seen += "\n"

    def end(self) -> int:
        while self._read():
            pass
        return self.child.wait(PATIENCE)

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self._parent)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def make(*arguments: str) -> Terminal:
        made.append(Terminal(tmp_path, *arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], hive.Config]:
    """Load what was written as the daemon would."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HIVE_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    return hive.load_config


def test_without_a_terminal_it_asks_nothing_and_takes_the_defaults(
    tmp_path: Path, load: Callable[[], hive.Config]
) -> None:
    openclaw(tmp_path, ".openclaw", ".openclaw-work")
    code, out, err = init(tmp_path)
    file, script, host = config_file(tmp_path), ROOT / "hive-cli", hive.short_host_name()
    assert (code, err) == (0, "")
    assert out == (
        f"wrote {file}: node {host}, broker: this machine alone, agents: main, work\n"
        f"next: python3 {script} doctor\n      python3 {script} daemon\n"
    )
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    config = load()
    assert (config.source, config.node.id, config.mqtt) == (file, host, hive.MqttConfig())
    assert {one.name: one.profile for one in config.oc_instances} == {"main": None, "work": "work"}
    assert config.handler_dir == ROOT / "hive-daemon.d"  # those that were in use before


def test_what_the_options_say_is_what_is_loaded(
    tmp_path: Path, load: Callable[[], hive.Config]
) -> None:
    openclaw(tmp_path, ".openclaw", ".openclaw-work")
    (tmp_path / "secret").write_text(f"{PASSWORD}\n")
    (tmp_path / "secret").chmod(0o600)
    options = "--node beta --prefix lab/hive --host broker.lan --username be --no-tls --agent work"
    more = "--password-file secret --handler-dir scripts --log-level debug"
    assert init(tmp_path, *options.split(), *more.split())[0] == 0
    said = {dotted for dotted, by in load().origin.items() if by == str(config_file(tmp_path))}
    assert said == {
        *("node.id", "node.topic_prefix", "node.handler_dir", "mqtt.host", "mqtt.username"),
        *("mqtt.password_file", "mqtt.tls", "logging.level"),
    }
    node, mqtt = load().node, load().mqtt
    assert (node.id, node.topic_prefix) == ("beta", "lab/hive")
    assert node.handler_dir == tmp_path / "scripts"
    assert (mqtt.address, mqtt.username, mqtt.password) == ("broker.lan:1883", "be", PASSWORD)
    assert [*load().agents] == ["work"]
    assert load().warnings == ()


def test_every_other_key_stays_in_the_file_as_a_comment(tmp_path: Path) -> None:
    openclaw(tmp_path, ".openclaw")
    init(tmp_path, "--node", "beta", "--host", "broker.lan")
    written = config_file(tmp_path).read_text().splitlines()
    for line in hive.example_config().splitlines():
        key = line.removeprefix("# ").partition(" = ")[0]
        assert line in written or any(one.startswith(f"{key} = ") for one in written) or "[" in line


def test_the_questions_lead_to_what_is_loaded(
    tmp_path: Path, terminal: Callable[..., Terminal], load: Callable[[], hive.Config]
) -> None:
    openclaw(tmp_path, ".openclaw", ".openclaw-old", ".openclaw-work")
    person = terminal()
    person.answer(r"node's name \[", "attic")
    person.answer("Broker", "broker.lan:2883")
    person.answer("User name", "atti")
    person.answer("Password", PASSWORD)
    person.answer(r"TLS.*\[y/N\]", "")
    person.answer(r"agent main\? \[Y/n\]", "")
    person.answer("agent old", "n")
    person.answer("agent work", "yes")
    assert person.end() == 0
    assert PASSWORD not in person.seen
    config, secret = load(), config_file(tmp_path).with_name("mqtt-password")
    assert (config.node.id, config.mqtt.address, config.mqtt.tls) == (
        "attic",
        "broker.lan:2883",
        False,
    )
    assert (config.mqtt.username, config.mqtt.password) == ("atti", PASSWORD)
    assert (config.mqtt.password_file, secret.read_text()) == (secret, f"{PASSWORD}\n")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert PASSWORD not in config_file(tmp_path).read_text()
    assert [*config.agents] == ["main", "work"]
    assert "doctor\r\n" in person.seen and person.seen.endswith("daemon\r\n")


def test_return_at_every_question_is_this_machine_alone(
    tmp_path: Path, terminal: Callable[..., Terminal], load: Callable[[], hive.Config]
) -> None:
    person = terminal()
    person.answer("name", "")
    person.answer("Broker", "")
    assert person.end() == 0
    assert "mqtt.host" not in load().origin and load().node.id == hive.short_host_name()


def test_with_tls_the_port_and_the_signers_file_follow(
    tmp_path: Path, terminal: Callable[..., Terminal]
) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    person = terminal("--node", "beta", "--host", "::1", "--username", "beta")
    person.answer("Password", "")
    person.answer("TLS", "y")
    person.answer("Certificate", "nowhere.pem")
    person.answer("'nowhere.pem' is not a file that is there(.|\n)*Certificate", "ca.pem")
    assert person.end() == 2
    assert f"hive: TLS: {tmp_path}/ca.pem: " in person.seen
    assert not config_file(tmp_path).exists()
    assert init(tmp_path, "--node=beta", "--host=::1", "--tls")[0] == 0
    assert hive.load_config(str(config_file(tmp_path))).mqtt.address == "[::1]:8883"


def test_an_answer_that_cannot_be_is_explained_and_asked_for_again(
    terminal: Callable[..., Terminal],
) -> None:
    person = terminal()
    person.answer("name", "a/b")
    person.answer(r"'a/b' is not a name: 1 to 63 of (.|\n)*name", "all")
    person.answer("'all' is not", "caf\xe9")
    person.answer("is not a name", "attic")
    person.answer("Broker", "broker.lan:http")
    person.answer("is not a host or host:port(.|\n)*Broker", "http://x")
    person.answer("Broker", "")
    assert person.end() == 0


@pytest.mark.parametrize(
    ("key", "code", "line"),
    [
        ("\x03", 130, "hive: interrupted; nothing was written\r\n"),
        ("\x04", 2, "hive: end of input; nothing was written; --yes asks nothing\r\n"),
    ],
)
@pytest.mark.parametrize("at", ["Broker", "Password"])
def test_ctrl_c_and_the_end_of_input_leave_nothing_behind(
    tmp_path: Path, terminal: Callable[..., Terminal], key: str, code: int, line: str, at: str
) -> None:
    person = terminal("--node", "beta")
    if at == "Password":
        person.answer("Broker", "localhost")
        person.answer("User", "me")
    person.answer(at, key, end="")
    assert person.end() == code
    assert person.seen.endswith(line) and "Traceback" not in person.seen
    assert [*tmp_path.iterdir()] == []


def test_options_and_yes_answer_the_questions(terminal: Callable[..., Terminal]) -> None:
    assert terminal("--yes").end() == 0


def test_a_file_that_is_there_is_replaced_only_by_force(tmp_path: Path) -> None:
    file = config_file(tmp_path)
    init(tmp_path, "--node", "first")
    before = file.read_bytes()
    code, out, err = init(tmp_path, "--node", "second")
    assert (code, out) == (1, "")
    assert err == f"hive: {file}: is there already, and stays as it is; --force replaces it\n"
    assert file.read_bytes() == before
    assert init(tmp_path, "--node", "second", "--force")[0] == 0
    assert hive.load_config(str(file)).node.id == "second"
    assert [*file.parent.iterdir()] == [file]


def test_of_many_at_once_one_wins_and_its_file_is_whole(tmp_path: Path) -> None:
    names = [f"node{i}" for i in range(6)]
    options = ("--username", "x", "--password-file", "-")
    children = [start(tmp_path, "--node", one, *options, stdin=subprocess.PIPE) for one in names]
    for name, child in zip(names, children, strict=True):
        assert child.stdin
        child.stdin.write(name)
        child.stdin.close()
    codes = [child.wait(PATIENCE) for child in children]
    for child in children:
        assert child.stdout and child.stderr
        child.stdout.close()
        child.stderr.close()
    assert sorted(codes) == [0, *[1] * 5]
    config = hive.load_config(str(config_file(tmp_path)))
    assert config.node.id == config.mqtt.password == names[codes.index(0)]
    assert len([*config_file(tmp_path).parent.iterdir()]) == 2


def test_where_the_second_file_came_in_between_the_first_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    password, config = tmp_path / "mqtt-password", tmp_path / "hive.toml"
    write_beside = hive.write_beside

    def be_late(file: Path, *more: Any) -> str:
        temporary = write_beside(file, *more)
        if file == config:
            config.write_text("another's")
        return temporary

    monkeypatch.setattr(hive, "write_beside", be_late)
    with pytest.raises(hive.HiveError) as caught:
        hive.write_privately({password: PASSWORD, config: "[node]"}, force=False)
    assert str(caught.value) == f"{config}: File exists; nothing was written"
    assert [*tmp_path.iterdir()] == [config] and config.read_text() == "another's"


def test_a_link_is_not_followed_and_a_device_not_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link.toml"
    link.symlink_to(target)
    for place in (str(link), os.devnull, str(tmp_path)):
        code, _, err = init(tmp_path, "--config", place, "--force")
        assert (code, err.count("\n")) == (1, 1) and "no regular file" in err
    assert link.is_symlink() and not target.exists() and os.path.exists(os.devnull)


def test_a_folder_that_others_may_change_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    code, _, err = init(tmp_path, "--config", "open/sub/hive.toml")
    assert code == 1 and [*folder.iterdir()] == []
    assert err == (
        f"hive: {folder}/sub/hive.toml: not written: {folder}: is writable by everyone;"
        f" try: chmod o-w {folder}\n"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, -1)
    code, _, err = init(tmp_path)
    assert (code, err.count("\n")) == (1, 1) and "belongs to another user" in err


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    code, _, err = init(tmp_path, preexec_fn=fill)
    assert (code, err.count("\n")) == (1, 1)
    assert err.endswith("File too large; nothing was written\n")
    assert [*config_file(tmp_path).parent.iterdir()] == []


def test_a_place_where_nothing_can_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    code, _, err = init(tmp_path, "--config", "file/hive.toml")
    assert (code, err.count("\n")) == (1, 1) and "Not a directory" in err


def test_a_wrong_option_is_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    for options, words in (
        (
            ["--agent", "nobody"],
            "--agent 'nobody': no such OpenClaw profile; there are: claude=DIR",
        ),
        (["--node", "a b"], "argument --node: 'a b' is not a name"),
        (["--password-file", "nowhere"], f"mqtt.password_file: {tmp_path}/nowhere: No such file"),
        (["--password-file", "-"], "--password-file -: not one line of text, not empty"),
        (["--ca-file", "nowhere"], f"TLS: {tmp_path}/nowhere: No such file"),
    ):
        code, _, err = init(tmp_path, *options)
        assert (code, err.count("\n")) == (2, 1) and words in err
    assert [*tmp_path.iterdir()] == []


def test_a_password_on_stdin_goes_to_a_file_of_its_own(tmp_path: Path) -> None:
    options = ("--config", "beta.toml", "--username", "b", "--password-file", "-")
    assert init(tmp_path, *options, said=f"{PASSWORD}\n")[0] == 0
    config = hive.load_config(str(tmp_path / "beta.toml"))
    assert config.mqtt.password_file == tmp_path / "beta-mqtt-password"
    assert (config.mqtt.host, config.mqtt.password) == ("localhost", PASSWORD)
    assert 'host = "localhost"' in (tmp_path / "beta.toml").read_text()


def test_the_next_commands_name_a_file_that_would_not_be_found(tmp_path: Path) -> None:
    for name in ("my hive.toml", "hive.toml"):
        file = tmp_path / name
        out = init(tmp_path, "--config", name)[1]
        quoted = f"'{file}'" if " " in file.name else file
        assert out.count(f" --config {quoted}\n") == 2
    usual = str(config_file(tmp_path))
    assert "--config" not in init(tmp_path, "--config", usual)[1]


def test_agents_are_found_by_the_folders_of_their_profiles(tmp_path: Path) -> None:
    openclaw(tmp_path, ".openclaw-b", ".openclaw", ".openclaw-a", ".openclaw-all", ".openclaw.old")
    openclaw(tmp_path, ".openclaw-a b", ".openclaw-default")
    (tmp_path / ".openclaw-empty").mkdir()
    assert hive.find_agents(tmp_path) == {"main": None, "a": "a", "b": "b"}
    openclaw(tmp_path, ".openclaw-main")
    assert hive.find_agents(tmp_path) == {"default": None, "main": "main", "a": "a", "b": "b"}


@pytest.mark.parametrize(
    ("said", "address"),
    [
        ("broker.lan", ("broker.lan", None)),
        ("10.0.0.1:2883", ("10.0.0.1", 2883)),
        ("::1", ("::1", None)),
        ("[fe80::1]:1884", ("fe80::1", 1884)),
        ("a:0", None),
        ("a:b", None),
        ("mqtt://a", None),
        ("a b", None),
        ("me@a", None),
        ("a:99999", None),
        ("", None),
    ],
)
def test_a_broker_is_a_host_and_perhaps_a_port(said: str, address: object) -> None:
    if address:
        assert hive.broker_address(said) == address
    else:
        with pytest.raises(ValueError):
            hive.broker_address(said)


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@given(words, st.lists(words, max_size=3), st.integers(1, 65535))
def test_what_was_chosen_is_what_the_file_says(host: str, agents: list[str], port: int) -> None:
    chosen: dict[str, Any] = {"mqtt": {"host": host, "port": port, "tls": True}}
    if agents:
        chosen["oc_instances"] = [{"name": one, "profile": one} for one in agents]
    said = tomllib.loads(hive.example_config(chosen))
    assert {table: keys for table, keys in said.items() if keys} == chosen


# The edges of all that


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (hive.yes_or_no, {"y": True, "Yes": True, "N": False, "no": False}, ["", "ye", "1", 1]),
        (hive.user_name, {"me": "me", "a b": "a b", "": ""}, ["a\tb", "a\nb", "\x7f", 5]),
        (hive.password_line, {"x": "x", " x ": " x "}, ["", "a\nb", "a\n", "a\u2028b", None]),
    ],
)
def test_an_answer_is_held_to_its_kind(
    kind: Callable[[Any], object], good: dict[str, object], bad: list[object]
) -> None:
    assert {said: kind(said) for said in good} == good
    for said in bad:
        with pytest.raises(ValueError):
            kind(said)


def test_of_the_agents_that_are_found_those_are_woken_that_are_wanted() -> None:
    found, nobody = {"main": None, "a": "a", "b": "b"}, hive.Prompt(asking=False)
    everyone = [{"name": "main"}, {"name": "a", "profile": "a"}, {"name": "b", "profile": "b"}]
    assert hive.choose_agents(nobody, found, None) == everyone
    assert hive.choose_agents(nobody, found, ["b", "main"]) == [everyone[0], everyone[2]]
    assert hive.choose_agents(nobody, found, []) == []
    with pytest.raises(
        hive.UsageError, match=r"'c': no such .* there are: main, a, b, claude=DIR, "
    ):
        hive.choose_agents(nobody, found, ["a", "c"])
    claude = {"name": "claude", "via": "claude", "dir": str(Path("site").absolute())}
    assert hive.choose_agents(nobody, found, ["claude=site", "a"]) == [claude, everyone[1]]


def test_advice_names_what_it_is_about_once() -> None:
    place = Path("/x")
    assert hive.said_against(place, "is open; try: chmod o-w") == "/x: is open; try: chmod o-w /x"
    assert hive.said_against(place, "is closed; try: chmod +x /x") == (
        "/x: is closed; try: chmod +x /x"
    )
    assert hive.said_against(place, "belongs to another user") == "/x: belongs to another user"


def test_a_folder_where_nobody_can_replace_anothers_file_will_do(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    assert init(tmp_path, "--config", "hive.toml")[0] == 0
    assert stat.S_IMODE((tmp_path / "hive.toml").stat().st_mode) == 0o600


def test_without_a_user_name_no_password_is_asked_for(
    terminal: Callable[..., Terminal], load: Callable[[], hive.Config]
) -> None:
    person = terminal("--node", "beta")
    person.answer(r"Broker.*\[none: this machine alone\]", "broker.lan")
    person.answer(r"User name there \[none\]", "")
    person.answer("TLS", "y")
    person.answer(r"Certificate.*\[the system's list\]", "")
    assert person.end() == 0
    mqtt = load().mqtt
    assert (mqtt.address, mqtt.tls, mqtt.ca_file) == ("broker.lan:8883", True, None)
    assert (mqtt.username, mqtt.password) == (None, None)
    assert "Password" not in person.seen


def test_what_is_said_of_a_broker_means_one_on_this_machine(
    tmp_path: Path, load: Callable[[], hive.Config]
) -> None:
    code, out, _ = init(tmp_path, "--tls", "--no-agents")
    assert code == 0 and ", broker: localhost, agents: none\n" in out
    assert (load().mqtt.address, load().mqtt.tls) == ("localhost:8883", True)
    assert init(tmp_path, "--port", "77", "--tls", "--force")[0] == 0
    assert load().mqtt.address == "localhost:77"
    assert init(tmp_path, "--no-tls", "--force")[0] == 0
    assert (load().mqtt.address, load().mqtt.tls) == ("localhost:1883", False)


# ---- Changing a hive.toml that is there --------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "[mqtt]\nport = 8883\ntls = true\n"),
        ("# mine\n", "# mine\n\n[mqtt]\nport = 8883\ntls = true\n"),
        ("[mqtt]\n", "[mqtt]\ntls = true\nport = 8883\n"),
        ("[mqtt] # here\nport = 1\n[node]\n", "[mqtt] # here\ntls = true\nport = 8883\n[node]\n"),
        ("[mqtt]\nport = 8883\ntls = true\n", "[mqtt]\nport = 8883\ntls = true\n"),
        (
            '[mqtt]\npassword = "x"\n\n[[schedule]]\naction = "a"\nevery = "5m"\nport = 1\n',
            '[mqtt]\ntls = true\nport = 8883\n# password = "x"\n\n[[schedule]]\naction = "a"\n'
            'every = "5m"\nport = 1\n',
        ),
    ],
)
def test_a_few_keys_are_changed_and_all_else_stays(before: str, after: str, tmp_path: Path) -> None:
    file = tmp_path / "hive.toml"
    file.write_text(before)
    said = {"mqtt.port": 8883, "mqtt.tls": True, "mqtt.password": None, "node.topic_prefix": "hive"}
    assert sorted(hive.changed_toml(file, said).splitlines()) == sorted(after.splitlines())
    assert tomllib.loads(hive.changed_toml(file, said)) == tomllib.loads(after)
    assert file.read_text() == before


@pytest.mark.parametrize(
    "odd",
    [
        "mqtt = { port = 1 }\n",
        "mqtt.port = 1\n",
        '["mqtt"]\nport = 1\n',
        '[mqtt]\n"port" = 1\n',
        'x = """\n[mqtt]\nport = 1\n"""\n[mqtt]\nhost = """\nport = 2\n"""\n',
    ],
)
def test_what_is_written_otherwise_is_left_to_its_writer(odd: str, tmp_path: Path) -> None:
    file = tmp_path / "hive.toml"
    file.write_text(odd)
    with pytest.raises(
        hive.ConfigError, match=r"cannot be changed here; set there: mqtt\.port = 8883"
    ):
        hive.changed_toml(file, {"mqtt.port": 8883})
