"""Records a model's decode steps at start, proves them, and says why where that is not to be had.

Shape key: T rows of a step, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from manylora_kernels import Mix

from manylora.engine.batch import Batch, BatchBuilder, StepTensors
from manylora.engine.graph_recorder import Recorder
from manylora.engine.step_graphs import Forward, StepGraphs
from manylora.engine.trial_adapter import trial_adapter
from manylora.model.loading import LoadedModel, logits_tolerance
from manylora.model.lora_layers import Site

log = logging.getLogger(__name__)


def allowed_difference(dtype: torch.dtype, scale: float) -> float:
    """How far logits up to `scale` may lie apart that were computed in another order."""
    return logits_tolerance(dtype) * max(scale, 1.0)


@torch.inference_mode()
def try_start(
    model: LoadedModel,
    builder: BatchBuilder,
    forward: Forward,
    probe: Batch,
    max_rows: int,
    recorder: Recorder,
) -> StepGraphs | None:
    """Record the steps of up to `max_rows` decodes and compare one of each family with the eager answer.

    Args:
        model: with its sites' pools, in which no adapter lies yet.
        builder: of the engine's steps; it is `paged`.
        forward: the model.
        probe: decodes whose context is in the cache, at most `max_rows`.
        max_rows: of the largest graph.
        recorder: of the model's device.

    Returns:
        None, and the reason in the log, for a model that cannot be recorded or replays other numbers.
    """
    name = type(model.module).__name__
    try:
        graphs = StepGraphs(
            forward, builder, max_rows, model.max_model_len, _page_limits(model.sites), recorder
        )
        graphs.capture()
        wrong = _differences(model, builder, forward, probe, graphs)
    # Whatever a model's code does that cannot be recorded, it can still be run.
    except Exception as error:
        log.warning(
            "decode steps of %s cannot be recorded as graphs and run operator by operator: %s: %s",
            name,
            type(error).__name__,
            error.__context__ or error,
        )
    else:
        if not wrong:
            return graphs
        log.warning("decode steps of %s run operator by operator: %s", name, "; ".join(wrong))
        del graphs
    recorder.abandon()
    return None


def _page_limits(sites: Sequence[Site]) -> list[int]:
    """Pages of the pool by kind."""
    limits = {site.kind: site.pool.a.shape[0] for site in sites if site.pool is not None}
    return [limits[kind] for kind in sorted(limits)]


def _differences(
    model: LoadedModel, builder: BatchBuilder, forward: Forward, probe: Batch, graphs: StepGraphs
) -> list[str]:
    """What of a replayed step is not the eager one's, with an adapter in the pool and without any."""
    step = builder.build(probe, num_rows=graphs.bucket_of(len(probe.items)))
    found = _compare(model, forward, step, graphs, len(probe.items), "the base model")
    with trial_adapter([site.pool for site in model.sites if site.pool is not None], 1):
        step.mix = _mix_of_page_0(builder, step.input_ids.shape[1])
        found += _compare(model, forward, step, graphs, len(probe.items), "an adapter")
    return found


def _compare(
    model: LoadedModel, forward: Forward, step: StepTensors, graphs: StepGraphs, num_rows: int, what: str
) -> list[str]:
    wanted = forward(step)[:num_rows].float()
    found = graphs.run(step)[:num_rows].float()
    difference = float((found - wanted).abs().max())
    allowed = allowed_difference(model.dtype, float(wanted.abs().max()))
    if difference <= allowed:
        return []
    return [f"logits of {what}, replayed, differ by {difference:.3g}, allowed is {allowed:.3g}"]


def _mix_of_page_0(builder: BatchBuilder, num_rows: int) -> Mix:
    """The first row has the adapter, no other."""
    row_slots = np.full(num_rows, -1, dtype=np.int32)
    row_slots[0] = 0
    return Mix.build(
        row_slots,
        np.ones(num_rows, dtype=np.float32),
        [[(0,)]] * builder.num_kinds,
        builder.max_loras,
        builder.max_pages,
        builder.device,
        triton=builder.triton,
    )
