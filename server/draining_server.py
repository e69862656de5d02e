"""uvicorn, with a shutdown that lets running requests finish while the port still answers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from dspark.server.service import Service


class DrainingServer(uvicorn.Server):
    """The first SIGTERM or SIGINT drains: new requests get 503, running ones finish. A second one aborts those.

    uvicorn's own shutdown closes the port at once, so that a load balancer would see refused connections instead.
    """

    def __init__(
        self, config: uvicorn.Config, service: Service, drain_timeout_s: float, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._service = service
        self._drain_timeout_s = drain_timeout_s
        self._on_ready = on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None:
            self.should_exit = True
        else:
            # uvicorn's own handler would also raise the signal again at the end, and the exit status be the signal's
            self._loop.call_soon_threadsafe(self._drain_or_abort)

    def _drain_or_abort(self) -> None:
        timeout_s = self._drain_timeout_s
        if self._drain is not None:
            self._drain.cancel()
            timeout_s = 0.0
        self._drain = asyncio.create_task(self._drain_and_exit(timeout_s))

    async def _drain_and_exit(self, timeout_s: float) -> None:
        await self._service.drain(timeout_s)
        self.should_exit = True
