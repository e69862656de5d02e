"""Random draft checkpoints, laid out as DeepSpec writes them: `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

TARGET_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 6,
    "layer_types": ["full_attention"] * 6,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
    "transformers_version": "5.10.2",
}
"""A tiny Qwen3 target; H * e = 128 differs from d = 32, as in Qwen3-4B."""


def draft_config(
    target: dict[str, Any] = TARGET_CONFIG,
    *,
    num_layers: int = 2,
    block_size: int = 5,
    target_layer_ids: tuple[int, ...] = (0, 2, 4),
    markov: str | None = "vanilla",
    markov_rank: int = 8,
    confidence: bool = True,
    confidence_with_markov: bool | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """The target's config with DeepSpec's keys; `markov=None` and `confidence=False` make it a DFlash draft."""
    config = {
        **target,
        "architectures": ["Qwen3DSparkModel"],
        "num_hidden_layers": num_layers,
        "layer_types": ["full_attention"] * num_layers,
        "tie_word_embeddings": False,
        "num_target_layers": target["num_hidden_layers"],
        "block_size": block_size,
        "mask_token_id": target["vocab_size"] - 1,
        "target_layer_ids": list(target_layer_ids),
        "num_anchors": 512,
        "markov_rank": markov_rank if markov else 0,
        "enable_confidence_head": confidence,
    }
    if markov:
        config["markov_head_type"] = markov
    if confidence:
        with_markov = markov is not None if confidence_with_markov is None else confidence_with_markov
        config["confidence_head_with_markov"] = with_markov
    return {**config, **overrides}


def draft_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint and its shape."""
    d, f, v, e = config["hidden_size"], config["intermediate_size"], config["vocab_size"], config["head_dim"]
    q, kv, r = config["num_attention_heads"] * e, config["num_key_value_heads"] * e, config["markov_rank"]
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (v, d),
        "lm_head.weight": (v, d),
        "fc.weight": (d, len(config["target_layer_ids"]) * d),
        "hidden_norm.weight": (d,),
        "norm.weight": (d,),
    }
    for i in range(config["num_hidden_layers"]):
        p = f"layers.{i}."
        shapes |= {
            f"{p}input_layernorm.weight": (d,),
            f"{p}post_attention_layernorm.weight": (d,),
            f"{p}self_attn.q_proj.weight": (q, d),
            f"{p}self_attn.k_proj.weight": (kv, d),
            f"{p}self_attn.v_proj.weight": (kv, d),
            f"{p}self_attn.o_proj.weight": (d, q),
            f"{p}self_attn.q_norm.weight": (e,),
            f"{p}self_attn.k_norm.weight": (e,),
            f"{p}mlp.gate_proj.weight": (f, d),
            f"{p}mlp.up_proj.weight": (f, d),
            f"{p}mlp.down_proj.weight": (d, f),
        }
        if config["attention_bias"]:
            shapes |= {f"{p}self_attn.{name}_proj.bias": (q if name == "q" else kv,) for name in "qkv"}
            shapes[f"{p}self_attn.o_proj.bias"] = (d,)
    if r > 0:
        shapes |= {"markov_head.markov_w1.weight": (v, r), "markov_head.markov_w2.weight": (v, r)}
        if config["markov_head_type"].lower() == "gated":
            shapes |= {"markov_head.gate_proj.weight": (r, d + r), "markov_head.gate_proj.bias": (r,)}
        if config["markov_head_type"].lower() == "rnn":
            shapes |= {"markov_head.joint_proj.weight": (3 * r, 2 * r + d), "markov_head.joint_proj.bias": (3 * r,)}
    if config["enable_confidence_head"]:
        width = d + r if config["confidence_head_with_markov"] else d
        shapes |= {"confidence_head.proj.weight": (1, width), "confidence_head.proj.bias": (1,)}
    return shapes


def eagle3_config(
    target: dict[str, Any] = TARGET_CONFIG,
    *,
    ttt_length: int = 5,
    target_layer_ids: tuple[int, ...] = (0, 2, 4),
    **overrides: Any,
) -> dict[str, Any]:
    """The target's config with the keys of DeepSpec's Eagle3."""
    return {
        **target,
        "architectures": ["Qwen3Eagle3Model"],
        "num_hidden_layers": 1,
        "draft_num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "tie_word_embeddings": False,
        "num_target_layers": target["num_hidden_layers"],
        "target_layer_ids": list(target_layer_ids),
        "ttt_length": ttt_length,
        "step_loss_decay": 0.8,
        "target_model_name_or_path": "tiny",
        **overrides,
    }


def eagle3_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of an Eagle3 checkpoint and its shape."""
    d, f, v, e = config["hidden_size"], config["intermediate_size"], config["vocab_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * e, config["num_key_value_heads"] * e
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (v, d),
        "lm_head.weight": (v, d),
        "fc.weight": (d, len(config["target_layer_ids"]) * d),
        "norm.weight": (d,),
        "layers.0.hidden_norm.weight": (d,),
        "layers.0.input_layernorm.weight": (d,),
        "layers.0.post_attention_layernorm.weight": (d,),
        "layers.0.self_attn.q_proj.weight": (q, 2 * d),
        "layers.0.self_attn.k_proj.weight": (kv, 2 * d),
        "layers.0.self_attn.v_proj.weight": (kv, 2 * d),
        "layers.0.self_attn.o_proj.weight": (d, q),
        "layers.0.self_attn.q_norm.weight": (e,),
        "layers.0.self_attn.k_norm.weight": (e,),
        "layers.0.mlp.gate_proj.weight": (f, d),
        "layers.0.mlp.up_proj.weight": (f, d),
        "layers.0.mlp.down_proj.weight": (d, f),
    }
    if config["attention_bias"]:
        shapes |= {f"layers.0.self_attn.{name}_proj.bias": (q if name == "q" else kv,) for name in "qkv"}
        shapes["layers.0.self_attn.o_proj.bias"] = (d,)
    return shapes


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """bfloat16, scaled so that every part of the network moves the logits: norms near 1, the rest by fan-in."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    shapes = eagle3_shapes(config) if "ttt_length" in config else draft_shapes(config)
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.2 * values
        elif name.endswith("bias"):
            values = 0.3 * values
        elif name not in ("embed_tokens.weight", "markov_head.markov_w1.weight"):
            values = 1.5 * values / shape[-1] ** 0.5
        tensors[name] = values.to(torch.bfloat16)
    return tensors


def write_draft_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write both files and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
