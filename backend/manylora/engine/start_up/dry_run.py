"""Run the largest steps once before the first request, with dummy sequences.

What libraries make when they are first used is then made: handles, workspaces, memory of a full step. A
configuration whose steps do not fit the device fails here and not under load.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch

from manylora.engine.batch import Batch, Item
from manylora.engine.sequence import Sequence
from manylora.messages import SamplingParams

if TYPE_CHECKING:
    from manylora.config import EngineConfig
    from manylora.engine.runner import Runner

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
    size = runner.builder.block_size
    room = runner.num_blocks * size
    num_tokens = min(config.max_batched_tokens, runner.model.max_model_len, room)
    num_decodes = min(config.max_num_seqs, config.max_batched_tokens, runner.num_blocks)
    table = list(range(-(-num_tokens // size)))
    steps = [Batch([Item(_sequence(num_tokens, table), num_tokens)])]
    if num_tokens > 2:
        chunk = _sequence(num_tokens, table)
        chunk.num_computed = num_tokens // 2
        steps.append(Batch([Item(chunk, num_tokens - chunk.num_computed)]))
    for params in _PARAMS:
        steps.append(Batch([Item(_sequence(1, [block], params), 1) for block in range(num_decodes)]))
    for step in steps:
        runner.launch(step).land()
    return [step.num_tokens for step in steps]


def _sequence(num_tokens: int, table: list[int], params: SamplingParams = _PARAMS[0]) -> Sequence:
    return Sequence(
        id=0,
        token_ids=[0] * num_tokens,
        num_prompt=num_tokens,
        params=params,
        seed=0,
        lease=None,
        table=table,
    )
