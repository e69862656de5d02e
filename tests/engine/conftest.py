"""A tiny target on disk, and engines around it that are shared by a module's tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from draft_checkpoints import TARGET_CONFIG, draft_config, random_tensors, write_draft_checkpoint
from fakes import OpenEngine, RunningEngine, running
from tiny_models import write_tiny_model

from dspark.engine import EngineConfig
from dspark.engine.models.spec import read_spec

BLOCK_BYTES = {"float32": 2 * 2 * 2 * 16 * 16 * 4, "bfloat16": 2 * 2 * 2 * 16 * 16 * 2}
"""Of the tiny target's K/V: K and V, layers, heads, head size, positions, bytes."""


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 layers of width 64, vocabulary 320, end of text 2, context 512."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "target")


@pytest.fixture(scope="session")
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def draft_checkpoint(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random drafter of 4-token blocks for the tiny target."""
    spec = read_spec(tiny_target)
    target = {
        **TARGET_CONFIG,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
    }
    config = draft_config(target, block_size=4, num_layers=1, target_layer_ids=(-1, 0))
    return write_draft_checkpoint(tmp_path_factory.mktemp("draft"), config, random_tensors(config))


@pytest.fixture(scope="module")
def open_engine(tiny_target: Path, engine_cache: Path) -> Iterator[OpenEngine]:
    """Starts an engine for the module: open_engine(drafter=..., controller=..., **EngineConfig fields).

    num_blocks: of the pool, in place of kv_cache_bytes. At the end every pool must be whole.
    """
    with ExitStack() as engines:

        def start(
            *, use: Any = None, controller: Any = None, num_blocks: int | None = None, **options: Any
        ) -> RunningEngine:
            fields: dict[str, Any] = {
                "model": str(tiny_target),
                "dtype": "float32",
                "threads": 1,
                "max_num_seqs": 32,
                "max_num_batched_tokens": 256,
                "max_queued_requests": 1000,
                "cache_dir": engine_cache,
            } | options
            if num_blocks is not None:
                fields["kv_cache_bytes"] = num_blocks * BLOCK_BYTES[fields["dtype"]]
            given = {} if controller is None else {"controller": controller}
            return engines.enter_context(running(EngineConfig(**fields), use, **given))

        yield start
