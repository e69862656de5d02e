"""An engine without a model: the public surface of `dspark.engine.Engine`, playing scripted token ids.

Stops, limits, queue bound, abort, drain, failure and facts behave as the engine promises them, so that what a test
sees of the server is what a real engine would make it do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from dspark.engine import (
    ContextLengthError,
    EngineClosedError,
    EngineFailedError,
    EngineGauges,
    EngineInfo,
    FinishReason,
    Phase,
    PlainReason,
    QueueFullError,
    Reason,
    Request,
    RequestError,
    RequestFacts,
    StepFacts,
    StopCheck,
    TokenDelta,
    TokenLogprob,
)

GAMMA = 7
NUM_BLOCKS = 100

Script = Callable[[Request, int], Iterable[tuple[int, ...]]]
"""(request, choice index) -> the batches of token ids that the steps bring, the first of one token; maybe endless."""


def tiny_info(**overrides: object) -> EngineInfo:
    fields = {
        "model_name": "tiny",
        "drafter_name": "scripted",
        "device": "cpu",
        "dtype": "float32",
        "kernels": "cpu",
        "threads": 1,
        "block_size": 16,
        "num_blocks": NUM_BLOCKS,
        "kv_cache_bytes": 1 << 20,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_draft_tokens": GAMMA,
        "vocab_size": 320,
        "eos_token_ids": (2,),
        "row_invariant": True,
        "load_seconds": {"target_weights": 0.1, "profile": 0.2},
        "weight_bytes": 1 << 18,
    }
    return EngineInfo(**(fields | overrides))


@dataclass
class _Choice:
    index: int
    batches: Iterator[tuple[int, ...]]
    stop_check: StopCheck | None
    output: list[int] = field(default_factory=list)
    finished: bool = False


class FakeStream:
    """`RequestStream` of the fake."""

    def __init__(self, engine: FakeEngine, request: Request) -> None:
        self.request = request
        self.facts = RequestFacts(prompt_tokens=len(request.prompt_token_ids), arrived_s=time.monotonic())
        self.deltas: asyncio.Queue[TokenDelta | Exception | None] = asyncio.Queue()
        make_check = request.make_stop_check
        self.choices = [
            _Choice(index, iter(engine.script(request, index)), make_check() if make_check else None)
            for index in range(request.n)
        ]
        self._engine = engine
        self._ended = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.leave(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenDelta:
        if self._ended:
            raise StopAsyncIteration
        delta = await self.deltas.get()
        if isinstance(delta, Exception):
            self._ended = True
            raise delta
        if delta is None:
            self._ended = True
            raise StopAsyncIteration
        return delta

    @property
    def finished(self) -> bool:
        return all(choice.finished for choice in self.choices)

    def when_freed(self, call: Callable[[], None]) -> None:
        """The fake frees at once."""
        call()


class FakeEngine:
    """script: what each choice says. max_queued: bound of the waiting queue. slots: requests that run at once."""

    def __init__(self, script: Script, info: EngineInfo | None = None, max_queued: int = 256, slots: int = 64) -> None:
        self.script = script
        self.info = info or tiny_info()
        self.on_step: list[Callable[[StepFacts], None]] = []
        self.aborted: list[Request] = []
        self.submitted: list[Request] = []
        self.paused = False
        self.logprob = -0.25
        self.failure: Exception | None = None
        self.failed = False
        self.stalled = False
        self.hung = False
        self.retry_after_s = 1
        self.steps = 0
        self.closed = False
        self._max_queued = max_queued
        self._slots = slots
        self._waiting: list[FakeStream] = []
        self._running: list[FakeStream] = []
        self._freed_after_cancel = 0
        self._draining = False
        self._loop_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._loop_task = asyncio.create_task(self._loop())

    def check_admission(self, cache_salt: bytes = b"") -> None:
        if self.failed:
            raise EngineFailedError("the engine has failed")
        if self._draining:
            raise EngineClosedError("the engine is draining and takes no new work")
        if len(self._waiting) >= self._max_queued:
            raise QueueFullError(len(self._waiting), self._max_queued, retry_after_s=self.retry_after_s)

    def submit(self, request: Request) -> FakeStream:
        self.check_admission(request.cache_salt)
        longest = request.sampling.max_tokens or 1
        total, limit = len(request.prompt_token_ids) + longest, self.info.max_model_len
        if total > limit:
            raise ContextLengthError("prompt_token_ids", f"{total} tokens, but the context holds {limit}")
        if request.n > self.info.max_num_seqs:
            raise RequestError("n", f"n is {request.n}, but {self.info.max_num_seqs} sequences can run at once")
        stream = FakeStream(self, request)
        self.submitted.append(request)
        self._waiting.append(stream)
        return stream

    def leave(self, stream: FakeStream) -> None:
        if not stream.finished:
            self.aborted.append(stream.request)
            self._freed_after_cancel += 1
            stream.facts.cancelled_s = stream.facts.finished_s = time.monotonic()
        for streams in (self._waiting, self._running):
            if stream in streams:
                streams.remove(stream)

    def gauges(self) -> EngineGauges:
        return EngineGauges(
            requests_running=len(self._running),
            sequences_running=sum(stream.request.n for stream in self._running),
            requests_waiting=len(self._waiting),
            waiting_limit=self._max_queued,
            prompt_tokens_waiting=sum(len(stream.request.prompt_token_ids) for stream in self._waiting),
            verify_queue_requests=len(self._waiting),
            verify_queue_tokens=0,
            blocks_used=len(self._running),
            blocks_cached=0,
            blocks_free=NUM_BLOCKS - len(self._running),
            controller_state="full",
            load_ratio=0.5,
            cost_model_s={8: 0.01, 32: 0.02, 64: 0.03, 128: 0.05, 256: 0.1, 512: 0.2},
        )

    async def drain(self, timeout_s: float) -> bool:
        self._draining = True
        until_s = time.monotonic() + timeout_s
        while (self._running or self._waiting) and time.monotonic() < until_s:
            await asyncio.sleep(0.001)
        left = [*self._running, *self._waiting]
        for stream in left:
            for choice in stream.choices:
                if not choice.finished:
                    stream.deltas.put_nowait(TokenDelta(choice.index, (), finish_reason=FinishReason.ABORT))
        return not left

    async def close(self) -> None:
        self.closed = True
        if self._loop_task is not None:
            self._loop_task.cancel()

    async def _loop(self) -> None:
        while True:
            await asyncio.sleep(0)
            if self.paused or not (self._running or self._waiting):
                await asyncio.sleep(0.001)
                continue
            if self.failure is not None:
                self._fail(self.failure)
                return
            self._step()

    def _fail(self, cause: Exception) -> None:
        self.failed = True
        for stream in [*self._running, *self._waiting]:
            error = EngineFailedError("a step failed")
            error.__cause__ = cause
            stream.deltas.put_nowait(error)
        self._running, self._waiting = [], []

    def _step(self) -> None:
        self.steps += 1
        facts = StepFacts(phase=Phase.MIXED, step_s=0.01, verify_s=0.008, predicted_step_s=0.009, drafting=True)
        facts.drafted_at, facts.verified_at, facts.accepted_at = ([0] * GAMMA for _ in range(3))
        facts.freed_after_cancel, self._freed_after_cancel = self._freed_after_cancel, 0
        while self._waiting and len(self._running) < self._slots:
            stream = self._waiting.pop(0)
            stream.facts.scheduled_s = time.monotonic()
            facts.prompt_computed += stream.facts.prompt_tokens
            facts.prefix_queried += stream.facts.prompt_tokens
            self._running.append(stream)
        for stream in list(self._running):
            for choice in stream.choices:
                if not choice.finished:
                    stream.deltas.put_nowait(self._advance(stream, choice, facts))
            if stream.finished:
                stream.facts.finished_s = time.monotonic()
                stream.deltas.put_nowait(None)
                self._running.remove(stream)
        facts.batch_tokens = facts.prompt_computed + facts.verified + facts.rounds_with_drafts
        facts.batch_sequences = len(self._running)
        for callback in self.on_step:
            callback(facts)

    def _advance(self, stream: FakeStream, choice: _Choice, facts: StepFacts) -> TokenDelta:
        sampling = stream.request.sampling
        batch = next(choice.batches, ())
        kept, reason = self._cut(stream, choice, batch)
        first = not choice.output
        choice.output.extend(kept)
        choice.finished = reason is not None
        self._count(stream.facts, facts, batch, kept, first)
        logprobs = None
        if sampling.logprobs is not None:
            top = tuple((token_id, -0.5 - token_id) for token_id in range(sampling.logprobs))
            logprobs = tuple(TokenLogprob(token_id, self.logprob, top) for token_id in kept)
        accepted = 0 if first else min(len(kept), len(batch) - 1)
        return TokenDelta(choice.index, kept, accepted, logprobs, reason)

    def _cut(
        self, stream: FakeStream, choice: _Choice, batch: tuple[int, ...]
    ) -> tuple[tuple[int, ...], FinishReason | None]:
        """The tokens kept of a batch, and why the choice ends with them."""
        sampling = stream.request.sampling
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(self.info.eos_token_ids))
        limit = sampling.max_tokens or self.info.max_model_len
        reason = None if batch else FinishReason.LENGTH
        for position, token_id in enumerate(batch, len(choice.output)):
            if token_id in ends and position >= sampling.min_tokens:
                batch, reason = batch[: position - len(choice.output) + 1], FinishReason.STOP
                break
            if position + 1 == limit:
                batch, reason = batch[: position - len(choice.output) + 1], FinishReason.LENGTH
                break
        kept = choice.stop_check(batch) if choice.stop_check else None
        return (batch, reason) if kept is None else (batch[:kept], FinishReason.STOP)

    def _count(
        self, request: RequestFacts, step: StepFacts, batch: tuple[int, ...], kept: tuple[int, ...], first: bool
    ) -> None:
        request.generated_tokens += len(kept)
        step.generated += len(kept)
        if first:
            step.first_tokens += len(kept)
            request.first_token_s = request.first_token_s or time.monotonic()
            return
        if not kept:
            return
        accepted = min(len(kept), len(batch) - 1)
        verified = min(len(batch), GAMMA)
        if len(batch) == 1:
            verified = 0
            step.rounds_without_drafts += 1
            request.rounds_without_drafts += 1
            step.plain_rounds[PlainReason.LOW_ACCEPTANCE] = step.plain_rounds.get(PlainReason.LOW_ACCEPTANCE, 0) + 1
        else:
            step.rounds_with_drafts += 1
            request.rounds_with_drafts += 1
            step.drafted += GAMMA
            request.drafted_tokens += GAMMA
            step.truncated[Reason.LOAD] = step.truncated.get(Reason.LOAD, 0) + GAMMA - verified
            for position in range(GAMMA):
                step.drafted_at[position] += 1
                step.verified_at[position] += position < verified
                step.accepted_at[position] += position < accepted
            step.proposed_lengths[GAMMA] = step.proposed_lengths.get(GAMMA, 0) + 1
            step.verified_lengths[verified] = step.verified_lengths.get(verified, 0) + 1
        step.verified += verified
        request.verified_tokens += verified
        step.accepted += accepted
        request.accepted_tokens += accepted
        stopped_early = len(kept) < len(batch)
        step.bonus += len(kept) - accepted
        if stopped_early:
            step.rejected_after_stop += verified - accepted
        elif verified > accepted:
            step.rejected_mismatch += 1
            step.rejected_after_mismatch += verified - accepted - 1
        step.accepted_lengths[len(kept)] = step.accepted_lengths.get(len(kept), 0) + 1
