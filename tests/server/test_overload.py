"""Overload, deadlines, failed and hanging steps as clients and operators see them: a real engine behind real HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import run_service, says, serve
from openai import APITimeoutError, InternalServerError, OpenAI, RateLimitError
from tiny_models import write_tiny_model

from dspark.engine import Engine, EngineConfig
from dspark.engine.startup import start_up
from dspark.server.deadlines import TimeoutLimits
from dspark.server.service import ServerSettings, Service
from dspark.server.text import ModelText

MODEL = "tiny"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "abcabcabc"}], "seed": 1, "ignore_eos": True}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@dataclass
class Served:
    """gate: closed, every step waits in the worker. held: one has. faults: what the next steps raise.

    steps_left: so many steps, then the gate closes by itself; a client's thread may be too late for that.
    """

    service: Service
    http: httpx.Client
    url: str
    gate: threading.Event = field(default_factory=threading.Event)
    held: bool = False
    steps_left: int | None = None
    faults: list[Exception] = field(default_factory=list)

    def chat(self, headers: dict[str, str] | None = None, **fields: object) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=CHAT | fields, headers=headers)

    def metric(self, name: str, **labels: str) -> float:
        value = self.service.metrics.registry.get_sample_value(f"dspark_{name}", {"model": MODEL} | labels)
        assert value is not None, name
        return value

    def outcomes(self, outcome: str) -> float:
        return self.metric("requests_total", endpoint="chat_completions", outcome=outcome)

    @property
    def waiting(self) -> int:
        return self.service.engine.gauges().requests_waiting


@pytest.fixture(scope="module")
def open_server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    cache = tmp_path_factory.mktemp("cache")

    @contextmanager
    def start(settings: dict[str, Any] | None = None, **options: Any) -> Iterator[Served]:
        fields: dict[str, Any] = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "max_queued_requests": 2} | options
        config = EngineConfig(
            model=str(model_folder), cache_dir=cache, dtype="float32", threads=1, kv_cache_bytes=1 << 20, **fields
        )
        worker = ThreadPoolExecutor(max_workers=1)
        parts = worker.submit(start_up, config).result()
        service = Service(
            Engine(config, parts, worker), ModelText.load(model_folder), ServerSettings(MODEL, **settings or {})
        )
        with run_service(service) as url, httpx.Client(base_url=url, timeout=60) as http:
            served = Served(service, http, url)
            launch = parts.runner.launch

            def launch_when_let(*args: Any) -> Any:
                if served.steps_left == 0:
                    served.steps_left = None
                    served.gate.clear()
                elif served.steps_left is not None:
                    served.steps_left -= 1
                served.held |= not served.gate.is_set()
                served.gate.wait(60)
                if served.faults:
                    raise served.faults.pop(0)
                return launch(*args)

            parts.runner.launch = launch_when_let  # type: ignore[method-assign]
            served.gate.set()
            try:
                yield served
            finally:
                served.gate.set()
            assert eventually(lambda: service.engine.gauges().blocks_used == 0)

    return start


def eventually(condition: Callable[[], bool]) -> bool:
    """Waits for another thread; only a condition that never comes true takes the whole time."""
    deadline_s = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.002)
    return condition()


@contextmanager
def crowd(served: Served, clients: int, **fields: object) -> Iterator[list[httpx.Response]]:
    """So many clients whose requests are held, until the gate opens; their answers are there on leaving."""
    answers: list[httpx.Response] = []
    served.gate.clear()
    threads = [threading.Thread(target=lambda: answers.append(served.chat(**fields))) for _ in range(clients)]
    for number, thread in enumerate(threads):
        thread.start()
        assert eventually(lambda count=number: served.waiting + bool(served.service.engine.scheduler.running) > count)
    try:
        yield answers
    finally:
        served.gate.set()
        for thread in threads:
            thread.join()


# overload


def test_a_full_queue_refuses_before_the_prompt_is_looked_at(
    open_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_server() as served:
        with crowd(served, 3, max_tokens=4) as answers:
            assert served.waiting == 2
            encoded: list[object] = []
            monkeypatch.setattr(served.service.prompts, "chat", lambda *args: encoded.append(args))
            refused = served.chat()
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert refused.headers["retry-after"].isdigit()
            assert int(refused.headers["retry-after"]) >= 1
            assert encoded == []
            with pytest.raises(RateLimitError):
                OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0).chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": "x"}]
                )
        assert [answer.status_code for answer in answers] == [200] * 3
        assert served.metric("requests_shed_total", reason="queue_full") == 2
        assert served.outcomes("shed") == 2
        assert served.metric("refusal_seconds_count") == 2


def test_retry_after_is_the_engines_estimate(folder: Path) -> None:
    with serve(folder, says(folder, "ok"), max_queued=0) as server:
        server.engine.retry_after_s = 17
        assert server.chat().headers["retry-after"] == "17"


def test_one_keys_flood_does_not_keep_another_out(open_server: Callable[..., Any]) -> None:
    def key(name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {name}"}

    with open_server({"api_keys": ("flood", "light")}) as served:
        with crowd(served, 3, headers=key("flood"), max_tokens=4) as answers:
            assert served.chat(key("flood")).status_code == 429
            light = threading.Thread(target=lambda: answers.append(served.chat(key("light"), max_tokens=4)))
            light.start()
            assert eventually(lambda: len(answers) == 1), "the newest of the flood makes room"
            assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert int(answers[0].headers["retry-after"]) >= 1
        light.join()
        assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 429]
        sums = {outcome: served.outcomes(outcome) for outcome in ("length", "shed")}
        assert sums == {"length": 3, "shed": 2}
        assert served.metric("requests_admitted_total") + served.metric("requests_shed_total", reason="queue_full") == 5


# deadlines


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("given", ["header", "body"])
def test_a_request_that_waits_beyond_its_deadline_is_a_504(
    open_server: Callable[..., Any], given: str, stream: bool
) -> None:
    with open_server() as served:
        with crowd(served, 1, max_tokens=4):
            headers, fields = ({"X-Request-Timeout": "0.2"}, {}) if given == "header" else ({}, {"timeout": 0.2})
            late = served.chat(headers, stream=stream, **fields)
            assert (late.status_code, late.json()["error"]["type"]) == (504, "timeout_error")
            assert late.headers["x-should-retry"] == "false"
            assert served.waiting == 0
        assert served.outcomes("timeout") == 1
        assert served.metric("requests_cancelled_total", cause="deadline") == 1
        assert served.metric("cancel_seconds_count") == 1


def test_a_clients_library_does_not_send_again_what_was_too_late(open_server: Callable[..., Any]) -> None:
    with open_server() as served, crowd(served, 1, max_tokens=4):
        client = OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=2)
        with pytest.raises(InternalServerError) as late:
            client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "x"}],
                extra_headers={"X-Request-Timeout": "0.1"},
            )
        assert not isinstance(late.value, APITimeoutError)
        assert served.outcomes("timeout") == 1


def test_a_stream_that_runs_into_its_deadline_ends_with_an_error_and_counts_when_its_blocks_are_free(
    open_server: Callable[..., Any],
) -> None:
    with open_server() as served:
        body = CHAT | {"stream": True, "max_tokens": 400, "timeout": 1.5}
        with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
            next(lines)
            served.gate.clear()
            *_, last = lines
        assert '"deadline_exceeded"' in last
        assert served.outcomes("timeout") == 1
        assert served.service.engine.gauges().blocks_used > 0
        assert served.metric("requests_cancelled_total", cause="deadline") == 0, "its step is still running"
        served.gate.set()
        assert eventually(lambda: served.metric("requests_cancelled_total", cause="deadline") == 1)
        assert served.service.engine.gauges().blocks_used == 0


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", "61", ""])
def test_a_deadline_that_is_none_is_refused_by_name(folder: Path, value: str) -> None:
    with serve(folder, says(folder, "ok"), timeouts=TimeoutLimits(max_s=60)) as server:
        response = server.http.post(
            "/v1/chat/completions",
            json={"model": "tiny-model", "messages": [{"role": "user", "content": "x"}]},
            headers={"X-Request-Timeout": value},
        )
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "X-Request-Timeout")
        assert "at most 60" in error["message"]
        assert repr(value) in error["message"]
        assert server.chat(timeout=61.0).json()["error"]["param"] == "timeout"
        assert server.chat(timeout=0).json()["error"]["param"] == "timeout"


def test_the_header_goes_before_the_field_and_the_field_before_the_default(folder: Path) -> None:
    with serve(folder, says(folder, "ok"), timeouts=TimeoutLimits(default_s=30)) as server:
        body = {"model": "tiny-model", "messages": [{"role": "user", "content": "x"}]}
        left_s = []
        for headers, fields in (({"X-Request-Timeout": "10"}, {"timeout": 20}), ({}, {"timeout": 20}), ({}, {})):
            now_s = time.monotonic()
            assert server.http.post("/v1/chat/completions", json=body | fields, headers=headers).status_code == 200
            left_s.append(server.engine.submitted[-1].deadline_s - now_s)
        assert [round(seconds / 10) for seconds in left_s] == [1, 2, 3]


def test_without_a_default_nobody_has_a_deadline(folder: Path) -> None:
    with serve(folder, says(folder, "ok")) as server:
        assert server.chat(priority=-7).status_code == 200
        assert (server.engine.submitted[-1].deadline_s, server.engine.submitted[-1].priority) == (None, -7)


# clients that leave


def test_a_cancellation_counts_when_the_engine_has_freed_what_the_client_held(open_server: Callable[..., Any]) -> None:
    with open_server() as served:
        served.steps_left = 3
        body = CHAT | {"stream": True, "max_tokens": 400}
        with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()  # one that nobody holds would close the connection at once
            next(lines)
            assert eventually(lambda: served.held)
        assert eventually(lambda: served.outcomes("abort") == 1)
        assert served.metric("requests_cancelled_total", cause="client_disconnect") == 0
        served.gate.set()
        assert eventually(lambda: served.metric("requests_cancelled_total", cause="client_disconnect") == 1)
        assert served.service.engine.gauges().blocks_used == 0
        assert served.metric("cancel_seconds_count") == 1


# steps that fail


def test_a_step_that_fails_again_is_a_500_for_its_request_and_the_next_are_answered_as_before(
    open_server: Callable[..., Any],
) -> None:
    with open_server() as served:
        before = served.chat(max_tokens=20).json()["choices"]
        served.faults.append(ZeroDivisionError("secret internals"))
        assert served.chat(max_tokens=20).json()["choices"] == before
        served.faults += [ZeroDivisionError("secret internals")] * 2
        failed = served.chat(max_tokens=20)
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "engine_failed")
        assert "secret" not in failed.text
        assert served.chat(max_tokens=20).json()["choices"] == before
        assert served.service.state == "ready"
        served.http.get("/metrics")
        assert served.metric("engine_failed_steps_total") == 3


def test_running_out_of_memory_is_not_seen_by_clients(open_server: Callable[..., Any]) -> None:
    with open_server() as served:
        before = served.chat(max_tokens=20).json()["choices"]
        served.faults += [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")]
        assert served.chat(max_tokens=20).json()["choices"] == before
        served.http.get("/metrics")
        assert served.metric("engine_out_of_memory_retries_total") == 2


def test_an_engine_that_only_fails_gives_up_and_is_neither_ready_nor_live(open_server: Callable[..., Any]) -> None:
    with open_server() as served:
        served.faults += [ZeroDivisionError()] * 100
        while not served.service.engine.failed:
            assert served.chat().status_code == 500
        assert (served.service.live, served.service.state) == (False, "degraded")
        assert served.http.get("/health/live").status_code == 503
        assert served.http.get("/health/ready").status_code == 503
        served.faults.clear()


# the watchdog


def test_liveness_turns_red_while_a_step_hangs_and_green_when_it_ends(open_server: Callable[..., Any]) -> None:
    with open_server(stall_timeout_s=0.3) as served:
        assert served.http.get("/health/live").status_code == 200
        with crowd(served, 1, max_tokens=4) as answers:
            assert eventually(lambda: served.http.get("/health/live").status_code == 503)
            assert served.http.get("/health/ready").status_code == 503
            assert eventually(lambda: served.service.engine.stalls == 1)
        assert eventually(lambda: served.http.get("/health/live").status_code == 200)
        assert answers[0].status_code == 200
        assert served.http.get("/metrics").text.count("dspark_engine_stalls_total{")
        assert served.metric("engine_stalls_total") == 1
