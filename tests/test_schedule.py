"""When handlers run by themselves: times in, what is due out; no clock is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rig import Rig

from hive import FIRST_RUN, ConfigError, ScheduleConfig, ScheduledRun, next_at

NOON = 1_800_000_000.0


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def every(seconds: float, **more: object) -> ScheduledRun:
    return ScheduledRun(
        ScheduleConfig.read({"action": "check", "every": seconds, **more}, "schedule[0]")
    )


def local(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%d %H:%M"))


def test_what_has_never_run_runs_soon_after_the_start_and_then_every_so_often() -> None:
    scheduled = every(300)
    scheduled.plan(NOON, chance=0)
    assert scheduled.next == NOON + FIRST_RUN
    assert not scheduled.due(NOON) and scheduled.due(NOON + FIRST_RUN)
    scheduled.begin(NOON + 10)
    scheduled.plan(NOON + 10, chance=0)
    assert scheduled.next == NOON + 310


def test_a_restart_does_not_run_it_again_before_its_time() -> None:
    scheduled = every(86400)
    scheduled.last = NOON - 100
    scheduled.plan(NOON, chance=0)
    assert scheduled.next == NOON - 100 + 86400


def test_a_machine_that_slept_runs_what_it_missed_once() -> None:
    scheduled = every(300)
    scheduled.last = NOON - 10 * 300
    scheduled.plan(NOON, chance=0)
    assert scheduled.due(NOON)
    scheduled.begin(NOON)
    scheduled.plan(NOON, chance=0)
    scheduled.end(ok=True)
    assert not scheduled.due(NOON + 299) and scheduled.due(NOON + 300)


def test_a_run_that_is_still_going_is_not_started_again() -> None:
    scheduled = every(60)
    scheduled.begin(NOON)
    scheduled.plan(NOON, chance=0)
    assert not scheduled.due(NOON + 1000)
    scheduled.end(ok=True)
    assert scheduled.due(NOON + 1000)


def test_a_clock_that_is_put_back_does_not_silence_it() -> None:
    scheduled = every(60)
    scheduled.begin(NOON)
    scheduled.plan(NOON, chance=0)
    scheduled.end(ok=True)
    assert scheduled.due(NOON - 86400)


@given(st.floats(0, 1))
def test_jitter_only_delays_and_never_beyond_its_bound(chance: float) -> None:
    scheduled = every(300, jitter="30s")
    scheduled.last = NOON
    scheduled.plan(NOON, chance)
    assert NOON + 300 <= scheduled.next <= NOON + 330


@pytest.mark.parametrize(
    ("now", "due"),
    [
        ("2026-11-22 06:00", "2026-11-22 07:30"),
        ("2026-11-22 07:30", "2026-11-23 07:30"),
        ("2026-12-31 08:00", "2027-01-01 07:30"),
        ("2026-03-28 08:00", "2026-03-29 07:30"),  # a day of 23 hours
        ("2026-10-24 08:00", "2026-10-25 07:30"),  # a day of 25 hours
    ],
)
def test_a_time_of_day_is_the_local_clocks(now: str, due: str) -> None:
    assert next_at("07:30", local(now)) == local(due)


@given(st.integers(1_600_000_000, 2_000_000_000), st.integers(0, 23), st.integers(0, 59))
def test_the_next_time_of_day_is_always_within_a_day_or_so(
    now: int, hour: int, minute: int
) -> None:
    assert 0 < next_at(f"{hour:02}:{minute:02}", now) - now <= 26 * 3600


def test_a_time_of_day_that_was_missed_runs_once() -> None:
    scheduled = ScheduledRun(ScheduleConfig(action="check", at="07:30"))
    scheduled.last = local("2026-11-20 07:30")
    now = local("2026-11-22 12:00")
    scheduled.plan(now, chance=0)
    assert scheduled.due(now)
    scheduled.begin(now)
    scheduled.plan(now, chance=0)
    assert scheduled.next == local("2026-11-23 07:30")


@pytest.mark.parametrize(
    ("notify", "told"),
    [
        ("change", [None, "is failing", None, "is well again", None]),
        ("failure", [None, "is failing", "is failing", None, None]),
        ("always", ["is well", "is failing", "is failing", "is well again", "is well"]),
        ("never", [None] * 5),
    ],
)
def test_the_agent_hears_of_the_outcomes_that_are_asked_for(
    notify: str, told: list[str | None]
) -> None:
    scheduled = every(60, notify=notify)
    assert [scheduled.end(ok) for ok in (True, False, False, True, True)] == told


def test_a_first_run_that_fails_is_a_change() -> None:
    assert every(60).end(ok=False) == "is failing"


def test_jitter_is_as_much_as_chance_says() -> None:
    often, daily = every(300, jitter="30s"), ScheduleConfig(action="x", at="07:30", jitter=60.0)
    often.last = NOON
    often.plan(NOON, chance=0.5)
    assert often.next == NOON + 315
    at_dawn = ScheduledRun(daily)
    at_dawn.plan(local("2026-11-22 06:00"), chance=1)
    assert at_dawn.next == local("2026-11-22 07:31")


def test_what_runs_often_need_not_wait_longer_for_its_first_run() -> None:
    sentinel = every(5)
    sentinel.plan(NOON, chance=0)
    assert sentinel.next == NOON + 5


def test_a_time_of_day_that_has_never_run_waits_for_it() -> None:
    sentinel = ScheduledRun(ScheduleConfig(action="check", at="07:30"))
    sentinel.plan(local("2026-11-22 12:00"), chance=0)
    assert sentinel.next == local("2026-11-23 07:30")


def test_a_clock_that_is_put_back_a_little_changes_nothing() -> None:
    sentinel = every(60, jitter="30s")
    sentinel.last = NOON
    sentinel.plan(NOON, chance=1)
    assert not sentinel.due(NOON) and not sentinel.due(NOON + 89)
    assert sentinel.due(NOON + 90)
    assert sentinel.due(NOON - 1)  # further away than it can ever be: the clock was put back


def test_a_schedule_is_told_by_what_it_does_and_when() -> None:
    assert every(300).when == "every 300s"
    daily = ScheduledRun(ScheduleConfig(action="check", at="07:30", text="look"))
    assert (daily.when, daily.key) == ("07:30", "schedule check 07:30 look")


# What was missed while the machine slept, or the daemon was away


def at_night(**more: object) -> ScheduledRun:
    said = {"action": "backup", "at": "02:30", **more}
    scheduled = ScheduledRun(ScheduleConfig.read(said, "schedule[0]"))
    scheduled.last = local("2026-11-21 02:30")
    scheduled.plan(local("2026-11-21 02:31"), chance=0)
    assert scheduled.next == local("2026-11-22 02:30")
    return scheduled


@pytest.mark.parametrize(
    ("catch_up", "at", "runs"),
    [
        (True, "13:00", True),
        (False, "13:00", False),
        (False, "02:31", True),  # to look takes up to a minute
        (False, "02:32", False),
        ("2h", "04:29", True),
        ("2h", "04:31", False),
        (7200, "04:31", False),
    ],
)
def test_what_was_missed_is_made_up_for_as_long_as_catch_up_says(
    catch_up: object, at: str, runs: bool
) -> None:
    now = local(f"2026-11-22 {at}")
    slept = at_night(catch_up=catch_up)
    assert slept.due(now) and slept.missed(now) is not runs
    if slept.missed(now):
        slept.plan(now, chance=0)
        assert slept.next == local("2026-11-23 02:30")
    started = at_night(catch_up=catch_up)  # the daemon was away, too
    started.plan(now, chance=0)
    assert started.due(now) is runs
    assert started.next == (now if runs else local("2026-11-23 02:30"))


def test_what_runs_every_so_often_keeps_its_times_when_some_were_missed() -> None:
    hourly = every(3600, catch_up=False)
    hourly.last = NOON
    hourly.plan(NOON + 60, chance=0)
    slept = NOON + 5 * 3600 + 600
    assert hourly.due(slept) and hourly.missed(slept)
    hourly.plan(slept, chance=0)
    assert hourly.next == NOON + 6 * 3600


@pytest.mark.parametrize("said", ["never", 0, -1, "", [], None, "0s"])
def test_catch_up_is_true_false_or_a_time(said: object) -> None:
    with pytest.raises(ConfigError, match=r"schedule\[0\]\.catch_up: .* is not true, false, or"):
        every(60, catch_up=said)


def test_a_daemon_says_that_it_makes_no_run_up(rig_of: Callable[..., Rig]) -> None:
    late = ScheduleConfig(action="check", every=1.0, catch_up=False)
    rig = rig_of(schedule=[late], check="echo x")
    rig.until("it has run", lambda: rig.events("handler ended"), tick=1.0)
    before = len(rig.events("handler started"))
    (one,) = rig.node.work._schedule
    one.next -= 3600
    rig.until("it looks", lambda: rig.events("missed", action="check", when="every 1s"), tick=0.1)
    assert len(rig.events("handler started")) == before
    rig.until("it goes on", lambda: len(rig.events("handler started")) > before, tick=1.0)


# What is news


@pytest.mark.parametrize(
    ("news", "told"),
    [
        ([(True, True)], ["has news"]),
        ([(True, False), (True, False)], [None, None]),
        ([(False, False), (False, False)], [None, None]),  # it fails, and says that it is no news
        ([(False, False), (False, True), (False, False)], [None, "has news", None]),
        ([(True, True), (True, True)], ["has news", "has news"]),
        ([(False, None), (False, None), (True, False)], ["is failing", None, "is well again"]),
        ([(False, None), (True, True), (True, False)], ["is failing", "has news", None]),
        ([(False, "yes"), (True, 1)], ["is failing", "is well again"]),  # no word, so the exit
    ],
)
def test_what_is_news_is_the_handlers_to_say(
    news: list[tuple[bool, object]], told: list[str | None]
) -> None:
    scheduled = every(60)
    assert [scheduled.end(ok, said) for ok, said in news] == told


@pytest.mark.parametrize("notify", ["never", "failure", "always"])
def test_who_wants_no_news_gets_none(notify: str) -> None:
    scheduled = every(60, notify=notify)
    assert (scheduled.end(True, True) is not None) == (notify == "always")


def test_a_failure_counts_when_it_lasts() -> None:
    scheduled = every(60, failures=3)
    outcomes = (False, False, True, False, False, False, False, True, True)
    told = [scheduled.end(ok) for ok in outcomes]
    assert told == [None] * 5 + ["is failing", None, "is well again", None]


def test_a_failure_that_was_told_is_known_after_a_restart() -> None:
    before, after = every(60, failures=2), every(60, failures=2)
    assert [before.end(False), before.end(False)] == [None, "is failing"]
    after.restore(before.kept(), NOON)
    assert after.failing and [after.end(False), after.end(True)] == [None, "is well again"]


@pytest.mark.parametrize("kept", [{}, {"ok": 1, "last": "x", "failures": None, "alarmed": 3}])
def test_what_makes_no_sense_is_not_taken_over(kept: dict[str, object]) -> None:
    scheduled = every(60)
    scheduled.restore(kept, NOON)
    assert (scheduled.ok, scheduled.last, scheduled.failing) == (None, 0.0, False)


def test_what_an_older_hive_kept_is_understood() -> None:
    scheduled = every(60)
    scheduled.restore({"last": NOON - 5, "ok": False}, NOON)
    assert [scheduled.end(False), scheduled.end(True)] == [None, "is well again"]


def test_a_handler_that_knows_nothing_of_before_is_told_when_its_output_changes() -> None:
    scheduled = every(60, notify="output")
    outputs = ("", "a", "a", "b", "", "")
    told = [scheduled.end(True, output=output) for output in outputs]
    assert told == [None, "has news", None, "has news", "has news", None]
    assert [scheduled.end(False), scheduled.end(False), scheduled.end(True)] == [
        "is failing",
        None,
        "is well again",
    ]
