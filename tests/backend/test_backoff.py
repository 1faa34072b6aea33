"""Pauses between attempts: they double up to a bound, and begin anew after a time without failures."""

from __future__ import annotations

from manylora.backoff import Backoff


def test_pauses_double_up_to_the_bound_and_stay_there() -> None:
    backoff = Backoff(first_s=1.0, max_s=30.0)
    assert [backoff.fail() for _ in range(8)] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert backoff.num_failures == 8


def test_first_failures_may_be_followed_by_no_pause() -> None:
    backoff = Backoff(first_s=2.0, max_s=30.0, num_immediate=1)
    assert [backoff.fail() for _ in range(6)] == [0.0, 2.0, 4.0, 8.0, 16.0, 30.0]


def test_more_than_the_steady_time_begins_a_new_series_and_just_that_time_does_not() -> None:
    backoff = Backoff(first_s=1.0, max_s=30.0, steady_s=60.0)
    assert [backoff.fail(succeeded_s=s) for s in (0.0, 5.0, 60.0, 60.1, 0.0)] == [1.0, 2.0, 4.0, 1.0, 2.0]


def test_a_series_of_a_million_failures_has_a_pause() -> None:
    backoff = Backoff(first_s=1.0, max_s=60.0)
    for _ in range(1_000_000):
        pause_s = backoff.fail()
    assert pause_s == 60.0
