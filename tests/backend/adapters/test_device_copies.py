"""An adapter goes to the device in one transfer, through a buffer, and arrives as it would page by page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from manylora.adapters import pool_tensors as pool_tensors_module
from manylora.adapters.copy_stream import Copied, NoCopyStream
from manylora.adapters.device_pool import DevicePool
from manylora.adapters.layout import ALIGNMENT_BYTES, AdapterLayout
from manylora.adapters.peft_format import read_adapter
from manylora.adapters.placement import Placement
from manylora.adapters.pool_tensors import runs_of
from manylora.adapters.weights import AdapterWeights, allocate
from manylora.model.spec import ModelSpec, SiteKind, page_groups
from torch.utils._python_dispatch import TorchDispatchMode

from .pools import make_pool

CPU = torch.device("cpu")
SPEC = ModelSpec(
    kinds=(
        SiteKind(name="q+k+v", num_layers=2, in_features=6, out_features=(6, 2, 2)),
        SiteKind(name="o", num_layers=2, in_features=5, out_features=(7,)),
        SiteKind(name="down", num_layers=1, in_features=3, out_features=(5,)),
    ),
    linears={},
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]
HELD = {"one_run": (), "two_runs": (2, 5, 9), "single_pages": (1, 3, 5, 7, 9, 11)}
"""Of twelve pages, those that others hold."""
RANKS = [(1, 1, 1), (16, 16, 16), (64, 64, 64), (17, 0, 48), (0, 33, 0), (0, 0, 1), (49, 5, 20)]


def make_weights(
    ranks: Sequence[int],
    seed: int,
    dtype: torch.dtype = torch.float32,
    spec: ModelSpec = SPEC,
    pin: bool = False,
    has_vectors: Sequence[bool] = (),
) -> AdapterWeights:
    """An adapter of these ranks by kind (0: without A and B), random, and NaN between its tensors."""
    buffer, kinds = allocate(spec.kinds, ranks, dtype, pin=pin, has_vectors=has_vectors)
    buffer.fill_(math.nan)
    generator = torch.Generator().manual_seed(seed)
    for kind in kinds:
        for tensor in kind.parts.values() if kind else ():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return AdapterWeights(version=str(seed), scale=1.0, max_rank=max(ranks), buffer=buffer, kinds=kinds)


def fragment(pool: DevicePool, held: Sequence[int]) -> None:
    """Take these pages of every kind, and poison all pages with NaN."""
    single = make_weights((1,) * len(pool.tensors.kinds), 0, pool.tensors.dtype, pool.tensors.spec)
    fillers = [pool.try_place(single) for _ in range(pool.num_pages)]
    for page, filler in enumerate(fillers):
        assert filler is not None
        assert filler.pages == ((page,),) * len(pool.tensors.kinds) + ((),) * len(pool.tensors.kinds)
        pool.tensors.await_copy(filler)
    for kind in pool.tensors.kinds:
        for part in kind.values():
            part.fill_(math.nan)
    # Only now, as behind a step: the next copies wait for the poison.
    for page, filler in enumerate(fillers):
        if filler is not None and page not in held:
            pool.free(filler)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Comparable where NaN is equal to itself."""
    return tensor.contiguous().view(torch.uint8).cpu()


def holds(pool: DevicePool, placement: Placement, weights: AdapterWeights) -> bool:
    pool.tensors.await_copy(placement)
    return all(
        torch.equal(bits(kind[part.name][:, list(pages)]), bits(source.parts[part.name]))
        for (kind, source), (group, pages) in zip(
            2 * [*zip(pool.tensors.kinds, weights.kinds, strict=True)],
            zip(pool.tensors.groups, placement.pages, strict=True),
            strict=True,
        )
        if source is not None and pages
        for part in group.parts
    )


