"""Limits of control groups: on files as the kernel shows them, and in a real group where one can be made."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from manylora import cgroup

V2_MOUNT = "30 24 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_CPU = "33 31 0:30 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
CPUSET = "34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset"


def tree(folder: Path, groups: str, mounts: list[str], files: dict[str, str]) -> Path:
    proc = folder / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(groups)
    (proc / "mountinfo").write_text("\n".join(["23 1 8:1 / / rw - ext4 /dev/sda rw", CPUSET, *mounts]))
    for name, text in files.items():
        path = folder / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "cpus", "memory"),
    [
        pytest.param(
            "0::/a/b\n", [V2_MOUNT.format(root="/")], {"a/b/cpu.max": "max 100000"}, None, None, id="v2-none"
        ),
        pytest.param(
            "0::/a/b\n",
            [V2_MOUNT.format(root="/")],
            {
                "a/b/cpu.max": "max 100000",
                "a/cpu.max": "150000 100000",
                "a/b/memory.max": "1000",
                "a/memory.max": "max",
            },
            1.5,
            1000,
            id="v2-the-tightest-of-all-above",
        ),
        pytest.param(
            "0::/\n",
            [V2_MOUNT.format(root="/")],
            {"cpu.max": "200000 100000", "memory.max": "4096"},
            2.0,
            4096,
            id="v2-in-a-namespace-of-its-own",
        ),
        pytest.param(
            "4:cpu,cpuacct:/docker/x\n7:memory:/docker/x\n0::/docker/x\n",
            [V1_CPU.format(root="/docker/x"), V1_MEMORY.format(root="/docker/x")],
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "50000",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "12345",
            },
            0.5,
            12345,
            id="v1-in-a-container",
        ),
        pytest.param(
            "4:cpu,cpuacct:/x\n7:memory:/x\n",
            [V1_CPU.format(root="/"), V1_MEMORY.format(root="/")],
            {
                "cpu,cpuacct/x/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/x/cpu.cfs_period_us": "100000",
                "memory/x/memory.limit_in_bytes": "9223372036854771712",
            },
            None,
            None,
            id="v1-none",
        ),
        pytest.param("", [], {}, None, None, id="no-groups-at-all"),
    ],
)
def test_the_tightest_limit_of_the_groups_counts(
    tmp_path: Path,
    groups: str,
    mounts: list[str],
    files: dict[str, str],
    cpus: float | None,
    memory: int | None,
) -> None:
    root = tree(tmp_path, groups, mounts, files)
    assert cgroup.cpu_quota(root) == cpus
    assert cgroup.memory_limit(root) == memory


@pytest.fixture
def group_of_one_and_a_half() -> Iterator[Path]:
    """A real group with the time of one and a half processors."""
    for top, files in (
        (Path("/sys/fs/cgroup/cpu"), {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "150000"}),
        (Path("/sys/fs/cgroup"), {"cpu.max": "150000 100000"}),
    ):
        folder = top / f"manylora-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        if all((folder / name).exists() for name in files):
            for name, text in files.items():
                (folder / name).write_text(text)
            yield folder
            folder.rmdir()
            return
        folder.rmdir()
    pytest.skip("no control group for processors can be made here")


JOIN = """
import os, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from manylora.threads import num_step_threads
import torch
torch.set_num_threads(4)
print(num_step_threads(0), num_step_threads(3))
"""


def test_a_step_takes_the_threads_that_a_real_quota_has_time_for(group_of_one_and_a_half: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", JOIN, str(group_of_one_and_a_half)], capture_output=True, text=True, check=True
    )
    # What is asked for by name is taken.
    assert done.stdout.split() == ["1", "3"]
