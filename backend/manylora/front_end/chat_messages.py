"""A conversation as JSON text, read message by message.

Parsing the whole text at once would hold the interpreter's lock: a million messages would stop every other
thread for a third of a second. This reader stops at the first thing that is not served, and other threads get
their turns in between.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from manylora.errors import InvalidArgumentError, UnsupportedError
from manylora.front_end.parameters import is_unicode

Message = Mapping[str, str]
"""A mapping with `role` and `content`, both text."""

AS_MESSAGES = 'send other text as [{"role": "user", "content": "..."}]'
"""Advice for a user whose text was read as a conversation by mistake."""

_SPACE = re.compile(r"[ \t\n\r]*")
_KINDS = {'"': "text", "[": "a list", "{": "an object", "t": "true", "f": "false", "n": "null"}


def read_messages(text: str, max_messages: int) -> Sequence[Message]:
    """Text that begins with `[` or `{` is a conversation, a JSON list of messages; any other text is one
    message of the user.

    Raises:
        InvalidArgumentError: not JSON (the message says where), no messages, more messages or parts than
            `max_messages`, or one that is not an object of `role` and `content`.
        UnsupportedError: a content has a part that is not text.
    """
    reader = _Reader(text, max_messages)
    if reader.next_char not in ("[", "{"):
        return ({"role": "user", "content": text},)
    return reader.conversation()


def require_few(num: int, what: str, max_model_len: int) -> None:
    """
    Raises:
        InvalidArgumentError: more than `max_model_len` messages or parts, each of which is at least one
            token.
    """
    if num > max_model_len:
        raise InvalidArgumentError(
            f"chat: more than {max_model_len} {what}, which cannot be below "
            f"max_model_len={max_model_len} tokens"
        )


class _Reader:
    """A position in the text that only moves forward."""

    def __init__(self, text: str, max_messages: int) -> None:
        self._text = text
        self._max_messages = max_messages
        self._at = 0
        self._num_parts = 0
        self._decode = json.JSONDecoder().raw_decode

    @property
    def next_char(self) -> str:
        """The next character that is not white space; empty at the end."""
        self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # matches anywhere
        return self._text[self._at : self._at + 1]

    def conversation(self) -> Sequence[Message]:
        if self.next_char == "{":
            raise InvalidArgumentError(
                f"chat: got one JSON object; allowed is a list of messages in [ ]; {AS_MESSAGES}"
            )
        messages: list[Message] = []
        for number in self._items("[", "]"):
            require_few(number + 1, "messages", self._max_messages)
            messages.append(self._message(f"message {number}"))
        if self.next_char:
            raise self._malformed("the end of the text after the list of messages")
        if not messages:
            raise InvalidArgumentError("chat: got an empty list of messages; send at least one")
        return messages

    def _message(self, place: str) -> Message:
        return self._object(
            place,
            {
                "role": lambda: self._read_text(f"{place}: role"),
                "content": lambda: self._content(f"{place}: content"),
            },
        )

    def _content(self, place: str) -> str:
        """Text, or a list of parts, joined."""
        if self.next_char == "[":
            return "".join(self._part(f"{place}: part {number}") for number in self._items("[", "]"))
        return self._read_text(place, or_else=" and a list of parts")

    def _part(self, place: str) -> str:
        self._num_parts += 1
        require_few(self._num_parts, "parts of contents", self._max_messages)

        def read_type() -> str:
            kind = self._read_text(f"{place}: type")
            if kind != "text":
                raise UnsupportedError(f"chat: {place} has the type {_quote(kind)}; served is text")
            return kind

        readers = {"type": read_type, "text": lambda: self._read_text(f"{place}: text")}
        return self._object(place, readers)["text"]

    def _object(self, place: str, readers: Mapping[str, Callable[[], str]]) -> dict[str, str]:
        """An object with exactly these keys, each read by its reader."""
        allowed = " and ".join(readers)
        self._require("{", f"{place} is {{found}}; allowed is an object of {allowed}")
        found: dict[str, str] = {}
        for _ in self._items("{", "}"):
            key = self._string()
            if key not in readers:
                raise InvalidArgumentError(
                    f"chat: {place} has the unknown key {_quote(key)}; allowed are {allowed}"
                )
            if key in found:
                raise InvalidArgumentError(f"chat: {place} has the key {key} twice")
            self._expect(":")
            found[key] = readers[key]()
        for key in readers:
            if key not in found:
                raise InvalidArgumentError(f"chat: {place} lacks the key {key}; needed are {allowed}")
        return {key: found[key] for key in readers}

    def _read_text(self, place: str, or_else: str = "") -> str:
        self._require('"', f"{place} is {{found}}; allowed is text{or_else}")
        text = self._string()
        if not is_unicode(text):
            raise InvalidArgumentError(f"chat: {place} has half of a surrogate pair, which is no text")
        return text

    def _require(self, char: str, wrong: str) -> None:
        """Check that the next value begins with `char`; otherwise raise an error that says what it is."""
        found = self.next_char
        kind = _KINDS.get(found) or ("a number" if found.isdigit() or found == "-" else "")
        if not kind:
            raise self._malformed("a value")
        if found != char:
            raise InvalidArgumentError("chat: " + wrong.format(found=kind))

    def _items(self, opening: str, closing: str) -> Iterator[int]:
        """Yield the number of each element, for the caller to read it."""
        self._expect(opening)
        number = 0
        if self.next_char != closing:
            yield number
            while self.next_char != closing:
                self._expect(",", f" or {closing}")
                number += 1
                yield number
        self._at += 1

    def _expect(self, char: str, or_else: str = "") -> None:
        if self.next_char != char:
            raise self._malformed(char + or_else)
        self._at += 1

    def _string(self) -> str:
        if self.next_char != '"':
            raise self._malformed('"')
        try:
            text, self._at = self._decode(self._text, self._at)
        except json.JSONDecodeError as error:
            raise InvalidArgumentError(
                f"chat: not JSON at character {error.pos}: {error.msg}; {AS_MESSAGES}"
            ) from error
        return str(text)

    def _malformed(self, expected: str) -> InvalidArgumentError:
        found = self.next_char
        return InvalidArgumentError(
            f"chat: not JSON at character {self._at}: expected {expected}, "
            f"found {_quote(found) if found else 'the end'}; {AS_MESSAGES}"
        )


def _quote(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
