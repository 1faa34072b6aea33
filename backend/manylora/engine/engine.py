"""The engine: one thread that owns the model, the queues and the caches, and turns messages into tokens.

A step is `schedule -> build_step -> launch -> land -> finish -> deliver` (steps.py). Other threads only fill
the inbox.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from concurrent.futures import Future

import torch

from manylora.config import EngineConfig
from manylora.engine import report
from manylora.engine.inbox import Inbox
from manylora.engine.requests import Requests
from manylora.engine.sequence import Sequence
from manylora.engine.session import Closed, Deliver, EngineMessage, Sent, Session, StatusRequest, Wake
from manylora.engine.start_up.engine_parts import build_parts
from manylora.engine.steps import Steps
from manylora.errors import CancelledRequestError, InternalError, ManyloraError, UnavailableError
from manylora.memory import keep_freed_memory, out_of_memory_as_error
from manylora.messages import Generate, Status, Tokens
from manylora.model.loading import use_device
from manylora.token_checks import check_input_ids, check_stop_token_ids
from manylora.wait_policy import WaitPolicy

log = logging.getLogger(__name__)


class Engine:
    """A base model with many adapters, in this process.

    Args:
        strict_preload: whether an adapter that is to be preloaded and cannot be is an error, and an
            adapter_root that is no directory. Otherwise it is logged and stands as failed; a pin that was
            asked for comes into force when the adapter loads.

    Raises:
        ManyloraError: the configuration or the base model cannot be served.
    """

    def __init__(self, config: EngineConfig, *, strict_preload: bool = True) -> None:
        self.config = config
        self._inbox = Inbox()
        self._sessions: set[Session] = set()
        self._requests = Requests()
        self._num_sequences = 0
        self._counters = dict.fromkeys(("accepted", "finished", "cancelled", "failed"), 0)
        self.num_turns = 0
        """Of the thread's loop; for those who watch whether it hangs."""
        self._closing = threading.Event()
        # Before the thread's first allocation, which would give it an arena of its own.
        keep_freed_memory()
        built: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(built, strict_preload), name="manylora-engine", daemon=True
        )
        self._thread.start()
        built.result()

    def connect(self, deliver: Deliver) -> Session:
        """Open a session.

        Args:
            deliver: called on the engine thread, once per step, with all events of this session; must not
                block.
        """
        return Session(self.post, deliver)

    def status(self) -> Status:
        """A picture of the engine between two steps. Thread-safe.

        Raises:
            UnavailableError: the engine is closed.
        """
        answer: Future[Status] = Future()
        self.post(StatusRequest(answer))
        return answer.result()

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs. False before `close` means a fault in the loop itself."""
        return self._thread.is_alive()

    def wake(self) -> None:
        """Let an idle loop come round once. Thread-safe."""
        self.post(Wake())

    def close(self) -> None:
        """Fail what is in flight with UNAVAILABLE and end the thread. May be called again."""
        self._closing.set()
        self.post(Wake())
        self._thread.join()
        self._inbox.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def post(self, message: EngineMessage) -> None:
        """Put a message into the inbox; a closed engine answers it at once."""
        self._inbox.put(message)

    # ---- the engine thread ----

    def _run(self, built: Future[None], strict_preload: bool) -> None:
        try:
            use_device(self.config)
            with out_of_memory_as_error():
                self._build(self.config, strict_preload)
        except BaseException as error:
            built.set_exception(error)
            return
        built.set_result(None)
        self._loop()

    def _build(self, config: EngineConfig, strict_preload: bool) -> None:
        """Make all parts.

        On this thread, since each thread that runs torch's operators keeps OpenMP threads of its own. While
        there are more of those than processors, none waits actively for the next operator, and a decode step
        is made of some hundred.
        """
        parts = build_parts(config, lambda: self.post(Wake()), strict_preload=strict_preload)
        self.model, self.runner, self.pool = parts.model, parts.runner, parts.pool
        self.registry, self.blocks, self.scheduler = parts.registry, parts.blocks, parts.scheduler
        self.info = parts.info
        on_cpu = self.model.device.type == "cpu"
        self._wait_policy = WaitPolicy(torch.get_num_threads() if on_cpu else 1)
        self.steps = Steps(self.runner, self.scheduler, self._deliver)

    def _loop(self) -> None:
        try:
            idle = False
            while not self._closing.is_set():
                self.num_turns += 1
                until_s = min(self.scheduler.deadlines.next_s, self.registry.next_s)
                for message in self._inbox.drain(wait=idle, until_s=until_s):
                    self._handle(message)
                # Before the registry: it need load nothing for those who have run out of time.
                self.scheduler.expire(time.monotonic())
                self._report_failed()
                self.registry.poll()
                idle = not self.steps.turn()
                self._wait_policy.look()
                self._report_failed()
                self._flush()
            error: ManyloraError = UnavailableError("the engine is shutting down")
        except Exception:
            log.exception("the engine has failed and ends; all its requests end with INTERNAL")
            error = InternalError("the engine has failed; see its log")
        self._closing.set()
        self._wait_policy.close()
        self._end_all(error)

    def _deliver(self, sequence: Sequence, tokens: Tokens) -> None:
        self._requests.session_of(sequence.id).events.append(tokens)
        if tokens.finish_reason:
            self._counters["finished"] += 1
            self._forget(sequence)

    def _handle(self, message: EngineMessage) -> None:
        if isinstance(message, StatusRequest):
            message.answer.set_result(self._status())
        elif isinstance(message, Closed):
            for sequence in self._requests.of(message.session):
                self._cancel(sequence)
            self._sessions.discard(message.session)
        elif isinstance(message, Sent):
            self._sessions.add(message.session)
            if isinstance(message.message, Generate):
                self._add(message.session, message.message)
            elif (found := self._requests.find(message.session, message.message.id)) is not None:
                self._cancel(found)

    def _add(self, session: Session, message: Generate) -> None:
        lease = None
        if self._requests.find(session, message.id) is not None:
            log.error("a session used the id %d twice; its second request is dropped", message.id)
            return
        self._counters["accepted"] += 1
        try:
            check_input_ids(message.input_ids, self.info)
            check_stop_token_ids(message.params, self.info)
            if message.adapter_id:
                lease = self.registry.acquire(message.adapter_id, message.priority)
            seed = message.params.seed
            sequence = Sequence(
                id=self._num_sequences,
                request_id=message.id,
                token_ids=list(message.input_ids),
                num_prompt=len(message.input_ids),
                params=message.params,
                seed=int.from_bytes(os.urandom(7), "little") if seed is None else seed,
                lease=lease,
                adapter_id=message.adapter_id,
                adapter_scale=message.adapter_scale,
                priority=message.priority,
                deadline_ms=message.deadline_ms,
                deadline_s=message.deadline_s,
            )
            self.scheduler.add(sequence)
            self._num_sequences += 1
            self._requests.add(session, sequence)
        except ManyloraError as error:
            if lease is not None:
                self.registry.release(lease)
            self._counters["failed"] += 1
            session.fail(message.id, error)
        except Exception:
            if lease is not None:
                self.registry.release(lease)
            log.exception("request %d could not be added", message.id)
            self._counters["failed"] += 1
            session.fail(message.id, InternalError("the engine failed on this request; see its log"))

    def _cancel(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self._counters["cancelled"] += 1
        self._fail(sequence, CancelledRequestError("the request was cancelled"))

    def _report_failed(self) -> None:
        for sequence, error in self.scheduler.failed:
            self._fail(sequence, error)
        self.scheduler.failed.clear()

    def _fail(self, sequence: Sequence, error: ManyloraError) -> None:
        self._counters["failed"] += not isinstance(error, CancelledRequestError)
        self._requests.session_of(sequence.id).fail(sequence.request_id, error)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._requests.remove(sequence)
        if sequence.lease is not None:
            self.registry.release(sequence.lease)

    def _flush(self) -> None:
        for session in self._sessions:
            session.flush()

    def _status(self) -> Status:
        counters = {**self.steps.counters, **self._counters}
        return report.status(self.scheduler, self.blocks, self.registry, counters, self.check())

    def check(self) -> list[str]:
        """Broken invariants of every part. Engine thread only; others ask `status`."""
        return self.scheduler.check() + self.registry.check() + self._requests.check()

    def _end_all(self, error: ManyloraError) -> None:
        """Answer what is in flight. Touches no queue or cache: after a fault these may be broken."""
        self._requests.fail_all(error)
        self._flush()
        self._inbox.close()
        self.registry.close()
