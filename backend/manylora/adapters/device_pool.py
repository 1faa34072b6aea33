"""Which adapters lie in which pages of the device pool. Plain Python: `pool_tensors.py` has the tensors.

An adapter takes pages of the groups in which it has parts only, all or nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from manylora.adapters.pages import PageAllocator, largest_pages
from manylora.adapters.placement import Placement
from manylora.model.parts import num_pages_of
from manylora.model.spec import SiteKind, page_groups

if TYPE_CHECKING:
    from manylora.adapters.weights import AdapterWeights


class Tensors(Protocol):
    """What the pool asks of `PoolTensors`. What is placed and freed is plain data: a pool of several devices
    hands it to each of them, which then takes its own weights of that version."""

    @property
    def num_bytes(self) -> int: ...
    def place(self, placement: Placement, weights: AdapterWeights, /) -> None: ...
    def free(self, placement: Placement, /) -> None: ...
    def is_copied(self, placement: Placement, /) -> bool: ...
    def await_copy(self, placement: Placement, /) -> None: ...


class DevicePool:
    """Hands out pages, and has adapters copied into them. Owned by the engine thread.

    Args:
        kinds: the base model's sites.
        max_loras: so many of the largest adapters that `max_lora_rank` admits fit: of rank rows that is
            max_loras * ceil(max_lora_rank / 16) pages of each kind.
        tensors: of the same kinds and numbers.
    """

    def __init__(
        self, kinds: Sequence[SiteKind], max_loras: int, max_lora_rank: int, tensors: Tensors
    ) -> None:
        self.tensors = tensors
        self.num_kinds = len(kinds)
        self.largest_pages = largest_pages(kinds, max_lora_rank)
        """Pages by group of the largest adapter that `max_lora_rank` admits."""
        self.max_pages = tuple(max_loras * count for count in self.largest_pages)
        """Pages of the pool by group."""
        self._groups = page_groups(kinds)
        self._allocators = tuple(PageAllocator(count) for count in self.max_pages)
        self._placements: set[Placement] = set()

    @property
    def num_pages(self) -> int:
        """Pages of rank rows of each kind."""
        return self.max_pages[0]

    @property
    def num_free(self) -> tuple[int, ...]:
        """Free pages by group."""
        return tuple(allocator.num_free for allocator in self._allocators)

    def plan(self, rank: int) -> int:
        """How many adapters of `rank` on every kind of site the whole pool holds."""
        return self.num_pages // num_pages_of(rank)

    def try_place(self, weights: AdapterWeights) -> Placement | None:
        """Take pages and have the adapter copied into them; None, and nothing taken, if a group lacks pages.

        On CUDA the copy runs beside the steps; `await_copy` orders a step behind it.
        """
        counts = weights.num_pages
        if any(count > free for count, free in zip(counts, self.num_free, strict=True)):
            return None
        pages = tuple(
            allocator.allocate(count) for allocator, count in zip(self._allocators, counts, strict=True)
        )
        placement = Placement(weights.version, pages)
        self.tensors.place(placement, weights)
        self._placements.add(placement)
        return placement

    def free(self, placement: Placement) -> None:
        """Give the adapter's pages back. Their content stays until it is overwritten."""
        self._placements.remove(placement)
        for allocator, pages in zip(self._allocators, placement.pages, strict=True):
            allocator.free(pages)
        self.tensors.free(placement)

    def check(self) -> list[str]:
        """Broken invariants."""
        wrong = []
        for index, (allocator, group) in enumerate(zip(self._allocators, self._groups, strict=True)):
            used = [page for placement in self._placements for page in placement.pages[index]]
            wrong += [
                f"pool, {group.kind.name} by {group.paged_by.value}: {text}" for text in allocator.check(used)
            ]
        return wrong
