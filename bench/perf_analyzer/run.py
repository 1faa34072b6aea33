"""Have perf_analyzer load a server with requests for adapters, in one of three ways, and print one table.

    python bench/perf_analyzer/run.py one-adapter --adapter pirate
    python bench/perf_analyzer/run.py tensor-mix --model llm --protocol http
    python bench/perf_analyzer/run.py parameter-mix --adapters @base,haiku,pirate --skew 1

Each load gets prompts of its own, and answers of a fixed length. Before the first one, every adapter answers
once; after each, every answer's adapter and length are compared with what was asked.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manylora.errors import ManyloraError
from manylora.serve.background import running_server
from manylora_client import Client, ManyloraClientError

from bench.arguments import add_base_model, add_save, make_parser, words
from bench.loadtest.csv_file import append_csv
from bench.loadtest.origin import Origin
from bench.paths import RESULTS, ROOT
from bench.perf_analyzer.inputs import BASE_MODEL, MIN_WORDS, Entry, make_entries
from bench.perf_analyzer.install import COMMAND
from bench.perf_analyzer.report import Figures, format_table, measure
from bench.perf_analyzer.ways import (
    Load,
    PerfAnalyzerError,
    Way,
    check,
    one_adapter,
    parameter_mix,
    profile,
    tensor_mix,
)

WAYS = {
    "one-adapter": "gRPC streams; one adapter, named by a request parameter",
    "tensor-mix": "inference or gRPC streams; a mix of adapters, named in the tensor sampling_parameters",
    "parameter-mix": "HTTP streams (/generate_stream); a mix of adapters, named by request parameters",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Origin):
    """One load, as bench/results/perf_analyzer.csv keeps it. None where it cannot be seen."""

    model: str
    protocol: str
    mix: str
    """The adapters, the most popular one first."""
    skew: float
    load: str
    requests: int
    errors: int
    input_tokens: float
    """Mean of the requests, as are the output's."""
    output_tokens: float
    req_s: float
    tok_s: float
    first_ms_p50: float | None
    first_ms_p90: float | None
    first_ms_p99: float | None
    next_ms_p50: float | None
    next_ms_p90: float | None
    next_ms_p99: float | None
    whole_ms_p50: float | None
    whole_ms_p90: float | None
    whole_ms_p99: float | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns: the exit status.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    _complete(parser, arguments)
    parameters = {"max_tokens": arguments.max_tokens, "ignore_eos": True}
    origin = Origin.now(arguments.way)
    try:
        way = _way(arguments, parameters)
        with _folder(arguments.keep) as folder, _server(arguments, way) as url:
            rows = list(_measure_all(arguments, way, parameters, url, folder))
    except (ManyloraError, ManyloraClientError, PerfAnalyzerError) as error:
        print(f"run: {error}", file=sys.stderr)
        return 1
    print(f"\n{format_table(rows)}")
    if arguments.save:
        append_csv(RESULTS / "perf_analyzer.csv", [_row(origin, arguments, way, *row) for row in rows])
    return 0


def _row(origin: Origin, arguments: argparse.Namespace, way: Way, load: str, figures: Figures) -> Row:
    spreads = {"first": figures.first_token, "next": figures.between_tokens, "whole": figures.latency}
    times: dict[str, Any] = {
        f"{name}_ms_p{percentile}": None if spread is None else getattr(spread, f"p{percentile}_ms")
        for name, spread in spreads.items()
        for percentile in (50, 90, 99)
    }
    return Row(
        **asdict(origin),
        model=way.model,
        protocol=way.protocol,
        mix=" ".join(arguments.adapters),
        skew=arguments.skew,
        load=load,
        requests=figures.num_requests,
        errors=figures.num_errors,
        input_tokens=figures.mean_input_tokens,
        output_tokens=figures.mean_output_tokens,
        req_s=figures.requests_per_s,
        tok_s=figures.tokens_per_s,
        **times,
    )


def _measure_all(
    arguments: argparse.Namespace, way: Way, parameters: dict[str, int | bool], url: str, folder: Path
) -> Iterator[tuple[str, Figures]]:
    adapter_ids = ["" if name == BASE_MODEL else name for name in arguments.adapters]
    # Says the version, and what it runs on.
    subprocess.run([arguments.perf_analyzer, "--version"], check=False)
    versions = _answer_once(url, way, adapter_ids)
    for number, load in enumerate(arguments.loads):
        entries = make_entries(
            adapter_ids,
            num_requests=arguments.requests,
            num_words=arguments.prompt_words,
            skew=arguments.skew,
            # Another seed for each load, or the second one would find its prompts in the prefix cache.
            seed=arguments.seed + number,
        )
        if number == 0:
            print(f"each load: {_describe(entries)}")
        level = profile(
            arguments.perf_analyzer,
            way,
            load,
            entries,
            parameters,
            url=url,
            folder=folder,
            timeout_s=arguments.timeout_s,
        )
        check(level, entries, versions, arguments.max_tokens)
        yield level.load, measure(level.requests)


