"""Tiny base models, adapters that PEFT makes for them, and hand-made ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora.model.spec import LinearSpec, ModelSpec, SiteKind
from safetensors.torch import save
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

LLAMA_SITES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
PHI_SITES = (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",))

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def make_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def make_phi() -> PreTrainedModel:
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**SIZES)).eval()


def spec_of(model: PreTrainedModel, sites: tuple[tuple[str, ...], ...]) -> ModelSpec:
    """The spec of a model whose decoder layers are `model.layers.N`."""
    num_layers = model.config.num_hidden_layers
    kinds, linears = [], {}
    for index, names in enumerate(sites):
        shapes = [tuple(model.get_submodule(f"model.layers.0.{name}").weight.shape) for name in names]
        out_features = tuple(n for n, _ in shapes)
        k = shapes[0][1]
        kinds.append(
            SiteKind(name="+".join(names), num_layers=num_layers, in_features=k, out_features=out_features)
        )
        for layer in range(num_layers):
            for part, name in enumerate(names):
                path = f"model.layers.{layer}.{name}"
                linears[path] = LinearSpec(
                    path=path,
                    kind=index,
                    row=layer,
                    slice=part,
                    layer=layer,
                    in_features=k,
                    out_features=out_features[part],
                )
    others = {name.rpartition(".")[0] for name, _ in model.named_parameters()} - set(linears)
    others |= {"lm_head"}
    return ModelSpec(kinds=tuple(kinds), linears=linears, other_modules=frozenset(others))


@pytest.fixture(scope="session")
def llama_spec() -> ModelSpec:
    return spec_of(make_llama(), LLAMA_SITES)


CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "o_proj"],
    "bias": "none",
}


def make_tensors(
    spec: ModelSpec, names: tuple[str, ...] = ("q_proj", "o_proj"), rank: int = 4, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random A and B for every linear whose last name is among `names`, as PEFT names them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, linear in spec.linears.items():
        if path.rpartition(".")[2] in names:
            prefix = f"base_model.model.{path}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, linear.in_features, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(linear.out_features, rank, generator=generator)
    return tensors


Write = Callable[..., Path]


def write_adapter(
    directory: Path, tensors: Mapping[str, torch.Tensor] | bytes, config: Mapping[str, Any] | bytes
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (directory / "adapter_config.json").write_bytes(text)
    data = tensors if isinstance(tensors, bytes) else save(dict(tensors))
    (directory / "adapter_model.safetensors").write_bytes(data)
    return directory


@pytest.fixture
def write(tmp_path: Path, llama_spec: ModelSpec) -> Write:
    """Write an adapter: by default a sound one for q_proj and o_proj."""

    def write_one(
        tensors: Mapping[str, torch.Tensor] | bytes | None = None,
        config: Mapping[str, Any] | bytes | None = None,
        name: str = "adapter",
        **changes: Any,
    ) -> Path:
        written = make_tensors(llama_spec) if tensors is None else tensors
        if config is None:
            config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not Ellipsis}
        return write_adapter(tmp_path / name, written, config)

    return write_one
