"""A real engine around a tiny random target, and drafters and controllers that reach what real ones reach rarely."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dspark.engine import (
    Engine,
    EngineConfig,
    FinishReason,
    PlainReason,
    Request,
    RequestFacts,
    RequestStream,
    StepFacts,
    TokenDelta,
    TokenLogprob,
)
from dspark.engine.cost_model import CostModel, SizeCurve
from dspark.engine.drafters.drafter import ContextFree, Draft, Drafter, DraftRow
from dspark.engine.load_controller import Allocation, LoadController, StepLoad
from dspark.engine.noise import sequence_key
from dspark.engine.startup import EngineParts, start_up

Result = TypeVar("Result")
NOTHING = np.empty(0, np.int64)


@dataclass
class Answer:
    """All that a request's stream brought, by choice."""

    tokens: list[list[int]]
    finish_reasons: list[FinishReason | None]
    logprobs: list[list[TokenLogprob]]
    facts: RequestFacts
    deltas: list[TokenDelta] = field(default_factory=list)

    @property
    def text(self) -> tuple[list[list[int]], list[FinishReason | None], list[list[TokenLogprob]]]:
        """What may not depend on how the engine worked."""
        return self.tokens, self.finish_reasons, self.logprobs


async def read(stream: RequestStream, n: int = 1) -> Answer:
    """Iterate a stream to its end."""
    answer = Answer([[] for _ in range(n)], [None] * n, [[] for _ in range(n)], stream.facts)
    async with stream:
        async for delta in stream:
            assert answer.finish_reasons[delta.index] is None, "a delta came after the choice's last"
            answer.deltas.append(delta)
            answer.tokens[delta.index] += delta.token_ids
            answer.logprobs[delta.index] += delta.logprobs or ()
            answer.finish_reasons[delta.index] = delta.finish_reason
    return answer


DTYPES = [
    "float32",
    pytest.param(
        "bfloat16",
        marks=pytest.mark.skipif(
            not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="the processor has no bf16 instructions"
        ),
    ),
]
"""Of whole engines; without the instructions bfloat16 is right and very slow."""


class RunningEngine:
    """An engine on an event loop of its own, for tests that are plain functions. `steps`: the facts of every step."""

    def __init__(self, engine: Engine, parts: EngineParts) -> None:
        self.engine = engine
        self.parts = parts
        self.steps: list[StepFacts] = []
        self._loop = asyncio.Runner()
        engine.on_step.append(self.steps.append)

    def run(self, work: Awaitable[Result]) -> Result:
        """Run a coroutine beside the engine's loop."""

        async def await_it() -> Result:
            return await work

        return self._loop.run(await_it())

    def answer(self, request: Request) -> Answer:
        return self.run(read(self.engine.submit(request), request.n))

    def answer_one_at_a_time(self, requests: Sequence[Request]) -> list[Answer]:
        return [self.answer(request) for request in requests]

    def answer_together(self, requests: Sequence[Request]) -> list[Answer]:
        async def all_of_them() -> list[Answer]:
            return await asyncio.gather(*(read(self.engine.submit(request), request.n) for request in requests))

        return self.run(all_of_them())

    def check_pool_is_whole(self) -> None:
        """Nothing runs, waits or holds a block, and every block is where it belongs."""
        scheduler = self.engine.scheduler
        assert not scheduler.has_work
        assert scheduler.kv_cache.used == 0
        scheduler.kv_cache.check()

    def stop(self) -> None:
        self.run(self.engine.close())
        self._loop.close()


@contextmanager
def running(
    config: EngineConfig, drafter: Drafter | None = None, controller: type[LoadController] = LoadController
) -> Iterator[RunningEngine]:
    """A started engine, in place of whose drafter `drafter` is used if given; `controller` decides at recorded costs.

    On leaving, the pool must be whole unless the engine has failed.
    """
    worker = ThreadPoolExecutor(max_workers=1)
    # to measure takes seconds, and nobody would look at what was measured
    with patch.object(CostModel, "profile", lambda *_, **__: RecordedCost(config)):
        parts = worker.submit(start_up, config).result()
    if drafter is not None:
        assert drafter.block_size == parts.runner.drafter.block_size
        parts.runner.drafter = drafter
    decides = controller(
        config.speculation, parts.runner.drafter.block_size, RecordedCost(config), parts.controller.calibration
    )
    engine = RunningEngine(Engine(config, replace(parts, controller=decides), worker), parts)
    engine.run(engine.engine.start())
    try:
        yield engine
    finally:
        engine.stop()
    if not engine.engine.failed:
        engine.check_pool_is_whole()


OpenEngine = Callable[..., RunningEngine]
"""The fixture `open_engine`."""


