"""`manylora plan`: how much memory a configuration needs, and what fits; no server, no weights."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from manylora import settings_table
from manylora.config import EngineConfig, parse_size
from manylora.serve.command import read_settings
from manylora.table import render, size

if TYPE_CHECKING:
    from manylora.model.outline import ModelOutline

EXAMPLES = """\
examples:
  manylora plan --base-model models/base
  manylora plan --base-model models/base --set max_loras=32 --set dtype=bfloat16
  manylora plan --base-model models/base --set device=cuda --device-memory 80G
"""
RANKS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of site in the device pool."""

    site: str
    layers: int
    pages: int
    page_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one configuration needs, in bytes and counts."""

    base_model: str
    architecture: str
    dtype: str
    lora_dtype: str
    weight_bytes: int
    kinds: list[Kind]
    pool_bytes: int
    """With `vector_bytes` and `staging_bytes`."""
    vector_bytes: int
    """Of what adapters have once for each output, room for `max_loras` of them."""
    staging_bytes: int
    """Of the buffer on a CUDA device that adapters are copied through; 0 on a CPU."""
    adapters_that_fit: dict[int, int]
    """By rank, on all linears."""
    adapter_bytes: dict[int, int]
    """Of one adapter of that rank on all linears, on host as on the device."""
    max_loras: int
    max_cpu_loras: int
    host_cache_bytes: int
    """With the largest adapter, of max_lora_rank on all linears and with vectors, in every slot. For CUDA in
    blocks of a power of two, which is how torch allocates page-locked memory."""
    kv_bytes: int
    kv_tokens: int
    kv_bytes_per_token: int
    max_model_len: int
    device_bytes: int
    """Weights, pool and KV cache together, without a step's temporaries."""
    step_bytes: int
    """Estimate of a step's temporaries."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `manylora plan`."""
    parser.add_argument("--base-model", default="", metavar="DIR", help="base model in Hugging Face format")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, as of `manylora serve`"
    )
    parser.add_argument(
        "--device-memory", default="", metavar="SIZE", help="of a CUDA device, e.g. 80G: sizes the KV cache"
    )
    parser.add_argument("--json", action="store_true", help="as one line of JSON")
    parser.set_defaults(adapter_root="")


def epilog() -> str:
    """Examples, and the settings that there are."""
    return f"{EXAMPLES}\n{settings_table.help_text()}"


def main(arguments: argparse.Namespace) -> int:
    """Compute and print.

    Raises:
        ManyloraError: a setting or the base model cannot be used.
    """
    from manylora.model.outline import outline_model

    config = EngineConfig.from_strings(read_settings(arguments))
    device_bytes = parse_size("--device-memory", arguments.device_memory) if arguments.device_memory else 0
    plan = make_plan(config, outline_model(config), device_bytes)
    print(json.dumps(asdict(plan)) if arguments.json else describe(plan))
    if not arguments.json and _is_cuda(config.device) and not (device_bytes or config.kv_cache_bytes):
        print("With --device-memory SIZE the KV cache is what such a device has left.")
    return 0


