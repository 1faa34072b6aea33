"""Where a row of results comes from."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.loadtest import environment
from bench.paths import ROOT


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What all rows of one run share: the first columns of every CSV file."""

    run: str
    """When it began, UTC, ISO 8601."""
    label: str
    """RESULTS.md shows the latest run of each label; empty: not shown there."""
    commit: str
    device: str
    threads: int
    """Of the engine, on a CPU."""
    python: str
    torch: str
    transformers: str
    peft: str
    command: str

    @classmethod
    def now(cls, label: str, *, device: str = "", threads: int = 0) -> Origin:
        """Of a run that begins.

        Args:
            device: empty: the one that an engine takes by itself.
            threads: 0: torch's own choice.
        """
        return cls(
            run=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            label=label,
            commit=environment.commit(),
            device=device or environment.device_name(),
            threads=threads or torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=environment.package_version("transformers"),
            peft=environment.package_version("peft"),
            command=command_line(sys.argv),
        )


def command_line(argv: list[str]) -> str:
    """The command as it is given in the checkout's root."""
    script = Path(argv[0]).resolve()
    words = [str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name]
    words += [word.replace(f"{ROOT}/", "") for word in argv[1:]]
    return shlex.join(["python", *words])
