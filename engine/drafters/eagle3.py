"""The Eagle3 drafter: one layer, run once per drafted token, that reads the target's features and its own output.

Index t joins the token at t+1 with a hidden state u_t: the fused target features g_t = fc · F_t where the target has
been, the layer's own previous output behind that. Its logits predict the token at t+2.
    y = [input_layernorm(emb(x_{t+1})); hidden_norm(u_t)]    q, k, v from y, rotary position t
    o_t = u_t + attention over indices ≤ t, then + mlp       logits = head(norm(o_t))

Context. g_t is kept for every position in a paged buffer (`observe`, always: cheap, and prefix hits carry it). With one
layer, the K/V of an index need no attention, only g_t and the next token. They are made when drafts are wanted (see
`catch_up`) and lie at the slot of their *token*: slot p holds index p-1, so that a slot depends on tokens 0 … p alone
and sequences that share a prefix can share it. Slot 0 is left over. The attention kernel reads slots 0 … p, and a set
has no order: the index of the anchor's own token goes into slot 0, of a copy of the first block that only this call's
sequence sees, and the drafted indices follow behind the context. Index t then reads slots 0 … t: t+1 entries, all of them.

Letters: B sequences, γ draft block, d hidden, H query heads, K key/value heads, e head dim, m captured layers.
Source: Li et al. 2025 (EAGLE-3), section 3; DeepSpec's code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dspark.engine.config import EngineConfig
from dspark.engine.drafters.catch_up import CatchUp, ContextChunks
from dspark.engine.drafters.draft_checkpoint import EMBEDDING, HEAD, drop_shared_with_target
from dspark.engine.drafters.draft_places import drafting_tables, flat_positions, scratch_blocks_per_row, slots_at
from dspark.engine.drafters.drafter import Draft, DraftRow, Noise, widest
from dspark.engine.drafters.eagle3_checkpoint import (
    Eagle3Spec,
    check_eagle3_fits,
    load_eagle3_weights,
    read_eagle3_spec,
)
from dspark.engine.drafters.token_draws import TokenDraws
from dspark.engine.errors import ConfigError
from dspark.engine.models.decoder import Decoder, LinearFactory
from dspark.engine.models.rope import rope_tables
from dspark.kernels.dispatch import choose_kernels

CATCH_UP_TOKENS = 1024
"""Context tokens computed per call: one linear layer each, no attention."""


class Eagle3Drafter:
    """One loaded draft checkpoint, and the fused features and K/V of every sequence."""

    name = "eagle3"
    sources: tuple[str, ...] = (name,)
    proposes_free = False

    def __init__(
        self,
        spec: Eagle3Spec,
        weights: Mapping[str, Tensor],
        embedding: Tensor,
        head: Callable[[Tensor], Tensor],
        linear: LinearFactory,
        *,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        noise: Noise,
    ) -> None:
        """weights: `load_eagle3_weights`, in which an embedding or head of the drafter's own wins over the target's.

        embedding: the target's, [V, d].       head: the target's, [n, d] -> logits [n, V].
        block_size: γ, 1 … spec.ttt_length.      max_num_seqs: sequences of the largest batch.
        max_model_len: tokens of the longest sequence.
        """
        self.block_size = block_size
        self.feature_layers = spec.target_layer_ids
        self._spec = spec
        layer, attention, mlp = "layers.0.", "layers.0.self_attn.", "layers.0.mlp."
        self._embedding = weights.get(EMBEDDING, embedding)
        self._kernels = choose_kernels(embedding.device)
        self._head = linear.fused(weights, HEAD.removesuffix(".weight")) if HEAD in weights else head
        self._fc = linear.fused(weights, "fc")
        self._input_norm = weights[f"{layer}input_layernorm.weight"]
        self._hidden_norm = weights[f"{layer}hidden_norm.weight"]
        self._post_attention_norm = weights[f"{layer}post_attention_layernorm.weight"]
        self._norm = weights["norm.weight"]
        self._qkv = linear.fused(weights, f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj")
        self._context_kv = linear.fused(weights, f"{attention}k_proj", f"{attention}v_proj")
        self._q_norm, self._k_norm = weights[f"{attention}q_norm.weight"], weights[f"{attention}k_norm.weight"]
        self._output = linear.fused(weights, f"{attention}o_proj")
        self._gate_up = linear.fused(weights, f"{mlp}gate_proj", f"{mlp}up_proj")
        self._down = linear.fused(weights, f"{mlp}down_proj")
        # a block drafted at the very end of the longest sequence reaches past it
        self._cos, self._sin = rope_tables(spec.rope, spec.head_dim, max_model_len + block_size)
        self._catch_up = CatchUp(CATCH_UP_TOKENS, round_tokens=block_size + 1)
        self._max_num_seqs = max_num_seqs
        self._noise = noise

    def bytes_per_block(self, block_size: int) -> int:
        spec = self._spec
        return (2 * spec.num_kv_heads * spec.head_dim + spec.hidden_size) * block_size * self._norm.itemsize

    def allocate_context(self, num_blocks: int, block_size: int) -> None:
        """Make fused features and K/V, plus for each sequence of the largest batch a first block of its own and scratch."""
        spec = self._spec
        self._kv_block_size = block_size
        spare = 1 + scratch_blocks_per_row(self.block_size, block_size)
        blocks, kv_heads, head_dim = num_blocks + self._max_num_seqs * spare, spec.num_kv_heads, spec.head_dim
        extra = np.arange(num_blocks, blocks, dtype=np.int32).reshape(self._max_num_seqs, spare)
        self._first_blocks, self._scratch = extra[:, 0], extra[:, 1:]
        self._fused = self._norm.new_zeros((num_blocks * block_size, spec.hidden_size))
        # zeros: attention multiplies what lies beyond a sequence's end by 0, which must not meet a NaN
        self._k_cache = self._norm.new_zeros((blocks, kv_heads, head_dim, block_size))
        self._v_cache = self._norm.new_zeros((blocks, kv_heads, block_size, head_dim))
        self._catch_up.allocate(block_size)

    def observe(self, features: Tensor, positions: NDArray[np.int32], slots: NDArray[np.int64]) -> None:
        """Keep g_t of every row. K/V that were made from what lay there before are no longer valid."""
        self._fused[torch.from_numpy(slots)] = self._fc(features)
        self._catch_up.overwrite(np.unique(slots // self._kv_block_size).tolist())

    def propose(self, rows: Sequence[DraftRow]) -> Draft:
        """Draft the tokens that are wanted for each of at most `max_num_seqs` rows, none where the context is not made yet.

        Needs the features of positions 0 … s-1 of each.
        """
        if not rows:
            return TokenDraws([], "coupled", self._noise).draft(self.block_size, np.zeros(0, np.bool_))
        assert len(rows) <= self._max_num_seqs, "each row needs scratch blocks"
        chunks = self._catch_up.plan(rows)
        self._write_context(rows, chunks)
        self._catch_up.computed(rows, chunks)
        ready = [row for row, is_ready in zip(rows, chunks.ready.tolist(), strict=True) if is_ready]
        draws = TokenDraws(ready, "coupled", self._noise)
        if ready:
            self._draft(ready, draws)
        return draws.draft(self.block_size, chunks.ready)

    def forget(self, sequence_id: int) -> None:
        self._catch_up.forget(sequence_id)

    def _write_context(self, rows: Sequence[DraftRow], chunks: ContextChunks) -> None:
        """Make the K/V of the chunks' positions: at p those of index p-1."""
        owners, positions = flat_positions(np.maximum(chunks.starts, 1), np.maximum(chunks.ends, 1))
        if not len(owners):
            return
        tables = drafting_tables(rows, 0, self._kv_block_size, self._scratch[: len(rows)])
        before = slots_at(tables, owners, positions - 1, self._kv_block_size)
        tokens = [row.tokens[max(s, 1) : e] for row, s, e in zip(rows, chunks.starts, chunks.ends, strict=True)]
        joined = self._joined(np.concatenate(tokens), self._fused[torch.from_numpy(before)])
        self._write_kv(
            self._context_kv(joined), positions - 1, slots_at(tables, owners, positions, self._kv_block_size)
        )

    def _draft(self, rows: Sequence[DraftRow], draws: TokenDraws) -> None:
        """Draw the widest row's tokens for each row."""
        owners = np.arange(len(rows))
        tables = drafting_tables(rows, self.block_size, self._kv_block_size, self._scratch[: len(rows)])
        positions = np.array([row.position - 1 for row in rows], np.int32)
        last = slots_at(tables, owners, positions, self._kv_block_size)
        state = self._fused[torch.from_numpy(last)].float()
        copies = self._first_blocks[: len(rows)]
        for cache in (self._k_cache, self._v_cache):
            cache[torch.from_numpy(copies).long()] = cache[torch.from_numpy(tables[:, 0]).long()]
        tables[:, 0] = copies
        tokens = np.array([row.tokens[row.position] for row in rows], np.int64)
        slots = copies.astype(np.int64) * self._kv_block_size  # of slot 0, for the index of the anchor's token
        for drawn in range(widest(rows, self.block_size)):
            if drawn:
                positions = positions + np.int32(1)
                slots = slots_at(tables, owners, positions, self._kv_block_size)
            normed = self._layer(tokens, state, positions, slots, tables)
            tokens = draws.draw(self._head(normed))

    def _layer(
        self,
        tokens: NDArray[np.int64],
        state: Tensor,
        positions: NDArray[np.int32],
        slots: NDArray[np.int64],
        tables: NDArray[np.int32],
    ) -> Tensor:
        """One index of each sequence: state [B, d] float32 becomes the layer's output, in place; returns its norm."""
        spec, kernels = self._spec, self._kernels
        q = self._write_kv(self._qkv(self._joined(tokens, state)), positions, slots)
        row_starts = np.arange(len(tokens) + 1, dtype=np.int32)
        attended = kernels.paged_attention(
            q, self._k_cache, self._v_cache, tables, row_starts, positions, spec.head_dim**-0.5
        )
        attended = self._output(attended.view(len(tokens), -1))
        normed = kernels.add_rms_norm(attended, state, self._post_attention_norm, spec.rms_norm_eps)
        hidden = self._down(kernels.silu_mul(self._gate_up(normed)))
        return kernels.add_rms_norm(hidden, state, self._norm, spec.rms_norm_eps)

    def _joined(self, tokens: NDArray[np.int64], state: Tensor) -> Tensor:
        """[n, 2d]: what attention reads of the token after, and of the hidden state at, an index."""
        embedded = F.embedding(torch.from_numpy(tokens), self._embedding)
        rms_norm, eps = self._kernels.rms_norm, self._spec.rms_norm_eps
        return torch.cat((rms_norm(embedded, self._input_norm, eps), rms_norm(state, self._hidden_norm, eps)), dim=1)

    def _write_kv(self, qkv: Tensor, positions: NDArray[np.int32], slots: NDArray[np.int64]) -> Tensor:
        """Write K and V, return q [n, H, e] (H = 0 where qkv has K and V only). positions: rotary."""
        return self._kernels.rope_kv_write(
            qkv,
            positions,
            slots,
            self._cos,
            self._sin,
            self._k_cache,
            self._v_cache,
            self._q_norm,
            self._k_norm,
            self._spec.rms_norm_eps,
        )


def open_eagle3(folder: Path, config: EngineConfig, target: Decoder, max_model_len: int, noise: Noise) -> Eagle3Drafter:
    """Load the Eagle3 checkpoint in `folder`. Raises ConfigError."""
    if config.verification == "rejection":
        raise ConfigError("verification", "rejection is offered for dspark and draft_model; use coupled with eagle3")
    spec = read_eagle3_spec(folder)
    check_eagle3_fits(spec, target.spec)
    block_size = config.num_speculative_tokens or spec.ttt_length
    if block_size > spec.ttt_length:
        raise ConfigError(
            "num_speculative_tokens", f"{block_size} exceeds the {spec.ttt_length} tokens the drafter was trained for"
        )
    weights = load_eagle3_weights(folder, spec, target.dtype)
    return Eagle3Drafter(
        spec,
        drop_shared_with_target(weights, target.embedding, target.head_weight),
        target.embedding,
        target.logits,
        LinearFactory(),
        block_size=block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        noise=noise,
    )
