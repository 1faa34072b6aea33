"""What a server keeps closed, what it keeps to itself, and what one client can take of it."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.grpc as grpcclient
from grpc import StatusCode
from manylora.run_dir import health_path
from manylora.serve import limits, processes
from manylora.serve.background import RunningServer
from manylora.serve.ports import Ports, hold
from manylora.supervise import model_watch
from manylora.supervise.model_watch import ModelWatch
from manylora.supervise.probe import KeptConnection, KeptConnectionProbe, http_status, ready_path
from manylora_client import Client, InvalidArgument
from tritonclient.utils import InferenceServerException

from bench.campaigns.faults import doors
from bench.campaigns.faults.anatomy import DONE_S, engine_of, stub_of, tritonserver_of
from bench.campaigns.faults.load import NUM_STREAMS, NUM_WHOLE, RIGHT, Bed, Report
from bench.campaigns.harness import SYNTHETIC, status_of, wait_idle

ALL = NUM_STREAMS + NUM_WHOLE
LOW_DESCRIPTORS = 1024


def serve_command(base_model: Path, adapter_root: Path, ports: Ports) -> list[str]:
    command = [sys.executable, "-m", "manylora.cli", "serve", f"--base-model={base_model}"]
    command += [f"--adapter-root={adapter_root}", f"--http-port={ports.http}", f"--grpc-port={ports.grpc}"]
    return [*command, f"--metrics-port={ports.metrics}", "--stop-with-parent"]


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Ends the process after the block."""
    with process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=DONE_S)


@pytest.fixture(scope="module")
def rivals(
    small_model: Path, small_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningServer, list[str], list[int | None]]]:
    """Two servers started at the same moment on the same ports: the one that serves, all that both have
    printed when it does, and their exit statuses then. They start with a low soft limit of open files."""
    folder = tmp_path_factory.mktemp("rivals")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with hold(Ports(host="127.0.0.1", http=0, grpc=0, metrics=0)) as ports:
        pass
    command = serve_command(small_model, small_root, ports)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, LOW_DESCRIPTORS), hard))
    with contextlib.ExitStack() as stack:
        processes_, says = [], [folder / "0", folder / "1"]
        for said in says:
            stderr = stack.enter_context(said.open("w"))
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
            processes_.append(stack.enter_context(ended(process)))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        lines = [_first_line(process) for process in processes_]
        facts = next(json.loads(line.partition(" ")[2]) for line in lines if line.startswith("ready "))
        server = RunningServer(**{**facts, "run_dir": Path(facts["run_dir"])})
        printed = [line + said.read_text() for line, said in zip(lines, says, strict=True)]
        yield server, printed, [process.poll() for process in processes_]


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        process.wait(DONE_S)
    return line


@pytest.fixture(scope="module")
def bed(rivals: tuple[RunningServer, list[str], list[int | None]]) -> Bed:
    return Bed(rivals[0], SYNTHETIC[:3])


def check(bed: Bed, report: Report) -> None:
    """Nobody else noticed anything."""
    assert report.outcomes == {RIGHT: ALL}, report.messages
    assert wait_idle(bed.server).check_errors == []


def test_of_two_servers_on_the_same_ports_exactly_one_starts(
    rivals: tuple[RunningServer, list[str], list[int | None]],
) -> None:
    server, printed, statuses = rivals
    assert sorted(statuses, key=str) == [1, None]
    loser, winner = printed[statuses.index(1)], printed[statuses.index(None)]
    port = server.http.rpartition(":")[2]
    assert f"--http-port {port} on 127.0.0.1: Address already in use" in loser
    assert "starting" not in loser
    assert "ready {" not in loser
    assert winner.startswith("ready {")


def test_who_else_answers_on_the_port_is_not_believed(small_model: Path, small_root: Path) -> None:
    with hold(Ports(host="127.0.0.1", http=0, grpc=0, metrics=0)) as ports:
        pass
    command = serve_command(small_model, small_root, ports)
    with ended(
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ) as process:
        assert process.stderr
        assert process.stdout
        assert "starting" in process.stderr.readline()
        with http.server.ThreadingHTTPServer(("127.0.0.1", ports.http), _Impostor) as impostor:
            thread = threading.Thread(target=impostor.serve_forever)
            thread.start()
            said, printed = process.stderr.read(), process.stdout.read()
            impostor.shutdown()
            thread.join()
        assert process.wait(DONE_S) == 1
    assert f"another server, 'triton', answers on 127.0.0.1:{ports.http}" in said
    assert printed == ""


class _Impostor(http.server.BaseHTTPRequestHandler):
    """Answers as a server of ours whose models are ready."""

    def do_GET(self) -> None:
        self._answer({"name": "triton"})

    def do_POST(self) -> None:
        self._answer({"text_output": "2"})

    def _answer(self, what: object) -> None:
        text = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_operators_interfaces_are_closed_over_http(bed: Bed) -> None:
    for method, path in doors.CLOSED_HTTP:
        status, text = doors.ask_http(bed.server, method, path, "{}" if method == "POST" else None)
        assert (status, "This API is restricted" in text) == (403, True), (path, status, text)


def test_the_operators_interfaces_are_closed_over_grpc(bed: Bed) -> None:
    with contextlib.closing(grpcclient.InferenceServerClient(bed.server.grpc)) as client:
        for name, arguments in doors.CLOSED_GRPC.items():
            with pytest.raises(InferenceServerException, match="This protocol is restricted") as caught:
                getattr(client, name)(*arguments)
            assert caught.value.status() == str(StatusCode.UNAVAILABLE), name


