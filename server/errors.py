"""Every error a client can see: one table from exception class to status and OpenAI error body.

The same table serves JSON answers and the last event of a stream, so a failure reads alike in both.
Source of the shape: OpenAI API reference, "Error codes" (`{"error": {message, type, param, code}}`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dspark.engine import (
    ContextLengthError,
    DeadlineExceededError,
    EngineClosedError,
    EngineError,
    EngineFailedError,
    GrammarError,
    QueueFullError,
    RequestError,
)

CLIENT_CLOSED_REQUEST = 499
"""What the log and the metrics call an answer that nobody waited for; nginx's number."""
RETRY_AFTER_S = 1
"""What a refused client is told to wait where nothing better is known."""


class ApiError(Exception):
    """Root of the errors found by the server itself, before the engine saw anything."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequestError(ApiError):
    """A field is missing, unknown, mistyped or out of range; `param` is its path, e.g. `messages[0].role`."""


class UnknownArgumentError(InvalidRequestError):
    """A field that no such request has."""


class MissingArgumentError(InvalidRequestError):
    """A required field is absent."""


class AuthenticationError(ApiError):
    """No API key, or not one of ours."""


class ModelNotFoundError(ApiError):
    """The request names a model that this server does not serve."""


class BodyTooLargeError(ApiError):
    """The request body has more bytes than the server reads."""


class IdempotencyConflictError(ApiError):
    """The idempotency key belongs to a request with another body."""


class InProgressElsewhereError(ApiError):
    """Another replica computes the answer to this idempotency key."""


class IdempotencyStoreError(ApiError):
    """Whether the request of this idempotency key was done before cannot be told."""


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """`kind` is the label of `request_errors_total`; `type` and `code` are OpenAI's."""

    status: int
    type: str
    code: str | None
    kind: str
    headers: dict[str, str] = field(default_factory=dict)


_RETRY = {"retry-after": str(RETRY_AFTER_S)}
UNEXPECTED = ErrorRow(500, "server_error", "internal_error", "internal")
ERROR_TABLE: dict[type[Exception], ErrorRow] = {
    InvalidRequestError: ErrorRow(400, "invalid_request_error", "invalid_value", "invalid_request"),
    UnknownArgumentError: ErrorRow(400, "invalid_request_error", "unknown_parameter", "invalid_request"),
    MissingArgumentError: ErrorRow(400, "invalid_request_error", "missing_required_parameter", "invalid_request"),
    AuthenticationError: ErrorRow(
        401, "invalid_request_error", "invalid_api_key", "auth", {"www-authenticate": "Bearer"}
    ),
    ModelNotFoundError: ErrorRow(404, "invalid_request_error", "model_not_found", "not_found"),
    BodyTooLargeError: ErrorRow(413, "invalid_request_error", "request_too_large", "too_large"),
    IdempotencyConflictError: ErrorRow(422, "invalid_request_error", "idempotency_key_reused", "conflict"),
    InProgressElsewhereError: ErrorRow(409, "invalid_request_error", "idempotency_key_in_progress", "conflict", _RETRY),
    IdempotencyStoreError: ErrorRow(503, "server_error", "idempotency_store_unavailable", "unavailable", _RETRY),
    RequestError: ErrorRow(400, "invalid_request_error", "invalid_value", "invalid_request"),
    ContextLengthError: ErrorRow(400, "invalid_request_error", "context_length_exceeded", "context_length"),
    QueueFullError: ErrorRow(429, "rate_limit_error", "rate_limit_exceeded", "overloaded"),
    # clients' libraries would send a 504 again by themselves, for an answer that nobody waits for any more
    DeadlineExceededError: ErrorRow(504, "timeout_error", "deadline_exceeded", "timeout", {"x-should-retry": "false"}),
    EngineClosedError: ErrorRow(503, "server_error", "service_unavailable", "unavailable", _RETRY),
    GrammarError: ErrorRow(400, "invalid_request_error", "invalid_value", "invalid_request"),
    EngineFailedError: ErrorRow(500, "server_error", "engine_failed", "internal"),
    EngineError: UNEXPECTED,
}
ERROR_KINDS = tuple(dict.fromkeys(row.kind for row in ERROR_TABLE.values()))


