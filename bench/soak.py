"""A soak: thousands of requests of all sorts from many clients over many adapters, on a real server.

    python bench/soak.py
    python bench/soak.py --requests 500 --adapters 12 --clients 8
    python bench/soak.py --csv soak.csv --plot soak.png

Answers and streams over HTTP and gRPC, Zipf over the adapters; greedy ones are compared with PEFT's, sampled
ones with earlier answers to the same request; among them requests that are cancelled, time out, have
deadlines, are invalid or name an unknown adapter. The host cache and the device pool are smaller than the
number of adapters, so adapters move at both levels all the time.

At the end nothing may be lost or wrong, the queue must be empty, `check()` clean, every sequence accounted
for and, from 2,000 requests, the resident memory of every process flat over the last half. Ends with status 1
if anything is not so. Adapters, and PEFT's answers, are made first and take minutes; with --adapter-root they
are kept for the next run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from manylora.serve.background import running_server
from tqdm import tqdm
from transformers import AutoConfig

from bench.arguments import add_base_model, add_save, make_parser
from bench.campaigns.harness import Peft, silence_libraries
from bench.campaigns.server_state import main_processes, server_faults
from bench.campaigns.soak.drive import Answers, Result, Soak
from bench.campaigns.soak.memory import MIB, MemoryWatch, Trend, save_csv, save_plot, trends
from bench.campaigns.soak.plan import MAX_TOKENS, Plan
from bench.loadtest.csv_file import append_csv
from bench.loadtest.origin import Origin
from bench.paths import RESULTS
from examples.make_adapters import make_adapter

RANKS = (4, 8, 16)
MIN_JUDGED = 2000
"""Requests from which on memory is judged: before, caches still fill."""
MAX_TIES = 0.01
"""Share of answers that may part from PEFT's at a tie, and of repeated sampled answers that may change, by a
draw within rounding distance of the border between two tokens."""
MAX_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Origin):
    """A whole soak, as bench/results/soak.csv keeps it."""

    requests: int
    clients: int
    adapters: int
    duration_s: float
    req_s: float
    lost: int
    """Requests that have not ended."""
    wrong: int
    """Requests that did not end as they should: another answer than PEFT's, another error."""
    compared: int
    """Greedy answers held against PEFT's."""
    ties: int
    """Of these, those that part from it where its two best logits are equal."""
    repeats: int
    """Sampled answers held against an earlier one to the same request."""
    changed: int
    """Of these, those that differ."""
    check_errors: int
    """What is wrong with the server afterwards: `check()`, counters, processes, tracebacks."""
    memory: str
    """Of each process over the last half: MiB that it grows by in 1,000 requests."""
    verdict: str


