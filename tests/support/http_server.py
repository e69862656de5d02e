"""A real uvicorn server of a `Service` on a free port, in a thread, and texts as the fake engine's scripts."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import uvicorn
import uvicorn.server
from fake_engine import FakeEngine, Script, tiny_info
from openai import OpenAI
from tokenizers import Tokenizer

from dspark.engine import EngineInfo, Request
from dspark.server.app import create_app
from dspark.server.connection import MAX_HEADER_BYTES, BoundedConnection
from dspark.server.service import ServerSettings, Service
from dspark.server.text import ModelText

MODEL = "tiny-model"
EOS = 2


class _ShortSleeps:
    """`asyncio` for uvicorn, which sleeps 0.1 s before it looks again whether to stop, and again before it has stopped."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s / 20)


uvicorn.server.asyncio = _ShortSleeps()  # type: ignore[assignment]


@dataclass
class RunningServer:
    url: str
    service: Service
    engine: FakeEngine
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=20)

    @cached_property
    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=20)

    def chat(self, **fields: object) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]} | fields
        return self.http.post("/v1/chat/completions", json=body)

    def completion(self, **fields: object) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": MODEL, "prompt": "Hi"} | fields)


def says(folder: Path, text: str, batch: int = 1, end: bool = True) -> Script:
    """Every choice says `text`, its first token alone and then `batch` tokens a step; `end`: then the end of text."""
    token_ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return plays([*token_ids, *([EOS] if end else [])], batch)


def plays(token_ids: list[int], batch: int = 1) -> Script:
    def script(request: Request, index: int) -> Iterator[tuple[int, ...]]:
        yield tuple(token_ids[:1])
        for start in range(1, len(token_ids), batch):
            yield tuple(token_ids[start : start + batch])

    return script


@contextmanager
def serve(
    folder: Path,
    script: Script,
    *,
    info: EngineInfo | None = None,
    max_queued: int = 256,
    slots: int = 64,
    api_keys: tuple[str, ...] = (),
    max_body_bytes: int = 1 << 20,
    **settings: Any,
) -> Iterator[RunningServer]:
    """settings: further ones of `ServerSettings`."""
    engine = FakeEngine(script, info or tiny_info(), max_queued, slots)
    service = Service(engine, ModelText.load(folder), ServerSettings(MODEL, api_keys, max_body_bytes, **settings))
    with run_service(service) as url:
        server = RunningServer(url, service, engine)
        with server.http:
            yield server


@contextmanager
def run_service(
    service: Service, *other_sockets: socket.socket, connection: type[BoundedConnection] = BoundedConnection
) -> Iterator[str]:
    """Serve in a thread until left, on a free port and the other sockets; yields the URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(service),
        http=connection,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        log_level="error",
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    ready = threading.Event()
    _call_after(server, ready.set)
    thread = threading.Thread(target=server.run, args=([listener, *other_sockets],))
    thread.start()
    try:
        assert ready.wait(20), "the server did not start"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def _call_after(server: uvicorn.Server, started: Callable[[], None]) -> None:
    startup = server.startup

    async def startup_and_tell(sockets: list[socket.socket] | None = None) -> None:
        await startup(sockets)
        started()

    server.startup = startup_and_tell  # type: ignore[method-assign]
