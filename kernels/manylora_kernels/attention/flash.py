"""FlashAttention 3 through torch's `varlen_attn`, where both are installed.

It serves prompts, in one part each. Decodes stay with the Triton kernels: they need their contexts split,
and with splits torch's paged form has left rows unwritten (pytorch issue 194167) and gives other bits in
another batch.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

from manylora_kernels.attention.paged_batch import PagedBatch
from manylora_kernels.attention.plan import Scoring

log = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_SIZE = 256
_KEYWORDS = frozenset({"scale", "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits"})
"""What `attend` hands over by name; torch added them over several versions."""

VarlenAttention = Callable[..., Any]


@functools.cache
def varlen_attention(device: torch.device) -> VarlenAttention | None:
    """torch's function with FlashAttention 3 as its implementation; None, and the reason in the log, where
    that is not available."""
    try:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
            raise RuntimeError(f"it is for GPUs of compute capability 9.0, not for {device}")
        from torch.nn.attention import activate_flash_attention_impl
        from torch.nn.attention.varlen import varlen_attn

        missing = _KEYWORDS - set(inspect.signature(varlen_attn).parameters)
        if missing:
            raise RuntimeError(
                f"varlen_attn of torch {torch.__version__} takes no {', '.join(sorted(missing))}"
            )
        activate_flash_attention_impl("FA3")
    # Whatever an optional package raises on import must not stop the engine.
    except Exception as error:
        log.info("FlashAttention 3 is not used (%s); the Triton kernels serve", error)
        return None
    log.info("FlashAttention 3 serves the attention of prompts")
    return varlen_attn


def serves(q: torch.Tensor, value_size: int, scoring: Scoring) -> bool:
    """Whether FlashAttention 3, if it is there, can compute this."""
    size = q.shape[2]
    return (
        q.dtype in _DTYPES
        and size == value_size <= _MAX_SIZE
        and size % 8 == 0
        and scoring.softcap is None
        and scoring.sinks is None
    )


def attend(
    varlen: VarlenAttention,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    contexts: torch.Tensor,
    batch: PagedBatch,
    scoring: Scoring,
) -> torch.Tensor:
    """The same as `prefill_attention`.

    Args:
        varlen: from `varlen_attention`.
        q: [H, T, D], the rows after the batch's decodes.
        keys, values: the cache.
        tables, contexts: of the sequences after the batch's decodes.

    Returns:
        [T, H, E]
    """
    num_kv, size = keys.shape[1] // q.shape[2], q.shape[2]
    out: torch.Tensor = varlen(
        q.transpose(0, 1),
        keys.view(-1, batch.block_size, num_kv, size),
        values.view(-1, batch.block_size, num_kv, size),
        batch.starts,
        None,
        batch.max_queries,
        batch.max_context,
        scale=scoring.scaling,
        # Its window does not count the query's own token.
        window_size=(scoring.window - 1 if scoring.window else -1, 0),
        enable_gqa=q.shape[0] != num_kv,
        seqused_k=contexts,
        block_table=tables,
        num_splits=1,
    )
    return out
