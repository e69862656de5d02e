"""Slices of time in which one engine serves one load in one mode, and what was seen of it."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from dspark.benchmarks.load import poisson_arrivals_s
from dspark.engine import Engine, Phase, Request, SamplingParams, StepFacts

Mode = Literal["off", "fixed", "adaptive"]
MODES: tuple[Mode, ...] = get_args(Mode)
Answers = dict[tuple[int, ...], tuple[int, ...]]
"""Prompt → all tokens of its answer, or as many as a client had read."""


@dataclass(frozen=True, slots=True)
class Load:
    """Exactly one of `clients` (closed loop) and `rate_per_s` (open loop) is set."""

    clients: int | None = None
    rate_per_s: float | None = None

    def __str__(self) -> str:
        return f"{self.clients} clients" if self.clients else f"{self.rate_per_s:g} requests/s"


@dataclass(frozen=True, slots=True)
class Slice:
    """speed: output tokens/s over all clients (closed loop), or per request, from its arrival on (open loop)."""

    load: Load
    mode: Mode
    repeat: int
    speed: float
    verify_step_ms: float
    decode_step_ms: float
    draft_share: float
    drafted: int
    verified: int
    accepted: int
    rounds: int
    answers: Answers = field(repr=False)


class Slices:
    """Runs slices on one engine."""

    def __init__(
        self, engine: Engine, prompts: Sequence[tuple[int, ...]], params: SamplingParams, slice_s: float
    ) -> None:
        """slice_s: how long a slice counts tokens (closed loop), or requests arrive (open loop)."""
        self.steps: list[StepFacts] = []
        """Of the slice that ran last, its beginning and end included."""
        self._engine = engine
        self._slice_s = slice_s
        self._prompts = prompts
        self._params = params

    async def run(self, load: Load, mode: Mode, repeat: int) -> Slice:
        self._engine.controller.mode = mode
        self.steps = []
        self._engine.on_step[:] = [self.steps.append]
        salt = f"{load} {mode} {repeat}".encode()
        answers: Answers = {}
        if load.clients:
            speed = await self._closed(load.clients, repeat, salt, answers)
        else:
            speed = await self._open(load.rate_per_s or 0.0, repeat, salt, answers)
        steps = self.steps
        decodes = [s for s in steps if s.phase is Phase.VERIFY] or steps
        return Slice(
            load=load,
            mode=mode,
            repeat=repeat,
            speed=speed,
            verify_step_ms=1e3 * statistics.median(s.verify_s for s in decodes),
            decode_step_ms=1e3 * statistics.median(s.step_s for s in decodes),
            draft_share=sum(s.draft_s for s in decodes) / sum(s.step_s for s in decodes),
            drafted=sum(s.drafted for s in steps),
            verified=sum(s.verified for s in steps),
            accepted=sum(s.accepted for s in steps),
            rounds=sum(s.rounds_with_drafts + s.rounds_without_drafts for s in steps),
            answers=answers,
        )

    async def _ask(
        self, prompt: tuple[int, ...], max_tokens: int, salt: bytes, answers: Answers, started: asyncio.Event | None
    ) -> int:
        params = replace(self._params, max_tokens=max_tokens)
        tokens: tuple[int, ...] = ()
        async with self._engine.submit(Request(prompt, params, cache_salt=salt)) as stream:
            async for delta in stream:
                tokens += delta.token_ids
                answers[prompt] = tokens
                if started is not None:
                    started.set()
        return len(tokens)

    async def _closed(self, clients: int, repeat: int, salt: bytes, answers: Answers) -> float:
        """Output tokens/s over all clients."""
        most = self._params.max_tokens or 0
        started = [asyncio.Event() for _ in range(clients)]

        async def client(index: int) -> None:
            for turn in itertools.count():
                prompt = self._prompts[(repeat * 7 + index + turn * clients) % len(self._prompts)]
                # first answers of different lengths, so that the clients do not stay in step
                length = most if turn else most * (1 + index % 4) // 4
                await self._ask(prompt, length, salt + b"%d" % turn, answers, started[index])

        tasks = [asyncio.create_task(client(index)) for index in range(clients)]
        await asyncio.gather(*(event.wait() for event in started))
        speed = await self._count()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._engine.gauges().sequences_running:
            await asyncio.sleep(0.01)
        return speed

    async def _count(self) -> float:
        """Output tokens/s over the next `slice_s` seconds."""
        first, started_s = len(self.steps), time.perf_counter()
        await asyncio.sleep(self._slice_s)
        return sum(s.generated for s in self.steps[first:]) / (time.perf_counter() - started_s)

    async def _open(self, rate_per_s: float, repeat: int, salt: bytes, answers: Answers) -> float:
        """Output tokens/s of a request, from its arrival on, averaged over all tokens."""
        arrivals = list(itertools.takewhile(lambda s: s < self._slice_s, poisson_arrivals_s(rate_per_s, seed=repeat)))
        started_s = time.perf_counter()

        async def ask(index: int, arrival_s: float) -> tuple[int, float]:
            await asyncio.sleep(max(0.0, arrival_s - (time.perf_counter() - started_s)))
            asked_s = time.perf_counter()
            prompt = self._prompts[(repeat * 7 + index) % len(self._prompts)]
            tokens = await self._ask(prompt, self._params.max_tokens or 0, salt, answers, None)
            return tokens, time.perf_counter() - asked_s

        done = await asyncio.gather(*(ask(i, s) for i, s in enumerate(arrivals or [0.0])))
        return sum(tokens for tokens, _ in done) / sum(seconds for _, seconds in done)
