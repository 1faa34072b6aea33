"""When a loop counts as hung, and when it does not."""

from __future__ import annotations

from manylora.supervise.hang_detector import MAX_BLOCKED_LOOKS, MAX_BUSY_LOOKS, MIN_CPU_S, HangDetector


def test_a_loop_that_comes_round_is_never_stuck() -> None:
    watch = HangDetector()
    assert not any(watch.is_stuck(num_turns, 0.0) for num_turns in range(2 * MAX_BUSY_LOOKS))


def test_a_turn_that_does_not_compute_is_stuck_after_so_many_looks() -> None:
    watch = HangDetector()
    answers = [watch.is_stuck(7, 5.0 + 0.001 * look) for look in range(MAX_BLOCKED_LOOKS + 1)]
    assert answers == [False] * MAX_BLOCKED_LOOKS + [True]


def test_a_turn_that_computes_however_slowly_is_given_an_hour() -> None:
    watch = HangDetector()
    answers = [watch.is_stuck(7, MIN_CPU_S * 1.01 * look) for look in range(MAX_BUSY_LOOKS + 1)]
    assert answers == [False] * MAX_BUSY_LOOKS + [True]


def test_only_looks_in_a_row_count() -> None:
    watch = HangDetector()
    cpu_s = 0.0
    watch.is_stuck(1, cpu_s)
    for _ in range(5):
        assert not any(watch.is_stuck(1, cpu_s) for _ in range(MAX_BLOCKED_LOOKS - 1))
        cpu_s += 1.0
        assert not watch.is_stuck(1, cpu_s)
    assert not watch.is_stuck(2, cpu_s)
    assert not any(watch.is_stuck(2, cpu_s) for _ in range(MAX_BLOCKED_LOOKS - 1))
    assert watch.is_stuck(2, cpu_s)
