"""Files that change, go and hang while their adapter is served, on a clock that the test moves."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora.adapters import adapter_files, adapter_root, loader, verdicts
from manylora.adapters.adapter_root import AdapterRoot
from manylora.adapters.peft_format import read_adapter
from manylora.adapters.weights import AdapterWeights
from manylora.errors import InvalidArgumentError, NotFoundError, UnavailableError
from manylora.model.spec import ModelSpec

from .conftest import Write, make_tensors
from .test_registry import PATIENCE_S, Bench, Gate, bench, holds

__all__ = ["bench"]


@pytest.fixture
def old_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were written long before the test, as far as first loads are concerned."""
    real = adapter_files.time.time
    monkeypatch.setattr(adapter_files.time, "time", lambda: real() + 1000)


def replace(bench: Bench, name: str, seed: int) -> None:
    bench.write(name, seed=seed)


@pytest.mark.usefixtures("old_files")
def test_a_replaced_adapter_serves_new_requests_while_running_ones_end_on_theirs(
    bench: Bench, llama_spec: ModelSpec
) -> None:
    bench.write("a", seed=1)
    registry = bench.registry(adapter_settle_s=1.0, adapter_check_s=2.0)
    running, waiting = bench.ready(registry, "a"), bench.ready(registry, "a")
    assert registry.try_activate(running)
    replace(bench, "a", seed=2)
    bench.now_s += 2.1
    early = bench.ready(registry, "a")
    bench.rest(registry)
    assert early.version == running.version
    assert registry.next_s == pytest.approx(bench.now_s + 1.0)
    bench.now_s += 1.0
    bench.rest(registry)
    late = bench.ready(registry, "a")
    # What has not begun goes on under the new version too.
    assert early.version == waiting.version == late.version != running.version
    assert registry.try_activate(late)
    assert holds(registry, late, llama_spec)
    assert [(s.name, s.outdated, s.num_running) for s in registry.states()] == [
        ("a", False, 1),
        ("a", True, 1),
    ]
    assert registry.gauges["host_adapters"] == 2
    registry.release(running)
    assert [(s.name, s.outdated, s.num_running) for s in registry.states()] == [("a", False, 1)]
    assert registry.counters["host_evictions"] == 0
    for lease in (waiting, early, late):
        registry.release(lease)


@pytest.mark.usefixtures("old_files")
def test_with_one_slot_new_requests_wait_for_those_on_the_old_version_and_none_fails(
    bench: Bench, llama_spec: ModelSpec
) -> None:
    bench.write("a", "b", seed=1)
    registry = bench.registry(max_loras=1, max_cpu_loras=1, adapter_settle_s=0.0, adapter_check_s=0.0)
    running = bench.ready(registry, "a")
    assert registry.try_activate(running)
    other = registry.acquire("b")
    replace(bench, "a", seed=2)
    fresh = registry.acquire("a")
    bench.rest(registry)
    assert [lease.state for lease in (running, fresh, other)] == ["ready", "queued", "queued"]
    registry.deactivate(running)
    bench.rest(registry)
    # The one that waits longest has the slot, and the version that has begun is not lost.
    assert [lease.state for lease in (running, fresh, other)] == ["ready", "queued", "queued"]
    registry.release(running)
    bench.rest(registry)
    assert [lease.state for lease in (fresh, other)] == ["queued", "ready"]
    registry.release(other)
    bench.rest(registry)
    assert fresh.state == "ready"
    assert registry.try_activate(fresh)
    assert holds(registry, fresh, llama_spec)
    registry.release(fresh)


