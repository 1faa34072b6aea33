"""The goals, and whether the rows of a run meet them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtest.origin import Origin

from gpu import forms, part_exposed, part_model
from gpu.rows import Row
from gpu.shapes import GOAL_POINTS, POOL_RANK_POINTS, Point

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"
_MANY, _WIDE, _ONE, _LONG = GOAL_POINTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict(Origin):
    """A row of bench/results/gpu_goals.csv."""

    goal: str
    wanted: str
    floor: str
    found: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked, and how it is read from rows."""

    title: str
    wanted: str
    found: Callable[[Sequence[Row]], tuple[str, bool] | None]
    """What was found and whether it will do; None: the rows do not say."""
    floor: Callable[[Sequence[Row]], str] = lambda rows: ""
    is_of_time: bool = True


def judge(rows: Sequence[Row], *, timed: bool = True) -> list[tuple[str, str, str, str, str]]:
    """Each goal's title, what is wanted, its floor, what was found, and the verdict.

    Args:
        timed: whether the rows' times mean anything.
    """
    verdicts = []
    for goal in GOALS:
        found = goal.found(rows) if timed or not goal.is_of_time else None
        text, will_do = ("", False) if found is None else found
        verdict = NOT_MEASURED if found is None else MET if will_do else NOT_MET
        verdicts.append((goal.title, goal.wanted, goal.floor(rows) if timed else "", text, verdict))
    return verdicts


def _at(rows: Sequence[Row], part: str, form: str, point: Point) -> Row | None:
    """The measured row of a form at a point."""
    key = (point.num_rows, point.num_adapters, point.rank_name, point.pool_rank)
    for row in rows:
        if (row.part, row.form) == (part, form) and row.median_us is not None:
            same = (row.rows, row.adapters, row.rank, row.pool_rank) == key
            if same and row.skewed == int(point.skewed) and row.base_share == point.base_share:
                return row
    return None


def _layer(point: Point, limit_us: float) -> Callable[[Sequence[Row]], tuple[str, bool] | None]:
    def found(rows: Sequence[Row]) -> tuple[str, bool] | None:
        row = _at(rows, "kernels", forms.OURS, point)
        if row is None or row.median_us is None:
            return None
        return f"{row.median_us:.1f} us", row.median_us <= limit_us

    return found


def _floor(point: Point) -> Callable[[Sequence[Row]], str]:
    def floor(rows: Sequence[Row]) -> str:
        row = _at(rows, "kernels", forms.OURS, point)
        return "" if row is None or row.floor_us is None else f"{row.floor_us:.1f} us"

    return floor


def _exposed(rows: Sequence[Row]) -> tuple[str, bool] | None:
    """The better of the two ways to place shrink, since the engine may take either."""
    names = (part_exposed.BESIDE, part_exposed.IN_TURN)
    extras = {
        row.form: row.extra_us
        for row in (_at(rows, "exposed", name, _ONE) for name in names)
        if row is not None and row.extra_us is not None
    }
    if not extras:
        return None
    best = min(extras, key=lambda name: extras[name])
    return f"{extras[best]:.1f} us ({best.removeprefix('manylora, ')})", extras[best] <= 6


def _against(peers: Sequence[str]) -> Callable[[Sequence[Row]], tuple[str, bool] | None]:
    """At each point the best of the peers, over ours."""

    def found(rows: Sequence[Row]) -> tuple[str, bool] | None:
        ratios: list[float] = []
        for mine in _kernel_rows(rows):
            theirs = [
                row.median_us
                for row in rows
                if row.part == "kernels" and row.form in peers and row.median_us and _same_step(row, mine)
            ]
            ours = [
                row.median_us
                for row in rows
                if row.part == "kernels"
                and row.form in (forms.OURS, forms.ONE_ADAPTER)
                and row.median_us
                and _same_step(row, mine)
            ]
            if theirs and ours:
                ratios.append(min(theirs) / min(ours))
        if not ratios:
            return None
        slower, median = sum(ratio < 1 for ratio in ratios), statistics.median(ratios)
        text = f"slower at {slower} of {len(ratios)} points; {median:.2f} times faster in the median"
        return text, slower == 0 and median >= 1.5

    return found


def _kernel_rows(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if (row.part, row.form) == ("kernels", forms.OURS) and row.median_us]


def _same_step(one: Row, other: Row) -> bool:
    def step(row: Row) -> tuple[object, ...]:
        return row.rows, row.adapters, row.rank, row.pool_rank, row.skewed, row.base_share

    return step(one) == step(other)


