"""Plain decoding side by side: our server, `transformers serve --continuous-batching`, and any other OpenAI server.

    python -m dspark.benchmarks.peers [--peer NAME=URL ...]

Why: speculation can only multiply what plain decoding gives, so plain decoding has to be good by itself. Every server
that is started here gets the same weights (one folder), dtype and number of threads; all get the same prompts and the
same number of output tokens. They take turns in short slices, A B B A ..., so that a drift of the machine hits all of
them alike, and only one is asked at a time. The figures are tokens of the servers' own usage, not chunks.

`transformers serve` needs the extra that brings accelerate: pip install 'transformers[serving]'.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from dspark.benchmarks.endpoint import Endpoint, EndpointError
from dspark.benchmarks.load import Limits, Workload, align, list_of, positive, run_closed, use_optional_fields
from dspark.benchmarks.machine import describe_machine
from dspark.benchmarks.prompts import Prompt, mixed
from dspark.benchmarks.server_process import StartError, free_port, running
from dspark.engine import ConfigError, locate_model

WARMUP_TOKENS = 8
OURS = "dspark"


class PeerError(Exception):
    """A server that failed a request or did not count its tokens: there is nothing to compare."""


@dataclass(slots=True)
class Server:
    """One contestant. `extra_body` makes every answer `max_tokens` long, in the words of this server."""

    name: str
    url: str
    extra_body: Mapping[str, object] = field(default_factory=dict)

    def endpoint(self) -> Endpoint:
        return Endpoint(self.url, request_timeout_s=1800.0, extra_body=self.extra_body)


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens per second of one server in one repeat."""

    server: str
    concurrency: int
    repeat: int
    tokens_per_s: float
    output_tokens: int
    time_per_output_token_ms: float | None


def transformers_command(folder: Path, dtype: str, port: int) -> list[str]:
    """The peer's own defaults, but for the share of memory: nine tenths of it would leave none for the others."""
    return [
        str(Path(sys.executable).with_name("transformers")),
        "serve",
        str(folder),
        "--continuous-batching",
        *("--attn-implementation", "sdpa"),
        *("--device", "cpu"),
        *("--dtype", dtype),
        *("--cb-max-memory-percent", "0.2"),
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
    ]


def dspark_command(folder: Path, dtype: str, threads: int, port: int) -> list[str]:
    return [
        str(Path(sys.executable).with_name("dspark")),
        "serve",
        *("--model", str(folder)),
        *("--speculation", "off"),
        *("--threads", str(threads)),
        *("--dtype", dtype),
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
    ]


def numbered_prompts(first: int, count: int) -> list[Prompt]:
    """Prompts that begin with their number: none shares a prefix with another, so no prefix cache shortens the work."""
    built_in = mixed()
    return [
        Prompt(prompt.kind, f"({number}) {prompt.text}")
        for number in range(first, first + count)
        for prompt in [built_in[number % len(built_in)]]
    ]


def order_of_repeat(servers: Sequence[Server], repeat: int) -> list[Server]:
    """A B C, then C B A, and so on: a machine that slowly speeds up or down favours nobody."""
    return list(servers) if repeat % 2 == 0 else list(reversed(servers))


async def measure(
    servers: Sequence[Server], concurrencies: Sequence[int], repeats: int, max_tokens: int
) -> list[Slice]:
    """At every concurrency: warm every server up, then `repeats` slices each. PeerError for any failed request."""
    slices = []
    number = 0
    for concurrency in concurrencies:
        for server in servers:
            await _slice(server, concurrency, -1, Workload(numbered_prompts(number, concurrency), WARMUP_TOKENS))
        number += concurrency
        for repeat in range(repeats):
            workload = Workload(numbered_prompts(number, concurrency), max_tokens)
            number += concurrency
            for server in order_of_repeat(servers, repeat):
                slices.append(await _slice(server, concurrency, repeat, workload))
                print(
                    f"  {concurrency} clients, repeat {repeat + 1}/{repeats}, {server.name}: "
                    f"{slices[-1].tokens_per_s:.1f} tok/s",
                    file=sys.stderr,
                )
    return slices


async def _slice(server: Server, concurrency: int, repeat: int, workload: Workload) -> Slice:
    """Every client sends one request; a fresh connection each, so that none has gone stale while others had a turn."""
    async with server.endpoint() as endpoint:
        result = await run_closed(endpoint, workload, concurrency, Limits(concurrency, float("inf")))
    if result.errors:
        raise PeerError(f"{server.name} failed at {concurrency} clients: {next(iter(result.errors))}")
    if result.counted_by != "usage":
        raise PeerError(f"{server.name} sends no token usage in its streams, so its tokens cannot be counted")
    expected = concurrency * workload.max_tokens
    if result.output_tokens != expected:
        print(
            f"  {server.name} gave {result.output_tokens} tokens instead of {expected}: it ends texts early",
            file=sys.stderr,
        )
    per_token_s = [record.time_per_output_token_s for record in result.answered]
    known_ms = [value * 1e3 for value in per_token_s if value is not None]
    return Slice(
        server=server.name,
        concurrency=concurrency,
        repeat=repeat,
        tokens_per_s=result.tokens_per_s,
        output_tokens=result.output_tokens,
        time_per_output_token_ms=statistics.median(known_ms) if known_ms else None,
    )


