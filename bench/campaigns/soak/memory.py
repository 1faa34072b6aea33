"""Memory of the server's processes over a run, and whether it stays flat."""

from __future__ import annotations

import csv
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MIB = 1 << 20
MAX_GROWTH = 0.005
"""Of its mean, by which the memory of a process may grow over the last half: what caches and the allocator
still settle by. Of an engine of 1.5 GB that is less than 1 KiB in each request of 20,000."""
MIN_GROWTH_BYTES = 8 * MIB
"""Growth that is never too much: processes move by single blocks of the allocator."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at one process."""

    num_done: int
    """Operations that had ended."""
    seconds: float
    """Since the start."""
    process: str
    pid: int
    rss_bytes: int
    pss_bytes: int
    """Shared pages counted in part: by how many processes share them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """How the resident memory of one process went over the last half of a run."""

    process: str
    pid: int
    first_bytes: int
    """At the start of the run."""
    mean_bytes: float
    last_bytes: int
    slope_bytes: float
    """Per 1,000 operations, by least squares."""
    range_bytes: int
    """Most less least."""
    growth_bytes: float
    """The slope over the whole half."""

    @property
    def limit_bytes(self) -> float:
        return max(MIN_GROWTH_BYTES, MAX_GROWTH * self.mean_bytes)

    @property
    def is_flat(self) -> bool:
        return self.growth_bytes <= self.limit_bytes


class MemoryWatch:
    """Looks at some processes now and then, in a thread of its own, for as long as the block runs."""

    def __init__(
        self, processes: Mapping[int, str], num_done: Callable[[], int], interval_s: float = 2.0
    ) -> None:
        """
        Args:
            processes: names by pid.
            num_done: how many operations have ended.
        """
        self._processes = dict(processes)
        self._num_done = num_done
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)
        self._start = time.monotonic()
        self.samples: list[Sample] = []

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        self._look()
        while not self._ended.wait(self._interval_s):
            self._look()

    def _look(self) -> None:
        num_done, seconds = self._num_done(), time.monotonic() - self._start
        for pid, name in self._processes.items():
            found = read_memory(pid)
            # A process that has ended is missed at the end of the run, by who compares the processes.
            if found is not None:
                rss, pss = found
                self.samples.append(Sample(num_done, seconds, name, pid, rss, pss))


def read_memory(pid: int) -> tuple[int, int] | None:
    """Resident and proportional memory of a process in bytes. None: it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return None
    found = {line.split()[0]: line.split()[1] for line in text.splitlines()[1:]}
    return int(found["Rss:"]) << 10, int(found["Pss:"]) << 10


def trends(samples: Sequence[Sample]) -> list[Trend]:
    """The trend of each process over the last half of the operations."""
    half = max(sample.num_done for sample in samples) / 2
    found = []
    for pid in dict.fromkeys(sample.pid for sample in samples):
        own = [sample for sample in samples if sample.pid == pid]
        late = [sample for sample in own if sample.num_done >= half]
        rss = np.array([sample.rss_bytes for sample in late], dtype=np.float64)
        done = np.array([sample.num_done for sample in late], dtype=np.float64) / 1000
        slope = float(np.polyfit(done, rss, 1)[0]) if np.ptp(done) else 0.0
        found.append(
            Trend(
                process=own[0].process,
                pid=pid,
                first_bytes=own[0].rss_bytes,
                mean_bytes=float(rss.mean()),
                last_bytes=own[-1].rss_bytes,
                slope_bytes=slope,
                range_bytes=int(np.ptp(rss)),
                growth_bytes=slope * float(np.ptp(done)),
            )
        )
    return found


def save_csv(samples: Sequence[Sample], path: Path) -> None:
    """Write all samples as rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Sample.__slots__)
        writer.writerows([getattr(sample, name) for name in Sample.__slots__] for sample in samples)


def save_plot(samples: Sequence[Sample], path: Path) -> None:
    """Draw the resident memory of each process over the operations."""
    # Slow to import, and needed only where a plot is asked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for pid in dict.fromkeys(sample.pid for sample in samples):
        own = [sample for sample in samples if sample.pid == pid]
        axes.plot([s.num_done for s in own], [s.rss_bytes / MIB for s in own], label=own[0].process)
    axes.axvline(max(sample.num_done for sample in samples) / 2, color="0.7", linestyle=":")
    axes.set(xlabel="requests ended", ylabel="resident memory, MiB", title="Memory over the soak", ylim=0)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
