"""The sampler as its tests call it."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from manylora.engine.batch import Item
from manylora.engine.sampler import choose
from manylora.engine.sequence import Sequence


def items(sequences: Seq[Sequence]) -> list[Item]:
    """A step that ends where each sequence ends."""
    return [Item(s, s.num_to_compute) for s in sequences]


def sample(logits_BV: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: Seq[int]) -> list[int | None]:
    """The next token of each sequence; None where its row is not sound."""
    chosen = choose(logits_BV, items(sequences), eos_token_ids)
    pairs = zip(chosen.ids_B.tolist(), chosen.is_finite_B.tolist(), strict=True)
    return [token_id if is_sound else None for token_id, is_sound in pairs]
