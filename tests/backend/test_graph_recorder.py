"""Recording on a CUDA device, by itself, and what a recording that fails leaves behind.

Without a GPU the device is a stand-in that keeps the books of torch's allocators and of its generator as they
do (2.11 and 2.13).
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from manylora.engine.graph_recorder import Recorder, recorder_for
from manylora_kernels import capture, streams

from bench.gpu import clock

Pool = tuple[int, int]
Record = Callable[[Callable[[], None]], Callable[[], None]]
CUDA = torch.device("cuda", 0)


class Stream:
    """One of a device; streams are compared by identity."""

    device = CUDA

    def wait_stream(self, other: Stream) -> None:
        assert other is not self


class Books:
    """What torch believes of one device."""

    def __init__(self) -> None:
        self.uses: Counter[Pool] = Counter()
        """Of each pool, by graphs."""
        self.underway: list[Pool] = []
        """Pools that the allocator believes are recorded into."""
        self.asked_of: list[weakref.ref[Graph]] = []
        """Graphs that the allocator of page-locked memory asks whether a stream is theirs."""
        self.generator_records = False
        self.is_capturing = self.is_spoilt = False
        self.num_pools = self.num_launched = 0
        self.default = self.current = Stream()

    def new_pool(self) -> Pool:
        self.num_pools += 1
        return 0, self.num_pools

    def launch(self) -> None:
        """Some work, recorded or run."""
        self.num_launched += 1

    def wait(self) -> None:
        """The host asks the device for a value, or loads a kernel."""
        if self.is_capturing:
            self.is_spoilt = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def begin(self, pool: Pool) -> None:
        if pool in self.uses:
            assert self.uses[pool] > 0, "use_count > 0 INTERNAL ASSERT FAILED"
        self.uses[pool] += 1
        if pool in self.underway:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.underway.append(pool)

    def end(self, device: int, pool: Pool) -> None:
        assert device == 0
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, device: int, pool: Pool) -> None:
        assert device == 0
        self.uses[pool] -= 1
        assert self.uses[pool] >= 0, "uc >= 0 INTERNAL ASSERT FAILED"

    def random_numbers(self) -> None:
        if self.generator_records and not self.is_capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def on(self, stream: Stream) -> On:
        return On(self, stream)

    @property
    def dangling(self) -> int:
        """Graphs that are asked for and are no more."""
        return sum(graph() is None for graph in self.asked_of)


class On:
    """Has a stream be the current one, up to its exit."""

    def __init__(self, books: Books, stream: Stream) -> None:
        self.books, self.stream = books, stream

    def __enter__(self) -> None:
        self.before, self.books.current = self.books.current, self.stream

    def __exit__(self, *_error: object) -> None:
        self.books.current = self.before


class Graph:
    """As `CUDAGraph` goes about: what it skips where the driver refuses a recording is skipped here."""

    books: Books

    def __init__(self) -> None:
        self.has_ended = False

    def capture_begin(self, pool: Pool, **options: object) -> None:
        assert set(options) <= {"capture_error_mode", "check_input_liveness"}
        self.pool = pool
        self.books.generator_records = True
        self.books.begin(pool)
        self.books.asked_of.append(weakref.ref(self))
        self.books.is_capturing, self.books.is_spoilt = True, False

    def capture_end(self) -> None:
        books, books.is_capturing = (books := self.books), False
        if books.is_spoilt:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        books.end(0, self.pool)
        books.asked_of = [graph for graph in books.asked_of if graph() is not self]
        books.generator_records = False
        self.has_ended = True

    def replay(self) -> None:
        self.books.random_numbers()
        self.books.launch()

    def __del__(self) -> None:
        if self.has_ended:
            self.books.release(0, self.pool)


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> Iterator[Books]:
    """A device that keeps books, in place of torch's."""
    books = Books()

    class Ours(Graph):
        pass

    Ours.books = books
    for name, value in {
        "CUDAGraph": Ours,
        "Stream": lambda *_args, **_options: Stream(),
        "stream": books.on,
        "current_stream": lambda _device=None: books.current,
        "current_device": lambda: 0,
        "graph_pool_handle": books.new_pool,
        "synchronize": lambda _device=None: books.wait(),
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: books.is_capturing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in {
        "_cuda_endAllocateToPool": books.end,
        "_cuda_releasePool": books.release,
        "_host_emptyCache": lambda: None,
    }.items():
        monkeypatch.setattr(torch._C, name, value, raising=False)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **kw: zeros(*shape, **kw))
    side = Stream()
    monkeypatch.setattr(clock, "_side_stream", lambda: side)
    monkeypatch.setattr(capture, "_SPOILT", [])
    yield books
    gc.collect()


