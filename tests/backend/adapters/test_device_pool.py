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
    ranks: tuple[int, ...], value: float = 1.0, dtype: torch.dtype = torch.float32
) -> AdapterWeights:
    """An adapter of these ranks by kind (0: not targeted), every element `value`."""
    buffer, kinds = allocate(SPEC.kinds, ranks, dtype, pin=False)
    buffer.fill_(value)
    return AdapterWeights(version=str(value), scale=1.0, max_rank=max(ranks), buffer=buffer, kinds=kinds)


def make_adapter(name: str, ranks: tuple[int, ...], value: float = 1.0) -> Adapter:
    """One of these weights, on host."""
    return Adapter(name, SIGHT, Stage.READY, weights=make_weights(ranks, value))


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
    assert pool.tensors.num_bytes == make_weights((512, 512, 512), dtype=dtype).num_bytes


def test_32_adapters_of_rank_16_are_resident_where_8_of_rank_64_are_reserved() -> None:
    pool = make_pool(SPEC, 8, 64, torch.float32, CPU)
    residents = Residents(pool)
    assert [pool.plan(rank) for rank in (1, 16, 17, 32, 33, 64)] == [32, 32, 16, 16, 10, 8]
    adapters = [make_adapter(str(number), (16, 16, 16), number) for number in range(32)]
    for adapter in adapters:
        assert residents.try_place(adapter)
        residents.use(adapter)
    assert pool.num_free == (0, 0, 0)
    assert not residents.try_place(make_adapter("one more", (1, 0, 0)))
    for number, adapter in enumerate(adapters):
        assert holds(pool, adapter.placement, number)
    assert residents.check() == []


def test_placing_is_all_or_nothing() -> None:
    pool = make_pool(SPEC, 1, 32, torch.float32, CPU)
    assert pool.try_place(make_weights((0, 32, 0), 1.0)) is not None
    before = [kind["a"].clone() for kind in pool.tensors.kinds]
    assert pool.try_place(make_weights((16, 16, 16), 2.0)) is None
    assert pool.num_free == (2, 0, 2)
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
        all(bool((part[:, list(pages)] == value).all()) for part in kind.values())
        for kind, pages in zip(pool.tensors.kinds, placement.pages, strict=True)
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

    @rule(name=st.sampled_from("abcdefgh"), ranks=st.tuples(*[st.sampled_from([0, 1, 16, 17, 48])] * 3))
    def place(self, name: str, ranks: tuple[int, int, int]) -> None:
        if not any(ranks) or name in names(self.residents):
            return
        self.count += 1
        before = list(self.residents)
        free = self.residents.pool.num_free
        adapter = make_adapter(name, ranks, self.count)
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
