"""Both verifications give the target's distribution; rejection does so only if draft lengths do not look ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from chi_square import p_value
from numpy.typing import NDArray

from dspark.engine import SamplingParams
from dspark.engine.noise import NoiseCache, Stream
from dspark.engine.sampling import Sampler, SampleRow, SamplingState
from dspark.engine.verification import accept_coupled, accept_rejection, target_probabilities
from dspark.kernels.gumbel_noise import gumbel_noise

Policy = Callable[[int], int]
"""Draft length 0..2, knowing the first drafted token. A policy that looks ahead lets it decide whether it is verified."""

ANCHOR = 0
SEQUENCES = 8_000


@dataclass
class Chain:
    """A target and a drafter whose next token depends on the last one: target, draft: logits [V, V] by last token."""

    target: NDArray[np.float32]
    draft: NDArray[np.float32]
    params: SamplingParams = field(default_factory=SamplingParams)

    @property
    def vocab(self) -> int:
        return len(self.target)

    def p(self, last: int) -> NDArray[np.float64]:
        params = self.params
        return target_probabilities(self.target[last], params.temperature, params.top_k, params.top_p, params.min_p)

    def q(self, last: int) -> NDArray[np.float64]:
        weights = np.exp(self.draft[last].astype(np.float64))
        return weights / weights.sum()

    def exact(self) -> NDArray[np.float64]:
        """P(first two tokens) of plain sampling, [V, V]."""
        return np.stack([self.p(ANCHOR)[first] * self.p(first) for first in range(self.vocab)])


def random_chain(vocab: int, params: SamplingParams, seed: int = 0) -> Chain:
    rng = np.random.default_rng(seed)
    target = rng.normal(0.0, 1.5, (vocab, vocab)).astype(np.float32)
    return Chain(target, target + rng.normal(0.0, 1.0, target.shape).astype(np.float32), params)


def draft_two(chain: Chain, stream: Stream) -> NDArray[np.int64]:
    """Two drafted tokens of every sequence, [SEQUENCES, 2]; keys are the sequences' numbers."""
    keys = np.arange(SEQUENCES, dtype=np.uint64)
    drafts = np.empty((SEQUENCES, 2), np.int64)
    last = np.full(SEQUENCES, ANCHOR)
    for slot in range(2):
        positions = np.full(SEQUENCES, 1 + slot)
        noise = gumbel_noise(keys, positions, np.zeros(SEQUENCES, np.int64), chain.vocab, stream)
        last = drafts[:, slot] = (chain.draft[last] + noise).argmax(axis=1)
    return drafts


def coupled_pairs(chain: Chain, policy: Policy) -> NDArray[np.int64]:
    """How often each pair of first tokens was emitted under coupled verification, [V, V]."""
    sampler = Sampler(torch.zeros(chain.vocab, 16), NoiseCache(chain.vocab))

    def state(key: int) -> SamplingState:
        return SamplingState(chain.params, key, np.array([ANCHOR]), frozenset(), chain.vocab)

    def sample(contexts: list[int], rows: list[SampleRow]) -> NDArray[np.int64]:
        return sampler.sample(torch.from_numpy(chain.target[contexts]), torch.zeros(len(rows), 16), rows)

    contexts: list[int] = []
    rows: list[SampleRow] = []
    drafts = draft_two(chain, Stream.COUPLED)
    for key, pair in enumerate(drafts):
        length, one = policy(int(pair[0])), state(key)
        contexts += [ANCHOR, *pair[:length].tolist()]
        rows += [SampleRow(one, 1 + j, pair[:j]) for j in range(length + 1)]
    tokens = sample(contexts, rows)
    counts = np.zeros((chain.vocab, chain.vocab), np.int64)
    unfinished: list[tuple[int, int]] = []
    start = 0
    for key, pair in enumerate(drafts):
        length = policy(int(pair[0]))
        block = tokens[start : start + length + 1]
        start += length + 1
        accepted = accept_coupled(pair[:length], block)
        emitted = [*pair[:accepted].tolist(), int(block[accepted])]
        if len(emitted) > 1:
            counts[emitted[0], emitted[1]] += 1
        else:
            unfinished.append((key, emitted[0]))
    seconds = sample(
        [first for _, first in unfinished], [SampleRow(state(key), 2, drafts[0, :0]) for key, _ in unfinished]
    )
    for (_, first), second in zip(unfinished, seconds, strict=True):
        counts[first, second] += 1
    return counts


def rejection_pairs(chain: Chain, policy: Policy) -> NDArray[np.int64]:
    """How often each pair of first tokens was emitted under rejection verification, [V, V]."""
    p = np.stack([chain.p(last) for last in range(chain.vocab)])
    q = np.stack([chain.q(last) for last in range(chain.vocab)])
    counts = np.zeros((chain.vocab, chain.vocab), np.int64)
    for key, pair in enumerate(draft_two(chain, Stream.DRAFT)):
        drafts = pair[: policy(int(pair[0]))]
        contexts = [ANCHOR, *drafts.tolist()]
        accepted, token = accept_rejection(drafts, p[contexts], q[contexts[: len(drafts)]], key, 0)
        emitted = [*drafts[:accepted].tolist(), token]
        if len(emitted) == 1:
            emitted.append(accept_rejection(drafts[:0], p[[token]], q[:0], key, 1)[1])
        counts[emitted[0], emitted[1]] += 1
    return counts


