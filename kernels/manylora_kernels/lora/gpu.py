"""The form that serves on a GPU: two Triton kernels for each site.

Shape key: T rows, K inputs, N outputs of all linears of the site, Z splits, S linears, R rank rows.
"""

from __future__ import annotations

import torch

from manylora_kernels import streams
from manylora_kernels.lora.activation import silu_mul
from manylora_kernels.lora.expand import expand
from manylora_kernels.lora.expand_silu_mul import expand_silu_mul
from manylora_kernels.lora.plan import Plan
from manylora_kernels.lora.pool import SitePool
from manylora_kernels.lora.product import Product
from manylora_kernels.lora.routed import RoutedMix
from manylora_kernels.lora.shrink import empty_h, shrink

__all__ = [
    "add_lora",
    "add_lora_silu_mul",
    "expand_lora",
    "expand_lora_silu_mul",
    "gate_up_lora",
    "linear_lora",
    "runs_beside",
    "shrink_lora",
    "silu_mul",
]

MAX_ROWS_BESIDE = 256
"""Up to so many rows of a step, shrink runs beside the base product. So long that one waits for the weights'
bytes and leaves the arithmetic idle; beyond, both want the same multiprocessors, and a chained launch saves
more. A ratio of cards (of the order of 300 operations a byte), not measured."""


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


def runs_beside(mix: RoutedMix, device: torch.device, side: streams.Streams | None = None) -> bool:
    """Whether shrink runs beside the base product in this step: few rows, and not for the vendor's products,
    which need y. Known from T alone inside a captured graph.

    Not where the host launches one by one, unless it names the stream: fork and join cost it more than a
    chained launch costs the device.
    """
    if mix.route.num_rows > MAX_ROWS_BESIDE or mix.one_adapter is not None:
        return False
    return side is not None or device.type != "cuda" or streams.is_recorded(device)


def linear_lora(
    x: torch.Tensor,
    product: Product,
    pool: SitePool,
    mix: RoutedMix,
    kind: int,
    side: streams.Streams | None = None,
) -> torch.Tensor:
    """The base product of a site with the adapters' term.

    Args:
        x: [T, K].
        product: the base linears.
        side: where shrink runs; None: the device's side stream.

    Returns:
        [T, N].
    """
    if not runs_beside(mix, x.device, side):
        y = product(x)
        add_lora(y, x, pool, mix, kind)
        return y
    chosen = mix.plan_for(pool.shape, pool.a.dtype)
    y, h = _product_and_shrink(x, product, pool, mix, kind, chosen, side)
    expand(y, h, pool.b, pool.widths, mix, kind, chosen)
    return y


def gate_up_lora(
    x: torch.Tensor,
    product: Product,
    pool: SitePool,
    mix: RoutedMix,
    kind: int,
    side: streams.Streams | None = None,
) -> torch.Tensor:
    """The same of a gate/up site, with the activation behind it: [T, N / 2]."""
    if runs_beside(mix, x.device, side):
        chosen = mix.plan_for(pool.shape, pool.a.dtype)
        y, h = _product_and_shrink(x, product, pool, mix, kind, chosen, side)
        out = y.new_empty(y.shape[0], pool.widths[0])
        expand_silu_mul(out, y, h, pool.b, mix, kind, chosen)
        return out
    y = product(x)
    out = y.new_empty(y.shape[0], pool.widths[0])
    add_lora_silu_mul(out, y, x, pool, mix, kind)
    return out


def _product_and_shrink(
    x: torch.Tensor,
    product: Product,
    pool: SitePool,
    mix: RoutedMix,
    kind: int,
    plan: Plan,
    side: streams.Streams | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    h = empty_h(x.shape[0], len(pool.widths), mix, plan)
    y = streams.run_beside(
        streams.side_stream(x.device) if side is None else side,
        side_work=lambda: shrink(x, pool.a, mix, kind, plan, out=h),
        main_work=lambda: product(x),
    )
    return y, h
