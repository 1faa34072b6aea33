"""Matches regular expressions, in this process or, run as a script, in one of its own.

Standard library only: the child starts without site-packages.
"""

from __future__ import annotations

import json
import re
import sys
from typing import TypedDict

Matches = dict[str, str]
"""Text -> the group `idx` of its match, or ""."""


class Request(TypedDict):
    """What is to be matched."""

    regexes: list[tuple[str, bool]]
    """Regex, and whether it must match the whole text (`re.fullmatch`) or only its start (`re.match`)."""
    texts: list[str]


def match(regex: str, is_whole: bool, texts: list[str]) -> Matches:
    """The texts that `regex` matches, from start to end where `is_whole`, else from their start.

    Raises:
        re.error, OverflowError, RecursionError: `regex` is not valid, or more than `re` can compile.
    """
    compiled = re.compile(regex)
    has_index = "idx" in compiled.groupindex
    matcher = compiled.fullmatch if is_whole else compiled.match
    found = ((text, matcher(text)) for text in texts)
    return {text: (m["idx"] or "") if has_index else "" for text, m in found if m}


def main() -> None:
    """Read a Request from standard input; write one Matches per regex, or the text of its error."""
    request: Request = json.load(sys.stdin)
    answer: list[Matches | str] = []
    for regex, is_whole in request["regexes"]:
        try:
            answer.append(match(regex, is_whole, request["texts"]))
        except (re.error, OverflowError, RecursionError) as error:
            answer.append(str(error))
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
