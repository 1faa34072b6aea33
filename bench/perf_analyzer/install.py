"""Fetch perf_analyzer into .build/perf_analyzer, with a newer C library where the system's is too old.

    python bench/perf_analyzer/install.py

The program asks for glibc 2.38. On an older system it runs through the loader and libraries of Debian 13,
which apt fetches from the configured mirror into the same folder: nothing is installed, nothing outside
.build changes.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    from scripts.setup import BUILD, ROOT, SetupError, Step, digest, pip, replacing
except ModuleNotFoundError as error:
    sys.exit(f"perf_analyzer: {error}; run `make setup` first, and this by .venv/bin/python")

REQUIREMENT = "perf-analyzer==2.60.0"
PLATFORM = "manylinux_2_38_x86_64"
"""Asked for by name: on an older glibc pip would otherwise take a placeholder of two kilobytes."""
NEEDED_GLIBC = (2, 38)
SUITE = "trixie"
PACKAGES = ("libc6", "libstdc++6", "libgcc-s1")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

FOLDER = BUILD / "perf_analyzer"
COMMAND = FOLDER / "perf_analyzer"
"""What to call: perf_analyzer itself, however it has to be run on this system."""

DIRECT = """\
#!/bin/sh
exec "$(dirname "$(readlink -f "$0")")/wheel/perf_analyzer/bin/perf_analyzer" "$@"
"""
THROUGH_LOADER = """\
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
lib=$here/debian/usr/lib/x86_64-linux-gnu
echo "perf_analyzer: runs on the C library of Debian {suite} in $here/debian (this system's is {found})" >&2
exec "$lib/ld-linux-x86-64.so.2" --library-path "$lib" "$here/wheel/perf_analyzer/bin/perf_analyzer" "$@"
"""


def glibc_version() -> tuple[int, int]:
    """The system's.

    Raises:
        SetupError: its C library is another one.
    """
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        major, minor = version.split(".")[:2]
    except (ValueError, OSError) as error:
        raise SetupError("perf_analyzer needs glibc, this system has another C library") from error
    assert name == "glibc"
    return int(major), int(minor)


def configured_mirror() -> str:
    """The Debian mirror that this system's apt uses.

    Raises:
        SetupError: there is no apt, or it has no mirror of Debian.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise SetupError(
            "an older glibc than 2.38 needs Debian's libraries, and apt-get and dpkg-deb to fetch them"
        )
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    mirrors = [uri for uri in found if uri.rstrip("/").endswith("/debian")]
    if not mirrors:
        raise SetupError(
            f"apt has no mirror of Debian (found: {', '.join(found) or 'none'}); name one with --mirror"
        )
    return mirrors[0]


def fetch_debian_libraries(mirror: str, target: Path) -> None:
    """Unpack the libraries of Debian 13 into `target`, with an apt that shares no state with the system's.

    Raises:
        SetupError: apt cannot fetch them, or does not trust the mirror.
    """
    with tempfile.TemporaryDirectory() as folder:
        private = Path(folder)
        for part in ("state/lists/partial", "cache/archives/partial", "packages"):
            (private / part).mkdir(parents=True)
        trust = f"[signed-by={KEYRING}] " if KEYRING.is_file() else ""
        (private / "sources.list").write_text(f"deb {trust}{mirror} {SUITE} main\n")
        settings = {
            "APT::Architecture": "amd64",
            # Root's apt would fetch as a user of its own, who may not enter this folder.
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Dir::Cache": private / "cache",
            "Dir::Etc::SourceList": private / "sources.list",
            "Dir::Etc::SourceParts": "-",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": "/dev/null",
            "Dir::State": private / "state",
            "Dir::State::status": "/dev/null",
        }
        apt = [
            "apt-get",
            "-q",
            *(word for key, value in settings.items() for word in ("-o", f"{key}={value}")),
        ]
        packages = private / "packages"
        for command in ([*apt, "update"], [*apt, "download", *PACKAGES]):
            if subprocess.run(command, cwd=packages, check=False).returncode:
                raise SetupError(f"apt cannot fetch {', '.join(PACKAGES)} of Debian {SUITE} from {mirror}")
        for package in packages.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, target], check=True)


def install(mirror: str | None) -> None:
    """Lay out the program, the libraries if they are needed, and the command that starts it.

    Raises:
        SetupError: something cannot be fetched, or the program does not start.
    """
    glibc = glibc_version()
    found = ".".join(map(str, glibc))
    with replacing(FOLDER) as fresh:
        pip(
            *("--no-deps", "--no-compile", "--only-binary", ":all:", "--platform", PLATFORM),
            *("--target", fresh / "wheel", REQUIREMENT),
        )
        program = fresh / "wheel" / "perf_analyzer" / "bin" / "perf_analyzer"
        program.chmod(0o755)
        command = fresh / COMMAND.name
        command.write_text(DIRECT)
        if glibc < NEEDED_GLIBC:
            print(f"This system's glibc is {found}, perf_analyzer needs 2.38: fetching Debian {SUITE}'s")
            fetch_debian_libraries(mirror or configured_mirror(), fresh / "debian")
            command.write_text(THROUGH_LOADER.format(suite=SUITE, found=found))
        command.chmod(0o755)
        said = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
        if said.returncode:
            # It takes libssl 3 and libz from the system.
            raise SetupError(f"perf_analyzer does not start: {said.stderr.strip() or said.stdout.strip()}")
        # The version comes on standard error.
        print(said.stderr.strip())


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch perf_analyzer into .build/perf_analyzer.")
    parser.add_argument("--mirror", help="Debian mirror, if apt has none configured: its URI up to /debian")
    arguments = parser.parse_args()
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / "setup.lock", "w") as lock:
        # Two at once would write the same folder; the second finds everything done.
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            key = f"{REQUIREMENT} {'.'.join(map(str, glibc_version()))} {digest(Path(__file__))}"
            action = functools.partial(install, arguments.mirror)
            step = Step(name="perf_analyzer", key=key, outputs=(COMMAND,), action=action)
            if not step.is_done():
                step.run()
        except SetupError as error:
            print(f"perf_analyzer: {error}", file=sys.stderr)
            return 1
    print(f"perf_analyzer: {COMMAND.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
