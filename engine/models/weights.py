"""Reads a model's tensors from safetensors and checks every one of them against the spec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from dspark.engine.models.spec import ModelSpec
from dspark.engine.models.tensor_folder import Progress, TensorFolder


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

    Raises ConfigError("model", ...), see `TensorFolder`.
    """
    report = None if progress is None else lambda done, total: progress("target_weights", done, total)
    return TensorFolder(folder, "model").load(weight_shapes(spec), dtype, ignored=_harmless, progress=report)


class OnDevice(Mapping[str, torch.Tensor]):
    """Weights that go to `device` each time they are asked for, and are not kept there.

    Models fuse layers, which copies them: the parts of all layers beside the whole would take the device's memory twice.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._weights = weights
        self._device = device

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._weights[name].to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _harmless(name: str) -> bool:
    """Older checkpoints store the rotary frequencies, and some a copy of a tied head; both follow from the rest."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"
