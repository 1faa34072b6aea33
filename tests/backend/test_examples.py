"""The example adapters in the repository, and the generator of synthetic ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft", reason="peft is the judge of the adapters here; it comes with manylora[dev]")

from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from examples import make_adapters, prepare_base_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TRAINED = ("haiku", "json", "pirate")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def tiny_config() -> LlamaConfig:
    """Two layers, grouped heads, an output embedding of its own."""
    return LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )


@pytest.fixture
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config())


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=torch.arange(12).unsqueeze(0)).logits
    return result


def delta_sizes(directory: Path) -> dict[str, float]:
    """The size of each linear's added output for inputs of size 1, as PEFT scales it."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    sizes = {}
    for name, a_RK in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            b_NR = tensors[f"{module}.lora_B.weight"]
            rank = a_RK.shape[0]
            alpha = config["alpha_pattern"].get(module.rsplit(".", 1)[-1], config["lora_alpha"])
            scaling = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
            # Entries of B A x for white x have variance |B A|_F^2 / N.
            sizes[module] = scaling * (b_NR @ a_RK).norm().item() / math.sqrt(b_NR.shape[0])
    return sizes


@pytest.mark.parametrize("name", TRAINED)
def test_trained_adapter_is_small_whole_and_names_no_machine(name: str) -> None:
    directory = EXAMPLES / "adapters" / name
    assert sorted(p.name for p in directory.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    weights = directory / "adapter_model.safetensors"
    assert weights.stat().st_size <= 5_000_000
    tensors = load_file(weights)
    assert {t.dtype for t in tensors.values()} <= {torch.float16, torch.bfloat16}
    assert all(t.isfinite().all() for t in tensors.values())
    pairs = {key.replace(".lora_B.", ".lora_A.") for key in tensors}
    assert len(tensors) == 2 * len(pairs)
    text = (directory / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == "SmolLM2-135M-Instruct"
    assert not any(f'"{mark}' in text for mark in ("/", "\\", "~", "file:"))


@pytest.mark.parametrize("name", TRAINED)
def test_data_is_well_formed_and_has_no_doubles(name: str) -> None:
    lines = (EXAMPLES / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(row.keys() == {"prompt", "completion"} and row["completion"].strip() for row in rows)
    assert len({row["prompt"] for row in rows}) == len(rows) >= 60


def test_json_data_answers_in_json_and_haiku_data_in_three_lines() -> None:
    def completions(name: str) -> list[str]:
        lines = (EXAMPLES / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["completion"] for line in lines]

    assert all(list(json.loads(text)) == ["answer", "topic"] for text in completions("json"))
    assert all(text.count("\n") == 2 for text in completions("haiku"))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"rank": 8}, id="all-linear"),
        pytest.param({"rank": 1, "alpha": 16}, id="rank-1"),
        pytest.param({"rank": 5, "use_rslora": True, "target_modules": ATTENTION}, id="rslora-attention"),
        pytest.param(
            {"rank": 8, "rank_pattern": {"o_proj": 3}, "alpha_pattern": {"up_proj": 4}}, id="patterns"
        ),
        pytest.param({"rank": 4, "layers_to_transform": [1]}, id="one-layer"),
        pytest.param({"rank": 4, "target_modules": r".*\.mlp\.(up|down)_proj"}, id="expression"),
        pytest.param({"rank": 4, "dtype": "bfloat16"}, id="bfloat16"),
    ],
)
def test_peft_loads_every_tensor_and_the_output_changes(
    options: dict[str, Any], base: LlamaForCausalLM, tmp_path: Path
) -> None:
    plain = logits(base)
    directory = make_adapters.make_adapter(tmp_path / "one", tiny_config(), seed=3, **options)
    model = PeftModel.from_pretrained(base, str(directory))
    # A tensor that PEFT could not place, or a LoRA layer that got none, would show here.
    loaded = {
        name.replace(".default.", "."): value for name, value in model.named_parameters() if ".lora_" in name
    }
    written = load_file(directory / "adapter_model.safetensors")
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], written[name].float()) for name in written)
    changed = logits(model)
    assert changed.isfinite().all()
    assert (changed - plain).abs().max() > 1e-3 * plain.abs().max()


def test_same_seed_gives_same_bytes_and_another_seed_other_ones(tmp_path: Path) -> None:
    def files(name: str, seed: int) -> list[bytes]:
        directory = make_adapters.make_adapter(tmp_path / name, tiny_config(), rank=8, seed=seed)
        return [path.read_bytes() for path in sorted(directory.iterdir())]

    config, weights = files("a", 3)
    assert files("b", 3) == [config, weights]
    assert files("c", 4) != [config, weights]


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_strength_does_not_depend_on_rank_or_alpha(rank: int, use_rslora: bool, tmp_path: Path) -> None:
    directory = make_adapters.make_adapter(
        tmp_path / "one",
        tiny_config(),
        rank=rank,
        seed=0,
        alpha=3,
        alpha_pattern={"v_proj": 7},
        use_rslora=use_rslora,
        strength=0.5,
    )
    # Rank 1 on 24 outputs scatters by about a fifth; the mean over the 14 linears much less.
    sizes = delta_sizes(directory)
    assert len(sizes) == 14
    assert sum(sizes.values()) / len(sizes) == pytest.approx(0.5, rel=0.2)
    assert all(0.2 < size < 1.0 for size in sizes.values())


def test_generator_says_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'x_proj'.*choose none of the model's 14 linears.*down_proj"):
        make_adapters.make_adapter(tmp_path, tiny_config(), rank=8, seed=0, target_modules=["x_proj"])
    with pytest.raises(ValueError, match="must be 1 or more"):
        make_adapters.make_adapter(tmp_path, tiny_config(), rank=0, seed=0)
    with pytest.raises(ValueError, match="'int8' is not one of float32"):
        make_adapters.make_adapter(tmp_path, tiny_config(), rank=8, seed=0, dtype="int8")
    assert list(tmp_path.iterdir()) == []


def test_command_line_makes_many_ranks_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base_dir = tmp_path / "base"
    tiny_config().save_pretrained(base_dir)
    out = tmp_path / "out"
    make_adapters.main(
        ["--count", "3", "--ranks", "2,5", "--base-model", str(base_dir), "--out", str(out), "--prefix", "a"]
    )
    configs = [json.loads((out / f"a00{i}" / "adapter_config.json").read_text()) for i in range(3)]
    assert [config["r"] for config in configs] == [2, 5, 2]
    assert "3/3 adapters" in capsys.readouterr().out


def test_finished_base_model_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in prepare_base_model.FILES:
        (tmp_path / name).write_text(name)
    prepare_base_model.main(["--out", str(tmp_path), "--gguf", str(tmp_path / "absent.gguf")])
    assert "is there already" in capsys.readouterr().out
    assert all((tmp_path / name).read_text() == name for name in prepare_base_model.FILES)


def test_unfinished_directory_is_neither_used_nor_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        prepare_base_model.main(["--out", str(out), "--gguf", str(gguf)])
    assert stopped.value.code == 1
    assert "is no complete base model" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["config.json"]
