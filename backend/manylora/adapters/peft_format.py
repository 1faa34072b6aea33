"""Reads an adapter in PEFT's format (adapter_config.json, adapter_model.safetensors), whole or not at all.

Shape key: P pages, R rank, W inputs or outputs of a linear.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from manylora.adapters.adapter_files import CONFIG_NAME, WEIGHTS_NAME, OpenFiles, open_files
from manylora.adapters.binding import Bound, bind
from manylora.adapters.lora_config import MAX_CONFIG_BYTES, LoraConfig, parse_config
from manylora.adapters.reasons import Reasons
from manylora.adapters.safetensors_file import (
    PREFIX_BYTES,
    TensorInfo,
    header_length,
    parse_header,
    tensor_of,
)
from manylora.adapters.targets import Targets, find_targets
from manylora.adapters.weights import AdapterWeights, KindWeights, allocate, fill_rows
from manylora.errors import InvalidArgumentError, ManyloraError, UnavailableError
from manylora.model.spec import ModelSpec, SiteKind

_MAX_SCALING = torch.finfo(torch.float32).max
"""A step's scalings are float32."""
MAX_READS = 3
"""Of files that change while they are read, before that is an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleBinding:
    """One linear of the base model and what the adapter does to it."""

    path: str
    rank: int
    scaling: float
    dtype: str
    """Of the tensors in the file."""
    is_zero: bool
    """A or B is all zeros: the adapter changes nothing here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BindingReport:
    """What was bound to what. Everything in the file is in `modules`, or the adapter was refused."""

    version: str
    base_model_name: str
    """As the adapter's config has it."""
    modules: tuple[ModuleBinding, ...]
    num_pages: tuple[int, ...]
    """Of rank rows, by kind of site."""
    num_bytes: int
    unmatched: tuple[str, ...]
    """Names in the config that match nothing in this base model. Without effect, in PEFT as here."""

    def notes(self) -> list[str]:
        """What whoever trained the adapter may not have meant."""
        notes = []
        if self.unmatched:
            notes.append(f"{', '.join(self.unmatched)} in its config match nothing in this base model")
        zero = sum(module.is_zero for module in self.modules)
        if zero:
            notes.append(f"changes nothing in {zero} of its {len(self.modules)} modules: A or B is all zeros")
        return notes


def read_adapter(
    directory: Path,
    spec: ModelSpec,
    *,
    max_lora_rank: int,
    dtype: torch.dtype,
    pin: bool,
    root: Path | None = None,
) -> tuple[AdapterWeights, BindingReport]:
    """Read, validate and lay out one adapter. Each byte is read once; the version is of these bytes.

    The weights' header is checked against config and base model before the weights are read, so an adapter
    that does not fit costs neither their time nor their memory.

    Args:
        directory: holds the adapter's two files.
        dtype: the device pool's.
        pin: page-lock the result, for copies to a CUDA device.
        root: the files, links followed, must lie inside. None: they may lie anywhere.

    Raises:
        NotFoundError: a file is missing.
        UnsupportedError: the adapter is of a kind that is not served.
        InvalidArgumentError: the adapter is broken or does not fit the base model.
        UnavailableError: the files cannot be read, or changed each time that they were.
    """
    for num_left in reversed(range(MAX_READS)):
        try:
            read = _read(directory, spec, max_lora_rank, root)
            break
        except UnavailableError:
            if not num_left:
                raise
    weights, modules = _lay_out(read.bounds, read.data, spec, read.version, dtype, pin)
    return weights, _report(read.config, read.targets, weights, modules)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """An adapter's bytes, and what its config and header say of them."""

    config: LoraConfig
    targets: Targets
    bounds: Sequence[Bound]
    data: bytearray
    version: str


def _read(directory: Path, spec: ModelSpec, max_lora_rank: int, root: Path | None) -> _Read:
    with open_files(directory, root) as files:
        try:
            read = _read_files(files, spec, max_lora_rank)
        except ManyloraError:
            # What is found wrong with files of which one is old and one new says nothing.
            files.refuse_changed()
            raise
        files.refuse_changed()
        return read


def _read_files(files: OpenFiles, spec: ModelSpec, max_lora_rank: int) -> _Read:
    digest = hashlib.sha256()
    reasons = Reasons()
    config = parse_config(_read_config(files.config, digest), reasons)
    if config is None:
        reasons.raise_if_any()
        raise AssertionError("a config that cannot be used has no reason")
    try:
        targets = find_targets(config, spec)
        tensors, data_bytes = _read_header(files.weights, digest)
    except InvalidArgumentError as error:
        reasons.invalid(error.message)
        raise reasons.error() from error
    bounds = bind(tensors, targets, spec, max_lora_rank=max_lora_rank, reasons=reasons)
    reasons.raise_if_any()
    data = bytearray(data_bytes)
    _read_into(files.weights, data, WEIGHTS_NAME)
    digest.update(data)
    version = digest.hexdigest()[:32]
    return _Read(config=config, targets=targets, bounds=bounds, data=data, version=version)


