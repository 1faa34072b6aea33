"""The device pool holds what design and arithmetic say, all or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from manylora.adapters.adapter import Adapter, Stage
from manylora.adapters.adapter_files import Sight
from manylora.adapters.device_pool import DevicePool
from manylora.adapters.placement import Placement
from manylora.adapters.pool_tensors import runs_of
from manylora.adapters.residents import Residents
from manylora.adapters.weights import AdapterWeights, allocate
from manylora.model.spec import ModelSpec, SiteKind

from .pools import make_pool

CPU = torch.device("cpu")
SIGHT = Sight(Path(), ((), ()), 0.0)
SPEC = ModelSpec(
    kinds=(
        SiteKind(name="q+k+v", num_layers=2, in_features=6, out_features=(6, 2, 2)),
        SiteKind(name="o", num_layers=2, in_features=4, out_features=(6,)),
        SiteKind(name="down", num_layers=1, in_features=3, out_features=(5,)),
    ),
    linears={},
)


def make_weights(
    ranks: tuple[int, ...],
    value: float = 1.0,
    dtype: torch.dtype = torch.float32,
    has_vectors: tuple[bool, ...] = (),
) -> AdapterWeights:
    """An adapter of these ranks by kind (0: without A and B), every element `value`."""
    buffer, kinds = allocate(SPEC.kinds, ranks, dtype, pin=False, has_vectors=has_vectors)
    buffer.fill_(value)
    return AdapterWeights(version=str(value), scale=1.0, max_rank=max(ranks), buffer=buffer, kinds=kinds)


def make_adapter(
    name: str, ranks: tuple[int, ...], value: float = 1.0, has_vectors: tuple[bool, ...] = ()
) -> Adapter:
    """One of these weights, on host."""
    weights = make_weights(ranks, value, has_vectors=has_vectors)
    return Adapter(name, SIGHT, Stage.READY, weights=weights)


def names(residents: Residents) -> list[str]:
    return [adapter.name for adapter in residents]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [(1, 0, 0), (16, 16, 16), (17, 40, 0), (0, 0, 64)], ids=str)
def test_bytes_are_what_the_design_computes(ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    """element size x sum over kinds of pages x 16 x layers x sum over the linears of (inputs + outputs)"""
    layers, inputs, outputs = (2, 2, 1), (6, 4, 3), ((6, 2, 2), (6,), (5,))
    pages = [(rank + 15) // 16 for rank in ranks]
    expected = dtype.itemsize * sum(
        p * 16 * count * sum(k + n for n in widths)
        for p, count, k, widths in zip(pages, layers, inputs, outputs, strict=True)
    )
    pool = make_pool(SPEC, 8, 64, dtype, CPU)
    weights = make_weights(ranks, dtype=dtype)
    assert weights.num_bytes == expected
    vectors = 2 * dtype.itemsize * sum(n * sum(w) for n, w in zip(layers, outputs, strict=True))
    pages = make_weights((512, 512, 512), dtype=dtype).num_bytes
    assert pool.tensors.num_bytes == pages + 8 * vectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_vectors_are_counted_once_and_leave_what_has_none_as_it_was(dtype: torch.dtype) -> None:
    plain, scaled = (make_weights((16, 0, 3), dtype=dtype, has_vectors=v) for v in ((), (True, True, False)))
    assert plain.num_pages == (1, 0, 1, 0, 0, 0)
    assert scaled.num_pages == (1, 0, 1, 1, 1, 0)
    assert plain.kinds[1] is None
    assert scaled.kinds[1] is not None
    assert scaled.kinds[1].rank == 0
    more = dtype.itemsize * 2 * (2 * 10 + 2 * 6)
    assert scaled.num_bytes == plain.num_bytes + more
    # What an adapter without them has is where it was: vectors lie behind all A and B.
    assert scaled.buffer.numel() > plain.buffer.numel()
    for mine, other in zip(plain.kinds, scaled.kinds, strict=True):
        for name, part in mine.parts.items() if mine else ():
            assert other is not None
            assert other.parts[name].storage_offset() == part.storage_offset()
            assert other.parts[name].shape == part.shape


def test_as_many_adapters_with_vectors_as_a_step_may_mix_are_resident() -> None:
    residents = Residents(make_pool(SPEC, 2, 64, torch.float32, CPU))
    vectors = (True, False, True)
    adapters = [make_adapter(str(n), (16, 0, 0), n, vectors) for n in range(4)]
    plain = make_adapter("plain", (16, 16, 16), 9)
    for adapter in (*adapters[:2], plain):
        assert residents.try_place(adapter)
        assert adapter.placement is not None
    assert [adapter.placement.pages[3:] for adapter in adapters[:2] if adapter.placement] == [
        ((0,), (), (0,)),
        ((1,), (), (1,)),
    ]
    assert residents.pool.num_free == (5, 7, 7, 0, 2, 0)
    residents.use(adapters[0])
    # The idle one with vectors gives way, the plain one would not help.
    assert residents.try_place(adapters[2])
    assert names(residents) == ["plain", "0", "2"]
    residents.use(adapters[2])
    assert not residents.try_place(adapters[3])
    assert all(holds(residents.pool, adapters[n].placement, n) for n in (0, 2))
    assert residents.check() == []


def test_32_adapters_of_rank_16_are_resident_where_8_of_rank_64_are_reserved() -> None:
    pool = make_pool(SPEC, 8, 64, torch.float32, CPU)
    residents = Residents(pool)
    assert [pool.plan(rank) for rank in (1, 16, 17, 32, 33, 64)] == [32, 32, 16, 16, 10, 8]
    adapters = [make_adapter(str(number), (16, 16, 16), number) for number in range(32)]
    for adapter in adapters:
        assert residents.try_place(adapter)
        residents.use(adapter)
    assert pool.num_free == (0, 0, 0, 8, 8, 8)
    assert not residents.try_place(make_adapter("one more", (1, 0, 0)))
    for number, adapter in enumerate(adapters):
        assert holds(pool, adapter.placement, number)
    assert residents.check() == []


def test_placing_is_all_or_nothing() -> None:
    pool = make_pool(SPEC, 1, 32, torch.float32, CPU)
    assert pool.try_place(make_weights((0, 32, 0), 1.0)) is not None
    before = [kind["a"].clone() for kind in pool.tensors.kinds]
    assert pool.try_place(make_weights((16, 16, 16), 2.0)) is None
    assert pool.num_free == (2, 0, 2, 1, 1, 1)
    assert all(torch.equal(one, kind["a"]) for one, kind in zip(before, pool.tensors.kinds, strict=True))


def test_an_adapter_of_another_dtype_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="not in the pool's dtype"):
        make_pool(SPEC, 1, 16, torch.float16, CPU).try_place(make_weights((1, 1, 1)))


def test_runs() -> None:
    assert list(runs_of([])) == []
    assert list(runs_of([4])) == [(0, 4, 1)]
    assert list(runs_of([0, 2, 3, 4, 9])) == [(0, 0, 1), (1, 2, 3), (4, 9, 1)]


def test_only_adapters_that_hold_what_lacks_are_evicted() -> None:
    residents = Residents(make_pool(SPEC, 1, 32, torch.float32, CPU))
    residents.try_place(make_adapter("o only", (0, 16, 0)))
    residents.try_place(make_adapter("q only", (32, 0, 0)))
    assert residents.try_place(make_adapter("new", (16, 16, 0)))
    assert names(residents) == ["o only", "new"]
    assert residents.num_evictions == 1


def test_nothing_is_evicted_when_that_would_not_suffice() -> None:
    residents = Residents(make_pool(SPEC, 1, 32, torch.float32, CPU))
    residents.try_place(make_adapter("idle", (16, 0, 0)))
    used = make_adapter("used", (16, 0, 0))
    residents.try_place(used)
    residents.use(used)
    assert not residents.try_place(make_adapter("new", (32, 0, 0)))
    assert names(residents) == ["idle", "used"]


def test_check_sees_pages_that_are_given_back_too_early() -> None:
    residents = Residents(make_pool(SPEC, 1, 32, torch.float32, CPU))
    adapter = make_adapter("a", (16, 0, 0))
    residents.try_place(adapter)
    assert residents.check() == []
    assert adapter.placement is not None
    residents.pool.free(adapter.placement)
    assert residents.check() != []


def holds(pool: DevicePool, placement: Placement | None, value: float) -> bool:
    return placement is not None and all(
        bool((pool.tensors.kinds[index % 3][part.name][:, list(pages)] == value).all())
        for index, (group, pages) in enumerate(zip(pool.tensors.groups, placement.pages, strict=True))
        for part in group.parts
        if pages
    )


class Machine(RuleBasedStateMachine):
    """Random adapters come, are used, and go; each keeps its own content while it is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.residents = Residents(make_pool(SPEC, 2, 48, torch.float32, CPU))
        self.values: dict[Adapter, float] = {}
        self.uses: list[Adapter] = []
        self.count = 0

    @rule(
        name=st.sampled_from("abcdefgh"),
        ranks=st.tuples(*[st.sampled_from([0, 1, 16, 17, 48])] * 3),
        has_vectors=st.one_of(st.just((False,) * 3), st.tuples(*[st.booleans()] * 3)),
    )
    def place(self, name: str, ranks: tuple[int, int, int], has_vectors: tuple[bool, bool, bool]) -> None:
        if not any((*ranks, *has_vectors)) or name in names(self.residents):
            return
        self.count += 1
        before = list(self.residents)
        free = self.residents.pool.num_free
        adapter = make_adapter(name, ranks, self.count, has_vectors)
        if self.residents.try_place(adapter):
            self.values[adapter] = self.count
        else:
            assert list(self.residents) == before
            assert self.residents.pool.num_free == free

    @precondition(lambda self: len(self.residents))
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        adapter = list(self.residents)[data.draw(st.integers(0, len(self.residents) - 1))]
        self.residents.use(adapter)
        self.uses.append(adapter)

    @precondition(lambda self: self.uses)
    @rule(data=st.data())
    def unuse(self, data: st.DataObject) -> None:
        self.residents.unuse(self.uses.pop(data.draw(st.integers(0, len(self.uses) - 1))))

    @invariant()
    def used_adapters_are_whole(self) -> None:
        assert self.residents.check() == []
        for adapter in self.residents:
            assert holds(self.residents.pool, adapter.placement, self.values[adapter])
        assert set(self.uses) <= set(self.residents)


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestRandomAdapters = Machine.TestCase
