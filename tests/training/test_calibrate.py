"""Temperatures that make the drafter's confidence true, and an error measure that chance does not inflate."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from dspark.training.calibrate import debiased_ece, ece, fit_temperatures, prefix_labels, survival

KNOWN = np.array([2.0, 0.5, 1.4])


def rounds(count: int, temperatures: NDArray[np.float64], seed: int = 0) -> tuple[NDArray, NDArray]:
    """Raw log-odds [N, γ] and accepted lengths of a drafter whose confidence is true once divided by `temperatures`."""
    rng = np.random.default_rng(seed)
    true = rng.normal(1.0, 1.5, (count, len(temperatures)))
    accepts = rng.random(true.shape) < 1 / (1 + np.exp(-true))
    return (true * temperatures).astype(np.float32), np.cumprod(accepts, axis=1).sum(axis=1)


def test_ece_is_the_weighted_gap_between_mean_probability_and_mean_label_of_each_bin() -> None:
    probabilities = np.array([0.02, 0.04, 0.61, 0.63, 0.62, 1.0])
    labels = np.array([0, 1, 1, 1, 0, 1])
    by_hand = 2 / 6 * abs(0.03 - 0.5) + 3 / 6 * abs(0.62 - 2 / 3) + 1 / 6 * 0.0
    assert ece(probabilities, labels, bins=20) == pytest.approx(by_hand, abs=1e-6)
    assert ece(probabilities, labels, bins=1) == pytest.approx(abs(probabilities.mean() - 4 / 6), abs=1e-6)


def test_chance_gives_a_calibrated_predictor_an_ece_and_debiasing_takes_it_away() -> None:
    raw, left = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        probabilities = rng.beta(2, 1, 1000)
        labels = rng.random(1000) < probabilities
        raw.append(ece(probabilities, labels))
        left.append(debiased_ece(probabilities, labels, replicates=100))
    assert np.mean(raw) > 0.02
    assert abs(np.mean(left)) < 3 * np.std(left) / np.sqrt(len(left)) + 0.001
    assert min(left) < 0 < max(left)


def test_debiasing_keeps_a_real_error() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.uniform(0.2, 1.0, 4000)
    labels = rng.random(4000) < probabilities - 0.15
    assert debiased_ece(probabilities, labels) == pytest.approx(0.15, abs=0.03)


def test_debiased_ece_is_the_same_in_every_call() -> None:
    rng = np.random.default_rng(0)
    probabilities, labels = rng.random(500), rng.random(500) < 0.5
    assert debiased_ece(probabilities, labels) == debiased_ece(probabilities, labels)
    assert debiased_ece(probabilities, labels) != debiased_ece(probabilities, labels, seed=1)


def test_the_temperatures_of_a_miscalibrated_drafter_are_recovered() -> None:
    log_odds, accepted = rounds(60_000, KNOWN)
    assert fit_temperatures(log_odds, accepted) == pytest.approx(KNOWN, rel=0.12)


def test_fitted_temperatures_calibrate_rounds_that_were_not_fitted_on() -> None:
    fitted = fit_temperatures(*rounds(60_000, KNOWN))
    log_odds, accepted = rounds(60_000, KNOWN, seed=1)
    labels = prefix_labels(log_odds, accepted)
    for slot in range(len(KNOWN)):
        raw = debiased_ece(survival(log_odds, np.ones(3))[:, slot], labels[:, slot])
        scaled = debiased_ece(survival(log_odds, fitted)[:, slot], labels[:, slot])
        assert raw > 0.02
        assert scaled < 0.005


def test_an_earlier_temperature_does_not_depend_on_later_slots() -> None:
    log_odds, accepted = rounds(5000, KNOWN)
    whole = fit_temperatures(log_odds, accepted)
    assert fit_temperatures(log_odds[:, :2], np.minimum(accepted, 2)) == pytest.approx(whole[:2], rel=0)


def test_slots_that_were_not_verified_have_no_say() -> None:
    log_odds, accepted = rounds(20_000, KNOWN)
    cut = log_odds.copy()
    cut[::2, 1:] = np.nan
    fitted = fit_temperatures(cut, np.where(np.arange(len(cut)) % 2, accepted, np.minimum(accepted, 1)))
    assert fitted == pytest.approx(KNOWN, rel=0.2)
    cut[:, 2] = np.nan
    assert (
        fit_temperatures(cut, np.where(np.arange(len(cut)) % 2, np.minimum(accepted, 2), np.minimum(accepted, 1)))[2]
        == 1
    )


def test_where_every_temperature_is_equally_good_it_stays_1() -> None:
    assert fit_temperatures(np.zeros((100, 2)), np.tile([0, 2], 50)).tolist() == [1.0, 1.0]


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"accepted: 3 in round 1, which verified 2 drafts"):
        fit_temperatures(np.array([[1.0, 1.0, 1.0], [1.0, 1.0, np.nan]]), np.array([3, 3]))
    with pytest.raises(ValueError, match="verified slot follows one that was not"):
        fit_temperatures(np.array([[1.0, np.nan, 1.0]]), np.array([0]))
    with pytest.raises(ValueError, match=r"\[N, γ\]"):
        fit_temperatures(np.zeros((4, 2)), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="n at least 1"):
        ece(np.zeros(0), np.zeros(0))
