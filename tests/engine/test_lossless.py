"""The answer is a function of target, prompt, parameters and seed alone: zero tolerance, however the engine worked.

The reference is plain decoding, one request at a time. Every other way to run the same requests must give the same
tokens, finish reasons and log-probabilities, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from fakes import DTYPES, Answer, OpenEngine, OracleDrafter, RandomAllocation, RunningEngine, totals
from random_requests import random_requests

from dspark.engine import Request

GAMMA = 5
VOCAB_SIZE, EOS_TOKEN_ID = 320, 2
CRAMPED = {"max_num_seqs": 16, "max_num_batched_tokens": 24}
"""Prompts are computed in chunks; with a pool of a few sequences' blocks, preemption is frequent."""

POLICIES: dict[str, dict[str, Any]] = {
    "off": {"speculation": "off"},
    "fixed": {"speculation": "fixed"},
    "adaptive": {"speculation": "adaptive"},
    "any lengths": {"speculation": "adaptive", "controller": RandomAllocation},
}
HARDEST_FIRST = [
    "adaptive",
    "any lengths",
    *(pytest.param(policy, marks=pytest.mark.slow) for policy in ("off", "fixed")),
]


@dataclass
class Reference:
    """Requests and their answers by plain decoding, each alone."""

    dtype: str
    requests: list[Request]
    answers: list[Answer]

    def oracle(self) -> OracleDrafter:
        drafter = OracleDrafter(GAMMA, VOCAB_SIZE)
        for request, answer in zip(self.requests, self.answers, strict=True):
            drafter.learn(request, answer.tokens)
        return drafter

    def assert_equal(self, answers: Sequence[Answer]) -> None:
        for number, (answer, plain) in enumerate(zip(answers, self.answers[: len(answers)], strict=True)):
            assert answer.text == plain.text, f"request {number}: {self.requests[number]}"


@pytest.fixture(scope="module", params=DTYPES)
def reference(request: pytest.FixtureRequest, open_engine: OpenEngine) -> Reference:
    requests = random_requests(200, VOCAB_SIZE, EOS_TOKEN_ID)
    plain = open_engine(dtype=request.param, speculation="off", lag=0)
    return Reference(request.param, requests, plain.answer_one_at_a_time(requests))


def open_oracle(open_engine: OpenEngine, reference: Reference, **options: Any) -> RunningEngine:
    return open_engine(
        use=reference.oracle(),
        dtype=reference.dtype,
        drafter="lookup",
        num_speculative_tokens=GAMMA,
        **options,
    )


def assert_speculation_was_exercised(engine: RunningEngine, answers: Sequence[Answer], policy: str) -> None:
    sums = totals(engine.steps)
    if policy == "off":
        assert sums["verified"] == 0
        return
    seen = {delta.accepted_drafts for answer in answers for delta in answer.deltas}
    assert seen == set(range(GAMMA + 1))
    assert sums["truncated"] > 0
    assert sums["rounds_without_drafts"] > 0
    assert sums["rejected_mismatch"] > 0


def test_the_reference_uses_every_way_to_end_and_every_parameter(reference: Reference) -> None:
    reasons = {reason for answer in reference.answers for reason in answer.finish_reasons}
    assert reasons == {"stop", "length"}
    assert sum(any(t) for answer in reference.answers for t in answer.tokens) > 200
    assert any(answer.logprobs[0] for answer in reference.answers)
    ended_by_eos = [t for answer in reference.answers for t in answer.tokens if t and t[-1] == EOS_TOKEN_ID]
    assert ended_by_eos


@pytest.mark.parametrize("policy", POLICIES)
def test_same_tokens_in_a_batch_of_32(reference: Reference, open_engine: OpenEngine, policy: str) -> None:
    engine = open_oracle(open_engine, reference, **POLICIES[policy])
    answers = engine.answer_together(reference.requests)
    reference.assert_equal(answers)
    assert max(step.batch_sequences for step in engine.steps) == 32
    assert_speculation_was_exercised(engine, answers, policy)


@pytest.mark.parametrize("policy", [pytest.param("fixed", marks=pytest.mark.slow), "adaptive"])
def test_same_tokens_alone(reference: Reference, open_engine: OpenEngine, policy: str) -> None:
    engine = open_oracle(open_engine, reference, **POLICIES[policy])
    answers = engine.answer_one_at_a_time(reference.requests)
    reference.assert_equal(answers)
    assert_speculation_was_exercised(engine, answers, policy)


