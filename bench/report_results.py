"""Write bench/RESULTS.md from the rows in bench/results.

    python bench/report_results.py            # after new rows
    python bench/report_results.py --check    # is the page what the rows give?

The page shows the latest run of each label of each CSV file. Nothing on it is written by hand.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from bench.arguments import make_parser
from bench.gpu import report as gpu_report
from bench.loadtest import table
from bench.loadtest.csv_file import read_csv
from bench.loadtest.origin import Origin
from bench.loadtest.row import Row
from bench.loadtest.table import Table
from bench.paths import RESULTS

PAGE = RESULTS.parent / "RESULTS.md"
COMMAND = "python bench/report_results.py"
ORIGIN = [field.name for field in fields(Origin)]
MAX_COLUMNS = 12
"""A single line with more of them is shown as a list."""
INTRO = f"""\
# Results

Written by `{COMMAND}` from the rows in `results/`: of each benchmark and label, the latest
run. Figures of one run compare. Figures of two runs need not: machines differ, and each one's speed drifts.
"""


@dataclass(frozen=True, slots=True)
class Kind:
    """One CSV file."""

    name: str
    title: str
    text: str


KINDS = (
    Kind(
        "serving",
        "Serving",
        "Many adapters on one base model: the engine by itself, behind Triton, and PEFT's `generate`, in "
        "turn in one run. Every target's tokens are compared before anything is timed.",
    ),
    Kind(
        "perf_analyzer",
        "perf_analyzer",
        "NVIDIA's load generator on a server, in the three ways it can name adapters. Times in milliseconds; "
        "a cell is empty where a way cannot show it.",
    ),
    Kind("profile", "One decode step", "Where its time goes, with the profiler's own cost."),
    Kind(
        "kernels_cpu",
        "CPU kernels",
        "The adapters' part of one step of SmolLM2-135M beside the base model's own products, each checked "
        "against the reference first. Milliseconds: median, least and most.",
    ),
    Kind(
        "gpu_goals",
        "GPU: the goals",
        "By `bench/gpu_suite.py`, on Llama-3-8B's shapes in bfloat16. Floors are of the bandwidth that the "
        "same run measures.",
    ),
    Kind(
        "gpu_suite",
        "GPU: kernels and steps",
        "Ours and the peers in turn in one run, each a CUDA graph over more layers than the caches hold; a "
        "pool is as wide as its widest adapter, which is the best case of peers that pad.",
    ),
    Kind(
        "faults",
        "Faults",
        "What 32 streams and 4 whole requests saw of each fault; seconds from the fault to the last answer "
        "or error, and to the next right answers.",
    ),
    Kind(
        "soak",
        "Soak",
        "Requests of all sorts from many clients over many adapters. Memory: MiB by which each process grows "
        "in 1,000 requests, over the last half.",
    ),
    Kind(
        "long_chats",
        "Long requests without end",
        "The worst wait of two clients that ask for 16 tokens, without and beside a third one that sends "
        "requests as large as they can be. The goal is at most three times.",
    ),
    Kind(
        "contention",
        "Beside busy processes",
        "Seconds of a batch of answers by an engine that waits in several ways, beside processes that do "
        "nothing but count.",
    ),
    Kind("hostile", "Hostile input", "Requests of a seeded grammar, and mutated adapters."),
)


class ResultsError(Exception):
    """Rows that cannot be shown."""


def page(directory: Path) -> str:
    """Make the page.

    Args:
        directory: of the CSV files and the plots.

    Raises:
        ResultsError: a file has other columns than this program knows.
    """
    plots = sorted(path.name for path in directory.glob("*.png"))
    parts = [INTRO]
    for kind in KINDS:
        path = directory / f"{kind.name}.csv"
        if path.is_file():
            parts.append(f"## {kind.title}\n\n{kind.text}\n")
            parts += _runs(path, kind, plots)
    if plots:
        parts.append("## Other plots\n")
        parts.append(_images(plots))
    known = {f"{kind.name}.csv" for kind in KINDS}
    unknown = sorted({path.name for path in directory.glob("*.csv")} - known)
    if unknown:
        names = ", ".join(f"`results/{name}`" for name in unknown)
        parts.append(f"## Other rows\n\nNot shown here: {names}.\n")
    if len(parts) == 1:
        parts.append("There are no rows yet.\n")
    return "\n".join(parts)


def _runs(path: Path, kind: Kind, plots: list[str]) -> list[str]:
    """The latest run of each label, with its plots, which are taken out of the list."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines or list(lines[0])[: len(ORIGIN)] != ORIGIN:
        raise ResultsError(f"{path}: expected rows whose first columns are {','.join(ORIGIN)}")
    try:
        rows = read_csv(path, Row) if kind.name == "serving" else []
    except ValueError as error:
        raise ResultsError(str(error)) from error
    parts = []
    for label in dict.fromkeys(line["label"] for line in lines):
        if not label:
            continue
        run = max(line["run"] for line in lines if line["label"] == label)
        chosen = [i for i, line in enumerate(lines) if (line["label"], line["run"]) == (label, run)]
        # A file that has one label is named after it.
        heading = "" if label == kind.name else f"### {label}\n\n"
        parts.append(f"{heading}{_origin(lines[chosen[0]])}\n")
        if rows:
            parts += _serving([rows[i] for i in chosen])
        elif kind.name == "gpu_suite":
            parts += gpu_report.sections([lines[i] for i in chosen])
        else:
            parts.append(_generic([lines[i] for i in chosen]).markdown() + "\n")
        mine = [name for name in plots if name.removesuffix(".png").split("_")[-1] == label]
        if mine:
            parts.append(_images(mine))
            plots[:] = [name for name in plots if name not in mine]
    return parts


