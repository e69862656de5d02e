"""Answers that replicas share, in Redis: whoever claims a key first computes, the others replay it.

A claim is a lease by Redis's own clock. It is renewed while its holder lives; when the holder dies it runs out, and the
next retry computes the same text under the same ids.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from dspark.server.metrics import IdempotencyMetrics
from dspark.server.recording import Reply
from dspark.server.reply_store import Claim, ClaimState, StoreError, StoreLimits

log = logging.getLogger(__name__)

PREFIX = "dspark:reply:"
LEASE_S = 15.0
TIMEOUT_S = 2.0
"""A Redis that does not answer within this time is down, and a keyed request is refused."""

_CLAIM = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local held = redis.call('HMGET', KEYS[1], 'fingerprint', 'created', 'lease_until_ms', 'reply')
if held[4] then return {'DONE', held[1], held[2], held[4]} end
if held[1] and (held[1] ~= ARGV[1] or tonumber(held[3]) > now_ms) then return {'HELD', held[1], held[2]} end
local created = held[2] or tostring(time[1])
redis.call('HSET', KEYS[1], 'fingerprint', ARGV[1], 'created', created, 'token', ARGV[2],
           'lease_until_ms', now_ms + ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return {'NEW', ARGV[1], created}
"""
_RENEW = """
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'lease_until_ms', time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""
_KEEP = """
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'reply', ARGV[2])
redis.call('HDEL', KEYS[1], 'token', 'lease_until_ms')
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""
_RELEASE = "if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class RedisStore:
    """Entries end by Redis's own expiry, and all of them together are bounded by its `maxmemory` (`noeviction`: a claim
    that does not fit is refused). `max_bytes` bounds one answer. How many are kept is Redis's to say, not ours."""

    def __init__(self, url: str, limits: StoreLimits, metrics: IdempotencyMetrics, *, lease_s: float = LEASE_S) -> None:
        """url: redis://, rediss:// or unix://. Connects when first needed. Raises ValueError."""
        self._redis = Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
        self._limits = limits
        self._metrics = metrics
        self._lease_ms = int(lease_s * 1000)
        # a claim outlives its lease, so that a retry after a crash finds the same `created`
        self._ttl_ms = max(self._lease_ms, int(limits.ttl_s * 1000))
        self._tokens: dict[bytes, str] = {}
        self._renewal: asyncio.Task[None] | None = None

    async def claim(self, name: bytes, fingerprint: bytes) -> Claim:
        token = secrets.token_hex(16)
        arguments = [fingerprint.hex(), token, self._lease_ms, self._ttl_ms]
        state, holder, created, *reply = await self._run(_CLAIM, name, arguments)
        claim = Claim(ClaimState[state.decode()], bytes.fromhex(holder.decode()), int(created))
        if claim.state is ClaimState.NEW:
            self._tokens[name] = token
            self._renewal = self._renewal or asyncio.create_task(self._renew_leases())
        if not reply:
            return claim
        run, texts = json.loads(reply[0])
        return replace(claim, reply=Reply(run, texts))

    async def keep(self, name: bytes, claim: Claim, reply: Reply) -> None:
        data = json.dumps([reply.run, reply.texts], ensure_ascii=False).encode()
        if len(data) > self._limits.max_bytes:
            self._metrics.evictions["size"].inc()
            await self.release(name)
            return
        await self._run(_KEEP, name, [self._tokens.pop(name), data, self._ttl_ms])

    async def release(self, name: bytes) -> None:
        await self._run(_RELEASE, name, [self._tokens.pop(name)])

    async def close(self) -> None:
        if self._renewal is not None:
            self._renewal.cancel()
        await self._redis.aclose()

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(self._lease_ms / 3000)
            for name, token in list(self._tokens.items()):
                try:
                    await self._run(_RENEW, name, [token, self._lease_ms, self._ttl_ms])
                except StoreError as error:
                    # another replica may now compute it as well: the same text under the same ids
                    log.warning("a lease on an idempotency key was not renewed: %s", error)

    async def _run(self, script: str, name: bytes, arguments: Sequence[Any]) -> Any:
        try:
            answer: Awaitable[Any] = self._redis.eval(script, 1, PREFIX + name.hex(), *arguments)
            return await answer
        except (RedisError, OSError) as error:
            raise StoreError(f"Redis: {error}") from error
