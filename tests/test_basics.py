"""What a user can act on, the exit code it ends in, and values."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hive
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
    assert (hive.Exit.DONE, hive.Exit.INTERRUPTED) == (0, 130)


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


# What is shown


@pytest.mark.parametrize(
    ("text", "limit", "begin", "end"),
    [
        ("", 3, "", ""),
        ("abc", 3, "abc", "abc"),
        ("abcd", 3, "ab…", "…cd"),
        ("abcdefgh", 5, "abcd…", "…efgh"),
        ("abc", 1, "…", "…"),
    ],
)
def test_what_is_cut_has_its_limit_and_says_so(text: str, limit: int, begin: str, end: str) -> None:
    assert (hive.cut_end(text, limit), hive.cut_begin(text, limit)) == (begin, end)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0, "0"),
        ("", ""),
        ("Zoë: a b", "Zoë: a b"),
        ("a\x1b[2J\nb\u202e", "a?[2J?b?"),
        ("12345678", "12345678"),
        ("123456789", "1234567…"),
        (1234567890, "1234567…"),
        ("\n" * 99, "???????…"),
    ],
)
def test_nothing_that_is_shown_moves_the_cursor(value: object, shown: str) -> None:
    assert hive.printable(value, 8) == shown


def test_a_value_is_shown_in_at_most_sixty_characters() -> None:
    for show in (hive.printable, quoted):
        assert (len(show("x" * 58)), len(show("x" * 99))) in ((58, 60), (60, 60))
    assert quoted(b"abcdefghi", 8) == "b'abcde…"


@pytest.mark.parametrize(
    ("said", "known", "near"),
    [
        ("statsu", ["start", "status", "stop"], "status"),
        ("STATUS", ["Status"], "Status"),
        ("ping", ["pings", "sing"], "pings"),
        ("abcd", ["abxy"], "abxy"),  # half of it is the same
        ("abcde", ["abxyz"], ""),
        ("ping", [], ""),
    ],
)
def test_the_nearest_name_is_asked_for_and_none_that_is_far(
    said: str, known: list[str], near: str
) -> None:
    assert hive.did_you_mean(said, known) == (f"did you mean {near}?" if near else "")


# The file about itself


def test_a_hash_is_the_same_whichever_python_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hashlib.sha256(b"hive").hexdigest()
    assert hive.sha256(b"hive") == expected
    for module in ("_sha2", "_sha256"):
        monkeypatch.setitem(sys.modules, module, None)
    assert hive.sha256(b"hive") == expected


def test_the_build_is_eight_digits_of_the_files_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = hashlib.sha256(Path(hive.__file__).read_bytes()).hexdigest()[:8]
    assert hive.build() == digits
    monkeypatch.setattr(hive, "__file__", f"{hive.__file__}c")  # as it is run from a cache
    assert hive.build() == digits
    monkeypatch.setattr(hive, "__file__", "/nonexistent/hive.py")
    assert hive.build() == "unknown"


def test_what_python_was_told_to_drop_is_read_from_the_source() -> None:
    hive.dropped_docstrings.cache_clear()
    for name in ("quoted", "Value", "shortened", "handler_rule"):
        of = getattr(hive, name)
        assert hive.docstring(of) == (of.__doc__ or "")
        bare = SimpleNamespace(__doc__=None, __qualname__=name)
        assert hive.docstring(bare) == inspect.cleandoc(of.__doc__ or "")
    assert hive.docstring(SimpleNamespace(__doc__=None, __qualname__="unknown")) == "unknown"
    assert hive.dropped_docstrings()[""] == inspect.cleandoc(hive.__doc__ or "")


def test_a_pattern_is_read_when_it_is_first_used() -> None:
    later = hive.regular("a+(")
    assert later.pattern == "a+("
    with pytest.raises(re.error):
        later.match("a")
    digits = hive.regular(r"\d+")
    assert digits.fullmatch("12") and not digits.fullmatch("1a")


# What a value may be


YEAR = 366 * 86400
WORD = hive.choice("a", "b")
FEW = hive.integer(2, 4, "a port")


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (hive.plain_string, ["", "é"], ["a\0", "\ud800", b"a", None, 1]),
        (hive.boolean, [True, False], [0, 1, "true", None]),
        (hive.finite_number, [0, -1.5, "2", 1e300], [True, None, [], "x", 10**400, b"1"]),
        (hive.seconds, [1e-9, 0.5, 1, YEAR], [0, -1, -0.5, YEAR + 0.1, "nan", True, 10**400]),
        (FEW, [2, 3.0, "4"], [1, 1.5, 2.5, 4.5, 5, "nan", "inf", False, None, 10**400]),
        (WORD, ["a", "b"], ["", "c", "ab", None, ["a"], 1]),
        (lambda value: hive.whole(value, 1, 3), [1, 2.9, 3], [0, 0.9, 3.1, 4, "2", True, None]),
    ],
    ids=["string", "boolean", "number", "seconds", "integer", "choice", "whole"],
)
def test_a_check_takes_what_it_says_and_raises_one_kind_of_error(
    check: Callable[[Any], Any], good: list[Any], bad: list[Any]
) -> None:
    for value in good:
        taken = check(value)
        same = value if isinstance(taken, str | bool) else float(value)
        assert taken == same or taken == int(same)
        assert type(taken) in (str, bool, float, int)
    for value in bad:
        with pytest.raises(ValueError):
            check(value)


def test_a_check_says_what_it_takes() -> None:
    assert (FEW.__doc__, WORD.__doc__) == ("a port from 2 to 4", '"a" or "b"')
    assert hive.integer(1, 3).__doc__ == "a whole number from 1 to 3"
    assert [type(FEW(said)) for said in (2, 3.0, "4")] == [int] * 3


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), (2.5, 2.5), (3, 3.0), (0.9, None), (3.1, None), (float("nan"), None)]
    + [(one, None) for one in (True, "2", None, [2], 10**400)],
)
def test_a_peers_number_is_in_its_range_or_none(value: object, number: float | None) -> None:
    assert hive.bounded_number(value, 1, 3) == number
    assert type(hive.bounded_number(2, 1, 3)) is float
