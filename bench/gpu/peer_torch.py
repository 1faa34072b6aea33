"""Products of the vendor's library as peers: one pair for each adapter, and torch's grouped product.

Shape key: T rows, D adapters, S linears of a site, K inputs, R highest rank.

Each is given what it needs beforehand, sorted and padded: only its products and its sums are measured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from manylora_kernels import SitePool

from gpu.clock import Run
from gpu.peer_modules import Missing
from gpu.scene import SCALE, Scene, Term


def _rows(scene: Scene) -> list[torch.Tensor]:
    """Of each adapter its rows, int64."""
    slots = torch.from_numpy(scene.slots)
    return [torch.nonzero(slots == d).flatten().to(scene.device) for d in range(scene.point.num_adapters)]


def per_adapter(scene: Scene) -> Term:
    """Two products for each adapter and linear."""
    rows_of = _rows(scene)

    def build(y: torch.Tensor, x: torch.Tensor, pool: SitePool) -> Run:
        weights = []
        for d, rows in enumerate(rows_of):
            a = scene.stacked_a(pool, d).flatten(0, 1).t().contiguous()  # [K, S * r]
            b = [part.contiguous() for part in scene.stacked_b(pool, d).split(list(pool.widths), dim=1)]
            weights.append((rows, a, b))

        def run() -> None:
            for rows, a, b in weights:
                parts = ((x[rows] @ a) * SCALE).chunk(len(b), dim=1)
                term = torch.cat([part @ mine for part, mine in zip(parts, b, strict=True)], dim=1)
                y.index_add_(0, rows, term)

        return run

    return build


def grouped(scene: Scene) -> Term:
    """`torch.nn.functional.grouped_mm`, adapters padded to the highest rank.

    Raises:
        Missing: torch is older than 2.10, or a dtype that it does not serve.
    """
    if not hasattr(F, "grouped_mm"):
        raise Missing(f"torch {torch.__version__} has no grouped_mm")
    if scene.dtype != torch.bfloat16:
        raise Missing(f"serves bfloat16 only, not {scene.dtype}")
    rows_of, num_adapters = _rows(scene), scene.point.num_adapters
    order = torch.cat(rows_of)
    ends = torch.tensor([len(rows) for rows in rows_of]).cumsum(0).to(scene.device, torch.int32)
    rank = -(-max(scene.ranks()) // 16) * 16

    def build(y: torch.Tensor, x: torch.Tensor, pool: SitePool) -> Run:
        num_linears = len(pool.widths)
        a = pool.a.new_zeros(num_adapters, num_linears, rank, pool.num_inputs)
        b = pool.b.new_zeros(num_adapters, rank, pool.num_outputs)
        for d in range(num_adapters):
            a[d, :, : scene.point.rank(d)] = scene.stacked_a(pool, d)
            b[d, : scene.point.rank(d)] = scene.stacked_b(pool, d)
        a = a.flatten(1, 2).transpose(1, 2)  # [D, K, S * R], as its products want it
        parts_of_b = [part.contiguous() for part in b.split(list(pool.widths), dim=2)]

        def run() -> None:
            h = F.grouped_mm(x[order], a, offs=ends) * SCALE
            terms = [
                F.grouped_mm(part.contiguous(), mine, offs=ends)
                for part, mine in zip(h.chunk(num_linears, dim=1), parts_of_b, strict=True)
            ]
            y.index_add_(0, order, torch.cat(terms, dim=1))

        return run

    return build
