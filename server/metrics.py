"""Facts in, Prometheus out; the only module that knows a metric's name.

Every family lives on a registry of its own, every fixed label combination exists from the start with 0, and every
child is resolved once, so that taking in a step costs a few additions. Times are seconds of the monotonic clock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from platform import python_version

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge

from dspark.engine import EngineGauges, EngineInfo, Phase, PlainReason, Reason, RequestFacts, StepFacts
from dspark.server.errors import ERROR_KINDS
from dspark.server.histogram import BatchHistogram, HistogramChild
from dspark.server.recent_speculation import RecentCalibration, RecentSpeedup

PREFIX = "dspark_"

TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
TPOT = (
    *(0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5),
)
E2E = tuple(0.01 * 2**k for k in range(17))
QUEUE = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOK = tuple(4**k for k in range(11))
STEPTOK = tuple(2**k for k in range(14))
STEP = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1, 5)
STEPB = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1, 5)
BATCH = tuple(2**k for k in range(9))
LAG = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)

TOKEN_BANDS = ((8, "1-8"), (32, "9-32"), (64, "33-64"), (128, "65-128"), (256, "129-256"), (512, "257-512"))
LAST_TOKEN_BAND = "513+"
LAST_POSITION = 15

SERVER_STATES = ("starting", "ready", "draining", "degraded")
CONTROLLER_STATES = ("off", "full", "limited", "minimal", "plain")
ENDPOINTS = ("chat_completions", "completions")
OUTCOMES = ("stop", "length", "tool_calls", "abort", "timeout", "error", "shed", "replay", "join")
SHED_REASONS = ("queue_full", "draining")
CANCEL_CAUSES = ("client_disconnect", "deadline", "shutdown")
KEYED_RESULTS = ("new", "replay", "join", "conflict", "expired", "store_error")
REJECTED = ("mismatch", "after_mismatch", "after_stop")
ROUTES = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/v1/models": "GET",
    "/v1/models/{model}": "GET",
    "/health": "GET",
    "/health/live": "GET",
    "/health/ready": "GET",
    "/version": "GET",
    "/openapi.json": "GET",
    "/metrics": "GET",
}
OTHER = "other"
RESIDENT_PAGES = Path("/proc/self/statm")
"""Linux only; the second number is the resident set in pages."""
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


class Families:
    """Makes families on one registry; all but the few process-wide ones carry the served model's name."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry
        self._model = model_name

    def counter(self, name: str, help_text: str, **label: Iterable[str]) -> dict[str, Counter]:
        """One counter by the values of its one label beside `model`."""
        ((key, values),) = label.items()
        family = Counter(PREFIX + name, help_text, ["model", key], registry=self._registry)
        return {value: family.labels(self._model, value) for value in values}

    def total(self, name: str, help_text: str) -> Counter:
        return Counter(PREFIX + name, help_text, ["model"], registry=self._registry).labels(self._model)

    def gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(PREFIX + name, help_text, ["model"], registry=self._registry).labels(self._model)

    def gauges(self, name: str, help_text: str, **label: Iterable[str]) -> dict[str, Gauge]:
        ((key, values),) = label.items()
        family = Gauge(PREFIX + name, help_text, ["model", key], registry=self._registry)
        return {value: family.labels(self._model, value) for value in values}

    def histogram(self, name: str, help_text: str, bounds: Sequence[float]) -> HistogramChild:
        label_values = (self._model,)
        family = BatchHistogram(PREFIX + name, help_text, bounds, ["model"], [label_values], self._registry)
        return family.children[label_values]

    def histograms(
        self, name: str, help_text: str, bounds: Sequence[float], **label: Iterable[str]
    ) -> dict[str, HistogramChild]:
        ((key, values),) = label.items()
        combinations = [(self._model, value) for value in values]
        family = BatchHistogram(PREFIX + name, help_text, bounds, ["model", key], combinations, self._registry)
        return {value: child for (_, value), child in family.children.items()}


