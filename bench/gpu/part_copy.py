"""Adapters from host to device, against a plain copy of as many bytes from pinned memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import adapter_copy

from gpu.budget import Deadline
from gpu.part_kernels import attempt
from gpu.rows import Context, Row

_RANKS = (8, 16, 64)


def run(context: Context, deadline: Deadline) -> Iterator[Row]:
    """What `bench/adapter_copy.py` measures, by rank and number of runs that the pages lie in."""
    for rank in _RANKS[:1] if context.is_tiny else _RANKS:
        if deadline.is_over:
            print(f"copy: time is up before rank {rank}", flush=True)
            return
        found = attempt(partial(adapter_copy.measure, context.device, context.layer, [rank], context.repeats))
        if isinstance(found, str):
            yield context.row("copy", f"rank {rank}", rank=str(rank), result=found)
            continue
        for one in found:
            yield context.row("copy", f"runs of pages: {one['runs']}", **columns(one))


def columns(found: Mapping[str, object]) -> dict[str, object]:
    """A row of `adapter_copy.measure` in the columns of the suite: the plain copy is the floor."""
    return {
        "rank": str(found["rank"]),
        "median_us": found["median_us"],
        "least_us": found["least_us"],
        "most_us": found["most_us"],
        "floor_us": found["plain_median_us"],
        "moved_bytes": found["adapter_bytes"],
        "result": "ok",
    }
