"""A step that is launched before the one in front of it has landed changes no token of anybody.

A GPU is served so. On a CPU the device is never behind, but the engine sees the same: tokens that it does not
know yet.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from manylora import Engine, EngineConfig
from manylora.engine import runner
from manylora.engine.flight import Flight
from manylora.engine.schedule import Schedule
from manylora.engine.scheduler import Scheduler
from manylora.engine.sequence import State
from manylora.engine.step import Step
from manylora.messages import Generate, SamplingParams, Tokens

from .inbox import PATIENCE_S, Inbox
from .test_scheduler import EOS, make, result, sequence

Request = tuple[list[int], str, dict[str, object]]
Told = tuple[list[int], str]
"""Tokens and finish reason."""
ADAPTERS = ("", "small", "large", "scaled")
PARAMS: tuple[dict[str, object], ...] = (
    {"max_tokens": 20},
    {"max_tokens": 1},
    {"max_tokens": 2, "ignore_eos": True},
    {"max_tokens": 33, "ignore_eos": True, "logprobs": 3},
    {"max_tokens": 25, "min_tokens": 9},
    {"max_tokens": 25, "temperature": 1.0, "seed": 11},
    {"max_tokens": 25, "temperature": 3.0, "seed": 12, "min_tokens": 4, "logprobs": 1},
    {"max_tokens": 15, "temperature": 1.2, "top_p": 0.8, "top_k": 30, "seed": 13},
)
PENALTIES: dict[str, object] = {
    "max_tokens": 18, "repetition_penalty": 1.4, "frequency_penalty": 0.3, "ignore_eos": True
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter_root(
    base: Path, make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate(zip(ADAPTERS[1:], (4, 40, 16), strict=True)):
        make_adapter(base, root / name, seed, r=rank, target_modules=["q_proj", "down_proj"])
    return root


def requests(num: int, params: tuple[dict[str, object], ...] = PARAMS) -> list[Request]:
    draw = random.Random(4)
    return [
        (
            [draw.randrange(3, 250) for _ in range(draw.choice((1, 2, 15, 16, 17, 40)))],
            draw.choice(ADAPTERS),
            params[i % len(params)],
        )
        for i in range(num)
    ]


def answers(
    monkeypatch: pytest.MonkeyPatch, config: EngineConfig, asked: list[Request], *, ahead: bool
) -> tuple[dict[int, list[Told]], dict[int, list[float]], dict[str, int]]:
    """Of all requests, sent at once, tokens and their log probabilities; the engine's counters."""
    monkeypatch.setattr(runner, "_runs_ahead", lambda model: ahead)
    found: dict[int, list[Told]] = {number: [] for number in range(len(asked))}
    logprobs: dict[int, list[float]] = {number: [] for number in range(len(asked))}
    with Engine(config) as engine:
        inbox = Inbox(engine)
        for number, (prompt, adapter, params) in enumerate(asked):
            inbox.session.send(
                Generate(id=number, input_ids=prompt, adapter_id=adapter, params=SamplingParams(**params))
            )
        num_open = len(asked)
        while num_open:
            event = inbox.events.get(timeout=PATIENCE_S)
            assert isinstance(event, Tokens), event
            found[event.id].append((event.token_ids, event.finish_reason))
            logprobs[event.id] += [told.logprob for told in event.logprobs]
            num_open -= bool(event.finish_reason)
        status = engine.status()
    assert status.check_errors == []
    assert status.gauges["kv_blocks_free"] == status.gauges["kv_blocks_total"]
    return found, logprobs, status.counters


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({}, id="room for all"),
        pytest.param({"max_batched_tokens": 16, "max_num_seqs": 8}, id="prompts in chunks"),
        pytest.param({"max_num_seqs": 3, "max_loras": 1}, id="few places"),
        pytest.param({"max_model_len": 96, "kv_cache_bytes": 9 * 16 * 768}, id="preemption"),
    ],
)
def test_the_same_answers_as_step_by_step(
    base: Path, adapter_root: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, object]
) -> None:
    config = EngineConfig(base_model=str(base), adapter_root=str(adapter_root), num_threads=1, **limits)
    asked = requests(24)
    wanted, wanted_logprobs, counters = answers(monkeypatch, config, asked, ahead=False)
    assert counters["steps_ahead"] == 0
    found, logprobs, counters = answers(monkeypatch, config, asked, ahead=True)
    assert found == wanted
    # Other steps mix other rows, and sums come in another order.
    assert logprobs == {number: pytest.approx(told, abs=1e-4) for number, told in wanted_logprobs.items()}
    assert counters["steps_ahead"] > counters["steps"] / 4
    assert (counters["preemptions"] > 0) == ("kv_cache_bytes" in limits)


