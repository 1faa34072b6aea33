"""Sort the rows of a step by adapter, on the device.

Shape key: T rows, D slots, G blocks.

The sort is a stable counting sort in one program without atomics, so the order, and with it every bit of the
result, is the same in every run. Example with blocks of 2 rows: slots [1, 0, 1, -1, 1] give

    order   1 0 2 4        the rows of slot 0, then of slot 1; rows without an adapter are left out
    slot    0 1 1 -1       of each block
    start   0 1 3  0       where the block begins in `order`
    rows    1 2 1  0       how many rows it has; 0 past the last block
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class Route:
    """Rows by adapter, cut into blocks of one adapter each. All on the device; shapes depend on T and
    max_slots only."""

    order: torch.Tensor
    """[T], int32; entries past the last routed row are undefined."""
    blocks: torch.Tensor
    """[3, G], int32: slot, start and rows of each block."""
    num_blocks: torch.Tensor
    """[1], int32."""
    block_rows: int

    @property
    def max_blocks(self) -> int:
        """G: every slot can leave one block partly filled."""
        return self.blocks.shape[1]


def max_blocks(num_rows: int, max_slots: int, block_rows: int) -> int:
    """Most blocks that T rows of at most D slots can need."""
    return num_rows // block_rows + min(num_rows, max_slots)


def route(slots: torch.Tensor, max_slots: int, block_rows: int) -> Route:
    """Sort rows by slot and cut them into blocks.

    `order[start[g] + i]` for i < rows[g] are rows of slot[g], ascending.

    Args:
        slots: [T], int32, -1 .. max_slots-1.
        max_slots: D.
        block_rows: most rows of a block.

    Returns:
        The route, on the device of `slots`; nothing waits for it.

    Raises:
        ValueError: slots that are not a contiguous int32 vector.
    """
    if slots.dim() != 1 or slots.dtype != torch.int32 or not slots.is_contiguous():
        raise ValueError(f"slots: found {slots.dtype} {list(slots.shape)}, allowed contiguous int32 [T]")
    num_rows = slots.shape[0]
    num_blocks = max_blocks(num_rows, max_slots, block_rows)
    result = Route(
        order=torch.empty(num_rows, dtype=torch.int32, device=slots.device),
        blocks=torch.empty(3, num_blocks, dtype=torch.int32, device=slots.device),
        num_blocks=torch.empty(1, dtype=torch.int32, device=slots.device),
        block_rows=block_rows,
    )
    block_slots = max(16, triton.next_power_of_2(max_slots))
    _route_kernel[(1,)](
        slots_ptr=slots,
        order_ptr=result.order,
        blocks_ptr=result.blocks,
        num_blocks_ptr=result.num_blocks,
        num_rows=num_rows,
        max_blocks=num_blocks,
        block_rows=block_rows,
        BLOCK_D=block_slots,
        BLOCK_T=max(16, 4096 // block_slots),
        num_warps=4,
    )
    return result


@triton.jit(do_not_specialize=["num_rows", "max_blocks"])
def _route_kernel(
    slots_ptr,
    order_ptr,
    blocks_ptr,
    num_blocks_ptr,
    num_rows,
    max_blocks,
    block_rows,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    offs_d = tl.arange(0, BLOCK_D)
    offs_t = tl.arange(0, BLOCK_T)

    count = tl.zeros([BLOCK_D], dtype=tl.int32)
    for t in range(0, num_rows, BLOCK_T):
        slot = tl.load(slots_ptr + t + offs_t, mask=t + offs_t < num_rows, other=-1)
        count += tl.sum((slot[:, None] == offs_d[None, :]).to(tl.int32), axis=0)

    # The blocks: block g belongs to the slot before whose end it lies.
    begin = tl.cumsum(count, axis=0) - count
    blocks = (count + block_rows - 1) // block_rows
    blocks_end = tl.cumsum(blocks, axis=0)
    tl.store(num_blocks_ptr, tl.sum(blocks, axis=0))
    for g in range(0, max_blocks, BLOCK_T):
        offs_g = g + offs_t
        mine = (offs_g[:, None] >= (blocks_end - blocks)[None, :]) & (offs_g[:, None] < blocks_end[None, :])
        mine = mine.to(tl.int32)
        nth = offs_g - tl.sum(mine * (blocks_end - blocks)[None, :], axis=1)
        rows = tl.sum(mine * count[None, :], axis=1) - nth * block_rows
        used = tl.sum(mine, axis=1)
        mask_g = offs_g < max_blocks
        slot_of = tl.sum(mine * offs_d[None, :], axis=1)
        start = tl.sum(mine * begin[None, :], axis=1) + nth * block_rows
        tl.store(blocks_ptr + offs_g, tl.where(used > 0, slot_of, -1), mask=mask_g)
        tl.store(blocks_ptr + max_blocks + offs_g, tl.where(used > 0, start, 0), mask=mask_g)
        rows = tl.where(used > 0, tl.minimum(rows, block_rows), 0)
        tl.store(blocks_ptr + 2 * max_blocks + offs_g, rows, mask=mask_g)

    # Each row goes to where its slot begins, after the rows of that slot before it.
    place = begin
    for t in range(0, num_rows, BLOCK_T):
        slot = tl.load(slots_ptr + t + offs_t, mask=t + offs_t < num_rows, other=-1)
        mine = (slot[:, None] == offs_d[None, :]).to(tl.int32)
        before = tl.cumsum(mine, axis=0) - mine
        position = tl.sum(mine * (before + place[None, :]), axis=1)
        tl.store(order_ptr + position, t + offs_t, mask=slot >= 0)
        place += tl.sum(mine, axis=0)
