"""Whether a front end answers. Asked over HTTP, as a client would."""

from __future__ import annotations

import enum
import http.client
import json
import re
import select

from manylora.serve.repository import STREAMING_MODEL

REPLY_TIMEOUT_S = 5.0
"""From the first byte of an answer to its end, and for answers that need no model."""

_TAGGED = re.compile(r"\[[A-Z_]+\] ")


class Answer(enum.Enum):
    """What came back from a model."""

    RIGHT = enum.auto()
    """A token."""
    ERROR = enum.auto()
    """An error that the front end has written, so it is alive."""
    FOREIGN = enum.auto()
    """Triton's own error, as it gives for a dead front end, or no connection."""


class Probe:
    """A request for one token of the base model, on its way."""

    def __init__(self, address: str, model: str, *, is_refused: bool = False) -> None:
        """Send it.

        Args:
            is_refused: ask for what the front end refuses without a word to the engine.
        """
        self.text = ""
        """The answer, or why there is none."""
        self._failure: OSError | None = None
        self._connection = http.client.HTTPConnection(address, timeout=REPLY_TIMEOUT_S)
        verb = "generate_stream" if model == STREAMING_MODEL else "generate"
        body = json.dumps({"text_input": "1 + 1 =", "max_tokens": 0 if is_refused else 1})
        try:
            self._connection.request("POST", f"/v2/models/{model}/{verb}", body)
        except OSError as error:
            self._failure = error

    def poll(self, wait_s: float) -> Answer | None:
        """Wait a while for the answer. None: it has not come yet."""
        try:
            if self._failure:
                raise self._failure
            if not select.select([self._connection.sock], [], [], wait_s)[0]:
                return None
            self.text = self._connection.getresponse().read().decode(errors="replace").strip()
        except (OSError, http.client.HTTPException) as error:
            self.text = f"{type(error).__name__}: {error}"
            return Answer.FOREIGN
        if '"text_output"' in self.text:
            return Answer.RIGHT
        return Answer.ERROR if _TAGGED.search(self.text) else Answer.FOREIGN

    def close(self) -> None:
        self._connection.close()


def is_ready(address: str, model: str) -> bool:
    """Say whether Triton calls the model ready, which it goes on doing when the model's process is dead."""
    connection = http.client.HTTPConnection(address, timeout=REPLY_TIMEOUT_S)
    try:
        connection.request("GET", f"/v2/models/{model}/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
