"""Compile every Triton kernel ahead of time, which needs no GPU, and print what came out as JSON.

A program of its own: it must run where triton has not been switched to its interpreter.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from manylora_kernels.device import Device
from manylora_kernels.lora import activation, expand, expand_silu_mul, planner, route, shrink, tile
from manylora_kernels.shapes import SiteShape
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DEVICES = {
    "sm_80": Device("A100", num_units=108, shared_bytes=163 << 10, has_dependent_launch=False),
    "sm_90": Device("H100", num_units=132, shared_bytes=227 << 10, has_dependent_launch=True),
    "sm_100": Device("B200", num_units=148, shared_bytes=227 << 10, has_dependent_launch=True),
    "gfx942": Device("MI300X", num_units=304, shared_bytes=64 << 10, has_dependent_launch=False),
}
SITES = {
    "qkv": SiteShape(4096, (4096, 1024, 1024)),
    "gate_up": SiteShape(4096, (14336, 14336)),
    "down": SiteShape(14336, (4096,)),
}
"""Llama-3-8B's; o has down's form."""
STEPS = {"decode": 32, "chunk": 300, "prefill": 2048}
"""Rows: one for each size of the blocks that rows are cut into."""
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SERVED = (
    "x_ptr", "y_ptr", "a_ptr", "b_ptr", "q_ptr", "k_ptr", "v_ptr", "keys_ptr", "values_ptr", "out_ptr",
    "vector_scale_ptr", "vector_offset_ptr",
)  # fmt: skip
"""Pointers to the dtype that is served."""
FLOAT32 = ("h_ptr", "scales_ptr", "sums_ptr", "parts_ptr", "sinks_ptr")
Sources = dict[str, tuple[ASTSource, dict[str, Any]]]
"""Kernels by name, each with its launch options."""
NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Variant:
    """What is compiled: a kernel at the tile sizes that its plan gives."""

    step: str
    site: str
    floats: str
    max_pages: int = 4
    chained: bool = True
    """Whether expand may start early, where the device can; not for a shrink beside the base product."""
    vectors: bool = False
    """Whether adapters of the step have vectors."""

    def name(self, kernel: str) -> str:
        more = "" if self.chained else "-unchained"
        more += "-vectors" if self.vectors else ""
        return f"{kernel}-{self.step}-{self.site}-{self.floats}-{self.max_pages}_pages{more}"


def variants(target: str) -> list[Variant]:
    """Everything for sm_90; elsewhere the widest shapes, to save time."""
    found = [Variant(step, "qkv", "bf16") for step in STEPS]
    if target == "sm_90":
        found += [Variant(step, site, "bf16") for step in STEPS for site in ("gate_up", "down")]
        found += [Variant("decode", "qkv", "bf16", 1), Variant("decode", "qkv", "fp16")]
        # Graphs have the base product between the two, in steps that are not prompts' alone.
        found += [
            Variant(step, site, "bf16", max_pages, chained=False)
            for step in ("decode", "chunk")
            for site, max_pages in (("qkv", 4), ("gate_up", 4), ("down", 1))
        ]
        found += [Variant(step, "gate_up", "bf16", vectors=True) for step in STEPS]
        found += [Variant("decode", "gate_up", "bf16", chained=False, vectors=True)]
    else:
        found += [Variant("prefill", "gate_up", "bf16"), Variant("prefill", "gate_up", "bf16", vectors=True)]
    if target == "sm_80":
        found += [Variant(step, "qkv", "fp32") for step in ("decode", "prefill")]
    return found


def source(kernel: Any, floats: str, constexprs: dict[str, Any], unaligned: Sequence[str] = ()) -> ASTSource:
    """What the launcher would compile where 16 divides the pointers, widths and strides.

    Args:
        floats: triton's name for the dtype that is served.
        unaligned: arguments that 16 need not divide, beside those that the kernel itself names.
    """
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
        if name in FLOAT32 or (name == "out_ptr" and constexprs.get("IS_SPLIT")):
            # The first pass of attention over a split context writes float32.
            signature[name] = "*fp32"
        elif name in SERVED:
            signature[name] = f"*{floats}"
        else:
            signature[name] = "*i32" if name.endswith("_ptr") else "i32"
        is_fixed = param.do_not_specialize or param.do_not_specialize_on_alignment
        if not is_fixed and name not in unaligned:
            attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attrs)


def vector_constexprs(vectors: bool) -> dict[str, Any]:
    """What the launcher takes for constant: pointers that are None, too."""
    names = ("vectors_ptr", "vector_scale_ptr", "vector_offset_ptr")
    return {"READS_VECTORS": vectors, **({} if vectors else dict.fromkeys(names))}


def sources(target: str) -> Sources:
    """Every kernel with the launch options that go with it."""
    blocks = {"BLOCK_D": 64, "BLOCK_T": 64}
    found = {"route": (source(route._route_kernel, "", blocks), {"num_warps": 8})}
    for variant in variants(target):
        site, device = SITES[variant.site], DEVICES[target]
        dtype = FLOATS[variant.floats]
        chosen = planner.choose(STEPS[variant.step], site, variant.max_pages, dtype, device)
        chained = device.has_dependent_launch and variant.chained
        common = {"NUM_SPLITS": chosen.num_splits, "MAX_PAGES": variant.max_pages, "CHAINED": chained}
        common["BLOCK_T"] = chosen.block_rows
        of_shrink = {"NUM_INPUTS": site.num_inputs, "NUM_LINEARS": site.num_linears, **common}
        of_shrink |= {"BLOCK_K": chosen.shrink.width, "PAGES": chosen.shrink.pages}
        of_expand = {"WIDTHS": site.widths, "BLOCK_N": chosen.expand.width, **common}
        of_expand |= {"PAGES": chosen.expand.pages, **vector_constexprs(variant.vectors)}
        kernels = {
            "shrink": (shrink._shrink_kernel, of_shrink, chosen.shrink),
            "expand": (expand._expand_kernel, of_expand, chosen.expand),
        }
        if variant.vectors:
            del kernels["shrink"]
        if site.is_gate_up:
            fused = {name: value for name, value in of_expand.items() if name != "WIDTHS"}
            tile = expand_silu_mul.halved(chosen.expand)
            fused |= {"WIDTH": site.widths[0], "BLOCK_N": tile.width}
            kernels["silu_mul"] = (expand_silu_mul._expand_silu_mul_kernel, fused, tile)
        for name, (kernel, constexprs, tile) in kernels.items():
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
            if chained:
                options["launch_pdl"] = True
            found[variant.name(name)] = (source(kernel, variant.floats, constexprs), options)
    of_base = {"WIDTH": SITES["gate_up"].widths[0], "BLOCK_N": activation._BLOCK_N}
    found["base_silu_mul-bf16"] = (source(activation._silu_mul_kernel, "bf16", of_base), {"num_warps": 4})
    if target == "sm_90":
        # What the test for narrow accesses must find, or it finds nothing anywhere.
        loose = {"WIDTHS": (1003, 501), "NUM_SPLITS": 1, "MAX_PAGES": 1, "BLOCK_T": 16, "BLOCK_N": 128}
        loose |= {"PAGES": 1, "CHAINED": False, **vector_constexprs(False)}
        found["unaligned"] = (source(expand._expand_kernel, "bf16", loose), {"num_warps": 4, "num_stages": 2})
    return found


def weight_lines() -> dict[str, set[int]]:
    """The lines of each file on which A or B is loaded."""
    found = {}
    for module, pattern in ((shrink, r"\ba = tl\.load\("), (tile, r"return tl\.load\(b_ptrs")):
        lines = inspect.getsource(module).splitlines()
        found[Path(module.__file__).name] = {n for n, line in enumerate(lines, 1) if re.search(pattern, line)}
    return found


def weight_load_bits(code: str) -> Counter[int]:
    """Of each load of A or B in a disassembly with line information, the bits that a thread loads."""
    where = weight_lines()
    found: Counter[int] = Counter()
    at = False
    for line in code.splitlines():
        # Of an inlined function the innermost place comes first.
        place = re.search(r'//## File "[^"]*?([^/"]+)", line (\d+)( inlined at)?', line)
        if place:
            at = int(place[2]) in where.get(place[1], set())
            continue
        load = re.search(r"\b(LDG|LDGSTS)\.E(\S*)", line)
        if at and load:
            width = re.search(r"\.(U8|S8|U16|S16|64|128)\b", load[2])
            found[int(width[1].strip("US")) if width else 32] += 1
    return found


def inspect_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers, local memory and the memory accesses of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [NVIDIA_BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run(
            [NVIDIA_BIN / "nvdisasm", "-c", "-gi", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        **numbers,
        "spills": len(re.findall(r"\b(LDL|STL)\b", code)),
        "narrow_loads": len(re.findall(r"\bLDG\.E\S*\.[US]16\b", code)),
        "narrow_stores": len(re.findall(r"\bSTG\.E\S*\.[US]16\b", code)),
        "weight_load_bits": weight_load_bits(code),
        "tensor_core": len(re.findall(r"\b(HMMA|HGMMA|UTCHMMA)\b", code)),
        "dependent_launch": len(re.findall(r"\b(ACQBULK|PREEXIT)\b", code)),
    }


def print_compiled(sources_of: Callable[[str], Sources]) -> None:
    """Compile the kernels for the targets named on the command line, or all; one line of JSON for each."""
    for target_name in sys.argv[1:] or list(TARGETS):
        for name, (kernel_source, options) in sources_of(target_name).items():
            compiled = triton.compile(kernel_source, target=TARGETS[target_name], options=options)
            row: dict[str, Any] = {"kernel": name, "target": target_name, "shared": compiled.metadata.shared}
            if "cubin" in compiled.asm:
                row.update(inspect_cubin(compiled.asm["cubin"]))
            else:
                text = compiled.asm["amdgcn"]
                row["spills"] = sum(map(int, re.findall(r"\.[vs]gpr_spill_count:\s*(\d+)", text)))
                row["reg"] = max(map(int, re.findall(r"\.vgpr_count:\s*(\d+)", text)))
                row["tensor_core"] = len(re.findall(r"\bv_mfma_", text))
                row["narrow_loads"] = len(re.findall(r"\b(?:global|buffer|flat)_load_(?:ushort|short)", text))
                row["narrow_stores"] = len(re.findall(r"\b(?:global|buffer|flat)_store_short", text))
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    print_compiled(sources)
