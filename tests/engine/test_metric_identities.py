"""The identities between the engine's numbers, step by step, in runs with cancels, preemptions and every kind of stop."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from fakes import OpenEngine, OracleDrafter, RandomAllocation, RunningEngine, read, totals
from identities import assert_identities
from random_requests import random_requests
from scheduler_harness import Harness

from dspark.engine import Reason, Request, RequestFacts, SamplingParams, StepFacts
from dspark.engine.accounting import count_round
from dspark.engine.sequence import Decode, NextDraft, Round

GAMMA = 5
VOCAB_SIZE, EOS_TOKEN_ID = 320, 2
CRAMPED = {"num_blocks": 16, "max_num_seqs": 16, "max_num_batched_tokens": 24}
POLICIES = {
    "off": {"speculation": "off"},
    "fixed": {"speculation": "fixed"},
    "adaptive": {"speculation": "adaptive"},
    "any lengths": {"speculation": "adaptive", "controller": RandomAllocation},
}


async def cancel_after(engine: RunningEngine, request: Request, deltas: int) -> RequestFacts:
    stream = engine.engine.submit(request)
    async with stream:
        for _ in range(deltas):
            await anext(stream)
    return stream.facts


def run_with_cancels(engine: RunningEngine, requests: list[Request]) -> tuple[list[RequestFacts], int]:
    """Every third request is left after none to five deltas. → (facts of all, how many were cancelled)."""
    rng = np.random.default_rng(5)

    async def one(number: int, request: Request) -> RequestFacts:
        if number % 3:
            return (await read(engine.engine.submit(request), request.n)).facts
        # long enough that it cannot have ended by itself
        sampling = replace(request.sampling, max_tokens=100, min_tokens=100, logit_bias={})
        endless = replace(request, sampling=sampling, make_stop_check=None)
        return await cancel_after(engine, endless, int(rng.integers(0, 6)))

    async def all_of_them() -> list[RequestFacts]:
        return await asyncio.gather(*(one(number, request) for number, request in enumerate(requests)))

    facts = engine.run(all_of_them())
    # cancels are counted by the step that follows them
    facts.append(engine.answer(Request((5, 6, 7), SamplingParams(max_tokens=2))).facts)
    return facts, len(range(0, len(requests), 3))


@pytest.mark.parametrize("policy", POLICIES)
def test_identities_hold_in_every_step_with_cancels_preemptions_and_stops(open_engine: OpenEngine, policy: str) -> None:
    requests = random_requests(90, VOCAB_SIZE, EOS_TOKEN_ID, seed=3)
    plain = open_engine(speculation="off")
    oracle = OracleDrafter(GAMMA, VOCAB_SIZE)
    for request, answer in zip(requests, plain.answer_together(requests), strict=True):
        oracle.learn(request, answer.tokens)
    engine = open_engine(use=oracle, drafter="lookup", num_speculative_tokens=GAMMA, **CRAMPED, **POLICIES[policy])
    info, scheduler = engine.engine.info, engine.engine.scheduler

    def check_blocks(_: StepFacts) -> None:
        gauges = engine.engine.gauges()
        assert gauges.blocks_used + gauges.blocks_cached + gauges.blocks_free == info.num_blocks
        scheduler.kv_cache.check([sequence.blocks for sequence in scheduler.running])

    engine.engine.on_step.append(check_blocks)
    facts, cancelled = run_with_cancels(engine, requests)
    for step in engine.steps:
        assert_identities(step)
    sums = totals(engine.steps)
    assert sums["freed_after_cancel"] == cancelled
    for total, own in (
        ("generated", "generated_tokens"),
        ("drafted", "drafted_tokens"),
        ("verified", "verified_tokens"),
        ("accepted", "accepted_tokens"),
        ("rounds_with_drafts", "rounds_with_drafts"),
        ("rounds_without_drafts", "rounds_without_drafts"),
        ("preemptions", "preemptions"),
    ):
        assert sums[total] == sum(getattr(one, own) for one in facts), total
    assert sums["preemptions"] > 0
    if policy != "off":
        assert min(sums["rejected_after_stop"], sums["rejected_after_mismatch"], sums["truncated"]) > 0
    gauges = engine.engine.gauges()
    idle = (gauges.requests_running, gauges.sequences_running, gauges.requests_waiting, gauges.blocks_used)
    assert idle == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("verified", "accepted", "kept", "counted"),
    [
        # accepted, bonus, rejected: mismatch, after it, after a stop
        (0, 0, 1, (0, 1, 0, 0, 0)),
        (4, 4, 5, (4, 1, 0, 0, 0)),
        (4, 1, 2, (1, 1, 1, 2, 0)),
        (4, 0, 1, (0, 1, 1, 3, 0)),
        (4, 4, 3, (3, 0, 0, 0, 1)),  # the third draft stopped the text
        (4, 2, 1, (1, 0, 0, 0, 3)),
        (4, 2, 2, (2, 0, 0, 0, 2)),
        (4, 4, 0, (0, 0, 0, 0, 4)),  # a stop check that keeps nothing
        (4, 1, 0, (0, 0, 0, 0, 4)),
    ],
)
def test_drafts_behind_a_stop_were_not_accepted(
    verified: int, accepted: int, kept: int, counted: tuple[int, ...]
) -> None:
    facts = StepFacts()
    draft = NextDraft(5, np.zeros(5, np.float32), np.full(5, 0.5, np.float32))
    decode = Decode(Harness().add([1], max_tokens=50).sequences[0], draft, cap=4, cap_reason=Reason.KV)
    count_round(facts, decode, Reason.LOAD, Round([1] * (accepted + 1), verified, accepted, None), kept)
    rejected = (facts.rejected_mismatch, facts.rejected_after_mismatch, facts.rejected_after_stop)
    assert (facts.accepted, facts.bonus, *rejected) == counted
    assert facts.truncated == {Reason.LOAD: 5 - verified}
    assert_identities(facts)


@pytest.mark.parametrize("policy", POLICIES)
def test_streams_and_facts_agree(open_engine: OpenEngine, policy: str) -> None:
    requests = random_requests(40, VOCAB_SIZE, EOS_TOKEN_ID, seed=8)
    engine = open_engine(drafter="lookup", **POLICIES[policy])
    answers = engine.answer_together(requests)
    deltas = [delta for answer in answers for delta in answer.deltas]
    sums = totals(engine.steps)
    assert sums["generated"] == sum(len(delta.token_ids) for delta in deltas)
    assert sums["accepted"] == sum(delta.accepted_drafts for delta in deltas)
    assert sums["first_tokens"] <= sum(request.n for request in requests)


def test_without_preemption_every_prompt_token_is_computed_or_cached(open_engine: OpenEngine) -> None:
    engine = open_engine(drafter="lookup")
    requests = random_requests(40, VOCAB_SIZE, EOS_TOKEN_ID, seed=4)
    for _ in range(2):
        engine.answer_together(requests)
    sums = totals(engine.steps)
    assert sums["prefix_queried"] == 2 * sum(len(r.prompt_token_ids) * r.n for r in requests)
    assert sums["prompt_computed"] + sums["prompt_cached"] == sums["prefix_queried"]
    assert sums["prompt_cached"] > 0


def test_every_request_has_its_times_in_order(open_engine: OpenEngine) -> None:
    engine = open_engine(drafter="lookup")
    for answer in engine.answer_together(random_requests(20, VOCAB_SIZE, EOS_TOKEN_ID, seed=6)):
        facts = answer.facts
        assert facts.scheduled_s is not None
        assert facts.finished_s is not None
        assert facts.arrived_s <= facts.scheduled_s <= facts.finished_s
        if facts.first_token_s is not None:
            assert facts.scheduled_s <= facts.first_token_s <= facts.finished_s
        assert (facts.first_token_s is None) == (facts.generated_tokens == 0)
