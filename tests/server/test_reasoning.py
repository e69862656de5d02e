"""`<think>…</think>` in its own field, counted, and left alone where the operator wants it so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_engine import tiny_info
from http_server import MODEL, says, serve

from dspark.server.parts import Part, PartKind, PlainText, joined
from dspark.server.prompts import ChatSettings
from dspark.server.reasoning import ReasoningParser

THINKING = "<think>\nOne and\none.\n</think>\n\nIt is <b>2</b>."
USER = [{"role": "user", "content": "1+1?"}]


def split(text: str, *, begun: bool = False) -> tuple[str, str]:
    """(reasoning, content)."""
    parser = ReasoningParser(PlainText(), begun=begun)
    parts = joined([*parser.feed(text), *parser.finish()])
    return tuple(
        "".join(part.text for part in parts if part.kind is kind) for kind in (PartKind.REASONING, PartKind.CONTENT)
    )


@pytest.mark.parametrize(
    ("text", "begun", "reasoning", "content"),
    [
        (THINKING, False, "One and\none.", "It is <b>2</b>."),
        (THINKING.removeprefix("<think>"), True, "One and\none.", "It is <b>2</b>."),
        (" <think></think>Two.", False, "", "Two."),
        ("Two.", False, "", "Two."),
        ("  Two.", False, "", "  Two."),
        ("No <think>here</think>", False, "", "No <think>here</think>"),
        ("<thin", False, "", "<thin"),
        ("<think>cut off", False, "cut off", ""),
        ("<think>cut </thi", False, "cut </thi", ""),
        ("cut off", True, "cut off", ""),
        ("", True, "", ""),
    ],
)
def test_reasoning_is_told_from_content(text: str, begun: bool, reasoning: str, content: str) -> None:
    assert split(text, begun=begun) == (reasoning, content)


def test_reasoning_is_shown_as_it_comes() -> None:
    parser = ReasoningParser(PlainText(), begun=False)
    pieces = [parser.feed(piece) for piece in ("<think>", "\nOne", " and</", "think>", "\n", "\nTwo")]
    shown = [[(part.kind, part.text) for part in parts] for parts in pieces]
    reasoning, content = PartKind.REASONING, PartKind.CONTENT
    assert shown == [[], [(reasoning, "One")], [(reasoning, " and")], [], [], [(content, "Two")]]
    assert Part(content, "Two") == pieces[-1][0]


# over HTTP


@pytest.fixture
def thinking_folder(folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ (m.reasoning_content or '') + m.content }}|{% endfor %}"
        "{{ '<think>\n' if begin_thinking }}{{ '<think></think>' if enable_thinking is false }}"
    )
    return tmp_path


def test_reasoning_and_its_tokens_have_their_own_fields(thinking_folder: Path) -> None:
    with serve(thinking_folder, says(thinking_folder, THINKING, batch=3)) as server:
        body = server.chat().json()
        message = body["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("One and\none.", "It is <b>2</b>.")
        counted = THINKING[len("<think") : THINKING.index("</think>") + len("</think>")]
        reasoning_tokens = len(server.service.text.encode(counted))
        assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == reasoning_tokens

        stream = server.openai.chat.completions.create(model=MODEL, messages=USER, stream=True)
        deltas = [chunk.choices[0].delta for chunk in stream]
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "One and\none."
        assert "".join(delta.content or "" for delta in deltas) == "It is <b>2</b>."


@pytest.mark.parametrize(("parser", "content"), [("none", THINKING), ("think", "It is <b>2</b>."), ("auto", THINKING)])
def test_the_operator_decides_and_a_template_without_the_tag_means_no(folder: Path, parser: str, content: str) -> None:
    settings = ChatSettings(reasoning_parser=parser)
    with serve(folder, says(folder, THINKING), chat=settings) as server:
        body = server.chat().json()
        assert body["choices"][0]["message"]["content"] == content
        assert (body["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0) == (parser == "think")


def test_a_prompt_that_ends_with_the_tag_begins_the_reasoning(thinking_folder: Path) -> None:
    settings = ChatSettings(template_kwargs=frozenset({"begin_thinking"}))
    said = says(thinking_folder, "Hm.</think>Two.")
    with serve(thinking_folder, said, chat=settings) as server:
        message = server.chat(chat_template_kwargs={"begin_thinking": True}).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "Two.")
        assert server.chat().json()["choices"][0]["message"]["content"] == "Hm.</think>Two."


def prompt_of(server: object, **fields: object) -> str:
    assert server.chat(**fields).status_code == 200
    return server.service.text.decode(server.engine.submitted[-1].prompt_token_ids)


def test_template_variables_come_from_the_request_and_a_grammar_asks_for_no_thinking(thinking_folder: Path) -> None:
    with serve(thinking_folder, says(thinking_folder, "ok"), info=tiny_info()) as server:
        assert prompt_of(server) == "Hi|"
        assert prompt_of(server, chat_template_kwargs={"enable_thinking": False}) == "Hi|<think></think>"
        assert prompt_of(server, reasoning_effort="none") == "Hi|<think></think>"
        assert prompt_of(server, reasoning_effort="low") == "Hi|"
        assert prompt_of(server, structured_outputs={"choice": ["ok"]}) == "Hi|<think></think>"
        earlier = {"role": "assistant", "content": "Two.", "reasoning_content": "Hm."}
        assert prompt_of(server, messages=[*USER, earlier]) == "1+1?|Hm.Two.|"


def test_reasoning_before_a_call(thinking_folder: Path) -> None:
    said = says(thinking_folder, '<think>A tool.</think>\n<tool_call>{"name": "add", "arguments": {}}</tool_call>')
    tools = [{"type": "function", "function": {"name": "add"}}]
    with serve(thinking_folder, said, info=tiny_info(max_model_len=4096)) as server:
        choice = server.chat(tools=tools).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning_content"] == "A tool."
    assert (choice["message"]["content"], len(choice["message"]["tool_calls"])) == (None, 1)
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {}
