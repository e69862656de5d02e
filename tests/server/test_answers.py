"""Both endpoints over real HTTP, mostly through the `openai` package, as its users will."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import tiny_info
from http_server import EOS, MODEL, RunningServer, plays, says, serve
from openai import AsyncOpenAI, NotFoundError

HELLO = "Hello, wörld 😀!"
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    """Says HELLO, three tokens a step."""
    with serve(folder, says(folder, HELLO, batch=3)) as running:
        yield running


def events(body: str) -> list[str]:
    return [line.removeprefix("data: ") for line in body.split("\n") if line.startswith("data: ")]


def chunks(body: str) -> list[dict[str, Any]]:
    assert events(body)[-1] == "[DONE]"
    return [json.loads(event) for event in events(body)[:-1]]


# chat


def test_a_chat_completion_has_text_reason_and_usage(server: RunningServer) -> None:
    completion = server.openai.chat.completions.create(model=MODEL, messages=USER)
    assert completion.choices[0].message.content == HELLO
    assert completion.choices[0].finish_reason == "stop"
    assert completion.choices[0].logprobs is None
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    assert completion.usage.completion_tokens == len(server.service.text.encode(HELLO)) + 1
    assert completion.usage.prompt_tokens_details.cached_tokens == 0
    assert completion.usage.completion_tokens_details.accepted_prediction_tokens == 0


def test_usage_tells_what_speculation_did(server: RunningServer) -> None:
    usage = server.chat().json()["usage"]
    speculation = usage["speculation"]
    assert speculation["accepted"] <= speculation["verified"] <= speculation["drafted"]
    assert usage["completion_tokens"] == 1 + speculation["rounds"] + speculation["accepted"]
    assert speculation["accepted_length"] == round(1 + speculation["accepted"] / speculation["rounds"], 3)


def test_a_stream_is_role_then_text_then_reason_then_done(server: RunningServer) -> None:
    response = server.chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    sent = chunks(response.text)
    choices = [chunk["choices"][0] for chunk in sent]
    assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert all(list(choice["delta"]) == ["content"] for choice in choices[1:-1])
    assert "".join(choice["delta"]["content"] for choice in choices[1:-1]) == HELLO
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "stop")
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert len({chunk["id"] for chunk in sent}) == 1
    assert {chunk["object"] for chunk in sent} == {"chat.completion.chunk"}
    assert not any("usage" in chunk for chunk in sent)


def test_with_include_usage_every_chunk_has_null_and_the_last_the_usage(server: RunningServer) -> None:
    sent = chunks(server.chat(stream=True, stream_options={"include_usage": True}).text)
    assert [chunk["usage"] for chunk in sent[:-1]] == [None] * (len(sent) - 1)
    assert sent[-1]["choices"] == []
    assert sent[-1]["usage"] == server.chat().json()["usage"]


def test_the_openai_client_reads_the_stream(server: RunningServer) -> None:
    stream = server.openai.chat.completions.create(
        model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
    )
    received = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in received[:-1]) == HELLO
    assert received[-1].usage.completion_tokens > 0


def test_many_async_clients_stream_side_by_side(server: RunningServer) -> None:
    async def ask(client: AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model=MODEL, messages=USER, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            return await asyncio.gather(*(ask(client) for _ in range(16)))

    assert asyncio.run(ask_all()) == [HELLO] * 16


def test_choices_are_told_apart_in_json_and_in_the_stream(server: RunningServer) -> None:
    completion = server.openai.chat.completions.create(model=MODEL, messages=USER, n=3)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    sent = chunks(server.chat(stream=True, n=3).text)
    for index in range(3):
        own = [chunk["choices"][0]["delta"] for chunk in sent if chunk["choices"][0]["index"] == index]
        assert own[0]["role"] == "assistant"
        assert "".join(delta.get("content", "") for delta in own) == HELLO


def test_max_tokens_ends_with_length_under_both_names(server: RunningServer) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        body = server.chat(**{name: 4}).json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["choices"][0]["message"]["content"] == "Hell"
        assert body["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("stop", ["wö", ["zzz", "wö"]])
def test_text_ends_before_a_stop_string(server: RunningServer, stop: str | list[str]) -> None:
    body = server.chat(stop=stop).json()
    assert body["choices"][0] | {"message": None} == {
        "index": 0,
        "message": None,
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert body["choices"][0]["message"]["content"] == "Hello, "
    streamed = chunks(server.chat(stop=stop, stream=True).text)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in streamed) == "Hello, "


def test_a_stop_token_is_left_out_of_text_and_logprobs(server: RunningServer) -> None:
    comma = server.service.text.encode(",")
    body = server.chat(stop_token_ids=comma, logprobs=True).json()
    choice = body["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello", "stop")
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == list("Hello")
    assert body["usage"]["completion_tokens"] == 6


def test_logprobs_name_tokens_bytes_and_alternatives(server: RunningServer) -> None:
    completion = server.openai.chat.completions.create(
        model=MODEL, messages=USER, logprobs=True, top_logprobs=5, max_tokens=20
    )
    entries = completion.choices[0].logprobs.content
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == HELLO
    assert all(entry.logprob == -0.25 and len(entry.top_logprobs) == 5 for entry in entries)
    streamed = chunks(server.chat(stream=True, logprobs=True, top_logprobs=5).text)
    contents = [chunk["choices"][0]["logprobs"] for chunk in streamed]
    assert [entry["token"] for content in contents if content for entry in content["content"]] == [
        entry.token for entry in entries
    ]


def test_sampling_fields_reach_the_engine_and_absent_ones_are_openais_defaults(server: RunningServer) -> None:
    server.chat(
        temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, seed=-7, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.1, logit_bias={"7": -100, "8": 2.5}, min_tokens=2, ignore_eos=True, max_tokens=9,
        user="u", metadata={"a": "b"}, store=False, service_tier="auto", tool_choice="none",
        response_format={"type": "text"}, tools=None,
    )  # fmt: skip
    sampling = server.engine.submitted[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.seed) == (
        0.5, 0.9, 40, 0.1, -7,
    )  # fmt: skip
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.1)
    assert (sampling.logit_bias, sampling.min_tokens, sampling.ignore_eos, sampling.max_tokens) == (
        {7: -100, 8: 2.5}, 2, True, 9,
    )  # fmt: skip
    server.chat(top_k=-1)
    sampling = server.engine.submitted[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (1.0, 1.0, 0, None)


def test_messages_may_be_text_parts_and_developer_is_system(server: RunningServer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    server.chat(messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    prompt = server.service.text.decode(server.engine.submitted[-1].prompt_token_ids)
    assert prompt == "system\nBe brief.\nuser\none\ntwo\nassistant\n"


def test_an_answer_can_be_sent_back_as_the_client_dumped_it(server: RunningServer) -> None:
    answer = server.openai.chat.completions.create(model=MODEL, messages=USER).choices[0].message
    again = [*USER, answer.model_dump(), {"role": "user", "content": "More"}]
    assert server.openai.chat.completions.create(model=MODEL, messages=again).choices[0].message.content == HELLO


def test_a_long_conversation_is_answered_too(folder: Path) -> None:
    with serve(folder, says(folder, "ok"), info=tiny_info(max_model_len=100_000)) as roomy:
        body = roomy.chat(messages=[{"role": "user", "content": "word " * 4000}]).json()
    assert body["choices"][0]["message"]["content"] == "ok"
    assert body["usage"]["prompt_tokens"] > 4000


# completions


def test_a_completion_has_text_reason_and_usage(server: RunningServer) -> None:
    completion = server.openai.completions.create(model=MODEL, prompt="Hi", max_tokens=30)
    assert (completion.choices[0].text, completion.choices[0].finish_reason) == (HELLO, "stop")
    assert completion.object == "text_completion"


def test_completions_give_sixteen_tokens_unless_told_otherwise(server: RunningServer) -> None:
    body = server.completion().json()
    assert (body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]) == (16, "length")


@pytest.mark.parametrize("prompts", [["Hi", "Ho"], [[75, 76], [77]]])
def test_several_prompts_are_answered_in_order(server: RunningServer, prompts: list[Any]) -> None:
    body = server.completion(prompt=prompts, n=2, max_tokens=30).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == [HELLO] * 4
    sent = chunks(server.completion(prompt=prompts, n=2, max_tokens=30, stream=True).text)
    for index in range(4):
        own = [chunk["choices"][0] for chunk in sent if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == HELLO
        assert own[-1]["finish_reason"] == "stop"


def test_a_prompt_of_token_ids_reaches_the_engine_as_it_is(server: RunningServer) -> None:
    server.completion(prompt=[75, 0, 319])
    assert server.engine.submitted[-1].prompt_token_ids == (75, 0, 319)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_before_the_text(server: RunningServer, stream: bool) -> None:
    for prompt in ("Say: ", server.service.text.encode("Say: ")):
        response = server.completion(prompt=prompt, echo=True, max_tokens=30, stream=stream)
        answers = chunks(response.text) if stream else [response.json()]
        assert "".join(answer["choices"][0]["text"] for answer in answers) == "Say: " + HELLO


def test_completion_logprobs_are_four_parallel_lists(server: RunningServer) -> None:
    logprobs = server.completion(logprobs=2, max_tokens=5).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == list("Hello")
    assert logprobs["token_logprobs"] == [-0.25] * 5
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2] * 5


def test_completion_logprobs_of_half_a_character_use_the_bytes_notation(folder: Path) -> None:
    with serve(folder, says(folder, "é")) as server:
        logprobs = server.completion(logprobs=0).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["top_logprobs"] is None


def test_an_impossible_tokens_logprob_is_still_json(folder: Path) -> None:
    with serve(folder, says(folder, "a")) as server:
        server.engine.logprob = float("-inf")
        entry = server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]
    assert entry["logprob"] == -9999.0


def test_an_end_of_text_that_is_ignored_leaves_no_trace_in_the_text(folder: Path) -> None:
    letters = [75, 76, EOS, 77, EOS]
    with serve(folder, plays(letters)) as server:
        body = server.chat(ignore_eos=True).json()
        assert body["usage"]["completion_tokens"] == 5
        assert body["choices"][0]["message"]["content"] == server.service.text.decode([75, 76, 77])


# models, health, headers


def test_the_model_is_listed_and_found_by_name(server: RunningServer) -> None:
    assert [model.id for model in server.openai.models.list()] == [MODEL]
    assert server.openai.models.retrieve(MODEL).id == MODEL
    with pytest.raises(NotFoundError):
        server.openai.models.retrieve("org/other")


def test_health_is_ready_and_the_fingerprint_stays(server: RunningServer) -> None:
    assert server.http.get("/health").status_code == 200
    assert server.chat().json()["system_fingerprint"] == server.completion().json()["system_fingerprint"]


def test_every_answer_has_a_request_id_and_a_sane_one_is_kept(server: RunningServer) -> None:
    assert server.http.get("/health", headers={"x-request-id": "trace-1.a"}).headers["x-request-id"] == "trace-1.a"
    for bad in ("a b", "x" * 200, "é"):
        answer = server.http.get("/nowhere", headers={"x-request-id": bad.encode()})
        assert len(answer.headers["x-request-id"]) == 32
