"""Loads a Hugging Face base model for packed, blocked, many-adapter steps.

Shape key: T tokens, V key/value heads, D head size.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from manylora_kernels import AttentionShape
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from manylora.config import EngineConfig, resolve_directory
from manylora.errors import InvalidArgumentError, UnsupportedError
from manylora.model.attention import CacheProbe, use_our_attention
from manylora.model.compiling import compile_forward
from manylora.model.end_tokens import resolve_end_tokens
from manylora.model.gated import find_gated_units, put_gates_first
from manylora.model.lora_layers import Site, find_sites, replace_linears
from manylora.model.model_len import resolve_max_model_len
from manylora.model.own_weights import copy_mapped_weights
from manylora.model.spec import ModelSpec
from manylora.model.step_context import StepContext
from manylora.threads import num_step_threads

log = logging.getLogger(__name__)

PROBE_LENGTHS = (19, 1, 8)
"""Tokens of the sequences that are compared at start."""
_PROBE_TOKENS = 7


@dataclass(slots=True, kw_only=True)
class LoadedModel:
    """A base model whose linears and attention are ours."""

    module: torch.nn.Module
    directory: Path
    spec: ModelSpec
    sites: list[Site]
    context: StepContext
    """Where sites and attention find the running step."""
    layers: dict[int, tuple[int, int, int]]
    """layer_idx -> (V, key D, value D)."""
    attention: frozenset[AttentionShape]
    """What decides which attention kernels the layers use."""
    dtype: torch.dtype
    weight_bytes: int
    device: torch.device
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    """Filled by `load_model`."""
    probe_ids: list[list[int]]
    """Token ids of the comparison at start."""
    probe_logits: list[torch.Tensor]
    """The logits of transformers' own attention and linears for them, [T, vocabulary] float32 each."""

    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token over all layers."""
        size = torch.empty(0, dtype=self.dtype).element_size()
        return size * sum(v * (dk + dv) for v, dk, dv in self.layers.values())


def load_model(config: EngineConfig) -> LoadedModel:
    """Read, check and convert the base model.

    Raises:
        InvalidArgumentError: no such directory, or nothing that transformers can load in it.
        UnsupportedError: an architecture or rope scaling that cannot be served packed.
    """
    directory = resolve_directory(config.base_model, "base_model")
    device = resolve_device(config.device)
    if device.type == "cpu":
        torch.set_num_threads(num_step_threads(config.num_threads))
    hf_config = read_config(directory)
    max_model_len = resolve_max_model_len(config, hf_config)
    module = _read_model(directory, config, device)
    model = convert_model(module, directory, hf_config, max_model_len, device)
    model.eos_token_ids = resolve_end_tokens(config.eos_token_ids, directory, hf_config, model.vocab_size)
    if device.type == "cuda":
        # Fusing linears leaves holes that no later allocation fits into.
        torch.cuda.empty_cache()
    if compiles(config, device):
        compile_forward(module, model.context, logits_tolerance(model.dtype))
    return model


def convert_model(
    module: torch.nn.Module, directory: Path, hf_config: Any, max_model_len: int, device: torch.device
) -> LoadedModel:
    """Replace the linears and the attention of a model of transformers by ours.

    Args:
        module: on `device`; it is changed in place.
        directory: its own, for messages. Nothing is read from it.

    Raises:
        UnsupportedError: the model does not call its attention, or has no linears in layers.
    """
    probe_ids = _probe_ids(_text_config(hf_config).vocab_size)
    weight_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
    with torch.inference_mode():
        probe_logits = [_whole_logits(module, ids) for ids in probe_ids]
        context = StepContext()
        use_our_attention(module, context)
        probe, spec = observe(module, context)
        gated_units = find_gated_units(module, spec)
        spec = put_gates_first(spec, gated_units)
        sites = replace_linears(module, spec, context, gated_units)
    return LoadedModel(
        module=module,
        directory=directory,
        spec=spec,
        sites=sites,
        context=context,
        layers=probe.layers,
        attention=frozenset(probe.shapes),
        dtype=next(module.parameters()).dtype,
        weight_bytes=weight_bytes,
        device=device,
        vocab_size=_text_config(hf_config).vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=[],
        probe_ids=probe_ids,
        probe_logits=probe_logits,
    )


def compiles(config: EngineConfig, device: torch.device) -> bool:
    """`compile_model` with its default resolved."""
    return device.type == "cuda" if config.compile_model == "auto" else config.compile_model == "true"


def logits_tolerance(dtype: torch.dtype) -> float:
    """How far logits of the same rows may be apart, as a share of the largest."""
    return 1e-3 if dtype == torch.float32 else 0.1


def resolve_device(name: str) -> torch.device:
    """`auto` is cuda where there is one.

    Raises:
        InvalidArgumentError: CUDA was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidArgumentError(f"device={name!r}: no CUDA device is visible; use cpu or auto")
    return torch.device(name)


def use_device(config: EngineConfig) -> None:
    """Make the configured CUDA device this thread's current one, which Triton and graphs use."""
    device = resolve_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device if device.index is not None else torch.device("cuda", 0))


def read_config(directory: Path) -> Any:
    """The model's own configuration.

    Raises:
        InvalidArgumentError: there is none that transformers can read.
    """
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"base_model={str(directory)!r}: no usable config.json: {error}"
        ) from error


def _read_model(directory: Path, config: EngineConfig, device: torch.device) -> torch.nn.Module:
    dtype: Any = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        module: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InvalidArgumentError(f"base_model={str(directory)!r}: cannot be loaded: {error}") from error
    require_attention_seam(module)
    module = module.eval().requires_grad_(False)
    if device.type == "cpu":
        copy_mapped_weights(module)
        return module
    # Tensor by tensor from the mapped files to the device, without a copy of all of them in host memory.
    return module.to(device)


def require_attention_seam(module: torch.nn.Module) -> None:
    """
    Raises:
        UnsupportedError: the architecture takes no attention function; transformers would only warn.
    """
    if not getattr(module, "_supports_attention_backend", False):
        raise UnsupportedError(
            f"{type(module).__name__} takes no attention function from outside (transformers "
            f"{transformers.__version__}); served are decoder-only models that do"
        )


def _text_config(hf_config: Any) -> Any:
    return hf_config.get_text_config(decoder=True)


def _probe_ids(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in PROBE_LENGTHS]


def _whole_logits(module: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    device = next(module.parameters()).device
    logits: torch.Tensor = module(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
    return logits[0].float()


def observe(module: torch.nn.Module, context: StepContext) -> tuple[CacheProbe, ModelSpec]:
    """Run a probe: what each layer's attention is, and the sites of linears.

    Raises:
        UnsupportedError: the model does not call its attention, or has no linears in layers.
    """
    probe = CacheProbe()
    device = next(module.parameters()).device
    ids = torch.arange(_PROBE_TOKENS, device=device)[None]

    def run() -> None:
        with context.during(probe):
            module(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=1)

    spec = find_sites(module, run, _PROBE_TOKENS)
    if not probe.layers:
        raise UnsupportedError(
            f"{type(module).__name__} never called the attention function that it was given"
        )
    return probe, spec