def _answer_once(url: str, way: Way, adapter_ids: Sequence[str]) -> dict[str, str]:
    """Have every adapter loaded, and learn its version."""
    with Client(url, way.protocol) as client:
        return {
            name: client.generate("Hello", adapter_id=name, max_tokens=1).adapter_version
            for name in adapter_ids
        }


def _describe(entries: Sequence[Entry]) -> str:
    counts = Counter(entry.adapter_id or BASE_MODEL for entry in entries)
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def _way(arguments: argparse.Namespace, parameters: dict[str, int | bool]) -> Way:
    if arguments.way == "one-adapter":
        (name,) = arguments.adapters
        return one_adapter("" if name == BASE_MODEL else name, parameters)
    if arguments.way == "tensor-mix":
        return tensor_mix(arguments.model, arguments.protocol)
    return parameter_mix()


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@contextlib.contextmanager
def _server(arguments: argparse.Namespace, way: Way) -> Iterator[str]:
    """The address to ask at: the given one, or that of a server that runs as long as the block."""
    if arguments.url:
        yield arguments.url
        return
    settings = [f"--set=max_loras={max(8, len(arguments.adapters))}"]
    with running_server(
        base_model=arguments.base_model, adapter_root=arguments.adapter_root, arguments=settings
    ) as running:
        yield running.grpc if way.protocol == "grpc" else running.http


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    ways = parser.add_subparsers(dest="way", required=True, metavar="WAY")
    for name, text in WAYS.items():
        way = ways.add_parser(name, help=text, description=text)
        if name == "one-adapter":
            way.add_argument("--adapter", default="pirate", help=f"its name; {BASE_MODEL} is the base model")
        else:
            way.add_argument(
                "--adapters",
                type=words,
                help=f"names with commas, the most popular one first; {BASE_MODEL} is the base model; "
                "default: all of --adapter-root",
            )
            way.add_argument(
                "--skew",
                type=float,
                default=0.0,
                help="k-th adapter's share is 1/k^SKEW; 0: uniform, 1: Zipf",
            )
        if name == "tensor-mix":
            way.add_argument("--model", choices=("llm", "llm_stream"), default="llm")
            way.add_argument("--protocol", choices=("http", "grpc"), default="grpc")
        _add_common(way)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--url", help="host:port of a running one (of HTTP or gRPC, as the way needs)")
    add_base_model(server)
    server.add_argument("--adapter-root", type=Path, default=ROOT / "examples" / "adapters")
    load = parser.add_argument_group("load")
    either = load.add_mutually_exclusive_group()
    either.add_argument(
        "--concurrency", type=_numbers, default=[1, 4, 16], help="requests under way: N or N,N,..."
    )
    either.add_argument("--request-rate", type=_numbers, help="or requests per second")
    load.add_argument(
        "--arrivals", choices=("poisson", "constant"), default="poisson", help="with --request-rate"
    )
    load.add_argument("--requests", type=int, default=64, help="of each load")
    load.add_argument("--prompt-words", type=int, default=64, help="one token each with most tokenizers")
    load.add_argument("--max-tokens", type=int, default=32, help="of every answer")
    load.add_argument("--seed", type=int, default=0)
    add_save(parser, "perf_analyzer", "a row for each load")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep inputs and exports there")
    parser.add_argument(
        "--perf-analyzer", type=Path, default=COMMAND, help="default: what install.py fetched"
    )
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="of each load")


def _numbers(text: str) -> list[float]:
    return [float(word) for word in words(text)]


def _complete(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Fill in what depends on other options; end with a message where they do not fit together."""
    if arguments.request_rate:
        arguments.loads = [
            Load(kind="request rate", value=value, arrivals=arguments.arrivals)
            for value in arguments.request_rate
        ]
    else:
        arguments.loads = [Load(kind="concurrency", value=value) for value in arguments.concurrency]
    if arguments.way == "one-adapter":
        arguments.adapters, arguments.skew = [arguments.adapter], 0.0
    elif arguments.adapters is None:
        found = sorted(path.parent.name for path in arguments.adapter_root.glob("*/adapter_config.json"))
        arguments.adapters = found or parser.error(f"{arguments.adapter_root} holds no adapters")
    if not arguments.perf_analyzer.is_file():
        parser.error(f"{arguments.perf_analyzer} is missing: run python bench/perf_analyzer/install.py")
    if arguments.prompt_words < MIN_WORDS:
        parser.error(f"--prompt-words: got {arguments.prompt_words}, allowed is {MIN_WORDS} or more")
    for load in arguments.loads:
        if load.value <= 0:
            parser.error(f"{load.kind}: got {load.value:g}, allowed is above 0")
        if load.kind == "concurrency" and (load.value % 1 or load.value > arguments.requests):
            parser.error(f"--concurrency: got {load.value:g}, allowed is a whole number up to --requests")


if __name__ == "__main__":
    sys.exit(main())