def _read_config(file: io.FileIO, digest: hashlib._Hash) -> bytes:
    num_bytes = os.fstat(file.fileno()).st_size
    if num_bytes > MAX_CONFIG_BYTES:
        raise InvalidArgumentError(
            f"{CONFIG_NAME} has {num_bytes} bytes; at most {MAX_CONFIG_BYTES} are read"
        )
    data = bytearray(num_bytes)
    _read_into(file, data, CONFIG_NAME)
    digest.update(data)
    return bytes(data)


def _read_header(file: io.FileIO, digest: hashlib._Hash) -> tuple[dict[str, TensorInfo], int]:
    """The tensors by name, and the bytes of data that follow."""
    num_bytes = os.fstat(file.fileno()).st_size
    prefix = bytearray(min(PREFIX_BYTES, num_bytes))
    _read_into(file, prefix, WEIGHTS_NAME)
    header = bytearray(header_length(bytes(prefix), num_bytes))
    _read_into(file, header, WEIGHTS_NAME)
    digest.update(prefix)
    digest.update(header)
    data_bytes = num_bytes - len(prefix) - len(header)
    return parse_header(bytes(header), data_bytes), data_bytes


def _read_into(file: io.FileIO, buffer: bytearray, name: str) -> None:
    view = memoryview(buffer)
    while view:
        try:
            count = file.readinto(view)
        except OSError as error:
            raise UnavailableError(f"{name} cannot be read: {error.strerror}") from error
        if not count:
            raise UnavailableError(f"{name} became shorter while it was read")
        view = view[count:]


def _lay_out(
    bounds: Sequence[Bound], data: bytearray, spec: ModelSpec, version: str, dtype: torch.dtype, pin: bool
) -> tuple[AdapterWeights, list[ModuleBinding]]:
    """Convert the tensors into the pool's layout and dtype."""
    # A module with scaling 0 says nothing of the others' ratio to it.
    scale = next((bound.target.scaling for bound in bounds if bound.target.scaling), 0.0)
    reasons = Reasons()
    if not scale:
        reasons.invalid("nothing to apply: lora_alpha is 0 for every linear")
    for bound in bounds:
        if abs(bound.target.scaling) > _MAX_SCALING:
            reasons.invalid("the scaling is beyond what float32 holds", bound.linear.path)
    ranks = [
        max((bound.target.rank for bound in bounds if bound.linear.kind == kind), default=0)
        for kind in range(len(spec.kinds))
    ]
    buffer, kinds = allocate(spec.kinds, ranks, dtype, pin=pin)
    modules: dict[str, ModuleBinding] = {}
    for bound in sorted(bounds, key=lambda bound: bound.linear.kind):
        into = kinds[bound.linear.kind]
        assert into is not None, f"no memory for {bound.linear.path}"
        kind = spec.kinds[bound.linear.kind]
        modules[bound.linear.path] = _fill(into, kind, bound, data, scale, reasons)
    reasons.raise_if_any()
    weights = AdapterWeights(version=version, scale=scale, max_rank=max(ranks), buffer=buffer, kinds=kinds)
    return weights, [modules[bound.linear.path] for bound in bounds]


def _fill(
    into: KindWeights, kind: SiteKind, bound: Bound, data: bytearray, scale: float, reasons: Reasons
) -> ModuleBinding:
    """Write one linear's tensors into its rows."""
    tensors = {name: tensor_of(info, data) for name, info in bound.tensors.items()}
    are_finite = all(_check_finite(tensors[name], info, reasons) for name, info in bound.tensors.items())
    ratio = bound.target.scaling / scale if scale else 0.0
    if ratio != 1.0:
        b_NR = tensors["b"]
        tensors["b"] = b_NR.to(torch.float64 if b_NR.dtype == torch.float64 else torch.float32) * ratio
        if bound.target.scaling and bool(b_NR.any()) and not bool(tensors["b"].any()):
            # Refused, since the linear would silently be left out.
            reasons.invalid("the scaling is too far below the adapter's other ones", bound.linear.path)
    is_zero = False
    for part in (part for part in kind.parts if part.name in tensors):
        stored = into.rows_of(part, kind, bound.linear)
        fill_rows(stored, part, tensors[part.name])
        if are_finite:
            _check_range(stored, bound.tensors[part.name], reasons)
        is_zero = is_zero or not bool(stored.any())
    return ModuleBinding(
        path=bound.linear.path,
        rank=bound.target.rank,
        scaling=bound.target.scaling,
        dtype=bound.tensors["b"].dtype,
        is_zero=is_zero,
    )


def _check_finite(tensor: torch.Tensor, info: TensorInfo, reasons: Reasons) -> bool:
    if bool(torch.isfinite(tensor).all()):
        return True
    reasons.invalid("tensors hold NaN or infinity", info.name)
    return False


def _check_range(stored: torch.Tensor, info: TensorInfo, reasons: Reasons) -> None:
    if not bool(torch.isfinite(stored).all()):
        name = str(stored.dtype).removeprefix("torch.")
        reasons.invalid(f"tensors hold values too large for lora_dtype={name}", info.name)


def _report(
    config: LoraConfig, targets: Targets, weights: AdapterWeights, modules: Sequence[ModuleBinding]
) -> BindingReport:
    return BindingReport(
        version=weights.version,
        base_model_name=config.base_model_name,
        modules=tuple(modules),
        num_pages=weights.num_pages[: len(weights.kinds)],
        num_bytes=weights.num_bytes,
        unmatched=targets.unmatched,
    )
