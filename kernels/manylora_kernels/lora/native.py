"""The compiled CPU form of the adapters' term: `lora_cpu.c`, and its arguments.

Shape key: T rows of a step, G segments, E entries (a row for each of its pages), S linears.

torch's small products cost more in calls than in arithmetic: a step has hundreds of them. The compiled form
is one call for each site.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from manylora_kernels.compiled import DTYPES, library
from manylora_kernels.lora.pool import PAGE_ROWS, SitePool


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
        ("scale", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
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
        ("vectors", ctypes.c_void_p),
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
    row_slots: npt.NDArray[np.int32],
    row_scales: npt.NDArray[np.float32],
    pages: Sequence[Sequence[int]],
    vectors: Sequence[Sequence[int]] = (),
) -> NativeSegments:
    """Group the rows of a step for one kind of site.

    Args:
        row_slots: [T], -1 for no adapter.
        row_scales: [T].
        pages: the pages of each slot; empty where the adapter has nothing in this kind.
        vectors: the page of each slot's vectors, or nothing.

    Example: slots [1, 0, 1, -1, 1] with pages {0: (4,), 1: (7, 5)} give

        rows         1 0 2 4     row_starts   0 1 4
        pages        4 7 5       page_starts  0 1 3
        entry_starts 0 1         and 7 entries: 1 row x 1 page, 3 rows x 2 pages
        vectors      -1 -1
    """
    vectors = vectors or [()] * len(pages)
    is_used = np.array([bool(mine or its) for mine, its in zip(pages, vectors, strict=True)], dtype=bool)
    order = np.argsort(row_slots, kind="stable")
    order = order[np.searchsorted(row_slots[order], 0) :]
    order = order[is_used[row_slots[order]]]
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
        np.array([vectors[slot][0] if vectors[slot] else -1 for slot in slots.tolist()], dtype=np.int32),
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
            None if pool.scale is None else pool.scale.data_ptr(),
            None if pool.offset is None else pool.offset.data_ptr(),
        )
        found = pool.derived["native"] = (site, ends)  # `site` points into `ends`
    return found[0]


def _starts(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Where each of consecutive runs begins, and the end of the last."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
