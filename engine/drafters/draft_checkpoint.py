"""DSpark and DFlash draft checkpoints as DeepSpec publishes them for Qwen3 targets: `config.json` + safetensors.

A DFlash checkpoint of DeepSpec is a `Qwen3DSparkModel` with Markov rank 0 and no confidence head. Sizes, rope and
epsilon in the file are the target's own; the attention is full in every layer whatever the target's is.
Source: DeepSpec (deepseek-ai), `modeling/dspark`; sequential temperatures: DSpark paper, confidence calibration (STS).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from dspark.engine.errors import ConfigError
from dspark.engine.models.spec import ModelSpec, RopeSpec, parse_config, read_rope
from dspark.engine.models.tensor_folder import TensorFolder

MarkovKind = Literal["vanilla", "gated", "rnn"]

ARCHITECTURE = "Qwen3DSparkModel"
EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"

_CONFIG_FILE = "config.json"
_CALIBRATION_FILE = "dspark.json"
_HEAD_DIM_MULTIPLE = 32  # kernels/rope_kv_write.py

_REFUSED_ARCHITECTURES = {
    "Gemma4DSparkModel": "Gemma4 targets are not supported",
    "Qwen3Eagle3Model": "Eagle3 drafters are not supported",
    "Eagle3DraftModel": "Eagle3 drafters are not supported",
    "Gemma4Eagle3Model": "Eagle3 drafters and Gemma4 targets are not supported",
    "DFlashDraftModel": "z-lab's DFlash predicts one position less per block and is not supported",
    "DSparkDraftModel": "this wrapping of DSpark weights is not supported",
}
# Keys of other trainers: each may change the computation, so a file that has one is not what it seems.
_SWITCH_PREFIXES = ("markov_", "confidence_", "enable_", "draft_", "dflash_", "dspark_", "fc_", "block_", "causal")
_KNOWN_SWITCHES = {
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "block_size",
}


@dataclass(frozen=True, slots=True)
class DraftSpec:
    """Sizes and switches of one draft checkpoint. γ = `block_size`.

    target_layer_ids: captured target layers, strictly increasing; -1 is the embedding's output.
    markov: None with `markov_rank` 0.     temperatures: [γ] or empty; log-odds of slot k are divided by the k-th (STS).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeSpec
    attention_bias: bool
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    markov: MarkovKind | None
    markov_rank: int
    confidence_head: bool
    confidence_with_markov: bool
    temperatures: tuple[float, ...] = ()


