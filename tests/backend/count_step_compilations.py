"""Count what an engine's steps would compile after its start, which needs no GPU, and print it as JSON.

    python count_step_compilations.py MODEL_DIRECTORY

A program of its own: triton gets a driver whose kernels do nothing, so that every launch of a step is looked
up and specialised as on a GPU, and none is run. What a step computes is garbage.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from manylora import EngineConfig
from manylora.adapters.placement import AdapterUse
from manylora.adapters.pool_tensors import PoolTensors
from manylora.engine import runner
from manylora.engine.start_up import warm_up
from manylora.engine.start_up.make_runner import make_runner
from manylora.engine.step import StepSequence, make_step
from manylora.model.loading import load_model
from manylora_kernels.attention.precompile import precompile_attention
from manylora_kernels.lora import precompile

from tests.kernels.count_compilations import CPU, compiled, use_a_driver_that_does_nothing

MAX_TOKENS = 160
MAX_SEQS = 9
BLOCK_SIZE = 4
MAX_LEN = 256


def steps(adapters: Sequence[AdapterUse | None]) -> Iterator[list[StepSequence]]:
    """Decodes of every number and context, prompts and chunks of every length, alone and together."""
    draw = random.Random(1)

    def item(num_tokens: int, start: int, nth: int) -> StepSequence:
        end = num_tokens + start
        return StepSequence(
            token_ids=[3] * num_tokens,
            context=end,
            table=list(range(-(-end // BLOCK_SIZE))),
            adapter=adapters[nth % len(adapters)],
        )

    for num_seqs in range(1, MAX_SEQS + 1):
        for longest in (1, 17, MAX_LEN):
            yield [item(1, draw.randrange(longest), nth) for nth in range(num_seqs)]
            yield [item(1, draw.randrange(longest), 0) for _ in range(num_seqs)]
    for num_tokens in range(2, MAX_TOKENS - MAX_SEQS, 7):
        yield [item(num_tokens, 0, num_tokens)]
        yield [item(num_tokens, MAX_LEN - num_tokens - 1, num_tokens + 1)]
        decodes = [item(1, draw.randrange(MAX_LEN - 1), nth) for nth in range(num_tokens % MAX_SEQS)]
        yield [*decodes, item(num_tokens // 2 + 1, 5, 1), item(num_tokens - num_tokens // 2, 0, 2)]


def main() -> None:
    use_a_driver_that_does_nothing()
    runner.serves_paged = lambda model: True
    config = EngineConfig(
        base_model=sys.argv[1],
        adapter_root=sys.argv[1],
        device="cpu",
        dtype="bfloat16",
        max_batched_tokens=MAX_TOKENS,
        max_num_seqs=MAX_SEQS,
        max_model_len=MAX_LEN,
        max_loras=4,
        max_lora_rank=40,
        kv_block_size=BLOCK_SIZE,
    )
    model = load_model(config)
    pool = PoolTensors(model.spec, config.max_loras, config.max_lora_rank, model.dtype, model.device)
    served = make_runner(model, config, pool)
    num_kinds = len(model.spec.kinds)
    adapters = [
        None,
        *(AdapterUse("", 0.5, (pages,) * num_kinds) for pages in ((0,), (1, 2), (3, 4, 5))),
    ]
    one_kind = AdapterUse("", 0.5, ((6,), *((),) * (num_kinds - 1)))

    every = list(steps([*adapters, one_kind]))
    with torch.inference_mode():
        served.logits(make_step(1, every[-1]))
        cold = Counter(compiled)
        compiled.clear()
        precompile.precompile(CPU, warm_up.served_shapes(model, config, pool.dtype))
        precompile_attention(CPU, warm_up.served_attention(model, config))
        before = Counter(compiled)
        compiled.clear()
        for sequences in every:
            served.logits(make_step(1, sequences))
    print(
        json.dumps({"cold": cold, "before": before, "steps": len(every), "while_serving": Counter(compiled)})
    )


if __name__ == "__main__":
    main()
