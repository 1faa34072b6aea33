"""Text of a sequence while it grows, token by token, and the stop strings that end it."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from manylora.text import Tokenizer


class StopMatcher:
    """Finds one stop string in a text that arrives in parts. Every character is looked at once."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._fallback = _borders(stop)
        self.num_matched = 0
        """Length of the longest proper beginning of the stop string that the text so far ends with."""

    def feed(self, text: str) -> int | None:
        """Look at the next part.

        Returns: where the first full match begins, counted from the start of this part (below 0 when it began
        in an earlier one), or None.
        """
        found: int | None = None
        for end, char in enumerate(text, start=1):
            while self.num_matched and self._stop[self.num_matched] != char:
                self.num_matched = self._fallback[self.num_matched - 1]
            if self._stop[self.num_matched] == char:
                self.num_matched += 1
            if self.num_matched == len(self._stop):
                self.num_matched = self._fallback[-1]
                if found is None:
                    found = end - len(self._stop)
        return found


class TextStream:
    """Turns the ids of one sequence into text deltas.

    The deltas joined are `tokenizer.decode(all ids)`, cut before the first stop string. No delta ends within
    a character or within what may become a stop string; such an end is held back. The cost is linear.

    Bytes that are not UTF-8 become U+FFFD. Where a tokenizer with byte fallback replaces a whole run of byte
    tokens for one bad byte in it, the good characters of the run are kept here.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        continues: bool = False,
    ) -> None:
        """Begin a sequence.

        Args:
            stop: strings that end it, none empty.
            min_tokens: a stop string completed before so many tokens does not end it.
            continues: the text is shown right after its prompt, so a leading space counts.
        """
        self._tokenizer = tokenizer
        self._matchers = [StopMatcher(text) for text in stop]
        self._min_tokens = min_tokens
        self._is_first = not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.num_tokens = 0
        """Ids taken so far."""
        self.stopped = False
        """A stop string is complete; nothing more is taken."""

    def add(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Take the next ids.

        Returns: the text that can be shown now, and how many of the ids were taken: all, or those up to the
        one that completed a stop string.
        """
        if not self._matchers:
            self.num_tokens += len(token_ids)
            return self._utf8.decode(self._bytes(token_ids)), len(token_ids)
        shown = []
        for taken, token_id in enumerate(token_ids, start=1):
            self.num_tokens += 1
            shown.append(self._match(self._utf8.decode(self._bytes((token_id,)))))
            if self.stopped:
                return "".join(shown), taken
        return "".join(shown), len(token_ids)

    def finish(self) -> str:
        """End the sequence: what was held back, which can no longer grow."""
        if self.stopped:
            return ""
        text = self._match(self._utf8.decode(b"", final=True))
        if self.stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _bytes(self, token_ids: Iterable[int]) -> bytes:
        pieces = []
        for token_id in token_ids:
            piece = (
                self._tokenizer.first_piece(token_id) if self._is_first else self._tokenizer.piece(token_id)
            )
            if piece is not None:
                pieces.append(piece)
                self._is_first = False
        return b"".join(pieces)

    def _match(self, text: str) -> str:
        """Run the matchers over new text; return what is safe to show."""
        starts = [start for matcher in self._matchers if (start := matcher.feed(text)) is not None]
        start_of_text = len(self._held)
        text = self._held + text
        if starts and self.num_tokens >= self._min_tokens:
            self.stopped = True
            self._held = ""
            return text[: start_of_text + min(starts)]
        num_held = max((matcher.num_matched for matcher in self._matchers), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _borders(text: str) -> list[int]:
    """For each beginning of `text`, the length of its longest proper beginning that is also its end.

    `abab` gives [0, 0, 1, 2].
    """
    borders = [0]
    for char in text[1:]:
        length = borders[-1]
        while length and text[length] != char:
            length = borders[length - 1]
        borders.append(length + (text[length] == char))
    return borders
