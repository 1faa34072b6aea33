"""Random requests, loads, failures and pins: invariants hold, and in the end everybody is served."""

from __future__ import annotations

import queue
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from manylora.adapters.device_pool import DevicePool
from manylora.adapters.lease import Stage
from manylora.adapters.registry import Lease, Registry
from manylora.adapters.weights import AdapterWeights, allocate
from manylora.config import EngineConfig
from manylora.errors import InvalidArgumentError, UnavailableError
from manylora.model.spec import ModelSpec, SiteKind

NUM_THREADS = 2
PATIENCE_S = 30.0
RANKS = {"a": (1, 0), "b": (16, 16), "c": (17, 0), "d": (0, 32), "e": (32, 32), "f": (5, 20)}
"""Rank by kind of each adapter on the disk."""
SPEC = ModelSpec(
    kinds=(
        SiteKind(name="qkv", num_layers=1, in_features=2, out_features=(2, 1)),
        SiteKind(name="o", num_layers=1, in_features=1, out_features=(2,)),
    ),
    linears={},
)


@dataclass(frozen=True)
class Content:
    """What a load finds: a value that fills all tensors, or nothing sound."""

    value: int
    is_sound: bool = True


class FakeDisk:
    """Reads end when the test says so, and with what it says. A name that is not in RANKS is a KeyError."""

    def __init__(self) -> None:
        self.gates: dict[str, queue.SimpleQueue[Content]] = {name: queue.SimpleQueue() for name in RANKS}

    def read(self, directory: Path) -> AdapterWeights:
        content = self.gates[directory.name].get(timeout=PATIENCE_S)
        if not content.is_sound:
            raise InvalidArgumentError("broken")
        return make_weights(RANKS[directory.name], content.value)


def make_weights(ranks: tuple[int, ...], value: int) -> AdapterWeights:
    buffer, kinds = allocate(SPEC.kinds, ranks, torch.float32, pin=False)
    buffer.fill_(float(value))
    return AdapterWeights(version=str(value), scale=1.0, max_rank=max(ranks), buffer=buffer, kinds=kinds)


