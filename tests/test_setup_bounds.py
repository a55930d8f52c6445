"""What init asks and what it does not, and that nothing of a file can be seen half written."""

from __future__ import annotations

import contextlib
import getpass
import io
import os
import stat
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hive


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> Callable[..., hive.Prompt]:
    """Somebody who gives these answers, and then none."""

    def sit_down(*answers: str) -> hive.Prompt:
        typed = SimpleNamespace(buffer=io.BytesIO("".join(answers).encode()))
        monkeypatch.setattr(sys, "stdin", typed)
        return hive.Prompt(asking=True)

    return sit_down


# ---- Asking ------------------------------------------------------------------------------


def test_questions_are_no_output(
    person: Callable[..., hive.Prompt], capsys: pytest.CaptureFixture[str]
) -> None:
    ask = person("a b\n", "beta\n", "\n", "\n")
    assert ask.ask("Name", hive.node_name, "alpha") == "beta"
    assert ask.ask("Name", hive.node_name, "alpha") == "alpha"
    assert ask.ask("Where", hive.node_name, "", "none") == ""
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("Name [alpha]:   'a b' is not a name: 1 to 63 of ")
    assert said.err.endswith("\nName [alpha]: Name [alpha]: Where [none]: ")


def test_an_answer_is_one_line_of_a_bounded_length(person: Callable[..., hive.Prompt]) -> None:
    fits = "x" * 4095
    assert person(f"{fits}\n").ask("?", hive.user_name, "") == fits
    for cut in (f"{fits}x\n", "x", ""):
        with pytest.raises(EOFError):
            person(cut).ask("?", hive.user_name, "")


def test_a_password_is_asked_for_until_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, answers = list[str](), ["a\x0bb", "secret", ""]

    def getpassed(question: str) -> str:
        asked.append(question)
        return answers.pop(0)

    monkeypatch.setattr(getpass, "getpass", getpassed)
    ask = hive.Prompt(asking=True)
    assert ask.password("Password") == "secret"
    assert ask.password("Password") is None
    assert hive.Prompt(asking=False).password("Password") is None
    assert asked == ["Password (not shown) [none]: "] * 3
    assert capsys.readouterr() == ("", "  that is not one line of text, not empty\n")


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ({}, ["name", "Broker"]),
        ({"node.id": "x"}, ["Broker"]),
        ({"mqtt.host": "h"}, ["name", "User", "TLS"]),
        ({"mqtt.host": "h", "mqtt.username": "u"}, ["name", "Password", "TLS"]),
        ({"mqtt.host": "h", "mqtt.username": "u", "mqtt.password": "p"}, ["name", "TLS"]),
        ({"mqtt.host": "h", "mqtt.username": "u", "mqtt.password_file": "f"}, ["name", "TLS"]),
        ({"mqtt.host": "h", "mqtt.tls": False}, ["name", "User"]),
        ({"mqtt.host": "h", "mqtt.tls": True}, ["name", "User", "Certificate"]),
        ({"mqtt.host": "h", "mqtt.tls": True, "mqtt.ca_file": "c"}, ["name", "User"]),
    ],
)
def test_what_the_options_have_said_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], asked: list[str]
) -> None:
    questions, ask = list[str](), hive.Prompt(asking=False)

    def answer(question: str, check: object, default: Any, instead: str = "") -> Any:
        questions.append(question)
        return default

    def no_password(question: str) -> None:
        questions.append(question)

    monkeypatch.setattr(ask, "ask", answer)
    monkeypatch.setattr(ask, "password", no_password)
    found = dict(said)
    hive.ask_missing(ask, found)
    assert len(questions) == len(asked)
    assert all(word in one for word, one in zip(asked, questions, strict=True))
    port = {"mqtt.port": 8883} if said.get("mqtt.tls") else {}
    assert found == {"node.id": hive.short_host_name()} | port | said