def is_poisoned(pool: DevicePool, placements: Sequence[Placement]) -> bool:
    """Whether all pages but those of `placements` are NaN."""
    for index, group in enumerate(pool.tensors.groups):
        taken = {page for placement in placements for page in placement.pages[index]}
        others = [page for page in range(pool.max_pages[index]) if page not in taken]
        kind = pool.tensors.kinds[index % pool.num_kinds]
        if not all(kind[part.name][:, others].isnan().all() for part in group.parts):
            return False
    return True


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("held", HELD.values(), ids=HELD)
def test_pages_are_the_same_through_the_buffer_and_from_the_host(
    ranks: tuple[int, ...], dtype: torch.dtype, held: tuple[int, ...], device: str
) -> None:
    # With vectors where its first rank is odd, some of them beside no A and B.
    has_vectors = (ranks[0] % 2 == 1, ranks[0] % 2 == 1, False)
    weights = make_weights(ranks, 7, dtype, pin=device == "cuda", has_vectors=has_vectors)
    pools, placements = [], []
    for staged in (True, False):
        pool = make_pool(SPEC, 3, 64, dtype, torch.device(device), staged=staged)
        fragment(pool, held)
        placement = pool.try_place(weights)
        assert placement is not None
        assert holds(pool, placement, weights)
        assert is_poisoned(pool, [placement])
        assert pool.check() == []
        pools.append(pool)
        placements.append(placement.pages)
    assert placements[0] == placements[1]
    for one, other in zip(*(pool.tensors.kinds for pool in pools), strict=True):
        assert all(torch.equal(bits(one[name]), bits(other[name])) for name in one)


def test_a_rank_64_adapter_may_lie_in_several_runs() -> None:
    """So that the cases above are of one copy a tensor, of some, and of one for every page."""
    lengths = {}
    for name, held in HELD.items():
        pool = make_pool(SPEC, 3, 64, torch.float32, CPU)
        fragment(pool, held)
        placement = pool.try_place(make_weights((64, 64, 64), 1))
        assert placement is not None
        lengths[name] = [count for _, _, count in runs_of(placement.pages[0])]
    assert lengths == {"one_run": [4], "two_runs": [1, 3], "single_pages": [1] * 4}


class Copies(TorchDispatchMode):
    """Notes copies in their order: those from the host's buffer with their shape, others as `pages`."""

    def __init__(self, buffer: torch.Tensor, notes: list[object]) -> None:
        super().__init__()
        self.address = buffer.untyped_storage().data_ptr()
        self.notes = notes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            is_from_host = args[1].untyped_storage().data_ptr() == self.address
            self.notes.append(("host", tuple(args[1].shape)) if is_from_host else "pages")
        return func(*args, **(kwargs or {}))


class NotingStream(NoCopyStream):
    """A stand-in for CUDA's streams that notes what the pool asks of them."""

    def __init__(self, notes: list[object]) -> None:
        self.notes = notes

    def mark_freed(self) -> None:
        self.notes.append("mark freed")

    def await_freed(self) -> None:
        self.notes.append("await freed")

    def mark_copied(self) -> Copied:
        self.notes.append("mark copied")
        return None


def test_an_adapter_leaves_the_host_in_one_transfer_that_waits_for_no_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes: list[object] = []
    monkeypatch.setattr(pool_tensors_module, "copy_stream", lambda device: NotingStream(notes))
    pool = make_pool(SPEC, 2, 64, torch.float16, CPU, staged=True)
    assert notes == ["mark freed"]  # Behind the zeros.
    weights = make_weights((64, 64, 0), 1, torch.float16)
    notes.clear()
    with Copies(weights.buffer, notes):
        placement = pool.try_place(weights)
        assert placement is not None
    assert notes == [("host", tuple(weights.buffer.shape)), "await freed", *["pages"] * 4, "mark copied"]
    pool.free(placement)
    assert notes[-1] == "mark freed"


def test_only_cuda_has_a_buffer_unless_one_is_asked_for() -> None:
    plain, staged = (make_pool(SPEC, 2, 40, torch.bfloat16, CPU, staged=s) for s in (None, True))
    assert plain.tensors.staging_bytes == 0
    largest = make_weights((40, 40, 40), 0, torch.bfloat16, has_vectors=(True,) * 3)
    assert staged.tensors.staging_bytes == largest.buffer.numel() * 2
    assert staged.tensors.num_bytes == plain.tensors.num_bytes + staged.tensors.staging_bytes


