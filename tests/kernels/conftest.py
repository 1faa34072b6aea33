"""Cases for every form of the kernels.

The Triton forms run where there is a GPU; elsewhere in triton's interpreter, which must be switched on before
triton is imported by anybody: test_interpreter.py runs their files in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from manylora_kernels import SitePool, reference
from manylora_kernels.attention.paged_batch import PagedBatch

if TYPE_CHECKING:
    from manylora_kernels.lora.routed import RoutedMix

COMPILED = Path(__file__).resolve().parents[2] / ".build" / "triton_cache"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_FILES = [
    "test_route.py",
    "test_shrink.py",
    "test_expand.py",
    "test_expand_silu_mul.py",
    "test_activation.py",
    "test_triton_form.py",
    "test_linear_lora.py",
    "test_determinism.py",
    "test_one_adapter.py",
    "test_attention_decode.py",
    "test_attention_prefill.py",
    "test_attention.py",
    "test_attention_determinism.py",
    "test_cache_write.py",
    "test_replay_form.py",
]
collect_ignore = [] if INTERPRETED or torch.cuda.is_available() else TRITON_FILES

MAX_SLOTS = 4
MAX_PAGES = 3


@dataclass(frozen=True)
class Case:
    """One step at one site, with everything that must not be read or written set to NaN."""

    slots: npt.NDArray[np.int32]
    scales: npt.NDArray[np.float32]
    pages: tuple[tuple[int, ...], ...]
    vectors: tuple[tuple[int, ...], ...]
    pool: SitePool
    x: torch.Tensor
    y: torch.Tensor
    """[T, N], a view with longer rows."""

    def routed(self, **options: Any) -> RoutedMix:
        """The step as the Triton forms take it."""
        from manylora_kernels.lora.routed import (
            RoutedMix,  # imports triton, which most of these tests do without
        )

        device = self.x.device
        options.setdefault("vectors", [self.vectors])
        return RoutedMix.build(self.slots, self.scales, [self.pages], MAX_SLOTS, MAX_PAGES, device, **options)

    def expected(self) -> torch.Tensor:
        """What y becomes, in float32, by the reference."""
        y = self.y.clone().float()
        self.change(y)
        return y

    def change(self, y: torch.Tensor) -> None:
        """What the reference does to any y of these rows."""
        slots, scales, pages = self.slots.tolist(), self.scales.tolist(), [list(p) for p in self.pages]
        reference.add_lora(y, self.x, self.pool, slots, scales, pages, self.vectors)


# name: (slot of each row, pages of each slot, rank of each slot, K, widths)
STEPS: dict[str, tuple[list[int], tuple[tuple[int, ...], ...], tuple[int, ...], int, tuple[int, ...]]] = {
    "one_row": ([0], ((3,),), (16,), 32, (48,)),
    "33_rows_three_adapters": (
        [(5 * t) % 3 for t in range(33)],
        ((2,), (0, 5), (4,)),
        (16, 32, 16),
        48,
        (32, 16, 16),
    ),
    "empty_segment": ([2, 0, 2, 2], ((1,), (0,), (2,)), (16, 16, 16), 32, (16, 16)),
    "rank_1": ([0, 0, 1], ((1,), (3,)), (1, 16), 32, (32,)),
    "rank_24_and_40": ([1, 0, 1, 0, 0], ((6, 1), (0, 2, 5)), (24, 40), 32, (16, 32)),
    "all_rows_without_adapter": ([-1, -1, -1], ((1,), (2,)), (16, 16), 32, (32,)),
    "some_rows_without_adapter": ([-1, 1, -1, 0, 1, -1], ((1,), (2,)), (16, 16), 32, (32, 16)),
    "adapter_without_pages_here": ([0, 1, 0, 1], ((), (2,)), (0, 16), 32, (32,)),
    "inputs_not_a_multiple_of_the_block": ([1, 0, 1], ((1,), (2, 3)), (16, 32), 72, (40, 24)),
    "widths_not_a_multiple_of_16": ([1, 0, 1, -1], ((1,), (0,)), (16, 8), 30, (21, 7, 3)),
    "gate_and_up": ([1, 0, -1, 1], ((1,), (2, 0)), (16, 24), 32, (40, 40)),
    "20_rows_of_one_adapter": ([0] * 20, ((1, 2),), (32,), 32, (48, 16)),
    "17_and_2_rows_interleaved": ([0, 1, 0, 1] + [0] * 15, ((5, 1), (2,)), (32, 16), 32, (48, 16)),
    "vectors_of_some": ([0, 1, -1, 2, 0, 3, 2, 1], ((1,), (0, 5), (), ()), (16, 32, 0, 0), 32, (32, 16)),
    "vectors_and_no_pages": ([1, 0, -1], ((), ()), (0, 0), 32, (48,)),
    "vectors_of_widths_not_a_multiple_of_16": ([1, 0, 1, -1], ((1,), (0,)), (16, 8), 30, (21, 7, 3)),
    "vectors_of_20_rows": ([0] * 20, ((1, 2),), (32,), 32, (48, 16)),
    "vectors_of_gate_and_up": ([1, 0, -1, 2, 1], ((1,), (2, 0), ()), (16, 24, 0), 32, (40, 40)),
}
VECTORS: dict[str, tuple[tuple[int, ...], ...]] = {
    "vectors_of_some": ((2,), (), (0,), ()),
    "vectors_and_no_pages": ((1,), (3,)),
    "vectors_of_widths_not_a_multiple_of_16": ((), (3,)),
    "vectors_of_20_rows": ((2,),),
    "vectors_of_gate_and_up": ((), (1,), (3,)),
}
"""The page of each slot's vectors, in the steps that have some."""

