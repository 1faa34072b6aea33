"""The Triton model `llm`: see manylora.triton_model."""

from manylora.triton_model import LlmModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
