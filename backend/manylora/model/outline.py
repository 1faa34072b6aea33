"""What a base model is made of, without its weights: for `manylora plan` and `validate`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from manylora.config import EngineConfig, resolve_directory
from manylora.errors import InvalidArgumentError
from manylora.model import loading
from manylora.model.attention import use_our_attention
from manylora.model.model_len import resolve_max_model_len
from manylora.model.spec import ModelSpec
from manylora.model.step_context import StepContext

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutline:
    """Shapes and sizes of a base model as the engine would serve it."""

    architecture: str
    directory: Path
    spec: ModelSpec
    dtype: torch.dtype
    max_model_len: int
    vocab_size: int
    weight_bytes: int
    cache_bytes_per_token: int
    """Keys and values of one token over all layers."""


def outline_model(config: EngineConfig) -> ModelOutline:
    """Build the model from fake tensors, which have shapes and no content.

    An architecture whose code looks at numbers cannot run on them; its weights are then loaded.

    Raises:
        InvalidArgumentError: no such directory, or nothing that transformers can make a model of.
        UnsupportedError: an architecture that cannot be served.
    """
    directory = resolve_directory(config.base_model, "base_model")
    hf_config = loading.read_config(directory)
    max_model_len = resolve_max_model_len(config, hf_config)
    dtype = _dtype(config, hf_config)
    fake = FakeTensorMode()
    try:
        with fake:
            module = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, RuntimeError) as error:
        raise InvalidArgumentError(
            f"base_model={str(directory)!r}: no model can be made of its config.json: {error}"
        ) from error
    loading.require_attention_seam(module)
    module = module.eval().requires_grad_(False)
    weight_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
    try:
        with fake, torch.inference_mode():
            context = StepContext()
            use_our_attention(module, context)
            probe, spec = loading.observe(module, context)
            layers = probe.layers
    except RuntimeError as error:
        name = type(module).__name__
        log.warning("%s cannot be looked at without its weights (%s); loading them", name, error)
        loaded = loading.load_model(config)
        layers, spec, dtype = loaded.layers, loaded.spec, loaded.dtype
    return ModelOutline(
        architecture=type(module).__name__,
        directory=directory,
        spec=spec,
        dtype=dtype,
        max_model_len=max_model_len,
        vocab_size=hf_config.get_text_config(decoder=True).vocab_size,
        weight_bytes=weight_bytes,
        cache_bytes_per_token=dtype.itemsize * sum(v * (dk + dv) for v, dk, dv in layers.values()),
    )


def _dtype(config: EngineConfig, hf_config: Any) -> torch.dtype:
    """What `dtype=auto` comes to: the checkpoint's as its config says, else transformers' own default."""
    name = config.dtype if config.dtype != "auto" else getattr(hf_config, "dtype", None)
    found = getattr(torch, name) if isinstance(name, str) else name
    return found if isinstance(found, torch.dtype) else torch.get_default_dtype()
