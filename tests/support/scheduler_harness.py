"""A scheduler driven without tensors: random rounds in place of a runner's, and every promise checked at every step."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np
from fakes import RandomAllocation, RecordedCost

from dspark.engine import EngineConfig, Request, RequestFacts, SamplingParams, StepFacts
from dspark.engine.calibration import Calibration
from dspark.engine.kv_cache import BLOCK_SIZE, KVCache
from dspark.engine.load_controller import Allocation, fill_budget
from dspark.engine.scheduler import Scheduler
from dspark.engine.sequence import Batch, NextDraft, RequestRecord, Round, Sequence, Status, StepResult
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


@dataclass
class Harness:
    """`vocab`: output tokens are drawn from 1..vocab-1, so that nothing ends by itself; `plan.result` may be edited."""

    num_blocks: int = 12
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 24
    seed: int = 0
    vocab: int = 4
    steps: list[StepFacts] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kv_cache = KVCache(self.num_blocks)
        self.scheduler = Scheduler(self.kv_cache, self.max_num_seqs, self.max_num_batched_tokens, frozenset({EOS}))
        config = EngineConfig(max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.max_num_batched_tokens)
        self.controller = RandomAllocation("adaptive", GAMMA, RecordedCost(config), Calibration(GAMMA))
        self.records: list[RequestRecord] = []
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
    ) -> RequestRecord:
        assert len(prompt) + max_tokens <= self.num_blocks * BLOCK_SIZE, "submit would have refused it"
        request = Request(tuple(prompt), sampling or SamplingParams(), n, priority=priority, cache_salt=tenant)
        record = RequestRecord(request, RequestFacts(len(prompt), 0.0))
        for choice in range(n):
            tokens = list(prompt)
            record.sequences.append(
                Sequence(self._next_id, record, choice, self._next_id, max_tokens, None, tokens, len(tokens), tenant)
            )
            self._next_id += 1
        self.records.append(record)
        self.scheduler.add(record)
        return record

    def plan(self) -> Plan | None:
        """Schedule, and make up what the runner brings back. None when idle."""
        oldest = self.scheduler.running[0] if self.scheduler.running else None
        had_work = self.scheduler.has_work
        batch = self.scheduler.schedule()
        self.check()
        if batch is None:
            assert not had_work, "there was work and nothing was planned"
            return None
        assert oldest is None or oldest in batch.sequences, "the oldest did not go on"
        self._check_batch(batch)
        load = step_load(batch, GAMMA)
        allocation = self.controller.allocate(load)
        lengths = fill_budget(load.survival, load.caps, allocation.budget).tolist()
        assert sum(lengths) <= batch.draft_room
        rounds = [self._round(length) for length in lengths]
        firsts = [self._round(0) for prefill in batch.prefills if prefill.ends]
        drafted = [d.sequence for d, wanted in zip(batch.decodes, allocation.draft_next, strict=True) if wanted]
        drafts = {sequence.id: self._draft() for sequence in drafted}
        rows = len(lengths) + sum(lengths) + batch.prefill_rows
        return Plan(batch, allocation, StepResult(rounds, firsts, [*drafts], GAMMA, drafts, rows, 0.0, 0.0, 0.0, 0.0))

    def commit(self, plan: Plan) -> None:
        facts = StepFacts()
        self.scheduler.commit(plan.batch, plan.allocation, plan.result, facts)
        self.steps.append(facts)
        self.check()

    def fail(self, plan: Plan) -> list[RequestRecord]:
        """Commit raised, the runner having seen all of the plan."""
        self._faulty = True
        failed = self.scheduler.fail(plan.batch)
        assert {s.record for s in plan.batch.sequences} == set(failed)
        assert all(record.finished for record in failed)
        self.check()
        return failed

    def fail_in_runner(self, plan: Plan) -> RequestRecord | None:
        """The runner raised, having seen all of the plan; returns the request that ends for it."""
        self._faulty = True
        guilty = self.scheduler.retry(plan.batch)
        assert guilty is None or (guilty.finished and {s.record for s in plan.batch.sequences} == {guilty})
        assert not any(sequence in self.scheduler.running for sequence in plan.batch.sequences)
        self.check()
        return guilty

    def run_out_of_memory(self, plan: Plan) -> bool:
        """The runner ran out of memory; False: and there is nothing smaller to try."""
        self._faulty = True
        rows_before = self.scheduler.step_tokens
        retried = self.scheduler.retry_smaller(plan.batch)
        assert not retried or 1 <= self.scheduler.step_tokens <= rows_before // 2
        assert not retried or not self.scheduler.running
        self.check()
        return retried

    def step(self) -> bool:
        plan = self.plan()
        if plan is not None:
            self.commit(plan)
        return plan is not None

    def finish(self) -> None:
        """Step until idle: everything that was asked for must end, in no more steps than tokens must be computed."""
        # a preempted sequence computes its tokens again; the oldest never does, so each finishes in turn
        most = sum(len(s.tokens) + s.max_tokens for record in self.records for s in record.sequences)
        most *= 2 if self._faulty else 1
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
        for decode in batch.decodes:
            assert 0 <= decode.cap <= decode.proposed
            assert decode.cap < decode.sequence.remaining
            assert decode.sequence.computed + 1 + decode.cap <= len(decode.sequence.blocks) * BLOCK_SIZE
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
        return Round(self._random.integers(1, self.vocab, accepted + 1).tolist(), verified, accepted, None)

    def _draft(self) -> NextDraft:
        survival = np.sort(self._random.random(GAMMA).astype(np.float32))[::-1].copy()
        proposed = int(self._random.integers(1, GAMMA + 1))
        survival[proposed:] = 0.0
        return NextDraft(proposed, np.zeros(GAMMA, np.float32), survival)
