"""On the running server: tokens that end an answer, conversations that are none, and chats without end."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora.front_end.front_end import LONG_BYTES
from manylora.serve.background import RunningServer
from manylora_client import InvalidArgument, Unsupported
from transformers import AutoModelForCausalLM, AutoTokenizer
from tritonclient.utils import InferenceServerException

from bench.campaigns.harness import PROMPTS, connect

from .wire import CLIENTS, GRPC_STATUS, check_refused, generate, infer, refusal, stream

START, START_ID = "<|im_start|>", 1
TURNS = f"{START}user\nHi<|im_end|>\n{START}assistant\nHello.<|im_end|>\n"
ON_AND_ON: dict[str, Any] = {
    "text_input": TURNS * 4 + f"{START}user\nHi<|im_end|>\n{START}assistant\n",
    "max_tokens": 16,
    "ignore_eos": True,
}
"""The model ends its turn and, since it is let, begins the user's next one."""


@pytest.fixture(scope="module")
def on_and_on(server: RunningServer) -> dict[str, Any]:
    """The answer that nothing ends."""
    answer = generate(server, **ON_AND_ON)
    assert START_ID in answer["output_ids"]
    return answer


def test_a_stop_string_that_is_a_special_token_ends_an_answer_where_it_does_for_transformers(
    server: RunningServer, base_model: Path, on_and_on: dict[str, Any]
):
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    inputs = tokenizer(ON_AND_ON["text_input"], return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()
    for stop in (START, f"\n{START}user"):
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=16,
                eos_token_id=None,
                stop_strings=[stop],
                tokenizer=tokenizer,
            )
        wanted = out[0, inputs["input_ids"].shape[1] :].tolist()
        assert START_ID in wanted
        assert generate(server, **ON_AND_ON, stop=stop)["output_ids"] == wanted


@pytest.mark.parametrize("stop", [START, "\n" + START, json.dumps(["never in there", START])], ids=ascii)
def test_an_answer_ends_at_a_special_token(server: RunningServer, on_and_on: dict[str, Any], stop: str):
    asked = {**ON_AND_ON, "stop": stop}
    whole = generate(server, **asked)
    ids = on_and_on["output_ids"]
    assert whole["output_ids"] == ids[: ids.index(START_ID) + 1]
    assert whole["finish_reason"] == "stop"
    assert "<|" not in whole["text_output"]
    assert on_and_on["text_output"].startswith(whole["text_output"])
    # What stands before the special token belongs to the text, where it does not to the stop string.
    assert whole["text_output"] == ("Hello.\n" if stop.startswith("\n") else "Hello.\n\n")
    events = list(stream(server, **asked))
    assert "".join(event["text_output"] for event in events) == whole["text_output"]
    assert [i for event in events for i in ids_of(event)] == whole["output_ids"]
    assert events[-1]["finish_reason"] == "stop"


def ids_of(answer: dict[str, Any]) -> list[int]:
    """`/generate` gives a list of one as its only element."""
    ids = answer["output_ids"]
    return ids if isinstance(ids, list) else [ids]


@pytest.mark.parametrize("protocol", CLIENTS)
def test_a_stop_token_ends_an_answer_on_every_way_in(
    server: RunningServer, on_and_on: dict[str, Any], protocol: str
):
    ids = on_and_on["output_ids"]
    wanted = ids[: ids.index(START_ID) + 1]
    more = {name: value for name, value in ON_AND_ON.items() if name != "text_input"}
    inputs = {"text_input": [ON_AND_ON["text_input"]]}
    tensor = {"sampling_parameters": [json.dumps({"stop_token_ids": [START_ID, 5]})]}
    for answer in (
        infer(server, protocol, inputs, **more, stop_token_ids=f"[{START_ID}]"),
        infer(server, protocol, {**inputs, **tensor}, **more),
    ):
        assert answer.as_numpy("output_ids")[0].tolist() == wanted
        assert answer.as_numpy("finish_reason")[0, 0] == b"stop"
        assert b"<|" not in answer.as_numpy("text_output")[0, 0]


