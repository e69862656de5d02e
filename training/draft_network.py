"""The drafter as a differentiable module; its state dict is a DeepSpec checkpoint without embedding and head.

All blocks of a batch of sequences run in one pass: queries are the A blocks of B slots of each sequence, keys its T context
positions and the queries' own block. Letters as in `engine/drafters/dspark.py`; the forward pass is the same computation,
and a test holds the two together. Source: DSpark paper; packing of random anchors as in DeepSpec's trainer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dspark.engine.drafters.draft_checkpoint import DraftSpec
from dspark.engine.drafters.eagle3_checkpoint import Eagle3Spec
from dspark.engine.models.rope import rope_tables


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)
        return (normed * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        self._shape = spec.num_heads, spec.num_kv_heads, spec.head_dim
        q_size, kv_size, d = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.hidden_size
        self.q_proj = nn.Linear(d, q_size, bias=spec.attention_bias)
        self.k_proj = nn.Linear(d, kv_size, bias=spec.attention_bias)
        self.v_proj = nn.Linear(d, kv_size, bias=spec.attention_bias)
        self.o_proj = nn.Linear(q_size, d, bias=spec.attention_bias)
        self.q_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps)
        self.k_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps)

    def forward(self, x: Tensor, context: Tensor, rope: Rope, visible: Tensor) -> Tensor:
        """x: [S, A, B, d]; context: [S, T, d]; visible: [S, A, T] bool, context before each anchor → [S, A, B, d]."""
        heads, kv_heads, dim = self._shape
        sequences, blocks, width = x.shape[:3]
        length, group = context.shape[1], heads // kv_heads
        q = rope.at_blocks(self.q_norm(self.q_proj(x).unflatten(-1, (heads, dim))))
        k_block = rope.at_blocks(self.k_norm(self.k_proj(x).unflatten(-1, (kv_heads, dim))))
        v_block = self.v_proj(x).unflatten(-1, (kv_heads, dim))
        k_context = rope.at_context(self.k_norm(self.k_proj(context).unflatten(-1, (kv_heads, dim))))
        v_context = self.v_proj(context).unflatten(-1, (kv_heads, dim))
        q = q.unflatten(3, (kv_heads, group)).permute(0, 3, 1, 2, 4, 5) * dim**-0.5  # [S, K, A, B, G, e]
        flat_q = q.reshape(sequences, kv_heads, blocks * width * group, dim)
        to_context = flat_q @ k_context.permute(0, 2, 3, 1)  # [S, K, A·B·G, T]
        to_context = to_context.view(sequences, kv_heads, blocks, width * group, length)
        to_context = to_context.float().masked_fill(~visible[:, None, :, None, :], -torch.inf)
        block_q = q.reshape(sequences, kv_heads, blocks, width * group, dim)
        to_block = block_q @ k_block.permute(0, 3, 1, 4, 2)  # [S, K, A, B·G, B]
        weights = torch.cat((to_context, to_block.float()), dim=-1).softmax(-1).to(x.dtype)
        from_context = weights[..., :length].reshape(sequences, kv_heads, -1, length) @ v_context.transpose(1, 2)
        out = from_context.view(sequences, kv_heads, blocks, width * group, dim)
        out = out + weights[..., length:] @ v_block.permute(0, 3, 1, 2, 4)
        out = out.unflatten(3, (width, group)).permute(0, 2, 3, 1, 4, 5)  # [S, A, B, K, G, e]
        return self.o_proj(out.reshape(sequences, blocks, width, heads * dim))


class MLP(nn.Module):
    def __init__(self, spec: DraftSpec | Eagle3Spec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MLP(spec)

    def forward(self, x: Tensor, context: Tensor, rope: Rope, visible: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context, rope, visible)
        return x + self.mlp(self.post_attention_layernorm(x))


class Rope:
    """Rotations of one batch: context positions 0 … T-1, and the positions of every block's slots."""

    def __init__(self, cos: Tensor, sin: Tensor, length: int, slots: Tensor) -> None:
        """cos, sin: [max_len, e/2]; slots: [S, A, B] absolute positions."""
        self._context = cos[:length, None], sin[:length, None]
        self._blocks = cos[slots][..., None, :], sin[slots][..., None, :]

    def at_context(self, x: Tensor) -> Tensor:
        return _rotate(x, *self._context)

    def at_blocks(self, x: Tensor) -> Tensor:
        return _rotate(x, *self._blocks)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


