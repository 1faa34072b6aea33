"""A server at its limits: a full queue, a full disk, deadlines that pass, an end under load."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from manylora.serve.background import running_server

from bench.campaigns.faults import scenarios
from bench.campaigns.faults.load import NUM_STREAMS, NUM_WHOLE, RIGHT, Bed
from bench.campaigns.harness import SYNTHETIC, status_of, wait_idle

ALL = NUM_STREAMS + NUM_WHOLE
MAX_WAITING = 4
RUN_DIR_BYTES = 1 << 20


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
def bed(base_model: Path, adapter_root: Path, small_disk: Path) -> Iterator[Bed]:
    # Answers must be long enough for the load to meet in the queue.
    arguments = [f"--set=max_waiting={MAX_WAITING}", "--set=max_num_seqs=4", f"--run-dir={small_disk}"]
    with running_server(base_model=base_model, adapter_root=adapter_root, arguments=arguments) as server:
        yield Bed(server, SYNTHETIC[:3])


def test_a_full_queue_refuses_at_once_and_the_others_finish(bed: Bed) -> None:
    report = scenarios.queue_full(bed)
    assert report.outcomes.keys() == {RIGHT, "Unavailable"}
    assert report.outcomes.total() == ALL
    assert report.outcomes[RIGHT] >= MAX_WAITING
    assert all(f"max_waiting={MAX_WAITING}" in message for message in report.messages)
    assert wait_idle(bed.server).check_errors == []


def test_a_deadline_ends_a_request_in_the_queue_and_in_its_answer(bed: Bed) -> None:
    report = scenarios.deadlines_pass(bed)
    assert report.outcomes.keys() <= {RIGHT, "Unavailable"}
    assert wait_idle(bed.server).check_errors == []


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


def test_sigterm_under_load_ends_every_request_and_leaves_nothing(
    base_model: Path, adapter_root: Path, tmp_path: Path
) -> None:
    arguments = ["--exit-timeout=2", f"--run-dir={tmp_path / 'run'}"]
    with running_server(base_model=base_model, adapter_root=adapter_root, arguments=arguments) as server:
        report = scenarios.server_terminated(Bed(server, SYNTHETIC[:3]))
    assert report.outcomes.total() == ALL
    assert report.outcomes.keys() <= {RIGHT, "Unavailable"}, report.messages
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["server.log"]
