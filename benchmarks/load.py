"""`dspark bench`: load on any OpenAI server, and what its clients see.

Two shapes of load. Closed loop: a fixed number of clients, each sends its next request when the last one is answered;
this finds throughput. Open loop: requests arrive at random (Poisson) whether or not earlier ones are answered; this
finds latency under a rate, and queues grow when the server is too slow.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from dspark.benchmarks.endpoint import Endpoint, EndpointError, RequestRecord, Speculation
from dspark.benchmarks.machine import describe_machine
from dspark.benchmarks.prompts import Prompt, mixed, read_prompts


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked: request i sends `prompts[i % len(prompts)]`."""

    prompts: Sequence[Prompt]
    max_tokens: int = 128
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """When no more requests are started: after `requests`, or `duration_s` seconds, whichever comes first."""

    requests: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Percentiles:
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles | None:
        """None for no values."""
        if not values:
            return None
        p50, p90, p99 = np.percentile(values, [50, 90, 99])
        return cls(float(np.mean(values)), float(p50), float(p90), float(p99))


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One level of load. Exactly one of `concurrency` (closed loop) and `rate_per_s` (open loop) is set."""

    concurrency: int | None
    rate_per_s: float | None
    records: list[RequestRecord]
    speculation: Speculation | None
    """Of this level: summed over the requests' usage, else of the server's counters, None when it does not tell."""

    @property
    def answered(self) -> list[RequestRecord]:
        return [record for record in self.records if record.error is None]

    @property
    def errors(self) -> dict[str, int]:
        """Message -> how often."""
        return dict(Counter(record.error for record in self.records if record.error is not None))

    @property
    def duration_s(self) -> float:
        """First request sent to last answer read, ramp-up and ramp-down included."""
        if not self.records:
            return 0.0
        return max(record.finished_s for record in self.records) - min(record.started_s for record in self.records)

    @property
    def output_tokens(self) -> int:
        return sum(record.output_tokens for record in self.answered)

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.duration_s if self.output_tokens else 0.0

    @property
    def counted_by(self) -> str:
        """`usage`, or `chunks` when the server did not send usage for every request."""
        return "usage" if all(record.completion_tokens is not None for record in self.answered) else "chunks"

    @property
    def name(self) -> str:
        return f"{self.concurrency} clients" if self.concurrency is not None else f"{self.rate_per_s:g} req/s"

    def as_dict(self) -> dict[str, object]:
        """The level's numbers, for JSON. Times in seconds."""
        answered = self.answered
        measures: dict[str, list[float | None]] = {
            "ttft_s": [record.ttft_s for record in answered],
            "time_per_output_token_s": [record.time_per_output_token_s for record in answered],
            "chunk_gap_s": [gap for record in answered for gap in record.chunk_gaps_s],
            "end_to_end_s": [record.finished_s - record.started_s for record in answered],
        }
        percentiles = {
            name: Percentiles.of([value for value in values if value is not None]) for name, values in measures.items()
        }
        return {
            "concurrency": self.concurrency,
            "rate_per_s": self.rate_per_s,
            "requests": len(self.records),
            "errors": self.errors,
            "duration_s": self.duration_s,
            "prompt_tokens": sum(record.prompt_tokens or 0 for record in answered),
            "output_tokens": self.output_tokens,
            "tokens_counted_by": self.counted_by,
            "tokens_per_s": self.tokens_per_s,
            "requests_per_s": len(answered) / self.duration_s if answered else 0.0,
            **{name: asdict(value) if value else None for name, value in percentiles.items()},
            "speculation": self.speculation
            and {
                **asdict(self.speculation),
                "acceptance_ratio": self.speculation.acceptance_ratio,
                "accepted_length": self.speculation.accepted_length,
            },
        }


async def run_closed(endpoint: Endpoint, workload: Workload, concurrency: int, limits: Limits) -> LoadResult:
    """`concurrency` clients, each with one request in flight at a time."""
    before = await endpoint.speculation_counters()
    records: list[RequestRecord] = []
    prompts = _prompts_to_send(workload, limits.requests)
    stop_s = time.perf_counter() + limits.duration_s

    async def client() -> None:
        for prompt in prompts:  # one iterator shared by all clients: each takes the next prompt
            if time.perf_counter() >= stop_s:
                return
            records.append(await endpoint.chat(prompt.text, workload.max_tokens, workload.temperature))

    async with asyncio.TaskGroup() as clients:
        for _ in range(concurrency):
            clients.create_task(client())
    return LoadResult(concurrency, None, records, await _speculation(endpoint, records, before))


