"""Server-sent events out of a byte stream. Knows nothing of what the events say."""

from __future__ import annotations

import re

MOST_BYTES = 64 * 2**20
"""Of one event: beyond it, whatever sends this is no model server."""

_BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2}")


class TooLong(Exception):
    """An event that does not end."""


class EventSplitter:
    """Gives the `data` of each event as its last byte comes in, however the stream is cut.

    Follows the WHATWG's grammar: lines end in LF, CR or CRLF, several `data` lines are joined by
    LF, comments and other fields are dropped. What is cut off at the stream's end is no event.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, received: bytes) -> list[bytes]:
        """The data of the events that are complete now. Raises TooLong."""
        data = self._rest + received if self._rest else received
        parts = data.split(b"\n\n") if b"\r" not in data else _BLANK_LINE.split(data)
        self._rest = parts.pop()
        if len(self._rest) > MOST_BYTES:
            raise TooLong(f"an event of more than {MOST_BYTES} bytes")
        return [found for part in parts if (found := _data(part)) is not None]


def _data(event: bytes) -> bytes | None:
    event = event.lstrip(b"\r\n")
    if event.startswith(b"data: ") and b"\n" not in event and b"\r" not in event:
        return event[6:]  # what every model server sends
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line[:5] == b"data:"]
    return b"\n".join(lines) if lines else None
