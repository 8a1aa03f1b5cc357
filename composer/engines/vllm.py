"""A vLLM server over HTTP, ours or somebody else's: calls, adapters at run time, residency.

Knows nothing of vllm's Python, which is never imported, nor of how a process is watched.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

from pydantic import BaseModel

from composer.adapters.lora_config import AdapterFeature
from composer.engines.adapters import RuntimeAdapters, name_of
from composer.engines.base import Capacity
from composer.engines.http import Flight, UnknownUpstreamModel
from composer.engines.openai import key_hint
from composer.engines.openai_wire import body_of
from composer.engines.processes import ManagedProcess
from composer.engines.prompts import budget
from composer.engines.sleep import sleep, wake
from composer.engines.upstream import Upstream, key_from
from composer.engines.vllm_launch import (
    VllmSettings,
    check_placement,
    command_of,
    environment_of,
)
from composer.errors import ComposerError, EngineError, EngineUnavailable
from composer.types import (
    SAFE_PARAMETERS,
    Ability,
    Adapter,
    Call,
    Chunk,
    Message,
    Placement,
    Tier,
)

log = logging.getLogger(__name__)

POLL_S = 0.25
LOOK_S = 5.0
"""Most seconds that a question about health may take."""
DYING_S = 20.0
"""How long a server whose health fails may take to come round, or to end. vLLM's API server
outlives its engine by some seconds."""

_COUNTED = ("tools", "chat_template", "chat_template_kwargs", "add_generation_prompt",
            "continue_final_message", "add_special_tokens", "mm_processor_kwargs")  # fmt: skip
"""What of a call changes its prompt's length, besides its messages."""


