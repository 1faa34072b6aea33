"""Time the CPU forms of the kernels for one step of a model, beside the base model's own matrix products.

    python bench/bench_kernels_cpu.py [--dtype float32] [--threads 2] [--repeats 9] [--save]

The shapes are SmolLM2-135M's: 30 layers of 4 sites. Each case is first checked against the reference; then
the step and the base products (`F.linear`) take turns in the same run, on inputs that differ from layer to
layer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from manylora_kernels import Mix, SitePool, add_lora, reference
from manylora_kernels.lora.cpu_form import add_lora_by_products

from bench.arguments import add_save, make_parser
from bench.loadtest.csv_file import append_csv
from bench.loadtest.environment import processor_name
from bench.loadtest.origin import Origin
from bench.paths import RESULTS

NUM_LAYERS = 30
NUM_PAGES = 32
SITES: dict[str, tuple[int, tuple[int, ...]]] = {
    "qkv": (576, (576, 192, 192)),
    "o": (576, (576,)),
    "gate_up": (576, (1536, 1536)),
    "down": (1536, (576,)),
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Sums of up to 1536 products in another order; results up to 8 rounded to the dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Origin):
    """The adapters' part of a step beside the base products, as bench/results/kernels_cpu.csv keeps it."""

    step: str
    dtype: str
    compiled_ms: float
    compiled_ms_min: float
    compiled_ms_max: float
    products_ms: float
    """The same on torch's products."""
    base_ms: float
    base_ms_min: float
    base_ms_max: float
    compiled_over_base: float
    """Round by round: median."""
    repeats: int


@dataclass(frozen=True)
class Step:
    """Rows over adapters; an adapter of n pages has rank 16 * n."""

    name: str
    slots: Sequence[int]
    num_pages: Sequence[int]
    scattered: bool
    """Whether pages lie anywhere in the pool, so that they must be gathered."""

    def pages(self) -> list[tuple[int, ...]]:
        order = np.random.default_rng(0).permutation(NUM_PAGES) if self.scattered else np.arange(NUM_PAGES)
        ends = np.cumsum(self.num_pages).tolist()
        return [
            tuple(order[end - count : end].tolist()) for end, count in zip(ends, self.num_pages, strict=True)
        ]


