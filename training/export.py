"""Stage (d): a trained drafter as a folder that DeepSpec and this server load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dspark.engine.drafters.draft_checkpoint import ARCHITECTURE, EMBEDDING, EXTRAS_FILE, HEAD, DraftSpec
from dspark.engine.drafters.eagle3_checkpoint import EAGLE3_ARCHITECTURES, Eagle3Spec

DEEPSPEC_NUM_ANCHORS = 512
DEEPSPEC_STEP_LOSS_DECAY = 0.8
"""DeepSpec wants `num_anchors` and, of Eagle3, `step_loss_decay` to be present; they only matter to its own trainer."""


def export_checkpoint(
    folder: Path,
    spec: DraftSpec | Eagle3Spec,
    tensors: Mapping[str, Tensor],
    target_config: Mapping[str, object],
    shared: tuple[Tensor, Tensor] | None,
    target_name: str = "",
) -> None:
    """Write config.json, model.safetensors (bfloat16) and, where there is something to say in it, dspark.json.

    tensors: by DeepSpec's names, without embedding and head. target_config: the target's config.json, which the draft's is a
    copy of. shared: the target's embedding and head [V, d], stored too so that the folder is complete; None: left out, and
    taken from the target at load. target_name: what the checkpoint calls the target; information only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = _eagle3_config(spec, target_name) if isinstance(spec, Eagle3Spec) else _dspark_config(spec)
    config = {key: value for key, value in target_config.items() if key != "torch_dtype"} | _common_config(spec) | own
    stored = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    if shared is not None:
        stored[EMBEDDING], stored[HEAD] = (tensor.to(torch.bfloat16).contiguous().clone() for tensor in shared)
    partial = folder / "model.partial"
    save_file(stored, partial, metadata={"format": "pt"})
    partial.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    extras = _extras(spec, target_name)
    if extras:
        (folder / EXTRAS_FILE).write_text(json.dumps(extras) + "\n", encoding="utf-8")
    else:
        (folder / EXTRAS_FILE).unlink(missing_ok=True)  # an earlier export's


def _common_config(spec: DraftSpec | Eagle3Spec) -> dict[str, object]:
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "rms_norm_eps": spec.rms_norm_eps,
        "target_layer_ids": list(spec.target_layer_ids),
        "num_target_layers": spec.num_target_layers,
        "tie_word_embeddings": False,
        "head_dim": spec.head_dim,
        "attention_bias": spec.attention_bias,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "model_type": "qwen3",
    }


def _dspark_config(spec: DraftSpec) -> dict[str, object]:
    config: dict[str, object] = {
        "architectures": [ARCHITECTURE],
        "num_hidden_layers": spec.num_layers,
        "layer_types": ["full_attention"] * spec.num_layers,
        "block_size": spec.block_size,
        "mask_token_id": spec.mask_token_id,
        "num_anchors": DEEPSPEC_NUM_ANCHORS,
        "markov_rank": spec.markov_rank,
        "enable_confidence_head": spec.confidence_head,
    }
    if spec.markov:
        config["markov_head_type"] = spec.markov
    if spec.confidence_head:
        config["confidence_head_with_markov"] = spec.confidence_with_markov
    return config


def _eagle3_config(spec: Eagle3Spec, target_name: str) -> dict[str, object]:
    return {
        "architectures": [EAGLE3_ARCHITECTURES[0]],
        "num_hidden_layers": 1,
        "draft_num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "ttt_length": spec.ttt_length,
        "step_loss_decay": DEEPSPEC_STEP_LOSS_DECAY,
        "target_model_name_or_path": target_name,
    }


def _extras(spec: DraftSpec | Eagle3Spec, target_name: str) -> dict[str, object]:
    """What DeepSpec's layout has no place for; Eagle3's has one for the target's name, and no more is known of it."""
    if isinstance(spec, Eagle3Spec):
        return {}
    temperatures = dict(zip(("greedy", "sampled"), spec.temperatures, strict=True)) if spec.temperatures else None
    extras: dict[str, object] = {
        "target": target_name,
        "temperatures": temperatures,
        "draft_token_ids": spec.draft_token_ids,
    }
    if spec.sampling_scale != 1.0:
        extras["sampling_scale"] = spec.sampling_scale
    return {key: value for key, value in extras.items() if value}
