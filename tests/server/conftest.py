"""A real server for the tests: `manylora serve` on the prepared base model and a folder of adapters."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from manylora.serve.background import RunningServer, running_server
from safetensors import safe_open
from safetensors.torch import save_file

from examples.make_adapters import make_adapter

ROOT = Path(__file__).resolve().parents[2]
BASE_MODEL = ROOT / ".build" / "base_model"
TRAINED_ADAPTERS = ROOT / "examples" / "adapters"
SYNTHETIC_RANKS = (8, 16, 32, 64)
"""In turn."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """PEFT's model computes beside a server, whose threads want the processors, too."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The directory of SmolLM2-135M-Instruct, float32."""
    if not (BASE_MODEL / "config.json").is_file():
        pytest.fail(f"{BASE_MODEL} is missing: run `make setup`")
    return BASE_MODEL


@pytest.fixture(scope="session")
def base_model(real_model: Path) -> Path:
    """What `server` serves."""
    return real_model


@pytest.fixture(scope="session")
def small_model(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer, embeddings, first and last layer, for servers that need do no more than
    start, answer and end. It says nothing sensible, and each adapter makes it say something else."""
    small = tmp_path_factory.mktemp("small_model")
    for path in real_model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, small)
    config = json.loads((real_model / "config.json").read_text())
    layers = {0: 0, config["num_hidden_layers"] - 1: 1}
    (small / "config.json").write_text(json.dumps({**config, "num_hidden_layers": len(layers)}))
    tensors = {}
    with safe_open(real_model / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 (it is no dict)
            layer = re.search(r"\.layers\.(\d+)\.", name)
            if layer is None:
                tensors[name] = weights.get_tensor(name)
            elif int(layer[1]) in layers:
                kept = f".layers.{layers[int(layer[1])]}."
                tensors[name.replace(layer[0], kept)] = weights.get_tensor(name)
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    return small


@pytest.fixture(scope="session")
def small_root(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """synthetic-000 .. synthetic-011 for `small_model`, of ranks 8 to 64."""
    root = tmp_path_factory.mktemp("small_adapters")
    make_synthetic(root, small_model, 12)
    return root


@pytest.fixture(scope="session")
def adapter_root(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained adapters, and synthetic-000 .. synthetic-007 of ranks 8 to 64, copied into one folder."""
    root = tmp_path_factory.mktemp("adapters")
    # Copied, since the server refuses a link that leaves the folder.
    shutil.copytree(TRAINED_ADAPTERS, root, dirs_exist_ok=True)
    make_synthetic(root, base_model, 8)
    return root


def make_synthetic(root: Path, base_model: Path, count: int) -> None:
    for seed in range(count):
        rank = SYNTHETIC_RANKS[seed % len(SYNTHETIC_RANKS)]
        make_adapter(root / f"synthetic-{seed:03}", base_model, rank=rank, seed=seed)


@pytest.fixture(scope="session")
def server(base_model: Path, adapter_root: Path) -> Iterator[RunningServer]:
    """The server that most tests share. All adapters of `adapter_root` fit into one step."""
    with running_server(
        base_model=base_model, adapter_root=adapter_root, arguments=["--set=max_loras=12"]
    ) as running:
        yield running
