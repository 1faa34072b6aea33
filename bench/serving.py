"""The serving benchmark: many adapters on one base model, by the engine, by a server and by PEFT.

    python bench/serving.py --help

Tokens are compared before anything is timed; then all cases run on all targets in turn, round by round.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from manylora.errors import ManyloraError
from manylora_client import ManyloraClientError
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from bench.loadtest import options, table
from bench.loadtest.adapters import AdapterSet, find_adapters, make_adapters
from bench.loadtest.csv_file import append_csv
from bench.loadtest.driver import TargetError
from bench.loadtest.measure import WrongTokensError, check, measure, reference_answers, summarise
from bench.loadtest.open_targets import Opener, reference_for
from bench.loadtest.origin import Origin
from bench.loadtest.row import Row, Setting
from bench.loadtest.target import Target
from bench.loadtest.workload import Case, make_requests


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark.

    Returns: the exit status.
    """
    arguments = options.read_options(argv)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # Ends like an error does: what was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        rows = run(arguments)
    except KeyboardInterrupt:
        return 130
    except (ManyloraError, ManyloraClientError, TargetError, WrongTokensError, ValueError) as error:
        print(f"serving.py: {error}", file=sys.stderr)
        return 1
    num_errors = sum(row.errors for row in rows)
    if num_errors:
        print(f"\n{num_errors} requests failed", file=sys.stderr)
    return 1 if num_errors and not arguments.allow_errors else 0


def run(arguments: argparse.Namespace) -> list[Row]:
    """Open, check, measure, report and close.

    Raises:
        ManyloraError, ManyloraClientError, TargetError: a target cannot be opened, or gave up.
        WrongTokensError: a target's tokens are not the reference's.
    """
    with contextlib.ExitStack() as stack:
        adapters = _adapters(arguments, stack)
        opener = Opener(
            stack,
            arguments.base_model,
            adapters,
            dict(arguments.set),
            urls=arguments.url,
            peft_batch=arguments.peft_batch,
        )
        cases = _cases(arguments, adapters)
        setting = _setting(arguments, adapters, opener)
        print(f"{setting.model} ({setting.dtype}) on {setting.device}, {setting.threads} threads")
        print(
            f"{setting.requests} requests, {setting.prompt} prompt and {setting.output} output tokens, "
            f"rank {setting.rank or '-'}, {setting.skew} skew, {setting.rounds} rounds",
            flush=True,
        )
        targets = []
        for name in arguments.targets:
            print(f"opening {name} ...", flush=True)
            targets.append(opener.open(name))
        if arguments.check:
            _check(targets, opener, cases)
        results = measure(targets, cases, arguments.rounds)
    rows = summarise(setting, arguments.targets, cases, results)
    _report(rows, arguments)
    return rows


def _adapters(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> AdapterSet:
    count = max(arguments.adapters)
    if arguments.adapter_root is not None:
        return find_adapters(arguments.adapter_root, count)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="manylora-bench-")))
    return make_adapters(folder, arguments.base_model, count, arguments.rank)


def _cases(arguments: argparse.Namespace, adapters: AdapterSet) -> list[Case]:
    vocab_size = AutoConfig.from_pretrained(arguments.base_model).vocab_size
    shape = options.shape(arguments)
    return [
        Case(
            requests=make_requests(shape, adapters.names[:count], vocab_size),
            arrival=arrival,
            num_adapters=count,
            seed=arguments.seed,
        )
        for arrival in options.arrivals(arguments)
        for count in arguments.adapters
    ]


def _setting(arguments: argparse.Namespace, adapters: AdapterSet, opener: Opener) -> Setting:
    base = AutoConfig.from_pretrained(arguments.base_model)
    dtype = str(base.dtype or "auto") if opener.config.dtype == "auto" else opener.config.dtype
    origin = Origin.now(arguments.label, threads=opener.config.num_threads)
    return Setting(
        **asdict(origin),
        model=arguments.model_name or arguments.base_model.resolve().name,
        dtype=dtype.removeprefix("torch."),
        rank=adapters.rank_label,
        skew=arguments.skew,
        requests=arguments.requests,
        prompt=str(arguments.prompt_tokens),
        output=str(arguments.output_tokens),
        seed=arguments.seed,
        options=" ".join(f"{key}={value}" for key, value in arguments.set),
        rounds=arguments.rounds,
    )


def _check(targets: Sequence[Target], opener: Opener, cases: Sequence[Case]) -> None:
    """Compare tokens, and say how it went."""
    with reference_for(targets, opener) as reference:
        wanted = reference_answers(reference, cases)
        for target in targets:
            if target.name == reference.name:
                continue
            agreement = check(target, reference, cases, wanted)
            print(f"{target.name}: {agreement} as {reference.name}'s", flush=True)
        if len(targets) == 1 and targets[0].name == reference.name:
            print(
                f"{reference.name}: nothing to compare its tokens with; --peft gives it a judge", flush=True
            )


def _report(rows: list[Row], arguments: argparse.Namespace) -> None:
    print("\nThroughput: median of the rounds; tokens/s in the worst and the best", end="\n\n")
    print(table.throughput(rows).plain())
    print("\nLatency: first token and between tokens in ms, whole answer in s", end="\n\n")
    print(table.latency(rows).plain())
    for title, found in (
        ("Tokens/s compared, round by round", table.ratios(rows)),
        ("What the engine counted, all rounds together", table.counters(rows)),
    ):
        if found.lines:
            print(f"\n{title}\n\n{found.plain()}")
    if arguments.csv is not None:
        append_csv(arguments.csv, rows)
        print(f"\n{len(rows)} rows added to {arguments.csv}")
    if arguments.plot is not None:
        # Imported here, since it takes its time and only some runs need it.
        from bench.loadtest import plots

        for path in plots.draw(rows, arguments.plot):
            print(f"drawn: {path}")


if __name__ == "__main__":
    sys.exit(main())
