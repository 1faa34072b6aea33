"""Faults in a served engine, its front ends and its files: what clients see, and that all is well afterwards.

The faults follow one another on one server, so each test also proves that the one before left nothing.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from manylora.serve.background import running_server

from bench.campaigns.faults import base_weights, files, scenarios
from bench.campaigns.faults.anatomy import Remains, engine_of, tritonserver_of
from bench.campaigns.faults.load import HUNG, NUM_STREAMS, NUM_WHOLE, RIGHT, WRONG, Bed, Report
from bench.campaigns.faults.silent_mount import may_mount
from bench.campaigns.harness import SYNTHETIC, status_of, wait_idle

ADAPTERS = SYNTHETIC[:3]
EXTRA = SYNTHETIC[3]
ALL = NUM_STREAMS + NUM_WHOLE
RUN_DIR_BYTES = 1 << 20


@pytest.fixture(scope="module")
def own_root(small_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters whose files may be harmed."""
    root = tmp_path_factory.mktemp("faults") / "adapters"
    for name in (*ADAPTERS, EXTRA):
        shutil.copytree(small_root / name, root / name)
    return root


@pytest.fixture(scope="module")
def own_base_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose files may be harmed. Its weights are linked, as in a download cache."""
    root = tmp_path_factory.mktemp("faults")
    own = Path(shutil.copytree(small_model, root / "base_model"))
    weights = own / base_weights.WEIGHTS
    weights.symlink_to(weights.rename(root / "0123abcd"))
    return own


@pytest.fixture(scope="module")
def small_disk() -> Iterator[Path]:
    """A directory with a file system of its own, where the system lets us make one."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={RUN_DIR_BYTES},mode=0700", "tmpfs", folder]
        is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        try:
            yield Path(folder)
        finally:
            if is_mounted:
                subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def bed(own_base_model: Path, own_root: Path, small_disk: Path) -> Iterator[Bed]:
    arguments = [f"--run-dir={small_disk}"]
    with running_server(base_model=own_base_model, adapter_root=own_root, arguments=arguments) as server:
        yield Bed(server, ADAPTERS)


def check(bed: Bed, report: Report) -> None:
    """Assert what holds for every fault: each client saw one end, none a wrong answer; nothing is left."""
    assert report.outcomes.total() == ALL
    assert not report.outcomes.keys() & {HUNG, WRONG}, report.outcomes
    status = wait_idle(bed.server)
    assert status.check_errors == []
    assert status.gauges["running"] == status.gauges["waiting"] == 0


def check_all_unavailable(bed: Bed, report: Report) -> None:
    check(bed, report)
    assert report.outcomes == {"Unavailable": ALL}
    assert report.messages <= {
        "the engine has ended; try again in a while",
        "the engine is not running; try again in a while",
    }


def test_files_of_adapters_in_use_may_go(bed: Bed, own_root: Path) -> None:
    report = scenarios.adapter_files_change_while_serving(bed, own_root)
    check(bed, report)
    assert report.outcomes == {RIGHT: ALL}


def test_files_that_change_while_they_are_read_harm_nobody_else(bed: Bed, own_root: Path) -> None:
    report = scenarios.adapter_files_change_while_loading(bed, own_root, EXTRA)
    check(bed, report)
    assert report.outcomes == {RIGHT: ALL}


@pytest.mark.parametrize("num_reads", [0, 2])
def test_a_disk_that_gives_no_answer_stops_only_those_who_ask_for_what_lies_on_it(
    bed: Bed, own_root: Path, num_reads: int
) -> None:
    if not may_mount():
        pytest.skip("only root may mount a file system that gives no answer")
    report = files.hung_directory(bed, own_root, EXTRA, num_reads=num_reads, deadline_ms=3000)
    check(bed, report)
    assert report.outcomes == {RIGHT: ALL}


def test_files_of_the_base_model_may_change_and_go(bed: Bed, own_base_model: Path) -> None:
    report = base_weights.rewritten_and_truncated(bed, own_base_model)
    check(bed, report)
    assert report.outcomes == {RIGHT: ALL}


