"""Compile the attention kernels ahead of time, which needs no GPU, and print what came out as JSON.

A program of its own, beside compile_kernels.py, which says why.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from compile_kernels import Sources, print_compiled, source
from manylora_kernels.attention import plan as attention_plan
from manylora_kernels.attention.cache_write import _write_cache_kernel
from manylora_kernels.attention.decode import _decode_kernel, _merge_kernel
from manylora_kernels.attention.head_rows import stride_unit
from manylora_kernels.attention.plan import SPLIT_TOKENS, Gpu, TilePlan
from manylora_kernels.attention.prefill import _prefill_kernel
from triton.compiler import ASTSource

UNALIGNED = ("num_splits",)
"""Arguments that 16 need not divide."""
HEAD_SIZES = (64, 128, 256)
PER_KV = 4
"""Query heads of a key/value head."""


def gpu(target: str) -> Gpu:
    """What the plans of attention would be told of a target."""
    return Gpu(9, is_amd=True) if target.startswith("gfx") else Gpu(int(target[3:]) // 10)


def sources(target: str) -> Sources:
    """Attention for decodes and prompts at each head size, and what goes with it."""
    found = {}
    for size in HEAD_SIZES:
        found[f"attention-decode-{size}"] = decode_source(target, size)
        found[f"attention-prefill-{size}"] = prefill_source(target, size, 4096)
    if target == "sm_90":
        found["attention-decode-whole-80"] = decode_source(target, 80, IS_SPLIT=False, HAS_CAP=True)
        found["attention-prefill-short-128"] = prefill_source(target, 128, 16)
        found["attention-prefill-rules-80"] = prefill_source(target, 80, 4096, HAS_CAP=True, HAS_WINDOW=True)
        sizes = {"VALUE_SIZE": 128, "BLOCK_E": 128}
        merge = {**sizes, "SPLIT_TOKENS": SPLIT_TOKENS, "BLOCK_Z": 32}
        write = {**sizes, "KEY_SIZE": 128, "BLOCK_D": 128, "BLOCK_T": 8, "KEY_UNIT": 16, "VALUE_UNIT": 16}
        found["merge"] = (source(_merge_kernel, "bf16", merge, UNALIGNED), {"num_warps": 2})
        found["write-cache"] = (source(_write_cache_kernel, "bf16", write, UNALIGNED), {"num_warps": 4})
    return found


def decode_source(target: str, size: int, **flags: bool) -> tuple[ASTSource, dict[str, int]]:
    chosen = attention_plan.decode(
        num_seqs=8,
        num_kv=8,
        per_kv=PER_KV,
        max_visible=8192,
        largest_size=size,
        dtype=torch.bfloat16,
        gpu=gpu(target),
    )
    constexprs = {"SPLIT_TOKENS": SPLIT_TOKENS, "BLOCK_G": chosen.block_rows, "IS_SPLIT": True}
    return attention_source(_decode_kernel, size, chosen, constexprs | flags)


def prefill_source(
    target: str, size: int, max_queries: int, **flags: bool
) -> tuple[ASTSource, dict[str, int]]:
    chosen = attention_plan.prefill(
        max_queries=max_queries,
        per_kv=PER_KV,
        largest_size=size,
        dtype=torch.bfloat16,
        gpu=gpu(target),
    )
    constexprs = {"BLOCK_R": chosen.block_rows, "HAS_WINDOW": False}
    return attention_source(_prefill_kernel, size, chosen, constexprs | flags)


def attention_source(
    kernel: Any, size: int, chosen: TilePlan, constexprs: dict[str, Any]
) -> tuple[ASTSource, dict[str, int]]:
    block = triton.next_power_of_2(size)
    of_both = {"GROUP": PER_KV, "KEY_SIZE": size, "VALUE_SIZE": size, "KV_BLOCK": 16, "HAS_CAP": False}
    of_both["STRIDE_UNIT"] = stride_unit(size)
    tiles = {"BLOCK_C": chosen.block_tokens, "BLOCK_D": block, "BLOCK_E": block}
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    return source(kernel, "bf16", {**of_both, **tiles, **constexprs}, UNALIGNED), options


if __name__ == "__main__":
    print_compiled(sources)
