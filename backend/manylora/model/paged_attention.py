"""Attention over blocked keys and values where they lie, by the kernels of `manylora_kernels.attention`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from manylora_kernels.attention.paged_batch import PagedBatch

from manylora.model.step_context import AttentionCall, LayerCache


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """A step whose attention goes through block tables: all decodes in one launch, all prompts in another."""

    batch: PagedBatch

    def attend(self, call: AttentionCall, caches: Mapping[int, LayerCache]) -> torch.Tensor:
        """As `AttentionPlan.attend` says."""
        from manylora_kernels.attention.paged_attention import (  # imports triton: not for a CPU
            paged_attention,
            write_cache,
        )

        cache = caches[call.layer]
        write_cache(cache.keys, cache.values, call.key, call.value, self.batch.write_rows)
        return paged_attention(call.query, cache.keys, cache.values, self.batch, call.scoring)
