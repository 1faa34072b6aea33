"""`manylora serve`: from the command line to a server that runs, and back to nothing."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import fields

from manylora import paths
from manylora.answered import answered
from manylora.config import EngineConfig, parse_size, resolve_directory
from manylora.errors import InvalidArgumentError
from manylora.serve import limits, preflight, processes, repository
from manylora.serve.installation import environment, find_installation
from manylora.serve.ports import Ports, hold
from manylora.serve.restrictions import RESTRICTABLE, read_allowed, restriction_arguments
from manylora.serve.triton_server import TritonServer
from manylora.serve.workspace import Workspace, workspace
from manylora.supervise.stop_signals import StopSignals
from manylora.supervise.supervisor import Supervisor

PATHS = ("base_model", "adapter_root")
"""Settings that are directories."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `manylora serve`."""
    add = parser.add_argument
    add("--base-model", default="", metavar="DIR", help="base model in Hugging Face format")
    add(
        "--adapter-root",
        default="",
        metavar="DIR",
        help="holds one directory per adapter, as PEFT saves them",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the engine; see below")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: %(default)s)")
    for name, number in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        add(
            f"--{name}-port",
            type=_port,
            default=number,
            metavar="N",
            help="0: a free one (default: %(default)s)",
        )
    add(
        "--allow",
        action="append",
        default=[],
        metavar="NAME",
        help="open to all clients what is closed to them: "
        f"{', '.join(RESTRICTABLE)}; may be given several times",
    )
    add(
        "--shared-memory-bytes",
        default="0",
        metavar="N",
        help="most that requests to one model may take of /dev/shm; takes K, M, G (default: "
        "what 64 prompts of max_model_len take, at least 64M, at most a quarter of /dev/shm)",
    )
    add("--stop-with-parent", action="store_true", help="stop when the program that started this one ends")
    add("--run-dir", metavar="DIR", help="for sockets and the log (default: a temporary one)")
    add(
        "--ready-timeout",
        type=_seconds,
        default=600,
        metavar="S",
        help="to load the models (default: %(default)s)",
    )
    add(
        "--exit-timeout",
        type=_seconds,
        default=15,
        metavar="S",
        help="for what is in flight to finish; what is left then fails (default: %(default)s)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes.

    Returns: the exit status: 0 after a stop that was asked for, 128 + signal where it came before `ready`.

    Raises:
        ManyloraError: what was asked for cannot be served, or the server failed.
    """
    signals = StopSignals()
    if arguments.stop_with_parent:
        processes.end_with_parent()
    settings = read_settings(arguments)
    restrictions = restriction_arguments(read_allowed(arguments.allow))
    shared_memory_bytes = limits.region_bytes(
        parse_size("--shared-memory-bytes", arguments.shared_memory_bytes),
        max_model_len=int(settings.get("max_model_len", 0)),
        total_bytes=limits.shared_memory_bytes(),
    )
    installation = find_installation()
    limits.raise_descriptors()
    asked = Ports(
        host=arguments.host,
        http=arguments.http_port,
        grpc=arguments.grpc_port,
        metrics=arguments.metrics_port,
    )
    with hold(asked) as ports, workspace(arguments.run_dir) as space:
        preflight.check(settings, space.path)
        env = environment(installation, space.libraries)
        backends = space.plain_backends(installation.backends)
        repository.render(space.models, settings, space.path)
        # From here on no descendant of this process can outlive it.
        processes.adopt_orphans()
        supervisor = Supervisor(
            lambda: TritonServer(
                installation,
                env=env,
                backends=backends,
                repository=space.models,
                ports=ports,
                log_path=space.log,
                exit_timeout_s=arguments.exit_timeout,
                restrictions=restrictions,
                shared_memory_bytes=shared_memory_bytes,
            ),
            models=repository.MODELS,
            address=ports.address(ports.http),
            metrics_address=ports.address(ports.metrics),
            run_dir=space.path,
            ready_timeout_s=arguments.ready_timeout,
            on_ready=lambda: announce(ports, space),
            say=_say,
            signals=signals,
        )
        _say(f"starting {installation.binary}; its log is {space.log}")
        supervisor.run()
    _say("stopped")
    return 0 if supervisor.was_ready else 128 + signals.first


def read_settings(arguments: argparse.Namespace) -> dict[str, str]:
    """The engine's configuration as text, checked as the engine will check it, without what has its default.

    Raises:
        ManyloraError: an unknown key, a value that is not allowed, or a directory that does not exist.
    """
    given = {"base_model": arguments.base_model, "adapter_root": arguments.adapter_root}
    for text in arguments.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise InvalidArgumentError(f"--set {text!r}: expected KEY=VALUE")
        if given.get(key):
            raise InvalidArgumentError(f"--set {text!r}: {key} is given already, as {given[key]!r}")
        given[key] = value
    known = {field.name for field in fields(EngineConfig)}
    settings = {key: value for key, value in given.items() if value or key not in known}
    # Named here too, since the configuration itself only knows that it is missing.
    if "base_model" not in settings:
        raise InvalidArgumentError("no base model: give --base-model DIR")
    settings.update({key: paths.to_text(settings[key]) for key in PATHS if key in settings})
    EngineConfig.from_strings(settings)
    for key in PATHS:
        if key in settings:
            # The slash keeps blanks at the end of a name, which no reader of a setting keeps.
            settings[key] = _resolved(settings[key], key) + "/"
    return settings


def _resolved(path: str, key: str) -> str:
    found = answered(f"{key}={path!r}", lambda: resolve_directory(path, key), preflight.ANSWER_S)
    return paths.checked_text(found, key)


def announce(ports: Ports, space: Workspace) -> None:
    """Say that the server is ready, and where."""
    facts: dict[str, str | int] = {
        "http": ports.address(ports.http),
        "grpc": ports.address(ports.grpc),
        "metrics": ports.address(ports.metrics),
        "run_dir": paths.to_text(space.path),
        "pid": os.getpid(),
    }
    try:
        space.write_record(facts)
    except OSError as error:
        # It serves all the same; only `manylora status` and health checks do not find it.
        _say(f"{space.path}: the record for `manylora status` cannot be written: {error.strerror}")
    # For programs this one line, for people the rest.
    print("ready", json.dumps(facts))
    print(f"  HTTP     http://{facts['http']}/v2/models/llm/generate")
    print(f"  gRPC     {facts['grpc']}")
    print(f"  metrics  http://{facts['metrics']}/metrics")
    print(f"  status   manylora status --run-dir {shlex.quote(str(space.path))}", flush=True)


def _say(text: str) -> None:
    print(f"manylora serve: {text}", file=sys.stderr, flush=True)


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is no port: 0 to 65535")
    return number


def _seconds(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} s: must be at least 1")
    return number
