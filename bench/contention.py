"""An engine on taken processors: seconds of a batch of answers, in quiet and beside busy ones, in turn.

Each way of waiting is an engine in a process of its own: `served` as it is, `spins` and `sleeps` without
`manylora.wait_policy`, with GNU's own spinning and with none, `one-thread`. Busy processes do nothing but
count; the kernel places them. Each load begins with a batch that is not counted.

    python bench/contention.py
    python bench/contention.py --ways served,spins --requests 32 --tokens 64 --busy 0    # its cost in quiet
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

from manylora import Engine, EngineConfig
from manylora.supervise import engine_process
from manylora.wait_policy import WaitPolicy

from bench.arguments import add_base_model, add_save, make_parser, numbers_from, setting, words
from bench.loadtest.csv_file import append_csv
from bench.loadtest.origin import Origin
from bench.paths import RESULTS

PROMPT = list(range(1000, 1064))
BUSY = "print(flush=True)\nwhile True: pass"
WAYS = {
    "served": {},
    "spins": {},
    "sleeps": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one-thread": {"OMP_NUM_THREADS": "1"},
}
"""With what they set in the environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Origin):
    """One way beside one load, as bench/results/contention.csv keeps it."""

    way: str
    num_busy: int
    num_requests: int
    max_tokens: int
    num_runs: int
    seconds: float
    """Median."""
    least_s: float
    most_s: float


def answer(config: EngineConfig, way: str) -> None:
    """Be an engine: for each line of standard input, print the seconds that one batch of answers took."""
    if way != "served":
        WaitPolicy.look = lambda _self, _now_s=None: None  # type: ignore[method-assign]
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
        environment = engine_process.environment()
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--be-engine", way, *sys.argv[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment | WAYS[way],
            text=True,
        )
        self._wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_exc: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def answer(self, num_requests: int, max_tokens: int) -> float:
        """Seconds that a batch took."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([num_requests, max_tokens]) + "\n")
        self._process.stdin.flush()
        return float(self._wait())

    def _wait(self) -> float | str:
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


def measure(options: argparse.Namespace, origin: Origin) -> list[Row]:
    """All ways in turn, in each round beside each load."""
    found: dict[tuple[int, str], list[float]] = {}
    with ExitStack() as stack:
        children = {way: stack.enter_context(Child(way)) for way in options.ways}
        for _ in range(options.runs):
            for num_busy in options.busy:
                for way, child in children.items():
                    with busy(num_busy):
                        child.answer(options.requests, options.tokens)
                        seconds = child.answer(options.requests, options.tokens)
                    found.setdefault((num_busy, way), []).append(seconds)
    return [
        Row(
            **asdict(origin),
            way=way,
            num_busy=num_busy,
            num_requests=options.requests,
            max_tokens=options.tokens,
            num_runs=len(seconds),
            seconds=statistics.median(seconds),
            least_s=min(seconds),
            most_s=max(seconds),
        )
        for (num_busy, way), seconds in sorted(found.items())
    ]


def main() -> int:
    """Measure and print medians with ranges."""
    parser = make_parser(__doc__)
    add_base_model(parser)
    parser.add_argument(
        "--ways", type=words, default=list(WAYS), metavar="WAY,...", help=f"({','.join(WAYS)})"
    )
    parser.add_argument(
        "--busy", type=numbers_from(0), default=[0, 1, 2, 4], metavar="N,...", help="busy processes (0,1,2,4)"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2, help="at once")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="a setting"
    )
    add_save(parser, "contention")
    parser.add_argument("--be-engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be_engine:
        config = EngineConfig.from_strings(
            {"base_model": str(options.base_model), "device": "cpu", **dict(options.set)}
        )
        answer(config, options.be_engine)
        return 0
    rows = measure(options, Origin.now("contention"))
    for row in rows:
        print(
            f"{row.num_busy} busy  {row.way:12} {row.seconds:7.2f} s ({row.least_s:.2f} to {row.most_s:.2f})"
        )
    if options.save:
        append_csv(RESULTS / "contention.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