def make_plan(config: EngineConfig, model: ModelOutline, device_bytes: int = 0) -> Plan:
    """How much memory the engine will need with this configuration.

    Args:
        device_bytes: memory of a CUDA device, all of it free; 0: not known, and the KV cache is a CPU's.

    Raises:
        InvalidArgumentError: the KV cache is too small to start.
    """
    from manylora.adapters.pool_tensors import pool_dtype, staging_elements
    from manylora.engine.start_up import capacity
    from manylora.model.parts import PagedBy, num_pages_of

    lora_dtype = pool_dtype(config, model.dtype)
    largest = num_pages_of(config.max_lora_rank)
    num_pages = config.max_loras * largest
    itemsize = lora_dtype.itemsize
    kinds = [
        Kind(site=k.name, layers=k.num_layers, pages=num_pages, page_bytes=k.page_elements() * itemsize)
        for k in model.spec.kinds
    ]
    page_set = sum(kind.page_bytes for kind in kinds)
    ranks = sorted({*(r for r in RANKS if r <= config.max_lora_rank), config.max_lora_rank})
    staging = staging_elements(model.spec.kinds, config.max_lora_rank, lora_dtype)
    staging_bytes = itemsize * staging if device_bytes or _is_cuda(config.device) else 0
    vectors = itemsize * sum(kind.page_elements(PagedBy.ADAPTER) for kind in model.spec.kinds)
    host_bytes = 1 << (staging_bytes - 1).bit_length() if staging_bytes else largest * page_set + vectors
    pool_bytes = capacity.pool_bytes(model.spec.kinds, config, itemsize) + staging_bytes
    step_bytes = capacity.step_bytes(model.spec.kinds, config, model.dtype.itemsize, model.vocab_size)
    limits = (config, model.max_model_len, model.cache_bytes_per_token)
    if device_bytes and not config.kv_cache_bytes:
        memory = capacity.DeviceMemory(
            total_bytes=device_bytes,
            free_bytes=max(0, device_bytes - model.weight_bytes - pool_bytes),
            own_bytes=model.weight_bytes + pool_bytes,
            step_bytes=step_bytes,
        )
        num_blocks = capacity.num_kv_blocks_of_device(*limits, memory, graphs=not config.enforce_eager)
    else:
        num_blocks = capacity.num_kv_blocks(*limits)
    kv_tokens = num_blocks * config.kv_block_size
    kv_bytes = kv_tokens * model.cache_bytes_per_token
    return Plan(
        base_model=str(model.directory),
        architecture=model.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        lora_dtype=str(lora_dtype).removeprefix("torch."),
        weight_bytes=model.weight_bytes,
        kinds=kinds,
        pool_bytes=pool_bytes,
        vector_bytes=config.max_loras * vectors,
        staging_bytes=staging_bytes,
        adapters_that_fit={rank: num_pages // num_pages_of(rank) for rank in ranks},
        adapter_bytes={rank: num_pages_of(rank) * page_set for rank in ranks},
        max_loras=config.max_loras,
        max_cpu_loras=config.num_cpu_loras,
        host_cache_bytes=config.num_cpu_loras * host_bytes,
        kv_bytes=kv_bytes,
        kv_tokens=kv_tokens,
        kv_bytes_per_token=model.cache_bytes_per_token,
        max_model_len=model.max_model_len,
        device_bytes=model.weight_bytes + pool_bytes + kv_bytes,
        step_bytes=step_bytes,
    )


def describe(plan: Plan) -> str:
    """The plan for people, within 80 columns."""
    sites = [
        (
            _short(kind.site),
            kind.layers,
            kind.pages,
            size(kind.page_bytes),
            size(kind.pages * kind.page_bytes),
        )
        for kind in plan.kinds
    ]
    ranks = [(rank, size(plan.adapter_bytes[rank]), count) for rank, count in plan.adapters_that_fit.items()]
    sequences = [
        f"{plan.kv_tokens // tokens} of {tokens}" for tokens in dict.fromkeys((1024, plan.max_model_len))
    ]
    totals: list[tuple[Any, ...]] = [
        ("base model weights", size(plan.weight_bytes), plan.dtype),
        ("device pool", size(plan.pool_bytes), f"{plan.lora_dtype}, {plan.max_loras} adapters in one step"),
        ("  scales and offsets", size(plan.vector_bytes), "of it, for adapters that have them"),
        *([("  to copy through", size(plan.staging_bytes), "of it")] if plan.staging_bytes else []),
        ("KV cache", size(plan.kv_bytes), f"{plan.kv_tokens} tokens: {', '.join(sequences)} tokens"),
        ("on the device", size(plan.device_bytes), f"and about {size(plan.step_bytes)} for a step"),
        (
            "host cache",
            size(plan.host_cache_bytes),
            f"at most: {plan.max_cpu_loras} of the highest rank",
        ),
    ]
    return "\n".join(
        [
            f"{plan.base_model}: {plan.architecture}",
            "",
            render(("memory", "size", ""), totals, right=(1,)),
            "",
            render(("site", "layers", "pages", "a page", "pool"), sites, right=(1, 2, 3, 4)),
            "",
            render(("rank, on all linears", "an adapter", "fit on the device"), ranks, right=(0, 1, 2)),
            "",
            "A page is 16 rank rows in every layer. An adapter takes pages for its own rank",
            "and targets: one of fewer linears takes less than the table says.",
        ]
    )


def _is_cuda(device: str) -> bool:
    """Whether the setting `device` means CUDA. One that names it counts even without a GPU: a plan needs
    none."""
    import torch

    return torch.cuda.is_available() if device == "auto" else device.startswith("cuda")


def _short(kind: str) -> str:
    return "+".join(part.rpartition(".")[2] for part in kind.split("+"))
