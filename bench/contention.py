"""An engine on taken processors: seconds of a batch of answers, in quiet and beside busy ones, in turn.

Each way of waiting is an engine in a process of its own, with the environment that `manylora.launch` gives it
and what the way adds. Busy processes do nothing but count; the kernel places them.

    python bench/contention.py
    python bench/contention.py --ways served,GOMP_SPINCOUNT=300000,OMP_WAIT_POLICY=PASSIVE --runs 5
    python bench/contention.py --requests 32 --tokens 64 --num-busy 0    # what a way costs in quiet
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from manylora import Engine, EngineConfig, launch

ROOT = Path(__file__).resolve().parent.parent
SERVED = "served"
"""The way that adds nothing."""
PROMPT = list(range(1000, 1064))
BUSY = "print(flush=True)\nwhile True: pass"


def answer(config: EngineConfig) -> None:
    """Be an engine: for each line of standard input, print the seconds that one batch of answers took."""
    with Engine(config) as engine:
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            num_requests, max_tokens = json.loads(line)
            prompts = [[*PROMPT, number] for number in range(num_requests)]
            began_s = time.perf_counter()
            engine.generate(prompts, max_tokens=max_tokens, ignore_eos=True)
            print(json.dumps(time.perf_counter() - began_s), flush=True)


class Child:
    """An engine in a process of its own that waits in one way."""

    def __init__(self, way: str) -> None:
        environment = launch.environment()
        if way != SERVED:
            # The way alone: what the launcher chose may speak of the same.
            for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
                environment.pop(name, None)
            environment.update([way.split("=", 1)])
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--be-engine", *sys.argv[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_exc: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def begin(self, num_requests: int, max_tokens: int) -> None:
        """Have it answer a batch."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([num_requests, max_tokens]) + "\n")
        self._process.stdin.flush()

    def wait(self) -> float | str:
        """Seconds that the batch took."""
        assert self._process.stdout
        line: float | str = json.loads(self._process.stdout.readline())
        return line


@contextmanager
def busy(num_processes: int) -> Iterator[None]:
    """Keep as many processors busy."""
    started = []
    try:
        for _ in range(num_processes):
            started.append(subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE))
            assert started[-1].stdout
            started[-1].stdout.readline()
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure(options: argparse.Namespace) -> dict[tuple[str, str], list[float]]:
    """Seconds of each run by way and load: all ways alike in each round."""
    loads = {
        "quiet": 0,
        **({f"beside {options.num_busy} busy": options.num_busy} if options.num_busy else {}),
    }
    found: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as stack:
        children = {way: stack.enter_context(Child(way)) for way in options.ways.split(",")}
        for round_number in range(options.runs + 1):
            for load, num_busy in loads.items():
                for way, child in children.items():
                    with busy(num_busy):
                        child.begin(options.requests, options.tokens)
                        seconds = float(child.wait())
                    # The first round makes what is made on first use.
                    if round_number:
                        found.setdefault((way, load), []).append(seconds)
    return found


def main() -> int:
    """Measure and print medians with ranges."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-model", default=str(ROOT / ".build" / "base_model"), metavar="DIR")
    parser.add_argument("--ways", default=f"{SERVED},GOMP_SPINCOUNT=300000,OMP_WAIT_POLICY=PASSIVE")
    parser.add_argument("--num-busy", type=int, default=os.cpu_count(), help="busy processes (%(default)s)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=1, help="at once")
    parser.add_argument("--tokens", type=int, default=20, help="of each answer")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting")
    parser.add_argument("--be-engine", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be_engine:
        settings = dict(setting.split("=", 1) for setting in options.set)
        answer(EngineConfig.from_strings({"base_model": options.base_model, "device": "cpu", **settings}))
        return 0
    for (way, load), seconds in measure(options).items():
        middle, least, most = statistics.median(seconds), min(seconds), max(seconds)
        print(f"{way:24} {load:16} {middle:7.2f} s ({least:.2f} to {most:.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
