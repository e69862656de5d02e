"""Who may read what: /metrics on its own port, and scripts of web pages."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine
from http_server import MODEL, run_service, says

from dspark.server.service import ServerSettings, Service
from dspark.server.text import ModelText

PAGE = "https://chat.example.org"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


def make_service(folder: Path, **settings: object) -> Service:
    return Service(FakeEngine(says(folder, "ok")), ModelText.load(folder), ServerSettings(MODEL, **settings))


@pytest.fixture(scope="module")
def urls(folder: Path) -> Iterator[tuple[str, str]]:
    """The server's URL and the one of its metrics."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with run_service(make_service(folder, metrics_port=port), listener) as url:
            yield url, f"http://127.0.0.1:{port}"


def test_the_metrics_port_answers_the_metrics_of_the_whole_server(urls: tuple[str, str]) -> None:
    assert httpx.post(f"{urls[0]}/v1/chat/completions", json=CHAT).status_code == 200
    page = httpx.get(f"{urls[1]}/metrics")
    assert page.status_code == 200
    assert f'dspark_requests_admitted_total{{model="{MODEL}"}} 1.0' in page.text


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/openapi.json", "/nothing"])
def test_the_metrics_port_answers_nothing_else(urls: tuple[str, str], path: str) -> None:
    answer = httpx.get(urls[1] + path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


def test_nobody_generates_over_the_metrics_port(urls: tuple[str, str]) -> None:
    assert httpx.post(f"{urls[1]}/v1/chat/completions", json=CHAT).status_code == 404


@pytest.mark.parametrize("headers", [{}, {"host": "127.0.0.1:{port}"}, {"x-forwarded-port": "{port}"}])
def test_the_main_port_has_no_metrics_whatever_the_headers_claim(
    urls: tuple[str, str], headers: dict[str, str]
) -> None:
    port = urls[1].rpartition(":")[2]
    answer = httpx.get(f"{urls[0]}/metrics", headers={name: value.format(port=port) for name, value in headers.items()})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


def preflight(url: str, origin: str) -> httpx.Response:
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    return httpx.options(f"{url}/v1/chat/completions", headers=headers)


def test_by_default_no_page_may_read_an_answer(folder: Path) -> None:
    with run_service(make_service(folder)) as url:
        answers = [preflight(url, PAGE), httpx.get(f"{url}/v1/models", headers={"origin": PAGE})]
    assert not any(name.startswith("access-control-") for answer in answers for name in answer.headers)
    assert answers[0].status_code == 405


@pytest.fixture(scope="module")
def open_to_page(folder: Path) -> Iterator[str]:
    with run_service(make_service(folder, cors_origins=(PAGE,), api_keys=("secret-key",))) as url:
        yield url


def test_a_named_origin_may_call_with_a_key_and_read_the_answer(open_to_page: str) -> None:
    asked = preflight(open_to_page, PAGE)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in asked.headers["access-control-allow-headers"]
    headers = {"origin": PAGE, "authorization": "Bearer secret-key"}
    answer = httpx.post(f"{open_to_page}/v1/chat/completions", json=CHAT, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "x-request-id" in answer.headers["access-control-expose-headers"]


def test_its_scripts_can_read_errors_too(open_to_page: str) -> None:
    answer = httpx.get(f"{open_to_page}/v1/models", headers={"origin": PAGE})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, PAGE)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", f"{PAGE}.evil.example", "null", PAGE.replace("https", "http")]
)
def test_another_origin_may_not(open_to_page: str, origin: str) -> None:
    assert preflight(open_to_page, origin).status_code == 400
    answer = httpx.get(f"{open_to_page}/v1/models", headers={"origin": origin})
    assert "access-control-allow-origin" not in answer.headers


def test_no_origin_is_allowed_cookies(open_to_page: str) -> None:
    assert "access-control-allow-credentials" not in preflight(open_to_page, PAGE).headers
