"""The compiled CPU form: its grouping of rows, its bits, and what happens where it cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from manylora_kernels import SitePool
from manylora_kernels.lora import native
from manylora_kernels.lora.native import build_native_segments

PAGES = [(4,), (7, 5), (), (1, 0, 2, 3)]


def site_pool(dtype: torch.dtype) -> SitePool:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(8, 3, 16, 75, generator=generator)
    b = torch.randn(8, 16, 211, generator=generator)
    return SitePool(a.to(dtype), b.to(dtype), (130, 65, 16))


def term(pool: SitePool, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
    y = torch.zeros(len(slots), 211, dtype=x.dtype)
    scales = np.linspace(0.5, 2, 40, dtype=np.float32)[: len(slots)]
    native.add_lora(y, x, pool, build_native_segments(np.array(slots, dtype=np.int32), scales, PAGES))
    return y


def test_the_worked_example_of_the_page() -> None:
    slots = np.array([1, 0, 1, -1, 1], dtype=np.int32)
    found = build_native_segments(slots, np.arange(5, dtype=np.float32), [(4,), (7, 5)])
    rows, scales, row_starts, page_starts, pages, entry_starts, vectors = (a.tolist() for a in found.arrays)
    assert (rows, scales) == ([1, 0, 2, 4], [1.0, 0.0, 2.0, 4.0])
    assert (row_starts, page_starts, pages) == ([0, 1, 4], [0, 1, 3], [4, 7, 5])
    assert entry_starts[:2] == [0, 1]
    assert vectors == [-1, -1]
    assert found.num_entries == 7


def test_rows_without_an_adapter_or_its_pages_are_left_out() -> None:
    found = build_native_segments(np.array([-1, 2, -1, 2], dtype=np.int32), np.ones(4, np.float32), PAGES)
    assert found.num_entries == 0
    assert found.arrays[0].tolist() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rows_bits_are_the_same_alone_and_in_any_mix(dtype: torch.dtype) -> None:
    pool = site_pool(dtype)
    slots = [0, 1, 3, -1, 2, 1, 1, 3, 0, 1, 1, 1, 3, 3, 1]
    x = torch.randn(1, 75, generator=torch.Generator().manual_seed(4)).to(dtype).repeat(len(slots), 1)
    together = term(pool, x, slots)
    scales = np.linspace(0.5, 2, 40, dtype=np.float32)
    for t, slot in enumerate(slots):
        alone = torch.zeros(1, 211, dtype=dtype)
        segments = build_native_segments(np.array([slot], dtype=np.int32), scales[t : t + 1], PAGES)
        native.add_lora(alone, x[:1], pool, segments)
        assert torch.equal(alone[0], together[t]), f"row {t} of adapter {slot}"


def test_the_number_of_threads_changes_no_bit() -> None:
    pool = site_pool(torch.float32)
    slots = [t % 4 for t in range(33)]
    x = torch.randn(33, 75, generator=torch.Generator().manual_seed(5))
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(term(pool, x, slots))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


ASK = "from manylora_kernels import compiled; print(compiled.library() is not None)"


def ask(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    roots = os.pathsep.join(path for path in sys.path if path)
    env = {**os.environ, "PYTHONPATH": roots, "XDG_CACHE_HOME": str(folder), **environment}
    return subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, check=True)


def test_without_a_compiler_torchs_products_serve(tmp_path: Path) -> None:
    answer = ask(tmp_path, PATH=str(tmp_path), CC="cc")
    assert answer.stdout == "False\n"
    assert "no C compiler on PATH; torch's operators serve" in answer.stderr.replace("(", "").replace(")", "")


def test_a_compiler_that_fails_is_no_fault_of_the_server(tmp_path: Path) -> None:
    answer = ask(tmp_path, CC="false")
    assert answer.stdout == "False\n"
    assert "torch's operators serve" in answer.stderr
    assert list((tmp_path / "manylora").iterdir()) == []


def test_what_is_built_once_is_loaded_again(tmp_path: Path) -> None:
    assert ask(tmp_path).stdout == "True\n"
    (built,) = (tmp_path / "manylora").iterdir()
    changed = built.stat().st_mtime_ns
    assert ask(tmp_path, CC="false").stdout == "True\n"
    assert built.stat().st_mtime_ns == changed


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "manylora").write_text("no folder")
    assert ask(tmp_path).stdout == "True\n"