def test_the_client_sends_stop_tokens(server: RunningServer, on_and_on: dict[str, Any]):
    ids = on_and_on["output_ids"]
    with connect(server) as client:
        answer = client.generate(
            ON_AND_ON["text_input"], max_tokens=16, ignore_eos=True, stop_token_ids=[START_ID]
        )
    assert answer.token_ids == ids[: ids.index(START_ID) + 1]


def test_a_stop_token_outside_the_vocabulary_is_refused(server: RunningServer):
    check_refused(
        server,
        {"stop_token_ids": "[49152]"},
        "INVALID_ARG",
        "stop_token_ids: got 49152, allowed are ids from 0",
    )


def test_the_end_tokens_stand_in_the_log(server: RunningServer):
    assert "end tokens: <|im_end|> (2)" in server.log.read_text()


@pytest.mark.parametrize("protocol", CLIENTS)
def test_a_null_among_the_sampling_parameters_asks_for_the_default(server: RunningServer, protocol: str):
    nulls = json.dumps({"stop": None, "seed": None, "max_tokens": 6, "temperature": None})
    answer = infer(server, protocol, {"text_input": [PROMPTS[0]], "sampling_parameters": [nulls]})
    plain = generate(server, text_input=PROMPTS[0], max_tokens=6)
    assert answer.as_numpy("output_ids")[0].tolist() == plain["output_ids"]


def test_parts_of_a_content_are_joined(server: RunningServer):
    asked: dict[str, Any] = {"chat": True, "max_tokens": 8}
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]
    answer = generate(server, text_input=json.dumps([{"role": "user", "content": parts}]), **asked)
    assert answer == generate(server, text_input="Say hello.", **asked)
    with connect(server, "grpc") as client:
        chatted = client.chat([{"role": "user", "content": parts}], max_tokens=8)  # type: ignore[typeddict-item]
    assert chatted.text == answer["text_output"]
    # Text that begins with a bracket travels in a message.
    listed = json.dumps([{"role": "user", "content": "[1, 2] summed?"}])
    assert generate(server, text_input=listed, **asked)["num_input_tokens"] > 0


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ('[{"role": "user", "content": "Hi"}', "INVALID_ARG", "character 34: expected , or ], found the end"),
        ("[1, 2] summed?", "INVALID_ARG", "message 0 is a number; allowed is an object of role and content"),
        ('{"role": "user", "content": "Hi"}', "INVALID_ARG", "got one JSON object"),
        ('[{"role": "user", "name": "x"}]', "INVALID_ARG", 'message 0 has the unknown key "name"'),
        ('[{"role": "user"}]', "INVALID_ARG", "message 0 lacks the key content"),
        ('[{"role": "user", "content": [{"type": "image_url"}]}]', "UNSUPPORTED", "served is text"),
    ],
    ids=["cut off", "numbers", "object", "unknown key", "missing key", "image"],
)  # fmt: skip
def test_a_conversation_that_is_none_is_refused_with_its_reason(
    server: RunningServer, text: str, code: str, words: str
):
    check_refused(server, {"chat": True}, code, words, text)


