"""`manylora validate`: whether adapters bind to a base model, and how; no server."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.adapters.lora_config import MAX_CONFIG_BYTES
from manylora.commands.table import render, size
from manylora.config import EngineConfig, resolve_directory
from manylora.errors import InvalidArgumentError, ManyloraError

if TYPE_CHECKING:
    import torch

    from manylora.adapters.peft_format import BindingReport
    from manylora.model.outline import ModelOutline

EXAMPLES = """\
examples:
  manylora validate adapters/pirate --base-model models/base
  manylora validate adapters --base-model models/base --max-lora-rank 16
"""

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `manylora validate`."""
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="an adapter, or a directory of adapters")
    add(
        "--base-model",
        default="",
        metavar="DIR",
        help="the base model (default: the one that the adapter's config names, if it is a directory)",
    )
    add("--max-lora-rank", type=int, default=64, metavar="N", help="highest rank accepted (default: 64)")
    add("--json", action="store_true", help="one line of JSON for each adapter")


def main(arguments: argparse.Namespace) -> int:
    """Validate and print.

    Returns: the exit status: 1 when an adapter is refused.

    Raises:
        ManyloraError: a directory or the base model cannot be used.
    """
    from manylora.adapters.peft_format import read_adapter
    from manylora.model.outline import outline_model

    adapters = _find(arguments.directory)
    config = EngineConfig(
        base_model=arguments.base_model or _named_base(adapters[0]), max_lora_rank=arguments.max_lora_rank
    )
    print(f"reading the shapes of {config.base_model}", file=sys.stderr)
    model = outline_model(config)
    results: list[tuple[Path, BindingReport | ManyloraError]] = []
    for directory in adapters:
        try:
            report = read_adapter(
                directory, model.spec, max_lora_rank=config.max_lora_rank, dtype=model.dtype, pin=False
            )[1]
            results.append((directory, report))
        except ManyloraError as error:
            results.append((directory, error))
    if arguments.json:
        for directory, result in results:
            print(json.dumps(_fields(directory, result, model)))
    elif len(results) == 1:
        print(_describe(*results[0], model))
    else:
        print(_list(results, model.dtype))
    return 1 if any(isinstance(result, ManyloraError) for _, result in results) else 0


def _find(directory: Path) -> list[Path]:
    """The adapter itself, or every directory below."""
    root = resolve_directory(str(directory), "DIR")
    if (root / _CONFIG).exists() or (root / _WEIGHTS).exists():
        return [root]
    try:
        found = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise InvalidArgumentError(f"{directory}: cannot be listed: {error.strerror}") from error
    if not found:
        raise InvalidArgumentError(f"{directory}: no adapter: found neither {_CONFIG} nor directories in it")
    return found


def _named_base(adapter: Path) -> str:
    try:
        with (adapter / _CONFIG).open("rb") as file:
            named = json.loads(file.read(MAX_CONFIG_BYTES)).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        named = None
    if isinstance(named, str) and Path(named).is_dir():
        return named
    raise InvalidArgumentError("no base model: give --base-model DIR")


def _fields(directory: Path, result: BindingReport | ManyloraError, model: ModelOutline) -> dict[str, Any]:
    if isinstance(result, ManyloraError):
        return {"name": directory.name, "ok": False, "code": result.code, "message": result.message}
    kinds = {kind.name: pages for kind, pages in zip(model.spec.kinds, result.num_pages, strict=True)}
    fields = dataclasses.asdict(result)
    return {"name": directory.name, "ok": True, **fields, "num_pages": kinds, "notes": result.notes()}


def _describe(directory: Path, result: BindingReport | ManyloraError, model: ModelOutline) -> str:
    if isinstance(result, ManyloraError):
        reasons = "\n".join(f"  - {reason}" for reason in result.message.split("; "))
        return f"{directory.name}: refused, {result.code}\n{reasons}"
    rows = []
    for index, kind in enumerate(model.spec.kinds):
        modules = [m for m in result.modules if model.spec.linears[m.path].kind == index]
        if modules:
            pages = result.num_pages[index]
            num_bytes = pages * kind.page_elements * model.dtype.itemsize
            linears = f"{len(modules)} of {kind.num_layers * kind.num_slices}"
            rows.append((_short(kind.name), linears, _range(m.rank for m in modules), pages, size(num_bytes)))
    lines = [
        f"{directory.name}: binds to {model.directory.name}",
        f"  version    {result.version}",
        f"  trained on {result.base_model_name or '(its config does not say)'}",
        f"  scaling    {_range(m.scaling for m in result.modules)}",
        f"  in file    {', '.join(sorted({m.dtype for m in result.modules}))}",
        f"  takes      {size(result.num_bytes)} on host, and as much on the device",
        *(f"  note       {note}" for note in result.notes()),
        "",
        render(("site", "linears", "rank", "pages", "size"), rows, right=(2, 3, 4)),
    ]
    return "\n".join(lines)


def _list(results: list[tuple[Path, BindingReport | ManyloraError]], dtype: torch.dtype) -> str:
    rows, refusals = [], []
    for directory, result in results:
        name = directory.name if len(directory.name) <= 32 else directory.name[:29] + "..."
        if isinstance(result, ManyloraError):
            rows.append((name, result.code, "", "", ""))
            refusals.append(_refusal(directory.name, result))
        else:
            rank = _range(m.rank for m in result.modules)
            notes = f"{len(result.notes())} notes" if result.notes() else ""
            rows.append((name, "ok", rank, size(result.num_bytes), f"{result.version[:12]} {notes}".rstrip()))
    table = render(("adapter", "", "rank", "size", "version"), rows, right=(2, 3))
    return "\n".join([table, *refusals])


def _refusal(name: str, error: ManyloraError) -> str:
    return "\n".join([f"\n{name}:", *(f"  - {reason}" for reason in error.message.split("; "))])


def _range(values: Any) -> str:
    found = sorted(set(values))
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"


def _short(kind: str) -> str:
    """`self_attn.q_proj+self_attn.k_proj` as `q_proj+k_proj`."""
    return "+".join(part.rpartition(".")[2] for part in kind.split("+"))
