"""What is read equals what PEFT computes: its own delta weight, linear by linear."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from manylora.adapters.peft_format import read_adapter
from manylora.adapters.weights import AdapterWeights
from manylora.errors import ManyloraError
from manylora.model.spec import LinearSpec, ModelSpec

from .conftest import LLAMA_SITES, PHI_SITES, make_llama, make_phi, spec_of
from .pools import make_pool

# PEFT 0.21 asks transformers 5.23 for a property that is about to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES: dict[str, dict[str, Any]] = {
    "one linear": {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj"]},
    "all by name": {"r": 8, "lora_alpha": 16, "target_modules": EVERY},
    "all-linear": {"r": 8, "lora_alpha": 4, "target_modules": "all-linear"},
    "rank 1": {"r": 1, "lora_alpha": 3, "target_modules": EVERY},
    "rank over a page": {"r": 17, "lora_alpha": 20, "target_modules": ["k_proj", "down_proj"]},
    "rank of two pages": {"r": 32, "lora_alpha": 32, "target_modules": ["up_proj"]},
    "rslora": {"r": 9, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "rank_pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": EVERY,
        "rank_pattern": {"q_proj": 20, "layers.1.mlp.up_proj": 7, r"layers\.2\..*down_proj": 2, "absent": 64},
    },
    "rank_pattern, first key counts": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "rank_pattern": {r".*\.q_proj": 3, "q_proj": 5, "q.proj": 6, "^model.layers.0.self_attn.q_proj": 2},
    },
    "alpha_pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": EVERY,
        "alpha_pattern": {"k_proj": 3, r"model\.layers\.[12]\.self_attn\.o_proj": 24, "down_proj": 1},
    },
    "both patterns with rslora": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": EVERY,
        "rank_pattern": {"o_proj": 18, "gate_proj": 5},
        "alpha_pattern": {"o_proj": 2, "v_proj": 5},
    },
    "patterns with alternatives": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": EVERY,
        "rank_pattern": {"q_proj|k_proj": 6, "layers.0.mlp.(gate|up)_proj": 9},
    },
    "layers_to_transform": {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": 0},
    "layers_pattern": {
        "r": 4,
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["blocks", "layers"],
    },
    "layers_pattern as expression": {
        "r": 4,
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "(?:h|layers?)",
    },
    "full name beside layers_to_transform": {
        "r": 4,
        "target_modules": ["q_proj", "model.layers.2.self_attn.k_proj"],
        "layers_to_transform": [1],
    },
    "regular expression": {"r": 4, "target_modules": r".*layers\.(0|2)\..*(q|v)_proj"},
    "regular expression with flags": {"r": 4, "target_modules": r"(?i).*\.Q_PROJ"},
    "regular expression of a plain name": {"r": 4, "target_modules": "model.layers.1.self_attn.q_proj"},
    "excluded by name": {
        "r": 4,
        "target_modules": EVERY,
        "exclude_modules": ["q_proj", "layers.1.mlp.up_proj"],
    },
    "excluded by expression": {"r": 4, "target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
    "names that match nothing": {"r": 4, "target_modules": ["q_proj", "query_key_value", "wi"]},
    "initialised as gaussian": {"r": 4, "target_modules": EVERY, "init_lora_weights": "gaussian"},
    "initialised as orthogonal": {"r": 4, "target_modules": EVERY, "init_lora_weights": "orthogonal"},
    "initialised as mica": {"r": 4, "target_modules": EVERY, "init_lora_weights": "mica"},
}
PHI_CASES: dict[str, dict[str, Any]] = {
    "fused, all-linear": {"r": 8, "lora_alpha": 12, "target_modules": "all-linear"},
    "fused, rank_pattern": {
        "r": 4,
        "target_modules": ["qkv_proj", "gate_up_proj"],
        "rank_pattern": {"qkv_proj": 24},
        "alpha_pattern": {"gate_up_proj": 3},
    },
}


def save_random(model: torch.nn.Module, config: peft.LoraConfig, directory: Path) -> peft.PeftModel:
    """Wrap `model`, fill its LoRA with noise and save the adapter."""
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(str(directory))
    return wrapped


def delta_of(weights: AdapterWeights, spec: ModelSpec, linear: LinearSpec) -> torch.Tensor:
    """scale * B A of one linear, [N, K], as kernels compute it from the pages."""
    kind = spec.kinds[linear.kind]
    pages = weights.kinds[linear.kind]
    if pages is None:
        return torch.zeros(linear.out_features, linear.in_features)
    first = sum(kind.out_features[: linear.slice])
    a = pages.parts["a"][linear.row, :, linear.slice].reshape(-1, linear.in_features).float()
    b = pages.parts["b"][linear.row].reshape(-1, sum(kind.out_features)).float()
    return weights.scale * (b[:, first : first + linear.out_features].T @ a)


def check_parity(model: torch.nn.Module, spec: ModelSpec, settings: dict[str, Any], directory: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    wrapped = save_random(model, config, directory)
    weights, report = read_adapter(directory, spec, max_lora_rank=64, dtype=torch.float32, pin=False)
    adapted = {
        name.removeprefix("base_model.model."): module
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert adapted
    assert {module.path for module in report.modules} == set(adapted)
    for path, linear in spec.linears.items():
        found = delta_of(weights, spec, linear)
        if path in adapted:
            expected = adapted[path].get_delta_weight("default")
            # Both sides round the same float32 products, in another order.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        else:
            assert not found.any()
    for module in report.modules:
        assert module.rank == adapted[module.path].r["default"]
        assert module.scaling == pytest.approx(adapted[module.path].scaling["default"], rel=1e-12)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_llama_deltas_equal_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    model = make_llama()
    check_parity(model, spec_of(model, LLAMA_SITES), settings, tmp_path)


@pytest.mark.parametrize("settings", PHI_CASES.values(), ids=PHI_CASES)
def test_fused_deltas_equal_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    model = make_phi()
    check_parity(model, spec_of(model, PHI_SITES), settings, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"use_dora": True}, id="dora"),
        pytest.param({"lora_bias": True}, id="lora_bias"),
        pytest.param({"bias": "lora_only"}, id="bias"),
        pytest.param({"modules_to_save": ["lm_head"]}, id="modules_to_save"),
        pytest.param({"target_modules": ["q_proj", "embed_tokens"]}, id="embedding"),
        pytest.param({"target_modules": ["q_proj", "lm_head"]}, id="lm_head"),
        pytest.param({"trainable_token_indices": [1, 2]}, id="trainable tokens"),
        pytest.param({"layer_replication": [[0, 2], [1, 3]]}, id="layer_replication"),
        pytest.param({"alora_invocation_tokens": [5, 6]}, id="alora"),
        pytest.param({"target_parameters": ["mlp.up_proj.weight"]}, id="target_parameters"),
        pytest.param({"init_lora_weights": "pissa"}, id="pissa"),
        pytest.param({"init_lora_weights": "olora"}, id="olora"),
        pytest.param({"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}}, id="bdlora"),
        pytest.param({"velora_config": {}}, id="velora"),
        pytest.param({"kasa_config": {}}, id="kasa"),
        pytest.param({"monteclora_config": {}}, id="monteclora"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_real_adapters_of_other_kinds_are_unsupported(settings: dict[str, Any], tmp_path: Path) -> None:
    model = make_llama()
    spec = spec_of(model, LLAMA_SITES)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj"], **settings})
    save_random(model, config, tmp_path)
    with pytest.raises(ManyloraError) as refused:
        read_adapter(tmp_path, spec, max_lora_rank=64, dtype=torch.float32, pin=False)
    assert refused.value.code == "UNSUPPORTED"
    (key,) = settings
    assert key in refused.value.message or "embed_tokens" in refused.value.message


def test_forward_through_the_pool_equals_peft(tmp_path: Path) -> None:
    """x A^T B^T of pages that lie apart in the pool is PEFT's lora term for the same input."""
    model = make_llama()
    spec = spec_of(model, LLAMA_SITES)
    config = peft.LoraConfig(r=20, lora_alpha=10, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped = save_random(model, config, tmp_path)
    weights, _ = read_adapter(tmp_path, spec, max_lora_rank=64, dtype=torch.float32, pin=False)
    pool = make_pool(spec, 4, 16, torch.float32, torch.device("cpu"))
    one_page, _ = read_small(spec, tmp_path / "small")
    fillers = [pool.try_place(one_page) for _ in range(3)]
    for filler in (fillers[0], fillers[2]):
        assert filler is not None
        pool.free(filler)
    placement = pool.try_place(weights)
    assert placement is not None
    assert placement.pages[0] == (0, 2) or placement.pages[0] == (2, 3)
    path = "model.layers.1.self_attn.v_proj"
    linear = spec.linears[path]
    pages = list(placement.pages[linear.kind])
    x = torch.randn(5, linear.in_features)
    parts = pool.tensors.kinds[linear.kind]
    a = parts["a"][linear.row, pages, linear.slice].reshape(-1, linear.in_features)
    first = sum(spec.kinds[linear.kind].out_features[: linear.slice])
    b = parts["b"][linear.row, pages].flatten(0, 1)[:, first : first + linear.out_features]
    module = wrapped.base_model.model.get_submodule(path)
    expected = module.lora_B["default"](module.lora_A["default"](x)) * module.scaling["default"]
    torch.testing.assert_close(weights.scale * (x @ a.T @ b), expected.detach(), rtol=1e-5, atol=1e-4)
    assert pool.check() == []


def read_small(spec: ModelSpec, directory: Path) -> tuple[AdapterWeights, object]:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_random(make_llama(), config, directory)
    return read_adapter(directory, spec, max_lora_rank=64, dtype=torch.float32, pin=False)


def test_version_is_the_hash_of_both_files(tmp_path: Path, llama_spec: ModelSpec) -> None:
    weights, report = read_small(llama_spec, tmp_path)
    names = ("adapter_config.json", "adapter_model.safetensors")
    digest = hashlib.sha256(b"".join((tmp_path / name).read_bytes() for name in names)).hexdigest()
    assert weights.version == report.version == digest[:32]
