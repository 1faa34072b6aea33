"""The three ways to have perf_analyzer name adapters, and one run of it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.perf_analyzer.inputs import Entry, text_only, with_body, with_tensor
from bench.perf_analyzer.report import Level, read_export

Protocol = Literal["http", "grpc"]
Parameters = Mapping[str, int | bool]


class PerfAnalyzerError(Exception):
    """perf_analyzer failed, or measured something else than it was asked to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How requests reach the server."""

    model: str
    protocol: Protocol
    flags: tuple[str, ...]
    """Of perf_analyzer, besides those that every way has."""
    write: Callable[[Sequence[Entry], Parameters], str]
    """Makes perf_analyzer's input file."""


def one_adapter(adapter_id: str, parameters: Parameters) -> Way:
    """A gRPC stream per request; the adapter is a request parameter, the same in the whole run."""
    given = {**parameters, "adapter_id": adapter_id} if adapter_id else parameters
    types = {bool: "bool", int: "int", str: "string"}
    flags = ["--streaming"]
    for name, value in given.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        flags += ["--request-parameter", f"{name}:{text}:{types[type(value)]}"]
    return Way(
        model="llm_stream",
        protocol="grpc",
        flags=tuple(flags),
        write=lambda entries, _: text_only(entries),
    )


def tensor_mix(model: str, protocol: Protocol) -> Way:
    """Each request names its adapter in the tensor `sampling_parameters`.

    Raises:
        PerfAnalyzerError: perf_analyzer has no streams over HTTP here.
    """
    is_stream = model == "llm_stream"
    if is_stream and protocol == "http":
        raise PerfAnalyzerError("tensor-mix streams over gRPC only: --model llm_stream needs --protocol grpc")
    return Way(model=model, protocol=protocol, flags=("--streaming",) if is_stream else (), write=with_tensor)


def parameter_mix() -> Way:
    """Each request is a POST to `/generate_stream` with parameters of its own."""
    model = "llm_stream"
    endpoint = f"v2/models/{model}/generate_stream"
    return Way(
        model=model,
        protocol="http",
        # What perf_analyzer calls OpenAI's service takes any endpoint and any body.
        flags=("--service-kind", "openai", "--endpoint", endpoint),
        write=with_body,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """How requests arrive."""

    kind: Literal["concurrency", "request rate"]
    """So many under way at any time; or so many a second."""
    value: float
    arrivals: Literal["poisson", "constant"] = "poisson"
    """Of a request rate: at random times, or at even ones."""

    @property
    def flags(self) -> list[str]:
        if self.kind == "concurrency":
            return ["--concurrency-range", f"{self.value:g}"]
        return ["--request-rate-range", f"{self.value:g}", "--request-distribution", self.arrivals]

    @property
    def slug(self) -> str:
        return f"{self.kind.replace(' ', '_')}_{self.value:g}"


def profile(
    command: Path,
    way: Way,
    load: Load,
    entries: Sequence[Entry],
    parameters: Parameters,
    *,
    url: str,
    folder: Path,
    timeout_s: float,
) -> Level:
    """Run perf_analyzer once: every entry is sent once.

    Args:
        command: perf_analyzer.
        url: host:port of the way's protocol.
        folder: takes its input, its export and what it printed.

    Raises:
        PerfAnalyzerError: it failed. It gives up at the first request that fails, and exports nothing then.
    """
    data, export = folder / f"{load.slug}.input.json", folder / f"{load.slug}.json"
    data.write_text(way.write(entries, parameters))
    words = [str(command), "-m", way.model, "-u", url, "-i", way.protocol, "--async", *way.flags]
    words += ["--input-data", str(data), *load.flags, "--request-count", str(len(entries))]
    words += ["--profile-export-file", str(export)]
    print(f"$ {shlex.join(words)}", flush=True)
    try:
        done = subprocess.run(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise PerfAnalyzerError(f"perf_analyzer was not done after {timeout_s:g} s") from error
    (folder / f"{load.slug}.log").write_text(done.stdout)
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.strip()]
        raise PerfAnalyzerError(
            "\n  ".join([f"perf_analyzer ended with status {done.returncode}:", *said[-4:]])
        )
    try:
        (level,) = read_export(export)
    except (OSError, ValueError) as error:
        raise PerfAnalyzerError(f"perf_analyzer's export cannot be read: {error}") from error
    return level


def check(level: Level, entries: Sequence[Entry], versions: Mapping[str, str], max_tokens: int) -> None:
    """Compare what was measured with what was asked for: each request, its adapter, its number of tokens.

    Args:
        versions: by adapter id.

    Raises:
        PerfAnalyzerError: they differ.
    """
    if sorted(request.prompt for request in level.requests) != sorted(entry.prompt for entry in entries):
        raise PerfAnalyzerError(
            f"sent {len(entries)} requests, the export's {len(level.requests)} are others"
        )
    adapters = {entry.prompt: entry.adapter_id for entry in entries}
    for request in level.requests:
        adapter_id = adapters[request.prompt]
        if request.error:
            continue
        if request.adapter_version != versions[adapter_id]:
            raise PerfAnalyzerError(
                f"adapter {adapter_id!r} has version {versions[adapter_id]!r}, "
                f"a request for it was answered by {request.adapter_version!r}"
            )
        if request.num_tokens != max_tokens:
            raise PerfAnalyzerError(f"an answer has {request.num_tokens} tokens, asked for {max_tokens}")
