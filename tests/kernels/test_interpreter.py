"""Run the tests of the Triton forms in triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where these tests run as they are")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on in this process")
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_forms_pass_in_the_interpreter(
    chosen: str, triton_files: list[Path], pass_interpreted: Callable[..., str]
) -> None:
    """The slow ones are the same cases in float16."""
    pass_interpreted(*triton_files, "-m", chosen)
