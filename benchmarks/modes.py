"""Does adaptive speculation ever lose? off | fixed | adaptive side by side.

    python -m dspark.benchmarks.modes [--concurrency 1,2,4 ...] [--rates 0.5,2] [--slice-s 6] [--repeats 5] [--json OUT]

Each mode has an engine of its own, and all three are in one process. Closed loop: every client sends its next request when the
last one is answered; the engines take turns of half a second, all with the same prompts, so that drift of the machine falls on
all alike. Tokens are counted over --slice-s seconds of an engine's own steps from the moment when all clients of all engines
have their first token (a batch that is merely run to its end would measure its slowest request). Open loop: Poisson arrivals,
one engine after the other, in the order A B C, of the next repeat C B A. A ratio is taken within a repeat, to the mode that is
the better one over all of them (the better one of each repeat would be the luckier one); the table gives its median and a
bootstrap interval. The byte floor of a decode step is the bytes of the weights over the read bandwidth that one thread measured
just before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from dspark.benchmarks.load import align, list_of, positive
from dspark.benchmarks.machine import describe_machine
from dspark.benchmarks.prompts import mixed
from dspark.benchmarks.side_by_side import SideBySide, TakingTurns
from dspark.benchmarks.slices import MODES, Load, Mode, Slice
from dspark.engine import EngineConfig, SamplingParams, locate_model


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
        best = max(speeds["off"], speeds["fixed"], key=sum)
        median, lower, upper = bootstrap_median([a / b for a, b in zip(speeds["adaptive"], best, strict=True)])
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


async def measure(
    args: argparse.Namespace, engines: Mapping[Mode, TakingTurns], prompts: Sequence[tuple[int, ...]]
) -> list[Slice]:
    turn, meet = asyncio.Lock(), asyncio.Barrier(len(engines))
    params = SamplingParams(temperature=args.temperature, seed=0, max_tokens=args.max_tokens, ignore_eos=True)
    runners: dict[Mode, SideBySide] = {}
    for mode, engine in engines.items():
        engine.turn = turn
        await engine.start()
        runners[mode] = SideBySide(meet, engine, prompts, params, args.slice_s)

    async def run(load: Load, repeat: int) -> list[Slice]:
        if load.clients:
            return await asyncio.gather(*(runner.run(load, mode, repeat) for mode, runner in runners.items()))
        return [await runners[mode].run(load, mode, repeat) for mode in (MODES if repeat % 2 else MODES[::-1])]

    slices: list[Slice] = []
    await run(Load(clients=2), -1)  # warm-up
    for load in [Load(clients=n) for n in args.concurrency] + [Load(rate_per_s=r) for r in args.rates]:
        for repeat in range(args.repeats):
            done = await run(load, repeat)
            check_same_answers(done)
            slices += done
            print(f"{load}: " + ", ".join(f"{one.mode} {one.speed:.1f}" for one in done), file=sys.stderr, flush=True)
    for engine in engines.values():
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
    engines = {mode: TakingTurns.load(EngineConfig(threads=args.threads, drafter=args.drafter)) for mode in MODES}
    tokenizer = AutoTokenizer.from_pretrained(locate_model(None).folder)
    prompts = [
        tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt.text}], add_generation_prompt=True, return_dict=False
            )
        )
        for prompt in mixed()
    ]
    slices = asyncio.run(measure(args, engines, prompts))
    engine = engines["off"]
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
