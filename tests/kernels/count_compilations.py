"""Count what would be compiled while a server runs, which needs no GPU, and print it as JSON.

A program of its own: it gives triton a driver whose kernels do nothing, so that every launch is looked up and
specialised as on a GPU, and none is run.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from manylora_kernels import ServedShapes, SitePool, SiteShape
from manylora_kernels.device import Device
from manylora_kernels.lora import precompile, routed
from manylora_kernels.lora.expand import expand
from manylora_kernels.lora.shrink import shrink
from manylora_kernels.lora.triton_form import TRITON
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CPU = torch.device("cpu")
CARD = Device("H100", num_units=132, shared_bytes=227 << 10, has_dependent_launch=True)
SITES = (SiteShape(64, (48, 16, 16)), SiteShape(64, (64,)), SiteShape(64, (96, 96)), SiteShape(96, (64,)))
SHAPES = {
    "max_slots": 5,
    "max_pages": 3,
    "dtype": torch.bfloat16,
    "pool_dtype": torch.bfloat16,
    "has_vectors": True,
}
PAGES = [(1,), (), (2, 3), (0, 4, 5)]
VECTORS = [(), (3,), (), (0,)]
MOST_ROWS = 700


class Driver:
    """What the launcher asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Kernel:
    """A compiled kernel that does nothing."""

    function = None
    packed_metadata = None

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        pass


compiled: list[str] = []


def compile_nothing(self: Any, key: Any, signature: Any, device: Any, *args: Any) -> Kernel:
    compiled.append(self.fn.__name__)
    kernel = self.device_caches[device][0][key] = Kernel()
    return kernel


def steps() -> list[tuple[int, list[int]]]:
    """(rows, slots of the rows): every number of rows, alone, mixed and without adapters."""
    found = []
    for num_rows in [*range(1, 140), *range(140, MOST_ROWS, 7)]:
        found.append((num_rows, [num_rows % 4] * num_rows))
        found.append((num_rows, [t % 5 - 1 for t in range(num_rows)]))
    return found


def serve(num_rows: int, slots: list[int], has_vectors: bool = False) -> None:
    step = routed.RoutedMix.build(
        np.array(slots, dtype=np.int32),
        np.ones(num_rows, np.float32),
        [PAGES] * 4,
        5,
        3,
        CPU,
        [VECTORS] * 4 if has_vectors else (),
    )
    for kind, site in enumerate(SITES):
        # Views of a pool of all layers, and x and y as a model makes them.
        a = torch.empty(6, 3, site.num_linears, 16, site.num_inputs, dtype=torch.bfloat16)[:, 1]
        b = torch.empty(6, 3, 16, site.num_outputs, dtype=torch.bfloat16)[:, 1]
        vectors = (torch.empty(3, 5, site.num_outputs, dtype=torch.bfloat16)[1] for _ in range(2))
        pool = SitePool(a, b, site.widths, *vectors)
        x = torch.empty(num_rows, site.num_inputs, dtype=torch.bfloat16)
        y = torch.empty(num_rows, site.num_outputs, dtype=torch.bfloat16)
        if num_rows == 1:
            x = x.t().contiguous().t()  # a row whose stride says 1
        TRITON.add_lora(y, x, pool, step, kind)
        plan = step.plan_for(pool.shape, pool.a.dtype)
        h = shrink(x, pool.a, step, kind, plan)
        expand(y, h, pool.b, pool.widths, step, kind, plan, vectors=pool.vectors)
        if site.is_gate_up:
            TRITON.add_lora_silu_mul(torch.empty_like(y[:, : site.widths[0]]), y, x, pool, step, kind)
            TRITON.silu_mul(y)
            TRITON.gate_up_lora(x, lambda x, y=y: y, pool, step, kind)
        TRITON.linear_lora(x, lambda x, y=y: y, pool, step, kind)


def count() -> dict[str, int]:
    shapes = ServedShapes(sites=SITES, row_counts=tuple(range(1, MOST_ROWS + 1)), **SHAPES)
    compiled.clear()
    precompile.precompile(CPU, shapes)
    before = len(compiled)
    compiled.clear()
    for num_rows, slots in steps():
        for has_vectors in (False, True):
            serve(num_rows, slots, has_vectors)
    return {"before": before, "while_serving": len(compiled)}


def use_a_driver_that_does_nothing() -> None:
    """From here on every launch is looked up, and what would be compiled is listed in `compiled`."""
    driver.set_active(Driver())
    JITFunction._do_compile = compile_nothing


def main() -> None:
    use_a_driver_that_does_nothing()
    for module in (precompile, routed):
        module.facts = lambda device: CARD
    cold = len(compiled)
    serve(1, [0])
    cold = len(compiled) - cold
    print(json.dumps({"cold": cold, **count()}))


if __name__ == "__main__":
    main()
