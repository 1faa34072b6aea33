"""Asks one model of a running server again and again, and says when it is dead or hung."""

from __future__ import annotations

from collections.abc import Callable

from manylora.serve.probe import Answer, Line, Probe

LOOKS_BETWEEN = 40
"""Looks from one answer to the next request for a token."""
BUSY_LOOKS = 120
"""Looks after which a token is late. It may be behind many others, so this alone means nothing."""
HUNG_LOOKS = 240
"""Looks that a refusal may take. A front end gives it alone and at once, whatever waits in the engine. Long
prompts are tokenised apart; one that has a thousand short ones to tokenise first is through in that time."""
MAX_BAD_ANSWERS = 2
"""In a row, by which a model is given up as dead."""


class ModelWatch:
    """Counts its looks, four a second, and compares no times: a pause of the whole machine is one look.

    It asks over two connections that it opens at the start and keeps. A server whose connections are all
    taken by others still answers on them; where they break, it is not judged until it can accept another one.
    """

    def __init__(
        self, address: str, model: str, say: Callable[[str], None], is_full: Callable[[], bool]
    ) -> None:
        """Connect.

        Args:
            is_full: whether the server can accept no other connection.
        """
        self._model = model
        self._say = say
        self._is_full = is_full
        self._token_line, self._refusal_line = Line(address), Line(address)
        for line in (self._token_line, self._refusal_line):
            line.open()
        self._token: Probe | None = None
        self._refusal: Probe | None = None
        self._num_looks = 0
        """Since the request for a token, or since its answer."""
        self._num_refusal_looks = 0
        self._num_bad = 0
        self._has_told_full = False

    def look(self) -> str:
        """Look once.

        Returns: what is wrong; empty when nothing is.
        """
        self._num_looks += 1
        problem = self._look_at_token() if self._token else ""
        if not self._token and self._num_looks >= LOOKS_BETWEEN:
            self._token = Probe(self._token_line, self._model)
            self._num_looks = 0
        return problem or (self._look_at_refusal(self._refusal) if self._refusal else "")

    def close(self) -> None:
        """Give up what is on its way, and the connections."""
        self._token = self._refusal = None
        self._token_line.close()
        self._refusal_line.close()

    def _look_at_token(self) -> str:
        assert self._token
        answer = self._token.poll(0)
        if answer is None:
            if self._num_looks % BUSY_LOOKS == 0 and not self._refusal:
                self._refusal = Probe(self._refusal_line, self._model, is_refused=True)
                self._num_refusal_looks = 0
            return ""
        text = self._token.text
        self._token = None
        self._num_looks = self._num_refusal_looks = 0
        return self._judge(answer, text, self._token_line)

    def _look_at_refusal(self, probe: Probe) -> str:
        answer = probe.poll(0)
        if answer is None:
            self._num_refusal_looks += 1
            if self._num_refusal_looks < HUNG_LOOKS:
                return ""
            if self._refusal_line.is_accepted or not self._is_full():
                return f"{self._model} hangs: it does not even refuse a request"
            self._num_refusal_looks = 0
            self._tell_full()
            return ""
        self._refusal = None
        if answer is not Answer.FOREIGN and self._token:
            self._say(f"{self._model} is busy: it has been asked for a token and has not come to it yet")
        return self._judge(answer, probe.text, self._refusal_line)

    def _judge(self, answer: Answer, text: str, line: Line) -> str:
        if answer is Answer.FOREIGN and not line.is_accepted and self._is_full():
            self._tell_full()
            return ""
        self._has_told_full = False
        self._num_bad = self._num_bad + 1 if answer is Answer.FOREIGN else 0
        return f"{self._model} does not answer: {text}" if self._num_bad >= MAX_BAD_ANSWERS else ""

    def _tell_full(self) -> None:
        if not self._has_told_full:
            self._say(
                f"{self._model} cannot be asked: the server has as many connections as it may have open "
                "files; bound them with a proxy in front, or raise the limit (ulimit -n)"
            )
        self._has_told_full = True
