"""One chance on a lent GPU: all parts in order, each in a process of its own that is killed at its limit.

A fault, a hang or a broken device in one part loses that part and no other: what it had written counts. Rows
are written as they are measured; goals and plot after each part.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.gpu import lease_files, lease_tests
from bench.gpu.commands import compilers_at_hand
from bench.gpu.rows import Context, Row
from bench.gpu.stage_process import StageProcess, kill_orphans
from bench.gpu.suite_report import ROWS, Report
from bench.loadtest.csv_file import read_csv
from bench.paths import ROOT

SUITE = ROOT / "bench" / "gpu_suite.py"
TESTS = "tests"
PATIENCE = 4
"""Times the limits in the rehearsal: a CPU may be busy with other things."""
_MARGIN_S = 3.0
"""From when a process begins nothing more to when it is killed."""
_COMPILERS = min(6, compilers_at_hand())
"""Beside the tests: more would take the memory that tests and the model need."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What one process does."""

    name: str
    limit_s: float
    """Then it is killed; 0: all that is left."""
    parts: tuple[str, ...] = ()
    """Of the suite; none: the tests that need a GPU."""
    compilers: int = 0
    """Processes that compile first, of their own."""


STAGES = (
    Stage("goals", 50, ("goals",)),
    Stage(TESTS, 60),
    Stage("model", 170, ("model",)),
    Stage("exposed", 50, ("exposed", "pool-rank")),
    Stage("proofs", 60, ("proofs",)),
    Stage("copy", 20, ("copy",)),
    Stage("peers", 0, ("peers", "exposed-peers", "table"), compilers=compilers_at_hand()),
)
"""In the order of what is to be known first."""
_COMPILED = ("exposed", "pool-rank", "proofs", "model")
"""Parts whose kernels are compiled while the tests run, which time nothing."""
TEST_FILES = (
    "tests/kernels",
    "tests/backend/test_run_ahead.py",
    "tests/backend/test_step_graphs.py",
    "tests/backend/adapters/test_device_copies.py",
    # Last of them: it spoils recordings.
    "tests/backend/test_graph_recorder.py",
)
"""Those that need a GPU are in these."""
UNMARKED = (
    "test_linear_lora.py",
    "test_triton_form.py",
    "test_attention.py",
    "test_replay_form.py",
    "test_step_graphs.py",
    "test_expand_silu_mul.py",
    "test_attention_prefill.py",
    "test_attention_decode.py",
    "test_cache_write.py",
    "test_one_adapter.py",
)
"""Files that the interpreter runs elsewhere: while there is time, on the device."""
CPU_TEST_FILES = (
    "tests/kernels/test_route.py",
    "tests/kernels/test_linear_lora.py::test_two_streams_give_the_bits_of_one",
)
"""In the rehearsal: some that run in the interpreter, and one that needs a GPU."""


