"""Reads a model's tensors from safetensors and checks every one of them against the spec."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dspark.engine.errors import ConfigError
from dspark.engine.models.spec import ModelSpec

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, total) as a long start-up phase advances."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_LISTED_PROBLEMS = 20
"""An error names this many tensors and counts the rest: a wrong folder can have thousands."""


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the model needs, under Hugging Face's names; linear weights are [out, in]."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    linears = {
        "self_attn.q_proj": (q_size, hidden, spec.qkv_bias),
        "self_attn.k_proj": (kv_size, hidden, spec.qkv_bias),
        "self_attn.v_proj": (kv_size, hidden, spec.qkv_bias),
        "self_attn.o_proj": (hidden, q_size, spec.o_bias),
        "mlp.gate_proj": (inner, hidden, spec.mlp_bias),
        "mlp.up_proj": (inner, hidden, spec.mlp_bias),
        "mlp.down_proj": (hidden, inner, spec.mlp_bias),
    }
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for name, (rows, columns, biased) in linears.items():
        layer[f"{name}.weight"] = (rows, columns)
        if biased:
            layer[f"{name}.bias"] = (rows,)
    if spec.qk_norm:
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (spec.head_dim,)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
    for index in range(spec.num_layers):
        shapes.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    shapes["model.norm.weight"] = (hidden,)
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    return shapes


def load_weights(
    folder: Path, spec: ModelSpec, dtype: torch.dtype, progress: Progress | None = None
) -> dict[str, torch.Tensor]:
    """Every tensor of `weight_shapes(spec)` as `dtype`; `lm_head.weight` is absent when the head is tied.

    Files are memory-mapped: a tensor already of `dtype` is a view of the file and is read when first touched.
    Raises ConfigError("model", ...) that names each missing, unexpected or misshapen tensor, or the file at fault.
    """
    files = _weight_files(folder)
    wanted = weight_shapes(spec)
    found = {name: (path, shape) for path in files for name, shape in _stored_shapes(path).items()}
    _check(folder, wanted, {name: shape for name, (_, shape) in found.items()})
    weights: dict[str, torch.Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as stored:
            for name in sorted(name for name in wanted if found[name][0] == path):
                weights[name] = stored.get_tensor(name).to(dtype)
                if progress is not None:
                    progress("target_weights", len(weights), len(wanted))
    return weights


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if index.exists():
        return _shards(index)
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise ConfigError(
            "model",
            f"{folder} holds its weights as pickle ({', '.join(pickled[:3])}), which can run code when it is loaded; "
            "only safetensors are read: convert them with transformers' save_pretrained",
        )
    raise ConfigError("model", f"{folder} has neither {_SINGLE} nor {_INDEX}")


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError("model", f"{index} is not a safetensors index with a weight_map: {error!r}") from error
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise ConfigError("model", f"{index} names files that are not there: {', '.join(missing)}")
    return [index.parent / name for name in names]


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as stored:
            return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError("model", f"{path} is not a readable safetensors file: {error}") from error


def _check(folder: Path, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    problems = [f"{name} is missing (wanted {list(shape)})" for name, shape in wanted.items() if name not in found]
    problems += [
        f"{name} has shape {list(found[name])}, wanted {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    problems += [
        f"{name} {list(shape)} is unexpected"
        for name, shape in found.items()
        if name not in wanted and not _harmless(name)
    ]
    if problems:
        rest = len(problems) - _LISTED_PROBLEMS
        listed = "; ".join(problems[:_LISTED_PROBLEMS]) + (f"; and {rest} more" if rest > 0 else "")
        raise ConfigError("model", f"the tensors in {folder} do not fit its config.json: {listed}")


def _harmless(name: str) -> bool:
    """Older checkpoints store the rotary frequencies, and some a copy of a tied head; both follow from the rest."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"
