"""RESULTS.md, made from rows; and that the one in bench/ is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from bench import report_results
from bench.loadtest.csv_file import append_csv
from bench.loadtest.origin import Origin, command_line
from bench.loadtest.row import Row, Setting
from bench.paths import ROOT


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Origin):
    """As bench/faults.py and its like keep theirs."""

    fault: str
    recovery_s: float


@pytest.fixture
def origin(setting: Setting) -> Origin:
    return Origin(**{name: value for name, value in asdict(setting).items() if name in report_results.ORIGIN})


def test_the_page_in_bench_is_what_its_rows_give(capsys: pytest.CaptureFixture[str]):
    assert report_results.main(["--check"]) == 0, capsys.readouterr().err


def test_a_page_is_written_and_then_is_what_the_rows_give(
    tmp_path: Path, make_rows: Callable[..., list[Row]], capsys: pytest.CaptureFixture[str]
):
    append_csv(tmp_path / "serving.csv", make_rows())
    arguments = [f"--results={tmp_path}", f"--page={tmp_path / 'RESULTS.md'}"]
    assert report_results.main([*arguments, "--check"]) == 1
    assert "RESULTS.md is not what the rows give" in capsys.readouterr().err
    assert report_results.main(arguments) == 0
    assert report_results.main([*arguments, "--check"]) == 0
    append_csv(tmp_path / "serving.csv", [replace(row, run="2026-11-25T00:00:00") for row in make_rows()])
    assert report_results.main([*arguments, "--check"]) == 1


def test_without_rows_the_page_says_so(tmp_path: Path):
    assert report_results.page(tmp_path / "nowhere").endswith("There are no rows yet.\n")


def test_a_serving_run_has_its_command_its_origin_and_its_tables(
    tmp_path: Path, make_rows: Callable[..., list[Row]]
):
    append_csv(tmp_path / "serving.csv", make_rows())
    assert (
        report_results.page(tmp_path).split("### ")[1]
        == """\
w1

`python bench/serving.py --preset w1`

2026-11-24 10:00:00 UTC, commit abc1234, a processor, 2 cores, 2 threads; \
python 3.11.2, torch 2.13.0, transformers 5.23.0, peft 0.21.2.

tiny (float32); 1 requests of 2 prompt and 20 output tokens, rank 16, even skew, 2 rounds. \
Rates are medians of the rounds, with tokens a second of the worst and the best.

| target | mix | req/s | tok/s | least | most | errors |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
| engine | base | 0.75 | 15.0 | 10.0 | 20.0 | 0 |
| peft | base | 0.15 | 3.0 | 2.0 | 4.0 | 0 |
| engine | 4 adapters | 0.38 | 7.5 | 5.0 | 10.0 | 0 |
| peft | 4 adapters | 0.07 | 1.5 | 1.0 | 2.0 | 0 |

First token and time between tokens in ms, whole answer in s:

| target | mix | first p50 | p90 | p99 | next p50 | p90 | p99 | whole p50 | p90 | p99 |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| engine | base | 750 | 950 | 995 | 75.0 | 100.0 | 100.0 | 1.50 | 1.90 | 1.99 |
| peft | base | 3750 | 4750 | 4975 | 375.0 | 500.0 | 500.0 | 7.50 | 9.50 | 9.95 |
| engine | 4 adapters | 1500 | 1900 | 1990 | 150.0 | 200.0 | 200.0 | 3.00 | 3.80 | 3.98 |
| peft | 4 adapters | 7500 | 9500 | 9950 | 750.0 | 1000.0 | 1000.0 | 15.00 | 19.00 | 19.90 |

Tokens a second compared, round by round:

| ratio | median | least | most |
| --- | ---: | ---: | ---: |
| engine: 4 adapters / base | 0.500 | 0.500 | 0.500 |
| peft: 4 adapters / base | 0.500 | 0.500 | 0.500 |
| peft / engine: base | 0.200 | 0.200 | 0.200 |
| peft / engine: 4 adapters | 0.200 | 0.200 | 0.200 |

What the engine counted, all rounds together:

| target | mix | steps | host loads | device copies | preemptions | hit tokens |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
| engine | base | 18 | 0 | 0 | 0 | 0 |
| peft | base | 18 | 0 | 0 | 0 | 0 |
| engine | 4 adapters | 18 | 0 | 0 | 0 | 0 |
| peft | 4 adapters | 18 | 0 | 0 | 0 | 0 |
"""
    )


def test_the_latest_run_of_each_label_is_shown_and_rows_without_a_label_are_not(
    tmp_path: Path, origin: Origin
):
    def row(label: str, day: int, fault: str) -> Ended:
        run = f"2026-11-{day:02}T10:00:00+00:00"
        return Ended(**asdict(origin) | {"label": label, "run": run}, fault=fault, recovery_s=1.25)

    rows = [
        row("a", 3, "first"),
        row("a", 3, "second"),
        row("a", 2, "old"),
        row("b", 1, "b|d"),
        row("", 9, "x"),
    ]
    append_csv(tmp_path / "faults.csv", rows)
    found = report_results.page(tmp_path)
    tables = [line for line in found.splitlines() if line.startswith("|") and "---" not in line]
    assert tables == [
        "| fault | recovery s |",
        "| first | 1.25 |",
        "| second | 1.25 |",
        "| fault | recovery s |",
        "| b\\|d | 1.25 |",
    ]


def test_plots_stand_with_their_label_and_files_that_are_not_known_are_named(
    tmp_path: Path, make_rows: Callable[..., list[Row]]
):
    append_csv(tmp_path / "serving.csv", [replace(row, label="load") for row in make_rows()])
    for name in ("latency_by_load.png", "queue.png", "other.csv"):
        (tmp_path / name).write_text("")
    serving, others = report_results.page(tmp_path).split("## Other plots")
    assert "![latency by load](results/latency_by_load.png)" in serving
    assert "![queue](results/queue.png)" in others
    assert "latency_by_load" not in others
    assert "Not shown here: `results/other.csv`." in others


@pytest.mark.parametrize("name", ["serving", "soak"])
def test_rows_of_other_columns_are_an_error(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / f"{name}.csv").write_text("date,commit\n2026-11-24,abc\n")
    assert report_results.main([f"--results={tmp_path}", "--check"]) == 1
    assert "expected rows whose first columns are run,label" in capsys.readouterr().err


def test_a_command_is_kept_as_given_in_the_checkout():
    argv = [str(ROOT / "bench" / "soak.py"), "--csv", f"{ROOT}/bench/results/a b.csv", "--save"]
    assert command_line(argv) == "python bench/soak.py --csv 'bench/results/a b.csv' --save"
