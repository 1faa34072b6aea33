"""Where the time of a decode step goes: 32 sequences over 8 adapters, by operator and by part.

    python bench/profile_step.py

The parts are measured with torch's profiler on the engine's own thread, over decode steps of a running batch.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from manylora import Engine, EngineConfig
from manylora.engine import runner, sampler
from manylora.engine.batch import Batch, BatchBuilder
from manylora.model import attention, lora_layers
from torch.profiler import ProfilerActivity, profile, record_function

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from make_adapters import make_adapter  # noqa: E402  # lies in examples/, which is no package


def named(name: str, function: Callable[..., object]) -> Callable[..., object]:
    """The function, seen by the profiler as one part."""

    def wrapped(*args: object, **kwargs: object) -> object:
        with record_function(name):
            return function(*args, **kwargs)

    return wrapped


def name_parts() -> None:
    """Give the parts of a step their names before the engine is built."""
    BatchBuilder.build = named("part: build tensors", BatchBuilder.build)  # type: ignore[method-assign]
    sampler.sample = named("part: sample", sampler.sample)  # type: ignore[assignment]
    lora_layers.add_lora = named("part: LoRA", lora_layers.add_lora)  # type: ignore[assignment]
    attention._attend = named("part: attend", attention._attend)  # type: ignore[assignment]
    make_product = lora_layers.make_product
    lora_layers.make_product = lambda *args: named("part: base linears", make_product(*args))  # type: ignore


class ProfiledSteps:
    """Profiles `count` full decode steps, after `skip` of them."""

    def __init__(
        self, run: Callable[[runner.Runner, Batch], None], num_seqs: int, skip: int, count: int
    ) -> None:
        self.run = run
        self.num_seqs = num_seqs
        self.skip = skip
        self.count = count
        self.seen = 0
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def __call__(self, batch: Batch) -> None:
        full = batch.num_tokens == len(batch.items) == self.num_seqs
        self.seen += full
        if full and self.seen == self.skip:
            self.profiler.start()
        with record_function("step"):
            self.run(batch)  # type: ignore[call-arg]  # bound
        if full and self.seen == self.skip + self.count - 1:
            self.profiler.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-model", type=Path, default=ROOT / ".build" / "base_model")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16)
    args = parser.parse_args()
    name_parts()
    with tempfile.TemporaryDirectory() as folder:
        names = [f"synthetic-{i}" for i in range(args.adapters)]
        for seed, name in enumerate(names):
            make_adapter(Path(folder) / name, args.base_model, rank=args.rank, seed=seed)
        config = EngineConfig(
            base_model=str(args.base_model),
            adapter_root=folder,
            max_loras=max(1, args.adapters),
            enable_prefix_caching=False,
        )
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(100, 40000, (args.requests, 64), generator=generator).tolist()
        adapters = [names[i % len(names)] if names else "" for i in range(args.requests)]
        with Engine(config) as engine:
            steps = ProfiledSteps(engine.runner.run, args.requests, skip=8, count=args.steps)
            # Memory that is touched for the first time costs more than it ever will again.
            engine.generate(prompts, adapter_ids=adapters, max_tokens=32 + args.steps, ignore_eos=True)
            engine.runner.run = steps  # type: ignore[assignment, method-assign]
            engine.generate(prompts, adapter_ids=adapters, max_tokens=16 + args.steps, ignore_eos=True)
    report(steps.profiler, args.steps)


def report(profiler: profile, num_steps: int) -> None:
    rows = profiler.key_averages()
    total = next(row.cpu_time_total for row in rows if row.key == "step")
    print(f"one step: {total / num_steps / 1000:.1f} ms (with the profiler's own cost)\n")
    print(f"{'part':<28}{'ms':>8}{'share':>8}{'calls':>8}")
    parts = sorted((row for row in rows if row.key.startswith("part: ")), key=lambda row: -row.cpu_time_total)
    rest = total
    for row in parts:
        spent = row.cpu_time_total
        rest -= spent
        name = row.key.removeprefix("part: ")
        print(f"{name:<28}{spent / num_steps / 1000:>8.2f}{spent / total:>8.1%}{row.count // num_steps:>8}")
    print(f"{'the rest (norms, rotary, ...)':<28}{rest / num_steps / 1000:>7.2f}{rest / total:>8.1%}\n")
    print(f"{'operator, itself':<40}{'ms':>8}{'share':>8}{'calls':>8}")
    for row in sorted(rows, key=lambda row: -row.self_cpu_time_total)[:15]:
        spent, calls = row.self_cpu_time_total, row.count // num_steps
        print(f"{row.key[:39]:<40}{spent / num_steps / 1000:>8.2f}{spent / total:>8.1%}{calls:>8}")


if __name__ == "__main__":
    main()
