"""Sizes that kernels are compiled for and plans are chosen by.

Shape key: T rows, S linears of a site, K inputs, N outputs of all S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SiteShape:
    """Sizes of one site: what kernels are compiled for and plans are chosen by."""

    num_inputs: int
    """K."""
    widths: tuple[int, ...]
    """Outputs of each of the S linears; their sum is N."""

    @property
    def num_linears(self) -> int:
        """S."""
        return len(self.widths)

    @property
    def num_outputs(self) -> int:
        """N."""
        return sum(self.widths)

    @property
    def is_gate_up(self) -> bool:
        """Whether the site has the form of gate and up: two linears of one width."""
        return self.num_linears == 2 and self.widths[0] == self.widths[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedShapes:
    """What a server's steps look like: everything that decides which kernels they use."""

    sites: tuple[SiteShape, ...]
    """The sites of a layer."""
    row_counts: tuple[int, ...]
    """Numbers of rows that a step may have; `range(1, most + 1)` where they are not rounded up to buckets."""
    max_slots: int
    """Most adapters of a step."""
    max_pages: int
    """Most pages of an adapter in a kind."""
    dtype: torch.dtype
    """Of x and y."""
    pool_dtype: torch.dtype
    """Of the adapters."""
    batch_invariant: bool = False
    """As of the mixes."""

    def __post_init__(self) -> None:
        if not self.row_counts or min(self.row_counts) < 1:
            raise ValueError(f"row_counts: found {self.row_counts!r}, allowed at least one, all above 0")
