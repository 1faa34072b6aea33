"""The device pool's tensors: adapters in pages of 16 rank rows, where placements say.

Shape key: L layers of a kind, P pages of a group, E elements of an adapter's buffer.

What the tensors are, and which share pages, says the table of parts: a *group* is the parts of a kind that
do. A page is the same 16 rows in that site of every layer. An adapter takes pages of the kinds it targets
only. Which pages is decided elsewhere (`device_pool.py`), once for all devices.

From host to device an adapter goes in one transfer, which nothing but the host's link bounds; from there
into its pages, at the speed of the device's memory, in one copy for each part and run of pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch

from manylora.adapters.copy_stream import Copied, copy_stream
from manylora.adapters.layout import AdapterLayout, words_of
from manylora.adapters.pages import largest_pages
from manylora.adapters.placement import Placement
from manylora.adapters.weights import AdapterWeights
from manylora.config import EngineConfig
from manylora.memory import zeros
from manylora.model.spec import ModelSpec, SiteKind, page_groups

Tensors: TypeAlias = Mapping[str, torch.Tensor]
"""The pages of parts, by name: [L, P, ...]."""


class PoolTensors:
    """Pages for adapters of all kinds of site of a base model, on one device. Owned by the engine thread.

    Args:
        spec: the base model's linears.
        max_loras: with `max_lora_rank`, the number of pages, as of `PagePool`.
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
        self.groups = page_groups(spec.kinds)
        counts = [max_loras * count for count in largest_pages(spec.kinds, max_lora_rank)]
        self._tensors: tuple[Tensors, ...] = tuple(
            {
                part.name: self._zeros(group.kind.num_layers, count, *group.kind.page_shape(part))
                for part in group.parts
            }
            for group, count in zip(self.groups, counts, strict=True)
        )
        self.kinds = tuple(
            {
                name: tensor
                for group in self._tensors[kind :: len(spec.kinds)]
                for name, tensor in group.items()
            }
            for kind in range(len(spec.kinds))
        )
        """All parts of each kind."""
        # Copies that are not known to be over: none on a CPU.
        self._copies: dict[Placement, torch.cuda.Event] = {}
        # The same memory, as it is copied.
        self._words = tuple({name: words_of(t) for name, t in group.items()} for group in self._tensors)
        self._stream = copy_stream(self.device)
        self._staging: torch.Tensor | None = None
        if self.device.type == "cuda" if staged is None else staged:
            num_elements = staging_elements(spec.kinds, max_lora_rank, dtype)
            # Memory of the copies' stream: what used it before them is over when they begin.
            with self._stream.running():
                self._staging = torch.empty(num_elements, dtype=dtype, device=self.device)
        for group in self._tensors:
            for tensor in group.values():
                self._stream.share(tensor)
        # No page is written before its zeros.
        self._stream.mark_freed()

    @property
    def num_bytes(self) -> int:
        """Bytes on the device: the pages, and `staging_bytes`."""
        pages = sum(t.numel() * t.element_size() for group in self._tensors for t in group.values())
        return pages + self.staging_bytes

    @property
    def staging_bytes(self) -> int:
        """Bytes of the buffer that adapters go through; 0 without one."""
        return 0 if self._staging is None else self._staging.numel() * self._staging.element_size()

    def place(self, placement: Placement, weights: AdapterWeights) -> None:
        """Copy an adapter into its pages. On CUDA the copy runs beside the steps; `await_copy` orders a step
        behind it."""
        assert weights.buffer.dtype == self.dtype, "the adapter is not in the pool's dtype"
        assert weights.version == placement.version, "the adapter of another placement"
        copied = self._copy(weights, placement.pages)
        if copied is not None:
            self._copies[placement] = copied

    def free(self, placement: Placement) -> None:
        """Let the adapter's pages be overwritten. Their content stays until then."""
        self._copies.pop(placement, None)
        # A step that still runs may read these pages: the next copy waits for it.
        self._stream.mark_freed()

    def copied(self, placement: Placement) -> Copied:
        """Behind the adapter's copy; None where it is known to be over."""
        return self._copies.get(placement)

    def is_copied(self, placement: Placement) -> bool:
        """Whether the adapter is in its pages, so that a step would not wait for it."""
        if not self._copies:
            return True
        copied = self._copies.get(placement)
        if copied is None:
            return True
        is_over: bool = copied.query()  # type: ignore[no-untyped-call]  # torch has no stub
        if is_over:
            # The driver is asked once, not for each sequence of each step.
            del self._copies[placement]
        return is_over

    def await_copy(self, placement: Placement) -> None:
        """Order the current stream's further work behind the adapter's copy. Does not block the host."""
        self._stream.await_copied(self.copied(placement))

    def _copy(self, weights: AdapterWeights, pages: Sequence[Sequence[int]]) -> Copied:
        layout = AdapterLayout.of(self.groups, weights.num_pages, self.dtype)
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
        for places, targets, taken in zip(layout.groups, self._words, pages, strict=True):
            for name, place in places.items():
                words = words_of(place.of(source))
                for first, page, count in runs_of(taken):
                    part = targets[name][:, page : page + count]
                    part.copy_(words[:, first : first + count], non_blocking=True)

    def _zeros(self, *shape: int) -> torch.Tensor:
        return zeros(shape, self.dtype, self.device)


def pool_dtype(config: EngineConfig, base_dtype: torch.dtype) -> torch.dtype:
    """The pool's element type: `lora_dtype`, of which `auto` is the base model's."""
    dtype: torch.dtype = base_dtype if config.lora_dtype == "auto" else getattr(torch, config.lora_dtype)
    return dtype


def staging_elements(kinds: Sequence[SiteKind], max_lora_rank: int, dtype: torch.dtype) -> int:
    """E of the largest adapter that `max_lora_rank` admits."""
    return AdapterLayout.of(page_groups(kinds), largest_pages(kinds, max_lora_rank), dtype).num_elements


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
