"""What the commands for a GPU share: their arguments, what they run on, and how they begin and end."""

from __future__ import annotations

import argparse
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from bench.arguments import make_parser
from bench.gpu.peer_modules import FOLDER
from bench.gpu.shapes import LLAMA_LAYER, TINY_LAYER, Layer

_MAX_COMPILERS = 12


@dataclass(frozen=True, slots=True)
class Platform:
    """What a command runs on, and the layer that it runs."""

    device: torch.device
    dtype: torch.dtype
    layer: Layer
    is_tiny: bool
    """In triton's interpreter: all logic, and no times that mean anything."""

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Platform:
        """The GPU with Llama-3-8B's layer, or for `--cpu-logic` the interpreter with a tiny one."""
        if arguments.cpu_logic:
            # The interpreter computes bfloat16 wrongly.
            return cls(torch.device("cpu"), torch.float16, TINY_LAYER, is_tiny=True)
        return cls(torch.device("cuda"), torch.bfloat16, LLAMA_LAYER, is_tiny=False)


def gpu_parser(doc: str | None, *, budget_s: float | None, budget: str) -> argparse.ArgumentParser:
    """A parser of what all of them take.

    Args:
        budget_s: seconds that a run may last unless it is said; None: the command decides.
        budget: what these seconds are of.
    """
    parser = make_parser(doc)
    parser.add_argument("--cpu-logic", action="store_true", help="tiny shapes in triton's interpreter")
    parser.add_argument("--budget-s", type=float, default=budget_s, metavar="S", help=budget)
    return parser


def add_peers(parser: argparse.ArgumentParser, default: Path | None = FOLDER) -> None:
    """`--peers`."""
    parser.add_argument("--peers", type=Path, default=default, help="where bench/peers.py has put its files")


def add_compilers(parser: argparse.ArgumentParser) -> None:
    """`--compilers`, which `num_compilers` reads."""
    parser.add_argument("--compilers", type=int, help="processes that compile; by the processors at hand")


def num_compilers(arguments: argparse.Namespace, is_short: bool = False) -> int:
    """How many processes compile beside this one.

    Args:
        is_short: their start would take most of such a run. The interpreter compiles nothing.
    """
    if arguments.compilers is not None:
        return int(arguments.compilers)
    return 0 if is_short or arguments.cpu_logic else compilers_at_hand()


def compilers_at_hand() -> int:
    """As many as the machine has processors, but two and at most twelve."""
    return max(0, min(_MAX_COMPILERS, (os.cpu_count() or 1) - 2))


def can_run(arguments: argparse.Namespace, verb: str) -> bool:
    """Choose the interpreter, before anything imports triton, or look for a GPU and say that there is none.

    From then on SIGTERM ends the command as an error does: what it has found is kept, its processes end.

    Args:
        verb: what it would do on a GPU.
    """
    if arguments.cpu_logic:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print(f"no GPU here: nothing to {verb} (--cpu-logic runs the logic on a CPU)")
        return False
    signal.signal(signal.SIGTERM, _end)
    return True


def _end(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)
