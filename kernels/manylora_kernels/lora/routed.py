"""What the Triton kernels read of a step: one upload, then the route is made on the device.

Shape key: T rows, D slots, P' most pages of an adapter in a kind, C kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from manylora_kernels.device import Device, facts
from manylora_kernels.lora import planner
from manylora_kernels.lora.form import PageTable
from manylora_kernels.lora.one_adapter import OneAdapter
from manylora_kernels.lora.plan import Plan
from manylora_kernels.lora.route import Route, route
from manylora_kernels.shapes import SiteShape
from manylora_kernels.upload import upload


@dataclass(frozen=True, slots=True)
class RoutedMix:
    """The adapters of one step on the device. All shapes depend on T, max_slots and max_pages only."""

    packed: torch.Tensor
    """[2 * T + C * D * (1 + P') + C * D], int32: the slots of the rows, their scales, the tables and the
    vectors of all kinds."""
    tables: torch.Tensor
    """[C, D, 1 + P'], int32, a view: how many pages a slot has, then the pages; the rest is 0."""
    scales: torch.Tensor
    """[T], float32, a view."""
    vectors: torch.Tensor
    """[C, D], int32, a view: the page of a slot's vectors, -1 for none."""
    reads_vectors: tuple[bool, ...]
    """By kind, whether the kernels look at that."""
    route: Route
    device: Device
    one_adapter: OneAdapter | None = None
    """Set where the step's only adapter has rows enough for the vendor's matrix products."""

    @property
    def max_pages(self) -> int:
        """P'."""
        return self.tables.shape[2] - 1

    @classmethod
    def build(
        cls,
        row_slots: npt.NDArray[np.int32],
        row_scales: npt.NDArray[np.float32],
        pages: Sequence[PageTable],
        max_slots: int,
        max_pages: int,
        device: torch.device,
        vectors: Sequence[PageTable] = (),
        reads_vectors: Sequence[bool] | None = None,
    ) -> RoutedMix:
        """Upload a step and sort its rows, as `Mix.build` says, which checks the arguments.

        Args:
            reads_vectors: by kind; None: where a slot has some.
        """
        num_rows, num_kinds = len(row_slots), len(pages)
        tables = np.zeros((num_kinds, max_slots, 1 + max_pages), dtype=np.int32)
        for kind, table in enumerate(pages):
            if kind and table == pages[kind - 1]:
                tables[kind] = tables[kind - 1]
                continue
            for slot, mine in enumerate(table):
                tables[kind, slot, 0] = len(mine)
                tables[kind, slot, 1 : 1 + len(mine)] = mine
        places = np.full((num_kinds, max_slots), -1, dtype=np.int32)
        for kind, table in enumerate(vectors):
            for slot, mine in enumerate(table):
                if mine:
                    places[kind, slot] = mine[0]
        if reads_vectors is None:
            reads_vectors = [bool((kind >= 0).any()) for kind in places]
        host = (row_slots, row_scales.view(np.int32), tables.reshape(-1), places.reshape(-1))
        packed = upload(np.concatenate(host), device)
        found = facts(device)
        least = planner.one_adapter_rows(found)
        one_adapter = OneAdapter.of(row_slots, row_scales, pages, least, device, vectors)
        block_rows = planner.block_rows(num_rows, found)
        return cls(
            packed=packed,
            tables=packed[2 * num_rows :][: tables.size].view(tables.shape),
            scales=packed[num_rows : 2 * num_rows].view(torch.float32),
            vectors=packed[2 * num_rows + tables.size :].view(places.shape),
            reads_vectors=tuple(reads_vectors),
            route=route(packed[:num_rows], max_slots, block_rows),
            device=found,
            one_adapter=one_adapter,
        )

    def plan_for(self, site: SiteShape, dtype: torch.dtype) -> Plan:
        """The plan of this step at a site whose pool has `dtype`."""
        return planner.choose(self.route.num_rows, site, self.max_pages, dtype, self.device)

    def check_plan(self, chosen: Plan) -> None:
        """
        Raises:
            ValueError: a plan for other blocks than the route's.
        """
        if chosen.block_rows != self.route.block_rows:
            raise ValueError(
                f"plan for blocks of {chosen.block_rows} rows, the route has {self.route.block_rows}"
            )

    def copy_from(self, other: RoutedMix) -> None:
        """Become another step of the same shapes, in place: a graph captured with this one then serves it.

        Raises:
            ValueError: a step of other shapes.
        """
        if self.route.num_rows != other.route.num_rows or self.tables.shape != other.tables.shape:
            raise ValueError(
                f"mix: asked to copy one of {other.route.num_rows} rows and tables "
                f"{list(other.tables.shape)}, allowed {self.route.num_rows} and {list(self.tables.shape)}"
            )
        self.packed.copy_(other.packed)
        self.route.packed.copy_(other.route.packed)


def row_stride(rows: torch.Tensor) -> int:
    """Elements from row to row. That of a single row is arbitrary, and kernels are specialised on it."""
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]
