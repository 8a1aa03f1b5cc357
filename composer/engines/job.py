"""What the embedded engine's worker works on: one call, its rows in the batch, and other work
between two steps. Knows nothing of threads."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from composer.engines.gated import Use
from composer.engines.model import LocalModel
from composer.engines.stopping import Answer
from composer.engines.traces import CallTrace
from composer.errors import ComposerError, EngineError
from composer.types import Call, Chunk


@dataclass(eq=False, slots=True)
class Job:
    """One call on its way. `cancelled` is set by the caller and read between steps."""

    call: Call
    loop: asyncio.AbstractEventLoop
    outbox: asyncio.Queue[Chunk | ComposerError]
    cancelled: bool = False
    prompt: list[int] = field(default_factory=list)
    budget: int = 0
    use: Use = field(default_factory=Use)
    trace: CallTrace | None = None
    weights: Mapping[str, tuple[float, ...]] | None = None
    open_rows: int = 0
    tokens: int = 0

    @property
    def final_length(self) -> int:
        return len(self.prompt) + self.budget


@dataclass(eq=False, slots=True)
class Row:
    """One choice of a job in the batch. `token` is its newest, not yet in the cache."""

    job: Job
    answer: Answer
    rng: random.Random
    token: int = -1


@dataclass(eq=False, slots=True)
class Task:
    """Something else to do with the model between two steps."""

    work: Callable[[LocalModel], Any]
    done: Future[Any]


def put_all(mail: Sequence[tuple[Job, Chunk | ComposerError]]) -> None:
    """Puts each into its job's outbox; to be called on the loop of these jobs."""
    for job, item in mail:
        job.outbox.put_nowait(item)


def for_caller(error: Exception) -> ComposerError:
    """An instance of its own per call: an exception raised twice keeps both tracebacks."""
    if isinstance(error, EngineError):
        return type(error)(str(error))
    if isinstance(error, ComposerError):
        return error
    wrapped = EngineError(f"the embedded engine failed on this call: {error!r}")
    wrapped.__cause__ = error
    return wrapped
