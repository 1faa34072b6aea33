"""Log probabilities on the wire: one JSON object for each id, always a number, always text."""

from __future__ import annotations

import json
import math

import pytest
from manylora.front_end.logprobs_json import LEAST_LOGPROB, logprobs_json
from manylora.front_end.text import Tokenizer
from manylora.messages import TokenLogprobs

from .conftest import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_tokenizer())


def test_each_id_has_its_text_and_its_alternatives(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode('"') + tokenizer.encode("x")
    logprobs = [
        TokenLogprobs(logprob=-0.5, top=[(first, -0.5), (second, -1.25)]),
        TokenLogprobs(logprob=-7.0, top=[(first, -0.125)]),
    ]
    assert json.loads(logprobs_json([first, second], logprobs, tokenizer)) == [
        {
            "id": first,
            "text": '"',
            "logprob": -0.5,
            "top": [
                {"id": first, "text": '"', "logprob": -0.5},
                {"id": second, "text": "x", "logprob": -1.25},
            ],
        },
        {
            "id": second,
            "text": "x",
            "logprob": -7.0,
            "top": [{"id": first, "text": '"', "logprob": -0.125}],
        },
    ]


def test_nothing_new_is_an_empty_list(tokenizer: Tokenizer) -> None:
    assert logprobs_json([], [], tokenizer) == "[]"


def test_minus_infinity_is_a_number(tokenizer: Tokenizer) -> None:
    text = logprobs_json([5], [TokenLogprobs(logprob=-math.inf, top=[(6, -math.inf)])], tokenizer)
    (entry,) = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert entry["logprob"] == entry["top"][0]["logprob"] == LEAST_LOGPROB


def test_nan_never_leaves(tokenizer: Tokenizer) -> None:
    text = logprobs_json([5], [TokenLogprobs(logprob=math.nan, top=[])], tokenizer)
    assert json.loads(text)[0]["logprob"] == LEAST_LOGPROB


def test_log_probabilities_that_are_missing_are_a_fault(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="zip"):
        logprobs_json([5, 6], [TokenLogprobs(logprob=-1.0, top=[])], tokenizer)
