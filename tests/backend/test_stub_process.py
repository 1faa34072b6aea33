"""Whether a reply that finds no room in shared memory is refused before Triton loses it."""

from __future__ import annotations

import subprocess
import sys

import pytest

MOUNT = "mount -t tmpfs -o size=8M tmpfs /dev/shm && exec "
CHECK = """
import numpy as np
from manylora import stub_process
from manylora.errors import UnavailableError
def reply(num_bytes):
    return {"logprobs": np.array([[b"x" * num_bytes]], dtype=object), "num_output_tokens": np.ones((1, 1))}
with open("/dev/shm/region", "wb") as region:
    region.write(bytes(5 << 20))
stub_process.check_room(reply(1 << 20), free_in_region=lambda: 0)
# The region has grown to most of the file system, and is empty.
stub_process.check_room(reply(6 << 20), free_in_region=lambda: 5 << 20)
try:
    stub_process.check_room(reply(4 << 20), free_in_region=lambda: 0)
except UnavailableError as error:
    print(error.message)
"""


def test_a_reply_that_finds_no_room_in_shared_memory_is_refused() -> None:
    can_mount = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{MOUNT}true"], capture_output=True, check=False
    )
    if can_mount.returncode:
        pytest.skip("only root may mount a small file system")
    command = ["unshare", "-m", "sh", "-c", f'{MOUNT}"$@"', "sh", sys.executable, "-c", CHECK]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == (
        "an answer of 4194312 bytes finds no room in the server's shared memory, where 3145728 are free; "
        "ask for fewer sequences, tokens or log probabilities at once\n"
    )
