"""How an adapter's tensors follow each other in one flat buffer, on the host and on the device.

Shape key: L layers of a kind, P pages, S linears of a site, K inputs, N outputs of all S linears, E elements
of the buffer, W words of 8 bytes in one page of one layer.

Example: one linear, page and layer in bfloat16, K = 6, N = 10. `a` has 96 elements from 0, `b` 160 from 128,
since 256 bytes are 128 elements; E is 384.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from manylora_kernels import PAGE_ROWS

from manylora.model.spec import SiteKind

ALIGNMENT_BYTES = 256
"""Each tensor begins at a multiple of this in the buffer: what a warp reads at once with 8 bytes a thread, so
that the copies out of the buffer are of whole memory transactions. CUDA's allocations begin at one too."""
WORD = torch.int64
"""What pages are copied as, whatever they hold: 16 rows of any width and dtype are whole words."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where one tensor lies."""

    start: int
    """In elements."""
    shape: tuple[int, ...]
    """[L, P, ...]"""

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor as a view of the buffer [E]."""
        return buffer[self.start : self.start + math.prod(self.shape)].view(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLayout:
    """The places of all tensors of one adapter: in the order of the kinds, `a` before `b`."""

    parts: tuple[tuple[Part, Part] | None, ...]
    """`a` [L, P, S, 16, K] and `b` [L, P, 16, N] by kind; None for a kind without pages."""
    num_elements: int
    """E: the tensors and what aligns them."""

    @classmethod
    def of(cls, kinds: Sequence[SiteKind], num_pages: Sequence[int], dtype: torch.dtype) -> AdapterLayout:
        """The layout of an adapter with `num_pages` pages by kind. More pages never make it shorter."""
        step = ALIGNMENT_BYTES // dtype.itemsize
        parts: list[tuple[Part, Part] | None] = []
        start = 0
        for kind, count in zip(kinds, num_pages, strict=True):
            if not count:
                parts.append(None)
                continue
            pages = (kind.num_layers, count)
            a = Part(start, (*pages, kind.num_slices, PAGE_ROWS, kind.in_features))
            start = _next_multiple(a.start + math.prod(a.shape), step)
            b = Part(start, (*pages, PAGE_ROWS, sum(kind.out_features)))
            start = _next_multiple(b.start + math.prod(b.shape), step)
            parts.append((a, b))
        return cls(parts=tuple(parts), num_elements=start)


def words_of(pages: torch.Tensor) -> torch.Tensor:
    """The same memory [L, P, ...] as [L, P, W]: pages to be copied, not read."""
    return pages.flatten(2).view(WORD)


def _next_multiple(number: int, step: int) -> int:
    return -(-number // step) * step
