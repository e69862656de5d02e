"""From raw confidence to survival: what the online fit promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dspark.engine.calibration import BIAS_LIMITS, SLOPE_LIMITS, Calibration

GAMMA = 7


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def _teach(
    calibration: Calibration,
    rounds: int,
    slope: np.ndarray,
    bias: np.ndarray,
    seed: int = 0,
    verified: int = GAMMA,
    by_survival: bool = False,
) -> None:
    """Rounds of 8 sequences, half of them sampled, whose drafts obey slope and bias [2, γ]."""
    rng = np.random.default_rng(seed)
    sampled = np.arange(8) % 2 == 1
    kind = sampled.astype(int)
    for _ in range(rounds):
        confidence = rng.normal(1.0, 1.5, (8, GAMMA)).astype(np.float32)
        hit = rng.random((8, GAMMA)) < _sigmoid(slope[kind] * confidence + bias[kind])
        run = np.cumprod(hit, axis=1).sum(axis=1)
        lengths = np.full(8, verified)
        if by_survival:
            lengths = (calibration.survival(confidence, sampled) > 0.4).sum(axis=1)
        accepted = np.minimum(run, lengths)
        calibration.observe(confidence, sampled, lengths.astype(np.int32), accepted.astype(np.int32))


def _expected_error(calibration: Calibration, slope: np.ndarray, bias: np.ndarray, where: slice = slice(None)) -> float:
    """Mean |predicted - true| conditional acceptance of a slot, over fresh confidences."""
    rng = np.random.default_rng(99)
    confidence = rng.normal(1.0, 1.5, (400, GAMMA)).astype(np.float32)
    table = calibration.table()
    errors = [
        np.abs(_sigmoid(table.slope[k] * confidence + table.bias[k]) - _sigmoid(slope[k] * confidence + bias[k]))
        for k in (0, 1)
    ]
    return float(np.mean([error[:, where] for error in errors]))


def test_starts_as_the_identity_or_as_the_stored_temperatures() -> None:
    confidence = np.array([[2.0, 1.0, 0.0]], np.float32)
    greedy = np.array([False])
    np.testing.assert_allclose(
        Calibration(3).survival(confidence, greedy)[0], np.cumprod(_sigmoid(np.array([2.0, 1.0, 0.0]))), rtol=1e-5
    )
    np.testing.assert_allclose(
        Calibration(3, [2.0, 0.5, 1.0]).survival(confidence, greedy)[0],
        np.cumprod(_sigmoid(np.array([1.0, 2.0, 0.0]))),
        rtol=1e-5,
    )


def test_greedy_and_sampled_may_start_with_temperatures_of_their_own() -> None:
    confidence = np.array([[2.0, 1.0]] * 2, np.float32)
    survival = Calibration(2, [[2.0, 0.5], [1.0, 4.0]], sources=2).survival(confidence, np.array([False, True]))
    np.testing.assert_allclose(survival[0], np.cumprod(_sigmoid(np.array([1.0, 2.0]))), rtol=1e-5)
    np.testing.assert_allclose(survival[1], np.cumprod(_sigmoid(np.array([2.0, 0.25]))), rtol=1e-5)


@pytest.mark.parametrize(
    "temperatures",
    [[1.0], [1.0, 0.0, 1.0], [1.0, float("nan"), 1.0], [[1.0] * 3], [[1.0] * 3] * 3, [[1.0] * 3, [1.0, -1.0, 1.0]]],
)
def test_refuses_temperatures_that_cannot_be(temperatures: list[float] | list[list[float]]) -> None:
    with pytest.raises(ValueError, match="temperatures"):
        Calibration(3, temperatures)


def test_converges_to_a_known_logistic_per_kind_and_position() -> None:
    slope = np.stack([np.linspace(0.5, 1.2, GAMMA), np.full(GAMMA, 0.7)])
    bias = np.stack([np.linspace(0.5, -0.5, GAMMA), np.full(GAMMA, 0.8)])
    calibration = Calibration(GAMMA)
    before = _expected_error(calibration, slope, bias, slice(0, 4))
    _teach(calibration, 1500, slope, bias)
    after = _expected_error(calibration, slope, bias, slice(0, 4))
    assert before > 0.07
    assert after < 0.03


def test_choosing_lengths_by_survival_does_not_bias_it() -> None:
    slope, bias = np.full((2, GAMMA), 0.6), np.full((2, GAMMA), 0.4)
    calibration = Calibration(GAMMA)
    _teach(calibration, 1500, slope, bias, by_survival=True)
    assert _expected_error(calibration, slope, bias, slice(0, 2)) < 0.03


def test_thin_data_stay_near_the_pooled_value() -> None:
    calibration = Calibration(GAMMA)
    slope, bias = np.ones((2, GAMMA)), np.full((2, GAMMA), -0.8)
    _teach(calibration, 400, slope, bias, verified=2)
    table = calibration.table()
    # positions 2.. were never verified: they follow what was learned of all, not the identity
    assert (table.bias[:, 2:] < -0.4).all()
    calibration.observe(
        np.full((1, GAMMA), 3.0, np.float32), np.array([False]), np.array([3], np.int32), np.array([2], np.int32)
    )
    assert np.abs(calibration.table().bias[0, 2] - table.bias[0, 2]) < 0.3


def test_constant_log_odds_become_the_acceptance_rate_of_each_position() -> None:
    calibration = Calibration(GAMMA)
    rates = np.array([0.8, 0.6, 0.5, 0.4, 0.4, 0.3, 0.3])
    rng = np.random.default_rng(0)
    confidence, greedy = np.zeros((8, GAMMA), np.float32), np.zeros(8, bool)
    for _ in range(600):
        run = np.cumprod(rng.random((8, GAMMA)) < rates, axis=1).sum(axis=1).astype(np.int32)
        calibration.observe(confidence, greedy, np.full(8, GAMMA, np.int32), run)
    survival = calibration.survival(confidence[:1], greedy[:1])[0]
    np.testing.assert_allclose(survival, np.cumprod(rates), atol=0.05)


def test_only_drafts_whose_predecessors_were_accepted_are_labels() -> None:
    calibration = Calibration(3)
    confidence, greedy = np.zeros((1, 3), np.float32), np.array([False])
    for _ in range(50):
        calibration.observe(confidence, greedy, np.array([3], np.int32), np.array([0], np.int32))
    table = calibration.table()
    assert table.bias[0, 0] < -1.0
    # the others know no more than what all positions have in common
    np.testing.assert_array_equal(table.bias[0, 1:], table.bias[1, :2])


def test_what_one_source_of_drafts_does_teaches_little_about_another() -> None:
    calibration = Calibration(2, [2.0, 2.0], sources=2)
    confidence, greedy = np.zeros((2, 2), np.float32), np.array([False, False])
    source = np.array([0, 1], np.int8)
    for _ in range(200):
        calibration.observe(confidence, greedy, np.full(2, 2, np.int32), np.array([2, 0], np.int32), source)
    trusted, doubted = calibration.survival(confidence, greedy, source)
    assert trusted[0] > 0.9
    assert doubted[0] < 0.2
    slope = calibration.table().slope
    assert slope[0, 0] == pytest.approx(slope[2, 0] / 2, rel=0.2), "stored temperatures are the first source's"


def test_a_step_that_verified_nothing_teaches_nothing() -> None:
    calibration = Calibration(3)
    before = calibration.table()
    nothing = np.zeros(2, np.int32)
    calibration.observe(np.ones((2, 3), np.float32), np.array([False, True]), nothing, nothing)
    np.testing.assert_array_equal(calibration.table().slope, before.slope)
    np.testing.assert_array_equal(calibration.table().bias, before.bias)


def test_follows_a_change_of_behaviour() -> None:
    calibration = Calibration(GAMMA)
    good, bad = np.full((2, GAMMA), 1.5), np.full((2, GAMMA), -1.5)
    _teach(calibration, 500, np.ones((2, GAMMA)), good)
    _teach(calibration, 800, np.ones((2, GAMMA)), bad, seed=1)
    assert _expected_error(calibration, np.ones((2, GAMMA)), bad, slice(0, 2)) < 0.06


@settings(max_examples=60, deadline=None)
@given(
    confidence=hnp.arrays(np.float32, (4, 5), elements=st.floats(-1e6, 1e6, width=32)),
    sampled=hnp.arrays(np.bool_, 4),
    verified=hnp.arrays(np.int32, 4, elements=st.integers(0, 5)),
    share=hnp.arrays(np.float64, 4, elements=st.floats(0, 1)),
    rounds=st.integers(1, 30),
)
def test_whatever_it_sees_it_stays_bounded_and_survival_never_rises(
    confidence: np.ndarray, sampled: np.ndarray, verified: np.ndarray, share: np.ndarray, rounds: int
) -> None:
    calibration = Calibration(5)
    for _ in range(rounds):
        calibration.observe(confidence, sampled, verified, (verified * share).astype(np.int32))
    table = calibration.table()
    assert (table.slope >= SLOPE_LIMITS[0] - 1e-6).all()
    assert (table.slope <= SLOPE_LIMITS[1] + 1e-6).all()
    assert (table.bias >= BIAS_LIMITS[0] - 1e-6).all()
    assert (table.bias <= BIAS_LIMITS[1] + 1e-6).all()
    survival = table.survival(confidence, sampled)
    assert survival.dtype == np.float32
    assert (survival > 0).all()
    assert (survival < 1).all()
    assert (np.diff(survival, axis=1) <= 0).all()


def test_a_table_is_a_picture_that_later_learning_does_not_touch() -> None:
    calibration = Calibration(GAMMA)
    table = calibration.table()
    before = table.bias.copy()
    _teach(calibration, 20, np.ones((2, GAMMA)), np.full((2, GAMMA), -2.0))
    np.testing.assert_array_equal(table.bias, before)
    assert not table.bias.flags.writeable
    assert (calibration.table().bias < before).any()
