"""Wire to engine and back, pure functions and two small classes: what an endpoint's answers look like.

A chunk is a string put together from a prefix made once per request: no pydantic and no dict per token.
Source of the shapes: OpenAI API reference, "The chat completion (chunk) object", "The completion object".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dspark.engine import RequestFacts, SamplingParams, TokenLogprob
from dspark.server.errors import InvalidRequestError
from dspark.server.identity import Identity
from dspark.server.parts import Part, PartKind
from dspark.server.schemas import MAX_SCHEMA_DEPTH, ChatCompletionRequest, CompletionRequest, Message, json_depth
from dspark.server.text import Vocabulary

Value = TypeVar("Value")

LOWEST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON cannot say; OpenAI's number."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one delta of the engine is to the client: the parts it made certain, in answer choice `index`."""

    index: int
    parts: Sequence[Part]
    logprobs: Sequence[TokenLogprob] | None
    finish_reason: str | None


def sampling_params(
    body: ChatCompletionRequest | CompletionRequest, vocab_size: int, seed: int | None
) -> SamplingParams:
    """The engine's parameters. seed: where the body has none. Raises InvalidRequestError for a token id outside the
    vocabulary."""
    bias = {int(key): value for key, value in (body.logit_bias or {}).items()}
    stop_token_ids = tuple(body.stop_token_ids or ())
    check_token_ids("logit_bias", list(bias), vocab_size)
    check_token_ids("stop_token_ids", stop_token_ids, vocab_size)
    return SamplingParams(
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(_or(body.top_k, 0), 0),
        min_p=_or(body.min_p, 0.0),
        seed=seed if body.seed is None else body.seed,
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=bias,
        max_tokens=body.longest_output,
        min_tokens=_or(body.min_tokens, 0),
        stop_token_ids=stop_token_ids,
        ignore_eos=_or(body.ignore_eos, False),
        logprobs=_logprobs(body),
    )


