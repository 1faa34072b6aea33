"""Faults to put into the way of a reply."""

from __future__ import annotations

import pytest
from manylora.errors import ManyloraError
from manylora.front_end.protocol import Tensors

from .front_end_setting import Recorder


class Panic(BaseException):
    """Like those of libraries in Rust: no Exception."""


FAULTS = [RuntimeError, MemoryError, RecursionError, AssertionError, UnicodeDecodeError, Panic, SystemExit]
every_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)


def make(fault: type[BaseException]) -> BaseException:
    if fault is UnicodeDecodeError:
        return UnicodeDecodeError("utf-8", b"\xff", 0, 1, "injected")
    return fault("injected")


class FaultyRecorder(Recorder):
    """Fails where it is told to, each time or only so often."""

    def __init__(self, where: str, fault: type[BaseException], times: int = 10**6) -> None:
        super().__init__()
        self._where, self._fault, self._times = where, fault, times

    def _strike(self, where: str) -> None:
        if where == self._where and self._times:
            self._times -= 1
            raise make(self._fault)

    def send_tensors(self, outputs: Tensors, *, is_last: bool) -> None:
        self._strike("send")
        super().send_tensors(outputs, is_last=is_last)

    def fail(self, error: ManyloraError) -> None:
        self._strike("fail")
        super().fail(error)

    def is_cancelled(self) -> bool:
        self._strike("is_cancelled")
        return super().is_cancelled()
