"""An exported drafter has DeepSpec's keys and tensors, all of them and no others, written out here by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_checkpoints import TARGET_CONFIG
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dspark.engine.drafters.draft_checkpoint import DraftSpec, MarkovKind, load_draft_weights, read_draft_spec
from dspark.engine.drafters.eagle3_checkpoint import Eagle3Spec, load_eagle3_weights, read_eagle3_spec
from dspark.engine.models.spec import RopeSpec
from dspark.training.draft_network import DraftNetwork
from dspark.training.eagle3_network import Eagle3Network
from dspark.training.export import export_checkpoint

EMBEDDING = torch.randn(97, 32, generator=torch.Generator().manual_seed(1))
SHARED = {"embed_tokens.weight": [97, 32], "lm_head.weight": [97, 32]}
QK_NORMS = {"self_attn.q_norm.weight": [32], "self_attn.k_norm.weight": [32]}
MLP = {"mlp.gate_proj.weight": [48, 32], "mlp.up_proj.weight": [48, 32], "mlp.down_proj.weight": [32, 48]}
DSPARK_LAYER = {
    "input_layernorm.weight": [32],
    "post_attention_layernorm.weight": [32],
    "self_attn.q_proj.weight": [128, 32],
    "self_attn.k_proj.weight": [64, 32],
    "self_attn.v_proj.weight": [64, 32],
    "self_attn.o_proj.weight": [32, 128],
    **QK_NORMS,
    **MLP,
}
DFLASH_TENSORS = {
    "fc.weight": [32, 96],
    "hidden_norm.weight": [32],
    "norm.weight": [32],
    **{f"layers.0.{name}": shape for name, shape in DSPARK_LAYER.items()},
    **{f"layers.1.{name}": shape for name, shape in DSPARK_LAYER.items()},
}
CONFIDENCE = {"confidence_head.proj.weight": [1, 40], "confidence_head.proj.bias": [1]}
MARKOV = {"markov_head.markov_w1.weight": [97, 8], "markov_head.markov_w2.weight": [97, 8]}
MARKOV_KINDS: dict[MarkovKind, dict[str, list[int]]] = {
    "vanilla": {},
    "gated": {"markov_head.gate_proj.weight": [8, 40], "markov_head.gate_proj.bias": [8]},
    "rnn": {"markov_head.joint_proj.weight": [24, 48], "markov_head.joint_proj.bias": [24]},
}
EAGLE3_TENSORS = {
    "fc.weight": [32, 160],
    "norm.weight": [32],
    "layers.0.hidden_norm.weight": [32],
    "layers.0.input_layernorm.weight": [32],
    "layers.0.post_attention_layernorm.weight": [32],
    "layers.0.self_attn.q_proj.weight": [128, 64],
    "layers.0.self_attn.k_proj.weight": [64, 64],
    "layers.0.self_attn.v_proj.weight": [64, 64],
    "layers.0.self_attn.o_proj.weight": [32, 128],
    **{f"layers.0.{name}": shape for name, shape in {**QK_NORMS, **MLP}.items()},
}
COMMON_KEYS = {
    "num_target_layers": 6,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "model_type": "qwen3",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DFLASH_KEYS = COMMON_KEYS | {
    "architectures": ["Qwen3DSparkModel"],
    "num_hidden_layers": 2,
    "layer_types": ["full_attention", "full_attention"],
    "block_size": 5,
    "mask_token_id": 96,
    "target_layer_ids": [0, 2, 4],
    "num_anchors": 512,
    "markov_rank": 0,
    "enable_confidence_head": False,
}
EAGLE3_KEYS = COMMON_KEYS | {
    "architectures": ["Qwen3Eagle3Model"],
    "num_hidden_layers": 1,
    "draft_num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "target_layer_ids": [0, 1, 2, 3, 4],
    "ttt_length": 5,
    "step_loss_decay": 0.8,
    "target_model_name_or_path": "tiny",
}
ONLY_THE_METHODS_OWN = {
    "block_size",
    "mask_token_id",
    "num_anchors",
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "ttt_length",
    "step_loss_decay",
    "draft_num_hidden_layers",
    "target_model_name_or_path",
}
"""Keys that DeepSpec reads a meaning from; the rest of the target's config is copied and may hold anything."""


def dspark_spec(markov: MarkovKind | None) -> DraftSpec:
    return DraftSpec(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rms_norm_eps=1e-6,
        rope=RopeSpec("default", 10000.0),
        attention_bias=False,
        block_size=5,
        mask_token_id=96,
        target_layer_ids=(0, 2, 4),
        num_target_layers=6,
        markov=markov,
        markov_rank=8 if markov else 0,
        confidence_head=markov is not None,
        confidence_with_markov=markov is not None,
    )


EAGLE3_SPEC = Eagle3Spec(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rms_norm_eps=1e-6,
    rope=RopeSpec("default", 10000.0),
    attention_bias=False,
    ttt_length=5,
    target_layer_ids=(0, 1, 2, 3, 4),
    num_target_layers=6,
)


def export(
    folder: Path, network: DraftNetwork | Eagle3Network, *, shared: bool = True, target: dict[str, Any] = TARGET_CONFIG
) -> dict[str, Tensor]:
    tensors = {name: parameter.detach() for name, parameter in network.named_parameters()}
    export_checkpoint(folder, network.spec, tensors, target, (EMBEDDING, EMBEDDING) if shared else None, "tiny")
    return tensors


