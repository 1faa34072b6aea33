"""The wire contract and the clients, which any model proves: the base model's first and last layer serve,
with synthetic adapters, some under the trained ones' names."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from manylora.serve.background import RunningServer, running_server

from bench.campaigns.harness import SYNTHETIC, TRAINED
from examples.make_adapters import make_adapter


@pytest.fixture(scope="session")
def base_model(small_model: Path) -> Path:
    """What `server` serves."""
    return small_model


@pytest.fixture(scope="session")
def adapter_root(small_model: Path, small_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic adapters, and others under the trained ones' names."""
    root = tmp_path_factory.mktemp("contract_adapters")
    for name in SYNTHETIC:
        shutil.copytree(small_root / name, root / name)
    for seed, name in enumerate(TRAINED, 100):
        make_adapter(root / name, small_model, rank=8, seed=seed)
    return root


@pytest.fixture(scope="session")
def server(base_model: Path, adapter_root: Path) -> Iterator[RunningServer]:
    """One for all tests of this folder. All adapters of `adapter_root` fit into one step."""
    with running_server(
        base_model=base_model, adapter_root=adapter_root, arguments=["--set=max_loras=12"]
    ) as running:
        yield running
