"""`curl` as people type it: plain, streaming with -N, with headers, and with its own ways to send a body."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_server import MODEL, RunningServer, says, serve

TEXT = "Hello, wörld 😀!"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
BODY = json.dumps(CHAT)
STREAM = json.dumps(CHAT | {"stream": True})
JSON = ("-H", "content-type: application/json")


@pytest.fixture(scope="module", autouse=True)
def _curl_is_there() -> None:
    assert shutil.which("curl"), "these tests need curl on the PATH"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    with serve(folder, says(folder, TEXT, batch=3)) as running:
        yield running


def curl(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Quiet, but errors are shown."""
    return subprocess.run(["curl", "-sS", "-m", "20", *arguments], capture_output=True, text=True, check=check)


def answer(shown: str) -> tuple[int, dict[str, str], str]:
    """(status, headers, body) of what `curl -i` prints; an interim answer before it is left out."""
    head, _, body = shown.replace("\r\n", "\n").partition("\n\n")
    while head.startswith("HTTP/1.1 100"):
        head, _, body = body.partition("\n\n")
    status, *lines = head.split("\n")
    return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


def data(stream: str) -> list[str]:
    return [line.removeprefix("data: ") for line in stream.split("\n") if line.startswith("data: ")]


def test_plain(server: RunningServer) -> None:
    said = json.loads(curl(f"{server.url}/v1/chat/completions", *JSON, "-d", BODY).stdout)
    assert said["choices"][0]["message"]["content"] == TEXT


def test_curls_default_content_type_is_read_as_json_too(server: RunningServer) -> None:
    said = json.loads(curl(f"{server.url}/v1/chat/completions", "-d", BODY).stdout)
    assert said["choices"][0]["message"]["content"] == TEXT


@pytest.mark.parametrize("version", ["--http1.0", "--http1.1", "--http2"])
def test_every_version_of_http_that_curl_offers(server: RunningServer, version: str) -> None:
    said = json.loads(curl(f"{server.url}/v1/chat/completions", version, *JSON, "-d", BODY).stdout)
    assert said["choices"][0]["message"]["content"] == TEXT
    *chunks, end = data(curl("-N", f"{server.url}/v1/chat/completions", version, *JSON, "-d", STREAM).stdout)
    assert "".join(json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks) == TEXT
    assert end == "[DONE]"


def test_streamed_events_arrive_while_the_answer_is_made(folder: Path) -> None:
    with serve(folder, says(folder, TEXT)) as server:
        inner = server.engine.script

        def pause_after_three(*of: Any) -> Iterator[tuple[int, ...]]:
            for position, batch in enumerate(inner(*of)):
                server.engine.paused = position == 2
                yield batch

        server.engine.script = pause_after_three
        command = ["curl", "-sSN", f"{server.url}/v1/chat/completions", *JSON, "-d", STREAM]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            early = [process.stdout.readline() for _ in range(12)]  # role, three tokens, three lines each
            assert server.engine.paused
            assert process.poll() is None
            server.engine.paused = False
            late = process.stdout.read()
    assert len(data("".join(early))) == 4
    assert data(late)[-1] == "[DONE]"


def test_headers(server: RunningServer) -> None:
    asked = (
        "-i",
        f"{server.url}/v1/chat/completions",
        *JSON,
        "-H",
        "x-request-id: mine-1",
        "-H",
        "idempotency-key: c1",
    )
    status, headers, body = answer(curl(*asked, "-d", BODY).stdout)
    assert (status, headers["content-type"], headers["x-request-id"]) == (200, "application/json", "mine-1")
    assert int(headers["content-length"]) == len(body.encode())
    _, again, same = answer(curl(*asked, "-d", BODY).stdout)
    assert (again["idempotency-replayed"], same) == ("true", body)
    status, headers, _ = answer(curl("-iN", f"{server.url}/v1/chat/completions", *JSON, "-d", STREAM).stdout)
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert headers["cache-control"] == "no-cache"


def test_a_stream_goes_on_after_the_last_event_that_arrived(server: RunningServer) -> None:
    asked = ("-N", f"{server.url}/v1/chat/completions", *JSON, "-H", "idempotency-key: c2", "-d", STREAM)
    events = curl(*asked).stdout.split("\n\n")
    last = events[2].split("\n")[0].removeprefix("id: ")
    assert curl(*asked, "-H", f"last-event-id: {last}").stdout.split("\n\n") == events[3:]


def test_a_key_is_a_bearer(folder: Path) -> None:
    with serve(folder, says(folder, TEXT), api_keys=("secret",)) as server:
        status, headers, body = answer(curl("-i", f"{server.url}/v1/models").stdout)
        assert (status, headers["www-authenticate"]) == (401, "bearer")
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
        [model] = json.loads(curl(f"{server.url}/v1/models", "-H", "authorization: Bearer secret").stdout)["data"]
        assert model["id"] == MODEL
        same = json.loads(curl(f"{server.url}/v1/models", "--oauth2-bearer", "secret").stdout)
        assert same["data"] == [model]


def test_an_error_is_curls_error_with_its_body_shown(server: RunningServer) -> None:
    failed = curl("--fail-with-body", f"{server.url}/v1/chat/completions", *JSON, "-d", "{", check=False)
    assert failed.returncode == 22
    assert json.loads(failed.stdout)["error"]["message"].startswith("The body is not valid JSON")


def test_a_body_from_a_file_and_one_in_chunks(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "body.json").write_text(BODY)
    url = f"{server.url}/v1/chat/completions"
    for extra in ((), ("-H", "transfer-encoding: chunked")):
        said = json.loads(curl(url, *JSON, *extra, "--data-binary", f"@{tmp_path / 'body.json'}").stdout)
        assert said["choices"][0]["message"]["content"] == TEXT


@pytest.mark.parametrize("extra", [(), ("-H", "expect: 100-continue"), ("-H", "transfer-encoding: chunked")])
def test_a_body_that_is_too_large_still_gets_its_answer(
    server: RunningServer, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    (tmp_path / "large.json").write_text(json.dumps(CHAT | {"user": "u" * (2 << 20)}))
    status, _, body = answer(
        curl(
            "-i", f"{server.url}/v1/chat/completions", *JSON, *extra, "--data-binary", f"@{tmp_path / 'large.json'}"
        ).stdout
    )
    assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")


def test_what_is_no_endpoint(server: RunningServer) -> None:
    status, headers, body = answer(curl("-i", f"{server.url}/v1/chat/completions").stdout)
    assert (status, headers["allow"], json.loads(body)["error"]["code"]) == (405, "post", "method_not_allowed")
    status, _, body = answer(curl("-i", f"{server.url}/v1/chat").stdout)
    assert (status, json.loads(body)["error"]["code"]) == (404, "unknown_url")
