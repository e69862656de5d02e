"""Steps planned before the last one's result is known: every token is the same, whatever the host could not know.

All engines here have a lag of 1; the reference has none. On the CPU a launched step is finished before the next one is planned,
but the plan knows no more of it than it would on a device.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from fakes import Answer, OpenEngine, OracleDrafter, RandomAllocation, RunningEngine, read, totals
from faults import at, with_faults
from identities import assert_identities
from numpy.typing import NDArray
from random_grammars import AutomatonGrammar, random_automaton
from random_requests import random_requests

from dspark.engine import DeadlineExceededError, EngineFailedError, Request, RequestFacts, SamplingParams, StepFacts
from dspark.engine.load_controller import Allocation, StepLoad
from dspark.engine.runner import Pending
from dspark.engine.sequence import NO_ROUND, Batch, ExpectedDraft, NextDraft, RequestRecord, Status, StepResult

GAMMA = 5
VOCAB_SIZE, END = 320, 2
CRAMPED = {"num_blocks": 16, "max_num_seqs": 16, "max_num_batched_tokens": 24}
"""Prompts are computed in chunks, and preemption is frequent."""
POLICIES: dict[str, dict[str, Any]] = {
    "fixed": {"speculation": "fixed"},
    "adaptive": {"speculation": "adaptive"},
    "any lengths": {"speculation": "adaptive", "controller": RandomAllocation},
}


@pytest.fixture(scope="module")
def lag() -> int:
    return 1


def with_grammar(request: Request, seed: int) -> Request:
    automaton = random_automaton(seed, VOCAB_SIZE, END)
    sampling = replace(request.sampling, ignore_eos=False)
    return replace(request, sampling=sampling, make_grammar=lambda: AutomatonGrammar(automaton))


@dataclass
class Reference:
    """Every sampling parameter, way to stop, choices and grammars, and the answers of plain decoding without lag."""

    requests: list[Request]
    answers: list[Answer]

    def oracle(self) -> OracleDrafter:
        drafter = OracleDrafter(GAMMA, VOCAB_SIZE)
        for request, answer in zip(self.requests, self.answers, strict=True):
            drafter.learn(request, answer.tokens)
        return drafter


@pytest.fixture(scope="module")
def reference(open_engine: OpenEngine) -> Reference:
    requests = random_requests(60, VOCAB_SIZE, END)
    requests += [
        with_grammar(request, seed) for seed, request in enumerate(random_requests(12, VOCAB_SIZE, END, seed=11))
    ]
    return Reference(requests, open_engine(speculation="off", lag=0).answer_together(requests))


@dataclass
class Watch:
    """What a scheduler did. ahead: plans made while a step was in flight. held: times that it could plan none until that was

    committed. one_too_many: rounds computed for sequences that had ended, unknown to the runner; spared: known to it.
    reused: blocks given away while a round of the sequence that left them was in flight. lost: steps in flight at each failure.
    """

    ahead: int = 0
    held: int = 0
    one_too_many: int = 0
    spared: int = 0
    reused: int = 0
    lost: list[int] = field(default_factory=list)


def watch(engine: RunningEngine) -> Watch:
    seen, scheduler = Watch(), engine.engine.scheduler
    schedule, commit, retry = scheduler.schedule, scheduler.commit, scheduler.retry
    in_flight: list[Batch] = []

    def watched_schedule(expected: dict[int, ExpectedDraft]) -> Batch | None:
        left = {block for batch in in_flight for block in batch.left}
        batch = schedule(expected)
        if batch is None:
            seen.held += bool(in_flight)
            return None
        seen.ahead += bool(in_flight)
        seen.reused += len(left & {block for sequence in batch.sequences for block in sequence.blocks})
        in_flight.append(batch)
        return batch

    def watched_commit(
        batch: Batch, allocation: Allocation, result: StepResult, facts: StepFacts
    ) -> list[RequestRecord]:
        for decode, round_ in zip(batch.decodes, result.rounds, strict=True):
            if decode.sequence.status is Status.FINISHED:
                seen.one_too_many += round_ != NO_ROUND
            seen.spared += round_ == NO_ROUND
        assert in_flight.pop(0) is batch
        return commit(batch, allocation, result, facts)

    def watched_retry(batch: Batch) -> RequestRecord | None:
        seen.lost.append(len(in_flight))
        assert in_flight[0] is batch
        in_flight.clear()
        return retry(batch)

    scheduler.schedule = watched_schedule  # type: ignore[method-assign, assignment]
    scheduler.commit = watched_commit  # type: ignore[method-assign]
    scheduler.retry = watched_retry  # type: ignore[method-assign]
    return seen


def open_oracle(open_engine: OpenEngine, reference: Reference, **options: Any) -> RunningEngine:
    return open_engine(use=reference.oracle(), drafter="lookup", num_speculative_tokens=GAMMA, **options)


# The same tokens


@pytest.mark.parametrize("policy", POLICIES)
def test_same_tokens_in_a_small_pool_with_drafts_of_any_length(
    reference: Reference, open_engine: OpenEngine, policy: str
) -> None:
    engine = open_oracle(open_engine, reference, **CRAMPED, **POLICIES[policy])
    seen = watch(engine)
    answers = engine.answer_together(reference.requests)
    for request, answer, plain in zip(reference.requests, answers, reference.answers, strict=True):
        assert answer.text == plain.text, request
    for step in engine.steps:
        assert_identities(step)
    assert {delta.accepted_drafts for answer in answers for delta in answer.deltas} == set(range(GAMMA + 1))
    sums = totals(engine.steps)
    assert min(sums["preemptions"], sums["evicted_blocks"], sums["rejected_after_stop"], sums["truncated"]) > 0
    assert max(step.batch_tokens for step in engine.steps) == CRAMPED["max_num_batched_tokens"]
    assert min(seen.ahead, seen.held, seen.one_too_many, seen.spared, seen.reused) > 0
    assert seen.ahead > len(engine.steps) / 3


@pytest.mark.parametrize(
    ("drafter", "policy", "blocks"),
    [
        ("lookup", "adaptive", 16),
        ("dspark+lookup", "any lengths", 32),
        pytest.param("draft_model", "any lengths", 32, marks=pytest.mark.slow),
        pytest.param("draft_model+lookup", "fixed", 32, marks=pytest.mark.slow),
        pytest.param("eagle3", "any lengths", 40, marks=pytest.mark.slow),
    ],
)
def test_same_tokens_with_real_drafters(
    reference: Reference,
    open_engine: OpenEngine,
    request: pytest.FixtureRequest,
    drafter: str,
    policy: str,
    blocks: int,
) -> None:
    folders = {"dspark": "draft_checkpoint", "eagle3": "eagle3_checkpoint", "draft_model": "draft_model"}
    kind, _, beside = drafter.partition("+")
    name = str(request.getfixturevalue(folders[kind])) if kind in folders else kind
    engine = open_engine(
        **CRAMPED | {"num_blocks": blocks}, drafter=name, lookup=beside == "lookup", **POLICIES[policy]
    )
    seen = watch(engine)
    for _ in range(2):  # the second time with prefix hits
        answers = engine.answer_together(reference.requests[:25])
        assert [answer.text for answer in answers] == [answer.text for answer in reference.answers[:25]]
    sums = totals(engine.steps)
    assert min(sums["preemptions"], sums["prompt_cached"], sums["verified"], seen.ahead, seen.one_too_many) > 0


def test_a_prediction_is_followed_all_the_same(open_engine: OpenEngine) -> None:
    engine = open_engine(drafter="lookup", speculation="adaptive")
    sampling = SamplingParams(seed=3, max_tokens=160, min_tokens=160, frequency_penalty=1.0)
    request = Request(tuple(range(5, 25)), sampling)
    plain = engine.answer(replace(request, speculate=False))
    told = engine.answer(replace(request, predicted_token_ids=tuple(plain.tokens[0])))
    assert told.text == plain.text
    assert told.facts.rounds_with_drafts + told.facts.rounds_without_drafts <= 160 / 4
    assert told.facts.rejected_prediction_tokens == 0


# What the plan knows


@dataclass
class Decisions:
    """loads: as the controller was asked; results: as they were committed; both in order of steps."""

    loads: list[StepLoad] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)


def test_a_budget_is_decided_on_the_blocks_that_are_being_verified_meanwhile(
    reference: Reference, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_oracle(open_engine, reference, speculation="adaptive")
    decisions, controller, scheduler = Decisions(), engine.engine.controller, engine.engine.scheduler
    allocate, commit = controller.allocate, scheduler.commit
    means: list[NDArray[np.float32]] = []

    def recorded_allocate(load: StepLoad) -> Allocation:
        decisions.loads.append(load)
        means.append(controller.mean_survival())
        return allocate(load)

    def recorded_commit(
        batch: Batch, allocation: Allocation, result: StepResult, facts: StepFacts
    ) -> list[RequestRecord]:
        decisions.batches.append(batch)
        decisions.results.append(result)
        return commit(batch, allocation, result, facts)

    monkeypatch.setattr(controller, "allocate", recorded_allocate)
    monkeypatch.setattr(scheduler, "commit", recorded_commit)
    engine.answer_together(reference.requests)
    old = means_used = changed = 0
    for step, load in enumerate(decisions.loads):
        if load.known:
            continue
        before_last = decisions.results[step - 2].drafts if step > 1 else {}
        for row, decode in enumerate(decisions.batches[step].decodes):
            if not load.proposed[row]:
                continue
            newest_known = before_last.get(decode.sequence.id)
            if newest_known is not None:
                assert (load.survival[row] == newest_known.survival).all()
                old += 1
            else:
                assert (load.survival[row] == means[step]).all()
                means_used += 1
            verified: NextDraft | None = decisions.results[step - 1].drafts.get(decode.sequence.id)
            assert decode.draft is verified, "what was counted and learned from is the block of the step before"
            assert load.proposed[row] >= decode.proposed
            changed += verified is not None and (verified.survival != load.survival[row]).any()
    assert min(old, means_used, changed) > 50


def test_the_controller_learns_each_block_once(
    reference: Reference, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_oracle(open_engine, reference, speculation="fixed")
    recent = engine.engine.controller._recent
    rows: list[int] = []
    add = recent.add
    monkeypatch.setattr(recent, "add", lambda survival: (rows.append(len(survival)), add(survival))[1])
    engine.answer_together(reference.requests)
    with_blocks = sum(sum(n for length, n in step.proposed_lengths.items() if length) for step in engine.steps)
    # those of the rounds that were dropped as well, and the attempts at which nothing was proposed
    assert with_blocks <= sum(rows) <= sum(step.batch_sequences for step in engine.steps) + len(engine.steps)


def test_a_step_takes_from_one_commit_to_the_next(reference: Reference, open_engine: OpenEngine) -> None:
    engine = open_oracle(open_engine, reference, speculation="adaptive")
    loop = engine.engine._loop
    commits: list[float] = []
    engine.engine.on_step.append(lambda facts: commits.append(facts.step_s))

    async def all_at_once() -> float:
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*(read(engine.engine.submit(r), r.n) for r in reference.requests[:20]))
        return asyncio.get_running_loop().time() - began

    assert sum(commits) <= engine.run(all_at_once())
    assert all(step_s > 0 for step_s in commits)
    assert not loop._in_flight


# Ends that the runner does not know


def endless(request: Request) -> Request:
    sampling = replace(request.sampling, max_tokens=100, min_tokens=100, logit_bias={})
    return replace(request, sampling=sampling, make_stop_check=None, make_grammar=None)


def test_streams_that_are_left_cost_one_round_each_and_nobodys_tokens(
    reference: Reference, open_engine: OpenEngine
) -> None:
    engine = open_oracle(open_engine, reference, **CRAMPED, **POLICIES["any lengths"])
    seen = watch(engine)
    staying, leaving = reference.requests[:30], [endless(request) for request in reference.requests[30:45]]

    async def leave(request: Request, deltas: int) -> RequestFacts:
        async with engine.engine.submit(request) as stream:
            for _ in range(deltas):
                await anext(stream)
        return stream.facts

    async def all_of_them() -> tuple[list[Answer], list[RequestFacts]]:
        answers = asyncio.gather(*(read(engine.engine.submit(request), request.n) for request in staying))
        left = asyncio.gather(*(leave(request, number % 6) for number, request in enumerate(leaving)))
        return await answers, await left

    answers, left = engine.run(all_of_them())
    last = engine.answer(
        Request((5, 6, 7), SamplingParams(max_tokens=2))
    )  # a cancel is counted by the step that follows
    assert [answer.text for answer in answers] == [answer.text for answer in reference.answers[:30]]
    sums = totals(engine.steps)
    assert sums["freed_after_cancel"] == len(leaving)
    facts = [*left, last.facts, *(answer.facts for answer in answers)]
    for total, own in (
        ("generated", "generated_tokens"),
        ("drafted", "drafted_tokens"),
        ("accepted", "accepted_tokens"),
    ):
        assert sums[total] == sum(getattr(one, own) for one in facts), total
    for step in engine.steps:
        assert_identities(step)
    assert min(seen.one_too_many, seen.reused) > 0


def test_a_deadline_frees_what_is_in_two_steps(open_engine: OpenEngine) -> None:
    engine = open_engine(drafter="lookup", max_num_seqs=1)

    async def run_out() -> None:
        loop = asyncio.get_running_loop()
        request = Request(tuple(range(3, 43)), SamplingParams(max_tokens=400, ignore_eos=True, seed=1))
        stream = engine.engine.submit(replace(request, deadline_s=loop.time() + 0.05))
        with pytest.raises(DeadlineExceededError):
            await read(stream)
        while stream.facts.finished_s is None:
            await asyncio.sleep(0)
        assert engine.engine.gauges().blocks_used == 0

    engine.run(run_out())
    assert len(engine.answer(Request((5, 6, 7), SamplingParams(max_tokens=9, ignore_eos=True))).tokens[0]) == 9


def test_a_request_that_needs_the_whole_pool_runs(open_engine: OpenEngine) -> None:
    tight = open_engine(num_blocks=6, drafter="lookup", speculation="fixed")
    whole = Request((5, 6) * 20, SamplingParams(max_tokens=6 * 16 - 40, ignore_eos=True, seed=1))
    assert len(tight.answer(whole).tokens[0]) == 56


# Failures with two steps in flight


def counted(works: Callable[..., Any], fails: Callable[[int], bool]) -> Callable[..., Any]:
    calls = itertools.count(1)

    def call(*args: Any) -> Any:
        if fails(next(calls)):
            raise ArithmeticError("a step is broken")
        return works(*args)

    return call


@pytest.mark.parametrize("drafter", ["lookup", "draft_checkpoint", pytest.param("draft_model", marks=pytest.mark.slow)])
def test_steps_that_fail_before_or_behind_another_change_no_answer(
    reference: Reference, open_engine: OpenEngine, request: pytest.FixtureRequest, drafter: str
) -> None:
    name = drafter if drafter == "lookup" else str(request.getfixturevalue(drafter))
    engine = open_engine(
        **CRAMPED | {"num_blocks": 24 if drafter == "lookup" else 48}, drafter=name, speculation="fixed"
    )
    seen, runner = watch(engine), engine.parts.runner
    # every pass that fails has spoilt what it was to write, the blocks of those that had ended by a stop included
    faulty = with_faults(engine, at(*range(5, 400, 26)))
    # in turns with them, so that nobody is in two failed steps in a row
    due = [*range(18, 400, 26)]
    collect = counted(runner.collect, lambda number: faulty.passes >= due[0] and bool(due.pop(0)))
    runner.collect = collect  # type: ignore[method-assign]
    answers = engine.answer_together(reference.requests[:40])
    assert [answer.text for answer in answers] == [answer.text for answer in reference.answers[:40]]
    assert faulty.passes > 60
    assert {1, 2} == set(seen.lost)
    assert engine.engine.gauges().failed_steps_total == len(seen.lost)
    assert min(seen.one_too_many, seen.reused) > 0
    engine.check_pool_is_whole()


def test_a_step_that_runs_out_of_memory_behind_another_is_run_again_smaller(
    reference: Reference, open_engine: OpenEngine
) -> None:
    engine = open_oracle(open_engine, reference, max_num_seqs=8, speculation="fixed")
    with_faults(engine, lambda number, rows: MemoryError() if rows > 9 else None)
    answers = engine.answer_together(reference.requests[:20])
    assert [answer.text for answer in answers] == [answer.text for answer in reference.answers[:20]]
    gauges = engine.engine.gauges()
    assert gauges.out_of_memory_retries_total > 0
    assert gauges.failed_steps_total == 0


@pytest.mark.parametrize("place", ["allocate", "commit"])
def test_where_the_loop_itself_fails_the_requests_in_flight_end_and_the_next_ones_are_right(
    reference: Reference, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    engine = open_oracle(open_engine, reference, max_num_seqs=3, speculation="fixed")
    owner, name = {
        "allocate": (engine.engine.controller, "allocate"),
        "commit": (engine.engine.scheduler, "_publish"),
    }[place]
    monkeypatch.setattr(owner, name, counted(getattr(owner, name), lambda number: number == 20))

    async def answer(request: Request) -> Answer | Exception:
        try:
            return await read(engine.engine.submit(request), request.n)
        except EngineFailedError as error:
            return error

    async def all_of_them() -> list[Answer | Exception]:
        return await asyncio.gather(*map(answer, reference.requests[:12]))

    got = engine.run(all_of_them())
    ended = [one for one in got if isinstance(one, Exception)]
    assert 1 <= len(ended) <= 3
    for one, plain in zip(got, reference.answers, strict=False):
        assert isinstance(one, Exception) or one.text == plain.text
    assert engine.engine.gauges().failed_steps_total == 1
    assert [a.text for a in engine.answer_together(reference.requests[:12])] == [a.text for a in reference.answers[:12]]


def test_nothing_is_planned_behind_a_launch_that_failed(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(drafter="lookup")
    events: list[str] = []
    runner = engine.parts.runner
    launch, collect = runner.launch, runner.collect

    def watched_launch(*args: Any) -> Pending:
        events.append("launch")
        if len(events) == 8:
            events[-1] = "launch that fails"
            raise ArithmeticError("once")
        return launch(*args)

    def watched_collect(pending: Pending) -> StepResult:
        events.append("collect")
        return collect(pending)

    monkeypatch.setattr(runner, "launch", watched_launch)
    monkeypatch.setattr(runner, "collect", watched_collect)
    engine.answer(Request((5, 6, 7), SamplingParams(max_tokens=20, ignore_eos=True, seed=1)))
    assert events[:4] == ["launch", "launch", "collect", "launch"], "two are in flight"
    assert events[7:11] == ["launch that fails", "collect", "launch", "launch"], "the one before it is sound"


def test_an_engine_tells_its_lag(open_engine: OpenEngine) -> None:
    assert open_engine().engine.info.lag == 1
    assert open_engine(lag=0).engine.info.lag == 0
