"""Where finished answers wait for a retry: in memory or in a file, both by SQLite. Names and fingerprints are hashes."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Protocol, TypeVar

from dspark.engine import ConfigError
from dspark.server.metrics import IdempotencyMetrics
from dspark.server.recording import Reply

Result = TypeVar("Result")

IN_MEMORY = ":memory:"
LOCK_WAIT_S = 1.0
"""A server that is just being stopped still holds the file for a moment."""
ENTRY_BYTES = 256
"""What an entry takes beside its texts."""


class StoreError(Exception):
    """The store could not be read or written; nothing is known about the key."""


class ClaimState(Enum):
    NEW = auto()
    """The name is the caller's: to compute, then `keep` or `release`."""
    EXPIRED = auto()
    """Like NEW, but there was an answer, now too old."""
    DONE = auto()
    """`reply` is the answer."""
    HELD = auto()
    """Somebody else's: another replica computes it, or the request was another one."""
    ABSENT = auto()
    """Nothing is known, and nothing was claimed."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a store says of a name. fingerprint: of the request that has it. created_unix_s: of its answer."""

    state: ClaimState
    fingerprint: bytes
    created_unix_s: int
    reply: Reply | None = None


class ReplyStore(Protocol):
    """Answers by name. Every method but `close` raises StoreError."""

    async def claim(self, name: bytes, fingerprint: bytes) -> Claim: ...

    async def keep(self, name: bytes, claim: Claim, reply: Reply) -> None:
        """Make the claimed name's answer known; one too large for the store is given up."""

    async def release(self, name: bytes) -> None:
        """Give a claimed name up, as if it had never been asked for."""

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """ttl_s: how long an answer is kept after its end. max_entries, max_bytes: of the answers kept; oldest go first."""

    ttl_s: float = 86400.0
    max_entries: int = 10_000
    max_bytes: int = 64 * 2**20


class SqliteStore:
    """The claims and answers of one server, on a thread of their own.

    A file belongs to one server at a time. Claims that a killed server left in it keep their `created_unix_s` and their
    fingerprint, and are free to be claimed again.
    """

    def __init__(
        self, path: str, limits: StoreLimits, metrics: IdempotencyMetrics, clock: Callable[[], float] = time.time
    ) -> None:
        """path: of the file, or IN_MEMORY. clock: unix seconds. Raises ConfigError."""
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="replies")
        try:
            if path != IN_MEMORY:
                Path(path).touch(mode=0o600)  # answers are their callers' own
            self._db = sqlite3.connect(path, timeout=LOCK_WAIT_S, check_same_thread=False)
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            # what a power cut may lose is computed again, with the same ids
            self._db.execute("PRAGMA synchronous = NORMAL")
            with self._db:
                self._make_tables()
                self._drop_old(clock())
        except (OSError, sqlite3.Error) as error:
            hint = "; another server uses it" if "locked" in str(error) else ""
            raise ConfigError("idempotency_store", f"cannot use {path}: {error}{hint}") from error

    def _make_tables(self) -> None:
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS replies (name BLOB PRIMARY KEY, fingerprint BLOB NOT NULL,"
            " created_unix_s INTEGER NOT NULL, expires_unix_s REAL NOT NULL, run TEXT, texts BLOB, size INTEGER)"
        )
        self._db.execute("CREATE INDEX IF NOT EXISTS by_age ON replies (expires_unix_s, size)")

    async def claim(self, name: bytes, fingerprint: bytes) -> Claim:
        return await self._in_thread(lambda: self._claim(name, fingerprint))

    async def keep(self, name: bytes, claim: Claim, reply: Reply) -> None:
        await self._in_thread(lambda: self._keep(name, claim, reply))

    async def release(self, name: bytes) -> None:
        await self._in_thread(lambda: self._db.execute("DELETE FROM replies WHERE name = ?", (name,)))

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._db.close)
        self._thread.shutdown()

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        def transaction() -> Result:
            with self._db:
                return work()

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, transaction)
        except sqlite3.Error as error:
            raise StoreError(str(error)) from error

    def _claim(self, name: bytes, fingerprint: bytes) -> Claim:
        now = self._clock()
        row = self._db.execute(
            "SELECT fingerprint, created_unix_s, expires_unix_s, run, texts FROM replies WHERE name = ?", (name,)
        ).fetchone()
        self._drop_old(now)
        state, created_unix_s = ClaimState.NEW, int(now)
        if row is not None:
            holder, held_created_unix_s, expires_unix_s, run, texts = row
            if expires_unix_s <= now:
                state = ClaimState.EXPIRED if texts is not None else ClaimState.NEW
            elif texts is not None:
                reply = Reply(run, texts.decode().split("\n"))
                return Claim(ClaimState.DONE, holder, held_created_unix_s, reply)
            elif holder != fingerprint:
                return Claim(ClaimState.HELD, holder, held_created_unix_s)
            else:
                created_unix_s = held_created_unix_s
        self._write(name, fingerprint, created_unix_s, now, None, None, None)
        return Claim(state, fingerprint, created_unix_s)

    def _keep(self, name: bytes, claim: Claim, reply: Reply) -> None:
        now = self._clock()
        texts = "\n".join(reply.texts).encode()  # JSON has no line breaks of its own
        size = len(texts) + ENTRY_BYTES
        self._drop_old(now)
        if size > self._limits.max_bytes:
            self._db.execute("DELETE FROM replies WHERE name = ?", (name,))
            self._metrics.evictions["size"].inc()
            return
        self._write(name, claim.fingerprint, claim.created_unix_s, now, reply.run, texts, size)
        self._make_room()

    def _write(
        self,
        name: bytes,
        fingerprint: bytes,
        created_unix_s: int,
        now: float,
        run: str | None,
        texts: bytes | None,
        size: int | None,
    ) -> None:
        row = (name, fingerprint, created_unix_s, now + self._limits.ttl_s, run, texts, size)
        self._db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def _drop_old(self, now: float) -> None:
        """Claims that are still running may go too: the server knows them by itself."""
        old = self._db.execute("SELECT count(size) FROM replies WHERE expires_unix_s <= ?", (now,)).fetchone()[0]
        self._db.execute("DELETE FROM replies WHERE expires_unix_s <= ?", (now,))
        self._metrics.evictions["ttl"].inc(old)
        self._count()

    def _make_room(self) -> None:
        dropped = self._db.execute(
            "DELETE FROM replies WHERE rowid IN (SELECT rowid FROM ("
            "SELECT rowid, count(*) OVER newest AS entries, sum(size) OVER newest AS bytes FROM replies"
            " WHERE size IS NOT NULL WINDOW newest AS (ORDER BY expires_unix_s DESC, rowid DESC)"
            ") WHERE entries > ? OR bytes > ?)",
            (self._limits.max_entries, self._limits.max_bytes),
        ).rowcount
        self._metrics.evictions["size"].inc(dropped)
        self._count()

    def _count(self) -> None:
        done = self._db.execute("SELECT count(size) FROM replies").fetchone()[0]
        self._metrics.entries["done"].set(done)
