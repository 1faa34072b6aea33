"""Plans: the formula, and what a shipped table may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manylora_kernels import SiteShape
from manylora_kernels.device import Device
from manylora_kernels.lora import plan, plan_file, planner

H200 = Device("NVIDIA H200", num_units=132, shared_bytes=227 << 10, has_dependent_launch=True)
SMALL = Device("some card", num_units=20, shared_bytes=64 << 10, has_dependent_launch=False)
QKV = SiteShape(4096, (4096, 1024, 1024))

TILE = {"width": 128, "pages": 1, "num_warps": 4, "num_stages": 3}
ENTRY = {
    "num_inputs": 4096,
    "widths": [4096, 1024, 1024],
    "itemsize": 2,
    "max_pages": 1,
    "max_rows": 32,
    "num_splits": 4,
    "shrink": TILE,
    "expand": TILE,
}


def write(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({"device": "NVIDIA H200", "measured": None, "plans": [], **changes}))
    return path


@settings(deadline=None)
@given(
    num_rows=st.integers(1, 20000),
    num_inputs=st.integers(1, 30000),
    widths=st.lists(st.integers(1, 30000), min_size=1, max_size=5),
    max_pages=st.integers(1, 16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    device=st.sampled_from([H200, SMALL]),
)
def test_the_formula_fits_every_shape(
    num_rows: int, num_inputs: int, widths: list[int], max_pages: int, dtype: torch.dtype, device: Device
) -> None:
    site = SiteShape(num_inputs, tuple(widths))
    chosen = planner.choose(num_rows, site, max_pages, dtype, device)
    assert chosen.block_rows == planner.block_rows(num_rows, device)
    assert 1 <= chosen.num_splits <= plan.MAX_SPLITS
    assert chosen.num_splits & (chosen.num_splits - 1) == 0
    # No program of shrink is without inputs.
    assert (chosen.num_splits - 1) * chosen.shrink.width < num_inputs
    assert chosen.shrink.pages <= 4
    assert chosen.expand.pages <= 4


def test_few_plans_cover_all_numbers_of_rows() -> None:
    plans = planner.distinct(tuple(range(1, 8193)), QKV, 4, torch.bfloat16, H200)
    assert len(plans) <= 8
    assert min(plans.values()) == 1
    for chosen, num_rows in plans.items():
        assert planner.choose(num_rows, QKV, 4, torch.bfloat16, H200) == chosen


def test_a_prefill_step_of_few_blocks_is_split_over_the_device() -> None:
    splits = [planner.choose(rows, QKV, 1, torch.bfloat16, H200).num_splits for rows in (1024, 2048, 8192)]
    assert splits == [8, 4, 1]


def test_shipped_files_are_valid() -> None:
    names = [plan_file.read(path)[0] for path in plan_file.FOLDER.glob("*.json")]
    assert {"NVIDIA H100", "NVIDIA H200"} <= set(names)


def test_the_longest_beginning_of_the_name_wins(tmp_path: Path) -> None:
    write(tmp_path, "a.json", device="NVIDIA H100", one_adapter_rows=1)
    write(tmp_path, "b.json", device="NVIDIA H100 PCIe", one_adapter_rows=2)
    write(tmp_path, "c.json", device="NVIDIA H200", one_adapter_rows=3)
    assert plan_file.shipped("NVIDIA H100 PCIe", tmp_path).one_adapter_rows == 2
    assert plan_file.shipped("NVIDIA H100 80GB HBM3", tmp_path).one_adapter_rows == 1
    assert plan_file.shipped("NVIDIA A100", tmp_path) == plan.PlanTable()


def test_a_measured_plan_serves_its_shape_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.json", plans=[{**ENTRY, "max_rows": 128}, {**ENTRY, "max_rows": 8, "num_splits": 2}])
    table = plan_file.shipped("NVIDIA H200", tmp_path)
    monkeypatch.setattr(planner, "table_of", lambda device: table)
    planner.choose.cache_clear()
    try:
        splits = {
            rows: planner.choose(rows, QKV, 1, torch.bfloat16, H200).num_splits for rows in (1, 8, 9, 128)
        }
        assert splits == {1: 2, 8: 2, 9: 4, 128: 4}
        assert planner.choose(129, QKV, 1, torch.bfloat16, H200).block_rows == 32
        assert planner.choose(8, QKV, 2, torch.bfloat16, H200).num_splits == plan.MAX_SPLITS
    finally:
        planner.choose.cache_clear()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": ""}, "device: found ''"),
        ({"extra": 1}, r"the file: missing \[\], unknown \['extra'\]"),
        ({"plans": {}}, "plans: found dict, allowed a list"),
        ({"rows_of_blocks": [[128]]}, r"rows_of_blocks: found \[\[128\]\]"),
        ({"rows_of_blocks": [[128, 17]]}, "block_rows: found 17"),
        ({"rows_of_blocks": [[512, 16], [128, 16]]}, "allowed ascending"),
        ({"one_adapter_rows": 0}, "one_adapter_rows: found 0, allowed a whole number above 0"),
        ({"plans": [{}]}, r"plans\[0\]: missing"),
        ({"plans": [{**ENTRY, "widths": []}]}, r"plans\[0\].widths: found \[\]"),
        ({"plans": [{**ENTRY, "num_inputs": 2.5}]}, r"plans\[0\].num_inputs: found 2.5"),
        ({"plans": [{**ENTRY, "num_splits": 3}]}, r"plans\[0\].num_splits: found 3"),
        ({"plans": [{**ENTRY, "shrink": {**TILE, "width": 100}}]}, r"plans\[0\].shrink.width: found 100"),
        ({"plans": [{**ENTRY, "expand": 4}]}, r"plans\[0\].expand: found int, allowed an object"),
        ({"plans": [ENTRY, ENTRY]}, "two entries for the same site"),
    ],
)
def test_a_file_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, "bad.json", **changes)
    with pytest.raises(ValueError, match=rf"plans in bad.json: .*{message}"):
        plan_file.read(path)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"plans in bad.json: "):
        plan_file.read(tmp_path / "bad.json")
