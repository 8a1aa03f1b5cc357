"""Says that something is being waited for: one moving line each on a terminal, else a log line
now and then. Knows nothing of what it is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.spinner import Spinner
from rich.text import Text

LOG_EVERY_S = 10.0


class _Board:
    """The lines of all that is waited for at this moment, below the log of one terminal."""

    def __init__(self) -> None:
        self._lines: dict[object, Spinner] = {}
        self._live: Live | None = None

    def show(self, key: object, text: str, console: Console) -> None:
        line = Text(text, no_wrap=True, overflow="ellipsis")
        if key in self._lines:
            self._lines[key].update(text=line)
        else:
            self._lines[key] = Spinner("dots", line)
            if self._live is None:
                self._live = Live(console=console, transient=True, get_renderable=self._render)
                self._live.start()
            self._live.refresh()

    def drop(self, key: object) -> None:
        self._lines.pop(key, None)
        if not self._lines and self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self) -> Group:
        return Group(*self._lines.values())


_board = _Board()


def terminal() -> Console | None:
    """The one that the log is written to, so that both can share it; None: the log goes to a
    file, or is not ours."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, RichHandler) and handler.console.is_terminal:
            return handler.console
    return None


@contextmanager
def waiting(what: str, log: logging.Logger) -> Iterator[Callable[[str], None]]:
    """Calls of the yielded function show `what`, the seconds since the beginning, and its text."""
    started = last = time.monotonic()
    key = object()
    console = terminal()

    def tell(text: str) -> None:
        nonlocal last
        now = time.monotonic()
        line = f"{what}, {now - started:.0f} s: {text}"
        if console is not None:
            _board.show(key, line, console)
        elif now - last >= LOG_EVERY_S:
            last = now
            log.info("%s", line)

    try:
        yield tell
    finally:
        _board.drop(key)
