"""The wire: what a client may send. Every limit is on its field; anything else is refused by name.

Source: OpenAI API reference, "Create chat completion" and "Create completion"; `top_k`, `min_p`, `repetition_penalty`,
`min_tokens`, `stop_token_ids`, `ignore_eos`, `structured_outputs`, `chat_template_kwargs` and `priority` are extensions
under the names vLLM's clients use. A null means the default, as in OpenAI's API. `docs/openai-fields.md` lists every field.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 128
MAX_TOOL_CALLS = 128
MAX_SCHEMA_BYTES = 65536
MAX_SCHEMA_DEPTH = 64
MAX_GRAMMAR_CHARS = 65536
MAX_CHOICES_OF_TEXT = 1024
MAX_PRIORITY = 100
MAX_TEMPLATE_KWARGS = 16
MAX_INT32 = 2**31 - 1

PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "function_call": ("none",),
    "modalities": (["text"],),
    "best_of": (1,),
    "suffix": ("",),
}
"""Values that ask for nothing: accepted, so that clients which spell out defaults work."""
HINTS = {
    "functions": "it is deprecated; use 'tools'",
    "function_call": "it is deprecated; use 'tools' and 'tool_choice'",
    "audio": "answers are text",
    "modalities": "answers are text; leave it out or give ['text']",
    "moderation": "nothing is moderated here; leave it out",
    "web_search_options": "no request leaves this server; leave it out",
    "suffix": "text is only continued, not filled in; leave it out",
    "best_of": "leave it out or give 1; 'n' gives several choices",
}


def _refuse_unsupported(value: Any, info: ValidationInfo) -> None:
    name = info.field_name or ""
    if value is not None and value not in PLAIN_VALUES.get(name, ()):
        raise PydanticCustomError("not_supported", "{hint}", {"hint": HINTS[name]})


NotSupported = Annotated[Any, BeforeValidator(_refuse_unsupported, json_schema_input_type=None)]
Ignored = Any
"""Describes the caller, or how OpenAI runs its own service, not the text: read and dropped."""

TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOPS)]


def _one_stop_as_list(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if value is None or isinstance(value, list):
        return value
    raise PydanticCustomError("stop_type", "should be a string or a list of at most 16 strings")


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: Ignored = None
    continuous_usage_stats: Ignored = None


class Speculation(BaseModel):
    """How drafts are used for this request; its text is the same either way."""

    model_config = ConfigDict(extra="forbid", strict=True)

    mode: Literal["auto", "off"] = "auto"
    max_draft_tokens: Annotated[int, Field(ge=0, le=MAX_INT32)] | None = None


def _within_limits(schema: dict[str, Any]) -> dict[str, Any]:
    size = len(json.dumps(schema, ensure_ascii=False).encode())
    if size > MAX_SCHEMA_BYTES:
        _refuse_schema("has {given} bytes", size, MAX_SCHEMA_BYTES)
    depth = json_depth(schema)
    if depth > MAX_SCHEMA_DEPTH:
        _refuse_schema("is {given} levels deep", depth, MAX_SCHEMA_DEPTH)
    return schema


def json_depth(value: dict[str, Any] | list[Any]) -> int:
    """Objects and arrays within one another, the outermost included."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [child for container in level for child in _children(container)]
    return depth


