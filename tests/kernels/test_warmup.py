"""Nothing is compiled while a server runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora_kernels import (
    AttentionShape,
    ServedAttention,
    ServedShapes,
    SiteShape,
    warmup,
    warmup_attention,
)

HERE = Path(__file__).parent


def run(program: str) -> dict[str, Any]:
    """What a program of this folder that counts compilations prints, without the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, str(HERE / program)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    """Compilations before and while steps of every number of rows are served, with all kinds of mixes."""
    return run("count_compilations.py")


@pytest.fixture(scope="module")
def attention_counts() -> dict[str, Any]:
    """The same of attention, for layers of many forms: every number of sequences, prompts and chunks of many
    lengths, in all layouts that models hand over."""
    return run("count_attention_compilations.py")


def test_compilations_are_seen_without_a_warmup(counts: dict[str, Any]) -> None:
    assert counts["cold"] > 0


def test_nothing_is_compiled_after_a_warmup(counts: dict[str, Any]) -> None:
    assert counts["before"] > 0
    assert counts["while_serving"] == 0


def test_attention_compiles_without_a_warmup(attention_counts: dict[str, Any]) -> None:
    assert attention_counts["cold"] > 0


def test_attention_compiles_nothing_after_a_warmup(attention_counts: dict[str, Any]) -> None:
    layers = attention_counts["layers"]
    assert len(layers) >= 12
    # Only rules of scoring may share kernels with a layer before.
    assert layers["llama"]["before"] >= 8
    assert {name: found["while_serving"] for name, found in layers.items() if found["while_serving"]} == {}


def test_served_shapes_refuse_no_rows() -> None:
    with pytest.raises(ValueError, match=r"row_counts: found \(\), allowed at least one"):
        ServedShapes(
            sites=(SiteShape(8, (8,)),),
            row_counts=(),
            max_slots=1,
            max_pages=1,
            dtype=torch.float32,
            pool_dtype=torch.float32,
        )


def test_a_warmup_of_a_cpu_takes_shapes_too() -> None:
    shapes = ServedShapes(
        sites=(SiteShape(8, (8,)),),
        row_counts=(1,),
        max_slots=1,
        max_pages=1,
        dtype=torch.float32,
        pool_dtype=torch.float32,
    )
    warmup("cpu", shapes)


def test_served_attention_refuses_nothing_to_serve() -> None:
    with pytest.raises(ValueError, match="found 0 layers, block_size 16, max_context 9, max_queries 0"):
        ServedAttention(layers=(), cache_dtype=torch.float32, block_size=16, max_context=9, max_queries=0)


def test_a_warmup_of_attention_leaves_a_cpu_alone() -> None:
    q = torch.zeros(4, 3, 16)
    layer = AttentionShape.of(q, q[:2], q[:2], 0, None, None)
    warmup_attention(
        "cpu",
        ServedAttention(
            layers=(layer,), cache_dtype=torch.float32, block_size=16, max_context=9, max_queries=4
        ),
    )
