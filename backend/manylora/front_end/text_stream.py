"""The text of a sequence as it grows token by token, and the stop strings that end it."""

from __future__ import annotations

import codecs
import functools
from collections import deque
from collections.abc import Iterable, Sequence

from manylora.front_end.text import Tokenizer


class StopMatcher:
    """Finds one stop string in a text that arrives in parts. Every character is examined once."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._fallback = _borders(stop)
        self.num_matched = 0
        """Length of the longest proper prefix of the stop string with which the text so far ends."""

    def feed(self, text: str) -> int | None:
        """Search the next part.

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

    Joined, the deltas are `tokenizer.decode(all ids)`, cut before the first stop string. No delta ends within
    a character or within what may become a stop string; such an end is held back. The cost is linear.

    A stop string that names a special token is searched for in the text with special tokens written out, any
    other one in the text as it is shown, without them.

    Bytes that are not UTF-8 become U+FFFD. A tokenizer with byte fallback replaces a whole run of byte tokens
    if one of its bytes is bad; here the good characters of the run are kept.
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
        special = [text for text in stop if tokenizer.names_special(text)]
        self._matchers = [StopMatcher(text) for text in stop if not tokenizer.names_special(text)]
        self._special_matchers = [StopMatcher(text) for text in special]
        self._names = SpecialNames(max(map(len, special), default=0))
        self._min_tokens = min_tokens
        self._is_first = not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._num_chars = 0
        """Of the text as it is shown, including what is held back."""
        self.num_tokens = 0
        """Ids so far."""
        self.stopped = False
        """A stop string is complete; no further ids are added."""

    def add(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Add the next ids.

        Returns: the text that can be shown now, and how many of the ids belong to the answer: all, or those
            up to the
        one that completed a stop string.
        """
        if not self._matchers and not self._special_matchers:
            self.num_tokens += len(token_ids)
            return self._utf8.decode(self._bytes(token_ids)), len(token_ids)
        shown = []
        for num_used, token_id in enumerate(token_ids, start=1):
            self.num_tokens += 1
            starts = self._match(self._utf8.decode(self._bytes((token_id,))))
            if self._special_matchers and self._tokenizer.piece(token_id) is None:
                starts += self._match_name(self._tokenizer.name(token_id))
            shown.append(self._release(starts))
            if self.stopped:
                return "".join(shown), num_used
        return "".join(shown), len(token_ids)

    def finish(self) -> str:
        """End the sequence. Returns the text that was held back, which can no longer grow."""
        if self.stopped:
            return ""
        text = self._release(self._match(self._utf8.decode(b"", final=True)))
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

    def _match(self, text: str) -> list[int]:
        """Run the matchers over new text that is shown.

        Returns: where the matches that it completes begin, in the text as it is shown.
        """
        before = self._num_chars
        self._held += text
        self._num_chars += len(text)
        starts = [before + start for m in self._matchers if (start := m.feed(text)) is not None]
        return starts + self._match_special(text, before + self._names.num_chars)

    def _match_name(self, name: str) -> list[int]:
        """The same for a special token, which is not shown."""
        before = self._num_chars + self._names.num_chars
        self._names.add(before, name)
        return self._match_special(name, before)

    def _match_special(self, text: str, before: int) -> list[int]:
        found = [start for m in self._special_matchers if (start := m.feed(text)) is not None]
        return [self._names.num_shown(before + start) for start in found]

    def _release(self, starts: Sequence[int]) -> str:
        """What can now be shown of the text that is held back, given the starts of completed matches."""
        held_from = self._num_chars - len(self._held)
        if starts and self.num_tokens >= self._min_tokens:
            self.stopped = True
            text, self._held = self._held[: min(starts) - held_from], ""
            return text
        num_written = self._num_chars + self._names.num_chars
        hold = [self._num_chars - m.num_matched for m in self._matchers]
        hold += [self._names.num_shown(num_written - m.num_matched) for m in self._special_matchers]
        num_free = min(hold, default=self._num_chars) - held_from
        text, self._held = self._held[:num_free], self._held[num_free:]
        return text


class SpecialNames:
    """Where the names of special tokens are in a text in which they are written out.

    Args:
        reach: how far back from the end of the text `num_shown` can look.
    """

    def __init__(self, reach: int) -> None:
        self._reach = reach
        self._spans: deque[tuple[int, int]] = deque()
        """Start and end of each name within the reach."""
        self.num_chars = 0
        """Of all names so far."""

    def add(self, start: int, name: str) -> None:
        """Add a name at the end of the text.

        Args:
            start: characters of the text in front of it, names included.
        """
        end = start + len(name)
        self._spans.append((start, end))
        self.num_chars += len(name)
        while self._spans[0][1] <= end - self._reach:
            self._spans.popleft()

    def num_shown(self, place: int) -> int:
        """How many characters before a place, at most `reach` from the end, belong to no name."""
        num_hidden = self.num_chars
        for start, end in reversed(self._spans):
            if end <= place:
                break
            num_hidden -= end - max(start, place)
        return place - num_hidden


# The sequences of a request often have their stop strings in common, as have the requests of an application.
@functools.lru_cache(maxsize=1024)
def _borders(text: str) -> tuple[int, ...]:
    """For each prefix of `text`, the length of its longest proper prefix that is also its suffix.

    `abab` gives (0, 0, 1, 2).
    """
    borders = [0]
    for char in text[1:]:
        length = borders[-1]
        while length and text[length] != char:
            length = borders[length - 1]
        borders.append(length + (text[length] == char))
    return tuple(borders)