def test_penalties_wait_for_the_token_before(
    base: Path, adapter_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(base_model=str(base), adapter_root=str(adapter_root), num_threads=1)
    asked = requests(6, (*PARAMS[:2], PENALTIES))
    wanted, *_ = answers(monkeypatch, config, asked, ahead=False)
    found, *_ = answers(monkeypatch, config, asked, ahead=True)
    assert found == wanted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_launch_makes_the_host_wait(
    base: Path, adapter_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises where an operator waits for the device."""
    launch = runner.Runner.launch

    def strict(self: runner.Runner, step: Step) -> Flight:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(self, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(runner.Runner, "launch", strict)
    config = EngineConfig(
        base_model=str(base), adapter_root=str(adapter_root), device="cuda", dtype="float32"
    )
    # Whatever waits ends its step with an error, which `answers` does not take.
    _, _, counters = answers(monkeypatch, config, requests(24, (*PARAMS, PENALTIES)), ahead=True)
    assert counters["steps_ahead"] > 0


class Ahead:
    """A scheduler whose steps land one step late; a step gives the token that it is told to."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.before: Schedule | None = None

    def turn(self, token: int = 5) -> list[tuple[int, int]]:
        """Schedule, then land the step before with `token` everywhere; (sequence, start) of the new step."""
        assert self.before is None or self.scheduler.can_run_ahead()
        schedule = self.scheduler.schedule()
        self.land(token)
        self.before = schedule
        return [] if schedule is None else [(s.sequence.id, s.start) for s in schedule.sequences]

    def land(self, token: int) -> None:
        if self.before is not None:
            self.scheduler.finish(self.before, result(self.before, token))
            self.before = None
        assert self.scheduler.check() == []


def test_a_sequence_that_surely_ends_is_not_scheduled_once_more() -> None:
    steps = Ahead(make())
    short, long = sequence(0, max_tokens=2), sequence(1, max_tokens=9)
    for s in (short, long):
        steps.scheduler.add(s)
    assert steps.turn() == [(0, 0), (1, 0)]
    assert steps.turn() == [(0, 3), (1, 3)]
    assert steps.turn() == [(1, 4)]
    assert (short.state, short.num_generated) == (State.ENDED, 2)


def test_a_step_behind_an_unforeseen_end_is_in_vain() -> None:
    steps = Ahead(make())
    one = sequence(0, max_tokens=9)
    steps.scheduler.add(one)
    steps.turn()
    assert steps.turn() == [(0, 3)]
    # The second token turns out to be the end, with the third on its way.
    assert steps.turn(EOS) == [(0, 4)]
    assert (one.state, one.token_ids[3:]) == (State.ENDED, [5, EOS])
    assert steps.turn() == []
    assert one.token_ids[3:] == [5, EOS]


def test_a_sequence_with_penalties_sits_out_alone() -> None:
    steps = Ahead(make())
    for s in (sequence(0, max_tokens=9, presence_penalty=1.0), sequence(1, max_tokens=9)):
        steps.scheduler.add(s)
    assert steps.turn() == [(0, 0), (1, 0)]
    assert steps.turn() == [(1, 3)]
    assert steps.turn() == [(0, 3), (1, 4)]
    assert steps.turn() == [(1, 5)]


def test_a_removed_sequence_takes_no_token_of_a_step_that_still_runs() -> None:
    steps = Ahead(make())
    gone, stays = sequence(0, max_tokens=9), sequence(1, max_tokens=9)
    for s in (gone, stays):
        steps.scheduler.add(s)
    steps.turn()
    steps.turn()
    steps.scheduler.remove(gone)
    assert steps.turn() == [(1, 4)]
    assert (gone.num_generated, stays.num_generated) == (1, 2)


def test_no_running_ahead_where_blocks_may_lack() -> None:
    steps = Ahead(make(num_blocks=2))
    for number in range(2):
        steps.scheduler.add(sequence(number, prompt=3, max_tokens=9))
    assert steps.turn() == [(0, 0), (1, 0)]
    # The pending token still fits into a block of four, the next one does not.
    assert steps.scheduler.can_run_ahead()
    assert steps.turn() == [(0, 3), (1, 3)]
    assert not steps.scheduler.can_run_ahead()
