"""The Triton model `llm`: see manylora.front_end.triton_model."""

from manylora.front_end.triton_model import LlmModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
