"""Which line is begun next, so that every model sees all its work while it is loaded.

Pure: knows no clock, no event loop and no scheduler. The order of *calls* is the scheduler's,
which knows what is loaded; what is decided here is which calls it gets to see.

A line stands in the queue of every server that its plan calls. A server whose begun calls have
become few draws the next line from its own queue. So a model that is loaded never runs out of
calls while any line still needs it, whichever model the line needs besides; the calls on those
others pile up until they are loaded. Every server is then loaded once where calls do not depend
on each other, which is the least there can be, whatever order the scheduler takes them in.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence

Calls = Sequence[tuple[str, str]]
"""Server and adapter ("" the base alone) of each call that a line is known to make."""

NOWHERE = ""
"""The server of a line that is known to call nobody: it could not be planned."""

NOWHERE_WINDOW = 16


class Backlog:
    """`window` calls per server are kept begun, by at most `most` lines in all.

    `most` bounds memory. Where lines call several servers of one device and only one of them
    fits, it also bounds how many lines can wait half-done, and so how often each is loaded:
    once per `most` such lines.
    """

    def __init__(
        self, lines: Mapping[int, Calls], *, windows: Mapping[str, int], most: int
    ) -> None:
        self._calls = {line: calls or ((NOWHERE, ""),) for line, calls in lines.items()}
        self._windows = {NOWHERE: NOWHERE_WINDOW, **windows}
        self._most = most
        self._left = set(self._calls)
        self._open: Counter[str] = Counter()
        self._begun: dict[int, Counter[str]] = {}
        self._queues = {server: deque(queue) for server, queue in self._grouped().items()}

    def _grouped(self) -> dict[str, list[int]]:
        """Each server's lines, those of one adapter together, otherwise in the input's order."""
        keys: dict[str, dict[int, tuple[str, ...]]] = {}
        for line, calls in self._calls.items():
            for server in dict(calls):
                adapters = tuple(sorted(a for s, a in calls if s == server))
                keys.setdefault(server, {})[line] = adapters
        return {
            server: sorted(lines, key=lambda line: (lines[line], line))
            for server, lines in keys.items()
        }

    @property
    def empty(self) -> bool:
        """Whether every line has been begun."""
        return not self._left

    def next(self) -> int | None:
        """A line to begin now, None: not before another call or line ends."""
        if len(self._begun) >= self._most:
            return None
        for server, queue in self._queues.items():
            if self._open[server] >= self._windows.get(server, 1):
                continue
            while queue:
                line = queue.popleft()
                if line in self._left:
                    return self._begin(line)
        return None

    def _begin(self, line: int) -> int:
        self._left.remove(line)
        counts = Counter(server for server, _ in self._calls.pop(line))
        self._begun[line] = counts
        self._open.update(counts)
        return line

    def called(self, line: int, server: str) -> None:
        """A call of the line has ended there; one that was not known beforehand is ignored."""
        counts = self._begun.get(line)
        if counts is not None and counts[server] > 0:
            counts[server] -= 1
            self._open[server] -= 1

    def ended(self, line: int) -> None:
        """The line has ended, with all its calls."""
        self._open.subtract(self._begun.pop(line))
