from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import run_service
from tiny_models import write_tiny_model, write_tiny_tokenizer

from dspark.engine import Engine, EngineConfig
from dspark.server.service import ServerSettings, Service
from dspark.server.text import ModelText


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as far as the server reads it: a byte-level tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_tokenizer(path, 320)
    return path


@pytest.fixture(scope="session")
def real_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the engine itself, speculating, on a tiny model with random weights that is called `tiny`."""
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)
    config = EngineConfig(
        model=str(folder),
        cache_dir=tmp_path_factory.mktemp("cache"),
        dtype="float32",
        threads=1,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        kv_cache_bytes=2 << 20,
        num_speculative_tokens=5,
    )
    engine = Engine.load(config)
    with run_service(Service(engine, ModelText.load(folder), ServerSettings("tiny"))) as url:
        yield url
        assert engine.gauges().blocks_used == 0, "a block leaked"
