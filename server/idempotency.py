"""Safe retries: requests that carry the same `Idempotency-Key` are computed once.

The first one computes, in a task of its own; the same request again joins it while it runs and gets its answer once it
is done. Header: IETF draft "The Idempotency-Key HTTP Header Field", a quoted string; bare keys, which most clients
send, are read as well.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers

from dspark.engine import ConfigError, EngineClosedError
from dspark.server.errors import (
    IdempotencyConflictError,
    IdempotencyStoreError,
    InProgressElsewhereError,
    InvalidRequestError,
)
from dspark.server.metrics import IdempotencyMetrics
from dspark.server.recording import Recording, Replay
from dspark.server.reply_store import (
    IN_MEMORY,
    Claim,
    ClaimState,
    ReplyStore,
    SqliteStore,
    StoreError,
    StoreLimits,
)

log = logging.getLogger(__name__)

HEADER = "Idempotency-Key"
MAX_KEY_CHARS = 255
_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
_PRINTABLE = re.compile(r"[ -~]+")
EXACT_DIGITS = 300
CLOSING_S = 5.0
"""How long a stopping server waits for its last answers to be stored."""

Work = Callable[[int], AsyncGenerator[list[str], None]]
"""Computes the answer's texts, which are to bear the given `created` (unix seconds)."""


@dataclass(frozen=True, slots=True)
class IdempotencySettings:
    """store: `memory`, `sqlite:PATH`, or the URL of a Redis.

    grace_s: how long a computation goes on that nobody listens to.
    """

    store: str = "memory"
    limits: StoreLimits = field(default_factory=StoreLimits)
    grace_s: float = 60.0


def open_store(settings: IdempotencySettings, metrics: IdempotencyMetrics) -> ReplyStore:
    """Raises ConfigError."""
    kind, _, path = settings.store.partition(":")
    if settings.store == "memory":
        return SqliteStore(IN_MEMORY, settings.limits, metrics)
    if kind == "sqlite" and path:
        return SqliteStore(path, settings.limits, metrics)
    if kind not in ("redis", "rediss", "unix"):
        raise ConfigError(
            "idempotency_store", "should be memory, sqlite:PATH or the URL of a Redis (redis://HOST:PORT/0)"
        )
    try:
        from dspark.server.redis_store import RedisStore

        return RedisStore(settings.store, settings.limits, metrics)
    except ImportError as error:
        raise ConfigError("idempotency_store", "Redis needs `pip install 'dspark-server[redis]'`") from error
    except ValueError as error:
        raise ConfigError("idempotency_store", f"not the URL of a Redis: {error}") from error


def idempotency_key(headers: Headers) -> str | None:
    """The request's key, None without one. Raises InvalidRequestError."""
    given = headers.getlist(HEADER)
    if not given:
        return None
    if len(given) > 1:
        raise InvalidRequestError(f"The header '{HEADER}' was given {len(given)} times; give it once", HEADER)
    text = given[0].strip()
    if text.startswith('"'):
        quoted = _QUOTED.fullmatch(text)
        if quoted is None:
            raise InvalidRequestError(f"The header '{HEADER}' begins with a quote but is no quoted string", HEADER)
        text = re.sub(r"\\(.)", r"\1", quoted[1])
    if len(text) not in range(1, MAX_KEY_CHARS + 1) or not _PRINTABLE.fullmatch(text):
        given_chars = f"{len(text)} characters were given" if text.isprintable() else "others were given"
        allowed = f"it should be 1 to {MAX_KEY_CHARS} printable ASCII characters"
        raise InvalidRequestError(f"Invalid header '{HEADER}': {allowed}, but {given_chars}", HEADER)
    return text


def entry_name(tenant: bytes, endpoint: str, key: str) -> bytes:
    """What an answer is kept under: 32 bytes that tell nothing of the key."""
    return hmac.digest(tenant, f"{endpoint}\n{key}".encode(), "sha256")


def body_fingerprint(body: bytes) -> bytes:
    """The same for bodies that are the same JSON value: order of keys, white space and ways to write a number or a
    character do not matter. 32 bytes. body: valid JSON."""
    value = json.loads(body, parse_float=_number, parse_int=_integer)
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).digest()


def _number(text: str) -> float | int:
    # 1.0 is 1: JavaScript and RFC 8785 write them alike
    number = float(text)
    return int(number) if number.is_integer() else number


def _integer(text: str) -> Any:
    # Python reads no integers of many thousand digits, which fields that we ignore may hold
    return int(text) if len(text) <= EXACT_DIGITS else [text]


class _Running:
    """One key that is being claimed or computed here."""

    def __init__(self, grace_s: float) -> None:
        self.recording = Recording(grace_s, self._abandon)
        self.claimed: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
        self.computation: asyncio.Task[None] | None = None
        self.abandoned = False
        self.gone = asyncio.Event()

    def _abandon(self) -> None:
        self.abandoned = True
        if self.computation is not None:
            self.computation.cancel()

    async def compute(self, texts: AsyncGenerator[list[str], None]) -> BaseException | None:
        """Fill the recording; the error that ended it, if one did."""
        self.computation = asyncio.create_task(self._fill(texts))
        if self.abandoned:
            self.computation.cancel()
        await asyncio.wait({self.computation})
        if self.computation.cancelled():
            return EngineClosedError("The answer was cancelled because nobody waited for it; send the request again")
        return self.computation.exception()

    async def _fill(self, texts: AsyncGenerator[list[str], None]) -> None:
        async with aclosing(texts):
            async for batch in texts:
                self.recording.add(batch)


