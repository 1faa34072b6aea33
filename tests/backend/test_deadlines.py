"""Whoever runs out of time is told so within a step: in the queue, while its adapter loads, while it runs."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from manylora import Engine, EngineConfig
from manylora.adapters import reader as reader_module
from manylora.engine import engine as engine_module
from manylora.engine import inbox as inbox_module
from manylora.engine.flight import Flight
from manylora.engine.sequence import Sequence, State
from manylora.engine.step import Step
from manylora.errors import UnavailableError
from manylora.messages import Failed, Generate, SamplingParams, Tokens

from .inbox import PATIENCE_S, Inbox
from .test_scheduler import make, sequence, step

PARAMS = SamplingParams(max_tokens=200, ignore_eos=True)


def timed(number: int, deadline_s: float, **params: Any) -> Sequence:
    s = sequence(number, **params)
    s.deadline_s = deadline_s
    s.deadline_ms = int(deadline_s * 1000)
    return s


def test_each_place_has_its_message() -> None:
    scheduler = make(max_num_seqs=1)
    running, waiting = timed(0, 5.0, max_tokens=50), timed(1, 5.0)
    loading, later = timed(2, 5.0, adapter="slow"), timed(3, 6.0)
    loading.lease.state = "loading"
    for s in (running, waiting, loading, later):
        scheduler.add(s)
    for _ in range(3):
        step(scheduler)
    scheduler.expire(4.999)
    assert scheduler.failed == []
    scheduler.expire(5.0)
    assert [(s, e.code, e.message) for s, e in scheduler.failed] == [
        (running, "UNAVAILABLE", "deadline_ms=5000 passed after 3 of 50 tokens"),
        (waiting, "UNAVAILABLE", "deadline_ms=5000 passed while waiting"),
        (loading, "UNAVAILABLE", "deadline_ms=5000 passed while waiting for adapter 'slow' to load"),
    ]
    assert scheduler.deadlines.num_missed == 3
    assert (scheduler.waiting, scheduler.running) == ([later], [])
    assert scheduler.check() == []
    assert step(scheduler) == [(3, 3)]


def test_what_a_preempted_sequence_had_is_told() -> None:
    scheduler = make(num_blocks=4, max_batched_tokens=16)
    old, young = sequence(0, prompt=7, max_tokens=8), timed(1, 5.0, prompt=7, max_tokens=8)
    scheduler.add(old)
    scheduler.add(young)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert young.state is State.WAITING
    scheduler.expire(9.0)
    ((ended, error),) = scheduler.failed
    assert ended is young
    assert error.message == "deadline_ms=5000 passed after 2 of 8 tokens"


def test_the_next_deadline_is_known_whoever_ended_before_it() -> None:
    scheduler = make()
    sequences = [timed(n, deadline_s) for n, deadline_s in enumerate((7.0, 3.0, 0.0, 5.0))]
    for s in sequences:
        scheduler.add(s)
    assert scheduler.deadlines.next_s == 3.0
    scheduler.remove(sequences[1])
    scheduler.expire(4.0)
    assert (scheduler.failed, scheduler.deadlines.next_s) == ([], 5.0)
    scheduler.expire(100.0)
    assert [s for s, _ in scheduler.failed] == [sequences[0], sequences[3]]
    assert scheduler.deadlines.next_s == float("inf")
    assert scheduler.waiting == [sequences[2]]


def make_config(base: Path, adapter_root: Path, **changes: object) -> EngineConfig:
    return EngineConfig(base_model=str(base), adapter_root=str(adapter_root), num_threads=1, **changes)


def test_an_idle_engine_wakes_for_a_deadline(
    base: Path, adapter_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing runs: the only sequence waits for an adapter whose files do not come."""
    gate = threading.Event()
    read_adapter = reader_module.read_adapter

    def read(*args: Any, **options: Any) -> object:
        assert gate.wait(PATIENCE_S)
        return read_adapter(*args, **options)

    monkeypatch.setattr(reader_module, "read_adapter", read)
    try:
        with Engine(make_config(base, adapter_root)) as engine:
            inbox = Inbox(engine)
            message = Generate(
                id=0,
                input_ids=[5, 6],
                adapter_id="a",
                params=PARAMS,
                deadline_ms=50,
                deadline_s=time.monotonic() + 0.05,
            )
            inbox.session.send(message)
            failed = inbox.until_end(0)[0]
            assert isinstance(failed, Failed)
            assert failed.code == "UNAVAILABLE"
            assert failed.message == "deadline_ms=50 passed while waiting for adapter 'a' to load"
            status = engine.status()
            assert status.check_errors == []
            assert (status.counters["deadline_missed"], status.counters["failed"]) == (1, 1)
            gate.set()
            (after,) = engine.generate([[5, 6]], adapter_ids=["a"], max_tokens=2)
            assert len(after.token_ids) == 2
    finally:
        gate.set()