def test_clients_that_leave_are_forgotten(bed: Bed) -> None:
    before = status_of(bed.server).counters["cancelled"]
    report = scenarios.clients_leave(bed)
    check(bed, report)
    assert report.outcomes == {RIGHT: ALL}
    assert status_of(bed.server).counters["cancelled"] > before


def test_a_slow_reader_holds_up_nobody(bed: Bed) -> None:
    report = scenarios.slow_reader(bed)
    check(bed, report)
    assert report.outcomes == {RIGHT: ALL}


def test_a_killed_engine_ends_its_requests_and_comes_back(bed: Bed) -> None:
    engine = engine_of(bed.server)
    triton = tritonserver_of(bed.server)
    check_all_unavailable(bed, scenarios.engine_killed(bed))
    assert engine_of(bed.server) != engine
    assert tritonserver_of(bed.server) == triton


def test_a_stopped_engine_ends_its_requests_and_comes_back(bed: Bed) -> None:
    check_all_unavailable(bed, scenarios.engine_stopped(bed))


@pytest.mark.slow
def test_an_engine_killed_while_it_loads_adapters_comes_back(bed: Bed, own_root: Path) -> None:
    check_all_unavailable(bed, scenarios.engine_killed_while_it_loads(bed, own_root, EXTRA))


@pytest.mark.slow
def test_a_killed_engine_whose_threads_hang_in_the_kernel_is_replaced(bed: Bed, own_root: Path) -> None:
    if not may_mount():
        pytest.skip("only root may mount a file system that gives no answer")
    check_all_unavailable(bed, files.engine_killed_while_a_read_hangs(bed, own_root))


@pytest.mark.slow
def test_an_engine_killed_and_stopped_while_it_starts_comes_back(bed: Bed) -> None:
    check_all_unavailable(bed, scenarios.engine_killed_at_start(bed))


def test_an_engine_without_memory_fails_requests_and_then_serves_rightly(bed: Bed) -> None:
    report = scenarios.engine_out_of_memory(bed)
    check(bed, report)
    assert report.outcomes.keys() <= {RIGHT, "Internal", "Unavailable"}


@pytest.mark.parametrize("model", ["llm", pytest.param("llm_stream", marks=pytest.mark.slow)])
def test_a_killed_front_end_ends_its_requests_and_is_replaced(bed: Bed, model: str) -> None:
    remains = Remains.of(bed.server)
    report = scenarios.front_end_killed(bed, model)
    check(bed, report)
    assert report.outcomes.keys() <= {"Unavailable", "Internal", "ConnectionFailed"}
    assert remains.left() == []


@pytest.mark.slow
def test_a_stopped_front_end_is_replaced(bed: Bed) -> None:
    remains = Remains.of(bed.server)
    report = scenarios.front_end_stopped(bed, "llm_stream")
    check(bed, report)
    assert report.outcomes.keys() <= {"Unavailable", "Internal", "ConnectionFailed", RIGHT}
    assert remains.left() == []


def test_a_killed_tritonserver_is_replaced(bed: Bed) -> None:
    remains = Remains.of(bed.server)
    report = scenarios.tritonserver_killed(bed)
    check(bed, report)
    assert report.outcomes == {"ConnectionFailed": ALL}
    assert remains.left() == []


def test_a_full_disk_stops_the_log_and_nothing_else(bed: Bed, small_disk: Path) -> None:
    if not small_disk.is_mount():
        pytest.skip("only root may mount a small file system")
    with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(512))
    assert shutil.disk_usage(small_disk).free == 0
    before = bed.server.log.stat().st_size
    # Its end, its start and the errors of its clients all have something to say.
    report = scenarios.engine_killed(bed)
    assert report.outcomes == {"Unavailable": ALL}
    assert bed.server.log.stat().st_size - before < 4096
    assert status_of(bed.server).check_errors == []
