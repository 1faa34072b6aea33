"""Errors as they travel: their code in brackets, their text always fit to be sent."""

from __future__ import annotations

import json

import pytest
from manylora.errors import BY_CODE, MAX_SENT_BYTES, InvalidArgumentError, ManyloraError, from_code
from manylora.front_end import parameters


@pytest.mark.parametrize("code", BY_CODE)
def test_an_error_keeps_its_class_and_text_across_a_border(code: str) -> None:
    error = from_code(code, "what was wrong")
    assert isinstance(error, BY_CODE[code])
    assert (error.message, error.tagged()) == ("what was wrong", f"[{code}] what was wrong")


def test_an_unknown_code_is_a_fault_of_ours() -> None:
    assert from_code("NO_SUCH_CODE", "x").tagged() == "[INTERNAL] x"
    assert ManyloraError().tagged() == "[INTERNAL] "


@pytest.mark.parametrize(
    "given",
    ['{"stop": "\\ud800"}', '{"\\udfff": 1}', '{"adapter_id": "a\\ud83d"}', '{"seed": "\\udc00"}'],
)
def test_half_a_surrogate_pair_is_quoted_in_a_form_that_can_be_sent(given: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        parameters.parse(json.loads(given), "parameter")
    text = refused.value.tagged()
    assert text.encode("utf-8").startswith(b"[INVALID_ARG] parameter ")
    assert "\\ud" in text


@pytest.mark.parametrize("unit", ["a", "é", "漢", "\U0001f642", "\ud800"], ids=ascii)
def test_a_long_message_is_cut_to_what_a_header_holds(unit: str) -> None:
    short, long = InvalidArgumentError(unit * 100).tagged(), InvalidArgumentError(unit * 10_000).tagged()
    assert not short.endswith("...")
    assert long.endswith("...")
    assert MAX_SENT_BYTES - 6 < len(long.encode()) <= MAX_SENT_BYTES
    assert long.startswith(short)
