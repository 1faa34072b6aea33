"""The GPU suite's goals: what a run is told of itself, and what the page shows of it."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import adapter_copy, report_results
from bench.gpu import goals, names, part_copy, part_exposed, shapes, verdict_file
from bench.gpu.clock import Timing
from bench.gpu.floors import Bandwidth
from bench.gpu.forms import ONE_ADAPTER, OURS, SGLANG_CSGMV, SGLANG_V2, VLLM
from bench.gpu.rows import Context, Row
from bench.gpu.shapes import LLAMA_LAYER, Point
from bench.loadtest.csv_file import append_csv
from bench.loadtest.origin import Origin


@pytest.fixture
def context() -> Context:
    return Context(
        origin=Origin(
            run="2026-11-24T10:00:00+00:00",
            label="h200",
            commit="abc1234",
            device="NVIDIA H200",
            threads=8,
            python="3.12.1",
            torch="2.11.0",
            transformers="5.17.0",
            peft="",
            command="python bench/gpu_suite.py --save",
        ),
        triton="3.6.0",
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        layer=LLAMA_LAYER,
        bandwidth=Bandwidth(read=4.3e12, copy=4.0e12),
        peers=Path("nowhere"),
        repeats=1,
        proofs=3,
    )


WHOLE = goals.Whole(
    num_proofs=1,
    compared=shapes.GOAL_POINTS,
    checked=tuple(
        found for found in goals.CHECKED if found[0] != "kernels" or found[2] in shapes.GOAL_POINTS
    ),
    num_copies=1,
)


def good_rows(context: Context) -> list[Row]:
    """A run that meets every goal."""

    def timed(part: str, form: str, point: Point | None, median: float, **values: object) -> Row:
        values = {"result": "ok", "error": 1e-3} | values
        return context.row(part, form, point, Timing(median, median, median), **values)

    many, wide, one, long = shapes.GOAL_POINTS
    alone = ((many, 29.0), (wide, 199.0), (one, 9.0), (long, 900.0))
    rows = [timed("kernels alone", OURS, point, micros, floor_us=micros / 2) for point, micros in alone]
    rows += [
        timed("kernels", form, point, micros * times, floor_us=micros / 2)
        for point, micros in alone[:3]
        for form, times in ((OURS, 1.0), (VLLM, 1.6), (SGLANG_V2, 1.5), (SGLANG_CSGMV, 4.0))
    ]
    rows += [
        timed("kernels", OURS, long, 900.0),
        timed("kernels", ONE_ADAPTER, long, 500.0),
        timed("kernels", VLLM, long, 800.0),
        timed("kernels", SGLANG_V2, long, 760.0),
        timed("kernels", SGLANG_CSGMV, long, 790.0),
    ]
    rows += [
        timed("pool rank", OURS, point, 15.0 + i / 10) for i, point in enumerate(shapes.POOL_RANK_POINTS)
    ]
    rows += [
        timed("exposed", part_exposed.IN_TURN, point, 120.0, extra_us=10.0) for point in part_exposed.POINTS
    ]
    rows += [
        timed("exposed", part_exposed.BESIDE, point, 115.0, extra_us=5.0 + point.num_rows / 64)
        for point in part_exposed.DECODE_POINTS
    ]
    rows += [
        timed("exposed", part_exposed.BASE, long, 5400.0),
        timed("exposed", part_exposed.LINEARS, long, 5000.0),
        timed("exposed", ONE_ADAPTER, long, 5990.0, extra_us=590.0),
        timed("exposed", part_exposed.FUSED, long, 5690.0, extra_us=290.0),
    ]
    ran = f"ok; {names.REPLAYED_ALL} 50 steps"
    rows += [
        timed("decode", names.ENGINE, None, 4300.0, rows=32, adapters=0, floor_us=3490.0, result=ran),
        timed("decode", names.ENGINE, None, 5400.0, rows=32, adapters=32, floor_us=4110.0, result=ran),
        timed("copy", "pages in one run", None, 1100.0, rank="16", floor_us=1000.0),
    ]
    rows.append(context.row("proofs", "decode: same bits", result="same bits 1000 times"))
    return rows


def verdict(rows: list[Row], title: str) -> tuple[str, str]:
    """What was found for the goal whose title begins so, and the verdict."""
    return next(
        (found, said) for name, _, _, found, said in goals.judge(rows, WHOLE) if name.startswith(title)
    )


def test_a_run_that_meets_every_goal_is_told_so(context: Context) -> None:
    judged = goals.judge(good_rows(context), WHOLE)
    assert [said for *_, said in judged] == ["met"] * len(goals.GOALS), judged


def test_without_rows_nothing_is_met() -> None:
    assert {said for *_, said in goals.judge([], WHOLE)} == {"not measured"}


def test_times_that_mean_nothing_are_not_judged(context: Context) -> None:
    said = [found[-1] for found in goals.judge(good_rows(context), WHOLE, timed=False)]
    assert said == ["not measured"] * (len(goals.GOALS) - 2) + ["met"] * 2


@pytest.mark.parametrize(
    ("title", "part", "form", "change"),
    [
        ("decode, 32 rows, 32 adapters", "kernels alone", OURS, {"median_us": 30.5}),
        ("decode, 64 rows", "kernels alone", OURS, {"median_us": 201.0}),
        ("decode, 1 to 32 rows of one", "exposed", part_exposed.BESIDE, {"extra_us": 6.5}),
        ("against vLLM", "kernels", VLLM, {"median_us": 1.0}),
        ("against SGLang", "kernels", SGLANG_CSGMV, {"median_us": 1.0}),
        ("32 adapters of rank 8", "pool rank", OURS, {"median_us": 17.0}),
        ("prefill", "exposed", ONE_ADAPTER, {"extra_us": 601.0}),
        ("the same, fused", "exposed", part_exposed.FUSED, {"extra_us": 301.0}),
        ("decode step", "decode", names.ENGINE, {"median_us": 4400.0}),
        ("the same with 32", "decode", names.ENGINE, {"median_us": 5600.0}),
        ("adapter host", "copy", "pages in one run", {"median_us": 1201.0}),
        ("right", "kernels", OURS, {"result": "wrong: qkv: error 3 of the largest result"}),
        ("the same bits", "proofs", "decode: same bits", {"result": "wrong: other bits in 1 of 1000 runs"}),
    ],
)
def test_a_goal_that_is_missed_is_told_so(
    context: Context, title: str, part: str, form: str, change: dict[str, object]
) -> None:
    rows = good_rows(context)
    matching = [i for i, row in enumerate(rows) if (row.part, row.form) == (part, form)]
    hit = [i for i in matching if len(matching) == 1 or _is_of(title, rows[i])]
    rows[hit[0]] = replace(rows[hit[0]], **change)  # type: ignore[arg-type]
    assert verdict(rows, title)[1] == "not met"


def _is_of(title: str, row: Row) -> bool:
    """Whether a goal reads this one of several rows of its form."""
    if title.startswith("decode, 64"):
        return row.rows == 64
    if title.startswith("the same with 32"):
        return row.adapters == 32
    return not title.startswith("32 adapters of rank 8") or row.pool_rank == 64


def test_the_best_of_the_peers_counts_and_both_of_our_forms(context: Context) -> None:
    found, _ = verdict(good_rows(context), "against SGLang")
    assert found == "slower at 0 of 4 points; 1.50 times faster in the median"


@pytest.mark.parametrize(
    ("title", "part", "form", "said"),
    [
        ("decode, 1 to 32 rows of one", "exposed", part_exposed.BESIDE, "not measured (2 of 3)"),
        ("against vLLM", "kernels", VLLM, "not measured (3 of 4)"),
        ("against SGLang", "kernels", SGLANG_CSGMV, "not measured (3 of 4)"),
        ("right", "exposed", part_exposed.IN_TURN, "not measured (13 of 14)"),
        ("the same bits", "proofs", "decode: same bits", "not measured"),
        ("adapter host", "copy", "pages in one run", "not measured"),
    ],
)
def test_a_run_that_was_cut_meets_no_goal_it_has_not_seen_the_whole_of(
    context: Context, title: str, part: str, form: str, said: str
) -> None:
    rows = good_rows(context)
    rows.remove(next(row for row in rows if (row.part, row.form) == (part, form)))
    assert verdict(rows, title)[1] == said


def test_the_form_that_the_engine_takes_counts_whether_it_is_the_faster_or_not(context: Context) -> None:
    slow = {("kernels", ONE_ADAPTER): {"median_us": 1000.0}, ("exposed", ONE_ADAPTER): {"extra_us": 700.0}}
    rows = [replace(row, **slow.get((row.part, row.form), {})) for row in good_rows(context)]  # type: ignore[arg-type]
    assert verdict(rows, "against vLLM") == (
        "slower at 1 of 4 points; 1.60 times faster in the median", "not met"
    )  # fmt: skip
    assert verdict(rows, "prefill") == ("14.0% (one adapter)", "not met")


def test_steps_that_ran_operator_by_operator_are_no_measure_of_the_engine(context: Context) -> None:
    rows = [replace(row, result="ok; no graphs; replayed 0 of 50 steps") for row in good_rows(context)]
    found, said = verdict(rows, "decode step")
    assert found.startswith("1.23")
    assert said == "not measured: steps were not replayed from graphs"


def test_microseconds_are_not_judged_on_another_device(context: Context) -> None:
    rows = [replace(row, device="NVIDIA H100 80GB HBM3") for row in good_rows(context)]
    assert verdict(rows, "decode, 32 rows, 32") == ("29.0 us", "not judged: goals are for H200")
    assert verdict(rows, "prefill")[1] == "met"


def test_a_floor_is_of_the_bandwidth_that_the_run_has_found_at_last(context: Context) -> None:
    rows = [replace(row, moved_bytes=15_000_000_000) for row in good_rows(context)]
    judged = goals.judge(rows, replace(WHOLE, read=4.0e12))
    assert next(found for name, _, _, found, _ in judged if name.startswith("decode step")).startswith("1.15")


def test_verdicts_of_a_run_take_the_place_of_its_earlier_ones(context: Context, tmp_path: Path) -> None:
    path, other = tmp_path / "gpu_goals.csv", replace(context.origin, run="2026-11-25T10:00:00+00:00")
    verdict_file.write(path, context.origin, [("a", "1", "", "", "not measured")])
    verdict_file.write(path, other, [("a", "1", "", "2", "not met")])
    verdict_file.write(path, context.origin, [("a", "1", "", "1", "met")])
    with path.open() as file:
        found = [(row["run"][:10], row["verdict"]) for row in csv.DictReader(file)]
    assert found == [("2026-11-25", "not met"), ("2026-11-24", "met")]


def test_the_page_shows_a_run(context: Context, tmp_path: Path) -> None:
    rows = good_rows(context)
    rows.append(
        context.row("kernels", "grouped_mm", shapes.GOAL_POINTS[0], result="missing: no such operator")
    )
    append_csv(tmp_path / "gpu_suite.csv", rows)
    (tmp_path / "gpu_kernels_h200.png").write_bytes(b"")
    page = report_results.page(tmp_path)
    assert (
        "| rows | adapters | rank | pool rank | rows by adapter | without | floor | manylora | vllm |" in page
    )
    assert "| 32 | 32 | 16 | 16 | even | 0% | 14.5 | 29.0 | 46.4 | 43.5 | 116.0 | - |" in page
    assert "- kernels, grouped_mm: missing: no such operator" in page
    assert "![gpu kernels h200](results/gpu_kernels_h200.png)" in page
    assert "Other plots" not in page


def test_rows_of_the_copies_bench_fit_into_the_suites_columns(context: Context) -> None:
    (found,) = adapter_copy.measure(torch.device("cpu"), shapes.TINY_LAYER, [16], 1)
    found |= {"median_us": 1700.0, "plain_median_us": 1500.0}
    row = context.row("copy", "runs of pages: 1", **part_copy.columns(found))
    assert (row.rank, row.median_us, row.floor_us) == ("16", 1700.0, 1500.0)
    assert row.moved_bytes == found["adapter_bytes"]
    assert verdict([row], "adapter host")[1] == "met"
