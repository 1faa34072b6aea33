"""Which plans are tried: small steps from one plan to its neighbours, as far as they fit the device.

Shape key: T rows, S linears of a site, K inputs, R rank rows that are multiplied at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from manylora_kernels import PAGE_ROWS, SiteShape
from manylora_kernels.device import Device
from manylora_kernels.lora.plan import Plan, PlanKey, Tile, formula

MAX_SPLITS = 32
MAX_PAGES = 8
_MAX_WARPS = 8
_WIDTHS = (16, 512)
_MAX_STAGES = 6
_MAX_SUMS = 128
"""Float32 sums that one thread can hold; more would spill."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one plan is for."""

    name: str
    """Of the site."""
    site: SiteShape
    max_rows: int
    """It serves steps of up to so many rows, and is measured at this number."""
    max_pages: int
    itemsize: int
    """Bytes of an element of the pool."""

    @property
    def key(self) -> PlanKey:
        """As the table knows it."""
        return PlanKey(self.site, self.itemsize, self.max_pages)

    def start(self, block_rows: int, device: Device) -> Plan:
        """Where the search begins: the formula's plan."""
        return formula(self.max_rows, block_rows, self.key, device)


def neighbours(plan: Plan, cell: Cell, device: Device) -> list[Plan]:
    """Plans one step away that the kernels take and that fit the device, each once."""
    found = {near: None for near in _near(plan) if near != plan and fits(near, cell, device)}
    return list(found)


def _near(plan: Plan) -> Iterator[Plan]:
    for splits in (2 * plan.num_splits, plan.num_splits // 2):
        yield replace(plan, num_splits=splits)
    for tile in _near_tiles(plan.shrink):
        yield replace(plan, shrink=tile)
    # Half the tile, twice the programs: two small steps that pay only together.
    wide, narrow = 2 * plan.shrink.width, plan.shrink.width // 2
    yield replace(plan, num_splits=2 * plan.num_splits, shrink=replace(plan.shrink, width=narrow))
    yield replace(plan, num_splits=plan.num_splits // 2, shrink=replace(plan.shrink, width=wide))
    for tile in _near_tiles(plan.expand):
        yield replace(plan, expand=tile)


def _near_tiles(tile: Tile) -> Iterator[Tile]:
    for field in ("width", "pages", "num_warps"):
        size = getattr(tile, field)
        yield replace(tile, **{field: 2 * size})
        yield replace(tile, **{field: size // 2})
    yield replace(tile, num_stages=tile.num_stages + 1)
    yield replace(tile, num_stages=tile.num_stages - 1)
    yield replace(tile, width=2 * tile.width, num_warps=2 * tile.num_warps)
    yield replace(tile, width=tile.width // 2, num_warps=tile.num_warps // 2)


def fits(plan: Plan, cell: Cell, device: Device) -> bool:
    """Whether the plan file allows it, no split is empty, and registers and shared memory hold it."""
    most_pages = min(MAX_PAGES, _power_of_2_above(cell.max_pages))
    for tile in (plan.shrink, plan.expand):
        if not _WIDTHS[0] <= tile.width <= _WIDTHS[1] or not 1 <= tile.pages <= most_pages:
            return False
        if not 1 <= tile.num_warps <= _MAX_WARPS or not 1 <= tile.num_stages <= _MAX_STAGES:
            return False
    if not 1 <= plan.num_splits <= MAX_SPLITS or plan.num_splits > -(
        -cell.site.num_inputs // plan.shrink.width
    ):
        return False
    rank_rows = _power_of_2_above(cell.site.num_linears * PAGE_ROWS * plan.shrink.pages)
    staged = (plan.block_rows + rank_rows) * plan.shrink.width * cell.itemsize * plan.shrink.num_stages
    if staged > device.shared_bytes:
        return False
    sums = (
        (plan.block_rows * rank_rows, plan.shrink.num_warps),
        (plan.block_rows * plan.expand.width, plan.expand.num_warps),
    )
    return all(count <= _MAX_SUMS * 32 * warps for count, warps in sums)


def block_choices(block_rows: int) -> list[int]:
    """Rows of a block to try: the present ones first, then half and twice as many."""
    return [rows for rows in (block_rows, block_rows // 2, 2 * block_rows) if 16 <= rows <= 128]


def _power_of_2_above(n: int) -> int:
    return 1 << (n - 1).bit_length()
