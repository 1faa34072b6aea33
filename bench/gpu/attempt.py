"""What goes wrong in one form, point or part, in words: it must not end the run."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

from bench.gpu.peer_modules import Missing

ReadyT = TypeVar("ReadyT")
ItemT = TypeVar("ItemT")
NO_MEANING = "missing: "
"""Of a form that has no meaning for a step, and no row."""


def attempt(make: Callable[[], ReadyT]) -> ReadyT | str:
    """What it makes, or in words why it cannot."""
    try:
        return make()
    except Exception as error:
        return describe(error)


def guarded(items: Iterator[ItemT], failed: Callable[[str], ItemT]) -> Iterator[ItemT]:
    """The items until one fails, then what `failed` makes of the reason, as the last."""
    try:
        yield from items
    except Exception as error:
        yield failed(describe(error))


def describe(error: Exception) -> str:
    """In words; a failure that nobody expects with its traceback on the console."""
    if isinstance(error, AssertionError):
        return f"wrong: {error}"
    # A package that a machine lacks is no fault of the form.
    if isinstance(error, Missing | ModuleNotFoundError):
        return f"missing: {error}"
    traceback.print_exception(error)
    return f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
