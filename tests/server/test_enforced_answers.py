"""What a grammar enforces holds with any model: here one with random weights, sampled at temperature 1, speculating."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from http_server import run_service
from openai import OpenAI
from pydantic import BaseModel
from tiny_models import write_tiny_model

from dspark.engine import Engine, EngineConfig
from dspark.server.service import ServerSettings, Service
from dspark.server.text import ModelText

MODEL = "tiny"
USER = [{"role": "user", "content": "abcabcabcabc"}]
COLOUR = {"type": "string", "enum": ["red", "green", "blue"]}
PAINT = {"type": "object", "properties": {"colour": COLOUR, "coats": {"$ref": "#/$defs/few"}}, "required": ["colour"]}
TOOLS = [
    {"type": "function", "function": {"name": "paint", "parameters": PAINT | {"$defs": {"few": {"enum": [1, 2]}}}}},
    {"type": "function", "function": {"name": "stop-now"}},
]


@dataclass
class RealServer:
    engine: Engine
    openai: OpenAI
    http: httpx.Client

    def chat(self, **fields: Any) -> dict[str, Any]:
        body = {"model": MODEL, "messages": USER, "max_tokens": 300} | fields
        response = self.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)
    config = EngineConfig(
        model=str(folder),
        cache_dir=tmp_path_factory.mktemp("cache"),
        dtype="float32",
        threads=1,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        kv_cache_bytes=4 << 20,
        num_speculative_tokens=5,
    )
    engine = Engine.load(config)
    service = Service(engine, ModelText.load(folder), ServerSettings(MODEL))
    with run_service(service) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60)
        with httpx.Client(base_url=url, timeout=60) as http:
            yield RealServer(engine, client, http)
            assert engine.gauges().blocks_used == 0, "a block leaked"


def check_call(call: dict[str, Any]) -> str:
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "paint":
        assert arguments.pop("colour") in COLOUR["enum"]
        assert arguments in ({}, {"coats": 1}, {"coats": 2})
    else:
        assert arguments == {}
    return call["function"]["name"]


def test_required_calls_are_always_valid(server: RealServer) -> None:
    names = set()
    for seed in range(20):
        choice = server.chat(tools=TOOLS, tool_choice="required", seed=seed)["choices"][0]
        assert choice["message"]["content"] is None
        if choice["finish_reason"] == "length":  # sixteen calls may be more than 300 of this model's tokens
            choice["message"]["tool_calls"].pop()
        else:
            assert choice["finish_reason"] == "tool_calls"
        names |= {check_call(call) for call in choice["message"]["tool_calls"]}
    assert names == {"paint", "stop-now"}


@pytest.mark.parametrize("fields", [{}, {"tool_choice": {"type": "function", "function": {"name": "paint"}}}])
def test_one_call_is_one_call(server: RealServer, fields: dict[str, Any]) -> None:
    for seed in range(10):
        request = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": seed} | fields
        choice = server.chat(**request)["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        [call] = choice["message"]["tool_calls"]
        assert check_call(call) == "paint" or not fields


def test_the_same_calls_come_without_speculation_and_in_a_stream(server: RealServer) -> None:
    request = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": 3}
    said = server.chat(**request)
    plain = server.chat(**request, speculation={"mode": "off"})
    assert said["usage"]["speculation"]["verified"] > 0
    assert plain["usage"]["speculation"]["verified"] == 0
    [call], [plain_call] = (answer["choices"][0]["message"]["tool_calls"] for answer in (said, plain))
    assert call["function"] == plain_call["function"]
    with server.openai.chat.completions.stream(model=MODEL, messages=USER, max_tokens=300, **request) as stream:
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == call["function"]["arguments"]


class Painting(BaseModel):
    colour: str
    coats: int


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_json_schema_holds_also_beside_tools(server: RealServer, tools: Any) -> None:
    schema = {**PAINT, "$defs": TOOLS[0]["function"]["parameters"]["$defs"], "additionalProperties": False}
    response_format = {"type": "json_schema", "json_schema": {"name": "paint", "schema": schema, "strict": True}}
    kinds = set()
    for seed in range(12):
        choice = server.chat(tools=tools, response_format=response_format, seed=seed, parallel_tool_calls=False, n=1)[
            "choices"
        ][0]
        kinds.add(choice["finish_reason"])
        if choice["finish_reason"] == "stop":
            assert json.loads(choice["message"]["content"])["colour"] in COLOUR["enum"]
        else:
            check_call(choice["message"]["tool_calls"][0])
    assert kinds == ({"stop"} if tools is None else {"stop", "tool_calls"})


def test_the_parse_helper_of_openais_client_gets_its_model(server: RealServer) -> None:
    class Colour(BaseModel):
        warm: bool

    completion = server.openai.chat.completions.parse(model=MODEL, messages=USER, response_format=Colour, seed=1)
    assert isinstance(completion.choices[0].message.parsed, Colour)


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        ({"regex": "[ab]{3}-[0-9]"}, "[ab]{3}-[0-9]"),
        ({"choice": ["yes.", "no (never)"]}, r"yes\.|no \(never\)"),
        ({"grammar": 'start: "x" "y"~2'}, "xyy"),
        ({"grammar": 'start: "<" /[0-9]{2}/ ">"'}, "<[0-9]{2}>"),
        ({"json": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
                   "additionalProperties": False}}, r'\{"a": [12]\}'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_structured_outputs_hold_on_both_endpoints(
    server: RealServer, structure: dict[str, Any], pattern: str, path: str
) -> None:
    prompt = {"messages": USER} if "chat" in path else {"prompt": "ab"}
    body = {"model": MODEL, "max_tokens": 60, "structured_outputs": structure, "n": 3} | prompt
    response = server.http.post(path, json=body)
    assert response.status_code == 200, response.text
    for choice in response.json()["choices"]:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert choice["finish_reason"] == "stop"
        assert re.fullmatch(pattern, text)


def test_json_objects_need_no_word_of_json_in_the_messages(server: RealServer) -> None:
    choice = server.chat(response_format={"type": "json_object"}, seed=5, max_tokens=200)["choices"][0]
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    assert choice["message"]["content"].startswith("{")


def test_a_prediction_changes_the_usage_and_not_the_text(server: RealServer) -> None:
    request = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
    said = server.chat(**request)
    text = said["choices"][0]["message"]["content"]
    predicted = server.chat(**request, prediction={"type": "content", "content": [{"type": "text", "text": text}]})
    assert predicted["choices"][0]["message"]["content"] == text
    assert predicted["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 0
    useless = server.chat(**request, prediction={"type": "content", "content": "zzzz"})
    assert useless["choices"][0]["message"]["content"] == text


def test_speculation_can_be_capped_and_a_cap_beyond_the_engines_is_refused_by_its_name(server: RealServer) -> None:
    assert server.chat(speculation={"max_draft_tokens": 0})["usage"]["speculation"]["verified"] == 0
    body = {"model": MODEL, "messages": USER, "speculation": {"max_draft_tokens": 6}}
    error = server.http.post("/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == "speculation.max_draft_tokens"
    assert "5" in error["message"]
