"""How attention is cut into programs, and how a layer scores.

Shape key: B sequences, V key/value heads, G query heads of each, D key size, E value size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SPLIT_TOKENS = 128
"""A decode's context is split at multiples of this: less is not worth a program."""
MAX_SPLIT_TOKENS = 2048
"""A decode's context is split when it is longer, however many programs there are: others may be short."""
MAX_SPLITS = 32
_PROGRAMS = 264
"""Programs that keep a GPU of about 132 multiprocessors busy."""
LOG2E = math.log2(math.e)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """From products of queries and keys to scores, the same for all rows of a layer."""

    scaling: float
    """Factor on the products."""
    window: int = 0
    """Tokens that a query sees, its own among them; 0 is all."""
    softcap: float | None = None
    """Scores become `softcap * tanh(score / softcap)`."""
    sinks: torch.Tensor | None = None
    """[H] one more score per head, of a token without value."""

    @property
    def factor(self) -> float:
        """What the kernels multiply products with: scores for exp2, or the exponent of the soft cap."""
        return self.scaling * LOG2E if self.softcap is None else 2 * LOG2E * self.scaling / self.softcap

    @property
    def cap(self) -> float:
        """The soft cap for exp2; 0 is none."""
        return 0.0 if self.softcap is None else self.softcap * LOG2E


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Tile sizes of one launch. Chosen on the host from shapes and limits alone, never from the contexts."""

    block_rows: int
    """Rows of a tile: query heads of one key/value head, times query tokens."""
    block_tokens: int
    """Tokens of a tile of keys and values."""
    num_splits: int = 1
    """Parts of each context; the second pass adds them up in their order."""
    num_warps: int
    num_stages: int


def decode(
    num_seqs: int,
    num_kv: int,
    per_kv: int,
    max_visible: int,
    largest_size: int,
    dtype: torch.dtype,
    num_splits: int | None = None,
) -> AttentionPlan:
    """Choose for B queries, one of each sequence, that see at most `max_visible` tokens.

    Args:
        largest_size: the larger of D and E.
        num_splits: taken as it is, where it is given.
    """
    wanted = max(_PROGRAMS // (num_seqs * num_kv), -(-max_visible // MAX_SPLIT_TOKENS), 1)
    return AttentionPlan(
        block_rows=max(16, _power_of_two(per_kv)),
        block_tokens=_tokens(largest_size, dtype),
        num_splits=num_splits or min(wanted, -(-max_visible // SPLIT_TOKENS), MAX_SPLITS),
        num_warps=4,
        num_stages=3 if dtype.itemsize == 2 else 2,
    )


def prefill(max_queries: int, per_kv: int, largest_size: int, dtype: torch.dtype) -> AttentionPlan:
    """Choose for sequences of at most `max_queries` rows."""
    rows = 64 if max_queries * per_kv <= 64 or largest_size > 128 or dtype.itemsize > 2 else 128
    return AttentionPlan(
        block_rows=max(rows, _power_of_two(per_kv)),
        block_tokens=_tokens(largest_size, dtype),
        num_warps=4 if rows == 64 else 8,
        num_stages=2,
    )


def _tokens(largest_size: int, dtype: torch.dtype) -> int:
    """Tokens whose keys fill about 16 KiB."""
    return max(16, min(64, (16 << 10) // (_power_of_two(largest_size) * dtype.itemsize)))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
