"""The entries: check the arguments and choose the form for the device.

Shape key: T rows, S linears of a site, P pages, K inputs, N outputs of all S.

`add_lora` is the whole term of a site. On CUDA its halves can be had one by one, so that `shrink_lora` runs
on a stream of its own beside the base product and `expand_lora` behind both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from manylora_kernels import compiled
from manylora_kernels.lora import cpu
from manylora_kernels.lora.mix import Mix
from manylora_kernels.lora.pool import SitePool
from manylora_kernels.shapes import ServedShapes

if TYPE_CHECKING:
    from manylora_kernels.lora.routed import RoutedMix


def add_lora(y: torch.Tensor, x: torch.Tensor, pool: SitePool, mix: Mix, kind: int) -> None:
    """Add the adapters' term of one site in place.

    `y[t, s] += scale[t] * (x[t] A_s^T) B_s^T`, A and B of the adapter of row t. A row without an adapter, or
    whose adapter has no pages in this kind, is neither read nor written.

    Args:
        y: [T, N], rows may be further apart than N.
        x: [T, K], rows may be further apart than K.
        pool: the site's pages; its dtype may differ from that of x and y.
        mix: built for these T rows and this device; it chooses the form.
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
        from manylora_kernels.lora import gpu  # imports triton, which a CPU does without

        gpu.add_lora(y, x, pool, mix.routed, kind)


def shrink_lora(x: torch.Tensor, pool: SitePool, mix: Mix, kind: int) -> torch.Tensor:
    """Compute the first half of `add_lora` on the current stream: what `expand_lora` takes.

    Waits for nothing but x and the mix: whoever runs it on another stream than the one that made these, or
    than the one that runs the second half, puts the events between them. CUDA only; on a CPU the halves are
    one.

    Args:
        x: [T, K], rows may be further apart than K.
        pool: the site's pages.
        mix: built for these T rows and this device.
        kind: the kind of the site.

    Returns:
        h, in the kernels' own form.

    Raises:
        ValueError: as of `add_lora`; a mix for a CPU.
    """
    check_x(x, pool, mix, kind)
    routed = _routed(mix, "shrink_lora")
    if routed is None or not mix.page_limits[kind]:
        return x.new_empty(0, dtype=torch.float32)
    from manylora_kernels.lora import gpu  # imports triton, which a CPU does without

    return gpu.shrink_lora(x, pool, routed, kind)


def expand_lora(y: torch.Tensor, h: torch.Tensor, pool: SitePool, mix: Mix, kind: int) -> None:
    """Compute the second half of `add_lora` in place, on the current stream.

    The same bits as `add_lora`, unless that takes the vendor's products for a long step of one adapter.

    Args:
        y: [T, N], rows may be further apart than N.
        h: from `shrink_lora`, of the same pool, mix and kind.
        pool: the site's pages.
        mix: built for these T rows and this device.
        kind: the kind of the site.

    Raises:
        ValueError: as of `add_lora`; a mix for a CPU.
    """
    check_rows("y", y, pool.num_outputs, pool, mix)
    routed = _routed(mix, "expand_lora")
    if routed is not None and mix.page_limits[kind]:
        from manylora_kernels.lora import gpu  # imports triton, which a CPU does without

        gpu.expand_lora(y, h, pool, routed, kind)


