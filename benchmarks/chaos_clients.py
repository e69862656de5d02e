"""The clients of the chaos run: most read to the end, some leave in mid-answer, some read slowly.

They run in a process of their own, on bare sockets: whatever they cost is not the server's, and at ten times the server's
capacity most of what they do is to be refused. Request i is the same in every run: its prompt, its length, what its client
does.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum

from dspark.benchmarks.load import poisson_arrivals_s
from dspark.benchmarks.prompts import mixed

PROMPTS = [prompt for prompt in mixed() if len(prompt.text) < 200]
"""Short ones, about equally dear, for the few hundred requests of a run that are answered are not the same under both loads."""
LEAVING_SHARE = 0.3
SLOW_SHARE = 0.1
SLOW_BYTES_PER_S = 1000.0
"""A third of what a stream of a full batch carries; so the answer piles up on its way to the client."""
SLOW_BUFFER_BYTES = 4096
PATIENCE_S = 300.0
"""A request that has not ended by then hangs."""
PROBE_EVERY_S = 1.0


class Kind(StrEnum):
    PATIENT = "patient"
    LEAVING = "leaving"
    SLOW = "slow"


class Outcome(StrEnum):
    COMPLETED = "completed"  # read to its last event
    LEFT = "left"  # the client went away in mid-answer
    REFUSED = "refused"  # 429 or 503
    FAILED = "failed"  # 500, or an error as the last event
    BROKEN = "broken"  # anything else: another status, a connection or a stream that just ended
    HUNG = "hung"


@dataclass(frozen=True, slots=True)
class Mix:
    """What is asked, and of whom. max_tokens: of the longest answer; the shortest has half."""

    model: str
    port: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """Exactly one of `clients` (closed loop) and `rate_per_s` (Poisson arrivals) is set. first: number of its first request.

    seconds: how long requests are begun; the last ones end later.
    """

    first: int
    seconds: float
    clients: int | None = None
    rate_per_s: float | None = None


@dataclass(slots=True)
class Visit:
    """One request. Times are of `time.monotonic()`, which is one clock for all processes of a machine.

    status: of the HTTP answer, None when none came. tokens: of a completed answer. chunks: with text, that were
    read. late_s: sent so much after it was due.
    """

    kind: Kind
    sent_s: float
    late_s: float = 0.0
    ended_s: float = 0.0
    status: int | None = None
    outcome: Outcome = Outcome.BROKEN
    tokens: int = 0
    chunks: int = 0


@dataclass(slots=True)
class Probe:
    """One GET /health/live. status: None when no answer came."""

    status: int | None
    seconds: float


@dataclass(slots=True)
class ClientsRun:
    """What all clients of a load saw. cpu_s: of their process, until the last request had been begun."""

    began_s: float
    visits: list[Visit] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    cpu_s: float = 0.0


def run_clients(mix: Mix, load: Load) -> ClientsRun:
    """Blocks until every request has ended, or hung."""
    run = ClientsRun(time.monotonic())
    asyncio.run(_run(mix, load, run))
    return run


async def _run(mix: Mix, load: Load, run: ClientsRun) -> None:
    probing = asyncio.create_task(_probe(mix.port, run.probes))
    cpu_began_s = time.process_time()
    async with asyncio.TaskGroup() as visitors:
        if load.clients is not None:
            numbers = itertools.count(load.first)
            for _ in range(load.clients):
                visitors.create_task(_client(mix, numbers, run, load.seconds))
            await asyncio.sleep(load.seconds)
        else:
            await _arrivals(mix, load, run, visitors)
        run.cpu_s = time.process_time() - cpu_began_s
    probing.cancel()


async def _client(mix: Mix, numbers: itertools.count[int], run: ClientsRun, seconds: float) -> None:
    while time.monotonic() < run.began_s + seconds:
        run.visits.append(await visit(mix, next(numbers)))


async def _arrivals(mix: Mix, load: Load, run: ClientsRun, visitors: asyncio.TaskGroup) -> None:
    async def one(number: int, due_s: float) -> None:
        late_s = time.monotonic() - due_s
        visited = await visit(mix, number)
        visited.late_s = late_s
        run.visits.append(visited)

    for number, arrival_s in enumerate(poisson_arrivals_s(load.rate_per_s or 0.0, seed=load.first), load.first):
        if arrival_s >= load.seconds:
            break
        due_s = run.began_s + arrival_s
        await asyncio.sleep(due_s - time.monotonic())
        visitors.create_task(one(number, due_s))


async def visit(mix: Mix, number: int) -> Visit:
    """Send request `number` and behave as its client does. Never raises for what the server does."""
    draw = random.Random(number)
    share = draw.random()
    kind = Kind.LEAVING if share < LEAVING_SHARE else Kind.SLOW if share < LEAVING_SHARE + SLOW_SHARE else Kind.PATIENT
    length = draw.randint(max(1, mix.max_tokens // 2), mix.max_tokens)
    leave_after = draw.randint(1, max(1, length // 2)) if kind is Kind.LEAVING else None
    body = {
        "model": mix.model,
        # its number first: no prefix cache shortens the work
        "messages": [{"role": "user", "content": f"({number}) {PROMPTS[number % len(PROMPTS)].text}"}],
        "max_tokens": length,
        "temperature": 0.7,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    visited = Visit(kind, time.monotonic())
    try:
        async with asyncio.timeout(PATIENCE_S):
            await _talk(mix.port, json.dumps(body).encode(), visited, leave_after)
    except TimeoutError:
        visited.outcome = Outcome.HUNG
    except (OSError, ValueError):
        visited.outcome = Outcome.BROKEN
    visited.ended_s = time.monotonic()
    return visited


async def _talk(port: int, body: bytes, visited: Visit, leave_after: int | None) -> None:
    """leave_after: after so many chunks the client goes away; None: never."""
    slow = visited.kind is Kind.SLOW
    reader, writer = await _connect(port, SLOW_BUFFER_BYTES if slow else None)
    try:
        visited.status = await _send(reader, writer, "POST /v1/chat/completions", body)
        if visited.status != 200:
            await reader.read()
            if visited.status in (429, 503):
                visited.outcome = Outcome.REFUSED
            elif visited.status == 500:
                visited.outcome = Outcome.FAILED
            return
        async for event in _events(reader, SLOW_BYTES_PER_S if slow else None):
            if event == b"[DONE]":
                visited.outcome = Outcome.COMPLETED
                return
            if event.startswith(b'{"error"'):
                visited.outcome = Outcome.FAILED
                return
            if b'"usage":{' in event:
                visited.tokens = json.loads(event)["usage"]["completion_tokens"]
            elif b'"content":' in event:
                visited.chunks += 1
                if visited.chunks == leave_after:
                    visited.outcome = Outcome.LEFT
                    return
    finally:
        writer.transport.abort()


async def _connect(port: int, buffer_bytes: int | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    connection = socket.socket()
    connection.setblocking(False)
    if buffer_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=connection, limit=buffer_bytes or 2**16)


async def _send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: str, body: bytes = b"") -> int:
    """→ the answer's status; its body is next to be read. Raises ConnectionError, ValueError."""
    head = f"{request} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    status_line = await reader.readline()
    if not status_line:
        raise ConnectionError("the connection was closed without an answer")
    while (await reader.readline()).strip():
        pass  # headers
    return int(status_line.split()[1])


async def _events(reader: asyncio.StreamReader, bytes_per_s: float | None) -> AsyncIterator[bytes]:
    """Data of the events; the server sends whole events, so the lines between them that frame its chunks do no harm."""
    while line := await reader.readline():
        if bytes_per_s is not None:
            await asyncio.sleep(len(line) / bytes_per_s)
        if line.startswith(b"data: "):
            yield line[6:].strip()


async def _probe(port: int, probes: list[Probe]) -> None:
    async def live() -> int:
        reader, writer = await _connect(port, None)
        try:
            return await _send(reader, writer, "GET /health/live")
        finally:
            writer.transport.abort()

    while True:
        began_s = time.monotonic()
        try:
            status: int | None = await asyncio.wait_for(live(), PATIENCE_S)
        except (TimeoutError, OSError, ValueError):
            status = None
        probes.append(Probe(status, time.monotonic() - began_s))
        await asyncio.sleep(PROBE_EVERY_S)
