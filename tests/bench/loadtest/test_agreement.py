"""Whether answers are the same, ties apart; and what the check makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from bench.loadtest.agreement import TIE, Agreement, compare, first_difference
from bench.loadtest.driver import Progress, TargetError
from bench.loadtest.measure import WrongTokensError, check, measure, reference_answers
from bench.loadtest.record import Record, Round
from bench.loadtest.workload import Case


class Scripted:
    """Answers every request of a case with given tokens, or fails."""

    def __init__(self, name: str, answers: Sequence[list[int]], lead: float = 1.0, error: str = "") -> None:
        self.name = name
        self.answers = answers
        self.lead = lead
        self.error = error
        self.asked: list[tuple[list[int], str]] = []
        self.order: list[str] = []

    def run(self, case: Case, progress: Progress) -> Round:
        self.order.append(f"{self.name} {case.num_adapters}")
        records = []
        for tokens in self.answers:
            record = Record(0.0, is_streamed=True)
            record.add(1.0, tokens)
            if self.error:
                record.fail(1.0, self.error)
            records.append(record)
            progress()
        return Round(records, 0.0, {})

    def gap(self, prompt: list[int], adapter: str) -> float:
        self.asked.append((prompt, adapter))
        return self.lead

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("found", "wanted", "place"),
    [
        pytest.param([], [], None, id="both empty"),
        pytest.param([1, 2], [1, 2], None, id="the same"),
        pytest.param([1, 3], [1, 2], 1, id="another token"),
        pytest.param([1], [1, 2], 1, id="too short"),
        pytest.param([1, 2], [], 0, id="too long"),
    ],
)
def test_first_difference(found: list[int], wanted: list[int], place: int | None):
    assert first_difference(found, wanted) == place


def test_a_difference_at_a_tie_is_none_and_what_follows_is_not_compared():
    asked: list[tuple[int, int]] = []

    def gap(index: int, place: int) -> float:
        asked.append((index, place))
        return TIE / 2

    agreement = compare([[1, 2, 3], [4, 9, 9]], [[1, 2, 3], [4, 5, 6]], gap)
    assert asked == [(1, 1)]
    assert agreement.is_good
    assert str(agreement) == "1 of 2 answers the same, 1 parts at a tie"


def test_a_difference_where_the_reference_is_sure_is_reported():
    agreement = compare([[4, 9]], [[4, 5]], lambda *_: TIE)
    assert not agreement.is_good
    assert agreement.differences == ["request 0: token 1 is 9, wanted 5, which leads by 0.001"]


def test_a_length_that_differs_is_never_a_tie():
    agreement = compare([[4]], [[4, 5]], lambda *_: 0.0)
    assert agreement.differences == ["request 0: 1 tokens, 2 wanted"]


@pytest.mark.parametrize(
    ("num_compared", "num_ties", "is_good"),
    [(8, 1, True), (8, 2, False), (100, 1, True), (100, 2, False), (300, 3, True), (300, 4, False)],
)
def test_ties_are_one_in_a_hundred_at_most_but_one_is_always_allowed(
    num_compared: int, num_ties: int, is_good: bool
):
    assert Agreement(num_compared=num_compared, num_ties=num_ties).is_good == is_good


def test_the_check_compares_each_number_of_adapters_once(make_case: Callable[..., Case]):
    cases = [make_case(2, count, num_clients=clients) for clients in (1, 2) for count in (0, 4)]
    target, reference = Scripted("grpc", [[1, 2], [3, 4]]), Scripted("peft", [[1, 2], [3, 4]])
    agreement = check(target, reference, cases, reference_answers(reference, cases))
    assert target.order == ["grpc 0", "grpc 4"]
    assert str(agreement) == "4 of 4 answers the same"
    assert reference.asked == []


def test_the_check_asks_the_reference_about_the_place_of_the_difference(make_case: Callable[..., Case]):
    cases = [make_case(1, 4)]
    target, reference = Scripted("grpc", [[1, 9]]), Scripted("peft", [[1, 2]], lead=TIE / 2)
    assert check(target, reference, cases, reference_answers(reference, cases)).num_ties == 1
    assert reference.asked == [([7, 8, 1], "pirate")]


def test_wrong_tokens_end_the_run_with_the_differences(make_case: Callable[..., Case]):
    cases = [make_case(1, 4)]
    target, reference = Scripted("grpc", [[1, 9]]), Scripted("peft", [[1, 2]])
    with pytest.raises(
        WrongTokensError, match=r"grpc beside peft: 0 of 1 .*\n.*mixed, request 0: token 1 is 9"
    ):
        check(target, reference, cases, reference_answers(reference, cases))


def test_a_target_that_fails_in_the_check_ends_the_run(make_case: Callable[..., Case]):
    target = Scripted("grpc", [[1], [1]], error="UNAVAILABLE")
    with pytest.raises(TargetError, match="grpc failed on 2 of 2 requests: UNAVAILABLE"):
        check(target, Scripted("peft", [[1], [1]]), [make_case(2)], {0: [[1], [1]]})


def test_targets_take_turns_and_each_round_begins_with_another(make_case: Callable[..., Case]):
    order: list[str] = []
    targets = [Scripted("a", [[1]]), Scripted("b", [[1]])]
    for target in targets:
        target.order = order
    results = measure(targets, [make_case(1), make_case(1, 4)], num_rounds=3)
    assert order == ["a 0", "b 0", "a 4", "b 4", "b 0", "a 0", "b 4", "a 4", "a 0", "b 0", "a 4", "b 4"]
    assert {key: len(rounds) for key, rounds in results.items()} == dict.fromkeys(
        [("a", 0), ("a", 1), ("b", 0), ("b", 1)], 3
    )
