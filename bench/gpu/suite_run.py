"""One run of the GPU suite's parts in this process, and what all of them share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench.gpu.budget import Budget
from bench.gpu.commands import Platform
from bench.gpu.suite_parts import RESERVED_S, SHARES, parts
from bench.loadtest import environment
from bench.loadtest.origin import Origin

if TYPE_CHECKING:
    from bench.gpu.rows import Context, Row

_SLOW_IN_INTERPRETER = frozenset({"vllm", "vllm, batch invariant"})
"""Thousands of programs that do nothing: half a minute for a tiny step."""
_REPEATS, _QUICK_REPEATS = 15, 7


def make_context(
    platform: Platform,
    peers: Path,
    *,
    is_quick: bool = False,
    origin: Mapping[str, str] | None = None,
    device_name: str = "",
) -> Context:
    """Look at the device and measure its bandwidth.

    Args:
        origin: what the rows say of their run, where it is not this process's own.
        device_name: then the device is not touched, and no bandwidth known.
    """
    from bench.gpu.clock import measured_bandwidth
    from bench.gpu.floors import Bandwidth
    from bench.gpu.rows import Context, label_of

    tiny = platform.is_tiny
    name = device_name or ("interpreter" if tiny else environment.device_name())
    mine = Origin.now("" if tiny else label_of(name), device=name)
    return Context(
        origin=replace(mine, **(origin or {})),
        triton=environment.package_version("triton"),
        device=platform.device,
        dtype=platform.dtype,
        layer=platform.layer,
        bandwidth=Bandwidth(0.0, 0.0) if device_name else measured_bandwidth(platform.device),
        peers=peers,
        repeats=1 if tiny else _QUICK_REPEATS if is_quick else _REPEATS,
        proofs=3 if tiny else 1000,
        is_tiny=tiny,
        leave_out=_SLOW_IN_INTERPRETER if tiny else frozenset(),
    )


def run(
    context: Context,
    chosen: Sequence[str],
    budget_s: float,
    keep: Callable[[Row], None],
    part_is_done: Callable[[], None],
) -> None:
    """Run the parts one after the other; every row is kept as soon as it is there.

    Args:
        part_is_done: called after each.
    """
    from bench.gpu.attempt import guarded

    known = parts()
    shares = {name: float(SHARES[name]) for name in SHARES if name in chosen}
    budget = Budget(budget_s, shares, reserved_s=RESERVED_S)
    for name in shares:
        deadline, begin = budget.begin(name), time.monotonic()
        print(f"# {name}: {deadline.left_s:.0f} s", flush=True)
        failed = partial(_failed, context, name)
        for row in guarded(known[name](context, deadline), failed):
            keep(row)
            print(line_of(row), flush=True)
        _settle(context)
        part_is_done()
        print(f"# {name}: took {time.monotonic() - begin:.0f} s", flush=True)


def _failed(context: Context, part: str, why: str) -> Row:
    return context.row(part, "whole part", result=why)


def _settle(context: Context) -> None:
    """Give memory back and measure the bandwidth again; the larger is kept."""
    from bench.gpu.attempt import attempt
    from bench.gpu.clock import measured_bandwidth

    def settle() -> None:
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
        context.bandwidth = context.bandwidth.or_larger(measured_bandwidth(context.device))

    if isinstance(why := attempt(settle), str):
        print(f"# {why}", flush=True)


def line_of(row: Row) -> str:
    """A row for people: what is set."""
    names = ("part", "form", "rows", "adapters", "rank", "pool_rank", "skewed", "base_share")
    numbers = ("median_us", "least_us", "most_us", "extra_us", "floor_us", "error")
    words = [str(getattr(row, name)) for name in names if getattr(row, name) not in (None, "")]
    words += [f"{name}={value:.4g}" for name in numbers if (value := getattr(row, name)) is not None]
    return " | ".join([*words, row.result])