def main() -> None:
    args = parse_arguments()
    silence_libraries()
    if args.adapter_root:
        sys.exit(1 if soak(args, args.adapter_root) else 0)
    with tempfile.TemporaryDirectory() as folder:
        faults = soak(args, Path(folder))
    sys.exit(1 if faults else 0)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_base_model(parser)
    parser.add_argument("--adapter-root", type=Path, help="where adapters are made, and kept")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=100, help="of ranks 4, 8 and 16 on all linears")
    parser.add_argument("--prompts", type=int, default=2, help="asked of each adapter, at most 6")
    parser.add_argument("--max-loras", type=int, default=8)
    parser.add_argument("--max-cpu-loras", type=int, default=32)
    parser.add_argument("--skew", type=float, default=1.0, help="exponent of the Zipf distribution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="save the memory of each process over time")
    parser.add_argument("--plot", type=Path, help="draw it as a PNG")
    add_save(parser, "soak", "a row")
    return parser.parse_args()


def soak(args: argparse.Namespace, adapter_root: Path) -> list[str]:
    """Prepare, run and report; return what is wrong."""
    names = make_adapters(args, adapter_root)
    plan = Plan(args.seed, names, args.prompts, args.skew)
    answers = peft_answers(Peft(args.base_model, adapter_root), plan, names)
    settings = [f"--set=max_loras={args.max_loras}", f"--set=max_cpu_loras={args.max_cpu_loras}"]
    with running_server(
        base_model=args.base_model,
        adapter_root=adapter_root,
        arguments=[*settings, "--set=max_model_len=256"],
    ) as server:
        before = main_processes(server)
        origin = Origin.now("soak")
        with tqdm(total=args.requests, unit=" requests", disable=None, smoothing=0.05) as bar:
            run = Soak(server, plan, answers, bar.update)
            start = time.monotonic()
            with MemoryWatch(before, lambda: run.num_done) as watch:
                result = run.run(args.requests, args.clients)
            seconds = time.monotonic() - start
        check_errors = server_faults(server, before)
    faults = [*result.faults, *judge(result, args.requests), *check_errors]
    found = trends(watch.samples)
    if args.requests >= MIN_JUDGED:
        faults += [f"the memory of {trend.process} grows" for trend in found if not trend.is_flat]
    if args.csv:
        save_csv(watch.samples, args.csv)
    if args.plot:
        save_plot(watch.samples, args.plot)
    report(result, found, seconds, faults)
    if args.save:
        row = summary(args, origin, result, found, seconds, check_errors, faults)
        append_csv(RESULTS / "soak.csv", [row])
    return faults


def summary(
    args: argparse.Namespace,
    origin: Origin,
    result: Result,
    found: Sequence[Trend],
    seconds: float,
    check_errors: Sequence[str],
    faults: Sequence[str],
) -> Row:
    """One row.

    Args:
        check_errors: of the server.
        faults: all, these among them.
    """
    return Row(
        **asdict(origin),
        requests=args.requests,
        clients=args.clients,
        adapters=args.adapters,
        duration_s=seconds,
        req_s=result.num_operations / seconds,
        lost=args.requests - result.num_operations,
        wrong=len(result.faults),
        compared=result.num_compared,
        ties=result.num_ties,
        repeats=result.num_repeats,
        changed=result.num_changed,
        check_errors=len(check_errors),
        memory=", ".join(f"{trend.process} {trend.slope_bytes / MIB:.2f}" for trend in found),
        verdict=f"{len(faults)} faults" if faults else "nothing lost, nothing wrong",
    )


def make_adapters(args: argparse.Namespace, adapter_root: Path) -> list[str]:
    """Make the adapters that are not there yet; return all names."""
    config = AutoConfig.from_pretrained(args.base_model)
    names = [f"soak-{number:03}" for number in range(args.adapters)]
    for number, name in enumerate(tqdm(names, unit=" adapters", disable=None)):
        if not (adapter_root / name / "adapter_config.json").exists():
            make_adapter(adapter_root / name, config, rank=RANKS[number % len(RANKS)], seed=number)
    return names


def peft_answers(peft: Peft, plan: Plan, names: Sequence[str]) -> Answers:
    """PEFT's greedy answers to all that will be asked, one adapter in memory at a time."""
    answers = {}
    for name in tqdm(names, unit=" adapters by PEFT", disable=None):
        texts = plan.prompts_of(name)
        ids = [peft.tokenizer(text)["input_ids"] for text in texts]
        found = peft.answers(name, ids, MAX_TOKENS)
        answers.update({(name, text): wanted for text, wanted in zip(texts, found, strict=True)})
    return answers


def judge(result: Result, num_requests: int) -> list[str]:
    """What is wrong with a result as a whole."""
    faults = []
    if result.num_operations != num_requests:
        faults.append(f"{result.num_operations} of {num_requests} requests have ended")
    if result.num_ties > MAX_TIES * result.num_compared:
        faults.append(f"{result.num_ties} of {result.num_compared} answers part from PEFT's at a tie")
    if result.num_changed > MAX_TIES * result.num_repeats:
        faults.append(f"{result.num_changed} of {result.num_repeats} repeated sampled answers differ")
    return faults


def report(result: Result, found: Sequence[Trend], seconds: float, faults: Sequence[str]) -> None:
    print(f"\n{'requests':<18}{'number':>8}  ends")
    for kind, counts in result.ends.items():
        words = ", ".join(f"{count} {end}" for end, count in counts.most_common())
        print(f"{kind:<18}{counts.total():>8}  {words}")
    print(
        f"\n{result.num_operations} requests in {seconds:.0f} s, {result.num_operations / seconds:.1f}/s; "
        f"{result.num_compared} answers compared with PEFT, {result.num_ties} ties; "
        f"{result.num_repeats} sampled answers repeated, {result.num_changed} changed"
    )
    heads = f"{'per 1,000':>10}{'range':>8}{'growth':>8}{'limit':>7}"
    print(f"\n{'memory, MiB':<22}{'start':>8}{'end':>8}  last half:{heads}")
    for trend in found:
        print(
            f"{trend.process:<22}{trend.first_bytes / MIB:>8.1f}{trend.last_bytes / MIB:>8.1f}"
            f"{'':>12}{trend.slope_bytes / MIB:>10.2f}{trend.range_bytes / MIB:>8.1f}"
            f"{trend.growth_bytes / MIB:>8.1f}{trend.limit_bytes / MIB:>7.1f}"
        )
    for fault in faults[:MAX_SHOWN]:
        print(f"\nFAULT: {fault}")
    print(f"\n{len(faults)} faults")


if __name__ == "__main__":
    main()
