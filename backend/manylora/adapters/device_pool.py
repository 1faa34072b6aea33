"""Adapters in device memory, in pages of 16 rank rows.

Shape key: L layers of a kind, P pages of a kind, S linears of a site, K inputs, N outputs of all S linears.

A page of a kind is the same 16 rows in that site of every layer. An adapter takes pages of the kinds it
targets only, all or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from manylora.adapters.pages import PageAllocator
from manylora.adapters.weights import PAGE_ROWS, AdapterWeights
from manylora.config import EngineConfig
from manylora.memory import zeros
from manylora.model.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class KindTensors:
    """The pages of one kind."""

    a: torch.Tensor
    """[L, P, S, 16, K]"""
    b: torch.Tensor
    """[L, P, 16, N]"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """Where one adapter lies in the pool."""

    pages: tuple[tuple[int, ...], ...]
    """Ascending page numbers by kind; empty where the adapter targets nothing of the kind."""
    copied: torch.cuda.Event | None
    """On CUDA: recorded behind the copy."""


class DevicePool:
    """Pages for adapters of all kinds of site of a base model. Owned by the engine thread.

    Args:
        spec: the base model's linears.
        max_loras: with `max_lora_rank`, the number of pages of each kind:
            max_loras * ceil(max_lora_rank / 16).
        dtype: of all tensors, and of the adapters that are placed.
    """

    def __init__(
        self, spec: ModelSpec, max_loras: int, max_lora_rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        self.device = torch.device(device)
        self.num_pages = max_loras * num_pages_of(max_lora_rank)
        self.kinds = tuple(
            KindTensors(
                a=self._zeros(kind.num_layers, self.num_pages, kind.num_slices, PAGE_ROWS, kind.in_features),
                b=self._zeros(kind.num_layers, self.num_pages, PAGE_ROWS, sum(kind.out_features)),
            )
            for kind in spec.kinds
        )
        self._allocators = tuple(PageAllocator(self.num_pages) for _ in spec.kinds)
        self._placements: set[Placement] = set()
        self._side: torch.cuda.Stream | None = None
        self._freed: torch.cuda.Event | None = None
        if self.device.type == "cuda":
            # The first copy waits until the zeros are written.
            self._freed = torch.cuda.current_stream(self.device).record_event()
            self._side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch has no stub

    @property
    def num_bytes(self) -> int:
        """Bytes of the pool's tensors."""
        return sum(t.numel() * t.element_size() for kind in self.kinds for t in (kind.a, kind.b))

    @property
    def num_free(self) -> tuple[int, ...]:
        """Free pages by kind."""
        return tuple(allocator.num_free for allocator in self._allocators)

    def bytes_of(self, weights: AdapterWeights) -> int:
        """Bytes that the adapter's pages take: element size x sum of pages x SiteKind.page_elements."""
        counts = needed_pages(weights)
        elements = sum(n * kind.page_elements for n, kind in zip(counts, self.spec.kinds, strict=True))
        return elements * self.dtype.itemsize

    def plan(self, rank: int) -> int:
        """How many adapters of `rank` on every kind of site the whole pool holds."""
        return self.num_pages // num_pages_of(rank)

    def try_place(self, weights: AdapterWeights) -> Placement | None:
        """Take pages and copy the adapter into them; None, and nothing taken, if a kind lacks pages.

        On CUDA the copy runs beside the steps; `await_copy` orders a step behind it.
        """
        counts = needed_pages(weights)
        if any(count > free for count, free in zip(counts, self.num_free, strict=True)):
            return None
        pages = tuple(
            allocator.allocate(count) for allocator, count in zip(self._allocators, counts, strict=True)
        )
        placement = Placement(pages=pages, copied=self._copy(weights, pages))
        self._placements.add(placement)
        return placement

    def free(self, placement: Placement) -> None:
        """Give the adapter's pages back. Their content stays until it is overwritten."""
        self._placements.remove(placement)
        for allocator, pages in zip(self._allocators, placement.pages, strict=True):
            allocator.free(pages)
        if self._side is not None:
            # A step that still runs may read these pages: the next copy waits for it.
            self._freed = torch.cuda.current_stream(self.device).record_event()

    def await_copy(self, placement: Placement) -> None:
        """Order the current stream's further work behind the adapter's copy. Does not block the host."""
        if placement.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(placement.copied)

    def check(self) -> list[str]:
        """Broken invariants."""
        wrong = []
        for index, (allocator, kind) in enumerate(zip(self._allocators, self.spec.kinds, strict=True)):
            used = [page for placement in self._placements for page in placement.pages[index]]
            wrong += [f"pool, {kind.name}: {text}" for text in allocator.check(used)]
        return wrong

    def _copy(self, weights: AdapterWeights, pages: Sequence[Sequence[int]]) -> torch.cuda.Event | None:
        if self._side is None:
            self._fill(weights, pages)
            return None
        if self._freed is not None:
            self._side.wait_event(self._freed)
        with torch.cuda.stream(self._side):
            self._fill(weights, pages)
            copied: torch.cuda.Event = self._side.record_event()
            return copied

    def _fill(self, weights: AdapterWeights, pages: Sequence[Sequence[int]]) -> None:
        for source, target, taken in zip(weights.kinds, self.kinds, pages, strict=True):
            if source is None:
                continue
            assert source.a.dtype == source.b.dtype == self.dtype, "the adapter is not in the pool's dtype"
            for first, page, count in runs_of(taken):
                target.a[:, page : page + count].copy_(source.a[:, first : first + count], non_blocking=True)
                target.b[:, page : page + count].copy_(source.b[:, first : first + count], non_blocking=True)

    def _zeros(self, *shape: int) -> torch.Tensor:
        return zeros(shape, self.dtype, self.device)


def pool_dtype(config: EngineConfig, base_dtype: torch.dtype) -> torch.dtype:
    """The pool's element type: `lora_dtype`, of which `auto` is the base model's."""
    dtype: torch.dtype = base_dtype if config.lora_dtype == "auto" else getattr(torch, config.lora_dtype)
    return dtype


def num_pages_of(rank: int) -> int:
    """Pages that `rank` rows take."""
    return -(-rank // PAGE_ROWS)


def needed_pages(weights: AdapterWeights) -> tuple[int, ...]:
    """Pages that the adapter takes, by kind."""
    return tuple(kind.num_pages if kind is not None else 0 for kind in weights.kinds)


def runs_of(pages: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Consecutive stretches of ascending pages: (index of the first in `pages`, its page number, how many).

    >>> list(runs_of([2, 3, 7]))
    [(0, 2, 2), (2, 7, 1)]
    """
    first = 0
    for index in range(1, len(pages) + 1):
        if index == len(pages) or pages[index] != pages[index - 1] + 1:
            yield first, pages[first], index - first
            first = index
