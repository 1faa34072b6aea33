"""Adapters move between disk, host and device: one load for many, one error, nobody waits for ever."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora.adapters.adapter_root import AdapterRoot
from manylora.adapters.peft_format import read_adapter
from manylora.adapters.reader import reader
from manylora.adapters.registry import Lease, Registry
from manylora.adapters.weights import AdapterWeights
from manylora.config import EngineConfig
from manylora.errors import (
    InternalError,
    InvalidArgumentError,
    ManyloraError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from manylora.model.spec import ModelSpec

from .conftest import CONFIG, make_tensors, write_adapter
from .pools import make_pool

PATIENCE_S = 30.0
"""A test that waits this long for a load has failed."""


class Bench:
    """A registry over real adapters in a directory of their own."""

    def __init__(self, spec: ModelSpec, root: Path) -> None:
        self.spec = spec
        self.root = root
        self.now_s = 0.0
        self.hung: dict[str, threading.Event] = {}
        """Adapters whose files give no answer, once the event is set: the clock moves while preloading waits
        for them."""
        self.wakes = threading.Semaphore(0)
        self.looks = threading.Semaphore(0)
        self.registries: list[Registry] = []

    def write(self, *names: str, rank: int = 4, seed: int | None = None, **changes: Any) -> None:
        for name in names:
            tensors = make_tensors(self.spec, rank=rank, seed=sum(map(ord, name)) if seed is None else seed)
            write_adapter(self.root / name, tensors, {**CONFIG, "r": rank, **changes})

    def registry(self, read: Any = None, **settings: Any) -> Registry:
        values = {"max_loras": 2, "max_lora_rank": 16, "max_cpu_loras": 4, "adapter_settle_s": 0.0}
        values |= settings
        config = EngineConfig(base_model="base", adapter_root=str(self.root), **values)
        pool = make_pool(
            self.spec, config.max_loras, config.max_lora_rank, torch.float32, torch.device("cpu")
        )
        root = AdapterRoot(config.adapter_root)
        registry = Registry(
            config,
            root,
            read or reader(config, root, self.spec, torch.float32, pin=False),
            pool,
            self.wake,
            clock=lambda: self.now_s,
            wait=lambda timeout_s: self.wait(registry, timeout_s),
        )
        self.registries.append(registry)
        return registry

    def wait(self, registry: Registry, timeout_s: float) -> None:
        """Preloading waits: in real time for a look or a read, otherwise by the clock, which moves on."""
        names = [watch.name for watch in registry._lookout._looking.values()]
        names += [adapter.name for adapter in registry._loads._reading.values()]
        deadline_s = time.monotonic() + PATIENCE_S
        while any(name not in self.hung or not self.hung[name].is_set() for name in names):
            if self.looks.acquire(timeout=0.01) or self.wakes.acquire(timeout=0.01):
                return
            assert time.monotonic() < deadline_s, "no look and no load finished"
        self.now_s += timeout_s

    def wake(self) -> None:
        is_look = threading.current_thread().name.startswith("manylora-looker")
        (self.looks if is_look else self.wakes).release()

    def poll(self, registry: Registry) -> None:
        """Poll until all looks at files that are due have ended, and what they bring about has begun."""
        registry.poll()
        while registry._lookout.is_looking:
            assert self.looks.acquire(timeout=PATIENCE_S), "no look finished"
            registry.poll()

    def settle(self, registry: Registry, *leases: Lease) -> None:
        """Poll until none of the leases is being loaded."""
        self.poll(registry)
        while any(lease.state == "loading" for lease in leases):
            assert self.wakes.acquire(timeout=PATIENCE_S), "no load finished"
            self.poll(registry)

    def rest(self, registry: Registry) -> None:
        """Poll until nothing is looked at or read any more."""
        self.poll(registry)
        while registry._loads._reading:
            assert self.wakes.acquire(timeout=PATIENCE_S), "no load finished"
            self.poll(registry)

    def ask(self, registry: Registry, name: str) -> Lease:
        """A lease that is ready or queued; raises the error of one that has failed."""
        lease = registry.acquire(name)
        self.settle(registry, lease)
        if lease.error is not None:
            registry.release(lease)
            raise lease.error
        return lease

    def ready(self, registry: Registry, name: str) -> Lease:
        lease = self.ask(registry, name)
        assert lease.state == "ready"
        return lease


@pytest.fixture
def bench(llama_spec: ModelSpec, tmp_path: Path) -> Iterator[Bench]:
    """Every registry of a test must be sound at its end."""
    root = tmp_path / "adapters"
    root.mkdir()
    bench = Bench(llama_spec, root)
    yield bench
    for registry in bench.registries:
        assert registry.check() == []
        registry.close()


def states(registry: Registry) -> dict[str, str]:
    return {state.name: state.state for state in registry.states()}


def holds(registry: Registry, lease: Lease, spec: ModelSpec) -> bool:
    """Whether the pages of an active lease hold what its adapter's files say."""
    placement = lease.placement
    assert placement is not None
    directory = registry.root.find(lease.adapter_id)
    weights, _ = read_adapter(directory, spec, max_lora_rank=64, dtype=torch.float32, pin=False)
    pool = registry._residents.pool
    return all(
        torch.equal(tensors[name][:, list(pages)], part)
        for tensors, pages, kind in zip(
            pool.tensors.kinds, placement.pages[: pool.num_kinds], weights.kinds, strict=True
        )
        if kind is not None
        for name, part in kind.parts.items()
    )


