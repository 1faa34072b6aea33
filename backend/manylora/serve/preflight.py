"""Checks before tritonserver starts, so that a start that cannot succeed fails at once with one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from manylora import paths
from manylora.adapters.adapter_root import AdapterRoot
from manylora.answered import answered
from manylora.config import EngineConfig, resolve_directory
from manylora.errors import InvalidArgumentError, ManyloraError, NotFoundError, UnavailableError
from manylora.table import size

RUN_DIR_BYTES = 1 << 20
"""The rendered models, and the first of the log."""
SHARED_MEMORY_BYTES = 4 << 20
"""Regions of both front ends, as they are at the start."""
ANSWER_S = 30.0
"""Time for a file system to answer."""
DEVICE_S = 120.0
"""Time for torch to be imported and to find its devices on a busy machine."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

_COUNT_DEVICES = """\
import torch
print(torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.__version__)
"""


def check(settings: Mapping[str, str], run_dir: Path) -> None:
    """Check the directories and the device that a server with these settings needs.

    Raises:
        ManyloraError: one of them cannot be used.
    """
    check_room(run_dir, RUN_DIR_BYTES, f"--run-dir {run_dir}")
    check_room(paths.SHARED_MEMORY, SHARED_MEMORY_BYTES, "shared memory, through which requests pass,")
    config = EngineConfig.from_strings(settings)
    answered(f"base_model={config.base_model!r}", lambda: check_base_model(config), ANSWER_S)
    answered(f"adapter_root={config.adapter_root!r}", lambda: check_adapters(config), ANSWER_S)
    check_device(config.device)


def check_room(folder: Path, num_bytes: int, what: str) -> None:
    """Make a file of that size, and remove it.

    Raises:
        UnavailableError: the file system has no room for it, or takes no file.
    """
    trial = folder / f"manylora-room-{os.getpid()}"
    try:
        fd = os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, num_bytes)
        finally:
            os.close(fd)
            trial.unlink()
    except OSError as error:
        raise UnavailableError(f"{what}: {error.strerror}; {size(num_bytes)} are needed") from error


def check_base_model(config: EngineConfig) -> None:
    """
    Raises:
        InvalidArgumentError: the directory has no model in Hugging Face format.
    """
    directory = resolve_directory(config.base_model, "base_model")
    what = f"base_model={paths.to_text(directory)!r}"
    try:
        names = {entry.name for entry in directory.iterdir()}
        read = json.loads((directory / "config.json").read_bytes())
    except FileNotFoundError as error:
        raise InvalidArgumentError(
            f"{what}: not a model in Hugging Face format: it has no config.json"
        ) from error
    except OSError as error:
        raise InvalidArgumentError(f"{what}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{what}: its config.json is not JSON: {error}") from error
    if not isinstance(read, dict) or "model_type" not in read:
        raise InvalidArgumentError(f"{what}: its config.json has no model_type")
    if not any(name.endswith(".safetensors") for name in names):
        raise InvalidArgumentError(f"{what}: no weights: it has no file *.safetensors")
    if not names.intersection(TOKENIZER_FILES):
        raise InvalidArgumentError(f"{what}: no tokenizer: it has none of {', '.join(TOKENIZER_FILES)}")


def check_adapters(config: EngineConfig) -> None:
    """
    Raises:
        NotFoundError: an adapter that is to be loaded at the start is not there.
        InvalidArgumentError: it lies outside the folder.
    """
    root = AdapterRoot(config.adapter_root)
    for key in ("preload_adapters", "pinned_adapters"):
        for name in getattr(config, key):
            try:
                directory = root.find(name)
            except ManyloraError as error:
                raise type(error)(f"{key}: {error.message}, in {config.adapter_root}") from error
            missing = [file for file in ADAPTER_FILES if not (directory / file).is_file()]
            if missing:
                raise NotFoundError(f"{key}: adapter {name!r} has no {' and no '.join(missing)}")


def check_device(device: str) -> None:
    """Ask torch, in a process of its own, for a CUDA device that was asked for by name.

    Raises:
        InvalidArgumentError: it has none, or not so many.
    """
    if not device.startswith("cuda"):
        return
    try:
        done = subprocess.run(
            [sys.executable, "-c", _COUNT_DEVICES],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            timeout=DEVICE_S,
            # Ctrl-C is for us alone, and no answer about devices.
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(
            f"device={device!r}: torch does not say within {DEVICE_S:g} s which devices there are"
        ) from error
    found = re.fullmatch(r"(\d+) (\S+)", done.stdout.strip().rpartition("\n")[2])
    if not found:
        why = done.stderr.strip().rpartition("\n")[2]
        raise InvalidArgumentError(f"device={device!r}: torch cannot be asked for devices: {why}")
    count, index = int(found[1]), int(device.partition(":")[2] or 0)
    if not count:
        raise InvalidArgumentError(
            f"device={device!r}: torch {found[2]} finds no CUDA device; use device=cpu, or auto, which takes "
            "one where there is one"
        )
    if index >= count:
        raise InvalidArgumentError(f"device={device!r}: allowed are cuda:0 to cuda:{count - 1}")