def ratio_table(slices: Sequence[Slice], reference: str) -> str:
    """Median with the smallest and largest repeat; ratios are taken within a repeat, then summarised."""
    heads = ["clients", "server", "tok/s", "(min to max)", "ms/token", f"{reference} ÷ it", "(min to max)"]
    rows = []
    for concurrency in dict.fromkeys(s.concurrency for s in slices):
        at = [s for s in slices if s.concurrency == concurrency]
        by_repeat = {(s.server, s.repeat): s for s in at}
        for server in dict.fromkeys(s.server for s in at):
            own = [s for s in at if s.server == server]
            rates = [s.tokens_per_s for s in own]
            per_token_ms = [s.time_per_output_token_ms for s in own if s.time_per_output_token_ms is not None]
            ratios = [
                by_repeat[reference, s.repeat].tokens_per_s / s.tokens_per_s
                for s in own
                if (reference, s.repeat) in by_repeat
            ]
            rows.append(
                [
                    str(concurrency),
                    server,
                    f"{statistics.median(rates):.1f}",
                    f"{min(rates):.1f} to {max(rates):.1f}",
                    f"{statistics.median(per_token_ms):.1f}" if per_token_ms else "-",
                    f"{statistics.median(ratios):.2f}" if ratios else "-",
                    f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "-",
                ]
            )
    return align([heads, *rows])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder, GGUF file or hub id for the servers started here (default: ours)")
    parser.add_argument(
        "--start",
        default=f"{OURS},transformers",
        metavar="NAME,...",
        help=f"which servers to start: {OURS}, transformers; empty for none (default: %(default)s)",
    )
    parser.add_argument(
        "--peer", action="append", default=[], type=_named_url, metavar="NAME=URL", help="a server that runs already"
    )
    parser.add_argument("--concurrency", type=list_of(int), default=[1, 8, 32], metavar="N,N,...")
    parser.add_argument("--repeats", type=positive(int), default=5, help="slices per server (default: %(default)s)")
    parser.add_argument("--max-tokens", type=positive(int), default=128, help="per request (default: %(default)s)")
    parser.add_argument("--threads", type=positive(int), default=1, help="of each started server")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every slice and the machine's facts here")


def main(args: argparse.Namespace) -> int:
    """Start, measure, print; 0, or 1 when a server could not be started or measured."""
    try:
        with contextlib.ExitStack() as stack:
            servers = [Server(name, url) for name, url in args.peer]
            servers = [*(_start(name, args, stack) for name in args.start.split(",") if name), *servers]
            if not servers:
                raise PeerError("nothing to measure: give --start or --peer")
            slices = asyncio.run(_compare(servers, args))
    except (PeerError, StartError, EndpointError, ConfigError) as error:
        print(f"peers: {error}", file=sys.stderr)
        return 1
    machine = describe_machine()
    date = datetime.now(UTC).isoformat(timespec="seconds")
    print(ratio_table(slices, servers[0].name))
    print(f"\n{date}, {args.threads} thread(s) each, {args.dtype}, {args.max_tokens} output tokens, greedy")
    print(machine.line())
    if args.json:
        document = {
            "date": date,
            "machine": machine.as_dict(),
            "threads": args.threads,
            "dtype": args.dtype,
            "max_tokens": args.max_tokens,
            "slices": [asdict(s) for s in slices],
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


async def _compare(servers: Sequence[Server], args: argparse.Namespace) -> list[Slice]:
    for server in servers:
        wanted = [name for name in ("stream_options", "ignore_eos") if server.name != "transformers"]
        async with server.endpoint() as endpoint:
            for name in await use_optional_fields(endpoint, wanted, temperature=0.0):
                print(f"  {server.name} refuses {name!r}: measured without it", file=sys.stderr)
            server.extra_body = endpoint.extra_body
    return await measure(servers, args.concurrency, args.repeats, args.max_tokens)


def _start(name: str, args: argparse.Namespace, stack: contextlib.ExitStack) -> Server:
    folder = locate_model(args.model).folder
    port = free_port()
    if name == OURS:
        command = dspark_command(folder, args.dtype, args.threads, port)
        return Server(name, stack.enter_context(running(name, command, port, args.threads)))
    if name == "transformers":
        if importlib.util.find_spec("accelerate") is None:
            raise PeerError("`transformers serve` needs accelerate: pip install 'transformers[serving]'")
        command = transformers_command(folder, args.dtype, port)
        url = stack.enter_context(running(name, command, port, args.threads))
        # it takes no ignore_eos, but a whole generation config: a token that does not exist never ends a text
        return Server(name, url, {"generation_config": json.dumps({"eos_token_id": -1, "do_sample": False})})
    raise PeerError(f"--start knows {OURS} and transformers, got {name!r}; other servers: --peer NAME=URL")


def _named_url(text: str) -> tuple[str, str]:
    name, separator, url = text.partition("=")
    if not (name and separator and url):
        raise argparse.ArgumentTypeError(f"must be NAME=URL, got {text!r}")
    return name, url


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(prog="python -m dspark.benchmarks.peers", description=__doc__)
    add_arguments(arguments)
    sys.exit(main(arguments.parse_args()))
