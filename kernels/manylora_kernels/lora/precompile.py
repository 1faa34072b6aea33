"""Compile every kernel that a server's steps will use, before the first of them.

Shape key: T rows, K inputs, N outputs of all linears of a site.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from manylora_kernels.device import facts
from manylora_kernels.lora import planner
from manylora_kernels.lora.activation import silu_mul
from manylora_kernels.lora.expand import expand
from manylora_kernels.lora.expand_silu_mul import expand_silu_mul
from manylora_kernels.lora.pool import PAGE_ROWS, SitePool
from manylora_kernels.lora.routed import RoutedMix
from manylora_kernels.lora.shrink import shrink
from manylora_kernels.shapes import ServedShapes, SiteShape


def precompile(device: torch.device, shapes: ServedShapes) -> None:
    """Launch every kernel once, on steps without adapters, whose programs end at once.

    A launch rather than a compilation by signature, so that exactly what launches look up is compiled.
    """
    mixes: dict[int, RoutedMix] = {}
    for site, num_rows in _steps(device, shapes):
        if num_rows not in mixes:
            mixes[num_rows] = RoutedMix.build(
                np.full(num_rows, -1, dtype=np.int32),
                np.ones(num_rows, dtype=np.float32),
                [[]],
                shapes.max_slots,
                shapes.max_pages,
                device,
                reads_vectors=[shapes.has_vectors],
            )
        _launch(site, num_rows, mixes[num_rows], device, shapes)


def _steps(device: torch.device, shapes: ServedShapes) -> Iterator[tuple[SiteShape, int]]:
    """For each site the least number of rows that uses each of its plans."""
    for site in dict.fromkeys(shapes.sites):
        plans = planner.distinct(
            shapes.row_counts,
            site,
            shapes.max_pages,
            shapes.pool_dtype,
            facts(device),
        )
        for num_rows in plans.values():
            yield site, num_rows


def _launch(
    site: SiteShape, num_rows: int, mix: RoutedMix, device: torch.device, shapes: ServedShapes
) -> None:
    x = torch.empty(num_rows, site.num_inputs, dtype=shapes.dtype, device=device)
    y = torch.empty(num_rows, site.num_outputs, dtype=shapes.dtype, device=device)
    out = torch.empty(num_rows, site.widths[0], dtype=shapes.dtype, device=device)
    pool = _pool(site, device, shapes)
    chosen = mix.plan_for(site, shapes.pool_dtype)
    # Steps whose adapters have none read no vectors.
    options = [None, pool.vectors] if pool.vectors else [None]
    # Chained, and apart: a recorded step launches shrink on a stream of its own.
    for chained, vectors in itertools.product(sorted({False, mix.device.has_dependent_launch}), options):
        h = shrink(x, pool.a, mix, 0, chosen, chained)
        expand(y, h, pool.b, pool.widths, mix, 0, chosen, chained, vectors)
        if site.is_gate_up:
            # Of a shrink of its own: a chained launch starts before the one in front of it has ended.
            h = shrink(x, pool.a, mix, 0, chosen, chained)
            expand_silu_mul(out, y, h, pool.b, mix, 0, chosen, chained, vectors)
    if site.is_gate_up:
        silu_mul(out, y)


def _pool(site: SiteShape, device: torch.device, shapes: ServedShapes) -> SitePool:
    """A pool of one page."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=shapes.pool_dtype, device=device)

    vectors = [empty(1, site.num_outputs) for _ in range(2 if shapes.has_vectors else 0)]
    return SitePool(
        empty(1, site.num_linears, PAGE_ROWS, site.num_inputs),
        empty(1, PAGE_ROWS, site.num_outputs),
        site.widths,
        *vectors,
    )
