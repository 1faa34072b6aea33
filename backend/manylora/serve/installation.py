"""The tritonserver to use: where it is, and how its Python backend is made to run this interpreter."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import manylora
from manylora.errors import NotFoundError, UnsupportedError

CHECKOUT_INSTALLATION = Path(manylora.__file__).resolve().parents[2] / ".build" / "tritonserver"
"""Where set-up puts the one of the PyPI wheel."""
SYSTEM_INSTALLATION = Path("/opt/tritonserver")

_LOADED = re.compile(r"^\s*(\S+) => (\S.*?)(?: \(0x[0-9a-f]+\))?$", re.MULTILINE)
_LIBPYTHON = re.compile(r"libpython3(?:-[0-9a-f]+)?\.(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Installation:
    """A folder with `bin/tritonserver`, `backends/python` and, where libraries come with it, `lib`."""

    root: Path

    @property
    def binary(self) -> Path:
        return self.root / "bin" / "tritonserver"

    @property
    def backends(self) -> Path:
        return self.root / "backends"

    @property
    def stub(self) -> Path:
        """The program that runs one Python model."""
        return self.backends / "python" / "triton_python_backend_stub"

    @property
    def working_directory(self) -> Path:
        """Where tritonserver is started.

        The stubs of 24.10 ignore PYTHONPATH, but import from the working directory before all else, and crash
        with numpy 2. Set-up leaves them a numpy 1 in `python`; a later tritonserver has no such folder.
        """
        packages = self.root / "python"
        return packages if packages.is_dir() else Path("/")


def find_installation() -> Installation:
    """The tritonserver on PATH, else the one in /opt/tritonserver, else the one that set-up has unpacked.

    Raises:
        NotFoundError: there is none.
    """
    on_path = shutil.which("tritonserver")
    # It may be a link, with the backends beside the link (as set-up leaves them) or beside what it leads to.
    places = [Path(on_path).absolute().parents[1], Path(on_path).resolve().parents[1]] if on_path else []
    roots = [root for root in places if Installation(root=root).stub.is_file()] + places[1:]
    roots += [SYSTEM_INSTALLATION, CHECKOUT_INSTALLATION]
    for root in roots:
        found = Installation(root=root)
        if os.access(found.binary, os.X_OK):
            return found
    raise NotFoundError(
        f"no tritonserver: looked on PATH, in {SYSTEM_INSTALLATION}/bin and in {CHECKOUT_INSTALLATION}/bin; "
        "`make setup` in a checkout puts one into the last"
    )


def environment(installation: Installation, library_dir: Path) -> dict[str, str]:
    """The environment that makes tritonserver's stubs run this interpreter with these packages.

    Args:
        library_dir: an empty folder of the caller's, for the link to this interpreter's libpython.

    Raises:
        UnsupportedError: the stub is missing or for another Python, or this Python has no shared library.
    """
    env = dict(os.environ)
    libraries = [str(library_dir), str(installation.root / "lib"), env.get("LD_LIBRARY_PATH", "")]
    env["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    # The interpreter inside a stub takes its packages from the first python3 on PATH.
    env["PATH"] = f"{Path(sys.executable).parent}:{env.get('PATH', os.defpath)}"
    # The engine, started from a stub, inherits the working directory; the numpy in it is not for the engine.
    env["PYTHONSAFEPATH"] = "1"
    _link_libpython(installation, env, library_dir)
    _check_importable(installation)
    return env


def _link_libpython(installation: Installation, env: dict[str, str], library_dir: Path) -> None:
    """Put this interpreter's libpython, under the name that the stub asks for, first on the search path.

    Without it the stub may find another build of the same version, whose standard library is elsewhere.
    """
    stub = installation.stub
    if not stub.is_file():
        raise UnsupportedError(f"{installation.root} has no Python backend: {stub} is missing")
    name, _ = _needed_libpython(stub, env)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    wanted = _LIBPYTHON.match(name)
    if not wanted or f"3.{wanted[1]}" != version:
        raise UnsupportedError(
            f"the Python backend in {installation.root} is made for {name}, this is Python {version} "
            f"({sys.executable}): install manylora under the backend's Python"
        )
    ours = _own_libpython(version)
    library_dir.mkdir(mode=0o700, exist_ok=True)
    (library_dir / name).symlink_to(ours)
    _, found = _needed_libpython(stub, env)
    if Path(found).resolve() != ours.resolve():
        raise UnsupportedError(
            f"the Python backend in {installation.root} loads {found}, not {ours} of this interpreter, "
            f"although LD_LIBRARY_PATH={env['LD_LIBRARY_PATH']}"
        )


def _needed_libpython(stub: Path, env: dict[str, str]) -> tuple[str, str]:
    """The name of the libpython that a stub asks for, and the file that the dynamic loader finds for it."""
    listing = subprocess.run(
        [stub], env={**env, "LD_TRACE_LOADED_OBJECTS": "1"}, capture_output=True, text=True, check=False
    )
    for name, path in _LOADED.findall(listing.stdout):
        if name.startswith("libpython"):
            return name, path
    detail = (listing.stderr or listing.stdout).strip().splitlines()[-1:] or ["it lists no libpython"]
    raise UnsupportedError(f"{stub}: its libraries cannot be listed: {detail[0]}")


def _own_libpython(version: str) -> Path:
    name = f"libpython{version}.so.1.0"
    folders = [Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib"), Path(sys.base_prefix) / "lib"]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise UnsupportedError(
        f"{sys.executable} has no shared {name} (looked in {', '.join(map(str, folders))}), which Triton's "
        f"Python backend loads: install libpython{version}, or use a Python built with --enable-shared"
    )


def _check_importable(installation: Installation) -> None:
    """Import the package as a stub will: without PYTHONPATH.

    Raises:
        UnsupportedError: it cannot be imported that way.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-c", "import manylora"],
        capture_output=True,
        text=True,
        check=False,
        cwd=installation.working_directory,
    )
    if done.returncode:
        raise UnsupportedError(
            f"{sys.executable} cannot import manylora without PYTHONPATH, which Triton's Python backend "
            "ignores; install it there: pip install -e '.[server]'"
        )
