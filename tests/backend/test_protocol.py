"""The wire contract: tensors and parameters to prompts, answers to tensors, and every refusal."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manylora.errors import InvalidArgumentError
from manylora.front_end.answer import Answer
from manylora.front_end.chat_messages import read_messages
from manylora.front_end.parameters import (
    MAX_CHARS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    PARAMETERS,
)
from manylora.front_end.prompt import Prompt
from manylora.front_end.protocol import decode, encode
from manylora.front_end.text import Tokenizer
from manylora.front_end.tokenising import read_text, tokenise
from manylora.messages import EngineInfo, SamplingParams
from manylora.token_checks import check_input_ids, check_stop_token_ids

from .conftest import byte_tokenizer

TOKENIZER = Tokenizer(byte_tokenizer())
INFO = EngineInfo(base_model="", max_model_len=8, vocab_size=100, eos_token_ids=[2])


def strings(*values: str | bytes) -> Any:
    column = np.empty((len(values), 1), dtype=np.object_)
    column[:, 0] = [v.encode() if isinstance(v, str) else v for v in values]
    return column


def decoded(parameters: dict[str, Any] | None = None, **tensors: Any) -> Prompt:
    if not tensors:
        tensors = {"text_input": strings("hi")}
    (prompt,) = decode(tensors, json.dumps(parameters) if parameters else "")
    return prompt


def test_a_bare_text_gets_the_defaults() -> None:
    assert decoded() == Prompt(text=b"hi", params=SamplingParams())
    assert decoded().params == SamplingParams(max_tokens=128, temperature=0, top_p=1, top_k=0)
    assert (decoded().adapter_scale, decoded().priority, decoded().deadline_ms) == (1, 0, 0)


@pytest.mark.parametrize("name", ["text_input", "input_ids"])
def test_a_batch_of_no_sequences_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="no sequences"):
        decode({name: np.empty((0, 1), dtype=np.int32 if name == "input_ids" else np.object_)}, "")


@pytest.mark.parametrize("name", ["text_input", "input_ids", "sampling_parameters"])
@pytest.mark.parametrize("shape", [(1,), (), (1, 1, 1)], ids=str)
def test_a_tensor_that_is_no_batch_is_refused(name: str, shape: tuple[int, ...]) -> None:
    tensors = {"text_input": strings("x"), name: np.ones(shape, dtype=np.int32)}
    if name == "input_ids":
        del tensors["text_input"]
    with pytest.raises(InvalidArgumentError, match=rf"^{name}: got {len(shape)} dimensions, allowed are 2"):
        decode(tensors, "")


def test_ids_arrive_as_plain_integers() -> None:
    prompt = decoded(input_ids=np.array([[5, 6, 7]], dtype=np.int32))
    input_ids = tokenise(prompt, TOKENIZER, INFO)
    assert input_ids == [5, 6, 7]
    assert type(input_ids[0]) is int
    assert prompt.text is None


@pytest.mark.parametrize("names", [[], ["text_input", "input_ids"]], ids=["neither", "both"])
def test_exactly_one_prompt_input_is_needed(names: list[str]) -> None:
    tensors = {"text_input": strings("x"), "input_ids": np.ones((1, 2), dtype=np.int32)}
    with pytest.raises(InvalidArgumentError, match="exactly one"):
        decode({name: tensors[name] for name in names}, "")


@pytest.mark.parametrize("raw", [7, 7.0, "7", "+7"], ids=repr)
@pytest.mark.parametrize("name", ["max_tokens", "top_k", "seed"])
def test_an_integer_in_each_form(name: str, raw: Any) -> None:
    value = getattr(decoded({name: raw}).params, name)
    assert value == 7
    assert type(value) is int


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", "7.0"),
        ("max_tokens", "٧"),
        ("max_tokens", ""),
        ("max_tokens", 1 << 31),
        ("max_tokens", [7]),
        ("max_tokens", None),
        ("min_tokens", -1),
        ("top_k", -1),
        ("seed", -1),
        ("seed", 1 << 63),
        ("seed", float(1 << 53)),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "warm"),
        ("temperature", "nan"),
        ("temperature", "9" * 400),
        ("temperature", 10**400),
        ("temperature", False),
        ("top_p", 0),
        ("top_p", 1.01),
        ("ignore_eos", 1),
        ("ignore_eos", "yes"),
        ("ignore_eos", "True"),
        ("echo", 0.0),
        ("adapter_id", 3),
        ("adapter_id", None),
        ("stop", 3),
        ("stop", ["a", ""]),
        ("stop", ["a", 1]),
        ("stop", "[1]"),
        ("stop", "x" * 257),
        ("stop", [str(i) for i in range(17)]),
        ("stop", ["\ud800"]),
        ("stop_token_ids", 3),
        ("stop_token_ids", "3"),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [1 << 31]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", ["x"]),
        ("stop_token_ids", "[1"),
        ("stop_token_ids", "[" * 2000),
        ("stop_token_ids", {"1": 2}),
        ("stop_token_ids", list(range(MAX_STOP_TOKEN_IDS + 1))),
        ("stop_token_ids", None),
        ("add_special_tokens", 1),
        ("min_p", True),
        ("logprobs", True),
        ("logprobs", "many"),
        ("presence_penalty", "-inf"),
        ("repetition_penalty", float("nan")),
        ("adapter_scale", "big"),
        ("adapter_scale", [1]),
        ("deadline_ms", 0.5),
        ("request_priority", "high"),
    ],
    ids=lambda v: repr(v)[:20],
)
def test_a_value_out_of_contract_names_the_parameter_what_it_got_and_what_is_allowed(
    name: str, raw: Any
) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^parameter {name}: got .+, allowed is .+") as caught:
        decoded({name: raw})
    assert PARAMETERS[name].allowed in caught.value.message
    assert len(caught.value.message) < 400


def test_the_largest_seed_survives_as_text_and_as_a_number() -> None:
    seed = (1 << 63) - 1
    assert decoded({"seed": seed}).params.seed == decoded({"seed": str(seed)}).params.seed == seed
    assert decoded({"seed": float((1 << 53) - 1)}).params.seed == (1 << 53) - 1


@pytest.mark.parametrize(("raw", "value"), [(0.5, 0.5), (1, 1.0), ("0.25", 0.25), ("1e-1", 0.1), (".5", 0.5)])
def test_a_number_in_each_form(raw: Any, value: float) -> None:
    temperature = decoded({"temperature": raw}).params.temperature
    assert temperature == value
    assert type(temperature) is float


@pytest.mark.parametrize(("raw", "value"), [(True, True), (False, False), ("true", True), ("false", False)])
def test_a_boolean_in_each_form(raw: Any, value: bool) -> None:
    assert decoded({"echo": raw}).echo is value
    assert decoded({"ignore_eos": raw}).params.ignore_eos is value


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("END", ("END",)),
        ('["a", "b", "a"]', ("a", "b")),
        ('  ["a"]', ("a",)),
        ("[not json", ("[not json",)),
        ('["[1]"]', ("[1]",)),
        ("", ()),
        ("[]", ()),
        ("\n", ("\n",)),
        ("[" * 200, ("[" * 200,)),
    ],
    ids=lambda v: repr(v)[:20],
)
def test_stop_strings_in_each_form(raw: str, value: tuple[str, ...]) -> None:
    assert decoded({"stop": raw}).stop == value


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("[7, 2, 7]", (7, 2)),
        ([7, "2", 7.0], (7, 2)),
        ([], ()),
        ("", ()),
        ("[]", ()),
        (list(range(MAX_STOP_TOKEN_IDS)), tuple(range(MAX_STOP_TOKEN_IDS))),
    ],
    ids=lambda v: repr(v)[:20],
)
def test_stop_token_ids_in_each_form(raw: Any, value: tuple[int, ...]) -> None:
    assert decoded({"stop_token_ids": raw}).params.stop_token_ids == value


def test_a_stop_token_that_the_model_cannot_say_is_refused() -> None:
    check_stop_token_ids(SamplingParams(stop_token_ids=(0, 99)), INFO)
    with pytest.raises(InvalidArgumentError, match="stop_token_ids: got 100, allowed are ids from 0 to 99"):
        check_stop_token_ids(SamplingParams(stop_token_ids=(5, 100)), INFO)


def test_a_null_in_the_tensor_asks_for_the_default() -> None:
    nulls = strings(json.dumps(dict.fromkeys(PARAMETERS)))
    assert decoded(text_input=strings("hi"), sampling_parameters=nulls) == decoded()
    tensor = strings('{"stop": null, "seed": null, "max_tokens": 3}')
    assert decoded(
        {"seed": 4}, text_input=strings("hi"), sampling_parameters=tensor
    ).params == SamplingParams(seed=4, max_tokens=3)
    with pytest.raises(InvalidArgumentError, match=r'key "no" \(got null\): no such parameter'):
        decoded(text_input=strings("hi"), sampling_parameters=strings('{"no": null}'))


def test_the_longest_stop_strings_are_allowed_and_longer_parameters_are_not_read() -> None:
    stop = [chr(0x1F600 + i) * MAX_STOP_CHARS for i in range(MAX_STOP_STRINGS)]
    # Each character two escapes in a list that is text in JSON.
    largest: dict[str, Any] = {"stop": json.dumps(stop), "stop_token_ids": json.dumps(list(range(64)))}
    assert decoded(largest).stop == tuple(stop)
    tensor = strings(json.dumps(largest))
    assert decoded(text_input=strings("hi"), sampling_parameters=tensor).stop == tuple(stop)
    largest["adapter_id"] = "a" * MAX_CHARS
    with pytest.raises(
        InvalidArgumentError, match=rf"^parameters: got \d+ characters, allowed are {MAX_CHARS}"
    ):
        decoded(largest)
    tensor = strings("[" * (MAX_CHARS + 1))
    with pytest.raises(
        InvalidArgumentError, match=rf"^sampling_parameters: got {MAX_CHARS + 1} bytes, allowed"
    ):
        decoded(text_input=strings("hi"), sampling_parameters=tensor)


def test_adapter_and_its_alias() -> None:
    assert decoded({"adapter_id": "a"}).adapter_id == "a"
    assert decoded({"lora_name": "a"}).adapter_id == "a"
    assert decoded({"lora_name": "a", "adapter_id": "a"}).adapter_id == "a"
    with pytest.raises(InvalidArgumentError, match=r"adapter_id: got .b. and, as its alias lora_name, .a."):
        decoded({"lora_name": "a", "adapter_id": "b"})
    with pytest.raises(InvalidArgumentError, match="alias"):
        decoded({"lora_name": "a", "adapter_id": ""})


@pytest.mark.parametrize("name", ["max_token", "timeout", "priority", "Stop", ""])
def test_an_unknown_parameter_is_named_with_what_is_known(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"no such parameter; allowed are adapter_id, ") as caught:
        decoded({name: 3})
    assert f'parameter "{name}" (got 3)' in caught.value.message


def test_names_that_generate_adds_by_itself_are_ignored() -> None:
    assert decoded({"id": "7", "stream": True, "triton_enable_empty_final_response": True}) == decoded()


LIMITS: dict[str, tuple[float, float]] = {
    "adapter_scale": (-100, 100),
    "max_tokens": (1, 2**31 - 1),
    "min_tokens": (0, 1),
    "temperature": (0, 100),
    "top_p": (5e-324, 1),
    "top_k": (0, 2**31 - 1),
    "min_p": (0, 1),
    "seed": (0, 2**63 - 1),
    "repetition_penalty": (5e-324, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "logprobs": (0, 20),
    "deadline_ms": (0, 2**31 - 1),
    "request_priority": (-1000, 1000),
}
"""The lowest and the highest value of each number; min_tokens is bounded by max_tokens besides."""


def value_of(prompt: Prompt, name: str) -> Any:
    names = {"request_priority": "priority"}
    return getattr(prompt if hasattr(prompt, names.get(name, name)) else prompt.params, names.get(name, name))


def test_every_number_has_its_limits_in_the_table() -> None:
    others = {"adapter_id", "lora_name", "ignore_eos", "stop", "stop_token_ids", "chat", "echo"}
    others |= {"add_special_tokens"}
    assert set(PARAMETERS) == set(LIMITS) | others


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_allowed_and_what_lies_beyond_is_not(name: str) -> None:
    low, high = LIMITS[name]
    for value in (low, high):
        assert value_of(decoded({name: value}), name) == value
        assert value_of(decoded({name: str(value)}), name) == value
    is_integer = "integer" in PARAMETERS[name].allowed
    beyond = (low - 1, high + 1) if is_integer else (np.nextafter(low, -1e3), np.nextafter(high, 1e3))
    if name == "min_tokens":
        beyond = (-1, 2**31)
    for value in beyond:
        with pytest.raises(InvalidArgumentError, match=rf"^parameter {name}: got"):
            decoded({name: int(value) if is_integer else float(value)})


def test_what_concerns_the_sequence_and_not_its_tokens_stands_beside_the_sampling() -> None:
    prompt = decoded({"adapter_scale": "0.5", "request_priority": -3, "deadline_ms": 100.0, "logprobs": 2})
    assert (prompt.adapter_scale, prompt.priority, prompt.deadline_ms) == (0.5, -3, 100)
    assert prompt.params == SamplingParams(logprobs=2)
    assert type(prompt.deadline_ms) is int


def test_min_tokens_above_max_tokens_is_refused() -> None:
    assert decoded({"min_tokens": 5, "max_tokens": 5}).params.min_tokens == 5
    with pytest.raises(InvalidArgumentError, match="min_tokens: got 6, allowed is up to max_tokens=5"):
        decoded({"min_tokens": 6, "max_tokens": 5})


def test_request_parameters_win_over_the_tensor() -> None:
    tensor = strings(json.dumps({"lora_name": "a", "max_tokens": "3", "stop": ["x"], "stream": True}))
    prompt = decoded({"adapter_id": "b"}, text_input=strings("hi"), sampling_parameters=tensor)
    assert (prompt.adapter_id, prompt.params.max_tokens, prompt.stop) == ("b", 3, ("x",))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "got JSON list"),
        ('{"max_tokens": {}}', "sampling_parameters key max_tokens: got {}"),
        ('{"no": 1}', "no such parameter"),
        (b"\xff", "not UTF-8 at byte 0"),
        ("[" * 60_000, "not JSON"),
        ('{"seed": ' + "9" * 5000 + "}", "not JSON"),
    ],
    ids=["broken", "list", "bad value", "unknown", "not utf-8", "too deep", "too long"],
)
def test_a_wrong_sampling_parameters_tensor_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        decoded(text_input=strings("hi"), sampling_parameters=strings(text))


def test_an_empty_sampling_parameters_tensor_asks_for_nothing() -> None:
    assert decoded(text_input=strings("hi"), sampling_parameters=strings("")) == decoded()


def test_rows_of_a_batch_have_their_own_sampling_parameters() -> None:
    tensors = {
        "input_ids": np.array([[1, 2], [3, 4]], dtype=np.int32),
        "sampling_parameters": strings(
            '{"adapter_id": "a", "deadline_ms": 9}',
            '{"adapter_id": "b", "max_tokens": 9, "adapter_scale": 2, "logprobs": 3}',
        ),
    }
    first, second = decode(tensors, '{"max_tokens": 4}')
    assert (first.deadline_ms, first.adapter_scale, first.params.logprobs) == (9, 1.0, 0)
    assert (second.deadline_ms, second.adapter_scale, second.params.logprobs) == (0, 2.0, 3)
    assert first.input_ids is not None
    assert second.input_ids is not None
    assert (list(first.input_ids), first.adapter_id, first.params.max_tokens) == ([1, 2], "a", 4)
    assert (list(second.input_ids), second.adapter_id, second.params.max_tokens) == ([3, 4], "b", 4)


@pytest.mark.parametrize("chat", [False, True])
def test_text_that_is_not_utf8_is_refused(chat: bool) -> None:
    prompt = decoded({"chat": chat}, text_input=strings(b"ab\xff"))
    with pytest.raises(InvalidArgumentError, match="text_input: not UTF-8 at byte 2"):
        tokenise(prompt, TOKENIZER, INFO)


def test_two_strings_for_one_sequence_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="got 2 strings"):
        decoded(text_input=strings("a", "b").reshape(1, 2))


def test_chat_with_ids_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="chat"):
        decoded({"chat": "true"}, input_ids=np.ones((1, 2), dtype=np.int32))


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([], "no tokens"),
        ([1] * 8, "has 8 tokens; allowed are below max_model_len=8"),
        ([1, -1], "got -1, allowed are ids from 0 to 99"),
        ([100, 1], "got 100"),
    ],
)
def test_ids_that_the_engine_cannot_take_are_refused(ids: list[int], reason: str) -> None:
    check_input_ids([1] * 7, INFO)
    check_input_ids([0, 99], INFO)
    with pytest.raises(InvalidArgumentError, match=reason):
        check_input_ids(ids, INFO)


def test_answers_become_columns_with_ids_padded_on_the_right() -> None:
    common = {"finish_reason": "stop", "num_input_tokens": 3, "adapter_version": "v"}
    outputs = encode(
        [
            Answer(text="é", token_ids=[1, 2, 3], num_output_tokens=3, **common),
            Answer(text="", token_ids=[4], num_output_tokens=1, **common),
        ]
    )
    assert outputs["output_ids"].tolist() == [[1, 2, 3], [4, -1, -1]]
    assert outputs["text_output"].tolist() == [["é".encode()], [b""]]
    assert outputs["num_output_tokens"].tolist() == [[3], [1]]
    assert {name: (a.shape[1:], a.dtype.name) for name, a in outputs.items()} == {
        "text_output": ((1,), "object"),
        "output_ids": ((3,), "int32"),
        "finish_reason": ((1,), "object"),
        "num_input_tokens": ((1,), "int32"),
        "num_output_tokens": ((1,), "int32"),
        "logprobs": ((1,), "object"),
        "adapter_version": ((1,), "object"),
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(
    parameters=st.dictionaries(st.sampled_from([*PARAMETERS, "other"]), json_values, max_size=3),
    text=st.binary(max_size=8) | st.text(max_size=8).map(str.encode),
)
def test_any_input_is_read_or_refused_with_an_error_of_ours(parameters: dict[str, Any], text: bytes) -> None:
    tensors = {"text_input": strings(text)}
    try:
        (prompt,) = decode(tensors, json.dumps(parameters))
        if prompt.chat:
            read = [message["content"] for message in read_messages(read_text(prompt), 8)]
        else:
            read = [read_text(prompt)]
    except InvalidArgumentError as error:
        refused = error.message
    else:
        refused = ""
        assert read == [text.decode()]
    known = set(parameters) <= set(PARAMETERS)
    assert refused or known