async def run_open(endpoint: Endpoint, workload: Workload, rate_per_s: float, limits: Limits, seed: int) -> LoadResult:
    """Requests arrive as a Poisson process of `rate_per_s`, at the same times for the same seed."""
    before = await endpoint.speculation_counters()
    records: list[RequestRecord] = []
    begin_s = time.perf_counter()

    async def one(prompt: Prompt) -> None:
        records.append(await endpoint.chat(prompt.text, workload.max_tokens, workload.temperature))

    prompts = _prompts_to_send(workload, limits.requests)
    async with asyncio.TaskGroup() as requests:
        for prompt, arrival_s in zip(prompts, poisson_arrivals_s(rate_per_s, seed), strict=False):
            if arrival_s >= limits.duration_s:
                break
            await asyncio.sleep(begin_s + arrival_s - time.perf_counter())
            requests.create_task(one(prompt))
    return LoadResult(None, rate_per_s, records, await _speculation(endpoint, records, before))


def poisson_arrivals_s(rate_per_s: float, seed: int) -> Iterator[float]:
    """Endless arrival times, in seconds from the start."""
    draw = random.Random(seed)
    return itertools.accumulate(draw.expovariate(rate_per_s) for _ in itertools.count())


def _prompts_to_send(workload: Workload, requests: int) -> Iterator[Prompt]:
    return itertools.islice(itertools.cycle(workload.prompts), requests)


async def _speculation(
    endpoint: Endpoint, records: Sequence[RequestRecord], before: Speculation | None
) -> Speculation | None:
    told = [record.speculation for record in records if record.speculation is not None]
    if told:
        return sum(told[1:], start=told[0])
    after = await endpoint.speculation_counters()
    return after - before if after is not None and before is not None else None


OPTIONAL_FIELDS: dict[str, object] = {"stream_options": {"include_usage": True}, "ignore_eos": True}


async def use_optional_fields(endpoint: Endpoint, wanted: Sequence[str], temperature: float) -> list[str]:
    """Add those of OPTIONAL_FIELDS that the server takes to all later requests; returns the names it refused.

    Some servers answer an unknown field with 400 or 422, so each is tried with one short request.
    `temperature` is that of the load to come: transformers keeps the first one it sees for its whole life.
    Raises EndpointError when even the plain request fails.
    """
    plain = await endpoint.chat("Hello", max_tokens=1, temperature=temperature)
    if plain.error is not None:
        raise EndpointError(
            f"{endpoint.url} does not answer a chat request for model {endpoint.model!r}: {plain.error}"
        )
    refused = []
    for name in wanted:
        without = endpoint.extra_body
        endpoint.extra_body = {**without, name: OPTIONAL_FIELDS[name]}
        if (await endpoint.chat("Hello", max_tokens=1, temperature=temperature)).status in (400, 422):
            endpoint.extra_body = without
            refused.append(name)
    return refused


