"""One step as plain data, without torch: what is sent to whoever executes it, and what comes back.

Shape key: T tokens, B sequences, S sequences that sample, P tokens that are pending, D adapters of the step.

Who has the same model, KV caches and pool can execute a step, in any process. Example: a decode of sequence x
whose token the step before has still to give, and tokens 2 to 4 of a prompt y of six, with blocks of 4:

    token_ids  0 | 41 42 43      0 stands for what is pending
    pending    0 / 3             row 0 gets what the step before samples as its fourth
    starts     0 1 4
    contexts   6 5               tokens of each sequence in the cache once this step is done
    samples    True False
    tables     7 2 | 5 9         and where each begins: 0 2 4
"""

from __future__ import annotations

import enum
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from manylora.adapters.placement import AdapterUse
from manylora.engine.sampling import Sampling
from manylora.messages import TokenLogprobs

Pages = tuple[tuple[int, ...], ...]

_MAX_SCALE = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """What is computed: sequence by sequence its next tokens, in the order of the schedule."""

    number: int
    """Counts up; the step before has the number before."""
    token_ids: npt.NDArray[np.int64]
    """[T]; 0 where it is pending."""
    pending: npt.NDArray[np.int64]
    """[2, P]: rows of this step, and for each the sequence, counted among those that sample in the step
    before, whose token it is."""
    starts: npt.NDArray[np.int64]
    """[B + 1]: the first row of each sequence, and T."""
    contexts: npt.NDArray[np.int64]
    """[B]: tokens of each sequence once this step's are computed. Its last row is at the last of these
    positions, and the rows before it at those before."""
    samples: npt.NDArray[np.bool_]
    """[B]: whether the next token is wanted. S of them are True."""
    tables: npt.NDArray[np.int32]
    """KV blocks of all sequences, one after the other: as many as the contexts fill."""
    table_starts: npt.NDArray[np.int64]
    """[B + 1]: where each sequence's blocks begin, and the end."""
    slots: npt.NDArray[np.int32]
    """[B]: which of the step's adapters, 0 .. D - 1, or -1 for none."""
    scales: npt.NDArray[np.float32]
    """[B]: what multiplies the adapter's term."""
    pages: tuple[Pages, ...]
    """`pages[kind][slot]`: pages in the device pool. Empty in a step without adapters."""
    sampling: Sampling
    """How the S next tokens are chosen."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def num_seqs(self) -> int:
        """B."""
        return len(self.contexts)

    @property
    def num_queries(self) -> npt.NDArray[np.int64]:
        """[B]: rows of each sequence."""
        return np.diff(self.starts)

    @property
    def is_decode(self) -> bool:
        """Whether each sequence has one row, and samples."""
        return self.num_tokens == self.num_seqs and bool(self.samples.all())

    def table(self, sequence: int) -> npt.NDArray[np.int32]:
        """KV blocks of one sequence."""
        return self.tables[self.table_starts[sequence] : self.table_starts[sequence + 1]]


@dataclass(slots=True)
class StepSequence:
    """One sequence's part of a step, for `make_step`."""

    token_ids: Seq[int]
    """Those that this step computes. One that is pending stands as 0."""
    context: int
    """Tokens of the sequence once these are computed."""
    table: npt.NDArray[np.int32] | Seq[int]
    """Its KV blocks, as many as the context fills."""
    samples: bool = True
    pending: int = -1
    """Where the step before samples its only token, counted among those that sample there; -1: known."""
    adapter: AdapterUse | None = None
    scale: float = 1.0
    """Multiplies the adapter's own."""


def make_step(number: int, sequences: Seq[StepSequence], sampling: Sampling | None = None) -> Step:
    """Put the parts of all sequences into arrays.

    Args:
        number: the step's.
        sequences: B, at least one.
        sampling: for each that samples, in this order; None: the likeliest token for all.
    """
    lengths = [len(s.token_ids) for s in sequences]
    starts = np.cumsum([0, *lengths])
    slots, scales, pages = _place(sequences)
    samples = np.array([s.samples for s in sequences])
    pending = [
        (start, s.pending) for start, s in zip(starts.tolist(), sequences, strict=False) if s.pending >= 0
    ]
    token_ids: list[int] = []
    for s in sequences:
        token_ids += s.token_ids
    return Step(
        number=number,
        token_ids=np.array(token_ids, dtype=np.int64),
        pending=np.array(pending, dtype=np.int64).reshape(-1, 2).T,
        starts=starts,
        contexts=np.array([s.context for s in sequences], dtype=np.int64),
        samples=samples,
        tables=np.concatenate([np.asarray(s.table, dtype=np.int32) for s in sequences]),
        table_starts=np.cumsum([0, *(len(s.table) for s in sequences)]),
        slots=slots,
        scales=scales,
        pages=pages,
        sampling=Sampling(num_rows=int(samples.sum())) if sampling is None else sampling,
    )


def _place(
    sequences: Seq[StepSequence],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], tuple[Pages, ...]]:
    """Slots and scales by sequence, and pages by kind and slot."""
    # Two adapters of equal content are two: each has pages of its own.
    places: dict[Pages, int] = {}
    slots = np.full(len(sequences), -1, dtype=np.int32)
    scales = np.zeros(len(sequences), dtype=np.float32)
    for index, s in enumerate(sequences):
        # At scale 0 the rows are the base model's, whatever the adapter's term may overflow to.
        if s.adapter is not None and s.scale != 0:
            slots[index] = places.setdefault(s.adapter.pages, len(places))
            # Cut to what the kernels' type holds.
            scales[index] = max(-_MAX_SCALE, min(_MAX_SCALE, s.adapter.scale * s.scale))
    return slots, scales, tuple(zip(*places, strict=True))


class StepError(enum.Enum):
    """Why a sequence got no token."""

    NOT_FINITE = "not finite"
    """Its logits have no best finite one."""


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What a step gave one sequence that samples."""

    token_ids: list[int]
    """In order; one, unless there is an error."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One for each of them where the request asks for them, else empty."""
    error: StepError | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave."""

    number: int
    """The step's."""
    sampled: list[NewTokens]
    """[S], in the order of the step."""
