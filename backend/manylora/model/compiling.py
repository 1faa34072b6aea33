"""Has torch compile a model's own code, which fuses the small operators between linears and attention.

Shape key: T tokens of a step, S rows whose logits are wanted, V vocabulary.

At decode, norms, rotary embedding and residual sums cost about as much time as the linears when they are
launched one by one. It is compiled twice at start, for one token and for any number from two on; sites and
attention stay as they are (`operators.py`). Nothing is compiled while serving: a step that the compiled code
does not fit runs the model's own code.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from transformers.modeling_outputs import CausalLMOutput

from manylora.model.attention import CacheProbe
from manylora.model.step_context import StepContext

log = logging.getLogger(__name__)

Backend: TypeAlias = str | Callable[..., Any]
"""As of `torch.compile`."""

_MANY = (61, 3)
"""T and S of the example for two tokens and more: not equal, or they would be taken to be always equal."""

_ONE = (1, 1)


def compile_forward(
    module: torch.nn.Module, context: StepContext, tolerance: float, backend: Backend = "inductor"
) -> bool:
    """Replace the model's forward by a compiled one, if it compiles and computes the same.

    Args:
        module: a model of transformers with our sites and attention.
        context: where these find the running step.
        tolerance: how far logits may be apart, as a share of the largest.
        backend: of `torch.compile`.

    Returns:
        Whether it was replaced. If not, a warning says why and the model stays as it was.
    """
    name = type(module).__name__
    try:
        compiled = CompiledForward(module, context, backend)
        difference = max(compiled.compile(*example) for example in (_ONE, _MANY))
    except Exception as error:  # a compiler may raise anything, and the model can serve without it
        log.warning("%s cannot be compiled (%s: %s); it runs as it is", name, type(error).__name__, error)
        return False
    if not difference <= tolerance:
        log.warning(
            "%s computes differently when compiled: logits differ by %.3g of the largest, allowed is %.3g; "
            "it runs as it is", name, difference, tolerance,
        )  # fmt: skip
        return False
    module.forward = compiled
    return True


class CompiledForward:
    """Replaces a model's forward; accepts only what the engine's steps pass."""

    def __init__(self, module: torch.nn.Module, context: StepContext, backend: Backend) -> None:
        self._own = module.forward
        self._device = next(module.parameters()).device
        self._context = context
        self._compiled = torch.compile(self._logits_function(), backend=backend)

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_to_keep: torch.Tensor | int,
        use_cache: bool = False,
    ) -> CausalLMOutput:
        """Compute logits [1, S, V] of the rows `logits_to_keep` [S] of a step of `input_ids` [1, T]; 0 keeps
        all."""
        if isinstance(logits_to_keep, int):
            assert logits_to_keep == 0, "the engine asks for rows, or for all"
            # An index of all rows, so that there is no third variant.
            logits_to_keep = torch.arange(input_ids.shape[1], device=self._device)
        # No compilation while others wait: what does not fit runs uncompiled.
        with torch.inference_mode(), torch.compiler.set_stance("eager_on_recompile"):
            logits = self._run(input_ids, position_ids, logits_to_keep)
        # A caller outside of inference mode may change the result in place.
        return CausalLMOutput(logits=logits if torch.is_inference_mode_enabled() else logits.clone())

    @torch.inference_mode()
    def compile(self, num_tokens: int, num_wanted: int) -> float:
        """Compile for steps like one of so many tokens and wanted rows.

        Returns:
            The largest difference of its logits from the model's own, as a share of the largest logit.
        """
        ids = torch.arange(num_tokens, device=self._device)
        tensors = (ids[None], ids.clone()[None], ids[-num_wanted:].clone())
        with self._context.during(CacheProbe()):
            own: torch.Tensor = self._own(
                input_ids=tensors[0],
                position_ids=tensors[1],
                use_cache=False,
                logits_to_keep=tensors[2],
            ).logits
        if num_tokens > 1:
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, tensor.dim() - 1)
        with torch.compiler.set_stance("default"), self._context.during(CacheProbe()):
            found = self._run(*tensors)
        scale = own.float().abs().max().clamp(min=1.0)
        return float((found.float() - own.float()).abs().max() / scale)

    def _run(self, input_ids: torch.Tensor, position_ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        # One row of many is asked for twice: torch specialises on a size of one.
        is_alone = input_ids.shape[1] > 1 and wanted.shape[0] == 1
        if is_alone:
            wanted = wanted.repeat(2)
        logits: torch.Tensor = self._compiled(*map(_of_inference, (input_ids, position_ids, wanted)))
        return logits[:, :1] if is_alone else logits

    def _logits_function(self) -> Callable[..., torch.Tensor]:
        own, number = self._own, self._context.number

        def logits(input_ids: torch.Tensor, position_ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            output = own(
                input_ids=input_ids,
                position_ids=position_ids,
                use_cache=False,
                logits_to_keep=wanted,
            )
            result: torch.Tensor = output.logits
            return result

        # torch keeps compiled code with a function's code object, a few variants each. All models would share
        # this one, and later engines of a process would run uncompiled.
        code = logits.__code__.replace(co_name=f"logits_{number}")
        return types.FunctionType(code, logits.__globals__, code.co_name, None, logits.__closure__)


def _of_inference(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as one of inference mode: compiled code is specialised on that."""
    return tensor if tensor.is_inference() else tensor.clone()
