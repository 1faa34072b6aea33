"""What the client checks and turns into the wire's types before it sends anything."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from manylora_client import InvalidArgument
from manylora_client.request import build_request, chat_text


@pytest.mark.parametrize(
    ("value", "wire"),
    [
        ("text", "text"),
        (True, True),
        (7, 7),
        (0.5, 0.5),
        (2**63 - 1, 2**63 - 1),
        (np.int64(7), 7),
        (np.float32(0.5), 0.5),
        (["a", "b"], '["a", "b"]'),
        (["a\0"], '["a\\u0000"]'),
        (("é",), '["é"]'),
        ({"k": 1}, '{"k": 1}'),
        ([], "[]"),
    ],
    ids=repr,
)
def test_parameters_take_the_wires_types(value: Any, wire: Any):
    sent = build_request("x", None, {"name": value}).parameters["name"]
    assert sent == wire
    assert type(sent) is type(wire)


def test_none_is_not_sent():
    assert build_request("x", None, {"seed": None, "top_k": 0}).parameters == {"top_k": 0}


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        2**63,
        -(2**63) - 1,
        b"x",
        object(),
        [float("nan")],
        [object()],
        "\ud800",
        "a\0b",
        1j,
    ],
    ids=lambda value: type(value).__name__ if "object at" in repr(value) else repr(value),
)
def test_values_that_cannot_be_sent_are_refused_by_name(value: Any):
    with pytest.raises(InvalidArgument, match="'shade'"):
        build_request("x", None, {"shade": value})


@pytest.mark.parametrize(
    "name", ["timeout", "priority", "sequence_id", "triton_x", "id", "stream", "text_input", "input_ids"]
)
def test_names_that_are_not_a_requests_to_use_are_refused(name: str):
    with pytest.raises(InvalidArgument, match=name):
        build_request("x", None, {name: 1})


@pytest.mark.parametrize(
    ("prompt", "input_ids", "words"),
    [
        (None, None, "neither"),
        ("x", [1], "both"),
        (None, [], "at least one"),
        (None, [[1, 2]], "one dimension"),
        (None, [1.0], "integers"),
        (None, [True], "integers"),
        (None, ["1"], "integers"),
        (None, [-1], "-1"),
        (None, [2**31], "2147483648"),
        (None, [[1], [2, 3]], "input_ids"),
        ("\ud800", None, "UTF-8"),
        (b"x", None, "bytes"),
    ],
    ids=repr,
)
def test_prompts_that_cannot_be_sent_are_refused(prompt: Any, input_ids: Any, words: str):
    with pytest.raises(InvalidArgument, match=words):
        build_request(prompt, input_ids, {})


@pytest.mark.parametrize("ids", [[1, 2], (1, 2), np.array([1, 2]), np.array([1, 2], np.uint8)], ids=repr)
def test_ids_are_int32(ids: Any):
    sent = build_request(None, ids, {}).input_ids
    assert sent is not None
    assert sent.dtype == np.int32
    assert sent.tolist() == [1, 2]


def test_an_empty_prompt_is_the_servers_to_judge():
    assert build_request("", None, {}).text_input == ""


def test_a_chat_is_always_a_json_list():
    assert json.loads(chat_text("[1, 2]")) == [{"role": "user", "content": "[1, 2]"}]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé"}]
    assert json.loads(chat_text(turns)) == turns


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": 1}],
        ["hi"],
        [{"role": "u", "content": "", "x": ""}],
        [{"role": 1, "content": ""}],
        [{"role": "u", "content": b"x"}],
        [{"role": "u", "content": ["x"]}],
        [{"role": "u", "content": [{"type": "image_url", "image_url": "x"}]}],
        [{"role": "u", "content": [{"type": "image_url", "text": "x"}]}],
    ],
    ids=repr,
)
def test_messages_of_another_form_are_refused(messages: Any):
    with pytest.raises(InvalidArgument, match="message"):
        chat_text(messages)


def test_the_refusal_of_a_message_says_which_and_what_is_wrong():
    good = {"role": "user", "content": "x"}
    for wrong, words in (
        ({"role": "user", "content": "x", "name": "y"}, "message 1 has the unknown key 'name'"),
        ({"role": "user"}, "message 1 lacks the key 'content'"),
        ({"role": "user", "content": [{"type": "text"}]}, "message 1: part 0 lacks the key 'text'"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            chat_text([good, wrong])  # type: ignore[list-item]  # what is wrong with it


def test_parts_of_a_content_travel_as_they_are():
    turns: Any = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "é"}]}]
    assert json.loads(chat_text(turns)) == turns