def error_row(error: Exception) -> ErrorRow:
    """The table's row of the error's class or its nearest ancestor."""
    for cls in type(error).__mro__:
        if cls in ERROR_TABLE:
            return ERROR_TABLE[cls]
    return UNEXPECTED


def error_headers(error: Exception) -> dict[str, str]:
    """The row's, and for a full queue how long it will take for what is in it."""
    if isinstance(error, QueueFullError):
        return {"retry-after": str(error.retry_after_s)}
    return error_row(error).headers


def error_body(error: Exception) -> dict[str, Any]:
    """OpenAI's error body. The text of an error the table does not name, and of a failed step, stays in the log."""
    row = error_row(error)
    if row is UNEXPECTED:
        message = "The server had an error while processing your request; the operator finds it in the log."
    elif isinstance(error, EngineFailedError):
        message = "A step of the engine failed while your request was in it; the operator finds the cause in the log."
    else:
        message = str(error)
    return _body(message, row.type, getattr(error, "param", None), row.code)


def _body(message: str, type_: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def add_error_handlers(app: FastAPI, count: Callable[[str], None]) -> None:
    """Answer every exception in OpenAI's shape. count: is told the kind of each."""

    async def from_table(_: Request, error: Exception) -> JSONResponse:
        row = error_row(error)
        count(row.kind)
        return JSONResponse(error_body(error), row.status, error_headers(error))

    async def from_router(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        path = request.url.path
        if error.status_code == 405:
            kind, code, message = "invalid_request", "method_not_allowed", f"{request.method} is not allowed on {path}"
        else:
            kind, code, message = "not_found", "unknown_url", f"Unknown request URL: {request.method} {path}"
        count(kind)
        return JSONResponse(_body(message, "invalid_request_error", None, code), error.status_code, error.headers)

    async def nobody(_: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    for cls in (ApiError, EngineError, Exception):
        app.add_exception_handler(cls, from_table)
    app.add_exception_handler(HTTPException, from_router)
    app.add_exception_handler(ClientDisconnect, nobody)


def from_validation(error: ValidationError) -> InvalidRequestError:
    """The first problem pydantic found, as one sentence naming field, limit and given value."""
    first = error.errors(include_url=False)[0]
    kind, message, value = first["type"], first["msg"], first["input"]
    param = _path(first["loc"])
    if kind == "json_invalid":
        return InvalidRequestError(f"The body is not valid JSON: {message.removeprefix('Invalid JSON: ')}")
    if kind == "extra_forbidden":
        return UnknownArgumentError(f"Unrecognized request argument supplied: {param}", param)
    if kind == "missing":
        return MissingArgumentError(f"Missing required parameter: '{param}'", param)
    if kind == "field_absent":
        param = _path((*first["loc"], first["ctx"]["param"]))
        return MissingArgumentError(f"Missing required parameter: '{param}'", param)
    if kind == "fields_conflict":
        param = _path((*first["loc"], first["ctx"]["param"]))
        return InvalidRequestError(f"Invalid use of '{param}': {message}", param)
    if kind == "not_supported":
        return InvalidRequestError(f"'{param}' is not supported: {message}", param)
    if not param:
        return InvalidRequestError(f"The body must be a JSON object, but {_shown(value)} was given")
    message = message.removeprefix("Value error, ").replace("Input should", "should")
    return InvalidRequestError(f"Invalid value for '{param}': {message}, but {_shown(value)} was given", param)


def _path(loc: Sequence[int | str]) -> str:
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            path += f".{step}" if path else step
    return path


def _shown(value: Any, limit: int = 80) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    if len(text) <= limit:
        return text
    size = f"{len(value)} {'characters' if isinstance(value, str) else 'items'}" if isinstance(value, Sized) else "long"
    return f"{text[:limit]}… ({size})"
