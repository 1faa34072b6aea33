"""The same bits in every run, rows that do not notice their batch, and the forms that the table has not.

Shape key: T rows, H query heads, V key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from manylora_kernels import SitePool
from manylora_kernels.attention_plan import Scoring
from manylora_kernels.paged import PagedBatch

from gpu.budget import Deadline
from gpu.clock import Run
from gpu.part_kernels import attempt
from gpu.rows import Context, Row
from gpu.scene import SCALE, Scene, Term
from gpu.shapes import MIXED, TINY_POINTS, Point

POINTS = {
    "decode": Point(32, 32, (16,)),
    "decode, mixed ranks, half the rows without adapter": Point(64, 32, MIXED, base_share=0.5),
    "prefill, mixed ranks": Point(2048, 8, MIXED),
}
_TINY = {"decode": TINY_POINTS[0], "decode, half the rows without adapter": TINY_POINTS[1]}
_HEADS, _KV_HEADS, _HEAD_SIZE, _BLOCK = 32, 8, 128, 16


def run(context: Context, deadline: Deadline) -> Iterator[Row]:
    """The proofs, until the time is up."""
    for name, proof, point in _proofs(context):
        if deadline.is_over:
            print(f"proofs: time is up before {name}", flush=True)
            return
        with torch.inference_mode():
            yield context.row("proofs", name, point, result=attempt(proof))


def _proofs(context: Context) -> Iterator[tuple[str, Callable[[], str], Point | None]]:
    for name, point in (_TINY if context.is_tiny else POINTS).items():
        yield f"{name}: same bits", lambda point=point: _repeated(context, point, False), point  # type: ignore[misc]
        yield (
            f"{name}, batch invariant: same bits",
            lambda point=point: _repeated(context, point, True),  # type: ignore[misc]
            point,
        )
    point = next(iter((_TINY if context.is_tiny else POINTS).values()))
    yield "batch invariant: a row alone", lambda: _alone(context, point), point
    yield "shrink and expand by themselves", lambda: _halves(context, point), point
    yield "attention, decode: same bits", lambda: _attention(context, decodes=True), None
    yield "attention, prompts: same bits", lambda: _attention(context, decodes=False), None


def _ours(scene: Scene, batch_invariant: bool) -> Term:
    from manylora_kernels import gpu  # imports triton, after the interpreter was chosen
    from manylora_kernels.routed import RoutedMix

    mix = RoutedMix.build(
        scene.slots,
        scene.scales,
        [scene.pages],
        scene.point.num_adapters,
        scene.max_pages,
        scene.device,
        batch_invariant,
    )
    mix = replace(mix, one_adapter=None)
    return lambda y, x, pool: lambda: gpu.add_lora(y, x, pool, mix, 0)


def _repeated(context: Context, point: Point, batch_invariant: bool) -> str:
    """Check against float64, then repeat and compare every bit.

    Raises:
        AssertionError: bits that differ.
    """
    scene = Scene(point, context.layer, context.device, context.dtype, num_layers=1)
    term = _ours(scene, batch_invariant)
    error = scene.check(term)
    differing = torch.zeros((), dtype=torch.int64, device=context.device)
    for name, pool in scene.layers[0].items():
        y, before = scene.y[name].clone(), scene.y[name]
        step = term(y, scene.x[name], pool)
        step()
        first = y.clone()
        for _ in range(context.proofs - 1):
            y.copy_(before)
            step()
            differing += _bits(y).ne(_bits(first)).any()
    count = int(differing.item())
    assert count == 0, f"other bits in {count} of {context.proofs * len(scene.layers[0])} runs"
    return f"same bits {context.proofs} times, error {error:.1e}"


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16 if values.element_size() == 2 else torch.int32)


def _alone(context: Context, point: Point) -> str:
    """Every row by itself gives the bits that it gives in the batch.

    Raises:
        AssertionError: a row that does not.
    """
    scene = Scene(point, context.layer, context.device, context.dtype, num_layers=1)
    whole = {
        name: _once(scene, pool, name, scene.slots, slice(None)) for name, pool in scene.layers[0].items()
    }
    for t in range(point.num_rows):
        for name, pool in scene.layers[0].items():
            alone = _once(scene, pool, name, scene.slots[t : t + 1], slice(t, t + 1))
            assert torch.equal(_bits(alone[0]), _bits(whole[name][t])), (
                f"{name}: row {t} alone has other bits"
            )
    return f"same bits, {point.num_rows} rows"


def _once(
    scene: Scene, pool: SitePool, name: str, slots: np.ndarray[tuple[int], np.dtype[np.int32]], rows: slice
) -> torch.Tensor:
    from manylora_kernels import gpu  # imports triton, after the interpreter was chosen
    from manylora_kernels.routed import RoutedMix

    mix = RoutedMix.build(
        slots,
        np.full(len(slots), SCALE, dtype=np.float32),
        [scene.pages],
        scene.point.num_adapters,
        scene.max_pages,
        scene.device,
        True,
    )
    y = scene.y[name][rows].clone()
    gpu.add_lora(y, scene.x[name][rows], pool, mix, 0)
    return y


def _halves(context: Context, point: Point) -> str:
    """The two halves by themselves are right, and give the bits of the whole.

    Raises:
        AssertionError: they are not.
    """
    from manylora_kernels import gpu  # imports triton, after the interpreter was chosen

    scene = Scene(point, context.layer, context.device, context.dtype, num_layers=1)

    def halves(y: torch.Tensor, x: torch.Tensor, pool: SitePool) -> Run:
        return lambda: gpu.expand_lora(y, gpu.shrink_lora(x, pool, scene.mix, 0), pool, scene.mix, 0)

    error = scene.check(halves)
    whole = _ours(scene, False)
    for name, pool in scene.layers[0].items():
        found, wanted = scene.y[name].clone(), scene.y[name].clone()
        halves(found, scene.x[name], pool)()
        whole(wanted, scene.x[name], pool)()
        assert torch.equal(_bits(found), _bits(wanted)), f"{name}: the halves give other bits"
    return f"same bits as the whole, error {error:.1e}"


def _attention(context: Context, decodes: bool) -> str:
    """Attention over scattered blocks against float64, then repeated.

    Raises:
        AssertionError: a wrong result, or bits that differ.
    """
    from manylora_kernels.attention import paged_attention

    heads, kv, size = (4, 2, 16) if context.is_tiny else (_HEADS, _KV_HEADS, _HEAD_SIZE)
    contexts = (
        ([7, 19, 33] if context.is_tiny else [100 + 37 * i for i in range(32)]) if decodes else [19, 40]
    )
    queries = [1] * len(contexts) if decodes else [9, 40]
    counts = [-(-length // _BLOCK) for length in contexts]
    blocks = np.random.default_rng(0).permutation(sum(counts)).tolist()
    tables = [[blocks.pop() for _ in range(count)] for count in counts]
    batch = PagedBatch.build(queries, contexts, tables, _BLOCK, context.device)
    torch.manual_seed(0)
    rows = sum(counts) * _BLOCK
    keys, values = (
        torch.randn(rows, kv * size, device=context.device, dtype=context.dtype) for _ in range(2)
    )
    q = torch.randn(heads, sum(queries), size, device=context.device, dtype=context.dtype)
    scoring = Scoring(scaling=size**-0.5)
    first = paged_attention(q, keys, values, batch, scoring)
    error = _attention_error(first, q, keys, values, tables, queries, contexts)
    allowed = 1e-2 if context.dtype.itemsize == 2 else 1e-4
    assert error <= allowed, f"error {error:.2e}, allowed {allowed}"
    differing = torch.zeros((), dtype=torch.int64, device=context.device)
    for _ in range(context.proofs - 1):
        again = paged_attention(q, keys, values, batch, scoring)
        differing += _bits(again).ne(_bits(first)).any()
    assert differing.item() == 0, f"other bits in {differing.item()} of {context.proofs} runs"
    return f"same bits {context.proofs} times, error {error:.1e}"


def _attention_error(
    out: torch.Tensor,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: list[list[int]],
    queries: list[int],
    contexts: list[int],
) -> float:
    """The largest error of all rows [T, H, D] against float64, as a share of the largest result."""
    heads, _, size = q.shape
    kv, worst, largest, row = keys.shape[1] // size, 0.0, 0.0, 0
    for table, count, length in zip(tables, queries, contexts, strict=True):
        at = torch.tensor(
            [block * _BLOCK + i for block in table for i in range(_BLOCK)][:length], device=q.device
        )
        k, v = (
            t[at].double().view(length, kv, size).repeat_interleave(heads // kv, 1) for t in (keys, values)
        )
        mine = q[:, row : row + count].double()
        scores = torch.einsum("hqd,chd->hqc", mine, k) * size**-0.5
        ahead = torch.ones(count, length, dtype=torch.bool, device=q.device).triu(length - count + 1)
        weights = scores.masked_fill(ahead, float("-inf")).softmax(-1)
        wanted = torch.einsum("hqc,chd->qhd", weights, v)
        worst = max(worst, (out[row : row + count].double() - wanted).abs().max().item())
        largest = max(largest, wanted.abs().max().item())
        row += count
    return worst / largest
