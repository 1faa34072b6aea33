"""Imports point one way: model_repository -> backend -> kernels; the client imports neither."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {
    "kernels/manylora_kernels": {
        "manylora",
        "manylora_client",
        "transformers",
        "triton_python_backend_utils",
    },
    "client/manylora_client": {"manylora", "manylora_kernels", "torch", "transformers", "triton"},
    "backend/manylora": {"manylora_client"},
}
WITHOUT_TORCH = [
    "manylora.front_end.triton_model",
    "manylora.front_end.front_end",
    "manylora.front_end.tensor_door",
    "manylora.ipc",
    "manylora.cli",
    "manylora.serve.command",
    "manylora.supervise.supervisor",
    "manylora.supervise.engine_keeper",
]

MAY_USE_THE_CLIENT = "backend/manylora/commands"
"""What the command line asks of a running server, it asks through the client."""


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_nothing_above_it(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    files = [f for f in files if not f.is_relative_to(ROOT / MAY_USE_THE_CLIENT)]
    wrong = {str(f.relative_to(ROOT)): bad for f in files if (bad := imported(f) & FORBIDDEN[package])}
    assert wrong == {}


def test_only_one_file_knows_tritons_own_module() -> None:
    users = [
        str(f.relative_to(ROOT))
        for folder in ("backend", "kernels", "client", "model_repository")
        for f in sorted((ROOT / folder).rglob("*.py"))
        if "triton_python_backend_utils" in imported(f)
    ]
    assert users == ["backend/manylora/front_end/triton_model.py"]


def test_a_front_door_needs_nothing_of_tritons() -> None:
    """Tensors, and the contract in tensors, are one door's affair."""
    doors = {"protocol.py", "tensor_door.py", "triton_model.py"}
    files = sorted((ROOT / "backend/manylora/front_end").glob("*.py"))
    assert doors < {f.name for f in files}
    triton = re.compile(
        r"\bnumpy\b|pb_utils|front_end\.(protocol|tensor_door|triton_model)|import .*protocol"
    )
    assert [f.name for f in files if f.name not in doors and triton.search(f.read_text())] == []


@pytest.mark.parametrize("package", ["engine", "adapters", "model"])
def test_nothing_of_the_engine_knows_text_or_front_ends(package: str) -> None:
    files = sorted((ROOT / "backend/manylora" / package).rglob("*.py"))
    assert files
    assert [
        str(f)
        for f in files
        if re.search(r"import.*\bfront_end\b|from manylora\.(front_end|offline)", f.read_text())
    ] == []


def test_what_keeps_processes_running_knows_nothing_of_serve() -> None:
    files = sorted((ROOT / "backend/manylora/supervise").rglob("*.py"))
    assert files
    assert [
        str(f) for f in files if re.search(r"from manylora\.serve|import.*\bserve\b", f.read_text())
    ] == []


SOURCES = {
    ".".join(path.relative_to(ROOT / folder).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("backend", "kernels", "client")
    for path in sorted((ROOT / folder).glob("manylora*/**/*.py"))
}
"""Modules by name."""


def imported_modules(module: str) -> set[str]:
    """Our modules that a module imports anywhere in it, for types alone too."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & SOURCES.keys()) or {node.module}
    return found & SOURCES.keys() - {module}


def cycles(imports: dict[str, set[str]]) -> list[str]:
    """What is left when all that imports nothing of the rest has been taken away, again and again, and then
    all that nothing of the rest imports."""
    left = dict(imports)
    while done := [name for name, others in left.items() if not others & left.keys()]:
        for name in done:
            del left[name]
    while done := left.keys() - set().union(*left.values()):
        for name in done:
            del left[name]
    return sorted(left)


def package_of(module: str) -> str:
    """Its package below the top one; the module itself where it lies at the top."""
    return ".".join(module.split(".")[:2])


def test_no_import_leads_back_to_where_it_began() -> None:
    modules = {module: imported_modules(module) for module in SOURCES}
    assert len(modules) > 100
    assert cycles(modules) == []
    packages: dict[str, set[str]] = {}
    for module, others in modules.items():
        mine = package_of(module)
        packages.setdefault(mine, set()).update({package_of(other) for other in others} - {mine})
    # The package itself names what it offers.
    for top in ("manylora", "manylora_kernels", "manylora_client"):
        del packages[top]
    assert cycles(packages) == []


def test_modules_are_short() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in SOURCES.items()}
    assert {module: length for module, length in lengths.items() if length > 300} == {}


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_front_ends_and_commands_start_without_torch(module: str) -> None:
    """A stub of Triton holds no second copy of torch."""
    script = (
        "import sys, types\n"
        "for name in ('c_python_backend_utils', 'triton_python_backend_utils'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        f"import {module}\n"
        "assert sys.modules.get('torch') is None, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_decides_does_so_without_torch(tmp_path: Path) -> None:
    """Scheduler, registry, device pool and blocks, from a request to its answer; steps are small."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / name / file).touch()
    program = Path(__file__).with_name("decide_without_torch.py")
    blocked = (
        "import runpy, sys\n"
        "sys.modules['torch'] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", blocked, str(program), str(tmp_path)]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert found["ends"] == {"0": "", "1": "a", "2": "b", "3": "a"}
    # One adapter fits at a time.
    (_, first), *others = found["told"]
    for told, (verb, name) in enumerate(others):
        assert verb == ("place" if told % 2 else "free")
        assert (name == first) == (verb == "free")
        first = name
    assert found["steps"] > 6
    assert found["bytes"] < 4096
