"""Tiny random models of several families, with a byte-level tokenizer, as Hugging Face directories."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 300
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Wide enough that the best two logits of a random model lie well apart.
    "initializer_range": 0.3,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8, "layer_types": ALTERNATING}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 8}),
    "phi3": ("Phi3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "sliding_window": 8,
            "layer_types": ALTERNATING,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "cohere": ("CohereConfig", {}),
    "gpt2": ("GPT2Config", {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Specials 0 to 2, then one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {char: i for i, char in enumerate(alphabet, start=3)}
    vocab |= {f"<unused{i}>": i for i in range(len(vocab), VOCAB)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products on several threads spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make, once, a tiny random model's directory: `tiny_model("llama", num_hidden_layers=2)`."""
    made: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = f"{family} {sorted(changes.items())}"
        if key not in made:
            name, extra = FAMILIES[family]
            torch.manual_seed(0)
            config = getattr(transformers, name)(**COMMON | extra | changes)
            directory = tmp_path_factory.mktemp(family)
            AutoModelForCausalLM.from_config(config).save_pretrained(directory)
            byte_tokenizer().save_pretrained(directory)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Path]:
    """Let PEFT write an adapter of a base model, strong enough to change what is said:
    `make_adapter(base, directory, seed, r=8, target_modules=["q_proj"])`."""
    peft = pytest.importorskip("peft", reason="peft writes the adapters; it comes with manylora[dev]")

    def make(base: Path, directory: Path, seed: int, **options: Any) -> Path:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.3)
        wrapped.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def base(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def adapter_root(
    base: Path, make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One adapter, `a`, for tests that need just any."""
    root = tmp_path_factory.mktemp("adapters")
    make_adapter(base, root / "a", 0, r=8, target_modules=["q_proj", "down_proj"])
    return root
