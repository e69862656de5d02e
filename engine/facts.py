"""Numbers about what happened, with their units in their names. No metric names here: `server/metrics.py` owns those."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

CONFIDENCE_BINS = 10
"""Equal-width bins of [0, 1] used wherever calibration is counted."""


class Reason(StrEnum):
    """Why a draft was shorter than the block that was proposed (one reason per short draft)."""

    CONFIDENCE = "confidence"  # the draft was not worth its verification even on an idle machine
    LOAD = "load"  # other running sequences made the step too dear
    QUEUE = "queue"  # work waiting in the verifier queue made it too dear
    KV = "kv"  # no KV blocks for it
    GRAMMAR = "grammar"  # the draft is illegal from here on
    LENGTH = "length"  # max_tokens or the context ends before
    PROBE_OFF = "probe_off"  # a probe: drafted in zero-draft mode, or left out to see what a plain step takes
    OFF = "off"  # speculation is off


class PlainReason(StrEnum):
    """Why nothing was drafted for a round (so that it verified no drafts)."""

    LOAD = "load"
    QUEUE = "queue"
    KV = "kv"
    LOW_ACCEPTANCE = "low_acceptance"
    UNSUPPORTED = "unsupported"  # the drafter had nothing to propose
    OFF = "off"


class Phase(StrEnum):
    PREFILL = "prefill"
    VERIFY = "verify"
    MIXED = "mixed"


@dataclass(slots=True)
class StepFacts:
    """Sums over one engine step. Times are monotonic-clock differences."""

    phase: Phase = Phase.VERIFY
    batch_tokens: int = 0
    batch_sequences: int = 0
    # time
    step_s: float = 0.0
    schedule_s: float = 0.0
    verify_s: float = 0.0  # target forward + sampling + accept
    sample_s: float = 0.0  # part of verify_s outside the target forward
    draft_s: float = 0.0  # context injection + draft block + its sampling
    transfer_s: float = 0.0  # copies to and from a device
    host_sampled_rows: int = 0  # rows that a device computed and could not sample
    commit_s: float = 0.0
    predicted_step_s: float = 0.0
    plain_estimate_s: float = 0.0  # cost model's time for plain decoding of the tokens this step gave
    # tokens
    prompt_computed: int = 0
    prompt_cached: int = 0
    prefix_queried: int = 0  # prompt tokens looked up in the prefix cache by sequences first scheduled in this step
    generated: int = 0
    first_tokens: int = 0
    # rounds: (sequence, verify) pairs
    rounds_with_drafts: int = 0
    rounds_without_drafts: int = 0
    plain_rounds: dict[PlainReason, int] = field(default_factory=dict)
    drafted: int = 0
    truncated: dict[Reason, int] = field(default_factory=dict)
    verified: int = 0
    accepted: int = 0
    rejected_mismatch: int = 0
    rejected_after_mismatch: int = 0
    rejected_after_stop: int = 0
    bonus: int = 0
    drafted_at: list[int] = field(default_factory=list)  # [γ], by draft position
    verified_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    accepted_lengths: dict[int, int] = field(default_factory=dict)  # tokens given by a round -> rounds
    proposed_lengths: dict[int, int] = field(default_factory=dict)
    verified_lengths: dict[int, int] = field(default_factory=dict)
    # calibration: over verified drafts whose predecessors were all accepted, by confidence bin
    confidence_count: list[int] = field(default_factory=lambda: [0] * CONFIDENCE_BINS)
    confidence_accepted: list[int] = field(default_factory=lambda: [0] * CONFIDENCE_BINS)
    confidence_sum: list[float] = field(default_factory=lambda: [0.0] * CONFIDENCE_BINS)
    expected_accepted: float = 0.0
    # memory
    preemptions: int = 0
    evicted_blocks: int = 0
    freed_after_cancel: int = 0  # requests cancelled whose blocks were freed by this step
    # controller
    price_tokens_per_s: float = 0.0  # λ
    draft_budget_tokens: int = 0
    draft_limit_tokens: int = 0  # longest draft verified
    survival_threshold: float = 0.0
    drafting: bool = False  # False: zero-draft mode or off


@dataclass(frozen=True, slots=True)
class EngineGauges:
    """State now, read by the server at every scrape."""

    requests_running: int
    sequences_running: int
    requests_waiting: int
    waiting_limit: int
    prompt_tokens_waiting: int
    verify_queue_requests: int
    verify_queue_tokens: int
    blocks_used: int
    blocks_cached: int
    blocks_free: int
    controller_state: str  # off | full | limited | minimal | plain
    load_ratio: float
    cost_model_s: dict[int, float]  # predicted verify time by batch tokens
    prompt_tokens_waiting_limit: int = 0
    last_step_unix_s: float = 0.0  # when the last step ended; 0: none has
    stalls_total: int = 0  # times there was work and no step ended for `stall_timeout_s`
    failed_steps_total: int = 0
    out_of_memory_retries_total: int = 0
    step_tokens_limit: int = 0  # rows of one step, fewer for a while after one ran out of memory


@dataclass(slots=True)
class RequestFacts:
    """One request, complete when its stream ends. Times in seconds of `time.monotonic()`."""

    prompt_tokens: int
    arrived_s: float
    cancelled_s: float | None = None  # aborted before it had finished; its K/V were freed at finished_s
    cached_tokens: int = 0
    generated_tokens: int = 0
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    rounds_with_drafts: int = 0
    rounds_without_drafts: int = 0
    drafted_tokens: int = 0
    verified_tokens: int = 0
    accepted_tokens: int = 0
    accepted_prediction_tokens: int = 0  # verified drafts that came from the request's predicted tokens
    rejected_prediction_tokens: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was started; constant while the engine lives."""

    model_name: str  # folder or hub name of the target
    drafter_name: str  # "none" when speculation is off
    device: str
    dtype: str
    kernels: str  # what computes: "cpu" or "triton"; decided once, by kernels/dispatch.py
    threads: int
    block_size: int
    num_blocks: int
    kv_cache_bytes: int
    max_model_len: int
    max_num_seqs: int
    max_draft_tokens: int  # γ
    vocab_size: int
    weight_bytes: int  # that a decode step reads: all matrices, the head once, without the embedding table
    eos_token_ids: tuple[int, ...]
    row_invariant: bool  # the start-up self-test passed
    load_seconds: dict[str, float]  # phase -> time; phases: target_weights, draft_weights, kv_alloc, warmup, profile
    verification: str = "coupled"
    lag: int = 0  # steps unfinished while the next one is planned
