"""The model repository that tritonserver is started on: the two front ends with this server's settings."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import manylora
from manylora import paths
from manylora.errors import NotFoundError

ENGINE_MODEL = "llm"
"""Starts the engine, and so holds its settings."""
STREAMING_MODEL = "llm_stream"
MODELS = (ENGINE_MODEL, STREAMING_MODEL)


def find_templates() -> Path:
    """The model repository of the checkout, or the one that was installed with the package.

    Raises:
        NotFoundError: it is in neither place.
    """
    places = (
        Path(manylora.__file__).resolve().parents[2] / "model_repository",
        Path(sysconfig.get_path("data")) / "share" / "manylora" / "model_repository",
    )
    for place in places:
        if all((place / model / "config.pbtxt").is_file() for model in MODELS):
            return place
    raise NotFoundError(f"the model repository is in neither of {' and '.join(map(str, places))}")


def render(target: Path, settings: Mapping[str, str], run_dir: Path) -> None:
    """Write both front ends into `target`.

    Args:
        settings: the engine's configuration as text. Empty values are left out, so that defaults apply.
        run_dir: where the front ends meet the engine.
    """
    engine = {key: value for key, value in settings.items() if value}
    templates = find_templates()
    for model in MODELS:
        shutil.copytree(templates / model, target / model, ignore=shutil.ignore_patterns("__pycache__"))
        config_path = target / model / "config.pbtxt"
        config = text_format.Parse(config_path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
        if model == ENGINE_MODEL:
            # What the template suggests for direct use is not what this server was asked for.
            config.parameters.clear()
            for key, value in engine.items():
                config.parameters[key].string_value = value
        config.parameters["run_dir"].string_value = paths.to_text(run_dir)
        config_path.write_text(text_format.MessageToString(config), encoding="utf-8")
