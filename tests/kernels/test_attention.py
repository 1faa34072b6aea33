"""The entry of paged attention: decodes and prompts in one step, refusals, and FlashAttention's place."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from manylora_kernels import reference
from manylora_kernels.attention import flash as attention_flash
from manylora_kernels.attention.paged_attention import paged_attention
from manylora_kernels.attention.plan import Scoring
from torch.nn.attention import varlen

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""As in the tests of decodes and prompts."""


def check(case: Any, layer: Scoring, found: torch.Tensor) -> None:
    expected = reference.attention(case.q, case.keys, case.values, case.batch, layer)
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("queries", "contexts"),
    [([1, 1, 7, 20], [5, 200, 30, 20]), ([1, 1], [3, 40]), ([9], [9])],
    ids=["mixed", "decodes", "prompt"],
)
@pytest.mark.parametrize("window", [0, 16], ids=["all", "window"])
def test_a_step_agrees_with_the_reference(
    queries: list[int],
    contexts: list[int],
    window: int,
    triton_dtype: torch.dtype,
    triton_device: str,
    make_paged_case: Any,
    poisoned_memory: Any,
) -> None:
    case = make_paged_case((4, 2), (16, 16), queries, contexts, triton_dtype, triton_device)
    layer = Scoring(scaling=0.25, window=window)
    with poisoned_memory():
        found = paged_attention(case.q, case.keys, case.values, case.batch, layer)
    check(case, layer, found)


@pytest.mark.parametrize("size", [16, 20, 5])
def test_queries_in_any_layout_give_the_same_bits(
    size: int, triton_device: str, triton_dtype: torch.dtype, make_paged_case: Any
) -> None:
    """Rows first and heads first in memory, part of a projection, from an odd address, transposed."""
    case = make_paged_case((6, 2), (size, size), [1, 1, 1, 4], [5, 40, 3, 9], triton_dtype, triton_device)
    layer = Scoring(scaling=0.25)
    wide = torch.full((8, 7, size + 2), torch.nan, dtype=triton_dtype, device=triton_device)
    wide[1:, 1:, 1:-1] = case.q.transpose(0, 1)
    layouts = [
        case.q.contiguous(),
        wide[1:, 1:, 1:-1].transpose(0, 1),
        case.q.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    ]
    found = paged_attention(case.q, case.keys, case.values, case.batch, layer)
    check(case, layer, found)
    for q in layouts:
        assert torch.equal(paged_attention(q, case.keys, case.values, case.batch, layer), found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 3, 16)}, "found 3 rows, the batch has 2"),
        ({"q": torch.zeros(3, 2, 16)}, "whole key/value heads that divide the query heads"),
        ({"keys": torch.zeros(32, 80).t()[:64]}, "allowed contiguous ones"),
        ({"keys": torch.zeros(48, 32)}, "allowed the same number of whole blocks of 16"),
        ({"values": torch.zeros(64, 32).half()}, "allowed one dtype"),
        ({"values": torch.zeros(64, 2 * 320)}, "head sizes: found 16 and 320, allowed up to 256"),
        ({"keys": torch.zeros(64, 32, device="meta")}, "devices: found"),
    ],
    ids=["rows", "heads", "strides", "blocks", "dtypes", "sizes", "devices"],
)
def test_refuses(
    change: dict[str, torch.Tensor], message: str, triton_device: str, make_paged_case: Any
) -> None:
    case = make_paged_case((4, 2), (16, 16), [1, 1], [9, 3], torch.float32, triton_device)
    assert case.keys.shape[0] == 80
    keys, values = case.keys[:64], case.values[:64]
    given = {"q": case.q, "keys": keys, "values": values}
    given |= {n: t if t.device.type == "meta" else t.to(triton_device) for n, t in change.items()}
    with pytest.raises(ValueError, match=message):
        paged_attention(**given, batch=case.batch, scoring=Scoring(scaling=0.25))


def test_refuses_sinks_of_another_length(triton_device: str, make_paged_case: Any) -> None:
    case = make_paged_case((4, 2), (16, 16), [1], [9], torch.float32, triton_device)
    layer = Scoring(scaling=0.25, sinks=torch.zeros(3, device=triton_device))
    with pytest.raises(ValueError, match=r"sinks: found \[3\], allowed contiguous \[4\]"):
        paged_attention(case.q, case.keys, case.values, case.batch, layer)


