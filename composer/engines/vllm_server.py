"""One vLLM server being there or not: started, asked, put to sleep, woken, stopped, brought back
with its adapters. Knows nothing of calls."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from composer.engines.adapters import RuntimeAdapters
from composer.engines.base import Health
from composer.engines.http import Flight, forbidden
from composer.engines.keys import key_from, key_hint
from composer.engines.processes import ManagedProcess
from composer.engines.sleep import sleep, wake
from composer.engines.upstream import Upstream
from composer.engines.vllm_gate import demand_plugin, has_gate
from composer.engines.vllm_launch import VllmSettings, command_of, environment_of
from composer.errors import (
    ComposerError,
    EngineError,
    EngineMisconfigured,
    EngineRefused,
    EngineUnavailable,
)
from composer.types import Placement

log = logging.getLogger(__name__)

POLL_S = 0.25
LOOK_S = 5.0
"""Most seconds that a question about health may take."""
DYING_S = 20.0
"""How long a server whose health fails may take to come round, or to end. vLLM's API server
outlives its engine by some seconds."""
AGAIN_S = 5.0
"""How long a server that wants another key is not asked again."""
AGAIN_PROGRAM_S = 60.0
"""How long a program that cannot be run is not tried again: it takes somebody to install it."""


class VllmServer:
    """One server, ours (a process) or somebody else's (a URL). `model` is what it calls its base
    model and `window` its context window in tokens, both known once it has been up."""

    def __init__(self, server: str, settings: VllmSettings, placement: Placement | None) -> None:
        self.name = server
        self._settings = settings
        self._sleep_level = placement.sleep_level if placement is not None else None
        self.process: ManagedProcess | None = None
        self.key: str | None = None
        if settings.launch is not None:
            self.key = secrets.token_urlsafe(32)
            self.process = ManagedProcess(
                server,
                settings.launch,
                lambda port: command_of(server, settings, placement, port),
                environment_of(self.key, placement),
                self._is_healthy,
                self._restarted,
            )
        self.upstream = Upstream(
            server,
            self._url,
            settings.timeouts,
            key=lambda: self.key or key_from(settings.api_key_env, server),
            key_variable=settings.api_key_env,
            in_flight=settings.in_flight,
            tls=settings.url is not None and settings.url.startswith("https:"),
        )
        self.adapters = RuntimeAdapters(
            server,
            self.upstream,
            prompt=settings.probe,
            tolerance=settings.probe_tolerance,
            preload=settings.preload,
        )
        self.model = settings.served_name or ""
        self.window: int | None = None
        self._up = False
        self._asleep = False
        self._settled = False
        self._failure: ComposerError | None = None  # since it was last ready or stopped
        self._refused_at = 0.0
        self._closed = False
        self._changing = asyncio.Lock()
        self._starting: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Up, as far as is known without asking it."""
        return self._up and self._has_process()

    async def start(self) -> None:
        """As `Engine.start`. Where the server wants another key, or has no program, it returns, and
        `demand_running` raises."""
        if self._closed:
            raise EngineUnavailable(f"server {self.name!r} is closed")
        if self._starting is None or self._starting.done():
            self._starting = asyncio.create_task(self._start(), name=f"start-{self.name}")
            # Whoever waited may have gone; the next to ask is told.
            self._starting.add_done_callback(lambda task: task.cancelled() or task.exception())
        starting = self._starting
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if starting.cancelled() and task is not None and not task.cancelling():
                raise EngineUnavailable(
                    f"server {self.name!r} was stopped while it started"
                ) from None
            raise

    async def stop(self) -> None:
        self._up, self._failure = False, None
        self.upstream.end_all("was stopped")
        await self._end_start()
        async with self._changing:
            await self._go_down()

    async def close(self) -> None:
        self._closed = True
        self._up = False
        self.upstream.end_all("was closed")
        await self._end_start()
        async with self._changing:
            self.adapters.forget_all()
            if self.process is not None:
                await self.process.close()
            await self.upstream.close()

    async def health(self) -> Health:
        """A server that is stopped, asleep or on its first way up is as it should be. One that
        wanted another key is asked again after a while: no call may come to do it."""
        if self._closed:
            return Health("failed", "it is closed")
        if self.process is None and self._may_be_mended():
            await self._look_again()
        failure: Exception | None = self._failure
        if failure is None and not self._up:
            coming = self._starting is not None and not self._starting.done()
            return Health("starting" if coming else "off")
        if self.process is not None and not self.process.alive:
            failure = self.process.failure or failure  # the cause before what followed from it
        failure = failure or await self._trouble()
        return Health("ready") if failure is None else Health("failed", str(failure))

    async def demand_running(self) -> None:
        """Raises EngineUnavailable, or EngineMisconfigured where it wants another key or cannot be
        run at all: which is seen to again at the next call after a while."""
        if isinstance(self._failure, EngineMisconfigured) and not self._closed:
            if self._may_be_mended():
                await self._look_again()
            coming = self._starting is not None and not self._starting.done()
            if isinstance(self._failure, EngineMisconfigured) and not coming:
                raise EngineMisconfigured(str(self._failure))
        if not self.running:
            state = "closed" if self._closed else "not running"
            raise EngineUnavailable(f"server {self.name!r} is {state}")

    @asynccontextmanager
    async def call(self) -> AsyncIterator[Flight]:
        """A call's waits. One that was refused as if for our key has the server marked only where
        a question that is not the caller's is refused too: nobody can take it from the others."""
        with self.upstream.flight() as flight:
            try:
                yield flight
            except EngineMisconfigured as error:
                if not isinstance(self._failure, EngineMisconfigured):
                    if not await self._wants_another_key():
                        raise forbidden(self.name, 401) from error
                    self._cannot_serve(error)
                raise

    async def _wants_another_key(self) -> bool:
        """By its list of models. Where it cannot be asked it is away, which is another matter."""
        try:
            reply = await self.upstream.ask("GET", "/models", limit_s=LOOK_S)
        except EngineMisconfigured:  # we have none
            return True
        except EngineError:
            return False
        return reply.status == 401

    def _may_be_mended(self) -> bool:
        """Whether a server that was refused, or could not be run, is to be looked at again."""
        if not isinstance(self._failure, EngineMisconfigured) or self._closed:
            return False
        away = self.process is not None and not self.process.alive
        since = asyncio.get_running_loop().time() - self._refused_at
        return since > (AGAIN_PROGRAM_S if away else AGAIN_S)

    async def _look_again(self) -> None:
        """Starts it, and waits for that a little: it may take minutes, which a call is to wait in
        its queue, where its bound holds."""
        with suppress(TimeoutError, EngineUnavailable):
            async with asyncio.timeout(LOOK_S):
                await self.start()

    def _cannot_serve(self, error: EngineMisconfigured) -> None:
        if str(error) != str(self._failure):  # once, however often it is tried
            log.error("%s; until then its calls fail", error)
        self._up, self._settled, self._failure = False, False, error
        self._refused_at = asyncio.get_running_loop().time()

    async def _end_start(self) -> None:
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])

    async def _start(self) -> None:
        async with self._changing:
            try:
                await self._come_up()
            except EngineMisconfigured as error:
                self._cannot_serve(error)
            except EngineRefused:  # and no caller's question
                hint = key_hint(self._settings.api_key_env)
                forbids = f"server {self.name!r} forbids what a start asks of it: {hint}"
                self._cannot_serve(EngineMisconfigured(forbids))
            except ComposerError as error:
                self._failure = error
                if isinstance(error, EngineUnavailable):
                    raise
                raise EngineUnavailable(str(error)) from error
            else:
                self._failure, self._up = None, True

    async def _come_up(self) -> None:
        if self._up:
            if await self._is_still_there():
                return
            self._up = False
            self._failure = EngineUnavailable(f"server {self.name!r} has gone; it is waited for")
        if self._asleep:
            self._asleep = False
            if await self._wake():
                return
            await self._end_process()
        if self.process is not None:
            await self._demand_plugin()
            await self.process.start()
        else:
            await self._wait_for_it()
        if not self._settled:
            await self._settle()

    async def _demand_plugin(self) -> None:
        launch = self._settings.launch
        if launch is not None and await asyncio.to_thread(has_gate, self._settings.model):
            await demand_plugin(self.name, launch, environment_of("", None))

    async def _go_down(self) -> None:
        level = self._sleep_level
        if self._asleep:
            return
        if level is not None and self._settled and self._has_process():
            try:
                await sleep(self.upstream, self.root(), level)
            except ComposerError as error:
                log.warning("server %r does not sleep, and is stopped: %s", self.name, error)
            else:
                self._asleep = True
                return
        await self._end_process()

    async def _end_process(self) -> None:
        self._settled = False
        self.adapters.forget_all()
        if self.process is not None:
            await self.process.stop()

    async def _wake(self) -> bool:
        """Whether it woke up as it was: adapters, and weights, have been lost over a sleep. Else
        the process is to be started anew."""
        assert self._sleep_level is not None
        if not self._has_process():
            return False
        try:
            await wake(self.upstream, self.root(), self._sleep_level)
            if await self.adapters.base_moved():
                log.error("server %r woke up with other weights: starting anew", self.name)
                return False
            failed = await self.adapters.restore(clean=True)
        except ComposerError as error:
            log.error("server %r does not wake up, starting anew: %s", self.name, error)
            return False
        for loss in failed:
            log.error("server %r woke up damaged, starting anew: %s", self.name, loss)
        return not failed

    async def _restarted(self) -> None:
        """The process had died and was started again."""
        await self._settle()

    async def _settle(self) -> None:
        """Makes a server that has just come up what it was: its names, its adapters. An adapter
        that does not come back takes the others not with it: its calls say why."""
        self._settled = False
        self.adapters.forget_all()
        await self._learn()
        if await self.adapters.base_moved():
            log.warning("server %r has other weights than before", self.name)
            self.adapters.new_base()
            await self.adapters.base_moved()
        for error in await self.adapters.restore(clean=False):
            log.error("server %r: %s", self.name, error)
        self._settled = True

    async def _learn(self) -> None:
        """What it calls its base model, and its context window in tokens."""
        listed = await self.upstream.demand("GET", "/models")
        try:
            bases = {card["id"]: card for card in listed["data"] if card.get("parent") is None}
            name = self._settings.served_name or next(iter(bases))
            self.window = bases[name].get("max_model_len")
        except (KeyError, TypeError, StopIteration, AttributeError):
            raise EngineUnavailable(
                f"server {self.name!r} serves no {self._settings.served_name or 'model'}; "
                "correct its `served_name` or `url`"
            ) from None
        self.model = name

    async def _is_still_there(self) -> bool:
        """Of a server that was up. One of ours that neither answers nor ends is ended."""
        if not self._has_process():
            return False
        if await self._is_healthy():
            return True
        if self.process is None:
            self._settled = False
            return False
        clock = asyncio.get_running_loop().time
        until = clock() + DYING_S
        while clock() < until and self.process.alive:
            await asyncio.sleep(POLL_S)
            if await self._is_healthy():
                return True
        if self.process.alive:
            log.error("server %r does not answer, and is started anew", self.name)
            await self._end_process()
        return False

    async def _wait_for_it(self) -> None:
        clock = asyncio.get_running_loop().time
        until = clock() + self._settings.start_timeout_s
        while (trouble := await self._trouble()) is not None:
            if isinstance(trouble, EngineMisconfigured):
                raise trouble
            trouble = EngineUnavailable(f"{trouble}; start it, or correct its `url`")
            if clock() > until:
                raise trouble
            self._failure = trouble
            await asyncio.sleep(POLL_S)

    async def _is_healthy(self) -> bool:
        return await self._trouble() is None

    async def _trouble(self) -> EngineError | None:
        """What is wrong with it by its own word, None where nothing is."""
        try:
            reply = await self.upstream.ask("GET", f"{self.root()}/health", limit_s=LOOK_S)
        except EngineError as error:
            return error
        if reply.ok:
            return None
        return EngineUnavailable(f"server {self.name!r} answers {reply.status} to /health")

    def _has_process(self) -> bool:
        return self.process is None or self.process.alive

    def root(self) -> str:
        """Its URL, without /v1. Raises EngineUnavailable before the first start."""
        if self.process is not None:
            return f"http://127.0.0.1:{self.process.port}"
        return str(self._settings.url).removesuffix("/v1")

    def _url(self) -> str:
        return f"{self.root()}/v1"
