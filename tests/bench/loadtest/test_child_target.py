"""A target in a process of its own: made there, asked there, and never left behind."""

from __future__ import annotations

import functools
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.loadtest.child_target import ChildTarget
from bench.loadtest.driver import TargetError
from bench.loadtest.workload import Case

from ..programs import environment

SCRIPT = """
    import os, sys, time
    from bench.loadtest.record import Record, Round

    class Target:
        name = "scripted"

        def __init__(self, directory):
            self.directory = directory

        def run(self, case, progress):
            if case.seed == 1:
                raise ValueError("no such thing")
            if case.seed == 2:
                os._exit(3)
            if case.seed == 3:
                progress()
                time.sleep(600)
            records = []
            for request in case.requests:
                record = Record(time.perf_counter(), is_streamed=True)
                record.add(time.perf_counter(), request.prompt)
                records.append(record)
                progress()
            return Round(records, records[0].due_s, {"pid": os.getpid()})

        def gap(self, prompt, adapter):
            return float(len(prompt) + len(adapter))

        def close(self):
            (self.directory / "closed").write_text("")

    def refuse():
        raise ValueError("it cannot be made")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "scripted_target.py").write_text(textwrap.dedent(SCRIPT))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "scripted_target", raising=False)
    return "scripted_target"


@pytest.fixture
def make_target(module: str, tmp_path: Path) -> Callable[[], ChildTarget]:
    target = __import__(module).Target
    return lambda: ChildTarget("scripted", functools.partial(target, tmp_path))


def seeded(case: Case, seed: int) -> Case:
    return Case(requests=case.requests, arrival=case.arrival, num_adapters=case.num_adapters, seed=seed)


def test_calls_are_answered_by_another_process_with_its_clock_and_its_progress(
    make_target: Callable[[], ChildTarget], make_case: Callable[..., Case], tmp_path: Path
):
    ticks: list[float] = []
    with make_target() as target:
        before_s = time.perf_counter()
        found = target.run(make_case(3), lambda: ticks.append(time.perf_counter()))
        after_s = time.perf_counter()
        assert target.gap([1, 2], "abc") == 5.0
    assert len(ticks) == 3
    assert found.counters["pid"] != os.getpid()
    assert [record.token_ids for record in found.records] == [[7, 8]] * 3
    assert before_s <= found.begin_s <= found.records[-1].end_s <= after_s
    assert (tmp_path / "closed").exists()


def test_a_target_that_cannot_be_made_says_why(module: str):
    with pytest.raises(TargetError, match="scripted: it cannot be made"):
        ChildTarget("scripted", __import__(module).refuse)


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        pytest.param(1, "scripted: no such thing", id="error"),
        pytest.param(2, "scripted: its process ended with status 3", id="end of the process"),
    ],
)
def test_a_failure_there_is_an_error_here(
    seed: int, message: str, make_target: Callable[[], ChildTarget], make_case: Callable[..., Case]
):
    with make_target() as target, pytest.raises(TargetError, match=message):
        target.run(seeded(make_case(1), seed), lambda: None)


def test_an_interrupted_call_ends_the_process_at_once(
    make_target: Callable[[], ChildTarget], make_case: Callable[..., Case]
):
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), make_target() as target:
        # It would sleep for minutes after the first tick.
        target.run(seeded(make_case(1), 3), interrupt)


def test_the_process_ends_when_the_one_that_asks_is_killed(module: str, tmp_path: Path):
    program = f"""
        import functools, sys
        from pathlib import Path
        from bench.loadtest.arrival import Arrival
        from bench.loadtest.child_target import ChildTarget
        from bench.loadtest.workload import Case, Request
        from {module} import Target
        request = Request(prompt=[1], adapter="", num_output=1)
        target = ChildTarget("scripted", functools.partial(Target, Path({str(tmp_path)!r})))
        case = Case(requests=[request], arrival=Arrival(), num_adapters=0, seed=0)
        pid = target.run(case, lambda: None).counters["pid"]
        case = Case(requests=[request], arrival=Arrival(), num_adapters=0, seed=3)
        target.run(case, lambda: print(pid, flush=True))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as asker:
        assert asker.stdout
        process = os.pidfd_open(int(asker.stdout.readline()))
        try:
            asker.send_signal(signal.SIGKILL)
            readable, _, _ = select.select([process], [], [], 30)
            assert readable, "it runs on alone"
        finally:
            os.close(process)
