"""The ASGI application: lifespan, the outermost layer, the exception table, the routes."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache, partial
from importlib.metadata import version
from typing import cast

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark.server.errors import add_error_handlers
from dspark.server.histogram import HistogramChild
from dspark.server.metrics import ROUTES, HttpMetrics
from dspark.server.openapi import document
from dspark.server.routes import make_router
from dspark.server.service import Service

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
LAG_TIMER_S = 0.1
REFUSALS = (429, 503)
"""Statuses of requests that are refused for want of room or because the server goes down."""


def create_app(service: Service) -> ASGIApp:
    """The application around one service; its lifespan starts and closes the engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        lag_watch = asyncio.create_task(_watch_lag(service.metrics.http.event_loop_lag))
        try:
            yield
        finally:
            lag_watch.cancel()
            await service.close()

    # the documentation pages would load their scripts from a public host
    app = FastAPI(
        title="dspark",
        version=version("dspark-server"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    add_error_handlers(app, service.metrics.http.error)
    app.include_router(make_router(service))
    app.openapi = cache(partial(document, app))  # type: ignore[method-assign]
    port = service.settings.metrics_port
    gated = app if port is None else MetricsPort(app, port)
    return HttpEdge(let_pages_read(gated, service.settings.cors_origins), service.metrics.http)


class MetricsPort:
    """Answers 404 to /metrics on any other of the server's ports, and to everything else on this one."""

    def __init__(self, app: FastAPI, port: int) -> None:
        self._app = app
        self._port = port
        handler = app.exception_handlers[HTTPException]
        self._refuse = cast(Callable[[Request, Exception], Awaitable[Response]], handler)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # the port that the connection came in by, which no header can change
        if scope["type"] != "http" or (scope["server"][1] == self._port) == (scope["path"] == "/metrics"):
            await self._app(scope, receive, send)
            return
        answer = await self._refuse(Request(scope), HTTPException(404))
        await answer(scope, receive, send)


def let_pages_read(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Let the scripts of pages from these origins call the API; a key is sent by the script, so no cookies."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "retry-after", "idempotency-replayed"),
    )


class HttpEdge:
    """Outside everything else, so that every answer has a request id and is counted, the 500 of a bug included."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        read_s = time.monotonic()
        refused = False

        async def receive_timed() -> Message:
            nonlocal read_s
            message = await receive()
            if message["type"] == "http.request":
                read_s = time.monotonic()
            return message

        async def send_counted(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
                self._metrics.answered(_route(scope["path"]), scope["method"], message["status"])
                refused = scope["method"] == "POST" and message["status"] in REFUSALS
            await send(message)
            if refused and message["type"] == "http.response.body" and not message.get("more_body"):
                self._metrics.refusal.observe(time.monotonic() - read_s)

        await self._app(scope, receive_timed, send_counted)


def _route(path: str) -> str | None:
    if path in ROUTES:
        return path
    return "/v1/models/{model}" if path.startswith("/v1/models/") else None


async def _watch_lag(lag: HistogramChild) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + LAG_TIMER_S
        await asyncio.sleep(LAG_TIMER_S)
        lag.observe(max(0.0, loop.time() - due_s))
