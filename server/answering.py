"""From a checked request to its HTTP answer: computed for it alone, or by its Idempotency-Key joined or replayed."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

from fastapi import Request
from fastapi.responses import Response

from dspark.server.errors import InvalidRequestError
from dspark.server.generation import Generation
from dspark.server.idempotency import HEADER, body_fingerprint, entry_name, idempotency_key
from dspark.server.identity import Identity
from dspark.server.prompts import off_loop_if_large
from dspark.server.schemas import ChatCompletionRequest, CompletionRequest
from dspark.server.service import Service
from dspark.server.sse import LAST_EVENT_ID, EventStream, first_after, unknown_event, unless_disconnected
from dspark.server.translate import Answer

RESUMED_TO_ITS_END = 204
"""The status at which a browser's EventSource stops to reconnect."""

Texts = AsyncGenerator[list[str], None]
"""The data of a stream's events as they come, or one JSON body."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that has passed authentication and schema. data: its body as it came. endpoint: of `metrics.ENDPOINTS`.

    begin: makes the generation and its answer, under the given identity.
    """

    request: Request
    tenant: bytes
    endpoint: str
    data: bytes
    body: ChatCompletionRequest | CompletionRequest
    answer: type[Answer]
    begin: Callable[[Identity], Awaitable[tuple[Generation, Answer]]]


async def respond(service: Service, asked: Asked) -> Response:
    """Raises InvalidRequestError, the errors of `IdempotentReplies.open`, and those of the generation."""
    key = idempotency_key(asked.request.headers)
    last_event_id = asked.request.headers.get(LAST_EVENT_ID)
    if last_event_id and (key is None or not asked.body.stream):
        lacking = f"the {HEADER} of the stream" if key is None else "'stream': true"
        raise InvalidRequestError(f"The header '{LAST_EVENT_ID}' needs {lacking} beside it", LAST_EVENT_ID)
    if key is not None:
        return await _respond_keyed(service, asked, key, last_event_id)
    identity = Identity.random()
    return await _send(service, asked, compute(asked, identity), identity.response_id(asked.answer.id_prefix))


async def _respond_keyed(service: Service, asked: Asked, key: str, last_event_id: str | None) -> Response:
    identity = Identity.keyed(asked.tenant, key)

    def work(created_unix_s: int) -> Texts:
        return compute(asked, replace(identity, created_unix_s=created_unix_s))

    fingerprint = await off_loop_if_large(len(asked.data), partial(body_fingerprint, asked.data))
    name = entry_name(asked.tenant, asked.endpoint, key)
    try:
        reply, how = await service.idempotency.open(name, fingerprint, None if last_event_id else work)
    except LookupError:
        raise unknown_event(last_event_id or "") from None
    # where a retry's text could be cut elsewhere, its events have other ids
    stream = f"{identity.response_id(asked.answer.id_prefix)}:{reply.reply.run}"
    first: int | None = 0
    if last_event_id:
        first = first_after(last_event_id, stream, len(reply.reply.texts), ended=reply.ended)
    if how != "new":
        service.metrics.requests.repeated(asked.endpoint, how)
    if first is None:
        return Response(status_code=RESUMED_TO_ITS_END)
    response = await _send(service, asked, reply.read(first), stream, first)
    if how == "replay":
        response.headers["idempotency-replayed"] = "true"
    return response


async def _send(service: Service, asked: Asked, texts: Texts, stream: str, first: int = 0) -> Response:
    if asked.body.stream:
        return EventStream(texts, stream, first, service.metrics.http, service.settings.streams)
    complete = await unless_disconnected(asked.request.receive, _collect(texts))
    return Response("".join(complete), media_type="application/json")


async def _collect(texts: Texts) -> list[str]:
    async with aclosing(texts):
        return [text async for batch in texts for text in batch]


async def compute(asked: Asked, identity: Identity) -> Texts:
    """Run the generation; closing it early aborts it."""
    body = asked.body
    generation, answer = await asked.begin(identity)
    async with generation, aclosing(generation.pieces()) as pieces:
        if body.stream:
            async for piece in pieces:
                chunks = answer.chunks(piece)
                if chunks:
                    yield chunks
            usage = generation.usage()
        else:
            collected = [piece async for piece in pieces]
            complete = answer.complete(collected, generation.usage())
    if not body.stream:
        yield [json.dumps(complete, ensure_ascii=False, allow_nan=False, separators=(",", ":"))]
    elif body.include_usage:
        yield [answer.usage_chunk(usage)]
