"""Scheduler, registry, pool and KV blocks together, with loads that take their time: nobody waits for ever.

Each part's own tests see the others only as stand-ins. Deadlocks lie between them: when they disagree
on who is next.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manylora.adapters.adapter import Stage
from manylora.adapters.adapter_files import NAMES as NAMES_OF_FILES
from manylora.adapters.adapter_root import AdapterRoot
from manylora.adapters.registry import Registry
from manylora.adapters.weights import AdapterWeights, allocate
from manylora.config import EngineConfig
from manylora.engine.kv_cache import BlockPool
from manylora.engine.limits import Limits
from manylora.engine.scheduler import Scheduler
from manylora.engine.sequence import Sequence, State
from manylora.messages import SamplingParams
from manylora.model.spec import ModelSpec, SiteKind

from .adapters.pools import make_pool
from .test_scheduler import result

SPEC = ModelSpec(
    kinds=(SiteKind(name="q", num_layers=1, in_features=1, out_features=(1,)),),
    linears={},
)
NAMES = "abcd"


@dataclass
class Wanted:
    adapter: str
    prompt: int
    max_tokens: int
    priority: int = 0
    patience: int = 0
    """Turns until the deadline; 0: none."""
    scale: float = 1.0
    token: int | None = None
    """What the prompt consists of; None: something of its own, so that no prefix is shared."""


@dataclass
class World:
    """An engine without a model: the loop's order of calls, tokens out of nothing."""

    root: Path
    max_loras: int
    max_cpu_loras: int
    max_num_seqs: int
    num_blocks: int
    live: list[Sequence] = field(default_factory=list)
    num_added: int = 0
    num_turns: int = 1
    """The clock of deadlines."""
    may_read: threading.Event = field(default_factory=threading.Event)
    num_read: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    num_looked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __post_init__(self) -> None:
        config = EngineConfig(
            base_model="unused",
            adapter_root=str(self.root),
            max_loras=self.max_loras,
            max_lora_rank=32,
            max_cpu_loras=self.max_cpu_loras,
            adapter_settle_s=0.0,
            adapter_check_s=-1.0,
        )
        pool = make_pool(SPEC, self.max_loras, 32, torch.float32, torch.device("cpu"))
        self.registry = Registry(config, AdapterRoot(config.adapter_root), self.read, pool, self.wake)
        limits = Limits(
            max_loras=self.max_loras,
            max_num_seqs=self.max_num_seqs,
            max_batched_tokens=16,
            max_waiting=1000,
            max_model_len=24,
            max_passes=self.max_num_seqs,
        )
        self.scheduler = Scheduler(limits, BlockPool(self.num_blocks, 4), self.registry, [])

    def wake(self) -> None:
        is_look = threading.current_thread().name.startswith("manylora-looker")
        (self.num_looked if is_look else self.num_read).release()

    def poll(self) -> None:
        """Poll until all adapters that are asked for have been looked for."""
        self.registry.poll()
        while self.registry._lookout.is_looking:
            self.num_looked.acquire()
            self.registry.poll()

    def read(self, directory: Path) -> AdapterWeights:
        """On a loader's thread: rank 16, or 32 for `d`."""
        self.may_read.wait()
        rank = 32 if directory.name == "d" else 16
        buffer, kinds = allocate(SPEC.kinds, (rank,), torch.float32, pin=False)
        return AdapterWeights(version=directory.name, scale=1.0, max_rank=rank, buffer=buffer, kinds=kinds)

    def add(self, wanted: Wanted) -> Sequence:
        lease = self.registry.acquire(wanted.adapter, wanted.priority) if wanted.adapter else None
        sequence = Sequence(
            id=self.num_added,
            token_ids=[100 + self.num_added if wanted.token is None else wanted.token] * wanted.prompt,
            num_prompt=wanted.prompt,
            params=SamplingParams(max_tokens=wanted.max_tokens),
            seed=0,
            lease=lease,
            adapter_id=wanted.adapter,
            adapter_scale=wanted.scale,
            priority=wanted.priority,
            deadline_s=float(self.num_turns + wanted.patience) if wanted.patience else 0.0,
        )
        self.num_added += 1
        self.scheduler.add(sequence)
        self.live.append(sequence)
        return sequence

    def end(self, sequence: Sequence) -> None:
        self.live.remove(sequence)
        if sequence.lease is not None:
            self.registry.release(sequence.lease)

    def turn(self) -> bool:
        """One turn of the loop; loads that it starts end behind it. False: nothing ran and nothing ended."""
        self.may_read.clear()
        self.num_turns += 1
        self.scheduler.expire(float(self.num_turns))
        num_missed = len(self.scheduler.failed)
        for sequence, _ in self.scheduler.failed:
            assert 0 < sequence.deadline_s <= self.num_turns
            self.end(sequence)
        self.scheduler.failed.clear()
        self.poll()
        schedule = self.scheduler.schedule()
        assert self.scheduler.failed == []
        assert all(not 0 < s.deadline_s <= self.num_turns for s in self.scheduler.running)
        if schedule is not None:
            for sequence, tokens in self.scheduler.finish(schedule, result(schedule, 7)):
                if tokens.finish_reason:
                    self.end(sequence)
        assert self.scheduler.check() + self.registry.check() == []
        self.may_read.set()
        for _ in range(sum(entry.stage is Stage.LOADING for entry in self.registry._versions)):
            self.num_read.acquire()
        return schedule is not None or num_missed > 0

    def run(self) -> None:
        """Turn until all have ended. What runs in none of three turns never will."""
        while self.live:
            assert self.turn() or self.turn() or self.turn(), [
                (s.adapter_id, s.lease and s.lease.state, s.num_passed) for s in self.scheduler.waiting
            ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for name in NAMES:
        (root / name).mkdir()
        for file in NAMES_OF_FILES:
            (root / name / file).touch()
    return root


def test_a_preempted_sequence_and_an_older_one_do_not_wait_for_each_other(root: Path) -> None:
    """The younger `a` is preempted and its adapter evicted for `b`, which is older, and has been passed."""
    world = World(root, max_loras=1, max_cpu_loras=1, max_num_seqs=2, num_blocks=6)
    for name in "abbba":
        world.add(Wanted(name, 4, 10))
    world.run()
    world.registry.close()
    assert world.scheduler.num_preemptions > 0


def test_a_step_does_not_wait_for_the_loaders_threads(root: Path) -> None:
    """A sequence whose adapter could have a slot, but no thread, holds up nobody of lower priority."""
    world = World(root, max_loras=2, max_cpu_loras=5, max_num_seqs=4, num_blocks=8)
    world.add(Wanted("a", 1, 1))
    world.run()
    for name in "bcd":
        world.add(Wanted(name, 1, 1, priority=5))
    last = world.add(Wanted("a", 1, 1))
    assert world.turn()
    assert last.state is State.ENDED
    world.run()
    world.registry.close()


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_rotation_of_adapters_ends(root: Path, data: st.DataObject) -> None:
    max_loras = data.draw(st.integers(1, 2))
    world = World(
        root,
        max_loras=max_loras,
        max_cpu_loras=max_loras + data.draw(st.integers(0, 2)),
        max_num_seqs=data.draw(st.integers(1, 4)),
        num_blocks=data.draw(st.integers(6, 10)),
    )
    wanted = st.builds(
        Wanted,
        st.sampled_from(["", *NAMES]),
        prompt=st.integers(1, 12),
        max_tokens=st.integers(1, 14),
        priority=st.sampled_from([0, 0, 0, 1, 2, -1]),
        patience=st.sampled_from([0, 0, 0, 1, 5, 20]),
        scale=st.sampled_from([1.0, 1.0, 2.0, 0.0]),
        token=st.sampled_from([None, None, None, 1, 2]),
    )
    for item in data.draw(st.lists(wanted, min_size=1, max_size=14)):
        added = world.add(item)
        if data.draw(st.booleans()):
            world.turn()
        if data.draw(st.integers(0, 9)) == 0 and added.state is not State.ENDED:
            world.scheduler.remove(added)
            world.end(added)
    world.run()
    world.registry.close()
    assert world.scheduler.blocks.num_free == world.num_blocks
