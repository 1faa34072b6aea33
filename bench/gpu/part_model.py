"""Steps of the whole model, base only beside mixed, on Llama-3-8B's shapes with random weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from bench.gpu.attempt import attempt
from bench.gpu.budget import Deadline
from bench.gpu.clock import Run, Timing, graph_of, time_in_turn
from bench.gpu.names import ENGINE, FORWARD, REPLAYED_ALL, STEP, TWIN
from bench.gpu.rows import Context, Row

if TYPE_CHECKING:
    from bench.gpu.model_bed import ModelBed

KeyT = TypeVar("KeyT")
RANK = 16
MIXES = (0, 1, 32)
"""Adapters in a step."""
DECODES = (32, 1, 8, 64)
TINY_DECODES = (4,)
"""More sequences than the pool holds adapters, as 64 are."""
PREFILLS = (8192, 512, 2048)
_STEPS = 50
"""In one measurement, so that the device never waits for the clock."""


def make_bed(device: torch.device, dtype: torch.dtype, is_tiny: bool) -> ModelBed:
    """The model, ready for all mixes.

    Raises:
        ModuleNotFoundError: a package of the backend is not there.
    """
    from bench.gpu.model_bed import ModelBed  # needs the backend's packages, as nothing before does

    return ModelBed(device, dtype, mixes(is_tiny)[-1], is_tiny)


def mixes(is_tiny: bool) -> tuple[int, ...]:
    """Adapters in a step, ascending, none first."""
    return (0, 1, 2) if is_tiny else MIXES


def run(context: Context, deadline: Deadline) -> Iterator[Row]:
    """Decode steps, then prompts, until the time is up; the first decode step, which the goals name, whatever
    the time is."""
    bed = attempt(partial(make_bed, context.device, context.dtype, context.is_tiny))
    if isinstance(bed, str):
        yield context.row("decode", ENGINE, result=bed)
        return
    print(f"# model: {bed.state}; {deadline.left_s:.0f} s left", flush=True)
    with torch.inference_mode():
        decodes, prefills = (TINY_DECODES, (24,)) if context.is_tiny else (DECODES, PREFILLS)
        for number, step in enumerate(decodes):
            if number and deadline.is_over:
                print(f"model: time is up before decodes of {step}", flush=True)
                return
            yield from _decode(context, bed, step)
        for step in prefills:
            if deadline.is_over:
                print(f"model: time is up before prompts of {step}", flush=True)
                return
            yield from _prefill(context, bed, step)


def _decode(context: Context, bed: ModelBed, num_seqs: int) -> Iterator[Row]:
    mine = [mix for mix in mixes(context.is_tiny) if mix <= num_seqs]
    batches = {mix: bed.decode(num_seqs, mix) for mix in mine}
    count = 1 if context.is_tiny else _STEPS
    for form, step in ((ENGINE, bed.run), (STEP, bed.launch)):
        runs = {mix: _Steps(bed, partial(step, batch), count) for mix, batch in batches.items()}
        timings = _times(context, runs, count)
        if isinstance(timings, str):
            yield context.row("decode", form, rows=num_seqs, result=timings)
            continue
        for mix, timing in timings.items():
            yield _row(context, bed, "decode", form, num_seqs, mix, timing, timings[0], runs[mix].result)
    yield from _forward(context, bed, num_seqs, mine)


def _forward(context: Context, bed: ModelBed, num_seqs: int, mine: list[int]) -> Iterator[Row]:
    graphs: dict[int, Run] = {}
    for mix in mine:

        def recorded(mix: int = mix) -> Run:
            return graph_of(bed.forward(bed.decode(num_seqs, mix)), context.device)

        found = attempt(recorded)
        if isinstance(found, str):
            yield context.row("decode", FORWARD, rows=num_seqs, adapters=mix, result=found)
        else:
            graphs[mix] = found
    if context.device.type != "cuda":
        return
    timings = _times(context, graphs, 1)
    if isinstance(timings, str):
        yield context.row("decode", FORWARD, rows=num_seqs, result=timings)
        return
    for mix, timing in timings.items():
        yield _row(context, bed, "decode", FORWARD, num_seqs, mix, timing, timings.get(0), "ok")


class _Steps:
    """Several steps of one batch, and how many of them were replayed from a graph."""

    def __init__(self, bed: ModelBed, step: Run, count: int) -> None:
        self._bed, self._step, self._count = bed, step, count
        self._num_run = self._num_replayed = 0

    def __call__(self) -> None:
        before = self._bed.num_replays
        for _ in range(self._count):
            self._step()
        self._num_run += self._count
        self._num_replayed += self._bed.num_replays - before

    @property
    def result(self) -> str:
        """A row's result."""
        replayed = f"replayed {self._num_replayed} of {self._num_run} steps"
        if self._num_replayed == self._num_run:
            replayed = f"{REPLAYED_ALL} {self._num_run} steps"
        return f"ok; {self._bed.state}; {replayed}"


def _prefill(context: Context, bed: ModelBed, num_tokens: int) -> Iterator[Row]:
    """Each mix beside the base on prompts of the same lengths: what attention costs depends on them."""
    adapters = mixes(context.is_tiny)
    most = adapters[-1]
    runs: dict[tuple[str, int], Run] = {
        (ENGINE, mix): partial(bed.run, bed.prefill(num_tokens, max(1, mix), mix)) for mix in adapters
    }
    runs[TWIN, 0] = partial(bed.run, bed.prefill(num_tokens, most, 0))
    timings = _times(context, runs, 1)
    if isinstance(timings, str):
        yield context.row("prefill", ENGINE, rows=num_tokens, result=timings)
        return
    for (form, mix), timing in timings.items():
        base = timings[(TWIN, 0) if mix == most else (ENGINE, 0)]
        yield _row(context, bed, "prefill", form, num_tokens, mix, timing, base, f"ok; {bed.state}")


def _times(context: Context, runs: Mapping[KeyT, Run], steps: int) -> dict[KeyT, Timing] | str:
    """Microseconds of a step of each, in turn; in words why there are none."""
    named = {str(key): run for key, run in runs.items()}
    repeats = 1 if context.is_tiny else max(3, context.repeats // 3)
    timings = attempt(lambda: time_in_turn(named, context.device, repeats, steps))
    return timings if isinstance(timings, str) else {key: timings[str(key)] for key in runs}


def _row(
    context: Context,
    bed: ModelBed,
    part: str,
    form: str,
    num_rows: int,
    mix: int,
    timing: Timing,
    base: Timing | None,
    result: str,
) -> Row:
    moved = bed.weight_bytes() + bed.adapter_bytes(mix)
    return context.row(
        part,
        form,
        timing=timing,
        rows=num_rows,
        adapters=mix,
        rank=str(RANK) if mix else "",
        extra_us=timing.median - base.median if base is not None and mix else None,
        # A prompt's step is bound by arithmetic, not by these bytes.
        floor_us=moved / context.bandwidth.read * 1e6 if part == "decode" else None,
        moved_bytes=moved,
        result=result,
    )
