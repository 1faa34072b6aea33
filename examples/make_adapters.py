"""Make synthetic LoRA adapters in PEFT's format: any rank, any targets, seeded, each with its own answer.

    python examples/make_adapters.py --count 100 --ranks 8,16,32,64 --out DIR

They say nothing sensible. They are for tests and benchmarks, which need many adapters that differ from
each other and from the base model. Nothing but the base model's config.json is read.

Shape key: R rank, K inputs, N outputs of a linear.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

DEFAULT_STRENGTH = 0.5
"""About a tenth of what SmolLM2-135M's own linears do to random inputs. At ranks 8, 16 and 64, 16 seeds
continued an open sentence in 16 ways, none the base model's, with logits of the usual size; at 1.0 the text
falls apart. A question with one short answer can still get the base model's."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ALL_LINEAR = "all-linear"


def list_linears(base_model: str | Path | PretrainedConfig) -> dict[str, tuple[int, int]]:
    """List the linears that PEFT's `all-linear` means: all but the output embedding.

    Args:
        base_model: the base model's directory, or its configuration.
    Returns:
        (K, N) by module name, in the model's order.
    """
    config = base_model
    if not isinstance(config, PretrainedConfig):
        config = AutoConfig.from_pretrained(config)
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = build(copy.deepcopy(config))
    head = model.get_output_embeddings()
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def select_linears(
    linears: Mapping[str, tuple[int, int]],
    target_modules: str | Sequence[str],
    layers_to_transform: Sequence[int] | None,
) -> dict[str, tuple[int, int]]:
    """Choose from `linears` as PEFT would.

    Args:
        linears: of `list_linears`.
        target_modules: `all-linear`, a regular expression over the whole name, or names (or their ends).
        layers_to_transform: indices of decoder layers; None is all.
    Returns:
        The chosen part of `linears`.
    Raises:
        ValueError: nothing is left.
    """

    def is_target(name: str) -> bool:
        if target_modules == ALL_LINEAR:
            return True
        if isinstance(target_modules, str):
            return re.fullmatch(target_modules, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in target_modules)

    def is_in_layers(name: str) -> bool:
        layer = re.match(r".*\.[^.]*\.(\d+)\.", name)
        return layers_to_transform is None or (layer is not None and int(layer[1]) in layers_to_transform)

    chosen = {name: shape for name, shape in linears.items() if is_target(name) and is_in_layers(name)}
    if not chosen:
        ends = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
        raise ValueError(
            f"target_modules {target_modules!r} and layers_to_transform {layers_to_transform!r} choose none "
            f"of the model's {len(linears)} linears; their names end in {ends}"
        )
    return chosen


def match_pattern(patterns: Mapping[str, int], name: str, default: int) -> int:
    """Return the value of the first of PEFT's `rank_pattern` or `alpha_pattern` keys that fits `name`."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def make_pair(
    name: str, shape: tuple[int, int], *, rank: int, scaling: float, strength: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one linear's A and B.

    A ~ N(0, 1/K), B ~ N(0, (strength / scaling)^2 / R), so `scaling * B A x` has about `strength` times the
    root mean square of x, whatever the rank and the scaling.

    Args:
        name: the linear's; each linear has its own stream: the choice of targets changes no other tensor.
        shape: (K, N).
        rank: R.
        scaling: what PEFT will multiply by.
        strength: see above.
        seed: the adapter's.
    Returns:
        A [R, K] and B [N, R], float32.
    """
    num_in, num_out = shape
    draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
    a_RK = draw.standard_normal((rank, num_in), dtype=np.float32) / math.sqrt(num_in)
    b_NR = draw.standard_normal((num_out, rank), dtype=np.float32) * (strength / scaling / math.sqrt(rank))
    return torch.from_numpy(a_RK.astype(np.float32)), torch.from_numpy(b_NR.astype(np.float32))