TOLERANCE = {
    # Sums of at most 120 products of values about 1, in another order.
    torch.float32: 2e-5,
    # Results up to 8 are rounded to 11 and 8 bits, and the Triton forms round in between, too.
    torch.float16: 8e-3,
    torch.bfloat16: 6e-2,
}


def build_case(name: str, dtype: torch.dtype, device: str) -> Case:
    slots, pages, ranks, num_inputs, widths = STEPS[name]
    vectors = VECTORS.get(name, ((),) * len(pages))
    generator = torch.Generator().manual_seed(7)
    num_rows, num_outputs, num_pages = len(slots), sum(widths), 8

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    a = torch.full((num_pages, len(widths), 16, num_inputs), torch.nan)
    b = torch.full((num_pages, 16, num_outputs), torch.nan)
    for slot in set(slots) - {-1}:
        for nth, page in enumerate(pages[slot]):
            true_rows = (torch.arange(16) < ranks[slot] - 16 * nth).float()
            a[page] = randn(len(widths), 16, num_inputs) / num_inputs**0.5 * true_rows[:, None]
            b[page] = randn(16, num_outputs) / 4 * true_rows[:, None]
    scale, offset = (torch.full((4, num_outputs), torch.nan) for _ in range(2))
    for slot in set(slots) - {-1}:
        for page in vectors[slot]:
            scale[page], offset[page] = 1 + randn(num_outputs) / 4, randn(num_outputs)
    has_pages = torch.tensor([slot >= 0 and bool(pages[slot]) for slot in slots])
    served = has_pages | torch.tensor([slot >= 0 and bool(vectors[slot]) for slot in slots])
    x = torch.where(has_pages[:, None], randn(num_rows, num_inputs), torch.nan)
    y = torch.full((num_rows, num_outputs + 16), torch.nan)
    y[:, :num_outputs] = torch.where(served[:, None], randn(num_rows, num_outputs), torch.nan)
    y = y.to(device, dtype)
    return Case(
        slots=np.array(slots, dtype=np.int32),
        scales=np.linspace(0.5, 2.0, num_rows, dtype=np.float32),
        pages=pages,
        vectors=vectors,
        pool=SitePool(
            *(t.to(device, dtype) for t in (a, b)), widths, *(t.to(device, dtype) for t in (scale, offset))
        ),
        x=x.to(device, dtype),
        y=y[:, :num_outputs],
    )


