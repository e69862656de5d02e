"""The `openai` package against this server, sync and async: all that its users call, and every error they catch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from fake_engine import tiny_info
from http_server import MODEL, RunningServer, says, serve
from openai import AsyncOpenAI, DefaultHttpxClient, OpenAI
from pydantic import BaseModel

TEXT = "Hello, wörld 😀!"
USER: Any = [{"role": "user", "content": "Hi"}]
LONG_CONTEXT = {"info": tiny_info(max_model_len=4096)}


class Paint(BaseModel):
    """Paints a wall."""

    colour: Literal["red", "green"]
    coats: Literal[1, 2]


CALL = '{"name": "Paint", "arguments": {"colour": "green", "coats": 2}}'
PAINT: Any = openai.pydantic_function_tool(Paint)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    with serve(folder, says(folder, TEXT, batch=3)) as running:
        yield running


@pytest.fixture(scope="module")
def calling(folder: Path) -> Iterator[RunningServer]:
    """Says something and calls the tool."""
    said = says(folder, f"Well.<tool_call>{CALL}</tool_call>", batch=3)
    with serve(folder, said, **LONG_CONTEXT) as running:
        yield running


@pytest.fixture(scope="module")
def real(real_url: str) -> OpenAI:
    return OpenAI(base_url=f"{real_url}/v1", api_key="unused", max_retries=0, timeout=60)


# answers


def test_chat(server: RunningServer) -> None:
    completion = server.openai.chat.completions.create(model=MODEL, messages=USER)
    assert completion.choices[0].message.content == TEXT
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens


def test_chat_streamed_with_usage(server: RunningServer) -> None:
    whole = server.openai.chat.completions.create(model=MODEL, messages=USER)
    options: Any = {"include_usage": True}
    *chunks, last = server.openai.chat.completions.create(
        model=MODEL, messages=USER, stream=True, stream_options=options
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert (last.choices, last.usage) == ([], whole.usage)


def test_the_stream_helper_tells_every_event(server: RunningServer) -> None:
    request: Any = {"model": MODEL, "messages": USER, "logprobs": True, "top_logprobs": 2}
    with server.openai.chat.completions.stream(**request) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert "".join(event.delta for event in events if event.type == "content.delta") == TEXT
    assert [event.content for event in events if event.type == "content.done"] == [TEXT]
    [done] = [event for event in events if event.type == "logprobs.content.done"]
    assert len(done.content) == len(server.service.text.encode(TEXT))
    assert final.choices[0].message.content == TEXT
    assert final.choices[0].finish_reason == "stop"


def test_several_choices_in_one_stream(server: RunningServer) -> None:
    with server.openai.chat.completions.stream(model=MODEL, messages=USER, n=3) as stream:
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == [TEXT] * 3


def test_completions(server: RunningServer) -> None:
    completion = server.openai.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=64, logprobs=1)
    assert [choice.text for choice in completion.choices] == [TEXT, TEXT]
    assert all(choice.logprobs.token_logprobs for choice in completion.choices)
    streamed = server.openai.completions.create(model=MODEL, prompt="a", max_tokens=64, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == TEXT


def test_models(server: RunningServer) -> None:
    [listed] = server.openai.models.list()
    assert listed == server.openai.models.retrieve(MODEL)
    assert (listed.id, listed.object) == (MODEL, "model")


# parsed answers: the tiny model writes noise, so that only the grammar can have made them valid


@pytest.mark.parametrize("seed", range(4))
def test_parse_gives_the_pydantic_model(real: OpenAI, seed: int) -> None:
    completion = real.chat.completions.parse(model="tiny", messages=USER, response_format=Paint, seed=seed)
    assert isinstance(completion.choices[0].message.parsed, Paint)
    assert completion.choices[0].finish_reason == "stop"


def test_parse_gives_the_arguments_of_a_pydantic_tool(real: OpenAI) -> None:
    completion = real.chat.completions.parse(
        model="tiny", messages=USER, tools=[PAINT], tool_choice="required", parallel_tool_calls=False, seed=1
    )
    [call] = completion.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Paint)
    assert completion.choices[0].finish_reason == "tool_calls"


def test_the_stream_helper_parses_what_it_streams(real: OpenAI) -> None:
    request: Any = {"model": "tiny", "messages": USER, "seed": 2}
    with real.chat.completions.stream(**request, response_format=Paint) as stream:
        [done] = [event for event in stream if event.type == "content.done"]
    assert isinstance(done.parsed, Paint)
    assert real.chat.completions.parse(**request, response_format=Paint).choices[0].message.parsed == done.parsed


def test_an_answer_cut_short_is_an_error_of_the_helper_and_not_half_an_object(real: OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        real.chat.completions.parse(model="tiny", messages=USER, response_format=Paint, max_completion_tokens=2)


# tools


def test_tools_streamed(calling: RunningServer) -> None:
    with calling.openai.chat.completions.stream(model=MODEL, messages=USER, tools=[PAINT]) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    arguments = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    [done] = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert len(arguments) > 2, "arguments come in pieces"
    assert "".join(event.arguments_delta for event in arguments) == done.arguments
    assert done.parsed_arguments == Paint(colour="green", coats=2)
    [choice] = final.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Well.")


def test_a_call_and_its_result_go_back_as_the_client_holds_them(calling: RunningServer) -> None:
    message = calling.openai.chat.completions.create(model=MODEL, messages=USER, tools=[PAINT]).choices[0].message
    [call] = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "It is green."}
    calling.openai.chat.completions.create(model=MODEL, messages=[*USER, message, result], tools=[PAINT])
    prompt = calling.service.text.decode(calling.engine.submitted[-1].prompt_token_ids)
    assert json.dumps(json.loads(CALL)) in prompt
    assert "It is green." in prompt


# errors


def test_a_bad_request_names_its_field(server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.chat.completions.create(model=MODEL, messages=USER, temperature=3)
    assert (caught.value.status_code, caught.value.param, caught.value.code) == (400, "temperature", "invalid_value")
    assert caught.value.request_id
    assert "less than or equal to 2, but 3 was given" in caught.value.message


def test_a_model_that_is_not_served(server: RunningServer) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.openai.chat.completions.create(model="gpt-5", messages=USER)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("gpt-5")


def test_a_wrong_key(folder: Path) -> None:
    with serve(folder, says(folder, TEXT), api_keys=("secret",)) as server:
        with pytest.raises(openai.AuthenticationError) as caught:
            server.openai.chat.completions.create(model=MODEL, messages=USER)
        assert caught.value.code == "invalid_api_key"
        allowed = server.openai.with_options(api_key="secret")
        assert allowed.chat.completions.create(model=MODEL, messages=USER).choices[0].message.content == TEXT


def test_a_full_server_says_when_to_come_again(folder: Path) -> None:
    with serve(folder, says(folder, TEXT), max_queued=0) as server:
        server.engine.retry_after_s = 7
        with pytest.raises(openai.RateLimitError) as caught:
            server.openai.chat.completions.create(model=MODEL, messages=USER, stream=True)
    assert caught.value.response.headers["retry-after"] == "7"
    assert caught.value.code == "rate_limit_exceeded"


def test_a_key_reused_for_another_request(server: RunningServer) -> None:
    key = {"Idempotency-Key": "reused"}
    server.openai.chat.completions.create(model=MODEL, messages=USER, extra_headers=key)
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        server.openai.chat.completions.create(model=MODEL, messages=USER, extra_headers=key, seed=1)
    assert caught.value.code == "idempotency_key_reused"


def test_an_error_in_the_middle_of_a_stream_is_raised(folder: Path) -> None:
    with serve(folder, says(folder, TEXT)) as server:
        stream = server.openai.chat.completions.create(model=MODEL, messages=USER, stream=True)
        server.engine.paused = True
        next(stream)
        server.engine.failure = RuntimeError("boom")
        server.engine.paused = False
        with pytest.raises(openai.APIError) as caught:
            list(stream)
    assert caught.value.code == "engine_failed"


# retries


def test_a_client_refused_for_load_tries_again_by_itself(folder: Path) -> None:
    with serve(folder, says(folder, TEXT), max_queued=1) as server:
        server.engine.paused = True
        statuses: list[int] = []

        def make_room_once_refused(response: Any) -> None:
            statuses.append(response.status_code)
            server.engine.paused = False

        with (
            server.http.stream("POST", "/v1/completions", json={"model": MODEL, "prompt": "a", "stream": True}) as _,
            DefaultHttpxClient(event_hooks={"response": [make_room_once_refused]}) as http,
        ):
            client = server.openai.with_options(http_client=http, max_retries=1)
            completion = client.chat.completions.create(model=MODEL, messages=USER)
    assert statuses == [429, 200]
    assert completion.choices[0].message.content == TEXT


def test_an_answer_lost_on_its_way_is_fetched_again_and_not_computed_again(server: RunningServer) -> None:
    replayed: list[str | None] = []

    def lose_the_first(response: Any) -> None:
        replayed.append(response.headers.get("idempotency-replayed"))
        if len(replayed) == 1:
            raise httpx.ReadError("the connection broke")

    before = len(server.engine.submitted)
    with DefaultHttpxClient(event_hooks={"response": [lose_the_first]}) as http:
        client = server.openai.with_options(http_client=http, max_retries=1)
        answer = client.chat.completions.create(
            model=MODEL, messages=USER, extra_headers={"Idempotency-Key": "booking-7"}
        )
    assert replayed == [None, "true"]
    assert answer.choices[0].message.content == TEXT
    assert len(server.engine.submitted) == before + 1


def test_the_same_key_gives_the_same_answer(server: RunningServer) -> None:
    answers = [
        server.openai.chat.completions.with_raw_response.create(
            model=MODEL, messages=USER, extra_headers={"Idempotency-Key": "booking-8"}
        )
        for _ in range(2)
    ]
    assert answers[0].parse() == answers[1].parse()
    assert [answer.headers.get("idempotency-replayed") for answer in answers] == [None, "true"]


# time


def test_a_client_that_waits_no_longer_frees_its_place(folder: Path) -> None:
    with serve(folder, says(folder, TEXT)) as server:
        server.engine.paused = True
        with pytest.raises(openai.APITimeoutError):
            server.openai.with_options(timeout=0.3).chat.completions.create(model=MODEL, messages=USER)
        while not server.engine.aborted:
            pass
        assert server.engine.aborted == server.engine.submitted


def test_a_deadline_of_the_request_is_kept_by_the_server_and_not_tried_again(real: OpenAI) -> None:
    statuses: list[int] = []
    with DefaultHttpxClient(event_hooks={"response": [lambda response: statuses.append(response.status_code)]}) as http:
        client = real.with_options(http_client=http, max_retries=2)
        extra: Any = {"timeout": 0.001, "ignore_eos": True}
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="tiny", messages=USER, extra_body=extra)
    assert statuses == [504]
    assert caught.value.code == "deadline_exceeded"


# async


def test_the_async_client(server: RunningServer) -> None:
    async def ask(client: AsyncOpenAI) -> str:
        return (await client.chat.completions.create(model=MODEL, messages=USER)).choices[0].message.content

    async def stream(client: AsyncOpenAI) -> str:
        events = []
        async with client.chat.completions.stream(model=MODEL, messages=USER) as stream:
            async for event in stream:
                events.append(event.type)
            final = await stream.get_final_completion()
        assert "content.delta" in events
        return final.choices[0].message.content

    async def complete(client: AsyncOpenAI) -> str:
        chunks = await client.completions.create(model=MODEL, prompt="a", max_tokens=64, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def all_at_once() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(model=MODEL, messages=[])
            assert [model.id async for model in client.models.list()] == [MODEL]
            return await asyncio.gather(*(kind(client) for kind in (ask, stream, complete) for _ in range(8)))

    assert asyncio.run(all_at_once()) == [TEXT] * 24


def test_the_async_client_parses(real_url: str) -> None:
    async def parse() -> tuple[Any, Any]:
        async with AsyncOpenAI(base_url=f"{real_url}/v1", api_key="unused", max_retries=0) as client:
            completions = client.chat.completions
            text = await completions.parse(model="tiny", messages=USER, response_format=Paint, seed=3)
            call = await completions.parse(model="tiny", messages=USER, tools=[PAINT], tool_choice="required", seed=3)
        return text.choices[0].message.parsed, call.choices[0].message.tool_calls[0].function.parsed_arguments

    assert all(isinstance(parsed, Paint) for parsed in asyncio.run(parse()))