class MarkovHead(nn.Module):
    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        rank, d = spec.markov_rank, spec.hidden_size
        self._kind = spec.markov
        self.markov_w1 = nn.Embedding(spec.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, spec.vocab_size, bias=False)
        if self._kind == "gated":
            self.gate_proj = nn.Linear(d + rank, rank)
        elif self._kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + d, 3 * rank)

    def forward(self, previous: Tensor, hidden: Tensor) -> Tensor:
        """previous: [..., B, r], w1 of the tokens before each slot; hidden: [..., B, d] → what W2 is applied to [..., B, r]."""
        if self._kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat((hidden, previous), dim=-1))) * previous
        if self._kind == "vanilla":
            return previous
        state, outputs = torch.zeros_like(previous[..., 0, :]), []
        for k in range(previous.shape[-2]):
            joint = self.joint_proj(torch.cat((state, previous[..., k, :], hidden[..., k, :]), dim=-1))
            keep, candidate, output = joint.chunk(3, dim=-1)
            outputs.append(torch.tanh(output))
            state = torch.sigmoid(keep) * state + (1 - torch.sigmoid(keep)) * torch.tanh(candidate)
        return torch.stack(outputs, dim=-2)


class ConfidenceHead(nn.Module):
    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        self.proj = nn.Linear(spec.hidden_size + (spec.markov_rank if spec.confidence_with_markov else 0), 1)


class DraftNetwork(nn.Module):
    """Backbone, Markov head and confidence head; embedding [V, d] and head [V, d] are the target's, frozen, passed in."""

    _embedding: Tensor
    _cos: Tensor
    _sin: Tensor

    def __init__(self, spec: DraftSpec, embedding: Tensor, max_len: int) -> None:
        super().__init__()
        self.spec = spec
        cos, sin = rope_tables(spec.rope, spec.head_dim, max_len + spec.block_size)
        for name, table in (("_embedding", embedding), ("_cos", cos), ("_sin", sin)):
            self.register_buffer(name, table, persistent=False)  # moves with the module, stays out of the checkpoint
        self.fc = nn.Linear(len(spec.target_layer_ids) * spec.hidden_size, spec.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        if spec.markov:
            self.markov_head = MarkovHead(spec)
        if spec.confidence_head:
            self.confidence_head = ConfidenceHead(spec)

    def backbone(self, features: Tensor, tokens: Tensor, anchors: Tensor) -> Tensor:
        """features: [S, T, m·d]; tokens: [S, T] ids; anchors: [S, A] positions → final-normed slots [S, A, B, d]."""
        spec = self.spec
        context = self.hidden_norm(self.fc(features))
        slots = anchors[..., None] + torch.arange(spec.block_size, device=anchors.device)
        ids = torch.full_like(slots, spec.mask_token_id)
        ids[..., 0] = tokens.gather(1, anchors)
        x = F.embedding(ids, self._embedding).to(context.dtype)
        rope = Rope(self._cos, self._sin, context.shape[1], slots)
        visible = torch.arange(context.shape[1], device=anchors.device) < anchors[..., None]
        for layer in self.layers:
            x = layer(x, context, rope, visible)
        return self.norm(x)

    def logits(self, hidden: Tensor, previous_ids: Tensor, head: Tensor, rows: Tensor | None = None) -> Tensor:
        """hidden: [..., B, d]; previous_ids: [..., B], the token before each slot's; head: [v, d], of the ids `rows` [v]

        (None: all) → z [..., B, v], fp32."""
        scores = F.linear(hidden, head).float()
        if self.spec.markov:
            w2 = self.markov_head.markov_w2.weight
            scores = scores + F.linear(self.low_rank(hidden, previous_ids), w2 if rows is None else w2[rows]).float()
        return scores

    def low_rank(self, hidden: Tensor, previous_ids: Tensor) -> Tensor:
        """What the Markov bias is made of by W2: [..., B, d], [..., B] ids → [..., B, r]."""
        return self.markov_head(self.markov_head.markov_w1(previous_ids), hidden)

    def markov_factors(
        self, hidden: Tensor, previous_ids: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """hidden: [N·B, d] of whole blocks; previous_ids: [N·B] → [N·B, r] and W2 of the ids `rows` [v, r], whose product is

        the Markov bias; None both without a Markov head."""
        if not self.spec.markov:
            return None, None
        blocks = hidden.view(-1, self.spec.block_size, hidden.shape[-1])
        low_rank = self.low_rank(blocks, previous_ids.view(blocks.shape[:2]))
        return low_rank.flatten(0, 1), self.markov_head.markov_w2.weight[rows]

    def confidence(self, hidden: Tensor, previous_ids: Tensor) -> Tensor | None:
        """→ log-odds [..., B] fp32 that each slot's token is accepted when all before it were; None without the head."""
        if not self.spec.confidence_head:
            return None
        inputs = hidden
        if self.spec.confidence_with_markov:
            inputs = torch.cat((hidden, self.markov_head.markov_w1(previous_ids)), dim=-1)
        return self.confidence_head.proj(inputs).squeeze(-1).float()