def test_an_adapter_goes_from_disk_to_the_device(bench: Bench, llama_spec: ModelSpec) -> None:
    bench.write("a")
    registry = bench.registry()
    lease = registry.acquire("a")
    assert (lease.state, lease.version, lease.placement) == ("loading", "", None)
    bench.settle(registry, lease)
    assert lease.state == "ready"
    assert states(registry) == {"a": "host"}
    assert lease.num_pages == (1, 1, 0, 0, 0, 0, 0, 0)
    assert lease.scale == 2.0
    assert registry.try_activate(lease)
    assert lease.is_active
    assert holds(registry, lease, llama_spec)
    (state,) = registry.states()
    assert (state.state, state.version, state.rank, state.num_running) == ("device", lease.version, 4, 1)
    registry.deactivate(lease)
    assert lease.placement is None
    registry.release(lease)
    assert states(registry) == {"a": "device"}
    assert registry.counters == {
        "host_loads": 1,
        "host_evictions": 0,
        "device_copies": 1,
        "device_evictions": 0,
    }
    assert registry.gauges["pool_pages_free"] == registry.gauges["pool_pages_total"] - 2


def test_many_requests_for_an_absent_adapter_cause_one_load(bench: Bench) -> None:
    bench.write("a")
    registry = bench.registry()
    first = [registry.acquire("a") for _ in range(3)]
    bench.poll(registry)
    leases = [*first, *(registry.acquire("a") for _ in range(3))]
    bench.settle(registry, *leases)
    assert [lease.state for lease in leases] == ["ready"] * 6
    assert registry.counters["host_loads"] == 1
    for lease in leases:
        registry.release(lease)


