"""Eagle3 draft checkpoints as DeepSpec publishes them for Qwen3 targets: `config.json` + safetensors.

One layer whose attention reads inputs of twice the hidden width; `hidden_norm` is inside the layer. The full vocabulary:
no `d2t` or `t2d` tables, unlike the checkpoints of EAGLE's own repository and SpecForge, which are refused by their
tensor names. DeepSpec captures five target layers; any number is read here.
Source: DeepSpec (deepseek-ai), `modeling/eagle3`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dspark.engine.drafters.checkpoint_config import CheckpointConfig, check_made_for, drafter_error
from dspark.engine.drafters.draft_checkpoint import EMBEDDING, HEAD
from dspark.engine.models.spec import ModelSpec, RopeSpec
from dspark.engine.models.tensor_folder import TensorFolder

EAGLE3_ARCHITECTURES = ("Qwen3Eagle3Model", "Eagle3DraftModel")
"""DeepSpec's name and its former one."""

_KNOWN_SWITCHES = {"draft_num_hidden_layers"}


@dataclass(frozen=True, slots=True)
class Eagle3Spec:
    """Sizes of one Eagle3 checkpoint.

    ttt_length: most tokens of a draft block, those it was trained to draft ("training-time test").
    target_layer_ids: captured target layers, strictly increasing, from 0. num_target_layers: None where it is not said.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeSpec
    attention_bias: bool
    ttt_length: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int | None


def read_eagle3_spec(folder: Path) -> Eagle3Spec:
    """Read and check `config.json`. Raises ConfigError("drafter")."""
    config = CheckpointConfig(folder)
    if config.architecture not in EAGLE3_ARCHITECTURES:
        raise drafter_error(
            f"config.json: architecture is {config.architecture!r}; supported: {', '.join(EAGLE3_ARCHITECTURES)}"
        )
    config.check_switches(_KNOWN_SWITCHES)
    for key in ("num_hidden_layers", "draft_num_hidden_layers"):
        if config.integer(key) != 1:
            raise drafter_error(f"config.json: {key} is {config.integer(key)}; an Eagle3 drafter has 1 layer")
    num_heads, num_kv_heads, head_dim = config.heads()
    target_layer_ids = config.target_layer_ids()
    if target_layer_ids[0] < 0:
        raise drafter_error(f"config.json: target_layer_ids has {target_layer_ids[0]}; Eagle3's begin at layer 0")
    return Eagle3Spec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.positive_number("rms_norm_eps"),
        rope=config.rope(),
        attention_bias=config.boolean("attention_bias"),
        ttt_length=config.integer("ttt_length"),
        target_layer_ids=target_layer_ids,
        num_target_layers=config.integer("num_target_layers") if "num_target_layers" in config.values else None,
    )


def check_eagle3_fits(spec: Eagle3Spec, target: ModelSpec) -> None:
    """Raise ConfigError("drafter") naming both values where the drafter was made for another target."""
    layers = target.num_layers if spec.num_target_layers is None else spec.num_target_layers
    check_made_for(
        (
            ("vocabulary", spec.vocab_size, target.vocab_size),
            ("hidden size", spec.hidden_size, target.hidden_size),
            ("number of target layers", layers, target.num_layers),
        )
    )
    # the last layer is left out: training stored its raw output, of which inference libraries give the normed one
    highest = target.num_layers - 2
    if spec.target_layer_ids[-1] > highest:
        raise drafter_error(
            f"target_layer_ids has {spec.target_layer_ids[-1]} but a target of {target.num_layers} layers "
            f"offers 0 to {highest}"
        )


def eagle3_tensor_shapes(spec: Eagle3Spec) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint must have, and its shape [out, in]; embedding and head may be left out of the file."""
    d, f, v, layer = spec.hidden_size, spec.intermediate_size, spec.vocab_size, "layers.0."
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (v, d),
        HEAD: (v, d),
        "fc.weight": (d, len(spec.target_layer_ids) * d),
        "norm.weight": (d,),
    }
    for norm in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        shapes[f"{layer}{norm}.weight"] = (d,)
    projections = {"q_proj": (q, 2 * d), "k_proj": (kv, 2 * d), "v_proj": (kv, 2 * d), "o_proj": (d, q)}
    for name, shape in projections.items():
        shapes[f"{layer}self_attn.{name}.weight"] = shape
        if spec.attention_bias:
            shapes[f"{layer}self_attn.{name}.bias"] = shape[:1]
    for norm in ("q_norm", "k_norm"):
        shapes[f"{layer}self_attn.{norm}.weight"] = (spec.head_dim,)
    for name, shape in {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}.items():
        shapes[f"{layer}mlp.{name}.weight"] = shape
    return shapes


def load_eagle3_weights(folder: Path, spec: Eagle3Spec, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, converted to `dtype`, by DeepSpec's names.

    Embedding and head may be absent. Raises ConfigError("drafter"), see `TensorFolder`.
    """
    return TensorFolder(folder, "drafter").load(eagle3_tensor_shapes(spec), dtype, optional={EMBEDDING, HEAD})