class Lease:
    """A run of all stages.

    Args:
        arguments: of `gpu_suite.py`.
        context: of the whole run; its origin is that of every row.
        out: the folder of the results.
    """

    def __init__(self, arguments: argparse.Namespace, context: Context, out: Path) -> None:
        self._arguments, self._out = arguments, out
        self.report = Report(context, out)
        self._site = Path(tempfile.mkdtemp(prefix="manylora-lease-"))
        self._end_s = time.time() + arguments.budget_s
        self._running: list[StageProcess] = []

    def run(self) -> int:
        """Run the stages.

        Returns: the exit status, 1 where a form, a proof, a test or a whole part failed.
        """
        wheels = lease_files.unpack(lease_files.LEASE, self._site)
        print(f"# {', '.join(wheels) or 'no wheels'}; peers of {self._arguments.peers}", flush=True)
        try:
            for stage in STAGES:
                self._run(stage)
        finally:
            self._kill()
            shutil.rmtree(self._site, ignore_errors=True)
            self.report.print_goals()
            self.report.write()
        return int(any(row.is_bad for row in self.report.rows))

    def _run(self, stage: Stage) -> None:
        begin = time.time()
        limit_s = stage.limit_s * (PATIENCE if self._arguments.cpu_logic else 1)
        end_s = min(self._end_s, begin + limit_s) if limit_s else self._end_s
        print(f"# stage {stage.name}: {end_s - begin:.0f} s", flush=True)
        if end_s - begin <= _MARGIN_S:
            self._keep_outcome(stage, "missing: no time was left for it")
            return
        process = self._start(self._command(stage, end_s - _MARGIN_S), end_s - _MARGIN_S)
        beside = self._beside(stage, end_s - _MARGIN_S)
        status = process.wait(end_s - time.time())
        if beside is not None:
            beside.wait(end_s - time.time())
        self._kill()
        seconds = time.time() - begin
        if status is None:
            self._keep_outcome(stage, f"failed: killed after {seconds:.0f} s")
        elif status not in (0, 1):
            # 1: rows say what has failed.
            self._keep_outcome(stage, f"failed: the process ended with status {status}")
        print(f"# stage {stage.name}: took {seconds:.0f} s", flush=True)
        self._read_rows()
        self.report.write()

    def _command(self, stage: Stage, until: float) -> list[str]:
        if stage.parts:
            return self._suite(stage.parts, stage.compilers, until)
        files = CPU_TEST_FILES if self._arguments.cpu_logic else TEST_FILES
        # Warnings that another version of a package has are no failures of ours.
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-o", "filterwarnings=default"]
        return [*command, "-p", "no:cacheprovider", "-p", "bench.gpu.lease_tests", *files]

    def _suite(self, parts: Sequence[str], compilers: int, until: float, *more: str) -> list[str]:
        command = [sys.executable, str(SUITE), "--parts", *parts, "--until", f"{until:.1f}", *more]
        command += ["--out", str(self._out), "--peers", str(self._arguments.peers)]
        command += ["--origin", json.dumps(self._shared())]
        if self._arguments.cpu_logic:
            return [*command, "--cpu-logic"]
        return [*command, "--compilers", str(compilers)]

    def _beside(self, stage: Stage, until: float) -> StageProcess | None:
        """Compile for the stages behind, where that disturbs nobody."""
        if stage.name != TESTS or self._arguments.cpu_logic:
            return None
        return self._start(self._suite(_COMPILED, _COMPILERS, until, "--compile-only"), until)

    def _shared(self) -> dict[str, str]:
        origin = self.report.context.origin
        return {name: getattr(origin, name) for name in ("run", "commit", "command")}

    def _start(self, command: Sequence[str], until: float) -> StageProcess:
        folders = [self._site, *(ROOT / name for name in ("kernels", "backend", "client")), ROOT]
        paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH", "")])]
        unmarked = ["test_route.py"] if self._arguments.cpu_logic else UNMARKED
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            lease_tests.ENVIRONMENT: lease_tests.settings(self.report.context, self._out, until, unmarked),
        }
        process = StageProcess(command, env, ROOT)
        self._running.append(process)
        return process

    def _kill(self) -> None:
        for process in self._running:
            process.kill()
        self._running.clear()
        kill_orphans()

    def _keep_outcome(self, stage: Stage, result: str) -> None:
        row = self.report.context.row(stage.name, "whole part", result=result)
        self.report.keep(row)
        print(f"{row.part} | {row.form} | {row.result}", flush=True)

    def _read_rows(self) -> None:
        """Those of all processes so far."""
        path = self._out / ROWS
        run = self.report.context.origin.run
        self.report.rows = [row for row in read_csv(path, Row) if row.run == run] if path.exists() else []


def device_name() -> str:
    """The GPU's, without a context on it, which would stay for as long as this process does."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.splitlines()[0].strip() if found.strip() else ""


def run(arguments: argparse.Namespace, context: Context, out: Path) -> int:
    """Run a lease.

    Returns: the exit status.
    """
    origin = replace(context.origin, commit=lease_files.commit(lease_files.LEASE))
    return Lease(arguments, replace(context, origin=origin), out).run()
