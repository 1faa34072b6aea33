"""Why an adapter is refused: every reason, in one message.

Text from adapters' files enters messages only through `quote`: clipped and escaped.
"""

from __future__ import annotations

from collections.abc import Iterable

from manylora.errors import InvalidArgumentError, UnsupportedError

MAX_EXAMPLES = 5
"""Modules or tensors named per reason."""
MAX_REASONS = 24
"""Reasons in one message."""
MAX_QUOTE = 120
"""Characters of one quoted text."""


def quote(value: object) -> str:
    """`value` for a message: escaped, on one line, at most MAX_QUOTE characters of it."""
    if isinstance(value, str) and len(value) > MAX_QUOTE:
        return f"{value[:MAX_QUOTE]!r}..."
    text = repr(value)
    return text if len(text) <= MAX_QUOTE + 2 else f"{text[:MAX_QUOTE]}..."


class Reasons:
    """Collects the reasons against an adapter. Those of the same wording share one list of examples."""

    def __init__(self) -> None:
        self._unsupported: dict[str, list[str]] = {}
        self._invalid: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._unsupported or self._invalid)

    def unsupported(self, reason: str, example: str = "") -> None:
        """Add a reason that makes the refusal UNSUPPORTED. `example` is quoted behind it."""
        _add(self._unsupported, reason, example)

    def invalid(self, reason: str, example: str = "") -> None:
        """Add a reason that makes the refusal INVALID_ARG, unless something unsupported is found too."""
        _add(self._invalid, reason, example)

    def message(self) -> str:
        lines = [*_lines(self._unsupported), *_lines(self._invalid)]
        if len(lines) > MAX_REASONS:
            lines = [*lines[:MAX_REASONS], f"and {len(lines) - MAX_REASONS} more reasons"]
        return "; ".join(lines)

    def error(self) -> UnsupportedError | InvalidArgumentError:
        """UNSUPPORTED if something in the adapter is of a kind that is not served, else INVALID_ARG."""
        return (UnsupportedError if self._unsupported else InvalidArgumentError)(self.message())

    def raise_if_any(self) -> None:
        """
        Raises:
            UnsupportedError, InvalidArgumentError: there are reasons; see `error`.
        """
        if self:
            raise self.error()


def _add(reasons: dict[str, list[str]], reason: str, example: str) -> None:
    examples = reasons.setdefault(reason, [])
    if example and example not in examples:
        examples.append(example)


def _lines(reasons: dict[str, list[str]]) -> Iterable[str]:
    for reason, examples in reasons.items():
        named = ", ".join(quote(example) for example in examples[:MAX_EXAMPLES])
        more = f" and {len(examples) - MAX_EXAMPLES} more" if len(examples) > MAX_EXAMPLES else ""
        yield f"{reason}: {named}{more}" if examples else reason
