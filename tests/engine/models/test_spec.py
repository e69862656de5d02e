"""What `read_spec` makes of a model folder, and how it refuses what cannot be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import ARCHITECTURES, tiny_model, write_tiny_model
from transformers import AutoConfig

from dspark.engine.errors import ConfigError
from dspark.engine.models.spec import RopeSpec, read_spec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
QWEN = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def write_config(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_model_gives_the_sizes_of_its_own_config(tmp_path: Path, architecture: str) -> None:
    spec = read_spec(write_tiny_model(tmp_path, architecture))
    config = AutoConfig.from_pretrained(tmp_path)
    attention = tiny_model(architecture).model.layers[0].self_attn
    assert spec.architecture == architecture
    assert (spec.vocab_size, spec.hidden_size, spec.intermediate_size) == (320, 64, 128)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads) == (2, 4, 2)
    assert spec.head_dim == attention.head_dim
    assert spec.rms_norm_eps == config.rms_norm_eps
    assert spec.max_position == 512
    assert spec.qkv_bias == (attention.q_proj.bias is not None)
    assert spec.o_bias == (attention.o_proj.bias is not None)
    assert spec.qk_norm == hasattr(attention, "q_norm")
    assert spec.eos_token_ids == (2,)
    assert spec.windows == ((24, 24) if architecture == "MistralForCausalLM" else (0, 0))
    assert not spec.tie_word_embeddings


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_attention_bias_reaches_the_output_projection_too(tmp_path: Path, architecture: str) -> None:
    spec = read_spec(write_tiny_model(tmp_path, architecture, attention_bias=True))
    assert spec.qkv_bias
    assert spec.o_bias


def test_the_two_spellings_of_rope_mean_the_same(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
    new = write_config(tmp_path / "new", LLAMA | {"rope_parameters": YARN | {"rope_theta": 5e5}})
    old_yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    old = write_config(tmp_path / "old", LLAMA | {"rope_theta": 5e5, "rope_scaling": old_yarn})
    assert read_spec(new).rope == read_spec(old).rope
    assert read_spec(old).rope.theta == 5e5


def test_rope_without_any_parameter_is_the_default_kind(tmp_path: Path) -> None:
    assert read_spec(write_config(tmp_path, LLAMA)).rope == RopeSpec("default", 10000.0)


def test_llama3_rope_keeps_its_four_parameters(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 512,
    }
    rope = read_spec(write_config(tmp_path, LLAMA | {"rope_scaling": scaling})).rope
    assert rope == RopeSpec("llama3", 10000.0, 8.0, 512, low_freq_factor=1.5, high_freq_factor=3.0)


@pytest.mark.parametrize(
    ("extra", "attention_factor"),
    [
        ({}, 0.1 * 1.3862943611198906 + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_yarn_attention_factor_is_resolved(tmp_path: Path, extra: dict[str, float], attention_factor: float) -> None:
    rope = read_spec(write_config(tmp_path, LLAMA | {"rope_scaling": YARN | extra})).rope
    assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_yarn_without_a_factor_stretches_to_the_maximum_position(tmp_path: Path) -> None:
    assert read_spec(write_config(tmp_path, LLAMA | {"rope_scaling": YARN | {"factor": None}})).rope.factor == 4.0


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"sliding_window": 16}, (0, 0, 0)),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, (0, 16, 16)),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3}, (0, 0, 0)),
        (
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (16, 0, 16),
        ),
    ],
)
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwen_windows_follow_its_switches(
    tmp_path: Path, architecture: str, changes: dict[str, Any], windows: tuple[int, ...]
) -> None:
    assert read_spec(write_config(tmp_path, QWEN | {"architectures": [architecture]} | changes)).windows == windows


@pytest.mark.parametrize(
    ("changes", "windows"),
    [({"sliding_window": 9}, (9, 9, 9)), ({"sliding_window": None}, (0, 0, 0)), ({}, (4096,) * 3)],
)
def test_mistral_windows_cover_every_layer(tmp_path: Path, changes: dict[str, Any], windows: tuple[int, ...]) -> None:
    config = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"} | changes
    assert read_spec(write_config(tmp_path, config)).windows == windows


@pytest.mark.parametrize(
    ("config_eos", "generation", "expected"),
    [
        (7, {"eos_token_id": [8, 9]}, (8, 9)),
        (7, {"eos_token_id": 8}, (8,)),
        (7, {"temperature": 0.6}, (7,)),
        ([7, 8], None, (7, 8)),
        (None, None, ()),
    ],
)
def test_end_of_text_ids_come_from_the_generation_config_first(
    tmp_path: Path, config_eos: Any, generation: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    assert read_spec(write_config(tmp_path, LLAMA | {"eos_token_id": config_eos}, generation)).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM; supported are LlamaForCausalLM, Mistral"),
        ({"architectures": None}, "names the architecture nothing; supported are"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'; supported are default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "rope parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_attention_heads": 0}, "LlamaForCausalLM config"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be at least 1, not -1"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads \\(3\\)"),
        ({"head_dim": 3}, "head_dim must be even"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_what_cannot_be_served_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_spec(write_config(tmp_path, LLAMA | changes))
    assert caught.value.field == "model"
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window is unset or switched off"),
        ({"layer_types": ["full_attention"]}, "num_hidden_layers"),
        ({"sliding_window": 0, "use_sliding_window": True}, "sliding_window must be at least 1"),
    ],
)
def test_qwen_layer_types_that_cannot_be_served_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_spec(write_config(tmp_path, QWEN | changes))


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        read_spec(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00"])
def test_a_corrupt_config_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_spec(tmp_path)
