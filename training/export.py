"""Stage (d): a trained drafter as a folder that DeepSpec and this server load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dspark.engine.drafters.draft_checkpoint import ARCHITECTURE, EMBEDDING, HEAD, DraftSpec

DEEPSPEC_NUM_ANCHORS = 512
"""DeepSpec wants the key `num_anchors` to be present; it only matters to its own trainer."""


def export_checkpoint(
    folder: Path,
    spec: DraftSpec,
    tensors: Mapping[str, Tensor],
    target_config: Mapping[str, object],
    shared: tuple[Tensor, Tensor] | None,
) -> None:
    """Write config.json and model.safetensors (bfloat16).

    target_config: the target's config.json, which the draft's is a copy of. shared: the target's embedding and head
    [V, d], stored too so that the folder is complete; None: left out, and taken from the target at load.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(target_config)
    config.update(
        architectures=[ARCHITECTURE],
        block_size=spec.block_size,
        mask_token_id=spec.mask_token_id,
        target_layer_ids=list(spec.target_layer_ids),
        num_target_layers=spec.num_target_layers,
        num_anchors=DEEPSPEC_NUM_ANCHORS,
        markov_rank=spec.markov_rank,
        enable_confidence_head=spec.confidence_head,
        num_hidden_layers=spec.num_layers,
        layer_types=["full_attention"] * spec.num_layers,
        tie_word_embeddings=False,
        head_dim=spec.head_dim,
        attention_bias=spec.attention_bias,
        hidden_act="silu",
        dtype="bfloat16",
        model_type="qwen3",
    )
    if spec.markov:
        config["markov_head_type"] = spec.markov
    if spec.confidence_head:
        config["confidence_head_with_markov"] = spec.confidence_with_markov
    stored = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    if shared is not None:
        stored[EMBEDDING], stored[HEAD] = (tensor.to(torch.bfloat16).contiguous().clone() for tensor in shared)
    partial = folder / "model.partial"
    save_file(stored, partial, metadata={"format": "pt"})
    partial.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
