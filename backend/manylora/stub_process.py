"""Limits and file modes of a front end's own process, Triton's Python stub."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from manylora.errors import UnavailableError
from manylora.paths import SHARED_MEMORY

SMALL_BYTES = 256 << 10
"""Replies up to this size fit into the shared memory as it is at the start."""
GROWTH_BYTES = 1 << 20
"""The step by which the shared memory grows."""

log = logging.getLogger(__name__)


def restrict_region() -> None:
    """Give the shared memory of requests and replies mode 0600.

    tritonserver makes it readable by every user of the machine, whatever the umask. Its name is on the stub's
    command line, and the file keeps its mode when it grows.
    """
    words = Path("/proc/self/cmdline").read_bytes().decode(errors="replace").split("\0")
    regions = [SHARED_MEMORY / word for word in words[1:] if word and "/" not in word]
    found = [region for region in regions if region.is_file()]
    for region in found:
        region.chmod(0o600)
    if not found:
        log.warning(
            "no shared memory of this process in %s: other users may be able to read it", SHARED_MEMORY
        )


def lift_file_limit() -> None:
    """Lift the file size limit inherited from tritonserver, which is meant for requests only.

    Replies are as long as the engine's limits make them, and the engine, a child of this one, writes files.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def check_room(outputs: Mapping[str, np.ndarray], *, free_in_region: Callable[[], int]) -> None:
    """Check that a reply fits into the shared memory, which may have to grow for it.

    Args:
        free_in_region: free bytes of the shared memory at its present size; it never shrinks.

    Raises:
        UnavailableError: its file system is full.
    """
    num_bytes = sum(_num_bytes(values) for values in outputs.values())
    if num_bytes <= SMALL_BYTES:
        return
    found = os.statvfs(SHARED_MEMORY)
    free_bytes = free_in_region() + found.f_bavail * found.f_frsize
    if num_bytes + GROWTH_BYTES > free_bytes:
        raise UnavailableError(
            f"an answer of {num_bytes} bytes finds no room in the server's shared memory, where {free_bytes} "
            "are free; ask for fewer sequences, tokens or log probabilities at once"
        )


def _num_bytes(values: np.ndarray) -> int:
    return sum(map(len, values.flat)) if values.dtype == object else values.nbytes
