"""One step of the engine: chosen by the scheduler, turned into tensors here, run, sampled, taken back.

Shape key: T tokens of the step, B sequences of a group, Q query tokens of each, C context tokens of each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from manylora_kernels import Mix
from manylora_kernels.attention.paged_batch import PagedBatch
from manylora_kernels.lora.form import LoraForm
from manylora_kernels.upload import upload

from manylora.errors import ManyloraError
from manylora.messages import TokenLogprobs
from manylora.model.grouped_attention import Group, GroupedPlan
from manylora.model.paged_attention import PagedPlan
from manylora.model.step_context import AttentionPlan

if TYPE_CHECKING:
    from manylora.engine.flight import Flight
    from manylora.engine.sequence import Sequence

_DECODE_SPREAD_TOKENS = 64
"""Decodes share a group while the longest context is at most twice the shortest plus this many tokens."""

_MAX_SCALE = float(np.finfo(np.float32).max)


@dataclass(slots=True)
class Item:
    """One sequence's part of a step: its next `num_tokens` tokens."""

    sequence: Sequence
    num_tokens: int
    start: int = field(init=False)
    """The first token's position. From when the item is made, like `samples`: a sequence may have gone on
    before the step is done."""
    samples: bool = field(init=False)
    """Whether this part ends where the next token is wanted."""
    next_id: int | None = None
    """Filled by the runner when the part reaches the sequence's end."""
    logprobs: TokenLogprobs | None = None
    """Filled by the runner beside `next_id` where the request asks for them."""
    error: ManyloraError | None = None
    """Filled by the runner in place of `next_id` when no token can be chosen."""

    def __post_init__(self) -> None:
        self.start = self.sequence.num_computed
        self.samples = self.end == self.sequence.num_tokens

    @property
    def end(self) -> int:
        """The position behind the last token: that of the next one where this part samples."""
        return self.start + self.num_tokens


@dataclass(slots=True)
class Batch:
    """One step. `items` comes from the scheduler; the tensors from `build`; what follows from the runner."""

    items: list[Item]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)

    @property
    def sampling_items(self) -> list[Item]:
        return [item for item in self.items if item.samples]


@dataclass(slots=True, kw_only=True)
class StepTensors:
    """What the model is called with."""

    input_ids: torch.Tensor
    """[1, T]"""
    positions: torch.Tensor
    """[1, T]"""
    sample_rows: torch.Tensor | None
    """[number of sampling items] rows whose logits are wanted, in the order of `Batch.sampling_items`; None:
    all rows, those that pad among them."""
    plan: AttentionPlan
    mix: Mix | None


