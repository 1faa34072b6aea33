"""A step is plain data: another process executes it and has the same logits."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from manylora import Engine, EngineConfig
from manylora.adapters.placement import AdapterUse, Placement
from manylora.adapters.weights import AdapterWeights
from manylora.engine import runner as runner_module
from manylora.engine.flight import Flight
from manylora.engine.step import Step, StepSequence, make_step

from . import execute_steps
from .inbox import PATIENCE_S

PROMPTS = [[5, 9, 30], list(range(20, 65)), [7] * 9, list(range(100, 140)), [11, 12]]
RANKS = {"small": 4, "large": 20, "other": 17}
NAMES = ["small", "", "large", "small", ""]


def test_steps_give_the_same_logits_in_another_process(
    tiny_model: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts in chunks beside decodes, rows of two adapters and of none, all settings of the sampler, tokens
    that only the device has."""
    base, root = tiny_model("llama"), tmp_path / "adapters"
    for seed, (name, rank) in enumerate(RANKS.items()):
        make_adapter(base, root / name, seed, r=rank, target_modules=["q_proj", "down_proj"])
    config = EngineConfig(
        base_model=str(base),
        adapter_root=str(root),
        num_threads=1,
        max_loras=2,
        max_lora_rank=20,
        max_num_seqs=8,
        max_batched_tokens=16,
        kv_block_size=4,
    )
    monkeypatch.setattr(runner_module, "_runs_ahead", lambda model: True)
    commands: list[bytes] = []
    steps: list[Step] = []
    with Engine(config) as engine:
        noted = execute_steps.note_logits(engine.runner)
        launch, tensors = engine.runner.launch, engine.pool.tensors
        place, free = tensors.place, tensors.free

        def noting_place(placement: Placement, weights: AdapterWeights) -> None:
            commands.append(pickle.dumps(("place", placement)))
            place(placement, weights)

        def noting_free(placement: Placement) -> None:
            commands.append(pickle.dumps(("free", placement)))
            free(placement)

        def noting_launch(step: Step) -> Flight:
            steps.append(step)
            commands.append(pickle.dumps(("step", step)))
            return launch(step)

        monkeypatch.setattr(engine.runner, "launch", noting_launch)
        monkeypatch.setattr(tensors, "place", noting_place)
        monkeypatch.setattr(tensors, "free", noting_free)
        options: list[dict[str, Any]] = [
            {},
            {"temperature": 1.0, "seed": 3, "top_k": 20, "logprobs": 2},
            {"repetition_penalty": 1.3, "min_tokens": 4},
        ]
        for several in options:
            engine.generate(PROMPTS, adapter_ids=NAMES, max_tokens=9, **several)
        # Finds room where another one was.
        engine.generate(PROMPTS, adapter_ids=["other", "", "", "other", ""], max_tokens=9)
    assert any(is_of_all_sorts(step) for step in steps)
    assert sum(step.pending.shape[1] for step in steps) > 20
    assert [pickle.loads(command)[0] for command in commands].count("free") == 1
    assert max(map(len, commands)) < 4096
    done = subprocess.run(
        [
            sys.executable, str(Path(execute_steps.__file__)), config.to_json(),
            *(str(root / name) for name in RANKS),
        ],
        input=pickle.dumps(commands),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        timeout=PATIENCE_S,
        check=True,
    )  # fmt: skip
    found = pickle.loads(done.stdout)
    assert len(found) == len(noted) == len(steps)
    assert all(np.array_equal(one, other) for one, other in zip(noted, found, strict=True))


def is_of_all_sorts(step: Step) -> bool:
    """A chunk of a prompt that does not sample, decodes, an adapter, and rows of the base model."""
    queries = step.num_queries
    return bool(
        ((queries > 1) & ~step.samples).any()
        and (queries == 1).any()
        and {True, False} == {*(step.slots >= 0).tolist()}
    )


def test_adapters_of_a_step_have_a_slot_each_by_where_they_lie() -> None:
    """Equal contents in two places are two; at scale 0 the rows are the base model's."""
    one, twin = (AdapterUse("same", 2.0, ((page,), (page, page + 1))) for page in (0, 4))
    step = make_step(
        7,
        [
            StepSequence([3], 5, [0, 1], adapter=twin),
            StepSequence([4, 5], 2, [2], samples=False, adapter=one, scale=0.5),
            StepSequence([6], 1, [3]),
            StepSequence([0], 9, [4, 5, 6], pending=2, adapter=twin, scale=1e300),
            StepSequence([8], 1, [7], adapter=one, scale=0.0),
        ],
    )
    assert step.slots.tolist() == [0, 1, -1, 0, -1]
    assert step.scales.tolist() == [2.0, 1.0, 0.0, np.finfo(np.float32).max, 0.0]
    assert step.pages == (((4,), (0,)), ((4, 5), (0, 1)))
    assert step.starts.tolist() == [0, 1, 3, 4, 5, 6]
    assert step.pending.tolist() == [[4], [2]]
    assert step.sampling.num_rows == 4
    assert (step.table(3).tolist(), step.is_decode) == ([4, 5, 6], False)


def test_a_step_holds_nothing_of_torch() -> None:
    sent = pickle.dumps(make_step(1, [StepSequence([3], 1, [0])]))
    assert b"torch" not in sent
    assert not isinstance(pickle.loads(sent).token_ids, torch.Tensor)
