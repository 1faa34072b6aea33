"""Adapters in device memory, in pages of 16 rank rows.

Shape key: L layers of a kind, P pages of a kind, S linears of a site, K inputs, N outputs of all S linears,
E elements of an adapter's buffer.

A page of a kind is the same 16 rows in that site of every layer. An adapter takes pages of the kinds it
targets only, all or nothing.

From host to device an adapter goes in one transfer, which nothing but the host's link bounds; from there
into its pages, at the speed of the device's memory, in two copies a kind and run of pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from manylora.adapters.copy_stream import Copied, copy_stream
from manylora.adapters.layout import AdapterLayout, words_of
from manylora.adapters.pages import PageAllocator
from manylora.adapters.weights import PAGE_ROWS, AdapterWeights
from manylora.config import EngineConfig
from manylora.memory import zeros
from manylora.model.spec import ModelSpec, SiteKind


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
    copied: Copied
    """Behind the copy."""


class DevicePool:
    """Pages for adapters of all kinds of site of a base model. Owned by the engine thread.

    Args:
        spec: the base model's linears.
        max_loras: with `max_lora_rank`, the number of pages of each kind:
            max_loras * ceil(max_lora_rank / 16).
        dtype: of all tensors, and of the adapters that are placed.
        staged: whether adapters go through a buffer on the device, of the size of the largest one that
            `max_lora_rank` admits. None: on CUDA only. Without one, each page is copied from the host.
    """

    def __init__(
        self,
        spec: ModelSpec,
        max_loras: int,
        max_lora_rank: int,
        dtype: torch.dtype,
        device: torch.device,
        staged: bool | None = None,
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
        # Those whose copy is known to be over: the driver is asked once, not for each sequence of each step.
        self._arrived: set[Placement] = set()
        # The same memory as `kinds`, as it is copied.
        self._words = tuple((words_of(kind.a), words_of(kind.b)) for kind in self.kinds)
        self._stream = copy_stream(self.device)
        self._staging: torch.Tensor | None = None
        if self.device.type == "cuda" if staged is None else staged:
            num_elements = staging_elements(spec.kinds, max_lora_rank, dtype)
            # Memory of the copies' stream: what used it before them is over when they begin.
            with self._stream.running():
                self._staging = torch.empty(num_elements, dtype=dtype, device=self.device)
        for kind in self.kinds:
            self._stream.share(kind.a)
            self._stream.share(kind.b)
        # No page is written before its zeros.
        self._stream.mark_freed()

    @property
    def num_bytes(self) -> int:
        """Bytes on the device: the pages, and `staging_bytes`."""
        pages = sum(t.numel() * t.element_size() for kind in self.kinds for t in (kind.a, kind.b))
        return pages + self.staging_bytes

    @property
    def staging_bytes(self) -> int:
        """Bytes of the buffer that adapters go through; 0 without one."""
        return 0 if self._staging is None else self._staging.numel() * self._staging.element_size()

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
        assert weights.buffer.dtype == self.dtype, "the adapter is not in the pool's dtype"
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
        self._arrived.discard(placement)
        for allocator, pages in zip(self._allocators, placement.pages, strict=True):
            allocator.free(pages)
        # A step that still runs may read these pages: the next copy waits for it.
        self._stream.mark_freed()

    def is_copied(self, placement: Placement) -> bool:
        """Whether the adapter is in its pages, so that a step would not wait for it."""
        if placement.copied is None or placement in self._arrived:
            return True
        is_over: bool = placement.copied.query()  # type: ignore[no-untyped-call]  # torch has no stub
        if is_over:
            self._arrived.add(placement)
        return is_over

    def await_copy(self, placement: Placement) -> None:
        """Order the current stream's further work behind the adapter's copy. Does not block the host."""
        self._stream.await_copied(placement.copied)

    def check(self) -> list[str]:
        """Broken invariants."""
        wrong = []
        for index, (allocator, kind) in enumerate(zip(self._allocators, self.spec.kinds, strict=True)):
            used = [page for placement in self._placements for page in placement.pages[index]]
            wrong += [f"pool, {kind.name}: {text}" for text in allocator.check(used)]
        return wrong

    def _copy(self, weights: AdapterWeights, pages: Sequence[Sequence[int]]) -> Copied:
        layout = AdapterLayout.of(self.spec.kinds, needed_pages(weights), self.dtype)
        assert weights.buffer.shape == (layout.num_elements,), "the adapter's buffer is of another layout"
        source = weights.buffer
        with self._stream.running():
            if self._staging is not None:
                # Waits for no step, only for the copies before: on their stream, those have read the buffer.
                assert layout.num_elements <= self._staging.numel(), "an adapter above max_lora_rank"
                source = self._staging[: layout.num_elements].copy_(source, non_blocking=True)
            self._stream.await_freed()
            self._fill(source, layout, pages)
            return self._stream.mark_copied()

    def _fill(self, source: torch.Tensor, layout: AdapterLayout, pages: Sequence[Sequence[int]]) -> None:
        """Copy an adapter's buffer [E], on host or device, into its pages."""
        for parts, targets, taken in zip(layout.parts, self._words, pages, strict=True):
            if parts is None:
                continue
            for part, target in zip(parts, targets, strict=True):
                words = words_of(part.of(source))
                for first, page, count in runs_of(taken):
                    target[:, page : page + count].copy_(words[:, first : first + count], non_blocking=True)

    def _zeros(self, *shape: int) -> torch.Tensor:
        return zeros(shape, self.dtype, self.device)


def pool_dtype(config: EngineConfig, base_dtype: torch.dtype) -> torch.dtype:
    """The pool's element type: `lora_dtype`, of which `auto` is the base model's."""
    dtype: torch.dtype = base_dtype if config.lora_dtype == "auto" else getattr(torch, config.lora_dtype)
    return dtype


def num_pages_of(rank: int) -> int:
    """Pages that `rank` rows take."""
    return -(-rank // PAGE_ROWS)


def staging_elements(kinds: Sequence[SiteKind], max_lora_rank: int, dtype: torch.dtype) -> int:
    """E of the largest adapter that `max_lora_rank` admits: of that rank on every kind of site."""
    pages = [num_pages_of(max_lora_rank)] * len(kinds)
    return AdapterLayout.of(kinds, pages, dtype).num_elements


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