def test_a_deadline_that_is_past_already_loads_nothing(base: Path, adapter_root: Path) -> None:
    with Engine(make_config(base, adapter_root)) as engine:
        inbox = Inbox(engine)
        past = Generate(
            id=0, input_ids=[5], adapter_id="a", params=PARAMS, deadline_ms=1, deadline_s=time.monotonic() - 1
        )
        inbox.session.send(past)
        assert inbox.until_end(0)[0].message == "deadline_ms=1 passed while waiting for adapter 'a' to load"
        status = engine.status()
    assert (status.counters["host_loads"], status.counters["steps"]) == (0, 0)
    assert status.adapters == []
    assert status.check_errors == []


def test_a_running_sequence_and_one_in_the_queue_end_within_a_step(
    base: Path, adapter_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock jumps in the middle of the third step."""
    now = SimpleNamespace(s=100.0)
    for module in (engine_module, inbox_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now.s))
    with Engine(make_config(base, adapter_root, max_num_seqs=1)) as engine:
        launch, num_steps = engine.runner.launch, SimpleNamespace(done=0)

        def launch_slowly(step: Step) -> Flight:
            flight = launch(step)
            num_steps.done += 1
            if num_steps.done == 3:
                now.s += 10
            return flight

        monkeypatch.setattr(engine.runner, "launch", launch_slowly)
        inbox = Inbox(engine)
        for i, deadline_s in enumerate((105.0, 105.0, 0.0)):
            params = PARAMS if i < 2 else SamplingParams(max_tokens=2, ignore_eos=True)
            message = Generate(id=i, input_ids=[5, 6], params=params, deadline_ms=5000, deadline_s=deadline_s)
            inbox.session.send(message)
        last = inbox.until_end(0, 1, 2)
        status = engine.status()
    assert isinstance(last[2], Tokens)
    assert [last[i].message for i in (0, 1)] == [
        "deadline_ms=5000 passed after 3 of 200 tokens",
        "deadline_ms=5000 passed while waiting",
    ]
    # Two of the one without a deadline; none more of those whose time is up.
    assert num_steps.done == 5
    assert status.gauges["kv_blocks_free"] == status.gauges["kv_blocks_total"]
    assert (status.counters["deadline_missed"], status.check_errors) == (2, [])


def test_a_call_in_process_has_a_deadline_too(
    base: Path, adapter_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(make_config(base, adapter_root)) as engine:
        (found,) = engine.generate([[5, 6]], max_tokens=2, deadline_ms=2**31 - 1)
        assert len(found.token_ids) == 2
        clock = SimpleNamespace(monotonic=lambda: 1e15)
        for module in (engine_module, inbox_module):
            monkeypatch.setattr(module, "time", clock)
        with pytest.raises(UnavailableError, match="deadline_ms=5000 passed while waiting"):
            engine.generate([[5, 6]], max_tokens=2, deadline_ms=5000)
        assert engine.status().gauges["waiting"] == 0
