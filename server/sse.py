"""Server-sent events, and what a client that goes away puts an end to.

Framing: HTML standard, section 9.2, in the subset OpenAI sends: one `data:` line an event, `[DONE]` last.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dspark.engine import EngineError
from dspark.server.errors import error_body

Result = TypeVar("Result")

DONE = "[DONE]"


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Do the work while a client waits for it; cancel it as soon as the client is gone.

    Call it once the request's body has been read. Raises ClientDisconnect.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        gone.cancel()
        task.cancel()
        # the engine is told before this request is over
        await asyncio.wait({task})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come. The status is decided by the first one: an error before it is a plain JSON answer,
    an error after it is the stream's last event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[list[str], None], on_error: Callable[[EngineError], None]) -> None:
        """events: lists of event data (JSON texts), each list sent at once. on_error: told of an error mid-stream."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_disconnected(receive, self._send_events(send))

    async def _send_events(self, send: Send) -> None:
        started = False
        last = DONE
        try:
            async with aclosing(self._events) as events:
                async for batch in events:
                    if not started:
                        started = True
                        await send(
                            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                        )
                    await send({"type": "http.response.body", "body": _frame(batch), "more_body": True})
        except EngineError as error:
            if not started:
                raise
            self._on_error(error)
            last = json.dumps(error_body(error))
        await send({"type": "http.response.body", "body": _frame([last]), "more_body": False})


def _frame(batch: list[str]) -> bytes:
    return "".join(f"data: {data}\n\n" for data in batch).encode()
