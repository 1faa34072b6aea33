"""Higher runs earlier; equals run by arrival; what runs is not stopped for what comes."""

from __future__ import annotations

from typing import Any

from manylora.engine.scheduler import Scheduler
from manylora.engine.sequence import Sequence, State

from .test_scheduler import make, sequence, step


def ranked(number: int, priority: int, **params: Any) -> Sequence:
    s = sequence(number, **params)
    s.priority = priority
    return s


def add(scheduler: Scheduler, *sequences: Sequence) -> None:
    for s in sequences:
        scheduler.add(s)


def started(scheduler: Scheduler) -> list[int]:
    """Sequences in the order in which they begin, until all have ended."""
    order: list[int] = []
    while scheduler.waiting or scheduler.running:
        order += [i for i, _ in step(scheduler) if i not in order]
    return order


def test_higher_runs_earlier_and_equals_by_arrival() -> None:
    scheduler = make(max_num_seqs=1)
    add(scheduler, *(ranked(n, priority) for n, priority in enumerate([0, 3, 0, -2, 3, 7])))
    assert [s.id for s in scheduler.waiting] == [5, 1, 4, 0, 2, 3]
    assert started(scheduler) == [5, 1, 4, 0, 2, 3]


def test_nothing_that_runs_stops_for_a_higher_priority() -> None:
    scheduler = make(max_num_seqs=1)
    running = ranked(0, -5)
    add(scheduler, running)
    step(scheduler)
    add(scheduler, ranked(1, 9))
    step(scheduler)
    assert (running.state, running.num_generated) == (State.RUNNING, 2)
    assert scheduler.num_preemptions == 0


def test_prompts_of_higher_priority_are_computed_first() -> None:
    scheduler = make()
    low = ranked(0, 0, prompt=30)
    add(scheduler, low)
    step(scheduler)
    add(scheduler, ranked(1, 0))
    low.num_computed = 22
    scheduler.limits.max_batched_tokens = 16
    assert step(scheduler) == [(0, 8), (1, 3)]
    scheduler.limits.max_batched_tokens = 8
    add(scheduler, ranked(2, 5, prompt=30), ranked(3, 0, prompt=30))
    assert step(scheduler) == [(0, 1), (1, 1), (2, 6)]


def test_preemption_takes_the_lowest_priority_and_then_the_youngest() -> None:
    scheduler = make(num_blocks=6, max_batched_tokens=32)
    sequences = [ranked(n, p, prompt=7, max_tokens=12) for n, p in enumerate([0, 2, 0])]
    add(scheduler, *sequences)
    preempted = []
    while scheduler.waiting or scheduler.running:
        running = list(scheduler.running)
        step(scheduler)
        preempted += [s.id for s in running if s.state is State.WAITING]
    assert preempted[:2] == [2, 0]
    assert 1 not in preempted
    assert [s.num_generated for s in sequences] == [12, 12, 12]


def test_a_lower_priority_does_not_pass_one_whose_adapter_finds_no_room() -> None:
    """Else those that keep the adapters in use busy would be what the higher one waits for."""
    scheduler = make(max_passes=100)
    add(scheduler, ranked(0, 0, adapter="a", max_tokens=6), ranked(1, 0, adapter="b", max_tokens=6))
    step(scheduler)
    high = ranked(2, 5, adapter="c")
    add(scheduler, high, ranked(3, 0, adapter="a"), ranked(4, 0))
    assert [i for i, _ in step(scheduler)] == [0, 1, 4]
    equal = ranked(5, 5, adapter="a")
    add(scheduler, equal)
    assert [i for i, _ in step(scheduler)] == [0, 1, 4, 5]
    assert (high.num_passed, high.state) == (1, State.WAITING)
    order = started(scheduler)
    assert order.index(2) < order.index(3)


def test_a_higher_priority_passes_without_end_and_without_being_counted() -> None:
    scheduler = make(max_passes=2)
    add(scheduler, ranked(0, 0, adapter="a", prompt=1), ranked(1, 0, adapter="b", prompt=1))
    step(scheduler)
    low = ranked(999, 0, adapter="c", prompt=1)
    add(scheduler, low)
    number = 2
    for _ in range(20):
        while len(scheduler.waiting) < 4:
            add(scheduler, ranked(number, 1, adapter="ab"[number % 2], prompt=1))
            number += 1
        step(scheduler)
    assert (low.state, low.num_passed) == (State.WAITING, 0)
    assert 999 in started(scheduler)
