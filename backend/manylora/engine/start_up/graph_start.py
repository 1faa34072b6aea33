"""Records a model's decode steps at start, proves them, and says why where that is not to be had.

Shape key: T rows of a step, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from manylora_kernels import Mix

from manylora.config import EngineConfig
from manylora.engine.graph_recorder import recorder_for
from manylora.engine.runner import Runner
from manylora.engine.start_up.packing_check import allowed_difference, decodes_of_probes
from manylora.engine.start_up.trial_adapter import trial_adapter
from manylora.engine.step_graphs import StepGraphs
from manylora.engine.step_tensors import Uploader
from manylora.model.loading import LoadedModel, logits_tolerance
from manylora.model.lora_layers import Site

log = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int32]
_MOST_ADAPTERS = 8
"""In a step that is compared: their pages are filled in all layers."""


@torch.inference_mode()
def record_graphs(runner: Runner, config: EngineConfig) -> None:
    """Record decode steps as graphs where the paged kernels serve; call it after `prove_packing`.

    One step of each family is compared with the eager answer. A model that cannot be recorded, or replays
    other numbers, is served without, and the log says so.

    Args:
        runner: gets the graphs. No adapter lies in its pool yet.
    """
    if not runner.uploader.paged or config.enforce_eager:
        return
    model, recorder = runner.model, recorder_for(runner.model.device)
    name = type(model.module).__name__
    try:
        graphs = StepGraphs(
            runner.forward,
            runner.uploader,
            config.max_num_seqs,
            model.max_model_len,
            _page_limits(model.sites),
            _vector_limits(model.sites),
            recorder,
        )
        graphs.capture()
        wrong = _differences(runner, graphs)
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
            runner.graphs = graphs
            return
        log.warning("decode steps of %s run operator by operator: %s", name, "; ".join(wrong))
        del graphs
    recorder.abandon()


def _page_limits(sites: Sequence[Site]) -> list[int]:
    """Pages of rank rows of the pool by kind."""
    limits = {site.kind: site.pool.a.shape[0] for site in sites if site.pool is not None}
    return [limits[kind] for kind in sorted(limits)]


def _vector_limits(sites: Sequence[Site]) -> list[int]:
    """Its pages of vectors by kind."""
    limits = {site.kind: site.pool.num_vectors for site in sites if site.pool is not None}
    return [limits[kind] for kind in sorted(limits)]


def _differences(runner: Runner, graphs: StepGraphs) -> list[str]:
    """What of replayed steps is not the eager ones': the least that holds the probes, and the largest, each
    of the base model and with adapters in the pool, whose rows take turns with rows without one."""
    model, uploader = runner.model, runner.uploader
    num_probes = min(len(model.probe_ids), graphs.buckets[-1])
    least = graphs.bucket_of(num_probes)
    assert least is not None, "the probes are decodes of one step"
    found: list[str] = []
    for num_rows, num_seqs in dict.fromkeys(((least, num_probes), (graphs.buckets[-1],) * 2)):
        # Decodes that come again write the same into the cache.
        tensors = uploader.upload(decodes_of_probes(runner, num_seqs), num_rows=num_rows)
        base = runner.forward(tensors)[:num_seqs].float()
        found += _compare(model, base, graphs.run(tensors)[:num_seqs], f"the base model, {num_rows} rows")
        count = min(_MOST_ADAPTERS, max(1, num_seqs - 1), uploader.max_loras, *_page_limits(model.sites))
        slots = _turns(count, num_seqs)
        with trial_adapter([site.pool for site in model.sites if site.pool is not None], count):
            tensors.mix = _mix_of(uploader, slots, count, num_rows, min(_vector_limits(model.sites)))
            wanted = runner.forward(tensors)[:num_seqs].float()
            replayed = graphs.run(tensors)[:num_seqs]
        what = f"{count} adapter{'s' if count > 1 else ''}, {num_rows} rows"
        found += _compare(model, wanted, replayed, what)
        found += _compare_changes(model, base, wanted, replayed, slots, what)
    return found


def _compare(model: LoadedModel, wanted: torch.Tensor, replayed: torch.Tensor, what: str) -> list[str]:
    """In words how logits [T, V] differ by more than another order of computing can make them."""
    difference = float((replayed.float() - wanted).abs().max())
    allowed = allowed_difference(model.dtype, float(wanted.abs().max()))
    if difference <= allowed:
        return []
    return [f"logits of {what}, replayed, differ by {difference:.3g}, allowed is {allowed:.3g}"]


def _compare_changes(
    model: LoadedModel,
    base: torch.Tensor,
    wanted: torch.Tensor,
    replayed: torch.Tensor,
    slots: IntArray,
    what: str,
) -> list[str]:
    """The same of what adapters change in each of their rows: one that is missing, or another row's, can lie
    within what whole logits are allowed."""
    mine = np.flatnonzero(slots >= 0).tolist()
    change = (wanted - base)[mine].norm(dim=1)
    wrong = (replayed.float() - wanted)[mine].norm(dim=1)
    allowed = logits_tolerance(model.dtype)
    if bool((wrong <= allowed * change).all()):
        return []
    share = float((wrong / change).max())
    return [f"what {what} change of logits, replayed, differs by {share:.3g} of it, allowed is {allowed:g}"]


def _turns(count: int, num_seqs: int) -> IntArray:
    """Slots of rows that take turns: adapter 0, adapter 1 and so on, then none."""
    turns = np.arange(num_seqs, dtype=np.int32) % (count + 1)
    return np.where(turns < count, turns, np.int32(-1))


def _mix_of(uploader: Uploader, slots: IntArray, count: int, num_rows: int, max_vectors: int) -> Mix:
    """Each adapter in the page of its number, the first and every other one with vectors; rows that pad have
    none."""
    vectors = [(page,) if page % 2 == 0 and page < max_vectors else () for page in range(count)]
    return Mix.build(
        np.pad(slots, (0, num_rows - len(slots)), constant_values=-1),
        np.ones(num_rows, dtype=np.float32),
        [[(page,) for page in range(count)]] * uploader.num_kinds,
        uploader.max_loras,
        uploader.max_pages,
        uploader.device,
        form=uploader.form,
        vectors=[vectors] * uploader.num_kinds,
    )
