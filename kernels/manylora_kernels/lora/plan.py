"""What a plan is, how a step is cut into programs, and the formula for it where nothing was measured.

Shape key: T rows, S linears of a site, K inputs, N outputs of all S, Z splits of K, P' most pages of an
adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

from manylora_kernels.device import Device
from manylora_kernels.lora.pool import PAGE_ROWS
from manylora_kernels.shapes import SiteShape

ROWS_OF_BLOCKS = ((128, 16), (512, 32))
"""Up to so many rows of a step, blocks of so many rows. An adapter has a row or two in a decode step."""

PREFILL_BLOCK_ROWS = 64
"""What one warp group multiplies at once."""

ONE_ADAPTER_ROWS = 1024
"""From so many rows of one adapter alone, the vendor's matrix products serve. An estimate, until measured."""

MAX_SPLITS = 16
"""Expand adds up so many parts of h at most for each tile of y."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program of a kernel multiplies at once."""

    width: int
    """Columns: of x and A in shrink, of B and y in expand."""
    pages: int
    """Pages of an adapter that are multiplied together; an adapter of one page never pays for more."""
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How a step at one site is cut into programs."""

    block_rows: int
    """Rows of one block of the route: of one adapter, at most so many."""
    num_splits: int
    """Programs of shrink that share the inputs of one block; expand adds up their results in order."""
    shrink: Tile
    expand: Tile


@dataclass(frozen=True, slots=True)
class PlanKey:
    """What a measured plan was measured for."""

    site: SiteShape
    itemsize: int
    """Bytes of an element of the pool."""
    max_pages: int


@dataclass(frozen=True, slots=True)
class PlanTable:
    """Measured plans of one device; `plan_file` reads them."""

    rows_of_blocks: tuple[tuple[int, int], ...] = ROWS_OF_BLOCKS
    one_adapter_rows: int = ONE_ADAPTER_ROWS
    plans: tuple[tuple[PlanKey, int, Plan], ...] = ()
    """(what for, up to how many rows, the plan), rows ascending."""


def formula(num_rows: int, rows: int, key: PlanKey, device: Device) -> Plan:
    """Plan without measurements: enough programs to fill the device, and tiles that fit its memory.

    A decode step has few rows and many adapters: weights are what is moved, so K is split as far as it
    goes and several programs share a multiprocessor. A prefill step moves x: one program reads a block of
    it once for all linears and as many pages as the registers hold.
    """
    if rows < PREFILL_BLOCK_ROWS:
        return Plan(
            block_rows=rows,
            num_splits=_splits(key.site.num_inputs, _few_rows_width(key.itemsize), MAX_SPLITS),
            shrink=_shrink_tile(key, rows, 1, _few_rows_width(key.itemsize), device.shared_bytes // 3),
            expand=_expand_tile(key, rows),
        )
    wanted = device.num_units // -(-num_rows // rows)
    width = 128 // key.itemsize
    return Plan(
        block_rows=rows,
        num_splits=_splits(key.site.num_inputs, width, min(8, _power_of_2_below(wanted))),
        shrink=_shrink_tile(key, rows, _pages_at_once(key), width, device.shared_bytes),
        expand=_expand_tile(key, rows),
    )


def _few_rows_width(itemsize: int) -> int:
    """256 bytes of 16-bit weights; of float32 half of that, since its operands go through registers."""
    return 128 if itemsize <= 2 else 32


def _shrink_tile(key: PlanKey, rows: int, pages: int, width: int, shared_bytes: int) -> Tile:
    columns = _power_of_2_above(key.site.num_linears * PAGE_ROWS * pages)
    stage_bytes = (rows + columns) * width * key.itemsize
    return Tile(
        width=width,
        pages=pages,
        # float32 is multiplied without tensor cores, operands in registers: four warps would spill some.
        num_warps=8 if rows * columns > (8192 if key.itemsize <= 2 else 2048) else 4,
        num_stages=max(2, min(4, shared_bytes // stage_bytes)),
    )


def _expand_tile(key: PlanKey, rows: int) -> Tile:
    pages = min(4, _power_of_2_above(key.max_pages)) if key.itemsize <= 2 else 1
    # Few adapters have more pages than fit at once, so nothing is staged for the next ones.
    return Tile(width=128, pages=pages, num_warps=8 if rows >= PREFILL_BLOCK_ROWS else 4, num_stages=1)


def _pages_at_once(key: PlanKey) -> int:
    """So many that the sums of a block of 64 rows stay in registers: 256 columns of 16-bit, 64 of others."""
    columns = 256 if key.itemsize <= 2 else 64
    pages = min(4, _power_of_2_above(key.max_pages))
    while pages > 1 and _power_of_2_above(key.site.num_linears * PAGE_ROWS * pages) > columns:
        pages //= 2
    return pages


def _splits(num_inputs: int, width: int, most: int) -> int:
    """The most splits, a power of two, that have at least one tile each."""
    return min(most, _power_of_2_below(-(-num_inputs // width)))


def _power_of_2_below(n: int) -> int:
    return int(1 << (max(n, 1).bit_length() - 1))


def _power_of_2_above(n: int) -> int:
    return int(1 << (n - 1).bit_length())
