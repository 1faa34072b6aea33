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
from manylora_client import Client, ConnectionFailed
for url in ("http://localhost:1", "grpc://localhost:1"):
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
from manylora_client import Chunk, Client, Completion, Message, Stream

client = Client("localhost:8000", "grpc")
whole: Completion = client.generate("x", adapter_id="a", stop=["."], logit_bias={"7": 1.0})
ids: list[int] = client.generate(input_ids=[1, 2]).token_ids
turns: list[Message] = [{"role": "user", "content": "x"}]
answer: Completion = client.chat(turns)
parts: Stream = client.chat("x", stream=True, max_tokens=3)
chunk: Chunk = next(parts)
text: str = chunk.text + whole.finish_reason
client.generate(7)  # type: ignore[arg-type]
client.chat("x", stream=True).text  # type: ignore[attr-defined]
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
