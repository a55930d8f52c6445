"""What a user can act on, and the exit code it ends in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hive import (
    BrokerError,
    ConfigError,
    EnvelopeError,
    HiveError,
    NoReplyError,
    UsageError,
    main,
    quoted,
    reason_of,
)

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.binary()
    | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (HiveError, 1),
        (UsageError, 2),
        (ConfigError, 2),
        (EnvelopeError, 2),
        (BrokerError, 3),
        (NoReplyError, 4),
    ],
)
def test_each_kind_of_fault_has_its_exit_code(kind: type[HiveError], code: int) -> None:
    assert int(kind("why").exit) == code


def test_a_fault_is_one_line_on_stderr(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main(["config", "--config", "no\nwhere.toml"])
    line = "hive: 'no\\nwhere.toml': no such file (named by --config)\n"
    assert (code, *capsys.readouterr()) == (2, "", line)


@settings(deadline=None, max_examples=60)
@given(anything, st.integers(10, 100))
def test_whatever_a_peer_sent_can_be_shown(value: object, limit: int) -> None:
    said = quoted(value, limit)
    assert len(said) <= limit
    assert said.isprintable() and said.removesuffix("…").isascii()


@pytest.mark.parametrize(
    "value", [10**5000, [10**5000], nested(100_000)], ids=["an int", "an int in a list", "a list"]
)
def test_what_is_too_large_is_said_to_be(value: object) -> None:
    assert quoted(value).endswith("too large to show")


def test_a_long_value_is_cut_where_one_can_see_it() -> None:
    assert quoted("x" * 70_000, 10) == "'xxxxxxxx…"
    assert quoted("x" * 8, 10) == "'xxxxxxxx'"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(2, "No such file or directory"), "No such file or directory"),
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused"),
        (TimeoutError("timed out"), "timed out"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_reason_is_in_words(error: Exception, words: str) -> None:
    assert reason_of(error) == words
