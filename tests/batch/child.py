"""`composer batch` over fake experts in a process of its own, for tests that kill it.

    python -m tests.batch.child IN OUT TRACE [STUCK]

Every question an engine is asked becomes a line of TRACE the moment it is asked. One that holds
the text STUCK is never answered.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from rich.console import Console

from api.batching import WireCodec
from composer.batch.command import answer_file
from composer.registry.watch import Watcher
from composer.service import Service
from composer.types import Call, Chunk, Usage, message_text
from tests.api.fakes import ScriptedEngine, make_world


class TracingEngine(ScriptedEngine):
    """Answers after 5 to 25 ms."""

    def __init__(self, trace: Path, stuck: str | None = None) -> None:
        super().__init__()
        self._stuck = stuck
        self._fd = os.open(trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._rng = random.Random()

    async def run(self, call: Call) -> AsyncGenerator[Chunk, None]:
        text = message_text(call.messages[-1])
        os.write(self._fd, f"{text}\n".encode())
        if self._stuck is not None and self._stuck in text:
            await asyncio.Event().wait()
        await asyncio.sleep(self._rng.uniform(0.005, 0.025))
        yield Chunk(text=f"{call.expert}: {text}", finish_reason="stop", usage=Usage(1, 1))


async def idle(watcher: object, changed: object, stop: asyncio.Event) -> None:
    """In place of `Watcher.run`: there is no file to watch."""
    await stop.wait()


def main(source: str, target: str, trace: str, stuck: str | None = None) -> None:
    Watcher.run = idle  # type: ignore[assignment,method-assign]

    def make() -> Service:
        world = make_world(in_flight=16)
        capacity = world.engine.capacity
        world.engine = TracingEngine(Path(trace), stuck)
        world.engine.capacity = capacity
        return world.service

    answer_file(make, WireCodec(), Path(source), Path(target), console=Console(stderr=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
