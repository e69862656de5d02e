"""One short function per endpoint: check, translate, submit, answer."""

from __future__ import annotations

import time
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError

from dspark.server.answering import Asked, respond
from dspark.server.deadlines import request_deadline
from dspark.server.errors import BodyTooLargeError, from_validation
from dspark.server.generation import Generation
from dspark.server.identity import Identity
from dspark.server.openapi import describe, unhealthy
from dspark.server.prompts import off_loop_if_large
from dspark.server.schemas import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from dspark.server.service import Service
from dspark.server.translate import Answer, ChatAnswer, CompletionAnswer

Body = TypeVar("Body", bound=BaseModel)

DISCARDED_BODIES = 8
"""A body too large is read and dropped up to so many times the limit: to close a connection whose client is still
sending would destroy the answer on its way."""


ENGINE_NAMES = {"max_draft_tokens": "speculation.max_draft_tokens"}
"""The client's names of the engine's parameters, where they differ."""


def make_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", **describe("ChatCompletion", body=ChatCompletionRequest, generates=True))
    async def chat_completions(request: Request) -> Response:
        tenant = service.api_keys.tenant(request)
        data = await read_bytes(request, service.settings.max_body_bytes)
        body = await parse(data, ChatCompletionRequest)
        arrived_s = time.monotonic()
        service.check_model(body.model)
        deadline_s = request_deadline(request.headers, body.timeout, service.settings.timeouts, arrived_s)
        names = ENGINE_NAMES | {"prompt_token_ids": "messages", "logprobs": "top_logprobs"}
        if body.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"

        async def begin(identity: Identity) -> tuple[Generation, Answer]:
            service.check_admission("chat_completions", tenant)
            prompts = await service.prompts.chat(body, tenant, identity.seed)
            generation = Generation(
                service.engine,
                service.metrics.requests,
                prompts,
                endpoint="chat_completions",
                param_names=names,
                arrived_s=arrived_s,
                deadline_s=deadline_s,
            )
            return generation, ChatAnswer(
                identity, body.model, service.fingerprint, service.text.vocabulary, include_usage=body.include_usage
            )

        asked = Asked(request, tenant, "chat_completions", data, body, ChatAnswer, begin)
        return await respond(service, asked)

    @router.post("/v1/completions", **describe("Completion", body=CompletionRequest, generates=True))
    async def completions(request: Request) -> Response:
        tenant = service.api_keys.tenant(request)
        data = await read_bytes(request, service.settings.max_body_bytes)
        body = await parse(data, CompletionRequest)
        arrived_s = time.monotonic()
        service.check_model(body.model)
        deadline_s = request_deadline(request.headers, body.timeout, service.settings.timeouts, arrived_s)

        async def begin(identity: Identity) -> tuple[Generation, Answer]:
            service.check_admission("completions", tenant)
            prompts = await service.prompts.completions(body, tenant, identity.seed)
            generation = Generation(
                service.engine,
                service.metrics.requests,
                prompts,
                endpoint="completions",
                param_names=ENGINE_NAMES | {"prompt_token_ids": "prompt"},
                arrived_s=arrived_s,
                deadline_s=deadline_s,
            )
            return generation, CompletionAnswer(
                identity, body.model, service.fingerprint, service.text.vocabulary, include_usage=body.include_usage
            )

        asked = Asked(request, tenant, "completions", data, body, CompletionAnswer, begin)
        return await respond(service, asked)

    @router.post("/tokenize", **describe("Tokens", body=TokenizeRequest))
    async def tokenize(request: Request) -> JSONResponse:
        service.api_keys.tenant(request)
        body = await read_body(request, TokenizeRequest, service.settings.max_body_bytes)
        service.check_model(body.model or service.settings.served_model_name)
        token_ids = await service.prompts.tokenize(body)
        texts = (
            [service.text.vocabulary.token_text(token_id) for token_id in token_ids] if body.return_token_strs else None
        )
        limit = service.engine.info.max_model_len
        return JSONResponse({"count": len(token_ids), "max_model_len": limit, "tokens": token_ids, "token_strs": texts})

    @router.post("/detokenize", **describe("Detokenized", body=DetokenizeRequest))
    async def detokenize(request: Request) -> JSONResponse:
        service.api_keys.tenant(request)
        body = await read_body(request, DetokenizeRequest, service.settings.max_body_bytes)
        service.check_model(body.model or service.settings.served_model_name)
        return JSONResponse({"prompt": await service.prompts.detokenize(body.tokens)})

    @router.get("/v1/models", **describe("ModelList", errors=(401,)))
    async def models(request: Request) -> JSONResponse:
        service.api_keys.tenant(request)
        return JSONResponse({"object": "list", "data": [model_card(service)]})

    @router.get("/v1/models/{model:path}", **describe("Model", errors=(401, 404)))
    async def model(request: Request, model: str) -> JSONResponse:
        service.api_keys.tenant(request)
        service.check_model(model)
        return JSONResponse(model_card(service))

    @router.get("/health", **unhealthy())
    @router.get("/health/ready", **unhealthy())
    async def health() -> JSONResponse:
        return JSONResponse({"status": service.state}, 200 if service.state == "ready" else 503)

    @router.get("/health/live", **unhealthy())
    async def live() -> JSONResponse:
        return JSONResponse({"status": "live" if service.live else "stalled"}, 200 if service.live else 503)

    @router.get("/version", **describe("Version"))
    async def dspark_version() -> JSONResponse:
        return JSONResponse({"version": version("dspark-server")})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics_page(), headers={"content-type": CONTENT_TYPE_LATEST})

    return router


async def read_body(request: Request, schema: type[Body], limit_bytes: int) -> Body:
    """Raises BodyTooLargeError, and InvalidRequestError for what the schema refuses."""
    return await parse(await read_bytes(request, limit_bytes), schema)


async def read_bytes(request: Request, limit_bytes: int) -> bytes:
    """The request's body. Raises BodyTooLargeError."""
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
    return bytes(data)


async def parse(data: bytes, schema: type[Body]) -> Body:
    """Raises InvalidRequestError for what the schema refuses."""
    try:
        return await off_loop_if_large(len(data), partial(schema.model_validate_json, data))
    except ValidationError as error:
        raise from_validation(error) from error


def model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.served_model_name,
        "object": "model",
        "created": service.created_unix_s,
        "owned_by": "dspark",
        "max_model_len": service.engine.info.max_model_len,
    }
