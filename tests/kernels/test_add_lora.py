"""The entry and the mix: what they refuse, and what costs nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from manylora_kernels import Mix, SitePool, add_lora


def build(slots: list[int], pages: list[Any], **limits: int) -> Mix:
    scales = np.ones(len(slots), dtype=np.float32)
    options = {"max_slots": 4, "max_pages": 2, **limits}
    return Mix.build(np.array(slots, dtype=np.int32), scales, pages, device="cpu", **options)


def pool(num_pages: int = 4) -> SitePool:
    return SitePool(torch.zeros(num_pages, 2, 16, 8), torch.zeros(num_pages, 16, 12), (8, 4))


def test_a_mix_without_adapters_is_empty_and_changes_nothing() -> None:
    mix = build([-1, -1], [[(1,)], [(1,)]])
    assert mix.is_empty
    y = torch.full((2, 12), torch.nan)
    add_lora(y, torch.full((2, 8), torch.nan), pool(), mix, 1)
    assert y.isnan().all()


def test_a_mix_of_no_slots_is_empty() -> None:
    assert build([-1, -1], [[], []]).is_empty


def test_a_mix_whose_adapters_have_no_pages_is_empty() -> None:
    assert build([0, -1], [[()]]).is_empty


def test_an_adapter_of_one_kind_leaves_the_other_kind_alone() -> None:
    mix = build([0, 0], [[(1,)], [()]])
    assert not mix.is_empty
    y = torch.full((2, 12), torch.nan)
    add_lora(y, torch.full((2, 8), torch.nan), pool(), mix, 1)
    assert y.isnan().all()


def test_kinds_with_different_pages_use_their_own() -> None:
    a = torch.zeros(3, 1, 16, 4)
    b = torch.zeros(3, 16, 2)
    a[:, 0, 0, 0] = 1.0
    b[:, 0, 0] = torch.tensor([1.0, 10.0, 100.0])
    site = SitePool(a, b, (2,))
    mix = build([0], [[(1,)], [(2,)], [(0, 1)]])
    for kind, term in enumerate([10.0, 100.0, 11.0]):
        y = torch.zeros(1, 2)
        add_lora(y, torch.ones(1, 4), site, mix, kind)
        assert y.tolist() == [[term, 0.0]]


@pytest.mark.parametrize(
    ("slots", "pages", "message"),
    [
        ([0, 2], [[(1,), (2,)]], r"row_slots: found 0 .. 2, allowed -1 .. 1"),
        ([-2], [[(1,)]], r"row_slots: found -2 .. -2, allowed -1 .. 0"),
        ([0], [[(1,)] * 5], r"at most max_slots=4"),
        ([0], [[(1,)], [(1,), (2,)]], r"found \[1, 2\] slots by kind"),
        ([0], [[(1, 2, 3)]], r"slot 0, kind 0: found \(1, 2, 3\), allowed at most max_pages=2"),
        ([0], [[(-1,)]], r"slot 0, kind 0: found \(-1,\)"),
    ],
    ids=[
        "slot_too_high",
        "slot_too_low",
        "too_many_slots",
        "uneven_kinds",
        "too_many_pages",
        "negative_page",
    ],
)
def test_a_mix_refuses(slots: list[int], pages: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(slots, pages)


def test_a_mix_refuses_scales_of_another_length() -> None:
    with pytest.raises(ValueError, match="row_slots and row_scales"):
        Mix.build(np.zeros(2, np.int32), np.ones(3, np.float32), [[(0,)]], 1, 1, "cpu")


@pytest.mark.parametrize(
    ("y", "x", "kind", "message"),
    [
        (torch.zeros(2, 12), torch.zeros(3, 8), 0, r"x: found \[3, 8\], allowed \[2, 8\]"),
        (torch.zeros(2, 12), torch.zeros(2, 7), 0, r"x: found \[2, 7\], allowed \[2, 8\]"),
        (torch.zeros(2, 11), torch.zeros(2, 8), 0, r"y: found \[2, 11\], allowed \[2, 12\]"),
        (torch.zeros(12, 2).t(), torch.zeros(2, 8), 0, r"y: found column stride 2, allowed 1"),
        (torch.zeros(2, 12), torch.zeros(2, 8), 1, r"kind: asked for 1, the mix has 0 .. 0"),
        (torch.zeros(2, 12, device="meta"), torch.zeros(2, 8), 0, r"y: found on meta, allowed cpu"),
    ],
    ids=["rows", "inputs", "outputs", "strides", "kind", "device"],
)
def test_add_lora_refuses(y: torch.Tensor, x: torch.Tensor, kind: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(y, x, pool(), build([0, -1], [[(1,)]]), kind)


def test_add_lora_refuses_a_page_that_the_pool_has_not() -> None:
    with pytest.raises(ValueError, match="the mix uses page 7, the pool has 4"):
        add_lora(torch.zeros(1, 12), torch.zeros(1, 8), pool(), build([0], [[(7,)]]), 0)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(4, 1, 16, 8), torch.zeros(4, 16, 12), r"a of 2 linears: found \[4, 1, 16, 8\]"),
        (torch.zeros(4, 2, 16, 8), torch.zeros(4, 16, 11), r"b of widths \(8, 4\): found \[4, 16, 11\]"),
        (torch.zeros(4, 2, 16, 8), torch.zeros(4, 16, 12).half(), "allowed one dtype"),
        (torch.zeros(4, 2, 8, 16).mT, torch.zeros(4, 16, 12), "allowed contiguous pages"),
    ],
    ids=["linears", "outputs", "dtype", "strides"],
)
def test_a_pool_refuses(a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SitePool(a, b, (8, 4))


def test_a_pool_may_be_a_view_of_a_pool_of_all_layers() -> None:
    layers = torch.zeros(4, 3, 2, 16, 8)
    assert SitePool(layers[:, 1], torch.zeros(4, 3, 16, 12)[:, 1], (8, 4)).num_inputs == 8