TOO_MUCH: dict[str, tuple[Callable[[], str], str]] = {
    "a million empty messages": (
        lambda: "[" + ", ".join(['{"role": "user", "content": ""}'] * 10**6) + "]",
        "the prompt has 33000000 bytes; allowed are below max_model_len=8192 tokens, which cannot",
    ),
    "a role of 16 MB": (
        lambda: json.dumps([{"role": "r" * 16_000_000, "content": "x"}]),
        "the prompt has 16000030 bytes; allowed are below max_model_len=8192 tokens",
    ),
    "a role that is longer than any prompt": (
        lambda: json.dumps([{"role": "r" * 1_000_000, "content": "x"}]),
        "when the chat template has rendered it; allowed are at most 663552",
    ),
    "more messages than tokens": (
        lambda: json.dumps([{"role": "user", "content": ""}] * 8193),
        "more than 8192 messages, which cannot be below max_model_len=8192 tokens",
    ),
    "many keys": (
        lambda: '[{"role": "user", "content": "x"' + "".join(f', "k{i}": ""' for i in range(500_000)) + "}]",
        'message 0 has the unknown key "k0"',
    ),
    "more parts than tokens": (
        lambda: json.dumps([{"role": "user", "content": [{"type": "text", "text": ""}] * 200_000}]),
        "more than 8192 parts of contents, which cannot be below max_model_len=8192 tokens",
    ),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_a_chat_without_end_is_refused_and_others_are_answered_meanwhile(server: RunningServer, case: str):
    make, words = TOO_MUCH[case]
    body = make()
    asked: dict[str, Any] = {"text_input": PROMPTS[1], "max_tokens": 4}
    expected = generate(server, **asked)
    answers: list[dict[str, Any]] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            answers.append(generate(server, **asked))

    beside = threading.Thread(target=ask)
    beside.start()
    try:
        with pytest.raises(InferenceServerException) as caught:
            infer(server, "grpc", {"text_input": [body]}, chat=True)
        assert words in caught.value.message()
        assert words in refusal(server, text_input=body, chat=True)
    finally:
        ended.set()
        beside.join()
    assert answers
    assert all(answer == expected for answer in answers)


def test_a_full_batch_of_long_parameters_is_read_and_a_wrong_one_refused(server: RunningServer):
    """The most and longest stop strings, each character two escapes in a list that is text in JSON."""
    prompts = [PROMPTS[1]] * 64
    stop = json.dumps([chr(0x1F600 + i) * 256 for i in range(16)])
    rows = [json.dumps({"stop": stop})] * 64
    assert len(rows[0]) > 50_000
    answer = infer(server, "grpc", {"text_input": prompts, "sampling_parameters": rows}, max_tokens=1)
    first = ids_of(generate(server, text_input=PROMPTS[1], max_tokens=1))
    assert answer.as_numpy("output_ids").tolist() == [first] * 64

    nothing = json.dumps({"triton_x": [[]] * 15_000})
    for last, words in (
        (json.dumps({"top_k": -1}), "sampling_parameters key top_k: got -1, allowed is"),
        ("[" * 65_537, "sampling_parameters: got 65537 bytes, allowed are 65536"),
    ):
        rows = [nothing] * 63 + [last]
        with pytest.raises(InferenceServerException) as caught:
            infer(server, "grpc", {"text_input": prompts, "sampling_parameters": rows})
        assert caught.value.status() == GRPC_STATUS["INVALID_ARG"]
        assert words in caught.value.message()


def test_a_long_chat_is_answered(server: RunningServer):
    """Long to read; most of it is few tokens."""
    turns = [{"role": role, "content": " " * 900} for role in ("user", "assistant") * 6]
    text = json.dumps([*turns, {"role": "user", "content": "Say hello."}])
    assert len(text) > LONG_BYTES
    answer = generate(server, text_input=text, chat=True, max_tokens=2)
    assert len(ids_of(answer)) == 2
    short = generate(server, text_input="Say hello.", chat=True, max_tokens=2)
    assert answer["num_input_tokens"] > short["num_input_tokens"] + 12 * 10


def test_the_client_says_what_is_wrong_with_a_message(server: RunningServer):
    with connect(server) as client:
        with pytest.raises(InvalidArgument, match="message 0 lacks the key 'content'"):
            client.chat([{"role": "user"}])  # type: ignore[typeddict-item]
        with pytest.raises(Unsupported, match="served is text"):
            client.generate('[{"role": "user", "content": [{"type": "audio"}]}]', chat=True)  # type: ignore[call-arg]


def test_special_tokens_are_added_unless_not_wanted(server: RunningServer):
    """The base model's tokenizer adds none."""
    asked: dict[str, Any] = {"text_input": PROMPTS[0], "max_tokens": 4}
    plain = generate(server, **asked)
    for value in (True, False, "false"):
        assert generate(server, **asked, add_special_tokens=value) == plain
    check_refused(
        server, {"add_special_tokens": 1}, "INVALID_ARG", "add_special_tokens: got 1, allowed is true"
    )
