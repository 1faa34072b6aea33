"""Products of the vendor's library as peers: one pair for each adapter, and torch's grouped product.

Shape key: T rows, D adapters, S linears of a site, K inputs, R highest rank.

Each is given what it needs beforehand, sorted and padded: only its products and its sums are measured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from manylora_kernels import SitePool

from bench.gpu.clock import Run
from bench.gpu.peer_modules import Missing
from bench.gpu.scene import SCALE, Scene, Term


def _rows(scene: Scene) -> list[torch.Tensor]:
    """Of each adapter its rows, int64."""
    slots = torch.from_numpy(scene.slots)
    return [torch.nonzero(slots == d).flatten().to(scene.device) for d in range(scene.point.num_adapters)]


def _run_of(rows: torch.Tensor) -> slice | None:
    """The rows as a slice, if they are one run: then nothing is gathered and nothing scattered."""
    found = rows.tolist()
    if not found or found != list(range(found[0], found[0] + len(found))):
        return None
    return slice(found[0], found[0] + len(found))


def per_adapter(scene: Scene) -> Term:
    """Two products for each adapter and linear, the second adding into y where the adapter's rows are one
    run; the scale is in B."""
    rows_of = [(rows, _run_of(rows)) for rows in _rows(scene)]

    def build(y: torch.Tensor, x: torch.Tensor, pool: SitePool) -> Run:
        weights = []
        for d, (rows, one_run) in enumerate(rows_of):
            a = scene.stacked_a(pool, d).flatten(0, 1).t().contiguous()  # [K, S * r]
            scaled = scene.stacked_b(pool, d) * SCALE
            b = [part.contiguous() for part in scaled.split(list(pool.widths), dim=1)]
            parts_of_y = [] if one_run is None else list(y[one_run].split(list(pool.widths), dim=1))
            weights.append((rows if one_run is None else one_run, parts_of_y, a, b))

        def run() -> None:
            for rows, parts_of_y, a, b in weights:
                parts = (x[rows] @ a).chunk(len(b), dim=1)
                if parts_of_y:
                    for y_part, part, mine in zip(parts_of_y, parts, b, strict=True):
                        y_part.addmm_(part, mine)
                else:
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
    one_run = _run_of(order)
    ends = torch.tensor([len(rows) for rows in rows_of]).cumsum(0).to(scene.device, torch.int32)
    rank = -(-max(scene.ranks()) // 16) * 16

    def build(y: torch.Tensor, x: torch.Tensor, pool: SitePool) -> Run:
        num_linears = len(pool.widths)
        a = pool.a.new_zeros(num_adapters, num_linears, rank, pool.num_inputs)
        b = pool.b.new_zeros(num_adapters, rank, pool.num_outputs)
        for d in range(num_adapters):
            a[d, :, : scene.point.rank(d)] = scene.stacked_a(pool, d)
            b[d, : scene.point.rank(d)] = scene.stacked_b(pool, d) * SCALE
        a = a.flatten(1, 2).transpose(1, 2)  # [D, K, S * R], as its products want it
        parts_of_b = [part.contiguous() for part in b.split(list(pool.widths), dim=2)]

        def run() -> None:
            h = F.grouped_mm(x[order if one_run is None else one_run], a, offs=ends)
            terms = [
                F.grouped_mm(part.contiguous(), mine, offs=ends)
                for part, mine in zip(h.chunk(num_linears, dim=1), parts_of_b, strict=True)
            ]
            if one_run is None:
                y.index_add_(0, order, torch.cat(terms, dim=1))
            else:
                for y_part, term in zip(y[one_run].split(list(pool.widths), dim=1), terms, strict=True):
                    y_part.add_(term)

        return run

    return build
