"""Input files, and a runner over fake parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from api.batching import WireCodec
from composer.batch.answers import Answers
from composer.batch.lines import Lines
from composer.batch.runner import Runner, Unwatched
from composer.generations import Generations
from composer.outcome import Outcome
from composer.pipeline import Pipeline
from composer.scheduling.base import Scheduler
from tests.fakes import FakeScheduler, Stage

CHAT = "/v1/chat/completions"
ENDPOINTS = WireCodec.endpoints


def line(custom_id: str, text: str = "please alpha", **fields: Any) -> dict[str, Any]:
    """A good line; `fields` replace those of it, `body` of its body."""
    body = {"messages": [{"role": "user", "content": text}], **fields.pop("body", {})}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body, **fields}


def write(path: Path, lines: Sequence[Mapping[str, Any] | str]) -> Path:
    texts = [one if isinstance(one, str) else json.dumps(one) for one in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def content(answered: Mapping[str, Any]) -> str:
    """The text of an output line."""
    said: str = answered["response"]["body"]["choices"][0]["message"]["content"]
    return said


class Bench:
    """A runner over one stage, and what the pipeline recorded."""

    def __init__(
        self, staged: Stage, scheduler: Scheduler | None = None, *, concurrency: int = 4096
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.scheduler = scheduler or FakeScheduler()
        self.generations = Generations(lambda _: None)
        self.generations.swap(staged.generation)
        pipeline = Pipeline(self.generations, self.scheduler, self.outcomes.append)
        self.runner = Runner(
            pipeline, self.generations, self.scheduler, WireCodec(), concurrency=concurrency
        )

    async def run(self, source: Path, target: Path) -> list[dict[str, Any]]:
        """Answers what is not yet answered in `target`.partial; the whole output."""
        lines = Lines(source, ENDPOINTS)
        partial = target.with_name(target.name + ".partial")
        answers = Answers(partial, digest=lines.digest, lines=len(lines))
        try:
            await self.runner.run(lines, answers, Unwatched())
            answers.write(target)
        finally:
            await answers.aclose()
            lines.close()
        return read(target)
