"""Device pools as tests make them."""

from __future__ import annotations

import torch
from manylora.adapters.device_pool import DevicePool
from manylora.adapters.pool_tensors import PoolTensors
from manylora.model.spec import ModelSpec


def make_pool(
    spec: ModelSpec,
    max_loras: int,
    max_lora_rank: int,
    dtype: torch.dtype,
    device: torch.device,
    staged: bool | None = None,
) -> DevicePool:
    """A pool with its tensors."""
    tensors = PoolTensors(spec, max_loras, max_lora_rank, dtype, device, staged)
    return DevicePool(spec.kinds, max_loras, max_lora_rank, tensors)
