"""Start a server, let three adapters and the base model answer in one mixed batch, show the caches, stop.

python examples/demo.py
"""

from __future__ import annotations

import argparse
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from manylora.errors import ManyloraError
from manylora.serve.background import RunningServer, running_server
from manylora.serve.status import print_status
from manylora_client import Client, Completion

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("What should I eat for breakfast?", "Why is the sky blue?")
WIDTH = 100
NAME_WIDTH = 10


def ask_all(server: RunningServer, adapters: list[str], max_tokens: int) -> dict[tuple[str, str], Completion]:
    """Send every prompt to every adapter and to the base model, all at once."""
    asked = [(prompt, adapter) for prompt in PROMPTS for adapter in ("", *adapters)]
    with Client(f"grpc://{server.grpc}") as client, ThreadPoolExecutor(len(asked)) as threads:
        answers = threads.map(
            lambda question: client.chat(question[0], adapter_id=question[1], max_tokens=max_tokens), asked
        )
        return dict(zip(asked, answers, strict=True))


def print_answers(answers: dict[tuple[str, str], Completion]) -> None:
    """A block per prompt, a paragraph per adapter."""
    for prompt in PROMPTS:
        print(f"\n{prompt}\n{'-' * WIDTH}")
        for (asked, adapter), answer in answers.items():
            if asked == prompt:
                lines: list[str] = []
                for line in answer.text.strip().splitlines() or ["(nothing)"]:
                    lines += textwrap.wrap(line, WIDTH - NAME_WIDTH - 2) or [""]
                name = adapter or "(base)"
                for number, line in enumerate(lines):
                    print(f"{name if number == 0 else '':<{NAME_WIDTH}}  {line}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Three adapters and the base model in one batch.")
    parser.add_argument("--base-model", type=Path, default=ROOT / ".build" / "base_model")
    parser.add_argument("--adapter-root", type=Path, default=ROOT / "examples" / "adapters")
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    adapters = sorted(path.parent.name for path in arguments.adapter_root.glob("*/adapter_config.json"))
    try:
        with running_server(base_model=arguments.base_model, adapter_root=arguments.adapter_root) as server:
            print(f"{len(PROMPTS)} prompts to {len(adapters)} adapters and the base model, in one batch ...")
            start = time.monotonic()
            answers = ask_all(server, adapters, arguments.max_tokens)
            elapsed_s = time.monotonic() - start
            print_answers(answers)
            num_tokens = sum(answer.num_output_tokens for answer in answers.values())
            print(f"\n{len(answers)} answers, {num_tokens} tokens in {elapsed_s:.1f} s. The engine now:\n")
            print_status(server.run_dir)
    except ManyloraError as error:
        parser.exit(1, f"demo: {error.message}\n")


if __name__ == "__main__":
    main()
