"""A draft block drawn left to right: each slot's logits are corrected by the token drafted just before it.

    logits: [B, γ, v], the head's; w1: [V, r], w2: [v, r], of low rank; anchors: [B] int64, the tokens before the blocks
    temperature: [B] float32, 0: greedy; keys: [B] int64 and positions: [B, γ] int64, of each slot's Gumbel noise
    draft_ids: [v] int64, the ids that are drafted, or None where v = V
    → [B, γ] int64

    scores_k = logits_k + w2 · x_k,   x_k = transition(k, w1[d_{k-1}]),   d_{-1} the anchor
    d_k = argmax(scores_k), or argmax(scores_k / temperature + noise(key, position_k));   ties to the lowest id

transition(k, rows [B, r]) → [B, r] is the identity for a vanilla head; gated and rnn heads mix in the slot's hidden state.
A CPU draws a slot a call: every panel of 16 ids is multiplied, corrected and compared while it is in registers, so scores
are read and written once. Moves v·r elements of w2, and 8 to 12·B·v bytes per slot.
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
from dspark.kernels.simd import LANES

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
def _draw_slot(
    scores_address,
    stride,
    rows,
    vocab,
    x_address,
    rank,
    panel_address,
    panel_like,
    temperature,
    noise_address,
    noise_stride,
    noise_rows,
    ids,
    best_values,
    best_ids,
):
    scores = view(scores_address, (rows - 1) * stride + vocab, np.empty(0, np.float32))
    x = view(x_address, rows * rank, np.empty(0, np.float32))
    panels = best_values.shape[0]
    weights = view(panel_address, panels * rank * LANES, panel_like)
    noise = view(noise_address, (noise_rows.max() + 1) * noise_stride, np.empty(0, np.float32))
    for p in numba.prange(panels):
        sums = np.zeros(MOST_ROWS * LANES, np.float32)
        width = min(LANES, vocab - p * LANES)
        for row in range(0, rows, MOST_ROWS):
            tile = min(MOST_ROWS, rows - row)
            if rank > 0:
                panel_tile(x, row * rank, rank, weights, p * rank * LANES, sums, tile, (p + 1) * rank * LANES, LANES)
            for m in range(tile):
                base = (row + m) * stride + p * LANES
                drawn_with = noise_rows[row + m]
                best, best_id = np.float32(-np.inf), p * LANES
                for c in range(width):
                    value = scores[base + c] + sums[m * LANES + c]
                    scores[base + c] = value
                    if drawn_with >= 0:
                        token = ids[p * LANES + c] if ids.size > 0 else p * LANES + c
                        value = value / temperature[row + m] + noise[drawn_with * noise_stride + token]
                    if value > best:
                        best, best_id = value, p * LANES + c
                best_values[p, row + m], best_ids[p, row + m] = best, best_id


def draw_slot(
    scores: Tensor,
    x: Tensor | None,
    w2: PanelLinear | None,
    temperature: NDArray[np.float32],
    noise: Tensor | None = None,
    draft_ids: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """One slot of the blocks on the CPU → which of the v ids each row draws, [B] int64.

    scores: [B, v] float32 with dense rows; the head's, on return with w2 · x added.  x: [B, r]; None and w2 None: no bias.
    noise: [rows with temperature > 0, V] float32 with dense rows, in their order.
    """
    rows, vocab = scores.shape
    sampled = temperature > 0
    noise_rows = np.where(sampled, np.cumsum(sampled) - 1, -1)
    panels = -(-vocab // LANES)
    best_values, best_ids = np.empty((panels, rows), np.float32), np.empty((panels, rows), np.int64)
    mixed = torch.empty((rows, 0)) if x is None else x.float().contiguous()
    weights = mixed if w2 is None else w2.panels
    _draw_slot(
        scores.data_ptr(),
        scores.stride(0),
        rows,
        vocab,
        mixed.data_ptr(),
        mixed.shape[1],
        weights.data_ptr(),
        like(weights),
        temperature,
        0 if noise is None else noise.data_ptr(),
        0 if noise is None else noise.stride(0),
        noise_rows,
        _NO_IDS if draft_ids is None else draft_ids,
        best_values,
        best_ids,
    )
    drawn: NDArray[np.int64] = np.take_along_axis(best_ids, best_values.argmax(axis=0)[None], axis=0)[0]
    return drawn


_NO_IDS = np.empty(0, np.int64)
