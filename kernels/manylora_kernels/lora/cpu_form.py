"""What serves on a CPU: the compiled form where there is one, else torch's products over rows by adapter.

Shape key: T rows, S linears, K inputs, N outputs of all S, I pages of a batch, M rows that a page is given, R
rank rows.

Why the products are built this way (found at decode shapes): torch's batched product streams weights about as
fast as a copy, as long as its output is contiguous; a gather of pages leaves them in the cache for the
product and so costs little; adding with an index costs as much as the products, so results are brought into
row order first and added as slices; preallocated outputs gain nothing. Products are in float32 whatever the
pool's dtype: torch's small 16-bit products are slower, and round in between.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from manylora_kernels.compiled import library
from manylora_kernels.lora import native
from manylora_kernels.lora.form import PageTable, Product
from manylora_kernels.lora.pool import PAGE_ROWS, SitePool
from manylora_kernels.lora.segments import KindSegments, Rows, Segment, SegmentBatch, Targets, build_segments
from manylora_kernels.shapes import ServedShapes


class KindRows:
    """The rows of a step and their adapters' pages in one kind of site, grouped as each form needs it."""

    def __init__(
        self,
        row_slots: npt.NDArray[np.int32],
        row_scales: npt.NDArray[np.float32],
        pages: Sequence[Sequence[int]],
        vectors: Sequence[Sequence[int]] = (),
    ) -> None:
        """Keep them; a form groups them when it is first used.

        Args:
            row_slots: [T], -1 for no adapter.
            row_scales: [T].
            pages: the pages of each slot; empty where the adapter has nothing in this kind.
            vectors: the page of each slot's vectors, or nothing; empty: no slot has any.
        """
        self._given = (row_slots, row_scales, pages, vectors)

    @functools.cached_property
    def native(self) -> native.NativeSegments:
        """For the compiled form."""
        return native.build_native_segments(*self._given)

    @functools.cached_property
    def products(self) -> KindSegments:
        """For torch's products."""
        return build_segments(*self._given)


@dataclass(frozen=True, slots=True)
class GroupedMix:
    """The adapters of one step for a CPU: its rows grouped by adapter, for each kind of site."""

    kinds: tuple[KindRows, ...]

    def copy_from(self, other: GroupedMix) -> None:
        """Nothing captures a CPU's steps.

        Raises:
            ValueError: always.
        """
        raise ValueError("mix: found one for a CPU, whose steps are built anew and never copied")


