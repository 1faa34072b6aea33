"""What a seed promises when a sequence is preempted and its tokens are computed anew."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from manylora import Engine, EngineConfig

NUM_SEQS = 12
NUM_TOKENS = 24
TIGHT = {"kv_block_size": 4, "max_model_len": 48, "kv_cache_bytes": 36864}
"""Room for one of the sequences to its end and a part of the others."""
TOLERANCE = 1e-4
"""Of log probabilities in float32, of a model whose logits are about ten."""


def test_after_a_preemption_logits_differ_in_their_last_bits_only_and_draws_not_at_all(
    tiny_model: Callable[..., Path],
) -> None:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 250, (n % 5 + 8,), generator=generator).tolist() for n in range(NUM_SEQS)]
    runs = []
    for limits in ({}, TIGHT):
        config = EngineConfig(base_model=str(tiny_model("llama")), device="cpu", num_threads=1, **limits)
        with Engine(config) as engine:
            runs.append(
                engine.generate(
                    prompts, temperature=1.0, seed=11, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1
                )
            )
            num_preemptions = engine.status().counters["preemptions"]
        assert bool(num_preemptions) == bool(limits)
    num_compared = 0
    for free, tight in zip(*runs, strict=True):
        assert free.logprobs is not None
        assert tight.logprobs is not None
        # Behind a draw that went the other way the texts are different ones.
        pairs = zip(free.token_ids, tight.token_ids, strict=True)
        num_same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        for one, other in zip(free.logprobs[:num_same], tight.logprobs[:num_same], strict=True):
            assert abs(one.logprob - other.logprob) < TOLERANCE
        num_compared += num_same
    # A draw falls into the last bits of a border once in some ten thousand; each costs the rest of one text.
    assert num_compared >= (NUM_SEQS - 1) * NUM_TOKENS
