"""How the next tokens of a step are to be chosen, as plain data without torch.

Shape key: S sequences that sample; F of them that draw, A that ask for something; E distinct tokens of those
with penalties, one sequence after the other.

Rows are counted among those that sample. What nobody asks for is None or empty and costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from manylora.engine.token_counts import TokenCounts
from manylora.messages import SamplingParams

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draws:
    """Rows that draw their token, [F] each. Those that are not here have the likeliest one."""

    rows: IntArray
    temperature: FloatArray
    """Above 0."""
    top_k: IntArray
    """0: all."""
    top_p: FloatArray
    min_p: FloatArray
    seeds: npt.NDArray[np.uint64]
    positions: IntArray
    """Of the token that is drawn, in its sequence."""

    def at(self, indices: npt.NDArray[np.intp]) -> Draws:
        """Some of them."""
        return Draws(
            rows=self.rows[indices],
            temperature=self.temperature[indices],
            top_k=self.top_k[indices],
            top_p=self.top_p[indices],
            min_p=self.min_p[indices],
            seeds=self.seeds[indices],
            positions=self.positions[indices],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Penalties:
    """Rows whose tokens count against themselves, [A] each unless it says otherwise."""

    rows: IntArray
    repetition: FloatArray
    frequency: FloatArray
    presence: FloatArray
    num_ids: IntArray
    """How many of `ids` are this row's."""
    ids: IntArray
    """[E] distinct tokens of prompt and text."""
    counts: IntArray
    """[E] how often each was generated; 0 for one that only the prompt has."""


def _no_ids() -> IntArray:
    return np.empty((2, 0), dtype=np.int64)


def _no_rows() -> IntArray:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampling:
    """The settings of a step."""

    num_rows: int
    """S."""
    draws: Draws | None = None
    penalties: Penalties | None = None
    forbidden: IntArray = field(default_factory=_no_ids)
    """[2, ...]: rows, and for each a token that may not be chosen: ends before `min_tokens`."""
    logprob_rows: IntArray = field(default_factory=_no_rows)
    """[A]: rows that want log probabilities."""
    num_logprobs: IntArray = field(default_factory=_no_rows)
    """[A]: alternatives that each wants."""


@dataclass(slots=True)
class SamplingRow:
    """One sequence that samples, for `make_sampling`."""

    params: SamplingParams
    seed: int
    position: int
    """Of the token that is chosen, in its sequence."""
    num_generated: int
    """Tokens of the text before it."""
    counts: TokenCounts | None = None
    """Brought up to date. Only for one with penalties."""


def has_penalties(params: SamplingParams) -> bool:
    """Whether a token is made less likely, or likelier, by those that are there."""
    return bool(params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty)


def make_sampling(rows: Seq[SamplingRow], eos_token_ids: Collection[int]) -> Sampling:
    """Put the settings of all rows into arrays.

    Args:
        rows: S, in the order of the step.
        eos_token_ids: ids that end a sequence.
    """
    drawing: list[int] = []
    penalised: list[int] = []
    forbidden: list[tuple[int, int]] = []
    asking: list[int] = []
    for index, row in enumerate(rows):
        params = row.params
        if params.temperature > 0:
            drawing.append(index)
        if has_penalties(params):
            penalised.append(index)
        if row.num_generated < params.min_tokens:
            ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
            forbidden += [(index, token_id) for token_id in ends]
        if params.logprobs > 0:
            asking.append(index)
    return Sampling(
        num_rows=len(rows),
        draws=_draws(rows, drawing) if drawing else None,
        penalties=_penalties(rows, penalised) if penalised else None,
        forbidden=np.array(forbidden, dtype=np.int64).reshape(-1, 2).T,
        logprob_rows=np.array(asking, dtype=np.int64),
        num_logprobs=np.array([rows[index].params.logprobs for index in asking], dtype=np.int64),
    )


def _draws(rows: Seq[SamplingRow], drawing: Seq[int]) -> Draws:
    params = [rows[index].params for index in drawing]
    return Draws(
        rows=np.array(drawing, dtype=np.int64),
        temperature=np.array([p.temperature for p in params], dtype=np.float64),
        top_k=np.array([p.top_k for p in params], dtype=np.int64),
        top_p=np.array([p.top_p for p in params], dtype=np.float64),
        min_p=np.array([p.min_p for p in params], dtype=np.float64),
        seeds=np.array([rows[index].seed for index in drawing], dtype=np.uint64),
        positions=np.array([rows[index].position for index in drawing], dtype=np.int64),
    )


def _penalties(rows: Seq[SamplingRow], penalised: Seq[int]) -> Penalties:
    params = [rows[index].params for index in penalised]
    counts = [rows[index].counts or TokenCounts((), 0) for index in penalised]
    ids = [of_row.ids for of_row in counts]
    return Penalties(
        rows=np.array(penalised, dtype=np.int64),
        repetition=np.array([p.repetition_penalty for p in params], dtype=np.float64),
        frequency=np.array([p.frequency_penalty for p in params], dtype=np.float64),
        presence=np.array([p.presence_penalty for p in params], dtype=np.float64),
        num_ids=np.array([len(of_row) for of_row in ids], dtype=np.int64),
        ids=np.concatenate(ids),
        counts=np.concatenate([of_row.counts for of_row in counts]),
    )
