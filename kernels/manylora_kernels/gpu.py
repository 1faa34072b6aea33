"""The form that serves on a GPU: two Triton kernels for each site.

Shape key: T rows, K inputs, N outputs of all linears of the site, Z splits, S linears, R rank rows.
"""

from __future__ import annotations

import torch

from manylora_kernels.expand import expand
from manylora_kernels.expand_silu_mul import expand_silu_mul
from manylora_kernels.pool import SitePool
from manylora_kernels.routed import RoutedMix
from manylora_kernels.shrink import shrink


def add_lora(y: torch.Tensor, x: torch.Tensor, pool: SitePool, mix: RoutedMix, kind: int) -> None:
    """Add the adapters' term of one site in place, as `manylora_kernels.add_lora` says, which checks the
    arguments."""
    if mix.one_adapter is not None and mix.one_adapter.serves(y, x, pool):
        mix.one_adapter.add_lora(y, x, pool, kind)
        return
    chosen = mix.plan_for(pool.shape, pool.a.dtype)
    chained = mix.device.has_dependent_launch
    h = shrink(x, pool.a, mix, kind, chosen, chained)
    expand(y, h, pool.b, pool.widths, mix, kind, chosen, chained)


def shrink_lora(x: torch.Tensor, pool: SitePool, mix: RoutedMix, kind: int) -> torch.Tensor:
    """The first half by itself, on whatever stream is current: [Z, T, S, R], float32."""
    return shrink(x, pool.a, mix, kind, mix.plan_for(pool.shape, pool.a.dtype))


def expand_lora(y: torch.Tensor, h: torch.Tensor, pool: SitePool, mix: RoutedMix, kind: int) -> None:
    """The second half by itself."""
    expand(y, h, pool.b, pool.widths, mix, kind, mix.plan_for(pool.shape, pool.a.dtype))


def add_lora_silu_mul(
    out: torch.Tensor, y: torch.Tensor, x: torch.Tensor, pool: SitePool, mix: RoutedMix, kind: int
) -> None:
    """A gate/up site and the activation behind it."""
    chosen = mix.plan_for(pool.shape, pool.a.dtype)
    chained = mix.device.has_dependent_launch
    h = shrink(x, pool.a, mix, kind, chosen, chained)
    expand_silu_mul(out, y, h, pool.b, mix, kind, chosen, chained)


def expand_lora_silu_mul(
    out: torch.Tensor, y: torch.Tensor, h: torch.Tensor, pool: SitePool, mix: RoutedMix, kind: int
) -> None:
    """The second half of that, for a shrink that ran beside the base product."""
    expand_silu_mul(out, y, h, pool.b, mix, kind, mix.plan_for(pool.shape, pool.a.dtype))
