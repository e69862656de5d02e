"""What a target model is, read from the config.json of its Hugging Face folder.

transformers' own config classes do the reading, so that both spellings of the rotary parameters (transformers 4:
`rope_theta` and `rope_scaling`; transformers 5: `rope_parameters`) and every default mean what they mean there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from dspark.engine.errors import ConfigError

RopeKind = Literal["default", "linear", "llama3", "yarn"]

_CONFIG_CLASSES: dict[str, type[PreTrainedConfig]] = {
    "LlamaForCausalLM": LlamaConfig,
    "MistralForCausalLM": MistralConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
}

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES = (*_REQUIRED, "num_key_value_heads", "max_position_embeddings")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding. Fields after `factor` are read by the kinds named beside them only."""

    kind: RopeKind
    theta: float
    factor: float = 1.0
    original_max_position: int = 0  # llama3, yarn: tokens the frequencies were trained for
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the range of interpolated dimensions outwards
    attention_factor: float = 1.0  # yarn: multiplies cos and sin, already resolved


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape and arithmetic of a decoder of the Llama family. Sizes in elements, lengths in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    rope: RopeSpec
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    """Per layer, how many tokens a query sees, its own included; 0: all."""
    eos_token_ids: tuple[int, ...]


def read_spec(folder: Path) -> ModelSpec:
    """Read config.json and, for the end-of-text ids, generation_config.json.

    Raises ConfigError("model", ...) for a missing or corrupt file and for whatever the decoder does not support.
    """
    path = folder / "config.json"
    raw = _read_json(path)
    architecture = _supported_architecture(raw, path)
    config = parse_config(architecture, raw, path)
    _check_sizes(config, path)
    biased = bool(getattr(config, "attention_bias", False))
    return ModelSpec(
        architecture=architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config, path),
        rms_norm_eps=float(config.rms_norm_eps),
        max_position=config.max_position_embeddings,
        rope=read_rope(config, path),
        tie_word_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=biased or architecture == "Qwen2ForCausalLM",
        o_bias=biased,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        windows=_windows(config, path),
        eos_token_ids=_eos_token_ids(folder, raw),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("model", f"{path} does not exist; a model folder needs config.json and safetensors") from None
    except (OSError, ValueError) as error:
        raise ConfigError("model", f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError("model", f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _supported_architecture(raw: Mapping[str, Any], path: Path) -> str:
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if architecture not in _CONFIG_CLASSES:
        raise ConfigError(
            "model",
            f"{path} names the architecture {architecture or 'nothing'}; supported are {', '.join(_CONFIG_CLASSES)}",
        )
    if raw.get("quantization_config"):
        raise ConfigError(
            "model",
            f"{path} has a quantization_config; only unquantised safetensors and GGUF files are supported",
        )
    return str(architecture)


def parse_config(architecture: str, raw: Mapping[str, Any], path: Path) -> PreTrainedConfig:
    missing = [key for key in _REQUIRED if raw.get(key) is None]
    if missing:
        raise ConfigError("model", f"{path} lacks {', '.join(missing)}")
    try:
        return _CONFIG_CLASSES[architecture].from_dict(dict(raw))
    except KeyError as error:  # what transformers raises for a rope kind that lacks a parameter
        raise ConfigError("model", f"{path}: {error.args[0]}") from error
    except (StrictDataclassError, ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError("model", f"{path} is not a valid {architecture} config: {error}") from error


def _check_sizes(config: PreTrainedConfig, path: Path) -> None:
    for name in _SIZES:
        value = getattr(config, name)
        if value < 1:
            raise ConfigError("model", f"{path}: {name} must be at least 1, not {value}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            "model",
            f"{path}: num_attention_heads ({config.num_attention_heads}) must be a multiple of "
            f"num_key_value_heads ({config.num_key_value_heads})",
        )
    if config.hidden_act != "silu":
        raise ConfigError("model", f"{path}: hidden_act is {config.hidden_act!r}; supported is 'silu'")


def _head_dim(config: PreTrainedConfig, path: Path) -> int:
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    if head_dim < 2 or head_dim % 2:
        raise ConfigError("model", f"{path}: head_dim must be even for rotary embeddings, not {head_dim}")
    return head_dim


def read_rope(config: PreTrainedConfig, path: Path) -> RopeSpec:
    rope: dict[str, Any] = config.rope_parameters
    kind = rope.get("rope_type")
    if kind not in get_args(RopeKind):
        raise ConfigError("model", f"{path}: rope type {kind!r}; supported are {', '.join(get_args(RopeKind))}")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise ConfigError(
            "model", f"{path}: partial_rotary_factor is {rope['partial_rotary_factor']}; supported is 1.0 only"
        )
    try:
        theta = float(rope["rope_theta"])
        if kind == "default":
            return RopeSpec("default", theta)
        original = int(rope.get("original_max_position_embeddings", config.max_position_embeddings))
        factor = rope["factor"]
        if factor is None and kind == "yarn":
            factor = config.max_position_embeddings / original
        if kind == "linear":
            return RopeSpec("linear", theta, float(factor))
        if kind == "llama3":
            return RopeSpec(
                "llama3",
                theta,
                float(factor),
                original,
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
            )
        return RopeSpec(
            "yarn",
            theta,
            float(factor),
            original,
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            truncate=bool(rope.get("truncate", True)),
            attention_factor=_yarn_attention_factor(rope, float(factor)),
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError("model", f"{path}: rope parameters {rope} are not valid: {error}") from error


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """Peng et al. 2023 (YaRN), eq. 22; a ratio of two such terms where the checkpoint gives mscale_all_dim."""
    given = rope.get("attention_factor")
    if given is not None:
        return float(given)
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return _yarn_mscale(factor, float(mscale)) / _yarn_mscale(factor, float(mscale_all_dim))
    return _yarn_mscale(factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _windows(config: PreTrainedConfig, path: Path) -> tuple[int, ...]:
    window = getattr(config, "sliding_window", None)
    if window is not None and window < 1:
        raise ConfigError("model", f"{path}: sliding_window must be at least 1, not {window}")
    if isinstance(config, LlamaConfig):
        return (0,) * config.num_hidden_layers
    if isinstance(config, MistralConfig):
        return (window or 0,) * config.num_hidden_layers
    layer_types: list[str] = config.layer_types
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(
            "model",
            f"{path}: layer_types holds {', '.join(sorted(unknown))}; supported are full_attention, sliding_attention",
        )
    if "sliding_attention" in layer_types and window is None:
        raise ConfigError(
            "model", f"{path}: layer_types asks for sliding_attention but sliding_window is unset or switched off"
        )
    return tuple((window or 0) if kind == "sliding_attention" else 0 for kind in layer_types)


def _eos_token_ids(folder: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    given = _read_json(path).get("eos_token_id") if path.exists() else None
    if given is None:
        path, given = folder / "config.json", raw.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise ConfigError("model", f"{path}: eos_token_id must be a token id or a list of them, not {given!r}")
    return tuple(ids)
