"""The wire: what a client may send. Every limit is on its field; anything else is refused by name.

Source: OpenAI API reference, "Create chat completion" and "Create completion"; `top_k`, `min_p`, `repetition_penalty`,
`min_tokens`, `stop_token_ids` and `ignore_eos` are extensions under the names vLLM's clients use.
A null means the default, as in OpenAI's API.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
MAX_INT32 = 2**31 - 1

PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none",),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
    "suffix": ("",),
}
"""Values of features not built yet that ask for nothing: accepted, so that clients which spell out defaults work."""


def _refuse_unsupported(value: Any, info: ValidationInfo) -> None:
    plain = PLAIN_VALUES.get(info.field_name or "", ())
    if value is None or value in plain:
        return
    hint = f"leave it out or give {' or '.join(map(repr, plain))}" if plain else "leave it out"
    raise PydanticCustomError("not_supported", "{hint}", {"hint": hint})


NotSupported = Annotated[Any, BeforeValidator(_refuse_unsupported)]
Ignored = Any
"""Describes the caller, not the text: read and dropped."""

TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


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
        Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None, BeforeValidator(_one_stop_as_list)
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
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None

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


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind in ("image_url", "input_audio", "file", "refusal"):
            raise PydanticCustomError("not_supported", "{hint}", {"hint": f"a part of type '{kind}'; send text parts"})
        return value


def _text_as_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if value is None or isinstance(value, list):
        return value
    raise PydanticCustomError("content_type", "should be a string or a list of text parts")


class Message(BaseModel):
    """One message of a conversation; `content` holds text parts, a plain string being one part."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[TextPart], Field(min_length=1), BeforeValidator(_text_as_parts)]
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    refusal: Ignored = None
    annotations: Ignored = None
    audio: NotSupported = None
    function_call: NotSupported = None
    tool_calls: NotSupported = None


class ChatCompletionRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    audio: NotSupported = None
    function_call: NotSupported = None
    functions: NotSupported = None
    modalities: NotSupported = None
    parallel_tool_calls: NotSupported = None
    prediction: NotSupported = None
    reasoning_effort: NotSupported = None
    response_format: NotSupported = None
    tool_choice: NotSupported = None
    tools: NotSupported = None
    verbosity: NotSupported = None
    web_search_options: NotSupported = None

    @model_validator(mode="after")
    def _chat_fields_agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise _conflict("top_logprobs", "it is only allowed when 'logprobs' is true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise _conflict("max_tokens", "it cannot be given beside 'max_completion_tokens', its new name")
        return self

    @property
    def longest_output(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


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


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: NotSupported = None
    suffix: NotSupported = None

    @model_validator(mode="after")
    def _completion_fields_agree(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise _conflict("echo", "with 'logprobs' it would need the prompt's own, which are not supported yet")
        return self

    @property
    def longest_output(self) -> int | None:
        return COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens


COMPLETION_MAX_TOKENS = 16
"""OpenAI's default of `max_tokens` on /v1/completions; a chat runs to the end of the context."""
