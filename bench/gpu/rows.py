"""A row of bench/results/gpu_suite.csv, and what all parts of a run share."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.gpu.clock import Timing
from bench.gpu.floors import Bandwidth
from bench.gpu.shapes import Layer, Point
from bench.loadtest.origin import Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Origin):
    """One form at one step, or one proof."""

    triton: str
    part: str
    form: str
    rows: int | None = None
    adapters: int | None = None
    rank: str = ""
    pool_rank: int | None = None
    skewed: int | None = None
    base_share: float | None = None
    median_us: float | None = None
    """Of one layer, or of one step of the whole model."""
    least_us: float | None = None
    most_us: float | None = None
    extra_us: float | None = None
    """What it adds to the base: median over the rounds."""
    floor_us: float | None = None
    """The least time for the bytes that must be moved, at the bandwidth measured in this run."""
    moved_bytes: int | None = None
    error: float | None = None
    """The largest, as a share of the largest result, against float64."""
    result: str = ""
    """`ok`, or what a proof found, or why there is no time: `missing: ...`, `wrong: ...`, `failed: ...`."""

    @property
    def is_bad(self) -> bool:
        """Whether something was found that must not be."""
        return self.result.startswith(("wrong", "failed"))


@dataclass(slots=True, kw_only=True)
class Context:
    """What all parts of a run share."""

    origin: Origin
    triton: str
    device: torch.device
    dtype: torch.dtype
    layer: Layer
    bandwidth: Bandwidth
    peers: Path
    """The folder of the peers' files."""
    repeats: int
    """How often each form is timed."""
    proofs: int
    """How often a launch is repeated to compare its bits."""
    is_tiny: bool = False
    """In triton's interpreter."""
    leave_out: frozenset[str] = frozenset()
    """Forms that are not wanted."""

    def row(
        self,
        part: str,
        form: str,
        point: Point | None = None,
        timing: Timing | None = None,
        **values: object,
    ) -> Row:
        """Make a row of this run."""
        if point is not None:
            values |= {
                "rows": point.num_rows,
                "adapters": point.num_adapters,
                "rank": point.rank_name,
                "pool_rank": point.pool_rank,
                "skewed": int(point.skewed),
                "base_share": point.base_share,
            }
        if timing is not None:
            values |= {"median_us": timing.median, "least_us": timing.least, "most_us": timing.most}
        return Row(**asdict(self.origin), triton=self.triton, part=part, form=form, **values)  # type: ignore[arg-type]


def label_of(device_name: str) -> str:
    """A short name for a device, under which RESULTS.md shows the latest run: `h200`."""
    words = re.findall(r"[A-Za-z0-9]+", device_name.lower())
    return next((word for word in words if word not in ("nvidia", "amd", "geforce", "rtx", "instinct")), "")
