"""A plugin of pytest: tests that need a GPU first, each as a row, then others that run on one where it is.

Of the others a file is a row, and each that fails. Nothing is begun when the time is up.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.gpu.rows import Context, Row
from bench.gpu.suite_report import ROWS
from bench.loadtest.csv_file import append_csv

if TYPE_CHECKING:
    import pytest

ENVIRONMENT = "MANYLORA_LEASE"
"""The variable that holds the settings."""
PART = "tests"


def settings(context: Context, out: Path, until: float, unmarked: Sequence[str]) -> str:
    """What the plugin is told, in a variable.

    Args:
        until: seconds since the epoch, then no test is begun.
        unmarked: names of files whose tests without a mark run too, in this order.
    """
    origin = asdict(context.origin) | {"triton": context.triton}
    return json.dumps({"origin": origin, "out": str(out), "until": until, "unmarked": list(unmarked)})


@dataclass(slots=True)
class _Run:
    """Of the tests of a process."""

    origin: dict[str, Any]
    out: Path
    until: float
    unmarked: list[str]
    marked: set[str]
    """Tests that need a GPU."""
    file: str = ""
    """Of the tests without a mark that run now."""
    outcomes: Counter[str] | None = None

    def write(self, form: str, result: str) -> None:
        append_csv(self.out / ROWS, [Row(**self.origin, part=PART, form=form, result=result)])
        print(f"{PART} | {form} | {result}", flush=True)

    def end_file(self) -> None:
        """Say what has become of a file's tests."""
        if self.file and self.outcomes:
            said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))
            self.write(self.file, f"{'failed' if self.outcomes['failed'] else 'ok'}: {said}")
        self.file, self.outcomes = "", None


_run: _Run | None = None


def pytest_configure() -> None:
    """Read the settings, where there are any."""
    global _run  # pytest calls functions of modules
    if ENVIRONMENT in os.environ:
        found = json.loads(os.environ[ENVIRONMENT])
        _run = _Run(found["origin"], Path(found["out"]), found["until"], found["unmarked"], set())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those first that need a GPU."""
    if _run is None:
        return
    marked = [item for item in items if item.get_closest_marker("gpu")]
    _run.marked = {item.nodeid for item in marked}
    others = [item for item in items if item.path.name in _run.unmarked and item.nodeid not in _run.marked]
    others.sort(key=lambda item: _run.unmarked.index(item.path.name))
    items[:] = marked + others


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write what is known."""
    if _run is None or (report.when != "call" and report.passed):
        return
    if report.nodeid in _run.marked:
        _run.write(report.nodeid, _result(report))
        return
    file = report.nodeid.partition("::")[0]
    if file != _run.file:
        _run.end_file()
        _run.file, _run.outcomes = file, Counter()
    assert _run.outcomes is not None
    _run.outcomes[report.outcome] += 1
    if report.failed:
        _run.write(report.nodeid, _result(report))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported."""
    if _run is not None and report.failed:
        _run.write(report.nodeid, f"failed: {_last_line(str(report.longrepr))}")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Begin nothing more when the time is up."""
    if _run is not None and time.time() >= _run.until:
        item.session.shouldstop = "time is up"


def pytest_sessionfinish() -> None:
    """The last file's row."""
    if _run is not None:
        _run.end_file()


def _result(report: pytest.TestReport) -> str:
    if report.passed:
        return "ok"
    if report.skipped and isinstance(report.longrepr, tuple):
        return f"missing: {report.longrepr[2].removeprefix('Skipped: ')}"
    crash = getattr(report.longrepr, "reprcrash", None)
    return f"failed: {_last_line(crash.message if crash else str(report.longrepr))}"


def _last_line(text: str) -> str:
    """The first of an error's lines, which says most; without what would end a cell."""
    return (text.strip().splitlines() or [""])[0][:300]