@dataclass(slots=True, kw_only=True)
class BatchBuilder:
    """Turns batches into tensors on one device."""

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

    def build(self, batch: Batch, previous: Flight | None = None, num_rows: int | None = None) -> StepTensors:
        """Order the items so that each group is one run of rows, and make the step's tensors.

        Args:
            batch: the step.
            previous: the step before, where tokens of this one are still on the device.
            num_rows: pads a step of decodes to so many rows, whose order stays; only where `paged`.
        """
        groups = [] if self.paged else self._group(batch.items)
        if self.paged:
            # Decodes first, all in one launch; prompts and chunks of any length in another.
            batch.items.sort(key=lambda item: item.num_tokens > 1)
        else:
            batch.items = [item for group in groups for item in group]
        positions = np.concatenate([np.arange(item.start, item.end) for item in batch.items])
        ends = np.cumsum([item.num_tokens for item in batch.items])
        sampled = [end - 1 for end, item in zip(ends, batch.items, strict=True) if item.samples]
        padding = (0, (num_rows or batch.num_tokens) - batch.num_tokens)
        return StepTensors(
            input_ids=self._input_ids(batch.items, previous, padding)[None],
            positions=self._tensor(np.pad(positions, padding))[None],
            sample_rows=None if num_rows else self._tensor(np.asarray(sampled or [0])),
            plan=self._plan_paged(batch.items, num_rows) if self.paged else self._plan(groups),
            mix=self._mix(batch, num_rows or batch.num_tokens),
        )

    def _input_ids(
        self, items: list[Item], previous: Flight | None, padding: tuple[int, int]
    ) -> torch.Tensor:
        """[T]. An item of one token whose id is not known here gets it from the step before."""
        token_ids: list[int] = []
        targets, sources = [], []
        for item in items:
            known = item.sequence.token_ids[item.start : item.end]
            if not known:
                assert previous is not None, "a token is pending of no step"
                targets.append(len(token_ids))
                sources.append(previous.row_of(item.sequence))
                known = [0]
            token_ids += known
        input_ids = self._tensor(np.pad(np.asarray(token_ids), padding))
        if targets:
            assert previous is not None
            places = self._tensor(np.array([targets, sources]))
            input_ids.index_copy_(0, places[0], previous.ids_B.index_select(0, places[1]))
        return input_ids

    def _plan_paged(self, items: list[Item], num_rows: int | None) -> AttentionPlan:
        batch = PagedBatch.build(
            [item.num_tokens for item in items],
            [item.end for item in items],
            [item.sequence.blocks(-(-item.end // self.block_size)) for item in items],
            self.block_size,
            self.device,
            num_rows=num_rows,
        )
        return PagedPlan(batch)

    def _plan(self, groups: list[list[Item]]) -> AttentionPlan:
        write_rows = np.concatenate([self._rows(item)[item.start :] for group in groups for item in group])
        plan_groups, first_row = [], 0
        for group in groups:
            plan_groups.append(self._plan_group(group, first_row, whole=len(groups) == 1))
            first_row += sum(item.num_tokens for item in group)
        return GroupedPlan(write_rows=self._tensor(write_rows), groups=plan_groups)

    def _group(self, items: list[Item]) -> list[list[Item]]:
        singles = sorted((i for i in items if i.num_tokens == 1), key=lambda i: i.end)
        groups: list[list[Item]] = []
        for item in singles:
            if groups and item.end <= 2 * groups[-1][0].end + _DECODE_SPREAD_TOKENS:
                groups[-1].append(item)
            else:
                groups.append([item])
        for group in groups:
            group.sort(key=_pool_order)
        fresh = sorted(
            (i for i in items if i.num_tokens > 1 and i.start == 0),
            key=lambda i: (i.num_tokens, _pool_order(i)),
        )
        groups += [list(same) for _, same in groupby(fresh, key=lambda i: i.num_tokens)]
        groups += [[i] for i in items if i.num_tokens > 1 and i.start > 0]
        return groups

    def _plan_group(self, group: list[Item], first_row: int, *, whole: bool) -> Group:
        num_queries = group[0].num_tokens
        fresh = num_queries > 1 and group[0].start == 0
        num_context = max(item.end for item in group)
        context = None
        if not fresh:
            # Padding repeats a sequence's own first row: the mask hides it, and no other tenant's numbers
            # come near.
            rows_BC = np.empty((len(group), num_context), dtype=np.int64)
            for row, item in zip(rows_BC, group, strict=True):
                own = self._rows(item)
                row[: len(own)] = own
                row[len(own) :] = own[0]
            context = self._tensor(rows_BC.reshape(-1))
        positions = np.stack([np.arange(item.start, item.end) for item in group])
        stop = first_row + len(group) * num_queries
        return Group(
            rows=slice(None) if whole else slice(first_row, stop),
            num_seqs=len(group),
            num_queries=num_queries,
            context=context,
            positions=self._tensor(positions),
            num_context=num_context,
        )

    def _rows(self, item: Item) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Cache rows of the item's tokens 0 .. end-1."""
        size = self.block_size
        blocks = item.sequence.blocks(-(-item.end // size)).astype(np.int64)
        return (blocks[:, None] * size + np.arange(size)).reshape(-1)[: item.end]

    def _mix(self, batch: Batch, num_rows: int) -> Mix | None:
        slots: dict[tuple[tuple[int, ...], ...], int] = {}
        pages: list[list[tuple[int, ...]]] = [[] for _ in range(self.num_kinds)]
        row_slots = np.full(num_rows, -1, dtype=np.int32)
        row_scales = np.zeros(num_rows, dtype=np.float32)
        row = 0
        for item in batch.items:
            adapter = item.sequence.adapter
            scale = item.sequence.adapter_scale
            # At scale 0 the rows are the base model's, whatever the adapter's term may overflow to.
            if adapter is not None and scale != 0:
                # Two adapters of equal content are two slots: each has pages of its own.
                slot = slots.get(adapter.pages)
                if slot is None:
                    slot = slots[adapter.pages] = len(slots)
                    for of_kind, mine in zip(pages, adapter.pages, strict=True):
                        of_kind.append(mine)
                row_slots[row : row + item.num_tokens] = slot
                row_scales[row : row + item.num_tokens] = _to_float32(adapter.scale * scale)
            row += item.num_tokens
        if not slots:
            return None
        return Mix.build(
            row_slots,
            row_scales,
            pages,
            self.max_loras,
            self.max_pages,
            self.device,
            form=self.form,
        )

    def _tensor(self, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> torch.Tensor:
        return upload(array, self.device)


def _to_float32(scale: float) -> float:
    """The scale, cut to what the kernels' type holds."""
    return max(-_MAX_SCALE, min(_MAX_SCALE, scale))


def _pool_order(item: Item) -> tuple[tuple[int, ...], ...]:
    """Sorts rows as their adapters lie in the pool, so that the CPU form reads both without a gather."""
    adapter = item.sequence.adapter
    return adapter.pages if adapter is not None else ()