class IdempotentReplies:
    """What this server computes for keyed requests, in front of the store of what is done."""

    def __init__(self, store: ReplyStore, grace_s: float, metrics: IdempotencyMetrics) -> None:
        self._store = store
        self._grace_s = grace_s
        self._metrics = metrics
        self._running: dict[bytes, _Running] = {}
        """Bounded by the engine, which refuses requests beyond its queue."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._store_failing = False

    async def open(self, name: bytes, fingerprint: bytes, work: Work | None) -> tuple[Recording | Replay, str]:
        """The answer of this name, and what it is to this caller: `new`, `join` or `replay`.

        fingerprint: of the request's body. work: begins the computation; None: only what is known already.
        Raises IdempotencyConflictError, InProgressElsewhereError, IdempotencyStoreError; LookupError without `work`.
        """
        while True:
            running = self._running.get(name)
            first = running is None
            if running is None:
                running = self._start(name, fingerprint, work)
            elif running.abandoned:
                await running.gone.wait()
                continue
            claim = await self._claimed(running)
            if claim.state is not ClaimState.ABSENT:
                return self._opened(running, claim, fingerprint, first)
            if work is None:
                raise LookupError
            await running.gone.wait()

    def _opened(
        self, running: _Running, claim: Claim, fingerprint: bytes, first: bool
    ) -> tuple[Recording | Replay, str]:
        if not hmac.compare_digest(claim.fingerprint, fingerprint):
            self._metrics.requests["conflict"].inc()
            raise IdempotencyConflictError(f"This {HEADER} was used before with another body; use a new key", HEADER)
        if claim.state is ClaimState.HELD:
            self._metrics.requests["conflict"].inc()
            message = f"Another replica is computing the answer to this {HEADER}; ask again shortly"
            raise InProgressElsewhereError(message, HEADER)
        if claim.reply is not None:
            self._metrics.requests["replay"].inc()
            return Replay(claim.reply), "replay"
        if not first:
            self._metrics.requests["join"].inc()
            return running.recording, "join"
        self._metrics.requests["expired" if claim.state is ClaimState.EXPIRED else "new"].inc()
        return running.recording, "new"

    async def _claimed(self, running: _Running) -> Claim:
        try:
            # a caller that goes away leaves the claim to the others
            return await asyncio.shield(running.claimed)
        except StoreError as error:
            self._metrics.requests["store_error"].inc()
            message = f"The store of {HEADER}s does not answer, so that doing this twice could not be ruled out"
            raise IdempotencyStoreError(f"{message}; nothing was done, send the request again") from error

    def _start(self, name: bytes, fingerprint: bytes, work: Work | None) -> _Running:
        running = self._running[name] = _Running(self._grace_s)
        task = asyncio.create_task(self._run(running, name, fingerprint, work), name="keyed request")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._metrics.entries["in_progress"].set(len(self._running))
        return running

    async def _run(self, running: _Running, name: bytes, fingerprint: bytes, work: Work | None) -> None:
        """Claim, compute, keep. Callers see the end only once the answer is kept: what was answered can be replayed."""
        error: BaseException | None = None
        try:
            claim = await self._store.claim(name, fingerprint)
            if claim.state in (ClaimState.NEW, ClaimState.EXPIRED):
                if work is None:
                    await self._settle(self._store.release(name))
                    claim = Claim(ClaimState.ABSENT, fingerprint, 0)
                else:
                    running.claimed.set_result(claim)
                    error = await self._compute(running, name, claim, work)
        except StoreError as failure:
            self._store_failed(failure)
            running.claimed.set_exception(failure)
        else:
            if not running.claimed.done():
                running.claimed.set_result(claim)
        finally:
            running.claimed.cancel()  # no effect on one that is decided; a bug must leave nobody waiting
            running.recording.end(error)
            del self._running[name]
            self._metrics.entries["in_progress"].set(len(self._running))
            running.gone.set()

    async def _compute(self, running: _Running, name: bytes, claim: Claim, work: Work) -> BaseException | None:
        error = await running.compute(work(claim.created_unix_s))
        if error is not None:
            # refusals, faults and cancelled computations leave nothing behind: a retry starts anew
            await self._settle(self._store.release(name))
        elif not await self._settle(self._store.keep(name, claim, running.recording.reply)):
            self._metrics.evictions["store_error"].inc()
        return error

    async def _settle(self, operation: Any) -> bool:
        """Finish with a name after its claim. A store that fails now costs a later replay, not this answer."""
        try:
            await operation
        except StoreError as failure:
            self._store_failed(failure)
            return False
        self._store_failing = False
        return True

    def _store_failed(self, failure: StoreError) -> None:
        if not self._store_failing:
            log.error("the idempotency store fails; requests with a key are refused meanwhile: %s", failure)
        self._store_failing = True

    async def close(self) -> None:
        """Let the last answers be stored; the engine has ended them all."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSING_S)
        await self._store.close()
