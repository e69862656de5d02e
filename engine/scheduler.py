"""Who runs in a step, and what a step's result means for each sequence.

Token budget of a step, in this order: anchors, prefill chunks, drafts. Blocks: a sequence is admitted with blocks for all its
tokens; while decoding it grows by a block at a time. When none is left, drafts are shortened first, then the least urgent
sequence is preempted, the newest of these first: it gives its blocks back and later recomputes what is no longer in the prefix
cache. The oldest of the most urgent can always run, since a request that could not run alone is refused at submit.

A step that fails is planned again from its sequences' committed tokens; until each has been in a step that succeeded nobody
else starts (see suspects.py). Whatever it wrote lies behind what its sequences had computed, in blocks that are theirs alone:
only full blocks of computed, committed tokens are shared. One that ran out of memory is planned again in smaller steps.

A step may be planned while another is in flight. How many tokens that one gives is then known within bounds, so blocks are
given for the most, and whoever surely ends in it is left out; what it drafted becomes known when it is committed (`_resolve`).
Nobody is preempted meanwhile. A sequence that ends all the same, by a stop that only its commit sees, has one round too many in
the step behind, which is dropped. Its blocks are free at once: steps are computed in the order in which they were planned, so
whoever gets the blocks next writes after that round, which writes behind what was computed and so never to a published block.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Mapping

from dspark.engine.accounting import count_round
from dspark.engine.facts import Reason, StepFacts
from dspark.engine.kv_cache import BLOCK_SIZE, KVCache, blocks_for
from dspark.engine.load_controller import Allocation
from dspark.engine.request import FinishReason, TokenDelta
from dspark.engine.sequence import (
    Batch,
    Decode,
    ExpectedDraft,
    NextDraft,
    Prefill,
    RequestRecord,
    Round,
    Sequence,
    Status,
    StepResult,
)
from dspark.engine.suspects import Suspects
from dspark.engine.waiting_queue import WaitingQueue, rank

GOOD_STEPS = 64
"""After so many steps that did not run out of memory a limit that was lowered is doubled."""


class Scheduler:
    """One thread. Each step that `schedule` plans comes to `commit`, in order, or to `retry`, `retry_smaller` or `fail`, which

    take back what was planned behind it as well. `add` and `abort` come in between.
    """

    def __init__(
        self, kv_cache: KVCache, max_num_seqs: int, max_num_batched_tokens: int, stop_token_ids: frozenset[int]
    ) -> None:
        """stop_token_ids: the model's own ends of text."""
        self.kv_cache = kv_cache
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # most urgent first, then in order of arrival
        self.step_tokens = max_num_batched_tokens
        """Rows of one step, at most; fewer for a while after a step ran out of memory."""
        self._max_num_seqs = max_num_seqs
        self._max_tokens = max_num_batched_tokens
        self._good_steps = 0
        self._in_flight: deque[Batch] = deque()
        self._suspects = Suspects()
        self._wiped: list[int] = []
        self._stop_token_ids = stop_token_ids
        self._ended: list[int] = []
        self._preemptions = 0
        self._cancelled = 0
        self._prefix_queried = 0
        self._prefix_cached = 0
        self._evicted_before = 0
        self.queue_tokens = 0
        """Verifier-queue tokens of the last plan that could start now or next step."""

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, record: RequestRecord) -> None:
        """Queue the request's first sequence; the others follow when its prompt is in the prefix cache."""
        self.waiting.add(record.sequences[0])

    def abort(self, record: RequestRecord) -> None:
        """Free the request's sequences: at once, or those in flight when their step is committed."""
        if not record.finished and not record.aborted:
            record.facts.cancelled_s = time.monotonic()
        record.aborted = True
        if self._end(record) and record.finished:
            self._cancelled += 1

    def _end(self, record: RequestRecord) -> bool:
        """Finish the request's sequences that are not in flight; False: there were none."""
        ended = False
        for sequence in record.sequences:
            if sequence.in_flight or sequence.status is Status.FINISHED:
                continue
            if sequence.status is Status.WAITING and sequence in self.waiting:
                self.waiting.remove(sequence)
            self._finish(sequence, FinishReason.ABORT)
            ended = True
        return ended

    def schedule(self, expected: Mapping[int, ExpectedDraft]) -> Batch | None:
        """Plan a step; None when there is nothing to do, or nothing before the oldest step in flight is committed.

        expected: what the newest step in flight drafts, by sequence id.
        """
        decodes = self._plan_anchors()
        if decodes is None:
            return None
        budget = self.step_tokens - len(decodes)
        prefills: list[Prefill] = []
        for sequence in [s for s in self.running if not s.decoding and not s.ending]:
            budget -= self._plan_prefill(sequence, budget, prefills)
        started: list[Sequence] = []
        slots = min(self._max_num_seqs, self.step_tokens)
        while budget > 0 and len(self.running) < slots and (newcomer := self._next()) and self._admit(newcomer):
            started.append(newcomer)
            if newcomer.decoding:  # preempted at the end of a block, and all its blocks are still cached
                decodes.append(newcomer)
                budget -= 1
            else:
                budget -= self._plan_prefill(newcomer, budget, prefills)
        if not decodes and not prefills:
            if not self.has_work:
                self.waiting.forget_service()
            return None
        planned = [self._plan_drafts(sequence, expected.get(sequence.id)) for sequence in decodes]
        self.queue_tokens = self._queue_tokens(prefills)
        ended, self._ended = self._ended, []
        wiped, self._wiped = self._wiped, []
        batch = Batch(planned, prefills, started, ended, budget, self.queue_tokens, len(self.waiting), wiped)
        parts: list[Decode | Prefill] = [*planned, *prefills]
        for part in parts:
            part.sequence.in_flight.append(part)
            part.sequence.draft = None
        self._in_flight.append(batch)
        return batch

    def _next(self) -> Sequence | None:
        """Who starts next: after a failed step one of its sequences."""
        trial = self._suspects.on_trial
        if trial is not None:
            return next((sequence for sequence in self.waiting if sequence in trial), None)
        return self.waiting.first if self.waiting else None

    def _plan_anchors(self) -> list[Sequence] | None:
        """The decoding sequences, each with a block for its anchor; None: one must give way, but a step is in flight."""
        planned = []
        for sequence in list(self.running):
            if sequence.status is Status.RUNNING and sequence.decoding and not sequence.ending:
                while not self._grow(sequence, 0):
                    if self._in_flight:
                        return None
                    self._preempt(self.running[-1])
                    if sequence.status is not Status.RUNNING:
                        break
                else:
                    planned.append(sequence)
        return [sequence for sequence in planned if sequence.status is Status.RUNNING]

    def _plan_prefill(self, sequence: Sequence, budget: int, prefills: list[Prefill]) -> int:
        count = min(sequence.prefill_left, budget)
        if count:
            prefills.append(Prefill(sequence, sequence.surely_computed, count, ends=count == sequence.prefill_left))
        return count

    def _plan_drafts(self, sequence: Sequence, expected: ExpectedDraft | None) -> Decode:
        """Cap the sequence's drafts by what it may still generate, its grammar, and the blocks that can be had."""
        cap, reason = _useful(expected or sequence.draft, sequence.remaining - sequence.coming)
        if cap and not self._grow(sequence, cap):
            cap, reason = len(sequence.blocks) * BLOCK_SIZE - sequence.furthest - 1, Reason.KV
        return Decode(sequence, sequence.draft, cap, reason, expected)

    def _resolve(self, batch: Batch, drafts: Mapping[int, NextDraft]) -> None:
        """The step that the planned one is behind has ended: what it drafted takes the place of bounds."""
        for index, bound in enumerate(batch.decodes):
            sequence = bound.sequence
            draft = drafts.get(sequence.id, bound.draft)
            cap, reason = _useful(draft, sequence.remaining)
            if bound.cap < cap:
                cap, reason = bound.cap, Reason.KV
            batch.decodes[index] = sequence.in_flight[0] = Decode(sequence, draft, cap, reason)
            sequence.draft = None

    def _grow(self, sequence: Sequence, drafts: int) -> bool:
        """Make the sequence's blocks cover its anchor and so many drafts, wherever the steps in flight leave the anchor; False,

        and nothing taken, when there are too few.
        """
        last = sequence.prompt_len + sequence.max_tokens - 1  # nothing follows the last token, so it is not computed
        missing = blocks_for(min(sequence.furthest + 1 + drafts, last)) - len(sequence.blocks)
        if missing > 0:
            blocks = self.kv_cache.allocate(missing)
            if blocks is None:
                return False
            sequence.blocks += blocks
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Give the sequence blocks for all its tokens, shared ones where its prefix is cached; False: not enough."""
        total = blocks_for(len(sequence.tokens) + 1)
        # at least one token is computed anew, so that there is a row to sample from
        sequence.extend_names((len(sequence.tokens) - 1) // BLOCK_SIZE)
        shared = self.kv_cache.find(sequence.names[: (len(sequence.tokens) - 1) // BLOCK_SIZE])
        reserve = len(self.running)  # a block of growth for each: an admission must not cause a preemption at once
        spare = self.kv_cache.available - self.kv_cache.cached_among(shared)
        if total - len(shared) + reserve > spare:
            return False
        self.kv_cache.share(shared)
        fresh = self.kv_cache.allocate(total - len(shared))
        assert fresh is not None
        self.waiting.remove(sequence)
        sequence.blocks = shared + fresh
        sequence.computed = len(shared) * BLOCK_SIZE
        sequence.published = len(shared)
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=rank)
        facts = sequence.record.facts
        if facts.scheduled_s is None:
            facts.scheduled_s = time.monotonic()
            facts.cached_tokens = sequence.computed
        if not facts.preemptions:
            self.waiting.charge(sequence.salt, prompt_tokens=sequence.prefill_left)
            self._prefix_queried += len(sequence.tokens)
            self._prefix_cached += sequence.computed
        return True

    def _queue_tokens(self, prefills: list[Prefill]) -> int:
        """Tokens beyond this step's that could start now or share its budget: the rest of running prompts, and waiting

        prompts for which there are slots and blocks.
        """
        planned = {p.sequence.id: p.count for p in prefills}
        tokens = sum(s.prefill_left - planned.get(s.id, 0) for s in self.running)
        slots, blocks = self._max_num_seqs - len(self.running), self.kv_cache.available - len(self.running)
        for sequence in self.waiting:
            blocks -= blocks_for(len(sequence.tokens) + 1)
            if slots <= 0 or blocks < 0:
                break
            slots -= 1
            tokens += len(sequence.tokens)
        return tokens

    def _preempt(self, sequence: Sequence) -> None:
        self.kv_cache.release(sequence.blocks)
        sequence.blocks, sequence.computed, sequence.published = [], 0, 0
        sequence.draft = None
        sequence.status = Status.WAITING
        self.running.remove(sequence)
        self.waiting.add(sequence)
        self._ended.append(sequence.id)
        self._preemptions += 1
        sequence.record.facts.preemptions += 1

    def commit(self, batch: Batch, allocation: Allocation, result: StepResult, facts: StepFacts) -> list[RequestRecord]:
        """Take in the oldest step's result and count it; returns the requests that have something to deliver."""
        touched: dict[int, RequestRecord] = {}
        for sequence in batch.sequences:
            sequence.in_flight.popleft()
        for prefill in batch.prefills:
            prefill.sequence.computed += prefill.count
            facts.prompt_computed += prefill.count
        for decode, cut, round_ in zip(batch.decodes, allocation.reason, result.rounds, strict=True):
            if decode.sequence.status is not Status.RUNNING:
                continue  # it ended in the step before: this round was one too many
            decode.sequence.computed += 1 + round_.accepted
            if not decode.sequence.record.aborted:
                kept = self._append(decode.sequence, round_)
                count_round(facts, decode, decode.cap_reason if round_.verified == decode.cap else cut, round_, kept)
                touched[id(decode.sequence.record)] = decode.sequence.record
        for decode, plain_reason in zip(batch.decodes, allocation.plain_reason, strict=True):
            decode.sequence.plain_reason = plain_reason
        endings = [prefill.sequence for prefill in batch.prefills if prefill.ends]
        for sequence, round_ in zip(endings, result.first_rounds, strict=True):
            sequence.plain_reason = allocation.plain_reason_new
            if not sequence.record.aborted:
                kept = self._append(sequence, round_)
                facts.first_tokens += kept
                facts.generated += kept
                touched[id(sequence.record)] = sequence.record
        for sequence in batch.sequences:
            if sequence.status is Status.RUNNING:
                self._publish(sequence)
                self._settle(sequence, result)
        for record in touched.values():
            if record.failure is not None:
                self._end(record)
        for sequence in endings:
            self._start_siblings(sequence)
        self._in_flight.popleft()
        if self._in_flight:
            self._resolve(self._in_flight[0], result.drafts)
        self._count_memory(facts)
        self._grow_steps()
        return list(touched.values())

    def retry_smaller(self, batch: Batch) -> bool:
        """The oldest step ran out of memory: plan its work again, half as much at a time. False: it was one row already."""
        rows = len(batch.decodes) + batch.prefill_rows + sum(decode.cap for decode in batch.decodes)
        rows = min(rows, self.step_tokens)
        if rows <= 1:
            return False
        self.step_tokens, self._good_steps = rows // 2, 0
        self._start_again(list(self.running))
        return True

    def retry(self, batch: Batch) -> RequestRecord | None:
        """The oldest step failed: plan again what is in flight. → the request that it failed for, which is ended, once that is

        known. Raises AssertionError when the pool is not whole.
        """
        guilty = self._suspects.accuse([s for s in batch.sequences if s.status is Status.RUNNING])
        self._start_again(self._flying())
        if guilty is not None:
            self._end(guilty.record)
        self.kv_cache.check([sequence.blocks for sequence in self.running])
        return None if guilty is None else guilty.record

    def fail(self) -> list[RequestRecord]:
        """End the requests that are in flight, and check the pool; returns them. Raises AssertionError."""
        records = list(dict.fromkeys(sequence.record for sequence in self._flying()))
        self._take_back()
        for record in records:
            for sequence in record.sequences:
                self._wiped += self.kv_cache.unnamed(sequence.blocks)
            ended = self._end(record)
            self._cancelled += ended and record.aborted
        self.kv_cache.check([sequence.blocks for sequence in self.running])
        return records

    def _flying(self) -> list[Sequence]:
        """The sequences in flight, some of them twice; also those that have ended and are in one step too many."""
        return [sequence for batch in self._in_flight for sequence in batch.sequences]

    def _start_again(self, sequences: list[Sequence]) -> None:
        """Send these back to the queue, most of their blocks to the prefix cache."""
        self._take_back()
        for sequence in sequences:
            if sequence.status is Status.RUNNING:
                self._wiped += self.kv_cache.unnamed(sequence.blocks)
                if sequence.record.aborted:
                    self._finish(sequence, FinishReason.ABORT)
                    self._cancelled += sequence.record.finished
                else:
                    self._preempt(sequence)

    def _take_back(self) -> None:
        """Nothing is in flight any more. The runner may have seen all of the plans or nothing of them."""
        for sequence in self._flying():
            sequence.in_flight.clear()
        for batch in self._in_flight:
            self._ended += batch.ended
            self._wiped += batch.wiped + self.kv_cache.unnamed(batch.left)
        self._in_flight.clear()

    def _grow_steps(self) -> None:
        if self.step_tokens < self._max_tokens:
            self._good_steps += 1
            if self._good_steps == GOOD_STEPS:
                self.step_tokens, self._good_steps = min(2 * self.step_tokens, self._max_tokens), 0

    def _append(self, sequence: Sequence, round_: Round) -> int:
        """Append the round's tokens up to a stop; returns how many were kept."""
        if round_.failure is not None:
            sequence.record.failure, sequence.record.aborted = round_.failure, True
            return 0
        stops = sequence.record.request.sampling.stop_token_ids
        ignore_eos = sequence.record.request.sampling.ignore_eos
        tokens, reason = round_.tokens, None
        for index, token in enumerate(tokens):
            if token in stops or (token in self._stop_token_ids and not ignore_eos):
                tokens, reason = tokens[: index + 1], FinishReason.STOP
                break
        if reason is None and len(tokens) >= sequence.remaining:
            reason = FinishReason.LENGTH
        if sequence.stop_check is not None:
            kept = sequence.stop_check(tokens)
            if kept is not None:
                tokens, reason = tokens[:kept], FinishReason.STOP
        sequence.tokens += tokens
        sequence.finish_reason = reason
        self._suspects.clear(sequence)
        self._note_tokens(sequence, len(tokens))
        sequence.record.deltas.append(
            TokenDelta(
                index=sequence.choice,
                token_ids=tuple(tokens),
                accepted_drafts=min(round_.accepted, len(tokens)),
                logprobs=None if round_.logprobs is None else tuple(round_.logprobs[: len(tokens)]),
                finish_reason=reason,
            )
        )
        return len(tokens)

    def _note_tokens(self, sequence: Sequence, count: int) -> None:
        facts = sequence.record.facts
        self.waiting.charge(sequence.salt, output_tokens=count)
        facts.generated_tokens += count
        if facts.first_token_s is None and count:
            facts.first_token_s = time.monotonic()

    def _publish(self, sequence: Sequence) -> None:
        """Offer the blocks that have become full of computed, committed tokens."""
        # where a stop cut the round's tokens, more was computed than is committed
        full = min(sequence.computed, len(sequence.tokens)) // BLOCK_SIZE
        sequence.extend_names(full)
        for index in range(sequence.published, full):
            self.kv_cache.publish(sequence.blocks[index], sequence.names[index])
        sequence.published = max(sequence.published, full)

    def _settle(self, sequence: Sequence, result: StepResult) -> None:
        """Finish the sequence if it has ended, else keep the block drafted for its next round."""
        if sequence.record.aborted:
            self._finish(sequence, FinishReason.ABORT)
            if sequence.record.finished and sequence.record.failure is None:
                self._cancelled += 1
        elif sequence.finish_reason is not None:
            self._finish(sequence, sequence.finish_reason)
        else:
            sequence.draft = result.drafts.get(sequence.id)
            sequence.survival = None if sequence.draft is None else sequence.draft.survival

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.status is Status.RUNNING:
            if sequence.in_flight:
                self._in_flight[-1].left += sequence.blocks
            self.kv_cache.release(sequence.blocks)
            sequence.blocks = []
            self.running.remove(sequence)
            self._ended.append(sequence.id)
        sequence.status, sequence.finish_reason = Status.FINISHED, reason
        sequence.draft = None
        self._suspects.clear(sequence)
        if sequence.record.finished:
            sequence.record.facts.finished_s = time.monotonic()
            if sequence.record.on_freed is not None:
                sequence.record.on_freed()

    def _start_siblings(self, sequence: Sequence) -> None:
        """The first choice's prompt is computed: its other choices start from the prefix cache, ahead of the queue."""
        if sequence.choice == 0 and not sequence.record.siblings_started and not sequence.record.aborted:
            sequence.record.siblings_started = True
            for sibling in sequence.record.sequences[1:]:
                self.waiting.add(sibling)

    def _count_memory(self, facts: StepFacts) -> None:
        facts.prefix_queried, self._prefix_queried = self._prefix_queried, 0
        facts.prompt_cached, self._prefix_cached = self._prefix_cached, 0
        facts.preemptions, self._preemptions = self._preemptions, 0
        facts.freed_after_cancel, self._cancelled = self._cancelled, 0
        facts.evicted_blocks = self.kv_cache.evicted_total - self._evicted_before
        self._evicted_before = self.kv_cache.evicted_total


def _useful(draft: NextDraft | ExpectedDraft | None, remaining: int) -> tuple[int, Reason | None]:
    """(drafts of the block that are of use, what bounds them below proposed). remaining: tokens that may still be generated."""
    if draft is None:
        return 0, None
    cap, reason = draft.proposed, None
    if remaining - 1 < cap:
        cap, reason = max(0, remaining - 1), Reason.LENGTH
    if isinstance(draft, NextDraft) and draft.legal is not None and draft.legal < cap:
        cap, reason = draft.legal, Reason.GRAMMAR
    return cap, reason
