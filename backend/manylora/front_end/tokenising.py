"""From a request's prompt to token ids, within the model's limits.

Sizes are checked before anything is read, so that a prompt that cannot fit costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from manylora import token_checks
from manylora.errors import InvalidArgumentError
from manylora.front_end.chat_messages import Message, read_messages, require_few
from manylora.front_end.parameters import is_unicode
from manylora.front_end.prompt import Prompt
from manylora.front_end.text import Tokenizer
from manylora.messages import EngineInfo

IDS_PER_CHAR = 16
"""Ids that can be read in the time that tokenising one character takes."""
_CHAR_BYTES = 4
"""Of a character in UTF-8, at most."""
_JSON_CHAR_BYTES = 12
"""Of a character in JSON, where each half of a surrogate pair may be an escape."""
_JSON_MESSAGE_BYTES = 256
"""Of a message's JSON besides its texts."""


def size_of(prompt: Prompt) -> int:
    """What it costs to tokenise a prompt, as bytes of text."""
    if prompt.input_ids is not None:
        return len(prompt.input_ids) // IDS_PER_CHAR
    if prompt.messages is not None:
        return sum(len(text) for message in prompt.messages for text in message.values())
    return len(prompt.text or "")


def check_size(prompt: Prompt, tokenizer: Tokenizer, info: EngineInfo) -> None:
    """Refuse a prompt that is too large whatever its content.

    Raises:
        InvalidArgumentError: so many ids, messages or bytes that they cannot be fewer than `max_model_len`
            tokens.
    """
    if prompt.input_ids is not None:
        token_checks.check_num_tokens(len(prompt.input_ids), info)
        return
    if prompt.messages is not None:
        require_few(len(prompt.messages), "messages", info.max_model_len)
        return
    max_chars = _max_chars(tokenizer, info)
    if prompt.chat:
        limit = max_chars * _JSON_CHAR_BYTES + info.max_model_len * _JSON_MESSAGE_BYTES
    elif isinstance(prompt.text, bytes):
        limit = max_chars * _CHAR_BYTES
    else:
        limit = max_chars
    _require_size(
        len(prompt.text or ""), limit, "bytes" if isinstance(prompt.text, bytes) else "characters", info
    )


def tokenise(prompt: Prompt, tokenizer: Tokenizer, info: EngineInfo) -> list[int]:
    """Token ids of a prompt whose size has been checked.

    Raises:
        InvalidArgumentError: it cannot be read, or is too long for the model.
        UnsupportedError: a chat without a chat template, or with more than text.
    """
    if prompt.input_ids is not None:
        input_ids = list(prompt.input_ids)
    elif prompt.is_chat:
        input_ids = tokenizer.encode_chat(_messages(prompt, info), _max_chars(tokenizer, info))
    else:
        text = read_text(prompt)
        # Tokenising a text that cannot fit would delay others for nothing.
        _require_size(len(text), _max_chars(tokenizer, info), "characters", info)
        input_ids = tokenizer.encode(text, add_special_tokens=prompt.add_special_tokens)
    token_checks.check_input_ids(input_ids, info)
    return input_ids


def echo(prompt: Prompt, input_ids: list[int], tokenizer: Tokenizer) -> str:
    """The prompt as text, for the beginning of an answer."""
    if prompt.text is None or prompt.is_chat:
        return tokenizer.decode(input_ids)
    return read_text(prompt)


def read_text(prompt: Prompt) -> str:
    """The text of a prompt that has one.

    Raises:
        InvalidArgumentError: it is not Unicode.
    """
    text = prompt.text or ""
    if isinstance(text, bytes):
        return decode_utf8(text, "text_input")
    if not is_unicode(text):
        raise InvalidArgumentError("the prompt has half of a surrogate pair, which is no text")
    return text


def decode_utf8(raw: bytes, name: str) -> str:
    """
    Raises:
        InvalidArgumentError: it is not UTF-8.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{name}: not UTF-8 at byte {error.start}; send UTF-8 text") from error


def _messages(prompt: Prompt, info: EngineInfo) -> Sequence[Message]:
    if prompt.messages is not None:
        return prompt.messages
    return read_messages(read_text(prompt), info.max_model_len)


def _require_size(size: int, limit: int, unit: str, info: EngineInfo) -> None:
    if size > limit:
        raise InvalidArgumentError(
            f"the prompt has {size} {unit}; allowed are below max_model_len={info.max_model_len} tokens, "
            f"which cannot be more than {limit} {unit}"
        )


def _max_chars(tokenizer: Tokenizer, info: EngineInfo) -> int:
    return info.max_model_len * tokenizer.max_token_chars
