"""The ASGI application: lifespan, the outermost layer, the exception table, the routes."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark.server.errors import add_error_handlers
from dspark.server.histogram import HistogramChild
from dspark.server.metrics import ROUTES, HttpMetrics
from dspark.server.routes import make_router
from dspark.server.service import Service

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
LAG_TIMER_S = 0.1


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
            await service.engine.close()

    # the documentation pages would load their scripts from a public host
    app = FastAPI(title="dspark", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    add_error_handlers(app, service.metrics.http.error)
    app.include_router(make_router(service))
    return HttpEdge(app, service.metrics.http)


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

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
                self._metrics.answered(_route(scope["path"]), scope["method"], message["status"])
            await send(message)

        await self._app(scope, receive, send_counted)


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
