"""Many LoRA adapters in one batch: `y[t, s] += scale[t] * (x[t] A_s^T) B_s^T` for the adapter of row t.

`add_lora` chooses the form: on a CPU C code that is built on first use, or torch's products; on CUDA Triton
kernels. `reference` is the specification.
"""

from __future__ import annotations

import os

# Contracting a product and a sum into one rounding is triton's default today and not promised for tomorrow.
# Outputs must not change with triton's version, so the choice is made here, before triton can be imported by
# anything below.
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
