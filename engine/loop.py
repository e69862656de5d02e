"""The step: everything the server does with a batch, in the order it does it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace

from dspark.engine.facts import StepFacts
from dspark.engine.load_controller import LoadController
from dspark.engine.runner import Runner
from dspark.engine.scheduler import Scheduler
from dspark.engine.sequence import RequestRecord
from dspark.engine.step_facts import describe_plan, describe_result, step_load, step_outcome


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

    async def step(self) -> bool:
        """Run one step; False when there was nothing to do."""
        started_s = time.perf_counter()
        batch = self.scheduler.schedule()  # who runs; prefill chunks; blocks; token budget
        if batch is None:
            return False
        for sequence_id in batch.ended:
            self.controller.forget(sequence_id)
        load = step_load(batch, self.controller.block_size)
        allocation = self.controller.allocate(load)  # how many drafts are verified, and who is drafted for next
        calibration = self.controller.calibration.table()
        planned_s = time.perf_counter()
        result = await asyncio.get_running_loop().run_in_executor(  # verify, accept, observe, propose
            self._worker, self.runner.run, batch, allocation, calibration
        )
        ran_s = time.perf_counter()
        outcome = step_outcome(batch, load, result)
        facts = describe_plan(batch, allocation)
        touched = self.scheduler.commit(batch, allocation, result, facts)  # lengths grow; stops; blocks freed
        describe_result(facts, allocation, result)
        facts.schedule_s, facts.commit_s = planned_s - started_s, time.perf_counter() - ran_s
        self.controller.observe(replace(outcome, host_s=facts.schedule_s + facts.commit_s))
        facts.step_s = time.perf_counter() - started_s
        self._deliver(touched, facts)  # tokens to streams, facts to metrics
        return True
