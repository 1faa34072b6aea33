"""Opens the targets that were asked for: clients, a server where none is named, and an engine and PEFT's
model, each in a process of its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from manylora import EngineConfig, run_dir
from manylora.ipc import query_status
from manylora.serve.background import running_server
from manylora_client.address import read_address

from bench.loadtest.adapters import AdapterSet
from bench.loadtest.child_target import ChildTarget
from bench.loadtest.engine_target import EngineTarget
from bench.loadtest.peft_target import PeftTarget
from bench.loadtest.server_target import ServerTarget
from bench.loadtest.target import Reference, Target


class Opener:
    """Opens targets on one base model and one set of adapters, all with the same settings."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        base_model: Path,
        adapters: AdapterSet,
        settings: Mapping[str, str],
        *,
        urls: Sequence[str],
        peft_batch: int,
    ) -> None:
        """Take notes; nothing is opened yet.

        Args:
            stack: closes what is opened.
            settings: of the engine, as text; they win over the benchmark's own.
            urls: of a server that runs; none: one is started on the first need.
        """
        self._stack = stack
        self._base_model = base_model
        self._adapters = adapters
        own = {
            "max_loras": str(max(1, len(adapters.names))),
            "max_lora_rank": str(max([16, *adapters.ranks])),
            # A second round's prompts are the first one's: what is reused is not measured.
            "enable_prefix_caching": "false",
        }
        self._settings = own | dict(settings)
        paths = {"base_model": str(base_model), "adapter_root": str(adapters.root) if adapters.names else ""}
        self.config = EngineConfig.from_strings(self._settings | paths)
        self._urls = {read_address(url, None).protocol: url for url in urls}
        self._read_counters: Callable[[], dict[str, int]] = dict
        self._peft_batch = peft_batch

    def open(self, name: str) -> Target:
        """Open one target, by its name on the command line."""
        if name == "engine":
            return self._stack.enter_context(self.engine())
        if name == "peft":
            return self._stack.enter_context(self.peft())
        if not self._urls:
            self._start_server()
        protocol, _, stream = name.partition("-")
        url = self._urls["http" if protocol == "http" else "grpc"]
        return self._stack.enter_context(
            ServerTarget(name, url, is_streamed=bool(stream), read_counters=self._read_counters)
        )

    def engine(self) -> ChildTarget:
        return ChildTarget("engine", functools.partial(EngineTarget, self.config))

    def peft(self) -> ChildTarget:
        make = functools.partial(
            PeftTarget,
            self._base_model,
            self._adapters.root,
            self._adapters.names,
            max_batch=self._peft_batch,
            dtype=self.config.dtype,
            num_threads=self.config.num_threads,
        )
        return ChildTarget("peft", make)

    def _start_server(self) -> None:
        arguments = [f"--set={key}={value}" for key, value in self._settings.items()]
        server = self._stack.enter_context(
            running_server(base_model=self._base_model, adapter_root=self._adapters.root, arguments=arguments)
        )
        self._urls = {"http": f"http://{server.http}", "grpc": f"grpc://{server.grpc}"}
        socket = run_dir.socket_path(server.run_dir, "llm")
        self._read_counters = lambda: query_status(socket, timeout_s=60).counters


@contextlib.contextmanager
def reference_for(targets: Sequence[Target], opener: Opener) -> Iterator[Reference]:
    """The target that judges the others' tokens: PEFT, else the engine, else an engine of its own."""
    by_name = {target.name: target for target in targets}
    judge = by_name.get("peft") or by_name.get("engine")
    if isinstance(judge, ChildTarget):
        yield judge
        return
    with opener.engine() as engine:
        yield engine
