"""Read what perf_analyzer exports and print one table.

    python bench/perf_analyzer/report.py EXPORT.json ...

perf_analyzer's own summary knows neither tokens nor times between them, and divides by a window that it ends
up to some seconds late. All of it stands in the file of `--profile-export-file`: when each request left, when
each reply came, and what it held.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


class ExportError(ValueError):
    """A file is no export of perf_analyzer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """One reply that held something."""

    time_ns: int
    num_tokens: int
    """New in this reply."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request and all that came back."""

    start_ns: int
    prompt: str
    """Empty where the input is no text."""
    replies: tuple[Reply, ...]
    end_ns: int
    """When the last reply came, or that there was none: `start_ns`."""
    num_input_tokens: int
    adapter_version: str
    error: str
    """What went wrong; empty for a whole answer."""

    @property
    def num_tokens(self) -> int:
        return sum(reply.num_tokens for reply in self.replies)


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """What was measured under one load."""

    load: str
    requests: tuple[Request, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Percentiles, in milliseconds."""

    p50_ms: float
    p90_ms: float
    p99_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """One row of the table. Tokens and times are of whole answers; None where the export cannot tell."""

    num_requests: int
    num_errors: int
    mean_input_tokens: float
    mean_output_tokens: float
    requests_per_s: float
    tokens_per_s: float
    first_token: Spread | None
    between_tokens: Spread | None
    latency: Spread | None


def read_export(path: Path) -> list[Level]:
    """Read a file of `--profile-export-file`.

    Raises:
        ExportError: it is none.
    """
    # A character of several bytes that arrived in two pieces is exported so, and neither is UTF-8.
    text = path.read_bytes().decode(errors="surrogateescape")
    try:
        experiments = json.loads(text)["experiments"]
        return [
            Level(
                load=f"{found['experiment']['mode'].replace('_', ' ')} {found['experiment']['value']:g}",
                requests=tuple(_request(record) for record in found["requests"]),
            )
            for found in experiments
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{path.name}: not an export of perf_analyzer ({error!r})") from error


def _request(record: Mapping[str, Any]) -> Request:
    replies: list[Reply] = []
    num_tokens, num_input_tokens, version, finish, problem = 0, 0, "", True, ""
    end_ns = int(record["timestamp"])
    for time_ns, fields in _replies(record):
        end_ns = time_ns
        if "error" in fields:
            problem = str(fields["error"])
            continue
        total = _total_tokens(fields, num_tokens)
        replies.append(Reply(time_ns=time_ns, num_tokens=total - num_tokens))
        num_tokens = total
        num_input_tokens = sum(_values(fields.get("num_input_tokens", 0)))
        version = str(fields.get("adapter_version", ""))
        finish = all(_values(fields.get("finish_reason", True)))
    if not replies:
        problem = problem or "no reply"
    elif not finish:
        problem = problem or "the last reply has no finish_reason"
    return Request(
        start_ns=int(record["timestamp"]),
        prompt=_prompt(record.get("request_inputs", {})),
        replies=tuple(replies),
        end_ns=end_ns,
        num_input_tokens=num_input_tokens,
        adapter_version=version,
        error=problem,
    )


def _replies(record: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """When each reply came, and its outputs by name."""
    times = record["response_timestamps"]
    outputs = record.get("response_outputs")
    if outputs is None:
        yield from ((time_ns, {}) for time_ns in times)
        return
    pieces = ""
    for time_ns, output in zip(times, outputs, strict=True):
        if set(output) == {"response"}:
            # HTTP bodies are exported as they arrived: several events at once, or part of one.
            *events, pieces = (pieces + output["response"]).split("\n\n")
            yield from ((time_ns, _event(event)) for event in events)
        elif output:
            yield time_ns, output
    if pieces.strip():
        yield times[-1], _event(pieces)


def _event(text: str) -> Mapping[str, Any]:
    """One server-sent event, or a whole body of `/generate`."""
    try:
        fields = json.loads(text.strip().removeprefix("data:"))
    except ValueError:
        return {"error": f"not JSON: {text[:80]!r}"}
    return fields if isinstance(fields, dict) else {"error": f"not an object: {text[:80]!r}"}


def _total_tokens(fields: Mapping[str, Any], so_far: int) -> int:
    """How many tokens have come with this reply and those before it."""
    if "num_output_tokens" in fields:
        return int(sum(_values(fields["num_output_tokens"])))
    if "output_ids" in fields:
        return so_far + len([token_id for token_id in _values(fields["output_ids"]) if token_id >= 0])
    return so_far + 1


def _values(exported: Any) -> list[Any]:
    """A tensor's values. One with a single element is exported without a list."""
    return exported if isinstance(exported, list) else [exported]


def _prompt(inputs: Mapping[str, Any]) -> str:
    if "payload" in inputs:
        inputs = json.loads(inputs["payload"])
    text = inputs.get("text_input", "")
    return text if isinstance(text, str) else ""


def measure(requests: Sequence[Request]) -> Figures:
    """Turn one load's requests into one row."""
    whole = [request for request in requests if not request.error]
    first_ns = min((request.start_ns for request in requests), default=0)
    elapsed_s = (max((request.end_ns for request in requests), default=0) - first_ns) / 1e9
    num_tokens = sum(request.num_tokens for request in whole)
    # Where every answer of several tokens came in one piece, its first token's time is not to be seen.
    streamed = any(len(request.replies) > 1 for request in whole)
    streamed = streamed or all(request.num_tokens <= 1 for request in whole)
    first_ns_of = [_first_token_ns(request) for request in whole if request.num_tokens] if streamed else []
    gaps_ns = list(itertools.chain.from_iterable(map(_gaps_ns, whole))) if streamed else []
    return Figures(
        num_requests=len(requests),
        num_errors=len(requests) - len(whole),
        mean_input_tokens=_ratio(sum(request.num_input_tokens for request in whole), len(whole)),
        mean_output_tokens=_ratio(num_tokens, len(whole)),
        requests_per_s=_ratio(len(whole), elapsed_s),
        tokens_per_s=_ratio(num_tokens, elapsed_s),
        first_token=_spread(first_ns_of),
        between_tokens=_spread(gaps_ns),
        latency=_spread([request.end_ns - request.start_ns for request in whole]),
    )


def _first_token_ns(request: Request) -> int:
    return next(reply.time_ns for reply in request.replies if reply.num_tokens) - request.start_ns


def _gaps_ns(request: Request) -> list[float]:
    """The time between each token and the one before. Tokens of one reply share its gap in equal parts."""
    with_tokens = [reply for reply in request.replies if reply.num_tokens]
    gaps: list[float] = []
    for before, reply in itertools.pairwise(with_tokens):
        gaps += [(reply.time_ns - before.time_ns) / reply.num_tokens] * reply.num_tokens
    return gaps


def _spread(times_ns: Sequence[float]) -> Spread | None:
    if not times_ns:
        return None
    p50, p90, p99 = np.percentile(np.asarray(times_ns, dtype=np.float64) / 1e6, [50, 90, 99]).tolist()
    return Spread(p50_ms=p50, p90_ms=p90, p99_ms=p99)


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def format_table(rows: Sequence[tuple[str, Figures]]) -> str:
    """A row for each load, 110 columns wide while labels have at most 17 characters."""
    width = max([17, *(len(label) for label, _ in rows)])
    names = f"{'load':<{width}}{'reqs':>5}{'errs':>5}{'in':>5}{'out':>5}{'req/s':>7}{'tok/s':>8}"
    spreads = ("first token ms", "between tokens ms", "latency ms")
    lines = [
        " " * len(names) + "".join(f"{title:>21}" for title in spreads),
        names + f"{'p50':>7}{'p90':>7}{'p99':>7}" * len(spreads),
    ]
    for label, row in rows:
        numbers = f"{row.num_requests:>5}{row.num_errors:>5}"
        numbers += f"{row.mean_input_tokens:>5.0f}{row.mean_output_tokens:>5.0f}"
        numbers += f"{row.requests_per_s:>7.2f}{row.tokens_per_s:>8.1f}"
        cells = (_cells(spread) for spread in (row.first_token, row.between_tokens, row.latency))
        lines.append(f"{label:<{width}}{numbers}{''.join(cells)}")
    return "\n".join(lines)


def _cells(spread: Spread | None) -> str:
    if spread is None:
        return f"{'-':>7}" * 3
    values = (spread.p50_ms, spread.p90_ms, spread.p99_ms)
    return "".join(f"{value:>7.1f}" if value < 1000 else f"{value:>7.0f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what perf_analyzer measured.")
    parser.add_argument("exports", nargs="+", type=Path, metavar="EXPORT.json")
    arguments = parser.parse_args()
    rows: list[tuple[str, Figures]] = []
    errors: list[str] = []
    for path in arguments.exports:
        try:
            levels = read_export(path)
        except (OSError, ExportError) as error:
            parser.exit(1, f"report: {error}\n")
        for level in levels:
            label = level.load if len(arguments.exports) == 1 else f"{path.stem}: {level.load}"
            rows.append((label, measure(level.requests)))
            errors += [f"{label}: {request.error}" for request in level.requests if request.error]
    print(format_table(rows))
    for line in sorted(set(errors)):
        print(line)


if __name__ == "__main__":
    main()
