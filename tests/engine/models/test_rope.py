"""Rotary tables are transformers' own, bit for bit, for every supported kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dspark.engine.models.rope import rope_tables
from dspark.engine.models.spec import read_spec

KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn-tuned": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn-empty-ramp": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4},
}


def write_config(folder: Path, rope_parameters: dict[str, Any], head_dim: int) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 4 * head_dim,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 16384,
        "rope_parameters": rope_parameters,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_equal_those_of_transformers(tmp_path: Path, kind: str, head_dim: int) -> None:
    folder = write_config(tmp_path, KINDS[kind], head_dim)
    positions = torch.arange(600)[None]
    wanted_cos, wanted_sin = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))(torch.zeros(1), positions)

    cos, sin = rope_tables(read_spec(folder).rope, head_dim, max_len=600)

    assert cos.shape == sin.shape == (600, head_dim // 2)
    assert cos.dtype == sin.dtype == torch.float32
    # transformers repeats the table for the second half of the dimensions: the half-split convention
    torch.testing.assert_close(torch.cat((cos, cos), dim=-1), wanted_cos[0], rtol=0, atol=0)
    torch.testing.assert_close(torch.cat((sin, sin), dim=-1), wanted_sin[0], rtol=0, atol=0)


def test_a_longer_table_begins_with_the_shorter_one(tmp_path: Path) -> None:
    rope = read_spec(write_config(tmp_path, KINDS["yarn"], 64)).rope
    short, long = rope_tables(rope, 64, 100), rope_tables(rope, 64, 200)
    assert torch.equal(long[0][:100], short[0])
    assert torch.equal(long[1][:100], short[1])
