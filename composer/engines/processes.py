"""Starts a server process, watches it, restarts it when it dies and stops it with its children.
Knows nothing of HTTP, models or adapters: what `ready` means is its caller's."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from composer.engines.child import Child
from composer.engines.guardian import CANNOT_RUN
from composer.engines.keys import inherited
from composer.engines.launch import Launch
from composer.engines.progress import waiting
from composer.engines.serverlog import ServerLog
from composer.errors import ComposerError, EngineError, EngineMisconfigured, EngineUnavailable

log = logging.getLogger(__name__)

LOGS = Path("data/logs")
HOST = "127.0.0.1"
POLL_S = 0.25
LOG_CHECK_S = 30.0
LAST_LINES = 8
PORT_ATTEMPTS = 3
UNREADY_GRACE_S = 2.0
"""A server that is not ready has nothing to finish; and vLLM, told to end while its engine starts,
waits for that engine for ever."""


class ManagedProcess:
    """One server process, for as long as its launch stays the same. Belongs to one event loop.

    `command(port)` is its argument vector, on which it must listen at 127.0.0.1. `env` is added to
    our own environment (without any keys in it) and yields to `launch.env`. `ready()` is asked
    again and again until it says True; what it raises fails the start. `restarted()` runs after
    each restart that nobody asked for, before `alive` is True again.
    """

    def __init__(
        self,
        name: str,
        launch: Launch,
        command: Callable[[int], Sequence[str]],
        env: Mapping[str, str],
        ready: Callable[[], Awaitable[bool]],
        restarted: Callable[[], Awaitable[None]],
    ) -> None:
        self.name = name
        self.log = ServerLog(launch.log or LOGS / f"{name}.log")
        self._launch = launch
        self._command = command
        self._env = env
        self._ready = ready
        self._restarted = restarted
        self._port = launch.port
        self._up: asyncio.Future[None] | None = None  # what `start` waits for; replaced at a death
        self._keeper: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._closed = False
        self._child: Child | None = None
        self._was_ready = False
        self.restarts = 0
        self.failure: Exception | None = None  # why it is not there, until it is ready again

    @property
    def port(self) -> int:
        """The port of the present process, on 127.0.0.1; a new one may be chosen by each start.
        Raises EngineUnavailable before the first."""
        if self._port is None:
            raise EngineUnavailable(f"server {self.name} has not been started; start it first")
        return self._port

    @property
    def alive(self) -> bool:
        """Whether the server is there and ready."""
        up = self._up
        return up is not None and up.done() and not up.cancelled() and up.exception() is None

    async def start(self) -> None:
        """Ready. At once where it is; joins a start or restart under way, whose failure is then
        this one's too. Raises EngineUnavailable naming the log, EngineMisconfigured where the
        program cannot be run."""
        while self._stopping is not None:
            await asyncio.shield(self._stopping)
        if self._closed:
            raise EngineUnavailable(f"server {self.name} is closed")
        if self._keeper is None:
            self._up = asyncio.get_running_loop().create_future()
            self._keeper = asyncio.create_task(self._keep(), name=f"keep {self.name}")
        assert self._up is not None
        # Shielded: other callers wait for the same, and a start that nobody awaits is no loss.
        await asyncio.shield(self._up)

    async def stop(self) -> None:
        """Ends the process and all its descendants. At once where it is stopped; cancels a start
        or restart under way, whose callers get EngineUnavailable. Raises EngineError when
        something survives SIGKILL."""
        if self._stopping is None:
            if self._keeper is None:
                return
            self._stopping = asyncio.create_task(self._stop(self._keeper), name=f"stop {self.name}")
            fail(self._up, EngineUnavailable(f"server {self.name} was stopped while it started"))
            self._up = None
        await asyncio.shield(self._stopping)

    async def close(self) -> None:
        """Stops for good."""
        self._closed = True
        await self.stop()

    async def _stop(self, keeper: asyncio.Task[None]) -> None:
        started = time.monotonic()
        try:
            keeper.cancel()
            await asyncio.wait({keeper})
            await self._end()
            log.info("server %s stopped in %.1f s", self.name, time.monotonic() - started)
        finally:
            self._keeper = self._stopping = self._up = None

    async def _keep(self) -> None:
        """Starts it, and starts it again whenever it dies, until cancelled. A first start that
        fails is the caller's to repeat."""
        try:
            await self._begin()
            await self._stay_up()
        except Exception as failure:
            self.failure = failure
            await self._clear_away()
            self._keeper = None
            fail(self._up, failure)

    async def _stay_up(self) -> None:
        restarts = self._launch.restarts
        pause = restarts.first_s
        while True:
            self.failure = None
            if self._up is not None and not self._up.done():
                self._up.set_result(None)
            since = time.monotonic()
            died = await self._watch()
            if time.monotonic() - since >= restarts.healthy_s:
                pause = restarts.first_s
            self.failure = self._failed(f"{died}; it is started again in {pause:g} s")
            while not await self._begin_again(pause):
                pause = min(2 * pause, restarts.most_s)
            pause = min(2 * pause, restarts.most_s)

    async def _begin_again(self, pause: float) -> bool:
        """Whether the restart after `pause` seconds succeeded. Those who wait for it are told when
        it did not; later callers wait for the next."""
        await asyncio.sleep(pause)
        try:
            await self._begin()
            await self._restarted()
        except Exception as failure:
            # Not only ComposerError: whatever fails, the server must not stay away for good.
            log.error(
                "server %s could not be restarted: %s",
                self.name,
                failure,
                exc_info=not isinstance(failure, ComposerError),
            )
            self.failure = failure
            await self._clear_away()
            fail(self._up, failure)
            self._up = asyncio.get_running_loop().create_future()
            return False
        self.restarts += 1
        log.info("server %s is back (restart %d)", self.name, self.restarts)
        return True

    async def _begin(self) -> None:
        """Starts the process and waits until it is ready. A port that was free when it was chosen
        may be taken when the server comes to bind it, tens of seconds later: then another."""
        for attempt in range(1, PORT_ATTEMPTS + 1):
            self._port = self._launch.port or free_port()
            if self._launch.port is not None and not is_free(self._port):
                raise EngineUnavailable(
                    f"server {self.name}: port {self._port} of {HOST} is taken by another "
                    "process; end that, or name another `port` under `launch`"
                )
            started = time.monotonic()
            self._was_ready = False
            child = await self._spawn()
            try:
                async with asyncio.timeout(self._launch.start_timeout_s) as limit:
                    status = await self._until_ready(child)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise self._failed(
                    f"was not ready {self._launch.start_timeout_s:.0f} s after its start "
                    "(`start_timeout_s`)"
                ) from None
            took = time.monotonic() - started
            if status is None:
                self._was_ready = True
                log.info("server %s is ready on port %d after %.0f s", self.name, self.port, took)
                return
            if self._launch.port is None and attempt < PORT_ATTEMPTS and self._lost_its_port():
                log.warning("server %s: port %d was taken meanwhile", self.name, self._port)
                continue
            if status == CANNOT_RUN:
                raise self._cannot_run()
            raise self._failed(f"ended with status {status} {took:.0f} s after its start")

    async def _spawn(self) -> Child:
        command = [str(part) for part in self._command(self.port)]
        try:
            with self.log.open() as output:
                self._child = await Child.spawn(
                    command,
                    self._environment(command[0]),
                    output,
                    grace_s=self._launch.stop_timeout_s,
                )
        except OSError as error:
            raise EngineUnavailable(
                f"server {self.name} cannot be started with log {self.log.path}: {error}"
            ) from error
        log.info("server %s starts on port %d, log %s", self.name, self.port, self.log.path)
        return self._child

    async def _until_ready(self, child: Child) -> int | None:
        """None once it is ready; else the status it ended with."""
        exited = asyncio.ensure_future(child.died())
        asked: asyncio.Future[bool] | None = None
        try:
            with waiting(f"server {self.name} is starting on port {self.port}", log) as tell:
                while not exited.done():
                    if asked is None:
                        asked = asyncio.ensure_future(self._ready())
                    both: set[asyncio.Future[bool] | asyncio.Future[int]] = {asked, exited}
                    await asyncio.wait(both, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
                    if asked.done() and not exited.done():
                        if asked.result():
                            return None
                        asked = None
                        await asyncio.wait({exited}, timeout=POLL_S)
                    tell(next(iter(self.log.tail(1)), "nothing in its log yet"))
            return exited.result()
        finally:
            exited.cancel()
            if asked is not None:
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)

    async def _watch(self) -> str:
        """Until it has died and nothing of it is left: what happened. Keeps its log within bounds
        meanwhile."""
        assert self._child is not None
        since = time.monotonic()
        exited = asyncio.ensure_future(self._child.died())
        try:
            while not exited.done():
                await asyncio.wait({exited}, timeout=LOG_CHECK_S)
                await asyncio.to_thread(self._bound_log)
        finally:
            exited.cancel()
            self._up = asyncio.get_running_loop().create_future()
        lived = time.monotonic() - since
        await self._clear_away()
        return f"died with status {exited.result()} after {lived:.0f} s of service"

    def _bound_log(self) -> None:
        try:
            self.log.bound()
        except OSError as error:
            log.warning("server %s: its log %s: %s", self.name, self.log.path, error)

    async def _end(self) -> None:
        if self._child is not None:
            patient = self._launch.stop_timeout_s
            await self._child.end(None if self._was_ready else min(patient, UNREADY_GRACE_S))
            self._child = None

    async def _clear_away(self) -> None:
        """Ends what is left where no caller waits to hear that it could not be ended."""
        try:
            await self._end()
        except EngineError as failure:
            log.error("server %s: %s", self.name, failure)

    def _failed(self, what: str) -> EngineUnavailable:
        """The error, and in our log more than it says."""
        # What the server said is for our log: the error is shown to callers, in /health too.
        said = "".join(f"\n    {line}" for line in self.log.tail(LAST_LINES))
        log.error("server %s %s; its log ends in:%s", self.name, what, said or " nothing")
        return EngineUnavailable(f"server {self.name} {what}; see its log, {self.log.path}")

    def _cannot_run(self) -> EngineMisconfigured:
        """The error. What the system says of it goes to our log, once however often it is tried."""
        error = EngineMisconfigured(
            f"server {self.name} could not be started: its program cannot be run; correct "
            "`launch.python`"
        )
        if str(self.failure) != str(error):
            log.error("%s (%s)", error, next(iter(self.log.tail(1)), "nothing in its log"))
        return error

    def _lost_its_port(self) -> bool:
        if not is_free(self.port):
            return True
        return any("address already in use" in line.lower() for line in self.log.tail(50))

    def _environment(self, program: str) -> dict[str, str]:
        """Ours without keys that are not its own; the programs beside its interpreter (a compiler,
        say) are found first, as in an activated environment."""
        ours = dict(inherited())
        if os.path.dirname(program):
            ours["PATH"] = os.pathsep.join([os.path.dirname(program), ours.get("PATH", os.defpath)])
        if self._launch.devices is not None:
            ours["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self._launch.devices))
        return {"PYTHONUNBUFFERED": "1", **ours, **self._env, **self._launch.env}


def fail(future: asyncio.Future[None] | None, failure: Exception) -> None:
    if future is not None and not future.done():
        future.set_exception(failure)
        future.exception()  # a restart that nobody waits for is no lost exception


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        # Connections of an earlier server may linger (TIME_WAIT); only a listener is in the way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