def test_answers_become_keys(
    person: Callable[..., hive.Prompt], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(getpass, "getpass", lambda question: "secret")
    (tmp_path / "ca.pem").write_text("x")
    said: dict[str, Any] = {"node.id": "x"}
    hive.ask_missing(person("h:77\n", "me\n", "y\n", f"{tmp_path}/ca.pem\n"), said)
    assert said == {
        **{"node.id": "x", "mqtt.host": "h", "mqtt.port": 77, "mqtt.username": "me"},
        **{"mqtt.password": "secret", "mqtt.tls": True, "mqtt.ca_file": tmp_path / "ca.pem"},
    }
    said = {"node.id": "x"}
    hive.ask_missing(person("\n"), said)
    assert said == {"node.id": "x"}


@pytest.mark.parametrize("agent", ["claude", "claude=", "nothing=site", "=site"])
def test_a_program_is_wanted_with_its_folder(agent: str) -> None:
    with pytest.raises(hive.UsageError, match="no such OpenClaw profile"):
        hive.choose_agents(hive.Prompt(asking=False), {"main": None}, [agent])


def test_handlers_stay_in_sight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beside hive.py, unless there are some beside hive.toml, or somebody has said which."""
    monkeypatch.setattr(hive, "__file__", str(tmp_path / "checkout" / "hive.py"))
    file, beside = tmp_path / "config" / "hive.toml", tmp_path / "checkout" / "hive-daemon.d"

    def kept(**said: Any) -> dict[str, Any]:
        hive.keep_handlers(file, said)
        return said

    assert kept() == {}
    beside.mkdir(parents=True)
    assert kept() == {"node.handler_dir": beside}
    assert kept(**{"node.handler_dir": "x"}) == {"node.handler_dir": "x"}
    (file.parent / "hive-daemon.d").mkdir(parents=True)
    assert kept() == {}


# ---- A new hive.toml, and one that is there ------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(hive, "__file__", str(tmp_path / "checkout" / "hive.py"))
    return tmp_path


def keys_in(text: str) -> dict[str, Any]:
    return {table: keys for table, keys in tomllib.loads(text).items() if keys}


def test_a_new_one_says_what_is_not_the_default_and_which_agents_there_are(home: Path) -> None:
    said = {"node.topic_prefix": "hive", "mqtt.port": 77, "node.id": "x", "mqtt.password": None}
    text = hive.configured(home / "hive.toml", said)
    assert keys_in(text) == {"node": {"id": "x"}, "mqtt": {"port": 77}}
    (home / ".openclaw").mkdir()
    (home / ".openclaw" / "openclaw.json").write_text("{}")
    (home / "checkout" / "hive-daemon.d").mkdir(parents=True)
    agents = {"oc_instances": [{"name": "main"}]}
    handlers = {"handler_dir": str(home / "checkout" / "hive-daemon.d")}
    assert keys_in(hive.configured(home / "hive.toml", {})) == agents | {"node": handlers}


def test_one_that_others_may_change_is_not_built_upon(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = home / "hive.toml"
    file.write_text("[node]\n")
    assert hive.configured(file, {"node.id": "x"}) == '[node]\nid = "x"\n'
    file.write_text('[mqtt]\npassword = "x"\n')
    file.chmod(0o666)
    with pytest.raises(hive.ConfigError):
        hive.configured(file, {"node.id": "x"})


def test_a_key_that_was_a_comment_looks_as_in_a_new_file(tmp_path: Path) -> None:
    example = hive.example_config()
    for table, key, value in (("mqtt", "port", 8883), ("mqtt", "host", "h"), ("node", "id", "x")):
        changed = hive.with_key(example, table, key, value)
        assert changed == hive.example_config({table: {key: value}})
        unset = [one for one in example.splitlines() if one not in changed.splitlines()]
        taken_out = hive.with_key(changed, table, key, None)
        assert len(unset) == 1 and taken_out == changed.replace(f"\n{key} = ", f"\n# {key} = ")
        assert hive.with_key(example, table, key, None) == example
    assert hive.with_key("[mqtt]\nx = 1\n", "mqtt", "port", None) == "[mqtt]\nx = 1\n"


def test_what_is_so_already_keeps_nothing_from_what_follows(tmp_path: Path) -> None:
    file = tmp_path / "hive.toml"
    file.write_text("[mqtt]\nport = 77\nca_file = 'x'\n")
    said = {"mqtt.port": 77, "mqtt.tls": False, "mqtt.host": "h", "mqtt.ca_file": None}
    changed = tomllib.loads(hive.changed_toml(file, said))
    assert changed == {"mqtt": {"port": 77, "host": "h"}}
    place = tmp_path / "ca.pem"
    changed = tomllib.loads(hive.changed_toml(file, {"mqtt.ca_file": place, "mqtt.port": 1883}))
    assert changed == {"mqtt": {"port": 1883, "ca_file": str(place)}}
    file.write_text("[mqtt]\nport = 77\n")  # its last key goes, and its table may stay
    assert tomllib.loads(hive.changed_toml(file, {"mqtt.port": None})) == {"mqtt": {}}


def test_what_must_be_set_by_hand_is_named_without_what_is_taken_out(tmp_path: Path) -> None:
    file = tmp_path / "hive.toml"
    file.write_text("mqtt.port = 1\n")
    with pytest.raises(hive.ConfigError) as caught:
        hive.changed_toml(file, {"mqtt.password": None, "mqtt.port": 8883, "mqtt.host": "h"})
    assert str(caught.value).endswith('; set there: mqtt.port = 8883, mqtt.host = "h"')


# ---- Whole, or not at all ------------------------------------------------------------------


def test_what_is_written_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, seen = tmp_path / "hive.toml", list[str]()

    def synced(descriptor: int) -> None:
        seen.append(f"{os.fstat(descriptor).st_size} bytes")

    def replaced(source: str, target: Path) -> None:
        assert Path(source).parent == target.parent and Path(source).name.startswith(".hive.toml.")
        seen.append(f"{stat.S_IMODE(target.stat().st_mode):o}")  # its place, until then
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    hive.write_privately({file: "secret"}, force=False)
    assert seen == ["6 bytes", "600"] and file.read_text() == "secret"


@pytest.mark.parametrize("forced", [False, True])
def test_of_two_files_none_is_left_where_the_second_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forced: bool
) -> None:
    files = {tmp_path / "password": "x", tmp_path / "hive.toml": "y"}

    def fail(source: str, target: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            target.unlink()  # somebody is quick
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(hive.HiveError) as caught:
        hive.write_privately(files, force=forced)
    assert str(caught.value) == (
        f"{tmp_path}/hive.toml: No space left on device; nothing was written"
    )
    assert [*tmp_path.iterdir()] == []


def test_only_ones_own_and_roots_folder_may_be_open_to_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o1777)
    hive.refuse_to_write(tmp_path / "x", force=False)
    if os.geteuid() == 0:
        os.chown(tmp_path, 4242, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(hive.HiveError, match="not written"):
        hive.refuse_to_write(tmp_path / "x", force=False)


def test_the_groups_right_to_write_is_named_with_its_folder() -> None:
    said = hive.said_against(Path("/x"), "is open; try: chmod g-w")
    assert said == "/x: is open; try: chmod g-w /x"


@pytest.mark.parametrize(
    ("name", "secret"), [("hive.toml", "mqtt-password"), ("beta.toml", "beta-mqtt-password")]
)
def test_a_password_lies_beside_its_hive_toml(tmp_path: Path, name: str, secret: str) -> None:
    file, agents = tmp_path / name, [{"name": "main"}]
    said = {"node.id": "x", "mqtt.host": "h", "mqtt.username": "u"}
    files = hive.setup_files(file, said | {"mqtt.password": "secret"}, agents)
    assert [*files] == [tmp_path / secret, file] and files[tmp_path / secret] == "secret\n"
    mqtt = {"host": "h", "username": "u"}
    written = {"oc_instances": agents, "node": {"id": "x"}, "mqtt": mqtt}
    assert keys_in(files[file]) == written | {"mqtt": mqtt | {"password_file": secret}}
    files = hive.setup_files(file, said, [])
    assert [*files] == [file] and keys_in(files[file]) == {"node": {"id": "x"}, "mqtt": mqtt}
    with pytest.raises(hive.ConfigError, match="TLS: "):
        hive.setup_files(file, said | {"mqtt.tls": True, "mqtt.ca_file": tmp_path / "none"}, [])
    hive.setup_files(file, said | {"mqtt.ca_file": tmp_path / "none"}, [])  # and is no matter
    with pytest.raises(hive.ConfigError):
        hive.setup_files(file, {"node.id": "a b"}, [])


def test_what_is_there_is_written_over_by_force_if_it_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "hive.toml"
    hive.write_privately({file: "1"}, force=False)
    assert [stat.S_IMODE(one.stat().st_mode) for one in (file, file.parent)] == [0o600, 0o700]
    with pytest.raises(hive.HiveError, match="is there already, and stays as it is; --force"):
        hive.write_privately({file: "2"}, force=False)
    file.chmod(0o644)
    hive.write_privately({file: "3"}, force=True)
    assert file.read_text() == "3" and stat.S_IMODE(file.stat().st_mode) == 0o600
    link = file.with_name("link")
    link.symlink_to(file)
    with pytest.raises(hive.HiveError, match="it is no regular file"):
        hive.write_privately({link: "4"}, force=True)
    file.parent.chmod(0o777)
    with pytest.raises(hive.HiveError, match="is writable by everyone; try: chmod o-w /"):
        hive.write_privately({file: "5"}, force=True)
    assert file.read_text() == "3" and len([*file.parent.iterdir()]) == 2
