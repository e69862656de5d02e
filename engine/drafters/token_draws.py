"""Drawing the tokens of a draft block one after another, for drafters that run a pass per token.

The token is argmax(logits / T + noise) with the noise that verification uses at that position, the argmax alone when
greedy. Its confidence is the log-odds of the winner under the softmax of these very scores: how clearly it won. The
target adds the same noise to its own logits, so what decides acceptance is whether the two models' logits differ by more
than the winner's lead; the plain probability of the drawn token says less, since a noise that lifts an unlikely token
lifts it for both. In rejection mode the confidence must not depend on which token was drawn (then lengths that follow it
would anticipate the draw), so there it is that of the likeliest token without noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dspark.engine.config import VerificationMode
from dspark.engine.drafters.drafter import Draft, DraftRow, Noise

_LEAST_SURPRISE = 1e-6
"""Nats; float32 cannot tell probabilities closer to 1 apart, and log-odds must be finite."""


class TokenDraws:
    """The draws of one call of `propose`, for B sequences."""

    def __init__(self, rows: Sequence[DraftRow], verification: VerificationMode, noise: Noise) -> None:
        self._sampled = [i for i, row in enumerate(rows) if row.temperature > 0]
        self._temperatures = torch.tensor([[rows[i].temperature] for i in self._sampled])
        self._keys = np.array([rows[i].noise_key for i in self._sampled], np.uint64)
        self._anchors = np.array([rows[i].position for i in self._sampled], np.int64)
        self._verification = verification
        self._noise = noise
        self._tokens: list[Tensor] = []
        self._confidence: list[Tensor] = []
        self._probs: list[Tensor] = []

    def draw(self, logits: Tensor) -> NDArray[np.int64]:
        """The next token of each sequence, [B]. logits: [B, V], may be overwritten."""
        scores = logits.float()
        if self._sampled:
            scores[self._sampled] /= self._temperatures
        unperturbed = scores
        if self._sampled:
            positions = self._anchors + len(self._tokens) + 1
            noise = self._noise(self._keys, positions, self._anchors)
            scores = scores.clone() if self._verification == "rejection" else scores
            scores[self._sampled] += noise
        tokens = scores.argmax(dim=-1)
        if self._verification == "rejection":
            probs = F.one_hot(tokens, scores.shape[-1]).float()
            probs[self._sampled] = unperturbed[self._sampled].softmax(dim=-1)
            self._probs.append(probs)
        self._tokens.append(tokens)
        self._confidence.append(log_odds_of_highest(scores if self._verification == "coupled" else unperturbed))
        return tokens.numpy()

    def draft(self, block_size: int, proposing: NDArray[np.bool_]) -> Draft:
        """All draws as the proposals of a batch, in which only the sequences marked in `proposing` were drawn for."""
        tokens = np.zeros((len(proposing), block_size), np.int64)
        confidence = np.zeros((len(proposing), block_size), np.float32)
        probs = None
        drawn = len(self._tokens)
        if drawn:
            tokens[proposing, :drawn] = torch.stack(self._tokens, dim=1).numpy()
            confidence[proposing, :drawn] = torch.stack(self._confidence, dim=1).numpy()
        if self._probs:
            of_proposing = torch.stack(self._probs, dim=1)
            probs = of_proposing.new_zeros((len(proposing), *of_proposing.shape[1:]))
            probs[torch.from_numpy(proposing)] = of_proposing
        return Draft(tokens, np.where(proposing, drawn, 0).astype(np.int32), confidence, probs)


def log_odds_of_highest(scores: Tensor) -> Tensor:
    """[B, V] float32 → [B]: log(p / (1 - p)) of the highest score's probability p under the softmax, at most 13.8."""
    surprise = scores.logsumexp(dim=-1) - scores.amax(dim=-1)
    return -surprise.clamp(min=_LEAST_SURPRISE).expm1().log()
