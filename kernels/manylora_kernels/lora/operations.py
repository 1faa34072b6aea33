"""What callers use: the adapters' term of a site, by itself and together with the base product.

Shape key: T rows, S linears of a site, P pages, K inputs, N outputs of all S.

Arguments are checked here; what computes is the form that the mix was built for (`form.py`).
"""

from __future__ import annotations

import torch

from manylora_kernels.lora.device_form import form_of
from manylora_kernels.lora.form import Product
from manylora_kernels.lora.mix import Mix
from manylora_kernels.lora.pool import SitePool
from manylora_kernels.shapes import ServedShapes


def add_lora(y: torch.Tensor, x: torch.Tensor, pool: SitePool, mix: Mix, kind: int) -> None:
    """Add the adapters' term of one site in place.

    `y[t, s] += scale[t] * (x[t] A_s^T) B_s^T`, A and B of the adapter of row t. A row whose adapter has
    vectors in this kind then becomes `y[t] * scale_v + offset_v`. A row without an adapter, or whose adapter
    has nothing in this kind, is neither read nor written.

    Args:
        y: [T, N], rows may be further apart than N.
        x: [T, K], rows may be further apart than K.
        pool: the site's pages; its dtype may differ from that of x and y.
        mix: built for these T rows and this device; it has the form that computes.
        kind: the kind of the site, an index into the mix's pages.

    Raises:
        ValueError: shapes, strides, devices or pages that do not belong together.
    """
    _check_x(x, pool, mix, kind)
    _check_rows("y", y, pool.num_outputs, pool, mix)
    if mix.is_used_at(kind):
        mix.form.add_lora(y, x, pool, mix.step, kind)


def add_lora_silu_mul(
    out: torch.Tensor, y: torch.Tensor, x: torch.Tensor, pool: SitePool, mix: Mix, kind: int
) -> None:
    """Add the adapters' term to a gate/up site and compute the activation behind it.

    `out = silu(gate + lora_gate) * (up + lora_up)` with `gate, up = y[:, :N // 2], y[:, N // 2:]`. Rows
    without an adapter have a term of zero; vectors come before the activation. On CUDA sums and activation
    are in float32 and rounded once, and y
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
    _check_gate_up(pool)
    _check_x(x, pool, mix, kind)
    _check_rows("y", y, pool.num_outputs, pool, mix)
    _check_rows("out", out, pool.widths[0], pool, mix)
    if mix.is_used_at(kind):
        mix.form.add_lora_silu_mul(out, y, x, pool, mix.step, kind)
    else:
        mix.form.silu_mul(y, out)


def linear_lora(x: torch.Tensor, product: Product, pool: SitePool, mix: Mix, kind: int) -> torch.Tensor:
    """Compute `y = product(x)` and `y[t, s] += scale[t] * (x[t] A_s^T) B_s^T`, as `add_lora` says.

    The same bits as `product` and `add_lora` one after the other. On CUDA shrink runs on a stream of its own
    beside the product in recorded steps of few rows; in others it is chained to expand.

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
    _check_x(x, pool, mix, kind)
    product = _checked(product, pool, mix)
    if not mix.is_used_at(kind):
        return product(x)
    return mix.form.linear_lora(x, product, pool, mix.step, kind)


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
    _check_gate_up(pool)
    _check_x(x, pool, mix, kind)
    product = _checked(product, pool, mix)
    if not mix.is_used_at(kind):
        return mix.form.silu_mul(product(x))
    return mix.form.gate_up_lora(x, product, pool, mix.step, kind)


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
    return form_of(y.device).silu_mul(y)


def warmup(device: torch.device | str, shapes: ServedShapes | None = None) -> None:
    """Make what these operations need on a device, so that no step waits for it.

    On a CPU the compiled form; on CUDA every kernel that steps of these shapes use.

    Args:
        device: where they will run.
        shapes: the server's steps; without them a GPU's kernels are compiled when they are first used.
    """
    form_of(device).warm_up(torch.device(device), shapes)


def _check_gate_up(pool: SitePool) -> None:
    if not pool.shape.is_gate_up:
        raise ValueError(f"widths: found {list(pool.widths)}, allowed two that are equal")


def _check_x(x: torch.Tensor, pool: SitePool, mix: Mix, kind: int) -> None:
    if not 0 <= kind < len(mix.page_limits):
        raise ValueError(f"kind: asked for {kind}, the mix has 0 .. {len(mix.page_limits) - 1}")
    _check_rows("x", x, pool.num_inputs, pool, mix)
    if mix.page_limits[kind] > pool.a.shape[0]:
        raise ValueError(
            f"pages: the mix uses page {mix.page_limits[kind] - 1}, the pool has {pool.a.shape[0]}"
        )
    if mix.vector_limits[kind] > pool.num_vectors:
        raise ValueError(
            f"vectors: the mix uses page {mix.vector_limits[kind] - 1}, the pool has {pool.num_vectors}"
        )
    if not mix.is_empty and mix.device.type != x.device.type:
        raise ValueError(f"mix: found one built for {mix.device.type}, x is on {x.device}")


def _check_rows(name: str, rows: torch.Tensor, num_columns: int, pool: SitePool, mix: Mix) -> None:
    if rows.shape != (mix.num_rows, num_columns):
        raise ValueError(f"{name}: found {list(rows.shape)}, allowed [{mix.num_rows}, {num_columns}]")
    if rows.stride(1) != 1:
        raise ValueError(f"{name}: found column stride {rows.stride(1)}, allowed 1")
    if rows.device != pool.a.device:
        raise ValueError(f"{name}: found on {rows.device}, allowed {pool.a.device}, where the pool is")


def _checked(product: Product, pool: SitePool, mix: Mix) -> Product:
    """The product, whose result is checked before a kernel reads it."""

    def checked(x: torch.Tensor) -> torch.Tensor:
        y = product(x)
        _check_rows("y", y, pool.num_outputs, pool, mix)
        return y

    return checked
