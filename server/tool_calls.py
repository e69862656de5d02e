"""Tool calls: how models write them, how they are read from the stream, how they are enforced, and how a model is told.

Formats: Hermes and Qwen (`<tool_call>{"name": …, "arguments": {…}}</tool_call>`), Llama 3 (`{"name": …, "parameters":
{…}}`, several apart by `;`), Mistral (`[TOOL_CALLS][{…}, {…}]`). What `tool_choice` enforces is written as
`[{"name": …, "arguments": {…}}, …]`, whatever the model's own format.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspark.server.grammars import JSON_STYLE
from dspark.server.parts import Part, PartKind, held_back

WHITE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class CallFormat:
    """`opens`, then JSON objects with `between` and white space around them, then `closes`.

    begins: a character that begins calls where it is the first of the answer, without `opens`; "" for none.
    certain: nothing else begins so, so that a call whose name was cut off is dropped and no content.
    template_mark: what the chat templates of such models contain.
    """

    name: str
    opens: str = ""
    begins: str = ""
    between: str = ""
    closes: str = ""
    certain: bool = False
    template_mark: str = ""


HERMES = CallFormat("hermes", opens="<tool_call>", closes="</tool_call>", template_mark="<tool_call>")
MISTRAL = CallFormat("mistral", opens="[TOOL_CALLS]", between="[],", template_mark="[TOOL_CALLS]")
LLAMA3_JSON = CallFormat(
    "llama3_json", opens="<|python_tag|>", begins="{", between=";", template_mark="<|start_header_id|>"
)
ENFORCED = CallFormat("enforced", begins="[", between="[],", certain=True)
CALL_FORMATS = {call_format.name: call_format for call_format in (HERMES, MISTRAL, LLAMA3_JSON)}


def call_format_of(template_source: str) -> CallFormat:
    """The format that a chat template teaches; Hermes where it teaches none, since that is what we then teach."""
    marked = (call_format for call_format in CALL_FORMATS.values() if call_format.template_mark in template_source)
    return next(marked, HERMES)


# from text to calls

_HEAD = re.compile(
    r'\{\s{0,16}"name"\s{0,16}:\s{0,16}"([a-zA-Z0-9_-]{1,64})"\s{0,16},\s{0,16}"(?:arguments|parameters)"\s{0,16}:\s{0,16}(?=\{)'
)
_LONGEST_HEAD = 256
_NOT_JSON = re.compile(r'[^\s{}\[\]:,0-9a-zA-Z+.\-"]')


class _JsonEnd:
    """Finds where a JSON value that begins with a brace ends, in a text that arrives in pieces."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def find(self, text: str, start: int) -> tuple[int, bool] | None:
        """(index just after the value, True), or (index of a character that no JSON has there, False), or None."""
        for index in range(start, len(text)):
            char = text[index]
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return index + 1, True
            elif _NOT_JSON.match(char):
                return index, False
        return None


class CallParser:
    """Calls and content of one choice. A call counts from `"arguments": {` on, and only of a tool in `names`; then its
    arguments are shown as the model writes them. All else that is no call stays content, to the letter.
    """

    in_reasoning = False

    def __init__(self, call_format: CallFormat, names: Collection[str], *, single: bool) -> None:
        """single: the answer is over with its first call."""
        self._format = call_format
        self._names = names
        self._single = single
        self._state = self._beginning if call_format.begins else self._content
        self._text = ""  # not dealt with yet
        self._skipped = ""  # what came since the marker: content after all, unless a call follows
        self._called = False  # since the marker
        self._scanned = 0
        self._json = _JsonEnd()
        self._parts: list[Part] = []
        self._has_content = False
        self.calls = 0
        self.done = False

    def feed(self, text: str) -> list[Part]:
        self._text += text
        while not self.done and self._state():
            pass
        parts, self._parts = self._parts, []
        return parts

    def finish(self) -> list[Part]:
        within = (self._between, self._object) if self._format.certain else ()
        if self._state not in (self._arguments, self._tail, *within) and not self.done:
            rest = self._skipped + self._text
            self._show(rest if not self.calls or rest.strip() else "")
        self._text = ""
        parts, self._parts = self._parts, []
        return parts

    # Each state takes what it can from `_text`; True: another state goes on with the rest.

    def _beginning(self) -> bool:
        text = self._text.lstrip(WHITE)
        if not text:
            return False
        if text[0] == self._format.begins:
            self._enter(len(self._text) - len(text))
        else:
            self._state = self._content
        return True

    def _content(self) -> bool:
        if self.calls and not self._has_content:
            self._text = self._text.lstrip(WHITE)
        opens = self._format.opens
        at = self._text.find(opens) if opens else -1
        if at >= 0:
            shown = self._text[:at].rstrip(WHITE)
            self._show(shown)
            self._text = self._text[len(shown) :]
            self._enter(at - len(shown) + len(opens))
            return True
        # white space is held back with it: before a call there is none
        shown = self._text[: len(self._text) - held_back(self._text, opens)].rstrip(WHITE)
        self._show(shown)
        self._text = self._text[len(shown) :]
        return False

    def _enter(self, length: int) -> None:
        """So many characters lead up to a call."""
        self._skipped, self._text = self._text[:length], self._text[length:]
        self._called = False
        self._state = self._between

    def _between(self) -> bool:
        text = self._text.lstrip(WHITE + self._format.between)
        if not self._called:
            self._skipped += self._text[: len(self._text) - len(text)]
        self._text = text
        closes = self._format.closes
        if not text or (closes and closes.startswith(text) and text != closes):
            return False
        if text[0] == "{":
            self._json, self._scanned = _JsonEnd(), 0
            self._state = self._object
        elif closes and text.startswith(closes):
            self._leave(self._text[: len(closes)])
        else:
            self._leave("")
        return True

    def _leave(self, closing: str) -> None:
        """Back to content; what led up to a call is content too when none came."""
        if not self._called:
            self._show(self._skipped + closing)
        self._text = self._text[len(closing) :]
        self._skipped = ""
        self._state = self._content

    def _object(self) -> bool:
        head = _HEAD.match(self._text) if self._scanned <= _LONGEST_HEAD else None
        if head is not None and head[1] in self._names:
            self._begin_call(head[1])
            self._text = self._text[head.end() :]
            self._json = _JsonEnd()
            self._state = self._arguments
            return True
        end = self._json.find(self._text, self._scanned)
        self._scanned = len(self._text)
        if end is None:
            return False
        at, complete = end
        call = _whole_call(self._text[:at], self._names) if complete else None
        if call is None:
            self._show(self._skipped + self._text[:at])
            self._skipped = ""
            self._state = self._content
        else:
            name, arguments = call
            self._begin_call(name)
            self._parts.append(Part(PartKind.ARGUMENTS, arguments, self.calls - 1))
            self._end_call()
        self._text = self._text[at:]
        return True

    def _arguments(self) -> bool:
        end = self._json.find(self._text, 0)
        at = len(self._text) if end is None else end[0]
        if at:
            self._parts.append(Part(PartKind.ARGUMENTS, self._text[:at], self.calls - 1))
        self._text = self._text[at:]
        if end is None:
            return False
        if end[1]:
            self._json = _JsonEnd(depth=1)
            self._state = self._tail
        else:
            self._end_call()
        return True

    def _tail(self) -> bool:
        """What is left of the call's object behind its arguments."""
        end = self._json.find(self._text, 0)
        self._text = "" if end is None else self._text[end[0] :]
        if end is not None:
            self._end_call()
        return end is not None

    def _begin_call(self, name: str) -> None:
        self._skipped, self._called = "", True
        self._parts.append(Part(PartKind.CALL, name, self.calls))
        self.calls += 1

    def _end_call(self) -> None:
        self._state = self._between
        self.done = self._single

    def _show(self, text: str) -> None:
        if text:
            self._has_content = True
            self._parts.append(Part(PartKind.CONTENT, text))


