"""Decode steps recorded at start and replayed: one launch for the host in place of hundreds.

Shape key: T rows of a step, V vocabulary.

A graph serves one *bucket*, a number of rows that smaller steps are padded to, in one of two families: steps
of the base model only, which launch nothing of LoRA, and steps with adapters, whichever they are: the kernels
read slots and pages from tensors that each step fills anew. Rows that pad have no context, no adapter, and
write nothing.

The model code of transformers must not wait for the device in a step that is recorded (read in 5.17 and 5.23:
llama, mistral, qwen3, gemma2, gemma3, phi3, gpt_oss, the mixtures of experts):

- Rotary embeddings wait where frequencies follow the longest position: `dynamic` compares it on the host in
  each step, `longrope` did so in 5.17.
- Masks look at the positions on the host, but for an attention without a mask function, as ours is
  (`model/loading.py`).
- `logits_to_keep` as a tensor is an index on the device, which costs a copy. All rows of decodes are wanted,
  so they get 0, which keeps all.
- Experts find their rows by `nonzero` in the plain form; the grouped form, which is the default, counts them
  on the device.

What cannot be recorded raises, and such a model is served without graphs.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from manylora_kernels import Mix
from manylora_kernels.attention.paged_batch import PagedBatch

from manylora.engine.graph_recorder import Recorder, Replay
from manylora.engine.step_tensors import StepTensors, Uploader
from manylora.model.paged_attention import PagedPlan

log = logging.getLogger(__name__)

Forward = Callable[[StepTensors], torch.Tensor]
"""From a step's tensors to logits [T, V]."""


def buckets(max_rows: int) -> tuple[int, ...]:
    """Numbers of rows that graphs are recorded for, ascending: 1, 2, 4, then in eighths, at last `max_rows`.

    Every multiple of 8 up to 64, of 16 up to 128, of 32 up to 256 and so on: past 8 rows less than half of
    a step is padding, past 32 less than a fifth.
    """
    return (*(rows for rows in _steps_below(max_rows)), max_rows)


def _steps_below(max_rows: int) -> Iterator[int]:
    yield from (rows for rows in (1, 2, 4) if rows < max_rows)
    rows = 8
    while rows < max_rows:
        yield rows
        rows += max(8, 1 << (rows.bit_length() - 3))


@dataclass(frozen=True, slots=True)
class _Graph:
    """One bucket of one family."""

    step: StepTensors
    """What the recorded work reads."""
    replay: Replay


class StepGraphs:
    """The recorded steps of one model. They share their inputs, their logits and the memory between.

    Args:
        forward: the model; called with tensors whose `sample_rows` is None.
        uploader: makes the tensors of the steps that will be run.
        max_rows: of the largest bucket.
        max_context: no sequence is longer.
        page_limits: the pages of rank rows of the device pool, by kind.
        vector_limits: its pages of vectors, by kind.
        recorder: of the same device.
    """

    def __init__(
        self,
        forward: Forward,
        uploader: Uploader,
        max_rows: int,
        max_context: int,
        page_limits: Sequence[int],
        vector_limits: Sequence[int],
        recorder: Recorder,
    ) -> None:
        self._forward = forward
        self._uploader = uploader
        self._page_limits = tuple(page_limits)
        self._vector_limits = tuple(vector_limits)
        self._recorder = recorder
        self.buckets = buckets(max_rows)
        self.replays: Counter[tuple[int, bool]] = Counter()
        """Steps that were replayed since the start, by bucket and whether they had adapters."""
        device = uploader.device
        self._input_ids = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._paged = PagedBatch.blank(max_rows, max_context, uploader.block_size, device)
        self._logits: torch.Tensor | None = None
        self._graphs: dict[tuple[int, bool], _Graph] = {}

    def bucket_of(self, num_rows: int) -> int | None:
        """The least bucket that holds so many rows; None if none does."""
        return next((rows for rows in self.buckets if rows >= num_rows), None)

    @torch.inference_mode()
    def capture(self) -> None:
        """Record all buckets of both families.

        Raises:
            Exception: the model does what cannot be recorded, or memory lacks; nothing is to be run then.
        """
        started_s, free = time.monotonic(), self._recorder.free_bytes()
        largest = self._inputs(self.buckets[-1], None)
        self._logits = torch.empty_like(self._recorder.warm_up(lambda: self._forward(largest)))
        # The largest first: what the others need fits into its memory.
        for rows in reversed(self.buckets):
            for mix in (self._blank_mix(rows), None):
                self._graphs[rows, mix is not None] = self._record(rows, mix)
        log.info(
            "recorded %d graphs of decode steps, of %d to %d rows with and without adapters: %.1f s, %d MiB",
            len(self._graphs),
            self.buckets[0],
            self.buckets[-1],
            time.monotonic() - started_s,
            (free - self._recorder.free_bytes()) >> 20,
        )

    @torch.inference_mode()
    def run(self, step: StepTensors) -> torch.Tensor:
        """Compute a step of decodes; nothing waits for the device.

        Args:
            step: built for a bucket's number of rows.

        Returns:
            [T, V], valid until the next run, whichever graph that takes.

        Raises:
            ValueError: a step that no graph was recorded for.
        """
        rows = step.input_ids.shape[1]
        has_adapters = step.mix is not None and not step.mix.is_empty
        graph = self._graphs.get((rows, has_adapters))
        if graph is None or not isinstance(step.plan, PagedPlan) or self._logits is None:
            raise ValueError(f"step: found {rows} rows, allowed decodes in {self.buckets} rows")
        mine = graph.step
        assert isinstance(mine.plan, PagedPlan)
        mine.input_ids.copy_(step.input_ids)
        mine.positions.copy_(step.positions)
        mine.plan.batch.copy_from(step.plan.batch)
        if mine.mix is not None and step.mix is not None:
            mine.mix.copy_from(step.mix)
        graph.replay()
        self.replays[rows, has_adapters] += 1
        return self._logits[:rows]

    def _record(self, rows: int, mix: Mix | None) -> _Graph:
        step = self._inputs(rows, mix)

        def body() -> None:
            assert self._logits is not None
            # Into memory that outlives the graph's own, which the next one's replay takes.
            self._logits[:rows].copy_(self._forward(step))

        return _Graph(step, self._recorder.record(body))

    def _inputs(self, rows: int, mix: Mix | None) -> StepTensors:
        """The first rows of the shared tensors, with a mix of their own."""
        return StepTensors(
            # With the strides of a tensor of its own: compiled model code is for no others.
            input_ids=self._input_ids[:rows][None],
            positions=self._positions[:rows][None],
            sample_rows=None,
            plan=PagedPlan(self._paged.first(rows)),
            mix=mix,
        )

    def _blank_mix(self, rows: int) -> Mix:
        uploader = self._uploader
        return Mix.blank(
            rows,
            self._page_limits,
            uploader.max_loras,
            uploader.max_pages,
            uploader.device,
            form=uploader.form,
            vector_limits=self._vector_limits,
        )
