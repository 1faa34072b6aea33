"""One thread of another process, stopped while the others go on: what a deadlock looks like from outside."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

PTRACE_DETACH = 17
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
WALL = 0x40000000
"""waitpid() for any thread, not only for the first of a process."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


@contextlib.contextmanager
def frozen_thread(tid: int) -> Iterator[None]:
    """Stop one thread for as long as the block runs. Only the calling thread may end the block."""
    _ptrace(PTRACE_SEIZE, tid)
    try:
        _ptrace(PTRACE_INTERRUPT, tid)
        _, status = os.waitpid(tid, WALL)
        assert os.WIFSTOPPED(status)
        assert os.WSTOPSIG(status) == signal.SIGTRAP
        yield
    finally:
        # The thread may have been killed meanwhile.
        with contextlib.suppress(ProcessLookupError):
            _ptrace(PTRACE_DETACH, tid)


def _ptrace(request: int, tid: int) -> None:
    if _libc.ptrace(request, tid, None, None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace({request}, {tid}): {os.strerror(number)}")