def steps() -> list[Step]:
    interleaved = [t % 8 for t in range(32)]
    chunks = [t // 256 for t in range(2048)]
    uniform, mixed = [1] * 8, [1, 1, 1, 1, 2, 2, 4, 4]
    return [
        Step("decode 32 rows, 8 x rank 16", interleaved, uniform, False),
        Step("decode 32 rows, 8 x rank 16, scattered pages", interleaved, uniform, True),
        Step("decode 32 rows, ranks 16 to 64", interleaved, mixed, False),
        Step("decode 32 rows, ranks 16 to 64, scattered pages", interleaved, mixed, True),
        Step("decode 1 row, rank 16", [0], [1], False),
        Step("prefill 2048 rows, 8 x rank 16", chunks, uniform, False),
        Step("prefill 2048 rows, ranks 16 to 64, scattered pages", chunks, mixed, True),
    ]


@dataclass(frozen=True)
class Model:
    """Base weights and pools of every site and layer."""

    weights: dict[str, torch.Tensor]
    pools: dict[str, list[SitePool]]

    @classmethod
    def random(cls, dtype: torch.dtype) -> Model:
        weights, pools = {}, {}
        for name, (num_inputs, widths) in SITES.items():
            weights[name] = torch.randn(NUM_LAYERS, sum(widths), num_inputs, dtype=dtype)
            shape = (NUM_LAYERS, NUM_PAGES, len(widths), 16, num_inputs)
            a = torch.randn(shape, dtype=dtype).mul_(num_inputs**-0.5)
            b = torch.randn(NUM_LAYERS, NUM_PAGES, 16, sum(widths), dtype=dtype).mul_(0.25)
            pools[name] = [SitePool(a[layer], b[layer], widths) for layer in range(NUM_LAYERS)]
        return cls(weights, pools)


def runs(step: Step, model: Model, dtype: torch.dtype) -> tuple[Callable[[], None], ...]:
    """The adapters' part of a step, checked; the same on torch's products; the base products of the rows."""
    num_rows = len(step.slots)
    slots, scales = np.array(step.slots, dtype=np.int32), np.full(num_rows, 0.5, dtype=np.float32)
    pages = step.pages()
    inputs = {name: torch.randn(num_rows, num_inputs, dtype=dtype) for name, (num_inputs, _) in SITES.items()}
    outputs = {name: torch.zeros(num_rows, sum(widths), dtype=dtype) for name, (_, widths) in SITES.items()}

    def lora() -> None:
        # The engine builds a mix for each step, so its cost belongs here.
        mix = Mix.build(slots, scales, [pages] * len(SITES), 8, 4, "cpu")
        for layer in range(NUM_LAYERS):
            for kind, name in enumerate(SITES):
                add_lora(outputs[name], inputs[name], model.pools[name][layer], mix, kind)

    def products() -> None:
        mix = Mix.build(slots, scales, [pages] * len(SITES), 8, 4, "cpu")
        for layer in range(NUM_LAYERS):
            for kind, name in enumerate(SITES):
                rows = mix.step.kinds[kind].products
                add_lora_by_products(outputs[name], inputs[name], model.pools[name][layer], rows)

    def base() -> None:
        for layer in range(NUM_LAYERS):
            for name in SITES:
                F.linear(inputs[name], model.weights[name][layer])

    mix = Mix.build(slots, scales, [pages] * len(SITES), 8, 4, "cpu")
    sample = torch.arange(0, num_rows, max(1, num_rows // 32)).tolist()
    for kind, name in enumerate(SITES):
        pool, y = model.pools[name][-1], torch.randn_like(outputs[name])
        expected = y[sample].float()
        reference.add_lora(
            expected, inputs[name][sample], pool, slots[sample].tolist(), scales[sample].tolist(), pages
        )
        add_lora(y, inputs[name], pool, mix, kind)
        torch.testing.assert_close(y[sample].float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    return lora, products, base


def time_in_turn(functions: Sequence[Callable[[], None]], repeats: int) -> list[list[float]]:
    """Milliseconds of each call of each function, one after the other in every round."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, mine in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function()
            mine.append((time.perf_counter() - begin) * 1e3)
    return times


def summary(times: Sequence[float]) -> str:
    return f"{statistics.median(times):8.2f} [{min(times):.2f}, {max(times):.2f}]"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    add_save(parser, "kernels_cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, args.dtype)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.dtype}; ms a step: median [least, most]")
    origin = Origin.now(args.dtype, device=processor_name())
    rows = []
    with torch.inference_mode():
        model = Model.random(dtype)
        for step in steps():
            lora, products, base = time_in_turn(runs(step, model, dtype), args.repeats)
            ratio = statistics.median(ours / theirs for ours, theirs in zip(lora, base, strict=True))
            print(f"{step.name}: adapters / base products {ratio:.2f}")
            for name, times in (
                ("compiled", lora),
                ("torch's products", products),
                ("base (F.linear)", base),
            ):
                print(f"  {name:18s}{summary(times)}")
            rows.append(
                Row(
                    **asdict(origin),
                    step=step.name,
                    dtype=args.dtype,
                    compiled_ms=statistics.median(lora),
                    compiled_ms_min=min(lora),
                    compiled_ms_max=max(lora),
                    products_ms=statistics.median(products),
                    base_ms=statistics.median(base),
                    base_ms_min=min(base),
                    base_ms_max=max(base),
                    compiled_over_base=ratio,
                    repeats=args.repeats,
                )
            )
    if args.save:
        append_csv(RESULTS / "kernels_cpu.csv", rows)


if __name__ == "__main__":
    main()
