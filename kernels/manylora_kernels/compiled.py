"""Builds the compiled CPU forms for this machine on first use, and loads them.

They need a C compiler, as triton does on a GPU. Where there is none, or the build fails, `library()` is None
and the forms on torch's operators serve.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

log = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What the compiled forms serve, with their own numbers for them."""

BUILD_S = 120.0
_FOLDER = Path(__file__).parent
_UNITS = ("lora/lora_cpu.c", "attention/attention_cpu.c")
_SOURCES = (*_UNITS, "vec.h")
_FLAGS = ("-O2", "-march=native", "-std=gnu11", "-fPIC", "-fopenmp", "-Wno-psabi")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled forms, built if this machine has none yet. None: they cannot be built or loaded here."""
    try:
        path = _cache_folder() / f"cpu-{_fingerprint()}.so"
        if not path.exists():
            _build(path)
        return _load(path)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning("the compiled CPU forms are not available (%s); torch's operators serve", reason)
        return None


def _build(path: Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler on PATH")
    # Linked without an OpenMP runtime: the one that torch has loaded serves, so that both share threads.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        shared, objects = (
            Path(folder) / "shared.so",
            [str(Path(folder) / f"{Path(unit).stem}.o") for unit in _UNITS],
        )
        commands = [
            [compiler, *_FLAGS, "-c", str(_FOLDER / unit), "-o", built]
            for unit, built in zip(_UNITS, objects, strict=True)
        ]
        for command in (*commands, [compiler, "-shared", *objects, "-o", str(shared)]):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_S)
        # Another process may build the same at the same time: each puts a whole file in place.
        shared.replace(path)


def _load(path: Path) -> ctypes.CDLL:
    runtime = openmp_runtime()
    if runtime is None:
        raise OSError("torch has no OpenMP runtime to share")
    ctypes.CDLL(runtime, ctypes.RTLD_GLOBAL)
    loaded = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.manylora_add_lora.argtypes = [
        pointer, pointer, pointer, number, pointer, number, pointer, number, number,
    ]  # fmt: skip
    loaded.manylora_add_lora.restype = None
    loaded.manylora_decode.argtypes = [pointer, number]
    loaded.manylora_decode.restype = None
    return loaded


def openmp_runtime() -> str | None:
    """The OpenMP library that torch has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.rpartition(" ")[2]
        if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            return path
    return None


def _cache_folder() -> Path:
    """This user's own folder for built files, or a temporary one where that cannot be written."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(root) / "manylora"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # a user without a home has no folder to keep it in
        pass
    return Path(_private_folder().name)


@functools.cache
def _private_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="manylora-")


def _fingerprint() -> str:
    """Changes with the source, the flags and the processor: a cache may be shared by several machines."""
    facts = [*((_FOLDER / name).read_text() for name in _SOURCES), *_FLAGS, platform.machine()]
    facts += [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")][:1]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
