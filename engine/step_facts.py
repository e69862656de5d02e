"""Translations between a step's plan and result and what the load controller and the metrics read. No decisions here."""

from __future__ import annotations

import numpy as np

from dspark.engine.facts import Phase, StepFacts
from dspark.engine.load_controller import Allocation, LoadController, StepLoad, StepOutcome
from dspark.engine.sequence import NO_ROUND, Batch, StepResult


def step_load(batch: Batch, controller: LoadController) -> StepLoad:
    """What the step could do. In place of a block that is still being drafted stands the sequence's last one, or a mean one."""
    survival = np.zeros((len(batch.decodes), controller.block_size), np.float32)
    for row, decode in zip(survival, batch.decodes, strict=True):
        if decode.draft is not None:
            row[:] = decode.draft.survival
        elif decode.expected is not None and decode.expected.proposed:
            last = decode.sequence.survival
            row[:] = controller.mean_survival() if last is None else last
    blocks = [decode.expected or decode.draft for decode in batch.decodes]
    free = [block is not None and block.free for block in blocks]
    source = [0 if decode.draft is None else decode.draft.source for decode in batch.decodes]
    computing = len(batch.prefills)
    return StepLoad(
        sequence_ids=[decode.sequence.id for decode in batch.decodes],
        survival=survival,
        proposed=np.array([decode.proposed for decode in batch.decodes], np.int32),
        caps=np.array([decode.cap for decode in batch.decodes], np.int32),
        free=np.array(free, np.bool_),
        source=np.array(source, np.int8),
        context_tokens=batch.context_tokens,
        draft_room=batch.draft_room,
        prefill_tokens=batch.prefill_rows,
        prefill_ending=sum(prefill.ends for prefill in batch.prefills),
        queue_tokens=batch.queue_tokens,
        waiting_requests=batch.waiting_sequences + computing,
        draft_context=float(np.mean([d.sequence.computed for d in batch.decodes])) if batch.decodes else 0.0,
        known=all(decode.expected is None for decode in batch.decodes),
    )


def step_outcome(batch: Batch, load: StepLoad, result: StepResult, step_s: float) -> StepOutcome:
    """What the step did, as the controller learns from it. step_s: what it added to the time that all steps take."""
    confidence = np.zeros_like(load.survival)
    for row, decode in zip(confidence, batch.decodes, strict=True):
        if decode.draft is not None:
            row[:] = decode.draft.confidence
    sampled = [not decode.sequence.record.request.sampling.greedy for decode in batch.decodes]
    return StepOutcome(
        rows=result.rows,
        context_tokens=load.context_tokens,
        verify_s=result.forward_s + result.sample_s + result.inject_s,
        drafting_sequences=len(result.drafted),
        draft_width=result.draft_width,
        draft_s=result.draft_s,
        host_s=max(0.0, step_s - result.worker_s),
        sequence_ids=load.sequence_ids,
        survival=load.survival,
        confidence=confidence,
        sampled=np.array(sampled, np.bool_),
        source=load.source,
        proposed=load.proposed,
        free=load.free,
        verified=np.array([round_.verified for round_ in result.rounds], np.int32),
        accepted=np.array([round_.accepted for round_ in result.rounds], np.int32),
        draft_context_tokens=sum(
            round_.verified * decode.sequence.computed
            for decode, round_ in zip(batch.decodes, result.rounds, strict=True)
        ),
    )


def describe_step(facts: StepFacts, batch: Batch, allocation: Allocation, result: StepResult) -> None:
    """Add the step's plan, sizes and times to what commit has counted."""
    if batch.prefills:
        facts.phase = Phase.MIXED if batch.decodes else Phase.PREFILL
    facts.batch_tokens = result.rows
    facts.batch_sequences = len(batch.decodes) + len(batch.prefills) - result.rounds.count(NO_ROUND)
    facts.verify_s = result.forward_s + result.sample_s
    facts.sample_s = result.sample_s
    facts.draft_s = result.inject_s + result.draft_s
    facts.transfer_s = result.transfer_s
    facts.host_sampled_rows = result.host_sampled_rows
    facts.predicted_step_s = allocation.predicted_step_s
    facts.plain_estimate_s = allocation.plain_estimate_s(facts.accepted)
    facts.price_tokens_per_s = allocation.price
    facts.draft_budget_tokens = allocation.budget
    facts.draft_limit_tokens = max((round_.verified for round_ in result.rounds), default=0)
    facts.survival_threshold = allocation.threshold
    facts.drafting = bool(allocation.draft_next.any()) or (allocation.draft_new and bool(batch.prefills))
