"""A server, asked by the client library from as many threads as there are requests under way."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from manylora_client import Client, ManyloraClientError

from bench.loadtest.driver import Progress, drive
from bench.loadtest.record import Record, Round
from bench.loadtest.target import growth
from bench.loadtest.workload import Case, Request

TIMEOUT_S = 900.0
"""For one answer."""


class ServerTarget:
    """One protocol of one server, streaming or not."""

    def __init__(
        self, name: str, url: str, *, is_streamed: bool, read_counters: Callable[[], dict[str, int]]
    ) -> None:
        """Open a client.

        Args:
            url: with its scheme, http:// or grpc://.
            read_counters: asks the server's engine, or returns nothing where it cannot be asked.
        """
        self.name = name
        self._is_streamed = is_streamed
        self._read_counters = read_counters
        self._client = Client(url, timeout=TIMEOUT_S)

    def __enter__(self) -> ServerTarget:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def run(self, case: Case, progress: Progress) -> Round:
        """See Target."""
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()

        def ask(index: int, record: Record) -> None:
            try:
                self._ask(case.requests[index], record)
            except Exception as error:
                record.fail(time.perf_counter(), getattr(error, "code", "") or type(error).__name__)
                if not isinstance(error, ManyloraClientError):
                    # A fault of the client or of this program: its traceback is wanted, once all have ended.
                    raise
            finally:
                ended.put(index)

        before = self._read_counters()
        pool = ThreadPoolExecutor(case.arrival.max_in_flight(len(case.requests)))
        try:
            calls = []
            begin_s, records = drive(
                case,
                lambda index, record: calls.append(pool.submit(ask, index, record)),
                ended,
                is_streamed=self._is_streamed,
                progress=progress,
            )
            for call in calls:
                call.result()
        except BaseException:
            # Threads that wait for answers would keep this process from ending.
            self._client.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return Round(records, begin_s, growth(before, self._read_counters()))

    def _ask(self, request: Request, record: Record) -> None:
        length = request.num_output
        if not self._is_streamed:
            answer = self._client.generate(
                input_ids=request.prompt, adapter_id=request.adapter, max_tokens=length, min_tokens=length
            )
            record.add(time.perf_counter(), answer.token_ids)
            return
        with self._client.stream(
            input_ids=request.prompt, adapter_id=request.adapter, max_tokens=length, min_tokens=length
        ) as stream:
            for chunk in stream:
                record.add(time.perf_counter(), chunk.token_ids)
