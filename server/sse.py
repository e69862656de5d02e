"""Server-sent events, and what a client that goes away puts an end to.

Framing: HTML standard, section 9.2, in the subset OpenAI sends: one `data:` line an event, `[DONE]` last; before it an
`id:` line, `<stream>:<number>`, after which a stream can be resumed.

Nothing here grows without bound. What a client has not taken yet lies in the connection's write buffer, at most uvicorn's
high-water mark of 64 KiB and one batch beyond, because `send` waits above it; in what the engine has made meanwhile, which
the request's own `max_tokens` bounds; and a client that keeps `send` waiting for `slow_reader_timeout_s` is dropped.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dspark.engine import EngineError
from dspark.server.errors import ApiError, InvalidRequestError, error_body, error_row
from dspark.server.metrics import HttpMetrics

log = logging.getLogger(__name__)

Result = TypeVar("Result")

DONE = "[DONE]"
KEEP_ALIVE = b": keep-alive\n"
"""A comment. No empty line follows it: after an event with an id, some clients would take that for an empty event."""
LAST_EVENT_ID = "Last-Event-ID"


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """keep_alive_s: a stream that sent nothing for so long sends a comment. slow_reader_timeout_s: see above."""

    keep_alive_s: float = 15.0
    slow_reader_timeout_s: float = 30.0


async def unless_disconnected(
    receive: Receive, work: Coroutine[Any, Any, Result], beside: Coroutine[Any, Any, None] | None = None
) -> Result:
    """Do the work while a client waits for it; cancel it as soon as the client is gone.

    beside: runs meanwhile, and may find that the client is gone. Call it once the request's body has been read.
    Raises ClientDisconnect.
    """
    task = asyncio.create_task(work)
    watching = [asyncio.create_task(watch) for watch in (_disconnected(receive), beside) if watch is not None]
    try:
        await asyncio.wait({task, *watching}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for watch in watching:
            watch.cancel()
        task.cancel()
        # the engine is told before this request is over
        await asyncio.gather(task, *watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come. The status is decided by the first one, or by the first keep-alive while it is awaited:
    an error before is a plain JSON answer, an error after it the stream's last event. That one has no id, for it is no
    part of what can be resumed."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[list[str], None],
        stream: str,
        first: int,
        metrics: HttpMetrics,
        settings: StreamSettings,
    ) -> None:
        """events: lists of event data (JSON texts), each list sent at once. stream: names it in the events' ids.
        first: number of the first event, where the client has those before."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._stream = stream
        self._metrics = metrics
        self._settings = settings
        self._started = False
        self._changed_s = 0.0
        """When a send last began or ended."""
        self._sending = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._changed_s = time.monotonic()
        with self._metrics.stream_open():
            try:
                await unless_disconnected(receive, self._send_events(send), self._watch_client(send))
            except ClientDisconnect:
                if not self._started:
                    raise

    async def _send_events(self, send: Send) -> None:
        number = self._first
        try:
            async with aclosing(self._events) as events:
                async for batch in events:
                    framed = "".join(self._frame(number + k, data) for k, data in enumerate(batch))
                    number += len(batch)
                    await self._send(send, framed.encode())
        except (EngineError, ApiError) as error:
            if not self._started:
                raise
            self._metrics.error(error_row(error).kind)
            last = f"data: {json.dumps(error_body(error))}\n\n"
        else:
            last = self._frame(number, DONE)
        await self._send(send, last.encode(), more=False)

    def _frame(self, number: int, data: str) -> str:
        return f"id: {self._stream}:{number}\ndata: {data}\n\n"

    async def _watch_client(self, send: Send) -> None:
        """Keep the connection alive, and return when the client takes nothing; no timer has to be set per event."""
        patience_s = self._settings.slow_reader_timeout_s
        while True:
            sending = self._sending.locked()
            left_s = self._changed_s + (patience_s if sending else self._settings.keep_alive_s) - time.monotonic()
            if left_s > 0:
                await asyncio.sleep(min(left_s, patience_s))
            elif sending:
                break
            else:
                try:
                    await asyncio.wait_for(self._send(send, KEEP_ALIVE), patience_s)
                except TimeoutError:
                    break
        log.info("a stream was ended whose client took nothing for %g s", patience_s)

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        async with self._sending:
            self._changed_s = time.monotonic()
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": data, "more_body": more})
            self._changed_s = time.monotonic()


def first_after(last_event_id: str, stream: str, known: int, *, ended: bool) -> int | None:
    """Number of the event that follows the one a client has last; None when that was the end of the stream.

    known: events there are so far, the end left out. Raises InvalidRequestError.
    """
    match = re.fullmatch(r"(.+):(\d{1,9})", last_event_id)
    if match is None or match[1] != stream:
        raise unknown_event(last_event_id)
    number = int(match[2])
    if ended and number == known:
        return None
    if number >= known:
        given = f"{number} was given, but the stream has {known} events so far"
        raise InvalidRequestError(f"Invalid header '{LAST_EVENT_ID}': {given}", LAST_EVENT_ID)
    return number + 1


def unknown_event(last_event_id: str) -> InvalidRequestError:
    why = "is of no stream that this server can resume (it may have expired, or been cut off and computed anew)"
    advice = f"send the request without {LAST_EVENT_ID} for the whole stream"
    return InvalidRequestError(f"The event '{last_event_id[:120]}' {why}; {advice}", LAST_EVENT_ID)
