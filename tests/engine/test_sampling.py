"""Logits processors act on each row of a verify block as if its drafts were output, and sampling is exact."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from chi_square import p_value
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dspark.engine import SamplingParams
from dspark.engine.noise import NoiseCache
from dspark.engine.sampling import Sampler, SampleRow, SamplingState, token_logprobs
from dspark.engine.verification import target_probabilities

VOCAB_SIZE = 12
PROMPT = [3, 3, 5]
STOPS = frozenset({0, 7})
NO_DRAFTS = np.empty(0, np.int64)


def make_state(key: int = 1, **params: Any) -> SamplingState:
    return SamplingState(SamplingParams(**params), key, np.array(PROMPT), STOPS, VOCAB_SIZE)


def random_logits(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0.0, 3.0, VOCAB_SIZE).astype(np.float32)


def naive(logits: NDArray[np.float32], params: SamplingParams, output: list[int]) -> list[float]:
    """One token at a time, as the parameters' definitions read."""
    counts = Counter(output)
    values = []
    for token, value in enumerate(logits.tolist()):
        value += params.logit_bias.get(token, 0.0)
        if token in STOPS and len(output) < params.min_tokens:
            value = -np.inf
        if token in counts or token in PROMPT:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * counts[token] + params.presence_penalty * (counts[token] > 0)
        values.append(value)
    return values


tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6)


@given(
    output=tokens,
    drafts=tokens,
    presence=st.sampled_from([0.0, 0.7, -2.0]),
    frequency=st.sampled_from([0.0, 0.3, -1.0]),
    repetition=st.sampled_from([1.0, 1.7, 0.6]),
    bias=st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.sampled_from([-100.0, -1.5, 2.0]), max_size=3),
    min_tokens=st.integers(0, 8),
)
@settings(max_examples=200, deadline=None)
def test_processed_logits_are_those_of_the_sequence_with_the_rows_drafts_appended(
    output: list[int],
    drafts: list[int],
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
    min_tokens: int,
) -> None:
    state = make_state(
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=bias,
        min_tokens=min_tokens,
    )
    state.append(output)
    logits = random_logits()
    state.process(logits, len(PROMPT) + len(output) + len(drafts), np.array(drafts, np.int64))
    np.testing.assert_allclose(logits, naive(random_logits(), state.params, output + drafts), rtol=1e-5, atol=1e-5)


@given(output=tokens, drafts=tokens)
@settings(max_examples=50, deadline=None)
def test_drafts_and_committed_tokens_give_the_same_bits_in_any_portions(output: list[int], drafts: list[int]) -> None:
    params = {"presence_penalty": 0.3, "frequency_penalty": 0.7, "repetition_penalty": 1.3}
    position = len(PROMPT) + len(output) + len(drafts)
    ahead, one_by_one = make_state(**params), make_state(**params)
    ahead.append(output)
    for token in output + drafts:
        one_by_one.append([token])
    first, second = random_logits(), random_logits()
    ahead.process(first, position, np.array(drafts, np.int64))
    one_by_one.process(second, position, NO_DRAFTS)
    assert first.tobytes() == second.tobytes()


def test_processing_a_row_leaves_no_trace_in_the_state() -> None:
    state = make_state(frequency_penalty=1.0)
    first, second = random_logits(), random_logits()
    state.process(first, 6, np.array([1, 2, 2]))
    state.process(second, 3, NO_DRAFTS)
    np.testing.assert_array_equal(second, random_logits())


def test_presence_and_frequency_count_output_only_and_repetition_the_prompt_too() -> None:
    state = make_state(presence_penalty=1.0, frequency_penalty=1.0)
    logits = np.ones(VOCAB_SIZE, np.float32)
    state.process(logits, 3, NO_DRAFTS)
    np.testing.assert_array_equal(logits, 1.0)
    state = make_state(repetition_penalty=2.0)
    state.process(logits, 3, NO_DRAFTS)
    assert np.flatnonzero(logits == 0.5).tolist() == sorted(set(PROMPT))


def test_the_smallest_penalty_leaves_forbidden_tokens_forbidden_and_others_finite() -> None:
    state = make_state(repetition_penalty=1e-300)
    logits = random_logits()
    logits[PROMPT[0]] = -np.inf
    with np.errstate(all="raise", under="ignore"):
        state.process(logits, 3, NO_DRAFTS)
    assert np.flatnonzero(~np.isfinite(logits)).tolist() == [PROMPT[0]]
    assert logits[PROMPT[0]] == -np.inf


# The sampler


def make_sampler() -> Sampler:
    return Sampler(torch.zeros(VOCAB_SIZE, 16), NoiseCache(VOCAB_SIZE))


def sample(states: list[SamplingState], logits: NDArray[np.float32], position: int = 3) -> list[int]:
    rows = [SampleRow(state, position, NO_DRAFTS) for state in states]
    return make_sampler().sample(torch.from_numpy(logits), torch.zeros(len(rows), 16), rows).tolist()


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.0, "logit_bias": {4: 50.0}},
    {"temperature": 1.3, "top_k": 3},
    {"temperature": 0.0, "min_tokens": 5},
    {"temperature": 0.7, "min_p": 0.1, "frequency_penalty": 1.0},
    {"temperature": 9e-6},
    {"temperature": 2.0},
]


