"""Completion in a shell, by argcomplete where it is installed. Imported only while a shell asks for it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

from manylora import settings_table
from manylora.front_end.parameters import PARAMETERS


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end the process; without argcomplete, do nothing.

    Args:
        parser: with all its commands.
    """
    try:
        import argcomplete
        from argcomplete.completers import DirectoriesCompleter
    except ImportError:
        return
    settings = [f"{setting.key}=" for setting in settings_table.settings()]
    completers: dict[object, Callable[..., object]] = {
        "DIR": DirectoriesCompleter(),
        "KEY=VALUE": _words(settings),
        "NAME=VALUE": _words([f"{name}=" for name in PARAMETERS]),
    }
    for action in _actions(parser):
        # Without candidates nothing is offered, not even the files that a shell would suggest.
        action.completer = completers.get(action.metavar, _words([]))  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def _words(words: Sequence[str]) -> Callable[..., object]:
    return lambda **_context: words


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The actions of the parser and of all its commands."""
    # argparse has no public way to list them.
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        elif not action.choices:
            yield action
