"""The compiled attention of decodes against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from manylora_kernels import compiled
from manylora_kernels.attention import cpu as attention_cpu

SHAPES = {
    # (H, V, D, E, contexts)
    "grouped_heads": (9, 3, 64, 64, [1, 2, 17, 96, 300]),
    "one_head": (1, 1, 32, 32, [5]),
    "eight_queries_per_key": (16, 2, 24, 24, [7, 64, 65]),
    "five_queries_per_key": (5, 1, 128, 128, [33, 1]),
    "sizes_that_fill_no_vector": (4, 2, 21, 13, [3, 40]),
}
TOLERANCE = {
    torch.float32: 2e-5,
    # The output, up to about 3, has 8 bits.
    torch.bfloat16: 2e-2,
}


class Step:
    """Sequences whose tokens lie scattered over a cache that holds NaN everywhere else."""

    def __init__(self, shape: str, dtype: torch.dtype) -> None:
        self.num_heads, self.num_kv, size, value_size, lengths = SHAPES[shape]
        generator = torch.Generator().manual_seed(11)
        num_rows = sum(lengths) + 10
        order = torch.randperm(num_rows, generator=generator)
        self.keys = torch.full((num_rows, self.num_kv * size), torch.nan)
        self.values = torch.full((num_rows, self.num_kv * value_size), torch.nan)
        self.context = torch.full((len(lengths), max(lengths) + 3), int(order[-1]))
        first = 0
        for seq, length in enumerate(lengths):
            rows = order[first : first + length]
            self.context[seq, :length] = rows
            self.keys[rows] = torch.randn(length, self.keys.shape[1], generator=generator)
            self.values[rows] = torch.randn(length, self.values.shape[1], generator=generator)
            first += length
        self.positions = torch.tensor(lengths) - 1
        # As transformers hands it over: rows first in memory, heads first in shape.
        q = torch.randn(len(lengths), self.num_heads, size, generator=generator)
        self.q = q.to(dtype).transpose(0, 1)
        self.keys, self.values = self.keys.to(dtype), self.values.to(dtype)

    def expected(self, seq: int, window: int) -> torch.Tensor:
        """[H, E], float64."""
        end = int(self.positions[seq]) + 1
        rows = self.context[seq, max(0, end - window) if window else 0 : end]
        keys = self.keys[rows].double().view(len(rows), self.num_kv, -1)
        values = self.values[rows].double().view(len(rows), self.num_kv, -1)
        out = []
        for head in range(self.num_heads):
            kv = head // (self.num_heads // self.num_kv)
            weights = (keys[:, kv] @ self.q[head, seq].double() * 0.3).softmax(0)
            out.append(weights @ values[:, kv])
        return torch.stack(out)

    def run(self, window: int = 0, seqs: slice = slice(None)) -> torch.Tensor:
        return attention_cpu.decode_attention(
            self.q[:, seqs],
            self.keys,
            self.values,
            self.context[seqs],
            self.positions[seqs],
            self.num_kv,
            0.3,
            window,
        )


@pytest.mark.parametrize("window", [0, 1, 16], ids=lambda w: f"window_{w}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_formula(shape: str, dtype: torch.dtype, window: int) -> None:
    step = Step(shape, dtype)
    assert attention_cpu.serves(step.q, step.keys, step.values)
    found = step.run(window)
    for seq in range(len(step.positions)):
        torch.testing.assert_close(
            found[seq].double(), step.expected(seq, window), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


def test_a_sequences_bits_are_the_same_alone_and_in_any_batch() -> None:
    step = Step("grouped_heads", torch.float32)
    together = step.run()
    for seq in range(len(step.positions)):
        assert torch.equal(step.run(seqs=slice(seq, seq + 1))[0], together[seq])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_not_hidden(bad: float) -> None:
    step = Step("grouped_heads", torch.float32)
    step.keys[step.context[3, 50]] = bad
    found = step.run()
    assert found[3].isnan().any(dim=-1).all()
    assert found[[0, 1, 2, 4]].isfinite().all()


def test_scores_far_apart_leave_the_best_alone() -> None:
    step = Step("one_head", torch.float32)
    step.keys[step.context[0, :5]] = -1000.0
    step.keys[step.context[0, 2]] = 1000.0
    step.q = torch.ones_like(step.q)
    torch.testing.assert_close(step.run()[0, 0], step.values[step.context[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_not_served(dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, 2, 8, dtype=dtype)
    assert compiled.library() is not None
    assert not attention_cpu.serves(tensor, tensor, tensor)
