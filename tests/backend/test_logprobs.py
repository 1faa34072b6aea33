"""Log probabilities are the model's own: what transformers and PEFT give, whatever is asked besides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch
from manylora import Engine, EngineConfig
from manylora.engine.logprobs import distributions
from manylora.engine.sequence import Sequence as EngineSequence
from manylora.messages import Generate, SamplingParams, TokenLogprobs, Tokens
from manylora.offline import Completion
from transformers import AutoModelForCausalLM

from .inbox import Inbox
from .sampling import sampling
from .test_penalties import sequence

ROOT = Path(__file__).resolve().parents[2]
BASE_MODEL = ROOT / ".build" / "base_model"
TRAINED_ADAPTERS = ROOT / "examples" / "adapters"
# Both compute in float32, in another order; logits of these models are below 100.
TOLERANCE = 2e-4


def told(values: torch.Tensor, sequences: Sequence[EngineSequence], ids: list[int]) -> list[TokenLogprobs]:
    """What is told of the chosen ids, of the rows that ask."""
    asked = distributions(values, sampling(sequences))
    assert asked is not None
    found = asked.gather(torch.tensor(ids))
    return list(found.on_host(found.tensors).values())


def test_the_likeliest_come_best_first_and_equal_ones_by_id() -> None:
    values = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, 2.0]]).expand(3, -1)
    four, two, all_of_them = told(values, [sequence(3, 1, logprobs=n) for n in (4, 2, 50)], [5, 0, 0])
    assert [i for i, _ in four.top] == [1, 2, 4, 5]
    assert four.logprob == four.top[3][1] == pytest.approx(2.0 - values[0].exp().sum().log().item())
    assert [i for i, _ in two.top] == [1, 2]
    assert len(all_of_them.top) == 6


def test_an_impossible_token_has_minus_infinity_and_the_others_are_right() -> None:
    values = torch.tensor([[0.0, float("-inf"), 0.0]]).expand(2, -1)
    impossible, possible = told(values, [sequence(3, 1, logprobs=3)] * 2, [1, 0])
    assert impossible.logprob == -math.inf
    ids, logprobs = zip(*possible.top, strict=True)
    assert ids == (0, 2, 1)
    assert logprobs == pytest.approx((-math.log(2), -math.log(2), -math.inf))


def test_rows_that_do_not_ask_are_left_out() -> None:
    values = torch.zeros(4, 5)
    sequences = [sequence(3, 1, logprobs=n) for n in (0, 2, 0, 1)]
    asked = distributions(values, sampling(sequences))
    assert asked is not None
    assert asked.rows == [1, 3]
    assert distributions(values[:1], sampling(sequences[:1])) is None


def assert_told_by(
    model: torch.nn.Module, prompt: Sequence[int], completion: Completion, num_top: int
) -> None:
    """Compare with a model's log-softmax over prompt and text, one pass."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *completion.token_ids]])).logits[0]
    rows = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
    assert completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.token_ids)
    for row, token_id, told in zip(rows, completion.token_ids, completion.logprobs, strict=True):
        assert told.logprob == pytest.approx(float(row[token_id]), abs=TOLERANCE)
        assert len(told.top) == num_top
        best = row.topk(num_top).values.tolist()
        ids, values = (list(column) for column in zip(*told.top, strict=True))
        assert values == pytest.approx(best, abs=TOLERANCE)
        assert values == pytest.approx(row[ids].tolist(), abs=TOLERANCE)


PROMPTS = [[5, 9, 9, 30, 5], [40, 41, 42, 40, 41, 42, 40]]
OPTIONS = [
    pytest.param({}, id="greedy"),
    pytest.param({"temperature": 2.0, "seed": 5, "top_k": 3}, id="drawn among three"),
    pytest.param({"repetition_penalty": 3.0, "min_tokens": 12}, id="penalised"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("num_top", [1, 5, 20])
def test_they_are_the_models_own_whatever_the_choice(
    base: Path, adapter_root: Path, options: dict[str, object], num_top: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    config = EngineConfig(base_model=str(base), adapter_root=str(adapter_root), num_threads=1)
    with Engine(config) as engine:
        found = engine.generate(PROMPTS, adapter_ids=["", "a"], max_tokens=12, logprobs=num_top, **options)
        without = engine.generate(PROMPTS, adapter_ids=["", "a"], max_tokens=12, **options)
    assert [c.token_ids for c in found] == [c.token_ids for c in without]
    assert [c.logprobs for c in without] == [None, None]
    assert_told_by(model, PROMPTS[0], found[0], num_top)
    adapted = peft.PeftModel.from_pretrained(model, adapter_root / "a").eval()
    assert_told_by(adapted, PROMPTS[1], found[1], num_top)


def test_only_the_sequence_that_asks_is_told(base: Path, adapter_root: Path) -> None:
    config = EngineConfig(base_model=str(base), adapter_root=str(adapter_root), num_threads=1)
    with Engine(config) as engine:
        inbox = Inbox(engine)
        for i in (0, 1):
            params = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=2 * i)
            inbox.session.send(Generate(id=i, input_ids=PROMPTS[0], params=params))
        events: list[Tokens] = []
        while sum(bool(e.finish_reason) for e in events) < 2:
            event = inbox.events.get(timeout=60)
            assert isinstance(event, Tokens)
            events.append(event)
    assert {len(e.logprobs) for e in events if e.id == 0} == {0}
    assert {len(e.logprobs) for e in events if e.id == 1} == {1}
    assert all(len(told.top) == 2 for e in events for told in e.logprobs)


def test_a_stop_string_cuts_them_as_it_cuts_the_tokens(base: Path, adapter_root: Path) -> None:
    config = EngineConfig(base_model=str(base), adapter_root=str(adapter_root), num_threads=1)
    with Engine(config) as engine:
        (whole,) = engine.generate(["hello"], max_tokens=40, ignore_eos=True, logprobs=1)
        stop = [whole.text[7:10]]
        (cut,) = engine.generate(["hello"], max_tokens=40, ignore_eos=True, logprobs=1, stop=stop)
    assert whole.logprobs is not None
    assert len(cut.token_ids) < 40
    assert cut.logprobs == whole.logprobs[: len(cut.token_ids)]


def test_the_served_base_model_and_a_trained_adapter_agree_with_peft() -> None:
    if not (BASE_MODEL / "config.json").is_file():
        pytest.fail(f"{BASE_MODEL} is missing: run `make setup`")
    base = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32).eval()
    config = EngineConfig(
        base_model=str(BASE_MODEL), adapter_root=str(TRAINED_ADAPTERS), num_threads=1, max_model_len=256
    )
    prompt = [{"role": "user", "content": "What is the sea like?"}]
    with Engine(config) as engine:
        ids = engine.tokenizer.encode_chat(prompt)
        found = engine.generate([ids, ids], adapter_ids=["", "pirate"], max_tokens=8, logprobs=5)
    assert_told_by(base, ids, found[0], 5)
    assert_told_by(peft.PeftModel.from_pretrained(base, TRAINED_ADAPTERS / "pirate").eval(), ids, found[1], 5)
