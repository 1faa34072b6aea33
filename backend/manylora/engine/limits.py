"""What bounds the scheduler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Limits:
    """The scheduler's share of EngineConfig, resolved."""

    max_loras: int
    max_num_seqs: int
    max_batched_tokens: int
    max_waiting: int
    max_model_len: int
    max_passes: int
    """Later sequences of the same priority that may pass one whose adapter finds no room."""
