"""What a drafter is trained for: the target's distribution at every slot, and to know how well it will do.

    CE   = Σ w·(-log q(label)) / Σ w        KL = Σ w·KL(p‖q) / Σ w        L1 = Σ w·‖q - p‖₁ / Σ w
    CONF = Σ w·BCE(σ(c), 1 - ½‖q - p‖₁) / Σ w

over slots k of all blocks, w = exp(-k / decay) where the label lies in the answer; all fp32, at temperature 1. Acceptance is
1 - ½‖q - p‖₁ under rejection sampling and a few per cent less under coupling. Source: DSpark paper, training objective; its
weights are CE 0.1, L1 0.9, CONF 1 (DFlash: CE alone). KL gives a gradient where p and q hardly overlap, which L1 does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ROWS = 32
"""Rows of logits treated at once: their probabilities and gradients then stay in the processor's cache."""


@dataclass(frozen=True, slots=True)
class LossWeights:
    cross_entropy: float = 0.1
    kl: float = 0.6
    l1: float = 0.4
    confidence: float = 1.0
    decay: float = 4.0


DFLASH = LossWeights(cross_entropy=1.0, kl=0.0, l1=0.0, confidence=0.0)
EAGLE3 = LossWeights(cross_entropy=0.0, kl=1.0, l1=0.0, confidence=0.0, decay=-1 / math.log(0.8))
"""Cross-entropy with the target's distribution, which has KL's gradient; step k weighs 0.8^k."""


def draft_loss(
    hidden: Tensor,
    head: Tensor,
    low_rank: Tensor | None,
    w2: Tensor | None,
    target_logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    weights: LossWeights,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss of N slots over v ids whose logits are hidden·headᵀ + low_rank·w2ᵀ.

    hidden: [N, d]; head: [v, d], frozen; low_rank: [N, r] and w2: [v, r], or None; target_logits: [N, v]; labels: [N], an
    index into the v ids or -1 (not among them); weight: [N], 0 for a slot without a label.
    → (loss, its parts, and ‖q - p‖₁ of every slot [N]); only the loss has a gradient.
    """
    mean_weight = weight / weight.sum().clamp_min(1e-6)
    loss, sums, distance = _HeadLoss.apply(
        hidden, low_rank, w2, head, target_logits, labels, mean_weight, (weights.cross_entropy, weights.kl, weights.l1)
    )
    return loss, dict(zip(("ce", "kl", "l1"), sums.unbind(), strict=True)), distance


def confidence_loss(log_odds: Tensor, distance: Tensor, weight: Tensor) -> Tensor:
    """log_odds, distance, weight: [N] → CONF."""
    accepted = (1 - distance / 2).clamp(0, 1)
    each = F.binary_cross_entropy_with_logits(log_odds, accepted, reduction="none")
    return (weight * each).sum() / weight.sum().clamp_min(1e-6)


class _HeadLoss(torch.autograd.Function):
    """The weighted sum of the three losses and its gradient in one pass over the logits, a chunk of rows at a time.

    dCE/dz = q - onehot(label), dKL/dz = q - p, dL1/dz = q·(s - Σ q·s) with s = sign(q - p). The gradient is made in the
    forward pass, in place of the logits.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        low_rank: Tensor | None,
        w2: Tensor | None,
        head: Tensor,
        target_logits: Tensor,
        labels: Tensor,
        weight: Tensor,
        coefficients: tuple[float, float, float],
    ) -> tuple[Tensor, ...]:
        logits = F.linear(hidden.to(head.dtype), head)
        if low_rank is not None and w2 is not None:
            logits.addmm_(low_rank.to(head.dtype), w2.to(head.dtype).t())
        ce_weight, kl_weight, l1_weight = coefficients
        sums = torch.zeros(3, device=logits.device)
        distance = torch.empty(len(logits), device=logits.device)
        for start in range(0, len(logits), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            w, label = weight[rows], labels[rows]
            log_p = target_logits[rows].to(torch.float32, copy=True)
            log_q = logits[rows].to(torch.float32, copy=True)
            log_p -= log_p.logsumexp(-1, keepdim=True)
            log_q -= log_q.logsumexp(-1, keepdim=True)
            known = (label >= 0) * w
            at = label.clamp_min(0)[:, None]
            sums[0] -= (log_q.gather(1, at)[:, 0] * known).sum()
            p, q = log_p.exp(), log_q.exp()
            sums[1] += (torch.linalg.vecdot(p, log_p.sub_(log_q)) * w).sum()
            difference = torch.sub(q, p, out=log_p)
            apart = torch.sign(difference)
            distance[rows] = torch.linalg.vecdot(apart, difference)
            sums[2] += (distance[rows] * w).sum()
            signed = torch.linalg.vecdot(apart, q)[:, None]
            gradient = difference.mul_(kl_weight * w[:, None])
            gradient.addcmul_(q, (apart - signed).mul_(l1_weight * w[:, None]))
            if ce_weight:
                gradient.addcmul_(q, ce_weight * known[:, None])
                gradient.scatter_add_(1, at, -ce_weight * known[:, None])
            logits[rows] = gradient
        gradients = [(logits @ head).to(hidden.dtype)]
        if low_rank is not None and w2 is not None:
            gradients.append((logits @ w2.to(head.dtype)).to(low_rank.dtype))
            gradients.append((logits.t() @ low_rank.to(head.dtype)).to(w2.dtype))
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(sums, distance)
        return sums @ torch.tensor(coefficients, device=sums.device), sums, distance

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [gradient * by_loss.to(gradient.dtype) for gradient in ctx.saved_tensors]
        return scaled[0], *(scaled[1:] or (None, None)), None, None, None, None, None
