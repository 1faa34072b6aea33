"""The goals, and whether the rows of a run meet them.

A goal is met only by all the rows that a whole run has for it; one that misses it is enough for "not met".
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.gpu import forms, names, part_copy, part_exposed, part_kernels
from bench.gpu.rows import Row
from bench.gpu.shapes import COMPARED_POINTS, GOAL_POINTS, POOL_RANK_POINTS, Point

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"
GOALS_DEVICE = "H200"
"""That microseconds are asked of; ratios are asked of every device."""
_MANY, _WIDE, _ONE, _LONG = GOAL_POINTS
Check = tuple[str, str, Point]
"""A part, a form of ours and a point, whose result is compared with float64."""
CHECKED: tuple[Check, ...] = (
    *((part_kernels.ALONE, forms.OURS, point) for point in GOAL_POINTS),
    *((part_kernels.KERNELS, forms.OURS, point) for point in COMPARED_POINTS),
    *((part_exposed.PART, part_exposed.IN_TURN, point) for point in part_exposed.POINTS),
)
"""In a whole run."""


@dataclass(frozen=True, slots=True)
class Whole:
    """What a whole run has."""

    num_proofs: int
    compared: tuple[Point, ...] = COMPARED_POINTS
    checked: tuple[Check, ...] = CHECKED
    num_copies: int = part_copy.NUM_ROWS
    read: float = 0.0
    """Bytes a second that the device reads, as the run has found at last; 0: as each row's floor has it."""


