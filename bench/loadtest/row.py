"""One line of results: one target on one case, as the table shows it and the CSV keeps it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from bench.loadtest.origin import Origin
from bench.loadtest.record import Round
from bench.loadtest.workload import Case

PERCENTILES = (50, 90, 99)
COUNTERS = ("steps", "host_loads", "device_copies", "preemptions", "prefix_hit_tokens")
"""Of the engine's counters, those that say whether a run was what it was meant to be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting(Origin):
    """What all rows of one run share."""

    model: str
    dtype: str
    rank: str
    skew: str
    requests: int
    prompt: str
    output: str
    seed: int
    options: str
    """Settings of the engine that are not the benchmark's own, KEY=VALUE."""
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Setting):
    """A setting, a case, a target and what was measured. None where it was not."""

    target: str
    mix: str
    """base or mixed"""
    adapters: int
    arrival: str
    """at-once, poisson or closed"""
    rate_per_s: float
    clients: int
    req_s: float
    tok_s: float
    """Median of the rounds; the least and the most follow."""
    tok_s_min: float
    tok_s_max: float
    vs_base: float | None
    """Tokens a second over the base model's by the same target, round by round: median, least, most."""
    vs_base_min: float | None
    vs_base_max: float | None
    vs_first: float | None
    """The same over the run's first target's on the same case."""
    vs_first_min: float | None
    vs_first_max: float | None
    ttft_ms_p50: float | None
    ttft_ms_p90: float | None
    ttft_ms_p99: float | None
    itl_ms_p50: float | None
    itl_ms_p90: float | None
    itl_ms_p99: float | None
    e2e_ms_p50: float | None
    e2e_ms_p90: float | None
    e2e_ms_p99: float | None
    errors: int
    error_codes: str
    """CODE=COUNT, separated by spaces."""
    steps: int | None
    host_loads: int | None
    device_copies: int | None
    preemptions: int | None
    prefix_hit_tokens: int | None

    @property
    def load_label(self) -> str:
        """The arrival process, for tables."""
        if self.arrival == "poisson":
            return f"{self.rate_per_s:g}/s"
        return f"{self.clients} client{'s' * (self.clients != 1)}" if self.arrival == "closed" else "at once"

    @property
    def mix_label(self) -> str:
        """The adapters, for tables."""
        return f"{self.adapters} adapter{'s' * (self.adapters > 1)}" if self.adapters else "base"


def percentiles_ms(values_s: Sequence[float]) -> tuple[float | None, ...]:
    """The 50th, 90th and 99th percentile of seconds, in milliseconds; None where there are no values."""
    if not values_s:
        return (None,) * len(PERCENTILES)
    return tuple(float(value) * 1000 for value in np.percentile(values_s, PERCENTILES))


def ratio(upper: Sequence[Round], lower: Sequence[Round] | None) -> tuple[float | None, ...]:
    """Tokens a second of one over another, round by round: neighbours in time are what compares.

    Returns:
        Median, least and most; None where there is nothing to compare with.
    """
    pairs = [(one.tokens_per_s, other.tokens_per_s) for one, other in zip(upper, lower or (), strict=False)]
    found = [one / other for one, other in pairs if other]
    return (statistics.median(found), min(found), max(found)) if found else (None, None, None)


def make_row(
    setting: Setting,
    target: str,
    case: Case,
    rounds: Sequence[Round],
    *,
    base: Sequence[Round] | None = None,
    first: Sequence[Round] | None = None,
) -> Row:
    """Summarise a target's rounds on a case: rates by round, latencies of all requests together.

    Args:
        base: the target's rounds on the base model, if they are others.
        first: the first target's rounds on this case, if they are others.
    """
    answered = [record for one in rounds for record in one.records if not record.error]
    firsts = [wait for record in answered if (wait := record.first_token_s()) is not None]
    gaps = [gap for record in answered for gap in record.between_tokens_s()]
    measured: dict[str, float | int | None] = {}
    for name, values in (("ttft", firsts), ("itl", gaps), ("e2e", [r.latency_s for r in answered])):
        for percentile, value in zip(PERCENTILES, percentiles_ms(values), strict=True):
            measured[f"{name}_ms_p{percentile}"] = value
    for name, others in (("vs_base", base), ("vs_first", first)):
        for suffix, found in zip(("", "_min", "_max"), ratio(rounds, others), strict=True):
            measured[name + suffix] = found
    rates = [one.tokens_per_s for one in rounds]
    errors: Counter[str] = sum((one.errors() for one in rounds), Counter())
    has_counters = all(one.counters for one in rounds)
    for name in COUNTERS:
        measured[name] = sum(one.counters.get(name, 0) for one in rounds) if has_counters else None
    return Row(
        **asdict(setting),
        target=target,
        mix=case.mix,
        adapters=case.num_adapters,
        arrival=case.arrival.kind,
        rate_per_s=case.arrival.rate_per_s,
        clients=case.arrival.num_clients,
        req_s=statistics.median(one.requests_per_s for one in rounds),
        tok_s=statistics.median(rates),
        tok_s_min=min(rates),
        tok_s_max=max(rates),
        errors=errors.total(),
        error_codes=" ".join(f"{code}={count}" for code, count in sorted(errors.items())),
        **measured,  # type: ignore[arg-type]  # by name
    )
