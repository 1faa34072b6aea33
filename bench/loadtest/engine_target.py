"""The engine in the process that asks it."""

from __future__ import annotations

import queue
import time

from manylora import Engine, EngineConfig
from manylora.messages import Failed, Generate, SamplingParams, Tokens

from bench.loadtest.driver import Progress, drive
from bench.loadtest.record import Record, Round
from bench.loadtest.target import TokenIds, growth
from bench.loadtest.workload import Case


class EngineTarget:
    """A session with an engine, without front ends, sockets or text."""

    name = "engine"

    def __init__(self, config: EngineConfig) -> None:
        self._engine = Engine(config)

    def run(self, case: Case, progress: Progress) -> Round:
        """See Target."""
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        sent: dict[int, Record] = {}

        def deliver(events: list[Tokens | Failed]) -> None:
            now_s = time.perf_counter()
            for event in events:
                if isinstance(event, Failed):
                    sent[event.id].fail(now_s, event.code)
                else:
                    sent[event.id].add(now_s, event.token_ids)
                if isinstance(event, Failed) or event.finish_reason:
                    ended.put(event.id)

        def send(index: int, record: Record) -> None:
            sent[index] = record
            request = case.requests[index]
            params = SamplingParams(max_tokens=request.num_output, min_tokens=request.num_output)
            session.send(
                Generate(id=index, input_ids=request.prompt, adapter_id=request.adapter, params=params)
            )

        before = self._engine.status().counters
        session = self._engine.connect(deliver)
        try:
            begin_s, records = drive(case, send, ended, is_streamed=True, progress=progress)
        finally:
            session.close()
        return Round(records, begin_s, growth(before, self._engine.status().counters))

    def gap(self, prompt: TokenIds, adapter: str) -> float:
        """See Reference."""
        ends = self._engine.info.eos_token_ids
        (answer,) = self._engine.generate(
            [prompt], adapter_ids=[adapter], max_tokens=1, logprobs=2 + len(ends)
        )
        assert answer.logprobs is not None
        # Log probabilities of one place differ by as much as the logits do.
        best = [logprob for token_id, logprob in answer.logprobs[0].top if token_id not in ends]
        return best[0] - best[1]

    def close(self) -> None:
        """See Reference."""
        self._engine.close()
