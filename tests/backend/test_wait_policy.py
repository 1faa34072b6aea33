"""When the OpenMP threads of a step spin and when they sleep, and that they then do."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from manylora import Engine, EngineConfig
from manylora.wait_policy import (
    FREE_S,
    IDLE_S,
    LEAST_WAITED,
    LOOK_S,
    MOST_WAITED,
    SleepingThreads,
    WaitPolicy,
)
from manylora_kernels.compiled import openmp_runtime

FAR_S = 120.0
BESIDE = MOST_WAITED + 0.1
BETWEEN = (MOST_WAITED + LEAST_WAITED) / 2


class Run:
    """A policy under a clock and a count of the test's own."""

    def __init__(self, num_threads: int = 2) -> None:
        self.now_s = 1000.0
        self.waited_s = 7.0
        self.policy = WaitPolicy(num_threads, lambda: self.waited_s)
        self.policy.look(self.now_s)

    def steps(self, seconds: float, share: float) -> bool:
        """Steps of 20 ms, and what the policy is then."""
        for _ in range(round(seconds / 0.02)):
            self.now_s += 0.02
            self.waited_s += share * 0.02
            self.policy.look(self.now_s)
        return self.policy.is_passive


@pytest.fixture
def run() -> Iterator[Run]:
    """Of two threads."""
    run = Run()
    yield run
    run.policy.close()


def test_threads_spin_on_free_processors(run: Run) -> None:
    assert not run.steps(5, 0.0)
    assert not run.steps(5, BETWEEN)


def test_threads_sleep_while_others_want_the_processors(run: Run) -> None:
    assert run.steps(3 * LOOK_S, BESIDE)
    assert run.steps(10, BETWEEN), "sleeping threads wait less, and others are there still"
    assert run.steps(FREE_S / 2, 0.0), "a moment says nothing"
    assert run.steps(FREE_S / 2, BETWEEN)
    assert run.steps(FREE_S / 2, 0.0)
    assert not run.steps(FREE_S, 0.0)
    assert run.steps(3 * LOOK_S, BESIDE), "others may come again"


def test_time_without_steps_says_nothing(run: Run) -> None:
    run.now_s += IDLE_S
    run.waited_s += IDLE_S
    assert not run.steps(LOOK_S, 0.0)
    assert run.steps(3 * LOOK_S, BESIDE)
    run.now_s += 100 * FREE_S
    assert run.steps(FREE_S / 2, 0.0), "processors are not known to have been free meanwhile"


def test_a_step_of_one_thread_waits_for_nobody() -> None:
    assert not Run(num_threads=1).steps(5, BESIDE)


def test_both_changes_are_news_once(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            run.steps(3 * LOOK_S, BESIDE)
            run.steps(FREE_S + 3 * LOOK_S, 0.0)
    assert [record.message for record in caplog.records] == [
        "other processes want the processors: threads of a step sleep at once",
        "the processors are free again: threads of a step spin before they sleep",
    ]


def num_sleeps() -> int:
    """How often threads of this process have gone to sleep."""
    total = 0
    for thread in os.listdir("/proc/self/task"):
        for line in Path(f"/proc/self/task/{thread}/status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                total += int(line.split()[1])
    return total


PARTS = 200


def sleeps_between_parallel_parts() -> int:
    """How often threads sleep while this one computes for a moment between two parallel operators."""
    values = torch.ones(1_000_000)
    values.add_(1)
    before = num_sleeps()
    for _ in range(PARTS):
        values.add_(1)
        until_s = time.perf_counter() + 1e-3
        while time.perf_counter() < until_s:
            pass
    return num_sleeps() - before


@pytest.fixture
def all_processors() -> int:
    """Operators use them all."""
    number = len(os.sched_getaffinity(0))
    if number < 2:
        pytest.skip("one thread waits for nobody")
    torch.set_num_threads(number)
    return number


@pytest.mark.alone
def test_threads_that_sleep_beside_make_those_of_an_operator_sleep_at_once(all_processors: int) -> None:
    runtime = openmp_runtime()
    assert runtime
    beside = SleepingThreads(runtime)
    spinning = sleeps_between_parallel_parts()
    beside.start()
    try:
        time.sleep(0.5)
        sleeping = sleeps_between_parallel_parts()
    finally:
        beside.stop()
    again = sleeps_between_parallel_parts()
    assert sleeping > PARTS / 2
    assert max(spinning, again) < PARTS / 4, (spinning, sleeping, again)


def test_an_engine_beside_busy_processes_lets_its_threads_sleep(
    tiny_model: Callable[..., Path], all_processors: int, caplog: pytest.LogCaptureFixture
) -> None:
    """With the tokens that it gives in quiet."""
    prompt = [[5, 6, 7]]
    config = EngineConfig(base_model=str(tiny_model("llama")), num_threads=all_processors)
    with caplog.at_level(logging.DEBUG), Engine(config) as engine:
        wanted = engine.generate(prompt, max_tokens=16, ignore_eos=True)[0].token_ids
        started = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * all_processors)
        ]
        try:
            until_s = time.monotonic() + FAR_S
            while "sleep at once" not in caplog.text:
                assert time.monotonic() < until_s
                assert engine.generate(prompt, max_tokens=16, ignore_eos=True)[0].token_ids == wanted
            assert engine.generate(prompt, max_tokens=16, ignore_eos=True)[0].token_ids == wanted
        finally:
            for process in started:
                process.kill()
                process.wait()
