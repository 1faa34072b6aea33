"""A long step of a single adapter: the vendor's matrix products on gathered pages.

Shape key: M rows of the adapter, P pages, S linears, K inputs, N outputs of all S.

With one adapter there is nothing to sort, and the vendor's library is at its best with two plain products per
site. This is chosen when the mix is built, from what the host knows, and never inside a captured graph, which
must serve any mix. It gives the same bits in every run, which differ from the kernels'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from manylora_kernels.lora.pool import PAGE_ROWS, SitePool
from manylora_kernels.streams import is_recorded
from manylora_kernels.upload import upload


@dataclass(frozen=True, slots=True)
class OneAdapter:
    """The only adapter of a step."""

    rows: slice
    """Its rows, one after the other."""
    scale: float
    """Of all its rows."""
    pages: tuple[torch.Tensor | None, ...]
    """For each kind its pages on the device, int64; None where it has none."""
    vectors: tuple[int | None, ...]
    """For each kind the page of its vectors; None where it has none."""

    @classmethod
    def of(
        cls,
        row_slots: npt.NDArray[np.int32],
        row_scales: npt.NDArray[np.float32],
        pages: Sequence[Sequence[Sequence[int]]],
        min_rows: int,
        device: torch.device,
        vectors: Sequence[Sequence[Sequence[int]]] = (),
    ) -> OneAdapter | None:
        """The only adapter of a step, if it has `min_rows` rows in one run and of one scale, else None."""
        rows = np.flatnonzero(row_slots >= 0)
        if len(rows) < min_rows or len(rows) != rows[-1] - rows[0] + 1:
            return None
        mine = slice(int(rows[0]), int(rows[-1]) + 1)
        slot, scale = int(row_slots[mine.start]), float(row_scales[mine.start])
        if (row_slots[mine] != slot).any() or (row_scales[mine] != scale).any():
            return None
        tables: dict[tuple[int, ...], torch.Tensor | None] = {(): None}
        for table in pages:
            key = tuple(table[slot])
            if key not in tables:
                tables[key] = upload(np.array(key, dtype=np.int64), device)
        mine_of_kinds = [table[slot] for table in vectors] or [()] * len(pages)
        return cls(
            mine,
            scale,
            tuple(tables[tuple(table[slot])] for table in pages),
            tuple(found[0] if found else None for found in mine_of_kinds),
        )

    def serves(self, y: torch.Tensor, x: torch.Tensor, pool: SitePool) -> bool:
        """Whether this may be used now: one dtype throughout, and nothing is recorded."""
        return x.dtype == y.dtype == pool.a.dtype and not is_recorded(x.device)

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, pool: SitePool, kind: int) -> None:
        """Add the adapter's term of one site in place, as `manylora_kernels.add_lora` says."""
        pages, vector = self.pages[kind], self.vectors[kind]
        if pages is not None:
            self._add_term(y, x, pool, pages)
        if vector is not None:
            assert pool.vectors is not None, "the step has vectors, the pool has none"
            rows = y[self.rows]
            torch.addcmul(pool.vectors.offset[vector], rows, pool.vectors.scale[vector], out=rows)

    def _add_term(self, y: torch.Tensor, x: torch.Tensor, pool: SitePool, pages: torch.Tensor) -> None:
        num_ranks = len(pages) * PAGE_ROWS
        a = pool.a[pages].transpose(0, 1).reshape(-1, pool.num_inputs)  # [S * R, K]
        b = pool.b[pages].reshape(num_ranks, pool.num_outputs)
        h = x[self.rows] @ a.t()  # [M, S * R]
        parts = zip(
            torch.split(y[self.rows], list(pool.widths), dim=1),
            torch.split(h, num_ranks, dim=1),
            torch.split(b, list(pool.widths), dim=1),
            strict=True,
        )
        for y_part, h_part, b_part in parts:
            y_part.addmm_(h_part, b_part, alpha=self.scale)
