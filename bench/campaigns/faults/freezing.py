"""One thread of another process, stopped while the others go on: what a deadlock looks like from outside."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator

from manylora.serve.background import RunningServer
from manylora_client import Client, ManyloraClientError

from bench.campaigns.faults.anatomy import DONE_S, stub_of, wait_until_gone
from bench.campaigns.faults.load import PROMPT, Bed, Report

LASTING = 30
"""Looks in a row, over more than the millisecond for which Triton gathers requests."""

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
        # It may have been killed meanwhile; its parent learns of that only when its tracer has.
        try:
            _ptrace(PTRACE_DETACH, tid)
        except ProcessLookupError:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(tid, WALL | os.WNOHANG)


def _ptrace(request: int, tid: int) -> None:
    if _libc.ptrace(request, tid, None, None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace({request}, {tid}): {os.strerror(number)}")


def front_end_frozen(bed: Bed, model: str) -> Report:
    """The first thread of a front end hangs: its process lives and says so, Triton calls it ready."""

    def inject() -> None:
        pid = stub_of(bed.server, model)
        with frozen_thread(pid), bed.connect() as client:
            ask_until_one_waits(bed.server, model, lambda: _ask(client, model))
            wait_until_gone([pid])

    return bed.suffer(f"first thread of {model} hangs", inject)


def ask_until_one_waits(server: RunningServer, model: str, ask: Callable[[], None]) -> list[threading.Thread]:
    """Ask a front end that takes nothing, until one request stays in Triton.

    Returns: the threads that ask.
    """
    threads: list[threading.Thread] = []
    end = time.monotonic() + DONE_S
    num_seen = 0
    while num_seen < LASTING:
        assert time.monotonic() < end
        if not num_seen:
            # Those that come together are handed over together, and for Triton wait no more.
            threads.append(threading.Thread(target=ask, daemon=True))
            threads[-1].start()
        waiting = counted(server, "nv_inference_pending_request_count", model)
        num_seen = num_seen + 1 if waiting else 0
    return threads


def _ask(client: Client, model: str) -> None:
    with contextlib.suppress(ManyloraClientError):
        if model == "llm":
            client.generate(PROMPT, max_tokens=1)
        else:
            client.stream(PROMPT, max_tokens=1).collect()


def counted(server: RunningServer, name: str, model: str) -> int:
    """One of Triton's numbers, the sum over all its labels but the model."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=DONE_S) as reply:
        text = reply.read().decode()
    return sum(map(int, re.findall(rf'^{name}\{{[^}}]*model="{model}"[^}}]*\}} (\d+)', text, re.MULTILINE)))
