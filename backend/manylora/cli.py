"""The command line: `manylora COMMAND`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from manylora.errors import InvalidArgumentError, ManyloraError, NotFoundError, UnsupportedError

USAGE_ERRORS = (InvalidArgumentError, NotFoundError, UnsupportedError)
"""Exit status 2, as for a wrong option: to try again changes nothing. Other errors exit with 1."""

SERVER_PACKAGES = ("msgspec", "torch", "transformers", "zmq")
"""What the plain install, which is the client, does not bring."""

SERVE_EXAMPLES = """\
examples:
  manylora serve --base-model models/base --adapter-root models/adapters
  manylora serve --base-model models/base --set max_loras=16 --set kv_cache_bytes=4G --http-port 0
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns: the exit status: 0 done, 1 failed, 2 asked for something that cannot be.
    """
    arguments = _parser().parse_args(argv)
    try:
        _require_server_packages()
        return int(arguments.run(arguments))
    except ManyloraError as error:
        print(f"manylora {arguments.command}: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, USAGE_ERRORS) else 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    # Only what declares the options is imported here, so that `--help` is quick.
    from manylora.serve import command as serve

    parser = argparse.ArgumentParser(
        prog="manylora", description="Many LoRA adapters on one base language model, served by Triton."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serving = commands.add_parser(
        "serve",
        help="run tritonserver on the two front ends",
        description="Run tritonserver on the two front ends until a signal comes. Prints a line `ready`.",
        epilog=f"{SERVE_EXAMPLES}\n{serve.settings_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_arguments(serving)
    serving.set_defaults(run=serve.main)

    status = commands.add_parser("status", help="print the state of a running engine")
    status.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="the server's (default: the only one that runs)"
    )
    status.add_argument("--json", action="store_true", help="as one line of JSON")
    status.set_defaults(run=_status)
    return parser


def _require_server_packages() -> None:
    missing = [name for name in SERVER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"needs {', '.join(missing)}: pip install 'manylora[server]'")


def _status(arguments: argparse.Namespace) -> int:
    from manylora.serve.status import print_status

    return print_status(arguments.run_dir, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
