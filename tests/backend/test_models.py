"""Packed, chunked, many at once: every family says what transformers' own generate() says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora import Engine, EngineConfig
from manylora.engine.step import Step
from manylora.engine.step_tensors import StepTensors, Uploader
from manylora.errors import InvalidArgumentError, UnsupportedError
from manylora.model.outline import outline_model
from transformers import AutoModelForCausalLM

SERVED = ["llama", "qwen3", "gemma3", "gemma2", "phi3", "mistral", "gpt_oss", "qwen3_moe", "cohere", "gpt2"]
LENGTHS = (1, 30, 7, 19, 12, 2)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 250, (n,), generator=generator).tolist() for n in LENGTHS]


def own_generate(directory: Path, num_tokens: int) -> list[list[int]]:
    """Greedy ids from transformers, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    results = []
    for ids in prompts():
        inputs = torch.tensor([ids])
        with torch.inference_mode():
            out = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_tokens, do_sample=False
            )
        results.append(out[0, len(ids) :].tolist())
    return results


@pytest.mark.parametrize("family", SERVED)
def test_a_packed_batch_matches_generate(tiny_model: Callable[..., Path], family: str) -> None:
    directory = tiny_model(family)
    # 16 tokens a step: the longer prompts come in chunks, beside decodes of the others.
    config = EngineConfig(base_model=str(directory), max_batched_tokens=16, max_num_seqs=5, kv_block_size=4)
    with Engine(config) as engine:
        found = engine.generate(prompts(), max_tokens=24)
        status = engine.status()
    assert [c.token_ids for c in found] == own_generate(directory, 24)
    assert status.check_errors == []
    assert status.gauges["kv_blocks_free"] == status.gauges["kv_blocks_total"]


def test_a_cache_too_small_for_all_preempts_and_loses_nothing(tiny_model: Callable[..., Path]) -> None:
    directory = tiny_model("llama")
    block_bytes = 4 * 4 * 2 * 2 * 12 * 4  # tokens x layers x heads x (key + value) x size x float32
    config = EngineConfig(
        base_model=str(directory), kv_block_size=4, kv_cache_bytes=16 * block_bytes, max_model_len=64
    )
    with Engine(config) as engine:
        found = engine.generate(prompts(), max_tokens=24)
        assert engine.status().counters["preemptions"] > 0
    assert [c.token_ids for c in found] == own_generate(directory, 24)


def test_the_smallest_cache_that_holds_a_sequence_starts(tiny_model: Callable[..., Path]) -> None:
    """The comparison at start needs blocks of its own: too few are told, not met."""
    directory = str(tiny_model("llama"))
    block_bytes = 16 * 4 * 2 * 2 * 12 * 4
    options = {"base_model": directory, "max_model_len": 32, "kv_block_size": 16}
    with pytest.raises(InvalidArgumentError, match=f"need {4 * block_bytes} bytes"):
        Engine(EngineConfig(**options, kv_cache_bytes=2 * block_bytes))
    with Engine(EngineConfig(**options, kv_cache_bytes=4 * block_bytes)) as engine:
        (found,) = engine.generate([[5] * 20], max_tokens=20)
        assert len(found.token_ids) == 12


def test_a_shared_prefix_is_not_computed_again(tiny_model: Callable[..., Path]) -> None:
    directory = tiny_model("llama")
    with Engine(EngineConfig(base_model=str(directory), kv_block_size=4)) as engine:
        first = engine.generate([prompts()[1]], max_tokens=8)
        second = engine.generate([prompts()[1]], max_tokens=8)
        assert engine.status().counters["prefix_hit_tokens"] == 28
    assert first == second


def test_an_architecture_without_the_attention_seam_is_refused(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedError, match="BloomForCausalLM takes no attention function from outside"):
        Engine(EngineConfig(base_model=str(tiny_model("bloom"))))


def test_a_model_that_packs_wrongly_is_refused(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start-up comparison sees a single position that is off by one."""
    upload = Uploader.upload

    def shifted(self: Uploader, step: Step, *others: Any) -> StepTensors:
        tensors = upload(self, step, *others)
        tensors.positions[0, -1] += 1
        return tensors

    monkeypatch.setattr(Uploader, "upload", shifted)
    with pytest.raises(UnsupportedError, match="computes differently when sequences share a step"):
        Engine(EngineConfig(base_model=str(tiny_model("llama"))))


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        pytest.param({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, 256, id="dynamic"),
        pytest.param(
            {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 6,
                "long_factor": [2.0] * 6,
                "original_max_position_embeddings": 64,
            },
            64,
            id="longrope",
        ),
    ],
)
def test_rope_that_looks_at_the_whole_step_is_served_only_below_its_switch(
    tiny_model: Callable[..., Path], rope: dict[str, object], limit: int
) -> None:
    directory = tiny_model("llama", rope_parameters=rope, max_position_embeddings=256)
    with Engine(EngineConfig(base_model=str(directory), max_model_len=limit)) as engine:
        found = engine.generate(prompts(), max_tokens=8)
    assert [c.token_ids for c in found] == own_generate(directory, 8)
    # A default is what can be served, and only what is asked for by name is refused.
    with Engine(EngineConfig(base_model=str(directory))) as engine:
        assert engine.info.max_model_len == limit
    if limit < 256:
        asked = EngineConfig(base_model=str(directory), max_model_len=65)
        for make in (Engine, outline_model):
            with pytest.raises(UnsupportedError, match="at most 64 is"):
                make(asked)


def test_a_default_that_the_model_does_not_allow_is_lowered_and_told(
    tiny_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 6,
        "long_factor": [2.0] * 6,
    }
    # As Phi-3.5's configuration has it: beside the scaling.
    directory = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    config = EngineConfig(base_model=str(directory))
    assert outline_model(config).max_model_len == 64
    assert "max_model_len is 64 in place of 256: the base model's rope_type 'longrope'" in caplog.text


def test_limits_of_the_model_and_the_cache_are_told(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    directory = str(tiny_model("llama"))
    with pytest.raises(InvalidArgumentError, match="max_position_embeddings=256"):
        Engine(EngineConfig(base_model=directory, max_model_len=257))
    with pytest.raises(InvalidArgumentError, match="one sequence of max_model_len=256, and the"):
        Engine(EngineConfig(base_model=directory, kv_cache_bytes=10000))
    with pytest.raises(InvalidArgumentError, match="no such directory"):
        Engine(EngineConfig(base_model=str(tmp_path / "nothing")))
    with pytest.raises(InvalidArgumentError, match=r"no usable config\.json"):
        Engine(EngineConfig(base_model=str(tmp_path)))
