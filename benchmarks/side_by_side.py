"""Engines that take turns on one processor, so that whatever slows the machine for a while slows all of them alike."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from dspark.benchmarks.slices import Slices
from dspark.engine import Engine

TURN_S = 0.5
"""Short against what a machine's pace lasts, long against what it takes to bring weights back into the caches."""


class TakingTurns(Engine):
    """Steps only while it holds `turn`, which several share: for half a second, then for the step that was running."""

    turn: asyncio.Lock
    _turn_since_s: float | None = None

    async def _step(self) -> bool:
        if self._turn_since_s is None:
            await self.turn.acquire()  # first come, first served: nobody gets a second turn before those who wait
            self._turn_since_s = time.perf_counter()
        worked = False
        try:
            worked = await super()._step()
        finally:
            if not worked or time.perf_counter() - self._turn_since_s > TURN_S:
                self._turn_since_s = None
                self.turn.release()
        return worked


class SideBySide(Slices):
    """Slices on engines that take turns: each counts tokens over the time of its own steps, while all have work.

    What the event loop does between two steps is in no engine's time; most of it is done while a step computes.
    """

    def __init__(self, meet: asyncio.Barrier, *args: Any) -> None:
        """meet: of as many parties as there are engines.  args: as for `Slices`."""
        super().__init__(*args)
        self._meet = meet

    async def _count(self) -> float:
        await self._meet.wait()
        first = len(self.steps)
        while sum(step.step_s for step in self.steps[first:]) < self._slice_s:
            await asyncio.sleep(0.05)
        counted = self.steps[first:]
        await self._meet.wait()
        return sum(step.generated for step in counted) / sum(step.step_s for step in counted)
