"""The replay engine: recorded answers of a real model, each after the time it would have taken.

Knows nothing of scores and of which answer is right. With it, whatever stands above an engine runs
at the accuracies of real models, without their weights.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncGenerator, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from composer.adapters.lora_config import AdapterFeature
from composer.engines.base import Capacity, Health
from composer.engines.outcomes import OutcomeTable, Recorded, listed, read_table
from composer.errors import EngineError, EngineUnavailable, Unsupported
from composer.types import (
    Ability,
    Adapter,
    Call,
    Chunk,
    Message,
    Placement,
    Tier,
    Usage,
    last_user_text,
)

_PIECE = re.compile(r"\s*\S+\s*|\s+")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


class ReplaySettings(BaseModel):
    """One model of one or more outcome tables, and the server that it is taken to run on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: Annotated[tuple[Path, ...], BeforeValidator(_listed)] = Field(
        min_length=1,
        description="CSV file with recorded answers, gzipped or not, or a list of them; of a "
        "question that stands in several the first counts.",
    )
    model: str = Field(min_length=1, description="Whose answers: MODEL of `answer|MODEL`.")
    tokens_per_s: float = Field(
        50.0, gt=0, allow_inf_nan=False, description="Pace of every answer."
    )
    first_token_s: float = Field(
        0.2, ge=0, allow_inf_nan=False, description="Seconds before an answer begins."
    )
    chars_per_token: float = Field(
        4.0,
        gt=0,
        allow_inf_nan=False,
        description="For tokens out of recorded characters: the tables count no tokens.",
    )
    assumed_tokens: int = Field(
        256, ge=0, description="Length, for its duration alone, of an answer recorded without one."
    )
    time_scale: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds for each second of an answer: 0.1 is ten times as fast, 0 at once.",
    )
    start_s: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Seconds a load takes; default: what the placement says.",
    )
    stop_s: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Seconds an unload takes; default: what the placement says.",
    )
    in_flight: int = Field(32, ge=1, description="Calls answered at once.")
    queue: int = Field(64, ge=0, description="Calls waiting before new ones are refused (503).")


