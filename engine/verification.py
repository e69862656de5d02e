"""How many drafts the target accepts, and the token it adds.

Coupled (the default): target and drafter draw with the same noise, and a draft is accepted exactly when it equals the
target's own token; the text is then the target's, whatever was drafted. Daliri, Musco, Suresh, arXiv 2408.07978.

Rejection: a draft d with target probability p and draft probability q is accepted with chance min(1, p(d)/q(d)); after
the first rejection a token is drawn from max(p - q, 0), normalised. Leviathan et al. 2023; Chen et al. 2023. The text is
distributed as the target's, provided that no draft's length or source was chosen with knowledge of its tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark.engine.noise import Stream
from dspark.kernels.coupled_sampling import GREEDY_BELOW, truncation_threshold
from dspark.kernels.gumbel_noise import gumbel_noise

SMALLEST_PROBABILITY = 1e-8


def accept_coupled(drafts: NDArray[np.int64], target_tokens: NDArray[np.int64]) -> int:
    """Length of the common prefix. drafts: [n]; target_tokens: [n + 1]; the target's next token is target_tokens[result]."""
    differ = drafts != target_tokens[: len(drafts)]
    return int(differ.argmax()) if differ.any() else len(drafts)


def target_probabilities(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float
) -> NDArray[np.float64]:
    """The distribution the target samples from: processed logits [vocab] → [vocab], one-hot when greedy."""
    if temperature < GREEDY_BELOW:
        one_hot = np.zeros(logits.size)
        one_hot[logits.argmax()] = 1.0
        return one_hot
    z = logits / np.float32(temperature)
    wide = np.where(z >= truncation_threshold(z, top_k, top_p, min_p), z.astype(np.float64), -np.inf)
    weights = np.exp(wide - wide.max())
    return weights / weights.sum()


def accept_rejection(
    drafts: NDArray[np.int64], p: NDArray[np.float64], q: NDArray[np.float64], noise_key: int, anchor: int
) -> tuple[int, int]:
    """(accepted drafts, next token) by rejection sampling; all randomness from counters, fresh for every anchor position.

    drafts: [n]; p: [n + 1, vocab], target; q: [n, vocab], draft. Source: Chen et al. 2023, Algorithm 2.
    """
    for k, draft in enumerate(drafts.tolist()):
        chance = min(1.0, p[k, draft] / max(q[k, draft], SMALLEST_PROBABILITY))
        if _uniform(noise_key, anchor + 1 + k, anchor) < chance:
            continue
        residual = np.maximum(p[k] - q[k], 0.0)
        weights = residual if residual.sum() > SMALLEST_PROBABILITY else p[k]
        return k, _draw(weights, noise_key, anchor + 1 + k, anchor)
    last = len(drafts)
    return last, _draw(p[last], noise_key, anchor + 1 + last, anchor)


def _noise(noise_key: int, position: int, turn: int, vocab: int, stream: Stream) -> NDArray[np.float32]:
    keys, positions = np.array([noise_key], np.uint64), np.array([position], np.int64)
    return gumbel_noise(keys, positions, np.array([turn], np.int64), vocab, stream)[0]


def _uniform(noise_key: int, position: int, turn: int) -> float:
    """In (0, 1): the distribution function of a Gumbel variate at itself."""
    return float(np.exp(-np.exp(-np.float64(_noise(noise_key, position, turn, 1, Stream.ACCEPT)[0]))))


def _draw(weights: NDArray[np.float64], noise_key: int, position: int, turn: int) -> int:
    """A token with probability proportional to `weights` [vocab], by the Gumbel-max rule."""
    noise = _noise(noise_key, position, turn, weights.size, Stream.RESIDUAL)
    with np.errstate(divide="ignore"):
        return int((np.log(weights) + noise).argmax())
