"""The engine's public face: submit a request, iterate its tokens, drain, close."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np

from dspark.engine.admission import Admission
from dspark.engine.config import EngineConfig
from dspark.engine.errors import DeadlineExceededError, EngineClosedError, EngineError, EngineFailedError
from dspark.engine.facts import EngineGauges, EngineInfo, RequestFacts, StepFacts
from dspark.engine.kv_cache import KVCache
from dspark.engine.loop import Loop
from dspark.engine.noise import sequence_key
from dspark.engine.request import Request, TokenDelta
from dspark.engine.request_check import check_request, output_limit
from dspark.engine.scheduler import Scheduler
from dspark.engine.sequence import RequestRecord, Sequence
from dspark.engine.startup import EngineParts, Progress, start_up

log = logging.getLogger(__name__)

LAST_STEP_S = 10.0
"""How long a shutdown waits for the step that is running."""


class RequestStream:
    """Async iterator over the deltas of one request, and its owner: leaving the context by any door aborts and frees."""

    def __init__(self, facts: RequestFacts, abort: Callable[[], None]) -> None:
        self.facts = facts
        self._abort = abort
        self._deltas: deque[TokenDelta] = deque()
        self._changed = asyncio.Event()
        self._ended = False
        self._error: EngineError | None = None
        self._on_end: list[Callable[[], None]] = []
        self._when_freed: list[Callable[[], None]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Abort what is unfinished and return at once; the blocks are free within one step."""
        if not self._ended:
            self._abort()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenDelta:
        """The next delta of any choice; ends when every choice has finished.

        Raises EngineFailedError, EngineClosedError, DeadlineExceededError, GrammarError, and QueueFullError where a request
        of a tenant with fewer waiting ones took the place of this one, which had not started.
        """
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._deltas.popleft()

    def push(self, deltas: list[TokenDelta], ended: bool, error: EngineError | None = None) -> None:
        """Called by the engine, once per step at most."""
        self._deltas.extend(deltas)
        self._ended = self._ended or ended
        self._error = self._error or error
        self._changed.set()
        if self._ended:
            for call in self._on_end:
                call()

    def on_end(self, call: Callable[[], None]) -> None:
        """Call when the last delta or an error has come, perhaps more than once."""
        self._on_end.append(call)

    def when_freed(self, call: Callable[[], None]) -> None:
        """Call once the request holds no K/V any more: now, if that is so already."""
        if self.facts.finished_s is not None:
            call()
        else:
            self._when_freed.append(call)

    def freed(self) -> None:
        """Called by the engine, once."""
        for call in self._when_freed:
            call()


