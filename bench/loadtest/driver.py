"""Sends requests when they are due, and no more at once than the arrival process has clients."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

from bench.loadtest.record import Record
from bench.loadtest.workload import Case

Progress = Callable[[], object]
"""Called once for each request that has ended."""

TIMEOUT_S = 900.0
"""Without any answer for so long, the target is taken for hung."""


class TargetError(Exception):
    """A target cannot go on."""


def drive(
    case: Case,
    send: Callable[[int, Record], None],
    ended: queue.SimpleQueue[int],
    *,
    is_streamed: bool,
    progress: Progress,
) -> tuple[float, list[Record]]:
    """Run a case to the end of its last request.

    Args:
        send: begins a request, given its index and its record; must not wait for the answer.
        ended: where the target puts the index of each request that has ended, from any thread.

    Returns:
        When it began, and a record for each request.

    Raises:
        TargetError: no request ended for a long time.
    """
    due_times = case.due_times()
    num_requests = len(case.requests)
    limit = case.arrival.max_in_flight(num_requests)
    records: list[Record] = []
    num_ended = 0
    begin_s = time.perf_counter()
    while num_ended < num_requests:
        wait_s = TIMEOUT_S
        if len(records) < num_requests and len(records) - num_ended < limit:
            index = len(records)
            now_s = time.perf_counter()
            wait_s = begin_s + due_times[index] - now_s
            if wait_s <= 0:
                # A client that waits for its answer sends when it has it; the others keep to their time.
                due_s = now_s if case.arrival.num_clients else begin_s + due_times[index]
                records.append(Record(due_s, is_streamed))
                send(index, records[index])
                continue
        try:
            ended.get(timeout=wait_s)
        except queue.Empty:
            if wait_s == TIMEOUT_S:
                raise TargetError(
                    f"no answer for {TIMEOUT_S:g} s, {num_requests - num_ended} are due"
                ) from None
            continue
        num_ended += 1
        progress()
    return begin_s, records
