"""The step: everything the server does with a batch, in the order it does it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from dspark.engine.facts import StepFacts
from dspark.engine.load_controller import Allocation, LoadController, StepLoad
from dspark.engine.runner import Runner
from dspark.engine.scheduler import Scheduler
from dspark.engine.sequence import Batch, RequestRecord, StepResult
from dspark.engine.step_facts import describe_step, step_load, step_outcome

log = logging.getLogger(__name__)

HEAD_START_S = 0.001
"""How long the worker has the interpreter to itself: work on the loop in its first moments would hold it up."""
MOST_FAILURES = 3
"""After so many times that requests were ended because steps failed, with no good step between, it was not their fault."""
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "DefaultCPUAllocator")
"""How torch says it: only CUDA has an exception class for it."""


class RunFailedError(Exception):
    """The worker's part of a step raised; the cause is what it raised."""


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
        deliver: Callable[[list[RequestRecord]], None],
        report: Callable[[StepFacts], None],
        fail: Callable[[list[RequestRecord], BaseException], None],
    ) -> None:
        """worker: one thread. deliver: hands deltas to the requests' streams. report: hands facts to whoever counts.
        fail: tells requests that their step failed.
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
        self._deliver = deliver
        self._report = report
        self._fail = fail
        self._failures_in_a_row = 0
        self._committed: CommittedStep | None = None

    async def step(self) -> bool:
        """Run one step; False when there was nothing to do. Raises when no later step can be trusted."""
        started_s = time.perf_counter()
        batch = self.scheduler.schedule()  # who runs; prefill chunks; blocks; token budget
        if batch is None:
            self._conclude()
            return False
        try:
            await self._run(batch, started_s)
        except RunFailedError as failure:
            self._recover(batch, failure.__cause__ or failure)
        except Exception as error:  # planning or commit: what this step's requests have is not known any more
            self.failed_steps += 1
            log.exception("an engine step failed; its %d sequences end", len(batch.sequences))
            self._end_requests(self.scheduler.fail(batch), error)
        self.last_step_s, self.last_step_unix_s = time.monotonic(), time.time()
        return True

    async def _run(self, batch: Batch, started_s: float) -> None:
        load = step_load(batch, self.controller.block_size)
        allocation = self.controller.allocate(load)  # how many drafts are verified, and who is drafted for next
        calibration = self.controller.calibration.table()
        planned_s = time.perf_counter()
        running = asyncio.get_running_loop().run_in_executor(  # verify, accept, observe, propose
            self._worker, self.runner.run, batch, allocation, calibration
        )
        await asyncio.wait({running}, timeout=HEAD_START_S)
        self._conclude()  # the step before: while the worker is busy, delivering costs no step time
        try:
            result = await running
        except Exception as error:
            raise RunFailedError from error
        ran_s = time.perf_counter()
        facts = StepFacts()
        touched = self.scheduler.commit(batch, allocation, result, facts)  # lengths grow; stops; blocks freed
        committed_s = time.perf_counter()
        facts.schedule_s, facts.commit_s = planned_s - started_s, committed_s - ran_s
        facts.step_s = committed_s - started_s
        self._failures_in_a_row = 0
        self._committed = CommittedStep(batch, load, allocation, result, facts, touched)

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
