"""What a drafter's rounds say about it: accepted length τ, acceptance by slot, and how well it knew beforehand.

Slots are counted from 1 in words and from 0 in arrays. A slot is *labelled* where it was judged and all drafts before it were
accepted: only there is conditional acceptance observed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark.engine.calibration import Calibration
from dspark.training.replay import Rounds

RESAMPLES = 2000
BINS = 10
"""Bins of equally many rounds, by expected accepted length."""
LEARNING_BATCH = 64
"""Rounds shown to a calibration at once, as a step of an engine would."""


def accepted_length(rounds: Rounds) -> float:
    """τ, mean tokens given by a round, the target's own included; NaN without rounds.

    An accepted draft that ends the text brings no further token. The token from the prompt's pass belongs to no round.
    """
    return float(rounds.emitted.mean()) if len(rounds) else float("nan")


def accepted_length_interval(rounds: Rounds, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95 % interval of τ by the bootstrap over answers (rounds of one answer depend on each other); NaN without rounds.

    Source: Efron 1979; the percentile interval.
    """
    if not len(rounds):
        return float("nan"), float("nan")
    _, member = np.unique(rounds.answer, return_inverse=True)
    counts = np.bincount(member)
    tokens = np.bincount(member, weights=rounds.emitted)
    drawn = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), resamples)
    low, high = np.quantile((drawn @ tokens) / (drawn @ counts), (0.025, 0.975))
    return float(low), float(high)


def labelled(rounds: Rounds) -> NDArray[np.bool_]:
    """[N, γ]: the slot was judged and every draft before it was accepted."""
    slots = np.arange(rounds.block_size)
    return (slots < rounds.judged[:, None]) & (slots <= rounds.accepted[:, None])


def accepted_slots(rounds: Rounds) -> NDArray[np.bool_]:
    """[N, γ]: the draft was accepted."""
    return np.arange(rounds.block_size) < rounds.accepted[:, None]


def conditional_acceptance(rounds: Rounds) -> NDArray[np.float64]:
    """[γ]: of the labelled drafts of each slot, the share that was accepted; NaN where there are none."""
    seen = labelled(rounds).sum(axis=0).astype(np.float64)
    seen[seen == 0] = np.nan
    return accepted_slots(rounds).sum(axis=0) / seen


def judged_log_odds(rounds: Rounds) -> NDArray[np.float32]:
    """[N, γ] raw confidence, NaN from the first slot on that was not judged, as training/calibrate.py takes it."""
    unknown = np.arange(rounds.block_size) >= rounds.judged[:, None]
    return np.where(unknown, np.float32(np.nan), rounds.confidence)


def survival_by(calibration: Calibration, rounds: Rounds) -> NDArray[np.float32]:
    """[N, γ] survival of every draft, by what `calibration` knows now."""
    return calibration.survival(rounds.confidence, rounds.temperature > 0, rounds.source)


@dataclass(frozen=True, slots=True)
class Cut:
    """What shorter drafts would have given. verified: mean drafts per round.  accepted_share: of those; NaN for none."""

    accepted_length: float
    verified: float
    accepted_share: float


def cut_to(rounds: Rounds, lengths: NDArray[np.integer] | int) -> Cut:
    """Verify at most `lengths` ([N] or one for all) drafts of each round, at the same anchors.

    A round that is cut leaves the next one another anchor than these rounds have; that is neglected.
    """
    verified = np.minimum(rounds.verified, lengths)
    accepted = np.minimum(rounds.accepted, verified)
    emitted = np.minimum(accepted + 1, rounds.left)
    share = float(accepted.sum() / verified.sum()) if verified.any() else float("nan")
    return Cut(float(emitted.mean()), float(verified.mean()), share)


def cut_at_survival(rounds: Rounds, threshold: float) -> Cut:
    """Verify the drafts whose survival is at least `threshold`."""
    return cut_to(rounds, (rounds.survival >= threshold).sum(axis=1))


