"""Compile every Triton kernel ahead of time, which needs no GPU, and print what came out as JSON.

A program of its own: it must run where triton has not been switched to its interpreter.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from manylora_kernels import attention_plan, plan
from manylora_kernels.attention_decode import _decode_kernel, _merge_kernel
from manylora_kernels.attention_plan import SPLIT_TOKENS, Gpu, TilePlan
from manylora_kernels.attention_prefill import _prefill_kernel
from manylora_kernels.cache_write import _write_cache_kernel
from manylora_kernels.expand import _expand_kernel
from manylora_kernels.route import _route_kernel
from manylora_kernels.shrink import _shrink_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {
    "bf16": (torch.bfloat16, "*bf16", tuple(TARGETS)),
    "fp16": (torch.float16, "*fp16", ("sm_90",)),
    "fp32": (torch.float32, "*fp32", ("sm_80",)),
}
"""The dtype, triton's name for a pointer to it and where it is compiled: not everywhere, to save time."""
STEPS = {"decode": 32, "prefill": 2048}
UNALIGNED = ("max_pages", "num_splits", "num_tiles", "num_linears", "block_rows")
"""Arguments that 16 need not divide."""
FLOATS = (
    "x_ptr", "y_ptr", "a_ptr", "b_ptr", "q_ptr", "k_ptr", "v_ptr", "keys_ptr", "values_ptr", "out_ptr",
)  # fmt: skip
"""Pointers to the dtype that is served."""
FLOAT32 = ("h_ptr", "scales_ptr", "sums_ptr", "parts_ptr", "sinks_ptr")
HEAD_SIZES = (64, 128, 256)
PER_KV = 4
"""Query heads of a key/value head."""
NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def source(kernel: Any, floats: str, constexprs: dict[str, Any]) -> ASTSource:
    """What the launcher would compile where 16 divides the pointers, widths and strides."""
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, param in enumerate(kernel.params):
        name = param.name
        if name in constexprs:
            signature[name] = "constexpr"
            continue
        if name in ("factor", "cap"):
            signature[name] = "fp32"
            continue
        if name in FLOATS:
            # The first pass over a split context writes float32.
            signature[name] = "*fp32" if name == "out_ptr" and constexprs.get("IS_SPLIT") else floats
        elif name in FLOAT32:
            signature[name] = "*fp32"
        else:
            signature[name] = "*i32" if name.endswith("_ptr") else "i32"
        fixed = param.do_not_specialize or param.do_not_specialize_on_alignment
        if not fixed and name not in UNALIGNED:
            attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attrs)


def gpu(target: str) -> Gpu:
    """What the plans of attention would be told of a target."""
    return Gpu(9, is_amd=True) if target.startswith("gfx") else Gpu(int(target[3:]) // 10)


def attention_sources(target: str) -> dict[str, tuple[ASTSource, dict[str, int]]]:
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
        write = {**sizes, "KEY_SIZE": 128, "BLOCK_D": 128, "BLOCK_T": 8}
        found["merge"] = (source(_merge_kernel, "*bf16", merge), {"num_warps": 2})
        found["write-cache"] = (source(_write_cache_kernel, "*bf16", write), {"num_warps": 4})
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
    tiles = {"BLOCK_C": chosen.block_tokens, "BLOCK_D": block, "BLOCK_E": block}
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    return source(kernel, "*bf16", {**of_both, **tiles, **constexprs}), options


def sources(target: str) -> dict[str, tuple[ASTSource, dict[str, int]]]:
    """Every kernel at the tile sizes of decode and of prefill, with the launch options that go with them."""
    found = {"route": (source(_route_kernel, "", {"BLOCK_D": 64, "BLOCK_T": 64}), {"num_warps": 4})}
    for dtype_name, (dtype, floats, targets) in DTYPES.items():
        if target not in targets:
            continue
        for step, num_rows in STEPS.items():
            chosen = plan.choose(num_rows, 4096, dtype)
            options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
            rows, inputs, outputs = chosen.block_rows, chosen.block_inputs, chosen.block_outputs
            shrink = {"NUM_LINEARS": 3, "BLOCK_T": rows, "BLOCK_K": inputs, "BLOCK_R": 64}
            expand = {"BLOCK_T": rows, "BLOCK_N": outputs, "COLUMNS_ALIGNED": True}
            found[f"shrink-{step}-{dtype_name}"] = (source(_shrink_kernel, floats, shrink), options)
            found[f"expand-{step}-{dtype_name}"] = (source(_expand_kernel, floats, expand), options)
    found |= attention_sources(target)
    if target == "sm_90":
        # What the test for narrow accesses must find, or it finds nothing anywhere.
        loose = {"BLOCK_T": 16, "BLOCK_N": 128, "COLUMNS_ALIGNED": False}
        found["unaligned"] = (source(_expand_kernel, "*bf16", loose), {"num_warps": 4, "num_stages": 3})
    return found


def inspect_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers, local memory and the narrow memory accesses of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [NVIDIA_BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run(
            [NVIDIA_BIN / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        **numbers,
        "spills": len(re.findall(r"\b(LDL|STL)\b", code)),
        "narrow_loads": len(re.findall(r"\bLDG\.E\S*\.[US]16\b", code)),
        "narrow_stores": len(re.findall(r"\bSTG\.E\S*\.[US]16\b", code)),
        "tensor_core": len(re.findall(r"\b(HMMA|HGMMA|UTCHMMA)\b", code)),
    }


def compile_for(target_name: str) -> list[dict[str, Any]]:
    rows = []
    for name, (kernel_source, options) in sources(target_name).items():
        compiled = triton.compile(kernel_source, target=TARGETS[target_name], options=options)
        row: dict[str, Any] = {"kernel": name, "target": target_name, "shared": compiled.metadata.shared}
        if "cubin" in compiled.asm:
            row.update(inspect_cubin(compiled.asm["cubin"]))
        else:
            text = compiled.asm["amdgcn"]
            row["spills"] = sum(map(int, re.findall(r"\.[vs]gpr_spill_count:\s*(\d+)", text)))
            row["reg"] = max(map(int, re.findall(r"\.vgpr_count:\s*(\d+)", text)))
            row["tensor_core"] = len(re.findall(r"\bv_mfma_", text))
        rows.append(row)
    return rows


def main() -> None:
    with ProcessPoolExecutor(max_workers=2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for rows in pool.map(compile_for, TARGETS):
            for row in rows:
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
