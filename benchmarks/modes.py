"""Does adaptive speculation ever lose? off | fixed | adaptive on one running model, in interleaved slices.

    python -m dspark.benchmarks.modes [--concurrency 1,2,4 ...] [--rates 0.5,2] [--repeats 5] [--temperature 0] [--json OUT]

A slice is one mode under one load; the slices of a repeat run in the order A B C, of the next in C B A, so that drift of the
machine falls on all alike. All slices of a repeat ask the same prompts; none can hit another's prefix cache. A ratio is taken
within a repeat; the table gives its median and a bootstrap interval. The byte floor of a decode step is the bytes of the
weights over the read bandwidth that one thread measured just before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
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
OPEN_LOOP_S = 12.0
"""Seconds of arrivals in an open-loop slice."""


@dataclass(frozen=True, slots=True)
class Load:
    """Exactly one of `clients` (closed loop, all start together, one request each) and `rate_per_s` (open loop) is set."""

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
    digest: int = field(repr=False)
    """Of all output tokens: equal for the modes of a repeat, since speculation never changes the answer."""


async def run_slice(
    engine: Engine, prompts: Sequence[tuple[int, ...]], load: Load, mode: Mode, repeat: int, params: SamplingParams
) -> Slice:
    engine.controller.mode = mode
    steps: list[StepFacts] = []
    engine.on_step[:] = [steps.append]
    salt = f"{load} {mode} {repeat}".encode()
    arrivals = [0.0] * len(prompts)
    if load.rate_per_s is not None:
        times = poisson_arrivals_s(load.rate_per_s, seed=repeat)
        arrivals = [next(times) for _ in prompts]
    started_s = time.perf_counter()

    async def ask(prompt: tuple[int, ...], arrival_s: float) -> tuple[list[int], float]:
        await asyncio.sleep(max(0.0, arrival_s - (time.perf_counter() - started_s)))
        asked_s = time.perf_counter()
        tokens: list[int] = []
        async with engine.submit(Request(prompt, params, cache_salt=salt)) as stream:
            async for delta in stream:
                tokens += delta.token_ids
        return tokens, time.perf_counter() - asked_s

    answers = await asyncio.gather(*map(ask, prompts, arrivals))
    wall_s = time.perf_counter() - started_s
    if load.clients:
        speed = sum(len(tokens) for tokens, _ in answers) / wall_s
    else:
        speed = sum(len(tokens) for tokens, _ in answers) / sum(seconds for _, seconds in answers)
    decodes = [s for s in steps if s.phase is Phase.VERIFY] or steps
    total_s = sum(s.step_s for s in decodes)
    return Slice(
        load=load,
        mode=mode,
        repeat=repeat,
        speed=speed,
        verify_step_ms=1e3 * statistics.median(s.verify_s for s in decodes),
        decode_step_ms=1e3 * statistics.median(s.step_s for s in decodes),
        draft_share=sum(s.draft_s for s in decodes) / total_s,
        drafted=sum(s.drafted for s in steps),
        verified=sum(s.verified for s in steps),
        accepted=sum(s.accepted for s in steps),
        rounds=sum(s.rounds_with_drafts + s.rounds_without_drafts for s in steps),
        digest=hash(tuple(tuple(tokens) for tokens, _ in answers)),
    )


def bootstrap_median(values: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """(median, lower, upper bound of its 95 % interval), by resampling with a fixed seed."""
    sample = np.random.default_rng(0).choice(np.array(values), (draws, len(values)))
    lower, upper = np.percentile(np.median(sample, axis=1), [2.5, 97.5])
    return statistics.median(values), float(lower), float(upper)


def table(slices: Sequence[Slice], floor_ms: float) -> str:
    """One row per load: speeds by mode, adaptive against the better of the others, step times, the fate of drafts."""
    header = ["load", *(f"{mode} tok/s" for mode in MODES), "adaptive ÷ best", "95 %", "step ms off", "÷ floor"]
    rows = [[*header, "τ fixed", "τ adaptive", "drafted", "verified", "accepted", "wasted", "draft %"]]
    for load in dict.fromkeys(one.load for one in slices):
        of = {mode: [one for one in slices if one.load == load and one.mode == mode] for mode in MODES}
        speeds = {mode: [one.speed for one in of[mode]] for mode in MODES}
        ratios = [a / max(o, f) for a, o, f in zip(speeds["adaptive"], speeds["off"], speeds["fixed"], strict=True)]
        median, lower, upper = bootstrap_median(ratios)
        step_ms = statistics.median(one.verify_step_ms for one in of["off"])
        tau = {mode: 1 + sum(s.accepted for s in of[mode]) / max(1, sum(s.rounds for s in of[mode])) for mode in MODES}
        drafted, verified, accepted = (
            sum(getattr(one, name) for one in of["adaptive"]) for name in ("drafted", "verified", "accepted")
        )
        rows.append(
            [
                str(load),
                *(f"{statistics.median(speeds[mode]):.1f}" for mode in MODES),
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
    loads = [Load(clients=n) for n in args.concurrency] + [Load(rate_per_s=r) for r in args.rates]
    slices: list[Slice] = []
    for load in loads:
        count = load.clients or max(4, round((load.rate_per_s or 0.0) * OPEN_LOOP_S))
        for repeat in range(-1, args.repeats):  # the first is warm-up
            chosen = [prompts[((repeat + 1) * count + i) % len(prompts)] for i in range(count)]
            done = [
                await run_slice(engine, chosen, load, mode, repeat, params)
                for mode in (MODES if repeat % 2 else MODES[::-1])
            ]
            if len({one.digest for one in done}) != 1:
                raise SystemExit(f"{load}, repeat {repeat}: the modes gave different tokens")
            if repeat >= 0:
                slices += done
        print(f"{load} done", flush=True)
    await engine.close()
    return slices


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--concurrency", type=list_of(int), default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--rates", type=list_of(float), default=[0.5, 2.0], help="requests per second")
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
        args.json.write_text(json.dumps({**facts, "slices": [asdict(one) for one in slices]}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
