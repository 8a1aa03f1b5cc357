"""The process that serves: boot, the server on its socket, signals, the end. Knows no routes."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from contextlib import suppress

import uvicorn

from api.app import create_app
from composer.service import Service

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Serves one service from its boot to its end. `run_on` blocks, and is called once."""

    def __init__(self, service: Service) -> None:
        """Raises SettingsError, see `create_app`."""
        self._service = service
        self._api = create_app(service)
        super().__init__(
            uvicorn.Config(
                self._api,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=int(service.settings.drain_timeout_s),
            )
        )

    def run_on(self, bound: socket.socket) -> None:
        """Until a signal ends it. Raises what the service's start raises, KeyboardInterrupt where
        a signal came before the service was ready."""
        with asyncio.Runner(loop_factory=self.config.get_loop_factory()) as runner:
            try:
                # Before the app would: its failure is an error and no traceback of the framework.
                runner.run(self._start())
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None
            log.info("serving on http://%s:%d", *bound.getsockname()[:2])
            with suppress(KeyboardInterrupt):  # uvicorn raises it again after a clean stop
                runner.run(self.serve(sockets=[bound]))

    async def _start(self) -> None:
        """SIGTERM, as SIGINT by `Runner`, breaks it off and ends what it has begun: servers of ours
        take minutes to start, and would outlive us by their patience with one that is to end."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            await self._service.start()
        finally:
            loop.remove_signal_handler(signal.SIGTERM)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's waits for the open requests, and those may wait for a server to come: so what
        is to end without an answer is ended beside it."""
        leaving = asyncio.create_task(self._leave())
        try:
            await super().shutdown(sockets)
        finally:
            leaving.cancel()  # told twice, we go at once
            await asyncio.wait([leaving])
            if not leaving.cancelled() and (error := leaving.exception()) is not None:
                log.error("not everything was put away", exc_info=error)

    async def _leave(self) -> None:
        await self._api.state.batches.close()  # they go on at the next start
        await self._service.drain()
