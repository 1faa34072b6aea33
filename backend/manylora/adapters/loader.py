"""Reads adapters on threads of its own, so that the engine's step never waits for a disk."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from manylora.adapters.weights import AdapterWeights
from manylora.errors import InternalError, ManyloraError
from manylora.threads import use_one_thread

log = logging.getLogger(__name__)

Read = Callable[[Path], AdapterWeights]
"""Reads the adapter in a directory. Raises ManyloraError."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A finished load: weights or an error."""

    name: str
    weights: AdapterWeights | None
    error: ManyloraError | None


class Loader:
    """A few daemon threads that read adapters one after the other.

    Args:
        read: reads one adapter; runs on the loader's threads.
        wake: called, on a loader's thread, behind each result that `take` can return.
    """

    def __init__(self, read: Read, wake: Callable[[], None], num_threads: int = 2) -> None:
        self.num_threads = num_threads
        self._read = read
        self._wake = wake
        self._jobs: queue.SimpleQueue[tuple[str, Path] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"manylora-loader-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, name: str, directory: Path) -> None:
        """Queue a load. Its result comes through `take`."""
        self._jobs.put((name, directory))

    def take(self) -> list[Loaded]:
        """The loads that finished since the last call."""
        results = []
        while True:
            try:
                results.append(self._results.get_nowait())
            except queue.Empty:
                return results

    def close(self) -> None:
        """End the threads: loads that have not begun are dropped, the others are waited for."""
        self._closing.set()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        use_one_thread()
        while (job := self._jobs.get()) is not None:
            if not self._closing.is_set():
                self._results.put(load(self._read, *job))
                try:
                    self._wake()
                except Exception:
                    # The result is on the queue all the same, and later loads need this thread.
                    log.exception("the engine could not be woken for adapter %r", job[0])


def load(read: Read, name: str, directory: Path) -> Loaded:
    """Read one adapter; an error names it, and one that nobody expected is logged and becomes INTERNAL."""
    try:
        return Loaded(name, read(directory), None)
    except ManyloraError as error:
        return Loaded(name, None, type(error)(f"adapter {name!r}: {error.message}"))
    except Exception:
        log.exception("loading adapter %r failed", name)
        return Loaded(
            name, None, InternalError(f"adapter {name!r} could not be loaded; the log has the reason")
        )
