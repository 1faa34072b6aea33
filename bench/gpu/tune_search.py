"""The search: downhill from a plan to its neighbours until none is faster or the time is up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from manylora_kernels.lora.plan import Plan

from bench.gpu.budget import Deadline

Cost = Callable[[Plan], float]
"""Microseconds of a plan; infinite where it is wrong or cannot be built."""
WORTH = 0.98
"""A plan takes the other's place if it needs at most this share of its time: less is noise."""


def descend(
    start: Plan,
    neighbours: Callable[[Plan], Sequence[Plan]],
    cost: Cost,
    deadline: Deadline,
    prepare: Callable[[Sequence[Plan]], None] = lambda plans: None,
) -> tuple[Plan, float]:
    """Search from `start`; no plan is timed twice.

    Args:
        neighbours: of a plan.
        prepare: is told which plans are timed next, e.g. to compile them side by side.

    Returns:
        The best plan and its microseconds; `start` itself where nothing is better.
    """
    prepare([start])
    known = {start: cost(start)}
    best = start
    while not deadline.is_over:
        fresh = [plan for plan in neighbours(best) if plan not in known]
        prepare(fresh)
        for plan in fresh:
            if deadline.is_over:
                break
            known[plan] = cost(plan)
        fastest = min(known, key=lambda plan: known[plan])
        if fastest == best or not known[fastest] <= WORTH * known[best]:
            break
        best = fastest
    return best, known[best]


def rows_of_blocks(costs: Mapping[int, Mapping[int, float]]) -> tuple[tuple[int, int], ...]:
    """Choose the rows of a block for each number of rows of a step.

    Example: {32: {16: 1.0, 32: 2.0}, 128: {16: 3.0, 32: 2.0}, 512: {32: 5.0, 64: 4.0}} gives
    ((32, 16), (128, 32), (512, 64)).

    Args:
        costs: by rows of a step, by rows of a block: microseconds. The first of each is the present choice,
            and stays unless another is clearly faster.

    Returns:
        Pairs (up to so many rows, rows of a block), ascending; neighbours of one size are one pair.
    """
    found: list[tuple[int, int]] = []
    for num_rows in sorted(costs):
        of = costs[num_rows]
        present = next(iter(of))
        fastest = min(of, key=lambda rows: of[rows])
        chosen = fastest if of[fastest] <= WORTH * of[present] else present
        if found and found[-1][1] == chosen:
            found.pop()
        found.append((num_rows, chosen))
    return tuple(found)


def one_adapter_rows(times: Mapping[int, tuple[float, float]], never: int = 1 << 20) -> int:
    """From how many rows on the vendor's products are faster than the kernels.

    Args:
        times: by rows: microseconds of the kernels, and of the vendor's products.
        never: the answer where they are not at the most rows.
    """
    least = never
    for num_rows in sorted(times, reverse=True):
        kernels, products = times[num_rows]
        if products >= kernels:
            break
        least = num_rows
    return least


def mean(costs: Sequence[float]) -> float:
    """The geometric mean: a scene of few microseconds counts as much as one of many."""
    if not all(map(math.isfinite, costs)):
        return math.inf
    return math.exp(sum(map(math.log, costs)) / len(costs))
