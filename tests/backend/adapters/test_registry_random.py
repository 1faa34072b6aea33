"""Random requests, loads, failures, pins, changed files: invariants hold, and in the end all are served."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from manylora.adapters import loader
from manylora.adapters.adapter_files import NAMES, Sight
from manylora.adapters.adapter_root import AdapterRoot
from manylora.adapters.load import Loaded
from manylora.adapters.loader import Job, Loader
from manylora.adapters.registry import Lease, Registry
from manylora.adapters.weights import AdapterWeights, allocate
from manylora.config import EngineConfig
from manylora.errors import InvalidArgumentError, UnavailableError
from manylora.model.spec import ModelSpec, SiteKind

from .pools import make_pool

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
    changes: bool = False
    """Somebody writes the files while they are read."""


class FakeDisk:
    """Loads go on when the test says so, and find what it says. A name that is not in RANKS is a KeyError.

    Each job has a gate of its own: an update and a first load of one adapter may go on together.
    """

    def __init__(self, root: Path) -> None:
        self.at_start: dict[str, Content] = {}
        """What is found before anything is served."""
        self.begun: list[Job[Loaded]] = []
        """Jobs in the order in which they were submitted, until the test takes them."""
        self._root = root
        self._gates: dict[Job[Loaded], queue.SimpleQueue[Content]] = {}
        self._arrivals = threading.Semaphore(0)
        self._found = threading.local()
        self._num_changes = 0

    def gated(self, reads: Loader[Loaded]) -> Callable[[Job[Loaded]], None]:
        submit = reads.submit

        def submit_gated(job: Job[Loaded]) -> None:
            gate = self._gates[job] = queue.SimpleQueue()
            work = job.work

            def work_when_told() -> Loaded:
                self._arrivals.release()
                self._found.content = gate.get(timeout=PATIENCE_S)
                return work()

            job.work = work_when_told
            self.begun.append(job)
            has_idle_thread = any(not w.is_lost and w.job is None for w in reads._workers)
            submit(job)
            # The clock must not move before the thread has looked at it.
            assert not has_idle_thread or self._arrivals.acquire(timeout=PATIENCE_S), "no read began"

        return submit_gated

    def let_go_on(self, job: Job[Loaded], content: Content) -> None:
        self._gates.pop(job).put(content)

    def open_all(self) -> None:
        for job in list(self._gates):
            self.let_go_on(job, Content(1))

    def read(self, directory: Path) -> AdapterWeights:
        content = getattr(self._found, "content", None) or self.at_start[directory.name]
        if content.changes:
            self.write(directory.name)
        if not content.is_sound:
            raise InvalidArgumentError("broken")
        return make_weights(RANKS[directory.name], content.value)

    def write(self, name: str) -> None:
        """Change an adapter's files: what is in them is only known when they are read."""
        self._num_changes += 1
        directory = self._root / name
        directory.mkdir(exist_ok=True)
        for file in NAMES:
            (directory / file).write_bytes(bytes(self._num_changes))


def make_weights(ranks: tuple[int, ...], value: int) -> AdapterWeights:
    buffer, kinds = allocate(SPEC.kinds, ranks, torch.float32, pin=False)
    buffer.fill_(float(value))
    return AdapterWeights(version=str(value), scale=1.0, max_rank=max(ranks), buffer=buffer, kinds=kinds)


