"""Whether a front end answers. Asked over HTTP, as a client would."""

from __future__ import annotations

import contextlib
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


class Line:
    """A connection that stays open, so that a server that cannot accept another one can still be asked."""

    def __init__(self, address: str) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=REPLY_TIMEOUT_S)
        self.is_accepted = False
        """An answer has come over this connection. Until then it may only wait for the server to take it."""

    def open(self) -> None:
        """Connect, if the server can be reached and takes it."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            self.send("GET", "/v2/health/live")
            self.receive()

    def send(self, method: str, path: str, body: str | None = None) -> None:
        """Send a request; connect first where there is no connection."""
        try:
            if self._connection.sock and self.has_news(0):
                # Nothing has been asked, so the server has closed it.
                self.close()
            self._connection.request(method, path, body)
        except BaseException:
            self.close()
            raise

    def has_news(self, wait_s: float) -> bool:
        """Say whether an answer, or its end, has begun to come."""
        return bool(select.select([self._connection.sock], [], [], wait_s)[0])

    def receive(self) -> tuple[int, str]:
        """The status and the text of the answer."""
        try:
            response = self._connection.getresponse()
            text = response.read().decode(errors="replace").strip()
        except BaseException:
            self.close()
            raise
        # The server may have closed it behind its answer.
        self.is_accepted = self._connection.sock is not None
        return response.status, text

    def close(self) -> None:
        self._connection.close()
        self.is_accepted = False


class Probe:
    """A request for one token of the base model, on its way."""

    def __init__(self, line: Line, model: str, *, is_refused: bool = False) -> None:
        """Send it.

        Args:
            line: with nothing else on it until the answer has come.
            is_refused: ask for what the front end refuses without a word to the engine.
        """
        self.text = ""
        """The answer, or why there is none."""
        self._failure: OSError | http.client.HTTPException | None = None
        self._line = line
        verb = "generate_stream" if model == STREAMING_MODEL else "generate"
        body = json.dumps({"text_input": "1 + 1 =", "max_tokens": 0 if is_refused else 1})
        try:
            line.send("POST", f"/v2/models/{model}/{verb}", body)
        except (OSError, http.client.HTTPException) as error:
            self._failure = error

    def poll(self, wait_s: float) -> Answer | None:
        """Wait a while for the answer. None: it has not come yet."""
        try:
            if self._failure:
                raise self._failure
            if not self._line.has_news(wait_s):
                return None
            _, self.text = self._line.receive()
        except (OSError, http.client.HTTPException) as error:
            self.text = f"{type(error).__name__}: {error}"
            return Answer.FOREIGN
        if '"text_output"' in self.text:
            return Answer.RIGHT
        return Answer.ERROR if _TAGGED.search(self.text) else Answer.FOREIGN


def is_ready(address: str, model: str) -> bool:
    """Say whether Triton calls the model ready, which it goes on doing when the model's process is dead."""
    status, _ = _get(address, f"/v2/models/{model}/ready")
    return status == 200


def server_id(address: str) -> str:
    """The `--id` of the tritonserver that answers; empty where none does, or something else."""
    status, text = _get(address, "/v2")
    try:
        return str(json.loads(text)["name"]) if status == 200 else ""
    except (ValueError, TypeError, KeyError):
        return ""


def _get(address: str, path: str) -> tuple[int, str]:
    """Status and text of an answer; status 0 where none comes."""
    line = Line(address)
    try:
        line.send("GET", path)
        return line.receive()
    except (OSError, http.client.HTTPException):
        return 0, ""
    finally:
        line.close()
