"""The one entry: checks the arguments and chooses the form for the device.

Shape key: T rows, S linears of a site, P pages, K inputs, N outputs of all S.
"""

from __future__ import annotations

import torch

from manylora_kernels import compiled, cpu
from manylora_kernels.mix import Mix
from manylora_kernels.pool import SitePool


def add_lora(y: torch.Tensor, x: torch.Tensor, pool: SitePool, mix: Mix, kind: int) -> None:
    """Add the adapters' term of one site in place.

    `y[t, s] += scale[t] * (x[t] A_s^T) B_s^T`, A and B of the adapter of row t. A row without an adapter, or
    whose adapter has no pages in this kind, is neither read nor written.

    Args:
        y: [T, N], rows may be further apart than N.
        x: [T, K], rows may be further apart than K.
        pool: the site's pages; its dtype may differ from that of x and y.
        mix: built for these T rows and this device.
        kind: the kind of the site, an index into the mix's pages.

    Raises:
        ValueError: shapes, strides, devices or pages that do not belong together.
    """
    _check(y, x, pool, mix, kind)
    if not mix.page_limits[kind]:
        return
    if mix.routed is None:
        cpu.add_lora(y, x, pool, mix.rows[kind])
    else:
        from manylora_kernels import gpu  # imports triton, which a CPU does without

        gpu.add_lora(y, x, pool, mix.routed, kind)


def warmup(device: torch.device | str) -> None:
    """Make what `add_lora` needs on a device, so that no step waits for it: on a CPU, the compiled form."""
    if torch.device(device).type == "cpu":
        compiled.library()


def _check(y: torch.Tensor, x: torch.Tensor, pool: SitePool, mix: Mix, kind: int) -> None:
    if not 0 <= kind < len(mix.page_limits):
        raise ValueError(f"kind: asked for {kind}, the mix has 0 .. {len(mix.page_limits) - 1}")
    if x.shape != (mix.num_rows, pool.num_inputs):
        raise ValueError(f"x: found {list(x.shape)}, allowed [{mix.num_rows}, {pool.num_inputs}]")
    if y.shape != (mix.num_rows, pool.num_outputs):
        raise ValueError(f"y: found {list(y.shape)}, allowed [{mix.num_rows}, {pool.num_outputs}]")
    if x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(f"x and y: found column strides {x.stride(1)} and {y.stride(1)}, allowed 1 and 1")
    if not x.device == y.device == pool.a.device:
        raise ValueError(f"devices: found x {x.device}, y {y.device}, pool {pool.a.device}, allowed the same")
    if mix.page_limits[kind] > pool.a.shape[0]:
        raise ValueError(
            f"pages: the mix uses page {mix.page_limits[kind] - 1}, the pool has {pool.a.shape[0]}"
        )
    if not mix.is_empty and (mix.routed is None) != (x.device.type == "cpu"):
        raise ValueError(
            f"mix: found one built for {'a CPU' if mix.routed is None else 'CUDA'}, x is on {x.device}"
        )