Found = tuple[str, str] | None
"""What was found, and the verdict; None: the rows do not say."""
Finder = Callable[[Sequence[Row], Whole], Found]


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked, and how it is read from rows."""

    title: str
    wanted: str
    found: Finder
    floor: Callable[[Sequence[Row]], str] = lambda rows: ""
    is_of_time: bool = True
    is_absolute: bool = False
    """Whether it is in microseconds."""


def judge(rows: Sequence[Row], whole: Whole, *, timed: bool = True) -> list[tuple[str, str, str, str, str]]:
    """Each goal's title, what is wanted, its floor, what was found, and the verdict.

    Args:
        timed: whether the rows' times mean anything.
    """
    verdicts = []
    for goal in GOALS:
        found = goal.found(rows, whole) if timed or not goal.is_of_time else None
        text, verdict = ("", NOT_MEASURED) if found is None else found
        if found is not None and goal.is_absolute and GOALS_DEVICE not in rows[0].device:
            verdict = f"not judged: goals are for {GOALS_DEVICE}"
        verdicts.append((goal.title, goal.wanted, goal.floor(rows) if timed else "", text, verdict))
    return verdicts


def _verdict(will_do: bool, num_found: int = 1, num_wanted: int = 1) -> str:
    if not will_do:
        return NOT_MET
    return MET if num_found >= num_wanted else f"{NOT_MEASURED} ({num_found} of {num_wanted})"


def _key(row: Row) -> tuple[object, ...]:
    return row.rows, row.adapters, row.rank, row.pool_rank, row.skewed, row.base_share


def _key_of(point: Point) -> tuple[object, ...]:
    skewed = int(point.skewed)
    return point.num_rows, point.num_adapters, point.rank_name, point.pool_rank, skewed, point.base_share


def _at(rows: Sequence[Row], part: str, form: str, point: Point) -> Row | None:
    """The measured row of a form at a point."""
    for row in rows:
        if (row.part, row.form) == (part, form) and row.median_us is not None and _key(row) == _key_of(point):
            return row
    return None


def _dispatched(rows: Sequence[Row], part: str, form: str, point: Point) -> Row | None:
    """The measured row of the form that the engine takes: the vendor's products where they are for the step,
    whether they are faster or not."""
    for row in rows:
        if (row.part, row.form) == (part, forms.ONE_ADAPTER) and _key(row) == _key_of(point):
            return row if row.median_us is not None else None
    return _at(rows, part, form, point)


def _layer(point: Point, limit_us: float) -> Finder:
    def found(rows: Sequence[Row], _: Whole) -> Found:
        row = _at(rows, part_kernels.ALONE, forms.OURS, point)
        if row is None or row.median_us is None:
            return None
        return f"{row.median_us:.1f} us", _verdict(row.median_us <= limit_us)

    return found


def _floor(point: Point) -> Callable[[Sequence[Row]], str]:
    def floor(rows: Sequence[Row]) -> str:
        row = _at(rows, part_kernels.ALONE, forms.OURS, point)
        return "" if row is None or row.floor_us is None else f"{row.floor_us:.1f} us"

    return floor


def _exposed(rows: Sequence[Row], _: Whole) -> Found:
    """The worst of few rows, with shrink where the engine has it for so few."""
    points = part_exposed.DECODE_POINTS
    extras = [
        row.extra_us
        for point in points
        if (row := _at(rows, part_exposed.PART, part_exposed.BESIDE, point)) and row.extra_us is not None
    ]
    if not extras:
        return None
    text = f"{max(extras):.1f} us, the worst of {len(extras)} numbers of rows up to 32"
    return text, _verdict(max(extras) <= 6, len(extras), len(points))


def _against(peers: Sequence[str], needed: Sequence[str]) -> Finder:
    """At each point the best of the peers, over the form that the engine takes.

    Args:
        needed: of the peers, without which a point does not count.
    """

    def ratio_at(rows: Sequence[Row], point: Point) -> float | None:
        times = {
            row.form: row.median_us
            for row in rows
            if (row.part, _key(row)) == (part_kernels.KERNELS, _key_of(point)) and row.median_us is not None
        }
        mine = _dispatched(rows, part_kernels.KERNELS, forms.OURS, point)
        if mine is None or mine.median_us is None or not set(needed) <= set(times):
            return None
        return min(times[name] for name in peers if name in times) / mine.median_us

    def found(rows: Sequence[Row], whole: Whole) -> Found:
        ratios = [ratio for point in whole.compared if (ratio := ratio_at(rows, point)) is not None]
        if not ratios:
            return None
        slower, median = sum(ratio < 1 for ratio in ratios), statistics.median(ratios)
        text = f"slower at {slower} of {len(ratios)} points; {median:.2f} times faster in the median"
        if slower:
            return text, NOT_MET
        # A median of few points says nothing of that of all.
        num_wanted = len(whole.compared)
        will_do = median >= 1.5 or len(ratios) < num_wanted
        return text, _verdict(will_do, len(ratios), num_wanted)

    return found


def _pool_rank(rows: Sequence[Row], _: Whole) -> Found:
    high, low = (_at(rows, part_kernels.POOL_RANK, forms.OURS, point) for point in POOL_RANK_POINTS)
    if high is None or low is None or high.median_us is None or low.median_us is None:
        return None
    ratio = high.median_us / low.median_us
    return f"{100 * (ratio - 1):+.1f}%", _verdict(ratio <= 1.10)


def _prefill(form: str, limit: float, *, dispatched: bool) -> Finder:
    """A form's extra, as a share of the base's linears."""

    def found(rows: Sequence[Row], _: Whole) -> Found:
        base = _at(rows, part_exposed.PART, part_exposed.LINEARS, _LONG)
        row = (_dispatched if dispatched else _at)(rows, part_exposed.PART, form, _LONG)
        if base is None or base.median_us is None or row is None or row.extra_us is None:
            return None
        share = row.extra_us / base.median_us
        return f"{100 * share:.1f}% ({row.form.removeprefix('manylora, ')})", _verdict(share <= limit)

    return found


def _decode(mix: int, limit: float) -> Finder:
    def found(rows: Sequence[Row], whole: Whole) -> Found:
        mine = {
            row.form: row
            for row in rows
            if (row.part, row.rows, row.adapters) == ("decode", 32, mix) and row.median_us and row.floor_us
        }
        engine = mine.get(names.ENGINE)
        if engine is None:
            return None
        ratios = {form: _over_floor(row, whole) for form, row in mine.items()}
        text = ", ".join(f"{ratio:.2f} ({form})" for form, ratio in ratios.items())
        if names.REPLAYED_ALL not in engine.result:
            return text, f"{NOT_MEASURED}: steps were not replayed from graphs"
        return text, _verdict(ratios[names.ENGINE] <= limit)

    return found


def _over_floor(row: Row, whole: Whole) -> float:
    assert row.median_us is not None
    floor_us = row.floor_us or 0.0
    if whole.read and row.moved_bytes:
        floor_us = row.moved_bytes / whole.read * 1e6
    return row.median_us / floor_us


def _copy(rows: Sequence[Row], whole: Whole) -> Found:
    ratios = [
        row.median_us / row.floor_us for row in rows if row.part == "copy" and row.median_us and row.floor_us
    ]
    if not ratios:
        return None
    text = f"{max(ratios):.2f} at most, {len(ratios)} sorts"
    return text, _verdict(max(ratios) <= 1.2, len(ratios), whole.num_copies)


def _correct(rows: Sequence[Row], whole: Whole) -> Found:
    mine = [row for row in rows if row.form.startswith("manylora") and row.result]
    checked = [row for row in mine if row.error is not None]
    bad = [row for row in mine if row.is_bad]
    if not checked and not bad:
        return None
    at = {(row.part, row.form, _key(row)) for row in checked}
    wanted = {(part, form, _key_of(point)) for part, form, point in whole.checked}
    worst = max((row.error or 0.0 for row in checked), default=0.0)
    text = f"{len(checked)} checks, largest error {worst:.1e} of the term; {len(bad)} wrong"
    return text, _verdict(not bad, len(at & wanted), len(wanted))


def _proofs(rows: Sequence[Row], whole: Whole) -> Found:
    mine = [row for row in rows if row.part == "proofs"]
    if not mine:
        return None
    bad = [row.form for row in mine if row.is_bad]
    held = [row for row in mine if not row.result.startswith(("missing", "wrong", "failed"))]
    text = f"{len(held)} of {whole.num_proofs} held; not held: {', '.join(bad) or 'none'}"
    return text, _verdict(not bad, len(held), whole.num_proofs)


GOALS = (
    Goal(
        "decode, 32 rows, 32 adapters, rank 16, a layer",
        "30 us or less",
        _layer(_MANY, 30),
        _floor(_MANY),
        is_absolute=True,
    ),
    Goal(
        "decode, 64 rows, 64 adapters, rank 64, a layer",
        "200 us or less",
        _layer(_WIDE, 200),
        _floor(_WIDE),
        is_absolute=True,
    ),
    Goal(
        "decode, 1 to 32 rows of one adapter, exposed a layer",
        "6 us or less",
        _exposed,
        _floor(_ONE),
        is_absolute=True,
    ),
    Goal(
        "against vLLM's kernels",
        "never slower, 1.5 times faster in the median",
        _against([forms.VLLM], [forms.VLLM]),
    ),
    Goal(
        "against SGLang's best",
        "never slower, 1.5 times faster in the median",
        _against(forms.SGLANG, [forms.SGLANG_V2, forms.SGLANG_CSGMV]),
    ),
    Goal("32 adapters of rank 8, pool of rank 64 against one of rank 16", "within 10%", _pool_rank),
    Goal(
        "prefill, 8,192 rows of one adapter, of the base linears",
        "12% or less",
        _prefill(part_exposed.IN_TURN, 0.12, dispatched=True),
    ),
    Goal("the same, fused", "6% or less", _prefill(part_exposed.FUSED, 0.06, dispatched=False)),
    Goal("decode step, 32 rows, base only, over weight bytes", "1.25 times or less", _decode(0, 1.25)),
    Goal("the same with 32 adapters of rank 16", "1.35 times or less", _decode(32, 1.35)),
    Goal("adapter host to device, over a pinned copy", "1.2 times or less", _copy),
    Goal("right against float64, in every form and at every point", "all", _correct, is_of_time=False),
    Goal("the same bits in every run; a row alone as in its batch", "all", _proofs, is_of_time=False),
)
