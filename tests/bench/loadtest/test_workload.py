"""Lengths, choices of adapters, and requests from one seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from bench.loadtest.workload import Lengths, Shape, check_skew, choose_adapters, make_requests

NAMES = ["one", "two", "three"]


def shape(*, num_requests: int = 12, seed: int = 5, skew: str = "even") -> Shape:
    return Shape(
        num_requests=num_requests,
        prompt_tokens=Lengths(3, 9),
        output_tokens=Lengths(2, 4),
        skew=skew,
        seed=seed,
    )


@pytest.mark.parametrize(
    ("text", "least", "most"), [("64", 64, 64), ("32-128", 32, 128), ("5-5", 5, 5), ("1", 1, 1)]
)
def test_lengths_are_read_and_written(text: str, least: int, most: int):
    lengths = Lengths.parse(text)
    assert (lengths.least, lengths.most) == (least, most)
    assert Lengths.parse(str(lengths)) == lengths


@pytest.mark.parametrize("text", ["0", "8-4", "0-4", "-4", "", "a", "1-b", "1-2-3", "4-"])
def test_lengths_that_are_none_are_refused(text: str):
    with pytest.raises(ValueError, match=r"lengths|invalid literal"):
        Lengths.parse(text)


def test_lengths_are_drawn_evenly_with_both_ends():
    drawn = Counter(Lengths(3, 6).draw(8000, [0]))
    assert set(drawn) == {3, 4, 5, 6}
    # 2,000 each, with a standard deviation of 39.
    assert all(abs(count - 2000) < 200 for count in drawn.values())


@pytest.mark.parametrize("text", ["even", "uniform", "zipf:1", "zipf:0.5", "zipf:0"])
def test_skews(text: str):
    assert check_skew(text) == text


@pytest.mark.parametrize("text", ["", "zipf", "zipf:", "zipf:-1", "zipf:a", "Even", "uniform:1", "zipf:1.0x"])
def test_skews_that_are_none_are_refused(text: str):
    with pytest.raises(ValueError, match="expected even, uniform or zipf:EXPONENT"):
        check_skew(text)
    with pytest.raises(ValueError, match="expected even, uniform or zipf:EXPONENT"):
        choose_adapters(4, 2, text, seed=0)


def test_even_takes_each_in_turn():
    assert choose_adapters(7, 3, "even", seed=9) == [0, 1, 2, 0, 1, 2, 0]
    assert choose_adapters(3, 1, "even", seed=9) == [0, 0, 0]


@pytest.mark.parametrize(
    ("skew", "exponent"), [("uniform", 0.0), ("zipf:0", 0.0), ("zipf:1", 1.0), ("zipf:2.5", 2.5)]
)
def test_draws_have_the_proportions_of_the_skew(skew: str, exponent: float):
    count, num_adapters = 40_000, 8
    weights = np.arange(1, num_adapters + 1) ** -exponent
    expected = count * weights / weights.sum()
    drawn = Counter(choose_adapters(count, num_adapters, skew, seed=1))
    for adapter in range(num_adapters):
        # Five standard deviations of a count.
        assert abs(drawn[adapter] - expected[adapter]) < 5 * np.sqrt(expected[adapter])


def test_requests_are_determined_by_the_seed():
    assert make_requests(shape(), NAMES, 300) == make_requests(shape(), NAMES, 300)
    first, second = make_requests(shape(), NAMES, 300), make_requests(shape(seed=6), NAMES, 300)
    assert [r.prompt for r in first] != [r.prompt for r in second]


@pytest.mark.parametrize("skew", ["even", "uniform", "zipf:1"])
def test_cases_of_one_shape_differ_in_adapters_only(skew: str):
    base = make_requests(shape(skew=skew), [], 300)
    mixed = make_requests(shape(skew=skew), NAMES, 300)
    assert {request.adapter for request in base} == {""}
    assert {request.adapter for request in mixed} <= set(NAMES)
    assert [(r.prompt, r.num_output) for r in base] == [(r.prompt, r.num_output) for r in mixed]


@pytest.mark.parametrize(("vocab_size", "lowest"), [(49152, 100), (300, 75), (4, 1)])
def test_prompts_keep_to_lengths_and_to_ids_of_no_special_tokens(vocab_size: int, lowest: int):
    requests = make_requests(shape(num_requests=200), NAMES, vocab_size)
    assert {len(request.prompt) for request in requests} == set(range(3, 10))
    assert {request.num_output for request in requests} == {2, 3, 4}
    ids = [token_id for request in requests for token_id in request.prompt]
    assert lowest <= min(ids)
    assert max(ids) < vocab_size