@pytest.mark.usefixtures("old_files")
@pytest.mark.parametrize("is_running", [False, True])
@pytest.mark.parametrize("harm", ["broken", "truncated", "a file is missing"])
def test_files_that_have_become_invalid_leave_the_old_version_serving(
    bench: Bench, caplog: pytest.LogCaptureFixture, harm: str, is_running: bool
) -> None:
    bench.write("a", seed=1)
    registry = bench.registry(max_loras=1, max_cpu_loras=1, adapter_settle_s=1.0, adapter_check_s=0.0)
    first = bench.ready(registry, "a")
    if is_running:
        assert registry.try_activate(first)
    weights = bench.root / "a" / "adapter_model.safetensors"
    if harm == "broken":
        bench.write("a", use_dora=True)
    elif harm == "truncated":
        os.truncate(weights, 100)
    else:
        weights.unlink()
    with caplog.at_level(logging.WARNING):
        for _ in range(8):
            lease = bench.ready(registry, "a")
            assert lease.version == first.version
            registry.release(lease)
            bench.now_s += 0.6
            bench.rest(registry)
    (state,) = registry.states()
    assert state.state in ("host", "device")
    assert state.files_error
    assert len([record for record in caplog.records if "is served on" in record.message]) == 1
    registry.release(first)
    bench.write("a", seed=2)
    for _ in range(3):
        registry.release(bench.ready(registry, "a"))
        bench.now_s += 1.0
        bench.rest(registry)
    (state,) = registry.states()
    assert (state.version != first.used_version, state.files_error) == (True, "")


@pytest.mark.usefixtures("old_files")
@pytest.mark.parametrize("check_s", [0.0, 2.0])
def test_an_adapter_whose_directory_is_gone_is_not_found_and_running_sequences_end_on_it(
    bench: Bench, check_s: float
) -> None:
    bench.write("a", "b")
    registry = bench.registry(adapter_settle_s=1.0, adapter_check_s=check_s, pinned_adapters=("b",))
    registry.preload(strict=True)
    running = bench.ready(registry, "a")
    assert registry.try_activate(running)
    registry.release(bench.ready(registry, "b"))
    shutil.rmtree(bench.root / "a")
    shutil.rmtree(bench.root / "b")
    bench.now_s += 2.1
    if check_s:
        for name in ("a", "b"):
            registry.release(bench.ready(registry, name))
    for name in ("a", "b"):
        with pytest.raises(NotFoundError, match=rf"^adapter '{name}' is not found$"):
            bench.ask(registry, name)
    assert [(s.name, s.outdated) for s in registry.states()] == [("a", True)]
    assert running.placement is not None
    registry.release(running)
    assert registry.states() == []
    # It comes back, and so does its pin.
    bench.write("b")
    registry.release(bench.ready(registry, "b"))
    assert [(s.name, s.pinned) for s in registry.states()] == [("b", True)]


@pytest.mark.usefixtures("old_files")
def test_a_root_that_cannot_be_read_for_a_moment_is_not_gone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.write("a", "b")
    registry = bench.registry(adapter_check_s=0.0)
    registry.release(bench.ready(registry, "a"))
    bench.root.rename(bench.root.with_name("away"))
    registry.release(bench.ready(registry, "a"))
    assert "cannot be looked for" in registry.states()[0].files_error
    with pytest.raises(UnavailableError, match="adapter 'b' cannot be looked for: no adapter_root"):
        bench.ask(registry, "b")
    bench.root.with_name("away").rename(bench.root)
    for name in ("a", "b"):
        registry.release(bench.ready(registry, name))
    assert [s.files_error for s in registry.states()] == ["", ""]


def test_a_directory_that_was_just_written_is_read_once_it_has_been_left_alone(bench: Bench) -> None:
    registry = bench.registry(adapter_settle_s=1000.0)
    bench.write("a", seed=1)
    lease = registry.acquire("a")
    bench.rest(registry)
    assert lease.state == "loading"
    bench.write("a", seed=2)
    bench.now_s += 1001.0
    bench.rest(registry)
    assert lease.state == "loading"
    bench.now_s += 1001.0
    bench.settle(registry, lease)
    assert (lease.error, lease.state) == (None, "ready")
    registry.release(lease)


