"""The JSON-schema run on a tiny random model: every claim of it must hold there too, and an answer that breaks one is seen."""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from http_server import run_service
from jsonschema import Draft202012Validator
from tiny_models import write_tiny_model

from dspark.benchmarks import json_schemas
from dspark.benchmarks.json_schemas import SCHEMAS, TOOLS, Answer, judge, read_answer, schema_requests, tool_requests
from dspark.engine import Engine, EngineConfig
from dspark.server.service import ServerSettings, Service
from dspark.server.text import ModelText

GOOD = Answer("person", "stop", "{}", None, 10, verified=5, accepted=3)
PLAIN = replace(GOOD, verified=0, accepted=0)
CALL = replace(GOOD, kind="required", finish_reason="tool_calls")


@pytest.mark.parametrize("schema", [*(schema for _, schema in SCHEMAS.values()), *TOOLS.values()])
def test_the_schemas_are_schemas(schema: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(schema)


@pytest.mark.slow
def test_every_claim_holds_on_a_model_with_random_weights(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=8192)
    config = EngineConfig(
        model=str(folder), cache_dir=tmp_path, dtype="float32", threads=1, max_num_seqs=8, kv_cache_bytes=32 << 20
    )
    service = Service(Engine.load(config), ModelText.load(folder), ServerSettings("tiny"))
    with run_service(service) as url:
        args = argparse.Namespace(requests=20, tool_requests=6, concurrency=8)
        schemas, plain, tools = asyncio.run(json_schemas.measure(args, url))
    assert {answer.kind for answer in schemas} == set(SCHEMAS)
    claims = judge(schemas, plain, tools)
    # such a model does not know when to end a string, a number or a list of calls
    assert [
        claim for claim in claims if not claim.holds and "end" not in claim.text and "calls" not in claim.text
    ] == []
    assert sum(answer.complete for answer in schemas) > 5
    assert sum(answer.finish_reason == "tool_calls" for answer in tools) > 0
    assert all(answer.fault is None for answer in [*schemas, *tools])


def test_requests_take_turns_and_repeat_with_their_number() -> None:
    asked = schema_requests(2 * len(SCHEMAS))
    assert [one.kind for one in asked] == 2 * list(SCHEMAS)
    assert [one.body["seed"] for one in asked] == list(range(len(asked)))
    assert asked[3].plain().body == asked[3].body | {"speculation": {"mode": "off"}}
    named = [one.body["tool_choice"]["function"]["name"] for one in tool_requests(12) if one.kind == "named"]
    assert named == 2 * list(TOOLS)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"name": "A", "age": 3, "role": "admin"}', None),
        ('{"name": "A", "age": 3', "Expecting"),
        ('{"name": "A", "age": 300, "role": "admin"}', "300 is greater than"),
        ('{"name": "A", "role": "admin"}', "'age' is a required property"),
    ],
)
def test_what_does_not_keep_to_its_schema_is_seen(content: str, fault: str | None) -> None:
    answer = read_answer(schema_requests(1)[0], chat_answer({"content": content}, "stop"))
    assert answer.fault is None if fault is None else fault in str(answer.fault)


@pytest.mark.parametrize(
    ("name", "arguments", "fault"),
    [
        ("get_weather", {"city": "Rome", "unit": "celsius"}, None),
        ("get_weather", {"city": "Rome", "unit": "kelvin"}, "'kelvin' is not one of"),
        ("send_message", {"to": ["Ada"], "message": "Hi"}, "a call of 'send_message'"),
    ],
)
def test_what_is_no_valid_call_is_seen(name: str, arguments: dict[str, Any], fault: str | None) -> None:
    call = {"function": {"name": name, "arguments": json.dumps(arguments)}}
    answer = read_answer(tool_requests(2)[1], chat_answer({"content": None, "tool_calls": [call]}, "tool_calls"))
    assert answer.fault is None if fault is None else fault in str(answer.fault)


def chat_answer(message: dict[str, Any], finish_reason: str) -> dict[str, Any]:
    usage = {"completion_tokens": 9, "speculation": {"verified": 4, "accepted": 2}}
    return {"choices": [{"message": message, "finish_reason": finish_reason}], "usage": usage}


@pytest.mark.parametrize(
    ("schemas", "plain", "tools", "failed"),
    [
        ([GOOD], [PLAIN], [CALL], None),
        ([replace(GOOD, fault="bad")], [replace(PLAIN, fault="bad")], [CALL], "parse and validate"),
        ([GOOD, replace(GOOD, finish_reason="length")], [PLAIN, replace(PLAIN, finish_reason="length")], [CALL], "95%"),
        ([replace(GOOD, accepted=0)], [PLAIN], [CALL], "drafts are accepted"),
        ([GOOD], [replace(PLAIN, text="[]")], [CALL], "the same without"),
        ([GOOD], [GOOD], [CALL], "nothing is verified"),
        ([GOOD], [PLAIN], [replace(CALL, finish_reason="length")], "calls are valid"),
    ],
)
def test_each_claim_can_fail(schemas: list[Answer], plain: list[Answer], tools: list[Answer], failed: str) -> None:
    broken = [claim.text for claim in judge(schemas, plain, tools) if not claim.holds]
    assert len(broken) == (0 if failed is None else 1)
    assert failed is None or failed in broken[0]
