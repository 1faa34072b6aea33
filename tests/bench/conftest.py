"""What the benchmarks' tests need.

Those of the GPU suite's forms run where there is a GPU; elsewhere in triton's interpreter, which must be
switched on before triton is imported: test_gpu_suite.py starts a process for them.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETED or torch.cuda.is_available() else ["test_suite_forms.py"]


@pytest.fixture
def triton_device() -> str:
    """Where the Triton forms run."""
    return "cpu" if INTERPRETED else "cuda"
