"""Makes the runner of an engine, its kernels compiled."""

from __future__ import annotations

from manylora.adapters.pool_tensors import PoolTensors
from manylora.config import EngineConfig
from manylora.engine import runner
from manylora.engine.runner import Runner
from manylora.engine.start_up.capacity import num_kv_blocks
from manylora.engine.start_up.warm_up import prepare_kernels
from manylora.model.loading import LoadedModel


def make_runner(
    model: LoadedModel,
    config: EngineConfig,
    pool: PoolTensors,
    num_blocks: int | None = None,
    paged: bool | None = None,
) -> Runner:
    """Prepare the kernels and give the model its KV caches and the pool's pages.

    Args:
        num_blocks: of the KV cache; None: what `capacity.num_kv_blocks` says.
        paged: whether attention and adapters go through Triton's kernels; None: on CUDA, for heads that fit.
    """
    if num_blocks is None:
        num_blocks = num_kv_blocks(config, model.max_model_len, model.cache_bytes_per_token())
    if paged is None:
        paged = runner.serves_paged(model)
    prepare_kernels(model, config, pool.dtype, paged)
    return Runner(model, config, pool, num_blocks, paged=paged)
