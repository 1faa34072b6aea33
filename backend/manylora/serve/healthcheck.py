"""A container's health check: whether this user's servers are healthy. It sends no request to a model.

python3 -m manylora.serve.healthcheck [RUN_DIR ...]

Without arguments: all servers of `manylora serve`, wherever their run directories are, else those of a bare
tritonserver.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from manylora import run_dir as run_directory
from manylora.errors import ManyloraError
from manylora.serve import records
from manylora.serve.repository import MODELS
from manylora.supervise.health import read_stages
from manylora.supervise.probe import REPLY_TIMEOUT_S, Probe, is_ready


def problems(run_dir: Path) -> list[str]:
    """What is wrong with the `manylora serve` of a run directory; empty where nothing is."""
    try:
        http = records.read(run_dir).get("http", "")
        if not http:
            raise ValueError(f"{records.RECORD} has no address")
    except (OSError, ValueError) as error:
        return [f"{run_dir}: no server: {error}"]
    return [
        text
        for model in MODELS
        # Triton keeps calling a front end ready whose process hangs.
        if (text := _silence(run_directory.health_path(run_dir, model), model) or _unready(http, model))
    ]


def problems_of_bare(run_dir: Path) -> list[str]:
    """What is wrong with the front ends of a bare tritonserver, of which only the sockets are known."""
    sockets = sorted(run_dir.glob("*.live"))
    if not sockets:
        return [f"{run_dir}: no front end is ready"]
    return [text for socket in sockets if (text := _silence(socket, socket.stem))]


def _silence(socket: Path, model: str) -> str:
    probe = Probe(socket)
    try:
        if not probe.poll(REPLY_TIMEOUT_S) or probe.failure:
            raise ValueError(str(probe.failure or "no answer"))
        read_stages(probe.answer.decode(errors="replace"))
    except ValueError as error:
        return f"{model} does not say how it is: {error}"
    finally:
        probe.close()
    return ""


def _unready(http: str, model: str) -> str:
    return "" if is_ready(http, model) else f"tritonserver does not call {model} ready"


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def main(words: Sequence[str]) -> int:
    """Returns: 0 if there is a server and each one is healthy, else 1."""
    try:
        served = [Path(word) for word in words] or records.find_running(_warn)
        bare = [] if served else run_directory.find_default()
        found = [text for run_dir in served for text in problems(run_dir)]
        found += [text for run_dir in bare for text in problems_of_bare(run_dir)]
        if not served and not bare:
            found = ["no server of this user runs"]
    except ManyloraError as error:
        found = [error.message]
    for text in found:
        print(text, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
