"""A failed load is remembered for a pause that grows."""

from __future__ import annotations

from manylora.adapters.failures import MAX_REMEMBERED, Failures
from manylora.errors import InvalidArgumentError


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_the_pause_doubles_up_to_a_minute() -> None:
    clock = Clock()
    failures = Failures(clock)
    for pause_s in (1, 2, 4, 8, 16, 32, 60, 60):
        failures.remember("a", InvalidArgumentError("broken"))
        clock.now_s += pause_s - 0.5
        assert failures.recall("a") is not None
        clock.now_s += 0.5
        assert failures.recall("a") is None


def test_a_success_ends_the_growth() -> None:
    clock = Clock()
    failures = Failures(clock)
    failures.remember("a", InvalidArgumentError("broken"))
    failures.remember("a", InvalidArgumentError("broken"))
    failures.forget("a")
    assert failures.recall("a") is None
    failures.remember("a", InvalidArgumentError("broken"))
    clock.now_s += 1
    assert failures.recall("a") is None


def test_the_same_error_is_raised_anew() -> None:
    failures = Failures(Clock())
    error = InvalidArgumentError("broken")
    failures.remember("a", error)
    recalled = failures.recall("a")
    assert type(recalled) is InvalidArgumentError
    assert recalled.message == "broken"
    assert recalled is not failures.recall("a")


def test_the_oldest_are_forgotten_when_there_are_many() -> None:
    failures = Failures(Clock())
    for number in range(MAX_REMEMBERED + 1):
        failures.remember(str(number), InvalidArgumentError("broken"))
    assert failures.recall("0") is None
    assert failures.recall("1") is not None
