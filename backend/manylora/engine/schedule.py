"""What the scheduler has chosen for a step, and the step as data that it becomes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from manylora.engine.sampling import SamplingRow, has_penalties, make_sampling
from manylora.engine.sequence import Sequence
from manylora.engine.step import Step, StepSequence, make_step
from manylora.engine.token_counts import TokenCounts


@dataclass(slots=True)
class ScheduledSequence:
    """One sequence's part of a step: its next `num_tokens` tokens."""

    sequence: Sequence
    num_tokens: int
    start: int
    """The first token's position: a sequence may have gone on before the step is done."""
    samples: bool
    """Whether this part ends where the next token is wanted."""
    pending: int
    """Where the step before samples its only token, counted among those that sample there; -1: known."""

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        """The next tokens of a sequence as it is now."""
        start = sequence.num_computed
        return cls(
            sequence=sequence,
            num_tokens=num_tokens,
            start=start,
            samples=start + num_tokens == sequence.num_tokens,
            pending=sequence.sampled_row if start >= len(sequence.token_ids) else -1,
        )

    @property
    def end(self) -> int:
        """The position behind the last token: that of the next one where this part samples."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step, with the sequences that it serves. It stays where the scheduler is."""

    number: int
    """Counts up."""
    sequences: list[ScheduledSequence]

    @property
    def num_tokens(self) -> int:
        return sum(scheduled.num_tokens for scheduled in self.sequences)


def build_step(schedule: Schedule, block_size: int, eos_token_ids: Collection[int]) -> Step:
    """Write a step down as plain data.

    Args:
        schedule: of sequences that run.
        block_size: tokens of a KV block.
        eos_token_ids: ids that end a sequence.
    """
    rows = [_sampling_row(scheduled) for scheduled in schedule.sequences if scheduled.samples]
    return make_step(
        schedule.number,
        [_step_sequence(scheduled, block_size) for scheduled in schedule.sequences],
        make_sampling(rows, eos_token_ids),
    )


def _step_sequence(scheduled: ScheduledSequence, block_size: int) -> StepSequence:
    sequence = scheduled.sequence
    is_pending = scheduled.pending >= 0
    return StepSequence(
        token_ids=[0] if is_pending else sequence.token_ids[scheduled.start : scheduled.end],
        context=scheduled.end,
        table=sequence.blocks(-(-scheduled.end // block_size)),
        samples=scheduled.samples,
        pending=scheduled.pending,
        adapter=sequence.adapter,
        scale=sequence.adapter_scale,
    )


def _sampling_row(scheduled: ScheduledSequence) -> SamplingRow:
    sequence = scheduled.sequence
    return SamplingRow(
        params=sequence.params,
        seed=sequence.seed,
        position=scheduled.end,
        num_generated=scheduled.end - sequence.num_prompt,
        counts=_counts(sequence) if has_penalties(sequence.params) else None,
    )


def _counts(sequence: Sequence) -> TokenCounts:
    """Of all its tokens: none of a sequence with penalties is pending when it is scheduled."""
    if sequence.counts is None:
        sequence.counts = TokenCounts(sequence.token_ids, sequence.num_prompt)
    sequence.counts.read(sequence.token_ids)
    return sequence.counts
