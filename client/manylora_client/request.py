"""A request as it goes over the wire, checked as far as the client can."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import numpy.typing as npt

from manylora_client.errors import InvalidArgument
from manylora_client.types import Messages, TokenIds

WireValue = str | bool | int | float
"""What Triton carries as a request parameter."""

_TRITON_NAMES = frozenset(
    ("sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output")
)
_INPUT_NAMES = frozenset(("text_input", "input_ids", "sampling_parameters"))
# The server ignores these two, since /generate makes parameters of them; from a user they are a mistake.
_IGNORED_NAMES = frozenset(("id", "stream"))

_INT64 = range(-(2**63), 2**63)
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate. Exactly one of `text_input` and `input_ids` is set."""

    text_input: str | None
    input_ids: npt.NDArray[np.int32] | None
    """[T]"""
    parameters: dict[str, WireValue]


def build_request(
    prompt: str | None, input_ids: TokenIds | None, parameters: Mapping[str, object]
) -> Request:
    """Check a request and bring it into the wire's types.

    Args:
        prompt: the prompt as text.
        input_ids: the prompt as token ids.
        parameters: request parameters; None is dropped, lists and mappings become JSON text.

    Raises:
        InvalidArgument: both or none of `prompt` and `input_ids`, a value that the wire cannot carry, or a
            parameter's name that is not a request's to use.
    """
    if (prompt is None) == (input_ids is None):
        found = "both" if prompt is not None else "neither"
        raise InvalidArgument(f"got {found} of prompt and input_ids; exactly one is needed")
    if prompt is not None:
        _check_text("prompt", prompt)
    return Request(
        text_input=prompt,
        input_ids=None if input_ids is None else _ids(input_ids),
        parameters={k: _wire_value(k, v) for k, v in parameters.items() if v is not None},
    )


def chat_text(messages: Messages) -> str:
    """The `text_input` of a chat: always a JSON list, so that a message that looks like one stays a message.

    Raises:
        InvalidArgument: no message, or one that is not a mapping of `role` to text and of `content` to text
            or to a list of parts of text.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    turns = [_turn(f"message {number}", turn) for number, turn in enumerate(messages)]
    if not turns:
        raise InvalidArgument("messages is empty; at least one message is needed")
    return json.dumps(turns, ensure_ascii=False)


def _turn(place: str, turn: object) -> dict[str, object]:
    fields = _fields(place, turn, ("role", "content"))
    if not isinstance(fields["role"], str):
        raise InvalidArgument(f"{place}: role is a {type(fields['role']).__name__}; expected text")
    content = fields["content"]
    if isinstance(content, str):
        return fields
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise InvalidArgument(
            f"{place}: content is a {type(content).__name__}; expected text or a list of parts"
        )
    parts = [_fields(f"{place}: part {i}", part, ("type", "text")) for i, part in enumerate(content)]
    for number, part in enumerate(parts):
        if part["type"] != "text" or not isinstance(part["text"], str):
            raise InvalidArgument(f"{place}: part {number} is not of type 'text' with a text")
    return {**fields, "content": parts}


def _fields(place: str, value: object, names: tuple[str, str]) -> dict[str, object]:
    """A mapping that has exactly these names."""
    wanted = " and ".join(map(repr, names))
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"{place} is a {type(value).__name__}; expected a mapping of {wanted}")
    for name in value:
        if name not in names:
            raise InvalidArgument(f"{place} has the unknown key {name!r}; allowed are {wanted}")
    for name in names:
        if name not in value:
            raise InvalidArgument(f"{place} lacks the key {name!r}; needed are {wanted}")
    return dict(value)


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise InvalidArgument(f"{name} is a {type(text).__name__}; expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{name} cannot be sent as UTF-8: {error}") from error


def _ids(values: TokenIds) -> npt.NDArray[np.int32]:
    try:
        ids = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise InvalidArgument(f"input_ids cannot be read as a list of integers: {error}") from error
    if ids.ndim != 1 or ids.size == 0:
        raise InvalidArgument(
            f"input_ids has shape {list(ids.shape)}; expected one dimension and at least one id"
        )
    if ids.dtype.kind not in "iu":
        raise InvalidArgument(f"input_ids holds {ids.dtype}; expected integers")
    if int(ids.min()) < 0 or int(ids.max()) > _INT32_MAX:
        raise InvalidArgument(
            f"input_ids holds ids from {ids.min()} to {ids.max()}; allowed are 0 to {_INT32_MAX}"
        )
    return ids.astype(np.int32)


def _wire_value(name: str, value: object) -> WireValue:
    if name in _TRITON_NAMES or name.startswith("triton_"):
        raise InvalidArgument(
            f"parameter {name!r}: this name belongs to Triton and cannot be a request's parameter"
        )
    if name in _INPUT_NAMES or name in _IGNORED_NAMES:
        raise InvalidArgument(f"parameter {name!r}: this name is not a request's parameter")
    if isinstance(value, (str, bool)):
        if isinstance(value, str):
            _check_text(f"parameter {name!r}", value)
            if "\0" in value:
                # Triton would pass on what stands before it.
                raise InvalidArgument(f"parameter {name!r}={value!r}: text must not hold the character NUL")
        return value
    # The abstract types take in numpy's scalars.
    if isinstance(value, Integral):
        if int(value) not in _INT64:
            raise InvalidArgument(f"parameter {name!r}={value}: an integer must fit in 64 bits")
        return int(value)
    if isinstance(value, Real):
        if not math.isfinite(value):
            raise InvalidArgument(f"parameter {name!r}={value}: a number must be finite")
        return float(value)
    if not isinstance(value, (Sequence, Mapping)) or isinstance(value, (bytes, bytearray, memoryview)):
        raise InvalidArgument(
            f"parameter {name!r} is a {type(value).__name__}; "
            "expected text, a number, a boolean, a list or a mapping"
        )
    return _json(name, value)


def _json(name: str, value: Sequence[object] | Mapping[str, object]) -> str:
    try:
        plain = dict(value) if isinstance(value, Mapping) else list(value)
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"parameter {name!r} cannot be written as JSON: {error}") from error
    _check_text(f"parameter {name!r}", text)
    return text
