"""`manylora generate`: prompts to a running server, one answer for each adapter."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from manylora_client import Client, Completion, TokenLogprob

from manylora.commands import request_options
from manylora.errors import InvalidArgumentError
from manylora.table import columns, cut, fill, render

EXAMPLES = """\
examples:
  manylora generate "The sea is" --max-tokens 16
  manylora generate --chat "Why is the sky blue?" --adapter pirate --adapter ""
  echo "Once upon a time" | manylora generate --temperature 0.8 --seed 7
  manylora generate "The sea is" --logprobs 3 --json
"""

HEADER = ("token", "logprob", "likeliest")
WIDTH = 80
MAX_TOKEN_COLUMNS = 20
"""Of one token in the table, so that it always fits, even beside the longest number, minus a thousand
million."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `manylora generate`."""
    add = parser.add_argument
    add("prompt", nargs="*", help="one prompt each; none, or -, is read from standard input")
    add(
        "--adapter",
        action="append",
        metavar="NAME",
        help="the adapter; several give one answer each; empty is the base model",
    )
    add("--chat", action="store_true", help="put the prompt through the model's chat template")
    add("--logprobs", type=int, default=0, metavar="N", help="alternatives shown for each token")
    add("--json", action="store_true", help="one line of JSON for each answer")
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show an answer as it comes (default)",
    )
    request_options.add_arguments(parser)


def epilog() -> str:
    """Examples, and the parameters for `--set`."""
    return f"{EXAMPLES}\n{request_options.settings_help()}\n"


def main(arguments: argparse.Namespace) -> int:
    """Send the prompts and print the answers.

    Raises:
        ManyloraClientError: what the server refuses, or that it cannot be reached.
        InvalidArgumentError: options that do not go together.
    """
    parameters = request_options.read_parameters(arguments)
    prompts = [_read_stdin() if prompt == "-" else prompt for prompt in arguments.prompt or ["-"]]
    adapters: list[str] = arguments.adapter or [""]
    if arguments.logprobs:
        parameters["logprobs"] = arguments.logprobs
    if arguments.chat:
        parameters["chat"] = True
    whole = arguments.json or arguments.logprobs or not arguments.stream
    with request_options.open_client(arguments) as client:
        for prompt in prompts:
            for adapter in adapters:
                if len(prompts) * len(adapters) > 1 and not arguments.json:
                    print(_title(prompt if len(prompts) > 1 else "", adapter))
                options = {**parameters, "adapter_id": adapter}
                sent = _as_messages(prompt) if arguments.chat else prompt
                if whole:
                    _print(client.generate(sent, **options), prompt, adapter, as_json=arguments.json)
                else:
                    _stream(client, sent, options)
    return 0


def _read_stdin() -> str:
    if sys.stdin.isatty():
        print("the prompt, ended by Ctrl-D:", file=sys.stderr)
    text = sys.stdin.read().removesuffix("\n")
    if not text:
        raise InvalidArgumentError("no prompt: give one, or send one to standard input")
    return text


def _as_messages(prompt: str) -> str:
    """A JSON list of objects is a conversation. Any other prompt is one message of the user, even one that
    begins with a bracket, which the server would read as a broken conversation."""
    with contextlib.suppress(ValueError, RecursionError):
        given = json.loads(prompt)
        if isinstance(given, list) and given and all(isinstance(message, dict) for message in given):
            return prompt
    return json.dumps([{"role": "user", "content": prompt}], ensure_ascii=False)


def _title(prompt: str, adapter: str) -> str:
    shown = f" {prompt[:50]!r}" if prompt else ""
    return f"--- {adapter or '(base model)'}{shown}"


def _stream(client: Client, prompt: str, options: dict[str, Any]) -> None:
    with client.stream(prompt, **options) as stream:
        for chunk in stream:
            print(chunk.text, end="", flush=True)
    print()


def describe_logprobs(tokens: Sequence[TokenLogprob]) -> str:
    """A table of tokens and of what was likeliest in their place, within 80 columns."""
    shown = [(_quoted(token), f"{token.logprob:.3f}") for token in tokens]
    # What is left beside the first two columns, each as wide as its widest cell.
    table = [HEADER[:2], *shown]
    room = WIDTH - sum(max(columns(row[i]) for row in table) + 2 for i in range(2))
    rows = []
    for (text, logprob), token in zip(shown, tokens, strict=True):
        lines = fill([f"{_quoted(other)} {other.logprob:.3f}" for other in token.top], room)
        rows += [(text, logprob, lines[0]), *(("", "", line) for line in lines[1:])]
    return render(HEADER, rows, right=(1,))


def _quoted(token: TokenLogprob) -> str:
    return cut(repr(token.text), MAX_TOKEN_COLUMNS)


def _print(answer: Completion, prompt: str, adapter: str, *, as_json: bool) -> None:
    if as_json:
        fields = {"prompt": prompt, "adapter_id": adapter, **dataclasses.asdict(answer)}
        print(json.dumps(fields, ensure_ascii=False), flush=True)
        return
    print(answer.text)
    if answer.logprobs is not None:
        print(describe_logprobs(answer.logprobs))
