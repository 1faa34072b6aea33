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
        if s.num_generated + 1 < s.params.min_tokens and not s.params.ignore_eos
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
    vocab = scaled_BV.shape[1]
    total_B1 = torch.logsumexp(scaled_BV, -1, keepdim=True)
    wide = min(vocab, max(_FIRST_CANDIDATES, *(s.params.top_k for s in sequences)))
    values_BN, ids_BN = scaled_BV.topk(wide, dim=-1)
    results = []
    draws = _draws(sequences, scaled_BV.device)
    for row, s in enumerate(sequences):
        values, ids = values_BN[row], ids_BN[row]
        if s.params.top_k:
            kept = min(s.params.top_k, vocab)
            values, ids = values[:kept], ids[:kept]
            probabilities = values.double().softmax(-1)
        else:
            probabilities = (values - total_B1[row]).double().exp()
            if probabilities.sum() < s.params.top_p and wide < vocab:
                values, ids = scaled_BV[row].sort(descending=True)
                probabilities = values.double().softmax(-1)
        mass = probabilities.cumsum(-1)
        # The token that first reaches top_p is the last one kept.
        limit = s.params.top_p * (1 - 1e-9)
        kept = min(int(torch.searchsorted(mass, limit)) + 1, len(mass))
        chosen = torch.searchsorted(mass[:kept], draws[row] * mass[kept - 1], right=True)
        results.append(int(ids[min(int(chosen), kept - 1)]))
    return results
