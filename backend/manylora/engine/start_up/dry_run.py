"""Run the largest steps once before the first request, with dummy sequences.

What libraries make when they are first used is then made: handles, workspaces, memory of a full step. A
configuration whose steps do not fit the device fails here and not under load.
"""

from __future__ import annotations

import logging
import time

import torch

from manylora.config import EngineConfig
from manylora.engine.runner import Runner
from manylora.engine.sampling import Sampling, SamplingRow, has_penalties, make_sampling
from manylora.engine.step import StepSequence, make_step
from manylora.engine.token_counts import TokenCounts
from manylora.messages import SamplingParams

log = logging.getLogger(__name__)

_PARAMS = (
    SamplingParams(),
    SamplingParams(temperature=1.0, min_p=0.1, min_tokens=1),
    SamplingParams(temperature=1.0, top_k=5, top_p=0.9),
    SamplingParams(repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1),
    SamplingParams(logprobs=2),
)
"""Every path of the sampler."""


def dry_run(runner: Runner, config: EngineConfig) -> None:
    """Run dummy steps on CUDA; on a CPU, where nothing is made on first use, none.

    The cache's content is garbage afterwards, as it was before: blocks are written before they are read.
    """
    device = runner.model.device
    if device.type == "cpu":
        return
    started_s = time.monotonic()
    run_steps(runner, config)
    torch.cuda.synchronize(device)
    log.info("dummy steps took %.1f s", time.monotonic() - started_s)


def run_steps(runner: Runner, config: EngineConfig) -> list[int]:
    """A prompt as long as a step may be, a later chunk of it, and as many decodes as may run at once.

    All of these have the same parameters, each kind in its turn: no mix takes the sampler more memory.

    Returns:
        The tokens of each step.
    """
    size = runner.uploader.block_size
    room = runner.num_blocks * size
    num_tokens = min(config.max_batched_tokens, runner.model.max_model_len, room)
    num_decodes = min(config.max_num_seqs, config.max_batched_tokens, runner.num_blocks)
    table = list(range(-(-num_tokens // size)))
    prompt = StepSequence(token_ids=[0] * num_tokens, context=num_tokens, table=table)
    steps = [make_step(1, [prompt])]
    if num_tokens > 2:
        chunk = StepSequence(token_ids=[0] * (num_tokens - num_tokens // 2), context=num_tokens, table=table)
        steps.append(make_step(len(steps) + 1, [chunk]))
    decodes = [StepSequence(token_ids=[0], context=1, table=[block]) for block in range(num_decodes)]
    for params in _PARAMS:
        sampling = _sampling(params, num_decodes, runner.model.eos_token_ids)
        steps.append(make_step(len(steps) + 1, decodes, sampling))
    for step in steps:
        runner.launch(step).land()
    return [step.num_tokens for step in steps]


def _sampling(params: SamplingParams, num_rows: int, eos_token_ids: list[int]) -> Sampling:
    counts = TokenCounts([0], 1) if has_penalties(params) else None
    row = SamplingRow(params=params, seed=0, position=1, num_generated=0, counts=counts)
    return make_sampling([row] * num_rows, eos_token_ids)
