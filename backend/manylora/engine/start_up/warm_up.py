"""Have every kernel compiled before the first request, from what the model and the configuration say."""

from __future__ import annotations

import logging
import time

import torch
from manylora_kernels import ServedAttention, ServedShapes, SiteShape, warmup, warmup_attention

from manylora.config import EngineConfig
from manylora.model.loading import LoadedModel
from manylora.model.parts import PAGINGS, PagedBy, num_pages_of

log = logging.getLogger(__name__)


def prepare_kernels(model: LoadedModel, config: EngineConfig, pool_dtype: torch.dtype, paged: bool) -> None:
    """Make what the kernels need on the model's device; call it before anything runs or is captured there.

    On a CPU the compiled form of C, if it is not there yet. On CUDA every Triton kernel that steps may use:
    from then on none is compiled. Kernels that an earlier start has compiled come from Triton's cache.

    Args:
        pool_dtype: of the adapters in device memory.
        paged: whether attention goes through block tables.
    """
    if model.device.type == "cpu":
        warmup(model.device)
        return
    started_s = time.monotonic()
    warmup(model.device, served_shapes(model, config, pool_dtype))
    if paged:
        warmup_attention(model.device, served_attention(model, config))
    log.info("kernels are ready after %.1f s", time.monotonic() - started_s)


def served_shapes(model: LoadedModel, config: EngineConfig, pool_dtype: torch.dtype) -> ServedShapes:
    """What the adapters' terms of the engine's steps look like."""
    return ServedShapes(
        sites=tuple(SiteShape(kind.in_features, kind.out_features) for kind in model.spec.kinds),
        # A step has any number of rows up to the limit.
        row_counts=tuple(range(1, config.max_batched_tokens + 1)),
        max_slots=config.max_loras,
        max_pages=num_pages_of(config.max_lora_rank),
        dtype=model.dtype,
        pool_dtype=pool_dtype,
        has_vectors=PagedBy.ADAPTER in PAGINGS,
    )


def served_attention(model: LoadedModel, config: EngineConfig) -> ServedAttention:
    """What the attention of the engine's steps looks like."""
    return ServedAttention(
        layers=tuple(model.attention),
        cache_dtype=model.dtype,
        block_size=config.kv_block_size,
        max_context=model.max_model_len,
        max_queries=config.max_batched_tokens,
    )