def _origin(line: dict[str, str]) -> str:
    at = line["run"].replace("T", " ").removesuffix("+00:00")
    versions = [f"{name} {line[name]}" for name in ("python", "torch", "transformers", "peft") if line[name]]
    where = f"{line['device']}, {line['threads']} thread{'s' * (line['threads'] != '1')}"
    return f"`{line['command']}`\n\n{at} UTC, commit {line['commit']}, {where}; {', '.join(versions)}."


def _serving(rows: Sequence[Row]) -> list[str]:
    row = rows[0]
    text = (
        f"{row.model} ({row.dtype}); {row.requests} requests of {row.prompt} prompt and {row.output} output "
        f"tokens, rank {row.rank or '-'}, {row.skew} skew, {row.rounds} rounds. Rates are medians of the "
        f"rounds, with tokens a second of the worst and the best.\n"
    )
    parts = [text, table.throughput(rows).markdown() + "\n"]
    for title, found in (
        ("First token and time between tokens in ms, whole answer in s:", table.latency(rows)),
        ("Tokens a second compared, round by round:", table.ratios(rows)),
        ("What the engine counted, all rounds together:", table.counters(rows)),
    ):
        if found.lines:
            parts += [f"{title}\n", found.markdown() + "\n"]
    return parts


def _generic(lines: Sequence[dict[str, str]]) -> Table:
    """All columns but the origin's, as they are in the file."""
    names = [name for name in lines[0] if name not in ORIGIN]
    header = [name.replace("_", " ") for name in names]
    cells = [[line[name].replace("|", "\\|") for name in names] for line in lines]
    if len(cells) == 1 and len(names) > MAX_COLUMNS:
        return Table(["column", "value"], [list(pair) for pair in zip(header, cells[0], strict=True)])
    return Table(header, cells)


def _images(names: Sequence[str]) -> str:
    titles = [name.removesuffix(".png").replace("_", " ") for name in names]
    return "".join(f"![{title}](results/{name})\n" for title, name in zip(titles, names, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or look at it.

    Returns: the exit status.
    """
    parser = make_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if the page is old")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="of the rows and plots")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        wanted = page(arguments.results)
    except ResultsError as error:
        print(f"report_results.py: {error}", file=sys.stderr)
        return 1
    if not arguments.check:
        arguments.page.write_text(wanted)
    elif not arguments.page.is_file() or arguments.page.read_text() != wanted:
        print(f"{arguments.page.name} is not what the rows give; run {COMMAND}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
