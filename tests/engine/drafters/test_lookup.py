"""The lookup drafter: what follows the newest earlier occurrence of the last tokens is proposed again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.engine.drafters.drafter import DraftRow
from dspark.engine.drafters.lookup import LOG_ODDS_BY_MATCH, LookupDrafter

BLOCK_SIZE = 4


def row(tokens: list[int], sequence_id: int = 1) -> DraftRow:
    return DraftRow(
        sequence_id=sequence_id,
        tokens=np.array(tokens, np.int64),
        position=len(tokens) - 1,
        temperature=0.0,
        noise_key=0,
        block_table=np.zeros(0, np.int32),
    )


def proposal(drafter: LookupDrafter, tokens: list[int], sequence_id: int = 1) -> list[int]:
    draft = drafter.propose([row(tokens, sequence_id)])
    return draft.tokens[0, : draft.lengths[0]].tolist()


def brute_force(tokens: list[int]) -> tuple[list[int], int]:
    """Proposal and match length, by searching the whole text for its last 5, 4, … 1 tokens."""
    for n in (5, 4, 3, 2, 1):
        if n > len(tokens):
            continue
        for end in range(len(tokens) - 2, n - 2, -1):
            if tokens[end - n + 1 : end + 1] == tokens[-n:]:
                text = list(tokens)
                for _ in range(BLOCK_SIZE):
                    end += 1
                    text.append(text[end])
                return text[len(tokens) :], n
    return [], 0


@pytest.fixture
def drafter() -> LookupDrafter:
    return LookupDrafter(BLOCK_SIZE)


def test_the_continuation_of_a_repeated_phrase_is_proposed(drafter: LookupDrafter) -> None:
    assert proposal(drafter, [5, 6, 7, 8, 9, 10, 11, 1, 5, 6, 7]) == [8, 9, 10, 11]


def test_a_longer_match_beats_a_newer_shorter_one(drafter: LookupDrafter) -> None:
    assert proposal(drafter, [5, 6, 7, 20, 20, 20, 20, 7, 30, 30, 5, 6, 7])[0] == 20


def test_the_newest_of_equal_matches_wins(drafter: LookupDrafter) -> None:
    assert proposal(drafter, [5, 6, 20, 21, 5, 6, 30, 31, 9, 5, 6])[:2] == [30, 31]


def test_a_match_that_reaches_the_end_is_continued_as_a_period(drafter: LookupDrafter) -> None:
    assert proposal(drafter, [9, 1, 2, 1, 2]) == [1, 2, 1, 2]


@pytest.mark.parametrize("tokens", [[3], [1, 2, 3, 4]], ids=["one token", "no token twice"])
def test_nothing_is_proposed_where_the_last_token_is_new(drafter: LookupDrafter, tokens: list[int]) -> None:
    assert drafter.propose([row(tokens)]).lengths.tolist() == [0]


def test_confidence_grows_with_the_length_of_the_match(drafter: LookupDrafter) -> None:
    phrase = [1, 2, 3, 4, 5, 6]
    draft = drafter.propose([row([9, *phrase, 0, *phrase[6 - n :]], n) for n in (1, 2, 3, 4, 5)])
    expected = np.repeat(np.float32(LOG_ODDS_BY_MATCH)[:, None], BLOCK_SIZE, axis=1)
    np.testing.assert_array_equal(draft.confidence, expected)
    assert list(LOG_ODDS_BY_MATCH) == sorted(LOG_ODDS_BY_MATCH)


def test_sequences_do_not_see_each_others_text(drafter: LookupDrafter) -> None:
    proposal(drafter, [1, 2, 3, 4, 1], sequence_id=1)
    assert proposal(drafter, [7, 8, 1], sequence_id=2) == []


def test_a_forgotten_id_may_be_used_for_another_text(drafter: LookupDrafter) -> None:
    proposal(drafter, [1, 2, 3, 4])
    drafter.forget(1)
    assert proposal(drafter, [9, 9, 9, 9, 9, 1]) == []


def test_forgetting_an_unknown_sequence_does_nothing(drafter: LookupDrafter) -> None:
    drafter.forget(99)


def test_no_context_memory_is_asked_for(drafter: LookupDrafter) -> None:
    assert drafter.bytes_per_block(16) == 0
    assert drafter.feature_layers == ()


def test_an_empty_batch_gives_an_empty_draft(drafter: LookupDrafter) -> None:
    assert drafter.propose([]).tokens.shape == (0, BLOCK_SIZE)


texts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


@given(text=texts, steps=st.lists(st.integers(1, 7), max_size=10))
def test_the_incremental_index_equals_a_search_of_the_whole_text(text: list[int], steps: list[int]) -> None:
    drafter = LookupDrafter(BLOCK_SIZE)
    ends = [min(int(e), len(text)) for e in np.cumsum([1, *steps])] + [len(text)]
    for end in ends:
        expected, matched = brute_force(text[:end])
        draft = drafter.propose([row(text[:end])])
        assert draft.tokens[0, : draft.lengths[0]].tolist() == expected
        if matched:
            assert draft.confidence[0, 0] == np.float32(LOG_ODDS_BY_MATCH[matched - 1])


@given(text=texts, kept=st.integers(1, 40), other=texts)
def test_a_preempted_sequence_that_comes_back_shorter_is_indexed_afresh(
    text: list[int], kept: int, other: list[int]
) -> None:
    drafter = LookupDrafter(BLOCK_SIZE)
    proposal(drafter, text)
    shorter = text[: min(kept, len(text))]
    assert proposal(drafter, shorter) == brute_force(shorter)[0]
    longer = shorter + other
    assert proposal(drafter, longer) == brute_force(longer)[0]
