"""A real server for the tests: `manylora serve` on the prepared base model and a folder of adapters."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from manylora.serve.background import RunningServer, running_server

from examples.make_adapters import make_adapter

ROOT = Path(__file__).resolve().parents[2]
BASE_MODEL = ROOT / ".build" / "base_model"
TRAINED_ADAPTERS = ROOT / "examples" / "adapters"
SYNTHETIC_RANKS = (8, 16, 32, 64, 8, 16, 32, 64)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session")
def base_model() -> Path:
    """The directory of SmolLM2-135M-Instruct, float32."""
    if not (BASE_MODEL / "config.json").is_file():
        pytest.fail(f"{BASE_MODEL} is missing: run `make setup`")
    return BASE_MODEL


@pytest.fixture(scope="session")
def adapter_root(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained adapters, and synthetic-000 .. synthetic-007 of ranks 8 to 64, copied into one folder."""
    root = tmp_path_factory.mktemp("adapters")
    # Copied, since the server refuses a link that leaves the folder.
    shutil.copytree(TRAINED_ADAPTERS, root, dirs_exist_ok=True)
    for seed, rank in enumerate(SYNTHETIC_RANKS):
        make_adapter(root / f"synthetic-{seed:03}", base_model, rank=rank, seed=seed)
    return root


@pytest.fixture(scope="session")
def server(base_model: Path, adapter_root: Path) -> Iterator[RunningServer]:
    """The server that most tests share. All adapters of `adapter_root` fit into one step."""
    with running_server(
        base_model=base_model, adapter_root=adapter_root, arguments=["--set=max_loras=12"]
    ) as running:
        yield running