PAIRS = {"coupled": coupled_pairs, "rejection": rejection_pairs}
TRUNCATIONS = {
    "whole distribution": SamplingParams(),
    "temperature": SamplingParams(temperature=0.6),
    "top_k": SamplingParams(top_k=3),
    "top_p": SamplingParams(top_p=0.7, temperature=1.3),
    "min_p": SamplingParams(min_p=0.2),
    "all of them": SamplingParams(top_k=5, top_p=0.9, min_p=0.05, temperature=1.2),
}


@pytest.mark.parametrize("length", [0, 1, 2])
@pytest.mark.parametrize("verification", PAIRS)
def test_tokens_follow_the_targets_distribution_at_every_draft_length(verification: str, length: int) -> None:
    chain = random_chain(6, SamplingParams(), seed=1)
    assert p_value(PAIRS[verification](chain, lambda first: length), chain.exact()) > 1e-3


@pytest.mark.parametrize(
    ("verification", "truncation"),
    [
        *(("coupled", truncation) for truncation in TRUNCATIONS),
        ("rejection", "all of them"),
        *(pytest.param("rejection", truncation, marks=pytest.mark.slow) for truncation in list(TRUNCATIONS)[:-1]),
    ],
)
def test_tokens_follow_the_targets_distribution_under_truncation(verification: str, truncation: str) -> None:
    chain = random_chain(8, TRUNCATIONS[truncation], seed=2)
    assert p_value(PAIRS[verification](chain, lambda first: 2), chain.exact()) > 1e-3


def test_the_chi_square_test_sees_a_slightly_wrong_distribution() -> None:
    chain = random_chain(6, SamplingParams(), seed=1)
    warmer = Chain(chain.target * 0.85, chain.draft, chain.params)
    assert p_value(coupled_pairs(warmer, lambda first: 2), chain.exact()) < 1e-6


# The DSpark paper's Appendix A: confidences of later slots depend on the tokens drafted before them, so a search for the
# best length that goes on past the first drop lets the identity of a draft decide whether that draft is verified.

APPENDIX_A = Chain(
    target=np.log(np.array([[0.6, 0.4], [0.9, 0.1]], np.float32)),
    draft=np.log(np.array([[0.5, 0.5], [0.4, 0.6]], np.float32)),
)
"""Two tokens; row 0 serves the anchor and what follows token 0, row 1 what follows token 1."""

JUMP, SMOOTH = (1.0, 2.5, 2.7), (1.0, 1.3, 1.85)
"""Step times by draft length. After JUMP's first row a second is nearly free."""


def rates(first: int, step_times: tuple[float, ...]) -> list[float]:
    """Expected tokens per time of draft lengths 0, 1 and 2, with perfectly calibrated confidences."""
    accepted = [np.minimum(APPENDIX_A.p(last), APPENDIX_A.q(last)).sum() for last in (ANCHOR, first)]
    expected = (1.0, 1.0 + accepted[0], 1.0 + accepted[0] + accepted[0] * accepted[1])
    return [tokens / time for tokens, time in zip(expected, step_times, strict=True)]


def global_search(step_times: tuple[float, ...]) -> Policy:
    return lambda first: int(np.argmax(rates(first, step_times)))


def stop_at_first_drop(step_times: tuple[float, ...]) -> Policy:
    def choose(first: int) -> int:
        rate = rates(first, step_times)
        return 0 if rate[1] < rate[0] else 1 if rate[2] < rate[1] else 2

    return choose


def exact_under_rejection(chain: Chain, policy: Policy) -> NDArray[np.float64]:
    """P(first two tokens) when drafts are verified by rejection, by enumerating everything that can happen."""

    def verify(draft: int, last: int) -> NDArray[np.float64]:
        """What is emitted in place of `draft`, [V]."""
        p, q = chain.p(last), chain.q(last)
        accept = min(1.0, p[draft] / q[draft])
        residual = np.maximum(p - q, 0.0)
        emitted = (1.0 - accept) * (residual / residual.sum() if residual.sum() > 0 else residual)
        emitted[draft] += accept
        return emitted

    pairs = np.zeros((chain.vocab, chain.vocab))
    for first in range(chain.vocab):
        for second in range(chain.vocab):
            chance = chain.q(ANCHOR)[first] * chain.q(first)[second]
            length = policy(first)
            if length == 0:
                pairs += chance * chain.exact()
                continue
            p, q = chain.p(ANCHOR), chain.q(ANCHOR)
            accept = min(1.0, p[first] / q[first])
            pairs[first] += chance * accept * (verify(second, first) if length == 2 else chain.p(first))
            rejected = verify(first, ANCHOR)
            rejected[first] -= accept
            for token in range(chain.vocab):
                pairs[token] += chance * rejected[token] * chain.p(token)
    return pairs


