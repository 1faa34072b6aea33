"""An adapter in host memory, in the layout of the device pool.

Shape key: L layers of a kind, P pages, S linears of a site, K inputs, N outputs of all S linears together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from manylora_kernels import PAGE_ROWS

__all__ = ["PAGE_ROWS", "AdapterWeights", "KindWeights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KindWeights:
    """One adapter's part of one kind of site, ready to be copied page by page.

    Rank row j of a linear lies in page j // 16, row j % 16. Rows past a linear's own rank, and all rows
    of a linear that the adapter does not target, are zero.
    """

    rank: int
    """The highest rank among the kind's targeted linears: 1 .. 16 * P."""
    a: torch.Tensor
    """[L, P, S, 16, K], the pool's dtype, contiguous, pinned when the device is CUDA."""
    b: torch.Tensor
    """[L, P, 16, N], the linears' outputs side by side in site order, times (module / adapter scaling)."""

    @property
    def num_pages(self) -> int:
        return self.a.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWeights:
    """One version of one adapter."""

    version: str
    """Content hash: 32 hex digits of the SHA-256 of adapter_config.json, then adapter_model.safetensors."""
    scale: float
    """The scaling (alpha / r, or alpha / sqrt(r) with rsLoRA) that the kernels apply per row. Where modules
    differ (`alpha_pattern`, `rank_pattern`), the first module's that is not 0; the others' ratio to it is
    folded into `b`."""
    max_rank: int
    kinds: tuple[KindWeights | None, ...]
    """In the order of `ModelSpec.kinds`; None where the adapter targets nothing of the kind."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, host or device."""
        return sum(t.numel() * t.element_size() for k in self.kinds if k for t in (k.a, k.b))
