"""What an engine holds and what it does, for logs and for people."""

from __future__ import annotations

import torch

from manylora.adapters.device_pool import DevicePool
from manylora.adapters.pool_tensors import PoolTensors
from manylora.adapters.registry import Registry
from manylora.config import EngineConfig
from manylora.engine.kv_cache import BlockPool
from manylora.engine.scheduler import Scheduler
from manylora.messages import Status
from manylora.model.loading import LoadedModel

_RANKS = (8, 16, 32, 64, 128, 256)


def capacity(
    pool: DevicePool, tensors: PoolTensors, blocks: BlockPool, config: EngineConfig, model: LoadedModel
) -> list[str]:
    """Lines for the start-up log: what fits."""
    num_tokens = len(blocks.blocks) * blocks.block_size
    staging = tensors.staging_bytes
    fits = ", ".join(f"{pool.plan(r)} of rank {r}" for r in _RANKS if r <= config.max_lora_rank)
    threads = f" with {torch.get_num_threads()} threads" if model.device.type == "cpu" else ""
    return [
        f"base model {model.directory.name}: {type(model.module).__name__}, {model.dtype} on "
        f"{model.device}{threads}, "
        f"sequences of {model.max_model_len} tokens at most",
        f"KV cache: {num_tokens} tokens, {_mib(num_tokens * model.cache_bytes_per_token())}",
        f"device pool: {_mib(tensors.num_bytes)}, holds adapters on all linears: {fits}; "
        f"{config.max_loras} at most in one step; host cache: {config.num_cpu_loras} adapters",
        *([f"of the pool, adapters are copied through {_mib(staging)}"] if staging else []),
    ]


def status(
    scheduler: Scheduler,
    blocks: BlockPool,
    registry: Registry,
    counters: dict[str, int],
    check_errors: list[str],
) -> Status:
    """A picture of the engine between two steps."""
    return Status(
        adapters=registry.states(),
        counters={
            **counters,
            **registry.counters,
            "preemptions": scheduler.num_preemptions,
            "deadline_missed": scheduler.deadlines.num_missed,
            "prefix_hit_tokens": scheduler.num_prefix_hit_tokens,
        },
        gauges={
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "kv_blocks_free": blocks.num_free,
            "kv_blocks_total": len(blocks.blocks),
            **registry.gauges,
        },
        check_errors=check_errors,
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
