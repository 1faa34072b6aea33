"""Server-sent events, as `/generate_stream` writes them."""

from __future__ import annotations


class EventParser:
    """Turn bytes, cut anywhere, into the data of whole events.

    An event is its `data:` lines up to an empty line; lines end with LF or CR LF. Comments and other fields
    are skipped, as the event stream format says.

        parser.feed(b'data: {"a"')     -> []
        parser.feed(b':1}\\n\\ndata: 2') -> ['{"a":1}']
        parser.rest()                  -> 'data: 2'

    Source: HTML Living Standard, section 9.2 Server-sent events.
    """

    def __init__(self) -> None:
        self._partial = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[str]:
        """Add bytes and return the data of the events that they complete.

        Raises:
            UnicodeDecodeError: an event's data is not UTF-8.
        """
        *lines, self._partial = (self._partial + received).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data).decode())
                self._data = []
        return events

    def rest(self) -> str:
        """What has been received of an event that is not complete."""
        return b"\n".join([*self._data, self._partial]).decode(errors="replace").strip()
