"""JSON as an adapter's files may contain it: one object, UTF-8, no duplicate keys, no NaN."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from manylora.adapters.reasons import quote
from manylora.errors import InvalidArgumentError


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object whose keys are unique at every level.

    Args:
        data: the text, bounded by the caller.
        what: names the text in messages.

    Raises:
        InvalidArgumentError: it is anything else. The message quotes no more of the text than a repeated key.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
        )
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{what} is not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InvalidArgumentError(f"{what} is not JSON: {error.msg} at character {error.pos}") from error
    except _RefusedJsonError as error:
        raise InvalidArgumentError(f"{what} is refused: {error}") from error
    except RecursionError as error:
        raise InvalidArgumentError(f"{what} is nested too deeply") from error
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"{what} holds a JSON {type(value).__name__}; expected an object")
    return value


class _RefusedJsonError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedJsonError(f"the key {quote(key)} stands twice in one object")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedJsonError(f"{name} is no JSON number")


def _parse_int(text: str) -> int:
    # Longer numbers mean nothing here, and Python refuses to parse very long ones with a message of its own.
    if len(text) > 20:
        raise _RefusedJsonError(f"a number of {len(text)} digits")
    return int(text)
