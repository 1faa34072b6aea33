"""The right distribution, and the same draw alone and in any batch."""

from __future__ import annotations

import pytest
import torch
from manylora.engine.candidates import candidates, draw_sorted
from manylora.engine.sampler import uniform
from manylora.engine.sequence import Sequence
from manylora.messages import SamplingParams
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .sampling import sample, sampling

VOCAB = 1000


def sequence(seed: int = 0, length: int = 5, prompt: int = 3, **params: object) -> Sequence:
    return Sequence(
        id=0,
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
    pytest.param({"temperature": 1.3, "min_p": 0.05}, id="min_p"),
    pytest.param({"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.2}, id="all three filters"),
    pytest.param({"temperature": 1.0, "repetition_penalty": 1.5, "frequency_penalty": 0.5}, id="penalties"),
]


@pytest.mark.parametrize("params", SETTINGS)
def test_a_draw_is_the_same_alone_and_in_any_batch(params: dict[str, object]) -> None:
    values = logits(len(SETTINGS))
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


@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 1e-9},
        {"top_k": 1},
        {"top_k": 10**6, "top_p": 1e-6},
        {"min_p": 1.0},
        {"min_p": 1.0, "top_k": 9},
    ],
    ids=str,
)
def test_filters_at_their_edge_leave_the_best_token(params: dict[str, object]) -> None:
    values = logits(2)
    sequences = [sequence(seed=s, temperature=1.0, **params) for s in range(2)]
    assert sample(values.clone(), sequences, []) == values.argmax(-1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 30, "min_p": 0.02},
        {"top_p": 0.95, "min_p": 0.01},
        {"top_k": 60, "top_p": 0.8, "min_p": 0.004},
        {"top_k": 60, "top_p": 0.8},
        {"top_p": 0.9999, "min_p": 1e-9},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.8, 4.0])
def test_filters_leave_what_transformers_leaves(params: dict[str, float], temperature: float) -> None:
    (values,) = logits(1) / temperature
    wanted = values[None]
    if "top_k" in params:
        wanted = TopKLogitsWarper(int(params["top_k"]))(None, wanted)
    if "top_p" in params:
        wanted = TopPLogitsWarper(params["top_p"])(None, wanted)
    if "min_p" in params:
        wanted = MinPLogitsWarper(params["min_p"])(None, wanted)
    ids, mass = candidates(values - values.max(), **params)
    assert sorted(ids.tolist()) == wanted[0].isfinite().nonzero().flatten().tolist()
    drawn_from = mass.diff(prepend=torch.zeros(1, dtype=mass.dtype)) / mass[-1]
    torch.testing.assert_close(drawn_from.float(), wanted[0].softmax(-1)[ids], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_rows_at_once_draw_what_each_draws_alone(dtype: torch.dtype) -> None:
    """The form for GPUs, on a CPU, against the one for CPUs; a draw at the very border of two may differ."""
    params = [p.values[0] for p in SETTINGS if "top_k" in p.values[0] or "top_p" in p.values[0]]
    params += [{"top_p": 1e-9}, {"top_k": 1}, {"top_k": 10**6, "top_p": 0.3}, {"top_k": 9, "min_p": 1.0}]
    rows = [sequence(**(p | {"temperature": 1.0})) for p in params for _ in range(40)]
    settings = sampling(rows).draws
    assert settings is not None
    scaled = logits(len(rows)).to(dtype).float()
    scaled -= scaled.amax(-1, keepdim=True)
    draws = torch.tensor([[uniform(s, 7)] for s in range(len(rows))], dtype=torch.float64)
    found = draw_sorted(scaled, draws, settings).tolist()
    wanted = []
    for row, draw, s in zip(scaled, draws, rows, strict=True):
        ids, mass = candidates(row, s.params.top_k, s.params.top_p, s.params.min_p)
        wanted.append(int(ids[torch.searchsorted(mass, draw * mass[-1], right=True)]))
    assert found == wanted


def test_min_p_alone_draws_what_transformers_leaves() -> None:
    values = logits(1, vocab=50) / 3
    kept = set(MinPLogitsWarper(0.3)(None, values)[0].isfinite().nonzero().flatten().tolist())
    drawn = sample(
        values.expand(3000, -1).contiguous(),
        [sequence(seed=s, temperature=1.0, min_p=0.3) for s in range(3000)],
        [],
    )
    assert set(drawn) == kept
    assert 1 < len(kept) < 25


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("whole", [True, False], ids=["whole row", "one number"])
@pytest.mark.parametrize("params", SETTINGS)
def test_a_row_that_is_not_finite_has_no_token_and_the_others_have_theirs(
    params: dict[str, object], whole: bool, number: float
) -> None:
    values = logits(3)
    sequences = [sequence(seed=s, min_tokens=9, **params) for s in range(3)]
    wanted = sample(values.clone(), sequences, [4])
    values[1, slice(None) if whole else slice(4, 5)] = number
    found = sample(values, sequences, [4])
    assert (found[0], found[2]) == (wanted[0], wanted[2])
    # One impossible token is no fault.
    assert found[1] == (wanted[1] if number == float("-inf") and not whole else None)


@pytest.mark.parametrize(
    "params", [pytest.param(p.values[0], id=p.id) for p in SETTINGS[1:] if "penalty" not in str(p.values)]
)
def test_draws_follow_the_distribution(params: dict[str, object]) -> None:
    values = logits(1, vocab=12)
    probabilities = (values[0].double() / float(params["temperature"])).softmax(-1)
    order = probabilities.argsort(descending=True)
    keep = order[: int(params.get("top_k", 0)) or len(order)]
    mass = probabilities[keep] / probabilities[keep].sum()
    keep = keep[: int((mass.cumsum(0) < float(params.get("top_p", 1.0))).sum()) + 1]
    keep = keep[probabilities[keep] >= float(params.get("min_p", 0.0)) * probabilities[keep[0]]]
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