def _children(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [child for child in inner if isinstance(child, dict | list)]


def _refuse_schema(what: str, given: int, limit: int) -> None:
    message = f"should have at most {{limit}}: it {what}"
    raise PydanticCustomError("schema_limit", message, {"given": given, "limit": limit})


Schema = Annotated[dict[str, Any], AfterValidator(_within_limits)]
"""A JSON schema as the client wrote it."""


class StructuredOutputs(BaseModel):
    """What the text must be: exactly one of these."""

    model_config = ConfigDict(extra="forbid", strict=True)

    json_schema: Annotated[Schema | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)] | None = None
    choice: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]],
            Field(min_length=1, max_length=MAX_CHOICES_OF_TEXT),
        ]
        | None
    ) = None
    grammar: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in ("json_schema", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if len(given) + bool(self.json_object) != 1:
            raise PydanticCustomError(
                "structured_outputs", "should have exactly one of json, json_object, regex, choice and grammar"
            )
        return self


class SamplingFields(BaseModel):
    """The fields both endpoints share."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1, max_length=512)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[
        StopStrings | None,
        BeforeValidator(_one_stop_as_list, json_schema_input_type=StopString | StopStrings | None),
    ] = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT32)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_LOGIT_BIAS)] | None
    ) = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    speculation: Speculation | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdigit() and len(key) <= 10):
                raise PydanticCustomError(
                    "logit_bias_key", "keys should be token ids, but one is {key}", {"key": repr(key[:40])}
                )
        return value

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _conflict("stream_options", "it is only allowed when 'stream' is true")
        longest = self.longest_output
        if longest is not None and (self.min_tokens or 0) > longest:
            raise _conflict("min_tokens", f"it is {self.min_tokens}, more than the {longest} tokens of 'max_tokens'")
        return self

    @property
    def longest_output(self) -> int | None:
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def _conflict(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("fields_conflict", "{message}", {"param": param, "message": message})


def _absent(param: str) -> PydanticCustomError:
    return PydanticCustomError("field_absent", "{param} is missing", {"param": param})


class TextPart(BaseModel):
    """One piece of a message's text; a refusal, which an assistant's message may hold, is text too."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Ignored = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind in ("image_url", "input_image", "input_audio", "audio_url", "video_url", "file"):
            raise PydanticCustomError("not_supported", "{hint}", {"hint": f"a part of type '{kind}'; send text parts"})
        if kind == "refusal" and isinstance(value.get("refusal"), str):
            return {"type": "text", "text": value["refusal"]}
        return value


def _text_as_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if value is None or isinstance(value, list):
        return value
    raise PydanticCustomError("content_type", "should be a string or a list of text parts")


PartList = Annotated[list[TextPart], Field(min_length=1)]
TextParts = Annotated[PartList | None, BeforeValidator(_text_as_parts, json_schema_input_type=str | PartList | None)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=256)]


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: FunctionName
    arguments: str


class ToolCall(BaseModel):
    """A call that the assistant made earlier in the conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Ignored = None


class Message(BaseModel):
    """One message of a conversation; `content` holds text parts, a plain string being one part."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: TextParts = None
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    tool_call_id: CallId | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MAX_TOOL_CALLS)] | None = None
    reasoning_content: str | None = None
    refusal: Ignored = None
    annotations: Ignored = None
    audio: NotSupported = None
    function_call: NotSupported = None

    @model_validator(mode="after")
    def _has_what_its_role_needs(self) -> Self:
        if self.tool_calls is not None and self.role != "assistant":
            raise _conflict("tool_calls", f"only the assistant calls tools, not the role '{self.role}'")
        if self.content is None and self.tool_calls is None:
            raise _absent("content")
        if self.role == "tool" and self.tool_call_id is None:
            raise _absent("tool_call_id")
        return self

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content or ())


