"""What everything around the tensor work costs: the host's share of a step, 64 streaming clients, row invariance.

    python -m dspark.benchmarks.overhead [--repeats 5] [--json OUT]

1. Host time of a decode step (schedule, allocate, commit, deliver, thread hops) at batch 1 and 32.
2. The same batch of 64 with and without 64 clients that stream it over HTTP from another process: step time, and how
   late a 100 ms timer of the event loop fires. Interleaved A B B A.
3. Row-invariant linear layers against the fastest way to run them at one row, whatever it does to other row counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import uvicorn

from dspark.benchmarks.load import positive
from dspark.benchmarks.machine import describe_machine
from dspark.benchmarks.prompts import mixed
from dspark.engine import Engine, EngineConfig, Request, SamplingParams, StepFacts, locate_model
from dspark.engine.models.decoder import Linear, LinearFactory
from dspark.engine.models.spec import read_spec
from dspark.engine.models.weights import load_weights
from dspark.engine.startup import choose_dtype
from dspark.kernels.cpu import set_threads
from dspark.kernels.packed_linear import PackedLinear, RowPlan
from dspark.server.app import create_app
from dspark.server.service import ServerSettings, Service
from dspark.server.text import ModelText

CLIENTS = 64
LAG_TIMER_S = 0.1


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def host_ms(facts: StepFacts) -> float:
    """Milliseconds of a step outside the worker's tensor work."""
    return 1e3 * (facts.step_s - facts.verify_s - facts.draft_s)


def chat_prompts(text: ModelText) -> list[tuple[int, ...]]:
    """What the load generator's clients ask, in their order, so that contexts are equally long with and without them."""
    return [tuple(text.encode_chat([{"role": "user", "content": prompt.text}])) for prompt in mixed()]


async def direct_steps(
    engine: Engine, prompts: Sequence[tuple[int, ...]], clients: int, max_tokens: int, salt: bytes
) -> list[StepFacts]:
    """Decode steps of `clients` requests submitted straight to the engine, all running."""
    steps: list[StepFacts] = []
    engine.on_step.append(steps.append)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)

    async def ask(index: int) -> None:
        prompt = prompts[index % len(prompts)]
        async with engine.submit(Request(prompt, params, cache_salt=salt)) as stream:
            async for _ in stream:
                pass

    await asyncio.gather(*map(ask, range(clients)))
    engine.on_step.remove(steps.append)
    return [s for s in steps if s.batch_sequences == clients and s.batch_tokens == clients]


async def http_steps(engine: Engine, port: int, model: str, max_tokens: int) -> tuple[list[StepFacts], list[float]]:
    """The same over HTTP, streamed by a process of clients; and the event loop's lags in seconds."""
    steps: list[StepFacts] = []
    lags: list[float] = []
    engine.on_step.append(steps.append)

    async def watch() -> None:
        while True:
            due_s = time.monotonic() + LAG_TIMER_S
            await asyncio.sleep(LAG_TIMER_S)
            lags.append(time.monotonic() - due_s)

    watcher = asyncio.create_task(watch())
    options = {"url": f"http://127.0.0.1:{port}", "model": model, "concurrency": CLIENTS, "requests": CLIENTS}
    options |= {"max-tokens": max_tokens, "warmup": 0}
    command = [str(Path(sys.executable).with_name("dspark")), "bench", "--ignore-eos"]
    command += [f"--{name}={value}" for name, value in options.items()]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
    if await process.wait():
        raise SystemExit("the load generator failed")
    watcher.cancel()
    engine.on_step.remove(steps.append)
    return [s for s in steps if s.batch_sequences == CLIENTS and s.batch_tokens == CLIENTS], lags


