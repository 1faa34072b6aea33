"""Attention has the same bits in every run, and whatever else is in the batch where that is said."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from manylora_kernels.attention.paged_attention import paged_attention
from manylora_kernels.attention.paged_batch import PagedBatch

from .attention_rules import scoring

REPEATS = 3 if os.environ.get("TRITON_INTERPRET") == "1" else 100
STEPS = {
    "decodes": ([1] * 5, [300, 7, 129, 1, 40], None),
    "decodes_in_four_parts": ([1] * 5, [300, 7, 129, 1, 40], 4),
    "prompts": ([33, 20], [33, 150], None),
    "mixed": ([1, 1, 33, 20], [300, 7, 33, 150], None),
}
"""Rows of each sequence, contexts, and parts of a decode's context."""


def run(case: Any, layer: Any, batch: PagedBatch | None = None, rows: slice = slice(None)) -> torch.Tensor:
    return paged_attention(case.q[:, rows], case.keys, case.values, batch or case.batch, layer)


@pytest.mark.parametrize("step", STEPS)
def test_the_same_step_gives_the_same_bits(
    step: str, triton_dtype: torch.dtype, triton_device: str, make_paged_case: Any
) -> None:
    queries, contexts, num_splits = STEPS[step]
    case = make_paged_case(
        (4, 2), (16, 16), queries, contexts, triton_dtype, triton_device, num_splits=num_splits
    )
    layer = scoring(triton_device, 4, softcap=5.0, sinks=True)
    first = run(case, layer)
    assert first.isfinite().all()
    assert all(torch.equal(run(case, layer), first) for _ in range(REPEATS))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [0, 1000], ids=["all", "window"])
@pytest.mark.parametrize(
    ("queries", "contexts"),
    [
        ([1] * 32, [97 * (i + 1) for i in range(32)]),
        ([700], [3000]),
        ([1] * 16 + [500, 33, 700], [211 * (i + 1) for i in range(16)] + [500, 2000, 700]),
    ],
    ids=["decodes", "prompt", "mixed"],
)
def test_a_thousand_runs_give_the_same_bits(
    queries: list[int], contexts: list[int], window: int, make_paged_case: Any
) -> None:
    case = make_paged_case((32, 8), (128, 128), queries, contexts, torch.bfloat16, "cuda")
    layer = scoring("cuda", 32, window=window)
    first = run(case, layer)
    assert first.isfinite().all()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        differing += (run(case, layer) != first).any()
    assert differing.item() == 0


def test_a_decodes_bits_depend_on_its_context_alone_where_the_parts_are_fixed(
    triton_dtype: torch.dtype, triton_device: str, make_paged_case: Any
) -> None:
    case = make_paged_case(
        (4, 2), (16, 16), [1] * 4 + [20], [300, 40, 7, 129, 33], triton_dtype, triton_device, num_splits=4
    )
    layer = scoring(triton_device, 4)
    together = run(case, layer)
    for nth in range(4):
        alone = replace(
            case.batch,
            tables=case.batch.tables[nth : nth + 1],
            contexts=case.batch.contexts[nth : nth + 1],
            starts=case.batch.starts[:1],
            write_rows=case.batch.write_rows[nth : nth + 1],
            num_decodes=1,
            max_queries=1,
            max_context=2048,
        )
        assert torch.equal(run(case, layer, alone, slice(nth, nth + 1))[0], together[nth])


def test_a_prompts_bits_do_not_depend_on_its_neighbours(
    triton_dtype: torch.dtype, triton_device: str, make_paged_case: Any
) -> None:
    """While the longest prompt of the step keeps the size of the tiles."""
    case = make_paged_case((4, 2), (16, 16), [1, 40, 35], [50, 90, 35], triton_dtype, triton_device)
    layer = scoring(triton_device, 4)
    together = run(case, layer)
    alone = replace(
        case.batch,
        tables=case.batch.tables[2:],
        contexts=case.batch.contexts[2:],
        starts=case.batch.starts[1:] - case.batch.starts[1],
        write_rows=case.batch.write_rows[41:],
        num_decodes=0,
        max_queries=35,
    )
    assert torch.equal(run(case, layer, alone, slice(41, None)), together[41:])