class HttpMetrics:
    """What the HTTP layer saw: answers, errors, keys, open streams, the event loop itself."""

    def __init__(self, families: Families, registry: CollectorRegistry) -> None:
        self._answers = Counter(
            PREFIX + "http_requests", "HTTP answers by route template.", ["route", "method", "code"], registry=registry
        )
        for route, method in ROUTES.items():
            self._answers.labels(route, method, "200")
        self._errors = families.counter("request_errors", "Errors answered to clients.", type=ERROR_KINDS)
        failures = Counter(PREFIX + "auth_failures", "Requests without a valid API key.", ["reason"], registry=registry)
        self.auth_failures = {reason: failures.labels(reason) for reason in ("missing", "invalid", "revoked")}
        reloads = Counter(
            PREFIX + "api_key_reloads", "Times the changed file of API keys was read.", ["result"], registry=registry
        )
        self.api_key_reloads = {result: reloads.labels(result) for result in ("ok", "failed")}
        self.stream_clients = families.gauge("stream_clients", "Open SSE streams.")
        self.refusal = families.histogram("refusal_seconds", "Request read to refusal (429 or 503) written.", LAG)
        state = Gauge(PREFIX + "server_state", "1 for the state the server is in.", ["state"], registry=registry)
        self._states = {name: state.labels(name) for name in SERVER_STATES}
        lag = BatchHistogram(
            PREFIX + "event_loop_lag_seconds", "How late a 100 ms timer fires.", LAG, [], [()], registry
        )
        self.event_loop_lag = lag.children[()]

    def answered(self, route: str | None, method: str, code: int) -> None:
        self._answers.labels(route or OTHER, method if method in METHODS else OTHER, str(code)).inc()

    def error(self, kind: str) -> None:
        """kind: of the error table."""
        self._errors[kind].inc()

    def set_state(self, state: str) -> None:
        for name, gauge in self._states.items():
            gauge.set(name == state)

    @contextmanager
    def stream_open(self) -> Iterator[None]:
        self.stream_clients.inc()
        try:
            yield
        finally:
            self.stream_clients.dec()


