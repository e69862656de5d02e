"""SIGTERM to a real server process: not ready, drain up to a limit, exit 0; a second one aborts."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from tiny_models import write_tiny_model

MODEL = "tiny"
DSPARK = str(Path(sys.executable).parent / "dspark")
LONG = {
    "model": MODEL, "prompt": "ab", "stream": True, "ignore_eos": True, "max_tokens": 500, "n": 8, "seed": 1,
}  # fmt: skip
"""500 steps of plain decoding: long enough for whatever is done meanwhile."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@dataclass
class ServerProcess:
    process: subprocess.Popen[str]
    http: httpx.Client

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def exit_status(self) -> int:
        return self.process.wait(60)


Start = Callable[..., object]


@pytest.fixture
def start(model_folder: Path, cache: Path) -> Start:
    @contextmanager
    def started(*options: str, code: str = "") -> Iterator[ServerProcess]:
        """`dspark serve`; code: runs in the server's process before it starts."""
        arguments = ["serve", "--model", str(model_folder), "--served-model-name", MODEL, "--port", "0"]
        arguments += ["--cache-dir", str(cache), "--threads", "1", "--kv-cache-memory", "4M", "--speculation", "off"]
        arguments += ["--max-num-seqs", "8", "--max-num-batched-tokens", "32"]
        program = f"import sys; from dspark.server import cli; {code}\nsys.exit(cli.main({[*arguments, *options]!r}))"
        command: Sequence[str] = [sys.executable, "-c", program] if code else [DSPARK, *arguments, *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                url = re.search(r"http://[\d.:]+", process.stdout.readline())
                assert url is not None, process.stderr and process.stderr.read()
                with httpx.Client(base_url=url[0], timeout=60) as http:
                    yield ServerProcess(process, http)
            finally:
                process.kill()

    return started


def eventually(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    return condition()


def events(response: httpx.Response) -> Iterator[str]:
    return (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))


def test_sigterm_finishes_the_streams_refuses_new_work_and_exits_with_0(start: Start) -> None:
    with start() as server:
        idle = socket.create_connection((server.http.base_url.host, server.http.base_url.port))  # kept open, unused
        with server.http.stream("POST", "/v1/completions", json=LONG) as response:
            chunks = events(response)
            next(chunks)
            server.terminate()
            with httpx.Client(base_url=server.http.base_url) as other:
                assert eventually(lambda: other.get("/health/ready").status_code == 503)
                assert other.get("/health/live").status_code == 200
                refused = other.post("/v1/completions", json={"model": MODEL, "prompt": "ab"})
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "service_unavailable")
                *whole, last = chunks
        assert last == "[DONE]"
        assert sum('"finish_reason":"length"' in chunk for chunk in whole) == 8
        assert server.exit_status() == 0
        idle.close()


def test_a_second_sigterm_aborts_what_is_left(start: Start) -> None:
    with start("--drain-timeout", "1000") as server:
        with server.http.stream("POST", "/v1/completions", json=LONG) as response:
            chunks = events(response)
            next(chunks)
            server.terminate()
            with httpx.Client(base_url=server.http.base_url) as other:
                assert eventually(lambda: other.get("/health/ready").status_code == 503)
            server.terminate()
            *_, last = chunks
        assert '"service_unavailable"' in last
        assert server.exit_status() == 0


@pytest.mark.slow
def test_a_drain_ends_at_its_limit(start: Start) -> None:
    with start("--drain-timeout", "0.05") as server:
        with server.http.stream("POST", "/v1/completions", json=LONG) as response:
            chunks = events(response)
            next(chunks)
            server.terminate()
            *_, last = chunks
        assert '"service_unavailable"' in last
        assert server.exit_status() == 0


def test_a_step_that_never_ends_does_not_keep_the_server_from_going_down(start: Start) -> None:
    hang = (
        "from dspark.engine import async_engine, runner; import threading; async_engine.LAST_STEP_S = 0.2; "
        "runner.Runner.launch = lambda *_: threading.Event().wait()"
    )
    with start("--drain-timeout", "0.1", code=hang) as server:
        with pytest.raises(httpx.ReadTimeout):
            server.http.post("/v1/completions", json={"model": MODEL, "prompt": "ab"}, timeout=httpx.Timeout(5, read=1))
        server.terminate()
        assert server.exit_status() == 1


def test_sigterm_while_the_server_starts_ends_it_at_once(model_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = (
        f"from dspark.server import cli; cli.main(['serve', '--model', {str(model_folder)!r}, '--port', '{port}'])"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert eventually(lambda: can_connect(port)), "it listens before it loads"
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            assert process.stdout is not None
            assert process.stdout.read() == "", "it was not ready yet"
        finally:
            process.kill()


def can_connect(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