def test_what_clients_need_stays_open(bed: Bed) -> None:
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/llm/ready", "/v2/models/llm",
                 "/v2/models/llm/config", "/v2/models/llm_stream/stats", "/v2/models/stats"):  # fmt: skip
        assert doors.ask_http(bed.server, "GET", path)[0] == 200, path
    with contextlib.closing(grpcclient.InferenceServerClient(bed.server.grpc)) as client:
        assert client.is_server_ready()
        assert client.is_model_ready("llm")
        assert client.get_server_metadata().name
        assert client.get_model_metadata("llm").name == "llm"
        assert client.get_model_config("llm").config.name == "llm"
        assert len(client.get_inference_statistics().model_stats) == 2


def test_the_key_on_the_command_line_opens_nothing(bed: Bed) -> None:
    """Every user of the host can read it there."""
    words = [
        word.partition("=")[2].partition(":")[2]
        for word in processes.command(tritonserver_of(bed.server))
        if "restricted" in word
    ]
    assert len(words) == 2
    for word in words:
        name, _, value = word.partition("=")
        assert b"log_verbose_level" not in doors.http_headers(bed.server, name, value)
        assert b"log_verbose_level" not in doors.grpc_headers(bed.server, name, value)
    # The same ways of asking do get answers.
    assert b"403" in doors.http_headers(bed.server, "a", "b")
    assert b"classification" in doors.grpc_headers(bed.server, "a", "b", method="ServerMetadata")


def test_a_client_neither_reads_nor_writes_anothers_shared_memory(bed: Bed) -> None:
    check(bed, doors.shared_memory_is_read_and_written(bed))


def test_shared_memory_is_the_servers_own_before_and_after_it_grows(bed: Bed) -> None:
    assert doors.modes(bed.server) == {0o600}
    check(bed, doors.region_is_opened_by_others(bed))


def test_a_body_that_is_too_long_is_refused_alone_and_leaves_nothing(bed: Bed) -> None:
    check(bed, doors.body_is_huge(bed, limits.DEFAULT_BYTES + (8 << 20)))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_our_client_does_not_pass_on_the_name_of_a_region(bed: Bed, protocol: str) -> None:
    address = bed.server.http if protocol == "http" else bed.server.grpc
    with Client(address, protocol, timeout=DONE_S) as client:  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument) as caught:
            client.generate("a" * (limits.DEFAULT_BYTES + (8 << 20)), max_tokens=1)
        with pytest.raises(InvalidArgument) as streamed:
            client.stream("a" * (limits.DEFAULT_BYTES + (8 << 20)), max_tokens=1).collect()
    message = "the request is too long for the server's request memory; send less at once"
    assert {caught.value.message, streamed.value.message} == {message}


def test_limits_are_tritonservers_own(bed: Bed) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    server = tritonserver_of(bed.server)
    assert resource.prlimit(server, resource.RLIMIT_NOFILE)[0] == min(hard, limits.MAX_DESCRIPTORS)
    assert resource.prlimit(server, resource.RLIMIT_FSIZE)[0] == limits.DEFAULT_BYTES
    own = resource.getrlimit(resource.RLIMIT_FSIZE)
    for pid in (engine_of(bed.server), stub_of(bed.server, "llm"), stub_of(bed.server, "llm_stream")):
        assert resource.prlimit(pid, resource.RLIMIT_FSIZE) == (own[1], own[1])


def test_idle_connections_stop_nobody_who_is_connected(bed: Bed) -> None:
    check(bed, doors.connections_are_idle(bed, hold_s=0))


def test_a_full_server_is_asked_over_connections_that_are_open_and_is_not_taken_for_a_hung_one(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_watch, "LOOKS_BETWEEN", 1)
    monkeypatch.setattr(model_watch, "HUNG_LOOKS", 200)
    pace = threading.Event()
    said: list[str] = []
    held = KeptConnection(bed.server.http)
    _ask(held)
    with doors.full(bed.server), contextlib.closing(_watch(bed, said)) as watch:
        # Twice over the same connection, while another one is not even looked at.
        late = KeptConnection(bed.server.http)
        for _ in range(2):
            assert http_status(_ask(held).answer.decode()) == 200
        waiting = KeptConnectionProbe(late, ready_path("llm"))
        while not said:
            assert watch.look() == ""
            # The front end itself answers within so many looks.
            pace.wait(0.01)
        assert not waiting.poll(0)
    assert waiting.poll(DONE_S)
    assert http_status(waiting.answer.decode()) == 200
    waiting.close()
    late.close()
    held.close()
    (text,) = said
    assert text.startswith("llm cannot be asked: tritonserver has as many connections as it may have open")


def _ask(line: KeptConnection) -> KeptConnectionProbe:
    probe = KeptConnectionProbe(line, ready_path("llm"))
    assert probe.poll(DONE_S)
    probe.close()
    assert line.is_accepted
    return probe


def _watch(bed: Bed, said: list[str]) -> ModelWatch:
    """One that begins to look at a server that is full already."""
    pid = tritonserver_of(bed.server)
    return ModelWatch(
        "llm",
        health=health_path(bed.server.run_dir, "llm"),
        http=bed.server.http,
        metrics=bed.server.metrics,
        is_full=lambda: limits.num_free_descriptors(pid) < 4,
        say=said.append,
    )


def test_a_second_server_on_the_ports_of_one_that_serves_is_refused(bed: Bed, small_model: Path) -> None:
    check(bed, doors.ports_are_taken(bed, small_model))


def test_the_log_goes_on_when_its_writer_is_killed_or_stopped(bed: Bed) -> None:
    for number in (signal.SIGKILL, signal.SIGSTOP):
        pump = doors.log_pump_of(bed.server)
        os.kill(pump, number)
        # More than the pipe holds: whoever writes would wait if nobody read.
        doors.write_to_log(bed.server, 4 << 20)
        assert doors.log_pump_of(bed.server) != pump
    assert status_of(bed.server).check_errors == []
