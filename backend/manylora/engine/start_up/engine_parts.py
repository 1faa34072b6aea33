"""What an engine consists of: made at its start, in an order that memory and proofs ask for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from manylora import paths
from manylora.adapters.adapter_root import AdapterRoot
from manylora.adapters.device_pool import DevicePool
from manylora.adapters.pool_tensors import PoolTensors, pool_dtype
from manylora.adapters.reader import reader
from manylora.adapters.registry import Registry
from manylora.config import EngineConfig
from manylora.engine import report
from manylora.engine.kv_cache import BlockPool
from manylora.engine.limits import Limits
from manylora.engine.runner import Runner
from manylora.engine.scheduler import Scheduler
from manylora.engine.start_up.graph_start import record_graphs
from manylora.engine.start_up.kernel_check import prove_kernels
from manylora.engine.start_up.make_runner import make_runner
from manylora.engine.start_up.packing_check import prove_packing
from manylora.engine.start_up.room import Room
from manylora.errors import ManyloraError
from manylora.messages import EngineInfo
from manylora.model.loading import LoadedModel, load_model

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """Scheduler, registry, pool and blocks decide; model, runner and the pool's tensors compute."""

    model: LoadedModel
    runner: Runner
    pool: DevicePool
    registry: Registry
    blocks: BlockPool
    scheduler: Scheduler
    info: EngineInfo


def build_parts(config: EngineConfig, wake: Callable[[], None], *, strict_preload: bool) -> EngineParts:
    """Load the model and make all parts, on the thread that will run them.

    Args:
        wake: called on a thread of the registry when the engine is to look again.
        strict_preload: as of `Engine`.

    Raises:
        ManyloraError: the configuration or the base model cannot be served.
    """
    room = Room(config)
    model = load_model(config)
    num_blocks = room.num_first_blocks(model)
    tensors = PoolTensors(
        model.spec,
        config.max_loras,
        config.max_lora_rank,
        pool_dtype(config, model.dtype),
        model.device,
    )
    pool = DevicePool(model.spec.kinds, config.max_loras, config.max_lora_rank, tensors)
    runner = make_runner(model, config, tensors, num_blocks)
    prove_kernels(model, runner.uploader)
    room.fill(runner)
    prove_packing(runner)
    record_graphs(runner, config)
    registry = _make_registry(config, model, pool, tensors, wake, strict_preload=strict_preload)
    blocks = BlockPool(runner.num_blocks, config.kv_block_size, reuse=config.enable_prefix_caching)
    limits = Limits.of(config, model.max_model_len)
    for line in report.capacity(pool, tensors, blocks, config, model):
        log.info(line)
    return EngineParts(
        model=model,
        runner=runner,
        pool=pool,
        registry=registry,
        blocks=blocks,
        scheduler=Scheduler(limits, blocks, registry, model.eos_token_ids),
        info=EngineInfo(
            base_model=paths.to_text(model.directory),
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
        ),
    )


def _make_registry(
    config: EngineConfig,
    model: LoadedModel,
    pool: DevicePool,
    tensors: PoolTensors,
    wake: Callable[[], None],
    *,
    strict_preload: bool,
) -> Registry:
    root = AdapterRoot(config.adapter_root, strict=strict_preload)
    # Page-locked on its way to a GPU, so that the copy runs beside the steps.
    read = reader(config, root, model.spec, tensors.dtype, pin=tensors.device.type == "cuda")
    registry = Registry(config, root, read, pool, wake)
    try:
        registry.preload(strict=strict_preload)
    except ManyloraError:
        registry.close()
        raise
    return registry
