"""Ctrl-C and SIGTERM: the first asks to stop, the second stops. Knows no batch."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def first_signal(stop: Callable[[], None]) -> Iterator[None]:
    """`stop` is called by the running event loop at the first of `SIGNALS`. From then on they have
    the system's own effect: the next one ends the process, whatever this one is busy with.

    Main thread only.
    """
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def first() -> None:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        stop()

    for number in SIGNALS:
        loop.add_signal_handler(number, first)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
