"""Where and with what a benchmark runs."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.paths import ROOT


def commit() -> str:
    """The checkout's commit, with `-dirty` if files differ from it; empty outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def device_name() -> str:
    """The GPU, or the processor where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()


def processor_name() -> str:
    """The processor, and how many of its cores this process may use."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{found[1].strip() if found else platform.machine()}, {num_cores} cores"


def package_version(name: str) -> str:
    """Of an installed package; empty if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
