"""What form a chat's answer takes: free text that may hold calls, calls and nothing else, or a structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dspark.server.errors import InvalidRequestError
from dspark.server.grammars import AnyJsonObject, Choice, GrammarSpec, JsonSchema, Lark, Regex
from dspark.server.parts import PlainText, TextParser
from dspark.server.reasoning import END_THINK, THINK, ReasoningParser
from dspark.server.schemas import ChatCompletionRequest, StructuredOutputs, Tool
from dspark.server.tool_calls import (
    ENFORCED,
    CallFormat,
    CallParser,
    calls_grammar,
    calls_or_answer_grammar,
)


@dataclass(frozen=True, slots=True)
class Structure:
    """A grammar that the answer must follow, and the field that asked for it."""

    spec: GrammarSpec
    param: str


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """structure: enforced from the first token on. calls: how calls are written, None where none can be.
    names: of the tools that may be called. single: the first call ends the answer. reasoning: it may begin with some.
    """

    structure: Structure | None = None
    calls: CallFormat | None = None
    names: frozenset[str] = frozenset()
    single: bool = False
    reasoning: bool = False

    def parser(self, *, reasoning_begun: bool) -> TextParser:
        """Of one choice. reasoning_begun: the prompt ends with `<think>`."""
        parser: TextParser = PlainText()
        if self.calls is not None:
            parser = CallParser(self.calls, self.names, single=self.single)
        return ReasoningParser(parser, begun=reasoning_begun) if self.reasoning else parser

    @property
    def ends_itself(self) -> bool:
        """The text may be over before the model ends it."""
        return self.calls is not None and self.single

    @property
    def markers(self) -> list[str]:
        """What the parser looks for, and what some tokenizers have as control tokens."""
        calls = [self.calls.opens] if self.calls is not None and self.calls.opens else []
        return [*calls, *((THINK, END_THINK) if self.reasoning else ())]


def answer_form(body: ChatCompletionRequest, call_format: CallFormat, *, reasoning: bool) -> AnswerForm:
    """call_format, reasoning: what the model writes by itself. Raises InvalidRequestError for a contradiction.

    A structure holds from the first token on, so that there is no reasoning before it.
    """
    names = frozenset(body.callable_names)
    named = body.tool_choice is not None and body.tool_choice.type == "function"
    single = named or body.parallel_tool_calls is False
    tools = {tool.function.name: _parameters(tool) for tool in body.tools or () if tool.function.name in names}
    if body.must_call:
        structure = Structure(Lark(calls_grammar(tools, single=single)), "tools")
        return AnswerForm(structure, ENFORCED, names, single)
    wanted = _response_format(body) or structured_outputs(body.structured_outputs)
    if not names:
        return AnswerForm(wanted, reasoning=reasoning and wanted is None)
    if wanted is None:
        return AnswerForm(None, call_format, names, single, reasoning)
    grammar = calls_or_answer_grammar(tools, _object_schema(wanted), single=single)
    return AnswerForm(Structure(Lark(grammar), wanted.param), ENFORCED, names, single)


def _parameters(tool: Tool) -> dict[str, Any]:
    """The schema of a call's arguments; without a word on other properties there are none, so that the model ends."""
    schema = tool.function.parameters
    if schema is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    open_ended = {
        "additionalProperties",
        "patternProperties",
        "unevaluatedProperties",
        "$ref",
        "allOf",
        "anyOf",
        "oneOf",
    }
    closing = {"additionalProperties": False} if "properties" in schema and not open_ended & schema.keys() else {}
    return {"type": "object", **schema, **closing}


def _response_format(body: ChatCompletionRequest) -> Structure | None:
    asked = body.response_format
    if asked is None or asked.type == "text":
        return None
    if asked.json_schema is None or asked.json_schema.json_schema is None:
        return Structure(AnyJsonObject(), "response_format")
    return Structure(JsonSchema(asked.json_schema.json_schema), "response_format.json_schema.schema")


def structured_outputs(asked: StructuredOutputs | None) -> Structure | None:
    if asked is None:
        return None
    if asked.json_schema is not None:
        return Structure(JsonSchema(asked.json_schema), "structured_outputs.json")
    if asked.regex is not None:
        return Structure(Regex(asked.regex), "structured_outputs.regex")
    if asked.choice is not None:
        return Structure(Choice(tuple(asked.choice)), "structured_outputs.choice")
    if asked.grammar is not None:
        return Structure(Lark(asked.grammar), "structured_outputs.grammar")
    return Structure(AnyJsonObject(), "structured_outputs.json_object")


def _object_schema(structure: Structure) -> dict[str, Any]:
    if isinstance(structure.spec, AnyJsonObject):
        return {"type": "object"}
    if isinstance(structure.spec, JsonSchema) and structure.spec.schema.get("type") == "object":
        return structure.spec.schema
    param = structure.param
    raise InvalidRequestError(
        f"Invalid use of '{param}': beside tools that may be called it must describe a JSON object; "
        "give 'tool_choice': 'none', or another structure",
        param,
    )


def described(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as chat templates know them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                "description": tool.function.description or "",
                "parameters": tool.function.parameters or {"type": "object", "properties": {}},
            },
        }
        for tool in tools
    ]
