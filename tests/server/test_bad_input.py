"""One row per rule: what is refused, with which parameter, and that the message names the limit and the given value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import MODEL, RunningServer, says, serve
from openai import BadRequestError

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = {"role": "user", "content": "Hi"}
BODY_LIMIT = 100_000


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    with serve(folder, says(folder, "ok"), max_body_bytes=BODY_LIMIT) as running:
        yield running
        assert running.engine.gauges().blocks_used == 0
        assert running.chat().status_code == 200, "the server keeps serving"


def message(**fields: Any) -> list[dict[str, Any]]:
    return [USER | fields]


def tool(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}} | fields}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def nested(levels: int) -> dict[str, Any]:
    return {"properties": nested(levels - 1)} if levels > 1 else {}


TOOL = tool()
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
ANSWER = {"role": "assistant", "content": "Ho"}

BOTH: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"temperature": -0.1}, "temperature", ["0", "-0.1"]),
    ({"temperature": 2.1}, "temperature", ["2", "2.1"]),
    ({"temperature": "hot"}, "temperature", ["number", "hot"]),
    ({"temperature": "1"}, "temperature", ["number", "1"]),
    ({"top_p": 0}, "top_p", ["greater than 0", "0"]),
    ({"top_p": 1.1}, "top_p", ["1", "1.1"]),
    ({"top_k": -2}, "top_k", ["-1", "-2"]),
    ({"top_k": 1.5}, "top_k", ["integer", "1.5"]),
    ({"min_p": -0.5}, "min_p", ["0", "-0.5"]),
    ({"min_p": 1.5}, "min_p", ["1", "1.5"]),
    ({"seed": 2**63}, "seed", [str(2**63 - 1), str(2**63)]),
    ({"seed": "1"}, "seed", ["integer", '"1"']),
    ({"stop": ""}, "stop[0]", ["1 character", '""']),
    ({"stop": ["a", ""]}, "stop[1]", ["1 character", '""']),
    ({"stop": ["a"] * 17}, "stop", ["16", "17"]),
    ({"stop": 5}, "stop", ["16 strings", "5"]),
    ({"stop": "x" * 257}, "stop[0]", ["256 characters", "xxx"]),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", ["0", "-1"]),
    ({"stop_token_ids": [320]}, "stop_token_ids", ["319", "320"]),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids", ["64", "65"]),
    ({"max_tokens": 0}, "max_tokens", ["1", "0"]),
    ({"max_tokens": True}, "max_tokens", ["integer", "true"]),
    ({"max_tokens": 1e400}, "max_tokens", ["integer", "Infinity"]),
    ({"temperature": float("nan")}, "temperature", ["finite", "NaN"]),
    ({"min_tokens": -1}, "min_tokens", ["0", "-1"]),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", ["5", "4"]),
    ({"ignore_eos": "yes"}, "ignore_eos", ["boolean", "yes"]),
    ({"presence_penalty": 2.5}, "presence_penalty", ["2", "2.5"]),
    ({"presence_penalty": -2.5}, "presence_penalty", ["-2", "-2.5"]),
    ({"frequency_penalty": 3}, "frequency_penalty", ["2", "3"]),
    ({"repetition_penalty": 0}, "repetition_penalty", ["greater than 0", "0"]),
    ({"repetition_penalty": 2.5}, "repetition_penalty", ["2", "2.5"]),
    ({"logit_bias": {"7": 101}}, "logit_bias.7", ["100", "101"]),
    ({"logit_bias": {"7": -101}}, "logit_bias.7", ["-100", "-101"]),
    ({"logit_bias": {"320": 1}}, "logit_bias", ["319", "320"]),
    ({"logit_bias": {"the": 1}}, "logit_bias", ["token ids", "the"]),
    ({"logit_bias": {str(k): 1 for k in range(1025)}}, "logit_bias", ["1024", "1025"]),
    ({"n": 0}, "n", ["1", "0"]),
    ({"n": 17}, "n", ["16", "17"]),
    ({"n": 9}, "n", ["8", "9"]),
    ({"stream": "true"}, "stream", ["boolean", "true"]),
    ({"stream_options": {"include_usage": True}}, "stream_options", ["'stream' is true"]),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", ["Unrecognized"]),
    ({"stream": True, "stream_options": 1}, "stream_options", ["1"]),
    ({"temprature": 1}, "temprature", ["Unrecognized request argument supplied: temprature"]),
    ({"structured_outputs": {}}, "structured_outputs", ["exactly one", "{}"]),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", ["exactly one"]),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", ["not supported"]),
    ({"structured_outputs": {"regex": "a" * 65_537}}, "structured_outputs.regex", ["65536", "aaa"]),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", ["at least 1", "[]"]),
    ({"structured_outputs": {"grammar": "nonsense"}}, "structured_outputs.grammar", ["not supported"]),
    ({"structured_outputs": {"json": nested(65)}}, "structured_outputs.json", ["64", "65"]),
    ({"speculation": {"mode": "fast"}}, "speculation.mode", ["'off'", "fast"]),
    ({"speculation": {"max_draft_tokens": -1}}, "speculation.max_draft_tokens", ["0", "-1"]),
    ({"priority": 101}, "priority", ["100", "101"]),
    ({"model": None}, "model", ["string", "null"]),
    ({"model": ""}, "model", ["1 character", '""']),
]

ONLY_CHAT: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"messages": []}, "messages", ["at least 1", "[]"]),
    ({"messages": "Hi"}, "messages", ["array", "Hi"]),
    ({"messages": ["Hi"]}, "messages[0]", ["Hi"]),
    ({"messages": message(role="robot")}, "messages[0].role", ["'system'", "robot"]),
    ({"messages": message(content=5)}, "messages[0].content", ["string", "5"]),
    ({"messages": message(content=None)}, "messages[0].content", ["Missing required parameter"]),
    ({"messages": message(content=[])}, "messages[0].content", ["at least 1", "[]"]),
    ({"messages": [USER, {"role": "user"}]}, "messages[1].content", ["Missing required parameter"]),
    ({"messages": message(mood="good")}, "messages[0].mood", ["Unrecognized"]),
    ({"messages": message(name="")}, "messages[0].name", ["1 character", '""']),
    ({"messages": message(content=[{"type": "text"}])}, "messages[0].content[0].text", ["Missing"]),
    ({"messages": message(content=[{"type": "poem"}])}, "messages[0].content[0].type", ["'text'", "poem"]),
    (
        {"messages": message(content=[{"type": "image_url", "image_url": {"url": "x"}}])},
        "messages[0].content[0]",
        ["not supported", "image_url", "text parts"],
    ),
    ({"messages": message(content=[{"type": "input_audio"}])}, "messages[0].content[0]", ["input_audio"]),
    ({"messages": [USER, ANSWER | {"function_call": {}}]}, "messages[1].function_call", ["'tools'"]),
    ({"messages": [USER, ANSWER | {"tool_calls": [{}]}]}, "messages[1].tool_calls[0].id", ["Missing"]),
    ({"messages": [USER, ANSWER | {"tool_calls": []}]}, "messages[1].tool_calls", ["at least 1", "[]"]),
    ({"messages": [USER | {"tool_calls": [CALL]}]}, "messages[0].tool_calls", ["assistant", "'user'"]),
    ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content", ["Missing"]),
    ({"messages": [USER, {"role": "tool", "content": "7"}]}, "messages[1].tool_call_id", ["Missing"]),
    ({"messages": message(content="word " * 200)}, "messages", ["512"]),
    ({"max_tokens": 600}, "messages", ["512"]),
    ({"max_completion_tokens": 0}, "max_completion_tokens", ["1", "0"]),
    ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", ["max_completion_tokens"]),
    ({"logprobs": 1}, "logprobs", ["boolean", "1"]),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", ["20", "21"]),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", ["0", "-1"]),
    ({"top_logprobs": 1}, "top_logprobs", ["'logprobs' is true"]),
    ({"tools": []}, "tools", ["at least 1", "[]"]),
    ({"tools": [TOOL] * 129}, "tools", ["128", "129"]),
    ({"tools": [TOOL, TOOL]}, "tools", ["different names", "'add'"]),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", ["'function'", "custom"]),
    ({"tools": [tool(name="a b")]}, "tools[0].function.name", ["[a-zA-Z0-9_-]{1,64}", "a b"]),
    ({"tools": [tool(name="x" * 65)]}, "tools[0].function.name", ["64", "xxx"]),
    ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters", ["'object'", "string"]),
    ({"tools": [tool(parameters=nested(65))]}, "tools[0].function.parameters", ["64", "65"]),
    ({"tools": [tool(parameters={"x": "y" * 70_000})]}, "tools[0].function.parameters", ["65536", "70009"]),
    ({"tool_choice": "required"}, "tool_choice", ["'tools'"]),
    ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice.type", ["'required'", "maybe"]),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function", ["Missing"]),
    ({"tools": [TOOL], "tool_choice": named("sub")}, "tool_choice", ["'sub'", "add"]),
    (
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
        "tool_choice.allowed_tools.tools",
        ["at least 1", "[]"],
    ),
    (
        {"tools": [TOOL], "tool_choice": "required", "messages": [USER], "parallel_tool_calls": 1},
        "parallel_tool_calls",
        ["boolean", "1"],
    ),
    (
        {"tools": [tool(parameters={"properties": {"a": {"type": "objekt"}}})], "tool_choice": "required"},
        "tools",
        ["objekt"],
    ),
    ({"functions": []}, "functions", ["'tools'"]),
    ({"function_call": "auto"}, "function_call", ["'tool_choice'"]),
    ({"response_format": {"type": "xml"}}, "response_format.type", ["'json_schema'", "xml"]),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", ["Missing"]),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}},
        "response_format.json_schema.schema",
        ["objekt"],
    ),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        ["'response_format'"],
    ),
    ({"structured_outputs": {"regex": "a"}, "tools": [TOOL]}, "structured_outputs.regex", ["JSON object"]),
    ({"audio": {"voice": "alloy"}}, "audio", ["not supported"]),
    ({"modalities": ["audio"]}, "modalities", ["not supported"]),
    ({"moderation": {}}, "moderation", ["not supported"]),
    ({"web_search_options": {}}, "web_search_options", ["not supported"]),
    ({"prediction": {"type": "poem", "content": "x"}}, "prediction.type", ["'content'", "poem"]),
    ({"prediction": {"type": "content"}}, "prediction.content", ["Missing"]),
    ({"reasoning_effort": "huge"}, "reasoning_effort", ["'xhigh'", "huge"]),
    ({"verbosity": 3}, "verbosity", ["'low'", "3"]),
    (
        {"chat_template_kwargs": {"add_generation_prompt": False}},
        "chat_template_kwargs.add_generation_prompt",
        ["enable_thinking"],
    ),
    ({"chat_template_kwargs": {"enable_thinking": [1]}}, "chat_template_kwargs.enable_thinking", ["boolean", "[1]"]),
    ({"prompt": "Hi"}, "prompt", ["Unrecognized"]),
]

ONLY_COMPLETIONS: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"prompt": ""}, "prompt", ["at least 1 token"]),
    ({"prompt": []}, "prompt", ["at least 1", "[]"]),
    ({"prompt": None}, "prompt", ["token ids", "null"]),
    ({"prompt": ["a", 1]}, "prompt", ["token ids", "1"]),
    ({"prompt": [1, True]}, "prompt", ["token ids", "true"]),
    ({"prompt": [[]]}, "prompt", ["token ids", "[[]]"]),
    ({"prompt": ["a"] * 65}, "prompt", ["64", "65"]),
    ({"prompt": [320]}, "prompt", ["319", "320"]),
    ({"prompt": [-1]}, "prompt", ["319", "-1"]),
    ({"prompt": "word " * 200}, "prompt", ["512"]),
    ({"logprobs": 21}, "logprobs", ["20", "21"]),
    ({"logprobs": True}, "logprobs", ["integer", "true"]),
    ({"echo": True, "logprobs": 1}, "echo", ["'logprobs'"]),
    ({"best_of": 2}, "best_of", ["not supported", "'n'"]),
    ({"suffix": "end"}, "suffix", ["not supported"]),
    ({"min_tokens": 17}, "min_tokens", ["17", "16"]),
    ({"messages": [USER]}, "messages", ["Unrecognized"]),
]


def _cases() -> list[Any]:
    cases = []
    for path, rows in ((CHAT, BOTH), (COMPLETIONS, BOTH), (CHAT, ONLY_CHAT), (COMPLETIONS, ONLY_COMPLETIONS)):
        for fields, param, words in rows:
            name = f"{path.split('/')[2]}-{json.dumps(fields)[:60]}"
            cases.append(pytest.param(path, fields, param, words, id=name))
    return cases


@pytest.mark.parametrize(("path", "fields", "param", "words"), _cases())
def test_a_bad_field_is_refused_by_name_with_limit_and_value(
    server: RunningServer, path: str, fields: dict[str, Any], param: str, words: list[str]
) -> None:
    body = {"model": MODEL} | ({"messages": [USER]} if path == CHAT else {"prompt": "Hi"}) | fields
    submitted = len(server.engine.submitted)
    response = server.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    if error["code"] != "context_length_exceeded":  # that one tells of the prompt as a whole
        assert param in error["message"]
    for word in words:
        assert word in error["message"]
    assert len(server.engine.submitted) == submitted


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("missing", ["model", "the prompt"])
def test_a_missing_field_is_named(server: RunningServer, path: str, missing: str) -> None:
    prompt = {"messages": [USER]} if path == CHAT else {"prompt": "Hi"}
    body = prompt if missing == "model" else {"model": MODEL}
    error = server.http.post(path, json=body).json()["error"]
    assert error["param"] == ("model" if missing == "model" else next(iter(prompt)))
    assert (error["message"], error["code"]) == (
        f"Missing required parameter: '{error['param']}'",
        "missing_required_parameter",
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"model": }',
        b"\xff\xfe",
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
        b"[]",
        b"null",
        b"1",
    ],
)
def test_a_body_that_is_no_json_object_is_a_400(server: RunningServer, content: bytes) -> None:
    response = server.http.post(CHAT, content=content[:BODY_LIMIT])
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", None)
    assert "JSON" in error["message"]


def test_a_prompt_too_long_says_context_length_exceeded(server: RunningServer) -> None:
    with pytest.raises(BadRequestError) as caught:
        server.openai.chat.completions.create(model=MODEL, messages=message(content="word " * 200))
    assert caught.value.code == "context_length_exceeded"


def test_an_engine_parameter_has_the_name_the_client_gave(server: RunningServer) -> None:
    assert server.chat(n=9).json()["error"]["param"] == "n"


def test_an_unknown_model_is_a_404_that_names_the_served_one(server: RunningServer) -> None:
    response = server.chat(model="gpt-4")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "gpt-4" in error["message"]
    assert MODEL in error["message"]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [BODY_LIMIT + 1, 5 * BODY_LIMIT])
def test_a_body_over_the_limit_is_a_413_with_and_without_a_declared_length(
    server: RunningServer, chunked: bool, size: int
) -> None:
    body = b'{"model": "' + b"x" * (size - 11)
    content = (body[start : start + 65536] for start in range(0, size, 65536)) if chunked else body
    response = server.http.post(CHAT, content=content)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (413, "request_too_large")
    assert str(BODY_LIMIT) in error["message"]
    assert str(size) in error["message"]


def test_a_body_of_exactly_the_limit_is_read(server: RunningServer) -> None:
    body = json.dumps({"model": MODEL, "prompt": "Hi", "user": ""})
    body = body.replace('"user": ""', f'"user": "{"x" * (BODY_LIMIT - len(body))}"')
    assert len(body) == BODY_LIMIT
    assert server.http.post(COMPLETIONS, content=body).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
    ],
)
def test_unknown_paths_and_methods_answer_in_the_same_shape(
    server: RunningServer, method: str, path: str, status: int, code: str
) -> None:
    response = server.http.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert method in response.json()["error"]["message"]


def test_a_refused_stream_is_a_plain_json_error(server: RunningServer) -> None:
    response: httpx.Response = server.chat(stream=True, max_tokens=600)
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
