"""Eagle3 as a differentiable module; its state dict is a DeepSpec checkpoint without embedding and head.

Training-time test: step s (0-based) at index t takes the token at t+1+s and, for s = 0, the fused features g_t, else its own
output of step s-1; it turns by position t+s, sees the step-0 keys of indices ≤ t and its own keys of steps 1 … s, and predicts
the token at t+2+s. So index t with steps 0 … S-1 is the block after anchor t+1, slot for slot, and trains on the blocks that
`DraftNetwork` trains on. With one layer nothing reads the output of an index that no block starts from: keys and values are
made for every index, queries and all that follows for the sampled blocks only. Uniformly drawn anchors, all steps of each,
make their mean loss an unbiased estimate of a sequence's mean loss over all indices, in which step s weighs 0.8^s as well.
Source: Li et al. 2025 (EAGLE-3), training-time test; DeepSpec's Eagle3 trainer.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dspark.engine.drafters.eagle3_checkpoint import Eagle3Spec
from dspark.engine.models.rope import rope_tables
from dspark.training.draft_network import MLP, RMSNorm, Rope


class Attention(nn.Module):
    """Inputs are twice as wide as the hidden state: the embedding of the next token, then the state."""

    def __init__(self, spec: Eagle3Spec) -> None:
        super().__init__()
        self._shape = spec.num_heads, spec.num_kv_heads, spec.head_dim
        q_size, kv_size, d = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.hidden_size
        self.q_proj = nn.Linear(2 * d, q_size, bias=spec.attention_bias)
        self.k_proj = nn.Linear(2 * d, kv_size, bias=spec.attention_bias)
        self.v_proj = nn.Linear(2 * d, kv_size, bias=spec.attention_bias)
        self.o_proj = nn.Linear(q_size, d, bias=spec.attention_bias)
        self.q_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps)
        self.k_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps)

    def queries(self, y: Tensor) -> Tensor:
        """[..., 2d] → [..., H, e], before the rotation."""
        heads, _, dim = self._shape
        return self.q_norm(self.q_proj(y).unflatten(-1, (heads, dim)))

    def keys_values(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """[..., 2d] → keys before the rotation and values, both [..., K, e]."""
        _, kv_heads, dim = self._shape
        k = self.k_norm(self.k_proj(y).unflatten(-1, (kv_heads, dim)))
        return k, self.v_proj(y).unflatten(-1, (kv_heads, dim))

    def attend(
        self, q: Tensor, context: tuple[Tensor, Tensor], visible: Tensor, own: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """q: [S, A, H, e]; context keys and values: [S, T, K, e]; visible: [S, A, T] bool; own: of earlier and this

        step, each [S, A, K, e] → [S, A, d]."""
        heads, kv_heads, dim = self._shape
        length = visible.shape[-1]
        q = q.view(*visible.shape[:2], kv_heads, heads // kv_heads, dim) * dim**-0.5  # [S, A, K, G, e]
        scores = torch.einsum("sakge,stke->sakgt", q, context[0]).float()
        scores = scores.masked_fill(~visible[:, :, None, None], -torch.inf)
        if own:
            own_keys, own_values = (torch.stack(some, dim=2) for some in zip(*own, strict=True))  # [S, A, s, K, e]
            scores = torch.cat((scores, torch.einsum("sakge,saike->sakgi", q, own_keys).float()), dim=-1)
        weights = scores.softmax(-1).to(q.dtype)
        out = torch.einsum("sakgt,stke->sakge", weights[..., :length], context[1])
        if own:
            out = out + torch.einsum("sakgi,saike->sakge", weights[..., length:], own_values)
        return self.o_proj(out.flatten(2))


class Layer(nn.Module):
    def __init__(self, spec: Eagle3Spec) -> None:
        super().__init__()
        self.hidden_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MLP(spec)

    def joined(self, embedded: Tensor, state: Tensor) -> Tensor:
        """Two [..., d] → [..., 2d], what attention reads."""
        return torch.cat((self.input_layernorm(embedded), self.hidden_norm(state)), dim=-1)


class Eagle3Network(nn.Module):
    """One layer, run once per drafted token; embedding [V, d] and head [V, d] are the target's, frozen, passed in."""

    _embedding: Tensor
    _cos: Tensor
    _sin: Tensor

    def __init__(self, spec: Eagle3Spec, embedding: Tensor, max_len: int) -> None:
        super().__init__()
        self.spec = spec
        cos, sin = rope_tables(spec.rope, spec.head_dim, max_len + spec.ttt_length)
        for name, table in (("_embedding", embedding), ("_cos", cos), ("_sin", sin)):
            self.register_buffer(name, table, persistent=False)  # moves with the module, stays out of the checkpoint
        self.fc = nn.Linear(len(spec.target_layer_ids) * spec.hidden_size, spec.hidden_size, bias=False)
        self.layers = nn.ModuleList([Layer(spec)])
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    @property
    def layer(self) -> Layer:
        return cast(Layer, self.layers[0])

    def backbone(self, features: Tensor, tokens: Tensor, anchors: Tensor) -> Tensor:
        """features: [S, T, m·d]; tokens: [S, ≥ T + ttt_length] ids; anchors: [S, A] positions ≥ 1

        → final-normed states [S, A, ttt_length, d]: slot s of anchor i predicts the token at i+1+s, given those before.
        """
        layer, attention = self.layer, self.layer.self_attn
        fused = self.fc(features)
        length, start = fused.shape[1], anchors - 1
        keys, values = attention.keys_values(layer.joined(self._embedded(tokens[:, 1 : length + 1], fused), fused))
        keys = Rope(self._cos, self._sin, length, start).at_context(keys)
        visible = torch.arange(length, device=anchors.device) <= start[..., None]
        state = fused.gather(1, start[..., None].expand(-1, -1, fused.shape[-1]))
        own: list[tuple[Tensor, Tensor]] = []
        slots = []
        for step in range(self.spec.ttt_length):
            rope = Rope(self._cos, self._sin, length, start + step)
            y = layer.joined(self._embedded(tokens.gather(1, anchors + step), state), state)
            if step:
                k, v = attention.keys_values(y)
                own.append((rope.at_blocks(k), v))
            state = state + attention.attend(rope.at_blocks(attention.queries(y)), (keys, values), visible, own)
            state = state + layer.mlp(layer.post_attention_layernorm(state))
            slots.append(self.norm(state))
        return torch.stack(slots, dim=2)

    def logits(self, hidden: Tensor, previous_ids: Tensor, head: Tensor, rows: Tensor | None = None) -> Tensor:
        """hidden: [..., B, d]; head: [v, d] → [..., B, v], fp32. The previous tokens are in `hidden` already."""
        return F.linear(hidden, head).float()

    def markov_factors(self, hidden: Tensor, previous_ids: Tensor, rows: Tensor) -> tuple[None, None]:
        """Eagle3 has no Markov head."""
        return None, None

    def confidence(self, hidden: Tensor, previous_ids: Tensor) -> None:
        """Eagle3 has no confidence head."""

    def _embedded(self, ids: Tensor, like: Tensor) -> Tensor:
        return F.embedding(ids, self._embedding).to(like.dtype)
