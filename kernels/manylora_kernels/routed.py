"""What the Triton kernels read of a step: one upload, then the route is made on the device.

Shape key: T rows, D slots, P' most pages of an adapter in a kind, C kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from manylora_kernels import plan
from manylora_kernels.route import Route, route


@dataclass(frozen=True, slots=True)
class RoutedMix:
    """The adapters of one step on the device. All shapes depend on T, max_slots and max_pages only."""

    slots: torch.Tensor
    """[T], int32."""
    scales: torch.Tensor
    """[T], float32."""
    counts: torch.Tensor
    """[C, D], int32: how many pages a slot has."""
    tables: torch.Tensor
    """[C, D, P'], int32: its pages; entries past the count are 0."""
    route: Route

    @property
    def max_pages(self) -> int:
        """P'."""
        return self.tables.shape[2]

    @classmethod
    def build(
        cls,
        row_slots: npt.NDArray[np.int32],
        row_scales: npt.NDArray[np.float32],
        pages: Sequence[Sequence[Sequence[int]]],
        max_slots: int,
        max_pages: int,
        device: torch.device,
    ) -> RoutedMix:
        """Upload a step and sort its rows, as `Mix.build` says, which checks the arguments."""
        num_rows, num_kinds = len(row_slots), len(pages)
        counts = np.zeros((num_kinds, max_slots), dtype=np.int32)
        tables = np.zeros((num_kinds, max_slots, max_pages), dtype=np.int32)
        for kind, table in enumerate(pages):
            for slot, mine in enumerate(table):
                counts[kind, slot] = len(mine)
                tables[kind, slot, : len(mine)] = mine
        parts = (row_slots, row_scales.view(np.int32), counts.reshape(-1), tables.reshape(-1))
        packed = torch.from_numpy(np.concatenate(parts))
        if device.type == "cuda":
            packed = packed.pin_memory()
        packed = packed.to(device, non_blocking=True)
        slots, scales, device_counts, device_tables = torch.split(packed, [len(part) for part in parts])
        return cls(
            slots=slots,
            scales=scales.view(torch.float32),
            counts=device_counts.view(num_kinds, max_slots),
            tables=device_tables.view(num_kinds, max_slots, max_pages),
            route=route(slots, max_slots, plan.block_rows(num_rows)),
        )
