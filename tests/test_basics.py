"""What a user can act on, the exit code it ends in, and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hive import (
    BrokerError,
    ConfigError,
    EnvelopeError,
    Field,
    HiveError,
    NoReplyError,
    UsageError,
    Value,
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


def hidden(default: str) -> Any:
    return Field(default, str, help="how to open it", shown=False)


class Box(Value):
    """What a value can have."""

    LIMIT: ClassVar[int] = 3

    width: int
    label: str = "box"
    key: str = hidden("none")

    @property
    def wide(self) -> bool:
        return self.width > self.LIMIT


class Crate(Box):
    lid: bool = False


def test_a_value_has_a_field_for_each_annotation_and_what_it_inherits() -> None:
    assert [*Box.FIELDS] == ["width", "label", "key"]
    assert [*Crate.FIELDS] == ["width", "label", "key", "lid"]
    assert [*Value.FIELDS] == []
    assert Box.FIELDS["key"].help == "how to open it" and Box.FIELDS["label"].default == "box"
    crate = Crate(7, key="k")
    assert (crate.width, crate.label, crate.key, crate.lid, crate.wide) == (
        7,
        "box",
        "k",
        False,
        True,
    )


def test_values_are_equal_if_all_their_fields_and_their_kind_are() -> None:
    assert Box(1) == Box(width=1, label="box") and hash(Box(1)) == hash(Box(label="box", width=1))
    assert Box(1) != Box(2) and Box(1, "a") != Box(1, "b")
    assert Box(1) != Crate(1) and Box(1) != 1
    assert len({Box(1), Box(1), Box(2)}) == 2


def test_a_value_does_not_change() -> None:
    box = Box(1)
    with pytest.raises(AttributeError, match=r"Box\.width: a value does not change"):
        box.width = 2  # type: ignore[misc]
    with pytest.raises(AttributeError):
        box.height = 2  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        del box.width
    assert box.replace(width=2, label="new") == Box(2, "new") and box == Box(1)


@pytest.mark.parametrize(
    ("values", "named"),
    [((), {}), ((1, "a", "b", "c"), {}), ((1,), {"height": 2}), ((), {"height": 2})],
    ids=["missing", "too many", "unknown", "missing and unknown"],
)
def test_a_value_takes_its_own_fields_and_no_others(
    values: tuple[Any, ...], named: dict[str, Any]
) -> None:
    with pytest.raises(TypeError, match="Box: its fields are width, label, key"):
        Box(*values, **named)


def test_a_value_shows_its_fields_but_no_secret() -> None:
    assert repr(Crate(1, key="opensesame")) == "Crate(width=1, label='box', lid=False)"


def test_a_value_can_be_taken_apart() -> None:
    match Crate(3, "x"):
        case Box(3, label):
            assert label == "x"
        case _:
            raise AssertionError("it does not match")
