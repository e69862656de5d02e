"""The drafter that ships for the default model: found by the target's name, small, complete, documented."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dspark.engine import locate_model
from dspark.engine.drafters import open_drafter
from dspark.engine.drafters.draft_checkpoint import EMBEDDING, HEAD, check_fits, load_draft_weights, read_draft_spec
from dspark.engine.models.locate import DEFAULT_MODEL_NAME
from dspark.engine.models.spec import read_spec

LARGEST_BYTES = 40_000_000


@pytest.fixture(scope="module")
def shipped() -> Path:
    folder = open_drafter._shipped_for(DEFAULT_MODEL_NAME)
    assert folder is not None
    return folder


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"])
def test_it_is_found_whatever_the_publisher_is_called(shipped: Path, name: str) -> None:
    assert open_drafter._shipped_for(name) == shipped


@pytest.mark.parametrize("name", ["SmolLM2-135M", "SmolLM2-360M-Instruct", "", "Qwen/Qwen3-4B"])
def test_other_models_have_none(name: str) -> None:
    assert open_drafter._shipped_for(name) is None


def test_it_fits_the_default_model_and_leaves_embedding_and_head_to_it(shipped: Path) -> None:
    spec = read_draft_spec(shipped)
    check_fits(spec, read_spec(locate_model(None).folder))
    weights = load_draft_weights(shipped, spec, torch.bfloat16)
    assert not {EMBEDDING, HEAD} & weights.keys()
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_its_confidence_comes_with_temperatures_and_its_head_is_reduced(shipped: Path) -> None:
    spec = read_draft_spec(shipped)
    assert [len(row) for row in spec.temperatures] == [spec.block_size] * 2
    assert spec.draft_token_ids is not None
    assert len(spec.draft_token_ids) == 8192


def test_it_is_small_and_has_a_card(shipped: Path) -> None:
    assert sum(path.stat().st_size for path in shipped.iterdir()) <= LARGEST_BYTES
    card = (shipped / "README.md").read_text(encoding="utf-8")
    for heading in ("## Training", "## Prompts", "## Held-out results", "## Limits"):
        assert heading in card
    assert "dspark train-drafter" in card
