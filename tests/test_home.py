"""What happens where nobody knows this user's home: no folder called `~` is made, or believed."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

import hive
from hive import COMMANDS, ConfigError, expand_home, home_folder

NEED_NO_PLACE = {"completion", "handler", "help"}
ARGUMENTS = {
    "send": ["--to=a", "--text=b"],
    "reply": ["--to-msg=abcd", "--text=b"],
    "show": ["abcd"],
    "forget": ["attic"],
    "host": ["--listen", "127.0.0.1"],
    "invite": ["mini"],
    "expel": ["mini"],
    "join": ["hive1.eyJ"],
    "handler": ["list"],
    "completion": ["bash"],
}


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR", "STATE_DIRECTORY", "HIVE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("empty", [False, True], ids=["no HOME", "HOME="])
@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"doctor", "hook", "mcp"}))
def test_one_line_asks_for_a_home(
    homeless: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    empty: bool,
) -> None:
    if empty:
        monkeypatch.setenv("HOME", "")
    code = hive.main([name, *ARGUMENTS.get(name, [])])
    said = capsys.readouterr()
    assert not [*homeless.iterdir()]
    if name in NEED_NO_PLACE:
        assert code == 0 and not said.err
    else:
        assert code == 2 and said.err.count("\n") == 1
        assert "set HOME" in said.err and "state_dir" in said.err


def test_doctor_says_so_and_goes_on(homeless: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hive.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "set HOME" in said and "agents" in said and not [*homeless.iterdir()]


@pytest.mark.parametrize("state", ["/state", "state"])
def test_a_state_dir_is_enough(
    homeless: Path, capsys: pytest.CaptureFixture[str], state: str
) -> None:
    file = homeless / "mine.toml"
    place = f"{homeless}{state}" if state[0] == "/" else state
    file.write_text(f'[node]\nstate_dir = "{place}"\n[mqtt]\nhost = "127.0.0.1"\nport = 1\n')
    assert hive.main(["status", "--config", str(file)]) == 3
    assert hive.main(["init", "--yes", "--force", "--no-agents", "--config", str(file)]) == 0
    assert [one.name for one in homeless.iterdir()] == ["mine.toml"]


def test_a_folder_called_tilde_is_not_believed(homeless: Path) -> None:
    file = homeless / "~" / ".config" / "hive" / "hive.toml"
    file.parent.mkdir(parents=True)
    file.write_text('[node]\nid = "stranger"\n')
    assert hive.find_config(None) is None
    assert home_folder() == Path("/nonexistent")


def test_a_relative_home_or_state_home_does_not_count(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "here")
    monkeypatch.setenv("XDG_STATE_HOME", "there")
    with pytest.raises(ConfigError, match="set HOME"):
        hive.default_state_dir("alpha")
    monkeypatch.setenv("HOME", "/home/me")
    assert hive.default_state_dir("alpha") == Path("/home/me/.local/state/hive/alpha")


def test_a_user_that_there_is_not(homeless: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="there is no user nosuch"):
        expand_home("~nosuch/state")
    file = homeless / "hive.toml"
    file.write_text('[node]\nstate_dir = "~nosuch/state"\n')
    assert hive.main(["status", "--config", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