def shapes(folder: Path) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def own_keys(folder: Path) -> set[str]:
    return config(folder).keys() & ONLY_THE_METHODS_OWN


@pytest.mark.parametrize("markov", ["vanilla", "gated", "rnn"])
def test_a_dspark_drafter_is_complete(tmp_path: Path, markov: MarkovKind) -> None:
    export(tmp_path, DraftNetwork(dspark_spec(markov), EMBEDDING, 16))
    assert shapes(tmp_path) == {**SHARED, **DFLASH_TENSORS, **MARKOV, **MARKOV_KINDS[markov], **CONFIDENCE}
    keys = DFLASH_KEYS | {
        "markov_rank": 8,
        "markov_head_type": markov,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    assert config(tmp_path).items() >= keys.items()
    assert own_keys(tmp_path) == keys.keys() & ONLY_THE_METHODS_OWN


def test_a_dflash_drafter_is_complete(tmp_path: Path) -> None:
    export(tmp_path, DraftNetwork(dspark_spec(None), EMBEDDING, 16))
    assert shapes(tmp_path) == {**SHARED, **DFLASH_TENSORS}
    assert config(tmp_path).items() >= DFLASH_KEYS.items()
    assert own_keys(tmp_path) == DFLASH_KEYS.keys() & ONLY_THE_METHODS_OWN


def test_an_eagle3_drafter_is_complete(tmp_path: Path) -> None:
    export(tmp_path, Eagle3Network(EAGLE3_SPEC, EMBEDDING, 16))
    assert shapes(tmp_path) == {**SHARED, **EAGLE3_TENSORS}
    assert config(tmp_path).items() >= EAGLE3_KEYS.items()
    assert own_keys(tmp_path) == EAGLE3_KEYS.keys() & ONLY_THE_METHODS_OWN


NETWORKS = {
    "dspark": lambda: DraftNetwork(dspark_spec("vanilla"), EMBEDDING, 16),
    "dflash": lambda: DraftNetwork(dspark_spec(None), EMBEDDING, 16),
    "eagle3": lambda: Eagle3Network(EAGLE3_SPEC, EMBEDDING, 16),
}


@pytest.mark.parametrize("method", NETWORKS)
def test_tensors_are_bfloat16_in_a_file_marked_pt_and_embedding_and_head_are_the_targets(
    tmp_path: Path, method: str
) -> None:
    network = NETWORKS[method]()
    tensors = export(tmp_path, network)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name in ("embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(stored[name], EMBEDDING.bfloat16())
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor.bfloat16())


@pytest.mark.parametrize("method", NETWORKS)
def test_without_shared_the_file_lacks_embedding_and_head_alone(tmp_path: Path, method: str) -> None:
    network = NETWORKS[method]()
    export(tmp_path / "whole", network)
    export(tmp_path / "small", network, shared=False)
    small = shapes(tmp_path / "small")
    assert not small.keys() & SHARED.keys()
    assert {**SHARED, **small} == shapes(tmp_path / "whole")
    assert config(tmp_path / "whole") == config(tmp_path / "small")


@pytest.mark.parametrize("markov", ["vanilla", "gated", "rnn", None])
def test_the_engine_reads_what_was_exported(tmp_path: Path, markov: MarkovKind | None) -> None:
    spec = dspark_spec(markov)
    tensors = export(tmp_path, DraftNetwork(spec, EMBEDDING, 16))
    assert read_draft_spec(tmp_path) == spec
    weights = load_draft_weights(tmp_path, spec, torch.float32)
    assert weights.keys() == tensors.keys() | SHARED.keys()
    assert all(torch.equal(weights[name], tensors[name].bfloat16().float()) for name in tensors)


def test_what_deepspecs_layout_has_no_place_for_is_stored_beside_it_and_leaves_with_the_next_export(
    tmp_path: Path,
) -> None:
    plain = dspark_spec("vanilla")
    temperatures = ((0.5, 1.0, 2.0, 1.5, 1.25), (0.75, 1.0, 1.0, 1.5, 4.0))
    spec = replace(plain, temperatures=temperatures, draft_token_ids=(3, 8, 90))
    tensors = export(tmp_path, DraftNetwork(spec, EMBEDDING, 16))
    assert read_draft_spec(tmp_path) == spec
    assert json.loads((tmp_path / "dspark.json").read_text())["target"] == "tiny"
    assert config(tmp_path).keys().isdisjoint({"temperatures", "draft_token_ids", "target"})
    export_checkpoint(tmp_path, plain, tensors, TARGET_CONFIG, None)
    assert read_draft_spec(tmp_path) == plain


def test_the_engine_reads_an_exported_eagle3_drafter(tmp_path: Path) -> None:
    tensors = export(tmp_path, NETWORKS["eagle3"]())
    assert read_eagle3_spec(tmp_path) == EAGLE3_SPEC
    weights = load_eagle3_weights(tmp_path, EAGLE3_SPEC, torch.float32)
    assert weights.keys() == tensors.keys() | SHARED.keys()
    assert all(torch.equal(weights[name], tensors[name].bfloat16().float()) for name in tensors)


def test_a_llama_targets_config_becomes_a_qwen3_drafts(tmp_path: Path) -> None:
    """Multi-head attention without `num_key_value_heads`, and transformers 4's spelling of dtype and rope."""
    target = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    export(tmp_path, NETWORKS["dspark"](), target=target)
    assert read_draft_spec(tmp_path) == dspark_spec("vanilla")
    assert "torch_dtype" not in config(tmp_path)
