"""Who runs, who waits, and that nobody waits for ever."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manylora.adapters.placement import AdapterUse
from manylora.engine.kv_cache import BlockPool
from manylora.engine.limits import Limits
from manylora.engine.schedule import Schedule
from manylora.engine.scheduler import Scheduler
from manylora.engine.sequence import Sequence, State
from manylora.engine.step import NewTokens, StepResult
from manylora.errors import InvalidArgumentError, ManyloraError, NotFoundError, UnavailableError
from manylora.messages import SamplingParams

EOS = 2


@dataclass(eq=False)
class FakeLease:
    name: str
    state: str = "ready"
    error: ManyloraError | None = None
    version: str = ""
    active: int = 0
    scales: tuple[float, ...] = (1.0,)
    """Strengths with which the adapter can be applied."""

    def __post_init__(self) -> None:
        self.version = f"hash of {self.name}"

    def refusal_of(self, adapter_scale: float) -> ManyloraError | None:
        return None if adapter_scale in self.scales else InvalidArgumentError(f"not with {adapter_scale}")

    @property
    def adapter(self) -> str:
        return self.name


@dataclass
class FakeRegistry:
    """Room for `num_places` adapters on the device; residents stay until another one needs the place."""

    num_places: int
    resident: list[str] = field(default_factory=list)
    uses: dict[str, int] = field(default_factory=dict)
    copying: set[str] = field(default_factory=set)
    """Adapters whose copy to the device goes on."""
    awaited: list[str] = field(default_factory=list)
    """Adapters whose copy a step waits for."""

    def try_activate(self, lease: FakeLease) -> AdapterUse | None:
        if lease.name not in self.resident:
            idle = [name for name in self.resident if not self.uses.get(name)]
            if len(self.resident) >= self.num_places and not idle:
                return None
            if len(self.resident) >= self.num_places:
                self.resident.remove(idle[0])
            self.resident.append(lease.name)
        self.uses[lease.name] = self.uses.get(lease.name, 0) + 1
        return AdapterUse(lease.version, 1.0, ((self.resident.index(lease.name),),))

    def is_copied(self, lease: FakeLease) -> bool:
        return lease.name not in self.copying

    def await_copy(self, lease: FakeLease) -> None:
        self.awaited.append(lease.name)

    def deactivate(self, lease: FakeLease) -> None:
        assert self.uses[lease.name] > 0
        self.uses[lease.name] -= 1


def make(num_blocks: int = 64, num_places: int = 8, **limits: int) -> Scheduler:
    values = {"max_loras": 2, "max_num_seqs": 4, "max_batched_tokens": 8, "max_waiting": 100}
    values = {**values, "max_model_len": 64, "max_passes": 4, **limits}
    return Scheduler(Limits(**values), BlockPool(num_blocks, 4), FakeRegistry(num_places), [EOS])


def sequence(number: int, prompt: int = 3, adapter: str = "", **params: object) -> Sequence:
    params.setdefault("max_tokens", 4)
    return Sequence(
        id=number,
        token_ids=[10 + number] * prompt,
        num_prompt=prompt,
        params=SamplingParams(**params),
        seed=0,
        lease=FakeLease(adapter) if adapter else None,
        adapter_id=adapter,
    )


def result(schedule: Schedule, token: int) -> StepResult:
    """`token` for every sequence that samples."""
    return StepResult(schedule.number, [NewTokens([token]) for s in schedule.sequences if s.samples])


def step(scheduler: Scheduler, token: int = 5) -> list[tuple[int, int]]:
    """One step that yields `token` everywhere; (sequence, tokens) of it."""
    schedule = scheduler.schedule()
    if schedule is None:
        return []
    assert schedule.num_tokens <= scheduler.limits.max_batched_tokens
    seen = [(scheduled.sequence.id, scheduled.num_tokens) for scheduled in schedule.sequences]
    scheduler.finish(schedule, result(schedule, token))
    assert scheduler.check() == []
    return seen


def test_a_long_prompt_is_computed_in_chunks_beside_running_decodes() -> None:
    scheduler = make()
    scheduler.add(sequence(0))
    assert step(scheduler) == [(0, 3)]
    scheduler.add(sequence(1, prompt=12))
    assert step(scheduler) == [(0, 1), (1, 7)]
    assert step(scheduler) == [(0, 1), (1, 5)]
    assert step(scheduler) == [(0, 1), (1, 1)]


def test_nobody_waits_for_the_copy_of_an_adapter_that_others_use() -> None:
    scheduler = make()
    registry = scheduler.registry
    assert isinstance(registry, FakeRegistry)
    scheduler.add(sequence(0, adapter="here"))
    assert step(scheduler) == [(0, 3)]
    registry.copying.add("coming")
    scheduler.add(sequence(1, adapter="coming"))
    scheduler.add(sequence(2))
    assert step(scheduler) == [(0, 1), (2, 3)]
    assert step(scheduler) == [(0, 1), (2, 1)]
    registry.copying.clear()
    assert step(scheduler) == [(0, 1), (2, 1), (1, 3)]
    assert registry.awaited == []


def test_with_nothing_else_to_do_a_step_waits_for_the_copy() -> None:
    scheduler = make()
    registry = scheduler.registry
    assert isinstance(registry, FakeRegistry)
    registry.copying.add("coming")
    scheduler.add(sequence(0, adapter="coming"))
    assert step(scheduler) == [(0, 3)]
    assert registry.awaited == ["coming"]


def test_a_strength_that_the_adapter_does_not_have_fails_its_sequence_alone() -> None:
    scheduler = make()
    half, whole = sequence(0, adapter="a"), sequence(1, adapter="a")
    half.adapter_scale = 0.5
    for s in (half, whole):
        scheduler.add(s)
    assert step(scheduler) == [(1, 3)]
    assert [s.state for s in (half, whole)] == [State.ENDED, State.RUNNING]


def test_eos_ends_a_sequence_unless_it_is_ignored_or_too_early() -> None:
    scheduler = make()
    sequences = [sequence(0), sequence(1, ignore_eos=True), sequence(2, prompt=1, min_tokens=2)]
    for s in sequences:
        scheduler.add(s)
    step(scheduler, EOS)
    assert [s.state for s in sequences] == [State.ENDED, State.RUNNING, State.RUNNING]
    step(scheduler, EOS)
    assert [s.state for s in sequences] == [State.ENDED, State.RUNNING, State.ENDED]


def test_max_model_len_ends_a_sequence_with_length() -> None:
    scheduler = make(max_model_len=5)
    scheduler.add(sequence(0, max_tokens=50))
    step(scheduler)
    schedule = scheduler.schedule()
    assert schedule is not None
    answers = scheduler.finish(schedule, result(schedule, 5))
    assert [tokens.finish_reason for _, tokens in answers] == ["length"]


def test_several_tokens_of_one_step_end_where_the_sequence_ends() -> None:
    scheduler = make()
    one, two = sequence(0, max_tokens=2), sequence(1, max_tokens=9)
    for s in (one, two):
        scheduler.add(s)
    schedule = scheduler.schedule()
    assert schedule is not None
    given = [NewTokens([5, 6, 7]), NewTokens([8, EOS, 9])]
    answers = scheduler.finish(schedule, StepResult(schedule.number, given))
    assert [(tokens.token_ids, tokens.finish_reason) for _, tokens in answers] == [
        ([5, 6], "length"),
        ([8, EOS], "stop"),
    ]
    assert [s.token_ids[3:] for s in (one, two)] == [[5, 6], [8, EOS]]


def test_a_full_queue_refuses_and_says_so() -> None:
    scheduler = make(max_waiting=1, max_num_seqs=2)
    for number in range(2):
        scheduler.add(sequence(number, ignore_eos=True))
    step(scheduler)
    assert len(scheduler.running) == 2
    scheduler.add(sequence(2))
    with pytest.raises(UnavailableError, match="1 sequences are waiting, max_waiting=1; try again later"):
        scheduler.add(sequence(3))


def test_what_the_next_step_can_start_does_not_fill_the_queue() -> None:
    scheduler = make(max_waiting=1, max_num_seqs=3)
    for number in range(4):
        scheduler.add(sequence(number))
    with pytest.raises(UnavailableError, match="4 sequences are waiting, max_waiting=1"):
        scheduler.add(sequence(4))


def test_a_loading_adapter_is_passed_by_and_a_failed_one_reported() -> None:
    scheduler = make()
    loading, failed = sequence(0, adapter="slow"), sequence(1, adapter="bad")
    loading.lease.state = "loading"
    failed.lease.state, failed.lease.error = "failed", NotFoundError("no such adapter")
    for s in (loading, failed, sequence(2, adapter="good"), sequence(3)):
        scheduler.add(s)
    assert step(scheduler) == [(2, 3), (3, 3)]
    assert [(s.id, e.code) for s, e in scheduler.failed] == [(1, "NOT_FOUND")]
    loading.lease.state = "ready"
    assert (0, 3) in step(scheduler)


def test_no_more_than_max_loras_adapters_run_at_once() -> None:
    scheduler = make()
    for number, adapter in enumerate(["a", "b", "c", "a"]):
        scheduler.add(sequence(number, prompt=1, adapter=adapter))
    assert sorted(step(scheduler)) == [(0, 1), (1, 1), (3, 1)]


def test_an_adapter_is_not_passed_for_ever_by_others_that_never_pause() -> None:
    scheduler = make(max_passes=3)
    starved = sequence(999, prompt=1, adapter="c")
    number = 0
    for adapter in ("a", "b"):
        scheduler.add(sequence(number, prompt=1, adapter=adapter))
        number += 1
    step(scheduler)
    scheduler.add(starved)
    for _ in range(30):
        while len(scheduler.waiting) < 6:
            scheduler.add(sequence(number, prompt=1, adapter="ab"[number % 2]))
            number += 1
        step(scheduler)
        if starved.state is not State.WAITING:
            break
    assert starved.state is not State.WAITING
    assert starved.num_passed == 3


def test_preemption_takes_the_youngest_and_loses_no_token() -> None:
    scheduler = make(num_blocks=4, max_batched_tokens=16)
    old, young = sequence(0, prompt=7, max_tokens=8), sequence(1, prompt=7, max_tokens=8)
    scheduler.add(old)
    scheduler.add(young)
    for _ in range(3):
        step(scheduler)
    assert scheduler.num_preemptions == 1
    assert young.state is State.WAITING
    assert young.num_generated == 2
    for _ in range(40):
        step(scheduler)
    assert (old.num_generated, young.num_generated) == (8, 8)
    assert scheduler.blocks.num_free == 4


@settings(max_examples=120, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 20),
            st.sampled_from(["", "a", "b", "c", "d"]),
            st.integers(1, 9),
            st.sampled_from([0, 0, 1, -1]),
            st.sampled_from([0.0, 0.0, 4.0, 12.0]),
            st.integers(0, 20),
        ),
        min_size=1,
        max_size=25,
    ),
    st.integers(8, 14),
    st.sets(st.integers(0, 24)),
    st.integers(2, 4),
)
def test_any_mix_of_sequences_ends(
    wanted: list[tuple[int, str, int, int, float, int]],
    num_blocks: int,
    cancelled: set[int],
    num_places: int,
) -> None:
    """One turn is one second. The last number of each is the turn in which it comes."""
    scheduler = make(num_blocks=num_blocks, num_places=num_places, max_model_len=30)
    sequences = []
    for number, (prompt, adapter, max_tokens, priority, deadline_s, _) in enumerate(wanted):
        sequences.append(sequence(number, prompt, adapter, max_tokens=max_tokens))
        sequences[-1].priority, sequences[-1].deadline_s = priority, deadline_s
    for turn in range(1000):
        for s, (*_, comes) in zip(sequences, wanted, strict=True):
            if comes == turn:
                scheduler.add(s)
        if (
            turn in cancelled
            and turn < len(sequences)
            and sequences[turn] in [*scheduler.waiting, *scheduler.running]
        ):
            scheduler.remove(sequences[turn])
        scheduler.expire(float(turn))
        if scheduler.waiting or scheduler.running:
            assert step(scheduler), "sequences wait, nothing runs"
        elif turn > 20:
            break
    missed = [s for s, _ in scheduler.failed]
    assert all(s.state is State.ENDED for s in sequences)
    assert all(s.deadline_s for s in missed)
    assert scheduler.deadlines.num_missed == len(missed)
    assert scheduler.blocks.num_free == num_blocks
    assert all(
        s.num_generated == min(s.params.max_tokens, 30 - s.num_prompt)
        for n, s in enumerate(sequences)
        if n not in cancelled and s not in missed
    )
