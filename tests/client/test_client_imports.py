"""The client stands alone: no torch, none of the server's packages, and types that its users can check."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import manylora_client

WITHOUT_SERVER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "triton", "safetensors", "tokenizers",
                                  "zmq", "msgspec", "manylora", "manylora_kernels"}:
            raise ImportError(f"{name} is not to be imported by the client")

sys.meta_path.insert(0, Refuse())
import asyncio
from manylora_client import AsyncClient, Client, ConnectionFailed

async def fail(url):
    async with AsyncClient(url, timeout=5) as client:
        assert not await client.is_ready()
        for call in (client.generate("x"), client.stream("x").collect()):
            try:
                await call
            except ConnectionFailed:
                continue
            raise SystemExit("reached a server that is not there")

for url in ("http://localhost:1", "grpc://localhost:1"):
    asyncio.run(fail(url))
    with Client(url, timeout=5) as client:
        assert not client.is_ready()
        for call in (lambda: client.generate("x"), lambda: client.stream("x").collect()):
            try:
                call()
            except ConnectionFailed:
                continue
            raise SystemExit("reached a server that is not there")
"""

TYPED_USE = """
from manylora_client import AsyncClient, AsyncStream, Chunk, Client, Completion, Message, Options, Stream
from manylora_client import TokenLogprob

client = Client("localhost:8000", "grpc")
whole: Completion = client.generate("x", adapter_id="a", stop=["."], adapter_scale=0.5, deadline_ms=100)
ids: list[int] = client.generate(input_ids=[1, 2]).token_ids
turns: list[Message] = [{"role": "user", "content": "x"}]
answer: Completion = client.chat(turns, timeout=None)
parts: Stream = client.chat("x", stream=True, max_tokens=3)
chunk: Chunk = next(parts)
text: str = chunk.text + whole.finish_reason
likely: list[TokenLogprob] | None = client.generate("x", logprobs=2).logprobs
options: Options = {"temperature": 0.5, "seed": 1}
client.stream("x", **options)
client.generate(7)  # type: ignore[arg-type]
client.generate("x", max_token=3)  # type: ignore[call-arg]
client.generate("x", top_k="many")  # type: ignore[arg-type]
client.chat("x", stream=True).text  # type: ignore[attr-defined]

async def main() -> None:
    async with AsyncClient("localhost:8000", max_connections=9) as client:
        whole: Completion = await client.generate("x", min_p=0.1)
        answer: Completion = await client.chat("x", request_priority=1)
        parts: AsyncStream = client.chat("x", stream=True)
        async for chunk in client.stream("x", echo=True):
            text: str = chunk.text
        joined: Completion = await parts.collect()
        client.generate("x").text  # type: ignore[attr-defined]
"""


def _run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_client_works_where_the_server_cannot_be_imported():
    _run("-W", "error", "-c", WITHOUT_SERVER)


def test_a_users_code_is_type_checked(tmp_path: Path):
    script = tmp_path / "use.py"
    script.write_text(TYPED_USE)
    package = Path(manylora_client.__file__).parent
    assert (package / "py.typed").exists()
    settings = tmp_path / "mypy.ini"
    settings.write_text(
        f"[mypy]\nmypy_path = {package.parent}\nstrict = true\nignore_missing_imports = true\n"
    )
    _run("-m", "mypy", "--config-file", str(settings), "--cache-dir", str(tmp_path / "cache"), str(script))