class Machine(RuleBasedStateMachine):
    """Three host slots and four pages of each kind for six adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.disk = FakeDisk()
        self.wakes = threading.Semaphore(0)
        self.folder = tempfile.TemporaryDirectory()
        for name in RANKS:
            (Path(self.folder.name) / name).mkdir()
        self.leases: list[Lease] = []
        self.reading: list[str] = []
        """Loads that have begun."""

    @initialize(
        pinned=st.lists(st.sampled_from(sorted(RANKS)), max_size=2),
        preloaded=st.lists(st.sampled_from(sorted(RANKS)), max_size=1),
        broken=st.sets(st.sampled_from(sorted(RANKS))),
    )
    def start_again(self, pinned: list[str], preloaded: list[str], broken: set[str]) -> None:
        """As after the end of an engine: what is to be preloaded may be broken by now."""
        config = EngineConfig(
            base_model="base",
            adapter_root=self.folder.name,
            max_loras=2,
            max_lora_rank=32,
            max_cpu_loras=3,
            pinned_adapters=tuple(pinned),
            preload_adapters=tuple(preloaded),
        )
        pool = DevicePool(SPEC, 2, 32, torch.float32, torch.device("cpu"))
        self.registry = Registry(
            SPEC,
            config,
            pool,
            torch.float32,
            self.wakes.release,
            clock=lambda: self.now_s,
            read=self.disk.read,
        )
        for name in {*pinned, *preloaded}:
            self.disk.gates[name].put(Content(9, name not in broken))
        self.registry.preload(strict=False)
        assert all(self.is_pinned(name) or self.state_of(name) == "failed" for name in pinned)

    @rule(name=st.sampled_from(sorted(RANKS)), priority=st.sampled_from([0, 0, 1, -1]))
    def acquire(self, name: str, priority: int) -> None:
        had_failed = self.state_of(name) == "failed"
        try:
            self.leases.append(self.registry.acquire(name, priority))
        except InvalidArgumentError:
            assert had_failed

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.registry.release(self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))))

    @precondition(lambda self: any(lease.state == "ready" for lease in self.leases))
    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        """Activate or deactivate a lease that is ready."""
        lease = data.draw(st.sampled_from([lease for lease in self.leases if lease.state == "ready"]))
        if lease.is_active:
            self.registry.deactivate(lease)
        elif not self.registry.try_activate(lease):
            assert any(other.is_active for other in self.leases) or self.num_pinned
            assert lease.placement is None

    @rule()
    def poll(self) -> None:
        before = list(self.registry._intake._queued.values())
        self.registry.poll()
        entries = list(self.registry._intake.entries.values())
        loading = [entry for entry in entries if entry.stage is Stage.LOADING]
        begun = [entry for entry in loading if entry.name not in self.reading]
        self.reading += [entry.name for entry in begun]
        # Nobody is overtaken, and whoever could have a slot is read unless all threads are at work.
        queued = sorted((entry for entry in entries if entry.stage is Stage.QUEUED), key=lambda e: e.first)
        evicted = [entry for entry in queued if entry not in before]
        for entry in queued:
            if entry not in evicted:
                assert all(other.first < entry.first for other in begun)
        assert len(loading) == NUM_THREADS or all(entry.lacks_slot for entry in queued)
        assert queued == sorted(queued, key=lambda entry: entry.lacks_slot)

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), value=st.integers(1, 3), is_sound=st.booleans())
    def finish(self, data: st.DataObject, value: int, is_sound: bool) -> None:
        name = data.draw(st.sampled_from(self.reading))
        self.finish_one(name, Content(value, is_sound))

    def finish_one(self, name: str, content: Content) -> None:
        self.reading.remove(name)
        self.disk.gates[name].put(content)
        assert self.wakes.acquire(timeout=PATIENCE_S)
        self.poll()

    @rule(name=st.sampled_from(sorted(RANKS)))
    def pin(self, name: str) -> None:
        try:
            self.registry.pin(name)
        except UnavailableError:
            assert not self.is_pinned(name)

    @rule(name=st.sampled_from(sorted(RANKS)))
    def unpin(self, name: str) -> None:
        if self.is_pinned(name):
            self.registry.unpin(name)

    @rule(pause_s=st.sampled_from([0.5, 70.0]))
    def pause(self, pause_s: float) -> None:
        self.now_s += pause_s

    @invariant()
    def all_is_sound(self) -> None:
        assert self.registry.check() == []
        assert self.registry.gauges["host_adapters"] <= 3
        pool = self.registry._residents.pool
        for lease in self.leases:
            if lease.is_active:
                placement = lease.placement
                assert placement is not None
                for kind, pages in zip(pool.kinds, placement.pages, strict=True):
                    assert bool((kind.a[:, list(pages)] == float(lease.version)).all())
                    assert bool((kind.b[:, list(pages)] == float(lease.version)).all())

    @property
    def num_pinned(self) -> int:
        return sum(state.pinned for state in self.registry.states())

    def state_of(self, name: str) -> str:
        return next((state.state for state in self.registry.states() if state.name == name), "absent")

    def is_pinned(self, name: str) -> bool:
        return any(state.name == name and state.pinned for state in self.registry.states())

    def teardown(self) -> None:
        """Serve whoever still waits, one at a time: none waits for ever, whatever happened before."""
        try:
            for lease in self.leases:
                if lease.is_active:
                    self.registry.deactivate(lease)
            self.poll()
            for _ in range(20 * len(self.leases) + 20):
                if not self.leases and not self.reading:
                    break
                if self.reading:
                    self.finish_one(self.reading[0], Content(7))
                self.poll()
                for lease in list(self.leases):
                    if lease.state == "failed" or (
                        lease.state == "ready" and self.registry.try_activate(lease)
                    ):
                        self.registry.release(lease)
                        self.leases.remove(lease)
                        break
            assert not self.leases
            self.all_is_sound()
        finally:
            for name in self.reading:
                self.disk.gates[name].put(Content(1))
            self.registry.close()
            self.folder.cleanup()


Machine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestRandomRequests = Machine.TestCase
