"""What is made of the times of single requests: rates, percentiles, ratios, rows and their CSV."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.loadtest.csv_file import append_csv, read_csv
from bench.loadtest.record import Record, Round
from bench.loadtest.row import Row, Setting, make_row, percentiles_ms, ratio
from bench.loadtest.workload import Case


def streamed(due_s: float, *replies: tuple[float, int]) -> Record:
    record = Record(due_s, is_streamed=True)
    for at_s, count in replies:
        record.add(at_s, [0] * count)
    return record


def test_times_of_a_stream_count_from_when_it_was_due():
    record = streamed(10.0, (10.5, 1), (10.7, 2), (11.0, 1))
    assert record.first_token_s() == pytest.approx(0.5)
    assert record.latency_s == pytest.approx(1.0)
    # The second reply's two tokens share its 0.2 s.
    assert record.between_tokens_s() == pytest.approx([0.1, 0.1, 0.3])


def test_an_answer_in_one_piece_has_its_latency_only():
    record = Record(10.0, is_streamed=False)
    record.add(12.0, [1, 2, 3])
    assert record.first_token_s() is None
    assert record.between_tokens_s() == []
    assert record.latency_s == pytest.approx(2.0)


def test_a_request_that_failed_before_its_first_token_has_no_time_of_it():
    record = Record(10.0, is_streamed=True)
    record.fail(11.0, "UNAVAILABLE")
    assert record.first_token_s() is None
    assert record.error == "UNAVAILABLE"


def test_rates_leave_failed_requests_out_and_last_until_the_last_end():
    failed = streamed(0.0, (1.0, 5))
    failed.fail(4.0, "INTERNAL")
    one = Round([streamed(0.0, (1.0, 2)), streamed(0.0, (2.0, 4)), failed], 0.0, {})
    assert one.duration_s == 4.0
    assert one.tokens_per_s == pytest.approx(6 / 4)
    assert one.requests_per_s == pytest.approx(2 / 4)
    assert one.errors() == {"INTERNAL": 1}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param([], (None, None, None), id="none"),
        pytest.param([0.25], (250.0, 250.0, 250.0), id="one"),
        pytest.param([i / 100 for i in range(101)], (500.0, 900.0, 990.0), id="evenly from 0 to 1 s"),
    ],
)
def test_percentiles(values: list[float], expected: tuple[float | None, ...]):
    assert percentiles_ms(values) == pytest.approx(expected)


def test_a_ratio_is_of_neighbouring_rounds(make_round: Callable[..., Round]):
    upper, lower = [make_round(rate) for rate in (10, 40, 60)], [make_round(rate) for rate in (10, 20, 20)]
    assert ratio(upper, lower) == pytest.approx((2.0, 1.0, 3.0))


def test_a_ratio_to_nothing_is_none(make_round: Callable[..., Round]):
    assert ratio([make_round(10)], None) == (None, None, None)
    assert ratio([make_round(10)], [make_round(10, error="INTERNAL")]) == (None, None, None)


def test_a_row_has_medians_over_rounds_and_errors_by_code(
    setting: Setting, make_case: Callable[..., Case], make_round: Callable[..., Round]
):
    rounds = [make_round(10, steps=3), make_round(20, steps=4), make_round(5, error="UNAVAILABLE", steps=5)]
    row = make_row(setting, "engine", make_case(1, 4, num_clients=2), rounds)
    assert (row.tok_s, row.tok_s_min, row.tok_s_max) == pytest.approx((10.0, 0.0, 20.0))
    assert (row.errors, row.error_codes) == (1, "UNAVAILABLE=1")
    assert (row.mix, row.adapters, row.arrival, row.clients) == ("mixed", 4, "closed", 2)
    assert (row.mix_label, row.load_label) == ("4 adapters", "2 clients")
    # 20 tokens in 2 s and in 1 s, half of them at half the time.
    assert row.ttft_ms_p50 == pytest.approx(750.0)
    assert row.e2e_ms_p50 == pytest.approx(1500.0)
    assert row.itl_ms_p50 == pytest.approx(75.0)
    assert (row.steps, row.host_loads) == (12, 0)
    assert row.vs_base is row.vs_first is None


def test_counters_that_cannot_be_seen_are_none_and_not_zero(
    setting: Setting, make_case: Callable[..., Case], make_round: Callable[..., Round]
):
    row = make_row(setting, "peft", make_case(1), [make_round(10)])
    assert (row.mix_label, row.load_label, row.steps) == ("base", "at once", None)


def test_rows_come_back_from_the_csv_as_they_were(tmp_path: Path, make_rows: Callable[..., list[Row]]):
    path = tmp_path / "results" / "serving.csv"
    first, second = make_rows(), make_rows(rate_per_s=0.5)
    append_csv(path, first)
    append_csv(path, second)
    found = read_csv(path, Row)
    assert len(found) == len(first + second)
    for row, wanted in zip(found, first + second, strict=True):
        for field in dataclasses.fields(Row):
            value, expected = getattr(row, field.name), getattr(wanted, field.name)
            # Five digits are kept.
            assert value == (pytest.approx(expected, rel=1e-4) if isinstance(expected, float) else expected)
            assert type(value) is type(expected) or isinstance(expected, int)


def test_a_csv_of_other_columns_is_refused_and_left_alone(
    tmp_path: Path, make_rows: Callable[..., list[Row]]
):
    path = tmp_path / "serving.csv"
    path.write_text("date,commit\n")
    with pytest.raises(
        ValueError, match=re.escape(f"{path} has the columns date,commit; expected run,label")
    ):
        append_csv(path, make_rows())
    assert path.read_text() == "date,commit\n"
