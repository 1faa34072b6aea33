"""Whether the servers of this user are well, for a container's health check. No model is asked.

python3 -m manylora.serve.healthcheck [RUN_DIR ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from manylora.errors import ManyloraError
from manylora.health import read_stages
from manylora.run_dir import health_path
from manylora.serve.probe import REPLY_TIMEOUT_S, Probe, is_ready
from manylora.serve.repository import MODELS
from manylora.serve.workspace import RECORD, find_running


def problems(run_dir: Path) -> list[str]:
    """What is wrong with the server of a run directory; empty where nothing is."""
    try:
        http = json.loads((run_dir / RECORD).read_text())["http"]
    except OSError as error:
        return [f"{run_dir}: no server: {error}"]
    return [text for model in MODELS if (text := _problem(run_dir, http, model))]


def _problem(run_dir: Path, http: str, model: str) -> str:
    # A front end whose process hangs is one that Triton goes on calling ready.
    probe = Probe(health_path(run_dir, model))
    try:
        if not probe.poll(REPLY_TIMEOUT_S) or probe.failure:
            raise ValueError(str(probe.failure or "no answer"))
        read_stages(probe.answer.decode(errors="replace"))
    except ValueError as error:
        return f"{model} does not say how it is: {error}"
    finally:
        probe.close()
    return "" if is_ready(http, model) else f"tritonserver does not call {model} ready"


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def main(words: Sequence[str]) -> int:
    """Returns: 0 where there is a server and each one is well, else 1."""
    try:
        run_dirs = [Path(word) for word in words] or find_running(_warn)
        found = [text for run_dir in run_dirs for text in problems(run_dir)]
    except ManyloraError as error:
        run_dirs, found = [], [error.message]
    for text in found:
        print(text, file=sys.stderr)
    return 0 if run_dirs and not found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
