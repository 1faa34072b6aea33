"""Each request parameter on the running server: that it has its effect, and where its limits are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora.serve.background import RunningServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.campaigns.harness import PROMPTS, SYNTHETIC, TRAINED, wait_idle

from ..wire import check_refused, generate, stream


@pytest.mark.parametrize("adapter_id", ["", TRAINED[0]], ids=["base", "adapter"])
def test_log_probabilities_tell_of_the_greedy_choice(server: RunningServer, adapter_id: str):
    asked = {"text_input": PROMPTS[0], "max_tokens": 8, "adapter_id": adapter_id}
    plain = generate(server, **asked)
    assert plain["logprobs"] == ""
    answer = generate(server, **asked, logprobs=5)
    assert answer["output_ids"] == plain["output_ids"]
    entries = json.loads(answer["logprobs"])
    assert [entry["id"] for entry in entries] == answer["output_ids"]
    assert "".join(entry["text"] for entry in entries) == answer["text_output"]
    for entry in entries:
        values = [other["logprob"] for other in entry["top"]]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert entry["top"][0] == {key: entry[key] for key in ("id", "text", "logprob")}
        assert sum(map(math.exp, values)) <= 1 + 1e-5
    events = list(stream(server, **asked, logprobs=5))
    streamed = [entry for event in events for entry in json.loads(event["logprobs"])]
    assert [(e["id"], e["text"]) for e in streamed] == [(e["id"], e["text"]) for e in entries]
    for found, wanted in zip(streamed, entries, strict=True):
        assert found["logprob"] == pytest.approx(wanted["logprob"], abs=1e-3)


def test_log_probabilities_are_the_models_own(server: RunningServer, base_model: Path):
    answer = generate(
        server, text_input=PROMPTS[1], max_tokens=6, logprobs=3, temperature=2, seed=1, top_k=50
    )
    prompt = AutoTokenizer.from_pretrained(base_model)(PROMPTS[1])["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer["output_ids"]])).logits[0, len(prompt) - 1 : -1]
    wanted = logits.log_softmax(-1)
    for entry, row in zip(json.loads(answer["logprobs"]), wanted, strict=True):
        # Two ways of adding up float32; adjacent values may change places within it.
        assert entry["logprob"] == pytest.approx(float(row[entry["id"]]), abs=1e-3)
        assert [other["logprob"] for other in entry["top"]] == pytest.approx(
            row.topk(3).values.tolist(), abs=1e-3
        )


def test_a_stop_string_cuts_log_probabilities(server: RunningServer):
    free = generate(server, text_input=PROMPTS[3], max_tokens=16)["text_output"]
    cut = generate(server, text_input=PROMPTS[3], max_tokens=16, stop=free[6:10], logprobs=1)
    assert cut["finish_reason"] == "stop"
    assert len(cut["output_ids"]) < 16
    assert [entry["id"] for entry in json.loads(cut["logprobs"])] == cut["output_ids"]


@pytest.mark.parametrize("seed", [1, 2])
def test_min_p_of_one_is_greedy_at_any_temperature(server: RunningServer, seed: int):
    asked = {"text_input": PROMPTS[1], "max_tokens": 12}
    greedy = generate(server, **asked)["text_output"]
    hot = {**asked, "temperature": 1.5, "seed": seed}
    assert generate(server, **hot, min_p=1)["text_output"] == greedy
    assert generate(server, **hot)["text_output"] != greedy


def test_a_scale_of_zero_is_the_base_model_and_of_one_the_adapter(server: RunningServer):
    asked = {"text_input": PROMPTS[0], "max_tokens": 8}
    base = generate(server, **asked)
    answers = {
        scale: generate(server, **asked, adapter_id=SYNTHETIC[3], adapter_scale=scale)
        for scale in (0, 1, "1.0", -1)
    }
    plain = generate(server, **asked, adapter_id=SYNTHETIC[3])
    assert plain["output_ids"] != base["output_ids"]
    assert answers[0]["output_ids"] == base["output_ids"]
    assert answers[0]["adapter_version"] == plain["adapter_version"]
    assert answers[1]["output_ids"] == answers["1.0"]["output_ids"] == plain["output_ids"]
    assert answers[-1]["output_ids"] not in (base["output_ids"], plain["output_ids"])
    # Nothing to multiply.
    assert generate(server, **asked, adapter_scale=5)["output_ids"] == base["output_ids"]


def test_a_deadline_that_passes_is_told_on_every_way_in(server: RunningServer):
    asked = {"max_tokens": 4000, "ignore_eos": True, "deadline_ms": 1}
    check_refused(server, asked, "UNAVAILABLE", "deadline_ms=1 passed", PROMPTS[0])
    status = wait_idle(server)
    assert status.check_errors == []
    assert status.gauges["kv_blocks_free"] == status.gauges["kv_blocks_total"]


def test_a_deadline_in_the_middle_of_a_stream_ends_it_with_an_error(server: RunningServer):
    events = list(stream(server, text_input=PROMPTS[0], max_tokens=8000, ignore_eos=True, deadline_ms=5_000))
    assert events[-1]["error"].startswith("[UNAVAILABLE] deadline_ms=5000 passed after ")
    assert all("error" not in event for event in events[:-1])
    assert wait_idle(server).check_errors == []


@pytest.mark.parametrize(
    "extra", [{"deadline_ms": 10**6}, {"request_priority": 1000}, {"request_priority": -7}], ids=json.dumps
)
def test_what_hurries_a_request_does_not_change_its_answer(server: RunningServer, extra: dict[str, int]):
    asked = {"text_input": PROMPTS[2], "max_tokens": 6}
    assert generate(server, **asked, **extra)["output_ids"] == generate(server, **asked)["output_ids"]


LIMITS: dict[str, tuple[list[Any], list[Any]]] = {
    "adapter_scale": ([-100, 100], [-100.5, 101, "1e39", "much"]),
    "max_tokens": ([1], [0, 2**31]),
    "min_tokens": ([0, 2], [-1, 3, 2**31]),
    "temperature": ([0, 1e-45, 100], [-0.5, 100.5, "1e39"]),
    "top_p": ([1e-30, 1], [0.0, 1.5]),
    "top_k": ([0, 1, 2**31 - 1], [-1, 2**31]),
    "min_p": ([0, 1e-45, 1], [-0.1, 1.5]),
    "seed": ([0, 2**63 - 1], [-1, "9223372036854775808"]),
    "repetition_penalty": ([1e-45, 100], [0.0, -1, 100.5, "1e39"]),
    "presence_penalty": ([-2, 2], [-2.5, 2.5]),
    "frequency_penalty": ([-2, 2], [-2.5, 2.5]),
    "logprobs": ([0, 20], [-1, 21, 1.5]),
    "deadline_ms": ([0, 2**31 - 1], [-1, 2**31]),
    "request_priority": ([-1000, 1000], [-1001, 1001]),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (allowed, _) in LIMITS.items() for value in allowed]
)
def test_a_limit_is_allowed(server: RunningServer, name: str, value: Any):
    asked = {"text_input": PROMPTS[0], "max_tokens": 2, "adapter_id": SYNTHETIC[0], "ignore_eos": True}
    if name in ("top_p", "top_k", "min_p", "seed"):
        asked["temperature"] = 1.0
    answer = generate(server, **{**asked, name: value})
    # /generate gives a list of one as its only element.
    ids = answer["output_ids"] if isinstance(answer["output_ids"], list) else [answer["output_ids"]]
    assert len(ids) == answer["num_output_tokens"] == (1 if name == "max_tokens" else 2)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (_, refused) in LIMITS.items() for value in refused]
)
def test_what_lies_beyond_a_limit_is_refused(server: RunningServer, name: str, value: Any):
    extra = {"max_tokens": 2} if name == "min_tokens" else {}
    check_refused(server, {**extra, name: value}, "INVALID_ARG", f"parameter {name}: got ")
