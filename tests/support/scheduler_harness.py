"""A scheduler driven without tensors: random rounds in place of a runner's, and every promise checked at every step.

Plans may be made before the one in flight is committed. Then the harness, like a runner, knows what the scheduler does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np
from fakes import RandomAllocation, RecordedCost
from identities import assert_identities

from dspark.engine import EngineConfig, Request, RequestFacts, SamplingParams, StepFacts, StopCheck
from dspark.engine.calibration import Calibration
from dspark.engine.kv_cache import BLOCK_SIZE, KVCache
from dspark.engine.load_controller import Allocation, fill_budget
from dspark.engine.scheduler import Scheduler
from dspark.engine.sequence import (
    NO_ROUND,
    Batch,
    Decode,
    ExpectedDraft,
    NextDraft,
    RequestRecord,
    Round,
    Sequence,
    Status,
    StepResult,
)
from dspark.engine.step_facts import step_load
from dspark.engine.waiting_queue import rank

GAMMA = 4
EOS = 0


@dataclass
class Plan:
    """A step between schedule and commit."""

    batch: Batch
    allocation: Allocation
    result: StepResult
    expected: dict[int, ExpectedDraft] = field(default_factory=dict)


@dataclass
class Truth:
    """What a runner knows of a sequence where the scheduler has bounds. length: tokens; ended: by length or end of text."""

    length: int
    draft: NextDraft | None
    ended: bool = False


@dataclass
class Harness:
    """`vocab`: output tokens are drawn from 1..vocab-1, so that nothing ends by itself; `plan.result` may be edited.

    eos_rate: probability of an end of text in their place.
    """

    num_blocks: int = 12
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 24
    seed: int = 0
    vocab: int = 4
    eos_rate: float = 0.0
    lag: int = 0
    steps: list[StepFacts] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kv_cache = KVCache(self.num_blocks)
        self.scheduler = Scheduler(self.kv_cache, self.max_num_seqs, self.max_num_batched_tokens, frozenset({EOS}))
        config = EngineConfig(max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.max_num_batched_tokens)
        self.controller = RandomAllocation("adaptive", GAMMA, RecordedCost(config), Calibration(GAMMA))
        self.records: list[RequestRecord] = []
        self.in_flight: deque[Plan] = deque()
        self.known_to_runner: set[int] = set()
        self._random = np.random.default_rng(self.seed)
        self._next_id = 0
        self._faulty = False

    def add(
        self,
        prompt: Items[int],
        max_tokens: int,
        n: int = 1,
        sampling: SamplingParams | None = None,
        priority: int = 0,
        tenant: bytes = b"",
        stop_check: StopCheck | None = None,
    ) -> RequestRecord:
        assert len(prompt) + max_tokens <= self.num_blocks * BLOCK_SIZE, "submit would have refused it"
        request = Request(tuple(prompt), sampling or SamplingParams(), n, priority=priority, cache_salt=tenant)
        record = RequestRecord(request, RequestFacts(len(prompt), 0.0))
        for choice in range(n):
            tokens = list(prompt)
            record.sequences.append(
                Sequence(
                    self._next_id, record, choice, self._next_id, max_tokens, stop_check, tokens, len(tokens), tenant
                )
            )
            self._next_id += 1
        self.records.append(record)
        self.scheduler.add(record)
        return record

    def plan(self) -> Plan | None:
        """Schedule, and make up what the runner brings back. None when idle, or when the plan in flight must come first."""
        oldest = self.scheduler.running[0] if self.scheduler.running else None
        had_work = self.scheduler.has_work
        batch = self.scheduler.schedule(self.in_flight[-1].expected if self.in_flight else {})
        self.check()
        if batch is None:
            assert not had_work or self.in_flight, "there was work and nothing was planned"
            return None
        if not self.in_flight:
            assert oldest is None or oldest in batch.sequences, "the oldest did not go on"
        self._check_batch(batch)
        load = step_load(batch, self.controller)
        assert load.known == (not any(decode.expected for decode in batch.decodes))
        allocation = self.controller.allocate(load)
        truths = [self._truth(sequence) for sequence in batch.sequences]
        decoding = list(zip(batch.decodes, truths, strict=False))
        lengths = self._lengths(decoding, allocation.budget)
        assert sum(lengths) <= batch.draft_room
        self._check_positions(batch, truths, lengths)
        rounds = [
            NO_ROUND if truth.ended else self._round(length)
            for (_, truth), length in zip(decoding, lengths, strict=True)
        ]
        firsts = [self._round(0) for prefill in batch.prefills if prefill.ends]
        drafted = [d.sequence for d, wanted in zip(batch.decodes, allocation.draft_next, strict=True) if wanted]
        drafted += [prefill.sequence for prefill in batch.prefills if prefill.ends and allocation.draft_new]
        expected = {sequence.id: ExpectedDraft(0, free=True) for sequence in batch.sequences}
        expected |= {sequence.id: ExpectedDraft(GAMMA, free=False) for sequence in drafted}
        plan = Plan(
            batch, allocation, StepResult(rounds, firsts, [], GAMMA, {}, sum(lengths), 0.0, 0.0, 0.0, 0.0), expected
        )
        self.in_flight.append(plan)
        going = [sequence for sequence in drafted if not self._truth(sequence).ended]
        plan.result.drafts = {sequence.id: self._draft() for sequence in going}
        plan.result.drafted = [*plan.result.drafts]
        plan.result.rows = sum(not truth.ended for _, truth in decoding) + sum(lengths) + batch.prefill_rows
        return plan

    def _truth(self, sequence: Sequence) -> Truth:
        """After all plans in flight."""
        truth = Truth(len(sequence.tokens), sequence.draft)
        for plan in self.in_flight:
            ending = [prefill.sequence for prefill in plan.batch.prefills if prefill.ends]
            sampled = [*(decode.sequence for decode in plan.batch.decodes), *ending]
            rounds = [*plan.result.rounds, *plan.result.first_rounds]
            for other, round_ in zip(sampled, rounds, strict=True):
                if other is sequence and not truth.ended:
                    truth.length += len(round_.tokens)
                    truth.draft = plan.result.drafts.get(sequence.id)
                    full = truth.length >= sequence.prompt_len + sequence.max_tokens
                    truth.ended = full or EOS in round_.tokens
        return truth

    def _lengths(self, decoding: Items[tuple[Decode, Truth]], budget: int) -> list[int]:
        """Drafts verified of each decode: those that there are, no more than are of use, within budget and caps."""
        survival, caps = np.zeros((len(decoding), GAMMA), np.float32), np.zeros(len(decoding), np.int32)
        for i, (decode, truth) in enumerate(decoding):
            if truth.draft is not None and not truth.ended:
                left = decode.sequence.prompt_len + decode.sequence.max_tokens - truth.length
                survival[i], caps[i] = truth.draft.survival, min(decode.cap, truth.draft.proposed, left - 1)
        lengths: list[int] = fill_budget(survival, caps, budget).tolist()
        return lengths

    def _check_positions(self, batch: Batch, truths: Items[Truth], lengths: Items[int]) -> None:
        """Whatever is really written lies in the sequence's own blocks, behind those that others may share."""
        for decode, truth, length in zip(batch.decodes, truths, lengths, strict=False):
            if not truth.ended:
                assert truth.length + length <= len(decode.sequence.blocks) * BLOCK_SIZE
                shareable = decode.sequence.blocks[: (truth.length - 1) // BLOCK_SIZE]
                own = decode.sequence.blocks[len(shareable) :]
                assert self.kv_cache.unnamed(own) == own

    def commit(self, plan: Plan) -> None:
        assert self.in_flight.popleft().batch is plan.batch
        facts = StepFacts()
        expected = {id(decode): decode for decode in plan.batch.decodes}
        assert not any(decode.expected for decode in expected.values()), "it is committed before its drafts are known"
        self.scheduler.commit(plan.batch, plan.allocation, plan.result, facts)
        assert_identities(facts)
        if self.in_flight:
            behind = self.in_flight[0]
            load = step_load(behind.batch, self.controller)
            assert load.known
            behind.allocation = self.controller.resolve(load, behind.allocation)
        self.steps.append(facts)
        self.check()

    def fail(self, plan: Plan) -> list[RequestRecord]:
        """Commit raised, the runner having seen all of the plans in flight."""
        self._faulty = True
        failed = self.scheduler.fail()
        assert {s.record for one in self.in_flight for s in one.batch.sequences} == set(failed)
        assert plan is self.in_flight[0]
        self.in_flight.clear()
        assert all(record.finished for record in failed)
        self.check()
        return failed

    def fail_in_runner(self, plan: Plan) -> RequestRecord | None:
        """The runner raised at this plan, having seen all of those in flight; returns the request that ends for it."""
        self._faulty = True
        assert plan.batch is self.in_flight[0].batch
        flying = {sequence for one in self.in_flight for sequence in one.batch.sequences}
        self.in_flight.clear()
        running = {s.record for s in plan.batch.sequences if s.status is Status.RUNNING}
        guilty = self.scheduler.retry(plan.batch)
        assert guilty is None or (guilty.finished and running == {guilty})
        assert not any(sequence in self.scheduler.running for sequence in flying)
        self.check()
        return guilty

    def run_out_of_memory(self, plan: Plan) -> bool:
        """The runner ran out of memory; False: and there is nothing smaller to try."""
        self._faulty = True
        rows_before = self.scheduler.step_tokens
        retried = self.scheduler.retry_smaller(plan.batch)
        if retried:
            self.in_flight.clear()
        assert not retried or 1 <= self.scheduler.step_tokens <= rows_before // 2
        assert not retried or not self.scheduler.running
        self.check()
        return retried

    def step(self) -> bool:
        """As the loop does it; False: nothing to do."""
        planned = self.plan()
        if planned is None or len(self.in_flight) > self.lag:
            if not self.in_flight:
                return False
            self.commit(self.in_flight[0])
        return True

    def finish(self) -> None:
        """Step until idle: everything that was asked for must end, in no more steps than tokens must be computed."""
        # a preempted sequence computes its tokens again; the oldest never does, so each finishes in turn
        most = sum(len(s.tokens) + s.max_tokens for record in self.records for s in record.sequences)
        most *= (2 if self._faulty else 1) * (1 + self.lag)
        for _ in range(most + 1):
            if not self.step():
                break
        assert not self.scheduler.has_work
        assert all(record.finished for record in self.records)
        assert self.kv_cache.used == 0
        self.kv_cache.check()

    def check(self) -> None:
        """Blocks are referenced by running sequences and by nothing else; limits hold."""
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        self.kv_cache.check([sequence.blocks for sequence in running])
        assert len(running) <= self.max_num_seqs
        assert [rank(s) for s in running] == sorted(rank(s) for s in running)
        assert all(s.status is Status.RUNNING for s in running)
        assert all(s.status is Status.WAITING and not s.blocks for s in waiting)
        assert len({s.id for s in [*running, *waiting]}) == len(running) + len(waiting)

    def _check_batch(self, batch: Batch) -> None:
        assert len(set(batch.sequences)) == len(batch.sequences)
        assert len(batch.decodes) + batch.prefill_rows + batch.draft_room == self.scheduler.step_tokens
        assert batch.draft_room >= 0
        assert not any(sequence.record.aborted for sequence in batch.sequences)
        for decode in batch.decodes:
            assert 0 <= decode.cap <= decode.proposed
            assert decode.cap < decode.sequence.remaining
            assert decode.sequence.computed + 1 + decode.cap <= len(decode.sequence.blocks) * BLOCK_SIZE
            assert (decode.expected is not None) == (len(decode.sequence.in_flight) > 1)
        for prefill in batch.prefills:
            assert prefill.count > 0
            assert prefill.start + prefill.count <= len(prefill.sequence.blocks) * BLOCK_SIZE
        for ended in batch.ended:
            # what a failed step had come to is not known, so its sequences are ended again
            assert self._faulty or ended in self.known_to_runner
            self.known_to_runner.discard(ended)
        for started in batch.started:
            assert started.id not in self.known_to_runner
            self.known_to_runner.add(started.id)
        assert {sequence.id for sequence in batch.sequences} <= self.known_to_runner

    def _round(self, verified: int) -> Round:
        accepted = int(self._random.integers(0, verified + 1))
        tokens = self._random.integers(1, self.vocab, accepted + 1)
        tokens[self._random.random(accepted + 1) < self.eos_rate] = EOS
        return Round(tokens.tolist(), verified, accepted, None)

    def _draft(self) -> NextDraft:
        survival = np.sort(self._random.random(GAMMA).astype(np.float32))[::-1].copy()
        proposed = int(self._random.integers(1, GAMMA + 1))
        survival[proposed:] = 0.0
        return NextDraft(proposed, np.zeros(GAMMA, np.float32), survival)
