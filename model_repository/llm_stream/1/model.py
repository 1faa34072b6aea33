"""The Triton model `llm_stream`: see manylora.front_end.triton_model."""

from manylora.front_end.triton_model import LlmStreamModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
