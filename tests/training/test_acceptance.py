"""What the numbers of an evaluation mean, on rounds whose outcome is known."""

from __future__ import annotations

import numpy as np
import pytest
from random_rounds import random_rounds, some_rounds

from dspark.engine.calibration import Calibration
from dspark.training.acceptance import (
    accepted_length,
    accepted_length_interval,
    compare_with_position_only,
    conditional_acceptance,
    cut_at_survival,
    cut_to,
    judged_log_odds,
    survival_by,
)


def test_a_round_gives_its_accepted_drafts_and_one_token_more() -> None:
    assert accepted_length(some_rounds([0, 1, 3])) == pytest.approx((1 + 2 + 4) / 3)


def test_an_accepted_end_of_text_brings_no_token_more() -> None:
    assert accepted_length(some_rounds([2, 2], left=[2, 3])) == pytest.approx((2 + 3) / 2)


def test_acceptance_of_a_slot_counts_the_rounds_that_came_so_far() -> None:
    rates = conditional_acceptance(some_rounds([0, 1, 1, 3]))
    np.testing.assert_allclose(rates, [3 / 4, 1 / 3, 1 / 1])


def test_slots_that_were_not_verified_or_lie_behind_the_end_do_not_count() -> None:
    cut_short = some_rounds([1, 3], verified=[1, 3])
    np.testing.assert_allclose(conditional_acceptance(cut_short), [1, 1, 1])
    ended = some_rounds([1, 3], left=[1, 9])
    np.testing.assert_allclose(conditional_acceptance(ended), [1, 1, 1])
    np.testing.assert_array_equal(np.isnan(judged_log_odds(ended)), [[False, True, True], [False, False, False]])


def test_a_slot_that_no_round_came_to_has_no_rate() -> None:
    rates = conditional_acceptance(some_rounds([0, 0]))
    assert rates[0] == 0
    assert np.isnan(rates[1:]).all()


def test_the_interval_is_the_same_at_every_call_and_holds_the_mean() -> None:
    rounds = random_rounds(answers=50, rounds=10, log_odds_spread=1.0)
    low, high = accepted_length_interval(rounds)
    assert low < accepted_length(rounds) < high
    assert (low, high) == accepted_length_interval(rounds)


def test_the_interval_is_over_answers_not_over_rounds() -> None:
    # within an answer all rounds are alike, so 100 rounds of each tell no more than one
    alike = [0] * 10 + [3] * 10
    one_each = some_rounds(alike)
    hundred_each = one_each.where(np.repeat(np.arange(20), 100))
    assert accepted_length_interval(hundred_each) == pytest.approx(accepted_length_interval(one_each))
    shuffled_answers = some_rounds(alike * 100, answer=np.random.default_rng(0).permutation(np.arange(2000) % 20))
    low, high = accepted_length_interval(shuffled_answers)
    wide_low, wide_high = accepted_length_interval(hundred_each)
    assert high - low < 0.5 * (wide_high - wide_low)


def test_cut_drafts_are_neither_verified_nor_accepted() -> None:
    cut = cut_to(some_rounds([0, 1, 3, 3], verified=[3, 3, 3, 3], left=[9, 9, 9, 2]), 2)
    assert cut.verified == 2
    assert cut.accepted_share == pytest.approx((0 + 1 + 2 + 2) / 8)
    assert cut.accepted_length == pytest.approx((1 + 2 + 3 + 2) / 4)


def test_a_threshold_keeps_the_drafts_that_are_likely_enough() -> None:
    rounds = some_rounds([3, 0], survival=[[0.9, 0.5, 0.4], [0.3, 0.2, 0.1]])
    cut = cut_at_survival(rounds, 0.5)
    assert (cut.verified, cut.accepted_share, cut.accepted_length) == (1, 1, (3 + 1) / 2)
    assert cut_at_survival(rounds, 0.0).verified == 3
    assert np.isnan(cut_at_survival(rounds, 0.95).accepted_share)


def test_survival_is_that_of_each_rounds_own_source() -> None:
    rounds = some_rounds([0, 0], confidence=[[2.0, 2.0, 2.0]] * 2, source=[0, 1])
    sigma = 1 / (1 + np.exp(-np.array([[1.0, 2.0, 0.5], [2.0, 2.0, 2.0]])))
    found = survival_by(Calibration(3, [2.0, 1.0, 4.0], sources=2), rounds)
    np.testing.assert_allclose(found, np.cumprod(sigma, axis=1), rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_confidence_that_knows_beats_the_position_by_every_measure(temperature: float) -> None:
    rounds = random_rounds(answers=60, rounds=40, log_odds_spread=1.5, temperature=temperature)
    confidence, position = compare_with_position_only(rounds, Calibration(rounds.block_size))
    assert confidence.bin_error < 0.5 * position.bin_error
    assert confidence.answer_error < position.answer_error
    assert confidence.log_loss < position.log_loss - 0.05
    assert confidence.brier < position.brier - 0.02


def test_a_confidence_that_says_nothing_does_not() -> None:
    rounds = random_rounds(answers=60, rounds=40, log_odds_spread=1.5)
    shuffled = rounds.confidence[np.random.default_rng(1).permutation(len(rounds))]
    blind = some_rounds(rounds.accepted.tolist(), 4, answer=rounds.answer, confidence=shuffled)
    confidence, position = compare_with_position_only(blind, Calibration(4))
    assert confidence.log_loss == pytest.approx(position.log_loss, abs=0.01)
    assert confidence.log_loss >= position.log_loss - 0.001


def test_nothing_is_fitted_on_the_answers_that_it_is_tested_on() -> None:
    # drafts of every second answer are all right, of the others all wrong: knowing the other half misleads
    rounds = some_rounds([3, 0] * 200)
    _, position = compare_with_position_only(rounds, Calibration(rounds.block_size))
    assert position.brier > 0.5  # worse than a coin, 0.25


def test_a_comparison_needs_two_answers_of_one_kind_of_sampling() -> None:
    with pytest.raises(ValueError, match="1 answers; two or more are needed"):
        compare_with_position_only(some_rounds([1]), Calibration(3))
    with pytest.raises(ValueError, match="all greedy or all sampled"):
        compare_with_position_only(some_rounds([1, 1], temperature=[0, 1]), Calibration(3))


def test_chosen_rounds_keep_every_field() -> None:
    rounds = random_rounds(answers=3, rounds=2, log_odds_spread=1.0)
    own = rounds.where(rounds.answer == 1)
    assert len(own) == 2
    np.testing.assert_array_equal(own.confidence, rounds.confidence[2:4])
    assert set(own.kind.tolist()) == {"odd"}
