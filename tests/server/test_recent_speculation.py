"""The two gauges that stand for a moving window: speed-up of the last minute, calibration error of the last 10,000 drafts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from dspark.server.recent_speculation import CALIBRATION_WINDOW_TOKENS, RecentCalibration, RecentSpeedup

BINS = 10
CENTRES = (np.arange(BINS) + 0.5) / BINS


def add(
    recent: RecentCalibration, tokens: int, rng: np.random.Generator, wrong_by: float = 0.0, step: int = 50
) -> None:
    """Judge so many drafts, in steps of `step`: each accepted with its confidence, or `wrong_by` less often."""
    for _ in range(tokens // step):
        bins = rng.integers(0, BINS, step)
        accepted = rng.random(step) < CENTRES[bins] - wrong_by
        recent.add(
            np.bincount(bins, minlength=BINS).tolist(),
            np.bincount(bins, accepted, minlength=BINS).astype(int).tolist(),
            np.bincount(bins, CENTRES[bins], minlength=BINS).tolist(),
        )


def test_speedup_is_plain_time_over_time_taken() -> None:
    recent = RecentSpeedup()
    recent.add(100.0, decode_s=0.25, plain_s=0.5)
    recent.add(100.5, decode_s=0.25, plain_s=0.25)
    recent.add(101.0, decode_s=0.5, plain_s=0.25)
    assert recent.ratio(102.0) == 1.0


def test_speedup_forgets_after_a_minute_and_says_nothing_of_nothing() -> None:
    recent = RecentSpeedup()
    assert math.isnan(recent.ratio(1.0))
    recent.add(100.0, decode_s=1.0, plain_s=3.0)
    recent.add(130.0, decode_s=1.0, plain_s=1.0)
    assert recent.ratio(159.0) == 2.0
    assert recent.ratio(161.0) == 1.0
    assert math.isnan(recent.ratio(200.0))


def test_nothing_judged_has_no_calibration_error() -> None:
    assert math.isnan(RecentCalibration().error())


@pytest.mark.parametrize("tokens", [200, 2000, 10_000])
def test_confidences_that_hold_show_no_error_on_average_however_few_drafts_were_judged(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    errors = []
    for _ in range(40):
        recent = RecentCalibration()
        add(recent, tokens, rng)
        errors.append(recent.error())
    raw_error_of_chance = 0.3 * math.sqrt(BINS / tokens)
    assert min(errors) < 0 < max(errors)
    assert abs(np.mean(errors)) < 0.15 * raw_error_of_chance


def test_confidences_that_are_too_high_show_by_how_much() -> None:
    recent = RecentCalibration()
    add(recent, CALIBRATION_WINDOW_TOKENS, np.random.default_rng(1), wrong_by=0.05)
    assert recent.error() == pytest.approx(0.05, abs=0.02)


def test_only_the_last_ten_thousand_count() -> None:
    recent = RecentCalibration()
    rng = np.random.default_rng(2)
    add(recent, 5_000, rng, wrong_by=0.05)
    wrong = recent.error()
    add(recent, CALIBRATION_WINDOW_TOKENS, rng)
    assert abs(recent.error()) < 0.01 < wrong


@pytest.mark.parametrize("n", [1, 2, 7, 100])
@pytest.mark.parametrize("p", [0.01, 0.25, 0.5, 0.95])
def test_what_chance_shows_is_the_mean_deviation_of_a_binomial(n: int, p: float) -> None:
    """One bin of n drafts with confidence p, none accepted: off by n p, less the part for chance."""
    recent = RecentCalibration()
    recent.add([n], [0], [n * p])
    outcomes = np.arange(n + 1)
    mean_deviation = float((np.abs(outcomes - n * p) * binom.pmf(outcomes, n, p)).sum())
    assert recent.error() == pytest.approx((n * p - mean_deviation) / n)
