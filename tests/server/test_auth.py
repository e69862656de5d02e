"""API keys on /v1, and only there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import MODEL, RunningServer, says, serve
from openai import OpenAI

KEYS = ("first-secret", "second-secret")
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    with serve(folder, says(folder, "ok"), api_keys=KEYS) as running:
        yield running


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens_v1(server: RunningServer, key: str) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
    answer = client.chat.completions.create(model=MODEL, messages=CHAT["messages"])
    assert answer.choices[0].message.content == "ok"


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Basic first-secret", "Bearer third", "first-secret", "Bearer first-secre"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/models", f"/v1/models/{MODEL}"])
def test_anything_else_is_a_401(server: RunningServer, path: str, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    method = "GET" if "models" in path else "POST"
    response = server.http.request(method, path, headers=headers, json=CHAT if method == "POST" else None)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


def test_a_wrong_key_is_in_no_message_and_no_log(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    response = server.http.get("/v1/models", headers={"authorization": "Bearer wrong-secret"})
    assert "secret" not in response.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_probes_need_no_key(server: RunningServer, path: str) -> None:
    assert server.http.get(path).status_code == 200


def test_each_key_is_a_tenant_of_the_prefix_cache(server: RunningServer) -> None:
    for key in KEYS:
        server.http.post("/v1/chat/completions", json=CHAT, headers={"authorization": f"Bearer {key}"})
    salts = [request.cache_salt for request in server.engine.submitted[-2:]]
    assert salts[0] != salts[1]
    assert not any(key.encode() in salt for key in KEYS for salt in salts)
