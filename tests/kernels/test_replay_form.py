"""Steps as a captured graph reads them: padded to its rows, and become each other in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from manylora_kernels import Mix, SitePool, add_lora, reference
from manylora_kernels.attention.paged_attention import paged_attention, write_cache
from manylora_kernels.attention.paged_batch import PagedBatch
from manylora_kernels.lora.cpu_form import CPU
from manylora_kernels.lora.triton_form import TRITON

from .attention_rules import TOLERANCE, scoring

CONTEXTS = {"short": [17, 5, 129], "one": [1], "longer_tables": [300, 1], "full": [16, 32, 33, 15, 1]}
NUM_ROWS = 5


def padded(case: Any, contexts: list[int]) -> PagedBatch:
    tables = [
        table[: -(-context // 16)]
        for table, context in zip(case.batch.tables.tolist(), contexts, strict=True)
    ]
    return PagedBatch.build([1] * len(contexts), contexts, tables, 16, case.q.device, num_rows=NUM_ROWS)


def pad_rows(q: torch.Tensor) -> torch.Tensor:
    """[H, T, D] to NUM_ROWS rows, the added ones NaN."""
    rows = torch.full((q.shape[0], NUM_ROWS, q.shape[2]), torch.nan, dtype=q.dtype, device=q.device)
    rows[:, : q.shape[1]] = q
    return rows


@pytest.mark.parametrize("num_splits", [None, 1, 3])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("contexts", CONTEXTS.values(), ids=CONTEXTS)
def test_a_padded_step_and_one_that_became_it_compute_what_the_step_computes(
    contexts: list[int],
    window: int,
    num_splits: int | None,
    triton_dtype: torch.dtype,
    triton_device: str,
    make_paged_case: Any,
    poisoned_memory: Any,
) -> None:
    case = make_paged_case((4, 2), (16, 16), [1] * len(contexts), contexts, triton_dtype, triton_device)
    layer = scoring(triton_device, 4, window=window)
    expected = reference.attention(case.q, case.keys, case.values, case.batch, layer)
    step = padded(case, contexts)
    # It served longer contexts before, in blocks that must not be looked at any more.
    static = PagedBatch.blank(NUM_ROWS, 500, 16, triton_device, num_splits)
    static.tables.fill_(10_000)
    static.contexts.fill_(500)
    static.copy_from(step)
    for batch in (step, static):
        with poisoned_memory():
            found = paged_attention(pad_rows(case.q), case.keys, case.values, batch, layer)
        tolerance = TOLERANCE[found.dtype]
        torch.testing.assert_close(found[: len(contexts)].float(), expected, rtol=tolerance, atol=tolerance)
        # Rows that pad have no context: their queries, which are NaN here, are not heard.
        assert (found[len(contexts) :] == 0).all()


def test_rows_that_pad_write_nothing(triton_device: str, make_paged_case: Any) -> None:
    case = make_paged_case((4, 2), (16, 16), [1, 1], [17, 5], torch.float32, triton_device)
    static = PagedBatch.blank(NUM_ROWS, 64, 16, triton_device)
    keys, values = case.keys.clone(), case.values.clone()
    new = torch.full((2, NUM_ROWS, 16), 7.0, device=triton_device)
    write_cache(keys, values, new, new, static.write_rows)
    torch.testing.assert_close(keys, case.keys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values, case.values, rtol=0, atol=0, equal_nan=True)
    static.copy_from(padded(case, [17, 5]))
    write_cache(keys, values, new, new, static.write_rows)
    written = (keys == 7.0).all(1).nonzero().flatten().tolist()
    assert written == sorted(case.batch.write_rows.tolist())
    assert (values == 7.0).all(1).nonzero().flatten().tolist() == written


def graph_mix(case: Any, num_kinds: int = 1) -> Mix:
    """A blank mix for the rows of a case."""
    limits = [case.pool.a.shape[0]] * num_kinds
    vector_limits = [case.pool.num_vectors] * num_kinds
    return Mix.blank(len(case.slots), limits, 4, 3, case.x.device, form=TRITON, vector_limits=vector_limits)


def mix_of(case: Any, **changes: Any) -> Mix:
    arguments = {"row_slots": case.slots, "row_scales": case.scales, "pages": [case.pages]} | changes
    arguments.setdefault("vectors", [case.vectors] * len(arguments["pages"]))
    return Mix.build(**arguments, max_slots=4, max_pages=3, device=case.x.device, form=TRITON)


def test_a_mix_becomes_any_other(step: str, triton_device: str, make_case: Any, agrees: Any) -> None:
    case = make_case(step, torch.float32, triton_device)
    static = graph_mix(case)
    expected, before = case.expected(), case.y.clone()
    add_lora(case.y, case.x, case.pool, static, 0)
    agrees(case.y, before)
    static.copy_from(mix_of(case))
    add_lora(case.y, case.x, case.pool, static, 0)
    agrees(case.y, expected)
    # And again one in which no row has an adapter.
    after = case.y.clone()
    static.copy_from(mix_of(case, row_slots=np.full_like(case.slots, -1)))
    add_lora(case.y, case.x, case.pool, static, 0)
    agrees(case.y, after)


def test_a_mix_becomes_others_of_other_kinds(triton_device: str, make_case: Any, agrees: Any) -> None:
    """One has pages in the first kind only, the next in the second only."""
    case = make_case("33_rows_three_adapters", torch.float32, triton_device)
    none: tuple[tuple[int, ...], ...] = ((), (), ())
    static = graph_mix(case, num_kinds=2)
    for pages, kind in (([case.pages, none], 0), ([none, case.pages], 1)):
        static.copy_from(mix_of(case, pages=pages))
        y = case.y.clone()
        add_lora(y, case.x, case.pool, static, 1 - kind)
        agrees(y, case.y)
        add_lora(y, case.x, case.pool, static, kind)
        agrees(y, case.expected())


def test_the_vendors_products_never_serve_a_mix_that_becomes_others(
    triton_device: str, triton_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1100, 32, generator=generator).to(triton_device, triton_dtype)
    pool = SitePool(
        (torch.randn(2, 1, 16, 32, generator=generator) / 6).to(triton_device, triton_dtype),
        (torch.randn(2, 16, 48, generator=generator) / 4).to(triton_device, triton_dtype),
        (48,),
    )

    def build(slots: list[int]) -> Mix:
        scales = np.ones(len(slots), np.float32)
        return Mix.build(np.array(slots, np.int32), scales, [[(1,)]], 4, 3, triton_device, form=TRITON)

    step = build([0] * 1100)
    assert step.step.one_adapter is not None, "the step is one that the vendor's products serve"
    static = Mix.blank(1100, [2], 4, 3, triton_device, form=TRITON)
    static.copy_from(step)
    found, wanted = (torch.zeros(1100, 48, dtype=triton_dtype, device=triton_device) for _ in range(2))
    add_lora(found, x, pool, static, 0)
    # A gap in the adapter's rows, and the kernels serve the step that is built, too.
    add_lora(wanted, x, pool, build([0] * 500 + [-1] + [0] * 599), 0)
    assert torch.equal(found[:500], wanted[:500])
    assert found[500].abs().max() > 0


def test_what_a_mix_does_not_become(triton_device: str, make_case: Any) -> None:
    case = make_case("one_row", torch.float32, triton_device)
    static = graph_mix(case)
    with pytest.raises(ValueError, match="asked to copy one of 33 rows"):
        static.copy_from(mix_of(make_case("33_rows_three_adapters", torch.float32, triton_device)))
    with pytest.raises(ValueError, match=r"asked to copy one of pages below \(9,\) by kind"):
        static.copy_from(mix_of(case, pages=[[(8,)]]))
    with pytest.raises(ValueError, match=r"pages below \(4, 4\) by kind, allowed below \(8,\)"):
        static.copy_from(mix_of(case, pages=[case.pages, case.pages]))
    with pytest.raises(ValueError, match=r"asked to copy one of pages of vectors below \(5,\) by kind"):
        static.copy_from(mix_of(case, vectors=[[(4,)]]))
    products = Mix.build(case.slots, case.scales, [case.pages], 4, 3, "cpu", form=CPU)
    with pytest.raises(ValueError, match="asked to copy one of CpuForm, allowed TritonForm"):
        static.copy_from(products)
    with pytest.raises(ValueError, match="asked to copy one of TritonForm, allowed CpuForm"):
        products.copy_from(static)
    with pytest.raises(ValueError, match="never copied"):
        products.copy_from(products)


def test_the_form_that_was_asked_for_serves(triton_device: str, make_case: Any) -> None:
    """On a CPU, too."""
    case = make_case("rank_24_and_40", torch.float32, triton_device)
    mix = mix_of(case)
    assert mix.form is TRITON
    expected = case.y.clone()
    reference.add_lora(
        expected, case.x, case.pool, case.slots.tolist(), case.scales.tolist(), [list(p) for p in case.pages]
    )
    add_lora(case.y, case.x, case.pool, mix, 0)
    torch.testing.assert_close(case.y, expected, rtol=2e-5, atol=2e-5)
