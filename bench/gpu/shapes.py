"""What is measured: the sites of a layer, and the steps.

Shape key: T rows, D adapters, S linears of a site, K inputs, N outputs of all S.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from manylora_kernels import PAGE_ROWS, SiteShape

Layer = dict[str, SiteShape]

LLAMA_LAYER: Layer = {
    "qkv": SiteShape(4096, (4096, 1024, 1024)),
    "o": SiteShape(4096, (4096,)),
    "gate_up": SiteShape(4096, (14336, 14336)),
    "down": SiteShape(14336, (4096,)),
}
"""Of Llama-3-8B."""
TINY_LAYER: Layer = {"qkv": SiteShape(32, (32, 16, 16)), "gate_up": SiteShape(32, (48, 48))}
"""For triton's interpreter."""

PREFILL_ROWS = 512
"""From so many rows on, rows of one adapter lie side by side, as those of prompts do."""
MIXED = (8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Point:
    """One step."""

    num_rows: int
    num_adapters: int
    ranks: tuple[int, ...]
    """Adapter d has rank `ranks[d % len(ranks)]`."""
    skewed: bool = False
    """Whether adapter d has rows in proportion to 1 / (d + 1) (Zipf), else all have the same."""
    base_share: float = 0.0
    """Share of rows without an adapter."""
    max_rank: int = 0
    """Highest rank of the pool; 0: that of the adapters, which is the best case of pools that pad to it."""

    @property
    def rank_name(self) -> str:
        """As tables show it."""
        return "+".join(map(str, self.ranks))

    @property
    def pool_rank(self) -> int:
        """Highest rank that the pool has room for."""
        return self.max_rank or max(self.rank(d) for d in range(self.num_adapters))

    @property
    def is_prefill(self) -> bool:
        """Whether the rows are those of prompts."""
        return self.num_rows >= PREFILL_ROWS

    def rank(self, adapter: int) -> int:
        """Of one adapter."""
        return self.ranks[adapter % len(self.ranks)]

    def num_pages(self, adapter: int) -> int:
        """Of one adapter."""
        return -(-self.rank(adapter) // PAGE_ROWS)

    def pages(self) -> list[tuple[int, ...]]:
        """Of each adapter, scattered over the pool."""
        ends = np.cumsum([self.num_pages(d) for d in range(self.num_adapters)]).tolist()
        order = np.random.default_rng(1).permutation(ends[-1]).tolist()
        return [tuple(order[end - self.num_pages(d) : end]) for d, end in enumerate(ends)]

    def slots(self) -> npt.NDArray[np.int32]:
        """Of each row: [T], -1 for none. Every adapter has a row, if rows last."""
        rng = np.random.default_rng(0)
        weights = 1.0 / np.arange(1, self.num_adapters + 1) if self.skewed else np.ones(self.num_adapters)
        num_routed = max(1, round(self.num_rows * (1.0 - self.base_share)))
        first = np.arange(min(num_routed, self.num_adapters))
        more = rng.choice(self.num_adapters, num_routed - len(first), p=weights / weights.sum())
        slots = np.concatenate([first, more, np.full(self.num_rows - num_routed, -1)]).astype(np.int32)
        return np.sort(slots) if self.is_prefill else rng.permutation(slots)


GOAL_POINTS = (
    Point(32, 32, (16,)),
    Point(64, 64, (64,)),
    Point(32, 1, (16,)),
    Point(8192, 1, (16,)),
)
"""The steps that the goals name."""
COMPARED_POINTS = (
    *GOAL_POINTS,
    Point(1, 1, (16,)),
    Point(8, 8, (16,)),
    Point(64, 32, MIXED, skewed=True),
    Point(256, 32, MIXED),
    Point(512, 8, (16,)),
    Point(2048, 8, (16,), base_share=0.5),
)
"""Those, and a few of the table that lie far apart: where a run compares with the peers first."""
POOL_RANK_POINTS = (Point(32, 32, (8,), max_rank=64), Point(32, 32, (8,), max_rank=16))
"""The same step in a pool of a high and of a low rank."""
TINY_POINTS = (Point(5, 2, (8, 24)), Point(3, 3, (16,), True, 0.5, 16))
"""For triton's interpreter."""


def few_points() -> Iterator[Point]:
    """The table: one dimension after the other around a usual step."""
    yield from GOAL_POINTS
    yield from (Point(rows, min(rows, 8), (16,)) for rows in (1, 8, 128, 512, 2048, 8192))
    yield from (Point(64, adapters, (16,)) for adapters in (1, 4, 16, 64))
    yield from (Point(64, 32, ranks) for ranks in ((8,), (32,), (64,), MIXED))
    yield Point(64, 32, MIXED, skewed=True)
    yield from (Point(rows, 8, (16,), base_share=0.5) for rows in (64, 2048))
    yield from (Point(256, 32, MIXED, skewed) for skewed in (False, True))
    yield Point(2048, 32, MIXED, skewed=True, base_share=0.5)


def all_points() -> Iterator[Point]:
    """Every combination, after the table's own points: hours."""
    yield from few_points()
    for num_rows in (1, 8, 32, 64, 128, 256, 512, 2048, 8192):
        for num_adapters in (1, 4, 8, 16, 32, 64):
            if num_adapters > num_rows:
                continue
            for ranks in ((8,), (16,), (32,), (64,), MIXED):
                for skewed in (False, True) if num_adapters > 1 else (False,):
                    for base_share in (0.0, 0.5):
                        yield Point(num_rows, num_adapters, ranks, skewed, base_share)
