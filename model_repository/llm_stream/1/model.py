"""The Triton model `llm_stream`: see manylora.triton_model."""

from manylora.triton_model import LlmStreamModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
