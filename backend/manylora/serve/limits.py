"""System limits of a server: open files and file sizes."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

from manylora.errors import InvalidArgumentError
from manylora.paths import SHARED_MEMORY

MAX_DESCRIPTORS = 1 << 20
"""More than a server needs. Some systems allow a billion, and some programs walk through all of them."""
DEFAULT_BYTES = 64 << 20
"""More than a whole batch of the longest prompts takes with the default `max_model_len`."""
MIN_ASKED_BYTES = 2 << 20
"""A region starts with half of it."""
MAX_ASKED_BYTES = (1 << 63) - 1
"""The largest file size and limit on one."""
MAX_BATCH = 64
"""Sequences that come to a front end at once, as `max_batch_size` in config.pbtxt says."""
TOKEN_BYTES = 16
"""Upper estimate of a prompt's text per token."""


def raise_descriptors() -> None:
    """Let this process and its children open as many files and connections as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def bound_files(max_bytes: int) -> None:
    """Limit the size of files that this process writes; a write past it fails and does not kill the process.

    Meant for tritonserver, which writes no files but the shared memory in which it hands requests to a model:
    that would grow with the longest request, for good. Only the soft limit: those it starts can lift it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = [limit for limit in (max_bytes, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(limits), hard))
    # Also of the programs that it starts.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def region_bytes(asked: int, *, max_model_len: int, total_bytes: int) -> int:
    """The size up to which requests may make the shared memory of a front end grow.

    Args:
        asked: by the operator; 0 is what the longest prompts of a whole batch take.
        max_model_len: the longest sequence in tokens; 0 is the base model's, at most 8192.
        total_bytes: of the file system of shared memory; requests and replies of both models share it.

    Raises:
        InvalidArgumentError: less than tritonserver needs to start, or more than a file can have.
    """
    if 0 < asked < MIN_ASKED_BYTES:
        raise InvalidArgumentError(f"--shared-memory-bytes {asked}: must be at least {MIN_ASKED_BYTES}")
    if asked > MAX_ASKED_BYTES:
        raise InvalidArgumentError(f"--shared-memory-bytes {asked}: must be at most {MAX_ASKED_BYTES}")
    if asked:
        return asked
    wanted = max(DEFAULT_BYTES, MAX_BATCH * max_model_len * TOKEN_BYTES)
    return max(MIN_ASKED_BYTES, min(wanted, total_bytes // 4))


def shared_memory_bytes() -> int:
    """The size of the file system in which tritonserver makes its shared memory, however much is free."""
    found = os.statvfs(SHARED_MEMORY)
    return found.f_blocks * found.f_frsize


def num_free_descriptors(pid: int) -> int:
    """How many more files and connections a process may open; MAX_DESCRIPTORS if it has ended."""
    try:
        used = len(os.listdir(f"/proc/{pid}/fd"))
        line = next(
            line
            for line in Path(f"/proc/{pid}/limits").read_text().splitlines()
            if line.startswith("Max open")
        )
    except (OSError, StopIteration):
        return MAX_DESCRIPTORS
    soft = line.split()[3]
    return MAX_DESCRIPTORS if soft == "unlimited" else int(soft) - used
