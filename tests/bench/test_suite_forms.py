"""What the GPU suite measures: launched beforehand as in its graph, and looked at when it is replayed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora_kernels import streams
from manylora_kernels.lora.triton_form import TRITON

from bench.gpu import forms, part_exposed, part_kernels, part_proofs, prewarm
from bench.gpu.clock import Run
from bench.gpu.exposed_bed import Bed
from bench.gpu.floors import Bandwidth
from bench.gpu.rows import Context
from bench.gpu.scene import Scene
from bench.gpu.shapes import TINY_LAYER, TINY_POINTS
from bench.loadtest.origin import Origin

POINT = TINY_POINTS[0]


class OtherStream:
    """A second stream where there is no device."""

    def fork(self) -> None:
        pass

    def beside(self) -> AbstractContextManager[object]:
        return nullcontext()

    def join(self) -> None:
        pass


@pytest.fixture
def context(triton_device: str) -> Context:
    return Context(
        origin=Origin.now("", device="test"),
        triton="",
        device=torch.device(triton_device),
        dtype=torch.float16,
        layer=TINY_LAYER,
        bandwidth=Bandwidth(read=1e12, copy=1e12),
        peers=Path("nowhere"),
        repeats=1,
        proofs=2,
        is_tiny=True,
    )


def exposed(context: Context) -> None:
    bed = Bed.of(POINT, context)
    bed.layers(part_exposed._beside(bed))()


def proofs(context: Context) -> None:
    part_proofs._beside(context, POINT)


def compiled_beforehand(context: Context) -> None:
    scene = Scene(POINT, context.layer, context.device, context.dtype, num_layers=1)
    scene.all_layers(prewarm._beside(scene))()


@pytest.mark.parametrize("form", [exposed, proofs, compiled_beforehand])
def test_shrink_beside_the_base_names_its_stream(
    form: Callable[[Context], None], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise steps launched one by one are of other kernels than those of a graph: on a GPU those of the
    graph would be loaded while it is recorded."""
    sides: list[object] = []
    side, launched = OtherStream(), TRITON.linear_lora

    def linear_lora(*args: Any) -> torch.Tensor:
        sides.append(args[5] if len(args) > 5 else None)
        return launched(*args)

    for module in (streams, part_exposed, part_proofs, prewarm):
        monkeypatch.setattr(module, "side_stream", lambda _device: side, raising=False)
    monkeypatch.setattr(TRITON, "linear_lora", linear_lora)
    with torch.inference_mode():
        form(context)
    assert sides
    assert all(found is side for found in sides), sides


def never(_run: Run, _device: torch.device) -> Run:
    """A graph in which nothing was recorded."""
    return lambda: None


def test_a_replay_that_computes_nothing_is_wrong(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (part_exposed, part_kernels, part_proofs):
        monkeypatch.setattr(module, "graph_of", never)
    with torch.inference_mode():
        kernels = list(part_kernels.measure(context, POINT, "kernels", frozenset(forms.PEERS)))
        beside = list(part_exposed.measure(context, POINT, "exposed", with_peers=False))
        with pytest.raises(AssertionError, match="replayed from a graph"):
            part_proofs._beside(context, POINT)
    assert [(row.form, row.result[:6]) for row in kernels] == [(forms.OURS, "wrong:")]
    assert [row.result for row in beside] == ["wrong: qkv: not computed"]


def test_a_replay_of_other_numbers_is_wrong(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is there, but the adapters' part is only half."""
    scene = Scene(POINT, context.layer, context.device, context.dtype, num_layers=1)
    run = scene.all_layers(forms.ours(scene))

    def half() -> None:
        run()
        for name, y in scene.y.items():
            scene.sums[name].add_(y).div_(2)

    with torch.inference_mode():
        scene.check_replay(run, run)
        with pytest.raises(AssertionError, match=r"replayed from a graph, 5.*e-01 of the change is another"):
            scene.check_replay(run, half)
