"""Eagle3 checkpoints in DeepSpec's layout are read as they are; whatever does not fit is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_checkpoints import TARGET_CONFIG, eagle3_config, random_tensors, write_draft_checkpoint
from torch import Tensor

from dspark.engine.drafters.draft_checkpoint import EMBEDDING, HEAD
from dspark.engine.drafters.eagle3_checkpoint import (
    check_eagle3_fits,
    eagle3_tensor_shapes,
    load_eagle3_weights,
    read_eagle3_spec,
)
from dspark.engine.errors import ConfigError
from dspark.engine.models.spec import ModelSpec, read_spec


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def target(tmp_path: Path) -> ModelSpec:
    return read_spec(write_config(tmp_path / "target", TARGET_CONFIG))


@pytest.mark.parametrize("architecture", ["Qwen3Eagle3Model", "Eagle3DraftModel"])
def test_every_key_of_deepspec_is_read(tmp_path: Path, architecture: str) -> None:
    config = eagle3_config(ttt_length=7, target_layer_ids=(0, 1, 2, 3, 4), architectures=[architecture])
    spec = read_eagle3_spec(write_config(tmp_path, config))
    assert (spec.vocab_size, spec.hidden_size, spec.intermediate_size) == (97, 32, 48)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.rms_norm_eps) == (4, 2, 32, 1e-6)
    assert (spec.ttt_length, spec.target_layer_ids, spec.num_target_layers) == (7, (0, 1, 2, 3, 4), 6)
    assert (spec.rope.kind, spec.rope.theta, spec.attention_bias) == ("default", 10000.0, False)


@pytest.mark.parametrize("bias", [False, True])
def test_weights_are_loaded_by_name_in_the_asked_dtype(tmp_path: Path, bias: bool) -> None:
    config = eagle3_config(attention_bias=bias)
    tensors = random_tensors(config)
    write_draft_checkpoint(tmp_path, config, tensors)
    weights = load_eagle3_weights(tmp_path, read_eagle3_spec(tmp_path), torch.float32)
    assert weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(weights[name], tensor.float(), rtol=0, atol=0)


def test_embedding_and_head_may_be_absent_from_the_file(tmp_path: Path) -> None:
    config = eagle3_config()
    tensors = {name: t for name, t in random_tensors(config).items() if name not in (EMBEDDING, HEAD)}
    write_draft_checkpoint(tmp_path, config, tensors)
    assert not load_eagle3_weights(tmp_path, read_eagle3_spec(tmp_path), torch.float32).keys() & {EMBEDDING, HEAD}


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_eagle3_spec(folder)
    assert caught.value.field == "drafter"
    return str(caught.value)


BAD_VALUES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "DSpark": ({"architectures": ["Qwen3DSparkModel"]}, ("'Qwen3DSparkModel'", "supported: Qwen3Eagle3Model")),
    "Gemma4": ({"architectures": ["Gemma4Eagle3Model"]}, ("'Gemma4Eagle3Model'", "supported: Qwen3Eagle3Model")),
    "two layers": ({"draft_num_hidden_layers": 2}, ("draft_num_hidden_layers is 2", "1 layer")),
    "two layers, other key": (
        {"num_hidden_layers": 2, "layer_types": None},
        ("num_hidden_layers is 2", "1 layer"),
    ),
    "no tokens": ({"ttt_length": 0}, ("ttt_length is 0", "at least 1")),
    "the embedding captured": ({"target_layer_ids": [-1, 2]}, ("target_layer_ids has -1", "layer 0")),
    "layers out of order": ({"target_layer_ids": [2, 0, 4]}, ("target_layer_ids [2, 0, 4]", "increasing")),
    "a reduced vocabulary": ({"draft_vocab_size": 50}, ("draft_vocab_size", "unknown switches")),
    "tied embeddings": ({"tie_word_embeddings": True}, ("tie_word_embeddings is True",)),
}


@pytest.mark.parametrize(("overrides", "said"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_a_bad_value_is_refused_with_its_key_and_value(
    tmp_path: Path, overrides: dict[str, Any], said: tuple[str, ...]
) -> None:
    message = refusal(write_config(tmp_path, {**eagle3_config(), **overrides}))
    for words in said:
        assert words in message


@pytest.mark.parametrize("key", ["ttt_length", "draft_num_hidden_layers", "target_layer_ids", "head_dim"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    config = {name: value for name, value in eagle3_config().items() if name != key}
    assert key in refusal(write_config(tmp_path, config))


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("fc.weight", torch.zeros(32, 160), "fc.weight has shape [32, 160], wanted [32, 96]"),
        (
            "layers.0.self_attn.q_proj.weight",
            torch.zeros(128, 32),
            "layers.0.self_attn.q_proj.weight has shape [128, 32], wanted [128, 64]",
        ),
        ("hidden_norm.weight", torch.zeros(32), "hidden_norm.weight [32] is unexpected"),
        ("midlayer.hidden_norm.weight", torch.zeros(32), "midlayer.hidden_norm.weight [32] is unexpected"),
        ("d2t", torch.zeros(4), "d2t [4] is unexpected"),
        ("layers.0.hidden_norm.weight", None, "layers.0.hidden_norm.weight is missing (wanted [32])"),
    ],
)
def test_each_tensor_at_fault_is_named(tmp_path: Path, name: str, tensor: Tensor | None, said: str) -> None:
    config = eagle3_config()
    tensors = {**random_tensors(config), name: tensor}
    write_draft_checkpoint(tmp_path, config, {key: t for key, t in tensors.items() if t is not None})
    with pytest.raises(ConfigError) as caught:
        load_eagle3_weights(tmp_path, read_eagle3_spec(tmp_path), torch.float32)
    assert said in str(caught.value)


def test_a_checkpoint_of_the_target_fits_and_one_that_does_not_say_its_depth_too(
    tmp_path: Path, target: ModelSpec
) -> None:
    spec = read_eagle3_spec(write_config(tmp_path, eagle3_config()))
    check_eagle3_fits(spec, target)
    check_eagle3_fits(replace(spec, num_target_layers=None), target)
    assert eagle3_tensor_shapes(spec)["fc.weight"] == (32, 96)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 98}, ("vocabulary is 98", "97")),
        ({"hidden_size": 64}, ("hidden size is 64", "32")),
        ({"num_target_layers": 7}, ("number of target layers is 7", "6")),
        ({"target_layer_ids": (0, 5)}, ("target_layer_ids has 5", "0 to 4")),
    ],
)
def test_a_checkpoint_of_another_target_is_refused_with_both_values(
    tmp_path: Path, target: ModelSpec, change: dict[str, Any], said: tuple[str, ...]
) -> None:
    spec = replace(read_eagle3_spec(write_config(tmp_path, eagle3_config())), **change)
    with pytest.raises(ConfigError) as caught:
        check_eagle3_fits(spec, target)
    for words in said:
        assert words in str(caught.value)
