"""The form that serves on a GPU: two Triton kernels for each site.

Shape key: T rows, K inputs, N outputs of all linears of the site.
"""

from __future__ import annotations

import torch

from manylora_kernels import plan
from manylora_kernels.expand import expand
from manylora_kernels.pool import SitePool
from manylora_kernels.routed import RoutedMix
from manylora_kernels.shrink import shrink


def add_lora(y: torch.Tensor, x: torch.Tensor, pool: SitePool, mix: RoutedMix, kind: int) -> None:
    """Add the adapters' term of one site in place, as `manylora_kernels.add_lora` says, which checks the
    arguments."""
    chosen = plan.choose(x.shape[0], pool.num_inputs, pool.a.dtype)
    h = shrink(x, pool.a, mix, kind, chosen)
    expand(y, h, pool.b, pool.widths, mix, kind, chosen)
