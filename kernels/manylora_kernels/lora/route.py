"""Sort the rows of a step by adapter, on the device.

Shape key: T rows, D slots, G blocks of adapters, G' blocks of all rows.

The sort is a stable counting sort in one program without atomics, so the order, and with it every bit of the
result, is the same in every run. Example with blocks of 2 rows: slots [1, 0, 1, -1, 1] give

    order   1 0 2 4 3      the rows of slot 0, then of slot 1, then those without an adapter
    slot    0 1 1 -1 -1    of each block; -1: no adapter, or no block at all
    start   0 1 3  4  0    where the block begins in `order`
    rows    1 2 1  1  0    how many rows it has; 0 past the last block
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

    packed: torch.Tensor
    """[T + 4 * G'], int32: the order, then the blocks. One tensor, so that kernels take one argument."""
    num_rows: int
    max_slots: int
    block_rows: int

    @property
    def order(self) -> torch.Tensor:
        """[T], int32: rows of slot 0, of slot 1 and so on, then rows without an adapter."""
        return self.packed[: self.num_rows]

    @property
    def blocks(self) -> torch.Tensor:
        """[G', 4], int32: slot, start, rows, and one that is undefined."""
        return self.packed[self.num_rows :].view(-1, 4)

    @property
    def max_blocks(self) -> int:
        """G: adapters' blocks come first, and are no more than these."""
        return max_blocks(self.num_rows, self.max_slots, self.block_rows)

    @property
    def max_blocks_of_all(self) -> int:
        """G'."""
        return max_blocks(self.num_rows, self.max_slots + 1, self.block_rows)


def max_blocks(num_rows: int, num_groups: int, block_rows: int) -> int:
    """Most blocks that T rows of so many groups can need: every group can leave one block partly filled."""
    return num_rows // block_rows + min(num_rows, num_groups)


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
    num_blocks = max_blocks(num_rows, max_slots + 1, block_rows)
    packed = torch.empty(num_rows + 4 * num_blocks, dtype=torch.int32, device=slots.device)
    block_slots = max(16, triton.next_power_of_2(max_slots))
    _route_kernel[(1,)](
        slots_ptr=slots,
        route_ptr=packed,
        num_rows=num_rows,
        num_blocks=num_blocks,
        block_rows=block_rows,
        BLOCK_D=block_slots,
        BLOCK_T=max(16, 4096 // block_slots),
        num_warps=8,
    )
    return Route(packed, num_rows, max_slots, block_rows)


@triton.jit(
    do_not_specialize=["num_rows", "num_blocks", "block_rows"],
    # A part of an upload, whose alignment changes with T.
    do_not_specialize_on_alignment=["slots_ptr"],
)
def _route_kernel(
    slots_ptr,
    route_ptr,
    num_rows,
    num_blocks,
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
    num_routed = tl.sum(count, axis=0)

    # The blocks: block g belongs to the slot before whose end it lies, or to the rows without an adapter.
    begin = tl.cumsum(count, axis=0) - count
    blocks = (count + block_rows - 1) // block_rows
    blocks_end = tl.cumsum(blocks, axis=0)
    num_adapter_blocks = tl.sum(blocks, axis=0)
    for g in range(0, num_blocks, BLOCK_T):
        offs_g = g + offs_t
        mine = (offs_g[:, None] >= (blocks_end - blocks)[None, :]) & (offs_g[:, None] < blocks_end[None, :])
        mine = mine.to(tl.int32)
        of_slot = offs_g < num_adapter_blocks
        nth = offs_g - tl.where(
            of_slot, tl.sum(mine * (blocks_end - blocks)[None, :], axis=1), num_adapter_blocks
        )
        group_rows = tl.where(of_slot, tl.sum(mine * count[None, :], axis=1), num_rows - num_routed)
        group_begin = tl.where(of_slot, tl.sum(mine * begin[None, :], axis=1), num_routed)
        rows = tl.minimum(tl.maximum(group_rows - nth * block_rows, 0), block_rows)
        slot_of = tl.where(of_slot, tl.sum(mine * offs_d[None, :], axis=1), -1)
        start = tl.where(rows > 0, group_begin + nth * block_rows, 0)
        block_ptrs = route_ptr + num_rows + 4 * offs_g
        mask_g = offs_g < num_blocks
        tl.store(block_ptrs, slot_of, mask=mask_g)
        tl.store(block_ptrs + 1, start, mask=mask_g)
        tl.store(block_ptrs + 2, rows, mask=mask_g)

    # Each row goes to where its group begins, after the rows of that group before it.
    place = begin
    place_without = num_routed
    for t in range(0, num_rows, BLOCK_T):
        mask_t = t + offs_t < num_rows
        slot = tl.load(slots_ptr + t + offs_t, mask=mask_t, other=-1)
        mine = (slot[:, None] == offs_d[None, :]).to(tl.int32)
        before = tl.cumsum(mine, axis=0) - mine
        position = tl.sum(mine * (before + place[None, :]), axis=1)
        without = (mask_t & (slot < 0)).to(tl.int32)
        position = tl.where(slot < 0, place_without + tl.cumsum(without, axis=0) - without, position)
        tl.store(route_ptr + position, t + offs_t, mask=mask_t)
        place += tl.sum(mine, axis=0)
        place_without += tl.sum(without, axis=0)
