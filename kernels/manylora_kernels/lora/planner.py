"""Chooses how a step is cut into programs: from a shipped table of the device, else by the formula.

Shape key: T rows.

A plan is chosen on the host from shapes alone, never from which adapters are active, so that a captured graph
serves any mix.
"""

from __future__ import annotations

import functools

import torch

from manylora_kernels.device import Device
from manylora_kernels.lora import plan_file
from manylora_kernels.lora.plan import (
    PREFILL_BLOCK_ROWS,
    Plan,
    PlanKey,
    PlanTable,
    formula,
)
from manylora_kernels.shapes import SiteShape


@functools.lru_cache(maxsize=16)
def table_of(device: Device) -> PlanTable:
    """The shipped table of a device; an empty one where none is shipped."""
    return plan_file.shipped(device.name)


def block_rows(num_rows: int, device: Device) -> int:
    """Rows of a route's blocks in a step of T rows. One for all sites, since the route is made once."""
    limits = table_of(device).rows_of_blocks
    return next((rows for limit, rows in limits if num_rows <= limit), PREFILL_BLOCK_ROWS)


def one_adapter_rows(device: Device) -> int:
    """From so many rows a step of one adapter alone goes to the vendor's matrix products."""
    return table_of(device).one_adapter_rows


@functools.lru_cache(maxsize=4096)
def choose(
    num_rows: int,
    site: SiteShape,
    max_pages: int,
    dtype: torch.dtype,
    device: Device,
) -> Plan:
    """Choose for a step of T rows at a site whose pool has `dtype`.

    A row's bits depend on the plan, and so on T, but on nothing else of the batch.
    """
    rows = block_rows(num_rows, device)
    key = PlanKey(site, dtype.itemsize, max_pages)
    for found, limit, plan in table_of(device).plans:
        if found == key and num_rows <= limit and plan.block_rows == rows:
            return plan
    return formula(num_rows, rows, key, device)


def distinct(
    row_counts: tuple[int, ...],
    site: SiteShape,
    max_pages: int,
    dtype: torch.dtype,
    device: Device,
) -> dict[Plan, int]:
    """Every plan that steps of these numbers of rows use, with the least such number."""
    found: dict[Plan, int] = {}
    for num_rows in sorted(row_counts):
        found.setdefault(choose(num_rows, site, max_pages, dtype, device), num_rows)
    return found
