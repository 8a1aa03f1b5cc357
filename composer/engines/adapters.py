"""Adapters of a running vLLM server: loaded over HTTP, probed, remembered, brought back.

Knows nothing of calls, nor of how the server is started. vLLM keeps an LRU of its own of the
weights in memory; what is loaded here is the name. Names are made of the content's hash: prefix
caches have been keyed by name, so a name must never mean other weights.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from composer.engines.http import Reply, refusal
from composer.engines.upstream import Upstream
from composer.errors import ComposerError, EngineError, EngineUnavailable, RequestError
from composer.types import Adapter

log = logging.getLogger(__name__)

AT_ONCE = 4
"""Loads at once: the server reads the files in its one engine loop, between two steps."""

TOP = 5
"""Likeliest first tokens that a probe looks at."""


def name_of(adapter: Adapter) -> str:
    """The adapter's name on the server."""
    return f"lora-{adapter.digest[:32]}"


@dataclass(frozen=True, slots=True)
class Probe:
    """The likeliest first tokens after a fixed prompt, with their natural-log probabilities."""

    top: dict[str, float]

    def distance(self, other: Probe) -> float:
        """The largest difference in log-probability, by what both are known to say: a token that
        one does not list is at most as likely there as the last it lists."""
        return max(
            _distance(mine, theirs, token)
            for mine, theirs in ((self.top, other.top), (other.top, self.top))
            for token in mine
        )


def _distance(mine: dict[str, float], theirs: dict[str, float], token: str) -> float:
    if token in theirs:
        return abs(mine[token] - theirs[token])
    return max(mine[token] - min(theirs.values()), 0.0)