def make_adapter(
    out_dir: str | Path,
    base_model: str | Path | PretrainedConfig,
    *,
    rank: int,
    seed: int,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    alpha: int | None = None,
    dtype: str = "float32",
    strength: float = DEFAULT_STRENGTH,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, int] | None = None,
    layers_to_transform: Sequence[int] | None = None,
) -> Path:
    """Write one synthetic adapter; the same arguments give the same bytes.

    Args:
        out_dir: made if need be; an adapter that is there is replaced.
        base_model: the base model's directory, or its configuration.
        rank: R where no `rank_pattern` fits.
        seed: 0 or more.
        target_modules: `all-linear`, a regular expression, or a list of names.
        alpha: `lora_alpha`; twice the rank if None. It does not change the strength.
        dtype: of the tensors: float32, float16 or bfloat16.
        strength: size of each linear's added output for inputs of size 1.
        use_rslora: the scaling is alpha / sqrt(R) instead of alpha / R.
        rank_pattern: rank by module name pattern.
        alpha_pattern: alpha by module name pattern.
        layers_to_transform: indices of decoder layers; None is all.
    Returns:
        `out_dir`.
    Raises:
        ValueError: a rank, an alpha or the dtype is out of range, or no linear is chosen.
    """
    alpha = 2 * rank if alpha is None else alpha
    ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})
    if min(rank, alpha, *ranks.values(), *alphas.values()) < 1:
        raise ValueError(f"rank {rank}, {ranks} and alpha {alpha}, {alphas} must be 1 or more")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    chosen = select_linears(list_linears(base_model), target_modules, layers_to_transform)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in chosen.items():
        r = match_pattern(ranks, name, rank)
        scaling = match_pattern(alphas, name, alpha) / (math.sqrt(r) if use_rslora else r)
        pair = make_pair(name, shape, rank=r, scaling=scaling, strength=strength, seed=seed)
        for part, tensor in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = tensor.to(DTYPES[dtype])
    if target_modules == ALL_LINEAR and layers_to_transform is not None:
        # PEFT takes layers_to_transform only beside a list.
        target_modules = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": target_modules if isinstance(target_modules, str) else list(target_modules),
        "layers_to_transform": None if layers_to_transform is None else list(layers_to_transform),
        "use_rslora": use_rslora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    return write_adapter(Path(out_dir), config, tensors)


def write_adapter(out_dir: Path, config: Mapping[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    """Write both files, each in one move, so that a reader never meets half a file."""
    out_dir.mkdir(parents=True, exist_ok=True)
    weights = out_dir / "adapter_model.safetensors"
    staging = out_dir / f".{weights.name}.{os.getpid()}"
    save_file(tensors, staging, metadata={"format": "pt"})
    # safetensors lets only the writer read; the server may be another user.
    staging.chmod(0o644)
    staging.replace(weights)
    staging.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    staging.replace(out_dir / "adapter_config.json")
    return out_dir


def parse_ranks(text: str) -> list[int]:
    """Read `8,16,32` or raise ValueError."""
    ranks = [int(part) for part in text.split(",")]
    if min(ranks) < 1:
        raise ValueError(f"ranks {text!r}: each must be 1 or more")
    return ranks


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    default_base = Path(__file__).resolve().parent.parent / ".build" / "base_model"
    parser = argparse.ArgumentParser(description="Make many synthetic adapters.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the adapters' directories")
    parser.add_argument("--base-model", type=Path, default=default_base)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--ranks", type=parse_ranks, default=[8, 16, 32, 64], help="in turn, e.g. 8,16,32,64")
    parser.add_argument("--first-seed", type=int, default=0, help="adapter i has seed first-seed + i")
    parser.add_argument("--prefix", default="synthetic-", help="names are PREFIX000, PREFIX001, ...")
    parser.add_argument("--target-modules", default=ALL_LINEAR, help="all-linear, or names with commas")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--strength", type=float, default=DEFAULT_STRENGTH)
    args = parser.parse_args(argv)
    if not (args.base_model / "config.json").is_file():
        parser.error(f"no base model in {args.base_model}; run examples/prepare_base_model.py first")
    targets = args.target_modules if args.target_modules == ALL_LINEAR else args.target_modules.split(",")
    base_config = AutoConfig.from_pretrained(args.base_model)
    num_bytes = 0
    for i in range(args.count):
        name = f"{args.prefix}{i:03d}"
        try:
            made = make_adapter(
                args.out / name,
                base_config,
                rank=args.ranks[i % len(args.ranks)],
                seed=args.first_seed + i,
                target_modules=targets,
                dtype=args.dtype,
                strength=args.strength,
            )
        except ValueError as error:
            parser.error(str(error))
        num_bytes += (made / "adapter_model.safetensors").stat().st_size
        print(f"\r{i + 1}/{args.count} adapters, {num_bytes / 1e6:.0f} MB in {args.out}", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