@pytest.mark.usefixtures("old_files")
@pytest.mark.parametrize("now_s", [70.0, 71.0, 1e6])
def test_files_that_are_old_enough_are_read_at_the_first_look_whatever_the_clock_says(
    bench: Bench, now_s: float
) -> None:
    """In floating point, 70.0 - (70.0 - 0.3) is less than 0.3."""
    bench.write("a")
    registry = bench.registry(adapter_settle_s=0.3)
    bench.now_s = now_s
    lease = registry.acquire("a")
    registry.poll()
    assert bench.looks.acquire(timeout=PATIENCE_S)
    registry.poll()
    assert not registry._lookout.is_looking
    bench.settle(registry, lease)
    assert lease.state == "ready"
    registry.release(lease)


def test_who_waits_for_files_that_are_written_without_end_gets_an_error(bench: Bench) -> None:
    registry = bench.registry(adapter_settle_s=1.0)
    bench.write("a", seed=0)
    lease = registry.acquire("a")
    for seed in range(30):
        bench.rest(registry)
        if lease.error is not None:
            break
        bench.write("a", seed=seed)
        bench.now_s += 0.9
    assert type(lease.error) is UnavailableError
    assert lease.error.message == (
        "adapter 'a': its files keep changing; they are read once they have been left alone for 1 s"
    )
    registry.release(lease)


def test_who_asks_later_for_files_in_change_waits_as_long_as_others(bench: Bench) -> None:
    registry = bench.registry(adapter_settle_s=1.0)
    bench.write("a", seed=0)
    early = registry.acquire("a")
    leases, ends = [early], {}
    for seed in range(60):
        bench.rest(registry)
        ends |= {lease: bench.now_s for lease in leases if lease.error is not None and lease not in ends}
        if len(leases) == 1 and bench.now_s >= 9.0:
            leases.append(registry.acquire("a"))
        bench.write("a", seed=seed)
        bench.now_s += 0.5
    assert ends[early] == pytest.approx(11.0, abs=1.0)
    assert ends[leases[1]] == pytest.approx(20.0, abs=1.0)
    for lease in leases:
        registry.release(lease)