class RecordedCost(CostModel):
    """Costs like those of a processor that are what they are, so that adaptive decides alike in every run."""

    def __init__(self, config: EngineConfig) -> None:
        rows = config.max_num_batched_tokens
        verify_s = {1: 10e-3, 8: 12e-3, 32: 25e-3, 512: 320e-3}
        sizes = np.arange(1, rows + 1)
        super().__init__(
            SizeCurve(sizes.tolist(), np.interp(sizes, list(verify_s), list(verify_s.values())).tolist()),
            SizeCurve([1, max(2, config.max_num_seqs)], [0.5e-3, 3e-3]),
            host_s=0.5e-3,
        )

    def observe_verify(self, rows: int, context_tokens: int, seconds: float, draft_context_tokens: int = 0) -> float:
        """Recorded costs do not change."""
        return 0.0

    def observe_draft(self, slots: int, seconds: float) -> None:
        """Recorded costs do not change."""

    def observe_host(self, sequences: int, seconds: float) -> None:
        """Recorded costs do not change."""


class RandomAllocation(LoadController):
    """Budgets, widths and who is drafted for, drawn at random: every length that any policy could choose."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._random = np.random.default_rng(0)

    def allocate(self, load: StepLoad) -> Allocation:
        allocation = super().allocate(load)
        room = min(int(np.minimum(load.proposed, load.caps).sum()), load.draft_room)
        draft_next = self._random.random(len(load.sequence_ids)) < 0.8
        draft_new = bool(self._random.random() < 0.8)
        narrow = self._random.random() < 0.3
        return replace(
            allocation,
            budget=int(self._random.integers(0, room + 1)),
            draft_next=draft_next,
            draft_new=draft_new,
            draft_width=int(self._random.integers(1, self.block_size))
            if narrow and self.block_size > 1
            else self.block_size,
            plain_reason=[None if drafted else PlainReason.LOW_ACCEPTANCE for drafted in draft_next.tolist()],
            plain_reason_new=None if draft_new else PlainReason.LOW_ACCEPTANCE,
        )


class OracleDrafter(ContextFree):
    """Proposes the target's own next tokens, each corrupted with probability `error_rate`.

    Without corruption a random target would accept nothing, and losslessness would hold for no reason. Log-odds are
    higher for right tokens than for wrong ones and vary widely, and blocks have any length, so drafts are cut anywhere.
    """

    name = "oracle"
    sources = (name,)
    proposes_free = False

    def __init__(self, block_size: int, vocab_size: int, error_rate: float = 0.15) -> None:
        self.block_size = block_size
        self.error_rate = error_rate
        self._vocab_size = vocab_size
        self._texts: dict[int, NDArray[np.int64]] = {}
        self._random = np.random.default_rng(1)

    def learn(self, request: Request, tokens: Sequence[Sequence[int]]) -> None:
        """Record the target's answer to a seeded request: the output tokens of each choice."""
        assert request.sampling.seed is not None
        prompt = np.array(request.prompt_token_ids, np.int64)
        for choice, output in enumerate(tokens):
            key = sequence_key(request.sampling.seed, choice, prompt)
            self._texts[key] = np.concatenate((prompt, np.array(output, np.int64)))

    def propose(self, rows: Sequence[DraftRow]) -> Draft:
        shape = (len(rows), self.block_size)
        tokens = self._random.integers(0, self._vocab_size, shape)
        wrong = self._random.random(shape) < self.error_rate
        lengths = np.where(self._random.random(len(rows)) < 0.7, self.block_size, 0)
        lengths = np.maximum(lengths, self._random.integers(0, self.block_size + 1, len(rows)))
        for row, drafts, bad in zip(rows, tokens, wrong, strict=True):
            known = self._texts.get(row.noise_key, NOTHING)[row.position + 1 : row.position + 1 + self.block_size]
            drafts[: len(known)] = np.where(bad[: len(known)], (known + 1) % self._vocab_size, known)
        confidence = np.where(wrong, -1.0, 1.5) + self._random.normal(0.0, 2.0, shape)
        return Draft(tokens, lengths.astype(np.int32), confidence.astype(np.float32))


def totals(steps: Sequence[StepFacts]) -> Mapping[str, float]:
    """Sums over steps of every number and, for counts by reason or position, of their totals."""
    sums: dict[str, float] = {}
    for step in steps:
        for name in StepFacts.__dataclass_fields__:
            value = getattr(step, name)
            if isinstance(value, dict):
                value = sum(value.values())
            elif isinstance(value, list):
                value = sum(value)
            if isinstance(value, int | float):
                sums[name] = sums.get(name, 0) + value
    return sums
