"""The random models have the sizes that were published, and weights that come out the same whenever they are asked for."""

from __future__ import annotations

import pytest
import torch

from dspark.benchmarks.qwen3 import MODELS, RandomWeights, elements
from dspark.benchmarks.transformers_batching import make_model
from dspark.engine.drafters.draft_checkpoint import check_fits

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "billions", "drafter_billions"),
    [("Qwen3-4B", 4.02, 0.62), ("Qwen3-8B", 8.19, 1.13), ("Qwen3-14B", 14.77, 1.86)],
)
def test_published_sizes(name: str, billions: float, drafter_billions: float) -> None:
    model = MODELS[name]
    assert elements(model.target_shapes) / 1e9 == pytest.approx(billions, abs=0.005)
    assert elements(model.draft_shapes) / 1e9 == pytest.approx(drafter_billions, abs=0.005)


@pytest.mark.parametrize("name", MODELS)
def test_the_drafter_is_one_for_its_target(name: str) -> None:
    check_fits(MODELS[name].draft, MODELS[name].target)


def test_transformers_gets_the_same_weights() -> None:
    model = MODELS["tiny"]
    made = make_model(model, torch.float32, CPU)
    weights = RandomWeights(model.target_shapes, torch.float32, CPU)
    assert {name for name, _ in made.named_parameters()} == set(weights)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in made.named_parameters())


def test_weights_are_drawn_anew_and_come_out_the_same() -> None:
    weights = RandomWeights({"a.weight": (8, 16), "b.weight": (8, 16), "norm.weight": (8,)}, torch.float32, CPU)
    assert torch.equal(weights["a.weight"], weights["a.weight"])
    assert not torch.equal(weights["a.weight"], weights["b.weight"])
    assert weights["norm.weight"].tolist() == [1.0] * 8
    assert "a.bias" not in weights
    assert len(dict(weights)) == 3