class Function(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: FunctionName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _describe_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value.get("type", "object") != "object":
            raise PydanticCustomError("parameters_type", "should be a JSON schema of type 'object'")
        return value


class Tool(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: Function


class ToolName(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: FunctionName


class ToolReference(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: ToolName


class AllowedTools(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolReference], Field(min_length=1, max_length=MAX_TOOLS)]


ToolChoiceName = Literal["none", "auto", "required"]


def _choice_as_object(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


class ToolChoice(BaseModel):
    """`"none"`, `"auto"` and `"required"` are read as objects of that type."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["none", "auto", "required", "function", "allowed_tools"]
    function: ToolName | None = None
    allowed_tools: AllowedTools | None = None

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> Self:
        for name in ("function", "allowed_tools"):
            if self.type == name and getattr(self, name) is None:
                raise _absent(name)
        return self


class JsonSchemaFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: FunctionName
    description: str | None = None
    json_schema: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise _absent("json_schema")
        return self


class Prediction(BaseModel):
    """Text that much of the answer is expected to be."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["content"]
    content: TextParts

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or ())


def _scalar(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str):
        raise PydanticCustomError("scalar_type", "should be a string, a number or a boolean")
    return value


def _names_differ(tools: list[Tool]) -> list[Tool]:
    names = [tool.function.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        message = "should have different names; '{name}' comes twice"
        raise PydanticCustomError("tool_names", message, {"name": twice})
    return tools


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
Tools = Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS), AfterValidator(_names_differ)]
Scalar = Annotated[Any, AfterValidator(_scalar)]
TemplateKwargs = Annotated[dict[str, Scalar], Field(max_length=MAX_TEMPLATE_KWARGS)]


class ChatCompletionRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: Messages
    tools: Tools | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tool_choice: Annotated[
        ToolChoice | None, BeforeValidator(_choice_as_object, json_schema_input_type=ToolChoiceName | ToolChoice | None)
    ] = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    prediction: Prediction | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    audio: NotSupported = None
    function_call: NotSupported = None
    functions: NotSupported = None
    modalities: NotSupported = None
    moderation: NotSupported = None
    web_search_options: NotSupported = None

    @model_validator(mode="after")
    def _chat_fields_agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise _conflict("top_logprobs", "it is only allowed when 'logprobs' is true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise _conflict("max_tokens", "it cannot be given beside 'max_completion_tokens', its new name")
        if self.structured_outputs is not None and self.response_format not in (None, ResponseFormat(type="text")):
            raise _conflict("structured_outputs", "it cannot be given beside 'response_format'")
        return self

    @model_validator(mode="after")
    def _chosen_tools_exist(self) -> Self:
        choice = self.tool_choice
        if choice is None or choice.type in ("none", "auto"):
            return self
        if not self.tools:
            raise _conflict("tool_choice", "it is only allowed when 'tools' are given")
        known = [tool.function.name for tool in self.tools]
        missing = next((name for name in self.callable_names if name not in known), None)
        if missing is not None:
            raise _conflict(
                "tool_choice", f"it names '{missing}', which is not among 'tools': {', '.join(known)[:200]}"
            )
        return self

    @property
    def longest_output(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def callable_names(self) -> list[str]:
        """Names of the tools that the answer may call."""
        choice = self.tool_choice
        if choice is not None and choice.type == "none":
            return []
        if choice is not None and choice.function is not None:
            return [choice.function.name]
        if choice is not None and choice.allowed_tools is not None:
            return [tool.function.name for tool in choice.allowed_tools.tools]
        return [tool.function.name for tool in self.tools or ()]

    @property
    def must_call(self) -> bool:
        choice = self.tool_choice
        if choice is None:
            return False
        return choice.type in ("required", "function") or (
            choice.allowed_tools is not None and choice.allowed_tools.mode == "required"
        )


PROMPT_FORMS = "should be a string, a list of strings, a list of token ids or a list of lists of token ids"


def _prompts(value: Any) -> list[str | list[int]]:
    """All four forms as a list of prompts; each is text or token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise PydanticCustomError("prompt_type", PROMPT_FORMS)
    if not value:
        raise PydanticCustomError("prompt_empty", "should have at least 1 item")
    if _are_token_ids(value):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise PydanticCustomError(
            "prompt_count", "should have at most {limit} prompts, not {n}", {"limit": MAX_PROMPTS, "n": len(value)}
        )
    if all(isinstance(item, str) for item in value) or all(map(_are_token_ids, value)):
        return value
    raise PydanticCustomError("prompt_type", PROMPT_FORMS)


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


PromptTokens = Annotated[list[TokenId], Field(min_length=1)]
HOW_MANY_PROMPTS = Field(min_length=1, max_length=MAX_PROMPTS)
PromptList = Annotated[list[str], HOW_MANY_PROMPTS] | Annotated[list[PromptTokens], HOW_MANY_PROMPTS]


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: Annotated[
        list[str | list[int]],
        BeforeValidator(_prompts, json_schema_input_type=str | PromptTokens | PromptList),
    ]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: NotSupported = None
    suffix: NotSupported = None

    @model_validator(mode="after")
    def _completion_fields_agree(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise _conflict("echo", "with 'logprobs' it would need the prompt's own, which are not supported")
        return self

    @property
    def longest_output(self) -> int | None:
        return COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens


COMPLETION_MAX_TOKENS = 16
"""OpenAI's default of `max_tokens` on /v1/completions; a chat runs to the end of the context."""


class TokenizeRequest(BaseModel):
    """Body of POST /tokenize, as vLLM's: text under `prompt`, or a conversation as a chat completion has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _has_one_text(self) -> Self:
        if self.prompt is None and self.messages is None:
            raise _absent("prompt")
        if self.prompt is not None and self.messages is not None:
            raise _conflict("messages", "it cannot be given beside 'prompt'")
        return self


class DetokenizeRequest(BaseModel):
    """Body of POST /detokenize, as vLLM's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    tokens: list[TokenId]
