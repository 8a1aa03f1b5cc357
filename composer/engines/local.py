"""The embedded engine: transformers and peft in this process, many adapters on one base.

Knows nothing of scheduling: whoever gives the leases keeps the number of calls within `max_batch`
and `queue`. Importing it imports no torch, so that a registry can be checked quickly.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from composer.adapters.lora_config import AdapterFeature
from composer.engines.base import Capacity, Health
from composer.engines.prompts import encode, refuse
from composer.errors import ComposerError, EngineFull, EngineUnavailable
from composer.types import Ability, Adapter, Call, Chunk, Message, Placement, Tier

if TYPE_CHECKING:
    from composer.engines.model import LocalModel
    from composer.engines.worker import Worker


class EmbeddedSettings(BaseModel):
    """One base model in this process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="Folder of the base model, or its Hugging Face hub name.")
    revision: str | None = Field(None, description="Commit, tag or branch of a hub model.")
    model_name: str | None = Field(
        None, description="The base model's name in adapters' configs, where it is another."
    )
    device: str = Field("cpu", description="A torch device: cpu, cuda:0 …")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_batch: int = Field(16, ge=1, le=1024, description="Answers generated at once.")
    queue: int = Field(64, ge=0, description="Calls waiting before new ones are refused (503).")
    max_adapters: int = Field(64, ge=1, description="Adapters in memory at once.")
    context_window: int | None = Field(
        None, ge=2, description="Prompt and answer in tokens; default: what the model allows."
    )
    kv_tokens: int | None = Field(
        None,
        ge=2,
        description="Most tokens the batch's cache may grow to (answers times the longest of "
        "them, since rows are padded); default: no limit but max_batch.",
    )
    prefill_tokens: int = Field(
        8192, ge=1, description="Prompt tokens read between two steps of those already running."
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of this model; default: what the process has set."
    )


class EmbeddedEngine:
    """Continuous batching over one base model. Every row of a batch may use another adapter."""

    name: ClassVar[str] = "embedded"
    tier: ClassVar[Tier] = "supported"
    settings: ClassVar[type[BaseModel]] = EmbeddedSettings
    honours: ClassVar[frozenset[Ability]] = frozenset({"logprobs"})
    adapter_features: ClassVar[frozenset[AdapterFeature]] = frozenset(
        {"rank_pattern", "alpha_pattern", "gate", "two_pass_gate", "per_request_gate"}
    )
    model_field: ClassVar[str | None] = "model"
    path_fields: ClassVar[tuple[str, ...]] = ()
    program_fields: ClassVar[tuple[str, ...]] = ()
    parameters: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def check(cls, settings: EmbeddedSettings, placement: Placement | None) -> None:
        if placement is not None and placement.sleep_level is not None:
            raise ValueError("an embedded model cannot sleep; remove `sleep_level`")

    @classmethod
    def check_adapters(cls, settings: EmbeddedSettings) -> None:
        """It takes them, whatever its settings."""

    def __init__(
        self, server: str, settings: EmbeddedSettings, *, placement: Placement | None = None
    ) -> None:
        self._server = server
        self._settings = settings
        self._worker: Worker | None = None
        self._prepared: dict[str, Adapter] = {}
        self._changing = asyncio.Lock()
        self._stopped = True
        self._closed = False
        self._failure = ""  # of the last start

    @property
    def capacity(self) -> Capacity:
        return Capacity(self._settings.max_batch, self._settings.queue)

    @property
    def external(self) -> bool:
        return False

    async def start(self) -> None:
        # Seconds of imports: off the event loop, and only where an embedded server is used.
        await asyncio.to_thread(import_module, "composer.engines.worker")
        from composer.engines.worker import Worker

        if self._closed:
            raise self._not_running()
        if self._worker is None or not self._worker.alive:
            self._worker = Worker(self._server, self._settings)
        self._stopped, self._failure = False, ""
        worker = self._worker
        try:
            await asyncio.wrap_future(worker.started)
            async with self._changing:
                if worker.alive:
                    await self._load(worker, self._prepared.values())
        except asyncio.CancelledError:
            worker.stop()  # it ends when what it loads is loaded; `close` waits for that
            raise
        except BaseException as error:
            worker.stop()
            self._worker = None  # its thread ends, and with it what it had loaded
            self._failure = str(error)
            raise
        if not worker.alive:  # closed or stopped meanwhile
            raise self._not_running()

    async def stop(self) -> None:
        self._stopped = True
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()
            await asyncio.to_thread(worker.join)

    async def prepare(self, adapters: Collection[Adapter]) -> None:
        if self._closed:
            raise self._not_running()
        async with self._changing:
            wanted = self._prepared | {adapter.digest: adapter for adapter in adapters}
            if (over := len(wanted) - self._settings.max_adapters) > 0:
                raise EngineFull(
                    f"server {self._server!r} would hold {len(wanted)} adapters; its "
                    f"max_adapters is {self._settings.max_adapters}",
                    over=over,
                )
            if not self._stopped:
                await self._load(self._running(), adapters)
            self._prepared = wanted

    async def retain(self, adapters: Collection[Adapter]) -> None:
        async with self._changing:
            kept = {adapter.digest for adapter in adapters}
            if not self._stopped:
                forget = self._running().do(lambda model: model.forget(adapters))
                await asyncio.wrap_future(forget)
            self._prepared = {d: a for d, a in self._prepared.items() if d in kept}

    @staticmethod
    async def _load(worker: Worker, adapters: Collection[Adapter]) -> None:
        wanted = tuple(adapters)
        await asyncio.wrap_future(worker.do(lambda model: model.load(wanted)))

    async def run(self, call: Call) -> AsyncGenerator[Chunk, None]:
        refuse(call, self._settings.max_batch)
        job = self._running().submit(call, asyncio.get_running_loop())
        try:
            while True:
                item = await job.outbox.get()
                if isinstance(item, ComposerError):
                    raise item
                yield item
                if item.usage is not None:
                    return
        finally:
            job.cancelled = True

    async def count_tokens(self, messages: Sequence[Message], prompt: str | None) -> int:
        def count(model: LocalModel) -> int:
            return len(encode(model.tokenizer, messages, prompt))

        counted: Any = await asyncio.wrap_future(self._running().do(count))
        return int(counted)

    async def health(self) -> Health:
        if self._closed:
            return Health("failed", "it is closed")
        if self._stopped:
            return Health("off")
        worker = self._worker
        if worker is not None and worker.ready:
            return Health("ready")
        if worker is not None and worker.alive:
            return Health("starting")
        return Health("failed", self._failure or "it has ended; the service's log says why")

    async def close(self) -> None:
        self._closed = True
        await self.stop()

    def _running(self) -> Worker:
        if self._worker is None or self._closed or not self._worker.started.done():
            raise self._not_running()
        return self._worker

    def _not_running(self) -> EngineUnavailable:
        state = "closed" if self._closed else "not running"
        return EngineUnavailable(f"the embedded engine of server {self._server!r} is {state}")
