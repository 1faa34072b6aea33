"""A server at its limits: a full queue, deadlines that pass, an end under load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from manylora.serve.background import running_server

from bench.campaigns.faults import scenarios
from bench.campaigns.faults.load import NUM_STREAMS, NUM_WHOLE, RIGHT, Bed
from bench.campaigns.harness import SYNTHETIC, wait_idle

ALL = NUM_STREAMS + NUM_WHOLE
MAX_WAITING = 4


@pytest.fixture(scope="module")
def bed(small_model: Path, small_root: Path) -> Iterator[Bed]:
    # Answers must be long enough for the load to meet in the queue.
    arguments = [f"--set=max_waiting={MAX_WAITING}", "--set=max_num_seqs=4"]
    with running_server(base_model=small_model, adapter_root=small_root, arguments=arguments) as server:
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


def test_sigterm_under_load_ends_every_request_and_leaves_nothing(
    small_model: Path, small_root: Path, tmp_path: Path
) -> None:
    arguments = ["--exit-timeout=2", f"--run-dir={tmp_path / 'run'}"]
    with running_server(base_model=small_model, adapter_root=small_root, arguments=arguments) as server:
        report = scenarios.server_terminated(Bed(server, SYNTHETIC[:3]))
    assert report.outcomes.total() == ALL
    assert report.outcomes.keys() <= {RIGHT, "Unavailable"}, report.messages
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["server.log"]
