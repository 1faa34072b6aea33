"""Binds an adapter's tensors to the linears of a base model, one to one, or says why that cannot be.

What is checked: every linear that the config targets has all parts in the file that PEFT has a name for, in
the table of parts (A and B); every tensor of the file is such a part of a targeted linear; shapes and ranks
are what base model and config say, and dtypes are floats. Nothing is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from manylora.adapters.reasons import Reasons
from manylora.adapters.safetensors_file import FLOAT_DTYPES, TensorInfo
from manylora.adapters.targets import Target, Targets
from manylora.model.parts import PARTS, Part
from manylora.model.spec import LinearSpec, ModelSpec

PREFIX = "base_model.model."

FILE_PARTS = {part.peft: part for part in PARTS if part.peft}
"""What a file has of a linear, by PEFT's name."""
_NAMES = "|".join(FILE_PARTS)
_LORA = re.compile(rf"base_model\.model\.(?P<path>.+)\.(?P<part>{_NAMES})(?:\.(?P<adapter>[^.]+))?\.weight")

_UNSERVED_TENSORS = (
    (
        re.compile(r".*\.lora_embedding_[AB](\..*)?"),
        "the file has tensors of embedding LoRA, which is not served",
    ),
    (re.compile(r".*\.lora_magnitude_vector(\..*)?"), "the file has tensors of DoRA, which is not served"),
    (re.compile(r".*\.lora_B(\.[^.]+)?\.bias"), "the file has biases of LoRA, which are not served"),
    (
        re.compile(r".*\.(token_adapter\..*|trainable_tokens_.*)"),
        "the file has trained tokens, which are not served",
    ),
    (
        re.compile(rf".*\.(?!(?:{_NAMES})\.)lora_.*"),
        "the file has tensors of a kind of LoRA that is not served",
    ),
    (
        re.compile(r".*\.(modules_to_save|original_module)\..*"),
        "the file has fully trained modules, which are not served",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """One targeted linear with its tensors."""

    linear: LinearSpec
    target: Target
    tensors: Mapping[str, TensorInfo]
    """By the part's name, each of its `file_shape`."""


_Found: TypeAlias = dict[str, TensorInfo]
"""The tensors of one linear, by PEFT's name."""


def bind(
    tensors: Mapping[str, TensorInfo],
    targets: Targets,
    spec: ModelSpec,
    *,
    max_lora_rank: int,
    reasons: Reasons,
) -> list[Bound]:
    """Group the file's tensors by linear and bind each group.

    Args:
        tensors: the file's, by name.
        targets: what the config says of the base model.
        reasons: takes what does not fit.

    Returns:
        The targeted linears in the spec's order; complete only if `reasons` stays empty.
    """
    found = _by_linear(tensors, spec, reasons)
    for path in targets.unserved:
        reasons.unsupported("target_modules names modules on which no LoRA is served", path)
    bounds = []
    for path in found:
        if path in spec.linears and path not in targets.linears:
            reasons.invalid("the file has tensors for linears that the config does not target", path)
        elif path in spec.other_modules and path not in targets.unserved:
            reasons.unsupported("the file has LoRA for modules on which none is served", path)
        elif path not in spec.linears and path not in spec.other_modules:
            reasons.invalid("the file has LoRA for modules that the base model does not have", path)
    for path, target in targets.linears.items():
        bound = _bind_one(spec.linears[path], target, found.get(path, {}), max_lora_rank, reasons)
        if bound is not None:
            bounds.append(bound)
    if not targets.linears and not targets.unserved:
        reasons.invalid("nothing to apply: the config targets no linear of the base model")
    return bounds


def _by_linear(tensors: Mapping[str, TensorInfo], spec: ModelSpec, reasons: Reasons) -> dict[str, _Found]:
    found: dict[str, _Found] = {}
    adapters: set[str | None] = set()
    for name, info in tensors.items():
        match = _LORA.fullmatch(name)
        if match is None:
            _judge_foreign(name, spec, reasons)
            continue
        adapters.add(match["adapter"])
        if info.dtype not in FLOAT_DTYPES:
            reasons.invalid(
                f"tensors have dtype {info.dtype}, expected one of {', '.join(FLOAT_DTYPES)}", name
            )
        mine = found.setdefault(match["path"], {})
        if match["part"] in mine:
            label = FILE_PARTS[match["part"]].label
            reasons.invalid(f"the file has two {label} for one linear", match["path"])
        mine[match["part"]] = info
    if len(adapters) > 1:
        reasons.invalid(
            "the file has tensors of several adapters", ", ".join(sorted(str(a) for a in adapters))
        )
    return found


def _judge_foreign(name: str, spec: ModelSpec, reasons: Reasons) -> None:
    """Say what a tensor is that is no part of a linear."""
    for pattern, reason in _UNSERVED_TENSORS:
        if pattern.fullmatch(name):
            reasons.unsupported(reason, name)
            return
    module = name.removeprefix(PREFIX).rpartition(".")[0].removesuffix(".base_layer")
    if name.startswith(PREFIX) and (module in spec.other_modules or module in spec.linears):
        reasons.unsupported("the file has weights of the base model, which are not served", name)
    else:
        reasons.invalid(
            f"tensors bind to no module (expected {PREFIX}<module>.lora_A.weight or lora_B)", name
        )


def _bind_one(
    linear: LinearSpec, target: Target, found: _Found, max_lora_rank: int, reasons: Reasons
) -> Bound | None:
    path = linear.path
    if target.rank > max_lora_rank:
        reasons.invalid(f"rank {target.rank} is over max_lora_rank={max_lora_rank}", path)
    if not found:
        reasons.invalid("the config targets linears that have no tensors in the file", path)
        return None
    missing = next((name for name in FILE_PARTS if name not in found), None)
    if missing is not None:
        reasons.invalid(f"half a pair: the file has no {missing}", path)
        return None
    parts = [(part, found[name].shape) for name, part in FILE_PARTS.items()]
    if any(not _fits(part, shape, linear) for part, shape in parts):
        shapes = " and ".join(f"{part.label} {list(shape)}" for part, shape in parts)
        reasons.invalid(
            f"{shapes} do not fit the base model's linear [{linear.out_features}, {linear.in_features}]", path
        )
        return None
    ranks = {part.label: part.rank_in(shape) for part, shape in parts}
    if set(ranks.values()) != {target.rank}:
        rank = str(ranks.popitem()[1]) if len(set(ranks.values())) == 1 else _listed(ranks)
        reasons.invalid(f"rank {rank} in the file is unlike the config's {target.rank}", path)
        return None
    return Bound(
        linear=linear, target=target, tensors={part.name: found[name] for name, part in FILE_PARTS.items()}
    )


def _fits(part: Part, shape: tuple[int, ...], linear: LinearSpec) -> bool:
    """Whether a tensor is of the base model's linear, whatever its rank."""
    return len(shape) == 2 and shape == part.file_shape(
        part.rank_in(shape), linear.in_features, linear.out_features
    )


def _listed(ranks: Mapping[str, int]) -> str:
    return " and ".join(f"{rank} in {label}" for label, rank in ranks.items())
