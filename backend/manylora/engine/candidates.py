"""What the filters of a request leave of the vocabulary: top_k, top_p and min_p.

Shape key: V vocabulary, N candidates, F rows that filter.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from manylora_kernels.upload import upload

from manylora.engine.sampling import Draws

_FIRST_CANDIDATES = 512
"""Rows with top_p look at this many best tokens first, and at all only when these do not hold the mass."""
_BELOW = 1 - 1e-9
"""The token that first reaches top_p is the last one kept; what lacks less than this has reached it."""


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


def best_of_rows(values_FV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`best` of each row: [F, count] twice. On a GPU all rows are sorted, and the host waits for nothing."""
    if values_FV.device.type == "cpu":
        found = [best(values_V, count) for values_V in values_FV]
        return torch.stack([values for values, _ in found]), torch.stack([ids for _, ids in found])
    values, ids = values_FV.sort(dim=-1, descending=True, stable=True)
    return values[:, :count], ids[:, :count]


def candidates(
    scaled_V: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that top_k, top_p and min_p leave, best first: ids [N] and cumulated probability [N].

    The filters apply in this order, each to what the one before has left, as in transformers: the top_k best;
    of these the fewest best that hold top_p of their mass; of these the ones of at least min_p times the
    best one's probability. The best token always stays.

    Args:
        scaled_V: [V] logits after temperature, measured from the best one, which is 0.
        top_k: 0: all.
    """
    values, ids, mass = _most_probable(scaled_V, top_k, top_p)
    kept = min(int(torch.searchsorted(mass, top_p * _BELOW)) + 1, len(values))
    if min_p > 0:
        kept = min(kept, int((values >= math.log(min_p)).sum()))
    return ids[:kept], mass[:kept]


def draw_sorted(scaled_FV: torch.Tensor, draws_F1: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Draw one of each row's `candidates`, all rows at once and without a look at any number: [F].

    Args:
        scaled_FV: [F, V], as of `candidates`.
        draws_F1: [F, 1], float64, in [0, 1).
        draws: the settings of these rows.
    """
    vocab = scaled_FV.shape[1]
    limits = np.stack(
        [np.where(draws.top_k > 0, draws.top_k, vocab), draws.top_p * _BELOW, log_min_p(draws)], axis=1
    )
    top_k, top_p, least = torch.split(upload(limits, scaled_FV.device), 1, dim=1)  # [F, 1] each
    values, ids = scaled_FV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(vocab, device=scaled_FV.device)
    mass = cumulated_mass(values.masked_fill(rank_V >= top_k, -math.inf))
    kept = torch.minimum((mass < top_p * mass[:, -1:]).sum(-1, keepdim=True) + 1, top_k.long())
    kept = torch.minimum(kept, (values >= least).sum(-1, keepdim=True)).clamp_(1, vocab)
    return ids.gather(1, pick(mass, mass.gather(1, kept - 1), draws_F1)).squeeze(1)


def log_min_p(draws: Draws) -> npt.NDArray[np.float64]:
    """[F] what logits measured from the best one must reach; -infinity without min_p."""
    return np.array([math.log(p) if p > 0 else -math.inf for p in draws.min_p.tolist()])


def cumulated_mass(scaled_FV: torch.Tensor) -> torch.Tensor:
    """Cumulated probabilities times 2 ** 53, as whole numbers: [F, V], int64.

    A sum of floats depends on the order of its terms, which on a GPU depends on the batch.
    """
    return scaled_FV.softmax(-1).double().mul_(1 << 53).long().cumsum(-1)


def pick(mass_FV: torch.Tensor, total_F1: torch.Tensor, draws_F1: torch.Tensor) -> torch.Tensor:
    """Where the draws, as parts of `total`, fall among the cumulated masses: [F, 1]."""
    target = torch.minimum((draws_F1 * total_F1).long(), total_F1 - 1)
    return torch.searchsorted(mass_FV, target, right=True)


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
