"""Draft checkpoints in DeepSpec's layout are read as they are; whatever does not fit is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_checkpoints import TARGET_CONFIG, draft_config, random_tensors, write_draft_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from dspark.engine.drafters.draft_checkpoint import (
    EMBEDDING,
    HEAD,
    check_fits,
    drop_shared_with_target,
    load_draft_weights,
    read_draft_spec,
)
from dspark.engine.errors import ConfigError
from dspark.engine.models.spec import ModelSpec, read_spec


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != key}


@pytest.fixture
def target(tmp_path: Path) -> ModelSpec:
    folder = tmp_path / "target"
    folder.mkdir()
    return read_spec(write_config(folder, TARGET_CONFIG))


# what is read


def test_every_key_of_deepspec_is_read(tmp_path: Path) -> None:
    spec = read_draft_spec(write_config(tmp_path, draft_config()))
    assert (spec.vocab_size, spec.hidden_size, spec.intermediate_size, spec.num_layers) == (97, 32, 48, 2)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.rms_norm_eps) == (4, 2, 32, 1e-6)
    assert (spec.block_size, spec.mask_token_id, spec.target_layer_ids, spec.num_target_layers) == (5, 96, (0, 2, 4), 6)
    assert (spec.markov, spec.markov_rank, spec.confidence_head, spec.confidence_with_markov) == (
        "vanilla",
        8,
        True,
        True,
    )
    assert (spec.attention_bias, spec.temperatures) == (False, ())


@pytest.mark.parametrize("written", ["Vanilla", "GATED", "rnn"])
def test_the_markov_head_type_is_compared_without_case(tmp_path: Path, written: str) -> None:
    assert read_draft_spec(write_config(tmp_path, draft_config(markov=written))).markov == written.lower()


def test_a_dflash_checkpoint_has_neither_markov_nor_confidence_head(tmp_path: Path) -> None:
    spec = read_draft_spec(write_config(tmp_path, draft_config(markov=None, confidence=False)))
    assert (spec.markov, spec.markov_rank, spec.confidence_head) == (None, 0, False)


YARN = {"factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "written",
    [
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **YARN}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", **YARN}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "yarn", "rope_theta": 5e5, **YARN},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "rope_theta": None,
                "rope_type": "default",
            }
        },
    ],
    ids=["transformers 5", "transformers 4", "nested by layer type"],
)
def test_rope_scaling_is_read_in_every_spelling(tmp_path: Path, written: dict[str, Any]) -> None:
    rope = read_draft_spec(write_config(tmp_path, {**without(draft_config(), "rope_parameters"), **written})).rope
    assert (rope.kind, rope.theta, rope.factor, rope.original_max_position) == ("yarn", 5e5, 4.0, 128)


def test_temperatures_and_the_ids_that_are_drafted_are_read_from_our_own_file(tmp_path: Path) -> None:
    (tmp_path / "dspark.json").write_text('{"temperatures": [1, 1.5, 2.0, 0.5, 1.0], "draft_token_ids": [0, 5, 96]}')
    spec = read_draft_spec(write_config(tmp_path, draft_config()))
    assert spec.temperatures == ((1.0, 1.5, 2.0, 0.5, 1.0),) * 2
    assert spec.draft_token_ids == (0, 5, 96)


def test_greedy_and_sampled_may_have_temperatures_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "dspark.json").write_text('{"temperatures": {"sampled": [5, 4, 3, 2, 1], "greedy": [1, 2, 3, 4, 5]}}')
    spec = read_draft_spec(write_config(tmp_path, draft_config()))
    assert spec.temperatures == ((1.0, 2.0, 3.0, 4.0, 5.0), (5.0, 4.0, 3.0, 2.0, 1.0))


def test_without_our_own_file_all_ids_are_drafted(tmp_path: Path) -> None:
    spec = read_draft_spec(write_config(tmp_path, draft_config()))
    assert spec.temperatures == ()
    assert spec.draft_token_ids is None


@pytest.mark.parametrize("markov", ["vanilla", "gated", "rnn", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_loaded_by_name_in_the_asked_dtype(tmp_path: Path, markov: str | None, dtype: torch.dtype) -> None:
    config = draft_config(markov=markov, attention_bias=True)
    tensors = random_tensors(config)
    write_draft_checkpoint(tmp_path, config, tensors)
    weights = load_draft_weights(tmp_path, read_draft_spec(tmp_path), dtype)
    assert weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(weights[name], tensor.to(dtype), rtol=0, atol=0)


def test_shards_named_by_an_index_are_read_as_one(tmp_path: Path) -> None:
    config = draft_config()
    tensors = random_tensors(config)
    write_config(tmp_path, config)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_draft_weights(tmp_path, read_draft_spec(tmp_path), torch.bfloat16).keys() == tensors.keys()


# the target's embedding and head


def test_embedding_and_head_equal_to_the_targets_are_dropped(tmp_path: Path) -> None:
    config = draft_config()
    tensors = random_tensors(config)
    write_draft_checkpoint(tmp_path, config, tensors)
    weights = load_draft_weights(tmp_path, read_draft_spec(tmp_path), torch.float32)
    kept = drop_shared_with_target(weights, tensors[EMBEDDING].float(), tensors[HEAD].float())
    assert weights.keys() - kept.keys() == {EMBEDDING, HEAD}


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_an_embedding_or_head_that_differs_from_the_targets_is_kept(name: str) -> None:
    tensors = random_tensors(draft_config())
    target = {key: tensors[key].clone() for key in (EMBEDDING, HEAD)}
    target[name][3, 4] += 1
    kept = drop_shared_with_target(tensors, target[EMBEDDING], target[HEAD])
    assert kept.keys() & {EMBEDDING, HEAD} == {name}


def test_embedding_and_head_may_be_absent_from_the_file(tmp_path: Path) -> None:
    config = draft_config()
    tensors = {name: t for name, t in random_tensors(config).items() if name not in (EMBEDDING, HEAD)}
    write_draft_checkpoint(tmp_path, config, tensors)
    assert not load_draft_weights(tmp_path, read_draft_spec(tmp_path), torch.float32).keys() & {EMBEDDING, HEAD}


# what is refused


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_draft_spec(folder)
    assert caught.value.field == "drafter"
    return str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("Gemma4DSparkModel", "Gemma4"),
        ("Qwen3Eagle3Model", "Eagle3"),
        ("Eagle3DraftModel", "Eagle3"),
        ("Gemma4Eagle3Model", "Eagle3"),
        ("DFlashDraftModel", "z-lab"),
        ("DSparkDraftModel", "wrapping"),
        ("Qwen3ForCausalLM", "not a known draft architecture"),
    ],
)
def test_other_draft_architectures_are_refused_by_name(tmp_path: Path, architecture: str, said: str) -> None:
    message = refusal(write_config(tmp_path, draft_config(architectures=[architecture])))
    assert architecture in message
    assert said in message
    assert "supported: Qwen3DSparkModel" in message


@pytest.mark.parametrize("architectures", [None, [], "Qwen3DSparkModel2"])
def test_a_config_without_a_usable_architecture_is_refused(tmp_path: Path, architectures: object) -> None:
    assert "architecture" in refusal(write_config(tmp_path, draft_config(architectures=architectures)))


REQUIRED = [
    "block_size",
    "mask_token_id",
    "target_layer_ids",
    "num_target_layers",
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "attention_bias",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    assert key in refusal(write_config(tmp_path, without(draft_config(), key)))


BAD_VALUES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown Markov head": ({"markov_head_type": "lstm"}, ("markov_head_type", "'lstm'", "vanilla, gated, rnn")),
    "Markov confidence without Markov": ({"markov_rank": 0}, ("confidence_head_with_markov", "markov_rank is 0")),
    "negative rank": ({"markov_rank": -1}, ("markov_rank", "-1", "at least 0")),
    "switch that is a number": ({"enable_confidence_head": 1}, ("enable_confidence_head", "1", "true or false")),
    "switch that is a word": ({"confidence_head_with_markov": "yes"}, ("confidence_head_with_markov", "'yes'")),
    "block of nothing": ({"block_size": 0}, ("block_size", "0", "at least 1")),
    "block size as text": ({"block_size": "7"}, ("block_size", "'7'", "integer")),
    "mask token outside the vocabulary": ({"mask_token_id": 97}, ("mask_token_id", "97")),
    "negative mask token": ({"mask_token_id": -1}, ("mask_token_id", "-1")),
    "layers out of order": ({"target_layer_ids": [2, 0, 4]}, ("target_layer_ids", "[2, 0, 4]", "increasing")),
    "a layer twice": ({"target_layer_ids": [2, 2, 4]}, ("target_layer_ids", "[2, 2, 4]", "increasing")),
    "no layers": ({"target_layer_ids": []}, ("target_layer_ids", "[]")),
    "layers that are no numbers": ({"target_layer_ids": ["a"]}, ("target_layer_ids", "['a']")),
    "heads not grouped": ({"num_key_value_heads": 3}, ("num_attention_heads 4", "num_key_value_heads 3")),
    "odd head dim": ({"head_dim": 24}, ("head_dim", "24", "multiples of 32")),
    "epsilon of zero": ({"rms_norm_eps": 0}, ("rms_norm_eps", "0", "positive")),
    "another activation": ({"hidden_act": "gelu"}, ("hidden_act", "'gelu'", "'silu'")),
    "tied embeddings": ({"tie_word_embeddings": True}, ("tie_word_embeddings", "True")),
    "sliding layers": ({"layer_types": ["sliding_attention"] * 2}, ("layer_types", "full_attention")),
    "rope of another kind": ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, ("rope", "longrope")),
    "quantised": ({"quantization_config": {"bits": 4}}, ("quantization_config", "not supported")),
    "z-lab's switches": ({"dflash_config": {"causal": True}}, ("dflash_config", "unknown switches")),
    "a reduced vocabulary": ({"draft_vocab_size": 50}, ("draft_vocab_size", "unknown switches")),
    "a Markov switch of tomorrow": ({"markov_order": 2}, ("markov_order", "unknown switches")),
}


@pytest.mark.parametrize(("overrides", "said"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_a_bad_value_is_refused_with_its_key_and_value(
    tmp_path: Path, overrides: dict[str, Any], said: tuple[str, ...]
) -> None:
    message = refusal(write_config(tmp_path, {**draft_config(), **overrides}))
    for words in said:
        assert words in message


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"{", "not valid JSON"), (b"\xff\xfe\x00", "not valid JSON"), (b"[]", "must hold a JSON object")],
)
def test_a_broken_config_file_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    message = refusal(tmp_path)
    assert said in message
    assert "config.json" in message


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "config.json") in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"temperatures": [1.0, 1.0]}, "it must be 5"),
        ({"temperatures": [1.0, 1.0, 0.0, 1.0, 1.0]}, "positive numbers"),
        ({"temperatures": [1.0, 1.0, True, 1.0, 1.0]}, "positive numbers"),
        ({"temperatures": None}, "it must be 5"),
        ({"temperatures": {"greedy": [1.0] * 5}}, "each under greedy and sampled"),
        ({"temperatures": {"greedy": [1.0] * 5, "sampled": [1.0] * 4}}, "it must be 5"),
        ({"temperatures": [1.0] * 5, "draft_ids": [1, 2]}, "unknown keys draft_ids"),
        ({"draft_token_ids": []}, "not empty"),
        ({"sampling_scale": 0}, "sampling_scale is 0; it must be a positive number"),
        ({"draft_token_ids": [4, 4]}, "strictly increasing"),
        ({"draft_token_ids": [-1, 4]}, "below 97"),
        ({"draft_token_ids": [4, 97]}, "below 97"),
        ({"draft_token_ids": [True, 97]}, "draft_token_ids must be a list"),
    ],
)
def test_a_bad_calibration_file_is_refused(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    (tmp_path / "dspark.json").write_text(json.dumps(content))
    message = refusal(write_config(tmp_path, draft_config()))
    assert "dspark.json" in message
    assert said in message


# tensors


def weights_refusal(folder: Path) -> str:
    spec = read_draft_spec(folder)
    with pytest.raises(ConfigError) as caught:
        load_draft_weights(folder, spec, torch.float32)
    assert caught.value.field == "drafter"
    return str(caught.value)


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("fc.weight"), "fc.weight is missing (wanted [32, 96])"),
        (drop("layers.1.self_attn.k_norm.weight"), "layers.1.self_attn.k_norm.weight is missing (wanted [32])"),
        (drop("markov_head.joint_proj.bias"), "markov_head.joint_proj.bias is missing (wanted [24])"),
        (drop("confidence_head.proj.weight"), "confidence_head.proj.weight is missing (wanted [1, 40])"),
        (put("fc.weight", torch.zeros(32, 64)), "fc.weight has shape [32, 64], wanted [32, 96]"),
        (put(HEAD, torch.zeros(96, 32)), "lm_head.weight has shape [96, 32], wanted [97, 32]"),
        (
            put("layers.2.input_layernorm.weight", torch.zeros(32)),
            "layers.2.input_layernorm.weight [32] is unexpected",
        ),
        (
            put("layers.0.self_attn.q_proj.bias", torch.zeros(128)),
            "layers.0.self_attn.q_proj.bias [128] is unexpected",
        ),
        (put("markov_head.gate_proj.bias", torch.zeros(8)), "markov_head.gate_proj.bias [8] is unexpected"),
        (put("d2t", torch.zeros(4)), "d2t [4] is unexpected"),
        (put("norm.weight", torch.zeros(32, dtype=torch.int8)), "norm.weight is stored as I8"),
    ],
)
def test_each_tensor_at_fault_is_named(tmp_path: Path, change: Callable[[dict[str, Tensor]], None], said: str) -> None:
    config = draft_config(markov="rnn")
    tensors = random_tensors(config)
    change(tensors)
    write_draft_checkpoint(tmp_path, config, tensors)
    assert said in weights_refusal(tmp_path)


def test_all_tensors_at_fault_are_named_at_once(tmp_path: Path) -> None:
    config = draft_config()
    tensors = random_tensors(config)
    del tensors["fc.weight"]
    tensors["norm.weight"] = torch.zeros(31)
    write_draft_checkpoint(tmp_path, config, tensors)
    message = weights_refusal(tmp_path)
    assert "fc.weight" in message
    assert "norm.weight has shape [31], wanted [32]" in message


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    write_config(tmp_path, draft_config())
    assert "has neither model.safetensors nor model.safetensors.index.json" in weights_refusal(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_config(tmp_path, draft_config())
    index = {"weight_map": {"fc.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names files that are not there: model-00001-of-00002.safetensors" in weights_refusal(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a"]}, {"weight_map": {"fc.weight": 3}}])
def test_an_index_without_a_map_of_names_is_refused(tmp_path: Path, index: dict[str, Any]) -> None:
    write_config(tmp_path, draft_config())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "weight_map" in weights_refusal(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 1000], ids=["empty", "torn header", "torn data"])
def test_a_torn_weights_file_is_named(tmp_path: Path, size: int) -> None:
    config = draft_config()
    write_draft_checkpoint(tmp_path, config, random_tensors(config))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path} is not a readable safetensors file" in weights_refusal(tmp_path)


# the target it was made for


def test_a_drafter_fits_the_target_it_was_made_for(tmp_path: Path, target: ModelSpec) -> None:
    check_fits(read_draft_spec(write_config(tmp_path, draft_config())), target)


@pytest.mark.parametrize("ids", [(-1, 2), (0, 4)])
def test_the_embedding_and_every_layer_but_the_last_may_be_captured(
    tmp_path: Path, target: ModelSpec, ids: tuple[int, ...]
) -> None:
    check_fits(read_draft_spec(write_config(tmp_path, draft_config(target_layer_ids=ids))), target)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 98}, "vocabulary is 97 but the target's is 98"),
        ({"hidden_size": 64}, "hidden size is 32 but the target's is 64"),
        ({"num_layers": 7}, "number of target layers is 6 but the target's is 7"),
    ],
)
def test_a_drafter_for_another_target_is_refused_with_both_values(
    tmp_path: Path, target: ModelSpec, change: dict[str, int], said: str
) -> None:
    spec = read_draft_spec(write_config(tmp_path, draft_config()))
    with pytest.raises(ConfigError, match=said):
        check_fits(spec, replace(target, **change))


@pytest.mark.parametrize(
    ("ids", "at_fault"), [((0, 5), 5), ((0, 6), 6), ((-2, 3), -2)], ids=["last", "beyond", "below"]
)
def test_a_captured_layer_the_target_does_not_offer_is_refused(
    tmp_path: Path, target: ModelSpec, ids: tuple[int, ...], at_fault: int
) -> None:
    spec = read_draft_spec(write_config(tmp_path, draft_config(target_layer_ids=ids)))
    with pytest.raises(ConfigError, match=rf"has {at_fault} but a target of 6 layers offers -1 \(embedding\) to 4"):
        check_fits(spec, target)