class CpuForm:
    """The form that serves on a CPU."""

    def prepare(
        self,
        row_slots: npt.NDArray[np.int32],
        row_scales: npt.NDArray[np.float32],
        pages: Sequence[PageTable],
        max_slots: int,
        max_pages: int,
        device: torch.device,
        vectors: Sequence[PageTable],
        reads_vectors: Sequence[bool],
    ) -> GroupedMix:
        """Keeps the arguments: rows are grouped at the first site of a kind."""
        # Kinds usually have the same pages, and what is equal is grouped once.
        keys = [
            tuple(tuple(tuple(slot) for slot in table) for table in tables)
            for tables in zip(pages, vectors or [()] * len(pages), strict=True)
        ]
        distinct = {key: KindRows(row_slots, row_scales, *key) for key in dict.fromkeys(keys)}
        return GroupedMix(tuple(distinct[key] for key in keys))

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, pool: SitePool, step: GroupedMix, kind: int) -> None:
        """The compiled form where it serves, else torch's products."""
        rows = step.kinds[kind]
        if native.serves(y, x, pool):
            native.add_lora(y, x, pool, rows.native)
        else:
            add_lora_by_products(y, x, pool, rows.products)

    def add_lora_silu_mul(
        self,
        out: torch.Tensor,
        y: torch.Tensor,
        x: torch.Tensor,
        pool: SitePool,
        step: GroupedMix,
        kind: int,
    ) -> None:
        """Changes y: the term is added to it first."""
        self.add_lora(y, x, pool, step, kind)
        self.silu_mul(y, out)

    def linear_lora(
        self, x: torch.Tensor, product: Product, pool: SitePool, step: GroupedMix, kind: int
    ) -> torch.Tensor:
        """One after the other."""
        y = product(x)
        self.add_lora(y, x, pool, step, kind)
        return y

    def gate_up_lora(
        self, x: torch.Tensor, product: Product, pool: SitePool, step: GroupedMix, kind: int
    ) -> torch.Tensor:
        """One after the other."""
        return self.silu_mul(self.linear_lora(x, product, pool, step, kind))

    def silu_mul(self, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """torch's operators, in y's dtype."""
        gate, up = y.chunk(2, dim=1)
        activated = F.silu(gate)
        return activated.mul_(up) if out is None else torch.mul(activated, up, out=out)

    def warm_up(self, device: torch.device, shapes: ServedShapes | None) -> None:
        """Builds the compiled form, whatever the shapes."""
        library()


CPU = CpuForm()


def add_lora_by_products(y: torch.Tensor, x: torch.Tensor, pool: SitePool, kind: KindSegments) -> None:
    """Add the adapters' term of one site in place with torch's products, for any dtypes."""
    for batch in kind.batches:
        _add_batch(y, x, pool, batch)
    for segment in kind.segments:
        _add_segment(y, x, pool, segment)
    for rows, page in kind.vectors:
        assert pool.vectors is not None, "the step has vectors, the pool has none"
        scale, offset = pool.vectors.scale[page].float(), pool.vectors.offset[page].float()
        y[rows] = torch.addcmul(offset, y[rows].float(), scale).to(y.dtype)


def _add_batch(y: torch.Tensor, x: torch.Tensor, pool: SitePool, batch: SegmentBatch) -> None:
    a = _select(pool.a, batch.pages)  # [I, S, 16, K]
    b = _select(pool.b, batch.pages)  # [I, 16, N]
    num_items, num_linears, _, num_inputs = a.shape
    x_IMK = _select(x, batch.rows).view(num_items, -1, num_inputs)
    h = torch.bmm(a.flatten(1, 2), x_IMK.transpose(1, 2)).mul_(batch.scales)
    h = h.view(num_items, num_linears, PAGE_ROWS, -1)
    start = 0
    for s, width in enumerate(pool.widths):
        out = torch.bmm(h[:, s].transpose(1, 2), b[:, :, start : start + width]).flatten(
            0, 1
        )  # [I * M, width]
        if batch.bags is None:
            out = _select(out, batch.picks)
        else:
            assert isinstance(batch.picks, torch.Tensor)
            out = F.embedding_bag(batch.picks, out, batch.bags, mode="sum")
        _add_rows(y[:, start : start + width], batch.targets, out)
        start += width


def _add_segment(y: torch.Tensor, x: torch.Tensor, pool: SitePool, segment: Segment) -> None:
    a = _select(pool.a, segment.pages)  # [pages, S, 16, K]
    b = _select(pool.b, segment.pages).flatten(0, 1)  # [R, N]
    h = torch.mm(_select(x, segment.rows), a.flatten(0, 2).t()).mul_(segment.scales)
    h = h.view(-1, a.shape[0], a.shape[1], PAGE_ROWS)
    start = 0
    for s, width in enumerate(pool.widths):
        h_MR = h[:, :, s].flatten(1)
        b_RN = b[:, start : start + width]
        y_part = y[:, start : start + width]
        if isinstance(segment.rows, slice) and y.dtype == torch.float32:
            y_part[segment.rows].addmm_(h_MR, b_RN)
        else:
            _add_rows(y_part, segment.targets, torch.mm(h_MR, b_RN))
        start += width


def _add_rows(y: torch.Tensor, targets: Targets, out: torch.Tensor) -> None:
    if isinstance(targets, torch.Tensor):
        y.index_add_(0, targets, out.to(y.dtype))
    else:
        for y_rows, out_rows in targets:
            y[y_rows].add_(out[out_rows])


def _select(tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
    selected = tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)
    return selected.float()
