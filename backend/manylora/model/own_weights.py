"""A model's own copy of weights that were mapped from files.

transformers maps safetensors files where no dtype is converted. A file that is cut short afterwards would end
the process with SIGBUS, and one that is rewritten in place would change the model while it serves.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import mmap
from collections.abc import Iterator
from pathlib import Path

import torch

_SHARED_MEMORY = "/dev/zero (deleted)"  # what Linux calls memory without a file that processes share
_MADV_DONTNEED = 4  # from Linux's mman-common.h


def copy_mapped_weights(module: torch.nn.Module) -> int:
    """Copy each tensor of a CPU module that lies in a mapped file into memory of the process.

    One by one: the pages of each are released once it is copied, so at most one tensor is held twice.
    The files are unmapped when nothing else holds a tensor of them.

    Returns:
        Bytes copied.
    """
    ranges = mapped_ranges()
    num_bytes = 0
    for tensor in _tensors(module):
        start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        at = bisect.bisect_right(ranges, start, key=lambda mapped: mapped[0]) - 1
        if size and at >= 0 and start < ranges[at][1]:
            own = tensor.clone()
            tensor.data = own
            _release_pages(start, size)
            num_bytes += size
    return num_bytes


def mapped_ranges() -> list[tuple[int, int]]:
    """Addresses at which this process has mapped files, in ascending order: (begin, end).

    Files of any name: a weights file is often a link to one that is called by its hash. Nor are device and
    inode compared with the model's files, since some overlay file systems show others for a mapping.
    """
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        # address perms offset device inode path; the inode is 0 where there is no file
        words = line.split(maxsplit=5)
        if words[4] != "0" and words[5:] != [_SHARED_MEMORY]:
            begin, _, end = words[0].partition("-")
            found.append((int(begin, 16), int(end, 16)))
    return sorted(found)


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Each parameter and buffer once, even if it is tied."""
    yield from itertools.chain(module.parameters(), module.buffers())


def _release_pages(start: int, size: int) -> None:
    """Release the whole pages of a file's mapping that lie in this range. They are unchanged, so a later read
    would load them from the file again."""
    begin = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)
