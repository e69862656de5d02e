"""`drafter`: a folder; what kind of drafter it holds is read from its config, and what cannot work is refused at start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import OpenEngine
from tiny_models import tiny_model

from dspark.engine import ConfigError, EngineConfig
from dspark.engine.startup import start_up

KINDS = {"draft_checkpoint": "dspark", "eagle3_checkpoint": "eagle3", "draft_model": "draft_model"}


@pytest.mark.parametrize(("fixture", "kind"), KINDS.items())
def test_the_kind_is_read_from_the_config_and_its_passes_are_timed(
    tiny_target: Path, tmp_path: Path, request: pytest.FixtureRequest, fixture: str, kind: str
) -> None:
    folder: Path = request.getfixturevalue(fixture)
    config = EngineConfig(
        str(tiny_target), str(folder), dtype="float32", threads=1, cache_dir=tmp_path, max_num_seqs=2,
        max_num_batched_tokens=16,
    )  # fmt: skip
    parts = start_up(config)
    assert kind in parts.runner.drafter.sources
    cost = parts.controller.cost
    assert cost.max_rows == 16
    assert 0 < cost.verify_s(1) <= cost.verify_s(16)
    assert 0 < cost.draft_s(1) <= cost.draft_s(2 * parts.runner.drafter.block_size)


@pytest.mark.parametrize(("fixture", "kind"), [("eagle3_checkpoint", "eagle3"), ("draft_model", "draft_model")])
def test_a_drafter_that_runs_a_pass_per_token_drafts_as_many_as_are_asked_for(
    open_engine: OpenEngine, request: pytest.FixtureRequest, fixture: str, kind: str
) -> None:
    folder: Path = request.getfixturevalue(fixture)
    assert open_engine(drafter=str(folder), num_speculative_tokens=3).parts.runner.drafter.block_size == 3


def refusal(target: Path, drafter: Path, cache: Path, **options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        start_up(EngineConfig(model=str(target), drafter=str(drafter), dtype="float32", cache_dir=cache, **options))
    return caught.value


def test_eagle3_is_refused_in_rejection_mode(tiny_target: Path, eagle3_checkpoint: Path, engine_cache: Path) -> None:
    error = refusal(tiny_target, eagle3_checkpoint, engine_cache, verification="rejection", speculation="fixed")
    assert error.field == "verification"
    assert "eagle3" in str(error)


def test_more_tokens_than_eagle3_was_trained_for_are_refused(
    tiny_target: Path, eagle3_checkpoint: Path, engine_cache: Path
) -> None:
    error = refusal(tiny_target, eagle3_checkpoint, engine_cache, num_speculative_tokens=5)
    assert error.field == "num_speculative_tokens"
    assert "5 exceeds the 4 tokens" in str(error)


def test_a_draft_model_of_another_vocabulary_is_refused(tiny_target: Path, tmp_path: Path, engine_cache: Path) -> None:
    tiny_model("LlamaForCausalLM", vocab_size=300).save_pretrained(tmp_path)
    error = refusal(tiny_target, tmp_path, engine_cache)
    assert error.field == "drafter"
    assert "300" in str(error)
    assert "320" in str(error)


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "GemmaForCausalLM", "Gemma4Eagle3Model"])
def test_an_unknown_architecture_is_named(
    tiny_target: Path, tmp_path: Path, engine_cache: Path, architecture: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    error = refusal(tiny_target, tmp_path, engine_cache)
    assert error.field == "drafter"
    assert architecture in str(error)
    assert "supported" in str(error)
