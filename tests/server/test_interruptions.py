"""Clients that go away, engines that fail, queues that are full, servers that stop."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fake_engine import Script, tiny_info
from http_server import MODEL, RunningServer, says, serve

from dspark.engine import Request

USER = [{"role": "user", "content": "Hi"}]
CHAT = {"model": MODEL, "messages": USER}


def endless(request: Request, index: int) -> Iterator[tuple[int, ...]]:
    return ((75,) for _ in itertools.count())


@pytest.fixture
def endless_server(folder: Path) -> Iterator[RunningServer]:
    with serve(folder, endless, info=tiny_info(max_model_len=10**9)) as running:
        yield running


def eventually(condition: Callable[[], bool]) -> bool:
    """Waits for another thread; only a condition that never comes true takes the whole time."""
    deadline_s = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.002)
    return condition()


def metric(server: RunningServer, name: str, **labels: str) -> float:
    value = server.service.metrics.registry.get_sample_value(f"dspark_{name}", {"model": MODEL} | labels)
    assert value is not None, name
    return value


# clients that go away


def test_a_stream_whose_client_leaves_is_aborted_in_the_engine(endless_server: RunningServer) -> None:
    with endless_server.http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True, "n": 2}) as response:
        assert next(response.iter_lines()).startswith("id: ")
    assert eventually(lambda: len(endless_server.engine.aborted) == 1)
    assert eventually(lambda: endless_server.engine.gauges().blocks_used == 0)
    assert metric(endless_server, "requests_total", endpoint="chat_completions", outcome="abort") == 1
    assert metric(endless_server, "requests_cancelled_total", cause="client_disconnect") == 1
    assert eventually(lambda: metric(endless_server, "stream_clients") == 0)


@pytest.mark.parametrize("prompt", ["Hi", ["Hi", "Ho", "Ha"]])
@pytest.mark.parametrize("stream", [False, True])
def test_every_prompt_of_a_client_that_leaves_is_aborted_even_before_its_first_token(
    endless_server: RunningServer, prompt: str | list[str], stream: bool
) -> None:
    endless_server.engine.paused = True
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 400, "stream": stream}
    with httpx.Client(base_url=endless_server.url) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.2))
    count = 1 if prompt == "Hi" else 3
    assert eventually(lambda: len(endless_server.engine.aborted) == count)
    endless_server.engine.paused = False
    assert eventually(lambda: endless_server.engine.gauges().requests_waiting == 0)
    assert metric(endless_server, "requests_total", endpoint="completions", outcome="abort") == 1


def test_a_chat_without_stream_is_aborted_while_it_runs(endless_server: RunningServer) -> None:
    with httpx.Client(base_url=endless_server.url) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=CHAT, timeout=httpx.Timeout(5, read=0.2))
    assert eventually(lambda: len(endless_server.engine.aborted) == 1)


def test_a_client_that_leaves_while_it_sends_its_body_is_no_error(
    endless_server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = endless_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: 1000\r\n\r\n"
        client.sendall(head.encode() + b'{"model"')
    answers = {"route": "/v1/chat/completions", "method": "POST", "code": "499"}
    registry = endless_server.service.metrics.registry
    assert eventually(lambda: registry.get_sample_value("dspark_http_requests_total", answers) == 1)
    assert metric(endless_server, "request_errors_total", type="internal") == 0
    assert caplog.text == ""


# queues


def test_a_full_queue_is_a_429_that_says_when_to_come_back(folder: Path) -> None:
    with serve(folder, says(folder, "ok"), max_queued=1) as server:
        server.engine.paused = True
        waiting = threading.Thread(target=server.chat)
        waiting.start()
        assert eventually(lambda: server.engine.gauges().requests_waiting == 1)
        response = server.chat()
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "rate_limit_exceeded")
        assert int(response.headers["retry-after"]) >= 1
        assert "1" in error["message"]
        assert metric(server, "requests_shed_total", reason="queue_full") == 1
        server.engine.paused = False
        waiting.join()


def test_several_prompts_that_do_not_all_fit_leave_none_behind(folder: Path) -> None:
    with serve(folder, says(folder, "ok"), max_queued=2) as server:
        server.engine.paused = True
        assert server.completion(prompt=["a", "b", "c"]).status_code == 429
        assert server.engine.gauges().requests_waiting == 0
        server.engine.paused = False
        assert server.completion(prompt=["a", "b"]).status_code == 200


# engines that fail


def test_a_failed_step_is_a_500_without_internals_and_the_health_tells(folder: Path) -> None:
    with serve(folder, says(folder, "ok")) as server:
        server.engine.failure = ZeroDivisionError("secret internals")
        for _ in range(2):
            response = server.chat()
            assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_failed")
            assert "secret" not in response.text
        health = server.http.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "degraded"})
        page = server.http.get("/metrics").text
    assert 'dspark_server_state{state="degraded"} 1.0' in page
    assert 'dspark_server_state{state="ready"} 0.0' in page


def test_a_failure_within_a_stream_is_its_last_event(endless_server: RunningServer) -> None:
    with endless_server.http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        next(lines)
        endless_server.engine.failure = RuntimeError("boom")
        last = [*lines][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
    assert "boom" not in last
    assert metric(endless_server, "requests_total", endpoint="chat_completions", outcome="error") == 1
    assert metric(endless_server, "request_errors_total", type="internal") == 1


def test_a_bug_is_a_500_in_the_same_shape(folder: Path) -> None:
    def broken(request: Request, index: int) -> Iterator[tuple[int, ...]]:
        raise ZeroDivisionError("secret internals")

    with serve(folder, broken) as server:
        response = server.chat()
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in response.text
        assert "x-request-id" in response.headers


# servers that stop


def test_draining_lets_running_requests_finish_and_refuses_new_ones(folder: Path) -> None:
    with serve(folder, says(folder, "done")) as server:
        server.engine.paused = True
        answers: list[httpx.Response] = []
        running = threading.Thread(target=lambda: answers.append(server.chat()))
        running.start()
        assert eventually(lambda: server.engine.gauges().requests_waiting == 1)
        drained = in_loop(server, server.service.drain(20))
        assert eventually(lambda: server.http.get("/health").status_code == 503)
        assert server.http.get("/health").json() == {"status": "draining"}
        refused = server.chat()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "service_unavailable")
        server.engine.paused = False
        running.join()
        assert drained.result(20) is True
        assert answers[0].json()["choices"][0]["message"]["content"] == "done"
        assert metric(server, "requests_shed_total", reason="draining") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_drain_cuts_short_ends_with_an_error(endless_server: RunningServer, stream: bool) -> None:
    answers: list[httpx.Response] = []
    running = threading.Thread(target=lambda: answers.append(endless_server.chat(stream=stream)))
    running.start()
    assert eventually(lambda: endless_server.engine.gauges().requests_running == 1)
    assert in_loop(endless_server, endless_server.service.drain(0)).result(20) is False
    running.join()
    assert "service_unavailable" in answers[0].text
    assert "[DONE]" not in answers[0].text
    assert answers[0].status_code == (200 if stream else 503)
    assert metric(endless_server, "requests_cancelled_total", cause="shutdown") == 1


def test_the_engine_is_closed_when_the_server_stops(folder: Path) -> None:
    script: Script = says(folder, "ok")
    with serve(folder, script) as server:
        assert not server.engine.closed
    assert server.engine.closed


def in_loop(server: RunningServer, coroutine: object) -> object:
    loop = server.engine._loop_task.get_loop()
    return asyncio.run_coroutine_threadsafe(coroutine, loop)
