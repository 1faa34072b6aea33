"""What hostile cases are made of, and what is found wrong in the answers to them."""

from __future__ import annotations

import pytest

from bench.campaigns.harness import Wanted
from bench.campaigns.hostile.case import Asked, Case, GrpcCall, HttpCall, Known, Outcome, Reply
from bench.campaigns.hostile.grammar import Grammar
from bench.campaigns.hostile.judge import find_faults


def test_a_case_depends_on_its_seed_and_number_alone():
    prompts = [("", "The sea is"), ("pirate", "Hello")]
    cases = [Grammar(7, prompts).case(index) for index in range(100)]
    assert cases == [Grammar(7, prompts).case(index) for index in range(100)]
    assert cases != [Grammar(8, prompts).case(index) for index in range(100)]


OUTPUTS = {
    "text_output": ("BYTES", [1, 1], [b" blue"]),
    "output_ids": ("INT32", [1, 1], [4]),
    "finish_reason": ("BYTES", [1, 1], [b"length"]),
    "num_input_tokens": ("INT32", [1, 1], [3]),
    "num_output_tokens": ("INT32", [1, 1], [1]),
    "logprobs": ("BYTES", [1, 1], [b""]),
    "adapter_version": ("BYTES", [1, 1], [b""]),
}
ANSWERS = [Wanted([4], [1.0])]
HTTP = HttpCall(path="/v2/models/llm/infer", body=b"")
STREAM = GrpcCall(messages=(b"",), is_stream=True)
RIGHT = Asked(expects="answer", known=(Known(place=0, num_tokens=1),))
WRONG_IDS = {**OUTPUTS, "output_ids": ("INT32", [1, 1], [5])}
NO_REASON = {**OUTPUTS, "finish_reason": ("BYTES", [1, 1], [b""])}


def outcome(*replies: Reply, request_id: str = "", num_final: int = 1) -> Outcome:
    return Outcome(replies={request_id: list(replies)}, num_final={request_id: num_final})


@pytest.mark.parametrize(
    ("wire", "asked", "met", "words"),
    [
        (HTTP, RIGHT, outcome(Reply(outputs=OUTPUTS)), ""),
        (HTTP, RIGHT, outcome(Reply(outputs=WRONG_IDS)), "wrong answer"),
        (HTTP, RIGHT, outcome(Reply(outputs=NO_REASON)), "finish reasons"),
        (HTTP, RIGHT, outcome(Reply(error="[INVALID_ARG] x", status="400")), "refused, and should not be"),
        (HTTP, Asked(), outcome(Reply(outputs={"text_output": OUTPUTS["text_output"]})), "outputs"),
        (HTTP, Asked(), outcome(Reply(error="[INVALID_ARG] x", status="400")), ""),
        (HTTP, Asked(), outcome(Reply(error="[INVALID_ARG] x", status="500")), "status 500"),
        (HTTP, Asked(), outcome(Reply(error="[INTERNAL] x", status="500")), "a fault of ours"),
        (HTTP, Asked(), outcome(Reply(error="Not Found", status="404")), ""),
        (HTTP, Asked(), outcome(Reply(error="KeyError: 'x'", status="500")), "no known form"),
        (HTTP, Asked(expects="refusal"), outcome(Reply(outputs=OUTPUTS)), "served, and should not be"),
        (HTTP, Asked(), Outcome(end="timed out"), "no end"),
        (HTTP, Asked(), Outcome(end="closed"), "closed without an answer"),
        (HTTP, Asked(), Outcome(), "no reply"),
        (STREAM, RIGHT, outcome(Reply(outputs=OUTPUTS), request_id="r0"), ""),
        (STREAM, RIGHT, outcome(Reply(outputs=OUTPUTS), request_id="r0", num_final=2), "2 final replies"),
        (STREAM, RIGHT, outcome(Reply(outputs=OUTPUTS), request_id="r0", num_final=0), "0 final replies"),
        (STREAM, RIGHT, outcome(Reply(outputs=OUTPUTS), request_id="r9"), "no reply"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_what_is_wrong_is_found(wire: HttpCall | GrpcCall, asked: Asked, met: Outcome, words: str):
    faults = find_faults(Case(index=0, kind="known", wire=wire, asked=(asked,)), met, ANSWERS)
    assert bool(faults) == bool(words)
    assert words in "".join(faults)
