"""OpenMP threads of torch's operators."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os, sys, threading, torch
from manylora.threads import use_one_thread

torch.set_num_threads(2)
before = len(os.listdir("/proc/self/task"))
found = []

def work():
    if sys.argv[1] == "one":
        use_one_thread()
    (torch.ones(1 << 22) * 2).sum()
    found.append(len(os.listdir("/proc/self/task")) - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
print(found[0], torch.get_num_threads())
"""


@pytest.mark.parametrize(("asked", "num_new"), [("one", 1), ("as many as there are", 2)])
def test_a_thread_that_asks_for_one_gets_no_others_and_the_rest_keep_theirs(asked: str, num_new: int) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, asked], capture_output=True, text=True, check=True)
    assert [int(word) for word in done.stdout.split()] == [num_new, 2]
