"""What fits into memory, and how large the KV cache is. Arithmetic only: `room.py` looks at the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manylora.adapters.pages import largest_pages
from manylora.config import EngineConfig
from manylora.engine.step_graphs import buckets
from manylora.errors import InvalidArgumentError
from manylora.model.loading import PROBE_LENGTHS
from manylora.model.spec import SiteKind, page_groups

_DEFAULT_TOKENS_PER_SEQ = 1024
GRAPH_BYTES = 16 << 20
"""Kept for each recorded step: the driver's own memory for some hundred kernels. An estimate."""
MAX_DEFAULT_BLOCKS = 1 << 18
"""Of a KV cache that takes what a device has left: a small model's would have millions, each with an entry
on the host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """A CUDA device once weights and pool lie in it, in bytes."""

    total_bytes: int
    free_bytes: int
    own_bytes: int
    """Taken by this engine."""
    step_bytes: int
    """What the largest step takes on top, and gives back."""


def num_kv_blocks(
    config: EngineConfig, max_model_len: int, bytes_per_token: int, room_bytes: int | None = None
) -> int:
    """Blocks of the KV cache: of `kv_cache_bytes`, else of its default for a CPU.

    Args:
        room_bytes: the default takes no more, but holds a sequence of `max_model_len`. None: no limit.

    Raises:
        InvalidArgumentError: `kv_cache_bytes` holds less than one sequence of `max_model_len`.
    """
    block_bytes = bytes_per_token * config.kv_block_size
    needed = needed_kv_blocks(config, max_model_len)
    if not config.kv_cache_bytes:
        default = config.max_num_seqs * -(-_DEFAULT_TOKENS_PER_SEQ // config.kv_block_size)
        return max(needed, default if room_bytes is None else min(default, room_bytes // block_bytes))
    num_blocks = config.kv_cache_bytes // block_bytes
    if num_blocks < needed:
        raise InvalidArgumentError(
            f"kv_cache_bytes={config.kv_cache_bytes} holds {num_blocks * config.kv_block_size} tokens; "
            f"one sequence of max_model_len={max_model_len}, and the comparison at start, need "
            f"{needed * block_bytes} bytes"
        )
    return num_blocks


def num_kv_blocks_of_device(
    config: EngineConfig, max_model_len: int, bytes_per_token: int, memory: DeviceMemory, *, graphs: bool
) -> int:
    """Blocks of the KV cache by its default for CUDA: what `gpu_memory_utilization` of the device leaves.

    min(gpu_memory_utilization * total - own, free) - step - what graphs take, which is memory of a step that
    they keep, and GRAPH_BYTES for each.

    Args:
        graphs: whether decode steps will be recorded.

    Raises:
        InvalidArgumentError: less than one sequence of `max_model_len` is left.
    """
    block_bytes = bytes_per_token * config.kv_block_size
    # Each bucket is recorded with adapters and without.
    num_graphs = 2 * len(buckets(config.max_num_seqs)) if graphs else 0
    graph_bytes = memory.step_bytes + num_graphs * GRAPH_BYTES if graphs else 0
    share = int(config.gpu_memory_utilization * memory.total_bytes)
    room = min(share - memory.own_bytes, memory.free_bytes) - memory.step_bytes - graph_bytes
    num_blocks = min(max(room, 0) // block_bytes, MAX_DEFAULT_BLOCKS)
    needed = needed_kv_blocks(config, max_model_len)
    if num_blocks < needed:
        raise InvalidArgumentError(
            f"gpu_memory_utilization={config.gpu_memory_utilization:g} of {gib(memory.total_bytes)} leaves "
            f"{gib(max(room, 0))} for the KV cache, after {gib(memory.own_bytes)} of weights and pool, "
            f"{gib(memory.step_bytes)} of a step and {gib(graph_bytes)} of graphs, with "
            f"{gib(memory.free_bytes)} free; one sequence of max_model_len={max_model_len} needs "
            f"{gib(needed * block_bytes)}"
        )
    return num_blocks


def needed_kv_blocks(config: EngineConfig, max_model_len: int) -> int:
    """The least that can be served with: one sequence of `max_model_len`, or the comparison at start."""
    for_probes = sum(-(-length // config.kv_block_size) for length in PROBE_LENGTHS)
    return max(for_probes, -(-max_model_len // config.kv_block_size))


def num_dry_run_blocks(config: EngineConfig, max_model_len: int) -> int:
    """Enough for the largest steps, before it is known how many there will be."""
    for_prompt = -(-config.max_batched_tokens // config.kv_block_size)
    return max(needed_kv_blocks(config, max_model_len), for_prompt, config.max_num_seqs)


def pool_bytes(kinds: Sequence[SiteKind], config: EngineConfig, itemsize: int) -> int:
    """Of the device pool's pages."""
    pages = zip(largest_pages(kinds, config.max_lora_rank), page_groups(kinds), strict=True)
    return config.max_loras * itemsize * sum(count * group.page_elements for count, group in pages)


def step_bytes(kinds: Sequence[SiteKind], config: EngineConfig, itemsize: int, vocab_size: int) -> int:
    """About what the largest step takes: the widest site's rows, what they become, and the sampler's logits
    in float32, sorted beside their places."""
    widest = max(sum(kind.out_features) for kind in kinds)
    return 3 * config.max_batched_tokens * widest * itemsize + 24 * config.max_num_seqs * vocab_size


def refuse_oversize(parts: Mapping[str, int], available_bytes: int, where: str) -> None:
    """Compare what is asked for with what there is.

    Args:
        parts: bytes, by what a person calls them.
        where: what has the memory.

    Raises:
        InvalidArgumentError: they are more together.
    """
    total = sum(parts.values())
    if total > available_bytes:
        told = " + ".join(f"{name} {gib(num_bytes)}" for name, num_bytes in parts.items())
        raise InvalidArgumentError(
            f"{told} = {gib(total)}, but {where} has {gib(available_bytes)}; lower max_loras, max_lora_rank, "
            f"kv_cache_bytes or max_model_len"
        )


def gib(num_bytes: int) -> str:
    """`12.34 GiB`."""
    return f"{num_bytes / (1 << 30):.2f} GiB"
