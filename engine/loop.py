"""The step: everything the server does with a batch, in the order it does it.

With a lag of 1 a step is planned and launched before the last one is committed, so that a device need not wait for the host.
For what the host does not know by then (how many drafts were accepted, who stopped, what is drafted) the plan has bounds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from dspark.engine.facts import StepFacts
from dspark.engine.load_controller import Allocation, LoadController, StepLoad
from dspark.engine.runner import Pending, Runner
from dspark.engine.scheduler import Scheduler
from dspark.engine.sequence import Batch, RequestRecord, StepResult
from dspark.engine.step_facts import describe_step, step_load, step_outcome

log = logging.getLogger(__name__)

Result = TypeVar("Result")

HEAD_START_S = 0.001
"""How long the worker has the interpreter to itself: work on the loop in its first moments would hold it up."""
MOST_FAILURES = 3
"""After so many times that requests were ended because steps failed, with no good step between, it was not their fault."""
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "DefaultCPUAllocator")
"""How torch says it: only CUDA has an exception class for it."""


class RunFailedError(Exception):
    """The worker's part of a step raised; the cause is what it raised."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(f"a step of {len(batch.sequences)} sequences failed")
        self.batch = batch


@dataclass(slots=True)
class LaunchedStep:
    """A step in flight. load, allocation: of bounds, until the step before it is committed."""

    batch: Batch
    load: StepLoad
    allocation: Allocation
    launched: Future[Pending]
    started_s: float
    schedule_s: float


@dataclass(frozen=True, slots=True)
class CommittedStep:
    """A step whose tokens are not delivered yet. touched: the requests that have something to deliver."""

    batch: Batch
    load: StepLoad
    allocation: Allocation
    result: StepResult
    facts: StepFacts
    touched: list[RequestRecord]


