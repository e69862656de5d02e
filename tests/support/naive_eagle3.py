"""Eagle3 as its formulae read, one index at a time: fp32, no cache, no batch, no code shared with the product.

Index t joins the token at t+1 with a hidden state u_t and predicts the token at t+2. Symbols as in naive_dspark.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding


@dataclass
class NaiveDraft:
    """tokens [γ]; logits [γ, V]; outputs: the layer's at every index, of which the last γ predict the tokens."""

    tokens: list[int]
    logits: Tensor
    outputs: list[Tensor]


class NaiveEagle3:
    """`config` and `tensors` are the checkpoint's; embedding and head are read from it too."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.config = config
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}
        rope = {key: config[key] for key in ("rope_parameters", "max_position_embeddings") if key in config}
        self.rotary = Qwen3RotaryEmbedding(
            Qwen3Config(
                hidden_size=config["hidden_size"],
                num_attention_heads=config["num_attention_heads"],
                head_dim=config["head_dim"],
                **rope,
            )
        )

    def draft(
        self,
        tokens: list[int],
        features: Tensor,
        temperature: float = 0.0,
        noise: Tensor | None = None,
        count: int | None = None,
    ) -> NaiveDraft:
        """The block after `tokens`, whose last one is the anchor at s = len - 1.

        features: [>= s, m * d], of positions 0..s-1 (later ones are not looked at). noise: [>= γ, V], added to z / T.
        count: γ, None for ttt_length.
        """
        s = len(tokens) - 1
        states = [self.tensors["fc.weight"] @ features[t] for t in range(s)]
        following = tokens[1:]
        outputs = [self.output(states, following, t) for t in range(s)]
        drafts, logits = [], []
        for k in range(self.config["ttt_length"] if count is None else count):
            if k:  # the layer's own last output stands in for the features that the target has not made yet
                states.append(outputs[-1])
                following = [*following, drafts[-1]]
                outputs.append(self.output(states, following, s + k - 1))
            z = self.tensors["lm_head.weight"] @ self.rms_norm(outputs[-1], "norm.weight")
            perturbed = z if temperature < 1e-5 else z / temperature
            if noise is not None and temperature >= 1e-5:
                perturbed = perturbed + noise[k]
            drafts.append(int(perturbed.argmax()))
            logits.append(z)
        return NaiveDraft(drafts, torch.stack(logits), outputs)

    def output(self, states: list[Tensor], following: list[int], t: int) -> Tensor:
        """o_t, from all u_0 … u_t and the tokens at 1 … t+1."""
        layer = "layers.0."
        joined = [
            torch.cat(
                (
                    self.rms_norm(self.tensors["embed_tokens.weight"][following[i]], f"{layer}input_layernorm.weight"),
                    self.rms_norm(states[i], f"{layer}hidden_norm.weight"),
                )
            )
            for i in range(t + 1)
        ]
        heads, kv_heads, dim = (self.config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        query = self.turned("q", joined[t], t)
        keys = [self.turned("k", y, i) for i, y in enumerate(joined)]
        values = [self.projected("v", y) for y in joined]
        mixed = []
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = torch.stack([query[head] @ key[kv] for key in keys]) / math.sqrt(dim)
            weights = torch.softmax(scores, dim=0)
            mixed.append(sum(w * value[kv] for w, value in zip(weights, values, strict=True)))
        o = states[t] + self.linear(f"{layer}self_attn.o_proj", torch.cat(mixed))
        normed = self.rms_norm(o, f"{layer}post_attention_layernorm.weight")
        gate = self.tensors[f"{layer}mlp.gate_proj.weight"] @ normed
        up = self.tensors[f"{layer}mlp.up_proj.weight"] @ normed
        return o + self.tensors[f"{layer}mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)

    def projected(self, name: str, y: Tensor) -> Tensor:
        return self.linear(f"layers.0.self_attn.{name}_proj", y).view(-1, self.config["head_dim"])

    def turned(self, name: str, y: Tensor, position: int) -> Tensor:
        """Normed and rotated queries or keys, [heads, e]; pairs are (j, j + e/2)."""
        x = self.rms_norm(self.projected(name, y), f"layers.0.self_attn.{name}_norm.weight")
        angle = position * self.rotary.inv_freq
        cos = torch.cos(angle) * self.rotary.attention_scaling
        sin = torch.sin(angle) * self.rotary.attention_scaling
        first, second = x.chunk(2, dim=1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = self.tensors[f"{name}.weight"] @ x
        bias = self.tensors.get(f"{name}.bias")
        return y if bias is None else y + bias

    def rms_norm(self, x: Tensor, weight: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * self.tensors[weight]
