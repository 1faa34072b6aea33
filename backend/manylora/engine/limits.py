"""What bounds the scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from manylora.config import EngineConfig


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

    @classmethod
    def of(cls, config: EngineConfig, max_model_len: int) -> Limits:
        """Those of a configuration, for a model that allows sequences of `max_model_len`."""
        return cls(
            max_loras=config.max_loras,
            max_num_seqs=config.max_num_seqs,
            max_batched_tokens=config.max_batched_tokens,
            max_waiting=config.max_waiting,
            max_model_len=max_model_len,
            max_passes=config.max_num_seqs,
        )
