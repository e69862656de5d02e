"""/tokenize and /detokenize, in the shapes that vLLM's clients know."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_server import MODEL, RunningServer, says, serve

USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    with serve(folder, says(folder, "ok")) as running:
        yield running


def test_a_text_becomes_token_ids_and_text_again(server: RunningServer) -> None:
    text = "Hello, wörld 😀"
    tokenized = server.http.post("/tokenize", json={"model": MODEL, "prompt": text, "return_token_strs": True}).json()
    assert tokenized["tokens"] == server.service.text.encode(text)
    assert tokenized["count"] == len(tokenized["tokens"]) == len(tokenized["token_strs"])
    assert tokenized["max_model_len"] == 512
    assert "".join(tokenized["token_strs"][:7]) == "Hello, "
    assert server.http.post("/detokenize", json={"tokens": tokenized["tokens"]}).json() == {"prompt": text}


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f", "description": "x"}}]])
def test_a_conversation_becomes_the_prompt_that_a_chat_would_have(server: RunningServer, tools: Any) -> None:
    chat = {"messages": USER} | ({"tools": tools} if tools else {})
    tokenized = server.http.post("/tokenize", json=chat).json()
    body = server.chat(**chat, max_tokens=1)
    if body.status_code == 200:  # with tools it is too long for this model's context
        assert tuple(tokenized["tokens"]) == server.engine.submitted[-1].prompt_token_ids
    else:
        assert str(tokenized["count"] + 1) in body.json()["error"]["message"]
    assert tokenized["token_strs"] is None
    without = server.http.post("/tokenize", json=chat | {"add_generation_prompt": False}).json()
    assert without["count"] < tokenized["count"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": USER}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "mood": 1}, 400, "mood"),
        ("/tokenize", {"messages": USER, "chat_template_kwargs": {"x": 1}}, 400, "chat_template_kwargs.x"),
        ("/detokenize", {"tokens": [320]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {}, 400, "tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    server: RunningServer, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    response = server.http.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_a_key_is_needed_where_keys_are_set(folder: Path) -> None:
    with serve(folder, says(folder, "ok"), api_keys=("key",)) as server:
        assert server.http.post("/tokenize", json={"prompt": "a"}).status_code == 401
        assert server.http.post("/detokenize", json={"tokens": []}).status_code == 401
        headers = {"authorization": "Bearer key"}
        assert server.http.post("/tokenize", json={"prompt": "a"}, headers=headers).status_code == 200
