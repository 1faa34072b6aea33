"""How attention is cut into programs, and how a layer scores.

Shape key: B sequences, V key/value heads, G query heads of each, D key size, E value size.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

MAX_HEAD_SIZE = 256
"""Keys and values of larger heads fit no tile."""
SPLIT_TOKENS = 128
"""A decode's context is split at multiples of this: less is not worth a program."""
_MAX_SPLIT_TOKENS = 2048
"""A decode's context is split when it is longer, however many programs there are: others may be short."""
_MAX_SPLITS = 32
_PROGRAMS = 264
"""Programs that keep a GPU of about 132 multiprocessors busy."""
_LOG2E = math.log2(math.e)

_PREFILL = {
    8: {64: (128, 64, 8), 128: (128, 32, 8), 256: (64, 16, 8)},
    9: {64: (128, 64, 4), 128: (128, 64, 8), 256: (64, 32, 8)},
    10: {64: (128, 64, 4), 128: (128, 64, 8), 256: (64, 32, 4)},
}
"""Rows, tokens and warps by generation and head size: the largest tiles whose registers do not spill, with
any number of query heads, soft cap or window. Generation 8 keeps the queries in registers, too; others
are treated as 9."""
_AMD_PREFILL = {64: (64, 32, 4), 128: (128, 32, 8), 256: (64, 16, 8)}
"""The same for AMD."""
_SHORT_PREFILL = {64: (64, 32, 4), 128: (64, 32, 4)}
"""The same where no sequence fills 64 rows."""
_FLOAT32 = {64: (32, 32, 4), 128: (32, 16, 4), 256: (16, 16, 4)}
"""The same for float32, on any GPU, which is computed without tensor cores."""


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
        return self.scaling * _LOG2E if self.softcap is None else 2 * _LOG2E * self.scaling / self.softcap

    @property
    def cap(self) -> float:
        """The soft cap for exp2; 0 is none."""
        return 0.0 if self.softcap is None else self.softcap * _LOG2E


@dataclass(frozen=True, slots=True)
class Gpu:
    """What of a device decides the tiles."""

    generation: int = 9
    """Major compute capability."""
    is_amd: bool = False

    @classmethod
    @functools.cache
    def of(cls, device: torch.device) -> Gpu:
        """Look at a device; a CPU, where triton's interpreter runs, counts as the default."""
        if device.type != "cuda":
            return cls()
        is_amd = torch.version.hip is not None
        return cls(9 if is_amd else torch.cuda.get_device_capability(device)[0], is_amd)


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePlan:
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
    *,
    num_seqs: int,
    num_kv: int,
    per_kv: int,
    max_visible: int,
    largest_size: int,
    dtype: torch.dtype,
    gpu: Gpu,
    num_splits: int | None = None,
) -> TilePlan:
    """Choose for B queries, one of each sequence, that see at most `max_visible` tokens.

    Args:
        largest_size: the larger of D and E.
        num_splits: None: chosen.
    """
    wanted = max(_PROGRAMS // (num_seqs * num_kv), -(-max_visible // _MAX_SPLIT_TOKENS), 1)
    most = most_splits(max_visible)
    # Two tiles in flight beside the current one; looking up their rows takes two more stages. AMD's shared
    # memory holds one.
    stages = 3 if gpu.is_amd else 5
    return TilePlan(
        block_rows=max(16, _power_of_two(per_kv)),
        # Keys of 16 KiB; of float32, which goes through more registers, half as many bytes.
        block_tokens=max(16, min(64, (32 << 10) // (_power_of_two(largest_size) * dtype.itemsize**2))),
        num_splits=num_splits or min(wanted, most),
        num_warps=4,
        num_stages=stages if dtype.itemsize == 2 else 2,
    )


def most_splits(max_visible: int) -> int:
    """The most parts that `decode` chooses for a context of so many visible tokens."""
    return min(_MAX_SPLITS, -(-max_visible // SPLIT_TOKENS))


def prefill(*, max_queries: int, per_kv: int, largest_size: int, dtype: torch.dtype, gpu: Gpu) -> TilePlan:
    """Choose for sequences of at most `max_queries` rows.

    Args:
        largest_size: the larger of D and E.
    """
    size = max(64, _power_of_two(largest_size))
    table = _AMD_PREFILL if gpu.is_amd else _PREFILL.get(gpu.generation, _PREFILL[9])
    if dtype.itemsize > 2:
        table = _FLOAT32
    elif max_queries * per_kv <= 64:
        table = table | _SHORT_PREFILL
    rows, tokens, warps = table[size]
    return TilePlan(
        # One token of a tile needs a row for each of its query heads.
        block_rows=max(rows, _power_of_two(per_kv)),
        block_tokens=tokens,
        num_warps=warps,
        num_stages=2,
    )


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
