"""Request parameters: their names, how each is read, and the limits of its values."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from manylora.errors import InvalidArgumentError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_CHARS = 1 << 16
"""Of all parameters of a sequence together, as JSON. The largest number of the longest stop strings needs
less, even with each character written as two escapes in a JSON list that is itself text in JSON."""
MAX_LOGPROBS = 20
MAX_TEMPERATURE = 100
"""Far below it, all tokens are about equally likely. Much larger ones overflow in float32, the engine's
type."""
MAX_REPETITION_PENALTY = 100
MAX_ADAPTER_SCALE = 100
MAX_PRIORITY = 1000

_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_INT32_MAX = (1 << 31) - 1
_EXACT_FLOAT = 1 << 53


@dataclass(frozen=True, slots=True)
class Parameter:
    """One name of the wire contract."""

    read: Callable[[Any], Any]
    """Turns the value as it came into a Python value; raises ValueError when it cannot."""
    allowed: str
    """For the error message."""


def parse(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Read the parameters of one source (request parameters, or one `sampling_parameters` object).

    `lora_name` is returned as `adapter_id`; names that `/generate` adds by itself are dropped.

    Args:
        source: what messages call it.

    Raises:
        InvalidArgumentError: an unknown name, a value of the wrong type or range, an alias that disagrees.
    """
    values: dict[str, Any] = {}
    for name, raw in given.items():
        if name in ("id", "stream") or name.startswith("triton_"):
            continue
        parameter = PARAMETERS.get(name)
        if parameter is None:
            raise InvalidArgumentError(
                f"{source} {_shorten(name)} (got {_shorten(raw)}): no such parameter; allowed are "
                + ", ".join(PARAMETERS)
            )
        try:
            values[name] = parameter.read(raw)
        except ValueError:
            raise InvalidArgumentError(
                f"{source} {name}: got {_shorten(raw)}, allowed is {parameter.allowed}"
            ) from None
    alias = values.pop("lora_name", None)
    if alias is not None and values.setdefault("adapter_id", alias) != alias:
        raise InvalidArgumentError(
            f"{source} adapter_id: got {_shorten(values['adapter_id'])} and, as its alias lora_name, "
            f"{_shorten(alias)}; send one of them"
        )
    return values


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded as UTF-8. JSON can contain half of a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def read(raw: Any) -> int:
        is_whole = isinstance(raw, float) and raw.is_integer() and abs(raw) < _EXACT_FLOAT
        is_text = isinstance(raw, str) and _INTEGER.fullmatch(raw)
        if isinstance(raw, bool) or not (is_whole or is_text or isinstance(raw, int)):
            raise ValueError
        value = int(raw)
        if not low <= value <= high:
            raise ValueError
        return value

    return read


def _number(is_allowed: Callable[[float], bool]) -> Callable[[Any], float]:
    def read(raw: Any) -> float:
        if isinstance(raw, bool) or not isinstance(raw, int | float | str):
            raise ValueError
        if isinstance(raw, str) and not _NUMBER.fullmatch(raw):
            raise ValueError
        try:
            value = float(raw)
        except OverflowError:  # an integer too large for a float
            raise ValueError from None
        if not math.isfinite(value) or not is_allowed(value):
            raise ValueError
        return value

    return read


def _boolean(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and raw in ("true", "false"):
        return raw == "true"
    raise ValueError


def _string(raw: Any) -> str:
    if not isinstance(raw, str) or not is_unicode(raw):
        raise ValueError
    return raw


def _stop(raw: Any) -> tuple[str, ...]:
    """A string, or a JSON list of strings. Text that is not a JSON list is one stop string; empty text is
    none."""
    if isinstance(raw, str) and raw.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            raw = json.loads(raw)
    if raw == "":
        return ()
    strings = raw if isinstance(raw, list) else [raw]
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError
    for text in strings:
        if not 1 <= len(_string(text)) <= MAX_STOP_CHARS:
            raise ValueError
    return tuple(dict.fromkeys(strings))


def _stop_token_ids(raw: Any) -> tuple[int, ...]:
    """A JSON list of ids, or its text; empty text is none."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw or "[]")
        except RecursionError as error:
            raise ValueError from error
    if not isinstance(raw, list | tuple) or len(raw) > MAX_STOP_TOKEN_IDS:
        raise ValueError
    read = _integer(0, _INT32_MAX)
    return tuple(dict.fromkeys(read(token_id) for token_id in raw))


def _shorten(raw: Any) -> str:
    text = json.dumps(raw, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


_FLAG = Parameter(_boolean, "true or false")
_NAME = Parameter(_string, "a string")
_PENALTY = Parameter(_number(lambda v: -2 <= v <= 2), "a number from -2 to 2")

PARAMETERS: dict[str, Parameter] = {
    "adapter_id": _NAME,
    "lora_name": _NAME,
    "adapter_scale": Parameter(
        _number(lambda v: -MAX_ADAPTER_SCALE <= v <= MAX_ADAPTER_SCALE),
        f"a number from {-MAX_ADAPTER_SCALE} to {MAX_ADAPTER_SCALE}",
    ),
    "max_tokens": Parameter(_integer(1, _INT32_MAX), f"an integer from 1 to {_INT32_MAX}"),
    "min_tokens": Parameter(_integer(0, _INT32_MAX), f"an integer from 0 to {_INT32_MAX}"),
    "ignore_eos": _FLAG,
    "stop": Parameter(
        _stop,
        f"a string or a JSON list of at most {MAX_STOP_STRINGS}, each of 1 to {MAX_STOP_CHARS} characters",
    ),
    "stop_token_ids": Parameter(
        _stop_token_ids, f"a JSON list of at most {MAX_STOP_TOKEN_IDS} ids from 0 to {_INT32_MAX}"
    ),
    "temperature": Parameter(
        _number(lambda v: 0 <= v <= MAX_TEMPERATURE), f"a number from 0 (greedy) to {MAX_TEMPERATURE}"
    ),
    "top_p": Parameter(_number(lambda v: 0 < v <= 1), "a number above 0 and up to 1"),
    "top_k": Parameter(_integer(0, _INT32_MAX), f"an integer from 0 (all) to {_INT32_MAX}"),
    "min_p": Parameter(_number(lambda v: 0 <= v <= 1), "a number from 0 to 1"),
    "seed": Parameter(_integer(0, (1 << 63) - 1), "an integer from 0 to 2^63-1"),
    "repetition_penalty": Parameter(
        _number(lambda v: 0 < v <= MAX_REPETITION_PENALTY),
        f"a number above 0 and up to {MAX_REPETITION_PENALTY}",
    ),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "logprobs": Parameter(_integer(0, MAX_LOGPROBS), f"an integer from 0 (none) to {MAX_LOGPROBS}"),
    "chat": _FLAG,
    "add_special_tokens": _FLAG,
    "echo": _FLAG,
    "deadline_ms": Parameter(_integer(0, _INT32_MAX), f"an integer from 0 (none) to {_INT32_MAX}"),
    "request_priority": Parameter(
        _integer(-MAX_PRIORITY, MAX_PRIORITY), f"an integer from {-MAX_PRIORITY} to {MAX_PRIORITY}"
    ),
}
