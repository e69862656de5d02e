"""docs/openai-fields.md against the schema, OpenAI's own package, and what the server does with each field."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Required

import pytest
from fake_engine import tiny_info
from http_server import RunningServer, says, serve
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
from pydantic import BaseModel
from typing_extensions import get_type_hints, is_typeddict

from dspark.server.prompts import ChatSettings
from dspark.server.schemas import ChatCompletionRequest

DOCS = Path(__file__).resolve().parents[2] / "docs" / "openai-fields.md"
CLOSED = ("accepted", "refused", "empty", "absent")
"""What a field with such a status holds is not listed."""
TOOL = {"type": "function", "function": {"name": "add"}}
SAID = '<think>Hm.</think>So.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


@dataclass(frozen=True)
class Row:
    field: str
    status: str
    here: str


def table(title: str) -> dict[str, Row]:
    section = DOCS.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| `([^`]+)` \| (\w+) \| (.*?) ?\|$", section, re.MULTILINE)
    rows = {field: Row(field, status, here) for field, status, here in found}
    assert len(rows) == len(found) == section.count("\n| `"), "a row is malformed or comes twice"
    return rows


def fields(kind: Any, path: str = "", within: tuple[Any, ...] = ()) -> Iterator[str]:
    """Dotted paths of everything in a TypedDict or a pydantic model, `[]` for the items of a list."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Required, NotRequired, typing.Annotated):
        yield from fields(arguments[0], path, within)
    elif is_typeddict(kind) or (isinstance(kind, type) and issubclass(kind, BaseModel)):
        hints = get_type_hints(kind) if is_typeddict(kind) else _model_fields(kind)
        for name, inner in hints.items():
            yield (where := f"{path}.{name}" if path else name)
            if kind not in within:
                yield from fields(inner, where, (*within, kind))
    elif origin is not None and origin not in (dict, typing.Literal):
        items = "" if origin in (typing.Union, types.UnionType) else "[]"
        for argument in arguments:
            yield from fields(argument, path + items, within)


def _model_fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def listed(field: str, rows: dict[str, Row]) -> bool:
    inside = any(field.startswith((row.field + ".", row.field + "[")) and row.status in CLOSED for row in rows.values())
    return field in rows or inside


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    settings = ChatSettings(reasoning_parser="think")
    with serve(folder, says(folder, SAID), info=tiny_info(max_model_len=4096), chat=settings) as running:
        yield running


@pytest.mark.parametrize(
    ("title", "openai"),
    [("Request", CompletionCreateParamsStreaming), ("Answer", ChatCompletion), ("Chunk", ChatCompletionChunk)],
)
def test_every_field_that_openai_knows_is_listed_and_others_are_called_extensions(title: str, openai: Any) -> None:
    rows = table(title)
    known = set(fields(openai))
    assert len(known) > 80
    usage = {
        field: row for field, row in table("Answer").items() if field.startswith("usage.")
    }  # a chunk's is the same
    assert [field for field in known if not listed(field, usage | rows)] == []
    ours = {row.field for row in rows.values() if row.status == "extension"}
    assert ours & known == set()
    # OpenAI's client sends these two back, though its types do not say so; a type may be a bare object
    unsaid = {"messages[].annotations", "messages[].tool_calls[].index"}
    loose = {field for field in rows if field.startswith("tool_choice.allowed_tools.tools[].")}
    assert set(rows) - known - ours <= unsaid | loose


def test_the_schema_has_exactly_the_fields_that_are_not_refused_by_their_absence() -> None:
    rows = table("Request")
    schema = set(fields(ChatCompletionRequest))
    assert schema - set(rows) == set()
    # kinds of parts, calls and choices that the schema knows by their type alone
    by_type = {
        field for field in rows if field.rsplit(".", 1)[-1] in ("image_url", "input_audio", "file", "custom", "refusal")
    }
    assert set(rows) - schema <= by_type


@pytest.mark.parametrize("row", [row for row in table("Request").values() if row.status == "refused"], ids=str)
def test_what_is_refused_is_refused_by_name(server: RunningServer, row: Row) -> None:
    example, param = re.match(r"`(\{.*\})` → 400, `([^`]+)`", row.here).groups()
    response = server.chat(**json.loads(example))
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)


@pytest.mark.parametrize("row", [row for row in table("Request").values() if row.status == "accepted"], ids=str)
def test_what_is_accepted_does_no_harm(server: RunningServer, row: Row) -> None:
    response = server.chat(**json.loads(re.match(r"`(\{.*\})`", row.here)[1]))
    assert response.status_code == 200, response.text


def keys(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (where := f"{path}.{name}" if path else name), inner
            yield from keys(inner, where)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner, f"{path}[]")


def check(title: str, answers: list[dict[str, Any]]) -> None:
    rows = table(title)
    seen = {name for answer in answers for name, _ in keys(answer) if not name.startswith("usage.speculation.")}
    assert seen == {row.field for row in rows.values() if row.status != "absent"}
    empty = {row.field for row in rows.values() if row.status == "empty"}
    held = [value for answer in answers for name, value in keys(answer) if name in empty]
    assert all(value in (None, [], 0) for value in held)


def test_an_answer_holds_what_is_listed_and_nothing_else(server: RunningServer) -> None:
    check("Answer", [server.chat(tools=[TOOL], logprobs=True, top_logprobs=1).json()])


def test_the_chunks_hold_what_is_listed_and_nothing_else(server: RunningServer) -> None:
    response = server.chat(
        tools=[TOOL], logprobs=True, top_logprobs=1, stream=True, stream_options={"include_usage": True}
    )
    sent = [line.partition("data: ")[2] for line in response.text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(data) for data in sent]
    details = [name for name in table("Answer") if name.startswith("usage.")]
    assert {name for name, _ in keys(chunks[-1]) if name.startswith("usage.")} >= {
        name for name in details if table("Answer")[name].status != "absent"
    }
    check("Chunk", [*chunks[:-1], chunks[-1] | {"usage": None}])
