"""From a request's prompt to token ids, within what the model can take.

Sizes are looked at before anything is read: a prompt that cannot fit costs nobody anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from manylora import token_checks
from manylora.errors import InvalidArgumentError
from manylora.front_end import protocol
from manylora.front_end.chat_messages import read_messages
from manylora.front_end.protocol import Prompt
from manylora.front_end.text import Tokenizer
from manylora.messages import EngineInfo

_CHAR_BYTES = 4
"""Of a character in UTF-8, at most."""
_JSON_CHAR_BYTES = 12
"""Of a character in JSON, where each half of a surrogate pair may be an escape."""
_JSON_MESSAGE_BYTES = 256
"""Of what a message has in JSON besides its texts."""
_IDS_PER_CHAR = 16
"""Ids that are read in the time in which one character is tokenised."""
_PARAMETER_BYTES_PER_CHAR = 4
"""Bytes of parameters that are read, and whose stop strings are prepared, in that time."""


def size_of(prompt: Prompt) -> int:
    """What reading a prompt costs, as bytes of text."""
    if prompt.input_ids is not None:
        return prompt.input_ids.size // _IDS_PER_CHAR
    return len(prompt.text_input or b"")


def size_of_parameters(tensors: Mapping[str, npt.NDArray[Any]], parameters_json: str) -> int:
    """What reading the parameters of a request costs, as bytes of text.

    Raises:
        InvalidArgumentError: they are longer than allowed.
    """
    return protocol.count_parameter_bytes(tensors, parameters_json) // _PARAMETER_BYTES_PER_CHAR


def size_of_tensors(tensors: Mapping[str, npt.NDArray[Any]]) -> int:
    """What reading all prompts of a request costs, as bytes of text, before its parameters are read."""
    if "input_ids" in tensors:
        return tensors["input_ids"].size // _IDS_PER_CHAR
    return sum(map(len, tensors["text_input"].flat))


def check_size(prompt: Prompt, tokenizer: Tokenizer, info: EngineInfo) -> None:
    """Refuse a prompt that is too large however it reads.

    Raises:
        InvalidArgumentError: `max_model_len` ids or more, or so many bytes that they cannot be fewer tokens.
    """
    if prompt.input_ids is not None:
        token_checks.check_num_tokens(prompt.input_ids.size, info)
        return
    max_chars = _max_chars(tokenizer, info)
    if prompt.chat:
        max_bytes = max_chars * _JSON_CHAR_BYTES + info.max_model_len * _JSON_MESSAGE_BYTES
    else:
        max_bytes = max_chars * _CHAR_BYTES
    num_bytes = len(prompt.text_input or b"")
    if num_bytes > max_bytes:
        raise InvalidArgumentError(
            f"the prompt has {num_bytes} bytes; allowed are below max_model_len={info.max_model_len} tokens, "
            f"which cannot be more than {max_bytes} bytes"
        )


def tokenise(prompt: Prompt, tokenizer: Tokenizer, info: EngineInfo) -> list[int]:
    """Token ids of a prompt whose size has been checked.

    Raises:
        InvalidArgumentError: what cannot be read, or is too long for the model.
        UnsupportedError: a chat without a chat template, or with more than text.
    """
    if prompt.input_ids is not None:
        input_ids: list[int] = prompt.input_ids.tolist()
    else:
        text = protocol.read_text(prompt)
        max_chars = _max_chars(tokenizer, info)
        if prompt.chat:
            input_ids = tokenizer.encode_chat(read_messages(text, info.max_model_len), max_chars)
        elif len(text) > max_chars:
            # Tokenising it would hold up others, to no end.
            raise InvalidArgumentError(
                f"the prompt has {len(text)} characters; allowed are below max_model_len="
                f"{info.max_model_len} tokens, which cannot be more than {max_chars} characters"
            )
        else:
            input_ids = tokenizer.encode(text, add_special_tokens=prompt.add_special_tokens)
    token_checks.check_input_ids(input_ids, info)
    return input_ids


def echo(prompt: Prompt, input_ids: list[int], tokenizer: Tokenizer) -> str:
    """The prompt as an answer begins with it."""
    if prompt.text_input is None or prompt.chat:
        return tokenizer.decode(input_ids)
    return protocol.read_text(prompt)


def _max_chars(tokenizer: Tokenizer, info: EngineInfo) -> int:
    return info.max_model_len * tokenizer.max_token_chars
