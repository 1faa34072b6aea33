"""The model's own log probabilities of chosen tokens and of the likeliest ones.

Shape key: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from manylora.engine.candidates import best
from manylora.engine.sequence import Sequence
from manylora.messages import TokenLogprobs


def distributions(logits_BV: torch.Tensor, sequences: Seq[Sequence]) -> dict[int, torch.Tensor]:
    """Log-softmax of the rows that ask for log probabilities, in float32.

    Args:
        logits_BV: [B, V], the model's own: before penalties, forbidden ends and temperature.
        sequences: B, in row order.

    Returns:
        [V] by row, of the rows that ask only.
    """
    rows = [row for row, s in enumerate(sequences) if s.params.logprobs > 0]
    if not rows:
        return {}
    return dict(zip(rows, logits_BV[rows].float().log_softmax(-1), strict=True))


def describe(logprobs_V: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """What is told of one token: its own log probability and the `num_top` best, equal ones by id."""
    values, ids = best(logprobs_V, min(num_top, len(logprobs_V)))
    top = zip(ids.tolist(), values.tolist(), strict=True)
    return TokenLogprobs(logprob=float(logprobs_V[token_id]), top=list(top))
