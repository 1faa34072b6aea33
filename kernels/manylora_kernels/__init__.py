"""Many LoRA adapters in one batch: `y[t, s] += scale[t] * (x[t] A_s^T) B_s^T` for the adapter of row t.

A mix has the form that computes: on a CPU C code that is built on first use, or torch's products; on CUDA
Triton kernels. `reference` is the specification.

What Punica's BGMV and SGMV are, and vLLM's `lora_shrink` and `lora_expand`, is here one pair of kernels,
shrink and expand, for decodes and prompts alike: rows are sorted by adapter into segments, as for SGMV, but
on the device, an adapter's weights lie in pages of 16 rank rows, and one launch serves all linears of a site.
"""

from __future__ import annotations

import os

# Fusing a product and a sum into one rounding is triton's default, which a later version may change. Outputs
# must not change with it, so it is set here, before anything below can import triton.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from manylora_kernels.attention.warmup import warmup_attention
from manylora_kernels.lora.mix import Mix
from manylora_kernels.lora.operations import (
    add_lora,
    add_lora_silu_mul,
    gate_up_lora,
    linear_lora,
    silu_mul,
    warmup,
)
from manylora_kernels.lora.pool import PAGE_ROWS, SitePool
from manylora_kernels.shapes import AttentionShape, ServedAttention, ServedShapes, SiteShape

__all__ = [
    "PAGE_ROWS",
    "AttentionShape",
    "Mix",
    "ServedAttention",
    "ServedShapes",
    "SitePool",
    "SiteShape",
    "add_lora",
    "add_lora_silu_mul",
    "gate_up_lora",
    "linear_lora",
    "silu_mul",
    "warmup",
    "warmup_attention",
]
