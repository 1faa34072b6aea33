"""The device's sort against a stable sort on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manylora_kernels.lora.route import Route, max_blocks, route


def check(found: Route, slots: list[int], max_slots: int, block_rows: int) -> None:
    """Order and blocks are what a stable sort gives, rows without an adapter last, and the rest of the block
    list says that it is unused."""
    key = [slot if slot >= 0 else max_slots for slot in slots]
    assert found.order.tolist() == np.argsort(key, kind="stable").tolist()
    blocks = []
    start = 0
    for slot in [*range(max_slots), -1]:
        count = slots.count(slot)
        for done in range(0, count, block_rows):
            blocks.append([slot, start + done, min(block_rows, count - done)])
        start += count
    assert sum(slot >= 0 for slot, _, _ in blocks) <= found.max_blocks
    assert len(blocks) <= found.max_blocks_of_all
    unused = [[-1, 0, 0]] * (found.max_blocks_of_all - len(blocks))
    assert found.blocks[:, :3].tolist() == blocks + unused


@pytest.mark.parametrize(
    ("slots", "max_slots", "block_rows"),
    [
        ([0], 1, 16),
        ([-1], 1, 16),
        ([-1] * 33, 4, 16),
        ([1, 0, 1, -1, 1], 2, 2),
        ([-1, 0, -1, -1, 0, -1], 3, 2),
        ([3] * 33, 8, 16),
        ([7 - t % 8 for t in range(40)], 8, 4),
        ([(t * t) % 200 for t in range(50)], 256, 16),
    ],
    ids=[
        "one_row",
        "one_base_row",
        "no_adapter",
        "worked_example",
        "more_base_rows_than_a_block",
        "one_slot",
        "all_slots",
        "more_rows_than_a_chunk",
    ],
)
def test_sorts_rows_by_slot(slots: list[int], max_slots: int, block_rows: int, triton_device: str) -> None:
    found = route(torch.tensor(slots, dtype=torch.int32, device=triton_device), max_slots, block_rows)
    check(found, slots, max_slots, block_rows)


def test_is_the_docstrings_example(triton_device: str) -> None:
    found = route(torch.tensor([1, 0, 1, -1, 1], dtype=torch.int32, device=triton_device), 2, 2)
    assert found.order.tolist() == [1, 0, 2, 4, 3]
    assert found.blocks[:, :3].t().tolist() == [[0, 1, 1, -1, -1], [0, 1, 3, 4, 0], [1, 2, 1, 1, 0]]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    max_slots=st.sampled_from([1, 3, 16, 20, 256]),
    block_rows=st.sampled_from([1, 2, 16]),
)
def test_any_rows_are_sorted(
    data: st.DataObject, max_slots: int, block_rows: int, triton_device: str
) -> None:
    slots = data.draw(st.lists(st.integers(-1, max_slots - 1), min_size=1, max_size=60))
    found = route(torch.tensor(slots, dtype=torch.int32, device=triton_device), max_slots, block_rows)
    check(found, slots, max_slots, block_rows)


@given(st.lists(st.integers(1, 40), max_size=10), st.integers(1, 16), st.integers(0, 5))
def test_no_step_needs_more_blocks_than_the_bound(
    counts: list[int], block_rows: int, more_slots: int
) -> None:
    needed = sum(-(-count // block_rows) for count in counts)
    assert needed <= max_blocks(sum(counts), len(counts) + more_slots, block_rows)


@pytest.mark.parametrize(
    "slots", [torch.zeros(4), torch.zeros(4, 2, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)[::2]]
)
def test_refuses_what_is_no_contiguous_int32_vector(slots: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="allowed contiguous int32"):
        route(slots, 4, 16)