class RequestMetrics:
    """Inference requests: how many, how they ended, how long they took. Each is counted once, at its end."""

    def __init__(self, families: Families, registry: CollectorRegistry, model_name: str) -> None:
        self._admitted = families.total("requests_admitted", "Inference requests taken into the engine's queue.")
        ended = Counter(
            PREFIX + "requests", "Inference requests ended.", ["model", "endpoint", "outcome"], registry=registry
        )
        self._ended = {
            (endpoint, outcome): ended.labels(model_name, endpoint, outcome)
            for endpoint in ENDPOINTS
            for outcome in OUTCOMES
        }
        self._shed = families.counter("requests_shed", "Requests refused before any work.", reason=SHED_REASONS)
        self._cancelled = families.counter("requests_cancelled", "Requests aborted.", cause=CANCEL_CAUSES)
        self._cancel = families.histogram("cancel_seconds", "Abort of a request to its K/V blocks being free.", LAG)
        self._modes = families.counter(
            "spec_requests", "Ended requests by how they ran.", mode=("speculative", "plain", "mixed")
        )
        self.first_token = families.histogram("time_to_first_token_seconds", "Request read to first token.", TTFT)
        self.token_gap = families.histogram(
            "inter_token_latency_seconds", "Gap of an emission divided by its tokens, once per token.", TPOT
        )
        self.chunk_gap = families.histogram("stream_chunk_gap_seconds", "Gap between emissions of a choice.", TPOT)
        self._per_token = families.histogram(
            "request_time_per_output_token_seconds", "(last - first token time) / (n - 1) of a request.", TPOT
        )
        self._duration = families.histograms(
            "request_duration_seconds", "Request read to its end.", E2E, result=("ok", "error")
        )
        self._queue = families.histogram("request_queue_seconds", "Admission to first schedule.", QUEUE)
        self._prefill = families.histogram("request_prefill_seconds", "First schedule to first token.", E2E)
        self._decode = families.histogram("request_decode_seconds", "First token to last token.", E2E)
        self._prompt_tokens = families.histogram("request_prompt_tokens", "Prompt tokens of a request.", TOK)
        self._generated_tokens = families.histogram("request_generated_tokens", "Output tokens of a request.", TOK)

    def admitted(self) -> None:
        self._admitted.inc()

    def shed(self, endpoint: str, reason: str) -> None:
        self._ended[endpoint, "shed"].inc()
        self._shed[reason].inc()

    def repeated(self, endpoint: str, outcome: str) -> None:
        """outcome: `join` or `replay`, of a request whose answer another one's generation makes or has made."""
        self._ended[endpoint, outcome].inc()

    def ended(self, endpoint: str, outcome: str, duration_s: float) -> None:
        self._ended[endpoint, outcome].inc()
        self._duration["error" if outcome in ("error", "timeout", "shed") else "ok"].observe(duration_s)

    def cancelled(self, cause: str, seconds: float) -> None:
        """Call when the engine has freed the request's K/V. seconds: since it was aborted."""
        self._cancelled[cause].inc()
        self._cancel.observe(seconds)

    def engine_request(self, facts: RequestFacts, choices: int) -> None:
        """One prompt's facts at its end; a request of several prompts brings several."""
        self._prompt_tokens.observe(facts.prompt_tokens)
        self._generated_tokens.observe(facts.generated_tokens)
        if facts.rounds_with_drafts and facts.rounds_without_drafts:
            self._modes["mixed"].inc()
        else:
            self._modes["speculative" if facts.rounds_with_drafts else "plain"].inc()
        if facts.scheduled_s is None:
            return
        self._queue.observe(facts.scheduled_s - facts.arrived_s)
        if facts.first_token_s is None:
            return
        self._prefill.observe(facts.first_token_s - facts.scheduled_s)
        if facts.finished_s is not None:
            decode_s = facts.finished_s - facts.first_token_s
            self._decode.observe(decode_s)
            if facts.generated_tokens > choices:
                self._per_token.observe(decode_s / (facts.generated_tokens / choices - 1))


class IdempotencyMetrics:
    """Requests with an Idempotency-Key, and what is kept for those that may be sent again."""

    def __init__(self, registry: CollectorRegistry) -> None:
        requests = Counter(
            PREFIX + "idempotency_requests", "Requests with an Idempotency-Key.", ["result"], registry=registry
        )
        entries = Gauge(PREFIX + "idempotency_entries", "Answers held by key.", ["state"], registry=registry)
        evictions = Counter(
            PREFIX + "idempotency_evictions", "Answers given up before a retry asked.", ["reason"], registry=registry
        )
        self.requests = {result: requests.labels(result) for result in KEYED_RESULTS}
        self.entries = {state: entries.labels(state) for state in ("in_progress", "done")}
        self.evictions = {reason: evictions.labels(reason) for reason in ("ttl", "size", "store_error")}