def _or(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _logprobs(body: ChatCompletionRequest | CompletionRequest) -> int | None:
    if isinstance(body, CompletionRequest):
        return body.logprobs
    return _or(body.top_logprobs, 0) if body.logprobs else None


def check_token_ids(param: str, token_ids: Sequence[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            message = f"Invalid value for '{param}': token ids should be 0..{vocab_size - 1}, but {token_id} was given"
            raise InvalidRequestError(message, param)


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates know them: text parts joined by a newline, `developer` under its older name, the
    arguments of earlier calls as objects."""
    return [_template_message(message) for message in messages]


def _template_message(message: Message) -> dict[str, Any]:
    known: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }
    for key in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, key)
        if value is not None:
            known[key] = value
    if message.tool_calls is not None:
        known["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return known


def _arguments(text: str) -> Any:
    """The object that the text is, or the text itself: a model's call may have been cut short, or be no sane object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) and json_depth(value) <= MAX_SCHEMA_DEPTH else text


def usage(facts: Sequence[RequestFacts], reasoning_tokens: int = 0) -> dict[str, Any]:
    """OpenAI's usage over all prompts of a request, and `speculation`, this server's extension.

    reasoning_tokens: from the one that completes `<think>` to the one that completes `</think>`.
    speculation: rounds (target passes of one choice), drafted, verified and accepted draft tokens, and accepted_length,
    the tokens a round gave on average, its own bonus token included (null without rounds).
    """
    prompt_tokens = sum(fact.prompt_tokens for fact in facts)
    completion_tokens = sum(fact.generated_tokens for fact in facts)
    rounds = sum(fact.rounds_with_drafts + fact.rounds_without_drafts for fact in facts)
    accepted = sum(fact.accepted_tokens for fact in facts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(fact.cached_tokens for fact in facts), "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": reasoning_tokens,
            "audio_tokens": 0,
            # of the request's `prediction`; a drafter's tokens are under `speculation`
            "accepted_prediction_tokens": sum(fact.accepted_prediction_tokens for fact in facts),
            "rejected_prediction_tokens": sum(fact.rejected_prediction_tokens for fact in facts),
        },
        "speculation": {
            "rounds": rounds,
            "drafted": sum(fact.drafted_tokens for fact in facts),
            "verified": sum(fact.verified_tokens for fact in facts),
            "accepted": accepted,
            "accepted_length": round(1 + accepted / rounds, 3) if rounds else None,
        },
    }


class Answer:
    """The JSON answer or the chunks of one request; its two kinds differ by endpoint."""

    id_prefix: str
    object_name: str
    chunk_object_name: str

    def __init__(
        self, identity: Identity, model: str, fingerprint: str, vocabulary: Vocabulary, *, include_usage: bool
    ) -> None:
        self._vocabulary = vocabulary
        self._head: dict[str, Any] = {
            "id": identity.response_id(self.id_prefix),
            "object": self.object_name,
            "created": identity.created_unix_s,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._chunk_head = json.dumps(self._head | {"object": self.chunk_object_name}, separators=(",", ":"))[:-1]
        self._chunk_tail = ',"usage":null}' if include_usage else "}"

    def complete(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """The JSON body once every choice has finished."""
        by_choice: dict[int, list[Piece]] = {}
        for piece in pieces:
            by_choice.setdefault(piece.index, []).append(piece)
        choices = [self._choice(index, by_choice[index]) for index in sorted(by_choice)]
        return self._head | {"choices": choices, "usage": usage}

    def chunks(self, piece: Piece) -> list[str]:
        """The chunks, as JSON, that tell the client of this piece; none when it has nothing to see yet."""
        raise NotImplementedError

    def usage_chunk(self, usage: dict[str, Any]) -> str:
        return f'{self._chunk_head},"choices":[],"usage":{json.dumps(usage)}}}'

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, choice: str) -> str:
        return f'{self._chunk_head},"choices":[{choice}]{self._chunk_tail}'


class ChatAnswer(Answer):
    id_prefix, object_name, chunk_object_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, identity: Identity, model: str, fingerprint: str, vocabulary: Vocabulary, *, include_usage: bool
    ) -> None:
        super().__init__(identity, model, fingerprint, vocabulary, include_usage=include_usage)
        self._identity = identity
        self._greeted: set[int] = set()

    def chunks(self, piece: Piece) -> list[str]:
        """Per choice OpenAI's sequence: the role, then text and calls, then a chunk with the reason alone.

        The logprobs of a piece, whatever its parts, stand in the first of its chunks.
        """
        chunks = []
        if piece.index not in self._greeted:
            self._greeted.add(piece.index)
            chunks.append(self._delta(piece.index, '{"role":"assistant","content":"","refusal":null}'))
        deltas = [self._part_delta(piece.index, part) for part in piece.parts]
        if piece.logprobs and not deltas:
            deltas = ['{"content":""}']
        logprobs = "null" if not piece.logprobs else json.dumps(self._logprobs(piece.logprobs))
        for delta in deltas:
            chunks.append(self._delta(piece.index, delta, logprobs))
            logprobs = "null"
        if piece.finish_reason is not None:
            chunks.append(self._delta(piece.index, "{}", finish_reason=json.dumps(piece.finish_reason)))
        return chunks

    def _part_delta(self, index: int, part: Part) -> str:
        text = json.dumps(part.text)
        match part.kind:
            case PartKind.CONTENT:
                return f'{{"content":{text}}}'
            case PartKind.REASONING:
                return f'{{"reasoning_content":{text}}}'
            case PartKind.ARGUMENTS:
                return f'{{"tool_calls":[{{"index":{part.call},"function":{{"arguments":{text}}}}}]}}'
            case PartKind.CALL:
                call_id = self._identity.tool_call_id(index, part.call)
                function = f'{{"name":{text},"arguments":""}}'
                call = f'{{"index":{part.call},"id":"{call_id}","type":"function","function":{function}}}'
                return f'{{"tool_calls":[{call}]}}'

    def _delta(self, index: int, delta: str, logprobs: str = "null", finish_reason: str = "null") -> str:
        return self._chunk(f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish_reason}}}')

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        logprobs = None
        if any(piece.logprobs is not None for piece in pieces):
            logprobs = self._logprobs([entry for piece in pieces for entry in piece.logprobs or ()])
        return {
            "index": index,
            "message": self._message(index, [part for piece in pieces for part in piece.parts]),
            "logprobs": logprobs,
            "finish_reason": pieces[-1].finish_reason,
        }

    def _message(self, index: int, parts: Sequence[Part]) -> dict[str, Any]:
        """`content` is null where there are calls and no text, as OpenAI has it."""
        content = _text_of(parts, PartKind.CONTENT)
        reasoning = _text_of(parts, PartKind.REASONING)
        calls = [
            {
                "id": self._identity.tool_call_id(index, begin.call),
                "type": "function",
                "function": {
                    "name": begin.text,
                    "arguments": _text_of([part for part in parts if part.call == begin.call], PartKind.ARGUMENTS),
                },
            }
            for begin in parts
            if begin.kind is PartKind.CALL
        ]
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return message

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            self._entry(entry.token_id, entry.logprob) | {"top_logprobs": [self._entry(*top) for top in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._vocabulary.token_bytes(token_id)
        return {
            "token": self._vocabulary.token_text(token_id),
            "logprob": max(logprob, LOWEST_LOGPROB),
            "bytes": list(data),
        }


class CompletionAnswer(Answer):
    id_prefix, object_name, chunk_object_name = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, identity: Identity, model: str, fingerprint: str, vocabulary: Vocabulary, *, include_usage: bool
    ) -> None:
        super().__init__(identity, model, fingerprint, vocabulary, include_usage=include_usage)
        self._text_offsets: dict[int, int] = {}

    def chunks(self, piece: Piece) -> list[str]:
        text = _text_of(piece.parts, PartKind.CONTENT)
        if not text and not piece.logprobs and piece.finish_reason is None:
            return []
        logprobs = None if piece.logprobs is None else self._logprobs(piece.index, piece.logprobs)
        return [
            self._chunk(
                f'{{"index":{piece.index},"text":{json.dumps(text)},"logprobs":{json.dumps(logprobs)},'
                f'"finish_reason":{json.dumps(piece.finish_reason)}}}'
            )
        ]

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        logprobs = None
        if any(piece.logprobs is not None for piece in pieces):
            logprobs = self._logprobs(index, [entry for piece in pieces for entry in piece.logprobs or ()])
        return {
            "index": index,
            "text": "".join(_text_of(piece.parts, PartKind.CONTENT) for piece in pieces),
            "logprobs": logprobs,
            "finish_reason": pieces[-1].finish_reason,
        }

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        tokens = [self._token_name(entry.token_id) for entry in entries]
        offsets = []
        offset = self._text_offsets.get(index, 0)
        for entry in entries:
            offsets.append(offset)
            offset += len(self._vocabulary.token_text(entry.token_id))
        self._text_offsets[index] = offset
        tops = [{self._token_name(top_id): max(value, LOWEST_LOGPROB) for top_id, value in e.top} for e in entries]
        return {
            "tokens": tokens,
            "token_logprobs": [max(entry.logprob, LOWEST_LOGPROB) for entry in entries],
            "top_logprobs": tops if any(tops) else None,
            "text_offset": offsets,
        }

    def _token_name(self, token_id: int) -> str:
        """The token's text, or OpenAI's `bytes:` notation where its bytes are not whole characters."""
        data = self._vocabulary.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _text_of(parts: Sequence[Part], kind: PartKind) -> str:
    return "".join(part.text for part in parts if part.kind is kind)
