"""Proves at start that sequences which share a step are computed as each would be alone.

Sequence i of the probes has blocks of its own, from the first block on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from manylora.engine.runner import Runner
from manylora.engine.step import Step, StepSequence, make_step
from manylora.errors import UnsupportedError
from manylora.model.loading import logits_tolerance

_STEPS = (
    {0: (0, 8), 1: (0, 1), 2: (0, 5)},
    {0: (8, 18), 2: (5, 7)},
    {0: (18, 19), 2: (7, 8)},
)
"""First and last token of each probe that a step computes: whole prompts beside chunks, more chunks,
decodes."""


def allowed_difference(dtype: torch.dtype, scale: float) -> float:
    """How far logits up to `scale` may lie apart that were computed in another order."""
    return logits_tolerance(dtype) * max(scale, 1.0)


@torch.inference_mode()
def prove_packing(runner: Runner) -> None:
    """Compare packed steps, chunked and with cached context, with the same rows alone in transformers.

    Raises:
        UnsupportedError: they differ; the model mixes rows or positions in a way that is not known here.
    """
    model = runner.model
    scale = max(float(logits.abs().max()) for logits in model.probe_logits)
    tolerance = allowed_difference(model.dtype, scale)
    for probe, position, found in _computed(runner):
        wanted = model.probe_logits[probe][position]
        difference = float((found.float() - wanted).abs().max())
        if not difference <= tolerance:
            raise UnsupportedError(
                f"{type(model.module).__name__} computes differently when sequences share a "
                f"step: logits of probe {probe} at position {position} differ by {difference:.3g}, "
                f"allowed is {tolerance:.3g}; this architecture is not served"
            )


def decodes_of_probes(runner: Runner, num_seqs: int) -> Step:
    """A step of decodes whose context `prove_packing` has left in the cache: the probes' last tokens, over
    and over."""
    lengths = [len(ids) for ids in runner.model.probe_ids]
    probes = [_part(runner, probe, length - 1, length) for probe, length in enumerate(lengths)]
    return make_step(1, [probes[index % len(probes)] for index in range(num_seqs)])


def _computed(runner: Runner) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Probe, position and logits [V] of everything that the steps compute."""
    for number, parts in enumerate(_STEPS, start=1):
        logits = runner.logits(
            make_step(number, [_part(runner, probe, *part) for probe, part in parts.items()])
        )
        for (probe, (_, end)), of_probe in zip(parts.items(), logits, strict=True):
            yield probe, end - 1, of_probe


def _part(runner: Runner, probe: int, start: int, end: int) -> StepSequence:
    """Tokens `start` to `end - 1` of a probe; it samples behind them."""
    size = runner.uploader.block_size
    lengths = [len(ids) for ids in runner.model.probe_ids]
    first = sum(-(-length // size) for length in lengths[:probe])
    return StepSequence(
        token_ids=runner.model.probe_ids[probe][start:end],
        context=end,
        table=list(range(first, first + -(-end // size))),
    )
