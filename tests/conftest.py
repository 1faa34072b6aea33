"""What tests of several packages need."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN_SERVERS = "own servers"
FOLDERS = ("server", "kernels", "backend", "bench", OWN_SERVERS, "client")
"""The longest group first and short ones last, so that workers end together."""
SHARED_SERVER = ("parity", "text", "cli", "ends_and_chats", "perf_analyzer")
"""Files of tests/server whose tests share one server, as those of its folders do. Others start their own."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FOLDERS.index(folder_of(item.nodeid)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Keep together, on one of several workers, the tests of a file, and all those that share a server."""
    from xdist.scheduler import LoadScopeScheduling  # tests run without it, too

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "server" if folder_of(nodeid) == "server" else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return Files(config, log)


def folder_of(nodeid: str) -> str:
    """One of FOLDERS."""
    folder, *inner = Path(nodeid.partition("::")[0]).parts[1:]
    if folder != "server" or len(inner) > 1:
        return folder
    return folder if inner[0].removeprefix("test_").removesuffix(".py") in SHARED_SERVER else OWN_SERVERS


@contextmanager
def locked(path: Path, how: int) -> Iterator[None]:
    with path.open() as file:
        fcntl.flock(file, how)
        try:
            yield
        finally:
            # Said here, since a process that was forked meanwhile has the file open, too.
            fcntl.flock(file, fcntl.LOCK_UN)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run nothing beside a test that is marked `alone`. Any file that is there will do as a lock."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    is_alone = item.get_closest_marker("alone") is not None
    # Whoever waits to be alone holds the gate, or the others' turns might never leave a gap.
    with ExitStack() as turn:
        with locked(ROOT / "pyproject.toml", fcntl.LOCK_EX):
            turn.enter_context(locked(Path(__file__), fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH))
        return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say below the slowest tests how long each folder took, fixtures included."""
    if config.option.durations is None:
        return
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[str(Path(report.nodeid.partition("::")[0]).parent)] += report.duration
    terminalreporter.section("seconds of each folder")
    for folder, spent in seconds.most_common():
        terminalreporter.line(f"{spent:8.1f} {folder}")


@pytest.fixture
def pass_interpreted() -> Callable[..., str]:
    """Run test files in a process of their own with triton's interpreter, which must be on before triton is
    imported: `pass_interpreted(file, ..., "-m", "slow")` returns what pytest printed; all of them pass."""

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)],
            env={
                **os.environ,
                "TRITON_INTERPRET": "1",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