def test_a_half_uploaded_adapter_is_served_once_it_is_whole_however_often_it_was_wanted(
    bench: Bench,
) -> None:
    bench.write("a")
    weights = bench.root / "a" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    registry = bench.registry(adapter_settle_s=0.0)
    for size in (None, 0, 100, len(whole) // 2):
        weights.unlink(missing_ok=True)
        if size is not None:
            weights.write_bytes(whole[:size])
        for _ in range(20):
            with pytest.raises((InvalidArgumentError, NotFoundError)):
                bench.ask(registry, "a")
            bench.now_s += 0.25
    weights.write_bytes(whole)
    registry.release(bench.ready(registry, "a"))


def test_files_put_back_as_they_were_find_their_version_again(bench: Bench) -> None:
    bench.write("a", seed=1)
    registry = bench.registry(adapter_check_s=0.0)
    first = bench.ready(registry, "a")
    assert registry.try_activate(first)
    for seed in (2, 1):
        bench.write("a", seed=seed)
        registry.release(bench.ready(registry, "a"))
        bench.rest(registry)
    again = bench.ready(registry, "a")
    assert again.adapter is first.adapter
    assert registry.counters["host_loads"] == 2
    registry.release(again)
    registry.release(first)


@pytest.mark.usefixtures("old_files")
@pytest.mark.parametrize("way", ["gone and back", "put back after an eviction"])
def test_a_version_that_is_read_again_while_it_runs_is_there_once(bench: Bench, way: str) -> None:
    bench.write("a", "b", seed=1)
    registry = bench.registry(max_loras=1, max_cpu_loras=2, adapter_check_s=0.0)
    running = bench.ready(registry, "a")
    assert registry.try_activate(running)
    if way == "gone and back":
        (bench.root / "a").rename(bench.root / "away")
        with pytest.raises(NotFoundError):
            bench.ask(registry, "a")
        (bench.root / "away").rename(bench.root / "a")
    else:
        bench.write("a", seed=2)
        registry.release(bench.ready(registry, "a"))
        bench.rest(registry)
        registry.release(bench.ready(registry, "b"))
        bench.write("a", seed=1)
    again = bench.ready(registry, "a")
    assert registry.check() == []
    assert again.adapter is running.adapter
    assert registry.try_activate(again)
    assert again.placement is running.placement
    registry.release(running)
    assert [s.outdated for s in registry.states() if s.name == "a"] == [False]
    registry.release(again)
    # The slot of what was read twice is free again.
    registry.release(bench.ready(registry, "b"))


@pytest.mark.usefixtures("old_files")
def test_an_update_that_ends_while_its_adapter_is_read_anew_is_dropped(bench: Bench) -> None:
    bench.write("a", "b", seed=1)
    begun, may_end = threading.Semaphore(0), [threading.Semaphore(0), threading.Semaphore(0)]
    waits = iter([None, *may_end])

    def read(directory: Path) -> AdapterWeights:
        weights, _ = read_adapter(directory, bench.spec, max_lora_rank=16, dtype=torch.float32, pin=False)
        if directory.name == "a" and (wait := next(waits)) is not None:
            begun.release()
            assert wait.acquire(timeout=PATIENCE_S)
        return weights

    registry = bench.registry(read, max_loras=1, max_cpu_loras=1, adapter_check_s=0.0)
    registry.release(bench.ready(registry, "a"))
    bench.write("a", seed=2)
    asked = registry.acquire("a")
    bench.poll(registry)
    assert begun.acquire(timeout=PATIENCE_S)
    registry.release(asked)
    registry.release(bench.ready(registry, "b"))
    again = registry.acquire("a")
    bench.poll(registry)
    assert begun.acquire(timeout=PATIENCE_S)
    may_end[0].release()
    while registry._loads.is_updating("a"):
        assert bench.wakes.acquire(timeout=PATIENCE_S)
        bench.poll(registry)
    assert (again.state, registry.check()) == ("loading", [])
    may_end[1].release()
    bench.settle(registry, again)
    assert again.state == "ready"
    registry.release(again)


@pytest.mark.usefixtures("old_files")
@pytest.mark.parametrize("settle_s", [0.0, 1.0])
def test_who_asks_while_a_look_finds_nothing_is_served_when_the_directory_is_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, settle_s: float
) -> None:
    bench.write("a", seed=1)
    registry = bench.registry(adapter_settle_s=settle_s, adapter_check_s=0.0)
    registry.release(bench.ready(registry, "a"))
    begun, may_look, real = threading.Semaphore(0), threading.Semaphore(0), registry._lookout._look

    def look(name: str) -> Any:
        begun.release()
        assert may_look.acquire(timeout=PATIENCE_S)
        return real(name)

    monkeypatch.setattr(registry._lookout, "_look", look)
    early = registry.acquire("a")
    registry.poll()
    assert begun.acquire(timeout=PATIENCE_S)
    late = registry.acquire("a")
    (bench.root / "a").rename(bench.root / "away")
    may_look.release()
    assert bench.looks.acquire(timeout=PATIENCE_S)
    (bench.root / "away").rename(bench.root / "a")
    may_look.release(100)
    for _ in range(3):
        bench.now_s += settle_s
        bench.rest(registry)
    assert type(early.error) is NotFoundError
    assert (late.state, registry.check()) == ("ready", [])
    registry.release(early)
    registry.release(late)


