"""What a lent machine without a network lacks: fetched beforehand into a folder that is carried there."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

from bench import peers
from bench.gpu.peer_modules import FOLDER, VERSIONS
from bench.loadtest import environment
from bench.paths import ROOT

LEASE = ROOT / ".cache" / "lease"
"""Ignored by git."""
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
"""Which of them such a machine has is not known beforehand, and the wheels are small."""
PACKAGES = ("msgspec",)
"""Of what the backend imports, those that images with torch and transformers do not have."""
MOST_BYTES = 60 << 20
"""That can be carried."""
_TAGS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def fetch(folder: Path) -> int:
    """Fetch wheels and the peers' files, and note the commit, which a copy without git does not know.

    Returns: the exit status, 1 where something could not be had.
    """
    status = 0
    (folder / "wheels").mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        for python in PYTHONS:
            status |= _fetch_wheel(f"{package}=={_version(package)}", python, folder / "wheels")
    status |= peers.main(["--folder", str(folder / "peers")])
    (folder / "commit").write_text(environment.commit() + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / (1 << 20):.1f} MiB, at most {MOST_BYTES >> 20} can be carried")
    return int(bool(status) or size > MOST_BYTES)


def _version(package: str) -> str:
    """The tested one."""
    found = re.search(rf"^{re.escape(package)}==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None, f"constraints.txt does not name {package}"
    return found[1]


def _fetch_wheel(wanted: str, python: str, folder: Path) -> int:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--python-version", python, "--implementation", "cp"]
    command += [word for tag in _TAGS for word in ("--platform", tag)]
    done = subprocess.run(
        [*command, "--dest", str(folder), wanted], capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"{wanted} for Python {python}: {done.stderr.strip()}", file=sys.stderr)
    return done.returncode


def unpack(folder: Path, site: Path) -> list[str]:
    """Unpack the wheels for this Python into a folder from which they are imported.

    Returns:
        Their names; none where nothing was fetched.
    """
    tag = f"-cp{sys.version_info.major}{sys.version_info.minor}-"
    found = [path for path in sorted((folder / "wheels").glob("*.whl")) if tag in path.name]
    for path in found:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(site)
    return [path.name for path in found]


def commit(folder: Path) -> str:
    """The checkout's, or the one that was noted when the files were fetched."""
    try:
        return environment.commit() or (folder / "commit").read_text().strip()
    except OSError:
        return ""


def peers_folder(folder: Path = LEASE) -> Path:
    """Of the peers' files: those that were carried along, else those that were fetched here."""
    carried = folder / "peers"
    return carried if (carried / VERSIONS).exists() else FOLDER
