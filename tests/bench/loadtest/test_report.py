"""Rows as tables and as plots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench.loadtest import plots, table
from bench.loadtest.row import Row

PNG = b"\x89PNG\r\n\x1a\n"


def test_throughput(make_rows: Callable[..., list[Row]]):
    rows = make_rows()
    rows[3] = replace(rows[3], errors=2, error_codes="INTERNAL=2")
    assert table.throughput(rows).plain() == (
        "target  mix         req/s  tok/s  least  most         errors\n"
        "engine  base         0.75   15.0   10.0  20.0              0\n"
        "peft    base         0.15    3.0    2.0   4.0              0\n"
        "engine  4 adapters   0.38    7.5    5.0  10.0              0\n"
        "peft    4 adapters   0.08    1.5    1.0   2.0  2: INTERNAL=2"
    )


def test_latency(make_rows: Callable[..., list[Row]]):
    rows = make_rows()[:2]
    rows[1] = replace(rows[1], ttft_ms_p50=None, ttft_ms_p90=None, ttft_ms_p99=None)
    assert table.latency(rows).plain() == (
        "target  mix   first p50  p90  p99  next p50    p90    p99  whole p50   p90   p99\n"
        "engine  base        750  950  995      75.0  100.0  100.0       1.50  1.90  1.99\n"
        "peft    base          -    -    -     375.0  500.0  500.0       7.50  9.50  9.95"
    )


def test_ratios(make_rows: Callable[..., list[Row]]):
    assert table.ratios(make_rows()).plain() == (
        "ratio                      median  least   most\n"
        "engine: 4 adapters / base   0.500  0.500  0.500\n"
        "peft: 4 adapters / base     0.500  0.500  0.500\n"
        "peft / engine: base         0.200  0.200  0.200\n"
        "peft / engine: 4 adapters   0.200  0.200  0.200"
    )


def test_counters_are_of_targets_that_could_be_asked(make_rows: Callable[..., list[Row]]):
    rows = make_rows()[:2]
    rows[1] = replace(rows[1], steps=None)
    assert table.counters(rows).lines == [["engine", "base", "18", "0", "0", "0", "0"]]


def test_the_load_is_told_where_it_differs(make_rows: Callable[..., list[Row]]):
    one = table.throughput(make_rows(num_clients=2))
    several = table.throughput(make_rows(num_clients=2) + make_rows(num_clients=4))
    assert "load" not in one.header
    assert [line[2] for line in several.lines] == ["2 clients"] * 4 + ["4 clients"] * 4


def test_markdown(make_rows: Callable[..., list[Row]]):
    assert table.ratios(make_rows()[:2]).markdown() == (
        "| ratio | median | least | most |\n| --- | ---: | ---: | ---: |\n"
        "| peft / engine: base | 0.200 | 0.200 | 0.200 |"
    )


def test_tables_have_at_most_100_columns(make_rows: Callable[..., list[Row]]):
    long = [
        replace(
            row,
            target="grpc-stream",
            adapters=1000,
            tok_s=123456.7,
            tok_s_min=99999.9,
            tok_s_max=234567.8,
            e2e_ms_p50=123456.0,
            e2e_ms_p90=234567.0,
            e2e_ms_p99=345678.0,
            ttft_ms_p99=23456.0,
            itl_ms_p99=2345.6,
            steps=123456,
        )
        for clients in (1, 32)
        for row in make_rows(num_clients=clients)
    ]
    for make in (table.throughput, table.latency, table.ratios, table.counters):
        found = make(long)
        assert "load" in found.header
        assert max(map(len, found.plain().splitlines())) <= 100


@pytest.mark.parametrize(
    ("counts", "loads", "names"),
    [
        pytest.param((0, 4), (1,), [], id="nothing to draw"),
        pytest.param((0, 1, 4), (1,), ["throughput_by_adapters.png"], id="numbers of adapters"),
        pytest.param((0, 4), (1, 2), ["latency_by_load.png", "throughput_by_load.png"], id="loads"),
    ],
)
def test_plots_are_drawn_of_what_the_rows_sweep(
    counts: tuple[int, ...],
    loads: tuple[int, ...],
    names: list[str],
    make_rows: Callable[..., list[Row]],
    tmp_path: Path,
):
    rows = [
        replace(row, adapters=count)
        for clients in loads
        for count in counts
        for row in make_rows(num_clients=clients)[:2]
    ]
    made = plots.draw(rows, tmp_path)
    assert [path.name for path in made] == names
    for path in made:
        assert path.read_bytes().startswith(PNG)


def test_targets_without_times_of_tokens_are_drawn_where_they_have_times(
    make_rows: Callable[..., list[Row]], tmp_path: Path
):
    nothing = dict.fromkeys([f"{name}_ms_p{p}" for name in ("ttft", "itl") for p in (50, 90, 99)])
    rows = [replace(row, **nothing) for rate in (0.5, 2.0) for row in make_rows(rate_per_s=rate)]  # type: ignore[arg-type]
    assert len(plots.draw(rows, tmp_path)) == 2
