"""Tokens/s against tokens/s/user on one GPU, and where a step's time goes: off | fixed | adaptive, beside transformers.

    python -m dspark.benchmarks.gpu [--models Qwen3-8B] [--concurrency 1,8,64] [--no-peer] [--json OUT]
    python -m dspark.benchmarks.gpu --device cpu --models tiny --concurrency 1,2      # tests this script; no figures

Weights are random, drawn on the device at the shapes of Qwen3-4B, 8B and 14B with a 5-layer DSpark drafter. Acceptance is
SYNTHETIC, drawn from --acceptance, the chance of each draft to be right given that those before it were (`synthetic.py`). All
else is real: every draft is drafted, every row computed, sampled and compared.

Test first, then time: eight requests, greedy and at temperature 1, must give the same tokens with 7 drafts as without. Where
they do not, the run ends, unless the self-test at start has found that rows depend on their batch here: then it says so.

"off" runs the target alone, but keeps the drafter's context up to date, as a server does that may draft again. target, draft,
copies: the device's time between its own marks; host: what a step takes besides; floor: `byte_floor.py` at the bandwidth of a
copy that was measured before. transformers' continuous batching runs after our engine is closed, on the same weights, in the
same closed loop.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dspark.benchmarks.byte_floor import step_bytes
from dspark.benchmarks.kernels import Stopwatch
from dspark.benchmarks.load import align, list_of, positive
from dspark.benchmarks.machine import describe_machine
from dspark.benchmarks.qwen3 import MODELS, Model
from dspark.benchmarks.slices import MODES, Load, Slice, Slices
from dspark.benchmarks.synthetic import Acceptance, open_engine
from dspark.benchmarks.transformers_batching import TransformersEngine, make_model
from dspark.engine import ConfigError, Engine, EngineConfig, Phase, Request, SamplingParams, StepFacts
from dspark.engine.gpu.start_up import choose_device
from dspark.engine.kv_cache import blocks_for
from dspark.engine.startup import choose_dtype

CHECKED = 8
"""Requests of the test before the timing."""
SEED = 0
PEER = "transformers"
Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parts:
    """Median milliseconds of a decode step."""

    step: float
    target: float
    draft: float
    copies: float
    host: float

    @classmethod
    def of(cls, steps: Sequence[StepFacts]) -> Parts:
        decodes = [s for s in steps if s.phase is Phase.VERIFY] or steps

        def median_ms(seconds: Callable[[StepFacts], float]) -> float:
            return 1e3 * statistics.median(map(seconds, decodes))

        return cls(
            step=median_ms(lambda s: s.step_s),
            target=median_ms(lambda s: s.verify_s),
            draft=median_ms(lambda s: s.draft_s),
            copies=median_ms(lambda s: s.transfer_s),
            host=median_ms(lambda s: s.step_s - s.verify_s - s.draft_s - s.transfer_s),
        )


@dataclass(frozen=True, slots=True)
class Point:
    """One slice. parts: None for what tells nothing of its steps."""

    mode: str
    clients: int
    slice: Slice
    parts: Parts | None


class SameTokensError(Exception):
    """Drafts changed a text, on a device on which rows do not depend on their batch."""


async def check_same_tokens(
    engine: Engine, acceptance: Acceptance, prompts: Sequence[Prompt], max_tokens: int
) -> list[str]:
    """What was found, a line per temperature. Raises SameTokensError, also where no draft was accepted or none rejected."""
    lines = []
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, seed=SEED, max_tokens=max_tokens, ignore_eos=True)
        steps: list[StepFacts] = []
        engine.on_step[:] = [steps.append]
        engine.controller.mode = "off"
        plain = await _answers(engine, prompts, params, b"off")
        acceptance.record(plain, SEED)
        steps.clear()
        engine.controller.mode = "fixed"
        drafted = await _answers(engine, prompts, params, b"fixed")
        same = sum(drafted[prompt] == plain[prompt] for prompt in prompts)
        verified, accepted = sum(s.verified for s in steps), sum(s.accepted for s in steps)
        found = (
            f"T = {temperature:g}: {same} of {len(prompts)} answers of {max_tokens} tokens are the same with drafts; of "
            f"{verified} that were verified {accepted} were accepted"
        )
        if not 0 < accepted < verified:
            raise SameTokensError(f"{found}: acceptance and rejection were not both tried")
        if same < len(prompts):
            if engine.info.row_invariant:
                raise SameTokensError(f"{found}: drafts change the text, though the row-invariance self-test passed")
            found += "; the row-invariance self-test failed on this device, so they may differ"
        lines.append(found)
    return lines


async def _answers(
    engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, salt: bytes
) -> dict[Prompt, tuple[int, ...]]:
    async def ask(prompt: Prompt) -> tuple[int, ...]:
        async with engine.submit(Request(prompt, params, cache_salt=salt)) as stream:
            return tuple([token async for delta in stream for token in delta.token_ids])

    given = await asyncio.gather(*map(ask, prompts))
    return dict(zip(prompts, given, strict=True))


async def measure(
    engine: Any, modes: Sequence[str], clients: int, prompts: Sequence[Prompt], args: argparse.Namespace
) -> list[Point]:
    """Slices of --slice-s seconds in the order A B C, C B A, … after one of each that does not count."""
    params = SamplingParams(temperature=args.temperature, seed=SEED, max_tokens=args.max_tokens, ignore_eos=True)
    slices, points = Slices(engine, prompts, params, args.slice_s), []
    for repeat in range(-1, args.repeats):
        for mode in modes if repeat % 2 else modes[::-1]:
            in_engine: Any = "off" if mode == PEER else mode
            done = await slices.run(Load(clients=clients), in_engine, repeat)
            parts = None if mode == PEER else Parts.of(slices.steps)
            if repeat >= 0:
                points.append(Point(mode, clients, replace(done, answers={}), parts))
    speeds = ", ".join(f"{point.mode} {point.slice.speed:.1f}" for point in points)
    print(f"  {clients} clients: {speeds} tok/s", file=sys.stderr, flush=True)
    return points


async def run_ours(model: Model, args: argparse.Namespace, prompts: Sequence[Prompt]) -> tuple[list[str], list[Point]]:
    """(what the test found, the points). Raises SameTokensError."""
    engine, acceptance = await asyncio.to_thread(open_engine, model, _config(model, args), args.acceptance, _progress)
    await engine.start()
    try:
        checked = min(CHECKED, engine.info.max_num_seqs)
        lines = await check_same_tokens(engine, acceptance, prompts[:checked], args.max_tokens)
        print("\n".join(lines), flush=True)
        acceptance.force()
        points = []
        for clients in args.concurrency:
            if clients * blocks_for(engine.info.max_model_len) <= engine.info.num_blocks:
                points += await measure(engine, MODES, clients, prompts, args)
            else:
                lines.append(f"left out: the K/V of {clients} clients do not fit into {engine.info.num_blocks} blocks")
                print(lines[-1], flush=True)
    finally:
        await engine.close()
    return lines, points


async def run_peer(model: Model, args: argparse.Namespace, prompts: Sequence[Prompt]) -> list[Point]:
    device = choose_device(_config(model, args))
    peer = TransformersEngine(make_model(model, choose_dtype(_config(model, args), device.type), device))
    peer.start()
    try:
        return [p for clients in args.concurrency for p in await measure(peer, [PEER], clients, prompts, args)]
    finally:
        peer.close()


def _config(model: Model, args: argparse.Namespace) -> EngineConfig:
    most, longest = max(args.concurrency), args.prompt_tokens + args.max_tokens
    return EngineConfig(
        device=args.device,
        dtype="float32" if args.device == "cpu" else "bfloat16",
        threads=1,
        max_model_len=longest,
        max_num_seqs=most,
        max_num_batched_tokens=max(most * (1 + model.draft.block_size), min(512, longest)),
        max_queued_requests=2 * most,
        max_queued_tokens=4 * most * args.prompt_tokens,
        lag=1,
    )


def _progress(phase: str, done: int, total: int) -> None:
    if done == total:
        print(f"  {phase}: {total}", file=sys.stderr, flush=True)


def table(points: Sequence[Point], floors_ms: Mapping[tuple[int, str], float]) -> str:
    """One row per concurrency and mode: medians over repeats, speed with its least and most. floors_ms: where there is one."""
    heads = ["clients", "mode", "tok/s", "(min-max)", "tok/s/user", "τ (synthetic)"]
    rows = [[*heads, "step ms", "target", "draft", "copies", "host", "floor ms", "÷ floor"]]
    for clients, mode in dict.fromkeys((point.clients, point.mode) for point in points):
        own = [point for point in points if (point.clients, point.mode) == (clients, mode)]
        speeds = [point.slice.speed for point in own]
        speed = statistics.median(speeds)
        rounds = sum(point.slice.rounds for point in own)
        tau = f"{1 + sum(point.slice.accepted for point in own) / rounds:.2f}" if rounds else "-"
        cells = [str(clients), mode, f"{speed:.1f}", f"{min(speeds):.1f}-{max(speeds):.1f}", f"{speed / clients:.1f}"]
        rows.append([*cells, tau, *_step_cells(own, floors_ms.get((clients, mode)))])
    return align(rows)


def _step_cells(own: Sequence[Point], floor_ms: float | None) -> list[str]:
    parts = [asdict(point.parts) for point in own if point.parts is not None]
    if not parts:
        return ["-"] * 7
    ms = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    floor = ["-", "-"] if floor_ms is None else [f"{floor_ms:.3f}", f"{ms['step'] / floor_ms:.2f}"]
    return [*(f"{ms[name]:.3f}" for name in ("step", "target", "draft", "copies", "host")), *floor]


def run_model(model: Model, args: argparse.Namespace, gb_per_s: float) -> dict[str, object]:
    """Check, measure and print one model. Raises SameTokensError."""
    rng = np.random.default_rng(SEED)
    count = 4 * max(CHECKED, *args.concurrency)
    ids = rng.integers(0, model.target.vocab_size, (count, args.prompt_tokens))
    prompts = [tuple(row) for row in ids.tolist()]
    print(f"\n{model.name}, random weights, {model.draft.num_layers}-layer DSpark drafter", flush=True)
    try:
        lines, points = asyncio.run(run_ours(model, args, prompts))
    except ConfigError as error:  # no room for K/V beside the weights
        print(f"left out: {error}", flush=True)
        return {"model": model.name, "left_out": str(error)}
    finally:
        _give_memory_back(args)
    if not args.no_peer:
        points += asyncio.run(run_peer(model, args, prompts))
        _give_memory_back(args)
    print(table(sorted(points, key=lambda point: point.clients), _floors_ms(model, args, gb_per_s)), flush=True)
    return {"model": model.name, "checked": lines, "points": [asdict(point) for point in points]}


def _floors_ms(model: Model, args: argparse.Namespace, gb_per_s: float) -> dict[tuple[int, str], float]:
    """By clients and mode, in the middle of an answer. Adaptive steps may or may not draft, so they have no one floor."""
    context, element = args.prompt_tokens + args.max_tokens // 2, 4 if args.device == "cpu" else 2
    return {
        (clients, mode): step_bytes(model, clients, context, mode == "fixed", element).floor_ms(gb_per_s)
        for clients in args.concurrency
        for mode in ("off", "fixed")
    }


def _give_memory_back(args: argparse.Namespace) -> None:
    """Of an engine that is closed and gone."""
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()


def fits(model: Model, device: torch.device) -> bool:
    """Whether both models' weights leave room for K/V of one sequence on the device."""
    if device.type == "cpu":
        return model.name == "tiny"
    free, _ = torch.cuda.mem_get_info()
    return step_bytes(model, 1, 1024, drafts=True).held < free


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=lambda text: text.split(","), default=["Qwen3-4B", "Qwen3-8B", "Qwen3-14B"])
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--concurrency", type=list_of(int), default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument(
        "--acceptance",
        type=list_of(float),
        default=[0.85, 0.82, 0.8, 0.78, 0.76, 0.74, 0.72],
        help="chance of draft 1…7 to be right, given that those before it were",
    )
    parser.add_argument("--prompt-tokens", type=positive(int), default=512)
    parser.add_argument("--max-tokens", type=positive(int), default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--slice-s", type=positive(float), default=4.0)
    parser.add_argument("--repeats", type=positive(int), default=3)
    parser.add_argument("--no-peer", action="store_true", help="leave transformers' continuous batching out")
    parser.add_argument("--json", type=Path)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    args = parser.parse_args(given)
    unknown = [name for name in args.models if name not in MODELS]
    if unknown or len(args.acceptance) != 7 or max(args.acceptance) > 1:
        parser.error(f"--models: of {', '.join(MODELS)}; --acceptance: 7 chances up to 1")
    try:
        device = choose_device(EngineConfig(device=args.device))
    except ConfigError as error:
        parser.error(str(error))
    args.device = device.type
    chosen = [MODELS[name] for name in args.models if fits(MODELS[name], device)]
    for name in args.models:
        if MODELS[name] not in chosen:
            print(f"left out: {name} does not fit on {device}" + (", where only tiny runs" * (device.type == "cpu")))
    machine = describe_machine()
    on_cpu = device.type == "cpu"
    gb_per_s = machine.read_bandwidth_gb_per_s if on_cpu else Stopwatch(device, 20).copy_gb_per_s()
    card = "NO GPU: a test of this script on a CPU; its figures say nothing" if on_cpu else torch.cuda.get_device_name()
    expected = 1 + sum(accumulate(args.acceptance, mul))
    print(f"{machine.line()}\n{card}, {gb_per_s:.0f} GB/s")
    print(f"SYNTHETIC acceptance {args.acceptance}: {expected:.2f} tokens a round where all 7 drafts are verified")
    try:
        results = [run_model(model, args, gb_per_s) for model in chosen]
    except SameTokensError as error:
        raise SystemExit(f"not timed: {error}") from error
    if args.json:
        facts: dict[str, object] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "device": card}
        facts |= {"machine": machine.as_dict(), "acceptance (synthetic)": args.acceptance, "gb_per_s": gb_per_s}
        args.json.write_text(json.dumps(facts | {"models": results}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
