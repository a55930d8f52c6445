"""What is remembered for a while: bounded, and forgotten by time."""

from __future__ import annotations

from hive import SETTLING, Waiting


def test_an_answer_is_expected_for_as_long_as_somebody_waits() -> None:
    waiting = Waiting()
    waiting.add("m-1")
    assert waiting.expects("m-1", 100) and waiting.expects("m-1", 1e9)
    waiting.drop("m-1")
    assert not waiting.expects("m-1", 100)


def test_nobody_waits_for_what_nobody_asked() -> None:
    waiting = Waiting()
    waiting.add("m-1")
    waiting.drop("m-2")
    assert waiting.expects("m-1", 100)
    assert not waiting.expects("m-2", 100) and not waiting.expects(None, 100)


def test_an_answer_that_was_just_read_is_no_news_though_nobody_waits_any_more() -> None:
    waiting = Waiting()
    waiting.add("m-1")
    waiting.settle("m-1", now=100)
    waiting.drop("m-1")
    times = (100, 100 + SETTLING - 1, 100 + SETTLING, 1e9)
    assert [waiting.expects("m-1", now) for now in times] == [True, True, False, False]


def test_a_question_to_everyone_is_open_until_its_asker_leaves() -> None:
    waiting = Waiting()
    waiting.add("m-1")
    waiting.settle("m-1", now=100)  # the first of several answers
    assert waiting.expects("m-1", 100 + 5 * SETTLING)
    waiting.drop("m-1")
    assert not waiting.expects("m-1", 100 + 5 * SETTLING)


def test_asking_again_waits_anew() -> None:
    waiting = Waiting()
    waiting.settle("m-1", now=100)
    waiting.add("m-1")
    assert waiting.expects("m-1", 1e9)


def test_two_who_wait_for_the_same_are_two() -> None:
    waiting = Waiting()
    waiting.add("m-1")
    waiting.add("m-1")
    waiting.drop("m-1")
    assert waiting.expects("m-1", 100)
    waiting.drop("m-1")
    assert not waiting.expects("m-1", 100)


def test_one_exchange_does_not_settle_another() -> None:
    waiting = Waiting()
    waiting.add("m-1")
    waiting.settle("m-2", now=100)
    waiting.settle("m-3", now=1e9)
    assert waiting.expects("m-1", 1e9) and not waiting.expects("m-2", 1e9)
