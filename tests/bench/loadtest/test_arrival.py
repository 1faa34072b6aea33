"""When requests are due, and that the driver sends them then."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.loadtest.arrival import Arrival
from bench.loadtest.driver import TargetError, drive
from bench.loadtest.record import Record
from bench.loadtest.workload import Case


class Answers:
    """Stands for the queue of ended requests: each `get` ends the last one that was sent."""

    def __init__(self) -> None:
        self.under_way: list[int] = []
        self.most = 0
        self.sent: list[int] = []

    def send(self, index: int, record: Record) -> None:
        self.sent.append(index)
        self.under_way.append(index)
        self.most = max(self.most, len(self.under_way))

    def get(self, timeout: float) -> int:
        if self.under_way:
            return self.under_way.pop()
        # Nothing can end before the next request is due.
        return queue.SimpleQueue[int]().get(timeout=timeout)


def run(case: Case, answers: Answers) -> tuple[float, list[Record], int]:
    ticks: list[None] = []
    ended: Any = answers
    begin_s, records = drive(case, answers.send, ended, is_streamed=True, progress=lambda: ticks.append(None))
    return begin_s, records, len(ticks)


def test_all_are_due_at_once_without_a_rate():
    assert Arrival().due_times(3, seed=0) == [0.0, 0.0, 0.0]
    assert Arrival(num_clients=2).due_times(3, seed=0) == [0.0, 0.0, 0.0]
    assert Arrival().due_times(0, seed=0) == []


def test_poisson_arrivals_have_exponential_distances_of_the_rate():
    due = np.array(Arrival(rate_per_s=50.0).due_times(20_001, seed=3))
    gaps = np.diff(due)
    assert due[0] == 0.0
    assert (gaps >= 0).all()
    # 20,000 draws: a mean's standard error is 0.7%, and as many standard deviations as means.
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.04)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.04)
    assert (gaps > 1 / 50).mean() == pytest.approx(np.exp(-1), rel=0.04)


def test_a_seed_gives_the_same_arrivals_and_another_seed_others():
    arrival = Arrival(rate_per_s=2.0)
    assert arrival.due_times(5, seed=1) == arrival.due_times(5, seed=1)
    assert arrival.due_times(5, seed=1) != arrival.due_times(5, seed=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"rate_per_s": -1.0}, "rate -1.0", id="negative rate"),
        pytest.param({"rate_per_s": float("inf")}, "rate inf", id="endless rate"),
        pytest.param({"rate_per_s": float("nan")}, "rate nan", id="no rate"),
        pytest.param({"num_clients": -1}, "-1 clients", id="negative clients"),
        pytest.param({"rate_per_s": 1.0, "num_clients": 1}, "exclude each other", id="both"),
    ],
)
def test_an_impossible_process_is_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Arrival(**arguments)


@pytest.mark.parametrize(
    ("arrival", "kind", "label", "limit"),
    [
        pytest.param(Arrival(), "at-once", "at once", 5, id="at once"),
        pytest.param(Arrival(rate_per_s=0.5), "poisson", "0.5/s", 5, id="poisson"),
        pytest.param(Arrival(num_clients=1), "closed", "1 client", 1, id="one client"),
        pytest.param(Arrival(num_clients=8), "closed", "8 clients", 5, id="more clients than requests"),
    ],
)
def test_names_and_most_under_way(arrival: Arrival, kind: str, label: str, limit: int):
    assert (arrival.kind, arrival.label, arrival.max_in_flight(5)) == (kind, label, limit)


@pytest.mark.parametrize("num_clients", [1, 3, 7])
def test_a_closed_loop_has_never_more_under_way_than_clients(
    make_case: Callable[..., Case], num_clients: int
):
    answers = Answers()
    begin_s, records, num_ticks = run(make_case(7, num_clients=num_clients), answers)
    assert answers.most == num_clients
    assert answers.sent == list(range(7))
    assert num_ticks == len(records) == 7
    # A client's request is due when it is sent.
    assert records[0].due_s >= begin_s
    assert [r.due_s for r in records] == sorted(r.due_s for r in records)


def test_all_at_once_are_under_way_together(make_case: Callable[..., Case]):
    answers = Answers()
    begin_s, records, _ = run(make_case(7), answers)
    assert answers.most == 7
    assert {record.due_s for record in records} == {begin_s}


def test_at_a_rate_records_are_due_at_their_time_and_not_when_they_are_sent(make_case: Callable[..., Case]):
    case = make_case(5, rate_per_s=200.0)
    begin_s, records, _ = run(case, Answers())
    assert [record.due_s for record in records] == [begin_s + due for due in case.due_times()]


def test_a_target_that_answers_nothing_is_given_up(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("bench.loadtest.driver.TIMEOUT_S", 0.01)
    with pytest.raises(TargetError, match=r"no answer for 0\.01 s, 3 are due"):
        drive(make_case(3), lambda *_: None, queue.SimpleQueue(), is_streamed=True, progress=lambda: None)
