"""Whatever is asked together, each answer is the one that PEFT gives to its prompt and adapter alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from manylora.serve.background import RunningServer
from manylora_client import Client, Completion

from bench.campaigns.harness import PROMPTS, SYNTHETIC, TRAINED, Peft, Wanted, at_once, connect

NUM_REQUESTS = 64
MAX_TOKENS = 16
QUESTIONS = ("What is the capital of Italy?", "How do plants grow?")


@dataclass(frozen=True)
class Case:
    adapter_id: str
    text: str
    is_chat: bool
    input_ids: list[int]
    sends_ids: bool

    def ask(self, client: Client, streaming: bool) -> Completion:
        options: dict[str, Any] = {"adapter_id": self.adapter_id, "max_tokens": MAX_TOKENS}
        if self.is_chat:
            if streaming:
                return client.chat(self.text, stream=True, **options).collect()
            return client.chat(self.text, **options)
        prompt: dict[str, Any] = {"input_ids": self.input_ids} if self.sends_ids else {"prompt": self.text}
        return (
            client.stream(**prompt, **options).collect()
            if streaming
            else client.generate(**prompt, **options)
        )


@pytest.fixture(scope="module")
def peft(base_model: Path, adapter_root: Path) -> Peft:
    return Peft(base_model, adapter_root)


@pytest.fixture(scope="module")
def cases(peft: Peft) -> list[Case]:
    """Adapters in turn; the trained ones and every other base request get a question, the others a text."""
    names = ["", *SYNTHETIC, *TRAINED]
    turns = itertools.cycle(names)
    found = []
    for number in range(NUM_REQUESTS):
        adapter_id, lap = next(turns), number // len(names)
        is_chat = adapter_id in TRAINED or (not adapter_id and lap % 2 == 1)
        text = QUESTIONS[lap % len(QUESTIONS)] if is_chat else PROMPTS[lap % len(PROMPTS)]
        if is_chat:
            message = [{"role": "user", "content": text}]
            ids = peft.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        else:
            ids = peft.tokenizer(text)["input_ids"]
        found.append(Case(adapter_id, text, is_chat, list(ids), sends_ids=number % 3 == 0))
    return found


@pytest.fixture(scope="module")
def wanted(peft: Peft, cases: list[Case]) -> list[Wanted]:
    by_adapter = {
        name: iter(peft.answers(name, [c.input_ids for c in cases if c.adapter_id == name], MAX_TOKENS))
        for name in dict.fromkeys(case.adapter_id for case in cases)
    }
    return [next(by_adapter[case.adapter_id]) for case in cases]


def test_the_adapters_answer_differently(cases: list[Case], wanted: list[Wanted]):
    assert len(TRAINED) == 3
    answers = {(c.adapter_id, c.text): tuple(w.token_ids) for c, w in zip(cases, wanted, strict=True)}
    for text in (PROMPTS[0], QUESTIONS[0]):
        found = [answer for (_, asked), answer in answers.items() if asked == text]
        assert len(set(found)) == len(found)


def test_64_requests_at_once_get_pefts_answers(
    server: RunningServer, cases: list[Case], wanted: list[Wanted]
):
    versions: dict[str, set[str]] = {case.adapter_id: set() for case in cases}
    num_ties = 0
    for protocol, streaming in itertools.product(("http", "grpc"), (False, True)):
        with connect(server, protocol) as client:
            found = at_once(lambda case: case.ask(client, streaming), cases)  # noqa: B023
        for case, completion, answer in zip(cases, found, wanted, strict=True):
            num_ties += answer.is_tie(completion.token_ids)
            versions[case.adapter_id].add(completion.adapter_version)
            assert completion.num_input_tokens == len(case.input_ids)
            assert completion.num_output_tokens == len(completion.token_ids)
            assert completion.finish_reason == ("length" if len(answer.token_ids) == MAX_TOKENS else "stop")
    print(f"{num_ties} ties in {4 * NUM_REQUESTS} sequences")
    assert num_ties <= 0.01 * 4 * NUM_REQUESTS
    assert versions.pop("") == {""}
    assert all(len(found) == 1 for found in versions.values())
    assert len(set.union(*versions.values())) == len(versions), "each adapter has a version of its own"