def read_draft_spec(folder: Path) -> DraftSpec:
    """Read and check `config.json` and, where there is one, `dspark.json`. Raises ConfigError("drafter")."""
    config = _read_json(folder / _CONFIG_FILE)
    _check_architecture(config)
    _check_switches(config)
    rank = _integer(config, "markov_rank", minimum=0)
    confidence_head = _boolean(config, "enable_confidence_head")
    with_markov = confidence_head and _boolean(config, "confidence_head_with_markov")
    if with_markov and rank == 0:
        raise _error("config.json: confidence_head_with_markov is true but markov_rank is 0; it needs a Markov head")
    block_size = _integer(config, "block_size")
    vocab_size = _integer(config, "vocab_size")
    mask_token_id = _integer(config, "mask_token_id", minimum=0)
    if mask_token_id >= vocab_size:
        raise _error(f"config.json: mask_token_id is {mask_token_id} but the vocabulary has {vocab_size} ids")
    num_heads = _integer(config, "num_attention_heads")
    num_kv_heads = _integer(config, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise _error(
            f"config.json: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    head_dim = _integer(config, "head_dim")
    if head_dim % _HEAD_DIM_MULTIPLE:
        raise _error(f"config.json: head_dim is {head_dim}; supported: multiples of {_HEAD_DIM_MULTIPLE}")
    return DraftSpec(
        vocab_size=vocab_size,
        hidden_size=_integer(config, "hidden_size"),
        intermediate_size=_integer(config, "intermediate_size"),
        num_layers=_integer(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_positive_number(config, "rms_norm_eps"),
        rope=_read_rope(config, folder / _CONFIG_FILE),
        attention_bias=_boolean(config, "attention_bias"),
        block_size=block_size,
        mask_token_id=mask_token_id,
        target_layer_ids=_target_layer_ids(config),
        num_target_layers=_integer(config, "num_target_layers"),
        markov=_markov_kind(config) if rank else None,
        markov_rank=rank,
        confidence_head=confidence_head,
        confidence_with_markov=with_markov,
        temperatures=_read_temperatures(folder / _CALIBRATION_FILE, block_size),
    )


def check_fits(spec: DraftSpec, target: ModelSpec) -> None:
    """Raise ConfigError("drafter") naming both values where the drafter was made for another target."""
    pairs = (
        ("vocabulary", spec.vocab_size, target.vocab_size),
        ("hidden size", spec.hidden_size, target.hidden_size),
        ("number of target layers", spec.num_target_layers, target.num_layers),
    )
    for what, drafter_value, target_value in pairs:
        if drafter_value != target_value:
            raise _error(
                f"its {what} is {drafter_value} but the target's is {target_value}; give one trained for this target"
            )
    # the last layer is left out: training stored its raw output, of which inference libraries give the normed one
    highest = target.num_layers - 2
    for layer in spec.target_layer_ids:
        if not -1 <= layer <= highest:
            raise _error(
                f"target_layer_ids has {layer} but a target of {target.num_layers} layers "
                f"offers -1 (embedding) to {highest}"
            )


def tensor_shapes(spec: DraftSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint must have, and its shape [out, in]; embedding and head may be left out of the file."""
    d, f, v, r = spec.hidden_size, spec.intermediate_size, spec.vocab_size, spec.markov_rank
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (v, d),
        HEAD: (v, d),
        "fc.weight": (d, len(spec.target_layer_ids) * d),
        "hidden_norm.weight": (d,),
        "norm.weight": (d,),
    }
    projections = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
    for i in range(spec.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"layers.{i}.{norm}.weight"] = (d,)
        for name, shape in projections.items():
            shapes[f"layers.{i}.self_attn.{name}.weight"] = shape
            if spec.attention_bias:
                shapes[f"layers.{i}.self_attn.{name}.bias"] = shape[:1]
        for norm in ("q_norm", "k_norm"):
            shapes[f"layers.{i}.self_attn.{norm}.weight"] = (spec.head_dim,)
        for name, shape in {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}.items():
            shapes[f"layers.{i}.mlp.{name}.weight"] = shape
    if spec.markov:
        shapes["markov_head.markov_w1.weight"] = (v, r)
        shapes["markov_head.markov_w2.weight"] = (v, r)
    if spec.markov == "gated":
        shapes["markov_head.gate_proj.weight"] = (r, d + r)
        shapes["markov_head.gate_proj.bias"] = (r,)
    if spec.markov == "rnn":
        shapes["markov_head.joint_proj.weight"] = (3 * r, 2 * r + d)
        shapes["markov_head.joint_proj.bias"] = (3 * r,)
    if spec.confidence_head:
        shapes["confidence_head.proj.weight"] = (1, d + r if spec.confidence_with_markov else d)
        shapes["confidence_head.proj.bias"] = (1,)
    return shapes


def load_draft_weights(folder: Path, spec: DraftSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, converted to `dtype`, by DeepSpec's names.

    Embedding and head may be absent. Raises ConfigError("drafter"), see `TensorFolder`.
    """
    return TensorFolder(folder, "drafter").load(tensor_shapes(spec), dtype, optional={EMBEDDING, HEAD})


def drop_shared_with_target(weights: Mapping[str, Tensor], embedding: Tensor, head: Tensor) -> dict[str, Tensor]:
    """`weights` without the embedding and head [V, d] that equal the target's, which then serve both models.

    Training freezes copies of them in the checkpoint; for a large vocabulary they are more than half of it.
    """
    shared = {EMBEDDING: embedding, HEAD: head}
    return {
        name: tensor
        for name, tensor in weights.items()
        if name not in shared or not torch.equal(tensor, shared[name].to(tensor.dtype))
    }


def _check_architecture(config: Mapping[str, Any]) -> None:
    architectures = config.get("architectures")
    found = architectures[0] if isinstance(architectures, list) and architectures else architectures
    if found == ARCHITECTURE:
        return
    why = _REFUSED_ARCHITECTURES.get(str(found), "it is not a known draft architecture")
    raise _error(
        f"config.json: architecture is {found!r}: {why}; supported: {ARCHITECTURE} (DSpark and DFlash by DeepSpec)"
    )


def _check_switches(config: Mapping[str, Any]) -> None:
    unknown = sorted(k for k in config if k.startswith(_SWITCH_PREFIXES) and k not in _KNOWN_SWITCHES)
    if unknown:
        raise _error(f"config.json: unknown switches {', '.join(unknown)} may change the computation; refused")
    if "quantization_config" in config:
        raise _error("config.json: quantization_config: quantised drafters are not supported")
    if config.get("hidden_act") != "silu":
        raise _error(f"config.json: hidden_act is {config.get('hidden_act')!r}; supported: 'silu'")
    if config.get("tie_word_embeddings") is not False:
        raise _error(
            f"config.json: tie_word_embeddings is {config.get('tie_word_embeddings')!r}; DeepSpec writes false"
        )
    kinds = config.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * _integer(config, "num_hidden_layers"):
        raise _error(
            f"config.json: layer_types is {kinds!r}; supported: 'full_attention' for each of num_hidden_layers"
        )


def _markov_kind(config: Mapping[str, Any]) -> MarkovKind:
    kind = str(config.get("markov_head_type")).lower()
    if kind not in get_args(MarkovKind):
        raise _error(
            f"config.json: markov_head_type is {config.get('markov_head_type')!r}; "
            f"supported: {', '.join(get_args(MarkovKind))} (markov_rank 0 for none)"
        )
    return cast(MarkovKind, kind)


def _target_layer_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    ids = config.get("target_layer_ids")
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise _error(f"config.json: target_layer_ids is {ids!r}; it must be a list of layer numbers")
    if any(b <= a for a, b in pairwise(ids)):
        raise _error(f"config.json: target_layer_ids {ids} must be strictly increasing")
    return tuple(ids)


def _read_rope(config: Mapping[str, Any], path: Path) -> RopeSpec:
    """The target's rope, which the draft config copies, in transformers 4's or 5's spelling."""
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "full_attention" in rope:  # per layer type; the draft has full attention only
        config = {**config, "rope_parameters": rope["full_attention"]}
    try:
        return read_rope(parse_config("Qwen3ForCausalLM", config, path), path)
    except ConfigError as error:
        raise _error(str(error).removeprefix(f"{error.field}: ")) from error


def _read_temperatures(path: Path, block_size: int) -> tuple[float, ...]:
    if not path.exists():
        return ()
    content = _read_json(path)
    unknown = sorted(content.keys() - {"temperatures"})
    if unknown:
        raise _error(f"{path.name}: unknown keys {', '.join(unknown)}; supported: temperatures")
    values = content.get("temperatures")
    if not isinstance(values, list) or len(values) != block_size or not all(_is_positive(v) for v in values):
        raise _error(f"{path.name}: temperatures is {values!r}; it must be {block_size} (block_size) positive numbers")
    return tuple(float(v) for v in values)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _error(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # both broken UTF-8 and broken JSON
        raise _error(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise _error(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _integer(config: Mapping[str, Any], key: str, minimum: int = 1) -> int:
    value = config.get(key)
    if type(value) is not int or value < minimum:
        raise _error(f"config.json: {key} is {_shown(config, key)}; it must be an integer of at least {minimum}")
    return value


def _boolean(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if type(value) is not bool:
        raise _error(f"config.json: {key} is {_shown(config, key)}; it must be true or false")
    return value


def _positive_number(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if not _is_positive(value):
        raise _error(f"config.json: {key} is {_shown(config, key)}; it must be a positive number")
    return float(cast(float, value))


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(cast(float, value)) and cast(float, value) > 0


def _shown(config: Mapping[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "missing"


def _error(message: str) -> ConfigError:
    return ConfigError("drafter", message)
