"""A step on the device: what the model is called with.

Shape key: T rows of the step, B sequences, S sequences that sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from manylora_kernels import Mix
from manylora_kernels.attention.paged_batch import PagedBatch
from manylora_kernels.lora.form import LoraForm
from manylora_kernels.upload import upload

from manylora.engine.attention_groups import group_sequences, make_group
from manylora.engine.step import Step
from manylora.model.grouped_attention import GroupedPlan
from manylora.model.paged_attention import PagedPlan
from manylora.model.step_context import AttentionPlan

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class StepTensors:
    """What the model is called with."""

    input_ids: torch.Tensor
    """[1, T]"""
    positions: torch.Tensor
    """[1, T]"""
    sample_rows: torch.Tensor | None
    """[S] rows whose logits are wanted, in the order of the step; at least one. None: all rows, those that
    pad among them."""
    plan: AttentionPlan
    mix: Mix | None


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a step in the order that the device's attention wants: sequence by sequence."""

    order: IntArray
    """[B]: which of the step's sequences each is."""
    queries: IntArray
    """[B], in this order, like all that follows."""
    contexts: IntArray
    row_of: IntArray
    """[T]: where each of the step's rows lies."""

    @classmethod
    def of(cls, step: Step, order: IntArray) -> _Rows:
        queries = step.num_queries[order]
        starts = np.cumsum(queries) - queries
        source = np.repeat(step.starts[order] - starts, queries) + np.arange(step.num_tokens)
        row_of = np.empty_like(source)
        row_of[source] = np.arange(step.num_tokens)
        return cls(order, queries, step.contexts[order], row_of)

    def positions(self) -> IntArray:
        """[T]. The last of a sequence's rows is at the end of its context."""
        behind = self.contexts - np.cumsum(self.queries)
        return np.arange(len(self.row_of)) + np.repeat(behind, self.queries)


@dataclass(slots=True, kw_only=True)
class Uploader:
    """Brings steps to one device."""

    device: torch.device
    block_size: int
    max_loras: int
    max_pages: int
    """Most pages of one adapter in one kind."""
    num_kinds: int
    paged: bool = False
    """Whether attention reads the caches through block tables: where its Triton kernels serve."""
    form: LoraForm[Any] | None = None
    """What computes the adapters' terms; None: the device's own. As of `Mix.build`."""

    def upload(
        self, step: Step, sampled: torch.Tensor | None = None, num_rows: int | None = None
    ) -> StepTensors:
        """Order the rows as attention computes them, and make the step's tensors.

        Args:
            step: the step.
            sampled: what the step before has sampled, where tokens of this one are pending.
            num_rows: pads a step of decodes to so many rows, whose order stays; only where `paged`.
        """
        if self.paged:
            # Decodes first, all in one launch; prompts and chunks of any length in another.
            groups = None
            order = np.argsort(step.num_queries > 1, kind="stable")
        else:
            groups = group_sequences(step)
            order = np.array([sequence for group in groups for sequence in group])
        rows = _Rows.of(step, order)
        padding = (0, (num_rows or step.num_tokens) - step.num_tokens)
        sampled_rows = rows.row_of[step.starts[1:][step.samples] - 1]
        if not len(sampled_rows):
            sampled_rows = np.zeros(1, dtype=np.int64)
        return StepTensors(
            input_ids=self._input_ids(step, rows, sampled, padding)[None],
            positions=self._tensor(np.pad(rows.positions(), padding))[None],
            sample_rows=None if num_rows else self._tensor(sampled_rows),
            plan=self._plan_paged(step, rows, num_rows) if groups is None else self._plan(step, rows, groups),
            mix=self._mix(step, rows, padding),
        )

    def _input_ids(
        self, step: Step, rows: _Rows, sampled: torch.Tensor | None, padding: tuple[int, int]
    ) -> torch.Tensor:
        """[T]. What is pending comes from the step before, on the device."""
        token_ids = np.zeros(step.num_tokens + padding[1], dtype=np.int64)
        token_ids[rows.row_of] = step.token_ids
        input_ids = self._tensor(token_ids)
        if step.pending.shape[1]:
            assert sampled is not None, "a token is pending of no step"
            places = self._tensor(np.stack([rows.row_of[step.pending[0]], step.pending[1]]))
            input_ids.index_copy_(0, places[0], sampled.index_select(0, places[1]))
        return input_ids

    def _plan_paged(self, step: Step, rows: _Rows, num_rows: int | None) -> AttentionPlan:
        batch = PagedBatch.build(
            rows.queries.tolist(),
            rows.contexts.tolist(),
            [step.table(sequence) for sequence in rows.order.tolist()],
            self.block_size,
            self.device,
            num_rows=num_rows,
        )
        return PagedPlan(batch)

    def _plan(self, step: Step, rows: _Rows, groups: list[list[int]]) -> AttentionPlan:
        size = self.block_size
        blocks, offsets = np.divmod(rows.positions(), size)
        first_blocks = np.repeat(step.table_starts[rows.order], rows.queries)
        write_rows = step.tables[first_blocks + blocks].astype(np.int64) * size + offsets
        plan_groups, first_row = [], 0
        for group in groups:
            made = make_group(step, group, first_row, size, self._tensor, is_whole=len(groups) == 1)
            plan_groups.append(made)
            first_row += made.num_seqs * made.num_queries
        return GroupedPlan(write_rows=self._tensor(write_rows), groups=plan_groups)

    def _mix(self, step: Step, rows: _Rows, padding: tuple[int, int]) -> Mix | None:
        if not step.pages:
            return None
        slots = np.repeat(step.slots[rows.order], rows.queries)
        scales = np.repeat(step.scales[rows.order], rows.queries)
        return Mix.build(
            np.pad(slots, padding, constant_values=-1),
            np.pad(scales, padding),
            step.pages[: self.num_kinds],
            self.max_loras,
            self.max_pages,
            self.device,
            form=self.form,
            vectors=step.pages[self.num_kinds :],
        )

    def _tensor(self, array: IntArray) -> torch.Tensor:
        return upload(array, self.device)
