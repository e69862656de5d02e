"""What `/openapi.json` says beside what FastAPI finds out by itself.

Bodies are read by hand, so that every refusal has OpenAI's shape; here they are described from the same schemas that
check them, and the errors from the same table that answers them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from dspark.server.errors import ERROR_TABLE
from dspark.server.schemas import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from dspark.server.sse import DONE

Schema = dict[str, Any]

BODIES = (ChatCompletionRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
REFS = "#/components/schemas/{model}"

TEXT: Schema = {"type": "string"}
TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
COUNT: Schema = {"type": "integer", "minimum": 0}
ANYTHING: Schema = {}


def _object(**properties: Schema) -> Schema:
    """All of them are always there; more may be."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _ref(name: str) -> Schema:
    return {"$ref": REFS.format(model=name)}


def _one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def _completion(kind: str, choice: Schema) -> Schema:
    return _object(
        id=TEXT,
        object=_one_of(kind),
        created=COUNT,
        model=TEXT,
        system_fingerprint=TEXT,
        choices=_list(choice),
        usage=_ref("Usage"),
    )


def _chunk(kind: str, choice: Schema) -> Schema:
    """`usage` is there when asked for: null up to the last chunk, which has no choices."""
    return _object(
        id=TEXT, object=_one_of(kind), created=COUNT, model=TEXT, system_fingerprint=TEXT, choices=_list(choice)
    )


def _event(chunk: str) -> Schema:
    """A stream is chunks, then [DONE]; or an error, the one event without an id."""
    content = {"anyOf": [_ref(chunk), _ref("Error")]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    event = _object(data={"anyOf": [{"const": DONE}, data]})
    event["properties"]["id"] = TEXT
    return event


FINISH_REASON = _one_of("stop", "length", "tool_calls")
FINISH_REASON_OR_NULL = {"enum": ["stop", "length", "tool_calls", None]}
CHAT_MESSAGE = _object(role=_one_of("assistant"), content=TEXT_OR_NULL, refusal=TEXT_OR_NULL)
ANSWERS: dict[str, Schema] = {
    "Error": _object(error=_object(message=TEXT, type=TEXT, param=TEXT_OR_NULL, code=TEXT_OR_NULL)),
    "Usage": _object(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT),
    "ChatCompletion": _completion(
        "chat.completion",
        _object(index=COUNT, message=CHAT_MESSAGE, logprobs=ANYTHING, finish_reason=FINISH_REASON),
    ),
    "ChatCompletionChunk": _chunk(
        "chat.completion.chunk",
        _object(index=COUNT, delta={"type": "object"}, logprobs=ANYTHING, finish_reason=FINISH_REASON_OR_NULL),
    ),
    "Completion": _completion(
        "text_completion", _object(index=COUNT, text=TEXT, logprobs=ANYTHING, finish_reason=FINISH_REASON)
    ),
    "CompletionChunk": _chunk(
        "text_completion", _object(index=COUNT, text=TEXT, logprobs=ANYTHING, finish_reason=FINISH_REASON_OR_NULL)
    ),
    "Model": _object(id=TEXT, object=_one_of("model"), created=COUNT, owned_by=TEXT, max_model_len=COUNT),
    "ModelList": _object(object=_one_of("list"), data=_list(_ref("Model"))),
    "Tokens": _object(count=COUNT, max_model_len=COUNT, tokens=_list(COUNT), token_strs=ANYTHING),
    "Detokenized": _object(prompt=TEXT),
    "Health": _object(status=TEXT),
    "Version": _object(version=TEXT),
}

KEY_HEADERS: list[Schema] = [
    {
        "name": name,
        "in": "header",
        "required": False,
        "description": description,
        "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!#-~]+$"},
    }
    for name, description in {
        "Idempotency-Key": "The same request with the same key is computed once.",
        "Last-Event-ID": "Resumes the stream of the same Idempotency-Key after this event.",
    }.items()
]


def describe(
    answer: str, *, body: type[BaseModel] | None = None, errors: Sequence[int] = (), generates: bool = False
) -> dict[str, Any]:
    """Arguments of a route's decorator. answer: a name in ANSWERS. errors: statuses beside those of every route.

    generates: it streams on request, and knows idempotency keys.
    """
    responses: dict[int | str, dict[str, Any]] = {200: {"description": answer, "content": _json(_ref(answer))}}
    statuses = {
        *errors,
        *((400, 401, 404, 413) if body else ()),
        *((409, 422, 429, 500, 503, 504) if generates else ()),
    }
    for status in sorted(statuses):
        codes = dict.fromkeys(row.code for row in ERROR_TABLE.values() if row.status == status)
        responses[status] = {"description": " | ".join(filter(None, codes)), "content": _json(_ref("Error"))}
    responses["default"] = {"description": "Any other error", "content": _json(_ref("Error"))}
    extra: dict[str, Any] = {}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": _json(_ref(body.__name__))}
    if generates:
        extra["parameters"] = KEY_HEADERS
        responses[200]["content"]["text/event-stream"] = {"itemSchema": _event(f"{answer}Chunk")}
        responses[204] = {"description": "The event of Last-Event-ID was the stream's last"}
    if body is not None or 401 in errors:
        extra["security"] = [{}, {"key": []}]
    return {"responses": responses, "openapi_extra": extra}


def unhealthy() -> dict[str, Any]:
    """Arguments of the decorator of a health check."""
    content = _json(_ref("Health"))
    return {
        "responses": {200: {"description": "Yes", "content": content}, 503: {"description": "No", "content": content}}
    }


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of the application."""
    # 3.2 is the first that can describe the events of a stream
    made = get_openapi(title=app.title, version=app.version, openapi_version="3.2.0", routes=app.routes)
    _, defined = models_json_schema([(body, "validation") for body in BODIES], ref_template=REFS)
    components = made.setdefault("components", {})
    components["schemas"] = defined["$defs"] | ANSWERS
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return made