@dataclass(frozen=True, slots=True)
class Prediction:
    """How well an estimator foretells acceptance.

    bin_error, answer_error: |expected - observed accepted drafts per round|, mean over bins of rounds and over answers.
    log_loss (nat), brier: mean over labelled slots.
    """

    bin_error: float
    answer_error: float
    log_loss: float
    brier: float


def compare_with_position_only(rounds: Rounds, untaught: Calibration) -> tuple[Prediction, Prediction]:
    """(the confidence, an estimator that knows source and slot only), each fitted on the answers it is not tested on.

    Both halves of the answers are tested. The confidence is fitted as an engine would, from `untaught` (left as it is) on;
    the other is the conditional acceptance of each slot. Rounds are put into bins by what the confidence expects, for both.
    All rounds must be greedy or all sampled, and of two answers at least. Raises ValueError otherwise.
    """
    proposing = rounds.where(rounds.judged > 0)
    answers = np.unique(proposing.answer)
    if len(answers) < 2 or len({*(proposing.temperature > 0).tolist()}) != 1:
        raise ValueError(f"rounds: {len(answers)} answers; two or more are needed, all greedy or all sampled")
    half = np.isin(proposing.answer, answers[::2])
    confident = np.empty(proposing.confidence.shape)
    positional = np.empty(proposing.confidence.shape)
    for test in (half, ~half):
        fitting = proposing.where(~test)
        tested = proposing.where(test)
        learned = _learned(fitting, untaught).table()
        confident[test] = learned.conditional(tested.confidence, tested.temperature > 0, tested.source)
        for source in np.unique(proposing.source):
            of_source = test & (proposing.source == source)
            positional[of_source] = _slot_rates(fitting.where(fitting.source == source))
    expected = _expected(proposing, confident)
    order = np.argsort(expected, kind="stable")
    bins = np.empty(len(order), np.intp)
    bins[order] = np.arange(len(order)) * BINS // len(order)
    return _prediction(proposing, confident, bins), _prediction(proposing, positional, bins)


def _learned(rounds: Rounds, untaught: Calibration) -> Calibration:
    calibration = copy.deepcopy(untaught)
    # in random order: a calibration forgets, and would know the last answers best
    order = np.random.default_rng(0).permutation(len(rounds))
    for start in range(0, len(order), LEARNING_BATCH):
        chosen = order[start : start + LEARNING_BATCH]
        some = rounds.where(chosen)
        calibration.observe(some.confidence, some.temperature > 0, some.judged, some.accepted, some.source)
    return calibration


def _slot_rates(rounds: Rounds) -> NDArray[np.float64]:
    """[γ] conditional acceptance, with one accepted and one rejected draft added to each slot."""
    seen = labelled(rounds).sum(axis=0)
    return (accepted_slots(rounds).sum(axis=0) + 1.0) / (seen + 2.0)


def _expected(rounds: Rounds, conditional: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N] accepted drafts expected among the judged ones."""
    judged = np.arange(rounds.block_size) < rounds.judged[:, None]
    return (np.cumprod(conditional, axis=1) * judged).sum(axis=1)


def _prediction(rounds: Rounds, conditional: NDArray[np.float64], bins: NDArray[np.intp]) -> Prediction:
    surplus = _expected(rounds, conditional) - rounds.accepted
    _, answers = np.unique(rounds.answer, return_inverse=True)
    at = labelled(rounds)
    p, label = np.clip(conditional[at], 1e-6, 1 - 1e-6), accepted_slots(rounds)[at]
    return Prediction(
        bin_error=_mean_gap(surplus, bins),
        answer_error=_mean_gap(surplus, answers),
        log_loss=float(-np.log(np.where(label, p, 1 - p)).mean()),
        brier=float(((p - label) ** 2).mean()),
    )


def _mean_gap(surplus: NDArray[np.float64], groups: NDArray[np.intp]) -> float:
    """Mean over groups of |mean surplus|."""
    counts = np.bincount(groups)
    sums = np.bincount(groups, weights=surplus)
    return float(np.abs(sums[counts > 0] / counts[counts > 0]).mean())
