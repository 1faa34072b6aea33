"""Steps of the whole model, base only beside mixed, on Llama-3-8B's shapes with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from gpu.budget import Deadline
from gpu.clock import Run, graph_of, time_in_turn
from gpu.model_bed import RANK, ModelBed
from gpu.part_kernels import attempt
from gpu.rows import Context, Row

ENGINE = "engine"
"""`Runner.logits`: the step's tensors are built, the model runs; without the sampler."""
FORWARD = "forward in one graph"
"""The forward pass alone, recorded by hand: what is left when the host costs nothing."""
MIXES = (0, 1, 32)
"""Adapters in a step."""
DECODES = (32, 1, 8, 64)
PREFILLS = (8192, 512, 2048)
_STEPS = 10
"""In one measurement, so that the device never waits for the clock."""


def run(context: Context, deadline: Deadline) -> Iterator[Row]:
    """Decode steps, then prompts, until the time is up."""
    most = _mixes(context)[-1]
    bed = attempt(lambda: ModelBed(context.device, context.dtype, most, context.is_tiny))
    if isinstance(bed, str):
        yield context.row("decode", ENGINE, result=bed)
        return
    with torch.inference_mode():
        for step in (2,) if context.is_tiny else DECODES:
            if deadline.is_over:
                print(f"model: time is up before decodes of {step}", flush=True)
                return
            yield from _decode(context, bed, step)
        for step in (24,) if context.is_tiny else PREFILLS:
            if deadline.is_over:
                print(f"model: time is up before prompts of {step}", flush=True)
                return
            yield from _prefill(context, bed, step)


def _mixes(context: Context) -> tuple[int, ...]:
    return (0, 1, 2) if context.is_tiny else MIXES


def _decode(context: Context, bed: ModelBed, num_seqs: int) -> Iterator[Row]:
    mixes = [mix for mix in _mixes(context) if mix <= num_seqs]
    engine = {mix: partial(_loop, bed, partial(bed.decode, num_seqs, mix)) for mix in mixes}
    yield from _rows(context, bed, "decode", ENGINE, num_seqs, engine, _STEPS, mixes)
    graphs: dict[int, Run] = {}
    for mix in mixes:
        found = attempt(lambda mix=mix: graph_of(bed.forward(bed.decode(num_seqs, mix)), context.device))  # type: ignore[misc]
        if isinstance(found, str):
            yield context.row("decode", FORWARD, rows=num_seqs, adapters=mix, result=found)
        else:
            graphs[mix] = found
        bed.model.holder.mix = None
    if context.device.type == "cuda":
        yield from _rows(context, bed, "decode", FORWARD, num_seqs, graphs, 1, list(graphs))


def _prefill(context: Context, bed: ModelBed, num_tokens: int) -> Iterator[Row]:
    mixes = list(_mixes(context))
    runs = {mix: partial(bed.run, bed.prefill(num_tokens, mix)) for mix in mixes}
    yield from _rows(context, bed, "prefill", ENGINE, num_tokens, runs, 1, mixes)


def _loop(bed: ModelBed, make: Callable[[], object]) -> None:
    batch = make()
    for _ in range(_STEPS):
        bed.run(batch)  # type: ignore[arg-type]


def _rows(
    context: Context,
    bed: ModelBed,
    part: str,
    form: str,
    num_rows: int,
    runs: dict[int, Run] | dict[int, partial[None]] | dict[int, partial[torch.Tensor]],
    steps: int,
    mixes: list[int],
) -> Iterator[Row]:
    """Time steps of several mixes in turn; what a mix adds is the difference to the base's median."""
    named = {str(mix): runs[mix] for mix in mixes}
    timings = attempt(lambda: time_in_turn(named, context.device, max(3, context.repeats // 3), steps))
    if isinstance(timings, str):
        yield context.row(part, form, rows=num_rows, result=timings)
        return
    for name, timing in timings.items():
        mix = int(name)
        moved = bed.weight_bytes() + bed.adapter_bytes(mix)
        base = timings.get("0")
        yield context.row(
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
            result="ok",
        )
