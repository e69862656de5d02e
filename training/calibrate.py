"""Sequential temperature scaling of a drafter's confidence, and how well calibrated probabilities are.

The survival of draft k is P_k = σ(c_1 / t_1) · … · σ(c_k / t_k), and its label is 1 when drafts 1 … k were all accepted.
Source: DSpark paper, confidence calibration; number of bins as in DeepSpec's reliability metric, grid ours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS = 20
TEMPERATURES = np.geomspace(0.1, 10.0, 201)
SMALLEST_PROBABILITY = 1e-8


def fit_temperatures(
    log_odds: NDArray[np.floating], accepted: NDArray[np.integer], bins: int = BINS
) -> NDArray[np.float64]:
    """Temperatures t [γ], each the one of the grid 0.1 … 10 with the least ECE of the survivals, those before it fixed.

    log_odds: [N, γ] raw confidence of N rounds that verified their whole block, not cut by the expected acceptance; NaN from
    the first slot on that was not verified (end of the answer). accepted: [N] accepted drafts, 0 … γ. Of equally good
    temperatures the one nearest to 1 is taken; 1 where no round verified the slot. Raises ValueError for shapes or counts that
    do not belong together.
    """
    labels = prefix_labels(log_odds, accepted)
    verified = ~np.isnan(log_odds)
    chosen = np.ones(log_odds.shape[1])
    before = np.ones(len(log_odds))
    for slot in range(log_odds.shape[1]):
        seen = verified[:, slot]
        if not seen.any():
            break
        errors = [
            ece(before[seen] * _sigmoid(log_odds[seen, slot] / one), labels[seen, slot], bins) for one in TEMPERATURES
        ]
        best = np.flatnonzero(np.isclose(errors, np.min(errors), rtol=0, atol=1e-12))
        chosen[slot] = TEMPERATURES[best[np.argmin(np.abs(np.log(TEMPERATURES[best])))]]
        before = before * _sigmoid(log_odds[:, slot] / chosen[slot])
    return chosen


def survival(log_odds: NDArray[np.floating], temperatures: ArrayLike) -> NDArray[np.float64]:
    """P_1 … P_γ of each round: log_odds [N, γ], temperatures [γ] → [N, γ]; NaN stays NaN."""
    return np.cumprod(_sigmoid(log_odds / np.asarray(temperatures, np.float64)), axis=1, dtype=np.float64)


def prefix_labels(log_odds: NDArray[np.floating], accepted: NDArray[np.integer]) -> NDArray[np.bool_]:
    """[N, γ]: were drafts 1 … k all accepted? Raises ValueError, see `fit_temperatures`."""
    if log_odds.ndim != 2 or accepted.shape != log_odds.shape[:1]:
        raise ValueError(f"log_odds {log_odds.shape} must be [N, γ] and accepted {accepted.shape} [N]")
    missing = np.isnan(log_odds)
    if (missing[:, :-1] & ~missing[:, 1:]).any():
        raise ValueError("log_odds: a verified slot follows one that was not (NaN)")
    most = (~missing).sum(axis=1)
    if ((accepted < 0) | (accepted > most)).any():
        row = int(np.flatnonzero((accepted < 0) | (accepted > most))[0])
        raise ValueError(f"accepted: {accepted[row]} in round {row}, which verified {most[row]} drafts")
    return np.arange(log_odds.shape[1]) < accepted[:, None]


def ece(probabilities: NDArray[np.floating], labels: NDArray[np.generic], bins: int = BINS) -> float:
    """Expected calibration error Σ_b (n_b / n)·|mean probability - mean label| over equal-width bins of [0, 1].

    probabilities: [n]; labels: [n] 0 or 1. Raises ValueError for none at all or unequal lengths.
    """
    _check(probabilities, labels)
    clipped = _clipped(probabilities)
    return _gap(clipped, np.asarray(labels, np.float64), _bin_of(clipped, bins), bins)


def debiased_ece(
    probabilities: NDArray[np.floating],
    labels: NDArray[np.generic],
    bins: int = BINS,
    *,
    replicates: int = 200,
    seed: int = 0,
) -> float:
    """ECE less what a perfectly calibrated predictor with the same probabilities would show by chance.

    That expectation is the mean ECE over `replicates` sets of labels drawn as Bernoulli(probability), independent of each
    other, with a fixed seed. Around 0 (also below) for a calibrated predictor; of a clearly miscalibrated one it takes off more
    than chance had added, by at most the expectation itself, so it never flatters by more than `ece - debiased_ece`.
    Source: labels resampled under the hypothesis of calibration as in Bröcker & Smith 2007 (consistency resampling) and
    Vaicenavicius et al. 2019 (arXiv 1902.06977); here with the probabilities held fixed and the mean subtracted.
    """
    _check(probabilities, labels)
    clipped = _clipped(probabilities)
    bin_of = _bin_of(clipped, bins)
    rng = np.random.default_rng(seed)
    draws = ((rng.random(len(clipped)) < clipped).astype(np.float64) for _ in range(replicates))
    chance = [_gap(clipped, drawn, bin_of, bins) for drawn in draws]
    return _gap(clipped, np.asarray(labels, np.float64), bin_of, bins) - float(np.mean(chance))


def _gap(probabilities: NDArray[np.float64], labels: NDArray[np.float64], bin_of: NDArray[np.intp], bins: int) -> float:
    sums = np.bincount(bin_of, weights=probabilities - labels, minlength=bins)
    return float(np.abs(sums).sum() / len(probabilities))


def _clipped(probabilities: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.clip(probabilities.astype(np.float64), SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)


def _bin_of(probabilities: NDArray[np.float64], bins: int) -> NDArray[np.intp]:
    return np.minimum((probabilities * bins).astype(np.intp), bins - 1)


def _check(probabilities: NDArray[np.floating], labels: NDArray[np.generic]) -> None:
    if len(probabilities) == 0 or probabilities.shape != labels.shape:
        raise ValueError(
            f"probabilities {probabilities.shape} and labels {labels.shape}: must be [n] both, n at least 1"
        )


def _sigmoid(log_odds: NDArray[np.floating]) -> NDArray[np.float64]:
    return 1.0 / (1.0 + np.exp(-log_odds.astype(np.float64)))
