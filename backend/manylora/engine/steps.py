"""Runs step after step: where that pays, the next is launched before the one in front of it has landed."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from manylora.engine.flight import Flight
from manylora.engine.runner import Runner
from manylora.engine.schedule import Schedule, build_step
from manylora.engine.scheduler import Scheduler
from manylora.engine.sequence import Sequence, State
from manylora.errors import InternalError
from manylora.messages import Tokens

log = logging.getLogger(__name__)

_BROKEN_DEVICE: tuple[type[BaseException], ...] = tuple(
    filter(None, [getattr(torch, "AcceleratorError", None)])
)
"""What torch's own calls raise once a device's context is of no more use. Triton and the vendor's libraries
raise plain RuntimeErrors, and so does memory that ran out: after those the device is queried."""


class Steps:
    """The steps of one engine. Owned by the engine thread.

    Args:
        runner: computes.
        scheduler: chooses; sequences of a step that fails are found in its `failed`.
        deliver: called with each sequence that a step gave tokens, and with these.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, deliver: Callable[[Sequence, Tokens], None]
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.counters = dict.fromkeys(("steps", "steps_ahead", "prompt_tokens", "generated_tokens"), 0)
        self._deliver = deliver
        self._flying: tuple[Schedule, Flight] | None = None

    def turn(self) -> bool:
        """Launch the next step and land the one before. False: there was nothing to do.

        Raises:
            Exception: the device is broken; the engine cannot go on.
        """
        before = self._flying
        was_flying = before is not None
        if before is not None and not self.scheduler.can_run_ahead():
            self._land(*before)
            before = None
        schedule = self.scheduler.schedule()
        launched = None if schedule is None else self._launch(schedule, is_ahead=before is not None)
        if before is not None:
            self._land(*before)
        if launched is not None and not self.runner.runs_ahead:
            self._land(*launched)
            launched = None
        self._flying = launched
        return was_flying or schedule is not None

    def _launch(self, schedule: Schedule, *, is_ahead: bool) -> tuple[Schedule, Flight] | None:
        try:
            step = build_step(
                schedule, self.scheduler.blocks.block_size, self.scheduler.endings.eos_token_ids
            )
            flight = self.runner.launch(step)
        except Exception as error:
            self._fail(schedule, error)
            return None
        self.counters["steps_ahead"] += is_ahead
        return schedule, flight

    def _land(self, schedule: Schedule, flight: Flight) -> None:
        """Wait for a step and deliver its tokens."""
        try:
            result = flight.land()
        except Exception as error:
            self._fail(schedule, error)
            return
        self.counters["steps"] += 1
        for scheduled in schedule.sequences:
            num_left = scheduled.sequence.num_prompt - scheduled.start
            self.counters["prompt_tokens"] += max(0, min(scheduled.num_tokens, num_left))
        for sequence, tokens in self.scheduler.finish(schedule, result):
            self.counters["generated_tokens"] += len(tokens.token_ids)
            self._deliver(sequence, tokens)

    def _fail(self, schedule: Schedule, error: Exception) -> None:
        log.error(
            "a step failed; its %d sequences end with INTERNAL", len(schedule.sequences), exc_info=error
        )
        if isinstance(error, _BROKEN_DEVICE) or not self.runner.device_answers():
            raise error
        for scheduled in schedule.sequences:
            if scheduled.sequence.state is State.RUNNING:
                self.scheduler.fail(
                    scheduled.sequence,
                    InternalError("the engine failed while computing this request; see its log"),
                )
