"""Drafting from a request's prediction: followed from its start, found again after a change, left when it misleads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.engine.drafters.drafter import NO_TOKENS, DraftRow
from dspark.engine.drafters.prediction import MOST_COMPARED, TRUST_AT_START, PredictionDrafter

GAMMA = 4
PROMPT = [900, 901, 902]
TEXT = list(range(100, 160))


def row(output: Sequence[int], predicted: Sequence[int] = TEXT) -> DraftRow:
    tokens = np.array([*PROMPT, *output], np.int64)
    return DraftRow(
        sequence_id=1,
        tokens=tokens,
        position=len(tokens) - 1,
        temperature=0.0,
        noise_key=0,
        block_table=np.zeros(0, np.int32),
        prompt_length=len(PROMPT),
        predicted=np.array(predicted, np.int64),
    )


def proposals(output: Sequence[int], predicted: Sequence[int] = TEXT) -> list[list[int]]:
    """What is proposed after each token of `output`, which comes one token at a time."""
    drafter = PredictionDrafter(GAMMA)
    found = []
    for length in range(1, len(output) + 1):
        draft = drafter.propose([row(output[:length], predicted)])
        found.append(draft.tokens[0, : draft.lengths[0]].tolist())
    return found


def test_a_right_prediction_is_proposed_from_its_start_to_its_end() -> None:
    found = proposals(TEXT)
    assert found == [TEXT[i + 1 : i + 1 + GAMMA] for i in range(len(TEXT))]
    assert found[-1] == []


def test_blocks_of_any_length_may_have_been_accepted() -> None:
    drafter = PredictionDrafter(GAMMA)
    for length in (1, 4, 5, 9, 14):
        draft = drafter.propose([row(TEXT[:length])])
        assert draft.tokens[0].tolist() == TEXT[length : length + GAMMA]


def test_confidence_grows_with_the_tokens_that_agreed() -> None:
    drafter = PredictionDrafter(GAMMA)
    odds = [float(np.exp(drafter.propose([row(TEXT[:length])]).confidence[0, 0])) for length in (1, 2, 30)]
    assert odds == pytest.approx([TRUST_AT_START + 2, TRUST_AT_START + 3, TRUST_AT_START + 31])


@pytest.mark.parametrize(
    ("output", "resumes"),
    [
        ([*TEXT[:20], 7, *TEXT[21:30]], TEXT[23:27]),  # a token replaced
        ([*TEXT[:20], 7, 8, 9, *TEXT[20:30]], TEXT[22:26]),  # three inserted
        ([*TEXT[:20], *TEXT[30:40]], TEXT[32:36]),  # ten left out
    ],
)
def test_after_a_change_the_place_is_found_once_two_tokens_agree(output: list[int], resumes: list[int]) -> None:
    found = proposals(output)
    assert next(block for block in found[20:] if block) == resumes
    assert found[-1] == TEXT[TEXT.index(output[-1]) + 1 :][:GAMMA]


def test_within_a_block_that_partly_came_true_one_token_is_enough() -> None:
    drafter = PredictionDrafter(GAMMA)
    drafter.propose([row(TEXT[:10])])
    output = [*TEXT[:12], 7]
    assert drafter.propose([row(output)]).lengths[0] == 0
    output.append(TEXT[20])
    assert drafter.propose([row(output)]).tokens[0].tolist() == TEXT[21:25]


def test_of_equal_places_the_next_one_behind_the_change_is_taken() -> None:
    predicted = [1, 2, 3, 50, 51, 52, 53, 50, 61, 62, 63, 50, 71, 72]
    drafter = PredictionDrafter(GAMMA)
    output = [1, 2, 3, 50, 51, 52, 99, 50]
    drafter.propose([row(output[:3], predicted)])
    drafter.propose([row(output[:7], predicted)])
    assert drafter.propose([row(output, predicted)]).tokens[0].tolist() == [61, 62, 63, 50]


def test_the_longest_agreement_decides_before_the_place() -> None:
    predicted = [1, 2, 50, 51, 52, 53, 9, 51, 77, 78]
    output = [1, 2, 60, 50, 51]
    assert proposals(output, predicted)[-1] == [52, 53, 9, 51]


def test_a_prediction_that_misleads_is_listened_to_less_and_less() -> None:
    rng = np.random.default_rng(0)
    predicted, output = rng.integers(0, 10, 300).tolist(), rng.integers(0, 10, 300).tolist()
    blocks = [bool(found) for found in proposals(output, predicted)]
    assert blocks[0] or blocks[1]
    assert sum(blocks) < 25
    assert sum(blocks[150:]) < sum(blocks[:150])


def test_one_that_misled_for_long_is_believed_again_once_enough_agrees() -> None:
    rng = np.random.default_rng(0)
    predicted, noise = rng.integers(0, 10, 300).tolist(), rng.integers(0, 10, 300).tolist()
    found = proposals([*noise, *predicted[:MOST_COMPARED], *predicted[MOST_COMPARED:]], predicted)
    assert found[len(noise) + MOST_COMPARED :] == [
        predicted[i + 1 : i + 1 + GAMMA] for i in range(MOST_COMPARED, len(predicted))
    ]


def test_a_sequence_that_starts_again_is_followed_again() -> None:
    drafter = PredictionDrafter(GAMMA)
    drafter.propose([row(TEXT[:30])])
    again = drafter.propose([row(TEXT[:10])])
    assert again.tokens[0].tolist() == TEXT[10:14]
    drafter.forget(1)
    drafter.forget(1)
    assert drafter.propose([row(TEXT[:20])]).tokens[0].tolist() == TEXT[20:24]


def test_rows_without_a_prediction_get_nothing() -> None:
    drafter = PredictionDrafter(GAMMA)
    draft = drafter.propose([row(TEXT[:5], NO_TOKENS.tolist()), row(TEXT[:5])])
    assert draft.lengths.tolist() == [0, GAMMA]
    assert drafter.propose([]).tokens.shape == (0, GAMMA)


@given(
    output=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    predicted=st.lists(st.integers(0, 3), min_size=1, max_size=20),
)
@settings(max_examples=200, deadline=None)
def test_every_proposal_is_a_piece_of_the_prediction_behind_the_outputs_last_token(
    output: list[int], predicted: list[int]
) -> None:
    for length, found in enumerate(proposals(output, predicted), 1):
        if found:
            places = [
                i + 1
                for i, token in enumerate(predicted)
                if token == output[length - 1] and predicted[i + 1 : i + 1 + GAMMA] == found
            ]
            # at the very start the client's word counts, whatever came first
            assert places
