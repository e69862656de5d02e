"""Two keys never share a prefix-cache block, whatever they send: with the engine itself, as the usage tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import run_service
from tiny_models import write_tiny_model

from dspark.engine import Engine, EngineConfig
from dspark.server.service import ServerSettings, Service
from dspark.server.text import ModelText

MODEL = "tiny"
PROMPT = "abc" * 40

Ask = Callable[[str, str, dict[str, Any]], tuple[int, str]]


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    """(key, path, body) -> (cached tokens, text), of a server with an empty cache and two keys."""
    folder = write_tiny_model(tmp_path / "model")
    config = EngineConfig(
        model=str(folder), cache_dir=tmp_path / "cache", dtype="float32", threads=1, max_num_seqs=4,
        max_num_batched_tokens=32, kv_cache_bytes=1 << 20,
    )  # fmt: skip
    service = Service(Engine.load(config), ModelText.load(folder), ServerSettings(MODEL, ("key-a", "key-b")))
    with run_service(service) as url, httpx.Client(base_url=url, timeout=60) as http:

        def post(key: str, path: str, body: dict[str, Any]) -> tuple[int, str]:
            fields = {"model": MODEL, "temperature": 0, "max_tokens": 8} | body
            answer = http.post(path, json=fields, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == 200, answer.text
            usage, choice = answer.json()["usage"], answer.json()["choices"][0]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            return usage["prompt_tokens_details"]["cached_tokens"], text

        yield post


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}),
    ],
)
def test_a_key_finds_its_own_blocks_and_nobody_elses(ask: Ask, path: str, body: dict[str, Any]) -> None:
    first, text = ask("key-a", path, body)
    again, same_text = ask("key-a", path, body)
    assert first == 0
    assert again > 0, "otherwise this test would show nothing"
    other, other_text = ask("key-b", path, body)
    assert other == 0
    assert ask("key-b", path, body)[0] == again
    assert text == same_text == other_text, "the answer depends on the key no more than on the cache"
