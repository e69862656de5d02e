"""The DSpark drafter: a whole block of tokens in one parallel pass, then a light left-to-right correction.

The input of a block is [anchor, MASK × (γ-1)] at positions s … s+γ-1. Every slot attends to the context of positions
0 … s-1 (made from the target's features, see `observe`) and to all γ slots. Slot k predicts the token at s+1+k: its
logits are the head's plus a Markov bias that depends on the token drafted just before. DFlash is the same with rank 0.
A checkpoint may name the ids that are drafted (v of the V): head and bias are then computed for these alone, which for a
small drafter saves most of its time (FR-Spec, arXiv 2502.14856).

Letters: B sequences, γ draft block, w of its slots that are drafted, d hidden, H query heads, K key/value heads, e head
dim, L layers, m captured target layers, r Markov rank, V vocabulary, v ids that are drafted (V where the checkpoint does
not say).
Source: DSpark paper, sections on the parallel backbone, the Markov head and the confidence head; DeepSpec's code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dspark.engine.config import VerificationMode
from dspark.engine.drafters.draft_checkpoint import EMBEDDING, HEAD, DraftSpec
from dspark.engine.drafters.drafter import Draft, DraftRow, Noise, widest
from dspark.engine.errors import ConfigError
from dspark.engine.models.decoder import Linear, LinearFactory
from dspark.engine.models.rope import rope_tables
from dspark.kernels.dispatch import choose_kernels
from dspark.kernels.markov_step import draw_slots
from dspark.kernels.panel_linear import PanelLinear


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: Linear  # [(H + 2K)·e, d]
    q_norm: Tensor
    k_norm: Tensor
    o: Linear
    post_attention_norm: Tensor
    gate_up: Linear  # [2f, d]
    down: Linear

    @classmethod
    def load(cls, weights: Mapping[str, Tensor], prefix: str, linear: LinearFactory) -> _Layer:
        return cls(
            input_norm=weights[f"{prefix}input_layernorm.weight"],
            qkv=linear.fused(weights, *(f"{prefix}self_attn.{name}_proj" for name in "qkv")),
            q_norm=weights[f"{prefix}self_attn.q_norm.weight"],
            k_norm=weights[f"{prefix}self_attn.k_norm.weight"],
            o=linear.fused(weights, f"{prefix}self_attn.o_proj"),
            post_attention_norm=weights[f"{prefix}post_attention_layernorm.weight"],
            gate_up=linear.fused(weights, f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"),
            down=linear.fused(weights, f"{prefix}mlp.down_proj"),
        )


class MarkovHead:
    """Bias of a slot's logits by the token drafted before it: W2 · f(w1[previous], h, state), of low rank r."""

    def __init__(self, spec: DraftSpec, weights: Mapping[str, Tensor], linear: LinearFactory) -> None:
        self._kind = spec.markov
        self.w1 = weights["markov_head.markov_w1.weight"]
        """[V, r]"""
        w2 = weights["markov_head.markov_w2.weight"]
        self.w2 = w2 if spec.draft_token_ids is None else w2[list(spec.draft_token_ids)]
        """[v, r]"""
        if self._kind == "gated":
            self._gate = linear.fused(weights, "markov_head.gate_proj")
        elif self._kind == "rnn":
            self._joint = linear.fused(weights, "markov_head.joint_proj")

    def embed(self, tokens: Tensor) -> Tensor:
        """w1 of the tokens: [...] int64 -> [..., r]."""
        return F.embedding(tokens, self.w1)

    def transition(self, previous: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What w2 is applied to in one slot [B, r], and the state for the next slot.

        previous: [B, r], `embed` of the tokens before; hidden: [B, d]; state: [B, r], of the rnn head only, or None at
        the first slot of a block (zeros).
        """
        if self._kind == "gated":
            gate = torch.sigmoid(self._gate(torch.cat([hidden, previous], dim=-1)))
            return gate * previous, state
        if self._kind == "rnn":
            state = torch.zeros_like(previous) if state is None else state
            keep, candidate, output = self._joint(torch.cat([state, previous, hidden], dim=-1)).chunk(3, dim=-1)
            keep = torch.sigmoid(keep)
            return torch.tanh(output), keep * state + (1 - keep) * torch.tanh(candidate)
        return previous, state


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """Where the B·γ slots of a draft pass read and write: numpy arrays on a CPU, tensors on a device.

    positions: [B·γ] int32; slots: [B·γ] int64, of their K/V in the scratch blocks; block_tables: [B, most blocks] int32;
    context_lens, scratch_blocks: [B] int32; see kernels/draft_attention.py.
    """

    positions: NDArray[np.int32] | Tensor
    slots: NDArray[np.int64] | Tensor
    block_tables: NDArray[np.int32] | Tensor
    context_lens: NDArray[np.int32] | Tensor
    scratch_blocks: NDArray[np.int32] | Tensor


class DSparkDrafter:
    """One loaded draft checkpoint and the context K/V of every sequence.

    Context K/V live in paged tensors under the target's block ids, so a prefix hit, a preemption or a rollback of the
    target's cache is one of this cache too. A few blocks behind them hold the K/V of the block being drafted.
    """

    name = "dspark"
    sources: tuple[str, ...] = (name,)
    proposes_free = False

    def __init__(
        self,
        spec: DraftSpec,
        weights: Mapping[str, Tensor],
        embedding: Tensor,
        head: Callable[[Tensor], Tensor],
        linear: LinearFactory,
        *,
        max_num_seqs: int,
        max_model_len: int,
        verification: VerificationMode,
        noise: Noise,
    ) -> None:
        """weights: `load_draft_weights`, in which an embedding or head of the drafter's own wins over the target's.

        embedding: the target's, [V, d].       head: the target's, [n, d] -> logits [n, v].
        max_num_seqs: sequences of the largest batch.      max_model_len: tokens of the longest sequence.
        """
        self.block_size = spec.block_size
        self.feature_layers = spec.target_layer_ids
        self.spec = spec
        self._embedding = weights.get(EMBEDDING, embedding)
        self._kernels = choose_kernels(embedding.device)
        self.draft_ids: Tensor | None = None
        if spec.draft_token_ids is not None:
            self.draft_ids = torch.tensor(spec.draft_token_ids, device=embedding.device)
        self.head = head
        if HEAD in weights:
            self.head = linear(weights[HEAD] if self.draft_ids is None else weights[HEAD][self.draft_ids])
        self._fc = linear.fused(weights, "fc")
        self._hidden_norm = weights["hidden_norm.weight"]
        self._norm = weights["norm.weight"]
        self._layers = [_Layer.load(weights, f"layers.{i}.", linear) for i in range(spec.num_layers)]
        # keys and values of all layers come from the same context vector, so one product makes them all
        self._context_kv = linear.fused(
            weights, *(f"layers.{i}.self_attn.{name}_proj" for i in range(spec.num_layers) for name in "kv")
        )
        self.markov = MarkovHead(spec, weights, linear) if spec.markov else None
        self._w2 = None  # of a CPU's draws, in the layout that they read
        if self.markov is not None and embedding.device.type == "cpu":
            self._w2 = PanelLinear(self.markov.w2.float())
        self._confidence: tuple[Tensor, Tensor] | None = None
        if spec.confidence_head:
            weight, bias = weights["confidence_head.proj.weight"], weights["confidence_head.proj.bias"]
            self._confidence = weight[0].float(), bias.float()
        # a block drafted at the very end of the longest sequence reaches past it
        self._cos, self._sin = (
            table.to(embedding.device)
            for table in rope_tables(spec.rope, spec.head_dim, max_model_len + spec.block_size)
        )
        self._max_num_seqs = max_num_seqs
        self._verification = verification
        self._noise = noise

    def bytes_per_block(self, block_size: int) -> int:
        spec = self.spec
        return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * block_size * self._norm.itemsize

    def allocate_context(self, num_blocks: int, block_size: int) -> None:
        """Make the context K/V, plus one scratch block per sequence of the largest batch.

        Raises ConfigError("block_size") where a draft block does not fit into one KV block.
        """
        spec = self.spec
        if spec.block_size > block_size:
            raise ConfigError(
                "block_size",
                f"a KV block of {block_size} tokens cannot hold a draft block of {spec.block_size}; "
                f"give at least {spec.block_size}",
            )
        self.first_scratch_block, self._kv_block_size = num_blocks, block_size
        blocks, kv_heads, head_dim = num_blocks + self._max_num_seqs, spec.num_kv_heads, spec.head_dim
        # zeros: attention multiplies what lies beyond a sequence's end by 0, which must not meet a NaN
        k_shape, v_shape = (blocks, kv_heads, head_dim, block_size), (blocks, kv_heads, block_size, head_dim)
        self._k_caches = [self._norm.new_zeros(k_shape) for _ in self._layers]
        self._v_caches = [self._norm.new_zeros(v_shape) for _ in self._layers]

    def observe(
        self, features: Tensor, positions: NDArray[np.int32] | Tensor, slots: NDArray[np.int64] | Tensor
    ) -> None:
        spec = self.spec
        context = self._kernels.rms_norm(self._fc(features), self._hidden_norm, spec.rms_norm_eps)
        # no input_layernorm here: the layers' keys and values see the context vector itself
        per_layer = self._context_kv(context).view(len(positions), spec.num_layers, -1)
        for i, layer in enumerate(self._layers):
            self._kernels.rope_kv_write(
                per_layer[:, i].contiguous(),
                positions,
                slots,
                self._cos,
                self._sin,
                self._k_caches[i],
                self._v_caches[i],
                None,
                layer.k_norm,
                spec.rms_norm_eps,
            )

    def propose(self, rows: Sequence[DraftRow]) -> Draft:
        """Draft as many tokens as are wanted for each of at most `max_num_seqs` rows; needs the context of positions

        0 … s-1 of each. A block of fewer slots than γ is a pass of fewer rows, and its tokens are about as good.
        """
        if not rows:
            empty = np.zeros((0, self.block_size))
            return Draft(empty.astype(np.int64), np.zeros(0, np.int32), empty.astype(np.float32))
        assert len(rows) <= self._max_num_seqs, "each row needs a scratch block"
        anchors = torch.tensor([int(row.tokens[row.position]) for row in rows], device=self._embedding.device)
        width = widest(rows, self.block_size)
        hidden = self.backbone(anchors, self._draft_batch(rows, width))
        logits = self.head(hidden).view(len(rows), width, -1)
        hidden = hidden.view(len(rows), width, -1)
        tokens, probs = self._draw_left_to_right(rows, anchors, hidden, logits)
        previous = torch.cat([anchors[:, None], tokens[:, :-1]], dim=1)
        undrafted = (0, self.block_size - width)
        return Draft(
            tokens=F.pad(tokens, undrafted).cpu().numpy(),
            lengths=np.full(len(rows), width, np.int32),
            confidence=F.pad(self.log_odds(hidden, previous), undrafted).cpu().numpy(),
            probs=probs,
        )

    def forget(self, sequence_id: int) -> None:
        """Nothing is kept for a sequence but the context in its blocks."""

    def _draft_batch(self, rows: Sequence[DraftRow], width: int) -> DraftBatch:
        anchor_positions = np.array([row.position for row in rows], np.int32)
        offsets = np.tile(np.arange(width, dtype=np.int32), len(rows))
        scratch_blocks = np.arange(self.first_scratch_block, self.first_scratch_block + len(rows), dtype=np.int32)
        return DraftBatch(
            positions=anchor_positions.repeat(width) + offsets,
            slots=scratch_blocks.astype(np.int64).repeat(width) * self._kv_block_size + offsets,
            block_tables=self._context_tables(rows),
            context_lens=anchor_positions,
            scratch_blocks=scratch_blocks,
        )

    def backbone(self, anchors: Tensor, batch: DraftBatch) -> Tensor:
        """The final-normed hidden state of every slot, [B·w, d]. anchors: [B] int64."""
        spec, kernels = self.spec, self._kernels
        width = len(batch.positions) // len(anchors)
        ids = torch.full((len(anchors), width), spec.mask_token_id, device=self._embedding.device)
        ids[:, 0] = anchors
        residual = F.embedding(ids.view(-1), self._embedding).float()
        normed = kernels.rms_norm(residual, self._layers[0].input_norm, spec.rms_norm_eps)
        for i, layer in enumerate(self._layers):
            k_cache, v_cache = self._k_caches[i], self._v_caches[i]
            q = kernels.rope_kv_write(
                layer.qkv(normed),
                batch.positions,
                batch.slots,
                self._cos,
                self._sin,
                k_cache,
                v_cache,
                layer.q_norm,
                layer.k_norm,
                spec.rms_norm_eps,
            )
            tables, lens, scratch = batch.block_tables, batch.context_lens, batch.scratch_blocks
            attended = kernels.draft_attention(q, k_cache, v_cache, tables, lens, scratch, width, spec.head_dim**-0.5)
            attended = layer.o(attended.view(len(ids) * width, -1))
            normed = kernels.add_rms_norm(attended, residual, layer.post_attention_norm, spec.rms_norm_eps)
            hidden = layer.down(kernels.silu_mul(layer.gate_up(normed)))
            next_norm = self._layers[i + 1].input_norm if i + 1 < len(self._layers) else self._norm
            normed = kernels.add_rms_norm(hidden, residual, next_norm, spec.rms_norm_eps)
        return normed

    def _context_tables(self, rows: Sequence[DraftRow]) -> NDArray[np.int32]:
        """[B, most context blocks of a row] int32; entries past a row's own context are 0 and never read."""
        counts = [-(-row.position // self._kv_block_size) for row in rows]
        tables = np.zeros((len(rows), max(counts)), np.int32)
        for table, row, count in zip(tables, rows, counts, strict=True):
            table[:count] = row.block_table[:count]
        return tables

    def _draw_left_to_right(
        self, rows: Sequence[DraftRow], anchors: Tensor, hidden: Tensor, logits: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """hidden: [B, w, d]; logits: [B, w, v], of the head alone; overwritten.

        Returns the tokens [B, w] and, in rejection mode, the distributions they were drawn from [B, w, V].
        """
        temperatures = np.array([row.temperature * self.spec.sampling_scale for row in rows], np.float32)
        sampled = list(compress(rows, temperatures > 0))
        width = logits.shape[1]
        noise = self._block_noise(sampled, width) if sampled else None
        scores = logits.float()
        draft_ids = None if self.draft_ids is None else self.draft_ids.numpy()
        draw = partial(draw_slots, w2=self._w2, temperature=temperatures, draft_ids=draft_ids)
        if self.markov is None:
            nothing = torch.empty((len(rows), 0))
            tokens = draw(scores, nothing, anchors.numpy(), noise=noise)
        elif self.spec.markov == "vanilla":
            tokens = draw(scores, self.markov.w1, anchors.numpy(), noise=noise)
        else:
            tokens = np.empty((len(rows), width), np.int64)
            previous, state, every_row = anchors, None, np.arange(len(rows))
            for k in range(width):
                mixed, state = self.markov.transition(self.markov.embed(previous), hidden[:, k], state)
                slot = slice(k, k + 1)
                slot_noise = None if noise is None else noise[:, slot]
                tokens[:, slot] = draw(scores[:, slot], mixed.contiguous(), every_row, noise=slot_noise)
                previous = torch.from_numpy(tokens[:, k])
        drawn = torch.from_numpy(tokens)
        return drawn, self._distributions(scores, drawn, temperatures) if self._verification == "rejection" else None

    def _distributions(self, scores: Tensor, tokens: Tensor, temperatures: NDArray[np.float32]) -> Tensor:
        """What the tokens [B, w] were drawn from, [B, w, V]: 0 for ids that are never drafted.  scores: [B, w, v]."""
        distributions = F.one_hot(tokens, self.spec.vocab_size).float()
        sampled = torch.from_numpy(temperatures > 0)
        probs = (scores[sampled] / torch.from_numpy(temperatures)[sampled, None, None]).softmax(dim=-1)
        if self.draft_ids is not None:
            probs = torch.zeros_like(distributions[sampled]).index_copy_(-1, self.draft_ids, probs)
        distributions[sampled] = probs
        return distributions

    def _block_noise(self, rows: Sequence[DraftRow], width: int) -> Tensor:
        """Noise of the positions that each block predicts, [rows, w, V]."""
        keys = np.array([row.noise_key for row in rows], np.uint64).repeat(width)
        rounds = np.array([row.position for row in rows], np.int64).repeat(width)
        positions = rounds + np.tile(np.arange(1, width + 1), len(rows))
        return self._noise(keys, positions, rounds).view(len(rows), width, -1)

    def log_odds(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """hidden: [B, w, d]; previous: [B, w], the token before each slot's -> [B, w] float32; 0 without a head."""
        if self._confidence is None:
            return torch.zeros(previous.shape, device=previous.device)
        weight, bias = self._confidence
        inputs = hidden.float()
        if self.spec.confidence_with_markov and self.markov is not None:
            inputs = torch.cat([inputs, self.markov.embed(previous).float()], dim=-1)
        return inputs @ weight + bias
