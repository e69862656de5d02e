"""An answer on its way, kept from its start, so that any number of callers can read it from any event on."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

READ_AT_ONCE = 256
"""Texts handed to a reader in one piece: a replay costs few writes, and none is large."""


FIRST_READ_S = 10.0
"""How long the first reader may take to begin, however short the grace period is: the claim comes before."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished answer: the data of each event of a stream, or one JSON body.

    run: names the computation. Another one of the same request gives the same text but may cut it elsewhere.
    """

    run: str
    texts: list[str]


class Recording:
    """Filled by one computation, read by many. It grows with the request's own output, which `max_tokens` bounds.

    A reader that leaves takes nothing with it. When nobody has read for `grace_s`, `on_abandoned` is called, once.
    """

    def __init__(self, grace_s: float, on_abandoned: Callable[[], None]) -> None:
        self.reply = Reply(secrets.token_hex(4), [])
        self.ended = False
        self._error: BaseException | None = None
        self._grown = asyncio.Event()
        self._readers = 0
        self._grace_s = grace_s
        self._on_abandoned = on_abandoned
        self._timer = asyncio.get_running_loop().call_later(max(grace_s, FIRST_READ_S), on_abandoned)

    def add(self, texts: Sequence[str]) -> None:
        self.reply.texts.extend(texts)
        self._wake_readers()

    def end(self, error: BaseException | None = None) -> None:
        """error: what every reader gets after the last text."""
        self._timer.cancel()
        self.ended = True
        self._error = error
        self._wake_readers()

    def _wake_readers(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()

    async def read(self, start: int = 0) -> AsyncGenerator[list[str], None]:
        """Texts from number `start` on as they come. Raises what the computation raised."""
        position = start
        with self._reading():
            while True:
                batch = self.reply.texts[position : position + READ_AT_ONCE]
                if batch:
                    position += len(batch)
                    yield batch
                elif self._error is not None:
                    raise self._error
                elif self.ended:
                    return
                else:
                    await self._grown.wait()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        self._readers += 1
        self._timer.cancel()
        try:
            yield
        finally:
            self._readers -= 1
            if not self._readers and not self.ended:
                self._timer = asyncio.get_running_loop().call_later(self._grace_s, self._on_abandoned)


@dataclass(frozen=True, slots=True)
class Replay:
    """A finished answer, read like one on its way."""

    reply: Reply
    ended: bool = field(default=True, init=False)

    async def read(self, start: int = 0) -> AsyncGenerator[list[str], None]:
        """Texts from number `start` on."""
        for position in range(start, len(self.reply.texts), READ_AT_ONCE):
            yield self.reply.texts[position : position + READ_AT_ONCE]
