"""Read the shipped tables of plans, `plans/*.json`, one for each kind of device.

    {"device": "NVIDIA H200",               what the device's name begins with
     "measured": {"triton": "3.6.0"},       how, for the reader; null where nothing was measured
     "rows_of_blocks": [[128, 16]],         optional: up to 128 rows, blocks of 16
     "one_adapter_rows": 1024,              optional
     "plans": [{"num_inputs": 4096, "widths": [4096], "itemsize": 2, "max_pages": 1, "max_rows": 32,
                "num_splits": 16, "shrink": {"width": 128, "pages": 1, "num_warps": 4, "num_stages": 4},
                "expand": {...}}]}

A plan serves steps of at most `max_rows` rows, down to the next smaller entry of the same site.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manylora_kernels.lora.plan import PREFILL_BLOCK_ROWS, Plan, PlanKey, PlanTable, Tile
from manylora_kernels.shapes import SiteShape

FOLDER = Path(__file__).parent / "plans"

_POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_ALLOWED: dict[str, Sequence[int]] = {
    "itemsize": (2, 4),
    "block_rows": (16, 32, 64, 128),
    "num_splits": (1, 2, 4, 8, 16, 32),
    "width": _POWERS[4:],
    "pages": (1, 2, 4, 8),
    "num_warps": (1, 2, 4, 8),
    "num_stages": range(1, 9),
}
_ENTRY = ("num_inputs", "widths", "itemsize", "max_pages", "max_rows", "num_splits", "shrink", "expand")
_TILE = ("width", "pages", "num_warps", "num_stages")


def shipped(device_name: str, folder: Path = FOLDER) -> PlanTable:
    """The table whose device the name begins with; of several the longest; without one an empty table.

    Raises:
        ValueError: a file that is not what this module's docstring says.
    """
    best, table = "", PlanTable()
    for path in sorted(folder.glob("*.json")):
        name, found = read(path)
        if device_name.startswith(name) and len(name) > len(best):
            best, table = name, found
    return table


def read(path: Path) -> tuple[str, PlanTable]:
    """Read one file: the beginning of the device's name, and its table.

    Raises:
        ValueError: a file that is not what this module's docstring says.
    """
    try:
        content = json.loads(path.read_text())
        return _table(content)
    except (OSError, ValueError) as error:
        raise ValueError(f"plans in {path.name}: {error}") from error


def _table(content: Any) -> tuple[str, PlanTable]:
    optional = ("rows_of_blocks", "one_adapter_rows")
    _expect_keys("the file", content, ("device", "measured", "plans"), optional)
    device = content["device"]
    if not isinstance(device, str) or not device:
        raise ValueError(f"device: found {device!r}, allowed the beginning of a device's name")
    table = PlanTable()
    limits = content.get("rows_of_blocks", table.rows_of_blocks)
    if not _is_list(limits) or not all(_is_list(pair) and len(pair) == 2 for pair in limits):
        raise ValueError(f"rows_of_blocks: found {limits!r}, allowed a list of [most rows, rows of a block]")
    rows_of_blocks = tuple((_count("rows_of_blocks", a), _one_of("block_rows", b)) for a, b in limits)
    if [a for a, _ in rows_of_blocks] != sorted({a for a, _ in rows_of_blocks}):
        raise ValueError(f"rows_of_blocks: found {limits!r}, allowed ascending numbers of rows")
    if not _is_list(content["plans"]):
        raise ValueError(f"plans: found {type(content['plans']).__name__}, allowed a list")
    plans = [_entry(f"plans[{i}]", entry, rows_of_blocks) for i, entry in enumerate(content["plans"])]
    if len({(key, limit) for key, limit, _ in plans}) < len(plans):
        raise ValueError("plans: found two entries for the same site and max_rows, allowed one")
    return device, PlanTable(
        rows_of_blocks=rows_of_blocks,
        one_adapter_rows=_count("one_adapter_rows", content.get("one_adapter_rows", table.one_adapter_rows)),
        plans=tuple(sorted(plans, key=lambda plan: plan[1])),
    )


def _entry(name: str, entry: Any, rows_of_blocks: Sequence[tuple[int, int]]) -> tuple[PlanKey, int, Plan]:
    _expect_keys(name, entry, _ENTRY)
    widths = entry["widths"]
    if not _is_list(widths) or not widths:
        raise ValueError(f"{name}.widths: found {widths!r}, allowed a list of numbers above 0")
    site = SiteShape(
        _count(f"{name}.num_inputs", entry["num_inputs"]),
        tuple(_count(f"{name}.widths", width) for width in widths),
    )
    itemsize = _one_of("itemsize", entry["itemsize"], name)
    key = PlanKey(site, itemsize, _count(f"{name}.max_pages", entry["max_pages"]))
    limit = _count(f"{name}.max_rows", entry["max_rows"])
    plan = Plan(
        block_rows=next((rows for most, rows in rows_of_blocks if limit <= most), PREFILL_BLOCK_ROWS),
        num_splits=_one_of("num_splits", entry["num_splits"], name),
        shrink=_tile(f"{name}.shrink", entry["shrink"]),
        expand=_tile(f"{name}.expand", entry["expand"]),
    )
    return key, limit, plan


def _tile(name: str, tile: Any) -> Tile:
    _expect_keys(name, tile, _TILE)
    return Tile(**{field: _one_of(field, tile[field], name) for field in _TILE})


def _expect_keys(name: str, found: Any, required: Sequence[str], optional: Sequence[str] = ()) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(f"{name}: found {type(found).__name__}, allowed an object")
    missing, unknown = set(required) - set(found), set(found) - set(required) - set(optional)
    if missing or unknown:
        raise ValueError(
            f"{name}: missing {sorted(missing)}, unknown {sorted(unknown)}; "
            f"allowed {list(required)} and optionally {list(optional)}"
        )


def _is_list(found: Any) -> bool:
    return isinstance(found, list | tuple)


def _count(name: str, found: Any) -> int:
    if type(found) is not int or found < 1:
        raise ValueError(f"{name}: found {found!r}, allowed a whole number above 0")
    return found


def _one_of(field: str, found: Any, name: str = "") -> int:
    if type(found) is not int or found not in _ALLOWED[field]:
        where = f"{name}.{field}" if name else field
        raise ValueError(f"{where}: found {found!r}, allowed {list(_ALLOWED[field])}")
    return found
