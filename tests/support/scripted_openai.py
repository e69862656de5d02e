"""An OpenAI server whose answers a test writes down beforehand, on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse


@dataclass
class ScriptedServer:
    """Answers every chat request with `events`, and remembers what it was asked.

    failure: status and body of every answer after `healthy_requests` good ones.
    gather: a stream goes on only when so many streams have been open at the same time.
    """

    url: str = ""
    events: list[str] = field(default_factory=list)
    refused_fields: frozenset[str] = frozenset()
    failure: tuple[int, dict[str, object]] | None = None
    healthy_requests: int = 0
    metrics: Callable[[], str] | None = None
    gather: int = 1
    bodies: list[dict[str, object]] = field(default_factory=list)
    open_streams: int = 0
    most_open_streams: int = 0
    gathered: asyncio.Event = field(default_factory=asyncio.Event)

    def answer_with(self, *texts: str, usage: dict[str, object] | None = None) -> None:
        deltas: list[dict[str, object]] = [{"role": "assistant"}, *({"content": text} for text in texts)]
        chunks: list[dict[str, object]] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if usage is not None:
            chunks.append({"choices": [], "usage": {"prompt_tokens": 3, **usage}})
        self.events = [*(json.dumps(chunk) for chunk in chunks), "[DONE]"]

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]  # type: ignore[index]

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        def models() -> Response:
            return JSONResponse({"data": [{"id": "scripted"}, {"id": "other"}]})

        @app.get("/metrics")
        def metrics() -> Response:
            return PlainTextResponse(self.metrics()) if self.metrics else PlainTextResponse("", status_code=404)

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            body = await request.json()
            unknown = self.refused_fields & body.keys()
            if unknown:
                return JSONResponse({"detail": f"unexpected {sorted(unknown)}"}, status_code=422)
            self.bodies.append(body)
            if self.failure and len(self.bodies) > self.healthy_requests:
                return JSONResponse(self.failure[1], status_code=self.failure[0])
            return StreamingResponse(self._stream(), media_type="text/event-stream")

        return app

    async def _stream(self) -> AsyncIterator[str]:
        self.open_streams += 1
        self.most_open_streams = max(self.most_open_streams, self.open_streams)
        if self.open_streams >= self.gather:
            self.gathered.set()
        await self.gathered.wait()
        for event in self.events:
            yield f"data: {event}\n\n"
        self.open_streams -= 1


@contextlib.contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """Listens while the context is open; answers with five tokens in two chunks until the test says otherwise."""
    scripted = ScriptedServer()
    scripted.answer_with("Hello", " world", usage={"completion_tokens": 5})
    listener = socket.create_server(("127.0.0.1", 0))
    scripted.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    running = uvicorn.Server(uvicorn.Config(scripted.app(), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    yield scripted
    running.should_exit = True
    thread.join()