def table(results: Sequence[LoadResult]) -> str:
    """One line per level; times in ms unless the head says otherwise."""
    heads = ["load", "requests", "errors", "tok/s", "req/s", "TTFT p50", "p99", "ms/token p50", "p99", "gap p50", "p99"]
    heads += ["end to end p50 (s)", "accepted length", "acceptance"]
    rows = []
    for result in results:
        numbers = result.as_dict()

        def cell(measure: str, quantile: str, scale: float = 1e3, numbers: dict[str, object] = numbers) -> str:
            percentiles = numbers[measure]
            return f"{percentiles[quantile] * scale:.1f}" if isinstance(percentiles, dict) else "-"

        speculation = result.speculation
        length = speculation.accepted_length if speculation else None
        ratio = speculation.acceptance_ratio if speculation else None
        rows.append(
            [
                result.name,
                str(len(result.records)),
                str(sum(result.errors.values())),
                f"{result.tokens_per_s:.1f}",
                f"{numbers['requests_per_s']:.2f}",
                *(cell("ttft_s", quantile) for quantile in ("p50", "p99")),
                *(cell("time_per_output_token_s", quantile) for quantile in ("p50", "p99")),
                *(cell("chunk_gap_s", quantile) for quantile in ("p50", "p99")),
                cell("end_to_end_s", "p50", scale=1.0),
                "-" if length is None else f"{length:.2f}",
                "-" if ratio is None else f"{ratio:.0%}",
            ]
        )
    return align([heads, *rows])


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the first is left-aligned, as in a Markdown table."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        + " |"
        for row in rows
    ]
    ruler = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], ruler, *lines[1:]])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `dspark bench`."""
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="root of the OpenAI server (default: %(default)s)"
    )
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument("--model", help="default: the first that /v1/models lists")
    parser.add_argument("--prompts", type=Path, help="jsonl or text file, one prompt a line (default: a built-in set)")
    parser.add_argument(
        "--concurrency",
        type=list_of(int),
        metavar="N,N,...",
        help="closed loop: numbers of clients (default: 1,2,4,8 when --rates is not given)",
    )
    parser.add_argument("--rates", type=list_of(float), metavar="R,R,...", help="open loop: requests per second")
    parser.add_argument("--requests", type=positive(int), help="per level (default: 4 per client and at least 16)")
    parser.add_argument(
        "--duration",
        type=positive(float),
        default=120.0,
        metavar="S",
        help="per level, no new requests after S seconds",
    )
    parser.add_argument("--timeout", type=positive(float), default=300.0, metavar="S", help="of one request")
    parser.add_argument("--max-tokens", type=positive(int), default=128, help="per request (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--ignore-eos", action="store_true", help="always --max-tokens tokens, where the server can")
    parser.add_argument("--warmup", type=int, default=2, help="requests before the first level (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrival times")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all numbers and the machine's facts here")


def main(args: argparse.Namespace) -> int:
    """Run the levels, print the table; 0, or 1 when the server could not be measured or any request failed."""
    try:
        prompts = read_prompts(args.prompts) if args.prompts else mixed()
        if args.json:
            args.json.touch()  # a folder that cannot be written to is better known before the measurement
        results, facts = asyncio.run(_bench(args, prompts))
    except (EndpointError, ValueError, OSError) as error:
        print(f"dspark bench: {error}", file=sys.stderr)
        return 1
    machine = describe_machine()
    print(table(results))
    print(f"\nThis machine (the load generator's): {machine.line()}")
    if any(result.counted_by == "chunks" for result in results):
        print("The server sent no token usage: tokens are counted as chunks and may be too few.")
    if args.json:
        document = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **facts,
            "machine": machine.as_dict(),
            "levels": [result.as_dict() for result in results],
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for result in results:
        for message, count in result.errors.items():
            print(f"dspark bench: {result.name}: {count} failed: {message}", file=sys.stderr)
    return 1 if any(result.errors for result in results) else 0


async def _bench(args: argparse.Namespace, prompts: Sequence[Prompt]) -> tuple[list[LoadResult], dict[str, object]]:
    workload = Workload(prompts, args.max_tokens, args.temperature)
    concurrency = args.concurrency or ([] if args.rates else [1, 2, 4, 8])
    async with Endpoint(args.url, args.api_key, args.model, args.timeout) as endpoint:
        wanted = ["stream_options", *(["ignore_eos"] if args.ignore_eos else [])]
        refused = await use_optional_fields(endpoint, wanted, args.temperature)
        for name in refused:
            print(f"The server refuses {name!r}: measured without it.", file=sys.stderr)
        if args.warmup:
            # the last prompts of the set, so that the first level finds none of its own in a prefix cache
            warmup = replace(workload, prompts=workload.prompts[::-1])
            await run_closed(endpoint, warmup, min(args.warmup, 4), Limits(args.warmup, args.duration))
        results = []
        for clients in concurrency:
            limits = Limits(args.requests or max(16, 4 * clients), args.duration)
            results.append(await run_closed(endpoint, workload, clients, limits))
        for rate_per_s in args.rates or ():
            results.append(
                await run_open(endpoint, workload, rate_per_s, Limits(args.requests or 16, args.duration), args.seed)
            )
        facts: dict[str, object] = {
            "url": endpoint.url,
            "model": endpoint.model,
            "max_tokens": args.max_tokens,
            "temperature": args.temperature,
            "ignore_eos": args.ignore_eos and "ignore_eos" not in refused,
            "prompts": str(args.prompts) if args.prompts else "built-in",
            "seed": args.seed,
        }
        return results, facts


def positive(kind: type[int] | type[float]):
    def parse(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse names it in its message for text that is no number
    return parse


def list_of(kind: type[int] | type[float]):
    one = positive(kind)

    def parse(text: str) -> list[float]:
        return [one(part) for part in text.split(",") if part]

    parse.__name__ = f"comma-separated list of {kind.__name__}"
    return parse
