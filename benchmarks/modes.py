"""Does adaptive speculation ever lose? off | fixed | adaptive on one running model, in interleaved slices.

    python -m dspark.benchmarks.modes [--concurrency 1,2,4 ...] [--rates 0.5,2] [--slice-s 6] [--repeats 5] [--json OUT]

A slice is one mode under one load; the slices of a repeat run in the order A B C, of the next in C B A, so that drift of the
machine falls on all alike. All slices of a repeat ask the same prompts; none can hit another's prefix cache. Closed loop: every
client sends its next request when the last one is answered, and tokens are counted for --slice-s seconds from the moment
when all clients have their first token (a batch that is merely run to its end would measure its slowest request). Open loop:
Poisson arrivals. A ratio is taken within a repeat; the table gives its median and a bootstrap interval. The byte floor of a
decode step is the bytes of the weights over the read bandwidth that one thread measured just before.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from transformers import AutoTokenizer

from dspark.benchmarks.load import align, list_of, poisson_arrivals_s, positive
from dspark.benchmarks.machine import describe_machine
from dspark.benchmarks.prompts import mixed
from dspark.engine import Engine, EngineConfig, Phase, Request, SamplingParams, StepFacts, locate_model

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
        first, started_s = len(self.steps), time.perf_counter()
        await asyncio.sleep(self._slice_s)
        tokens, seconds = sum(s.generated for s in self.steps[first:]), time.perf_counter() - started_s
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._engine.gauges().sequences_running:
            await asyncio.sleep(0.01)
        return tokens / seconds

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


def check_same_answers(slices: Sequence[Slice]) -> None:
    """Speculation never changes the answer: what two modes have both read of an answer is equal."""
    for one in slices:
        for prompt, tokens in one.answers.items():
            other = slices[0].answers.get(prompt, ())
            shared = min(len(tokens), len(other))
            if tokens[:shared] != other[:shared]:
                raise SystemExit(
                    f"{one.load}, repeat {one.repeat}: {one.mode} and {slices[0].mode} gave different tokens"
                )


def bootstrap_median(values: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """(median, lower, upper bound of its 95 % interval), by resampling with a fixed seed."""
    sample = np.random.default_rng(0).choice(np.array(values), (draws, len(values)))
    lower, upper = np.percentile(np.median(sample, axis=1), [2.5, 97.5])
    return statistics.median(values), float(lower), float(upper)


def table(slices: Sequence[Slice], floor_ms: float) -> str:
    """One row per load: speeds by mode, adaptive against the better of the others, step times, the fate of drafts."""
    header = ["load", *(f"{mode} tok/s" for mode in MODES), "adaptive ÷ off", "÷ best", "95 %"]
    header += ["step ms off", "÷ floor", "τ fixed", "τ adaptive"]
    rows = [[*header, "drafted", "verified", "accepted", "wasted", "draft %"]]
    for load in dict.fromkeys(one.load for one in slices):
        of = {mode: [one for one in slices if one.load == load and one.mode == mode] for mode in MODES}
        speeds = {mode: [one.speed for one in of[mode]] for mode in MODES}
        ratios = [a / max(o, f) for a, o, f in zip(speeds["adaptive"], speeds["off"], speeds["fixed"], strict=True)]
        median, lower, upper = bootstrap_median(ratios)
        gain = statistics.median(a / o for a, o in zip(speeds["adaptive"], speeds["off"], strict=True))
        step_ms = statistics.median(one.verify_step_ms for one in of["off"])
        tau = {mode: 1 + sum(s.accepted for s in of[mode]) / max(1, sum(s.rounds for s in of[mode])) for mode in MODES}
        drafted, verified, accepted = (
            sum(getattr(one, name) for one in of["adaptive"]) for name in ("drafted", "verified", "accepted")
        )
        rows.append(
            [
                str(load),
                *(f"{statistics.median(speeds[mode]):.1f}" for mode in MODES),
                f"{gain:.3f}",
                f"{median:.3f}",
                f"{lower:.3f}-{upper:.3f}",
                f"{step_ms:.2f}",
                f"{step_ms / floor_ms:.2f}",
                f"{tau['fixed']:.2f}",
                f"{tau['adaptive']:.2f}",
                *map(str, (drafted, verified, accepted, verified - accepted)),
                f"{100 * statistics.median(one.draft_share for one in of['adaptive']):.1f}",
            ]
        )
    return align(rows)


async def measure(args: argparse.Namespace, engine: Engine, prompts: Sequence[tuple[int, ...]]) -> list[Slice]:
    await engine.start()
    params = SamplingParams(temperature=args.temperature, seed=0, max_tokens=args.max_tokens, ignore_eos=True)
    runner = Slices(engine, prompts, params, args.slice_s)
    slices: list[Slice] = []
    await runner.run(Load(clients=2), "fixed", -1)  # warm-up
    for load in [Load(clients=n) for n in args.concurrency] + [Load(rate_per_s=r) for r in args.rates]:
        for repeat in range(args.repeats):
            done = [await runner.run(load, mode, repeat) for mode in (MODES if repeat % 2 else MODES[::-1])]
            check_same_answers(done)
            slices += done
        print(f"{load} done", flush=True)
    await engine.close()
    return slices


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--concurrency", type=list_of(int), default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--rates", type=list_of(float), default=[0.5, 2.0], help="requests per second; may be empty")
    parser.add_argument(
        "--slice-s", type=positive(float), default=6.0, help="seconds of a slice; a slow machine needs longer ones"
    )
    parser.add_argument("--repeats", type=positive(int), default=5)
    parser.add_argument("--max-tokens", type=positive(int), default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=positive(int), default=1)
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    machine = describe_machine()
    engine = Engine.load(EngineConfig(threads=args.threads, drafter=args.drafter))
    tokenizer = AutoTokenizer.from_pretrained(locate_model(None).folder)
    prompts = [
        tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt.text}], add_generation_prompt=True, return_dict=False
            )
        )
        for prompt in mixed()
    ]
    slices = asyncio.run(measure(args, engine, prompts))
    floor_ms = engine.info.weight_bytes / machine.read_bandwidth_gb_per_s / 1e6
    print(
        f"{machine.line()}\n{engine.info.model_name}, {engine.info.dtype}, {engine.info.threads} threads, drafter "
        f"{engine.info.drafter_name}, T = {args.temperature:g}; byte floor of a step {floor_ms:.2f} ms\n"
    )
    print(table(slices, floor_ms))
    if args.json:
        facts = {"machine": machine.as_dict(), "date": datetime.now(UTC).isoformat(), "floor_ms": floor_ms}
        args.json.write_text(
            json.dumps({**facts, "slices": [asdict(replace(one, answers={})) for one in slices]}, indent=1)
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
