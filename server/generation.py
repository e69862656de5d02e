"""One HTTP request inside the engine: a stream per prompt, a text per choice, and its place in the metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from dspark.engine import (
    DeadlineExceededError,
    Engine,
    EngineClosedError,
    FinishReason,
    QueueFullError,
    Request,
    RequestError,
    RequestStream,
    TokenDelta,
)
from dspark.server.metrics import RequestMetrics
from dspark.server.text import ChoiceText
from dspark.server.translate import Piece, usage


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """One prompt for the engine and the text of each of its choices."""

    request: Request
    choices: Sequence[ChoiceText]


class Generation:
    """An async context manager around everything a request holds in the engine.

    Entering submits every prompt or none. Leaving by any door aborts what is unfinished and counts the request, once.
    Choice k of prompt p is the answer's choice p * n + k.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: RequestMetrics,
        prompts: Sequence[PromptRequest],
        *,
        endpoint: str,
        param_names: Mapping[str, str],
        arrived_s: float,
        deadline_s: float | None = None,
    ) -> None:
        """endpoint: one of `metrics.ENDPOINTS`. arrived_s: when the request's body had been read.
        deadline_s: when its answer is of no use any more, on the same clock; None: never.
        param_names: the client's names of the engine's parameters, where they differ.
        """
        self._engine = engine
        self._metrics = metrics
        self._prompts = prompts
        self._endpoint = endpoint
        self._param_names = param_names
        self._arrived_s = arrived_s
        self._deadline_s = deadline_s
        self._streams: list[RequestStream] = []
        self._emitted_s: dict[int, float] = {}
        self._positions: dict[int, int] = {}
        self._reasons: set[str] = set()

    async def __aenter__(self) -> Self:
        """Raises RequestError, QueueFullError, EngineClosedError; then nothing stays queued."""
        async with AsyncExitStack() as stack:
            try:
                with counting_refusals(self._metrics, self._endpoint):
                    for prompt in self._prompts:
                        request = replace(prompt.request, deadline_s=self._deadline_s)
                        self._streams.append(await stack.enter_async_context(self._engine.submit(request)))
            except RequestError as error:
                error.param = self._param_names.get(error.param, error.param)
                raise
            self._held = stack.pop_all()
        self._metrics.admitted()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._held.aclose()
        outcome = self._outcome(error)
        self._metrics.ended(self._endpoint, outcome, time.monotonic() - self._arrived_s)
        cause = _cancel_cause(error)
        if cause is not None:
            self._count_when_freed(cause)
        for prompt, stream in zip(self._prompts, self._streams, strict=True):
            self._metrics.engine_request(stream.facts, len(prompt.choices))

    def _outcome(self, error: BaseException | None) -> str:
        if error is None:
            return next((reason for reason in ("length", "tool_calls") if reason in self._reasons), "stop")
        if isinstance(error, QueueFullError):  # it had to make room for another before it started
            return "shed"
        cause = _cancel_cause(error)
        return "error" if cause is None else "timeout" if cause == "deadline" else "abort"

    def _count_when_freed(self, cause: str) -> None:
        """Count the cancellation once the engine holds nothing of the request any more."""
        held = len(self._streams)

        def freed() -> None:
            nonlocal held
            held -= 1
            if not held:
                facts = [stream.facts for stream in self._streams]
                began_s = min((f.cancelled_s for f in facts if f.cancelled_s is not None), default=None)
                ended_s = max(f.finished_s for f in facts if f.finished_s is not None)
                self._metrics.cancelled(cause, 0.0 if began_s is None else max(0.0, ended_s - began_s))

        for stream in self._streams:
            stream.when_freed(freed)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Raises what `RequestStream` raises; EngineClosedError when a shutdown cut the request short."""
        if len(self._streams) == 1:
            async for delta in self._streams[0]:
                yield self._piece(0, delta)
            return
        async with aclosing(_merge(self._streams)) as merged:
            async for prompt_index, delta in merged:
                yield self._piece(prompt_index, delta)

    def _piece(self, prompt_index: int, delta: TokenDelta) -> Piece:
        if delta.finish_reason is FinishReason.ABORT:
            raise EngineClosedError("The server stopped before this request was finished; send it again")
        choices = self._prompts[prompt_index].choices
        choice = choices[delta.index]
        index = prompt_index * len(choices) + delta.index
        self._observe(index, len(delta.token_ids))
        logprobs = delta.logprobs
        position = self._positions.get(index, 0)
        self._positions[index] = position + len(delta.token_ids)
        if logprobs and choice.is_end(delta.token_ids[-1], position + len(delta.token_ids) - 1):
            logprobs = logprobs[:-1]
        parts = choice.read(delta)
        reason = None if delta.finish_reason is None else choice.finish_reason(delta.finish_reason)
        if reason is not None:
            self._reasons.add(reason)
        return Piece(index, parts, logprobs, reason)

    def _observe(self, index: int, tokens: int) -> None:
        if not tokens:
            return
        now = time.monotonic()
        if not self._emitted_s:
            self._metrics.first_token.observe(now - self._arrived_s)
        before = self._emitted_s.get(index)
        if before is not None:
            self._metrics.chunk_gap.observe(now - before)
            self._metrics.token_gap.observe((now - before) / tokens, tokens)
        self._emitted_s[index] = now

    def usage(self) -> dict[str, object]:
        """Token counts over all prompts; complete when every choice has finished."""
        reasoning = sum(choice.reasoning_tokens for prompt in self._prompts for choice in prompt.choices)
        return usage([stream.facts for stream in self._streams], reasoning)


@contextmanager
def counting_refusals(metrics: RequestMetrics, endpoint: str) -> Iterator[None]:
    """Count a request that the engine refuses before any work."""
    try:
        yield
    except QueueFullError:
        metrics.shed(endpoint, "queue_full")
        raise
    except EngineClosedError:
        metrics.shed(endpoint, "draining")
        raise


def _cancel_cause(error: BaseException | None) -> str | None:
    """Of `metrics.CANCEL_CAUSES`; None: the request ran to an end of its own, or failed."""
    if isinstance(error, DeadlineExceededError):
        return "deadline"
    if isinstance(error, EngineClosedError):
        return "shutdown"
    return "client_disconnect" if isinstance(error, asyncio.CancelledError | GeneratorExit) else None


async def _merge(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, TokenDelta], None]:
    """Deltas of several streams as they come, each with its stream's index."""

    async def next_of(index: int) -> tuple[int, TokenDelta | None]:
        return index, await anext(streams[index], None)

    waiting = {asyncio.create_task(next_of(index)) for index in range(len(streams))}
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index, delta = task.result()
                if delta is not None:
                    waiting.add(asyncio.create_task(next_of(index)))
                    yield index, delta
    finally:
        for task in waiting:
            task.cancel()
