"""Tile sizes of the Triton kernels. The one place that a table of measured plans will replace.

Shape key: T rows, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DECODE_ROWS = 256
"""Up to so many rows a step counts as decode: an adapter has a row or two, and programs are few."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a step at one site is cut into programs.

    Chosen on the host from shapes alone, never from which adapters are active, so that a captured graph
    serves any mix.
    """

    block_rows: int
    """Rows of one block of the route: of one adapter, at most so many."""
    block_inputs: int
    """Columns of x that shrink multiplies at once."""
    block_outputs: int
    """Columns of y that one program of expand updates."""
    num_splits: int
    """Programs of shrink that share the inputs of one block; expand adds up their results in a fixed
    order."""
    num_warps: int = 4
    num_stages: int = 3


def block_rows(num_rows: int) -> int:
    """Rows of a route's blocks in a step of T rows. One for all sites, since the route is made once."""
    return 16 if num_rows <= DECODE_ROWS else 64


def choose(num_rows: int, num_inputs: int, dtype: torch.dtype) -> Plan:
    """Choose for a step of T rows at a site of K inputs whose pool has `dtype`."""
    decode = num_rows <= DECODE_ROWS
    # By bytes, so that float32 stays within the registers and the shared memory that 16-bit tiles need.
    block_inputs = (256 if decode else 128) // dtype.itemsize
    num_splits = min(8, -(-num_inputs // (2 * block_inputs))) if decode else 1
    return Plan(
        block_rows=block_rows(num_rows),
        block_inputs=block_inputs,
        block_outputs=128,
        num_splits=num_splits,
    )
