"""What a drafter is trained for: the target's distribution at every slot, and to know how well it will do.

    CE   = Σ w·(-log q(label)) / Σ w        KL = Σ w·KL(p‖q) / Σ w        L1 = Σ w·‖q - p‖₁ / Σ w
    CONF = Σ w·BCE(σ(c), 1 - ½‖q - p‖₁) / Σ w

over slots k of all blocks, w = exp(-k / decay) where the label lies in the answer; all fp32, at temperature 1. Acceptance is
1 - ½‖q - p‖₁ under rejection sampling and a few per cent less under coupling. Source: DSpark paper, training objective; its
weights are CE 0.1, L1 0.9, CONF 1 (DFlash: CE alone). KL gives a gradient where p and q hardly overlap, which L1 does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class LossWeights:
    cross_entropy: float = 0.1
    kl: float = 0.6
    l1: float = 0.4
    confidence: float = 1.0
    decay: float = 4.0


DFLASH = LossWeights(cross_entropy=1.0, kl=0.0, l1=0.0, confidence=0.0)


def draft_loss(
    draft_logits: Tensor,
    target_logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    log_odds: Tensor | None,
    weights: LossWeights,
) -> tuple[Tensor, dict[str, float]]:
    """draft_logits, target_logits: [N, B, v] fp32 over the same ids; labels: [N, B], an index into them or -1 (not among them);

    valid: [N, B] bool; log_odds: [N, B] or None → (loss, its parts and the slot-1 agreement of the argmaxes).
    """
    slot = torch.exp(-torch.arange(labels.shape[1]) / weights.decay)
    weight = valid * slot
    total = weight.sum().clamp_min(1e-6)
    log_q = draft_logits.log_softmax(-1)
    log_p = target_logits.log_softmax(-1)
    p = log_p.exp()
    distance = (log_q.exp() - p).abs().sum(-1)
    known = labels >= 0
    cross_entropy = -log_q.gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1) * known
    parts = {
        "ce": (weight * cross_entropy).sum() / total,
        "kl": (weight * (p * (log_p - log_q)).sum(-1)).sum() / total,
        "l1": (weight * distance).sum() / total,
    }
    loss = weights.cross_entropy * parts["ce"] + weights.kl * parts["kl"] + weights.l1 * parts["l1"]
    if log_odds is not None:
        accepted = (1 - distance.detach() / 2).clamp(0, 1)
        parts["conf"] = (
            weight * F.binary_cross_entropy_with_logits(log_odds, accepted, reduction="none")
        ).sum() / total
        loss = loss + weights.confidence * parts["conf"]
    first = valid[:, 0]
    agree = (draft_logits[:, 0].argmax(-1) == target_logits[:, 0].argmax(-1)) & first
    facts = {name: float(value.detach()) for name, value in parts.items()}
    return loss, facts | {"agreement": float(agree.sum() / first.sum().clamp_min(1))}
