"""Checks every target's tokens, then runs all cases on all targets, in turn, round by round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from bench.loadtest.agreement import Agreement, compare
from bench.loadtest.arrival import Arrival
from bench.loadtest.driver import TargetError
from bench.loadtest.record import Record, Round
from bench.loadtest.row import Row, Setting, make_row
from bench.loadtest.target import Reference, Target
from bench.loadtest.workload import Case

CHECK = Arrival(num_clients=64)
"""How the check sends its requests: many at once, but never more than a server's queue takes."""

Results = dict[tuple[str, int], list[Round]]
"""Rounds by target and index of the case."""


class WrongTokensError(Exception):
    """A target's tokens are not the reference's."""


def distinct(cases: Sequence[Case]) -> list[Case]:
    """One case for each number of adapters: how requests arrive changes no token."""
    return list({case.num_adapters: case for case in cases}.values())


def reference_answers(reference: Reference, cases: Sequence[Case]) -> dict[int, list[list[int]]]:
    """The reference's tokens by number of adapters.

    Raises:
        TargetError: it failed on a request.
    """
    answers = {}
    for case in distinct(cases):
        answers[case.num_adapters] = _answers(reference.name, _check_round(reference, case))
    return answers


def check(
    target: Target, reference: Reference, cases: Sequence[Case], wanted: dict[int, list[list[int]]]
) -> Agreement:
    """Compare a target's tokens on all cases with the reference's. Its memory is warm then, too.

    Raises:
        TargetError: it failed on a request.
        WrongTokensError: answers differ, and not at ties.
    """
    total = Agreement()
    for case in distinct(cases):
        answers = wanted[case.num_adapters]

        def gap(index: int, place: int, case: Case = case, answers: list[list[int]] = answers) -> float:
            request = case.requests[index]
            return reference.gap(request.prompt + answers[index][:place], request.adapter)

        found = compare(_answers(target.name, _check_round(target, case)), answers, gap)
        total.num_compared += found.num_compared
        total.num_ties += found.num_ties
        total.differences += [f"{case.mix}, {line}" for line in found.differences]
    if not total.is_good:
        lines = "\n  ".join([f"{target.name} beside {reference.name}: {total}", *total.differences[:10]])
        raise WrongTokensError(lines)
    return total


def measure(targets: Sequence[Target], cases: Sequence[Case], num_rounds: int) -> Results:
    """Run everything.

    Each round goes through the cases, and each case through the targets, beginning with another one each
    time, so that the machine's drift falls on all alike.

    Returns:
        Rounds by target and index of the case.
    """
    results: Results = {(target.name, i): [] for target in targets for i in range(len(cases))}
    total = num_rounds * len(targets) * sum(len(case.requests) for case in cases)
    # None: no bar where the output is no terminal.
    with tqdm(total=total, unit="req", disable=None, leave=False, smoothing=0) as bar:
        for number in range(num_rounds):
            for index, case in enumerate(cases):
                first = number % len(targets)
                for target in [*targets[first:], *targets[:first]]:
                    bar.set_description(f"round {number + 1}/{num_rounds} {case.label} {target.name}")
                    results[target.name, index].append(target.run(case, bar.update))
    return results


def summarise(setting: Setting, names: Sequence[str], cases: Sequence[Case], results: Results) -> list[Row]:
    """One row for each case and target, in this order."""
    rows = []
    for index, case in enumerate(cases):
        base = next(
            (i for i, other in enumerate(cases) if not other.num_adapters and other.arrival == case.arrival),
            None,
        )
        for name in names:
            rows.append(
                make_row(
                    setting,
                    name,
                    case,
                    results[name, index],
                    base=None if base is None or base == index else results[name, base],
                    first=None if name == names[0] else results[names[0], index],
                )
            )
    return rows


def _check_round(target: Target | Reference, case: Case) -> list[Record]:
    with tqdm(total=len(case.requests), unit="req", disable=None, leave=False) as bar:
        bar.set_description(f"check {case.mix} {target.name}")
        return target.run(replace(case, arrival=CHECK), bar.update).records


def _answers(name: str, records: Sequence[Record]) -> list[list[int]]:
    errors = [record.error for record in records if record.error]
    if errors:
        raise TargetError(
            f"{name} failed on {len(errors)} of {len(records)} requests: {', '.join(set(errors))}"
        )
    return [record.token_ids for record in records]
