"""Writes measured plans into the shipped file of a device, in the form that `plan_file` reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from manylora_kernels.lora import plan_file
from manylora_kernels.lora.plan import Plan, PlanTable, Tile

from bench.gpu.tune_space import Cell


def path_of(device_name: str, folder: Path = plan_file.FOLDER) -> tuple[str, Path]:
    """The file of a device: the one whose device its name begins with, else a new one.

    Returns:
        What the file says of the device, and its path.
    """
    best: tuple[str, Path] | None = None
    for path in sorted(folder.glob("*.json")):
        name, _ = plan_file.read(path)
        if device_name.startswith(name) and (best is None or len(name) > len(best[0])):
            best = name, path
    slug = re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")
    return best or (device_name, folder / f"{slug}.json")


def known(path: Path) -> PlanTable:
    """What the file has already; an empty table where there is no file.

    Raises:
        ValueError: a file that `plan_file` refuses.
    """
    return plan_file.read(path)[1] if path.is_file() else PlanTable()


def merged(table: PlanTable, found: Mapping[Cell, Plan]) -> list[dict[str, object]]:
    """The entries of a file: what was found now, and what the table has for other cells."""
    entries = {(key, limit): plan for key, limit, plan in table.plans}
    entries |= {(cell.key, cell.max_rows): plan for cell, plan in found.items()}
    return [
        {
            "num_inputs": key.site.num_inputs,
            "widths": list(key.site.widths),
            "itemsize": key.itemsize,
            "max_pages": key.max_pages,
            "max_rows": limit,
            "num_splits": plan.num_splits,
            "shrink": _tile(plan.shrink),
            "expand": _tile(plan.expand),
        }
        for (key, limit), plan in sorted(
            entries.items(), key=lambda entry: (str(entry[0][0].site), entry[0][0].max_pages, entry[0][1])
        )
    ]


def write(
    path: Path,
    device: str,
    measured: Mapping[str, str],
    entries: list[dict[str, object]],
    rows_of_blocks: tuple[tuple[int, int], ...],
    one_adapter_rows: int,
) -> None:
    """Write a file, and keep the old one unless `plan_file` reads the new one.

    Args:
        measured: how: versions, the date.

    Raises:
        ValueError: what `plan_file` refuses.
    """
    content = {
        "device": device,
        "measured": dict(measured),
        "rows_of_blocks": [list(pair) for pair in rows_of_blocks],
        "one_adapter_rows": one_adapter_rows,
        "plans": entries,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(_text(content))
    try:
        plan_file.read(draft)
    except ValueError:
        draft.unlink()
        raise
    draft.replace(path)


def _tile(tile: Tile) -> dict[str, object]:
    return asdict(tile)


def _text(content: Mapping[str, object]) -> str:
    """JSON with a line for each plan."""
    plans = content["plans"]
    assert isinstance(plans, list)
    head = {name: value for name, value in content.items() if name != "plans"}
    lines = [f'  "{name}": {json.dumps(value)},' for name, value in head.items()]
    body = ",\n".join(f"    {json.dumps(entry)}" for entry in plans)
    return "\n".join(["{", *lines, '  "plans": [' + (f"\n{body}\n  ]" if plans else "]"), "}", ""])
