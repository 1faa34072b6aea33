"""Adapters from host to device, against a plain copy of as many bytes from pinned memory.

The bytes are those of the host's buffer, whose ranks are filled up to whole pages: an adapter of rank 8 has
as many as one of rank 16, half of them zeros, in the floor as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from bench.gpu.attempt import attempt
from bench.gpu.budget import Deadline
from bench.gpu.rows import Context, Row

_RANKS = (8, 16, 64)
NUM_ROWS = 4
"""Of a whole run: each rank in one run of pages, and rank 64 also in pages that lie apart."""


def run(context: Context, deadline: Deadline) -> Iterator[Row]:
    """What `bench/adapter_copy.py` measures, by rank and number of runs that the pages lie in."""
    for rank in _RANKS[:1] if context.is_tiny else _RANKS:
        if deadline.is_over:
            print(f"copy: time is up before rank {rank}", flush=True)
            return
        found = attempt(partial(_measure, context, rank))
        if isinstance(found, str):
            yield context.row("copy", f"rank {rank}", rank=str(rank), result=found)
            continue
        for one in found:
            yield context.row("copy", f"runs of pages: {one['runs']}", **columns(one))


def _measure(context: Context, rank: int) -> list[dict[str, object]]:
    from bench import adapter_copy  # needs the backend's packages

    return adapter_copy.measure(context.device, context.layer, [rank], context.repeats)


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
