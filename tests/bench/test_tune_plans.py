"""The search of plans: what is tried, what is kept, and that the file it writes is what the kernels go by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from manylora_kernels import SiteShape
from manylora_kernels.device import Device
from manylora_kernels.lora import plan, plan_file, planner
from manylora_kernels.lora.plan import Plan, PlanTable, Tile

from bench import tune_plans
from bench.gpu import tune_bench, tune_file, tune_search, tune_space
from bench.gpu.budget import Deadline
from bench.gpu.shapes import LLAMA_LAYER, TINY_LAYER
from bench.gpu.tune_space import Cell

from .programs import run_python

H200 = Device("NVIDIA H200", num_units=132, shared_bytes=227 << 10, has_dependent_launch=True)
START = Plan(16, 4, Tile(128, 1, 4, 4), Tile(128, 1, 4, 1))


def cells() -> list[Cell]:
    """Those that are searched for Llama-3-8B."""
    return [
        Cell(name, site, rows, pages, 2)
        for name, site in LLAMA_LAYER.items()
        for rows in tune_plans.ROWS
        for pages in tune_plans.PAGES
    ]


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: f"{cell.name}-{cell.max_rows}-{cell.max_pages}")
def test_all_that_is_tried_fits_the_device_and_the_plan_file(cell: Cell, tmp_path: Path) -> None:
    block_rows = planner.block_rows(cell.max_rows, H200)
    start = cell.start(block_rows, H200)
    assert tune_space.fits(start, cell, H200)
    tried = tune_space.neighbours(start, cell, H200)
    assert len(tried) == len(set(tried)) > 8
    assert start not in tried
    for one in tried:
        assert one.block_rows == block_rows
        assert one.num_splits * one.shrink.width <= 2 * cell.site.num_inputs
        entries = tune_file.merged(PlanTable(), {cell: one})
        tune_file.write(tmp_path / "a.json", "a", {}, entries, plan.ROWS_OF_BLOCKS, 1024)
        (kept,) = plan_file.read(tmp_path / "a.json")[1].plans
        assert kept == (cell.key, cell.max_rows, one)


def test_plans_that_a_device_cannot_hold_are_not_tried() -> None:
    cell = Cell("qkv", LLAMA_LAYER["qkv"], 8192, 4, 2)
    small = replace(H200, shared_bytes=64 << 10)
    tried = tune_space.neighbours(cell.start(64, small), cell, small)
    assert tried
    for one in tried:
        rank_rows = 1 << (3 * 16 * one.shrink.pages - 1).bit_length()
        assert (64 + rank_rows) * one.shrink.width * 2 * one.shrink.num_stages <= small.shared_bytes


def never() -> Deadline:
    return Deadline(1.0, lambda: 0.0)


class Timed:
    """Costs by a formula, which counts what is asked."""

    def __init__(self, wrong: Sequence[Plan] = ()) -> None:
        self.asked: list[Plan] = []
        self.wrong = wrong

    def __call__(self, one: Plan) -> float:
        self.asked.append(one)
        if one in self.wrong:
            return math.inf
        distance = abs(math.log2(one.num_splits / 16)) + abs(math.log2(one.expand.width / 512))
        return 10.0 + distance + one.shrink.num_warps


CELL = Cell("o", SiteShape(4096, (4096,)), 32, 1, 2)


def near(one: Plan) -> list[Plan]:
    return tune_space.neighbours(one, CELL, H200)


def test_the_search_goes_down_to_the_best_and_times_no_plan_twice() -> None:
    cost = Timed()
    best, found = tune_search.descend(START, near, cost, never())
    assert (best.num_splits, best.expand.width, best.shrink.num_warps) == (16, 512, 1)
    assert found == cost(best)
    assert len(cost.asked) - 1 == len(set(cost.asked))


def test_a_plan_that_is_wrong_or_hardly_faster_is_not_taken() -> None:
    better = replace(START, num_splits=8)
    cost = Timed(wrong=[better])
    best, _ = tune_search.descend(START, lambda one: [better], cost, never())
    assert (best, cost.asked) == (START, [START, better])
    times = {START: 100.0, better: 98.5}
    assert tune_search.descend(START, lambda one: [better], times.__getitem__, never()) == (START, 100.0)


def test_where_every_plan_is_wrong_the_search_ends_and_says_so() -> None:
    best, found = tune_search.descend(START, near, lambda one: math.inf, never())
    assert (best, found) == (START, math.inf)


def test_the_search_ends_with_the_time_and_gives_the_best_so_far() -> None:
    now = [0.0]

    def cost(one: Plan) -> float:
        now[0] += 1.0
        return 100.0 / now[0]

    best, found = tune_search.descend(START, near, cost, Deadline(4.0, lambda: now[0]))
    assert now[0] == 4.0
    assert best != START
    assert found == 25.0


def test_what_is_timed_next_is_prepared_before() -> None:
    prepared: list[Plan] = []

    def cost(one: Plan) -> float:
        assert one in prepared
        return Timed()(one)

    tune_search.descend(START, near, cost, never(), prepared.extend)


def test_blocks_are_chosen_by_rows_and_stay_unless_others_are_clearly_faster() -> None:
    costs = {32: {16: 1.0, 32: 2.0}, 128: {16: 3.0, 32: 2.0}, 512: {32: 5.0, 64: 4.0}}
    assert tune_search.rows_of_blocks(costs) == ((32, 16), (128, 32), (512, 64))
    costs = {8: {16: 1.0, 32: 0.99}, 32: {16: 1.0, 32: 1.0}, 128: {32: 1.0, 16: 2.0}}
    assert tune_search.rows_of_blocks(costs) == ((32, 16), (128, 32))


@pytest.mark.parametrize(
    ("times", "rows"),
    [
        ({512: (5.0, 9.0), 1024: (9.0, 9.5), 2048: (20.0, 15.0), 8192: (80.0, 50.0)}, 2048),
        ({512: (5.0, 4.0), 2048: (20.0, 25.0), 8192: (80.0, 50.0)}, 8192),
        ({512: (5.0, 4.0), 8192: (80.0, 90.0)}, 1 << 20),
    ],
    ids=["from_2048", "not_at_2048", "never"],
)
def test_products_serve_from_where_they_are_faster_and_stay_so(
    times: dict[int, tuple[float, float]], rows: int
) -> None:
    assert tune_search.one_adapter_rows(times) == rows


def test_a_device_has_the_shipped_file_that_it_is_named_after_or_one_of_its_own(tmp_path: Path) -> None:
    device, path = tune_file.path_of("NVIDIA H100 80GB HBM3")
    assert (device, path.name) == ("NVIDIA H100", "nvidia_h100.json")
    assert tune_file.path_of("NVIDIA L40S", tmp_path) == ("NVIDIA L40S", tmp_path / "nvidia_l40s.json")


def test_the_file_that_is_written_is_read_and_its_plans_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = replace(START, num_splits=2, expand=Tile(256, 1, 8, 1))
    wide = Cell("o", CELL.site, 32, 4, 2)
    path = tmp_path / "some_card.json"
    entries = tune_file.merged(PlanTable(), {CELL: tuned, wide: START})
    tune_file.write(path, "Some Card", {"triton": "3.6.0"}, entries, ((128, 16), (512, 32)), 2048)
    device = Device("Some Card 80GB", num_units=100, shared_bytes=227 << 10, has_dependent_launch=True)
    table = plan_file.shipped(device.name, tmp_path)
    monkeypatch.setattr(planner, "table_of", lambda _device: table)
    bf16 = torch.bfloat16
    assert planner.choose(32, CELL.site, 1, bf16, device) == tuned
    assert planner.choose(7, CELL.site, 1, bf16, device) == tuned
    assert planner.choose(32, CELL.site, 4, bf16, device) == START
    # More rows, other pages and other sites have the formula's.
    assert planner.choose(33, CELL.site, 1, bf16, device) == plan.formula(33, 16, CELL.key, device)
    assert planner.one_adapter_rows(device) == 2048


def test_a_second_run_adds_to_what_the_first_has_found(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    other = replace(CELL, max_rows=64)
    limits = ((128, 16), (512, 32))
    tune_file.write(path, "a", {}, tune_file.merged(PlanTable(), {CELL: START}), limits, 1024)
    better = replace(START, num_splits=8)
    entries = tune_file.merged(tune_file.known(path), {other: START, CELL: better})
    tune_file.write(path, "a", {}, entries, limits, 1024)
    assert tune_file.known(path).plans == ((CELL.key, 32, better), (other.key, 64, START))


def test_what_the_kernels_would_not_read_does_not_replace_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    tune_file.write(path, "a", {}, [], plan.ROWS_OF_BLOCKS, 1024)
    before = path.read_text()
    bad = tune_file.merged(PlanTable(), {CELL: replace(START, num_splits=3)})
    with pytest.raises(ValueError, match="num_splits"):
        tune_file.write(path, "a", {}, bad, plan.ROWS_OF_BLOCKS, 1024)
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == before


def test_a_plan_is_measured_with_many_adapters_and_with_one() -> None:
    assert [point.num_adapters for point in tune_bench.points_of(CELL)] == [32, 1]
    (one,) = tune_bench.points_of(replace(CELL, max_rows=1))
    assert one.num_adapters == 1
    (point, _) = tune_bench.points_of(Cell("o", CELL.site, 2048, 4, 2))
    assert (point.num_adapters, point.pool_rank) == (8, 64)


@pytest.mark.slow
def test_the_logic_runs_from_end_to_end_in_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "plans.json"
    arguments = [
        "--cpu-logic",
        "--rows",
        "4",
        "--pages",
        "1",
        "--budget-s",
        "15",
        "--one-adapter",
        "--out",
        str(out),
    ]
    done = run_python(tune_plans.__file__, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong" not in done.stdout
    device, table = plan_file.read(out)
    assert device == "interpreter"
    sites = {key.site for key, _, _ in table.plans}
    assert sites
    assert sites <= set(TINY_LAYER.values())


def test_an_interpreters_plans_are_not_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune_plans.main(["--cpu-logic"])
    assert "--out" in capsys.readouterr().err
