"""Encrypted connections, with a certificate that the tests make."""

from __future__ import annotations

import contextlib
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from manylora_client import ConnectionFailed
from tritonclient.grpc import service_pb2_grpc

from .scripted_grpc import ScriptedTriton
from .scripted_http import ANSWER, CrowdServer

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")

ASK_OVER_GRPCS = """
import asyncio, sys
from manylora_client import AsyncClient, Client

async def ask(url):
    async with AsyncClient(url, timeout=30) as client:
        return await client.is_ready(timeout=30)

with Client(sys.argv[1], timeout=30) as client:
    print(client.is_ready(timeout=30), asyncio.run(ask(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost, signed by itself, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=localhost",
            ),
            *("-addext", "subjectAltName=DNS:localhost", "-out", str(certificate), "-keyout", str(key)),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return certificate, key


@contextlib.contextmanager
def _grpcs(certificate: Path, key: Path) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(ScriptedTriton([]), server)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    port = server.add_secure_port("localhost:0", credentials)
    server.start()
    yield f"grpcs://localhost:{port}"
    server.stop(None).wait()


def test_https_with_ones_own_authority(connect, certificate: tuple[Path, Path]):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with CrowdServer(1, context) as server:
        url = f"https://localhost:{server.url.split(':')[1]}"
        with connect(url, tls=ssl.create_default_context(cafile=str(certificate[0])), timeout=30) as client:
            for _ in range(2):
                assert client.generate("x") == ANSWER
                assert client.stream("x").collect() == ANSWER
            assert server.num_connections == 1


def test_https_refuses_a_certificate_that_nobody_vouches_for(connect, certificate: tuple[Path, Path]):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with (
        CrowdServer(1, context) as server,
        connect(f"https://localhost:{server.url.split(':')[1]}", timeout=30) as client,
        pytest.raises(ConnectionFailed, match="certificate"),
    ):
        client.generate("x")


@pytest.mark.parametrize("trusted", [True, False], ids=["trusted", "not trusted"])
def test_grpcs(certificate: tuple[Path, Path], trusted: bool):
    environment = {**os.environ}
    # gRPC reads it once in a process.
    environment.pop("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", None)
    if trusted:
        environment["GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"] = str(certificate[0])
    with _grpcs(*certificate) as url:
        asked = subprocess.run(
            [sys.executable, "-c", ASK_OVER_GRPCS, url],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    assert asked.stdout.split() == [str(trusted)] * 2
