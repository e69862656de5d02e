"""Who runs, and that no history of requests, aborts and shortages leaks a block, starves a request or breaks a limit."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_harness import EOS, GAMMA, Harness, Plan

from dspark.engine import FinishReason, Reason, SamplingParams
from dspark.engine.kv_cache import BLOCK_SIZE
from dspark.engine.scheduler import GOOD_STEPS
from dspark.engine.sequence import NO_ROUND, Batch, ExpectedDraft, NextDraft, Round, Status


def stop_on_three(token_ids: Items[int]) -> int | None:
    """A stop that the scheduler sees and the runner does not."""
    return token_ids.index(3) + 1 if 3 in token_ids else None


class RandomHistory(RuleBasedStateMachine):
    """Prompts repeat, so that the prefix cache matters; steps can be caught between schedule and commit."""

    lag = 0

    @initialize(
        num_blocks=st.integers(3, 16),
        max_num_seqs=st.integers(1, 5),
        spare=st.integers(0, 30),
        seed=st.integers(0, 99),
        eos_rate=st.sampled_from([0.0, 0.0, 0.1]),
    )
    def start(self, num_blocks: int, max_num_seqs: int, spare: int, seed: int, eos_rate: float) -> None:
        self.harness = Harness(num_blocks, max_num_seqs, max_num_seqs + spare, seed, eos_rate=eos_rate, lag=self.lag)
        self.in_flight = self.harness.in_flight

    @rule(
        length=st.integers(1, 60),
        max_tokens=st.integers(1, 40),
        n=st.integers(1, 3),
        kind=st.integers(1, 2),
        priority=st.sampled_from([0, 0, -1, 1]),
        tenant=st.sampled_from([b"", b"a"]),
        stops=st.booleans(),
    )
    def add(self, length: int, max_tokens: int, n: int, kind: int, priority: int, tenant: bytes, stops: bool) -> None:
        room = self.harness.num_blocks * BLOCK_SIZE
        length = min(length, room - 1)
        stop_check = stop_on_three if stops else None
        self.harness.add([kind] * length, min(max_tokens, room - length), n, None, priority, tenant, stop_check)

    @rule(count=st.integers(1, 8))
    @precondition(lambda self: len(self.in_flight) <= self.lag)
    def step(self, count: int) -> None:
        for _ in range(count):
            self.harness.step()

    @rule()
    @precondition(lambda self: len(self.in_flight) <= self.lag)
    def schedule(self) -> None:
        self.harness.plan()

    @rule()
    @precondition(lambda self: self.in_flight)
    def commit(self) -> None:
        self.harness.commit(self.in_flight[0])

    @rule(how=st.sampled_from(["in the runner", "out of memory", "in commit"]))
    @precondition(lambda self: self.in_flight)
    def fail(self, how: str) -> None:
        if how == "in commit":
            self.harness.fail(self.in_flight[0])
        elif how == "in the runner" or not self.harness.run_out_of_memory(self.in_flight[0]):
            self.harness.fail_in_runner(self.in_flight[0])

    @rule(which=st.integers(0, 1000))
    @precondition(lambda self: self.harness.records)
    def abort(self, which: int) -> None:
        record = self.harness.records[which % len(self.harness.records)]
        self.harness.scheduler.abort(record)
        if not self.in_flight:
            assert record.finished

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        if hasattr(self, "harness"):
            self.harness.check()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            while self.in_flight:
                self.harness.commit(self.in_flight[0])
            self.harness.finish()


class RandomHistoryAhead(RandomHistory):
    """Steps are planned before the last one is committed."""

    lag = 1


TestRandomHistory = RandomHistory.TestCase
TestRandomHistory.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestRandomHistoryAhead = RandomHistoryAhead.TestCase
TestRandomHistoryAhead.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


@pytest.mark.slow
class TestManyRandomHistories(RandomHistory.TestCase):
    settings = settings(max_examples=500, stateful_step_count=40, deadline=None)


@pytest.mark.slow
class TestManyRandomHistoriesAhead(RandomHistoryAhead.TestCase):
    settings = settings(max_examples=600, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("seed", range(8))
def test_a_crowd_in_a_pool_for_two_finishes_with_preemptions(seed: int) -> None:
    harness = Harness(num_blocks=8, max_num_seqs=6, max_num_batched_tokens=20, seed=seed)
    for number in range(12):
        harness.add([1 + number % 3] * (10 + 5 * number), max_tokens=60 - 4 * number, n=1 + number % 3)
    harness.finish()
    assert sum(facts.preemptions for facts in harness.steps) > 0
    assert all(s.generated == s.max_tokens for record in harness.records for s in record.sequences)


def run(harness: Harness, tokens: list[int] | None = None, proposed: int = 0) -> Batch:
    """One step. tokens: what each decode gives, all of its drafts accepted; proposed: drafts for the next step."""
    plan = harness.plan()
    assert plan is not None
    result = plan.result
    if tokens is not None:
        verified = len(tokens) - 1
        result = replace(result, rounds=[Round(tokens, verified, verified, None) for _ in result.rounds])
    survival = np.where(np.arange(GAMMA) < proposed, np.float32(0.5), np.float32(0.0))
    draft = NextDraft(proposed, np.zeros(GAMMA, np.float32), survival)
    drafts = {s.id: draft for s in plan.batch.sequences} if proposed else {}
    harness.commit(replace(plan, result=replace(result, drafts=drafts)))
    return plan.batch


def test_a_step_serves_anchors_then_prompts_in_order_of_arrival_then_drafts() -> None:
    harness = Harness(num_blocks=20, max_num_batched_tokens=12)
    harness.add([1] * 4, max_tokens=20)
    run(harness, proposed=GAMMA)
    second, third = harness.add([2] * 9, max_tokens=5), harness.add([3] * 9, max_tokens=5)
    batch = run(harness)
    assert [decode.cap for decode in batch.decodes] == [GAMMA]
    assert [(p.sequence.record, p.count, p.ends) for p in batch.prefills] == [(second, 9, True), (third, 2, False)]
    assert batch.draft_room == 0


def test_drafts_end_one_short_of_the_longest_answer() -> None:
    harness = Harness()
    harness.add([1], max_tokens=4)
    run(harness, proposed=GAMMA)
    (decode,) = run(harness).decodes
    assert (decode.cap, decode.cap_reason) == (2, Reason.LENGTH)


def test_a_shortage_of_blocks_shortens_drafts_before_anyone_is_preempted() -> None:
    harness = Harness(num_blocks=3, max_num_batched_tokens=64)
    records = [harness.add([kind] * 14, max_tokens=18) for kind in (1, 2)]
    run(harness, proposed=GAMMA)
    batch = run(harness)
    assert [(decode.cap, decode.cap_reason) for decode in batch.decodes] == [(GAMMA, None), (1, Reason.KV)]
    assert [record.facts.preemptions for record in records] == [0, 0]


def test_an_admission_leaves_a_block_of_growth_for_each_that_runs() -> None:
    harness = Harness(num_blocks=5, max_num_batched_tokens=64)
    for kind in (1, 2, 3):
        harness.add([kind] * 14, max_tokens=10)
    run(harness)
    assert (len(harness.scheduler.running), len(harness.scheduler.waiting)) == (3, 0)
    harness.finish()
    # here the third prompt would still fit, but the first two could then not both go on to a second block
    smaller = Harness(num_blocks=4, max_num_batched_tokens=64)
    for kind in (1, 2, 3):
        smaller.add([kind] * 14, max_tokens=10)
    run(smaller)
    assert (len(smaller.scheduler.running), len(smaller.scheduler.waiting)) == (2, 1)
    smaller.finish()
    assert sum(facts.preemptions for facts in smaller.steps) == 0


def test_the_newest_is_preempted_and_resumes_where_its_blocks_are_still_cached() -> None:
    harness = Harness(num_blocks=3, max_num_batched_tokens=64)
    old, new = (harness.add([kind] * 14, max_tokens=18) for kind in (1, 2))
    while not new.facts.preemptions:
        run(harness)
    assert (old.facts.preemptions, new.sequences[0].status) == (0, Status.WAITING)
    assert harness.kv_cache.cached == 1
    while not old.finished:
        assert [decode.sequence.record for decode in run(harness).decodes] == [old]
    # all but its last token are in the cached block: there is nothing to compute before it goes on
    batch = run(harness)
    assert [decode.sequence.record for decode in batch.decodes] == [new]
    assert (batch.prefills, batch.started) == ([], new.sequences)
    harness.finish()


def test_a_preempted_sequence_goes_before_those_that_have_not_run() -> None:
    harness = Harness(num_blocks=3, max_num_batched_tokens=64)
    old, new, newer = (harness.add([kind] * 14, max_tokens=18) for kind in (1, 2, 3))
    while not new.facts.preemptions:
        run(harness)
    assert [sequence.record for sequence in harness.scheduler.waiting] == [new, newer]
    assert not old.finished
    harness.finish()


def test_what_was_computed_behind_a_stop_is_not_offered_to_other_prompts() -> None:
    harness = Harness(num_blocks=4)
    record = harness.add([1] * 12, max_tokens=20)
    run(harness, proposed=GAMMA)
    run(harness, tokens=[2, EOS, 3, 3, 3])
    assert (record.sequences[0].tokens[13:], record.finished) == ([2, EOS], True)
    assert (harness.kv_cache.used, harness.kv_cache.cached) == (0, 0)


def test_accepted_tokens_are_offered_to_other_prompts() -> None:
    harness = Harness(num_blocks=4, max_num_batched_tokens=64)
    record = harness.add([1] * 28, max_tokens=20)
    run(harness, proposed=GAMMA)
    run(harness, tokens=[2, 3, 2, 3, EOS])
    follow_up = harness.add([*record.sequences[0].tokens, 1, 2], max_tokens=5)
    assert [p.start for p in run(harness).prefills] == [32]
    assert follow_up.facts.cached_tokens == 32
    harness.finish()


def test_choices_start_from_the_shared_prompt_ahead_of_the_queue() -> None:
    harness = Harness(num_blocks=20, max_num_seqs=3, max_num_batched_tokens=100)
    record = harness.add([1] * 40, max_tokens=8, n=3)
    run(harness)
    later = harness.add([2] * 4, max_tokens=2)
    batch = run(harness)
    assert [(p.sequence.choice, p.start, p.count) for p in batch.prefills] == [(1, 32, 8), (2, 32, 8)]
    blocks = [sequence.blocks for sequence in record.sequences]
    assert blocks[0][:2] == blocks[1][:2] == blocks[2][:2]
    assert len({table[2] for table in blocks}) == 3
    assert [sequence.record for sequence in harness.scheduler.waiting] == [later]
    harness.finish()


def test_an_abort_between_steps_frees_at_once_and_one_during_a_step_at_its_commit() -> None:
    harness = Harness(max_num_batched_tokens=64)
    idle, flying, waiting = harness.add([1] * 20, 9), harness.add([2] * 20, 9, n=2), harness.add([3] * 20, 9)
    run(harness)
    harness.scheduler.abort(idle)
    assert (idle.finished, idle.sequences[0].blocks) == (True, [])
    plan = harness.plan()
    assert plan is not None
    harness.scheduler.abort(flying)
    assert (flying.finished, bool(flying.sequences[0].blocks)) == (False, True)
    harness.commit(plan)
    assert flying.finished
    assert len(flying.deltas) == 1, "only what came before the abort"
    assert not waiting.finished
    harness.finish()
    assert sum(facts.freed_after_cancel for facts in harness.steps) == 2


def test_finish_reasons_and_the_token_that_stops_are_delivered() -> None:
    harness = Harness()
    stopped = harness.add([1], 9)
    run(harness)
    run(harness, tokens=[EOS])
    ignored = harness.add([1], 2, sampling=SamplingParams(ignore_eos=True))
    run(harness)
    run(harness, tokens=[EOS])
    assert [(d.token_ids[-1], d.finish_reason) for d in (stopped.deltas[-1], ignored.deltas[-1])] == [
        (EOS, FinishReason.STOP),
        (EOS, FinishReason.LENGTH),
    ]


# Planned ahead: while the step before is in flight


def plan_ahead(harness: Harness, tokens: list[int] | None = None, proposed: int = GAMMA) -> Plan:
    """A step that stays in flight, and drafts for everybody. tokens: as for `run`; known to nobody before the commit."""
    plan = harness.plan()
    assert plan is not None
    if tokens is not None:
        verified = len(tokens) - 1
        plan.result.rounds = [
            NO_ROUND if round_ is NO_ROUND else Round(tokens, verified, verified, None) for round_ in plan.result.rounds
        ]
    survival = np.where(np.arange(GAMMA) < proposed, np.float32(0.5), np.float32(0.0))
    plan.expected = {s.id: ExpectedDraft(GAMMA, free=False) for s in plan.batch.sequences}
    plan.result.drafts = {
        s.id: NextDraft(proposed, np.zeros(GAMMA, np.float32), survival) for s in plan.batch.sequences
    }
    return plan


def test_a_plan_ahead_has_blocks_for_all_that_may_be_accepted_before_it() -> None:
    harness = Harness(num_blocks=20, max_num_batched_tokens=64)
    (sequence,) = harness.add([1] * 22, max_tokens=40).sequences
    run(harness, proposed=GAMMA)
    plan_ahead(harness, tokens=[2])
    assert len(sequence.blocks) * BLOCK_SIZE == 32
    (decode,) = plan_ahead(harness, tokens=[2, 2]).batch.decodes
    assert (sequence.computed, sequence.surely_computed, sequence.furthest) == (22, 24, 32)
    assert (decode.draft, decode.proposed, decode.cap) == (None, GAMMA, GAMMA)
    assert len(sequence.blocks) * BLOCK_SIZE == 32
    # the first gave one token: the second starts 4 positions earlier than it might have
    harness.commit(harness.in_flight[0])
    assert (sequence.computed, sequence.surely_computed, sequence.furthest) == (23, 24, 28)
    harness.commit(harness.in_flight[0])
    assert (sequence.computed, len(sequence.tokens)) == (25, 26)


def test_what_the_step_before_drafted_takes_the_place_of_bounds_when_it_is_committed() -> None:
    harness = Harness(num_blocks=20, max_num_batched_tokens=64)
    harness.add([1] * 4, max_tokens=11)
    run(harness, proposed=GAMMA)
    plan_ahead(harness, tokens=[2, 2, 2, 2, 2], proposed=GAMMA)
    behind = plan_ahead(harness, tokens=[2, 2])
    (bound,) = behind.batch.decodes
    assert (bound.cap, bound.cap_reason) == (GAMMA, None), "9 tokens are left after the one that is sure"
    harness.commit(harness.in_flight[0])
    (known,) = behind.batch.decodes
    assert known.draft is not None
    assert (known.cap, known.cap_reason) == (GAMMA, None), "5 tokens are left"
    last = plan_ahead(harness, tokens=[2, 2])
    harness.commit(harness.in_flight[0])
    (known,) = last.batch.decodes
    assert (known.proposed, known.cap, known.cap_reason) == (GAMMA, 2, Reason.LENGTH), "3 are left"


def test_blocks_that_could_not_be_had_for_what_may_be_shorten_what_is() -> None:
    harness = Harness(num_blocks=2, max_num_batched_tokens=64)
    harness.add([1] * 21, max_tokens=11)
    run(harness, proposed=GAMMA)
    plan_ahead(harness, tokens=[2])
    other = harness.add([2], max_tokens=1)
    behind = plan_ahead(harness, tokens=[2])
    assert other.sequences[0].status is Status.WAITING
    assert [(d.cap, d.cap_reason) for d in behind.batch.decodes] == [(GAMMA, None)], (
        "no position behind the last is asked for"
    )
    wide = Harness(num_blocks=3, max_num_batched_tokens=64)
    for kind in (1, 2):
        wide.add([kind] * 10, max_tokens=20)
    run(wide, proposed=GAMMA)
    plan_ahead(wide, tokens=[2])
    # the anchors fit into 16 positions however much is accepted; for drafts behind them there is one more block
    behind = plan_ahead(wide, tokens=[2])
    assert [(d.cap, d.cap_reason) for d in behind.batch.decodes] == [(GAMMA, None), (0, Reason.KV)]
    wide.commit(wide.in_flight[0])
    assert [(d.proposed, d.cap, d.cap_reason) for d in behind.batch.decodes] == [
        (GAMMA, GAMMA, None),
        (GAMMA, 0, Reason.KV),
    ]
    wide.finish()


def test_who_surely_ends_in_the_step_in_flight_is_not_in_the_next() -> None:
    harness = Harness(num_blocks=20, max_num_batched_tokens=64)
    two, three = harness.add([1] * 4, max_tokens=2), harness.add([2] * 4, max_tokens=3)
    run(harness)
    plan_ahead(harness, tokens=[2])
    assert [d.sequence.record for d in plan_ahead(harness, tokens=[2]).batch.decodes] == [three]
    assert harness.plan() is None, "and nothing is left to plan"
    for _ in range(2):
        harness.commit(harness.in_flight[0])
    assert (two.finished, three.finished) == (True, True)


def test_nobody_gives_way_while_a_step_is_in_flight() -> None:
    harness = Harness(num_blocks=3, max_num_batched_tokens=64)
    old, new = (harness.add([kind] * 14, max_tokens=18) for kind in (1, 2))
    run(harness)
    while (plan := harness.plan()) is not None:
        if len(harness.in_flight) == 2:
            harness.commit(harness.in_flight[0])
    assert (len(harness.in_flight), old.facts.preemptions, new.facts.preemptions) == (1, 0, 0)
    harness.commit(harness.in_flight[0])
    plan = harness.plan()
    assert plan is not None
    assert (old.facts.preemptions, new.facts.preemptions) == (0, 1)
    assert [sequence.record for sequence in plan.batch.sequences] == [old]


def test_a_stop_that_only_the_commit_sees_costs_one_round_that_is_dropped_and_frees_the_blocks_at_once() -> None:
    harness = Harness(num_blocks=3, max_num_seqs=2, max_num_batched_tokens=64, vocab=3)
    stopped = harness.add([1] * 20, max_tokens=20, stop_check=stop_on_three)
    run(harness, proposed=GAMMA)
    plan_ahead(harness, tokens=[2, 3, 2])
    behind = plan_ahead(harness, tokens=[2, 2, 2])
    blocks = set(stopped.sequences[0].blocks)
    late = harness.add([2] * 40, max_tokens=4)
    harness.commit(harness.in_flight[0])
    assert (stopped.finished, stopped.sequences[0].tokens[21:]) == (True, [2, 3])
    assert harness.kv_cache.used == 0
    assert set(behind.batch.left) == blocks
    # its last round is still in flight when they are given away
    third = harness.plan()
    assert third is not None
    assert blocks <= set(late.sequences[0].blocks)
    assert third.batch.ended == [stopped.sequences[0].id]
    before = len(harness.steps)
    harness.commit(harness.in_flight[0])
    assert (harness.steps[before].generated, harness.steps[before].verified) == (0, 0)
    assert stopped.sequences[0].tokens[21:] == [2, 3]
    assert sum(len(delta.token_ids) for delta in stopped.deltas) == 3
    harness.finish()


def test_blocks_left_in_a_step_that_fails_are_cleared_before_they_are_used_again() -> None:
    harness = Harness(num_blocks=4, max_num_seqs=2, max_num_batched_tokens=64, vocab=3)
    stopped = harness.add([1] * 20, max_tokens=20, stop_check=stop_on_three)
    going = harness.add([2] * 4, max_tokens=9)
    run(harness)
    plan_ahead(harness, tokens=[3], proposed=0)
    plan_ahead(harness, tokens=[2])
    shareable, left = stopped.sequences[0].blocks[:1], stopped.sequences[0].blocks[1:]
    harness.commit(harness.in_flight[0])
    assert stopped.finished
    late = harness.add([3] * 20, max_tokens=4)
    third = harness.plan()
    assert third is not None
    assert left[0] in late.sequences[0].blocks
    own = {*going.sequences[0].blocks, *late.sequences[0].blocks}
    assert harness.fail_in_runner(harness.in_flight[0]) is None
    again = harness.plan()
    assert again is not None
    assert set(again.batch.wiped) == own | set(left)
    assert not set(shareable) & set(again.batch.wiped)
    harness.finish()


def test_one_that_is_aborted_is_not_planned_again_and_is_freed_by_the_oldest_step() -> None:
    harness = Harness(num_blocks=20, max_num_batched_tokens=64)
    flying, other = harness.add([1] * 20, 9), harness.add([2] * 20, 9)
    run(harness)
    plan_ahead(harness, tokens=[2])
    plan_ahead(harness, tokens=[2])
    harness.scheduler.abort(flying)
    assert not flying.finished
    harness.commit(harness.in_flight[0])
    assert flying.finished
    third = harness.plan()
    assert third is not None
    assert [sequence.record for sequence in third.batch.sequences] == [other]
    deltas = len(flying.deltas)
    harness.finish()
    assert len(flying.deltas) == deltas
    assert sum(facts.freed_after_cancel for facts in harness.steps) == 1


def test_two_steps_in_flight_are_planned_again_together_and_those_of_the_first_are_accused() -> None:
    harness = Harness(num_blocks=20, max_num_seqs=2, max_num_batched_tokens=64)
    inside = harness.add([1] * 20, 9)
    run(harness)
    plan_ahead(harness, tokens=[2])
    later = harness.add([2] * 20, 9)
    behind = plan_ahead(harness, tokens=[2])
    assert {sequence.record for sequence in behind.batch.sequences} == {inside, later}
    assert harness.fail_in_runner(harness.in_flight[0]) is None
    assert harness.scheduler.running == []
    plan = harness.plan()
    assert plan is not None
    assert [sequence.record for sequence in plan.batch.sequences] == [inside], "the other waits until it is cleared"
    assert harness.fail_in_runner(plan) is inside
    harness.finish()
    assert later.sequences[0].generated == 9


# Priorities, shortage, and steps that fail


def test_the_urgent_start_first_and_the_least_urgent_newest_gives_way() -> None:
    harness = Harness(num_blocks=3, max_num_batched_tokens=64)
    late, later, urgent = (harness.add([kind] * 14, 18, priority=p) for kind, p in ((1, 5), (2, 5), (3, -5)))
    started = [prefill.sequence.record for prefill in run(harness).prefills]
    assert started[0] is urgent
    assert later not in started
    while not any(record.facts.preemptions for record in (late, later, urgent)):
        run(harness)
    assert late.facts.preemptions == 1
    assert [s.record for s in harness.scheduler.waiting] == [late, later]
    harness.finish()


def test_a_request_that_was_preempted_goes_before_others_of_its_priority_but_not_before_more_urgent_ones() -> None:
    harness = Harness(num_blocks=3, max_num_batched_tokens=64)
    _, preempted = harness.add([1] * 14, 18), harness.add([2] * 14, 18)
    while not preempted.facts.preemptions:
        run(harness)
    fresh, urgent = harness.add([4] * 14, 2), harness.add([3] * 14, 2, priority=-1)
    assert [s.record for s in harness.scheduler.waiting] == [urgent, preempted, fresh]
    harness.finish()


def test_a_step_that_failed_once_ends_nobody_and_its_sequences_run_before_any_other() -> None:
    harness = Harness(num_blocks=20, max_num_seqs=2, max_num_batched_tokens=64)
    inside = [harness.add([1] * 20, 9), harness.add([2] * 20, 9)]
    plan = harness.plan()
    assert plan is not None
    urgent = harness.add([3] * 20, 9, priority=-1)
    assert harness.fail_in_runner(plan) is None
    again = run(harness)
    assert [sequence.record for sequence in again.sequences] == inside
    harness.finish()
    assert [record.sequences[0].generated for record in (*inside, urgent)] == [9, 9, 9]


@pytest.mark.parametrize("guilty", range(7))
def test_the_request_that_breaks_every_step_is_found_and_the_others_finish(guilty: int) -> None:
    harness = Harness(num_blocks=40, max_num_seqs=7, max_num_batched_tokens=256)
    records = [harness.add([kind] * 20, 9) for kind in range(7)]
    for _ in range(3):
        run(harness)
    failed, ended = 0, []
    while not all(record.finished for record in records):
        plan = harness.plan()
        assert plan is not None
        if records[guilty] in {sequence.record for sequence in plan.batch.sequences}:
            failed += 1
            found = harness.fail_in_runner(plan)
            ended += [found] if found else []
        else:
            harness.commit(plan)
    assert ended == [records[guilty]]
    assert 4 <= failed <= 7, "all, all again, then halves of seven, and alone"
    assert [r.sequences[0].generated for r in records if r is not records[guilty]] == [9] * 6
    harness.finish()


def test_one_that_was_cleared_and_breaks_the_next_step_costs_its_neighbour_nothing() -> None:
    harness = Harness(num_blocks=40, max_num_seqs=2, max_num_batched_tokens=64)
    moody, neighbour = harness.add([1] * 20, 9), harness.add([2] * 20, 9)
    passes = 0
    while not moody.finished:
        plan = harness.plan()
        assert plan is not None
        inside = {sequence.record for sequence in plan.batch.sequences}
        passes += moody in inside
        if moody in inside and passes % 2:  # every second step that it is in
            assert harness.fail_in_runner(plan) is None
        else:
            harness.commit(plan)
    harness.finish()
    assert moody.sequences[0].generated == neighbour.sequences[0].generated == 9


def test_a_step_whose_commit_fails_ends_its_requests_and_no_others() -> None:
    harness = Harness(num_blocks=20, max_num_seqs=2, max_num_batched_tokens=64)
    inside = [harness.add([1] * 20, 9), harness.add([2] * 20, 9, n=3)]
    outside = harness.add([3] * 20, 9)
    plan = harness.plan()
    assert plan is not None
    assert harness.fail(plan) == inside
    assert not outside.finished
    assert harness.kv_cache.used == 0
    harness.finish()
    assert outside.sequences[0].generated == 9


def test_the_blocks_a_failed_step_may_have_written_are_cleared_before_they_are_used_again() -> None:
    harness = Harness(num_blocks=4, max_num_batched_tokens=64)
    harness.add([1] * 40, 9)
    run(harness)  # two full blocks of committed tokens are offered to others; the third is half full
    plan = harness.plan()
    assert plan is not None
    (failed,) = {decode.sequence for decode in plan.batch.decodes}
    shared, own = failed.blocks[:2], failed.blocks[2:]
    harness.fail_in_runner(plan)
    batch = run(harness)
    assert batch.wiped == own
    assert batch.prefills[0].start == 32, "what was committed before is still there"
    assert not set(batch.wiped) & set(shared)
    assert run(harness).wiped == []
    harness.finish()


def test_a_step_that_runs_out_of_memory_is_planned_again_in_smaller_ones_until_a_single_row_fails_twice() -> None:
    harness = Harness(num_blocks=20, max_num_seqs=4, max_num_batched_tokens=32)
    records = [harness.add([kind] * 20, 9) for kind in (1, 2, 3)]
    limits = []
    while True:
        plan = harness.plan()
        assert plan is not None
        if not harness.run_out_of_memory(plan):
            break
        limits.append(harness.scheduler.step_tokens)
    assert limits == [16, 8, 4, 2, 1]
    assert harness.fail_in_runner(plan) is None
    alone = harness.plan()
    assert alone is not None
    assert harness.fail_in_runner(alone) is records[0]
    harness.finish()
    assert [record.sequences[0].generated for record in records] == [0, 9, 9]


def test_after_enough_good_steps_the_limit_is_what_it_was() -> None:
    harness = Harness(num_blocks=40, max_num_batched_tokens=32)
    harness.add([1] * 20, 400)
    plan = harness.plan()
    assert plan is not None
    assert harness.run_out_of_memory(plan)
    assert harness.scheduler.step_tokens == 10
    for _ in range(GOOD_STEPS):
        harness.step()
    assert harness.scheduler.step_tokens == 20
    for _ in range(GOOD_STEPS):
        harness.step()
    assert harness.scheduler.step_tokens == 32
    harness.finish()


def test_a_request_aborted_in_a_step_that_runs_out_of_memory_is_freed_with_it() -> None:
    harness = Harness(max_num_batched_tokens=32)
    record = harness.add([1] * 20, 9)
    plan = harness.plan()
    assert plan is not None
    freed: list[float] = []
    record.on_freed = lambda: freed.append(record.facts.finished_s - record.facts.cancelled_s)
    harness.scheduler.abort(record)
    assert freed == []
    assert harness.run_out_of_memory(plan)
    assert (record.finished, harness.kv_cache.used, len(freed)) == (True, 0, 1)
    assert freed[0] >= 0.0
