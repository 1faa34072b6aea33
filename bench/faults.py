"""Puts every fault into a running server under load; prints what the clients saw and how long it took.

32 streams and 4 whole requests, over gRPC, on the base model and three adapters in turn. The same faults are
asserted, without times, by tests/server/test_faults_*.py.

    python bench/faults.py --save
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from manylora.serve.background import RunningServer, running_server

from bench.arguments import add_base_model, add_save, make_parser
from bench.campaigns.faults import base_weights, doors, files, freezing, scenarios
from bench.campaigns.faults.load import HUNG, WRONG, Bed, Report
from bench.campaigns.faults.silent_mount import may_mount
from bench.loadtest.csv_file import append_csv
from bench.loadtest.origin import Origin
from bench.paths import RESULTS
from examples.make_adapters import make_adapter

PROMISED_S = 2.0
"""Within which clients of a killed engine have their error."""
ADAPTERS = ("one", "two", "three")
EXTRA = "four"
IDLE_S = 120.0
"""Longer than a hung server is given."""
PUBLISHED = ("red", "green", "blue")
REWRITTEN_S = 60.0
MIN_TAKEN_UP = 20
SMALL = ("--set=max_waiting=4", "--set=max_num_seqs=4")
"""Of a server whose queue the load fills."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Origin):
    """What all clients saw of one fault, as bench/results/faults.csv keeps it."""

    fault: str
    outcomes: str
    last_end_s: float
    recovery_s: float


def faults(bed: Bed, root: Path, base_model: Path) -> list[Callable[[], Report]]:
    """In an order in which none disturbs the next.

    Args:
        root: the adapters that are served; like `base_model` they are harmed.
    """
    return [
        lambda: scenarios.adapter_files_change_while_serving(bed, root),
        lambda: scenarios.adapter_files_change_while_loading(bed, root, EXTRA),
        lambda: base_weights.rewritten_and_truncated(bed, base_model),
        lambda: scenarios.clients_leave(bed),
        lambda: scenarios.slow_reader(bed),
        lambda: scenarios.deadlines_pass(bed),
        lambda: doors.shared_memory_is_read_and_written(bed),
        lambda: doors.region_is_opened_by_others(bed),
        lambda: doors.body_is_huge(bed),
        lambda: doors.connections_are_idle(bed, hold_s=IDLE_S),
        lambda: doors.ports_are_taken(bed, base_model),
        lambda: scenarios.engine_killed(bed),
        lambda: scenarios.engine_stopped(bed),
        lambda: scenarios.engine_killed_while_it_loads(bed, root, EXTRA),
        lambda: scenarios.engine_killed_at_start(bed),
        lambda: scenarios.engine_out_of_memory(bed),
        lambda: scenarios.front_end_killed(bed, "llm"),
        lambda: scenarios.front_end_killed(bed, "llm_stream"),
        lambda: scenarios.front_end_stopped(bed, "llm_stream"),
        lambda: freezing.front_end_frozen(bed, "llm"),
        lambda: scenarios.tritonserver_killed(bed),
    ]


def faults_of_hung_disks(bed: Bed, root: Path) -> list[Callable[[], Report]]:
    """Only for those who may mount a file system that gives no answer."""
    if not may_mount():
        return []
    return [
        lambda: files.hung_directory(bed, root, EXTRA, num_reads=0),
        lambda: files.hung_directory(bed, root, EXTRA, num_reads=2),
        lambda: files.engine_killed_while_a_read_hangs(bed, root),
    ]


def rewritten(server: RunningServer, root: Path) -> Report:
    """One minute of an adapter that is rewritten in place.

    Raises:
        AssertionError: an answer is of a version that nobody has published, or hardly any was taken up.
    """
    done = files.rewritten_in_place(server, root, PUBLISHED, duration_s=REWRITTEN_S)
    assert not done.strays, f"versions that nobody has published: {done.strays}"
    assert done.num_taken_up >= MIN_TAKEN_UP, f"{done.num_taken_up} of {done.num_written} were taken up"
    return done.report


def faults_of_a_small_server(bed: Bed) -> list[Callable[[], Report]]:
    return [lambda: scenarios.queue_full(bed), lambda: scenarios.server_terminated(bed)]


def table(reports: list[Report]) -> str:
    """Markdown."""
    lines = ["| fault | clients saw | last of them after | right answers again after |", "|---|---|---|---|"]
    lines += [f"| {r.fault} | {outcomes(r)} | {r.last_end_s:.1f} s | {r.recovery_s:.1f} s |" for r in reports]
    return "\n".join(lines)


def run(faults: list[Callable[[], Report]], reports: list[Report]) -> None:
    for fault in faults:
        reports.append(fault())
        print(f"{reports[-1].fault}: {outcomes(reports[-1])}", file=sys.stderr, flush=True)


def outcomes(report: Report) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in report.outcomes.most_common())


def save(reports: list[Report], origin: Origin) -> None:
    """Append the reports to bench/results/faults.csv."""
    rows = [
        Row(
            **asdict(origin),
            fault=report.fault,
            outcomes=outcomes(report),
            last_end_s=report.last_end_s,
            recovery_s=report.recovery_s,
        )
        for report in reports
    ]
    append_csv(RESULTS / "faults.csv", rows)


def main() -> int:
    """Run all faults.

    Returns: 1 if a client hung or had a wrong answer, or a killed engine's clients waited for too long.
    """
    parser = make_parser(__doc__)
    add_base_model(parser)
    add_save(parser, "faults")
    options = parser.parse_args()
    origin = Origin.now("faults")
    reports: list[Report] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "adapters"
        for seed, name in enumerate((*ADAPTERS, EXTRA, *PUBLISHED)):
            make_adapter(root / name, options.base_model, rank=16, seed=seed)
        for number, name in enumerate(PUBLISHED):
            files.set_alpha(root / name, 16 * (number + 1))
        base_model = Path(shutil.copytree(options.base_model, Path(folder) / "base_model"))
        served = {"base_model": base_model, "adapter_root": root}
        with running_server(**served) as server:
            bed = Bed(server, ADAPTERS)
            run([*faults(bed, root, base_model), *faults_of_hung_disks(bed, root)], reports)
        with running_server(**served, arguments=SMALL) as server:
            run(faults_of_a_small_server(Bed(server, ADAPTERS)), reports)
        with running_server(**served, arguments=files.SETTINGS) as server:
            run([lambda: rewritten(server, root)], reports)
    print(table(reports))
    if options.save:
        save(reports, origin)
    seen = {outcome for report in reports for outcome in report.outcomes}
    killed = next(r for r in reports if r.fault == "engine killed (SIGKILL)")
    is_late = killed.last_end_s > PROMISED_S
    if is_late:
        print(f"clients of a killed engine waited {killed.last_end_s:.1f} s; promised are {PROMISED_S:g} s")
    return 1 if is_late or seen & {HUNG, WRONG} else 0


if __name__ == "__main__":
    sys.exit(main())
