"""Chooses the next token of every sequence of a step at once.

Shape key: B sequences, V vocabulary, N candidates.

Each draw takes one uniform number that depends on the sequence's seed and the token's position only, and
turns it into a token by inverting the cumulative distribution. So a seed gives the same text alone, in any
batch and after a preemption. Greedy rows take the first maximum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq

import torch

from manylora.engine.sequence import Sequence

_LEAST_TEMPERATURE = 1e-30
"""Below this float32 cannot divide; long before, only the best token is left."""
_FIRST_CANDIDATES = 512
"""Rows with top_p look at this many best tokens first, and at all only when these do not hold the mass."""


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a seed and a token's position, by hash: no state to keep or to restore."""
    digest = hashlib.blake2b(
        seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8, person=b"manylora"
    ).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def sample(logits_BV: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: Seq[int]) -> list[int]:
    """The next token id of each sequence.

    Args:
        logits_BV: [B, V], any float type; changed in place where `min_tokens` forbids an end.
        sequences: B, in row order.
        eos_token_ids: ids that end a sequence.
    """
    held = [
        row
        for row, s in enumerate(sequences)
        if s.num_generated < s.params.min_tokens and not s.params.ignore_eos
    ]
    if held and eos_token_ids:
        logits_BV[torch.tensor(held)[:, None], torch.tensor(list(eos_token_ids))] = float("-inf")
    next_ids = logits_BV.argmax(-1).tolist()
    plain: list[int] = []
    filtered: list[int] = []
    for row, s in enumerate(sequences):
        if s.params.temperature > 0:
            (filtered if s.params.top_k or s.params.top_p < 1 else plain).append(row)
    for rows, draw in ((plain, _draw_all), (filtered, _draw_filtered)):
        if rows:
            chosen = [sequences[row] for row in rows]
            values = [max(s.params.temperature, _LEAST_TEMPERATURE) for s in chosen]
            temperatures = torch.tensor(values, device=logits_BV.device)
            chosen_logits = logits_BV[rows].float()
            # Measured from the best one, so that the smallest temperature makes no infinity of it.
            scaled = (chosen_logits - chosen_logits.amax(-1, keepdim=True)) / temperatures[:, None]
            for row, token in zip(rows, draw(scaled, chosen), strict=True):
                next_ids[row] = token
    return next_ids


def _draws(sequences: Seq[Sequence], device: torch.device) -> torch.Tensor:
    """[B, 1] uniform numbers, float64."""
    values = [[uniform(s.seed, len(s.token_ids))] for s in sequences]
    return torch.tensor(values, dtype=torch.float64, device=device)


def _draw_all(scaled_BV: torch.Tensor, sequences: Seq[Sequence]) -> list[int]:
    """Temperature alone: no sorting, the distribution is walked in vocabulary order."""
    mass_BV = scaled_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
    target = _draws(sequences, scaled_BV.device) * mass_BV[:, -1:]
    found = torch.searchsorted(mass_BV, target, right=True).squeeze(1)
    return [int(i) for i in found.clamp_(max=scaled_BV.shape[1] - 1)]


def _draw_filtered(scaled_BV: torch.Tensor, sequences: Seq[Sequence]) -> list[int]:
    """top_k first, then top_p over what is left: the fewest best tokens that hold top_p of the mass."""
    draws = _draws(sequences, scaled_BV.device)
    results = []
    for scaled_V, sequence, draw in zip(scaled_BV, sequences, draws, strict=True):
        values, ids, mass = _candidates(scaled_V, sequence.params.top_k, sequence.params.top_p)
        # The token that first reaches top_p is the last one kept.
        limit = sequence.params.top_p * (1 - 1e-9)
        kept = min(int(torch.searchsorted(mass, limit)) + 1, len(values))
        chosen = torch.searchsorted(mass[:kept], draw * mass[kept - 1], right=True)
        results.append(int(ids[min(int(chosen), kept - 1)]))
    return results


def _candidates(
    scaled_V: torch.Tensor, top_k: int, top_p: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best tokens of one row, best first: logits, ids and cumulated probability.

    They depend on the row alone: equal logits, which 16-bit models have often, are ordered by id.
    """
    vocab = len(scaled_V)
    if top_k:
        values, ids = _best(scaled_V, min(top_k, vocab))
        return values, ids, values.double().softmax(-1).cumsum(-1)
    log_total = torch.logsumexp(scaled_V, -1)
    for count in (min(_FIRST_CANDIDATES, vocab), vocab):
        values, ids = _best(scaled_V, count)
        mass = (values - log_total).double().exp().cumsum(-1)
        if mass[-1] >= top_p:
            break
    return values, ids, mass


def _best(scaled_V: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` highest logits and their ids, equal ones by id."""
    least = scaled_V.topk(count).values[-1]
    ids = (scaled_V >= least).nonzero().squeeze(1)
    values, order = scaled_V[ids].sort(descending=True, stable=True)
    return values[:count], ids[order[:count]]
