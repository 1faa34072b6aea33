"""Execute placements and steps that another process decided, and give its logits.

    python execute_steps.py CONFIG ADAPTER... < commands > results

CONFIG is EngineConfig's JSON; each ADAPTER a directory. What comes in is a pickled list of pickled commands:
("place", Placement), ("free", Placement) or ("step", Step). What goes out is a pickled list of one array of
logits [S, V] for each step.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from manylora.adapters.peft_format import read_adapter
from manylora.adapters.pool_tensors import PoolTensors, pool_dtype
from manylora.config import EngineConfig
from manylora.engine.runner import Runner
from manylora.engine.start_up.make_runner import make_runner
from manylora.engine.step import Step
from manylora.model.loading import load_model


def note_logits(runner: Runner) -> list[npt.NDArray[np.float32]]:
    """Those of every step that the runner is given from now on, before the sampler changes them."""
    noted = []
    compute = runner.logits

    def noting(step: Step) -> torch.Tensor:
        logits = compute(step)
        noted.append(logits.numpy().copy())
        return logits

    runner.logits = noting  # type: ignore[method-assign]
    return noted


def main() -> None:
    config = EngineConfig.from_json(sys.argv[1])
    model = load_model(config)
    dtype = pool_dtype(config, model.dtype)
    pool = PoolTensors(model.spec, config.max_loras, config.max_lora_rank, dtype, model.device)
    runner = make_runner(model, config, pool)
    host = {}
    for directory in map(Path, sys.argv[2:]):
        weights, _ = read_adapter(
            directory, model.spec, max_lora_rank=config.max_lora_rank, dtype=dtype, pin=False
        )
        host[weights.version] = weights
    noted = note_logits(runner)
    for sent in pickle.load(sys.stdin.buffer):
        verb, what = pickle.loads(sent)
        if verb == "place":
            pool.place(what, host[what.version])
        elif verb == "free":
            pool.free(what)
        else:
            runner.launch(what)
    pickle.dump(noted, sys.stdout.buffer)


if __name__ == "__main__":
    main()
