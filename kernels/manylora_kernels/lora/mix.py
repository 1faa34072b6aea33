"""Which adapter each row of a step uses, prepared once for all sites of the step.

Shape key: T rows, D adapters of the step, P pages, V pages of vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from manylora_kernels.lora.device_form import form_of
from manylora_kernels.lora.form import LoraForm, PageTable


@dataclass(frozen=True, slots=True)
class Mix:
    """The adapters of one step. Make it with `Mix.build`.

    A captured graph reads one mix, made by `blank`, that becomes each step's in turn (`copy_from`).
    """

    num_rows: int
    """T."""
    page_limits: tuple[int, ...]
    """For each kind the highest page in use plus one, 0 for none: a pool must have so many."""
    vector_limits: tuple[int, ...]
    """The same of pages of vectors."""
    device: torch.device
    """Where the operations run."""
    form: LoraForm[Any]
    """What computes."""
    step: Any
    """What `form` has prepared of the step."""

    @property
    def is_empty(self) -> bool:
        """Whether no row has an adapter that changes anything."""
        return not any(map(self.is_used_at, range(len(self.page_limits))))

    def is_used_at(self, kind: int) -> bool:
        """Whether a row has an adapter that changes something at sites of this kind."""
        return self.page_limits[kind] > 0 or self.vector_limits[kind] > 0

    @classmethod
    def build(
        cls,
        row_slots: npt.NDArray[np.int32],
        row_scales: npt.NDArray[np.float32],
        pages: Sequence[PageTable],
        max_slots: int,
        max_pages: int,
        device: torch.device | str,
        form: LoraForm[Any] | None = None,
        vectors: Sequence[PageTable] = (),
    ) -> Mix:
        """Prepare a step.

        On CUDA a row's bits depend on the row, its adapter, T, and on whether one adapter has all rows.

        Args:
            row_slots: [T], the slot of each row's adapter, 0 .. D-1, or -1 for none.
            row_scales: [T], what multiplies each row's term.
            pages: `pages[kind][slot]`, the pages of an adapter; empty where it has nothing in the kind.
            max_slots: most adapters a step may mix. With max_pages and T it fixes every shape on the device.
            max_pages: most pages an adapter may have in a kind.
            device: where the operations will run.
            form: what computes; None: the device's own.
            vectors: `vectors[kind][slot]`, the page of an adapter's vectors, or nothing. Empty: no adapter
                has any.

        Raises:
            ValueError: arrays of different lengths, a slot that `pages` does not have, more slots or pages
                than allowed.
        """
        row_slots = np.ascontiguousarray(row_slots, dtype=np.int32)
        row_scales = np.ascontiguousarray(row_scales, dtype=np.float32)
        _check(row_slots, row_scales, pages, max_slots, max_pages)
        _check_vectors(vectors, pages)
        used = [slot for slot in np.unique(row_slots).tolist() if slot >= 0]
        limits, vector_limits = (
            tuple(max((page + 1 for slot in used for page in table[slot]), default=0) for table in tables)
            for tables in (pages, vectors)
        )
        vector_limits = vector_limits or (0,) * len(pages)
        device = torch.device(device)
        form = form_of(device) if form is None else form
        step = form.prepare(
            row_slots,
            row_scales,
            pages,
            max_slots,
            max_pages,
            device,
            vectors,
            [limit > 0 for limit in vector_limits],
        )
        return cls(len(row_slots), limits, vector_limits, device, form, step)

    @classmethod
    def blank(
        cls,
        num_rows: int,
        page_limits: Sequence[int],
        max_slots: int,
        max_pages: int,
        device: torch.device | str,
        form: LoraForm[Any] | None = None,
        vector_limits: Sequence[int] = (),
    ) -> Mix:
        """Prepare a step in which no row has an adapter, for a graph that is captured with it: it can
        become any mix.

        The vendor's products of a long step of one adapter are never part of it: no row has an adapter now,
        and what is copied later is what the kernels read.

        Args:
            num_rows: T.
            page_limits: the pages of the pool, for each kind, so that no kind is left out whatever is copied.
            max_slots: as of `build`.
            max_pages: as of `build`.
            device: as of `build`.
            form: as of `build`.
            vector_limits: the pages of vectors of the pool, for each kind; empty: no mix with vectors is
                ever copied.
        """
        device = torch.device(device)
        form = form_of(device) if form is None else form
        nobody, scales = np.full(num_rows, -1, dtype=np.int32), np.zeros(num_rows, dtype=np.float32)
        tables: list[PageTable] = [[]] * len(page_limits)
        vector_limits = tuple(vector_limits) or (0,) * len(page_limits)
        step = form.prepare(
            nobody,
            scales,
            tables,
            max_slots,
            max_pages,
            device,
            [],
            [limit > 0 for limit in vector_limits],
        )
        return cls(num_rows, tuple(page_limits), vector_limits, device, form, step)

    def copy_from(self, other: Mix) -> None:
        """Become another step's mix, in place: a graph captured with this one then serves it.

        Raises:
            ValueError: a mix of another form, of other shapes or of pages that this one does not cover, or a
                form whose steps cannot be changed.
        """
        if other.form is not self.form:
            raise ValueError(
                f"mix: asked to copy one of {type(other.form).__name__}, allowed {type(self.form).__name__}"
            )
        for what, mine, theirs in (
            ("pages", self.page_limits, other.page_limits),
            ("pages of vectors", self.vector_limits, other.vector_limits),
        ):
            if len(mine) != len(theirs) or any(t > m for m, t in zip(mine, theirs, strict=True)):
                raise ValueError(
                    f"mix: asked to copy one of {what} below {theirs} by kind, allowed below {mine}"
                )
        self.step.copy_from(other.step)


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


def _check_vectors(vectors: Sequence[PageTable], pages: Sequence[PageTable]) -> None:
    if vectors and [len(table) for table in vectors] != [len(table) for table in pages]:
        raise ValueError(
            f"vectors: found {[len(table) for table in vectors]} slots by kind, allowed those of pages, "
            f"{[len(table) for table in pages]}"
        )
    for kind, table in enumerate(vectors):
        for slot, mine in enumerate(table):
            if len(mine) > 1 or any(page < 0 for page in mine):
                raise ValueError(
                    f"vectors of slot {slot}, kind {kind}: found {tuple(mine)}, allowed one page or none, "
                    "not negative"
                )
