"""How the processes below a server end, whatever state they are in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.campaigns.faults.silent_mount import may_mount, silent_mount

END_CHILDREN = """
import subprocess, sys
from pathlib import Path
from manylora.serve import processes

processes.adopt_orphans()
hung = subprocess.Popen(["stat", sys.argv[1]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
# This one can be killed, no more.
subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 1000"])
while "request_wait_answer" not in Path(f"/proc/{hung.pid}/wchan").read_text():
    assert hung.poll() is None
print(processes.end_children(0.5, 1.0) == [hung.pid])
"""


def test_a_child_that_cannot_be_killed_holds_up_nobody(tmp_path: Path) -> None:
    if not may_mount():
        pytest.skip("only root may mount a file system that gives no answer")
    with silent_mount(tmp_path):
        done = subprocess.run(
            [sys.executable, "-c", END_CHILDREN, tmp_path],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    assert done.stdout == "True\n"
