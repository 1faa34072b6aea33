"""The in-process engine beside PEFT's mixed batch: same model, same adapters, same prompts, same run.

W1: 32 requests at once, 64 prompt and 64 output tokens, greedy, over 8 adapters of rank 16 on all linears.
W2: the same on the base model. Tokens are compared before anything is timed; runs alternate.

    python bench/engine_vs_peft.py --rounds 5
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from manylora import Engine, EngineConfig
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from make_adapters import make_adapter  # noqa: E402  # lies in examples/, which is no package

Tokens = list[list[int]]

COLUMNS = ["date", "commit", "device", "threads", "torch", "transformers", "peft", "requests", "adapters"]
COLUMNS += ["rank", "prompt", "output", "run", "median_tok_s", "min_tok_s", "max_tok_s", "rounds"]


def peft_model(base: Path, adapter_root: Path, names: list[str]) -> torch.nn.Module:
    """The base model with all adapters in memory."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(model, adapter_root / names[0], adapter_name=names[0])
    for name in names[1:]:
        wrapped.load_adapter(adapter_root / name, adapter_name=name)
    return wrapped.eval()


def run_peft(model: torch.nn.Module, prompts: Tokens, adapters: list[str], num_tokens: int) -> Tokens:
    inputs = torch.tensor(prompts)
    with torch.inference_mode():
        out = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            adapter_names=[name or "__base__" for name in adapters],
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
        )
    return [row[inputs.shape[1] :].tolist() for row in out]


def run_engine(engine: Engine, prompts: Tokens, adapters: list[str], num_tokens: int) -> Tokens:
    found = engine.generate(prompts, adapter_ids=adapters, max_tokens=num_tokens, min_tokens=num_tokens)
    return [completion.token_ids for completion in found]


def first_differences(found: Tokens, wanted: Tokens) -> int:
    """How many sequences differ anywhere."""
    return sum(a != b for a, b in zip(found, wanted, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-model", type=Path, default=ROOT / ".build" / "base_model")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=ROOT / "bench" / "results" / "engine_vs_peft.csv")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = [f"synthetic-{i}" for i in range(args.adapters)]
        for seed, name in enumerate(names):
            make_adapter(root / name, args.base_model, rank=args.rank, seed=seed)
        measure(args, root, names)


def measure(args: argparse.Namespace, root: Path, names: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    vocab = 40000
    prompts = torch.randint(100, vocab, (args.requests, args.prompt_tokens), generator=generator).tolist()
    mixed = [names[i % len(names)] for i in range(args.requests)]
    base = [""] * args.requests
    config = EngineConfig(
        base_model=str(args.base_model),
        adapter_root=str(root),
        max_loras=len(names),
        max_lora_rank=max(16, args.rank),
        # Reused prefixes would spare the engine work that its peer does.
        enable_prefix_caching=False,
    )
    peer = peft_model(args.base_model, root, names)
    with Engine(config) as engine:
        runs: dict[str, Callable[[], Tokens]] = {
            "W1 engine": lambda: run_engine(engine, prompts, mixed, args.output_tokens),
            "W1 PEFT": lambda: run_peft(peer, prompts, mixed, args.output_tokens),
            "W2 engine": lambda: run_engine(engine, prompts, base, args.output_tokens),
            "W2 PEFT": lambda: run_peft(peer, prompts, base, args.output_tokens),
        }
        results = {name: run() for name, run in runs.items()}
        for work in ("W1", "W2"):
            differing = first_differences(results[f"{work} engine"], results[f"{work} PEFT"])
            print(f"{work}: {differing} of {args.requests} sequences differ from PEFT")
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    report(args, seconds)


def report(args: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    total = args.requests * args.output_tokens
    rates = {name: [total / s for s in values] for name, values in seconds.items()}
    print(f"\n{'run':<12}{'tokens/s':>10}{'least':>9}{'most':>9}   ({args.rounds} rounds, in turn)")
    for name, values in rates.items():
        print(f"{name:<12}{statistics.median(values):>10.1f}{min(values):>9.1f}{max(values):>9.1f}")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\nW1 engine / W1 PEFT  {medians['W1 engine'] / medians['W1 PEFT']:.2f}")
    print(f"W2 engine / W2 PEFT  {medians['W2 engine'] / medians['W2 PEFT']:.2f}")
    print(f"W1 engine / W2 engine  {medians['W1 engine'] / medians['W2 engine']:.2f}")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    is_new = not args.csv.exists()
    with args.csv.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        for name, values in rates.items():
            row = [datetime.date.today().isoformat(), commit, f"{platform.machine()} cpu"]
            row += [torch.get_num_threads(), torch.__version__, transformers.__version__, peft.__version__]
            row += [args.requests, args.adapters, args.rank, args.prompt_tokens, args.output_tokens, name]
            row += [f"{f(values):.1f}" for f in (statistics.median, min, max)]
            writer.writerow([*row, args.rounds])


if __name__ == "__main__":
    main()
