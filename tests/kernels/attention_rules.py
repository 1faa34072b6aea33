"""What the tests of both attention kernels share: rules of scoring, and how exact a result must be."""

from __future__ import annotations

from typing import Any

import torch
from manylora_kernels.attention.plan import Scoring

SCORINGS: dict[str, dict[str, Any]] = {
    "window_of_1": {"window": 1},
    "window_of_20": {"window": 20},
    "window_longer_than_contexts": {"window": 1000},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 50, "softcap": 2.0, "sinks": True},
}
TOLERANCE = {
    torch.float32: 2e-5,
    # Outputs up to about 3 have 11 and 8 bits; the weights are rounded, too.
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def scoring(device: str, num_heads: int, sinks: bool = False, **fields: Any) -> Scoring:
    values = torch.linspace(-2, 3, num_heads, device=device) if sinks else None
    return Scoring(scaling=0.3, sinks=values, **fields)
