"""DSpark as its formulae read, one position at a time: fp32, no cache, no batch, no code shared with the product.

Symbols: d hidden, H query heads, K key/value heads, e head dim, m captured layers, r Markov rank, B block size,
V vocabulary, s the anchor's position.
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
    """tokens [B]; logits z [B, V]; hidden states h [B, d]; confidence log-odds [B]."""

    tokens: list[int]
    logits: Tensor
    hidden: Tensor
    confidence: Tensor


class NaiveDSpark:
    """`config` and `tensors` are the checkpoint's; embedding and head are read from it too. `ids`: those that are drafted."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor], ids: list[int] | None = None) -> None:
        self.config = config
        self.never = torch.zeros(config["vocab_size"])
        if ids is not None:
            self.never[:] = -math.inf
            self.never[ids] = 0.0
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
        self, tokens: list[int], features: Tensor, temperature: float = 0.0, noise: Tensor | None = None
    ) -> NaiveDraft:
        """The block after `tokens`, whose last one is the anchor at s = len - 1.

        features: [>= s, m * d], of positions 0..s-1 (later ones are not looked at).  noise: [B, V], added to z / T.
        """
        s = len(tokens) - 1
        block = [tokens[s]] + [self.config["mask_token_id"]] * (self.config["block_size"] - 1)
        x = [self.tensors["embed_tokens.weight"][token] for token in block]
        context = [self.rms_norm(self.tensors["fc.weight"] @ features[t], "hidden_norm.weight") for t in range(s)]
        for layer in range(self.config["num_hidden_layers"]):
            x = self.layer(f"layers.{layer}.", context, x, s)
        hidden = [self.rms_norm(row, "norm.weight") for row in x]
        return self.left_to_right(tokens[s], hidden, temperature, noise)

    def layer(self, prefix: str, context: list[Tensor], x: list[Tensor], s: int) -> list[Tensor]:
        n = [self.rms_norm(row, f"{prefix}input_layernorm.weight") for row in x]
        keys = [self.key(prefix, c, t) for t, c in enumerate(context)]
        keys += [self.key(prefix, row, s + j) for j, row in enumerate(n)]
        values = [self.heads(prefix, "v_proj", row) for row in [*context, *n]]
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        out = []
        for j, row in enumerate(n):
            query = self.rotate(
                self.rms_norm(self.heads(prefix, "q_proj", row), f"{prefix}self_attn.q_norm.weight"), s + j
            )
            mixed = []
            for head in range(heads):
                kv = head // (heads // kv_heads)
                scores = torch.stack([query[head] @ key[kv] for key in keys]) / math.sqrt(self.config["head_dim"])
                weights = torch.softmax(scores, dim=0)
                mixed.append(sum(w * value[kv] for w, value in zip(weights, values, strict=True)))
            attended = x[j] + self.linear(f"{prefix}self_attn.o_proj", torch.cat(mixed))
            normed = self.rms_norm(attended, f"{prefix}post_attention_layernorm.weight")
            gate = self.tensors[f"{prefix}mlp.gate_proj.weight"] @ normed
            up = self.tensors[f"{prefix}mlp.up_proj.weight"] @ normed
            activated = gate * torch.sigmoid(gate) * up
            out.append(attended + self.tensors[f"{prefix}mlp.down_proj.weight"] @ activated)
        return out

    def left_to_right(self, anchor: int, hidden: list[Tensor], temperature: float, noise: Tensor | None) -> NaiveDraft:
        state = torch.zeros(self.config["markov_rank"])
        previous = anchor
        tokens, logits, confidence = [], [], []
        for k, h in enumerate(hidden):
            z = self.tensors["lm_head.weight"] @ h
            if self.config["markov_rank"] > 0:
                bias, state = self.markov_bias(previous, h, state)
                z = z + bias
            z = z + self.never
            confidence.append(self.confidence(previous, h))
            perturbed = z if temperature < 1e-5 else z / temperature
            if noise is not None and temperature >= 1e-5:
                perturbed = perturbed + noise[k]
            previous = int(perturbed.argmax())
            tokens.append(previous)
            logits.append(z)
        return NaiveDraft(tokens, torch.stack(logits), torch.stack(hidden), torch.stack(confidence))

    def markov_bias(self, previous: int, h: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        w1 = self.tensors["markov_head.markov_w1.weight"][previous]
        w2 = self.tensors["markov_head.markov_w2.weight"]
        kind = self.config["markov_head_type"].lower()
        if kind == "vanilla":
            return w2 @ w1, state
        if kind == "gated":
            gate = torch.sigmoid(self.linear("markov_head.gate_proj", torch.cat([h, w1])))
            return w2 @ (gate * w1), state
        assert kind == "rnn"
        keep, candidate, output = self.linear("markov_head.joint_proj", torch.cat([state, w1, h])).chunk(3)
        keep = torch.sigmoid(keep)
        return w2 @ torch.tanh(output), keep * state + (1 - keep) * torch.tanh(candidate)

    def confidence(self, previous: int, h: Tensor) -> Tensor:
        if not self.config["enable_confidence_head"]:
            return torch.tensor(0.0)
        if self.config["confidence_head_with_markov"]:
            h = torch.cat([h, self.tensors["markov_head.markov_w1.weight"][previous]])
        return self.linear("confidence_head.proj", h)[0]

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = self.tensors[f"{name}.weight"] @ x
        bias = self.tensors.get(f"{name}.bias")
        return y if bias is None else y + bias

    def heads(self, prefix: str, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{prefix}self_attn.{name}", x).view(-1, self.config["head_dim"])

    def key(self, prefix: str, x: Tensor, position: int) -> Tensor:
        return self.rotate(self.rms_norm(self.heads(prefix, "k_proj", x), f"{prefix}self_attn.k_norm.weight"), position)

    def rms_norm(self, x: Tensor, weight: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * self.tensors[weight]

    def rotate(self, x: Tensor, position: int) -> Tensor:
        """Half-split rotation of [heads, e]: pairs are (j, j + e/2)."""
        half = x.shape[-1] // 2
        angle = position * self.rotary.inv_freq
        cos = torch.cos(angle) * self.rotary.attention_scaling
        sin = torch.sin(angle) * self.rotary.attention_scaling
        first, second = x[:, :half], x[:, half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)
