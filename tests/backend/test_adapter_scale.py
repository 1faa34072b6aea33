"""A request's own scale: PEFT's numbers with its scaling so multiplied, and never another scale's prefix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from manylora import Engine, EngineConfig
from manylora.errors import InvalidArgumentError
from manylora.messages import Failed, Generate, SamplingParams, Tokens
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from .inbox import Inbox

NUM_TOKENS = 12
PROMPT = list(range(40, 61))
SCALES = (0.0, 0.5, 1.0, 2.0, -1.0)
KINDS: dict[str, dict[str, object]] = {
    "plain": {"r": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"r": 20, "target_modules": ["k_proj", "gate_proj"], "use_rslora": True},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"q_proj": 17},
        "alpha_pattern": {"o_proj": 40},
    },
}


@pytest.fixture(scope="module")
def adapter_root(
    base: Path, make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, options) in enumerate(KINDS.items()):
        make_adapter(base, root / name, seed, **options)
    return root


@pytest.fixture(scope="module")
def wanted(base: Path, adapter_root: Path) -> dict[tuple[str, float], list[int]]:
    """PEFT's greedy ids with every module's scaling multiplied; "" is the base model."""
    results = {}
    for name in ("", *KINDS):
        for scale in SCALES if name else (1.0,):
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            if name:
                model = peft.PeftModel.from_pretrained(model, adapter_root / name)
                for module in model.modules():
                    if isinstance(module, LoraLayer):
                        module.scaling["default"] *= scale
            inputs = torch.tensor([PROMPT])
            out = model.eval().generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
            )
            results[name, scale] = out[0, len(PROMPT) :].tolist()
    return results


def make_config(base: Path, adapter_root: Path, **changes: object) -> EngineConfig:
    return EngineConfig(base_model=str(base), adapter_root=str(adapter_root), num_threads=1, **changes)


def test_the_scales_say_different_things(wanted: dict[tuple[str, float], list[int]]) -> None:
    for name in KINDS:
        assert wanted[name, 0.0] == wanted["", 1.0]
        assert len({tuple(wanted[name, scale]) for scale in SCALES}) >= 4


def test_any_mix_of_scales_in_one_batch_matches_peft(
    base: Path, adapter_root: Path, wanted: dict[tuple[str, float], list[int]]
) -> None:
    with Engine(make_config(base, adapter_root)) as engine:
        found = engine.generate(
            [PROMPT] * len(wanted),
            adapter_ids=[name for name, _ in wanted],
            adapter_scales=[scale for _, scale in wanted],
            max_tokens=NUM_TOKENS,
        )
        assert engine.status().check_errors == []
    assert {key: c.token_ids for key, c in zip(wanted, found, strict=True)} == wanted


def test_a_prefix_is_shared_under_the_same_scale_only(
    base: Path, adapter_root: Path, wanted: dict[tuple[str, float], list[int]]
) -> None:
    shared = len(PROMPT) - 1
    with Engine(make_config(base, adapter_root, kv_block_size=4)) as engine:

        def hits(name: str, scale: float) -> int:
            before = engine.status().counters["prefix_hit_tokens"]
            (found,) = engine.generate(
                [PROMPT], adapter_ids=[name], adapter_scales=[scale], max_tokens=NUM_TOKENS
            )
            assert found.token_ids == wanted[name, scale]
            return engine.status().counters["prefix_hit_tokens"] - before

        assert [hits("plain", scale) for scale in (1.0, 2.0, 0.5, -1.0)] == [0] * 4
        assert [hits("plain", scale) for scale in (1.0, 2.0, 0.5, -1.0)] == [shared] * 4
        assert hits("rslora", 2.0) == 0
        # At scale 0 an adapter adds nothing: its prefix is the base model's.
        assert [hits("plain", 0.0), hits("", 1.0), hits("rslora", 0.0)] == [0, shared, shared]


def test_the_base_model_knows_no_scale(
    base: Path, adapter_root: Path, wanted: dict[tuple[str, float], list[int]]
) -> None:
    with Engine(make_config(base, adapter_root)) as engine:
        found = engine.generate([PROMPT] * 2, adapter_scales=[7.0, 0.0], max_tokens=NUM_TOKENS)
    assert [c.token_ids for c in found] == [wanted["", 1.0]] * 2


@pytest.mark.parametrize("scale", [3e38, -1e300, float("nan")])
def test_a_scale_that_overflows_fails_its_own_sequences_only(
    base: Path, adapter_root: Path, wanted: dict[tuple[str, float], list[int]], scale: float
) -> None:
    """Sent as a message: the limits of the wire are not the engine's only guard."""
    work = [("plain", 1.0), ("plain", scale), ("", 1.0), ("rslora", 2.0), ("rslora", scale), ("plain", 0.0)]
    params = SamplingParams(max_tokens=NUM_TOKENS, logprobs=2)
    with Engine(make_config(base, adapter_root)) as engine:
        for _ in range(2):
            inbox = Inbox(engine)
            for i, (name, factor) in enumerate(work):
                inbox.session.send(
                    Generate(id=i, input_ids=PROMPT, adapter_id=name, adapter_scale=factor, params=params)
                )
            ids: list[list[int]] = [[] for _ in work]
            failed: dict[int, Failed] = {}
            num_ended = 0
            while num_ended < len(work):
                event = inbox.events.get(timeout=60)
                if isinstance(event, Tokens):
                    ids[event.id] += event.token_ids
                    num_ended += bool(event.finish_reason)
                else:
                    failed[event.id] = event
                    num_ended += 1
            assert sorted(failed) == [1, 4]
            for i, event in failed.items():
                assert event.code == InvalidArgumentError.code
                assert event.message == (
                    f"adapter {work[i][0]!r} with adapter_scale={scale:g} gave logits that are not finite "
                    "after 0 tokens; its weights, so scaled, are too large for this model"
                )
            assert {i: ids[i] for i in (0, 2, 3, 5)} == {i: wanted[work[i]] for i in (0, 2, 3, 5)}
        status = engine.status()
    assert status.check_errors == []
    assert (status.gauges["running"], status.gauges["waiting"]) == (0, 0)
    assert status.gauges["kv_blocks_free"] == status.gauges["kv_blocks_total"]


def test_options_per_prompt_must_be_as_many(base: Path, adapter_root: Path) -> None:
    with Engine(make_config(base, adapter_root)) as engine:
        for option in ("adapter_scales", "priorities"):
            with pytest.raises(InvalidArgumentError, match=f"1 prompts, 2 {option}: must be as many"):
                engine.generate([PROMPT], **{option: [1, 1]})
        with pytest.raises(InvalidArgumentError, match="option adapter_scale: got NaN"):
            engine.generate([PROMPT], adapter_scales=[float("nan")])
