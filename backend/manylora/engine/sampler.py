"""Chooses the next token of every sequence of a step at once.

Shape key: B sequences, V vocabulary.

In this order: ends that `min_tokens` forbids, penalties, then the best token, or with a temperature a draw
among those that top_k, top_p and min_p leave. Each draw takes one uniform number that depends on the
sequence's seed and the token's position only, and turns it into a token by inverting the cumulative
distribution. So a seed gives the same text alone, in any batch and after a preemption. Greedy rows take the
first maximum.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence as Seq

import torch

from manylora.engine.candidates import candidates
from manylora.engine.penalties import penalise
from manylora.engine.sequence import Sequence

_LEAST_TEMPERATURE = 1e-30
"""Below this float32 cannot divide; long before, only the best token is left."""
_MOST_TEMPERATURE = 1e30
"""Above this float32 has no number; long before, all tokens are as likely."""


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a seed and a token's position, by hash: no state to keep or to restore."""
    digest = hashlib.blake2b(
        seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8, person=b"manylora"
    ).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def sample(logits_BV: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: Seq[int]) -> list[int | None]:
    """The next token id of each sequence; None where a row has no best finite logit to choose by.

    Args:
        logits_BV: [B, V], any float type; may be changed in place where `min_tokens` forbids an end and where
            penalties apply.
        sequences: B, in row order.
        eos_token_ids: ids that end a sequence.
    """
    _forbid_ends(logits_BV, sequences, eos_token_ids)
    logits_BV = penalise(logits_BV, sequences)
    best_B = logits_BV.argmax(-1)
    # NaN counts as the greatest, so one look at the best tells of the whole row.
    is_sound_B = logits_BV.gather(1, best_B[:, None]).squeeze(1).isfinite()
    ids, sound = torch.stack((best_B, is_sound_B.long())).tolist()
    next_ids: list[int | None] = [i if ok else None for i, ok in zip(ids, sound, strict=True)]
    plain: list[int] = []
    filtered: list[int] = []
    for row, s in enumerate(sequences):
        if s.params.temperature > 0 and sound[row]:
            (filtered if s.params.top_k or s.params.top_p < 1 else plain).append(row)
    for rows, draw in ((plain, _draw_all), (filtered, _draw_filtered)):
        if rows:
            chosen = [sequences[row] for row in rows]
            values = [min(max(s.params.temperature, _LEAST_TEMPERATURE), _MOST_TEMPERATURE) for s in chosen]
            temperatures = torch.tensor(values, device=logits_BV.device)
            chosen_logits = logits_BV[rows].float()
            # Measured from the best one, so that the smallest temperature makes no infinity of it.
            scaled = (chosen_logits - chosen_logits.amax(-1, keepdim=True)) / temperatures[:, None]
            for row, token in zip(rows, draw(scaled, chosen), strict=True):
                next_ids[row] = token
    return next_ids


def _forbid_ends(logits_BV: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: Seq[int]) -> None:
    held = [
        row
        for row, s in enumerate(sequences)
        if s.num_generated < s.params.min_tokens and not s.params.ignore_eos
    ]
    if held and eos_token_ids:
        index = (torch.tensor(held)[:, None], torch.tensor(list(eos_token_ids)))
        ends = logits_BV[index]
        # What is not finite stays, for it tells that the row is not sound.
        logits_BV[index] = ends.masked_fill(ends < float("inf"), float("-inf"))


def _draws(sequences: Seq[Sequence], device: torch.device) -> torch.Tensor:
    """[B, 1] uniform numbers, float64."""
    values = [[uniform(s.seed, len(s.token_ids))] for s in sequences]
    return torch.tensor(values, dtype=torch.float64, device=device)


def _draw_all(scaled_BV: torch.Tensor, sequences: Seq[Sequence]) -> list[int]:
    """Temperature, and min_p: no sorting, the distribution is walked in vocabulary order."""
    if any(s.params.min_p > 0 for s in sequences):
        least = [math.log(s.params.min_p) if s.params.min_p > 0 else -math.inf for s in sequences]
        limits = torch.tensor(least, device=scaled_BV.device)[:, None]
        scaled_BV.masked_fill_(scaled_BV < limits, -math.inf)
    mass_BV = scaled_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
    target = _draws(sequences, scaled_BV.device) * mass_BV[:, -1:]
    found = torch.searchsorted(mass_BV, target, right=True).squeeze(1)
    return [int(i) for i in found.clamp_(max=scaled_BV.shape[1] - 1)]


def _draw_filtered(scaled_BV: torch.Tensor, sequences: Seq[Sequence]) -> list[int]:
    """Among each row's candidates, best first."""
    draws = _draws(sequences, scaled_BV.device)
    results = []
    for scaled_V, sequence, draw in zip(scaled_BV, sequences, draws, strict=True):
        ids, mass = candidates(scaled_V, sequence.params)
        chosen = torch.searchsorted(mass, draw * mass[-1], right=True)
        results.append(int(ids[min(int(chosen), len(ids) - 1)]))
    return results
