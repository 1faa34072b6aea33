"""Hand-made records, cases, settings and rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.loadtest.arrival import Arrival
from bench.loadtest.record import Record, Round
from bench.loadtest.row import Row, Setting, make_row
from bench.loadtest.workload import Case, Request

from ...backend.conftest import tiny_model

__all__ = ["tiny_model"]


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """`make_case(3, rate_per_s=2.0)`: requests of one prompt and two tokens, to base or an adapter."""

    def make(num_requests: int, num_adapters: int = 0, **arrival: Any) -> Case:
        name = "pirate" if num_adapters else ""
        request = Request(prompt=[7, 8], adapter=name, num_output=2)
        return Case(
            requests=[request] * num_requests, arrival=Arrival(**arrival), num_adapters=num_adapters, seed=0
        )

    return make


@pytest.fixture
def make_round() -> Callable[..., Round]:
    """`make_round(10.0)`: one request of 20 tokens, answered at this rate in two replies."""

    def make(tokens_per_s: float, *, error: str = "", **counters: int) -> Round:
        record = Record(due_s=100.0, is_streamed=True)
        end_s = 100.0 + 20 / tokens_per_s
        if error:
            record.fail(end_s, error)
        else:
            record.add((100.0 + end_s) / 2, [1] * 10)
            record.add(end_s, [2] * 10)
        return Round([record], 100.0, counters)

    return make


@pytest.fixture
def setting() -> Setting:
    return Setting(
        run="2026-11-24T10:00:00+00:00",
        label="w1",
        commit="abc1234",
        device="a processor, 2 cores",
        threads=2,
        python="3.11.2",
        torch="2.13.0",
        transformers="5.23.0",
        peft="0.21.2",
        command="python bench/serving.py --preset w1",
        model="tiny",
        dtype="float32",
        rank="16",
        skew="even",
        requests=1,
        prompt="2",
        output="20",
        seed=0,
        options="",
        rounds=2,
    )


@pytest.fixture
def make_rows(
    setting: Setting, make_case: Callable[..., Case], make_round: Callable[..., Round]
) -> Callable[..., list[Row]]:
    """Rows of the targets engine (10 and 20 tokens/s, half of it with adapters) and peft (a fifth of it)."""

    def make(**arrival: Any) -> list[Row]:
        rounds = {
            (target, count): [make_round(share * rate / (2 if count else 1), steps=9) for rate in (10, 20)]
            for target, share in (("engine", 1.0), ("peft", 0.2))
            for count in (0, 4)
        }
        return [
            make_row(
                setting,
                target,
                make_case(1, count, **arrival),
                rounds[target, count],
                base=rounds[target, 0] if count else None,
                first=rounds["engine", count] if target == "peft" else None,
            )
            for count in (0, 4)
            for target in ("engine", "peft")
        ]

    return make
