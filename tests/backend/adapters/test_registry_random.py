"""Random requests, loads, failures, pins, changed files: invariants hold, and in the end all are served."""

from __future__ import annotations

import dataclasses
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from manylora.adapters.adapter_files import NAMES, Sight
from manylora.adapters.device_pool import DevicePool
from manylora.adapters.load import Loaded
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
    """Loads go on when the test says so, and find what it says. A name that is not in RANKS is a KeyError."""

    def __init__(self) -> None:
        self.gates: dict[str, queue.SimpleQueue[Content]] = {name: queue.SimpleQueue() for name in RANKS}
        self.found = threading.local()

    def gated(self, load: Callable[[str, Sight], Loaded]) -> Callable[[str, Sight], Loaded]:
        def load_when_told(name: str, asked: Sight) -> Loaded:
            self.found.content = self.gates[name].get(timeout=PATIENCE_S)
            return load(name, asked)

        return load_when_told

    def read(self, directory: Path) -> AdapterWeights:
        if not self.found.content.is_sound:
            raise InvalidArgumentError("broken")
        return make_weights(RANKS[directory.name], self.found.content.value)


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
        self.looks = threading.Semaphore(0)
        self.folder = tempfile.TemporaryDirectory()
        self.num_changes = 0
        for name in RANKS:
            self.write(name)
        self.leases: list[Lease] = []
        self.age_s = 100.0
        self.began_with: dict[Lease, str] = {}
        """The version at the first activation."""
        self.reading: list[str] = []
        """Reads that have begun, those among them that the registry has given up."""

    def write(self, name: str) -> None:
        """Change an adapter's files: what is in them is only known when they are read."""
        self.num_changes += 1
        directory = Path(self.folder.name) / name
        directory.mkdir(exist_ok=True)
        for file in NAMES:
            (directory / file).write_bytes(bytes(self.num_changes))

    def wake(self) -> None:
        is_look = threading.current_thread().name.startswith("manylora-looker")
        (self.looks if is_look else self.wakes).release()

    @initialize(
        pinned=st.lists(st.sampled_from(sorted(RANKS)), max_size=2),
        preloaded=st.lists(st.sampled_from(sorted(RANKS)), max_size=1),
        broken=st.sets(st.sampled_from(sorted(RANKS))),
        settle_s=st.sampled_from([0.0, 0.3, 2.0]),
        check_s=st.sampled_from([0.0, 0.0, 1.0, -1.0]),
    )
    def start_again(
        self, pinned: list[str], preloaded: list[str], broken: set[str], settle_s: float, check_s: float
    ) -> None:
        """As after the end of an engine: what is to be preloaded may be broken by now."""
        config = EngineConfig(
            base_model="base",
            adapter_root=self.folder.name,
            max_loras=2,
            max_lora_rank=32,
            max_cpu_loras=3,
            pinned_adapters=tuple(pinned),
            preload_adapters=tuple(preloaded),
            adapter_settle_s=settle_s,
            adapter_check_s=check_s,
        )
        pool = DevicePool(SPEC, 2, 32, torch.float32, torch.device("cpu"))
        self.registry = Registry(
            SPEC,
            config,
            pool,
            torch.float32,
            self.wake,
            clock=lambda: self.now_s,
            read=self.disk.read,
        )
        gated = self.disk.gated(self.registry._load)
        self.registry._load = self.registry._intake._load = gated  # type: ignore[method-assign]
        self.look_for_real = self.registry.root.look
        self.registry.root.look = self.registry._lookout._look = self.look  # type: ignore[method-assign]
        for name in {*pinned, *preloaded}:
            self.disk.gates[name].put(Content(9, name not in broken))
        self.registry.preload(strict=False)
        assert all(self.is_pinned(name) or self.state_of(name) == "failed" for name in pinned)

    def look(self, name: str) -> Sight:
        """A file's age is by clocks that no test moves."""
        return dataclasses.replace(self.look_for_real(name), age_s=self.age_s)

    @rule(age_s=st.sampled_from([0.0, 0.1, 100.0]))
    def age(self, age_s: float) -> None:
        """How long ago files that are looked at from now on have changed."""
        self.age_s = age_s

    @rule(name=st.sampled_from(sorted(RANKS)))
    def change(self, name: str) -> None:
        self.write(name)

    @rule(name=st.sampled_from(sorted(RANKS)))
    def lose_a_file(self, name: str) -> None:
        (Path(self.folder.name) / name / NAMES[1]).unlink(missing_ok=True)

    @rule(name=st.sampled_from(sorted(RANKS)))
    def remove(self, name: str) -> None:
        shutil.rmtree(Path(self.folder.name) / name, ignore_errors=True)

    @rule(name=st.sampled_from(sorted(RANKS)), priority=st.sampled_from([0, 0, 1, -1]))
    def acquire(self, name: str, priority: int) -> None:
        self.leases.append(self.registry.acquire(name, priority))

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
        elif self.registry.try_activate(lease):
            # Whatever became of its adapter and its files meanwhile.
            assert self.began_with.setdefault(lease, lease.version) == lease.version
        else:
            assert any(other.is_active for other in self.leases) or self.num_pinned
            assert lease.placement is None

    @rule()
    def poll(self) -> None:
        self.poll_once()
        while self.registry._lookout.is_looking:
            assert self.looks.acquire(timeout=PATIENCE_S), "no look finished"
            self.poll_once()

    def poll_once(self) -> None:
        versions, intake = self.registry._versions, self.registry._intake
        before = list(versions.queued)
        self.registry.poll()
        going_on = intake._reading
        begun = [entry for entry in going_on.values() if entry.name not in self.reading]
        self.reading += [entry.name for entry in begun]
        # Nobody is overtaken, and whoever could have a slot is read unless all threads are at work.
        queued = sorted(versions.queued, key=lambda e: e.first)
        evicted = [entry for entry in queued if entry not in before]
        for entry in queued:
            if entry not in evicted and entry.in_hand is None:
                assert all(other.first < entry.first for other in begun if not other.is_update)
        num_at_work = sum(not job.is_stalled for job in going_on)
        assert num_at_work == NUM_THREADS or all(entry.lacks_slot for entry in queued)
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
                # Long enough for files to settle, and for no read to hang.
                self.now_s += 1.0
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