class ReplayEngine:
    """Answers the questions of its tables with what its model answered, and refuses all others.

    The question is the raw prompt or the last user message, white space collapsed; what came
    before it is not read. An answer takes `first_token_s` and then its recorded length at
    `tokens_per_s`, whatever else runs; its words are spread over that time, the last one at its
    end. Usage is the recorded lengths over `chars_per_token`, an estimate; where one of the two was
    not recorded there is none.

    `temperature`, `top_p`, `seed`, `stop` and `max_tokens` change nothing: the answer was drawn
    when it was recorded. More than one choice, logprobs, tools, formats and images are refused.
    """

    name: ClassVar[str] = "replay"
    tier: ClassVar[Tier] = "supported"
    settings: ClassVar[type[BaseModel]] = ReplaySettings
    honours: ClassVar[frozenset[Ability]] = frozenset()
    adapter_features: ClassVar[frozenset[AdapterFeature]] = frozenset()
    model_field: ClassVar[str | None] = None
    path_fields: ClassVar[tuple[str, ...]] = ("table",)
    program_fields: ClassVar[tuple[str, ...]] = ()
    parameters: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def check(cls, settings: ReplaySettings, placement: Placement | None) -> None:
        if placement is None:
            for field in ("start_s", "stop_s"):
                if getattr(settings, field) is not None:
                    raise ValueError(
                        f"without a placement nothing is loaded or unloaded; remove `{field}`, or "
                        "add `placement`"
                    )
        elif placement.sleep_level is not None:
            raise ValueError("a replayed model cannot sleep; remove `sleep_level`")

    @classmethod
    def check_adapters(cls, settings: ReplaySettings) -> None:
        raise ValueError(
            "replays recorded answers, which no adapter can change; remove the adapter"
        )

    def __init__(
        self, server: str, settings: ReplaySettings, *, placement: Placement | None = None
    ) -> None:
        self._server = server
        self._settings = settings
        self._start_s = placement.start_s if placement else 0.0
        if settings.start_s is not None:
            self._start_s = settings.start_s
        self._stop_s = placement.stop_s if placement else 0.0
        if settings.stop_s is not None:
            self._stop_s = settings.stop_s
        self._tables: tuple[OutcomeTable, ...] | None = None
        self._moving = asyncio.Lock()
        self._stopped: asyncio.Event | None = None  # of the present start; None while stopped
        self._closed = asyncio.Event()

    @property
    def capacity(self) -> Capacity:
        return Capacity(self._settings.in_flight, self._settings.queue)

    @property
    def external(self) -> bool:
        return False

    async def start(self) -> None:
        async with self._moving:
            if self._stopped is None:
                await self._read()
                await _wait(self._start_s, self._closed)
            if self._closed.is_set():
                raise self._not_running()
            if self._stopped is None:
                self._stopped = asyncio.Event()

    async def stop(self) -> None:
        async with self._moving:
            stopped, self._stopped = self._stopped, None
            if stopped is not None:
                stopped.set()
                await _wait(self._stop_s, self._closed)

    async def prepare(self, adapters: Collection[Adapter]) -> None:
        """Also reads the tables: what is wrong with them is told before the first load."""
        if adapters:
            raise EngineError(
                f"server {self._server!r} replays recorded answers, which no adapter can change; "
                "remove `adapter` from its experts"
            )
        if self._closed.is_set():
            raise self._not_running()
        await self._read()

    async def retain(self, adapters: Collection[Adapter]) -> None:
        """There are none to forget."""

    async def run(self, call: Call) -> AsyncGenerator[Chunk, None]:
        stopped = self._running()
        _refuse(call)
        recorded = self._find(call.messages, call.prompt)
        begin = self._settings.first_token_s * self._settings.time_scale
        duration = self._duration_s(recorded) * self._settings.time_scale
        pieces = _PIECE.findall(recorded.answer)
        clock = asyncio.get_running_loop().time
        began = clock()
        for number, piece in enumerate(pieces, start=1):
            due = began + begin + duration * number / len(pieces)
            await self._until(due - clock(), stopped)
            yield Chunk(text=piece)
        await self._until(began + begin + duration - clock(), stopped)
        yield Chunk(finish_reason="stop", usage=self._usage(recorded))

    async def count_tokens(self, messages: Sequence[Message], prompt: str | None) -> int:
        recorded = self._find(messages, prompt)
        if recorded.in_chars is None:
            raise Unsupported(f"server {self._server!r} replays a table without prompts' lengths")
        return self._tokens(recorded.in_chars)

    async def health(self) -> Health:
        if self._closed.is_set():
            return Health("failed", "it is closed")
        if self._stopped is not None:
            return Health("ready")
        return Health("starting" if self._moving.locked() else "off")

    async def close(self) -> None:
        self._closed.set()
        stopped, self._stopped = self._stopped, None
        if stopped is not None:
            stopped.set()

    async def _read(self) -> None:
        if self._tables is not None:
            return
        model = self._settings.model
        try:
            tables = [await asyncio.to_thread(read_table, one) for one in self._settings.table]
        except ValueError as error:
            raise EngineUnavailable(f"server {self._server!r}: {error}") from error
        for table in tables:
            if model not in table.models:
                raise EngineUnavailable(
                    f"server {self._server!r}: {table.path} holds no answers of {model!r}; set "
                    f"`model` to one of its models: {listed(table.models)}"
                )
        self._tables = tuple(tables)

    def _find(self, messages: Sequence[Message], prompt: str | None) -> Recorded:
        """Raises Unsupported for what nobody asked when the tables were made."""
        question = last_user_text(messages) if prompt is None else prompt
        for table in self._tables or ():
            recorded = table.find(question, self._settings.model)
            if recorded is not None:
                return recorded
        raise Unsupported(
            f"server {self._server!r} replays recorded answers and has none to this question; ask "
            "one of its tables' questions, options included, word for word",
            param="messages" if prompt is None else "prompt",
        )

    def _duration_s(self, recorded: Recorded) -> float:
        tokens: float = self._settings.assumed_tokens
        if recorded.out_chars is not None:
            tokens = recorded.out_chars / self._settings.chars_per_token
        return tokens / self._settings.tokens_per_s

    def _usage(self, recorded: Recorded) -> Usage | None:
        if recorded.in_chars is None or recorded.out_chars is None:
            return None
        return Usage(self._tokens(recorded.in_chars), self._tokens(recorded.out_chars))

    def _tokens(self, chars: int) -> int:
        return math.ceil(chars / self._settings.chars_per_token)

    async def _until(self, seconds: float, stopped: asyncio.Event) -> None:
        await _wait(seconds, stopped)
        if stopped.is_set():
            raise self._not_running()

    def _running(self) -> asyncio.Event:
        if self._stopped is None:
            raise self._not_running()
        return self._stopped

    def _not_running(self) -> EngineUnavailable:
        state = "closed" if self._closed.is_set() else "not running"
        return EngineUnavailable(f"the replay engine of server {self._server!r} is {state}")


async def _wait(seconds: float, ended: asyncio.Event) -> None:
    """Until the seconds are over, or the event."""
    if seconds <= 0:
        await asyncio.sleep(0)
        return
    try:
        async with asyncio.timeout(seconds):
            await ended.wait()
    except TimeoutError:
        pass


def _refuse(call: Call) -> None:
    """Raises Unsupported, naming the field, for what a recording could only ignore."""
    extra = {key: value for key, value in call.extra.items() if value not in (None, [], {})}
    if extra.get("tool_choice") in ("none", "auto"):
        del extra["tool_choice"]  # both are true of an answer without tools
    if (extra.get("response_format") or {}).get("type") == "text":
        del extra["response_format"]
    fields = sorted(extra)
    if call.sampling.n != 1:
        fields.append("n")
    if call.sampling.logprobs is not None:
        fields.append("logprobs")
    if fields:
        raise Unsupported(
            f"expert {call.expert!r} replays recorded answers, one a question; drop `{fields[0]}`",
            param=fields[0],
        )
    for number, message in enumerate(call.messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part.get("type") != "text":
                raise Unsupported(
                    f"the replay engine reads text alone, not {part.get('type')!r}",
                    param=f"messages.{number}.content",
                )
