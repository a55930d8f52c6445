"""What is remembered for a while: bounded, and forgotten by time."""

from __future__ import annotations

from hive import COMPLAINTS, LONGEST_WAIT, MAX_WAITING, Complaints, Waiting


def test_an_answer_is_expected_until_its_time_is_over() -> None:
    waiting = Waiting()
    waiting.add("m-1", 10, now=100)
    assert [waiting.expects("m-1", now) for now in (100, 109, 110, 111)] == [
        True,
        True,
        False,
        False,
    ]


def test_nobody_waits_for_what_nobody_asked() -> None:
    waiting = Waiting()
    waiting.add("m-1", 10, now=100)
    assert not waiting.expects("m-2", 100) and not waiting.expects(None, 100)


def test_whoever_stops_waiting_expects_nothing_more() -> None:
    waiting = Waiting()
    waiting.add("m-1", 10, now=100)
    waiting.drop("m-1")
    waiting.drop("m-2")
    assert not waiting.expects("m-1", 101)


def test_asking_again_waits_anew() -> None:
    waiting = Waiting()
    waiting.add("m-1", 10, now=100)
    waiting.add("m-1", 10, now=105)
    assert waiting.expects("m-1", 112)


def test_nobody_waits_for_ever() -> None:
    waiting = Waiting()
    waiting.add("m-1", 1e12, now=0)
    assert waiting.expects("m-1", LONGEST_WAIT - 1) and not waiting.expects("m-1", LONGEST_WAIT + 1)


def test_of_too_many_who_wait_the_oldest_is_forgotten() -> None:
    waiting = Waiting()
    for i in range(MAX_WAITING + 1):
        waiting.add(f"m-{i}", 10, now=0)
    expected = [waiting.expects(f"m-{i}", 1) for i in range(MAX_WAITING + 1)]
    assert expected == [False] + [True] * MAX_WAITING


def test_those_whose_time_is_over_make_room() -> None:
    waiting = Waiting()
    waiting.add("m-old", 1000, now=0)
    for i in range(MAX_WAITING - 1):
        waiting.add(f"m-{i}", 1, now=0)
    waiting.add("m-new", 10, now=5)
    assert waiting.expects("m-old", 6) and waiting.expects("m-new", 6)


def test_a_fault_is_complained_about_a_few_times_a_minute() -> None:
    complaints = Complaints()
    first = [complaints.admit("noise", now) for now in range(50)]
    assert first == [True] * COMPLAINTS + [False] * (50 - COMPLAINTS)
    assert not complaints.admit("noise", 59)
    assert complaints.admit("noise", 100)


def test_one_kind_of_fault_does_not_hide_another() -> None:
    complaints = Complaints()
    for _ in range(1000):
        complaints.admit("noise", 1)
    assert complaints.admit("dropped", 1)
