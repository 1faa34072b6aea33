"""Where the time of a decode step goes: 32 sequences over 8 adapters, by operator and by part.

    python bench/profile_step.py

The parts are measured with torch's profiler on the engine's own thread, over decode steps of a running batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from manylora import Engine, EngineConfig
from manylora.engine import sampler, steps
from manylora.engine.flight import Flight
from manylora.engine.step import Step
from manylora.engine.step_tensors import Uploader
from manylora.model import grouped_attention, lora_layers
from manylora_kernels.lora.cpu_form import CpuForm
from torch.profiler import ProfilerActivity, profile, record_function

from bench.arguments import add_base_model, add_save, make_parser
from bench.loadtest.csv_file import append_csv
from bench.loadtest.origin import Origin
from bench.paths import RESULTS
from examples.make_adapters import make_adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Origin):
    """One part of a step, as bench/results/profile.csv keeps it."""

    sequences: int
    adapters: int
    rank: int
    part: str
    ms: float
    share: str
    """Of the step, per cent."""
    calls: int


def named(name: str, function: Callable[..., object]) -> Callable[..., object]:
    """The function, seen by the profiler as one part."""

    def wrapped(*args: object, **kwargs: object) -> object:
        with record_function(name):
            return function(*args, **kwargs)

    return wrapped


def name_parts() -> None:
    """Give the parts of a step their names before the engine is built."""
    steps.build_step = named("part: build step", steps.build_step)  # type: ignore[assignment]
    Uploader.upload = named("part: upload step", Uploader.upload)  # type: ignore[method-assign]
    sampler.choose = named("part: sample", sampler.choose)  # type: ignore[assignment]
    CpuForm.add_lora = named("part: LoRA", CpuForm.add_lora)  # type: ignore[method-assign]
    grouped_attention.attend = named("part: attend", grouped_attention.attend)  # type: ignore[assignment]
    make_product = lora_layers.make_product
    lora_layers.make_product = lambda *args: named("part: base linears", make_product(*args))  # type: ignore


class ProfiledSteps:
    """Profiles `count` full decode steps, after `skip` of them."""

    def __init__(self, launch: Callable[[Step], Flight], num_seqs: int, skip: int, count: int) -> None:
        self.launch = launch
        self.num_seqs = num_seqs
        self.skip = skip
        self.count = count
        self.seen = 0
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def __call__(self, step: Step) -> Flight:
        full = step.is_decode and step.num_seqs == self.num_seqs
        self.seen += full
        if full and self.seen == self.skip:
            self.profiler.start()
        with record_function("step"):
            flight = self.launch(step)
        if full and self.seen == self.skip + self.count - 1:
            self.profiler.stop()
        return flight


def main() -> None:
    parser = make_parser(__doc__)
    add_base_model(parser)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16)
    add_save(parser, "profile", "the parts")
    args = parser.parse_args()
    origin = Origin.now("profile")
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
            steps = ProfiledSteps(engine.runner.launch, args.requests, skip=8, count=args.steps)
            # Memory that is touched for the first time costs more than it ever will again.
            engine.generate(prompts, adapter_ids=adapters, max_tokens=32 + args.steps, ignore_eos=True)
            engine.runner.launch = steps  # type: ignore[assignment, method-assign]
            engine.generate(prompts, adapter_ids=adapters, max_tokens=16 + args.steps, ignore_eos=True)
    rows = steps.profiler.key_averages()
    total_ms = next(row.cpu_time_total for row in rows if row.key == "step") / args.steps / 1000
    found = parts(rows, args.steps, total_ms)
    report(rows, found, args.steps, total_ms)
    if args.save:
        shape = {"sequences": args.requests, "adapters": args.adapters, "rank": args.rank}
        lines = [
            Row(**asdict(origin), **shape, part=name, ms=ms, share=f"{ms / total_ms:.1%}", calls=calls)
            for name, ms, calls in [("whole step", total_ms, 1), *found]
        ]
        append_csv(RESULTS / "profile.csv", lines)


def parts(rows: Any, num_steps: int, total_ms: float) -> list[tuple[str, float, int]]:
    """Name, milliseconds and calls in one step of each part, the longest first, and of the rest."""
    found = [
        (row.key.removeprefix("part: "), row.cpu_time_total / num_steps / 1000, row.count // num_steps)
        for row in rows
        if row.key.startswith("part: ")
    ]
    found.sort(key=lambda part: -part[1])
    return [*found, ("the rest (norms, rotary, ...)", total_ms - sum(ms for _, ms, _ in found), 1)]


def report(rows: Any, found: list[tuple[str, float, int]], num_steps: int, total_ms: float) -> None:
    print(f"one step: {total_ms:.1f} ms (with the profiler's own cost)\n")
    print(f"{'part':<30}{'ms':>8}{'share':>8}{'calls':>8}")
    for name, ms, calls in found:
        print(f"{name:<30}{ms:>8.2f}{ms / total_ms:>8.1%}{calls:>8}")
    print(f"\n{'operator, itself':<40}{'ms':>8}{'share':>8}{'calls':>8}")
    for row in sorted(rows, key=lambda row: -row.self_cpu_time_total)[:15]:
        ms, calls = row.self_cpu_time_total / num_steps / 1000, row.count // num_steps
        print(f"{row.key[:39]:<40}{ms:>8.2f}{ms / total_ms:>8.1%}{calls:>8}")


if __name__ == "__main__":
    main()
