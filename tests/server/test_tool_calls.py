"""Tool calls from the model's text, however it is cut into pieces, and over HTTP as agents see them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import tiny_info
from http_server import MODEL, RunningServer, says, serve
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dspark.server.identity import Identity
from dspark.server.parts import Part, PartKind, TextParser, joined
from dspark.server.prompts import ChatSettings
from dspark.server.reasoning import ReasoningParser
from dspark.server.schemas import Message
from dspark.server.text import ModelText, Vocabulary
from dspark.server.tool_calls import (
    ENFORCED,
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    CallFormat,
    CallParser,
    call_format_of,
    short_call_id,
    with_tools_in_text,
)
from dspark.server.translate import ChatAnswer, Piece, template_messages


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> Vocabulary:
    return ModelText.load(folder).vocabulary


NAMES = {"add", "get-weather"}
ADD = '{"name": "add", "arguments": {"a": 1, "b": "}] \\" </tool_call>"}}'
ARGUMENTS = '{"a": 1, "b": "}] \\" </tool_call>"}'
WEATHER = '{"name": "get-weather", "arguments": {}}'


def tool(name: str = "add", **parameters: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": parameters or {"a": {"type": "integer"}}}
    return {"type": "function", "function": {"name": name, "description": "Adds.", "parameters": schema}}


def parsed(parser: TextParser, pieces: list[str]) -> list[Part]:
    return joined([part for piece in pieces for part in parser.feed(piece)] + parser.finish())


def calls(call_format: CallFormat, text: str, *, single: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """(content, [(name, arguments)])."""
    parts = parsed(CallParser(call_format, NAMES, single=single), [text])
    content = "".join(part.text for part in parts if part.kind is PartKind.CONTENT)
    begun = [part for part in parts if part.kind is PartKind.CALL]
    arguments = {part.call: part.text for part in parts if part.kind is PartKind.ARGUMENTS}
    return content, [(part.text, arguments.get(part.call, "")) for part in begun]


# what each format looks like


@pytest.mark.parametrize(
    ("call_format", "text", "content", "found"),
    [
        (HERMES, f"<tool_call>\n{ADD}\n</tool_call>", "", [("add", ARGUMENTS)]),
        (HERMES, f"Let me see.\n<tool_call>{ADD}</tool_call>", "Let me see.", [("add", ARGUMENTS)]),
        (
            HERMES,
            f"<tool_call>\n{ADD}\n</tool_call>\n<tool_call>\n{WEATHER}\n</tool_call>\n",
            "",
            [("add", ARGUMENTS), ("get-weather", "{}")],
        ),
        (HERMES, f"<tool_call>{WEATHER}</tool_call>\nDone.", "Done.", [("get-weather", "{}")]),
        (MISTRAL, f"[TOOL_CALLS][{ADD}, {WEATHER}]", "", [("add", ARGUMENTS), ("get-weather", "{}")]),
        (MISTRAL, f"[TOOL_CALLS] [{ADD}]", "", [("add", ARGUMENTS)]),
        (LLAMA3_JSON, '{"name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
        (
            LLAMA3_JSON,
            '<|python_tag|>{"name": "add", "parameters": {}}; {"name": "add", "parameters": {"a": 2}}',
            "",
            [("add", "{}"), ("add", '{"a": 2}')],
        ),
        (LLAMA3_JSON, "It is {warm}.", "It is {warm}.", []),
        (ENFORCED, f"[{ADD}, {WEATHER}]", "", [("add", ARGUMENTS), ("get-weather", "{}")]),
        (ENFORCED, '{"name": "add", "arguments": {}}', '{"name": "add", "arguments": {}}', []),
    ],
)
def test_calls_are_found_and_what_surrounds_them_is_content(
    call_format: CallFormat, text: str, content: str, found: list[tuple[str, str]]
) -> None:
    assert calls(call_format, text) == (content, found)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>',
        '<tool_call>{"name": "add", "id": 7, "arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": 1}, "id": "x"}</tool_call>',
    ],
)
def test_keys_in_any_order_and_a_forgotten_brace_are_understood(text: str) -> None:
    assert calls(HERMES, text) == ("", [("add", '{"a": 1}')])


def test_a_call_without_arguments_has_empty_ones() -> None:
    assert calls(HERMES, '<tool_call>{"name": "add"}</tool_call>') == ("", [("add", "{}")])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>add(1, 2)</tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>\n",
        "a <tool_",
        '<tool_call>{"name": "add", "argu',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "1"}</tool_call>',
        '<tool_call>{"name": "sub", "arguments": {}}</tool_call>',
        '<tool_call>{"name": add, "arguments"}</tool_call>',
        '<tool_call>{"name": <tool_call>',
        "<tool_call>[]</tool_call>",
        "{" * 1000,
        "<tool_call>" + "{" * 1000,
    ],
)
@pytest.mark.parametrize("call_format", [HERMES, MISTRAL, LLAMA3_JSON])
def test_what_is_no_call_stays_content_to_the_letter(call_format: CallFormat, text: str) -> None:
    text = text.replace("<tool_call>", call_format.opens)
    assert calls(call_format, text) == (text, [])


def test_a_call_cut_short_has_the_arguments_that_there_are() -> None:
    assert calls(HERMES, '<tool_call>{"name": "add", "arguments": {"a": "on') == ("", [("add", '{"a": "on')])


@pytest.mark.parametrize("text", ["[", '[{"na', f'[{ADD}, {{"name": "ad'])
def test_an_enforced_call_without_its_name_is_dropped(text: str) -> None:
    content, found = calls(ENFORCED, text)
    assert (content, len(found)) == ("", text.count("}]"))


def test_a_single_call_ends_the_answer() -> None:
    parser = CallParser(HERMES, NAMES, single=True)
    parser.feed(f"<tool_call>{ADD}")
    assert parser.done
    assert calls(HERMES, f"<tool_call>{ADD}</tool_call><tool_call>{WEATHER}</tool_call>", single=True)[1] == [
        ("add", ARGUMENTS)
    ]


def test_arguments_are_shown_as_they_are_written() -> None:
    parser = CallParser(HERMES, NAMES, single=False)
    shown = [parser.feed(piece) for piece in ('<tool_call>{"name": "add", "argu', 'ments": ', '{"a', '": 1', "}}")]
    assert shown == [
        [],
        [],
        [Part(PartKind.CALL, "add"), Part(PartKind.ARGUMENTS, '{"a')],
        [Part(PartKind.ARGUMENTS, '": 1')],
        [Part(PartKind.ARGUMENTS, "}")],
    ]


SNIPPETS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<think>", "</think>", ADD, WEATHER),
        *(
            '{"name": "add", "arguments": ',
            '{"a": ',
            "{",
            "}",
            "[",
            "]",
            ",",
            ";",
            " ",
            "\n",
            '"',
            "\\",
            "text",
            "<",
            "é",
        ),
    ]
)


@given(st.lists(SNIPPETS, max_size=12), st.data(), st.sampled_from([HERMES, MISTRAL, LLAMA3_JSON, ENFORCED]))
def test_how_a_text_is_cut_into_pieces_changes_nothing(
    snippets: list[str], data: st.DataObject, call_format: CallFormat
) -> None:
    text = "".join(snippets)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    single, begun, reasons = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.booleans())

    def parser() -> TextParser:
        inner = CallParser(call_format, NAMES, single=single)
        return ReasoningParser(inner, begun=begun) if reasons else inner

    whole = parsed(parser(), [text])
    assert parsed(parser(), pieces) == whole
    assert parsed(parser(), list(text)) == whole


@given(st.lists(SNIPPETS, max_size=12), st.data(), st.sampled_from([HERMES, MISTRAL, LLAMA3_JSON, ENFORCED]))
def test_chunks_put_together_are_the_json_answer(
    vocabulary: Vocabulary, snippets: list[str], data: st.DataObject, call_format: CallFormat
) -> None:
    text = "".join(snippets)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parser = ReasoningParser(CallParser(call_format, NAMES, single=False), begun=False)
    feeds = [parser.feed(text[start:end]) for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    pieces = [Piece(0, parts, None, None) for parts in feeds] + [Piece(0, parser.finish(), None, "stop")]
    identity = Identity.random()
    answers = [ChatAnswer(identity, MODEL, "fp", vocabulary, include_usage=False) for _ in range(2)]
    message = answers[0].complete(pieces, {})["choices"][0]["message"]
    sent = [json.loads(chunk)["choices"][0]["delta"] for piece in pieces for chunk in answers[1].chunks(piece)]
    assert "".join(delta.get("content") or "" for delta in sent) == (message["content"] or "")
    assert "".join(delta.get("reasoning_content", "") for delta in sent) == message.get("reasoning_content", "")
    put_together: list[dict[str, Any]] = []
    for delta in [call for one in sent for call in one.get("tool_calls", ())]:
        if "id" in delta:
            assert delta.pop("index") == len(put_together)
            put_together.append(delta)
        else:
            put_together[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    assert put_together == message.get("tool_calls", [])


def test_absurdly_deep_json_is_no_call_and_no_error() -> None:
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    assert calls(LLAMA3_JSON, deep) == (deep, [])


# which format


@pytest.mark.parametrize(
    ("template", "call_format"),
    [
        ("{{ tools }}<tool_call>", HERMES),
        ("{{ tools }}[TOOL_CALLS]", MISTRAL),
        ("<|start_header_id|>{{ tools }}", LLAMA3_JSON),
        ("{{ messages }}", HERMES),
    ],
)
def test_the_template_tells_the_format(template: str, call_format: CallFormat) -> None:
    assert call_format_of(template) is call_format


# templates that know no tools


def test_tools_calls_and_results_are_told_in_text_where_the_template_knows_none() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    told = with_tools_in_text(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "", "tool_calls": [call, call]},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            {"role": "tool", "content": "3", "tool_call_id": "c2"},
        ],
        [tool()],
    )
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be brief.\n\nYou may call")
    assert json.dumps(tool()) in told[0]["content"]
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert told[2] == {"role": "assistant", "content": f"{text}\n{text}"}
    assert told[3] == {
        "role": "user",
        "content": "<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>",
    }


def test_ids_are_shortened_to_what_mistrals_templates_let_pass() -> None:
    assert short_call_id("abcDEF123") == "abcDEF123"
    short = short_call_id("call_0123456789")
    assert len(short) == 9
    assert short.isalnum()
    assert short == short_call_id("call_0123456789") != short_call_id("call_0123456788")


@pytest.mark.parametrize("arguments", ["[" * 50_000, '{"a":' * 300 + "1" + "}" * 300, "no json", "[1]", ""])
def test_arguments_that_are_no_sane_object_are_given_to_the_template_as_text(arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": arguments}}
    message = Message.model_validate({"role": "assistant", "tool_calls": [call]})
    [known] = template_messages([message])
    assert known["tool_calls"][0]["function"]["arguments"] == arguments


# over HTTP

SAID = f"Well.\n<tool_call>\n{ADD}\n</tool_call>\n<tool_call>\n{WEATHER}\n</tool_call>"
TOOLS = [tool(), tool("get-weather")]
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    """Says two calls, three tokens a step."""
    with serve(folder, says(folder, SAID, batch=3), info=tiny_info(max_model_len=4096)) as running:
        yield running


def chunks(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    lines = server.chat(stream=True, **fields).text.split("\n\n")
    events = [line.partition("data: ")[2] for line in lines if "data: " in line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_calls_come_as_openais_clients_expect_them(server: RunningServer) -> None:
    completion = server.openai.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS)
    message = completion.choices[0].message
    assert completion.choices[0].finish_reason == "tool_calls"
    assert message.content == "Well."
    assert [call.function.name for call in message.tool_calls] == ["add", "get-weather"]
    assert json.loads(message.tool_calls[0].function.arguments) == {"a": 1, "b": '}] " </tool_call>'}
    assert len({call.id for call in message.tool_calls}) == 2


def test_without_text_beside_the_calls_content_is_null(folder: Path) -> None:
    with serve(folder, says(folder, f"<tool_call>{WEATHER}</tool_call>"), info=tiny_info(max_model_len=4096)) as server:
        assert server.chat(tools=TOOLS).json()["choices"][0]["message"]["content"] is None


def test_a_streamed_call_begins_with_id_and_name_and_goes_on_with_arguments(server: RunningServer) -> None:
    sent = [chunk["choices"][0] for chunk in chunks(server, tools=TOOLS)]
    deltas = [choice["delta"]["tool_calls"][0] for choice in sent if "tool_calls" in choice["delta"]]
    first = [delta for delta in deltas if delta["index"] == 0]
    assert first[0] | {"id": ""} == {
        "index": 0,
        "id": "",
        "type": "function",
        "function": {"name": "add", "arguments": ""},
    }
    assert all(list(delta) == ["index", "function"] for delta in first[1:])
    assert len(first) > 5, "arguments come in pieces"
    assert "".join(delta["function"]["arguments"] for delta in first) == ARGUMENTS
    assert sent[-1]["finish_reason"] == "tool_calls"


def test_the_stream_helper_of_openais_client_puts_the_calls_together(server: RunningServer) -> None:
    with server.openai.chat.completions.stream(model=MODEL, messages=USER, tools=TOOLS) as stream:
        completion = stream.get_final_completion()
    assert [call.function.arguments for call in completion.choices[0].message.tool_calls] == [ARGUMENTS, "{}"]


@pytest.mark.parametrize("n", [1, 3])
def test_the_stream_tells_what_the_json_tells(server: RunningServer, n: int) -> None:
    whole = server.chat(tools=TOOLS, n=n).json()["choices"]
    sent = [chunk["choices"][0] for chunk in chunks(server, tools=TOOLS, n=n)]
    for index in range(n):
        own = [choice for choice in sent if choice["index"] == index]
        content = "".join(choice["delta"].get("content") or "" for choice in own)
        found: dict[int, list[str]] = {}
        for choice in own:
            for delta in choice["delta"].get("tool_calls", ()):
                call = found.setdefault(delta["index"], [delta["function"].get("name"), ""])
                call[1] += delta["function"]["arguments"]
        message = whole[index]["message"]
        assert content == message["content"]
        told = [[call["function"]["name"], call["function"]["arguments"]] for call in message["tool_calls"]]
        assert [found[k] for k in sorted(found)] == told
        assert own[-1]["finish_reason"] == whole[index]["finish_reason"]


def test_choices_have_ids_of_their_own(server: RunningServer) -> None:
    choices = server.chat(tools=TOOLS, n=2).json()["choices"]
    assert len({call["id"] for choice in choices for call in choice["message"]["tool_calls"]}) == 4


def test_one_call_at_a_time_ends_the_generation_with_the_first(server: RunningServer) -> None:
    several = server.chat(tools=TOOLS).json()
    one = server.chat(tools=TOOLS, parallel_tool_calls=False).json()
    assert [call["function"]["name"] for call in one["choices"][0]["message"]["tool_calls"]] == ["add"]
    assert one["choices"][0]["finish_reason"] == "tool_calls"
    assert one["usage"]["completion_tokens"] < several["usage"]["completion_tokens"]


def test_a_call_cut_off_by_max_tokens_ends_with_length(server: RunningServer) -> None:
    tokens = server.service.text.encode(SAID[: SAID.index('"b"')])
    choice = server.chat(tools=TOOLS, max_tokens=len(tokens)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": 1, '


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_to_call_the_text_is_content(server: RunningServer, fields: dict[str, Any]) -> None:
    choice = server.chat(**fields).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (SAID, "stop")
    assert "tool_calls" not in choice["message"]
    prompt = server.service.text.decode(server.engine.submitted[-1].prompt_token_ids)
    assert "Adds." not in prompt


def test_only_the_allowed_tools_can_be_called_while_all_are_described(server: RunningServer) -> None:
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get-weather"}}]}
    body = server.chat(tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}).json()
    message = body["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get-weather"]
    assert '"add"' in message["content"]
    prompt = server.service.text.decode(server.engine.submitted[-1].prompt_token_ids)
    assert '"name": "add"' in prompt


def test_a_conversation_with_calls_and_results_can_go_on(server: RunningServer) -> None:
    message = server.openai.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "42"} for call in message.tool_calls]
    again = [*USER, message.model_dump(exclude_none=True), *results]
    assert server.openai.chat.completions.create(model=MODEL, messages=again, tools=TOOLS).choices
    prompt = server.service.text.decode(server.engine.submitted[-1].prompt_token_ids)
    assert prompt.count("<tool_response>\n42\n</tool_response>") == 2
    assert '<tool_call>\n{"name": "get-weather", "arguments": {}}\n</tool_call>' in prompt


@pytest.mark.parametrize(
    ("choice", "single"),
    [("required", False), ({"type": "function", "function": {"name": "add"}}, True)],
)
def test_an_enforced_call_is_read_from_the_form_that_the_grammar_allows(
    folder: Path, choice: Any, single: bool
) -> None:
    with serve(folder, says(folder, f"[{ADD}, {ADD}]"), info=tiny_info(max_model_len=4096)) as server:
        body = server.chat(tools=TOOLS, tool_choice=choice).json()["choices"][0]
        assert server.engine.submitted[-1].make_grammar is not None
    assert body["message"]["content"] is None
    assert [call["function"]["arguments"] for call in body["message"]["tool_calls"]] == [ARGUMENTS] * (2 - single)
    assert body["finish_reason"] == "tool_calls"


def test_outcomes_of_calls_are_counted(server: RunningServer) -> None:
    registry = server.service.metrics.registry
    labels = {"model": MODEL, "endpoint": "chat_completions", "outcome": "tool_calls"}
    before = registry.get_sample_value("dspark_requests_total", labels)
    server.chat(tools=TOOLS)
    assert registry.get_sample_value("dspark_requests_total", labels) == before + 1


# a template that knows tools

TEMPLATE = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}"
    "{{ m.tool_call_id or '' }};{% endfor %}{# writes [TOOL_CALLS] #}"
)


def test_a_template_that_knows_tools_gets_them_and_calls_with_objects_as_arguments(
    folder: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["[TOOL_CALLS]"])  # a control token, which is not shown as a rule
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    history = [
        *USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    ]
    said = says(tmp_path, f"[TOOL_CALLS] [{WEATHER}]")
    with serve(tmp_path, said, info=tiny_info(max_model_len=4096, vocab_size=321)) as server:
        assert server.chat().json()["choices"][0]["message"]["content"] == f" [{WEATHER}]"
        body = server.chat(messages=history, tools=TOOLS).json()
        prompt = server.service.text.decode(server.engine.submitted[-1].prompt_token_ids)
    assert [call["function"]["name"] for call in body["choices"][0]["message"]["tool_calls"]] == ["get-weather"]
    assert prompt.startswith(
        '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "add", "description": "Adds."'
    )
    short = short_call_id("call_1")
    assert f'"id": "{short}", "type": "function", "function": {{"name": "add", "arguments": {{"a": 1}}}}' in prompt
    assert f"tool:2{short};" in prompt


def test_the_operator_may_name_the_format(folder: Path) -> None:
    said = says(folder, '{"name": "add", "parameters": {}}')
    settings = ChatSettings(tool_call_parser="llama3_json")
    with serve(folder, said, info=tiny_info(max_model_len=4096), chat=settings) as server:
        assert server.chat(tools=TOOLS).json()["choices"][0]["finish_reason"] == "tool_calls"