@pytest.mark.parametrize("name", ["", "..", "../b", "a/b", "/etc", ".hidden", "a\n", "x" * 129, "a\x00", "ä"])
def test_names_that_no_adapter_has_are_refused(bench: Bench, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^adapter name .*: must match"):
        bench.registry().acquire(name)


def test_an_unknown_name_is_not_found_and_nothing_else_is_named(bench: Bench) -> None:
    bench.write("tenant-1", "tenant-2")
    registry = bench.registry()
    with pytest.raises(NotFoundError) as refused:
        bench.ask(registry, "absent")
    assert refused.value.message == "adapter 'absent' is not found"
    assert registry.states() == []


def test_a_file_in_place_of_a_directory_is_not_found(bench: Bench) -> None:
    (bench.root / "a").write_text("no directory")
    with pytest.raises(NotFoundError):
        bench.ask(bench.registry(), "a")


def test_links_must_stay_inside_the_root(bench: Bench, tmp_path: Path) -> None:
    bench.write("a")
    write_adapter(tmp_path / "outside", make_tensors(bench.spec), CONFIG)
    (bench.root / "inside").symlink_to("a")
    (bench.root / "leaves").symlink_to(tmp_path / "outside")
    (bench.root / "up").symlink_to("..")
    (bench.root / "self").symlink_to(".")
    (bench.root / "loop").symlink_to("loop")
    registry = bench.registry()
    registry.release(bench.ready(registry, "inside"))
    for name in ("leaves", "up", "self"):
        with pytest.raises(
            InvalidArgumentError, match=rf"^adapter '{name}' is a link that leaves adapter_root$"
        ):
            bench.ask(registry, name)
    with pytest.raises(NotFoundError):
        bench.ask(registry, "loop")


def test_without_a_root_there_are_no_adapters(llama_spec: ModelSpec) -> None:
    config = EngineConfig(base_model="base")
    pool = make_pool(llama_spec, 1, 16, torch.float32, torch.device("cpu"))
    root = AdapterRoot("")
    read = reader(config, root, llama_spec, torch.float32, pin=False)
    registry = Registry(config, root, read, pool, wake=lambda: None)
    registry.preload(strict=True)
    with pytest.raises(NotFoundError, match="has no adapter_root"):
        registry.acquire("a")
    registry.close()


def test_a_failed_load_is_an_error_for_those_who_wait_and_nothing_more(bench: Bench) -> None:
    bench.write("good")
    bench.write("bad", use_dora=True)
    registry = bench.registry()
    good = bench.ready(registry, "good")
    assert registry.try_activate(good)
    bad = [registry.acquire("bad") for _ in range(2)]
    bench.settle(registry, *bad)
    assert [lease.state for lease in bad] == ["failed", "failed"]
    for lease in bad:
        assert type(lease.error) is UnsupportedError
        assert lease.error.message == "adapter 'bad': use_dora=True: DoRA is not served"
        registry.release(lease)
    assert states(registry) == {"good": "device", "bad": "failed"}
    assert good.is_active
    registry.release(good)


def test_a_broken_adapter_is_tried_again_after_a_pause_only(bench: Bench) -> None:
    bench.write("a", use_dora=True)
    reads: list[str] = []

    def read(directory: Path) -> AdapterWeights:
        reads.append(directory.name)
        return read_adapter(directory, bench.spec, max_lora_rank=16, dtype=torch.float32, pin=False)[0]

    registry = bench.registry(read)
    lease = registry.acquire("a")
    bench.settle(registry, lease)
    registry.release(lease)
    for num_reads, pause_s in ((1, 1.0), (2, 2.0), (3, 4.0)):
        for _ in range(3):
            with pytest.raises(UnsupportedError, match=r"^adapter 'a': use_dora"):
                bench.ask(registry, "a")
        assert reads == ["a"] * num_reads
        bench.now_s += pause_s
        with pytest.raises(UnsupportedError, match=r"^adapter 'a': use_dora"):
            bench.ask(registry, "a")


def test_a_broken_adapter_that_has_been_repaired_is_read_at_once(bench: Bench) -> None:
    bench.write("a", use_dora=True)
    registry = bench.registry()
    for _ in range(7):
        with pytest.raises(UnsupportedError, match=r"^adapter 'a': use_dora"):
            bench.ask(registry, "a")
        bench.now_s += 60.0
    bench.write("a")
    registry.release(bench.ready(registry, "a"))
    assert states(registry) == {"a": "host"}


def test_a_removed_adapter_is_not_found_even_if_it_had_failed(bench: Bench) -> None:
    bench.write("a", use_dora=True)
    registry = bench.registry()
    lease = registry.acquire("a")
    bench.settle(registry, lease)
    registry.release(lease)
    for path in (bench.root / "a").iterdir():
        path.unlink()
    (bench.root / "a").rmdir()
    with pytest.raises(NotFoundError):
        bench.ask(registry, "a")
    assert registry.states() == []


def test_a_fault_of_ours_is_internal_and_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.write("a")

    def read(directory: Path) -> AdapterWeights:
        raise ZeroDivisionError(f"while reading {directory.name}")

    registry = bench.registry(read)
    lease = registry.acquire("a")
    with caplog.at_level(logging.ERROR):
        bench.settle(registry, lease)
    assert type(lease.error) is InternalError
    assert lease.error.message == "adapter 'a' could not be loaded; the log has the reason"
    assert "ZeroDivisionError: while reading a" in caplog.text
    registry.release(lease)


def test_a_wake_that_fails_loses_no_load(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.write("a", "b", "c", "d")
    registry = bench.registry()

    def wake() -> None:
        bench.wakes.release()
        raise RuntimeError("nobody listens")

    registry._loader._wake = wake
    for name in ("a", "b", "c", "d"):
        registry.release(bench.ready(registry, name))
    registry.close()
    assert "nobody listens" in caplog.text


def test_the_host_cache_drops_the_least_recently_used(bench: Bench) -> None:
    bench.write("a", "b", "c")
    registry = bench.registry(max_loras=1, max_cpu_loras=2)
    for name in ("a", "b", "a", "c"):
        registry.release(bench.ready(registry, name))
    assert states(registry) == {"a": "host", "c": "host"}
    assert registry.counters["host_evictions"] == 1


def test_what_leaves_the_host_leaves_the_device(bench: Bench) -> None:
    bench.write("a", "b")
    registry = bench.registry(max_loras=1, max_cpu_loras=1)
    lease = bench.ready(registry, "a")
    assert registry.try_activate(lease)
    registry.release(lease)
    registry.release(bench.ready(registry, "b"))
    assert states(registry) == {"b": "host"}
    assert registry.counters["device_evictions"] == 1
    assert registry.gauges["pool_pages_free"] == registry.gauges["pool_pages_total"]


def test_what_runs_is_never_evicted(bench: Bench, llama_spec: ModelSpec) -> None:
    bench.write("a", "b")
    registry = bench.registry(max_loras=1, max_cpu_loras=1)
    running = bench.ready(registry, "a")
    assert registry.try_activate(running)
    waiting = registry.acquire("b")
    bench.settle(registry, waiting)
    assert waiting.state == "queued"
    assert holds(registry, running, llama_spec)
    registry.release(running)
    bench.settle(registry, waiting)
    assert waiting.state == "ready"
    registry.release(waiting)


def test_no_pages_no_activation(bench: Bench) -> None:
    bench.write("a", "b")
    registry = bench.registry(max_loras=1)
    a, b = bench.ready(registry, "a"), bench.ready(registry, "b")
    assert registry.try_activate(a)
    assert not registry.try_activate(b)
    registry.deactivate(a)
    assert registry.try_activate(b)
    assert states(registry) == {"a": "host", "b": "device"}
    assert registry.counters["device_evictions"] == 1
    registry.release(a)
    registry.release(b)


def test_a_slot_goes_to_the_oldest_lease(bench: Bench) -> None:
    """A younger adapter that is loaded but not running gives way, and queues again."""
    bench.write("a", "b", "c")
    registry = bench.registry(max_loras=1, max_cpu_loras=1)
    a = bench.ready(registry, "a")
    assert registry.try_activate(a)
    b, c = registry.acquire("b"), registry.acquire("c")
    bench.settle(registry, b, c)
    assert (b.state, c.state) == ("queued", "queued")
    registry.release(a)
    bench.settle(registry, b, c)
    assert (b.state, c.state) == ("ready", "queued")
    again = registry.acquire("b")
    registry.release(b)
    bench.settle(registry, again, c)
    assert (again.state, c.state) == ("queued", "ready")
    registry.release(c)
    bench.settle(registry, again)
    assert again.state == "ready"
    registry.release(again)


def test_a_slot_goes_to_the_highest_priority_and_then_to_the_oldest_lease(bench: Bench) -> None:
    bench.write("a", "b", "c", "d")
    registry = bench.registry(max_loras=1, max_cpu_loras=1)
    a = bench.ready(registry, "a")
    assert registry.try_activate(a)
    b, c, d = (registry.acquire(name, priority) for name, priority in (("b", 0), ("c", 5), ("d", 5)))
    registry.release(a)
    bench.settle(registry, b, c, d)
    assert [lease.state for lease in (b, c, d)] == ["queued", "ready", "queued"]
    registry.release(c)
    bench.settle(registry, b, d)
    assert [lease.state for lease in (b, d)] == ["queued", "ready"]
    registry.release(d)
    bench.settle(registry, b)
    assert b.state == "ready"
    registry.release(b)


def test_what_waits_only_gives_way_to_a_higher_priority_that_comes_later(bench: Bench) -> None:
    bench.write("a", "b", "c")
    registry = bench.registry(max_loras=1, max_cpu_loras=1)
    a = bench.ready(registry, "a")
    lower, higher = registry.acquire("b", -1), registry.acquire("c", 1)
    bench.settle(registry, a, lower, higher)
    assert [lease.state for lease in (a, lower, higher)] == ["queued", "queued", "ready"]
    registry.release(higher)
    bench.settle(registry, a, lower)
    assert [lease.state for lease in (a, lower)] == ["ready", "queued"]
    registry.release(a)
    registry.release(lower)


def test_one_lease_of_high_priority_brings_its_adapter_forward_while_it_lasts(bench: Bench) -> None:
    bench.write("a", "b", "c")
    registry = bench.registry(max_loras=1, max_cpu_loras=1)
    a = bench.ready(registry, "a")
    assert registry.try_activate(a)
    b, c, hurried = registry.acquire("b"), registry.acquire("c"), registry.acquire("c", 9)
    registry.release(hurried)
    registry.release(a)
    bench.settle(registry, b, c)
    assert (b.state, c.state) == ("ready", "queued")
    hurried = registry.acquire("c", 9)
    bench.settle(registry, b, c, hurried)
    assert [lease.state for lease in (b, c, hurried)] == ["queued", "ready", "ready"]
    for lease in (b, c, hurried):
        registry.release(lease)


def test_a_running_adapter_does_not_give_way_to_an_older_lease(bench: Bench, llama_spec: ModelSpec) -> None:
    bench.write("a", "b")
    registry = bench.registry(max_loras=1, max_cpu_loras=1)
    first = bench.ready(registry, "a")
    b = registry.acquire("b")
    running = registry.acquire("a")
    assert registry.try_activate(running)
    registry.release(first)
    bench.settle(registry, b)
    assert (running.state, b.state) == ("ready", "queued")
    assert holds(registry, running, llama_spec)
    registry.deactivate(running)
    bench.settle(registry, b, running)
    assert (running.state, b.state) == ("queued", "ready")
    registry.release(b)
    registry.release(running)


def test_an_older_waiting_adapter_does_not_give_way(bench: Bench) -> None:
    bench.write("a", "b")
    registry = bench.registry(max_loras=1, max_cpu_loras=1)
    a = bench.ready(registry, "a")
    b = registry.acquire("b")
    bench.settle(registry, a, b)
    assert (a.state, b.state) == ("ready", "queued")
    registry.release(b)
    assert states(registry) == {"a": "host"}
    registry.release(a)


def test_leases_end_at_any_stage(bench: Bench) -> None:
    bench.write("a", "b")
    gate = threading.Event()

    def read(directory: Path) -> AdapterWeights:
        assert gate.wait(PATIENCE_S)
        return read_adapter(directory, bench.spec, max_lora_rank=16, dtype=torch.float32, pin=False)[0]

    registry = bench.registry(read, max_loras=1, max_cpu_loras=1)
    loading, queued = registry.acquire("a"), registry.acquire("b")
    bench.poll(registry)
    assert (loading.state, queued.state) == ("loading", "queued")
    registry.release(loading)
    registry.release(queued)
    assert states(registry) == {"a": "loading"}
    gate.set()
    assert bench.wakes.acquire(timeout=PATIENCE_S)
    bench.poll(registry)
    assert states(registry) == {"a": "host"}
    with pytest.raises(AssertionError, match="released twice"):
        registry.release(loading)


class Gate:
    """Reads that begin at once and end one by one, as the test says."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.begun: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.may_end = threading.Semaphore(0)

    def read(self, directory: Path) -> AdapterWeights:
        self.begun.put(directory.name)
        assert self.may_end.acquire(timeout=PATIENCE_S)
        return read_adapter(directory, self.spec, max_lora_rank=16, dtype=torch.float32, pin=False)[0]

    def next(self) -> str:
        return self.begun.get(timeout=PATIENCE_S)

    def end_one(self, bench: Bench, registry: Registry) -> None:
        self.may_end.release()
        assert bench.wakes.acquire(timeout=PATIENCE_S)
        bench.poll(registry)


def test_a_load_of_higher_priority_waits_for_those_that_have_begun_only(bench: Bench) -> None:
    names = [f"cold-{number}" for number in range(6)]
    bench.write(*names, "urgent")
    gate = Gate(bench.spec)
    registry = bench.registry(gate.read, max_cpu_loras=8)
    leases = [registry.acquire(name) for name in names]
    bench.poll(registry)
    assert {gate.next(), gate.next()} == {"cold-0", "cold-1"}
    urgent = registry.acquire("urgent", 1000)
    bench.poll(registry)
    # None lacks a slot: all wait for threads.
    assert [lease.state for lease in (*leases, urgent)] == ["loading"] * 7
    for expected in ("urgent", "cold-2", "cold-3", "cold-4", "cold-5"):
        gate.end_one(bench, registry)
        assert gate.next() == expected
        assert registry.check() == []
    for _ in range(2):
        gate.end_one(bench, registry)
    for lease in (*leases, urgent):
        assert lease.state == "ready"
        registry.release(lease)


def test_a_load_that_nobody_waits_for_any_more_is_not_begun_and_costs_no_slot(bench: Bench) -> None:
    names = [f"cold-{number}" for number in range(6)]
    bench.write(*names, "warm", "other")
    gate = Gate(bench.spec)
    registry = bench.registry(gate.read, max_cpu_loras=4)
    warm = registry.acquire("warm")
    bench.poll(registry)
    assert gate.next() == "warm"
    gate.end_one(bench, registry)
    registry.release(warm)
    leases = [registry.acquire(name) for name in names]
    bench.poll(registry)
    assert {gate.next(), gate.next()} == {"cold-0", "cold-1"}
    assert [lease.state for lease in leases] == ["loading"] * 4 + ["queued"] * 2
    assert states(registry)["warm"] == "host"
    for lease in leases:
        registry.release(lease)
    assert states(registry) == {"cold-0": "loading", "cold-1": "loading", "warm": "host"}
    other = registry.acquire("other")
    gate.end_one(bench, registry)
    assert gate.next() == "other"
    for _ in range(2):
        gate.end_one(bench, registry)
    assert other.state == "ready"
    assert registry.counters["host_evictions"] == 0
    registry.release(other)


def test_a_request_goes_on_under_the_version_that_it_began_with(bench: Bench, llama_spec: ModelSpec) -> None:
    """Though that gave way to another adapter meanwhile, in the only slot, and its files are others now."""
    bench.write("a", "b", seed=1)
    registry = bench.registry(max_loras=1, max_cpu_loras=1, adapter_check_s=0.0)
    first = bench.ready(registry, "b")
    assert registry.try_activate(first)
    a = registry.acquire("a")
    leftover = registry.acquire("b")
    bench.settle(registry, a, leftover)
    assert registry.try_activate(leftover)
    begun = leftover.version
    registry.deactivate(leftover)
    registry.release(first)
    bench.settle(registry, a, leftover)
    assert (a.state, leftover.state) == ("ready", "queued")
    bench.write("b", seed=2)
    fresh = registry.acquire("b")
    bench.rest(registry)
    registry.release(a)
    bench.rest(registry)
    assert (leftover.state, leftover.version, fresh.state) == ("ready", begun, "queued")
    assert registry.try_activate(leftover)
    registry.release(leftover)
    bench.settle(registry, fresh)
    assert fresh.state == "ready"
    assert fresh.version != begun
    assert registry.try_activate(fresh)
    assert holds(registry, fresh, llama_spec)
    registry.release(fresh)


def test_preload_reads_before_serving_and_pins(bench: Bench) -> None:
    bench.write("a", "b", "c", "d", "e")
    registry = bench.registry(
        max_cpu_loras=3, preload_adapters=("a", "b"), pinned_adapters=("b",), max_lora_rank=32
    )
    registry.preload(strict=True)
    assert states(registry) == {"a": "host", "b": "device"}
    assert [state.pinned for state in registry.states()] == [False, True]
    for name in ("c", "d", "e"):
        lease = bench.ready(registry, name)
        assert registry.try_activate(lease)
        registry.release(lease)
    assert states(registry)["b"] == "device"
    registry.unpin("b")
    with pytest.raises(InvalidArgumentError, match="is not pinned"):
        registry.unpin("b")
    for name in ("a", "c", "d"):
        registry.release(bench.ready(registry, name))
    assert "b" not in states(registry)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"preload_adapters": ("absent",)}, NotFoundError, "adapter 'absent' is not found"),
        (
            {"preload_adapters": ("dora",)},
            UnsupportedError,
            "adapter 'dora': use_dora=True: DoRA is not served",
        ),
        (
            {"preload_adapters": ("a", "b", "c"), "max_cpu_loras": 2},
            InvalidArgumentError,
            "3 adapters are to be preloaded, max_cpu_loras=2",
        ),
        (
            {"pinned_adapters": ("a",), "preload_adapters": ("b",), "max_loras": 1},
            InvalidArgumentError,
            "adapter 'b' has no room beside the pinned ones before it",
        ),
    ],
    ids=["absent", "refused", "too many", "no room"],
)
def test_what_cannot_be_preloaded_stops_the_start(
    bench: Bench, settings: dict[str, Any], error: type[ManyloraError], message: str
) -> None:
    bench.write("a", "b", "c")
    bench.write("dora", use_dora=True)
    with pytest.raises(error) as refused:
        bench.registry(**settings).preload(strict=True)
    assert refused.value.message == message


def break_files(bench: Bench, name: str) -> None:
    (bench.root / name / "adapter_model.safetensors").write_bytes(b"no tensors")


def test_an_engine_that_is_started_again_does_without_what_cannot_be_preloaded(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.write("a", "b", "dora")
    bench.write("dora", use_dora=True)
    registry = bench.registry(pinned_adapters=("absent", "b"), preload_adapters=("dora", "a"))
    with caplog.at_level(logging.ERROR):
        registry.preload(strict=False)
    assert states(registry) == {"a": "host", "absent": "failed", "b": "device", "dora": "failed"}
    assert "adapter 'dora' cannot be preloaded and has failed: adapter 'dora': use_dora=True" in caplog.text
    with pytest.raises(UnsupportedError, match=r"^adapter 'dora': use_dora=True: DoRA is not served$"):
        bench.ask(registry, "dora")
    with pytest.raises(NotFoundError, match=r"^adapter 'absent' is not found$"):
        bench.ask(registry, "absent")
    registry.release(bench.ready(registry, "a"))


def test_a_pin_that_was_asked_for_comes_into_force_when_the_adapter_loads(bench: Bench) -> None:
    bench.write("a", "b", "c", "d", "e")
    break_files(bench, "a")
    registry = bench.registry(pinned_adapters=("a",), max_cpu_loras=3)
    registry.preload(strict=False)
    assert states(registry) == {"a": "failed"}
    bench.write("a")
    bench.now_s += 1.0
    lease = bench.ready(registry, "a")
    assert [(s.name, s.state, s.pinned) for s in registry.states()] == [("a", "device", True)]
    registry.release(lease)
    for name in ("b", "c", "d", "e"):
        registry.release(bench.ready(registry, name))
    assert states(registry)["a"] == "device"
    registry.unpin("a")
    with pytest.raises(InvalidArgumentError, match="is not pinned"):
        registry.unpin("a")


def test_a_pin_that_is_due_can_be_called_off(bench: Bench) -> None:
    bench.write("a")
    break_files(bench, "a")
    registry = bench.registry(pinned_adapters=("a",))
    registry.preload(strict=False)
    registry.unpin("a")
    bench.write("a")
    bench.now_s += 1.0
    registry.release(bench.ready(registry, "a"))
    assert [state.pinned for state in registry.states()] == [False]


def test_a_pin_that_is_due_waits_for_pages_and_fails_those_it_leaves_none(bench: Bench) -> None:
    bench.write("a", "b")
    break_files(bench, "a")
    registry = bench.registry(max_loras=1, pinned_adapters=("a",))
    registry.preload(strict=False)
    running, waiting = bench.ready(registry, "b"), bench.ready(registry, "b")
    assert registry.try_activate(running)
    bench.write("a")
    bench.now_s += 1.0
    a = bench.ready(registry, "a")
    assert states(registry) == {"a": "host", "b": "device"}
    registry.release(running)
    bench.poll(registry)
    assert states(registry) == {"a": "device"}
    assert type(waiting.error) is UnavailableError
    assert waiting.error.message == "adapter 'b' has no room in the device pool beside pinned ones"
    registry.release(waiting)
    registry.release(a)


def test_a_new_version_that_waits_for_a_slot_goes_when_a_pin_leaves_it_no_pages(bench: Bench) -> None:
    bench.write("a")
    bench.write("b", rank=32)
    break_files(bench, "a")
    registry = bench.registry(
        max_loras=1, max_lora_rank=32, max_cpu_loras=2, adapter_check_s=0.0, pinned_adapters=("a",)
    )
    registry.preload(strict=False)
    running = bench.ready(registry, "b")
    assert registry.try_activate(running)
    bench.write("a")
    bench.now_s += 1.0
    a = bench.ready(registry, "a")
    bench.write("b", rank=32, seed=2)
    registry.release(bench.ready(registry, "b"))
    bench.rest(registry)
    (new,) = registry._versions.queued
    assert (new.is_update, new.leases, registry._pins.due) == (True, {}, {"a"})
    registry.deactivate(running)
    bench.poll(registry)
    assert states(registry) == {"a": "device"}
    assert not registry._versions.queued
    with pytest.raises(UnavailableError, match="'b' has no room in the device pool beside pinned ones"):
        bench.ask(registry, "b")
    registry.release(running)
    registry.release(a)


def test_a_slot_that_is_kept_for_a_pin_goes_to_nobody_else(bench: Bench) -> None:
    bench.write("a", "b")
    break_files(bench, "a")
    registry = bench.registry(max_loras=1, max_cpu_loras=1, pinned_adapters=("a",))
    registry.preload(strict=False)
    with pytest.raises(UnavailableError, match=r"^adapter 'b' cannot be loaded: every host slot is pinned$"):
        bench.ask(registry, "b")


def test_an_adapter_that_no_longer_fits_beside_the_pinned_ones_fails_alone(bench: Bench) -> None:
    bench.write("a", "b")
    registry = bench.registry(max_loras=1, pinned_adapters=("a",), preload_adapters=("b",))
    registry.preload(strict=False)
    assert states(registry) == {"a": "device", "b": "failed"}
    with pytest.raises(InvalidArgumentError, match="'b' has no room beside the pinned ones before it"):
        bench.ask(registry, "b")


def test_what_finds_no_room_beside_pinned_adapters_fails(bench: Bench) -> None:
    bench.write("a", "b")
    registry = bench.registry(max_loras=1, pinned_adapters=("a",))
    registry.preload(strict=True)
    lease = registry.acquire("b")
    bench.settle(registry, lease)
    assert type(lease.error) is UnavailableError
    assert lease.error.message == "adapter 'b' has no room in the device pool beside pinned ones"
    registry.release(lease)


def test_when_every_slot_is_pinned_others_are_refused(bench: Bench) -> None:
    bench.write("a", "b")
    registry = bench.registry(max_loras=1, max_cpu_loras=1, pinned_adapters=("a",))
    registry.preload(strict=True)
    with pytest.raises(UnavailableError, match=r"^adapter 'b' cannot be loaded: every host slot is pinned$"):
        bench.ask(registry, "b")
    registry.release(bench.ready(registry, "a"))


def test_pins_leave_room_for_others(bench: Bench) -> None:
    bench.write("a", "b", "c")
    registry = bench.registry(max_loras=2, max_cpu_loras=4)
    with pytest.raises(UnavailableError, match=r"^adapter 'a' is not loaded"):
        registry.pin("a")
    for name in ("a", "b"):
        registry.release(bench.ready(registry, name))
    registry.pin("a")
    registry.pin("a")
    with pytest.raises(UnavailableError, match="others need a host slot and 1 device pages of each kind"):
        registry.pin("b")
    c = bench.ready(registry, "c")
    assert registry.try_activate(c)
    registry.release(c)
    assert states(registry) == {"a": "device", "b": "host", "c": "device"}


def test_twelve_adapters_take_turns_in_four_slots(bench: Bench, llama_spec: ModelSpec) -> None:
    names = [f"adapter-{number}" for number in range(12)]
    bench.write(*names)
    registry = bench.registry(max_loras=2, max_cpu_loras=4)
    leases = [registry.acquire(name) for _ in range(3) for name in names]
    done: list[Lease] = []
    for _turn in range(10 * len(leases)):
        if len(done) == len(leases):
            break
        bench.settle(registry, *(lease for lease in leases if lease not in done))
        for lease in leases:
            if lease not in done and lease.state == "ready" and registry.try_activate(lease):
                assert holds(registry, lease, llama_spec)
                registry.release(lease)
                done.append(lease)
                break
    assert len(done) == len(leases)
    assert registry.counters["host_evictions"] > 0
    assert registry.counters["device_evictions"] > 0
    assert registry.gauges["host_adapters"] == 4


def test_closing_waits_for_loads_and_drops_the_rest(bench: Bench) -> None:
    bench.write("a", "b", "c")
    begun, gate = threading.Semaphore(0), threading.Event()
    reads: list[str] = []

    def read(directory: Path) -> AdapterWeights:
        reads.append(directory.name)
        begun.release()
        assert gate.wait(PATIENCE_S)
        return read_adapter(directory, bench.spec, max_lora_rank=16, dtype=torch.float32, pin=False)[0]

    registry = bench.registry(read)
    leases = [registry.acquire(name) for name in ("a", "b", "c")]
    bench.poll(registry)
    assert begun.acquire(timeout=PATIENCE_S)
    assert begun.acquire(timeout=PATIENCE_S)
    closer = threading.Thread(target=registry.close)
    closer.start()
    while not registry._loader._closing.is_set():
        assert closer.is_alive()
    gate.set()
    closer.join(PATIENCE_S)
    assert not closer.is_alive()
    assert sorted(reads) == ["a", "b"]
    assert [lease.state for lease in leases] == ["loading"] * 3
    assert states(registry) == dict.fromkeys("abc", "loading")


def test_config_of_an_adapter_is_not_leaked_by_its_error(bench: Bench) -> None:
    bench.write("secret-tenant")
    (bench.root / "secret-tenant" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    (bench.root / "alias").symlink_to("secret-tenant")
    registry = bench.registry()
    lease = registry.acquire("alias")
    bench.settle(registry, lease)
    assert lease.error is not None
    assert lease.error.message == "adapter 'alias': peft_type='IA3': only 'LORA' is served"
    registry.release(lease)
