"""Calls to file systems that may never return: a dead network file system hangs its callers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TypeVar

from manylora.errors import UnavailableError

T = TypeVar("T")


def answered(what: str, look: Callable[[], T], within_s: float) -> T:
    """Call `look` on a thread of its own, which is abandoned if it hangs.

    Args:
        what: names what is looked at, for the message.
        look: what it returns or raises, this returns or raises.

    Raises:
        UnavailableError: there is no answer within `within_s` seconds.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(look())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="manylora-look", daemon=True).start()
    try:
        return answer.result(within_s)
    except FutureTimeoutError as error:
        if answer.done():
            raise
        raise UnavailableError(f"{what}: the file system gives no answer within {within_s:g} s") from error
