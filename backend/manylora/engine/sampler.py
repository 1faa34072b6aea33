"""Chooses the next token of every sequence of a step at once, on the device and without waiting for it.

Shape key: B sampled rows, V vocabulary, F rows that draw in one way.

In this order: ends that `min_tokens` forbids, penalties, then the best token, or with a temperature a draw
among those that top_k, top_p and min_p leave. Each draw takes one uniform number that depends on the
sequence's seed and the token's position only, and turns it into a token by inverting the cumulative
distribution. So from the same logits a seed gives the same text alone, in any batch and after a preemption.
Greedy rows take the first maximum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from manylora_kernels.upload import upload

from manylora.engine.candidates import candidates, cumulated_mass, draw_sorted, log_min_p, pick
from manylora.engine.penalties import penalise
from manylora.engine.sampling import Draws, Sampling

_LEAST_TEMPERATURE = 1e-30
"""Below this float32 cannot divide; long before, only the best token is left."""
_MOST_TEMPERATURE = 1e30
"""Above this float32 has no number; long before, all tokens are as likely."""
_ROWS_AT_ONCE = 32
"""Rows that draw together: each takes some 40 bytes for every token of the vocabulary."""


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a seed and a token's position, by hash: no state to keep or to restore."""
    digest = hashlib.blake2b(
        seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8, person=b"manylora"
    ).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """The next tokens, on the device of the logits."""

    ids_B: torch.Tensor
    """[B], int64."""
    is_finite_B: torch.Tensor
    """[B], bool: False where a row has no best finite logit to choose by; its id means nothing."""


def choose(logits_BV: torch.Tensor, sampling: Sampling) -> SampledTokens:
    """Choose the next token of each row.

    Args:
        logits_BV: [B, V], any float type; may be changed in place where a token is forbidden and where
            penalties apply.
        sampling: the settings of the B rows.
    """
    _forbid(logits_BV, sampling)
    if sampling.penalties is not None:
        logits_BV = penalise(logits_BV, sampling.penalties)
    ids_B = logits_BV.argmax(-1)
    # argmax ranks NaN highest, so a look at the best logit is enough.
    is_finite_B = logits_BV.gather(1, ids_B[:, None]).squeeze(1).isfinite()
    if sampling.draws is not None:
        draws = sampling.draws
        filters = (draws.top_k > 0) | (draws.top_p < 1)
        for indices, draw in ((~filters).nonzero()[0], _draw_all), (filters.nonzero()[0], _draw_filtered):
            for first in range(0, len(indices), _ROWS_AT_ONCE):
                some = draws.at(indices[first : first + _ROWS_AT_ONCE])
                _draw_into(ids_B, logits_BV, is_finite_B, some, draw)
    return SampledTokens(ids_B, is_finite_B)


def _draw_into(
    ids_B: torch.Tensor,
    logits_BV: torch.Tensor,
    is_finite_B: torch.Tensor,
    draws: Draws,
    draw: Callable[[torch.Tensor, torch.Tensor, Draws], torch.Tensor],
) -> None:
    """Replace the ids of rows that draw in one way."""
    temperatures = np.clip(draws.temperature, _LEAST_TEMPERATURE, _MOST_TEMPERATURE)
    pairs = zip(draws.seeds.tolist(), draws.positions.tolist(), strict=True)
    numbers = [uniform(seed, position) for seed, position in pairs]
    packed = upload(np.array([draws.rows, temperatures, numbers]), logits_BV.device)
    rows_F, temperatures_F, draws_F = packed[0].long(), packed[1], packed[2]
    scaled = logits_BV.index_select(0, rows_F).float()
    # Relative to the best one, so that dividing by the smallest temperature overflows nothing. Rows that are
    # not finite draw too, from zeros.
    scaled -= scaled.amax(-1, keepdim=True)
    scaled.masked_fill_(~is_finite_B.index_select(0, rows_F)[:, None], 0.0)
    scaled /= temperatures_F[:, None].float()
    ids_B.index_copy_(0, rows_F, draw(scaled, draws_F[:, None], draws))


def _forbid(logits_BV: torch.Tensor, sampling: Sampling) -> None:
    if not sampling.forbidden.shape[1]:
        return
    packed = upload(np.ascontiguousarray(sampling.forbidden), logits_BV.device)
    index = (packed[0], packed[1])
    values = logits_BV[index]
    # What is not finite stays: it shows that the row has no token.
    logits_BV[index] = values.masked_fill(values < float("inf"), float("-inf"))


def _draw_all(scaled_FV: torch.Tensor, draws_F1: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Temperature, and min_p: no sorting, the distribution is walked in vocabulary order."""
    if draws.min_p.any():
        limits = upload(log_min_p(draws)[:, None].astype(np.float32), scaled_FV.device)
        scaled_FV.masked_fill_(scaled_FV < limits, float("-inf"))
    mass = cumulated_mass(scaled_FV)
    return pick(mass, mass[:, -1:], draws_F1).squeeze(1)


def _draw_filtered(scaled_FV: torch.Tensor, draws_F1: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Among each row's candidates, best first."""
    if scaled_FV.device.type != "cpu":
        return draw_sorted(scaled_FV, draws_F1, draws)
    results = []
    filters = zip(draws.top_k.tolist(), draws.top_p.tolist(), draws.min_p.tolist(), strict=True)
    for scaled_V, draw, (top_k, top_p, min_p) in zip(scaled_FV, draws_F1, filters, strict=True):
        # Few numbers are looked at, where all rows at once would sort the whole vocabulary.
        ids, mass = candidates(scaled_V, top_k, top_p, min_p)
        chosen = int(torch.searchsorted(mass, draw * mass[-1], right=True))
        results.append(ids[min(chosen, len(ids) - 1)])
    return torch.stack(results)