class VllmEngine:
    """One vLLM server (0.32's protocol).

    Sleep (`placement.sleep_level`) is experimental: it needs a GPU, and was tested against an
    imitation of the server only. While `placement.sleep_level` is set, vLLM serves /sleep,
    /wake_up and more without asking for a key, so whoever can reach the port on this machine can
    use them.
    """

    name: ClassVar[str] = "vllm"
    tier: ClassVar[Tier] = "supported"
    settings: ClassVar[type[BaseModel]] = VllmSettings
    honours: ClassVar[frozenset[Ability]] = frozenset({"tools", "json", "vision", "logprobs"})
    adapter_features: ClassVar[frozenset[AdapterFeature]] = frozenset()
    takes_adapters: ClassVar[bool] = True
    model_field: ClassVar[str | None] = "model"
    path_fields: ClassVar[tuple[str, ...]] = ("launch.log",)
    program_fields: ClassVar[tuple[str, ...]] = ("launch.python",)
    parameters: ClassVar[frozenset[str]] = SAFE_PARAMETERS | {
        # drawing tokens
        "allowed_token_ids", "bad_words", "length_penalty", "logprob_token_ids",
        "repetition_detection", "structured_outputs", "thinking_token_budget", "use_beam_search",
        # the prompt
        "add_generation_prompt", "add_special_tokens", "chat_template", "chat_template_kwargs",
        "continue_final_message", "documents", "echo", "media_io_kwargs", "mm_processor_kwargs",
        "truncate_prompt_tokens", "truncation_side",
        # the answer's form
        "include_reasoning", "prompt_logprobs", "return_token_ids", "return_tokens_as_token_ids",
        "stream_interval",
        # the server
        "cache_salt", "priority", "vllm_xargs",
    }  # fmt: skip

    @classmethod
    def check(cls, settings: VllmSettings, placement: Placement | None) -> None:
        check_placement(settings, placement)

    def __init__(
        self, server: str, settings: VllmSettings, *, placement: Placement | None = None
    ) -> None:
        self._server = server
        self._settings = settings
        self._sleep_level = placement.sleep_level if placement is not None else None
        self._process: ManagedProcess | None = None
        self._key: str | None = None
        if settings.launch is not None:
            self._key = secrets.token_urlsafe(32)
            self._process = ManagedProcess(
                server,
                settings.launch,
                lambda port: command_of(server, settings, placement, port),
                environment_of(self._key, placement),
                self._is_healthy,
                self._restarted,
            )
        self._upstream = Upstream(
            server,
            self._url,
            settings.timeouts,
            key=lambda: self._key or key_from(settings.api_key_env),
            key_hint=key_hint(settings.api_key_env),
            in_flight=settings.in_flight,
            tls=settings.url is not None and settings.url.startswith("https:"),
        )
        self._adapters = RuntimeAdapters(
            server,
            self._upstream,
            prompt=settings.probe,
            tolerance=settings.probe_tolerance,
            preload=settings.preload,
        )
        self._model = settings.served_name or ""
        self._window: int | None = None
        self._up = False
        self._asleep = False
        self._settled = False
        self._failed = False
        self._closed = False
        self._changing = asyncio.Lock()
        self._starting: asyncio.Task[None] | None = None

    @property
    def capacity(self) -> Capacity:
        settings = self._settings
        return Capacity(settings.in_flight, settings.queue, settings.max_loras)

    # --- there or not --------------------------------------------------------------------

    @property
    def external(self) -> bool:
        return self._settings.launch is None

    async def start(self) -> None:
        if self._closed:
            raise self._not_running()
        if self._starting is None or self._starting.done():
            self._starting = asyncio.create_task(self._start(), name=f"start-{self._server}")
            # Whoever waited may have gone; the next to ask is told.
            self._starting.add_done_callback(lambda task: task.cancelled() or task.exception())
        starting = self._starting
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if starting.cancelled() and task is not None and not task.cancelling():
                raise EngineUnavailable(
                    f"server {self._server!r} was stopped while it started"
                ) from None
            raise

    async def stop(self) -> None:
        self._up = self._failed = False
        self._upstream.end_all("was stopped")
        await self._end_start()
        async with self._changing:
            await self._go_down()

    async def close(self) -> None:
        self._closed = True
        self._up = False
        self._upstream.end_all("was closed")
        await self._end_start()
        async with self._changing:
            self._adapters.forget_all()
            if self._process is not None:
                await self._process.close()
            await self._upstream.close()

    async def healthy(self) -> bool:
        """A server that is stopped, asleep or on its first way up is as it should be."""
        if self._closed or self._failed:
            return False
        return not self._up or (self._has_process() and await self._is_healthy())

    async def _end_start(self) -> None:
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])

    async def _start(self) -> None:
        async with self._changing:
            try:
                await self._come_up()
            except ComposerError as error:
                self._failed = True
                if isinstance(error, EngineUnavailable):
                    raise
                raise EngineUnavailable(str(error)) from error
            self._failed, self._up = False, True

    async def _come_up(self) -> None:
        if self._up:
            if await self._is_still_there():
                return
            self._up, self._failed = False, True
        if self._asleep:
            self._asleep = False
            if await self._wake():
                return
            await self._end_process()
        if self._process is not None:
            await self._process.start()
        else:
            await self._wait_for_it()
        if not self._settled:
            await self._settle()

    async def _go_down(self) -> None:
        level = self._sleep_level
        if self._asleep:
            return
        if level is not None and self._settled and self._has_process():
            try:
                await sleep(self._upstream, self._root(), level)
            except ComposerError as error:
                log.warning("server %r does not sleep, and is stopped: %s", self._server, error)
            else:
                self._asleep = True
                return
        await self._end_process()

    async def _end_process(self) -> None:
        self._settled = False
        self._adapters.forget_all()
        if self._process is not None:
            await self._process.stop()

    async def _wake(self) -> bool:
        """Whether it woke up as it was: adapters, and weights, have been lost over a sleep. Else
        the process is to be started anew."""
        assert self._sleep_level is not None
        if not self._has_process():
            return False
        try:
            await wake(self._upstream, self._root(), self._sleep_level)
            if await self._adapters.base_moved():
                log.error("server %r woke up with other weights: starting anew", self._server)
                return False
            failed = await self._adapters.restore(clean=True)
        except ComposerError as error:
            log.error("server %r does not wake up, starting anew: %s", self._server, error)
            return False
        for loss in failed:
            log.error("server %r woke up damaged, starting anew: %s", self._server, loss)
        return not failed

    async def _restarted(self) -> None:
        """The process had died and was started again."""
        await self._settle()

    async def _settle(self) -> None:
        """Makes a server that has just come up what it was: its names, its adapters. An adapter
        that does not come back takes the others not with it: its calls say why."""
        self._settled = False
        self._adapters.forget_all()
        await self._learn()
        if await self._adapters.base_moved():
            log.warning("server %r has other weights than before", self._server)
            self._adapters.new_base()
            await self._adapters.base_moved()
        for error in await self._adapters.restore(clean=False):
            log.error("server %r: %s", self._server, error)
        self._settled = True

    async def _learn(self) -> None:
        """What it calls its base model, and its context window in tokens."""
        listed = await self._upstream.demand("GET", "/models")
        try:
            bases = {card["id"]: card for card in listed["data"] if card.get("parent") is None}
            name = self._settings.served_name or next(iter(bases))
            self._window = bases[name].get("max_model_len")
        except (KeyError, TypeError, StopIteration, AttributeError):
            raise EngineUnavailable(
                f"server {self._server!r} serves no {self._settings.served_name or 'model'}; "
                "correct its `served_name` or `url`"
            ) from None
        self._model = name

    async def _is_still_there(self) -> bool:
        """Of a server that was up. One of ours that neither answers nor ends is ended."""
        if not self._has_process():
            return False
        if await self._is_healthy():
            return True
        if self._process is None:
            self._settled = False
            return False
        clock = asyncio.get_running_loop().time
        until = clock() + DYING_S
        while clock() < until and self._process.alive:
            await asyncio.sleep(POLL_S)
            if await self._is_healthy():
                return True
        if self._process.alive:
            log.error("server %r does not answer, and is started anew", self._server)
            await self._end_process()
        return False

    async def _wait_for_it(self) -> None:
        clock = asyncio.get_running_loop().time
        until = clock() + self._settings.start_timeout_s
        while not await self._is_healthy():
            if clock() > until:
                raise EngineUnavailable(
                    f"server {self._server!r} is not at {self._settings.url}; start it, or "
                    "correct its `url`"
                )
            await asyncio.sleep(POLL_S)

    async def _is_healthy(self) -> bool:
        try:
            reply = await self._upstream.ask("GET", f"{self._root()}/health", limit_s=LOOK_S)
        except EngineError:
            return False
        return reply.ok

    def _has_process(self) -> bool:
        return self._process is None or self._process.alive

    def _root(self) -> str:
        if self._process is not None:
            return f"http://127.0.0.1:{self._process.port}"
        return str(self._settings.url).removesuffix("/v1")

    def _url(self) -> str:
        return f"{self._root()}/v1"

    def _not_running(self) -> EngineUnavailable:
        state = "closed" if self._closed else "not running"
        return EngineUnavailable(f"server {self._server!r} is {state}")

    # --- adapters ------------------------------------------------------------------------

    async def prepare(self, adapters: Collection[Adapter]) -> None:
        if adapters and self._settings.launch is not None and self._settings.max_loras is None:
            raise EngineError(
                f"server {self._server!r} is started without adapters; give it `max_loras`"
            )
        if self._up and self._has_process():
            await self._adapters.prepare(adapters)
        else:  # on its way, too: what a start does not see is loaded by the first call
            self._adapters.remember(adapters)

    async def retain(self, adapters: Collection[Adapter]) -> None:
        await self._adapters.retain(adapters)

    # --- calls ---------------------------------------------------------------------------

    async def run(self, call: Call) -> AsyncGenerator[Chunk, None]:
        if not self._up or not self._has_process():
            raise self._not_running()
        with self._upstream.flight() as flight:
            body = await self._body(call, flight)
            begun = False
            for again in (True, False):
                load = await self._loaded(call, flight)
                try:
                    async with aclosing(self._upstream.answer(call, body, flight)) as chunks:
                        async for chunk in chunks:
                            begun = True
                            yield chunk
                    return
                except UnknownUpstreamModel as error:
                    if call.adapter is None:
                        raise EngineError(f"{error}; correct the server's `served_name`") from None
                    self._adapters.forget(call.adapter, load)
                    if begun or not again:
                        raise
                    log.warning(
                        "server %r has forgotten an adapter: it is loaded again", self._server
                    )

    async def count_tokens(self, messages: Sequence[Message], prompt: str | None) -> int:
        if not self._up or not self._has_process():
            raise self._not_running()
        with self._upstream.flight() as flight:
            return await self._count(messages, prompt, {}, flight)

    async def _loaded(self, call: Call, flight: Flight) -> object:
        if call.adapter is None:
            return None
        limit_s = self._settings.timeouts.first_token_s
        until = asyncio.get_running_loop().time() + limit_s
        phase = f"no adapter in {limit_s:g} s (first_token_s)"
        return await flight.wait(self._adapters.ready(call.adapter), until, phase)

    async def _body(self, call: Call, flight: Flight) -> dict[str, Any]:
        """Temperature and top_p are sent where nobody gave them: vLLM's own default is the model
        maker's."""
        model = self._model if call.adapter is None else name_of(call.adapter)
        body = {"temperature": 1.0, "top_p": 1.0} | body_of(call, model)
        if self._must_count(call):
            count = await self._count(call.messages, call.prompt, call.extra, flight)
            body["max_tokens"] = budget(call, count, self._window or call.context_window)
        return body

    def _must_count(self, call: Call) -> bool:
        """The server counts exactly by its own window. Only an expert's that is smaller is ours
        to hold, and only where the text could be too long for it, every byte being a token at
        most. (And a completion without a limit gets 16 tokens from vLLM.)"""
        if call.prompt is not None and call.sampling.max_tokens is None:
            return True
        if self._window is not None and call.context_window >= self._window:
            return False
        texts = [call.prompt] if call.prompt is not None else map(str, call.messages)
        most = sum(len(text.encode()) for text in texts) + (call.sampling.max_tokens or 0)
        return most + len(str(call.extra.get("tools", ""))) > call.context_window

    async def _count(
        self,
        messages: Sequence[Message],
        prompt: str | None,
        extra: Any,
        flight: Flight,
    ) -> int:
        body: dict[str, Any] = {"model": self._model}
        if prompt is not None:
            body["prompt"] = prompt
        else:
            body |= {"messages": messages} | {k: extra[k] for k in _COUNTED if k in extra}
        counted = await self._upstream.demand(
            "POST", f"{self._root()}/tokenize", body, flight=flight
        )
        return int(counted["count"])
