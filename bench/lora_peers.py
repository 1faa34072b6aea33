"""Other ways to add the adapters' terms of a step, for `kernels_gpu.py` to measure beside ours.

Shape key: T rows, D adapters, M_d rows of one of them, S linears, K inputs, R highest rank.

Each peer is given what it needs beforehand, sorted and gathered: only its products and its sums are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from manylora_kernels import SitePool


@dataclass(frozen=True)
class Step:
    """The rows of a step by adapter."""

    rows: tuple[torch.Tensor, ...]
    """Of each adapter, its rows: [M_d], int64."""
    scales: torch.Tensor
    """[T, 1], in the dtype of the products."""
    pages: Sequence[Sequence[int]]
    """Of each adapter."""


def per_adapter(y: torch.Tensor, x: torch.Tensor, pool: SitePool, step: Step) -> Callable[[], None]:
    """Two products of the vendor's library for each adapter and linear."""
    weights = []
    for rows, pages in zip(step.rows, step.pages, strict=True):
        a = pool.a[list(pages)].transpose(0, 1).flatten(1, 2)  # [S, R, K]
        b = pool.b[list(pages)].flatten(0, 1).split(list(pool.widths), dim=1)
        weights.append((rows, a.flatten(0, 1).t().contiguous(), [part.contiguous() for part in b]))

    def run() -> None:
        for rows, a, b in weights:
            h = (x[rows] @ a) * step.scales[rows]
            parts = h.chunk(len(b), dim=1)
            y.index_add_(
                0, rows, torch.cat([part @ mine for part, mine in zip(parts, b, strict=True)], dim=1)
            )

    return run


def grouped(y: torch.Tensor, x: torch.Tensor, pool: SitePool, step: Step) -> Callable[[], None]:
    """`torch.nn.functional.grouped_mm`, adapters padded to the highest rank."""
    most = max(len(pages) for pages in step.pages)
    num_linears, num_adapters = len(pool.widths), len(step.rows)
    a = pool.a.new_zeros(num_adapters, num_linears, most * 16, pool.num_inputs)
    b = pool.b.new_zeros(num_adapters, most * 16, pool.num_outputs)
    for d, pages in enumerate(step.pages):
        a[d, :, : 16 * len(pages)] = pool.a[list(pages)].transpose(0, 1).flatten(1, 2)
        b[d, : 16 * len(pages)] = pool.b[list(pages)].flatten(0, 1)
    a = a.flatten(1, 2).transpose(1, 2)  # [D, K, S * R], as its products want it
    parts = [part.contiguous() for part in b.split(list(pool.widths), dim=2)]
    order = torch.cat(list(step.rows))
    sizes = torch.tensor([len(rows) for rows in step.rows])
    ends = sizes.cumsum(0).to(device=x.device, dtype=torch.int32)

    def run() -> None:
        h = F.grouped_mm(x[order], a, offs=ends) * step.scales[order]
        terms = [
            F.grouped_mm(part.contiguous(), mine, offs=ends)
            for part, mine in zip(h.chunk(num_linears, dim=1), parts, strict=True)
        ]
        y.index_add_(0, order, torch.cat(terms, dim=1))

    return run


PEERS = {"per-adapter products": per_adapter, "grouped_mm": grouped}


def available(name: str, dtype: torch.dtype) -> bool:
    """Whether a peer can be run here; grouped_mm is there from torch 2.10 on, for bfloat16."""
    return name != "grouped_mm" or (hasattr(F, "grouped_mm") and dtype == torch.bfloat16)
