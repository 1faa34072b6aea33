"""Tokens that are there already: penalties as transformers and OpenAI define them, the same in any batch."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from manylora import Engine, EngineConfig
from manylora.engine import penalties
from manylora.engine.sequence import Sequence
from manylora.messages import SamplingParams
from transformers import AutoModelForCausalLM, RepetitionPenaltyLogitsProcessor

from .sampling import sample, sampling

VOCAB = 97
PENALTIES = [
    pytest.param({"repetition_penalty": 1.7}, id="repetition"),
    pytest.param({"repetition_penalty": 0.4}, id="repetition below 1"),
    pytest.param({"frequency_penalty": 0.6}, id="frequency"),
    pytest.param({"presence_penalty": -1.5}, id="presence"),
    pytest.param(
        {"repetition_penalty": 1.2, "frequency_penalty": -0.3, "presence_penalty": 2.0}, id="all three"
    ),
]


def sequence(length: int, prompt: int, seed: int = 0, **params: object) -> Sequence:
    generator = torch.Generator().manual_seed(seed)
    return Sequence(
        id=0,
        # Few distinct ids, so that many come again.
        token_ids=torch.randint(0, 23, (length,), generator=generator).tolist(),
        num_prompt=prompt,
        params=SamplingParams(**params),
        seed=seed,
        lease=None,
    )


def logits(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def penalise(values: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    found = sampling(sequences).penalties
    return values if found is None else penalties.penalise(values, found)


def wanted(row_V: torch.Tensor, s: Sequence) -> torch.Tensor:
    """One row by transformers' processor and OpenAI's formula."""
    penalty = float(s.params.repetition_penalty)
    row_V = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([s.token_ids]), row_V[None])[0]
    counts = torch.bincount(torch.tensor(s.token_ids[s.num_prompt :], dtype=torch.long), minlength=VOCAB)
    return row_V - s.params.frequency_penalty * counts - s.params.presence_penalty * (counts > 0)


@pytest.mark.parametrize("params", PENALTIES)
@pytest.mark.parametrize(("length", "prompt"), [(1, 1), (40, 40), (40, 13), (2, 1)])
def test_penalties_are_those_of_transformers_and_openai(
    params: dict[str, object], length: int, prompt: int
) -> None:
    values = logits(3)
    sequences = [
        sequence(9, 4),
        sequence(length, prompt, seed=5, **params),
        sequence(30, 2, seed=6, **params),
    ]
    found = penalise(values.clone(), sequences)
    assert torch.equal(found[0], values[0])
    for row in (1, 2):
        torch.testing.assert_close(found[row], wanted(values[row], sequences[row]), rtol=1e-6, atol=1e-6)


def test_where_nobody_asks_nothing_is_touched() -> None:
    values = logits(2).bfloat16()
    sequences = [sequence(9, 4), sequence(9, 4, temperature=1.0, min_p=0.1)]
    assert sampling(sequences).penalties is None
    assert penalise(values, sequences) is values
    assert [s.counts for s in sequences] == [None, None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_penalty_smaller_than_a_16_bit_step_still_counts(dtype: torch.dtype) -> None:
    values = torch.zeros(1, VOCAB, dtype=dtype)
    values[0, 7:9] = 100.0
    s = sequence(3, 1, frequency_penalty=0.01)
    s.token_ids = [50, 7, 7]
    assert sample(values, [s], []) == [8]


def test_counts_that_grow_with_the_text_are_those_of_the_whole_text() -> None:
    params = {"repetition_penalty": 1.3, "frequency_penalty": 0.7}
    growing = sequence(60, 11, seed=3, **params)
    tokens = growing.token_ids
    for length in (11, 12, 13, 20, 60):
        growing.token_ids = tokens[:length]
        whole = sequence(60, 11, seed=3, **params)
        whole.token_ids = tokens[:length]
        values = logits(1, seed=length)
        assert torch.equal(penalise(values.clone(), [growing]), penalise(values.clone(), [whole]))


@pytest.mark.parametrize("penalty", [1e-38, 3e38])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_that_leaves_float32_leaves_a_token_to_choose(penalty: float, temperature: float) -> None:
    s = sequence(5, 5, repetition_penalty=penalty, temperature=temperature)
    s.token_ids = list(range(VOCAB))
    s.num_prompt = VOCAB
    (found,) = sample(logits(1), [s], [])
    assert found in range(VOCAB)


def test_a_penalty_hides_no_number_that_is_not_finite() -> None:
    s = sequence(5, 5, repetition_penalty=2.0)
    values = logits(3)
    values[0, s.token_ids[0]] = float("nan")
    values[1, s.token_ids[0]] = float("inf")
    values[2, s.token_ids[0]] = float("-inf")
    assert [i is None for i in sample(values, [s, s, s], [])] == [True, True, False]
    assert values[2, s.token_ids[0]] == float("-inf")


def test_an_id_that_the_output_has_not_is_not_penalised() -> None:
    s = sequence(5, 2, repetition_penalty=2.0, frequency_penalty=1.0)
    s.token_ids = [3, VOCAB, VOCAB + 9, 3, VOCAB]
    values = logits(1)
    found = penalise(values.clone(), [s])[0]
    assert (found != values[0]).nonzero().flatten().tolist() == [3]


PROMPTS = [[5, 9, 9, 30, 5], [40, 41, 42, 40, 41, 42, 40], [7] * 12]


@pytest.mark.parametrize("name", ["", "a"])
def test_a_repetition_penalty_gives_the_text_of_transformers(
    base: Path, adapter_root: Path, name: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if name:
        model = peft.PeftModel.from_pretrained(model, adapter_root / name)
    wanted = []
    for ids in PROMPTS:
        inputs = torch.tensor([ids])
        out = model.eval().generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=20,
            do_sample=False,
            repetition_penalty=1.6,
        )
        wanted.append(out[0, len(ids) :].tolist())
    config = EngineConfig(base_model=str(base), adapter_root=str(adapter_root), num_threads=1)
    with Engine(config) as engine:
        found = engine.generate(PROMPTS, adapter_ids=[name] * 3, max_tokens=20, repetition_penalty=1.6)
        without = engine.generate(PROMPTS, adapter_ids=[name] * 3, max_tokens=20)
    assert [c.token_ids for c in found] == wanted
    assert [c.token_ids for c in without] != wanted


@pytest.mark.parametrize("params", PENALTIES)
def test_a_seed_gives_the_same_text_alone_in_a_batch_and_after_preemptions(
    base: Path, adapter_root: Path, params: dict[str, object]
) -> None:
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 24, "ignore_eos": True, **params}
    names = ["a", "", "a"]
    paths = {"base_model": str(base), "adapter_root": str(adapter_root), "num_threads": 1}
    with Engine(EngineConfig(**paths)) as engine:
        alone = [
            engine.generate([p], adapter_ids=[a], **options)[0] for p, a in zip(PROMPTS, names, strict=True)
        ]
        together = engine.generate(PROMPTS, adapter_ids=names, **options)
    tight = EngineConfig(**paths, max_model_len=40, kv_block_size=4, kv_cache_bytes=36864)
    with Engine(tight) as engine:
        preempted = engine.generate(PROMPTS, adapter_ids=names, **options)
        assert engine.status().counters["preemptions"] > 0
    assert together == alone
    assert preempted == alone