def test_an_adapter_above_max_lora_rank_is_a_mistake() -> None:
    pool = make_pool(SPEC, 4, 16, torch.float32, CPU, staged=True)
    with pytest.raises(AssertionError, match="above max_lora_rank"):
        pool.try_place(make_weights((17, 17, 17), 0))


PAGES = st.tuples(*[st.integers(0, 5)] * 3, *[st.integers(0, 1)] * 3)


@given(pages=PAGES, more=PAGES, dtype=st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_tensors_are_aligned_apart_and_within_the_buffer(
    pages: tuple[int, ...], more: tuple[int, ...], dtype: torch.dtype
) -> None:
    layout = AdapterLayout.of(page_groups(SPEC.kinds), pages, dtype)
    end = 0
    for part in (part for group in layout.groups for part in group.values()):
        assert part.start * dtype.itemsize % ALIGNMENT_BYTES == 0
        assert 0 <= part.start - end < ALIGNMENT_BYTES // dtype.itemsize
        end = part.start + math.prod(part.shape)
    assert 0 <= layout.num_elements - end < ALIGNMENT_BYTES // dtype.itemsize
    assert [bool(group) for group in layout.groups] == [bool(count) for count in pages]
    larger = AdapterLayout.of(
        page_groups(SPEC.kinds), [one + two for one, two in zip(pages, more, strict=True)], dtype
    )
    assert larger.num_elements >= layout.num_elements


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_adapter_that_is_read_lies_in_one_buffer(
    write: Any, llama_spec: ModelSpec, dtype: torch.dtype
) -> None:
    directory: Path = write()
    weights, _ = read_adapter(directory, llama_spec, max_lora_rank=4, dtype=dtype, pin=False)
    layout = AdapterLayout.of(page_groups(llama_spec.kinds), weights.num_pages, dtype)
    assert weights.buffer.shape == (layout.num_elements,)
    assert weights.buffer.dtype == dtype
    assert not any(layout.groups[len(weights.kinds) :])
    for kind, places in zip(weights.kinds, layout.groups[: len(weights.kinds)], strict=True):
        assert (kind is None) == (not places)
        if kind is not None:
            assert list(kind.parts) == list(places)
            for name, place in places.items():
                assert kind.parts[name].shape == place.shape
                address = weights.buffer.data_ptr() + place.start * dtype.itemsize
                assert kind.parts[name].data_ptr() == address


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be page-locked here")
def test_an_adapter_loads_where_its_memory_cannot_be_page_locked(
    write: Any, llama_spec: ModelSpec, caplog: pytest.LogCaptureFixture
) -> None:
    expected, pinned = (
        read_adapter(write(), llama_spec, max_lora_rank=4, dtype=torch.float32, pin=pin)[0]
        for pin in (False, True)
    )
    assert torch.equal(pinned.buffer, expected.buffer)
    assert "could not be page-locked" in caplog.text


class Machine(RuleBasedStateMachine):
    """Random adapters come and go in two pools, one of which has a buffer: each lies whole in both."""

    dtype = torch.float16

    def __init__(self) -> None:
        super().__init__()
        self.pools = [make_pool(SPEC, 2, 64, self.dtype, CPU, staged=staged) for staged in (True, False)]
        for pool in self.pools:
            fragment(pool, ())
        self.placed: list[tuple[list[Placement], AdapterWeights]] = []
        self.count = 0

    @rule(
        ranks=st.tuples(*[st.sampled_from([0, 1, 16, 17, 33, 64])] * 3),
        has_vectors=st.one_of(st.just((False,) * 3), st.tuples(*[st.booleans()] * 3)),
    )
    def place(self, ranks: tuple[int, int, int], has_vectors: tuple[bool, bool, bool]) -> None:
        if not any((*ranks, *has_vectors)):
            return
        self.count += 1
        weights = make_weights(ranks, self.count, self.dtype, has_vectors=has_vectors)
        found = [pool.try_place(weights) for pool in self.pools]
        placements = [placement for placement in found if placement is not None]
        assert len(placements) in (0, 2)
        if placements:
            assert placements[0].pages == placements[1].pages
            self.placed.append((placements, weights))

    @precondition(lambda self: self.placed)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        placements, _ = self.placed.pop(data.draw(st.integers(0, len(self.placed) - 1)))
        for pool, placement in zip(self.pools, placements, strict=True):
            pool.free(placement)
            for index, (group, pages) in enumerate(zip(pool.tensors.groups, placement.pages, strict=True)):
                for part in group.parts:
                    pool.tensors.kinds[index % len(pool.tensors.kinds)][part.name][:, list(pages)] = math.nan

    @invariant()
    def every_adapter_is_whole_and_nothing_else_is_written(self) -> None:
        for index, pool in enumerate(self.pools):
            assert pool.check() == []
            assert all(holds(pool, placements[index], weights) for placements, weights in self.placed)
            assert is_poisoned(pool, [placements[index] for placements, _ in self.placed])


Machine.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestRandomCopies = Machine.TestCase


LARGE = ModelSpec(
    kinds=(
        SiteKind(name="gate+up", num_layers=16, in_features=4096, out_features=(4096, 4096)),
        SiteKind(name="down", num_layers=16, in_features=8192, out_features=(4096,)),
    ),
    linears={},
)
"""An adapter of rank 64 takes some milliseconds to the device."""


def keep_busy(repeats: int = 400) -> torch.cuda.Event:
    """Queue some tenths of a second of products on the current stream; the event is behind them."""
    x = torch.ones(8192, 8192, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    for _ in range(repeats):
        torch.mm(x, x, out=y)
    return torch.cuda.current_stream().record_event()


@pytest.mark.gpu
@needs_cuda
def test_a_copy_beside_a_running_step_is_whole_and_nobody_waits_for_it() -> None:
    """The host's buffers are given up, and taken again by others, as soon as their copies are queued."""
    pool = make_pool(LARGE, 4, 64, torch.bfloat16, torch.device("cuda"))
    expected = [make_weights((64, 64), seed, torch.bfloat16, LARGE) for seed in range(4)]
    pinned = [make_weights((64, 64), seed, torch.bfloat16, LARGE, pin=True) for seed in range(4)]
    assert all(weights.buffer.is_pinned() for weights in pinned)
    keep_busy(1)
    torch.cuda.synchronize()
    busy = keep_busy()
    placements = []
    while pinned:
        placements.append(pool.try_place(pinned.pop(0)))
    assert not busy.query(), "the host waited for the step"
    others = [make_weights((64, 64), 9, torch.bfloat16, LARGE, pin=True) for _ in range(4)]
    for placement, weights in zip(placements, expected, strict=True):
        assert placement is not None
        assert holds(pool, placement, weights)
    assert all(torch.equal(bits(other.buffer), bits(others[0].buffer)) for other in others)


@pytest.mark.gpu
@needs_cuda
def test_pages_that_a_running_step_reads_are_not_overwritten() -> None:
    pool = make_pool(LARGE, 1, 64, torch.bfloat16, torch.device("cuda"))
    old, new = (make_weights((64, 64), seed, torch.bfloat16, LARGE, pin=True) for seed in range(2))
    placement = pool.try_place(old)
    assert placement is not None
    pool.tensors.await_copy(placement)
    keep_busy(1)
    torch.cuda.synchronize()
    busy = keep_busy()
    read = [{name: part.clone() for name, part in kind.items()} for kind in pool.tensors.kinds]
    pool.free(placement)
    placement = pool.try_place(new)
    assert placement is not None
    assert not busy.query(), "the host waited for the step"
    assert holds(pool, placement, new)
    for parts, source in zip(read, old.kinds, strict=True):
        assert source is not None
        assert all(torch.equal(bits(parts[name]), bits(part)) for name, part in source.parts.items())
