"""The sampler as its tests call it."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from manylora.engine.sampler import choose
from manylora.engine.sampling import Sampling
from manylora.engine.schedule import Schedule, ScheduledSequence, build_step
from manylora.engine.sequence import Sequence


def sampling(sequences: Seq[Sequence], eos_token_ids: Seq[int] = ()) -> Sampling:
    """Of a step that ends where each sequence ends."""
    for s in sequences:
        s.table = [0]
    schedule = Schedule(1, [ScheduledSequence.of(s, s.num_to_compute) for s in sequences])
    return build_step(schedule, 1 << 20, eos_token_ids).sampling


def sample(logits_BV: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: Seq[int]) -> list[int | None]:
    """The next token of each sequence; None where its row is not finite."""
    chosen = choose(logits_BV, sampling(sequences, eos_token_ids))
    pairs = zip(chosen.ids_B.tolist(), chosen.is_finite_B.tolist(), strict=True)
    return [token_id if is_finite else None for token_id, is_finite in pairs]
