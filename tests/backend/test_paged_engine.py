"""The engine over the paged attention kernels says what transformers' own generate() says.

They run on a GPU; elsewhere in triton's interpreter, in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from manylora import Engine, EngineConfig
from manylora.engine import runner
from transformers import AutoModelForCausalLM

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1, 19, 7)
NUM_TOKENS = 5


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 250, (n,), generator=generator).tolist() for n in LENGTHS]


def own_generate(directory: Path) -> list[list[int]]:
    """Greedy ids from transformers, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    results = []
    for ids in prompts():
        inputs = torch.tensor([ids])
        with torch.inference_mode():
            out = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
            )
        results.append(out[0, len(ids) :].tolist())
    return results


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="runs in a process with the interpreter")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_packed_batch_matches_generate(
    tiny_model: Callable[..., Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain; with windows and soft cap; with windows and sinks."""
    monkeypatch.setattr(runner, "serves_paged", lambda model: True)
    directory = tiny_model(family)
    # 16 tokens a step: the longer prompts come in chunks, beside decodes of the others.
    config = EngineConfig(
        base_model=str(directory),
        device=DEVICE,
        dtype="float32",
        max_batched_tokens=16,
        max_num_seqs=5,
        kv_block_size=4,
    )
    with Engine(config) as engine:
        found = engine.generate(prompts(), max_tokens=NUM_TOKENS)
        assert engine.status().check_errors == []
    assert [c.token_ids for c in found] == own_generate(directory)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the tests run in this process")
@pytest.mark.slow  # the recorded steps are compared with such engines in test_step_graphs.py
def test_passes_in_the_interpreter(pass_interpreted: Callable[..., str]) -> None:
    assert "3 passed" in pass_interpreted(__file__)
