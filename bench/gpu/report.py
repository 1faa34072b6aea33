"""Rows of gpu_suite.csv as tables for RESULTS.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.loadtest.table import Table

Line = Mapping[str, str]
_STEP = ("rows", "adapters", "rank", "pool_rank", "skewed", "base_share")
_DECODE_PARTS = ("decode", "prefill")


def sections(lines: Sequence[Line]) -> list[str]:
    """The tables of one run, each behind a sentence that says what it shows."""
    parts: list[str] = []
    for title, table in (
        (
            "Kernels: microseconds of a layer's four sites, median; of each form, at each step. Every one is "
            "right against float64 first.",
            kernels(lines, "kernels"),
        ),
        ("Ours alone, before any peer:", kernels(lines, "kernels alone")),
        ("The same step in a pool of a high and of a low rank:", kernels(lines, "pool rank")),
        (
            "What adapters add to a layer's base products, microseconds:",
            exposed(lines, "exposed"),
        ),
        ("The same, the peers in turn with ours:", exposed(lines, "exposed, with peers")),
        ("Steps of the whole model, microseconds:", model(lines)),
        (
            "Adapters to the device, microseconds; the floor is a plain copy of as many pinned bytes: "
            "those of rank 8 are filled up to pages of rank 16.",
            copies(lines),
        ),
        ("PEFT's mixed batch as it runs, microseconds a layer:", peft(lines)),
        ("Proofs:", proofs(lines)),
    ):
        if table.lines:
            parts += [f"{title}\n", table.markdown() + "\n"]
    missing = not_measured(lines)
    if missing:
        parts.append("Not measured:\n\n" + "".join(f"- {line}\n" for line in missing))
    return parts


def kernels(lines: Sequence[Line], part: str) -> Table:
    """A line for each step, a column for each form."""
    mine = [line for line in lines if line["part"] == part and line["median_us"]]
    forms = list(dict.fromkeys(line["form"] for line in mine))
    header = ["rows", "adapters", "rank", "pool rank", "rows by adapter", "without", "floor", *forms]
    found = []
    for step in dict.fromkeys(_step(line) for line in mine):
        here = {line["form"]: line for line in mine if _step(line) == step}
        rows, adapters, rank, pool_rank, skewed, base_share = step
        cells = [rows, adapters, rank, pool_rank, "Zipf" if skewed == "1" else "even"]
        cells += [f"{100 * float(base_share or 0):.0f}%", _us(next(iter(here.values()))["floor_us"])]
        found.append(cells + [_us(here[form]["median_us"]) if form in here else "-" for form in forms])
    return Table(header, found)


def exposed(lines: Sequence[Line], part: str) -> Table:
    """A line for each form at each step."""
    mine = [line for line in lines if line["part"] == part and line["median_us"]]
    return Table(
        ["rows", "adapters", "rank", "form", "layer", "least", "most", "added"],
        [
            [line["rows"], line["adapters"], line["rank"], line["form"], *_times(line), _us(line["extra_us"])]
            for line in mine
        ],
    )


def model(lines: Sequence[Line]) -> Table:
    """A line for each mix at each step."""
    mine = [line for line in lines if line["part"] in _DECODE_PARTS and line["median_us"]]
    return Table(
        ["step", "rows", "adapters", "form", "median", "least", "most", "floor", "over floor", "ran"],
        [
            [
                *(line[name] for name in ("part", "rows", "adapters", "form")),
                *_times(line),
                _us(line["floor_us"]),
                _over_floor(line),
                line["result"].removeprefix("ok").removeprefix("; "),
            ]
            for line in mine
        ],
    )


def copies(lines: Sequence[Line]) -> Table:
    """A line for each sort of adapter."""
    mine = [line for line in lines if line["part"] == "copy" and line["median_us"]]
    return Table(
        ["rank", "form", "median", "least", "most", "floor", "over floor"],
        [
            [line["rank"], line["form"], *_times(line), _us(line["floor_us"]), _over_floor(line)]
            for line in mine
        ],
    )


def peft(lines: Sequence[Line]) -> Table:
    """A line for each form."""
    mine = [line for line in lines if line["part"] == "peft" and line["median_us"]]
    return Table(
        ["rows", "adapters", "rank", "form", "median", "least", "most", "added"],
        [
            [line["rows"], line["adapters"], line["rank"], line["form"], *_times(line), _us(line["extra_us"])]
            for line in mine
        ],
    )


def proofs(lines: Sequence[Line]) -> Table:
    """A line for each proof."""
    mine = [line for line in lines if line["part"] == "proofs"]
    return Table(["part", "outcomes"], [[line["form"], line["result"]] for line in mine])


def not_measured(lines: Sequence[Line]) -> list[str]:
    """What has no time, and why: once for each form and reason."""
    said: dict[str, None] = {}
    for line in lines:
        if line["result"].startswith(("missing", "wrong", "failed")):
            said[f"{line['part']}, {line['form']}: {line['result']}"] = None
    return list(said)


def _step(line: Line) -> tuple[str, ...]:
    return tuple(line[name] for name in _STEP)


def _us(text: str) -> str:
    return f"{float(text):.1f}" if text else "-"


def _times(line: Line) -> list[str]:
    return [_us(line[name]) for name in ("median_us", "least_us", "most_us")]


def _over_floor(line: Line) -> str:
    if not line["median_us"] or not line["floor_us"]:
        return "-"
    return f"{float(line['median_us']) / float(line['floor_us']):.2f}"
