"""A site's base product together with its adapters' term: what a model's layer calls.

Shape key: T rows, K inputs, N outputs of all linears of the site.

On CUDA the base product of a decode-sized step and the first half of the adapters' term run at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from manylora_kernels.lora import entries as lora
from manylora_kernels.lora.mix import Mix
from manylora_kernels.lora.pool import SitePool

Product: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""x [T, K] -> x W^T + bias, [T, N], of all linears of a site: memory of its own, which may be changed."""


def linear_lora(x: torch.Tensor, product: Product, pool: SitePool, mix: Mix, kind: int) -> torch.Tensor:
    """Compute `y = product(x)` and `y[t, s] += scale[t] * (x[t] A_s^T) B_s^T`, as `add_lora` says.

    The same bits as `product` and `add_lora` one after the other. On CUDA shrink runs on a stream of its own
    beside the product in steps of up to `gpu.MAX_ROWS_BESIDE` rows; in longer ones it is chained to expand.

    Args:
        x: [T, K], rows may be further apart than K.
        product: the base linears, run on the current stream.
        pool: the site's pages.
        mix: built for these T rows and this device.
        kind: the kind of the site.

    Returns:
        [T, N].

    Raises:
        ValueError: as of `add_lora`.
    """
    if mix.routed is None or not _has_pages(mix, kind):
        y = product(x)
        lora.add_lora(y, x, pool, mix, kind)
        return y
    lora.check_x(x, pool, mix, kind)
    from manylora_kernels.lora import gpu  # imports triton, which a CPU does without

    return gpu.linear_lora(x, _checked(product, pool, mix), pool, mix.routed, kind)


def gate_up_lora(x: torch.Tensor, product: Product, pool: SitePool, mix: Mix, kind: int) -> torch.Tensor:
    """Compute a gate/up site with the adapters' term and the activation behind it.

    `silu(gate + lora_gate) * (up + lora_up)` with `y = product(x); gate, up = y[:, :N // 2], y[:, N // 2:]`,
    the same bits as `product` and `add_lora_silu_mul`. A row without an adapter gets the bits of `silu_mul`.

    Args:
        x: [T, K], rows may be further apart than K.
        product: gate and up side by side, run on the current stream.
        pool: the site's pages: two linears of one width.
        mix: built for these T rows and this device.
        kind: the kind of the site.

    Returns:
        [T, N / 2].

    Raises:
        ValueError: as of `add_lora`; a site that is not two linears of one width.
    """
    lora.check_gate_up(pool)
    if mix.routed is None or not _has_pages(mix, kind):
        y = product(x)
        lora.add_lora(y, x, pool, mix, kind)
        return silu_mul(y)
    lora.check_x(x, pool, mix, kind)
    from manylora_kernels.lora import gpu  # imports triton, which a CPU does without

    return gpu.gate_up_lora(x, _checked(product, pool, mix), pool, mix.routed, kind)


def silu_mul(y: torch.Tensor) -> torch.Tensor:
    """Compute a gate/up site's activation in a step without adapters.

    `silu(gate) * up` with `gate, up = y[:, :N // 2], y[:, N // 2:]`.

    On CUDA in float32 and rounded once, one launch; on a CPU torch's operators.

    Args:
        y: [T, N], N even, columns contiguous.

    Returns:
        [T, N / 2].

    Raises:
        ValueError: another shape.
    """
    if y.dim() != 2 or y.shape[1] % 2 or y.stride(1) != 1:
        raise ValueError(
            f"y: found {list(y.shape)} with strides {y.stride()}, allowed [T, N] with N even and stride 1"
        )
    if y.device.type != "cpu":
        from manylora_kernels.lora import gpu  # imports triton, which a CPU does without

        out = y.new_empty(y.shape[0], y.shape[1] // 2)
        gpu.silu_mul(out, y)
        return out
    gate, up = y.chunk(2, dim=1)
    return torch.nn.functional.silu(gate).mul_(up)


def _has_pages(mix: Mix, kind: int) -> bool:
    return 0 <= kind < len(mix.page_limits) and mix.page_limits[kind] > 0


def _checked(product: Product, pool: SitePool, mix: Mix) -> Product:
    """The product, whose result is looked at before a kernel sees it."""

    def checked(x: torch.Tensor) -> torch.Tensor:
        y = product(x)
        lora.check_rows("y", y, pool.num_outputs, pool, mix)
        return y

    return checked