class StepMetrics:
    """Sums of each engine step: batch, times, tokens, speculation, calibration, controller."""

    def __init__(self, families: Families, max_draft_tokens: int) -> None:
        phases = [phase.value for phase in Phase]
        bands = [*(band for _, band in TOKEN_BANDS), LAST_TOKEN_BAND]
        self._batch_tokens = families.histograms("step_batch_tokens", "Tokens of one step.", STEPTOK, phase=phases)
        self._batch_requests = families.histograms("step_batch_requests", "Sequences of a step.", BATCH, phase=phases)
        self._verify = families.histograms(
            "verify_step_seconds", "Target forward and accept by batch tokens.", STEPB, tokens=bands
        )
        self._prefill = families.histogram("prefill_step_seconds", "Target forward of prefill-only steps.", STEPB)
        self._draft = families.histogram("draft_step_seconds", "Drafter forward, sampling, confidence.", STEP)
        self._overhead = families.histograms(
            "step_overhead_seconds", "Host time outside forwards.", STEP, stage=("schedule", "sample", "commit")
        )
        self._prompt = families.counter("prompt_tokens", "Prompt tokens by source.", source=("computed", "cached"))
        self._prefix_queried = families.total("prefix_cache_query_tokens", "Prompt tokens looked up.")
        self._prefix_hit = families.total("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache.")
        self._evicted = families.total("kv_cache_evicted_blocks", "Cached blocks dropped to make room.")
        self._preemptions = families.total("preemptions", "Running requests pushed back for lack of KV.")
        self._host_sampled = families.total(
            "host_sampled_rows", "Rows that a device computed and the host had to sample."
        )
        self._generated = families.total("generated_tokens", "Output tokens.")
        self._first = families.total("first_tokens", "Tokens sampled by the step that ended a prefill.")
        self._init_speculation(families, max_draft_tokens)
        self._init_controller(families)

    def _init_speculation(self, families: Families, max_draft_tokens: int) -> None:
        self._rounds = families.counter("spec_rounds", "(sequence, verify step) pairs.", drafts=("yes", "no"))
        self._plain_rounds = families.counter(
            "spec_plain_rounds", "Rounds for which nothing was drafted.", reason=PlainReason
        )
        self._drafted = families.total("spec_drafted_tokens", "Tokens the drafter proposed.")
        self._truncated = families.counter("spec_truncated_tokens", "Proposed, not verified.", reason=Reason)
        self._verified = families.total("spec_verified_tokens", "Draft tokens the target checked.")
        self._accepted = families.total("spec_accepted_tokens", "Draft tokens accepted.")
        self._rejected = families.counter("spec_rejected_tokens", "Checked, not accepted.", reason=REJECTED)
        self._bonus = families.total("spec_bonus_tokens", "Tokens of a round sampled from the target itself.")
        positions = [str(position) for position in range(min(max_draft_tokens, LAST_POSITION))]
        if max_draft_tokens > LAST_POSITION:
            positions.append(f"{LAST_POSITION}+")
        self._at = {
            stage: list(
                families.counter(
                    f"spec_position_{stage}_tokens", f"Draft tokens {stage} by position.", position=positions
                ).values()
            )
            for stage in ("drafted", "verified", "accepted")
        }
        self._accepted_length = families.histogram(
            "spec_accepted_length_tokens", "Tokens given per round.", range(1, max_draft_tokens + 2)
        )
        self._draft_length = families.histograms(
            "spec_draft_length_tokens",
            "Draft tokens per round.",
            range(max_draft_tokens + 1),
            stage=("proposed", "verified"),
        )
        bins = [str(b) for b in range(len(StepFacts().confidence_count))]
        self._confidence_count = families.counter(
            "spec_confidence_tokens", "Verified tokens whose prefix was accepted.", bin=bins
        )
        self._confidence_accepted = families.counter(
            "spec_confidence_accepted_tokens", "Of those, the accepted ones.", bin=bins
        )
        self._confidence_sum = families.counter("spec_confidence_sum", "Sum of their confidences.", bin=bins)
        self._expected = families.total("spec_expected_accepted_tokens", "Acceptances the controller expected.")
        self._recent_calibration = RecentCalibration()
        self._calibration_error = families.gauge(
            "spec_calibration_error_ratio",
            "Expected calibration error of the last 10,000 judged drafts, less what chance alone would show; NaN before any.",
        )

    def _init_controller(self, families: Families) -> None:
        self._draft_limit = families.gauge("controller_draft_limit_tokens", "Longest draft of the last step.")
        self._budget = families.gauge("controller_verify_budget_tokens", "Draft tokens the last step could verify.")
        self._threshold = families.gauge(
            "controller_confidence_threshold_ratio", "Survival below which drafts are cut now."
        )
        self._predicted = families.total("controller_predicted_step_seconds", "Predicted time of verify steps.")
        self._observed = families.total("controller_observed_step_seconds", "Observed time of verify steps.")
        self._decode = families.total("decode_seconds", "Wall time of steps with decode rounds.")
        self._plain_estimate = families.total(
            "decode_plain_estimate_seconds", "Cost model's time for plain decoding of the same tokens."
        )
        self._recent_speedup = RecentSpeedup()
        self._speedup = families.gauge(
            "spec_speedup_ratio",
            "Estimated plain decoding time over decoding time, last minute; NaN when nothing was decoded in it.",
        )

    def read_recent(self) -> None:
        """Set the gauges that stand for a moving window; called at every scrape."""
        self._speedup.set(self._recent_speedup.ratio(time.monotonic()))
        self._calibration_error.set(self._recent_calibration.error())

    def step(self, facts: StepFacts) -> None:
        """Take in one step's sums; called on the event loop, once per step."""
        phase = facts.phase.value
        self._batch_tokens[phase].observe(facts.batch_tokens)
        self._batch_requests[phase].observe(facts.batch_sequences)
        if facts.phase is Phase.PREFILL:
            self._prefill.observe(facts.verify_s)
        else:
            self._verify[token_band(facts.batch_tokens)].observe(facts.verify_s)
            self._predicted.inc(facts.predicted_step_s)
            self._observed.inc(facts.step_s)
            self._decode.inc(facts.step_s)
            self._plain_estimate.inc(facts.plain_estimate_s)
            self._recent_speedup.add(time.monotonic(), facts.step_s, facts.plain_estimate_s)
        if facts.draft_s:
            self._draft.observe(facts.draft_s)
        self._overhead["schedule"].observe(facts.schedule_s)
        self._overhead["sample"].observe(facts.sample_s)
        self._overhead["commit"].observe(facts.commit_s)
        self._tokens(facts)
        self._speculation(facts)
        self._draft_limit.set(facts.draft_limit_tokens)
        self._budget.set(facts.draft_budget_tokens)
        self._threshold.set(facts.survival_threshold)

    def _tokens(self, facts: StepFacts) -> None:
        _add(self._prompt["computed"], facts.prompt_computed)
        _add(self._prompt["cached"], facts.prompt_cached)
        _add(self._prefix_queried, facts.prefix_queried)
        _add(self._prefix_hit, facts.prompt_cached)
        _add(self._evicted, facts.evicted_blocks)
        _add(self._preemptions, facts.preemptions)
        _add(self._host_sampled, facts.host_sampled_rows)
        _add(self._generated, facts.generated)
        _add(self._first, facts.first_tokens)

    def _speculation(self, facts: StepFacts) -> None:
        _add(self._rounds["yes"], facts.rounds_with_drafts)
        _add(self._rounds["no"], facts.rounds_without_drafts)
        _add_each(self._plain_rounds, facts.plain_rounds)
        _add(self._drafted, facts.drafted)
        _add_each(self._truncated, facts.truncated)
        _add(self._verified, facts.verified)
        _add(self._accepted, facts.accepted)
        _add(self._rejected["mismatch"], facts.rejected_mismatch)
        _add(self._rejected["after_mismatch"], facts.rejected_after_mismatch)
        _add(self._rejected["after_stop"], facts.rejected_after_stop)
        _add(self._bonus, facts.bonus)
        for stage, counts in (
            ("drafted", facts.drafted_at),
            ("verified", facts.verified_at),
            ("accepted", facts.accepted_at),
        ):
            counters = self._at[stage]
            for position, count in enumerate(counts):
                _add(counters[min(position, LAST_POSITION)], count)
        for length, rounds in facts.accepted_lengths.items():
            self._accepted_length.observe(length, rounds)
        for length, rounds in facts.proposed_lengths.items():
            self._draft_length["proposed"].observe(length, rounds)
        for length, rounds in facts.verified_lengths.items():
            self._draft_length["verified"].observe(length, rounds)
        if facts.verified:
            for b, name in enumerate(self._confidence_count):
                _add(self._confidence_count[name], facts.confidence_count[b])
                _add(self._confidence_accepted[name], facts.confidence_accepted[b])
                _add(self._confidence_sum[name], facts.confidence_sum[b])
            _add(self._expected, facts.expected_accepted)
            self._recent_calibration.add(facts.confidence_count, facts.confidence_accepted, facts.confidence_sum)


