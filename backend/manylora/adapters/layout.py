"""How an adapter's tensors follow each other in one flat buffer, on the host and on the device.

Shape key: L layers of a kind, P pages, E elements of the buffer, W words of 8 bytes in one page of one layer.

Example: one linear, page and layer in bfloat16, 6 inputs, 10 outputs. `a` has 96 elements from 0, `b` 160
from 128, since 256 bytes are 128 elements; E is 384.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from manylora.model.spec import PageGroup

ALIGNMENT_BYTES = 256
"""Each tensor begins at a multiple of this in the buffer: what a warp reads at once with 8 bytes a thread, so
that the copies out of the buffer are of whole memory transactions. CUDA's allocations begin at one too."""


@dataclass(frozen=True, slots=True)
class Place:
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
    """The places of all tensors of one adapter: by group, and in it as the table has the parts."""

    groups: tuple[Mapping[str, Place], ...]
    """By group the places of its parts, by name; empty for a group without pages."""
    num_elements: int
    """E: the tensors and what aligns them."""

    @classmethod
    def of(cls, groups: Sequence[PageGroup], num_pages: Sequence[int], dtype: torch.dtype) -> AdapterLayout:
        """The layout of an adapter with `num_pages` pages by group. More pages never make it shorter."""
        step = ALIGNMENT_BYTES // dtype.itemsize
        places: list[dict[str, Place]] = []
        start = 0
        for group, count in zip(groups, num_pages, strict=True):
            mine: dict[str, Place] = {}
            for part in group.parts if count else ():
                shape = (group.kind.num_layers, count, *group.kind.page_shape(part))
                mine[part.name] = Place(start, shape)
                start = _next_multiple(start + math.prod(shape), step)
            places.append(mine)
        return cls(groups=tuple(places), num_elements=start)


def words_of(pages: torch.Tensor) -> torch.Tensor:
    """The same memory [L, P, ...] as [L, P, W]: pages to be copied, not read.

    As the widest words that a page is whole ones of, whatever it holds: 8 bytes where it has 16 rows.
    """
    flat = pages.flatten(2)
    page_bytes = flat.shape[2] * flat.element_size()
    return flat.view(next(word for word in _WORDS if page_bytes % word.itemsize == 0))


_WORDS = (torch.int64, torch.int32, torch.int16)


def _next_multiple(number: int, step: int) -> int:
    return -(-number // step) * step
