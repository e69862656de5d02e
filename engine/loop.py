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
MOST_FAILED_STEPS = 5
"""After so many failed steps in a row it is not the requests' fault: the engine gives up."""
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "DefaultCPUAllocator")
"""How torch says it: only CUDA has an exception class for it."""


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
        fail: Callable[[list[RequestRecord], Exception], None],
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
        self._failed_in_a_row = 0
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
        except Exception as error:  # whatever it was, only this step's requests were in it
            log.exception("an engine step failed; its %d sequences end", len(batch.sequences))
            self._end_requests(batch, error)
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
            if not (_is_out_of_memory(error) and self.scheduler.retry(batch)):
                raise
            self.out_of_memory_retries += 1
            log.warning("a step ran out of memory (%s): at most %d rows a step now", error, self.scheduler.step_tokens)
            return
        ran_s = time.perf_counter()
        facts = StepFacts()
        touched = self.scheduler.commit(batch, allocation, result, facts)  # lengths grow; stops; blocks freed
        committed_s = time.perf_counter()
        facts.schedule_s, facts.commit_s = planned_s - started_s, committed_s - ran_s
        facts.step_s = committed_s - started_s
        self._failed_in_a_row = 0
        self._committed = CommittedStep(batch, load, allocation, result, facts, touched)

    def _end_requests(self, batch: Batch, error: Exception) -> None:
        """Fail the requests of a failed step; the others go on if the pool is whole."""
        self.failed_steps += 1
        self._failed_in_a_row += 1
        self._fail(self.scheduler.fail(batch), error)
        if self._failed_in_a_row >= MOST_FAILED_STEPS:
            raise RuntimeError(f"{MOST_FAILED_STEPS} steps in a row failed") from error

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


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )
