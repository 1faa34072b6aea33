"""The best tokens of one row of logits.

Shape key: V vocabulary, N candidates.
"""

from __future__ import annotations

import math

import torch

from manylora.messages import SamplingParams

_FIRST_CANDIDATES = 512
"""Rows with top_p look at this many best tokens first, and at all only when these do not hold the mass."""


def best(values_V: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` highest values and their ids, best first, equal ones by id.

    They depend on the row alone: equal logits, which 16-bit models have often, would otherwise come in an
    order that depends on `count` and on the rows beside it.

    Args:
        values_V: [V], without NaN.
        count: 1 to V.
    """
    least = values_V.topk(count).values[-1]
    ids = (values_V >= least).nonzero().squeeze(1)
    values, order = values_V[ids].sort(descending=True, stable=True)
    return values[:count], ids[order[:count]]


def candidates(scaled_V: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that top_k, top_p and min_p leave, best first: ids [N] and cumulated probability [N].

    The filters apply in this order, each to what the one before has left, as in transformers: the top_k best;
    of these the fewest best that hold top_p of their mass; of these the ones of at least min_p times the
    best one's probability. The best token always stays.

    Args:
        scaled_V: [V] logits after temperature, measured from the best one, which is 0.
        params: with top_k above 0 or top_p below 1.
    """
    values, ids, mass = _most_probable(scaled_V, params.top_k, params.top_p)
    # The token that first reaches top_p is the last one kept.
    limit = params.top_p * (1 - 1e-9)
    kept = min(int(torch.searchsorted(mass, limit)) + 1, len(values))
    if params.min_p > 0:
        kept = min(kept, int((values >= math.log(params.min_p)).sum()))
    return ids[:kept], mass[:kept]


def _most_probable(
    scaled_V: torch.Tensor, top_k: int, top_p: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, ids and cumulated probability of the top_k best, or of enough to hold top_p."""
    vocab = len(scaled_V)
    if top_k:
        values, ids = best(scaled_V, min(top_k, vocab))
        return values, ids, values.double().softmax(-1).cumsum(-1)
    log_total = torch.logsumexp(scaled_V, -1)
    for count in (min(_FIRST_CANDIDATES, vocab), vocab):
        values, ids = best(scaled_V, count)
        mass = (values - log_total).double().exp().cumsum(-1)
        if mass[-1] >= top_p:
            break
    return values, ids, mass