class RuntimeAdapters:
    """The adapters that one server shall have, and those it has.

    `wanted` is what was prepared; of these the first `preload` are loaded when they are prepared
    and after each start, the others at their first call. Each is probed after each load: the first
    probe is recorded, and a later one of the same weights must equal it within `tolerance` (in
    log-probability), or the adapter was lost or damaged (vLLM issue 53888: after a wake).
    """

    def __init__(
        self, server: str, upstream: Upstream, *, prompt: str, tolerance: float, preload: int
    ) -> None:
        self._server = server
        self._upstream = upstream
        self._prompt = prompt
        self._tolerance = tolerance
        self._preload = preload
        self._wanted: dict[str, Adapter] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._recorded: dict[str, Probe] = {}
        self._base: Probe | None = None
        self._slots = asyncio.Semaphore(AT_ONCE)

    @property
    def wanted(self) -> Collection[Adapter]:
        return self._wanted.values()

    def remember(self, adapters: Iterable[Adapter]) -> list[Adapter]:
        """Adds to what is wanted; gives what is new."""
        new = {a.digest: a for a in adapters if a.digest not in self._wanted}
        self._wanted |= new
        return list(new.values())

    async def prepare(self, adapters: Iterable[Adapter]) -> None:
        """On a running server. All or nothing: where one cannot be loaded none is added."""
        new = self.remember(adapters)
        try:
            if failed := await self._all_ready(new[: self._preload]):
                raise failed[0]
        except BaseException:
            for adapter in new:
                self._wanted.pop(adapter.digest, None)
            await self._unload_all(new)
            raise

    async def retain(self, adapters: Iterable[Adapter]) -> None:
        kept = {adapter.digest for adapter in adapters}
        dropped = [adapter for digest, adapter in self._wanted.items() if digest not in kept]
        for adapter in dropped:
            del self._wanted[adapter.digest]
        await self._unload_all(dropped)

    async def ready(self, adapter: Adapter) -> object:
        """Returns once the adapter is loaded and probed; joins a load under way. What it returns
        is to be given to `forget`. Raises EngineError, or EngineUnavailable."""
        load = self._loads.get(adapter.digest)
        if load is None:
            load = asyncio.create_task(self._load(adapter), name=f"load-{name_of(adapter)}")
            self._loads[adapter.digest] = load
            load.add_done_callback(lambda done: self._loaded(adapter, done))
        try:
            await asyncio.shield(load)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if load.cancelled() and task is not None and not task.cancelling():
                raise EngineUnavailable(
                    f"server {self._server!r} went away while it loaded an adapter"
                ) from None
            raise
        return load

    def forget(self, adapter: Adapter, load: object) -> None:
        """The server does not know it any more, in spite of this load."""
        if self._loads.get(adapter.digest) is load:
            del self._loads[adapter.digest]

    def forget_all(self) -> None:
        """The server is gone, and with it all that was loaded."""
        loads, self._loads = self._loads, {}
        for load in loads.values():
            load.cancel()

    async def base_moved(self) -> bool:
        """Whether the base model answers otherwise than when it was first seen. Takes the answer
        as the right one where it is the first, or after `new_base`."""
        probe = await self._probe(None)
        if self._base is None:
            self._base = probe
        return probe.distance(self._base) > self._tolerance

    def new_base(self) -> None:
        """Other weights than before: what was recorded says nothing about them."""
        self._base = None
        self._recorded.clear()

    async def restore(self, *, clean: bool) -> list[ComposerError]:
        """Loads and probes what is wanted, up to `preload`, on a server that has just come back;
        gives what went wrong. `clean`: what the server still has under our names is dropped first,
        since it may be damaged."""
        self.forget_all()
        if clean:
            await self._forget_there(self.wanted)
        return await self._all_ready(list(self.wanted)[: self._preload])

    # --- one load ------------------------------------------------------------------------

    async def _load(self, adapter: Adapter) -> None:
        async with self._slots:
            began = time.monotonic()
            await self._register(adapter)
            try:
                await self._check(adapter)
            except BaseException:
                await self._forget_there([adapter])
                raise
            log.info(
                "server %r: adapter %s (%s) loaded in %.2f s",
                *(self._server, adapter.digest[:12], adapter.path.name),
                time.monotonic() - began,
            )

    async def _register(self, adapter: Adapter) -> None:
        path = adapter.server_path or str(adapter.path)
        body = {"lora_name": name_of(adapter), "lora_path": path}
        reply = await self._upstream.ask("POST", "/load_lora_adapter", body)
        if reply.ok or "already been loaded" in _text(reply):
            return  # the name is the content: whoever loaded it, it is this adapter
        if reply.status == 404 and "No adapter found" not in _text(reply):
            raise EngineError(
                f"server {self._server!r} loads no adapters at run time; start it with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
            )
        if reply.status == 404:
            raise EngineError(
                f"server {self._server!r} finds no adapter in {path!r}; give its folder as that "
                "server sees it in `server_path`"
            )
        error = refusal(self._server, reply.status, reply.body, reply.headers)
        if isinstance(error, EngineError):
            raise error
        raise EngineError(f"server {self._server!r} refuses the adapter in {path!r}: {error}")

    async def _check(self, adapter: Adapter) -> None:
        probe = await self._probe(adapter)
        recorded = self._recorded.setdefault(adapter.digest, probe)
        base = self._base
        if probe.distance(recorded) > self._tolerance:
            lost = base is not None and probe.distance(base) <= self._tolerance
            raise EngineError(
                f"adapter {adapter.digest[:12]} answers differently after a reload"
                + (", as the base model does: it was lost" if lost else "")
                + f"; restart server {self._server!r}"
            )
        if recorded is probe and base is not None and probe.distance(base) <= self._tolerance:
            log.info(
                "server %r: adapter %s answers the probe as the base model does, so its loss "
                "would go unnoticed",
                self._server,
                adapter.digest[:12],
            )

    async def _probe(self, adapter: Adapter | None) -> Probe:
        body: dict[str, Any] = {
            "prompt": self._prompt,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": TOP,
        }
        if adapter is not None:
            body["model"] = name_of(adapter)
        try:
            answer = await self._upstream.demand("POST", "/completions", body)
        except RequestError as error:
            raise EngineError(f"server {self._server!r} refuses a probe: {error}") from error
        try:
            return Probe(dict(answer["choices"][0]["logprobs"]["top_logprobs"][0]))
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(
                f"server {self._server!r} gives no log-probabilities to probe by: {error!r}"
            ) from None

    def _loaded(self, adapter: Adapter, load: asyncio.Task[None]) -> None:
        """A load that failed can be tried again."""
        if load.cancelled() or load.exception() is not None:
            self.forget(adapter, load)

    # --- many ----------------------------------------------------------------------------

    async def _all_ready(self, adapters: Sequence[Adapter]) -> list[ComposerError]:
        ends = await asyncio.gather(*map(self.ready, adapters), return_exceptions=True)
        failed = []
        for end in ends:
            if isinstance(end, ComposerError):
                failed.append(end)
            elif isinstance(end, BaseException):
                raise end
        return failed

    async def _unload_all(self, adapters: Collection[Adapter]) -> None:
        there = []
        for adapter in adapters:
            load = self._loads.pop(adapter.digest, None)
            if load is not None:
                load.cancel()
                there.append(adapter)
        await self._forget_there(there)

    async def _forget_there(self, adapters: Collection[Adapter]) -> None:
        """Takes the names off the server. What fails is logged: a name that stays means the same
        weights, so it costs a little memory and harms nothing."""

        async def drop(adapter: Adapter) -> None:
            async with slots:
                body = {"lora_name": name_of(adapter)}
                try:
                    reply = await self._upstream.ask("POST", "/unload_lora_adapter", body)
                except EngineError as error:
                    log.warning("adapter %s was not unloaded: %s", adapter.digest[:12], error)
                    return
                if not reply.ok and reply.status != 404:
                    log.warning(
                        "adapter %s was not unloaded: %s", adapter.digest[:12], _text(reply)
                    )

        slots = asyncio.Semaphore(AT_ONCE)
        await asyncio.gather(*map(drop, adapters))


def _text(reply: Reply) -> str:
    return str(reply.body)
