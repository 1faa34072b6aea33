"""Mutated adapters in a server's `adapter_root`."""

from __future__ import annotations

from pathlib import Path

import torch

from .mutants import Mutations

_LAYERS = (0, 1)
_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "o_proj"],
    "layers_to_transform": list(_LAYERS),
    "bias": "none",
}
_WIDTH = 576
"""Of SmolLM2-135M: q_proj and o_proj are square."""


def write_mutants(adapter_root: Path, seed: int, count: int) -> dict[str, str]:
    """Write mutants of a small adapter for SmolLM2-135M.

    Returns: what was done to each, by its name: `m0000`, `m0001` and so on.
    """
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in _LAYERS:
        for module in ("q_proj", "o_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, _WIDTH, generator=draw) / _WIDTH**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(_WIDTH, 4, generator=draw) / 10
    source = Mutations(seed, _CONFIG, tensors)
    kinds = {}
    for index in range(count):
        mutant = source.mutant(index)
        mutant.write(adapter_root / f"m{index:04}")
        kinds[f"m{index:04}"] = mutant.kind
    return kinds
