"""Decides what each step computes: which sequences, how many tokens of each, and who waits.

Plain Python. Rules, in this order:
0. All sequences have one order, the same for life: higher priority first, then who came earlier. Nothing that
   runs is stopped because something of higher priority arrives.
1. Running sequences go on: decodes first, then prompt chunks, within `max_batched_tokens`. When KV blocks
   lack, the last running sequence in this order is preempted: it goes back to its place in the queue and
   computes its tokens anew later. So the first one always gets on.
2. Waiting sequences are admitted in order. One whose adapter is still being read is passed by. One whose
   adapter finds no room (`max_loras` in use, no pages, no host slot) is passed by too, but only by
   `max_passes` later ones of its own priority with an adapter, and by none of lower priority; after that,
   none of those is admitted before it, so the adapters in use drain and it gets its turn: among equals no
   adapter waits for ever. What has higher priority may come before it without end.
3. The registry gives out host slots in the same order (`Lease.order`). An order of our own here would let the
   two wait for each other: each would keep for its own first one what the other's first one lacks.
4. What was admitted stays out of the steps until its adapter's copy to the device is over, unless there is
   nothing else to do: those who use other adapters do not wait for it.
5. A sequence whose deadline has passed ends at the next step, wherever it is, and is not admitted.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection

from manylora.engine import deadlines, overflow
from manylora.engine.active_adapters import Activator, ActiveAdapters
from manylora.engine.deadlines import Deadlines
from manylora.engine.endings import Endings
from manylora.engine.kv_cache import BlockPool
from manylora.engine.limits import Limits
from manylora.engine.sampling import has_penalties
from manylora.engine.schedule import Schedule, ScheduledSequence
from manylora.engine.sequence import Sequence, State
from manylora.engine.step import StepResult
from manylora.errors import ManyloraError, UnavailableError
from manylora.messages import Tokens


class Scheduler:
    """Queues and running set of one engine. Owned by the engine thread."""

    def __init__(
        self, limits: Limits, blocks: BlockPool, registry: Activator, eos_token_ids: Collection[int]
    ) -> None:
        self.limits = limits
        self.blocks = blocks
        self.registry = registry
        self.endings = Endings(eos_token_ids, limits.max_model_len)
        # Both in order.
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.failed: list[tuple[Sequence, ManyloraError]] = []
        """Ended with an error, by the scheduler itself or by a step. The engine reports and clears it."""
        self.deadlines = Deadlines()
        self.num_preemptions = 0
        self.num_prefix_hit_tokens = 0
        self._active = ActiveAdapters(registry, limits.max_loras)
        self._num_added = 0
        self._num_steps = 0
        # Of the step that is being chosen: its sequences, running ones whose adapter is still copied, and
        # tokens that are left.
        self._scheduled: list[ScheduledSequence] = []
        self._late: list[Sequence] = []
        self._budget = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            UnavailableError: `max_waiting` sequences wait already, beside those that the next step can start.
                A higher priority makes no room: what has been accepted stays.
        """
        num_startable = max(0, self.limits.max_num_seqs - len(self.running))
        if len(self.waiting) >= self.limits.max_waiting + num_startable:
            raise UnavailableError(
                f"{len(self.waiting)} sequences are waiting, max_waiting={self.limits.max_waiting}; "
                "try again later"
            )
        sequence.arrival = self._num_added
        self._num_added += 1
        bisect.insort(self.waiting, sequence, key=_order)
        self.deadlines.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence (cancelled or failed), wherever it is. Frees what it held."""
        if sequence.state is State.RUNNING:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.state = State.ENDED

    def fail(self, sequence: Sequence, error: ManyloraError) -> None:
        """Take out a sequence and put its error where the engine finds it."""
        self.remove(sequence)
        self.failed.append((sequence, error))

    def expire(self, now_s: float) -> None:
        """End the sequences whose deadline has passed."""
        for sequence in self.deadlines.pop_missed(itertools.chain(self.running, self.waiting), now_s):
            self.fail(sequence, deadlines.error_of(sequence))

    def can_run_ahead(self) -> bool:
        """Whether the next step can be chosen before the tokens of the one that runs are known.

        Not where a sequence might be preempted, which could have ended with its pending token.
        """
        lacking = sum(self.blocks.num_needed(s.num_tokens) - len(s.table) for s in self.running)
        return lacking <= self.blocks.num_free

    def schedule(self) -> Schedule | None:
        """Choose the next step; None when nothing can run now.

        From here on its tokens count as computed, and what it samples as pending, until `finish`.
        """
        self._scheduled, self._late, self._budget = [], [], self.limits.max_batched_tokens
        decodes = [s for s in self.running if s.num_to_compute == 1 and not self._awaits_token(s)]
        chunks = [s for s in self.running if s.num_to_compute > 1]
        for sequence in decodes + chunks:
            if sequence.state is not State.RUNNING or self._budget == 0:
                continue
            num_tokens = min(sequence.num_to_compute, self._budget)
            if self._make_room(sequence, sequence.num_computed + num_tokens):
                self._include(sequence)
        self._admit()
        if not self._scheduled:
            for sequence in self._late:
                if self._budget and sequence.lease is not None:
                    self.registry.await_copy(sequence.lease)
                    self._append(sequence)
        if not self._scheduled:
            return None
        num_sampled = 0
        for scheduled in self._scheduled:
            sequence = scheduled.sequence
            sequence.num_computed = scheduled.end
            if scheduled.samples:
                sequence.num_pending += 1
                sequence.sampled_row = num_sampled
                num_sampled += 1
        self._num_steps += 1
        return Schedule(self._num_steps, self._scheduled)

    def finish(self, schedule: Schedule, result: StepResult) -> list[tuple[Sequence, Tokens]]:
        """Append a step's tokens to the sequences and end those that are done.

        What has ended meanwhile stays as it is; a step that was scheduled before that was known is in vain.

        Args:
            schedule: the step.
            result: what it gave.

        Returns:
            What each sequence's session is to get.
        """
        assert schedule.number == result.number, "the result of another step"
        sampled = iter(result.sampled)
        answers = []
        for scheduled in schedule.sequences:
            sequence = scheduled.sequence
            new = next(sampled) if scheduled.samples else None
            if sequence.state is not State.RUNNING:
                continue
            if new is not None and new.error is not None:
                num_tokens = scheduled.end - sequence.num_prompt
                self.fail(sequence, overflow.error_of(sequence, num_tokens))
                continue
            keys = self.blocks.prefix_keys(sequence.namespace, sequence.token_ids, sequence.keys)
            self.blocks.mark_computed(sequence.table, keys, scheduled.num_tokens, scheduled.end)
            if new is not None:
                sequence.num_pending -= 1
                tokens = self.endings.append(sequence, new)
                if tokens.finish_reason:
                    self._stop(sequence)
                    sequence.state = State.ENDED
                answers.append((sequence, tokens))
        return answers

    def check(self) -> list[str]:
        """Broken invariants."""
        wrong = self.blocks.check([s.table for s in self.running])
        wrong += [f"waiting sequence {s.id} holds blocks" for s in self.waiting if s.table]
        wrong += [
            f"running sequence {s.id} is {s.state}" for s in self.running if s.state is not State.RUNNING
        ]
        for name, sequences in (("waiting", self.waiting), ("running", self.running)):
            if sequences != sorted(sequences, key=_order):
                wrong.append(f"{name} sequences are not in order")
            wrong += [
                f"{name} sequence {s.id} has a deadline before the next one"
                for s in sequences
                if 0 < s.deadline_s < self.deadlines.next_s
            ]
        return wrong + self._active.check(self.running)

    def _include(self, sequence: Sequence) -> None:
        """Put a running sequence into the step, or aside while its adapter is still copied."""
        if sequence.lease is not None and not self.registry.is_copied(sequence.lease):
            self._late.append(sequence)
        else:
            self._append(sequence)

    def _append(self, sequence: Sequence) -> None:
        num_tokens = min(sequence.num_to_compute, self._budget)
        self._scheduled.append(ScheduledSequence.of(sequence, num_tokens))
        self._budget -= num_tokens

    def _admit(self) -> None:
        blocked: list[Sequence] = []
        for sequence in list(self.waiting):
            if self._budget == 0 or len(self.running) >= self.limits.max_num_seqs:
                break
            lease = sequence.lease
            if lease is not None:
                if lease.state == "failed":
                    assert lease.error is not None, "a failed lease without a reason"
                    self.fail(sequence, lease.error)
                    continue
                if lease.state == "loading":
                    continue
                refusal = lease.refusal_of(sequence.adapter_scale) if lease.state == "ready" else None
                if refusal is not None:
                    self.fail(sequence, refusal)
                    continue
                if not self._may_pass(sequence, blocked) or not self._active.try_activate(sequence):
                    blocked.append(sequence)
                    continue
            if not self._try_start(sequence):
                break
            self._include(sequence)
            if lease is not None:
                for earlier in blocked:
                    earlier.num_passed += 1

    def _may_pass(self, sequence: Sequence, blocked: list[Sequence]) -> bool:
        return all(
            earlier.priority == sequence.priority and earlier.num_passed < self.limits.max_passes
            for earlier in blocked
        )

    def _try_start(self, sequence: Sequence) -> bool:
        keys = self.blocks.prefix_keys(sequence.namespace, sequence.token_ids, sequence.keys)
        taken = self.blocks.try_allocate(len(sequence.token_ids), keys)
        if taken is None:
            self._active.deactivate(sequence)
            return False
        sequence.table, sequence.num_computed = taken
        self.num_prefix_hit_tokens += sequence.num_computed
        sequence.state = State.RUNNING
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_order)
        return True

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        while not self.blocks.try_grow(sequence.table, num_tokens):
            # Never one that has its part of this step already: only decodes need room, they come in order
            # before all chunks, and the last is not before the one that asks.
            victim = self.running[-1]
            assert not victim.num_pending, "preempted before its last token was known"
            self._stop(victim)
            victim.state = State.WAITING
            victim.num_computed = 0
            bisect.insort(self.waiting, victim, key=_order)
            self.num_preemptions += 1
            if victim is sequence:
                return False
        return True

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence.table)
        sequence.table_array = None
        self._active.deactivate(sequence)

    def _awaits_token(self, sequence: Sequence) -> bool:
        """Whether it sits this step out: its pending token is its last one, or counts for penalties on the
        next one."""
        return bool(sequence.num_pending) and (
            has_penalties(sequence.params) or self.endings.will_end(sequence)
        )


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
