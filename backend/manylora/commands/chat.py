"""`manylora chat`: a conversation with a running server, in which the adapter can be changed."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import Any

from manylora_client import Client, InvalidArgument, ManyloraClientError, Message

from manylora.commands import request_options
from manylora.errors import InvalidArgumentError

EXAMPLES = """\
examples:
  manylora chat
  manylora chat --url grpc://gpu1:8001 --adapter pirate --temperature 0.7
  printf 'Hello\\n/adapter haiku\\nAnd now?\\n' | manylora chat --max-tokens 40
"""

HELP = """\
  /adapter NAME   answer with this adapter; without NAME the base model
  /system TEXT    begin anew with this system message; without TEXT with none
  /set NAME=VALUE a parameter of the requests; without VALUE its default again
  /reset          forget what was said
  /help           this
  /quit           or Ctrl-D
Ctrl-C stops an answer."""

PIPED = """\
Lines that are piped in are all taken; errors go to standard error, Ctrl-C ends
the chat, and the exit status is 1 if any line failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `manylora chat`."""
    parser.add_argument("--adapter", default="", metavar="NAME", help="the adapter (default: the base model)")
    parser.add_argument("--system", default="", metavar="TEXT", help="a system message to begin with")
    request_options.add_arguments(parser)


def epilog() -> str:
    """Examples, commands, parameters, and what a pipe changes."""
    return f"{EXAMPLES}\n{HELP}\n\n{request_options.settings_help()}\n\n{PIPED}\n"


def main(arguments: argparse.Namespace) -> int:
    """Talk until the input ends.

    Returns: the exit status: 1 when lines were piped in and one of them failed.
    """
    parameters = request_options.read_parameters(arguments)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() then edits lines and keeps them
        print("/help for what can be said besides; Ctrl-D ends")
    with request_options.open_client(arguments) as client:
        chat = Chat(client, arguments.adapter, arguments.system, parameters, is_piped=not is_terminal)
        while True:
            try:
                line = _read_line(f"{chat.adapter or 'base'}> ", echo=not is_terminal)
            except EOFError:
                if is_terminal:
                    print()
                break
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                print("\n(/quit or Ctrl-D ends)")
                continue
            if not chat.handle(line):
                break
    return 1 if chat.has_failed and not is_terminal else 0


class Chat:
    """The conversation so far, and how the next answer is requested."""

    def __init__(
        self, client: Client, adapter: str, system: str, parameters: dict[str, Any], *, is_piped: bool
    ) -> None:
        self.adapter = adapter
        self.has_failed = False
        """A line has failed."""
        self._is_piped = is_piped
        self._client = client
        self._parameters = parameters
        self._messages: list[Message] = []
        self._system(system, say=False)

    def handle(self, line: str) -> bool:
        """Handle one line: a command or a message. False ends the chat."""
        word, _, rest = line.strip().partition(" ")
        if not word:
            return True
        commands: dict[str, Callable[[str], None]] = {
            "/adapter": self._change_adapter,
            "/system": self._system,
            "/set": self._set,
            "/reset": self._reset,
            "/help": lambda _: print(HELP),
        }
        if word in ("/quit", "/exit"):
            return False
        if word in commands:
            commands[word](rest.strip())
        elif word.startswith("/"):
            self._fail(f"no command {word}; /help names them", mark="")
        else:
            self._answer(line.strip())
        return True

    def _answer(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        said: list[str] = []
        try:
            with self._client.chat(
                self._messages, stream=True, **{**self._parameters, "adapter_id": self.adapter}
            ) as stream:
                for chunk in stream:
                    said.append(chunk.text)
                    print(chunk.text, end="", flush=True)
            print()
        except KeyboardInterrupt:
            # Leaving the block has cancelled the request. The text so far is kept.
            if self._is_piped:
                raise
            print(" [stopped]")
        except ManyloraClientError as error:
            if said:
                print()
            self._fail(_advice(error))
            # As if it had not been sent, so that it can be sent again.
            self._messages.pop()
            return
        if said:
            self._messages.append({"role": "assistant", "content": "".join(said)})
        else:
            self._messages.pop()

    def _fail(self, message: str, *, mark: str = "error: ") -> None:
        self.has_failed = True
        if self._is_piped:
            # After the output that it belongs to, even if both go to one file.
            sys.stdout.flush()
            print(f"manylora chat: {message}", file=sys.stderr)
        else:
            print(f"{mark}{message}")

    def _change_adapter(self, name: str) -> None:
        self.adapter = name
        print(f"(adapter: {name or 'none, the base model'})")

    def _system(self, text: str, *, say: bool = True) -> None:
        self._messages = [{"role": "system", "content": text}] if text else []
        if say:
            print("(begun anew)")

    def _reset(self, _rest: str) -> None:
        self._messages = [m for m in self._messages if m["role"] == "system"]
        print("(begun anew)")

    def _set(self, text: str) -> None:
        try:
            name, value = request_options.read_setting(text)
        except InvalidArgumentError as error:
            self._fail(error.message)
            return
        if value == "":
            self._parameters.pop(name, None)
        else:
            self._parameters[name] = value
        print("(" + (", ".join(f"{k}={v}" for k, v in self._parameters.items()) or "all defaults") + ")")


def _read_line(prompt: str, *, echo: bool) -> str:
    if not echo:
        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    # So that piped input looks like typed input.
    print(prompt + line.rstrip("\n"), flush=True)
    return line


def _advice(error: ManyloraClientError) -> str:
    if isinstance(error, InvalidArgument) and "the prompt has" in error.message:
        return f"{error.message}. The chat has grown too long: /reset begins anew"
    return f"{error}"