@pytest.fixture(params=["engine", "suite"])
def record(request: pytest.FixtureRequest, books: Books) -> Record:
    """Records a function: the engine's recorder, and what the GPU suite times forms with."""
    if request.param == "engine":
        recorder: Recorder = recorder_for(CUDA)
        return recorder.record
    return lambda body: clock.graph_of(body, CUDA)


def spoil(books: Books, record: Record) -> None:
    with pytest.raises(RuntimeError, match="previous error during capture") as caught:
        record(books.wait)
    # What went wrong is told, not only that it did.
    assert "not permitted when stream is capturing" in str(caught.value.__context__)


def test_a_recording_that_fails_leaves_the_device_as_it_was(books: Books, record: Record) -> None:
    kept = record(books.launch)
    spoil(books, record)
    gc.collect()
    assert books.underway == []
    assert sum(books.uses.values()) == 1, "the one graph that was recorded"
    assert books.dangling == 0
    assert books.current is books.default
    books.random_numbers()
    kept()


def test_behind_a_recording_that_fails_others_are_recorded(books: Books, record: Record) -> None:
    replays = []
    for _ in range(2):
        spoil(books, record)
        replays.append(record(books.launch))
        before = books.num_launched
        replays[-1]()
        assert books.num_launched == before + 1
    gc.collect()
    assert sum(books.uses.values()) == len(replays)
    replays.clear()
    gc.collect()
    assert sum(books.uses.values()) == 0


def test_a_body_that_raises_by_itself_ends_its_recording_once(books: Books, record: Record) -> None:
    def broken() -> None:
        if books.is_capturing:
            raise ValueError("no part of CUDA")

    kept = record(books.launch)
    with pytest.raises(ValueError, match="no part of CUDA"):
        record(broken)
    gc.collect()
    assert (books.underway, sum(books.uses.values()), books.dangling) == ([], 1, 0)
    kept()


def test_what_warms_a_recording_up_launches_what_is_recorded(books: Books, record: Record) -> None:
    """A kernel that is first launched while a graph is recorded would be loaded there, which spoils it."""
    seen: list[bool] = []
    replay = record(lambda: seen.append(streams.is_recorded(CUDA)))
    assert len(seen) in (2, 3)
    assert all(seen)
    assert not streams.is_recorded(CUDA)
    del replay


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_spoilt_capture_leaves_the_device_usable() -> None:
    recorder = recorder_for(torch.device("cuda"))
    x = torch.ones(4, device="cuda")
    numbers = recorder.record(lambda: x.add_(torch.rand_like(x)).floor_())

    def waits() -> None:
        x.mul_(float(x.sum()))

    for record in (recorder.record, lambda body: clock.graph_of(body, x.device)):
        with pytest.raises(RuntimeError):
            record(waits)
        recorder.abandon()
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        before = torch.cuda.memory_reserved()
        large: Any = torch.randn(64 << 20, device="cuda")
        del large
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= before
        # A graph of before, with random numbers in it.
        numbers()
    x.fill_(1)

    def adds() -> None:
        x.add_(1)

    replay = recorder.record(adds)
    replay()
    # Once to warm up, not in the capture, once replayed.
    assert x.tolist() == [3.0] * 4