@pytest.mark.parametrize("policy", HARDEST_FIRST)
def test_same_tokens_with_prefix_cache_hits(reference: Reference, open_engine: OpenEngine, policy: str) -> None:
    engine = open_oracle(open_engine, reference, **POLICIES[policy])
    engine.answer_together(reference.requests[:60])
    again = engine.answer_together(reference.requests[:60])
    reference.assert_equal(again)
    long = [a for a in again if a.facts.prompt_tokens > 16]
    assert long
    assert all(answer.facts.cached_tokens >= 16 for answer in long)


@pytest.mark.parametrize("policy", HARDEST_FIRST)
def test_same_tokens_with_preemption_and_chunked_prefill(
    reference: Reference, open_engine: OpenEngine, policy: str
) -> None:
    engine = open_oracle(open_engine, reference, num_blocks=16, **CRAMPED, **POLICIES[policy])
    answers = engine.answer_together(reference.requests)
    reference.assert_equal(answers)
    sums = totals(engine.steps)
    assert sums["preemptions"] > 0
    assert sums["evicted_blocks"] > 0
    assert max(answer.facts.prompt_tokens for answer in answers) > 4 * CRAMPED["max_num_batched_tokens"]
    assert max(step.batch_tokens for step in engine.steps) == CRAMPED["max_num_batched_tokens"]
    assert_speculation_was_exercised(engine, answers, policy)


BLOCK_SIZES = {"lookup": 1.0, "dspark": 2.0, "draft_model": 2.0, "eagle3": 2.5}
"""Bytes of a K/V block with the drafter's context, in blocks of the target alone."""


@pytest.mark.parametrize(
    ("drafter", "policy", "cramped"),
    [
        pytest.param("lookup", "fixed", False, marks=pytest.mark.slow),
        pytest.param("lookup", "adaptive", True, marks=pytest.mark.slow),
        ("lookup", "any lengths", True),
        ("dspark", "fixed", True),
        ("dspark", "adaptive", False),
        pytest.param("dspark", "any lengths", True, marks=pytest.mark.slow),
        pytest.param("draft_model", "fixed", True, marks=pytest.mark.slow),
        pytest.param("draft_model", "adaptive", False, marks=pytest.mark.slow),
        ("draft_model", "any lengths", True),
        ("eagle3", "fixed", True),
        pytest.param("eagle3", "adaptive", False, marks=pytest.mark.slow),
        pytest.param("eagle3", "any lengths", True, marks=pytest.mark.slow),
        ("dspark+lookup", "adaptive", True),
        pytest.param("draft_model+lookup", "any lengths", True, marks=pytest.mark.slow),
        ("eagle3+lookup", "fixed", False),
    ],
)
def test_same_tokens_with_real_drafters(
    reference: Reference,
    open_engine: OpenEngine,
    request: pytest.FixtureRequest,
    drafter: str,
    policy: str,
    cramped: bool,
) -> None:
    folders = {"dspark": "draft_checkpoint", "eagle3": "eagle3_checkpoint", "draft_model": "draft_model"}
    kind, _, beside = drafter.partition("+")
    name = str(request.getfixturevalue(folders[kind])) if kind in folders else kind
    options: dict[str, Any] = {"drafter": name, "lookup": beside == "lookup"}
    if cramped:
        options |= {**CRAMPED, "num_blocks": int(16 * BLOCK_SIZES[kind])}
    engine = open_engine(dtype=reference.dtype, **options, **POLICIES[policy])
    requests = reference.requests[:30]
    answers = []
    for _ in range(2):
        answers = engine.answer_together(requests)
        reference.assert_equal(answers)
    sums = totals(engine.steps)
    assert sums["rejected_mismatch"] > 0
    random = drafter in ("dspark", "eagle3")
    assert sums["accepted"] > 0 or (random and policy == "adaptive"), "a random drafter soon stops being asked"
    assert (sums["preemptions"] > 0) == cramped
    if drafter == "draft_model" and policy != "adaptive":
        seen = {delta.accepted_drafts for answer in answers for delta in answer.deltas}
        assert seen == set(range(engine.parts.runner.drafter.block_size + 1))