def test_a_read_that_hangs_fails_those_who_wait_and_stops_no_other(bench: Bench) -> None:
    """Two of them, with one slot: the slot is given back before the error comes."""
    bench.write("hung", "stuck", "a", "b")
    gate = Gate(bench.spec)

    def read(directory: Path) -> AdapterWeights:
        if directory.name in ("hung", "stuck"):
            return gate.read(directory)
        return read_adapter(directory, bench.spec, max_lora_rank=16, dtype=torch.float32, pin=False)[0]

    registry = bench.registry(read, max_cpu_loras=2)
    hung = [registry.acquire(name) for name in ("hung", "hung", "stuck")]
    bench.poll(registry)
    assert {gate.next(), gate.next()} == {"hung", "stuck"}
    others = [registry.acquire(name) for name in ("a", "b")]
    while registry._loader.num_lost < 2:
        registry.poll()
        bench.now_s += loader.STALL_S
    bench.settle(registry, *others)
    assert [lease.state for lease in others] == ["ready", "ready"]
    assert [lease.state for lease in hung] == ["loading"] * 3
    while hung[0].state == "loading" or hung[2].state == "loading":
        registry.poll()
        bench.now_s += loader.HUNG_S
    for lease in hung:
        assert type(lease.error) is UnavailableError
        assert lease.error.message == f"adapter '{lease.adapter_id}': its files have given no answer for 30 s"
        registry.release(lease)
    # No further thread is given to the same files.
    with pytest.raises(UnavailableError, match="adapter 'hung': its files give no answer"):
        bench.ask(registry, "hung")
    for lease in others:
        registry.release(lease)
    for _ in range(2):
        gate.end_one(bench, registry)
    gate.may_end.release()
    registry.release(bench.ready(registry, "hung"))


def test_when_too_many_reads_hang_others_are_told_so_and_what_is_loaded_is_served(bench: Bench) -> None:
    names = [f"hung-{number}" for number in range(loader.MAX_LOST + 2)]
    bench.write("a", "late", *names)
    gate = threading.Event()

    def read(directory: Path) -> AdapterWeights:
        if directory.name.startswith("hung"):
            assert gate.wait(PATIENCE_S)
        return read_adapter(directory, bench.spec, max_lora_rank=16, dtype=torch.float32, pin=False)[0]

    registry = bench.registry(read)
    a = bench.ready(registry, "a")
    leases = [registry.acquire(name) for name in names]
    while registry._loader.num_lost < len(names):
        bench.poll(registry)
        bench.now_s += loader.STALL_S
    late = registry.acquire("late")
    while late.state != "failed":
        bench.poll(registry)
        bench.now_s += loader.STALL_S
    assert late.error is not None
    assert late.error.message == (
        f"adapter 'late' cannot be read now: {len(names)} threads wait for files under adapter_root that "
        "give no answer"
    )
    assert registry.try_activate(a)
    gate.set()
    for lease in (a, late, *leases):
        registry.release(lease)


