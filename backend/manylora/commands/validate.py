"""`manylora validate`: whether adapters bind to a base model, and how; no server."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora import settings_table
from manylora.adapters.adapter_root import AdapterRoot
from manylora.adapters.lora_config import MAX_CONFIG_BYTES
from manylora.config import EngineConfig, resolve_directory
from manylora.errors import InvalidArgumentError, ManyloraError
from manylora.serve.command import read_settings
from manylora.table import cut, render, size

if TYPE_CHECKING:
    import torch

    from manylora.adapters.peft_format import BindingReport
    from manylora.model.outline import ModelOutline

EXAMPLES = """\
examples:
  manylora validate adapters/pirate --base-model models/base
  manylora validate adapters --base-model models/base --max-lora-rank 16
  manylora validate adapters --base-model models/base --set lora_dtype=float16
"""

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """What a server would do with one name in its adapter_root."""

    name: str
    outcome: BindingReport | ManyloraError


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
    add("--max-lora-rank", type=int, metavar="N", help="highest rank accepted (default: 64)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting, as of `manylora serve`: lora_dtype, dtype and max_lora_rank count",
    )
    add("--json", action="store_true", help="one line of JSON for each adapter")


def epilog() -> str:
    """Examples, and the settings that there are."""
    return f"{EXAMPLES}\n{settings_table.help_text()}"


def main(arguments: argparse.Namespace) -> int:
    """Validate and print.

    Returns: the exit status: 1 when an adapter is refused.

    Raises:
        ManyloraError: a directory, a setting or the base model cannot be used.
    """
    root, names = _find(arguments.directory)
    config = _configure(arguments, root, names[0])
    # After the options have been checked: torch needs seconds to load.
    from manylora.adapters.pool_tensors import pool_dtype
    from manylora.model.outline import outline_model

    print(f"reading the shapes of {config.base_model}", file=sys.stderr)
    model = outline_model(config)
    dtype = pool_dtype(config, model.dtype)
    adapter_root = AdapterRoot(config.adapter_root)
    results = [_Result(name=name, outcome=_judge(name, adapter_root, config, model, dtype)) for name in names]
    if arguments.json:
        for result in results:
            print(json.dumps(_fields(result, model)))
    elif len(results) == 1:
        print(_describe(results[0], model, dtype))
    else:
        print(_list(results))
    return 1 if any(isinstance(result.outcome, ManyloraError) for result in results) else 0


def _judge(
    name: str, root: AdapterRoot, config: EngineConfig, model: ModelOutline, dtype: torch.dtype
) -> BindingReport | ManyloraError:
    """What a server with this configuration does when a request names the adapter."""
    from manylora.adapters.peft_format import read_adapter

    try:
        return read_adapter(
            root.find(name),
            model.spec,
            max_lora_rank=config.max_lora_rank,
            dtype=dtype,
            pin=False,
            root=root.path,
        )[1]
    except ManyloraError as error:
        return error


def _find(given: Path) -> tuple[Path, list[str]]:
    """The adapter_root and the names in it: that of the adapter itself, or of every directory below."""
    resolved = resolve_directory(str(given), "DIR")
    if (resolved / _CONFIG).exists() or (resolved / _WEIGHTS).exists():
        # Its name is the one that was given, not that of what a link leads to.
        adapter = given.expanduser()
        if adapter.name in ("", ".."):
            adapter = resolved
        return adapter.parent.resolve(), [adapter.name]
    try:
        names = sorted(
            path.name for path in resolved.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
    except OSError as error:
        raise InvalidArgumentError(f"{given}: cannot be listed: {error.strerror}") from error
    if not names:
        raise InvalidArgumentError(f"{given}: no adapter: found neither {_CONFIG} nor directories in it")
    return resolved, names


def _configure(arguments: argparse.Namespace, root: Path, name: str) -> EngineConfig:
    """The configuration of a server for these adapters.

    Raises:
        InvalidArgumentError: a setting is unknown, given twice or has a value that is not allowed; no base
            model is named.
    """
    rank = arguments.max_lora_rank
    options = [] if rank is None else [f"max_lora_rank={rank}"]
    settings = argparse.Namespace(
        base_model=arguments.base_model or _named_base(root / name),
        adapter_root=str(root),
        set=[*options, *arguments.set],
    )
    return EngineConfig.from_strings(read_settings(settings))


def _named_base(adapter: Path) -> str:
    try:
        with (adapter / _CONFIG).open("rb") as file:
            named = json.loads(file.read(MAX_CONFIG_BYTES)).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        named = None
    if isinstance(named, str) and Path(named).is_dir():
        return named
    raise InvalidArgumentError("no base model: give --base-model DIR")


def _fields(result: _Result, model: ModelOutline) -> dict[str, Any]:
    report = result.outcome
    if isinstance(report, ManyloraError):
        return {"name": result.name, "ok": False, "code": report.code, "message": report.message}
    kinds = {kind.name: pages for kind, pages in zip(model.spec.kinds, report.num_pages, strict=True)}
    fields = dataclasses.asdict(report)
    return {"name": result.name, "ok": True, **fields, "num_pages": kinds, "notes": report.notes()}


def _describe(result: _Result, model: ModelOutline, dtype: torch.dtype) -> str:
    report = result.outcome
    if isinstance(report, ManyloraError):
        return "\n".join([f"{_shown(result.name)}: refused, {report.code}", *_reasons(report)])
    rows = []
    for index, kind in enumerate(model.spec.kinds):
        modules = [m for m in report.modules if model.spec.linears[m.path].kind == index]
        if modules:
            pages = report.num_pages[index]
            num_bytes = pages * kind.page_elements() * dtype.itemsize
            linears = f"{len(modules)} of {kind.num_layers * kind.num_slices}"
            rows.append((_short(kind.name), linears, _range(m.rank for m in modules), pages, size(num_bytes)))
    lines = [
        f"{result.name}: binds to {model.directory.name}",
        f"  version    {report.version}",
        f"  trained on {report.base_model_name or '(its config does not say)'}",
        f"  scaling    {_range(m.scaling for m in report.modules)}",
        f"  in file    {', '.join(sorted({m.dtype for m in report.modules}))}",
        f"  served as  {str(dtype).removeprefix('torch.')}",
        f"  takes      {size(report.num_bytes)} on host, and as much on the device",
        *(f"  note       {note}" for note in report.notes()),
        "",
        render(("site", "linears", "rank", "pages", "size"), rows, right=(2, 3, 4)),
    ]
    return "\n".join(lines)


def _list(results: Sequence[_Result]) -> str:
    rows, refusals = [], []
    for result in results:
        name, report = cut(_shown(result.name), 32), result.outcome
        if isinstance(report, ManyloraError):
            rows.append((name, report.code, "", "", ""))
            refusals += [f"\n{_shown(result.name)}:", *_reasons(report)]
        else:
            rank = _range(m.rank for m in report.modules)
            notes = f"{len(report.notes())} notes" if report.notes() else ""
            rows.append((name, "ok", rank, size(report.num_bytes), f"{report.version[:12]} {notes}".rstrip()))
    table = render(("adapter", "", "rank", "size", "version"), rows, right=(2, 3))
    return "\n".join([table, *refusals])


def _reasons(error: ManyloraError) -> list[str]:
    return [f"  - {reason}" for reason in error.message.split("; ")]


def _shown(name: str) -> str:
    """The name, or its quoted form if a terminal cannot show it as it is."""
    return name if name.isprintable() else repr(name)


def _range(values: Any) -> str:
    found = sorted(set(values))
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"


def _short(kind: str) -> str:
    """`self_attn.q_proj+self_attn.k_proj` as `q_proj+k_proj`."""
    return "+".join(part.rpartition(".")[2] for part in kind.split("+"))
