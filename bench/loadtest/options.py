"""The command line of serving.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from manylora_client.address import read_address

from bench.arguments import numbers_from, parsed, positive, rates, setting, words
from bench.loadtest.arrival import Arrival
from bench.loadtest.workload import Lengths, Shape, check_skew
from bench.paths import BASE_MODEL, RESULTS

TARGETS = ("engine", "http", "http-stream", "grpc", "grpc-stream", "peft")

PRESETS: dict[str, dict[str, Any]] = {
    "w1": {"label": "w1", "requests": 32, "adapters": [8], "rank": 16},
    "w2": {"label": "w2", "requests": 32, "adapters": [0]},
    "short": {
        "requests": 8,
        "adapters": [4],
        "prompt_tokens": Lengths(8, 16),
        "output_tokens": Lengths(8, 8),
        "rounds": 2,
        "targets": ["engine", "http", "grpc-stream", "peft"],
        "csv": None,
    },
}
"""What a preset sets; an option that is given too wins."""

EXAMPLES = """\
examples:
  32 requests at once, 64 prompt and 64 output tokens, over 8 adapters beside the base model (W1 and W2),
  the engine in a process of its own beside a server and PEFT:
    python bench/serving.py --preset w1 --targets engine,http,grpc,http-stream,grpc-stream,peft

  throughput by number of adapters, with a plot:
    python bench/serving.py --label adapters --adapters 0,1,4,8,16,32 --targets engine,peft \\
        --plot bench/results

  latency by load, from clients that each wait for their answer, with a plot:
    python bench/serving.py --label load --concurrency 1,2,4,8,16,32 --targets engine,grpc-stream \\
        --plot bench/results

  a server that runs, asked at random times, some adapters more often than others:
    python bench/serving.py --url http://host:8000 --adapter-root adapters --targets http-stream \\
        --rates 0.5,1,2 --skew zipf:1.0 --adapters 8 --requests 100

targets:
  engine        the engine, asked in its own process: no front end, no text
  http, grpc    a server's whole answers: POST /infer, ModelInfer
  http-stream, grpc-stream
                a server's answers token by token: /generate_stream, ModelStreamInfer
  peft          PEFT's generate(adapter_names=...), batch after batch, in a process of its own

The first target is the one that the others are compared with. Exit status: 0 done, 1 wrong tokens, a failed
request (unless --allow-errors) or a target that cannot run, 2 a wrong option, 130 interrupted.
"""


def read_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; ends the program where it is wrong."""
    parser = _parser()
    chosen, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS.get(chosen.preset or "", {}))
    options = parser.parse_args(argv)
    if options.peft and "peft" not in options.targets:
        options.targets = [*options.targets, "peft"]
    if options.base and 0 not in options.adapters:
        options.adapters = [0, *options.adapters]
    if options.url and any(options.adapters) and options.adapter_root is None:
        parser.error("--url needs --adapter-root: the server's adapters, or copies of them")
    schemes = {read_address(url, None).protocol for url in options.url}
    for name in options.targets:
        if name not in ("engine", "peft") and options.url and name.partition("-")[0] not in schemes:
            parser.error(f"target {name}: no --url names a server of this protocol")
    if options.base_model is None:
        options.base_model = BASE_MODEL
        options.model_name = options.model_name or "SmolLM2-135M-Instruct"
    if not (options.base_model / "config.json").is_file():
        parser.error(f"no base model in {options.base_model}; run `make setup`, or give --base-model")
    return options


def arrivals(options: argparse.Namespace) -> list[Arrival]:
    """The arrival processes asked for."""
    if options.rates:
        return [Arrival(rate_per_s=rate) for rate in options.rates]
    return [Arrival(num_clients=count) for count in options.concurrency] or [Arrival()]


def shape(options: argparse.Namespace) -> Shape:
    """What all cases have in common."""
    return Shape(
        num_requests=options.requests,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        skew=options.skew,
        seed=options.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Throughput and latency of many adapters on one base model: the engine, a server, PEFT.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), help="w1: mixed beside base; w2: base; short: a minute's check")
    add("--short", dest="preset", action="store_const", const="short", help="the same as --preset short")
    add("--targets", type=_targets, default=["engine"], metavar="A,B", help="what is measured; see below")
    add("--peft", action="store_true", help="the same as peft at the end of --targets")

    _add_workload(parser.add_argument_group("workload"))
    _add_server(parser.add_argument_group("what is served"))

    output = parser.add_argument_group("measuring and results")
    add = output.add_argument
    add("--rounds", type=positive, default=5, help="runs of each case on each target (default: %(default)s)")
    add("--no-check", dest="check", action="store_false", help="compare no tokens before measuring")
    add("--allow-errors", action="store_true", help="exit with 0 even if requests failed")
    add(
        "--csv",
        type=Path,
        default=RESULTS / "serving.csv",
        metavar="FILE",
        help="rows are added here (default: bench/results/serving.csv)",
    )
    add("--no-csv", dest="csv", action="store_const", const=None, help="keep no rows")
    add("--label", default="", help="name of the run in the CSV, by which RESULTS.md finds it")
    add("--plot", type=Path, metavar="DIR", help="draw PNGs of a sweep over adapters or loads there")
    return parser


def _add_workload(group: Any) -> None:
    add = group.add_argument
    add("--requests", type=positive, default=32, metavar="N", help="of each run (default: %(default)s)")
    add(
        "--adapters",
        type=numbers_from(0),
        default=[8],
        metavar="K,...",
        help="how many; several make a sweep (default: 8)",
    )
    add("--no-base", dest="base", action="store_false", help="leave the base model's run out")
    add(
        "--skew",
        type=parsed(check_skew),
        default="even",
        help="even, uniform or zipf:EXPONENT (default: %(default)s)",
    )
    for name, what in (("prompt", "of each prompt"), ("output", "of each answer")):
        add(
            f"--{name}-tokens",
            type=parsed(Lengths.parse),
            default=Lengths(64, 64),
            metavar="N[-M]",
            help=f"{what}, drawn evenly from a range (default: 64)",
        )
    either = group.add_mutually_exclusive_group()
    add = either.add_argument
    add("--rates", type=rates, default=[], metavar="R,...", help="random arrivals, so many a second")
    add(
        "--concurrency",
        type=numbers_from(1),
        default=[],
        metavar="C,...",
        help="clients that each wait for their answer (default: all requests at once)",
    )
    group.add_argument("--seed", type=int, default=0, help="of prompts, lengths, adapters and arrivals")


def _add_server(group: Any) -> None:
    add = group.add_argument
    add("--base-model", type=Path, metavar="DIR", help="(default: the one that `make setup` prepares)")
    add("--model-name", default="", help="for tables and plots (default: the directory's)")
    add("--rank", type=positive, default=16, help="of the synthetic adapters (default: %(default)s)")
    add("--adapter-root", type=Path, metavar="DIR", help="take adapters from here instead")
    add(
        "--set",
        action="append",
        default=[],
        type=setting,
        metavar="KEY=VALUE",
        help="of the engine, by itself and in a server (default: room for all adapters, no prefix cache)",
    )
    add(
        "--url",
        action="append",
        default=[],
        metavar="URL",
        help="a server that runs, http:// or grpc://; may be given for both (default: one is started)",
    )
    add("--peft-batch", type=positive, default=64, metavar="N", help="largest batch of PEFT (default: 64)")


def _targets(text: str) -> list[str]:
    names = words(text)
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(TARGETS)}, each once")
    return names