def test_a_look_that_hangs_leaves_the_version_that_is_there_serving(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.write("a", "b")
    registry = bench.registry(adapter_check_s=0.0)
    registry.release(bench.ready(registry, "a"))
    gate, real = threading.Event(), registry._lookout._look

    def look(name: str) -> Any:
        if name == "a":
            assert gate.wait(PATIENCE_S)
        return real(name)

    monkeypatch.setattr(registry._lookout, "_look", look)
    a, b = registry.acquire("a"), registry.acquire("b")
    while not registry._looker.num_lost:
        registry.poll()
        bench.now_s += 0.3
    # From here on the clock stands still, so that nothing else seems to hang.
    while b.state == "loading":
        registry.poll()
    assert (a.state, b.state) == ("ready", "ready")
    again = registry.acquire("a")
    assert again.state == "ready"
    gate.set()
    for lease in (a, b, again):
        registry.release(lease)


def test_a_link_that_is_changed_between_check_and_opening_leads_nowhere(
    write: Write, llama_spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory, which was found inside the root, becomes a link to one outside before it is opened."""
    write(name="root/a")
    outside = write(name="outside")
    root = AdapterRoot(str(tmp_path / "root"))
    found = root.find("a")
    found.rename(tmp_path / "moved")
    found.symlink_to(outside)
    with pytest.raises(InvalidArgumentError, match="is a link that leaves adapter_root"):
        read_adapter(
            found, llama_spec, max_lora_rank=4, dtype=torch.float32, pin=False, root=tmp_path / "root"
        )


@pytest.mark.parametrize("name", adapter_files.NAMES)
def test_file_links_inside_the_root_are_followed_and_swapped_ones_never_read_outside(
    write: Write, llama_spec: ModelSpec, tmp_path: Path, name: str
) -> None:
    """As the cache of a hub keeps its files: links to blobs. A thread turns the link to and fro."""
    inside, outside = (
        write(name="root/a"),
        write(make_tensors(llama_spec, seed=9), name="outside", lora_alpha=9),
    )
    blob = tmp_path / "root" / "blobs"
    blob.mkdir()
    (inside / name).rename(blob / name)
    (inside / name).symlink_to(Path("..") / "blobs" / name)
    options: dict[str, Any] = {"max_lora_rank": 4, "dtype": torch.float32, "pin": False}
    right = read_adapter(inside, llama_spec, **options, root=tmp_path / "root")[1].version
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            for target in (outside / name, Path("..") / "blobs" / name):
                (inside / "new").symlink_to(target)
                (inside / "new").replace(inside / name)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for _ in range(300):
            # Refused as a link that leaves the root, or as files that change.
            with contextlib.suppress(InvalidArgumentError, UnavailableError):
                assert read_adapter(inside, llama_spec, **options, root=tmp_path / "root")[1].version == right
    finally:
        over.set()
        swapper.join()


@pytest.mark.usefixtures("old_files")
@pytest.mark.parametrize("change", ["invalid", "unsettled"])
def test_a_version_that_could_not_be_read_again_is_not_evicted_before_others(
    bench: Bench, change: str
) -> None:
    bench.write("a", "b", "c", seed=1)
    registry = bench.registry(max_cpu_loras=2, adapter_settle_s=1.0, adapter_check_s=0.0)
    old = bench.ready(registry, "a")
    version = old.version
    registry.release(old)
    bench.write("a", **({"use_dora": True} if change == "invalid" else {"seed": 2}))
    for _ in range(2 if change == "invalid" else 1):
        registry.release(bench.ready(registry, "a"))
        bench.now_s += 1.0 if change == "invalid" else 0.1
        bench.rest(registry)
    for name in ("b", "c", "b"):
        registry.release(bench.ready(registry, name))
    again = bench.ready(registry, "a")
    assert again.version == version
    registry.release(again)


@pytest.mark.parametrize("which", ["looks", "reads"])
def test_a_pause_of_the_file_server_fails_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """More names are asked for than there are threads, for longer than any of them may stall."""
    names = [f"n{number}" for number in range(loader.MAX_LOST + 5)]
    bench.write("a", *names)
    registry = bench.registry(max_cpu_loras=len(names) + 1, adapter_check_s=0.0)
    registry.release(bench.ready(registry, "a"))
    goes_on, begun = threading.Event(), threading.Semaphore(0)
    part, attribute = (registry._lookout, "_look") if which == "looks" else (registry._loads, "_load")
    real = getattr(part, attribute)

    def work(*args: Any) -> Any:
        begun.release()
        assert goes_on.wait(PATIENCE_S)
        return real(*args)

    monkeypatch.setattr(part, attribute, work)
    leases = [registry.acquire(name) for name in names]
    pool = registry._looker if which == "looks" else registry._loader
    for num_begun in range(1, pool.num_threads + loader.MAX_LOST + 1):
        while not begun.acquire(blocking=False):
            registry.poll()
        while num_begun >= pool.num_threads and pool.num_lost <= num_begun - pool.num_threads:
            registry.poll()
            bench.now_s += pool._stall_s / 2
    while not pool.is_blocked:
        registry.poll()
        bench.now_s += pool._stall_s / 2
    for _ in range(5):
        registry.poll()
        bench.now_s += 0.3
    # What is loaded is served meanwhile, and no look is waited for.
    loaded = registry.acquire("a")
    while loaded.state != "ready":
        registry.poll()
    assert [lease.error for lease in leases] == [None] * len(names)
    goes_on.set()
    while pool.num_lost:
        registry.poll()
    bench.now_s += pool._stall_s
    bench.settle(registry, *leases)
    assert [lease.state for lease in leases] == ["ready"] * len(names)
    for lease in (loaded, *leases):
        registry.release(lease)


def test_a_root_that_hangs_stops_no_start_and_is_found_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.write("a")
    gate, real = threading.Event(), adapter_root.resolve_directory

    def resolve(path: str, what: str) -> Path:
        assert gate.wait(PATIENCE_S)
        return real(path, what)

    monkeypatch.setattr(adapter_root, "resolve_directory", resolve)
    monkeypatch.setattr(adapter_root, "RESOLVE_S", 0.01)
    registry = bench.registry()
    lease = registry.acquire("a")
    while lease.error is None:
        registry.poll()
        bench.now_s += 0.3
    assert "its files have given no answer for 30 s" in lease.error.message
    registry.release(lease)
    gate.set()
    while registry._looker.num_lost:
        registry.poll()
    bench.now_s += 1.0
    registry.release(bench.ready(registry, "a"))


def test_a_job_is_watched_before_a_thread_has_begun_it() -> None:
    """Or nobody would look when the thread hangs at once."""
    idle: loader.Loader[None] = loader.Loader(lambda: None, num_threads=0)
    assert idle.next_s == math.inf
    idle.submit(loader.Job("a", lambda: None))
    assert idle.next_s < math.inf


def test_preloading_waits_until_files_have_been_left_alone(bench: Bench) -> None:
    bench.write("a", "b")
    registry = bench.registry(adapter_settle_s=1.0, preload_adapters=("a",), pinned_adapters=("b",))
    registry.preload(strict=True)
    assert [(s.name, s.state) for s in registry.states()] == [("a", "host"), ("b", "device")]
    # Files grow no older on this clock, so each adapter's are waited for.
    assert 1.0 < bench.now_s <= 2.0


def test_preloading_gives_up_on_files_that_keep_changing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.write("a")
    registry = bench.registry(adapter_settle_s=1.0, preload_adapters=("a",))
    seeds, real = itertools.count(), registry._lookout._look

    def look(name: str) -> Any:
        bench.write("a", seed=next(seeds))
        return real(name)

    monkeypatch.setattr(registry._lookout, "_look", look)
    with pytest.raises(UnavailableError, match=r"^adapter 'a': its files keep changing"):
        registry.preload(strict=True)
    assert verdicts.MAX_SETTLE_S <= bench.now_s <= verdicts.MAX_SETTLE_S + 2.0


@pytest.mark.parametrize("what", ["look", "read"])
def test_preloading_waits_a_bounded_time_for_files_that_give_no_answer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    bench.write("a", "b")
    gate, hangs = threading.Event(), threading.Event()
    # A thread that waits at its gate computes nothing, however long it took on its way there.
    monkeypatch.setattr(loader.time, "clock_gettime", lambda clock: 0.0)

    def hang(name: str) -> None:
        if name == "a":
            hangs.set()
            assert gate.wait(PATIENCE_S)

    def read(directory: Path) -> AdapterWeights:
        if what == "read":
            hang(directory.name)
        return read_adapter(directory, bench.spec, max_lora_rank=16, dtype=torch.float32, pin=False)[0]

    registry = bench.registry(read, pinned_adapters=("a",), preload_adapters=("b",))
    real = registry._lookout._look

    def look(name: str) -> Any:
        if what == "look":
            hang(name)
        return real(name)

    registry._lookout._look = look
    bench.hung["a"] = hangs
    registry.preload(strict=False)
    assert [(s.name, s.state) for s in registry.states()] == [("a", "failed"), ("b", "host")]
    assert loader.HUNG_S <= bench.now_s <= loader.HUNG_S + 2 * loader.STALL_S
    gate.set()
    while registry._loader.num_lost or registry._looker.num_lost:
        registry.poll()
    # Its failure is forgotten when its pause has passed, and its pin comes into force.
    bench.now_s += 1.0
    bench.settle(registry, registry.acquire("a"))
    assert [(s.name, s.state, s.pinned) for s in registry.states()] == [
        ("a", "device", True),
        ("b", "host", False),
    ]
