"""A draft block drawn left to right: each slot's logits are corrected by the token drafted just before it.

    logits: [B, γ, v], the head's; w1: [V, r], w2: [v, r], of low rank; anchors: [B] int64, the tokens before the blocks
    temperature: [B] float32, 0: greedy; keys: [B] int64 and positions: [B, γ] int64, of each slot's Gumbel noise
    draft_ids: [v] int64, the ids that are drafted, or None where v = V
    → [B, γ] int64

    scores_k = logits_k + w2 · x_k,   x_k = transition(k, w1[d_{k-1}]),   d_{-1} the anchor
    d_k = argmax(scores_k), or argmax(scores_k / temperature + noise(key, position_k));   ties to the lowest id

transition(k, rows [B, r]) → [B, r] is the identity for a vanilla head; gated and rnn heads mix in the slot's hidden state.
On a CPU every panel of 16 ids is multiplied, corrected and compared while it is in registers, so scores are read and
written once. Moves v·r elements of w2, and 8 to 12·B·v bytes per slot.
Source: DSpark paper, the Markov head; DeepSpec's code.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dspark.kernels.cpu import cpu_kernel, like, view
from dspark.kernels.gumbel_noise import gumbel_noise
from dspark.kernels.panel_linear import MOST_ROWS, PanelLinear, panel_tile
from dspark.kernels.simd import LANES, to_float

_NO_IDS = np.empty(0, np.int64)

Transition = Callable[[int, Tensor], Tensor]
"""transition(slot, w1 rows of the tokens before [B, r]) → [B, r]. Called for slots 0, 1, … in order."""


def markov_block_reference(
    logits: Tensor,
    anchors: Tensor,
    w1: Tensor,
    w2: Tensor,
    temperature: Tensor,
    keys: Tensor,
    positions: Tensor,
    draft_ids: Tensor | None = None,
    transition: Transition | None = None,
) -> Tensor:
    """The same in plain PyTorch, noise and all, in fp32."""
    previous, tokens = anchors, []
    sampled = temperature > 0
    divisor = torch.where(sampled, temperature, 1.0)[:, None]
    vocab = len(w1)
    for slot in range(logits.shape[1]):
        rows = F.embedding(previous, w1)
        if transition is not None:
            rows = transition(slot, rows)
        scores = logits[:, slot].float() + rows.float() @ w2.float().T
        at = positions[:, slot].numpy()
        noise = torch.from_numpy(gumbel_noise(keys.numpy().view(np.uint64), at, np.zeros_like(at), vocab))
        if draft_ids is not None:
            noise = noise[:, draft_ids]
        best = torch.where(sampled[:, None], scores / divisor + noise, scores).argmax(dim=1)
        previous = best if draft_ids is None else draft_ids[best]
        tokens.append(previous)
    return torch.stack(tokens, dim=1)


@cpu_kernel
def _draw_slots(
    scores_address,
    row_stride,
    slot_stride,
    rows,
    slots,
    vocab,
    table_address,
    table_like,
    table_rows,
    rank,
    source,
    panel_address,
    panel_like,
    temperature,
    noise_address,
    noise_strides,
    noise_rows,
    ids,
    tokens,
):
    scores = view(scores_address, (rows - 1) * row_stride + (slots - 1) * slot_stride + vocab, np.empty(0, np.float32))
    table = view(table_address, table_rows * rank, table_like)
    panels = (vocab + LANES - 1) // LANES
    weights = view(panel_address, panels * rank * LANES, panel_like)
    noise_size = noise_rows.max() * noise_strides[0] + (slots - 1) * noise_strides[1] + noise_strides[2]
    noise = view(noise_address, max(noise_size, 0), np.empty(0, np.float32))
    x = np.empty(rows * rank, np.float32)
    best_values, best_ids = np.empty((panels, rows), np.float32), np.empty((panels, rows), np.int64)
    for slot in range(slots):
        for row in range(rows):
            for r in range(rank):
                x[row * rank + r] = to_float(table[source[row] * rank + r])
        for p in numba.prange(panels):
            sums = np.zeros(MOST_ROWS * LANES, np.float32)
            width = min(LANES, vocab - p * LANES)
            for first in range(0, rows, MOST_ROWS):
                tile = min(MOST_ROWS, rows - first)
                if rank > 0:
                    ahead = (p + 1) * rank * LANES
                    panel_tile(x, first * rank, rank, weights, p * rank * LANES, sums, tile, ahead, LANES)
                for m in range(tile):
                    row = first + m
                    base = row * row_stride + slot * slot_stride + p * LANES
                    noise_base = noise_rows[row] * noise_strides[0] + slot * noise_strides[1]
                    best, best_id = np.float32(-np.inf), p * LANES
                    for c in range(width):
                        value = scores[base + c] + sums[m * LANES + c]
                        scores[base + c] = value
                        if noise_rows[row] >= 0:
                            token = ids[p * LANES + c] if ids.size > 0 else p * LANES + c
                            value = value / temperature[row] + noise[noise_base + token]
                        if value > best:
                            best, best_id = value, p * LANES + c
                    best_values[p, row], best_ids[p, row] = best, best_id
        for row in range(rows):
            chosen = 0
            for p in range(1, panels):
                if best_values[p, row] > best_values[chosen, row]:
                    chosen = p
            token = best_ids[chosen, row]
            tokens[row, slot] = ids[token] if ids.size > 0 else token
            source[row] = tokens[row, slot]


def draw_slots(
    scores: Tensor,
    table: Tensor,
    source: NDArray[np.int64],
    w2: PanelLinear | None,
    temperature: NDArray[np.float32],
    noise: Tensor | None = None,
    draft_ids: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Consecutive slots of the blocks on the CPU → [B, slots] int64.

    scores: [B, slots, v] float32 with dense rows; the head's, on return with w2 · x added.
    table: [n, r] float32 or bfloat16, dense; x of the first slot are its rows `source` [B], of the next ones those of the
    tokens just drawn: w1 where the head is a vanilla one, else one slot's x. r = 0 and w2 None: no correction.
    noise: [rows with temperature > 0, slots, V] float32 with dense rows, in their order.
    """
    rows, slots, vocab = scores.shape
    sampled = temperature > 0
    tokens = np.empty((rows, slots), np.int64)
    weights = table if w2 is None else w2.panels
    _draw_slots(
        scores.data_ptr(),
        scores.stride(0),
        scores.stride(1),
        rows,
        slots,
        vocab,
        table.data_ptr(),
        like(table),
        len(table),
        table.shape[1],
        source.copy(),
        weights.data_ptr(),
        like(weights),
        temperature,
        0 if noise is None else noise.data_ptr(),
        (0, 0, 0) if noise is None else (noise.stride(0), noise.stride(1), noise.shape[2]),
        np.where(sampled, np.cumsum(sampled) - 1, -1),
        _NO_IDS if draft_ids is None else draft_ids,
        tokens,
    )
    return tokens