def add_lora_silu_mul(
    out: torch.Tensor, y: torch.Tensor, x: torch.Tensor, pool: SitePool, mix: Mix, kind: int
) -> None:
    """Add the adapters' term to a gate/up site and compute the activation behind it.

    `out = silu(gate + lora_gate) * (up + lora_up)` with `gate, up = y[:, :N // 2], y[:, N // 2:]`. Rows
    without an adapter have a term of zero. On CUDA sums and activation are in float32 and rounded once, and y
    is left as it was; on a CPU the term is added to y first.

    Args:
        out: [T, N / 2]; every row is written.
        y: [T, N], the base product.
        x: [T, K].
        pool: the site's pages: two linears of one width.
        mix: built for these T rows and this device.
        kind: the kind of the site.

    Raises:
        ValueError: as of `add_lora`; a site that is not two linears of one width.
    """
    check_gate_up(pool)
    _check(y, x, pool, mix, kind)
    check_rows("out", out, pool.widths[0], pool, mix)
    if mix.routed is not None and mix.page_limits[kind]:
        from manylora_kernels.lora import gpu  # imports triton, which a CPU does without

        gpu.add_lora_silu_mul(out, y, x, pool, mix.routed, kind)
        return
    add_lora(y, x, pool, mix, kind)
    if y.device.type != "cpu":
        from manylora_kernels.lora import gpu  # imports triton, which a CPU does without

        gpu.silu_mul(out, y)
        return
    gate, up = torch.split(y, list(pool.widths), dim=1)
    torch.mul(torch.nn.functional.silu(gate), up, out=out)


def warmup(device: torch.device | str, shapes: ServedShapes | None = None) -> None:
    """Make what `add_lora` needs on a device, so that no step waits for it.

    On a CPU the compiled form; on CUDA every kernel that steps of these shapes use.

    Args:
        device: where `add_lora` will run.
        shapes: the server's steps; without them a GPU's kernels are compiled when they are first used.
    """
    if torch.device(device).type == "cpu":
        compiled.library()
    elif shapes is not None:
        from manylora_kernels.lora.precompile import precompile  # imports triton, which a CPU does without

        precompile(torch.device(device), shapes)


def _check(y: torch.Tensor, x: torch.Tensor, pool: SitePool, mix: Mix, kind: int) -> None:
    check_x(x, pool, mix, kind)
    check_rows("y", y, pool.num_outputs, pool, mix)


def check_gate_up(pool: SitePool) -> None:
    """
    Raises:
        ValueError: a site that is not two linears of one width.
    """
    if not pool.shape.is_gate_up:
        raise ValueError(f"widths: found {list(pool.widths)}, allowed two that are equal")


def check_x(x: torch.Tensor, pool: SitePool, mix: Mix, kind: int) -> None:
    """
    Raises:
        ValueError: what `add_lora` refuses of all but y.
    """
    if not 0 <= kind < len(mix.page_limits):
        raise ValueError(f"kind: asked for {kind}, the mix has 0 .. {len(mix.page_limits) - 1}")
    check_rows("x", x, pool.num_inputs, pool, mix)
    if mix.page_limits[kind] > pool.a.shape[0]:
        raise ValueError(
            f"pages: the mix uses page {mix.page_limits[kind] - 1}, the pool has {pool.a.shape[0]}"
        )
    where = "cpu" if mix.routed is None else mix.routed.packed.device.type
    if not mix.is_empty and where != x.device.type:
        raise ValueError(f"mix: found one built for {where}, x is on {x.device}")


def check_rows(name: str, rows: torch.Tensor, num_columns: int, pool: SitePool, mix: Mix) -> None:
    """
    Raises:
        ValueError: a tensor that is not [T, num_columns] of the pool's device with contiguous columns.
    """
    if rows.shape != (mix.num_rows, num_columns):
        raise ValueError(f"{name}: found {list(rows.shape)}, allowed [{mix.num_rows}, {num_columns}]")
    if rows.stride(1) != 1:
        raise ValueError(f"{name}: found column stride {rows.stride(1)}, allowed 1")
    if rows.device != pool.a.device:
        raise ValueError(f"{name}: found on {rows.device}, allowed {pool.a.device}, where the pool is")


def _routed(mix: Mix, asked: str) -> RoutedMix | None:
    if mix.routed is None and not mix.is_empty:
        raise ValueError(f"{asked}: found a mix built for a CPU, allowed one for CUDA: use add_lora")
    return mix.routed
