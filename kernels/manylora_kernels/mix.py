"""Which adapter each row of a step uses, prepared once for all sites of the step.

Shape key: T rows, D adapters of the step, P pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from manylora_kernels.cpu import KindRows

if TYPE_CHECKING:
    from manylora_kernels.routed import RoutedMix

PageTable = Sequence[Sequence[int]]
"""The pages of each slot in one kind of site."""


@dataclass(frozen=True, slots=True)
class Mix:
    """The adapters of one step. Make it with `Mix.build`; a CPU fills `rows`, CUDA fills `routed`."""

    num_rows: int
    """T."""
    page_limits: tuple[int, ...]
    """For each kind the highest page in use plus one: a pool must have so many."""
    rows: tuple[KindRows, ...] = ()
    """On a CPU: what to multiply, for each kind."""
    routed: RoutedMix | None = None
    """On CUDA: what the kernels read."""

    @property
    def is_empty(self) -> bool:
        """Whether no row has an adapter with pages, so that `add_lora` has nothing to do."""
        return not any(self.page_limits)

    @classmethod
    def build(
        cls,
        row_slots: npt.NDArray[np.int32],
        row_scales: npt.NDArray[np.float32],
        pages: Sequence[PageTable],
        max_slots: int,
        max_pages: int,
        device: torch.device | str,
        batch_invariant: bool = False,
        triton: bool | None = None,
    ) -> Mix:
        """Prepare a step.

        Args:
            row_slots: [T], the slot of each row's adapter, 0 .. D-1, or -1 for none.
            row_scales: [T], what multiplies each row's term.
            pages: `pages[kind][slot]`, the pages of an adapter; empty where it has nothing in the kind.
            max_slots: most adapters a step may mix. With max_pages and T it fixes every shape on the device.
            max_pages: most pages an adapter may have in a kind.
            device: where `add_lora` will run.
            batch_invariant: whether a row's bits must depend on the row and its adapter alone, which costs
                speed on CUDA. Without it they also depend on T and on whether one adapter has all rows. The
                compiled form of a CPU is invariant either way, torch's products are not.
            triton: whether to prepare the Triton kernels' form. None: on CUDA. On a CPU they run in triton's
                interpreter only.

        Raises:
            ValueError: arrays of different lengths, a slot that `pages` does not have, more slots or pages
                than allowed.
        """
        row_slots = np.ascontiguousarray(row_slots, dtype=np.int32)
        row_scales = np.ascontiguousarray(row_scales, dtype=np.float32)
        _check(row_slots, row_scales, pages, max_slots, max_pages)
        used = [slot for slot in np.unique(row_slots).tolist() if slot >= 0]
        limits = tuple(max((page + 1 for slot in used for page in table[slot]), default=0) for table in pages)
        if not any(limits):
            return cls(num_rows=len(row_slots), page_limits=limits)
        if not (torch.device(device).type != "cpu" if triton is None else triton):
            # Kinds usually have the same pages, and what is equal is built once.
            built: dict[tuple[tuple[int, ...], ...], KindRows] = {}
            for table in pages:
                key = tuple(tuple(slot) for slot in table)
                if key not in built:
                    built[key] = KindRows(row_slots, row_scales, key)
            rows = tuple(built[tuple(tuple(slot) for slot in table)] for table in pages)
            return cls(num_rows=len(row_slots), page_limits=limits, rows=rows)
        from manylora_kernels.routed import RoutedMix  # imports triton, which a CPU does without

        routed = RoutedMix.build(
            row_slots, row_scales, pages, max_slots, max_pages, torch.device(device), batch_invariant
        )
        return cls(num_rows=len(row_slots), page_limits=limits, routed=routed)


def _check(
    row_slots: npt.NDArray[np.int32],
    row_scales: npt.NDArray[np.float32],
    pages: Sequence[PageTable],
    max_slots: int,
    max_pages: int,
) -> None:
    if row_slots.ndim != 1 or row_scales.shape != row_slots.shape:
        raise ValueError(
            f"row_slots and row_scales: found {row_slots.shape} and {row_scales.shape}, allowed [T] both"
        )
    num_slots = min((len(table) for table in pages), default=0)
    if num_slots > max_slots or any(len(table) != num_slots for table in pages):
        raise ValueError(
            f"pages: found {[len(table) for table in pages]} slots by kind, allowed the same number "
            f"for each, at most max_slots={max_slots}"
        )
    if len(row_slots) and not -1 <= row_slots.min() <= row_slots.max() < num_slots:
        raise ValueError(
            f"row_slots: found {row_slots.min()} .. {row_slots.max()}, allowed -1 .. {num_slots - 1}"
        )
    for kind, table in enumerate(pages):
        for slot, mine in enumerate(table):
            if len(mine) > max_pages or any(page < 0 for page in mine):
                raise ValueError(
                    f"pages of slot {slot}, kind {kind}: found {tuple(mine)}, allowed at most "
                    f"max_pages={max_pages}, none negative"
                )