def _whole_call(text: str, names: Collection[str]) -> tuple[str, str] | None:
    """(name, arguments as JSON) of a call whose keys come in an order of their own, else None."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name = call.get("name")
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the JSON as a string, as OpenAI's API does
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)


# grammars that leave no choice but to call

MOST_CALLS = 16
"""Of one enforced answer; a small model would not end by itself."""


def calls_grammar(parameters: Mapping[str, dict[str, Any]], *, single: bool) -> str:
    """Lark text of an answer that is one call, or up to MOST_CALLS. parameters: JSON schema by tool name."""
    return "start: calls\n" + _calls_rules(parameters, single=single)


def calls_or_answer_grammar(parameters: Mapping[str, dict[str, Any]], answer: dict[str, Any], *, single: bool) -> str:
    """The same, or JSON of the schema `answer`, which is an object: its brace tells it from the calls' bracket."""
    rules = _calls_rules(parameters, single=single)
    return f"start: calls | answer\nanswer: {_json(answer)}\n{rules}"


def _calls_rules(parameters: Mapping[str, dict[str, Any]], *, single: bool) -> str:
    more = "" if single else f' (", " call){{0,{MOST_CALLS - 1}}}'
    rules = [f'calls: "[" call{more} "]"', "call: " + " | ".join(f"call_{k}" for k in range(len(parameters)))]
    for k, (name, schema) in enumerate(parameters.items()):
        head = json.dumps(f'{{"name": "{name}", "arguments": ')
        rules += [f'call_{k}: {head} arguments_{k} "}}"', f"arguments_{k}: {_json(schema)}"]
    return "\n".join(rules) + "\n"


def _json(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": JSON_STYLE})


# what the model is told

_TOOLS_PROMPT = """\
You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""Qwen's words, which many models have seen in training."""


def with_tools_in_text(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For a template that knows no tools: they are described in the system message, calls are written into the
    assistant's content, and results come as the user's `<tool_response>`."""
    told: list[dict[str, Any]] = []
    if tools:
        has_system = messages[0]["role"] == "system"
        system = messages[0]["content"] if has_system else ""
        prompt = _TOOLS_PROMPT.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        told.append({"role": "system", "content": f"{system}\n\n{prompt}".lstrip()})
        messages = messages[1:] if has_system else messages
    for message in messages:
        if message["role"] == "tool":
            response = f"<tool_response>\n{message['content']}\n</tool_response>"
            if told and told[-1].get("holds_responses"):
                told[-1]["content"] += f"\n{response}"
            else:
                told.append({"role": "user", "content": response, "holds_responses": True})
        else:
            told.append(_with_calls_in_content(message))
    return [{key: value for key, value in message.items() if key != "holds_responses"} for message in told]


def _with_calls_in_content(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    if not calls:
        return message
    content = "\n".join([message["content"], *calls] if message["content"] else calls)
    return {key: value for key, value in message.items() if key != "tool_calls"} | {"content": content}


def short_call_id(call_id: str) -> str:
    """Nine letters and digits that follow from the id: all that Mistral's templates let pass."""
    if re.fullmatch(r"[a-zA-Z0-9]{9}", call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]
