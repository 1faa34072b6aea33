"""An adapter in host memory, in the layout of the device pool.

Shape key: L layers of a kind, P pages, S linears of a site, K inputs, N outputs of all S linears together,
E elements of the buffer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from manylora_kernels import PAGE_ROWS

from manylora.adapters.layout import AdapterLayout
from manylora.model.spec import SiteKind

__all__ = ["PAGE_ROWS", "AdapterWeights", "KindWeights", "allocate"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class KindWeights:
    """One adapter's part of one kind of site, ready to be copied page by page.

    Rank row j of a linear lies in page j // 16, row j % 16. Rows past a linear's own rank, and all rows
    of a linear that the adapter does not target, are zero.
    """

    rank: int
    """The highest rank among the kind's targeted linears: 1 .. 16 * P."""
    a: torch.Tensor
    """[L, P, S, 16, K], contiguous, a view of the adapter's buffer."""
    b: torch.Tensor
    """[L, P, 16, N], the same; the linears' outputs side by side in site order, times (module / adapter
    scaling)."""

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
    buffer: torch.Tensor
    """[E], the pool's dtype, as `AdapterLayout` says; page-locked when the device is CUDA, so that one
    transfer takes all of it there. What lies between the tensors is never read."""
    kinds: tuple[KindWeights | None, ...]
    """In the order of `ModelSpec.kinds`; None where the adapter targets nothing of the kind."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, host or device. The buffer has less than 256 more for each."""
        return sum(t.numel() * t.element_size() for k in self.kinds if k for t in (k.a, k.b))


def allocate(
    kinds: Sequence[SiteKind], ranks: Sequence[int], dtype: torch.dtype, *, pin: bool
) -> tuple[torch.Tensor, tuple[KindWeights | None, ...]]:
    """Memory for an adapter, all zeros.

    Args:
        kinds: of the base model.
        ranks: the adapter's highest rank by kind; 0 where it targets nothing.
        dtype: the pool's.
        pin: page-lock the memory, for copies to a CUDA device. Where that fails the memory is ordinary, with
            a warning: its copies are slower, and the thread that queues them waits for them.

    Returns:
        The buffer [E], and its tensors by kind.
    """
    layout = AdapterLayout.of(kinds, [-(-rank // PAGE_ROWS) for rank in ranks], dtype)
    buffer = _zeros(layout.num_elements, dtype, pin)
    return buffer, tuple(
        KindWeights(rank=rank, a=parts[0].of(buffer), b=parts[1].of(buffer)) if parts else None
        for rank, parts in zip(ranks, layout.parts, strict=True)
    )


def _zeros(num_elements: int, dtype: torch.dtype, pin: bool) -> torch.Tensor:
    if pin:
        # Freed and reused by torch behind the copies that read it: each `copy_(non_blocking=True)` notes its
        # stream on the whole block, by the storage, so that views count as well.
        try:
            return torch.zeros(num_elements, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            log.warning(
                "%d bytes for an adapter could not be page-locked; steps will wait while it is copied to the "
                "device: %s",
                num_elements * dtype.itemsize,
                error,
            )
    return torch.zeros(num_elements, dtype=dtype)