def test_appendix_a_both_policies_depend_on_the_first_draft() -> None:
    assert [global_search(JUMP)(first) for first in (0, 1)] == [2, 0]
    assert [stop_at_first_drop(JUMP)(first) for first in (0, 1)] == [0, 0]
    assert [stop_at_first_drop(SMOOTH)(first) for first in (0, 1)] == [2, 1]


def test_appendix_a_by_enumeration_looking_ahead_biases_rejection_and_stopping_at_the_first_drop_does_not() -> None:
    exact = APPENDIX_A.exact()
    for step_times in (JUMP, SMOOTH):
        stopped = exact_under_rejection(APPENDIX_A, stop_at_first_drop(step_times))
        np.testing.assert_allclose(stopped, exact, atol=1e-6)
    searched = exact_under_rejection(APPENDIX_A, global_search(JUMP))
    # token 0 is verified, and then always accepted, whenever it is drafted; when it is not, the target draws afresh
    assert searched.sum(axis=1)[0] == pytest.approx(0.5 + 0.5 * 0.6, abs=1e-6)
    assert exact.sum(axis=1)[0] == pytest.approx(0.6, abs=1e-6)


def test_appendix_a_counterexample_keeps_the_target_distribution_when_it_stops_at_the_first_drop() -> None:
    for step_times in (JUMP, SMOOTH):
        counts = rejection_pairs(APPENDIX_A, stop_at_first_drop(step_times))
        assert p_value(counts, APPENDIX_A.exact()) > 1e-3


def test_appendix_a_counterexample_fails_rejection_with_a_global_search() -> None:
    counts = rejection_pairs(APPENDIX_A, global_search(JUMP))
    assert p_value(counts, APPENDIX_A.exact()) < 1e-12
    assert p_value(counts, exact_under_rejection(APPENDIX_A, global_search(JUMP))) > 1e-3


@pytest.mark.parametrize("policy", [global_search(JUMP), stop_at_first_drop(JUMP), stop_at_first_drop(SMOOTH)])
def test_appendix_a_counterexample_keeps_the_target_distribution_under_coupling_whatever_the_policy(
    policy: Policy,
) -> None:
    assert p_value(coupled_pairs(APPENDIX_A, policy), APPENDIX_A.exact()) > 1e-3


# Single rounds


@pytest.mark.parametrize(
    ("drafts", "target", "accepted"),
    [([], [7], 0), ([1, 2, 3], [1, 2, 3, 4], 3), ([1, 2, 3], [1, 9, 3, 4], 1), ([1, 2], [9, 2, 4], 0)],
)
def test_coupled_accepts_the_common_prefix(drafts: list[int], target: list[int], accepted: int) -> None:
    assert accept_coupled(np.array(drafts, np.int64), np.array(target, np.int64)) == accepted


def test_rejection_always_accepts_where_drafter_and_target_agree() -> None:
    p = np.array([[0.2, 0.5, 0.3]] * 3)
    for key in range(200):
        assert accept_rejection(np.array([1, 2]), p, p[:2], key, 0)[0] == 2


def test_rejection_never_accepts_what_the_target_cannot_say_and_never_says_it() -> None:
    p = np.array([[0.5, 0.5, 0.0]] * 2)
    q = np.array([[0.0, 0.0, 1.0]])
    for key in range(200):
        accepted, token = accept_rejection(np.array([2]), p, q, key, 0)
        assert (accepted, token in (0, 1)) == (0, True)


def test_a_position_that_is_verified_again_in_a_later_round_is_drawn_afresh() -> None:
    p, q = np.array([[0.5, 0.5]] * 3), np.array([[0.0, 1.0]] * 2)
    p[0] = q[0]  # the first round accepts its first draft for certain, so its second is at the second round's position
    keys = range(2000)
    first = np.array([accept_rejection(np.array([1, 1]), p, q, key, 0)[0] == 2 for key in keys])
    second = np.array([accept_rejection(np.array([1]), p[1:], q[1:], key, 1)[0] == 1 for key in keys])
    for outcome in (first, second, first == second):
        assert outcome.mean() == pytest.approx(0.5, abs=0.05)


def test_rejection_is_greedy_where_the_target_is() -> None:
    p = np.array([[0.0, 1.0], [1.0, 0.0]])
    q = np.array([[0.5, 0.5]])
    for key in range(50):
        assert accept_rejection(np.array([1]), p, q, key, 0) == (1, 0)
        assert accept_rejection(np.array([0]), p, q, key, 0) == (0, 1)


def test_target_probabilities_keep_ties_at_the_threshold_and_are_one_hot_when_greedy() -> None:
    logits = np.array([1.0, 3.0, 2.0, 2.0, 0.0], np.float32)
    assert np.flatnonzero(target_probabilities(logits, 1.0, 2, 1.0, 0.0)).tolist() == [1, 2, 3]
    assert target_probabilities(logits, 0.0, 0, 1.0, 0.0).tolist() == [0, 1, 0, 0, 0]
    assert target_probabilities(logits, 1.0, 0, 1.0, 0.0).sum() == pytest.approx(1.0)