class EngineTotal:
    """A counter of which the engine itself keeps count."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._seen = 0

    def read(self, total: int) -> None:
        self._counter.inc(total - self._seen)
        self._seen = total


class StateMetrics:
    """Gauges read from the engine at every scrape."""

    def __init__(self, families: Families) -> None:
        self._running = families.gauge("requests_running", "Requests in engine batches.")
        self._sequences = families.gauge("sequences_running", "Sequences in engine batches.")
        self._waiting = families.gauge("requests_waiting", "Requests admitted, not yet scheduled.")
        self._waiting_limit = families.gauge("requests_waiting_limit", "Bound of the waiting queue.")
        self._prompt_waiting = families.gauge("prompt_tokens_waiting", "Prompt tokens in the queue.")
        self._prompt_waiting_limit = families.gauge("prompt_tokens_waiting_limit", "Bound of the queue in tokens.")
        self._verify_requests = families.gauge("verify_queue_requests", "Work beyond the token budget, in requests.")
        self._verify_tokens = families.gauge("verify_queue_tokens", "Prompt tokens of it not yet computed.")
        self._usage = families.gauge("kv_cache_usage_ratio", "Share of KV blocks held by live requests.")
        self._blocks = families.gauges("kv_cache_blocks", "KV blocks.", state=("used", "cached", "free"))
        self._controller = families.gauges("controller_state", "1 for the controller's state.", state=CONTROLLER_STATES)
        self._load = families.gauge("controller_load_ratio", "Load the controller acts on; 1 is saturated.")
        self._cost = families.gauges(
            "controller_cost_model_seconds",
            "Predicted verify time at the top of a token band.",
            tokens=[band for _, band in TOKEN_BANDS],
        )
        self._last_step = families.gauge("engine_last_step_timestamp_seconds", "Unix time the last step ended.")
        self._step_limit = families.gauge(
            "engine_step_limit_tokens", "Rows that one step may have; fewer for a while after memory ran out."
        )
        self._stalls = EngineTotal(families.total("engine_stalls", "Times work waited and no step ended in time."))
        self._failed_steps = EngineTotal(families.total("engine_failed_steps", "Steps that failed their requests."))
        self._retries = EngineTotal(
            families.total("engine_out_of_memory_retries", "Steps run again, smaller, after memory ran out.")
        )

    def read(self, gauges: EngineGauges) -> None:
        self._running.set(gauges.requests_running)
        self._sequences.set(gauges.sequences_running)
        self._waiting.set(gauges.requests_waiting)
        self._waiting_limit.set(gauges.waiting_limit)
        self._prompt_waiting.set(gauges.prompt_tokens_waiting)
        self._prompt_waiting_limit.set(gauges.prompt_tokens_waiting_limit)
        self._last_step.set(gauges.last_step_unix_s)
        self._step_limit.set(gauges.step_tokens_limit)
        self._stalls.read(gauges.stalls_total)
        self._failed_steps.read(gauges.failed_steps_total)
        self._retries.read(gauges.out_of_memory_retries_total)
        self._verify_requests.set(gauges.verify_queue_requests)
        self._verify_tokens.set(gauges.verify_queue_tokens)
        blocks = gauges.blocks_used + gauges.blocks_cached + gauges.blocks_free
        self._usage.set(gauges.blocks_used / blocks)
        self._blocks["used"].set(gauges.blocks_used)
        self._blocks["cached"].set(gauges.blocks_cached)
        self._blocks["free"].set(gauges.blocks_free)
        for name, gauge in self._controller.items():
            gauge.set(name == gauges.controller_state)
        self._load.set(gauges.load_ratio)
        for top, band in TOKEN_BANDS:
            if top in gauges.cost_model_s:
                self._cost[band].set(gauges.cost_model_s[top])


class MemoryMetrics:
    """Bytes of the device the engine computes on; what the system does not tell is left out."""

    def __init__(self, registry: CollectorRegistry, info: EngineInfo) -> None:
        family = Gauge(
            PREFIX + "device_memory_bytes",
            "Memory of the device; allocated: by this process.",
            ["device", "kind"],
            registry=registry,
        )
        family.labels(info.device, "kv_cache").set(info.kv_cache_bytes)
        self._allocated = None
        if info.device == "cpu":
            self._page_bytes = os.sysconf("SC_PAGE_SIZE")
            family.labels("cpu", "total").set(os.sysconf("SC_PHYS_PAGES") * self._page_bytes)
            if RESIDENT_PAGES.exists():
                self._allocated = family.labels("cpu", "allocated")

    def read(self) -> None:
        if self._allocated is not None:
            self._allocated.set(int(RESIDENT_PAGES.read_text().split()[1]) * self._page_bytes)


class Metrics:
    """All families of one server, by who feeds them."""

    def __init__(self, model_name: str, info: EngineInfo, hourly_cost: float = 0.0, currency: str = "USD") -> None:
        """hourly_cost: of this instance in `currency`, 0 when nobody said."""
        # a `_created` series per child would double the page; set here, since the library reads its own
        # PROMETHEUS_DISABLE_CREATED_SERIES only when it is first imported
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        families = Families(self.registry, model_name)
        self.http = HttpMetrics(families, self.registry)
        self.requests = RequestMetrics(families, self.registry, model_name)
        self.idempotency = IdempotencyMetrics(self.registry)
        self.steps = StepMetrics(families, info.max_draft_tokens)
        self.state = StateMetrics(families)
        self._memory = MemoryMetrics(self.registry, info)
        cost = Gauge(
            PREFIX + "instance_cost_per_hour", "What the operator says it costs.", ["currency"], registry=self.registry
        )
        cost.labels(currency).set(hourly_cost)
        self._describe(families, model_name, info)

    def _describe(self, families: Families, model_name: str, info: EngineInfo) -> None:
        build = {"version": version("dspark-server"), "python": python_version(), "torch": version("torch")}
        Gauge(PREFIX + "build_info", "What is running.", list(build), registry=self.registry).labels(**build).set(1)
        engine = {
            "model": model_name,
            "draft_model": info.drafter_name,
            "device": info.device,
            "kernels": info.kernels,
            "dtype": info.dtype,
            "block_size": str(info.block_size),
            "num_kv_blocks": str(info.num_blocks),
            "max_model_len": str(info.max_model_len),
            "max_draft_tokens": str(info.max_draft_tokens),
            "row_invariant": str(info.row_invariant).lower(),
            "lag": str(info.lag),
        }
        Gauge(PREFIX + "engine_info", "What was started.", list(engine), registry=self.registry).labels(**engine).set(1)
        loads = families.gauges("model_load_seconds", "Time of each start phase.", phase=info.load_seconds)
        for phase, seconds in info.load_seconds.items():
            loads[phase].set(seconds)

    def page(self, gauges: EngineGauges) -> bytes:
        """The text that GET /metrics answers."""
        self.steps.read_recent()
        self.state.read(gauges)
        self._memory.read()
        return prometheus_client.generate_latest(self.registry)


def token_band(tokens: int) -> str:
    for top, band in TOKEN_BANDS:
        if tokens <= top:
            return band
    return LAST_TOKEN_BAND


def _add(counter: Counter, amount: float) -> None:
    if amount:
        counter.inc(amount)


def _add_each(counters: Mapping[str, Counter], amounts: Mapping[Reason, int] | Mapping[PlainReason, int]) -> None:
    for reason, amount in amounts.items():
        counters[reason].inc(amount)