def _pool_rank(rows: Sequence[Row]) -> tuple[str, bool] | None:
    high, low = (_at(rows, "pool rank", forms.OURS, point) for point in POOL_RANK_POINTS)
    if high is None or low is None or high.median_us is None or low.median_us is None:
        return None
    ratio = high.median_us / low.median_us
    return f"{100 * (ratio - 1):+.1f}%", ratio <= 1.10


def _prefill(names: Sequence[str], limit: float) -> Callable[[Sequence[Row]], tuple[str, bool] | None]:
    """The least of the forms' extra, as a share of the base."""

    def found(rows: Sequence[Row]) -> tuple[str, bool] | None:
        base = _at(rows, "exposed", part_exposed.BASE, _LONG)
        if base is None or base.median_us is None:
            return None
        extras = {
            row.form: row.extra_us / base.median_us
            for row in (_at(rows, "exposed", name, _LONG) for name in names)
            if row is not None and row.extra_us is not None
        }
        if not extras:
            return None
        best = min(extras, key=lambda name: extras[name])
        return f"{100 * extras[best]:.1f}% ({best.removeprefix('manylora, ')})", extras[best] <= limit

    return found


def _decode(mix: int, limit: float) -> Callable[[Sequence[Row]], tuple[str, bool] | None]:
    def found(rows: Sequence[Row]) -> tuple[str, bool] | None:
        said = []
        for row in rows:
            if (row.part, row.rows, row.adapters) == ("decode", 32, mix) and row.median_us and row.floor_us:
                said.append((row.form, row.median_us / row.floor_us))
        mine = dict(said)
        if part_model.ENGINE not in mine:
            return None
        text = ", ".join(f"{ratio:.2f} ({form})" for form, ratio in said)
        return text, mine[part_model.ENGINE] <= limit

    return found


def _copy(rows: Sequence[Row]) -> tuple[str, bool] | None:
    ratios = [
        row.median_us / row.floor_us for row in rows if row.part == "copy" and row.median_us and row.floor_us
    ]
    return (f"{max(ratios):.2f} at most, {len(ratios)} sorts", max(ratios) <= 1.2) if ratios else None


def _correct(rows: Sequence[Row]) -> tuple[str, bool] | None:
    mine = [row for row in rows if row.form.startswith("manylora") and row.result]
    checked = [row for row in mine if row.error is not None]
    bad = [row for row in mine if row.is_bad]
    if not checked and not bad:
        return None
    worst = max((row.error or 0.0 for row in checked), default=0.0)
    return f"{len(checked)} checks, largest error {worst:.1e}; {len(bad)} wrong", not bad


def _proofs(rows: Sequence[Row]) -> tuple[str, bool] | None:
    mine = [row for row in rows if row.part == "proofs"]
    bad = [row.form for row in mine if row.is_bad]
    return (f"{len(mine)} proofs; not held: {', '.join(bad) or 'none'}", not bad) if mine else None


_UNFUSED = (part_exposed.IN_TURN, forms.ONE_ADAPTER)
GOALS = (
    Goal("decode, 32 rows, 32 adapters, rank 16, a layer", "30 us or less", _layer(_MANY, 30), _floor(_MANY)),
    Goal(
        "decode, 64 rows, 64 adapters, rank 64, a layer", "200 us or less", _layer(_WIDE, 200), _floor(_WIDE)
    ),
    Goal("decode, 32 rows of one adapter, exposed a layer", "6 us or less", _exposed, _floor(_ONE)),
    Goal("against vLLM's kernels", "never slower, 1.5 times faster in the median", _against([forms.VLLM])),
    Goal("against SGLang's best", "never slower, 1.5 times faster in the median", _against(forms.SGLANG)),
    Goal("32 adapters of rank 8, pool of rank 64 against one of rank 16", "within 10%", _pool_rank),
    Goal("prefill, 8,192 rows of one adapter, of the base", "12% or less", _prefill(_UNFUSED, 0.12)),
    Goal("the same, fused", "6% or less", _prefill([part_exposed.FUSED], 0.06)),
    Goal("decode step, 32 rows, base only, over weight bytes", "1.25 times or less", _decode(0, 1.25)),
    Goal("the same with 32 adapters of rank 16", "1.35 times or less", _decode(32, 1.35)),
    Goal("adapter host to device, over a pinned copy", "1.2 times or less", _copy),
    Goal("right against float64, in every form and at every point", "all", _correct, is_of_time=False),
    Goal("the same bits in every run; a row alone as in its batch", "all", _proofs, is_of_time=False),
)