async def measure_engine(repeats: int) -> dict[str, object]:
    files = locate_model(None)
    engine = await asyncio.to_thread(Engine.load, EngineConfig(threads=1, speculation="off"))
    text = ModelText.load(files.folder)
    prompts = chat_prompts(text)
    service = Service(engine, text, ServerSettings(files.name))
    server = uvicorn.Server(
        uvicorn.Config(create_app(service), port=0, log_level="error", loop="asyncio", lifespan="on")
    )
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    host = {}
    for clients in (1, 32):
        steps = await direct_steps(engine, prompts, clients, 128, b"host %d" % clients)
        host[str(clients)] = Spread.of([host_ms(s) for s in steps])
        print(f"host time per step at batch {clients}: {host[str(clients)]} ms", flush=True)
    alone_ms, http_ms, ratios, all_lags = [], [], [], []
    for repeat in range(repeats):
        measured = {}
        for which in ("alone", "http") if repeat % 2 else ("http", "alone"):
            if which == "alone":
                steps = await direct_steps(engine, prompts, CLIENTS, 128, b"alone %d" % repeat)
            else:
                steps, lags = await http_steps(engine, port, files.name, 128)
                all_lags += lags
            measured[which] = 1e3 * statistics.median(s.step_s for s in steps)
        alone_ms.append(measured["alone"])
        http_ms.append(measured["http"])
        ratios.append(measured["http"] / measured["alone"])
    server.should_exit = True
    await serving
    lag_p99_ms = 1e3 * float(np.percentile(all_lags, 99))
    print(f"step at batch {CLIENTS}: alone {Spread.of(alone_ms)} ms, streaming {Spread.of(http_ms)} ms")
    print(f"streaming ÷ alone {Spread.of(ratios)}; event-loop lag p99 {lag_p99_ms:.2f} ms over {len(all_lags)} timers")
    return {
        "host_ms": {k: vars_of(v) for k, v in host.items()},
        "stream_ratio": vars_of(Spread.of(ratios)),
        "lag_p99_ms": lag_p99_ms,
    }


def vars_of(spread: Spread) -> dict[str, float]:
    return {"median": spread.median, "low": spread.low, "high": spread.high}


def measure_invariance(repeats: int) -> dict[str, float]:
    """All linear layers of the default model at one row: the plan in use against all of oneDNN's, best one per shape."""
    set_threads(1)
    folder = locate_model(None).folder
    spec = read_spec(folder)
    dtype = choose_dtype(EngineConfig())
    weights = load_weights(folder, spec, dtype)
    in_use = LinearFactory()
    layer = "model.layers.0."
    attention = [weights[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv"]
    mlp = [weights[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up")]
    shapes = {
        "qkv": (torch.cat(attention), spec.num_layers),
        "output": (weights[f"{layer}self_attn.o_proj.weight"], spec.num_layers),
        "gate_up": (torch.cat(mlp), spec.num_layers),
        "down": (weights[f"{layer}mlp.down_proj.weight"], spec.num_layers),
        "head": (weights["model.embed_tokens.weight"], 1),
    }
    invariant_us = fastest_us = 0.0
    for name, (weight, count) in shapes.items():
        copies = [weight.clone() for _ in range(count)]  # as many as the model has, so that no cache holds them all
        plans = {f"packed for {rows}": RowPlan(rows, 1, 1 << 30) for rows in (1, 8, 32)}
        plans["not packed"] = RowPlan(0, 1, 1 << 30)
        times = {"in use": _linear_us([in_use(copy) for copy in copies], weight, repeats)}
        times |= {
            plan: _linear_us([PackedLinear(copy, None, rule) for copy in copies], weight, repeats)
            for plan, rule in plans.items()
        }
        invariant_us += times["in use"]
        fastest_us += min(times.values())
        print(f"{name}: " + ", ".join(f"{plan} {us:.0f}" for plan, us in times.items()) + " us")
    ratio = invariant_us / fastest_us
    print(f"linear layers at one row, row-invariant ÷ fastest: {ratio:.3f}")
    return {"invariant_us": invariant_us, "fastest_us": fastest_us, "ratio": ratio}


def _linear_us(layers: Sequence[Linear], weight: torch.Tensor, repeats: int) -> float:
    """Median microseconds of one pass over `layers`, all of the shape of `weight`, one row."""
    x = torch.randn(1, weight.shape[1]).to(weight.dtype)
    times = []
    for _ in range(5 * repeats):
        started_s = time.perf_counter()
        for one in layers:
            one(x)
        times.append(1e6 * (time.perf_counter() - started_s))
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=positive(int), default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    machine = describe_machine()
    print(machine.line())
    result: dict[str, object] = {"machine": machine.as_dict()}
    with torch.inference_mode():
        result["row_invariance"] = measure_invariance(args.repeats)
    result |= asyncio.run(measure_engine(args.repeats))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
