"""A draft block drawn left to right: each slot's logits are corrected by the token drafted just before it.

    logits: [B, γ, v], the head's; w1: [V, r], w2: [v, r], of low rank; anchors: [B] int64, the tokens before the blocks
    temperature: [B] float32, 0: greedy; keys: [B] int64 and positions: [B, γ] int64, of each slot's Gumbel noise
    draft_ids: [v] int64, the ids that are drafted, or None where v = V
    → [B, γ] int64

    scores_k = logits_k + w2 · x_k,   x_k = transition(k, w1[d_{k-1}]),   d_{-1} the anchor
    d_k = argmax(scores_k), or argmax(scores_k / temperature + noise(key, position_k));   ties to the lowest id

transition(k, rows [B, r]) → [B, r] is the identity for a vanilla head; gated and rnn heads mix in the slot's hidden state.
Source: DSpark paper, the Markov head; DeepSpec's code.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dspark.kernels.gumbel_noise import gumbel_noise

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
