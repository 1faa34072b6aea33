"""Binds an adapter's tensors to the linears of a base model, one to one, or says why that cannot be.

What is checked: every linear that the config targets has an A and a B in the file, every tensor of the
file is the A or B of a targeted linear, shapes and ranks are what base model and config say, and dtypes are
floats. Nothing is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from manylora.adapters.reasons import Reasons
from manylora.adapters.safetensors_file import FLOAT_DTYPES, TensorInfo
from manylora.adapters.targets import Target, Targets
from manylora.model.spec import LinearSpec, ModelSpec

PREFIX = "base_model.model."

_LORA = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")

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
    (re.compile(r".*\.lora_(?![AB]\.).*"), "the file has tensors of a kind of LoRA that is not served"),
    (
        re.compile(r".*\.(modules_to_save|original_module)\..*"),
        "the file has fully trained modules, which are not served",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """One targeted linear with its two tensors."""

    linear: LinearSpec
    target: Target
    a: TensorInfo
    """[R, K]"""
    b: TensorInfo
    """[N, R]"""


@dataclass(slots=True)
class _Pair:
    a: TensorInfo | None = None
    b: TensorInfo | None = None


def bind(
    tensors: Mapping[str, TensorInfo],
    targets: Targets,
    spec: ModelSpec,
    *,
    max_lora_rank: int,
    reasons: Reasons,
) -> list[Bound]:
    """Pair the file's tensors and bind each pair to its linear.

    Args:
        tensors: the file's, by name.
        targets: what the config says of the base model.
        reasons: takes what does not fit.

    Returns:
        The targeted linears in the spec's order; complete only if `reasons` stays empty.
    """
    pairs = _pair(tensors, spec, reasons)
    for path in targets.unserved:
        reasons.unsupported("target_modules names modules on which no LoRA is served", path)
    bounds = []
    for path in pairs:
        if path in spec.linears and path not in targets.linears:
            reasons.invalid("the file has tensors for linears that the config does not target", path)
        elif path in spec.other_modules and path not in targets.unserved:
            reasons.unsupported("the file has LoRA for modules on which none is served", path)
        elif path not in spec.linears and path not in spec.other_modules:
            reasons.invalid("the file has LoRA for modules that the base model does not have", path)
    for path, target in targets.linears.items():
        bound = _bind_one(spec.linears[path], target, pairs.get(path, _Pair()), max_lora_rank, reasons)
        if bound is not None:
            bounds.append(bound)
    if not targets.linears and not targets.unserved:
        reasons.invalid("nothing to apply: the config targets no linear of the base model")
    return bounds


def _pair(tensors: Mapping[str, TensorInfo], spec: ModelSpec, reasons: Reasons) -> dict[str, _Pair]:
    pairs: dict[str, _Pair] = {}
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
        pair = pairs.setdefault(match["path"], _Pair())
        half = match["half"].lower()
        if getattr(pair, half) is not None:
            reasons.invalid(f"the file has two {match['half']} for one linear", match["path"])
        setattr(pair, half, info)
    if len(adapters) > 1:
        reasons.invalid(
            "the file has tensors of several adapters", ", ".join(sorted(str(a) for a in adapters))
        )
    return pairs


def _judge_foreign(name: str, spec: ModelSpec, reasons: Reasons) -> None:
    """Say what a tensor is that is neither A nor B of a linear."""
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
    linear: LinearSpec, target: Target, pair: _Pair, max_lora_rank: int, reasons: Reasons
) -> Bound | None:
    path = linear.path
    if target.rank > max_lora_rank:
        reasons.invalid(f"rank {target.rank} is over max_lora_rank={max_lora_rank}", path)
    if pair.a is None and pair.b is None:
        reasons.invalid("the config targets linears that have no tensors in the file", path)
        return None
    if pair.a is None or pair.b is None:
        missing = "lora_A" if pair.a is None else "lora_B"
        reasons.invalid(f"half a pair: the file has no {missing}", path)
        return None
    a, b = pair.a.shape, pair.b.shape
    if len(a) != 2 or len(b) != 2 or a[1] != linear.in_features or b[0] != linear.out_features:
        reasons.invalid(
            f"A {list(a)} and B {list(b)} do not fit the base model's linear "
            f"[{linear.out_features}, {linear.in_features}]",
            path,
        )
        return None
    if a[0] != target.rank or b[1] != target.rank:
        found = f"{a[0]}" if a[0] == b[1] else f"{a[0]} in A and {b[1]} in B"
        reasons.invalid(f"rank {found} in the file is unlike the config's {target.rank}", path)
        return None
    return Bound(linear=linear, target=target, a=pair.a, b=pair.b)
