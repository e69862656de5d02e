"""The step: everything the server does with a batch, in the order it does it."""

from __future__ import annotations

import asyncio
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

HEAD_START_S = 0.001
"""How long the worker has the interpreter to itself: work on the loop in its first moments would hold it up."""


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
        deliver: Callable[[list[RequestRecord], StepFacts], None],
    ) -> None:
        """worker: one thread. deliver: hands deltas to the requests' streams and facts to whoever counts."""
        self.scheduler = scheduler
        self.controller = controller
        self.runner = runner
        self._worker = worker
        self._deliver = deliver
        self._committed: CommittedStep | None = None

    async def step(self) -> bool:
        """Run one step; False when there was nothing to do."""
        started_s = time.perf_counter()
        batch = self.scheduler.schedule()  # who runs; prefill chunks; blocks; token budget
        if batch is None:
            self._conclude()
            return False
        load = step_load(batch, self.controller.block_size)
        allocation = self.controller.allocate(load)  # how many drafts are verified, and who is drafted for next
        calibration = self.controller.calibration.table()
        planned_s = time.perf_counter()
        running = asyncio.get_running_loop().run_in_executor(  # verify, accept, observe, propose
            self._worker, self.runner.run, batch, allocation, calibration
        )
        await asyncio.wait({running}, timeout=HEAD_START_S)
        self._conclude()  # the step before: while the worker is busy, delivering costs no step time
        result = await running
        ran_s = time.perf_counter()
        facts = StepFacts()
        touched = self.scheduler.commit(batch, allocation, result, facts)  # lengths grow; stops; blocks freed
        committed_s = time.perf_counter()
        facts.schedule_s, facts.commit_s = planned_s - started_s, committed_s - ran_s
        facts.step_s = committed_s - started_s
        self._committed = CommittedStep(batch, load, allocation, result, facts, touched)
        return True

    def _conclude(self) -> None:
        """Tokens of the last step to their streams, its facts to the metrics and to the controller, which learns from it."""
        if self._committed is None:
            return
        last, self._committed = self._committed, None
        describe_step(last.facts, last.batch, last.allocation, last.result)
        self._deliver(last.touched, last.facts)
        for sequence_id in last.batch.ended:
            self.controller.forget(sequence_id)
        self.controller.observe(step_outcome(last.batch, last.load, last.result, last.facts.step_s))
