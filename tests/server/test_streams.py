"""Server-sent events on the wire: ids, keep-alive comments, and readers that are slow or leave."""

from __future__ import annotations

import itertools
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_engine import tiny_info
from http_server import MODEL, RunningServer, says, serve

from dspark.engine import Request
from dspark.server.idempotency import IdempotencySettings
from dspark.server.sse import StreamSettings

USER = [{"role": "user", "content": "Hi"}]
CHAT = {"model": MODEL, "messages": USER, "stream": True}
ENDLESS = {"info": tiny_info(max_model_len=10**9)}


def eventually(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return condition()


def endless(request: Request, index: int) -> Iterator[tuple[int, ...]]:
    return ((75,) for _ in itertools.count())


def metric(server: RunningServer, name: str, **labels: str) -> float:
    value = server.service.metrics.registry.get_sample_value(f"dspark_{name}", labels)
    assert value is not None, name
    return value


def test_every_event_says_of_which_stream_it_is_and_which(folder: Path) -> None:
    with serve(folder, says(folder, "Hello")) as server:
        events = server.chat(stream=True).text.split("\n\n")[:-1]
    response_id = json.loads(events[0].split("data: ")[1])["id"]
    assert [event.split("\n")[0] for event in events] == [f"id: {response_id}:{n}" for n in range(len(events))]
    assert events[-1].endswith("data: [DONE]")


def test_a_stream_that_waits_for_its_first_token_stays_alive(folder: Path) -> None:
    with serve(folder, says(folder, "Hello"), streams=StreamSettings(keep_alive_s=0.05)) as server:
        server.engine.paused = True
        with server.http.stream("POST", "/v1/chat/completions", json=CHAT) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            assert [next(lines), next(lines)] == [": keep-alive"] * 2
            server.engine.paused = False
            assert [line for line in lines if line][-1] == "data: [DONE]"


def test_keep_alives_come_between_events_too_and_the_openai_client_reads_on(folder: Path) -> None:
    with serve(folder, says(folder, "Hello"), streams=StreamSettings(keep_alive_s=0.05)) as server:
        inner = server.engine.script

        def pausing(request: Request, index: int) -> Iterator[tuple[int, ...]]:
            for position, batch in enumerate(inner(request, index)):
                if position == 2:
                    server.engine.paused = True
                    threading.Timer(0.3, setattr, (server.engine, "paused", False)).start()
                yield batch

        server.engine.script = pausing
        assert ": keep-alive\nid: " in server.chat(stream=True).text
        stream = server.openai.chat.completions.create(model=MODEL, messages=USER, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hello"


def test_an_error_after_a_keep_alive_is_an_event(folder: Path) -> None:
    with serve(folder, says(folder, "Hello"), streams=StreamSettings(keep_alive_s=0.05)) as server:
        server.engine.paused = True
        with server.http.stream("POST", "/v1/chat/completions", json=CHAT) as response:
            lines = response.iter_lines()
            next(lines)
            server.engine.failure = RuntimeError("boom")
            server.engine.paused = False
            last = [line for line in lines if line.startswith("data: ")]
        assert [json.loads(line.removeprefix("data: "))["error"]["code"] for line in last] == ["engine_failed"]
        assert metric(server, "request_errors_total", model=MODEL, type="internal") == 1


def test_a_stream_whose_client_leaves_logs_no_error(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serve(folder, endless, **ENDLESS) as server:
        with server.http.stream("POST", "/v1/chat/completions", json=CHAT) as response:
            lines = response.iter_lines()
            next(lines)
        assert eventually(lambda: len(server.engine.aborted) == 1)
        assert eventually(lambda: metric(server, "stream_clients", model=MODEL) == 0)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def ask_and_never_read(server: RunningServer, **headers: str) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    body = json.dumps(CHAT)
    head = {"host": host, "content-length": str(len(body))} | headers
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    client.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n{body}".encode())
    return client


def test_a_reader_that_takes_nothing_is_dropped_and_its_generation_aborted(folder: Path) -> None:
    settings = StreamSettings(slow_reader_timeout_s=0.5)
    with serve(folder, endless, **ENDLESS, streams=settings) as server:
        with ask_and_never_read(server):
            assert eventually(lambda: len(server.engine.submitted) == 1)
            assert eventually(lambda: len(server.engine.aborted) == 1)
            assert eventually(lambda: metric(server, "stream_clients", model=MODEL) == 0)
        # one that reads, however long, is not
        with server.http.stream("POST", "/v1/chat/completions", json=CHAT) as response:
            began_s = time.monotonic()
            lines = response.iter_lines()  # kept: the end of the iterator would end the stream
            while time.monotonic() < began_s + 1.5:
                next(lines)
            assert len(server.engine.aborted) == 1


def test_a_keyed_generation_goes_on_without_its_slow_reader(folder: Path) -> None:
    settings = StreamSettings(slow_reader_timeout_s=0.5)
    with serve(folder, endless, **ENDLESS, streams=settings, idempotency=IdempotencySettings(grace_s=3600)) as server:
        headers = {"Idempotency-Key": "k"}
        with ask_and_never_read(server, **headers):
            assert eventually(lambda: metric(server, "stream_clients", model=MODEL) == 1)
            assert eventually(lambda: metric(server, "stream_clients", model=MODEL) == 0)
        assert server.engine.aborted == []
        with server.http.stream("POST", "/v1/chat/completions", json=CHAT, headers=headers) as response:
            lines = response.iter_lines()
            assert next(lines).endswith(":0")
        assert metric(server, "idempotency_requests_total", result="join") == 1


def test_the_openapi_document_describes_every_route(folder: Path) -> None:
    with serve(folder, says(folder, "Hello")) as server:
        document = server.http.get("/openapi.json").json()
        answers = {path: server.http.get(path) for path in ("/health/live", "/health/ready", "/version", "/v1/models")}
    assert set(document["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/tokenize",
        "/detokenize",
        "/v1/models",
        "/v1/models/{model}",
        "/health",
        "/health/live",
        "/health/ready",
        "/version",
        "/metrics",
    }
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "204", "400", "401", "404", "409", "413", "422", "429", "500", "503"} <= set(chat["responses"])
    assert {parameter["name"] for parameter in chat["parameters"]} == {"Idempotency-Key", "Last-Event-ID"}
    for ref in refs(document):
        found = document
        for step in ref.removeprefix("#/").split("/"):
            found = found[step]
    assert all(answer.status_code == 200 for answer in answers.values())
    assert chat["responses"]["422"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}


def refs(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from refs(item)
