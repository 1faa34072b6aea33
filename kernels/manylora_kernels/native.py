"""The compiled CPU form: builds `lora_cpu.c` for this machine on first use, and calls it.

Shape key: T rows of a step, G segments, E entries (a row for each of its pages), S linears.

torch's small products cost more in calls than in arithmetic: a step has hundreds of them. The compiled form
is one call for each site. It needs a C compiler, as triton does on a GPU; where there is none, or the build
fails, `library()` is None and the form on torch's products serves.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from manylora_kernels.pool import PAGE_ROWS, SitePool

log = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What the compiled form serves, with its own numbers for them; pool, x and y alike."""

BUILD_S = 120.0
_SOURCE = Path(__file__).with_name("lora_cpu.c")
_FLAGS = ("-O2", "-march=native", "-std=gnu11", "-fPIC", "-fopenmp", "-Wno-psabi")


class _Site(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("a_page", ctypes.c_int64),
        ("b_page", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("num_outputs", ctypes.c_int64),
        ("num_linears", ctypes.c_int64),
        ("ends", ctypes.c_void_p),
    )


class _Routing(ctypes.Structure):
    _fields_ = (
        ("num_segments", ctypes.c_int64),
        ("num_entries", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("row_starts", ctypes.c_void_p),
        ("page_starts", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("entry_starts", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class NativeSegments:
    """The rows of a step grouped by adapter, for one kind of site, as the compiled form reads them."""

    arrays: tuple[npt.NDArray[np.int32] | npt.NDArray[np.float32], ...]
    """What `routing` points into."""
    routing: _Routing

    @property
    def num_entries(self) -> int:
        """E."""
        return int(self.routing.num_entries)


def build_native_segments(
    row_slots: npt.NDArray[np.int32], row_scales: npt.NDArray[np.float32], pages: Sequence[Sequence[int]]
) -> NativeSegments:
    """Group the rows of a step for one kind of site.

    Args:
        row_slots: [T], -1 for no adapter.
        row_scales: [T].
        pages: the pages of each slot; empty where the adapter has nothing in this kind.

    Example: slots [1, 0, 1, -1, 1] with pages {0: (4,), 1: (7, 5)} give

        rows         1 0 2 4     row_starts   0 1 4
        pages        4 7 5       page_starts  0 1 3
        entry_starts 0 1         and 7 entries: 1 row x 1 page, 3 rows x 2 pages
    """
    has_pages = np.array([bool(mine) for mine in pages], dtype=bool)
    order = np.argsort(row_slots, kind="stable")
    order = order[np.searchsorted(row_slots[order], 0) :]
    order = order[has_pages[row_slots[order]]]
    slots, num_rows = np.unique(row_slots[order], return_counts=True)
    mine = [pages[slot] for slot in slots.tolist()]
    num_pages = np.array([len(table) for table in mine], dtype=np.int64)
    num_entries = num_rows * num_pages
    arrays = (
        order.astype(np.int32),
        np.ascontiguousarray(row_scales[order], dtype=np.float32),
        _starts(num_rows),
        _starts(num_pages),
        np.array([page for table in mine for page in table], dtype=np.int32),
        _starts(num_entries),
    )
    addresses = [array.ctypes.data for array in arrays]
    return NativeSegments(arrays, _Routing(len(slots), int(num_entries.sum()), *addresses))


def serves(y: torch.Tensor, x: torch.Tensor, pool: SitePool) -> bool:
    """Whether there is a compiled form for these: all of one dtype, of `DTYPES`."""
    return pool.a.dtype == x.dtype == y.dtype and x.dtype in DTYPES and library() is not None


def add_lora(y: torch.Tensor, x: torch.Tensor, pool: SitePool, segments: NativeSegments) -> None:
    """Add the adapters' term of one site in place, as `manylora_kernels.add_lora` says, which checks the
    arguments. Only for what `serves`."""
    loaded = library()
    assert loaded is not None, "no compiled form here"
    site = _site(pool)
    scratch = torch.empty(segments.num_entries * site.num_linears * PAGE_ROWS, dtype=torch.float32)
    loaded.manylora_add_lora(
        ctypes.byref(site),
        ctypes.byref(segments.routing),
        x.data_ptr(),
        x.stride(0),
        y.data_ptr(),
        y.stride(0),
        scratch.data_ptr(),
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled form, built if this machine has none yet. None: it cannot be built or loaded here."""
    try:
        path = _cache_folder() / f"lora_cpu-{_fingerprint()}.so"
        if not path.exists():
            _build(path)
        return _load(path)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning("the compiled CPU form is not available (%s); torch's products serve", reason)
        return None


def _site(pool: SitePool) -> _Site:
    found = pool.derived.get("native")
    if found is None:
        ends = np.cumsum(pool.widths, dtype=np.int64)
        site = _Site(
            pool.a.data_ptr(),
            pool.b.data_ptr(),
            pool.a.stride(0),
            pool.b.stride(0),
            pool.num_inputs,
            pool.num_outputs,
            len(pool.widths),
            ends.ctypes.data,
        )
        found = pool.derived["native"] = (site, ends)  # `site` points into `ends`
    return found[0]


def _starts(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Where each of consecutive runs begins, and the end of the last."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _build(path: Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler on PATH")
    # Linked without an OpenMP runtime: the one that torch has loaded serves, so that both share threads.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unit, shared = Path(folder) / "unit.o", Path(folder) / "shared.so"
        for command in (
            [compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(unit)],
            [compiler, "-shared", str(unit), "-o", str(shared)],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_S)
        # Another process may build the same at the same time: each puts a whole file in place.
        shared.replace(path)


def _load(path: Path) -> ctypes.CDLL:
    runtime = _openmp_runtime()
    if runtime is None:
        raise OSError("torch has no OpenMP runtime to share")
    ctypes.CDLL(runtime, ctypes.RTLD_GLOBAL)
    loaded = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.manylora_add_lora.argtypes = [
        pointer, pointer, pointer, number, pointer, number, pointer, number, number,
    ]  # fmt: skip
    loaded.manylora_add_lora.restype = None
    return loaded


def _openmp_runtime() -> str | None:
    """The OpenMP library that torch has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.rpartition(" ")[2]
        if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            return path
    return None


def _cache_folder() -> Path:
    """This user's own folder for built files; a new one that ends with the process where that is no use."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(root) / "manylora"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # a user without a home has no folder to keep it in
        pass
    return Path(_private_folder().name)


@functools.cache
def _private_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="manylora-")


def _fingerprint() -> str:
    """Changes with the source, the flags and the processor: a cache may be shared by several machines."""
    facts = [_SOURCE.read_text(), *_FLAGS, platform.machine()]
    facts += [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")][:1]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
