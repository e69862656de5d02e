"""One short function per endpoint: check, translate, submit, answer."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError

from dspark.engine import EngineError
from dspark.server.errors import BodyTooLargeError, error_row, from_validation
from dspark.server.generation import Generation
from dspark.server.schemas import ChatCompletionRequest, CompletionRequest
from dspark.server.service import Service, off_loop_if_large
from dspark.server.sse import EventStream, unless_disconnected
from dspark.server.translate import Answer, ChatAnswer, CompletionAnswer

Body = TypeVar("Body", bound=BaseModel)

DISCARDED_BODIES = 8
"""A body too large is read and dropped up to so many times the limit: to close a connection whose client is still
sending would destroy the answer on its way."""


def make_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        tenant = service.api_keys.tenant(request)
        body = await read_body(request, ChatCompletionRequest, service.settings.max_body_bytes)
        arrived_s = time.monotonic()
        service.check_model(body.model)
        prompts = await service.chat_prompts(body, tenant)
        names = {"prompt_token_ids": "messages", "logprobs": "top_logprobs"}
        if body.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        generation = Generation(
            service.engine,
            service.metrics.requests,
            prompts,
            endpoint="chat_completions",
            param_names=names,
            arrived_s=arrived_s,
        )
        answer = ChatAnswer(body.model, service.fingerprint, service.text.vocabulary, include_usage=body.include_usage)
        return await respond(service, request, body, generation, answer)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        tenant = service.api_keys.tenant(request)
        body = await read_body(request, CompletionRequest, service.settings.max_body_bytes)
        arrived_s = time.monotonic()
        service.check_model(body.model)
        prompts = await service.completion_prompts(body, tenant)
        generation = Generation(
            service.engine,
            service.metrics.requests,
            prompts,
            endpoint="completions",
            param_names={"prompt_token_ids": "prompt"},
            arrived_s=arrived_s,
        )
        answer = CompletionAnswer(
            body.model, service.fingerprint, service.text.vocabulary, include_usage=body.include_usage
        )
        return await respond(service, request, body, generation, answer)

    @router.get("/v1/models")
    async def models(request: Request) -> JSONResponse:
        service.api_keys.tenant(request)
        return JSONResponse({"object": "list", "data": [model_card(service)]})

    @router.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> JSONResponse:
        service.api_keys.tenant(request)
        service.check_model(model)
        return JSONResponse(model_card(service))

    @router.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": service.state}, 200 if service.state == "ready" else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics_page(), headers={"content-type": CONTENT_TYPE_LATEST})

    return router


async def read_body(request: Request, schema: type[Body], limit_bytes: int) -> Body:
    """Raises BodyTooLargeError, and InvalidRequestError for what the schema refuses."""
    data = bytearray()
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received <= limit_bytes:
            data += chunk
        elif received > DISCARDED_BODIES * limit_bytes:
            break
    if received > limit_bytes:
        raise BodyTooLargeError(f"The request body has {received} bytes or more; this server reads {limit_bytes}")
    try:
        return await off_loop_if_large(received, partial(schema.model_validate_json, data))
    except ValidationError as error:
        raise from_validation(error) from error


async def respond(
    service: Service,
    request: Request,
    body: ChatCompletionRequest | CompletionRequest,
    generation: Generation,
    answer: Answer,
) -> Response:
    """Run the generation and answer with its chunks or its whole; a client that goes away ends it."""
    if not body.stream:
        complete = await unless_disconnected(request.receive, collect(generation, answer))
        return JSONResponse(complete)

    def failed(error: EngineError) -> None:
        service.metrics.http.error(error_row(error).kind)

    return EventStream(events(service, generation, answer, include_usage=body.include_usage), failed)


async def collect(generation: Generation, answer: Answer) -> dict[str, Any]:
    async with generation, aclosing(generation.pieces()) as pieces:
        collected = [piece async for piece in pieces]
        return answer.complete(collected, generation.usage())


async def events(
    service: Service, generation: Generation, answer: Answer, *, include_usage: bool
) -> AsyncGenerator[list[str], None]:
    with service.metrics.http.stream_open():
        async with generation, aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                chunks = answer.chunks(piece)
                if chunks:
                    yield chunks
            usage = generation.usage()
        if include_usage:
            yield [answer.usage_chunk(usage)]


def model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.served_model_name,
        "object": "model",
        "created": service.created_unix_s,
        "owned_by": "dspark",
        "max_model_len": service.engine.info.max_model_len,
    }
