# PYTHON_ARGCOMPLETE_OK
"""The command line: `manylora COMMAND`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manylora import errors
from manylora.errors import ManyloraError, UnsupportedError

USAGE_CODES = ("INVALID_ARG", "NOT_FOUND", "UNSUPPORTED")
"""Exit status 2, as for a wrong option: to try again changes nothing. Other errors exit with 1."""

EXIT_CODES = "exit status: 0 done, 1 failed, 2 asked for what cannot be, 130 interrupted"

SERVER_PACKAGES = ("msgspec", "torch", "transformers", "zmq")
"""What the plain install, which is the client, does not bring."""

SERVE_EXAMPLES = """\
examples:
  manylora serve --base-model models/base --adapter-root models/adapters
  manylora serve --base-model models/base --set max_loras=16 --set kv_cache_bytes=4G --http-port 0
"""

STATUS_EXAMPLES = """\
examples:
  manylora status
  watch -n 1 manylora status --run-dir /run/manylora
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns: the exit status, as EXIT_CODES has it.
    """
    # Only what declares the options is imported here, so that `--help` is quick.
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:
        from manylora.commands import completion

        completion.complete(parser)
    arguments = parser.parse_args(argv)
    try:
        if arguments.needs_server_packages:
            _require_server_packages()
        status = int(arguments.run(arguments))
        sys.stdout.flush()
        return status
    except ManyloraError as error:
        return _report(arguments.command, error.code, error.message)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has gone (`| head`). What is left in the buffer must not raise again at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        client = sys.modules.get("manylora_client")
        if client is None or not isinstance(error, client.ManyloraClientError):
            raise
        return _report(arguments.command, _code_of(error), error.message)


def _report(command: str, code: str, message: str) -> int:
    print(f"manylora {command}: {message}", file=sys.stderr)
    return 2 if code in USAGE_CODES else 1


def _code_of(error: Any) -> str:
    return getattr(error, "code", "") or errors.InternalError.code


def _parser() -> argparse.ArgumentParser:
    from manylora import settings_table
    from manylora.serve import command as serve

    parser = argparse.ArgumentParser(
        prog="manylora",
        description="Many LoRA adapters on one base language model, served by Triton.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str,
        text: str,
        run: Callable[[argparse.Namespace], int],
        *,
        epilog: str,
        needs_server_packages: bool = True,
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"{epilog}\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run, needs_server_packages=needs_server_packages)
        return added

    serving = add(
        "serve",
        "run tritonserver on the two front ends until a signal comes",
        serve.main,
        epilog=f"{SERVE_EXAMPLES}\n{settings_table.help_text()}\n",
    )
    serve.add_arguments(serving)
    status = add("status", "print the state of a running engine", _status, epilog=STATUS_EXAMPLES)
    status.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="the server's (default: the only one that runs)"
    )
    status.add_argument("--json", action="store_true", help="as one line of JSON")
    _add_asking(add)
    _add_planning(add)
    return parser


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"manylora {version('manylora')}")
        parser.exit()


def _add_asking(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands of the client, which the plain install has."""
    if importlib.util.find_spec("tritonclient") is None:
        return
    from manylora.commands import chat, generate

    text = "send prompts to a running server and print the answers"
    generate.add_arguments(
        add("generate", text, generate.main, epilog=generate.epilog(), needs_server_packages=False)
    )
    text = "talk with a running server; the adapter may change inside a chat"
    chat.add_arguments(add("chat", text, chat.main, epilog=chat.epilog(), needs_server_packages=False))


def _add_planning(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands that look at models and adapters without a server."""
    from manylora.commands import plan, validate

    text = "say whether adapters bind to a base model, and how; no server"
    validate.add_arguments(add("validate", text, validate.main, epilog=f"{validate.epilog()}\n"))
    text = "say what a configuration takes in memory and how many adapters fit; no server"
    plan.add_arguments(add("plan", text, plan.main, epilog=f"{plan.epilog()}\n"))


def _missing_packages() -> list[str]:
    return [name for name in SERVER_PACKAGES if importlib.util.find_spec(name) is None]


def _require_server_packages() -> None:
    missing = _missing_packages()
    if missing:
        raise UnsupportedError(f"needs {', '.join(missing)}: pip install 'manylora[server]'")


def _status(arguments: argparse.Namespace) -> int:
    from manylora.serve.status import print_status

    return print_status(arguments.run_dir, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
