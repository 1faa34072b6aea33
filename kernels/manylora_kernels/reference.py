"""The specification: every other form is tested against these few lines of float32 PyTorch.

Shape key: T rows, D adapters of the step, S linears, K inputs, N outputs of all S, R = 16 * pages rank rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from manylora_kernels.pool import SitePool


def shrink(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Multiply rows by the inputs' side of one adapter: `h[t, s] = x[t] A_s^T`.

    Args:
        x: [T, K].
        a: [pages, S, 16, K], the adapter's pages.

    Returns:
        [T, S, R], float32.
    """
    h = torch.einsum("tk,psrk->tspr", x.float(), a.float())
    return h.flatten(2)


def expand(h: torch.Tensor, b: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """Multiply by the outputs' side of one adapter: `y[t, s] = h[t, s] B_s^T`, all s side by side.

    Args:
        h: [T, S, R], float32.
        b: [pages, 16, N], the adapter's pages.
        widths: outputs of each linear.

    Returns:
        [T, N], float32.
    """
    parts = torch.split(b.float().flatten(0, 1), list(widths), dim=1)
    return torch.cat([h[:, s] @ part for s, part in enumerate(parts)], dim=1)


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    pool: SitePool,
    row_slots: Sequence[int],
    row_scales: Sequence[float],
    pages: Sequence[Sequence[int]],
) -> None:
    """Add the adapters' term of one site in place: `y[t, s] += scale[t] * (x[t] A_s^T) B_s^T`.

    Rows without an adapter (slot -1), or whose adapter has no pages here, are neither read nor written.

    Args:
        y: [T, N].
        x: [T, K].
        row_slots: [T], -1 .. D-1.
        row_scales: [T].
        pages: the pages of each slot in this kind of site.
    """
    for t, slot in enumerate(row_slots):
        if slot >= 0 and pages[slot]:
            mine = list(pages[slot])
            term = expand(shrink(x[t : t + 1], pool.a[mine]), pool.b[mine], pool.widths)
            y[t] = (y[t].float() + row_scales[t] * term[0]).to(y.dtype)


def silu_mul(y: torch.Tensor) -> torch.Tensor:
    """Compute what stands behind a gate/up site: `silu(gate) * up` with `gate, up = y[:, :N], y[:, N:]`.

    Args:
        y: [T, 2 * N], with the adapters' terms.

    Returns:
        [T, N], float32.
    """
    gate, up = y.float().chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up