class Machine(RuleBasedStateMachine):
    """Up to three host slots and four pages of each kind for six adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.cleanup = contextlib.ExitStack()
        self.now_s = 0.0
        self.wakes = threading.Semaphore(0)
        self.looks = threading.Semaphore(0)
        self.leases: list[Lease] = []
        self.age_s = 100.0
        self.began_with: dict[Lease, str] = {}
        """The version at the first activation."""
        self.reading: list[Job[Loaded]] = []
        """Reads that have begun, those among them that the registry has given up."""

    def wake(self) -> None:
        is_look = threading.current_thread().name.startswith("manylora-looker")
        (self.looks if is_look else self.wakes).release()

    @initialize(
        num_slots=st.integers(1, 3),
        pinned=st.lists(st.sampled_from(sorted(RANKS)), max_size=2),
        preloaded=st.lists(st.sampled_from(sorted(RANKS)), max_size=1),
        broken=st.sets(st.sampled_from(sorted(RANKS))),
        settle_s=st.sampled_from([0.0, 0.3, 2.0]),
        check_s=st.sampled_from([0.0, 0.0, 1.0, -1.0]),
    )
    def start_again(
        self,
        num_slots: int,
        pinned: list[str],
        preloaded: list[str],
        broken: set[str],
        settle_s: float,
        check_s: float,
    ) -> None:
        """As after the end of an engine: what is to be preloaded may be broken by now."""
        # Here, since an example may be given up before it begins.
        self.root = Path(self.cleanup.enter_context(tempfile.TemporaryDirectory()))
        patch = self.cleanup.enter_context(pytest.MonkeyPatch.context())
        # A thread that waits at its gate computes nothing, however long it took on its way there.
        patch.setattr(loader.time, "clock_gettime", lambda clock: 0.0)
        self.disk = FakeDisk(self.root)
        for name in RANKS:
            self.disk.write(name)
        self.num_slots = num_slots
        # As many as a start accepts.
        del pinned[num_slots - 1 :]
        config = EngineConfig(
            base_model="base",
            adapter_root=str(self.root),
            max_loras=min(2, num_slots),
            max_lora_rank=32,
            max_cpu_loras=num_slots,
            pinned_adapters=tuple(pinned),
            preload_adapters=tuple(preloaded),
            adapter_settle_s=settle_s,
            adapter_check_s=check_s,
        )
        pool = make_pool(SPEC, 2, 32, torch.float32, torch.device("cpu"))
        self.registry = Registry(
            config,
            AdapterRoot(config.adapter_root),
            self.disk.read,
            pool,
            self.wake,
            clock=lambda: self.now_s,
            wait=self.wait,
        )
        self.cleanup.callback(self.registry.close)
        self.cleanup.callback(self.disk.open_all)
        self.look_for_real = self.registry.root.look
        self.registry.root.look = self.registry._lookout._look = self.look  # type: ignore[method-assign]
        for name in {*pinned, *preloaded}:
            self.disk.at_start[name] = Content(9, name not in broken)
        self.registry.preload(strict=False)
        assert all(self.is_pinned(name) or self.state_of(name) == "failed" for name in pinned)
        reads = self.registry._loader
        reads.submit = self.disk.gated(reads)  # type: ignore[method-assign]

    def wait(self, _timeout_s: float) -> None:
        """Preloading waits for one look or one read at a time."""
        semaphore = self.looks if self.registry._lookout._looking else self.wakes
        assert semaphore.acquire(timeout=PATIENCE_S), "nothing finished"

    def look(self, name: str) -> Sight:
        """A file's age is by clocks that no test moves."""
        return dataclasses.replace(self.look_for_real(name), age_s=self.age_s)

    @rule(age_s=st.sampled_from([0.0, 0.1, 100.0]))
    def age(self, age_s: float) -> None:
        """How long ago files that are looked at from now on have changed."""
        self.age_s = age_s

    @rule(name=st.sampled_from(sorted(RANKS)))
    def change(self, name: str) -> None:
        self.disk.write(name)

    @rule(name=st.sampled_from(sorted(RANKS)))
    def lose_a_file(self, name: str) -> None:
        (self.root / name / NAMES[1]).unlink(missing_ok=True)

    @rule(name=st.sampled_from(sorted(RANKS)))
    def remove(self, name: str) -> None:
        shutil.rmtree(self.root / name, ignore_errors=True)

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
        lookout = self.registry._lookout
        while lookout.is_looking:
            # All of them, so that the same draws always come to the same end.
            for _ in range(len(lookout._looking)):
                assert self.looks.acquire(timeout=PATIENCE_S), "no look finished"
            self.poll_once()

    def poll_once(self) -> None:
        versions, intake = self.registry._versions, self.registry._loads
        before = list(versions.queued)
        self.registry.poll()
        going_on = intake._reading
        self.reading += self.disk.begun
        begun = [going_on[job] for job in self.disk.begun]
        self.disk.begun.clear()
        # Nobody is overtaken, and whoever could have a slot is read unless all threads are at work.
        queued = sorted(versions.queued, key=lambda e: e.first)
        evicted = [entry for entry in queued if entry not in before]
        for entry in queued:
            if entry not in evicted and entry.weights is None:
                assert all(other.first < entry.first for other in begun if not other.is_update)
        num_at_work = sum(not job.is_stalled for job in going_on)
        assert num_at_work == NUM_THREADS or all(entry.lacks_slot for entry in queued)
        assert queued == sorted(queued, key=lambda entry: entry.lacks_slot)

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), value=st.integers(1, 3), is_sound=st.booleans(), changes=st.booleans())
    def finish(self, data: st.DataObject, value: int, is_sound: bool, changes: bool) -> None:
        self.finish_one(data.draw(st.sampled_from(self.reading)), Content(value, is_sound, changes))

    def finish_one(self, job: Job[Loaded], content: Content) -> None:
        self.reading.remove(job)
        self.disk.let_go_on(job, content)
        assert self.wakes.acquire(timeout=PATIENCE_S)
        self.poll()

    @rule(name=st.sampled_from(sorted(RANKS)), value=st.integers(1, 3))
    def serve(self, name: str, value: int) -> None:
        """Ask for an adapter and let its first load end: by chance alone few are ever there."""
        lease = self.registry.acquire(name)
        self.poll()
        for job in [job for job in self.reading if self.is_first_load(job, name)]:
            self.finish_one(job, Content(value))
        self.registry.release(lease)

    @precondition(lambda self: self.registry._loads._update)
    @rule(way=st.sampled_from(["evicted", "gone and back"]), others=st.permutations(sorted(RANKS)))
    def lose_what_is_updated(self, way: str, others: list[str]) -> None:
        """Let an adapter leave while a new version is read, and ask for it again."""
        assert self.registry._loads._update
        name = self.registry._loads._update[0].name
        if way == "evicted":
            for other in others:
                if other != name and name in self.whole:
                    self.serve(other, 1)
        else:
            self.remove(name)
            self.now_s += 2.0
            self.registry.release(self.registry.acquire(name))
            self.poll()
            self.disk.write(name)
        self.acquire(name, 0)
        self.poll()

    def is_first_load(self, job: Job[Loaded], name: str) -> bool:
        entry = self.registry._loads._reading.get(job)
        return entry is not None and entry.name == name and not entry.is_update

    @rule(name=st.sampled_from(sorted(RANKS)), value=st.integers(1, 3))
    def replace(self, name: str, value: int) -> None:
        """Have an adapter, change its files and let them settle: an update begins if it can."""
        if name not in self.whole:
            self.serve(name, value)
        self.disk.write(name)
        for _ in range(2):
            self.now_s += 2.0
            self.registry.release(self.registry.acquire(name))
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
        assert self.registry.gauges["host_adapters"] <= self.num_slots
        pool = self.registry._residents.pool
        for lease in self.leases:
            if lease.is_active:
                placement = lease.placement
                assert placement is not None
                assert not any(placement.pages[pool.num_kinds :]), "no vectors"
                for kind, pages in zip(pool.tensors.kinds, placement.pages[: pool.num_kinds], strict=True):
                    for name in ("a", "b"):
                        assert bool((kind[name][:, list(pages)] == float(lease.version)).all())

    @property
    def whole(self) -> list[str]:
        """Adapters that new requests get at once."""
        return [name for name, entry in self.registry._versions.current.items() if entry.is_whole]

    @property
    def num_pinned(self) -> int:
        return sum(state.pinned for state in self.registry.states())

    def state_of(self, name: str) -> str:
        return next((state.state for state in self.registry.states() if state.name == name), "absent")

    def is_pinned(self, name: str) -> bool:
        return any(state.name == name and state.pinned for state in self.registry.states())

    def teardown(self) -> None:
        with self.cleanup:
            if hasattr(self, "registry"):
                self.serve_all()

    def serve_all(self) -> None:
        """Serve whoever still waits, one at a time: none waits for ever, whatever happened before."""
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
                if lease.state == "failed" or (lease.state == "ready" and self.registry.try_activate(lease)):
                    self.registry.release(lease)
                    self.leases.remove(lease)
                    break
        assert not self.leases
        assert not self.reading
        assert not self.registry._loads._reading
        self.all_is_sound()


Machine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestRandomRequests = Machine.TestCase