class Loop:
    """Runs steps while there is work. Only the loop touches scheduler and controller; only the worker touches tensors."""

    def __init__(
        self,
        scheduler: Scheduler,
        controller: LoadController,
        runner: Runner,
        worker: Executor,
        lag: int,
        deliver: Callable[[list[RequestRecord]], None],
        report: Callable[[StepFacts], None],
        fail: Callable[[list[RequestRecord], BaseException], None],
    ) -> None:
        """worker: one thread. lag: steps that may be in flight while the next one is planned, 0 or 1.

        deliver: hands deltas to the requests' streams. report: hands facts to whoever counts. fail: tells requests that their
        step failed.
        """
        self.last_step_s = 0.0
        """When the last step ended, well or not: `time.monotonic()`."""
        self.last_step_unix_s = 0.0
        """The same as Unix time; 0: no step has ended."""
        self.failed_steps = 0
        self.out_of_memory_retries = 0
        self.scheduler = scheduler
        self.controller = controller
        self.runner = runner
        self._worker = worker
        self._lag = lag
        self._in_flight: deque[LaunchedStep] = deque()
        self._last_commit_s = 0.0
        self._deliver = deliver
        self._report = report
        self._fail = fail
        self._failures_in_a_row = 0
        self._committed: CommittedStep | None = None

    async def step(self) -> bool:
        """Launch the next step, and commit the oldest one where more than `lag` are in flight or none could be planned.

        False when there was nothing to do. Raises when no later step can be trusted.
        """
        started_s = time.perf_counter()
        batch = self._schedule()  # who runs; prefill chunks; blocks; token budget
        if batch is None and not self._in_flight:
            self._conclude()
            return False
        try:
            if batch is not None:
                self._launch(batch, started_s)  # verify, accept, observe, propose
            if batch is None or len(self._in_flight) > self._lag:
                oldest = self._in_flight.popleft()
                self._commit(oldest, await self._work(self._collect, oldest))
            else:
                await self._work(lambda: None)  # nothing is planned while the worker reads what planning writes
                return True
        except RunFailedError as failure:
            await self._abandon()
            self._recover(failure.batch, failure.__cause__ or failure)
        except Exception as error:  # planning or commit: what the requests in flight have is not known any more
            await self._abandon()
            self.failed_steps += 1
            log.exception("an engine step failed; the requests in flight end")
            self._conclude()
            self._end_requests(self.scheduler.fail(), error)
        self.last_step_s, self.last_step_unix_s = time.monotonic(), time.time()
        return True

    def _schedule(self) -> Batch | None:
        """The next step, on what the one before it may bring; None where that has failed, until it is found out."""
        if not self._in_flight:
            return self.scheduler.schedule({})
        newest = self._in_flight[-1].launched
        return None if newest.exception() else self.scheduler.schedule(newest.result().expected)

    def _launch(self, batch: Batch, started_s: float) -> None:
        load = step_load(batch, self.controller)
        allocation = self.controller.allocate(load)  # how many drafts are verified, and who is drafted for next
        calibration = self.controller.calibration.table()
        planned_s = time.perf_counter()
        launched = self._worker.submit(self.runner.launch, batch, allocation, calibration)
        self._in_flight.append(LaunchedStep(batch, load, allocation, launched, started_s, planned_s - started_s))

    async def _work(self, call: Callable[..., Result], *args: object) -> Result:
        """Have the worker do what was launched, and then this. Meanwhile the step committed last is delivered."""
        running = asyncio.wrap_future(self._worker.submit(call, *args))
        await asyncio.wait({running}, timeout=HEAD_START_S)
        self._conclude()  # while the worker is busy, delivering costs no step time
        return await running

    def _collect(self, step: LaunchedStep) -> StepResult:
        """In the worker."""
        try:
            return self.runner.collect(step.launched.result())
        except Exception as error:
            raise RunFailedError(step.batch) from error

    def _commit(self, step: LaunchedStep, result: StepResult) -> None:
        ran_s = time.perf_counter()
        facts = StepFacts()
        touched = self.scheduler.commit(step.batch, step.allocation, result, facts)  # lengths grow; stops; blocks freed
        if self._in_flight:  # what this one drafted is now known to the host
            behind = self._in_flight[0]
            behind.load = step_load(behind.batch, self.controller)
            behind.allocation = self.controller.resolve(behind.load, behind.allocation)
        committed_s = time.perf_counter()
        facts.schedule_s, facts.commit_s = step.schedule_s, committed_s - ran_s
        # with steps in flight behind one another: from commit to commit, so that no time is counted twice
        facts.step_s = committed_s - max(step.started_s, self._last_commit_s)
        self._last_commit_s = committed_s
        self._failures_in_a_row = 0
        self._committed = CommittedStep(step.batch, step.load, step.allocation, result, facts, touched)

    async def _abandon(self) -> None:
        """Steps behind one that failed were computed on sand: wait until they are done, whatever they bring."""
        while self._in_flight:
            with suppress(RunFailedError):
                await self._work(self._collect, self._in_flight.popleft())

    def _recover(self, batch: Batch, error: BaseException) -> None:
        """Nothing of the step is committed: it is planned again, and no request ends before it is known which one it is."""
        if _is_out_of_memory(error) and self.scheduler.retry_smaller(batch):
            self.out_of_memory_retries += 1
            log.warning("a step ran out of memory (%s): at most %d rows a step now", error, self.scheduler.step_tokens)
            return
        self.failed_steps += 1
        log.error("an engine step of %d sequences failed; they are tried again", len(batch.sequences), exc_info=error)
        guilty = self.scheduler.retry(batch)
        if guilty is not None:
            self._end_requests([guilty], error)

    def _end_requests(self, records: list[RequestRecord], error: BaseException) -> None:
        """Raises RuntimeError when it is not the requests' fault."""
        self._failures_in_a_row += 1
        self._fail(records, error)
        if self._failures_in_a_row >= MOST_FAILURES:
            raise RuntimeError("steps fail whatever is in them") from error

    def _conclude(self) -> None:
        """Tokens of the last step to their streams, its facts to those who count or learn; it is right without them."""
        if self._committed is None:
            return
        last, self._committed = self._committed, None
        self._deliver(last.touched)
        try:
            self._account(last)
        except Exception:
            self.failed_steps += 1
            log.exception("metrics or load controller did not take in a step")

    def _account(self, last: CommittedStep) -> None:
        """The step's facts to the metrics and to the controller, which learns from it."""
        describe_step(last.facts, last.batch, last.allocation, last.result)
        self._report(last.facts)
        for sequence_id in last.batch.ended:
            self.controller.forget(sequence_id)
        self.controller.observe(step_outcome(last.batch, last.load, last.result, last.facts.step_s))


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )
