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

from dspark.engine.config import EngineConfig
from dspark.engine.errors import EngineClosedError, EngineError, EngineFailedError, QueueFullError
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


class RequestStream:
    """Async iterator over the deltas of one request, and its owner: leaving the context by any door aborts and frees."""

    def __init__(self, facts: RequestFacts, abort: Callable[[], None]) -> None:
        self.facts = facts
        self._abort = abort
        self._deltas: deque[TokenDelta] = deque()
        self._changed = asyncio.Event()
        self._ended = False
        self._error: EngineError | None = None

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
        """The next delta of any choice; ends when every choice has finished. Raises EngineFailedError, EngineClosedError."""
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
        self._config = config
        self._worker = worker
        self._loop = Loop(self.scheduler, parts.controller, parts.runner, worker, self._deliver)
        self._streams: dict[int, RequestStream] = {}
        self._next_id = 0
        self._waiting_requests = 0
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._failure: BaseException | None = None
        self._task: asyncio.Task[None] | None = None

    @classmethod
    def load(cls, config: EngineConfig, progress: Progress | None = None) -> Engine:
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
        self._task = asyncio.create_task(self._run(), name="engine loop")

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def submit(self, request: Request) -> RequestStream:
        """Queue a request. Raises RequestError, QueueFullError, EngineClosedError or EngineFailedError before any work."""
        if self._failure is not None:
            raise EngineFailedError("the engine has failed and takes no requests") from self._failure
        if self._closing:
            raise EngineClosedError("the server is shutting down and takes no new requests")
        check_request(request, self.info)
        waiting = self._count_waiting()
        if waiting >= self._config.max_queued_requests:
            raise QueueFullError(waiting, self._config.max_queued_requests)
        record = self._record(request)
        stream = RequestStream(record.facts, lambda: self._abort(record))
        self._streams[id(record)] = stream
        self.scheduler.add(record)
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

    def _count_waiting(self) -> int:
        """Requests that have not been scheduled yet."""
        return sum(s.record.facts.scheduled_s is None for s in self.scheduler.waiting)

    def _abort(self, record: RequestRecord) -> None:
        self.scheduler.abort(record)
        self._end_if_finished(record)
        self._wake.set()

    async def _run(self) -> None:
        """Step while there is work; a step that raises ends every stream."""
        while True:
            try:
                worked = await self._loop.step()
            except Exception as error:  # whatever a step raises, no stream may be left waiting
                log.exception("an engine step failed")
                self._fail(error)
                return
            if not worked:
                self._idle.set()
                self._wake.clear()
                await self._wake.wait()

    def _fail(self, error: Exception) -> None:
        self._failure = error
        for stream in self._streams.values():
            failure = EngineFailedError("the engine failed while it worked on this request")
            failure.__cause__ = error
            stream.push([], ended=True, error=failure)
        self._streams.clear()
        self._idle.set()

    def _deliver(self, touched: list[RequestRecord], facts: StepFacts) -> None:
        for record in touched:
            stream = self._streams.get(id(record))
            if stream is not None:
                deltas, record.deltas = record.deltas, []
                stream.push(deltas, ended=False)
            self._end_if_finished(record)
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
            requests_waiting=self._count_waiting(),
            waiting_limit=self._config.max_queued_requests,
            prompt_tokens_waiting=sum(len(s.tokens) for s in waiting),
            verify_queue_requests=len(waiting),
            verify_queue_tokens=self.scheduler.queue_tokens,
            blocks_used=cache.used,
            blocks_cached=cache.cached,
            blocks_free=cache.free,
            controller_state=controller.state,
            load_ratio=controller.load_ratio,
            cost_model_s={top: float(controller.cost.verify_s(top)) for top in tops},
        )

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new work and finish what is here; after `timeout_s` abort the rest. True: everything finished."""
        self._closing = True
        if self._idle.is_set():  # with no time at all, wait_for would not even look
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            for stream in list(self._streams.values()):
                stream.push([], ended=True, error=EngineClosedError("the server is shutting down"))
            for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
                self._abort(sequence.record)
            await self._idle.wait()
            return False
        return True

    async def close(self) -> None:
        """Stop at once: every open stream ends with EngineClosedError."""
        await self.drain(0.0)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._worker.shutdown()