class Varlen:
    """Stands in for torch's `varlen_attn`: the paged form as torch documents it, by the reference."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.num_calls += 1
        given = inspect.signature(varlen.varlen_attn).bind(*args, **kwargs).arguments
        left, right = given["window_size"]
        assert right == 0
        assert given["num_splits"] == 1
        assert given["enable_gqa"] == (given["query"].shape[1] != given["key"].shape[2])
        contexts, starts, keys = given["seqused_k"], given["cu_seq_q"], given["key"]
        assert starts[-1] == given["query"].shape[0]
        assert given["max_q"] >= starts.diff().max()
        assert given["max_k"] >= contexts.max()
        # A sequence at a time, as one without decodes.
        out = []
        for seq in range(len(contexts)):
            batch = replace(
                self.batch,
                tables=given["block_table"][seq : seq + 1],
                contexts=contexts[seq : seq + 1],
                starts=starts[seq : seq + 2] - starts[seq],
                block_size=keys.shape[1],
                num_decodes=0,
            )
            q = given["query"][starts[seq] : starts[seq + 1]].transpose(0, 1)
            layer = Scoring(scaling=given["scale"], window=left + 1)
            caches = (cache.flatten(0, 1).flatten(1) for cache in (keys, given["value"]))
            out.append(reference.attention(q, *caches, batch, layer))
        return torch.cat(out)


@pytest.mark.skipif(
    "block_table" not in inspect.signature(varlen.varlen_attn).parameters,
    reason="this torch's varlen_attn takes no block table",
)
@pytest.mark.parametrize("window", [0, 16], ids=["all", "window"])
@pytest.mark.parametrize("queries", [[7, 20], [1, 1, 7, 20]], ids=["prompts", "mixed"])
def test_flash_attention_is_asked_for_what_the_triton_kernels_compute(
    queries: list[int],
    window: int,
    triton_device: str,
    make_paged_case: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contexts = [30, 20] if len(queries) == 2 else [5, 200, 30, 20]
    case = make_paged_case((4, 2), (16, 16), queries, contexts, torch.float16, triton_device)
    stand_in = Varlen()
    stand_in.batch = case.batch
    monkeypatch.setattr(attention_flash, "varlen_attention", lambda device: stand_in)
    layer = Scoring(scaling=0.25, window=window)
    check(case, layer, paged_attention(case.q, case.keys, case.values, case.batch, layer))
    assert stand_in.num_calls == 1


@pytest.mark.parametrize(
    ("dtype", "sizes", "layer"),
    [
        (torch.float32, (16, 16), {}),
        (torch.float16, (20, 20), {}),
        (torch.float16, (16, 24), {}),
        (torch.float16, (16, 16), {"softcap": 3.0}),
        (torch.float16, (16, 16), {"sinks": torch.zeros(4)}),
    ],
    ids=["float32", "size_20", "other_value_size", "softcap", "sinks"],
)
def test_flash_attention_is_not_asked_for_what_it_cannot_do(
    dtype: torch.dtype, sizes: tuple[int, int], layer: dict[str, Any]
) -> None:
    q = torch.zeros(4, 2, sizes[0], dtype=dtype)
    assert not attention_flash.serves(q, sizes[1], Scoring(scaling=1.0, **layer))


@pytest.mark.skipif(
    "block_table" not in inspect.signature(varlen.varlen_attn).parameters,
    reason="this torch's varlen_attn takes no block table",
)
def test_flash_attention_is_asked_by_the_keywords_that_are_looked_for(
    triton_device: str, make_paged_case: Any
) -> None:
    case = make_paged_case((4, 2), (16, 16), [7], [30], torch.float16, triton_device)
    asked: set[str] = set()

    def record(*_args: Any, **keywords: Any) -> torch.Tensor:
        asked.update(keywords)
        return torch.zeros(7, 4, 16)

    batch = case.batch
    layer = Scoring(scaling=0.25)
    attention_flash.attend(record, case.q, case.keys, case.values, batch.tables, batch.contexts, batch, layer)
    assert asked == attention_flash._KEYWORDS


def test_without_flash_attention_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    attention_flash.varlen_attention.cache_clear()
    with caplog.at_level("INFO"):
        assert attention_flash.varlen_attention(torch.device("cpu")) is None
        assert attention_flash.varlen_attention(torch.device("cpu")) is None
    (record,) = caplog.records
    assert "FlashAttention 3 is not used" in record.getMessage()
    assert "the Triton kernels serve" in record.getMessage()
