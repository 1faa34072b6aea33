"""Chooses the next token of every sequence of a step at once, on the device and without waiting for it.

Shape key: B sampling items, V vocabulary, F rows that draw in one way.

In this order: ends that `min_tokens` forbids, penalties, then the best token, or with a temperature a draw
among those that top_k, top_p and min_p leave. Each draw takes one uniform number that depends on the
sequence's seed and the token's position only, and turns it into a token by inverting the cumulative
distribution. So from the same logits a seed gives the same text alone, in any batch and after a preemption.
Greedy rows take the first maximum.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from manylora_kernels.upload import upload

from manylora.engine.batch import Item
from manylora.engine.candidates import candidates, cumulated_mass, draw_sorted, pick
from manylora.engine.penalties import penalise

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


def choose(logits_BV: torch.Tensor, items: Seq[Item], eos_token_ids: Seq[int]) -> SampledTokens:
    """Choose the next token of each item.

    Args:
        logits_BV: [B, V], any float type; may be changed in place where `min_tokens` forbids an end and where
            penalties apply.
        items: B, in row order. With penalties, all their sequences' tokens are known.
        eos_token_ids: ids that end a sequence.
    """
    _forbid_ends(logits_BV, items, eos_token_ids)
    logits_BV = penalise(logits_BV, [item.sequence for item in items])
    ids_B = logits_BV.argmax(-1)
    # NaN counts as the greatest, so one look at the best tells of the whole row.
    is_finite_B = logits_BV.gather(1, ids_B[:, None]).squeeze(1).isfinite()
    plain: list[int] = []
    filtered: list[int] = []
    for row, item in enumerate(items):
        params = item.sequence.params
        if params.temperature > 0:
            (filtered if params.top_k or params.top_p < 1 else plain).append(row)
    for every, draw in ((plain, _draw_all), (filtered, _draw_filtered)):
        for first in range(0, len(every), _ROWS_AT_ONCE):
            rows = every[first : first + _ROWS_AT_ONCE]
            chosen = [items[row] for row in rows]
            rows_F, temperatures_F, draws_F = _uploads(rows, chosen, logits_BV.device)
            scaled = logits_BV.index_select(0, rows_F).float()
            # Measured from the best one, so that the smallest temperature makes no infinity of it. What is
            # not sound draws, too, but from nothing that could stop the others.
            scaled -= scaled.amax(-1, keepdim=True)
            scaled.masked_fill_(~is_finite_B.index_select(0, rows_F)[:, None], 0.0)
            scaled /= temperatures_F[:, None].float()
            ids_B.index_copy_(0, rows_F, draw(scaled, draws_F[:, None], chosen))
    return SampledTokens(ids_B, is_finite_B)


def _uploads(
    rows: Seq[int], items: Seq[Item], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[F] each: row numbers, temperatures, uniform numbers in float64."""
    temperatures = [
        min(max(i.sequence.params.temperature, _LEAST_TEMPERATURE), _MOST_TEMPERATURE) for i in items
    ]
    draws = [uniform(i.sequence.seed, i.end) for i in items]
    packed = upload(np.array([rows, temperatures, draws]), device)
    return packed[0].long(), packed[1], packed[2]


def _forbid_ends(logits_BV: torch.Tensor, items: Seq[Item], eos_token_ids: Seq[int]) -> None:
    rows: list[int] = []
    ids: list[int] = []
    for row, item in enumerate(items):
        params = item.sequence.params
        if item.end - item.sequence.num_prompt >= params.min_tokens:
            continue
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        rows += [row] * len(ends)
        ids += ends
    if rows:
        packed = upload(np.array([rows, ids], dtype=np.int64), logits_BV.device)
        index = (packed[0], packed[1])
        values = logits_BV[index]
        # What is not finite stays, for it tells that the row is not sound.
        logits_BV[index] = values.masked_fill(values < float("inf"), float("-inf"))


def _draw_all(scaled_FV: torch.Tensor, draws_F1: torch.Tensor, items: Seq[Item]) -> torch.Tensor:
    """Temperature, and min_p: no sorting, the distribution is walked in vocabulary order."""
    least = [i.sequence.params.min_p for i in items]
    if any(least):
        logs = np.array([[math.log(p) if p > 0 else -math.inf] for p in least], dtype=np.float32)
        limits = upload(logs, scaled_FV.device)
        scaled_FV.masked_fill_(scaled_FV < limits, -math.inf)
    mass = cumulated_mass(scaled_FV)
    return pick(mass, mass[:, -1:], draws_F1).squeeze(1)


def _draw_filtered(scaled_FV: torch.Tensor, draws_F1: torch.Tensor, items: Seq[Item]) -> torch.Tensor:
    """Among each row's candidates, best first."""
    params = [item.sequence.params for item in items]
    if scaled_FV.device.type != "cpu":
        return draw_sorted(scaled_FV, draws_F1, params)
    results = []
    for scaled_V, draw, one in zip(scaled_FV, draws_F1, params, strict=True):
        # Few numbers are looked at, where all rows at once would sort the whole vocabulary.
        ids, mass = candidates(scaled_V, one)
        chosen = int(torch.searchsorted(mass, draw * mass[-1], right=True))
        results.append(ids[min(chosen, len(ids) - 1)])
    return torch.stack(results)
