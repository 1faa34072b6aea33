"""Asks one model of a running server again and again, and says when it is dead or hung."""

from __future__ import annotations

from collections.abc import Callable

from manylora.serve.probe import Answer, Probe

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
    """Counts its looks, four a second, and compares no times: a pause of the whole machine is one look."""

    def __init__(self, address: str, model: str, say: Callable[[str], None]) -> None:
        self._address = address
        self._model = model
        self._say = say
        self._token: Probe | None = None
        self._refusal: Probe | None = None
        self._num_looks = 0
        """Since the request for a token, or since its answer."""
        self._num_refusal_looks = 0
        self._num_bad = 0

    def look(self) -> str:
        """Look once.

        Returns: what is wrong; empty when nothing is.
        """
        self._num_looks += 1
        problem = self._look_at_token() if self._token else ""
        if not self._token and self._num_looks >= LOOKS_BETWEEN:
            self._token = Probe(self._address, self._model)
            self._num_looks = 0
        return problem or (self._look_at_refusal(self._refusal) if self._refusal else "")

    def close(self) -> None:
        """Give up what is on its way."""
        for probe in (self._token, self._refusal):
            if probe:
                probe.close()
        self._token = self._refusal = None

    def _look_at_token(self) -> str:
        assert self._token
        answer = self._token.poll(0)
        if answer is None:
            if self._num_looks % BUSY_LOOKS == 0 and not self._refusal:
                self._refusal = Probe(self._address, self._model, is_refused=True)
                self._num_refusal_looks = 0
            return ""
        text = self._token.text
        self.close()
        self._num_looks = 0
        return self._judge(answer, text)

    def _look_at_refusal(self, probe: Probe) -> str:
        answer = probe.poll(0)
        if answer is None:
            self._num_refusal_looks += 1
            if self._num_refusal_looks >= HUNG_LOOKS:
                return f"{self._model} hangs: it does not even refuse a request"
            return ""
        probe.close()
        self._refusal = None
        if answer is not Answer.FOREIGN:
            self._say(f"{self._model} is busy: it has been asked for a token and has not come to it yet")
        return self._judge(answer, probe.text)

    def _judge(self, answer: Answer, text: str) -> str:
        self._num_bad = self._num_bad + 1 if answer is Answer.FOREIGN else 0
        return f"{self._model} does not answer: {text}" if self._num_bad >= MAX_BAD_ANSWERS else ""