class Engine:
    """One model, one loop task, one worker thread. All methods but `load` belong to one event loop."""

    def __init__(self, config: EngineConfig, parts: EngineParts, worker: ThreadPoolExecutor) -> None:
        self.info: EngineInfo = parts.info
        self.on_step: list[Callable[[StepFacts], None]] = []
        """Called on the event loop once per step, after its tokens were delivered."""
        self.controller = parts.controller
        self.scheduler = Scheduler(
            KVCache(parts.info.num_blocks),
            config.max_num_seqs,
            config.max_num_batched_tokens,
            parts.stop_token_ids,
        )
        self.stalls = 0
        """Times that there was work and no step ended for `EngineConfig.stall_timeout_s`."""
        self.hung = False
        """A shutdown could not wait any longer for the step that was running: its thread is still there."""
        self._admission = Admission(self.scheduler.waiting, config.max_queued_requests, config.max_queued_tokens)
        self._stall_timeout_s = config.stall_timeout_s
        self._worker = worker
        self._loop = Loop(
            self.scheduler,
            parts.controller,
            parts.runner,
            worker,
            parts.info.lag,
            self._deliver,
            self._report,
            self._fail_requests,
        )
        self._busy_since_s = 0.0
        self._streams: dict[int, RequestStream] = {}
        self._next_id = 0
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._failure: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    def load(cls, config: EngineConfig, progress: Progress | None = None) -> Self:
        """Blocking: find, load and check model and drafter, allocate K/V, measure costs. Raises ConfigError."""
        worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        try:
            # in the worker, because thread counts of tensor libraries belong to the thread that sets them
            parts = worker.submit(start_up, config, progress).result()
        except BaseException:
            worker.shutdown(wait=False)
            raise
        return cls(config, parts, worker)

    async def start(self) -> None:
        self._tasks.append(asyncio.create_task(self._run(), name="engine loop"))
        self._tasks.append(asyncio.create_task(self._watch(), name="engine watchdog"))

    @property
    def failed(self) -> bool:
        """The engine has given up and answers nothing any more."""
        return self._failure is not None

    @property
    def stalled(self) -> bool:
        """There is work, and no step has ended for `EngineConfig.stall_timeout_s`. It may still come back."""
        since_s = max(self._loop.last_step_s, self._busy_since_s)
        return not self._idle.is_set() and time.monotonic() - since_s > self._stall_timeout_s

    def check_admission(self, cache_salt: bytes = b"") -> None:
        """Would any request of this salt's be refused? Costs next to nothing: ask before preparing one.

        Raises QueueFullError, EngineClosedError or EngineFailedError.
        """
        if self._failure is not None:
            raise EngineFailedError("the engine has failed and takes no requests") from self._failure
        if self._closing:
            raise EngineClosedError("the server is shutting down and takes no new requests")
        self._admission.check(cache_salt)

    def submit(self, request: Request) -> RequestStream:
        """Queue a request.

        Raises RequestError, QueueFullError, EngineClosedError or EngineFailedError before any work.
        """
        self.check_admission(request.cache_salt)
        check_request(request, self.info)
        displaced = self._admission.admit(request.cache_salt, len(request.prompt_token_ids))
        record = self._record(request)
        if displaced is not None:
            self._cut_short(displaced, self._admission.refusal(1))
        stream = RequestStream(record.facts, lambda: self._abort(record))
        record.on_freed = stream.freed
        self._streams[id(record)] = stream
        self.scheduler.add(record)
        if request.deadline_s is not None:
            self._end_at(request.deadline_s, record, stream)
        if self._idle.is_set():
            self._busy_since_s = time.monotonic()
            self._idle.clear()
        self._wake.set()
        return stream

    def _record(self, request: Request) -> RequestRecord:
        record = RequestRecord(request, RequestFacts(len(request.prompt_token_ids), time.monotonic()))
        prompt = np.array(request.prompt_token_ids, np.int64)
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(63)
        for choice in range(request.n):
            record.sequences.append(
                Sequence(
                    id=self._next_id,
                    record=record,
                    choice=choice,
                    noise_key=sequence_key(seed, choice, prompt),
                    max_tokens=output_limit(request, self.info),
                    stop_check=request.make_stop_check() if request.make_stop_check else None,
                    tokens=list(request.prompt_token_ids),
                    prompt_len=len(prompt),
                    salt=request.cache_salt,
                )
            )
            self._next_id += 1
        return record

    def _abort(self, record: RequestRecord) -> None:
        self.scheduler.abort(record)
        self._end_if_finished(record)
        self._wake.set()

    def _end_at(self, deadline_s: float, record: RequestRecord, stream: RequestStream) -> None:
        left_s = deadline_s - time.monotonic()

        def expire() -> None:
            self._cut_short(record, DeadlineExceededError("the request was not finished by its deadline"))

        if left_s <= 0.0:
            expire()
        else:  # between steps or while one runs, which may take long
            stream.on_end(asyncio.get_running_loop().call_later(left_s, expire).cancel)

    def _cut_short(self, record: RequestRecord, error: EngineError) -> None:
        """End the request with an error, and free what it holds within one step."""
        stream = self._streams.get(id(record))
        if stream is not None:
            stream.push([], ended=True, error=error)
        self._abort(record)

    async def _watch(self) -> None:
        """Count and log stalls, each once. The event loop is free while the worker hangs."""
        reported = False
        while True:
            await asyncio.sleep(self._stall_timeout_s / 8)
            if self.stalled and not reported:
                self.stalls += 1
                log.error("there is work, and no step has ended for %g s", self._stall_timeout_s)
            reported = self.stalled

    async def _run(self) -> None:
        """Step while there is work. Failed steps are the loop's affair; what it lets through ends every stream."""
        while True:
            try:
                worked = await self._step()
            except Exception as error:  # whatever a step raises, no stream may be left waiting
                log.exception("the engine has failed")
                self._fail(error)
                return
            if not worked:
                self._idle.set()
                self._wake.clear()
                await self._wake.wait()

    async def _step(self) -> bool:
        """False: there was nothing to do."""
        return await self._loop.step()

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._end_streams([*self._streams], error)
        self._idle.set()

    def _fail_requests(self, records: list[RequestRecord], error: BaseException) -> None:
        self._end_streams([id(record) for record in records], error)

    def _end_streams(self, keys: list[int], error: BaseException) -> None:
        for key in keys:
            stream = self._streams.pop(key, None)
            if stream is not None:
                failure = EngineFailedError("the engine failed while it worked on this request")
                failure.__cause__ = error
                stream.push([], ended=True, error=failure)

    def _deliver(self, touched: list[RequestRecord]) -> None:
        for record in touched:
            stream = self._streams.get(id(record))
            if stream is not None:
                deltas, record.deltas = record.deltas, []
                stream.push(deltas, ended=False, error=record.failure)
            self._end_if_finished(record)

    def _report(self, facts: StepFacts) -> None:
        for listener in self.on_step:
            listener(facts)

    def _end_if_finished(self, record: RequestRecord) -> None:
        if record.finished or record.aborted:
            stream = self._streams.pop(id(record), None)
            if stream is not None:
                stream.push([], ended=True)

    def gauges(self) -> EngineGauges:
        """State now; cheap enough for every scrape."""
        cache, controller = self.scheduler.kv_cache, self.controller
        running, waiting = self.scheduler.running, self.scheduler.waiting
        tops = (8, 32, 64, 128, 256, 512)
        return EngineGauges(
            requests_running=len({id(s.record) for s in running}),
            sequences_running=len(running),
            requests_waiting=waiting.requests,
            waiting_limit=self._admission.max_requests,
            prompt_tokens_waiting=waiting.prompt_tokens,
            verify_queue_requests=len(waiting),
            verify_queue_tokens=self.scheduler.queue_tokens,
            blocks_used=cache.used,
            blocks_cached=cache.cached,
            blocks_free=cache.free,
            controller_state=controller.state,
            load_ratio=controller.load_ratio,
            cost_model_s={top: float(controller.cost.verify_s(top)) for top in tops},
            prompt_tokens_waiting_limit=self._admission.max_prompt_tokens,
            last_step_unix_s=self._loop.last_step_unix_s,
            stalls_total=self.stalls,
            failed_steps_total=self._loop.failed_steps,
            out_of_memory_retries_total=self._loop.out_of_memory_retries,
            step_tokens_limit=self.scheduler.step_tokens,
        )

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new work and finish what is here; after `timeout_s` abort the rest. True: everything finished."""
        self._closing = True
        if self._idle.is_set():  # with no time at all, wait_for would not even look
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
                self._cut_short(sequence.record, EngineClosedError("the server is shutting down"))
            try:
                await asyncio.wait_for(self._idle.wait(), LAST_STEP_S)
            except TimeoutError:
                self.hung = True
                log.error("the step that was running did not end within %g s", LAST_STEP_S)
            return False
        return True

    async def close(self) -> None:
        """Stop at once: every open stream ends with EngineClosedError."""
        if not self.hung:
            await self.drain(0.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._worker.shutdown(wait=not self.hung)