def assert_agrees(y: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN must stay NaN, and nothing else may become it."""
    torch.testing.assert_close(
        y.float(), expected.float(), rtol=TOLERANCE[y.dtype], atol=TOLERANCE[y.dtype], equal_nan=True
    )


@dataclass(frozen=True)
class PagedCase:
    """One step's queries, and a cache in which all that belongs to no sequence is NaN."""

    q: torch.Tensor
    """[H, T, D], rows first in memory, as transformers hands it over."""
    keys: torch.Tensor
    values: torch.Tensor
    batch: PagedBatch


def build_paged_case(
    heads: tuple[int, int],
    sizes: tuple[int, int],
    queries: Sequence[int],
    contexts: Sequence[int],
    dtype: torch.dtype,
    device: str,
    *,
    block_size: int = 16,
    num_splits: int | None = None,
) -> PagedCase:
    """`heads` is (H, V) and `sizes` (D, E). The sequences' blocks are scattered; none has block 0, which
    pads the tables."""
    generator = torch.Generator().manual_seed(5)
    (num_heads, num_kv), (key_size, value_size) = heads, sizes
    counts = [-(-context // block_size) for context in contexts]
    num_blocks = sum(counts) + 3
    order = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    tables = [[order.pop() for _ in range(count)] for count in counts]
    keys = torch.full((num_blocks * block_size, num_kv * key_size), torch.nan)
    values = torch.full((num_blocks * block_size, num_kv * value_size), torch.nan)
    for table, context in zip(tables, contexts, strict=True):
        rows = [table[c // block_size] * block_size + c % block_size for c in range(context)]
        keys[rows] = torch.randn(context, keys.shape[1], generator=generator)
        values[rows] = torch.randn(context, values.shape[1], generator=generator)
    q = torch.randn(sum(queries), num_heads, key_size, generator=generator)
    return PagedCase(
        q=q.to(device, dtype).transpose(0, 1),
        keys=keys.to(device, dtype),
        values=values.to(device, dtype),
        batch=PagedBatch.build(queries, contexts, tables, block_size, device, num_splits),
    )


@contextmanager
def fill_with_nan() -> Iterator[None]:
    """Memory that is asked for and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def make_paged_case() -> Callable[..., PagedCase]:
    return build_paged_case


@pytest.fixture
def poisoned_memory() -> Callable[[], AbstractContextManager[None]]:
    return fill_with_nan


@pytest.fixture(params=list(STEPS))
def step(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_case() -> Callable[[str, torch.dtype, str], Case]:
    return build_case


@pytest.fixture
def agrees() -> Callable[[torch.Tensor, torch.Tensor], None]:
    return assert_agrees


@pytest.fixture
def triton_files() -> list[Path]:
    """The tests of the Triton forms."""
    return [Path(__file__).parent / name for name in TRITON_FILES]


@pytest.fixture
def triton_device() -> str:
    """Where the Triton forms run."""
    return "cpu" if INTERPRETED else "cuda"


# In the interpreter types differ in their rounding alone, and every case takes its time.
SIXTEEN_BITS = [pytest.mark.slow] if INTERPRETED else []


@pytest.fixture(params=["float32", pytest.param("float16", marks=SIXTEEN_BITS), "bfloat16"])
def triton_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if INTERPRETED and request.param == "bfloat16":
        pytest.skip("triton's interpreter computes bfloat16 wrongly")
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[request.param]


@pytest.fixture(scope="session")
def compile_apart() -> Callable[..., list[dict[str, Any]]]:
    """Runs a program of this folder that compiles kernels, where the interpreter is off. What it has compiled
    is kept from run to run: triton knows it by the kernels' source, their options and its own version.

    Given its name and, for each process of it, the targets; returns the rows of all.
    """

    def run(program: str, *processes: Sequence[str]) -> list[dict[str, Any]]:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env["TRITON_CACHE_DIR"] = str(COMPILED)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        running = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / program), *targets],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for targets in processes
        ]
        outputs = [process.communicate()[0] for process in running]
        assert [process.returncode for process in running] == [0] * len(running), "\n".join(outputs)
        return [json.loads(line) for output in outputs for line in output.splitlines()]

    return run