def test_a_row_is_sampled_alike_alone_and_among_rows_of_every_kind() -> None:
    states = [make_state(key, **params) for key, params in enumerate(MIXED)]
    for seed in range(30):
        logits = np.stack([random_logits(100 * seed + row) for row in range(len(states))])
        alone = [sample([state], logits[row : row + 1])[0] for row, state in enumerate(states)]
        assert sample(states, logits) == alone


def test_greedy_takes_the_likeliest_processed_token_and_of_equals_the_lowest() -> None:
    logits = np.array([[0, 2, 5, 5, 1, 0, 0, 0, 0, 0, 0, 0]] * 3, np.float32)
    states = [
        make_state(temperature=0.0),
        make_state(temperature=0.0, logit_bias={2: -1.0}),
        make_state(temperature=0.0, logit_bias={9: 100.0}),
    ]
    assert sample(states, logits) == [2, 3, 9]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_p": 0.75},
        {"min_p": 0.1},
        {"top_k": 6, "top_p": 0.9, "temperature": 1.5, "logit_bias": {1: 3.0}, "repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_tokens_follow_the_processed_and_truncated_distribution(params: dict[str, Any]) -> None:
    count = 20_000
    states = [make_state(key, **params) for key in range(count)]
    logits = random_logits(3) * np.float32(0.4)
    drawn = np.bincount(sample(states, np.tile(logits, (count, 1))), minlength=VOCAB_SIZE)
    states[0].process(logits, 3, NO_DRAFTS)
    p = states[0].params
    assert p_value(drawn, target_probabilities(logits, p.temperature, p.top_k, p.top_p, p.min_p)) > 1e-3


# Grammar masks


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5, "top_k": 2},
        {"top_p": 0.75},
        {"min_p": 0.1, "logit_bias": {1: 3.0}, "frequency_penalty": 1.0},
        {"min_tokens": 4, "temperature": 1.5},
    ],
    ids=str,
)
def test_masked_tokens_follow_the_distribution_renormalised_over_what_is_allowed(params: dict[str, Any]) -> None:
    count = 20_000
    states = [make_state(key, **params) for key in range(count)]
    logits = random_logits(3) * np.float32(0.2)
    allowed = np.zeros(VOCAB_SIZE, np.bool_)
    allowed[[0, 1, 3, 4, 5, 6, 9]] = True  # 0 ends the text
    allowed[logits.argmax()] = False
    rows = [SampleRow(state, 3, NO_DRAFTS, allowed) for state in states]
    drawn = make_sampler().sample(torch.from_numpy(np.tile(logits, (count, 1))), torch.zeros(count, 16), rows)
    weights = np.where(allowed, logits, np.float32(-np.inf))
    states[0].process(weights, 3, NO_DRAFTS)
    p = states[0].params
    exact = target_probabilities(weights, p.temperature, p.top_k, p.top_p, p.min_p)
    assert exact[~allowed].sum() == 0.0
    assert p_value(np.bincount(drawn, minlength=VOCAB_SIZE), exact) > 1e-3


def test_where_the_text_may_only_end_it_ends_before_its_minimum_length() -> None:
    only_end = np.zeros(VOCAB_SIZE, np.bool_)
    only_end[7] = True
    for temperature in (0.0, 1.0):
        row = SampleRow(make_state(temperature=temperature, min_tokens=9), 3, NO_DRAFTS, only_end)
        assert make_sampler().sample(torch.from_numpy(random_logits()[None]), torch.zeros(1, 16), [row]).tolist() == [7]


def test_a_near_tie_far_below_the_forbidden_tokens_is_decided_in_fp32() -> None:
    """Tokens 1 and 2 are equal in bfloat16, and 100 below the forbidden token 0."""
    hidden = torch.zeros(1, 16, dtype=torch.bfloat16)
    hidden[0, :2] = 1.0
    head = torch.zeros(VOCAB_SIZE, 16, dtype=torch.bfloat16)
    head[0, 0] = 120.0
    head[1, :2] = torch.tensor([20.0, 0.01])
    head[2, :2] = torch.tensor([20.0, 0.02])
    logits = hidden @ head.T
    assert logits[0, 1] == logits[0, 2]
    allowed = np.zeros(VOCAB_SIZE, np.bool_)
    allowed[[1, 2]] = True
    row = SampleRow(make_state(temperature=0.0), 3, NO_DRAFTS, allowed)
    assert Sampler(head, NoiseCache(VOCAB_SIZE)).sample(logits, hidden, [row]).tolist() == [2]


def test_positions_and_keys_draw_independently() -> None:
    logits = np.zeros((200, VOCAB_SIZE), np.float32)
    states = [make_state(key) for key in range(200)]
    here, there = sample(states, logits, position=3), sample(states, logits, position=4)
    agree = np.mean(np.array(here) == np.array(there))
    assert agree < 0.2
    assert len(set(here)) == VOCAB_SIZE


# Log-probabilities


def test_logprobs_are_of_the_whole_distribution_with_the_chosen_token_whatever_its_rank() -> None:
    logits = np.array([1.0, 4.0, 3.0, 4.0, -2.0], np.float32)
    expected = torch.from_numpy(logits).double().log_softmax(0).tolist()
    one = token_logprobs(logits, 4, 3)
    assert (one.token_id, one.logprob) == (4, pytest.approx(expected[4]))
    assert [token for token, _ in one.top] == [1, 3, 2]
    assert [value for _, value in one.top] == pytest.approx([expected[1], expected[3], expected[2]])
    assert token_logprobs(logits, 0, 0).top == ()
