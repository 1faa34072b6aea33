"""Reads adapters before anything is served."""

from __future__ import annotations

import threading
from collections.abc import Callable

from manylora.adapters.adapter_files import Sight
from manylora.adapters.load import Loaded, Look
from manylora.adapters.loader import STALL_S, Job, Loader
from manylora.errors import UnavailableError

MAX_TRIES = 10
"""Of reading an adapter whose files somebody writes."""


def read_first(name: str, look: Look, load: Callable[[str, Sight], Loaded], settle_s: float) -> Loaded:
    """Read an adapter and wait for it: for the disk until that hangs, for a writer a few times `settle_s`.

    Raises:
        ManyloraError: its directory is not there, cannot be looked at, or gives no answer; its files change
            all the time.
    """
    pause = threading.Event()
    loaded = _run_aside(name, lambda: load(name, look(name)))
    for _ in range(MAX_TRIES):
        if not loaded.is_torn:
            return loaded
        seen = loaded.sight
        pause.wait(settle_s)
        loaded = _run_aside(name, lambda seen=seen: load(name, seen))  # type: ignore[misc]  # mypy: default
    raise UnavailableError(f"adapter {name!r}: its files keep changing")


def _run_aside(name: str, work: Callable[[], Loaded]) -> Loaded:
    """Do something on a thread that may hang."""
    has_ended = threading.Event()
    loader: Loader[Loaded] = Loader(has_ended.set, num_threads=1, name="manylora-preload")
    job = Job(name, work)
    loader.submit(job)
    while job not in loader.take():
        has_ended.wait(STALL_S / 2)
    if not job.is_hung:
        loader.close()
    if job.error is not None:
        raise job.error
    assert job.value is not None, "a load without a result"
    return job.value
