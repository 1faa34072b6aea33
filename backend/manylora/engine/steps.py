"""Runs step after step: where that pays, the next is launched before the one in front of it has landed."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from manylora.engine.batch import Batch
from manylora.engine.flight import Flight
from manylora.engine.runner import Runner
from manylora.engine.scheduler import Scheduler
from manylora.engine.sequence import Sequence, State
from manylora.errors import InternalError
from manylora.messages import Tokens

log = logging.getLogger(__name__)

_BROKEN_DEVICE: tuple[type[BaseException], ...] = tuple(
    filter(None, [getattr(torch, "AcceleratorError", None)])
)
"""What torch's own calls raise once a device's context is of no more use. Triton and the vendor's libraries
raise plain RuntimeErrors, and so does memory that ran out: behind those the device is asked."""


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
        self._flight: Flight | None = None

    def turn(self) -> bool:
        """Launch the next step and land the one before. False: there was nothing to do.

        Raises:
            Exception: the device is broken; the engine cannot go on.
        """
        is_flying = self._flight is not None
        if self._flight is not None and not self.scheduler.can_run_ahead():
            self._land(self._flight)
            self._flight = None
        before = self._flight
        batch = self.scheduler.schedule()
        self._flight = None if batch is None else self._launch(batch, before)
        if before is not None:
            self._land(before)
        if self._flight is not None and not self.runner.runs_ahead:
            self._land(self._flight)
            self._flight = None
        return is_flying or batch is not None

    def _launch(self, batch: Batch, before: Flight | None) -> Flight | None:
        try:
            flight = self.runner.launch(batch, before)
        except Exception as error:
            self._fail(batch, error)
            return None
        self.counters["steps_ahead"] += before is not None
        return flight

    def _land(self, flight: Flight) -> None:
        try:
            flight.land()
        except Exception as error:
            self._fail(flight.batch, error)
            return
        self.counters["steps"] += 1
        for item in flight.batch.items:
            self.counters["prompt_tokens"] += max(0, min(item.end, item.sequence.num_prompt) - item.start)
        for sequence, tokens in self.scheduler.finish(flight.batch):
            self.counters["generated_tokens"] += len(tokens.token_ids)
            self._deliver(sequence, tokens)

    def _fail(self, batch: Batch, error: Exception) -> None:
        log.error("a step failed; its %d sequences end with INTERNAL", len(batch.items), exc_info=error)
        if isinstance(error, _BROKEN_DEVICE) or not self.runner.device_answers():
            raise error
        for item in batch.items:
            if item.sequence.state is State.RUNNING:
                self.scheduler.fail(
                    item.sequence,
                    InternalError("the engine failed while computing this request; see its log"),
                )
