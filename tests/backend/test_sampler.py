"""The right distribution, and the same draw alone and in any batch."""

from __future__ import annotations

import pytest
import torch
from manylora.engine.sampler import sample, uniform
from manylora.engine.sequence import Sequence
from manylora.messages import SamplingParams

VOCAB = 1000


def sequence(seed: int = 0, length: int = 5, prompt: int = 3, **params: object) -> Sequence:
    return Sequence(
        id=0,
        session=None,
        token_ids=[1] * length,
        num_prompt=prompt,
        params=SamplingParams(**params),
        seed=seed,
        lease=None,
    )


def logits(rows: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)) * 3


SETTINGS = [
    pytest.param({}, id="greedy"),
    pytest.param({"temperature": 1.0}, id="temperature"),
    pytest.param({"temperature": 0.7, "top_p": 0.9}, id="top_p"),
    pytest.param({"temperature": 1.5, "top_k": 20}, id="top_k"),
    pytest.param({"temperature": 2.0, "top_k": 50, "top_p": 0.5}, id="top_k and top_p"),
    pytest.param({"temperature": 30.0, "top_p": 0.99}, id="flat top_p"),
]


@pytest.mark.parametrize("params", SETTINGS)
def test_a_draw_is_the_same_alone_and_in_any_batch(params: dict[str, object]) -> None:
    values = logits(6)
    sequences = [sequence(seed=s, **p.values[0]) for s, p in enumerate(SETTINGS)]
    sequences[2] = sequence(seed=99, **params)
    together = sample(values.clone(), sequences, [])
    assert sample(values[2:3].clone(), [sequences[2]], []) == together[2:3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("params", SETTINGS[1:])
def test_ties_of_16_bits_are_drawn_the_same_beside_a_row_with_a_huge_top_k(
    params: dict[str, object], dtype: torch.dtype
) -> None:
    values = logits(2, vocab=40000).to(dtype)
    for seed in range(20):
        row, greedy = sequence(seed=seed, **params), sequence(seed=1, temperature=1.0, top_k=39000)
        together = sample(values.clone(), [row, greedy], [])
        assert sample(values[:1].clone(), [row], []) == together[:1]


@pytest.mark.parametrize("params", [{"top_p": 1e-9}, {"top_k": 1}, {"top_k": 10**6, "top_p": 1e-6}], ids=str)
def test_filters_at_their_edge_leave_the_best_token(params: dict[str, object]) -> None:
    values = logits(2)
    sequences = [sequence(seed=s, temperature=1.0, **params) for s in range(2)]
    assert sample(values.clone(), sequences, []) == values.argmax(-1).tolist()


@pytest.mark.parametrize("params", SETTINGS[1:])
def test_draws_follow_the_distribution(params: dict[str, object]) -> None:
    values = logits(1, vocab=12)
    probabilities = (values[0].double() / float(params["temperature"])).softmax(-1)
    order = probabilities.argsort(descending=True)
    keep = order[: int(params.get("top_k", 0)) or len(order)]
    mass = probabilities[keep] / probabilities[keep].sum()
    keep = keep[: int((mass.cumsum(0) < float(params.get("top_p", 1.0))).sum()) + 1]
    wanted = torch.zeros(12, dtype=torch.float64)
    wanted[keep] = probabilities[keep] / probabilities[keep].sum()
    num_draws = 4000
    many = values.expand(num_draws, -1).contiguous()
    drawn = sample(many, [sequence(seed=s, **params) for s in range(num_draws)], [])
    found = torch.bincount(torch.tensor(drawn), minlength=12) / num_draws
    assert set(drawn) <= set(keep.tolist())
    # Four standard deviations of a frequency near 1/2 over 4000 draws.
    assert (found - wanted).abs().max() < 4 * (0.25 / num_draws) ** 0.5


@pytest.mark.parametrize("temperature", [1e-10, 1e-38, 5e-324])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.5}, {"top_k": 3}], ids=str)
def test_the_smallest_temperatures_are_greedy(temperature: float, params: dict[str, object]) -> None:
    values = logits(3)
    sequences = [sequence(seed=s, temperature=temperature, **params) for s in range(3)]
    assert sample(values.clone(), sequences, []) == values.argmax(-1).tolist()


def test_min_tokens_holds_the_end_back() -> None:
    values = torch.zeros(3, 10)
    values[:, 4] = 9
    values[:, 7] = 5
    # Two tokens are there; an end may follow min_tokens of them.
    early, late, free = (
        sequence(min_tokens=3),
        sequence(min_tokens=2),
        sequence(min_tokens=3, ignore_eos=True),
    )
    assert sample(values, [early, late, free], [4]) == [7, 4, 4]


def test_uniform_depends_on_seed_and_position_only() -> None:
    drawn = {uniform(seed, position) for seed in range(50) for position in range(50)}
    assert len(drawn) == 2500
    assert all(0 <= u < 1 for u in drawn)
    assert uniform(2**63 - 1, 7) == uniform(2**63 - 1, 7)
