"""`manylora serve` of sizes that the machine does not have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FREE_PORTS = ("--http-port=0", "--grpc-port=0", "--metrics-port=0")


@pytest.mark.parametrize("setting", ["max_loras=100000", "kv_cache_bytes=900T"])
def test_a_size_that_the_machine_does_not_have_is_refused_with_both_numbers(
    base_model: Path, setting: str
) -> None:
    words = ["serve", f"--base-model={base_model}", *FREE_PORTS, "--set", setting]
    done = subprocess.run(
        [sys.executable, "-m", "manylora.cli", *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    key = setting.partition("=")[0]
    # The first thing that is said of it.
    told = next(line for line in done.stderr.splitlines() if "GiB" in line)
    assert told.startswith("[INVALID_ARG] base model 0.50 GiB + device pool (max_loras=")
    assert f"{key}" in told
    assert " but this machine has " in told
    assert "Traceback" not in done.stderr
