"""The memory that this engine may take: what is asked for is compared with it, and the KV cache fills it.

At start on CUDA the first KV cache is just large enough for the largest steps. Those run once, which shows
what a step takes; then the cache is made anew from what is left. Graphs come last, since they read the cache
where it lies: an estimate is kept free for them.
"""

from __future__ import annotations

import logging

import torch

from manylora.adapters.pool_tensors import pool_dtype
from manylora.config import EngineConfig
from manylora.engine.runner import Runner
from manylora.engine.start_up import capacity
from manylora.engine.start_up.capacity import DeviceMemory
from manylora.engine.start_up.dry_run import dry_run
from manylora.memory import host_memory
from manylora.model.loading import LoadedModel, resolve_device

log = logging.getLogger(__name__)


class Room:
    """The memory of the device that the model will lie on; make it before the model is loaded.

    Args:
        config: with the device.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        device = resolve_device(config.device)
        self._free_at_start = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0

    def num_first_blocks(self, model: LoadedModel) -> int:
        """Blocks of the KV cache before the largest steps have run; on a CPU for good.

        Raises:
            InvalidArgumentError: weights, pool and KV cache are more than there is. On a CPU memory is taken
                when it is used: of a default KV cache only what a start needs must fit, and what does not
                is left out.
        """
        config, on_cuda = self._config, model.device.type == "cuda"
        dtype = pool_dtype(config, model.dtype)
        pool = capacity.pool_bytes(model.spec.kinds, config, dtype.itemsize)
        block_bytes = model.cache_bytes_per_token() * config.kv_block_size
        if on_cuda:
            parts = {}
            available, where = torch.cuda.mem_get_info(model.device)[0], "the device behind the base model"
        else:
            parts = {"base model": model.weight_bytes}
            available, where = host_memory(), "this machine"
        parts[f"device pool (max_loras={config.max_loras}, max_lora_rank={config.max_lora_rank})"] = pool
        if config.kv_cache_bytes:
            name, kv_bytes = "KV cache (kv_cache_bytes)", config.kv_cache_bytes
        else:
            name = f"KV cache of one sequence (max_model_len={model.max_model_len})"
            kv_bytes = capacity.needed_kv_blocks(config, model.max_model_len) * block_bytes
        left = available - sum(parts.values())
        capacity.refuse_oversize({**parts, name: kv_bytes}, available, where)
        if on_cuda and not config.kv_cache_bytes:
            return capacity.num_dry_run_blocks(config, model.max_model_len)
        return capacity.num_kv_blocks(config, model.max_model_len, model.cache_bytes_per_token(), left)

    def fill(self, runner: Runner) -> None:
        """Run the largest steps once, and on CUDA let a default KV cache take what is left.

        Raises:
            InvalidArgumentError: too little is left.
        """
        model, config, device = runner.model, self._config, runner.model.device
        if device.type == "cpu":
            return
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        dry_run(runner, config)
        step_bytes = torch.cuda.max_memory_allocated(device) - before
        if config.kv_cache_bytes:
            return
        runner.make_caches(0)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        memory = DeviceMemory(
            total_bytes=total,
            free_bytes=free,
            own_bytes=self._free_at_start - free,
            step_bytes=step_bytes,
        )
        runner.make_caches(
            capacity.num_kv_blocks_of_device(
                config,
                model.max_model_len,
                model.cache_bytes_per_token(),
                memory,
                graphs=runner.uploader.paged and not config.enforce_eager,
            )
        )
        log.info(
            "a step takes %s on top; the KV cache is what gpu_memory_utilization=%g leaves",
            capacity.gib(step_bytes),
            config.gpu_memory_utilization,
        )
