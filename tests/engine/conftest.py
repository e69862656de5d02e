"""A tiny target on disk, and engines around it that are shared by a module's tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_checkpoints import TARGET_CONFIG, draft_config, eagle3_config, random_tensors, write_draft_checkpoint
from fakes import OpenEngine, RunningEngine, running
from tiny_models import tiny_model, write_tiny_model

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
    config = draft_config(_config_of(tiny_target), block_size=4, num_layers=1, target_layer_ids=(-1, 0))
    return write_draft_checkpoint(tmp_path_factory.mktemp("draft"), config, random_tensors(config))


@pytest.fixture(scope="session")
def eagle3_checkpoint(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Eagle3 drafter of 4-token blocks for the tiny target."""
    config = eagle3_config(_config_of(tiny_target), ttt_length=4, target_layer_ids=(0,))
    return write_draft_checkpoint(tmp_path_factory.mktemp("eagle3"), config, random_tensors(config))


@pytest.fixture(scope="session")
def draft_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target with every weight slightly changed: it is right often, and wrong at every place of a block."""
    model = tiny_model("LlamaForCausalLM")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("draft_model")
    model.save_pretrained(folder)
    return folder


def _config_of(target: Path) -> dict[str, Any]:
    """What a draft checkpoint's config takes over from the tiny target."""
    spec = read_spec(target)
    return {
        **TARGET_CONFIG,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
    }


@pytest.fixture(scope="module", params=[0, pytest.param(1, marks=pytest.mark.slow)], ids=["lag0", "lag1"])
def lag(request: pytest.FixtureRequest) -> int:
    """Of the engines that tests start: every test is to pass with both. test_lag.py has the hardest of lag 1 for every day."""
    return request.param


@pytest.fixture(scope="module")
def open_engine(tiny_target: Path, engine_cache: Path, lag: int) -> Iterator[OpenEngine]:
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
                "lag": lag,
            } | options
            if num_blocks is not None:
                fields["kv_cache_bytes"] = num_blocks * BLOCK_BYTES[fields["dtype"]]
            given = {} if controller is None else {"controller": controller}
            return engines.enter_context(running(EngineConfig(**fields), use, **given))

        yield start
